"""adapt=lora beside no adapter: what a step costs when nobody has one, one serves everybody, and each sequence has its own.

python -m bench.adapt.lora [--quick] [--json]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.harness import Case, Model, Options, encode, main
from bench.texts import OPENINGS, PARAGRAPHS
from weft.exec.adapters import sites
from weft.models import load_spec
from weft.models.spec import DecoderSpec

RANK = 16
BATCH = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOTES = (
    "Bound: loaded, unused. An adapter adds work to every product that it changes, and can at best add none.",
    f"Adapters of rank {RANK} on all seven modules, with weights of noise; answers differ from the null's on purpose.",
    "Loaded, unused: eight adapters are loaded and nobody asks for one. One for all: every sequence of the batch has the same. "
    "Eight: each sequence has another, so each product is followed by eight pairs of small ones.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        with tempfile.TemporaryDirectory(prefix="weft-adapters-") as place:
            spec = load_spec(model.folder)
            folders = [write(Path(place) / f"a{i}", spec, i) for i in range(BATCH)]
            yield options.compare(model, *cases(model, folders, 12 if options.quick else 48), f"rank {RANK}")


def cases(model: Model, folders: list[Path], new: int) -> tuple[Case, list[Case]]:
    prompts = encode(model, [*OPENINGS, *PARAGRAPHS])[:BATCH]
    null = Case(name="no adapters", prompts=prompts, max_new=new, batch=BATCH)
    loaded = replace(
        null, name="loaded, unused", engine={"lora": [f"{f.name}={f}" for f in folders], "lora_memory": 256 << 20}
    )
    one = replace(loaded, name="one for all", own=[("adapt=lora(name='a0')",)])
    eight = replace(loaded, name="eight", own=[(f"adapt=lora(name={f.name!r})",) for f in folders])
    return null, [loaded, one, eight]


def write(folder: Path, spec: DecoderSpec, seed: int) -> Path:
    """An adapter for any model that has the seven modules."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for weight, site in sites(spec).items():
        name = f"base_model.model.{weight.removesuffix('.weight')}"
        if name.rpartition(".")[2] in TARGETS:
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, site.inputs, generator=generator) * site.inputs**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(site.outputs, RANK, generator=generator) * 0.02
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


if __name__ == "__main__":
    sys.exit(main("adapt=lora", "bench.adapt.lora", measure, NOTES))
