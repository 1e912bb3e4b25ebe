"""How far ahead a draft guesses beside the target: the longer of two times, by hand and in a world of known times."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest

from tests.core.test_control import MS, Draft, World, add, engine_of, go, informed, sequence
from weft.core.control import Control
from weft.core.lengths import alternating
from weft.core.prices import Costs
from weft.slots import Guesses
from weft.types import Plan, StepResult, Work, WorkResult


class Early(Draft):
    """Stands for one that guesses while the target computes."""

    early = None


def test_two_times_beside_each_other_are_priced_by_the_longer_one_by_hand() -> None:
    """10 ms + 0.5 ms a row, 3 ms a guess, a = 0.8.  Of k = 1, 2, 3, 4 the tokens of a step are 1 + 0.64 / 1.16 = 1.552,
    1 + 0.8 * 1.44 / 1.288 = 1.894, 1 + 0.8 * 1.952 / 1.3904 = 2.123 and 1 + 0.8 * 2.3616 / 1.47232 = 2.283; the target takes
    10.5, 11, 11.5 and 12 ms, the draft 6, 9, 12 and 15: 148, 172, 177 and 152 tokens a second.  One after the other they would
    bring 94, 95, 90 and 85 at the most, and plain decoding 100."""
    for beside, best in ((True, 3), (False, 0)):
        control = informed(lambda rows: 10 * MS + 0.5 * MS * (rows - 1), 3 * MS, 1)
        control._pools["Early"] = control._pools.pop("Draft")
        control._pools["Early"].beside = beside
        one = sequence(1, 0.8)
        one.stack["draft"] = Early()
        control.choose([one])
        assert one.pace.want == best


@pytest.mark.parametrize("a", [0.0, 0.35, 0.8, 0.97])
def test_tokens_of_a_step_by_hand_and_as_the_rule_plays_out(a: float) -> None:
    """A step that verifies k guesses, or none, and what it leaves for the next one; each further guess is worth less."""
    rnd = random.Random(8)
    for k in (1, 2, 5):
        tokens, hand, steps = 0, 0, 40_000
        for _ in range(steps):
            stood = 0
            while stood <= hand and rnd.random() < a:  # the last one is in the place of the target's own
                stood += 1
            tokens += min(stood, hand) + 1
            hand = k if stood == hand + 1 else 0
        assert alternating(a, k) == pytest.approx(tokens / steps, rel=0.02)
    gains = [alternating(a, k) - alternating(a, k - 1) for k in range(1, 9)]
    assert all(first >= second for first, second in itertools.pairwise(gains))
    assert alternating(a, 0) == 1.0
    assert alternating(0.5, 2) == pytest.approx(1 + 0.5 * 0.75 / 1.375)


def test_where_it_beats_taking_turns_by_hand() -> None:
    """The target 1, a guess d, both free beside each other, a = 0.7, k = 4: 1.81 tokens in a pass against 2.77 in 1 + 4 d, so
    that turns win below d = 0.133."""
    a, k = 0.7, 4
    turns = (1 - a ** (k + 1)) / (1 - a)
    assert (alternating(a, k), turns) == (pytest.approx(1.8102, abs=1e-4), pytest.approx(2.7731, abs=1e-4))
    for d, wins in ((0.05, False), (0.12, False), (0.14, True), (0.2, True)):
        assert (alternating(a, k) / max(1.0, d * (k + 1)) > turns / (1 + k * d)) is wins


def test_steps_beside_a_draft_have_prices_of_their_own() -> None:
    costs = Costs()
    costs.add(1, 10 * MS)
    assert costs(1, True) == pytest.approx(10 * MS)  # never seen: as without
    costs.add(1, 14 * MS, True)
    costs.add(5, 15 * MS, True)
    assert costs(1, True) == pytest.approx(14 * MS)
    assert costs(3, True) == pytest.approx(14.5 * MS)
    assert costs(1) == pytest.approx(10 * MS)
    assert (costs.known, costs.beside) == ([1], [1, 5])


@pytest.mark.parametrize(
    ("guesses", "tokens", "draft", "trials"),
    [
        (0, 1, (), (0, 1)),  # nothing in hand: what was written in the target's place fell
        (0, 1, (7, 8), (1, 1)),  # or stood, and what was written behind it is there
        (2, 1, (), (0, 1)),
        (2, 2, (), (1, 2)),
        (2, 3, (), (2, 3)),  # both stood, and the one in the target's place fell
        (2, 3, (7, 8), (3, 3)),
    ],
)
def test_what_was_written_in_the_target_s_place_is_a_trial(
    guesses: int, tokens: int, draft: tuple[int, ...], trials: tuple[int, int]
) -> None:
    """Else a draft that is never right would never be found out, since no guess of it is ever verified."""
    control, one = Control(16, ("target", "draft")), sequence(1, 0.0, trials=0.0, want=2)
    one.stack["draft"] = Early()
    works = (
        Work(request=1, rows=((10, 11 + guesses),), tokens=(5,) * (1 + guesses), guesses=guesses, samples=True),
        Work(request=1, model="draft", rows=((10, 11),), tokens=(5,), ahead=guesses + 2),
    )
    facts = (WorkResult(rows=1, tokens=(6,) * tokens, draft=draft), WorkResult(rows=tokens))
    result = StepResult(step=1, works=facts, forward_s=10 * MS, beside_s=6 * MS)
    control.observe(Plan(step=1, works=works), [one, one], result)
    assert (one.pace.stood, one.pace.tried) == trials
    pool = control._pools["Early"]
    assert pool.beside
    assert pool.guess(1) == pytest.approx(2 * MS), "three passes for two guesses"
    assert control._costs[1].beside == [1 + guesses]


class Parallel(World):
    """Of PEARL: the draft computes beside the target, and what it wrote is there where all before it stood."""

    def propose(self, work: Work, state: int, output: int) -> Guesses:
        stood = output - work.output - 1 == work.guesses and self.rnd.random() < self.right()
        return super().propose(work, state, output) if stood else Guesses(())

    def execute(self, plan: Plan) -> StepResult:
        before = self.now
        result = super().execute(plan)
        target = {w.request: (w, f) for w, f in zip(plan.works, result.works, strict=True) if w.model == "target"}
        facts, passes = list(result.works), 0
        for i, work in enumerate(plan.works):
            if work.model == "draft":
                verified, fact = target[work.request]
                passes = max(passes, work.ahead - verified.guesses + 1) if work.ahead > verified.guesses else passes
                facts[i] = msgspec.structs.replace(facts[i], rows=len(work.tokens) + max(0, len(fact.tokens) - 1))
        target_s = 9.5 * MS + self.row_s * sum(len(w.tokens) for w, _ in target.values())
        beside_s = self.guess_s * passes
        waited = max(0.0, beside_s - target_s)
        self.now = before + target_s + waited
        return msgspec.structs.replace(
            result, works=tuple(facts), forward_s=target_s + waited, draft_s=waited, beside_s=beside_s
        )


@pytest.mark.parametrize(
    ("right", "guess_s", "on"),
    [(0.8, 2 * MS, True), (0.9, 0.2 * MS, True), (0.2, 2 * MS, False), (0.8, 8 * MS, False)],
)
def test_nearly_the_best_length_in_a_world_of_known_costs(right: float, guess_s: float, on: bool) -> None:
    """What the control reaches beside the best fixed length by the formula, its learning included; off where none pays."""
    engine = engine_of("draft=pearl(guesses=8)", models=2)
    world = Parallel(engine, row_s=0.5 * MS, guess_s=guess_s)
    world.right = lambda: right
    add(engine, 1, 1500)
    go(engine, world)
    best = max(
        alternating(right, k) / max(9.5 * MS + 0.5 * MS * (1 + k), guess_s * (k + 1) if k else 0.0) for k in range(9)
    )
    assert world.tokens / world.now > 0.93 * best
    wants = world.wants[100:]
    assert (sum(w > 0 for w in wants) > 0.8 * len(wants)) is on
