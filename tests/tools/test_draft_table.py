"""The table of drafts: what is measured first, which requests of Spec-Bench, and which rows are taken again."""

from __future__ import annotations

import argparse
import random
from itertools import islice
from pathlib import Path

from bench.contender import Run
from bench.draft import table, whole
from bench.draft.table import Load, Stack
from bench.harness import bundled
from weft.registry import parse


def test_the_floor_is_measured_first() -> None:
    first = [(load, sweep) for sweep in islice(whole.sweeps(), 3) for load in whole.loads(sweep)]
    assert [batch for (_, _, batch), _ in first] == [8] * 6 + [16] * 6 + [32] * 6
    assert {(text, temperature) for (text, temperature, _), _ in first} == {
        (text, t) for text in table.TEXTS for t in (0.8, 0.0)
    }
    for _, sweep in first:
        assert sweep.drafts == ("clover(guesses=4)", "speculative_sampling(guesses=4)", "ngram")
        assert sweep.controller == ("on",)


def test_six_requests_are_one_of_each_kind() -> None:
    kinds = (*whole.KINDS, "writing", "coding")
    asked = [{"category": kind, "turns": [f"{kind} {n}", "and then?"]} for kind in kinds for n in range(3)]
    found = whole.in_turns(asked, random.Random(1))
    assert sorted(found) == sorted(question["turns"][0] for question in asked)
    for n in range(0, 18, 6):
        several = [ask.split()[0] for ask in found[n : n + 6]]
        assert sorted("mt" if k in ("writing", "coding") else k for k in several) == sorted((*whole.KINDS, "mt"))


def test_rows_of_another_controller_are_taken_again() -> None:
    flags, model = argparse.Namespace(threads=2, since=""), bundled()
    load = Load("prose", 0.8, 8)
    on, off = (Stack(parse("draft=ngram"), "race", controller, None) for controller in (True, False))
    row = {
        "draft": "ngram", "accept": "race", "batch": 8, "prompts": "prose", "temperature": 0.8, "controller": True,
        "threads": 2, "draft_share": 0.0, "decided_by": whole.decided_by(), "date": "2026-11-28",
    }  # fmt: skip
    assert table._there([row], on, load, model, flags)
    assert not table._there([row], off, load, model, flags)
    assert not table._there([row | {"decided_by": "another"}], on, load, model, flags)
    assert table._there([row | {"decided_by": None, "controller": False}], off, load, model, flags)
    for since, there in (("2026-11-28", True), ("2026-11-29", False)):
        flags.since = since
        assert table._there([row], on, load, model, flags) is there
    assert Path(whole.control.__file__ or "").name == "control.py"


def test_speeds_of_a_whole_wave_and_until_its_first_answer_ends() -> None:
    run = Run(decode_s=10.0, decode_tok=40, steps=[(2.0, 16, 8), (2.0, 12, 8), (4.0, 8, 5), (2.0, 4, 1)])
    assert table._speed(run) == 4
    assert table._speed(run, 8) == 7
