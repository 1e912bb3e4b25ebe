"""Makes the checkpoints in this folder, with the packages whose formats they have; run it where those are installed.

    python tests/models/packed/make.py awq|gptq|gptqmodel|compressed-tensors|dense
    weft convert tests/models/packed/dense FOLDER --weights FORMAT
    python tests/models/packed/make.py written NAME FOLDER

Each NAME/ is a whole checkpoint of a Llama of one layer with random weights, and NAME/expected.safetensors has every packed
weight as the package itself reads it back.  dense/ has a model that nobody rounded, and beside it NAME.safetensors the weights
that transformers and compressed-tensors read from what `weft convert` made of it.  Packages and versions stand in the
metadata of the files.

    pip install torch==2.13.0 transformers compressed-tensors pydantic loguru
    pip install --no-deps --no-build-isolation autoawq==0.2.9 auto-gptq==0.7.1 gptqmodel==7.7.0
    pip install pypcre logbar device-smi tokenicer defuser threadpoolctl torchao pillow protobuf requests  # gptqmodel

Their tops need more than the packing does, so `bare` imports a package without its __init__.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
Tensors = dict[str, torch.Tensor]
Pack = Callable[[str, torch.nn.Linear], tuple[Tensors, torch.Tensor]]
"""(name, layer) to (its stored tensors, the weight [N, K] as the package reads it back)."""


def llama(dtype: torch.dtype, tied: bool = False) -> Any:
    torch.manual_seed(11)
    config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=256, tie_word_embeddings=tied, **SIZES)
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # weights of uneven columns, as trained ones have
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(torch.rand(weight.shape[1]) + 0.5)
            else:
                weight.add_(torch.randn(weight.shape).to(dtype) * 0.1)
            assert name
    return model


def write(name: str, config: dict[str, Any], tensors: Tensors, expected: Tensors, package: str) -> None:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    metadata = {"format": "pt", "package": package, "version": importlib.metadata.version(package)}
    whole = lambda found: {key: value.contiguous().clone() for key, value in sorted(found.items())}
    save_file(whole(tensors), folder / "model.safetensors", metadata)
    save_file(whole(expected), folder / "expected.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf8")


def replaced(name: str, quantization: dict[str, Any], pack: Pack, package: str) -> None:
    """A checkpoint whose linear layers, head apart, are stored as `pack` has it."""
    model = llama(torch.float16)
    tensors, expected = dict(model.state_dict()), {}
    for key, layer in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, torch.nn.Linear):
            del tensors[f"{key}.weight"]
            found, read = pack(key, layer)
            tensors |= {f"{key}.{tail}": value for tail, value in found.items()}
            expected[f"{key}.weight"] = read
    config = {**model.config.to_dict(), "quantization_config": quantization}
    write(name, config, tensors, expected, package)


def bare(name: str) -> None:
    found = importlib.util.find_spec(name)
    assert found is not None, f"{name} is not installed"
    module = types.ModuleType(name)
    module.__path__ = list(found.submodule_search_locations or ())
    sys.modules[name] = module


def awq() -> None:
    bare("awq")
    bare("awq.models")
    config = importlib.import_module("awq.models._config").AwqConfig(q_group_size=32)
    gemm = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    packing = importlib.import_module("awq.utils.packing_utils")

    def pack(key: str, layer: torch.nn.Linear) -> tuple[Tensors, torch.Tensor]:
        grouped = layer.weight.detach().reshape(-1, 32)  # the grid of the paper's zero_point quantization
        high, low = grouped.amax(1, keepdim=True), grouped.amin(1, keepdim=True)
        scales = (high - low).clamp(min=1e-5) / 15
        zeros = (-torch.round(low / scales)).clamp_(0, 15)
        grid = (torch.clamp(torch.round(grouped / scales) + zeros, 0, 15) - zeros) * scales
        rounded = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float16)
        rounded.weight.data = grid.view_as(layer.weight)
        by_group = lambda x: x.view(layer.out_features, -1).t().contiguous()
        q = gemm.from_linear(rounded, 4, 32, scales=by_group(scales), zeros=by_group(zeros))
        read = packing.dequantize_gemm(q.qweight, q.qzeros, q.scales, 4, 32).t()
        return dict(q.state_dict()), read

    replaced("awq", config.to_transformers_dict(), pack, "autoawq")


def gptq() -> None:
    bare("auto_gptq")
    bare("auto_gptq.quantization")
    layers = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda_old").QuantLinear
    grids = importlib.import_module("auto_gptq.quantization.quantizer").Quantizer
    for name, bits, group, sym in (("gptq", 4, 32, True), ("gptq-zeros", 4, 64, False), ("gptq-8", 8, -1, True)):

        def pack(key: str, layer: torch.nn.Linear, bits=bits, group=group, sym=sym) -> tuple[Tensors, torch.Tensor]:
            size = layer.in_features if group == -1 else group
            scales, zeros = [], []
            for first in range(0, layer.in_features, size):
                grid = grids()
                grid.configure(bits, perchannel=True, sym=sym)
                grid.find_params(layer.weight.detach()[:, first : first + size].float(), weight=True)
                scales.append(grid.scale)
                zeros.append(grid.zero)
            q = layers(bits, group, layer.in_features, layer.out_features, False, weight_dtype=torch.float16)
            index = torch.arange(layer.in_features, dtype=torch.int32) // size
            scale = torch.cat(scales, 1).half().float()
            q.pack(layer.half(), scale, torch.cat(zeros, 1), index)
            q.scales = q.scales.half()
            return dict(q.state_dict()), q(torch.eye(layer.in_features, dtype=torch.float16)).detach().t()

        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False}
        config |= {"static_groups": False, "true_sequential": True, "damp_percent": 0.01, "checkpoint_format": "gptq"}
        replaced(name, config, pack, "auto-gptq")


def gptqmodel() -> None:
    sys.modules["pyarrow"] = types.ModuleType("pyarrow")  # only data sets need it
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.gptq import GPTQ, QuantizeConfig

    for name, act in (("gptq-v2", False), ("gptq-act-order", True)):
        settings = QuantizeConfig(bits=4, group_size=32, sym=False, desc_act=act, format="gptq_v2")

        def pack(key: str, layer: torch.nn.Linear, act=act, settings=settings) -> tuple[Tensors, torch.Tensor]:
            task = GPTQ(layer, settings)
            task.quantizer.configure(perchannel=True)
            torch.manual_seed(5)
            inputs = torch.randn(64, layer.in_features) * torch.linspace(0.1, 2, layer.in_features)
            task.add_batch(inputs.half(), torch.zeros(64, layer.out_features).half(), batch_index=0)
            found = task.quantize()
            weight, scales, zeros, index = found[0], found[1], found[2], found[3]
            rounded = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float16)
            rounded.weight.data = weight.half()
            q = TorchLinear(4, 32, False, act, layer.in_features, layer.out_features)
            q.pack(rounded, scales, zeros, index.int())
            q.qzero_format(format=2)
            kept = {tail: getattr(q, tail) for tail in ("qweight", "qzeros", "scales", "g_idx")}
            return kept, q.dequantize_weight().t()

        config = settings.to_dict()
        config["meta"].pop("offload_to_disk_path", None)
        replaced(name, config, pack, "gptqmodel")


def compressed() -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    cases: dict[str, tuple[dict[str, Any], list[str]]] = {
        "packed": ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}, ["Linear"]),
        "packed-zeros": ({"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}, ["Linear"]),
        "packed-rows": ({"num_bits": 4, "strategy": "channel", "symmetric": False}, ["re:.*self_attn.*", "re:.*mlp.*"]),
        "bytes": ({"num_bits": 8, "strategy": "channel", "symmetric": True}, ["Linear"]),
        "packed-8": ({"num_bits": 8, "strategy": "channel", "symmetric": True}, ["Linear", "Embedding"]),
    }
    for name, (weights, targets) in cases.items():
        model = llama(torch.bfloat16, tied=False)
        group: dict[str, Any] = {"targets": targets, "weights": weights}
        ignore = [] if "Embedding" in targets else ["lm_head"]
        layout = "int-quantized" if name == "bytes" else "pack-quantized"
        group["format"] = layout
        given = {"config_groups": {"group_0": group}, "ignore": ignore, "format": layout}
        apply_quantization_config(model, QuantizationConfig.model_validate(given))
        for layer in model.modules():
            scheme = getattr(layer, "quantization_scheme", None)
            if scheme is not None:
                size = scheme.weights.group_size if scheme.weights.strategy == "group" else layer.weight.shape[1]
                grouped = layer.weight.detach().view(layer.weight.shape[0], -1, size)
                scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
                layer.weight_scale.data = scale.to(layer.weight_scale.dtype)
                if hasattr(layer, "weight_zero_point"):
                    layer.weight_zero_point.data = zero.to(layer.weight_zero_point.dtype)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        tensors = {key: value.detach() for key, value in model.state_dict().items()}
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        model.config.to_json_file(folder / "config.json", use_diff=False)
        compressor.update_config(str(folder))
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        compressor.decompress_model(model)
        packed = {key.removesuffix("_scale") for key in tensors if key.endswith(".weight_scale")}
        expected = {key: value.detach() for key, value in model.state_dict().items() if key in packed}
        write(name, config, tensors, expected, "compressed-tensors")


def dense() -> None:
    model = llama(torch.bfloat16, tied=True)
    tensors = {key: value.detach() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    write("dense", model.config.to_dict(), tensors, {}, "transformers")
    (HERE / "dense" / "expected.safetensors").unlink()


def written() -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    _, _, name, folder = sys.argv
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    found = {key: value.detach().clone() for key, value in model.state_dict().items() if value.dim() == 2}
    metadata = {"package": "compressed-tensors", "version": importlib.metadata.version("compressed-tensors")}
    found.pop("lm_head.weight")
    half = {key: value.half() for key, value in found.items()}
    assert all(torch.equal(half[key].float(), value) for key, value in found.items())
    save_file(half, HERE / "dense" / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    {
        "awq": awq,
        "gptq": gptq,
        "gptqmodel": gptqmodel,
        "compressed-tensors": compressed,
        "dense": dense,
        "written": written,
    }[sys.argv[1]]()
