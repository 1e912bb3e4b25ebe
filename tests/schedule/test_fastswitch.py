"""fastswitch: worked by hand on two places, what a second switch moves, what may be moved beside a step, and live beside fcfs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.exec.conftest import Bench, spec
from tests.kv.offload.test_offload import documents
from weft.config import Limits, build_stack
from weft.core import switch
from weft.core.engine import Engine
from weft.core.membership import Membership
from weft.cost.roofline import Roofline
from weft.exec.build import Runtime
from weft.exec.tiers import Memory, TierStore
from weft.registry import parse
from weft.sim.executor import facts
from weft.sim.machines import hardware, model
from weft.slots.cost import Load
from weft.types import Finished, Grant, GroupKind, GroupSpec, KVOp, KVOpKind, Plan, RequestSpec, SamplingSpec, TokenItem

GROUPS = [GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=4)]
HOST = "kv.offload=host(memory='1MiB')"
Step = tuple[dict[int, int], list[tuple[str, int]]]
"""The rows of each request, and what is moved: the kind of instruction, and its blocks."""


def steps(
    parts: Sequence[str], asks: Sequence[tuple[float, int, int]], *, seqs: int = 2, blocks: int = 100
) -> list[Step]:
    """One step takes one second; asks: (when it comes, prompt, output)."""
    limits = Limits(max_model_len=100, max_num_seqs=seqs, max_rows=16, max_samples=16)
    engine = Engine(GROUPS, blocks, limits, build_stack(parts))
    found: list[Step] = []
    now, sent, left = 0.0, 0, len(asks)
    while left:
        while sent < len(asks) and asks[sent][0] <= now:
            _, prompt, output = asks[sent]
            items = (TokenItem(tuple(range(100 * sent, 100 * sent + prompt))),)
            assert engine.add(RequestSpec(id=sent, items=items, sampling=SamplingSpec(max_tokens=output)), now) == []
            sent += 1
        plan, _ = engine.schedule(now)
        moved = [(op.kind.name, len(op.argument)) for op in plan.kv]
        found.append(({w.request - 1: len(w.tokens) for w in plan.works}, moved))
        left -= sum(isinstance(e, Finished) for e in engine.commit(now + 1, plan, facts(plan)))
        engine.check()
        assert len(found) < 300, found[-3:]
        now += 1.0
    return found


ASKS = [(0, 4, 6), (0, 4, 6), (1, 4, 1)]


def test_by_hand() -> None:
    # Levels of two tokens.  In the third step 0 and 1 have said two, and are behind 2, who has said nothing; 0 is the oldest and
    # stays, 1 has five entries computed, of which one block is full: it is stored beside the step, and 2 enters in the next one.
    # Then the place is free, and 1 comes back with its block (which the pool still has): of six tokens two are left.
    one = {1: 1, 0: 1}
    both = [{0: 4, 1: 4}, {0: 1, 1: 1}]
    assert steps(["schedule=fastswitch(quantum=2)", HOST], ASKS) == [
        (both[0], []), (both[1], []), ({0: 1}, [("SAVE", 1)]), ({2: 4, 0: 1}, []), ({1: 2, 0: 1}, []), (one, []), ({1: 1}, []),
        ({1: 1}, []),
    ]  # fmt: skip
    assert [s for s, _ in steps(["schedule=fcfs", HOST], ASKS)] == [both[0], *[both[1]] * 5, {2: 4}]
    # Without a tier there is nothing to wait for.
    assert [s for s, _ in steps(["schedule=fastswitch(quantum=2)"], ASKS)][2:4] == [{2: 4, 0: 1}, {1: 2, 0: 1}]
    with pytest.raises(Exception, match="quantum"):
        parse("schedule=fastswitch(quantum=0)").build()


def test_a_second_switch_moves_what_was_added() -> None:
    # 1 yields to 2 at 4 tokens of its answer and to 3 at 16: 11 and then some 23 entries, 2 full blocks and then 3 more.
    asks = [(0, 8, 40), (0, 8, 40), (2, 4, 1), (16, 4, 1)]
    found = [moved for _, moved in steps(["schedule=fastswitch(quantum=4)", HOST], asks) if moved]
    assert found == [[("SAVE", 2)], [("SAVE", 3)]]


def test_blocks_that_the_pool_gave_up_come_back_in_one_instruction() -> None:
    # 12 blocks: two prompts of 12 tokens take 3 each and a fourth for their answers; 2 and 3 take what 1 left.
    asks = [(0, 12, 30), (0, 12, 8), (2, 20, 2)]
    found = [moved for _, moved in steps(["schedule=fastswitch(quantum=4)", HOST], asks, blocks=11) if moved]
    saved, loaded = ([n for moved in found for kind, n in moved if kind == want] for want in ("SAVE", "LOAD"))
    assert saved[0] == 3
    assert loaded, found
    assert max(loaded) > 1
    assert sum(loaded) <= sum(saved)


def plan(ops: Sequence[KVOp], grants: Sequence[Grant] = ()) -> Plan:
    return Plan(step=1, works=(), grants=tuple(grants), kv=tuple(ops))


def test_what_is_moved_beside_a_step_is_written_by_nothing_in_it() -> None:
    save, load = KVOp(KVOpKind.SAVE, 0, (1, 2), (), (7, 8)), KVOp(KVOpKind.LOAD, 0, (), (5, 6), (9, 10))
    assert switch.aside(plan([save, load])) == {0, 1}
    assert (
        switch.aside(plan([save], [Grant(1, 0, 0, (3, 2), 0)])) == set()
    )  # block 2 is somebody else's from this step on
    assert switch.aside(plan([save, KVOp(KVOpKind.COPY, 0, (4,), (1,))])) == set()
    assert switch.aside(plan([save, KVOp(KVOpKind.LOAD, 0, (), (2,), (9,))])) == {1}


def test_what_is_moved_beside_a_step_costs_what_shows() -> None:
    shape, device = model("llama-3.1-8b"), hardware("h100")
    price = Roofline().on(device, shape.figures)
    kinds = len(shape.figures.kinds)
    zero = [0.0] * kinds

    def step(**more: Any) -> float:
        return sum(
            price(Load(rows=8, samples=8, works=8, prompt_pairs=zero, prompt_entries=zero, decode_entries=zero, **more))
        )

    plain = step()
    # A block of 16 tokens is 2 MiB: 128 KiB for each, over a link of 64 GB/s and 10 us a copy.
    block_s = 2 * 2**20 / 64e9
    assert step(stored=100, copies=100) - plain == pytest.approx(100 * (block_s + 10e-6))
    assert step(stored=100, copies=1) - plain == pytest.approx(100 * block_s + 10e-6)
    assert step(stored=100, copies=1, aside=100) - plain == pytest.approx(10e-6)
    host_s = price(Load(rows=8, samples=8, works=8, prompt_pairs=zero, prompt_entries=zero, decode_entries=zero)).host
    assert step(stored=1000, copies=1, aside=1000) == pytest.approx(
        1000 * block_s + host_s
    )  # nothing hides behind the host


# ---------------------------------------------------------------------------------------------- live


def asked() -> list[RequestSpec]:
    """Prompts of 40 to 140 tokens, by turns greedy and drawn, with answers of 3 to 40 tokens."""
    return [
        spec(i, doc[: 40 + 20 * i], seed=i, max_tokens=(40, 30, 3, 20, 4, 9)[i], temperature=0.8 if i % 2 else 0.0)
        for i, doc in enumerate(documents())
    ]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("blocks", [14, 40])
def test_the_same_tokens_as_fcfs_live(
    runtime: Runtime, threads: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, real = [0], TierStore.begin

    def begin(self: TierStore, op: KVOp) -> None:
        begun[0] += 1
        real(self, op)

    monkeypatch.setattr(TierStore, "begin", begin)
    plain = Bench(runtime, blocks=200).run(asked())
    assert len(plain) == 6
    below = f"kv.offload=host(memory='32MiB', threads={threads})"
    bench = Bench(runtime, techniques=["schedule=fastswitch(quantum=3)", below], blocks=blocks, max_num_seqs=3)
    assert bench.run(asked()) == plain
    stats = bench.engine.stats
    assert stats.finished == 6
    assert stats.preemptions > 0
    assert next(n for k, n in stats.acts.items() if k.endswith("yielded")) > 0
    assert next(n for k, n in stats.acts.items() if k.endswith("blocks_saved")) > 0
    assert (begun[0] > 0) == (threads > 0)


def test_what_cannot_be_stored_beside_a_step_is_told_and_computed_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Memory, slot: int, record: bytes) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Memory, "write", full)
    below = "kv.offload=host(memory='32MiB', threads=2)"
    bench = Bench(runtime, techniques=["schedule=fastswitch(quantum=3)", below], blocks=40, max_num_seqs=3)
    assert bench.run(asked()) == Bench(runtime, blocks=200).run(asked())
    assert bench.engine.stats.preemptions > 0
    assert len(bench.engine.kv.tiers) == 0  # type: ignore[arg-type]


def test_without_storing_what_yields_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instruction is the switch's own, and not what the pool does for blocks that it gives up."""
    monkeypatch.setattr(Membership, "switches", False, raising=False)
    found = steps(["schedule=fcfs", HOST], ASKS)
    assert not any(moved for _, moved in found)
