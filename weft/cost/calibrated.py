"""Calibrated: a step's time from what `weft calibrate` measured on a machine.

Paper    none; a linear model of a step's load, as in Vidur (Agrawal et al., arXiv:2405.05465) and LLMServingSim
Rule     weights: by rows, straight lines between measured points; the other parts: coefficients of what they are of
Units    seconds; a coefficient is seconds for each step, sequence (enter_s: that begins), row of a prompt on the host, step of an
         engine that had nothing to do before (idle_s: to wake up), step that samples, sample, pair, entry or block
Cost     a bisection a step
Pays     on the machine that it was measured on: bench/results/sim-calibrated.json has its errors
Differs  the fit is of non-negative coefficients (a part never gives time back), by least squares of relative errors
Raises   ValueError for a scale that is not above 0; ConfigError, when it is used, for a file that is no calibration
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from weft.errors import ConfigError
from weft.registry import register
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits

COEFFICIENTS = (
    "step_s", "sequence_s", "enter_s", "prompt_row_s", "idle_s", "sampling_s", "sample_s", "pair_s", "entry_s", "prompt_entry_s",
    "block_s",
)  # fmt: skip
"""Zero where a file has none."""
MAX_BYTES = 1 << 20
MAX_POINTS = 1024


@register("cost", "calibrated")
@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """file: what `weft calibrate` wrote.  scale: of everything, for a machine that is so much slower."""

    file: str
    scale: float = 1.0
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")

    @classmethod
    def trial(cls, folder: Path) -> dict[str, Any]:
        """A machine of round numbers."""
        file = folder / "calibration.json"
        file.write_text(
            json.dumps({"rows": [[1, 5e-3], [2048, 5e-2]], "step_s": 1e-3, "entry_s": 1e-8, "pair_s": 1e-10})
        )
        return {"file": str(file)}

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        points, c = read(Path(self.file))
        xs, ys = [float(x) for x, _ in points], [y * self.scale for _, y in points]
        (step, sequence, enter, prompt_row, idle, sampling, sample, pair, entry, prompt_entry, block) = (
            c[name] * self.scale for name in COEFFICIENTS
        )

        def price(load: Load) -> Parts:
            weights = sum(share * line(xs, ys, n) for share, n in load.spans or ((1.0, load.rows),) if n)
            return Parts(
                weights + load.samples * sample + (sampling if load.samples else 0.0),
                sum(load.prompt_pairs) * pair,
                sum(load.decode_entries) * entry
                + sum(load.prompt_entries) * prompt_entry
                + (load.moved + load.stored) * block,
                0.0,
                step
                + load.works * sequence
                + load.entered * enter
                + max(0, load.rows - load.decode_rows) * prompt_row
                + load.idle * idle,
            )

        return price


def line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Straight lines between points; beyond the last ones their slope goes on."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
    return max(0.0, ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i]))


def read(path: Path) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """(points of rows and seconds, coefficients) of a calibration.  Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, which no calibration has")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the calibration {path} cannot be read ({error}); write one with weft calibrate") from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} holds no calibration; write one with weft calibrate")
    rows = found.get("rows")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_POINTS:
        raise ConfigError(f"{path}: rows must be a list of 1 to {MAX_POINTS} pairs of rows and seconds")
    points = [(_number(path, "rows", p[0]), _number(path, "rows", p[1])) for p in rows if _is_pair(path, p)]
    if any(a[0] >= b[0] for a, b in itertools.pairwise(points)):
        raise ConfigError(f"{path}: rows must ascend")
    return points, {name: _number(path, name, found.get(name, 0.0)) for name in COEFFICIENTS}


def _is_pair(path: Path, value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"{path}: rows must hold pairs of rows and seconds, got {str(value)[:100]}")
    return True


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{path}: {name} must hold numbers that are not below 0, got {str(value)[:100]}")
    return float(value)
