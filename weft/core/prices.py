"""What a step takes, learnt from steps: seconds by rows, for each class of batch size and for all of them together; and what a
draft takes for its guesses.

Times are level * shape: what the machine does to all steps alike is the level's, what rows cost beside each other the shape's.
A class of batch sizes has both of its own, since the keys and values that are read differ.  What a class has not seen yet is
reckoned from the nearest numbers of rows that it has, in the proportion that steps of all classes say (`Prices`): a batch that
shrinks or grows goes on with what was learnt.

Rows are kept in classes (`size_class`), each where its steps' rows were on the mean: two rows more than 32 are no 40.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

RATE = 0.1
"""Weight of the newest time against those before it."""
FALLS, RISES = 0.3, 0.05
"""The same for steps of the target.  Times that come out too long are the machine's affair, mostly, and few numbers of rows are
seen as often as others: their lower times are compared, not their means."""
WORST = 4.0
"""No time counts as more than so many times what was expected, nor as less than its inverse."""
DEAR, DEARER, MANY = 0.25, 0.6, 16
"""A row beside as many as were ever seen is thought to cost a quarter of one of those, and more from `MANY` rows on, until so
much fewer rows were seen that they tell."""
APART = 1.25
"""Numbers of rows so far apart tell what a row costs; of nearer ones the difference is noise."""
STALE = 512
"""Steps after which it is no longer believed what a number of rows took; fewer for what was seen but 1 to 3 times."""
BEYOND, ALWAYS = 1.5, 10
"""More rows than so many times those that were seen have no price, but for so few: what they cost is found out in steps."""
TRIED, LONG = 8, 64
"""Steps with guesses after which what they brought is believed, and after which nothing is held against them any more."""
PATIENCE, MOST = 64, 1024
"""Steps for which guessing that did not bring what it promised is left alone, the first time, and at most."""
FEW = 4
"""So many first times count by their least."""

PRIOR = 4.0
HOPE = 0.6
"""How often a guess of a draft that nobody has tried is thought to stand."""
CATCHING_UP = 16
"""Tokens that a second model is thought to catch up with in the time of one guess, until that was seen."""

Points = tuple[Sequence[float], Sequence[float], int]
"""Rows, ascending, their shape, and the class of the fewest."""


def size_class(n: int) -> int:
    """A number of rows or sequences in classes: each to 8, then four to a doubling."""
    if n <= 8:
        return n
    step = 1 << (n.bit_length() - 3)
    return -(-n // step) * step


@dataclass(slots=True)
class Mean:
    """A running mean: of the first times, then exponentially forgetting."""

    value: float = 0.0
    count: int = 0

    def add(self, x: float, rate: float = RATE) -> None:
        self.count += 1
        if self.count > 2:
            x = min(x, WORST * self.value)
        self.value += max(rate, 1 / self.count) * (x - self.value)


@dataclass(slots=True)
class Costs:
    """Seconds of the target's steps by rows: level * shape[class], or shape[-class] where a draft computed beside it.

    at: rows of a class on the mean.  seen: how often, and in which step last.  A time that was seen few times is believed for a
    while only: machines are slow now and then, and what looked dear would never be tried again.  looked: the step in which
    guessing was last left out to see what steps take without.

    plain_s, tokens, seconds: of steps without guesses and with them, as they were: what is promised is reckoned from times of
    which some came out too short, and where it is not kept, guessing is barred until a step, each time for longer.
    """

    level: float = 0.0
    shape: dict[int, float] = field(default_factory=dict)
    at: dict[int, float] = field(default_factory=dict)
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    steps: int = 0
    looked: int = 0
    plain_s: Mean = field(default_factory=Mean)
    tokens: Mean = field(default_factory=Mean)
    seconds: Mean = field(default_factory=Mean)
    barred: int = 0
    patience: int = PATIENCE
    _points: dict[bool, Points] = field(default_factory=dict)

    def add(self, rows: int, seconds: float, beside: bool = False) -> None:
        self.steps += 1
        self._points.clear()
        key = -size_class(rows) if beside else size_class(rows)
        count, _ = self.seen.get(key, (0, 0))
        self.seen[key] = count + 1, self.steps
        self.at[key] = self.at.get(key, 0.0) + max(RATE, 1 / (count + 1)) * (rows - self.at.get(key, 0.0))
        if not self.shape:
            self.level, self.shape[key] = seconds, 1.0
        elif key not in self.shape:
            self.shape[key] = seconds / self.level
        else:
            off = math.log(seconds / (self.level * self.shape[key]))
            off = max(-math.log(WORST), min(math.log(WORST), off))
            if count < FEW and off < 0:
                self.shape[key] *= math.exp(off)
            else:
                # What the machine does to all steps alike is the level's.
                rate = FALLS if off < 0 else RISES
                self.level *= math.exp(rate * off)
                self.shape[key] *= math.exp(rate * off / 4)

    @property
    def known(self) -> list[int]:
        """Classes of rows whose time is believed, ascending."""
        return sorted(k for k in self.shape if k > 0 and self._believed(k))

    @property
    def beside(self) -> list[int]:
        """The same of steps beside which a draft computed."""
        return sorted(-k for k in self.shape if k < 0 and self._believed(k))

    def kept(self, size: int, least: float) -> bool:
        """Whether guessing may go on, or begin: it brought at least so many times the speed of plain decoding, or has not been
        tried for long enough to say."""
        if self.tokens.count >= TRIED and self.plain_s.count:
            won = self.tokens.value / self.seconds.value * self.plain_s.value / size
            if won < least:
                self.barred, self.patience = self.steps + self.patience, min(MOST, 2 * self.patience)
                self.tokens, self.seconds = Mean(), Mean()
            elif self.tokens.count >= LONG:
                self.patience = PATIENCE
        return self.steps >= self.barred

    def since(self, rows: int) -> int:
        """Steps since so many rows were last seen, or looked for."""
        return self.steps - max(self.seen.get(size_class(rows), (0, 0))[1], self.looked)

    def top(self, beside: bool = False) -> float:
        """Most rows whose time is believed; 0 where none is."""
        rows = self._curve(beside)[0]
        return rows[-1] if rows else 0.0

    def __call__(self, rows: float, beside: bool = False) -> float | None:
        """Expected seconds; None where so few rows, or none, are known.  beside: with a draft, as far as that was ever seen."""
        at, shape, least = self._curve(beside)
        if not at or size_class(math.floor(rows)) < least:
            return None
        i = bisect_left(at, rows)
        if i < len(at) and (at[i] == rows or i == 0):
            return self.level * shape[i]
        low, value = at[i - 1], shape[i - 1]
        if i < len(at):
            slope = (shape[i] - value) / (at[i] - low)
        elif rows > max(ALWAYS, BEYOND * low):
            return None
        else:
            slope = (DEAR if low < MANY else DEARER) * value / low
            far = bisect_left(at, low / APART)
            j = far if far < len(at) and at[far] * APART <= low else far - 1
            if j >= 0:
                slope = (value - shape[j]) / (low - at[j])
        return self.level * (value + slope * (rows - low))

    def _curve(self, beside: bool) -> Points:
        """What is believed, made monotone: more rows never cost less.  Made when it is asked for, not in every step."""
        found = self._points.get(beside)
        if found is None:
            keys = self.beside if beside else []
            sign = -1 if keys else 1
            shape, most = [], 0.0
            points = sorted((self.at[sign * k], self.shape[sign * k]) for k in keys or self.known)
            for _, s in points:
                most = max(most, s)
                shape.append(most)
            at = [x for x, _ in points]
            found = self._points[beside] = at, shape, size_class(math.ceil(at[0])) if at else 0
        return found

    def _believed(self, key: int) -> bool:
        count, at = self.seen[key]
        return self.steps - at <= (STALE if count > 3 else STALE >> 4 << count)


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of steps with batches of one class; own: of such steps, every: of all."""

    own: Costs
    every: Costs
    _edges: dict[tuple[bool, int, int], tuple[float | None, float | None]] = field(default_factory=dict, compare=False)
    """What the most rows that the class has seen cost there, and anywhere, as of so many steps."""

    def __call__(self, rows: float, beside: bool = False) -> float | None:
        top = self.own.top(beside)
        if not top:
            return self.every(rows, beside)
        if rows <= top:
            return self.own(rows, beside)
        now = beside, self.own.steps, self.every.steps
        if now not in self._edges:
            self._edges[now] = self.own(top, beside), self.every(top, beside)
        edge, here = self._edges[now]
        there = self.every(rows, beside)
        if there is None or edge is None or here is None:
            return self.own(rows, beside)
        return edge * there / here


@dataclass(slots=True)
class Pool:
    """What is known of one draft.  guess_s: by class of batch size.  row_s: of a token that its model catches up with.  beside:
    whether it guessed while the target computed when it last did."""

    stood: float = HOPE * PRIOR
    tried: float = PRIOR
    guess_s: dict[int, Mean] = field(default_factory=dict)
    row_s: Mean = field(default_factory=Mean)
    on: int = -1
    """Guesses that the newest decision gave to its sequences at most; -1 before the first."""
    beside: bool = False

    def guess(self, size: int) -> float:
        """Seconds of a guess; of the nearest class where this one was never seen, 0 where none was."""
        if not self.guess_s:
            return 0.0
        return self.guess_s[min(self.guess_s, key=lambda c: abs(math.log(c / size)))].value

    def row(self, size: int) -> float:
        return self.row_s.value if self.row_s.count else self.guess(size) / CATCHING_UP
