"""MuE: a row leaves once a layer hardly turns its hidden state.

Paper    Tang et al., You Need Multiple Exiting, arXiv:2211.11152 (004-75)
Rule     a row leaves after layer l, one of `after`, iff cos(h_(l-1), h_l) >= threshold, where h_l comes out of layer l.  Its
         logits are made of h_l, and so are its keys and values in all later layers: norm, k and v of each, rope
Shapes   h [T, width]; a row's answer depends on that row alone
Units    after: layers that a row has passed.  threshold: cosine.  rows_asked, rows_exited: rows at an exit
Cost     a cosine for each row at each exit; a product with k's and v's weights alone for each later layer of a row that left,
         which takes neither attention nor MLP there.  A second, smaller batch is laid out in a step in which somebody leaves
Pays     nowhere that was measured: at its stated bound decoding goes at 0.98 to 1.01 of the speed alone, and at 0.89 to 0.96 in
         a batch of 8.  Leaving after half of the layers is 1.3 to 1.7 times as fast, with answers of which 2 to 3 % are the
         same: that is for a model that was trained to be left early, and none was measured
Differs  rows of the prompt never leave (the paper's encoder), and generated ones only after the named layers, by default three
         quarters of them.  The paper trains every layer's output with the task's loss; nothing is trained here, and a model
         that was not loses by it: on novels that the bundled one has not read, two thirds of the rows leave after layer 7 of 8
         at 0.965, at a mean KL of 0.30 nats, and two fifths after layer 6 at 0.98, at 0.40
Bound    on novels that the bundled model has not read, 48 tokens after 80 of prompt, after=(7,), threshold=0.965: a mean KL of
         at most 0.33 nat (0.29 and 0.28 measured)
Raises   ValueError unless `after` ascends from 2 on and 0 < threshold <= 1
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from weft.registry import register
from weft.slots import Leaving
from weft.traits import Effect, Fidelity, Traits

if TYPE_CHECKING:
    from torch import Tensor


@register("skip", "mue")
@dataclass(frozen=True, slots=True, kw_only=True)
class MuE:
    """after: how many layers a row has passed where it may leave; () for one exit at three quarters of them."""

    after: tuple[int, ...] = ()
    threshold: float = 0.98
    acts: dict[str, int] = field(default_factory=lambda: {"rows_asked": 0, "rows_exited": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, Any]] = {"after": (7,), "threshold": 0.965}
    traits: ClassVar[Traits] = Traits(
        fidelity=Fidelity.APPROX,
        effects=frozenset({Effect.SKIPS_LAYERS, Effect.REWRITES_KV, Effect.DYNAMIC_SHAPES}),
        bound=0.23,
    )

    def __post_init__(self) -> None:
        steps = (1, *self.after)
        if any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError(f"after ascends from 2 on, got {self.after}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is a cosine above 0 and at most 1, got {self.threshold}")

    def exits(self, layers: int) -> Sequence[int]:
        chosen = self.after or (max(2, layers * 3 // 4),)
        return [exit for exit in chosen if exit < layers]

    def rows(self, view: Leaving) -> Tensor:
        before, after = view.before.float(), view.after.float()
        dot, one, other = (before * after).sum(-1), (before * before).sum(-1), (after * after).sum(-1)
        leave: Tensor = dot >= self.threshold * (one * other).sqrt()
        self.acts["rows_asked"] += len(leave)
        self.acts["rows_exited"] += int(leave.sum())
        return leave
