"""Generated: every pair of techniques of different slots goes together as `compose` says, or is refused with its reasons.

On each run the pairs of techniques that changed since the last whole run (bench/results/pairs.json), and a few others, chosen
anew whenever the core changes; all of them in `make test-long`, which writes that file, and those that are open by
`python -m tools.pairs`.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import pairs as program
from weft.conform import pairs
from weft.conform.checks import DRAWS
from weft.conform.lab import Lab
from weft.exec.host import cpu_count

ROOT = Path(__file__).resolve().parents[2]
LEDGER = program.LEDGER
LAB: Lab | None = None
"""Of a process that tests pairs for `test_all_pairs`."""
OTHERS = 6
"""Pairs that are tested although neither of their files changed."""
MOST = 12
"""Pairs of one run; where more changed, those whose turn it is by the state of the core."""


def known() -> dict[str, str]:
    """Digest of each pair when it was last tested with all others."""
    return {name: record["digest"] for name, record in program.read(LEDGER).items()}


def by_turn(found: list[pairs.Pair]) -> list[pairs.Pair]:
    """An order that changes with the sources of core and execution."""
    h = hashlib.blake2b(digest_size=8)
    for folder in ("core", "exec", "models", "ops"):
        for path in sorted((ROOT / "weft" / folder).rglob("*.py")):
            h.update(path.read_bytes())
    return sorted(found, key=lambda p: hashlib.blake2b(str(p).encode(), key=h.digest()).digest())


def chosen() -> list[pairs.Pair]:
    before, every = known(), by_turn(pairs.pairs())
    changed = [p for p in every if before.get(str(p)) != pairs.digest(p)]
    rest = [p for p in every if p not in changed]
    return [*changed[:MOST], *rest[:OTHERS]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pair", chosen(), ids=str)
def test_the_pair(lab: Lab, pair: pairs.Pair) -> None:
    assert pairs.check(lab, pair), "nothing was said of what was compared"


def test_every_technique_is_in_a_pair() -> None:
    met = {side for p in pairs.pairs() for side in (p.one, p.other)}
    assert met == set(pairs.techniques())
    assert all(p.one[0] != p.other[0] for p in pairs.pairs())


def test_a_pair_is_tested_anew_when_either_file_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs.pairs()[0]
    before = pairs.digest(pair)
    source = pairs.inspect.getsource
    monkeypatch.setattr(pairs.inspect, "getsource", lambda module: source(module) + "# more")
    assert pairs.digest(pair) == before, "a comment is no change"
    monkeypatch.setattr(pairs.inspect, "getsource", lambda module: source(module) + "MORE = 1")
    assert pairs.digest(pair) != before


def test_what_a_technique_imports_of_its_folder_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(source: str) -> bytes:
        read.append(source)
        return b""

    monkeypatch.setattr(pairs, "code", noted)
    folder = ROOT / "weft" / "draft"
    common, weights = ((folder / name).read_text(encoding="utf8") for name in ("_common.py", "_weights.py"))
    for name, wanted in (
        ("clover", {common, weights}), ("prompt_tokens", {common, weights}), ("vocabtrim", {common}), ("ngram", set()),
    ):  # fmt: skip
        read.clear()
        pairs.digest(pairs.Pair(("draft", name), ("skip", "mue")))
        assert set(read) & {common, weights} == wanted, name


def entry(pair: pairs.Pair, device: str, draws: int) -> dict[str, Any]:
    """The ledger's record of a pair, tested in a process that keeps one laboratory."""
    global LAB
    LAB = LAB or Lab(device=device)
    return program.entry(LAB, pair, draws)


def all_pairs(ledger: Path, device: str, draws: int) -> None:
    """Test every pair, over all cores; the ledger grows as they end."""
    told: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(max(1, int(cpu_count().cores)), multiprocessing.get_context("spawn")) as workers:
        names = {workers.submit(entry, pair, device, draws): str(pair) for pair in pairs.pairs()}
        for ended in as_completed(names):
            told[names[ended]] = ended.result()
            program.write(ledger, told)
    assert [f"{name}: {record['text']}" for name, record in told.items() if not record["ok"]] == []


@pytest.mark.long
@pytest.mark.hours
@pytest.mark.timeout(4 * 3600)
def test_all_pairs() -> None:
    all_pairs(LEDGER, "cpu", DRAWS)


@pytest.mark.long
@pytest.mark.hours
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device answers")
def test_all_pairs_on_a_gpu() -> None:
    """With the draws that see a sampler go wrong: the law itself is that of the CPU."""
    all_pairs(LEDGER.with_name("pairs-cuda.json"), "cuda", pairs.PAIR_DRAWS)
