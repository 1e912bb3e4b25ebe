"""Replay: an engine made of the same and told the same as a recorded one, whose decisions are held against the record.

Times and facts come from the record; what is compared are the plans, the preemptions that are told, and who is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.errors import ConfigError, EngineError
from weft.types import Abandoned, Added, Cancelled, Committed, Ended, Entry, Made, Plan, Planned, Preempted, Rejected
from weft.types.record import FORMAT

MAX_ENTRY = 256 << 20


@dataclass(slots=True)
class Replayed:
    """What a record holds, and the first difference, or None.

    chunks: works that end inside a prompt.  hits: requests that entered with entries from the prefix index.
    refusals: at once, or later because they could not be in time any more.
    """

    steps: int = 0
    requests: int = 0
    preemptions: int = 0
    evictions: int = 0
    hits: int = 0
    chunks: int = 0
    cancellations: int = 0
    refusals: int = 0
    difference: str | None = None
    at: int = field(default=0)
    """The entry of the difference, or the last one."""
    cut: str | None = None
    """Where the record breaks off, in words; None of one that is whole, or was read up to a difference only."""

    def as_dict(self) -> dict[str, Any]:
        return {"identical": self.difference is None and self.cut is None, **asdict(self)}


class Entries:
    """(number, entry) of a record, up to the one that ends it or to where it is cut.  Raises ConfigError, while it is read, too.

    cut: what is missing of it, in words, once everything was read; None of a record that is whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut: str | None = None
        self._decode = msgspec.msgpack.Decoder(Entry).decode
        self._lines = self._read()

    def __iter__(self) -> Iterator[tuple[int, Entry]]:
        return self._lines

    def _read(self) -> Iterator[tuple[int, Entry]]:
        number = at = whole = 0
        try:
            with self.path.open("rb") as file:
                while head := file.read(4):
                    number += 1
                    size = int.from_bytes(head, "little")
                    if len(head) == 4 and size > MAX_ENTRY:
                        raise ConfigError(f"{self.path}: entry {number} would have {size} bytes; this is no record")
                    if len(head) < 4 or len(data := file.read(size + 4)) < size + 4:
                        self.cut = f"entry {number}, which begins at byte {at:,}, is not there as a whole"
                        return
                    whole = zlib.crc32(data[:size], zlib.crc32(head, whole))
                    entry = self._entry(number, at, data[:size], whole == int.from_bytes(data[size:], "little"))
                    if isinstance(entry, Ended):
                        if file.read(1):
                            raise ConfigError(
                                f"{self.path}: something stands behind entry {number}, which ends the record"
                            )
                        return
                    yield number, entry
                    at += 8 + size
        except OSError as error:
            raise ConfigError(f"the record {self.path} cannot be read: {error}") from None
        self.cut = f"it breaks off behind entry {number}, at byte {at:,}, and does not say that it ends there"

    def _entry(self, number: int, at: int, data: bytes, right: bool) -> Entry:
        """right: whether the checksum is.  The first entry is read in any case: it says its format, and old ones have no sums."""
        try:
            entry: Entry | None = self._decode(data) if right or number == 1 else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{self.path}: entry {number} is none of a record: {error}") from None
        if isinstance(entry, Made) and entry.format != FORMAT:
            raise ConfigError(
                f"{self.path}: the record has format {entry.format}, and this weft reads {FORMAT}; record anew with it, or "
                "replay it with the weft that wrote it"
            )
        if entry is None or not right:
            raise ConfigError(
                f"{self.path}: entry {number}, which begins at byte {at:,}, is not what was written: its checksum is another "
                "one. The file was changed, or something of it was lost, there or before; nothing can be said of its decisions"
            )
        return entry


def engine_of(made: Made) -> Engine:
    """An engine made as a recorded one.  Raises ConfigError."""
    try:
        limits = Limits(**made.limits)
    except TypeError as error:
        raise ConfigError(f"the record's limits are not this weft's: {error}") from None
    return Engine(
        made.groups, made.blocks, limits, build_stack(made.parts), models=made.models, layers=made.layers, vocab=made.vocab,
        share=made.share, settings=made.settings, in_flight=made.in_flight, reach=made.reach, block_bytes=made.block_bytes,
        control=made.control,
    )  # fmt: skip


def replay(path: Path) -> Replayed:
    """Hold a new engine's decisions against a record.  Raises ConfigError where the file is no record."""
    found = Replayed()
    read = Entries(path)
    lines = iter(read)
    at, first = next(lines, (0, None))
    if not at:
        raise ConfigError(f"{path} has no whole entry: nothing had come to the engine yet when the record ended")
    if not isinstance(first, Made):
        raise ConfigError(
            f"{path} is no record: it does not say how the engine was made; write one with weft serve --record"
        )
    engine = engine_of(first)
    flight: list[Plan] = []
    prompts: dict[int, int] = {}
    for number, entry in lines:
        found.at = number
        try:
            found.difference = _one(engine, entry, flight, prompts, found)
        except EngineError as error:
            found.difference = f"the engine refuses what the record holds: {error}"
        if found.difference is not None:
            found.difference = f"entry {number}, {_where(entry)}: {found.difference}"
            break
    found.evictions, found.cut = engine.pool.evictions, read.cut
    return found


def _where(entry: Entry) -> str:
    if isinstance(entry, Planned):
        return f"step {entry.plan.step}"
    if isinstance(entry, Committed):
        return f"result of step {entry.result.step}"
    return f"request {entry.spec.id}" if isinstance(entry, Added) else type(entry).__name__.lower()


def _one(engine: Engine, entry: Entry, flight: list[Plan], prompts: dict[int, int], found: Replayed) -> str | None:
    """Tell the engine of one entry; a difference in words, or None."""
    if isinstance(entry, Added):
        found.requests += 1
        refused = bool(engine.add(entry.spec, entry.now))
        found.refusals += refused
        return None if refused == entry.refused else f"recorded refused={entry.refused}, decided refused={refused}"
    if isinstance(entry, Cancelled):
        lived = engine.cancel(entry.id, entry.index)
        found.cancellations += lived
        return (
            None
            if lived == entry.found
            else f"cancelled request {entry.id}: recorded found={entry.found}, it is {lived}"
        )
    if isinstance(entry, Planned):
        plan, events = engine.schedule(entry.now)
        flight.append(plan)
        _count(plan, prompts, found)
        told = tuple((e.id, e.index) for e in events if isinstance(e, Preempted))
        found.preemptions += len(told)
        late = tuple(e.id for e in events if isinstance(e, Rejected))
        found.refusals += len(late)
        if late != entry.refused:
            return f"refused as too late: recorded {entry.refused}, decided {late}"
        if plan != entry.plan:
            return differing(msgspec.to_builtins(entry.plan), msgspec.to_builtins(plan), "plan")
        return None if told == entry.preempted else f"preempted: recorded {entry.preempted}, decided {told}"
    if isinstance(entry, Committed | Abandoned):
        if not flight:
            return "nothing was planned before it"
        if isinstance(entry, Committed):
            engine.commit(entry.now, flight.pop(0), entry.result)
        else:
            engine.abandon(flight.pop(0), entry.now)
        return None
    return "an engine is made once"


def _count(plan: Plan, prompts: dict[int, int], found: Replayed) -> None:
    found.steps += 1
    for enter in plan.enter:
        prompts[enter.request] = enter.prompt
        found.hits += any(enter.entries) and enter.source < 0
    for work in plan.works:
        found.chunks += work.rows[-1][1] < prompts.get(work.request, 0)
    for gone in plan.leave:
        prompts.pop(gone, None)


def differing(recorded: Any, decided: Any, name: str) -> str:
    """The first place in which two trees of plain values differ, in words."""
    if isinstance(recorded, dict) and isinstance(decided, dict):
        for key in dict.fromkeys([*recorded, *decided]):
            if recorded.get(key) != decided.get(key):
                return differing(recorded.get(key), decided.get(key), f"{name}.{key}")
    if isinstance(recorded, list | tuple) and isinstance(decided, list | tuple):
        for i, (a, b) in enumerate(zip(recorded, decided, strict=False)):
            if a != b:
                return differing(a, b, f"{name}[{i}]")
        if len(recorded) != len(decided):
            return f"{name}: recorded {len(recorded)} of them, decided {len(decided)}"
    return f"{name}: recorded {str(recorded)[:200]}, decided {str(decided)[:200]}"
