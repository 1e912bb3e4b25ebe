"""The live sequences of an engine: how requests become sequences, leave, and are steered by programs.

`append`, `put`, `truncate`, `fork`, `park`, `resume` and `link` are operations on one sequence for programs that steer generation
(search, drafts of other kinds, contrast); they may be called between a commit and the next schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from weft.config import Limits, Stacks
from weft.core import handover, noise
from weft.core.kv import KV
from weft.core.lateness import Lateness
from weft.core.programs import Programs
from weft.core.request import CutRule, Request, State, check_ids, check_spec, every
from weft.core.scheduler import Scheduler
from weft.errors import CapacityError, ConfigError, EngineError, RequestError
from weft.types import Added, Cancelled, Entry, Event, Item, Rejected, RequestSpec


class Sequences:
    """kv, scheduler: of the engine.  models: names, the target first.  vocab: ids are checked against it where it is given."""

    def __init__(
        self,
        kv: KV,
        scheduler: Scheduler,
        limits: Limits,
        models: tuple[str, ...],
        vocab: int | None,
        stacks: Stacks,
        cuts: Sequence[CutRule],
    ) -> None:
        self.kv, self.pool, self.scheduler = kv, kv.pool, scheduler
        self.limits, self.models, self.vocab, self.stacks, self.cuts = limits, models, vocab, stacks, tuple(cuts)
        self._live: dict[int, Request] = {}
        self._by_id: dict[int, dict[int, int]] = {}
        self.timed = False  # whether a request that keeps a timeline may be live
        self._rids = self._links = 0
        self._arrivals = -math.inf
        self.programs = Programs(self)
        self.lateness: Lateness | None = None  # where the schedule refuses whom it can't serve in time
        self.tap: Callable[[Entry], None] | None = None
        """Told of everything that comes to the engine and of everything that it decides, for a record (`types.record`)."""

    # ------------------------------------------------------------------ requests

    def add(self, spec: RequestSpec, now: float) -> list[Event]:
        """Accept a request, or refuse it with a Rejected event (never an exception for a client's mistake)."""
        events = self._add(spec, now)
        if self.tap is not None:
            self.tap(Added(now, spec, bool(events)))
        return events

    def _add(self, spec: RequestSpec, now: float) -> list[Event]:
        if len(self.scheduler.waiting) >= self.limits.max_waiting:
            text = f"{self.limits.max_waiting} requests are waiting already; try again later"
            return [Rejected(spec.id, text, "capacity", code="overloaded")]
        try:
            if spec.id in self._by_id:
                raise RequestError(f"request id {spec.id} is already live")
            stack = self.stacks.of(spec.techniques)
            constrains = stack.get("constrain") is not None
            check_spec(spec, self.limits, self.vocab, stack.companions, constrains=constrains)
            family = self._enter(self.programs.open(spec, stack), now)
        except RequestError as error:
            return [Rejected(spec.id, str(error), "request", error.param, error.code)]
        except ConfigError as error:
            return [Rejected(spec.id, str(error), "request", "weft.with", "unsupported_stack")]
        except CapacityError as error:
            return [Rejected(spec.id, str(error), "capacity", code="never_fits")]
        self.timed = self.timed or spec.timeline
        for r in family:
            handover.take(self.kv, r)
            self.scheduler.enqueue(r, now)
            if self.lateness is not None:
                self.lateness.watch(r)
        return []

    def cancel(self, id: int, index: int | None = None) -> bool:
        """Forget a request, or one sequence of it, at any moment; False where nothing of it lives.

        A first sequence that is still to fan out into the others stands for all of them and is not cancelled alone.  Of a request
        that a search serves, `index` is one of its outputs: the search goes on for the others.
        """
        found = self._cancel(id, index)
        if self.tap is not None:
            self.tap(Cancelled(id, index, found))
        return found

    def _cancel(self, id: int, index: int | None) -> bool:
        if index is not None and id in self.programs:
            return self.programs.cancel(id, index)
        self.programs.close(id)
        family = self._by_id.get(id, {})
        chosen = [self._live[rid] for i, rid in family.items() if index is None or i == index]
        if index is not None and not all(r.fanned for r in chosen):
            return False
        for r in chosen:
            if r.state is not State.DONE:  # a companion leaves with its leader
                self._leave(r)
        return bool(chosen)

    def told(self) -> list[tuple[int, int]]:
        """(id, index) of every output that a client waits for."""
        plain = [(r.id, r.index) for r in self._live.values() if r.leader is None and r.id not in self.programs]
        return plain + self.programs.told()

    def family(self, id: int) -> list[Request]:
        """The live sequences of a request, those that nobody is told of left out."""
        return [r for r in map(self._live.__getitem__, self._by_id.get(id, {}).values()) if r.leader is None]

    def requests(self) -> list[Request]:
        return list(self._live.values())

    def find(self, id: int, index: int = 0) -> Request:
        """The live sequence `index` of request `id`.  Raises RequestError."""
        try:
            return self._live[self._by_id[id][index]]
        except KeyError:
            raise RequestError(f"request {id}.{index} does not live") from None

    # ------------------------------------------------------------------ operations on one sequence

    def append(self, id: int, tokens: Sequence[int], index: int = 0) -> None:
        """Put tokens into the context that are not output (a search's own words)."""
        family = self._family(id, index)
        if max(len(r.context) for r in family) + len(tokens) + 1 > self.limits.max_model_len:
            raise RequestError(f"{len(tokens)} more tokens exceed the context of {self.limits.max_model_len}")
        check_ids(tokens, self.vocab)
        for r in family:
            r.context.extend(tokens)
        try:
            self._fit(self.scheduler.linked(family[0]))
        except CapacityError:
            for r in family:
                del r.context[len(r.context) - len(tokens) :]
            raise
        for r in family:
            r.given.append((len(r.context) - len(tokens), len(r.context)))
            r.draft = ()
            if r.spec.grammar is not None and r.started:
                # The executor meets it anew, and is told then what is no output.
                self.scheduler.leaving.append(r.rid)
                r.started = False

    def put(self, id: int, tokens: Sequence[int], index: int = 0, *, drop: int = 0) -> None:
        """Output tokens in place of the last `drop` ones (a search's choice); what they replace must be output itself."""
        family = self._family(id, index)
        first = family[0]
        behind = max([first.prompt, *(stop for _, stop in first.given)])
        if not 0 <= drop <= min(len(first.output), len(first.context) - behind):
            raise RequestError(f"the last {drop} tokens of request {id}.{index} are not all output")
        check_ids(tokens, self.vocab)
        more = len(tokens) - drop
        full = max(len(r.context) for r in family) + more >= self.limits.max_model_len
        if full or not 0 <= len(first.output) + more < first.sampling.max_tokens:
            raise RequestError(f"{len(tokens)} tokens instead of {drop} leave request {id}.{index} no room to go on")
        for r in family:
            start = len(r.context) - drop
            del r.context[start:]
            del r.output[len(r.output) - drop :]
            for size, names in r.names.items():
                del names[start // size :]
            if max(*r.computed, *r.planned) > (start if tokens else start - 1):
                self._recompute_from(r, start)
            r.context.extend(tokens)
            r.output.extend(tokens)
            r.draft = ()

    def truncate(self, id: int, length: int, index: int = 0) -> None:
        """Cut the context to its first `length` positions, and the output with it; never into nothing, nor inside an item."""
        r, *others = self._family(id, index)
        if not 1 <= length <= len(r.context):
            raise RequestError(f"a context of {len(r.context)} cannot be cut to {length}")
        if others and length < r.prompt:
            raise RequestError("a prompt that is compared with others is not cut; cut behind it")
        for c in others:
            self._cut_to(c, c.prompt + length - r.prompt)
        self._cut_to(r, length)

    def _cut_to(self, r: Request, length: int) -> None:
        if any(s.start < length < s.stop for s in r.spans):
            raise RequestError(f"position {length} is inside an item that is no text; cut before or after it")
        del r.output[r.outputs_before(length) :]
        del r.context[length:]
        r.prompt = min(r.prompt, length)
        r.spans = tuple(s for s in r.spans if s.stop <= length)
        r.vectors = {at: item for at, item in r.vectors.items() if at < length}
        r.given = [(start, min(stop, length)) for start, stop in r.given if start < length]
        r.reported, r.cached_tokens = min(r.reported, length), min(r.cached_tokens, length)
        r.draft = ()
        for size, names in r.names.items():
            del names[length // size :]
        self._recompute_from(r, length)

    def fork(self, id: int, index: int, *, source: int = 0, seed: int | None = None, now: float = 0.0) -> None:
        """A new sequence `index` of request `id` that goes on from where `source` stands.  A fork is an admission."""
        parent = self._family(id, source)[0]
        if index in self._by_id[id] or index < parent.spec.n:
            raise RequestError(f"request {id} has, or had, a sequence {index}; take another index")
        self._fork(parent, index, now, seed)

    def stop(self, id: int, index: int = 0) -> None:
        """End one sequence, of which nobody is told."""
        self._leave(self.find(id, index))

    def park(self, id: int, index: int = 0) -> None:
        """Stop advancing, with those linked to it; the KV stays while nobody needs its room."""
        family = self.scheduler.linked(self.find(id, index))
        for r in family:
            self._still(r.id, r.index)
        for r in family:
            self.scheduler.unqueue(r)
            self.scheduler.running.pop(r.rid, None)
            self.scheduler.parked[r.rid] = r
            r.generation += 1
            r.state = State.PARKED

    def resume(self, id: int, index: int = 0, now: float = 0.0) -> None:
        """Let a parked sequence, and those linked to it, advance again."""
        r = self.find(id, index)
        if r.state is not State.PARKED:
            raise RequestError(f"request {id}.{index} is not parked")
        family = self.scheduler.linked(r)
        room = len(self.scheduler.running) + len(family) <= self.limits.max_num_seqs
        stays = room and all(any(t.blocks for t in x.tables) for x in family)
        for x in family:
            del self.scheduler.parked[x.rid]
            self.scheduler.running[x.rid] = x
            x.state = State.RUNNING
        if not stays:
            self.scheduler.restart(r, now)

    def link(self, members: Sequence[tuple[int, int]], now: float = 0.0) -> int:
        """Sample these sequences together from now on: one token, the same for all.  Returns the link's number."""
        family = [self._still(id, index) for id, index in members]
        if len({r.rid for r in family}) < 2 or len({r.rid for r in family}) < len(family):
            raise RequestError("a link joins at least two different sequences")
        if any(r.state is State.PARKED for r in family):
            raise RequestError("a parked sequence cannot be linked; resume it first")
        if any(r.companions or r.leader for r in family):
            raise RequestError("a sequence that is compared with others is linked to them and to nothing else")
        self._together(family)
        self._link(family)
        if any(r.state is State.WAITING for r in family):
            self.scheduler.restart(family[0], now)
        return self._links

    # ------------------------------------------------------------------ inside

    def _enter(self, spec: RequestSpec, now: float) -> list[Request]:
        """The first sequence of a request, and the companions that it is sampled together with.  Raises, and leaves nothing."""
        family: list[Request] = []
        try:
            family.append(first := self._new(spec, 0, now))
            for items in spec.companions:
                first.companions.append(self._companion(first, items))
            family += first.companions
            if first.companions:
                self._together(family)
                self._link(family)
        except (RequestError, ConfigError, CapacityError):
            if family:
                self._leave(family[0])
            self.programs.close(spec.id)
            raise
        return family

    def _companion(self, leader: Request, items: tuple[Item, ...]) -> Request:
        """A sequence with a prompt of its own that follows the leader's output.  Its index is nobody's: it is never told of."""
        spec = replace(
            leader.spec, items=items, companions=(), n=1,
            sampling=replace(leader.sampling, logprobs=-1, prompt_logprobs=-1),
        )  # fmt: skip
        r = self._new(spec, -self._rids - 1, leader.arrival, arrival=leader.arrival, seed=leader.seed)
        r.leader = leader
        return r

    def _together(self, family: Sequence[Request]) -> None:
        """Raise CapacityError where these sequences could never be sampled in one step."""
        most = min(self.limits.max_num_seqs, self.limits.max_samples, self.limits.max_rows)
        step_bytes = len(family) * (self.limits.row_bytes + self.limits.sample_bytes)
        if len(family) > most or 0 < self.limits.work_bytes < step_bytes:
            raise CapacityError(f"{len(family)} linked sequences exceed what one step samples ({most} sequences)")
        self._fit(family)

    def _link(self, family: list[Request]) -> None:
        self._links += 1
        self.scheduler.link(self._links, family)
        for r in family:
            r.draft, r.partial = (), None
            self.kv.unpark(r, 0)

    def _family(self, id: int, index: int) -> list[Request]:
        """A sequence and its companions, none of them in flight."""
        r = self._still(id, index)
        return [r, *(self._still(c.id, c.index) for c in r.companions)]

    def _new(
        self, spec: RequestSpec, index: int, now: float, *, arrival: float | None = None, seed: int | None = None
    ) -> Request:
        self._rids += 1
        if arrival is None:
            # Two requests of one instant still have an order.
            arrival = self._arrivals = max(now, math.nextafter(self._arrivals, math.inf))
        own = noise.child_seed(spec.seed, index) if seed is None else seed
        stack = self.stacks.of(spec.techniques)
        self._check_tile(stack.tile, spec)
        r = Request(
            self._rids, spec, stack, index=index, seed=own, arrival=arrival, models=len(self.models),
            groups=len(self.kv.groups),
        )  # fmt: skip
        r.cut = every((*self.cuts, stack.cut) if stack.get("kv.compress") is not None else self.cuts)
        self._fit([r])
        self._live[r.rid] = r
        self.scheduler.guessed += r.guessed
        self._by_id.setdefault(spec.id, {})[index] = r.rid
        return r

    def _check_tile(self, tile: int, spec: RequestSpec) -> None:
        """Raise where no step has room for rows that are never parted."""
        limits = self.limits
        samples = tile if tile > 1 and spec.sampling.prompt_logprobs >= 0 else 1
        if tile > limits.max_rows:
            raise ConfigError(
                f"the stack computes {tile} rows of a prompt together, and a step has room for {limits.max_rows}; "
                "give weft more --max-num-batched-tokens, or the technique smaller tiles"
            )
        if samples > limits.max_samples:
            raise RequestError(
                f"prompt_logprobs of {tile} rows that the stack computes together are more than a step's {limits.max_samples} "
                "rows of logits; leave prompt_logprobs out, or give the technique smaller tiles",
                param="prompt_logprobs",
            )
        if 0 < limits.work_bytes < tile * limits.row_bytes + samples * limits.sample_bytes:
            raise ConfigError(
                f"{tile} rows that the stack computes together do not fit a step's workspace of {limits.work_bytes} bytes; "
                "give the technique smaller tiles"
            )

    def _leave(self, r: Request) -> None:
        for c in r.companions:
            self._leave(c)
        r.companions = []
        self.scheduler.remove(r)
        del self._live[r.rid]
        self.scheduler.guessed -= r.guessed
        family = self._by_id[r.id]
        del family[r.index]
        if not family:
            del self._by_id[r.id]

    def _fork(self, parent: Request, index: int, now: float, seed: int | None = None) -> None:
        """A sequence that goes on from where `parent` stands, with companions of its own where that has some."""
        child = self._branch(parent, index, now, seed)
        if parent.companions:
            child.companions = [self._branch(c, -self._rids - 1, now, child.seed) for c in parent.companions]
            for c in child.companions:
                c.leader = child
            family = [child, *child.companions]
            self._link(family)
            if any(r.state is State.WAITING for r in family):
                self.scheduler.restart(child, now)

    def _branch(self, parent: Request, index: int, now: float, seed: int | None) -> Request:
        child = self._new(parent.spec, index, now, arrival=parent.arrival, seed=seed)
        child.context, child.output, child.given = list(parent.context), list(parent.output), list(parent.given)
        child.prompt, child.spans, child.vectors = parent.prompt, parent.spans, parent.vectors
        child.names = {size: list(names) for size, names in parent.names.items()}
        child.reported = parent.prompt  # the parent tells of the prompt
        room = len(self.scheduler.running) < self.limits.max_num_seqs
        if room and parent.state is State.RUNNING and self.kv.fork(parent, child):
            child.state = State.RUNNING
            self.scheduler.running[child.rid] = child
            if child.stack.stateful:
                child.source = parent.rid
                self.scheduler.forked.append(child)
        else:
            self.scheduler.enqueue(child, now)
        return child

    def _recompute_from(self, r: Request, length: int) -> None:
        """The context now ends at `length`: give up the KV beyond it, and the last row's, whose logits are wanted again."""
        r.partial = None
        if r.started:
            # The executor forgets what it knows of the longer context, and meets the request anew.
            self.scheduler.leaving.append(r.rid)
            r.started = False
        for m in range(len(self.models)):
            self.kv.unpark(r, m)
            if r.stack.stateful and r.computed[m]:
                self.scheduler.restart(r, r.arrival)
                return
            keep = min(r.computed[m], r.whole(length - 1))
            if keep < r.computed[m]:
                if not self.kv.truncate(r, m, keep):
                    self.scheduler.restart(r, r.arrival)
                    return
                r.computed[m] = r.planned[m] = keep

    def _fit(self, family: Sequence[Request]) -> None:
        """Raise CapacityError where these sequences, which advance together, could outgrow the pool with nobody beside them."""
        need = sum(self.scheduler.footprint(r) for r in family)
        if need > self.pool.total:
            length = max(min(r.limit, self.limits.max_model_len) for r in family)
            raise CapacityError(
                f"{'the request' if len(family) == 1 else f'{len(family)} linked sequences'} may reach {length} tokens = {need} "
                f"KV blocks, but the pool has {self.pool.total}; ask for fewer max_tokens, or give weft more --memory"
            )

    def _still(self, id: int, index: int) -> Request:
        r = self.find(id, index)
        if r.in_flight:
            raise EngineError(f"request {id}.{index} is in a plan in flight; commit it first")
        return r
