"""Several engines behind one port: who serves whom, what becomes of those that die, and figures over all.  Without a model."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.front.nulls import BLOCKS
from tests.front.test_remote import ROOT, Engines
from weft.errors import CapacityError
from weft.front.port import EngineInfo
from weft.front.remote import RemoteEngine
from weft.front.replicas import Replicas, added, together
from weft.front.wire import Start
from weft.registry import Part
from weft.types import Add, Cancel, EngineStats, RequestSpec, SamplingSpec, TokenItem


@contextmanager
def replicas(*names: str, folder: Path = ROOT, route: str = "round_robin", **options: Any) -> Iterator[Engines]:
    command = [sys.executable, "-m", "tests.front.nulls", str(ROOT)]
    ports = [RemoteEngine(command, Start(folder=str(folder), name=n), cwd=str(ROOT), **options) for n in names]
    port = Replicas(ports, Part("route", route).build())
    try:
        yield Engines(port)  # type: ignore[arg-type]
    finally:
        port.close()


def both(e: Engines) -> Replicas:
    port = e.port
    assert isinstance(port, Replicas)
    port.info  # noqa: B018 (waits for all of them)
    return port


def test_requests_go_to_all_and_each_gets_its_own_tokens() -> None:
    with replicas("good", "good", "good") as e:
        port = both(e)
        for id in range(12):
            e.ask(id, 40)
        e.right(range(12), 40)
        assert [engine.stats.finished for engine in port.engines] == [4, 4, 4]
        assert (port.stats.finished, port.stats.generation_tokens) == (12, 480)
        assert port.info.kv_blocks == 3 * BLOCKS
        assert [seen.open for seen in port._seen] == [seen.pending for seen in port._seen] == [0, 0, 0]


def test_streams_of_one_that_dies_go_on_and_the_others_do_not_notice() -> None:
    with replicas("good", "good") as e:
        port = both(e)
        for id in range(6):
            e.ask(id, 800)
        e.wait(lambda: len(e.tokens) == 6)
        pid = port.engines[1].state(99).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        e.right(range(6), 800)
        state = port.state(99)
        assert (state.status, state.restarts) == ("ok", 1)
        assert [one.restarts for one in state.engines] == [0, 1]


def test_what_one_has_that_never_comes_up_again_the_others_finish(tmp_path: Path) -> None:
    """The second is built once: its like is refused from then on."""
    with replicas("good", "once", folder=tmp_path) as e:
        port = both(e)
        for id in range(6):
            e.ask(id, 3000)
        e.wait(lambda: len(e.tokens) == 6)
        pid = port.engines[1].state(99).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while port.engines[1].error() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert port.error() is None, "one of them lives"
        e.right(range(6), 3000)
        e.ask(7, 20)
        e.ask(8, 20)
        e.right([7, 8], 20)
        state = port.state(99)
        assert state.status == "ok"
        assert "engine 1" in (state.reason or "")
        assert [seen.open for seen in port._seen] == [0, 0]


def test_new_requests_avoid_one_that_is_being_started() -> None:
    with replicas("good", "good") as e:
        port = both(e)
        pid = port.engines[0].state(99).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while not port.engines[0].away:
            assert time.monotonic() < end
            time.sleep(0.0005)
        for id in range(4):
            e.ask(id, 5)
        there = [given.replica for given in dict(port._given).values()]
        e.right(range(4), 5)
        assert set(there) <= {1}, "round robin alone would have sent every other one there"


def test_cancelled_ones_count_no_more() -> None:
    with replicas("good", "good") as e:
        port = both(e)
        law = SamplingSpec(max_tokens=100_000)
        port.send(Add(RequestSpec(id=1, items=(TokenItem((1, 2, 1)),), sampling=law, n=3)))
        e.wait(lambda: bool(e.tokens))
        assert port._seen[0].open == 3
        port.send(Cancel(1, 0))
        assert port._seen[0].open == 2
        port.send(Cancel(1))
        assert [seen.open for seen in port._seen] == [0, 0]
        e.ask(2, 5)
        e.right([2], 5)


def test_prompts_that_begin_alike_meet() -> None:
    with replicas("good", "good", route="prefix_aware") as e:
        port = both(e)
        for id in range(8):
            prompt = tuple(range(1, 20)) * 20 if id % 2 else (id + 1,) * 300
            port.send(
                Add(RequestSpec(id=id, items=(TokenItem(prompt),), seed=id, sampling=SamplingSpec(max_tokens=900)))
            )
        there = [given.replica for _, given in sorted(port._given.items())]
        assert len(set(there[1::2])) == 1
        assert len(set(there)) == 2


@pytest.mark.parametrize("names", [("good", "capacity"), ("capacity", "good")])
def test_what_cannot_be_built_says_why(names: tuple[str, str]) -> None:
    with replicas(*names) as e, pytest.raises(CapacityError, match="it does not fit"):
        e.port.info  # noqa: B018


def test_figures_of_several_as_of_one() -> None:
    a = EngineStats(
        steps=3, running=1, kv_blocks_total=10, acts={"x": 1}, last_step_s=5.0, shadow_tokens=30, shadow_kl=0.1
    )
    b = EngineStats(steps=4, running=2, kv_blocks_total=10, acts={"x": 2, "y": 0}, last_step_s=7.0, shadow_tokens=10)
    told = added([a, b])
    assert (told.steps, told.running, told.kv_blocks_total, told.last_step_s) == (7, 3, 20, 7.0)
    assert told.acts["x"] == 3
    assert told.shadow_kl == pytest.approx(0.075)
    assert told.shadow_top1 == 1.0
    info = EngineInfo(model_id="m", vocab_size=9, max_model_len=100, kv_blocks=5, block_tokens=16, max_num_seqs=8)
    other = EngineInfo(model_id="m", vocab_size=9, max_model_len=90, kv_blocks=4, block_tokens=16, max_num_seqs=8)
    assert (together([info, other]).max_model_len, together([info, other]).kv_blocks) == (90, 9)
