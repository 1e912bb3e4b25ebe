"""Parity: what the engine decided while it served is what it decides again when it is told the same."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from typer.testing import CliRunner

from tests.cli.running import Serving
from weft.cli.app import app
from weft.config import Limits, Stacks, build_stack
from weft.core.engine import Engine
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, prepare
from weft.exec.null import NullExecutor
from weft.exec.record import Record, tap
from weft.exec.thread import EngineThread
from weft.hub import resolve
from weft.sim.executor import facts
from weft.sim.replay import Entries, replay
from weft.types import (
    Add,
    Added,
    Cancel,
    Committed,
    EngineFrame,
    Entry,
    Finished,
    GroupKind,
    GroupSpec,
    Made,
    Planned,
    RequestSpec,
    SamplingSpec,
    TokenItem,
)  # fmt: skip
from weft.types.record import FORMAT

GROUPS = (GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=4),)
COUNTS = ("preemptions", "evictions", "hits", "chunks", "cancellations")


def recorded(path: Path, parts: tuple[str, ...] = ()) -> None:
    """A crowd in a small pool, served by the engine's thread: some are cancelled, some are refused."""
    stacks = Stacks(build_stack(parts))
    engine = Engine(GROUPS, 40, Limits(max_model_len=120, max_num_seqs=8, max_rows=16, max_samples=8), stacks, vocab=64)
    record = tap(engine, path)
    port = EngineThread(engine, NullExecutor(GROUPS, vocab=64, stacks=stacks), SimpleNamespace())
    left, done = set(range(24)), threading.Event()

    def sink(frame: EngineFrame) -> None:
        left.difference_update(e.id for e in frame.events if isinstance(e, Finished))
        if not left:
            done.set()

    port.subscribe(sink)
    for i in range(24):
        head = tuple(range(12 * (i % 3), 12 * (i % 3) + 12))
        sampling = SamplingSpec(max_tokens=60 if i % 2 else 8, temperature=1.0, logprobs=1 if i % 5 == 0 else -1)
        port.send(Add(RequestSpec(id=i, items=(TokenItem((*head, i % 7, i)),), sampling=sampling, seed=i)))
    port.send(Add(RequestSpec(id=99, items=(TokenItem((1,) * 200),))))
    left.difference_update((3, 17))
    port.send(Cancel(3))
    port.send(Cancel(17))
    assert done.wait(60)
    port.close()
    record.close()


def rewritten(source: Path, target: Path, change: Callable[[int, Entry], Entry | None]) -> Path:
    """The record with its entries changed, or left out where `change` gives None."""
    record = Record(target)
    for number, entry in Entries(source):
        if (changed := change(number, entry)) is not None:
            record(changed)
    record.close()
    return target


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "engine.record"
    recorded(path)
    return path


def test_the_same_decisions_are_made_again(record: Path) -> None:
    found = replay(record)
    assert found.difference is None
    assert all(getattr(found, name) > 0 for name in COUNTS), found
    assert found.refusals == 1
    assert record.stat().st_mode & 0o777 == 0o600
    done = CliRunner().invoke(app, ["sim", "--replay", str(record), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["identical"] is True


def test_other_stacks_are_made_again_too(tmp_path: Path) -> None:
    recorded(tmp_path / "r", ("schedule=prefill_first", "kv.compress=streaming_llm(sinks=2, window=14)"))
    assert replay(tmp_path / "r").difference is None


def planned(record: Path, wanted: Callable[[Planned], bool]) -> int:
    return next(n for n, e in Entries(record) if isinstance(e, Planned) and wanted(e))


def tampered(entry: Entry, kind: str) -> Entry | None:
    """One entry, changed a little."""
    replace = msgspec.structs.replace
    if isinstance(entry, Planned):
        plan = entry.plan
        if kind == "block":
            grant = plan.grants[0]
            changed = replace(grant, blocks=(*grant.blocks[:-1], grant.blocks[-1] + 1))
            return replace(entry, plan=replace(plan, grants=(changed, *plan.grants[1:])))
        if kind == "order":
            return replace(entry, plan=replace(plan, works=plan.works[::-1]))
        if kind == "preempted":
            return replace(entry, preempted=())
    if isinstance(entry, Committed) and kind == "token":
        work = entry.result.works[0]
        changed_work = replace(work, tokens=(work.tokens[0] + 1,))
        return replace(entry, result=replace(entry.result, works=(changed_work, *entry.result.works[1:])))
    return None


@pytest.mark.parametrize(
    ("kind", "says"),
    [("block", "grants"), ("order", "works"), ("preempted", "preempted"), ("token", "tokens"), ("left out", "")],
)
def test_one_changed_entry_is_found(record: Path, tmp_path: Path, kind: str, says: str) -> None:
    if kind == "token":  # of one who goes on: what was drawn is then an input of the next step
        at = next(
            n for n, e in Entries(record)
            if n > 40 and isinstance(e, Committed) and e.result.works and e.result.works[0].tokens
        )  # fmt: skip
    else:
        wanted: dict[str, Callable[[Planned], bool]] = {
            "block": lambda e: bool(e.plan.grants) and e.plan.step > 5,
            "order": lambda e: len(e.plan.works) > 1,
            "preempted": lambda e: bool(e.preempted),
            "left out": lambda e: e.plan.step > 5,
        }
        at = planned(record, wanted[kind])
    other = rewritten(record, tmp_path / "r", lambda n, e: tampered(e, kind) if n == at else e)
    found = replay(other)
    assert found.difference is not None
    assert says in found.difference
    done = CliRunner().invoke(app, ["sim", "--replay", str(other)])
    assert done.exit_code == 1
    assert found.difference[:40] in done.stdout.replace("\n", "")


@pytest.mark.parametrize("change", ["policy", "blocks", "limits"])
def test_an_engine_made_otherwise_decides_otherwise(record: Path, tmp_path: Path, change: str) -> None:
    def other(number: int, entry: Entry) -> Entry:
        if not isinstance(entry, Made):
            return entry
        if change == "policy":
            return msgspec.structs.replace(entry, parts=("schedule=prefill_first",))
        if change == "blocks":
            return msgspec.structs.replace(entry, blocks=entry.blocks + 1)
        return msgspec.structs.replace(entry, limits={**entry.limits, "max_rows": 15})

    assert replay(rewritten(record, tmp_path / "r", other)).difference is not None


def places(record: Path) -> list[int]:
    """Where each entry begins, and where the file ends."""
    data, found = record.read_bytes(), [0]
    while found[-1] < len(data):
        found.append(found[-1] + 8 + int.from_bytes(data[found[-1] : found[-1] + 4], "little"))
    return found


def short(path: Path) -> bytes:
    """The record of two requests, of which one is cancelled when it has ended: nothing hangs on that, and it is an entry."""
    engine = Engine(GROUPS, 20, Limits(max_model_len=60, max_num_seqs=4, max_rows=8, max_samples=4), vocab=64)
    record, now = tap(engine, path), 0.25
    for i in range(2):
        engine.add(RequestSpec(id=i, items=(TokenItem(tuple(range(9))),), sampling=SamplingSpec(max_tokens=2)), now)
    while engine.has_work:
        plan, _ = engine.schedule(now)
        now += 0.25
        engine.commit(now, plan, facts(plan))
    engine.cancel(0)
    record.close()
    return path.read_bytes()


def identical(path: Path, data: bytes | bytearray) -> bool:
    """Whether `weft sim --replay` would end with 0."""
    path.write_bytes(data)
    try:
        return bool(replay(path).as_dict()["identical"])
    except ConfigError:
        return False


def test_no_byte_of_a_record_may_be_another_one(tmp_path: Path) -> None:
    """Also of what no decision hangs on: seeds, log-probabilities, times between which nothing is decided."""
    data, path = short(tmp_path / "short"), tmp_path / "r"
    assert identical(path, data)
    for at in range(len(data)):
        for flipped in (1 << at % 8, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flipped
            assert not identical(path, changed), f"byte {at} of {len(data)}, changed by {flipped:#x}"
    changed[len(data) // 2] ^= 4
    path.write_bytes(changed)
    done = CliRunner().invoke(app, ["sim", "--replay", str(path)])
    assert done.exit_code == 2
    assert "is not what was written: its checksum is another one" in done.output.replace("\n", " ")


def test_no_entry_of_a_record_may_be_lost_moved_or_there_twice(tmp_path: Path) -> None:
    data, path = short(tmp_path / "short"), tmp_path / "r"
    at = places(path.with_name("short"))
    each = [data[a:b] for a, b in pairwise(at)]
    assert len(each) > 8
    for i, entry in enumerate(each):
        assert not identical(path, b"".join(each[:i] + each[i + 1 :])), f"entry {i + 1} is gone"
        assert not identical(path, b"".join([*each[:i], entry, *each[i:]])), f"entry {i + 1} is there twice"
        if i:
            assert not identical(path, b"".join([*each[: i - 1], entry, each[i - 1], *each[i + 1 :]])), (
                f"{i} and {i + 1}"
            )


def test_a_record_without_checksums_is_refused_by_its_format(tmp_path: Path) -> None:
    """As format 2 had it: each entry after its length, and nothing behind it."""
    short(tmp_path / "short")
    whole = [msgspec.msgpack.encode(e) for _, e in Entries(tmp_path / "short")]
    whole[0] = msgspec.msgpack.encode(msgspec.structs.replace(msgspec.msgpack.decode(whole[0], type=Made), format=2))
    (tmp_path / "r").write_bytes(b"".join(len(e).to_bytes(4, "little") + e for e in whole))
    with pytest.raises(ConfigError, match=f"has format 2, and this weft reads {FORMAT}"):
        replay(tmp_path / "r")


@pytest.mark.parametrize("kept", ["all but the end", "half an entry", "three bytes", "between two entries"])
def test_a_record_that_is_cut_says_where_and_what_was_compared(record: Path, tmp_path: Path, kept: str) -> None:
    """However it was cut, in the middle of an entry or between two, it is not said to be identical."""
    data, at, cut = record.read_bytes(), places(record), tmp_path / "r"
    middle = next(n for n in range(len(at) // 2, len(at)) if at[n + 1] - at[n] > 40)  # it begins entry middle + 1
    length = {
        "all but the end": at[-2], "half an entry": (at[middle] + at[middle + 1]) // 2, "three bytes": at[middle] + 3,
        "between two entries": at[middle],
    }[kept]  # fmt: skip
    cut.write_bytes(data[:length])
    whole, found = replay(record), replay(cut)
    assert (whole.cut, whole.as_dict()["identical"]) == (None, True)
    assert found.difference is None
    assert found.as_dict()["identical"] is False
    steps = sum(isinstance(e, Planned) for _, e in Entries(record)) if kept == "all but the end" else None
    assert found.steps < whole.steps if steps is None else found.steps == steps == whole.steps
    inside = kept in ("half an entry", "three bytes")
    begun = at[-2] if kept == "all but the end" else at[middle]
    last = len(at) - 2 if kept == "all but the end" else middle
    said = f"entry {last + 1}, which begins at byte {begun:,}" if inside else f"behind entry {last}, at byte {begun:,}"
    assert found.cut is not None
    assert said in found.cut
    done = CliRunner().invoke(app, ["sim", "--replay", str(cut)])
    assert done.exit_code == 3
    assert "the record is cut" in done.stdout
    assert said in done.stdout
    assert f"the {found.steps:,} steps before that are the recorded ones" in done.stdout
    told = json.loads(CliRunner().invoke(app, ["sim", "--replay", str(cut), "--json"]).stdout)
    assert (told["identical"], told["cut"]) == (False, found.cut)


def test_a_difference_before_the_cut_is_told_first(record: Path, tmp_path: Path) -> None:
    at = planned(record, lambda e: bool(e.plan.grants) and e.plan.step > 5)
    other = rewritten(record, tmp_path / "r", lambda n, e: tampered(e, "block") if n == at else e)
    other.write_bytes(other.read_bytes()[:-3])
    assert CliRunner().invoke(app, ["sim", "--replay", str(other)]).exit_code == 1


def test_nothing_comes_behind_the_end(record: Path, tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(record.read_bytes() + b"\x00")
    with pytest.raises(ConfigError, match="behind entry"):
        replay(tmp_path / "r")


def test_an_engine_goes_on_without_its_record_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system takes 20,000 bytes, the last of them a part of what it was given, and then nothing more."""
    room, real = [20_000], os.write

    def full(file: int, data: bytes | bytearray) -> int:
        if len(data) < 16 or file < 3:
            return real(file, data)
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(file, bytes(data[: room[0]]))
        room[0] -= taken
        return taken

    monkeypatch.setattr("weft.exec.record.os.write", full)
    recorded(tmp_path / "r")
    assert (tmp_path / "r").stat().st_size == 20_000
    assert "No space left" in caplog.text
    found = replay(tmp_path / "r")
    assert found.difference is None
    assert found.cut is not None
    assert found.steps > 3


def test_a_server_that_is_killed_leaves_a_record_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "killed.record"
    with Serving(tmp_path, "--port", "0", "--threads", "1", "--max-model-len", "512", "--record", str(file)) as server:
        url = server.url()
        clients = [threading.Thread(target=quietly, args=(url, f"{i} The sea was calm.", 400)) for i in range(3)]
        for thread in clients:
            thread.start()
        until = time.monotonic() + 60
        while file.stat().st_size < 30_000:
            assert time.monotonic() < until
            time.sleep(0.02)
        server.process.kill()
        server.process.wait(30)
        for thread in clients:
            thread.join(30)
    done = CliRunner().invoke(app, ["sim", "--replay", str(file)])
    assert done.exit_code == 3, done.stdout
    assert replay(file).steps > 10


def quietly(url: str, prompt: str, tokens: int) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        ask(url, prompt, tokens)


def test_a_damaged_record_is_refused_or_told_and_nothing_else_happens(record: Path, tmp_path: Path) -> None:
    """Cut off, with bits turned over, or with a piece missing: no other error than the one that says so."""
    whole, chance, seen = record.read_bytes(), random.Random(5), Counter[str]()
    for trial in range(150):
        data, at = bytearray(whole), chance.randrange(len(whole))
        if trial % 3 == 0:
            del data[at:]
        elif trial % 3 == 1:
            data[at] ^= 1 << chance.randrange(8)
        else:
            del data[at : at + chance.randrange(1, 200)]
        (tmp_path / "r").write_bytes(data)
        try:
            found = replay(tmp_path / "r")
            if trial % 3 == 0:
                assert found.cut is not None
            seen["told" if found.difference is not None else "same" if found.cut is None else "cut"] += 1
        except ConfigError:
            seen["refused"] += 1
    assert set(seen) == {"cut", "refused"}, seen


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"\xff" * 64, b"\x05\x00\x00\x00hello", b"{}"])
def test_what_is_no_record_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(ConfigError):
        replay(tmp_path / "r")
    with pytest.raises(ConfigError):
        replay(tmp_path / "nowhere")


def test_another_format_is_refused(record: Path, tmp_path: Path) -> None:
    newer = rewritten(
        record, tmp_path / "r", lambda n, e: msgspec.structs.replace(e, format=FORMAT + 1) if isinstance(e, Made) else e
    )
    with pytest.raises(ConfigError, match=f"format {FORMAT + 1}"):
        replay(newer)


def test_a_live_server_s_record_is_decided_again(tmp_path: Path) -> None:
    """The bundled model in a pool that holds hardly more than one sequence: everything that an engine can decide, it decides."""
    flags = {"max_model_len": 256, "max_rows": 64, "max_num_seqs": 8}
    plan = prepare(EngineConfig(model=resolve(None), threads=1, **flags)).plan  # type: ignore[arg-type]
    block = plan.kv_bytes // plan.kv_blocks
    memory = plan.total_bytes - plan.kv_bytes + 22 * block
    file = tmp_path / "live.record"
    text = "The sea was calm, and the boats lay in the harbour. " * 6
    with Serving(
        tmp_path, "--port", "0", "--threads", "1", "--memory", str(memory), "--max-model-len", "256",
        "--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--record", str(file),
    ) as server:  # fmt: skip
        url = server.url()
        asked = [threading.Thread(target=ask, args=(url, f"{text}{i}", 150)) for i in range(5)]
        for thread in asked:
            thread.start()
        leave(url, text)
        for thread in asked:
            thread.join(60)
        assert server.end(signal.SIGTERM) == 0
    found = replay(file)
    assert (found.difference, found.cut) == (None, None)
    assert all(getattr(found, name) > 0 for name in COUNTS), found
    assert sum(isinstance(e, Added) for _, e in Entries(file)) == found.requests == 6


def ask(url: str, prompt: str, tokens: int) -> Any:
    import urllib.request

    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "seed": 1, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def leave(url: str, prompt: str) -> None:
    """A client that goes away after the first token."""
    where = urlsplit(url)
    body = json.dumps({"prompt": prompt, "max_tokens": 100, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=60) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        client.sendall(body)
        seen = b""
        while b"data:" not in seen:
            seen += client.recv(4096)
