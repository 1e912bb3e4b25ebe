"""What placements share: who of a pool has the least to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from weft.slots.place import Role
from weft.slots.route import ReplicaView


def idlest(replicas: Sequence[ReplicaView], roles: Sequence[Role], wanted: Collection[str], each: int = 128) -> int:
    """The replica of the wanted roles with the least work before it: rows of prompts, and `each` for a sequence."""
    mine = [i for i, role in enumerate(roles) if role in wanted]
    return min(mine, key=lambda i: (replicas[i].pending + each * (replicas[i].running + replicas[i].waiting), i))
