"""Timelines of answers, and the feed for those who watch: on the real engine, with a pool in which requests take turns."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.front.conftest import CONTEXT, MODEL, metric, serving
from weft.exec.thread import EngineThread
from weft.front.live import MOST_STEPS, MOST_WATCHERS, Live, Told
from weft.front.metrics import Metrics
from weft.front.port import EngineState
from weft.front.text import ModelText
from weft.front.timeline import MOST_MOMENTS, Timeline
from weft.types import EngineStats, Seen

OWN = {"weft": {"timeline": True}}
LONG = "The old man walked along the shore and looked at the sea. " * 12


@pytest.fixture(scope="module")
def port(bundled: Path, text: ModelText) -> Iterator[EngineThread]:
    from weft.exec.build import EngineConfig, build, prepare
    from weft.llm import engine_info

    config = EngineConfig(model=bundled, max_num_seqs=16, threads=1, max_model_len=CONTEXT, max_rows=128)
    plan = prepare(config).plan
    setup = prepare(
        replace(config, memory_bytes=plan.total_bytes - plan.kv_bytes + 2 * CONTEXT * plan.kv_bytes_per_token)
    )
    runtime = build(setup, vocabulary=text.vocabulary)
    made = EngineThread(runtime.engine, runtime.executor, engine_info(setup, MODEL), foretell=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(port: EngineThread, text: ModelText) -> Iterator[str]:
    with serving(port, text) as address:
        yield address


def complete(url: str, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 12, "seed": 1, "ignore_eos": True, **OWN, **more}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def events(told: dict[str, Any]) -> list[str]:
    return [moment["event"] for moment in told["weft"]["timeline"]]


def rows(told: dict[str, Any]) -> list[tuple[int, int]]:
    """The chunks in which the prompt was computed."""
    moments = told["weft"]["timeline"]
    return [(m["detail"]["start"], m["detail"]["stop"]) for m in moments if m["event"] == "chunk"]


def test_a_timeline_tells_chunks_cache_and_end(url: str) -> None:
    first = complete(url, f"1 {LONG}")
    prompt = first["usage"]["prompt_tokens"]
    assert events(first)[:2] == ["queued", "started"]
    assert events(first)[-2:] == ["first_token", "finished"]
    found = rows(first)
    assert len(found) > 1, "more than a step's rows"
    assert found[0][0] == 0
    assert found[-1][1] == prompt
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    times = [m["t_s"] for m in first["weft"]["timeline"]]
    assert times == sorted(times)
    assert times[0] == 0
    assert first["weft"]["timeline"][-1]["detail"] == {"reason": "length", "output_tokens": 12}
    again = complete(url, f"1 {LONG}")
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert rows(again) == [(cached, prompt)]
    assert next(m for m in again["weft"]["timeline"] if m["event"] == "started")["detail"]["cached_tokens"] == cached
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_nobody_who_does_not_ask_is_told(url: str, port: EngineThread) -> None:
    plain = complete(url, "Hi", weft=None)
    assert "weft" not in plain
    assert set(complete(url, "Hi")["weft"]) == {"timeline"}
    both = complete(url, "Hi", weft={"timeline": True, "stack": True})["weft"]
    assert set(both) == {"fidelity", "stack", "redefines", "timeline"}
    complete(url, "Hi", weft=None)
    assert not port.engine.timed, "the engine looks at timelines only while somebody keeps one"


def test_guesses_are_one_moment(url: str) -> None:
    told = complete(
        url, "one two three one two three one two", max_tokens=40, temperature=0.0,
        weft={"timeline": True, "with": ["draft=ngram(guesses=3)"]},
    )  # fmt: skip
    found = [m["detail"] for m in told["weft"]["timeline"] if m["event"] == "speculation"]
    assert len(found) == 1
    assert found[0]["guesses"] >= found[0]["accepted"] >= 0
    assert found[0]["steps"] >= 1


def test_preemption_is_told(url: str) -> None:
    """Eight answers that do not fit the pool at once, of two contexts' length."""
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda i: complete(url, f"{i} {LONG}", max_tokens=600, temperature=1.0, seed=i), range(8)))
    lost = [t for t in told if "preempted" in events(t)]
    assert lost
    for one in lost:
        names = events(one)
        assert names.index("preempted") < names.index("resumed")
    assert any(
        t["weft"]["timeline"][0]["detail"]["behind"] > 0 or t["weft"]["timeline"][0]["detail"]["running"] for t in told
    )


def test_a_grammar_is_told(url: str) -> None:
    told = complete(url, "Two and two are ", structured_outputs={"regex": "[0-9]{1,3}"}, ignore_eos=False)
    first = told["weft"]["timeline"][0]
    assert first["event"] == "grammar"
    assert first["detail"]["seconds"] > 0


def test_streams_responses_and_messages_tell_it_too(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=5, stream=True, extra_body=OWN,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk.model_dump() for chunk in stream]
        carrying = [c for c in chunks if c.get("weft")]
        assert len(carrying) == 1
        assert carrying[0]["weft"]["timeline"][-1]["event"] == "finished"
        assert carrying[0] == chunks[-1]
        whole = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=5, n=2, extra_body=OWN
        ).model_dump()
        ends = [m for m in whole["weft"]["timeline"] if m["event"] == "finished"]
        assert sorted(m["detail"].get("sequence", 0) for m in ends) == [0, 1]
        response = client.responses.create(model=MODEL, input="Hi", max_output_tokens=16, store=False, extra_body=OWN)
        assert response.model_dump()["weft"]["timeline"][-1]["event"] == "finished"
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other:
            message = other.messages.create(
                model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "Hi"}], extra_body=OWN
            )
        assert message.model_dump()["weft"]["timeline"][0]["event"] == "queued"


def test_a_timeline_is_bounded() -> None:
    line = Timeline(0.0)
    for i in range(3 * MOST_MOMENTS):
        line.add(float(i), "chunk", {"start": i})
    line.add(9999.0, "finished")
    assert len(line.moments) == MOST_MOMENTS
    assert line.moments[-1] == {"t_s": 9999.0, "event": "finished", "detail": {"left_out": 2 * MOST_MOMENTS + 1}}


def test_what_no_frame_has_room_for_is_told_as_sums() -> None:
    """Two readers, one of whom comes later: steps and what was left out are together what there was since each came."""
    client: Any = SimpleNamespace(
        clock=lambda: 0.0, metrics=Metrics(), requests=[], port=SimpleNamespace(stats=EngineStats()), open_requests=0,
        watch=lambda on: None,
    )  # fmt: skip
    feed = Live(client)
    names = ("prompt_rows", "decode_rows", "guess_rows")
    there = dict.fromkeys(("steps", *names), 0)

    def computed(first: int, count: int) -> None:
        for step in range(first, first + count):
            feed.see(Seen(step, step % 3, 1 + step % 5, step % 2, 4), 0.0)
            feed.see(Seen(step, 0, 0, 0, 0, ((step, 1, 1),)), 0.0)  # at rest: blocks alone
            for name, rows in zip(there, (1, step % 3, 1 + step % 5, step % 2), strict=True):
                there[name] += rows

    def read(told: Told, heard: dict[str, int]) -> Told:
        frame, told = feed.frame(EngineState(), told)
        assert len(frame["steps"]) <= MOST_STEPS
        heard["steps"] += len(frame["steps"]) + frame["left_out"]["steps"]
        for name in names:
            heard[name] += sum(step[name] for step in frame["steps"]) + frame["left_out"][name]
        return told

    early, late = dict.fromkeys(there, 0), dict.fromkeys(there, 0)
    one = read(Told(), early)
    computed(1, 200)
    one = read(one, early)
    assert early == there
    other = read(Told(), late)
    assert late["steps"] == MOST_STEPS, "what was before a reader came is not missed"
    before = {name: there[name] - late[name] for name in there}
    computed(201, 30)
    one = read(one, early)
    computed(231, 500)
    other = read(other, late)
    computed(1, 90)  # another engine, which counts anew
    one, other = read(one, early), read(other, late)
    assert early == there
    assert {name: late[name] + before[name] for name in there} == there


class Watcher:
    """Reads the feed in a thread."""

    def __init__(self, url: str) -> None:
        self.frames: list[dict[str, Any]] = []
        self.hello: dict[str, Any] = {}
        self.blocks: list[list[int]] = []
        self.steps: list[dict[str, Any]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._read, args=(url,), daemon=True)
        self._thread.start()

    def _read(self, url: str) -> None:
        with httpx.stream("GET", f"{url}/v1/weft/live", timeout=30) as answer:
            kind = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: "):
                    told = json.loads(line[6:])
                    if kind == "hello":
                        self.hello = told
                    else:
                        self.blocks = told.get("blocks", self.blocks)
                        self.steps += told["steps"]
                        self.frames.append(told)
                if self._stop:
                    return

    def until(self, ready: Any) -> None:
        end = time.monotonic() + 20
        while not (self.frames and ready(self.frames[-1])):
            assert time.monotonic() < end, self.frames[-1:]
            time.sleep(0.02)

    def close(self) -> None:
        self._stop = True


@pytest.fixture
def watcher(url: str) -> Iterator[Watcher]:
    made = Watcher(url)
    made.until(lambda frame: True)
    yield made
    made.close()


def test_the_feed_counts_as_the_metrics_do(url: str, watcher: Watcher, port: EngineThread) -> None:
    assert watcher.hello["models"] == [MODEL]
    assert watcher.hello["kv_blocks"] == port.info.kv_blocks
    before = dict(watcher.frames[-1]["finished"])
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: complete(url, f"{i} {LONG}", weft=None), range(6)))
    watcher.until(lambda f: f["finished"]["length"] == before["length"] + 6 and not f["open_requests"])
    with httpx.Client(base_url=url) as http:
        stats = watcher.frames[-1]["stats"]
        watcher.until(
            lambda f: sum(1 for _, refs, _ in watcher.blocks if refs) == f["stats"]["kv_blocks_referenced"] == 0
        )
        assert len(watcher.blocks) == metric(http, "weft:kv_blocks_cached") > 0
        for name in ("prompt_tokens", "generation_tokens", "preemptions"):
            assert stats[name] == metric(http, f"weft:{name}_total")
    ended = [r for r in watcher.frames[-1]["requests"] if r["state"] == "finished"]
    assert len(ended) == 6
    assert all(r["output_tokens"] == 12 and r["timeline"][-1]["event"] == "finished" for r in ended)
    # Rows of prompts over all steps are what was computed; each answer's first token comes with its prompt's last row.
    steps = {s["step"]: s for s in watcher.steps}.values()
    assert sum(s["decode_rows"] for s in steps) == 6 * 11
    assert max(s["prompt_rows"] for s in steps) <= 128


def test_shared_blocks_are_seen(url: str, watcher: Watcher) -> None:
    with ThreadPoolExecutor(2) as pool:
        # The second comes when the first has its prompt computed: of two that enter in one step neither finds anything.
        jobs = [pool.submit(complete, url, LONG, max_tokens=600, seed=0, weft=None)]
        watcher.until(lambda f: any(r["output_tokens"] for r in f["requests"] if r["state"] != "finished"))
        jobs.append(pool.submit(complete, url, LONG, max_tokens=300, seed=1, weft=None))
        watcher.until(lambda f: any(refs == 2 and owner for _, refs, owner in watcher.blocks))
        live = {r["id"] for r in watcher.frames[-1]["requests"]}
        assert {owner for _, refs, owner in watcher.blocks if refs} <= live
        for job in jobs:
            job.result()


def test_nothing_is_computed_while_nobody_watches(url: str, port: EngineThread) -> None:
    end = time.monotonic() + 10
    while port._watched:
        assert time.monotonic() < end, "the last one has gone"
        complete(url, "Hi", weft=None)
    looked = port._shown_at
    complete(url, LONG, weft=None)
    assert port._shown_at == looked


def test_too_many_watchers_are_turned_away(url: str) -> None:
    end = time.monotonic() + 10
    watchers: list[Watcher] = []
    try:
        while len(watchers) < MOST_WATCHERS:
            watchers.append(Watcher(url))
            watchers[-1].until(lambda frame: True)
        answer = httpx.get(f"{url}/v1/weft/live", timeout=10)
        assert answer.status_code == 503
        assert "are watching already" in answer.json()["error"]["message"]
    finally:
        for one in watchers:
            one.close()
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < end
