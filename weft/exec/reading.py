"""What a draft may read of the target: the hidden states of a step's rows, its embeddings and its head.

States are kept from a pass until its step's guesses are made, and of sequences alone whose draft asks for them (`states`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from weft.exec.ahead import Draws
from weft.exec.batch import Batch
from weft.exec.mirror import Mirror
from weft.exec.vocabulary import VocabularyShelf
from weft.models.decoder import Decoder
from weft.ops.cpu.panels import Panels
from weft.slots import Ask, Target, Vocabulary, heard
from weft.types import Work

T = TypeVar("T")
ROWS = 64
"""Embeddings that are looked up at a time."""


class Read:
    """A decoder as a draft sees it (`slots.Target`)."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._table = decoder, decoder.tensors["embed"]
        spec = decoder.spec
        self.width, self.vocab = spec.width, spec.vocab
        if isinstance(self._table, Panels):
            self._out = torch.empty(ROWS, spec.width)
            self._program = self._table.module.Program(1, "portable")
            self._program.embed(self._table.weight, spec.embedding_scale, self._out.data_ptr(), spec.width)

    def embed(self, ids: Sequence[int]) -> Tensor:
        tokens = torch.tensor(ids, dtype=torch.int64)
        if not isinstance(self._table, Panels):
            return self._table[tokens.to(self._table.device)].float() * self._decoder.spec.embedding_scale
        found = []
        for part in tokens.split(ROWS):
            step = self._table.module.Step()
            step.rows(len(part), part.data_ptr(), 0, 0, 0, 0, 0, 0)
            self._program.run(0, 1, step)
            found.append(self._out[: len(part)].clone())
        return torch.cat(found) if found else self._out[:0]

    def predict(self, states: Tensor) -> Tensor:
        return self._decoder.predict(states)

    def rows(self, ids: Sequence[int]) -> Tensor:
        spec, tensors = self._decoder.spec, self._decoder.tensors
        head = tensors["embed" if spec.tied else "head"]
        found = head.unpacked(ids) if isinstance(head, Panels) else head[torch.tensor(ids, device=head.device)]
        return found.float() * (tensors["norm"].float() + spec.norm_offset)


class Reading:
    """States of one step, and the calls of the drafts that read them.  decoder: of the target."""

    def __init__(self, mirror: Mirror, decoder: Decoder) -> None:
        self._mirror, self._decoder = mirror, decoder
        self.target = Read(decoder)
        self._rows: dict[int, Tensor] = {}
        """By sequence: of the last of its context's rows, and behind them its guesses'."""

        self._logits: dict[int, Tensor] = {}
        self._soft: dict[int, Tensor] = {}
        """By sequence: of its soft tokens, as the last layer gives them."""

    def reset(self) -> None:
        self._rows.clear()
        self._soft.clear()
        self._logits.clear()

    def take(self, batch: Batch, works: Sequence[Work], mine: Sequence[int]) -> None:
        """Keep what is asked for of a batch that has just passed the last layer."""
        sampled = 0
        for k, i in enumerate(mine):
            work = works[i]
            sampled += work.prompt_rows + (min(len(work.tokens), 1 + work.guesses) if work.samples else 0)
            draft = self._mirror.sequences[work.request].stack["draft"]
            asked = int(getattr(draft, "states", 0)) if heard(draft, work.want) else 0
            if asked and work.samples and work.link is None:
                context = len(work.tokens) - work.guesses
                first = batch.bounds[k] + max(0, context - asked)
                rows = batch.bounds[k + 1] - first
                if rows == 1 + work.guesses:  # as in every step behind the prompt: the head has normed them
                    self._rows[work.request] = self._decoder.picked(sampled - rows, sampled)
                else:
                    self._rows[work.request] = self._decoder.states(first, batch.bounds[k + 1])
            if work.soft:
                first = batch.bounds[k] + len(work.tokens)
                self._soft[work.request] = self._decoder.states(first, batch.bounds[k + 1], normed=False)

    def settle(self, work: Work, path: Sequence[int], logits_NV: Tensor, first: int) -> None:
        """Of the guesses' rows, those of `path` stand.  logits_NV: that works were sampled from, this one from row `first` on."""
        draft = self._mirror.sequences[work.request].stack["draft"]
        if getattr(draft, "logits", False) and heard(draft, work.want):
            self._logits[work.request] = logits_NV[[first, *(first + 1 + j for j in path)]].float()
        found = self._rows.get(work.request)
        if found is not None and work.guesses:
            context = len(found) - work.guesses
            self._rows[work.request] = found[[*range(context), *(context + j for j in path)]]
        if work.soft:
            behind = work.soft * (1 + path[-1]) if path else 0
            self._soft[work.request] = self._soft[work.request][behind : behind + work.soft]

    def of(self, request: int) -> Tensor | None:
        """States [n, width] of a sequence's rows that stand, oldest first."""
        return self._rows.get(request)

    def soft(self, request: int) -> Tensor | None:
        """States [soft, width], not normed, of the soft tokens behind the last row that stands."""
        return self._soft.get(request)

    def logits(self, request: int) -> Tensor | None:
        """[m, vocab], a copy, of the rows from which the step's tokens were drawn."""
        return self._logits.get(request)

    def calls(self, asks: Sequence[tuple[int, Ask]]) -> Draws:
        return Reads(self._decoder.program, asks, self.target)


class Reads(Draws):
    """What a draft that reads the target is given (`slots.Features`)."""

    def __init__(self, program: Any, asks: Sequence[tuple[int, Ask]], target: Read) -> None:
        super().__init__(program, asks)
        self.target = target


class DraftShelf:
    """What drafts take hold of: the vocabulary (`slots.Words`), and the target."""

    def __init__(self, words: VocabularyShelf, target: Target) -> None:
        self._words, self.target = words, target

    @property
    def vocabulary(self) -> Vocabulary:
        return self._words.vocabulary

    def of(self, model: str) -> Vocabulary:
        return self._words.of(model)

    def once(self, key: str, make: Callable[[Vocabulary], T], size: int = 0) -> T:
        return self._words.once(key, make, size)
