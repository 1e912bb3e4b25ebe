"""SpecTr's k-SEQ: several guesses drawn alike are weighed in order, each against a share of the target's law.

Paper    Sun et al., SpecTr: Fast Speculative Decoding via Optimal Transport, arXiv:2310.15141 (000-1)
Rule     p the target's law, q the one that k guesses for one place were drawn from.  b(r) = sum of min(q, p / r) over tokens;
         r in [1, k] is where 1 - (1 - b)^k = r b.  In order, a guess x stands if u < p(x) / (r q(x)); where none does, draw from
         p - min(q, p / r) (1 - (1 - b)^k) / b, normalised.  All guesses of the token that stands go on
Shapes   p: ids and probabilities of the truncated law; q [guesses, vocab] float32
Units    probabilities, after temperature, truncation, bias and penalties of the request
Cost     the law of each row that is reached, and 30 times O(vocab) for r where a place has several guesses
Pays     with draft=paths, whose guesses are drawn alike, for one sequence: with two paths of 3 on the 0.5B shape 1.27 times the
         race's speed at temperature 0.8 and 1.09 at 1 (rejection 1.17 and 1.39, of other texts); with four 0.83 and 0.90.  One
         guess for a place is weighed as accept=rejection does
Differs  of the guesses for a place those count that have the first one's law: siblings drawn without replacement, or without a
         law, are one.  A token drawn in place of all goes on where it is one of the guesses.  The noise is a function of seed,
         output index and token, so a run repeats; tokens are not those of the race
Raises   nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.registry import register
from weft.slots import Verify, candidates, line
from weft.traits import Effect, Fidelity, Traits

STANDS, RESIDUAL, HALVINGS = 1, 2, 30
"""Salts of the draws that a row may need, the n-th guess's being STANDS + 2 n; and how often the range of r is halved."""


@register("accept", "spectr")
@dataclass(frozen=True, slots=True, kw_only=True)
class SpecTr:
    """At least 1 - 1/e of what the best rule for k guesses accepts, in time linear in the vocabulary."""

    acts: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "rejected": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    laws: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ("draft=ngram",)
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.SAME_LAW, effects=frozenset({Effect.GUESSES}))

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        tokens, after = list[int](), [-1]
        while True:
            found = candidates(view.parents, after)
            if not found:
                return [*tokens, view.winner(1 + after[0])], line(view.parents, after[0])
            token = self._weigh(view, 1 + after[0], alike(view.laws, found))
            tokens.append(token)
            stand = [j for j in found if view.guesses[j] == token]
            self.acts["accepted" if stand else "rejected"] += 1
            if not stand:
                return tokens, line(view.parents, after[0])
            after = stand

    def _weigh(self, view: Verify, row: int, found: Sequence[int]) -> int:
        ids, p = view.law(row)
        if view.laws is None:
            q, chances = (ids == view.guesses[found[0]]).astype("float64"), [1.0]
        else:
            law = view.laws[found[0]]
            q, chances = law.double().cpu().numpy()[ids], [float(law[view.guesses[j]]) for j in found]
        rho = factor(p, q, len(found))
        for n, (guess, chance) in enumerate(zip(found, chances, strict=True)):
            x = view.guesses[guess]
            if view.uniform(row, x, STANDS + 2 * n) * rho * chance < float(p[ids == x].sum()):
                return x
        shared, b = overlap(p, q, rho)
        taken = (1.0 - (1.0 - b) ** len(found)) / b if b > 0 else 0.0
        rest = (p - shared * taken).clip(min=0.0)
        total = float(rest.sum())
        if total <= 0.0:
            return view.guesses[found[0]]  # p and q are equal, and only rounding says otherwise
        reached = rest.cumsum() > view.uniform(row, 0, RESIDUAL) * total
        return int(ids[int(reached.argmax())])


def alike(laws: Any, found: Sequence[int]) -> list[int]:
    """The first of the guesses, and those that were drawn from its very law."""
    if laws is None:
        return list(found[:1])
    return [j for j in found if j == found[0] or bool((laws[j] == laws[found[0]]).all())]


def overlap(p: Any, q: Any, rho: float) -> tuple[Any, float]:
    """min(q, p / rho), token by token, and its sum b."""
    shared = q.clip(max=p / rho)
    return shared, float(shared.sum())


def factor(p: Any, q: Any, k: int) -> float:
    """The smallest r in [1, k], from above, with 1 - (1 - b(r))^k <= r b(r): where k-SEQ's draw in place of all is a law."""
    low, high = 1.0, float(k)
    if k == 1:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        b = overlap(p, q, middle)[1]
        if 1.0 - (1.0 - b) ** k <= middle * b:
            high = middle
        else:
            low = middle
    return high
