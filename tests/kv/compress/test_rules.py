"""Cuts, budgets and what is kept, worked by hand on small numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.compose import compose
from weft.config import Stacks, build_stack
from weft.errors import ConfigError
from weft.registry import parse
from weft.slots import Kept

MEMBERS = (
    "kv.compress=streaming_llm(sinks=2,window=5,every=3)",
    "kv.compress=h2o(heavy=3,recent=4,every=3)",
    "kv.compress=recent(window=7,every=3)",
    "kv.compress=random(chosen=3,recent=4,every=3)",
)


@dataclass
class View:
    """As `exec.compress.CompressView`, of 2 layers with 2 heads."""

    entries: int
    length: int = 0
    prompt: int = 4
    layers: tuple[int, ...] = (0, 1)
    kv_heads: int = 2
    mass: Tensor = field(default_factory=lambda: torch.zeros(2, 2, 0, dtype=torch.float64))


def made(text: str) -> Any:
    return parse(text).build()


@pytest.mark.parametrize("text", MEMBERS)
def test_entries_never_exceed_the_budget(text: str) -> None:
    """All of them keep 7 entries and 3 more: cuts at 9, 12, 15, ... whatever the prompt."""
    technique = made(text)
    assert [technique.cuts(4, p) for p in (0, 7, 8, 9, 10, 11, 12, 1000)] == [9, 9, 9, 12, 12, 12, 15, 1002]
    assert technique.cuts(5000, 8) == 9
    entries = 0
    for position in range(1, 200):
        entries += 1
        assert entries <= technique.budget(4, 200) == 10
        if technique.cuts(4, position - 1) == position:
            kept = technique.keep(View(entries, position, mass=torch.rand(2, 2, entries, dtype=torch.float64)))
            entries = kept.indices.shape[-1]
            assert entries == 7
    assert technique.budget(4, 6) == 6
    assert technique.acts == {"cuts": 64, "entries_dropped": 2 + 63 * 3}


def test_streaming_llm_keeps_sinks_and_window() -> None:
    kept: Kept = made(MEMBERS[0]).keep(View(9))
    assert kept.indices.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert kept.rotate == (2, 0, 2), "entries 2 and 3 went: the sinks move up by two"
    assert made("kv.compress=streaming_llm(sinks=0,window=5,every=3)").keep(View(9)).rotate is None


def test_h2o_keeps_what_got_most_in_each_head() -> None:
    mass = torch.zeros(2, 2, 10, dtype=torch.float64)
    mass[0, 0, [1, 3, 5]] = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    mass[0, 1, :6] = torch.tensor([6, 5, 4, 3, 2, 1])
    mass[1, 0, 6:] = 9.0  # the newest four stay anyway: of the others all got nothing, and the oldest stay
    mass[1, 1, [5, 4]] = 1.0
    kept: Kept = made(MEMBERS[1]).keep(View(10, mass=mass))
    heavy = kept.indices[:, :, :3].flatten(0, 1).tolist()
    assert heavy == [[1, 3, 5], [0, 1, 2], [0, 1, 2], [0, 4, 5]]
    assert kept.indices[:, :, 3:].flatten(0, 1).tolist() == [[6, 7, 8, 9]] * 4
    assert kept.rotate is None


def test_recent_keeps_the_newest() -> None:
    assert made(MEMBERS[2]).keep(View(9)).indices.tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_random_is_a_fair_lot_of_seed_and_position() -> None:
    technique = made(MEMBERS[3])
    assert torch.equal(technique.keep(View(10, 30)).indices, made(MEMBERS[3]).keep(View(10, 30)).indices)
    drawn = torch.stack([technique.keep(View(10, p)).indices for p in range(900)])
    assert drawn[:, 3:].tolist() == [[6, 7, 8, 9]] * 900
    counts = drawn[:, :3].flatten().bincount(minlength=6)
    assert counts.sum() == 2700
    assert (counts - 450).abs().max() < 5 * (900 * 0.25) ** 0.5, "three of six, each as likely as the others"
    other = made("kv.compress=random(chosen=3,recent=4,every=3,seed=1)")
    assert any(not torch.equal(other.keep(View(10, p)).indices, drawn[p]) for p in range(5))


@pytest.mark.parametrize(
    "text",
    [
        "streaming_llm(sinks=-1)", "streaming_llm(window=0)", "streaming_llm(every=0)", "h2o(heavy=-1)", "h2o(recent=0)",
        "h2o(every=0)", "h2o(observe=0)", "recent(window=0)", "recent(every=0)", "random(chosen=-1)", "random(recent=0)",
        "random(every=0)", "random(seed=-1)", "h2o(heavy=1.5)",
    ],
)  # fmt: skip
def test_bad_arguments_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=text.partition("(")[2].partition("=")[0]):
        made(f"kv.compress={text}")


def test_h2o_says_what_it_has_to_see() -> None:
    assert made("kv.compress=h2o(observe=7)").observe_rows == 7
    assert build_stack(["kv.compress=h2o(observe=7)"]).history == 7
    assert made("kv.compress=h2o(observe=None)").observe_rows is None
    assert build_stack(["kv.compress=h2o(observe=None)"]).history > 10**9


@pytest.mark.parametrize("text", MEMBERS)
def test_it_composes_and_may_be_asked_for_by_a_request(text: str) -> None:
    assert compose([parse(text)]).verdict == "ok"
    stack = Stacks(build_stack()).of((text,))
    assert stack.budget(4, 200) == 10
    assert stack.cut(4, 0) == 9
    assert stack.settings == b"", "what stands before a first cut is anybody's prefix"


def test_a_cut_never_parts_a_tile_of_the_prompt() -> None:
    """Tiles of 8 in a prompt of 21: cuts move to their ends, and the budget by what that may add."""
    from dataclasses import replace

    class Tiled:
        tile = 8

    plain = build_stack([MEMBERS[2]])
    stack = replace(plain, instances={**plain.instances, "attention": Tiled()})
    assert [stack.cut(21, p) for p in (0, 8, 15, 16, 20)] == [16, 16, 16, 21, 21]
    assert [stack.cut(21, p) for p in (21, 23, 24)] == [24, 24, 27]
    assert stack.budget(21, 200) == 10 + 7
    entries = last = 0
    for position in range(1, 60):
        entries += 1
        assert entries <= 17
        if stack.cut(21, position - 1) == position:
            entries, last = 7, position
    assert last == 57
