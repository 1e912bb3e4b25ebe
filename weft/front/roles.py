"""`Roles`: prompts are computed by one engine, or several, and answers by others; what the first have computed is handed over.

A request goes to the side that computes prompts as one for a single token, which nobody sees, and then with its law and its seed
to the other, whose engine finds the prompt's blocks in memory that the two share (`core.handover`) and computes the rest of it,
less than a block.  So the answer is the one of a single engine, to the last bit, whoever dies in between.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from msgspec import structs

from weft.front.port import EngineInfo, EnginePort, EngineState, FrameSink
from weft.front.replicas import Agreement, added, close, join
from weft.types import (
    Adapted,
    Add,
    Cancel,
    Command,
    EngineFrame,
    EngineStats,
    Finished,
    Noted,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
    Watch,
)

NOT_HANDED = ("search=", "sample=", "kv.compress=")
"""Requests with such a part are computed by one engine: others would not find what theirs needs."""
LEAST_BLOCKS = 4
"""Prompts of fewer blocks are not worth handing over: the second engine computes them with its next step."""
FIRSTS, SECONDS = ("prefix_hit_tokens", "prefix_query_tokens"), ("generation_tokens", "finished")
"""Figures that one side alone has: what prefixes hit by the first, what is generated and ends by the second."""


class Side(EnginePort, Protocol):
    """`RemoteEngine`, or several as `Replicas`."""

    started: Future[EngineInfo]

    def state(self, stall_s: float) -> EngineState: ...


class Roles:
    """An `EnginePort` over two sides.  `started` is done once both are up, or with the error of one that cannot be built."""

    def __init__(self, prefill: Side, decode: Side) -> None:
        self.prefill, self.decode = prefill, decode
        self.started: Future[EngineInfo] = Future()
        self._turn = threading.Lock()
        self._sink: FrameSink | None = None
        self._first: dict[int, tuple[RequestSpec, list[int]]] = {}
        """Requests whose prompts are being computed, and sequences of theirs that are cancelled already."""
        self._cached: dict[int, tuple[int, int]] = {}
        """Prompt tokens that the first side had in its index, and sequences that have not ended."""
        self._agreement = Agreement()
        for side, hear in ((prefill, self._computed), (decode, self._answered)):
            side.subscribe(hear)
            side.started.add_done_callback(self._up)

    # ------------------------------------------------------------------ the port

    @property
    def info(self) -> EngineInfo:
        """What requests can have; waits for both sides.  Raises what kept one from being built."""
        return self.started.result()

    @property
    def stats(self) -> EngineStats:
        first, second = self.prefill.stats, self.decode.stats
        own = {name: getattr(side, name) for side, names in ((first, FIRSTS), (second, SECONDS)) for name in names}
        return structs.replace(added([first, second]), **own)

    def send(self, command: Command) -> None:
        with self._turn:
            if isinstance(command, Add):
                if self._worth(command.spec) and self.prefill.error() is None:
                    self._first[command.spec.id] = (command.spec, [])
                    self.prefill.send(Add(prompt_alone(command.spec)))
                else:
                    self.decode.send(command)
            elif isinstance(command, Cancel):
                self._cancel(command)
            elif isinstance(command, Watch):
                self.prefill.send(command)
                self.decode.send(command)
            else:
                self._agreement.ask(command, (self.prefill, self.decode))

    def subscribe(self, sink: FrameSink) -> None:
        self._sink = sink

    def stalled_s(self) -> float:
        return max(self.prefill.stalled_s(), self.decode.stalled_s())

    def error(self) -> str | None:
        """Why the second side has stopped.  Without the first one it computes prompts too."""
        if self.prefill.error() is not None and self._first:
            with self._turn:
                for id in list(self._first):
                    self._go_on(id, (), 0)
        return self.decode.error()

    def state(self, stall_s: float) -> EngineState:
        """That of the second side.  reason: what is wrong with either."""
        first, second = self.prefill.state(stall_s), self.decode.state(stall_s)
        parts = (("prefill", first), ("decode", second))
        wrong = "; ".join(f"{role}: {state.reason}" for role, state in parts if state.reason is not None) or None
        return replace(
            second, reason=wrong, restarts=first.restarts + second.restarts,
            engines=(*(first.engines or (first,)), *(second.engines or (second,))),
        )  # fmt: skip

    def close(self) -> None:
        close((self.prefill, self.decode))

    # ------------------------------------------------------------------ a request's way

    def _worth(self, spec: RequestSpec) -> bool:
        """Whether a request's prompt is handed over: it is long, is all text, and nothing is told of its rows."""
        rows = sum(item.rows for item in spec.items)
        return (
            rows >= LEAST_BLOCKS * self.info.block_tokens
            and all(isinstance(item, TokenItem) for item in spec.items)
            and spec.sampling.prompt_logprobs < 0
            and not (spec.sampling.pooling or spec.companions)
            and not any(part.startswith(NOT_HANDED) for part in (*self.info.stack, *spec.techniques))
        )

    def _cancel(self, command: Cancel) -> None:
        waiting = self._first.get(command.id)
        if waiting is None:
            self.decode.send(command)
            if command.index is None:
                self._cached.pop(command.id, None)
        elif command.index is None:
            del self._first[command.id]
            self.prefill.send(command)
        else:
            waiting[1].append(command.index)

    def _go_on(self, id: int, stored: tuple[tuple[int, ...], ...], cached: int) -> None:
        """Send a request to the second side, with what the first has stored of it."""
        spec, cut = self._first.pop(id)
        self._cached[id] = (cached, spec.n)
        if stored:
            # Its prompt is computed: to refuse it as too late now would waste that.
            spec = structs.replace(spec, ttft_s=None)
        self.decode.send(Add(structs.replace(spec, stored=stored)))
        for index in cut:
            self.decode.send(Cancel(id, index))

    # ------------------------------------------------------------------ frames

    def _computed(self, frame: EngineFrame) -> None:
        """Of the first side.  What it refuses or fails at, the other one tells in its own words, if it must; but who can't be in
        time any more would not be in time there either.
        """
        told: list[Adapted | Noted | Rejected] = []
        with self._turn:
            for event in frame.events:
                if isinstance(event, Adapted):
                    told += self._agreement.hear(event, (self.prefill, self.decode))
                elif isinstance(event, Noted):
                    told.append(structs.replace(event, detail={**event.detail, "engine": "prefill"}))
                elif event.id in self._first and isinstance(event, Finished):
                    self._go_on(event.id, event.stored, event.cached_tokens)
                elif event.id in self._first and isinstance(event, Rejected):
                    if event.code == "too_late":
                        del self._first[event.id]
                        told.append(event)
                    else:
                        self._go_on(event.id, (), 0)
        if (told or frame.plan) and self._sink is not None:
            self._sink(structs.replace(frame, events=tuple(told), seen=None))

    def _answered(self, frame: EngineFrame) -> None:
        """Of the second side, for which everything that was handed over looks cached."""
        with self._turn:
            told = self._agreement.heard(frame.events, (self.prefill, self.decode))
            if self._cached:
                told = tuple(self._as_first(event) if isinstance(event, Tokens | Finished) else event for event in told)
                for event in told:
                    if isinstance(event, Rejected):
                        self._cached.pop(event.id, None)
        if (told or frame.plan or frame.seen is not None) and self._sink is not None:
            self._sink(structs.replace(frame, events=told))

    def _as_first(self, event: Tokens | Finished) -> Tokens | Finished:
        cached, open = self._cached.get(event.id, (event.cached_tokens, 0))
        if open and isinstance(event, Finished):
            if open > 1:
                self._cached[event.id] = (cached, open - 1)
            else:
                del self._cached[event.id]
        return structs.replace(event, cached_tokens=cached) if event.cached_tokens else event

    def _up(self, _: Future[EngineInfo]) -> None:
        with self._turn:
            join([self.prefill.started, self.decode.started], self.started, _offered)


def _offered(infos: list[EngineInfo]) -> EngineInfo:
    """What requests can have of both sides: the second one's, and the context that both take."""
    return replace(infos[1], max_model_len=min(info.max_model_len for info in infos))


def prompt_alone(spec: RequestSpec) -> RequestSpec:
    """The same prompt, for one token that nobody sees: its blocks are what is wanted."""
    law = SamplingSpec(max_tokens=1, temperature=0.0)
    return structs.replace(spec, sampling=law, n=1, forced=(), grammar=None, resumed=(), hand_over=True)
