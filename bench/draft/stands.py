"""How often guesses stand, how often the law says, and what chance alone moves that by: every draft that has a law, one by one.

    python -m bench.draft.stands ../shared/data
    python -m bench.draft.stands ../shared/data --only crossvocab --sequences 10 --seed 0

Beginnings of the held-out novels, at temperature 0.8, on the bundled model in float32; the laws are read by `transformers`.
Every draft gets the same seeds, and under accept=race therefore the same texts and the same noise: what chance does to one of
them it does to all.  `slips` counts trials that are not what their own noise makes of the two laws (`bench.draft.law.slips`);
`tens` has how far ten sequences at a time were from the law, and `like_the_first` how these went with those of the first draft
(correlation).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.draft.crossvocab import foreign
from bench.draft.law import Heads, Text, Translated, Trials, Trimmed, chance, chances, reader, slips, texts_of
from bench.draft.tree_law import Places
from bench.harness import RESULTS, machine, write
from bench.said import said
from tools.tiny.corpus import Corpus
from weft.draft.clover import BUNDLED
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.thread import step
from weft.front.text import ModelText, vocabulary_of
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve, resolve_draft
from weft.types import Plan, RequestSpec, SamplingSpec, StepResult, TokenItem, Tokens

OUT = RESULTS / "draft-stands.json"
TEMPERATURE, BEGINNING, TEN = 0.8, 16, 10
Reads = Callable[[Runtime], Any]
"""What gives the draft's laws beside a runtime that guesses."""


@dataclass(frozen=True, slots=True)
class Guessing:
    """name: of the row.  part: of the stack.  reads: the law of its guesses."""

    name: str
    part: str
    reads: Reads
    accept: str = "race"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.draft.stands", description="Compare guesses with their law.")
    parser.add_argument("data", type=Path, help="folder with text/novels")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--new", type=int, default=300, help="tokens of a sequence (300)")
    parser.add_argument("--seed", type=int, default=100, help="of the first sequence; the others follow (100)")
    parser.add_argument(
        "--out", type=Path, help="file of the result (bench/results/draft-stands.json, if all is asked for)"
    )
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.only else OUT)
    rows: list[dict[str, Any]] = []
    first: list[float] = []
    command = f"python -m bench.draft.stands ../shared/data --sequences {flags.sequences} --new {flags.new} --seed {flags.seed}"
    with tempfile.TemporaryDirectory() as place:
        for one in guessings(Path(place)):
            if flags.only in one.name:
                row, tens = compare(one, flags)
                first = first or tens
                rows.append(row | {"like_the_first": float(np.corrcoef(first, tens)[0, 1]) if len(tens) > 2 else None})
                print(told(rows[-1]), flush=True)
                if out is not None:
                    write(out, {"command": command, "machine": machine(), "rows": rows})
    return 0


def guessings(place: Path) -> Iterator[Guessing]:
    """Every draft that guesses by a law, and two with an accept that weighs laws."""
    bundled = resolve_draft("bundled")
    whole = "draft=speculative_sampling(guesses=3)"
    yield Guessing("speculative_sampling", whole, lambda _: reader(bundled))
    for merges in (3830, 1000, 300):
        folder = place / str(merges)
        folder.mkdir()
        foreign(folder, merges)
        yield Guessing(
            f"crossvocab, {merges} merges",
            f"draft=crossvocab(model={str(folder)!r}, guesses=3)",
            partial(translated, folder),
        )
    text = said()
    yield Guessing("vocabtrim, 1024 tokens", f"draft=vocabtrim(text={text!r}, keep=1024, guesses=3)", trimmed)
    for layers in (2, 4, 6):
        yield Guessing(
            f"early_exit, {layers} layers", f"draft=early_exit(exit={layers}, guesses=3)", partial(cut, layers)
        )
    yield Guessing("clover", "draft=clover(guesses=3)", lambda _: Heads(BUNDLED))
    yield Guessing("speculative_sampling, rejection", whole, lambda _: reader(bundled), "rejection")
    yield Guessing("clover, rejection", "draft=clover(guesses=3)", lambda _: Heads(BUNDLED), "rejection")


def translated(folder: Path, runtime: Runtime) -> Translated:
    return Translated(reader(folder), runtime.engine.stack["draft"].translation, runtime.setup.spec.vocab)


def trimmed(runtime: Runtime) -> Trimmed:
    return Trimmed(reader(resolve_draft("bundled")), runtime.engine.stack["draft"].head)


def cut(layers: int, runtime: Runtime) -> Any:
    """The bundled model's first layers under its own head."""
    model = reader(resolve(None))
    model.model.layers = model.model.layers[:layers]
    return model


def made(one: Guessing, **given: Any) -> Runtime:
    """The bundled model in float32 with a draft that guesses as far as it can."""
    options = {"max_model_len": 512, **given}
    config = EngineConfig(
        model=resolve(None), dtype="float32", device="cpu", threads=1, max_num_seqs=16,
        techniques=(one.part, f"accept={one.accept}"), draft_control="off", **options,
    )  # fmt: skip
    return build(prepare(config), vocabulary=ModelText.load(resolve(None)).vocabulary, vocabulary_of=vocabulary_of)


def written(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: SamplingSpec,
    trials: Trials | Places | None = None,
) -> list[tuple[Any, int]]:
    """Texts that an engine writes with guesses, a prompt each, with their trials, and the seed of each.  trials: filled too."""
    trials = Trials() if trials is None else trials
    owners, outputs = dict[int, int](), dict[int, list[int]]()
    inner = runtime.executor.execute

    def execute(plan: Plan) -> StepResult:
        owners.update((r.rid, r.id) for r in runtime.engine.requests())
        trials.take(plan, found := inner(plan))
        return found

    runtime.executor.execute = execute  # type: ignore[method-assign]
    for id, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        asked = RequestSpec(id=id, items=(TokenItem(tuple(prompt)),), sampling=sampling, seed=seed)
        assert runtime.engine.add(asked, 0.0) == []
    while runtime.engine.has_work:
        for event in step(runtime.engine, runtime.executor)[0]:
            if isinstance(event, Tokens):
                outputs.setdefault(event.id, []).extend(event.tokens)
    runtime.executor.execute = inner  # type: ignore[method-assign]
    return [
        (text, seeds[owners[rid]])
        for rid, text in zip(trials.by_sequence, texts_of(trials, owners, prompts, outputs), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Judged:
    """chances: of every trial, by sequence.  stood: trials of each that did.  slips: trials that their noise does not explain."""

    chances: list[list[float]]
    stood: list[int]
    slips: int

    @property
    def trials(self) -> int:
        return sum(map(len, self.chances))

    @property
    def rate(self) -> float:
        return sum(self.stood) / self.trials

    @property
    def predicted(self) -> float:
        return sum(map(sum, self.chances)) / self.trials

    @property
    def chance(self) -> float:
        return chance([c for mine in self.chances for c in mine])

    def groups(self, size: int) -> list[float]:
        """How far so many sequences at a time were from the law."""
        found = []
        for low in range(0, len(self.stood) - size + 1, size):
            mine = self.chances[low : low + size]
            found.append((sum(self.stood[low : low + size]) - sum(map(sum, mine))) / sum(map(len, mine)))
        return found


def judged(texts: Sequence[tuple[Text, int]], target: Any, draft: Any, temperature: float, *, weighs: bool) -> Judged:
    """texts: with their seeds.  target, draft: as `bench.draft.law.chances` has them."""
    return Judged(
        [chances(target, draft, text, temperature, weighs=weighs) for text, _ in texts],
        [sum(ok for _, _, ok in text[2]) for text, _ in texts],
        sum(slips(target, draft, text, seed, temperature, weighs=weighs) for text, seed in texts),
    )


def compare(one: Guessing, flags: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    """A row, and how far ten sequences at a time were from the law."""
    runtime = made(one)
    seeds = list(range(flags.seed, flags.seed + flags.sequences))
    sampling = SamplingSpec(max_tokens=flags.new, temperature=TEMPERATURE)
    texts = written(runtime, beginnings(flags.data, flags.sequences), seeds, sampling)
    texts.sort(key=lambda found: found[1])
    found = judged(texts, reader(resolve(None)), one.reads(runtime), TEMPERATURE, weighs=one.accept == "rejection")
    tens = found.groups(TEN)
    row = {
        "draft": one.name, "accept": one.accept, "temperature": TEMPERATURE, "sequences": len(texts), "trials": found.trials,
        "stood": found.rate, "predicted": found.predicted, "chance": found.chance, "slips": found.slips,
        "tens": [min(tens), max(tens)] if tens else None,
    }  # fmt: skip
    return row, tens


def beginnings(data: Path, count: int) -> list[list[int]]:
    """The same each time."""
    tokenizer, place = Tokenizer.load(resolve(None)), np.random.default_rng(12)
    novels = [tokenizer.encode(novel, add_special=False) for novel in Corpus(data).held_out()]
    found = []
    for i in range(count):
        novel = novels[i % len(novels)]
        start = int(place.integers(len(novel) - BEGINNING))
        found.append(novel[start : start + BEGINNING])
    return found


def told(row: dict[str, Any]) -> str:
    off = row["stood"] - row["predicted"]
    return (
        f"{row['draft']}: {row['trials']} trials, stood {row['stood']:.4f}, predicted {row['predicted']:.4f}, {off:+.4f} "
        f"({off / row['chance']:+.1f} of what chance moves it by), slips {row['slips']}, tens {json.dumps(row['tens'])}, "
        f"like the first {row['like_the_first']}"
    )


if __name__ == "__main__":
    sys.exit(main())
