"""Engines that die under stacks of every kind: whatever a request's tokens depend on, it comes back with the request."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from weft.cli._engine import command
from weft.front.remote import RemoteEngine
from weft.front.text import ModelText
from weft.front.wire import Start
from weft.types import Add, EngineFrame, Finished, Rejected, RequestSpec, SamplingSpec, TokenItem, Tokens

REQUESTS = 6
PROMPT = "The sea was calm and the sea was grey and the boat was on the sea, and the sea was calm. " * 4


class Asked:
    """The outputs of some requests to one engine, and how they ended."""

    def __init__(self, port: RemoteEngine) -> None:
        self.port = port
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.ends: dict[tuple[int, int], str] = {}
        self.refused: list[str] = []
        port.subscribe(self._hear)

    def _hear(self, frame: EngineFrame) -> None:
        for event in frame.events:
            if isinstance(event, Tokens):
                self.tokens.setdefault((event.id % 100, event.index), []).extend(event.tokens)
            elif isinstance(event, Finished):
                self.ends[event.id % 100, event.index] = event.error or event.reason
            elif isinstance(event, Rejected):
                self.refused.append(event.message)

    def run(self, base: int, ids: list[int], n: int, law: dict[str, Any], kills: list[int]) -> None:
        """kills: of the engine, each once there are so many tokens, or after a while where none come before the end."""
        for i in range(REQUESTS):
            spec = SamplingSpec(**law)
            self.port.send(
                Add(RequestSpec(id=base + i, items=(TokenItem(tuple(ids[i:])),), seed=i, n=n, sampling=spec))
            )
        began, count = time.monotonic(), len(kills)
        while len(self.ends) < REQUESTS * n:
            assert not self.refused, self.refused
            assert time.monotonic() < began + 120, self.ends
            have = sum(map(len, self.tokens.values()))
            late = not have and time.monotonic() - began > 0.15 * (1 + count - len(kills))
            pid = self.port.state(99).pid
            if kills and pid is not None and (have >= kills[0] or late):
                kills.pop(0)
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            time.sleep(0.002)


@pytest.mark.long
@pytest.mark.parametrize(
    ("techniques", "n", "law"),
    [
        (["draft=ngram"], 2, {}),
        (["draft=speculative_sampling"], 1, {}),
        (["kv.compress=streaming_llm(sinks=4, window=60)"], 1, {}),
        (["kv.compress=h2o"], 1, {}),
        (["kv.store=int8"], 2, {}),
        (["schedule=layered"], 1, {}),
        (["skip=mue"], 1, {}),
        (["search=best_of_n(n=3)"], 2, {"max_tokens": 30}),
        (["search=beam(width=3)"], 1, {"max_tokens": 30, "temperature": 0.0}),
    ],
    ids=lambda given: given[0].partition("(")[0] if isinstance(given, list) else "",
)
def test_texts_are_those_of_an_engine_that_lives(
    bundled: Path, techniques: list[str], n: int, law: dict[str, Any]
) -> None:
    options = {"threads": 1, "memory": "700M", "max_model_len": 512, "techniques": techniques}
    how, where = command()
    port = RemoteEngine(how, Start(folder=str(bundled), name="tiny", options=options, quiet=True), cwd=where)
    try:
        ids = ModelText.load(bundled).prompt_ids(PROMPT)
        law = {"max_tokens": 80, **law}
        calm = Asked(port)
        calm.run(100, ids, n, law, [])
        hurt = Asked(port)
        hurt.run(200, ids, n, law, [60, 200, 350])
        assert hurt.tokens == calm.tokens
        assert hurt.ends == calm.ends
        assert port.state(99).restarts
    finally:
        port.close()
