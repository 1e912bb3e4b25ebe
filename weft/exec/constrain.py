"""Grammars at work: the rows of a step whose sequences have one are masked, each where its own text has come to.

A sequence's place in its grammar is made of its output tokens, when a row of it is first sampled, and then follows them: what a
step finds in the context is compared with what was taken in, and only the difference is rolled back or taken in.  So forks,
resumed requests, rejected guesses and a search's choices need no word of their own.

Legend.  N: rows.  V: vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weft.errors import EngineError, RequestError
from weft.exec.gather import Wanted
from weft.exec.mirror import Mirror, Mirrored
from weft.slots import Constrain, GrammarPath
from weft.types import Work, WorkResult

OWNER = "constrain"
"""Whose the place is in a sequence's state."""
NOTHING_OR_NEVER = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1, 0.0, -np.inf
).astype(np.float32)
"""What is added to eight logits, by the byte of their bits."""
NOT_ITS = "the output so far is not a beginning of what its grammar allows"


@dataclass(slots=True)
class Place:
    """path: where the sequence stands in its grammar.  taken: the tokens that it has taken in, guesses among them."""

    path: GrammarPath
    taken: list[int] = field(default_factory=list)

    def fork(self) -> Place:
        return Place(self.path.fork(), list(self.taken))

    def go_to(self, tokens: list[int]) -> bool:
        """Stand behind these tokens; False, behind as many as the grammar allows, where it does not allow them all."""
        common = len(self.taken)
        if self.taken != tokens[:common]:
            common = next(
                (i for i, (mine, theirs) in enumerate(zip(self.taken, tokens)) if mine != theirs), len(tokens)
            )
        if common < len(self.taken):
            self.path.rollback(len(self.taken) - common)
            del self.taken[common:]
        if common < len(tokens):
            self.taken += tokens[common : common + self.path.advance(tokens[common:])]
        return len(self.taken) == len(tokens)


class Masks:
    """Masks logits for the sequences of a mirror.  rows, seconds: what was masked since `reset`, and how long it took."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.rows = 0
        self.seconds = 0.0

    def reset(self) -> None:
        self.rows, self.seconds = 0, 0.0

    def apply(
        self, works: Sequence[Work], wanted: Sequence[Wanted], leads: Sequence[int], sampled_NV: Tensor
    ) -> dict[int, WorkResult]:
        """Mask, in place, the rows that a token is drawn from.  Returns what became of the works, by index, that can't go on."""
        failed: dict[int, WorkResult] = {}
        at = 0
        for w in wanted:
            first, at = at, at + w.sampled
            s = self.mirror.sequences[works[w.work].request]
            if s.grammar is None or not w.sampled or leads[first] != first:
                continue
            began = time.perf_counter()
            try:
                self._mask(s, works[w.work], sampled_NV[first:at])
            except EngineError as error:
                failed[w.work] = WorkResult(rows=0, failed=str(error), code=getattr(error, "code", None))
            self.seconds += time.perf_counter() - began
        return failed

    def cut(self, s: Mirrored, tokens: list[int]) -> tuple[list[int], bool]:
        """Tokens up to the first that ends the sequence's grammar, and whether there is one."""
        place = s.state.get(OWNER)
        if s.grammar is not None and isinstance(place, Place):
            for i, token in enumerate(tokens):
                if token in place.path.ends:
                    return tokens[: i + 1], True
        return tokens, False

    def _mask(self, s: Mirrored, work: Work, rows_NV: Tensor) -> None:
        """Row 0 follows the context, row 1 + j guess j.  A guess that its grammar does not allow, or that ends it, is followed by
        nothing: its row is left as it is, and no token is ever taken from it."""
        place = self._place(s)
        context = len(work.tokens) - work.guesses
        before = s.output(work.start + context).tolist()
        if not place.go_to(before):
            raise RequestError(NOT_ITS)
        self._write(place, rows_NV[0])
        dead: set[int] = set()
        for j in range(work.guesses):
            parent = work.parents[j] if work.parents else j - 1
            line = self._line(work, context, j)
            if parent in dead or place.path.ends & set(line) or not place.go_to([*before, *line]):
                dead.add(j)
            else:
                self._write(place, rows_NV[1 + j])

    def _place(self, s: Mirrored) -> Place:
        place = s.state.get(OWNER)
        if not isinstance(place, Place):
            constrain: Constrain = s.stack["constrain"]
            assert s.grammar is not None
            place = s.state[OWNER] = Place(constrain.begin(s.grammar))
        return place

    def _line(self, work: Work, context: int, guess: int) -> list[int]:
        """Tokens of a guess and of those before it, the first one first."""
        if not work.parents:
            return list(work.tokens[context : context + guess + 1])
        line: list[int] = []
        while guess >= 0:
            line.append(work.tokens[context + guess])
            guess = work.parents[guess]
        return line[::-1]

    def _write(self, place: Place, row_V: Tensor) -> None:
        write_mask(place.path, row_V)
        self.rows += 1


def write_mask(path: GrammarPath, row_V: Tensor) -> None:
    """Put -inf in place of the logits whose ids may not follow."""
    bits, vocab = np.frombuffer(path.mask(), np.uint8), row_V.shape[0]
    added = NOTHING_OR_NEVER.take(bits[: -(-vocab // 8)], axis=0).reshape(-1)[:vocab]
    if len(added) < vocab:
        added = np.pad(added, (0, vocab - len(added)), constant_values=-np.inf)
    if row_V.device.type == "cpu" and row_V.dtype == torch.float32:
        np.add(row_V.numpy(), added, out=row_V.numpy())  # three times as fast as torch's own
    else:
        row_V.add_(torch.from_numpy(added).to(row_V.device, row_V.dtype))
