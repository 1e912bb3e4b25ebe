"""vLLM on a CPU: its engine in this process, step by step, prefix cache off."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from bench.rivals.protocol import Loaded, Measured, main

SPARE_ROWS = 64


class Vllm:
    def prepare(self, model: Path, format: str, cache: Path) -> None:
        if format != "bf16":
            raise ValueError(f"this driver measures bf16, not {format}")

    def load(self, model: Path, format: str, cache: Path, threads: int, batch: int, length: int) -> Loaded:
        self.llm = LLM(
            model=str(model), dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False,
            max_model_len=length, max_num_seqs=batch, max_num_batched_tokens=batch * length + SPARE_ROWS,
            disable_log_stats=True,
        )  # fmt: skip
        self.engine = self.llm.llm_engine
        self.next = 0
        config = json.loads((model / "config.json").read_text(encoding="utf8"))
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        found = Loaded(
            version=vllm.__version__, kind="bf16",
            kv_bytes=2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * dim, info={"kv": "bf16"},
        )  # fmt: skip
        keep(model / "model.safetensors", found)
        return found

    def measure(self, prompts: list[list[int]], new: int) -> Measured:
        params = SamplingParams(
            temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        began = last = time.perf_counter()
        tokens: dict[str, list[int]] = {}
        for prompt in prompts:
            self.next += 1
            tokens[str(self.next)] = []
            self.engine.add_request(str(self.next), {"prompt_token_ids": prompt}, params)
        prefill_s, steps_s = 0.0, list[float]()
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            got = [len(output.outputs[0].token_ids) for output in outputs if output.outputs]
            if not got:
                continue
            for output in outputs:
                tokens[output.request_id] += output.outputs[0].token_ids
            if prefill_s:
                # Between two steps that gave tokens, as a step may hand out what an earlier one began.
                if got == [1] * len(prompts):
                    steps_s.append(now - last)
            elif all(tokens.values()):
                prefill_s = now - began
            last = now
        return Measured(prefill_s, steps_s, list(tokens.values()))


def keep(path: Path, found: Loaded) -> None:
    """Count the checkpoint's tensors, which vLLM keeps in bf16 as they are."""
    with open(path, "rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = [name for name in header if name != "__metadata__"]
    head = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    for name in names:
        size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
        if name == head:
            found.head.add(size // 2, size)
        elif ".experts." in name:
            found.experts.add(size // 2, size)
        elif name != "model.embed_tokens.weight":
            found.body.add(size // 2, size)


if __name__ == "__main__":
    main(Vllm)
