"""The live sequences of an engine: how requests become sequences, leave, and are steered by programs.

`append`, `truncate`, `fork`, `park`, `resume` and `link` are operations on one sequence for programs that steer generation
(search, drafts of other kinds, contrast); they may be called between a commit and the next schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from weft.config import Limits, Stacks
from weft.core import noise
from weft.core.kv import KV
from weft.core.request import CutRule, Request, State, check_ids, check_spec, every
from weft.core.scheduler import Scheduler
from weft.errors import CapacityError, ConfigError, EngineError, RequestError
from weft.types import Event, Rejected, RequestSpec


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
        self._rids = 0
        self._links = 0
        self._arrivals = -math.inf

    # ------------------------------------------------------------------ requests

    def add(self, spec: RequestSpec, now: float) -> list[Event]:
        """Accept a request, or refuse it with a Rejected event (never an exception for a client's mistake)."""
        if len(self.scheduler.waiting) >= self.limits.max_waiting:
            text = f"{self.limits.max_waiting} requests are waiting already; try again later"
            return [Rejected(spec.id, text, "capacity", code="overloaded")]
        try:
            if spec.id in self._by_id:
                raise RequestError(f"request id {spec.id} is already live")
            check_spec(spec, self.limits, self.vocab)
            first = self._new(spec, 0, now)
        except RequestError as error:
            return [Rejected(spec.id, str(error), "request", error.param, error.code)]
        except ConfigError as error:
            return [Rejected(spec.id, str(error), "request", "weft.with", "unsupported_stack")]
        except CapacityError as error:
            return [Rejected(spec.id, str(error), "capacity", code="never_fits")]
        self.scheduler.enqueue(first, now)
        return []

    def cancel(self, id: int, index: int | None = None) -> bool:
        """Forget a request, or one sequence of it, at any moment; False where nothing of it lives.

        A first sequence that is still to fan out into the others stands for all of them and is not cancelled alone.
        """
        family = self._by_id.get(id, {})
        chosen = [self._live[rid] for i, rid in family.items() if index is None or i == index]
        if index is not None and not all(r.fanned for r in chosen):
            return False
        for r in chosen:
            self._leave(r)
        return bool(chosen)

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
        r = self._still(id, index)
        start, stop = len(r.context), len(r.context) + len(tokens)
        if stop + 1 > self.limits.max_model_len:
            raise RequestError(f"{len(tokens)} more tokens exceed the context of {self.limits.max_model_len}")
        check_ids(tokens, self.vocab)
        r.context.extend(tokens)
        try:
            self._fit(self.scheduler.linked(r))
        except CapacityError:
            del r.context[start:]
            raise
        r.given.append((start, stop))
        r.draft = ()

    def truncate(self, id: int, length: int, index: int = 0) -> None:
        """Cut the context to its first `length` positions, and the output with it; never into nothing, nor inside an item."""
        r = self._still(id, index)
        if not 1 <= length <= len(r.context):
            raise RequestError(f"a context of {len(r.context)} cannot be cut to {length}")
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
        parent = self._still(id, source)
        if index in self._by_id[id] or index < parent.spec.n:
            raise RequestError(f"request {id} has, or had, a sequence {index}; take another index")
        self._fork(parent, index, now, seed)

    def park(self, id: int, index: int = 0) -> None:
        """Stop advancing, with those linked to it; the KV stays while nobody needs its room."""
        family = self.scheduler.linked(self.find(id, index))
        for r in family:
            self._still(r.id, r.index)
        for r in family:
            self.scheduler.waiting.pop(r.rid, None)
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
        most = min(self.limits.max_num_seqs, self.limits.max_samples, self.limits.max_rows)
        step_bytes = len(family) * (self.limits.row_bytes + self.limits.sample_bytes)
        if len({r.rid for r in family}) < 2 or len({r.rid for r in family}) < len(family):
            raise RequestError("a link joins at least two different sequences")
        if any(r.state is State.PARKED for r in family):
            raise RequestError("a parked sequence cannot be linked; resume it first")
        if len(family) > most or 0 < self.limits.work_bytes < step_bytes:
            raise CapacityError(f"{len(family)} linked sequences exceed what one step samples ({most} sequences)")
        self._fit(family)
        self._links += 1
        self.scheduler.link(self._links, family)
        for r in family:
            r.draft, r.partial = (), None
            self.kv.unpark(r, 0)
        if any(r.state is State.WAITING for r in family):
            self.scheduler.restart(family[0], now)
        return self._links

    # ------------------------------------------------------------------ inside

    def _new(
        self, spec: RequestSpec, index: int, now: float, *, arrival: float | None = None, seed: int | None = None
    ) -> Request:
        self._rids += 1
        if arrival is None:
            # Two requests of one instant still have an order.
            arrival = self._arrivals = max(now, math.nextafter(self._arrivals, math.inf))
        own = noise.child_seed(spec.seed, index) if seed is None else seed
        stack = self.stacks.of(spec.techniques)
        if stack.tile > self.limits.max_rows:
            raise ConfigError(
                f"the stack computes {stack.tile} rows of a prompt together, and a step has room for {self.limits.max_rows}; "
                "give weft more --max-num-batched-tokens, or the technique smaller tiles"
            )
        r = Request(
            self._rids,
            spec,
            stack,
            index=index,
            seed=own,
            arrival=arrival,
            models=len(self.models),
            groups=len(self.kv.groups),
        )
        r.cut = every((*self.cuts, stack.cut) if stack.get("kv.compress") is not None else self.cuts)
        self._fit([r])
        self._live[r.rid] = r
        self._by_id.setdefault(spec.id, {})[index] = r.rid
        return r

    def _leave(self, r: Request) -> None:
        self.scheduler.remove(r)
        del self._live[r.rid]
        family = self._by_id[r.id]
        del family[r.index]
        if not family:
            del self._by_id[r.id]

    def _fork(self, parent: Request, index: int, now: float, seed: int | None = None) -> None:
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
