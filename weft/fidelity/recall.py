"""Recall: numbers hidden in prose, and asked for at its end.  The task of `tools/tiny/mixture.py`, for any model that chats.

... prose.  The number of Anna's boat is 4711.  More prose ...  What is the number of Anna's boat?  ->  4711
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OWNERS = (
    "Alice Ben Clara David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nick Olive Paul Queenie Robert Sarah Tom "
    "Ursula Victor Wendy Xavier Yvonne Zach"
).split()
THINGS = (
    "lamp key box door coat ring book boat drum clock chair horse garden letter mirror piano ticket wagon basket violin"
).split()
"""What the bundled model was taught with."""
FACTS = 4
LEAST = 0.8
"""A stack's recall says something only where the reference path recalls so much."""
ANSWER_TOKENS = 12

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Question:
    """ids: the whole prompt.  answer: the number that was asked for."""

    ids: tuple[int, ...]
    answer: str

    def right(self, text: str) -> bool:
        """Whether the first number in an answer is the one that was asked for."""
        found = re.search(r"\d+", text)
        return found is not None and found[0] == self.answer


def questions(
    encode: Encode, ask: Callable[[str], Sequence[int]], prose: Sequence[int], length: int, count: int, seed: int = 9
) -> list[Question]:
    """`count` prompts of about `length` tokens, each with four facts in prose and a question about one of them.

    encode: text to ids.  ask: a question to the ids of a chat turn that ends where the answer begins.  prose: filler, repeated
    where it is short.
    """
    rnd = random.Random(seed)
    found = []
    for _ in range(count):
        keys: dict[tuple[str, str], str] = {}
        while len(keys) < FACTS:
            keys[rnd.choice(OWNERS), rnd.choice(THINGS)] = f"{rnd.randrange(10_000):04d}"
        facts = [tuple(encode(f"\n\nThe number of {a}'s {b} is {number}.\n\n")) for (a, b), number in keys.items()]
        (owner, thing), answer = rnd.choice(list(keys.items()))
        asked = tuple(ask(f"What is the number of {owner}'s {thing}?"))
        room = max(0, length - sum(map(len, facts)) - len(asked))
        start = rnd.randrange(max(1, len(prose)))
        filler = [prose[(start + i) % len(prose)] for i in range(room)]
        cuts = sorted(rnd.randrange(room + 1) for _ in facts)
        ids: list[int] = []
        done = 0
        for cut, fact in zip(cuts, facts, strict=True):
            ids += [*filler[done:cut], *fact]
            done = cut
        found.append(Question((*ids, *filler[done:], *asked), answer))
    return found
