"""The generated tests of two techniques together: every pair of different slots of the registry.

A pair that is refused raises with its reasons.  One that goes together runs at its declared fidelity: taking an EXACT part out
changes no token; with a SAME_LAW part draws fit the law of the stack without it; APPROX parts stay within their bounds; with
a part that gives another answer on purpose a request gets the same one alone as among others.
Every part still does what it counts, unless the verdict says that it has nothing to do.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.compose import Verdict, compose, traits_of
from weft.config import build_stack
from weft.conform.checks import (
    REDEFINED_SLACK,
    SLACK,
    alike,
    as_alone,
    beside,
    equal_tokens,
    fits,
    hangs_on_guesses,
    own_acts,
    within,
)
from weft.conform.code import code
from weft.conform.lab import Lab, stack
from weft.errors import ComposeError
from weft.registry import Part, lookup, names
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity

PAIR_DRAWS = 1024
"""Draws with which a pair is tested when it changed: they see a sampler that goes wrong, not one that is off by 2 %, for which
the test of all pairs draws as often as the test of the technique alone."""
MOST_ANSWERS = 2048
"""Of a search, each of whose answers takes several sequences."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two techniques of different slots, by slot and name."""

    one: tuple[str, str]
    other: tuple[str, str]

    def __str__(self) -> str:
        return " + ".join(f"{slot}={name}" for slot, name in (self.one, self.other))


def techniques() -> list[tuple[str, str]]:
    """Everything that is no null: a null is in every stack anyway."""
    inside = [slot for slot in SLOTS if SLOTS[slot].inside]
    return [(slot, name) for slot in inside for name in names(slot) if name != SLOTS[slot].null]


def pairs() -> list[Pair]:
    return [Pair(a, b) for a, b in itertools.combinations(techniques(), 2) if a[0] != b[0]]


def parts_of(lab: Lab, pair: Pair, wide: bool = False) -> list[Part]:
    """The two at their trials' arguments, with what either needs beside it."""
    kind = "wide_trial" if wide else "trial"
    own = [lab.part(*pair.one, kind), lab.part(*pair.other, kind)]
    slots = {p.slot for p in own}
    more = {p.slot: p for part in own for p in beside(part)[1:] if p.slot not in slots}
    return [*own, *more.values()]


def verdict_of(lab: Lab, pair: Pair) -> Verdict:
    return compose(stack(*parts_of(lab, pair)))


def check(lab: Lab, pair: Pair, draws: int = PAIR_DRAWS) -> str:
    """Test a pair; says what was seen.  draws: samples of a law.  Raises AssertionError or EngineError."""
    parts = parts_of(lab, pair)
    verdict = compose(stack(*parts))
    if verdict.verdict == "refused":
        return _refused(parts, verdict)
    still = idle(lab, parts)
    if still and parts_of(lab, pair, wide=True) != parts:
        parts = parts_of(lab, pair, wide=True)
        still = idle(lab, parts)
    assert not still, f"{', '.join(still)} stayed 0"
    said = [_keeps(lab, parts, part, draws) for part in parts[:2]]
    return "; ".join(text for text in said if text)


def excused(parts: Sequence[Part]) -> set[str]:
    """Parts that have nothing to do in this stack, as the verdict says."""
    return {p for r in compose(stack(*parts)).reasons if r.rule == "one at a time" for p in r.parts[1:]}


def idle(lab: Lab, parts: Sequence[Part]) -> list[str]:
    """Acts of the parts that stayed 0, but for those of parts that are excused."""
    outcome, spared = lab.run(parts), excused(parts)
    return [
        f"{part}: {act}"
        for part in parts
        if str(part) not in spared
        for act, count in own_acts(outcome, part).items()
        if not count
    ]


def _refused(parts: Sequence[Part], verdict: Verdict) -> str:
    reasons: tuple[str, ...] = ()
    try:
        build_stack(parts)
    except ComposeError as error:
        reasons = error.reasons
    assert reasons, "compose refuses the pair, and it is built all the same"
    assert set(reasons) == {r.text for r in verdict.reasons}
    return f"refused: {'; '.join(reasons)}"


def _keeps(lab: Lab, parts: Sequence[Part], part: Part, draws: int) -> str:
    """What taking `part` out of the stack may change."""
    rest = [p for p in parts if p is not part]
    if str(part) in excused(parts):
        return equal_tokens(lab, parts, rest)
    traits, others = traits_of(part), [traits_of(p) for p in rest]
    if Effect.REDEFINES in traits.effects:
        return as_alone(lab, parts)
    if traits.fidelity is Fidelity.APPROX:
        bounds = [t.bound for t in (traits, *others) if t.bound is not None]
        exact = [p for p, t in zip(rest, others, strict=True) if t.bound is None]
        slack = REDEFINED_SLACK if any(Effect.REDEFINES in t.effects for t in others) else SLACK
        return within(lab, parts, exact, slack * sum(bounds))
    if not any(hangs_on_guesses(p) for p in parts):
        return equal_tokens(lab, parts, rest)
    if traits.fidelity is Fidelity.EXACT:
        return ""  # what both draw, or would draw, is held to the law of the stack with neither
    plain = [
        p
        for p, t in zip(rest, others, strict=True)
        if t.fidelity is not Fidelity.EXACT or Effect.REDEFINES in t.effects
    ]
    if any(p.slot == "search" for p in parts):
        return alike(lab, parts, plain, min(draws, MOST_ANSWERS))
    return fits(lab, parts, plain, draws)


def digest(pair: Pair) -> str:
    """Changes with the code of either technique and of what it names of its folder's own (`_common`, `_weights`): of all from
    which a technique may import but the vocabulary.  Not with comments and docstrings."""
    h = hashlib.blake2b(digest_size=12)
    for slot, name in (pair.one, pair.other):
        module = inspect.getmodule(lookup(slot, name))
        assert module is not None
        source = inspect.getsource(module)
        h.update(code(source))
        for own in sorted(Path(module.__file__ or "").parent.glob("_[!_]*.py")):
            if own.stem in source:
                h.update(code(own.read_text(encoding="utf8")))
    return h.hexdigest()
