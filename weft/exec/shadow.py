"""Shadow checks: a sampled share of a live server's requests is computed once more on the reference path, and the drift told.

The laws from which a sampled request drew its first tokens are kept; when it has ended, an engine over the same weights, without
the techniques that are checked, computes the same tokens, and the divergence of its laws is what the stack did to the answer.
Checks run when nobody waits, or in every `EVERY`-th step.

Legend.  kl: divergence of the stack's law from the reference's, nats per token at temperature 1.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import msgspec
import torch
from torch import Tensor

from weft.compose import traits_of
from weft.core import noise
from weft.core.ledger import blocks_for
from weft.errors import CapacityError, ConfigError
from weft.exec.build import Runtime, Setup, build, prepare
from weft.exec.kvpool import pool_bytes
from weft.exec.mirror import Mirrored
from weft.exec.thread import step
from weft.traits import Effect
from weft.types import EngineStats, Event, Finished, Rejected, RequestSpec, Tokens

log = logging.getLogger("weft.shadow")

MOST_TOKENS = 32
"""Tokens of a request that are checked: the first ones."""
MOST_OPEN = 4
"""Requests whose laws are kept at once; more are not sampled."""
EVERY = 8
"""Steps of a busy engine between two steps of a check."""
RECENT = 32
"""Requests over which the drift is averaged, and the alarm decided."""


@dataclass(slots=True)
class Kept:
    """A sampled request: what it asked, the laws of its first tokens by output index, and its output so far."""

    spec: RequestSpec
    laws: dict[int, Tensor] = field(default_factory=dict)
    output: list[int] = field(default_factory=list)


class Shadow:
    """share: of requests, 0 to 1.  alarm: mean kl above which the drift is too much, or None."""

    def __init__(self, runtime: Runtime, share: float, alarm: float | None = None, seed: int = 0) -> None:
        check_options(share, alarm)
        self.share, self.alarm, self._seed = share, alarm, seed
        self._engine = runtime.engine
        self._reference = reference(runtime)
        self._open: dict[int, Kept] = {}
        self._rids: dict[int, int] = {}
        self._waiting: deque[Kept] = deque()
        self._now: Kept | None = None
        self._found: dict[int, Tensor] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._steps = 0
        self.requests = self.tokens = self.skipped = 0
        self.alarmed = False
        runtime.executor.watch(self._probe)
        self._reference.executor.watch(self._collect)

    # ------------------------------------------------------------------ what the live engine does

    def admit(self, spec: RequestSpec) -> None:
        """A request was added: perhaps it is one of the sample."""
        if noise.uniform(self._seed, 0, noise.mix(spec.seed ^ noise.mix(spec.id)) & 0x7FFFFFFF) >= self.share:
            return
        stack = self._engine.stacks.of(spec.techniques)
        if spec.n > 1 or spec.resumed or stack.get("search") is not None or len(self._open) >= MOST_OPEN:
            self.skipped += 1
            return
        self._open[spec.id] = Kept(spec)
        self._rids[self._engine.find(spec.id).rid] = spec.id

    def see(self, events: Sequence[Event]) -> None:
        """What came of a step."""
        for event in events:
            kept = self._open.get(event.id)
            if kept is None:
                continue
            if isinstance(event, Tokens):
                kept.output += event.tokens
            elif isinstance(event, Finished | Rejected):
                self._forget(event.id)
                if isinstance(event, Finished) and event.reason in ("stop", "length") and kept.laws:
                    self._waiting.append(kept)

    def cancelled(self, id: int) -> None:
        if id in self._open:
            self._forget(id)

    def _forget(self, id: int) -> None:
        del self._open[id]
        self._rids = {rid: other for rid, other in self._rids.items() if other != id}

    def _probe(self, sequence: Mirrored, output: int, logits_V: Tensor) -> None:
        id = self._rids.get(sequence.request)
        if id is not None and output < MOST_TOKENS:
            self._open[id].laws[output] = logits_V.float().cpu().clone()

    # ------------------------------------------------------------------ the checks

    @property
    def busy(self) -> bool:
        """A check is to be done."""
        return self._now is not None or bool(self._waiting)

    def turn(self, idle: bool) -> bool:
        """One step of a check, where there is one, and the live engine can spare the time; whether a check has ended."""
        self._steps += 1
        if not self.busy or not (idle or self._steps % EVERY == 0):
            return False
        engine = self._reference.engine
        if self._now is None:
            self._begin(self._waiting.popleft())
        if engine.has_work:
            step(engine, self._reference.executor)
        ended = not engine.has_work
        if ended:
            self._end()
        return ended

    def _begin(self, kept: Kept) -> None:
        self._now, self._found = kept, {}
        forced = tuple(kept.output[: max(kept.laws) + 1])
        law = msgspec.structs.replace(
            kept.spec.sampling, max_tokens=len(forced), stop_ids=(), logprobs=-1, prompt_logprobs=-1
        )
        spec = msgspec.structs.replace(kept.spec, sampling=law, forced=forced, techniques=self._redefining(kept.spec))
        for event in self._reference.engine.add(spec, 0.0):
            log.warning("a shadow check could not begin: %s", getattr(event, "message", event))
            self.skipped += 1

    def _redefining(self, spec: RequestSpec) -> tuple[str, ...]:
        """Parts that make the answer another one on purpose stay: they are not what is checked."""
        parts = self._engine.stacks.of(spec.techniques).parts
        return tuple(str(p) for p in parts if Effect.REDEFINES in traits_of(p).effects)

    def _collect(self, sequence: Mirrored, output: int, logits_V: Tensor) -> None:
        self._found[output] = logits_V.float().cpu().clone()

    def _end(self) -> None:
        assert self._now is not None
        kept, self._now = self._now, None
        both = sorted(kept.laws.keys() & self._found.keys())
        if not both:
            return
        divergences, same = [], []
        for output in both:
            p, q = (torch.log_softmax(x[output].double(), -1) for x in (self._found, kept.laws))
            divergences.append(
                float(torch.where(p > -torch.inf, p.exp() * (p - q), torch.zeros((), dtype=p.dtype)).sum())
            )
            same.append(float(int(p.argmax()) == int(q.argmax())))
        self.requests += 1
        self.tokens += len(both)
        self._recent.append((fmean(divergences), fmean(same)))
        high = self.alarm is not None and self.kl > self.alarm
        if high and not self.alarmed:
            log.warning("the stack drifts: mean divergence %.4g nats per token over the last %d checked requests, alarm at %.4g",
                        self.kl, len(self._recent), self.alarm)  # fmt: skip
        self.alarmed = high

    @property
    def kl(self) -> float:
        """Mean over the recent requests."""
        return fmean(kl for kl, _ in self._recent) if self._recent else 0.0

    @property
    def top1(self) -> float:
        """Share of tokens of the recent requests whose likeliest token is the reference's."""
        return fmean(top for _, top in self._recent) if self._recent else 1.0

    def told(self, stats: EngineStats) -> EngineStats:
        """The statistics with those of the checks."""
        return msgspec.structs.replace(
            stats, shadow_requests=self.requests, shadow_tokens=self.tokens, shadow_skipped=self.skipped, shadow_kl=self.kl,
            shadow_top1=self.top1, shadow_alarm=int(self.alarmed),
        )  # fmt: skip


def check_options(share: float, alarm: float | None) -> None:
    """Raise ConfigError for a share that is none, or an alarm that no divergence could raise."""
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"--shadow is a share of the requests, above 0 and at most 1, got {share}")
    if alarm is not None and not 0.0 < alarm < float("inf"):
        raise ConfigError(f"--shadow-alarm is a divergence in nats per token, above 0, got {alarm}")


def planned(setup: Setup) -> Setup:
    """The set-up with the memory of the checks in its plan.  Raises CapacityError where that does not fit any more."""
    plain, plan = _plain(setup), setup.plan
    more = pool_bytes(plain.groups, plain.plan.kv_blocks, plain.block_bytes) + plain.plan.workspace_bytes
    if plan.total_bytes + more > plan.available_bytes:
        raise CapacityError(
            f"shadow checks need {more >> 20:,} MiB for an engine of their own, beside {plan.total_bytes >> 20:,} MiB, and "
            f"{plan.available_bytes >> 20:,} MiB are available; give weft less --memory, or leave --shadow out"
        )
    wider = replace(plan, reserve_bytes=plan.reserve_bytes + more, total_bytes=plan.total_bytes + more)
    return replace(setup, plan=wider)


def reference(runtime: Runtime) -> Runtime:
    """An engine over the same weights that has no technique and room for one request."""
    return build(_plain(runtime.setup), like=runtime)


def _plain(setup: Setup) -> Setup:
    """Without techniques, with the blocks of two sequences of full length: a request's own, and one that it contrasts with."""
    limits = setup.limits
    plain = prepare(replace(setup.config, techniques=(), kv="auto", max_model_len=limits.max_model_len, max_num_seqs=4))
    blocks = 2 * blocks_for(plain.groups, limits.max_model_len, plain.limits.max_rows)
    return replace(plain, plan=replace(plain.plan, kv_blocks=blocks, fits=True))
