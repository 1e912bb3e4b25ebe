"""`--kv`: in which numbers keys and values are stored, beside the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weft import LLM, SamplingParams
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Setup, prepare

PROMPT = "The captain looked at the sea for a long time, and then he said: I have never seen"
PARAMS = SamplingParams(max_tokens=24, temperature=0, prompt_logprobs=0)


def setup_of(bundled: Path, **given: Any) -> Setup:
    return prepare(EngineConfig(model=bundled, **given))


def laws(bundled: Path, **given: Any) -> list[float]:
    """Log-probabilities of the prompt's tokens, computed in chunks, so that most of what is read was stored before."""
    with LLM(bundled, dtype="float32", max_num_batched_tokens=4, max_model_len=256, **given) as llm:
        (output,) = llm.generate([PROMPT], PARAMS)
    assert output.prompt_logprobs is not None
    return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry]


@pytest.mark.parametrize("ops", ["ref", "cpu"])
def test_half_the_bits_hold_half_the_bytes_and_nearly_the_same_laws(bundled: Path, ops: str) -> None:
    full, half = (setup_of(bundled, dtype="float32", kv=kv) for kv in ("auto", "bf16"))
    assert (full.kv_name, half.kv_name, half.dtype) == ("float32", "bfloat16", "float32")
    assert half.plan.kv_bytes_per_token * 2 == full.plan.kv_bytes_per_token
    exact, wide, narrow = (laws(bundled, ops=ops, kv=kv) for kv in ("auto", "fp32", "bf16"))
    assert wide == exact
    apart = [abs(a - b) for a, b in zip(exact, narrow, strict=True)]
    assert 0 < max(apart) < 0.1
    assert sum(apart) / len(apart) < 0.02


def test_bytes_are_the_technique(bundled: Path) -> None:
    named = setup_of(bundled, kv="int8")
    assert named.kv_name == "kv.store=int8"
    assert named.plan.kv_bytes == setup_of(bundled, techniques=["kv.store=int8"]).plan.kv_bytes
    assert laws(bundled, kv="int8") == laws(bundled, techniques=["kv.store=int8"])


def test_a_format_that_cannot_be_says_so(bundled: Path) -> None:
    for given, said in (
        ({"kv": "int4"}, "--kv is auto, float32, bfloat16 or int8, got 'int4'"),
        ({"kv": "fp16"}, "float16 runs on a GPU only"),
        ({"kv": "int8", "techniques": ["kv.store=int8"]}, "both say how keys and values are stored"),
        ({"kv": "bf16", "techniques": ["kv.store=int8"]}, "both say how keys and values are stored"),
    ):
        with pytest.raises(ConfigError, match=said):
            setup_of(bundled, device="cpu", **given)
