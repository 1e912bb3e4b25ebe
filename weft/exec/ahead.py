"""The second model: it catches up with what a plan says and with what was accepted, and then writes ahead for a draft.

A plan's works of that model say which known tokens it has not computed, and how many entries beyond them it may fill.  Every pass
takes the rows of all sequences at once, flattened: first what each has not computed, then one row for each that still guesses.
Sequences go different distances, and no row is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from weft.core import noise
from weft.exec import sampler
from weft.exec.batch import Batch
from weft.exec.gather import Gather
from weft.models.decoder import Decoder
from weft.slots import Ask, Ranked, Translation
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


@dataclass(frozen=True, slots=True)
class Piece:
    """Ids for the second model from entry `start` on.  parents: of a tree, for all of its guesses, of which these are the
    last."""

    request: int
    start: int
    ids: tuple[int, ...]
    parents: tuple[int, ...] = ()

    def work(self, model: str, at: int, take: int, *, samples: bool) -> Work:
        """Of ids [at, at + take)."""
        tree = self.parents[: len(self.parents) - len(self.ids) + at + take] if self.parents else ()
        return Work(
            request=self.request, model=model, rows=((self.start + at, self.start + at + take),),
            tokens=self.ids[at : at + take], samples=samples, guesses=take if tree else 0, parents=tree,
        )  # fmt: skip


class Reader:
    """Carries out a `Translation` between the target's `vocab` ids and those of a decoder on `device`."""

    def __init__(self, translation: Translation, vocab: int, device: torch.device) -> None:
        self._reads, self._vocab = tuple(translation.reads), vocab
        self._own = torch.tensor(translation.own, dtype=torch.int64, device=device)
        self._means = torch.tensor(translation.means, dtype=torch.int64, device=device)

    def rows(self, work: Work) -> Work:
        return msgspec.structs.replace(work, tokens=tuple(self._reads[t] for t in work.tokens))

    def logits(self, own_NV: Tensor) -> Tensor:
        """In the target's ids; what is not shared cannot be drawn."""
        wide = own_NV.new_full((len(own_NV), self._vocab), sampler.NEVER)
        wide[:, self._means] = own_NV[:, self._own]
        return wide


class Ahead:
    """The passes of model `name` in one step.  forward: runs a batch on its decoder, and times it.  reader: of a model with
    another vocabulary.  requests: of these sequences alone."""

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        gather: Gather,
        forward: Callable[[Decoder, Batch], Tensor],
        works: Sequence[Work],
        results: Sequence[WorkResult],
        reader: Reader | None = None,
        requests: Collection[int] | None = None,
    ) -> None:
        self._reader = reader
        self.name, self._decoder, self._gather, self._run = name, decoder, gather, forward
        self.program = decoder.program
        self.followers: dict[int, Follower] = {}
        self._behind: dict[int, Follower] = {}
        """Those with rows that no pass has computed yet."""
        if all(work.model != name for work in works):
            return  # nobody is followed where nobody guesses
        self._kept = torch.tensor(decoder.spec.kept, dtype=torch.int64)
        told = {w.request: fact.tokens for w, fact in zip(works, results, strict=True) if w.model != name and w.samples}
        for i, work in enumerate(works):
            if work.model == name and (requests is None or work.request in requests):
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
        if self._behind:
            self.compute([])
        for f in self.followers.values():
            results[f.at] = msgspec.structs.replace(results[f.at], rows=len(f.ids))

    def compute(self, rows: Sequence[Piece]) -> Tensor:
        """Logits after the last of the ids of each piece, or after all of a tree's, and whatever else is behind.

        Cut into passes that fit the decoder; a sequence's own rows stay in order.
        """
        asked = {piece.request for piece in rows}
        todo = [*rows, *(Piece(r, f.start, f.ids) for r, f in self._behind.items() if r not in asked)]
        self._behind.clear()
        passes: list[list[Work]] = [[]]
        used = samples = 0
        for index, piece in enumerate(todo):
            wanted, at, count = index < len(rows), 0, len(piece.ids)
            while at < count:
                if used == self._decoder.max_rows or (wanted and samples == self._decoder.max_samples):
                    passes.append([])
                    used = samples = 0
                take = min(count - at, self._decoder.max_rows - used)
                if piece.parents:
                    take = min(take, self._decoder.max_samples - samples)
                tell = take if piece.parents else int(wanted and at + take == count)
                passes[-1].append(piece.work(self.name, at, take, samples=tell > 0))
                used, samples, at = used + take, samples + tell, at + take
        found = [self._pass(works, alone=len(passes) == 1) for works in passes if works]
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def _pass(self, works: list[Work], alone: bool) -> Tensor:
        if self._reader is not None:
            works = [self._reader.rows(work) for work in works]
        batch, _ = self._gather.batch(self.name, works, range(len(works)))
        logits = self._run(self._decoder, batch)
        if self._reader is not None:
            return self._reader.logits(logits)
        if self._decoder.spec.kept:  # no others can be drawn
            wide = logits.new_full((len(logits), self._decoder.spec.vocab), sampler.NEVER)
            wide[:, self._kept] = logits
            return wide
        return logits if alone else logits.clone()  # a view of the decoder's buffer, which the next pass overwrites


class Passes(Protocol):
    """What computes rows for guesses, after entries that `followers` tell of."""

    followers: dict[int, Follower]
    program: Any

    def compute(self, rows: Sequence[Piece]) -> Tensor: ...


class Draws:
    """Draws under the asks' own laws.  program: of weft's kernels, or None.  asks: (request, ask)."""

    def __init__(self, program: Any, asks: Sequence[tuple[int, Ask]]) -> None:
        self._program = program
        self._asks = list(asks)

    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: Tensor) -> list[tuple[int, Tensor | None]]:
        if not rows:
            return []
        described = [self._row(self._asks[i][1], guesses) for i, guesses in rows]
        tokens = sampler.draw(logits, described, self._program)
        out: list[tuple[int, Tensor | None]] = []
        for n, (i, _) in enumerate(rows):
            wanted = tokens[n] >= 0 and self._asks[i][1].independent
            out.append((tokens[n], dense_law(logits[n], described[n]) if wanted else None))
        return out

    def rank(
        self, rows: Sequence[tuple[int, Sequence[int]]], logits: Tensor, most: int, salts: Sequence[int] = ()
    ) -> list[Ranked]:
        out: list[Ranked] = []
        for n, (i, guesses) in enumerate(rows):
            own = self._asks[i][1].independent
            row, logits_V = self._row(self._asks[i][1], guesses, salts[n] if salts else 0), logits[n].float().cpu()
            tokens, chances = sampler.ranked(logits_V, row, most, fair=own)
            out.append(Ranked(tokens, chances, dense_law(logits_V, row) if own and tokens else None))
        return out

    def _row(self, ask: Ask, guesses: Sequence[int], salt: int = 0) -> sampler.Row:
        seed = noise.side_seed(ask.seed, DRAFT + salt) if ask.independent else ask.seed
        history = ask.context
        if guesses and sampler.counts(ask.sampling):  # nobody else looks at it, and it is as long as the context
            history = np.concatenate([history, np.array(guesses, np.int64)])
        return sampler.Row(ask.sampling, seed, ask.output + len(guesses), history, ask.prompt)


class Calls(Draws):
    """What a technique whose guesses are computed is given (`slots.Forward`).  ahead: what computes."""

    def __init__(self, ahead: Passes, asks: Sequence[tuple[int, Ask]]) -> None:
        super().__init__(ahead.program, asks)
        self._ahead = ahead
        self._at: list[int | None] = [None] * len(self._asks)
        """Where the next row of each ask is written, once its newest token is computed."""
        self._trees: list[list[int]] = [[] for _ in self._asks]
        """The guess that each computed guess of a tree follows."""

    def __call__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        chosen: list[Piece] = []
        for i, ids in rows:
            request, _ = self._asks[i]
            f, at = self._ahead.followers[request], self._at[i]
            if at is None:
                start, whole = f.start, (*f.ids[:-1], *ids)
            else:
                start, whole = at, tuple(ids)
            self._at[i] = start + len(whole)
            assert start + len(whole) <= f.stop, "a draft wrote beyond its room"
            chosen.append(Piece(request, start, whole))
        return self._ahead.compute(chosen)

    def grow(self, nodes: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> Tensor:
        chosen: list[Piece] = []
        for i, ids, parents in nodes:
            request, _ = self._asks[i]
            start, tree = self._at[i], self._trees[i]
            assert start is not None, "a tree grows from the newest token, which was not computed"
            assert all(p < len(tree) + j for j, p in enumerate(parents)), "a guess follows one that comes before it"
            tree.extend(parents)
            self._at[i] = start + len(ids)
            assert start + len(ids) <= self._ahead.followers[request].stop, "a draft wrote beyond its room"
            chosen.append(Piece(request, start, tuple(ids), tuple(tree)))
        return self._ahead.compute(chosen)


def dense_law(logits_V: Tensor, row: sampler.Row) -> Tensor:
    """The law of a row over the whole vocabulary, float32 [vocab], on the CPU."""
    ids, p = sampler.law(logits_V.float().cpu(), row)
    out = torch.zeros(logits_V.shape[0], dtype=torch.float32)
    out[torch.from_numpy(ids)] = torch.from_numpy(p).float()
    return out
