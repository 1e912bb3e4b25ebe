"""A decoder's list of operations, cut at the seams where something hooks in, and nowhere else: one segment without hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft.errors import ConfigError
from weft.models import kernels as cpu
from weft.models.operations import Hook, Operation, Run, Seam, Step


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations that run without a break, and the hook that follows them."""

    runs: tuple[Run, ...]
    last: Operation
    hook: Hook | None


class Segments:
    """operations: of all layers, and of the logits."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = list(operations)
        self._hooks: dict[tuple[Seam, int], list[Hook]] = {}
        self._cut: dict[tuple[int, int, *tuple[bool, ...]], list[Segment]] = {}

    def hook(self, seam: Seam, layer: int, fn: Hook) -> Callable[[], None]:
        """As `Decoder.hook`."""
        seam = Seam(seam)
        if not any(op.seam is seam and op.layer == layer for op in self._operations):
            raise ConfigError(
                f"there is no seam {seam} at layer {layer} of {1 + max(op.layer for op in self._operations)}"
            )
        self._hooks.setdefault((seam, layer), []).append(fn)
        self._cut.clear()

        def remove() -> None:
            self._hooks[seam, layer].remove(fn)
            self._cut.clear()

        return remove

    def run(self, step: Step, first: int, stop: int, at_end: bool) -> None:
        """Take a step's rows through a range of layers.  at_end: and to the logits."""
        adapted, vectors = step.batch.deltas is not None, step.batch.vectors is not None
        for segment in self.pieces(first, stop, at_end, adapted, step.dense, step.alone, vectors):
            for run in segment.runs:
                run(step)
            if segment.hook is not None:
                assert segment.last.views is not None
                segment.hook(step.batch, segment.last.views(step))

    def pieces(
        self, first: int, stop: int, at_end: bool = True, adapted: bool = False, dense: bool = False,
        alone: bool = False, vectors: bool = False,
    ) -> list[Segment]:  # fmt: skip
        """The operations of a range of layers as segments.  at_end: and the logits."""
        key = (first, stop, at_end, adapted, dense, alone, vectors)
        if key in self._cut:
            return self._cut[key]
        left_out = {Seam.LOGITS, *([Seam.INPUTS] if first else [])}
        chosen = [op for op in self._operations if first <= op.layer < stop and op.seam not in left_out]
        chosen += [op for op in self._operations if at_end and op.seam is Seam.LOGITS]
        segments: list[Segment] = []
        runs: list[Run] = []
        through = False  # whether the operation before this one has done its work too
        for op in chosen:
            hooks = self._hooks.get((op.seam, op.layer), []) if op.seam is not None else []
            mine = () if through else op.chosen(bool(hooks), adapted, dense)
            runs.extend(mine)
            through = mine is op.through
            if dense and not alone:
                runs.extend(op.others)
            if vectors:
                runs.extend(op.vectors)
            for hook in hooks:
                segments.append(Segment(cpu.fused(runs), op, hook))
                runs = []
        if runs:
            segments.append(Segment(cpu.fused(runs), chosen[-1], None))
        self._cut[key] = segments
        return segments
