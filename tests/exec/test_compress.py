"""Attention mass: counted once for every row that stands, to the same bits however rows came; what compression refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exec.conftest import STORY, Bench, spec
from tests.exec.test_invariance import SmallChunks
from weft.config import Stacks, build_stack
from weft.errors import InvariantError
from weft.exec.build import Runtime
from weft.exec.compress import MASS, CompressView, Mass, accepted_path, check
from weft.exec.runner import TorchExecutor
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.kv.compress.h2o import H2O
from weft.models.decoder import Seam
from weft.slots import Kept
from weft.types import Enter, Grant, Keep, Mask, Plan, SamplingSpec, Work, WorkResult

TECHNIQUE = "kv.compress=h2o(heavy=12,recent=12,every=8,observe=16)"
Seen = dict[tuple[int, int], set[bytes]]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False) * 2


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """By (prompt, position of the cut): every mass that a technique was shown there, as bytes."""
    found: Seen = {}
    keep = H2O.keep

    def watch(self: H2O, view: CompressView) -> Kept:
        assert view.mass is not None
        found.setdefault((view.prompt, view.length), set()).add(view.mass.contiguous().numpy().tobytes())
        return keep(self, view)

    monkeypatch.setattr(H2O, "keep", watch)
    return found


def preempt(every: int) -> Callable[[Bench], None]:
    def disturb(bench: Bench) -> None:
        for victim in list(bench.engine.scheduler.running.values()):
            if bench.steps % every == 0 and bench.steps < 60:
                bench.engine.scheduler.preempt(victim)
                bench.engine.scheduler.enqueue(victim, 0.0)

    return disturb


def test_masses_are_equal_to_the_bit(runtime: Runtime, ids: list[int], seen: Seen) -> None:
    """In one go, row by row, after preemptions, from a cached prefix, with drafts, in forks and beside others."""
    law = {"temperature": 0.0, "max_tokens": 40}
    specs = [spec(1, ids[:21], **law), spec(2, ids[3:93], **law)]
    Bench(runtime, techniques=[TECHNIQUE], share=False).run(specs[:1])
    Bench(runtime, techniques=[TECHNIQUE], share=False).run(specs[1:])
    cuts = {(21, c) for c in range(32, 61, 8)} | {(90, c) for c in range(32, 130, 8)}
    assert set(seen) == cuts
    Bench(runtime, techniques=[TECHNIQUE], share=False, policy=SmallChunks(rows=1)).run(specs)
    for share in (False, True):
        Bench(runtime, techniques=[TECHNIQUE], share=share).run(specs, preempt(3))
    cached = Bench(runtime, techniques=[TECHNIQUE])
    cached.run(specs)
    cached.run([spec(3, ids[:21], **law), spec(4, ids[3:93], **law)])
    assert cached.engine.stats.prefix_hit_tokens == 16
    drafts = Bench(runtime, techniques=[TECHNIQUE, "draft=ngram(shortest=1)"], share=False)
    drafts.run(specs)
    assert drafts.engine.stats.acts["draft=ngram.proposed"] > drafts.engine.stats.acts["draft=ngram.accepted"] > 5
    Bench(runtime, techniques=[TECHNIQUE], share=False).run([spec(1, ids[:21], n=2, **law)])
    assert set(seen) == cuts
    assert all(len(masses) == 1 for masses in seen.values())


@pytest.mark.parametrize("observe", [10, 40])
def test_every_row_that_counts_is_counted_once(runtime: Runtime, ids: list[int], observe: int) -> None:
    """Each row gives each of its heads the mass 1: the sums say how many rows were counted, prompt and output."""
    bench = Bench(runtime, techniques=[f"kv.compress=h2o(heavy=300,recent=300,observe={observe})"], share=False)
    totals: list[float] = []

    def look(b: Bench) -> None:
        for s in b.executor.mirror.sequences.values():
            mass = s.state.get(MASS)
            if isinstance(mass, Mass) and mass.sums:
                total = mass.sums[0].sum(-1)
                assert total.allclose(total[0, 0], rtol=1e-6)
                totals.append(float(total[0, 0]))

    bench.run([spec(1, ids[:30], temperature=0.0, max_tokens=5)], look)
    heads = runtime.setup.spec.heads // runtime.setup.spec.kv_heads
    assert [round(t / heads, 3) for t in totals] == [min(observe, 30) + i for i in range(5)]


def test_a_tree_of_guesses_counts_the_branch_that_stands(runtime: Runtime, ids: list[int]) -> None:
    """Masses after a verified tree are those of plain decoding: other branches count nowhere, entries stand packed.

    Nearly: in the tree a guess stands at another entry, and its row's exponentials are added in another order.
    """
    technique = "kv.compress=h2o(heavy=300,recent=300,observe=8)"
    prompt = ids[:21]
    truth = Bench(runtime).run([spec(1, prompt, temperature=0.0, max_tokens=8)])[1, 0]
    wrong = [(t + 1) % 4096 for t in truth]
    guesses = (wrong[0], truth[0], wrong[1], truth[1], wrong[2], truth[2])
    parents = (-1, -1, 1, 1, 3, 3)
    enter = Enter(
        request=5, tokens=tuple(prompt), prompt=21, sampling=SamplingSpec(temperature=0.0), seed=0, entries=(0,)
    )
    grants = (Grant(5, 0, 0, (3, 5, 4, 9)),)

    def sums(works: list[Work]) -> Tensor:
        executor = TorchExecutor({"target": runtime.decoder}, runtime.pool, Stacks(build_stack([technique])))
        for step, work in enumerate(works):
            first = {"enter": (enter,), "grants": grants} if not step else {}
            executor.execute(Plan(step=step + 1, works=(work,), **first))  # type: ignore[arg-type]
        mass = executor.mirror.sequences[5].state[MASS]
        assert isinstance(mass, Mass)
        assert mass.counted == 24
        return mass.sums[0]

    tree = Work(
        request=5, rows=((0, 27),), tokens=(*prompt, *guesses), mask=Mask.TREE, keep=Keep.ACCEPT, guesses=6,
        parents=parents, samples=True,
    )  # fmt: skip
    plain = [Work(request=5, rows=((0, 21),), tokens=tuple(prompt), samples=True)]
    plain += [
        Work(request=5, rows=((21 + i, 22 + i),), tokens=(truth[i],), samples=True, output=1 + i) for i in range(3)
    ]
    found, wanted = sums([tree]), sums(plain)
    assert found.shape == wanted.shape == (8, 2, 24)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_accepted_path_is_told_by_the_tokens() -> None:
    work = Work(request=1, rows=((0, 7),), tokens=(9, 1, 2, 1, 3, 2, 4), guesses=6, parents=(-1, -1, 1, 1, 2, 3))
    assert accepted_path(work, WorkResult(rows=1, tokens=(2, 1, 2, 7))) == [1, 2, 4]
    assert accepted_path(work, WorkResult(rows=1, tokens=(2, 3, 7))) == [1, 3]
    assert accepted_path(work, WorkResult(rows=1, tokens=(8,))) == []
    chain = Work(request=1, rows=((0, 4),), tokens=(9, 1, 2, 1), guesses=3)
    assert accepted_path(chain, WorkResult(rows=1, tokens=(1, 2, 7))) == [0, 1]
    assert accepted_path(Work(request=1, rows=((0, 1),), tokens=(9,)), WorkResult(rows=1, tokens=(5,))) == []


def test_masses_live_with_their_sequence() -> None:
    mass = Mass()
    mass.of(0, 2, 1, 3)[:] = 1.0
    mass.counted = 3
    mass.pending[0] = torch.ones(1, 1, 3)
    child = mass.fork()
    child.of(0, 2, 1, 3)[:, :, 0] = 7.0
    child.of(0, 2, 1, 5)
    assert mass.sums[0].shape == (2, 1, 3)
    assert bool((mass.sums[0] == 1).all())
    assert child.counted == 3
    assert not child.pending, "what is not known to stand is no fork's"
    assert child.sums[0].tolist() == [[[7, 1, 1, 0, 0]]] * 2


@dataclass
class Odd:
    """A technique that keeps what it is told to."""

    kept: Tensor
    rotate: tuple[int, int, int] | None = None

    def keep(self, view: Any) -> Kept:
        return Kept(self.kept, self.rotate)


@pytest.mark.parametrize(
    "kept", [[], [0, 0], [2, 1], [0, 5], [-1, 2], [[0, 1]], [[[0], [1]]], [[[1, 0], [0, 1]], [[0, 1], [0, 1]]]]
)
def test_what_a_technique_keeps_is_checked(runtime: Runtime, kept: list[Any]) -> None:
    where = torch.empty(0), torch.empty(0)
    view = CompressView(3, 5, 5, (0, 1), 2, 64, torch.arange(5), None, runtime.pool, 0, where)
    with pytest.raises(InvariantError, match="kept"):
        check(torch.tensor(kept, dtype=torch.int64), view)
    check(torch.tensor([0, 1, 4]), view)
    check(torch.tensor([[[0, 1], [1, 2]], [[2, 4], [0, 4]]]), view)


def test_the_view_shows_what_stands(runtime: Runtime, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions ascend and lie before the cut, keys and values are those that attention reads, the newest of them as stored."""
    stored: dict[int, tuple[Tensor, Tensor]] = {}

    def note(batch: Any, tensors: tuple[Tensor, ...]) -> None:
        _, k, v = tensors
        for at, position in enumerate(batch.positions_T.tolist()):
            stored[position] = k[at].clone(), v[at].clone()

    views: list[tuple[int, Tensor, Tensor, Tensor]] = []
    keep = H2O.keep

    def watch(self: H2O, view: CompressView) -> Kept:
        assert view.layers == tuple(range(8))
        assert (view.kv_heads, view.head_dim, view.prompt) == (2, 64, 50)
        views.append((view.length, view.positions, view.keys(3), view.values(3)))
        return keep(self, view)

    monkeypatch.setattr(H2O, "keep", watch)
    remove = runtime.decoder.hook(Seam.QKV, 3, note)
    try:
        Bench(runtime, techniques=[TECHNIQUE]).run([spec(1, ids[:50], temperature=0.0, max_tokens=9)])
    finally:
        remove()
    assert [v[0] for v in views] == [32, 40, 48, 56]
    for length, positions, keys, values in views:
        assert positions.tolist() == list(range(length - len(positions), length))
        assert keys.shape == values.shape == (len(positions), 2, 64)
        # All of them before the first cut; after it heads keep different ones, but for the 12 newest and the 8 since.
        whole = length if length == 32 else 20
        wanted = [stored[position] for position in range(length - whole, length)]
        assert torch.equal(keys[-whole:], torch.stack([k for k, _ in wanted]))
        assert torch.equal(values[-whole:], torch.stack([v for _, v in wanted]))
