"""What choosing draft lengths costs where no request has a draft (nothing) or nobody is given guesses (next to nothing), and what
is told of the choices."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from types import FrameType
from typing import Any

import msgspec
import pytest

from tests.core.test_control import MS, World, add, engine_of, go
from weft.core import control
from weft.core.control import ASKED, SHARE, WAIT, Control
from weft.core.engine import Engine
from weft.types import Plan, RequestSpec, SamplingSpec, StepResult, TokenItem


def calls(engine: Engine, world: World, steps: int) -> tuple[int, int]:
    """(function calls, those of them into the controller) that an engine makes for so many steps, the executor's left out."""
    found = Counter[bool]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found[frame.f_code.co_filename == control.__file__] += 1

    gc.disable()  # a collection calls whoever asked to be told of it (hypothesis does)
    try:
        for _ in range(steps):
            sys.setprofile(note)
            plan, _ = engine.schedule(world.now)
            sys.setprofile(None)
            result = world.execute(plan)
            sys.setprofile(note)
            engine.commit(world.now, plan, result)
            sys.setprofile(None)
    finally:
        sys.setprofile(None)
        gc.enable()
    return sum(found.values()), found[True]


def guessed(engine: Engine, id: int, tokens: int, part: str) -> None:
    spec = RequestSpec(
        id=id, items=(TokenItem((1, 2, 3)),), sampling=SamplingSpec(max_tokens=tokens), techniques=(part,), seed=id
    )
    assert engine.add(spec, 0.0) == []


def test_without_a_draft_nothing_is_looked_at() -> None:
    """The engine that may choose makes the very calls of one that may not, whatever the batch."""
    found = []
    for chooses in (True, False):
        engine = engine_of("draft=none", control=chooses)
        for id in range(8):
            add(engine, id, 50)
        found.append(calls(engine, World(engine, row_s=1 * MS, guess_s=0.5 * MS), 20))
    assert found[0] == found[1]
    assert found[0][1] == 0


def test_it_looks_while_there_is_a_request_with_a_draft_and_no_longer() -> None:
    engine = engine_of("draft=none")
    for id in range(4):
        add(engine, id, 200)
    world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
    assert calls(engine, world, 3)[1] == 0
    guessed(engine, 9, 5, "draft=ngram(guesses=2)")
    assert calls(engine, world, 3)[1] > 0
    go(engine, world, 6)
    with pytest.raises(Exception, match="9"):
        engine.find(9)
    assert calls(engine, world, 3)[1] == 0
    engine.cancel(0)
    assert engine.scheduler.guessed == 0
    guessed(engine, 10, 50, "draft=ngram")
    engine.cancel(10)
    assert engine.scheduler.guessed == 0


def test_what_was_chosen_is_told() -> None:
    """Counted beside the engine, from the plans: what each sampled sequence was allowed, step by step."""
    engine = engine_of()
    world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
    world.right = lambda: 0.8 if world.tokens < 600 else 0.0
    for id in range(3):
        add(engine, id, 900)
    go(engine, world)
    stats = engine.stats
    last = sum(w > 0 for w in world.wants)
    assert stats.draft_guesses == sum(world.wants[3:])  # but for the prompts' steps, whose lengths were not chosen
    assert stats.draft_sequences == len(world.wants) - 3
    assert 3 <= stats.draft_off < 30
    assert 0 < stats.draft_probes < last
    quiet = engine_of(control=False)
    add(quiet, 1, 50)
    go(quiet, World(quiet, row_s=1 * MS, guess_s=0.5 * MS))
    stats = quiet.stats
    assert (stats.draft_guesses, stats.draft_sequences, stats.draft_off, stats.draft_probes) == (0, 0, 0, 0)


def resting(size: int) -> tuple[list[int], World]:
    """Calls into the controller in each of 40 steps of a batch whose guesses never stand, and what was wanted there."""
    engine = engine_of()
    world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
    for id in range(size):
        add(engine, id, 900)
    go(engine, world, 100)
    world.wants.clear()
    return [calls(engine, world, 1)[1] for _ in range(40)], world


def test_where_nobody_is_given_guesses_most_steps_cost_the_same_for_any_batch() -> None:
    (few, quiet), (many, _) = resting(2), resting(8)
    assert sum(quiet.wants) < 20
    assert min(few) == min(many) < 10
    assert sum(n == min(many) for n in many) > 25


class Even(World):
    """A machine whose steps take the same time, always."""

    def execute(self, plan: Plan) -> StepResult:
        result = super().execute(plan)
        rows = sum(len(w.tokens) for w in plan.works if w.model == "target")
        return msgspec.structs.replace(result, forward_s=(10 + rows) * MS + result.draft_s)


@pytest.mark.parametrize("right", [0.0, 0.3, 0.8])
def test_a_choice_that_stands_is_the_one_that_would_be_made_anew(right: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for anew in (False, True):
        if anew:
            monkeypatch.setattr(Control, "_stands", lambda self, ran: False)
        engine = engine_of()
        world = Even(engine, row_s=1 * MS, guess_s=0.5 * MS)
        world.right = lambda world=world: right if world.tokens % 900 < 600 else 0.0  # type: ignore[misc]
        for id in range(6):
            add(engine, id, 200 + 40 * id)
        go(engine, world)
        stats, known = engine.stats, engine.control
        assert known is not None
        learnt = [(c.level, c.shape, c.at, c.seen, c.plain_s) for c in (known._every, *known._costs.values())]
        told = stats.draft_sequences, stats.draft_guesses, stats.draft_off, stats.draft_probes
        found.append((world.wants, told, learnt))
    assert found[0] == found[1]
    assert found[0][1][3] > 0


def test_a_draft_with_nothing_to_say_is_asked_as_seldom_as_it_costs_and_no_seldomer() -> None:
    """Asking takes 0.1 or 100 of a step's 14 ms: eight times as much is counted, at most what may be lost in sixteen steps."""
    for asked_s, least, most in ((0.1 * MS, 5, 7), (100 * MS, WAIT - 1, WAIT + 2)):
        engine = engine_of()
        world = World(engine, row_s=1 * MS, guess_s=0.5 * MS)
        for id in range(4):
            add(engine, id, 1200)
        go(engine, world, 100)
        world.silent, probes = True, engine.stats.draft_probes
        for _ in range(600):
            plan, _ = engine.schedule(world.now)
            result = world.execute(plan)
            if any(w.want > 0 for w in plan.works):
                result = msgspec.structs.replace(result, draft_s=asked_s, sample_s=asked_s)
            engine.commit(world.now, plan, result)
        probes = engine.stats.draft_probes - probes
        assert least <= 600 / probes <= most
        assert asked_s > MS or probes * ASKED * asked_s <= 600 * SHARE * 14 * MS * 1.1
