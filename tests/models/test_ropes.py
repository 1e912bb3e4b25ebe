"""Rope tables of a pass: kept or computed anew, they are the angles of the rows' positions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from weft.hub import resolve
from weft.models import load_spec
from weft.models.ropes import KEPT_POSITIONS, Ropes
from weft.models.spec import DecoderSpec
from weft.ops import choose


@pytest.fixture(scope="module")
def spec() -> DecoderSpec:
    return dataclasses.replace(load_spec(resolve(None)), max_positions=2 * KEPT_POSITIONS)


@pytest.mark.parametrize(
    "positions",
    [[0], [7, 8, 9], [KEPT_POSITIONS - 1, 3], [KEPT_POSITIONS], [5, KEPT_POSITIONS + 1]],
    ids=["first", "some", "last kept", "first beyond", "both"],
)
def test_cosine_and_sine_of_every_position(spec: DecoderSpec, positions: list[int]) -> None:
    """Beside the formula in float64, and to the bit what a position gets in other company."""
    ropes, rope = Ropes(spec, choose("ref"), torch.device("cpu")), spec.layers[0].rope
    assert rope is not None
    for _ in range(2):  # made, and then kept
        ((cos, sin),) = ropes(torch.tensor(positions)).values()
        for at, c, s in zip(positions, cos.tolist(), sin.tolist(), strict=True):
            angles = [at / rope.theta ** (2 * i / rope.dim) for i in range(rope.dim // 2)]
            off = 1e-6 + 2.0**-23 * at  # the product of a position and a frequency is rounded to float32
            assert c == pytest.approx([math.cos(a) for a in angles], abs=off)
            assert s == pytest.approx([math.sin(a) for a in angles], abs=off)
    ((alone, _),) = ropes(torch.tensor(positions[-1:])).values()
    ((beside, _),) = ropes(torch.tensor([*positions, 2 * KEPT_POSITIONS - 1])).values()
    assert torch.equal(alone[0], beside[len(positions) - 1])


def test_no_position_beyond_the_model(spec: DecoderSpec) -> None:
    with pytest.raises(AssertionError, match="beyond the model's context"):
        Ropes(spec, choose("ref"), torch.device("cpu"))(torch.tensor([1, 2 * KEPT_POSITIONS]))
