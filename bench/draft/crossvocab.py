"""draft=crossvocab beside no draft, with a draft whose tokenizer is another one.

python -m bench.draft.crossvocab [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.guessing import DRAFT, bound, compared
from bench.harness import Options, main
from weft.hub import resolve, resolve_draft

KNOWN = (3830, 1000, 300)
"""Merges of the draft's tokenizer; 3,830 are all of them."""
NOTES = (
    f"{DRAFT} Here it has a tokenizer of its own: ids by lot, and only the first so many merges of the bundled model's 3,830. "
    "With all of them every token is shared; with 1,000, 1,266 of 4,096, 0.82 of the tokens of "
    "held-out prose; with 300, 566 of them, 0.63. The rows of its embedding that are left are those that it was trained with.",
    "The same ids: draft=speculative_sampling with the draft as it is.",
    bound(4),
)


def foreign(folder: Path, merges: int, seed: int = 5) -> Path:
    """The bundled draft with another tokenizer: the first `merges` merges of the bundled model's, and ids by lot."""
    source, tiny = resolve_draft("bundled"), resolve(None)
    tokenizer = json.loads((tiny / "tokenizer.json").read_text(encoding="utf8"))
    model = tokenizer["model"]
    made = {"".join(pair) for pair in model["merges"][merges:]}
    model["merges"] = model["merges"][:merges]
    kept = {"".join(pair) for pair in model["merges"]}
    old = [i for text, i in model["vocab"].items() if text in kept or text not in made]
    random.Random(seed).shuffle(old)
    new = {i: at for at, i in enumerate(old)}
    model["vocab"] = {text: new[i] for text, i in model["vocab"].items() if i in new}
    for added in tokenizer["added_tokens"]:
        added["id"] = new[added["id"]]
    config = json.loads((source / "config.json").read_text(encoding="utf8"))
    config |= {key: new[config[key]] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config["vocab_size"] = len(old)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][torch.tensor(old)].contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf8")
    (folder / "tokenizer_config.json").write_bytes((tiny / "tokenizer_config.json").read_bytes())
    return folder


def measure(options: Options) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folders = {n: Path(place, str(n)) for n in KNOWN}
        for n, folder in folders.items():
            folder.mkdir()
            foreign(folder, n)
        cases = {f"{n} merges known": (f"draft=crossvocab(model={str(folder)!r})",) for n, folder in folders.items()}
        yield from compared(options, "crossvocab", {**cases, "the same ids": ("draft=speculative_sampling",)})


if __name__ == "__main__":
    sys.exit(main("draft=crossvocab", "bench.draft.crossvocab", measure, NOTES))
