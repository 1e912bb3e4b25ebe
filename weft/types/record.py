"""A record of an engine's life: what it was made of, what came to it, what it decided, and what became of that.

The decisions are the plans; everything else is what they followed from, so that another engine, made of the same and told the
same, has to make the same plans.
"""

from __future__ import annotations

from msgspec import Struct

from weft.types.inputs import RequestSpec
from weft.types.kv import GroupSpec
from weft.types.plan import Plan
from weft.types.result import StepResult

FORMAT = 3


class Made(Struct, frozen=True, kw_only=True, tag="made"):
    """How the engine was made.  limits: fields of `config.Limits`.  parts: of its stack, as slot=name(args).

    control: whether it chooses how far ahead is guessed (from the times that its results tell).
    """

    format: int = FORMAT
    groups: tuple[GroupSpec, ...]
    blocks: int
    limits: dict[str, int]
    parts: tuple[str, ...]
    models: tuple[str, ...] = ("target",)
    layers: int = 1
    vocab: int | None = None
    share: bool = True
    settings: bytes = b""
    in_flight: int = 1
    reach: dict[str, int] = {}
    block_bytes: int | None = None
    control: bool = False


class Added(Struct, frozen=True, tag="added"):
    """A request came.  refused: it was turned away."""

    now: float
    spec: RequestSpec
    refused: bool = False


class Cancelled(Struct, frozen=True, tag="cancelled"):
    """A request was cancelled, or its sequence `index` alone.  found: it lived."""

    id: int
    index: int | None = None
    found: bool = True


class Planned(Struct, frozen=True, tag="planned"):
    """A step was decided.  preempted: the (request id, sequence index) that lost their blocks for it and are told so.

    refused: ids of requests that were refused before it, since they could not be in time any more.
    """

    now: float
    plan: Plan
    preempted: tuple[tuple[int, int], ...] = ()
    refused: tuple[int, ...] = ()


class Committed(Struct, frozen=True, tag="committed"):
    """What became of the oldest plan in flight."""

    now: float
    result: StepResult


class Abandoned(Struct, frozen=True, tag="abandoned"):
    """The oldest plan in flight was broken off."""

    now: float
    step: int


class Ended(Struct, frozen=True, tag="ended"):
    """The engine was ended in good order, and the record with it.  Without this it is cut."""


Entry = Made | Added | Cancelled | Planned | Committed | Abandoned | Ended
