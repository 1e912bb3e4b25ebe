"""DySpec: a tree of guesses that grows where the draft model thinks that a guess will be reached and will stand.

Paper    Xiong et al., DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure, arXiv:2410.11744 (003-3), with the
         threshold of its algorithm 2, one pass of the draft model for a layer
Rule     a place for a guess has the value v, the chance that the target comes to it and takes none of the guesses before it.
         From the most valuable place on, while v >= threshold and guesses are left: draw y from what the draft's law q has
         left there; y's own place is worth v q(y), and the next one beside y v (1 - q(y)).  A layer is computed in one pass
Shapes   logits [places of a layer, vocab] in each pass
Units    guesses, depth: tokens; threshold: a probability
Cost     a pass of the draft model for each layer, with a row for each place; its weights and KV; a tree's rows of the target,
         of which one line stands at most
Pays     single sequences, where a step of eight rows costs what one of few does: a tree of 7 gives 2.6 tokens a step on prose
         and on requests of Spec-Bench at temperature 0.8, a chain of 4 with the same draft 2.2, and one of 7 2.3; greedily 3.5
         and 2.5, the chains 3.2 and 2.3, and 3.8 and 2.5.  In time, on the 0.5B shape after openings of stories: 2.23 times no
         draft at 0.8 and 2.30 greedily, the chain of 4 1.96 and 1.95.  Not with four sequences, where rows cost what they are:
         1.10 and 1.11, the chain 1.28 and 1.35.  Under an accept that weighs laws a chain gives more
Differs  a race that keeps its seeds (accept=race) has no draws to weigh: there guesses are the first of the draft's race with the
         token's own noise, among the 1,024 tokens that it likes best, and q is their chance had its logits an error of 0.4 times
         such a noise more: trees that trust the draft so far bring most.  An `accept` that weighs laws gets draws without
         replacement and their laws.  Guesses end at an end id
Raises   ValueError unless 1 <= guesses <= 64, depth >= 1 and 0 < threshold < 1, or where model is empty
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.registry import register
from weft.slots import Ask, Forward, Guesses, Ranked, line
from weft.traits import Effect, Trait, Traits

MOST = 64


@dataclass(slots=True)
class Tree:
    """One ask's tree.  most: guesses that it may have.  computed: by guess, its place among those that the draft computed.

    values: of each guess, the chance that it is reached and stands."""

    most: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    laws: list[Any] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=lambda: {-1: -1})

    def text(self, guess: int) -> list[int]:
        return [self.tokens[j] for j in line(self.parents, guess)]

    def add_layer(self, found: Sequence[tuple[int, Ranked]], threshold: float) -> list[int]:
        """Guesses after each (guess, what its race says), the most valuable place first; gives the new ones."""
        places = [(-self._value(at), n, 0) for n, (at, _) in enumerate(found)]
        left = [1.0 for _ in found]
        heapq.heapify(places)
        fresh: list[int] = []
        while places and len(self.tokens) < self.most and -places[0][0] >= threshold:
            _, n, rank = heapq.heappop(places)
            at, ranked = found[n]
            if rank == len(ranked.tokens):
                continue
            fresh.append(len(self.tokens))
            self.tokens.append(ranked.tokens[rank])
            self.parents.append(at)
            self.values.append(self._value(at) * ranked.chances[rank])
            if ranked.law is not None:
                self.laws.append(without(ranked, rank))
            left[n] -= ranked.chances[rank]
            heapq.heappush(places, (-self._value(at) * max(left[n], 0.0), n, rank + 1))
        return fresh

    def _value(self, guess: int) -> float:
        return 1.0 if guess < 0 else self.values[guess]


@register("draft", "dyspec")
@dataclass(slots=True, kw_only=True)
class DySpec:
    """The draft's second and third choices stand beside its first, where it is not sure.

    guesses: of one sequence in a step.  depth: of the tree, which is how many passes the draft takes.
    """

    guesses: int = 8
    depth: int = 4
    threshold: float = 0.1
    model: str = "bundled"
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"guesses": 6, "depth": 3}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.SECOND_MODEL, Trait.TREE_MASK}), effects=frozenset({Effect.GUESSES})
    )

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST or self.depth < 1 or not 0 < self.threshold < 1:
            raise ValueError(
                f"1 <= guesses <= {MOST}, depth >= 1 and 0 < threshold < 1 are needed, got {self.guesses}, {self.depth} and "
                f"{self.threshold}"
            )
        if not self.model:
            raise ValueError("the draft model's name is empty; leave it out for the one that comes with weft")

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        assert run is not None
        trees = [Tree(min(self.guesses, ask.most)) for ask in asks]
        rows = [(i, -1) for i, tree in enumerate(trees) if tree.most > 0]
        logits = run([(i, [int(asks[i].context[-1])]) for i, _ in rows]) if rows else None
        for depth in range(1, self.depth + 1):
            self.acts["draft_rows"] += len(rows)
            texts, salts = [(i, trees[i].text(at)) for i, at in rows], [1 + at for _, at in rows]
            ranked = run.rank(texts, logits, self.guesses, salts)
            found: dict[int, list[tuple[int, Ranked]]] = {}
            for (i, at), one in zip(rows, ranked, strict=True):
                found.setdefault(i, []).append((at, one))
            rows = []
            for i, mine in found.items():
                fresh, tree = trees[i].add_layer(mine, self.threshold), trees[i]
                if len(tree.tokens) < tree.most:
                    rows += [(i, j) for j in fresh if self._goes_on(tree, j, asks[i])]
            if not rows or depth == self.depth:
                break
            logits = self._compute(rows, trees, run)
        return [
            Guesses(t.tokens, stacked(t.laws) if ask.independent else None, t.parents)
            for ask, t in zip(asks, trees, strict=True)
        ]

    def _goes_on(self, tree: Tree, guess: int, ask: Ask) -> bool:
        return tree.values[guess] >= self.threshold and tree.tokens[guess] not in ask.sampling.stop_ids

    def _compute(self, rows: Sequence[tuple[int, int]], trees: Sequence[Tree], run: Forward) -> Any:
        """Logits after each (ask, guess), the guesses of an ask together."""
        nodes: dict[int, tuple[list[int], list[int]]] = {}
        for i, j in rows:
            tree, (tokens, parents) = trees[i], nodes.setdefault(i, ([], []))
            tree.computed[j] = len(tree.computed) - 1
            tokens.append(tree.tokens[j])
            parents.append(tree.computed[tree.parents[j]])
        return run.grow([(i, tokens, parents) for i, (tokens, parents) in nodes.items()])

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted


def without(ranked: Ranked, rank: int) -> Any:
    """The law that the guess of this rank was drawn from: without those before it."""
    law = ranked.law.clone()
    law[list(ranked.tokens[:rank])] = 0.0
    return law / law.sum() if rank else law


def stacked(laws: list[Any]) -> Any:
    import torch

    return torch.stack(laws) if laws else None
