"""Recent: keep a window of the newest tokens and nothing else.  What the other techniques are measured beside.

Paper    Beltagy et al., Longformer, arXiv:2004.05150, as applied to a trained model by Xiao et al., arXiv:2309.17453 ("window
         attention")
Rule     at each multiple of `every` above window: keep entry j of n  iff  j >= n - window
Shapes   indices [window] int64, the same for all layers and heads
Units    window, every: tokens
Cost     O(window) entries moved at a cut; no state, no extra pass.  At most window + every entries at any moment
Pays     as a control: where a technique that chooses is no nearer the whole cache than this, its choice is worth nothing
Differs  `every` tokens are dropped at once, not one at each step
Bound    on novels that the bundled model has not read, tokens 128 to 1024, window=128, every=32: at most 1.05 of the full
         cache's perplexity (1.02 measured), over that whole stretch; over its last tokens alone, when most has been dropped, it
         is larger.  Where a model leans on its first tokens, as large ones do, it loses its bearings without them: the lower
         end of the scale, not for use
Raises   ValueError unless window >= 1 and every >= 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.kv.compress._common import most, next_cut
from weft.registry import register
from weft.slots import Kept
from weft.traits import Effect, Fidelity, Traits


@register("kv.compress", "recent")
@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """The null of techniques that keep the newest tokens and something beside."""

    window: int = 1024
    every: int = 128
    acts: dict[str, int] = field(default_factory=lambda: {"cuts": 0, "entries_dropped": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"window": 64, "every": 16}
    wide_trial: ClassVar[dict[str, object]] = {"window": 128, "every": 32}
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, bound=0.035, effects=frozenset({Effect.DROPS_TOKENS}))

    def __post_init__(self) -> None:
        if self.window < 1 or self.every < 1:
            raise ValueError(f"window >= 1 and every >= 1 are needed, got {self.window}, {self.every}")

    def budget(self, prompt: int, limit: int) -> int:
        return most(self.window, self.every, limit)

    def cuts(self, prompt: int, position: int) -> int | None:
        return next_cut(position, self.window, self.every)

    def keep(self, view: Any) -> Kept:
        import torch

        gone = view.entries - self.window
        self.acts["cuts"] += 1
        self.acts["entries_dropped"] += gone
        return Kept(torch.arange(gone, view.entries))
