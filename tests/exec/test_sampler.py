"""The sampler against the pure noise of the core, the warpers of transformers, and the law itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from weft.accept.race import Race
from weft.core import noise
from weft.exec import sampler
from weft.exec.sampler import Row
from weft.exec.verify import Verified
from weft.types import SamplingSpec

EMPTY = np.empty(0, np.int64)


def row(history: list[int] | None = None, prompt: int = 0, seed: int = 1, output: int = 0, **law: object) -> Row:
    return Row(SamplingSpec(**law), seed, output, np.array(history or [], np.int64), prompt)  # type: ignore[arg-type]


def test_noise_is_the_cores_token_by_token() -> None:
    ids = np.array([0, 1, 7, 4095, 151_935, 2**31 - 1])
    for seed, output in ((0, 0), (1, 0), (2**64 - 1, 5), (12345, 100_000)):
        mine = sampler.gumbel(seed, output, ids)
        theirs = [noise.gumbel(seed, output, int(i)) for i in ids]
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


def test_noise_of_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    ids = np.arange(10_007)
    whole = sampler.gumbel(9, 3, ids)
    for step in (1, 2, 3, 31, 64, 1000):
        parts = np.concatenate([sampler.gumbel(9, 3, ids[a : a + step]) for a in range(0, 500, step)])[:500]
        assert np.array_equal(parts, whole[:500]), step


GRID = list(itertools.product((0.3, 1.0, 1.7), (0, 1, 5, 40), (1.0, 0.95, 0.5, 0.01), (0.0, 0.02, 0.3)))


@pytest.mark.parametrize("vocab", [50, 3000])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_truncation_keeps_what_transformers_keeps(vocab: int, spread: float) -> None:
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(vocab)
    for temperature, top_k, top_p, min_p in GRID:
        logits = spread * torch.randn(vocab, generator=generator, dtype=torch.float64)
        x = TemperatureLogitsWarper(temperature)(EMPTY, logits[None])
        x = TopKLogitsWarper(top_k)(EMPTY, x) if top_k else x
        x = TopPLogitsWarper(top_p)(EMPTY, x) if top_p < 1 else x
        x = MinPLogitsWarper(min_p)(EMPTY, x) if min_p else x
        wanted = set(torch.nonzero(torch.isfinite(x[0]))[:, 0].tolist())
        ids, scores = sampler.candidates(
            logits.float(), SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        )
        assert set(ids.tolist()) == wanted, (temperature, top_k, top_p, min_p)
        np.testing.assert_array_equal(scores, logits.float().double().numpy()[ids])


def test_flat_laws_need_many_candidates() -> None:
    logits = torch.zeros(5000) + torch.linspace(0, 1e-3, 5000)
    ids, _ = sampler.candidates(logits, SamplingSpec(top_p=0.9))
    assert abs(len(ids) - 4500) <= 5


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert sorted(sampler.candidates(logits, SamplingSpec(top_k=2))[0].tolist()) == [1, 2, 3, 4]


def test_top_p_counts_what_stands_before_a_token() -> None:
    """By hand: p = 0.5, 0.3, 0.2; top_p 0.5 keeps one token, 0.51 two, 0.81 three."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    for top_p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 3)):
        assert len(sampler.candidates(logits, SamplingSpec(top_p=top_p))[0]) == kept, top_p


@pytest.mark.parametrize("history", [[], [3, 3, 5], list(range(40))])
def test_repetition_penalty_is_that_of_transformers(history: list[int]) -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    mine = sampler.adjust(logits.clone(), row(history, prompt=1, repetition_penalty=1.3))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([history], dtype=torch.int64), logits[None].clone())[0]
    torch.testing.assert_close(mine, theirs)


def test_presence_and_frequency_by_hand() -> None:
    """OpenAI: logit - count * frequency - (count > 0) * presence, over output tokens only."""
    mine = sampler.adjust(
        torch.zeros(6), row([1, 1, 2, 4, 4, 4], prompt=2, presence_penalty=0.5, frequency_penalty=0.25)
    )
    assert mine.tolist() == [0.0, 0.0, -0.75, 0.0, -1.25, 0.0]


def test_bias_and_end_ids_before_min_tokens() -> None:
    mine = sampler.adjust(torch.zeros(5), row(logit_bias={1: 2.5, 4: -100.0}, stop_ids=(0, 3), min_tokens=2, output=1))
    assert mine.tolist() == [-math.inf, 2.5, 0.0, -math.inf, -100.0]
    mine = sampler.adjust(torch.zeros(5), row(stop_ids=(0, 3), min_tokens=2, output=2))
    assert mine.tolist() == [0.0] * 5


def test_vector_positions_in_the_history_are_no_tokens() -> None:
    mine = sampler.adjust(torch.zeros(4), row([-1, -1, 2], prompt=0, presence_penalty=1.0))
    assert mine.tolist() == [0.0, 0.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "law",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.9},
    ],
)
def test_draws_follow_the_law(law: dict[str, float]) -> None:
    """Chi-square over 20,000 seeds at significance 1e-4: a law that is off by 3 % in a likely token is found."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0])
    spec = SamplingSpec(**law)  # type: ignore[arg-type]
    draws = 20_000
    counts = np.zeros(8)
    for seed in range(draws):
        counts[sampler._draw_one(logits, Row(spec, noise.mix(seed), seed % 7, EMPTY, 0))] += 1
    ids, scores = sampler.candidates(logits, spec)
    p = np.exp(scores / spec.temperature)
    expected = np.zeros(8)
    expected[ids] = draws * p / p.sum()
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi2 = (((counts - expected)[live]) ** 2 / expected[live]).sum()
    limit = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9}[max(1, int(live.sum()) - 1)]
    assert chi2 < limit, (law, counts, expected)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 4096, generator=generator) * 3
    laws = [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.95}, {"top_k": 50}, {}]
    rows = [row(seed=i, output=i % 5, **laws[i % 4]) for i in range(64)]
    together = sampler.draw(logits, rows)
    for i in (0, 1, 2, 3, 17, 40, 63):
        assert sampler.draw(logits[i : i + 1], [rows[i]]) == [together[i]]
    order = torch.randperm(64, generator=generator)
    assert sampler.draw(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_tiny_temperatures_are_greedy_and_finite() -> None:
    logits = torch.tensor([1e4, -1e4, 9999.0])
    assert sampler._draw_one(logits, row(temperature=1e-8)) == 0


def test_logprobs_are_of_the_models_own_law() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(5))
    law = torch.log_softmax(logits, -1)
    entry = sampler.logprobs(logits, 17, 3)
    assert entry.logprob == pytest.approx(float(law[17]))
    assert entry.rank == int((law > law[17]).sum()) + 1
    assert [t for t, _ in entry.top] == law.argsort(descending=True)[:3].tolist()
    assert sampler.logprobs(logits, 17, 0).top == ()


@pytest.mark.parametrize(
    ("guesses", "winners", "parents", "tokens", "path"),
    [
        ([], [5], (), [5], []),
        ([5, 6], [5, 6, 7], (), [5, 6, 7], [0, 1]),
        ([5, 6], [5, 9, 7], (), [5, 9], [0]),
        ([5, 6], [4, 6, 7], (), [4], []),
        # A tree: two guesses after the context, two after the second of them.
        ([5, 6, 7, 8], [6, 1, 8, 2, 3], (-1, -1, 1, 1), [6, 8, 3], [1, 3]),
        ([5, 6, 7, 8], [6, 1, 9, 2, 3], (-1, -1, 1, 1), [6, 9], [1]),
    ],
)
def test_a_guess_stands_when_the_race_selects_it(
    guesses: list[int], winners: list[int], parents: tuple[int, ...], tokens: list[int], path: list[int]
) -> None:
    view = Verified(guesses, parents or range(-1, len(guesses) - 1), None, [], torch.empty(0, 0), winners)
    assert Race().accept(view) == (tokens, path)
