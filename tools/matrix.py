"""Write docs/matrix.md: which techniques go together, from their traits.

python -m tools.matrix            # write the page
python -m tools.matrix --check    # exit 1 where the page is not what would be written
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from weft.compose import Verdict, complete, compose
from weft.features import Feature, features
from weft.registry import Part
from weft.slots import SLOTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "matrix.md"
MARKS = {"ok": "+", "cost": "o", "refused": "x"}


def verdict(one: Feature, other: Feature) -> Verdict | None:
    """What `compose` says of two techniques, or None for two of one slot."""
    if one.slot == other.slot:
        return None
    return compose(complete([Part(one.slot, one.name), Part(other.slot, other.name)]))


def rows(found: Sequence[Feature]) -> list[str]:
    """The table: one line for each technique, one column for each that stands before it in the list."""
    numbers = [str(i + 1) for i in range(len(found))]
    lines = [f"| | technique | fidelity | {' | '.join(numbers)} |", f"|---|---|---|{'---|' * len(found)}"]
    for i, one in enumerate(found):
        cells = []
        for j, other in enumerate(found):
            said = verdict(one, other) if j < i else None
            cells.append(MARKS[said.verdict] if said else ("." if j < i else ""))
        lines.append(f"| {i + 1} | `{one.slot}={one.name}` | {one.traits.answers} | {' | '.join(cells)} |")
    return lines


def page(found: Sequence[Feature]) -> str:
    """The whole page."""
    said = [(a, b, v) for a, b in itertools.combinations(found, 2) if (v := verdict(a, b)) is not None]
    refused = [(a, b, v) for a, b, v in said if v.verdict == "refused"]
    costly = [(a, b, v) for a, b, v in said if v.verdict == "cost"]
    share = 100 * len(refused) / len(said) if said else 0.0
    out = [
        "# What goes with what",
        "",
        "Written by `python -m tools.matrix` from the traits that each technique declares; `weft compose` says the same for any",
        "stack, and generated tests hold every pair to it (`tests/conform/test_pairs.py`).",
        "",
        "`+` goes together, `o` does at a cost or with one of them idle, `x` is refused, `.` is the same slot, which takes one",
        "technique. A pair is as faithful as the weaker of the two; redefined: to an answer that is another one on purpose.",
        "",
        *rows(found),
        "",
        f"{len(said)} pairs of different slots; {len(refused)} are refused ({share:.0f} %), {len(costly)} have a cost.",
        "",
    ]
    for title, chosen in (("Refused", refused), ("At a cost", costly)):
        out += [f"## {title}", ""]
        texts = sorted({reason.text for _, _, v in chosen for reason in v.reasons})
        out += [f"- {text}" for text in texts] or ["None."]
        out.append("")
    return "\n".join(out)


def shown() -> list[Feature]:
    """Every technique of an engine but the nulls, which are in every stack that names nothing else."""
    return [f for f in features() if SLOTS[f.slot].null != f.name and SLOTS[f.slot].inside]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description="Write docs/matrix.md.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the page is not as it would be"
    )
    check = parser.parse_args(argv).check
    text = page(shown())
    if check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf8") == text:
            return 0
        print(f"{PAGE.name} is out of date: run python -m tools.matrix", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
