"""Beam search: at each position keep the `width` likeliest beginnings of an answer.

Paper    Lowerre, 1976; length penalty as in Wu et al., arXiv:1609.08144, in the form that transformers gave it
Rule     candidates: of every live beam its (1 + e) * width best next tokens (e: end ids, at least one), by the beam's sum of
         log-probabilities plus the token's; of all of them the (1 + e) * width best, best first.  One that ends (an end id, or no
         room) and stands among the first `width` is a hypothesis of score sum / length ** length_penalty; the best `width` of
         them are kept.  The first `width` that do not end live on.  Done when there is no room, or when `width` hypotheses are
         there and: early_stopping, or the best live beam's sum / (its length) ** length_penalty does not exceed the worst of them
Units    width: beams; length: output tokens, the end id included; sums in nats
Cost     width rows a step, from a prompt that is computed once; beams share the KV of what they have in common.  A beam whose
         token comes in an earlier step than another's waits for it
Pays     where the likeliest answer is wanted: it holds 0.18 to 0.53 of the KV of as many requests and computes their prompt
         once, so that 8 beams decode at 1.7 and 2.2 times the speed of 8 requests, and 2 beams at little more than that of 2.
         Beside one greedy answer it takes `width` times the rows, and nothing is told before the end
Differs  defaults and penalty are those of transformers' `generate(num_beams=width, do_sample=False)`, and fidelity is meant
         against it; ties, which it leaves to its sort, go to the better beam, then to the likelier token.  Bias, penalties and
         the ban of end ids before min_tokens act on the log-probabilities, as there; temperature and truncation mean nothing:
         nothing is drawn.  Stop strings cut the text of what is returned: the engine knows no text
Raises   ValueError for a width outside 1 to 64 or a penalty that is no finite number; RequestError for n > width
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from msgspec.structs import replace

from weft.errors import EngineError, RequestError
from weft.registry import register
from weft.slots import SearchView
from weft.traits import Effect, Traits
from weft.types import (
    Action,
    Finished,
    FinishReason,
    Fork,
    Park,
    Put,
    Resume,
    SamplingSpec,
    Stop,
    Tell,
    TokenLogprob,
    Tokens,
)

MOST = 64


@register("search", "beam")
@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """The request's n is how many of the `width` final hypotheses it gets, best first."""

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False
    acts: dict[str, int] = field(
        default_factory=lambda: {"candidates": 0, "forks": 0, "tokens_discarded": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    neutral: ClassVar[dict[str, object]] = {"width": 1}
    neutral_law: ClassVar[dict[str, object]] = {"temperature": 0.0}
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.REDEFINES, Effect.ONE_AT_A_TIME}))

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MOST or not math.isfinite(self.length_penalty):
            raise ValueError(
                f"1 <= width <= {MOST} and a finite length_penalty are needed, got {self.width}, {self.length_penalty}"
            )

    def begin(self, request: SearchView) -> BeamSearch:
        if request.n > self.width:
            raise RequestError(
                f"a beam search of width {self.width} has no {request.n} answers; ask for fewer", param="n"
            )
        return BeamSearch(self, request)


@dataclass(slots=True)
class Path:
    """A beginning of an answer.  index: of the sequence that holds its KV.  total: sum of its log-probabilities."""

    index: int
    total: float = 0.0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Hypothesis:
    score: float
    path: Path
    reason: FinishReason


@dataclass(slots=True)
class BeamSearch:
    """The program of one request."""

    technique: Beam
    request: SearchView
    _live: list[Path] = field(default_factory=lambda: [Path(0)])
    """Best first."""
    _done: list[Hypothesis] = field(default_factory=list)
    """Best first, at most `width`."""
    _next: dict[int, Tokens] = field(default_factory=dict)
    """What live sequences drew, until all of them have drawn."""
    _parked: set[int] = field(default_factory=set)
    _indices: int = 1
    _made: int = 0
    """Tokens that live beams and hypotheses were prolonged by."""

    @property
    def sequences(self) -> int:
        return 1

    @property
    def _kept(self) -> int:
        """Candidates that are looked at: enough that `width` of them do not end."""
        return max(2, 1 + len(self.request.sampling.stop_ids)) * self.technique.width

    @property
    def sampling(self) -> SamplingSpec:
        own = self.request.sampling
        return replace(
            own, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, steered=True, logprobs=max(self._kept, own.logprobs)
        )

    def step(self, events: Sequence[Tokens | Finished]) -> list[Action]:
        ended = set()
        for event in events:
            if isinstance(event, Tokens):
                if len(event.tokens) != 1 or len(event.logprobs) != 1:
                    raise EngineError("beam search needs one token a step and its log-probabilities from the executor")
                self._next[event.index] = event
            elif event.reason == "error":
                raise EngineError(event.error or "a beam could not go on")
            else:
                ended.add(event.index)
        if len(self._next) < len(self._live):
            early = [e.index for e in events if isinstance(e, Tokens) and e.index not in ended]
            self._parked.update(early)
            return [Park(index) for index in early]
        return self._choose()

    # ------------------------------------------------------------------ one position

    def _choose(self) -> list[Action]:
        ranked = self._ranked()
        self.technique.acts["candidates"] += len(ranked)
        length = len(self._live[0].tokens) + 1
        full = length >= self.request.room
        winners: list[Path] = []
        for rank, path in enumerate(ranked):
            stops = path.tokens[-1] in self.request.sampling.stop_ids
            if not (stops or full):
                winners.append(path)
            elif rank < self.technique.width:
                score = path.total / length**self.technique.length_penalty
                self._done.append(Hypothesis(score, path, "stop" if stops else "length"))
                self._made += 1
        self._done.sort(key=lambda h: -h.score)
        del self._done[self.technique.width :]
        del winners[self.technique.width :]
        self._made += len(winners)
        if full or not winners or self._decided(winners[0], length):
            return self._answer()
        return self._go_on(winners)

    def _ranked(self) -> list[Path]:
        """The best candidates over all live beams, best first."""
        found = []
        for path in self._live:
            (entry,) = self._next[path.index].logprobs
            for rank, (token, logprob) in enumerate(entry.top[: self._kept]):
                if logprob > -math.inf:
                    found.append((path, TokenLogprob(token, logprob, rank + 1, entry.top)))
        found.sort(key=lambda c: -(c[0].total + c[1].logprob))
        return [
            Path(path.index, path.total + e.logprob, (*path.tokens, e.token), (*path.logprobs, *self._shown(e)))
            for path, e in found[: self._kept]
        ]

    def _shown(self, entry: TokenLogprob) -> tuple[TokenLogprob, ...]:
        """What the client is told of a token, which may be nothing."""
        most = self.request.sampling.logprobs
        return () if most < 0 else (TokenLogprob(entry.token, entry.logprob, entry.rank, entry.top[:most]),)

    def _decided(self, best: Path, length: int) -> bool:
        """Whether the hypotheses are enough: nothing that lives is expected to do better."""
        if len(self._done) < self.technique.width:
            return False
        return (
            self.technique.early_stopping or best.total / length**self.technique.length_penalty <= self._done[-1].score
        )

    def _go_on(self, winners: list[Path]) -> list[Action]:
        """Each winner gets a sequence: the one that it comes from, or a fork of it where that has another winner already."""
        won = {path.index for path in winners}
        # Losers go first, for their seats; forks come before the token of their source is replaced.
        actions: list[Action] = [Stop(path.index) for path in self._live if path.index not in won]
        actions += [Resume(index) for index in sorted(self._parked & won)]
        puts: list[Action] = []
        taken: set[int] = set()
        drawn = {index: event.tokens[0] for index, event in self._next.items()}
        for path in winners:
            source = path.index
            if source in taken:
                path.index = self._indices
                self._indices += 1
                actions.append(Fork(source, path.index))
                self.technique.acts["forks"] += 1
            taken.add(source)
            if path.tokens[-1] != drawn[source]:
                puts.append(Put(path.index, path.tokens[-1:], 1))
        self._live, self._parked, self._next = winners, set(), {}
        return [*actions, *puts]

    def _answer(self) -> list[Action]:
        best = self._done[: self.request.n]
        if len(best) < self.request.n:
            raise EngineError(f"the vocabulary has no {self.request.n} answers; ask for fewer")
        shown = {h.path.tokens[:i] for h in best for i in range(1, len(h.path.tokens) + 1)}
        self.technique.acts["tokens_discarded"] += self._made - len(shown)
        return [
            Tell(
                output, h.path.tokens, h.path.logprobs, h.reason,
                h.path.tokens[-1] if h.reason == "stop" else None,
            )
            for output, h in enumerate(best)
        ]  # fmt: skip
