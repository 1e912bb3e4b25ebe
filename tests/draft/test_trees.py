"""Drafts that propose trees: their rules by hand, equal tokens under the race, and the law under rules that weigh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.accept.test_rejection import exact_law
from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import pair
from weft.conform.law import fit
from weft.draft.dyspec import DySpec
from weft.draft.paths import Paths
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.slots import Ask, Guesses, Ranked
from weft.types import SamplingSpec

Q = {(): [0.6, 0.3, 0.1], (0,): [0.2, 0.2, 0.6], (1,): [0.9, 0.05, 0.05], (0, 2): [0.4, 0.3, 0.3]}


class Said:
    """A second model whose laws are told by the text after the newest token; its race is by likelihood.  calls: rows of a
    pass."""

    def __init__(self, independent: bool = False) -> None:
        self.independent, self.calls = independent, list[int]()
        self._lines: list[tuple[int, ...]] = []

    def __call__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        self.calls.append(len(rows))
        return torch.zeros(len(rows), 3)

    def grow(self, nodes: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> torch.Tensor:
        for _, tokens, parents in nodes:
            for token, parent in zip(tokens, parents, strict=True):
                self._lines.append((*(self._lines[parent] if parent >= 0 else ()), token))
        self.calls.append(sum(len(tokens) for _, tokens, _ in nodes))
        return torch.zeros(self.calls[-1], 3)

    def draw(self, rows: Any, logits: Any) -> Any:
        raise AssertionError("trees rank")

    def rank(self, rows: Any, logits: Any, most: int, salts: Sequence[int] = ()) -> list[Ranked]:
        assert len(logits) == len(rows)
        assert not self.independent or len(set(salts)) == len(rows)
        out = []
        for n, (_, text) in enumerate(rows):
            assert not text or tuple(text) in self._lines, "a text was ranked before it was computed"
            q = np.array(Q.get(tuple(text), [0.4, 0.35, 0.25]))
            order = np.roll(np.argsort(-q, kind="stable"), -n if self.independent else 0)[:most]
            out.append(Ranked(order.tolist(), q[order].tolist(), torch.tensor(q) if self.independent else None))
        return out


def ask(most: int = 16, independent: bool = False, **law: Any) -> Ask:
    return Ask(np.array([7, 8]), 2, 0, most, SamplingSpec(**law), 1, independent)


def say(part: Any, one: Ask, run: Said) -> Guesses:
    (found,) = part.propose([one], run)
    return found  # type: ignore[no-any-return]


def test_dyspec_by_hand() -> None:
    """Places: 0 with 1, 1 with .4, 2 with .1; after 0 (.6): 2 with .6, then .24; after 1 (.3): 0; after 0 2 (.36): 0."""
    run = Said()
    found = say(DySpec(guesses=12, depth=3, threshold=0.2), ask(), run)
    wanted = [(0, -1), (1, -1), (2, 0), (0, 1), (0, 0), (0, 2), (0, 3), (1, 2)]
    assert list(zip(found.tokens, found.parents, strict=True)) == wanted
    assert run.calls == [1, 2, 2], "a pass for each layer, with a row for each place that is worth it"
    assert found.laws is None


def test_dyspec_ends_with_its_guesses_and_at_end_ids() -> None:
    assert list(say(DySpec(guesses=3, threshold=0.01), ask(), Said()).tokens) == [0, 1, 2]
    assert list(say(DySpec(threshold=0.01), ask(most=2), Said()).tokens) == [0, 1]
    found = say(DySpec(guesses=12, depth=3, threshold=0.2), ask(stop_ids=(0,)), Said())
    assert 0 not in [found.tokens[p] for p in found.parents if p >= 0]


def test_dyspec_tells_the_law_of_each_draw() -> None:
    """The second of a place was drawn from what the first left: (.6, .3, .1) without 0 is (0, .75, .25)."""
    found = say(DySpec(guesses=3, depth=1, threshold=0.05), ask(independent=True), Said(independent=True))
    assert list(found.tokens) == [0, 1, 2]
    wanted = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.75, 0.25], [0.0, 0.0, 1.0]], dtype=found.laws.dtype)
    torch.testing.assert_close(found.laws, wanted)


def test_paths_by_hand() -> None:
    """Under the race path i begins with the i-th; draws that are weighed are each a path's own, twins too."""
    found = say(Paths(paths=2, length=3), ask(), Said())
    assert list(zip(found.tokens, found.parents, strict=True)) == [(0, -1), (1, -1), (2, 0), (0, 1), (0, 2), (0, 3)]
    found = say(Paths(paths=2, length=2), ask(independent=True, temperature=1.0), Said(independent=True))
    assert list(found.parents) == [-1, -1, 0, 1]
    assert found.laws.shape == (4, 3)
    greedy = say(Paths(paths=2, length=2), ask(independent=True, temperature=0.0), Said(independent=True))
    assert list(greedy.parents) == [-1, 0], "equal paths are one"
    assert len(say(Paths(paths=2, length=3), ask(most=3), Said()).tokens) == 3


@pytest.mark.parametrize(
    "text",
    ["dyspec(guesses=0)", "dyspec(threshold=1.0)", "dyspec(model='')", "paths(paths=0)", "paths(paths=9, length=9)",
     "paths(model='')"],
)  # fmt: skip
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"draft={text}").build()


# ---------------------------------------------------------------------------------------------- live

DRAFTS = ["draft=dyspec(guesses=7, depth=3)", "draft=paths(paths=2, length=3)"]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def with_draft(draft: str, ops: str = "auto", model: Path | None = None) -> Runtime:
    given = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 64, "device": "cpu", "threads": 1, "ops": ops}
    return build(prepare(EngineConfig(model=model or resolve(None), techniques=(draft,), **given)))  # type: ignore[arg-type]


@pytest.mark.parametrize("ops", ["auto", "ref"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_live_the_race_keeps_its_tokens(draft: str, ops: str, ids: list[int]) -> None:
    runtime = with_draft(draft, ops)
    laws: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "stop_ids": (4, 13)},
    ]
    specs = [spec(i, ids[i : i + 20], seed=i, max_tokens=16, **laws[i % 3]) for i in range(9 if ops == "auto" else 4)]
    bench, plain = Bench(runtime, techniques=[draft]), Bench(runtime)
    assert bench.run(specs) == plain.run(specs)
    acts = bench.engine.stack["draft"].acts
    assert acts["accepted"] > 20
    assert bench.steps < plain.steps


@pytest.mark.parametrize(
    ("draft", "least"), [("paths(paths=2, length=3", 13), ("dyspec(guesses=8, depth=3, threshold=0.1", 10)]
)
def test_live_a_draft_that_is_the_target_is_right(draft: str, least: int, ids: list[int]) -> None:
    """The first of its race is the target's token, greedy and drawn: logits of a tree's rows are those of its lines."""
    text = f"draft={draft}, model={str(resolve(None))!r})"
    bench = Bench(with_draft(text), techniques=[text])
    bench.run([spec(i, ids[i : i + 20], seed=i, max_tokens=21, temperature=0.7 * (i % 2)) for i in range(4)])
    assert bench.engine.stack["draft"].acts["accepted"] >= 4 * least


PAIRS = [
    ("dyspec(guesses=5, depth=2, threshold=0.05", "rejection"),
    ("paths(paths=3, length=2", "spectr"),
    ("paths(paths=2, length=2", "rejection"),
    ("dyspec(guesses=5, depth=2, threshold=0.05", "spectr"),
]


@pytest.mark.parametrize(
    ("draft", "rule"), [PAIRS[0], PAIRS[1], *(pytest.param(*p, marks=pytest.mark.long) for p in PAIRS[2:])]
)
def test_live_the_joint_law(tmp_path: Path, draft: str, rule: str) -> None:
    """Of three tokens, of which the first has no guess, by transformers' own logits."""
    model = pair(tmp_path / "target", tmp_path / "draft")
    techniques = [f"draft={draft}, model={str(tmp_path / 'draft')!r})", f"accept={rule}"]
    given = {"dtype": "float32", "max_num_seqs": 64, "device": "cpu", "threads": 1}
    runtime = build(prepare(EngineConfig(model=tmp_path / "target", techniques=techniques, **given)))  # type: ignore[arg-type]
    prompt, law, count = [3, 7, 11, 7, 3, 9, 7], {"temperature": 0.9, "top_k": 4}, 1500
    bench = Bench(runtime, techniques=techniques)
    found = bench.run([spec(i, prompt, seed=i, max_tokens=4, **law) for i in range(count)])  # type: ignore[arg-type]
    acts = bench.engine.stack["accept"].acts
    assert min(acts.values()) > 100
    wanted = exact_law(model, prompt, 0.9, 4, 3)
    assert len(wanted) == 64
    assert fit([tuple(found[i, 0][:3]) for i in range(count)], wanted).ok
