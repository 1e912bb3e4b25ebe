"""Random: keep a window of the newest tokens and older ones by lot.  What H2O's choice is measured beside.

Paper    none; the usual control of Zhang et al., H2O, arXiv:2306.14048
Rule     at each multiple of `every` above chosen + recent: of the entries before the newest `recent` keep `chosen`, all sets of
         as many being equally likely; the lot is a function of seed and position alone
Shapes   indices [chosen + recent] int64, the same for all layers and heads
Units    chosen, recent, every: tokens
Cost     O(chosen + recent) entries moved at a cut; no state, no extra pass.  At most chosen + recent + every entries at any
         moment
Pays     as a control: where a technique that chooses is no nearer the whole cache than this, its choice is worth nothing
Differs  nothing to differ from
Bound    on novels that the bundled model has not read, tokens 128 to 1024, chosen=64, recent=64, every=32: at most 1.06 of the
         full cache's perplexity (1.02 measured), over that whole stretch; over its last tokens alone, when most has been
         dropped, it is larger.  A null that the others are shown beside, not for use
Raises   ValueError unless chosen >= 0, recent >= 1, every >= 1 and seed >= 0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.kv.compress._common import most, next_cut
from weft.registry import register
from weft.slots import Kept
from weft.traits import Effect, Fidelity, Traits


@register("kv.compress", "random")
@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """The null of techniques that choose among older tokens."""

    chosen: int = 512
    recent: int = 512
    every: int = 128
    seed: int = 0
    acts: dict[str, int] = field(default_factory=lambda: {"cuts": 0, "entries_dropped": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"chosen": 32, "recent": 32, "every": 16}
    wide_trial: ClassVar[dict[str, object]] = {"chosen": 64, "recent": 64, "every": 32}
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, bound=0.037, effects=frozenset({Effect.DROPS_TOKENS}))

    def __post_init__(self) -> None:
        if self.chosen < 0 or self.recent < 1 or self.every < 1 or self.seed < 0:
            raise ValueError(
                f"chosen >= 0, recent >= 1, every >= 1 and seed >= 0 are needed, got {self.chosen}, {self.recent}, {self.every}, "
                f"{self.seed}"
            )

    def budget(self, prompt: int, limit: int) -> int:
        return most(self.chosen + self.recent, self.every, limit)

    def cuts(self, prompt: int, position: int) -> int | None:
        return next_cut(position, self.chosen + self.recent, self.every)

    def keep(self, view: Any) -> Kept:
        import torch

        older = view.entries - self.recent
        lot = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + view.length) % 2**63)
        drawn = torch.randperm(older, generator=lot)[: self.chosen].sort().values
        self.acts["cuts"] += 1
        self.acts["entries_dropped"] += older - self.chosen
        return Kept(torch.cat((drawn, torch.arange(older, view.entries))))
