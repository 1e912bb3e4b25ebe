"""Parity: what the engine decided while it served is what it decides again when it is told the same."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
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
from weft.sim.replay import entries, replay
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
    for number, entry in entries(source):
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
    return next(n for n, e in entries(record) if isinstance(e, Planned) and wanted(e))


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
            n for n, e in entries(record)
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


def test_a_record_that_breaks_off_is_read_as_far_as_it_goes(record: Path, tmp_path: Path) -> None:
    cut = tmp_path / "r"
    cut.write_bytes(record.read_bytes()[:-7])
    assert replay(cut).difference is None


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
            seen["same" if replay(tmp_path / "r").difference is None else "told"] += 1
        except ConfigError:
            seen["refused"] += 1
    assert set(seen) == {"same", "told", "refused"}, seen


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"\xff" * 64, b"\x05\x00\x00\x00hello", b"{}"])
def test_what_is_no_record_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(ConfigError):
        replay(tmp_path / "r")
    with pytest.raises(ConfigError):
        replay(tmp_path / "nowhere")


def test_another_format_is_refused(record: Path, tmp_path: Path) -> None:
    newer = rewritten(
        record, tmp_path / "r", lambda n, e: msgspec.structs.replace(e, format=2) if isinstance(e, Made) else e
    )
    with pytest.raises(ConfigError, match="format 2"):
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
    assert found.difference is None
    assert all(getattr(found, name) > 0 for name in COUNTS), found
    assert sum(isinstance(e, Added) for _, e in entries(file)) == found.requests == 6


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
