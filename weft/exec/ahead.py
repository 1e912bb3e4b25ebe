"""The second model: it catches up with what a plan says and with what was accepted, and then writes ahead for a draft.

A plan's works of that model say which known tokens it has not computed, and how many entries beyond them it may fill.  Every pass
takes the rows of all sequences at once, flattened: first what each has not computed, then one row for each that still guesses.
Sequences go different distances, and no row is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from weft.core import noise
from weft.exec import sampler
from weft.exec.batch import Batch
from weft.exec.gather import Gather
from weft.models.decoder import Decoder
from weft.slots import Ask
from weft.types import Work, WorkResult

DRAFT = 1 << 20
"""Salt of the noise that independent guesses are drawn by, far from those of the slot `accept`."""


@dataclass(slots=True)
class Follower:
    """One sequence on the second model.

    work: the plan's, with index `at` in it.  ids: what it has not computed, from position `start` on, the newest token last where
    the work may go ahead.  stop: position that it may not reach.
    """

    work: Work
    at: int
    start: int
    ids: tuple[int, ...]
    stop: int


class Ahead:
    """The passes of model `name` in one step.  forward: runs a batch on its decoder, and times it."""

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        gather: Gather,
        forward: Callable[[Decoder, Batch], Tensor],
        works: Sequence[Work],
        results: Sequence[WorkResult],
    ) -> None:
        self.name, self._decoder, self._gather, self._run = name, decoder, gather, forward
        self.program = decoder.program
        self._kept = torch.tensor(decoder.spec.kept, dtype=torch.int64)
        told = {w.request: fact.tokens for w, fact in zip(works, results, strict=True) if w.model != name and w.samples}
        self.followers: dict[int, Follower] = {}
        self._behind: dict[int, Follower] = {}
        """Those with rows that no pass has computed yet."""
        for i, work in enumerate(works):
            if work.model == name:
                more = told.get(work.request, ())
                ids = (*work.tokens, *more) if len(more) <= work.ahead else work.tokens
                f = Follower(work, i, work.start, ids, work.start + len(work.tokens) + work.ahead)
                self.followers[work.request] = f
                if ids:
                    self._behind[work.request] = f

    def room(self, request: int) -> int:
        """Guesses that the sequence's entries have room for: all but the last are computed, after the newest token."""
        f = self.followers.get(request)
        if f is None or f.work.ahead < 1 or len(f.ids) == len(f.work.tokens):
            return 0
        return f.stop - f.start - len(f.ids) + 1

    def calls(self, asks: Sequence[tuple[int, Ask]]) -> Calls:
        """The second model as a technique sees it, for (request, ask) of its own."""
        return Calls(self, asks)

    def settle(self, results: list[WorkResult]) -> None:
        """Compute what nobody asked for, and say how far each sequence came."""
        self.compute([])
        for f in self.followers.values():
            results[f.at] = msgspec.structs.replace(results[f.at], rows=len(f.ids))

    def compute(self, rows: Sequence[tuple[int, int, tuple[int, ...]]]) -> Tensor:
        """Logits after the last of the ids of each (request, first position, ids), and whatever else is behind.

        Cut into passes that fit the decoder; a sequence's own rows stay in order.
        """
        asked = {request for request, _, _ in rows}
        todo = [*rows, *((r, f.start, f.ids) for r, f in self._behind.items() if r not in asked)]
        self._behind.clear()
        passes: list[list[Work]] = [[]]
        used = samples = 0
        for index, (request, start, ids) in enumerate(todo):
            wanted = index < len(rows)
            at = 0
            while at < len(ids):
                if used == self._decoder.max_rows or (wanted and samples == self._decoder.max_samples):
                    passes.append([])
                    used = samples = 0
                take = min(len(ids) - at, self._decoder.max_rows - used)
                last = at + take == len(ids)
                passes[-1].append(
                    Work(
                        request=request,
                        model=self.name,
                        rows=((start + at, start + at + take),),
                        tokens=tuple(ids[at : at + take]),
                        samples=wanted and last,
                    )
                )
                used, samples, at = used + take, samples + (wanted and last), at + take
        found = [self._pass(works, alone=len(passes) == 1) for works in passes if works]
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def _pass(self, works: list[Work], alone: bool) -> Tensor:
        batch, _ = self._gather.batch(self.name, works, range(len(works)))
        logits = self._run(self._decoder, batch)
        if self._decoder.spec.kept:  # no others can be drawn
            wide = logits.new_full((len(logits), self._decoder.spec.vocab), sampler.NEVER)
            wide[:, self._kept] = logits
            return wide
        return logits if alone else logits.clone()  # a view of the decoder's buffer, which the next pass overwrites


class Calls:
    """What a technique of the slot `draft` is given (`slots.Forward`).  asks: (request, ask)."""

    def __init__(self, ahead: Ahead, asks: Sequence[tuple[int, Ask]]) -> None:
        self._ahead = ahead
        self._asks = list(asks)
        self._at: list[int | None] = [None] * len(self._asks)
        """Position of the next row of each ask, once its newest token is computed."""

    def __call__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        chosen: list[tuple[int, int, tuple[int, ...]]] = []
        for i, ids in rows:
            request, _ = self._asks[i]
            f, at = self._ahead.followers[request], self._at[i]
            if at is None:
                start, whole = f.start, (*f.ids[:-1], *ids)
            else:
                start, whole = at, tuple(ids)
            self._at[i] = start + len(whole)
            assert start + len(whole) <= f.stop, "a draft wrote beyond its room"
            chosen.append((request, start, whole))
        return self._ahead.compute(chosen)

    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: Tensor) -> list[tuple[int, Tensor | None]]:
        if not rows:
            return []
        described = [self._row(self._asks[i][1], guesses) for i, guesses in rows]
        tokens = sampler.draw(logits, described, self._ahead.program)
        out: list[tuple[int, Tensor | None]] = []
        for n, (i, _) in enumerate(rows):
            wanted = tokens[n] >= 0 and self._asks[i][1].independent
            out.append((tokens[n], dense_law(logits[n], described[n]) if wanted else None))
        return out

    def _row(self, ask: Ask, guesses: Sequence[int]) -> sampler.Row:
        seed = noise.side_seed(ask.seed, DRAFT) if ask.independent else ask.seed
        history = np.concatenate([ask.context, np.array(guesses, np.int64)]) if guesses else ask.context
        return sampler.Row(ask.sampling, seed, ask.output + len(guesses), history, ask.prompt)


def dense_law(logits_V: Tensor, row: sampler.Row) -> Tensor:
    """The law of a row over the whole vocabulary, float32 [vocab], on the CPU."""
    ids, p = sampler.law(logits_V.float().cpu(), row)
    out = torch.zeros(logits_V.shape[0], dtype=torch.float32)
    out[torch.from_numpy(ids)] = torch.from_numpy(p).float()
    return out
