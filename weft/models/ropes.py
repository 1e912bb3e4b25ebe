"""Rope tables of a pass: cosine and sine of its rows' positions, for each rotary embedding of a model.

Legend.  T: rows.  F: rotated pairs.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from weft.models.spec import DecoderSpec, RopeSpec
from weft.ops import Ops
from weft.ops.ref.rope import frequencies

KEPT_POSITIONS = 4096
"""Whose tables are kept on a CPU, at most 4 MiB for each rope; those of later positions are computed in every pass."""


class Ropes:
    """The tables by rope, float32 [T, F] each.  What is kept was computed as the rest is: it is the same to the bit."""

    def __init__(self, spec: DecoderSpec, ops: Ops, device: torch.device) -> None:
        self._tables, self._device, self._positions = ops.rope_tables, device, spec.max_positions
        self._inverse = {layer.rope: frequencies(layer.rope).to(device) for layer in spec.layers if layer.rope}

    def __call__(self, positions_T: Tensor) -> dict[RopeSpec, tuple[Tensor, Tensor]]:
        if self._device.type == "cpu":
            positions = positions_T.numpy()
            most = int(positions.max())
            assert most < self._positions, "a position beyond the model's context"
            if most < KEPT_POSITIONS:
                return {
                    rope: (torch.from_numpy(cos.take(positions, 0)), torch.from_numpy(sin.take(positions, 0)))
                    for rope, (cos, sin) in self._first.items()
                }
        return self._computed(positions_T)

    @cached_property
    def addresses(self) -> dict[RopeSpec, tuple[int, int, int, int]]:
        """By rope, where the tables of the first positions lie, which live as long as this: of cosines, of sines; F; how many."""
        return {
            rope: (cos.ctypes.data, sin.ctypes.data, cos.shape[1], len(cos)) for rope, (cos, sin) in self._first.items()
        }

    @cached_property
    def _first(self) -> dict[RopeSpec, tuple[Any, Any]]:
        """Of the first positions, as arrays: behind a pass, which fills the caches, each operation of torch's is dear."""
        first = torch.arange(min(KEPT_POSITIONS, self._positions))
        return {rope: (c.numpy(), s.numpy()) for rope, (c, s) in self._computed(first).items()}

    def _computed(self, positions_T: Tensor) -> dict[RopeSpec, tuple[Tensor, Tensor]]:
        return {
            rope: self._tables(positions_T, inverse, rope.attention_factor) for rope, inverse in self._inverse.items()
        }
