"""ServeGen's clients (Xiang et al., arXiv:2505.09999): rates, bursts and lengths of one client over time.

`chunk-N-trace.csv` has a line for each window: start [s], requests a second, coefficient of variation, the law of the time
between two requests (Gamma or Weibull) and its shape and scale; `chunk-N-dataset.json` the laws of lengths, by the second from
which they hold, each as text {tokens: probability}.  A client is a tenant.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.sim.workload import MAX_TOKENS, UNIQUE, Arrival

NAME = re.compile(r"chunk-(\d{1,9})-trace\.csv")
ENTRY = re.compile(r"\s*(\d{1,12}(?:\.0)?)\s*:\s*([0-9.eE+-]{1,40})\s*")
MAX_BYTES = 64 << 20
WINDOWS = 1_000_000
INPUTS = (("input_tokens", None), ("text_tokens", None), ("image_tokens", "image_count"), ("audio_tokens", "audio_count"),
          ("video_tokens", "video_count"))  # fmt: skip
"""What an input is made of: tokens, and how many such items there are."""
Law = tuple[list[int], list[float]]
"""(values, cumulative weights)"""


def is_client(file: Path) -> bool:
    return NAME.fullmatch(file.name) is not None


def client(file: Path, seed: int, number: int) -> Iterator[Arrival]:
    """The requests of one client."""
    match = NAME.fullmatch(file.name)
    assert match is not None
    data = file.with_name(f"chunk-{match[1]}-dataset.json")
    laws = _laws(data)
    tenant = f"client{match[1]}"
    chance = random.Random(f"servegen {seed} {tenant} {file.parent.name}")
    base, count = UNIQUE * (2 + number), itertools.count()
    starts = sorted(laws)
    for start, stop, law, shape, scale in _windows(file):
        lengths = laws[starts[max(0, bisect_right(starts, start) - 1)]]
        now = start
        while True:
            now += chance.gammavariate(shape, scale) if law == "Gamma" else chance.weibullvariate(scale, shape)
            if now >= stop:
                break
            prompt = sum(
                _draw(chance, law_) * (1 if many is None else _draw(chance, many)) for law_, many in lengths[0]
            )
            output = _draw(chance, lengths[1])
            yield Arrival(
                now, ((base + next(count), min(MAX_TOKENS, max(1, prompt))),), min(MAX_TOKENS, max(1, output)), tenant
            )


def _windows(file: Path) -> Iterator[tuple[float, float, str, float, float]]:
    """(start, stop, law, shape, scale) of windows in which somebody asks."""
    found: list[tuple[float, str, float, float]] = []
    try:
        with file.open(newline="", encoding="utf8") as lines:
            for number, row in enumerate(csv.reader(lines), 1):
                if number > WINDOWS:
                    raise ConfigError(f"{file}: more than {WINDOWS} windows")
                try:
                    start, rate, law = float(row[0]), float(row[1]), row[3] if len(row) > 3 else ""
                    idle = not rate > 0 or law not in ("Gamma", "Weibull")
                    shape, scale = (0.0, 0.0) if idle else (float(row[4]), float(row[5]))
                except (ValueError, IndexError):
                    raise ConfigError(f"{file}:{number}: start,rate,cv,law,shape,scale are wanted, got {row}") from None
                if law not in ("Gamma", "Weibull") and rate > 0:
                    shape, scale, law = 1.0, 1.0 / rate, "Gamma"  # too few requests for a law: by chance
                fine = rate <= 0 or (0 < shape < math.inf and 0 < scale < math.inf and shape * scale > 1e-9)
                if not (math.isfinite(start) and math.isfinite(rate) and fine):
                    raise ConfigError(f"{file}:{number}: a rate, shape or scale is out of range: {row}")
                if found and start <= found[-1][0]:
                    raise ConfigError(f"{file}:{number}: windows must ascend in time")
                found.append((start, law if rate > 0 else "", shape, scale))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    width = min((b[0] - a[0] for a, b in itertools.pairwise(found)), default=600.0)
    for start, law, shape, scale in found:
        if law:
            yield start, start + width, law, shape, scale


def _laws(file: Path) -> dict[float, tuple[list[tuple[Law, Law | None]], Law]]:
    """By the second from which they hold: (laws of the parts of an input, law of the output)."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{file} has more than {MAX_BYTES} bytes")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; a client's lengths stand beside its trace") from None
    laws: dict[float, tuple[list[tuple[Law, Law | None]], Law]] = {}
    for key, each in found.items() if isinstance(found, Mapping) else ():
        if not isinstance(each, Mapping):
            raise ConfigError(f"{file}: {key}: an object with laws of lengths is wanted")
        inputs = [(_law(file, each[t]), _law(file, each[n]) if n else None) for t, n in INPUTS if t in each]
        output = _law(file, each.get("output_tokens", "{}"))
        if output[0] and inputs and inputs[0][0][0]:
            try:
                laws[float(key)] = [(a, b) for a, b in inputs if a[0] and (b is None or b[0])], output
            except ValueError:
                raise ConfigError(f"{file}: {key!r} is no second") from None
    if not laws:
        raise ConfigError(f"{file}: no window has a law of lengths")
    return laws


def _law(file: Path, text: Any) -> Law:
    if not isinstance(text, str) or not (text.startswith("{") and text.endswith("}")):
        raise ConfigError(f"{file}: a law is written as text {{tokens: probability, ...}}, got {str(text)[:80]}")
    values, weights, total = list[int](), list[float](), 0.0
    for part in text[1:-1].split(",") if text != "{}" else ():
        match = ENTRY.fullmatch(part)
        try:
            weight = float(match[2]) if match else math.nan
        except ValueError:
            weight = math.nan
        if match is None or not 0 <= weight < math.inf:
            raise ConfigError(f"{file}: {part[:80]!r} is no tokens: probability")
        total += weight
        values.append(int(float(match[1])))
        weights.append(total)
    if values and not total > 0:
        raise ConfigError(f"{file}: the probabilities of a law add up to nothing")
    return values, weights


def _draw(chance: random.Random, law: Law) -> int:
    values, weights = law
    return values[min(bisect_right(weights, chance.random() * weights[-1]), len(values) - 1)]
