"""Products with weights, alone and two as one; what makes weights into panels; a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.operations.timing import SPREAD, Bench

WIDTH, INNER = 896, 4864
"""Of Qwen2.5-0.5B."""
SHAPES = {"qkv": (1152, WIDTH), "gate_up": (2 * INNER, WIDTH), "down": (WIDTH, INNER)}
"""Outputs and inputs of the products of a layer; the head's is that of `gate_up` many times over."""
FORMATS = ("float32", "bfloat16", "int8", "int8:32", "int4:32", "int4:32:float", "int4:128:zero")
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
MIXTURE = (1024, 512, 32, 4)
"""Of the mixture that rivals are measured on: its width, an expert's inner width, experts, and those of a row."""
SILU = 0


def _format(text: str) -> Any:
    import torch

    from weft.models.formats import WeightFormat

    return WeightFormat.parse(text) if text.startswith("int") else getattr(torch, text)


def _size(outs: int, width: int, format: Any) -> int:
    import torch

    from weft.models.layout import PANEL, panel_bytes

    return outs // PANEL * panel_bytes(width, format.itemsize if isinstance(format, torch.dtype) else format)


def _copies(bench: Bench, outs: int, width: int, format: Any, count: int) -> list[Any]:
    """As many weights [outs, width] of equal values."""
    import torch

    from weft.models.memory import host_memory
    from weft.ops.cpu.panels import Panels

    memory = host_memory(count * _size(outs, width, format), torch.device("cpu")).view(count, -1)
    made = [Panels(m, (outs, width), format, bench.program, bench.module) for m in memory]
    made[0].pack(torch.randn(outs, width) / width**0.5)
    memory[1:] = memory[0]
    return made


def _inputs(bench: Bench, text: str) -> list[str]:
    """What inputs of a format's products are multiplied as."""
    half = "float" if text == "float32" else bench.half
    return [half, "int8"] if text.startswith("int") else [half]


def _code(kind: str) -> int:
    from weft.models.kernels import INPUTS

    return INPUTS["float32" if kind == "float" else kind]


def products(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row to a long prompt, in each format; with inputs of 8 bits where that has a kernel."""
    import torch

    for name, (outs, width) in SHAPES.items():
        x, out = torch.randn(max(ROWS), width), torch.empty(max(ROWS), outs)
        for text in FORMATS:
            size = _size(outs, width, _format(text))
            panels = _copies(bench, outs, width, _format(text), -(-SPREAD // size))
            for kind in _inputs(bench, text):
                for rows in ROWS:
                    some = panels if rows < 64 else panels[:4]
                    at = [
                        bench.program.linear(p.weight, x.data_ptr(), width, 0, out.data_ptr(), outs, False, _code(kind))
                        for p in some
                    ]
                    rounds = bench.operations(at[0], at[-1] + 1, bench.step(rows))
                    yield bench.record(
                        "product", "linear", rounds, size, 2.0 * rows * outs * width, kind, shape=name, weights=text,
                        activations=kind, rows=rows,
                    )  # fmt: skip


def opened(bench: Bench) -> Iterator[dict[str, Any]]:
    """Gates with what they open as one operation, and with the product behind them."""
    import torch

    x, out, between, gated = (torch.randn(512, n) for n in (WIDTH, WIDTH, 2 * INNER, INNER))
    for text in ("bfloat16", "int8", "int4:32"):
        first, second = _size(*SHAPES["gate_up"], _format(text)), _size(*SHAPES["down"], _format(text))
        count = -(-SPREAD // (first + second))
        ups, downs = (_copies(bench, *SHAPES[name], _format(text), count) for name in ("gate_up", "down"))
        for kind in _inputs(bench, text):
            for rows in (1, 16, 512):
                some = list(zip(ups, downs, strict=True))[: None if rows < 64 else 4]
                whole = [
                    bench.program.mlp(
                        up.weight, x.data_ptr(), WIDTH, 0, between.data_ptr(), 2 * INNER, gated.data_ptr(), INNER, SILU,
                        down.weight, 0, out.data_ptr(), WIDTH, _code(kind),
                    )
                    for up, down in some
                ]  # fmt: skip
                half = [
                    bench.program.gated_linear(
                        up.weight, x.data_ptr(), WIDTH, 0, between.data_ptr(), 2 * INNER, gated.data_ptr(), INNER, SILU,
                        _code(kind),
                    )
                    for up, _ in some
                ]  # fmt: skip
                work, more = 2.0 * rows * INNER * WIDTH, {"weights": text, "activations": kind, "rows": rows}
                step = bench.step(rows)
                rounds = bench.operations(whole[0], whole[-1] + 1, step)
                yield bench.record("mlp", "mlp", rounds, first + second, 3 * work, kind, **more)
                rounds = bench.operations(half[0], half[-1] + 1, step)
                yield bench.record("gates", "gated_linear", rounds, first, 2 * work, kind, **more)


def packing(bench: Bench) -> Iterator[dict[str, Any]]:
    """Weights made into panels: copied, rounded, and taken over from whole numbers.  Bytes read and written."""
    import torch

    from weft.models.quantized import quantize

    outs, width = SHAPES["gate_up"]
    source = torch.randn(outs, width, dtype=torch.bfloat16)
    read = float(source.nbytes)
    for text in ("bfloat16", "int8", "int4:32"):
        format = _format(text)
        (panels,) = _copies(bench, outs, width, format, 1)
        weight, written = panels.weight, float(panels.nbytes)
        if text == "bfloat16":
            rounds = bench.rounds(bench.program.pack, weight, source.data_ptr(), 1, outs, 0)
            yield bench.record("pack", "pack", rounds, read + written, weights=text)
            continue
        groups = format.groups(width)
        low, scales = torch.empty(outs, groups), torch.rand(outs, groups) + 0.01
        rounds = bench.rounds(
            bench.program.spans, source.data_ptr(), 1, outs, width, width // groups, low.data_ptr(), 0
        )
        yield bench.record("spans", "spans", rounds, read + low.nbytes, weights=text)
        rounds = bench.rounds(bench.program.pack_rounded, weight, source.data_ptr(), 1, scales.data_ptr(), 0, outs, 0)
        yield bench.record("round", "pack_rounded", rounds, read + written, weights=text)
        values = quantize(source.float(), format).values
        given = (values.data_ptr(), scales.data_ptr(), 0, groups, 0, outs, 0)
        rounds = bench.rounds(bench.program.pack_values, weight, *given)
        yield bench.record("take over", "pack_values", rounds, values.nbytes + written, weights=text)


def experts(bench: Bench) -> Iterator[dict[str, Any]]:
    """The parts of a mixture: its rows sent to experts, their products, and the results added up."""
    import torch

    width, inner, count, each = MIXTURE
    most = 512
    router, x, out = torch.randn(most, count), torch.randn(most, width), torch.empty(most, width)
    shares, ids = torch.empty(most, each), torch.empty(most, each, dtype=torch.int64)
    results = torch.randn(most * each, width)
    both, gated = torch.randn(most * each, 2 * inner), torch.randn(most * each, inner)
    p = bench.program
    mixture = bench.module.Experts(
        router.data_ptr(), count, shares.data_ptr(), ids.data_ptr(), x.data_ptr(), width, out.data_ptr(), width,
        results.data_ptr(), width, count, each, True,
    )  # fmt: skip
    route, combine = p.route(mixture), p.combine(mixture)
    for rows in (1, 16, 512):
        step, pairs = bench.step(rows), rows * each
        more: dict[str, Any] = {"rows": rows, "experts": count, "each": each}
        p.run(route, route + 1, step)
        rounds = bench.operations(route, route + 1, step)
        yield bench.record("route", "route", rounds, 4.0 * rows * count + 12.0 * pairs, **more)
        hit = len(ids[:rows].unique())
        for text in ("bfloat16", "int8", "int4:32"):
            sizes = [_size(2 * inner, width, _format(text)), _size(width, inner, _format(text))]
            layers = -(-SPREAD // (hit * sum(sizes))) if rows < 64 else 1
            ups = _copies(bench, 2 * inner, width, _format(text), layers * count)
            downs = _copies(bench, width, inner, _format(text), layers * count)
            for kind in _inputs(bench, text):
                code = _code(kind)
                parts = [slice(i * count, (i + 1) * count) for i in range(layers)]
                given = both.data_ptr(), gated.data_ptr(), SILU, code
                products = [
                    p.experts(mixture, [u.weight for u in ups[part]], [d.weight for d in downs[part]], *given)
                    for part in parts
                ]
                told, work = {**more, "weights": text, "activations": kind, "hit": hit}, 6.0 * pairs * inner * width
                rounds = bench.operations(products[0], products[-1] + 1, step)
                yield bench.record("experts", "experts", rounds, hit * sum(sizes), work, kind, **told)
        rounds = bench.operations(combine, combine + 1, step)  # of pairs that the experts have numbered
        yield bench.record("combine", "combine", rounds, 4.0 * (pairs + rows) * width, **more)
