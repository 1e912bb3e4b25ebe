"""`Client`: prompts in, text out, over an `EnginePort`.  Between the HTTP routes (or `weft.LLM`) and the engine.

It lives on one event loop.  The engine's thread hands over one frame per step with one `call_soon_threadsafe` (`Relay`);
its tokens become text here, at once, since a stop string must be found before the engine computes much beyond it.  What a
slow reader has not taken yet is merged into one delta per sequence, so memory is bounded by the request's own length.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from msgspec import structs

from weft.errors import RequestError
from weft.front.access import TRACK
from weft.front.admission import HURRY, KEY, OWNER, Admission, Bounds
from weft.front.generation import (
    Delta,
    EngineStopped,
    Generation,
    GenerationFailed,
    LiveRequest,
    LiveSequence,
    Prompt,
    Refused,
)
from weft.front.grammars import PARAM, held, holder, shared_grammars
from weft.front.live import Live
from weft.front.metrics import Metrics
from weft.front.port import EnginePort
from weft.front.relay import Relay
from weft.front.text import ModelText
from weft.front.timeline import Timeline
from weft.types import (
    Adapted,
    Add,
    Cancel,
    Drop,
    EngineFrame,
    Finished,
    FinishReason,
    Load,
    Noted,
    Preempted,
    Rejected,
    Tokens,
    Watch,
)

__all__ = ["Client", "Delta", "EngineStopped", "Generation", "GenerationFailed", "Prompt", "Refused"]

WATCH_S = 0.25
"""How often the engine is asked whether it still lives, while somebody waits for it."""


class Client:
    """Sends prompts to an engine and turns its tokens into text.  Use it from one event loop at a time.

    clock: seconds, for latencies and rates only.  admission: of what may wait, and of what one key may ask.
    share_prefixes: between the holders of different keys, too.
    """

    def __init__(
        self,
        port: EnginePort,
        text: ModelText,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        admission: Admission | None = None,
        share_prefixes: bool = False,
    ) -> None:
        self.port = port
        self.name = ""
        """Of the model, where there are several."""
        self.share_prefixes = share_prefixes
        self.admission = Admission(Bounds()) if admission is None else admission
        self.text = replace(text, max_model_len=port.info.max_model_len, vocab_size=port.info.vocab_size)
        self.metrics = metrics if metrics is not None else Metrics()
        self.clock = self._clock = clock
        self.live = Live(self)
        self._ids = itertools.count(1)
        self._live: dict[int, LiveRequest] = {}
        self._waiting = 0
        """How many of them have no token yet."""
        self._asked: dict[int, asyncio.Future[None]] = {}
        self.adapters: dict[str, Adapted] = {a.name: a for a in port.info.adapters}
        """What is loaded, by name."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._relay: Relay[EngineFrame] | None = None
        self._watch: asyncio.TimerHandle | None = None

    @property
    def requests(self) -> Iterable[LiveRequest]:
        """Those that the engine has, the oldest first."""
        return self._live.values()

    def watch(self, on: bool) -> None:
        """Have the engine tell what its steps are made of, or no more."""
        self._attach()
        self.port.send(Watch(on))

    @property
    def open_requests(self) -> int:
        """Requests that the engine has and that somebody waits for."""
        return len(self._live)

    async def start(self, prompts: Prompt | Sequence[Prompt]) -> Generation:
        """Check and send one or several prompts; grammars are checked first, in a process that may be ended.

        Raises RequestError for a prompt that is empty, too long (code context_length_exceeded, never cut) or holds ids
        outside the vocabulary, Refused or Limited where too much waits or is asked, and EngineStopped when the engine has ended.
        What that refuses comes out of `take`.
        """
        self._attach()
        if (reason := self.port.error()) is not None:
            raise EngineStopped(f"the engine has stopped: {reason}")
        batch = [held(p, self.port.info.stack) for p in ([prompts] if isinstance(prompts, Prompt) else prompts)]
        asked_s = self._clock()
        for grammar, part in {
            (p.params.grammar, holder(p.techniques, self.port.info.stack)) for p in batch if p.params.grammar
        }:
            await asyncio.to_thread(shared_grammars().check, part, grammar)
        specs = [
            self.text.request(
                next(self._ids),
                p.ids,
                p.params,
                priority=p.priority,
                salt=self._salt(p.salt),
                techniques=p.techniques,
                contrast=p.contrast,
                pooling=p.pooling,
                ttft_s=p.ttft_s if HURRY.get() else None,
            )
            for p in batch
        ]
        generation = Generation(self._forget)
        now, key, marks = self._clock(), KEY.get(), self.text.marks
        self.admission.enter(key, [len(p.ids) for p in batch], now)
        watched = self.live.watchers > 0
        specs = [structs.replace(s, timeline=p.timeline or watched) for s, p in zip(specs, batch, strict=True)]
        for prompt, spec in zip(batch, specs, strict=True):
            request = LiveRequest(spec.id, prompt, generation, now)
            request.key = key
            if spec.timeline:
                request.timeline = self._begun(request, now - asked_s)
            generation.requests.append(request)
            for _ in range(spec.n):
                text = self.text.sequence(prompt.params, marks if prompt.manner or prompt.params.grammar else ())
                request.sequences.append(LiveSequence(generation.open, request, text))
                generation.open += 1
            self._live[spec.id] = request
            self._waiting += 1
            self.metrics.prompt_length.observe(len(prompt.ids))
        if (track := TRACK.get()) is not None:
            track.add(generation, self.name)
        for spec in specs:
            self.port.send(Add(spec))
        if self._watch is None:
            self._look()
        return generation

    def _begun(self, request: LiveRequest, checked_s: float) -> Timeline:
        """A timeline that says what a request finds before it.  checked_s: what looking at its grammar took."""
        timeline, stats = Timeline(request.arrived_s), self.port.stats
        if request.prompt.params.grammar:
            timeline.add(request.arrived_s, "grammar", {"seconds": round(checked_s, 6)})
        timeline.add(request.arrived_s, "queued", {"behind": self._waiting, "running": stats.running})
        return timeline

    def _salt(self, own: bytes) -> bytes:
        """Under which prefixes are shared: the request's own salt, below the owner of its key, whose name has no zero byte."""
        owner = "" if self.share_prefixes else OWNER.get()
        return owner.encode() + b"\0" + own if owner else own

    async def load_adapter(self, name: str, path: str) -> None:
        """Make the engine take in the adapter of a folder.  Raises RequestError, CapacityError, EngineStopped."""
        await self._ask(Load(next(self._ids), name, path))

    async def drop_adapter(self, name: str) -> None:
        """Make the engine let go of an adapter.  Raises RequestError where there is none, or where it is in use."""
        await self._ask(Drop(next(self._ids), name))

    async def _ask(self, command: Load | Drop) -> None:
        self._attach()
        if (reason := self.port.error()) is not None:
            raise EngineStopped(f"the engine has stopped: {reason}")
        asked = self._asked[command.id] = asyncio.get_running_loop().create_future()
        self.port.send(command)
        if self._watch is None:
            self._look()
        try:
            await asked
        finally:
            self._asked.pop(command.id, None)

    def _on_adapted(self, event: Adapted) -> None:
        asked = self._asked.get(event.id)
        if event.error is None:
            if event.part is None:
                self.adapters.pop(event.name, None)
            else:
                self.adapters[event.name] = event
        if asked is None or asked.done():  # who asked has gone
            return
        if event.error is None:
            asked.set_result(None)
        else:
            kind = RequestError if event.kind == "request" else Refused
            asked.set_exception(kind(event.error, param=event.param, code=event.code))

    def close(self) -> None:
        """Fail every open generation; the engine stays as it is."""
        self._fail_all(EngineStopped("the server is shutting down; ask again"))
        self.live.closed = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    # ------------------------------------------------------------------------------------------ the engine's frames

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._live and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this Client has open generations on another event loop")
        for request in list(self._live.values()):  # their loop was closed under them
            self.port.send(Cancel(request.id))
            self._gone(request)
        self._watch = None
        self._loop, self._relay = loop, Relay(loop, self._on_frame)
        self.port.subscribe(self._sink)

    def _sink(self, frame: EngineFrame) -> None:
        """On the engine's thread."""
        if (frame.events or frame.plan or frame.seen is not None) and self._relay is not None:
            self._relay.put(frame)

    def _on_frame(self, frame: EngineFrame) -> None:
        now = self._clock()
        if frame.seen is not None:
            self.live.see(frame.seen, now)
        for id in frame.plan or ():
            begun = self._live.get(id)
            if begun is not None and not begun.begun_s:
                begun.begun_s = now
        for event in frame.events:
            if type(event) is Adapted:
                self._on_adapted(event)
                continue
            request = self._live.get(event.id)
            if request is None:  # cancelled while the frame was on its way
                continue
            generation = request.generation
            try:
                if type(event) is Tokens:
                    self._on_tokens(request, event, now)
                elif type(event) is Finished:
                    self._on_finished(request, event, now)
                elif request.timeline is not None and type(event) is Noted:
                    request.timeline.add(now, event.event, event.detail, event.index)
                elif request.timeline is not None and type(event) is Preempted:
                    request.timeline.add(now, "preempted", sequence=event.index)
                elif type(event) is Rejected:
                    self.metrics.end("rejected")
                    self._gone(request)
                    kind = RequestError if event.kind == "request" else Refused
                    generation.fail(kind(event.message, param=event.param, code=event.code))
            except Exception as error:  # one request's text must not stop the frame for all the others
                generation.fail(error)

    def _on_tokens(self, request: LiveRequest, event: Tokens, now: float) -> None:
        sequence = request.sequences[event.index]
        if event.prompt_logprobs and event.index == 0:
            request.prompt_logprobs.extend(event.prompt_logprobs)
        if sequence.done or not event.tokens:
            return
        self._served(request)
        delta, text = sequence.pending(), sequence.text
        before = text.tokens
        new, stop = text.push(event.tokens)
        taken = text.tokens - before
        delta.text += new
        delta.token_ids += event.tokens[:taken]
        if event.logprobs:
            delta.logprobs += event.logprobs[:taken]
            delta.offsets += text.offsets[before:]
        if before:
            self.metrics.inter_token.observe((now - sequence.last_s) / max(taken, 1), taken)
        else:
            sequence.first_s = now
            if request.timeline is not None:
                cached = {"cached_tokens": event.cached_tokens} if event.cached_tokens else {}
                request.timeline.add(now, "first_token", cached, event.index)
            self.metrics.ttft.observe(now - request.arrived_s)
        sequence.last_s = now
        request.generation.wake()
        if stop is not None:
            self._end(sequence, delta, "stop", stop, now)

    def _on_finished(self, request: LiveRequest, event: Finished, now: float) -> None:
        request.cached = max(request.cached, event.cached_tokens)
        request.discarded += event.discarded
        sequence = request.sequences[event.index]
        if sequence.done:
            return
        if event.reason in ("abort", "error"):
            sequence.done = True
            self.metrics.end(event.reason)
            died = self.port.error()
            text = event.error or "the engine gave this request up; ask again"
            if died is not None:
                request.generation.fail(EngineStopped(f"the engine has stopped: {died}"))
            elif event.code is not None:
                request.generation.fail(RequestError(text, param=PARAM, code=event.code))
            else:
                request.generation.fail(GenerationFailed(text))
            return
        sequence.vector = event.vector
        delta = sequence.pending()
        new, stop = sequence.text.push((), finished=True)
        delta.text += new
        request.generation.wake()
        if stop is not None:
            self._end(sequence, delta, "stop", stop, now)
        else:
            own = event.stop_id in (request.prompt.params.stop_token_ids or ())
            self._end(sequence, delta, event.reason, event.stop_id if own else None, now)

    def _end(
        self, sequence: LiveSequence, delta: Delta, reason: FinishReason, stop: str | int | None, now: float
    ) -> None:
        request, tokens = sequence.request, sequence.text.tokens
        delta.finish_reason = reason
        delta.stop_reason = stop
        delta.cached_tokens = request.cached
        sequence.done = True
        if request.timeline is not None:
            told = {"reason": reason, "output_tokens": tokens}
            request.timeline.add(now, "finished", told, sequence.index - request.sequences[0].index)
        self.metrics.end(reason)
        self.metrics.e2e.observe(now - request.arrived_s)
        self.metrics.output_length.observe(tokens)
        if tokens > 1:
            self.metrics.per_token.observe((now - sequence.first_s) / (tokens - 1))
        if isinstance(stop, str):  # which the engine does not know
            self.port.send(Cancel(request.id, sequence.index - request.sequences[0].index))
        request.open -= 1
        request.generation.open -= 1
        if not request.open:
            self._gone(request)

    # ------------------------------------------------------------------------------------------ ends before the end

    def _forget(self, generation: Generation) -> None:
        for request in generation.requests:
            if request.id in self._live:
                self._gone(request)
                self.port.send(Cancel(request.id))
                for sequence in request.sequences:
                    if not sequence.done:
                        sequence.done = True
                        self.metrics.end("abort")

    def _served(self, request: LiveRequest) -> None:
        """It waits no more."""
        if request.waiting:
            request.waiting = False
            self._waiting -= 1
            self.admission.leave(len(request.prompt.ids), self._clock())

    def _gone(self, request: LiveRequest) -> None:
        """Nobody waits for anything of it."""
        del self._live[request.id]
        self.live.end(request, self._clock())
        self._served(request)
        self.admission.use(request.key, sum(sequence.text.tokens for sequence in request.sequences), self._clock())
        request.part()

    def _look(self) -> None:
        """Ask now and then whether the engine lives: a dead engine sends no frame to say so."""
        self._watch = None
        reason = self.port.error()
        if reason is not None:
            self._fail_all(EngineStopped(f"the engine has stopped: {reason}"))
        elif (self._live or self._asked) and self._loop is not None:
            self._watch = self._loop.call_later(WATCH_S, self._look)

    def _fail_all(self, error: Exception) -> None:
        for request in list(self._live.values()):
            request.generation.fail(error)
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(error)
