"""FlexLLM: tokens of a fine-tuning job ride along with those of requests, as many as a limit between tokens leaves room for.

Paper    Oliaro et al., FlexLLM, arXiv:2402.18789                                                  (000-37)
Rule     requests first; then the largest window of s training tokens with f(c, s) <= share * tpot_s.  A window going forward is
         multiplied beside the step's rows, whose reading of the weights it shares; one going backward (frozen weights: as many
         products as forward, and 2.5 times the attention) reads them once more.  With windows of f and b tokens f / (f + b) of
         the steps go backward, and a token is trained once it went both ways.  Without requests it trains at full speed
Units    tpot_s: seconds between tokens; share: of that; length: tokens of a training sequence; window: most tokens of a step
Cost     as roofline, and a division
Pays     where answers are decoded: a step reads all weights for a few rows, and arithmetic lies idle
Differs  simulated only: weft trains nothing, and shows what co-serving would bring.  Not counted: the adapter's own products
         and its optimizer; the activations and gradients of a window (the paper keeps only those that the adapter's need),
         which leave the KV pool less room; backward windows of all layers are one step.  Windows are priced on average
Raises   ValueError for a share outside (0, 1], a time that is not above 0, length < 1 or window < 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import Rates
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits

BACKWARD_PAIRS = 2.5
"""Products of queries and keys, and their like, that a backward pass of attention has for each that a forward pass has."""


class Trained(Parts):
    """Parts of a step beside which `trained` tokens of a fine-tuning job were trained."""

    _trained = 0.0

    @property
    def trained(self) -> float:
        return self._trained


class CoServing:
    """The price of steps.  peak_tok_s: tokens a second of fine-tuning with nothing beside it."""

    def __init__(self, rule: FlexLLM, hardware: Hardware, model: Figures) -> None:
        self.rates = Rates(hardware, model, rule.dtype, rule.compute, rule.memory, rule.attention)
        self.host_s, self.window, self.limit_s = hardware.launch_s, rule.window, rule.share * rule.tpot_s
        self.stored_s = model.block_bytes / hardware.host_link.bytes_s
        met = [(rule.length + 1) / 2 if k.window is None else _met(rule.length, k.window) for k in model.kinds]
        self.row_s = 2.0 * model.active_params / self.rates.flops
        self.pairs_s = sum(k.pair_flops * n for k, n in zip(model.kinds, met, strict=True)) / self.rates.attention_flops
        self.read_s = model.read_bytes(rule.window) / self.rates.bytes_s
        self.ring_s = self.rates.ring_s(1.0) - self.rates.ring_s(0.0) if hardware.devices > 1 else 0.0
        s = rule.window
        both = 2 * max(s * self.row_s, self.read_s) + s * self.pairs_s * (1 + BACKWARD_PAIRS) + 2 * self.host_s
        self.peak_tok_s = s / (both + 2 * s * self.ring_s)

    def __call__(self, load: Load) -> Parts:
        found = self.rates.operators(load)
        weights = sum(max(o.compute_s, o.memory_s) for o in found if not o.attention)
        attention = sum(o.compute_s for o in found if o.attention and o.compute_s > o.memory_s)
        kv = sum(o.memory_s for o in found if o.attention and o.compute_s <= o.memory_s) + load.stored * self.stored_s
        ring, host = self.rates.ring_s(load.whole_rows), self.host_s + load.works * 2e-6
        alone = Parts(weights, attention, kv, ring, host)
        if not load.rows or load.spans:
            return alone
        # The products of the layers come first, and a window that goes forward joins them.
        layers_s, spare_s = max(found[0].compute_s, found[0].memory_s), self.limit_s - alone.total_s
        joined = layers_s + spare_s, found[0].compute_s, max(found[0].memory_s, self.read_s)
        forward = self._largest(*joined, self.pairs_s + self.ring_s)
        backward = self._largest(spare_s, 0.0, self.read_s, BACKWARD_PAIRS * self.pairs_s + self.ring_s)
        if not forward or not backward:
            return alone
        ahead = backward / (forward + backward)  # of the steps go forward: as many tokens go each way
        more = max(joined[1] + forward * self.row_s, joined[2]) - layers_s
        back = max(backward * self.row_s, self.read_s)
        pairs = ahead * forward + (1 - ahead) * backward * BACKWARD_PAIRS
        sent = (ahead * forward + (1 - ahead) * backward) * self.ring_s
        weights += ahead * more + (1 - ahead) * back
        told = Trained(weights, attention + pairs * self.pairs_s, kv, ring + sent, host)
        told._trained = ahead * forward
        return told

    def _largest(self, room_s: float, busy_s: float, read_s: float, each_s: float) -> int:
        """The most tokens s with max(busy_s + s * row_s, read_s) + s * each_s <= room_s."""
        return max(0, min(self.window, int(min((room_s - busy_s) / (self.row_s + each_s), (room_s - read_s) / each_s))))


def _met(length: int, window: int) -> float:
    """Positions that a row of a sequence sees on average, at most `window` each."""
    whole = min(length, window)
    return (whole * (whole + 1) / 2 + (length - whole) * window) / length


@register("cost", "flexllm")
@dataclass(frozen=True, slots=True, kw_only=True)
class FlexLLM:
    """Requests, and a fine-tuning job that has no end."""

    tpot_s: float = 0.05
    share: float = 0.8
    length: int = 2048
    window: int = 2048
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "more than 80 % of the tokens that fine-tuning alone would train, beside a heavy load of requests",
        "trained_share", 0.8, "more", against="", case="overload",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not all(0 < x <= 1 for x in (self.share, self.compute, self.memory, self.attention)):
            raise ValueError("shares are above 0 and at most 1")
        if not self.tpot_s > 0 or min(self.length, self.window) < 1:
            raise ValueError("tpot_s is above 0, and length and window are at least 1")

    def on(self, hardware: Hardware, model: Figures) -> CoServing:
        return CoServing(self, hardware, model)
