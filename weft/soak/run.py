"""A soak: requests whose answers are known from a calm run, asked again and again while faults happen, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import EngineError
from weft.soak import faults
from weft.soak.client import Answer, Lost, ask, get
from weft.soak.disk import Store

AT_ONCE = 16
AHEAD = 2
"""Faults that may be due beyond those that are over: clients wait then, so that every fault meets requests."""
STALL_S = 5.0
"""After which the front replaces an engine that a fault has stopped; a step is far shorter on a busy machine too."""
SERVER = (
    "--port",
    "0",
    "--threads",
    "1",
    "--max-model-len",
    "512",
    "--memory",
    "700M",
    "--stall-timeout",
    str(STALL_S),
)
READY = re.compile(rb"weft ready http://[\w.]+:(\d+)\n")
WARM, WARM_UP = 0.2, 1000
"""Share of a process's life, and requests at least, after which its memory is expected to be flat."""
SPAN = 1000
"""Requests that it has to live through after that for its memory to say anything."""
SAMPLES = 200
RECOVERY_S = 60.0
WORDS = (
    "The sea was",
    "A long time ago there was a",
    "The sea was calm and the",
    "Two and two are",
    "My mother said that",
)


@dataclass(slots=True)
class Report:
    """What a soak found.  wrong: tokens that differ from the calm run's.  front, engine: (requests done, resident bytes), the
    engine's by pid."""

    requests: int = 0
    lost: int = 0
    wrong: int = 0
    leaked: int = 0
    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys(faults.ALL, 0))
    refused: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    reasons: list[str] = field(default_factory=list)
    front: list[tuple[int, int]] = field(default_factory=list)
    engine: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        return bool(self.lost or self.wrong or self.leaked)

    def as_dict(self) -> dict[str, Any]:
        front = slope([self.front])
        engine = slope(list(self.engine.values()))
        known = [one for one in (front, engine) if one is not None]
        return {
            "requests": self.requests,
            "lost": self.lost,
            "wrong_tokens": self.wrong,
            "leaked_blocks": self.leaked,
            "rss_slope_bytes_per_1000": max(known, default=None),
            "front_rss_slope_bytes_per_1000": front,
            "engine_rss_slope_bytes_per_1000": engine,
            "faults": self.done,
            "faults_refused": self.refused,
            "engine_restarts": self.restarts,
            "recovery_s": round(self.slowest_s, 3),
            "seconds": round(self.seconds, 1),
            "reasons": self.reasons,
        }


def slope(series: Sequence[Sequence[tuple[int, int]]]) -> int | None:
    """Bytes in 1,000 requests once processes are warm, None where none lived long enough to say.  series: one for each life.

    Least squares: one slope through all lives, each at a height of its own, so that a life counts by how far it reaches.  Every
    process warms up anew (an engine by some 4 MB), so the first part of each life is left out, not that of the whole run.
    """
    above = below = 0.0
    for points in series:
        begin, end = points[0][0], points[-1][0]
        late = [(x, y) for x, y in points if x >= begin + max(WARM * (end - begin), WARM_UP)]
        if late and late[-1][0] - late[0][0] >= SPAN:
            mean_x = sum(x for x, _ in late) / len(late)
            mean_y = sum(y for _, y in late) / len(late)
            above += sum((x - mean_x) * (y - mean_y) for x, y in late)
            below += sum((x - mean_x) ** 2 for x, _ in late)
    return round(1000 * above / below) if below else None


def kinds() -> list[tuple[str, dict[str, Any]]]:
    """(route, body) of requests of every form that an engine's death could break."""
    found: list[tuple[str, dict[str, Any]]] = []
    laws: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"n": 2}, {"logprobs": 0, "temperature": 0.7}, {"stop": ["and", "the "]},
        {"logprobs": 1, "n": 3, "max_tokens": 12}, {"frequency_penalty": 0.5, "top_p": 0.9}, {"stream": False},
    ]  # fmt: skip
    for i in range(24):
        law = laws[i % len(laws)]
        body: dict[str, Any] = {"seed": i, "max_tokens": 24 + 8 * (i % 5), "ignore_eos": True, "stream": True, **law}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        words = WORDS[i % len(WORDS)] + " sea" * (i % 7)
        if i % 6 == 1:
            body |= {"messages": [{"role": "user", "content": words}]} | (
                {"logprobs": True} if "logprobs" in body else {}
            )
            found.append(("/v1/chat/completions", body))
        else:
            found.append(("/v1/completions", {**body, "prompt": words}))
    return found


class Soak:
    """requests, faults: how many.  seed: of what is asked when, and of which faults come.  tell: a line on how it goes."""

    def __init__(
        self,
        requests: int,
        faults: int,
        seed: int,
        *,
        model: str | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._requests, self._faults = requests, faults
        self._chance = random.Random(seed)
        self._model = [] if model is None else [model]
        self._tell = tell or (lambda _: None)
        self.report = Report()
        self._port = 0
        self._calm: list[Answer] = []
        self._kinds = kinds()
        self._asked = self._open = self._through = 0
        """Requests that were begun, that are open, and faults that are over."""
        self._due: list[str] = []
        """Faults that the next clients make."""

    def run(self, folder: Path) -> Report:
        """Start a server, whose output goes to `folder`, and end it.  Raises EngineError where it does not come up."""
        out, err = folder / "stdout", folder / "stderr"
        began = time.monotonic()
        with out.open("wb") as o, err.open("wb") as e:
            store = folder / "store"
            command = [sys.executable, "-m", "weft", "serve", *self._model, *SERVER, "--data-dir", str(store)]
            process = subprocess.Popen(command, stdout=o, stderr=e, stdin=subprocess.DEVNULL)
        try:
            while (found := READY.search(out.read_bytes())) is None:
                if process.poll() is not None:
                    raise EngineError(f"the server did not come up: {err.read_text()[-2000:]}")
                time.sleep(0.05)
            self._port = int(found[1])
            asyncio.run(self._soak(process.pid, Store(self._port, store)))
        except Lost as error:
            raise EngineError(f"the server is gone ({error}); it said: {err.read_text()[-2000:]}") from None
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.report.seconds = time.monotonic() - began
        return self.report

    async def _soak(self, front: int, store: Store) -> None:
        for route, body in self._kinds:
            answer = await ask(self._port, route, body)
            assert answer is not None
            self._calm.append(answer)
        await store.prepare()
        clients = [asyncio.create_task(self._client()) for _ in range(AT_ONCE)]
        watch = asyncio.create_task(self._watch(front))
        hurt = asyncio.create_task(self._hurt(front, store))
        try:
            await asyncio.gather(*clients, hurt)
        finally:
            watch.cancel()
        health = await self._healthy()
        self.report.restarts = health["engine_restarts"]
        self.report.leaked = await self._held()
        self._lose(await store.intact())

    # ------------------------------------------------------------------ requests

    async def _client(self) -> None:
        while self._asked < self._requests:
            if self.report.requests * (self._faults + 1) // self._requests > self._through + AHEAD:
                await asyncio.sleep(0.01)
                continue
            self._asked += 1
            which = self._chance.randrange(len(self._kinds))
            fault = self._due.pop() if self._due and self._kinds[which][1]["stream"] else None
            self._open += 1
            await self._one(which, fault)
            self._open -= 1
            self.report.requests += 1

    async def _one(self, which: int, fault: str | None) -> None:
        route, body = self._kinds[which]
        report = self.report
        try:
            answer = await ask(
                self._port, route, body, pause_s=0.05 if fault == "slow" else 0.0,
                leave_after=self._chance.randrange(1, 8) if fault == "client" else None,
            )  # fmt: skip
        except Lost as error:
            report.lost += 1
            self._reason(f"lost: {error}")
            return
        if fault is not None:
            report.done[fault] += 1
        if answer is not None and (wrong := answer.wrong(self._calm[which])):
            report.wrong += wrong
            self._reason(f"kind {which}: {wrong} tokens differ")

    def _lose(self, lost: list[str]) -> None:
        self.report.lost += len(lost)
        for text in lost:
            self._reason(text)

    def _reason(self, text: str) -> None:
        if len(self.report.reasons) < 20:
            self.report.reasons.append(text)

    # ------------------------------------------------------------------ faults

    async def _hurt(self, front: int, store: Store) -> None:
        """Faults of all kinds in turn, each some requests after the one before it."""
        for i in range(self._faults):
            self._through = i
            due = (i + 1) * self._requests // (self._faults + 1)
            while self.report.requests < due:
                await asyncio.sleep(0.002)
            name = faults.ALL[i % len(faults.ALL)]
            if name in faults.BY_CLIENT:
                self._due.append(name)
                continue
            await asyncio.sleep(self._chance.random() * 0.05)
            health = await self._healthy()
            try:
                if name in faults.TO_STORE:
                    self._lose(await store.fault(front))
                else:
                    with contextlib.suppress(ProcessLookupError):  # it has just been ended for another reason
                        faults.TO_ENGINE[name](health["engine_pid"])
            except faults.Impossible as error:
                self.report.refused[name] = str(error)
                continue
            if name in faults.TO_STORE:
                self.report.done[name] += 1
                continue
            began = time.monotonic()
            self.report.done[name] += 1
            await self._healthy(since=health["engine_restarts"], stopped=name == "stall")
            self.report.slowest_s = max(self.report.slowest_s, time.monotonic() - began)
            self._tell(f"{self.report.requests} of {self._requests} requests, {i + 1} of {self._faults} faults")
        self._through = self._faults

    async def _healthy(self, since: int = -1, stopped: bool = False) -> dict[str, Any]:
        """What /health says once all is well, after more than `since` restarts.  stopped: not after any where nothing is asked,
        as an engine that stands still without work is left alone.  Raises Lost.
        """
        waited, before = 0.0, time.monotonic()
        while True:
            health: dict[str, Any] = json.loads(await get(self._port, "/health"))
            idle = stopped and not self._open
            if health["status"] == "ok" and (health["engine_restarts"] > since or idle):
                return health
            now = time.monotonic()
            waited += min(now - before, 1.0)  # a machine that slept meanwhile has recovered nothing
            before = now
            if waited > RECOVERY_S:
                raise Lost(f"no recovery: {health}")
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------------ what is left

    async def _watch(self, front: int) -> None:
        """Resident memory of both processes, `SAMPLES` times."""
        step, engine = max(1, self._requests // SAMPLES), None
        while True:
            done = self.report.requests
            with contextlib.suppress(Lost):
                engine = json.loads(await get(self._port, "/health"))["engine_pid"]
            if (size := _resident(front)) is not None:
                self.report.front.append((done, size))
            if engine is not None and (size := _resident(engine)) is not None:
                self.report.engine.setdefault(engine, []).append((done, size))
            while self.report.requests < done + step:
                await asyncio.sleep(0.05)

    async def _held(self) -> int:
        """Blocks that are still held once nothing runs."""
        until = time.monotonic() + 10
        while True:
            page = (await get(self._port, "/metrics")).decode()
            values = dict(
                line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("weft:") and "{" not in line
            )
            held = int(float(values["weft:kv_blocks_referenced"]))
            if not held or time.monotonic() > until:
                return held
            await asyncio.sleep(0.1)


def _resident(pid: int) -> int | None:
    """Bytes, None of a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return None if found is None else 1024 * int(found[1])
