"""Attention of rows that see some blocks of entries, by the kernels and by the reference operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models.harness import Rows
from tests.native.test_decoder import bench, prompt
from weft import native
from weft.models import decoder

TOKENS = 150


class Scattered:
    """Rows in units of `unit` positions; each sees, by the lot of its place, layer and head, two blocks of three."""

    def __init__(self, block: int, unit: int) -> None:
        self.block, self.unit = block, unit

    def plan(self, call: Any) -> Any:
        positions = call.batch.positions_T.numpy()
        return call.tiles(positions // self.unit)

    def run(self, call: Any, plan: Any) -> None:
        units, blocks = -(-int(call.batch.positions_T.max() + 1) // self.unit), -(-TOKENS // self.block)
        lots = torch.rand(TOKENS, call.kv_heads, blocks, generator=torch.Generator().manual_seed(call.layer))
        call.sparse(plan, lots[:units] < 2 / 3, self.block)


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Scattered:
    technique = Scattered(*request.param)
    monkeypatch.setattr(
        decoder, "by_technique", lambda batch: [(technique, np.arange(len(batch.bounds) - 1, dtype=np.int64))]
    )
    return technique


@pytest.mark.parametrize("scattered", [(32, 40), (7, 9), (50, 1)], indirect=True)
@pytest.mark.parametrize("isa", native.module().isas())
@pytest.mark.parametrize(("dtype", "most"), [("float32", 2e-5), ("bfloat16", 0.15)])
def test_sparse_logits_are_those_of_the_reference_whatever_stands_beside(
    scattered: Scattered, isa: str, dtype: str, most: float
) -> None:
    tokens = prompt(TOKENS)
    wanted = bench("ref", dtype=dtype).chunked("a", tokens, 64)
    got = bench("cpu", isa=isa, dtype=dtype).chunked("a", tokens, 64)
    assert (got - wanted).abs().max() < most
    for threads in (1, 2):
        other = bench("cpu", isa=isa, dtype=dtype, threads=threads)
        other.chunked("a", tokens[:90], 90)
        other.chunked("b", tokens[:64], 17)
        works = [Rows("b", tokens[64:80], 64), Rows("a", tokens[90:], 90)]
        assert torch.equal(other.run(works)[1], got[90:])


@pytest.mark.parametrize("scattered", [(16, 1000)], indirect=True)
def test_what_is_hidden_is_not_seen(scattered: Scattered, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(TOKENS)
    some = bench("cpu").chunked("a", tokens, 64)
    monkeypatch.undo()
    assert (bench("cpu").chunked("a", tokens, 64) - some).abs().max() > 1e-3
