"""A product and its gates as one operation: beside float64, and to the bit what the two operations give one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.native.machine import MODULE, ROWS, Machine, panels, product
from tests.native.test_products import BIAS_SEED, INPUT_SEED, random, reading, wanted_of, weights
from weft.models.formats import WeightFormat
from weft.models.kernels import INPUTS
from weft.ops.choice import ACTIVATIONS
from weft.ops.cpu.panels import Panels

FORMATS = (
    torch.float32, torch.bfloat16, "int8", "int8:0:zero", "int8:128", "int4:16:zero", "int4:128:zero", "int4:128:float", "int4",
)  # fmt: skip
SIZE = 2.0
"""How far products of its weights spread: what opens is neither all open nor all shut."""


def pack(machine: Machine, seed: int, outs: int, width: int, text: torch.dtype | str) -> Panels:
    return panels(machine.program, weights(seed, outs, width, text, SIZE)[0])


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
@pytest.mark.parametrize(
    ("inner", "width", "activation"), [(37, 256, "silu"), (96, 128, "gelu_tanh"), (176, 2560, "silu")]
)
def test_gates_open_what_the_product_says(
    machine: Machine, text: torch.dtype | str, inner: int, width: int, activation: str, inputs: str
) -> None:
    weight = pack(machine, inner, 2 * inner, width, text)
    x, bias = random(INPUT_SEED, max(ROWS), width), random(BIAS_SEED, 2 * inner)
    for given in (bias, None):
        most = together(machine, x, weight, given, max(ROWS), inputs, activation)
        few = isinstance(text, str)
        how = reading(machine, inputs, text)
        wanted = opened(wanted_of(inner, 2 * inner, width, text, SIZE, how, given is not None), activation)
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
        formats: list[torch.dtype | WeightFormat] = [
            WeightFormat.parse(text) for text in ("int8", "int4", "int4:128:zero")
        ]
        for format in (torch.bfloat16, *formats):
            weight = panels(machine.program, random(9, 96, width) * 0.02, format)
            for inputs in ("bfloat16", "int8"):
                most = together(machine, x, weight, None, 450, inputs, "silu")
                for first, rows in ((0, 1), (191, 2), (200, 30), (449, 1)):
                    found = together(machine, x[first:], weight, None, rows, inputs, "silu")
                    assert torch.equal(found, most[first : first + rows])
                both = product(machine, x, weight, None, 450, INPUTS[inputs]).contiguous()
                assert torch.equal(most, apart(machine, both, "silu"))


def handed_on(
    machine: Machine, x: Tensor, up: Panels, down: Panels, biases: tuple[Tensor, Tensor] | None, inputs: str
) -> Tensor:
    """Both products as one operation; what is between them holds NaN where nothing is written."""
    inner, wide, rows = down.shape[1], down.shape[0], x.shape[0]
    both, gated = (torch.full((rows, n), math.nan) for n in (2 * inner, inner))
    out = torch.full((rows + 1, wide + 3), 7.0)
    first, second = (0, 0) if biases is None else (bias.data_ptr() for bias in biases)
    machine.run(machine.program.mlp(
        up.weight, x.data_ptr(), x.stride(0), first, both.data_ptr(), both.stride(0), gated.data_ptr(), gated.stride(0),
        ACTIVATIONS["silu"], down.weight, second, out.data_ptr(), out.stride(0), INPUTS[inputs],
    ), rows)  # fmt: skip
    assert (out[rows:] == 7.0).all()
    assert (out[:, wide:] == 7.0).all()
    return out[:rows, :wide]


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(
    ("first", "second"),
    [(text, text) for text in FORMATS] + [(torch.bfloat16, "int8"), ("int4:16", "int4:128"), ("int8", "int8:0:zero")],
    ids=str,
)
def test_a_product_reads_what_gates_open_as_if_it_had_been_written(
    machine: Machine, first: torch.dtype | str, second: torch.dtype | str, inputs: str
) -> None:
    _reads_what_opens(machine, first, second, 128, 384, inputs, 80, (1, 2, 3, 12, 13, 59))


@pytest.mark.parametrize("text", [torch.bfloat16, "int8", "int4:128", "int4:128:zero"], ids=str)
@pytest.mark.parametrize("inner", [2432, 5120, 6144])
def test_blocks_of_rows_and_of_inputs_are_handed_on(machine: Machine, text: torch.dtype | str, inner: int) -> None:
    """Several blocks, of all inputs and of parts of them, and a last one of another size; of the largest
    inner width as many rows as the first product fits."""
    _reads_what_opens(machine, text, text, 128, inner, "bfloat16", 205, (1, 60))


def _reads_what_opens(
    machine: Machine,
    first: torch.dtype | str,
    second: torch.dtype | str,
    width: int,
    inner: int,
    inputs: str,
    most: int,
    few: tuple[int, ...],
) -> None:
    up, down = pack(machine, 3, 2 * inner, width, first), pack(machine, 4, 69, inner, second)
    x, biases = random(5, most, width), (random(6, 2 * inner), random(7, 69))
    for given in (None, biases):
        one, other = given or (None, None)
        opened = together(machine, x, up, one, most, inputs, "silu").contiguous()
        wanted = product(machine, opened, down, other, most, INPUTS[inputs])
        assert torch.equal(handed_on(machine, x, up, down, given, inputs), wanted)
        for rows in few:
            assert torch.equal(handed_on(machine, x[:rows], up, down, given, inputs), wanted[:rows])


def test_products_that_do_not_follow_each_other_are_refused() -> None:
    program = MODULE.Program(1)
    up, down = panels(program, torch.ones(4, 16)), panels(program, torch.ones(4, 16))
    with pytest.raises(ValueError, match="what gates open is what the next product reads"):
        program.mlp(up.weight, 0, 0, 0, 0, 0, 0, 0, 0, down.weight, 0, 0, 0, 0)


def test_a_weight_with_an_odd_one_out_is_refused() -> None:
    program = MODULE.Program(1)
    weight = panels(program, torch.ones(3, 16))
    with pytest.raises(ValueError, match="as many gates as what they open"):
        program.gated_linear(weight.weight, 0, 0, 0, 0, 0, 0, 0, 0, 0)
