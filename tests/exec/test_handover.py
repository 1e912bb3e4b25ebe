"""Prompts that one engine computes and another goes on with, in one process, with memory between them that both map."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from weft.core.engine import Engine
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.thread import step
from weft.exec.tiers import HEAD_BYTES
from weft.hub import resolve
from weft.types import Add, Event, Finished, RequestSpec, SamplingSpec, SharedKV, TokenItem, Tokens

SIZE = 64 << 20
PROMPT = tuple(range(300, 400))


@dataclass
class Run:
    tokens: dict[int, list[int]]
    ends: dict[int, Finished]


def run(runtime: Runtime, *specs: RequestSpec) -> Run:
    out = Run({}, {})
    now = 0.0
    events: list[Event] = []
    for spec in specs:
        assert not runtime.engine.add(spec, now)
    while runtime.engine.has_work:
        events, _ = step(runtime.engine, runtime.executor)
        for event in events:
            if isinstance(event, Tokens):
                out.tokens.setdefault(event.id * 10 + event.index, []).extend(event.tokens)
            elif isinstance(event, Finished):
                out.ends[event.id] = event
    runtime.engine.check()
    return out


def ask(id: int, prompt: tuple[int, ...] = PROMPT, **more: object) -> RequestSpec:
    law = SamplingSpec(max_tokens=12, temperature=0.8)
    return RequestSpec(**{"id": id, "items": (TokenItem(prompt),), "seed": 5, "sampling": law, **more})  # type: ignore[arg-type]


def first(id: int, prompt: tuple[int, ...] = PROMPT) -> RequestSpec:
    return ask(id, prompt, sampling=SamplingSpec(max_tokens=1, temperature=0.0), hand_over=True)


@pytest.fixture
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.truncate(HEAD_BYTES + SIZE)
        yield file.fileno()


def engine(fd: int | None, writes: bool = False, blocks: int = 64, size: int = SIZE) -> Runtime:
    shared = None if fd is None else SharedKV(fd, size, writes)
    config = EngineConfig(model=resolve(None), max_model_len=512, memory_bytes=700 << 20, threads=1, max_rows=64)
    return build(prepare(config, shared=shared))


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What one engine gives, for one sequence and for three."""
    runtime = engine(None)
    one = run(runtime, ask(1)).tokens
    return [one[10], *(run(runtime, ask(2, n=3)).tokens[20 + i] for i in range(3))]


def test_the_second_engine_computes_only_what_is_less_than_a_block(fd: int, alone: list[list[int]]) -> None:
    one, two = engine(fd, writes=True), engine(fd)
    stored = run(one, first(1)).ends[1].stored
    assert len(stored[0]) == 6  # of 100 tokens, whose last row is always computed
    assert all(stored[0])
    found = run(two, ask(7, stored=stored))
    assert found.tokens[70] == alone[0]
    assert found.ends[7].cached_tokens == 96
    assert two.engine.stats.prompt_tokens == 4
    again = run(two, ask(8, n=3))
    assert [again.tokens[80 + i] for i in range(3)] == alone[1:]
    # It has the blocks in its own index by now; each fork computes the last row once more.
    assert two.engine.stats.prompt_tokens == 4 + 4 + 2


def test_what_is_written_over_is_computed(fd: int, alone: list[list[int]]) -> None:
    one, two = engine(fd, writes=True), engine(fd)
    stored = run(one, first(1)).ends[1].stored
    os.pwrite(fd, b"\xff" * (1 << 20), HEAD_BYTES + 100)
    found = run(two, ask(7, stored=stored))
    assert found.tokens[70] == alone[0]
    assert found.ends[7].cached_tokens < 96
    assert two.engine.stats.prompt_tokens > 4
    assert two.engine.pool.referenced == 0


def test_a_prefix_that_is_stored_is_not_stored_twice(fd: int) -> None:
    one = engine(fd, writes=True)
    stored = run(one, first(1)).ends[1].stored[0]
    longer = run(one, first(2, (*PROMPT, *range(500, 560)))).ends[2].stored[0]
    assert longer[:6] == stored
    assert len(set(longer)) == len(longer) == 9


def test_no_ticket_is_given_twice_over_the_lives_of_engines(fd: int, alone: list[list[int]]) -> None:
    other = tuple(range(600, 700))
    stored = run(engine(fd, writes=True), first(1)).ends[1].stored
    later = run(engine(fd, writes=True), first(1, other)).ends[1].stored
    assert not set(stored[0]) & set(later[0])
    two = engine(fd)
    # What the first engine had stored has been written over by the second, under the same slots.
    assert run(two, ask(7, stored=stored)).tokens[70] == alone[0]
    expected = run(engine(None), ask(1, other)).tokens[10]
    assert run(two, ask(8, other, stored=later)).tokens[80] == expected


def test_where_there_is_room_for_little_the_beginning_is_handed_over(fd: int, alone: list[list[int]]) -> None:
    small = 300_000
    one, two = engine(fd, writes=True, size=small), engine(fd, size=small)
    room = one.engine.kv.tiers.capacity[0]  # type: ignore[union-attr]
    assert 0 < room < 6
    stored = run(one, first(1)).ends[1].stored
    assert [bool(ticket) for ticket in stored[0]] == [i < room for i in range(6)]
    found = run(two, ask(7, stored=stored))
    assert (found.tokens[70], found.ends[7].cached_tokens) == (alone[0], 16 * room)


def test_a_request_that_fails_hands_nothing_over(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(fd, writes=True)
    whole = one.executor.execute

    def short(plan):  # type: ignore[no-untyped-def]
        """As an executor answers whose last row was void."""
        import msgspec

        result = whole(plan)
        if plan.after:
            works = tuple(msgspec.structs.replace(w, rows=0, tokens=()) for w in result.works)
            monkeypatch.setattr(one.executor, "execute", whole)
            return msgspec.structs.replace(result, works=works)
        return result

    monkeypatch.setattr(one.executor, "execute", short)
    told: list[int] = []
    forget = one.engine.kv.tiers.forget  # type: ignore[union-attr]
    monkeypatch.setattr(one.engine.kv.tiers, "forget", lambda ticket: (told.append(ticket), forget(ticket)))
    stored = run(one, first(1)).ends[1].stored
    assert len(told) == 6, "what was saved of a plan that did not happen is not believed"
    assert all(stored[0])
    assert not set(stored[0]) & set(told)


def test_engines_that_hand_nothing_over_plan_as_before() -> None:
    runtime = engine(None)
    assert isinstance(runtime.engine, Engine)
    assert run(runtime, ask(1, hand_over=True)).ends[1].stored == ((),)
    assert not runtime.engine.add(Add(ask(2)).spec, 0.0)
