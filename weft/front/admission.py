"""Who is let in: how much may wait for its first token, and what one key may ask in a minute.  Pure: `now` in seconds is given.

Source of the rate: a token bucket (Turner, New directions in communications, 1986), as large as what a minute may hold and filled
evenly.  What an answer costs is known at its end and taken then, so a bucket may be in debt: the key waits until it is paid.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from weft.front.generation import Limited, Refused

KEY: ContextVar[str] = ContextVar("weft-key", default="")
"""Who asks, within the handling of one HTTP request, for rates: the tenant of the key, or an address."""
OWNER: ContextVar[str] = ContextVar("weft-owner", default="")
"""Whose prefixes are shared, and whom schedulers count for: the key's name or tenant; nobody's where there are no keys."""
HURRY: ContextVar[bool] = ContextVar("weft-hurry", default=True)
"""Whether somebody waits for what is asked here: only such requests have a deadline."""
MOST_KEYS = 10_000
"""Keys whose buckets are kept; that of a key which has asked nothing for longest is full again anyway."""
MINUTE_S = 60.0
PACE_OF = 64
"""Requests that waited last, by which the pace of the queue is known."""
SOONEST_S, LATEST_S = 1.0, 60.0
"""Bounds of when somebody is told to ask again; clients do not wait for longer."""


def work_for(tenant: str) -> None:
    """What goes on here without its client, also after a server's new start, is somebody's all the same, and in no hurry."""
    HURRY.set(False)
    if tenant and not OWNER.get():
        KEY.set(tenant)
        OWNER.set(tenant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """max_queue: requests that may wait for their first token; max_queued_tokens: of their prompts, in all.

    requests_per_minute, tokens_per_minute: of one key, prompts and answers together; None for no limit.
    """

    max_queue: int = 1024
    max_queued_tokens: int = 4 << 20
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Bucket:
    """What is left of a minute's `most`; negative where more was used than there was."""

    __slots__ = ("left", "most", "then")

    def __init__(self, most: float, now: float) -> None:
        self.most = self.left = most
        self.then = now

    def wait_s(self, now: float) -> float:
        """Seconds until something is in it; 0.0 where something is."""
        self.left = min(self.most, self.left + (now - self.then) * self.most / MINUTE_S)
        self.then = now
        return 0.0 if self.left >= 1.0 else (1.0 - self.left) * MINUTE_S / self.most


class Admission:
    """Counts what waits and what keys have used."""

    def __init__(self, bounds: Bounds, beside: Admission | None = None) -> None:
        """beside: of another model, where what waits is counted apart, and a key's rate together."""
        self.bounds = bounds
        self.requests = 0
        self.tokens = 0
        self._left: deque[tuple[float, int]] = deque(maxlen=PACE_OF + 1)
        """When requests had waited long enough, and the tokens of their prompts; at first, when the queue began."""
        self._buckets: OrderedDict[str, tuple[Bucket | None, Bucket | None]]
        self._buckets = OrderedDict() if beside is None else beside._buckets

    def enter(self, key: str, lengths: Sequence[int], now: float) -> None:
        """Let requests with prompts of these lengths in.  Raises Refused where too much waits, Limited for a key's rate.

        What waits beside nothing is let in however large it is: it was bounded by its body.
        """
        b, tokens = self.bounds, sum(lengths)
        if self.requests and (self.requests + len(lengths) > b.max_queue or self.tokens + tokens > b.max_queued_tokens):
            raise Refused(
                f"{self.requests} requests with {self.tokens} prompt tokens wait for their first token already; ask again later",
                code="overloaded",
                retry_s=self._room_s(
                    self.requests + len(lengths) - b.max_queue, self.tokens + tokens - b.max_queued_tokens, now
                ),
            )
        asked, used = self._of(key, now)
        for bucket, what in ((asked, "requests"), (used, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s(now)):
                raise Limited(
                    f"this key may use {bucket.most:.0f} {what} in a minute, and has; ask again in {wait_s:.0f} s",
                    wait_s,
                )
        if asked is not None:
            asked.left -= 1
        if used is not None:
            used.left -= tokens
        if not self.requests:
            self._left.clear()
            self._left.append((now, 0))
        self.requests += len(lengths)
        self.tokens += tokens

    def leave(self, tokens: int, now: float) -> None:
        """A request with a prompt of so many tokens waits no more."""
        self.requests -= 1
        self.tokens -= tokens
        self._left.append((now, tokens))

    def use(self, key: str, tokens: int, now: float) -> None:
        """An answer of so many tokens has been given."""
        _, used = self._of(key, now)
        if used is not None:
            used.wait_s(now)
            used.left -= tokens

    def _room_s(self, requests: int, tokens: int, now: float) -> float:
        """Seconds until so many of those that wait, with so many tokens, have left, at the pace of the last ones."""
        began, left = self._left[0][0], len(self._left) - 1
        if not left:
            return SOONEST_S
        each_s = (now - began) / left
        token_s = (now - began) / max(1, sum(size for _, size in self._left) - self._left[0][1])
        wait_s = max(min(requests, self.requests) * each_s, min(tokens, self.tokens) * token_s)
        return min(max(wait_s, SOONEST_S), LATEST_S)

    def _of(self, key: str, now: float) -> tuple[Bucket | None, Bucket | None]:
        b = self.bounds
        if b.requests_per_minute is None and b.tokens_per_minute is None:
            return None, None
        found = self._buckets.pop(key, None)
        if found is None:
            first, second = b.requests_per_minute, b.tokens_per_minute
            found = (None if first is None else Bucket(first, now), None if second is None else Bucket(second, now))
        self._buckets[key] = found
        if len(self._buckets) > MOST_KEYS:
            self._buckets.popitem(last=False)
        return found
