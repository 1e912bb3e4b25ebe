"""What rounding weights to few bits does to the bundled model, with and without AWQ's calibration.

    python -m bench.quantization [--json] [--only int4] [--method awq]

Divergence from the model in float32 along the two novels that it was not trained on; AWQ is calibrated on other texts: a novel
that it was trained on, and an encyclopedia.  `inputs float` and `inputs int8` are weights rounded to the nearest as the kernels
multiply them, with the model in bfloat16 around them.  Needs the shared data beside the checkout.  Writes
bench/results/quantization.json; with `--only` or `--method` the other records stay as they were.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.contender import ROOT
from bench.harness import RESULTS, bundled, machine, write

TEXT = ROOT.parent / "shared" / "data" / "text"
HELD_OUT = ("novels/Stevenson_Treasure_1883.txt", "novels/Doyle_Hound_1902.txt")
CALIBRATION = {"a novel": "novels/Austen_Emma.txt", "an encyclopedia": "wikitext-2/valid.txt"}
FORMATS = (
    "int8", "int8:128", "int8:32", "int8:32:zero", "int8:16",
    "int4:128", "int4:128:zero", "int4:64", "int4:32", "int4:32:float", "int4:32:zero", "int4:16", "int4:16:float",
)  # fmt: skip
CALIBRATED = {"a novel": ("int8", "int8:32", *FORMATS[5:]), "an encyclopedia": ("int4:32", "int4:128:zero")}
INPUTS = ("int8", "int8:32", "int4:32", "int4:128", "int4:32:zero")
"""Formats whose products are computed by the kernels too, with inputs as they are and rounded to 8 bits."""
METHODS = ("computed in bfloat16", "nearest", "awq", "inputs float", "inputs int8")
LENGTH, WINDOWS, CALIBRATING = 512, 12, 32
"""Tokens of a window; windows of each novel; windows of a calibration text."""


def measure(only: str, method: str, tick: Any) -> Iterator[dict[str, Any]]:
    """Records: weights, method, calibration, kl, top1, tokens, seconds of calibration, bits that a weight takes."""
    from weft.convert.awq import calibrate
    from weft.convert.judge import Judged, compare, law
    from weft.convert.passes import Along, windows
    from weft.front.text import ModelText
    from weft.models import load_spec
    from weft.models.formats import WeightFormat
    from weft.models.layout import quantized

    folder = bundled().folder
    spec = load_spec(folder)
    tokenizer = ModelText.load(folder, max_model_len=LENGTH, name="bundled").tokenizer

    def ids(name: str) -> list[int]:
        return list(tokenizer.encode((TEXT / name).read_text(encoding="utf8", errors="replace"), add_special=False))

    held_out = [window for name in HELD_OUT for window in windows(ids(name), LENGTH, WINDOWS)]
    plain, changed = Along(folder, spec, LENGTH), Along(folder, spec, LENGTH)
    laws = [law(plain, window) for window in held_out]
    judged = Judged(folder, changed)

    def record(weights: str, method: str, **more: Any) -> dict[str, Any]:
        tick(f"{weights} {method} {more.get('calibration', '')}")
        return {"weights": weights, "method": method, **more, **judged.compare(laws, held_out)}

    if not only and method in ("", "computed in bfloat16"):
        narrow = Along(folder, spec, LENGTH, dtype="bfloat16")
        yield {"weights": "bfloat16", "method": "computed in bfloat16", **compare(narrow, laws, held_out)}
    for name in FORMATS:
        if not name.startswith(only):
            continue
        form = WeightFormat.parse(name)
        each = 8 if form.nested else 16 if form.symmetric else 32
        bits = form.bits + (each * form.groups(spec.width) + (32 if form.nested else 0)) / spec.width
        if method in ("", "nearest"):
            judged.put(form)
            yield record(name, "nearest", bits=bits)
        for text, formats in CALIBRATED.items():
            if name in formats and method in ("", "awq"):
                began = time.perf_counter()
                found = windows(ids(CALIBRATION[text]), LENGTH, CALIBRATING)
                changes = calibrate(plain, found, form, judged.norm_dtypes)
                took = time.perf_counter() - began
                judged.put(form, changes)
                yield record(name, "awq", calibration=text, bits=bits, calibration_s=took)
        for inputs in ("float", "int8"):
            if name in INPUTS and method in ("", f"inputs {inputs}"):
                tick(f"{name} inputs {inputs}")
                few = quantized(spec, form)
                kernels = Along(
                    folder, spec, LENGTH, dtype="bfloat16", ops="cpu", threads=2, formats=few, activations=inputs
                )
                yield {"weights": name, "method": f"inputs {inputs}", "bits": bits, **compare(kernels, laws, held_out)}


def merged(result: dict[str, Any], only: str, method: str) -> dict[str, Any]:
    """The file that is there, with the new records in place of the same ones; those tell their own date and machine."""
    path = RESULTS / "quantization.json"
    kept = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {**result, "records": []}
    mine = [{**record, "date": result["date"], "cpu": result["machine"]["cpu"]} for record in result["records"]]

    def again(record: dict[str, Any]) -> bool:
        return record["weights"].startswith(only) and method in ("", record["method"])

    def place(record: dict[str, Any]) -> tuple[int, int]:
        return ("bfloat16", *FORMATS).index(record["weights"]), METHODS.index(record["method"])

    return {**kept, "records": sorted([*(r for r in kept["records"] if not again(r)), *mine], key=place)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantization", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    parser.add_argument("--only", default="", metavar="FORMAT", help="those that begin so")
    parser.add_argument("--method", default="", choices=METHODS, help="one of them")
    flags = parser.parse_args(argv)
    if not all((TEXT / name).is_file() for name in (*HELD_OUT, *CALIBRATION.values())):
        parser.exit(1, f"the texts are not there: {Path('shared/data/text')} beside the checkout\n")
    records = list(measure(flags.only, flags.method, lambda text: print(text, file=sys.stderr, flush=True)))
    result = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(), "records": records}
    write(
        RESULTS / "quantization.json",
        merged(result, flags.only, flags.method) if flags.only or flags.method else result,
    )
    if flags.json:
        print(json.dumps(result, indent=2))
    else:
        for r in records:
            print(f"{r['weights']:<16} {r['method']:<22} {r.get('calibration', ''):<18} {r['kl']:.5f} {r['top1']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
