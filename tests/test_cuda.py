"""The same engine on a GPU: logits near the CPU's, the same bookkeeping, half precision, and every technique keeps what it
declares.  Skips where no GPU answers."""

from __future__ import annotations

import pytest
import torch

from weft import LLM, SamplingParams
from weft.conform.checks import conform
from weft.conform.lab import Lab
from weft.registry import names
from weft.slots import SLOTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device answers")
PROMPTS = ["Once upon a time, there was a little", "The captain looked at the", "It rained"]


def test_float32_gives_the_cpus_greedy_tokens() -> None:
    law = SamplingParams(max_tokens=48, temperature=0, logprobs=3)
    with LLM(dtype="float32", device="cpu", threads=1, memory="1GiB") as cpu:
        wanted = cpu.generate(PROMPTS, law)
    with LLM(dtype="float32", device="cuda", memory="4GiB") as gpu:
        got = gpu.generate(PROMPTS, law)
        assert gpu.runtime.engine.pool.referenced == 0
    for a, b in zip(wanted, got, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.outputs[0].cumulative_logprob == pytest.approx(b.outputs[0].cumulative_logprob, abs=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_a_mixed_load(dtype: str) -> None:
    with LLM(dtype=dtype, device="cuda", memory="4GiB", max_num_batched_tokens=64) as gpu:
        outs = gpu.generate(PROMPTS * 20, SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=4, n=2))
        assert all(len(o.token_ids) > 0 and o.finish_reason for out in outs for o in out.outputs)
        assert gpu.runtime.engine.pool.referenced == 0
        gpu.runtime.engine.check()


def test_layer_split_prompts_and_seeds() -> None:
    law = SamplingParams(max_tokens=16, temperature=1.0, seed=9)
    with LLM(dtype="float32", device="cuda", memory="4GiB", techniques=["schedule=layered(groups=3,least=2)"]) as gpu:
        split = [o.outputs[0].token_ids for o in gpu.generate(PROMPTS, law)]
    with LLM(dtype="float32", device="cuda", memory="4GiB") as gpu:
        assert [o.outputs[0].token_ids for o in gpu.generate(PROMPTS, law)] == split


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab(device="cuda")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("text", [f"{s}={name}" for s in SLOTS if SLOTS[s].inside for name in names(s)])
def test_a_technique_conforms(lab: Lab, text: str) -> None:
    slot, _, name = text.partition("=")
    results = list(conform(lab, slot, name))
    assert len(results) >= 6
    assert [f"{r.test}: {r.text}" for r in results if not r.ok] == []
