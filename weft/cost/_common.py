"""What costs from first principles share: the operators of a step, with the time that each takes of every resource alone."""

from __future__ import annotations

from typing import NamedTuple

from weft.errors import ConfigError
from weft.slots.cost import Figures, Hardware, Load


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
