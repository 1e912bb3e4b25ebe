"""`weft fidelity`: what a stack does to the answers, and what it gains, beside the reference path in one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._flags import EngineFlags, Json, engine_flags, source_of
from weft.cli._terminal import loading, say, stderr, stdout
from weft.cli.check import read_prompts
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.fidelity.measure import Path as Asked
    from weft.fidelity.recall import Question
    from weft.front.text import ModelText

LEARNED_TOKENS = 1024
"""Context on which the bundled model, and what is grown from it, was trained; answers beyond it are nobody's."""
TURNS = (
    "Tom has 12 apples and buys 7 more. How many apples does he have?",
    "Who was there?",
    "A book costs $3. How much do 4 books cost?",
)
"""What is asked after prose, beside facts that stand in it, where the length of answers is taken."""
LEAST_TOKENS = 24
"""A text of fewer says nothing."""


@engine_flags
def fidelity(
    *,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="A folder, a Hugging Face id, or bundled.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="Texts: a JSON list of strings, or one on each line; else weft's own."
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", metavar="N", help="Tokens of a window of text, and of a question.", min=32)
    ] = 512,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Facts that are asked for; 0 for none.", min=0)
    ] = 24,
    new: Annotated[
        int, typer.Option("--new", metavar="N", help="Tokens of an answer where speed is taken.", min=1)
    ] = 48,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="Turns of each side where speed is taken.", min=1)
    ] = 3,
    json_: Json = False,
    flags: EngineFlags,
) -> None:
    """Compare a stack (--with, --recipe) with the reference path over real text: divergence, recall, lengths, speed, memory."""
    flags.check()
    texts = None if prompts is None else read_prompts(prompts)
    record = measure(model, flags, texts, length=length, questions=questions, new=new, rounds=rounds)
    if json_:
        print(json.dumps(record, indent=2))
    else:
        _print(record)


def measure(
    model: str | None,
    flags: EngineFlags,
    texts: Sequence[str] | None,
    *,
    length: int,
    questions: int,
    new: int,
    rounds: int,
) -> dict[str, Any]:
    """The record of `weft fidelity --json`.  Raises ConfigError and CapacityError."""
    from weft.fidelity import measure as m

    reference, stack, text, name, learned = _paths(model, flags, length + max(new, m.LONGEST))
    prose = _prose(text, texts)
    windows, filler = _windows(prose, length), [i for ids in prose for i in ids]
    record: dict[str, Any] = {"model": name, "stack": [str(p) for p in stack.runtime.setup.stack.parts]}
    verdict = stack.runtime.setup.stack.verdict
    record |= {"fidelity": verdict.fidelity.value, "redefines": list(verdict.redefines)}
    record |= {"length": length, "windows": len(windows)}
    good = length <= learned
    if good:
        with _note(f"{len(windows)} windows of text along both paths"):
            record |= m.summary(m.compare(reference, stack, windows))
    else:
        record |= dict.fromkeys(("kl_mean", "kl_ci95", "top1", "ppl_ratio"))
    record |= {"recall": None, "recall_reference": None}
    if good and questions and text.has_chat_template:
        with _note(f"{questions} questions about facts in {length} tokens of prose"):
            record |= _recall(reference, stack, text, filler, length, questions)
    cut = [ids for ids, _ in windows][: m.BATCH]
    record |= {"output_len_ratio": None, "output_ended": None}
    if good:
        asked = _turns(text, filler, length)
        with _note(f"lengths of {len(asked)} answers"):
            mine, theirs = (m.lengths(path, asked, text.eos_ids) for path in (stack, reference))
            record |= {"output_len_ratio": m.ratio(mine, theirs), "output_ended": theirs[1]}
    record["speed_ratio"], record["kv_bytes_ratio"] = m.race(reference, stack, cut, new, rounds, _tell)
    record["acts"] = stack.runtime.engine.stats.acts
    return record


def _paths(model: str | None, flags: EngineFlags, tokens: int) -> tuple[Asked, Asked, ModelText, str, int]:
    """(reference, stack, text side, name, tokens of context that the model learned)."""
    from weft.exec.build import build, prepare
    from weft.exec.host import format_size
    from weft.fidelity.measure import Path as Asked
    from weft.front.text import ModelText
    from weft.hub import resolve
    from weft.models import load_config

    source, name = source_of(model)
    if not isinstance(source, Path):
        raise ConfigError("weft fidelity needs a checkpoint with a tokenizer: name its folder, not a config.json")
    config = flags.config(source)
    if config.max_model_len is None:
        config = replace(config, max_model_len=min(max(tokens, 1024), prepare(config).spec.max_positions))
    setup = prepare(config)
    plain = prepare(replace(config, techniques=(), kv="auto"))
    for each in (plain, setup):
        each.require_fit()
    text = ModelText.load(source, max_model_len=setup.limits.max_model_len, name=name)
    with loading(f"{format_size(setup.plan.weights_bytes)} of weights") as progress:
        first = build(plain, progress)
    second = build(setup, like=first)
    asks = max((int(getattr(x, "companions", 0)) for x in setup.stack.instances.values()), default=0)
    beside = [text.prompt_ids(words) for words in ("And then?", "Why?", "What was it?", "Who was there?")[:asks]]
    config_json = load_config(source)
    small = source == resolve(None, progress=False) or "weft_grown_from" in config_json
    return Asked(first), Asked(second, beside), text, name, LEARNED_TOKENS if small else setup.spec.max_positions


def _prose(text: ModelText, texts: Sequence[str] | None) -> list[list[int]]:
    """Ids of each text."""
    from weft.conform.workload import PROSE

    given = [" ".join(PROSE), *PROSE] if texts is None else texts
    found = [text.tokenizer.encode(one, add_special=False) for one in given]
    found = [ids for ids in found if len(ids) >= LEAST_TOKENS]
    if not found:
        raise ConfigError(f"no text has {LEAST_TOKENS} tokens; give --prompts longer ones")
    return found


def _windows(prose: Sequence[Sequence[int]], length: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, the text after it) of windows of at most `length` tokens; the last quarter, at most 64 tokens, is judged."""
    found = []
    for ids in prose:
        for at in range(0, len(ids), length):
            window = list(ids[at : at + length])
            judged = min(64, max(8, len(window) // 4))
            if len(window) >= LEAST_TOKENS:
                found.append((window[:-judged], window[-judged:]))
    return found


def _recall(
    reference: Asked, stack: Asked, text: ModelText, filler: Sequence[int], length: int, count: int
) -> dict[str, Any]:
    from weft.fidelity import measure as m

    asked = _questions(text, filler, length, count)
    theirs = m.recall(reference, asked, text.tokenizer.decode, text.eos_ids)
    mine = m.recall(stack, asked, text.tokenizer.decode, text.eos_ids)
    return {"recall": m.counted(mine, theirs), "recall_reference": theirs}


def _questions(text: ModelText, filler: Sequence[int], length: int, count: int, seed: int = 9) -> list[Question]:
    from weft.fidelity.recall import questions

    return questions(
        lambda words: text.tokenizer.encode(words, add_special=False),
        lambda words: text.chat_ids([{"role": "user", "content": words}]),
        filler,
        length,
        count,
        seed,
    )


def _turns(text: ModelText, filler: Sequence[int], length: int) -> list[list[int]]:
    """Prompts of `length` tokens whose answers end: of half a fact is asked for, of half something else.

    Prose alone for a model that does not chat.
    """
    from weft.fidelity import measure as m

    found: list[list[int]] = []
    if text.has_chat_template:
        found += [list(q.ids) for q in _questions(text, filler, length, m.ANSWERS // 2, seed=10)]
    for i in range(m.ANSWERS - len(found)):
        turn = text.chat_ids([{"role": "user", "content": TURNS[i % len(TURNS)]}]) if text.has_chat_template else []
        start, room = 97 * i, max(1, length - len(turn))
        found.append([*(filler[(start + j) % len(filler)] for j in range(room)), *turn])
    return found


def _note(words: str) -> Any:
    import contextlib

    return stderr().status(words) if sys.stderr.isatty() else contextlib.nullcontext()


def _tell(words: str) -> None:
    if sys.stderr.isatty():
        say(words)


def _print(record: dict[str, Any]) -> None:
    from rich.table import Table

    grid = Table(title=f"{' '.join(record['stack'])} on {record['model']}", title_justify="left", show_header=False)
    low, high = record["kl_ci95"] or (None, None)
    asked = record["recall_reference"]
    rows = (
        (
            "divergence",
            record["kl_mean"],
            f"nats per token (95 %: {_figure(low)} to {_figure(high)}), {record['windows']} windows",
        ),
        ("same likeliest token", record["top1"], "share of tokens"),
        ("perplexity", record["ppl_ratio"], "times the reference's"),
        (
            "recall",
            record["recall"],
            f"of facts; the reference path {_figure(asked)}",
        ),
        (
            "length of answers",
            record["output_len_ratio"],
            f"times the reference's, {_figure(record['output_ended'])} of which end",
        ),
        ("speed", record["speed_ratio"], "times the reference's, medians in turns"),
        ("KV bytes", record["kv_bytes_ratio"], "times the reference's, at the peak"),
    )
    for name, value, unit in rows:
        grid.add_row(name, _figure(value), f"[dim]{unit}[/]")
    grid.add_row("fidelity", record["fidelity"], "[dim]as declared[/]")
    stdout().print(grid)
    for act, count in record["acts"].items():
        stdout().print(f"  {act} {count:,}", highlight=False)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
