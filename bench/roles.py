"""What two engines gain on this machine: `--replicas 2` and `--roles prefill=1,decode=1` beside one engine, over HTTP.

    python -m bench.roles [--rounds 3]             (2 minutes on a quiet machine, which it wants)

All servers have the same memory and stand at once; loads go to one after the other, in turns, turned around in every second
round.  One engine has one thread, as a small model has by itself and as each of two engines has, or, as a control, two.
Writes bench/results/roles.json, and roles.md beside it, which says in words what the figures say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import RESULTS, bundled, machine, write
from bench.serving import served
from bench.sim.calibrated import Others
from weft.bench.client import Target
from weft.bench.dataset import made_up
from weft.bench.serve import Load, first_model, run, summary

COMMON = ("--memory", "1400M", "--max-model-len", "1024", "--max-num-seqs", "32")
SERVERS: dict[str, tuple[str, ...]] = {
    "one engine": ("--threads", "1"),
    "one engine, two threads": ("--threads", "2"),
    "two replicas": ("--threads", "1", "--replicas", "2"),
    "prompts apart": ("--threads", "1", "--roles", "prefill=1,decode=1"),
}
BASE = "one engine"
LOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "long prompts": ("long prompts (250 words, answers of 32 tokens), 5 requests a second",
                     {"rate": 5.0, "requests": 40, "words": 250, "new": 32}),
    "long answers": ("long answers (120 tokens to 20 words), 12 clients at once",
                     {"concurrency": 12, "requests": 48, "words": 20, "new": 120}),
}  # fmt: skip
FIGURES = {
    "output_tok_s": "tokens/s",
    "ttft_p50": "TTFT p50",
    "ttft_p99": "TTFT p99",
    "tpot_p50": "TPOT p50",
    "tpot_p99": "TPOT p99",
}
CLEAR = 0.05
"""Ratios of all rounds have to lie on one side of 1, and their median so far from it, for a difference to be told."""


def one(port: int, load: Mapping[str, Any], seed: int) -> dict[str, float]:
    """What clients saw of one load."""
    target = Target(f"http://127.0.0.1:{port}", None, 120.0)
    wanted = Load(
        concurrency=load.get("concurrency"), rate=load.get("rate"), max_tokens=load["new"], route="completions", seed=seed,
        extra={"ignore_eos": True},
    )  # fmt: skip

    async def measured() -> dict[str, Any]:
        try:
            name = await first_model(target)
            samples, seconds = await run(target, name, made_up(load["requests"], load["words"], seed), wanted)
            return summary(samples, seconds, wanted, url="", model=name)
        finally:
            target.close()

    told = asyncio.run(measured())
    if told["errors"]:
        raise SystemExit(f"{told['errors']} requests failed: {told['error_kinds']}")
    return {
        "output_tok_s": told["output_tok_s"],
        **{f"{k}_{q}": told[f"{k}_s"][q] for k in ("ttft", "tpot") for q in ("p50", "p99")},
    }


def rounds(ports: Mapping[str, int], count: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By load and server, a record for each round."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {s: [] for s in ports} for name in LOADS}
    for name, port in ports.items():
        one(port, {"concurrency": 4, "requests": 8, "words": 100, "new": 16}, 999)  # warm
        print(f"{name} is warm", flush=True)
    for turn in range(count):
        order = list(ports.items())[:: -1 if turn % 2 else 1]
        for load, (_, what) in LOADS.items():
            for name, port in order:
                found[load][name].append(one(port, what, 10 * turn))
                print(turn + 1, load, name, {k: round(v, 4) for k, v in found[load][name][-1].items()}, flush=True)
    return found


def cases(found: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> list[dict[str, Any]]:
    """Medians over rounds, and ratios to one engine, taken within a round."""
    out = []
    for load, by in found.items():
        for name, records in by.items():
            values = {k: median(r[k] for r in records) for k in FIGURES}
            ratios = {k: [r[k] / b[k] for r, b in zip(records, by[BASE], strict=True)] for k in FIGURES}
            told = {k: {"median": median(v), "least": min(v), "most": max(v)} for k, v in ratios.items()}
            out.append(
                {
                    "load": LOADS[load][0],
                    "server": name,
                    "flags": " ".join(SERVERS[name]),
                    **values,
                    "against_one": told,
                }
            )
    return out


def verdict(ratio: Mapping[str, float], *, more_is_better: bool) -> str:
    """In words, from the ratios of all rounds."""
    clear = (ratio["least"] > 1 or ratio["most"] < 1) and abs(ratio["median"] - 1) > CLEAR
    if not clear:
        return "no clear difference"
    return "better" if (ratio["median"] > 1) == more_is_better else "worse"


def page(result: Mapping[str, Any]) -> str:
    """The figures, and what they say."""
    lines = [
        "# Two engines on this machine", "",
        f"`python -m bench.roles`, {result['machine']['cpu']}, {result['machine']['cores']} cores, the bundled model, "
        f"{result['rounds']} rounds in turns; other processes kept {result['others']:.2f} processors busy meanwhile. Medians; in "
        "brackets the ratio to one engine, within a round: median, and least to most.", "",
    ]  # fmt: skip
    for load in dict.fromkeys(c["load"] for c in result["cases"]):
        lines += [
            f"## {load[0].upper()}{load[1:]}",
            "",
            f"| | {' | '.join(FIGURES.values())} |",
            "|---" * (1 + len(FIGURES)) + "|",
        ]
        mine = [c for c in result["cases"] if c["load"] == load]
        for c in mine:
            cells = []
            for key in FIGURES:
                r = c["against_one"][key]
                value = f"{c[key]:,.0f}" if key == "output_tok_s" else f"{1e3 * c[key]:,.1f} ms"
                cells.append(
                    value
                    if c["server"] == BASE
                    else f"{value} ({r['median']:.2f}, {r['least']:.2f} to {r['most']:.2f})"
                )
            lines.append(f"| {c['server']} (`{c['flags']}`) | {' | '.join(cells)} |")
        lines.append("")
        for c in mine:
            if c["server"] != BASE:
                said = [
                    f"{title} {verdict(c['against_one'][k], more_is_better=k == 'output_tok_s')}"
                    for k, title in FIGURES.items()
                ]
                lines.append(f"- {c['server']}: {', '.join(said)}.")
        lines.append("")
    lines += [
        "Two engines on one machine share its cores, its memory's bandwidth and its memory: what they gain is that neither phase "
        "waits for the other's step, and that Python runs twice. They bring no machine. What a second machine would bring is not "
        "measured here; `weft sim` computes it.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "roles.json")
    given = parser.parse_args()
    began, others = time.monotonic(), Others()
    children = os.times()
    with contextlib.ExitStack() as stack:
        ports = {
            name: stack.enter_context(served(bundled().folder, *COMMON, *flags)) for name, flags in SERVERS.items()
        }
        found = rounds(ports, given.rounds)
    after = os.times()
    seconds = time.monotonic() - began
    own = after.children_user + after.children_system - children.children_user - children.children_system
    result = {
        "benchmark": "two engines on one machine", "machine": machine(), "rounds": given.rounds, "seconds": seconds,
        "others": max(0.0, others.share() - own / seconds), "cases": cases(found),
    }  # fmt: skip
    write(given.out, result)
    given.out.with_suffix(".md").write_text(page(result), encoding="utf8")
    print(page(result))


if __name__ == "__main__":
    main()
