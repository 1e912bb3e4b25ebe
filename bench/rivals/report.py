"""A run's record as a page and as a chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

WIDTH, LABEL, BAR, LINE, PAD = 980, 300, 440, 18, 16
COLORS = {"weft": "#0b7285", "llama.cpp": "#c2641a", "openvino": "#6a51a3", "vllm": "#4d7a2a"}
OTHER_COLOR = "#777777"


def key(row: Mapping[str, Any]) -> tuple[str, str, int, int]:
    """What rows of one table share."""
    return row["shape"], row["format"], row["batch"], row["prompt"]


def markdown(record: Mapping[str, Any]) -> str:
    """The whole record, tables by shape and format, rows by batch."""
    lines = ["# weft beside other engines", "", *_head(record), ""]
    for (shape, format), rows in groupby(record["rows"], key=lambda row: (row["shape"], row["format"])):
        lines += [f"## {shape}, {format}", "", *_table(list(rows)), ""]
    if record["faults"]:
        lines += ["## Void: these rows can't be right", "", *[f"- {text}" for text in record["faults"]], ""]
    if record["flags"]:
        lines += ["## Slower than elsewhere", "", *[f"- {text}" for text in record["flags"]], ""]
    if record["missing"]:
        lines += ["## Not measured", ""]
        lines += [f"- {one['engine']} ({one['where']}): {_plain(one['reason'])}" for one in record["missing"]]
        lines += [""]
    lines += ["## How the engines were set", ""]
    for one in record["engines"]:
        settings = ", ".join(f"{name} {_plain(value)}" for name, value in one.items() if name not in HEADS)
        lines += [f"- {one['engine']} {one['version']}, {one['kind']}, {one['shape']}: {settings}"]
    return "\n".join(lines) + "\n"


HEADS = ("engine", "version", "kind", "shape")


def _head(record: Mapping[str, Any]) -> list[str]:
    machine, gb_s = record["machine"], record["read_gb_s"]
    reading = f" The machine read {min(gb_s):.1f} to {max(gb_s):.1f} GB/s meanwhile." if gb_s else ""
    took = ""
    if "seconds" in record:  # records of before do not tell
        installing = f"{record['install_seconds']:.0f} s of them for installing engines"
        took = f" The run took {record['seconds']:.0f} s, {installing}."
    return [
        f"{record['date']}, {machine['cpu']}, {record['threads']} threads; medians of {record['rounds']} rounds in turns; "
        f"the same random weights and prompts for all, greedy.{reading}{took}",
        "",
        f"    {record['command']}",
        "",
        "`ratio` is to the fastest rival with weights of as many bits, and `of limit` the share of what reading the weights and "
        "the cache must take at least; `same` is the share of first tokens that are those of weft.",
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| batch | prompt | engine | weights | bytes per weight, body / head | decode tok/s | ratio | of limit | prefill tok/s "
        "| ratio | same |",
        "|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (row["prompt"], row["batch"])):
        lines.append(
            f"| {row['batch']} | {row['prompt']} | {row['engine']} | {_plain(row['kind'])} "
            f"| {row['bytes_per_weight_body']:.2f} / {row['bytes_per_weight_head']:.2f} | {row['decode_tok_s']:,.1f} "
            f"| {_ratio(row['ratio'])} | {row['fraction']:.2f} | {row['prefill_tok_s']:,.0f} | {_ratio(row['prefill_ratio'])} "
            f"| {'' if row['same_first'] is None else format(row['same_first'], '.0%')} |"
        )
    return lines


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _plain(value: Any) -> str:
    """Text that can't break a line of a list or a table."""
    return " ".join(str(value).replace("|", "/").split())


# ---------------------------------------------------------------------------------------------- the chart


def svg(record: Mapping[str, Any]) -> str:
    """Decode speed as bars: a block for each shape, format and batch, a bar for each engine."""
    parts, y = list[str](), PAD + LINE
    text = f"Decoding, tokens per second: {record['machine']['cpu']}, {record['threads']} threads, {record['date']}"
    parts.append(_text(PAD, y, text, size=15, weight="bold"))
    blocks = [list(rows) for _, rows in groupby(sorted(record["rows"], key=key), key=key)]
    for rows in blocks:
        y += 2 * LINE
        first = rows[0]
        title = f"{first['shape']}, {first['format']}, batch {first['batch']}, prompt {first['prompt']}"
        parts.append(_text(PAD, y, title, weight="bold"))
        most = max([row["decode_tok_s"] for row in rows] + [_limit(row) for row in rows])
        for row in rows:
            y += LINE
            parts += _bar(row, y, most)
    if not blocks:
        y += 2 * LINE
        parts.append(_text(PAD, y, "nothing was measured"))
    y += 2 * LINE
    parts.append(
        _text(PAD, y, "The thin line is the speed of an engine that does nothing but read its weights and cache.")
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + PAD}" viewBox="0 0 {WIDTH} {y + PAD}" '
        'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y + PAD}" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def _limit(row: Mapping[str, Any]) -> float:
    return float(row["decode_tok_s"] / row["fraction"]) if row["fraction"] else 0.0


def _bar(row: Mapping[str, Any], y: int, most: float) -> Iterator[str]:
    left = PAD + LABEL
    width = BAR * row["decode_tok_s"] / most if most else 0.0
    color = COLORS.get(row["engine"], OTHER_COLOR)
    yield _text(left - 8, y, f"{row['engine']} {row['version']}, {row['kind']}", anchor="end")
    yield f'<rect x="{left}" y="{y - 11}" width="{width:.1f}" height="13" fill="{color}"/>'
    limit = left + (BAR * _limit(row) / most if most else 0.0)
    yield f'<line x1="{limit:.1f}" y1="{y - 13}" x2="{limit:.1f}" y2="{y + 4}" stroke="#333333"/>'
    ratio = "" if row["ratio"] is None or row["engine"] != "weft" else f"  ({row['ratio']:.2f} of the best rival)"
    yield _text(left + BAR + 8, y, f"{row['decode_tok_s']:,.1f}{ratio}")


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'
