"""From turns to rows: medians, ratios to the best rival, and the share of what the machine could read at most."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.rivals.measure import Contender, Group, ratios
from bench.rivals.plan import Cell
from bench.rivals.processor import cpuinfo
from weft.bench.limit import experts_hit
from weft.models.spec import DecoderSpec

ELSEWHERE = Path(__file__).with_name("elsewhere.json")
SLACK = 0.9
"""A rival below this share of its figure elsewhere is flagged."""


def rows_of(group: Group) -> Iterator[dict[str, Any]]:
    """A row for each engine and load, as bench/README.md describes them."""
    cells = list(dict.fromkeys(cell for contender in group.contenders for cell in contender.turns))
    for cell in cells:
        here = [contender for contender in group.contenders if contender.turns.get(cell)]
        rivals = [contender for contender in here if contender.engine != "weft"]
        reference = next((contender for contender in here if contender.engine == "weft"), None)
        fastest = min(rivals, key=lambda c: median(_steps(c, cell)), default=None)
        readiest = min(rivals, key=lambda c: median(_prefills(c, cell)), default=None)
        for contender in here:
            yield _row(group, cell, contender, fastest, readiest, reference)


def _row(
    group: Group,
    cell: Cell,
    contender: Contender,
    fastest: Contender | None,
    readiest: Contender | None,
    reference: Contender | None,
) -> dict[str, Any]:
    turns, loaded = contender.turns[cell], contender.loaded
    read = bytes_per_step(loaded, group.spec, cell)
    speeds = [cell.batch / turn.step_s for turn in turns]
    body = {key: loaded["body"][key] + loaded["experts"][key] for key in ("bytes", "weights")}
    return {
        "shape": group.shape,
        "engine": contender.engine,
        "version": loaded["version"],
        "format": group.format,
        "kind": loaded["kind"],
        "bytes_per_weight_body": body["bytes"] / body["weights"],
        "bytes_per_weight_head": loaded["head"]["bytes"] / loaded["head"]["weights"],
        "batch": cell.batch,
        "prompt": cell.prompt,
        "new": cell.new,
        "decode_tok_s": median(speeds),
        "decode_spread": [min(speeds), max(speeds)],
        "prefill_tok_s": cell.batch * cell.prompt / median(turn.prefill_s for turn in turns),
        "ratio": None if fastest is None else ratios(_steps(contender, cell), _steps(fastest, cell)),
        "prefill_ratio": None if readiest is None else ratios(_prefills(contender, cell), _prefills(readiest, cell)),
        "bytes_per_step": read,
        "read_gb_s": median(turn.read_gb_s for turn in turns),
        "fraction": median(read / turn.step_s / (turn.read_gb_s * 1e9) for turn in turns),
        "same_first": None if reference is None else _same(contender, reference, cell),
    }


def _steps(contender: Contender, cell: Cell) -> list[float]:
    return [turn.step_s for turn in contender.turns[cell]]


def _prefills(contender: Contender, cell: Cell) -> list[float]:
    return [turn.prefill_s for turn in contender.turns[cell]]


def _same(one: Contender, other: Contender, cell: Cell) -> float:
    pairs = zip(one.turns[cell], other.turns[cell], strict=False)
    found = [a == b for mine, theirs in pairs for a, b in zip(mine.first, theirs.first, strict=True)]
    return sum(found) / len(found)


def bytes_per_step(loaded: Mapping[str, Any], spec: DecoderSpec, cell: Cell) -> int:
    """Bytes that a decode step half way through the answers must read, of the tensors as the engine says it stores them."""
    experts = next((layer.experts for layer in spec.layers if layer.experts is not None), None)
    share = 0.0 if experts is None else experts_hit(experts.num, experts.top_k, cell.batch) / experts.num
    weights = loaded["body"]["bytes"] + loaded["head"]["bytes"] + share * loaded["experts"]["bytes"]
    return round(weights + cell.batch * (cell.prompt + cell.new // 2) * loaded["kv_bytes"])


# ---------------------------------------------------------------------------------------------- what is wrong with them


def faults(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rows that say more than the machine can do: something was counted or timed wrongly, and the run is void."""
    return [
        f"{said(row)}: {row['fraction']:.2f} of what the machine reads, which can't be"
        for row in rows
        if row["fraction"] > 1.0
    ]


def suspicions(rows: Iterable[Mapping[str, Any]], elsewhere: Mapping[str, Any]) -> list[str]:
    """Rivals that are slower than on another machine by more than the memory of this one explains.

    How many tokens are new is not looked at: a step hardly depends on it.
    """
    found = []
    for row in rows:
        figures = elsewhere["figures"].get(row["shape"], {}).get(row["engine"], {}).get(row["format"], {})
        same_load = row["prompt"] == elsewhere["prompt"]
        there = figures.get("decode", {}).get(str(row["batch"])) if same_load else None
        slower_memory = row["read_gb_s"] < SLACK * elsewhere["read_gb_s"]
        if there is not None and row["decode_tok_s"] < SLACK * there and not slower_memory:
            found.append(
                f"{said(row)}: {row['decode_tok_s']:.1f} tokens/s, and {there:g} on another machine whose memory reads "
                f"{elsewhere['read_gb_s']:g} GB/s ({row['read_gb_s']:.1f} here); is it at its best?"
            )
    return found


def is_alike(elsewhere: Mapping[str, Any], threads: int) -> bool:
    """Whether this run has the processor and the threads of those figures, so that nothing excuses a slower rival."""
    here = cpuinfo()
    alike = all(here.get(name) == value for name, value in elsewhere["processor"].items())
    return alike and threads == elsewhere["threads"]


def said(row: Mapping[str, Any]) -> str:
    """Which row it is."""
    return f"{row['engine']} {row['kind']} on {row['shape']}, batch {row['batch']}, prompt {row['prompt']}"


def other_machine(path: Path = ELSEWHERE) -> dict[str, Any]:
    """Figures of the same engines on another machine."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return found


def missing_of(groups: Sequence[Group], absent: Mapping[str, str]) -> list[dict[str, str]]:
    """Who was not measured, where, and why."""
    found = [{"engine": name, "where": "everywhere", "reason": reason} for name, reason in absent.items()]
    for group in groups:
        where = f"{group.shape}, {group.format}"
        found += [{"engine": name, "where": where, "reason": reason} for name, reason in group.missing]
    return found


def engines_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each engine as it was measured: version, and how it was built and set."""
    found = []
    for group in groups:
        for contender in group.contenders:
            one = {"engine": contender.engine, "version": contender.loaded["version"], "shape": group.shape}
            found.append({**one, "kind": contender.loaded["kind"], **contender.loaded["info"]})
    return found
