"""What techniques there are, read from where each describes itself: its traits and the head of its file.

A technique's file begins with a summary line and fields (Paper, Rule, Shapes, Units, Cost, Pays, Differs, Bound, Raises), each a
word at the margin, two spaces or more, and text that may run on in indented lines.  Shapes, Pays (where it is worth having) and
Bound (what was measured of an approximation) may be left out.  Catalogue ids stand in brackets, round or square, in the field
Paper.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass

from weft.errors import ConfigError
from weft.registry import lookup, names
from weft.slots import SLOTS
from weft.traits import Traits

FIELDS = ("Paper", "Rule", "Shapes", "Units", "Cost", "Pays", "Differs", "Bound", "Raises")
REQUIRED = ("Paper", "Rule", "Units", "Cost", "Differs", "Raises")
_ID = re.compile(r"[(\[](\d{3}-\d+(?:,\s*\d{3}-\d+)*)[)\]]")
_FIELD = re.compile(rf"^({'|'.join(FIELDS)}) {{2,}}(.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One technique.  catalogue: ids of the published techniques that it carries.  fields: the head of its file."""

    slot: str
    name: str
    summary: str
    catalogue: tuple[str, ...]
    paper: str
    traits: Traits
    fields: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        """The keys of `weft features --json`."""
        return {
            "slot": self.slot,
            "name": self.name,
            "catalogue": list(self.catalogue),
            "paper": self.paper,
            "summary": self.summary,
            "fidelity": self.traits.fidelity.value,
            "needs": sorted(self.traits.needs),
            "gives": sorted(self.traits.gives),
            "effects": sorted(self.traits.effects),
        }


def feature(slot: str, name: str) -> Feature:
    """Raises ConfigError where the technique is unknown or its file has no proper head."""
    cls = lookup(slot, name)
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    summary, fields = head(text)
    missing = [f for f in REQUIRED if f not in fields]
    if missing:
        raise ConfigError(f"{slot}={name}: the head of its file lacks {', '.join(missing)}")
    ids = tuple(i.strip() for group in _ID.findall(fields["Paper"]) for i in group.split(","))
    paper = re.sub(r" +(?=[;,]|$)", "", _ID.sub("", fields["Paper"]))
    traits = cls.traits  # type: ignore[attr-defined]
    return Feature(slot=slot, name=name, summary=summary, catalogue=ids, paper=paper, traits=traits, fields=fields)


def features() -> list[Feature]:
    """Every technique of this installation, by slot."""
    return [feature(slot, name) for slot in SLOTS for name in names(slot)]


def head(text: str) -> tuple[str, dict[str, str]]:
    """(summary, fields) of a technique's docstring."""
    lines = text.splitlines()
    fields: dict[str, str] = {}
    current: str | None = None
    for line in lines[1:]:
        match = _FIELD.match(line)
        if match:
            current = match.group(1)
            fields[current] = match.group(2).strip()
        elif current and line.startswith("   ") and line.strip():
            fields[current] += " " + line.strip()
        else:
            current = None
    return (lines[0].strip() if lines else ""), fields
