"""The driver's end of the protocol: one JSON object a line on stdin, one answer a line on stdout.

    {"do": "prepare", "model": FOLDER, "format": "int8", "cache": FOLDER}       convert the weights, where that is not done yet
    {"do": "load", ..., "threads": 2, "batch": 16, "length": 192}               at most so many sequences of so many tokens
    {"do": "measure", "batch": 4, "prompt": 128, "new": 64, "seed": 1}

and each is answered by {"ok": true, ...} or {"ok": false, "error": "..."}.  At the end of stdin the driver ends.  What an
engine itself prints to stdout goes to stderr, so that it can't stand between the answers.

Nothing is imported here but Python's own library: drivers run under the Pythons of other engines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(slots=True)
class Kept:
    """Weights as an engine stores them: how many, in how many bytes, scales included."""

    weights: int = 0
    bytes: int = 0

    def add(self, weights: int, bytes: int) -> None:
        self.weights += weights
        self.bytes += bytes


@dataclass(slots=True)
class Loaded:
    """What an engine is, once it has its weights.

    kind: its own name for the format.  head: the output projection, which may be the embedding too.  experts: of all mixtures;
    a step reads those that are hit.  body: everything else that each step reads whole.  kv_bytes: keys and values of one
    position.  info: what a reader of the figures should know of how it was built and set.
    """

    version: str
    kind: str
    kv_bytes: float
    body: Kept = field(default_factory=Kept)
    head: Kept = field(default_factory=Kept)
    experts: Kept = field(default_factory=Kept)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Measured:
    """One batch, once.

    prefill_s: from handing the prompts in until every sequence has its first token.  steps_s: the steps after that in which every
    sequence got one token.  tokens: of each sequence, in the order of its prompts.
    """

    prefill_s: float
    steps_s: list[float]
    tokens: list[list[int]]


class Engine(Protocol):
    """What a driver implements."""

    def prepare(self, model: Path, format: str, cache: Path) -> None:
        """Write into `cache` what the engine needs beside the checkpoint.  Twice does no harm."""

    def load(self, model: Path, format: str, cache: Path, threads: int, batch: int, length: int) -> Loaded: ...

    def measure(self, prompts: list[list[int]], new: int) -> Measured:
        """Greedy tokens, `new` for each prompt, whatever they are."""


def prompts_of(seed: int, batch: int, prompt: int, vocab: int) -> list[list[int]]:
    """Random prompts that differ; the same for every engine."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(prompt)] for _ in range(batch)]


def main(engine: Callable[[], Engine]) -> None:
    """Answer until stdin ends.  --cores: the only ones to run on.  --memory: bytes of data that the process may have at most."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", type=lambda text: {int(part) for part in text.split(",")})
    parser.add_argument("--memory", type=int)
    flags = parser.parse_args()
    if flags.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, flags.cores)
    if flags.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (flags.memory, flags.memory))
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    made: Engine | None = None
    for line in sys.stdin:
        try:
            if made is None:
                made = engine()
            answer = {"ok": True, **act(made, json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def act(engine: Engine, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Do what one line asks."""
    if asked["do"] == "measure":
        prompts = prompts_of(asked["seed"], asked["batch"], asked["prompt"], asked["vocab"])
        return asdict(engine.measure(prompts, asked["new"]))
    where = Path(asked["model"]), asked["format"], Path(asked["cache"])
    if asked["do"] == "prepare":
        engine.prepare(*where)
        return {}
    if asked["do"] == "load":
        return asdict(engine.load(*where, asked["threads"], asked["batch"], asked["length"]))
    raise ValueError(f"a driver can prepare, load and measure, not {asked['do']!r}")
