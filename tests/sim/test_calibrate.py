"""Calibration: the fit finds what a machine is made of, whatever held up some steps; the engine's loop is listened to."""

from __future__ import annotations

import gc
import json
import random
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weft.bench.calibrate import Driver, Sample, Timings, fit, measure, nonnegative, text
from weft.cli.app import app
from weft.cost.calibrated import Calibrated, line
from weft.errors import EngineError
from weft.exec.build import EngineConfig, build, prepare
from weft.hub import resolve
from weft.sim.machines import Model, hardware
from weft.slots.cost import Load
from weft.types import Entry


def sample(chance: random.Random) -> Sample:
    """A step of a machine that is known: 1 ms + 10 us a row, 2 us an entry, 0.1 us a pair; 0.2 ms and 30 us a sequence."""
    decodes, chunk = chance.randrange(1, 20), chance.choice([0, 0, 16, 100, 250])
    entries, pairs = decodes * chance.randrange(10, 400), chunk * (chunk + 1) / 2 + chunk * chance.randrange(0, 300)
    load = Load(
        rows=decodes + chunk, samples=decodes, works=decodes + (chunk > 0), prompt_pairs=[pairs], prompt_entries=[0.0],
        decode_entries=[float(entries)],
    )  # fmt: skip
    late = 5.0 if chance.random() < 0.1 else 1.0
    model = 1e-3 + 1e-5 * load.rows + 2e-6 * entries + 1e-7 * pairs
    return Sample(load, late * model, 4e-5 * decodes, 2e-4 + 3e-5 * load.works)


def test_the_fit_finds_the_machine_although_a_tenth_of_the_steps_was_held_up(tmp_path: Path) -> None:
    chance = random.Random(3)
    found = fit([sample(chance) for _ in range(600)])
    assert found["entry_s"] == pytest.approx(2e-6, rel=0.05)
    assert found["pair_s"] == pytest.approx(1e-7, rel=0.1)
    assert found["sample_s"] == pytest.approx(4e-5, rel=0.02)
    assert found["step_s"] == pytest.approx(2e-4, rel=0.05)
    assert found["sequence_s"] == pytest.approx(3e-5, rel=0.05)
    assert found["median_error"] < 0.02
    file = tmp_path / "c.json"
    file.write_text(text(found, {"model": "x"}))
    spec = prepare(EngineConfig(model=resolve(None))).spec
    price = Calibrated(file=str(file)).on(hardware("cpu2"), Model("m", spec, "float32").figures)
    for _ in range(20):
        one = sample(chance)
        entries, pairs = one.load.decode_entries[0], one.load.prompt_pairs[0]
        model = 1e-3 + 1e-5 * one.load.rows + 2e-6 * entries + 1e-7 * pairs
        assert sum(price(one.load)) == pytest.approx(model + one.sample_s + one.rest_s, rel=0.05)


def test_a_tail_to_one_side_is_in_the_mean_and_what_was_held_up_is_not() -> None:
    """Steps of a machine whose times are skewed: a second of many of them takes their mean, not their middle."""
    chance, samples = random.Random(4), list[Sample]()
    for _ in range(800):
        one = sample(chance)
        base = 1e-3 + 1e-5 * one.load.rows  # not held up, and without what the fit has other tests for
        skew = chance.lognormvariate(0.0, 0.4)  # mean 1.083, middle 1
        samples.append(Sample(one.load, base * skew, 1e-9, 1e-9))
    late = [Sample(s.load, 20 * s.model_s, s.sample_s, s.rest_s) for s in samples[:40]]
    found = fit([*samples, *late])
    told = sum(line([x for x, _ in found["rows"]], [y for _, y in found["rows"]], s.load.rows) for s in samples)
    told += sum(found["entry_s"] * s.load.decode_entries[0] + found["pair_s"] * s.load.prompt_pairs[0] for s in samples)
    assert told == pytest.approx(sum(s.total_s for s in samples), rel=0.03)


def test_coefficients_are_never_negative() -> None:
    found = nonnegative([[1.0, x] for x in (1.0, 2.0, 3.0)], [3.0, 2.0, 1.0])
    assert min(found) >= 0
    assert found[1] == 0


def test_too_few_steps_are_no_calibration() -> None:
    with pytest.raises(EngineError, match="too few"):
        fit([sample(random.Random(0))] * 3)


def test_the_host_s_part_is_taken_apart(tmp_path: Path) -> None:
    """0.1 ms a step, 20 us a sequence, 50 us where one begins, 1 us a row of a prompt, 0.3 ms after a rest; 60 us to sample."""
    chance, samples = random.Random(6), list[Sample]()
    for _ in range(800):
        decodes, chunk = chance.randrange(1, 20), chance.choice([0, 0, 16, 100, 250])
        load = Load(
            rows=decodes + chunk, samples=decodes, works=decodes + (chunk > 0), prompt_pairs=[chunk * chunk / 2.0],
            prompt_entries=[0.0], decode_entries=[100.0 * decodes], decode_rows=decodes,
            entered=int(chunk > 0 and chance.random() < 0.7), idle=int(chance.random() < 0.1),
        )  # fmt: skip
        rest = 1e-4 + 2e-5 * load.works + 5e-5 * load.entered + 1e-6 * chunk + 3e-4 * load.idle
        samples.append(Sample(load, 1e-3 + 1e-5 * load.rows, 6e-5 + 1e-5 * decodes, rest))
    found = fit(samples)
    wanted = {"step_s": 1e-4, "sequence_s": 2e-5, "enter_s": 5e-5, "prompt_row_s": 1e-6, "idle_s": 3e-4, "sampling_s": 6e-5,
              "sample_s": 1e-5}  # fmt: skip
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=0.03), name
    file = tmp_path / "c.json"
    file.write_text(text(found, {}))
    spec = prepare(EngineConfig(model=resolve(None))).spec
    price = Calibrated(file=str(file)).on(hardware("cpu2"), Model("m", spec, "float32").figures)
    assert all(sum(price(s.load)) == pytest.approx(s.total_s, rel=0.03) for s in samples)


def test_steps_with_a_longer_tail_take_what_they_take_and_others_not_more() -> None:
    """Small steps have a tail, large ones none: a factor over both would be wrong for each."""
    chance, samples = random.Random(8), list[Sample]()
    for i in range(1600):
        rows = 1 if i % 2 else 16
        skew = chance.lognormvariate(0.0, 0.5) if rows == 1 else 1.0  # mean 1.133, middle 1
        load = Load(rows=rows, samples=rows, works=rows, prompt_pairs=[0.0], prompt_entries=[0.0], decode_entries=[0.0],
                    decode_rows=rows)  # fmt: skip
        samples.append(Sample(load, (1e-3 if rows == 1 else 3e-3) * skew, 1e-9, 1e-9))
    found = fit(samples)
    small = [s.model_s for s in samples if s.load.rows == 1 and s.model_s < 3e-3]
    assert found["rows"][0][1] == pytest.approx(sum(small) / len(small), rel=0.03)
    assert dict(found["rows"])[16] == pytest.approx(3e-3, rel=0.01)


def test_a_rest_counts_from_when_the_request_was_sent() -> None:
    """One request, a rest, another that was sent 0.05 s before its step was planned, and listening itself counts for nothing."""
    setup = prepare(EngineConfig(model=resolve(None), max_model_len=256, max_num_seqs=8, threads=1))
    runtime = build(setup)
    driver = Driver(runtime)
    timings = Timings(runtime.engine, Model("m", setup.spec, setup.dtype).figures, len(setup.spec.layers), driver.sent)
    heard = timings._hear

    def slow(entry: Entry) -> None:
        heard(entry)
        time.sleep(0.02)

    timings._hear = slow  # type: ignore[method-assign]
    driver.batch(0, 1, (20,), (4,))
    runtime.engine.tap = timings
    try:
        for seed in (1, 2):
            time.sleep(0.2)
            driver.batch(seed, 1, (20,), (4,))
    finally:
        driver.close()
    assert [(s.load.idle, s.load.entered) for s in timings.samples] == [(1, 1), (0, 0), (0, 0), (0, 0)] * 2
    assert all(s.rest_s < 0.02 for s in timings.samples)  # neither the rest nor what listening takes


def test_a_live_engine_is_listened_to() -> None:
    """Every step but those before which the engine had nothing to do, with a load that adds up."""
    setup = prepare(EngineConfig(model=resolve(None), max_model_len=256, max_num_seqs=8, threads=1))
    samples = measure(build(setup), 1, counts=(3,))
    assert len(samples) > 40
    assert all(s.model_s > 0 and s.rest_s > 0 for s in samples)
    assert {s.load.works for s in samples} >= {1, 2, 3}
    assert any(s.load.rows > s.load.works for s in samples)
    told = json.loads(json.dumps(fit(samples)))
    assert told["steps"] == len(samples)
    assert told["rows"][0][1] > 0
    assert gc.get_freeze_count() == 0, "what the engine was can be collected"


@pytest.mark.parametrize("out", ["missing/x.json", "."])
def test_where_it_cannot_be_written_is_known_before_it_is_measured(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.bench.calibrate.measure", lambda *_: pytest.fail("minutes went by"))
    done = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / out)])
    assert done.exit_code == 2, done.output
    assert "--out" in done.output


def test_a_calibration_that_comes_to_nothing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> list[Sample]:
        raise EngineError("the machine went to sleep")

    monkeypatch.setattr("weft.bench.calibrate.measure", none)
    done = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "x.json"), "--threads", "1"])
    assert done.exit_code == 1
    assert "went to sleep" in done.output
    assert list(tmp_path.iterdir()) == []
