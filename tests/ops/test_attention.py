"""Paged attention in tiles against a dense reference written row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from weft.exec.batch import Batch, GroupBatch
from weft.exec.kvpool import KVPool
from weft.models.spec import DecoderSpec, LayerSpec, kv_groups
from weft.ops.ref.attention import attention, merge
from weft.ops.ref.attention_plan import AttentionPlan
from weft.ops.ref.tiles import FAST, Tiling

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 12, 4
SMALL = Tiling(decode=2, prefill=4, keys=8, group=2, scratch_bytes=1)
TINY = Tiling(decode=1, prefill=8, keys=16, group=4, scratch_bytes=1 << 18)
TILINGS = {"fast": FAST, "small": SMALL, "tiny": TINY}


@dataclass
class Held:
    """A sequence in the pool: positions of its entries (the last `rows` of them are the batch's), entries dropped before."""

    positions: list[int]
    rows: int
    first: int = 0
    parents: tuple[int, ...] = ()


@dataclass
class World:
    """A pool with random contents, NaN wherever nobody wrote, and a batch over some sequences."""

    sequences: Sequence[Held]
    window: int | None = None
    dtype: torch.dtype = torch.float32
    layer: int = 1
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        layer = LayerSpec(weights=0, query_scale=1.0, intermediate=8, window=self.window)
        spec = DecoderSpec(
            family="llama",
            vocab=8,
            width=8,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=DIM,
            layers=(layer, layer),
            max_positions=4096,
            norm_eps=1e-5,
        )
        groups, block_bytes = kv_groups(spec, str(self.dtype), BLOCK)
        generator = torch.Generator().manual_seed(11)
        counts = [-(-len(s.positions) // BLOCK) for s in self.sequences]
        self.pool = KVPool(groups, spec, blocks=sum(counts) + 3, block_bytes=block_bytes, dtype=self.dtype)
        self.pool.arena.fill_(255)
        order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        tables, slots = [], []
        for sequence, count in zip(self.sequences, counts, strict=True):
            table = [order.pop() for _ in range(count)]
            where = [table[e // BLOCK] * BLOCK + e % BLOCK for e in range(len(sequence.positions))]
            k = torch.randn(len(where), KV_HEADS, DIM, generator=generator).to(self.dtype)
            v = torch.randn(len(where), KV_HEADS, DIM, generator=generator).to(self.dtype)
            self.pool.write(0, self.layer, torch.tensor(where), k, v)
            self.pool.write_positions(0, torch.tensor(where), torch.tensor(sequence.positions))
            self.keys.append(k.float())
            self.values.append(v.float())
            tables.append(table)
            slots += where[len(where) - sequence.rows :]
        bounds = [0]
        for sequence in self.sequences:
            bounds.append(bounds[-1] + sequence.rows)
        widest = max(counts)
        self.where = GroupBatch(
            torch.tensor([table + [0] * (widest - len(table)) for table in tables]),
            torch.tensor([s.first for s in self.sequences]),
            torch.tensor([len(s.positions) for s in self.sequences]),
            torch.tensor(slots, dtype=torch.int64),
        )
        positions = [p for s in self.sequences for p in s.positions[len(s.positions) - s.rows :]]
        self.batch = Batch(
            torch.zeros(bounds[-1], dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64),
            bounds,
            [self.where],
            torch.empty(0, dtype=torch.int64),
            {i: s.parents for i, s in enumerate(self.sequences) if s.parents},
        )
        self.q = torch.randn(bounds[-1], HEADS, DIM, generator=generator).to(self.dtype)
        self.bias = torch.randn(self.pool.blocks, BLOCK, generator=generator)

    def run(self, tiling: Tiling, **kw: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
        plan = AttentionPlan(self.batch, self.where, self.pool, 0, HEADS, tiling)
        out = torch.full_like(self.q, math.nan)
        lse, mass = attention(self.q, self.pool, self.layer, plan, scale=0.7, out_THD=out, **kw)  # type: ignore[arg-type]
        return out, lse, mass

    def visible(self, sequence: Held, row: int) -> list[int]:
        """Entries that a row of a sequence sees, from the definition."""
        total, guesses = len(sequence.positions), len(sequence.parents)
        me = total - sequence.rows + row
        p = sequence.positions[me]
        seen = [e for e, at in enumerate(sequence.positions) if at <= p and (not self.window or p - at < self.window)]
        begin = sequence.rows - guesses
        if row < begin:
            return [e for e in seen if e < total - guesses]
        family = set()
        at = row
        while at >= begin:
            family.add(total - sequence.rows + at)
            at = sequence.parents[at - begin]
        return [e for e in seen if e < total - guesses or e in family]

    def dense(self, softcap: float | None = None, bias: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp and column sums, one row and head at a time."""
        out, lse = torch.zeros(self.q.shape), torch.zeros(self.q.shape[:2])
        entries = self.where.tables_SB.shape[1] * BLOCK
        mass = torch.zeros(len(self.sequences), KV_HEADS, entries)
        for s, sequence in enumerate(self.sequences):
            weights = self.bias[self.where.tables_SB[s]].flatten()
            for row in range(sequence.rows):
                seen = self.visible(sequence, row)
                for head in range(HEADS):
                    kv = head // (HEADS // KV_HEADS)
                    scores = 0.7 * self.keys[s][seen, kv] @ self.q[self.batch.bounds[s] + row, head].float()
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if bias:
                        scores = scores + weights[seen]
                    share = torch.softmax(scores, 0)
                    out[self.batch.bounds[s] + row, head] = share @ self.values[s][seen, kv]
                    lse[self.batch.bounds[s] + row, head] = torch.logsumexp(scores, 0)
                    mass[s, kv, seen] += share
        return out, lse, mass


def plain() -> list[Held]:
    return [
        Held(list(range(21)), 21),
        Held(list(range(70)), 1),
        Held(list(range(1)), 1),
        Held(list(range(45)), 13),
        Held(list(range(9)), 2),
    ]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("window", [None, 6])
def test_matches_dense(tiling: str, softcap: float | None, bias: bool, window: int | None) -> None:
    world = World(plain(), window)
    found = world.run(
        TILINGS[tiling], softcap=softcap, bias=world.bias if bias else None, want_lse=True, want_mass=True
    )
    for mine, wanted in zip(found, world.dense(softcap, bias), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-5)


def test_nothing_extra_unless_wanted() -> None:
    out, lse, mass = World(plain()).run(FAST)
    assert lse is None
    assert mass is None
    assert out.isfinite().all()


@pytest.mark.parametrize("tiling", TILINGS)
def test_window_with_dropped_head(tiling: str) -> None:
    """Tables whose first blocks are gone: positions go on, entries are counted from what is left."""
    sequences = [Held(list(range(12, 50)), 9, first=12), Held(list(range(40, 61)), 1, first=40)]
    world = World(sequences, window=10)
    torch.testing.assert_close(world.run(TILINGS[tiling])[0], world.dense()[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("window", [None, 12])
def test_compressed_table(tiling: str, window: int | None) -> None:
    """Entries whose positions have gaps: what is seen goes by position, not by place in the table."""
    kept = [0, 1, 2, 7, 19, 20, 33, 34, 40, 41]
    world = World([Held([*kept, *range(60, 67)], 7), Held([*kept, 90], 1)], window)
    torch.testing.assert_close(world.run(TILINGS[tiling])[0], world.dense()[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", TILINGS)
def test_rows_in_the_middle_do_not_see_what_follows(tiling: str) -> None:
    """Rows recomputed inside a table that already holds later entries (selective recomputation)."""
    world = World([Held(list(range(40)), 40)])
    rows = [3, 4, 5, 20, 21]
    wanted = world.dense()[0][rows]
    world.batch.bounds = [0, len(rows)]
    world.batch.positions_T = torch.tensor(rows)
    world.q = world.q[rows]
    torch.testing.assert_close(world.run(TILINGS[tiling])[0], wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("window", [None, 7])
def test_trees(tiling: str, window: int | None) -> None:
    """Guesses see the context, their ancestors and themselves; siblings share positions; other sequences are untouched."""
    # Rows 0..2 are context; guesses 3..8 follow rows (2, 2, 3, 3, 4, 7).
    tree = (2, 2, 3, 3, 4, 7)
    context = 33
    depth = [context, context, context + 1, context + 1, context + 1, context + 2]
    with_tree = Held([*range(context), *depth], 9, parents=tree)
    chain = Held([*range(18), 18, 19, 20], 4, parents=(0, 1, 2))
    world = World([Held(list(range(17)), 5), with_tree, chain], window)
    found = world.run(TILINGS[tiling], want_lse=True, want_mass=True)
    for mine, wanted in zip(found, world.dense(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-5)


def test_a_chain_of_guesses_is_plain_causal_attention() -> None:
    plainly = World([Held(list(range(30)), 5)])
    as_tree = World([Held(list(range(30)), 5, parents=(1, 2, 3))])
    assert torch.equal(plainly.run(SMALL)[0], as_tree.run(SMALL)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_accumulate_in_float32(dtype: torch.dtype) -> None:
    world = World(plain(), dtype=dtype)
    out = world.run(FAST)[0]
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), world.dense()[0], atol=1e-2, rtol=1e-2)


def test_merge_of_parts_is_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(5, 2, 8, generator=generator)
    k, v = (torch.randn(30, 2, 8, generator=generator) for _ in range(2))

    def over(entries: slice) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("thd,ehd->the", q, k[entries])
        return torch.einsum("the,ehd->thd", scores.softmax(-1), v[entries]), scores.logsumexp(-1)

    parts = [over(slice(0, 4)), over(slice(4, 21)), over(slice(21, 30))]
    empty = torch.zeros(5, 2, 8), torch.full((5, 2), -math.inf)
    out, lse = merge([*(p[0] for p in parts), empty[0]], [*(p[1] for p in parts), empty[1]])
    wanted = over(slice(0, 30))
    torch.testing.assert_close(out, wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, wanted[1], atol=1e-5, rtol=1e-5)
    nothing, bottom = merge([empty[0]], [empty[1]])
    assert (nothing == 0).all()
    assert (bottom == -math.inf).all()


def test_scratch_is_bounded() -> None:
    """Slabs are as many as the scratch asks for, and their number changes nothing."""
    world = World([Held(list(range(200)), 200), *plain()])
    wide = Tiling(decode=2, prefill=4, keys=8, group=2)
    plans = [AttentionPlan(world.batch, world.where, world.pool, 0, HEADS, t) for t in (SMALL, wide)]
    assert len(plans[0].slabs) > 20 > len(plans[1].slabs)
    assert torch.equal(world.run(SMALL)[0], world.run(wide)[0])
