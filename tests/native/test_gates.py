"""A product and its gates as one operation: beside float64, and to the bit what the two operations give one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.native.machine import MODULE, ROWS, Machine, panels, product
from tests.native.test_products import random, read_as
from weft.models.formats import WeightFormat
from weft.models.kernels import INPUTS
from weft.models.quantized import quantize
from weft.ops.choice import ACTIVATIONS
from weft.ops.cpu.panels import Panels

FORMATS = (torch.float32, torch.bfloat16, "int8", "int8:0:zero", "int4:16:zero", "int4:128")


def pack(machine: Machine, seed: int, outs: int, width: int, text: torch.dtype | str) -> Panels:
    values = random(seed, outs, width) * 2 * width**-0.5
    if isinstance(text, torch.dtype):
        return panels(machine.program, values.to(text))
    return panels(machine.program, quantize(values, WeightFormat.parse(text)))


def opened(both: Tensor, activation: str) -> Tensor:
    """As the papers have it: SiLU (arXiv:1702.03118), GELU by tanh (arXiv:1606.08415); gate times up (arXiv:2002.05202)."""
    gate, up = both.chunk(2, dim=-1)
    curve = gate if activation == "silu" else 2 * (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate * torch.sigmoid(curve) * up


def together(
    machine: Machine, x: Tensor, weight: Panels, bias: Tensor | None, rows: int, inputs: str, activation: str
) -> Tensor:
    inner = weight.shape[0] // 2
    both, out = torch.full((x.shape[0], 2 * inner), math.nan), torch.full((x.shape[0] + 1, inner + 3), 7.0)
    index = machine.program.gated_linear(
        weight.weight, x.data_ptr(), x.stride(0), 0 if bias is None else bias.data_ptr(), both.data_ptr(), both.stride(0),
        out.data_ptr(), out.stride(0), ACTIVATIONS[activation], INPUTS[inputs],
    )  # fmt: skip
    machine.run(index, rows)
    assert (out[rows:] == 7.0).all()
    assert (out[:, inner:] == 7.0).all()
    return out[:rows, :inner]


def apart(machine: Machine, both: Tensor, activation: str) -> Tensor:
    out = torch.zeros(both.shape[0], both.shape[1] // 2)
    machine.run(machine.program.gated(
        both.data_ptr(), both.stride(0), out.data_ptr(), out.stride(0), out.shape[1], ACTIVATIONS[activation]
    ), both.shape[0])  # fmt: skip
    return out


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("text", FORMATS, ids=str)
@pytest.mark.parametrize(("inner", "width", "activation"), [(37, 256, "silu"), (96, 128, "gelu_tanh"), (176, 2560, "silu")])
def test_gates_open_what_the_product_says(
    machine: Machine, text: torch.dtype | str, inner: int, width: int, activation: str, inputs: str
) -> None:
    weight = pack(machine, inner, 2 * inner, width, text)
    x, bias = random(1, max(ROWS), width), random(2, 2 * inner)
    for given in (bias, None):
        most = together(machine, x, weight, given, max(ROWS), inputs, activation)
        few = isinstance(text, str)
        seen = x.double() if text is torch.float32 else read_as(machine, x, inputs, few=few)
        wanted = opened(seen @ weight.unpacked().double().t() + (0 if given is None else given.double()), activation)
        # What is rounded to 8 bits may fall to either side of a tie.
        assert (most - wanted).abs().max() < (2e-2 if few and inputs == "int8" else 4e-4)
        assert (most - wanted).abs().mean() < (2e-4 if few and inputs == "int8" else 2e-5)
        both = product(machine, x, weight, given, max(ROWS), INPUTS[inputs]).contiguous()
        assert torch.equal(most, apart(machine, both, activation))
        for rows in ROWS:
            assert torch.equal(together(machine, x, weight, given, rows, inputs, activation), most[:rows])
            if rows:
                assert torch.equal(together(machine, x[-rows:], weight, given, rows, inputs, activation), most[-rows:])


def test_a_long_prompt_has_the_bits_of_its_rows_alone(machine: Machine) -> None:
    """Inputs in several stretches and blocks, between which sums wait: nearby, and where the product would go."""
    for width in (1536, 4864):
        x = random(8, 450, width)
        for format in (torch.bfloat16, WeightFormat.parse("int8"), WeightFormat.parse("int4:128:zero")):
            weight = panels(machine.program, random(9, 96, width) * 0.02, format)
            for inputs in ("bfloat16", "int8"):
                most = together(machine, x, weight, None, 450, inputs, "silu")
                for first, rows in ((0, 1), (191, 2), (200, 30), (449, 1)):
                    found = together(machine, x[first:], weight, None, rows, inputs, "silu")
                    assert torch.equal(found, most[first : first + rows])
                both = product(machine, x, weight, None, 450, INPUTS[inputs]).contiguous()
                assert torch.equal(most, apart(machine, both, "silu"))


def test_a_weight_with_an_odd_one_out_is_refused() -> None:
    program = MODULE.Program(1)
    weight = panels(program, torch.ones(3, 16))
    with pytest.raises(ValueError, match="as many gates as what they open"):
        program.gated_linear(weight.weight, 0, 0, 0, 0, 0, 0, 0, 0, 0)
