"""What the desk tells of the requests whose grammar is on its way."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

from weft.exec.grammars import GrammarDesk, Ready
from weft.types import Grammar, RequestSpec, SamplingSpec, TokenItem


def test_news_are_told_once_and_name_those_that_are_made_ready() -> None:
    gate = threading.Event()
    stacks: Any = SimpleNamespace(of=lambda _: {"constrain": SimpleNamespace(begin=lambda _: gate.wait(30))})
    done: queue.SimpleQueue[Ready] = queue.SimpleQueue()
    desk = GrammarDesk(stacks, done.put)
    try:
        assert desk.news() is None
        for id in (3, 4, 5):
            law = SamplingSpec(max_tokens=4)
            spec = RequestSpec(id=id, items=(TokenItem((1,)),), sampling=law, seed=0, grammar=Grammar("regex", "a+"))
            assert desk.take(spec) == []
        assert desk.news() == (3, 4, 5)
        assert desk.news() is None
        desk.cancel(4, None)
        assert desk.news() is None, "a thread is at it all the same"
        gate.set()
        for _ in range(3):
            desk.entered(done.get(timeout=30))
        assert desk.news() == ()
        assert desk.news() is None
    finally:
        gate.set()
        desk.close()
