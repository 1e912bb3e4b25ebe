"""The benchmark of whole steps: its rows are a decoder's, its limits are held, and the record has them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import steps
from bench.harness import bundled
from bench.steps import LIMITS, batch_of, built, fill, host, judged, main
from weft.models.native_step import NativeStep

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "steps.json"
SMALL = {"load": "auto", "model": bundled().folder, "threads": 1}


def test_the_record_has_every_figure_beside_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(RECORD.read_text())
    assert list(record) == list(LIMITS)
    for name, found in record.items():
        again = judged(name, found)
        assert (found["limits"], found["met"]) == (again["limits"], again["met"]), name
        assert ("MISSED" in capsys.readouterr().err) is not found["met"], name


def test_rows_of_a_step_are_those_of_one_alone() -> None:
    runtime = built(3, 128, 16, **SMALL)
    fill(runtime)
    with torch.inference_mode():
        several = batch_of(runtime, 3, 100, 8)
        found = runtime.decoder.forward(several, runtime.pool).clone()
        for s in range(3):
            alone = batch_of(runtime, 3, 100, 1)
            alone.tokens_T = several.tokens_T[8 * torch.arange(3)]
            assert torch.equal(runtime.decoder.forward(alone, runtime.pool)[s], found[8 * s])


def test_the_host_is_what_kernels_leave_of_a_step() -> None:
    run = NativeStep.run
    found = host(2, 1, temperature=0.8, top_p=0.95, **SMALL)
    assert NativeStep.run is run
    assert 0 < found["host_ms"] < found["step_ms"]
    assert 0 < found["share"] < 1


def test_figures_are_held_to_their_limits() -> None:
    for name, (key, side, limit) in LIMITS.items():
        within, beyond = (0.99, 1.01) if side == "at most" else (1.01, 0.99)
        assert judged(name, {key: limit * within})["met"]
        assert not judged(name, {key: limit * beyond})["met"]


def test_unknown_figures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--only", "draws"], ["--turns", "0"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "rows, long or host" in capsys.readouterr().err


def test_one_figure_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    monkeypatch.setattr(steps, "measured", lambda name, turns: {LIMITS[name][0]: 0.5})
    (tmp_path / "steps.json").write_text(json.dumps({"host bundled": {"met": True}}))
    assert main(["--only", "long"]) == 1  # 0.5 of the limit, where 0.8 is wanted
    record = json.loads((tmp_path / "steps.json").read_text())
    assert record["host bundled"] == {"met": True}
    assert record["long"]["limits"] == {"fraction": "at least 0.8"}
