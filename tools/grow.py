"""Grow a small trained model into a larger shape that computes the same function, so that cost and behaviour are both real.

    python -m tools.grow SOURCE OUT --shape qwen2.5-0.5b
    python -m tools.grow bundled OUT --layers 12 --width 512 --heads 8 --kv-heads 4 --intermediate 2048 --dtype float32

SOURCE is a checkpoint of the Llama family (or `bundled`).  Its head_dim, vocabulary, rotary embedding and tokenizer are kept.

How the function stays the same.  The source's channels are the first of the wider residual stream, and all others are zero
at every place.  So

    channels   whatever reads a new channel is random; whatever writes one is zero (of what is not zero itself)
    norms      a wide vector's mean square is the old one's times old/new: eps is multiplied by that, weights by its root
    heads      every new head is a copy of an old one; the copies of a query head share its output in powers of two, which is
               exact in every number format.  So a technique that weighs heads finds the heads of the source
    MLP        a new unit's up row reads new channels only: the unit gives zero, so its gate and its output are random
    layers     old ones stand evenly, the last at the end.  An added one has the heads of the old one after it and writes
               nothing: its output projection is zero, and its MLP has new units only

Zeros stand in the embedding, in the output projections, in the rows of down projections that write new channels from old
units, and in the columns of up projections that read old channels into new units: `zeros` counts them.

Widening and deepening that keep a network's function: Chen et al., Net2Net, arXiv:1511.05641.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.errors import ConfigError, EngineError
from weft.hub import resolve
from weft.models import load_config
from weft.models.families import read

DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
COPIED = ("tokenizer*", "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
          "merges.txt")  # fmt: skip
"""Files of the source that the result needs as they are."""
WEIGHTS = "model.safetensors"
Tick = Callable[[str, int, int], None]
"""(tensor that was written, bytes done, bytes in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """layers; width: hidden size; heads, kv_heads: query and key/value heads; intermediate: inner size of the MLP."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    intermediate: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; change --heads or --kv-heads"
            )


SHAPES = {
    "smollm2-135m": Shape(layers=30, width=576, heads=9, kv_heads=3, intermediate=1536),
    "qwen2.5-0.5b": Shape(layers=24, width=896, heads=14, kv_heads=2, intermediate=4864),
    "llama-3.2-1b": Shape(layers=16, width=2048, heads=32, kv_heads=8, intermediate=8192),
}
"""Bodies of published models with heads of 64; their vocabularies are left to the source."""


class Source:
    """A checkpoint of the Llama family, read tensor by tensor.  Raises ConfigError for another family or for biases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = load_config(folder)
        spec = read(self.config)
        if spec.family != "llama":
            raise ConfigError(f"only models of the Llama family can grow, and {folder} is of the family {spec.family}")
        first = spec.layers[0]
        if first.qkv_bias or first.out_bias or first.mlp_bias:
            raise ConfigError("a model with biases cannot grow; take one without attention_bias and mlp_bias")
        self.shape = Shape(
            layers=len(spec.layers), width=spec.width, heads=spec.heads, kv_heads=spec.kv_heads,
            intermediate=first.intermediate,
        )  # fmt: skip
        self.vocab, self.head_dim, self.tied, self.eps = spec.vocab, spec.head_dim, spec.tied, spec.norm_eps
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise ConfigError(f"{path} is damaged: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        """A tensor in float32."""
        if name not in self._files:
            raise ConfigError(f"{self.folder} has no tensor {name}")
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name).float()


class Growth:
    """The tensors of the large model, one at a time, each a function of source, shapes and seed."""

    def __init__(self, source: Source, shape: Shape, seed: int = 0) -> None:
        """Raises ConfigError where the shape cannot hold the source's."""
        self.source, self.old, self.new, self.seed = source, source.shape, shape, seed
        _require_room(self.old, shape)
        self.place = {((i + 1) * shape.layers) // self.old.layers - 1: i for i in range(self.old.layers)}
        """Old layers by the place where they stand."""
        groups = [j * self.old.kv_heads // shape.kv_heads for j in range(shape.kv_heads)]
        self.kv_of = torch.tensor(groups)
        """The old key/value head that each new one copies."""
        self.q_of, self.share = _query_heads(groups, self.old, shape)
        self.scale = math.sqrt(self.old.width / shape.width)

    def config(self, dtype: str) -> dict[str, Any]:
        """The `config.json` of the large model."""
        new = self.new
        changed = {
            "num_hidden_layers": new.layers, "hidden_size": new.width, "num_attention_heads": new.heads,
            "num_key_value_heads": new.kv_heads, "intermediate_size": new.intermediate, "head_dim": self.source.head_dim,
            "rms_norm_eps": self.source.eps * self.old.width / new.width, "dtype": dtype,
        }  # fmt: skip
        return {key: value for key, value in {**self.source.config, **changed}.items() if key != "torch_dtype"}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
        """(name, shape, what makes it) of every tensor, layer by layer."""
        new, dim = self.new, self.source.head_dim
        yield "model.embed_tokens.weight", (self.source.vocab, new.width), self._embed
        q, kv = (new.heads * dim, new.width), (new.kv_heads * dim, new.width)
        inner = new.intermediate, new.width
        for at in range(new.layers):
            for name, shape, make in (
                ("input_layernorm", (new.width,), self._norm),
                ("self_attn.q_proj", q, self._heads),
                ("self_attn.k_proj", kv, self._heads),
                ("self_attn.v_proj", kv, self._heads),
                ("self_attn.o_proj", q[::-1], self._out),
                ("post_attention_layernorm", (new.width,), self._norm),
                ("mlp.gate_proj", inner, self._gate),
                ("mlp.up_proj", inner, self._up),
                ("mlp.down_proj", inner[::-1], self._down),
            ):
                yield f"model.layers.{at}.{name}.weight", shape, partial(make, name, at)
        yield "model.norm.weight", (new.width,), lambda: self._widened_norm("model.norm.weight", "model.norm.weight")
        if not self.source.tied:
            yield "lm_head.weight", (self.source.vocab, new.width), self._head

    # ------------------------------------------------------------------ parts

    def _old(self, name: str, at: int) -> Tensor:
        """The source's tensor for the layer at place `at`; for an added layer that of the old one after it."""
        index = next(self.place[p] for p in range(at, self.new.layers) if p in self.place)
        return self.source[f"model.layers.{index}.{name}.weight"]

    def _noise(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Values without zeros, as spread as those of `like`."""
        spread = float(like.std(correction=0)) or 0.02
        made = torch.randn(shape, generator=self._generator(name)) * spread
        return made.masked_fill_(made == 0, spread)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))

    def _embed(self) -> Tensor:
        made = torch.zeros(self.source.vocab, self.new.width)
        made[:, : self.old.width] = self.source["model.embed_tokens.weight"]
        return made

    def _head(self) -> Tensor:
        old = self.source["lm_head.weight"]
        made = self._noise("lm_head", (self.source.vocab, self.new.width), old)
        made[:, : self.old.width] = old
        return made

    def _norm(self, name: str, at: int) -> Tensor:
        return self._widened_norm(f"{at}.{name}", self._old(name, at))

    def _widened_norm(self, name: str, old: Tensor | str) -> Tensor:
        old = (self.source[old] if isinstance(old, str) else old) * self.scale
        some = old[old != 0]
        if not len(some):
            raise ConfigError(f"the weights of the norm {name} are all zero, which no trained model's are")
        more = torch.randint(len(some), (self.new.width - len(old),), generator=self._generator(name))
        return torch.cat([old, some[more]])

    def _heads(self, name: str, at: int) -> Tensor:
        """Rows of queries, keys or values: copies of old heads, which read the new channels in a way of their own."""
        old, dim, width = self._old(name, at), self.source.head_dim, self.old.width
        which = self.q_of if name.endswith("q_proj") else self.kv_of
        made = self._noise(f"{at}.{name}", (len(which) * dim, self.new.width), old)
        made[:, :width] = old.view(-1, dim, width)[which].reshape(-1, width)
        return made

    def _out(self, name: str, at: int) -> Tensor:
        made = torch.zeros(self.new.width, self.new.heads * self.source.head_dim)
        if at in self.place:
            width = self.old.width
            old = self._old(name, at).view(width, -1, self.source.head_dim)
            made[:width] = (old[:, self.q_of] * self.share[:, None]).reshape(width, -1)
        return made

    def _gate(self, name: str, at: int) -> Tensor:
        old = self._old(name, at)
        made = self._noise(f"{at}.{name}", (self.new.intermediate, self.new.width), old)
        if at in self.place:
            made[: self.old.intermediate, : self.old.width] = old
        return made

    def _up(self, name: str, at: int) -> Tensor:
        old = self._old(name, at)
        made = self._noise(f"{at}.{name}", (self.new.intermediate, self.new.width), old)
        made[:, : self.old.width] = 0
        if at in self.place:
            made[: self.old.intermediate, : self.old.width] = old
        return made

    def _down(self, name: str, at: int) -> Tensor:
        old = self._old(name, at)
        made = self._noise(f"{at}.{name}", (self.new.width, self.new.intermediate), old)
        if at in self.place:
            made[:, : self.old.intermediate] = 0
            made[: self.old.width, : self.old.intermediate] = old
        return made


def zeros(old: Shape, new: Shape, head_dim: int, vocab: int) -> int:
    """Values that growth itself sets to zero (a source may have some of its own, which are copied)."""
    width, inner = new.width - old.width, new.intermediate - old.intermediate
    out = new.heads * head_dim
    here = width * out + width * old.intermediate + inner * old.width
    added = new.width * out + new.intermediate * old.width
    return vocab * width + old.layers * here + (new.layers - old.layers) * added


def grow(
    source: Path, out: Path, shape: Shape, *, dtype: str = "bfloat16", seed: int = 0, tick: Tick | None = None
) -> tuple[int, int]:
    """Write the grown model to the folder `out`; (values, zeros among them) of it.

    No more than one tensor is in memory at a time.  `config.json` is written last, so that half a model is not taken for one.
    Raises ConfigError where the source, the shape or the dtype cannot be used, where `out` holds something, or where the disk
    is too small.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {' or '.join(DTYPES)}, got {dtype!r}")
    if not 0 <= seed < 1 << 31:
        raise ConfigError(f"--seed must be from 0 to {(1 << 31) - 1}, got {seed}")
    growth = Growth(Source(source), shape, seed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; name a folder that does not, or an empty one")
    out.mkdir(parents=True, exist_ok=True)
    found = _write(growth, out / WEIGHTS, dtype, tick or (lambda name, done, total: None))
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(growth.config(dtype), indent=2) + "\n", encoding="utf8")
    return found


def _write(growth: Growth, path: Path, dtype: str, tick: Tick) -> tuple[int, int]:
    """Safetensors, tensor by tensor: the length of a JSON head, the head, the values.  (values, zeros) written."""
    code, kind = DTYPES[dtype]
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, _ in growth.tensors():
        stop = at + math.prod(shape) * kind.itemsize
        head[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    free = shutil.disk_usage(path.parent).free
    if at > free:
        raise ConfigError(f"the grown model has {at:,} bytes, and {path.parent} has room for {free:,}")
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = none = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, make in growth.tensors():
            tensor = make().to(kind)
            assert tensor.shape == shape, name
            none += int((tensor == 0).sum())
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            done += tensor.nbytes
            tick(name, done, at)
    return done // kind.itemsize, none


def _require_room(old: Shape, new: Shape) -> None:
    for name, least in asdict(old).items():
        if getattr(new, name) < least:
            raise ConfigError(f"{name} {getattr(new, name)} is less than the source's {least}; a model only grows")
    if new.width % new.heads:  # transformers takes no other Llama, whatever its head_dim
        raise ConfigError(f"width {new.width} is not a multiple of heads {new.heads}; change --width or --heads")
    if new.heads // new.kv_heads * (new.kv_heads // old.kv_heads) < old.heads // old.kv_heads:
        raise ConfigError(
            f"{new.heads} heads over {new.kv_heads} key/value heads leave too few query heads for each of the source's "
            f"{old.kv_heads} key/value heads, which serve {old.heads // old.kv_heads}; give more --heads, or a number of "
            f"--kv-heads that {old.kv_heads} divides"
        )


def _query_heads(groups: Sequence[int], old: Shape, new: Shape) -> tuple[Tensor, Tensor]:
    """(the old query head that each new one copies, the share of its output that each gives).

    groups: the old key/value head of each new one.  The query heads of one old head's copies take its old query heads in turn.
    """
    per_old, per_new = old.heads // old.kv_heads, new.heads // new.kv_heads
    seen = [0] * old.kv_heads
    heads = []
    for group in groups:
        for _ in range(per_new):
            heads.append(group * per_old + seen[group] % per_old)
            seen[group] += 1
    parts = {head: halves(heads.count(head)) for head in set(heads)}
    return torch.tensor(heads), torch.tensor([parts[head].pop() for head in heads])


def halves(count: int) -> list[float]:
    """`count` powers of two, as equal as can be, that add up to 1."""
    parts = [1.0]
    while len(parts) < count:
        largest = max(parts)
        parts.remove(largest)
        parts += [largest / 2, largest / 2]
    return sorted(parts)


def chosen(shape: str | None, given: Mapping[str, int | None], old: Shape) -> Shape:
    """A named shape (or the source's own) with the sizes that were given in its place.  Raises ConfigError."""
    if shape is not None and shape not in SHAPES:
        raise ConfigError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    start = SHAPES[shape] if shape else old
    return replace(start, **{name: size for name, size in given.items() if size is not None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.grow", description="Grow a model without changing its function."
    )
    parser.add_argument("source", help="folder of a Llama checkpoint, or `bundled`")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--shape", help=f"one of {', '.join(SHAPES)}; sizes below override it, or the source's own")
    for name in ("layers", "width", "heads", "kv-heads", "intermediate"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(argv))
    source, out, shape, dtype, seed = (options.pop(name) for name in ("source", "out", "shape", "dtype", "seed"))

    def tick(name: str, done: int, total: int) -> None:
        print(f"\r{done / total:4.0%}  {name:<60}", end="", file=sys.stderr, flush=True)

    try:
        folder = resolve(source)
        new = chosen(shape, options, Source(folder).shape)
        values, none = grow(folder, out, new, dtype=dtype, seed=seed, tick=tick if sys.stderr.isatty() else None)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = (out / WEIGHTS).stat().st_size
    print(f"\r{out}: {values:,} values in {dtype}, {size / 1e9:.2f} GB, {none / values:.1%} of them zero")
    return 0


if __name__ == "__main__":
    sys.exit(main())
