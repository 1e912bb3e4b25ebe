"""Hidden states of a prompt's rows pooled into one vector: what an embedding is made of.

The state of a row is what the last layer gives, after the final norm.  "last" is that of the prompt's last row; "mean" is the
mean over all of them, summed up in float64 as the chunks of a prompt come.  A sequence that was preempted enters anew and starts
from nothing; the scheduler takes no prefix hit for a mean, as its rows would be missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from weft.exec.batch import Batch
from weft.exec.mirror import Mirror, Mirrored
from weft.models.decoder import Decoder
from weft.types import Work, WorkResult

POOLED = "pooled states"
"""Under this name a sequence's state holds its `Pooled`."""


@dataclass(slots=True)
class Pooled:
    """total: float64 [width], the sum over `count` rows."""

    total: Tensor
    count: int


class Pooling:
    """decoder: of the model whose states are pooled."""

    def __init__(self, mirror: Mirror, decoder: Decoder) -> None:
        self._mirror, self._decoder = mirror, decoder

    def take(self, batch: Batch, works: Sequence[Work], mine: Sequence[int]) -> None:
        """Keep what is asked for of a batch that has just passed the last layer."""
        for k, i in enumerate(mine):
            work = works[i]
            s = self._mirror.sequences[work.request]
            if s.sampling.pooling:
                stop = min(work.start + len(work.tokens) - work.guesses, s.prompt)
                first = work.start if s.sampling.pooling == "mean" else max(work.start, s.prompt - 1)
                if first < stop:
                    at = batch.bounds[k] - work.start
                    self._add(s, self._decoder.states(at + first, at + stop))

    def settle(self, works: Sequence[Work], results: list[WorkResult]) -> None:
        """Put the vectors of prompts that are computed into their results."""
        for i, work in enumerate(works):
            s = self._mirror.sequences[work.request]
            pooled = s.state.get(POOLED)
            if isinstance(pooled, Pooled) and results[i].tokens:
                vector = (pooled.total / pooled.count).to(torch.float32).cpu()
                results[i] = msgspec.structs.replace(results[i], vector=vector.numpy().astype("<f4").tobytes())

    def _add(self, s: Mirrored, states: Tensor) -> None:
        """states: float32 [rows, width]."""
        total = states.double().sum(0)
        pooled = s.state.get(POOLED)
        if isinstance(pooled, Pooled):
            pooled.total += total
            pooled.count += len(states)
        else:
            s.state[POOLED] = Pooled(total, len(states))
