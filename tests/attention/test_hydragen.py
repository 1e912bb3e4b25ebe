"""Hydragen: who shares what, and the same answers in fewer reads."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.exec.conftest import STORY, Bench, spec
from weft.attention.hydragen import MULTIPLIER, Hydragen, same_tiles
from weft.core.noise import child_seed
from weft.exec.build import Runtime
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve

TECHNIQUE = "attention=hydragen"


@pytest.fixture(scope="module")
def ids() -> list[int]:
    found = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    return found * 6


def by_comparing(tables: np.ndarray, first: np.ndarray, stood: np.ndarray, block: int, keys: int) -> list[list[int]]:
    """The same, entry by entry: where each entry of a tile lies in memory."""

    def memory(s: int, k: int) -> list[int] | None:
        span = range(k * keys, (k + 1) * keys)
        if span[0] < first[s] or span[-1] >= stood[s]:
            return None
        return [int(tables[s, (e - first[s]) // block]) * block + (e - first[s]) % block for e in span]

    out = []
    for s in range(len(tables)):
        line = []
        for k in range(int(stood.max()) // keys):
            mine = memory(s, k)
            same = [o for o in range(len(tables)) if mine is not None and memory(o, k) == mine]
            line.append(same[0] if len(same) > 1 else -1)
        out.append(line)
    return out


@pytest.mark.parametrize(("block", "keys"), [(4, 8), (16, 64), (6, 16), (16, 8)])
def test_who_reads_the_same(block: int, keys: int) -> None:
    """Random trees of tables, some of which lost their head, against a comparison of all entries with all."""
    rng = random.Random(block)
    shares = 0
    for _ in range(20):
        tables: list[list[int]] = []
        for s in range(7):
            base = tables[rng.randrange(s)][: rng.randrange(12)] if s else []
            tables.append([*base, *(rng.randrange(1000, 2000) for _ in range(rng.randrange(1, 20)))])
        drops = [rng.choice((0, 0, rng.randrange(len(t)))) for t in tables]
        stood = np.array([len(t) * block - rng.randrange(block) for t in tables])
        kept = [t[d:] for t, d in zip(tables, drops, strict=True)]
        array = np.array([t + [0] * (max(map(len, kept)) - len(t)) for t in kept])
        first = np.array(drops) * block
        found = same_tiles(array, first, stood, block, keys)
        assert found.tolist() == by_comparing(array, first, stood, block, keys)
        shares += int((found >= 0).sum())
    assert shares > 20


def test_sequences_that_differ_in_a_middle_block_only() -> None:
    tables = np.array([[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 5]])
    found = same_tiles(tables, np.zeros(3, int), np.full(3, 16), 4, 4)
    assert found.tolist() == [[0, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, -1]]


def test_tiles_that_only_look_alike() -> None:
    """Ids whose weighed sums are equal: a * M + b * M ** 2 = (a + M) * M + (b - 1) * M ** 2."""
    tables = np.array([[5, 9], [5 + MULTIPLIER, 8], [5, 9]])
    assert same_tiles(tables, np.zeros(3, int), np.full(3, 8), 4, 8).tolist() == [[0], [-1], [0]]


def acts(bench: Bench) -> int:
    technique = bench.engine.stack.get("attention")
    assert isinstance(technique, Hydragen)
    return technique.acts["entries_shared"]


def test_forks_of_one_prompt(runtime: Runtime, ids: list[int]) -> None:
    """n = 8: the same tokens as eight requests of their own, and the prompt is read once a step instead of eight times."""
    prompt, law = ids[:520], {"temperature": 1.0, "max_tokens": 12}
    bench = Bench(runtime, techniques=[TECHNIQUE])
    found = bench.run([spec(1, prompt, seed=7, n=8, **law)])
    single = Bench(runtime, share=False).run([spec(i, prompt, seed=child_seed(7, i), **law) for i in range(8)])
    assert [found[1, i] for i in range(8)] == [single[i, 0] for i in range(8)]
    assert len({tuple(x) for x in found.values()}) > 1
    layers = len(runtime.setup.spec.layers)
    # Eight key tiles of 64, seven of eight reads saved, in every layer of the steps in which all of them run.
    assert acts(bench) > 0.9 * 11 * layers * 7 * 512


def test_a_tree_of_prefixes(runtime: Runtime, ids: list[int]) -> None:
    """Requests that share 320 tokens, of which some share 448: nested shares, and plain answers."""
    long, short = ids[:448], ids[:320]
    prompts = [[*long, 5 + i, 6] for i in range(3)] + [[*short, 50 + i, 7, 8] for i in range(3)] + [[90, 91, 92]]
    law = {"temperature": 0.8, "max_tokens": 16}
    specs = [spec(10 + i, p, seed=i, **law) for i, p in enumerate(prompts)]
    alone = Bench(runtime, share=False).run(specs)
    bench = Bench(runtime, techniques=[TECHNIQUE])
    bench.run([spec(1, long, max_tokens=1)])  # what the others find in the index
    assert {k: v for k, v in bench.run(specs).items() if k[0] > 1} == alone
    assert acts(bench) > 0


def test_with_guesses_and_preemption(runtime: Runtime, ids: list[int]) -> None:
    specs = [spec(i, [*ids[: 130 + 16 * (i % 3)], 7 + i], seed=i, n=2, max_tokens=40) for i in range(4)]
    wanted = Bench(runtime, share=False).run(specs)
    bench = Bench(runtime, techniques=[TECHNIQUE, "draft=ngram"], blocks=44)
    assert bench.run(specs) == wanted
    assert bench.engine.stats.preemptions > 0
    assert acts(bench) > 0


def test_beside_requests_that_have_it_not(runtime: Runtime, ids: list[int]) -> None:
    """One step computes each sequence by the technique of its own stack."""
    import msgspec

    specs = [spec(i, ids[:200], seed=i, n=2, max_tokens=8) for i in range(4)]
    mixed = [msgspec.structs.replace(s, techniques=(TECHNIQUE,)) if s.id % 2 else s for s in specs]
    bench = Bench(runtime)
    assert bench.run(mixed) == Bench(runtime).run(specs)
    assert bench.engine.stats.acts["attention=hydragen.entries_shared"] > 0


def test_nothing_shared_is_plain(runtime: Runtime, ids: list[int]) -> None:
    specs = [spec(i, [10 + i, *ids[:100]], max_tokens=8) for i in range(4)]
    bench = Bench(runtime, techniques=[TECHNIQUE])
    assert bench.run(specs) == Bench(runtime).run(specs)
    assert acts(bench) == 0
