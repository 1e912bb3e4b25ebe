"""constrain=llguidance beside no grammar: what masks cost, in the steps of the bundled model and by themselves.

The masks by themselves are made over a vocabulary as large as a current model's: the first ids of an encoding that is given as a
file of ranks, with --ranks; without it they are left out.

python -m bench.constrain.llguidance [--ranks FILE.tiktoken] [--quick] [--json]
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import Case, Options, bundled, encode, main
from bench.texts import PARAGRAPHS
from weft.exec.constrain import write_mask
from weft.exec.vocabulary import VocabularyShelf
from weft.front.text import longest
from weft.registry import parse
from weft.slots import GrammarPath, Vocabulary
from weft.types import Grammar

HELD = "constrain=llguidance"
VOCAB = 151_936
ROWS = (1, 32)
BATCHES = (1, 32)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "when": {"type": "string", "format": "date-time"},
        "places": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "people": {"type": "integer"},
                    "kind": {"enum": ["port", "town"]},
                },
                "required": ["city", "people", "kind"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "when", "places"],
    "additionalProperties": False,
}
ANSWER = json.dumps(
    {
        "name": "A letter from the lighthouse",
        "when": "1987-11-03T06:10:00Z",
        "places": [
            {"city": f"Harbour number {i} by the sea", "people": 137 * i, "kind": ("port", "town")[i % 2]}
            for i in range(12)
        ],
    }
)
"""What is written along the grammar while its masks are measured."""
NOTES = [
    "The null draws as many tokens without a grammar. The grammar is a JSON schema of an object with a date-time and an array of "
    "objects; the answers are other ones, and no shorter, as their strings have no longest length.",
]


def measure(options: Options) -> Iterator[dict[str, Any]]:
    model = bundled()
    for batch in BATCHES[:1] if options.quick else BATCHES:
        ids = [tuple(x)[:64] for x in encode(model, PARAGRAPHS)]
        prompts = [ids[i % len(ids)] for i in range(batch)]
        null = Case(name="no grammar", prompts=prompts, max_new=8 if options.quick else 48, batch=batch)
        held = replace(null, name="a JSON schema", techniques=(HELD,), grammar=Grammar("json", json.dumps(SCHEMA)))
        yield options.compare(model, null, [held], f"batch {batch}")


def ranked(file: Path) -> Vocabulary:
    """The first ids of an encoding's file of ranks, and an end."""
    lines = file.read_text(encoding="ascii").splitlines()
    tokens = tuple(base64.b64decode(line.split()[0]) for line in lines[: VOCAB - 1])
    ids, most = {token: i for i, token in enumerate(tokens)}, max(map(len, tokens))
    return Vocabulary((*tokens, b""), frozenset({VOCAB - 1}), (VOCAB - 1,), lambda text: longest(ids, text, most))


def alone(vocabulary: Vocabulary, name: str) -> Iterator[str]:
    """Sentences: what masks of one step take, made and written into logits.  name: of the encoding."""
    constrain = parse(HELD).build()
    constrain.attach(VocabularyShelf(lambda: vocabulary))
    began = time.perf_counter()
    path: GrammarPath = constrain.begin(Grammar("json", json.dumps(SCHEMA)))
    first_s = time.perf_counter() - began
    ids = list(vocabulary.encode(ANSWER))
    for rows in ROWS:
        paths, starts = [path.fork() for _ in range(rows)], [7 * i % len(ids) for i in range(rows)]
        for one, start in zip(paths, starts, strict=True):
            assert one.advance(ids[:start]) == start
        took: list[float] = []
        for step in range(200):
            logits = torch.zeros(rows, VOCAB)
            began = time.perf_counter()
            for one, row in zip(paths, logits, strict=True):
                write_mask(one, row)
            took.append(time.perf_counter() - began)
            for i, one in enumerate(paths):
                at = (starts[i] + step) % len(ids)
                if at == len(ids) - 1:
                    one.rollback(len(ids) - 1)
                else:
                    assert one.advance([ids[at]]) == 1
        p50, p99 = (1e3 * float(x) for x in np.percentile(took[5:], [50, 99]))
        yield (
            f"Masks by themselves, over {VOCAB:,} ids of {name}: {p50:.2f} ms for a step with {rows} constrained "
            f"row{'s' * (rows > 1)} in the median and {p99:.2f} ms at most in 99 of 100 steps, made by one thread and written "
            "into the logits."
        )
    yield f"The vocabulary and the grammar are made ready once: {first_s:.2f} s for both."


def run(argv: list[str]) -> int:
    if "--ranks" in argv:
        at = argv.index("--ranks")
        NOTES.extend(alone(ranked(Path(argv[at + 1])), Path(argv[at + 1]).stem))
        argv = argv[:at] + argv[at + 2 :]
    return main(HELD, "bench.constrain.llguidance", measure, NOTES, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
