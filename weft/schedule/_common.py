"""What schedules share: whom most of them let yield."""

from __future__ import annotations

from collections.abc import Sequence

from weft.slots import RequestView


def latest(needy: RequestView, candidates: Sequence[RequestView]) -> RequestView:
    """The latest of the lowest priority, which may be `needy` itself."""
    return max([*candidates, needy], key=lambda r: (r.priority, r.arrival))
