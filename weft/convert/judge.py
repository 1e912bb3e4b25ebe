"""What rounding does to a model's laws: divergence from the model as it was, along a text.

Legend.  kl: Kullback-Leibler divergence of the rounded model's law from the other's, nats per token, temperature 1.
top1: share of positions where both have the same likeliest token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.convert.awq import Changes
from weft.convert.passes import Along
from weft.models.checkpoints.stored import catalogue
from weft.models.families import families
from weft.models.formats import WeightFormat
from weft.models.layout import Part, quantized
from weft.models.weights import _place


class Judged:
    """A model whose weights are put in place rounded, again and again, out of what it was."""

    def __init__(self, folder: Path, along: Along) -> None:
        self.along = along
        spec, stored = along.decoder.spec, catalogue(folder)
        self.parts: list[Part] = list(families()[spec.family].parts(spec))
        self.norm_dtypes: Mapping[str, torch.dtype] = {
            part.target: stored[part.name].dtype for part in self.parts if len(part.shape) == 1
        }
        self._before = {name: tensor.clone() for name, tensor in along.decoder.tensors.items()}

    def put(self, form: WeightFormat | None, changes: Changes | None = None) -> None:
        """Weights changed by AWQ, then rounded; None leaves out the one or the other."""
        few, changes = quantized(self.along.decoder.spec, form), changes or Changes()
        for part in self.parts:
            rows = _place(self._before[part.target], part)
            if form is not None and part.target in few:
                rows = changes.rounded(part, rows, form).dequantized()
            else:
                rows = changes.applied(part, rows)
            _place(self.along.decoder.tensors[part.target], part).copy_(rows)

    def compare(self, laws: Sequence[Tensor], found: Sequence[list[int]]) -> dict[str, Any]:
        """As the function, of the model as it is now."""
        return compare(self.along, laws, found)


def compare(along: Along, laws: Sequence[Tensor], found: Sequence[list[int]]) -> dict[str, Any]:
    """kl and top1 along windows, given the other model's laws there."""
    kl, same, count = 0.0, 0, 0
    with torch.inference_mode():
        for window, p in zip(found, laws, strict=True):
            q = law(along, window)
            kl += float((p.double().exp() * (p.double() - q.double())).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(window)
    return {"kl": kl / count, "top1": same / count, "tokens": count}


def law(along: Along, window: list[int]) -> Tensor:
    """Log-probabilities [tokens, vocab], float32."""
    with torch.inference_mode():
        return torch.log_softmax(along.logits(window).float(), -1)
