"""Whether a stack of techniques goes together: computed from their traits, with reasons in words.

`compose(parts)` answers ok, cost (it runs, at a price that is named) or refused.  No technique's name is ever looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weft.errors import ComposeError
from weft.registry import Part, lookup, parse
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity, Trait, Traits, told

CORE_GIVES: frozenset[Trait] = frozenset(
    {
        Trait.ATTENTION_MASS,
        Trait.BOUNDED_KV,
        Trait.READS_HISTORY,
        Trait.ROLLBACK,
        Trait.SECOND_MODEL,
        Trait.TARGET_FEATURES,
        Trait.TREE_MASK,
    }
)
"""What every stack has from the core itself: attention summed by entry, bounded KV, capped prefix hits, truncation, trees of
guesses, a second model beside the target (it is loaded where a part names one), the target's final states.  Starvation is the
schedule's matter."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One finding.  rule: a short word; parts: the parts concerned, as written."""

    rule: str
    parts: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    verdict: Literal["ok", "cost", "refused"]
    fidelity: Fidelity
    reasons: tuple[Reason, ...]
    history: int = 0
    """The largest READS_HISTORY(w): a prefix hit ends at least so many tokens before the prompt's end."""
    effects: frozenset[Effect] = frozenset()
    """Everything that any part does."""
    redefines: tuple[str, ...] = ()
    """Parts that give another answer on purpose: fidelity is meant against what they define, not against the plain answer."""

    @property
    def answers(self) -> str:
        """The fidelity as a reader is told it."""
        return told(self.fidelity, self.effects)


def traits_of(part: Part) -> Traits:
    traits = lookup(part.slot, part.name).traits  # type: ignore[attr-defined]
    assert isinstance(traits, Traits)
    return traits


def compose(parts: Sequence[Part], gives: frozenset[Trait] = frozenset()) -> Verdict:
    """gives: what the machine and the model give beside the core."""
    reasons: list[Reason] = []
    seen: dict[str, Part] = {}
    for part in parts:
        if part.slot in seen:
            reasons.append(
                Reason(
                    "one per slot",
                    (str(seen[part.slot]), str(part)),
                    f"slot {part.slot} takes one technique; leave one out",
                )
            )
        seen[part.slot] = part
    declared = [(part, traits_of(part)) for part in parts]
    offered = CORE_GIVES | gives | {g for _, t in declared for g in t.gives}
    for part, traits in declared:
        for need in sorted(traits.needs - offered):
            reasons.append(Reason("needs", (str(part),), f"{part} needs {need}; {_who_gives(need, seen)}"))
    refused = bool(reasons)
    for part, traits in declared:
        if Effect.EXTRA_PASS in traits.effects:
            reasons.append(Reason("extra pass", (str(part),), f"{part} costs an extra pass over the prompt"))
    reasons += _without_guesses(declared)
    reasons += _without_company(declared)
    fidelity = max((t.fidelity for _, t in declared), default=Fidelity.EXACT)
    verdict: Literal["ok", "cost", "refused"] = "refused" if refused else "cost" if reasons else "ok"
    history = max((t.history for _, t in declared), default=0)
    effects = frozenset(e for _, t in declared for e in t.effects)
    redefines = tuple(str(part) for part, t in declared if Effect.REDEFINES in t.effects)
    return Verdict(verdict, fidelity, tuple(reasons), history, effects, redefines)


def _without_guesses(declared: Sequence[tuple[Part, Traits]]) -> list[Reason]:
    """Guesses are not made where each token is needed before the next one: both go on, and one of them has nothing to do."""
    alone = [part for part, t in declared if Effect.ONE_AT_A_TIME in t.effects]
    guessing = [part for part, t in declared if Effect.GUESSES in t.effects]
    return [
        Reason(
            "one at a time",
            (str(one), str(other)),
            f"{one} takes one token at a time, so {other} has no guesses to make or to weigh for its sequences",
        )
        for one in alone
        for other in guessing
    ]


def _without_company(declared: Sequence[tuple[Part, Traits]]) -> list[Reason]:
    """Parts whose class names `beside` have nothing to do where those slots hold their null: said, since it would never show."""
    held = {part.slot: part.name for part, _ in declared}
    found = []
    for part, _ in declared:
        for wanted in map(parse, getattr(lookup(part.slot, part.name), "beside", ())):
            null = SLOTS[wanted.slot].null
            if held.get(wanted.slot, null) == null:
                text = f"{part} has nothing to do while the slot {wanted.slot} is at its default; add one, such as {wanted}"
                found.append(Reason("nothing to do", (str(part),), text))
    return found


def require(parts: Sequence[Part], gives: frozenset[Trait] = frozenset()) -> Verdict:
    """`compose`, raising ComposeError with the reasons where the stack is refused."""
    verdict = compose(parts, gives)
    if verdict.verdict == "refused":
        raise ComposeError([r.text for r in verdict.reasons])
    return verdict


def complete(parts: Sequence[Part]) -> list[Part]:
    """The stack with the null of every slot that it leaves open."""
    named = {p.slot for p in parts}
    return [*parts, *(Part(s.name, s.null) for s in SLOTS.values() if s.null is not None and s.name not in named)]


def _who_gives(need: Trait, stack: Mapping[str, Part]) -> str:
    from weft.registry import names

    givers = [
        f"{slot}={name}"
        for slot in SLOTS
        for name in names(slot)
        if need in traits_of(Part(slot, name)).gives and str(stack.get(slot)) != f"{slot}={name}"
    ]
    return f"{' or '.join(givers)} gives it" if givers else "nothing in this installation gives it"
