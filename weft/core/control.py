"""How many guesses each sequence is worth: chosen from what steps took and from how often guesses stood, 0 where none pays.

What is maximized is the tokens of a step over its time,

    sum over sequences of (1 + a + a^2 + ... + a^k)  /  (C(rows) + D(longest k)),        rows = sum over sequences of (1 + k)

a the chance that a guess of that sequence stands, C what the target takes for so many rows, D what the draft takes for so many
guesses.  Where a draft has soft tokens, a sequence's rows are (1 + k) (1 + k): guesses as they stood, and as many learned tokens
behind each.  The next guess of a sequence is worth less than the one before, so for each longest k the best lengths of all are
found by taking guesses in the order of their worth.  Times are facts of steps (`StepResult`), so an engine that is told the same
decides the same.

A draft that guesses while the target computes (`Draft.early`) takes k + 1 passes for k guesses, and a step the longer of the two
times; its tokens are those of `lengths.alternating`.

    C   a level times a shape by rows, for each class of batch size, and a shape for steps with a draft beside them; rows never
        seen are reckoned from the nearest that were
    D   seconds of a guess, for each draft and class of batch size, and of a token that a second model has to catch up with
    a   successes over trials of the sequence, forgotten slowly, with `PRIOR` trials of all sequences of that draft before them

A sequence that gets no guesses is not followed by the second model.  It is probed now and then: of the time that goes by, `SHARE`
may be lost to probes, what they gained counted back.

Of a tree a is what its guesses brought, over the power of their number with which that grows (`lengths.gain`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.core.lengths import TREE, lengths, passes
from weft.core.request import Pace, Request
from weft.traits import Trait
from weft.types import Plan, StepResult, Work, WorkResult

EVERY = 4
"""Steps between two decisions about a batch of one size."""
AGAIN, STAYS = 1.1, 1.05
"""What guessing must promise, of plain decoding's speed, to be turned on again, and to stay on.  The lengths that promise most
are those whose times came out too short, and sequences that guess end at different times, which leaves smaller batches."""
SHARE = 0.01
PROBE = 2
"""Guesses of a probe."""
PRIOR = 4.0
OWN, ALL = 0.96, 0.99
"""What a trial leaves of those before it: of the sequence's own, and of all sequences of a draft."""
HOPE = 0.6
"""How often a guess of a draft that nobody has tried is thought to stand."""
RATE = 0.1
"""Weight of the newest time against those before it."""
FALLS, RISES = 0.3, 0.05
"""The same for steps of the target.  Times that come out too long are the machine's affair, mostly, and few numbers of rows are
seen as often as others: their lower times are compared, not their means."""
WORST = 4.0
"""No time counts as more than so many times what was expected, nor as less than its inverse."""
DEAR = 0.25
"""A row beside as many as were ever seen is thought to cost a quarter of one of those, until two numbers of rows were seen."""
CATCHING_UP = 16
"""Tokens that a second model is thought to catch up with in the time of one guess, until that was seen."""
STALE = 512
"""Steps after which it is no longer believed what a number of rows took; fewer for what was seen but 1 to 3 times."""
FEW = 4
"""So many first times count by their least."""
SAVES = 0.25
"""Catching up may cost so much of the time that guesses could save over the rest of the answer."""


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
    """Seconds of the target's steps by rows, for one class of batch size: level * shape[rows], or shape[-rows] where a draft
    computed beside it.

    seen: by rows, how often, and in which step last.  known, beside: rows whose time is believed, ascending.  A time that was
    seen few times is believed for a while only: machines are slow now and then, and what looked dear would never be tried again.
    """

    level: float = 0.0
    shape: dict[int, float] = field(default_factory=dict)
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    known: list[int] = field(default_factory=list)
    beside: list[int] = field(default_factory=list)
    steps: int = 0

    def add(self, rows: int, seconds: float, beside: bool = False) -> None:
        self.steps += 1
        key = -size_class(rows) if beside else size_class(rows)
        count, _ = self.seen.get(key, (0, 0))
        self.seen[key] = count + 1, self.steps
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
        self.known = sorted(k for k in self.shape if k > 0 and self._believed(k))
        self.beside = sorted(-k for k in self.shape if k < 0 and self._believed(k))

    def _believed(self, key: int) -> bool:
        count, at = self.seen[key]
        return self.steps - at <= min(STALE, STALE >> 4 << count)

    def __call__(self, rows: int, beside: bool = False) -> float | None:
        """Expected seconds; None where so few rows, or none, are known.  beside: with a draft, as far as that was ever seen."""
        key, sign = size_class(rows), -1 if beside and self.beside else 1
        known = self.beside if sign < 0 else self.known
        if not known or key < known[0]:
            return None
        i = bisect_left(known, key)
        if i < len(known) and known[i] == key:
            return self.level * self._least(i, sign)
        below, low = known[i - 1], self._least(i - 1, sign)
        if i < len(known):
            slope = (self._least(i, sign) - low) / (known[i] - below)
        elif i >= 2:
            slope = (low - self._least(0, sign)) / (below - known[0])
        else:
            slope = DEAR * low / below
        return self.level * (low + slope * (rows - below))

    def _least(self, i: int, sign: int) -> float:
        """The shape at known[i], or beside[i], made monotone: more rows never cost less."""
        return max(self.shape[sign * k] for k in (self.known if sign > 0 else self.beside)[: i + 1])


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


@dataclass(slots=True)
class Chosen:
    """What was chosen, counted: for how many sequences (each in every step), how many guesses they were allowed in all, how
    often one that had guesses was given none because they do not pay, and how many probes there were."""

    sequences: int = 0
    guesses: int = 0
    off: int = 0
    probes: int = 0


class Control:
    """most: guesses that a plan would have verified for one sequence.  models: names, the target first."""

    def __init__(self, most: int, models: Sequence[str] = ("target",)) -> None:
        self.most = most
        self._models = tuple(models)
        self._costs: dict[int, Costs] = {}
        self._pools: dict[str, Pool] = {}
        self._size = 0
        """Class of the batch size that the last decision was about."""
        self._age = 0
        self._step = 0
        self._timed = False
        """Whether any step has said how long it took; without times everybody gets what the draft likes."""
        self.credit = 0.0
        """Seconds that probes may lose."""
        self.chosen = Chosen()
        self._token_s = 0.0
        """Of plain decoding, for each token, when that was last looked at."""

    # ------------------------------------------------------------------ decisions

    def choose(self, running: Iterable[Request]) -> None:
        """Set `pace.want` of all who run: guesses that may be made for them in the step that is planned now.

        Not asked where no live request has a draft, nor told of steps then: both cost time for each sequence.
        """
        self._step += 1
        mine: list[tuple[Request, Pace, Pool, int]] = []
        size = 0
        for r in running:
            size += r.decoding
            if not r.guessed or r.link is not None:
                continue
            draft = r.stack["draft"]
            pace = self.meet(r)
            if pace.probing:
                pace.probing, pace.want = False, 0
            if r.decoding:
                mine.append((r, pace, self._pool(draft), min(int(draft.guesses), self.most)))
        if mine and self._timed:
            self._age += 1
            if size_class(size) != self._size or self._age >= EVERY:
                self._size, self._age = size_class(size), 0
                self._decide(mine, size)
            self._probe(mine, size)
        self.chosen.sequences += len(mine)
        self.chosen.guesses += sum(pace.want for _, pace, _, _ in mine)

    def meet(self, r: Request) -> Pace:
        """The pace of a sequence; of a new one, that which the last decision gave to others of its draft."""
        if r.pace is None:
            draft = r.stack["draft"]
            most, on = min(int(draft.guesses), self.most), self._pool(draft).on
            r.pace = Pace(most if on < 0 else min(most, on))
        return r.pace

    def _decide(self, mine: Sequence[tuple[Request, Pace, Pool, int]], size: int) -> None:
        costs = self._costs.get(size_class(size), Costs())
        plain = costs(size)
        if plain is None:  # what plain decoding takes has to be known first
            for _, pace, _, _ in mine:
                pace.want = 0
            self._age = EVERY
            return
        hopes: list[float] = []
        for r, pace, pool, _ in mine:
            a = self.hope(pace, pool)
            saves_s = a * plain / size * max(0, r.limit - len(r.context))
            hopes.append(0.0 if self._behind(r) * pool.row(size) > SAVES * saves_s else a)
        was = any(pace.want for _, pace, _, _ in mine)
        guess_s = max(pool.guess(size) for _, _, pool, _ in mine)
        least = size / plain * (STAYS if was else AGAIN)
        soft = [hasattr(r.stack["draft"], "soft") for r, _, _, _ in mine]
        early = [hasattr(r.stack["draft"], "early") for r, _, _, _ in mine]
        trees = [Trait.TREE_MASK in r.stack["draft"].traits.needs for r, _, _, _ in mine]
        beside = all(pool.beside for _, _, pool, _ in mine)
        wants = lengths(
            hopes, [most for _, _, _, most in mine], size, costs, guess_s, least, soft, early, beside, trees
        )
        for pool in {id(pool): pool for _, _, pool, _ in mine}.values():
            pool.on = 0
        for want, (_, pace, pool, _) in zip(wants, mine, strict=True):
            self.chosen.off += pace.want > want == 0
            pace.want = want
            pool.on = max(pool.on, want)

    def _probe(self, mine: Sequence[tuple[Request, Pace, Pool, int]], size: int) -> None:
        """Let one of those without guesses have some, where what may be lost by now covers what it will probably cost."""
        off = [x for x in mine if not x[1].want]
        costs = self._costs.get(size_class(size))
        plain = None if costs is None else costs(size)
        if not off or costs is None or plain is None:
            return
        self.credit += SHARE * plain
        self._token_s = plain / size
        r, pace, pool, most = min(off, key=lambda x: self._turn(x[0], x[1], x[2], size, plain))
        guesses = min(PROBE, most)
        more = costs(size + guesses)
        assert more is not None
        times = 2 if hasattr(r.stack["draft"], "soft") else 1  # soft tokens in one step, and what they said in the next
        draft_s = guesses * pool.guess(size) + self._behind(r) * pool.row(size)
        if hasattr(r.stack["draft"], "early"):
            draft_s += pool.guess(size)
            if pool.beside:  # a step beside which it guesses, and one that verifies
                draft_s = max(SHARE * plain, max(draft_s, costs(size, True) or plain) - plain)
        cost = times * (more - plain) + draft_s
        self.credit = min(self.credit, 2 * cost)
        if self.credit >= cost > 0:
            self.credit -= cost
            self.chosen.probes += 1
            pace.want, pace.probing, pace.probed, pace.lent = guesses, True, self._step, cost

    def _turn(self, r: Request, pace: Pace, pool: Pool, size: int, plain: float) -> tuple[int, int, int]:
        """Who is probed first: who was not for longest.  Where each token that a model has to catch up with costs more than a
        step earns, none who falls behind could ever be paid for: there it is who is least behind, one who came just now."""
        dear = pool.row(size) > SHARE * plain
        return (self._behind(r) if dear else 0), pace.probed, r.rid

    def _behind(self, r: Request) -> int:
        """Tokens that a second model has not computed, but for the newest two, which it never has."""
        if len(self._models) < 2 or r.stack["draft"].model is None:
            return 0
        return max(0, len(r.context) - min(r.planned[1:]) - 2)

    def hope(self, pace: Pace, pool: Pool) -> float:
        """The chance that a guess stands."""
        return min(0.995, (pace.stood + PRIOR * pool.stood / pool.tried) / (pace.tried + PRIOR))

    def _pool(self, draft: Any) -> Pool:
        return self._pools.setdefault(type(draft).__name__, Pool())

    # ------------------------------------------------------------------ facts

    def observe(self, plan: Plan, requests: Sequence[Request], result: StepResult) -> None:
        """Learn from a step.  requests: of each work of the plan."""
        rows = size = following = proposed = 0
        pools: dict[int, Pool] = {}
        decodes, beside = True, result.beside_s > 0
        room = {w.request: w.ahead for w in plan.works if w.model != self._models[0]}
        for work, r, fact in zip(plan.works, requests, result.works, strict=True):
            if work.model != self._models[0]:
                following += len(work.tokens)
                continue
            rows, size = rows + work.passing, size + 1
            decodes = decodes and work.samples and len(work.tokens) == work.guesses + 1
            if r.pace is None or not fact.tokens:
                continue
            pool = self._pool(r.stack["draft"])
            pools[id(pool)] = pool
            early = hasattr(r.stack["draft"], "early") and room.get(work.request, 0) > work.guesses
            if early:
                proposed, pool.beside = max(proposed, room[work.request] - work.guesses + 1), beside
            else:
                proposed = max(proposed, len(fact.draft))
            if r.pace.probing and not (fact.draft or early):
                self.credit += r.pace.lent  # it had nothing to say
            if work.guesses or early:
                self._trial(r.pace, pool, work, fact, early)
        target_s = result.forward_s + result.sample_s - result.draft_s
        if target_s <= 0 or not size:
            return
        self._timed = True
        if decodes:
            self._costs.setdefault(size_class(size), Costs()).add(rows, target_s, beside)
        draft_s = result.beside_s if beside else result.draft_s
        if len(pools) == 1 and draft_s > 0:
            (pool,) = pools.values()
            tree = any(fact.parents for fact in result.works)
            self._drafted(pool, size_class(size), passes(proposed, tree=tree), following - 2 * size, draft_s)

    def _trial(self, pace: Pace, pool: Pool, work: Work, fact: WorkResult, early: bool) -> None:
        """early: and the token that a draft wrote in the place of the target's own, which fell where no guesses follow it."""
        stood = gained = len(fact.tokens) - 1
        tried = float(work.guesses**TREE if work.parents else min(stood + 1, work.guesses))
        if early and stood == work.guesses:
            stood, tried = stood + bool(fact.draft), tried + 1
        for x, kept in ((pace, OWN), (pool, ALL)):
            x.stood = x.stood * kept**tried + stood
            x.tried = x.tried * kept**tried + tried
        if not pace.want:
            self.credit += gained * self._token_s

    def _drafted(self, pool: Pool, size: int, guesses: float, behind: int, seconds: float) -> None:
        """What a draft took: for each guess where its model had little to catch up with, else for each token of that."""
        if guesses and behind <= 4 * size:
            pool.guess_s.setdefault(size, Mean()).add(seconds / guesses)
        elif behind > 16:
            pool.row_s.add(max(0.0, seconds - guesses * pool.guess(size)) / behind)
