"""Frames on the socket, and an engine at the other end of one: what is refused, and who waits for whom."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.front.nulls import VOCAB
from weft.exec.null import reference
from weft.front.port import EngineInfo
from weft.front.wire import (
    MAX_FRAME_BYTES,
    Done,
    Exited,
    Failed,
    FrameError,
    Frames,
    FromEngine,
    FromNursery,
    Hello,
    Ready,
    Spawned,
    Start,
    Step,
    ToEngine,
    frame_of,
)
from weft.types import (
    Adapted,
    Add,
    Cancel,
    Drop,
    EngineFrame,
    EngineStats,
    Finished,
    Load,
    Preempted,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    TokenLogprob,
    Tokens,
    VectorItem,
)

ROOT = Path(__file__).resolve().parents[2]
SPEC = RequestSpec(
    id=7,
    items=(TokenItem((1, 2, 3)), VectorItem(1, 2, b"\0\1\2\3\4\5\6\7")),
    sampling=SamplingSpec(logit_bias={3: -1.5}, stop_ids=(0,), temperature=0.25),
    seed=(1 << 64) - 1,
    salt=b"\xff\0",
    companions=((TokenItem((4,)),),),
    resumed=(5, 6),
)
INFO = EngineInfo(
    model_id="m", vocab_size=9, max_model_len=8, kv_blocks=7, block_tokens=6, max_num_seqs=5, plan={"a": 1.5},
    adapters=(Adapted(1, "poet", "adapt=lora"),),
)  # fmt: skip
EVENTS = (
    Tokens(1, 0, (3, 4), (TokenLogprob(3, -0.5, 1, ((3, -0.5),)),), (TokenLogprob(1, -1.0, 2),), 16),
    Finished(1, 0, "stop", 4, 16, None, 3),
    Preempted(2, 1),
    Rejected(3, "no", "capacity", None, "overloaded"),
    Adapted(4, "poet", None, "", "no room", "capacity"),
)
TO_ENGINE = [
    Start(folder="/x", name="m", options={"a": [1, "b"], "c": True}, shadow=(0.5, None)),
    Done(), Add(SPEC), Cancel(7, 1), Load(1, "a", "b"), Drop(2, "a"),
]  # fmt: skip
FROM_ENGINE = [
    Hello(1, True), Ready(INFO), Failed("no", "config"),
    Step(EngineFrame(events=EVENTS, stats=EngineStats(steps=3, acts={"a.b": 1}), plan=(1, 2), taken=9)), Step(EngineFrame()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "messages"),
    [(ToEngine, TO_ENGINE), (FromEngine, FROM_ENGINE), (FromNursery, [Hello(2, False), Spawned(3), Exited(3, -9)])],
)
def test_messages_arrive_as_they_were_sent_however_they_are_cut(kind: Any, messages: list[Any]) -> None:
    data = b"".join(map(frame_of, messages))
    for size in (1, 2, 3, 7, 100, len(data)):
        frames: Frames[Any] = Frames(kind)
        got = [m for at in range(0, len(data), size) for m in frames.feed(data[at : at + size])]
        assert got == messages
        assert not frames.partial


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xff\xff\xff\xff", f"at most {MAX_FRAME_BYTES} are taken"),
        (b"\0\0\0\1\xc1", "no message that is known"),
        (b"\0\0\0\0", "no message that is known"),
        (b"\0\0\0\1\x80", "no message that is known"),
        (frame_of(Step(EngineFrame())), "no message that is known"),
        (b"\0\0\0\x08\x80\x04\x95\x00\x00\x00\x00\x2e", "no message that is known"),
        (b"\0\0\x40\0" + b"\x91" * 0x4000, "no message that is known"),
        (frame_of(Load(1, "poet", "path")).replace(b"poet", b"\xff\xfe\xfd\xfc"), "no message that is known"),
    ],
    ids=["length", "no msgpack", "empty", "no type", "another side's", "a pickle", "nested", "no text"],
)
def test_bad_frames_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        Frames[Any](ToEngine).feed(data)


def test_a_frame_that_would_be_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.front.wire.MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="longer than a frame's 100"):
        frame_of(Failed("x" * 100))


# ---------------------------------------------------------------------------------------------- an engine


class Front:
    """The front's end of an engine's socket."""

    def __init__(self, name: str) -> None:
        self.sock, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.front.nulls", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        theirs.close()
        self.sock.settimeout(30)
        self._frames: Frames[Any] = Frames(FromEngine)
        self._held: list[Any] = []
        self.send(Start(folder="/", name=name))
        assert isinstance(self.next(), Ready)

    def send(self, message: Any) -> None:
        self.sock.sendall(frame_of(message))

    def next(self) -> Any:
        while not self._held:
            data = self.sock.recv(1 << 16)
            assert data, "the engine hung up"
            self._held += self._frames.feed(data)
        return self._held.pop(0)

    def end(self) -> tuple[int, str]:
        """(exit status, stderr) once it has ended."""
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err.decode()


@contextmanager
def engine(name: str = "good") -> Iterator[Front]:
    front = Front(name)
    try:
        yield front
    finally:
        front.process.kill()
        front.process.communicate(timeout=10)
        front.sock.close()


def request(id: int, first: int = 1, max_tokens: int = 5) -> Add:
    return Add(
        RequestSpec(id=id, items=(TokenItem((first, 2)),), seed=id, sampling=SamplingSpec(max_tokens=max_tokens))
    )


def used(pid: int) -> tuple[int, int]:
    """(processor time in ticks, resident pages)"""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]), int(fields[21])


def test_an_engine_waits_for_a_front_that_does_not_read_and_holds_nothing() -> None:
    with engine() as front:
        for id in range(4):
            front.send(request(id, max_tokens=20_000))
        # It is still once the socket is full: the same processor time at two looks.
        end, before = time.monotonic() + 30, used(front.process.pid)
        while True:
            time.sleep(0.3)
            now = used(front.process.pid)
            if now[0] == before[0]:
                break
            assert time.monotonic() < end, "it goes on without anybody who reads"
            before = now
        time.sleep(0.5)
        later = used(front.process.pid)
        assert later[0] - now[0] <= 1
        assert later[1] - now[1] <= 16, "pages"
        for id in range(4):
            front.send(Cancel(id))
        got: dict[int, list[int]] = {id: [] for id in range(4)}
        last = -1
        while True:
            frame = front.next().frame
            assert frame.stats.steps >= last
            last = frame.stats.steps
            for event in frame.events:
                got[event.id] += event.tokens
            if not frame.stats.running:
                break
        law = SamplingSpec(max_tokens=len(got[0]))
        assert got[0] == reference((1, 2), law, 0, VOCAB), "and nothing was left out"


def test_an_engine_ends_with_its_front_even_while_it_waits_for_it() -> None:
    with engine() as front:
        front.send(request(1, max_tokens=200_000))
        time.sleep(0.2)
        front.sock.shutdown(socket.SHUT_RDWR)
        assert front.end() == (0, "")


def test_an_engine_refuses_what_is_no_message() -> None:
    with engine() as front:
        front.sock.sendall(b"\0\0\0\5hello")
        status, err = front.end()
        assert status == 1
        assert err.startswith("error: a frame of 5 bytes holds no message that is known here")


def test_every_step_is_one_frame_that_tells_of_the_plan_to_come() -> None:
    with engine() as front:
        front.send(request(5, max_tokens=3))
        frames = []
        while not any(isinstance(e, Finished) for f in frames for e in f.events):
            frames.append(front.next().frame)
        assert [f.plan for f in frames if f.plan is not None] == [(5,), ()]
        assert [f.taken for f in frames] == [1] * len(frames)
        tokens = [len(e.tokens) for f in frames for e in f.events if isinstance(e, Tokens)]
        assert tokens == [1, 1, 1]
        assert frames[0].events == (), "the plan is known before anything comes of it"


def test_a_step_that_breaks_is_told_and_ends_the_engine() -> None:
    with engine("raise") as front:
        front.send(request(1, first=13))
        while isinstance(message := front.next(), Step):
            assert not message.frame.events, "whoever lives goes on elsewhere"
        assert message == Failed("RuntimeError: it broke")
        assert front.end()[0] == 1
