"""`Generation`: the outputs of one call as they grow, what a prompt and a delta are, and the errors that can end it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec

from weft.errors import CapacityError, EngineError, RequestError
from weft.front.detokenize import SequenceText
from weft.front.speech import Manner
from weft.front.timeline import Timeline
from weft.sampling import SamplingParams
from weft.types import FinishReason, TokenLogprob


class EngineStopped(EngineError):
    """The engine has ended, and every request with it."""


class GenerationFailed(EngineError):
    """The engine could not go on with this one request."""


class Refused(CapacityError):
    """A CapacityError as the engine worded it; code "never_fits" when trying again is of no use, "too_late" when the first token
    could not come in time any more.  retry_s: when to ask again."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.retry_s = retry_s


class Limited(RequestError):
    """A key has used what it may in a minute.  retry_s: when to ask again."""

    def __init__(self, message: str, retry_s: float) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_s = retry_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as token ids, and how to go on from it.

    salt: prompts share cached prefixes only under equal salts.  priority: lower runs first.  techniques: laid over the server's
    stack.  contrast: ids of a second context, for a technique that contrasts.  pooling: "last" or "mean" to get the
    prompt's pooled hidden states (`LiveSequence.vector`), "" for none.  manner: how the answers are to be read, where they are
    more than text.  timeline: whether the answer tells what became of it.  ttft_s: as `RequestSpec.ttft_s`.
    """

    ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    salt: bytes = b""
    techniques: tuple[str, ...] = ()
    contrast: Sequence[int] = ()
    pooling: str = ""
    manner: Manner | None = None
    timeline: bool = False
    ttft_s: float | None = 0.0


TURN_CHARS = 1 << 12
"""Text of one generation that is read in one turn of the event loop: parsers of calls take some microseconds for a character."""


class Delta(msgspec.Struct, kw_only=True):
    """What a sequence got since the last delta.

    index: position of the sequence in its generation: all n of the first prompt, then those of the second.
    text: new text; token_ids and logprobs may run ahead of it while a character or a stop string is incomplete.
    first: index in the output of token_ids[0].  offsets: length of the text when each token came (with logprobs only).
    finish_reason: set in the last delta.  stop_reason: the client's stop string or stop id that ended it.
    cached_tokens: prompt tokens that came from the prefix index; known in the last delta.
    """

    index: int
    text: str = ""
    first: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    offsets: list[int] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0


def _beyond(delta: Delta, room: int) -> Delta | None:
    """Cut a delta's text behind `room` characters; what it leaves for the next, with how it ends."""
    if len(delta.text) <= room:
        return None
    rest = Delta(
        index=delta.index,
        text=delta.text[room:],
        first=delta.first + len(delta.token_ids),
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        cached_tokens=delta.cached_tokens,
    )
    delta.text, delta.finish_reason, delta.stop_reason, delta.cached_tokens = delta.text[:room], None, None, 0
    return rest


class LiveSequence:
    """One output on its way: its text, the delta that nobody has taken yet, and the times that metrics need."""

    __slots__ = ("delta", "done", "first_s", "index", "last_s", "request", "text", "vector")

    def __init__(self, index: int, request: LiveRequest, text: SequenceText) -> None:
        self.index = index
        self.request = request
        self.text = text
        self.delta: Delta | None = None
        self.done = False
        self.first_s = self.last_s = 0.0
        self.vector = b""

    def pending(self) -> Delta:
        """The delta under construction; from now on it is due to be taken."""
        if self.delta is None:
            self.delta = Delta(index=self.index, first=self.text.tokens)
            self.request.generation.due.append(self)
        return self.delta


class LiveRequest:
    """One request that the engine has, with its n sequences.  open: how many have not ended.  key: of who asked.  waiting: for a
    first token.  begun_s: when it had its first turn, 0.0 before that or where the engine does not say."""

    __slots__ = (
        "arrived_s",
        "begun_s",
        "cached",
        "discarded",
        "generation",
        "id",
        "key",
        "open",
        "prompt",
        "prompt_logprobs",
        "sequences",
        "timeline",
        "waiting",
    )

    def __init__(self, id: int, prompt: Prompt, generation: Generation, arrived_s: float) -> None:
        self.id = id
        self.prompt = prompt
        self.generation = generation
        self.arrived_s = arrived_s
        self.begun_s = 0.0
        self.sequences: list[LiveSequence] = []
        self.open = prompt.params.n
        self.key = ""
        self.waiting = True
        self.cached = 0
        self.discarded = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.timeline: Timeline | None = None

    def part(self) -> None:
        """The engine has done with it: let go of what it belongs to.  It is then freed as soon as nobody reads its answer
        any more, and not when Python looks for circles next."""
        for sequence in self.sequences:
            del sequence.request
        del self.generation


class Generation:
    """The outputs of one call, for one or several prompts.  Iterate over it, or `take` what has come, until it ends.

        async with await client.start(Prompt(ids=ids, params=params)) as generation:
            async for delta in generation: ...

    Leaving it, or `cancel`, makes the engine forget what is not finished.
    """

    def __init__(self, forget: Callable[[Generation], None]) -> None:
        self.requests: list[LiveRequest] = []
        self.due: list[LiveSequence] = []
        self.open = 0
        self.error: Exception | None = None
        self.cancelled = False
        self._forget = forget
        self._wake = asyncio.Event()
        self._more = False

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt.ids) for request in self.requests)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all sequences, those that end them included, and what a search did not return."""
        told = sum(sequence.text.tokens for request in self.requests for sequence in request.sequences)
        return told + sum(request.discarded for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix index, of the requests that have ended."""
        return sum(request.cached for request in self.requests)

    async def take(self) -> list[Delta]:
        """Wait for news, then everything new, at most one delta per sequence.  Empty: all sequences have ended.

        Of much text at once, as it gathers while a reader is slow, a part: whoever reads it does so on the event loop, and
        others have their turn before the next part.

        Raises RequestError, CapacityError or another EngineError when the engine refused or failed.
        """
        if self._more:
            await asyncio.sleep(0)
        while not self.due:
            if self.error is not None:
                raise self.error
            if self.cancelled or not self.open:
                return []
            self._wake.clear()
            await self._wake.wait()
        deltas: list[Delta] = []
        room, taken = TURN_CHARS, 0
        for sequence in self.due:
            if room <= 0:
                break
            if (delta := sequence.delta) is not None:
                sequence.delta = _beyond(delta, room)
                deltas.append(delta)
                if sequence.delta is not None:
                    break
                room -= len(delta.text)
            taken += 1
        del self.due[:taken]
        self._more = bool(self.due)
        return deltas

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while deltas := await self.take():
            for delta in deltas:
                yield delta

    def wake(self) -> None:
        """There is something to take."""
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """End it with an error, which `take` raises after what came before it."""
        if self.error is None and not self.cancelled:
            self.error = error
            self._forget(self)
            self._wake.set()

    def cancel(self) -> None:
        """Make the engine forget what is not finished; `take` gives what is left, then ends."""
        if not self.cancelled:
            self.cancelled = True
            self._forget(self)
            self._wake.set()

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
