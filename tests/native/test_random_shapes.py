"""Every operation of the kernels beside `ops/ref` over random shapes: odd sizes, one row, and none; and whole decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.harness import Bench, Rows, bench_for
from tests.native.machine import ISAS, MODULE, Machine, panels
from tests.native.test_decoder import CONFIG
from tests.native.test_products import FEW
from weft.models.families import read
from weft.models.formats import WeightFormat
from weft.models.quantized import quantize
from weft.models.spec import DecoderSpec
from weft.ops.choice import ACTIVATIONS
from weft.ops.ref import basic, moe, rope

EXAMPLES = settings(max_examples=30, deadline=None)
COUNTS = st.sampled_from((0, 1, 1, 2, 3, 7, 16, 17, 33))
"""Rows."""
MACHINES = st.builds(
    lambda isa, threads: Machine(MODULE.Program(threads, isa)), st.sampled_from(ISAS), st.integers(1, 2)
)
UNTOUCHED = 7.0


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def room(rows: int, width: int) -> Tensor:
    """Memory for results, a row more than is to be written."""
    return torch.full((rows + 1, width), UNTOUCHED)


def same(found: Tensor, wanted: Tensor, rows: int, near: float = 1e-5) -> None:
    assert (found[rows:] == UNTOUCHED).all(), "a row that was not asked for"
    torch.testing.assert_close(found[:rows], wanted, rtol=near, atol=near)


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 70), st.integers(1, 90), st.booleans())
def test_linear(machine: Machine, rows: int, outs: int, half: int, biased: bool) -> None:
    x, weight, out = some(rows + 1, 2 * half), some(outs, 2 * half, seed=1) / half, room(rows, outs)
    bias = some(outs, seed=2) if biased else None
    packed = panels(machine.program, weight)
    machine.run(machine.program.linear(
        packed.weight, x.data_ptr(), x.stride(0), 0 if bias is None else bias.data_ptr(), out.data_ptr(), outs, False, 0
    ), rows)  # fmt: skip
    wanted = torch.empty(rows, outs)
    basic.linear(x[:rows], weight, bias, wanted, [(0, rows)])
    same(out, wanted, rows)


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 60), st.integers(1, 40), st.integers(1, 30), st.sampled_from([*ACTIVATIONS]))
def test_gates_and_what_reads_them(
    machine: Machine, rows: int, half: int, half_inner: int, outs: int, activation: str
) -> None:
    width, inner = 2 * half, 2 * half_inner
    x, up, down = some(rows + 1, width), some(2 * inner, width, seed=1) / half, some(outs, inner, seed=2) / inner
    wanted_both, wanted, after = torch.empty(rows, 2 * inner), torch.empty(rows, inner), torch.empty(rows, outs)
    basic.linear(x[:rows], up, None, wanted_both, [(0, rows)])
    basic.gated(wanted_both, activation, wanted)
    basic.linear(wanted, down, None, after, [(0, rows)])
    first, second = panels(machine.program, up), panels(machine.program, down)
    both, out, end = room(rows, 2 * inner), room(rows, inner), room(rows, outs)
    given = (
        first.weight,
        x.data_ptr(),
        width,
        0,
        both.data_ptr(),
        2 * inner,
        out.data_ptr(),
        inner,
        ACTIVATIONS[activation],
    )
    machine.run(machine.program.gated_linear(*given, 0), rows)
    same(out, wanted, rows)
    machine.run(machine.program.mlp(*given, second.weight, 0, end.data_ptr(), outs, 0), rows)
    same(end, after, rows)


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 4), st.integers(1, 60), st.integers(0, 5))
def test_norm_and_sum(machine: Machine, rows: int, heads: int, width: int, gap: int) -> None:
    x, weight, out = some(rows + 1, heads * width + gap) * 3, some(width, seed=1), room(rows, heads * width)
    machine.run(machine.program.norm(
        x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), out.stride(0), heads, width, 1e-5, False
    ), rows)  # fmt: skip
    split = x[:rows, : heads * width].reshape(rows, heads, width)
    wanted = torch.empty_like(split)
    basic.rms_norm(split, weight, 1e-5, 0.0, wanted)
    same(out, wanted.view(rows, heads * width), rows)
    into = some(rows + 1, heads * width, seed=4)
    into[rows:] = UNTOUCHED
    summed = into[:rows] + out[:rows]
    machine.run(machine.program.add(into.data_ptr(), out.data_ptr(), heads * width, heads * width), rows)
    same(into, summed, rows, 0.0)


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 4), st.integers(1, 30), st.integers(0, 20))
def test_rope(machine: Machine, rows: int, heads: int, pairs: int, rest: int) -> None:
    dim = 2 * pairs + rest
    x, angles = some(rows + 1, heads * dim), some(rows + 1, pairs, seed=1)
    x[rows:] = UNTOUCHED
    tables, wanted = (angles.cos(), angles.sin()), x[:rows].clone()
    rope.apply_rope(wanted.view(rows, heads, dim), *(table[:rows] for table in tables))
    machine.run(machine.program.rope(x.data_ptr(), x.stride(0), heads, dim, pairs, 0), rows, angles=tables)
    same(x, wanted, rows)


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 70), st.sampled_from([*ACTIVATIONS]))
def test_gated_and_soft_cap(machine: Machine, rows: int, inner: int, activation: str) -> None:
    x, out = some(rows + 1, 2 * inner) * 4, room(rows, inner)
    machine.run(
        machine.program.gated(x.data_ptr(), 2 * inner, out.data_ptr(), inner, inner, ACTIVATIONS[activation]), rows
    )
    wanted = torch.empty(rows, inner)
    basic.gated(x[:rows], activation, wanted)
    same(out, wanted, rows)
    logits = room(rows, inner)
    logits[:rows] = x[:rows, :inner] * 9
    capped = basic.softcap_(logits[:rows].clone(), 30.0)
    machine.run(machine.program.softcap(logits.data_ptr(), inner, 30.0), 0, wanted=rows)
    same(logits, capped, rows, 1e-5)


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 90), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_embed_and_pick(machine: Machine, rows: int, vocab: int, half: int, dtype: torch.dtype) -> None:
    table, out = some(vocab, 2 * half).to(dtype), room(rows, 2 * half)
    tokens = torch.randint(0, vocab, (rows + 1,), generator=torch.Generator().manual_seed(rows))
    packed = panels(machine.program, table)
    machine.run(machine.program.embed(packed.weight, 1.5, out.data_ptr(), out.stride(0)), rows, tokens=tokens)
    wanted = torch.empty(rows, 2 * half)
    basic.embed(tokens[:rows], table.float(), 1.5, wanted)
    same(out, wanted, rows)
    picked, into = torch.randint(0, rows + 1, (rows,)), room(rows, 2 * half)
    index = machine.program.pick(out.data_ptr(), out.stride(0), into.data_ptr(), 2 * half)
    step = MODULE.Step()
    step.rows(0, 0, rows, picked.data_ptr(), 0, 0, 0, 0)
    machine.program.run(index, index + 1, step)
    same(into, out[picked], rows, 0.0)


@pytest.mark.parametrize("formats", [("",), FEW], ids=["float32", "few bits"])
@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 9), st.data())
def test_experts(formats: tuple[str, ...], machine: Machine, rows: int, num: int, data: st.DataObject) -> None:
    """Routing, an expert's rows together, and the sum of what they give; most experts get no row when there are few.

    Of weights of few bits the reference has the values that they stand for.
    """
    top_k, normalize = data.draw(st.integers(1, num)), data.draw(st.booleans())
    text = data.draw(st.sampled_from(formats))
    unit = (WeightFormat.parse(text).group or 8) if text else 2
    width, inner = (unit * data.draw(st.integers(1, 1 + 40 // unit)) for _ in range(2))
    activation = data.draw(st.sampled_from([*ACTIVATIONS]))
    x, router = some(rows + 1, width), some(rows + 1, num, seed=1) * 3
    up, down = some(num, 2 * inner, width, seed=2) / width, some(num, width, inner, seed=3) / inner
    kept: list[list[Any]] = [list(up), list(down)]
    if text:
        kept = [[quantize(part, WeightFormat.parse(text)) for part in parts] for parts in kept]
        up, down = (torch.stack([part.dequantized() for part in parts]) for parts in kept)
    shares, ids, out = room(rows, top_k), torch.full((rows + 1, top_k), -5), room(rows, width)
    results = torch.empty(rows * top_k, width)
    both, opened = torch.empty(rows * top_k, 2 * inner), torch.empty(rows * top_k, inner)
    program = machine.program
    mixture = MODULE.Experts(
        router.data_ptr(), num, shares.data_ptr(), ids.data_ptr(), x.data_ptr(), width, out.data_ptr(), width,
        results.data_ptr(), width, num, top_k, normalize,
    )  # fmt: skip
    ups, downs = ([panels(program, part) for part in parts] for parts in kept)
    first = program.route(mixture)
    program.experts(
        mixture, [p.weight for p in ups], [p.weight for p in downs], both.data_ptr(), opened.data_ptr(),
        ACTIVATIONS[activation], 0,
    )  # fmt: skip
    last = program.combine(mixture)
    step = MODULE.Step()
    step.rows(rows, 0, 0, 0, 0, 0, 0, 0)
    program.run(first, last + 1, step)
    wanted_shares, wanted_ids = moe.route(router[:rows], top_k, normalize)
    assert torch.equal(ids[:rows], wanted_ids)
    assert (ids[rows:] == -5).all()
    same(shares, wanted_shares, rows)
    wanted = torch.empty(rows, width)
    moe.experts(
        x[:rows], wanted_shares, wanted_ids, up, down, activation, wanted, lambda count: [(0, count)] if count else []
    )
    same(out, wanted, rows, 2e-5)


def shape(data: st.DataObject) -> DecoderSpec:
    kv_heads, share = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dim = 2 * data.draw(st.integers(3, 48))
    while kv_heads * share * dim % 16:
        dim += 2
    return read({
        **CONFIG, "hidden_size": 2 * data.draw(st.integers(4, 40)), "intermediate_size": 2 * data.draw(st.integers(1, 60)),
        "num_attention_heads": kv_heads * share, "num_key_value_heads": kv_heads, "head_dim": dim,
        "vocab_size": data.draw(st.integers(2, 150)), "tie_word_embeddings": data.draw(st.booleans()),
    })  # fmt: skip


def steps(made: Bench, lengths: list[int], chunk: int, vocab: int) -> list[Tensor]:
    """Logits of every row of sequences of these lengths, a chunk of each in a step; those that are over leave."""
    tokens = [torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    found: list[list[Tensor]] = [[] for _ in lengths]
    for at in range(0, max(lengths), chunk):
        here = [i for i, n in enumerate(lengths) if at < n]
        works = [Rows(f"s{i}", tokens[i][at : at + chunk], at) for i in here]
        for i, logits in zip(here, made.run(works), strict=True):
            found[i].append(logits)
    return [torch.cat(parts) for parts in found]


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_decoders(data: st.DataObject) -> None:
    """Attention and what is stored for it, too: heads of odd sizes, sequences of one row and of several chunks of entries."""
    spec = shape(data)
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    chunk, isa = data.draw(st.sampled_from((5, 31, 64, 200))), data.draw(st.sampled_from(ISAS))
    how: dict[str, Any] = {"blocks": 64, "invariant": False}
    wanted = steps(bench_for(spec, "random", ops="ref", **how), lengths, chunk, spec.vocab)
    found = steps(bench_for(spec, "random", ops="cpu", isa=isa, **how), lengths, chunk, spec.vocab)
    for theirs, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-5)


def test_an_empty_batch_changes_no_stored_row_and_draws_nothing() -> None:
    for isa in ISAS:
        program, step = MODULE.Program(2, isa), MODULE.Step()
        arena, none = torch.full((4, 2 * 16 * 2 * 16), UNTOUCHED), torch.zeros(1, dtype=torch.int64)
        step.rows(0, 0, 0, 0, 0, none.data_ptr(), 0, 0)
        step.place(0, arena.data_ptr(), arena.stride(0) * 4, 0, 0, 16, 0, 0, 0, 0, none.data_ptr(), 0, 0)
        step.plan(0, [], 0, 0, 4, 2, 16, 2)
        first = program.store(0, none.data_ptr(), none.data_ptr(), 32, 2, 16, 0)
        last = program.attend(0, none.data_ptr(), 64, none.data_ptr(), 64, 4, 2, 16, 0.25, 0.0, 0)
        program.run(first, last + 1, step)
        assert (arena == UNTOUCHED).all()
        assert program.draw([], 5, [], [], [], [], []) == []


@pytest.mark.parametrize("isa", ISAS)
def test_drawing_over_random_widths(isa: str) -> None:
    """One row and several, over vocabularies that fill no register."""
    from tests.native.test_draws import logits_of, rows_of
    from weft.exec import sampler

    program = MODULE.Program(2, isa)
    for seed, (count, vocab) in enumerate(((1, 2), (1, 333), (5, 1021), (3, 31_337))):
        for law in ({}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.05, "temperature": 0.6}):
            logits = logits_of(count, vocab, 3.0, seed)
            assert sampler.draw(logits, rows_of(count, **law), program) == sampler.draw(logits, rows_of(count, **law))
