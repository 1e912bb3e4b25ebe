"""A row has its bits whatever the number of rows: from 1 to 64, each one of them, in every format of weights and inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.harness import Rows
from tests.native.machine import ISAS, MODULE, Machine, panels, product
from tests.native.test_decoder import bench, prompt, spec
from tests.native.test_products import FEW, in_format, random
from weft.config import build_stack
from weft.models.formats import WeightFormat
from weft.models.kernels import INPUTS
from weft.models.layout import quantized

MOST = 64
WIDE = {"hidden_size": 128, "intermediate_size": 256}
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "float32": {}, "bfloat16": {"dtype": "bfloat16"},
    **{text: {"dtype": "bfloat16", "formats": text} for text in ("int8", "int8:32:zero", "int4", "int4:16:zero")},
    **{text: {"dtype": "bfloat16", "formats": text, "changes": WIDE} for text in ("int8:128", "int4:128:float", "int4:128:zero")},
    **{f"{text}, inputs too": {"dtype": "bfloat16", "formats": text, "activations": "int8"} for text in ("int8", "int4")},
    "float32 over int8": {"store": "int8"}, "bfloat16 over int8": {"dtype": "bfloat16", "store": "int8"},
    "mixture": {"dtype": "bfloat16", "changes": MIXTURE},
    "int4 mixture over int8, inputs too": {
        "dtype": "bfloat16", "formats": "int4", "activations": "int8", "store": "int8", "changes": MIXTURE,
    },
}  # fmt: skip
"""Over int8: keys and values are stored in 8 bits."""
EVERYWHERE = (
    "bfloat16",
    "int4:128:zero",
    "int8, inputs too",
    "bfloat16 over int8",
    "int4 mixture over int8, inputs too",
)
"""Models that each instruction set runs; the others only the best one."""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("text", [torch.float32, torch.bfloat16, *FEW], ids=str)
def test_of_a_product(isa: str, text: torch.dtype | str) -> None:
    """Rows at the beginning and at the end of what is computed with them."""
    machine, values = Machine(MODULE.Program(1, isa)), random(1, 40, 256) / 16
    packed, x = panels(machine.program, in_format(values, text)), random(2, MOST, 256)
    for inputs in INPUTS.values():
        most = product(machine, x, packed, None, MOST, inputs)
        for rows in range(1, MOST):
            assert torch.equal(product(machine, x, packed, None, rows, inputs), most[:rows]), rows
            assert torch.equal(product(machine, x[-rows:], packed, None, rows, inputs), most[-rows:]), rows


@pytest.mark.parametrize(
    ("isa", "name"), [(isa, name) for isa in ISAS for name in MODELS if isa == ISAS[0] or name in EVERYWHERE]
)
def test_of_a_step(isa: str, name: str) -> None:
    """Logits of sequences that decode together, of one to three chunks of entries, are those of each one alone."""
    options = dict(MODELS[name])
    of = spec(**options.pop("changes", {}))
    if text := options.pop("formats", ""):
        options["formats"] = quantized(of, WeightFormat.parse(text))
    if store := options.pop("store", ""):
        options["store"] = build_stack([f"kv.store={store}"])["kv.store"]
    made = bench("cpu", of, isa=isa, threads=2, **options)
    prompts = [prompt(130 if i % 8 == 0 else 5 + i % 7, i) for i in range(MOST)]
    for i, tokens in enumerate(prompts):
        made.run([Rows(f"s{i}", tokens, 0)], "last")
    nexts = [Rows(f"s{i}", [i], len(tokens)) for i, tokens in enumerate(prompts)]
    alone = torch.cat([made.run([one])[0] for one in nexts])
    for count in range(2, MOST + 1):
        assert torch.equal(torch.cat(made.run(nexts[:count])), alone[:count]), count
