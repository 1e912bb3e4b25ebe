"""Tokens drawn by the kernels are those that the reference draws, whatever the law; both race by the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.exec.test_sampler import GRID
from tests.native.machine import ISAS, MODULE
from weft.core import noise
from weft.exec import sampler
from weft.exec.sampler import Row
from weft.ops.cpu.drawing import LITTLE, RACE, Drawing
from weft.types import SamplingSpec

EMPTY = np.empty(0, np.int64)
WIDTHS = (1, 7, 50, 129, 4096, 151_936)


def logits_of(rows: int, vocab: int, spread: float, seed: int) -> Tensor:
    found = spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    found[::3] = found[::3].round()  # ties, also of what is kept last
    return found


def rows_of(count: int, **law: object) -> list[Row]:
    return [Row(SamplingSpec(**law), 977 * i, i % 5, EMPTY, 0) for i in range(count)]  # type: ignore[arg-type]


def asked(vocab: int) -> Iterator[tuple[Tensor, list[Row], float]]:
    """Logits and rows of every law, and the spread of the logits."""
    count = 3 if vocab > 10_000 else 12
    laws = GRID[:: 7 if vocab > 10_000 else 1]
    for n, (temperature, top_k, top_p, min_p) in enumerate(laws):
        for spread in (0.0, 0.1, 4.0):
            logits = logits_of(count, vocab, spread, n)
            yield logits, rows_of(count, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), spread


@cache
def reference(vocab: int) -> list[list[int]]:
    """What the reference draws, once for all sets of instructions."""
    return [sampler.draw(logits, rows) for logits, rows, _ in asked(vocab)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", WIDTHS)
def test_draws_are_the_reference_s(isa: str, vocab: int) -> None:
    program = MODULE.Program(2, isa)
    for (logits, rows, spread), wanted in zip(asked(vocab), reference(vocab), strict=True):
        assert sampler.draw(logits, rows, program) == wanted, (rows[0].sampling, spread)


WIDE = [
    (1.5, 0, 0.999, 0.0), (1e4, 0, 0.1, 0.0), (1e-9, 0, 0.9, 0.0), (0.8, 0, 0.5, 0.01), (0.8, 5000, 0.9, 0.0),
    (50.0, 5000, 0.2, 0.0), (30.0, 5000, 1.0, 0.0), (1.0, 19_999, 1.0, 0.0), (40.0, 300, 1.0, 0.0), (1e-9, 7000, 0.9, 0.0),
]  # fmt: skip
"""Laws that keep thousands of tokens, so that no threshold is found at the first look: temperature, top_k, top_p, min_p."""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("law", WIDE, ids=str)
def test_what_thresholds_keep_of_many_is_what_sorting_keeps(isa: str, law: tuple[float, int, float, float]) -> None:
    program = MODULE.Program(1, isa)
    vocab, count = 20_000, 16
    temperature, top_k, top_p, min_p = law
    for n, spread in enumerate((0.0, 0.01, 3.0, 40.0)):
        logits = logits_of(count, vocab, spread, n)
        logits[1:, 7:19_000:31] = float("-inf")  # as a grammar leaves them
        rows = rows_of(count, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert sampler.draw(logits, rows, program) == sampler.draw(logits, rows), spread


LARGE = [(0.8, 0, 0.95, 0.0), (1.0, 0, 0.3, 0.0), (3.0, 0, 0.9999, 0.0), (1.0, 50_000, 1.0, 0.0), (1.0, 50_000, 0.9, 0.0),
         (0.7, 40_000, 0.5, 0.001)]  # fmt: skip
"""Laws over so many tokens that a part of them says first about where the threshold will be."""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("law", LARGE, ids=str)
def test_thresholds_among_very_many_also_where_a_part_misleads(isa: str, law: tuple[float, int, float, float]) -> None:
    program = MODULE.Program(1, isa)
    temperature, top_k, top_p, min_p = law
    logits = logits_of(6, 70_000, 2.5, 3)
    logits[2] = logits[2].sort(descending=True).values
    logits[3].view(-1, 1000)[:] -= 9.0 * (torch.arange(70) % 3)[:, None]
    places = torch.arange(70_000) // 64 % 16
    logits[4][places == 0] -= 30.0  # what a part of every sixteen strips would hold
    logits[5][places == 0] += 30.0
    several = rows_of(
        48, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )  # of which some would win from outside
    for i in range(0, 48, 6):
        rows = several[i : i + 6]
        assert sampler.draw(logits, rows, program) == sampler.draw(logits, rows)


def test_greedy_rows_penalties_bans_and_forced_tokens() -> None:
    program = MODULE.Program(1)
    logits = logits_of(5, 300, 2.0, 5)
    history = np.array([3, 3, 250, -1, 7])
    laws = [
        SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.0, repetition_penalty=1.3, logit_bias={250: 50.0}),
        SamplingSpec(presence_penalty=1.0, frequency_penalty=0.5), SamplingSpec(stop_ids=(1, 2), min_tokens=9), SamplingSpec(),
    ]  # fmt: skip
    rows = [Row(law, 11, 2, history, 2, forced=42 if i == 4 else None) for i, law in enumerate(laws)]
    before = logits.clone()
    wide = torch.zeros(5, 512)
    wide[:, :300] = logits
    got = sampler.draw(wide[:, :300], rows, program)
    assert got == sampler.draw(logits, rows)
    assert got[0] == int(logits[0].argmax())
    assert got[1] == 250
    assert got[4] == 42
    assert torch.equal(logits, before)


@pytest.mark.parametrize("isa", ["", *ISAS])
def test_rows_without_a_finite_greatest_logit_have_no_winner(isa: str) -> None:
    program = MODULE.Program(1, isa) if isa else None
    logits = torch.zeros(6, 100)
    logits[0, 99], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, :98], logits[4, 17] = float("-inf"), float("-inf")
    for law in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}):
        found = sampler.draw(logits, rows_of(6, **law), program)
        assert found[:3] == [-1, -1, -1]
        assert found[3] in (98, 99)
        assert 0 <= found[4] < 100
        assert found[4] != 17


def test_tiny_and_huge_temperatures() -> None:
    program = MODULE.Program(1)
    logits = torch.tensor([[1e4, -1e4, 9999.0, 1e4]])
    tiny = {sampler.draw(logits, [Row(SamplingSpec(temperature=1e-40), s, 0, EMPTY, 0)], program)[0] for s in range(40)}
    assert tiny == {0, 3}
    huge = {sampler.draw(logits, [Row(SamplingSpec(temperature=1e30), s, 0, EMPTY, 0)], program)[0] for s in range(60)}
    assert huge == {0, 1, 2, 3}


# ---------------------------------------------------------------------------------------------- by how many threads


class Noted:
    def __init__(self, token: int) -> None:
        self.token, self.calls = token, 0

    def draw(self, where: Sequence[int], vocab: int, *laws: Sequence[float]) -> list[int]:
        self.calls += 1
        assert all(len(law) == len(where) for law in laws)
        return [self.token] * len(where)


@pytest.mark.parametrize(
    ("rows", "vocab", "temperature", "alone"),
    [
        (1, 4096, 0.8, True),
        (51, 4096, 0.8, True),
        (52, 4096, 0.8, False),
        (512, 4096, 0.0, True),
        (513, 4096, 0.0, False),
        (1, LITTLE // RACE, 1.0, True),
        (1, LITTLE // RACE + 1, 1.0, False),
    ],
)
def test_few_logits_stay_on_the_thread_that_asks(rows: int, vocab: int, temperature: float, alone: bool) -> None:
    several, one = Noted(7), Noted(8)
    found = Drawing(several, one).draw(range(rows), vocab, [temperature] * rows, *[[0.0] * rows] * 4)
    assert found == [8 if alone else 7] * rows
    assert (several.calls, one.calls) == (int(not alone), int(alone))


@pytest.mark.parametrize("count", [5, 51, 52, 80])
def test_on_either_side_the_winner_is_the_race_s(count: int) -> None:
    """By the formula, token by token in double precision: argmax of logit / temperature - log(-log u)."""
    vocab = 4096
    logits = logits_of(count, vocab, 3.0, count)[:, :vocab].contiguous()
    drawing = Drawing(MODULE.Program(3), MODULE.Program(1))
    rows = rows_of(count, temperature=0.7)
    found = sampler.draw(logits, rows, drawing)
    for i, row in enumerate(rows):
        gumbel = np.array([noise.gumbel(row.seed, row.output, t) for t in range(vocab)])
        raced = logits[i].double().numpy() / 0.7 + gumbel
        assert raced[found[i]] >= raced.max() - 1e-4, i
