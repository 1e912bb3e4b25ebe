"""Stacks of requests over the server's: what may be laid over, what is shared, what is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weft.config import MAX_STACKS, Stacks, build_stack
from weft.errors import ComposeError, ConfigError
from weft.registry import Part
from weft.traits import Effect, Fidelity, Trait

Make = Callable[..., Part]


def test_nothing_laid_over_is_the_servers_own() -> None:
    base = build_stack(["draft=ngram"])
    assert Stacks(base).of(()) is base


def test_a_part_takes_the_place_of_the_servers_in_its_slot() -> None:
    base = build_stack(["draft=ngram(guesses=2)", "schedule=layered"])
    stack = Stacks(base).of(("draft=ngram(guesses=7)",))
    assert stack["draft"].guesses == 7
    assert stack["schedule"] is base["schedule"]
    assert {p.slot for p in stack.parts} == {p.slot for p in base.parts}


def test_equal_parts_share_one_instance() -> None:
    stacks = Stacks(build_stack())
    assert stacks.of(("draft=ngram",)) is stacks.of(("draft=ngram",))
    assert stacks.of(("draft=ngram",))["draft"] is not stacks.of(("draft=ngram(guesses=2)",))["draft"]


@pytest.mark.parametrize(
    ("techniques", "said"),
    [
        (("schedule=fcfs",), "whole server"),
        (("kv.evict=lru",), "whole server"),
        (("draft=ngrm",), "ngram"),
        (("draft=ngram(size=2)",), "size"),
        (("nonsense",), "SLOT=NAME"),
    ],
)
def test_what_a_request_may_not_have(techniques: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Stacks(build_stack()).of(techniques)


def test_one_slot_twice_is_refused_with_the_reason() -> None:
    with pytest.raises(ComposeError, match="one technique"):
        Stacks(build_stack()).of(("draft=ngram", "draft=ngram(guesses=2)"))


def test_acts_are_added_up_and_outlive_a_stack_that_was_let_go() -> None:
    """Each instance counts once, whether it is the server's, a live request's, or one of a stack that had to go."""
    stacks = Stacks(build_stack(["draft=ngram"]))
    stacks.base["draft"].observe(3, 1)
    for i in range(1, MAX_STACKS + 11):
        stacks.of((f"draft=ngram(guesses={i})",))["draft"].observe(2, 1)
    stacks.of(("accept=race",))  # shares the server's draft, whose acts must not count again
    assert stacks.acts()["draft=ngram.proposed"] == 3 + 2 * (MAX_STACKS + 10)
    assert stacks.acts()["draft=ngram.accepted"] == 1 + MAX_STACKS + 10


def test_settings_name_what_changes_kv_values(technique: Make) -> None:
    plain = technique("draft", "plain")
    changes = technique("skip", "changes", fidelity=Fidelity.APPROX, effects=frozenset({Effect.REWRITES_KV}))
    nothing = build_stack([plain]).settings
    assert nothing == build_stack().settings
    stack = build_stack([plain, changes])
    assert stack.settings != nothing
    assert b"skip=changes" in stack.settings
    assert b"draft" not in stack.settings
    stack["skip"].digest = b"other weights"
    assert stack.settings.endswith(b"other weights")


def test_history_of_an_instance_goes_beyond_its_traits(technique: Make) -> None:
    reads = technique("kv.compress", "reads", needs=frozenset({Trait.READS_HISTORY}), history=3)
    stack = build_stack([reads])
    assert stack.history == 3
    stack["kv.compress"].history = 40
    assert stack.history == 40
    assert build_stack().history == 0


def test_state_and_guesses_are_read_off_the_traits(technique: Make) -> None:
    holds = technique("kv.compress", "holds", effects=frozenset({Effect.PER_REQUEST_STATE}))
    assert build_stack([holds]).stateful
    assert not build_stack().stateful
