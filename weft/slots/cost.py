"""Slot `cost`: how long a plan takes.  What it is told of a step, of a model and of a machine, and what it answers.

Legend.  entry: one position's KV.  pair: one query that meets one key.  Times in seconds, sizes in bytes, rates per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Parts(NamedTuple):
    """Seconds of one step by what they went into; a step takes their sum.

    weights        products with weights: reading them or multiplying by them, whichever takes longer
    attention      arithmetic of attention, where that takes longer than reading keys and values
    kv             reading and writing keys and values; blocks that are copied, saved and loaded
    communication  what devices tell each other
    host           the scheduler, launches, everything that the device waits for
    """

    weights: float = 0.0
    attention: float = 0.0
    kv: float = 0.0
    communication: float = 0.0
    host: float = 0.0

    @property
    def total_s(self) -> float:
        return self.weights + self.attention + self.kv + self.communication + self.host

    @property
    def trained(self) -> float:
        """Tokens of a fine-tuning job that were trained beside it."""
        return 0.0


PARTS = Parts._fields


@dataclass(slots=True)
class Load:
    """What a step computes.

    rows       of the target model (the tokens of the step).  samples: rows whose logits are computed.  works: sequences in it
    prompt     by kind of layer (`Figures.kinds`), pairs of the rows of prompts, and the entries that they read
    decode     by kind of layer, pairs of single rows that go on from what stands: as many as the entries that they read
    spans      (share of the layers, rows that pass them), where rows stop between layers; else empty: all rows pass all layers.
               Pairs and entries are counted in the share of the layers that their rows pass
    moved      blocks that are copied.  stored: blocks that go to or come from below the pool, in so many `copies`
    aside      of `stored`, blocks that are moved while the step computes
    entered    sequences that begin with this step.  idle: 1 where the engine had nothing to do before it
    """

    rows: int = 0
    samples: int = 0
    works: int = 0
    prompt_pairs: list[float] = field(default_factory=list)
    prompt_entries: list[float] = field(default_factory=list)
    decode_entries: list[float] = field(default_factory=list)
    decode_rows: int = 0
    spans: list[tuple[float, int]] = field(default_factory=list)
    moved: int = 0
    stored: int = 0
    copies: int = 0
    aside: int = 0
    entered: int = 0
    idle: int = 0

    @property
    def whole_rows(self) -> float:
        """Rows, each counted in the share of the layers that it passes."""
        return sum(share * rows for share, rows in self.spans) if self.spans else self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Layers that see equally far.  window: None for all positions.  pair_flops, entry_bytes: over all of these layers."""

    window: int | None
    pair_flops: float
    entry_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A model in numbers.  bytes are those of its weights as they are stored.

    dense_params    parameters that every row meets, the output projection left out.  head_params: of that
    embed_params    of the table of tokens, from which rows are looked up; 0 where it is the output projection, too
    expert_params   of one expert over all layers.  experts, top_k: in a layer, and how many a row goes to (0: no mixture)
    weight_bytes    of one parameter.  block_bytes: of one block of the KV pool
    """

    name: str
    layers: int
    width: int
    dense_params: int
    head_params: int
    embed_params: int = 0
    expert_params: int = 0
    experts: int = 0
    top_k: int = 0
    weight_bytes: float = 2.0
    value_bytes: float = 2.0
    kinds: tuple[Kind, ...] = ()
    block_bytes: int = 0

    @property
    def active_params(self) -> int:
        """Parameters that one row is multiplied with, the output projection left out."""
        return self.dense_params + self.top_k * self.expert_params

    @property
    def stored_bytes(self) -> float:
        """All weights."""
        inside = self.dense_params + self.experts * self.expert_params
        return (inside + self.head_params + self.embed_params) * self.weight_bytes

    def read_bytes(self, rows: int) -> float:
        """Weights that `rows` rows reach, the output projection left out: of a mixture those experts that are hit."""
        if not self.experts:
            return self.dense_params * self.weight_bytes
        hit = self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** rows)
        return (self.dense_params + hit * self.expert_params) * self.weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """bytes_s: in one direction.  latency_s: of one message."""

    name: str
    bytes_s: float
    latency_s: float
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device, as its maker describes it.

    flops: dense products, by number format.  memory_bytes_s: of the memory that holds weights and KV.  link: to its peers.
    host_link: to the memory below it.  launch_s: of a step, by which a device waits for its host.  price_h: US dollars for an
    hour, 0 where not known.
    """

    name: str
    title: str
    flops: Mapping[str, float]
    memory_bytes: int
    memory_bytes_s: float
    link: Link
    host_link: Link
    launch_s: float = 0.0
    price_h: float = 0.0
    source: str = ""
    devices: int = 1
    """Tensor parallelism: so many of these compute one model together."""


class Price(Protocol):
    """A cost that knows its machine and its model.

    One under which a fine-tuning job runs beside requests has `peak_tok_s`: tokens that it trains in a second without any.
    """

    def __call__(self, load: Load) -> Parts: ...


class Cost(Protocol):
    """Slot `cost`.

    on     the price of steps of this model there

    One of devices of more than one kind has `kv_bytes`, where the others have the KV pool, and `price_h` of the others.
    """

    def on(self, hardware: Hardware, model: Figures) -> Price: ...
