"""The same file gives llama.cpp's greedy tokens, which `python -m tools.llama_cpp_ids` wrote down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from weft import LLM, SamplingParams

EXPECTED = Path(__file__).with_name("llama_cpp.json")


def test_greedy_tokens_are_those_of_llama_cpp(bundled_gguf: Callable[..., Path]) -> None:
    answers = json.loads(EXPECTED.read_text())["answers"]
    with LLM(bundled_gguf("F32"), threads=1, memory="600M", max_model_len=512) as llm:
        for answer in answers:
            params = SamplingParams(max_tokens=len(answer["ids"]), temperature=0, ignore_eos=True)
            found = llm.generate([answer["text"]], params)[0]
            assert found.prompt_token_ids == answer["prompt"]
            assert found.outputs[0].token_ids == answer["ids"], answer["text"]
