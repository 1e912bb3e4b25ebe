"""A checkpoint's folder as one GGUF file:  python -m tools.to_gguf FOLDER OUT.gguf [--type Q8_0] [--pre gpt-2]

It is written by the `gguf` package (among the test tools), under the names and in the order of rows of llama.cpp's converter, so
that tests have files which weft's reader had no hand in.  Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE; tokenizers that are
byte-level BPE in a tokenizer.json.  Matrices are stored as F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1, the rest as F32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def write(
    folder: Path,
    target: Path,
    type: str = "F32",
    *,
    pre: str = "gpt-2",
    raw: Mapping[str, tuple[str, np.ndarray]] | None = None,
) -> None:
    """Write the folder's model (and its tokenizer, if it has a tokenizer.json).

    raw: tensors that are stored as these bytes of such a type, by their names in the file.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(target, architecture)
    shape(writer, architecture, config)
    if (folder / "tokenizer.json").is_file():
        tokenizer(writer, folder, pre)
    found = {name: values.float().numpy() for name, values in load_file(folder / "model.safetensors").items()}
    if config.get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    stored = named(found, architecture, config)
    divisors = llama3(config)
    if divisors is not None:
        stored["rope_freqs.weight"] = divisors
    for name, values in stored.items():
        if raw and name in raw:
            kind, given = raw[name]
            writer.add_tensor(name, given, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        kind = type if values.ndim > 1 and "ffn_gate_inp" not in name else "F32"
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shape(writer: Any, architecture: str, config: Mapping[str, Any]) -> None:
    """The keys that say how large the model is and how its positions turn."""
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window") and config["model_type"] == "mistral":
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "qwen3moe":
        writer.add_expert_count(config.get("num_local_experts", config.get("num_experts")))
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if rope.get("rope_type") in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key in ("beta_fast", "beta_slow"):
                if key in rope:
                    writer.add_float32(f"{architecture}.rope.scaling.yarn_{key}", rope[key])


def named(found: Mapping[str, np.ndarray], architecture: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors under their names in the file, experts of a layer in one, rows of Llama's queries and keys in pairs."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config.get("num_key_value_heads", config["num_attention_heads"]),
    }
    stored: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in found.items():
        stem, _, kind = name.rpartition(".")
        if stem in OUTER:
            stored[f"{OUTER[stem]}.{kind}"] = values
            continue
        _, _, layer, inner = stem.split(".", 3)
        if inner.startswith("mlp.experts."):
            _, _, index, part = inner.split(".")
            experts.setdefault(f"blk.{layer}.{EXPERTS[part]}.{kind}", {})[int(index)] = values
            continue
        part = INNER[inner]
        if architecture == "llama" and part in heads:
            count, rest = heads[part], values.shape[1:]
            values = values.reshape(count, 2, values.shape[0] // count // 2, *rest).swapaxes(1, 2).reshape(values.shape)
        stored[f"blk.{layer}.{part}.{kind}"] = values
    for name, each in experts.items():
        stored[name] = np.stack([each[index] for index in range(len(each))])
    return stored


def llama3(config: Mapping[str, Any]) -> np.ndarray | None:
    """What each frequency is divided by under Llama 3.1's rule; None under another."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return None
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    divisors = []
    for pair in range(dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / dim)
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(rope["factor"])
        else:
            turns = rope["original_max_position_embeddings"] / wavelength
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1.0 / ((1.0 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def tokenizer(writer: Any, folder: Path, pre: str) -> None:
    """Byte-level BPE, chat template, ends, and the sampling that generation_config.json asks for."""
    read = lambda name: json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    file, settings, generation = read("tokenizer.json"), read("tokenizer_config.json"), read("generation_config.json")
    added = {token["id"]: token for token in file["added_tokens"]}
    texts = {i: text for text, i in file["model"]["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(max(texts) + 1)]
    kinds = [NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED for i in range(len(tokens))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    ids = {text: i for i, text in texts.items()}
    for role in ("bos", "eos", "pad"):
        if settings.get(f"{role}_token") in ids:
            getattr(writer, f"add_{role}_token_id")(ids[settings[f"{role}_token"]])
    writer.add_add_bos_token(bool(settings.get("add_bos_token")))
    if (folder / "chat_template.jinja").is_file():
        writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, key in (("temperature", "temp"), ("top_p", "top_p")):
        if name in generation:
            writer.add_float32(f"general.sampling.{key}", generation[name])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.to_gguf", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint with config.json and model.safetensors")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--type", default="F32", help="of the matrices (default: F32)")
    parser.add_argument("--pre", default="gpt-2", help="how the tokenizer splits text, by GGUF's name (default: gpt-2)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    write(given.folder, given.target, given.type, pre=given.pre)
    print(f"{given.target}: {given.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
