"""Write the pages of techniques from where each describes itself, and from its benchmark's result where there is one.

    python -m tools.pages            # writes docs/techniques
    python -m tools.pages --check    # says which pages are not what would be written; exit status 1 if any

A page holds what the head of the technique's file says (`weft.features`), its arguments, its traits in words, and the figures of
`bench/results/SLOT-NAME.json`.  Nobody edits a page: the file that it comes from is edited, and the page written anew.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from tools.charts import drawn
from tools.measured import RESULTS, beside, cell, divergences, figures, gained, pays, plain, read_fidelity, read_results
from weft.cli.policies import known
from weft.errors import ConfigError
from weft.features import Feature, features
from weft.registry import lookup
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity, Trait

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "techniques"
CHARTS = "charts"
"""Folder in that one, with a chart for each policy."""
FIDELITY = {
    Fidelity.EXACT: "the same tokens as without it, greedy and seeded",
    Fidelity.SAME_LAW: "tokens drawn from the same distribution",
    Fidelity.APPROX: "near those without it",
}
REDEFINED = "another answer on purpose, and true to its own definition of it"
"""Instead of the fidelity's words, where an effect says that the answer is another one."""
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
    Effect.GUESSES: "makes or weighs guesses at tokens, of which several are verified in a step",
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
    (PAGES / CHARTS).mkdir(exist_ok=True)
    for path in (PAGES / CHARTS).glob("*.svg"):
        if f"{CHARTS}/{path.name}" not in pages:
            path.unlink()
    for name, text in pages.items():
        (PAGES / name).write_text(text, encoding="utf8")
    print(f"{len(pages)} pages, {len(stale)} changed")
    return 0


def differing(pages: Mapping[str, str], folder: Path) -> list[str]:
    """Names of pages that are missing, other than written, or not written at all."""
    files = [*folder.glob("*.md"), *(folder / CHARTS).glob("*.svg")]
    there = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf8") for path in files}
    return sorted(name for name in there.keys() | pages.keys() if there.get(name) != pages.get(name))


def written(results: Path = RESULTS) -> dict[str, str]:
    """Every page by its file name.  Raises ConfigError for a result of a technique that does not exist."""
    own = [f for f in features() if lookup(f.slot, f.name).__module__.startswith("weft.")]
    measured = read_results(results)
    unknown = measured.keys() - {f"{f.slot}={f.name}" for f in own}
    if unknown:
        raise ConfigError(f"{results} has results of {', '.join(sorted(unknown))}, which do not exist; remove them")
    near = read_fidelity(results)
    drawings, judged = drawn(results), {policy["name"]: policy for policy in known()}
    pages, shown = {f"{CHARTS}/{name}": text for name, text in drawings.items()}, {}
    for f in own:
        name = f"{f.slot}={f.name}"
        result = beside(measured, name)
        drawing = f"{CHARTS}/{f.slot}-{f.name}.svg" if f"{f.slot}-{f.name}.svg" in drawings else None
        told = [*simulated(judged[name], drawing)] if name in judged else []
        pages[f"{f.slot}-{f.name}.md"] = page(f, result, near.get(name, ()), told)
        if result is not None:
            shown[name] = result
    return {**pages, "index.md": index(own, shown)}


# ---------------------------------------------------------------------------------------------- a page


def page(
    f: Feature,
    result: Mapping[str, Any] | None,
    near: Sequence[Mapping[str, Any]] = (),
    told: Sequence[str] = (),
) -> str:
    """A technique's page.

    result: of its benchmark, where there is one.  near: records of `weft fidelity`.  told: what the simulator says of it.
    """
    module = lookup(f.slot, f.name).__module__.replace(".", "/") + ".py"
    files = [module, *([f"bench/results/{result.get('kept', f'{f.slot}-{f.name}')}.json"] if result else [])]
    files += ["bench/results/fidelity.json"] if near else []
    sources = f"the head of {' and '.join(files)}"
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
        *(["## Bound", plain(f.fields["Bound"])] if "Bound" in f.fields else []),
        "## Cost",
        plain(f.fields["Cost"]),
        "## Where it differs from the paper",
        plain(f.fields["Differs"]),
        "## When it pays",
        *pays(f.fields.get("Pays"), SLOTS[f.slot].null == f.name, result),
        "## Measured",
        *(
            figures(result)
            if result
            else ["Nothing was measured on a machine yet." if told else "Nothing was measured yet."]
        ),
        *(["## In the simulator", *told] if told else []),
        *(["## What it does to answers", *divergences(near)] if near else []),
    ]
    return "\n\n".join(parts) + "\n"


def simulated(policy: Mapping[str, Any], drawing: str | None) -> Iterable[str]:
    """What `weft policies` says of a claim, and a chart where one is kept."""
    if policy["claim"] is not None:
        yield f"Claimed: {plain(policy['claim'])}. That {policy['verdict']}: {plain(policy['reason'])}."
    if drawing is not None:
        yield f"![Beside first come, first served and a clairvoyant bound]({drawing})"
        yield (
            "Three paces of the load, in the [simulator](../simulator.md); `python -m bench.sim.charts` computes them anew. "
            "The clairvoyant order knows how long every answer will be: it is a bound of the mean time to the end for whoever "
            "fills steps as it does, and of no other figure."
        )


def facts(f: Feature, module: str) -> str:
    null = SLOTS[f.slot].null == f.name
    bound = f.traits.bound
    redefines = Effect.REDEFINES in f.traits.effects
    answers = REDEFINED if redefines else FIDELITY[f.traits.fidelity]
    if bound is not None:
        answers += (
            f", by a mean KL divergence below {bound:g} nats a token with {_trial(f)} over the prose of `weft conform`"
        )
    alone = bool(getattr(lookup(f.slot, f.name), "per_request", False))
    rows = [
        ("slot", f"`{f.slot}`: {SLOTS[f.slot].question}"),
        ("paper", f.paper + (f" (catalogue {', '.join(f.catalogue)})" if f.catalogue else "")),
        ("answers", f"{f.traits.answers}: {answers}"),
        ("use", "what a stack has that names none" if null else _use(f)),
        *(
            [
                (
                    "for one request",
                    "yes, laid over the server's stack" if alone else "no, it belongs to the whole server",
                )
            ]
            if SLOTS[f.slot].inside
            else []
        ),
        ("source", f"[{module}](../../{module})"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {cell(b)} |" for a, b in rows)])


def _use(f: Feature) -> str:
    """A command line that has the technique in use."""
    if SLOTS[f.slot].inside:
        return f"`weft serve --with '{f.slot}={f.name}'`"
    needed = "file='FILE'" if any(a.name == "file" for a in fields(lookup(f.slot, f.name))) else ""
    flag = "cost" if f.slot == "cost" else "policy"
    return f'`weft sim --trace FILE --{flag} "{f.name}({needed})"`'


def _trial(f: Feature) -> str:
    """The arguments at which an approximation states its bound."""
    trial = getattr(lookup(f.slot, f.name), "trial", {})
    said = ", ".join(f"{key}={value!r}" for key, value in trial.items()) if isinstance(trial, Mapping) else ""
    return f"`{f.slot}={f.name}({said})`" if said else "its defaults"


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
                gain = gained(measured.get(f"{f.slot}={f.name}"))
                cells = [name, plain(f.summary), f.traits.answers, f.paper, gain]
                lines.append(f"| {' | '.join(cell(c) for c in cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
