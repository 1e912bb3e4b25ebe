"""Random weights as a checkpoint that every engine reads: safetensors, config.json, and a tokenizer of bytes.

The weights are those of `--load random`, rounded to bf16.  No engine is asked for text, but some want a tokenizer to start.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.models import load_config
from weft.models.families import families, read
from weft.models.layout import weights_bytes
from weft.models.spec import DecoderSpec

SEED = 0
SPARE_BYTES = 2 << 30
SPECIAL = "<|end|>"


def drawn(config: Path, folder: Path, tick: Callable[[str], None] = lambda text: None) -> Path:
    """`folder`, with a checkpoint of the shape in it; written where it is not there yet.

    Raises ConfigError for a shape that weft can't read, or a disk too full.
    """
    done = folder / "drawn.json"
    wanted: dict[str, Any] = {"seed": SEED, "config": load_config(config)}
    if done.is_file() and json.loads(done.read_text(encoding="utf8")) == wanted:
        return folder
    spec = read(wanted["config"])
    size = weights_bytes(spec, "bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise ConfigError(f"{folder} has {free / 1e9:.1f} GB free, and the weights take {size / 1e9:.1f} GB")
    tick(f"drawing {size / 1e9:.1f} GB of weights")
    config_json = {**wanted["config"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config_json, indent=1), encoding="utf8")
    _write_tokenizer(folder, spec.vocab)
    _write_weights(folder / "model.safetensors", spec)
    done.write_text(json.dumps(wanted), encoding="utf8")
    return folder


def _write_weights(path: Path, spec: DecoderSpec) -> None:
    import torch
    from safetensors.torch import save_file

    from weft.models.weights import allocate, randomize

    _, fused = allocate(spec, torch.bfloat16, torch.device("cpu"))
    randomize(spec, fused, SEED)
    tensors = {}
    for part in families()[spec.family].parts(spec):
        source = fused[part.target] if part.expert is None else fused[part.target][part.expert]
        tensors[part.name] = source[part.first : part.first + part.shape[0]]
    unfinished = path.with_suffix(".part")
    # Parts of one fused tensor lie in one storage, which the format does not take.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """Bytes, and one special token; ids above are no token's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if vocab < 257:
        raise ConfigError(f"the vocabulary has {vocab} entries, and a tokenizer of bytes takes 257")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL, "pad_token": SPECIAL,
        "model_max_length": 1 << 20,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf8")
