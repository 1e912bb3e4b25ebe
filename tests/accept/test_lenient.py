"""Typical acceptance and BiLD's rollback: the papers' formulas by hand, and live against transformers' laws.

Legend.  p: the target's law.  q: the draft's.  H: entropy of p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.draft.law import reader
from tests.accept.test_rejection import Told
from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import pair
from weft.accept.bild import BiLD
from weft.accept.typical import Typical, entropy
from weft.conform.law import fit
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.fidelity.rule import emitted
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.types import RequestSpec

P = {0: 0.5, 1: 0.3, 2: 0.2}
DRAFT = "draft=speculative_sampling(guesses=3)"


class Raced(Told):
    """winners: of each row's race.  warm: laws at temperature 1, where those of the rows are certain."""

    def __init__(
        self,
        guesses: Sequence[int],
        p: Sequence[Mapping[int, float]],
        winners: Sequence[int],
        parents: Sequence[int] | None = None,
        warm: Sequence[Mapping[int, float]] | None = None,
    ) -> None:
        super().__init__(guesses, p, None, {}, parents)
        self._winners, self._heated = winners, warm or p

    def winner(self, row: int) -> int:
        return self._winners[row]

    def warm(self, row: int) -> tuple[Any, Any]:
        law = self._heated[row]
        return np.array(list(law)), np.array(list(law.values()))


# ---------------------------------------------------------------------------------------------- typical, by hand


def test_the_threshold_by_hand() -> None:
    """H(.5, .3, .2) = .3466 + .3612 + .3219, exp(-H) = .3571: with delta .5 a guess needs .1785, with 1 what epsilon says."""
    assert entropy(np.array([0.5, 0.3, 0.2, 0.0])) == pytest.approx(1.02965, abs=1e-5)
    for epsilon, delta, stand in (
        (0.25, 0.5, {0, 1, 2}), (0.25, 0.57, {0, 1}), (0.25, 1.0, {0, 1}), (0.31, 0.84, {0, 1}), (0.31, 0.85, {0}),
        (0.31, 2.0, {0}), (0.6, 2.0, set()),
    ):  # fmt: skip
        rule = Typical(epsilon=epsilon, delta=delta)
        found = {x for x in P if rule.accept(Raced([x], [P, P], [7, 8])) == ([x, 8], [0])}
        assert found == stand, (epsilon, delta)
        assert all(rule.accept(Raced([x], [P, P], [7, 8])) == ([7], []) for x in P.keys() - stand)


def test_delta_is_the_root_of_epsilon() -> None:
    """The paper's choice: .5 * .3571 = .1785 for epsilon .25, and .6 * .3571 = .2143 for .36."""
    assert Typical(epsilon=0.25).accept(Raced([2], [P, P], [7, 8])) == ([2, 8], [0])
    assert Typical(epsilon=0.36).accept(Raced([2], [P, P], [7, 8])) == ([7], [])


def test_a_chain_ends_at_the_first_that_falls_and_the_race_s_own_stand() -> None:
    low = {4: 0.999, 5: 0.001}
    part = Typical(epsilon=0.25, delta=0.5)
    assert part.accept(Raced([0, 5, 1, 2], [P, low, P, P, P], [9, 5, 9, 9, 6])) == ([0, 5, 1, 2, 6], [0, 1, 2, 3])
    assert part.acts == {"raced": 1, "let": 3, "fell": 0}
    assert part.accept(Raced([0, 5, 1, 2], [P, low, P, P, P], [9, 4, 9, 9, 6])) == ([0, 4], [0])
    assert part.acts == {"raced": 1, "let": 4, "fell": 1}


def test_a_certain_law_lets_its_token_alone_stand() -> None:
    assert Typical(epsilon=0.01).accept(Raced([3], [{2: 1.0}, P], [2, 8])) == ([2], [])
    assert Typical(epsilon=0.01).accept(Raced([2], [{2: 1.0}, P], [2, 8])) == ([2, 8], [0])


def test_of_siblings_the_race_s_goes_first_and_else_the_first_alone_is_asked_about() -> None:
    parents = [-1, -1, 0, 1]
    laws = [P, P, P, P, P]
    part = Typical(epsilon=0.25, delta=0.5)
    assert part.accept(Raced([0, 1, 2, 2], laws, [1, 9, 6, 9, 5], parents)) == ([1, 2, 5], [1, 3])
    assert part.accept(Raced([0, 1, 2, 2], laws, [9, 6, 9, 9, 5], parents)) == ([0, 2, 9], [0, 2])
    assert part.accept(Raced([8, 1, 2, 2], laws, [9, 6, 9, 9, 5], parents)) == ([9], [])


def test_arguments_that_are_none() -> None:
    for wrong in ({"epsilon": 0.0}, {"epsilon": 1.5}, {"delta": 0.0}, {"epsilon": math.nan}):
        with pytest.raises(ValueError, match="above 0"):
            Typical(**wrong)
    with pytest.raises(ValueError, match="rollback"):
        BiLD(rollback=-0.1)


# ---------------------------------------------------------------------------------------------- rollback, by hand


def test_the_rollback_by_hand() -> None:
    """-log .5 = .693, -log .3 = 1.204, -log .2 = 1.609: the first guess farther is the target's, those behind it fall."""
    for rollback, stand in ((0.69, set()), (0.70, {0}), (1.20, {0}), (1.21, {0, 1}), (1.60, {0, 1}), (1.61, {0, 1, 2})):
        rule = BiLD(rollback=rollback)
        assert {x for x in P if rule.accept(Raced([x], [P, P], [7, 8])) == ([x, 8], [0])} == stand, rollback
    part = BiLD(rollback=1.3)
    assert part.accept(Raced([0, 1, 2, 0], [P] * 5, [7, 7, 7, 7, 8])) == ([0, 1, 7], [0, 1])
    assert part.acts == {"raced": 0, "let": 2, "fell": 1}


def test_a_greedy_request_is_measured_at_temperature_1() -> None:
    certain, warm = [{0: 1.0}, {1: 1.0}, {4: 1.0}], [P, P, P]
    view = Raced([1, 2], certain, [0, 1, 4], warm=warm)
    assert BiLD(rollback=1.3).accept(view) == ([1, 1], [0])
    assert BiLD(rollback=1.7).accept(view) == ([1, 2, 4], [0, 1])
    assert BiLD(rollback=0.0).accept(view) == ([0], [])


# ---------------------------------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    given = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 64, "device": "cpu", "threads": 1}
    return build(prepare(EngineConfig(model=resolve(None), techniques=[DRAFT], draft_control="off", **given)))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def requests(ids: Sequence[int], **law: Any) -> list[RequestSpec]:
    return [spec(i, ids[3 * i : 3 * i + 20], seed=i, max_tokens=24, **law) for i in range(8)]


@torch.no_grad()
def along(model: Any, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """Logits for each token of an output."""
    found: torch.Tensor = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    return found.double()


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.9}])
def test_live_rules_that_let_nothing_are_exact(runtime: Runtime, ids: list[int], law: dict[str, Any]) -> None:
    specs = requests(ids, **law)
    plain = Bench(runtime).run(specs)
    for rule in ("accept=bild(rollback=0)", "accept=typical(epsilon=1,delta=99)"):
        assert Bench(runtime, techniques=[DRAFT, rule]).run(specs) == plain, rule


def test_live_typical_is_exact_where_greedy(runtime: Runtime, ids: list[int]) -> None:
    specs = requests(ids, temperature=0.0)
    bench = Bench(runtime, techniques=[DRAFT, "accept=typical(epsilon=0.01)"])
    assert bench.run(specs) == Bench(runtime).run(specs)


def test_live_every_greedy_token_is_the_best_or_near_enough(runtime: Runtime, ids: list[int]) -> None:
    """transformers says how likely each token is: the likeliest, or no farther than the rollback; and some are not the best."""
    rollback = 2.5
    specs = requests(ids, temperature=0.0)
    found = Bench(runtime, techniques=[DRAFT, f"accept=bild(rollback={rollback})"]).run(specs)
    model, others = reader(resolve(None)), 0
    for s in specs:
        (item,) = s.items
        output = found[s.id, 0]
        laws = along(model, item.ids, output).log_softmax(-1)  # type: ignore[union-attr]
        own = laws.gather(1, torch.tensor(output)[:, None])[:, 0]
        far = own < laws.amax(-1) - 1e-4
        assert bool((own[far] >= -rollback - 1e-4).all())
        others += int(far.sum())
    assert others >= 5


def test_live_the_law_of_a_guessed_token(tmp_path: Path) -> None:
    """Two small models: what stands after the first token is drawn by the law that the rule gives transformers' two laws."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    model = pair(target, draft)
    techniques = [f"draft=speculative_sampling(model={str(draft)!r}, guesses=2)", "accept=typical(epsilon=0.12)"]
    given = {"dtype": "float32", "max_num_seqs": 64, "device": "cpu", "threads": 1, "draft_control": "off"}
    runtime = build(prepare(EngineConfig(model=target, techniques=techniques, **given)))
    prompt, law, count = [3, 7, 11, 7, 3, 9, 7], {"temperature": 0.9, "top_k": 5}, 4000
    bench = Bench(runtime, techniques=techniques)
    found = bench.run([spec(i, prompt, seed=i, max_tokens=4, **law) for i in range(count)])
    little = reader(draft)
    wanted: dict[tuple[int, int], float] = {}
    exact: dict[tuple[int, int], float] = {}
    with torch.no_grad():
        for first, chance in cut(model(torch.tensor([prompt])).logits[0, -1]).items():
            both = [dense(cut(m(torch.tensor([[*prompt, first]])).logits[0, -1])) for m in (model, little)]
            for second, e in enumerate(emitted(Typical(epsilon=0.12), *both).law):
                if e > 0:
                    wanted[first, second] = chance * float(e)
                if both[0][second] > 0:
                    exact[first, second] = chance * float(both[0][second])
    drawn = [(found[i, 0][0], found[i, 0][1]) for i in range(count)]
    assert bench.engine.stack["accept"].acts["let"] > 200
    assert fit(drawn, wanted).ok
    assert not fit(drawn, exact).ok, "the target's own law is another"


def cut(logits: torch.Tensor) -> dict[int, float]:
    """The law of temperature 0.9 and top-k 5."""
    best, ids = logits.double().topk(5)
    return dict(zip(ids.tolist(), torch.softmax(best / 0.9, -1).tolist(), strict=True))


def dense(law: Mapping[int, float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    out = np.zeros(24)
    out[list(law)] = list(law.values())
    return out


@pytest.mark.parametrize("rule", ["accept=typical(epsilon=0.01)", "accept=bild(rollback=9)"])
def test_live_what_is_set_or_banned_is_kept(runtime: Runtime, ids: list[int], rule: str) -> None:
    """Tokens set beforehand stand, and one that a bias forbids never does, however lenient the rule."""
    forced = tuple(ids[100:112])
    common = Bench(runtime).run(requests(ids, temperature=0.8))
    banned = max(
        {t for tokens in common.values() for t in tokens}, key=lambda t: sum(x.count(t) for x in common.values())
    )
    specs = [
        RequestSpec(**{f: getattr(s, f) for f in s.__struct_fields__} | {"forced": forced if s.id % 2 else ()})
        for s in requests(ids, temperature=0.8, logit_bias={banned: -100.0})
    ]
    found = Bench(runtime, techniques=[DRAFT, rule]).run(specs)
    assert all(tokens[:12] == list(forced) for (id, _), tokens in found.items() if id % 2)
    assert all(banned not in tokens[12 if id % 2 else 0 :] for (id, _), tokens in found.items())
