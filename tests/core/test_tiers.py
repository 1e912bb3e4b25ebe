"""What lies below the pool, by hand: tickets, order of use, what a match finds there, when others see a loaded block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.core.test_kv import FULL, WINDOW, compute, request
from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.core.kv import KV
from weft.core.pool import BlockPool
from weft.core.request import State
from weft.core.tiers import TierIndex, memory_bytes, record_bytes, records
from weft.errors import ConfigError, InvariantError
from weft.exec.null import NullExecutor
from weft.kv.evict.lru import LRU
from weft.slots import Tier
from weft.types import Finished, KVOp, KVOpKind, RequestSpec, SamplingSpec, TokenItem, Tokens

SIZE = record_bytes([FULL], 4)


@dataclass
class Two:
    """Blocks that were hit go to the first tier, of 2 records, others to the second, of 3; those hit 9 times to none."""

    tiers: Sequence[Tier] = (Tier("memory", 2 * SIZE), Tier("file", 3 * SIZE + 1, buffer_bytes=7))
    lookahead: int = 0

    def place(self, hits: int) -> int | None:
        return None if hits == 9 else 0 if hits else 1

    def prefetch(self, waiting: Sequence[Sequence[int]]) -> Sequence[int]:
        return waiting[0]

    def count(self, act: str, number: int) -> None: ...


def index(pool: BlockPool | None = None) -> TierIndex:
    return TierIndex(Two(), SIZE, pool or BlockPool(1, LRU()))


def key(i: int) -> tuple[int, bytes]:
    return 0, bytes([i])


# ---------------------------------------------------------------------------------------------- books


def test_sizes() -> None:
    assert SIZE == 8 + 32 + 4 + 4 * 4
    assert records(Two().tiers, SIZE) == [2, 3]
    assert memory_bytes(Two().tiers) == 2 * SIZE + 7
    with pytest.raises(ConfigError, match="hold no block"):
        records([Tier("memory", SIZE - 1)], SIZE)
    with pytest.raises(ConfigError, match="at least one"):
        records([], SIZE)


def test_a_tier_gives_up_what_was_used_longest_ago() -> None:
    tiers = index()
    first = [tiers.save(key(i), 0) for i in range(3)]
    assert None not in first
    assert len(tiers) == 3
    assert tiers.save(key(0), 0) is None, "what is stored is not moved again, but counts as used"
    fourth = tiers.save(key(4), 0)
    assert fourth is not None
    assert tiers.find(*key(1)) is None
    assert [tiers.find(*key(i)) for i in (0, 2, 4)] == [~first[0], ~first[2], ~fourth]  # type: ignore[operator]
    assert fourth % 5 == first[1] % 5, "the record of the oldest"  # type: ignore[operator]
    assert tiers.save(key(5), 1) is not None, "the other tier has room"
    assert len(tiers) == 4
    tiers.check()


def test_the_technique_places() -> None:
    tiers = index()
    near, far = tiers.save(key(0), 3), tiers.save(key(1), 0)
    assert near is not None
    assert far is not None
    assert near % 5 < 2 <= far % 5
    assert tiers.save(key(2), 9) is None
    assert tiers.find(*key(2)) is None
    tiers.offload.place = lambda hits: 2  # type: ignore[method-assign]
    with pytest.raises(InvariantError, match="tier 2"):
        tiers.save(key(3), 0)


def test_a_ticket_is_never_given_twice() -> None:
    tiers, seen = index(), set[int]()
    for i in range(60):
        ticket = tiers.save(key(i), i % 2)
        assert ticket is not None
        assert ticket not in seen
        seen.add(ticket)
        if i % 3 == 0:
            tiers.forget(ticket)
            tiers.forget(ticket)
            assert tiers.find(*key(i)) is None
        tiers.check()


def test_what_is_about_to_be_loaded_is_not_written_over() -> None:
    pool = BlockPool(4, LRU())
    tiers = index(pool)
    held = [tiers.save(key(i), 0) for i in range(3)]
    tiers.hold(held)  # type: ignore[arg-type]
    assert tiers.save(key(3), 0) is None, "every record of the tier is held"
    with pytest.raises(InvariantError, match="pinned"):
        tiers.check()
    ops: list[KVOp] = []
    assert tiers.load(1, 0, held, ops) == [0, 1, 2]  # type: ignore[arg-type]
    assert ops == [KVOp(KVOpKind.LOAD, 0, (), (0, 1, 2), tuple(held))]  # type: ignore[arg-type]
    assert tiers.save(key(3), 0) is not None
    assert tiers.find(*key(2)) is None, "of a prefix, the end counts as used before the beginning"
    tiers.check()


def test_the_check_sees_what_does_not_agree() -> None:
    tiers = index()
    ticket = tiers.save(key(0), 0)
    assert ticket is not None
    del tiers._tickets[key(0)]
    with pytest.raises(InvariantError, match="do not agree"):
        tiers.check()
    tiers = index()
    tiers._free[0].pop()
    with pytest.raises(InvariantError, match="lost records"):
        tiers.check()


# ---------------------------------------------------------------------------------------------- tables


def make(blocks: int, groups: Sequence[object] = (FULL,)) -> KV:
    pool = BlockPool(blocks, LRU())
    offload = build_stack(["kv.offload=host(memory='4K')"])["kv.offload"]
    return KV(groups, pool, tiers=TierIndex(offload, 80, pool))  # type: ignore[arg-type]


def crowd_out(kv: KV, blocks: int) -> list[KVOp]:
    """Somebody takes and gives back so many blocks; what that made the plan do."""
    r, ops = request(kv, 90, [99] * (4 * blocks)), list[KVOp]()
    kv.grow(r, 0, 4 * blocks, ops)
    kv.submitted()
    kv.release(r)
    return ops


def test_an_evicted_block_is_saved_before_it_is_reused() -> None:
    kv = make(4)
    a = request(kv, 1, range(20))
    compute(kv, a, 12)
    kv.release(a)
    ops = crowd_out(kv, 3)
    assert [(op.kind, op.source) for op in ops] == [(KVOpKind.SAVE, (2,)), (KVOpKind.SAVE, (1,))]
    assert kv.tiers is not None
    assert len(kv.tiers) == 2
    assert crowd_out(kv, 4)[0].source == (0,)


def test_a_block_that_its_holder_writes_over_is_saved_first() -> None:
    """Compression in a pool without room takes the block out of the index: the tier keeps what it was."""
    kv = make(2)
    a = request(kv, 1, range(20))
    compute(kv, a, 8)
    ops: list[KVOp] = []
    kv.grow(a, 0, 0, ops, rewrite=True)
    assert [(op.kind, op.source) for op in ops] == [(KVOpKind.SAVE, (0,)), (KVOpKind.SAVE, (1,))]
    assert kv.pool.keys == [None, None]


def test_pool_and_tier_serve_a_prefix_together() -> None:
    kv = make(6)
    a = request(kv, 1, range(20))
    compute(kv, a, 16)
    kv.release(a)
    saved = {op.source[0]: op.argument[0] for op in crowd_out(kv, 4)}
    assert set(saved) == {2, 3}, "the end of the prefix went first"
    b = request(kv, 2, range(20))
    lengths, tables, idle = kv.match(b)
    assert (lengths, idle) == ([16], 4), "two that nobody holds, and two that must be loaded"
    assert tables == [{0: [0, 1, ~saved[2], ~saved[3]]}]
    assert kv.stored(b) == [saved[2], saved[3]]
    assert kv.match(b, stored=False) == ([8], [{0: [0, 1]}], 2)
    ops: list[KVOp] = []
    kv.hold(tables)
    kv.adopt(b, lengths, tables, ops)
    (op,) = ops
    assert (op.kind, op.argument) == (KVOpKind.LOAD, (saved[2], saved[3]))
    assert b.tables[0].blocks == [0, 1, *op.target]
    assert b.loading
    with pytest.raises(InvariantError, match="no plan in flight loads"):
        kv.check([b])
    b.loading = False
    # Others see the loaded blocks from the next commit on, like computed ones, and not before.
    c = request(kv, 3, range(20))
    assert kv.match(c, stored=False)[0] == [8]
    compute(kv, b, 1)
    assert kv.match(c) == ([16], [{0: b.tables[0].blocks[:4]}], 0)
    kv.check([b])


def test_every_group_is_asked() -> None:
    """The full group's blocks are stored; the window's last ones are gone: nothing is served."""
    kv = make(16, (FULL, WINDOW))
    a = request(kv, 1, range(20))
    compute(kv, a, 16)
    kv.release(a)
    assert kv.match(request(kv, 2, range(20)))[0] == [16]
    kv.pool.clear_cache()
    assert kv.match(request(kv, 3, range(20)))[0] == [0], "to clear the cache is to forget, not to store"
    compute(kv, a, 16)
    kv.release(a)
    crowd_out(kv, 4)  # 4 blocks of the full group, 8 of the window's
    b = request(kv, 2, range(20))
    assert kv.match(b)[0] == [16]
    assert kv.stored(b)
    assert kv.tiers is not None
    window = [t for (g, _), t in kv.tiers._tickets.items() if g == 1 and t in kv.stored(b)]
    kv.lost(window)
    assert kv.match(b)[0][0] < 16


# ---------------------------------------------------------------------------------------------- engine


def spec(id: int, tokens: Sequence[int], **law: int) -> RequestSpec:
    return RequestSpec(id=id, items=(TokenItem(tuple(tokens)),), sampling=SamplingSpec(temperature=0.0, **law))


def engine_of(blocks: int, **more: object) -> tuple[Engine, NullExecutor]:
    stack = build_stack(["kv.offload=file(disk='64K', memory='4K', lookahead=2)"])
    limits = Limits(max_model_len=64, max_num_seqs=4, max_rows=64)
    engine = Engine([FULL], blocks, limits, stack, vocab=50, **more)  # type: ignore[arg-type]
    return engine, NullExecutor([FULL], vocab=50)


def drive(engine: Engine, executor: NullExecutor, specs: Sequence[RequestSpec]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for one in specs:
        assert engine.add(one, 0.0) == []
    while engine.has_work:
        plan, _ = engine.schedule(0.0)
        for event in engine.commit(0.0, plan, executor.execute(plan)):
            if isinstance(event, Tokens):
                out.setdefault(event.id, []).extend(event.tokens)
            assert not isinstance(event, Finished) or event.reason == "length"
        engine.check()
    return out


def test_a_preempted_request_comes_back_from_the_tier() -> None:
    engine, executor = engine_of(8)
    engine.add(spec(1, range(16), max_tokens=4), 0.0)
    plan, _ = engine.schedule(0.0)
    engine.commit(0.0, plan, executor.execute(plan))
    engine.park(1)
    drive(engine, executor, [spec(2, range(20, 45), max_tokens=3)])
    assert engine.stats.preemptions == 1
    engine.resume(1)
    before = engine.stats.prefix_hit_tokens
    plan, _ = engine.schedule(0.0)
    assert sum(len(op.target) for op in plan.kv if op.kind is KVOpKind.LOAD) == 3, "one is still in the pool"
    assert engine.stats.prefix_hit_tokens - before == 16
    assert plan.rows == 1
    engine.commit(0.0, plan, executor.execute(plan))
    drive(engine, executor, [])


def test_the_head_of_the_queue_is_fetched_ahead() -> None:
    engine, executor = engine_of(10)
    docs = [[i * 3 % 50 + j for j in range(20)] for i in range(3)]
    drive(engine, executor, [spec(i, d, max_tokens=2) for i, d in enumerate(docs)])
    drive(engine, executor, [spec(9, [49 - j for j in range(30)], max_tokens=5)])
    for i in range(2):
        engine.add(spec(10 + i, docs[i], max_tokens=20), 0.0)
    plan, _ = engine.schedule(0.0)
    assert engine.find(11).state is State.WAITING
    assert plan.fetch
    assert list(plan.fetch) == engine.kv.stored(engine.find(11))
    engine.commit(0.0, plan, executor.execute(plan))
    quiet = 0
    while engine.find(11).state is State.WAITING:
        evictions = engine.pool.evictions
        plan, _ = engine.schedule(0.0)
        if engine.pool.evictions == evictions and engine.find(11).state is State.WAITING:
            assert plan.fetch == (), "the same advice is given once"
            quiet += 1
        engine.commit(0.0, plan, executor.execute(plan))
    assert quiet
    drive(engine, executor, [])


@pytest.mark.parametrize("lost", ["save", "load"])
def test_a_lost_block_is_computed_again(lost: str) -> None:
    engine, executor = engine_of(8)
    doc = list(range(24))
    plain = drive(*engine_of(30), [spec(1, doc, max_tokens=3)])[1]
    assert drive(engine, executor, [spec(1, doc, max_tokens=3)])[1] == plain
    failed: list[int] = []

    def fails(ticket: int) -> bool:
        failed.append(ticket)
        return len(failed) == 2

    if lost == "save":
        executor.loses = fails  # type: ignore[method-assign]
    drive(engine, executor, [spec(2, range(20, 46), max_tokens=3)])
    executor.loses = fails  # type: ignore[method-assign]
    assert engine.kv.tiers is not None
    known = len(engine.kv.tiers)
    assert drive(engine, executor, [spec(3, doc, max_tokens=3)])[3] == plain
    assert len(failed) > 2
    assert len(engine.kv.tiers) >= known - (lost == "load")
    executor.loses = lambda ticket: False  # type: ignore[method-assign]
    assert drive(engine, executor, [spec(4, doc, max_tokens=3)])[4] == plain


def test_a_prefix_that_is_not_shared_is_not_stored() -> None:
    engine, executor = engine_of(8, share=False)
    assert engine.kv.tiers is None
    assert drive(engine, executor, [spec(1, range(20), max_tokens=2)])


def test_without_room_to_load_into_the_pool_serves_alone() -> None:
    """A parked request holds what the loads would need: the match falls back to what the pool has."""
    engine, executor = engine_of(9)
    drive(engine, executor, [spec(1, range(24), max_tokens=3)])
    drive(engine, executor, [spec(2, range(20, 49), max_tokens=3)])
    engine.add(spec(3, range(30, 47), max_tokens=3), 0.0)
    plan, _ = engine.schedule(0.0)
    engine.commit(0.0, plan, executor.execute(plan))
    engine.park(3)
    engine.add(spec(4, range(24), max_tokens=3), 0.0)
    r = engine.find(4)
    wanted = engine.kv.match(r)[2]
    assert wanted > engine.pool.available > 0
    plan, _ = engine.schedule(0.0)
    assert r.state is State.RUNNING
    assert not any(op.kind is KVOpKind.LOAD for op in plan.kv)
    engine.commit(0.0, plan, executor.execute(plan))
    engine.resume(3)
    drive(engine, executor, [])
