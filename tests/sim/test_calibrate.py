"""Calibration: the fit finds what a machine is made of, whatever held up some steps; the engine's loop is listened to."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from weft.bench.calibrate import Sample, fit, measure, nonnegative, write
from weft.cost.calibrated import Calibrated, line
from weft.errors import EngineError
from weft.exec.build import EngineConfig, build, prepare
from weft.hub import resolve
from weft.sim.machines import Model, hardware
from weft.slots.cost import Load


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
    write(file, found, {"model": "x"})
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
