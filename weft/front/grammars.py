"""`Grammars`: what an output has to look like is checked before the engine hears of it, in processes that may be ended.

A grammar is a stranger's program: it may be wrong, or take for ever, or all memory.  It is made ready once here, under limits of
time and memory, so that what reaches the engine is known to be one that it can make ready too.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from weft.errors import RequestError
from weft.front.generation import Prompt
from weft.front.worker import Worker
from weft.registry import parse
from weft.slots import SLOTS
from weft.types import Grammar

_WORKER = Path(__file__).with_name("grammar_worker.py")
SLOT = "constrain"
PARAM = "structured_outputs"
"""The field of a request that a grammar stands in."""
MOST_KNOWN = 1024
"""Verdicts that are remembered."""


class Grammars:
    """seconds, memory_bytes: for one grammar.  workers: grammars that are checked at once; more wait.

    Thread-safe.  The workers start when they are first needed and end when this process does, or at `close`.
    """

    def __init__(self, *, seconds: float = 5.0, memory_bytes: int = 1 << 30, workers: int = 2) -> None:
        self.seconds, self.memory_bytes = seconds, memory_bytes
        arguments = (str(memory_bytes), str(seconds))
        made = [Worker(_WORKER, arguments, seconds=seconds, purpose="grammars") for _ in range(workers)]
        self._workers = made
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in made:
            self._free.put(worker)
        self._known: OrderedDict[bytes, dict[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, part: str, grammar: Grammar) -> None:
        """Raises RequestError where the technique `part`, as slot=name(args), cannot hold an output to this grammar."""
        request = json.dumps({"part": part, "kind": grammar.kind, "source": grammar.source}).encode()
        key = hashlib.blake2b(request).digest()
        with self._lock:
            reply = self._known.get(key)
            if reply is not None:
                self._known.move_to_end(key)
        if reply is None:
            reply = self._ask(request)
            with self._lock:
                if reply.get("error") != "died":  # which may be nobody's fault
                    self._known[key] = reply
                if len(self._known) > MOST_KNOWN:
                    self._known.popitem(last=False)
        if reply:
            raise self._refusal(reply)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def _ask(self, request: bytes) -> dict[str, str]:
        worker = self._free.get()
        try:
            return worker.ask(request)
        finally:
            self._free.put(worker)

    def _refusal(self, reply: dict[str, str]) -> RequestError:
        kind, message = reply.get("error", ""), reply.get("message", "")
        texts = {
            "refused": message,
            "time": f"the grammar took longer than {self.seconds:g} s to make ready and was given up; make it smaller",
            "memory": f"the grammar needs more than {self.memory_bytes >> 20} MiB to make ready; make it smaller",
        }
        text = texts.get(kind, f"the process that checks grammars ended on this one ({message}); make it smaller")
        return RequestError(f"{PARAM}: {text}", param=PARAM, code="invalid_grammar")


_shared: Grammars | None = None
_shared_lock = threading.Lock()


def shared_grammars() -> Grammars:
    """The one that all models of this process use."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Grammars()
            atexit.register(_shared.close)
        return _shared


def holder(techniques: Sequence[str], server: Sequence[str]) -> str:
    """Which technique holds a request's output to its grammar: the request's own, the server's, or the slot's for who asks."""
    for part in map(parse, (*techniques, *server)):
        if part.slot == SLOT:
            return str(part)
    return f"{SLOT}={SLOTS[SLOT].asked}"


def constrained(techniques: Sequence[str], server: Sequence[str], grammar: Grammar | None) -> tuple[str, ...]:
    """What a request lays over the server's stack, with a technique that holds it to its grammar where there is none yet."""
    if grammar is None or any(parse(text).slot == SLOT for text in (*techniques, *server)):
        return tuple(techniques)
    return (*techniques, holder(techniques, server))


def held(prompt: Prompt, server: Sequence[str]) -> Prompt:
    """The prompt with a technique for its grammar, where it has one."""
    techniques = constrained(prompt.techniques, server, prompt.params.grammar)
    return prompt if techniques == prompt.techniques else replace(prompt, techniques=techniques)
