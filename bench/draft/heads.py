"""Heads and prompt tokens of the bundled model, widened as `tools.grow` widens the model: the same guesses, at the cost of its
shape."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.contender import ROOT, Model
from weft.draft import prompt_tokens
from weft.draft._weights import marked
from weft.draft.clover import BUNDLED, KIND
from weft.models import load_spec

FOLDER = ROOT / ".cache" / "heads"


def heads_file(name: str) -> Path:
    return BUNDLED if name == "bundled" else Path(name)


def fitted(file: Path, model: Model) -> Path:
    """A file of heads, or of prompt tokens, that do on a grown model what `file` does on the bundled one; itself where no
    channel is added.

    The first channels of the grown model's states are the bundled model's, and all others are zero.  Its final norm counts them
    all, so what the heads write is larger by the root of the ratio of widths.
    """
    tensors, spec = load_file(file), load_spec(model.folder)
    old = tensors["mark"].shape[1]
    if spec.width == old:
        return file
    more = spec.width - old
    for name in {"in", "token", "soft", "mark"} & set(tensors):
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, more))
    assert len(marked(spec.vocab)) == len(tensors["mark"])
    FOLDER.mkdir(parents=True, exist_ok=True)
    if "soft" in tensors:
        path = FOLDER / f"{file.stem}-{len(tensors['soft'])}-{spec.width}.safetensors"
        save_file(tensors, path, {"kind": prompt_tokens.KIND.name, "vocab": str(spec.vocab)})
        return path
    out = tensors["out"].float() * (spec.width / old) ** 0.5
    tensors["out"] = torch.nn.functional.pad(out, (0, 0, 0, more)).to(tensors["in"].dtype)
    path = FOLDER / f"{file.stem}-{tensors['augment.q'].shape[0]}-{spec.width}.safetensors"
    save_file(tensors, path, {"kind": KIND.name, "vocab": str(spec.vocab)})
    return path
