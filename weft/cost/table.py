"""Table: a step's time looked up in a grid of measured ones.

Paper    none; how Vidur and LLMServingSim use profiles of kernels
Rule     by rows and by entries that are read: straight lines in both directions between the four nearest points
Units    seconds; the file is CSV with a head: rows,entries, and any of weights_s, attention_s, kv_s, communication_s, host_s
Cost     two bisections a step
Pays     where somebody else measured, and wrote it down as a table
Differs  one table for the whole step, not one for each kernel
Raises   ValueError for a file without a name; ConfigError, when it is used, for one that is no full grid
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from weft.errors import ConfigError
from weft.registry import register
from weft.slots.cost import PARTS, Figures, Hardware, Load, Parts
from weft.traits import Traits

MAX_BYTES = 8 << 20


@register("cost", "table")
@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """file: the grid."""

    file: str
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        if not self.file:
            raise ValueError("file is the path of a CSV file")

    @classmethod
    def trial(cls, folder: Path) -> dict[str, Any]:
        """A grid of three by three."""
        lines = [f"{r},{e},{5e-3 + 1e-5 * r},{1e-8 * e},1e-3" for r in (1, 256, 2048) for e in (0, 4096, 65536)]
        file = folder / "grid.csv"
        file.write_text("\n".join(["rows,entries,weights_s,kv_s,host_s", *lines]) + "\n", encoding="utf8")
        return {"file": str(file)}

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rows, entries, grid = read(Path(self.file))

        def price(load: Load) -> Parts:
            if not load.rows:
                return Parts()
            i, u = place(rows, load.whole_rows)
            j, v = place(entries, sum(load.decode_entries) + sum(load.prompt_entries))
            corners = (
                ((1 - u) * (1 - v), grid[i][j]), (u * (1 - v), grid[min(i + 1, len(rows) - 1)][j]),
                ((1 - u) * v, grid[i][min(j + 1, len(entries) - 1)]),
                (u * v, grid[min(i + 1, len(rows) - 1)][min(j + 1, len(entries) - 1)]),
            )  # fmt: skip
            return Parts(*(max(0.0, sum(w * c[p] for w, c in corners)) for p in range(len(PARTS))))

        return price


def place(points: Sequence[float], x: float) -> tuple[int, float]:
    """(index of the point before x, share of the way to the next one); beyond the ends the last slope goes on."""
    if len(points) == 1:
        return 0, 0.0
    i = min(max(bisect_right(points, x) - 1, 0), len(points) - 2)
    return i, (x - points[i]) / (points[i + 1] - points[i])


def read(path: Path) -> tuple[list[float], list[float], list[list[Parts]]]:
    """(rows, entries, parts by both).  Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes; a table of step times is smaller")
        with path.open(newline="", encoding="utf8") as file:
            found = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the table {path} cannot be read: {error}") from None
    head = set(found[0]) if found else set()
    known = {"rows", "entries", *(f"{p}_s" for p in PARTS)}
    if not {"rows", "entries"} < head or head - known:
        raise ConfigError(f"{path}: the head must be rows,entries and some of {', '.join(f'{p}_s' for p in PARTS)}")
    by: dict[tuple[float, float], Parts] = {}
    for number, row in enumerate(found, 2):
        try:
            values = {key: float(value) for key, value in row.items() if key is not None}
        except (TypeError, ValueError):
            raise ConfigError(f"{path}:{number}: every cell must be a number") from None
        if not all(math.isfinite(v) and v >= 0 for v in values.values()):
            raise ConfigError(f"{path}:{number}: a cell is below 0 or not finite")
        by[values["rows"], values["entries"]] = Parts(*(values.get(f"{p}_s", 0.0) for p in PARTS))
    rows, entries = sorted({a for a, _ in by}), sorted({b for _, b in by})
    if len(by) != len(rows) * len(entries):
        raise ConfigError(
            f"{path}: {len(rows)} x {len(entries)} points are wanted for a full grid, there are {len(by)}"
        )
    return rows, entries, [[by[a, b] for b in entries] for a in rows]
