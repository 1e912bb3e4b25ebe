"""GGUF files byte by byte, so that they can be wrong in any place; written from the specification alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 23: (256, 136), 30: (1, 2)}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, given: Any) -> bytes:
    """A value without its type; an array is (type of its values, values)."""
    if kind == STRING:
        return string(given)
    if kind == ARRAY:
        inner, values = given
        return struct.pack("<IQ", inner, len(values)) + b"".join(value(inner, v) for v in values)
    return struct.pack("<" + CODES[kind], given)


@dataclass
class Forge:
    """metadata: (key, type, value).  tensors: (name, dims fastest first, type, bytes, or None for zeros)."""

    metadata: list[tuple[str | bytes, int, Any]] = field(default_factory=list)
    tensors: list[tuple[str, tuple[int, ...], int, bytes | None]] = field(default_factory=list)
    alignment: int = 32
    version: int = 3
    magic: bytes = b"GGUF"

    def bytes(self) -> bytes:
        head = self.magic + struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata))
        for key, kind, given in self.metadata:
            head += string(key) + struct.pack("<I", kind) + value(kind, given)
        data = b""
        for name, dims, kind, given in self.tensors:
            block, size = SIZES[kind]
            count = size
            for dim in dims:
                count *= dim
            own = bytes(count // block) if given is None else given
            head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
            data += own + bytes(-len(own) % self.alignment)
        return head + bytes(-len(head) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path

    def set(self, key: str, kind: int, given: Any) -> Forge:
        """A key's value, in the place of the one it had."""
        self.metadata = [m for m in self.metadata if m[0] != key] + [(key, kind, given)]
        return self

    def drop(self, name: str) -> Forge:
        """Without a key or a tensor."""
        self.metadata = [m for m in self.metadata if m[0] != name]
        self.tensors = [t for t in self.tensors if t[0] != name]
        return self


def model(architecture: str = "llama", vocab: int = 12, width: int = 32, inner: int = 64, heads: int = 4) -> Forge:
    """A whole model of one layer and its tokenizer, small enough that every byte of it can be changed."""
    a = architecture
    forge = Forge(
        [
            ("general.architecture", STRING, a),
            (f"{a}.context_length", U32, 64),
            (f"{a}.embedding_length", U32, width),
            (f"{a}.block_count", U32, 1),
            (f"{a}.feed_forward_length", U32, inner),
            (f"{a}.attention.head_count", U32, heads),
            (f"{a}.attention.head_count_kv", U32, heads // 2),
            (f"{a}.attention.layer_norm_rms_epsilon", F32, 1e-5),
            (f"{a}.rope.freq_base", F32, 500.0),
            ("tokenizer.ggml.model", STRING, "gpt2"),
            ("tokenizer.ggml.pre", STRING, "gpt-2"),
            ("tokenizer.ggml.tokens", ARRAY, (STRING, [*"abcdeĠ", "ab", "abc", "Ġa", "<s>", "</s>", "<own>"])),
            ("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 9 + [3, 3, 4])),
            ("tokenizer.ggml.merges", ARRAY, (STRING, ["a b", "ab c", "Ġ a"])),
            ("tokenizer.ggml.bos_token_id", U32, 9),
            ("tokenizer.ggml.eos_token_id", U32, 10),
            ("tokenizer.ggml.add_bos_token", BOOL, True),
            ("tokenizer.chat_template", STRING, "{{ messages[0].content }}"),
        ]
    )
    kv = width // 2
    forge.tensors = [
        ("token_embd.weight", (width, vocab), 8, None),
        ("output_norm.weight", (width,), 0, None),
        ("blk.0.attn_norm.weight", (width,), 0, None),
        ("blk.0.ffn_norm.weight", (width,), 0, None),
        ("blk.0.attn_q.weight", (width, width), 8, None),
        ("blk.0.attn_k.weight", (width, kv), 2, None),
        ("blk.0.attn_v.weight", (width, kv), 1, None),
        ("blk.0.attn_output.weight", (width, width), 2, None),
        ("blk.0.ffn_gate.weight", (width, inner), 2, None),
        ("blk.0.ffn_up.weight", (width, inner), 2, None),
        ("blk.0.ffn_down.weight", (inner, width), 8, None),
    ]
    return forge
