"""Which operations compute a model: weft's kernels where they can, else the reference ones.  No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from weft import native
from weft.errors import ConfigError
from weft.models.layout import PANEL
from weft.models.spec import DecoderSpec

FORMATS = ("float32", "bfloat16")
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""What the kernels call them (`Activation` in native/src/kernels.h)."""
MAX_DIM, MAX_SHARED_HEADS = 256, 32
"""What one kernel of attention holds: values of a head, query heads of a kv head."""


@dataclass(frozen=True, slots=True)
class Choice:
    """ops: ref or cpu.  isa: the kernels' instruction set, empty for ref.  reason: why not the kernels, where they are not."""

    ops: str
    isa: str = ""
    reason: str = ""

    @property
    def panels(self) -> bool:
        """Whether weights are stored as panels, and activations in float32."""
        return self.ops == "cpu"


def choose(wanted: str, isa: str, spec: DecoderSpec, dtype: str, device: str, few: bool = False) -> Choice:
    """wanted: auto, ref or cpu.  isa: auto, or an instruction set.  few: whether matrices are kept in few bits.

    Raises ConfigError for what this machine or model lacks.
    """
    if wanted not in ("auto", "ref", "cpu"):
        raise ConfigError(f"--ops is auto, ref or cpu, got {wanted!r}")
    module = native.module()
    there = () if module is None else tuple(module.isas())
    if isa != "auto" and module is not None and isa not in there:
        raise ConfigError(f"--isa is auto or, on this machine, one of {', '.join(there)}; got {isa!r}")
    if wanted == "ref":
        return Choice("ref", reason="the reference operations were asked for")
    reason = native.why_not() or _why_not(spec, dtype, device, few)
    if not reason:
        return Choice("cpu", there[0] if isa == "auto" else isa)
    if wanted == "cpu" or isa != "auto":
        raise ConfigError(f"--ops cpu cannot run this model: {reason}")
    return Choice("ref", reason=reason)


def slower(choice: Choice, wanted: str, device: str) -> str:
    """A sentence where a CPU has a model on the reference operations though nobody asked for them (`--ops`); else empty."""
    if choice.panels or wanted == "ref" or device != "cpu":
        return ""
    return f"this model runs on plain PyTorch, which is slower: {choice.reason}"


def _why_not(spec: DecoderSpec, dtype: str, device: str, few: bool) -> str:
    """What of a model the kernels do not compute, in a sentence; empty where they compute all of it."""
    if device != "cpu":
        return "the kernels are for CPUs"
    if dtype not in FORMATS:
        return f"the kernels have {' and '.join(FORMATS)}, not {dtype}"
    if spec.head_dim > MAX_DIM or spec.heads // spec.kv_heads > MAX_SHARED_HEADS:
        return f"heads have more than {MAX_DIM} values, or there are more than {MAX_SHARED_HEADS} for one kv head"
    attention = spec.heads * spec.head_dim
    inner = (layer.intermediate if layer.experts is None else layer.experts.intermediate for layer in spec.layers)
    widths = {spec.width, attention, *inner}
    if any(width % (8 if few else 2) for width in widths) or attention % PANEL:
        return "the weights have odd widths"
    if any(layer.activation not in ACTIVATIONS for layer in spec.layers):
        return f"the kernels have {' and '.join(ACTIVATIONS)}"
    if any(layer.attention != "softmax" for layer in spec.layers):
        return "the kernels compute softmax attention"
    return ""
