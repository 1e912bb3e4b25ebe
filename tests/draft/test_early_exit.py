"""The target's first layers as a draft: the formula by hand, guesses and shadow tokens beside transformers, equal tokens, the
law."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.draft.law import reader
from bench.draft.stands import judged, written
from tests.accept.test_rejection import exact_law
from tests.draft.test_speculative_sampling import LAWS, Watching
from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import pair, shallow
from weft.conform.law import fit
from weft.draft.early_exit import EarlyExit, best, tokens_per_layer
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.shallow import FirstLayers, Shallow
from weft.exec.thread import step
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.slots import Ask
from weft.types import Plan, SamplingSpec, StepResult, WorkResult


def test_tokens_for_a_layer_by_hand() -> None:
    """a = 0.5, l = 2, d = 2, L = 8: 1 + 0.5 + 0.25 tokens, 2 * 2 + 8 layers; the paper's closed form; plain is 1 of 8."""
    assert tokens_per_layer(0.5, 2, 2, 8) == pytest.approx(1.75 / 12)
    assert tokens_per_layer(0.5, 2, 2, 8) == pytest.approx((1 - 0.5**3) / ((1 - 0.5) * (2 * 2 + 8)))
    assert tokens_per_layer(0.9, 7, 0, 8) == pytest.approx(1 / 8)
    # Half of the layers, nine in ten right: d = 1 1.9 / 12, d = 2 2.71 / 16, d = 3 3.439 / 20, d = 4 4.095 / 24; three are best.
    assert best({4: 0.9}, 8, 8) == (4, 3)
    assert best({4: 0.9}, 2, 8) == (4, 2)
    assert best({2: 0.2, 4: 0.4, 6: 0.7}, 8, 8)[1] == 0  # 1.2 / 10, 1.4 / 12 and 1.7 / 14 against 1 / 8
    rnd = random.Random(1)
    for _ in range(30):
        hopes = {exit: rnd.random() for exit in (2, 4, 6)}
        exit, guesses = best(hopes, 8, 8)
        rates = [tokens_per_layer(a, e, d, 8) for (e, a), d in itertools.product(hopes.items(), range(9))]
        assert tokens_per_layer(hopes[exit], exit, guesses, 8) == max(rates)


def test_exits_and_arguments() -> None:
    assert EarlyExit().exits(8) == (2, 4, 6)
    assert EarlyExit().exits(24) == (6, 12, 18)
    assert EarlyExit().exits(2) == (1,)
    assert EarlyExit(exit=5).exits(8) == (5,)
    for part, layers in ((EarlyExit(exit=8), 8), (EarlyExit(), 1)):
        with pytest.raises(ConfigError, match="first layers"):
            part.exits(layers)
    for text in ("guesses=0", "guesses=17", "exit=-1", "size=1"):
        with pytest.raises(ConfigError):
            parse(f"draft=early_exit({text})").build()


def made(*techniques: str, model: Path | None = None, ops: str = "auto", **more: Any) -> Runtime:
    given: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 64,
        "device": "cpu",
        "threads": 1,
    }
    config = EngineConfig(
        model=model or resolve(None), techniques=techniques, draft_control="off", ops=ops, **{**given, **more}
    )
    return build(prepare(config))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.mark.parametrize("ops", ["auto", "ref"])
def test_guesses_are_those_of_a_model_of_the_first_layers(tmp_path: Path, ids: list[int], ops: str) -> None:
    """Beside the bundled model cut after five layers as a second model of its own."""
    specs = [spec(i, ids[3 * i : 3 * i + 30], seed=i, max_tokens=20, **LAWS[i % 8]) for i in range(16)]
    second = f"draft=speculative_sampling(guesses=3, model={str(shallow(tmp_path, 5))!r})"
    seen = []
    for draft in ("draft=early_exit(exit=5, guesses=3)", second):
        bench = Bench(made(draft, ops=ops), techniques=[draft])
        watching = Watching(bench)
        seen.append((bench.run(specs), watching.guessed))
    assert len(seen[0][1]) > 50
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("draft", "ops"),
    [
        ("early_exit(exit=6, guesses=4)", "auto"),
        pytest.param("early_exit(exit=6, guesses=4)", "ref", marks=pytest.mark.long),
        ("early_exit(guesses=4)", "auto"),
        ("early_exit(guesses=4)", "ref"),
    ],
)
def test_equal_tokens(ids: list[int], ops: str, draft: str) -> None:
    """Under every law, with forks, in chunks, with a pool so short that sequences are preempted and none for what lies ahead."""
    specs = [spec(i, ids[3 * i : 3 * i + 30], seed=i, n=1 + i % 2, max_tokens=36, **LAWS[i % 8]) for i in range(16)]
    runtime = made(ops=ops)
    wanted = Bench(runtime).run(specs)
    for limits in ({}, {"blocks": 14, "max_rows": 24, "max_num_seqs": 6}):
        bench = Bench(runtime, techniques=[f"draft={draft}"], **limits)  # type: ignore[arg-type]
        assert bench.run(specs) == wanted
        acts = bench.engine.stack["draft"].acts
        assert acts["proposed"] > acts["accepted"] > 10
        assert not limits or bench.engine.stats.preemptions
    Bench(runtime, techniques=[f"draft={draft}", "accept=rejection"]).run(specs)


def test_shadow_tokens_are_what_the_exits_would_have_said(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, beside transformers: the head on the hidden state after l layers, at each place that stood."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve(None)).float().eval()
    bench = Bench(made(), techniques=["draft=early_exit(guesses=3)"])
    seen: list[tuple[list[int], dict[int, list[bool]]]] = []
    inner = EarlyExit.propose

    def propose(self: EarlyExit, asks: Sequence[Ask], run: FirstLayers) -> Any:
        seen.extend((ask.context.tolist(), dict(run.shadows(i))) for i, ask in enumerate(asks))  # type: ignore[arg-type]
        return inner(self, asks, run)

    monkeypatch.setattr(EarlyExit, "propose", propose)
    monkeypatch.setattr("weft.draft.early_exit.LOOK", 1)
    bench.run([spec(i, ids[9 * i : 12 * i + 5], max_tokens=12, temperature=0.0) for i in range(5)])
    seen = [(context, said) for context, said in seen if said]  # after a prompt nobody had asked to look
    assert len(seen) > 20
    assert any(len(said[2]) > 1 for _, said in seen)
    for context, said in seen[::2]:
        assert set(said) == {2, 4, 6}
        with torch.no_grad():
            states = model(torch.tensor([context]), output_hidden_states=True).hidden_states
            for exit, right in said.items():
                best_T = model.lm_head(model.model.norm(states[exit][0])).argmax(-1).tolist()
                first = len(context) - 1 - len(right)
                assert right == [best_T[first + j] == context[first + j + 1] for j in range(len(right))]


def test_what_an_exit_is_worth_is_learnt() -> None:
    """An exit after 2 of 8 layers that is always right, those after 4 and 6 never: it alone stays, with all the guesses."""

    class Run:
        layers, exit, right, asked, look = 8, 0, True, 0, False

        def shadows(self, i: int) -> dict[int, list[bool]]:
            self.asked += 1
            return {2: [self.right], 4: [False], 6: [False]}

        def __call__(self, rows: Any) -> Any:
            return rows

        def draw(self, rows: Any, logits: Any) -> Any:
            return [(7, None) for _ in rows]

    part, run, state = EarlyExit(guesses=5), Run(), dict[Any, Any]()
    ask = Ask(np.array([1, 2]), 1, 1, 16, SamplingSpec(), 1, state=state)
    for _ in range(80):
        (found,) = part.propose([ask], run)  # type: ignore[arg-type]
    assert (run.exit, len(found.tokens)) == (2, 5)
    stood, tried = 0.6 * 4, 4.0
    for _ in range(80):
        stood, tried = 0.95 * stood + 1, 0.95 * tried + 1
    assert state["2"] == pytest.approx((stood, tried))
    new = Ask(np.array([1, 2]), 1, 1, 16, SamplingSpec(), 1)
    run.right = False
    part.propose([new], run)  # type: ignore[arg-type]
    stood, tried = 0.6 * 4, 4.0
    for _ in range(80):
        stood, tried = 0.99 * stood + 1, 0.99 * tried + 1
    assert new.state["2"] == pytest.approx(
        (0.95 * stood / tried * 4, 0.95 * 4 + 1)
    )  # what is known of the other, and its miss
    run.asked = 0
    for _ in range(160):
        (found,) = part.propose([ask], run)  # type: ignore[arg-type]
    assert not found.tokens
    assert run.asked < 60, "while nothing is guessed it looks now and then"
    looks = []
    for _ in range(16):
        part.propose([ask], run)  # type: ignore[arg-type]
        looks.append(run.look)
    assert sum(looks) == 2
    run.right = True
    for _ in range(400):
        (found,) = part.propose([ask], run)  # type: ignore[arg-type]
    assert found.tokens


def test_live_the_joint_law(tmp_path: Path) -> None:
    """Of three tokens, of which the first has no guess, by transformers' own logits."""
    model = pair(tmp_path / "target", tmp_path / "other")
    techniques = ["draft=early_exit(exit=1, guesses=2)", "accept=rejection"]
    runtime = made(*techniques, model=tmp_path / "target", max_model_len=128)
    prompt, law, count = [3, 7, 11, 7, 3, 9, 7], {"temperature": 0.9, "top_k": 4}, 1500
    bench = Bench(runtime, techniques=techniques)
    found = bench.run([spec(i, prompt, seed=i, max_tokens=4, **law) for i in range(count)])  # type: ignore[arg-type]
    assert bench.engine.stack["draft"].acts["accepted"] > 300
    assert fit([tuple(found[i, 0][:3]) for i in range(count)], exact_law(model, prompt, 0.9, 4, 3)).ok


def test_the_plan_has_the_laws_and_a_work_the_room(ids: list[int]) -> None:
    part = "draft=early_exit(exit=4, guesses=3)"
    plain, own = (prepare(made(*parts).setup.config).plan for parts in ((), (part,)))
    assert own.draft_bytes - plain.draft_bytes == 64 * 3 * 4096 * 4
    assert own.weights_bytes == plain.weights_bytes
    assert own.kv_bytes_per_token == plain.kv_bytes_per_token
    runtime = made(part)
    works = []
    inner = runtime.executor.execute

    def execute(plan: Plan) -> StepResult:
        works.extend(plan.works)
        return inner(plan)

    runtime.executor.execute = execute  # type: ignore[method-assign]
    runtime.engine.add(spec(1, ids[:20], max_tokens=30, temperature=0.0), 0.0)
    while runtime.engine.has_work:
        step(runtime.engine, runtime.executor)
    assert {w.ahead for w in works} == {3}
    assert Shallow.room(works[0], WorkResult(rows=20, tokens=(5,))) == 3


@pytest.mark.long
def test_guesses_stand_as_often_as_the_laws_predict(tmp_path: Path, ids: list[int]) -> None:
    """After six of eight layers, some 2,500 trials; transformers reads the model, and the same cut after six layers."""
    runtime = made("draft=early_exit(exit=6, guesses=3)")
    prompts = [ids[10 * i : 10 * i + 12] for i in range(10)]
    texts = written(runtime, prompts, range(10), SamplingSpec(max_tokens=300, temperature=0.8))
    found = judged(texts, reader(resolve(None)), reader(shallow(tmp_path, 6)), 0.8, weighs=False)
    assert found.trials > 2000
    assert found.slips == 0
    assert found.rate == pytest.approx(found.predicted, abs=0.02)
