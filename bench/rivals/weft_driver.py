"""weft, driven as its rivals are: the engine of `weft bench decode`, under this Python.

Formats: bf16, int8 and int4 with inputs of 8 bits, and int8-float and int4-float with float inputs.
"""

from __future__ import annotations

import importlib.metadata
from itertools import count
from pathlib import Path
from typing import Any

from bench.rivals.protocol import Loaded, Measured, main
from weft.bench.decode import DecodeBench, decode, make_room, ready
from weft.exec.build import EngineConfig, Runtime, Setup
from weft.models.layout import stored_bytes, tensor_shapes
from weft.types import SamplingSpec

CONFIGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"weights": "int8", "activations": "int8"},
    "int8-float": {"weights": "int8"},
    "int4": {"weights": "int4", "activations": "int8"},
    "int4-float": {"weights": "int4"},
}


class Weft:
    def __init__(self) -> None:
        self.runtime: Runtime | None = None
        self.ids = count(1)

    def prepare(self, model: Path, format: str, cache: Path) -> None:
        pass

    def load(self, model: Path, format: str, cache: Path, threads: int, batch: int, length: int) -> Loaded:
        config = EngineConfig(
            model=model, dtype="bfloat16", device="cpu", threads=threads, share=False, **CONFIGS[format]
        )
        setup = make_room(config, DecodeBench(batches=(batch,), prompt=length - 2, new=2))
        self.runtime, ready_s = ready(setup)
        ops = setup.ops["target"]
        inputs = f", inputs {setup.config.activations}" if setup.formats else ""
        found = Loaded(
            version=importlib.metadata.version("weft"), kind=f"{setup.weights_name}{inputs}", kv_bytes=kv_bytes(setup),
            info={"ops": ops.ops, "isa": ops.isa, "ready_s": ready_s, "kv": setup.dtype},
        )  # fmt: skip
        keep(setup, found)
        return found

    def measure(self, prompts: list[list[int]], new: int) -> Measured:
        assert self.runtime is not None
        found = decode(self.runtime, prompts, SamplingSpec(temperature=0.0, max_tokens=new), self.ids)
        steps_s = [times.total_s for times, _ in found.steps]
        return Measured(found.prefill_s, steps_s, [found.tokens[request] for request in sorted(found.tokens)])


def kv_bytes(setup: Setup) -> float:
    """Bytes of keys and values of one position, in all layers."""
    return sum(group.entry_bytes for group in setup.groups_of("target"))


def keep(setup: Setup, found: Loaded) -> None:
    """Count the stored tensors into body, head and experts; an embedding that is no head is looked up, not read."""
    spec = setup.spec
    sizes = stored_bytes(spec, setup.dtype, setup.ops["target"].panels, setup.formats)
    shapes = tensor_shapes(spec)
    for name, size in sizes.items():
        weights = 1
        for length in shapes[name]:
            weights *= length
        if name == "head" or (name == "embed" and spec.tied):
            found.head.add(weights, size)
        elif ".experts_" in name:
            found.experts.add(weights, size)
        elif name != "embed":
            found.body.add(weights, size)


if __name__ == "__main__":
    main(Weft)
