"""The core as a state machine: everything that may happen to an engine, in any order, against a model of every sequence.

After each step: every invariant holds, the plan is within its budgets, no work crosses a cut, nothing that a submitted plan
names is written by a later one, and every token is the one that the model says.  At the end everyone has finished.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.core.world import (
    LAYERS,
    MAX_LEN,
    VOCAB,
    Executor,
    Going,
    Wanted,
    cut_rule,
    groups,
    origin_of,
    run,
    sequences_of,
    tokens_of,
)  # fmt: skip
from weft.config import Limits, Stack, build_stack
from weft.core.engine import Engine
from weft.core.ledger import blocks_for
from weft.core.noise import child_seed
from weft.core.request import State
from weft.core.tiers import record_bytes
from weft.errors import CapacityError, EngineError, RequestError
from weft.exec.null import reference
from weft.types import (
    Event,
    Finished,
    GroupKind,
    KVOpKind,
    MediaItem,
    Plan,
    Preempted,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
    VectorItem,
)

Key = tuple[int, int]
MOVES = {"copies": KVOpKind.COPY, "saves": KVOpKind.SAVE, "loads": KVOpKind.LOAD}

picks = st.integers(0, 2**16)
token_ids = st.integers(0, VOCAB - 1)
BASES = [tuple((7 * i * i + 3 * k * i + k) % VOCAB for i in range(40)) for k in range(2)]
prompts = st.builds(
    lambda base, cut, tail: (*BASES[base][:cut], *tail) or (0,),
    st.integers(0, 1), st.integers(0, 36), st.lists(token_ids, max_size=6),
)  # fmt: skip
vectors = st.builds(
    lambda rows, fill: VectorItem(rows=rows, width=1, data=bytes([fill]) * 4 * rows),
    st.integers(1, 6),
    st.integers(0, 1),
)
media = st.builds(
    lambda rows, d: MediaItem(kind="image", rows=rows, digest=bytes([d]) * 4), st.integers(1, 6), st.integers(0, 1)
)
texts = prompts.map(TokenItem)
items = st.one_of(
    texts.map(lambda t: (t,)),
    st.tuples(texts, st.one_of(vectors, media), texts.map(lambda t: TokenItem(t.ids[:9]))),
)
samplings = st.builds(
    SamplingSpec,
    temperature=st.sampled_from([0.0, 1.0]),
    max_tokens=st.integers(1, 18),
    min_tokens=st.integers(0, 4),
    stop_ids=st.sampled_from([(), (3,), (5, 8)]),
    prompt_logprobs=st.sampled_from([-1, -1, 0]),
)


@dataclass
class Flight:
    """A submitted plan, the sequences of its works, and who held the blocks that it names."""

    plan: Plan
    wanted: dict[int, Wanted]
    named: dict[int, set[int]]


class Machine(RuleBasedStateMachine):
    """policy and long are set by subclasses."""

    policy = "fcfs"
    sound = False

    @initialize(
        seed=st.integers(0, 2**32), models=st.sampled_from([1, 1, 2]), flights=st.sampled_from([1, 1, 2]), share=st.booleans(),
        cut=st.sampled_from([False, False, True]), blocks=st.integers(14, 60), rows=st.sampled_from([1, 4, 8, 8, 20, 20]),
        samples=st.sampled_from([1, 3, 9]), seqs=st.sampled_from([1, 3, 6]), guesses=st.sampled_from([None, 0.0, 0.6, 1.0]),
        spare=st.sampled_from([None, 0, 40]), start=st.integers(0, 5), ahead=st.booleans(),
        below=st.sampled_from([None, None, 4, 30]),
    )  # fmt: skip
    def begin(
        self, seed: int, models: int, flights: int, share: bool, cut: bool, blocks: int, rows: int, samples: int, seqs: int,
        guesses: float | None, spare: int | None, start: int, ahead: bool, below: int | None,
    ) -> None:  # fmt: skip
        self.rnd = random.Random(seed)
        layered = self.policy.startswith("layered")
        self.groups = groups(models=models, parked=layered)
        work = {} if spare is None else {"row_bytes": 10, "sample_bytes": 25, "work_bytes": 35 + spare}
        self.limits = Limits(
            max_model_len=MAX_LEN, max_num_seqs=seqs, max_rows=rows, max_samples=samples, max_guesses=3, **work
        )
        self.names = ("target", "draft")[:models]
        offload = [] if below is None else [f"kv.offload=host(memory='{below * record_bytes(self.groups, 64)}')"]
        self.cut = cut_rule if cut else None
        self.drafts = ahead and models == 2
        self.make = lambda share: Engine(
            self.groups, blocks, self.limits, self.stack(*offload), models=self.names, layers=LAYERS,
            vocab=VOCAB, share=share, cuts=[cut_rule] if cut else [], in_flight=flights, block_bytes=64,
        )  # fmt: skip
        self.engine, self.share = self.make(share), share
        self.executor = Executor(self.groups, self.rnd, cut=self.cut)
        self.executor.right = guesses
        self.executor.records = below or 0
        self.executor.losing = 0.1
        self.flights: deque[Flight] = deque()
        self.most_flights = flights
        self.keys: dict[int, Key] = {}
        self.live: dict[Key, Wanted] = {}
        self.ended: dict[Key, Wanted] = {}
        self.specs: dict[int, RequestSpec] = {}
        self.doomed: set[Key] = set()
        self.seen = Counter[str]()
        self.now, self.ids, self.forks, self.idle = 0.0, 0, 100, 0
        self.capacity = blocks
        self.sound = True
        self.burst(seed, start)

    def stack(self, *more: str) -> Stack:
        """The policy's; with a draft model that goes ahead, or a second model that only follows."""
        stack = build_stack([f"schedule={self.policy}", *more])
        return replace(stack, instances={**stack.instances, "draft": Going()}) if self.drafts else stack

    # ------------------------------------------------------------------ arrivals and departures

    @rule(
        items=items, sampling=samplings, seed=st.integers(0, 2**64 - 1), n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(0, 2), salt=st.sampled_from([b"", b"", b"tenant"]),
    )  # fmt: skip
    def add(self, items: Any, sampling: SamplingSpec, seed: int, n: int, priority: int, salt: bytes) -> None:
        self.arrive(
            RequestSpec(id=self.ids, items=items, sampling=sampling, seed=seed, n=n, priority=priority, salt=salt)
        )

    @rule(seed=st.integers(0, 2**32), count=st.integers(2, 5))
    def burst(self, seed: int, count: int) -> None:
        """Many at once, so that the pool and the budgets are contended."""
        rnd = random.Random(seed)
        for _ in range(count):
            base = BASES[rnd.randrange(2)][: rnd.randrange(30)]
            text = TokenItem((*base, *(rnd.randrange(VOCAB) for _ in range(rnd.randrange(1, 5)))))
            picture = MediaItem(kind="image", rows=rnd.randrange(1, 5), digest=bytes([rnd.randrange(2)]))
            sampling = SamplingSpec(
                temperature=1.0, max_tokens=rnd.randrange(1, 16), stop_ids=rnd.choice([(), (), (3, 4)]),
                prompt_logprobs=rnd.choice([-1, -1, 0]),
            )  # fmt: skip
            spec = RequestSpec(
                id=self.ids, items=rnd.choice([(text,), (text,), (TokenItem(BASES[0][:5]), picture, text)]), sampling=sampling,
                seed=rnd.getrandbits(64), n=rnd.choice([1, 1, 2, 4]), priority=rnd.randrange(3),
                salt=rnd.choice([b"", b"", b"me", b"yo"]),
            )  # fmt: skip
            self.arrive(spec)

    def arrive(self, spec: RequestSpec) -> None:
        items, sampling = spec.items, spec.sampling
        self.ids += 1
        length = len(tokens_of(items))
        layered = self.engine.scheduler.policy.layered
        most = min(length + sampling.max_tokens, MAX_LEN)
        plain = all(isinstance(item, TokenItem) for item in items)
        groups = [g for g in self.groups if g.model == "target" or plain or not self.drafts]
        ahead = 2 * self.limits.max_guesses if self.drafts else 0
        fits = blocks_for(groups, most, self.limits.max_rows, layered=layered, ahead=ahead) <= self.capacity
        events = self.engine.add(spec, self.now)
        if length >= MAX_LEN or not fits:
            (event,) = events
            assert isinstance(event, Rejected)
            assert event.kind == ("request" if length >= MAX_LEN else "capacity")
            return
        assert events == []
        self.specs[spec.id] = spec
        for k, wanted in enumerate(sequences_of(spec)):
            self.live[spec.id, k] = wanted

    @precondition(lambda self: self.live)
    @rule(pick=picks, whole=st.booleans())
    def cancel(self, pick: int, whole: bool) -> None:
        id, index = sorted(self.live)[pick % len(self.live)]
        here = (id, index) in self.present()
        if whole:
            assert self.engine.cancel(id)
            for key in [k for k in self.live if k[0] == id]:
                self.forget(key)
        elif here and (index or self.specs[id].n == 1 or self.engine.find(id).fanned):
            assert self.engine.cancel(id, index)
            self.forget((id, index))
        else:
            assert not self.engine.cancel(id, index)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def fail(self, pick: int) -> None:
        key = sorted(self.present())[pick % len(self.present())]
        self.executor.failing.add(self.engine.find(*key).rid)
        self.doomed.update(k for k in self.live if k[0] == key[0])

    # ------------------------------------------------------------------ programs

    def chosen(self, pick: int, *states: State) -> Key | None:
        """A sequence in one of these states."""
        keys = [k for k, r in sorted(self.present().items()) if r.state in states]
        return keys[pick % len(keys)] if keys else None

    def refused(self, key: Key, call: Any) -> bool:
        """What is in flight cannot be operated on, and the engine says so."""
        if not self.engine.find(*key).in_flight:
            return False
        with pytest.raises(EngineError, match="in flight"):
            call()
        return True

    @precondition(lambda self: self.live)
    @rule(pick=picks, tokens=st.lists(token_ids, min_size=1, max_size=5))
    def append(self, pick: int, tokens: list[int]) -> None:
        key = self.chosen(pick, State.RUNNING, State.WAITING, State.PARKED)
        if key is None or self.refused(key, lambda: self.engine.append(key[0], tokens, key[1])):
            return
        try:
            self.engine.append(key[0], tokens, key[1])
        except (RequestError, CapacityError):
            return
        wanted = self.live[key]
        wanted.codes += tokens
        wanted.kinds += ["g"] * len(tokens)
        self.touched(key)

    @precondition(lambda self: self.live)
    @rule(pick=picks, share=st.floats(0, 1))
    def truncate(self, pick: int, share: float) -> None:
        key = self.chosen(pick, State.RUNNING, State.WAITING, State.PARKED)
        if key is None or self.refused(key, lambda: self.engine.truncate(key[0], 1, key[1])):
            return
        wanted = self.live[key]
        length = 1 + int(share * (len(wanted.codes) - 1))
        if any(s.start < length < s.stop for s in wanted.spans):
            with pytest.raises(RequestError, match="inside an item"):
                self.engine.truncate(key[0], length, key[1])
            return
        self.engine.truncate(key[0], length, key[1])
        del wanted.output[wanted.kinds[:length].count("o") :]
        del wanted.codes[length:], wanted.kinds[length:]
        del wanted.told[min(length, wanted.kinds.count("p")) :]
        wanted.spans = tuple(s for s in wanted.spans if s.stop <= length)
        self.touched(key)

    @precondition(lambda self: self.live)
    @rule(pick=picks, share=st.floats(0, 1), tokens=st.lists(token_ids, min_size=1, max_size=5))
    def retry(self, pick: int, share: float, tokens: list[int]) -> None:
        """What a search does: take back a part, and go on otherwise."""
        self.land()
        if self.live:
            self.truncate(pick, share)
            self.append(pick, tokens)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def fork(self, pick: int) -> None:
        key = self.chosen(pick, State.RUNNING, State.WAITING, State.PARKED)
        self.forks += 1
        if key is None or self.refused(key, lambda: self.engine.fork(key[0], self.forks, source=key[1])):
            return
        seed = self.rnd.getrandbits(64)
        self.engine.fork(key[0], self.forks, source=key[1], seed=seed, now=self.now)
        self.live[key[0], self.forks] = self.live[key].copy(seed)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def park(self, pick: int) -> None:
        key = self.chosen(pick, State.RUNNING, State.WAITING)
        if key is None:
            return
        family = self.family(key)
        if any(self.engine.find(*k).in_flight for k in family):
            with pytest.raises(EngineError, match="in flight"):
                self.engine.park(*key)
            return
        self.engine.park(*key)
        assert all(self.engine.find(*k).state is State.PARKED for k in family)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def resume(self, pick: int) -> None:
        key = self.chosen(pick, State.PARKED)
        if key is not None:
            self.engine.resume(*key, self.now)

    @precondition(lambda self: len(self.live) > 1)
    @rule(pick=st.lists(picks, min_size=2, max_size=3))
    def link(self, pick: list[int]) -> None:
        self.land()
        keys = sorted(k for k, r in self.present().items() if not r.in_flight and r.state is not State.PARKED)
        if len(keys) < 2:
            return
        members = list(dict.fromkeys(keys[i % len(keys)] for i in pick))
        try:
            self.engine.link(members, self.now)
        except CapacityError:
            return
        except RequestError:
            assert len(members) < 2
            return
        for key in members:
            self.live[key].pure = False

    # ------------------------------------------------------------------ pressure

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def preempt(self, pick: int) -> None:
        self.land()
        key = self.chosen(pick, State.RUNNING)
        if key is not None:
            self.engine.scheduler.restart(self.engine.find(*key), self.now)

    @rule(short=st.sampled_from([0.0, 0.0, 0.3]), clear=st.booleans(), losing=st.sampled_from([0.0, 0.0, 0.3]))
    def weather(self, short: float, clear: bool, losing: float = 0.0) -> None:
        """From now on results fall short, or not, and blocks are lost below the pool, or not; perhaps the cache is forgotten."""
        self.executor.short, self.executor.losing = short, losing
        if clear:
            self.engine.pool.clear_cache()
            assert self.engine.pool.cached == 0

    # ------------------------------------------------------------------ steps

    @precondition(lambda self: self.engine.has_work)
    @rule()
    def submit(self) -> None:
        if len(self.flights) == self.most_flights:
            self.collect()
        self.sound = False
        self.now += 1.0
        busy = [k for k, r in self.present().items() if r.in_flight]
        plan, events = self.engine.schedule(self.now)
        age = min(((r.arrival, r.rid) for r in self.engine.scheduler.running.values()), default=(0.0, 0))
        for event in events:
            assert isinstance(event, Preempted)
            victim = self.engine.find(event.id, event.index)
            assert (victim.arrival, victim.rid) > age, "whoever yields, an older one goes on"
            assert (event.id, event.index) not in busy, "who is in flight does not yield"
        for r in self.engine.requests():
            self.keys[r.rid] = (r.id, r.index)
            self.executor.salts[r.rid] = r.spec.salt
        could = self.engine.scheduler.running or self.engine.scheduler.waiting
        self.idle = self.idle + 1 if could and not plan.works and not self.flights else 0
        assert self.idle < 3, "nothing advances although requests could"
        self.flights.append(self.inspect(plan))
        self.engine.check()
        self.sound = True

    @precondition(lambda self: self.flights)
    @rule()
    def collect(self) -> None:
        self.sound = False
        flight = self.flights.popleft()
        result = self.executor.execute(flight.plan)
        self.seen["lost"] += len(result.lost)
        self.now += 1.0
        self.seen["accepted"] += sum(max(0, len(f.tokens) - 1) for f in result.works)
        self.seen["went ahead"] += sum(
            f.rows > len(w.tokens) for f, w in zip(result.works, flight.plan.works, strict=True) if w.ahead
        )
        self.seen["kept"] += sum(bool(f.kept) for f in result.works)
        self.seen["short"] += sum(
            f.rows < w.count - w.guesses for f, w in zip(result.works, flight.plan.works, strict=True)
        )
        due = dict(self.live)
        # Linked sequences get the draw of the first of them that the executor sampled.
        drawn = {link: flight.wanted[rid].token() for link, rid in self.executor.leaders.items()}
        linked = {self.keys[w.request]: drawn[w.link] for w in flight.plan.works if w.link in drawn}
        for event in self.engine.commit(self.now, flight.plan, result):
            self.hear(event, linked)
        self.engine.check()
        for key, wanted in due.items():
            assert wanted.reason is None or key in self.ended, f"{key} should have ended"
        self.sound = True

    @precondition(lambda self: self.flights)
    @rule(followed=st.booleans())
    def break_off(self, followed: bool) -> None:
        """The executor raises inside a plan, before or after it has taken in what the plan says of tables."""
        while self.flights:
            plan = self.flights.popleft().plan
            if followed:
                self.executor.mirror.follow(plan)
            self.engine.abandon(plan, self.now)
            self.engine.check()
        assert not self.engine.scheduler.running

    def land(self) -> None:
        """Commit every plan in flight."""
        while self.flights:
            self.collect()

    @precondition(lambda self: self.engine.has_work)
    @rule(steps=st.integers(2, 12))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            if self.engine.has_work:
                self.submit()
                self.collect()

    def inspect(self, plan: Plan) -> Flight:
        """Budgets, cuts, contexts and the quarantine of blocks, seen from outside."""
        limits, running = self.limits, self.engine.scheduler.running
        samples = sum((1 + w.guesses if w.samples else 0) + w.prompt_rows for w in plan.works)
        rows, others = (sum(len(w.tokens) for w in plan.works if w.model == m) for m in ("target", "draft"))
        assert (rows, samples) == (plan.rows, plan.samples)
        assert max(rows, others) <= limits.max_rows
        assert samples <= limits.max_samples
        assert plan.work_bytes == rows * limits.row_bytes + samples * limits.sample_bytes
        assert not limits.work_bytes or plan.work_bytes <= limits.work_bytes
        assert len({w.request for w in plan.works}) <= len(running) <= limits.max_num_seqs
        assert plan.blocks <= self.capacity
        by_rid = {r.rid: r for r in self.engine.requests()}
        sampled = {w.request for w in plan.works if w.samples}
        for w in plan.works:
            r = by_rid[w.request]
            context = [*r.context, *r.draft]
            assert list(w.tokens) == context[w.start : w.stop]
            assert w.guesses <= min(limits.max_guesses, len(r.draft))
            assert w.stop <= min(MAX_LEN, r.limit)
            assert w.samples == (w.model == "target" and w.stop - w.guesses == len(r.context) and self.last(w.layers))
            assert self.cut is None or w.model != "target" or w.stop <= cut_rule(r.prompt, w.start)
            assert w.stop + w.ahead <= min(MAX_LEN, r.limit)
            assert not w.ahead or (self.drafts and w.stop == len(r.context) and w.request in sampled)
        for link in {w.link for w in plan.works if w.link is not None and w.samples}:
            together = [w.request for w in plan.works if w.link == link and w.samples]
            assert together == list(self.engine.scheduler.links[link]), "linked sequences are sampled apart"
        self.seen.update(
            plans=1, splits=sum(w.layers is not None for w in plan.works), guesses=sum(w.guesses for w in plan.works),
            linked=sum(w.link is not None and w.samples for w in plan.works),
            **{name: sum(len(op.source or op.target) for op in plan.kv if op.kind is kind) for name, kind in MOVES.items()},
            following=sum(w.model == "draft" for w in plan.works), ahead=sum(w.ahead > 0 for w in plan.works),
            overlapping=len(self.flights) > 0,
        )  # fmt: skip
        return Flight(plan, {w.request: self.live[self.keys[w.request]] for w in plan.works}, self.quarantine(plan))

    def last(self, layers: tuple[int, int] | None) -> bool:
        return layers is None or layers[1] == LAYERS

    def quarantine(self, plan: Plan) -> dict[int, set[int]]:
        """Who holds each block that the plan names; none of them may be written by somebody who got it meanwhile."""
        copies = [op for op in plan.kv if op.kind is KVOpKind.COPY]
        assert not {b for op in copies for b in op.source} & {b for op in copies for b in op.target}, "a copy of a copy"
        sources = {b for op in plan.kv for b in op.source}
        targets = {b for op in plan.kv for b in op.target}
        requests = {r.rid: r for r in self.engine.requests()}
        written: dict[int, int] = {}
        named = sources | targets
        for w in plan.works:
            for g, spec in enumerate(self.groups):
                if spec.model == w.model:
                    table = requests[w.request].tables[g]
                    named.update(table.blocks)
                    first = 0 if spec.kind is GroupKind.PARKED else table.count // spec.block_tokens
                    written.update(dict.fromkeys(table.blocks[first:], w.request))
                    written.update({b: w.request for b in table.blocks if b in targets})
        loading = [r for r in requests.values() if r.loading]
        written.update({b: r.rid for r in loading for t in r.tables for b in t.blocks if b in targets})
        assert targets <= set(written)
        for flight in self.flights:
            for block, rid in written.items():
                reused = rid not in flight.named.get(block, {rid})
                assert not reused, f"block {block} is written while plan {flight.plan.step} that names it is in flight"
        holders: dict[int, set[int]] = {b: set() for b in named}
        for r in requests.values():
            for b in {b for t in r.tables for b in t.blocks} & named:
                holders[b].add(r.rid)
        return holders

    def hear(self, event: Event, linked: dict[Key, int]) -> None:
        assert isinstance(event, (Tokens, Finished))
        key = (event.id, event.index)
        wanted = self.live[key]
        if isinstance(event, Tokens):
            assert wanted.reason is None
            wanted.told += [int(p.logprob) for p in event.prompt_logprobs]
            for token in event.tokens:
                assert token == linked.get(key, wanted.token()), key
                wanted.reason = wanted.take(token, MAX_LEN)
        elif event.reason == "error":
            assert key in self.doomed
            self.forget(key)
        else:
            assert event.reason == wanted.reason
            assert event.stop_id == (wanted.output[-1] if event.reason == "stop" else None)
            prompt = wanted.kinds.count("p")
            assert 0 <= event.cached_tokens <= prompt
            # What a cut acts on is computed, not hit: otherwise it would be kept whole.
            assert not (wanted.pure and self.cut) or event.cached_tokens < cut_rule(prompt, 0)
            self.finish(key)

    def finish(self, key: Key) -> None:
        wanted = self.ended[key] = self.live[key]
        if wanted.pure and wanted.sampling.prompt_logprobs >= 0 and not key[1]:
            assert wanted.told == list(range(1, wanted.kinds.count("p"))), "prompt logprobs: each once, in order"
        self.forget(key)

    # ------------------------------------------------------------------ the model's own books

    def present(self) -> dict[Key, Any]:
        return {(r.id, r.index): r for r in self.engine.requests()}

    def family(self, key: Key) -> list[Key]:
        return [(r.id, r.index) for r in self.engine.scheduler.linked(self.engine.find(*key))]

    def touched(self, key: Key) -> None:
        """A program changed this sequence; others that are still to fan out of it go on from there too."""
        wanted, spec = self.live[key], self.specs[key[0]]
        wanted.pure = False
        if not self.engine.find(*key).fanned:
            for k in range(1, spec.n):
                self.live[key[0], k] = wanted.copy(child_seed(spec.seed, k))

    def forget(self, key: Key) -> None:
        del self.live[key]

    # ------------------------------------------------------------------ the end

    def teardown(self) -> None:
        if not self.sound:
            return  # a step has failed: that is what matters
        self.executor.short = self.executor.losing = 0.0
        patience, left = 0, len(self.live)
        while patience < 1500:
            patience, left = (patience + 1, left) if len(self.live) == left else (0, len(self.live))
            for key in [k for k, r in self.present().items() if r.state is State.PARKED]:
                if key in self.present() and self.engine.find(*key).state is State.PARKED:
                    self.engine.resume(*key, self.now)
            if not (self.engine.has_work or self.flights):
                break
            if self.engine.has_work:
                self.submit()
            if self.flights:
                self.collect()
        assert not self.live, f"{patience} steps in which nobody finished of {sorted(self.live)}"
        pool = self.engine.pool
        assert (pool.referenced, pool.limbo) == (0, 0)
        assert pool.available == pool.total
        assert not self.engine.scheduler.links
        stats = self.engine.stats
        self.seen.update(preemptions=stats.preemptions, evictions=stats.evictions, hits=stats.prefix_hit_tokens)
        pool.clear_cache()
        assert len(pool._free) == pool.total
        self.compare()

    def compare(self) -> None:
        """What no program touched is the reference's output, and an engine without a cache says the same."""
        pure = {key: wanted for key, wanted in self.ended.items() if wanted.pure}
        for (id, _), wanted in pure.items():
            spec = self.specs[id]
            prompt = tokens_of(spec.items)
            out = reference(
                prompt, spec.sampling, wanted.seed, VOCAB, MAX_LEN, spans=wanted.spans, origin=origin_of(spec.salt)
            )
            assert wanted.output == out
        some = sorted({id for id, _ in pure})[:5]
        if self.share and some:
            plain = run(
                self.make(False), Executor(self.groups, random.Random(0), cut=self.cut), [self.specs[i] for i in some]
            )
            for key, wanted in pure.items():
                assert key[0] not in some or plain[key] == wanted.output


class PrefillFirst(Machine):
    policy = "prefill_first"


class Layered(Machine):
    policy = "layered(groups=3, least=3)"
