"""Roofline: a step takes as long as its arithmetic or its memory traffic, whichever is longer, part by part.

Paper    Williams et al., Roofline, CACM 52(4), 2009                  (001-36)
Rule     weights: max(2 P rows / (flops compute), read bytes / (bandwidth memory)), and so for the output projection;
         attention of prompts and of decodes: max(pairs F / (flops compute), entries E / (bandwidth memory))
Shapes   P: parameters that a row meets.  F, E: FLOPs of a pair, bytes of an entry, over the layers of one kind
Units    seconds; compute, memory: shares of what the maker says, in (0, 1]
Cost     some ten multiplications a step
Pays     where nothing was measured yet: it says which part bounds a step, and what a machine could do at best
Differs  reading and multiplying overlap perfectly inside a product and not at all between products; two sums over all peers in
         each layer (ring) where a model is spread over several devices; entries are written once; blocks that are moved beside a
         step show where they take longer than it does
Raises   ValueError for a share outside (0, 1] or a time below 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from weft.errors import ConfigError
from weft.registry import register
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "roofline")
@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """compute, memory: of the device's peaks.  attention: of the arithmetic peak, in attention.  dtype: of the products.

    host_s, sequence_s: of each step, and of each sequence in it; None takes the device's own launch time.
    """

    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    host_s: float | None = None
    sequence_s: float = 2e-6
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        for name in ("compute", "memory", "attention"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is a share of the device's peak, above 0 and at most 1; got {getattr(self, name)}"
                )
        if self.sequence_s < 0 or (self.host_s is not None and self.host_s < 0):
            raise ValueError("host_s and sequence_s are seconds and not below 0")

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        if self.dtype not in hardware.flops:
            known = ", ".join(hardware.flops)
            raise ConfigError(f"{hardware.name} says nothing of products in {self.dtype}; it has: {known}")
        devices = hardware.devices
        peak, band = hardware.flops[self.dtype] * devices, hardware.memory_bytes_s * self.memory * devices
        multiply, attend = 1.0 / (peak * self.compute), 1.0 / (peak * self.attention)
        row_s = 2.0 * model.active_params * multiply
        head_s, head_read_s = 2.0 * model.head_params * multiply, model.head_params * model.weight_bytes / band
        fixed_read_s = model.read_bytes(1) / band if not model.experts else 0.0
        kinds = [(k.pair_flops * attend, k.entry_bytes / band) for k in model.kinds]
        write_s = sum(k.entry_bytes for k in model.kinds) / band
        host_s = hardware.launch_s if self.host_s is None else self.host_s
        block_s, stored_s = 2 * model.block_bytes / band, model.block_bytes / hardware.host_link.bytes_s
        copy_s = hardware.host_link.latency_s
        ring_s, hop_s = self._ring(hardware, model)
        sequence_s, read_bytes, mixture = self.sequence_s, model.read_bytes, bool(model.experts)

        def price(load: Load) -> Parts:
            rows = load.whole_rows
            weights = 0.0
            for share, n in load.spans or ((1.0, load.rows),):
                if n:
                    weights += share * max(n * row_s, read_bytes(n) / band if mixture else fixed_read_s)
            if load.samples:
                weights += max(load.samples * head_s, head_read_s)
            attention, kv = 0.0, rows * write_s
            for i, (pair_s, entry_s) in enumerate(kinds):
                for pairs, entries in (
                    (load.prompt_pairs[i], load.prompt_entries[i]),
                    (load.decode_entries[i], load.decode_entries[i]),
                ):
                    compute_s, traffic_s = pairs * pair_s, entries * entry_s
                    if compute_s > traffic_s:
                        attention += compute_s
                    else:
                        kv += traffic_s
            kv += load.moved * block_s + (load.stored - load.aside) * stored_s + load.copies * copy_s
            told = rows * ring_s + hop_s if rows and devices > 1 else 0.0
            if load.aside:
                kv += max(0.0, load.aside * stored_s - weights - attention - kv - told)
            return Parts(weights, attention, kv, told, host_s + load.works * sequence_s)

        return price

    @staticmethod
    def _ring(hardware: Hardware, model: Figures) -> tuple[float, float]:
        """Seconds of each row, and of each step, of two ring sums over all devices in every layer."""
        n, link = hardware.devices, hardware.link
        sums = 2 * model.layers
        each = 2.0 * (n - 1) / n * model.width * model.value_bytes / link.bytes_s
        return sums * each, sums * 2 * (n - 1) * link.latency_s
