"""The KV pool as memory: one arena of equal blocks, strided views of it for each group, and the KV instruction set.

    inside a block of a group with keys   [layer of the group][key, value][entry][kv head][row]
    inside a block of parked states       [entry][width], float32
    beside the arena                      one int32 position for each entry

A *slot* is `block * block_tokens + offset` of one group.  An *entry* of a table is `index * block_tokens + offset`, counted from
the table's first block.  A *row* is one entry's keys (or values) of one layer: the arena, seen as a matrix of such rows, is
what gathers and writes index.  A kv head's part of it is head_dim values of the model's dtype, or the bytes that the slot
`kv.store` makes of them.  Who wants values asks `gather` or `read`, and writes by `write`, `write_rows` or `put`; instructions
that only move entries move what is stored.

On a CPU the arena is anonymous mapped memory: pages cost nothing until an entry in them is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from weft.errors import InvariantError, TransferError
from weft.models.memory import host_memory
from weft.models.spec import DecoderSpec
from weft.ops.ref.rope import rotate_by
from weft.slots import Store
from weft.types import GroupKind, GroupSpec, KVOp, KVOpKind

CHECKSUM_BYTES = 32
COPY_BLOCKS = 64
"""Blocks that one COPY moves at a time, so that its scratch stays small."""


def pool_bytes(groups: Sequence[GroupSpec], blocks: int, block_bytes: int) -> int:
    """Bytes that a `KVPool` of this shape allocates, positions included."""
    return blocks * (block_bytes + 4 * max(group.block_tokens for group in groups))


class KVPool:
    """Keys, values, positions and parked hidden states of every group, in `blocks` blocks of `block_bytes`.

    specs: the decoder of each model that the groups name ("target" where only one is given).  store: the stack's `kv.store`.
    Raises InvariantError when a group does not fit its blocks.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        specs: DecoderSpec | Mapping[str, DecoderSpec],
        *,
        blocks: int,
        block_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        store: Store | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.store = store
        self.specs = {"target": specs} if isinstance(specs, DecoderSpec) else dict(specs)
        self.blocks = blocks
        self.block_bytes = block_bytes
        self.dtype = dtype
        self._stored = dtype if store is None else torch.uint8
        self.device = torch.device(device)
        self.bytes = pool_bytes(groups, blocks, block_bytes)
        for group in groups:
            self._check(group)
        self.arena = host_memory(blocks * block_bytes, self.device).view(blocks, block_bytes)
        widest = max(group.block_tokens for group in groups)
        self._positions = host_memory(blocks * widest * 4, self.device).view(torch.int32).view(blocks, widest)
        self._positions_own = self._positions.numpy().reshape(-1) if self.device.type == "cpu" else None
        self.position_rows = self._positions.data_ptr(), widest
        """Address of the positions (`positions`), and how many numbers a block has there."""

    def index_of(self, group: GroupSpec) -> int:
        """The pool's group of that model and name: rows may be stored otherwise than the decoder was told."""
        return next(i for i, own in enumerate(self.groups) if (own.model, own.name) == (group.model, group.name))

    def _check(self, group: GroupSpec) -> None:
        spec = self.specs[group.model]
        if group.entry_bytes * group.block_tokens > self.block_bytes:
            raise InvariantError(
                f"group {group.name}: {group.block_tokens} entries do not fit {self.block_bytes} bytes"
            )
        row_bytes = spec.kv_heads * self._width(spec) * self._stored.itemsize
        if group.kind is GroupKind.PARKED:
            fits = group.entry_bytes == spec.width * 4 and self.block_bytes % 4 == 0
        else:
            fits = group.entry_bytes == 2 * row_bytes * len(group.layers) and self.block_bytes % row_bytes == 0
        if not fits:
            raise InvariantError(f"group {group.name}: entry_bytes {group.entry_bytes} is not what its model stores")

    def _width(self, spec: DecoderSpec) -> int:
        """Stored elements of one kv head's part of a row: values, or bytes."""
        return spec.head_dim if self.store is None else self.store.row_bytes(spec.head_dim)

    # ------------------------------------------------------------------------------------------ views

    def rows(self, group: int) -> Tensor:
        """The arena as a matrix of rows as they are stored, [blocks * rows per block, kv_heads * width]; see `row_of`."""
        spec = self.specs[self.groups[group].model]
        return self.arena.view(self._stored).view(-1, spec.kv_heads * self._width(spec))

    def row_of(self, group: int, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Rows that hold the keys of the group's first layer at (block, offset), int64.

        Add `2 * block_tokens * i` for the group's i-th layer, and `block_tokens` for values.
        """
        spec = self.specs[self.groups[group].model]
        return blocks * (self.block_bytes // (spec.kv_heads * self._width(spec) * self._stored.itemsize)) + offsets

    def stored(self, group: int, layer: int, value: bool) -> Tensor:
        """View [blocks, block_tokens, kv_heads, width] of a layer's keys or values as they are stored; to be moved, not read."""
        shape = self.groups[group]
        spec = self.specs[shape.model]
        heads, width, tokens = spec.kv_heads, self._width(spec), shape.block_tokens
        typed = self.arena.view(self._stored)
        offset = (2 * shape.layers.index(layer) + value) * tokens * heads * width
        stride = (typed.stride(0), heads * width, width, 1)
        return typed.as_strided((self.blocks, tokens, heads, width), stride, offset)

    def keys(self, group: int, layer: int) -> Tensor:
        """View [blocks, block_tokens, kv_heads, head_dim] of a layer's keys (after rope), in a pool without a store."""
        assert self.store is None, "rows of this pool are encoded; use `read` and `put`"
        return self.stored(group, layer, False)

    def values(self, group: int, layer: int) -> Tensor:
        """View [blocks, block_tokens, kv_heads, head_dim] of a layer's values, in a pool without a store."""
        assert self.store is None, "rows of this pool are encoded; use `read` and `put`"
        return self.stored(group, layer, True)

    def positions(self, group: int) -> Tensor:
        """View [blocks, block_tokens], int32: the logical position of each entry."""
        return self._positions[:, : self.groups[group].block_tokens]

    def hidden(self, group: int) -> Tensor:
        """View [blocks, block_tokens, width], float32, of a PARKED group."""
        shape = self.groups[group]
        width = self.specs[shape.model].width
        typed = self.arena.view(torch.float32)
        return typed.as_strided((self.blocks, shape.block_tokens, width), (typed.stride(0), width, 1))

    # ------------------------------------------------------------------------------------------ reads and writes

    def split(self, group: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(block, offset) of each slot, int64."""
        tokens = self.groups[group].block_tokens
        return torch.div(slots, tokens, rounding_mode="floor"), slots % tokens

    def gather(self, group: int, layer: int, value: bool, heads: Tensor) -> Tensor:
        """Keys or values of a layer, float32 [*heads.shape, head_dim], contiguous.

        heads: int64, `row_of` * kv_heads + head, of any shape: where the keys of the group's *first* layer are.
        """
        shape = self.groups[group]
        spec = self.specs[shape.model]
        table = self.arena.view(self._stored).view(-1, self._width(spec))
        offset = (2 * shape.layers.index(layer) + value) * shape.block_tokens * spec.kv_heads
        found = table.index_select(0, (heads + offset).flatten())
        return self._decoded(found).view(*heads.shape, -1)

    def read(self, group: int, layer: int, value: bool, where: tuple[Tensor, Tensor]) -> Tensor:
        """Keys or values [N, kv_heads, head_dim] at N (blocks, offsets): of the model's dtype, or float32 out of a store."""
        found = self.stored(group, layer, value)[where]
        if self.store is None:
            return found
        decoded: Tensor = self.store.decode(found.flatten(0, 1))
        return decoded.view(*found.shape[:2], -1)

    def put(self, group: int, layer: int, value: bool, where: tuple[Tensor, Tensor], x: Tensor) -> None:
        """Store keys or values [N, kv_heads, head_dim] at N distinct (blocks, offsets)."""
        view = self.stored(group, layer, value)
        view[where] = self._encoded(x).view(x.shape[0], *view.shape[2:])

    def _decoded(self, rows: Tensor) -> Tensor:
        """Stored rows [N, width] to float32 [N, head_dim]."""
        return rows.float() if self.store is None else self.store.decode(rows)

    def _encoded(self, x: Tensor) -> Tensor:
        """[N, kv_heads, head_dim] to what is stored of it, [N, kv_heads * width]."""
        if self.store is None:
            return x.to(self.dtype).reshape(x.shape[0], -1)
        rows: Tensor = self.store.encode(x.reshape(-1, x.shape[-1]))
        return rows.view(x.shape[0], -1)

    def write(self, group: int, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values [T, kv_heads, head_dim] of one layer at T distinct slots."""
        rows = self.row_of(group, *self.split(group, slots))
        self.write_rows(group, layer, rows, k, v)

    def write_rows(self, group: int, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """As `write`, with the rows of the group's first layer already worked out (once for all layers of a step)."""
        shape = self.groups[group]
        table = self.rows(group)
        base = rows + 2 * shape.block_tokens * shape.layers.index(layer)
        table.index_copy_(0, base, self._encoded(k))
        table.index_copy_(0, base + shape.block_tokens, self._encoded(v))

    def write_positions(self, group: int, slots: Tensor, positions: Tensor) -> None:
        """Store the logical positions of T slots."""
        if self._positions_own is not None:
            # Less than half of what torch's own takes behind a pass, which has filled the caches.
            tokens, at = self.groups[group].block_tokens, slots.numpy()
            if tokens != self.position_rows[1]:
                blocks, offsets = np.divmod(at, tokens)
                at = blocks * self.position_rows[1] + offsets
            self._positions_own[at] = positions.numpy()
            return
        self.positions(group)[self.split(group, slots)] = positions.to(torch.int32)

    def park(self, group: int, slots: Tensor, hidden: Tensor) -> None:
        """Store hidden states [T, width] of rows that stop between layers."""
        self.hidden(group)[self.split(group, slots)] = hidden.float()

    def unpark(self, group: int, slots: Tensor) -> Tensor:
        """Hidden states [T, width], float32, as they were parked."""
        return self.hidden(group)[self.split(group, slots)]

    # ------------------------------------------------------------------------------------------ the instruction set

    def carry_out(self, op: KVOp, payload: bytes | None = None) -> bytes | None:
        """Carry out one KV instruction.  Entries are counted over the op's table of blocks.

        COPY     source[i] -> target[i], whole blocks; no block is both
        MOVE     the same, and a block may be both
        COMPACT  source: a table; argument: entries to keep, ascending; target: where they are packed from entry 0 on
                 (may be the table's own first blocks)
        ROTATE   source: a table; argument: (delta,) or (delta, first, stop): entries [first, stop) move by delta positions, and
                 their keys turn with them
        REWRITE  source: a table; argument: entries; payload: what `pack` returned for as many entries
        ZERO     target: blocks, and their positions
        SAVE     source: blocks; returns a checksum and their bytes
        LOAD     target: blocks; payload: what SAVE returned for as many.  Raises TransferError if it was damaged
        """
        return _CARRY_OUT[op.kind](self, op, payload)

    def _copy(self, op: KVOp, payload: bytes | None) -> None:
        step = COPY_BLOCKS if op.kind is KVOpKind.COPY else max(len(op.source), 1)
        for at in range(0, len(op.source), step):
            source = self._ids(op.source[at : at + step])
            target = self._ids(op.target[at : at + step])
            for memory in (self.arena, self._positions):
                memory.index_copy_(0, target, memory.index_select(0, source))

    def _compact(self, op: KVOp, payload: bytes | None) -> None:
        keep = self._entries(op.group, op.source, op.argument)
        into = self._entries(op.group, op.target, range(len(op.argument)))
        positions = self.positions(op.group)
        positions[into] = positions[keep]
        for view in self._entry_views(op.group):
            view[into] = view[keep]

    def compact_heads(self, group: int, table: Sequence[int], indices: Tensor, stop: int) -> None:
        """COMPACT a table where each head keeps entries of its own: indices int64 [layers, kv heads, N], ascending.

        An entry has one position for all heads, and theirs now differ: the N entries get the last N positions before `stop`, the
        next one to come, so that every later row sees all of them.  Keys stay turned by the positions that they had.
        """
        count = indices.shape[2]
        blocks, offsets = self._entries(group, table, range(count))
        self.positions(group)[blocks, offsets] = torch.arange(stop - count, stop, dtype=torch.int32, device=self.device)
        ids, size = self._ids(table), self.groups[group].block_tokens
        parts = len(self._entry_views(group)) // len(indices)
        for at, view in enumerate(self._entry_views(group)):
            for head, chosen in enumerate(indices[at // parts].to(self.device)):
                own = view[:, :, head]
                own[blocks, offsets] = own[ids[torch.div(chosen, size, rounding_mode="floor")], chosen % size]

    def _rotate(self, op: KVOp, payload: bytes | None) -> None:
        group = self.groups[op.group]
        spec = self.specs[group.model]
        delta, *span = op.argument
        first, stop = span or (0, len(op.source) * group.block_tokens)
        where = self._entries(op.group, op.source, range(first, stop))
        self.positions(op.group)[where] += delta
        for layer in group.layers:
            rope = spec.layers[layer].rope
            if rope is not None:
                turned = rotate_by(self.read(op.group, layer, False, where), rope, delta)
                self.put(op.group, layer, False, where, turned)

    def _rewrite(self, op: KVOp, payload: bytes | None) -> None:
        where = self._entries(op.group, op.source, op.argument)
        views = self._entry_views(op.group)
        size = len(op.argument) * views[0].shape[2:].numel() * views[0].element_size()
        if payload is None or len(payload) != size * len(views):
            raise TransferError(f"rewriting {len(op.argument)} entries needs {size * len(views)} bytes of payload")
        for index, view in enumerate(views):
            part = torch.frombuffer(bytearray(payload[index * size : (index + 1) * size]), dtype=view.dtype)
            view[where] = part.view(len(op.argument), *view.shape[2:]).to(self.device)

    def _zero(self, op: KVOp, payload: bytes | None) -> None:
        target = self._ids(op.target)
        self.arena.index_fill_(0, target, 0)
        self._positions.index_fill_(0, target, 0)

    def _save(self, op: KVOp, payload: bytes | None) -> bytes:
        source = self._ids(op.source)
        parts = [self.arena.index_select(0, source), self._positions.index_select(0, source).view(torch.uint8)]
        body = b"".join(part.cpu().numpy().tobytes() for part in parts)
        return hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest() + body

    def _load(self, op: KVOp, payload: bytes | None) -> None:
        count = len(op.target)
        widest = self._positions.shape[1]
        size = CHECKSUM_BYTES + count * (self.block_bytes + 4 * widest)
        if payload is None or len(payload) != size:
            raise TransferError(f"{count} blocks take {size} bytes, not {len(payload or b'')}")
        body = memoryview(payload)[CHECKSUM_BYTES:]
        if hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest() != payload[:CHECKSUM_BYTES]:
            raise TransferError(f"the checksum of {count} KV blocks does not match: they were damaged on the way")
        split = count * self.block_bytes
        target = self._ids(op.target)
        blocks = torch.frombuffer(bytearray(body[:split]), dtype=torch.uint8).view(count, self.block_bytes)
        positions = torch.frombuffer(bytearray(body[split:]), dtype=torch.int32).view(count, widest)
        self.arena.index_copy_(0, target, blocks.to(self.device))
        self._positions.index_copy_(0, target, positions.to(self.device))

    def save_each(self, source: Sequence[int]) -> list[bytes]:
        """As SAVE of each block by itself, gathered into few copies out of the arena."""
        found: list[bytes] = []
        for at in range(0, len(source), COPY_BLOCKS):
            ids = self._ids(source[at : at + COPY_BLOCKS])
            parts = [self.arena.index_select(0, ids), self._positions.index_select(0, ids).view(torch.uint8)]
            bodies = torch.cat(parts, dim=1).cpu().numpy()
            for row in bodies:
                body = row.tobytes()
                found.append(hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest() + body)
        return found

    def pack(self, group: int, source: Sequence[int], entries: Sequence[int]) -> bytes:
        """Bytes of the given entries of a table as stored, [layer][key, value][entry][kv head][row]: REWRITE's payload."""
        where = self._entries(group, source, entries)
        parts = (view[where].contiguous().cpu() for view in self._entry_views(group))
        return b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)

    # ------------------------------------------------------------------------------------------ helpers

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)

    def _entries(self, group: int, table: Sequence[int], entries: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens = self.groups[group].block_tokens
        index = torch.tensor(entries, dtype=torch.int64, device=self.device)
        return self._ids(table)[torch.div(index, tokens, rounding_mode="floor")], index % tokens

    def _entry_views(self, group: int) -> list[Tensor]:
        """What a group stores, each view [blocks, block_tokens, ...]: to be moved as it is."""
        shape = self.groups[group]
        if shape.kind is GroupKind.PARKED:
            return [self.hidden(group)]
        return [self.stored(group, layer, value) for layer in shape.layers for value in (False, True)]


_CARRY_OUT: dict[KVOpKind, Callable[[KVPool, KVOp, bytes | None], bytes | None]] = {
    KVOpKind.COPY: KVPool._copy,
    KVOpKind.MOVE: KVPool._copy,
    KVOpKind.COMPACT: KVPool._compact,
    KVOpKind.ROTATE: KVPool._rotate,
    KVOpKind.REWRITE: KVPool._rewrite,
    KVOpKind.ZERO: KVPool._zero,
    KVOpKind.SAVE: KVPool._save,
    KVOpKind.LOAD: KVPool._load,
}
