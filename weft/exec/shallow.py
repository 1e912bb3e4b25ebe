"""The target's first layers as a draft: they run ahead in the target's own cache, and the pass that verifies computes all anew.

What they write are entries that the plan granted beyond the works' rows (`Work.ahead`).  The first layers of an entry are the
same whoever computes them, and the others are nobody's before the row was verified.

While the target computes a step, the hidden states after each exit are kept of the rows that sample: the head says of them what
an exit there would have guessed, with no layer computed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from weft.exec import sampler
from weft.exec.ahead import Calls, Follower, Piece
from weft.exec.batch import Batch
from weft.exec.gather import Gather
from weft.exec.kvpool import KVPool
from weft.models.decoder import Decoder
from weft.slots import Ask
from weft.types import Work, WorkResult


class Shallow:
    """exits: after how many layers.  forward: runs a batch through so many first layers, timed; hidden states [T, width]."""

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        gather: Gather,
        pool: KVPool,
        exits: Sequence[int],
        forward: Callable[[Batch, int], Tensor],
    ) -> None:
        self.name, self.exits, self.program = name, tuple(exits), decoder.program
        self._decoder, self._gather, self._pool, self._run = decoder, gather, pool, forward
        self.exit = self.exits[0]
        """Where the passes end that are asked for now."""
        self.look = self._looks = False
        """Whether the next step is to keep what shadow tokens are made of, and whether this one does."""
        self.followers: dict[int, Follower] = {}
        self._kept: dict[int, Tensor] = {}
        """By exit, [N, width]: of the rows of logits of the target's newest pass."""
        self._told: dict[int, tuple[int, list[sampler.Row], list[int]]] = {}
        """By sequence: where its rows begin among those, what they are drawn by, and which token stood after each."""

    @property
    def layers(self) -> int:
        return len(self._decoder.spec.layers)

    def reset(self) -> None:
        """A new step begins."""
        self._kept, self._told = {}, {}
        self._looks, self.look = self.look, False

    def watched(self, batch: Batch) -> Tensor:
        """As `Decoder.forward`, and what stands at the exits is kept where that was asked for."""
        decoder, at = self._decoder, 0
        if not self._looks:
            return decoder.forward(batch, self._pool)
        rows_N = batch.logit_rows_N
        step = decoder.begin(batch, self._pool, 0, self.layers)
        for exit in self.exits:
            hidden = decoder.advance(step, at, exit)
            self._kept[exit], at = hidden[rows_N].clone(), exit
        return decoder.logits(batch, self._pool, decoder.advance(step, at, self.layers))

    def tell(self, request: int, first: int, rows: Sequence[sampler.Row], tokens: Sequence[int]) -> None:
        """What stood after each of a sequence's rows, as many as there are tokens."""
        self._told[request] = first, list(rows[: len(tokens)]), list(tokens)

    @staticmethod
    def room(work: Work, fact: WorkResult) -> int:
        """Guesses that the sequence's entries have room for: all but the last are computed, after the newest token."""
        return max(0, work.ahead + work.guesses + 1 - len(fact.tokens))

    def calls(self, asks: Sequence[tuple[Work, WorkResult, Ask]]) -> FirstLayers:
        """As a technique sees it, for the works of its own that got tokens."""
        for i, (work, fact, _) in enumerate(asks):
            start = work.start + len(work.tokens) - work.guesses + len(fact.tokens) - 1
            newest = (fact.tokens[-1],)
            self.followers[work.request] = Follower(work, i, start, newest, start + self.room(work, fact))
        return FirstLayers(self, [(work.request, ask) for work, _, ask in asks])

    def compute(self, rows: Sequence[Piece]) -> Tensor:
        """Logits after the last of the ids of each piece, of the layers up to the exit."""
        works = [piece.work(self.name, 0, len(piece.ids), samples=True) for piece in rows]
        batch, _ = self._gather.batch(self.name, works, range(len(works)))
        return self._decoder.predict(self._run(batch, self.exit)[batch.logit_rows_N])

    def shadows(self, request: int) -> dict[int, list[bool]]:
        """By exit, of each row that the target sampled for a sequence: whether an exit there would have guessed what stood."""
        if request not in self._told or not self._kept:
            return {}
        first, rows, tokens = self._told[request]
        hidden = torch.cat([kept[first : first + len(rows)] for kept in self._kept.values()])
        drawn = sampler.draw(self._decoder.predict(hidden), rows * len(self._kept), self.program)
        said = [[a == b for a, b in zip(drawn[i:], tokens)] for i in range(0, len(drawn), len(rows))]
        return dict(zip(self._kept, said, strict=True))


class FirstLayers(Calls):
    """What a technique with `exits` is given (`slots.Forward`, with `layers`, `exit` and `shadows`)."""

    def __init__(self, own: Shallow, asks: Sequence[tuple[int, Ask]]) -> None:
        super().__init__(own, asks)
        self._own = own

    @property
    def layers(self) -> int:
        return self._own.layers

    @property
    def exit(self) -> int:
        return self._own.exit

    @exit.setter
    def exit(self, layers: int) -> None:
        assert layers in self._own.exits, (
            f"the technique named the exits {self._own.exits}, and {layers} is none of them"
        )
        self._own.exit = layers

    @property
    def look(self) -> bool:
        return self._own.look

    @look.setter
    def look(self, wanted: bool) -> None:
        self._own.look = wanted

    def shadows(self, ask: int) -> Mapping[int, Sequence[bool]]:
        return self._own.shadows(self._asks[ask][0])
