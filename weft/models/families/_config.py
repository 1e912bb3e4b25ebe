"""Reading a `config.json` with every number checked: an error names the key and says what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weft.errors import ConfigError
from weft.models.spec import DecoderSpec, LayerSpec, RopeSpec

LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "num_hidden_layers": 4096,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "num_experts": 65536,
    "max_position_embeddings": 1 << 30,
    "original_max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
}
"""Largest values that are believed; beyond them a config is taken for damaged rather than for a plan to allocate."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "divided")


class Config:
    """A view of a `config.json`.  Every reader raises ConfigError naming the key."""

    def __init__(self, values: Mapping[str, Any], where: str = "", file: str = "config.json") -> None:
        self.values = values
        self.where = where
        self.file = file

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, expected: str) -> ConfigError:
        """The error for a key whose value is not what was expected."""
        found = f"is {self.values[key]!r}" if key in self.values else "is missing"
        return ConfigError(f"{self.file}: {self.where}{key} {found}; expected {expected}")

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to the key's limit."""
        most = LIMITS.get(key, 1 << 30)
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refuse(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.refuse(key, "a finite number")
        if positive and value <= 0:
            raise self.refuse(key, "a number above 0")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """So many finite numbers above 0."""
        values = self.values.get(key)
        fits = isinstance(values, list) and len(values) == count
        if not fits or not all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values or ()):
            raise ConfigError(f"{self.file}: {self.where}{key} must be {count} numbers above 0")
        return tuple(values or ())

    def optional(self, key: str, default: float | None = None) -> float | None:
        """A finite number above 0, or null for none; `default` where the key is missing."""
        if key not in self.values:
            return default
        return None if self.values[key] is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def activation(self, key: str, default: str) -> Any:
        """The gate's activation as `LayerSpec` names it."""
        value = self.values.get(key) or default
        if value not in ACTIVATIONS:
            raise self.refuse(key, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def heads(self, default_dim: int | None = None) -> tuple[int, int, int]:
        """(query heads, kv heads, head_dim), which must fit each other.  default_dim: None means width / heads."""
        width = self.size("hidden_size")
        heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.refuse("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
        if "head_dim" not in self and default_dim is None and width % heads:
            raise self.refuse("num_attention_heads", f"a divisor of hidden_size {width}, or a head_dim")
        dim = self.size("head_dim", default_dim or width // heads)
        if dim % 2:
            raise self.refuse("head_dim", "an even number: rotary embedding turns pairs")
        return heads, kv_heads, dim

    def window(self, default: int | None = 4096) -> int | None:
        """`sliding_window`: null means none, a missing key means `default`."""
        if "sliding_window" in self.values and self.values["sliding_window"] is None:
            return None
        return self.size("sliding_window", default)

    def upper_windows(self, count: int) -> list[int | None]:
        """Qwen's dense families: windows on the layers from `max_window_layers` on, and only with `use_sliding_window`."""
        window = self.window() if self.flag("use_sliding_window", False) else None
        start = self.size("max_window_layers", 28, least=0)
        return self.windows(count, window, [window is not None and index >= start for index in range(count)])

    def windows(self, count: int, window: int | None, sliding: list[bool]) -> list[int | None]:
        """Each layer's window: by `layer_types` where the config has them, else where `sliding` says."""
        types = self.values.get("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != count:
                raise self.refuse("layer_types", f"a list of {count} names, one for each layer")
            unknown = [name for name in types if name not in ("full_attention", "sliding_attention")]
            if unknown:
                raise ConfigError(
                    f"config.json: layer_types has {unknown[0]!r}; expected full_attention or sliding_attention"
                )
            sliding = [name == "sliding_attention" for name in types]
        if window is None and types is not None and any(sliding):
            raise self.refuse("sliding_window", "a number, since layer_types names sliding_attention")
        return [window if slides else None for slides in sliding]

    def rope(self, head_dim: int, default_theta: float = 10000.0) -> RopeSpec:
        """The rotary embedding: transformers 5's `rope_parameters`, or `rope_theta` with `rope_scaling`."""
        for key in ("rope_scaling", "rope_parameters"):
            if key in self and not isinstance(self.values[key], dict):
                raise self.refuse(key, "an object")
        source = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        rope = Config(self.values.get(source) or {}, f"{source}.", self.file)
        nested = [key for key, value in rope.values.items() if isinstance(value, dict)]
        if nested:
            raise rope.refuse(nested[0], "one set of numbers for all layers")
        kind = rope.values.get("rope_type", rope.values.get("type", "default"))
        if kind not in ROPE_KINDS:
            key = "rope_type" if "rope_type" in rope.values else "type"
            raise rope.refuse(key, f"one of {', '.join(ROPE_KINDS)}")
        theta = rope.number("rope_theta", self.number("rope_theta", default_theta))
        for config in (self, rope):
            if config.number("partial_rotary_factor", 1.0) != 1.0:
                raise config.refuse("partial_rotary_factor", "1.0: this family rotates whole heads")
        if theta <= 1.0:
            raise (rope if "rope_theta" in rope else self).refuse("rope_theta", "a number above 1")
        plain = RopeSpec(kind="default", theta=theta, dim=head_dim)
        return plain if kind == "default" else self._scaled(rope, kind, plain)

    def _scaled(self, rope: Config, kind: Any, plain: RopeSpec) -> RopeSpec:
        if kind == "linear":
            return RopeSpec(kind=kind, theta=plain.theta, dim=plain.dim, factor=rope.number("factor"))
        if kind == "divided":
            return RopeSpec(
                kind=kind, theta=plain.theta, dim=plain.dim, divisors=rope.numbers("divisors", plain.dim // 2)
            )
        if "original_max_position_embeddings" in self:
            original = self.size("original_max_position_embeddings")
        else:
            original = rope.size("original_max_position_embeddings", self.size("max_position_embeddings"))
        if kind == "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if high <= low:
                raise rope.refuse("high_freq_factor", f"a number above low_freq_factor {low}")
            return RopeSpec(
                kind=kind,
                theta=plain.theta,
                dim=plain.dim,
                factor=rope.number("factor"),
                original=original,
                low_factor=low,
                high_factor=high,
            )
        factor = rope.number("factor", self.size("max_position_embeddings") / original)
        return RopeSpec(
            kind=kind,
            theta=plain.theta,
            dim=plain.dim,
            factor=factor,
            original=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.flag("truncate", True),
            attention_factor=_yarn_attention(rope, factor),
        )


def _yarn_attention(rope: Config, factor: float) -> float:
    """YaRN's attention factor: given, or 0.1 ln(factor) + 1, or the ratio of two such with their own multipliers."""
    if "attention_factor" in rope:
        return rope.number("attention_factor")

    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    above = rope.number("mscale", 0.0, positive=False)
    below = rope.number("mscale_all_dim", 0.0, positive=False)
    if above and below:
        return scale(above) / scale(below)
    return scale(1.0)


def decoder(
    config: Config,
    family: str,
    *,
    layers: tuple[LayerSpec, ...],
    heads: tuple[int, int, int],
    max_positions: int,
    tied: bool = False,
    **more: Any,
) -> DecoderSpec:
    """The fields that every family reads alike.

    heads: (query heads, key/value heads, head_dim).  max_positions, tied: what a missing key means.  more: further fields.
    """
    count, kv_heads, dim = heads
    return DecoderSpec(
        family=family,
        vocab=config.size("vocab_size"),
        width=config.size("hidden_size"),
        heads=count,
        kv_heads=kv_heads,
        head_dim=dim,
        max_positions=config.size("max_position_embeddings", max_positions),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", tied),
        layers=layers,
        **more,
    )
