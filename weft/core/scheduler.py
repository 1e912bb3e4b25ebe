"""The scheduler: one loop over running and waiting requests that fills a step's budget of rows, samples, blocks and bytes.

There are no phases.  A request has context and a planned length; a step says how far each goes.  Chunks, prefix hits, drafts to
verify, resumed and layer-split requests all pass through `_advance`.  The order, the admission, the quota and the victim are
the policy's; that nobody is lost is the loop's:

- the oldest request that runs is never a victim, and whoever was accepted fits the pool alone, so somebody always ends;
- when a request finds no room, nobody new is admitted in that step, so a stream of small ones can't starve a large one;
- rows that stopped between layers go before everything else, so that decodes can't keep them from their budget;
- linked requests enter, yield and park as one, so that none holds blocks while another waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from weft.config import Limits, Stack
from weft.core import handover
from weft.core.control import Control
from weft.core.kv import KV
from weft.core.membership import Membership
from weft.core.planning import Planning
from weft.core.request import Request, State
from weft.errors import InvariantError
from weft.slots import Quota, Schedule, StepView
from weft.types import Plan, Work

FINAL = Quota(1)
"""What a linked request's last row has: the policy was asked for the whole family before."""


class Scheduler(Membership):
    """Fills steps.  models: names; layers: layer count of the target model; base: the server's stack.

    reach: by model, positions that it can compute.  control: decides how far ahead is guessed.
    """

    def __init__(
        self,
        kv: KV,
        policy: Schedule,
        limits: Limits,
        models: tuple[str, ...],
        layers: int,
        base: Stack,
        reach: Sequence[int],
        control: Control | None = None,
    ) -> None:
        super().__init__(kv, policy, limits, base)
        self.models, self.layers, self.reach, self.control = models, layers, reach, control
        self._followers = range(1, len(models))
        self.hit_tokens = 0
        self.queried_tokens = 0
        self._fetched: tuple[object, ...] = ()
        """What the last advice to fetch was given for."""

    # ------------------------------------------------------------------ one step

    def plan(self, now: float, step: int) -> tuple[Planning, Plan]:
        """The plan, and what was noted on the way: the request of each work, those preempted, those that load."""
        self.pool.now = now
        if self.control is not None and self.guessed:
            self.control.choose(self.running.values())
        view = self.view(now)
        d = Planning.begin(view, self.limits)
        for request, waits in self._candidates(now, d):
            if view.rows_left <= 0:
                break
            if waits and not self._admit(request, d):
                d.closed = True
            elif request.rid not in d.advanced:
                self._advance(request, d)
        self._follow(d)
        for request in d.preempted:
            self.enqueue(request, now)
        d.fetch = self._fetch(now)
        if self.kv.tiers is not None:
            d.after = handover.saves(self.kv, map(self.running.__getitem__, d.sampled))
        leaving, self.leaving = self.leaving, []
        forked, self.forked = self.forked, []
        return d, d.finish(step, leaving, forked)

    def view(self, now: float) -> StepView:
        """A step in which nothing is planned yet."""
        view = StepView(now, self.limits.max_rows, self.layers, len(self.running), len(self.waiting))
        view.free_blocks = self.pool.available
        return view

    def _candidates(self, now: float, d: Planning) -> Iterator[tuple[Request, bool]]:
        """(request, whether it waits) by the policy's key; whoever is admitted meanwhile is not met twice."""
        order = self.policy.order
        queue = sorted([(r.partial is None, order(r, now), r.rid, r) for r in self.running.values()])
        i = 0
        while True:
            head = self.queue.first(now) if self.waiting and not d.closed else None
            if i < len(queue) and (head is None or queue[i][:3] <= (True, head.key, head.rid)):
                request = queue[i][3]
                i += 1
                if request.state is State.RUNNING:
                    yield request, False
            elif head is not None:
                yield head, True
            else:
                return

    def entry(self, r: Request, view: StepView) -> list[tuple[list[int], list[dict[int, list[int]]], int]] | None:
        """What the prefix index has of a waiting request and of those linked to it; None where they can't enter now."""
        entering = self.linked(r)
        if len(self.running) + len(entering) > self.limits.max_num_seqs or not self.policy.admit(r, view):
            return None
        if self.running and not self.parked and self.pool.available <= len(self.running):
            return None  # as the sum below would say, but without looking anything up
        matches = [self.kv.match(x) for x in entering]
        if self.kv.tiers is not None and sum(idle for _, _, idle in matches) > self.pool.available:
            matches = [self.kv.match(x, stored=False) for x in entering]  # there is no room to load into
        if self.running:
            # Whoever enters must have room for its whole context beside one more block for everybody else: growth is on demand,
            # but a prompt that cannot be finished would only be preempted again.
            wanted = len(self.running)
            for x, (lengths, _, idle) in zip(entering, matches, strict=True):
                rest = len(x.context) - lengths[0]
                wanted += idle + self._blocks(x, rest)
            if wanted > self.pool.available:
                self.reclaim_parked(wanted)
                return None
        return matches

    def _admit(self, r: Request, d: Planning) -> bool:
        """Take a waiting request in, with those linked to it and what the prefix index has of them.  False ends admission."""
        matches = self.entry(r, d.view)
        if matches is None and self.switches:
            matches = self._displace(r, d)
        if matches is None:
            return False
        entering = self.linked(r)
        for _, tables, _ in matches:
            self.kv.hold(tables)
        for x, (lengths, tables, _) in zip(entering, matches, strict=True):
            self.unqueue(x)
            self.kv.adopt(x, lengths, tables, d.ops)
            if x.loading:
                d.loading.append(x)
            x.state = State.RUNNING
            self.running[x.rid] = x
            if self.control is not None and x.guessed:
                self.control.meet(x)
            if self.kv.share:
                self.queried_tokens += len(x.context)
                self.hit_tokens += lengths[0]
            if x.preemptions == 0:
                x.cached_tokens = min(lengths[0], x.prompt)
        d.view.running += len(entering)
        d.view.waiting -= len(entering)
        return True

    def _displace(self, r: Request, d: Planning) -> list[tuple[list[int], list[dict[int, list[int]]], int]] | None:
        """Let those yield whom the policy puts behind a waiting request, until it can enter; what became of that."""
        matches, ops = None, len(d.ops)
        while matches is None and not self.pool.limbo:
            victim = self._victim(r, d)
            if victim is None or victim is r:
                break
            self.preempt(victim, d)
            matches = self.entry(r, d.view)
        # What yielded is stored beside this step, so its blocks are taken in the next one.
        return matches if len(d.ops) == ops else None

    def _fetch(self, now: float) -> tuple[int, ...]:
        """Stored blocks that those at the head of the queue will want; asked anew when they or the pool have changed."""
        tiers = self.kv.tiers
        if tiers is None or not (self.waiting and tiers and tiers.offload.lookahead):
            return ()
        heads = self.queue.heads(tiers.offload.lookahead, now)
        seen = (self.pool.evictions, *((r.rid, r.generation) for r in heads))
        if seen == self._fetched:
            return ()
        self._fetched = seen
        return tuple(tiers.offload.prefetch([self.kv.stored(r) for r in heads]))

    # ------------------------------------------------------------------ one request

    def _advance(self, r: Request, d: Planning) -> None:
        if not (self._next(r, d) or (r.link is not None and self._together(r, d))):
            self._target(r, d)

    def _next(self, r: Request, d: Planning) -> bool:
        """Plan the one row of a sequence that decodes, as `_target` does; False where there is more to it than usual."""
        start = r.planned[0]
        more = r.in_flight or r.guessed or r.draft or r.partial or r.link is not None or r.cut is not None
        if more or len(r.context) - start != 1 or start < r.prompt or self.policy.layered:
            return False
        if self.kv.sliding[0]:
            self.kv.slide(r, 0, start)
        if not self.kv.ready(r, 0, 1):
            return False
        if self.policy.quota(r, d.view).rows > 0 and d.fits(1, 1):
            d.next(r, start)
            r.planned[0] = start + 1
        return True

    def _target(self, r: Request, d: Planning, *, final: bool = False) -> None:
        """Plan rows of the target model.  final: only the last row of a linked request."""
        if r.in_flight and (r.partial or r.draft or r.cut or r.loading or not r.publishes):
            return  # its advance depends on what the plan in flight finds
        if r.partial is not None:
            self._layers_on(r, d)
            return
        start, end = r.planned[0], len(r.context)
        quota = FINAL if final else self.policy.quota(r, d.view)
        rows = quota.rows
        if r.tile > 1 and rows > 0 and start < r.prompt:
            rows = max(rows, min((start // r.tile + 1) * r.tile, r.prompt) - start)
        stop = min(end, start + rows, start + d.view.rows_left)
        cut = None if r.cut is None else self._cut(r, start)
        if cut is not None and cut <= stop:
            stop = self._before(r, start, cut)
        if r.link is not None and stop == end and not final:
            stop -= 1
        if stop <= start:
            return
        stop, prompt_rows, samples = d.chunk(r, start, stop)
        if r.tile > 1 and start < r.prompt:
            stop, prompt_rows, samples = self._tiles(r, start, stop, d)
        if stop <= start:
            return
        split = quota.layers is not None and quota.layers < self.layers
        if self.kv.sliding[0]:
            self.kv.slide(r, 0, start)
        ends, rows = stop == end and not split, stop - start
        guesses = self._guesses(r, start, cut, samples, d) if r.draft and ends else 0
        ahead, soft = d.beyond(r, start, samples, guesses) if ends else (0, 0)
        rewrite = cut == stop + guesses
        if ahead and not self._room(r, rows + guesses + ahead, d, rewrite=rewrite, guesses=True):
            ahead = soft = 0
        if not ahead and not self._room(r, rows + guesses, d, split=split, rewrite=rewrite, guesses=guesses > 0):
            if not guesses or not self._room(r, rows, d, rewrite=cut == stop):
                return
            guesses = 0
        if split:
            r.partial = (start, stop, 0)
            self._layers_on(r, d, quota.layers)
            return
        d.write(r, start, stop, guesses=guesses, prompt_rows=prompt_rows, samples=samples, ahead=ahead, soft=soft)
        r.planned[0] = stop

    def _layers_on(self, r: Request, d: Planning, layers: int | None = None) -> None:
        """Take rows that have passed only some layers through the next ones."""
        assert r.partial is not None
        start, stop, layer = r.partial
        if layers is None:
            layers = self.policy.quota(r, d.view).layers or self.layers
        until = min(self.layers, layer + max(1, layers))
        final = until == self.layers
        prompt_rows = r.prompt_rows(start, stop) if final else 0
        samples = prompt_rows + (final and stop == len(r.context))
        if d.fits(stop - start, samples):
            d.write(r, start, stop, layers=(layer, until), prompt_rows=prompt_rows, samples=samples, final=final)
            if final:
                r.planned[0] = stop

    def _follow(self, d: Planning) -> None:
        """Other models catch up with what stands; nobody is preempted for them.

        Each has as many rows in a step as the target, of its own.  Whoever is least behind goes first: a draft that has caught up
        can go ahead of its sequence, and one with a long prompt before it cannot yet.
        """
        for m in self._followers:
            left = self.limits.max_rows
            behind = [
                (len(r.context) - r.planned[m], r.rid, r)
                for r in self.running.values()
                if not (r.in_flight or r.single) and (r.pace is None or r.pace.want) and self.follows(r)
            ]
            for lag, _, r in sorted(behind):
                if lag or r.rid in d.sampled:
                    left -= self._follow_one(r, m, left, d)

    def _follow_one(self, r: Request, m: int, left: int, d: Planning) -> int:
        """Rows of model m up to the context's end, at most `left`, and room to go ahead once it is known what was accepted.

        Returns the rows.
        """
        start, end = r.planned[m], len(r.context)
        stop = min(end, start + left, self.reach[m])
        if self.kv.sliding[m]:
            self.kv.slide(r, m, start)
        for ahead in (self._ahead(r, m, d), 0) if stop == end else (0,):
            rows = max(0, stop - start) + ahead
            if rows and self._spare(r, m, rows):
                d.blocks += self.kv.grow(r, m, rows, d.ops)
                tokens = tuple(r.context[start:stop])
                d.beside(
                    r, Work(request=r.rid, model=self.models[m], rows=((start, stop),), tokens=tokens, ahead=ahead)
                )
                r.planned[m] = stop
                return stop - start
        return 0

    def _ahead(self, r: Request, m: int, d: Planning) -> int:
        """Entries for what may be accepted in this step, the token after it, and the draft's own guesses but the last."""
        draft = r.stack.get("draft")
        if r.rid not in d.sampled or draft is None or draft.model is None:
            return 0
        guesses = int(draft.guesses) if r.pace is None else r.pace.want
        most = d.sampled[r.rid] + min(guesses, self.limits.max_guesses)
        return max(0, min(most, min(r.limit, self.limits.max_model_len, self.reach[m]) - len(r.context)))

    def _spare(self, r: Request, m: int, rows: int) -> bool:
        """Whether there is room for another model's rows, and one more block for everybody else who runs."""
        if self.kv.ready(r, m, rows):
            return True
        return self.pool.can_take(r.rid, self.kv.need(r, m, rows) + len(self.running) - 1)

    def _together(self, r: Request, d: Planning) -> bool:
        """Linked requests sample together: their last rows are planned in one step or not at all.  True when dealt with."""
        family = self.linked(r)
        if any(x.planned[0] != len(x.context) - 1 for x in family):
            return False
        if any(x.in_flight or x.rid in d.advanced for x in family) or not d.fits(len(family), len(family)):
            return True
        if any(self.policy.quota(x, d.view).rows < 1 for x in family):
            return True
        for x in family:
            self.kv.slide(x, 0, x.planned[0])

        def need(x: Request) -> int:
            return self.kv.need(x, 0, 1, rewrite=self._cut(x, x.planned[0]) == len(x.context))

        if self._obtain(r, lambda: sum(need(x) for x in family), d):
            for x in family:
                self.pool.reserve(x.rid, need(x))
            for x in family:
                self._target(x, d, final=True)
                self.pool.reserve(x.rid, 0)
        return True

    # ------------------------------------------------------------------ bounds

    def _before(self, r: Request, start: int, cut: int) -> int:
        """Where a step that would reach `cut` ends.

        Compression writes over blocks, so those of a first cut are published a step before it, and copied when it comes.
        """
        if not (self.kv.share and r.publishes):
            return cut
        size = min(self.kv.groups[g].block_tokens for g in self.kv.by_model[0])
        full = r.whole((cut - 1) // size * size)
        return full if full > start and full > r.computed[0] else cut

    def _tiles(self, r: Request, start: int, stop: int, d: Planning) -> tuple[int, int, int]:
        """As `Planning.chunk`, ending where a tile of the prompt ends: rows that belong together are never parted."""
        return d.chunk(r, start, max(start, r.ends(min(stop, r.prompt))))

    def _cut(self, r: Request, start: int) -> int | None:
        """The next cut after position `start`."""
        if r.cut is None:
            return None
        at = r.cut(r.prompt, start)
        if at is not None and at <= start:
            raise InvariantError(f"a cut rule gave {at} as the next cut after {start}")
        return at

    def _guesses(self, r: Request, start: int, cut: int | None, samples: int, d: Planning) -> int:
        """Drafts that fit the budgets, the request's end and the next cut; nobody who runs goes without a row for them."""
        end, others = len(r.context), max(0, len(self.running) - len(d.planned) - 1)
        most = min(len(r.draft), self.limits.max_guesses, r.limit - end - 1, self.limits.max_model_len - end - 1)
        if cut is not None:
            most = min(most, cut - end)
        if r.link is not None:
            most = 0
        while most > 0 and not d.fits(end - start + most + others, samples + most + others):
            most -= 1
        return max(0, most)

    # ------------------------------------------------------------------ room

    def _room(
        self, r: Request, rows: int, d: Planning, *, split: bool = False, rewrite: bool = False, guesses: bool = False
    ) -> bool:
        """Give `r` room for target rows; nobody is preempted for guesses."""
        if not split and not rewrite and self.kv.ready(r, 0, rows):
            return True

        def need() -> int:
            return self.kv.need(r, 0, rows, park=split, rewrite=rewrite)

        if not (self.pool.can_take(r.rid, need()) if guesses else self._obtain(r, need, d)):
            return False
        d.blocks += self.kv.grow(r, 0, rows, d.ops, park=split, rewrite=rewrite)
        return True

    def _obtain(self, r: Request, need: Callable[[], int], d: Planning) -> bool:
        """Preempt until what `r` needs is there.  False when nobody is left to yield, or `r` itself yielded."""
        while not self.pool.can_take(r.rid, wanted := need()):
            # Blocks at rest come back when the plans in flight have committed: preempting more would not bring them sooner.
            waits = self.pool.can_take(r.rid, wanted - self.pool.limbo)
            victim = None if waits else self._victim(r, d)
            if victim is not None:
                self.preempt(victim, d)
            if victim is None or r.state is not State.RUNNING:
                d.closed = True
                return False
        return True
