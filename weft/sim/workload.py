"""Loads: who asks when, with how long a prompt and for how many tokens.  Streams, so that a trace may be longer than memory.

A prompt is a run of segments (content, tokens): equal contents are equal tokens, so what two prompts begin with alike is a
shared prefix, and nothing else is.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from weft.errors import ConfigError
from weft.registry import parse_call
from weft.types import RequestSpec, SamplingSpec, TokenItem

UNIQUE = 1 << 40
"""Contents from here on are nobody else's."""
MOST_COPIES = 10_000
"""Of each request, where a trace's rate is scaled."""
MAX_TOKENS = 1 << 24
"""Tokens of one prompt or answer; longer ones are a mistake in the file."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.  time_s: since the trace began.  output: tokens that it gets.  text: token ids in place of segments.

    images: tiles that are encoded before the prompt, which has their tokens already.
    """

    time_s: float
    segments: tuple[tuple[int, int], ...]
    output: int
    tenant: str = ""
    priority: int = 0
    text: tuple[int, ...] = ()
    images: int = 0

    @property
    def prompt(self) -> int:
        return len(self.text) + sum(n for _, n in self.segments)

    def tokens(self) -> tuple[int, ...]:
        """The prompt's ids."""
        if len(self.segments) == 1 and not self.text:
            content, n = self.segments[0]
            return (content,) * n
        return self.text + tuple(itertools.chain.from_iterable(itertools.repeat(c, n) for c, n in self.segments))

    def spec(self, id: int) -> RequestSpec:
        """As the engine gets it: the answer ends where the trace says, by its length."""
        return RequestSpec(
            id=id, items=(TokenItem(self.tokens()),), sampling=SamplingSpec(temperature=0.0, max_tokens=self.output),
            priority=self.priority, salt=self.tenant.encode(), ttft_s=0.0,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """time: the trace goes that many times as fast.  rate: so many times its requests, at its own pace (copies, or a sample).

    requests, seconds: the most of either, of the trace as it is replayed; None for all.
    """

    time: float = 1.0
    rate: float = 1.0
    requests: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("time", "rate"):
            if not (0 < getattr(self, name) < math.inf):
                raise ConfigError(f"a trace is scaled by numbers above 0, got {getattr(self, name)}")
        if self.rate > MOST_COPIES:
            raise ConfigError(f"a trace has at most {MOST_COPIES} times its requests, got {self.rate:g} times")
        if self.requests is not None and self.requests < 1:
            raise ConfigError(f"at least 1 request is needed, got {self.requests}")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"a trace lasts longer than 0 s, got {self.seconds}")


def paced(arrivals: Iterable[Arrival], pace: Pace, seed: int = 0) -> Iterator[Arrival]:
    """The load at another pace."""
    found: Iterator[Arrival] = iter(arrivals)
    if pace.rate != 1.0:
        found = _copies(found, pace.rate, seed)
    if pace.time != 1.0:
        found = (replace(a, time_s=a.time_s / pace.time) for a in found)
    if pace.seconds is not None:
        most = pace.seconds
        found = itertools.takewhile(lambda a: a.time_s < most, found)
    return found if pace.requests is None else itertools.islice(found, pace.requests)


def _copies(arrivals: Iterator[Arrival], rate: float, seed: int) -> Iterator[Arrival]:
    """Each request `rate` times on average; copies come within a second of the first and have prompts of their own."""
    chance = random.Random(f"copies {seed}")
    late: list[tuple[float, int, Arrival]] = []
    numbers = itertools.count()
    for a in arrivals:
        while late and late[0][0] <= a.time_s:
            yield heapq.heappop(late)[2]
        whole = int(rate) + (chance.random() < rate - int(rate))
        for copy in range(whole):
            if copy == 0:
                yield a
                continue
            n = next(numbers)
            at = a.time_s + chance.random()
            own = tuple((c + (n + 1) * UNIQUE if c >= UNIQUE else c, size) for c, size in a.segments)
            heapq.heappush(late, (at, n, replace(a, time_s=at, segments=own)))
    while late:
        yield heapq.heappop(late)[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """Arrivals by chance.  rate: requests a second.  cv: of the time between two (1: Poisson).  prompt, output: means.

    spread: coefficient of variation of both lengths (lognormal; 0: always the mean).  tenants: among whom they are drawn.
    shared: tokens at the head that all prompts of a tenant have in common.  images: tiles of each request, as `Arrival`.
    urgent: the share of requests that come with a priority before the others'.
    """

    rate: float
    requests: int = 1000
    cv: float = 1.0
    prompt: int = 512
    output: int = 128
    spread: float = 0.5
    tenants: int = 1
    shared: int = 0
    images: int = 0
    urgent: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rate", "cv"):
            if not (0 < getattr(self, name) < math.inf):
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("requests", "prompt", "output", "tenants"):
            if not 1 <= getattr(self, name) <= 1 << 32:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.images <= 10_000:
            raise ConfigError(f"images is the number of tiles of a request, from 0 to 10000, got {self.images}")
        if not 0 <= self.urgent <= 1:
            raise ConfigError(f"urgent is a share of the requests, from 0 to 1, got {self.urgent}")
        if not 0 <= self.spread < 10 or not 0 <= self.shared <= MAX_TOKENS:
            raise ConfigError(f"spread is from 0 to 10 and shared not below 0, got {self.spread} and {self.shared}")

    def arrivals(self, seed: int = 0) -> Iterator[Arrival]:
        chance, now = random.Random(f"synthetic {seed}"), 0.0
        pressed = random.Random(f"urgent {seed}")
        shape = 1.0 / self.cv**2
        for i in range(self.requests):
            now += chance.gammavariate(shape, 1.0 / (self.rate * shape))
            who = chance.randrange(self.tenants)
            own = ((UNIQUE + i, self._length(chance, self.prompt)),)
            head = ((who + 1, self.shared),) if self.shared else ()
            yield Arrival(
                now,
                head + own,
                self._length(chance, self.output),
                f"tenant{who}" if self.tenants > 1 else "",
                priority=-(pressed.random() < self.urgent),
                images=self.images,
            )

    def _length(self, chance: random.Random, mean: int) -> int:
        if not self.spread:
            return mean
        sigma = math.sqrt(math.log1p(self.spread**2))
        return min(MAX_TOKENS, max(1, round(chance.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


SYNTHETIC = ("poisson", "gamma")


def synthetic(text: str) -> Synthetic | None:
    """'poisson(rate=4)' or 'gamma(rate=4, cv=3)' as a load; None where it is no such text.  Raises ConfigError."""
    if not text.startswith(tuple(f"{name}(" for name in SYNTHETIC)):
        return None
    name, arguments = parse_call(text)
    given = dict(arguments)
    if name not in SYNTHETIC:
        raise ConfigError(f"a synthetic load is poisson(rate=...) or gamma(rate=..., cv=...), got {text[:100]!r}")
    known = {f for f in Synthetic.__dataclass_fields__ if f != "cv" or name == "gamma"}
    if set(given) - known or "rate" not in given:
        raise ConfigError(f"{name} takes rate= and any of {', '.join(sorted(known - {'rate'}))}; got {text[:200]!r}")
    for key, value in given.items():
        real = key in ("rate", "cv", "spread", "urgent")
        if isinstance(value, bool) or not isinstance(value, int | float if real else int):
            raise ConfigError(f"{name}: {key} must be a {'number' if real else 'whole number'}, got {value!r}")
    return Synthetic(**given)
