"""Row-wise operations against torch's own, and the facts about this machine's kernels that the invariant mode rests on."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from weft.errors import ConfigError
from weft.models.spec import PAD_ROWS, RopeSpec
from weft.ops import choose
from weft.ops.ref import basic, moe, rope
from weft.ops.ref.tiles import agreeing_rows, invariant_tiling, slabs_for, whole


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_choice() -> None:
    assert choose("ref").linear is basic.linear
    with pytest.raises(ConfigError, match="ref"):
        choose("cuda_graphs")


@pytest.mark.parametrize("bias", [False, True])
def test_linear_in_slabs(bias: bool) -> None:
    x, weight = noise(64, 20), noise(7, 20, seed=1)
    b = noise(7, seed=2) if bias else None
    out = torch.zeros(64, 7)
    basic.linear(x, weight, b, out, [(0, 32), (32, 8)])
    torch.testing.assert_close(out[:40], functional.linear(x, weight, b)[:40])
    assert not out[40:].any()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(offset: float, dtype: torch.dtype) -> None:
    x, weight = noise(33, 50).to(dtype), noise(50, seed=1).to(dtype)
    out = torch.empty_like(x)
    basic.rms_norm(x, weight, 1e-3, offset, out)
    wanted = functional.rms_norm(x.float(), (50,), weight.float() + offset, 1e-3).to(dtype)
    torch.testing.assert_close(out, wanted)
    heads = noise(9, 12, 8)
    part = heads[:, 2:5]
    expected = functional.rms_norm(part, (8,), torch.ones(8), 1e-6)
    basic.rms_norm(part, torch.ones(8), 1e-6, 0.0, part)
    torch.testing.assert_close(heads[:, 2:5], expected)


def test_activations_and_soft_cap() -> None:
    x = noise(40, 26) * 6
    torch.testing.assert_close(basic.silu(x.clone()), functional.silu(x))
    torch.testing.assert_close(basic.gelu_tanh(x.clone()), functional.gelu(x, approximate="tanh"))
    assert basic.silu(torch.tensor([-200.0, 200.0])).tolist() == [0.0, 200.0]
    out = torch.empty(40, 13)
    basic.gated(x, "silu", out)
    torch.testing.assert_close(out, functional.silu(x[:, :13]) * x[:, 13:])
    torch.testing.assert_close(basic.softcap_(x.clone(), 5.0), 5.0 * torch.tanh(x / 5.0))


def test_embed() -> None:
    table, out = noise(11, 6), torch.empty(4, 6)
    basic.embed(torch.tensor([3, 0, 10, -1]), table, 2.0, out)
    assert torch.equal(out[:3], table[[3, 0, 10]] * 2.0)
    assert out.isfinite().all()


def test_experts_against_every_expert_on_every_row() -> None:
    x, up, down = noise(37, 10), noise(5, 12, 10, seed=1), noise(5, 10, 6, seed=2)
    weights, ids = moe.route(noise(37, 5, seed=3), 2, True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(37))
    wanted = torch.zeros(37, 10)
    for row in range(37):
        for slot in range(2):
            gate, other = (up[ids[row, slot]] @ x[row]).chunk(2)
            wanted[row] += weights[row, slot] * (down[ids[row, slot]] @ (functional.silu(gate) * other))
    for cut in (whole, slabs_for((8, 16))):
        out = torch.full((37, 10), torch.nan)
        moe.experts(x, weights, ids, up, down, "silu", out, cut)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_rope_turns_pairs_and_leaves_the_rest() -> None:
    x = noise(5, 2, 8)
    turned = x.clone()
    cos, sin = rope.tables(torch.tensor([0, 1, 2, 3, 70]), rope.frequencies(RopeSpec(dim=4, theta=100.0)), 1.0)
    rope.apply_rope(turned, cos, sin)
    assert torch.equal(turned[0], x[0])
    assert torch.equal(turned[..., 4:], x[..., 4:])
    as_complex = torch.complex(x[..., :2], x[..., 2:4])
    angle = torch.tensor([0.0, 1, 2, 3, 70])[:, None] * torch.tensor([1.0, 0.1])
    wanted = as_complex * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(turned[..., :2], wanted.real, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[..., 2:4], wanted.imag, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- bits


ELEMENTWISE = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "cos": torch.cos,
    "sin": torch.sin,
    "log": lambda x: x.abs().add(1.0).log(),
    "rsqrt": lambda x: x.abs().add(1.0).rsqrt(),
    "silu": basic.silu,
    "gelu_tanh": basic.gelu_tanh,
}
ROW_WISE = {
    "sum": lambda x: x.sum(-1),
    "mean_of_squares": lambda x: (x * x).mean(-1),
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elements_do_not_depend_on_their_place(name: str) -> None:
    """The vector path and the scalar tail of a kernel agree in every bit, wherever threads split the tensor."""
    fn = ELEMENTWISE[name]
    x = noise(100_003) * 5
    reference = fn(x.clone())
    for count in (1, 2, 3, 7, 15, 16, 17, 31, 33, 100, 32769, 65_600, 99_999):
        for start in (0, 1, 3):
            assert torch.equal(fn(x[start : start + count].clone()), reference[start : start + count]), (count, start)


@pytest.mark.parametrize("name", ROW_WISE)
@pytest.mark.parametrize("width", [12, 37, 64, 256, 2304])
def test_rows_do_not_depend_on_their_number(name: str, width: int) -> None:
    fn = ROW_WISE[name]
    x = noise(600, width)
    reference = fn(x)
    for count in (1, 2, 3, 5, 8, 31, 64, 500):
        for start in (0, 1, 7):
            assert torch.equal(fn(x[start : start + count].clone()), reference[start : start + count]), (count, start)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (75, 44), (301, 97)])
def test_ladder_agrees_on_fresh_numbers(shape: tuple[int, int]) -> None:
    """Row counts that agreed on the trial's numbers agree on others, with each row in many slots."""
    weight = noise(*shape, seed=5)
    ladder = agreeing_rows([weight])
    assert ladder[0] <= PAD_ROWS
    assert len(ladder) > 1
    x = noise(ladder[-1] * 2, shape[1], seed=6)
    reference = None
    for rows in ladder:
        for shift in (0, 1, 11):
            rolled = x.roll(shift, 0)
            out = torch.empty(len(x), shape[0])
            basic.linear(rolled, weight, None, out, [(at, rows) for at in range(0, len(x), rows)])
            out = out.roll(-shift, 0)
            reference = out if reference is None else reference
            assert torch.equal(out, reference), (rows, shift)


def test_slabs_cover_and_reach_past_the_end() -> None:
    cut = slabs_for((16, 32, 128))
    assert list(cut(0)) == []
    assert list(cut(200)) == [(0, 128), (128, 32), (160, 32), (192, 16)]
    assert list(cut(5)) == [(0, 16)]
    for rows in range(1, 300):
        covered = [start for start, _ in cut(rows)], sum(size for _, size in cut(rows))
        assert covered[0][0] == 0
        assert rows <= covered[1] < rows + 16


def test_no_agreement_leaves_one_row_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel's bits differ between all row counts, one count is used for everything."""
    honest = basic.linear

    def fickle(x, weight, bias, out, slabs) -> None:
        honest(x, weight, bias, out, slabs)
        out += slabs[0][1]

    monkeypatch.setattr("weft.ops.ref.tiles.linear", fickle)
    assert len(agreeing_rows([noise(20, 12)])) == 1


def test_tiling_is_usable() -> None:
    for heads, dim in ((1, 20), (2, 64), (7, 64), (8, 128)):
        tiling = invariant_tiling(heads, dim, torch.device("cpu"))
        assert tiling.decode in (1, 2, 4, 8, 16)
        assert tiling.prefill % tiling.decode == 0
        assert tiling.group & (tiling.group - 1) == 0
