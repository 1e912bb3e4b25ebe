"""Write the pages of techniques from where each describes itself, and from its benchmark's result where there is one.

    python -m tools.pages            # writes docs/techniques
    python -m tools.pages --check    # says which pages are not what would be written; exit status 1 if any

A page holds what the head of the technique's file says (`weft.features`), its arguments, its traits in words, and the figures of
`bench/results/SLOT-NAME.json`.  Nobody edits a page: the file that it comes from is edited, and the page written anew.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.exec.host import format_size
from weft.features import Feature, features
from weft.registry import lookup
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity, Trait

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "techniques"
RESULTS = ROOT / "bench" / "results"
NOT_RESULTS = frozenset({"test-long.json"})
"""Files in bench/results that are no technique's."""
CLEAR = 0.03
"""A ratio nearer to 1 than this is no difference, whatever the rounds say."""
FEW = 3
"""Fewer rounds than this prove nothing."""

ALSO = {
    "decode_tok_cpu_s": "Where the clock shows no difference, tokens per second of processor time were",
    "prefill_tok_s": "Tokens per second of prompts were",
    "kv_peak_bytes": "The KV held was",
}
"""What a page says beside the speed of decoding."""
FIDELITY = {
    Fidelity.EXACT: "the same tokens as without it, greedy and seeded",
    Fidelity.SAME_LAW: "tokens drawn from the same distribution",
    Fidelity.APPROX: "near those without it",
}
TRAITS: Mapping[str, str] = {
    Trait.WINDOW_QUERIES: "the queries of a prompt's last positions",
    Trait.ATTENTION_MASS: "how much attention each entry of the cache gets",
    Trait.HIDDEN_STATES: "hidden states of the layers",
    Trait.PRE_ROPE_KEYS: "keys as they are before the rotary embedding",
    Trait.TREE_MASK: "attention over a tree of guesses",
    Trait.TARGET_FEATURES: "features of the target model's layers",
    Trait.LENGTH_ESTIMATE: "an estimate of how long an answer will be",
    Trait.FUTURE: "knowledge of what will be asked (a bound, not for service)",
    Trait.CALIBRATION: "figures that are gathered on sample text beforehand",
    Trait.TRAINED_PARTS: "weights that were trained for it",
    Trait.HOST_TIER: "a second place for blocks, in memory or on disk",
    Trait.COLLECTIVES: "exchange between devices",
    Trait.TRITON: "Triton",
    Trait.ROLLBACK: "that computed positions can be taken back",
    Trait.EXPORT_STATE: "that the state of a request can be taken elsewhere",
    Trait.BOUNDED_KV: "a bound on the KV of a request",
    Trait.STARVATION_FREE: "that every request is served in the end",
    Trait.READS_HISTORY: "to see the end of a prompt computed, even where its KV is cached",
    Trait.SECOND_MODEL: "a second model in memory",
    Effect.DROPS_TOKENS: "drops entries of the cache",
    Effect.REINDEXES_POSITIONS: "gives entries other positions",
    Effect.REWRITES_KV: "changes the values of stored KV",
    Effect.RAGGED_HEADS: "leaves heads with unequal numbers of entries",
    Effect.LENGTH_FROM_DATA: "keeps a number of entries that depends on their values",
    Effect.DYNAMIC_SHAPES: "computes shapes that depend on the data",
    Effect.EXTRA_PASS: "takes an extra pass over the prompt",
    Effect.PREEMPTS: "may take a running request's blocks and have it computed again later",
    Effect.PER_REQUEST_STATE: "keeps state for each request beside its KV",
    Effect.SKIPS_LAYERS: "leaves out layers for some rows",
    Effect.GUESSES: "guesses tokens and verifies several in a step",
    Effect.ONE_AT_A_TIME: "needs each token before the next is guessed at",
    Effect.REDEFINES: "gives another answer on purpose",
}
"""Each word of `weft.traits`; what a technique needs or gives, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pages", description="Write docs/techniques.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is not as it would be")
    check = parser.parse_args(argv).check
    pages = written()
    stale = differing(pages, PAGES)
    if check:
        for name in stale:
            print(f"docs/techniques/{name} is not what python -m tools.pages writes")
        return 1 if stale else 0
    PAGES.mkdir(parents=True, exist_ok=True)
    for path in PAGES.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        (PAGES / name).write_text(text, encoding="utf8")
    print(f"{len(pages)} pages, {len(stale)} changed")
    return 0


def differing(pages: Mapping[str, str], folder: Path) -> list[str]:
    """Names of pages that are missing, other than written, or not written at all."""
    there = {path.name: path.read_text(encoding="utf8") for path in folder.glob("*.md")}
    return sorted(name for name in there.keys() | pages.keys() if there.get(name) != pages.get(name))


def written(results: Path = RESULTS) -> dict[str, str]:
    """Every page by its file name.  Raises ConfigError for a result of a technique that does not exist."""
    own = [f for f in features() if lookup(f.slot, f.name).__module__.startswith("weft.")]
    measured = read_results(results)
    unknown = measured.keys() - {f"{f.slot}={f.name}" for f in own}
    if unknown:
        raise ConfigError(f"{results} has results of {', '.join(sorted(unknown))}, which do not exist; remove them")
    pages = {f"{f.slot}-{f.name}.md": page(f, measured.get(f"{f.slot}={f.name}")) for f in own}
    return {**pages, "index.md": index(own, measured)}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmarks' results by technique.  Raises ConfigError where a file's name is not its technique's."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name not in NOT_RESULTS:
            result = json.loads(path.read_text(encoding="utf8"))
            if result["technique"].replace("=", "-") != path.stem:
                raise ConfigError(f"{path} holds the result of {result['technique']}; name it after that")
            found[result["technique"]] = result
    return found


# ---------------------------------------------------------------------------------------------- a page


def page(f: Feature, result: Mapping[str, Any] | None) -> str:
    """A technique's page.  result: of its benchmark, where there is one."""
    module = lookup(f.slot, f.name).__module__.replace(".", "/") + ".py"
    sources = f"the head of {module}" + (f" and bench/results/{f.slot}-{f.name}.json" if result else "")
    parts = [
        f"<!-- Written by python -m tools.pages from {sources}; edit those. -->",
        f"# {f.slot}={f.name}",
        plain(f.summary),
        facts(f, module),
        "## Rule",
        plain(f.fields["Rule"]),
        *([f"Shapes: {plain(f.fields['Shapes'])}"] if "Shapes" in f.fields else []),
        "## Arguments",
        arguments(f),
        "## What it needs and what it does",
        traits(f),
        "## Cost",
        plain(f.fields["Cost"]),
        "## Where it differs from the paper",
        plain(f.fields["Differs"]),
        "## When it pays",
        pays(f, result),
        "## Measured",
        *(figures(result) if result else ["Nothing was measured yet."]),
    ]
    return "\n\n".join(parts) + "\n"


def facts(f: Feature, module: str) -> str:
    null = SLOTS[f.slot].null == f.name
    bound = f.traits.bound
    answers = FIDELITY[f.traits.fidelity]
    if bound is not None:
        answers += f", by a mean KL divergence below {bound:g} nats a token"
    alone = bool(getattr(lookup(f.slot, f.name), "per_request", False))
    rows = [
        ("slot", f"`{f.slot}`: {SLOTS[f.slot].question}"),
        ("paper", f.paper + (f" (catalogue {', '.join(f.catalogue)})" if f.catalogue else "")),
        ("answers", f"{f.traits.fidelity.value}: {answers}"),
        ("use", "what a stack has that names none" if null else f"`weft serve --with '{f.slot}={f.name}'`"),
        ("for one request", "yes, laid over the server's stack" if alone else "no, it belongs to the whole server"),
        ("source", f"[{module}](../../{module})"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {cell(b)} |" for a, b in rows)])


def arguments(f: Feature) -> str:
    cls = lookup(f.slot, f.name)
    own: list[Field[Any]] = [a for a in fields(cls) if a.init] if is_dataclass(cls) else []
    units = f"Units: {plain(f.fields['Units'])}. Raises: {plain(f.fields['Raises'])}."
    if not own:
        return f"None. {units}"
    kinds = inspect.get_annotations(cls)
    rows = [f"| `{a.name}` | {_default(a)} | {cell(_kind(kinds.get(a.name, a.type)))} |" for a in own]
    return "\n".join(["| argument | default | type |", "|---|---|---|", *rows, "", units])


def _default(argument: Field[Any]) -> str:
    if argument.default is not MISSING:
        return f"`{argument.default!r}`"
    return f"`{argument.default_factory()!r}`" if argument.default_factory is not MISSING else "must be given"


def _kind(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def traits(f: Feature) -> str:
    history = {Trait.READS_HISTORY: f"to see the last {f.traits.history} tokens of a prompt computed"}
    said = [
        *(f"- It needs {history.get(t) or words(t)} (`{t}`)." for t in sorted(f.traits.needs)),
        *(f"- It gives {words(t)} (`{t}`)." for t in sorted(f.traits.gives)),
        *(f"- It {words(t)} (`{t}`)." for t in sorted(f.traits.effects)),
    ]
    return "\n".join(said) or "Nothing that another part would have to know."


def words(trait: str) -> str:
    return TRAITS.get(trait, trait.lower().replace("_", " "))


# ---------------------------------------------------------------------------------------------- figures


def pays(f: Feature, result: Mapping[str, Any] | None) -> str:
    """What its file says, and what the figures say, in sentences."""
    if SLOTS[f.slot].null == f.name and not result:
        return "It is the null of its slot: what the others are compared with."
    said = [f"It pays {plain(f.fields['Pays'])}."] if "Pays" in f.fields else []
    return " ".join([*said, *(verdicts(result) if result else [])]) or "Not known: nothing was measured yet."


def verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """Plain sentences: where decoding got faster, slower or neither; the same of prefill and of the KV held, where it differs."""
    found: dict[str, dict[str, list[str]]] = {}
    several = any(len(c["cases"]) > 2 for c in result["comparisons"])
    for where, rounds, case in loads(result):
        kinds = {}
        for key, ratio in case["ratio"].items():
            low, high = case["ratio_spread"][key]
            kinds[key] = verdict(ratio, low, high, rounds)
            # Processor time says more than the clock of a busy machine, but it knows nothing of waiting: it comes second.
            if key != "decode_tok_cpu_s" or kinds["decode_tok_s"] == "same":
                text = f"{ratio:.2f} times{' for ' + case['name'] if several else ''} on {where}"
                found.setdefault(key, {}).setdefault(kinds[key], []).append(text)
    lead = f"Against {result['comparisons'][0]['cases'][0]['name']}, tokens per second of decoding were "
    for kind, text in (("more", "higher"), ("less", "lower"), ("same", "not clearly different")):
        if kind in found.get("decode_tok_s", {}):
            yield f"{lead}{text}: {listed(found['decode_tok_s'][kind])}."
            lead = "They were "
    for key, name in ALSO.items():
        for kind, text in (("more", "higher"), ("less", "lower")):
            if kind in found.get(key, {}):
                yield f"{name} {text}: {listed(found[key][kind])}."


def verdict(ratio: float, low: float, high: float, rounds: int) -> str:
    """more, less or same.  A difference counts where each of several rounds shows it and its median is larger than CLEAR."""
    if rounds >= FEW and low > 1 and ratio >= 1 + CLEAR:
        return "more"
    return "less" if rounds >= FEW and high < 1 and ratio <= 1 - CLEAR else "same"


def loads(result: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(load in words, rounds, case) of every case but the nulls."""
    for c in result["comparisons"]:
        for case in c["cases"][1:]:
            yield f"{c['model']}, {c['title']}, batch {c['load']['batch']}", c["rounds"], case


def figures(result: Mapping[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    yield f"    {result['command']}"
    yield (
        f"{result['date']}, {machine['cpu']}, {machine['cores']:g} cores. Medians; in brackets the least and the most of "
        "the rounds. What is compared ran in turns in one process, and a ratio is taken within a round. The null's own ratio, of "
        "each round to the one before, shows how much the machine wavered."
    )
    for c in result["comparisons"]:
        load, limit = c["load"], c["limit"]
        law = ", ".join(f"{key} {value:g}" for key, value in load["sampling"].items() if isinstance(value, int | float))
        yield f"### {c['model']}, {c['title']}, batch {load['batch']}"
        yield (
            f"{load['prompts']} prompts of {load['prompt_tok']} tokens on average, {load['new_tok']} new ones each, {law}; "
            f"{c['shape']['parameters'] / 1e6:.0f} M parameters, {c['dtype']}, threads: {c['threads']}, rounds: {c['rounds']}. "
            f"An engine that only reads, once for each token, would decode {limit['decode_tok_s']:.0f} tokens/s here "
            f"({limit['read_gb_s']:.0f} GB/s)."
        )
        yield "\n".join([*HEAD, *(row(case) for case in c["cases"])])
    if result["notes"]:
        yield "\n".join(f"- {plain(note)}" for note in result["notes"])


COLUMNS = (
    "", "decode tokens/s", "against the null", "in CPU time", "prefill", "tokens a step", "step", "KV held", "memory",
    "same tokens", "acts of a round",
)  # fmt: skip
HEAD = (f"| {' | '.join(COLUMNS)} |".replace("|  |", "| |"), "|---" * len(COLUMNS) + "|")


def row(case: Mapping[str, Any]) -> str:
    mid, ratio, spread = case["median"], case["ratio"], case["ratio_spread"]
    peak = mid.get("rss_peak_bytes")
    acts = ", ".join(f"{act.rpartition('.')[2]} {count:g}" for act, count in case["acts"].items() if count)
    cells = [
        case["name"],
        f"{mid['decode_tok_s']:.1f}",
        _times(ratio, spread, "decode_tok_s"),
        _times(ratio, spread, "decode_tok_cpu_s"),
        _times(ratio, spread, "prefill_tok_s"),
        f"{mid['tok_per_step']:.2f}",
        f"{1000 * mid['step_s']:.1f} ms",
        format_size(int(mid["kv_peak_bytes"])),
        "" if peak is None else format_size(int(peak)),
        f"{case['same_tokens']:.0%}",
        acts,
    ]
    return f"| {' | '.join(cell(c) for c in cells)} |"


def _times(ratio: Mapping[str, float], spread: Mapping[str, Sequence[float]], key: str) -> str:
    if key not in ratio:
        return ""
    low, high = spread[key]
    return f"{ratio[key]:.2f} ({low:.2f} to {high:.2f})"


# ---------------------------------------------------------------------------------------------- the index


def index(own: Iterable[Feature], measured: Mapping[str, Mapping[str, Any]]) -> str:
    """All techniques by slot, with what they do to answers and to the speed of decoding."""
    parts = [
        "<!-- Written by python -m tools.pages; edit the techniques' files. -->",
        "# Techniques",
        "What there is for each slot, and what it gained where it was measured: tokens per second of decoding against the null "
        "of the slot, least and most over its loads. [How it is measured](../../bench/README.md); [how to add "
        "one](../adding-a-technique.md).",
    ]
    own = list(own)
    for slot in SLOTS.values():
        mine = [f for f in own if f.slot == slot.name]
        if mine:
            lines = [f"## {slot.name}", "", f"{slot.question[0].upper()}{slot.question[1:]}.", ""]
            lines += ["| technique | what it does | answers | paper | decode |", "|---|---|---|---|---|"]
            for f in mine:
                name = f"[{f.name}]({f.slot}-{f.name}.md)" + (" (default)" if slot.null == f.name else "")
                gained = _gained(measured.get(f"{f.slot}={f.name}"))
                cells = [name, plain(f.summary), f.traits.fidelity.value, f.paper, gained]
                lines.append(f"| {' | '.join(cell(c) for c in cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _gained(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "not measured"
    ratios = [case["ratio"]["decode_tok_s"] for _, _, case in loads(result)]
    return f"{min(ratios):.2f} to {max(ratios):.2f} times"


# ---------------------------------------------------------------------------------------------- text


def plain(text: str) -> str:
    """Text of a docstring as Markdown shows it, code in backticks left alone."""
    pieces = text.strip().split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"\*|<(?=[a-zA-Z/!?])|\](?=\()", lambda found: "\\" + found[0], pieces[i])
    return "`".join(pieces)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{'; '.join(texts[:-1])}; and {texts[-1]}"


if __name__ == "__main__":
    sys.exit(main())
