"""llama.cpp, driven through its batch API: one `llama_decode` for all prompts, then one a step for all sequences.

The weights become a GGUF by the `gguf` package and are rounded by llama.cpp itself, all matrices to one type (`pure`): head and
embedding too, as weft does it.  Tokens are the largest logits, found by numpy; llama.cpp's Python sampler is not used.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from bench.rivals.protocol import Loaded, Measured, main

TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}  # fmt: skip
CELL_ALIGN = 256
"""Positions that a sequence's cache is rounded up to."""


class LlamaCpp:
    def prepare(self, model: Path, format: str, cache: Path) -> None:
        plain = cache / "BF16.gguf"
        if not plain.exists():
            write_gguf(model, plain)
        wanted = cache / f"{TYPES[format]}.gguf"
        if not wanted.exists():
            round_gguf(plain, wanted, f"LLAMA_FTYPE_MOSTLY_{TYPES[format]}")

    def load(self, model: Path, format: str, cache: Path, threads: int, batch: int, length: int) -> Loaded:
        llama_cpp.llama_backend_init()
        path = cache / f"{TYPES[format]}.gguf"
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = batch * -(-length // CELL_ALIGN) * CELL_ALIGN
        params.n_batch = batch * length
        params.n_threads = params.n_threads_batch = threads
        params.n_outputs_max, params.n_outputs_max_per_seq = batch, 1
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.prompts = Batch(batch * length)
        self.step = Batch(batch)
        config = json.loads((model / "config.json").read_text(encoding="utf8"))
        found = Loaded(
            version=llama_cpp.__version__, kind=TYPES[format], kv_bytes=kv_bytes(config),
            info={"system": llama_cpp.llama_print_system_info().decode(), "kv": "f16", "ubatch": params.n_ubatch},
        )  # fmt: skip
        keep(path, found)
        return found

    def measure(self, prompts: list[list[int]], new: int) -> Measured:
        llama_cpp.llama_memory_clear(self.memory, False)
        count, length = len(prompts), len(prompts[0])
        began = time.perf_counter()
        batch = self.prompts
        batch.tokens[: count * length] = np.asarray(prompts, dtype=np.int32).reshape(-1)
        batch.positions[: count * length] = np.tile(np.arange(length, dtype=np.int32), count)
        batch.wanted[: count * length] = 0
        batch.wanted[length - 1 : count * length : length] = 1
        batch.owned_by(np.repeat(np.arange(count), length))
        last = self.best(batch, count * length, count)
        prefill_s = time.perf_counter() - began
        tokens, steps_s = [last], []
        step = self.step
        step.wanted[:count] = 1
        step.owned_by(np.arange(count))
        for at in range(length, length + new - 1):
            began = time.perf_counter()
            step.tokens[:count] = last
            step.positions[:count] = at
            last = self.best(step, count, count)
            steps_s.append(time.perf_counter() - began)
            tokens.append(last)
        return Measured(prefill_s, steps_s, np.stack(tokens, axis=1).tolist())

    def best(self, batch: Batch, rows: int, outputs: int) -> np.ndarray[Any, Any]:
        """Compute a batch; the largest logit's token of each row that has an output."""
        batch.raw.n_tokens = rows
        status = llama_cpp.llama_decode(self.context, batch.raw)
        if status != 0:
            raise RuntimeError(f"llama_decode gives {status}")
        logits = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (outputs, self.vocab)).argmax(axis=1).astype(np.int32)


class Batch:
    """A `llama_batch` of at most `rows` tokens, each of one sequence, as arrays.  wanted: 1 for a row whose logits are read."""

    def __init__(self, rows: int) -> None:
        self.raw = llama_cpp.llama_batch_init(rows, 0, 1)
        self.tokens = np.ctypeslib.as_array(self.raw.token, (rows,))
        self.positions = np.ctypeslib.as_array(self.raw.pos, (rows,))
        self.wanted = np.ctypeslib.as_array(self.raw.logits, (rows,))
        np.ctypeslib.as_array(self.raw.n_seq_id, (rows,))[:] = 1

    def owned_by(self, sequences: np.ndarray[Any, Any]) -> None:
        for row, sequence in enumerate(sequences.tolist()):
            self.raw.seq_id[row][0] = sequence


def keep(path: Path, found: Loaded) -> None:
    """Count the file's tensors; an embedding that is no head is looked up, not read."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    for name, tensor in tensors.items():
        if name == head:
            found.head.add(int(tensor.n_elements), int(tensor.n_bytes))
        elif "_exps." in name:
            found.experts.add(int(tensor.n_elements), int(tensor.n_bytes))
        elif name != "token_embd.weight":
            found.body.add(int(tensor.n_elements), int(tensor.n_bytes))


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_bytes(config: Mapping[str, Any]) -> float:
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim(config)


# ---------------------------------------------------------------------------------------------- the checkpoint as a GGUF


def round_gguf(source: Path, out: Path, type: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, type)
    params.pure = True
    params.nthread = len(os.sched_getaffinity(0))
    part = out.with_suffix(".part")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize gives {status}")
    os.replace(part, out)


def write_gguf(folder: Path, out: Path) -> None:
    """A checkpoint in bf16 as a GGUF without a vocabulary: matrices in bf16, vectors in float32, as llama.cpp wants them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    architecture = ARCHITECTURES[config["model_type"]]
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
    describe(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in grouped(folder / "model.safetensors", config):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise RuntimeError(f"a GGUF has no place for {name}")
        if tensor.ndim == 1:
            writer.add_tensor(target, (tensor.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(
                target, np.ascontiguousarray(tensor).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, scaling))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, out)


def describe(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def grouped(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The tensors by name, as 16-bit words; a layer's experts stacked, rows of Llama's queries and keys as GGUF turns them."""
    tensors = safetensors(path)
    experts = config.get("num_experts", 0)
    for name, tensor in tensors.items():
        if ".experts." in name:
            layer, _, rest = name.partition(".experts.")
            expert, _, kind = rest.partition(".")
            if expert == "0":
                yield (
                    f"{layer}.experts.{kind}",
                    np.stack([tensors[f"{layer}.experts.{at}.{kind}"] for at in range(experts)]),
                )
        elif config["model_type"] in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
            yield name, halves.swapaxes(1, 2).reshape(tensor.shape)
        else:
            yield name, tensor


def safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Views of the file's bf16 tensors as 16-bit words."""
    with open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    size = int.from_bytes(mapped[:8], "little")
    found = {}
    for name, entry in json.loads(bytes(mapped[8 : 8 + size])).items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise RuntimeError(f"{name} is {entry['dtype']}, not BF16")
            start, stop = (8 + size + at for at in entry["data_offsets"])
            found[name] = np.frombuffer(mapped[start:stop], np.uint16).reshape(entry["shape"])
    return found


def llama3_factors(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What Llama 3.1 divides each rotary frequency by: long waves by `factor`, short ones by 1, and between them in between."""
    dim = head_dim(config)
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wave - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


if __name__ == "__main__":
    main(LlamaCpp)
