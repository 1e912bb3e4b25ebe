"""Two engines over one model's weights, the reference path and a stack, asked the same in turns.

Along real text, whose next tokens are set beforehand, each engine computes as it serves: in steps, with its own cache, guesses
and compression.  The laws that it would have drawn from are compared token by token.

Legend.  kl: Kullback-Leibler divergence of the stack's law from the reference's, nats per token, temperature 1.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from weft.errors import CapacityError, EngineError, RequestError
from weft.exec.build import Runtime
from weft.exec.mirror import Mirrored
from weft.exec.thread import step
from weft.fidelity.recall import ANSWER_TOKENS, LEAST, Question
from weft.types import Event, Finished, Item, Rejected, RequestSpec, SamplingSpec, TokenItem, Tokens

Progress = Callable[[str], None]
BATCH = 8
"""Requests that are sent together."""
LONGEST = 96
"""Tokens after which an answer whose length is taken is cut short."""
ANSWERS = 12
"""Answers whose lengths are taken."""
KEPT_BYTES = 256 << 20
"""The reference's laws are kept for the stack in groups of prompts that stay below this size."""


@dataclass(slots=True)
class Sent:
    """What came of some requests: their output, the seconds, the most KV bytes that were referenced at once."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """One token: kl, whether both laws have the same likeliest token, and both negative log-likelihoods of the text's token."""

    kl: float
    top: bool
    reference_nll: float
    nll: float


class Path:
    """One engine.  companions: contexts that go with each request where the stack contrasts."""

    def __init__(self, runtime: Runtime, companions: Sequence[Sequence[int]] = ()) -> None:
        self.runtime = runtime
        self.companions: tuple[tuple[Item, ...], ...] = tuple((TokenItem(tuple(ids)),) for ids in companions)
        self._ids = 0

    def spec(self, ids: Sequence[int], sampling: SamplingSpec, seed: int, forced: Sequence[int] = ()) -> RequestSpec:
        self._ids += 1
        return RequestSpec(
            id=self._ids, items=(TokenItem(tuple(ids)),), sampling=sampling, seed=seed, forced=tuple(forced),
            companions=self.companions, salt=self._ids.to_bytes(8, "little"),
        )  # fmt: skip

    def send(self, specs: Sequence[RequestSpec], probe: Callable[[Mirrored, int, Tensor], None] | None = None) -> Sent:
        """Run the requests to their end.  Raises RequestError, CapacityError or EngineError for one that could not run."""
        engine, executor, sent = self.runtime.engine, self.runtime.executor, Sent()
        executor.watch(probe)
        began = time.perf_counter()
        events: list[Event] = [e for spec in specs for e in engine.add(spec, 0.0)]
        while engine.has_work:
            more, _ = step(engine, executor)
            events += more
            sent.kv_bytes = max(sent.kv_bytes, engine.pool.referenced * self.runtime.setup.block_bytes)
        sent.seconds = time.perf_counter() - began
        executor.watch(None)
        for event in events:
            if isinstance(event, Rejected):
                kind = CapacityError if event.kind == "capacity" else RequestError
                raise kind(event.message)
            if isinstance(event, Finished) and event.error is not None:
                raise EngineError(event.error)
            if isinstance(event, Tokens) and event.index == 0:
                sent.tokens.setdefault(event.id, []).extend(event.tokens)
        return sent

    def laws(self, asked: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[dict[int, Tensor]]:
        """Logits [vocab] by output index, for each (prompt, set continuation)."""
        found: list[dict[int, Tensor]] = [{} for _ in asked]

        def probe(sequence: Mirrored, output: int, logits_V: Tensor) -> None:
            found[sequence.seed][output] = logits_V.float().cpu().clone()

        specs = [
            self.spec(ids, SamplingSpec(temperature=0.0, max_tokens=len(forced)), i, forced)
            for i, (ids, forced) in enumerate(asked)
        ]
        self.send(specs, probe)
        return found


def compare(reference: Path, stack: Path, windows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[Scores]]:
    """Scores of each token of each window's continuation.  windows: (prompt, the text that follows it)."""
    out: list[list[Scores]] = []
    vocab = reference.runtime.setup.spec.vocab
    for group in _groups(windows, vocab):
        theirs, mine = reference.laws(group), stack.laws(group)
        for (_, text), p_all, q_all in zip(group, theirs, mine, strict=True):
            out.append([_score(p_all[i], q_all[i], token) for i, token in enumerate(text)])
    return out


def _groups(windows: Sequence[tuple[Sequence[int], Sequence[int]]], vocab: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    held = 0
    for window in windows:
        size = 4 * vocab * len(window[1])
        if group and (held + size > KEPT_BYTES or len(group) >= BATCH):
            yield group
            group, held = [], 0
        group.append(window)
        held += size
    if group:
        yield group


def _score(p_V: Tensor, q_V: Tensor, token: int) -> Scores:
    p, q = torch.log_softmax(p_V.double(), -1), torch.log_softmax(q_V.double(), -1)
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), torch.zeros((), dtype=p.dtype))
    return Scores(float(terms.sum()), int(p.argmax()) == int(q.argmax()), -float(p[token]), -float(q[token]))


def interval(scores: Sequence[Sequence[Scores]], rounds: int = 1000, seed: int = 1) -> tuple[float, float]:
    """95 % bootstrap interval of the mean kl, over whole windows (tokens of one window are not independent)."""
    rnd = random.Random(seed)
    sums = [(sum(s.kl for s in window), len(window)) for window in scores if window]
    means = []
    for _ in range(rounds):
        drawn = [sums[rnd.randrange(len(sums))] for _ in sums]
        means.append(sum(a for a, _ in drawn) / sum(n for _, n in drawn))
    means.sort()
    return means[int(0.025 * rounds)], means[min(rounds - 1, int(0.975 * rounds))]


def recall(
    path: Path, questions: Sequence[Question], decode: Callable[[Sequence[int]], str], stops: Sequence[int]
) -> float:
    """Share of questions that are answered without a fault, greedily."""
    right = 0
    law = SamplingSpec(temperature=0.0, max_tokens=ANSWER_TOKENS, stop_ids=tuple(stops))
    for at in range(0, len(questions), BATCH):
        group = questions[at : at + BATCH]
        specs = [path.spec(q.ids, law, i) for i, q in enumerate(group)]
        sent = path.send(specs)
        right += sum(q.right(decode(sent.tokens[s.id])) for q, s in zip(group, specs, strict=True))
    return right / len(questions)


def lengths(path: Path, prompts: Sequence[Sequence[int]], stops: Sequence[int]) -> tuple[float, float]:
    """(mean tokens of an answer, share of answers that end by themselves) under the model's own law, seeded."""
    law = SamplingSpec(temperature=0.7, top_p=0.95, max_tokens=LONGEST, stop_ids=tuple(stops))
    specs = [path.spec(ids, law, i) for i, ids in enumerate(prompts)]
    found = path.send(specs).tokens.values()
    return fmean(map(len, found)), fmean(tokens[-1] in law.stop_ids for tokens in found)


def race(
    reference: Path, stack: Path, prompts: Sequence[Sequence[int]], new: int, rounds: int, progress: Progress
) -> tuple[float, float]:
    """(speed, KV bytes) of the stack over the reference's: tokens a second and peak bytes, medians of `rounds` turns A B A B."""
    law = SamplingSpec(temperature=0.0, max_tokens=new)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    held = {False: 0, True: 0}
    for turn in range(rounds + 1):
        for path in (reference, stack):
            mine = path is stack
            sent = path.send([path.spec(ids, law, i) for i, ids in enumerate(prompts)])
            held[mine] = max(held[mine], sent.kv_bytes)
            if turn:  # the first turn warms up
                seconds[mine].append(sent.seconds)
        progress(f"speed, turn {turn} of {rounds}")
    return median(seconds[False]) / median(seconds[True]), held[True] / held[False]


def summary(scores: Sequence[Sequence[Scores]]) -> dict[str, Any]:
    """kl_mean, kl_ci95, top1 and ppl_ratio."""
    flat = [s for window in scores for s in window]
    return {
        "kl_mean": fmean(s.kl for s in flat),
        "kl_ci95": list(interval(scores)),
        "top1": fmean(s.top for s in flat),
        "ppl_ratio": math.exp(fmean(s.nll for s in flat) - fmean(s.reference_nll for s in flat)),
    }


def ratio(mine: tuple[float, float], theirs: tuple[float, float]) -> float | None:
    """Of lengths; None where no answer of the reference ends by itself, so that all are as long as they may be."""
    return mine[0] / theirs[0] if theirs[1] > 0 else None


def counted(found: float, reference: float) -> float | None:
    """A stack's recall, where the reference path recalls enough for it to mean something."""
    return found if reference >= LEAST else None


__all__ = ["Path", "Scores", "compare", "counted", "interval", "lengths", "race", "ratio", "recall", "summary"]
