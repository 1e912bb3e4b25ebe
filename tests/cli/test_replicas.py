"""`weft serve --replicas 2`: the tokens of one engine, also while one of the two is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cli.running import Serving, weft
from tests.cli.test_faults import SMALL, Reader, body, health, streams, total, until, up

ENGINES = ("--threads", "1", "--memory", "1400M", "--max-model-len", "512")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Reader]]:
    """What one engine answers."""
    with Serving(tmp_path_factory.mktemp("one"), "--port", "0", *SMALL) as server:
        yield streams(server.url(), [body(i) for i in range(12)])


def test_two_engines_answer_as_one_and_survive_each_other(tmp_path: Path, calm: list[Reader]) -> None:
    with Serving(tmp_path, "--port", "0", *ENGINES, "--replicas", "2", "--route", "round_robin") as server:
        url = server.url()
        told = health(url)
        pids = [engine["pid"] for engine in told["engines"]]
        assert len(set(pids)) == 2
        asked = [body(i) for i in range(12)]
        assert [r.outcome() for r in streams(url, asked)] == [r.outcome() for r in calm]

        async def kill(readers: list[Reader]) -> None:
            for pid in pids:
                seen = total(readers)
                await until(lambda seen=seen: total(readers) > seen + 40)  # type: ignore[misc]
                os.kill(pid, signal.SIGKILL)

        assert [r.outcome() for r in streams(url, asked, kill)] == [r.outcome() for r in calm]
        after = up(url)
        assert [engine["restarts"] for engine in after["engines"]] == [1, 1]
        figures = httpx.get(f"{url}/metrics", timeout=30).text
        assert "weft:engine_restarts_total 2" in figures
        assert "2 engines, each with 700.0 MiB of memory" in server.err.read_text()
        assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--replicas", "2", "--record", "x"), "leave --replicas out"),
        (("--route", "nearest"), "there is no route=nearest"),
        (("--replicas", "0"), "--replicas"),
        (("--replicas", "2", "--memory", "500M"), "250.0 MiB"),
    ],
)
def test_flags_that_do_not_go(flags: tuple[str, ...], said: str) -> None:
    done = weft("serve", "--port", "0", *flags)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
