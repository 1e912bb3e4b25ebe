"""What guessing may lose: many sequences, the beginning of a batch, looks at plain decoding, probes, one long dear sequence."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest

from tests.core.test_control import MS, Draft, World, add, engine_of, go, informed, sequence
from tests.core.world import groups
from weft.config import Limits, Stacks, build_stack
from weft.core.control import LATE, SHARE, SOON, Control
from weft.core.engine import Engine
from weft.types import Plan, StepResult


def sized(size: int, a: float, *, want: int = 1) -> list[Any]:
    return [sequence(i, a, want=want) for i in range(size)]


@pytest.mark.parametrize(
    ("size", "a", "want", "on"),
    [
        # Rows are free and a guess takes 1 ms of 10, so that one guess promises (1 + a) / 1.1 and a second one less: 1.136 for
        # a = 0.25.  Asked for are 1.05 to stay and 1.1 to come, and 0.03 more for each doubling: 1.11 and 1.16 with four
        # sequences, 1.14 and 1.19 with eight.
        (1, 0.25, 1, True),
        (1, 0.25, 0, True),
        (4, 0.25, 1, True),
        (4, 0.25, 0, False),
        (8, 0.25, 1, False),
        (8, 0.32, 0, True),  # 1.2
        (16, 0.32, 1, True),  # 1.17
        (16, 0.32, 0, False),  # 1.22
    ],
)
def test_what_guessing_must_promise_grows_with_the_batch_by_hand(size: int, a: float, want: int, on: bool) -> None:
    control = informed(lambda rows: 10 * MS, 1 * MS, size, most=size * 3)
    some = sized(size, a, want=want)
    for x in some:
        x.stack["draft"].guesses = 1
    control.choose(some)
    assert any(x.pace.want for x in some) is on


def test_while_guessing_a_step_without_is_looked_at_now_and_then() -> None:
    """A promise of twice the speed: a look in 200 steps costs half a percent.  It takes one step, and guessing goes on behind it
    although it would not begin again (1.08 of the 1.1 that is asked for)."""
    for a, guess_s, often in ((0.999, 0.0, 200), (0.19, 1 * MS, SOON)):
        control = informed(lambda rows: 10 * MS, guess_s, 1)
        one, costs = sequence(1, a), control._costs[1]
        one.stack["draft"].guesses = 1
        wants = []
        for _ in range(6 * often + 200):
            control.choose([one])
            wants.append(one.pace.want)
            costs.add(1 + one.pace.want, 10 * MS)
        looks = [i for i, want in enumerate(wants) if not want]
        # Before, what plain decoding takes is not known for sure, as it was seen once or twice.
        assert all(often <= b - a <= often + 5 for a, b in itertools.pairwise(looks[-3:])), looks
        assert SOON <= often <= LATE


def test_a_batch_that_comes_at_once_does_not_guess_as_one_sequence_did() -> None:
    control = informed(lambda rows: 10 * MS + 2 * MS * max(0, rows - 8), 0.0, 1)
    lone = sequence(1, 0.9)
    control.choose([lone])
    assert lone.pace.want > 2
    some = sized(8, 0.9)
    for x in some:
        x.pace = None
        control.meet(x)
    assert [x.pace.want for x in some] == [lone.pace.want] + [0] * 7


def test_before_anything_is_known_one_sequence_guesses_and_no_more() -> None:
    control, some = Control(16), sized(4, 0.5)
    for x in some:
        x.pace = None
    control.choose(some)
    assert [x.pace.want for x in some] == [8, 0, 0, 0]


class Convex(World):
    """Rows as the 0.5B shape has them on two cores: up to eight are nearly free, from 16 on each costs what it computes."""

    def execute(self, plan: Plan) -> StepResult:
        before, result = self.now, super().execute(plan)
        rows = sum(len(w.tokens) for w in plan.works if w.model == "target")
        decodes = all(w.samples and len(w.tokens) == w.guesses + 1 for w in plan.works if w.model == "target")
        wavers = self.rnd.uniform(0.97, 1.03) * (1.6 if self.rnd.random() < 0.04 else 1.0)  # neighbours
        target_s = (16 + 0.1 * min(rows, 8) + 0.4 * max(0, min(rows, 16) - 8) + 0.75 * max(0, rows - 16)) * MS * wavers
        self.now = before + target_s + result.draft_s
        self.full += sum(len(f.tokens) for f in result.works) if decodes else 0
        return msgspec.structs.replace(result, forward_s=target_s + result.draft_s)

    full = 0


def many(part: str, control: bool, models: int = 1) -> Engine:
    limits = Limits(max_model_len=4096, max_num_seqs=32, max_rows=512, max_samples=512)
    names = ("target", "draft")[:models]
    return Engine(
        groups(models=models, parked=False), 20_000, limits, Stacks(build_stack([part])), models=names, control=control
    )


@pytest.mark.parametrize(("batch", "right"), list(itertools.product((8, 16, 32), (0.0, 0.3, 0.55, 0.7))))
def test_many_sequences_lose_at_most_three_percent(batch: int, right: float) -> None:
    """Waves of 48 tokens each, with their ragged ends, from the first step on; beside the same engine without a draft."""
    took = []
    for part in ("draft=ngram(guesses=4)", "draft=none"):
        engine = many(part, True)
        world = Convex(engine, row_s=0.0, guess_s=0.6 * MS)
        world.rnd, world.right = random.Random(batch), lambda: right
        for wave in range(4):
            for i in range(batch):
                add(engine, wave * batch + i, 48)
            go(engine, world)
        took.append(world.now)
    assert took[0] <= took[1] / 0.97


@pytest.mark.parametrize("seed", range(12))
def test_batches_that_grow_and_shrink_have_guesses_without_a_price(seed: int) -> None:
    """Sequences come in bursts: what a step with a probe would take may be beyond all that was seen, and is then not asked."""
    rnd = random.Random(seed)
    limits = Limits(max_model_len=1 << 15, max_num_seqs=128, max_rows=1024, max_samples=2048)
    stacks = Stacks(build_stack(["draft=ngram(guesses=3)"]))
    engine = Engine(groups(models=1, parked=False), 20_000, limits, stacks, models=("target",), control=True)
    world, told = World(engine, row_s=0.2 * MS, guess_s=0.1 * MS), dict[int, int]()
    right = rnd.choice((0.0, 0.3, 0.9))
    world.right = lambda: right
    lengths = [rnd.randrange(1, 60) for _ in range(200)]
    ids = iter(range(200))
    while len(told) < 200 or engine.has_work:
        for id in itertools.islice(ids, rnd.choice((0, 1, 1, 3, 17, 60))):
            add(engine, id, lengths[id])
        for id, tokens in go(engine, world, steps=rnd.randrange(1, 30)).items():
            told[id] = told.get(id, 0) + len(tokens)
    assert [told[id] for id in range(200)] == lengths


def test_a_long_lone_sequence_with_a_dear_draft_is_probed_at_distances_that_double() -> None:
    """A token to catch up with costs 2.4 % of a step: all of them would cost 2.4 % however seldom it is probed, so catching up
    may take 1 % of the rest of the answer, and no more."""
    engine = engine_of("draft=speculative_sampling(guesses=4)", models=2)
    world = World(engine, row_s=1 * MS, guess_s=1 * MS, follow_s=0.25 * MS)
    add(engine, 1, 12_000)
    go(engine, world, 100)
    first, before, tokens = len(world.wants), world.now, world.tokens
    go(engine, world, 2000)
    probes = [i for i, want in enumerate(world.wants[first:]) if want]
    far = [b - a for a, b in itertools.pairwise([0, *probes]) if b - a > 30]
    assert len(far) >= 3, far
    assert all(b >= 1.7 * a for a, b in itertools.pairwise(far[-3:])), far
    plain_s = (world.tokens - tokens) * 10.5 * MS
    assert world.now - before <= plain_s * (1 + 2 * SHARE) + SHARE * 12_000 * 10.5 * MS
    world.right, first = lambda: 0.95, len(world.wants)
    go(engine, world)
    assert sum(want > 0 for want in world.wants[first:]) > 500, "an answer that became easy is guessed again"


def test_dear_catching_up_is_not_paid_for_an_answer_that_soon_ends() -> None:
    control = informed(lambda rows: 10 * MS, 1 * MS, 1)
    control._models, pool = ("target", "draft"), control._pool(Draft())
    pool.row_s.add(0.5 * MS)
    for limit, probed in ((2000, False), (5000, True)):
        one = sequence(1, 0.0, want=0)
        one.stack["draft"].model, one.context, one.limit, one.planned = "x", [0] * 102, limit, [102, 0]
        control.credit, control._poor = 1.0, 0
        control._probe([(one, one.pace, pool, 8)], 1)
        # 100 tokens behind are 50 ms: 1 % of 4,898 steps of 10 ms is 490 ms, of 1,898 is 190.  Credit of a second pays either.
        assert one.pace.probing
        assert (one.pace.owed > 0) is True
        one.pace.owed, one.pace.want = 0.2, 0
        control.credit, control._poor, one.pace.probing, one.pace.caught = 0.05, 0, False, 0
        control._probe([(one, one.pace, pool, 8)], 1)
        assert one.pace.probing is probed, limit


def test_a_probe_is_billed_for_what_it_took() -> None:
    """Guesses that stand pay for themselves, no more: at 16 sequences a probe takes longer than it brings."""
    engine = many("draft=ngram(guesses=2)", True)
    world = Convex(engine, row_s=0.0, guess_s=2 * MS)
    world.right = lambda: 0.8
    for i in range(16):
        add(engine, i, 400)
    go(engine, world, 250)
    wants = world.wants[-16 * 150 :]
    steps = [wants[i : i + 16] for i in range(0, len(wants), 16)]
    assert 0 < sum(any(s) for s in steps) < 40
