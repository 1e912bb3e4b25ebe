"""Paths: several continuations of the draft model side by side, drawn alike, of which the target follows one.

Paper    Sun et al., SpecTr: Fast Speculative Decoding via Optimal Transport, arXiv:2310.15141 (000-1)
Rule     `paths` chains of `length` guesses, each drawn from the draft's law under the request's own temperature, truncation,
         bias and penalties, independently of the others.  They are computed together, one token of each in a pass
Shapes   logits [paths, vocab] in each pass
Units    paths: chains; length: tokens
Cost     a pass of the draft model for each token of length, with a row for each path; its weights and KV; paths times length
         rows of the target
Pays     with accept=spectr or accept=rejection, at temperatures at which one draw is often wrong: on the 0.5B shape, one
         sequence at 0.8, two paths of 3 are 2.1 times as fast as no draft with k-SEQ and 1.7 with the race, one path 1.7.  Where
         rows cost what they are it loses: with four sequences 0.9 and 1.1, one path 1.2; greedily one path brings more
Differs  paths that begin alike are not merged: how many draws there are for a place must not depend on what they are.  A race
         that keeps its seeds (accept=race) has no use for independent draws: there path i begins with the i-th of the draft's
         race with the token's own noise, and goes on with its winners.  Greedy requests whose accept weighs laws get one path,
         as all would be equal.  Guesses end at an end id
Raises   ValueError unless paths >= 1, length >= 1 and paths times length <= 64, or where model is empty
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.registry import register
from weft.slots import Ask, Forward, Guesses, Ranked, line
from weft.traits import Effect, Trait, Traits

MOST = 64


@dataclass(slots=True)
class Fan:
    """One ask's paths.  ends: by path, its last guess, -1 where it has none yet."""

    ends: list[int]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    laws: list[Any] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=lambda: {-1: -1})

    def text(self, guess: int) -> list[int]:
        return [self.tokens[j] for j in line(self.parents, guess)]


@register("draft", "paths")
@dataclass(slots=True, kw_only=True)
class Paths:
    """Where one draw is wrong another may be right."""

    paths: int = 3
    length: int = 4
    model: str = "bundled"
    guesses: int = field(default=0, init=False, compare=False)
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"paths": 2, "length": 3}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.SECOND_MODEL, Trait.TREE_MASK}), effects=frozenset({Effect.GUESSES})
    )

    def __post_init__(self) -> None:
        self.guesses = self.paths * self.length
        if self.paths < 1 or self.length < 1 or self.guesses > MOST:
            raise ValueError(
                f"paths and length are at least 1, and at most {MOST} guesses together, got {self.paths} and {self.length}"
            )
        if not self.model:
            raise ValueError("the draft model's name is empty; leave it out for the one that comes with weft")

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        assert run is not None
        fans = [Fan([-1] * self._paths(ask)) for ask in asks]
        going = [i for i, ask in enumerate(asks) if ask.most > 0]
        if not going:
            return [Guesses(()) for _ in asks]
        logits = run([(i, [int(asks[i].context[-1])]) for i in going])
        rows = [(i, path) for i in going for path in range(len(fans[i].ends))]
        where = [n for n, i in enumerate(going) for _ in fans[i].ends]
        for depth in range(self.length):
            self.acts["draft_rows"] += len(logits)
            rows = self._say(rows, logits[where], fans, asks, run, first=depth == 0)
            if not rows or depth == self.length - 1:
                break
            logits, where = self._compute(rows, fans, run), list(range(len(rows)))
        return [
            Guesses(fan.tokens, stacked(fan.laws) if ask.independent else None, fan.parents)
            for ask, fan in zip(asks, fans, strict=True)
        ]

    def _paths(self, ask: Ask) -> int:
        return 1 if ask.independent and ask.sampling.temperature == 0.0 else self.paths

    def _say(
        self, rows: Sequence[tuple[int, int]], logits: Any, fans: Sequence[Fan], asks: Sequence[Ask], run: Forward, *, first: bool
    ) -> list[tuple[int, int]]:  # fmt: skip
        """One more guess of each (ask, path); gives those that go on."""
        texts = [(i, fans[i].text(fans[i].ends[path])) for i, path in rows]
        most = self.paths if first and not all(asks[i].independent for i, _ in rows) else 1
        ranked: Sequence[Ranked] = run.rank(texts, logits, most, [1 + path for _, path in rows])
        going = []
        for (i, path), one in zip(rows, ranked, strict=True):
            fan, ask = fans[i], asks[i]
            rank = path if first and not ask.independent else 0
            if rank >= len(one.tokens) or len(fan.tokens) == ask.most:
                continue
            fan.parents.append(fan.ends[path])
            fan.ends[path] = len(fan.tokens)
            fan.tokens.append(one.tokens[rank])
            fan.laws.append(one.law)
            if one.tokens[rank] not in ask.sampling.stop_ids:
                going.append((i, path))
        return [(i, path) for i, path in going if len(fans[i].tokens) < asks[i].most]

    def _compute(self, rows: Sequence[tuple[int, int]], fans: Sequence[Fan], run: Forward) -> Any:
        """Logits after the last guess of each (ask, path)."""
        nodes: dict[int, tuple[list[int], list[int]]] = {}
        for i, path in rows:
            fan, (tokens, parents) = fans[i], nodes.setdefault(i, ([], []))
            end = fan.ends[path]
            fan.computed[end] = len(fan.computed) - 1
            tokens.append(fan.tokens[end])
            parents.append(fan.computed[fan.parents[end]])
        return run.grow([(i, tokens, parents) for i, (tokens, parents) in nodes.items()])

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted


def stacked(laws: list[Any]) -> Any:
    import torch

    return torch.stack(laws) if laws else None
