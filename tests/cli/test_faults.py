"""`weft serve` while things die under it: engines, the front, and requests that end whatever computes them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.running import Serving

SMALL = ("--threads", "1", "--memory", "700M", "--max-model-len", "512")
STREAMS = 32


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for the tests that leave it as good as they found it."""
    folder = tmp_path_factory.mktemp("faults")
    with Serving(folder, "--port", "0", *SMALL, "--stall-timeout", "2") as server:
        server.url()
        yield server
        if server.process.poll() is None:
            assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.err.read_text()


def body(i: int, **more: Any) -> dict[str, Any]:
    """A request with a seed; some are greedy, some bring stop strings, two sequences, logprobs, a grammar or guesses, or share
    their beginning."""
    words = ["The sea was", "A long time ago there was a", "The sea was calm and", "Two and two are"][i % 4]
    law: dict[str, Any] = {
        "prompt": f"{words} {i // 8}",
        "seed": i,
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": True,
    }
    law["stream_options"] = {"include_usage": True}
    held = {"regex": "[a-z]{3,9}( [a-z]{3,9}){30,60}"}
    forms: list[dict[str, Any]] = [
        {}, {"n": 2, "max_tokens": 50}, {"temperature": 0.0}, {"logprobs": 1}, {"stop": ["and"]}, {"structured_outputs": held},
        {"weft": {"with": ["draft=ngram"]}}, {"structured_outputs": held, "weft": {"with": ["draft=ngram"]}},
    ]  # fmt: skip
    return law | forms[i % len(forms)] | more


class Reader:
    """What one client has of its stream, by sequence: text and logprobs, then how it ended and the usage."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.text: dict[int, str] = {}
        self.tokens: dict[int, list[str]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.ends: dict[int, str] = {}
        self.usage: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        self.chunks = 0

    async def read(self, client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/completions", json=self.request) as answer:
            if answer.status_code != 200:
                self.error = json.loads(await answer.aread())["error"]
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line[6:]))

    def _take(self, chunk: dict[str, Any]) -> None:
        self.chunks += 1
        self.error = chunk.get("error", self.error)
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            at = choice["index"]
            self.text[at] = self.text.get(at, "") + choice["text"]
            if choice.get("logprobs"):
                self.tokens.setdefault(at, []).extend(choice["logprobs"]["tokens"])
                self.logprobs.setdefault(at, []).extend(choice["logprobs"]["token_logprobs"])
            if choice["finish_reason"]:
                self.ends[at] = choice["finish_reason"]

    def outcome(self) -> tuple[Any, ...]:
        counts = {k: v for k, v in self.usage.items() if k != "prompt_tokens_details"}
        return self.text, self.tokens, self.logprobs, self.ends, counts, self.error


def streams(
    url: str, requests: list[dict[str, Any]], meanwhile: Callable[[list[Reader]], Awaitable[None]] | None = None
) -> list[Reader]:
    """Read them all at once."""

    async def run() -> list[Reader]:
        readers = [Reader(request) for request in requests]
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            tasks = [asyncio.create_task(reader.read(client)) for reader in readers]
            if meanwhile is not None:
                await meanwhile(readers)
            await asyncio.gather(*tasks)
        return readers

    return asyncio.run(run())


def health(url: str) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{url}/health", timeout=30).json()
    return told


def up(url: str) -> dict[str, Any]:
    """The answer of /health once all is well again."""
    asyncio.run(until(lambda: health(url)["status"] == "ok"))
    return health(url)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def until(ready: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end, "nothing came"
        await asyncio.sleep(0.005)


def total(readers: list[Reader]) -> int:
    return sum(reader.chunks for reader in readers)


def test_twenty_engines_die_and_no_token_is_lost_doubled_or_different(serving: Serving) -> None:
    url = serving.url()
    requests = [body(i) for i in range(STREAMS)]
    calm = streams(url, requests)
    before = health(url)["engine_restarts"]
    pauses_s: list[float] = []

    async def kill(readers: list[Reader]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            step = total(calm) // 24
            for round in range(1, 21):
                await until(lambda round=round: total(readers) >= step * round)  # type: ignore[misc]
                told: dict[str, Any] = {}
                while told.get("status") != "ok" or told["engine_restarts"] < before + round - 1:
                    told = (await client.get("/health")).json()  # until it has heard of the last death
                pid = told["engine_pid"]
                os.kill(pid, signal.SIGKILL)
                began, seen = time.monotonic(), total(readers)
                while not gone(pid):
                    await asyncio.sleep(0.001)
                seen = total(readers)
                await until(lambda seen=seen: total(readers) > seen)  # type: ignore[misc]
                pauses_s.append(time.monotonic() - began)

    disturbed = streams(url, requests, kill)
    after = health(url)
    assert after["status"] == "ok"
    assert after["engine_restarts"] >= before + 20
    assert [d.outcome() for d in disturbed] == [c.outcome() for c in calm]
    assert max(pauses_s) < 5, pauses_s


def counters(url: str) -> dict[str, float]:
    """Every counter of /metrics without labels."""
    page = httpx.get(f"{url}/metrics", timeout=30).text
    names = re.findall(r"^# TYPE (\S+) counter$", page, re.MULTILINE)
    return {name: float(found[1]) for name in names if (found := re.search(rf"^{name} (\S+)$", page, re.MULTILINE))}


def test_counters_do_not_fall_when_an_engine_dies(serving: Serving) -> None:
    url = serving.url()
    request = {"prompt": "Say", "max_tokens": 8, "structured_outputs": {"regex": "[a-z]{4,8}"}, "seed": 1}
    assert httpx.post(f"{url}/v1/completions", json=request, timeout=60).status_code == 200
    before = counters(url)
    for name in ("grammar_rows", "grammar_steps", "grammar_mask_seconds", "grammars", "grammar_ready_seconds"):
        assert before[f"weft:{name}_total"] > 0, name
    os.kill(health(url)["engine_pid"], signal.SIGKILL)
    asyncio.run(until(lambda: counters(url)["weft:engine_restarts_total"] > before["weft:engine_restarts_total"]))
    up(url)
    assert httpx.post(f"{url}/v1/completions", json=request, timeout=60).status_code == 200
    after = counters(url)
    assert {name for name, value in before.items() if after[name] < value} == set()
    assert after["weft:grammars_total"] == before["weft:grammars_total"] + 1


def test_a_step_that_stands_still_is_given_up(serving: Serving) -> None:
    url = serving.url()
    requests = [body(i) for i in range(4)]
    calm = streams(url, requests)
    before = health(url)["engine_restarts"]

    async def stop(readers: list[Reader]) -> None:
        await until(lambda: total(readers) > 20)
        os.kill(health(url)["engine_pid"], signal.SIGSTOP)

    assert [r.outcome() for r in streams(url, requests, stop)] == [r.outcome() for r in calm]
    assert health(url)["engine_restarts"] > before


def test_the_front_has_no_torch(serving: Serving) -> None:
    engine = health(serving.url())["engine_pid"]
    assert engine != serving.process.pid
    assert "libtorch" in Path(f"/proc/{engine}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{serving.process.pid}/maps").read_text()


def folder_of(pid: int) -> Path:
    """Where the engine's socket is, from the nursery's command line."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return Path(Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")[-2].decode()).parent


def test_the_socket_is_nobody_elses(serving: Serving) -> None:
    folder = folder_of(health(serving.url())["engine_pid"])
    assert folder.stat().st_mode & 0o777 == 0o700
    (found,) = folder.iterdir()
    assert found.is_socket()
    assert found.stat().st_mode & 0o777 == 0o600


POISON = '''"""Poison: ends the process once it is asked for a guess beyond an output of `at` tokens.

Paper    none
Rule     none
Units    at: tokens
Cost     everything
Differs  nothing
Raises   nothing
"""
import os
from dataclasses import dataclass
from typing import ClassVar

from weft.registry import register
from weft.slots import Guesses
from weft.traits import Traits


@register("draft", "poison")
@dataclass(frozen=True, slots=True, kw_only=True)
class Poison:
    at: int = 5
    guesses: ClassVar[int] = 1
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits()

    def propose(self, asks, run):
        if any(ask.output >= self.at for ask in asks):
            os._exit(7)
        return [Guesses(())] * len(asks)

    def observe(self, proposed, accepted): ...
'''


def test_a_request_that_kills_engines_fails_alone_and_a_killed_front_takes_its_engine_along(tmp_path: Path) -> None:
    plugin = tmp_path / "poison.py"
    plugin.write_text(POISON)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # A controller need not ask a draft that never guesses.
    flags = ("--draft-control", "off", "--plugin", str(plugin))
    with Serving(tmp_path, "--port", str(port), *SMALL, *flags) as server:
        url = f"http://127.0.0.1:{port}"
        while_loading(url)
        server.url()
        good = [body(i) for i in range(6)]
        calm = streams(url, good)
        bad = body(6, weft={"with": ["draft=poison(at=9)"]}, max_tokens=40)
        *others, poisoned = streams(url, [*good, bad])
        assert [r.outcome() for r in others] == [r.outcome() for r in calm]
        assert poisoned.error is not None
        assert poisoned.error["type"] == "engine_error"
        assert "ended the engine each time" in poisoned.error["message"]
        assert up(url)["engine_restarts"] == 4
        answer = httpx.post(f"{url}/v1/completions", json=bad | {"stream": False, "stream_options": None}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "engine_error")

        engine = up(url)["engine_pid"]
        folder = folder_of(engine)
        server.process.kill()
        server.process.wait(10)
        end = time.monotonic() + 2
        while not gone(engine):
            assert time.monotonic() < end, "the engine outlives its front"
            time.sleep(0.01)
        while folder.exists():
            assert time.monotonic() < end + 8, "the socket is left behind"
            time.sleep(0.01)


def while_loading(url: str) -> None:
    """The port answers before the engine is there: 503, and why."""
    end = time.monotonic() + 30
    while True:
        with contextlib.suppress(httpx.ConnectError):
            answer = httpx.get(f"{url}/health", timeout=30)
            assert (answer.status_code, answer.json()["status"]) == (503, "loading")
            break
        assert time.monotonic() < end
        time.sleep(0.02)
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}, timeout=30)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    assert "retry-after" in refused.headers
    assert httpx.get(f"{url}/ready", timeout=30).status_code == 503


def test_sigterm_drains(serving: Serving) -> None:
    """The last test of the file, as the server ends with it; that a second signal does not wait stands in tests/front."""
    url = serving.url()
    request = body(0, max_tokens=400)
    (calm,) = streams(url, [request])

    async def end(readers: list[Reader]) -> None:
        await until(lambda: total(readers) > 3)
        # However slowly this test goes on, the stream does not end meanwhile.  An engine that stands still is replaced after a
        # while, and the stream goes on all the same.
        engine = health(url)["engine_pid"]
        os.kill(engine, signal.SIGSTOP)
        assert total(readers) < calm.chunks, "the stream was too short for this test"
        serving.process.send_signal(signal.SIGTERM)
        await until(lambda: health(url)["status"] == "draining")
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}, timeout=30)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert httpx.get(f"{url}/ready", timeout=30).status_code == 503
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGCONT)

    (drained,) = streams(url, [request], end)
    assert drained.outcome() == calm.outcome()
    assert serving.process.wait(20) == 0
