"""Composition is computed from traits: needs, gives, effects, fidelity, history, and one technique for each slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from weft.compose import CORE_GIVES, complete, compose, require
from weft.config import build_stack
from weft.errors import ComposeError, ConfigError
from weft.registry import Part, names, parse
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity, Trait, Traits

Make = Callable[..., Part]
NEEDS = frozenset({Trait.HIDDEN_STATES})


def rules(parts: Sequence[Part]) -> list[str]:
    return [r.rule for r in compose(parts).reasons]


def test_the_empty_stack_is_fine() -> None:
    verdict = compose([])
    assert (verdict.verdict, verdict.fidelity, verdict.reasons, verdict.history) == ("ok", Fidelity.EXACT, (), 0)


def test_a_need_that_nothing_gives_is_refused_in_words(technique: Make) -> None:
    part = technique("draft", "needy", needs=NEEDS)
    verdict = compose([part])
    assert verdict.verdict == "refused"
    (reason,) = verdict.reasons
    assert reason.rule == "needs"
    assert reason.parts == ("draft=needy",)
    assert reason.text == "draft=needy needs HIDDEN_STATES; nothing in this installation gives it"


def test_the_refusal_names_what_would_give_it(technique: Make) -> None:
    part = technique("draft", "needy", needs=NEEDS)
    technique("attention", "showing", gives=NEEDS)
    technique("skip", "telling", gives=NEEDS)
    assert "attention=showing or skip=telling gives it" in compose([part]).reasons[0].text


def test_a_need_is_met_by_another_part_by_the_core_or_by_the_machine(technique: Make) -> None:
    part = technique("draft", "needy", needs=NEEDS)
    giver = technique("attention", "showing", gives=NEEDS)
    assert compose([part, giver]).verdict == "ok"
    assert compose([giver, part]).verdict == "ok"
    assert compose([part], gives=NEEDS).verdict == "ok"
    assert compose([part], gives=frozenset({Trait.TRITON})).verdict == "refused"
    assert (
        compose([technique("accept", "by_core", needs=frozenset({Trait.BOUNDED_KV, Trait.ROLLBACK}))]).verdict == "ok"
    )


@pytest.mark.parametrize("trait", sorted(set(Trait) - {Trait.READS_HISTORY}))
def test_each_trait_is_weighed(technique: Make, trait: Trait) -> None:
    part = technique("draft", "needy", needs=frozenset({trait}))
    assert compose([part]).verdict == ("ok" if trait in CORE_GIVES else "refused")
    assert compose([part], gives=frozenset({trait})).verdict == "ok"


def test_every_missing_need_has_a_reason(technique: Make) -> None:
    one = technique("draft", "one", needs=frozenset({Trait.HIDDEN_STATES, Trait.TRITON}))
    two = technique("accept", "two", needs=frozenset({Trait.TRITON}))
    assert [(r.parts, r.text.split(";")[0]) for r in compose([one, two]).reasons] == [
        (("draft=one",), "draft=one needs HIDDEN_STATES"),
        (("draft=one",), "draft=one needs TRITON"),
        (("accept=two",), "accept=two needs TRITON"),
    ]


def test_one_technique_for_each_slot() -> None:
    parts = [parse("schedule=fcfs"), parse("schedule=layered(groups=2)")]
    verdict = compose(parts)
    assert verdict.verdict == "refused"
    (reason,) = verdict.reasons
    assert reason.rule == "one per slot"
    assert reason.parts == ("schedule=fcfs", "schedule=layered(groups=2)")
    assert "schedule" in reason.text
    assert rules([parts[0], parts[0]]) == ["one per slot"]
    assert rules([parts[0], parse("kv.evict=lru")]) == []


def test_fidelity_is_the_weakest_member_s(technique: Make) -> None:
    made = {f: technique(slot, f.name.lower(), fidelity=f) for slot, f in zip(("draft", "accept", "skip"), Fidelity)}
    exact, law, approx = made[Fidelity.EXACT], made[Fidelity.SAME_LAW], made[Fidelity.APPROX]
    assert compose([exact]).fidelity is Fidelity.EXACT
    assert compose([exact, law]).fidelity is Fidelity.SAME_LAW
    assert compose([law, exact]).fidelity is Fidelity.SAME_LAW
    assert compose([exact, approx, law]).fidelity is Fidelity.APPROX
    assert compose(complete([law])).fidelity is Fidelity.SAME_LAW
    assert build_stack([law]).verdict.fidelity is Fidelity.SAME_LAW


def test_fidelities_are_ordered_from_exact_to_approximate() -> None:
    assert Fidelity.EXACT < Fidelity.SAME_LAW < Fidelity.APPROX
    assert max(Fidelity) is Fidelity.APPROX


def test_history_is_the_largest(technique: Make) -> None:
    reads = frozenset({Trait.READS_HISTORY})
    parts = [
        technique("draft", "short", needs=reads, history=3),
        technique("attention", "long", needs=reads, history=17),
        technique("skip", "none"),
    ]
    assert compose(parts).history == 17
    assert compose(parts[:1]).history == 3
    assert compose(parts[2:]).history == 0
    assert compose(parts).verdict == "ok"  # the core gives it


@pytest.mark.parametrize(
    ("needs", "history"),
    [
        (frozenset(), 3),
        (frozenset({Trait.READS_HISTORY}), 0),
        (frozenset({Trait.READS_HISTORY}), -1),
        (frozenset(), -1),
    ],
)
def test_history_goes_with_reading_it(needs: frozenset[Trait], history: int) -> None:
    with pytest.raises(ValueError, match="READS_HISTORY"):
        Traits(needs=needs, history=history)


def test_an_extra_pass_is_a_cost_and_not_a_refusal(technique: Make) -> None:
    part = technique("kv.compress", "twice", effects=frozenset({Effect.EXTRA_PASS}))
    verdict = compose([part])
    assert verdict.verdict == "cost"
    assert [(r.rule, r.parts) for r in verdict.reasons] == [("extra pass", ("kv.compress=twice",))]
    assert require([part]) == verdict
    assert set(build_stack([part]).instances) == {"kv.compress", *(s.name for s in SLOTS.values() if s.null)}


def test_a_cost_does_not_hide_a_refusal(technique: Make) -> None:
    costly = technique("kv.compress", "twice", effects=frozenset({Effect.EXTRA_PASS}))
    needy = technique("draft", "needy", needs=NEEDS)
    for parts in ([costly, needy], [needy, costly]):
        assert compose(parts).verdict == "refused"
        assert sorted(rules(parts)) == ["extra pass", "needs"]


def test_require_raises_with_every_reason(technique: Make) -> None:
    needy = technique("draft", "needy", needs=NEEDS)
    parts = [needy, parse("schedule=fcfs"), parse("schedule=layered")]
    with pytest.raises(ComposeError) as caught:
        require(parts)
    assert caught.value.reasons == tuple(r.text for r in compose(parts).reasons)
    assert len(caught.value.reasons) == 2
    assert all(r in str(caught.value) for r in caught.value.reasons)
    with pytest.raises(ComposeError, match="HIDDEN_STATES"):
        build_stack([needy])
    assert require([needy], gives=NEEDS).verdict == "ok"


def test_an_unknown_technique_is_no_matter_of_composition() -> None:
    with pytest.raises(ConfigError, match="there is no schedule=fcsf") as caught:
        compose([Part("schedule", "fcsf")])
    assert not isinstance(caught.value, ComposeError)


def test_complete_adds_the_nulls_of_open_slots_alone(technique: Make) -> None:
    nulls = {s.name: s.null for s in SLOTS.values() if s.null is not None}
    assert {p.slot: p.name for p in complete([])} == nulls
    assert {p.slot for p in complete([])} == {"schedule", "kv.evict", "draft", "accept"}
    mine = technique("schedule", "mine")
    assert [str(p) for p in complete([mine])] == ["schedule=mine", "kv.evict=lru", "draft=none", "accept=race"]
    draft = technique("draft", "guess")
    assert [str(p) for p in complete([draft])] == ["draft=guess", "schedule=fcfs", "kv.evict=lru", "accept=race"]
    twice = complete(complete([draft]))
    assert twice == complete([draft])
    assert compose(complete([])).verdict == "ok"


def test_a_stack_has_one_instance_for_each_filled_slot() -> None:
    stack = build_stack()
    assert set(stack.instances) == {"schedule", "kv.evict", "draft", "accept"}
    assert stack.get("search") is None
    with pytest.raises(KeyError):
        stack["search"]
    assert build_stack()["kv.evict"] is not stack["kv.evict"]  # two engines never share state


@pytest.mark.parametrize("part", [Part(s, n) for s in SLOTS for n in names(s)], ids=str)
def test_every_technique_composes_with_the_nulls(part: Part) -> None:
    """With what the machine might lack given, nothing else may stand in the way."""
    assert compose(complete([part]), gives=frozenset(Trait)).verdict in ("ok", "cost")
