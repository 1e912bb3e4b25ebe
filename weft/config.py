"""Limits, stacks and sizes: what an engine is built from once the flags are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.compose import Verdict, complete, require, traits_of
from weft.errors import ConfigError
from weft.registry import Part, lookup, parse
from weft.slots import SLOTS, Compress
from weft.traits import Effect, Trait


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a step and of a request.

    max_model_len  positions that a context may reach
    max_num_seqs   sequences that hold KV at once
    max_rows       rows of one step over all sequences (the token budget); of each model, where there is more than one
    max_samples    rows of one step whose logits are computed
    max_guesses    draft tokens verified for one sequence in a step
    row_bytes, sample_bytes, work_bytes   workspace for one row, one row of logits, and in all (0: unbounded)
    max_waiting    requests that may wait; one more is refused
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_rows: int = 512
    max_samples: int = 64
    max_guesses: int = 16
    row_bytes: int = 0
    sample_bytes: int = 0
    work_bytes: int = 0
    max_waiting: int = 100_000

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_rows", "max_samples", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_guesses", "row_bytes", "sample_bytes", "work_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if 0 < self.work_bytes < self.row_bytes + self.sample_bytes:
            raise ConfigError(
                f"work_bytes ({self.work_bytes}) must hold one row ({self.row_bytes}) and one row of logits "
                f"({self.sample_bytes}), or nothing could ever run"
            )


@dataclass(frozen=True, slots=True)
class Stack:
    """A complete, composed stack: one instance for each filled slot.

    What the core reads of it is pure: where compression cuts, what it leaves, which rows belong together.
    """

    parts: tuple[Part, ...]
    instances: Mapping[str, Any] = field(repr=False)
    verdict: Verdict = field(repr=False)

    def __getitem__(self, slot: str) -> Any:
        return self.instances[slot]

    def get(self, slot: str) -> Any | None:
        return self.instances.get(slot)

    def cut(self, prompt: int, position: int) -> int | None:
        """The next position at which compression drops entries.

        A cut never parts rows of a prompt that belong together: one inside a tile moves to the tile's end.
        """
        compress: Compress | None = self.instances.get("kv.compress")
        if compress is None:
            return None
        tile = self.tile
        if tile == 1 or position >= prompt:
            return compress.cuts(prompt, position)
        found = compress.cuts(prompt, position // tile * tile)
        if found is None or found >= prompt:
            return found
        return min(-(-found // tile) * tile, prompt)

    def budget(self, prompt: int, limit: int) -> int:
        """Entries that a full group holds at most for a context that reaches `limit`."""
        compress = self.instances.get("kv.compress")
        return limit if compress is None else min(limit, compress.budget(prompt, limit) + self.tile - 1)

    @property
    def tile(self) -> int:
        """Rows of a prompt that are computed together."""
        attention = self.instances.get("attention")
        return 1 if attention is None else int(attention.tile)

    @property
    def second(self) -> str | None:
        """The checkpoint of the second model that a technique asks for.  Raises ConfigError where two ask for different ones."""
        named = {p: getattr(self.instances[p.slot], "model", None) for p in self.parts}
        models = {model for model in named.values() if model is not None}
        if len(models) > 1:
            asking = " and ".join(str(p) for p, model in named.items() if model is not None)
            raise ConfigError(f"{asking} ask for different models, and weft loads one beside the target")
        return models.pop() if models else None

    @property
    def history(self) -> int:
        """Tokens at the end of a prompt that a technique has to see computed; an instance may ask for more than its traits."""
        return max(self.verdict.history, *(int(getattr(x, "history", 0)) for x in self.instances.values()), 0)

    @property
    def stateful(self) -> bool:
        """Whether a technique keeps state for each request that its KV alone does not hold."""
        return Effect.PER_REQUEST_STATE in self.verdict.effects

    @property
    def single(self) -> bool:
        """Whether each token is needed before the next one: nothing is guessed ahead."""
        return Effect.ONE_AT_A_TIME in self.verdict.effects

    @property
    def companions(self) -> int:
        """Contexts beside its own that a request brings, to be sampled together."""
        return int(getattr(self.instances.get("sample"), "companions", 0))

    @property
    def shares_output(self) -> bool:
        """Whether the KV of output is what the same tokens have as a prompt: not where rows after the prompt skip layers."""
        return Effect.SKIPS_LAYERS not in self.verdict.effects

    @property
    def settings(self) -> bytes:
        """What changes the values of stored KV, in canonical form: part of the name of every cached prefix.

        An instance whose arguments do not say all of it (an adapter's contents) has a `digest`, bytes.
        """
        said = [
            str(p).encode() + b"\0" + getattr(self.instances[p.slot], "digest", b"")
            for p in self.parts
            if Effect.REWRITES_KV in traits_of(p).effects
        ]
        return b"\n".join(sorted(said))


def build_stack(techniques: Sequence[str | Part] = ()) -> Stack:
    """Parse, complete with nulls, compose and build.  Raises ConfigError or ComposeError."""
    parts = complete([parse(t) if isinstance(t, str) else t for t in techniques])
    for part in parts:
        if not SLOTS[part.slot].inside:
            raise ConfigError(
                f"{part} is no part of an engine; it decides about engines, or prices their steps, in weft sim"
            )
    verdict = require(parts)
    return Stack(tuple(parts), {p.slot: p.build() for p in parts}, verdict)


MAX_STACKS = 64
"""Stacks of requests that are kept at hand; their instances are made anew when they come back after so many others."""


class Stacks:
    """The server's stack, and those that requests lay over it.  Equal parts share one instance while they are kept.

    shelves: by slot, what instances with a method `attach` take hold of (loaded adapters).  Without any, nothing is attached, and
    such instances decide but do not compute.  Raises ConfigError where the server's own stack finds nothing there.
    """

    def __init__(self, base: Stack, shelves: Mapping[str, Any] | None = None) -> None:
        self.base = base
        self._shelves = dict(shelves or {})
        self._made: dict[tuple[str, ...], Stack] = {}
        self._retired: dict[str, int] = {}
        self._attach(base.instances)

    def of(self, techniques: tuple[str, ...]) -> Stack:
        """The server's stack with these parts laid over it.  Raises ConfigError, or ComposeError with the reasons."""
        if not techniques:
            return self.base
        stack = self._made.pop(techniques, None)
        if stack is None:
            stack = self._lay_over([parse(t) for t in techniques])
        self._made[techniques] = stack
        if len(self._made) > MAX_STACKS:
            self._count(self._made.pop(next(iter(self._made))), self._retired)
        return stack

    def _lay_over(self, own: Sequence[Part]) -> Stack:
        for part in own:
            if not getattr(lookup(part.slot, part.name), "per_request", False):
                raise ConfigError(f"{part} belongs to the whole server: start weft with --with '{part}'")
        require(own)
        own = [self._as_loaded(p) for p in own]
        slots = {p.slot for p in own}
        rest = [p for p in self.base.parts if p.slot not in slots]
        parts = [*rest, *own]
        verdict = require(parts)
        made = {p.slot: p.build() for p in own}
        self._attach(made)
        return Stack(tuple(parts), {p.slot: self.base.instances[p.slot] for p in rest} | made, verdict)

    def _attach(self, instances: Mapping[str, Any]) -> None:
        for slot, instance in instances.items():
            if slot in self._shelves and hasattr(instance, "attach"):
                instance.attach(self._shelves[slot])

    def forget(self, stale: Callable[[Stack], bool]) -> None:
        """Make the stacks that this is true of anew when they are asked for again."""
        for techniques in [t for t, stack in self._made.items() if stale(stack)]:
            self._count(self._made.pop(techniques), self._retired)

    def _as_loaded(self, part: Part) -> Part:
        """A request's part that needs a second model works with the server's, which it may name or leave out."""
        if Trait.SECOND_MODEL not in traits_of(part).needs:
            return part
        loaded, given = self.base.second, dict(part.arguments)
        if loaded is None or given.get("model", loaded) != loaded:
            has = "none" if loaded is None else "another one (leave out model=, and it is used)"
            raise ConfigError(
                f"{part} needs a second model, and this server has loaded {has}; start weft with --with '{part}'"
            )
        return Part(part.slot, part.name, tuple({**given, "model": loaded}.items()))

    def acts(self) -> dict[str, int]:
        """What the techniques did since the start, by "slot=name.act"."""
        total = dict(self._retired)
        seen = {id(x) for x in self.base.instances.values()}
        self._count(self.base, total)
        for stack in self._made.values():
            own = {s: x for s, x in stack.instances.items() if id(x) not in seen}
            self._count(Stack(stack.parts, own, stack.verdict), total)
        return total

    def _count(self, stack: Stack, total: dict[str, int]) -> None:
        for part in stack.parts:
            instance = stack.instances.get(part.slot)
            if stack is not self.base and instance is self.base.instances.get(part.slot):
                continue
            for act, count in getattr(instance, "acts", {}).items():
                key = f"{part.slot}={part.name}.{act}"
                total[key] = total.get(key, 0) + count


MOST_BYTES = 1 << 60
"""No size is larger; an exbibyte."""
UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
SIZE = re.compile(
    r"\s*(?P<number>\d+(?:\.\d*)?(?:e\d{1,2})?|\.\d+)\s*(?P<unit>[kmgt]?)(?P<suffix>ib|b)?\s*", re.IGNORECASE
)


def parse_size(text: str, flag: str = "") -> int:
    """Bytes of "4G", "512MiB", "1.5g", "2e9" or "1048576".  K, M, G and T are powers of 1024, with or without B or iB.

    flag: where the size was said, which the error names.  Raises ConfigError for anything else, for parts of a byte, for zero
    and for more than an exbibyte.
    """
    said, match = f"{flag} {text!r}".lstrip(), SIZE.fullmatch(text)
    if match is None or ((match["suffix"] or "").lower() == "ib" and not match["unit"]):
        raise ConfigError(f"{said} is not a size; write a number and K, M, G or T, for example 512M or 4G")
    size = float(match["number"]) * 2.0 ** UNITS[match["unit"].lower()]
    if not 1 <= size <= MOST_BYTES or (not match["unit"] and size != int(size)):
        raise ConfigError(
            f"{said} is out of range; a size is whole bytes, at least 1 and at most {format_size(MOST_BYTES)}"
        )
    return int(size)


def format_size(size: int) -> str:
    """A size for people, in powers of 1024: 0 B, 512 B, 14.0 MiB, 1.50 GiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{size} B"
    return f"{value:.2f} {unit}" if unit not in ("KiB", "MiB") else f"{value:.1f} {unit}"
