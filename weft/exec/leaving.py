"""Rows that leave the layers early: the others go on in a smaller batch, and what the layers would have stored is filled in.

A row is asked where its sequence's technique (slot `skip`) has an exit, once it stands after the prompt.  The answer depends on
that row alone, so it is the same whether the row is a guess to verify, the newest token, or computed again after preemption.

Legend.  T: rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.exec.batch import Batch, GroupBatch
from weft.exec.deltas import Deltas
from weft.exec.kvpool import KVPool
from weft.exec.mirror import Ints
from weft.models.decoder import Decoder
from weft.slots import Skip

SLOT = "skip"
LEFT = "rows that left the layers"
"""Under this name a sequence's state says which rows of its work left in an earlier stretch of layers; bool [T]."""


def leaves_early(batch: Batch) -> bool:
    """Whether a sequence of the batch has a technique of the slot `skip`."""
    return any(s.stack.get(SLOT) is not None for s in batch.sequences)


@dataclass(frozen=True, slots=True)
class View:
    """What a technique is shown (`slots.Leaving`)."""

    before: Tensor
    after: Tensor
    _decoder: Decoder

    def logits(self) -> Tensor:
        return self._decoder.predict(self.after)


class EarlyExits:
    """The decoder's pass for batches of which rows may leave."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self._decoder, self._pool = decoder, pool

    def forward(self, batch: Batch, layers: tuple[int, int] | None = None, hidden: Tensor | None = None) -> Tensor:
        """As `Decoder.forward`.  Rows that left in an earlier stretch come with the hidden state with which they left."""
        depth = len(self._decoder.spec.layers)
        low, high = layers or (0, depth)
        gone = _recall(batch, low)
        if hidden is not None:
            hidden = hidden.clone()  # it may be a view of the decoder's own buffer
        out, gone = self._through(batch, low, high, hidden, gone)
        if high < depth:
            _remember(batch, gone)
            return out
        return self._decoder.logits(batch, self._pool, out)

    def _through(self, batch: Batch, low: int, high: int, hidden: Tensor | None, gone: Ints) -> tuple[Tensor, Ints]:
        """(hidden states [T, width] with which every row leaves this stretch, bool [T]: who has left all layers)."""
        decoder = self._decoder
        rows = np.flatnonzero(~gone)
        out = None if hidden is None else hidden
        if not rows.size:
            assert out is not None
            return out, gone
        now = batch if rows.size == gone.size else picked(batch, rows)
        state = None if hidden is None else hidden[_index(rows, hidden)]
        step, at = decoder.begin(now, self._pool, low, high), low
        for exit, asked in _exits(batch, len(decoder.spec.layers), low, high):
            before = decoder.advance(step, at, exit - 1, state).clone()
            after, state = decoder.advance(step, exit - 1, exit), None
            out = after.new_empty(gone.size, after.shape[1]) if out is None else out
            at = exit
            leaving = np.zeros(rows.size, bool)
            for part, candidates in asked:
                mine = np.flatnonzero(np.isin(rows, candidates) & ~gone[rows])
                if mine.size:
                    where = _index(mine, after)
                    answer = part.rows(View(before[where], after[where], decoder))
                    leaving[mine] = answer.cpu().numpy()
            if not leaving.any():
                continue
            after = after.clone()
            out[_index(rows[leaving], out)] = after[_index(np.flatnonzero(leaving), after)]
            decoder.fill(picked(batch, rows[leaving], loose=True), self._pool, out[_index(rows[leaving], out)], exit)
            gone = gone.copy()
            gone[rows[leaving]] = True
            stay = ~gone[rows] | _ballast(batch, gone)[rows]
            rows, state = rows[stay], after[_index(np.flatnonzero(stay), after)]
            if not rows.size or at == high:
                break
            now = picked(batch, rows)
            if now.mass is not None:
                now.mass.sums_T[_index(np.flatnonzero(gone[rows]), after)] = -1
            keep = _index(np.flatnonzero(~gone[rows]), after) if gone[rows].any() else None
            step = decoder.begin(now, self._pool, at, high, keep)
        if rows.size:
            found = decoder.advance(step, at, high, state) if at < high else state if state is not None else after
            if out is None:
                out = found.clone()
            else:
                stand = np.flatnonzero(~gone[rows])
                out[_index(rows[stand], out)] = found[_index(stand, found)]
        assert out is not None
        return out, gone


def _exits(batch: Batch, depth: int, low: int, high: int) -> list[tuple[int, list[tuple[Skip, Ints]]]]:
    """(exit, [(technique, rows of the batch that it is asked about)]) of a stretch of layers, ascending."""
    found: dict[int, dict[int, tuple[Skip, list[Ints]]]] = {}
    positions = batch.positions_T.cpu().numpy()
    for s, sequence in enumerate(batch.sequences):
        part = sequence.stack.get(SLOT)
        if part is None:
            continue
        rows = np.arange(batch.bounds[s], batch.bounds[s + 1])
        rows = rows[positions[rows] >= sequence.prompt]
        if rows.size:
            for exit in part.exits(depth):
                if low < exit <= high and exit < depth:
                    found.setdefault(exit, {}).setdefault(id(part), (part, []))[1].append(rows)
    return [(exit, [(p, np.concatenate(r)) for p, r in asked.values()]) for exit, asked in sorted(found.items())]


def _ballast(batch: Batch, gone: Ints) -> Ints:
    """Rows that have left and are computed all the same, to no effect: guesses of a tree of which others go on.

    What a row of a tree sees is told by its place among the others, so they stay together.
    """
    found = np.zeros(gone.size, bool)
    for s in batch.trees:
        rows = slice(batch.bounds[s], batch.bounds[s + 1])
        found[rows] = gone[rows] & ~gone[rows].all()
    return found


def picked(batch: Batch, rows: Ints, *, loose: bool = False) -> Batch:
    """The batch of some of the rows, ascending; nobody's logits are wanted of it.

    A sequence whose rows have gaps between them becomes several sequences over one table, each of which ends where its rows end,
    so that in every one the rows are the last entries.  A tree must be whole, unless the rows are `loose`: only stored.
    """
    bounds = np.asarray(batch.bounds)
    owner = np.searchsorted(bounds, rows, side="right") - 1
    turn = np.flatnonzero((np.diff(rows) != 1) | (np.diff(owner) != 0)) + 1
    first = np.concatenate(([0], turn))
    stop = np.concatenate((turn, [rows.size]))
    of = owner[first]
    trees = {}
    if not loose:
        for run, s in enumerate(of.tolist()):
            if s in batch.trees:
                assert stop[run] - first[run] == bounds[s + 1] - bounds[s], "a tree of guesses was parted"
                trees[run] = batch.trees[s]
    index = _index(rows, batch.positions_T)
    beyond = _index(bounds[of + 1] - 1 - rows[stop - 1], batch.positions_T)
    which = _index(of, batch.positions_T)
    groups = [
        GroupBatch(g.tables_SB[which], g.first_S[which], g.lengths_S[which] - beyond, g.slots_T[index])
        for g in batch.groups
    ]
    edges = [*first.tolist(), int(rows.size)]
    sequences = [batch.sequences[s] for s in of.tolist()] if batch.sequences else []
    return replace(
        batch, tokens_T=batch.tokens_T[index], positions_T=batch.positions_T[index], bounds=edges, groups=groups,
        logit_rows_N=batch.logit_rows_N[:0], trees=trees, vectors=None, sequences=sequences, stands=False,
        deltas=None if batch.deltas is None else Deltas.of(sequences, edges, index.device),
        mass=None if batch.mass is None else replace(batch.mass, sums_T=batch.mass.sums_T[index]),
    )  # fmt: skip


def _recall(batch: Batch, low: int) -> Ints:
    """Who left in an earlier stretch of the same works, bool [T]."""
    gone = np.zeros(batch.bounds[-1], bool)
    for s, sequence in enumerate(batch.sequences):
        left: Any = sequence.state.pop(LEFT, None)
        if low and left is not None:
            gone[batch.bounds[s] : batch.bounds[s + 1]] = left
    return gone


def _remember(batch: Batch, gone: Ints) -> None:
    for s, sequence in enumerate(batch.sequences):
        mine = gone[batch.bounds[s] : batch.bounds[s + 1]]
        if mine.any():
            sequence.state[LEFT] = mine.copy()


def _index(rows: Ints | Sequence[int], like: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(like.device)
