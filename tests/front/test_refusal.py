"""A server whose schedule refuses: what clients are told, who is never refused, and what becomes of it when engines die."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from msgspec import structs

from tests.front.conftest import CONTEXT, MODEL, metric, serving
from tests.front.scripted import ScriptedPort
from weft.config import Limits, Stacks, build_stack
from weft.core.engine import Engine
from weft.errors import CapacityError
from weft.exec.null import NullExecutor
from weft.exec.thread import EngineThread
from weft.front.admission import HURRY, work_for
from weft.front.client import Client, Prompt
from weft.front.journal import Journal
from weft.front.port import EngineInfo
from weft.front.roles import Roles
from weft.front.text import ModelText
from weft.types import (
    Add,
    Cancel,
    Command,
    EngineFrame,
    EngineStats,
    Finished,
    GroupKind,
    GroupSpec,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
)

LATE = {"weft": {"ttft_s": 1e-9}}
"""A deadline that has passed when the engine looks at it first."""
PROMPTS = [f"The {what} was calm, and the boats lay in the harbour." * 3 for what in ("sea", "lake", "river", "sky")]


@pytest.fixture(scope="module")
def strict(bundled: Path, text: ModelText) -> Iterator[str]:
    """The real server over the bundled model, under a schedule that refuses."""
    from weft.exec.build import EngineConfig, build, prepare
    from weft.llm import engine_info

    part = "schedule=deadline(ttft_s=600)"
    setup = prepare(
        EngineConfig(model=bundled, max_num_seqs=2, max_rows=64, threads=1, max_model_len=CONTEXT, techniques=(part,))
    )
    runtime = build(setup, vocabulary=text.vocabulary)
    port = EngineThread(runtime.engine, runtime.executor, engine_info(setup, MODEL))
    with serving(port, text) as url:
        yield url
    port.close()


def said(url: str, prompt: str, **body: Any) -> httpx.Response:
    given = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{url}/v1/completions", json=given, timeout=120)


def test_who_is_not_refused_has_first_come_first_served_s_tokens(strict: str, url: str) -> None:
    """Two at a time, and all at once: one in three is late from the start, and one in three may come to be."""
    wanted = {prompt: said(url, prompt).json()["choices"][0]["text"] for prompt in PROMPTS}
    asked = [(prompt, limit) for limit in (None, 1e-9, 0.05) for prompt in PROMPTS]
    with httpx.Client(base_url=strict, timeout=60) as http, ThreadPoolExecutor(len(asked)) as threads:
        before = metric(http, "weft:requests_refused_total")
        bodies = [{} if limit is None else {"weft": {"ttft_s": limit}} for _, limit in asked]
        answers = list(threads.map(lambda a: said(strict, a[0][0], **a[1]), zip(asked, bodies, strict=True)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert metric(http, "weft:requests_refused_total") - before == len(refused)
        assert metric(http, "weft:requests_running") == metric(http, "weft:kv_blocks_referenced") == 0
    for (prompt, limit), answer in zip(asked, answers, strict=True):
        if answer.status_code == 200:
            assert limit != 1e-9
            assert answer.json()["choices"][0]["text"] == wanted[prompt]
        else:
            assert limit is not None
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "too_late"


@pytest.mark.parametrize("stream", [False, True])
def test_openai_s_client_is_told_with_a_code_and_when_to_ask_again(strict: str, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{strict}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=3, stream=stream, extra_body=LATE
            )
        error = caught.value
        assert (error.status_code, error.code, error.type) == (503, "too_late", "service_unavailable")
        assert error.response.headers["retry-after"] == "1"
        assert "can't come in time any more" in error.message
        done = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=3, extra_body={"weft": {"ttft_s": 0}}
        )
        assert done.choices[0].finish_reason == "length"


def test_anthropic_s_clients_are_told_in_their_words(strict: str) -> None:
    body = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}], **LATE}
    answer = httpx.post(f"{strict}/v1/messages", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (529, "overloaded_error")


@pytest.mark.parametrize("ttft_s", [-1.0, 1e999])
def test_a_deadline_is_a_time(strict: str, ttft_s: float) -> None:
    content = b'{"prompt": "a", "weft": {"ttft_s": %s}}' % (b"-1" if ttft_s < 0 else b"1e999")
    answer = httpx.post(f"{strict}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_what_nobody_waits_for_has_no_deadline(text: ModelText, info: EngineInfo) -> None:
    """Batches, and responses that go on without their clients."""
    port = ScriptedPort(lambda spec, index: [1], info)
    client = Client(port, text)

    async def ask(late: bool, **more: Any) -> None:
        if late:
            work_for("somebody")
        async with await client.start(Prompt(ids=[5], **more)) as generation:
            await generation.take()

    for late, more in ((False, {}), (False, {"ttft_s": 2.5}), (True, {}), (True, {"ttft_s": 2.5})):
        asyncio.run(ask(late, **more))
    assert [c.spec.ttft_s for c in port.commands if isinstance(c, Add)] == [0.0, 2.5, None, None]
    assert HURRY.get()
    port.close()


def test_in_one_s_own_process_nobody_is_refused_and_waiters_are_told(bundled: Path) -> None:
    from weft import LLM, AsyncLLM, SamplingParams

    law = SamplingParams(temperature=0.0, max_tokens=6)
    with LLM(max_model_len=256) as llm:
        wanted = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, law)]
    strict: dict[str, Any] = {"max_model_len": 256, "techniques": ["schedule=deadline(ttft_s=1e-9)"]}
    with LLM(**strict) as llm:
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, law)] == wanted

    async def ask() -> None:
        async with AsyncLLM(**strict) as llm:
            async for _ in llm.generate(PROMPTS[0], law):
                pass

    with pytest.raises(CapacityError, match="in time any more"):
        asyncio.run(ask())


def test_shadow_checks_hear_of_refusals() -> None:
    """Or they would keep a place for each for ever."""
    heard, done = list[Any](), threading.Event()

    class Shadow:
        busy = False
        turn = staticmethod(lambda idle: False)
        told = staticmethod(lambda stats: stats)
        admit = staticmethod(lambda spec: None)
        see = staticmethod(lambda events: heard.extend(e.id for e in events if isinstance(e, Rejected)))

    groups = (GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=4),)
    stacks = Stacks(build_stack(("schedule=deadline",)))
    limits = Limits(max_model_len=300, max_num_seqs=4, max_rows=16, max_samples=4)
    engine = Engine(groups, 90, limits, stacks, vocab=256)
    executor = NullExecutor(groups, vocab=256, stacks=stacks)
    port = EngineThread(engine, executor, SimpleNamespace(), shadow=Shadow(), foretell=True)  # type: ignore[arg-type]
    port.subscribe(lambda frame: done.set() if any(isinstance(e, Rejected) for e in frame.events) else None)
    port.send(Add(structs.replace(spec(7), ttft_s=1e-9)))
    assert done.wait(20)
    port.close()
    assert heard == [7]


# ---------------------------------------------------------------------------------------------- engines that end


def spec(id: int, n: int = 1) -> RequestSpec:
    return RequestSpec(
        id=id, items=(TokenItem(tuple(range(200))),), sampling=SamplingSpec(max_tokens=8), n=n, ttft_s=0.5
    )


def added(commands: list[Command]) -> dict[int, float | None]:
    """By its output so far, what each request that is sent has for a deadline."""
    return {len(c.spec.resumed): c.spec.ttft_s for c in commands if isinstance(c, Add)}


def test_after_a_death_only_those_who_have_nothing_can_be_refused() -> None:
    journal = Journal()
    journal.begin()
    for id, n in ((1, 2), (2, 1)):
        journal.command(Add(spec(id, n)))
    journal.take(EngineFrame(events=(Tokens(1, 0, (5,)),), plan=(1, 2), taken=2))
    journal.died("signal 9 ended it")
    sent = journal.begin()
    by_prompt = [c.spec for c in sent if isinstance(c, Add)]
    # Of request 1 each sequence goes by itself: the second has no token, but its client has one of the first.
    assert sorted((len(s.resumed), s.ttft_s is None) for s in by_prompt) == [(0, False), (0, True), (1, True)]


def test_who_was_refused_is_gone_for_every_engine() -> None:
    journal = Journal()
    journal.begin()
    journal.command(Add(spec(1)))
    refusal = Rejected(1, "too late", "capacity", code="too_late")
    told, commands = journal.take(EngineFrame(events=(refusal,), plan=(), taken=1))
    assert told == [refusal]
    assert not [c for c in commands if not isinstance(c, Cancel)]
    assert journal.died("signal 9 ended it") == []
    assert journal.begin() == []


class Side:
    """Stands for an engine of `Roles`."""

    def __init__(self, info: EngineInfo) -> None:
        self.started: Future[EngineInfo] = Future()
        self.started.set_result(info)
        self.sent: list[Command] = []
        self.stats = EngineStats()
        self.hear: Any = None

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def subscribe(self, sink: Any) -> None:
        self.hear = sink

    def error(self) -> None:
        return None


def test_the_side_that_computes_prompts_refuses_for_both(info: EngineInfo) -> None:
    prefill, decode = Side(info), Side(info)
    roles = Roles(prefill, decode)  # type: ignore[arg-type]
    told: list[Any] = []
    roles.subscribe(lambda frame: told.extend(frame.events))
    for id in (1, 2, 3):
        roles.send(Add(spec(id)))
    assert [c.spec.ttft_s for c in prefill.sent if isinstance(c, Add)] == [0.5] * 3
    refusal = Rejected(1, "too late", "capacity", code="too_late")
    prefill.hear(EngineFrame(events=(refusal, Rejected(2, "no room", "capacity", code="never_fits"))))
    assert told == [refusal]
    prefill.hear(EngineFrame(events=(Finished(3, 0, "length", stored=((7, 8),)),)))
    # What the first side has not computed may be refused by the other; what it has may not.
    assert [(c.spec.id, c.spec.ttft_s) for c in decode.sent if isinstance(c, Add)] == [(2, 0.5), (3, None)]
