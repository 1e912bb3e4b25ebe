"""Carrying out `kv.compress`: entries are dropped at the cuts of a sequence's stack, and their blocks become free.

A technique that asks for attention mass gets it counted along: `ask` marks a batch's rows, the forward pass sums what they look
at, `take` keeps that until it is known which rows stand, and `settle` adds it up.  What is counted depends on the context alone,
never on steps, drafts or neighbours; after a preemption it is recomputed to the same bits.

Legend.  E: entries of a sequence in one group.  N: entries that stay.  L: layers of the group.  KV: kv heads.  D: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from weft.errors import InvariantError
from weft.exec.batch import Batch, MassRows
from weft.exec.kvpool import KVPool
from weft.exec.mirror import Mirror, Mirrored
from weft.slots import Kept, candidates, line
from weft.traits import Trait
from weft.types import GroupKind, KVOp, KVOpKind, Work, WorkResult

TARGET = "target"
MASS = "attention mass"
"""Under this name a sequence's state holds its `Mass`."""


@dataclass(slots=True)
class Mass:
    """Attention that a sequence's entries got from rows that stand.

    sums: by group, float64 [L, KV, entries].  counted: rows before this position are in the sums, or never will be.
    pending: by layer, float64 [1 + guesses, KV, entries], of rows that may not stand; the first is that of context rows.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    counted: int = 0
    pending: dict[int, Tensor] = field(default_factory=dict)

    def fork(self) -> Mass:
        return Mass({g: x.clone() for g, x in self.sums.items()}, self.counted)

    def of(self, group: int, layers: int, kv_heads: int, entries: int) -> Tensor:
        """A group's sums, with room for `entries`."""
        sums = self.sums.get(group)
        have = 0 if sums is None else sums.shape[2]
        if sums is None or have < entries:
            grown = torch.zeros(layers, kv_heads, entries, dtype=torch.float64)
            if sums is not None:
                grown[:, :, :have] = sums
            self.sums[group] = sums = grown
        return sums


@dataclass(frozen=True, slots=True)
class CompressView:
    """What `Compress.keep` sees: one sequence's entries in one group, at a cut.

    prompt, length: tokens of the prompt, and of the context that is computed.  entries: E.  layers: the group's layers, in the
    order in which masses and indices of heads stand.  positions: int64 [E], ascending.
    mass: float64 [L, KV, E], the attention that each entry got; None unless the technique needs ATTENTION_MASS.
    """

    prompt: int
    length: int
    entries: int
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    positions: Tensor
    mass: Tensor | None
    _pool: KVPool = field(repr=False)
    _group: int = field(repr=False)
    _where: tuple[Tensor, Tensor] = field(repr=False)

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer as attention reads them, float32 [E, KV, D]."""
        return self._pool.read(self._group, layer, False, self._where).float()

    def values(self, layer: int) -> Tensor:
        """Values of a layer, float32 [E, KV, D]."""
        return self._pool.read(self._group, layer, True, self._where).float()


class Compression:
    """Compresses the sequences of a mirror.  members: the pool's groups of each model."""

    def __init__(self, mirror: Mirror, pool: KVPool, members: dict[str, list[int]]) -> None:
        self.mirror, self.pool, self.groups = mirror, pool, pool.groups
        self._full = [g for g in members.get(TARGET, ()) if self.groups[g].kind is GroupKind.FULL]
        self._asked: list[tuple[Mass, int, int]] = []

    # ------------------------------------------------------------------ attention mass

    def ask(self, batch: Batch, works: Sequence[Work], mine: Sequence[int]) -> None:
        """Mark the rows of a batch of the target whose attention counts; nothing where nobody asks."""
        self._asked = []
        sums: list[int] | None = None
        count = 0
        for at, i, s in zip(batch.bounds, mine, batch.sequences, strict=False):
            work = works[i]
            first = self._first(s) if work.model == TARGET else None
            if first is None:
                continue
            mass = self._mass(s)
            context = len(work.tokens) - work.guesses
            low = min(max(first, mass.counted) - work.start, context)
            if low == context and not work.guesses:
                continue
            if sums is None:
                sums = [-1] * batch.bounds[-1]
            low = max(low, 0)
            sums[at + low : at + context] = [count] * (context - low)
            sums[at + context : at + context + work.guesses] = range(count + 1, count + 1 + work.guesses)
            self._asked.append((mass, count, count + 1 + work.guesses))
            count += 1 + work.guesses
        if sums is not None:
            batch.mass = MassRows(torch.tensor(sums, dtype=torch.int64, device=self.pool.device), count)

    def take(self, batch: Batch) -> None:
        """Keep what a forward pass found until the rows stand."""
        if batch.mass is None:
            return
        for layer, found in batch.mass.found.items():
            kept = found.cpu()
            for mass, first, stop in self._asked:
                mass.pending[layer] = kept[first:stop]

    def _first(self, s: Mirrored) -> int | None:
        """The first position whose row counts, None where the sequence's stack does not ask."""
        compress = s.stack.get("kv.compress")
        if compress is None or Trait.ATTENTION_MASS not in compress.traits.needs:
            return None
        observe = getattr(compress, "observe_rows", None)
        if observe is None:
            return 0
        cut = s.stack.cut(s.prompt, 0)
        return (s.prompt if cut is None else min(cut, s.prompt)) - int(observe)

    def _mass(self, s: Mirrored) -> Mass:
        mass = s.state.get(MASS)
        if not isinstance(mass, Mass):
            mass = s.state[MASS] = Mass()
        return mass

    # ------------------------------------------------------------------ once it is known which rows stand

    def settle(self, works: Sequence[Work], results: list[WorkResult]) -> None:
        """Count entries and masses of rows that stand, and compress the sequences that have come to a cut."""
        for i, (work, fact) in enumerate(zip(works, results, strict=True)):
            depth = len(self.pool.specs[work.model].layers)
            ends = work.layers is None or work.layers[1] == depth
            if work.model != TARGET or not ends or fact.failed is not None:
                continue
            s = self.mirror.sequences[work.request]
            compress = s.stack.get("kv.compress")
            if compress is None and max(s.count) < 0:
                continue
            stand = fact.rows + max(0, len(fact.tokens) - 1)
            mass = s.state.get(MASS)
            if isinstance(mass, Mass):
                self._add_up(work, fact, mass)
            for g in self._full:
                if s.count[g] >= 0:
                    s.count[g] += stand
            stop = work.start + stand
            if compress is not None and s.stack.cut(s.prompt, work.start) == stop:
                kept = {g: self._compress(s, g, stop, compress) for g in self._full}
                results[i] = msgspec.structs.replace(fact, kept=kept)

    def _add_up(self, work: Work, fact: WorkResult, mass: Mass) -> None:
        """Add the pending masses of the rows that stand, their entries as they stand after acceptance."""
        path = accepted_path(work, fact)
        rows = torch.tensor([0, *(1 + j for j in path)])
        for g in self._full:
            layers = self.groups[g].layers
            before = self.mirror.entry(work, g) + fact.rows
            entries = torch.tensor([*range(before), *(before + j for j in path)])
            for index, layer in enumerate(layers):
                found = mass.pending.get(layer)
                if found is not None:
                    sums = mass.of(g, len(layers), found.shape[1], len(entries))
                    sums[index, :, : len(entries)] += found[rows].sum(0)[:, entries]
        mass.pending.clear()
        mass.counted = max(mass.counted, work.start + fact.rows + len(path))

    def _compress(self, s: Mirrored, g: int, length: int, compress: Any) -> int:
        """Drop entries of one group, as the technique says; returns how many stay."""
        group = self.groups[g]
        spec = self.pool.specs[group.model]
        entries = s.count[g] if s.count[g] >= 0 else length
        table = s.table(g).tolist()
        index = torch.arange(entries, device=self.pool.device)
        blocks = torch.tensor(table, dtype=torch.int64, device=self.pool.device)
        where = blocks[torch.div(index, group.block_tokens, rounding_mode="floor")], index % group.block_tokens
        mass = s.state.get(MASS)
        sums = None
        if isinstance(mass, Mass):
            sums = mass.of(g, len(group.layers), spec.kv_heads, entries)[:, :, :entries]
        positions = self.pool.positions(g)[where].long()
        view = CompressView(
            s.prompt, length, entries, group.layers, spec.kv_heads, spec.head_dim, positions, sums, self.pool, g, where
        )
        kept: Kept = compress.keep(view)
        indices = kept.indices.long().cpu()
        check(indices, view)
        stay = int(indices.shape[-1])
        if stay == entries:
            return entries
        if indices.dim() == 1:
            self.pool.carry_out(KVOp(KVOpKind.COMPACT, g, tuple(table), tuple(table), tuple(indices.tolist())))
        else:
            self.pool.compact_heads(g, table, indices, length)
        if kept.rotate is not None:
            self.pool.carry_out(KVOp(KVOpKind.ROTATE, g, tuple(table), (), kept.rotate))
        if isinstance(mass, Mass) and sums is not None:
            mass.sums[g] = sums.gather(2, indices.expand(*sums.shape[:2], stay)).contiguous()
        s.count[g] = stay
        return stay


def accepted_path(work: Work, fact: WorkResult) -> list[int]:
    """Which guesses of a work stand, in order: those that its tokens follow, all of which but the last are guesses."""
    accepted = len(fact.tokens) - 1 if work.guesses else 0
    if not work.parents:
        return list(range(accepted))
    guesses, at = work.tokens[len(work.tokens) - work.guesses :], [-1]
    for token in fact.tokens[:accepted]:
        at = [j for j in candidates(work.parents, at) if guesses[j] == token]
    return line(work.parents, at[0])


def check(indices: Tensor, view: CompressView) -> None:
    """Raise InvariantError unless the indices are ascending ones of the view's entries."""
    heads = (len(view.layers), view.kv_heads)
    shaped = indices.dim() == 1 or (indices.dim() == 3 and tuple(indices.shape[:2]) == heads)
    if not shaped or not indices.shape[-1]:
        raise InvariantError(
            f"kv.compress kept indices of shape {tuple(indices.shape)}; [N] or [{heads[0]}, {heads[1]}, N] with N >= 1 is needed"
        )
    ends = int(indices.min()) >= 0 and int(indices.max()) < view.entries
    if not ends or not bool((indices.diff(dim=-1) > 0).all()):
        raise InvariantError(f"kv.compress kept indices that do not ascend within the {view.entries} entries")
