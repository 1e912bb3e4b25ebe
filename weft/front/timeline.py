"""What became of a request, moment by moment, for whoever asks: `weft: {"timeline": true}`, and the live view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.front.generation import Generation

MOST_MOMENTS = 512
"""Later ones are counted, and the end is told."""
SUMMED = ("speculation",)
"""Events of which a run is one moment, with its numbers added up."""


class Timeline:
    """Moments of one request, in seconds since it arrived; bounded."""

    __slots__ = ("_arrived_s", "moments")

    def __init__(self, arrived_s: float) -> None:
        self._arrived_s = arrived_s
        self.moments: list[dict[str, Any]] = []

    def add(self, now: float, event: str, detail: dict[str, Any] | None = None, sequence: int = 0) -> None:
        """sequence: of a request for several, whose first is not named."""
        detail = {**(detail or {}), **({"sequence": sequence} if sequence else {})}
        last = self.moments[-1] if self.moments else None
        if last is not None and event in SUMMED and last["event"] == event:
            told = last["detail"]
            if told.get("sequence") == detail.get("sequence"):
                for name, value in detail.items():
                    told[name] = value if name == "sequence" else told[name] + value
                told["steps"] += 1
                return
        if event in SUMMED:
            detail["steps"] = 1
        moment = {"t_s": round(now - self._arrived_s, 6), "event": event, "detail": detail}
        if len(self.moments) < MOST_MOMENTS:
            self.moments.append(moment)
        else:  # the last place tells how it ended
            left = self.moments[-1]["detail"].get("left_out", 0) + 1
            self.moments[-1] = {**moment, "detail": {**detail, "left_out": left}}


def said(label: dict[str, Any] | None, generation: Generation) -> dict[str, Any]:
    """The key `weft` of an answer that has one: its label, and the timelines of its prompts, in their order."""
    kept = [r.timeline.moments for r in generation.requests if r.prompt.timeline and r.timeline is not None]
    if not kept:
        return {} if label is None else {"weft": label}
    moments = [{**m, "prompt": i} if len(kept) > 1 else m for i, one in enumerate(kept) for m in one]
    return {"weft": {**(label or {}), "timeline": moments}}
