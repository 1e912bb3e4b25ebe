"""Drafts by FastDraft's recipe beside each other: what the target's own answers bring, on held-out prose and on Spec-Bench.

    python -m tools.train_tiny fastdraft ../shared/data fast --teacher weft/bundled/tiny --control
    python -m tools.train_tiny fastdraft ../shared/data fast/further --teacher weft/bundled/tiny --init weft/bundled/draft
    python -m bench.draft.fastdraft ../shared/data fast

The draft, its control (the same first phases, then as many positions of text in place of the target's answers) and the draft
that ships guess for the bundled model: the same prompts under the same seeds, 4 guesses a step, accept=race, so that the texts
are the same too.  `stood` counts guesses all before which stood, `predicted` is what the law says of the same ones, and
`tokens` those of a step.  The grown shapes compute what the bundled model does, so that guesses stand as often there; what
that brings, `python -m bench.draft.table --draft-model FOLDER` measures.  Greedy answers of a small model loop: `repeated` says
how much.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bench.draft import table
from bench.draft.law import Trials, reader, repeated
from bench.draft.stands import Guessing, judged, made, written
from bench.harness import RESULTS, bundled, machine, write
from weft.front.text import ModelText
from weft.hub import resolve, resolve_draft
from weft.types import SamplingSpec

OUT = RESULTS / "draft-fastdraft.json"
GUESSES = 4
TEXTS = ("prose", "spec-bench")
TEMPERATURES = (0.8, 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.draft.fastdraft", description="Compare drafts by their recipe."
    )
    parser.add_argument("data", type=Path, help="folder with text/novels and eval/spec-bench")
    parser.add_argument("folder", type=Path, help="of the draft; its control is in FOLDER/control")
    parser.add_argument("--prompts", type=int, default=12, help="of each text (12)")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--out", type=Path, default=OUT)
    flags = parser.parse_args(argv)
    told = {name: folder / "recipe.json" for name, folder in drafts(flags).items()}
    recipes = {name: json.loads(path.read_text()) for name, path in told.items() if path.is_file()}
    command = "python -m bench.draft.fastdraft ../shared/data fast"
    write(flags.out, {"command": command, "machine": machine(), "recipes": recipes, "rows": rows(flags)})
    return 0


def drafts(flags: argparse.Namespace) -> dict[str, Path]:
    """By the name of their rows; those whose folder is there."""
    found = {
        "text, domain, answers": flags.folder,
        "text, domain, text again": flags.folder / "control",
        "text, domain": flags.folder / "2-domain",
        "the one that ships": resolve_draft("bundled"),
        "the one that ships, then answers": flags.folder / "further",
    }
    return {name: folder for name, folder in found.items() if (folder / "config.json").is_file()}


def rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    model, target = bundled(), reader(resolve(None))
    ends = ModelText.load(resolve(None)).eos_ids
    for text in TEXTS:
        prompts = list(islice(table.candidates(model, flags.data, text, 768), flags.prompts))
        for temperature in TEMPERATURES:
            sampling = SamplingSpec(max_tokens=flags.new, temperature=temperature, stop_ids=ends)
            for name, folder in drafts(flags).items():
                trials = Trials()
                part = f"draft=speculative_sampling(model={str(folder)!r}, guesses={GUESSES})"
                runtime = made(Guessing(name, part, lambda _: None), max_model_len=1024)
                texts = written(runtime, prompts, range(len(prompts)), sampling, trials)
                told = judged(texts, target, reader(folder), temperature, weighs=False)
                row = {
                    "draft": name, "prompts": text, "temperature": temperature, "trials": told.trials, "stood": told.rate,
                    "predicted": told.predicted, "chance": told.chance, "slips": told.slips,
                    "tokens": trials.tokens / trials.steps,
                    "repeated": sum(repeated(out) for (_, out, _), _ in texts) / len(texts),
                }  # fmt: skip
                print(row, flush=True)
                found.append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
