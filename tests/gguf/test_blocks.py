"""Blocks of every type: values bit for bit those of the `gguf` package, and integers that keep them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gguf.kquants import rounded
from weft.errors import ConfigError
from weft.models.gguf.blocks import BY_NAME, EXACT, PLAIN, READERS, dequantized, quantized, unpaired, windows
from weft.models.gguf.header import TYPES

gguf = pytest.importorskip("gguf")

ROWS, WIDTH = 6, 768
FACTORS = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
"""Bytes at which blocks have float16 factors."""
FORMATS = {
    "Q8_0": (8, 32, True), "Q4_0": (4, 32, True), "Q4_1": (4, 32, False), "Q5_0": (8, 32, True), "Q5_1": (8, 32, False),
    "Q4_K": (4, 32, False), "Q5_K": (8, 32, False), "Q6_K": (8, 16, True),
}  # fmt: skip


def bytes_of(kind: str, seed: int) -> np.ndarray:
    """Random bytes [ROWS, bytes of a row] in which every bit may be set, and factors of any ordinary or subnormal size."""
    rng = np.random.default_rng(seed)
    size = BY_NAME[kind]
    raw = rng.integers(0, 256, (ROWS * WIDTH // size.values, size.bytes), dtype=np.uint8)
    for at in FACTORS.get(kind, []):
        factors = (rng.normal(size=len(raw)) * 10.0 ** rng.integers(-6, 2, len(raw))).astype(np.float16)
        raw[:, at : at + 2] = factors.view(np.uint8).reshape(-1, 2)
    return raw.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", [*PLAIN, *READERS])
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    for seed in range(4):
        if kind in PLAIN:
            values = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(np.float32)
            raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        else:
            raw = bytes_of(kind, seed)
        want = gguf.quants.dequantize(
            raw.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)), gguf.GGMLQuantizationType[kind]
        )
        ours = dequantized(torch.from_numpy(raw.copy()), kind, (ROWS, WIDTH)).float().numpy()
        assert np.array_equal(ours.view(np.uint32), want.astype(np.float32).view(np.uint32)), kind


@pytest.mark.parametrize("kind", READERS)
def test_integers_keep_the_values(kind: str) -> None:
    for seed in range(4):
        raw = torch.from_numpy(bytes_of(kind, seed))
        exact = dequantized(raw, kind, (ROWS, WIDTH))
        ours = quantized(raw, kind, (ROWS, WIDTH))
        assert (ours.format.bits, ours.format.group, ours.format.symmetric) == FORMATS[kind]
        assert int(ours.values.max()) < ours.format.levels
        got = ours.dequantized()
        if kind in EXACT:
            assert torch.equal(got, exact)
            continue
        # Scale and offset are rounded to float16, each by at most 2^-11 of itself, or half of the smallest float16.
        group = (ROWS, -1, ours.format.group)
        least = ours.unit * 2.0**-25
        high = ours.format.levels if ours.offsets is not None else ours.format.levels // 2
        scale = ours.scales.float().abs() * ours.unit
        offset = 0.0 if ours.offsets is None else ours.offsets.float().abs() * ours.unit
        bound = (scale * high + offset) * 2.0**-11 * 1.01 + least * (high + 1)
        assert ((got - exact).view(group).abs() <= bound.unsqueeze(-1)).all()
        assert (got - exact).abs().max() > 0, "the bound is not tried"


@pytest.mark.parametrize(("kind", "near"), [("Q4_K", 0.09), ("Q5_K", 0.045), ("Q6_K", 0.03)])
def test_numbers_that_were_rounded_come_back(kind: str, near: float) -> None:
    """Not only random bytes: ordinary weights, so that a value that landed in a wrong place would show."""
    values = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
    raw = torch.from_numpy(rounded(values, kind))
    found = dequantized(raw, kind, (ROWS, WIDTH)).numpy()
    assert np.sqrt(np.mean((found - values) ** 2)) < near


def test_subnormal_and_negative_factors() -> None:
    raw = torch.zeros(1, 34, dtype=torch.uint8)
    raw[0, :2] = torch.tensor([1, 128], dtype=torch.uint8)  # -2^-24
    raw[0, 2:] = torch.arange(32)
    want = torch.arange(32).float() * -(2.0**-24)
    assert torch.equal(dequantized(raw, "Q8_0", (1, 32))[0], want)
    assert torch.equal(quantized(raw, "Q8_0", (1, 32)).dequantized()[0], want)


def test_other_types_are_refused_by_name() -> None:
    for kind in BY_NAME.keys() - READERS.keys() - PLAIN.keys():
        with pytest.raises(ConfigError, match=f"{kind} are not read"):
            dequantized(torch.zeros(0, dtype=torch.uint8), kind, (0,))
    with pytest.raises(ConfigError, match="F16 are not read"):
        quantized(torch.zeros(64, dtype=torch.uint8), "F16", (1, 32))


def test_sizes_are_those_of_the_gguf_package() -> None:
    for code, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(code)
        assert (theirs.name, gguf.GGML_QUANT_SIZES[theirs]) == (kind.name, (kind.values, kind.bytes))


def test_rows_in_pairs() -> None:
    """The converter's permutation, as it stands in the format's documents: reshape(heads, 2, d / 2), swap the last two."""
    heads, dim = 3, 8
    rows = torch.arange(heads * dim).view(-1, 1).expand(-1, 2)
    stored = rows.reshape(heads, 2, dim // 2, 2).transpose(1, 2).reshape(rows.shape)
    assert stored[:4, 0].tolist() == [0, 4, 1, 5]
    assert torch.equal(unpaired(stored, dim), rows)


def test_windows_cover_the_rows() -> None:
    assert list(windows((10, 4), 12, 1)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(windows((12, 4), 12, 4)) == [(0, 4), (4, 8), (8, 12)]
    assert list(windows((2, 100), 12, 1)) == [(0, 1), (1, 2)]
