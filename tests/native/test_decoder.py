"""A decoder on the kernels beside the same one on the reference operations: logits, bits, calls, and what it falls back to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models.harness import Bench, Rows, bench_for
from tests.native.machine import HALVES
from weft import native
from weft.config import build_stack
from weft.errors import ConfigError
from weft.models import kernels as cpu
from weft.models.families import read
from weft.models.formats import WeightFormat
from weft.models.kernels import Call
from weft.models.layout import quantized, weights_bytes
from weft.models.native_step import STORES
from weft.models.operations import Seam
from weft.models.spec import DecoderSpec
from weft.ops.choice import choose

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 101,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
LONG = 1300
"""Tokens: three chunks of entries."""


def spec(**changes: Any) -> DecoderSpec:
    return read({**CONFIG, **changes})


def prompt(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], count).tolist()


def bench(ops: str, of: DecoderSpec | None = None, **kw: Any) -> Bench:
    return bench_for(of or spec(), "random", ops=ops, blocks=400, **kw)


def test_logits_of_a_long_context_are_those_of_the_reference() -> None:
    tokens = prompt(LONG)
    wanted, got = (bench(ops).chunked("a", tokens, 300) for ops in ("ref", "cpu"))
    assert (got - wanted).abs().max() < 2e-5


def test_bfloat16_is_nearer_to_exact_arithmetic_than_the_reference() -> None:
    """Beside float32 arithmetic over the same weights: only stored keys and values are rounded, and inputs of products where the
    instruction set multiplies bfloat16, where ref rounds every activation."""
    tokens = prompt(LONG)
    narrow, exact = bench("ref", dtype="bfloat16"), bench("ref")
    for name, tensor in narrow.decoder.tensors.items():
        exact.decoder.tensors[name].copy_(tensor)
    wanted = exact.chunked("a", tokens, 300)
    theirs = (bench("ref", dtype="bfloat16").chunked("a", tokens, 300) - wanted).abs()
    for isa in native.module().isas():
        ours = (bench("cpu", dtype="bfloat16", isa=isa).chunked("a", tokens, 300) - wanted).abs()
        share = 0.8 if isa in HALVES else 0.5
        assert ours.max() < share * theirs.max()
        assert ours.mean() < share * theirs.mean()


@pytest.mark.parametrize("isa", native.module().isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_chunks_company_or_threads(isa: str, dtype: str) -> None:
    tokens = prompt(LONG)
    wanted = bench("cpu", dtype=dtype, isa=isa).chunked("a", tokens, 512)
    for threads, chunk in ((2, 97), (3, 512), (1, 1)):
        mine = bench("cpu", dtype=dtype, isa=isa, threads=threads)
        if chunk == 1:
            mine.chunked("a", tokens[:-4], 512)
            got = mine.chunked("a", tokens, 1, start=LONG - 4)
            assert torch.equal(got, wanted[-4:])
        else:
            assert torch.equal(mine.chunked("a", tokens, chunk), wanted)
    together = bench("cpu", dtype=dtype, isa=isa, threads=2)
    together.chunked("a", tokens[:-1], 512)
    works = [Rows("b", prompt(40, 1), 0), Rows("a", tokens[-1:], LONG - 1), Rows("c", prompt(9, 2), 0)]
    assert torch.equal(together.run(works)[1][0], wanted[-1])


def test_a_step_without_hooks_is_one_call() -> None:
    decoder = bench("cpu").decoder
    (segment,) = decoder._segments.pieces(0, len(decoder.spec.layers), dense=True, alone=True)
    (call,) = segment.runs
    # Behind it stand, for each layer, the operations of steps that look at what gates open, or add to them.
    assert isinstance(call, Call)
    assert (call.first, call.stop) == (0, len(decoder.native.program) - 4 * len(decoder.spec.layers))
    (segment,) = decoder._segments.pieces(0, len(decoder.spec.layers), dense=True, alone=True, vectors=True)
    assert [isinstance(run, Call) for run in segment.runs] == [True, False, True], "vectors replace embeddings"


@pytest.mark.parametrize("isa", native.module().isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hook_behind_the_gates_sees_them_and_changes_no_bit(isa: str, dtype: str) -> None:
    plain, hooked = (bench("cpu", dtype=dtype, isa=isa, threads=2) for _ in range(2))
    tokens, seen = prompt(LONG), []
    last = len(hooked.decoder.spec.layers) - 1
    remove = hooked.decoder.hook(Seam.GATE, last, lambda batch, views: seen.append(views[0].clone()))
    wanted = plain.chunked("a", tokens, 512)
    assert torch.equal(hooked.chunked("a", tokens, 512), wanted)
    gated = torch.cat(seen)
    assert gated.shape == (LONG, hooked.decoder.spec.layers[last].intermediate)
    assert gated.isfinite().all()
    assert gated.abs().max() > 0
    remove()
    zeroed = bench("cpu", dtype=dtype, isa=isa, threads=2)
    zeroed.decoder.hook(Seam.GATE, last, lambda batch, views: views[0].zero_())
    assert not torch.equal(zeroed.chunked("a", tokens, 512), wanted)


def test_attention_of_others_runs_between_the_calls() -> None:
    mine, other = bench("cpu"), bench("ref")
    tokens = prompt(60)
    batch = mine.batch([Rows("a", tokens, 0)])
    step = mine.decoder.begin(batch, mine.pool, 0, 2)
    assert step.dense
    attends = cpu.Native.attends
    try:
        cpu.Native.attends = lambda self, batch, pool: False  # type: ignore[method-assign]
        got = bench("cpu").chunked("a", tokens, 60)
    finally:
        cpu.Native.attends = attends  # type: ignore[method-assign]
    assert (got - other.chunked("a", tokens, 60)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 512}, "heads have more than 256 values"),
        ({"num_attention_heads": 66, "num_key_value_heads": 2}, "more than 32 for one kv head"),
        ({"head_dim": 6, "num_attention_heads": 2}, "odd widths"),
        ({"intermediate_size": 97}, "odd widths"),
    ],
)
def test_what_the_kernels_do_not_compute_runs_on_the_reference_and_says_why(changes: dict[str, Any], said: str) -> None:
    odd = spec(**changes)
    found = choose("auto", "auto", odd, "float32", "cpu")
    assert (found.ops, found.isa) == ("ref", "")
    assert said in found.reason
    with pytest.raises(ConfigError, match=said):
        choose("cpu", "auto", odd, "float32", "cpu")


def test_choices() -> None:
    plain, isas = spec(), native.module().isas()
    assert (choose("auto", "auto", plain, "bfloat16", "cpu").ops, choose("auto", "auto", plain, "bfloat16", "cpu").isa) == (
        "cpu", isas[0],
    )  # fmt: skip
    assert choose("cpu", "portable", plain, "float32", "cpu").isa == "portable"
    assert choose("ref", "auto", plain, "float32", "cpu").ops == "ref"
    assert "for CPUs" in choose("auto", "auto", plain, "bfloat16", "cuda").reason
    assert "not float16" in choose("auto", "auto", plain, "float16", "cpu").reason
    for wanted, isa, said in (("fast", "auto", "--ops is auto, ref or cpu"), ("auto", "neon9", "--isa is auto or")):
        with pytest.raises(ConfigError, match=said):
            choose(wanted, isa, plain, "float32", "cpu")


def test_without_the_extension_the_reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_reason", "weft's kernels were not built (no compiler)")
    found = choose("auto", "auto", spec(), "float32", "cpu")
    assert (found.ops, found.reason) == ("ref", "weft's kernels were not built (no compiler)")
    with pytest.raises(ConfigError, match="were not built"):
        choose("cpu", "auto", spec(), "float32", "cpu")


@pytest.mark.parametrize("text", ["int8", "int8:32:zero", "int4", "int4:16:zero"])
def test_weights_of_few_bits_give_what_the_reference_gives_over_the_same_values(text: str) -> None:
    """In float32 the reference operations keep exactly the values that the formats stand for."""
    tokens, format = prompt(200), WeightFormat.parse(text)
    wanted, got = (bench(ops, formats=quantized(spec(), format)).chunked("a", tokens, 64) for ops in ("ref", "cpu"))
    assert (got - wanted).abs().max() < 2e-5
    plain = bench("cpu").chunked("a", tokens, 64)
    assert (got - plain).abs().max() > 1e-3
    whole = bench("cpu", formats=quantized(spec(), format))
    assert torch.equal(whole.chunked("b", tokens, 7), got)
    dense_bytes = bench("cpu").decoder.weights_bytes
    assert whole.decoder.weights_bytes < (0.45 if format.bits == 8 else 0.32) * dense_bytes
    assert whole.decoder.weights_bytes == weights_bytes(spec(), "float32", True, quantized(spec(), format))


def test_inputs_of_eight_bits_are_near_and_do_not_depend_on_the_batch() -> None:
    tokens, format = prompt(200), WeightFormat.parse("int8")
    exact = bench("cpu", formats=quantized(spec(), format)).chunked("a", tokens, 64)
    narrow = bench("cpu", formats=quantized(spec(), format), activations="int8")
    found = narrow.chunked("a", tokens, 64)
    assert 1e-4 < (found - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert torch.equal(narrow.chunked("b", tokens, 3), found)


def test_rows_of_eight_bits_are_read_as_the_reference_reads_them() -> None:
    tokens = prompt(LONG)
    found = {}
    for ops in ("ref", "cpu"):
        store = build_stack(["kv.store=int8"])["kv.store"]
        one = bench(ops, store=store)
        found[ops] = one.chunked("a", tokens, 300)
        assert store.acts["rows_encoded"] == LONG * 2 * 2 * 2, "entries, keys and values, kv heads, layers"
    plain = bench("ref").chunked("a", tokens, 300)
    # A number that lies between two bytes may be rounded either way, where the sums before it differ in their last bits.
    apart, rounding = (found["cpu"] - found["ref"]).abs(), (found["ref"] - plain).abs()
    assert apart.max() < 0.1 * rounding.max()
    assert apart.mean() < 0.02 * rounding.mean()


def test_rows_of_eight_bits_are_stored_as_the_technique_stores_them() -> None:
    """Byte for byte, also of rows that are zero, tiny or not finite."""
    store = build_stack(["kv.store=int8"])["kv.store"]
    rows = torch.randn(64, 4, 16, generator=torch.Generator().manual_seed(3))
    rows[1], rows[2, 0], rows[3, 1, 4], rows[4, 2, 5], rows[5] = 0.0, 1e-42, float("nan"), float("inf"), rows[5] * 1e30
    keys, values = rows[:, :2].contiguous(), rows[:, 2:].contiguous()
    for isa in native.module().isas():
        program, step = native.module().Program(1, isa), native.module().Step()
        arena, slots = torch.zeros(4, 2 * 16 * 2 * 20, dtype=torch.uint8), torch.arange(64)
        step.rows(64, 0, 0, 0, 0, 0, 0, 0)
        step.place(0, arena.data_ptr(), arena.shape[1], 0, 0, 16, 0, 0, 0, 0, slots.data_ptr(), 0, STORES["int8"])
        at = program.store(0, keys.data_ptr(), values.data_ptr(), 32, 2, 16, 0)
        program.run(at, at + 1, step)
        stored = arena.view(4, 2, 16, 2, 20)
        for which, x in enumerate((keys, values)):
            found = stored[:, which].reshape(64 * 2, 20)
            wanted = store.encode(x.view(-1, 16))
            whole = store.decode(wanted).isfinite().all(1)
            assert torch.equal(found[whole], wanted[whole])
            assert torch.equal(store.decode(found).isnan(), store.decode(wanted).isnan())
