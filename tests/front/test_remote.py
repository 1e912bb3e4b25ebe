"""An engine that is looked after: processes that die, do not come up, or are not who they seem.  Without a model, so at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.front.nulls import DEADLY, VOCAB
from weft.errors import CapacityError, ConfigError, EngineError
from weft.exec.null import reference
from weft.front.metrics import COUNTERS, ENGINES, total
from weft.front.remote import RemoteEngine
from weft.front.wire import Hello, Start, Step, frame_of
from weft.types import (
    Add,
    Cancel,
    EngineFrame,
    EngineStats,
    Finished,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
)

ROOT = Path(__file__).resolve().parents[2]


class Engines:
    """A `RemoteEngine`, and what has come of it by request."""

    def __init__(self, port: RemoteEngine) -> None:
        self.port = port
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finished] = {}
        self.refused: set[int] = set()
        self.changed = threading.Condition()
        port.subscribe(self._hear)

    def _hear(self, frame: EngineFrame) -> None:
        with self.changed:
            for event in frame.events:
                if isinstance(event, Tokens):
                    self.tokens.setdefault(event.id, []).extend(event.tokens)
                elif isinstance(event, Finished):
                    self.ends[event.id] = event
                elif isinstance(event, Rejected):
                    self.refused.add(event.id)
            self.changed.notify_all()

    def ask(self, id: int, length: int, first: int = 1) -> None:
        law = SamplingSpec(max_tokens=length)
        self.port.send(Add(RequestSpec(id=id, items=(TokenItem((first, 2, id)),), seed=id, sampling=law)))

    def wait(self, ready: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(ready, 60), "nothing came"

    def right(self, ids: Sequence[int], length: int) -> None:
        """Wait until these have ended, and compare."""
        self.wait(lambda: all(id in self.ends for id in ids))
        for id in ids:
            assert self.tokens[id] == reference((1, 2, id), SamplingSpec(max_tokens=length), id, VOCAB)

    def pid(self) -> int:
        end = time.monotonic() + 30
        while (state := self.port.state(99)).status != "ok":
            assert time.monotonic() < end, state
            time.sleep(0.005)
        assert state.pid is not None
        return state.pid


@contextmanager
def engines(name: str = "good", folder: Path = ROOT, **options: Any) -> Iterator[Engines]:
    command = [sys.executable, "-m", "tests.front.nulls", str(ROOT)]
    port = RemoteEngine(command, Start(folder=str(folder), name=name), cwd=str(ROOT), **options)
    try:
        yield Engines(port)
    finally:
        port.close()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("whom", ["engine", "nursery"])
def test_streams_go_on_whoever_dies(whom: str) -> None:
    with engines() as e:
        for id in range(5):
            e.ask(id, 600)
        for least in (50, 250, 450):
            e.wait(lambda least=least: len(e.tokens.get(4, ())) >= least or 4 in e.ends)  # type: ignore[misc]
            pid, restarts = e.pid(), e.port.state(99).restarts
            nursery = e.port._process
            assert nursery is not None
            os.kill(pid if whom == "engine" else nursery.pid, signal.SIGKILL)
            while e.port.state(99).restarts == restarts:
                time.sleep(0.001)
            while not gone(pid):
                time.sleep(0.001)
        e.right(range(5), 600)
        assert e.port.stats.engine_restarts == e.port.state(99).restarts >= 1
        assert e.port.stats.generation_tokens >= 5 * 600 - 5, "counted over all engines"
        assert e.port.error() is None


def test_commands_of_many_threads_at_once() -> None:
    """Whoever sends writes to the engine, or leaves it to the thread that is at it: none is lost, whoever dies."""
    with engines() as e:
        e.pid()

        def ask(first: int) -> None:
            for id in range(first, first + 7):
                e.ask(id, 300)
                for other in range(400):
                    e.port.send(Cancel(1000 + other))

        threads = [threading.Thread(target=ask, args=(7 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        e.wait(lambda: len(e.tokens) > 4)
        os.kill(e.pid(), signal.SIGKILL)
        for thread in threads:
            thread.join()
        e.right([id for id in range(28) if id != DEADLY], 300)
        with e.port._turn:  # as while the thread hears of the engine
            e.ask(30, 10)
        e.right([30], 10)


def test_a_command_longer_than_the_socket_takes_at_once() -> None:
    with engines() as e:
        e.pid()
        law = SamplingSpec(max_tokens=1)
        e.port.send(Add(RequestSpec(id=1, items=(TokenItem(tuple(range(400_000))),), seed=1, sampling=law)))
        e.ask(2, 10)
        e.right([2], 10)
        e.wait(lambda: 1 in e.refused)


def test_an_engine_that_stands_still_is_replaced() -> None:
    with engines(stall_s=0.3) as e:
        e.ask(1, 2000)
        e.wait(lambda: bool(e.tokens))
        os.kill(e.pid(), signal.SIGSTOP)
        e.right([1], 2000)
        assert e.port.state(99).restarts >= 1
        before = e.port.state(99).restarts
        os.kill(e.pid(), signal.SIGSTOP)
        time.sleep(0.8)
        assert e.port.state(99).restarts == before, "one that has nothing to do may stand still"
        assert e.port.stalled_s() == 0.0
        e.ask(2, 10)
        e.right([2], 10)
        before = e.port.state(99).restarts
        time.sleep(0.5)
        e.ask(3, 1000)
        e.right([3], 1000)
        assert e.port.state(99).restarts == before, "time without work is no time of standing still"


@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "it broke"), ("kill", "signal 9"), pytest.param("hang", "made no step", marks=pytest.mark.long)],
)
def test_a_request_that_ends_engines_is_found(how: str, said: str) -> None:
    with engines(how, stall_s=1.0 if how == "hang" else 60.0) as e:
        for id in range(4):
            e.ask(id, 400)
        e.wait(lambda: bool(e.tokens))
        e.ask(9, 100, first=DEADLY)
        e.wait(lambda: 9 in e.ends)
        assert said in (e.ends[9].error or "")
        e.right(range(4), 400)
        assert e.port.state(99).restarts == 4


def test_a_request_that_stands_still_among_others_is_computed_again() -> None:
    with engines("stick", request_stall_s=0.3) as e:
        e.ask(1, 20_000)
        e.ask(9, 100, first=DEADLY)
        e.wait(lambda: 9 in e.ends)
        assert 1 not in e.ends, "the other one had ended, and there was nothing to stand still among"
        assert e.ends[9].error is None
        assert e.tokens[9] == reference((DEADLY, 2, 9), SamplingSpec(max_tokens=100), 9, VOCAB)
        e.right([1], 20_000)
        assert e.port.state(99).restarts == 0, "the engine has done nothing wrong"


def test_a_request_that_never_advances_fails_alone() -> None:
    with engines("stuck", request_stall_s=0.1) as e:
        e.ask(9, 100, first=DEADLY)
        for id in range(4):
            e.ask(id, 3000)
        e.wait(lambda: 9 in e.ends)
        assert "did not advance" in (e.ends[9].error or "")
        e.right(range(4), 3000)
        assert (e.port.state(99).restarts, e.port.stalled_s()) == (0, 0.0)


@pytest.mark.parametrize(("name", "kind"), [("config", ConfigError), ("capacity", CapacityError)])
def test_what_cannot_be_built_says_why(name: str, kind: type[EngineError]) -> None:
    with engines(name) as e:
        with pytest.raises(kind):
            _ = e.port.info
        assert e.port.error() is not None


def test_a_nursery_that_does_not_start_says_so() -> None:
    port = RemoteEngine([sys.executable, "-c", "raise SystemExit(3)"], Start(folder="/", name="x"))
    try:
        with pytest.raises(EngineError, match="could not be started: its nursery ended with status 3"):
            _ = port.info
    finally:
        port.close()


def test_one_that_never_comes_up_again_is_given_up(tmp_path: Path) -> None:
    with engines("once", tmp_path) as e:
        e.ask(1, 100_000)
        e.wait(lambda: bool(e.tokens))
        os.kill(e.pid(), signal.SIGKILL)
        end = time.monotonic() + 30
        reasons = set()
        while e.port.error() is None:
            state = e.port.state(99)
            assert state.status in ("ok", "loading")
            reasons.add(state.reason)
            assert time.monotonic() < end
            time.sleep(0.01)
        assert "cannot be started again: it fitted once" in e.port.error()  # type: ignore[operator]
        state = e.port.state(99)
        assert (state.status, state.pid) == ("stalled", None)
        reasons.add(state.reason)
        assert "the engine died (the server's log says why) and is being started again" in reasons
        assert not [r for r in reasons if r and str(tmp_path) in r], (
            "told without a key, as an engine's words may not be"
        )


def test_strangers_on_the_socket_change_nothing() -> None:
    with engines() as e:
        e.ask(1, 1500)
        e.wait(lambda: bool(e.tokens))
        path = e.port._door.path
        for data in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 99,
            frame_of(Step(EngineFrame())),
            frame_of(Hello(1, True)),
            b"",
        ):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(path)
                if data:
                    stranger.sendall(data)
                    stranger.settimeout(10)
                    assert stranger.recv(99) == b"", "the door is shut"
        e.right([1], 1500)
        assert e.port.state(99).restarts == 0


def test_nothing_is_left_behind() -> None:
    with engines() as e:
        e.ask(1, 100_000)
        e.wait(lambda: bool(e.tokens))
        pid = e.pid()
        nursery, folder = parent(pid), Path(e.port._door.path).parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not Path(f"/proc/{pid}").exists(), "its nursery has waited for it"
    assert gone(nursery)
    assert not folder.exists()
    e.port.close()
    e.ask(2, 5)  # whoever is late does no harm


def test_figures_are_counted_over_all_engines() -> None:
    before = EngineStats(steps=5, generation_tokens=7, running=3, acts={"a": 1, "b": 2}, engine_restarts=1)
    now = EngineStats(steps=2, generation_tokens=1, running=1, acts={"b": 3, "c": 4}, kv_blocks_total=9)
    told = total(before, now, 1)
    assert (told.steps, told.generation_tokens, told.running, told.kv_blocks_total) == (7, 8, 1, 9)
    assert told.acts == {"a": 1, "b": 5, "c": 4}
    assert total(before, now, 0) is now
    counted = {field for _, field, _ in COUNTERS} - {"engine_restarts"}
    assert counted <= set(ENGINES), "a counter that goes back to 0 when an engine is started again"
