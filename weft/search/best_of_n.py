"""Best of n: draw several answers to one prompt, return those that the model itself finds likeliest.

Paper    none of its own; "best_of" of OpenAI's completions; compared as a baseline in Snell et al., arXiv:2408.03314 [002-165]
Rule     candidates i = 0 .. n - 1 are drawn as the sequences of an ordinary request for n; score(i) = mean (or sum) of the
         log-probabilities of its tokens; return the `keep` best, best first, equal scores by index
Units    n, keep: sequences; scores in nats, per token or in all
Cost     n answers' decoding; the prompt is computed once and its KV shared.  A candidate is stopped early once no continuation
         could bring it among the best: its sum only falls, and its mean never exceeds sum / (most tokens)
Pays     where an answer that the model itself finds likelier is worth n times the decoding: beside 4 requests it is 1.4 to 1.7
         times as fast with prompts of 256 tokens, and no faster with prompts of 32.  Nothing is told before the choice is made,
         so the first token comes as late as the last
Differs  nothing.  Fidelity is meant against the rule: candidate i is, token for token, what sequence i of a request for n draws.
         Stop strings cut the text of what is returned; the engine, which chooses, knows no text and scores what it drew
Raises   ValueError unless n >= 1, 0 <= keep <= n and by is "mean" or "sum"; RequestError for a request for other than `keep`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from msgspec.structs import replace

from weft.errors import EngineError, RequestError
from weft.registry import register
from weft.slots import SearchView
from weft.traits import Effect, Traits
from weft.types import Action, Finished, SamplingSpec, Stop, Tell, TokenLogprob, Tokens

MOST = 128


@register("search", "best_of_n")
@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """keep: how many are returned; 0 for as many as the request asks for (its n)."""

    n: int = 4
    keep: int = 0
    by: str = "mean"
    acts: dict[str, int] = field(
        default_factory=lambda: {"candidates": 0, "forks": 0, "tokens_discarded": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    neutral: ClassVar[dict[str, object]] = {"n": 1}
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.REDEFINES}))

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MOST or not 0 <= self.keep <= self.n or self.by not in ("mean", "sum"):
            raise ValueError(
                f"1 <= n <= {MOST}, 0 <= keep <= n and by 'mean' or 'sum' are needed, got n={self.n}, keep={self.keep}, "
                f"by={self.by!r}"
            )

    def begin(self, request: SearchView) -> Choice:
        if request.n > self.n or self.keep not in (0, request.n):
            most = f"{self.keep}" if self.keep else f"at most {self.n}"
            raise RequestError(
                f"this search returns {most} of {self.n} candidates, and the request asks for n = {request.n}",
                param="n",
            )
        return Choice(self, request)


@dataclass(slots=True)
class Candidate:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    total: float = 0.0
    end: Finished | None = None
    stopped: bool = False


@dataclass(slots=True)
class Choice:
    """The program of one request."""

    technique: BestOfN
    request: SearchView
    _candidates: list[Candidate] = field(init=False)
    _begun: bool = False

    def __post_init__(self) -> None:
        self._candidates = [Candidate() for _ in range(self.sequences)]

    @property
    def sequences(self) -> int:
        return self.technique.n

    @property
    def sampling(self) -> SamplingSpec:
        return replace(self.request.sampling, logprobs=max(0, self.request.sampling.logprobs))

    def step(self, events: Sequence[Tokens | Finished]) -> list[Action]:
        if not self._begun:  # counted here and not before, as a request for which there is no room begins as well
            self._begun = True
            self.technique.acts["candidates"] += self.sequences
            self.technique.acts["forks"] += self.sequences - 1
        for event in events:
            candidate = self._candidates[event.index]
            if isinstance(event, Finished):
                candidate.end = event
                if event.reason == "error":
                    raise EngineError(event.error or "a candidate could not go on")
                continue
            if len(event.logprobs) != len(event.tokens):
                raise EngineError("the executor reports no log-probabilities, and best of n chooses by them")
            candidate.tokens += event.tokens
            candidate.logprobs += event.logprobs
            candidate.total += sum(entry.logprob for entry in event.logprobs)
        actions: list[Action] = self._hopeless()
        if all(c.end is not None or c.stopped for c in self._candidates):
            actions += self._answer()
        return actions

    # ------------------------------------------------------------------ inside

    def _score(self, c: Candidate, tokens: int) -> float:
        return c.total if self.technique.by == "sum" else c.total / tokens

    def _ended(self) -> list[Candidate]:
        """Best first; `sorted` keeps the order of indices among equals."""
        ended = [c for c in self._candidates if c.end is not None]
        return sorted(ended, key=lambda c: self._score(c, len(c.tokens)), reverse=True)

    def _hopeless(self) -> list[Action]:
        """Stop the candidates that can't become one of the best any more."""
        ended = self._ended()
        if len(ended) < self.request.n:
            return []
        last = ended[self.request.n - 1]
        bar = self._score(last, len(last.tokens))
        out: list[Action] = []
        for index, c in enumerate(self._candidates):
            if c.end is None and not c.stopped and self._score(c, self.request.room) < bar:
                c.stopped = True
                out.append(Stop(index))
        return out

    def _answer(self) -> list[Action]:
        best = self._ended()[: self.request.n]
        chosen = {id(c) for c in best}
        self.technique.acts["tokens_discarded"] += sum(len(c.tokens) for c in self._candidates if id(c) not in chosen)
        out: list[Action] = []
        for output, c in enumerate(best):
            assert c.end is not None
            told = tuple(c.logprobs) if self.request.sampling.logprobs >= 0 else ()
            out.append(Tell(output, tuple(c.tokens), told, c.end.reason, c.end.stop_id))
        return out
