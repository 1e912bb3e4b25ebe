"""OpenVINO GenAI with continuous batching: its pipeline in this process, step by step, prefix cache off.

The checkpoint is exported by optimum-intel: fp16 for 16 bits, int8 for 8, int4 in groups of 32 for 4, of the head and
the embedding too, which it would leave in 8 bits if it were not told.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from bench.rivals.protocol import Loaded, Measured, main

EXPORTS = {
    "bf16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "32", "--ratio", "1.0", "--sym", "--all-layers"],
}
KINDS = {"bf16": "fp16", "int8": "int8", "int4": "int4, groups of 32, head too"}
MODEL = "openvino_model.xml"
CACHE_GB = 2


class OpenVino:
    def prepare(self, model: Path, format: str, cache: Path) -> None:
        folder = cache / format
        # It holds the options: with other ones it would be another model.
        done, options = folder / "exported", " ".join(EXPORTS[format])
        if done.is_file() and done.read_text(encoding="utf8") == options:
            return
        shutil.rmtree(folder, ignore_errors=True)
        export = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "-m", str(model)]
        export += ["--task", "text-generation-with-past", *EXPORTS[format], str(folder)]
        subprocess.run(export, check=True, stdin=subprocess.DEVNULL)
        done.write_text(options, encoding="utf8")

    def load(self, model: Path, format: str, cache: Path, threads: int, batch: int, length: int) -> Loaded:
        folder = cache / format
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = batch * length
        scheduler.max_num_seqs = batch
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self.next = 0
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(folder / MODEL), "CPU", properties)
        kept = str(compiled.get_property("KV_CACHE_PRECISION").get_type_name())
        computed = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        del compiled
        found = Loaded(
            version=importlib.metadata.version("openvino-genai"), kind=KINDS[format], kv_bytes=0.0,
            info={"openvino": openvino.get_version(), "computes_in": computed, "kv": kept},
        )  # fmt: skip
        keep(core.read_model(folder / MODEL), found)
        config = json.loads((model / "config.json").read_text(encoding="utf8"))
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        # Of 8 bits, a head's row has a scale and an offset in float32 too.
        row = dim * bits(kept) / 8 + (8 if bits(kept) == 8 else 0)
        found.kv_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * row
        return found

    def measure(self, prompts: list[list[int]], new: int) -> Measured:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        began = time.perf_counter()
        handles = []
        for prompt in prompts:
            self.next += 1
            ids = openvino.Tensor(np.asarray([prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.next, ids, config))
        tokens: list[list[int]] = [[] for _ in prompts]
        prefill_s, steps_s, last = 0.0, list[float](), began
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            fresh = [given(handle) for handle in handles]
            for mine, got in zip(tokens, fresh):
                mine += got
            now = time.perf_counter()
            if prefill_s:
                if all(len(got) == 1 for got in fresh):
                    steps_s.append(now - last)
            elif all(tokens):
                prefill_s = now - began
            last = now
        return Measured(prefill_s, steps_s, tokens)


def given(handle: openvino_genai.GenerationHandle) -> list[int]:
    """Tokens of a request since the last time that it was asked."""
    return [token for output in handle.read().values() for token in output.generated_ids] if handle.can_read() else []


def keep(model: openvino.Model, found: Loaded) -> None:
    """Count the model's constants, each that is used twice once.

    A constant belongs to the head if its name says so, or the embedding's where that is the head too; with it go its scales.
    """
    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    named = {op.get_friendly_name(): op for op in constants}
    head = "lm_head" if any("lm_head" in name for name in named) else "embed_tokens"
    seen: set[int] = set()
    for name, op in named.items():
        if "embed_tokens" in name and head == "lm_head":
            continue
        weights = math.prod(op.get_output_shape(0))
        address = op.data.ctypes.data if weights > 1 else 0
        if weights <= 1 or address in seen:
            continue
        seen.add(address)
        size = weights * bits(op.get_element_type().get_type_name()) // 8
        place = found.head if head in name else found.experts if re.search(r"\.experts[./]", name) else found.body
        # Scales and offsets are bytes of the weights that they belong to.
        place.add(0 if re.search(r"scale|zero_point", name) else weights, size)


def bits(type: str) -> int:
    """Of an element type, which has them in its name: f32, bf16, u4."""
    return int(re.sub(r"\D", "", type) or 8)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(OpenVino)
