"""Weights of few bits, and stored rows, over random shapes: odd sizes, one row, none; beside float64 over what they stand for."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.native.machine import Machine, panels, product
from tests.native.test_attention import STORES, Stored, closeness, queries
from tests.native.test_gates import handed_on, opened, together
from tests.native.test_products import FEW, random, read_as
from tests.native.test_random_shapes import COUNTS, EXAMPLES, MACHINES
from weft.models.formats import WeightFormat
from weft.models.kernels import INPUTS
from weft.models.quantized import quantize
from weft.ops.choice import ACTIVATIONS
from weft.ops.cpu.panels import Panels

ALLOWED = st.sampled_from([*INPUTS])
"""What inputs may be rounded to."""


def close(found: Tensor, wanted: Tensor, near: float = 4e-5) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=4e-5, atol=near)


def inputs_of(rows: int, width: int) -> Tensor:
    """Numbers that are far from a tie when they are rounded to 8 bits."""
    make = torch.Generator().manual_seed(rows)
    x = torch.randint(-126, 127, (rows, width), generator=make) + torch.rand(rows, width, generator=make) * 0.8 - 0.4
    x[:, rows % width] = 127.0
    return x / 32


def weight_of(data: st.DataObject, machine: Machine, outs: int, width: int = 0) -> tuple[Panels, Tensor]:
    """Of a format that parts these inputs, or of some inputs; and the values that it stands for."""
    fitting = [text for text in FEW if width % (WeightFormat.parse(text).group or 8) == 0]
    format = WeightFormat.parse(data.draw(st.sampled_from(fitting)))
    width = width or (format.group or 8) * data.draw(st.integers(1, 9))
    weight = quantize(random(outs, outs, width) * width**-0.5, format)
    return panels(machine.program, weight), weight.dequantized().double()


def bias_of(data: st.DataObject, outs: int) -> Tensor | None:
    return random(3, outs) if data.draw(st.booleans()) else None


def added(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias.double()


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 70), ALLOWED, st.data())
def test_products_of_few_bits(machine: Machine, rows: int, outs: int, inputs: str, data: st.DataObject) -> None:
    weight, exact = weight_of(data, machine, outs)
    x, bias = inputs_of(rows + 1, weight.shape[1]), bias_of(data, outs)
    found = product(machine, x, weight, bias, rows, INPUTS[inputs])
    close(found, read_as(machine, x[:rows], inputs, weight.format) @ exact.t() + added(bias))


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 40), ALLOWED, st.sampled_from([*ACTIVATIONS]), st.data())
def test_gates_of_few_bits(
    machine: Machine, rows: int, inner: int, inputs: str, activation: str, data: st.DataObject
) -> None:
    weight, exact = weight_of(data, machine, 2 * inner)
    x, bias = inputs_of(rows + 1, weight.shape[1]), bias_of(data, 2 * inner)
    found = together(machine, x, weight, bias, rows, inputs, activation)
    close(found, opened(read_as(machine, x[:rows], inputs, weight.format) @ exact.t() + added(bias), activation))


@EXAMPLES
@given(MACHINES, COUNTS, st.integers(1, 40), st.integers(1, 30), ALLOWED, st.data())
def test_what_gates_of_few_bits_open_and_the_product_that_reads_it(
    machine: Machine, rows: int, outs: int, eighth: int, inputs: str, data: st.DataObject
) -> None:
    inner = 8 * eighth
    up, _ = weight_of(data, machine, 2 * inner)
    down, exact = weight_of(data, machine, outs, inner)
    x, biases = inputs_of(rows, up.shape[1]), (random(3, 2 * inner), random(4, outs))
    given_biases = biases if data.draw(st.booleans()) else None
    first, second = given_biases or (None, None)
    between = together(machine, x, up, first, rows, inputs, "silu")
    found = handed_on(machine, x, up, down, given_biases, inputs)
    # One number that lies between two bytes may be rounded either way.
    tie = float((between.abs().amax() if rows else torch.zeros(())) * exact.abs().max() / 127)
    wanted = read_as(machine, between, inputs, down.format) @ exact.t() + added(second)
    close(found, wanted, 4e-5 + (tie if inputs == "int8" else 0.0))


@EXAMPLES
@given(MACHINES, COUNTS, st.sampled_from([*STORES]), st.integers(0, 150), st.integers(1, 70), st.data())
def test_attention(machine: Machine, rows: int, kind: str, before: int, half: int, data: st.DataObject) -> None:
    """Any group of heads, any block, any window."""
    draw = lambda *values: data.draw(st.sampled_from(values))
    entries, each, kv_heads = max(rows + before, 1), draw(1, 2, 3, 7, 16), draw(1, 2, 3)
    stored = Stored(kind, entries, 2 * half, each=each, block=draw(1, 7, 16, 64), kv_heads=kv_heads)
    q, where = queries(rows, 2 * half, stored.heads), stored.where(rows)
    window, cap, bias = draw(0, 1, 5, 70), draw(0.0, 20.0), draw(None, random(6, entries))
    found = stored.attend_and_sum(machine, q, where, window, cap, bias)
    most, _ = closeness(machine, kind)
    for mine, wanted in zip(found, stored.wanted_and_sum(q, where, window, cap, bias), strict=True):
        close(mine, wanted, most)
