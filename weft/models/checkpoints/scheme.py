"""What a `config.json` says about stored weights of few bits: `quantization_config`, every value of it checked.

It decides bits, groups and zeros; which layers are stored so is seen in the files, and must not contradict it.  Whatever weft
cannot honour (activations or a cache in few bits, other widths, act-order, sparsity, rotations) is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weft.errors import ConfigError
from weft.models.families._config import Config
from weft.models.formats import GROUPS, WeightFormat

MAX_NAMES = 100_000
"""Entries of a list of layers that are believed."""
MAX_PATTERN = 200
MAX_REPEATS = 4
AWQ_VERSIONS = ("gemm", "GEMM")
PACKINGS = ("pack-quantized", "int-quantized")
KNOWN = "awq, gptq, compressed-tensors"
SCALES = "weft_scales"
"""What weft adds to the config.json of a checkpoint that it wrote in a nested format, beside `quantization_config`."""
NESTED = "nested"


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers that `targets` name have weights in `format`."""

    targets: tuple[str, ...]
    format: WeightFormat


@dataclass(frozen=True, slots=True)
class Scheme:
    """method: awq, gptq or compressed-tensors.  rules: the first that names a layer holds.  ignored: layers stored dense.

    v2: GPTQ's zeros are stored as they are.
    """

    method: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    v2: bool = False

    def format(self, module: str, kind: str = "Linear") -> WeightFormat | None:
        """The format of a module such as model.layers.0.mlp.up_proj; None where the config leaves it dense.

        kind: Linear or Embedding.
        """
        loose = self.method != "compressed-tensors"
        if any(matches(each, module, kind, loose) for each in self.ignored):
            return None
        for rule in self.rules:
            if any(matches(each, module, kind, False) for each in rule.targets):
                return rule.format
        return None


def scheme(config: Mapping[str, Any]) -> Scheme | None:
    """From a whole `config.json`; None where it has no `quantization_config`.  Raises ConfigError."""
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise Config(config).refuse("quantization_config", "an object")
    entry = Config(found, "quantization_config.")
    method = str(found.get("quant_method"))
    read = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}.get(method)
    if read is None:
        raise ConfigError(
            f"the checkpoint is quantized with {method[:100]!r} (config.json: quantization_config.quant_method), which "
            f"weft can't read; it reads {KNOWN}; use one of those versions of the checkpoint, or the unquantized one"
        )
    given = read(entry)
    if config.get(SCALES) != NESTED:
        return given
    if any(rule.format.bits != 4 or not rule.format.symmetric for rule in given.rules):
        raise ConfigError(
            f"config.json: {SCALES} is {NESTED}, which goes with symmetric weights of 4 bits alone; remove it"
        )
    return replace(
        given, rules=tuple(Rule(r.targets, replace(r.format, nested=r.format.group > 0)) for r in given.rules)
    )


def matches(pattern: str, module: str, kind: str, loose: bool) -> bool:
    """Whether an entry of a list of layers names a module.

    A name is the module's own, that of a parent, or a class (Linear, Embedding); re: begins a pattern from the name's start.
    loose: any part of the module's name will do, as lists of AWQ are read.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in (module, kind) or module.startswith(f"{pattern}.") or (loose and pattern in module)


def _awq(entry: Config) -> Scheme:
    version = entry.values.get("version", "gemm")
    if version not in AWQ_VERSIONS:
        raise entry.refuse("version", "gemm, the only packing of AWQ that weft reads")
    if not entry.flag("zero_point", True):
        raise entry.refuse("zero_point", "true: files of AWQ's gemm packing have zeros")
    form = WeightFormat(_bits(entry, "bits", (4,)), _group(entry), False)
    return Scheme("awq", (Rule(("Linear",), form),), _names(entry, "modules_to_not_convert"))


def _gptq(entry: Config) -> Scheme:
    layout = entry.values.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise entry.refuse("checkpoint_format", "gptq or gptq_v2")
    if entry.flag("desc_act", False) and not entry.flag("static_groups", False):
        raise entry.refuse(
            "desc_act", "false, as weft can't read groups out of order (act-order): use a version without it"
        )
    if entry.values.get("is_marlin_format"):
        raise entry.refuse("is_marlin_format", "false: convert the checkpoint back to GPTQ's own packing")
    if entry.values.get("pack_dtype", "int32") not in ("int32", None):
        raise entry.refuse("pack_dtype", "int32")
    bits = _bits(entry, "bits", (4, 8))
    group, symmetric = _group(entry), entry.flag("sym", True)
    rules = [*_overrides(entry, bits, group, symmetric), Rule(("Linear",), WeightFormat(bits, group, symmetric))]
    return Scheme("gptq", tuple(rules), v2=layout == "gptq_v2")


def _overrides(entry: Config, bits: int, group: int, symmetric: bool) -> list[Rule]:
    """GPTQModel's `dynamic`: patterns with numbers of their own; those that leave layers dense are seen in the files."""
    dynamic = entry.values.get("dynamic") or {}
    if not isinstance(dynamic, dict) or len(dynamic) > MAX_NAMES:
        raise entry.refuse("dynamic", "an object of patterns")
    rules = []
    for pattern, more in dynamic.items():
        if pattern.startswith("-:"):
            continue
        inner = Config(more if isinstance(more, dict) else {}, f"{entry.where}dynamic.{pattern[:100]}.")
        if inner.flag("desc_act", False):
            raise inner.refuse("desc_act", "false, as weft can't read groups out of order (act-order)")
        form = WeightFormat(
            _bits(inner, "bits", (4, 8)) if "bits" in inner else bits,
            _group(inner) if "group_size" in inner else group,
            inner.flag("sym", symmetric),
        )
        rules.append(Rule((_safe(entry, "dynamic", "re:" + pattern.removeprefix("+:")),), form))
    return rules


def _compressed(entry: Config) -> Scheme:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        value = entry.values.get(key)
        if value and not (key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"):
            raise ConfigError(
                f"config.json: {entry.where}{key} asks for what weft does not do with this checkpoint; "
                "use a version whose weights alone are quantized"
            )
    status = entry.values.get("quantization_status", "compressed")
    if status != "compressed":
        raise entry.refuse("quantization_status", "compressed")
    groups = entry.values.get("config_groups")
    if not isinstance(groups, dict) or not groups or len(groups) > MAX_NAMES:
        raise entry.refuse("config_groups", "an object of groups of layers")
    rules = []
    for name, value in groups.items():
        where = f"{entry.where}config_groups.{name[:100]}."
        if not isinstance(value, dict):
            raise Config(groups, f"{entry.where}config_groups.").refuse(name, "an object")
        rules.append(_rule(Config(value, where), entry))
    return Scheme("compressed-tensors", tuple(rules), _names(entry, "ignore"))


def _rule(group: Config, entry: Config) -> Rule:
    for key in ("input_activations", "output_activations"):
        if group.values.get(key):
            raise ConfigError(
                f"config.json: {group.where}{key} quantizes activations, which weft does not do; "
                "use a version whose weights alone are quantized (W4A16, W8A16)"
            )
    layout = group.values.get("format") or entry.values.get("format")
    if layout not in PACKINGS:
        raise (group if "format" in group else entry).refuse("format", f"one of {', '.join(PACKINGS)}")
    given = group.values.get("weights")
    if not isinstance(given, dict):
        raise group.refuse("weights", "an object")
    weights = Config(given, f"{group.where}weights.")
    if given.get("type", "int") != "int":
        raise weights.refuse("type", "int")
    if given.get("dynamic"):
        raise weights.refuse("dynamic", "false")
    if given.get("actorder") not in (None, False, "weight", "static"):
        raise weights.refuse("actorder", "null, weight or static: weft can't read groups out of order")
    strategy = given.get("strategy") or ("group" if given.get("group_size") else "channel")
    if strategy not in ("tensor", "channel", "group"):
        raise weights.refuse("strategy", "group, channel or tensor")
    form = WeightFormat(
        _bits(weights, "num_bits", (4, 8)),
        _group(weights) if strategy == "group" else 0,
        weights.flag("symmetric", True),
    )
    return Rule(_names(group, "targets"), form)


def _bits(entry: Config, key: str, known: tuple[int, ...]) -> int:
    value = entry.values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value not in known:
        raise entry.refuse(key, " or ".join(map(str, known)))
    return value


def _group(entry: Config) -> int:
    """Inputs that share a scale as a `WeightFormat` has them: 0 for all, else the largest of GROUPS that divides the given."""
    value = entry.values.get("group_size")
    if value == -1 and not isinstance(value, bool):
        return 0
    value = entry.size("group_size")
    fitting = [group for group in GROUPS if value % group == 0]
    if not fitting:
        raise entry.refuse("group_size", f"-1 or a multiple of {GROUPS[0]}")
    return max(fitting)


def _names(entry: Config, key: str) -> tuple[str, ...]:
    value = entry.values.get(key) or []
    if not isinstance(value, list) or len(value) > MAX_NAMES or not all(_text(each) for each in value):
        raise ConfigError(f"config.json: {entry.where}{key} must be a list of layers' names")
    return tuple(_safe(entry, key, each) for each in value)


def _safe(entry: Config, key: str, pattern: str) -> str:
    """A name, or a pattern that cannot take long: it repeats single characters only, a few times."""
    if not pattern.startswith("re:"):
        return pattern
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\.", "c", pattern[3:]))
    try:
        re.compile(pattern[3:])
    except (re.error, RecursionError, OverflowError):
        raise ConfigError(f"config.json: {entry.where}{key} has {pattern[:100]!r}, which is no pattern") from None
    slow = re.search(r"\)[*+{]", bare) or re.search(r"\\[1-9]|\(\?P=", pattern)
    if len(pattern) > MAX_PATTERN or slow or len(re.findall(r"[*+{]", bare)) > MAX_REPEATS:
        raise ConfigError(
            f"config.json: {entry.where}{key} has the pattern {pattern[:100]!r}, which could take long to match; "
            "name the layers instead"
        )
    return pattern


def _text(value: object) -> bool:
    return isinstance(value, str)
