"""A draft model with a tokenizer of its own: it guesses the tokens whose text both vocabularies have.

Paper    Ramakrishnan et al., OmniDraft: A Cross-vocabulary, Online Adaptive Drafter for On-device Speculative Decoding,
         arXiv:2507.02659 (000-53), its direct map; Timor et al., Accelerating LLM Inference with Lossless Speculative Decoding
         Algorithms for Heterogeneous Vocabularies, arXiv:2502.05202, token-level intersection
Rule     a token of the draft and one of the target that are the same bytes mean the same, and the first ends of both do.  A guess
         has the draft's law over these, renormalised: q(t) = q'(s(t)) / sum over shared u of q'(s(u)), 0 for all others, under
         the request's own temperature, truncation, bias and penalties.  Up to `guesses` are drawn one after the other
Shapes   logits [sequences that still guess, vocab of the target] in each pass, those outside -inf; one row of the draft for each
         token of the target
Units    guesses: tokens
Cost     as draft=speculative_sampling: a pass of the draft model for each guess; its weights and KV; and a row of the target's
         whole vocabulary for each row of logits.  The two vocabularies are compared once
Pays     where no smaller model has the target's vocabulary.  On the grown 0.5B shape, one sequence at temperature 0.8: 2.1 times
         no draft while all tokens are shared (as draft=speculative_sampling), 1.6 with a draft that knows 1,266 of 4,096, 1.2
         with 566; greedily 2.8, 2.3 and 2.1; four sequences 1.4, 1.0 and 0.96 (controller off).  On the bundled model, of
         whose pass the draft's is a large part, it does not: 0.69, 0.60 and 0.48
Differs  a token of the target that the draft's vocabulary does not have is read by the draft as the longest end of it that it
         has: one row for each token, where OmniDraft and Timor et al. would read all of its pieces.  Laws stay right, guesses
         after such tokens stand less often.  Nothing is merged out of several tokens of the draft (OmniDraft's cache of
         n-grams), and the draft does not learn.  Noise as in draft=speculative_sampling.  Guesses end at an end id
Raises   ValueError unless 1 <= guesses <= 32, or where model is empty; ConfigError where a tokenizer cannot be read, or the two
         share no text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.draft._common import chained
from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Ask, Forward, Guesses, Translation, Vocabulary, Words
from weft.traits import Effect, Trait, Traits

MOST = 32


@register("draft", "crossvocab")
@dataclass(slots=True, kw_only=True)
class CrossVocab:
    """guesses: tokens drafted a step.  model: the draft's checkpoint, with its tokenizer."""

    guesses: int = 4
    model: str = "bundled"
    translation: Translation | None = field(default=None, init=False, repr=False, compare=False)
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = False
    translates: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"guesses": 3}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.SECOND_MODEL}), effects=frozenset({Effect.GUESSES})
    )

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST:
            raise ValueError(f"guesses must be from 1 to {MOST}, got {self.guesses}")
        if not self.model:
            raise ValueError("the draft model's name is empty; leave it out for the one that comes with weft")

    def attach(self, words: Words) -> None:
        """Compare the vocabularies.  Raises ConfigError."""
        self.translation = words.once(
            f"crossvocab {self.model}", lambda vocabulary: translation(vocabulary, words.of(self.model), self.model)
        )

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        assert run is not None
        return chained(asks, run, [min(self.guesses, ask.most) for ask in asks], self.acts)

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted


def translation(target: Vocabulary, second: Vocabulary, name: str) -> Translation:
    """Between two vocabularies.  Of ids with equal text the lowest counts.  Raises ConfigError where no text is shared."""
    mine, theirs = _texts(target), _texts(second)
    pairs = [(theirs[text], mine[text]) for text in theirs if text in mine]
    if not pairs:
        raise ConfigError(
            f"the tokenizers of the model and of {name} share no token's text, so one cannot guess for the other; name another "
            "model='...'"
        )
    if second.ends and target.ends:
        pairs.append((second.ends[0], target.ends[0]))
    pairs.sort()
    end = second.ends[0] if second.ends else 0
    marks = {second.tokens[i]: i for i in sorted(second.special, reverse=True) if second.tokens[i]}
    reads = []
    for i, text in enumerate(target.tokens):
        if i in target.special:
            reads.append(marks.get(text, end))  # an end, too, is read as what it is where the draft has more than one
        else:  # the whole of it, or what a model of this kind best goes on from: its end
            reads.append(next((theirs[text[at:]] for at in range(len(text)) if text[at:] in theirs), end))
    return Translation(tuple(reads), tuple(own for own, _ in pairs), tuple(means for _, means in pairs))


def _texts(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The lowest id of each text; ends and other special tokens are none."""
    last = len(vocabulary.tokens) - 1
    backwards = ((text, last - i) for i, text in enumerate(reversed(vocabulary.tokens)))
    return {text: i for text, i in backwards if text and i not in vocabulary.special}
