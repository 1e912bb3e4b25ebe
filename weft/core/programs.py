"""Search programs: what becomes of a request's sequences goes to its program, and what the program says is done.

The sequences of a searched request are live like any others and are told to nobody; the client hears what the program tells.
Between a commit and the next schedule each program that has news is asked once, in the order in which its request came.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from weft.config import Stack
from weft.errors import EngineError, RequestError
from weft.slots import Program, SearchView
from weft.types import (
    Action,
    Append,
    Event,
    Finished,
    Fork,
    Park,
    Preempted,
    Put,
    RequestSpec,
    Resume,
    Stop,
    Tell,
    Tokens,
    Truncate,
)

if TYPE_CHECKING:
    from weft.core.sequences import Sequences


@dataclass(slots=True)
class Run:
    """One program at work.  open: outputs that the client still waits for.  drawn, told: tokens, over all sequences."""

    program: Program
    spec: RequestSpec
    open: set[int]
    drawn: int = 0
    told: int = 0
    cached_tokens: int = 0
    heard: list[Tokens | Finished] = field(default_factory=list)


class Programs:
    """The programs of an engine's live requests, by request id."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        self._runs: dict[int, Run] = {}

    def __contains__(self, id: int) -> bool:
        return id in self._runs

    def open(self, spec: RequestSpec, stack: Stack) -> RequestSpec:
        """The request as its sequences get it: unchanged where nothing searches.  Raises RequestError.

        Where every token is set beforehand there is nothing to search.
        """
        search = stack.get("search")
        if search is None or len(spec.forced) >= spec.sampling.max_tokens:
            return spec
        if spec.resumed:
            raise RequestError(
                "a searched request is not resumed from a part of its output: send it again, and it finds the same"
            )
        most = max(sum(item.rows for item in items) for items in (spec.items, *spec.companions))
        room = min(spec.sampling.max_tokens, self._sequences.limits.max_model_len - most)
        prompt = sum(item.rows for item in spec.items)
        program = search.begin(SearchView(n=spec.n, prompt=prompt, room=room, sampling=spec.sampling))
        self._runs[spec.id] = Run(program, spec, set(range(spec.n)))
        return replace(spec, n=program.sequences, sampling=program.sampling)

    def close(self, id: int) -> None:
        self._runs.pop(id, None)

    def told(self) -> list[tuple[int, int]]:
        """(id, output) of every output that a client waits for."""
        return [(id, output) for id, run in self._runs.items() for output in sorted(run.open)]

    def cancel(self, id: int, output: int) -> bool:
        """The client needs no more of this output; without any open one the whole request ends."""
        run = self._runs[id]
        if output not in run.open:
            return False
        run.open.discard(output)
        if not run.open:
            self._end(id)
        return True

    # ------------------------------------------------------------------ the step

    def settle(self, events: list[Event], now: float) -> list[Event]:
        """What clients are told of these events; programs that have news are asked, and what they say is done."""
        if not self._runs:
            return events
        told: list[Event] = []
        for event in events:
            run = self._runs.get(event.id)
            if run is None:
                told.append(event)
            elif isinstance(event, Tokens):
                self._hear(run, event, told)
            elif isinstance(event, Finished):
                run.cached_tokens = max(run.cached_tokens, event.cached_tokens)
                run.heard.append(event)
            else:
                assert isinstance(event, Preempted), event
        for id in [id for id, run in self._runs.items() if run.heard]:
            self._ask(id, told, now)
        return told

    def _hear(self, run: Run, event: Tokens, told: list[Event]) -> None:
        if event.prompt_logprobs:
            told.append(Tokens(event.id, event.index, (), (), event.prompt_logprobs))
        if event.tokens:
            run.drawn += len(event.tokens)
            run.heard.append(event)

    def _ask(self, id: int, told: list[Event], now: float) -> None:
        run = self._runs[id]
        heard, run.heard = run.heard, []
        try:
            for action in run.program.step(heard):
                if isinstance(action, Tell):
                    self._tell(id, run, action, told)
                else:
                    self._carry_out(id, action, now)
            if run.open and not self._sequences.family(id):
                raise EngineError("the search has no sequence left and has not answered; its technique is at fault")
        except EngineError as error:
            for output in sorted(run.open):
                self._tell(id, run, Tell(output, reason="error", error=str(error)), told)
        if not run.open:
            self._end(id)

    def _carry_out(self, id: int, action: Action, now: float) -> None:
        sequences = self._sequences
        match action:
            case Fork(source, index):
                sequences.fork(id, index, source=source, now=now)
            case Put(index, tokens, drop):
                sequences.put(id, tokens, index, drop=drop)
            case Append(index, tokens):
                sequences.append(id, tokens, index)
            case Truncate(index, length):
                sequences.truncate(id, length, index)
            case Park(index):
                sequences.park(id, index)
            case Resume(index):
                sequences.resume(id, index, now)
            case Stop(index):
                sequences.stop(id, index)
            case _:
                raise AssertionError(action)

    def _tell(self, id: int, run: Run, tell: Tell, told: list[Event]) -> None:
        """Put an answer into the client's events; one that the client has cancelled is not told."""
        run.told += len(tell.tokens)
        if tell.output not in run.open:
            return
        if tell.tokens:
            told.append(Tokens(id, tell.output, tell.tokens, tell.logprobs))
        if tell.reason is not None:
            run.open.discard(tell.output)
            spare = 0 if run.open else max(0, run.drawn - run.told)
            told.append(
                Finished(id, tell.output, tell.reason, tell.stop_id, run.cached_tokens, tell.error, discarded=spare)
            )

    def _end(self, id: int) -> None:
        """Nobody waits for anything of this request any more."""
        self.close(id)
        for request in self._sequences.family(id):
            self._sequences.stop(id, request.index)
