"""Products and panels of every format, in every instruction set of this machine, beside float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.machine import HALVES, ISAS, MODULE, ROWS, Machine, empty, panels, product
from weft.errors import ConfigError, InvariantError
from weft.models.formats import WeightFormat
from weft.models.kernels import INPUTS
from weft.models.layout import PANEL
from weft.models.quantized import Quantized, assembled, quantize
from weft.ops.cpu.panels import FORMATS


def rounded(x: Tensor) -> Tensor:
    """What is left of inputs that are rounded to 8 bits, each row with its own scale."""
    scale = x.abs().amax(-1, keepdim=True).double() / 127
    return (x.double() / scale).round() * scale


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": rounded, "bfloat16": lambda x: x.bfloat16().double(), "float32": Tensor.double,
}  # fmt: skip
"""What products are of: inputs rounded as was allowed."""


def reading(machine: Machine, inputs: str, format: torch.dtype | str | WeightFormat) -> str:
    """Which of READ, for what this instruction set does with inputs of such weights that may be rounded so."""
    if format is torch.float32:
        return "float32"
    if inputs == "int8" and not isinstance(format, torch.dtype):
        return "int8"
    return "bfloat16" if inputs != "float32" and machine.program.isa in HALVES else "float32"


def read_as(machine: Machine, x: Tensor, inputs: str, format: torch.dtype | str | WeightFormat) -> Tensor:
    return READ[reading(machine, inputs, format)](x)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("outs", "width"), [(1, 2), (16, 64), (31, 130), (20, 640), (144, 1536), (150, 2050), (200, 2050)]
)
def test_a_product_is_right_and_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    machine: Machine, dtype: torch.dtype, outs: int, width: int, inputs: str
) -> None:
    generator = torch.Generator().manual_seed(outs)
    weight = (torch.randn(outs, width, generator=generator) * width**-0.5).to(dtype)
    x, bias = torch.randn(max(ROWS), width, generator=generator), torch.randn(outs, generator=generator)
    packed = panels(machine.program, weight)
    assert torch.equal(packed.unpacked(), weight)
    for given_bias in (bias, None):
        wanted = read_as(machine, x, inputs, dtype) @ weight.double().t() + (
            0 if given_bias is None else given_bias.double()
        )
        most = product(machine, x, packed, given_bias, max(ROWS), INPUTS[inputs])
        assert (most - wanted).abs().max() < 2e-5
        for rows in ROWS:
            assert torch.equal(product(machine, x, packed, given_bias, rows, INPUTS[inputs]), most[:rows])
            if rows:
                assert torch.equal(product(machine, x[-rows:], packed, given_bias, rows, INPUTS[inputs]), most[-rows:])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    weight, x = torch.randn(300, 700, generator=torch.Generator().manual_seed(1)), torch.randn(70, 700)
    for isa in ISAS:
        found = []
        for threads in (1, 2, 5):
            machine = Machine(MODULE.Program(threads, isa))
            packed = panels(machine.program, weight.to(dtype))
            found.append(product(machine, x, packed, None, 70, INPUTS["bfloat16"]))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_a_product_reads_no_row_but_its_own(machine: Machine) -> None:
    x = torch.full((5, 64), float("nan"))
    x[2] = 1.0
    packed = panels(machine.program, torch.ones(20, 64))
    assert (product(machine, x[2:], packed, None, 1) == 64.0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.data())
def test_panels_take_parts_at_any_output_and_in_any_format(outs: int, half: int, data: st.DataObject) -> None:
    program = MODULE.Program(2, data.draw(st.sampled_from(ISAS)))
    dtype = data.draw(st.sampled_from([*FORMATS]))
    whole = torch.randn(outs, 2 * half)
    cuts = sorted({0, outs, *data.draw(st.lists(st.integers(0, outs), max_size=4))})
    made = empty(program, outs, 2 * half, dtype)
    wanted = []
    for first, stop in pairwise(cuts):
        source = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        part = whole[first:stop].to(source)
        made.pack(part, first)
        wanted.append(part.to(torch.float32).to(dtype))
    assert torch.equal(made.unpacked(), torch.cat(wanted))
    if outs > PANEL:
        assert torch.equal(made.rows(PANEL).unpacked(), torch.cat(wanted)[PANEL:])


def test_numbers_that_are_odd_survive_packing() -> None:
    strange = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, 6e-8, 65504.0, 3.0e38]
    for source in (torch.float32, torch.float16, torch.bfloat16):
        part = torch.tensor([[*strange, 1.0]]).to(source)
        for dtype in FORMATS:
            got = panels(MODULE.Program(1, "portable"), part, dtype).unpacked()
            assert torch.equal(got.nan_to_num(1.5), part.float().to(dtype).nan_to_num(1.5))
            assert torch.equal(got.isnan(), part.isnan())


def test_embedding_is_the_weights_row(machine: Machine) -> None:
    for dtype in FORMATS:
        table = torch.randn(75, 34).to(dtype)
        packed = panels(machine.program, table)
        tokens = torch.tensor([74, 0, 31, -1, 16])
        out = torch.zeros(5, 40)
        index = machine.program.embed(packed.weight, 2.5, out.data_ptr(), out.stride(0))
        machine.run(index, 5, tokens=tokens)
        assert torch.equal(out[:, :34], table.float()[tokens.clamp_min(0)] * 2.5)
        assert (out[:, 34:] == 0).all()


# ---------------------------------------------------------------------------------------------- few bits

FEW = (
    "int8", "int8:32", "int8:128", "int8:16:zero", "int8:0:zero", "int4", "int4:16", "int4:128", "int4:32:float",
    "int4:128:float", "int4:32:zero", "int4:128:zero", "int4:0", "int4:16:zero",
)  # fmt: skip


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_format(values: Tensor, text: torch.dtype | str) -> Tensor | Quantized:
    return values.to(text) if isinstance(text, torch.dtype) else quantize(values, WeightFormat.parse(text))


@cache
def weights(
    seed: int, outs: int, width: int, text: torch.dtype | str, size: float = 1.0
) -> tuple[Tensor | Quantized, Tensor]:
    """Random ones in a format, and what they are as floats: the same for every instruction set and kind of inputs."""
    made = in_format(random(seed, outs, width) * size * width**-0.5, text)
    return made, made if isinstance(made, Tensor) else made.dequantized()


INPUT_SEED, BIAS_SEED = 1, 2


@cache
def wanted_of(
    seed: int, outs: int, width: int, text: torch.dtype | str, size: float, how: str, biased: bool = True
) -> Tensor:
    """Products of such weights in float64, with max(ROWS) random inputs, read as READ[how] has it, and a random bias."""
    exact = weights(seed, outs, width, text, size)[1]
    products = READ[how](random(INPUT_SEED, max(ROWS), width)) @ exact.double().t()
    return products + random(BIAS_SEED, outs).double() if biased else products


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("text", FEW)
@pytest.mark.parametrize(("outs", "width"), [(1, 128), (31, 256), (20, 1024), (144, 4224), (70, 2048)])
def test_a_product_of_few_bits_is_right_whatever_stands_beside_its_row(
    machine: Machine, text: str, outs: int, width: int, inputs: str
) -> None:
    weight, exact = weights(outs, outs, width, text)
    x, bias = random(INPUT_SEED, max(ROWS), width), random(BIAS_SEED, outs)
    packed = panels(machine.program, weight)
    assert torch.equal(packed.unpacked(), exact)
    wanted = wanted_of(outs, outs, width, text, 1.0, reading(machine, inputs, text))
    most = product(machine, x, packed, bias, max(ROWS), INPUTS[inputs])
    # An input that lies between two whole numbers may be rounded either way by float32 arithmetic.
    assert (most - wanted).abs().max() < (2e-3 if inputs == "int8" else 4e-5)
    assert (most - wanted).abs().mean() < (1e-5 if inputs == "int8" else 4e-6)
    for rows in ROWS:
        assert torch.equal(product(machine, x, packed, bias, rows, INPUTS[inputs]), most[:rows])
        if rows:
            assert torch.equal(product(machine, x[-rows:], packed, bias, rows, INPUTS[inputs]), most[-rows:])


@pytest.mark.parametrize("text", [*FORMATS, *FEW], ids=str)
def test_the_smallest_numbers_do_not_tell_rows_apart(machine: Machine, text: torch.dtype | str) -> None:
    """Matrix registers take what is subnormal for 0, and so must vectors that stand in for them where rows are few."""
    x = random(4, max(ROWS), 512) * 10.0 ** -torch.linspace(36, 41, 512)
    packed = panels(machine.program, in_format(random(3, 48, 512), text))
    most = product(machine, x, packed, None, max(ROWS), INPUTS["bfloat16"])
    assert (most.abs() > 0).any(), "all of it counts as nothing"
    for rows in ROWS:
        assert torch.equal(product(machine, x, packed, None, rows, INPUTS["bfloat16"]), most[:rows])


def test_instruction_sets_agree_about_whole_numbers() -> None:
    """Sums of bytes are exact, so that only the last steps of each group may differ, of nested scales those of a row: none."""
    for text in ("int4:32:float", "int4", "int4:128"):
        weight, x = quantize(random(3, 64, 512), WeightFormat.parse(text)), random(4, 20, 512)
        found = []
        for isa in ISAS:
            machine = Machine(MODULE.Program(2, isa))
            found.append(product(machine, x, panels(machine.program, weight), None, 20, INPUTS["int8"]))
        if weight.format.nested:
            assert all(torch.equal(one, found[0]) for one in found)
        else:
            assert all(torch.allclose(one, found[0], rtol=1e-5, atol=1e-5) for one in found)


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_largest_values_do_not_overflow(machine: Machine, inputs: str) -> None:
    for text, step, value in (
        ("int8", 1.0, 255), ("int8:128:zero", 1.0, 255),
        ("int4", 15.0, 15), ("int4", 15.0, 0), ("int4", -15.0, 0), ("int4:128", -15.0, 0),
    ):  # fmt: skip
        format = WeightFormat.parse(text)
        top = torch.full((16, 8192), value, dtype=torch.uint8)
        scales = torch.full((16, format.groups(8192)), step)
        weight = assembled(top, scales, None if format.symmetric else torch.zeros_like(scales), format)
        packed = panels(machine.program, weight)
        for sign, rows in ((1.0, 3), (-1.0, 3), (-1.0, 20)):
            x = torch.full((rows, 8192), sign)
            found = product(machine, x, packed, None, rows, INPUTS[inputs])
            assert torch.allclose(found, x @ weight.dequantized().t(), rtol=1e-5)


def test_a_long_prompt_has_the_bits_of_its_rows_alone(machine: Machine) -> None:
    """Rows in several blocks, inputs in several stretches and blocks, tiles of rows that are not alike, and panels left over."""
    x = random(8, 450, 4864)
    formats: list[torch.dtype | WeightFormat] = [WeightFormat.parse(text) for text in ("int8", "int4", "int4:128:zero")]
    for format in (torch.bfloat16, *formats):
        packed = panels(machine.program, random(9, 70, 4864) * 0.01, format)
        for inputs in ("bfloat16", "int8"):
            most = product(machine, x, packed, None, 450, INPUTS[inputs])
            for first, rows in ((0, 1), (191, 2), (200, 30), (449, 1)):
                found = product(machine, x[first:], packed, None, rows, INPUTS[inputs])
                assert torch.equal(found, most[first : first + rows])


@pytest.mark.parametrize("outs", [70, 96])
def test_a_block_of_one_row_has_the_bits_of_the_row_alone(machine: Machine, outs: int) -> None:
    """Inputs so many that blocks have 60 rows: the sixth has one, with four panels in its tiles."""
    x, packed = (
        random(10, 301, 10240),
        panels(machine.program, random(11, outs, 10240) * 0.01, WeightFormat.parse("int4")),
    )
    most = product(machine, x, packed, None, 301, INPUTS["int8"])
    for first, rows in ((0, 17), (239, 2), (300, 1)):
        found = product(machine, x[first:], packed, None, rows, INPUTS["int8"])
        assert torch.equal(found, most[first : first + rows])


def test_strange_inputs_show_in_their_own_row_alone(machine: Machine) -> None:
    packed = panels(machine.program, quantize(random(5, 20, 64), WeightFormat.parse("int8")))
    x = random(6, 5, 64)
    clean = product(machine, x, packed, None, 5, INPUTS["int8"])
    x[1, 3], x[2, 60], x[3] = float("nan"), float("inf"), 0.0
    found = product(machine, x, packed, None, 5, INPUTS["int8"])
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()
    assert (found[3] == 0).all()
    assert torch.equal(found[[0, 4]], clean[[0, 4]])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_panels_of_few_bits_take_parts_of_other_formats_exactly(data: st.DataObject) -> None:
    """Parts with fewer bits or larger groups keep their values: fused weights need not be alike in the checkpoint."""
    program = MODULE.Program(2, data.draw(st.sampled_from(ISAS)))
    formats = [WeightFormat.parse(data.draw(st.sampled_from(FEW))) for _ in range(data.draw(st.integers(1, 3)))]
    own = formats[0]
    for format in formats[1:]:
        own = own.widest(format)
    outs = [data.draw(st.integers(1, 40)) for _ in formats]
    made, first, wanted = empty(program, sum(outs), 128, own), 0, []
    for format, count in zip(formats, outs, strict=True):
        part: Quantized = quantize(random(count, count, 128), format)
        made.pack(part, first)
        wanted.append(part.dequantized())
        first += count
    assert torch.allclose(made.unpacked(), torch.cat(wanted), rtol=1e-3, atol=1e-3)
    if len({str(format) for format in formats}) == 1:
        assert torch.equal(made.unpacked(), torch.cat(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", FEW)
def test_floats_are_rounded_as_the_reference_rounds_them(machine: Machine, text: str, dtype: torch.dtype) -> None:
    """To the bit: groups of zeros, ties of the largest magnitude and of the nearest value, and outputs that fill no panel too."""
    format = WeightFormat.parse(text)
    source = random(7, 37, 256) * torch.logspace(-3, 2, 37)[:, None]
    source[3] = 0.0
    source[5, ::2], source[5, 1::2] = 2.0, -2.0
    source[6, ::2], source[6, 1::2] = -2.0, 2.0
    source[7] = torch.arange(256) / 2 - 60
    source[8] = source[8].abs()
    source = source.to(dtype)
    wanted, made = empty(machine.program, 40, 256, format), empty(machine.program, 40, 256, format)
    wanted.pack(quantize(source, format), 2)
    made.pack(source, 2)
    assert torch.equal(made.memory, wanted.memory)
    source[9, 200] = float("inf")
    with pytest.raises(ConfigError, match="too large or not finite"):
        made.pack(source, 2)


def test_panels_refuse_what_they_cannot_hold() -> None:
    program = MODULE.Program(1)
    for own, other, held in (
        ("int8", "int8", True), ("int8:32", "int8", True), ("int8", "int8:32", False), ("int8:32:zero", "int4", True),
        ("int8", "int4", False), ("int4", "int8", False), ("int4:32:zero", "int4:16", False), ("int4", "int4:32:zero", False),
        ("int4", "int4:64", True), ("int4:32:float", "int4", True), ("int4", "int4:32:float", False),
    ):  # fmt: skip
        assert empty(program, 16, 64, WeightFormat.parse(own)).holds(WeightFormat.parse(other)) is held, (own, other)
    assert empty(program, 16, 64, torch.bfloat16).holds(WeightFormat.parse("int4"))
    with pytest.raises(InvariantError, match="do not fit"):
        empty(program, 16, 64, WeightFormat.parse("int8")).pack(
            quantize(random(1, 16, 64), WeightFormat.parse("int8:32"))
        )
    with pytest.raises(InvariantError, match="do not fit"):
        empty(program, 16, 64, WeightFormat.parse("int4")).pack(quantize(random(1, 16, 64), WeightFormat.parse("int8")))
    with pytest.raises(InvariantError, match="do not fit"):
        empty(program, 16, 64, WeightFormat.parse("int8")).pack(quantize(random(1, 16, 64), WeightFormat.parse("int4")))
    with pytest.raises(ConfigError, match="too large or not finite"):
        empty(program, 16, 64, WeightFormat.parse("int8")).pack(torch.full((16, 64), float("nan")))
    for bad in (
        (0, 16, 63, 3, 32, False),
        (0, 16, 64, 3, 48, False),
        (0, 16, 96, 3, 24, False),
        (0, 16, 512, 2, 256, False),
        (0, 16, 512, 3, 256, False, True),
        (0, 16, 64, 2, 0, False),
        (0, 16, 64, 1, 32, False),
        (0, 16, 64, 2, 32, False, True),
        (0, 16, 64, 3, 64, False, True),
        (0, 16, 64, 3, 32, True, True),
        (0, 16, 64, 3, 8, False, True),
    ):
        with pytest.raises(ValueError, match="inputs"):
            MODULE.Weight(*bad)
