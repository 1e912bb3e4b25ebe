"""AWQ: scales of input channels and limits of weights, chosen so that rounding moves a layer's outputs least.

Paper (003-50): Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration,
arXiv:2306.00978.

Rule.  For each linear layer, or layers that share their input x, s = mean|x|^alpha, divided by sqrt(max s * min s); alpha
in 0, 1/20 .. 19/20 is the one with the least |Q(W s) (x / s) - W x|^2 on a calibration text.  W takes s, and what comes
before gives it up: the norm before qkv and gate_up, the rows of `up` before down, the rows of `v` before out.  Then each
group's weights are clamped to the share of their largest magnitude, 1, 0.95 .. 0.55, that moves the group's part of the
outputs least; queries and keys are not, whose products meet in the softmax.

Differs.  Scales of a nested format are chosen in place of limits: a row's is tried at those shares of what holds its largest
group, every other group takes the multiple of it, too small to hold its weights or larger than that, which moves its part of
the outputs least, and the row's scale with the least sum is kept.  Where query heads share a kv head, s of `out` is made of
the mean over those heads, so that `v` can give it up; the paper leaves such layers alone.  Errors are taken over ROWS rows of
the text, means over all of it.  Norms are rounded to their number format first, and W takes what they then really give up.
Experts and their router stay as they are.

Legend.  N: outputs.  K: inputs.  R: kept rows.  G: groups of K.  s: scales [K].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.convert.passes import Along, Progress, each
from weft.exec.batch import Batch
from weft.models.formats import MULTIPLES, WeightFormat
from weft.models.layout import Part
from weft.models.operations import Seam
from weft.models.quantized import Quantized, extremes, quantize
from weft.models.spec import DecoderSpec, LayerSpec

ROWS = 2048
"""Rows of a layer's input that errors are taken over."""
ALPHAS = tuple(i / 20 for i in range(20))
SHRINKS = tuple(1 - i / 20 for i in range(10))
NEAR = range(-4, 4)
"""Multiples of a row's scale that are tried for a group, counted from the least that holds its weights."""
LEAST = 1e-4
STEP = 1 << 22
"""Weights that are looked at together."""


@dataclass(slots=True)
class Inputs:
    """What a layer was given: sums of |x| [K] over `count` rows, and some of the rows, float32."""

    sums: Tensor
    count: int = 0
    rows: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> Tensor:
        return self.sums / max(1, self.count)

    def gram(self, scales: Tensor) -> Tensor:
        """[K, K]: products of the kept inputs over `scales`, summed over rows."""
        x = torch.cat(self.rows) / scales
        return x.t() @ x


@dataclass(slots=True)
class Changes:
    """What becomes of a checkpoint's tensors before they are rounded, by fused weight.

    inputs: s [K], columns are multiplied by it.  outputs: [N], rows (and biases) are divided by it.
    norms: new weights, in their number format.  limits: [N, G], magnitudes that weights are clamped to.  largest: [N, G], in
    a nested format, in place of limits: what scales are made of (`quantize`).  chosen: alpha of each layer and weight.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)

    def applied(self, part: Part, rows: Tensor, first: int = 0) -> Tensor:
        """Rows `first`, ... of a part, changed; the same tensor where nothing changes."""
        target, begin = part.target, part.first + first
        if target in self.norms:
            return self.norms[target].to(rows.dtype)
        mine = slice(begin, begin + rows.shape[0])
        bias = target.removesuffix("_bias")
        if rows.dim() == 1:
            return (rows.float() / self.outputs[bias][mine]).to(rows.dtype) if bias in self.outputs else rows
        if target in self.inputs:
            rows = rows.float() * self.inputs[target]
        if target in self.outputs:
            rows = rows.float() / self.outputs[target][mine].unsqueeze(1)
        if target in self.limits:
            limits = self.limits[target][mine].unsqueeze(-1)
            grouped = rows.float().view(*limits.shape[:2], -1)
            rows = grouped.clamp(-limits, limits).view(rows.shape)
        return rows

    def rounded(self, part: Part, rows: Tensor, form: WeightFormat, first: int = 0) -> Quantized:
        """Rows `first`, ... of a part, changed and then rounded."""
        begin, largest = part.first + first, self.largest.get(part.target)
        mine = None if largest is None else largest[begin : begin + rows.shape[0]]
        return quantize(self.applied(part, rows, first), form, mine)


def calibrate(
    along: Along,
    found: Sequence[list[int]],
    form: WeightFormat,
    norm_dtypes: Mapping[str, torch.dtype],
    progress: Progress | None = None,
) -> Changes:
    """Changes for a model, from windows of a calibration text.

    along: over the model as it is.  norm_dtypes: number formats of the stored norms, by fused weight.
    progress: called with (done, in all): a half for the passes, a half for the search.
    """
    spec = along.decoder.spec
    count = len(spec.weight_ids)
    report = progress or (lambda done, total: None)
    total = 2 * len(found) * count
    gathered = gather(along, found, lambda done, _: report(done * count, total))
    changes = Changes()
    tensors = along.decoder.tensors
    for index, weights in enumerate(spec.weight_ids):
        layer = spec.layer_of_weights(weights)
        _fold(changes, spec, layer, tensors, gathered, form, norm_dtypes)
        for name in ("qkv", "out", "gate_up", "down"):
            key = f"{weights}.{name}"
            if key in gathered:
                _limit(changes, spec, key, tensors[key], gathered[key], form)
        report(len(found) * (count + index + 1), total)
    return changes


def gather(along: Along, found: Sequence[list[int]], progress: Progress | None = None) -> dict[str, Inputs]:
    """The inputs of every product of attention and dense MLPs, by fused weight."""
    decoder = along.decoder
    normed = decoder._buffers["normed"]
    every = max(1, sum(map(len, found)) // ROWS)
    gathered: dict[str, Inputs] = {}

    def watch(
        key: str, pick: Callable[[tuple[Tensor, ...], int], Tensor]
    ) -> Callable[[Batch, tuple[Tensor, ...]], None]:
        def see(batch: Batch, views: tuple[Tensor, ...]) -> None:
            x = pick(views, batch.bounds[-1]).flatten(1).float()
            mine = gathered.setdefault(key, Inputs(torch.zeros(x.shape[1])))
            mine.sums += x.abs().sum(0)
            offset = -mine.count % every
            mine.count += x.shape[0]
            mine.rows.append(x[offset::every].clone())

        return see

    removers = []
    for index, layer in enumerate(decoder.spec.layers):
        read = lambda views, rows: normed[:rows]
        given = lambda views, rows: views[0]
        seen = [(Seam.QKV, "qkv", read), (Seam.ATTENTION, "out", given)]
        if layer.experts is None:
            seen += [(Seam.GATE, "gate_up", read), (Seam.GATE, "down", given)]
        removers += [decoder.hook(seam, index, watch(f"{layer.weights}.{name}", pick)) for seam, name, pick in seen]
    try:
        for window in each(found, progress):
            along.logits(window)
    finally:
        for remove in removers:
            remove()
    return gathered


def _fold(
    changes: Changes,
    spec: DecoderSpec,
    layer: LayerSpec,
    tensors: Mapping[str, Tensor],
    gathered: Mapping[str, Inputs],
    form: WeightFormat,
    norm_dtypes: Mapping[str, torch.dtype],
) -> None:
    """Choose and fold the scales of one layer's products."""
    here = layer.weights
    for name, norm in (("qkv", "norm_attention"), ("gate_up", "norm_mlp")):
        key, source = f"{here}.{name}", f"{here}.{norm}"
        if key in gathered and source in tensors:
            s, changes.chosen[key] = search(tensors[key], gathered[key], gathered[key].mean, form)
            old = tensors[source].float() + spec.norm_offset
            new = (old / s - spec.norm_offset).to(norm_dtypes[source])
            kept = new.float() + spec.norm_offset
            lost = (kept == 0) | (old == 0)
            changes.norms[source] = torch.where(lost, tensors[source].to(new.dtype), new)
            changes.inputs[key] = torch.where(lost, 1.0, old / torch.where(lost, 1.0, kept))
    share, dim = spec.heads // spec.kv_heads, spec.head_dim
    key, mean = f"{here}.out", gathered[f"{here}.out"].mean
    by_head = mean.view(spec.kv_heads, share, dim).mean(1, keepdim=True).expand(-1, share, -1)
    s, changes.chosen[key] = search(tensors[key], gathered[key], by_head.reshape(-1), form)
    changes.inputs[key] = s
    rows = torch.ones(tensors[f"{here}.qkv"].shape[0])
    rows[-spec.kv_heads * dim :] = s.view(spec.kv_heads, share, dim)[:, 0].flatten()
    changes.outputs[f"{here}.qkv"] = rows
    key = f"{here}.down"
    if key in gathered:
        s, changes.chosen[key] = search(tensors[key], gathered[key], gathered[key].mean, form)
        changes.inputs[key] = s
        changes.outputs[f"{here}.gate_up"] = torch.cat([torch.ones_like(s), s])


def search(weight: Tensor, inputs: Inputs, mean: Tensor, form: WeightFormat) -> tuple[Tensor, float]:
    """(scales [K], alpha) with the least squared error of the outputs of `weight` [N, K].  alpha 0 is plain rounding."""
    gram = inputs.gram(torch.ones(()))
    best, chosen = (torch.ones_like(mean), 0.0), float("inf")
    for alpha in ALPHAS:
        s = mean.pow(alpha).clamp(min=LEAST)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for rows in weight.float().split(max(1, STEP // weight.shape[1])):
            moved = quantize(rows * s, form).dequantized() / s - rows
            error += float(((moved @ gram) * moved).sum())
        if error < chosen:
            best, chosen = (s, alpha), error
    return best


def _limit(changes: Changes, spec: DecoderSpec, key: str, weight: Tensor, inputs: Inputs, form: WeightFormat) -> None:
    """Choose the limits of a product's weights as they are after folding, or what their nested scales are made of."""
    part = Part(key, key, (weight.shape[0], weight.shape[1]))
    s = changes.inputs.get(key, torch.ones(()))
    groups = form.groups(weight.shape[1])
    size = weight.shape[1] // groups
    gram = inputs.gram(s)
    own = torch.stack([gram[at : at + size, at : at + size] for at in range(0, weight.shape[1], size)])
    first = spec.heads * spec.head_dim + spec.kv_heads * spec.head_dim if key.endswith(".qkv") else 0
    chosen = []
    step = max(1, STEP // weight.shape[1])
    for at in range(0, weight.shape[0], step):
        rows = changes.applied(part, weight[at : at + step], at).float()
        chosen.append((scaled if form.nested else clipped)(rows, own, form))
    found = torch.cat(chosen)
    if form.nested:
        found[:first] = extremes(changes.applied(part, weight[:first]).float().view(first, groups, size))
        changes.largest[key] = found
    else:
        found[:first] = torch.inf
        changes.limits[key] = found


def clipped(weight: Tensor, own: Tensor, form: WeightFormat) -> Tensor:
    """Limits [N, G] of rows [N, K] with the least squared error of each group's part of the outputs.

    own [G, size, size]: products of the inputs within each group.
    """
    grouped = weight.view(weight.shape[0], own.shape[0], -1)
    largest = grouped.abs().amax(-1)
    best, chosen = largest.clone(), torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        limit = largest * shrink
        cut = grouped.clamp(-limit.unsqueeze(-1), limit.unsqueeze(-1)).view_as(weight)
        moved = (quantize(cut, form).dequantized() - weight).view_as(grouped)
        error = _error(moved, own)
        better = error < chosen
        best, chosen = torch.where(better, limit, best), torch.where(better, error, chosen)
    return best


def scaled(weight: Tensor, own: Tensor, form: WeightFormat) -> Tensor:
    """What nested scales of rows [N, K] are made of (`quantize`'s largest, [N, G]), with the least squared error as `clipped`.

    A group's best scale depends on its row's, which the largest group makes: it is tried at shares of what holds that group,
    and each of the others then takes the multiple of it that is best for itself.
    """
    grouped = weight.view(weight.shape[0], own.shape[0], -1)
    extreme = extremes(grouped)
    top, at = extreme.abs().max(-1, keepdim=True)
    best, chosen = extreme.clone(), torch.full_like(top, torch.inf)
    for shrink in SHRINKS:
        base = top * shrink / MULTIPLES
        least = (extreme.abs() / torch.where(base == 0, 1.0, base)).ceil_()
        mine, errors = extreme.clone(), torch.full_like(extreme, torch.inf)
        for more in NEAR:
            times = (least + more).clamp_(1, MULTIPLES).scatter_(-1, at, MULTIPLES)
            largest = extreme.sign() * times * base
            moved = quantize(weight, form, largest).dequantized() - weight
            error = _error(moved.view_as(grouped), own)
            better = error < errors
            mine, errors = torch.where(better, largest, mine), torch.where(better, error, errors)
        total = errors.sum(-1, keepdim=True)
        better = total < chosen
        best, chosen = torch.where(better, mine, best), torch.where(better, total, chosen)
    return best


def _error(moved: Tensor, own: Tensor) -> Tensor:
    """Squared errors [N, G] of the groups' parts of the outputs, of weights moved by [N, G, size]."""
    return (torch.einsum("ngk,gkl->ngl", moved, own) * moved).sum(-1)
