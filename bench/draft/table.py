"""Every draft beside plain decoding and a perfect draft: batch sizes, texts, temperatures, with the controller and without.

    python -m bench.draft.table ../shared/data --whole --resume   # everything that bench/results/draft.json does not hold yet
    python -m bench.draft.table ../shared/data --texts prose --temperatures 0.8 --batches 1 --draft-model FOLDER
    python -m bench.draft.table ../shared/data --quick            # the bundled model, few tokens; writes no file

`--whole` takes the loads of `bench.draft.whole` in their order and begins none when --minutes are over.  Rows are written load by
load, and the same command goes on where the last one ended: with rows that are missing, with those that another controller than
today's decided, or that were measured otherwise, and, with --since, with those that were taken before a day.

The model is the bundled one in the body of Qwen2.5-0.5B.  Its prompts: windows of the held-out novels (`prose`), the questions
of Spec-Bench in the chat format, cut to 768 tokens (`spec-bench`), and tokens by lot (`random`).  Greedy answers of a small model
run into loops, which accept everything: of greedy loads only prompts are kept whose answer repeats less than a fifth of its
8-grams; each row says what its answers repeat, and how many answers were looked at for those that were left.

A row is a draft under a load.  `ratio` is decoding against plain decoding in the same round, the median of the rounds, over all
tokens of the same answers; `ratio_full` the same until the first answer has ended, since sequences that guess end at different
times, and a batch that runs empty is no batch of its size any more.  The row of no draft is plain decoding a second time: what
its ratio is off by is the noise of the others.  `acceptance` of guesses all before which stood, `predicted_acceptance` what the
law says of the same ones (`bench.draft.law`), `acceptance_chance` what chance alone moves the first by; of drafts of which it
says nothing (`bench.draft.rows.lawful`), none of them.
Drafts of one load take turns of `PIECE` steps on the same weights, forth and back, and each command adds its rows to those that
the file holds; older ones of the same load that they supersede go (`bench.draft.rows`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from bench.contender import Case, Contender, Model, Run
from bench.draft import whole
from bench.draft.heads import fitted, heads_file
from bench.draft.law import Translated, Trials, Trimmed, chance, chances, learned, predicted, reader, repeated, texts_of
from bench.draft.rows import OUT, keep, key, lawful, table
from bench.guessing import perfect
from bench.harness import GROWN, bundled, grown, machine, one_round
from bench.said import said
from tools.tiny.corpus import Corpus
from weft.compose import traits_of
from weft.errors import ConfigError, EngineError
from weft.hub import resolve, resolve_draft
from weft.models import load_spec
from weft.models.layout import parameters
from weft.registry import Part, names, parse
from weft.traits import Trait
from weft.types import Plan, StepResult

SHAPE = "qwen2.5-0.5b"
TEXTS = ("prose", "spec-bench", "random")
BATCHES = (1, 2, 4, 8, 16, 32)
LONGEST = {"prose": 96, "spec-bench": 768, "random": 64}
"""Tokens of a prompt."""
MOST_REPEATED = 0.2
PIECE = 8
"""Steps of a turn: long enough that one's caches are its own, and short beside what neighbours do to a machine."""
BOUND = 8
"""Guesses of the perfect draft."""
READERS = ("vocabtrim", "hierarchy")
FEWEST = {"prose": 4, "spec-bench": 6, "random": 2}
"""Answers of a row, at least; of Spec-Bench one to each kind of request, which differ more than novels do."""
WHOLE = "python -m bench.draft.table ../shared/data --whole --resume"
"""What makes the file in bench/results as a whole."""
LAWS = 4
"""Sequences at once up to which it is told what the law says."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is decoded: prompts of one kind at one temperature, so many at once."""

    text: str
    temperature: float
    batch: int


@dataclass(frozen=True, slots=True)
class Stack:
    """A draft with an accept; part: None for plain decoding.  folder: of its model, or the file of what it was taught.  source:
    that of the bundled model."""

    part: Part | None
    accept: str
    controller: bool
    folder: Path | None
    source: Path | None = None

    def case(self, null: Case) -> Case:
        part = self.part
        if part is not None and part.name in READERS:  # it takes minutes to write, so not before it is wanted
            part = Part(part.slot, part.name, (*part.arguments, ("text", str(said()))))
        parts = (*(() if part is None else (str(part),)), f"accept={self.accept}")
        control = "on" if self.controller else "off"
        return replace(null, name=str(self), techniques=parts, engine={**null.engine, "draft_control": control})

    def __str__(self) -> str:
        return f"{self.part or 'none'}, {self.accept}, {'controlled' if self.controller else 'as it likes'}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.draft.table", description="Measure every draft.")
    parser.add_argument("data", type=Path, help="folder with text/novels and eval/spec-bench")
    parser.add_argument(
        "--drafts", help="parts of the slot, such as ngram;speculative_sampling(guesses=4); else every one"
    )
    parser.add_argument("--draft-model", default="bundled", help="checkpoint of drafts that need one (bundled)")
    parser.add_argument("--heads", default="bundled", help="file of heads on the bundled model's states (bundled)")
    parser.add_argument("--accepts", default="race", help="of the slot accept, with commas (race)")
    parser.add_argument("--texts", default=",".join(TEXTS))
    parser.add_argument("--temperatures", default="0.8,0")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--controller", default="on,off", help="on, off or both")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model-dir", type=Path, default=GROWN)
    parser.add_argument("--whole", action="store_true", help="the loads of bench.draft.whole, whatever else is named")
    parser.add_argument("--minutes", type=float, default=20.0, help="with --whole: begin no load after so many (20)")
    parser.add_argument("--resume", action="store_true", help="leave out loads whose rows are there")
    parser.add_argument(
        "--since", default="", help="with --resume: take rows again that are older than this day, 2026-11-28"
    )
    parser.add_argument("--quick", action="store_true", help="bundled model, few tokens, one round; writes no file")
    parser.add_argument("--out", type=Path, default=OUT)
    given = list(sys.argv[1:] if argv is None else argv)
    flags = parser.parse_args(given)
    flags.command = " ".join(["python", "-m", "bench.draft.table", *given])
    try:
        rows = measure(flags)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is asked for, and keep it load by load.  Returns the rows of this run."""
    began, rows, left = time.monotonic(), list[dict[str, Any]](), 0
    if flags.quick:
        flags.new, flags.rounds, flags.batches, model = 12, 1, "1", bundled()
    else:
        model = grown(SHAPE, flags.model_dir)
    kept: list[dict[str, Any]] = json.loads(flags.out.read_text())["rows"] if flags.out.is_file() else []
    todo: list[tuple[whole.Sweep, Load, list[Stack]]] = []
    for sweep in whole.sweeps() if flags.whole else [_asked(flags)]:
        chosen = list(stacks(sweep, flags, model))
        for load in (Load(*x) for x in whole.loads(sweep)):
            some = [s for s in chosen if not (flags.resume and _there(kept, s, load, model, flags))]
            if some:
                todo.append((sweep, load, some))
    root: Contender | None = None  # whose weights all others read
    for n, (sweep, load, some) in enumerate(todo):
        spent = time.monotonic() - began
        if flags.whole and spent > 60 * flags.minutes:
            left = len(todo) - n
            break
        tick(f"{spent / 60:.1f} min, load {n + 1} of {len(todo)}: {load}, {len(some)} drafts")
        found, tried = prompts(model, flags, load, sweep.new)
        null = Case(
            name="plain", prompts=found, max_new=sweep.new, batch=load.batch, sampling={"temperature": load.temperature},
            piece=PIECE,
        )  # fmt: skip
        plain = Contender(model, null, flags.threads, root)
        root = root or plain
        new = list(compare(model, null, some, load, flags, sweep, plain, tried))
        rows += new
        if not flags.quick:
            # The whole table has one draft of a name: rows of the one that shipped before go.
            part = slice(None, -1 if flags.whole else None)
            mine = {key(row)[part] for row in new}
            kept = [row for row in kept if key(row)[part] not in mine] + new
            keep(flags.out, kept, WHOLE if flags.out == OUT else flags.command, machine())
    if left:
        rest = "; ".join(f"{x.text} at {x.temperature:g}, {x.batch} at once" for _, x, _ in todo[-left:])
        tick(f"{left} loads are left; the same command with --resume goes on with them: {rest}")
    return rows


def tick(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _asked(flags: argparse.Namespace) -> whole.Sweep:
    """What the flags name."""
    drafts = flags.drafts.split(";") if flags.drafts else [n for n in names("draft") if n != "none"]
    return whole.Sweep(
        tuple(flags.texts.split(",")), tuple(map(float, flags.temperatures.split(","))),
        tuple(map(int, flags.batches.split(","))), tuple(drafts), tuple(flags.controller.split(",")), flags.new, flags.rounds,
    )  # fmt: skip


def stacks(sweep: whole.Sweep, flags: argparse.Namespace, model: Model) -> Iterator[Stack]:
    """Every draft that is asked for, with each accept, controlled and not; what needs a model gets the one that was named, and
    what reads a text beforehand one that the bundled model wrote."""
    for text, accept, control in product(sweep.drafts, flags.accepts.split(","), sweep.controller):
        part = parse(f"draft={text}")
        folder = source = None
        if Trait.SECOND_MODEL in traits_of(part).needs:
            folder = resolve_draft(flags.draft_model)
            part = Part(part.slot, part.name, (*part.arguments, ("model", str(flags.draft_model))))
        elif Trait.TARGET_FEATURES in traits_of(part).needs:
            source = part.build().path if flags.heads == "bundled" else heads_file(flags.heads)
            folder = fitted(source, model)
            part = Part(part.slot, part.name, (*part.arguments, ("weights", str(folder))))
        yield Stack(part, accept, control == "on", folder, source)


def prompts(model: Model, flags: argparse.Namespace, load: Load, new: int) -> tuple[list[tuple[int, ...]], int]:
    """A batch's prompts, `FEWEST` at least for one sequence, and of how many they are those that were left: greedy ones are
    tried, and those that loop are not taken."""
    found: list[tuple[int, ...]] = []
    tried = 0
    count = max(FEWEST[load.text] if load.batch == 1 else 2, load.batch)
    source = candidates(model, flags.data, load.text, whole.longest(load.batch))
    while len(found) < count:
        some = [next(source) for _ in range(count)]
        tried += len(some)
        if load.temperature == 0:
            # The bundled model computes what the grown one does, at a tenth of its cost.
            case = Case(name="tried", prompts=some, max_new=new, batch=min(8, len(some)))
            tokens = Contender(bundled(), case, 1).run(0).tokens
            some = [p for i, p in enumerate(some) if repeated(tokens[i]) < MOST_REPEATED]
        found += some
    return found[:count], tried


def candidates(model: Model, data: Path, text: str, longest: int) -> Iterator[tuple[int, ...]]:
    """Prompts of a kind without end, the same each time; of at most so many tokens."""
    from weft.front.tokenizer import Tokenizer

    tokenizer, rnd, most = Tokenizer.load(model.folder), random.Random(11), min(LONGEST[text], longest)
    if text == "random":
        vocab = load_spec(model.folder).vocab
        while True:
            yield tuple(rnd.randrange(10, vocab) for _ in range(most))
    if text == "prose":
        novels = [tokenizer.encode(novel, add_special=False) for novel in Corpus(data).held_out()]
        while True:
            novel = rnd.choice(novels)
            start = rnd.randrange(len(novel) - most)
            yield tuple(novel[start : start + most])
    if text != "spec-bench":
        raise ConfigError(f"there are the texts {', '.join(TEXTS)}; {text!r} is none of them")
    lines = (data / "eval" / "spec-bench" / "question.jsonl").read_text(encoding="utf8").splitlines()
    asks = whole.in_turns([json.loads(line) for line in lines], rnd)
    tail = tokenizer.encode("<|end|><|assistant|>", add_special=False)
    while True:
        for ask in asks:
            ids = tokenizer.encode(f"<|user|>{ask}", add_special=False)[: most - len(tail)]
            yield (*ids, *tail)


def compare(
    model: Model, null: Case, chosen: Sequence[Stack], load: Load, flags: argparse.Namespace, sweep: whole.Sweep,
    plain: Contender, tried: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one load: plain decoding, the bound, and the stacks, in turns.  tried: answers that were looked at."""
    name = f"table-{model.folder.name}-{load.text}-{load.temperature}-{load.batch}"
    bound = perfect(model, null, name, BOUND, plain)
    cases = [bound, *(s.case(null) for s in chosen)]
    again = replace(null, name="plain again")
    everyone = [plain, *(Contender(model, case, flags.threads, plain) for case in (again, *cases))]
    for one in everyone:
        one.run(0)
    watched = [Watched(one) for one in everyone]
    for turn in range(1, sweep.rounds + 1):
        one_round(everyone if turn % 2 else everyone[::-1], turn)
    target = reader(resolve(None))
    for one, seen, stack in zip(everyone[1:], watched[1:], (None, None, *chosen), strict=True):
        pairs = list(zip(one.runs, plain.runs, strict=True))
        ratios = [_speed(a) / _speed(b) for a, b in pairs]
        full = [_speed(a, null.together) / _speed(b, null.together) for a, b in pairs]
        outputs = one.runs[-1].tokens
        folder, known = None if stack is None else stack.folder, stack is None or lawful(_short(stack.part))
        law = moved = None
        if stack is not None and seen.trials.tried and known and load.batch <= LAWS:
            draft, weighs = law_of(stack, one), stack.accept == "rejection"
            told = texts_of(seen.trials, seen.owners, null.prompts, outputs)
            law = predicted(target, draft, told, load.temperature, weighs=weighs)
            moved = chance([c for x in told for c in chances(target, draft, x, load.temperature, weighs=weighs)])
        yield {
            "draft": "none" if one is everyone[1] else "perfect" if stack is None else _short(stack.part),
            "accept": "race" if stack is None else stack.accept,
            "batch": load.batch,
            "prompts": load.text,
            "temperature": load.temperature,
            "controller": stack is not None and stack.controller,
            "ratio": median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "ratio_full": median(full),
            "decode_tok_s": median(run.decode_tok / run.decode_s for run in one.runs),
            "tok_per_step": median(run.figures(1)["tok_per_step"] for run in one.runs),
            "acceptance": seen.trials.stood / seen.trials.tried if seen.trials.tried and known else None,
            "predicted_acceptance": law,
            "acceptance_chance": moved,
            "trials": seen.trials.tried,
            "draft_time": seen.trials.draft_s / seen.trials.step_s if seen.trials.step_s else None,
            "answers": len(outputs),
            "tried": tried,
            "repeated_8grams": sum(repeated(x) for x in outputs.values()) / len(outputs),
            "same_tokens": outputs == plain.runs[-1].tokens,
            "draft_share": _share(folder, model),
            "decided_by": whole.decided_by() if stack is not None and stack.controller else None,
            "model": model.name,
            "threads": flags.threads,
            "rounds": sweep.rounds,
            "new": sweep.new,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "cpu": machine()["cpu"],  # rows of several runs lie beside each other
        }


def law_of(stack: Stack, one: Contender) -> Any:
    """What a draft's guesses are drawn from, as `bench.draft.law.chances` has it."""
    if stack.source is not None:
        return learned(stack.source)
    if stack.folder is None:
        return None
    draft, part = reader(stack.folder), one.runtime.engine.stack["draft"]
    if (between := getattr(part, "translation", None)) is not None:
        return Translated(draft, between, one.runtime.setup.spec.vocab)
    return draft if not (kept := getattr(part, "head", ())) else Trimmed(draft, kept)


def _speed(run: Run, together: int = 0) -> float:
    """Tokens a second; together: of the steps in which so many sequences got some."""
    if not together:
        return run.decode_tok / run.decode_s
    steps = [(seconds, tokens) for seconds, tokens, count in run.steps if count == together]
    return sum(tokens for _, tokens in steps) / sum(seconds for seconds, _ in steps)


class Watched:
    """The trials of a contender, and whose sequences they were: of its last round, whose outputs are kept."""

    def __init__(self, one: Contender) -> None:
        self.trials, self.owners = Trials(), dict[int, int]()
        self._runs = len(one.runs)
        engine, inner, count = one.runtime.engine, one.runtime.executor.execute, len(one.case.prompts)

        def execute(plan: Plan) -> StepResult:
            if len(one.runs) > self._runs:
                self._runs, self.trials = len(one.runs), Trials()
            for r in engine.requests():
                self.owners[r.rid] = (r.id - 1) % count
            found = inner(plan)
            self.trials.take(plan, found)
            return found

        one.runtime.executor.execute = execute  # type: ignore[method-assign]


def _share(folder: Path | None, model: Model) -> float:
    """Of the target's parameters, those that the draft has."""
    if folder is None:
        return 0.0
    mine = learned(folder).parameters if folder.is_file() else parameters(load_spec(folder))
    return mine / parameters(load_spec(model.folder))


def _short(part: Part | None) -> str:
    """A part without the folder of its model, which is this machine's."""
    assert part is not None
    rest = Part(part.slot, part.name, tuple((k, v) for k, v in part.arguments if k not in ("model", "weights", "text")))
    return str(rest).partition("=")[2]


def _there(kept: Sequence[dict[str, Any]], s: Stack, load: Load, model: Model, flags: argparse.Namespace) -> bool:
    row = {
        "draft": _short(s.part), "accept": s.accept, "batch": load.batch, "prompts": load.text, "temperature": load.temperature,
        "controller": s.controller, "threads": flags.threads, "draft_share": _share(s.folder, model),
    }  # fmt: skip
    fresh = [
        x for x in kept
        if (not s.controller or x.get("decided_by") == whole.decided_by()) and x.get("date", "") >= flags.since
    ]  # fmt: skip
    return key(row) in {key(x) for x in fresh}


if __name__ == "__main__":
    sys.exit(main())
