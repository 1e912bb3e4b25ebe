"""FlexPrefill: the choice against the formulas by hand and against numpy; live, a function of the prompt alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft.attention.flexprefill import FlexPrefill, block_means, divergence
from weft.errors import ConfigError
from weft.exec.build import Runtime
from weft.exec.mirror import Mirrored
from weft.features import feature
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.types import RequestSpec

TECHNIQUE = "attention=flexprefill(block=32, minimum=32, representatives=8)"
Text = Callable[[str], Path]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve(None))


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(STORY, add_special=False) * 6


# ---------------------------------------------------------------------------------------------- the choice


def test_divergence_by_hand() -> None:
    """JS((1, 0), (1/2, 1/2)) = ln(4/3) / 2 + ln(2/3) / 4 + ln(2) / 4; equal ones are 0 apart, disjoint ones sqrt(ln 2)."""
    p, q = torch.tensor([[1.0, 0.0], [0.3, 0.7], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.0, 1.0]])
    first = math.log(4 / 3) / 2 + math.log(2 / 3) / 4 + math.log(2) / 4
    torch.testing.assert_close(divergence(p, q), torch.tensor([first, 0.0, math.log(2)]).sqrt())


def test_cover_by_hand() -> None:
    """0.5 + 0.3 do not reach 0.85, with the first 0.1 they do; equal shares go by place; a least number may ask for more."""
    flex = FlexPrefill(gamma=0.85, block=4, minimum=0, representatives=4)
    shares = torch.tensor([0.1, 0.5, 0.1, 0.3])
    assert flex._cover(shares, 0).tolist() == [True, True, False, True]
    assert flex._cover(shares, 4).tolist() == [True] * 4
    assert flex._cover(torch.tensor([0.9, 0.1, 0.0]), 0).tolist() == [True, False, False]
    assert flex._cover(torch.tensor([0.9, 0.1, 0.0]), 2).tolist() == [True, True, False]


def test_a_head_that_looks_at_one_place_by_hand() -> None:
    """One head, blocks of 2, rows 10 and 11.  All attention falls on key 4, so the vertical of block 2 is taken, and its
    distances (6 and 7, slash 3: three and four blocks back of rows 10 and 11) are those of blocks 1 and 2.  Means hide key 4 from
    the pooled estimate, so it is not trusted."""
    flex = FlexPrefill(gamma=0.9, tau=0.1, block=2, minimum=0, representatives=2)
    keys = torch.zeros(12, 1, 2)
    keys[4, 0], keys[5, 0] = torch.tensor([50.0, 0.0]), torch.tensor([-50.0, 0.0])
    query = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    chosen = flex.choose(query, keys, block_means(keys, 2), 10)
    assert chosen.tolist() == [[True, True, True, False, False, True]]
    # Where the whole block stands out, the estimate is right, and block 2 is all it names.
    keys[5, 0] = torch.tensor([50.0, 0.0])
    assert flex.choose(query, keys, block_means(keys, 2), 10).tolist() == [[True, False, True, False, False, True]]


@pytest.mark.parametrize(
    ("attention", "blocks"),
    [
        # Key 3 has 0.45 of both rows, from distances 7 and 8, of which slashes 3 and 4 get 0.225 each: only the vertical names
        # block 1.  The rest is at distances 1 and 0: slash 0, blocks 4 and 5.
        ([{3: 0.45, 9: 0.55}, {3: 0.45, 11: 0.55}], [0, 1, 4, 5]),
        # All of it lies at distances 5 and 4: only slash 2 (blocks 2 and 3) names block 3, as the vertical of block 2, equal to
        # that of block 3 and before it, is enough.
        ([{5: 1.0}, {7: 1.0}], [0, 2, 3, 5]),
        # Each names what the other does not: the vertical block 1, with 0.4, and slash 2, with 0.6, blocks 2 and 3.
        ([{3: 0.4, 5: 0.6}, {3: 0.4, 7: 0.6}], [0, 1, 2, 3, 5]),
    ],
    ids=["vertical", "slash", "both"],
)
def test_verticals_and_slashes_by_hand(attention: list[dict[int, float]], blocks: list[int]) -> None:
    """Rows 10 and 11, blocks of 2, gamma 0.35, nothing trusted.  Row i's query is the unit vector i, so coordinate i of the keys
    is the logarithm of its attention."""
    flex = FlexPrefill(gamma=0.35, tau=0.0, block=2, minimum=0, representatives=2)
    keys = torch.full((12, 1, 2), -40.0)
    for row, shares in enumerate(attention):
        for key, share in shares.items():
            keys[key, 0, row] = math.log(share)
    chosen = flex.choose(torch.eye(2)[:, None], keys, block_means(keys, 2), 10)
    assert chosen[0].nonzero().flatten().tolist() == blocks
    assert by_numpy(flex, np.eye(2)[:, None], keys.double().numpy(), 10)[0][0].nonzero()[0].tolist() == blocks


@pytest.mark.parametrize(("tau", "blocks"), [(1.0, [0, 3, 5]), (0.0, [0, 1, 2, 5])])
def test_trust_by_hand(tau: float, blocks: list[int]) -> None:
    """All attention falls on key 4, whose neighbour in block 2 hides it from the means; those point at block 3.  The estimate is
    believed where tau lets any divergence pass, and where none may pass vertical 2 and slash 3 (blocks 1 and 2) are."""
    flex = FlexPrefill(gamma=0.35, tau=tau, block=2, minimum=0, representatives=2)
    keys = torch.zeros(12, 1, 1)
    keys[4], keys[5], keys[6:8] = 50.0, -60.0, 20.0
    chosen = flex.choose(torch.ones(2, 1, 1), keys, block_means(keys, 2), 10)
    assert chosen[0].nonzero().flatten().tolist() == blocks


def by_numpy(flex: FlexPrefill, query: np.ndarray, keys: np.ndarray, first: int) -> tuple[np.ndarray, int]:
    """The rule, one head and one row at a time; and how many heads trusted the pooled estimate."""
    rows, heads, _ = query.shape
    entries, kv_heads, _ = keys.shape
    size, count = flex.block, -(-entries // flex.block)
    least = -(-flex.minimum // size)
    out, trusting = np.zeros((kv_heads, count), bool), 0

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    def cover(share: np.ndarray) -> list[int]:
        taken: list[int] = []
        for i in sorted(range(len(share)), key=lambda i: (-share[i], i)):
            if sum(share[t] for t in taken) >= flex.gamma * share.sum() and len(taken) >= least:
                break
            taken.append(i)
        return taken

    for head in range(heads):
        kv = head // (heads // kv_heads)
        exact, slash = np.zeros(count), np.zeros(count)
        few = min(flex.representatives, rows)
        for row in range(rows - few, rows):
            me = entries - rows + row
            share = softmax(keys[: me + 1, kv] @ query[row, head])
            for e, x in enumerate(share):
                exact[e // size] += x / few
                slash[(me - e) // size] += x / few
        means = np.stack([keys[j * size : (j + 1) * size, kv].mean(0) for j in range(count)])
        guess = softmax(means @ query[rows - few :, head].mean(0))
        middle = (exact + guess) / 2
        js = sum(0.5 * p * math.log(p / m) for x in (exact, guess) for p, m in zip(x, middle, strict=True) if p > 0)
        out[kv, [0, *range(first // size, count)]] = True
        if math.sqrt(max(js, 0)) < flex.tau:
            trusting += 1
            out[kv, cover(softmax(means @ query[:, head].mean(0)))] = True
            continue
        out[kv, cover(exact)] = True
        for s in cover(slash):
            for row in range(rows):
                me = entries - rows + row
                for distance in range(s * size, (s + 1) * size):
                    if distance <= me:
                        out[kv, (me - distance) // size] = True
    return out, trusting


def drawn(seed: int, entries: int, rows: int) -> tuple[FlexPrefill, np.ndarray, np.ndarray]:
    """A technique, queries and keys.  gamma is small: with a large one the union of three heads is all there is."""
    rng = np.random.default_rng(seed)
    flex = FlexPrefill(gamma=0.3, tau=0.25, block=8, minimum=24 * (seed % 2), representatives=3)
    keys, query = rng.normal(size=(entries, 2, 6)), rng.normal(size=(rows, 6, 6)) * (0.3 if seed % 3 else 1.5)
    return flex, query, keys


SIZES = [(128, 8), (125, 5), (104, 8), (9, 1), (97, 1), (143, 7)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("entries", "rows"), SIZES)
def test_choice_against_numpy(seed: int, entries: int, rows: int) -> None:
    flex, query, keys = drawn(seed, entries, rows)
    tensor = torch.from_numpy(keys)
    found = flex.choose(torch.from_numpy(query), tensor, block_means(tensor, 8), entries - rows)
    wanted, _ = by_numpy(flex, query, keys, entries - rows)
    assert found.tolist() == wanted.tolist()


def test_both_patterns_were_compared_where_blocks_are_left_out() -> None:
    trusting, left_out = 0, 0
    for seed in range(5):
        for entries, rows in SIZES:
            flex, query, keys = drawn(seed, entries, rows)
            wanted, trusted = by_numpy(flex, query, keys, entries - rows)
            trusting += trusted
            left_out += not wanted.all()
    heads = 6 * 5 * len(SIZES)
    assert 0.3 * heads < trusting < 0.8 * heads
    assert left_out >= 5 * (len(SIZES) - 1), "all but the prompts of two blocks"


@pytest.mark.parametrize("text", ["gamma=0", "gamma=1.5", "tau=-1", "block=0", "minimum=-1", "representatives=200"])
def test_arguments_out_of_range(text: str) -> None:
    with pytest.raises(ConfigError, match=r"needed|representatives"):
        parse(f"attention=flexprefill({text})").build()


# ---------------------------------------------------------------------------------------------- live


def laws(bench: Bench, specs: list[RequestSpec]) -> dict[tuple[int, int], torch.Tensor]:
    """Logits of every token that is drawn, by (seed, output index)."""
    found: dict[tuple[int, int], torch.Tensor] = {}

    def probe(sequence: Mirrored, output: int, logits_V: torch.Tensor) -> None:
        found[sequence.seed, output] = logits_V.clone()

    bench.executor.watch(probe)
    bench.run(specs)
    return found


def same(a: dict[tuple[int, int], torch.Tensor], b: dict[tuple[int, int], torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    """Prompts that begin alike and end inside and at the ends of blocks."""
    lengths = (300, 256, 257, 33, 32, 5, 411)
    return [spec(i, ids[:n], seed=100 + i, temperature=0.8, max_tokens=6) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def alone(runtime: Runtime, specs: list[RequestSpec]) -> dict[tuple[int, int], torch.Tensor]:
    found = {}
    for one in specs:
        found.update(laws(Bench(runtime, techniques=[TECHNIQUE], share=False), [one]))
    return found


def test_it_skips_and_is_not_dense(runtime: Runtime, specs: list[RequestSpec], alone: object) -> None:
    bench = Bench(runtime, techniques=[TECHNIQUE])
    sparse, dense = laws(bench, specs[:1]), laws(Bench(runtime), specs[:1])
    acts = bench.engine.stats.acts
    skipped, computed = (acts[f"attention=flexprefill.blocks_{x}"] for x in ("skipped", "computed"))
    assert 0.1 < skipped / (skipped + computed) < 0.9
    assert not same(sparse, dense)


@pytest.mark.parametrize("rows", [32, 70, 200])
def test_whatever_the_chunks_and_the_company(runtime: Runtime, specs: list[RequestSpec], alone, rows: int) -> None:
    assert same(laws(Bench(runtime, techniques=[TECHNIQUE], max_rows=rows), specs), alone)


def test_from_a_cached_prefix(runtime: Runtime, specs: list[RequestSpec], alone) -> None:
    bench = Bench(runtime, techniques=[TECHNIQUE])
    first = laws(bench, specs)
    again = [msgspec.structs.replace(s, id=s.id + 50) for s in reversed(specs)]
    hits = bench.engine.stats.prefix_hit_tokens
    assert same(laws(bench, again), alone)
    assert same(first, alone)
    assert bench.engine.stats.prefix_hit_tokens - hits > 600


def test_prefixes_of_other_stacks_are_not_taken(runtime: Runtime, specs: list[RequestSpec], alone) -> None:
    """The same prompts, dense, come first; what they leave in the index is not for a stack that computes other KV."""
    bench = Bench(runtime)
    dense = laws(bench, specs[:2])
    sent = [msgspec.structs.replace(s, id=s.id + 50, techniques=(TECHNIQUE,)) for s in specs[:2]]
    found = laws(bench, sent)
    assert all(torch.equal(x, alone[k]) for k, x in found.items())
    assert not same(found, dense)


def test_after_preemption_at_every_step(runtime: Runtime, specs: list[RequestSpec], alone) -> None:
    rng, found = random.Random(1), {}

    def disturb(b: Bench) -> None:
        if b.steps < 30 and b.engine.scheduler.running:
            victim = rng.choice(list(b.engine.scheduler.running.values()))
            b.engine.scheduler.preempt(victim)
            b.engine.scheduler.enqueue(victim, 0.0)

    bench = Bench(runtime, techniques=[TECHNIQUE], max_rows=150)
    bench.executor.watch(lambda s, output, logits: found.__setitem__((s.seed, output), logits.clone()))
    bench.run(specs, disturb)
    assert bench.engine.stats.preemptions > 10
    assert same(found, alone)


def test_layer_by_layer(layered_runtime: Runtime, specs: list[RequestSpec], alone) -> None:
    bench = Bench(layered_runtime, techniques=[TECHNIQUE, "schedule=layered(groups=3, least=8)"])
    assert same(laws(bench, specs), alone)


def test_forks_and_guesses_and_neighbours_without_it(runtime: Runtime, specs: list[RequestSpec]) -> None:
    """n = 3 over drafts, with dense requests in the same steps: each as it is alone."""
    forks = [msgspec.structs.replace(s, n=3, techniques=(TECHNIQUE,)) for s in specs[:2]]
    dense = [msgspec.structs.replace(s, id=s.id + 20, seed=s.seed + 500) for s in specs[:3]]
    wanted = {}
    for one in (*forks, *dense):
        wanted.update(Bench(runtime, share=False).run([one]))
    bench = Bench(runtime, techniques=["draft=ngram"], max_rows=300)
    assert bench.run([*forks, *dense]) == wanted


def test_everything_at_gamma_one_is_dense(runtime: Runtime, specs: list[RequestSpec]) -> None:
    bench = Bench(runtime, techniques=["attention=flexprefill(gamma=1.0, block=32, minimum=0, representatives=8)"])
    assert same(laws(bench, specs), laws(Bench(runtime), specs))
    assert bench.engine.stats.acts["attention=flexprefill.blocks_skipped"] == 0
    assert bench.engine.stats.acts["attention=flexprefill.blocks_computed"] > 0


def test_a_last_row_in_a_step_of_its_own(runtime: Runtime, specs: list[RequestSpec], alone) -> None:
    """Linked requests wait for each other before the last row; the rows before it choose as if it stood with them."""
    bench, found = Bench(runtime, techniques=[TECHNIQUE], max_rows=130), {}
    bench.executor.watch(lambda s, output, logits: found.setdefault((s.seed, output), logits.clone()))
    for one in specs[:2]:
        bench.engine.add(one, 0.0)
    bench.engine.link([(0, 0), (1, 0)])

    bench.run([])
    assert all(torch.equal(found[100, i], alone[100, i]) for i in range(6))


def forced(tokenizer: Tokenizer, path: Path) -> list[RequestSpec]:
    """Prompts of 700 to 1000 tokens of real prose, and the 24 tokens that follow them."""
    out = []
    for i, length in enumerate((700, 820, 999)):
        at = 40_000 * (i + 1)
        ids = tokenizer.encode(path.read_text(encoding="utf8")[at : at + 9000], add_special=False)
        one = spec(i, ids[:length], seed=i, temperature=0.0, max_tokens=24)
        out.append(msgspec.structs.replace(one, forced=tuple(ids[length : length + 24])))
    return out


def test_distance_from_dense_on_prose(runtime: Runtime, tokenizer: Tokenizer, shared: Text) -> None:
    """Half of the blocks are skipped, the mean KL from dense is what the file states, and a choice of the ends alone is worse."""
    sent = forced(tokenizer, shared("data/text/novels/ABronte_Agnes.txt"))

    def run(*techniques: str) -> tuple[dict[tuple[int, int], torch.Tensor], float]:
        bench = Bench(runtime, techniques=techniques)
        found = laws(bench, sent)
        acts = [bench.engine.stats.acts.get(f"attention=flexprefill.blocks_{x}", 0) for x in ("computed", "skipped")]
        return {k: x.double().log_softmax(-1) for k, x in found.items()}, acts[0] / max(1, sum(acts))

    def kl(q: dict[tuple[int, int], torch.Tensor]) -> float:
        return sum(float((dense[k].exp() * (dense[k] - q[k])).sum()) for k in dense) / len(dense)

    dense, _ = run()
    sparse, density = run(TECHNIQUE)
    ends, least = run("attention=flexprefill(block=32, minimum=0, representatives=8, gamma=1e-9)")
    bound = 0.002
    assert f"at most {bound} nat" in feature("attention", "flexprefill").fields["Bound"]
    assert density < 0.55
    assert kl(sparse) < bound
    assert least < density
    assert kl(ends) > 3 * kl(sparse)
