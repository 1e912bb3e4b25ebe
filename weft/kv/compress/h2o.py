"""H2O: in each head keep the tokens that got most attention so far (heavy hitters), and the newest.

Paper    Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models,
         arXiv:2306.14048, algorithm 1 (004-47)
Rule     at each multiple of `every` above heavy + recent, in each layer and kv head: keep the newest `recent` entries, and of
         the others the `heavy` with the largest mass; mass(entry) = sum of the attention probabilities that it got from the
         rows that count, over the query heads of the kv head
Shapes   indices [layers, kv heads, heavy + recent] int64
Units    heavy, recent, every, observe: tokens
Cost     attention scores of the rows that count are computed twice more; 8 bytes for each entry of a layer's kv head; O(heavy +
         recent) entries moved at a cut.  At most heavy + recent + every entries at any moment, also while a prompt is computed
Pays     in memory, and in batches in the time of decoding, where no answer rests on a single fact far back that nobody asked
         for before it was dropped: of 24 facts in 512 tokens the bundled model recalls 23 with the whole cache and none with
         128 entries.  With 800 tokens 0.19 of the cache is held.  That more sequences then fit a pool which is too small
         follows from that; every pool that was timed had room for all
Differs  the paper evicts one token at each step, where `every` go at once; the first cut comes when the budget is first
         exceeded, within the prompt or after it.  Of the rows before the first cut (or before the prompt's end, where that comes
         first) only the last `observe` count, so that the part before them may come from the prefix index; observe=None counts
         all and takes nothing from there.  Of equal masses the older entry stays.  Keys keep the positions that they had, as in
         the paper
Bound    on novels that the bundled model has not read, tokens 128 to 1024, heavy=64, recent=64, every=32: at most 1.07 of the
         full cache's perplexity (1.04 measured) and a mean KL of 0.06 nat (0.032 measured), both means over that whole stretch;
         over its last tokens alone, when most has been dropped, they are larger.  That small model looks at what is near: a
         window of as many entries is even better there (1.02, 0.020)
Raises   ValueError unless heavy >= 0, recent >= 1, every >= 1 and observe is None or >= 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.kv.compress._common import most, next_cut
from weft.registry import register
from weft.slots import Kept
from weft.traits import Effect, Fidelity, Trait, Traits

EVERYTHING = 1 << 60
"""More tokens than any prompt has."""


@register("kv.compress", "h2o")
@dataclass(frozen=True, slots=True, kw_only=True)
class H2O:
    """For long contexts of which a part matters throughout."""

    heavy: int = 512
    recent: int = 512
    every: int = 128
    observe: int | None = 256
    acts: dict[str, int] = field(default_factory=lambda: {"cuts": 0, "entries_dropped": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"heavy": 32, "recent": 32, "every": 16, "observe": 64}
    wide_trial: ClassVar[dict[str, object]] = {"heavy": 64, "recent": 64, "every": 32, "observe": 32}
    beats: ClassVar[str] = "kv.compress=random(chosen=32, recent=32, every=16)"
    traits: ClassVar[Traits] = Traits(
        fidelity=Fidelity.APPROX,
        bound=0.045,
        needs=frozenset({Trait.ATTENTION_MASS}),
        effects=frozenset({Effect.DROPS_TOKENS, Effect.RAGGED_HEADS, Effect.PER_REQUEST_STATE}),
    )

    def __post_init__(self) -> None:
        if self.heavy < 0 or self.recent < 1 or self.every < 1 or not (self.observe is None or self.observe >= 1):
            raise ValueError(
                f"heavy >= 0, recent >= 1, every >= 1 and observe >= 1 (or None, for all) are needed, got {self.heavy}, "
                f"{self.recent}, {self.every}, {self.observe}"
            )

    @property
    def observe_rows(self) -> int | None:
        """Rows before the first cut, or the prompt's end, whose attention counts."""
        return self.observe

    @property
    def history(self) -> int:
        """Tokens that a prefix hit must leave to be computed."""
        return EVERYTHING if self.observe is None else self.observe

    def budget(self, prompt: int, limit: int) -> int:
        return most(self.heavy + self.recent, self.every, limit)

    def cuts(self, prompt: int, position: int) -> int | None:
        return next_cut(position, self.heavy + self.recent, self.every)

    def keep(self, view: Any) -> Kept:
        import torch

        older = view.entries - self.recent
        ranked = view.mass[:, :, :older].sort(dim=2, descending=True, stable=True).indices
        hitters = ranked[:, :, : self.heavy].sort(dim=2).values
        newest = torch.arange(older, view.entries).expand(*hitters.shape[:2], self.recent)
        self.acts["cuts"] += 1
        self.acts["entries_dropped"] += older - self.heavy
        return Kept(torch.cat((hitters, newest), 2))
