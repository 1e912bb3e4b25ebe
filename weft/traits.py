"""The closed vocabulary in which a technique says what it needs, what it gives and what it does to the answers.

Composition is computed from these words and never from names.  A need or a gift is matched by a rule in `compose`; of the
effects some are rules too, some tell the core what to do, and all tell a reader what a part does (docs/techniques).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import total_ordering


@total_ordering
class Fidelity(enum.Enum):
    """What a technique does to the answers; a stack's fidelity is its weakest member's."""

    EXACT = "EXACT"
    """The same tokens."""
    SAME_LAW = "SAME_LAW"
    """The same distribution."""
    APPROX = "APPROX"
    """A measured bound."""

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Fidelity):
            return NotImplemented
        order = list(Fidelity)
        return order.index(self) < order.index(other)


class Trait(enum.StrEnum):
    """Something that one part needs and another part, the core, or the machine gives."""

    WINDOW_QUERIES = "WINDOW_QUERIES"
    ATTENTION_MASS = "ATTENTION_MASS"
    HIDDEN_STATES = "HIDDEN_STATES"
    PRE_ROPE_KEYS = "PRE_ROPE_KEYS"
    TREE_MASK = "TREE_MASK"
    TARGET_FEATURES = "TARGET_FEATURES"
    LENGTH_ESTIMATE = "LENGTH_ESTIMATE"
    FUTURE = "FUTURE"
    CALIBRATION = "CALIBRATION"
    TRAINED_PARTS = "TRAINED_PARTS"
    HOST_TIER = "HOST_TIER"
    COLLECTIVES = "COLLECTIVES"
    TRITON = "TRITON"
    ROLLBACK = "ROLLBACK"
    EXPORT_STATE = "EXPORT_STATE"
    BOUNDED_KV = "BOUNDED_KV"
    STARVATION_FREE = "STARVATION_FREE"
    READS_HISTORY = "READS_HISTORY"
    SECOND_MODEL = "SECOND_MODEL"


class Effect(enum.StrEnum):
    """Something that a technique does, which other parts must bear."""

    DROPS_TOKENS = "DROPS_TOKENS"
    REINDEXES_POSITIONS = "REINDEXES_POSITIONS"
    REWRITES_KV = "REWRITES_KV"
    RAGGED_HEADS = "RAGGED_HEADS"
    LENGTH_FROM_DATA = "LENGTH_FROM_DATA"
    DYNAMIC_SHAPES = "DYNAMIC_SHAPES"
    EXTRA_PASS = "EXTRA_PASS"
    PREEMPTS = "PREEMPTS"
    PER_REQUEST_STATE = "PER_REQUEST_STATE"
    SKIPS_LAYERS = "SKIPS_LAYERS"
    GUESSES = "GUESSES"
    """Makes or weighs guesses at tokens, of which several are verified in a step."""
    ONE_AT_A_TIME = "ONE_AT_A_TIME"
    """A program or a link needs each token before the next: no guesses are made for its sequences."""
    REDEFINES = "REDEFINES"
    """The answer is another one on purpose (an adapter, a search, a contrast): fidelity is meant against its own definition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What one technique declares.

    history: the w of READS_HISTORY(w), in tokens.  bound: of an APPROX technique, the mean KL divergence in nats per token from
    the reference path's law that it stays below at its `trial` arguments, over the prose of `weft conform`; of a rule of
    acceptance, whose logits are the reference's own, the divergence of the tokens that stand.
    """

    fidelity: Fidelity = Fidelity.EXACT
    needs: frozenset[Trait] = frozenset()
    gives: frozenset[Trait] = frozenset()
    effects: frozenset[Effect] = frozenset()
    history: int = 0
    bound: float | None = None

    @property
    def answers(self) -> str:
        """The fidelity as a reader is told it: with a word where it is meant against the part's own definition."""
        return told(self.fidelity, self.effects)

    def __post_init__(self) -> None:
        if self.bound is not None and (self.fidelity is not Fidelity.APPROX or not self.bound > 0):
            raise ValueError("a bound on KL is a positive number, and belongs to fidelity APPROX")
        if self.history < 0 or bool(self.history) != (Trait.READS_HISTORY in self.needs):
            raise ValueError("history > 0 goes with needing READS_HISTORY, and only with it")


def told(fidelity: Fidelity, effects: frozenset[Effect]) -> str:
    """A fidelity, followed by "redefined" where the answer is another one on purpose: EXACT alone means the plain answer."""
    return f"{fidelity.value}, redefined" if Effect.REDEFINES in effects else fidelity.value
