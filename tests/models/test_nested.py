"""Scales that are whole multiples of one for each row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.exec.build import EngineConfig, build, prepare
from weft.models.checkpoints.scheme import NESTED, SCALES, scheme
from weft.models.formats import WeightFormat
from weft.models.quantized import assembled, multiples, nested, quantize

PACKED = Path(__file__).parent / "packed"


@pytest.mark.parametrize(
    ("text", "said", "is_nested"),
    [
        ("int4", "int4", True), ("int4:32", "int4", True), ("int4:128", "int4:128", True), ("int4:0", "int4:0", False),
        ("int4:32:float", "int4:32:float", False), ("int4:64:zero", "int4:64:zero", False), ("int8:32", "int8:32", False),
    ],
)  # fmt: skip
def test_what_a_format_is_called(text: str, said: str, is_nested: bool) -> None:
    form = WeightFormat.parse(text)
    assert (str(form), form.nested) == (said, is_nested)
    assert WeightFormat.parse(said) == form


def test_the_smallest_format_for_both_is_nested_where_both_are() -> None:
    one, coarse, free = map(WeightFormat.parse, ("int4", "int4:128", "int4:64:float"))
    assert one.widest(coarse) == one
    assert one.widest(free) == free.widest(one) == WeightFormat.parse("int4:32:float")


def test_worked_by_hand() -> None:
    """The largest over 15 is the row's scale; the others become its nearest multiple, 1 at least, with their sign."""
    given = torch.tensor([[30.0, 14.8, 0.4, -7.2, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]).half()
    assert nested(given).tolist() == [[30.0, 14.0, 2.0, -8.0, 0.0], [0.0] * 5]
    times, base = multiples(nested(given)) or (None, None)
    assert times is not None
    assert base is not None
    assert times.tolist() == [[15, 7, 1, -4, 0], [0] * 5]
    assert base.flatten().tolist() == [2.0, 0.0]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.floats(-12, 6), st.integers(1, 40))
def test_every_row_has_a_scale_that_the_others_are_multiples_of(seed: int, power: float, groups: int) -> None:
    """Of all sizes that a weight's rows can have beside each other; again it is the same; in units twice as large, too."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(8, groups, generator=generator) * 2.0**power
    scales[0] = scales.abs().max() * 128
    stored = assembled(torch.empty(0, 0), scales, None, WeightFormat.parse("int4:32:float")).scales
    found = nested(stored)
    told = multiples(found)
    assert told is not None
    times, base = told
    assert times.abs().max() <= 15
    assert torch.equal(found, nested(found))
    assert multiples(found / 2) is not None
    large = base.flatten() >= 2.0**-16  # smaller ones end before their digits do
    assert (base.flatten()[large] * 15 <= stored.float().abs().amax(-1)[large] * (1 + 2.0**-6)).all()
    apart = (found.float().abs() - stored.float().abs()).abs()
    near = apart <= torch.maximum(base * 0.5, found.float().abs() / 32) + 2.0**-24
    assert (near | (times.abs() == 1))[large & (base > 0).flatten()].all()


def test_a_weight_loses_little_by_it() -> None:
    weight = torch.randn(256, 896, generator=torch.Generator().manual_seed(1))
    lost = {}
    for text in ("int4", "int4:32:float"):
        lost[text] = float((quantize(weight, WeightFormat.parse(text)).dequantized() - weight).square().mean())
    assert lost["int4:32:float"] < lost["int4"] < 1.04 * lost["int4:32:float"]


def test_a_config_that_says_so_of_other_weights_is_refused(tmp_path: Path) -> None:
    config = json.loads((PACKED / "packed-8" / "config.json").read_text(encoding="utf8"))
    with pytest.raises(ConfigError, match="weft_scales is nested, which goes with symmetric weights of 4 bits alone"):
        scheme({**config, SCALES: NESTED})
    folder = tmp_path / "model"
    shutil.copytree(PACKED / "packed", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    (folder / "config.json").write_text(json.dumps({**config, SCALES: NESTED}), encoding="utf8")
    with pytest.raises(ConfigError, match="not whole multiples of one for each row"):
        build(prepare(EngineConfig(model=folder, ops="cpu")))
