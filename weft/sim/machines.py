"""Hardware and models by name: data files that come along, or files of yours in the same form.

A hardware file is TOML, as `data/hardware.toml`: tables `[hardware.NAME]` and `[links.NAME]`.  A model is a built-in shape
(`data/models.toml`, the keys of config.json), a folder with a config.json, or such a file.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.models import load_config
from weft.models.families import read as read_family
from weft.models.layout import layer_shapes
from weft.models.spec import DecoderSpec, dtype_bytes, kv_groups
from weft.slots.cost import Figures, Hardware, Kind, Link
from weft.types import GroupKind, GroupSpec

DATA = Path(__file__).parent / "data"
MAX_BYTES = 1 << 20


@lru_cache(maxsize=8)
def _toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes; a description is smaller")
        return tomllib.loads(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None


def hardware_names() -> list[str]:
    return list(_toml(DATA / "hardware.toml")["hardware"])


def model_names() -> list[str]:
    return list(_toml(DATA / "models.toml"))


def hardware(name: str, devices: int = 1) -> Hardware:
    """A device by name, or FILE.toml:NAME for one of yours.  devices: that compute one model together.  Raises ConfigError."""
    file, colon, own = name.rpartition(":")
    found = _toml(Path(file)) if colon else _toml(DATA / "hardware.toml")
    what = _table(found, "hardware", own if colon else name)
    if devices < 1:
        raise ConfigError(f"a model is computed by at least 1 device, got {devices}")
    flops = what.get("flops")
    if not isinstance(flops, Mapping) or not flops:
        raise ConfigError(f"hardware {name}: flops must be a table of FLOP/s by number format")
    return Hardware(
        name=name, title=str(what.get("title", name)), flops={k: _rate(name, f"flops.{k}", v) for k, v in flops.items()},
        memory_bytes=int(_rate(name, "memory_bytes", what.get("memory_bytes"))),
        memory_bytes_s=_rate(name, "memory_bytes_s", what.get("memory_bytes_s")),
        link=link(str(what.get("link")), found), host_link=link(str(what.get("host_link", what.get("link"))), found),
        launch_s=_rate(name, "launch_s", what.get("launch_s", 0.0), zero=True), source=str(what.get("source", "")),
        price_h=_rate(name, "price_h", what.get("price_h", 0.0), zero=True), devices=devices,
    )  # fmt: skip


def link(name: str, found: Mapping[str, Any] | None = None) -> Link:
    """A link by name.  Raises ConfigError."""
    own = found if found is not None and name in found.get("links", {}) else _toml(DATA / "hardware.toml")
    what = _table(own, "links", name)
    return Link(
        name=name, bytes_s=_rate(name, "bytes_s", what.get("bytes_s")),
        latency_s=_rate(name, "latency_s", what.get("latency_s", 0.0), zero=True), source=str(what.get("source", "")),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Of images.  rows: patches of a tile.  tokens: what the language model gets of it."""

    name: str
    params: float
    layers: float
    width: float
    rows: float
    tokens: float
    source: str

    def tile_s(self, device: Hardware, compute: float = 0.65, memory: float = 0.8) -> float:
        """Seconds of one tile: its products and its attention, or reading the weights.  The shares are those of a roofline."""
        flops = 2 * self.params * self.rows + 4 * self.layers * self.width * self.rows**2
        peak = device.flops.get("bfloat16") or max(device.flops.values())
        read_s = 2 * self.params / (device.memory_bytes_s * memory * device.devices)
        return max(flops / (peak * compute * device.devices), read_s)


def encoder(name: str) -> Encoder:
    """By name.  Raises ConfigError."""
    known = _toml(DATA / "encoders.toml")
    what = _table({"encoder": known}, "encoder", name)
    sizes = {key: _rate(name, key, what.get(key)) for key in ("params", "layers", "width", "rows", "tokens")}
    return Encoder(name=name, source=str(what.get("source", "")), **sizes)


def _table(found: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any]:
    known = found.get(kind, {})
    if not isinstance(known, Mapping) or not isinstance(known.get(name), Mapping):
        raise ConfigError(
            f"there is no {kind} {name!r}{_nearest(name, known)}; there are: {', '.join(known) or 'none'}"
        )
    table: Mapping[str, Any] = known[name]
    return table


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _rate(name: str, key: str, value: Any, *, zero: bool = False) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{name}: {key} must be a number {'not below' if zero else 'above'} 0, got {value!r}")
    return float(value)


class Model:
    """A model for the simulator: its specification, its KV groups, and its figures for a cost.

    weight_bytes: of one parameter, 0 for those of its dtype.  kv_dtype: of keys and values.
    """

    def __init__(
        self, name: str, spec: DecoderSpec, dtype: str, *, block_tokens: int = 16, weight_bytes: float = 0.0,
        kv_dtype: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.spec, self.dtype = name, spec, dtype
        groups, self.block_bytes = kv_groups(spec, kv_dtype or dtype, block_tokens)
        self.groups: list[GroupSpec] = groups
        self.figures = figures(name, spec, groups, weight_bytes or dtype_bytes(dtype), self.block_bytes)

    def groups_for(self, layered: bool) -> list[GroupSpec]:
        """With room for parked hidden states where a schedule stops between layers."""
        return [g for g in self.groups if layered or g.kind is not GroupKind.PARKED]

    def blocks(self, hardware: Hardware, share: float = 0.9, workspace_bytes: int = 2 << 30) -> int:
        """KV blocks that the device's memory holds beside weights and workspace.  Raises ConfigError where it holds none."""
        room = hardware.memory_bytes * hardware.devices * share - self.figures.stored_bytes
        room -= min(workspace_bytes, hardware.memory_bytes // 10) * hardware.devices
        blocks = int(room // self.block_bytes)
        if blocks < 1:
            raise ConfigError(
                f"{self.name} takes {self.figures.stored_bytes / 1e9:.1f} GB of weights, and {hardware.devices} x "
                f"{hardware.name} leave no room for KV; give it more devices, or fewer bits with --weight-bits"
            )
        return blocks


def model(name: str, *, block_tokens: int = 16, weight_bits: float = 0.0, kv_dtype: str | None = None) -> Model:
    """A model by built-in name, or the path of a folder or config.json.  Raises ConfigError."""
    known = _toml(DATA / "models.toml")
    path = Path(name).expanduser()
    if name in known:
        config = dict(known[name])
    elif path.exists():
        config, name = load_config(path), path.stem if path.suffix == ".json" else path.resolve().name
    else:
        raise ConfigError(
            f"there is no model {name!r}{_nearest(name, known)}; give the path of a folder with a config.json, or one of: "
            + ", ".join(known)
        )
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    dtype_bytes(dtype)
    if weight_bits and not 1 <= weight_bits <= 32:
        raise ConfigError(f"a weight has from 1 to 32 bits, got {weight_bits}")
    return Model(
        name, read_family(config), dtype, block_tokens=block_tokens, weight_bytes=weight_bits / 8, kv_dtype=kv_dtype
    )


def figures(
    name: str, spec: DecoderSpec, groups: Sequence[GroupSpec], weight_bytes: float, block_bytes: int
) -> Figures:
    """What a cost reads of a specification."""
    dense = expert = 0
    for layer in spec.layers:
        for part, shape in layer_shapes(spec, layer).items():
            size = math.prod(shape)
            if layer.experts is not None and part.startswith("experts_"):
                expert += size // layer.experts.num
            else:
                dense += size
    mixture = next((layer.experts for layer in spec.layers if layer.experts is not None), None)
    kinds = tuple(
        Kind(
            window=g.window,
            pair_flops=4.0 * spec.heads * spec.head_dim * len(g.layers),
            entry_bytes=g.entry_bytes,
        )
        for g in groups if g.kind is not GroupKind.PARKED
    )  # fmt: skip
    return Figures(
        name=name, layers=len(spec.layers), width=spec.width, dense_params=dense, head_params=spec.vocab * spec.width,
        embed_params=0 if spec.tied else spec.vocab * spec.width,
        expert_params=expert, experts=0 if mixture is None else mixture.num, top_k=0 if mixture is None else mixture.top_k,
        weight_bytes=weight_bytes, kinds=kinds, block_bytes=block_bytes,
    )  # fmt: skip
