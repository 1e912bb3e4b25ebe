"""Suite `schema`: JSON schemas with valid and invalid instances; each is taken or turned down by the grammar of its schema.

A schema counts as enforced where it is taken and every instance with it is judged rightly.  An instance is a value, not a text:
the grammar has it where it allows one way of writing it, with the members of objects in any order, and whole numbers without
a fraction of zero.

    schema/jsonschemabench-maskbench/*.jsonl       {schema, tests: [{valid, data}]} on each line
    schema/json-schema-test-suite/tests/DRAFT/     [{schema, tests: [{valid, data}]}]
    schema/schemastore/                            schemas/json/NAME.json, test/NAME/ (valid), negative_test/NAME/ (invalid)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.conformance.count import Count, folder
from weft.conformance.spell import spells
from weft.errors import RequestError
from weft.exec.vocabulary import VocabularyShelf
from weft.registry import Part
from weft.slots import SLOTS, Constrain, GrammarPath, Vocabulary
from weft.types import Grammar

BYTES = Vocabulary((*(bytes([i]) for i in range(256)), b""), frozenset({256}), (256,), lambda text: list(text.encode()))
"""A vocabulary in which every text can be written: what a grammar allows does not depend on the model's."""
DRAFTS = {
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
"""What a schema of the test suite means by the folder that it stands in, where it does not say so itself."""

ANNOTATION = "is only an annotation by default"
"""How the test suite describes values of a wrong format that are valid where formats are not asserted; weft asserts them, and its
other tests of formats take that for granted, so these do not apply."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A schema, and instances with whether they are valid."""

    name: str
    schema: Any
    tests: tuple[tuple[bool, Any], ...]


def run(data: Path) -> Count:
    """Over the folder `schema` of `data`.  Raises ConfigError where it is not there."""
    return judge(samples(folder(data, "schema")), weft())


def weft() -> Callable[[Any], GrammarPath]:
    """Schema to the beginning of its grammar, as the server holds answers to it.  Raises RequestError for what it refuses."""
    constrain: Constrain = Part("constrain", SLOTS["constrain"].asked or "").build()
    constrain.attach(VocabularyShelf(lambda: BYTES))
    return lambda schema: constrain.begin(Grammar("json", json.dumps(schema)))


def judge(found: Iterable[Sample], begin: Callable[[Any], GrammarPath]) -> Count:
    """Count what becomes of the samples."""
    count = Count("schema")
    for sample in found:
        count.total += 1
        before = count.wrong_accept, count.wrong_reject
        try:
            path, orders = begin(sample.schema), list(_orders(sample.schema))
            for i, (valid, instance) in enumerate(sample.tests):
                taken = spells(path.fork(), instance, orders)
                if taken and not valid:
                    count.accepted_wrongly(f"{sample.name}, instance {i}")
                elif valid and not taken:
                    count.rejected_wrongly(f"{sample.name}, instance {i}")
        except RequestError:
            count.refused += 1
            count.wrong_accept, count.wrong_reject = before
            continue
        count.enforced += before == (count.wrong_accept, count.wrong_reject)
    return count


def _orders(schema: Any) -> Iterator[list[str]]:
    """Names of members, in the orders in which a schema lists them."""
    if isinstance(schema, dict):
        named = schema.get("properties")
        if isinstance(named, dict):
            yield list(named)
        for value in schema.values():
            yield from _orders(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _orders(value)


# ---------------------------------------------------------------------------------------------- the data


def samples(place: Path) -> Iterator[Sample]:
    """Everything in the folder, in a fixed order."""
    for file in sorted((place / "jsonschemabench-maskbench").glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf8").splitlines()):
            found = json.loads(line)
            yield _sample(f"{file.name}:{number + 1} {found.get('file', '')}", found)
    for draft, meaning in DRAFTS.items():
        below = place / "json-schema-test-suite" / "tests" / draft
        for file in sorted(below.rglob("*.json")):
            for group in json.loads(file.read_text(encoding="utf8")):
                schema = group["schema"]
                if isinstance(schema, dict) and "$schema" not in schema:
                    schema = {"$schema": meaning, **schema}
                yield _sample(f"{draft}/{file.name}: {group['description']}", {**group, "schema": schema})
    store = place / "schemastore"
    for file in sorted((store / "schemas").rglob("*.json")):
        tests = [
            (valid, json.loads(one.read_text(encoding="utf-8-sig")))
            for kind, valid in (("test", True), ("negative_test", False))
            for one in sorted((store / kind / file.stem).glob("*.json"))
        ]
        yield Sample(f"schemastore/{file.stem}", json.loads(file.read_text(encoding="utf-8-sig")), tuple(tests))


def _sample(name: str, found: dict[str, Any]) -> Sample:
    tests = [t for t in found["tests"] if not t.get("description", "").endswith(ANNOTATION)]
    return Sample(name, found["schema"], tuple((test["valid"], test["data"]) for test in tests))
