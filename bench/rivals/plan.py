"""What is asked for: engines, shapes, formats and batches, from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.bench.decode import find_shape
from weft.errors import ConfigError
from weft.exec.host import cpu_count, parse_size

ROOT = Path(__file__).resolve().parents[2]
RIVALS = Path(__file__).with_name("rivals.json")
FORMATS = ("bf16", "int8", "int4")
OWN: dict[str, tuple[str, ...]] = {"bf16": ("bf16",), "int8": ("int8", "int8-float"), "int4": ("int4", "int4-float")}
"""weft's ways to compute with weights of so many bits."""
SETTLE_S = 0.3
"""Between two engines' turns: threads that wait by spinning have given up by then."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One load: `batch` sequences of `prompt` tokens that get `new` tokens each."""

    batch: int
    prompt: int
    new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """only: the rivals to measure.  shapes: name and file.  memory_bytes: that each engine may allocate at most."""

    only: Sequence[str]
    shapes: Sequence[tuple[str, Path]]
    formats: Sequence[str]
    cells: Sequence[Cell]
    rounds: int
    threads: int
    cores: Sequence[int]
    memory_bytes: int
    cache: Path
    out: Path
    pip_args: Sequence[str] = ()

    @property
    def length(self) -> int:
        """Positions of the longest sequence."""
        return max(cell.prompt + cell.new for cell in self.cells)

    @property
    def batch(self) -> int:
        return max(cell.batch for cell in self.cells)


def rivals() -> dict[str, Any]:
    """How each rival is installed and run, by name."""
    found: dict[str, Any] = json.loads(RIVALS.read_text(encoding="utf8"))
    return found


def parse(argv: Sequence[str] | None = None) -> Plan:
    """The plan that a command line asks for.  Raises ConfigError."""
    known = list(rivals())
    parser = argparse.ArgumentParser(
        prog="python -m bench.rivals", description="Measure weft beside other engines, in turns on the same cores."
    )
    parser.add_argument("--only", default=",".join(known), help=f"rivals: {', '.join(known)}, or none (all)")
    parser.add_argument("--shapes", default="qwen2.5-0.5b,llama-3.2-1b", help="names in bench/shapes, or config.json")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of weights: bf16, int8, int4 (all)")
    parser.add_argument("--batch", default="1,4,16,32", help="sequences at once (1,4,16,32)")
    parser.add_argument("--prompt", default=128, type=int, help="tokens of each prompt (128)")
    parser.add_argument("--new", default=64, type=int, help="tokens of each answer (64)")
    parser.add_argument("--long", default=512, type=int, help="tokens of one prompt that prefill is timed on too (512)")
    parser.add_argument("--rounds", default=3, type=int, help="turns that medians are over (3)")
    parser.add_argument("--threads", type=int, help="threads and cores of each engine (as many as there are)")
    parser.add_argument("--memory", default="12G", help="what each engine may allocate at most (12G)")
    parser.add_argument("--cache", default=ROOT / ".cache" / "rivals", type=Path, help="environments and weights")
    parser.add_argument("--out", default=ROOT / "bench" / "results", type=Path, help="folder of rivals.json, .md, .svg")
    parser.add_argument("--pip-args", default="", help="more arguments of pip install, as --extra-index-url=URL")
    flags = parser.parse_args(argv)
    for name, least in (("prompt", 1), ("new", 2), ("rounds", 1), ("long", 0)):
        if getattr(flags, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(flags, name)}")
    batches = _numbers(flags.batch)
    cells = [Cell(batch, flags.prompt, flags.new) for batch in batches]
    if flags.long and flags.long != flags.prompt:
        cells.append(Cell(1, flags.long, min(flags.new, 8)))
    available = cpu_count().threads
    threads = flags.threads or available
    if not 1 <= threads <= available:
        raise ConfigError(f"--threads must be from 1 to {available} here, got {threads}")
    return Plan(
        only=_names("--only", flags.only, known), shapes=[_shape(name) for name in _parts(flags.shapes)],
        formats=_names("--formats", flags.formats, FORMATS), cells=cells, rounds=flags.rounds, threads=threads,
        cores=_cores(threads), memory_bytes=parse_size(flags.memory), cache=flags.cache.resolve(), out=flags.out,
        pip_args=flags.pip_args.split(),
    )  # fmt: skip


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    wanted = [] if text == "none" else _parts(text)
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"{flag} takes {', '.join(known)}, with commas between them; got {', '.join(unknown)}")
    return wanted


def _numbers(text: str) -> list[int]:
    parts = _parts(text)
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise ConfigError(f"--batch takes numbers from 1 to 1024 with commas between them, e.g. 1,4,16; got {text!r}")
    return [int(part) for part in parts]


def _shape(name: str) -> tuple[str, Path]:
    path = find_shape(name)
    return path.stem if path.stem != "config" else path.resolve().parent.name, path


def _cores(threads: int) -> list[int]:
    """The first cores that this process may use; empty where the system does not say."""
    import os

    return sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else []
