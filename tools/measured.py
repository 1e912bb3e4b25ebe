"""What a page says of figures: a benchmark's result and the records of `weft fidelity`, in sentences and tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.exec.host import format_size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FIDELITY = "fidelity.json"
NOT_RESULTS = frozenset(
    "test-long.json pairs.json pairs-cuda.json decode-cuda.json quantization.json rivals.json operations.json sim-speed.json "
    "sim-calibrated.json sim-charts.json sim-measured-vllm.json roles.json draft.json draft-online.json draft-stands.json "
    "sim-growth.json draft-fastdraft.json draft-fastdraft-speed.json startup.json steps.json serving.json soak.json "
    "accept-lenient.json accept-bound.json".split()
) | {FIDELITY}
"""Files in bench/results that are no technique's."""
CLEAR = 0.03
"""A ratio nearer to 1 than this is no difference, whatever the rounds say."""
FEW = 3
"""Fewer rounds than this prove nothing."""

ASPECTS: Mapping[str, tuple[str, str, str]] = {
    "decode_tok_s": ("decoding", "faster", "slower"),
    "prefill_tok_s": ("prompts", "faster", "slower"),
    "ttft_s": ("first token", "later", "sooner"),
    "step_p95_s": ("slow steps", "longer", "shorter"),
    "kv_peak_bytes": ("KV held", "more", "less"),
}
"""Of each figure that is judged: what it is called, and what a ratio above and below 1 means."""


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


def beside(results: Mapping[str, Mapping[str, Any]], technique: str) -> Mapping[str, Any] | None:
    """A technique's own result; else the first one in which it stands beside another, as a bound or a control."""
    own = results.get(technique)
    if own is not None:
        return own
    for name, result in results.items():
        if any(loads({**result, "technique": technique}, own=True)):
            return {**result, "technique": technique, "kept": name.replace("=", "-")}
    return None


def read_fidelity(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of `python -m bench.fidelity` by technique; empty where it was not run."""
    path = folder / FIDELITY
    found: dict[str, list[dict[str, Any]]] = {}
    for record in json.loads(path.read_text(encoding="utf8"))["records"] if path.is_file() else ():
        found.setdefault(record["with"].partition("(")[0], []).append(record)
    return found


# ---------------------------------------------------------------------------------------------- when it pays


def pays(field: str | None, null: bool, result: Mapping[str, Any] | None) -> Iterator[str]:
    """Paragraphs: what the technique's file says (its field Pays), and what the figures say.  null: it is its slot's null."""
    if null and not result:
        yield "It is the null of its slot: what the others are compared with."
        return
    said = [f"It pays {plain(field)}."] if field else []
    yield " ".join([*said, *(verdicts(result) if result else [])]) or "Not known: nothing was measured yet."
    if result:
        yield "\n".join(judged(result))


def verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on each aspect in which some case differs from the null, and one on decoding in any event."""
    found: dict[str, dict[str, list[float]]] = {}
    count = 0
    for _, rounds, case in loads(result, own=True):
        count += 1
        for key in ASPECTS.keys() & case["ratio"].keys():
            kind = verdict(case, key, rounds)
            found.setdefault(key, {}).setdefault(kind, []).append(case["ratio"][key])
    lead = f"Against {result['comparisons'][0]['cases'][0]['name']}, "
    for key, (name, more, less) in ASPECTS.items():
        kinds = found.get(key, {})
        if not kinds or (key != "decode_tok_s" and kinds.keys() == {"same"}):
            continue
        said = [
            f"{word} in {len(kinds[kind])} ({_range(kinds[kind])})"
            for kind, word in (("more", more), ("less", less))
            if kind in kinds
        ]
        if "same" in kinds:
            said.append(f"not clearly different in {len(kinds['same'])}")
        sentence = f"{lead}{name} {'were' if name.endswith('s') else 'was'}, of {count} comparisons, {listed(said)}."
        yield sentence[0].upper() + sentence[1:]
        lead = ""


def judged(result: Mapping[str, Any]) -> Iterator[str]:
    """A table: of each case the ratios to the null, each with a word for what it means."""
    keys = [key for key in ASPECTS if any(key in case["ratio"] for _, _, case in loads(result))]
    yield f"| load | | {' | '.join(ASPECTS[key][0] for key in keys)} |"
    yield "|---" * (2 + len(keys)) + "|"
    for where, rounds, case in loads(result):
        cells = [where, named(case), *(_judged(case, key, rounds) for key in keys)]
        yield f"| {' | '.join(cell(c) for c in cells)} |"


def named(case: Mapping[str, Any]) -> str:
    return f"{case['name']} (bound)" if case.get("bound") else case["name"]


def _judged(case: Mapping[str, Any], key: str, rounds: int) -> str:
    if key not in case["ratio"]:
        return ""
    _, more, less = ASPECTS[key]

    def word(of: str) -> str:
        kind = verdict(case, of, rounds)
        return {"more": more, "less": less, "same": ""}[kind]

    said = f"{case['ratio'][key]:.2f} {word(key)}".strip()
    # Processor time says more than the clock of a busy machine, but it knows nothing of waiting: it comes second.
    if key == "decode_tok_s" and not word(key) and word("decode_tok_cpu_s"):
        said += f" ({case['ratio']['decode_tok_cpu_s']:.2f} in processor time: {word('decode_tok_cpu_s')})"
    return said


def verdict(case: Mapping[str, Any], key: str, rounds: int) -> str:
    """more, less or same.  A difference counts where each of several rounds shows it and its median is larger than CLEAR."""
    ratio, (low, high) = case["ratio"][key], case["ratio_spread"][key]
    if rounds >= FEW and low > 1 and ratio >= 1 + CLEAR:
        return "more"
    return "less" if rounds >= FEW and high < 1 and ratio <= 1 - CLEAR else "same"


def loads(result: Mapping[str, Any], own: bool = False) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(load in words, rounds, case) of every case but the nulls.  own: only those with the technique itself in their stack.

    Others are bounds and controls, which a page shows beside it; a case of the technique that is marked as a bound is one too.
    """
    for c in result["comparisons"]:
        null, *others = (({part.partition("(")[0] for part in case["stack"]}, case) for case in c["cases"])
        for parts, case in others:
            if not own or (result["technique"] in parts - null[0] and not case.get("bound")):
                yield f"{c['model']}, {c['title']}, batch {c['load']['batch']}", c["rounds"], case


def gained(result: Mapping[str, Any] | None) -> str:
    """The range of ratios of decoding, for the index."""
    if result is None:
        return "not measured"
    return _range([case["ratio"]["decode_tok_s"] for _, _, case in loads(result, own=True)])


def _range(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return f"{low} times" if low == high else f"{low} to {high} times"


# ---------------------------------------------------------------------------------------------- figures


def figures(result: Mapping[str, Any]) -> Iterator[str]:
    """Paragraphs: the command, the machine, and a table for each comparison."""
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
        yield "\n".join([*head(load["apart"]), *(row(case, load["apart"]) for case in c["cases"])])
    if result["notes"]:
        yield "\n".join(f"- {plain(note)}" for note in result["notes"])


def head(apart: bool) -> tuple[str, str]:
    """apart: whether prompts were timed by themselves; else the first tokens and the slow steps are told instead."""
    columns = ("decode tokens/s", "against the null", "in CPU time", *(("prefill",) if apart else ("first token", "slow steps")),
               "tokens a step", "step", "KV held", "memory", "same tokens", "acts of a round")  # fmt: skip
    return f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"


def row(case: Mapping[str, Any], apart: bool = True) -> str:
    """A case's line under `head`."""
    mid = case["median"]
    peak = mid.get("rss_peak_bytes")
    acts = ", ".join(f"{act.rpartition('.')[2]} {count:g}" for act, count in case["acts"].items() if count)
    cells = [
        named(case),
        f"{mid['decode_tok_s']:.1f}",
        _times(case, "decode_tok_s"),
        _times(case, "decode_tok_cpu_s"),
        *(_times(case, key) for key in (("prefill_tok_s",) if apart else ("ttft_s", "step_p95_s"))),
        f"{mid['tok_per_step']:.2f}",
        f"{1000 * mid['step_s']:.1f} ms",
        format_size(int(mid["kv_peak_bytes"])),
        "" if peak is None else format_size(int(peak)),
        f"{case['same_tokens']:.0%}" + (f", right answers {mid['right']:.0%}" if "right" in mid else ""),
        acts,
    ]
    return f"| {' | '.join(cell(c) for c in cells)} |"


def _times(case: Mapping[str, Any], key: str) -> str:
    if key not in case["ratio"]:
        return ""
    low, high = case["ratio_spread"][key]
    return f"{case['ratio'][key]:.2f} ({low:.2f} to {high:.2f})"


# ---------------------------------------------------------------------------------------------- fidelity


def divergences(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of `weft fidelity`: each record a line."""
    yield "    python -m bench.fidelity"
    yield (
        "Beside the reference path, along prose that the model has not read, and asked for facts hidden in it. KL, first choice "
        "and perplexity are means over the last quarter of each window, at most its last 64 tokens, where most has been dropped "
        "or skipped: a bound that is stated over a longer stretch of text may lie below them. A recall counts where the "
        "reference path itself recalls at least 0.8; speed and KV are of the whole run, prompts included. The length of answers "
        "is told where some of the reference's end by themselves."
    )
    lines = [
        "| model, tokens | stack | mean KL, nats (95 % interval) | same first choice | perplexity | recall (reference) | "
        "length of answers | speed | KV |",
        "|---" * 9 + "|",
    ]
    for r in records:
        low, high = r["kl_ci95"]
        recall = "does not count" if r["recall"] is None else f"{r['recall']:.2f}"
        cells = [
            f"{r['model']}, {r['length']}", f"`{r['with']}`", f"{r['kl_mean']:.2g} ({low:.2g} to {high:.2g})",
            f"{r['top1']:.1%}", f"{r['ppl_ratio']:.3f}", f"{recall} ({r['recall_reference']:.2f})",
            _length(r), f"{r['speed_ratio']:.2f}", f"{r['kv_bytes_ratio']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cell(c) for c in cells)} |")
    yield "\n".join(lines)


def _length(record: Mapping[str, Any]) -> str:
    """Of answers; nothing where none of the reference's ends, or where a record is from before that was looked at."""
    if record.get("output_ended") is None or record["output_len_ratio"] is None:
        return "not known"
    return f"{record['output_len_ratio']:.2f} ({record['output_ended']:.0%} end)"


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
