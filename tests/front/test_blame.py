"""Whom the journal blames for an engine that died while prompts were computed, or contexts once more: who was at something new.

Engines are real and pure, as in `test_journal`; who kills them is said by row.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.front.test_journal import World, spec, undisturbed
from weft.front.entry import MOST_EXCUSED
from weft.front.journal import MOST_STRIKES
from weft.types import Add


def lives(world: World, plans: Iterable[int]) -> None:
    """Kill each engine in its plan of this number, then let the last one be."""
    for last in plans:
        for _ in range(last - 1):
            world.step()
        plan, _ = world.engine.schedule(0.0)
        world.frame(world.held, world.engine.members(plan), world.engine.behind(plan))
        world.die()
    world.run()


def test_a_long_prompt_is_not_blamed_for_engines_that_others_end() -> None:
    """Engines that hardly ever live long enough for a prompt of six plans.  What one of them has computed of it, another may."""
    world = World(rows=16)
    world.send(Add(spec(1, length=90, max_tokens=4)))
    lives(world, [3, 2, 1, 2, 5, 1, 4, 3, 2, 6, 3, 1])
    assert world.deaths == 12
    assert world.outcome() == undisturbed([spec(1, length=90, max_tokens=4)]).outcome()


def test_a_long_answer_that_is_computed_again_is_not_blamed_for_engines_that_others_end() -> None:
    """Its prompt and the tokens that the client has were computed before, all but the last row."""
    world = World(rows=16)
    world.send(Add(spec(1, length=60, max_tokens=30)))
    while len(world.tokens.get((1, 0), ())) < 20:
        world.step()
    world.die()
    lives(world, [2, 1, 4, 3])
    assert world.deaths == 5
    assert world.outcome() == undisturbed([spec(1, length=60, max_tokens=30)]).outcome()


@pytest.mark.parametrize("row", [0, 20, 40, 59])
def test_a_prompt_that_kills_engines_at_one_of_its_rows_fails_alone(row: int) -> None:
    """However its rows are cut while others are computed beside it."""
    others = [spec(i, max_tokens=30) for i in (1, 2, 4)]
    world = World(lambda firsts, _: 13 in firsts and computes(world, 13, row), rows=16)
    world.send(*(Add(s) for s in (*others, spec(3, first=13, length=60))))
    world.run()
    end = world.ends.pop((3, 0))
    assert "ended the engine each time" in (end.error or "")
    assert 4 <= world.deaths <= 8
    calm = undisturbed(others)
    assert (world.tokens, world.ends.keys()) == (calm.tokens, calm.ends.keys())


def computes(world: World, first: int, row: int) -> bool:
    """Whether the last plan has this row of the prompt that begins so."""
    first_of = world.executor.first
    return any(w.start <= row < w.stop for w in world.executor.plan.works if first_of.get(w.request) == first)


def test_one_that_kills_engines_whenever_it_is_computed_again_is_found_too() -> None:
    """Rows that were computed before are an excuse a few times, and not for ever."""
    world = World(lambda firsts, drawn: world.deaths > 0 and 13 in firsts and computes(world, 13, 5), rows=16)
    others = [spec(i, max_tokens=30) for i in (1, 2)]
    world.send(*(Add(s) for s in (*others, spec(3, first=13, length=60))))
    while len(world.tokens.get((3, 0), ())) < 5:
        world.step()
    world.die()
    world.run()
    assert world.ends.pop((3, 0)).reason == "error"
    assert world.deaths <= 1 + MOST_EXCUSED + MOST_STRIKES
    assert {at: x for at, x in world.tokens.items() if at != (3, 0)} == undisturbed(others).tokens
