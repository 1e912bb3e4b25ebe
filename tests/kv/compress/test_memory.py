"""Blocks really become free: memory follows the budget, and what others share stays whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import msgspec
import pytest

from tests.core.world import tokens_of
from tests.exec.conftest import Bench, spec
from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.core.noise import child_seed
from weft.exec.build import Runtime
from weft.exec.null import NullExecutor, reference
from weft.types import GroupKind, GroupSpec, RequestSpec, Tokens

MEMBERS = {
    "streaming_llm": "kv.compress=streaming_llm(sinks=4,window=44,every=16)",
    "h2o": "kv.compress=h2o(heavy=24,recent=24,every=16,observe=32)",
    "recent": "kv.compress=recent(window=48,every=16)",
    "random": "kv.compress=random(chosen=24,recent=24,every=16)",
}
BLOCK = 16


def long_prompt(ids: Sequence[int], length: int) -> list[int]:
    """The story again and again, each time from another word on."""
    out: list[int] = []
    start = 0
    while len(out) < length:
        out += islice(ids, start, None)
        start += 7
    return out[:length]


@pytest.mark.parametrize("member", MEMBERS)
def test_blocks_follow_the_budget(runtime: Runtime, ids: list[int], member: str) -> None:
    """64 entries at most are 4 blocks, through a prompt of 90 and 150 tokens of output; without compression it is 15."""
    seen: list[int] = []
    bench = Bench(runtime, techniques=[MEMBERS[member]])
    bench.run([spec(1, ids[:90], temperature=0.0, max_tokens=150)], lambda b: seen.append(b.engine.pool.referenced))
    assert max(seen) == 4
    assert 3 in seen
    full: list[int] = []
    law = {"temperature": 0.0, "max_tokens": 150}
    Bench(runtime).run([spec(1, ids[:90], **law)], lambda b: full.append(b.engine.pool.referenced))
    assert max(full) == 15


@pytest.mark.parametrize("member", ["streaming_llm", "h2o"])
def test_a_prompt_of_3000_tokens_in_a_pool_of_600_entries(runtime: Runtime, ids: list[int], member: str) -> None:
    """Cuts within the prompt keep memory bounded while it is computed; without them it is refused."""
    text = {
        "streaming_llm": "kv.compress=streaming_llm(sinks=4,window=444,every=128)",
        "h2o": "kv.compress=h2o(heavy=224,recent=224,every=128,observe=64)",
    }[member]
    one = spec(1, long_prompt(ids, 3000), temperature=0.0, max_tokens=8)
    bench = Bench(runtime, techniques=[text], blocks=600 // BLOCK)
    assert len(bench.run([one])[1, 0]) == 8
    (rejected,) = Bench(runtime, blocks=600 // BLOCK).engine.add(one, 0.0)
    assert "the pool has 37" in rejected.message  # type: ignore[union-attr]


@pytest.mark.parametrize("member", ["streaming_llm", "h2o"])
def test_a_shared_prefix_stays_whole(runtime: Runtime, ids: list[int], member: str) -> None:
    """Two requests share 600 tokens.  One compresses them while the other still reads them, and they are hit again afterwards."""
    text = {
        "streaming_llm": "kv.compress=streaming_llm(sinks=4,window=600,every=64)",
        "h2o": "kv.compress=h2o(heavy=300,recent=300,every=64,observe=48)",
    }[member]
    prefix = long_prompt(ids, 600)
    law = {"temperature": 0.0, "max_tokens": 90}

    def request(id: int, tail: Sequence[int], *techniques: str) -> RequestSpec:
        one = spec(id, [*prefix, *tail], **law)
        return msgspec.structs.replace(one, techniques=techniques)

    plain, squeezed = request(1, ids[5:25]), request(2, ids[30:50], text)
    wanted = Bench(runtime, share=False).run([plain])[1, 0]
    alone = Bench(runtime, share=False).run([squeezed])[2, 0]
    bench = Bench(runtime)
    bench.run([spec(9, prefix, temperature=0.0, max_tokens=1)])
    before = bench.engine.stats.prefix_hit_tokens
    shared: list[int] = []
    out = bench.run([plain, squeezed], lambda b: shared.append(sum(refs > 1 for refs in b.engine.pool.refs)))
    assert shared[0] > 30, "both hold the prefix"
    assert shared[-10] == 0, "the one that compresses has what it keeps for itself"
    assert out[1, 0] == wanted
    assert out[2, 0] == alone
    assert bench.engine.stats.acts[f"kv.compress={member}.cuts"] >= 1
    hits = bench.engine.stats.prefix_hit_tokens
    assert hits - before >= 592 + 560
    third = bench.run([msgspec.structs.replace(plain, id=3)])[3, 0]
    assert third == wanted
    assert bench.engine.stats.prefix_hit_tokens - hits >= 592


def test_a_pool_too_small_for_the_budget_is_said_at_once(runtime: Runtime, ids: list[int]) -> None:
    bench = Bench(runtime, techniques=[MEMBERS["h2o"]], blocks=3)
    (event,) = bench.engine.add(spec(1, ids[:90], max_tokens=50), 0.0)
    assert "4 KV blocks, but the pool has 3" in event.message  # type: ignore[union-attr]


@pytest.mark.parametrize("member", MEMBERS)
def test_without_a_model_memory_follows_the_budget_too(member: str) -> None:
    """The deciding half alone: the null executor keeps what cuts and budget allow, and every token is the right one."""
    group = GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=BLOCK)
    engine = Engine([group], 9, Limits(max_model_len=1000, max_rows=64), build_stack([MEMBERS[member]]), vocab=32)
    executor = NullExecutor([group], vocab=32, stacks=engine.stacks)
    specs = [spec(i, [(7 * i + j) % 32 for j in range(40 + 90 * i)], seed=i, max_tokens=100) for i in range(3)]
    for one in specs:
        assert engine.add(one, 0.0) == []
    out: dict[int, list[int]] = {}
    while engine.has_work:
        plan, _ = engine.schedule(0.0)
        for event in engine.commit(0.0, plan, executor.execute(plan)):
            if isinstance(event, Tokens):
                out.setdefault(event.id, []).extend(event.tokens)
        engine.check()
        assert all(len(r.tables[0].blocks) <= 4 for r in engine.requests())
    for one in specs:
        assert out[one.id] == reference(tokens_of(one.items), one.sampling, child_seed(one.seed, 0), 32)
