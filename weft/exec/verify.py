"""From logits to the facts of a step: the draw of every row, which guesses stand, and guesses for the next plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from weft.core import noise
from weft.exec import sampler
from weft.exec.ahead import Ahead
from weft.exec.beside import Beside
from weft.exec.constrain import Masks
from weft.exec.gather import Wanted
from weft.exec.kvpool import KVPool
from weft.exec.mirror import Ints, Mirror, Mirrored
from weft.exec.reading import Reading
from weft.exec.shallow import Shallow
from weft.slots import Ask, Draft, heard, line
from weft.types import GroupKind, KVOp, KVOpKind, TokenLogprob, Work, WorkResult

Probe = Callable[[Mirrored, int, Tensor], None]
"""(the sequence, index of the token in its output, logits [vocab] before any law)"""
GUESSING = "draft"
"""Under this name a sequence's state holds what its draft keeps of it."""
NOT_FINITE = "the model gave a logit that is not a finite number; the checkpoint or its dtype is at fault"


@dataclass(slots=True)
class Verified:
    """One work's rows as the slot `accept` sees them (`slots.Verify`)."""

    guesses: Sequence[int]
    parents: Sequence[int]
    laws: Tensor | None
    rows: Sequence[sampler.Row]
    logits_NV: Tensor
    winners: Sequence[int]
    _laws: dict[int, tuple[Ints, sampler.Floats]] = field(default_factory=dict)

    def winner(self, row: int) -> int:
        return self.winners[row]

    def law(self, row: int) -> tuple[Ints, sampler.Floats]:
        if row not in self._laws:
            self._laws[row] = sampler.law(self.logits_NV[row].float().cpu(), self.rows[row])
        return self._laws[row]

    def warm(self, row: int) -> tuple[Ints, sampler.Floats]:
        own = self.rows[row]
        if own.sampling.temperature > 0.0:
            return self.law(row)
        heated = msgspec.structs.replace(own.sampling, temperature=1.0)
        return sampler.law(self.logits_NV[row].float().cpu(), replace(own, sampling=heated))

    def uniform(self, row: int, token: int, salt: int) -> float:
        own = self.rows[row]
        return noise.uniform(noise.side_seed(own.seed, salt), own.output, token)


class Sampling:
    """Draws, accepts and proposes for the sequences of a mirror.  members: the pool's groups of each model.

    max_guesses: of one sequence that a plan would have verified.  reading: of the target, for drafts that look at it.
    program: of weft's kernels, which draw then.
    """

    def __init__(
        self, mirror: Mirror, pool: KVPool, members: dict[str, list[int]], max_guesses: int, reading: Reading,
        program: Any = None,
    ) -> None:  # fmt: skip
        self._program, self._reading = program, reading
        self.mirror, self.pool, self.groups = mirror, pool, pool.groups
        self._max_guesses = max_guesses
        self._members = members
        self.masks = Masks(mirror)
        self.shallow: Shallow | None = None
        """The target's first layers, where a draft guesses by them."""
        self.beside: Beside | None = None
        """Of drafts that guess while the target verifies, where there is a second model."""
        self.probe: Probe | None = None
        """Called with every row that a token was taken from: who measures a stack reads laws here."""

    def sample(self, works: Sequence[Work], logits_NV: Tensor, wanted: list[Wanted], results: list[WorkResult]) -> None:
        """Put the facts of every work that wanted logits into `results`."""
        rows: list[sampler.Row] = []
        index: list[int] = []
        for w in wanted:
            rows.extend(self._rows(works[w.work], w.sampled))
            index.extend(range(w.first + w.prompt_rows, w.first + w.prompt_rows + w.sampled))
        sampled_NV = (
            logits_NV
            if len(index) == len(logits_NV)
            else logits_NV[torch.tensor(index, dtype=torch.int64, device=logits_NV.device)]
        )
        leads = self._leads(works, wanted)
        self._warp(works, wanted, leads, sampled_NV)
        failed = self.masks.apply(works, wanted, leads, sampled_NV)
        winners, finite = self._draw(sampled_NV, rows, leads)
        sound, at = all(finite), 0
        for w in wanted:
            mine = slice(at, at + w.sampled)
            at += w.sampled
            if w.work in failed:
                results[w.work] = msgspec.structs.replace(failed[w.work], rows=results[w.work].rows)
                continue
            if not sound and not all(finite[i] and finite[leads[i]] for i in range(mine.start, at)):
                results[w.work] = WorkResult(rows=results[w.work].rows, failed=NOT_FINITE)
                continue
            follows = bool(w.sampled) and leads[mine.start] != mine.start
            results[w.work] = self._result(
                works[w.work], w, rows[mine], winners[mine], sampled_NV, mine, logits_NV, follows=follows
            )

    def _leads(self, works: Sequence[Work], wanted: list[Wanted]) -> list[int]:
        """For each sampled row the row whose draw it gets: its own, but linked rows share one, that of the first of them."""
        leads: list[int] = []
        first: dict[int, int] = {}
        for w in wanted:
            link = works[w.work].link
            for _ in range(w.sampled):
                leads.append(len(leads) if link is None else first.setdefault(link, len(leads)))
        return leads

    def _warp(self, works: Sequence[Work], wanted: list[Wanted], leads: list[int], sampled_NV: Tensor) -> None:
        """Put the law of the slot `sample`, where a stack has one, in place of the rows that are drawn from."""
        techniques = [self.mirror.sequences[works[w.work].request].stack.get("sample") for w in wanted]
        if all(technique is None for technique in techniques):
            return
        members: dict[int, list[int]] = {}
        for i, lead in enumerate(leads):
            members.setdefault(lead, []).append(i)
        at = 0
        for w, technique in zip(wanted, techniques, strict=True):
            for i in range(at, at + w.sampled):
                if technique is not None and leads[i] == i and len(members[i]) == 1 + technique.companions:
                    sampled_NV[i] = technique.warp(sampled_NV[members[i]].float())
            at += w.sampled

    def _draw(self, sampled_NV: Tensor, rows: Sequence[sampler.Row], leads: list[int]) -> tuple[list[int], list[bool]]:
        """(token of each row, whether its own logits are finite)."""
        own = [i for i, lead in enumerate(leads) if lead == i]
        if len(own) == len(leads):
            winners = sampler.draw(sampled_NV, rows, self._program) if rows else []
            return winners, [w >= 0 for w in winners]
        drawn = dict(zip(own, sampler.draw(sampled_NV[own], [rows[i] for i in own], self._program), strict=True))
        return [drawn[lead] for lead in leads], sampled_NV.amax(-1).isfinite().tolist()

    def propose(self, works: Sequence[Work], results: list[WorkResult], ahead: Ahead | None = None) -> None:
        """Guesses for the next plan, for every sequence that got a token; each technique is asked once.

        ahead: the second model, for those that guess by it.
        """
        asks: dict[int, tuple[Draft, list[int], list[Ask]]] = {}
        for i, (work, fact) in enumerate(zip(works, results, strict=True)):
            s = self.mirror.sequences[work.request]
            draft: Draft = s.stack["draft"]
            alone = work.link is not None or s.stack.single
            if not draft.guesses or not fact.tokens or work.model != "target" or alone:
                continue
            if not heard(draft, work.want):
                continue
            ask = self._ask(s, work, fact, draft, ahead)
            if ask.context is not None:
                _, at, mine = asks.setdefault(id(draft), (draft, [], []))
                at.append(i)
                mine.append(ask)
        for draft, at, mine in asks.values():
            run: Any = None
            if hasattr(draft, "early"):
                pass  # it has guessed
            elif draft.model is not None and ahead is not None:
                run = ahead.calls([(works[i].request, ask) for i, ask in zip(at, mine, strict=True)])
            elif self.shallow is not None and hasattr(draft, "exits"):
                run = self.shallow.calls([(works[i], results[i], ask) for i, ask in zip(at, mine, strict=True)])
            elif getattr(draft, "states", 0) or getattr(draft, "soft", 0):
                run = self._reading.calls([(works[i].request, ask) for i, ask in zip(at, mine, strict=True)])
            for i, guesses in zip(at, draft.propose(mine, run), strict=True):
                self.mirror.sequences[works[i].request].laws = guesses.laws
                parents = tuple(int(p) for p in guesses.parents)
                assert all(-1 <= p < j for j, p in enumerate(parents)), "a guess follows one that comes before it"
                parents = () if parents == tuple(range(-1, len(parents) - 1)) else parents
                results[i] = msgspec.structs.replace(results[i], draft=tuple(guesses.tokens), parents=parents)

    def _ask(self, s: Mirrored, work: Work, fact: WorkResult, draft: Draft, ahead: Ahead | None) -> Ask:
        context, output = len(work.tokens) - work.guesses, work.output + len(fact.tokens)
        most = min(
            s.sampling.max_tokens - output - 1, self._max_guesses, work.want if work.want >= 0 else self._max_guesses
        )
        early = self.beside if hasattr(draft, "early") else None
        if early is not None:
            pass  # its room was looked at when it began
        elif draft.model is not None:
            most = min(most, 0 if ahead is None else ahead.room(work.request))
        elif hasattr(draft, "exits"):
            most = min(most, Shallow.room(work, fact))
        if fact.tokens[-1] in s.sampling.stop_ids and output > s.sampling.min_tokens:
            most = 0  # it ends here
        known, most = None, max(0, most)
        if heard(draft, most):
            known = np.concatenate([s.tokens[: work.start + context], np.array(fact.tokens, np.int64)])
        state = s.state.setdefault(GUESSING, {})
        assert isinstance(state, dict)
        return Ask(
            known, s.prompt, output, most, s.sampling, s.seed, s.stack["accept"].laws, s.salt, state, s.stale,
            self._reading.of(work.request), self._reading.logits(work.request), self._reading.soft(work.request),
            None if early is None else early.kept(work, fact),
        )  # fmt: skip

    # ------------------------------------------------------------------ rows

    def _rows(self, work: Work, sampled: int) -> list[sampler.Row]:
        s: Mirrored = self.mirror.sequences[work.request]
        base = work.start + len(work.tokens) - sampled + 1
        out = []
        for i in range(sampled):
            history = s.tokens[: base + i]
            if work.parents and i:
                history = self._branch(work, i - 1, s)
            depth = len(history) - base
            output = work.output + depth
            forced = s.forced[output] if output < len(s.forced) else None
            held = s.grammar is not None
            out.append(sampler.Row(s.sampling, s.seed, output, history, s.prompt, forced, held))
        return out

    def _branch(self, work: Work, guess: int, s: Mirrored) -> Ints:
        """History of a guess in a tree: the context, its ancestors and itself."""
        context = len(work.tokens) - work.guesses
        path = [work.tokens[context + j] for j in line(work.parents, guess)]
        return np.concatenate([s.tokens[: work.start + context], np.array(path, np.int64)])

    # ------------------------------------------------------------------ results

    def _result(
        self,
        work: Work,
        w: Wanted,
        rows: Sequence[sampler.Row],
        winners: list[int],
        sampled_NV: Tensor,
        mine: slice,
        logits_NV: Tensor,
        *,
        follows: bool = False,
    ) -> WorkResult:
        """mine: the work's own of sampled_NV; a view of them is dear where nobody looks.

        follows: the draw was another row's.
        """
        s = self.mirror.sequences[work.request]
        context = len(work.tokens) - work.guesses
        told: list[TokenLogprob] = []
        for i in range(w.prompt_rows):
            token = int(s.tokens[work.start + i + 1])
            told.append(sampler.logprobs(logits_NV[w.first + i], max(token, 0), s.sampling.prompt_logprobs))
        if not winners:
            return WorkResult(rows=context, prompt_logprobs=tuple(told))
        tokens, path = [winners[0]], list[int]()
        first = None if self.beside is None or not s.stack["accept"].laws else self.beside.first(work.request)
        if work.guesses or first is not None:
            tokens, path = self._accepted(s, work, rows, winners, sampled_NV[mine], first)
        if work.guesses:
            s.stack["draft"].observe(work.guesses, len(path))
        tokens, ended = self.masks.cut(s, tokens)
        path = path[: len(tokens) - 1] if ended else path
        s.stale = tuple(winners[len(tokens) :]) if not work.parents else ()
        self._reading.settle(work, path, sampled_NV, mine.start)
        if self.probe is not None and not follows:
            for i in [0, *(1 + j for j in path)]:
                self.probe(s, rows[i].output, sampled_NV[mine.start + i])
        straight = path == list(range(len(path)))
        if not straight:
            self._compact(work, context, path)
        chosen: list[TokenLogprob] = []
        if s.sampling.logprobs >= 0:
            at = [0, *(1 + j for j in path)]
            chosen = [sampler.told(sampled_NV[mine.start + i], rows[i], t) for i, t in zip(at, tokens, strict=True)]
        if self.shallow is not None and not follows and straight:
            self.shallow.tell(work.request, w.first + w.prompt_rows, rows, tokens)
        s.write(work.start + context, tokens)  # a plan may speak of later rows before it says these
        return WorkResult(
            rows=context, tokens=tuple(tokens), logprobs=tuple(chosen), prompt_logprobs=tuple(told), ended=ended
        )

    def _accepted(
        self, s: Mirrored, work: Work, rows: Sequence[sampler.Row], winners: list[int], sampled_NV: Tensor,
        first: tuple[int, Tensor] | None,
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """(tokens that stand, accepted guesses in order).  first: a guess behind all of the work's, and its law, of which no row
        was computed: it is weighed as the others are, and where it stands nobody knows what follows it."""
        own, laws = list(work.tokens[len(work.tokens) - work.guesses :]), s.laws
        laws = None if laws is None or not own else laws[: len(own)]
        parents: Sequence[int] = work.parents or range(-1, len(own) - 1)
        guesses = own
        if first is not None and (laws is not None or not own):
            guesses, winners, parents = [*own, first[0]], [*winners, -1], range(-1, len(own))
            laws = first[1][None] if laws is None else torch.cat([laws, first[1][None]])
        tokens, path = s.stack["accept"].accept(Verified(guesses, parents, laws, rows, sampled_NV, winners))
        return (tokens, path) if len(path) <= len(own) else (tokens[:-1], path[:-1])

    def _compact(self, work: Work, context: int, path: list[int]) -> None:
        """Bring the entries of an accepted branch together, right after the context's."""
        s = self.mirror.sequences[work.request]
        for g in self._members[work.model]:
            if self.groups[g].kind is GroupKind.PARKED:
                continue
            size = self.groups[g].block_tokens
            base = self.mirror.entry(work, g) + context
            table = tuple(int(b) for b in s.table(g)[base // size :])
            keep = (*range(base % size), *(base % size + j for j in path))
            self.pool.carry_out(KVOp(KVOpKind.COMPACT, g, table, table, keep))
