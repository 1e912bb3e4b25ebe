"""Tiers below the pool on the bundled model: the same bytes and the same tokens, whatever is moved, lost, damaged or full."""

from __future__ import annotations

import logging
import os
import random
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft.config import build_stack
from weft.errors import ConfigError
from weft.exec.build import Runtime, build, prepare
from weft.exec.thread import EngineThread
from weft.exec.tiers import Buffer, File, TierStore
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.llm import LLM
from weft.sampling import SamplingParams
from weft.traits import Fidelity, Trait
from weft.types import KVOpKind, RequestSpec

BLOCKS = 14
"""One document's blocks and a few more: six documents never fit."""
BOTH = ["kv.offload=host(memory='32MiB')", "kv.offload=file(disk='32MiB', memory='1MiB')"]
Tokens_ = dict[tuple[int, int], list[int]]


def documents() -> list[list[int]]:
    """Six texts of 9 whole blocks; each begins at another place of the story."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    ids = [*ids, *reversed(ids)]
    return [ids[20 * i : 20 * i + 9 * 16] for i in range(6)]


def rounds(turn: int) -> list[RequestSpec]:
    return [
        spec(100 * turn + i, doc, seed=i, max_tokens=8, temperature=0.8 if i % 2 else 0.0)
        for i, doc in enumerate(documents())
    ]


def in_turns(bench: Bench, specs: list[RequestSpec]) -> list[list[int]]:
    """One after the other, so that each document pushes out the ones before."""
    for one in specs:
        out = bench.run([one])
    return [out[s.id, 0] for s in specs]


@pytest.fixture(scope="module")
def plain(runtime: Runtime) -> list[list[int]]:
    bench = Bench(runtime, blocks=BLOCKS)
    first = in_turns(bench, rounds(0))
    assert in_turns(bench, rounds(1)) == first
    assert bench.engine.stats.prefix_hit_tokens == 0, "the pool alone is too small for the second round"
    return first


def bench_of(runtime: Runtime, technique: str, *more: str, blocks: int = BLOCKS, **limits: Any) -> Bench:
    return Bench(runtime, techniques=[technique, *more], blocks=blocks, **limits)


def acts(bench: Bench) -> dict[str, int]:
    return {key.split(".")[-1]: count for key, count in bench.engine.stats.acts.items() if "kv.offload" in key}


def store(bench: Bench) -> TierStore:
    assert bench.executor.tiers is not None
    return bench.executor.tiers


# ---------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("technique", BOTH)
def test_the_second_round_comes_from_the_tier(runtime: Runtime, plain: list[list[int]], technique: str) -> None:
    bench = bench_of(runtime, technique)
    assert in_turns(bench, rounds(0)) == plain
    hits = bench.engine.stats.prefix_hit_tokens
    assert in_turns(bench, rounds(1)) == plain
    # Of each document, all whole blocks but the one that ends with its last token; the last was still in the pool.
    assert bench.engine.stats.prefix_hit_tokens - hits == 6 * 8 * 16
    seen = acts(bench)
    assert seen["blocks_loaded"] >= 5 * 8
    assert seen["bytes_moved"] == (seen["blocks_saved"] + seen["blocks_loaded"]) * store(bench).size
    assert not {"saves_failed", "loads_failed"} & seen.keys()


@pytest.mark.parametrize(("technique", "form"), [(BOTH[0], ("kv.store=int8",)), (BOTH[1], ())], ids=["int8", "plain"])
def test_the_bytes_are_the_same(runtime: Runtime, technique: str, form: tuple[str, ...]) -> None:
    """Every cached block that was loaded is, to the bit, what a pool that never gave anything up holds under its name."""
    wide = Bench(runtime, techniques=list(form))
    if not form:
        # Two engines over one memory would write into each other's blocks.
        wide.executor.pool.arena.zero_()
    in_turns(wide, rounds(0))
    kept = {key: wide.executor.pool.arena[block].clone() for key, block in wide.engine.pool.index.items()}
    where = {key: wide.executor.pool.positions(0)[block].clone() for key, block in wide.engine.pool.index.items()}
    bench = bench_of(runtime, technique, *form)
    in_turns(bench, rounds(0))
    loaded = acts(bench)["blocks_loaded"]
    for one in rounds(1):
        bench.run([one])
        for key, block in bench.engine.pool.index.items():
            if key in kept:
                assert torch.equal(bench.executor.pool.arena[block], kept[key])
                assert torch.equal(bench.executor.pool.positions(0)[block], where[key])
    assert acts(bench)["blocks_loaded"] - loaded >= 5 * 8


def test_it_is_exact_and_the_server_s() -> None:
    for technique in BOTH:
        stack = build_stack([technique])
        assert stack.verdict.fidelity is Fidelity.EXACT
        assert stack.settings == build_stack([]).settings, "cached prefixes are the same with and without"
        assert Trait.HOST_TIER in stack["kv.offload"].traits.gives
        assert not stack["kv.offload"].per_request


@pytest.mark.parametrize("technique", BOTH)
def test_a_storm_of_preemptions(runtime: Runtime, technique: str) -> None:
    rng = random.Random(7)
    texts = [doc[: rng.choice((20, 50, 90))] for doc in documents() * 2]
    specs = [spec(i, text, seed=i, n=1 + i % 2, max_tokens=12) for i, text in enumerate(texts)]
    wanted = Bench(runtime).run(specs)

    def disturb(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        if bench.steps % 3 == 0 and bench.steps < 90 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)
        bench.engine.check()

    bench = bench_of(runtime, technique, blocks=16, max_rows=64)
    assert bench.run(specs, disturb) == wanted
    assert bench.engine.stats.preemptions > 10
    assert acts(bench)["blocks_loaded"] > 10


def test_blocks_that_were_never_hit_may_be_dropped(runtime: Runtime, plain: list[list[int]]) -> None:
    bench = bench_of(runtime, "kv.offload=host(memory='32MiB', hits=1)")
    assert in_turns(bench, rounds(0)) == plain
    assert acts(bench)["blocks_saved"] == 0
    for turn in (1, 2):
        in_turns(bench, [replace_id(rounds(0)[0], 10 * turn)])  # the second of them hits the first
    in_turns(bench, rounds(3)[1:])
    assert 0 < acts(bench)["blocks_saved"] <= 9


def replace_id(one: RequestSpec, id: int) -> RequestSpec:
    return RequestSpec(id=id, items=one.items, sampling=one.sampling, seed=one.seed)


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_a_damaged_record_is_computed_again(
    runtime: Runtime, plain: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    bench = bench_of(runtime, "kv.offload=file(disk='32MiB', memory='1')")
    in_turns(bench, rounds(0))
    file = store(bench).places[0]
    assert isinstance(file, File)
    bench.engine.add(rounds(1)[0], 0.0)
    tickets = bench.engine.kv.stored(bench.engine.find(100))
    assert len(tickets) == 8
    at = store(bench)._where(tickets[3])[1] * store(bench).size + 5000
    byte = os.pread(file._file.fileno(), 1, at)
    os.pwrite(file._file.fileno(), bytes([byte[0] ^ 4]), at)
    with caplog.at_level(logging.WARNING, "weft.tiers"):
        out = bench.run([])
    assert out[100, 0] == plain[0]
    assert acts(bench)["loads_failed"] == 1
    assert "checksum" in caplog.text
    assert in_turns(bench, rounds(2)) == plain
    assert acts(bench)["loads_failed"] == 1, "what was damaged was forgotten, and computed and saved anew"


def test_a_record_of_another_life_is_not_believed(runtime: Runtime, plain: list[list[int]]) -> None:
    """Two whole records change places: their sums are right, and their tickets are not."""
    bench = bench_of(runtime, "kv.offload=host(memory='32MiB')")
    in_turns(bench, rounds(0))
    bench.engine.add(rounds(1)[0], 0.0)
    a, b = (store(bench)._where(t)[1] for t in bench.engine.kv.stored(bench.engine.find(100))[2:4])
    memory = store(bench).places[0]
    one, other = memory.read(a), memory.read(b)
    memory.write(a, other)
    memory.write(b, one)
    plan, _ = bench.engine.schedule(0.0)
    result = bench.executor.execute(plan)
    assert len(result.lost) == 2
    assert [fact.rows for fact in result.works] == [0], "nothing is computed over what was not loaded"
    bench.engine.commit(0.0, plan, result)
    assert bench.run([])[100, 0] == plain[0]
    assert acts(bench)["loads_failed"] == 2


def test_a_file_that_cannot_be_read(runtime: Runtime, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(runtime, "kv.offload=file(disk='32MiB', memory='1')")
    in_turns(bench, rounds(0))

    def broken(self: File, slot: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(File, "read", broken)
    assert in_turns(bench, rounds(1)) == plain
    assert acts(bench)["loads_failed"] >= 40


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file grows beyond 12 records: what a full disk says, this says too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 * 131240, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(
    runtime: Runtime, plain: list[list[int]], small_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    bench = bench_of(runtime, "kv.offload=file(disk='32MiB', memory='1')")
    assert in_turns(bench, rounds(0)) == plain
    assert in_turns(bench, rounds(1)) == plain
    seen = acts(bench)
    assert seen["saves_failed"] > 0
    assert seen["blocks_saved"] >= 12
    assert seen["blocks_loaded"] > 0
    assert "loads_failed" not in seen, "nobody asks for what was not saved"
    assert "could not be saved" in caplog.text


@pytest.mark.parametrize("technique", ["kv.offload=host(memory='1MiB')", "kv.offload=file(disk='1MiB', memory='300K')"])
def test_a_tier_of_seven_records(runtime: Runtime, plain: list[list[int]], technique: str) -> None:
    bench = bench_of(runtime, technique)
    assert store(bench).total == 7
    assert [in_turns(bench, rounds(turn)) for turn in range(2)] == [plain, plain]
    assert acts(bench)["blocks_saved"] > 7
    assert len(bench.engine.kv.tiers or ()) == 7


@pytest.mark.parametrize("when", ["before", "after"])
def test_cancelled_while_its_blocks_are_loaded(runtime: Runtime, plain: list[list[int]], when: str) -> None:
    bench = bench_of(runtime, BOTH[0])
    in_turns(bench, rounds(0))
    bench.engine.add(rounds(1)[0], 0.0)
    plan, _ = bench.engine.schedule(0.0)
    assert any(op.kind is KVOpKind.LOAD for op in plan.kv)
    if when == "before":
        bench.engine.cancel(100)
    result = bench.executor.execute(plan)
    if when == "after":
        bench.engine.cancel(100)
    bench.engine.commit(0.0, plan, result)
    bench.engine.check()
    assert in_turns(bench, rounds(2)) == plain


@pytest.mark.parametrize(("kind", "at"), [(KVOpKind.SAVE, 0), (KVOpKind.SAVE, 3), (KVOpKind.LOAD, 0)])
def test_broken_off_in_the_middle_of_moving(
    runtime: Runtime, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch, kind: KVOpKind, at: int
) -> None:
    bench, calls = bench_of(runtime, BOTH[0]), 0
    in_turns(bench, rounds(0))
    move = TierStore.carry_out

    def interrupted(self: TierStore, op: Any) -> Any:
        nonlocal calls
        calls += op.kind is kind
        if calls == at + 1:
            calls += 1
            raise KeyboardInterrupt
        return move(self, op)

    monkeypatch.setattr(TierStore, "carry_out", interrupted)
    bench.engine.add(rounds(1)[0], 0.0)
    with pytest.raises(KeyboardInterrupt):
        bench.run([])
    bench.engine.check()
    assert bench.run([])[100, 0][-8:] == plain[0]
    assert in_turns(bench, rounds(2)) == plain


# ---------------------------------------------------------------------------------------------- fetching ahead


def test_who_waits_is_fetched_for(runtime: Runtime) -> None:
    """Two documents are asked for at once and the pool holds one: the second one's blocks come into the buffer meanwhile."""
    bench = bench_of(runtime, "kv.offload=file(disk='32MiB', memory='1500K', lookahead=2)")
    in_turns(bench, rounds(0))
    wanted = bench.run([])
    asked = rounds(1)[:2]
    buffer = store(bench)._buffers[0]
    assert buffer is not None

    def patience(bench: Bench) -> None:
        """Give the thread its time: a step of this model is shorter than a read may be."""
        buffer.idle(10.0)

    out = bench.run(asked, patience)
    assert [out[100 + i, 0] for i in range(2)] == [wanted[i, 0] for i in range(2)]
    assert acts(bench)["prefetched"] >= 8


def test_a_buffer_keeps_what_is_wanted_first(tmp_path: Path) -> None:
    file, buffer = File(10, 16, str(tmp_path)), Buffer(3)
    for slot in range(6):
        file.write(slot, (100 + slot).to_bytes(8, "little") + bytes([slot]) * 8)
    file.write(6, (7).to_bytes(8, "little") + b"stranger")
    from threading import Thread

    thread = Thread(target=buffer.fill, args=(file,))
    thread.start()
    buffer.want([(106, 6), (100, 0), (101, 1), (102, 2)])
    assert buffer.idle(10.0)
    assert buffer.news() == 2
    assert buffer.news() == 0
    assert buffer.take(106) is None, "the record there bears another ticket"
    assert buffer.take(100) == (100).to_bytes(8, "little") + bytes(8)
    assert buffer.take(100) is None
    buffer.put(1, b"a")
    buffer.put(2, b"b")
    buffer.put(3, b"c")
    assert buffer.take(101) is None, "three at most, the oldest goes"
    buffer.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    file.close()


# ---------------------------------------------------------------------------------------------- files, memory, arguments


def test_the_file_has_no_name_and_is_nobody_else_s(runtime: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    bench = bench_of(runtime, f"kv.offload=file(folder={str(folder)!r}, disk='8MiB', memory='1MiB')")
    in_turns(bench, rounds(0))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []
    file = store(bench).places[0]
    assert isinstance(file, File)
    about = os.fstat(file._file.fileno())
    assert about.st_mode & 0o777 == 0o600
    assert about.st_nlink == 0
    assert 0 < about.st_size <= 8 << 20
    bench.executor.close()
    bench.executor.close()
    assert file._file.closed


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("memory='much'", "memory.*not a size"),
        ("memory='0'", "memory.*out of range"),
        ("memory='1 GiB more'", "not a size"),
        ("memory=5", "str"),
        ("hits=-1", "hits must be at least 0"),
        ("disk='1G', nothing=1", "no argument"),
    ],
)
def test_arguments_are_checked(argument: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_stack([f"kv.offload=file({argument})"])
    if "disk" not in argument:
        with pytest.raises(ConfigError, match=says):
            build_stack([f"kv.offload=host({argument})"])


def test_a_folder_that_is_none(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name a folder"):
        bench_of(runtime, f"kv.offload=file(folder={str(tmp_path / 'file')!r})")


def test_a_tier_too_small_for_a_block_is_refused_before_anything_is_built(runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match="hold no block"):
        prepare(replace(runtime.setup.config, techniques=["kv.offload=host(memory='100K')"]))


@pytest.mark.parametrize(("technique", "memory"), [(BOTH[0], 32 << 20), (BOTH[1], 1 << 20)])
def test_memory_below_the_pool_is_planned(runtime: Runtime, technique: str, memory: int) -> None:
    base = replace(runtime.setup.config, memory_bytes=600 << 20, max_model_len=4096)
    with_, without = prepare(replace(base, techniques=[technique])).plan, prepare(base).plan
    assert with_.tiers_bytes == memory
    assert without.tiers_bytes == 0
    assert with_.total_bytes <= 600 << 20
    assert without.kv_bytes - with_.kv_bytes == pytest.approx(memory, abs=with_.block_bytes + 64)
    assert "tiers below the pool" in prepare(replace(base, techniques=[technique], memory_bytes=450 << 20)).plan.reason


def test_a_thread_and_a_file_end_with_the_engine(runtime: Runtime) -> None:
    setup = prepare(replace(runtime.setup.config, techniques=[BOTH[1]], memory_bytes=700 << 20))
    built = build(setup, like=runtime)
    assert built.executor.tiers is not None
    place = built.executor.tiers.places[0]
    port = EngineThread(built.engine, built.executor, None)
    port.close()
    assert isinstance(place, File)
    assert place._file.closed
    with LLM(techniques=[BOTH[1]], memory="700M", max_model_len=512) as llm:
        assert llm.generate(["The sea was"], SamplingParams(max_tokens=2, temperature=0.0))[0].outputs[0].token_ids
        tiers = llm.runtime.executor.tiers
    assert tiers is not None
    assert tiers.places[0]._file.closed  # type: ignore[attr-defined]


def test_two_plans_in_flight(runtime: Runtime, plain: list[list[int]]) -> None:
    """Blocks are loaded and saved while an earlier plan has not committed."""
    bench = bench_of(runtime, BOTH[0], blocks=24)
    bench.engine.most_in_flight = 2
    out: dict[int, list[int]] = {}
    for turn in range(2):
        for one in rounds(turn):
            bench.engine.add(one, 0.0)
        flights: list[Any] = []
        while bench.engine.has_work or flights:
            if bench.engine.has_work and len(flights) < 2:
                flights.append(bench.engine.schedule(0.0)[0])
                continue
            plan = flights.pop(0)
            for event in bench.engine.commit(0.0, plan, bench.executor.execute(plan)):
                out.setdefault(event.id, []).extend(getattr(event, "tokens", ()))
            bench.engine.check()
    assert [out[i] for i in range(6)] == plain
    assert [out[100 + i] for i in range(6)] == plain
    assert acts(bench)["blocks_loaded"] > 0
