"""The engine's pure half: requests in, plans out, facts in, events out.  No torch, no clock, no thread.

    engine = Engine(groups, blocks, limits, stack, layers=...)
    engine.add(spec, now)
    plan   = engine.schedule(now)
    events = engine.commit(now, plan, executor.execute(plan))

`append`, `truncate`, `fork`, `park`, `resume` and `link` are operations on one sequence for programs that steer generation
(search, drafts of other kinds, contrast); they may be called between a commit and the next schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.config import Limits, Stack, build_stack
from weft.core import noise
from weft.core.kv import KV
from weft.core.pool import BlockPool
from weft.core.request import CutRule, Request, State, every
from weft.core.scheduler import Scheduler
from weft.errors import CapacityError, EngineError, InvariantError, RequestError
from weft.types import (
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GroupSpec,
    Plan,
    Preempted,
    Rejected,
    RequestSpec,
    StepResult,
    Tokens,
    Work,
    WorkResult,
)


class Engine:
    """groups: KV groups of all models.  blocks: pool size.  models: names, the target first.  layers: of the target.

    vocab: ids are checked against it where it is given.  share: prefix sharing.  cuts: rules of the stack's techniques.
    in_flight: plans that may be submitted at once (1 on a CPU).
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        blocks: int,
        limits: Limits,
        stack: Stack | None = None,
        *,
        models: Sequence[str] = ("target",),
        layers: int = 1,
        vocab: int | None = None,
        share: bool = True,
        settings: bytes = b"",
        cuts: Sequence[CutRule] = (),
        in_flight: int = 1,
    ) -> None:
        self.limits = limits
        self.stack = stack or build_stack()
        self.vocab = vocab
        self.cut = every(cuts)
        self.most_in_flight = in_flight
        history = self.stack.verdict.history
        self.pool = BlockPool(blocks, self.stack["kv.evict"])
        self.kv = KV(groups, self.pool, models, settings=settings, share=share, history=history)
        self.models = tuple(models)
        self.scheduler = Scheduler(self.kv, self.stack["schedule"], limits, self.models, layers)
        self._layers = layers
        self._live: dict[int, Request] = {}
        self._by_id: dict[int, dict[int, int]] = {}
        self._rids = 0
        self._links = 0
        self._step = 0
        self._arrivals = 0.0
        self._flights: dict[int, list[tuple[Request, int]]] = {}
        self._generated = self._prompted = self._finished = 0
        self._rows = 0

    # ------------------------------------------------------------------ requests

    def add(self, spec: RequestSpec, now: float) -> list[Event]:
        """Accept a request, or refuse it with a Rejected event (never an exception for a client's mistake)."""
        try:
            self._check(spec)
            first = self._new(spec, 0, now)
        except RequestError as error:
            return [Rejected(spec.id, str(error), "request", error.param, error.code)]
        except CapacityError as error:
            return [Rejected(spec.id, str(error), "capacity")]
        self.scheduler.enqueue(first, now)
        return []

    def cancel(self, id: int, index: int | None = None) -> bool:
        """Forget a request, or one sequence of it, at any moment; False where nothing of it lives.

        A first sequence that is still to fan out into the others stands for all of them and is not cancelled alone.
        """
        family = self._by_id.get(id, {})
        chosen = list(family) if index is None else [i for i in (index,) if i in family]
        for i in chosen:
            request = self._live[family[i]]
            if index == 0 and request.spec.n > 1 and not request.output:
                return False
            del self._live[family.pop(i)]
            self.scheduler.remove(request)
        if not family:
            self._by_id.pop(id, None)
        return bool(chosen)

    @property
    def has_work(self) -> bool:
        """Something is running, waiting or still to be told to the executor."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.scheduler.leaving)

    def requests(self) -> list[Request]:
        return list(self._live.values())

    def find(self, id: int, index: int = 0) -> Request:
        """The live sequence `index` of request `id`.  Raises RequestError."""
        try:
            return self._live[self._by_id[id][index]]
        except KeyError:
            raise RequestError(f"request {id}.{index} does not live") from None

    # ------------------------------------------------------------------ the step

    def schedule(self, now: float) -> tuple[Plan, list[Event]]:
        """The next plan, and an event for each sequence that was preempted to make it."""
        if len(self._flights) >= self.most_in_flight:
            raise InvariantError(f"{len(self._flights)} plans are in flight; commit one first")
        self._step += 1
        plan, requests, preempted = self.scheduler.plan(now, self._step)
        self._flights[self._step] = [(r, r.generation) for r in requests]
        self.pool.submitted(self._step)
        self._rows = plan.rows
        return plan, [Preempted(r.id, r.index) for r in preempted]

    def commit(self, now: float, plan: Plan, result: StepResult) -> list[Event]:
        """Take in what a plan became.  Plans commit in the order in which they were made."""
        flight = self._flights.pop(plan.step, None)
        if flight is None or result.step != plan.step or len(result.works) != len(plan.works):
            raise InvariantError(f"step {plan.step} does not match its result (step {result.step}, {len(result.works)} works)")
        self.pool.now = now
        events: list[Event] = []
        for (request, generation), work, fact in zip(flight, plan.works, result.works, strict=True):
            request.in_flight -= 1
            if request.state is not State.DONE and request.generation == generation:
                self._take(request, work, fact, now, events)
        self.pool.committed(plan.step)
        return events

    def _take(self, r: Request, work: Work, fact: WorkResult, now: float, events: list[Event]) -> None:
        if fact.failed is not None:
            self._end(r, "error", events, error=fact.failed)
            return
        m = self.models.index(work.model)
        if work.layers is not None and work.layers[1] < self._layers:
            r.partial = (work.start, work.stop, work.layers[1])
            return
        if work.layers is not None:
            r.partial = None
            self.kv.unpark(r, m)
        planned_rows = work.count - work.guesses
        if fact.rows < planned_rows:
            # A short result: what was planned on top of it, in this plan or a later one, never happened.
            r.generation += 1
        rows = min(fact.rows, planned_rows)
        before = r.computed[m]
        accepted = max(0, len(fact.tokens) - 1) if work.guesses else 0
        r.computed[m] = before + rows + accepted
        r.planned[m] = max(r.computed[m], r.planned[m] + accepted) if rows == planned_rows else r.computed[m]
        self.kv.advance(r, m, rows + accepted, fact.kept)
        if m == 0:
            self._prompted += max(0, min(r.computed[0], r.prompt) - min(before, r.prompt))
            self._tokens(r, work, fact, now, events)
        if r.state is not State.DONE:
            self.kv.publish(r, m)

    def _tokens(self, r: Request, work: Work, fact: WorkResult, now: float, events: list[Event]) -> None:
        told = fact.prompt_logprobs[max(0, r.reported - work.start) :] if work.prompt_rows else ()
        r.reported += len(told)
        if not fact.tokens:
            if told:
                events.append(Tokens(r.id, r.index, (), (), told))
            return
        if r.index == 0 and not r.output and r.spec.n > 1:
            self._fan_out(r, now)
        if r.link is not None and r.state is State.RUNNING:
            r.draft = ()
        stand: list[int] = []
        reason: FinishReason | None = None
        stop_id: int | None = None
        for token in fact.tokens:
            r.output.append(token)
            r.context.append(token)
            stand.append(token)
            if token in r.sampling.stop_ids and len(r.output) > r.sampling.min_tokens:
                reason, stop_id = "stop", token
            elif len(r.output) >= r.sampling.max_tokens or len(r.context) >= self.limits.max_model_len:
                reason = "length"
            if reason is not None:
                break
        self._generated += len(stand)
        events.append(Tokens(r.id, r.index, tuple(stand), fact.logprobs[: len(stand)], told))
        if reason is not None:
            self._end(r, reason, events, stop_id=stop_id)
        else:
            r.draft = fact.draft

    def _end(
        self, r: Request, reason: FinishReason, events: list[Event], *, stop_id: int | None = None, error: str | None = None
    ) -> None:
        self.kv.publish(r, 0)
        events.append(Finished(r.id, r.index, reason, stop_id, r.cached_tokens, error))
        self.scheduler.remove(r)
        self._live.pop(r.rid, None)
        family = self._by_id.get(r.id)
        if family is not None:
            family.pop(r.index, None)
            if not family:
                del self._by_id[r.id]
        self._finished += 1

    def _fan_out(self, parent: Request, now: float) -> None:
        """The prompt is computed: the other sequences of the request share it from here."""
        for index in range(1, parent.spec.n):
            child = self._new(parent.spec, index, now, arrival=parent.arrival)
            child.reported = parent.prompt
            self._enter_fork(parent, child, now)

    # ------------------------------------------------------------------ operations on one sequence

    def append(self, id: int, tokens: Sequence[int], index: int = 0) -> None:
        """Put tokens into the context that are not output (a search's own words)."""
        r = self._still(id, index)
        if len(r.context) + len(tokens) + 1 > self.limits.max_model_len:
            raise RequestError(f"{len(tokens)} more tokens exceed the context of {self.limits.max_model_len}")
        self._check_ids(tokens)
        r.context.extend(tokens)
        r.draft = ()

    def truncate(self, id: int, length: int, index: int = 0) -> None:
        """Cut the context to its first `length` positions, and the output with it; never into nothing."""
        r = self._still(id, index)
        if not 1 <= length <= len(r.context):
            raise RequestError(f"a context of {len(r.context)} cannot be cut to {length}")
        cut = len(r.context) - length
        del r.context[length:]
        del r.output[max(0, len(r.output) - cut) :]
        r.prompt = min(r.prompt, length)
        r.spans = tuple(s for s in r.spans if s.stop <= length)
        r.draft = ()
        for size, names in r.names.items():
            del names[length // size :]
        self._recompute_from(r, length)

    def fork(self, id: int, index: int, *, source: int = 0, seed: int | None = None, now: float = 0.0) -> None:
        """A new sequence `index` of request `id` that goes on from where `source` stands.  A fork is an admission."""
        parent = self._still(id, source)
        if index in self._by_id[id]:
            raise RequestError(f"request {id} already has a sequence {index}")
        child = self._new(parent.spec, index, now, arrival=parent.arrival, seed=seed)
        child.context, child.output = list(parent.context), list(parent.output)
        child.prompt, child.spans, child.vectors = parent.prompt, parent.spans, parent.vectors
        child.names = {size: list(names) for size, names in parent.names.items()}
        child.reported = parent.reported
        self._enter_fork(parent, child, now)

    def park(self, id: int, index: int = 0) -> None:
        """Stop advancing; the KV stays while nobody needs its room."""
        r = self._still(id, index)
        self.scheduler.waiting.pop(r.rid, None)
        self.scheduler.running.pop(r.rid, None)
        self.scheduler.parked[r.rid] = r
        r.generation += 1
        r.state = State.PARKED

    def resume(self, id: int, index: int = 0, now: float = 0.0) -> None:
        """Let a parked sequence advance again."""
        r = self.find(id, index)
        if r.state is not State.PARKED:
            raise RequestError(f"request {id}.{index} is not parked")
        del self.scheduler.parked[r.rid]
        room = len(self.scheduler.running) < self.limits.max_num_seqs
        if any(t.blocks for t in r.tables) and room:
            r.state = State.RUNNING
            self.scheduler.running[r.rid] = r
            return
        if r.started:
            self.scheduler.leaving.append(r.rid)
        self.kv.release(r)
        self.scheduler.enqueue(r, now)

    def link(self, members: Sequence[tuple[int, int]]) -> int:
        """Sample these sequences together from now on: one token, the same for all.  Returns the link's number."""
        family = [self._still(id, index) for id, index in members]
        if len({r.rid for r in family}) < 2:
            raise RequestError("a link joins at least two sequences")
        if len(family) > min(self.limits.max_num_seqs, self.limits.max_samples):
            raise CapacityError(f"{len(family)} linked sequences exceed the {self.limits.max_num_seqs} that run at once")
        need = sum(self.scheduler.footprint(r) for r in family)
        if need > self.pool.total:
            raise CapacityError(f"{len(family)} linked sequences need {need} KV blocks together, the pool has {self.pool.total}")
        self._links += 1
        for r in family:
            r.link = self._links
        return self._links

    # ------------------------------------------------------------------ figures and proof

    @property
    def stats(self) -> EngineStats:
        """A snapshot; times are the caller's to add."""
        s = self.scheduler
        return EngineStats(
            steps=self._step, running=len(s.running), waiting=len(s.waiting), kv_blocks_total=self.pool.total,
            kv_blocks_referenced=self.pool.referenced, kv_blocks_cached=self.pool.cached, prompt_tokens=self._prompted,
            generation_tokens=self._generated, prefix_hit_tokens=s.hit_tokens, prefix_query_tokens=s.queried_tokens,
            preemptions=s.preemptions, evictions=self.pool.evictions, finished=self._finished, rows=self._rows,
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

    # ------------------------------------------------------------------ inside

    def _new(
        self, spec: RequestSpec, index: int, now: float, *, arrival: float | None = None, seed: int | None = None
    ) -> Request:
        self._rids += 1
        if arrival is None:
            # Two requests of one instant still have an order.
            arrival = self._arrivals = max(now, self._arrivals + 1e-9)
        own = noise.child_seed(spec.seed, index) if seed is None else seed
        r = Request(
            self._rids, spec, index=index, seed=own, arrival=arrival, models=len(self.models), groups=len(self.kv.groups)
        )
        r.cut = self.cut
        need = self.scheduler.footprint(r)
        if need > self.pool.total:
            raise CapacityError(
                f"the request may reach {min(r.limit, self.limits.max_model_len)} tokens = {need} KV blocks, "
                f"but the pool has {self.pool.total}; ask for fewer max_tokens, or give weft more --memory"
            )
        self._live[r.rid] = r
        self._by_id.setdefault(spec.id, {})[index] = r.rid
        return r

    def _enter_fork(self, parent: Request, child: Request, now: float) -> None:
        room = len(self.scheduler.running) < self.limits.max_num_seqs
        if room and parent.state is State.RUNNING and self.kv.fork(parent, child):
            child.state = State.RUNNING
            self.scheduler.running[child.rid] = child
        else:
            self.scheduler.enqueue(child, now)

    def _recompute_from(self, r: Request, length: int) -> None:
        r.partial = None
        for m in range(len(self.models)):
            self.kv.unpark(r, m)
            keep = min(r.computed[m], length - 1)
            if keep < r.computed[m]:
                if not self.kv.truncate(r, m, keep):
                    if r.started:
                        self.scheduler.leaving.append(r.rid)
                    self.kv.release(r)
                    if r.state is State.RUNNING:
                        del self.scheduler.running[r.rid]
                        self.scheduler.enqueue(r, r.arrival)
                    return
                r.computed[m] = r.planned[m] = keep

    def _still(self, id: int, index: int) -> Request:
        r = self.find(id, index)
        if r.in_flight:
            raise EngineError(f"request {id}.{index} is in a plan in flight; commit it first")
        return r

    def _check(self, spec: RequestSpec) -> None:
        if spec.id in self._by_id:
            raise RequestError(f"request id {spec.id} is already live")
        if len(self.scheduler.waiting) >= self.limits.max_waiting:
            raise CapacityError(f"{self.limits.max_waiting} requests are waiting already; try again later")
        rows = 0
        for item in spec.items:
            rows += item.rows
            self._check_ids(getattr(item, "ids", ()))
        rows += len(spec.resumed)
        self._check_ids(spec.resumed)
        if rows >= self.limits.max_model_len:
            raise RequestError(
                f"the prompt has {rows} tokens, and this engine's context holds {self.limits.max_model_len} with at least one "
                "for the answer; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        if not 1 <= spec.n <= 1024:
            raise RequestError(f"n must be from 1 to 1024, got {spec.n}", param="n")
        if spec.sampling.max_tokens < 1:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids or self.vocab is None:
            return
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab:
            raise RequestError(
                f"token id {low if low < 0 else high} is outside the vocabulary (0 to {self.vocab - 1})", param="prompt"
            )
