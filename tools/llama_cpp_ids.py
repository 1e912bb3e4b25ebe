"""Greedy tokens of the bundled model by llama.cpp, which tests/gguf/test_rival.py holds weft to:

    python -m tools.llama_cpp_ids

It needs the package llama-cpp-python (0.3 or later, in any environment that also has gguf, torch and safetensors), writes the
bundled model as an F32 GGUF file, and keeps prompts, their ids and the ids after them in tests/gguf/llama_cpp.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tools.to_gguf import write

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "weft" / "bundled" / "tiny"
TARGET = ROOT / "tests" / "gguf" / "llama_cpp.json"
PROMPTS = (
    "The sea was",
    "It rained, and the old man",
    "<|user|>\nTell me about the sea.<|end|>\n<|assistant|>\n",
    "Once upon a time there was a small dog who wanted to see the world. One morning he",
)
NEW = 48
FLOAT32 = 0
"""ggml's number of the type, for keys and values: llama.cpp's own choice, float16, would be another model's cache."""


def ids(path: Path) -> list[dict[str, Any]]:
    """For each prompt: its text, its ids, and NEW greedy ids after it."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=512, n_threads=1, n_gpu_layers=0, type_k=FLOAT32, type_v=FLOAT32, verbose=False)
    found = []
    for text in PROMPTS:
        prompt = model.tokenize(text.encode(), add_bos=False, special=True)
        model.reset()
        after = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        found.append({"text": text, "prompt": prompt, "ids": [next(after) for _ in range(NEW)]})
    return found


def main() -> None:
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write(BUNDLED, path)
        found = {"llama_cpp_python": llama_cpp.__version__, "answers": ids(path)}
    TARGET.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{TARGET.relative_to(ROOT)}: {len(found['answers'])} prompts")


if __name__ == "__main__":
    main()
