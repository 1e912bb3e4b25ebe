"""A mixture's experts: a row has its bits whether threads take whole experts or part them, and whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.native.machine import ISAS, MODULE, panels
from weft.models.formats import WeightFormat
from weft.models.kernels import INPUTS
from weft.models.quantized import quantize
from weft.ops.choice import ACTIVATIONS

EXPERTS, EACH, WIDTH, INNER = 13, 3, 128, 96
FORMATS = ("float32", "bfloat16", "int8", "int4", "int4:32", "int4:32:zero")
PAIRS = [
    (text, inputs) for text in FORMATS for inputs in INPUTS
    if not (text in ("float32", "bfloat16") and inputs == "int8") and not (text == "float32" and inputs == "bfloat16")
]  # fmt: skip


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mixture:
    """Weights of one format, and rows that want experts; each `every`-th row wants the same ones."""

    def __init__(self, text: str, rows: int, every: int = 3, width: int = WIDTH) -> None:
        self.x, self.router = some(rows, width, seed=1), some(rows, EXPERTS, seed=2)
        self.router[::every] = self.router[0]
        up, down = some(EXPERTS, 2 * INNER, width, seed=3) / 11, some(EXPERTS, width, INNER, seed=4) / 10
        if text.startswith("int"):
            self.ups, self.downs = ([quantize(w, WeightFormat.parse(text)) for w in part] for part in (up, down))
        else:
            kind = getattr(torch, text)
            self.ups, self.downs = [w.to(kind) for w in up], [w.to(kind) for w in down]

    def values(self, part: list) -> list[Tensor]:  # type: ignore[type-arg]
        return [w.double() if isinstance(w, Tensor) else w.dequantized().double() for w in part]

    def run(self, isa: str, threads: int, inputs: str, rows: slice) -> Tensor:
        x, router = self.x[rows].clone(), self.router[rows].clone()
        count, width = x.shape
        shares, ids, out = (
            torch.empty(count, EACH),
            torch.empty(count, EACH, dtype=torch.int64),
            torch.empty(count, width),
        )
        results, pairs = torch.full((count * EACH, width), float("nan")), count * EACH
        both, gated = torch.empty(pairs, 2 * INNER), torch.empty(pairs, INNER)
        program = MODULE.Program(threads, isa)
        mixture = MODULE.Experts(
            router.data_ptr(), EXPERTS, shares.data_ptr(), ids.data_ptr(), x.data_ptr(), width, out.data_ptr(), width,
            results.data_ptr(), width, EXPERTS, EACH, True,
        )  # fmt: skip
        ups, downs = ([panels(program, w) for w in part] for part in (self.ups, self.downs))
        first = program.route(mixture)
        program.experts(
            mixture, [p.weight for p in ups], [p.weight for p in downs], both.data_ptr(), gated.data_ptr(),
            ACTIVATIONS["silu"], INPUTS[inputs],
        )  # fmt: skip
        last = program.combine(mixture)
        step = MODULE.Step()
        step.rows(count, 0, 0, 0, 0, 0, 0, 0)
        program.run(first, last + 1, step)
        assert results.isfinite().all(), "every pair is computed"
        return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("text", "inputs"), PAIRS, ids=lambda x: x)
def test_a_row_has_its_bits_whoever_computes_its_experts(isa: str, text: str, inputs: str) -> None:
    """13 experts: with three threads whole ones are taken, with four they are parted, as of one row with any."""
    mixture = Mixture(text, 120)
    whole = mixture.run(isa, 3, inputs, slice(0, 120))
    assert torch.equal(mixture.run(isa, 4, inputs, slice(0, 120)), whole)
    assert torch.equal(mixture.run(isa, 1, inputs, slice(0, 120)), whole)
    for start, stop in ((0, 1), (1, 3), (3, 21), (21, 120)):
        assert torch.equal(mixture.run(isa, 2, inputs, slice(start, stop)), whole[start:stop])
    gap = (whole - wanted(mixture)).abs().max()
    assert gap < {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.08}[inputs]  # of results that are some 1 to 4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("text", "inputs"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("int4", "int8")])
def test_experts_with_several_blocks_of_rows(isa: str, text: str, inputs: str) -> None:
    """More than 512, beyond which products begin anew.  Two threads take whole experts, four part them."""
    mixture = Mixture(text, 1100, every=2)
    whole = mixture.run(isa, 2, inputs, slice(0, 1100))
    assert torch.equal(mixture.run(isa, 4, inputs, slice(0, 1100)), whole)
    assert torch.equal(mixture.run(isa, 1, inputs, slice(1080, 1100)), whole[1080:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 37, 133, 300])
def test_widths_that_fill_no_vectors(isa: str, width: int) -> None:
    mixture = Mixture("float32", 40, width=width)
    whole = mixture.run(isa, 3, "float32", slice(0, 40))
    assert (whole - wanted(mixture)).abs().max() < 1e-4
    assert torch.equal(mixture.run(isa, 2, "float32", slice(7, 8)), whole[7:8])


def wanted(mixture: Mixture) -> Tensor:
    """By the formula, in float64, of the values that the weights stand for."""
    shares, ids = torch.softmax(mixture.router.double(), -1).topk(EACH)
    shares = shares / shares.sum(-1, keepdim=True)
    ups, downs = mixture.values(mixture.ups), mixture.values(mixture.downs)
    out = torch.zeros(*mixture.x.shape, dtype=torch.float64)
    for row, x in enumerate(mixture.x.double()):
        for share, e in zip(shares[row], ids[row].tolist(), strict=True):
            gate, up = (ups[e] @ x).split(INNER)
            out[row] += share * (downs[e] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_weights_that_do_not_fit_each_other_are_refused() -> None:
    program = MODULE.Program(1, "auto")
    mixture = MODULE.Experts(0, 2, 0, 0, 0, WIDTH, 0, WIDTH, 0, WIDTH, 2, 1, False)
    up, down = panels(program, some(2 * INNER, WIDTH, seed=1)), panels(program, some(WIDTH, INNER + 16, seed=2))
    with pytest.raises(ValueError, match="of each expert"):
        program.experts(mixture, [up.weight], [down.weight], 0, 0, 0, 0)
    with pytest.raises(ValueError, match="what gates open"):
        program.experts(mixture, [up.weight] * 2, [down.weight] * 2, 0, 0, 0, 0)
