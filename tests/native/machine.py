"""What the tests of kernels share: every instruction set of this machine, with one and with three threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft import native
from weft.models.formats import WeightFormat
from weft.models.layout import PANEL, panel_bytes
from weft.models.quantized import Quantized
from weft.ops.cpu.panels import Panels

MODULE: Any = native.module()
ISAS: list[str] = MODULE.isas() if MODULE is not None else []
ROWS = (0, 1, 2, 3, 5, 8, 12, 13, 17, 31, 64, 200)
HALVES = ("amx", "avx512_bf16")
"""Instruction sets that multiply bfloat16."""


@dataclass
class Machine:
    """A program, and a step of so many rows to run it on."""

    program: Any

    def run(self, index: int, rows: int, *, wanted: int = 0, tokens: Tensor | None = None, angles: Any = None) -> None:
        step = MODULE.Step()
        step.rows(rows, 0 if tokens is None else tokens.data_ptr(), wanted, 0, 0, 0, 0, 0)
        if angles is not None:
            step.angles(0, *(table.data_ptr() for table in angles))
        self.program.run(index, index + 1, step)


def empty(program: Any, outs: int, width: int, format: torch.dtype | WeightFormat) -> Panels:
    size = panel_bytes(width, format if isinstance(format, WeightFormat) else format.itemsize)
    memory = torch.zeros(-(-outs // PANEL) * size, dtype=torch.uint8)
    return Panels(memory, (outs, width), format, program, MODULE)


def panels(program: Any, weight: Tensor | Quantized, format: torch.dtype | WeightFormat | None = None) -> Panels:
    outs, width = weight.shape
    made = empty(program, outs, width, format or (weight.dtype if isinstance(weight, Tensor) else weight.format))
    made.pack(weight)
    return made


def product(machine: Machine, x: Tensor, weight: Panels, bias: Tensor | None, rows: int, inputs: int = 0) -> Tensor:
    """Rows beyond `rows` must stay as they are."""
    out = torch.full((x.shape[0] + 1, weight.shape[0]), 7.0)
    index = machine.program.linear(
        weight.weight, x.data_ptr(), x.stride(0), 0 if bias is None else bias.data_ptr(), out.data_ptr(), out.stride(0),
        False, inputs,
    )  # fmt: skip
    machine.run(index, rows)
    assert (out[rows:] == 7.0).all()
    return out[:rows]
