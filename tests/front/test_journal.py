"""The journal, over engines that die at every moment: what clients get is what an engine that never died would have given them.

The engines are real and pure; their executor has no model (`exec.null`), so that a life takes microseconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from msgspec import structs

from weft.config import Limits
from weft.core.engine import Engine
from weft.exec.null import NullExecutor
from weft.front.journal import MOST_ALONE, Journal
from weft.types import (
    Adapted,
    Add,
    Cancel,
    Command,
    Drop,
    EngineFrame,
    Event,
    Finished,
    Grammar,
    GroupKind,
    GroupSpec,
    Load,
    Plan,
    Rejected,
    RequestSpec,
    SamplingSpec,
    StepResult,
    TokenItem,
    TokenLogprob,
    Tokens,
)

GROUPS = [GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=4)]
VOCAB = 50
Deadly = Callable[[set[int], dict[int, int]], bool]
"""(first prompt tokens of those in a step, by them the index of the output that is drawn) to whether the process dies of it."""


class Dead(Exception):
    pass


class Executor(NullExecutor):
    """It dies of what `deadly` says, before the step has any result.  The log-probability of a prompt's token is its position."""

    deadly: Deadly | None = None
    plan: Plan
    """The last one."""

    def execute(self, plan: Plan) -> StepResult:
        self.plan = plan
        if self.deadly is not None:
            firsts = {w.request: w for w in plan.works}
            known = {e.request: e.tokens[0] for e in plan.enter}
            self.first = {**getattr(self, "first", {}), **known}
            drawn = {self.first[r]: w.output for r, w in firsts.items() if w.samples}
            if self.deadly({self.first[r] for r in firsts}, drawn):
                raise Dead
        done = super().execute(plan)
        told = [
            structs.replace(r, prompt_logprobs=tuple(TokenLogprob(0, -w.start - i, 1) for i in range(w.prompt_rows)))
            for w, r in zip(plan.works, done.works, strict=True)
        ]
        return structs.replace(done, works=tuple(told))


class World:
    """A front's view of engines that come and go.  What clients have is in `tokens`, `logprobs`, `prompts` and `ends`."""

    def __init__(self, deadly: Deadly | None = None, rows: int = 48) -> None:
        self.rows = rows
        self.journal = Journal()
        self.deadly = deadly
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.logprobs: dict[tuple[int, int], list[TokenLogprob]] = {}
        self.prompts: dict[int, list[TokenLogprob]] = {}
        self.ends: dict[tuple[int, int], Finished] = {}
        self.deaths = 0
        self.stops: dict[tuple[int, int], int] = {}
        """Length of an output at which its client has met a stop string."""
        self.begin()

    def begin(self) -> None:
        limits = Limits(max_model_len=96, max_num_seqs=6, max_rows=self.rows, max_samples=8)
        self.engine = Engine(GROUPS, 60, limits, vocab=VOCAB)
        self.executor = Executor(GROUPS, vocab=VOCAB)
        self.executor.deadly = self.deadly
        self.held: list[Event] = []
        self.inbox: list[Command] = []
        self.taken = 0
        self.told: tuple[int, ...] | None = None
        self.inbox += self.journal.begin()

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.inbox += self.journal.command(command)

    def die(self) -> None:
        self.deaths += 1
        self.hear(self.journal.died("signal 9 ended it"))
        self.begin()

    def step(self) -> None:
        """What an engine's thread does in one round, and what the front makes of its frame."""
        events, self.held = self.held, []
        inbox, self.inbox = self.inbox, []
        for command in inbox:
            self.taken += 1
            if isinstance(command, Add):
                events += self.engine.add(command.spec, 0.0)
            elif isinstance(command, Cancel):
                self.engine.cancel(command.id, command.index)
        if not self.engine.has_work:
            self.frame(events, ())
            return
        plan, more = self.engine.schedule(0.0)
        self.frame([*events, *more], self.engine.members(plan), self.engine.behind(plan))
        try:
            result = self.executor.execute(plan)
        except Dead:
            self.die()
            return
        self.held = self.engine.commit(0.0, plan, result)
        self.engine.check()

    def frame(
        self, events: Sequence[Event], members: tuple[int, ...], behind: tuple[tuple[int, int, int], ...] = ()
    ) -> None:
        plan = None if members == self.told else members
        self.told = members
        frame = EngineFrame(events=tuple(events), plan=plan, behind=behind, taken=self.taken)
        told, commands = self.journal.take(frame)
        self.inbox += commands
        self.hear(told)

    def hear(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Tokens):
                at = (event.id, event.index)
                assert at not in self.ends, "tokens after the end"
                self.tokens.setdefault(at, []).extend(event.tokens)
                self.logprobs.setdefault(at, []).extend(event.logprobs)
                self.prompts.setdefault(event.id, []).extend(event.prompt_logprobs)
                if at in self.stops and len(self.tokens[at]) >= self.stops[at]:
                    self.ends[at] = Finished(*at, "stop")
                    self.send(Cancel(*at))
            elif isinstance(event, Finished):
                assert self.tokens.get((event.id, event.index)) or event.error, "an end without a token"
                assert (event.id, event.index) not in self.ends, "ended twice"
                self.ends[event.id, event.index] = event
            else:
                assert not isinstance(event, Rejected), event

    def run(self, kill: Callable[[], bool] = lambda: False) -> None:
        for _ in range(3000):
            self.step()
            if kill():
                self.die()
            if not self.journal.entries and not self.engine.has_work:
                return
        raise AssertionError(f"requests hang: {list(self.journal.entries)}")

    def outcome(self) -> tuple[object, ...]:
        ends = {at: (end.reason, end.stop_id, end.discarded) for at, end in self.ends.items()}
        return self.tokens, self.logprobs, self.prompts, ends


def spec(
    id: int, *, first: int = 1, length: int = 9, techniques: tuple[str, ...] = (), n: int = 1, **law: object
) -> RequestSpec:
    prompt = (first, *((7 * id + i) % VOCAB for i in range(1, length)))
    sampling = SamplingSpec(**{"max_tokens": 20, **law})  # type: ignore[arg-type]
    return RequestSpec(id=id, items=(TokenItem(prompt),), sampling=sampling, seed=100 + id, n=n, techniques=techniques)


def mixture() -> list[RequestSpec]:
    """Requests of every kind that a journal must tell apart."""
    return [
        spec(1),
        spec(2, n=3, temperature=0.7),
        spec(3, logprobs=2, prompt_logprobs=1, length=40),
        spec(4, n=2, logprobs=0, prompt_logprobs=0, length=30),
        spec(5, temperature=0.0, stop_ids=tuple(range(0, VOCAB, 7)), min_tokens=3),
        spec(6, max_tokens=1),
        spec(7, n=2, techniques=("search=best_of_n(n=4)",), max_tokens=8),
        spec(8, max_tokens=60, length=5),
        spec(9, max_tokens=200, length=60),
    ]


def undisturbed(specs: Iterable[RequestSpec], stops: dict[tuple[int, int], int] | None = None) -> World:
    world = World()
    world.stops = stops or {}
    world.send(*(Add(s) for s in specs))
    world.run()
    return world


STOPS = {(8, 0): 31, (2, 1): 4}


@pytest.mark.parametrize("seed", range(30))
def test_no_death_changes_what_clients_get(seed: int) -> None:
    calm = undisturbed(mixture(), STOPS).outcome()
    chance = random.Random(seed)
    world = World()
    world.stops = STOPS
    coming = [Add(s) for s in mixture()]
    world.send(*(coming.pop(0) for _ in range(chance.randrange(9))))

    def kill() -> bool:
        if coming and chance.random() < 0.5:
            world.send(coming.pop(0))
        return chance.random() < 0.2 and not world.journal.trying

    while coming or world.journal.entries:
        world.run(kill)
    assert world.deaths
    assert world.outcome() == calm


def test_a_death_at_each_step() -> None:
    """Engines that hardly ever live long enough to compute everybody's context: suspects alone do, and it ends."""
    specs = mixture()
    calm = undisturbed(specs).outcome()
    world, steps = World(rows=16), 0
    world.send(*(Add(s) for s in specs))

    def kill() -> bool:
        nonlocal steps
        steps += 1
        return steps % 4 == 0 and not world.journal.trying

    world.run(kill)
    assert world.deaths > 8
    assert world.outcome() == calm


def test_prefix_hits_are_those_that_the_client_first_had() -> None:
    world = World()
    world.send(Add(spec(1, length=24, max_tokens=2)))
    world.run()
    again = spec(1, length=24)
    world.send(Add(RequestSpec(id=2, items=again.items, sampling=again.sampling, seed=5)))
    while len(world.tokens.get((2, 0), ())) < 3:
        world.step()
    world.die()
    world.run()
    assert world.ends[2, 0].cached_tokens == 20


def test_a_request_that_kills_engines_fails_alone() -> None:
    bad = spec(3, first=13, max_tokens=20)
    others = [spec(i, n=1 + i % 2) for i in (1, 2, 4, 5)]
    calm = undisturbed([*others, bad])
    world = World(lambda firsts, drawn: drawn.get(13, 0) >= 6)
    world.send(*(Add(s) for s in (*others[:2], bad, *others[2:])))
    world.run()
    assert world.deaths == 4, "twice among others, twice alone"
    end = world.ends.pop((3, 0))
    assert end.reason == "error"
    assert "ended the engine each time" in (end.error or "")
    assert world.tokens[3, 0] == calm.tokens[3, 0][:6]
    del world.tokens[3, 0], calm.tokens[3, 0], calm.ends[3, 0]
    assert world.tokens == calm.tokens
    assert world.ends.keys() == calm.ends.keys()


def test_one_that_kills_before_its_first_token_and_one_that_kills_later() -> None:
    world = World(lambda firsts, drawn: 13 in firsts or drawn.get(17, 0) >= 9)
    world.send(*(Add(s) for s in (spec(1), spec(2, first=13), spec(3), spec(4, first=17), spec(5))))
    world.run()
    assert {at[0] for at, end in world.ends.items() if end.reason == "error"} == {2, 4}
    calm = undisturbed([spec(1), spec(3), spec(5)])
    assert {at: x for at, x in world.tokens.items() if at[0] in (1, 3, 5)} == calm.tokens


def test_two_that_kill_only_together_both_end_well() -> None:
    world = World(lambda firsts, drawn: firsts >= {13, 17} and drawn.get(13, 0) >= 5)
    specs = [spec(1), spec(2, first=13), spec(3, first=17)]
    world.send(*(Add(s) for s in specs))
    world.run()
    assert all(end.reason == "length" for end in world.ends.values())
    assert world.tokens == undisturbed(specs).tokens
    assert world.deaths < 8, "whoever passed alone and is suspected again runs alone to the end"


def together(world: World) -> None:
    """Two requests that end an engine only together, until each runs alone to its end."""
    world.deadly = world.executor.deadly = lambda firsts, drawn: firsts >= {13, 17}
    world.send(*(Add(spec(i, first=first, max_tokens=60)) for i, first in ((2, 13), (3, 17))))


def test_one_that_advances_alone_is_not_blamed_for_engines_that_others_end() -> None:
    world, steps = World(), 0
    together(world)

    def kill() -> bool:
        nonlocal steps
        steps += 1
        return steps % 5 == 0

    world.run(kill)
    assert world.deaths > 20
    assert all(end.reason == "length" for end in world.ends.values())
    assert world.tokens == undisturbed([spec(i, first=first, max_tokens=60) for i, first in ((2, 13), (3, 17))]).tokens


def test_nobody_waits_forever_for_one_that_ends_an_engine_after_each_token() -> None:
    world = World()
    together(world)
    seen = 0

    def kill() -> bool:
        nonlocal seen
        was, seen = seen, len(world.tokens.get((2, 0), ()))
        return seen > was and world.journal.trying  # first it passes, then it runs alone to its end

    world.run(kill)
    assert world.ends[2, 0].reason == "error"
    assert len(world.tokens[2, 0]) >= MOST_ALONE
    assert world.ends[3, 0].reason == "length"


def test_a_request_that_is_never_taken_in_is_suspected_too() -> None:
    """An engine may die of a request before any plan has it: of its grammar, say."""
    journal = Journal()
    journal.begin()
    journal.command(Add(spec(1)))
    journal.take(EngineFrame(events=(), plan=(1,), taken=1))
    journal.command(Add(spec(2)))
    for _ in range(3):
        assert journal.died("it fell") == []
        journal.begin()
        journal.take(EngineFrame(plan=(), taken=0))
    (end,) = journal.died("it fell")
    assert isinstance(end, Finished)
    assert end.error is not None


def test_what_an_engine_still_says_of_a_request_that_was_taken_from_it_is_dropped() -> None:
    """A suspect that shows itself harmless is taken back and sent anew: what its first run still says is not the second's."""
    world = World(lambda firsts, drawn: firsts >= {13, 17} and world.deaths < 2)
    specs = [spec(2, first=13, prompt_logprobs=0, length=40), spec(3, first=17, prompt_logprobs=0, length=40)]
    world.send(*(Add(s) for s in specs))
    world.run()
    assert world.outcome() == undisturbed(specs).outcome()


def test_an_engine_ended_by_others_is_nobodys_fault() -> None:
    """However often it happens: who advances in between is never suspected."""
    world, steps = World(rows=300), 0
    world.send(*(Add(spec(i, max_tokens=40, length=4)) for i in range(1, 6)))

    def kill() -> bool:
        nonlocal steps
        steps += 1
        assert not world.journal.trying
        return steps % 6 == 0

    world.run(kill)
    assert all(end.reason == "length" for end in world.ends.values())


def test_a_client_that_leaves_is_forgotten_in_every_state() -> None:
    for moment in range(40):
        world = World(lambda firsts, drawn: drawn.get(13, 0) >= 6)
        world.send(*(Add(s) for s in (spec(1), spec(2, first=13), spec(3, n=2))))
        for _ in range(moment):
            world.step()
        world.send(Cancel(2))
        assert 2 not in world.journal.entries
        world.run()
        calm = undisturbed([spec(1), spec(3, n=2)])
        assert {at: x for at, x in world.tokens.items() if at[0] != 2} == calm.tokens, moment
        assert not world.journal.busy


def test_adapters_are_loaded_again_before_requests_that_use_them() -> None:
    journal = Journal()
    journal.begin()
    load, drop = Load(1, "poet", "poet"), Drop(2, "old")
    assert journal.command(load) == [load]
    assert journal.command(drop) == [drop]
    part = "adapt=lora(name='poet')"
    told, _ = journal.take(EngineFrame(events=(Adapted(1, "poet", part), Adapted(2, "old")), taken=2))
    assert [e.id for e in told] == [1, 2]
    late = Load(4, "late", "late")
    journal.command(Add(spec(3, techniques=(part,))))
    journal.command(late)
    journal.died("gone")
    first = journal.begin()
    assert [(type(c), c.name) for c in first if not isinstance(c, Add)] == [
        (Load, "poet"),
        (Drop, "old"),
        (Load, "late"),
    ]
    assert not any(isinstance(c, Add) for c in first)
    again = tuple(Adapted(c.id, c.name) for c in first if isinstance(c, (Load, Drop)) and c.id != 4)
    told, more = journal.take(EngineFrame(events=again[:1], taken=1))
    assert (told, more) == ([], [])
    told, more = journal.take(EngineFrame(events=(*again[1:], Adapted(4, "late", part)), taken=3))
    assert [e.id for e in told] == [4], "the client hears of what it had not heard of"
    assert [type(c) for c in more] == [Add]


def test_what_was_asked_before_the_first_engine_is_not_forgotten() -> None:
    """A server whose own stack searches asks every request anew from its start."""
    journal = Journal()
    assert journal.command(Add(spec(1))) == []
    assert journal.command(Cancel(9)) == []
    (first,) = journal.begin(["draft=none", "search=best_of_n(n=4)"])
    assert first == Add(spec(1))
    journal.take(EngineFrame(events=(Tokens(1, 0, (4, 5)),), taken=1))
    journal.died("gone")
    (again,) = journal.begin(["search=best_of_n(n=4)"])
    assert isinstance(again, Add)
    assert again.spec.resumed == ()
    told, _ = journal.take(EngineFrame(events=(Tokens(again.spec.id, 0, (4, 5, 6)),), taken=1))
    assert told == [Tokens(1, 0, (6,))]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_nothing_is_lost_and_nobody_blamed_for_nothing(seed: int) -> None:
    """Deaths at any moment, also while suspects run alone, requests that end engines, clients that leave, and requests that are
    taken back: each answer is a beginning of the undisturbed one, or all of it; who is given up died four times without a token.
    """
    calm = undisturbed(mixture(), STOPS)
    chance = random.Random(1000 + seed)
    bad = {13} if seed % 2 else set[int]()
    world = World(lambda firsts, drawn: bool(bad & firsts) and drawn.get(13, 0) >= 3, rows=chance.choice([16, 48]))
    world.stops = STOPS
    coming = [Add(s) for s in mixture()] + [Add(spec(20, first=13))] * bool(bad)
    chance.shuffle(coming)
    left: set[int] = set()
    since: dict[int, int] = {}
    pace = chance.choice([0.0, 0.02, 0.1])
    now = 0.0

    def length(id: int) -> int:
        entry = world.journal.entries.get(id)
        return -1 if entry is None else entry.progress

    def kill() -> bool:
        nonlocal now
        now += chance.choice([0.5, 1.0])
        if coming and chance.random() < 0.3:
            world.send(coming.pop())
        if chance.random() < 0.01 and world.journal.entries:
            id = chance.choice(list(world.journal.entries))
            left.add(id)
            world.send(Cancel(id))
        if chance.random() < 0.3:
            events, commands = world.journal.overdue(now, 20.0)
            assert not events
            world.inbox += commands
        return chance.random() < pace

    before: dict[int, int] = {}
    die = world.die

    def counted() -> None:
        for id, entry in world.journal.entries.items():
            since[id] = since.get(id, 0) + 1 if before.get(id) == entry.progress else 1
            before[id] = entry.progress
        die()

    world.die = counted  # type: ignore[method-assign]
    while coming or world.journal.entries:
        world.run(kill)
    for (id, _), end in world.ends.items():
        if end.reason == "error":
            assert since[id] >= 4, "it was given up too early"
            assert id == 20 or pace, "somebody else's fault"
    for at, tokens in calm.tokens.items():
        got = world.tokens.get(at, [])
        whole = at in world.ends and world.ends[at].reason != "error"
        assert got == (tokens if whole else tokens[: len(got)])
        assert whole or at[0] in left or world.ends[at].reason == "error", "it never ended"
    assert not world.journal.busy


def test_a_request_whose_grammar_ends_engines_is_found() -> None:
    """It is made ready beside the steps: taken in, and in no plan yet, while others advance."""
    journal = Journal()
    journal.begin()
    journal.command(Add(spec(1, max_tokens=1000)))
    guilty = structs.replace(spec(2), grammar=Grammar("regex", "a+"))
    journal.command(Add(guilty))
    ended: list[Event] = []
    for life in range(8):
        ids = [c.spec.id for c in (journal.begin() if life else []) if isinstance(c, Add)] or [1, 2]
        first = journal.entries[1].ids
        told = (Tokens(first[0], 0, (life,)),) if first else ()
        making = tuple(id for id in ids if id not in first)
        journal.take(EngineFrame(events=told, plan=tuple(first), making=making, taken=len(ids)))
        ended += journal.died("it fell")
        if ended:
            break
    assert [(e.id, isinstance(e, Finished)) for e in ended] == [(2, True)]
    assert list(journal.entries) == [1], "the other one stays, whose tokens came all the while"


def test_a_grammar_that_is_in_use_is_not_suspected() -> None:
    journal = Journal()
    journal.begin()
    journal.command(Add(structs.replace(spec(1), grammar=Grammar("regex", "a+"))))
    journal.take(EngineFrame(plan=(1,), taken=1))
    journal.take(EngineFrame(events=(Tokens(1, 0, (5,)),), plan=(), taken=1))
    journal.died("it fell")
    assert journal.entries[1].strikes == 0


def test_a_grammar_that_is_ready_is_not_suspected_while_its_request_waits_for_a_turn() -> None:
    journal = Journal()
    journal.begin()
    journal.command(Add(structs.replace(spec(1), grammar=Grammar("regex", "a+"))))
    journal.take(EngineFrame(plan=(), making=(1,), taken=1))
    journal.take(EngineFrame(making=(), taken=1))
    for _ in range(5):
        assert journal.died("it fell") == []
        journal.begin()
        journal.take(EngineFrame(plan=(), making=(), taken=1))
    assert journal.entries[1].strikes == 0


def test_an_adapter_that_ends_engines_is_given_up() -> None:
    """Or no engine would ever live again: it is asked for first thing."""
    journal = Journal()
    journal.begin()
    journal.command(Add(spec(1)))
    journal.command(Load(7, "bad", "bad"))
    ended: list[Event] = []
    for _ in range(6):
        journal.take(EngineFrame(plan=(1,), taken=2))
        ended += journal.died("it fell")
        journal.begin()
        if ended:
            break
    (end,) = ended
    assert isinstance(end, Adapted)
    assert (end.id, end.name) == (7, "bad")
    assert "the engine ended each time" in (end.error or "")
    journal.died("it fell")
    assert not any(isinstance(c, Load) for c in journal.begin())
