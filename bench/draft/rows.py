"""Rows of the table of drafts: which of them are one and the same, which a newer one supersedes, and how they are told.

python -m bench.draft.rows                # bench/results/draft.md again, out of bench/results/draft.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.draft import whole
from bench.harness import RESULTS, write

OUT = RESULTS / "draft.json"
KEY = ("draft", "accept", "batch", "prompts", "temperature", "controller", "threads", "draft_share")
LOAD = ("accept", "batch", "prompts", "temperature", "controller", "threads")
"""What two rows share whose drafts are compared with each other."""
WITHOUT = ("dyspec", "paths", "jacobi", "early_exit")
"""Drafts of which the law does not say how often a guess stands: trees have several for a place (`bench.draft.tree_law`), guesses
of `jacobi` were drawn by the noise of their place after a text that nobody kept, those of `early_exit` by other layers in each
step."""
RATES = ("acceptance", "predicted_acceptance", "acceptance_chance")
Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    out = Path(given[0]) if given else OUT
    kept = json.loads(out.read_text(encoding="utf8"))
    keep(out, kept["rows"], kept["command"], kept["machine"])
    return 0


def keep(out: Path, rows: Sequence[dict[str, Any]], command: str, machine: Mapping[str, Any]) -> None:
    """Write them in their order, as JSON and as a page beside it, without those that newer ones supersede."""
    left = sorted(
        (row for row in rows if not superseded(row, rows)),
        key=lambda row: [str(row[k]) for k in ("prompts", "temperature", "batch", "draft", "controller")],
    )
    write(out, {"command": command, "machine": machine, "rows": left})
    out.with_suffix(".md").write_text("# Drafts\n\n" + table(left) + "\n", encoding="utf8")


def key(row: Row) -> tuple[Any, ...]:
    return tuple(round(row[k], 5) if k == "draft_share" else row[k] for k in KEY)


def superseded(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a newer row of the same load, which today's controller decided, is of the same draft with the same arguments, or of
    the draft that has come in its place: the same technique with another model."""
    return any(
        all(row[k] == other[k] for k in LOAD)
        and _name(row) == _name(other)
        and (row["draft"] == other["draft"] or key(row)[-1] != key(other)[-1])
        and _age(row) < _age(other)
        for other in rows
        if decided_today(other)
    )


def decided_today(row: Row) -> bool:
    """Whether the controller was on, and was the one that there is."""
    return bool(row.get("decided_by") == whole.decided_by())


def lawful(draft: str) -> bool:
    """Whether the law says of each guess by itself how often it stands, given the text alone."""
    return draft.partition("(")[0] not in WITHOUT


def _name(row: Row) -> str:
    return str(row["draft"].partition("(")[0])


def _age(row: Row) -> tuple[str, bool]:
    return row.get("date", ""), decided_today(row)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each row."""
    heads = (
        "prompts", "temperature", "batch", "draft", "accept", "controller", "ratio", "spread", "full", "tokens a step",
        "acceptance", "predicted", "chance", "draft's time", "answers", "of", "repeated 8-grams", "draft's share", "threads",
        "date", "processor",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = (
            row["prompts"], f"{row['temperature']:g}", row["batch"], row["draft"], row["accept"],
            "on" if row["controller"] else "off", f"{row['ratio']:.2f}",
            "{:.2f} to {:.2f}".format(*row["ratio_spread"]),
            f"{row['ratio_full']:.2f}" if "ratio_full" in row else "", f"{row['tok_per_step']:.2f}",
            *("" if row.get(k) is None or not lawful(row["draft"]) else f"{row[k]:.3f}" for k in RATES),
            "" if row["draft_time"] is None else f"{row['draft_time']:.1%}",
            row.get("answers", ""), row.get("tried", ""), f"{row['repeated_8grams']:.1%}", f"{row['draft_share']:.2%}",
            row["threads"], row.get("date", ""), row.get("cpu", ""),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
