"""`weft serve --replicas 2` and `--roles`: the tokens of one engine, also while one of the two is killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.running import Serving, weft
from tests.cli.test_faults import SMALL, Reader, body, health, streams, total, until, up

ENGINES = ("--threads", "1", "--memory", "1400M", "--max-model-len", "512")


LONG = "The old man walked along the shore, and he looked at the sea and at the ships that came from far away. " * 4


def alike(i: int) -> dict[str, Any]:
    """Requests whose prompts begin with the same blocks, so that a router that knows prefixes has something to go by."""
    asked = body(i)
    return asked | {"prompt": f"{LONG}{asked['prompt']}"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Reader]]:
    """What one engine answers."""
    with Serving(tmp_path_factory.mktemp("one"), "--port", "0", *SMALL) as server:
        yield streams(server.url(), [alike(i) for i in range(12)])


@pytest.mark.parametrize("route", ["round_robin", "prefix_aware(slack=2)"])
def test_two_engines_answer_as_one_and_survive_each_other(tmp_path: Path, calm: list[Reader], route: str) -> None:
    """Each is killed while it answers; prefix_aware sends all to the first one until that has two sequences more."""
    with Serving(tmp_path, "--port", "0", *ENGINES, "--replicas", "2", "--route", route) as server:
        url = server.url()
        told = health(url)
        pids = [engine["pid"] for engine in told["engines"]]
        assert len(set(pids)) == 2
        asked = [alike(i) for i in range(12)]
        assert [r.outcome() for r in streams(url, asked)] == [r.outcome() for r in calm]

        async def kill(readers: list[Reader]) -> None:
            for pid in pids:
                seen = total(readers)
                await until(lambda seen=seen: total(readers) > seen + 40)  # type: ignore[misc]
                os.kill(pid, signal.SIGKILL)

        assert [r.outcome() for r in streams(url, asked, kill)] == [r.outcome() for r in calm]
        asyncio.run(until(lambda: figure(url, "kv_blocks_referenced") == 0))
        # An engine that has nothing to do goes through its books, and ends where they are wrong.
        calm_again(url, asked, calm)
        assert [engine["restarts"] for engine in up(url)["engines"]] == [1, 1]
        figures = httpx.get(f"{url}/metrics", timeout=30).text
        assert "weft:engine_restarts_total 2" in figures
        assert "2 engines, each with 700.0 MiB of memory" in server.err.read_text()
        assert server.end(signal.SIGTERM) == 0


def long(i: int) -> dict[str, Any]:
    """Requests whose prompts are some blocks long, and have only their ends in common."""
    asked = body(i)
    return asked | {"prompt": f"{i} {asked['prompt']} {LONG}"}


def test_prompts_are_handed_over_and_answers_are_those_of_one_engine(tmp_path: Path) -> None:
    asked = [long(i) for i in range(16)]
    (tmp_path / "one").mkdir()
    with Serving(tmp_path / "one", "--port", "0", *SMALL) as server:
        calm = streams(server.url(), asked)
    with Serving(tmp_path, "--port", "0", *ENGINES, "--roles", "prefill=1,decode=1") as server:
        url = server.url()
        first, second = (engine["pid"] for engine in health(url)["engines"])
        found = streams(url, asked)
        assert [r.outcome() for r in found] == [r.outcome() for r in calm]
        loaded = figure(url, "prompt_tokens_total")
        rows = sum(r.usage["prompt_tokens"] for r in calm)
        # The second engine computes less than a block of each prompt, and the last row again for each sequence that is forked.
        assert rows <= loaded <= rows + 16 * 17, "a prompt was computed twice"
        assert all(r.usage["prompt_tokens_details"]["cached_tokens"] == 0 for r in found), "nothing was there before"
        # An engine goes a little beyond a stop string; the 16 tokens that nobody sees are not counted.
        assert 0 <= figure(url, "generation_tokens_total") - sum(r.usage["completion_tokens"] for r in calm) < 16

        async def kill(readers: list[Reader]) -> None:
            os.kill(first, signal.SIGKILL)
            await until(lambda: total(readers) > 60)
            os.kill(second, signal.SIGKILL)
            await until(lambda: total(readers) > 200)
            await until(lambda: health(url)["engines"][0]["status"] == "ok")
            os.kill(health(url)["engines"][0]["pid"], signal.SIGKILL)

        disturbed = streams(url, asked, kill)
        assert [r.outcome() for r in disturbed] == [r.outcome() for r in calm]
        asyncio.run(until(lambda: figure(url, "kv_blocks_referenced") == 0))
        before = [engine["restarts"] for engine in up(url)["engines"]]
        calm_again(url, asked, calm)
        assert [engine["restarts"] for engine in up(url)["engines"]] == before
        assert before[1] == 1
        assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.err.read_text()


def calm_again(url: str, asked: list[dict[str, Any]], calm: list[Reader]) -> None:
    """Whoever took a dead one's place answers the same again, and holds nothing afterwards."""
    assert [r.outcome() for r in streams(url, asked)] == [r.outcome() for r in calm]
    asyncio.run(until(lambda: figure(url, "kv_blocks_referenced") == 0))


def figure(url: str, name: str) -> float:
    """Of the metrics, summed over all engines."""
    found = re.search(rf"^weft:{name} (\S+)$", httpx.get(f"{url}/metrics", timeout=30).text, re.M)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--roles", "prefill=2,decode=1"), "--roles is prefill=1,decode=N"),
        (("--roles", "prefill=1"), "--roles is prefill=1,decode=N"),
        (("--roles", "prefill=1,decode=1", "--replicas", "2"), "leave --replicas out"),
        (("--roles", "prefill=1,decode=1", "--no-prefix-cache"), "leave --no-prefix-cache out"),
        (("--roles", "prefill=1,decode=1", "--memory", "2G", "--with", "kv.offload=host"), "leave one of the two out"),
        (("--replicas", "2", "--record", "x"), "leave --replicas and --roles out"),
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
