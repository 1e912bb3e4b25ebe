"""What costs from first principles share: the operators of a step, with the time that each takes of every resource alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

from weft.errors import ConfigError
from weft.slots.cost import Figures, Hardware, Link, Load, Parts, Price


class Operator(NamedTuple):
    """compute_s, memory_s: alone on the device.  attention: of attention, else a product with weights."""

    compute_s: float
    memory_s: float
    attention: bool


class Rates:
    """compute, memory, attention: shares of the device's peaks; dtype: of the products.  Raises ConfigError."""

    def __init__(
        self, hardware: Hardware, model: Figures, dtype: str, compute: float, memory: float, attention: float
    ) -> None:
        if dtype not in hardware.flops:
            raise ConfigError(
                f"{hardware.name} says nothing of products in {dtype}; it has: {', '.join(hardware.flops)}"
            )
        devices = hardware.devices
        self.hardware, self.model = hardware, model
        self.flops, self.attention_flops = (hardware.flops[dtype] * devices * x for x in (compute, attention))
        self.bytes_s = hardware.memory_bytes_s * memory * devices

    def operators(self, load: Load) -> list[Operator]:
        """Products of the layers and of the head, attention of prompts and of decodes, and the writing of entries."""
        model, out = self.model, list[Operator]()
        for share, rows in load.spans or ((1.0, load.rows),):
            if rows:
                flops, read = 2.0 * model.active_params * rows, model.read_bytes(rows)
                out.append(Operator(share * flops / self.flops, share * read / self.bytes_s, False))
        if load.samples:
            read = model.head_params * model.weight_bytes
            out.append(Operator(2.0 * model.head_params * load.samples / self.flops, read / self.bytes_s, False))
        for i, kind in enumerate(model.kinds):
            for pairs, entries in (
                (load.prompt_pairs[i], load.prompt_entries[i]), (load.decode_entries[i], load.decode_entries[i]),
            ):  # fmt: skip
                out.append(
                    Operator(
                        pairs * kind.pair_flops / self.attention_flops, entries * kind.entry_bytes / self.bytes_s, True
                    )
                )
        written = load.whole_rows * sum(kind.entry_bytes for kind in model.kinds)
        out.append(Operator(0.0, (written + 2 * load.moved * model.block_bytes) / self.bytes_s, True))
        return out

    def ring_s(self, rows: float) -> float:
        """Two ring sums over all devices in every layer."""
        n, link, model = self.hardware.devices, self.hardware.link, self.model
        if n == 1 or not rows:
            return 0.0
        each = 2.0 * (n - 1) / n * model.width * model.value_bytes / link.bytes_s
        return 2 * model.layers * (rows * each + 2 * (n - 1) * link.latency_s)


class Split(NamedTuple):
    """A step's times on one device of `ranks` that share the rows of its sequences (not its weights).

    weights, attention, kv: seconds.  queries, entries: bytes of the rows' queries, and of the entries that prompts meet, in all.
    """

    weights: float
    attention: float
    kv: float
    queries: float
    entries: float

    def split(self, more_s: float, host_s: float) -> Parts:
        return Parts(self.weights, self.attention, self.kv, more_s, host_s)


def by_rows(rates: Rates, load: Load, ranks: int) -> Split:
    """Products of 1/ranks of the rows, for which each rank reads all weights; attention of 1/ranks of pairs and entries."""
    weights = attention = kv = 0.0
    for o in rates.operators(load):
        if not o.attention:
            weights += max(o.compute_s / ranks, o.memory_s)
        elif o.compute_s > o.memory_s:
            attention += o.compute_s / ranks
        else:
            kv += o.memory_s / ranks
    model = rates.model
    # A pair takes 4 FLOPs for each value of a query: so many values has a row's query over all layers.
    queries = load.whole_rows * sum(k.pair_flops / 4 for k in model.kinds) * model.value_bytes
    met = [a + b for a, b in zip(load.prompt_entries, load.decode_entries, strict=True)]
    entries = sum(n * k.entry_bytes for n, k in zip(met, model.kinds, strict=True))
    return Split(weights, attention, kv, queries, entries)


def ways(split: Split, ranks: int, link: Link, passes_s: float) -> tuple[float, float, float]:
    """Seconds that show of passing on K and V around a ring, of passing on queries, and of the same with results on the way back.

    Each of `ranks` - 1 passes is hidden behind the attention of one block, passes_s.  Results have the size of queries.
    """
    n = ranks
    keys_s, query_s = (x / n / link.bytes_s + link.latency_s for x in (split.entries, split.queries))
    back_s = (n - 1) / n * split.queries / n / link.bytes_s + link.latency_s
    around_kv, around_q = ((n - 1) * max(0.0, x - passes_s) for x in (keys_s, query_s))
    # Both directions of a link at once: results go straight to their owner; the last ones have nothing to hide behind.
    return around_kv, around_q + back_s, around_q + query_s


def two_streams(compute_s: float, told_s: float, phases: int) -> float:
    """Seconds of `phases` of computing, each followed by telling, of two halves that take turns; both times are of both.

    One half computes while the other tells: the first has nothing to hide behind, nor has the last telling.
    """
    each, told = compute_s / (2 * phases), told_s / (2 * phases)
    return each + (2 * phases - 1) * max(each, told) + told


@dataclass(frozen=True, slots=True, kw_only=True)
class OverRanks(ABC):
    """A cost of positions on several ranks, which says what they tell each other (`told_s`).

    compute, memory, attention: shares of the device's peaks.  Raises ValueError for ranks < 1 or a share outside (0, 1].
    """

    ranks: int = 2
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        shares = (self.compute, self.memory, self.attention)
        if self.ranks < 1 or not all(0 < x <= 1 for x in shares):
            raise ValueError("ranks is at least 1, and the shares are above 0 and at most 1")

    @abstractmethod
    def told_s(self, found: Split, load: Load, model: Figures, link: Link) -> float:
        """Seconds that show of what ranks exchange in a step with rows."""

    def on(self, hardware: Hardware, model: Figures) -> Price:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        link, host_s, n = hardware.link, hardware.launch_s, self.ranks

        def price(load: Load) -> Parts:
            found = by_rows(rates, load, n)
            told = rates.ring_s(load.whole_rows / n)
            if n > 1 and load.rows:
                told += self.told_s(found, load, model, link)
            return found.split(told, host_s + load.works * 2e-6)

        return price


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart(ABC):
    """A cost of attention on devices of its own, which says what a row sends to them and back (`sent_bytes`).

    flops, bytes_s, kv_bytes: of those devices together.  price_h: of them together, in US dollars an hour, 0 where not known.
    link_bytes_s, link_s: between both kinds.  batches: parts of a batch that take turns.  Raises ValueError for a rate or a share
    that cannot be.
    """

    flops: float = 4 * 312e12
    bytes_s: float = 4 * 2039e9
    kv_bytes: float = 4 * 80e9
    price_h: float = 4 * 1.60
    link_bytes_s: float = 50e9
    link_s: float = 5e-6
    batches: int = 2
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        shares, sizes = (
            (self.compute, self.memory, self.attention),
            (self.flops, self.bytes_s, self.kv_bytes, self.link_bytes_s, self.batches),
        )
        if (
            min(sizes) <= 0
            or self.batches < 1
            or min(self.link_s, self.price_h) < 0
            or not all(0 < x <= 1 for x in shares)
        ):
            raise ValueError("rates and batches are above 0, and the shares are above 0 and at most 1")

    @abstractmethod
    def sent_bytes(self, model: Figures) -> float:
        """Of a row over all layers, both ways."""

    def on(self, hardware: Hardware, model: Figures) -> Price:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        host_s = hardware.launch_s
        others = Rates(
            replace(hardware, flops={self.dtype: self.flops}, memory_bytes_s=self.bytes_s, devices=1), model, self.dtype,
            self.compute, self.memory, self.attention,
        )  # fmt: skip
        sent_bytes = self.sent_bytes(model)

        def price(load: Load) -> Parts:
            weights = sum(max(o.compute_s, o.memory_s) for o in rates.operators(load) if not o.attention)
            weights += rates.ring_s(load.whole_rows)
            attending = [o for o in others.operators(load) if o.attention]
            attention = sum(o.compute_s for o in attending if o.compute_s > o.memory_s)
            kv = sum(o.memory_s for o in attending if o.compute_s <= o.memory_s)
            told = load.whole_rows * sent_bytes / self.link_bytes_s + (
                2 * model.layers * self.link_s if load.rows else 0.0
            )
            whole = weights + attention + kv + told
            if load.works >= self.batches > 1 and whole:
                # Weights are read once for each part.
                read = sum(
                    max(o.compute_s, self.batches * o.memory_s) for o in rates.operators(load) if not o.attention
                )
                scale = min(1.0, max(read, attention + kv, told) / whole)
                return Parts(weights * scale, attention * scale, kv * scale, told * scale, host_s + load.works * 2e-6)
            return Parts(weights, attention, kv, told, host_s + load.works * 2e-6)

        return price
