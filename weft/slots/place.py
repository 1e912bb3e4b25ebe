"""Slot `place`: which devices do what, and how a request goes from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from weft.slots.route import ReplicaView

Role = Literal["prefill", "decode", "mixed"]


class Place(Protocol):
    """Slot `place`.  Pure.

    roles    of so many replicas, one each
    enter    the index, among all, of the replica that computes a prompt; a mixed one keeps the request to its end
    handoff  the index of the replica that goes on with it

    exposed: share of the time that a hand-over of KV takes which is not hidden behind computing the prompt.
    """

    @property
    def exposed(self) -> float: ...
    def roles(self, replicas: int) -> Sequence[Role]: ...
    def enter(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int: ...
    def handoff(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int: ...
