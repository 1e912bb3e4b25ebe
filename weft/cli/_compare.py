"""Ours against the reference: logits of every position, and greedy continuations.

Our side is the engine as it serves: all prompts of a wave share its steps, so they are cut into chunks and mixed with
decoding rows of others, over paged KV.  The reference reads each prompt and our continuation in one pass.  A continuation is
the reference's own if at each of its positions the reference too gives its token the highest logit: by induction, it would
have written it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.errors import CapacityError, EngineError
from weft.exec.thread import step
from weft.types import Finished, Plan, Rejected, RequestSpec, SamplingSpec, StepResult, TokenItem

if TYPE_CHECKING:
    from torch import Tensor

    from weft.exec.batch import Batch
    from weft.exec.build import Runtime
    from weft.exec.runner import TorchExecutor

WAVE_BYTES = 256 << 20
"""Logits of our side that are kept until they are compared."""
TOLERANCE_32 = 1e-4
"""Largest difference of logits in float32, for logits up to SCALE; in proportion to the largest one above."""
SCALE = 10.0
TOLERANCE_16 = 2.0**-4
"""The same in 16 bits, as a share of the largest logit: eight bits of mantissa, and the errors of all layers add up."""
AGREEMENT_16 = 0.9
"""Share of positions whose likeliest token must be the same in 16 bits."""


@dataclass(slots=True)
class Comparison:
    """What came out so far.  peak: largest reference logit.  agreed: positions with the same likeliest token.

    ties: positions of continuations where the tokens differ, and the reference's logits of both by less than the tolerance
    allows; what is written after one is compared no further.
    """

    exact: bool
    prompts: int = 0
    positions: int = 0
    agreed: int = 0
    max_abs_logit_diff: float = 0.0
    peak: float = 0.0
    ties: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """What `max_abs_logit_diff` may reach."""
        return TOLERANCE_32 * max(1.0, self.peak / SCALE) if self.exact else TOLERANCE_16 * self.peak

    @property
    def greedy_equal(self) -> bool:
        return not self.wrong

    @property
    def passed(self) -> bool:
        agreed = self.agreed >= (0.0 if self.exact else AGREEMENT_16) * self.positions
        return self.positions > 0 and agreed and self.greedy_equal and self.max_abs_logit_diff <= self.tolerance

    def take(self, index: int, prompt: int, context: Sequence[int], ours: Tensor, theirs: Tensor) -> None:
        """Add one prompt.

        context: prompt and continuation.  ours, theirs: logits [positions, vocab] of all but its last token.
        """
        vocab = min(ours.shape[1], theirs.shape[1])  # a checkpoint may pad its vocabulary
        ours, theirs = ours[:, :vocab], theirs[:, :vocab]
        difference = (ours - theirs).abs().amax().item()
        self.prompts += 1
        self.positions += len(ours)
        self.peak = max(self.peak, theirs.abs().amax().item())
        # A NaN must not pass for a small difference.
        self.max_abs_logit_diff = max(self.max_abs_logit_diff, difference) if difference == difference else float("inf")
        best = theirs.argmax(-1)
        self.agreed += int((ours.argmax(-1) == best).sum())
        for at in range(prompt, len(context)):
            want, got = int(best[at - 1]), context[at]
            if want == got:
                continue
            gap = (theirs[at - 1, want] - theirs[at - 1, got]).item()
            if gap <= 2 * self.tolerance:
                self.ties += 1
            else:
                self.wrong.append({"prompt": index, "token": at - prompt, "ours": got, "reference": want, "gap": gap})
            break

    def as_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "positions": self.positions,
            "max_abs_logit_diff": self.max_abs_logit_diff,
            "greedy_equal": self.greedy_equal,
            "pass": self.passed,
            "tolerance": self.tolerance,
            "top1_agreement": self.agreed / max(self.positions, 1),
            "near_ties": self.ties,
            "differences": self.wrong,
        }


class Recorder:
    """Sits between the engine and its executor and keeps the logits of every row, by request and position."""

    def __init__(self, runtime: Runtime) -> None:
        from weft.models.decoder import Seam

        self._executor: TorchExecutor = runtime.executor
        self._plan: Plan | None = None
        self.rows: dict[int, dict[int, Tensor]] = {}
        """logits by the engine's sequence number and the position that they follow"""
        last = len(runtime.setup.spec.layers) - 1
        self.remove = runtime.decoder.hook(Seam.LOGITS, last, self._keep)

    def close(self) -> None:
        self._executor.close()

    def execute(self, plan: Plan) -> StepResult:
        self._plan = plan
        return self._executor.execute(plan)

    def _keep(self, batch: Batch, tensors: tuple[Tensor, ...]) -> None:
        assert self._plan is not None
        logits = tensors[0].to("cpu", copy=True)
        owners = [work.request for work in self._plan.works]
        sequence = 0
        for logit, row in zip(logits, batch.logit_rows_N.tolist(), strict=True):
            while row >= batch.bounds[sequence + 1]:
                sequence += 1
            self.rows.setdefault(owners[sequence], {})[int(batch.positions_T[row])] = logit

    def take(self, sequence: int, count: int) -> Tensor:
        """Logits after positions [0, count) of a sequence, [count, vocab], and forget them.  Raises EngineError for a hole."""
        import torch

        rows = self.rows.pop(sequence, {})
        missing = [position for position in range(count) if position not in rows]
        if missing:
            raise EngineError(f"the engine gave no logits for positions {missing[:5]}; please report this")
        return torch.stack([rows[position] for position in range(count)]).float()


def waves(lengths: Sequence[int], row_bytes: int, most_bytes: int = WAVE_BYTES) -> Iterator[list[int]]:
    """Indices in order, as many at once as keep the logits of all their rows within `most_bytes`; at least one."""
    wave: list[int] = []
    rows = 0
    for index, length in enumerate(lengths):
        if wave and (rows + length) * row_bytes > most_bytes:
            yield wave
            wave, rows = [], 0
        wave.append(index)
        rows += length
    if wave:
        yield wave


def compare(
    runtime: Runtime,
    reference: Callable[[list[int]], Tensor],
    prompts: Sequence[Sequence[int]],
    new: int,
    tick: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run every prompt and `new` greedy tokens through the engine, and hold them to `reference`.

    reference: ids to logits of every position.  tick: called after each prompt.
    """
    setup = runtime.setup
    found = Comparison(exact=setup.dtype == "float32")
    recorder = Recorder(runtime)
    try:
        for wave in waves([len(p) + new for p in prompts], 4 * setup.spec.vocab):
            for index, (context, ours) in zip(
                wave, _ours(runtime, recorder, [prompts[i] for i in wave], new), strict=True
            ):
                found.take(index, len(prompts[index]), context, ours, reference(list(context[:-1])))
                tick()
    finally:
        recorder.remove()
    return found


def _ours(
    runtime: Runtime, recorder: Recorder, prompts: Sequence[Sequence[int]], new: int
) -> list[tuple[list[int], Tensor]]:
    """(prompt and continuation, logits of all but the last token) of each prompt, computed together."""
    engine = runtime.engine
    room = runtime.setup.limits.max_model_len
    live = []
    for id, ids in enumerate(prompts):
        # Asking for the prompt's log-probabilities makes the engine compute logits for its every row.
        sampling = SamplingSpec(temperature=0.0, max_tokens=min(new, room - len(ids)), prompt_logprobs=0)
        for event in engine.add(RequestSpec(id=id, items=(TokenItem(tuple(ids)),), sampling=sampling), 0.0):
            if isinstance(event, Rejected):
                raise CapacityError(event.message)
        live.append(engine.find(id))
    while engine.has_work:
        events, _ = step(engine, recorder)
        for event in events:
            if isinstance(event, Finished) and event.error is not None:
                raise EngineError(event.error)
    return [(list(r.context), recorder.take(r.rid, len(r.context) - 1)) for r in live]
