"""Big Little Decoder's fallback: the small model writes for as long as it is sure, and then the target has the word.

Paper    Kim et al., Speculative Decoding with Big Little Decoder, arXiv:2302.07863 (004-15)
Rule     the draft model writes token after token, up to `guesses`, while its token's chance is at least `fallback`; the target
         then computes all of them in one pass, and one more
Shapes   logits [sequences that still guess, vocab] in each pass
Units    guesses: tokens; fallback: a probability
Cost     a pass of the draft model for each guess, and one to find out that it is not sure; its weights and KV
Pays     beside accept=big_little, or under any other rule: guesses that would hardly stand are not verified
Differs  how sure the draft is of a token that is drawn, and not the likeliest, is its chance in the race with the token's own
         noise, had the draft's logits an error of one more such noise; where `accept` weighs laws it is the law's greatest
         chance, so that what was drawn does not decide whether it is shown.  Guesses end at an end id
Raises   ValueError unless 1 <= guesses <= 32 and 0 <= fallback < 1, or where model is empty
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Effect, Trait, Traits

MOST = 32


@register("draft", "big_little")
@dataclass(slots=True, kw_only=True)
class BigLittle:
    """The length of a draft follows from how sure the small model is."""

    guesses: int = 8
    fallback: float = 0.4
    model: str = "bundled"
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"guesses": 4, "fallback": 0.2}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.SECOND_MODEL}), effects=frozenset({Effect.GUESSES})
    )

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST or not 0 <= self.fallback < 1:
            raise ValueError(
                f"1 <= guesses <= {MOST} and 0 <= fallback < 1 are needed, got {self.guesses} and {self.fallback}"
            )
        if not self.model:
            raise ValueError("the draft model's name is empty; leave it out for the one that comes with weft")

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        assert run is not None
        most = [min(self.guesses, ask.most) for ask in asks]
        tokens: list[list[int]] = [[] for _ in asks]
        laws: list[list[Any]] = [[] for _ in asks]
        rows: list[tuple[int, list[int]]] = [(i, [int(ask.context[-1])]) for i, ask in enumerate(asks) if most[i] > 0]
        while rows:
            self.acts["draft_rows"] += len(rows)
            ranked = run.rank([(i, tokens[i]) for i, _ in rows], run(rows), 1)
            going = []
            for (i, _), one in zip(rows, ranked, strict=True):
                if not one.tokens or (one.chances[0] if one.law is None else float(one.law.max())) < self.fallback:
                    continue
                tokens[i].append(one.tokens[0])
                laws[i].append(one.law)
                if len(tokens[i]) < most[i] and one.tokens[0] not in asks[i].sampling.stop_ids:
                    going.append((i, [one.tokens[0]]))
            rows = going
        return [Guesses(t, _stacked(law) if ask.independent else None) for ask, t, law in zip(asks, tokens, laws)]

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted


def _stacked(laws: list[Any]) -> Any:
    import torch

    return torch.stack(laws) if laws else None
