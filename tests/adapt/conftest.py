"""The bundled model with three adapters of different shapes, and the same models with the deltas merged into their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.adapt.adapters import Made, make
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.hub import resolve


@pytest.fixture(scope="package")
def reference() -> PreTrainedModel:
    """The bundled model in transformers."""
    model = AutoModelForCausalLM.from_pretrained(resolve(None), dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.fixture(scope="package")
def made(reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "wide": make(folder / "wide", reference, seed=1, rank=16),
        "few": make(
            folder / "few", reference, seed=2, rank=3, targets=["q_proj", "v_proj", "down_proj"], rslora=True, gain=0.5
        ),
        "late": make(folder / "late", reference, seed=3, rank=8, layers=[5, 7], gain=0.6, dtype=torch.bfloat16),
    }


@pytest.fixture(scope="package")
def adapted(made: dict[str, Made]) -> Runtime:
    """The bundled model with all three loaded."""
    config = EngineConfig(
        model=resolve(None), dtype="float32", device="cpu", threads=1, max_model_len=1024, max_num_seqs=32,
        lora=[f"{name}={one.folder}" for name, one in made.items()],
    )  # fmt: skip
    return build(prepare(config))


@pytest.fixture
def folder(made: dict[str, Made]) -> Path:
    return made["few"].folder
