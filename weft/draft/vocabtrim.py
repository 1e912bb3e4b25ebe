"""VocabTrim: a draft model whose head has the rows of common tokens only.

Paper    Goel et al., VOCABTRIM: Vocabulary Pruning for Efficient Speculative Decoding in LLMs, arXiv:2506.22694 (000-64)
Rule     `keep` tokens are kept: the model's ends, and those that a text has most often, of equals the smaller id.  The draft
         computes logits of these alone, q(token) = 0 for all others; up to `guesses` tokens are drawn one after the other, and
         the target verifies them with its whole vocabulary
Shapes   the draft's head [keep, width] instead of [vocab, width]
Units    guesses, keep: tokens
Cost     a pass of the draft model for each guess, without the rows of its head that were left out; those rows stay in memory, and
         the kept ones stand there twice.  The text is read once
Pays     hardly with a draft whose 4,096 rows are soon read: with 1,024 of them, on the grown 0.5B shape, one sequence goes 2.9
         (greedily) and 1.9 times (at temperature 0.8) as fast as with no draft, with the whole head 2.9 and 2.0; four 1.1 and
         1.3, with the whole head 1.3 and 1.4.  It is meant for vocabularies of 100,000 tokens, of which no draft was at hand
Differs  a guess is drawn by the noise of the very token that it guesses, so that under accept=race it stands exactly when the
         target's law gives that token too; under an accept that weighs laws, by noise of its own.  Guesses end at an end id
Raises   ValueError unless 1 <= guesses <= 32, keep >= 1 and model and text are named; ConfigError for a text that cannot be read
         or is larger than 64 MiB
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from weft.draft._common import chained
from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Ask, Forward, Guesses, Vocabulary, Words
from weft.traits import Effect, Trait, Traits

MOST = 32
TEXT_BYTES = 64 << 20


@register("draft", "vocabtrim")
@dataclass(slots=True, kw_only=True)
class VocabTrim:
    """text: a file of text such as the target writes.  keep: tokens of the draft's head.  model: the draft's checkpoint."""

    text: str
    keep: int = 1024
    guesses: int = 4
    model: str = "bundled"
    head: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    """Ids that are kept, ascending, once a vocabulary is known."""
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = False
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.SECOND_MODEL}), effects=frozenset({Effect.GUESSES})
    )

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST or self.keep < 1:
            raise ValueError(f"1 <= guesses <= {MOST} and keep >= 1 are needed, got {self.guesses}, {self.keep}")
        if not self.model or not self.text:
            raise ValueError(
                "name a text whose common tokens are kept, text='FILE'; leave model out for the bundled draft"
            )

    @classmethod
    def trial(cls, folder: Path) -> dict[str, Any]:
        """A short text, in `folder`."""
        path = folder / "text.txt"
        path.write_text("He said that he had been in the house, and in the sea. It was the letter of a man. " * 2)
        return {"text": str(path), "keep": 48, "guesses": 3}

    def attach(self, words: Words) -> None:
        """Choose the tokens.  Raises ConfigError."""
        self.head = words.once(f"vocabtrim {self.keep} {self.text}", self._common)

    def _common(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        path = Path(self.text)
        try:
            if path.stat().st_size > TEXT_BYTES:
                raise ConfigError(f"the text {path} is larger than {TEXT_BYTES >> 20} MiB; give a part of it")
            text = path.read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the text {path} cannot be read: {error}") from None
        counts = Counter(vocabulary.encode(text))
        common = sorted(counts.keys() - {*vocabulary.ends}, key=lambda t: (-counts[t], t))
        return tuple(sorted([*vocabulary.ends, *common][: self.keep]))

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        assert run is not None
        return chained(asks, run, [min(self.guesses, ask.most) for ask in asks], self.acts)

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted
