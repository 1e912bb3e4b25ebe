"""Jacobi decoding: what the target drew behind a wrong guess is the next guess, and runs that it drew before are guessed again.

Paper    Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, arXiv:2002.03629 (002-87);
         the pool of runs: Fu et al., Lookahead Decoding, arXiv:2402.02057
Rule     token i is x_i = f(x_<i, u_i), with noise u_i that is fixed beforehand.  A window of `window` guesses is computed in one
         pass, x'_i = f(x_<i, u_i) for all of it; the first is right, and so is each whose guess before it was.  What is left of
         x' is the next window's beginning; new places get the last token again.  pool: where a run was drawn before that begins
         with the newest token, the latest such run is guessed instead, as far as it goes
Shapes   a window for each sequence, whatever stood
Units    window: tokens.  pool: runs kept for each sequence, each of up to `window` tokens behind its first; 0 for Jacobi alone
Cost     `window` rows for each sequence in every step, of which most are thrown away; no model, no text
Pays     hardly: of its guesses one in forty stands.  At one sequence it goes at 0.92 to 0.94 of the speed alone on the 135M
         shape (with window=10 at 1.04 where answers quote, and 0.77 on prose), and at 0.68 to 1.03 on the bundled model; in
         batches of four at 0.49 to 0.77.  It needs rows that cost nothing, which no processor here has
Differs  one window is verified, where lookahead decoding verifies several runs of the pool beside it in one pass.  Blocks of
         Gauss-Seidel are what a step of an engine is, so there is no other hybrid
Raises   ValueError unless 1 <= window <= 16 and pool >= 0
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Effect, Trait, Traits

MOST = 16
Pool = OrderedDict[int, tuple[int, ...]]
"""By token what was drawn behind it; the one drawn last stands last."""


@register("draft", "jacobi")
@dataclass(frozen=True, slots=True, kw_only=True)
class Jacobi:
    """A draft that costs nothing but rows."""

    window: int = 5
    pool: int = 512
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "stale": 0, "pooled": 0}, init=False, compare=False
    )
    """stale, pooled: guesses that are what is left of a window, and those from the pool."""
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(needs=frozenset({Trait.ROLLBACK}), effects=frozenset({Effect.GUESSES}))

    def __post_init__(self) -> None:
        if not 1 <= self.window <= MOST or self.pool < 0:
            raise ValueError(f"1 <= window <= {MOST} and pool >= 0 are needed, got {self.window}, {self.pool}")

    @property
    def guesses(self) -> int:
        return self.window

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        return [Guesses(self._window(ask)[: ask.most]) for ask in asks]

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted

    def _window(self, ask: Ask) -> list[int]:
        pool: Pool = ask.state.setdefault("jacobi", OrderedDict())
        newest = int(ask.context[-1])
        # The run that was drawn: what stands since the last time, and what was drawn behind it.
        drawn = [*ask.context[max(ask.prompt, len(ask.context) - self.window - 1) :].tolist(), *ask.stale]
        known = pool.get(newest, ())
        self._keep(pool, drawn)
        stale = list(ask.stale[len(known) :])
        found = [*known, *stale][: self.window]
        self.acts["pooled"] += min(len(known), self.window)
        self.acts["stale"] += max(0, len(found) - len(known))
        return found + [found[-1] if found else newest] * (self.window - len(found))

    def _keep(self, pool: Pool, drawn: Sequence[int]) -> None:
        """Every token's run of those that were drawn behind it."""
        for at in range(len(drawn) - 1 if self.pool else 0):
            pool.pop(drawn[at], None)
            pool[drawn[at]] = tuple(drawn[at + 1 : at + 1 + self.window])
        while len(pool) > self.pool:
            pool.popitem(last=False)
