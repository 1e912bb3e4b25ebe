"""Beside other engines, what is made of the turns: figures by hand, what voids a run, page, chart, arguments, a whole run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.rivals import __main__ as program
from bench.rivals import measure, plan, report, rows
from bench.rivals.checkpoint import drawn
from bench.rivals.measure import Contender, Group, Turn, checked
from bench.rivals.plan import Cell
from bench.rivals.process import RivalError
from bench.rivals.processor import cpuinfo
from bench.rivals.weft_driver import Weft
from tests.tools.test_rivals import STUB, TINY, VOCAB
from weft.bench.limit import read_by
from weft.errors import ConfigError
from weft.models.families import read

RESULTS = plan.ROOT / "bench" / "results"
CELL = Cell(batch=2, prompt=100, new=40)


def loaded(kind: str, body: int, head: int, kv: float = 1000.0) -> dict[str, Any]:
    """What an engine says of itself, of a million weights in the body and half of that in the head."""
    return {
        "version": "1.0", "kind": kind, "kv_bytes": kv, "info": {"isa": "none | at all"},
        "body": {"weights": 1_000_000, "bytes": body}, "head": {"weights": 500_000, "bytes": head},
        "experts": {"weights": 0, "bytes": 0},
    }  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(TINY), encoding="utf8")
    return path


@pytest.fixture
def group() -> Group:
    """weft and two rivals in three rounds of which the second is twice as slow for all."""

    def one(engine: str, kind: str, step_s: float, prefill_s: float, first: list[int]) -> Contender:
        driver: Any = None
        turns = [Turn(prefill_s * slow, step_s * slow, first, 10.0 / slow) for slow in (1, 2, 1)]
        return Contender(engine, "int8", kind, driver, loaded(kind, 1_100_000, 600_000), {CELL: turns})

    found = Group("small", "int8", read(TINY))
    found.contenders += [
        one("weft", "int8, inputs int8", 0.001, 0.5, [5, 6]), one("llama.cpp", "Q8_0", 0.002, 0.4, [5, 7]),
        one("openvino", "int8", 0.004, 0.2, [5, 6]),
    ]  # fmt: skip
    found.missing.append(("vllm", "does not | start\nhere"))
    return found


@pytest.fixture
def record(group: Group) -> dict[str, Any]:
    asked = plan.parse(["--shapes", "qwen2.5-0.5b", "--threads", "1"])
    absent = {"other": "not installed: no wheel"}
    return program.record_of(
        asked, [group], absent, ["python", "-m", "bench.rivals"], seconds=754.2, install_seconds=600.4
    )


# ---------------------------------------------------------------------------------------------- figures


def test_figures_by_hand(record: dict[str, Any]) -> None:
    weft, llama, openvino = record["rows"]
    assert [row["engine"] for row in record["rows"]] == ["weft", "llama.cpp", "openvino"]
    assert (weft["decode_tok_s"], llama["decode_tok_s"], openvino["decode_tok_s"]) == pytest.approx((2000, 1000, 500))
    assert weft["decode_spread"] == pytest.approx([1000, 2000])
    assert weft["prefill_tok_s"] == pytest.approx(2 * 100 / 0.5)
    # The fastest rival at decoding is llama.cpp, at prompts OpenVINO.
    assert (weft["ratio"], llama["ratio"], openvino["ratio"]) == pytest.approx((2, 1, 0.5))
    assert (weft["prefill_ratio"], openvino["prefill_ratio"]) == pytest.approx((0.4, 1))
    assert (weft["bytes_per_weight_body"], weft["bytes_per_weight_head"]) == pytest.approx((1.1, 1.2))
    # Weights once, and two sequences of 100 + 40 / 2 positions; in each round beside that round's bandwidth.
    assert weft["bytes_per_step"] == 1_100_000 + 600_000 + 2 * 120 * 1000
    assert weft["fraction"] == pytest.approx(1_940_000 / 0.001 / 10e9)
    assert (weft["same_first"], llama["same_first"], openvino["same_first"]) == (1, 0.5, 1)
    assert {"engine", "version", "format", "batch", "prompt"} <= weft.keys()


def test_experts_are_read_as_they_are_hit() -> None:
    layer = SimpleNamespace(experts=SimpleNamespace(num=4, top_k=1))
    spec: Any = SimpleNamespace(layers=[layer])
    said = {**loaded("bf16", 1000, 500, kv=0), "experts": {"weights": 400, "bytes": 800}}
    assert rows.bytes_per_step(said, spec, Cell(1, 10, 4)) == 1500 + 200
    assert rows.bytes_per_step(said, spec, Cell(2, 10, 4)) == 1500 + round(800 * (1 - 0.75**2))


@pytest.mark.parametrize("step_s", [0.00018, 0.00021])
def test_more_than_the_machine_reads_is_void(
    group: Group, step_s: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for turn in group.contenders[1].turns[CELL]:
        turn.step_s, turn.read_gb_s = step_s, 10.0
    monkeypatch.setattr(program, "measure", lambda *_: ([group], {}, 0.0))
    void = 1_940_000 / step_s > 10e9
    assert program.main(["--out", str(tmp_path), "--threads", "1"]) == (1 if void else 0)
    assert ("void: llama.cpp Q8_0 on small, batch 2, prompt 100: 1.08" in capsys.readouterr().err) is void
    assert ("Void" in (tmp_path / "rivals.md").read_text(encoding="utf8")) is void


def test_without_weft_a_run_has_failed(group: Group, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    del group.contenders[0]
    monkeypatch.setattr(program, "measure", lambda *_: ([group], {}, 0.0))
    assert program.main(["--out", str(tmp_path), "--threads", "1"]) == 1


@pytest.mark.parametrize("new", [40, 64])
def test_a_rival_that_is_slower_than_elsewhere_is_flagged(record: dict[str, Any], new: int) -> None:
    def flags(there: float, read_gb_s: float, prompt: int = 100) -> list[str]:
        figures = {"small": {"llama.cpp": {"int8": {"decode": {"2": there}}}}}
        other = {"read_gb_s": read_gb_s, "prompt": prompt, "new": new, "figures": figures}
        return rows.suspicions(record["rows"], other)

    assert flags(1100, 10) == []
    assert len(flags(1120, 10)) == 1
    assert "llama.cpp Q8_0 on small, batch 2" in flags(1120, 10)[0]
    assert flags(1120, 11.5) == []  # the memory is slower here by as much
    assert flags(1120, 10, prompt=128) == []  # another load


@pytest.mark.parametrize(
    ("family", "threads", "status"), [("26", 1, 1), ("25", 1, 0), ("26", 2, 0)], ids=["same", "other", "more threads"]
)
def test_a_slow_rival_on_the_same_processor_voids_the_run(
    group: Group, family: str, threads: int, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On another one, or with other threads than the figures have, it is a note."""
    figures = {"small": {"llama.cpp": {"int8": {"decode": {"2": 1120}}}}}
    zen5 = {"model name": "AMD EPYC", "cpu family": "26"}
    other = {"processor": zen5, "threads": threads, "read_gb_s": 10, "prompt": 100, "new": 64, "figures": figures}
    monkeypatch.setattr(rows, "other_machine", lambda: other)
    monkeypatch.setattr(rows, "cpuinfo", lambda: {**zen5, "cpu family": family, "flags": "fpu sse"})
    monkeypatch.setattr(program, "measure", lambda *_: ([group], {}, 0.0))
    assert program.main(["--out", str(tmp_path), "--threads", "1"]) == status
    word = "void" if status else "slower than elsewhere"
    assert f"{word}: llama.cpp Q8_0 on small, batch 2, prompt 100: 1000.0 tokens/s" in capsys.readouterr().err
    page = (tmp_path / "rivals.md").read_text(encoding="utf8")
    assert ("## Void" in page, "## Slower than elsewhere" in page) == (status == 1, status == 0)


def test_the_processor_is_the_first_one_of_the_system(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu amx_int8\n\nprocessor\t: 1\n", encoding="utf8")
    assert cpuinfo(path) == {"processor": "0", "model name": "A: B", "flags": "fpu amx_int8"}
    assert cpuinfo(tmp_path / "none") == {}


def test_figures_of_the_other_machine_can_be_looked_up() -> None:
    other = rows.other_machine()
    known = plan.rivals()
    assert other["read_gb_s"] > 0
    assert set(other["processor"]) == {"model name", "cpu family"}
    kept = json.loads((RESULTS / "rivals-zen5" / "rivals.json").read_text(encoding="utf8"))
    assert other["processor"]["model name"] == kept["machine"]["cpu"]
    for shape, engines in other["figures"].items():
        assert plan.find_shape(shape).is_file()
        for engine, formats in engines.items():
            assert set(formats) <= set(known[engine]["formats"])
    assert "decode" in other["figures"]["qwen2.5-0.5b"]["llama.cpp"]["bf16"]


@pytest.mark.parametrize(
    ("tokens", "steps", "error"),
    [
        ([[1] * 40] * 2, [0.1, 0.3, 0.2], None),
        ([[1] * 40], [0.1], "2 sequences of 40 tokens were asked for, and 1 of"),
        ([[1] * 40, [1] * 39], [0.1], r"2 of \[39, 40\]"),
        ([[1] * 40] * 2, [], "nothing to time"),
    ],
)
def test_tokens_are_counted(tokens: list[list[int]], steps: list[float], error: str | None) -> None:
    answer = {"prefill_s": 1.0, "steps_s": steps, "tokens": tokens}
    if error is None:
        assert checked(answer, CELL) == Turn(1.0, 0.2, [1, 1])
    else:
        with pytest.raises(RivalError, match=error):
            checked(answer, CELL)


# ---------------------------------------------------------------------------------------------- page and chart


def test_the_page_has_every_row_and_every_reason(record: dict[str, Any]) -> None:
    text = report.markdown(json.loads(json.dumps(record)))
    lines = [line for line in text.splitlines() if line.startswith("| 2 |")]
    assert len(lines) == 3
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "| 2 | 100 | weft | int8, inputs int8 | 1.10 / 1.20 | 2,000.0 | 2.00 | 0.19 | 400 | 0.40 | 100% |" in lines
    assert "- vllm (small, int8): does not / start here" in text
    assert "- other (everywhere): not installed: no wheel" in text
    assert "The run took 754 s, 600 s of them for installing engines." in text


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("rivals.json")), ids=lambda path: path.parent.name)
def test_kept_records_can_be_read(path: Path) -> None:
    """Some are from before a run told how long it took."""
    kept = json.loads(path.read_text(encoding="utf8"))
    assert ("The run took" in report.markdown(kept)) is ("seconds" in kept)
    ElementTree.fromstring(report.svg(kept))


def test_the_chart_is_whole(record: dict[str, Any]) -> None:
    record["rows"][1]["kind"] = "Q8_0 <&>"
    tree = ElementTree.fromstring(report.svg(record))
    bars = list(tree.iter("{http://www.w3.org/2000/svg}rect"))[1:]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1)
    assert widths[0] < report.BAR  # the limit, of which 0.194 is reached, has the whole width
    words = " ".join(e.text or "" for e in tree.iter("{http://www.w3.org/2000/svg}text"))
    assert "Q8_0 <&>" in words
    assert "small, int8, batch 2" in words
    empty = {**record, "rows": []}
    assert "nothing was measured" in report.svg(empty)


# ---------------------------------------------------------------------------------------------- arguments


def test_arguments() -> None:
    found = plan.parse(
        "--only llama.cpp --shapes qwen2.5-0.5b --formats bf16,int8 --batch 1,16 --threads 1 --memory 2G".split()
    )
    assert (found.only, found.formats, found.threads, found.rounds) == (["llama.cpp"], ["bf16", "int8"], 1, 3)
    assert [name for name, _ in found.shapes] == ["qwen2.5-0.5b"]
    assert found.cells == [Cell(1, 128, 64), Cell(16, 128, 64), Cell(1, 512, 8)]
    assert (found.batch, found.length, found.memory_bytes) == (16, 520, 2 << 30)
    assert len(found.cores) in (0, 1)
    assert plan.parse(["--only", "none", "--long", "0"]).only == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--only llamacpp", "--only takes llama.cpp, openvino, vllm"),
        ("--formats fp8", "--formats takes bf16, int8, int4"),
        ("--batch 0", "--batch takes numbers"),
        ("--batch few", "--batch takes numbers"),
        ("--shapes no-such", "there is no shape"),
        ("--new 1", "--new must be at least 2"),
        ("--rounds 0", "--rounds must be at least 1"),
        ("--threads 100000", "--threads must be from 1"),
    ],
)
def test_bad_arguments_are_refused(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=error):
        plan.parse(words.split())
    assert program.main(words.split()) == 2
    assert error.split(" takes")[0] in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the same weights, and a run


def test_a_drawn_checkpoint_is_read_by_weft_and_by_transformers(shape: Path, tmp_path: Path) -> None:
    """The same first tokens from the same files."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = drawn(shape, tmp_path / "drawn")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert (drawn(shape, folder) / "model.safetensors").stat().st_mtime_ns == before
    engine = Weft()
    said = engine.load(folder, "bf16", tmp_path, 1, 2, 24)
    prompts = [[5, 9, 200, 17, 3, 44, 100, 7], [250, 1, 2, 3, 4, 5, 6, 299]]
    found = engine.measure(prompts, 6)
    assert [len(tokens) for tokens in found.tokens] == [6, 6]
    assert len(found.steps_s) == 5
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("bytes are enough").input_ids) == "bytes are enough"
    logits = model(torch.tensor(prompts)).logits[:, -1]
    assert [tokens[0] for tokens in found.tokens] == logits.argmax(-1).tolist()
    assert said.head.weights == VOCAB * 32
    assert said.body.weights == sum(p.numel() for p in model.model.parameters()) - VOCAB * 32


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_bytes_of_weft_are_those_of_its_own_bench(shape: Path, tmp_path: Path, format: str) -> None:
    engine = Weft()
    said = engine.load(drawn(shape, tmp_path / "drawn"), format, tmp_path, 1, 2, 24)
    assert engine.runtime is not None
    setup = engine.runtime.setup
    rows_of_embedding = 2 * 32 * {"bf16": 2, "int8": 1, "int4": 0.5}[format]
    found = rows.bytes_per_step(
        {"body": vars_of(said.body), "head": vars_of(said.head), "experts": vars_of(said.experts), "kv_bytes": said.kv_bytes},
        setup.spec, Cell(2, 16, 8),
    )  # fmt: skip
    assert 0 <= read_by(setup, 2, 20) - found <= 2 * rows_of_embedding


def vars_of(kept: Any) -> dict[str, int]:
    return {"weights": kept.weights, "bytes": kept.bytes}


def test_a_whole_run_with_a_stub_beside_weft(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """weft itself, one rival that behaves, one that dies in its second round, and one that does not install."""
    folder = tmp_path / "modules"
    folder.mkdir()
    dying = "self.times = getattr(self, 'times', 0) + 1\n        if self.times > 2: sys.exit('worn out')"
    for name, what in (("fine", "pass"), ("dying", dying)):
        text = STUB.format(prepare="pass", measure=what).replace("[0.25]", "[9.0]")
        (folder / f"stub_{name}.py").write_text(text, encoding="utf8")
    known = {name: {"module": f"stub_{name}", "formats": ["int8"]} for name in ("fine", "dying", "absent")}

    def environment(name: str, *_: Any) -> Path:
        if name == "absent":
            time.sleep(0.2)
            raise RivalError("not installed: no wheel")
        return Path(sys.executable)

    monkeypatch.setattr(plan, "rivals", lambda: known)
    monkeypatch.setattr(measure, "environment", environment)
    monkeypatch.setattr(measure, "read_gb_s", lambda threads: 1e6)
    monkeypatch.setattr(measure, "ROOT", f"{measure.ROOT}:{folder}")
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)
    words = f"--shapes {shape} --formats int8 --batch 2 --prompt 8 --new 4 --long 0 --rounds 2 --threads 1 --cache {tmp_path}"
    assert program.main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "rivals.json").read_text(encoding="utf8"))
    assert {row["engine"] for row in record["rows"]} == {"weft", "fine"}  # not half a measurement of the other
    by = {(row["engine"], row["kind"]): row for row in record["rows"]}
    assert by["fine", "stub8"]["decode_tok_s"] == pytest.approx(2 / 9)
    assert by["weft", "int8, inputs int8"]["ratio"] > 1
    reasons = {one["engine"]: one["reason"] for one in record["missing"]}
    assert reasons["absent"] == "not installed: no wheel"
    assert "ended at measure (exit status 1)" in reasons["dying (int8)"]
    assert 0.2 <= record["install_seconds"] < record["seconds"]
    assert (tmp_path / "out" / "rivals.svg").is_file()
    given = words.partition(" --cache")[0].replace(str(shape), shape.name)
    assert record["command"] == f"python -m bench.rivals {given}"
    assert "not installed: no wheel" in capsys.readouterr().out
