"""A technique from outside: one file in a folder of its own, nothing else edited, and it is everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.cli.running import Serving, weft
from tools import matrix
from weft.cli.new import begin, starters
from weft.conform import pairs
from weft.conform.checks import conform
from weft.conform.lab import Lab
from weft.features import features
from weft.registry import load_plugin
from weft.slots import SLOTS


def told(*arguments: str) -> str:
    """What a command printed; it must succeed."""
    done = weft(*arguments, timeout=280)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_a_new_file_is_live_simulated_listed_and_tested(tmp_path: Path, clean_registry: None) -> None:
    """`weft new` writes it, `weft conform` passes it, a server runs it, and every list has it."""
    file = str(tmp_path / "echo.py")
    assert told("new", "draft", "echo", "--out", file).strip() == file
    again = weft("new", "draft", "echo", "--out", file)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    tests = json.loads(told("conform", file, "--json"))
    assert {t["technique"] for t in tests} == {"draft=echo"}
    assert all(t["ok"] for t in tests), tests
    assert {"simulated", "live", "acts", "fidelity EXACT"} <= {t["test"] for t in tests}
    listed = json.loads(told("features", "--plugin", file, "--json"))
    assert ("draft", "echo") in {(f["slot"], f["name"]) for f in listed}
    said = json.loads(told("compose", "draft=echo", "kv.store=int8", "--plugin", file, "--json"))
    assert said["verdict"] == "ok"
    with Serving(tmp_path, "--port", "0", "--plugin", file, "--with", "draft=echo(guesses=2)") as server:
        url = server.url()
        body = {"prompt": "The sea was calm, the sea was", "max_tokens": 16, "temperature": 0, "weft": {"label": True}}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert "draft=echo(guesses=2)" in answer["weft"]["stack"]
        (line,) = [x for x in httpx.get(f"{url}/metrics").text.splitlines() if 'technique="draft=echo"' in x]
        assert int(line.split()[-1]) > 0
    load_plugin(tmp_path / "echo.py")
    assert ("draft", "echo") in {(f.slot, f.name) for f in features()}
    assert "`draft=echo`" in matrix.page(matrix.shown())
    mine = [p for p in pairs.pairs() if ("draft", "echo") in (p.one, p.other)]
    assert len(mine) == len([slot for slot, _ in pairs.techniques() if slot != "draft"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("slot", starters())
def test_every_beginning_passes_its_own_tests(lab: Lab, slot: str, tmp_path: Path, clean_registry: None) -> None:
    path = tmp_path / "fresh_one.py"
    path.write_text(begin(slot, "fresh_one"))
    load_plugin(path)
    wrong = [f"{r.test}: {r.text}" for r in conform(lab, slot, "fresh_one") if not r.ok]
    assert wrong == []


def test_every_slot_with_techniques_has_a_beginning() -> None:
    assert {slot for slot, _ in pairs.techniques()} <= set(starters()) <= set(SLOTS)
