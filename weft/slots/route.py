"""Slot `route`: which replica serves a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ReplicaView(Protocol):
    """What a router may read of a replica, as it stands when a request comes.

    running, waiting: sequences.  pending: rows of prompts that are not computed yet.  used: share of its KV blocks that are held.
    """

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def used(self) -> float: ...


class Route(Protocol):
    """Slot `route`.  Pure: what it remembers is a function of the requests that it has seen.

    choose  the index of the replica that serves a request.  prompt: its token ids.  tenant: equal ones may share prefixes

    looks: whether it reads replicas at all.
    """

    @property
    def looks(self) -> bool: ...
    def choose(self, prompt: Sequence[int], tenant: bytes, replicas: Sequence[ReplicaView], now: float) -> int: ...
