"""Heads that learn while they serve (`draft=clover(online=...)`) beside the same heads as they are, along a stream of requests.

    python -m tools.train_tiny heads ../shared/data prose.safetensors --teacher weft/bundled/tiny --prose --minutes 2.5
    python -m bench.draft.online ../shared/data --heads prose.safetensors --threads 2

The requests: questions of GSM8K in the chat format (`maths`), those of Spec-Bench (`spec-bench`), and windows of the held-out
novels (`prose`), at temperature 0.8, each answered once, in their order: on the bundled model, and a few of them on that model
grown, where a step of learning is short beside a step of the model.  Heads that were taught on prose alone know no chat.
Acceptance is told by quarters of the stream, of guesses all before which stood.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.draft.heads import fitted, heads_file
from bench.draft.law import Heads, Trials
from bench.harness import GROWN, RESULTS, Model, bundled, grown, machine, write
from tools.tiny.corpus import Corpus
from weft import LLM, SamplingParams
from weft.models import load_spec
from weft.models.layout import parameters
from weft.types import Plan, StepResult

SHAPE = "qwen2.5-0.5b"
KINDS = ("maths", "spec-bench", "prose")
QUARTERS = 4
LONGEST = 400
"""Characters of a question."""
OUT = RESULTS / "draft-online.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.draft.online", description="Measure heads that learn.")
    parser.add_argument("data", type=Path, help="folder with text/novels, eval/gsm8k and eval/spec-bench")
    parser.add_argument("--heads", default="bundled", help="file of heads on the bundled model's states (bundled)")
    parser.add_argument("--requests", type=int, default=192, help="of each kind (192)")
    parser.add_argument("--few", type=int, default=48, help="of each kind on the grown model (48); 0 leaves it out")
    parser.add_argument("--online", type=int, default=8, help="proposals between two steps of learning (8)")
    parser.add_argument("--batch", type=int, default=8, help="requests at once (8)")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer at most (96)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--model-dir", type=Path, default=GROWN, help="where grown models are kept (.cache/grown)")
    parser.add_argument("--out", type=Path, default=OUT)
    flags = parser.parse_args(argv)
    models = [(bundled(), flags.requests)]
    if flags.few:
        models.append((grown(SHAPE, flags.model_dir), flags.few))
    rows = [
        stream(model, prompts(flags.data, kind, count), kind, online, flags)
        for model, count in models
        for kind in KINDS
        for online in (0, flags.online)
    ]
    for still, learning in zip(rows[::2], rows[1::2], strict=True):
        learning["same_tokens"] = learning.pop("tokens") == still.pop("tokens")
        learning["seconds_ratio"] = learning["seconds"] / still["seconds"]
    command = (
        f"python -m bench.draft.online ../shared/data --heads {os.path.basename(flags.heads)} --threads {flags.threads}"
    )
    write(flags.out, {"command": command, "machine": machine(), "rows": rows})
    for row in rows:
        print(json.dumps(row))
    return 0


def prompts(data: Path, kind: str, count: int) -> list[str]:
    if kind == "prose":
        novels = list(Corpus(data).held_out())
        return [novels[i % len(novels)][i * 1500 : i * 1500 + LONGEST] for i in range(20, 20 + count)]
    name, key = ("gsm8k/train.jsonl", "question") if kind == "maths" else ("spec-bench/question.jsonl", "turns")
    lines = (data / "eval" / name).read_text(encoding="utf8").splitlines()
    asked = [json.loads(line)[key] for line in lines[:: max(1, len(lines) // count)]][:count]
    return [f"<|user|>{(x if isinstance(x, str) else x[0])[:LONGEST]}<|end|><|assistant|>" for x in asked]


def stream(model: Model, asked: Sequence[str], kind: str, online: int, flags: argparse.Namespace) -> dict[str, Any]:
    """One pass over the requests, a batch at a time."""
    file = heads_file(flags.heads)
    part = f"draft=clover(weights={str(fitted(file, model))!r}, online={online})"
    law = SamplingParams(temperature=0.8, seed=3, max_tokens=flags.new)
    with LLM(
        model.folder,
        device="cpu",
        threads=flags.threads,
        max_model_len=512,
        max_num_seqs=flags.batch,
        techniques=[part],
        draft_control="off",
    ) as llm:
        runtime = llm._runtime
        assert runtime is not None
        inner, trials, tokens, rates = runtime.executor.execute, Trials(), [], []

        def execute(plan: Plan) -> StepResult:
            found = inner(plan)
            trials.take(plan, found)
            return found

        runtime.executor.execute = execute  # type: ignore[method-assign]
        began, draft_s, quarter = time.perf_counter(), 0.0, -(-len(asked) // QUARTERS)
        for at in range(0, len(asked), quarter):
            trials.by_sequence.clear()
            for first in range(at, min(at + quarter, len(asked)), flags.batch):
                batch = asked[first : min(first + flags.batch, at + quarter, len(asked))]
                tokens += [out.outputs[0].token_ids for out in llm.generate(batch, law, use_tqdm=False)]
            rates.append(trials.stood / max(1, trials.tried))
        draft_s = trials.draft_s
        acts = runtime.engine.stack["draft"].acts
        return {
            "model": model.name, "draft_share": Heads(file).parameters / parameters(load_spec(model.folder)),
            "prompts": kind, "online": online, "requests": len(asked), "acceptance": rates, "tokens": tokens,
            "output_tok": sum(map(len, tokens)), "lessons": acts["lessons"],
            "seconds": time.perf_counter() - began, "draft_s": draft_s,
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
