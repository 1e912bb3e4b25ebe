"""What rules of acceptance do to answers, beside the race and rejection: laws at places of held-out prose, and what is written.

    python -m bench.accept.lenient ../shared/data

`law`: at places of novels that neither model has read, from both models' distributions as `transformers` reads them, without
sampling: how often a guess stands, the divergence of the token that stands from the target's law (`weft.fidelity.rule`), both
ways, and how often both have the same likeliest token.  `written`: by an engine with 4 guesses of the draft that ships, under
the same seeds: tokens of a step, how the target itself likes what was written (perplexity at temperature 1), and the share of
8-grams that stood in a text before.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.draft.law import laws, reader, repeated
from bench.draft.stands import Guessing, beginnings, made, written
from bench.harness import RESULTS, machine, write
from tools.tiny.corpus import Corpus
from weft.accept.bild import BiLD
from weft.accept.race import Race
from weft.accept.rejection import Rejection
from weft.accept.typical import Typical
from weft.fidelity.rule import divergence, emitted
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve, resolve_draft
from weft.types import Plan, SamplingSpec, StepResult

OUT = RESULTS / "accept-lenient.json"
DRAFT = "draft=speculative_sampling(guesses=4)"
RULES: dict[str, Any] = {
    "race": Race(),
    "rejection": Rejection(),
    "typical(epsilon=0.3)": Typical(epsilon=0.3),
    "typical(epsilon=0.09)": Typical(epsilon=0.09),
    "typical(epsilon=0.01)": Typical(epsilon=0.01),
    "bild(rollback=1)": BiLD(rollback=1.0),
    "bild(rollback=2)": BiLD(rollback=2.0),
    "bild(rollback=4)": BiLD(rollback=4.0),
}
TEMPERATURES, WRITTEN = (0.8, 1.0), (0.8, 1.0, 0.0)
WINDOW, FIRST = 128, 32
"""Tokens of a passage, and those of it before the first place."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accept.lenient", description="What rules do to answers.")
    parser.add_argument("data", type=Path, help="folder with text/novels")
    parser.add_argument("--places", type=int, default=512, help="places of prose (512)")
    parser.add_argument("--sequences", type=int, default=32, help="texts that are written under each rule (32)")
    parser.add_argument("--new", type=int, default=128, help="tokens of each (128)")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the result")
    flags = parser.parse_args(argv)
    target, draft = reader(resolve(None)), reader(resolve_draft("bundled"))
    found: dict[str, Any] = {"law": [], "written": []}
    sizes = f"--places {flags.places} --sequences {flags.sequences} --new {flags.new}"
    command = f"python -m bench.accept.lenient ../shared/data {sizes}"
    for temperature in TEMPERATURES:
        pairs = places(flags.data, flags.places, target, draft, temperature)
        for name, rule in RULES.items():
            found["law"].append({"rule": name, "temperature": temperature, **judged(rule, pairs)})
            print(found["law"][-1], flush=True)
    for temperature in WRITTEN:
        for name in RULES:
            row = texts(name, temperature, flags.data, flags.sequences, flags.new, target)
            found["written"].append({"rule": name, "temperature": temperature, **row})
            print(found["written"][-1], flush=True)
            write(flags.out, {"command": command, "machine": machine(), **found})
    return 0


def places(data: Path, count: int, target: Any, draft: Any, temperature: float) -> list[tuple[Any, Any]]:
    """(target's law, draft's law) at so many places of the held-out novels, the same each time."""
    tokenizer, rng = Tokenizer.load(resolve(None)), np.random.default_rng(31)
    novels = [tokenizer.encode(novel, add_special=False) for novel in Corpus(data).held_out()]
    found: list[tuple[Any, Any]] = []
    each = 8
    for i in range(-(-count // each)):
        novel = novels[i % len(novels)]
        start = int(rng.integers(len(novel) - WINDOW))
        at = torch.from_numpy(np.sort(rng.choice(np.arange(FIRST, WINDOW), each, replace=False)))
        both = [laws(m, novel[start : start + WINDOW], temperature, at).double().numpy() for m in (target, draft)]
        found += [(p / p.sum(), q / q.sum()) for p, q in zip(*both, strict=True)]
    return found[:count]


def judged(rule: Any, pairs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """Means over places: how often a guess stands, KL(what stands | target), KL(target | what stands), equal likeliest token."""
    if isinstance(rule, Rejection):  # by its theorem: it keeps the law, and accepts the overlap
        stands = float(np.mean([np.minimum(p, q).sum() for p, q in pairs]))
        return {"places": len(pairs), "stands": stands, "kl": 0.0, "kl_of_target": 0.0, "top1": 1.0}
    rows = []
    for p, q in pairs:
        one = emitted(rule, p, q)
        rows.append((one.accepted, divergence(one.law, p), divergence(p, one.law), one.law.argmax() == p.argmax()))
    accepted, forth, back, top = (float(x) for x in np.mean(rows, 0))
    return {"places": len(pairs), "stands": accepted, "kl": forth, "kl_of_target": back, "top1": top}


@torch.no_grad()
def texts(name: str, temperature: float, data: Path, count: int, new: int, target: Any) -> dict[str, float]:
    runtime = made(Guessing(name, DRAFT, lambda _: None, name))
    steps = tokens = 0
    inner = runtime.executor.execute

    def execute(plan: Plan) -> StepResult:
        nonlocal steps, tokens
        found = inner(plan)
        for work, fact in zip(plan.works, found.works, strict=True):
            if work.model == "target" and work.guesses:
                steps, tokens = steps + 1, tokens + len(fact.tokens)
        return found

    runtime.executor.execute = execute  # type: ignore[method-assign]
    sampling = SamplingSpec(max_tokens=new, temperature=temperature)
    said = written(runtime, beginnings(data, count), list(range(700, 700 + count)), sampling)
    lost, again = [], []
    for (prompt, output, _), _ in said:
        at = torch.arange(len(prompt) - 1, len(prompt) + len(output) - 1)
        p = laws(target, [*prompt, *output], 1.0, at).double()
        lost.append(-float(p.gather(1, torch.tensor(output)[:, None]).log().mean()))
        again.append(repeated(output))
    return {"texts": count, "tokens_a_step": tokens / steps, "perplexity": math.exp(sum(lost) / len(lost)),
            "repeated_8_grams": sum(again) / len(again)}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
