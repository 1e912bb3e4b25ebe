"""A draft that goes on while the target verifies: passes of the second model behind guesses of which nobody knows yet that they
stand (002-50, PEARL).

A step's guesses for a sequence are x1 to xk, none where there are no guesses in hand.  While the target computes the newest token
and these, the second model computes them too and goes on: a token h that it would put in the place of the target's own next one,
and guesses behind that.  They are the next plan's where x1 to xk stand and the target's token is h, else nobody's.

    the calling thread    plans, mirror, the target's decoder and its entries in the pool; it waits for the other one before it
                          draws from the target's logits, and whatever becomes of the target's pass
    the thread here       the second model's decoder with its kernels' threads, and entries of its own groups that the plan
                          granted; it reads the mirror, to which nobody writes between `begin` and `end`

So nothing is written by both: blocks of the two models are never the same, and a technique's `early` is the only one of its
methods that runs here.  Nothing outlives the step, but for guesses and their laws, as with any draft.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from weft.exec.ahead import Ahead, Reader
from weft.exec.batch import Batch
from weft.exec.gather import Gather
from weft.exec.kvpool import KVPool
from weft.exec.mirror import Mirror
from weft.models.decoder import Decoder
from weft.slots import Ask, Draft, Guesses
from weft.types import Work, WorkResult


class Early(Ahead):
    """The second model in the thread here.  hoped: facts as they were if all guesses of those stood who go on behind them."""

    def __init__(
        self, name: str, decoder: Decoder, gather: Gather, pool: KVPool, works: Sequence[Work],
        hoped: Sequence[WorkResult], reader: Reader | None, requests: Collection[int],
    ) -> None:  # fmt: skip
        def forward(decoder: Decoder, batch: Batch) -> Tensor:
            return decoder.forward(batch, pool)

        super().__init__(name, decoder, gather, forward, works, hoped, reader, requests)
        self._done: dict[int, list[int]] = {request: [] for request in self.followers}
        """Tokens whose entries are computed, from each work's start on."""

    def _pass(self, works: list[Work], alone: bool) -> Tensor:
        found = super()._pass(works, alone)
        for work in works:
            self._done[work.request][work.start - self.followers[work.request].start :] = work.tokens
        return found

    def met(self, works: Sequence[Work], results: list[WorkResult]) -> None:
        """The target has spoken: all that it says but the newest were guesses that stood, whose rows are computed.  The newest's
        may be, where it is what was written in its place, and is computed again: guesses begin with the logits behind it, which
        nobody keeps."""
        said = {w.request: fact.tokens for w, fact in zip(works, results, strict=True) if w.model != self.name}
        for request, f in self.followers.items():
            stand = len(f.work.tokens) + max(0, len(said.get(request, ())) - 1)
            rows = min(len(self._done[request]), stand)
            assert rows >= len(f.work.tokens), "the second model was to compute these beside the target"
            results[f.at] = msgspec.structs.replace(results[f.at], rows=rows)


@dataclass(slots=True)
class Asked:
    """Sequences of one technique, by request, and what it is asked for each."""

    draft: Draft
    requests: list[int]
    asks: list[Ask]


@dataclass(frozen=True, slots=True)
class Found:
    """What was guessed, by request, the token in the place of the target's own first; and the seconds that it took."""

    guesses: dict[int, Guesses]
    seconds: float


class Beside:
    """One step's early guesses after the other.  max_guesses: of one sequence that a plan would have verified.

    Where rows of the cache are encoded by a technique, which counts them, and where the device is not a CPU, `begin` itself makes
    the guesses: the two models take turns.
    """

    def __init__(
        self, mirror: Mirror, name: str, decoder: Decoder, gather: Gather, pool: KVPool, max_guesses: int,
        reader: Reader | None,
    ) -> None:  # fmt: skip
        self._mirror, self._name, self._decoder, self._gather, self._pool = mirror, name, decoder, gather, pool
        self._max_guesses, self._reader = max_guesses, reader
        self.threaded = pool.device.type == "cpu" and pool.store is None
        self._thread: ThreadPoolExecutor | None = None
        self._job: Future[Found] | None = None
        self._early: Early | None = None
        self._found: dict[int, Guesses] = {}
        self.seconds = self.waited = 0.0
        """Of the newest step: what guessing took beside the target, and how long the target's thread had to wait for it."""

    def begin(self, works: Sequence[Work]) -> set[int]:
        """Begin to guess.  Returns the sequences whose second model is dealt with here; `end` has to follow."""
        self._rest()
        self._found, self._early, self.seconds, self.waited = {}, None, 0.0, 0.0
        following = {w.request: w for w in works if w.model == self._name and hasattr(self._draft(w), "early")}
        if not following:
            return set()
        hoped = [WorkResult(rows=0)] * len(works)
        asked: dict[int, Asked] = {}
        for i, work in enumerate(works):
            if work.model == self._name or work.request not in following:
                continue
            ask = self._ask(work, following[work.request])
            if ask is None:
                continue
            hoped[i] = WorkResult(rows=0, tokens=work.tokens[len(work.tokens) - work.guesses :])
            mine = asked.setdefault(id(self._draft(work)), Asked(self._draft(work), [], []))
            mine.requests.append(work.request)
            mine.asks.append(ask)
        self._early = Early(self._name, self._decoder, self._gather, self._pool, works, hoped, self._reader, following)
        began = time.perf_counter()
        if self.threaded:
            self._thread = self._thread or ThreadPoolExecutor(1, "weft-draft")
            self._job = self._thread.submit(_guess, self._early, list(asked.values()))
        else:
            self._found = _guess(self._early, list(asked.values())).guesses
            self.waited = time.perf_counter() - began
        return set(following)

    def end(self) -> None:
        """Wait for what was begun.  Raises what went wrong there."""
        if self._job is None:
            return
        began = time.perf_counter()
        found = self._job.result()  # interrupted, the job stays: the next `begin` waits for it
        self._job = None
        self._found, self.seconds, self.waited = found.guesses, found.seconds, time.perf_counter() - began

    def first(self, request: int) -> tuple[int, Tensor] | None:
        """The token in the place of the target's own behind all guesses, and its law, where it was drawn to be weighed."""
        found = self._found.get(request)
        return None if found is None or found.laws is None or not found.tokens else (found.tokens[0], found.laws[0])

    def kept(self, work: Work, fact: WorkResult) -> Guesses | None:
        """Guesses for the next plan, where the target says all that they were made behind; None where it does not."""
        found, guesses = self._found.get(work.request), work.tokens[len(work.tokens) - work.guesses :]
        if found is None or not found.tokens or fact.tokens != (*guesses, found.tokens[0]):
            return None
        return Guesses(found.tokens[1:], None if found.laws is None else found.laws[1:])

    def settle(self, works: Sequence[Work], results: list[WorkResult]) -> None:
        """Say how far the second model came with each sequence."""
        if self._early is not None:
            self._early.met(works, results)

    def close(self) -> None:
        """End the thread; twice does no harm."""
        self._rest()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _rest(self) -> None:
        """A step that was broken off may have left the thread at work, which must not write where others do now."""
        if self._job is not None:
            wait([self._job])
            self._job = None

    def _draft(self, work: Work) -> Draft:
        draft: Draft = self._mirror.sequences[work.request].stack["draft"]
        return draft

    def _ask(self, work: Work, follower: Work) -> Ask | None:
        """As if all guesses of the work stood, and the target's own token came next; None where nothing could follow that."""
        s = self._mirror.sequences[work.request]
        output = work.output + work.guesses
        if not work.samples or work.link is not None or s.stack.single or work.parents:
            return None
        if work.guesses and work.tokens[-1] in s.sampling.stop_ids and output > s.sampling.min_tokens:
            return None
        if not (work.guesses or follower.tokens):
            return None  # the row behind which it would go on was computed before, and its logits are gone
        want = work.want if work.want >= 0 else self._max_guesses
        most = min(s.sampling.max_tokens - output - 2, self._max_guesses, want, follower.ahead - work.guesses)
        if most < 1:
            return None
        context = s.tokens[: work.stop].copy()
        return Ask(context, s.prompt, output, 1 + most, s.sampling, s.seed, s.stack["accept"].laws, s.salt)


@torch.inference_mode()
def _guess(early: Early, asked: Sequence[Asked]) -> Found:
    """All passes of a step, whoever's they are."""
    began = time.perf_counter()
    found: dict[int, Guesses] = {}
    for one in asked:
        run = early.calls(list(zip(one.requests, one.asks, strict=True)))
        found.update(zip(one.requests, one.draft.early(one.asks, run), strict=True))  # type: ignore[attr-defined]
    early.compute([])
    return Found(found, time.perf_counter() - began)
