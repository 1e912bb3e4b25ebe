"""The requests of the generated tests: few, short, and such that every kind of technique finds something to do.

They share a beginning (prefix reuse, shared attention), quote themselves (prompt lookup), are longer than a step (chunks) and
longer than a small budget (compression), ask for several sequences (forks), do not all fit the pool at once (eviction,
preemption), and come twice (tiers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weft.types import Grammar, RequestSpec, SamplingSpec, TokenItem

PROSE = (
    "The lighthouse stood at the end of a long spit of shingle, and for eleven years nobody had kept it but Mr. Harrow. He rose "
    "before the sun, wound the clockwork that turned the lamp, trimmed the wick, and wrote the weather into a book with a green "
    "cover. On clear days he could see the whole of the bay: the fishing boats, the white houses on the hill, and the road that "
    "went over the moor to the town. On other days he saw nothing at all, and then he listened.",
    "It was on such a day, in the third week of November, that he heard the bell. It was not the bell of the church, which was "
    "cracked, nor that of the harbour, which was never rung after dark. It came from the water, slow and low, as if somebody "
    "struck it with a wet hand. He put on his coat, took the lantern from its nail, and went down the stair. The door was heavy "
    "with the wind. Outside there was only fog, and the sound of the sea going in and out among the stones.",
    '"Who is there?" he called. Nobody answered. He walked to the end of the spit, holding the lantern high, and there, half in '
    "the water and half out of it, lay a boat that he had never seen before. It was painted black. In its bow hung a small "
    "brass bell, and every wave that lifted the boat made it ring. There was a coat in it, neatly folded, a loaf of bread, and a "
    "letter, and on the letter stood his own name, written in a hand that he knew very well, for it was his.",
    "He did not open it at once. He carried it up the stair and laid it on the table, beside the book with the green cover, and "
    "made tea, and drank it, and looked at the letter. Then he read what he had written on the first page of the book, eleven "
    "years ago, when he had come here from the town with one trunk and no intention of staying. The hand was the same. The ink "
    "was the same. Only the date of the letter was another one: it was tomorrow's.",
)
"""Written for these tests; no model has read it."""
QUESTIONS = (
    "What did he hear?",
    "He opened the letter and read",
    "The boat was painted black. In its bow hung",
    "On clear days he could see the whole of the bay: the",
    '"Who is there?" he',
    "The hand was the same. The ink",
)


FACTS = {("Anna", "boat"): "4711", ("Tom", "lamp"): "0382", ("Mary", "clock"): "9265", ("Jack", "ring"): "1870"}
"""Owner and thing to the number that is told, in the words that the bundled model was taught with."""
ASKED, BETWEEN = 2, 120
"""How often a fact is asked for before it is asked for again, and tokens of prose in between."""


@dataclass(frozen=True, slots=True)
class Workload:
    """rounds: requests that are sent together, each round after the one before has ended.  Seeds are distinct."""

    rounds: tuple[tuple[RequestSpec, ...], ...]

    @property
    def specs(self) -> list[RequestSpec]:
        return [spec for one in self.rounds for spec in one]


def prompts(encode: object) -> list[tuple[int, ...]]:
    """Token ids of the prompts.  encode: text to ids."""
    assert callable(encode)
    story = [tuple(encode(text)) for text in PROSE]
    asked = [tuple(encode(text)) for text in QUESTIONS]
    found = [(*story[0], *asked[i]) for i in range(3)]  # one beginning
    found += [(*story[1], *story[1][:60], *asked[3])]  # quotes itself
    found += [(*story[2], *story[3], *asked[4]), (*story[3][:40], *asked[5])]
    found += [(*story[0], *story[1], *story[2][:50])]
    return found


def workload(
    encode: object, tokens: int = 24, companions: Sequence[tuple[int, ...]] = (), grammars: Sequence[Grammar] = ()
) -> Workload:
    """Two rounds of the same requests, greedy and seeded ones mixed; `companions` go with each where a stack asks for them, and
    one of `grammars`, in turns."""
    sent = []
    for turn in range(2):
        specs = []
        for i, ids in enumerate(prompts(encode)):
            greedy = SamplingSpec(temperature=0.0, max_tokens=tokens)
            seeded = SamplingSpec(temperature=0.8, top_p=0.95, max_tokens=tokens)
            specs.append(
                RequestSpec(
                    id=100 * turn + i + 1,
                    items=(TokenItem(ids),),
                    sampling=seeded if i % 2 else greedy,
                    seed=1000 * turn + i,
                    n=2 if i == 1 else 1,
                    companions=tuple((TokenItem(ids),) for ids in companions),
                    grammar=grammars[i % len(grammars)] if grammars else None,
                )
            )
        sent.append(tuple(specs))
    return Workload(tuple(sent))


def asked_again(encode: object) -> tuple[list[RequestSpec], dict[int, tuple[int, ...]]]:
    """(requests, the answer of each by its id): a fact, questions about it that are answered, prose, and the question again.

    What matters is in the first tokens, and rows were looking at it before the prose came.
    """
    assert callable(encode)
    prose = [token for text in PROSE for token in encode(text)]
    specs, answers = [], {}
    for i, ((owner, thing), number) in enumerate(FACTS.items()):
        question, answer = f"<|user|>What is the number of {owner}'s {thing}?<|end|><|assistant|>", f"{number}<|end|>"
        told = encode(f"The number of {owner}'s {thing} is {number}.\n\n" + (question + answer) * ASKED)
        ids = (*told, *prose[40 * i : 40 * i + BETWEEN], *encode(question))
        law = SamplingSpec(temperature=0.0, max_tokens=1)
        specs.append(RequestSpec(id=i + 1, items=(TokenItem(ids),), sampling=law, seed=i))
        answers[i + 1] = tuple(encode(answer))
    return specs, answers
