"""A real server under attack, `weft serve` in a process of its own, and what must hold meanwhile.

    with server.attacked():
        ...                       # requests

A stream beside them shows no gap above 250 ms (longer by what this machine itself stood still), memory grows by at most 64 MB,
the process lives, nothing new listens.  The processes that read templates and grammars are there to be ended: they may come and
go.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.running import Serving
from tests.gguf.forge import model

KEY, OTHER, ADMIN = "sesame", "poppy", "cumin"
"""Of two clients and of who runs the server."""
GAP_S = 0.25
GROWTH_BYTES = 64 << 20
MAX_FILE = 8 << 20
STREAM = {"prompt": "Once upon a time", "max_tokens": 3500, "ignore_eos": True, "stream": True, "temperature": 0.5}


class Attacked:
    """folder: its --data-dir.  model: the one that streams beside an attack, where there are several."""

    def __init__(self, process: Serving, url: str, folder: Path, model: str | None = None) -> None:
        self.process, self.url, self.folder, self.model = process, url, folder, model
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        """A JSON body, or whatever else httpx sends."""
        return self.http.post(path, json=body, **more) if body is not None else self.http.post(path, **more)

    @property
    def pids(self) -> list[int]:
        """Front, nursery and engine."""
        return [pid for pid in tree(self.process.process.pid) if not _is_worker(pid)]

    @contextlib.contextmanager
    def attacked(self, *lost: int) -> Iterator[None]:
        """lost: processes that the attack itself ends."""
        pids = [pid for pid in self.pids if pid not in lost]
        memory, sockets = resident(pids), listening(pids)
        with self._stream() as gap:
            yield
        assert self.process.process.poll() is None
        until = time.monotonic() + 10  # what is lost may still be on its way out
        while set(lost) & set(self.pids) and time.monotonic() < until:
            time.sleep(0.05)
        assert self.pids == pids, "the server has other processes than before, or than the attack leaves it"
        query = {} if self.model is None else {"model": self.model}
        assert self.http.get("/health", params=query).status_code == 200
        assert gap[0] <= GAP_S, f"the stream beside it stood still for {gap[0]:.3f} s"
        assert resident(pids) - memory <= GROWTH_BYTES
        assert listening(pids) == sockets

    @contextlib.contextmanager
    def _stream(self) -> Iterator[list[float]]:
        """A stream beside the attack; its longest gap, less what a thread that only sleeps was late by meanwhile."""
        gap, begun, over = [0.0], threading.Event(), threading.Event()
        late: list[tuple[float, float]] = []
        came: list[float] = []

        def sleep() -> None:
            while not over.is_set():
                before = time.perf_counter()
                time.sleep(0.01)
                late.append((before + 0.01, time.perf_counter()))

        def read() -> None:
            headers = {"authorization": f"Bearer {KEY}"}
            body = STREAM if self.model is None else {**STREAM, "model": self.model}
            while not over.is_set():
                with httpx.stream(
                    "POST", f"{self.url}/v1/completions", json=body, headers=headers, timeout=60
                ) as answer:
                    for _ in answer.iter_lines():
                        came.append(time.perf_counter())
                        begun.set()
                        if over.is_set():
                            return
                came.append(float("nan"))  # the next stream has its own first token to wait for

        threads = [threading.Thread(target=work) for work in (sleep, read)]
        for thread in threads:
            thread.start()
        try:
            assert begun.wait(30)
            yield gap
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
            gap[0] = max([0.0, *(b - a - own(late, a, b) for a, b in itertools.pairwise(came) if b - a > GAP_S)])


def own(late: list[tuple[float, float]], start: float, stop: float) -> float:
    """Seconds of [start, stop] in which a thread of this process that wanted to run did not."""
    return sum(max(0.0, min(b, stop) - max(a, start)) for a, b in late)


def parents() -> dict[int, int]:
    """Of each process of this machine the one that made it."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def tree(pid: int) -> list[int]:
    """The process and all below it."""
    of, found = parents(), [pid]
    for one in found:
        found += sorted(child for child, parent in of.items() if parent == one)
    return found


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return True  # it has gone meanwhile


def resident(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) << 10
    return total


def listening(pids: list[int]) -> set[str]:
    """Inodes of TCP sockets on which one of the processes listens."""
    open_ones: set[str] = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(file.readlink())
                if name.startswith("socket:["):
                    open_ones.add(name[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                cells = line.split()
                if cells[3] == "0A" and cells[9] in open_ones:
                    found.add(cells[9])
    return found


def warmed(made: Attacked, prompts: int = 6) -> Attacked:
    """The KV pool is planned memory: all of it, or a good part, is touched before growth is measured."""
    for number in range(prompts):
        body = {"prompt": [300 + number, *[301] * 4000], "max_tokens": 1}
        assert made.post("/v1/completions", body).status_code == 200
    return made


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    folder = tmp_path_factory.mktemp("attacked")
    for name, lines in (("keys", f"{KEY}\n{OTHER} other\n"), ("admin", f"{ADMIN}\n")):
        (folder / name).write_text(lines)
        (folder / name).chmod(0o600)
    (folder / "adapters").mkdir()
    flags = (
        *(
            "--port",
            "0",
            "--threads",
            "1",
            "--memory",
            "600M",
            "--data-dir",
            str(folder / "data"),
            "--max-file",
            str(MAX_FILE),
        ),
        *("--api-key-file", str(folder / "keys"), "--admin-key-file", str(folder / "admin")),
        *("--lora-root", str(folder / "adapters"), "--log-level", "debug"),
    )
    with Serving(folder, *flags) as process:
        made = Attacked(process, process.url(), folder / "data")
        until = time.monotonic() + 60
        while made.http.get("/health").status_code != 200:  # where it answers before the model is loaded
            assert time.monotonic() < until
            time.sleep(0.05)
        yield warmed(made)
        made.http.close()
        assert process.end(signal.SIGTERM) == 0
        log = process.err.read_text() + process.out.read_text()
        assert not [key for key in (KEY, OTHER, ADMIN) if key in log], "a key was logged"


SPOILT = 3
"""Tests that take `pair`."""


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Attacked, list[Path]]]:
    """A server of the bundled model, which streams beside an attack, and of one in each of some GGUF files; and those."""
    folder = tmp_path_factory.mktemp("several")
    paths = [model().write(folder / f"other{number}.gguf") for number in range(SPOILT)]
    flags = ("--port", "0", "--threads", "1", "--memory", "2000M", "--data-dir", str(folder / "data"))
    with Serving(folder, "bundled", *map(str, paths), *flags) as process:
        made = warmed(Attacked(process, process.url(), folder / "data", "weft-tiny"), prompts=1)
        yield made, paths
        made.http.close()
        assert process.end(signal.SIGTERM) == 0
        assert "Traceback" not in process.err.read_text()


@pytest.fixture
def pair(several: tuple[Attacked, list[Path]]) -> tuple[Attacked, Path]:
    """A server of the bundled model and of one in a GGUF file, and that file, which no other test has or gets."""
    server, paths = several
    return server, paths.pop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gaps and memory are measured: these tests run alone."""
    for item in items:
        if {"server", "pair"} & set(getattr(item, "fixturenames", ())) and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.serial)


def is_refused(answer: httpx.Response) -> None:
    """A 4xx in the form of its route, with a text that names nothing of the inside."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    told = json.loads(answer.text)["error"]
    assert told["message"]
    for inside in ("Traceback", "site-packages", "sqlite", "0x", "/weft/"):
        assert inside not in answer.text
