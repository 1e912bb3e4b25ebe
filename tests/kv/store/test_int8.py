"""int8 KV: the formula by hand and against numpy, the pool's instructions over encoded rows, the bound on the bundled model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.exec.conftest import STORY, Bench, spec
from tests.ops.test_kvpool import BLOCKS, spec_of
from weft.config import build_stack
from weft.exec.batch import Batch, GroupBatch
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.kvpool import KVPool
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.kv.store.int8 import Int8
from weft.models.spec import kv_groups
from weft.ops.ref.rope import rotate_by
from weft.traits import Fidelity
from weft.types import GroupKind, KVOp, KVOpKind, RequestSpec

HELD_OUT = ("Stevenson_Treasure_1883.txt", "Doyle_Hound_1902.txt")
MOST_KL = 1e-4
"""The bound that the technique states, in nat a token."""


def config(**changes: object) -> EngineConfig:
    return EngineConfig(
        model=resolve(None),
        dtype="float32",
        max_model_len=1024,
        device="cpu",
        threads=1,
        memory_bytes=600 << 20,
        **changes,
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> Runtime:
    return build(prepare(config()))


@pytest.fixture(scope="module")
def encoded() -> Runtime:
    return build(prepare(config(techniques=["kv.store=int8"])))


# ---------------------------------------------------------------------------------------------- the formula


def test_a_row_by_hand() -> None:
    """max|x| = 31.75, so the scale is 0.25: quotients 127, -127, 1, 0.5, 1.5, -2.5 and 0.4; halves go to even."""
    row = torch.tensor([[31.75, -31.75, 0.25, 0.125, 0.375, -0.625, 0.1]])
    stored = Int8().encode(row)
    assert stored.tolist() == [[127, 256 - 127, 1, 0, 2, 256 - 2, 0, 0x00, 0x00, 0x80, 0x3E]]
    assert Int8().decode(stored).tolist() == [[31.75, -31.75, 0.25, 0.0, 0.5, -0.5, 0.0]]


def by_numpy(rows: np.ndarray) -> np.ndarray:
    """The rule of the docstring, row after row."""
    out = np.empty((len(rows), rows.shape[1] + 4), np.uint8)
    for i, row in enumerate(rows.astype(np.float32)):
        scale = np.float32(np.max(np.abs(row)) / np.float32(127))
        q = np.rint(row / scale) if scale else np.zeros_like(row)
        out[i, :-4] = q.astype(np.int8).view(np.uint8)
        out[i, -4:] = np.frombuffer(scale.tobytes(), np.uint8)
    return out


@pytest.mark.parametrize("dim", [6, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_numpy(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    rows = (torch.randn(300, dim, generator=generator) * torch.logspace(-20, 20, 300)[:, None]).to(dtype)
    rows[7] = 0
    stored = Int8().encode(rows)
    assert stored.shape == (300, Int8().row_bytes(dim))
    assert (stored.numpy() == by_numpy(rows.float().numpy())).all()
    back = Int8().decode(stored)
    scale = rows.float().abs().amax(-1, keepdim=True) / 127
    assert ((back - rows.float()).abs() <= scale * 0.50001).all()
    assert not back[7].any()
    assert torch.equal(Int8().decode(Int8().encode(-rows)), -back)


def test_a_row_is_encoded_by_itself() -> None:
    rows = torch.randn(65, 64)
    together = Int8().encode(rows)
    assert all(torch.equal(Int8().encode(rows[i : i + 1])[0], together[i]) for i in range(65))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    rows = torch.randn(3, 8)
    rows[1, 5] = bad
    back = Int8().decode(Int8().encode(rows))
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tiny", [1e-45, 1e-42, 1e-38, 1e-36])
def test_the_smallest_numbers(tiny: float) -> None:
    """What is too small for a scale of its own comes back as zero or itself, never as something large."""
    back = Int8().decode(Int8().encode(torch.tensor([[tiny, -tiny, 0.0]])))
    assert back.isfinite().all()
    assert back.abs().max() <= 1.01 * tiny


# ---------------------------------------------------------------------------------------------- the pool


def pool_of(dtype: torch.dtype = torch.float32) -> KVPool:
    shape, store = spec_of(), Int8()
    groups, block_bytes = kv_groups(shape, str(dtype), 4, store)
    return KVPool(groups, shape, blocks=BLOCKS, block_bytes=block_bytes, dtype=dtype, store=store)


def fill(pool: KVPool, blocks: Sequence[int], seed: int = 0) -> dict[tuple[int, bool], Tensor]:
    """Random entries in all blocks of group 0; what they should read as, [entries, kv_heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    size = pool.groups[0].block_tokens
    slots = torch.tensor([block * size + offset for block in blocks for offset in range(size)])
    pool.write_positions(0, slots, torch.arange(len(slots)) + 3)
    found = {}
    for layer in pool.groups[0].layers:
        k, v = (torch.randn(len(slots), 2, 6, generator=generator).to(pool.dtype) for _ in range(2))
        pool.write(0, layer, slots, k, v)
        for value, x in ((False, k), (True, v)):
            rows = by_numpy(x.float().reshape(-1, 6).numpy())
            scale = np.ascontiguousarray(rows[:, -4:]).view(np.float32)
            found[layer, value] = torch.from_numpy(rows[:, :-4].view(np.int8) * scale).view(-1, 2, 6)
    return found


def read(pool: KVPool, blocks: Sequence[int]) -> dict[tuple[int, bool], Tensor]:
    size = pool.groups[0].block_tokens
    where = torch.tensor(blocks).repeat_interleave(size), torch.arange(size).repeat(len(blocks))
    return {
        (layer, value): pool.read(0, layer, value, where) for layer in pool.groups[0].layers for value in (False, True)
    }


def same(a: dict[tuple[int, bool], Tensor], b: dict[tuple[int, bool], Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_a_pool(dtype: torch.dtype) -> None:
    pool = pool_of(dtype)
    found = fill(pool, (5, 0))
    assert same(read(pool, (5, 0)), found)
    assert not pool.arena[[1, 2, 3, 4, 6, 7, 8]].any()
    slots = torch.arange(4) * 2
    heads = (pool.row_of(0, *pool.split(0, slots)) * 2)[:, None] + torch.arange(2)
    for (layer, value), x in found.items():
        assert torch.equal(pool.gather(0, layer, value, heads), gathered(x, slots))
    for view in (pool.keys, pool.values):
        with pytest.raises(AssertionError, match="encoded"):
            view(0, 0)


def gathered(x: Tensor, slots: Tensor) -> Tensor:
    """Entries of the table (5, 0) at slots 0 to 7: block 0 is the table's second, block 1 was never written."""
    out = torch.zeros(len(slots), *x.shape[1:])
    out[slots < 4] = x[4:][slots[slots < 4]]
    return out


def test_entries_move_as_they_are() -> None:
    pool = pool_of()
    found = fill(pool, (1, 2, 3))
    pool.carry_out(KVOp(KVOpKind.COPY, 0, (1, 2, 3), (6, 5, 4)))
    assert same(read(pool, (6, 5, 4)), found)
    pool.carry_out(KVOp(KVOpKind.MOVE, 0, (1, 2, 3), (2, 3, 1)))
    assert same(read(pool, (2, 3, 1)), found)
    payload = pool.carry_out(KVOp(KVOpKind.SAVE, 0, (2, 3, 1)))
    pool.carry_out(KVOp(KVOpKind.ZERO, 0, (), (2, 3, 1)))
    pool.carry_out(KVOp(KVOpKind.LOAD, 0, (), (7, 8, 0)), payload)
    assert same(read(pool, (7, 8, 0)), found)
    keep = (0, 3, 5, 10)
    pool.carry_out(KVOp(KVOpKind.COMPACT, 0, (7, 8, 0), (7, 8, 0), keep))
    for key, x in read(pool, (7,)).items():
        assert torch.equal(x, found[key][list(keep)])
    other = fill(pool, (2,), 3)
    pool.carry_out(KVOp(KVOpKind.REWRITE, 0, (2,), (), (3, 1)), pool.pack(0, (6, 5, 4), (9, 2)))
    for key, x in read(pool, (2,)).items():
        assert torch.equal(x, torch.stack([other[key][0], found[key][2], other[key][2], found[key][9]]))


def test_rotation_reads_turns_and_encodes_again() -> None:
    pool = pool_of()
    found = fill(pool, (1, 6))
    pool.carry_out(KVOp(KVOpKind.ROTATE, 0, (1, 6), (), (5, 2, 7)))
    after, rope = read(pool, (1, 6)), pool.specs["target"].layers[0].rope
    assert rope is not None
    for (layer, value), x in found.items():
        wanted = x.clone()
        if not value:
            turned = rotate_by(x[2:7].clone(), rope, 5)
            wanted[2:7] = Int8().decode(Int8().encode(turned.reshape(-1, 6))).view_as(turned)
        assert torch.equal(after[layer, value], wanted)
    assert pool.positions(0)[[1, 6]].flatten().tolist() == [3, 4, 10, 11, 12, 13, 14, 10]


def test_parked_states_stay_float32() -> None:
    pool = pool_of()
    assert pool.groups[2].kind is GroupKind.PARKED
    hidden = torch.randn(4, 24)
    pool.park(2, 3 * pool.groups[2].block_tokens + torch.arange(4), hidden)
    assert torch.equal(pool.unpark(2, 3 * pool.groups[2].block_tokens + torch.arange(4)), hidden)


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("dtype", "number_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_the_same_memory_holds_more_tokens(dtype: str, number_bytes: int) -> None:
    wide = replace(config(), dtype=dtype, max_model_len=4096)
    base, store = prepare(wide), prepare(replace(wide, techniques=["kv.store=int8"]))
    assert store.plan.kv_bytes_per_token * 64 * number_bytes == base.plan.kv_bytes_per_token * (64 + 4)
    assert store.plan.kv_blocks > 0.97 * base.plan.kv_blocks * 64 * number_bytes / (64 + 4)
    assert store.plan.total_bytes <= 600 << 20
    assert store.stack.settings != base.stack.settings, "cached prefixes of one are none of the other"


def test_the_pool_is_as_planned(encoded: Runtime) -> None:
    assert encoded.pool.bytes == encoded.setup.plan.kv_bytes
    assert encoded.pool.arena.nbytes == encoded.setup.plan.kv_blocks * 16 * 8 * 2 * 2 * (64 + 4)


# ---------------------------------------------------------------------------------------------- the bundled model


def laws(runtime: Runtime, ids: Sequence[int]) -> Tensor:
    """log p of the next token after each position, float32 [T, vocab], with the KV in the pool as the stack stores it."""
    size, pool = runtime.setup.groups[0].block_tokens, runtime.pool
    table = torch.arange(-(-len(ids) // size))[None]
    out = []
    with torch.inference_mode():
        for at in range(0, len(ids), 64):
            positions = torch.arange(at, min(at + 64, len(ids)))
            where = GroupBatch(table, torch.tensor([0]), positions[-1:] + 1, positions)
            tokens = torch.tensor(ids[at : at + 64])
            batch = Batch(tokens, positions, [0, len(tokens)], [where], torch.arange(len(tokens)))
            out.append(runtime.decoder.forward(batch, pool).log_softmax(-1))
    return torch.cat(out)


def test_kl_on_prose_that_was_never_read(plain: Runtime, encoded: Runtime, shared: Callable[[str], Path]) -> None:
    """The stated bound: mean KL(plain || int8) over the next token's law, 2 windows of 768 tokens of each novel."""
    tokenizer, found = Tokenizer.load(resolve(None)), []
    for name in HELD_OUT:
        text = shared(f"data/text/novels/{name}").read_text(encoding="utf8")
        ids = tokenizer.encode(text[2000:40000], add_special=False)
        for at in (0, 5000):
            p, q = (laws(r, ids[at : at + 768]) for r in (plain, encoded))
            found.append((p.exp() * (p - q)).sum(-1))
    kl = torch.cat(found)
    assert 0 < kl.mean() <= MOST_KL, kl.mean()
    assert build_stack(["kv.store=int8"]).verdict.fidelity is Fidelity.APPROX


@pytest.fixture(scope="module")
def specs() -> list[RequestSpec]:
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    rng, out = random.Random(3), []
    for i in range(12):
        length = rng.choice((3, 16, 17, 33, 70, 100))
        start = 0 if i % 2 else rng.randrange(len(ids) - length)
        law = {"temperature": 0.0} if i % 4 == 0 else {"temperature": 0.8}
        out.append(spec(i, ids[start : start + length], seed=50 + i, max_tokens=14, **law))
    return out


def bench(runtime: Runtime, **limits: Any) -> Bench:
    return Bench(runtime, techniques=["kv.store=int8"], **limits)


def test_tokens_depend_on_nothing_but_the_request(encoded: Runtime, specs: list[RequestSpec]) -> None:
    """Alone, in company, in chunks of 9 rows, from a cached prefix and after preemption: the same tokens."""
    alone: dict[tuple[int, int], list[int]] = {}
    for one in specs:
        alone.update(bench(encoded, share=False).run([one]))
    company = bench(encoded, share=False)
    assert company.run(specs) == alone
    # Every entry of 8 layers has keys and values of 2 heads; the last token of each request is never computed.
    entries = sum(len(s.items[0].ids) + s.sampling.max_tokens - 1 for s in specs)  # type: ignore[union-attr]
    assert company.engine.stats.acts["kv.store=int8.rows_encoded"] <= entries * 8 * 2 * 2
    assert company.engine.stats.acts["kv.store=int8.rows_encoded"] > entries * 8 * 2
    assert bench(encoded, share=False, max_rows=9, max_num_seqs=6).run(specs) == alone
    twice = bench(encoded)
    assert twice.run(specs) == alone
    again = [RequestSpec(id=s.id + 100, items=s.items, sampling=s.sampling, seed=s.seed) for s in specs]
    hits = twice.engine.stats.prefix_hit_tokens
    second = twice.run(again)
    assert {k: second[k[0] + 100, k[1]] for k in alone} == alone
    assert twice.engine.stats.prefix_hit_tokens - hits > 200
    rng = random.Random(1)

    def disturb(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        if bench.steps < 20 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)

    pressed = bench(encoded)
    assert pressed.run(specs, disturb) == alone
    assert pressed.engine.stats.preemptions > 10
