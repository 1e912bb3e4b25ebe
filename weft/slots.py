"""The slots: where a technique can be put, and what it must answer there.

A slot's techniques are the modules of its folder; file name = registered name.  `null` is the technique that a stack has
where it names none; slots without one are empty by default.  Protocols have at most five methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weft.types import SamplingSpec


@dataclass(frozen=True, slots=True)
class Slot:
    """name as in 'kv.evict=lru'; question: what its techniques decide; null: the default technique's name, if any."""

    name: str
    question: str
    null: str | None = None

    @property
    def package(self) -> str:
        return "weft." + self.name


SLOTS: dict[str, Slot] = {
    s.name: s
    for s in (
        Slot("schedule", "who enters, who advances, how far, who yields", "fcfs"),
        Slot("kv.evict", "which cached block goes; pins and leases", "lru"),
        Slot("kv.compress", "how many entries stay; which, or merged into what"),
        Slot("kv.store", "number format of stored KV"),
        Slot("kv.reuse", "KV that can stand in for computing"),
        Slot("kv.offload", "which tier holds a block, when to fetch"),
        Slot("attention", "how attention is computed"),
        Slot("draft", "guesses ahead"),
        Slot("accept", "which guesses stand"),
        Slot("weights", "how weights are stored: quantized, pruned, tied"),
        Slot("adapt", "per-request deltas on weights"),
        Slot("skip", "which layers, halves of layers or neurons a row takes"),
        Slot("resident", "which weights are in memory, which are fetched"),
        Slot("sample", "logits (of linked rows) to law"),
        Slot("constrain", "which tokens a grammar allows, per path of a tree"),
        Slot("search", "programs over many generations"),
        Slot("context", "what text or KV enters the prompt"),
        Slot("route", "which model or replica serves"),
        Slot("place", "roles, devices, hand-offs"),
        Slot("cost", "how long a plan takes on given hardware"),
    )
}


class RequestView(Protocol):
    """What a scheduling policy may read of a request."""

    @property
    def arrival(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def decoding(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def output(self) -> Sequence[int]: ...
    @property
    def sampling(self) -> SamplingSpec: ...
    @property
    def tenant(self) -> bytes: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def partial(self) -> tuple[int, int, int] | None: ...


@dataclass(slots=True)
class StepView:
    """The step as planned so far.  rows_left: budget.  prompt_rows, decode_rows: planned.  layers: of the target model."""

    now: float
    rows_left: int
    layers: int
    running: int
    waiting: int
    prompt_rows: int = 0
    decode_rows: int = 0
    free_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Quota:
    """rows: how many rows may advance at most.  layers: how many layers they pass in this step, None for all."""

    rows: int
    layers: int | None = None


class Schedule(Protocol):
    """Slot `schedule`.  Pure: reads requests and the step, changes nothing of the engine's.

    order   the key by which requests are considered, smaller first, running and waiting ones alike
    admit   whether a waiting request may enter now; False ends admission for this step
    quota   how far one request may advance now
    victim  who yields its blocks to `needy`: one of `candidates`, or `needy` itself, or None (then `needy` waits)

    static: the order of a waiting request never changes while it waits (the queue is then a heap and costs nothing to keep).
    layered: quota may ask for part of the layers.
    """

    @property
    def static(self) -> bool: ...
    @property
    def layered(self) -> bool: ...
    def order(self, request: RequestView, now: float) -> tuple[float, ...]: ...
    def admit(self, request: RequestView, step: StepView) -> bool: ...
    def quota(self, request: RequestView, step: StepView) -> Quota: ...
    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None: ...


class Evict(Protocol):
    """Slot `kv.evict`: which cached block goes first.

    observe   event is "publish", "hit", "release" or "evict"
    rank      blocks go in ascending rank; a block's rank may only grow while the block stays cached
    """

    def observe(self, block: int, event: str, now: float) -> None: ...
    def rank(self, block: int, now: float) -> float: ...


class Draft(Protocol):
    """Slot `draft`: guesses for the tokens that come next.

    propose   from a sequence's whole context, [T] int64 with -1 where no token stands; () when there is nothing to say
    observe   of a step's guesses for one sequence, how many were verified and how many of them stood
    """

    def propose(self, context: Any) -> Sequence[int]: ...
    def observe(self, proposed: int, accepted: int) -> None: ...
