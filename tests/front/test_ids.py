"""Ids: no two alike, and not a system call for each, which would give Python's lock away: an answer may hold thousands."""

from __future__ import annotations

import os
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from weft.front.ids import READ_BYTES, random_bytes
from weft.front.openai.calls import fresh_id
from weft.front.tools import PARSERS
from weft.front.tools.events import Begun

CALLS = {
    "hermes": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "qwen3_coder": "<tool_call><function=f></function></tool_call>",
    "mistral": "[TOOL_CALLS]f[ARGS]{}",
}
LOOKS = {"mistral": r"[0-9A-Za-z]{9}"}
MANY = 2000


@pytest.mark.parametrize("name", sorted(CALLS))
def test_many_calls_ask_the_system_seldom(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, system = [0], os.urandom

    def counted(size: int) -> bytes:
        asked[0] += 1
        return system(size)

    monkeypatch.setattr(os, "urandom", counted)
    monkeypatch.setattr(random, "_urandom", counted)  # what `secrets` asks
    machine = PARSERS[name]()
    ids = [event.id for event in machine.feed(CALLS[name] * MANY) if isinstance(event, Begun)]
    assert len(ids) == len(set(ids)) == MANY
    assert all(re.fullmatch(LOOKS.get(name, r"call_[0-9a-f]{24}"), id) for id in ids)
    assert asked[0] <= 1 + 24 * MANY // READ_BYTES


def test_threads_get_ids_of_their_own() -> None:
    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(lambda _: fresh_id("file-"), range(20_000)))
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"file-[0-9a-f]{48}", id) for id in ids)


@pytest.mark.parametrize("size", [1, 24, READ_BYTES, 2 * READ_BYTES + 1])
def test_any_size(size: int) -> None:
    first, second = random_bytes(size), random_bytes(size)
    assert len(first) == len(second) == size
    assert size == 1 or first != second
