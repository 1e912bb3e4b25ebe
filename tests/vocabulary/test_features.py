"""What every technique says about itself, and the two commands that read it out."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import weft
from weft.cli.app import app
from weft.errors import ConfigError
from weft.features import FIELDS, REQUIRED, feature, features, head
from weft.registry import Part, lookup, names
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity, Trait, Traits

ALL = [(slot, name) for slot in SLOTS for name in names(slot)]
KEYS = {"slot", "name", "catalogue", "paper", "summary", "fidelity", "needs", "gives", "effects"}
HEAD = """Lookup: what it does.

Paper    Someone et al., A Title, arXiv:1234.56789            (000-12, 003-4)
Rule     first line,
         second line
Units    tokens
Cost     nothing
Differs  nothing

Raises   this is a field too

Rule is a word here, not a field.
"""


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def answer(*args: str, code: int = 0) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


# ------------------------------------------------------------------------------------------ heads


def test_there_are_techniques() -> None:
    assert {("schedule", "fcfs"), ("kv.evict", "lru"), ("draft", "ngram")} <= set(ALL)
    assert [(f.slot, f.name) for f in features()] == ALL


def test_every_file_in_a_slot_s_folder_is_a_technique_s() -> None:
    root = Path(weft.__file__).parent
    for slot in SLOTS:
        folder = root.joinpath(*slot.split("."))
        files = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")} if folder.is_dir() else set()
        # A slot may share its name with a package of the engine's; then every file there must still be a technique.
        assert files <= {name for s, name in ALL if s == slot}, slot


@pytest.mark.parametrize(("slot", "name"), ALL, ids=lambda x: x)
def test_a_technique_has_a_proper_head(slot: str, name: str) -> None:
    cls, found = lookup(slot, name), feature(slot, name)
    assert cls.__module__ == f"weft.{slot}.{name}"
    assert re.fullmatch(r"\S.{10,}\.", found.summary), f"one sentence: {found.summary!r}"
    assert ": " in found.summary, "the table of `weft features` shows what follows the colon"
    for field in REQUIRED:
        assert found.fields[field].strip(), f"{field} says nothing"
    assert list(found.fields) == [f for f in FIELDS if f in found.fields], "the fields stand in one order everywhere"
    assert re.match(r"none\b", found.paper) or re.search(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b", found.paper)
    assert not re.search(r"\b\d{3}-\d", found.paper), "a catalogue id outside its brackets is not read"
    assert (found.fields["Raises"] == "nothing") == (not hasattr(cls, "__post_init__"))


@pytest.mark.parametrize(("slot", "name"), ALL, ids=lambda x: x)
def test_a_technique_declares_traits_of_the_closed_vocabulary(slot: str, name: str) -> None:
    traits = feature(slot, name).traits
    assert isinstance(traits, Traits)
    assert isinstance(traits.fidelity, Fidelity)
    assert all(isinstance(t, Trait) for t in traits.needs | traits.gives)
    assert all(isinstance(e, Effect) for e in traits.effects)


def test_catalogue_ids_exist(shared: Callable[[str], Path]) -> None:
    rows = shared("catalogue/index.tsv").read_text().splitlines()[1:]
    known = {row.split("\t")[0] for row in rows}
    assert len(known) > 100
    used = {i for f in features() for i in f.catalogue}
    assert used, "no technique names a paper of the catalogue"
    assert used <= known


def test_a_head_is_read() -> None:
    summary, fields = head(HEAD)
    assert summary == "Lookup: what it does."
    assert list(fields) == ["Paper", "Rule", "Units", "Cost", "Differs", "Raises"]
    assert fields["Rule"] == "first line, second line"
    assert fields["Raises"] == "this is a field too"
    assert head("") == ("", {})


@pytest.mark.parametrize("ids", ["(000-12, 003-4)", "[000-12, 003-4]"])
def test_catalogue_ids_are_taken_out_of_the_paper(
    technique: Callable[..., Part], monkeypatch: pytest.MonkeyPatch, ids: str
) -> None:
    part = described(technique, monkeypatch, HEAD.replace("(000-12, 003-4)", ids))
    found = feature(part.slot, part.name)
    assert found.catalogue == ("000-12", "003-4")
    assert found.paper == "Someone et al., A Title, arXiv:1234.56789"
    assert found.fields["Paper"].endswith(ids)


@pytest.mark.parametrize("field", REQUIRED)
def test_a_head_that_lacks_a_field_is_refused(
    technique: Callable[..., Part], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    part = described(technique, monkeypatch, re.sub(rf"^{field}  ", f"Not{field}  ", HEAD, flags=re.MULTILINE))
    with pytest.raises(ConfigError, match=f"draft=described: the head of its file lacks {field}$"):
        feature(part.slot, part.name)


def described(technique: Callable[..., Part], monkeypatch: pytest.MonkeyPatch, text: str) -> Part:
    """A technique whose file has this head."""
    part = technique("draft", "described")
    module = lookup(part.slot, part.name).__module__
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module, text))
    return part


# ------------------------------------------------------------------------------------------ weft features


def test_features_as_json() -> None:
    listed = answer("features")
    assert [(f["slot"], f["name"]) for f in listed] == ALL
    assert all(set(f) == KEYS for f in listed)
    fcfs = next(f for f in listed if f["name"] == "fcfs")
    assert fcfs == {
        "slot": "schedule",
        "name": "fcfs",
        "catalogue": ["000-2"],
        "paper": "Agrawal et al., Sarathi-Serve, arXiv:2403.02310",
        "summary": "FCFS: first come, first served, in Sarathi's order within a step.",
        "fidelity": "EXACT",
        "needs": [],
        "gives": ["STARVATION_FREE"],
        "effects": ["PREEMPTS"],
    }


def test_features_as_a_table() -> None:
    result = run("features")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for slot, name in ALL:
        (line,) = [x for x in lines if f"{slot}={name} " in x]
        assert ("(default)" in line) == (SLOTS[slot].null == name)
    assert "000-2" in result.stdout


# ------------------------------------------------------------------------------------------ weft compose


NULLS = ["schedule=fcfs", "kv.evict=lru", "draft=none", "accept=race"]


def test_compose_of_nothing_is_the_default_stack() -> None:
    said = answer("compose")
    assert said == {"verdict": "ok", "fidelity": "EXACT", "redefines": [], "reasons": [], "stack": NULLS}


def test_compose_says_ok_with_the_completed_stack() -> None:
    said = answer("compose", "schedule=layered(groups=2)", "draft=ngram")
    assert (said["verdict"], said["reasons"]) == ("ok", [])
    assert said["stack"] == ["schedule=layered(groups=2)", "draft=ngram", "kv.evict=lru", "accept=race"]


def test_another_answer_on_purpose_is_told_beside_the_fidelity() -> None:
    said = answer("compose", "sample=cad(alpha=0.3)", "draft=none")
    assert (said["fidelity"], said["redefines"]) == ("EXACT", ["sample=cad(alpha=0.3)"])
    assert "EXACT, redefined" in run("compose", "search=beam").stdout
    assert "redefined" not in run("compose", "draft=ngram").stdout
    lines = run("features").stdout.splitlines()
    told = {name: next(x for x in lines if f"{name} " in x) for name in ("sample=cad", "adapt=lora", "draft=ngram")}
    assert ["redefined" in line for line in told.values()] == [True, True, False]


def test_a_part_that_can_never_act_is_told() -> None:
    """Rejection weighs guesses, and the default draft makes none."""
    said = answer("compose", "accept=rejection")
    assert said["verdict"] == "cost"
    assert [r["text"] for r in said["reasons"]] == [
        "accept=rejection has nothing to do while the slot draft is at its default; add one, such as draft=ngram"
    ]
    assert answer("compose", "accept=rejection", "draft=speculative_sampling")["verdict"] == "ok"


def test_a_refused_stack_ends_in_1_with_its_reasons() -> None:
    said = answer("compose", "schedule=fcfs", "schedule=layered", code=1)
    assert set(said) == {"verdict", "fidelity", "redefines", "reasons", "stack"}
    assert said["verdict"] == "refused"
    (reason,) = said["reasons"]
    assert set(reason) == {"rule", "parts", "text"}
    assert reason["rule"] == "one per slot"
    assert reason["parts"] == ["schedule=fcfs", "schedule=layered"]
    result = run("compose", "schedule=fcfs", "schedule=layered")
    assert result.exit_code == 1
    assert "refused" in result.stdout
    assert reason["text"] in result.stdout


def test_a_missing_need_ends_in_1(technique: Callable[..., Part]) -> None:
    technique("draft", "needy", needs=frozenset({Trait.HIDDEN_STATES}), fidelity=Fidelity.APPROX)
    said = answer("compose", "draft=needy", code=1)
    assert (said["verdict"], said["fidelity"]) == ("refused", "APPROX")
    assert [r["rule"] for r in said["reasons"]] == ["needs"]


def test_a_stack_at_a_cost_ends_in_0(technique: Callable[..., Part]) -> None:
    technique("kv.compress", "twice", effects=frozenset({Effect.EXTRA_PASS}))
    said = answer("compose", "kv.compress=twice")
    assert said["verdict"] == "cost"
    assert [r["rule"] for r in said["reasons"]] == ["extra pass"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule=fcsf", "did you mean fcfs"),
        ("shedule=fcfs", "did you mean schedule"),
        ("schedule", "SLOT=NAME(ARGS)"),
        ("schedule=layered(groups=0)", "at least 1"),
        ("schedule=layered(group=4)", "did you mean groups"),
        ("schedule=layered(groups=f())", "literal"),
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
def test_what_cannot_be_read_ends_in_2_with_one_sentence(text: str, said: str, form: tuple[str, ...]) -> None:
    result = run("compose", text, *form)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
