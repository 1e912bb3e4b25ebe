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

    C   a level times a shape by rows, for each class of batch size, and a shape for steps with a draft beside them; what a class
        has not seen is reckoned from what others have (`core.prices`)
    D   seconds of a guess, for each draft and class of batch size, and of a token that a second model has to catch up with
    a   successes over trials of the sequence, forgotten slowly, with `PRIOR` trials of all sequences of that draft before them

What guessing must promise grows with the batch (`RAGGED`), and while it goes on a step without is looked at now and then, since
nothing else tells what such steps take today: so seldom that looking costs `LOOKS` of the speed.  Where it did not bring what it
promised, more than `ALONE` sequences do without for a while, each time for longer (`Costs.kept`).

A sequence that gets no guesses is not followed by the second model.  It is probed now and then: of the time that goes by, `SHARE`
may be lost to probes, what they gained counted back; and as much again, of the rest of its answer, to catching up where each
token of that is dear, at distances that double.  A draft that has nothing to say costs what asking it takes (`ASKED`).

What was chosen stands while the same sequences decode, nothing was guessed that had been tried, and no probe can be paid for:
such steps are not looked at one sequence after the other (`_stands`).

Of a tree a is what its guesses brought, over the power of their number with which that grows (`lengths.gain`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from weft.core.lengths import TREE, passes, promising
from weft.core.prices import PRIOR, WORST, Costs, Mean, Pool, Prices, size_class
from weft.core.request import Pace, Request
from weft.traits import Trait
from weft.types import Plan, StepResult, Work, WorkResult

EVERY, WAIT = 4, 16
"""Steps between two decisions about a batch of one size; the same where nobody has guesses and nothing was tried since the last,
and steps at most until it is asked again whether a probe can be paid for."""
AGAIN, STAYS = 1.1, 1.05
"""What guessing must promise, of plain decoding's speed, to be turned on again, and to stay on.  The lengths that promise most
are those whose times came out too short."""
RAGGED = 0.03
"""So much more for each doubling of the batch: sequences that guess end at different times, and the smaller batches that they
leave bring fewer tokens for nearly the same time.  Eight answers of 48 tokens went 1.28 times as fast as plain decoding until
the first of them had ended, and 1.10 times in all; sixteen 1.08 and 0.96."""
ALONE = 4
"""Sequences up to which promises are believed: a few steps of so few say little of what guesses bring."""
LOOKS, SOON, LATE = 0.005, 16, 256
"""Of the speed, to see what steps without guesses take; the fewest and most steps between."""
SHARE = 0.01
PROBE = 2
"""Guesses of a probe."""
ASKED = 8
"""Where a draft that is probed has nothing to say, so many times what asking took are counted: choosing whom to ask and planning
take longer than what is timed, and a third of `SHARE` is enough for silence."""
FAR = 32
"""Tokens at the least that a sequence is behind when dear catching up is paid from the rest of its answer."""
OWN, ALL = 0.96, 0.99
"""What a trial leaves of those before it: of the sequence's own, and of all sequences of a draft."""
SAVES = 0.25
"""Catching up may cost so much of the time that guesses could save over the rest of the answer."""


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
        self._every = Costs()
        """Of all classes."""
        self._pools: dict[str, Pool] = {}
        self._size = 0
        """Class of the batch size that the last decision was about."""
        self._age = 0
        self._step = 0
        self._timed = False
        """Whether any step has said how long it took; without times everybody gets what the draft likes."""
        self._met = self._silent = self._looking = False
        """Whether a sequence was met; whether the last step told no time; whether guesses are left out to see what that takes."""
        self._gain = 1.0
        """What guessing promised at the last decision for it, of plain decoding's speed."""
        self.credit = 0.0
        """Seconds that probes may lose."""
        self._asked = 0.0
        """Seconds that the newest probe was thought to take."""
        self._poor = self._fresh = 0
        """Steps in which no probe can be paid for; sequences that were met since the last decision."""
        self.chosen = Chosen()
        self._token_s = self._plain_s = 0.0
        """Of plain decoding, for each token and each step, when that was last looked at."""
        self._ran: list[Request] = []
        """Who ran at the last choice, where all of them decode and it may stand; else nobody."""
        self._wanted, self._all, self._quiet = 0, False, False
        """Guesses that it allowed; whether to everyone; whether the newest step has none, as the one before it."""
        self._tried = True
        """Whether the last decision gave guesses, or some were tried since."""

    # ------------------------------------------------------------------ decisions

    def choose(self, running: Iterable[Request]) -> None:
        """Set `pace.want` of all who run: guesses that may be made for them in the step that is planned now.

        Not asked where no live request has a draft, nor told of steps then: both cost time for each sequence.
        """
        self._step += 1
        ran = list(running)
        self._quiet = False
        if self._stands(ran):
            return
        mine: list[tuple[Request, Pace, Pool, int]] = []
        size = 0
        for r in ran:
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
            if size_class(size) != self._size or self._age >= self._often:
                self._size, self._age, self._poor, self._fresh = size_class(size), 0, 0, 0
                self._decide(mine, size)
                self._tried = any(pace.want for _, pace, _, _ in mine)
            self._probe(mine, size)
        elif self._silent:
            for _, pace, _, most in mine:
                pace.want = most
        wants = [pace.want for _, pace, _, _ in mine]
        self._wanted, self._all = sum(wants), all(wants)
        self.chosen.sequences += len(mine)
        self.chosen.guesses += self._wanted
        steady = len(mine) == size == len(ran) and self._timed and not self._looking
        self._ran = ran if steady and not any(pace.probing for _, pace, _, _ in mine) else []

    @property
    def _often(self) -> int:
        """Steps between two decisions now."""
        return EVERY if self._tried or self._fresh else WAIT

    def _stands(self, ran: list[Request]) -> bool:
        """Whether to choose anew would change nothing: then only what is counted goes on."""
        if not self._ran or self._age + 1 >= self._often or not (self._poor or self._all) or self._ran != ran:
            return False
        self._age += 1
        if not self._all:
            self._poor -= 1
            self.credit += SHARE * self._plain_s
        self._quiet = not self._wanted
        self.chosen.sequences += len(ran)
        self.chosen.guesses += self._wanted
        return True

    def meet(self, r: Request) -> Pace:
        """The pace of a sequence; of a new one, that which the last decision gave to others of its draft, as long as the batch is
        about that of then.  Before the first decision one sequence guesses as its draft likes; what rows of many cost has to be
        known first."""
        if r.pace is None:
            draft = r.stack["draft"]
            most, on = min(int(draft.guesses), self.most), self._pool(draft).on
            if on < 0:
                on = 0 if self._met else most
            elif self._fresh > self._size // 2:
                on = 0
            r.pace, self._met = Pace(min(most, on)), True
            self._fresh += 1
        return r.pace

    def _prices(self, size: int) -> Prices:
        kind = size_class(size)
        if kind not in self._costs:
            self._costs[kind] = Costs()
        return Prices(self._costs[kind], self._every)

    def _decide(self, mine: Sequence[tuple[Request, Pace, Pool, int]], size: int) -> None:
        prices, was = self._prices(size), self._looking or any(pace.want for _, pace, _, _ in mine)
        plain = prices(size)
        often = min(LATE, max(SOON, round((self._gain - 1) / LOOKS)))
        self._looking = plain is not None and was and not self._looking and prices.own.since(size) >= often
        if plain is None or self._looking:  # what plain decoding takes has to be known first
            for _, pace, _, _ in mine:
                pace.want = 0
            prices.own.looked, self._age = prices.own.steps, WAIT
            return
        ragged = RAGGED * math.log2(size)
        kept, hopes = size <= ALONE or prices.own.kept(size, 1 + ragged), list[float]()
        for r, pace, pool, _ in mine:
            a = self.hope(pace, pool) if kept else 0.0
            if behind := self._behind(r):
                saves_s = a * plain / size * max(0, r.limit - len(r.context))
                a = 0.0 if behind * pool.row(size) > SAVES * saves_s else a
            hopes.append(a)
        pools = {id(pool): pool for _, _, pool, _ in mine}.values()
        guess_s = max(pool.guess(size) for pool in pools)
        least = (STAYS if was else AGAIN) + ragged
        drafts = [r.stack["draft"] for r, _, _, _ in mine]
        kinds = {
            key: (hasattr(d, "soft"), hasattr(d, "early"), Trait.TREE_MASK in d.traits.needs)
            for key, d in {id(d): d for d in drafts}.items()
        }
        soft, early, trees = zip(*(kinds[id(d)] for d in drafts), strict=True)
        beside = all(pool.beside for pool in pools)
        most = [most for _, _, _, most in mine]
        wants, rate = promising(hopes, most, size, prices, guess_s, least * size / plain, soft, early, beside, trees)
        self._gain = rate * plain / size
        for pool in pools:
            pool.on = 0
        for want, (_, pace, pool, _) in zip(wants, mine, strict=True):
            self.chosen.off += pace.want > want == 0
            pace.want = want
            pool.on = max(pool.on, want)

    def _probe(self, mine: Sequence[tuple[Request, Pace, Pool, int]], size: int) -> None:
        """Let one of those without guesses have some, where what may be lost by now covers what it will probably cost."""
        if self._looking:
            return
        prices = self._prices(size)
        plain = prices(size)
        self._plain_s = plain or 0.0
        off = [] if plain is None or self._poor else [x for x in mine if not x[1].want]
        if plain is not None and (off or (self._poor and not all(x[1].want for x in mine))):
            self.credit += SHARE * plain
        self._poor = max(0, self._poor - 1)
        if not off or plain is None:
            return
        self._token_s = plain / size
        r, pace, pool, most = min(off, key=lambda x: self._turn(x[0], x[1], x[2], size, plain))
        guesses = min(PROBE, most)
        more = prices(size + guesses)
        if more is None:  # a batch that has just grown: its own steps will tell
            return
        times = 2 if hasattr(r.stack["draft"], "soft") else 1  # soft tokens in one step, and what they said in the next
        behind_s, own_s = self._behind(r) * pool.row(size), 0.0
        if pool.row(size) > SHARE * plain and self._behind(r) >= max(FAR, 2 * pace.caught):
            rest_s = SHARE * plain / size * max(0, r.limit - len(r.context))
            own_s = behind_s if behind_s <= rest_s - pace.owed else 0.0
        draft_s = guesses * pool.guess(size) + behind_s - own_s
        if hasattr(r.stack["draft"], "early"):
            draft_s += pool.guess(size)
            if pool.beside:  # a step beside which it guesses, and one that verifies
                draft_s = max(SHARE * plain, max(draft_s, prices(size, True) or plain) - plain)
        cost = times * (more - plain) + draft_s
        self.credit = min(self.credit, 2 * cost)
        if self.credit >= cost > 0:
            self.credit -= cost
            self.chosen.probes += 1
            self._asked = cost + own_s
            pace.want, pace.probing, pace.probed, pace.lent = guesses, True, self._step, pace.lent + self._asked
            if own_s:
                pace.owed, pace.caught = pace.owed + own_s, self._behind(r)
        else:
            self._poor = min(WAIT, int((cost - self.credit) / (SHARE * plain)))

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
        name = type(draft).__name__
        if name not in self._pools:
            self._pools[name] = Pool()
        return self._pools[name]

    # ------------------------------------------------------------------ facts

    def observe(self, plan: Plan, requests: Sequence[Request], result: StepResult) -> None:
        """Learn from a step.  requests: of each work of the plan."""
        if self._quiet and plan.rows == plan.samples == len(plan.works) == len(self._ran):
            self._plainly(result, plan.rows)
            return
        rows = size = following = proposed = wanted = tokens = 0
        lent = 0.0
        pools: dict[int, Pool] = {}
        decodes, beside, probe = True, result.beside_s > 0, False
        room = {w.request: w.ahead for w in plan.works if w.model != self._models[0]}
        for work, r, fact in zip(plan.works, requests, result.works, strict=True):
            if work.model != self._models[0]:
                following += len(work.tokens)
                continue
            rows, size, tokens = rows + work.passing, size + 1, tokens + len(fact.tokens)
            decodes = decodes and work.samples and len(work.tokens) == work.guesses + 1
            if r.pace is None or not fact.tokens:
                continue
            pool = self._pool(r.stack["draft"])
            pools[id(pool)] = pool
            probe = probe or bool(work.guesses or fact.draft)
            wanted += r.pace.want > 0 and not r.pace.probing
            early = hasattr(r.stack["draft"], "early") and room.get(work.request, 0) > work.guesses
            if early:
                proposed, pool.beside = max(proposed, room[work.request] - work.guesses + 1), beside
            else:
                proposed = max(proposed, len(fact.draft))
            if r.pace.probing and not (fact.draft or early):  # it had nothing to say
                asked_s = min(ASKED * result.draft_s, WAIT * SHARE * self._plain_s)
                self.credit, self._poor, r.pace.lent = self.credit + r.pace.lent - asked_s, 0, 0.0
            if work.guesses or early:
                self._trial(r.pace, pool, work, fact, early)
                if work.guesses and not (r.pace.want and not r.pace.probing):
                    lent, r.pace.lent = lent + r.pace.lent, 0.0
        target_s = result.forward_s + result.sample_s - result.draft_s
        self._silent = target_s <= 0
        if self._silent or not size:
            return
        self._timed = True
        if not decodes:
            self._ran = []
        if decodes:
            own = self._prices(size).own
            for costs in (own, self._every):
                costs.add(rows, target_s, beside)
            if rows == size:
                own.plain_s.add(target_s)
            elif wanted:
                own.tokens.add(tokens)
                own.seconds.add(target_s + (0.0 if beside else result.draft_s))
        if probe and not wanted and decodes:
            self._bill(target_s + result.draft_s, size, lent)
        draft_s = result.beside_s if beside else result.draft_s
        if len(pools) == 1 and draft_s > 0:
            (pool,) = pools.values()
            tree = any(fact.parents for fact in result.works)
            self._drafted(pool, size_class(size), passes(proposed, tree=tree), following - 2 * size, draft_s)

    def _plainly(self, result: StepResult, rows: int) -> None:
        """Learn from a step in which each of so many sequences had one row and no guesses."""
        target_s = result.forward_s + result.sample_s - result.draft_s
        self._silent = target_s <= 0
        if self._silent:
            return
        own = self._prices(rows).own
        for costs in (own, self._every):
            costs.add(rows, target_s, result.beside_s > 0)
        own.plain_s.add(target_s)

    def _bill(self, seconds: float, size: int, lent: float) -> None:
        """A probe has made its guesses, or they were verified: it costs what the step took beyond plain decoding, and what it was
        thought to cost is given back, once that is known."""
        plain = self._prices(size)(size)
        if plain is not None:
            self.credit += lent - max(-self._asked, min(WORST * self._asked, seconds - plain))

    def _trial(self, pace: Pace, pool: Pool, work: Work, fact: WorkResult, early: bool) -> None:
        """early: and the token that a draft wrote in the place of the target's own, which fell where no guesses follow it."""
        self._tried = True
        stood = gained = len(fact.tokens) - 1
        tried = float(work.guesses**TREE if work.parents else min(stood + 1, work.guesses))
        if early and stood == work.guesses:
            stood, tried = stood + bool(fact.draft), tried + 1
        for x, kept in ((pace, OWN), (pool, ALL)):
            x.stood = x.stood * kept**tried + stood
            x.tried = x.tried * kept**tried + tried
        if gained and not pace.want:
            self.credit, self._poor = self.credit + gained * self._token_s, 0

    def _drafted(self, pool: Pool, size: int, guesses: float, behind: int, seconds: float) -> None:
        """What a draft took: for each guess where its model had little to catch up with, else for each token of that."""
        if guesses and behind <= 4 * size:
            pool.guess_s.setdefault(size, Mean()).add(seconds / guesses)
        elif behind > 16:
            pool.row_s.add(max(0.0, seconds - guesses * pool.guess(size)) / behind)
