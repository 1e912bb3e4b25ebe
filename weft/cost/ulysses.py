"""Ulysses: positions are split among ranks, but in attention heads are, with an exchange of all with all before and after it.

Paper    Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509                                        (003-69)
Rule     each rank has 1/P of the rows; queries, keys and values of these go out, and results come back: (P - 1) / P of (2 Q +
         KV) / P bytes from each rank, in two exchanges a layer, which nothing hides
Shapes   Q, KV: bytes of the queries, and of the new keys and values, of all rows over all layers
Units    ranks: devices
Cost     each rank reads all weights
Pays     for long prompts over fast links: bytes for each rank stay the same where positions and ranks grow together
Differs  P is taken to divide the heads of keys; no copies of these are made where it does not
Raises   ValueError for a share outside (0, 1] or ranks < 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import OverRanks, Split
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Link, Load
from weft.traits import Traits


@register("cost", "ulysses")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ulysses(OverRanks):
    """Heads in attention, positions everywhere else."""

    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "2.5 times the speed of splits of a sequence before it, in training", "ttft_s.mean", 0.4, "less",
        against="contextparallel", case="long",
    )  # fmt: skip

    def told_s(self, found: Split, load: Load, model: Figures, link: Link) -> float:
        n, entry_bytes = self.ranks, sum(k.entry_bytes for k in model.kinds)
        sent = (n - 1) / n * (2 * found.queries + load.whole_rows * entry_bytes) / n
        return sent / link.bytes_s + 2 * model.layers * link.latency_s
