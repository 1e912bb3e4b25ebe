"""What costs from first principles share: the operators of a step, with the time that each takes of every resource alone."""

from __future__ import annotations

from typing import NamedTuple

from weft.errors import ConfigError
from weft.slots.cost import Figures, Hardware, Link, Load, Parts


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
