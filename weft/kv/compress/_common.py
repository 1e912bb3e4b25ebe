"""What the techniques of this folder share: cuts at absolute positions, and how many entries that leaves."""

from __future__ import annotations


def next_cut(position: int, stay: int, every: int) -> int:
    """The smallest multiple of `every` above `position` at which more than `stay` entries stand."""
    return (max(position, stay) // every + 1) * every


def most(stay: int, every: int, limit: int) -> int:
    """Entries that stand at most: `stay` after a cut, and `every` more before the next; never more than `limit`."""
    return min(limit, stay + every)
