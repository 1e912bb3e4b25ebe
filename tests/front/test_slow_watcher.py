"""A watcher of the live feed who does not read: nothing is kept for it, nothing computed, and others do not wait for it."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.front.conftest import serving
from tests.front.scripted import ScriptedPort, wait_until
from tests.front.test_live import Watcher
from weft.exec.host import rss_bytes
from weft.front import live
from weft.front.text import ModelText
from weft.types import EngineFrame, Seen, Watch

BLOCKS = 16_384
MOST_BYTES = 32 << 20
"""What a frame of all blocks has more than a hundred times within the seconds of the test."""
TOKENS = 400
USAGE = {"include_usage": True}


class Deaf:
    """Asks for the feed, reads its beginning, and then nothing, with as little room in its own socket as there can be."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.connect((at.hostname, at.port))
        self.sock.sendall(f"GET /v1/weft/live HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
        self.sock.settimeout(10)
        assert b"200 OK" in self.sock.recv(64)

    def close(self) -> None:
        self.sock.close()

    def frames(self) -> Iterator[dict[str, Any]]:
        """What it reads once it does."""
        text = b""
        while data := self.sock.recv(1 << 16):
            text += data
            *whole, text = text.split(b"\n\n")
            for event in whole:
                at = event.find(b"event: frame\ndata: ")
                if at >= 0:
                    try:
                        yield json.loads(event[at + 19 :])
                    except json.JSONDecodeError:  # a chunk of HTTP ends within it
                        continue


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames were made, of which there is no more than one in a millisecond."""
    count, frame = [0], live.Live.frame

    def counted(*args: Any) -> Any:
        count[0] += 1
        return frame(*args)

    monkeypatch.setattr(live.Live, "frame", counted)
    monkeypatch.setattr(live, "EVERY_S", 0.001)
    return count


@pytest.fixture
def busy(scripted: Callable[..., ScriptedPort]) -> Iterator[ScriptedPort]:
    """An engine that tells of steps all the time, each of which has changed every block of a large pool."""
    port = scripted(lambda spec, index: [300] * spec.sampling.max_tokens, interval_s=0.002)
    over = threading.Event()

    def tell() -> None:
        for step in itertools.count(1):
            if over.wait(0.004):
                return
            blocks = tuple((block, 1, step) for block in range(BLOCKS))
            if port._sink is not None:
                port._sink(EngineFrame(seen=Seen(step, 1, 2, 0, 3, blocks)))

    teller = threading.Thread(target=tell)
    teller.start()
    yield port
    over.set()
    teller.join()


def test_who_does_not_read_costs_nobody_anything(busy: ScriptedPort, text: ModelText, made: list[int]) -> None:
    with serving(busy, text) as url, contextlib.closing(Deaf(url)) as deaf:
        assert wait_until(lambda: made[0] > 0)
        seen = [-1, 0.0]

        def rests() -> bool:
            if made[0] != seen[0]:
                seen[:] = [made[0], time.monotonic()]
            return time.monotonic() - seen[1] > 0.5

        assert wait_until(rests, 20), "frames are made for one who does not read them"
        before, held = made[0], rss_bytes()
        body = {"prompt": "Hi", "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "stream_options": USAGE}
        times, usage = [], {}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic())
                    usage = json.loads(line[6:]).get("usage") or usage
        assert usage["completion_tokens"] == TOKENS
        assert max(b - a for a, b in itertools.pairwise(times)) < 2
        time.sleep(1)
        assert made[0] == before
        assert rss_bytes() - held < MOST_BYTES

        other = Watcher(url)
        other.until(lambda frame: frame["finished"]["length"] == 1 and other.steps)
        other.close()
        frames = deaf.frames()
        late = next(frame for frame in frames if frame["finished"]["length"] == 1)
        assert late["t_s"] > times[-1], "what it reads at last is of now, and not of what it missed"
        deaf.close()
        assert wait_until(lambda: busy.commands[-1] == Watch(False), 20), "both have gone"
