"""How far ahead is guessed: the best length by hand and by brute force, and in a world whose costs and acceptance are known."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.core.world import groups
from weft.config import Limits, Stacks, build_stack
from weft.core.control import RAGGED, STAYS, Control
from weft.core.engine import Engine
from weft.core.lengths import TREE, gain, passes
from weft.core.prices import STALE, Costs, Mean, size_class
from weft.core.request import Pace
from weft.draft.dyspec import DySpec
from weft.draft.ngram import NGram
from weft.exec.null import NullExecutor, draw, step
from weft.exec.record import tap
from weft.sim.replay import replay
from weft.slots import Guesses
from weft.types import Plan, RequestSpec, SamplingSpec, StepResult, TokenItem, Tokens, Work, WorkResult

MS = 1e-3


class Draft:
    """Stands for a technique; the control reads no more of it."""

    guesses = 8
    model: str | None = None
    traits = NGram.traits


def sequence(rid: int, a: float, *, trials: float = 1e6, want: int = 1) -> Any:
    """A decoding sequence of which it is known how often its guesses stand."""
    return SimpleNamespace(
        rid=rid, stack={"draft": Draft()}, guessed=True, link=None, decoding=True, limit=1000, context=[0] * 10,
        planned=[10], pace=Pace(want, stood=a * trials, tried=trials),
    )  # fmt: skip


def informed(rows_s: Callable[[int], float], guess_s: float, size: int, most: int = 64) -> Control:
    """A control that has seen steps of every number of rows."""
    control = Control(16)
    control._timed = True
    costs = control._costs[size_class(size)] = Costs()
    for rows in [r for r in range(1, most + 1) if size_class(r) == r]:
        costs.add(rows, rows_s(rows))
    costs.looked = costs.steps  # else it would look at plain decoding first, which it saw so many steps ago
    control._pool(Draft()).guess_s[size_class(size)] = Mean(guess_s, 1)
    return control


def rate(wants: Sequence[int], hopes: Sequence[float], rows_s: Callable[[int], float], guess_s: float) -> float:
    """Tokens a second, by the definition."""
    tokens = sum(sum(a**i for i in range(k + 1)) for k, a in zip(wants, hopes, strict=True))
    return tokens / (rows_s(len(wants) + sum(wants)) + guess_s * max(wants))


@pytest.mark.parametrize(
    ("a", "row_s", "guess_s", "best"),
    [
        # 10 ms + 0.5 ms a row + 0.5 ms a guess, a = 0.8: rates of k = 1, 2, ... in tokens a second are 163.6, 203.3, 227.1,
        # 240.1, 246.0, 247.0 (3.951 tokens in 16 ms), 244.8: six are best.
        (0.8, 0.5 * MS, 0.5 * MS, 6),
        # a = 0.3: plain 100, then 118.2, 115.8: one.
        (0.3, 0.5 * MS, 0.5 * MS, 1),
        # A guess adds at most 0.1 tokens and 2 ms to 10: 91.7 against 100.
        (0.1, 1 * MS, 1 * MS, 0),
        # Free rows: as many as there may be.
        (0.7, 0.0, 0.0, 8),
    ],
)
def test_the_best_length_by_hand(a: float, row_s: float, guess_s: float, best: int) -> None:
    control = informed(lambda rows: 10 * MS + row_s * (rows - 1), guess_s, 1)
    one = sequence(1, a)
    control.choose([one])
    assert one.pace.want == best


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_gets_the_lengths_that_brute_force_finds(seed: int) -> None:
    """Every vector of lengths, 0 to 5 for each of three sequences, by the formula; never slower than the best of them."""
    rnd = random.Random(seed)
    hopes = [rnd.uniform(0.05, 0.95) for _ in range(3)]
    row_s, guess_s = rnd.uniform(0.2, 3) * MS, rnd.uniform(0, 2) * MS

    def rows_s(rows: int) -> float:
        return 10 * MS + row_s * rows

    control = informed(rows_s, guess_s, 3)
    some = [sequence(i, a) for i, a in enumerate(hopes)]
    for x in some:
        x.stack["draft"].guesses = 5
    control.choose(some)
    found = rate([x.pace.want for x in some], hopes, rows_s, guess_s)
    best = max(rate(wants, hopes, rows_s, guess_s) for wants in itertools.product(range(6), repeat=3))
    plain = rate([0, 0, 0], hopes, rows_s, guess_s)
    pays = best > (STAYS + RAGGED * math.log2(3)) * plain
    assert found == pytest.approx(best if pays else plain, rel=0.01)  # a class of rows has one price


def test_costs_are_reckoned_between_and_beyond_what_was_seen() -> None:
    costs = Costs()
    assert costs(1) is None
    costs.add(2, 10 * MS)
    assert costs(1) is None  # fewer rows than were ever seen
    assert costs(4) == pytest.approx(12.5 * MS)  # one point: each row is a quarter of those 5 ms
    costs.add(6, 14 * MS)
    assert costs(4) == pytest.approx(12 * MS)
    assert costs(8) == pytest.approx(16 * MS)
    costs.add(8, 9 * MS)  # a machine that was busy before: more rows never cost less
    assert costs(8) == pytest.approx(14 * MS)


def test_a_slow_spell_moves_all_costs_and_one_bad_time_moves_little() -> None:
    costs = Costs()
    for _ in range(20):
        costs.add(1, 10 * MS)
        costs.add(5, 12 * MS)
    costs.add(1, 1.0)
    assert (costs(1) or 0) < 13 * MS
    for _ in range(80):
        costs.add(1, 20 * MS)
    assert (costs(1) or 0) == pytest.approx(20 * MS, rel=0.05)
    assert (costs(5) or 0) > 18 * MS


@pytest.mark.parametrize(("times", "steps"), [(1, 64), (2, 128), (4, 512), (9, 512)])
def test_what_was_seen_long_ago_is_not_believed(times: int, steps: int) -> None:
    costs = Costs()
    for _ in range(times):
        costs.add(1, 10 * MS)
    for _ in range(steps):
        costs.add(5, 12 * MS)
    assert costs(1) is not None
    costs.add(5, 12 * MS)
    assert costs(1) is None
    assert costs.known == [5]
    assert steps <= STALE


def test_noise_does_not_speak_for_what_is_seldom_tried() -> None:
    """Half of all steps take twice as long; five rows, seen 100 times, cost a tenth more than one, seen 3 times."""
    rnd, costs = random.Random(1), Costs()
    for i in range(103):
        rows, seconds = (1, 10 * MS) if i % 40 == 7 else (5, 11 * MS)
        costs.add(rows, seconds * rnd.choice((1, 2)) * rnd.uniform(0.98, 1.02))
    plain, five = costs(1), costs(5)
    assert plain is not None
    assert five is not None
    assert 0.95 < five / plain < 1.3


def test_a_length_that_was_slow_by_accident_is_tried_again() -> None:
    """The first step with five rows takes four times as long as the others: a good draft gets its length all the same."""
    engine = engine_of("draft=ngram(guesses=4)")
    world = World(engine, row_s=0.1 * MS, guess_s=0.1 * MS)
    world.right, world.slow = lambda: 0.7, {5: 1}
    add(engine, 1, 2000)
    go(engine, world)
    assert sum(w == 4 for w in world.wants[-100:]) > 80


def test_classes_of_sizes_grow_with_the_logarithm() -> None:
    assert [size_class(n) for n in (1, 5, 8, 9, 10, 11, 17, 32, 33)] == [1, 5, 8, 10, 10, 12, 20, 32, 40]
    assert len({size_class(n) for n in range(1, 4097)}) < 50


def tree_of(guesses: int, gain: float, model: str | None = None) -> Any:
    """A decoding sequence with a draft of trees, of which one with so many guesses brings so much more than a token."""
    one = sequence(1, 0.0)
    one.stack["draft"] = SimpleNamespace(guesses=guesses, model=model, traits=DySpec.traits)
    one.pace = Pace(1, stood=gain * 1e6, tried=guesses**TREE * 1e6)
    return one


def test_a_tree_brings_what_it_was_seen_to_bring() -> None:
    """Of a tree of seven guesses none, one or two stand, with chances 0.5, 0.3 and 0.2: 1.7 tokens a step, by the price too."""
    control, one = Control(16), tree_of(7, 0.0)
    one.pace.stood = one.pace.tried = 0.0
    pool = control._pool(one.stack["draft"])
    pool.stood = pool.tried = 0.0
    work = Work(
        request=1, rows=((0, 8),), tokens=tuple(range(8)), guesses=7, parents=(-1, -1, -1, -1, 0, 0, 1), samples=True
    )
    for stood in [0, 1, 0, 2, 0, 1, 0, 2, 0, 1] * 200:
        control._trial(one.pace, pool, work, WorkResult(rows=8, tokens=tuple(range(1 + stood))), early=False)
    assert gain(pool.stood / pool.tried, 7, tree=True) == pytest.approx(0.7, abs=0.02)


def test_a_tree_takes_the_passes_of_its_layers() -> None:
    """2 ms for a tree of four guesses are 1 ms a pass, and a tree of nine will take 3; a chain's guesses take 0.5 ms each."""
    for parents, guess_s in (((-1, -1, 0, 0), 1 * MS), ((), 0.5 * MS)):
        control, one = Control(16), tree_of(9, 0.6)
        one.guessed = True
        work = Work(request=1, rows=((0, 1),), tokens=(0,), samples=True)
        fact = WorkResult(rows=1, tokens=(0,), draft=(1, 2, 3, 4), parents=parents)
        result = StepResult(step=1, works=(fact,), forward_s=12 * MS, draft_s=2 * MS)
        control.observe(Plan(step=1, works=(work,)), [one], result)
        assert control._pool(one.stack["draft"]).guess(1) == pytest.approx(guess_s)
    assert passes(9, tree=True) == pytest.approx(3)
    assert passes(9) == 9


@pytest.mark.parametrize(
    ("row_s", "best"),
    [
        # 10 ms + 0.05 ms a row, and 0.6 more tokens from 7 guesses: 0.6 k^0.3 / 7^0.3 of k.  Tokens a second: 132.8 for k = 1,
        # 147.8 for 4, 152.7 for 6, 154.6 for 7.
        (0.05 * MS, 7),
        # 0.5 ms a row: 127.1, 128.4 for 2, 127.4 for 3.
        (0.5 * MS, 2),
        # 2.5 ms: 106.8 for one guess, where 110 were asked for.
        (2.5 * MS, 0),
    ],
)
def test_how_large_a_tree_is_best_by_hand(row_s: float, best: int) -> None:
    control = informed(lambda rows: 10 * MS + row_s * (rows - 1), 0.0, 1)
    one = tree_of(7, 0.6)
    one.pace.want = 0
    control.choose([one])
    assert one.pace.want == best


# ---------------------------------------------------------------------------------------------- a world


class World(NullExecutor):
    """An executor that says times by a known law.  right: by token index of all output so far, how often a guess is right."""

    def __init__(self, engine: Engine, *, row_s: float, guess_s: float, follow_s: float = 0.0) -> None:
        super().__init__(engine.kv.groups, stacks=engine.stacks)
        self.engine, self.row_s, self.guess_s, self.follow_s = engine, row_s, guess_s, follow_s
        self.rnd = random.Random(5)
        self.right: Callable[[], float] = lambda: 0.0
        self.silent = False
        self.slow: dict[int, int] = {}
        """Numbers of rows whose first steps, so many, are slow by accident."""
        self.now, self.tokens = 0.0, 0
        self.wants: list[int] = []
        self.followed = 0

    def propose(self, work: Work, state: int, output: int) -> Guesses:
        s, out = self.mirror.sequences[work.request], list[int]()
        if self.silent:
            return Guesses(())
        for i in range(min(8 if work.want < 0 else work.want, s.sampling.max_tokens - output - 1)):
            token = draw(state, s.sampling, s.seed, output + i, self.vocab)
            if self.rnd.random() >= self.right():
                token = (token + 1) % self.vocab
            out.append(token)
            state = step(state, token)
        return Guesses(out)

    def execute(self, plan: Plan) -> StepResult:
        result = super().execute(plan)
        target = [w for w in plan.works if w.model == "target"]
        rows = sum(len(w.tokens) for w in target)
        follow = sum(len(w.tokens) for w in plan.works if w.model != "target")
        guesses = max((len(f.draft) for f in result.works), default=0)
        forward_s = (9.5 * MS + self.row_s * rows) * self.rnd.uniform(0.95, 1.05)
        if self.slow.get(rows, 0):
            self.slow[rows] -= 1
            forward_s *= 4
        draft_s = self.guess_s * guesses + self.follow_s * follow + 1e-9
        self.now += forward_s + draft_s
        self.followed += follow
        self.wants += [w.want for w in target if w.samples]
        self.tokens += sum(len(f.tokens) for f in result.works)
        return msgspec.structs.replace(result, forward_s=forward_s + draft_s, draft_s=draft_s)


def engine_of(part: str = "draft=ngram(guesses=8)", models: int = 1, control: bool = True) -> Engine:
    limits = Limits(max_model_len=1 << 15, max_num_seqs=8, max_rows=256, max_samples=128)
    names = ("target", "draft")[:models]
    return Engine(
        groups(models=models, parked=False), 20_000, limits, Stacks(build_stack([part])), models=names, control=control
    )


def add(engine: Engine, id: int, tokens: int, prompt: int = 4) -> None:
    spec = RequestSpec(
        id=id, items=(TokenItem(tuple(range(prompt))),), sampling=SamplingSpec(max_tokens=tokens), seed=id
    )
    assert engine.add(spec, 0.0) == []


def go(engine: Engine, world: World, steps: int | None = None) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    while engine.has_work and steps != 0:
        plan, _ = engine.schedule(world.now)
        for event in engine.commit(world.now, plan, world.execute(plan)):
            if isinstance(event, Tokens):
                out.setdefault(event.id, []).extend(event.tokens)
        steps = None if steps is None else steps - 1
    return out


def flips(wants: Sequence[int]) -> int:
    """How often guessing went on or off; probes and looks at what plain decoding takes, of a few steps, left out."""
    runs = [(on, len(list(run))) for on, run in itertools.groupby(w > 0 for w in wants)]
    steady = [on for on, n in runs if n > 4]
    return sum(a != b for a, b in itertools.pairwise(steady))


@pytest.mark.parametrize("batch", [1, 4])
def test_useless_guesses_end_and_cost_at_most_three_percent(batch: int) -> None:
    engine = engine_of()
    world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
    for id in range(batch):
        add(engine, id, 600)
    go(engine, world)
    plain_s = 600 * (9.5 * MS + batch * MS)
    assert world.now <= plain_s / 0.97
    off = world.wants[40 * batch :]
    assert 0 < sum(w > 0 for w in off) / len(off) < 0.08
    assert batch > 1 or flips(world.wants) <= 1


def test_good_guesses_get_nearly_the_best_length() -> None:
    """At 0.7, the best fixed length by the formula; what the control reaches, its learning included."""
    engine = engine_of()
    world = World(engine, row_s=0.5 * MS, guess_s=0.3 * MS)
    world.right = lambda: 0.7
    add(engine, 1, 1500)
    go(engine, world)
    best = max(rate([k], [0.7], lambda rows: 9.5 * MS + 0.5 * MS * rows, 0.3 * MS) for k in range(9))
    assert world.tokens / world.now > 0.95 * best
    assert flips(world.wants) <= 2


def test_it_follows_an_acceptance_that_changes() -> None:
    """0.8, then 0, then 0.8 again: off within 60 steps, on again within 500, and no flutter between."""
    engine = engine_of()
    world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
    add(engine, 1, 20_000)
    world.right = lambda: 0.8
    go(engine, world, 300)
    assert world.wants[-1] > 2
    world.right = lambda: 0.0
    go(engine, world, 60)
    first = len(world.wants)
    go(engine, world, 300)
    assert sum(w > 0 for w in world.wants[first:]) < 30
    world.right = lambda: 0.8
    go(engine, world, 500)
    first = len(world.wants)
    go(engine, world, 100)
    assert sum(w > 2 for w in world.wants[first:]) >= 96  # but for a look at what plain decoding takes by now
    assert flips(world.wants) <= 3


def test_what_probes_gain_pays_for_more_of_them() -> None:
    """From the moment at which guesses begin to stand to eight steps with guesses on end: at most 200 steps over four worlds."""
    steps = 0
    for seed in range(4):
        engine = engine_of()
        world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
        world.rnd = random.Random(seed)
        add(engine, 1, 20_000)
        go(engine, world, 300)
        world.right = lambda: 0.8
        while steps <= 200 and not all(world.wants[-8:]):
            go(engine, world, 1)
            steps += 1
    assert steps <= 200


def test_probes_that_say_nothing_cost_nothing_and_go_on() -> None:
    """Prompt lookup that finds nothing: it may look again in every step, and guesses as soon as it finds something."""
    engine = engine_of()
    world = World(engine, row_s=1 * MS, guess_s=0.0)
    add(engine, 1, 4000)
    go(engine, world, 60)
    world.silent = True
    first = len(world.wants)
    go(engine, world, 300)
    assert sum(w > 0 for w in world.wants[first:]) > 250
    world.silent, world.right = False, lambda: 0.95
    go(engine, world, 60)
    assert world.wants[-1] > 2


def test_a_sequence_without_guesses_is_not_followed_and_catches_up() -> None:
    engine = engine_of("draft=speculative_sampling(guesses=4)", models=2)
    world = World(engine, row_s=1 * MS, guess_s=1 * MS, follow_s=0.02 * MS)
    add(engine, 1, 4000)
    go(engine, world, 60)
    assert world.wants[-1] == 0
    before, steps = world.followed, len(world.wants)
    go(engine, world, 10)
    assert world.followed == before or any(world.wants[steps:])
    add(engine, 2, 4000, prompt=200)
    go(engine, world, 4)
    assert engine.find(2).computed[1] == 0  # nor is a prompt that comes meanwhile
    world.right = lambda: 0.9
    go(engine, world, 1500)
    assert all(r.pace is not None and r.pace.want for r in engine.requests())
    assert all(len(r.context) - r.computed[1] < 12 for r in engine.requests())


def test_a_dear_draft_is_probed_on_who_came_just_now_and_comes_back() -> None:
    """A token to catch up with takes twice what a step may lose to probes: one who falls behind is out of reach for ever, and
    stays the one who was not probed for longest."""
    engine = engine_of("draft=speculative_sampling(guesses=4)", models=2)
    world = World(engine, row_s=1 * MS, guess_s=2 * MS, follow_s=0.25 * MS)
    add(engine, 1, 6000)
    go(engine, world, 200)
    assert world.wants[-1] == 0
    world.right = lambda: 0.95
    for id in range(2, 14):
        add(engine, id, 80)
        go(engine, world, 80)
    add(engine, 14, 800)
    go(engine, world, 40)
    newest = engine.find(14)
    assert newest.pace is not None
    assert newest.pace.want > 0


def test_nothing_is_kept_of_requests_that_ended() -> None:
    engine = engine_of()
    world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
    world.right = lambda: 0.5
    for id in range(200):
        add(engine, id, 5)
    go(engine, world)
    control = engine.control
    assert control is not None
    assert len(control._pools) == 1
    assert sum(len(c.shape) for c in control._costs.values()) < 100


def test_the_tokens_are_those_of_an_engine_that_does_not_choose() -> None:
    found = []
    for control in (True, False):
        engine = engine_of(control=control)
        world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
        world.right = lambda: 0.6
        for id in range(12):
            add(engine, id, 40)
        found.append(go(engine, world))
        assert all((w >= 0) is control for w in world.wants)
    assert found[0] == found[1]


def test_without_times_the_draft_does_as_it_likes() -> None:
    engine = engine_of()
    executor = World(engine, row_s=0.0, guess_s=0.0)
    add(engine, 1, 50)
    while engine.has_work:
        plan, _ = engine.schedule(0.0)
        facts = msgspec.structs.replace(executor.execute(plan), forward_s=0.0, draft_s=0.0)
        engine.commit(0.0, plan, facts)
    assert set(executor.wants) == {8}


def test_a_replay_decides_the_same(tmp_path: Path) -> None:
    """The times are in the record: other machine, same lengths."""
    engine = engine_of("draft=speculative_sampling(guesses=4)", models=2)
    record = tap(engine, tmp_path / "record")
    world = World(engine, row_s=1 * MS, guess_s=0.5 * MS, follow_s=0.02 * MS)
    world.right = lambda: 0.75 if world.tokens % 400 < 200 else 0.0
    for id in range(6):
        add(engine, id, 300)
    go(engine, world)
    record.close()
    assert len(set(world.wants)) > 2
    assert replay(tmp_path / "record").difference is None
