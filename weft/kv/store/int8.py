"""int8: each key and each value of a kv head is stored in 8 bits a number, with one scale of its own.

Paper    Yao et al., ZeroQuant, arXiv:2206.01861, section 4.1 (token-wise, symmetric), for the KV of one head
Rule     scale = max|x| / 127;  stored q = round(x / scale), halves to even;  read back x' = q * scale, so |x' - x| <= scale / 2
Shapes   encode [N, D] of the model's dtype to uint8 [N, D + 4]: D int8, then the scale as float32; decode gives float32 [N, D]
Units    rows_encoded: rows; a row is one entry's key or value of one kv head
Cost     D + 4 bytes a row for 2 D (bfloat16) or 4 D (float32); a pass over the rows written, and one over those read
Pays     in memory, of which the cache takes 0.27 (float32) or 0.53 (bfloat16): the bundled model recalls what it recalls
         without, and in 199 places of 200 the same token is likeliest.  No time is gained on plain operations
Differs  a scale for each kv head of a token, where the paper has one for the token; keys are stored after rope; no clipping.
         A row with a number that is not finite comes back as not-a-number throughout, so the fault is seen and not hidden;
         a row of zeros comes back as zeros
Bound    mean KL of the next token's law, on prose that the bundled model has not read: at most 1e-4 nat (2.8e-5 measured)
Raises   nothing
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from weft.registry import register
from weft.traits import Effect, Fidelity, Traits

if TYPE_CHECKING:
    from torch import Tensor

MOST = 127
"""The largest stored magnitude; -128 is not used, so that a row and its negative are stored alike."""
SCALE_BYTES = 4


@register("kv.store", "int8")
@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """A row is quantized by itself: what is stored does not depend on the batch, on chunks or on the cache."""

    acts: dict[str, int] = field(default_factory=lambda: {"rows_encoded": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = False
    kernels: ClassVar[str] = "int8"
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, effects=frozenset({Effect.REWRITES_KV}), bound=1e-4)

    def row_bytes(self, head_dim: int) -> int:
        return head_dim + SCALE_BYTES

    def encode(self, rows: Tensor) -> Tensor:
        import torch

        x = rows.float()
        scale = x.abs().amax(-1, keepdim=True) / MOST
        # A row of zeros divides 0 by 0 and is stored as zeros.  What is not finite makes the scale so, and the scale makes the
        # whole row so when it is read; the numbers beside it only have to be some.
        q = (x / scale).nan_to_num(0.0, MOST, -MOST).round_().clamp_(-MOST, MOST).to(torch.int8)
        self.encoded(len(rows))
        return torch.cat([q.view(torch.uint8), scale.view(torch.uint8)], 1)

    def encoded(self, rows: int) -> None:
        self.acts["rows_encoded"] += rows

    def decode(self, rows: Tensor) -> Tensor:
        import torch

        # A copy even of a single row, whose slice would be contiguous but not aligned.
        scale = rows[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return rows[:, :-SCALE_BYTES].view(torch.int8).float().mul_(scale)
