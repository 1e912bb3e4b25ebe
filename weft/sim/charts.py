"""Charts as inline SVG: lines over a quantity, and stacked bars.  No scripts, no fonts, nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 40
HUES = ("--s0", "--s1", "--s2", "--s3", "--s4", "--s5", "--s6", "--s7")
"""Variables of the page's style, one for each series."""
DECADES = 30.0
"""From such a ratio of the largest to the smallest value on, an axis is logarithmic."""
Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Points],
    *,
    across: str,
    up: str,
    markers: bool = True,
    log: bool = False,
    least: float = 0.0,
    limit: float | None = None,
) -> str:
    """A chart of lines.  log: the axis may be logarithmic.  least: the axis reaches so far at least.  limit: a dashed line."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if not xs:
        return ""
    top = max([*ys, least, *([limit] if limit is not None else [])]) or 1.0
    positive = [y for y in ys if y > 0]
    by_decade = log and bool(positive) and max(positive) / min(positive) > DECADES
    low = 10.0 ** math.floor(math.log10(min(positive))) if by_decade else 0.0
    ticks_y = decades(low, top) if by_decade else nice(0.0, top)
    high = max(top, ticks_y[-1])
    ticks_x = nice(min(0.0, *xs) if not markers else min(xs), max(xs))
    x0, x1 = (min(0.0, *xs), max(xs)) if not markers else (min(xs), max(xs))
    pad = 0.04 * (x1 - x0) if markers else 0.0
    x0, x1 = (x0 - pad, x1 + pad) if x1 > x0 else (x0 - 1, x1 + 1)

    def across_(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x0) / (x1 - x0)

    def up_(y: float) -> float:
        share = math.log(max(y, low) / low) / math.log(high / low) if by_decade else y / high
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    out = _frame(
        up, across, [(across_(t), number(t)) for t in ticks_x if x0 <= t <= x1], [(up_(t), number(t)) for t in ticks_y]
    )
    if limit is not None:
        out.append(
            f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up_(limit):.1f}" y2="{up_(limit):.1f}"/>'
        )
    for i, (name, points) in enumerate(series.items()):
        hue = f"var({HUES[i % len(HUES)]})"
        path = " ".join(f"{across_(x):.1f},{up_(y):.1f}" for x, y in points)
        out.append(f'<polyline class="line" style="stroke:{hue}" points="{path}"/>')
        for x, y in points if markers else ():
            told = escape(f"{name}: {number(y)} at {number(x)}")
            out.append(_mark(i, across_(x), up_(y), hue, told))
    return _svg(out, f"{up} by {across}")


def _mark(i: int, x: float, y: float, hue: str, told: str) -> str:
    """Series differ by shape as well as by colour."""
    title = f"<title>{told}</title>"
    if i % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" style="fill:{hue}">{title}</circle>'
    corners = {1: 4, 2: 3, 3: 5}[i % 4]
    turn = {1: math.pi / 4, 2: -math.pi / 2, 3: -math.pi / 2}[i % 4]
    at = [turn + 2 * math.pi * k / corners for k in range(corners)]
    path = " ".join(f"{x + 4.6 * math.cos(a):.1f},{y + 4.6 * math.sin(a):.1f}" for a in at)
    return f'<polygon points="{path}" style="fill:{hue}">{title}</polygon>'


def stacks(bars: Mapping[str, Mapping[str, float]], *, across: str) -> str:
    """Horizontal bars of shares that add up to one."""
    row, gap, left = 20, 8, 150
    height = len(bars) * (row + gap) + 30
    out = []
    for k, (name, shares) in enumerate(bars.items()):
        y, x = k * (row + gap) + 4, float(left)
        short = name if len(name) <= 24 else name[:23] + "…"
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(short)}</text>')
        for i, (part, share) in enumerate(shares.items()):
            width = share * (WIDTH - left - RIGHT)
            if width > 0:
                told = escape(f"{name}, {part}: {100 * share:.1f} %")
                out.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{row}" style="fill:var({HUES[i % len(HUES)]})">'
                    f"<title>{told}</title></rect>"
                )
                if width > 34:
                    out.append(
                        f'<text class="inside" x="{x + width / 2:.1f}" y="{y + 14}" text-anchor="middle">'
                        f"{100 * share:.0f} %</text>"
                    )
            x += width
    out.append(
        f'<text class="label" x="{(left + WIDTH - RIGHT) / 2}" y="{height - 6}" text-anchor="middle">{escape(across)}</text>'
    )
    return _svg(out, across, height)


def _frame(up: str, across: str, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]]) -> list[str]:
    out = []
    for y, text in ys:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x, text in xs:
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    out.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text>'
    )
    return out


def _svg(inside: Sequence[str], label: str, height: float = HEIGHT) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
    return head + "".join(inside) + "</svg>"


def nice(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= raw)
    first, last = math.ceil(low / step - 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten that span [low, high]."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(max(high, low * 10)) - 1e-9)
    return [10.0**k for k in range(first, last + 1)]


def number(x: float) -> str:
    """A number for an axis: 0, 0.05, 2.5, 400, 12k, 3M."""
    size = abs(x)
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if size >= 10 * scale or (size >= scale and unit == "M"):
            return f"{x / scale:.3g}{unit}"
    return f"{x:.3g}" if size < 1000 else f"{x:,.0f}"
