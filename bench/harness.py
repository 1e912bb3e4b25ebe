"""What every technique's benchmark uses: stacks compared with the slot's null in one process, in turns, medians told.

    null = Case(name="no draft", prompts=prompts, max_new=64)
    ngram = replace(null, name="ngram", techniques=("draft=ngram",))
    found = compare(bundled(), null, [ngram], title="answers that quote", rounds=5)

A round runs every case once, and they take turns wave by wave (as many prompts as run at once): A B A B ...  A ratio is taken
within a round, and its median over the rounds is told: what the machine's neighbours do meets both alike.  The null's own ratio,
of each round to the one before, shows how much the machine wavers.  One pass of each case comes first and is not counted.

Each case has an engine of its own, built as `weft serve` would build it, so whatever a technique changes (weights, cache,
kernels) is changed for its own case alone.  All of them are in memory at once; how much one takes is measured in a process of
its own.

`main` makes a program of it: flags, a table, and a JSON file in bench/results.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import safe_open

from bench import terminal
from bench.contender import ROOT, Case, Contender, Model, Run, rss_bytes
from weft.bench.limit import read_by, read_gb_s
from weft.conform.code import code
from weft.errors import ConfigError, EngineError
from weft.exec.build import Setup
from weft.exec.host import cpu_count, processor
from weft.hub import resolve
from weft.models import load_spec
from weft.models.layout import parameters

RESULTS = ROOT / "bench" / "results"
GROWN = ROOT / ".cache" / "grown"
ROUNDS = 5
FEWER_ROUNDS = 3
"""Where the model is large."""
LARGE = 300_000_000
"""Parameters of a model that is large."""
DONE = object()
ELSEWHERE = re.compile(r"(?<![\w.:/])(?:/[\w.+-]+)+/([\w.+-]+)")
IN_PARTS = re.compile(r" --(resume|minutes[ =]\S+)")
"""Flags by which a benchmark is run in parts: whoever runs it again wants the whole."""
SHARED = frozenset({"bench.harness", "bench.contender"})
"""What every benchmark is run by; a result is not out of date because that changed."""

Tick = Callable[[str], None]
"""Called with what is being done."""

__all__ = ["Case", "Model", "Options", "bundled", "compare", "encode", "grown", "main", "write"]


def bundled() -> Model:
    """The model that comes with weft."""
    return Model("weft-tiny", resolve(None))


def grown(shape: str, folder: Path = GROWN, tick: Tick = lambda text: None) -> Model:
    """The bundled model in the body of a larger one (`tools.grow`), made in `folder` where it is not there yet."""
    from tools.grow import SHAPES, grow

    if shape not in SHAPES:
        raise ConfigError(f"there is no shape {shape!r} to grow into; there are {', '.join(SHAPES)}")
    out = folder / shape
    if not (out / "config.json").is_file():
        grow(resolve(None), out, SHAPES[shape], tick=lambda name, done, total: tick(f"{shape}: {done / total:.0%}"))
    return Model(f"{shape} (grown)", out, grown=True, large=parameters(load_spec(out)) >= LARGE)


def encode(model: Model, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of texts; special tokens in them are read as such."""
    from weft.front.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model.folder)
    return [tuple(tokenizer.encode(text, add_special=False)) for text in texts]


# ---------------------------------------------------------------------------------------------- comparing


def compare(
    model: Model,
    null: Case,
    cases: Sequence[Case],
    *,
    title: str = "",
    rounds: int = ROUNDS,
    threads: int = 1,
    memory: bool = True,
    tick: Tick = lambda text: None,
    like: Contender | None = None,
) -> dict[str, Any]:
    """Run null and cases in turns: their figures, medians over the rounds, and ratios to the null (keys: bench/README.md).

    memory: whether each case's resident memory is measured too, which costs a process for each.  like: whose weights all of
    them read, where no case changes any.
    Raises ConfigError for two cases of one name or a case that cannot be built, CapacityError where memory does not hold them.
    """
    everyone = [null, *cases]
    if rounds < 1 or len({c.name for c in everyone}) < len(everyone):
        raise ConfigError("a comparison has at least one round, and a name of its own for each case")

    def tell(text: str) -> None:
        tick(f"{model.name}, {title}: {text}")

    peaks: list[int | None] = [None] * len(everyone)
    for at, case in enumerate(everyone if memory else ()):
        tell(f"memory of {case.name}")
        peaks[at] = rss_bytes(model, case, threads)
    contenders = []
    for case in everyone:
        tell(f"building {case.name}")
        contenders.append(Contender(model, case, threads, like))
    for contender in contenders:
        tell(f"warming up {contender.case.name}")
        contender.run(0)
    before = [contender.acts() for contender in contenders]
    for turn in range(1, rounds + 1):
        tell(f"round {turn} of {rounds}")
        one_round(contenders, turn)
    tell("the machine's bandwidth")
    first = contenders[0].runtime.setup
    gb_s = read_gb_s(first.threads, first.device)
    read = _bytes_per_step(first, null)
    return {
        "title": title,
        "model": model.name,
        "shape": _shape(first),
        "dtype": first.dtype,
        "device": first.device,
        "threads": first.threads,
        "rounds": rounds,
        "load": _load(null),
        "limit": {"bytes_per_step": read, "read_gb_s": gb_s, "decode_tok_s": null.together * gb_s * 1e9 / read},
        "cases": [
            _told(c, contenders[0], then, peak, gb_s * 1e9 / read)
            for c, then, peak in zip(contenders, before, peaks, strict=True)
        ],
    }


def one_round(contenders: Sequence[Contender], turn: int) -> None:
    """Each contender's prompts once, in turns, wave by wave."""
    going = []
    for contender in contenders:
        contender.runs.append(Run())
        going.append(contender.waves(turn, contender.runs[-1]))
    while going:
        going = [waves for waves in going if next(waves, DONE) is not DONE]


def _shape(setup: Setup) -> dict[str, int]:
    spec = setup.spec
    return {
        "layers": len(spec.layers), "width": spec.width, "heads": spec.heads, "kv_heads": spec.kv_heads,
        "intermediate": spec.layers[0].intermediate, "vocab": spec.vocab, "parameters": parameters(spec),
    }  # fmt: skip


def _load(case: Case) -> dict[str, Any]:
    return {
        "prompts": len(case.prompts),
        "prompt_tok": round(sum(len(p) for p in case.prompts) / len(case.prompts)),
        "new_tok": case.max_new,
        "batch": case.together,
        "sampling": {"temperature": 0.0, **case.sampling},
        "apart": case.apart,
    }


def _told(
    mine: Contender, null: Contender, acts: Mapping[str, int], peak: int | None, limit_steps_s: float
) -> dict[str, Any]:
    """A case's record.  acts: before the first round.  limit_steps_s: steps a second of a null that does nothing but read."""
    ours = [run.figures(mine.runtime.setup.block_bytes) for run in mine.runs]
    theirs = [run.figures(null.runtime.setup.block_bytes) for run in null.runs]
    values = {key: [f[key] for f in ours] for key in ours[0]}
    ratios = {key: _ratios(v, [f.get(key, 0.0) for f in theirs], mine is null) for key, v in values.items()}
    ratios = {key: v for key, v in ratios.items() if v}
    return {
        "name": mine.case.name,
        "stack": [*map(str, mine.runtime.setup.stack.parts), *dict.fromkeys(p for own in mine.case.own for p in own)],
        "median": {**{key: median(v) for key, v in values.items()}, "rss_peak_bytes": peak},
        "spread": {key: [min(v), max(v)] for key, v in values.items()},
        "ratio": {key: median(v) for key, v in ratios.items()},
        "ratio_spread": {key: [min(v), max(v)] for key, v in ratios.items()},
        "of_limit": median(values["decode_tok_s"]) / (null.case.together * limit_steps_s),
        "same_tokens": _same(mine.runs[-1].tokens, null.runs[-1].tokens),
        "bound": mine.case.bound,
        "draft_share": _draft_share(mine.runtime.setup),
        "acts": {act: (count - acts.get(act, 0)) / len(ours) for act, count in mine.acts().items()},
    }


def _draft_share(setup: Setup) -> float:
    """Of the model's parameters, those that a draft has beside it: a second model's, or those of its file."""
    if setup.draft is not None:
        return parameters(setup.draft) / parameters(setup.spec)
    file = getattr(setup.stack["draft"], "path", None)
    if file is None:
        return 0.0
    with safe_open(file, framework="np") as taught:
        # The mark is by what the file knows its model, and computes nothing.
        shapes = [taught.get_slice(name).get_shape() for name in taught.keys() if name != "mark"]  # noqa: SIM118 - no mapping
    return sum(map(math.prod, shapes)) / parameters(setup.spec)


def _ratios(mine: Sequence[float], null: Sequence[float], itself: bool) -> list[float]:
    """Each round's ratio to the null's; of the null itself, each round's to the one before."""
    if not all(null):
        return []
    if itself:
        return [after / before for before, after in pairwise(null)] or [1.0]
    return [a / b for a, b in zip(mine, null, strict=True)]


def _bytes_per_step(setup: Setup, case: Case) -> int:
    context = sum(len(p) for p in case.prompts) // len(case.prompts) + case.max_new // 2
    return read_by(setup, case.together, context)


def _same(mine: Mapping[int, Sequence[int]], theirs: Mapping[int, Sequence[int]]) -> float:
    """Share of the null's tokens that stand before the first one that differs, over all sequences."""
    equal = total = 0
    for index, wanted in theirs.items():
        got = mine.get(index, ())
        pairs = zip(got, wanted, strict=False)
        equal += next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
        total += len(wanted)
    return equal / total


# ---------------------------------------------------------------------------------------------- a benchmark as a program


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Flags of a benchmark.  quick: the bundled model and a few tokens, to see that it runs.  tick: tells what is being done.
    kept: comparisons of an earlier run of the same code that this one goes on with.  until: by time.monotonic(), when a
    benchmark that asks (`late`) begins no other comparison."""

    quick: bool
    rounds: int
    threads: int
    model_dir: Path
    tick: Tick
    kept: Sequence[dict[str, Any]] = ()
    until: float = math.inf

    @property
    def late(self) -> bool:
        return time.monotonic() > self.until

    def known(self, model: Model, null: Case, title: str) -> dict[str, Any] | None:
        """The comparison of this load, where it was kept."""
        wanted = _rounded({"title": title, "model": model.name, "load": _load(null)})
        return next((c for c in self.kept if {key: c[key] for key in wanted} == wanted), None)

    def compare(
        self,
        model: Model,
        null: Case,
        cases: Sequence[Case],
        title: str,
        memory: bool = True,
        like: Contender | None = None,
    ) -> dict[str, Any]:
        """`compare` under these flags."""
        return compare(
            model, null, cases, title=title, rounds=min(self.rounds, FEWER_ROUNDS) if model.large else self.rounds,
            threads=self.threads, memory=memory and not (self.quick or model.grown), tick=self.tick, like=like,
        )  # fmt: skip

    def models(self, *shapes: str) -> list[Model]:
        """The bundled model, and where it is not to be quick that model grown into these shapes."""
        return [bundled(), *(grown(s, self.model_dir, self.tick) for s in (() if self.quick else shapes))]


def main(
    technique: str,
    module: str,
    measure: Callable[[Options], Iterable[dict[str, Any]]],
    notes: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Run a benchmark from the command line.

    technique: 'slot=name'.  module: its name, for the command that is told.  measure: gives comparisons.  notes: sentences that
    a reader of the figures needs.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Measure {technique}.")
    parser.add_argument("--quick", action="store_true", help="bundled model, few tokens, one round; writes no file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--rounds", type=int, help=f"turns that medians are over; {ROUNDS}, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--model-dir", type=Path, default=GROWN, help="where grown models are kept (.cache/grown)")
    parser.add_argument("--out", type=Path, help="file to write instead of the one in bench/results")
    parser.add_argument("--resume", action="store_true", help="go on with the file, where the same code wrote it")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no comparison after so many, where it can go on"
    )
    flags = parser.parse_args(given)
    out = flags.out or (None if flags.quick else RESULTS / f"{technique.replace('=', '-')}.json")
    options = Options(
        quick=flags.quick, rounds=flags.rounds or (1 if flags.quick else ROUNDS), threads=flags.threads,
        model_dir=flags.model_dir, tick=terminal.line if sys.stderr.isatty() else lambda text: None,
        kept=_kept(out, module) if out is not None and flags.resume else (), until=time.monotonic() + 60 * flags.minutes,
    )  # fmt: skip
    comparisons, before = list[dict[str, Any]](), _busy()
    result: dict[str, Any] = {
        "technique": technique,
        "command": IN_PARTS.sub("", " ".join(["python", "-m", module, *given])),
        "code": code_digest(module),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {**machine(), "busy": [before, before]},
        "comparisons": comparisons,
        "notes": list(notes),
    }
    try:
        for comparison in measure(options):
            comparisons.append(comparison)
            result["machine"]["busy"][1] = _busy()
            if out is not None:
                write(out, result)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if flags.json else terminal.table(result))
    return 0


def _kept(out: Path, module: str) -> Sequence[dict[str, Any]]:
    """Comparisons of a file that this very benchmark wrote."""
    found = json.loads(out.read_text(encoding="utf8")) if out.is_file() else {}
    kept: list[dict[str, Any]] = found["comparisons"] if found.get("code") == code_digest(module) else []
    return kept


def code_digest(module: str) -> str:
    """Changes with what a benchmark does, and with the loads that it takes from others; not with its notes and docstrings."""
    files = [_file(module)]
    for node in ast.walk(ast.parse(files[0].read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench.") and node.module not in SHARED:
            files.append(_file(node.module or ""))
    h = hashlib.blake2b(digest_size=12)
    for file in files:
        h.update(code(file.read_text(encoding="utf8"), without=("NOTES", "MORE")))
    return h.hexdigest()


def _file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def write(path: Path, result: Mapping[str, Any]) -> None:
    """The result as JSON, figures to six digits; of absolute paths only the last part, since nobody else has the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf8")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and the versions that matter."""
    import torch

    return {
        "cpu": processor(),
        "cores": cpu_count().cores,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        return ELSEWHERE.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def _busy() -> float | None:
    """Load average of the last minute, this program's own share included."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
