"""Readers of traces.  A file's form is told by its contents; whatever is wrong with it is said with file and line.

    azure     CSV: TIMESTAMP,ContextTokens,GeneratedTokens                        (Azure LLM inference traces)
    vidur     CSV: arrived_at,num_prefill_tokens,num_decode_tokens                (Vidur)
    mooncake  JSON lines: timestamp [ms], input_length, output_length, hash_ids   (Mooncake; blocks of 512 tokens)
    measured  JSON lines: arrival_time [s], input_toks, output_toks               (LLMServingSim's measured engines)
    agent     JSON lines: timestamp [us], input, output, session_id               (LMCache; real text)
    servegen  a client's chunk-N-trace.csv beside its chunk-N-dataset.json        (ServeGen; rates, bursts and lengths)

A folder is all its files of one form together.  Lines are read one by one, in the order of time.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.sim.servegen import client, is_client
from weft.sim.workload import MAX_TOKENS, UNIQUE, Arrival, synthetic

Encode = Callable[[str], list[int]]
MAX_LINE = 16 << 20
MAX_FILES = 4096
BLOCK = 512
"""Tokens of one of Mooncake's blocks."""
LATE_S = 60.0
"""So far a line may stand behind those with later times; agents write down what ended, not what began."""


def trace(text: str, *, seed: int = 0, encode: Encode | None = None) -> Iterator[Arrival]:
    """The arrivals of a trace file, a folder of them, or a synthetic load, from time 0 on.  encode: for traces of text.

    Raises ConfigError, at once where the file is of no known form, and while reading where a line is wrong.
    """
    made = synthetic(text)
    if made is not None:
        return made.arrivals(seed)
    path = Path(text).expanduser()
    if not path.exists():
        raise ConfigError(
            f"there is no trace {text!r}; give a file, a folder, or a load such as 'poisson(rate=4, requests=1000)'"
        )
    files = _files(path) if path.is_dir() else [path]
    each = [_reader(file, seed, encode, i) for i, file in enumerate(files)]
    return _from_zero(each[0] if len(each) == 1 else heapq.merge(*each, key=lambda a: a.time_s))


def _files(folder: Path) -> list[Path]:
    inside = sorted(f for f in folder.iterdir() if f.is_file())
    clients = [f for f in inside if is_client(f)]
    files = clients or [f for f in inside if f.suffix in (".csv", ".jsonl") and f.stat().st_size]  # empty: nobody asked
    if not files:
        raise ConfigError(f"{folder} holds no trace: no .csv, .jsonl or chunk-N-trace.csv")
    if len(files) > MAX_FILES:
        raise ConfigError(f"{folder} holds {len(files)} files, at most {MAX_FILES} are read together")
    return files


def _reader(file: Path, seed: int, encode: Encode | None, number: int) -> Iterator[Arrival]:
    if is_client(file):
        return client(file, seed, number)
    try:
        with file.open("rb") as data:
            if data.read(2) == b"\x1f\x8b":
                raise ConfigError(f"{file} is packed with gzip; unpack it first, as in: gunzip -k {file}")
        with file.open(encoding="utf8") as lines:
            first = lines.readline(MAX_LINE)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as text: {error}") from None
    if first.startswith("{"):
        return _in_order(file, _json_lines(file, encode))
    head = [cell.strip() for cell in first.strip().split(",")]
    for columns, time in CSV_FORMS:
        if head == list(columns):
            return _in_order(file, _csv(file, columns, time))
    raise ConfigError(
        f"{file}: neither JSON lines nor a CSV file with a known head ({' or '.join(','.join(c) for c, _ in CSV_FORMS)}); it "
        f"begins with {first[:80]!r}"
    )


# ---------------------------------------------------------------------- CSV


def _stamp(text: str) -> float:
    head, _, fraction = text.partition(".")
    return datetime.fromisoformat(head + "+00:00").timestamp() + (float("0." + fraction) if fraction else 0.0)


CSV_FORMS: tuple[tuple[tuple[str, str, str], Callable[[str], float]], ...] = (
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _stamp),
    (("arrived_at", "num_prefill_tokens", "num_decode_tokens"), float),
)


def _csv(file: Path, columns: tuple[str, str, str], time: Callable[[str], float]) -> Iterator[tuple[int, Arrival]]:
    with file.open(newline="", encoding="utf8") as lines:
        rows = csv.reader(_short(file, lines))
        try:
            next(rows)
            for number, row in enumerate(rows, 2):
                if not row:
                    continue
                if len(row) != len(columns):
                    raise ConfigError(f"{file}:{number}: {len(columns)} cells are wanted, there are {len(row)}")
                try:
                    at, prompt, output = time(row[0]), int(row[1]), int(row[2])
                except ValueError:
                    raise ConfigError(f"{file}:{number}: {', '.join(columns)} cannot be read from {row}") from None
                yield number, _plain(file, number, at, prompt, output)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from None


def _short(file: Path, lines: Any) -> Iterator[str]:
    number = 0
    while line := lines.readline(MAX_LINE):
        number += 1
        if len(line) >= MAX_LINE:
            raise ConfigError(f"{file}:{number}: the line is longer than {MAX_LINE} characters")
        yield line


def _plain(file: Path, number: int, at: float, prompt: int, output: int) -> Arrival:
    _check(file, number, at, prompt, output)
    return Arrival(at, ((UNIQUE + (hash_of(file) << 24) + number, max(1, prompt)),), max(1, output))


def hash_of(file: Path) -> int:
    """A number of a few bits that tells the files of a folder apart, the same in every run."""
    return sum((i + 1) * ord(c) for i, c in enumerate(file.name)) % (1 << 14)


def _check(file: Path, number: int, at: float, prompt: int, output: int) -> None:
    if not math.isfinite(at):
        raise ConfigError(f"{file}:{number}: the time {at} is not finite")
    for name, value in (("prompt", prompt), ("answer", output)):
        if not 0 <= value <= MAX_TOKENS:
            raise ConfigError(f"{file}:{number}: the {name} has {value} tokens; from 0 to {MAX_TOKENS} are possible")


# ---------------------------------------------------------------------- JSON lines


def _json_lines(file: Path, encode: Encode | None) -> Iterator[tuple[int, Arrival]]:
    with file.open(encoding="utf8") as lines:
        try:
            for number, line in enumerate(_short(file, lines), 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    raise ConfigError(f"{file}:{number}: no JSON object: {line[:80]!r}") from None
                if not isinstance(found, dict):
                    raise ConfigError(f"{file}:{number}: no JSON object: {line[:80]!r}")
                yield number, _arrival(file, number, found, encode)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} cannot be read as text: {error}") from None


def _arrival(file: Path, number: int, found: Mapping[str, Any], encode: Encode | None) -> Arrival:
    if "hash_ids" in found:
        return _mooncake(file, number, found)
    if "input_toks" in found:
        at, prompt, output = (_value(file, number, found, k) for k in ("arrival_time", "input_toks", "output_toks"))
        return _plain(file, number, at, int(prompt), int(output))
    if isinstance(found.get("input"), str) and isinstance(found.get("output"), str):
        if encode is None:
            raise ConfigError(f"{file} holds text, which needs a tokenizer")
        at = _value(file, number, found, "timestamp") / 1e6
        prompt_ids, output = tuple(encode(found["input"])), len(encode(found["output"]))
        _check(file, number, at, len(prompt_ids), output)
        return Arrival(at, () if prompt_ids else ((0, 1),), max(1, output), text=prompt_ids)
    raise ConfigError(
        f"{file}:{number}: a request has hash_ids, input_length and output_length (Mooncake), input_toks and output_toks, or "
        f"input and output as text; this one has {', '.join(map(str, found))[:200]}"
    )


def _mooncake(file: Path, number: int, found: Mapping[str, Any]) -> Arrival:
    at, prompt, output = (_value(file, number, found, k) for k in ("timestamp", "input_length", "output_length"))
    _check(file, number, at, int(prompt), int(output))
    ids, size = found["hash_ids"], int(prompt)
    whole = isinstance(ids, list) and all(type(h) is int and 0 <= h < UNIQUE - 1 for h in ids)
    if not whole or len(ids) != -(-size // BLOCK):
        raise ConfigError(
            f"{file}:{number}: hash_ids must be {-(-size // BLOCK)} whole numbers, one for each {BLOCK} of {size} tokens"
        )
    sizes = [BLOCK] * (size // BLOCK) + ([size % BLOCK] if size % BLOCK else [])
    segments = tuple((h + 1, n) for h, n in zip(ids, sizes, strict=True)) or ((UNIQUE + number, 1),)
    return Arrival(at / 1e3, segments, max(1, int(output)))


def _value(file: Path, number: int, found: Mapping[str, Any], key: str) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{file}:{number}: {key} must be a number, got {str(value)[:80]}")
    return float(value)


# ---------------------------------------------------------------------- time


def _in_order(file: Path, numbered: Iterator[tuple[int, Arrival]]) -> Iterator[Arrival]:
    """Sorted by time, where no line stands more than LATE_S behind a later one."""
    held: list[tuple[float, int, Arrival]] = []
    newest = told = -math.inf
    for number, a in numbered:
        if a.time_s < told:
            raise ConfigError(f"{file}:{number}: the time goes back by more than {LATE_S:.0f} s; sort the file by time")
        heapq.heappush(held, (a.time_s, number, a))
        newest = max(newest, a.time_s)
        while held and held[0][0] <= newest - LATE_S:
            told = held[0][0]
            yield heapq.heappop(held)[2]
    while held:
        yield heapq.heappop(held)[2]


def _from_zero(arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    first: float | None = None
    for a in arrivals:
        if first is None:
            first = a.time_s
        yield Arrival(a.time_s - first, a.segments, a.output, a.tenant, a.priority, a.text)
