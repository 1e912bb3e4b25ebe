"""Rounding to the K types, which the `gguf` package reads and does not write: each group on the grid that just holds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from tools.to_gguf import named, write


def _pack_sixes(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Two times 8 numbers of 6 bits in 12 bytes."""
    low = lambda x: x[:, :4] | (x[:, 4:] >> 4) << 6
    return np.concatenate([low(scales), low(minima), scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], axis=1)


def _runs(q: np.ndarray, run: int) -> np.ndarray:
    """Pairs of runs of values as low and high nibbles."""
    pairs = q.reshape(len(q), -1, 2, run)
    return (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(len(q), -1)


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _whole(x: np.ndarray, top: int, low: int = 0) -> np.ndarray:
    return np.clip(np.rint(x), low, top)


def _offsets(values: np.ndarray, bits: int) -> np.ndarray:
    """Q4_K and Q5_K."""
    top = (1 << bits) - 1
    groups = values.reshape(-1, 8, 32).astype(np.float32)
    low = np.minimum(groups.min(-1), 0)
    step = (groups.max(-1).clip(0) - low) / top
    d, e = (x.max(-1, keepdims=True).clip(1e-8) / 63 for x in (step, -low))
    d, e = (x.astype(np.float16).astype(np.float32) for x in (d, e))
    scales, minima = _whole(step / d, 63), _whole(-low / e, 63)
    step, low = (d * scales)[..., None], (-e * minima)[..., None]
    q = _whole((groups - low) / np.where(step == 0, 1, step), top).astype(np.uint8)
    head = [_half(d), _half(e), _pack_sixes(scales.astype(np.uint8), minima.astype(np.uint8))]
    if bits == 5:
        head.append(np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1))
    return np.concatenate([*head, _runs(q, 32)], axis=1)


def _q6(values: np.ndarray) -> np.ndarray:
    groups = values.reshape(-1, 16, 16).astype(np.float32)
    step = np.abs(groups).max(-1) / 31
    d = (step.max(-1, keepdims=True).clip(1e-8) / 127).astype(np.float16).astype(np.float32)
    scales = _whole(step / d, 127)
    grid = (d * scales)[..., None]
    q = (_whole(groups / np.where(grid == 0, 1, grid), 31, -32) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    upper = np.bitwise_or.reduce((q >> 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2)
    nibbles = _runs(q.reshape(len(q), -1), 64)
    return np.concatenate([nibbles, upper.reshape(len(q), -1), scales.astype(np.int8).view(np.uint8), _half(d)], axis=1)


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """A matrix [N, K] as bytes [N, bytes of a row]."""
    blocks = _q6(values) if kind == "Q6_K" else _offsets(values, 4 if kind == "Q4_K" else 5)
    return np.ascontiguousarray(blocks).reshape(len(values), -1)


def mixed(bundled: Path, path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The bundled model with K types in the places where llama.cpp's usual mixture (Q4_K_M) has them; Q5_K on one matrix."""
    stored = named(
        {k: v.float().numpy() for k, v in load_file(bundled / "model.safetensors").items()}, "llama",
        json.loads((bundled / "config.json").read_text()),
    )  # fmt: skip
    raw = {}
    for name, values in stored.items():
        if values.ndim == 2:
            kind = "Q6_K" if name == "token_embd.weight" or "attn_v" in name or "ffn_down" in name else "Q4_K"
            kind = "Q5_K" if name == "blk.1.ffn_up.weight" else kind
            raw[name] = kind, rounded(values, kind)
    write(bundled, path, raw=raw)
    return raw
