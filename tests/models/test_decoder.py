"""The decoder's own contract: seams, layer ranges, vectors, trees, bounds of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.checkpoints import Checkpoint
from tests.models.harness import Bench, Rows, bench_for
from tests.models.test_parity import TOLERANCE, prompt
from weft.errors import ConfigError
from weft.exec.batch import Batch
from weft.models import load_spec
from weft.models.decoder import Seam, build
from weft.models.spec import kv_groups
from weft.models.weights import dense
from weft.types import GroupKind

pytestmark = pytest.mark.usefixtures("ops")


@pytest.fixture(params=["llama", "gemma2", "qwen3_moe"])
def bench(request: pytest.FixtureRequest, checkpoint: Callable[[str], Checkpoint]) -> Bench:
    reference = checkpoint(request.param)
    return bench_for(load_spec(reference.folder), reference.folder)


def works(names: str = "ab") -> list[Rows]:
    return [Rows(name, prompt(seed, 30 + seed), 0) for seed, name in enumerate(names)]


def test_no_hook_is_one_segment_and_each_hook_adds_one(bench: Bench) -> None:
    decoder = bench.decoder
    assert decoder.segments == 1
    removes = [decoder.hook(Seam.OUTPUT, layer, lambda batch, tensors: None) for layer in (0, 1)]
    assert decoder.segments == 3
    removes[0]()
    assert decoder.segments == 2
    last = decoder.hook(Seam.LOGITS, len(decoder.spec.layers) - 1, lambda batch, tensors: None)
    assert decoder.segments == 2, "nothing follows the last seam"
    removes[1]()
    last()
    assert decoder.segments == 1


def test_reading_hooks_change_nothing_and_see_everything(bench: Bench) -> None:
    spec = bench.decoder.spec
    plain = bench.run(works("ab"))
    seen: list[tuple[Seam, int, list[tuple[int, ...]]]] = []

    def watch(seam: Seam, layer: int) -> Callable[[Batch, tuple[Tensor, ...]], None]:
        return lambda batch, tensors: seen.append((seam, layer, [tuple(t.shape) for t in tensors]))

    last = len(spec.layers) - 1
    for seam in Seam:
        for layer in {Seam.INPUTS: [0], Seam.LOGITS: [last]}.get(seam, range(last + 1)):
            bench.decoder.hook(seam, layer, watch(seam, layer))
    hooked = bench.run(works("cd"))
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))
    rows, dim = 61, spec.head_dim
    assert seen[0] == (Seam.INPUTS, 0, [(rows, spec.width)])
    assert seen[-1] == (Seam.LOGITS, last, [(rows, spec.vocab)])
    order = [Seam.QKV, Seam.ATTENTION, Seam.GATE, Seam.OUTPUT]
    assert [(seam, layer) for seam, layer, _ in seen[1:-1]] == [(s, i) for i in range(last + 1) for s in order]
    by_seam = {(seam, layer): shapes for seam, layer, shapes in seen}
    assert by_seam[Seam.QKV, 1] == [(rows, spec.heads, dim), (rows, spec.kv_heads, dim), (rows, spec.kv_heads, dim)]
    assert by_seam[Seam.ATTENTION, 1] == [(rows, spec.heads, dim)]
    assert by_seam[Seam.OUTPUT, last] == [(rows, spec.width)]
    for index, layer in enumerate(spec.layers):
        wanted = [(rows, layer.experts.top_k)] * 2 if layer.experts else [(rows, layer.intermediate)]
        assert by_seam[Seam.GATE, index] == wanted


@pytest.mark.parametrize("seam", Seam)
def test_writing_at_a_seam_changes_what_follows(bench: Bench, seam: Seam) -> None:
    plain = bench.run(works("ab"))[0]
    layer = len(bench.decoder.spec.layers) - 1 if seam is Seam.LOGITS else 0

    def halve(batch: Batch, tensors: tuple[Tensor, ...]) -> None:
        tensors[0].mul_(0.5)

    remove = bench.decoder.hook(seam, layer, halve)
    assert (bench.run(works("cd"))[0] - plain).abs().max() > 1e-3
    remove()
    assert torch.equal(bench.run(works("ef"))[0], plain)


def test_seams_that_do_not_exist(bench: Bench) -> None:
    for seam, layer in ((Seam.QKV, 99), (Seam.INPUTS, 1), (Seam.LOGITS, 0), (Seam.OUTPUT, -1)):
        with pytest.raises(ConfigError, match="no seam"):
            bench.decoder.hook(seam, layer, lambda batch, tensors: None)


def test_layer_ranges_with_parked_states_give_the_whole(bench: Bench) -> None:
    """Each layer on its own, hidden states parked in the pool between, equals one pass."""
    plain = torch.cat(bench.run(works("ab")))
    batch = bench.batch(works("cd"))
    parked = next(i for i, group in enumerate(bench.groups) if group.kind is GroupKind.PARKED)
    slots = batch.groups[parked].slots_T
    count = len(bench.decoder.spec.layers)
    out = bench.decoder.forward(batch, bench.pool, layers=(0, 1))
    for layer in range(1, count):
        assert out.shape == (61, bench.decoder.spec.width)
        bench.pool.park(parked, slots, out)
        hidden = bench.pool.unpark(parked, slots).to(bench.decoder.dtype)
        out = bench.decoder.forward(batch, bench.pool, layers=(layer, layer + 1), hidden=hidden)
    assert torch.equal(out, plain)


def test_only_wanted_rows_have_logits(bench: Bench) -> None:
    every = bench.run(works("ab"))
    assert torch.equal(torch.cat(bench.run(works("cd"), "last")), torch.stack([rows[-1] for rows in every]))
    batch = replace(bench.batch(works("ef")), logit_rows_N=torch.empty(0, dtype=torch.int64))
    assert bench.decoder.forward(batch, bench.pool).shape == (0, bench.decoder.spec.vocab)


def test_vectors_stand_for_embeddings(bench: Bench) -> None:
    spec = bench.decoder.spec
    plain = bench.run(works("a"))[0]
    batch = bench.batch(works("b"))
    rows = torch.tensor([3, 4, 11])
    values = dense(bench.decoder.tensors["embed"])[batch.tokens_T[rows]].float() * spec.embedding_scale
    batch.tokens_T[rows] = -1
    batch.vectors = (rows, values)
    assert (bench.decoder.forward(batch, bench.pool) - plain).abs().max() < 1e-5


def test_each_branch_of_a_tree_is_what_a_chain_would_be(bench: Bench) -> None:
    """Guesses in a tree get the logits that they get when their branch is the context."""
    context = prompt(4, 40)
    branches = {(0, 1, 3): None, (0, 2): None, (4,): None}
    guesses, parents = [7, 8, 9, 10, 11], (1, 2, 2, 3, 1)
    depth = [40, 41, 41, 42, 40]
    bench.run([Rows("tree", context[:38], 0)])
    tree = Rows("tree", context[38:] + guesses, 38, parents=parents, positions=[38, 39, *depth])
    found = bench.run([Rows("x", prompt(5, 9), 0), tree])[1]
    for branch in branches:
        tokens = context + [guesses[g] for g in branch]
        wanted = bench.run([Rows(f"chain{branch}", tokens, 0)])[0][40:]
        assert (found[[2 + g for g in branch]] - wanted).abs().max() < TOLERANCE, branch


def test_a_batch_beyond_the_bounds_is_our_own_bug(bench: Bench) -> None:
    small = bench_for(bench.decoder.spec, "random", max_rows=20)
    for many in ([Rows("a", prompt(1, 21), 0)], [Rows("b", [1], small.decoder.spec.max_positions)]):
        with pytest.raises(AssertionError):
            small.run(many)


def test_empty_batch(bench: Bench) -> None:
    batch = bench.batch([Rows("a", [], 0)])
    assert bench.decoder.forward(batch, bench.pool).shape == (0, bench.decoder.spec.vocab)


def test_build_refuses_what_it_cannot_run(checkpoint: Callable[[str], Checkpoint]) -> None:
    reference = checkpoint("mistral")
    spec = load_spec(reference.folder)
    groups, _ = kv_groups(spec, "float32")
    sizes: dict[str, Any] = {"max_rows": 8, "max_samples": 8}
    with pytest.raises(ConfigError, match="float8"):
        build(spec, reference.folder, dtype="float8", groups=groups, **sizes)
    with pytest.raises(ConfigError, match="int32"):
        build(spec, reference.folder, dtype=torch.int32, groups=groups, **sizes)
    with pytest.raises(ConfigError, match="no KV group"):
        build(spec, reference.folder, dtype="float32", groups=groups[1:], **sizes)
    with pytest.raises(ConfigError, match="ops"):
        build(spec, reference.folder, dtype="float32", groups=groups, ops="fast", **sizes)
    assert build(spec, reference.folder, dtype="float32", groups=groups, **sizes).invariant
    assert not build(spec, reference.folder, dtype=torch.bfloat16, groups=groups, **sizes).invariant
