"""The engine's pure half: requests in, plans out, facts in, events out.  No torch, no clock, no thread.

    engine = Engine(groups, blocks, limits, stack, layers=...)
    engine.add(spec, now)
    plan   = engine.schedule(now)
    events = engine.commit(now, plan, executor.execute(plan))

What programs may do to single sequences between a commit and the next schedule stands in `core.sequences`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from weft.config import Limits, Stack, Stacks, build_stack
from weft.core import handover, timeline
from weft.core.control import Chosen, Control
from weft.core.kv import KV
from weft.core.lateness import Lateness
from weft.core.pool import BlockPool
from weft.core.request import CutRule, Request, State
from weft.core.scheduler import Scheduler
from weft.core.sequences import Sequences
from weft.core.tiers import Exchange, TierIndex, record_bytes
from weft.errors import ConfigError, InvariantError
from weft.types import (
    Abandoned,
    Committed,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GroupSpec,
    KVOpKind,
    Made,
    Noted,
    Plan,
    Planned,
    Preempted,
    Rejected,
    Seen,
    StepResult,
    Tokens,
    Work,
    WorkResult,
)


class Engine(Sequences):
    """groups: KV groups of all models.  blocks: pool size.  models: names, the target first.  layers: of the target.

    vocab: ids are checked against it where it is given.  share: prefix sharing.  stack: the server's.  stacks: with those that
    requests lay over it, shared with an executor in the same process.  cuts: rules beside those of the stacks' techniques.
    in_flight: plans that may be submitted at once (1 on a CPU).  reach: positions that a model beside the target can compute.
    block_bytes: of the pool, whose tiers are sized by it.  control: choose how far ahead is guessed (`core.control`).
    exchange: where prompts are handed over, in the place of what is in the slot `kv.offload`; life: of the engine that writes
    there (see `TierIndex`).
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        blocks: int,
        limits: Limits,
        stack: Stack | Stacks | None = None,
        *,
        models: Sequence[str] = ("target",),
        layers: int = 1,
        vocab: int | None = None,
        share: bool = True,
        settings: bytes = b"",
        cuts: Sequence[CutRule] = (),
        in_flight: int = 1,
        reach: Mapping[str, int] | None = None,
        block_bytes: int | None = None,
        control: bool = False,
        exchange: Exchange | None = None,
        life: int | None = 0,
    ) -> None:
        stacks = stack if isinstance(stack, Stacks) else Stacks(stack or build_stack())
        self.stack = stacks.base
        self.most_in_flight = in_flight
        policy = self.stack["schedule"]
        pool, tiers, offload = BlockPool(blocks, self.stack["kv.evict"]), None, exchange or self.stack.get("kv.offload")
        if offload is not None and share:
            size = block_bytes or max(g.block_tokens * g.entry_bytes for g in groups)
            tiers = TierIndex(offload, record_bytes(groups, size), pool, life)
        kv = KV(groups, pool, models, settings=settings, share=share, tiers=tiers)
        if policy.layered and layers > 1 and kv.parked[0] is None:
            raise ConfigError(
                "this schedule stops rows between layers, and the engine has no KV group for their hidden states"
            )
        far = [(reach or {}).get(name, limits.max_model_len) for name in models]
        self.control = Control(limits.max_guesses, models) if control else None
        scheduler = Scheduler(kv, policy, limits, tuple(models), layers, self.stack, far, self.control)
        super().__init__(kv, scheduler, limits, tuple(models), vocab, stacks, cuts)
        self.made = Made(
            groups=tuple(groups), blocks=blocks, limits=asdict(limits), parts=tuple(str(p) for p in self.stack.parts),
            models=tuple(models), layers=layers, vocab=vocab, share=share, settings=settings, in_flight=in_flight,
            reach=dict(reach or {}), block_bytes=block_bytes, control=control,
        )  # fmt: skip
        if getattr(policy, "refuses", False):
            self.lateness = Lateness(policy, kv, limits)
        self._layers = layers
        self._step = 0
        self._flights: dict[int, list[tuple[Request, int]]] = {}
        self._loads: dict[int, list[tuple[Request, int]]] = {}
        """By plan in flight, the requests that it loads blocks for, and their lives."""
        self._generated = self._prompted = self._finished = self._refused = 0
        self._rows = 0
        self._masked = self._masked_steps = 0
        self._mask_s = 0.0

    @property
    def has_work(self) -> bool:
        """Something is running, waiting or still to be told to the executor."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.scheduler.leaving)

    # ------------------------------------------------------------------ the step

    def schedule(self, now: float) -> tuple[Plan, list[Event]]:
        """The next plan, and an event for each sequence that was preempted to make it, or is refused as too late for it."""
        if len(self._flights) >= self.most_in_flight:
            raise InvariantError(f"{len(self._flights)} plans are in flight; commit one first")
        self._step += 1
        refused = self._refuse(now)
        d, plan = self.scheduler.plan(now, self._step)
        self._flights[self._step] = [(r, r.generation) for r in d.requests]
        self._loads[self._step] = [(r, r.generation) for r in d.loading]
        self.pool.submitted(self._step)
        self.kv.submitted()
        self._rows = plan.rows
        if self.lateness is not None:
            self.lateness.planned(plan.step, now, plan.rows, d.view.prompt_rows)
        told: list[Event] = [
            Preempted(r.id, r.index) for r in d.preempted if r.leader is None and r.id not in self.programs
        ]
        if self.tap is not None:
            preempted = tuple((e.id, e.index) for e in told if isinstance(e, Preempted))
            self.tap(Planned(now, plan, preempted, tuple(e.id for e in refused)))
        if self.timed:
            told += [n for n in timeline.planned(d.requests, plan, self.models[0]) if n.id not in self.programs]
            self.timed = bool(self._live)
        return plan, [*refused, *told]

    def _refuse(self, now: float) -> list[Rejected]:
        """Let go of those who can't be in time any more, where the schedule says so."""
        if self.lateness is None or not self.scheduler.waiting:
            return []
        told = []
        for late in self.lateness.find(self.scheduler.waiting, self.scheduler.running.values(), now):
            told.append(Rejected(late.request.id, late.text(now), "capacity", code="too_late"))
            self._cancel(late.request.id, None)
        self._refused += len(told)
        return told

    def seen(self, plan: Plan, *, blocks: bool = True) -> Seen:
        """What a plan in flight is made of, and who holds the blocks of the pool."""
        return timeline.seen(plan, self.models[0], self._live.values(), self.pool if blocks else None)

    def members(self, plan: Plan) -> tuple[int, ...]:
        """Ids of the requests that a plan in flight computes for, ascending."""
        return tuple(sorted({r.id for r, _ in self._flights[plan.step]}))

    def behind(self, plan: Plan) -> tuple[tuple[int, int, int], ...]:
        """Of a plan in flight, as `EngineFrame.behind`."""
        if self._rows == len(plan.works):  # a row each: nobody is behind by more than a plan
            return ()
        flight = zip(self._flights[plan.step], plan.works, strict=True)
        return tuple(
            (r.id, r.computed[0], work.stop) for (r, _), work in flight
            if len(r.context) - r.computed[0] > 1 and work.model == self.models[0]
        )  # fmt: skip

    def commit(self, now: float, plan: Plan, result: StepResult) -> list[Event]:
        """Take in what a plan became.  Plans commit in the order in which they were made."""
        if plan.step != next(iter(self._flights), None):
            raise InvariantError(f"step {plan.step} is committed out of order; in flight: {list(self._flights)}")
        if result.step != plan.step or len(result.works) != len(plan.works):
            raise InvariantError(
                f"step {plan.step} does not match its result (step {result.step}, {len(result.works)} works)"
            )
        if self.tap is not None:
            self.tap(Committed(now, result))
        lives = self._flights.pop(plan.step)
        if self.lateness is not None:
            self.lateness.committed(plan.step, now, plan.rows)
        flight = zip(lives, plan.works, result.works, strict=True)
        if self.control is not None and self.scheduler.guessed:
            self.control.observe(plan, [r for r, _ in lives], result)
        self.pool.now = now
        self._masked += result.masked
        self._masked_steps += result.masked > 0
        self._mask_s += result.mask_s
        events: list[Event] = []
        self._loaded(now, plan, set(result.lost))
        # Told before anything is taken in: what falls short of one model's rows does not undo another model's.
        taken = [(r, r.generation == generation, work, fact) for (r, generation), work, fact in flight]
        for r, _, _, _ in taken:
            r.in_flight -= 1
        if len(self.models) > 1 or self.scheduler.links:
            taken.sort(key=self._turn)
        for r, counts, work, fact in taken:
            if counts and r.state is not State.DONE:
                self._take(r, work, fact, now, events)
        self.pool.committed(plan.step)
        return self.programs.settle(events, now)

    def _turn(self, taken: tuple[Request, bool, Work, WorkResult]) -> bool:
        """False for what is taken in first: companions, whom their leader tells the token and whether they go on, and what other
        models computed of a prompt that is about to be forked, so that the forks share it."""
        r, _, work, _ = taken
        return r.leader is None and (r.fanned or work.model == self.models[0])

    def _loaded(self, now: float, plan: Plan, lost: set[int]) -> None:
        """Blocks that the plan loaded stand; who waited for one that is lost starts again, and finds that it is not there."""
        self.kv.lost(lost)
        bad = {
            block for op in plan.kv if op.kind is KVOpKind.LOAD
            for block, ticket in zip(op.target, op.argument, strict=True) if ticket in lost
        }  # fmt: skip
        for request, generation in self._loads.pop(plan.step):
            request.in_flight -= 1
            if request.generation != generation:
                continue
            request.loading = False
            if bad and any(block in bad for table in request.tables for block in table.blocks):
                self.scheduler.restart(request, now)

    def abandon(self, plan: Plan, now: float) -> None:
        """An executor broke off inside a plan, and nobody knows how far it came: all who run are computed anew."""
        if self.tap is not None:
            self.tap(Abandoned(now, plan.step))
        if self.lateness is not None:
            self.lateness.abandoned(plan.step, now)
        for request, _ in (*self._flights.pop(plan.step), *self._loads.pop(plan.step)):
            request.in_flight -= 1
        self.kv.lost(t for op in (*plan.kv, *plan.after) if op.kind is KVOpKind.SAVE for t in op.argument)
        self.pool.committed(plan.step)
        self.scheduler.leaving.extend(plan.leave)  # the executor may not have heard of it; to leave twice does no harm
        ran = list(self.scheduler.running.values())
        for request in ran:
            if request.state is State.RUNNING:
                self.scheduler.preempt(request)
        for request in ran:
            self.scheduler.enqueue(request, now)

    def _take(self, r: Request, work: Work, fact: WorkResult, now: float, events: list[Event]) -> None:
        if r.spec.hand_over and work.samples and (fact.failed is not None or not fact.tokens):
            handover.undo(self.kv, r)
        if fact.failed is not None:
            self._end(r.leader or r, "error", events, error=fact.failed, code=fact.code)
            return
        m = 0 if work.model == self.models[0] else self.models.index(work.model)
        planned = len(work.tokens) - work.guesses
        rows = min(fact.rows, planned + work.ahead)
        full = rows >= planned
        if rows < 0 or len(fact.tokens) > work.guesses + 1 or bool(fact.tokens) is not (work.samples and full):
            raise InvariantError(
                f"step result: {fact.rows} rows and {len(fact.tokens)} tokens do not answer a work of {planned} rows and "
                f"{work.guesses} guesses that {'samples' if work.samples else 'does not sample'}"
            )
        if work.layers is not None:
            if work.layers[1] < self._layers:
                # Rows that fell short have to start again from the first layer; those that passed go on.
                r.partial = (work.start, work.start + rows, work.layers[1]) if rows else (*work.rows[0], work.layers[0])
                return
            r.partial = None
            self.kv.unpark(r, m)
        before = r.computed[m]
        accepted = len(fact.tokens) - 1 if work.guesses and fact.tokens else 0
        if r.spec.timeline and work.guesses and r.id not in self.programs:
            events.append(Noted(r.id, r.index, "speculation", {"guesses": work.guesses, "accepted": accepted}))
        r.computed[m] = before + rows + accepted
        if full:
            r.planned[m] = max(r.planned[m], r.computed[m])
        else:
            # What was planned on top of a short result, in a later plan, never happened.
            r.planned[m] = r.computed[m]
            r.generation += m == 0
        self.kv.advance(r, m, rows + accepted, fact.kept)
        if m == 0:
            if before < r.prompt:
                self._prompted += min(r.computed[0], r.prompt) - before
            if r.leader is None:
                self._tokens(r, work, fact, now, events)
        if r.state is not State.DONE:
            self.kv.publish(r, m)

    def _tokens(self, r: Request, work: Work, fact: WorkResult, now: float, events: list[Event]) -> None:
        told = fact.prompt_logprobs[max(0, r.reported - work.start) :] if work.prompt_rows else ()
        r.reported += len(told)
        if not fact.tokens:
            if told:
                events.append(Tokens(r.id, r.index, (), (), told))
            for c in r.companions if work.samples else ():
                if c.computed[0] == len(c.context):  # the leader fell short, and needs their last row once more
                    self._recompute_from(c, len(c.context))
            return
        if not r.fanned:
            self._fan_out(r, now)
        stand: list[int] = []
        reason: FinishReason | None = None
        stop_id: int | None = None
        for token in fact.tokens:
            r.output.append(token)
            r.context.append(token)
            stand.append(token)
            longest = len(r.context)
            for c in r.companions:
                c.output.append(token)
                c.context.append(token)
                longest = max(longest, len(c.context))
            s = r.sampling
            ended = fact.ended and len(stand) == len(fact.tokens)
            if (ended or (token in s.stop_ids and len(r.output) > s.min_tokens)) and not s.steered:
                reason, stop_id = "stop", token
            elif len(r.output) >= s.max_tokens or longest >= self.limits.max_model_len:
                reason = "length"
            if reason is not None:
                break
        self._generated += len(stand)
        cached = r.cached_tokens if len(r.output) == len(stand) else 0
        events.append(Tokens(r.id, r.index, tuple(stand), fact.logprobs[: len(stand)], told, cached))
        if reason is not None:
            self._end(r, reason, events, stop_id=stop_id, vector=fact.vector)
        elif not r.single:
            r.draft, r.parents = fact.draft, fact.parents

    def _end(
        self,
        r: Request,
        reason: FinishReason,
        events: list[Event],
        *,
        stop_id: int | None = None,
        error: str | None = None,
        code: str | None = None,
        vector: bytes = b"",
    ) -> None:
        for m in range(len(self.models)):
            self.kv.publish(r, m)
        told = handover.tickets(self.kv, r) if r.spec.hand_over and error is None else ()
        for index in (r.index,) if r.fanned else range(r.spec.n):
            events.append(
                Finished(r.id, index, reason, stop_id, r.cached_tokens, error, code=code, vector=vector, stored=told)
            )
        for c in r.companions:
            self.kv.publish(c, 0)
        self._leave(r)
        self._finished += 1

    def _fan_out(self, parent: Request, now: float) -> None:
        """The prompt is computed: the other sequences of the request share it from here."""
        parent.fanned = True
        for index in range(1, parent.spec.n):
            self._fork(parent, index, now)

    # ------------------------------------------------------------------ figures and proof

    @property
    def stats(self) -> EngineStats:
        """A snapshot; times are the caller's to add."""
        s, chosen = self.scheduler, Chosen() if self.control is None else self.control.chosen
        return EngineStats(
            refused=self._refused, steps=self._step, running=len(s.running), waiting=len(s.waiting),
            kv_blocks_total=self.pool.total, kv_blocks_referenced=self.pool.referenced, kv_blocks_cached=self.pool.cached,
            prompt_tokens=self._prompted, generation_tokens=self._generated,
            prefix_hit_tokens=s.hit_tokens, prefix_query_tokens=s.queried_tokens,
            preemptions=s.preemptions, evictions=self.pool.evictions, finished=self._finished, rows=self._rows,
            acts=self.stacks.acts(), masked_rows=self._masked, masked_steps=self._masked_steps, mask_s=self._mask_s,
            draft_sequences=chosen.sequences, draft_guesses=chosen.guesses, draft_off=chosen.off, draft_probes=chosen.probes,
        )  # fmt: skip

    def check(self) -> None:
        """Every invariant of requests, tables and pool; O(blocks).  Raises InvariantError."""
        self.kv.check(self._live.values())
        s = self.scheduler
        for r in self._live.values():
            places = (r.rid in s.running) + (r.rid in s.waiting) + (r.rid in s.parked)
            if places != 1:
                raise InvariantError(f"request {r.id}.{r.index} is in {places} of running, waiting, parked")
        if len(self._live) != len(s.running) + len(s.waiting) + len(s.parked):
            raise InvariantError("a request that is not live is still scheduled")
