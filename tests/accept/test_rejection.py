"""Rejection sampling: the paper's formula by hand, the law over a small vocabulary with the test's power, and live.

Legend.  p: the target's law.  q: the draft's.  V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import pair, shallow
from weft.accept.rejection import Rejection
from weft.conform.law import fit, power
from weft.core import noise
from weft.exec import sampler
from weft.exec.ahead import DRAFT, dense_law
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.verify import Verified
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.slots import Verify
from weft.types import RequestSpec, SamplingSpec

Floats = np.ndarray[Any, np.dtype[np.float64]]
EMPTY = np.empty(0, np.int64)


# ---------------------------------------------------------------------------------------------- by hand


class Told:
    """A view whose laws and noise are told.  noise: by (row, token, salt); what is not told must not be asked."""

    def __init__(
        self,
        guesses: Sequence[int],
        p: Sequence[Mapping[int, float]],
        q: Sequence[Sequence[float]] | None,
        noise: Mapping[tuple[int, int, int], float],
        parents: Sequence[int] | None = None,
    ) -> None:
        self.guesses, self.parents = guesses, parents or range(-1, len(guesses) - 1)
        self.laws = None if q is None else torch.tensor(q)
        self._p, self._noise = p, noise

    def winner(self, row: int) -> int:
        return 70 + row

    def law(self, row: int) -> tuple[Any, Floats]:
        return np.array(list(self._p[row])), np.array(list(self._p[row].values()))

    def uniform(self, row: int, token: int, salt: int) -> float:
        return self._noise[row, token, salt]


STAND, REST = 1, 2


def test_the_formula_by_hand() -> None:
    """q = (.5, .3, .2, 0), p = (.2, .3, .1, .4): guess 0 stands with .2 / .5, and where it falls only 3 has something left."""
    q, p = [[0.5, 0.3, 0.2, 0.0]], [{0: 0.2, 1: 0.3, 2: 0.1, 3: 0.4}, {0: 1.0}]
    part = Rejection()
    assert part.accept(Told([0], p, q, {(0, 0, STAND): 0.39})) == ([0, 71], [0])
    assert part.accept(Told([0], p, q, {(0, 0, STAND): 0.41, (0, 0, REST): 0.5})) == ([3], [])
    assert part.accept(Told([1], p, q, {(0, 1, STAND): 0.999})) == ([1, 71], [0])
    assert part.accept(Told([2], p, q, {(0, 2, STAND): 0.49})) == ([2, 71], [0])
    assert part.accept(Told([2], p, q, {(0, 2, STAND): 0.51, (0, 0, REST): 0.01})) == ([3], [])
    assert part.acts == {"accepted": 3, "rejected": 2}


def test_what_is_left_is_drawn_by_its_share() -> None:
    """p - q = (-, .05, .15, .3): over .5 that is .1, .3, .6; ids stand in the target's own order."""
    q, p = [[0.8, 0.1, 0.05, 0.05]], [{3: 0.35, 0: 0.3, 2: 0.2, 1: 0.15}]
    for u, token in ((0.59, 3), (0.61, 2), (0.89, 2), (0.91, 1), (0.999, 1)):
        tokens, path = Rejection().accept(Told([0], p, q, {(0, 0, STAND): 0.5, (0, 0, REST): u}))
        assert (tokens, path) == ([token], []), u


def test_a_chain_ends_at_the_first_that_falls() -> None:
    p = [{5: 0.5, 6: 0.5}, {6: 0.1, 7: 0.9}, {5: 1.0}, {5: 1.0}]
    q = [[0, 0, 0, 0, 0, 0.6, 0.4, 0], [0, 0, 0, 0, 0, 0, 1.0, 0], [0, 0, 0, 0, 0, 1.0, 0, 0]]
    fine = {(0, 5, STAND): 0.8, (1, 6, STAND): 0.09, (2, 5, STAND): 0.999}
    assert Rejection().accept(Told([5, 6, 5], p, q, fine)) == ([5, 6, 5, 73], [0, 1, 2])
    falls = {**fine, (1, 6, STAND): 0.11, (1, 0, REST): 0.3}
    assert Rejection().accept(Told([5, 6, 5], p, q, falls)) == ([5, 7], [0])


def test_a_guess_without_a_law_was_certain() -> None:
    """It stands with p(x), and what is left is p without it."""
    p = [{4: 0.3, 5: 0.2, 6: 0.5}, {4: 1.0}]
    assert Rejection().accept(Told([5], p, None, {(0, 5, STAND): 0.19})) == ([5, 71], [0])
    for u, token in ((0.37, 4), (0.38, 6)):
        assert Rejection().accept(Told([5], p, None, {(0, 5, STAND): 0.21, (0, 0, REST): u})) == ([token], [])
    gone = {(0, 9, STAND): 1e-9, (0, 0, REST): 0.4}
    assert Rejection().accept(Told([9], p, None, gone)) == ([5], []), "a guess that the target's law cut never stands"


def test_of_siblings_each_is_weighed_against_what_is_left() -> None:
    """q = (.5, .3, .2), then without 0: (0, .6, .4).  p = (.2, .3, .5): what 0 leaves is .3 of 2 alone, and so 1 never stands."""
    q = [[0.5, 0.3, 0.2], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]]
    p = [{0: 0.2, 1: 0.3, 2: 0.5}, {5: 1.0}, {5: 1.0}, {5: 1.0}]
    falls = {(0, 0, STAND): 0.41, (0, 1, STAND + 2): 1e-9, (0, 2, STAND + 4): 0.999}
    part = Rejection()
    assert part.accept(Told([0, 1, 2], p, q, falls, parents=[-1, -1, -1])) == ([2, 73], [2])
    assert part.acts == {"accepted": 1, "rejected": 2}
    assert Rejection().accept(Told([0, 1], p, q[:2], {**falls, (0, 0, REST): 0.5}, parents=[-1, -1])) == ([2], [])
    assert Rejection().accept(Told([0, 1], p, q[:2], {(0, 0, STAND): 0.39}, parents=[-1, -1])) == ([0, 71], [0])


def test_siblings_that_were_certain_share_the_law() -> None:
    """p = (.2, .3, .5): 0 stands with .2, else 1 with .3 / .8, else 2."""
    p = [{0: 0.2, 1: 0.3, 2: 0.5}, {7: 1.0}, {7: 1.0}]
    view = {(0, 0, STAND): 0.21, (0, 1, STAND + 2): 0.374}
    assert Rejection().accept(Told([0, 1], p, None, view, parents=[-1, -1])) == ([1, 72], [1])
    view = {(0, 0, STAND): 0.21, (0, 1, STAND + 2): 0.376, (0, 0, REST): 0.9}
    assert Rejection().accept(Told([0, 1], p, None, view, parents=[-1, -1])) == ([2], [])


def test_twins_go_on_together() -> None:
    """Two draws of one token stand together; the second's own continuation is weighed where the first's falls."""
    q = [[1.0, 0.0, 0.0]] * 2 + [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    p = [{0: 1.0}, {1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.5}, {0: 1.0}, {0: 1.0}]
    view = {(0, 0, STAND): 0.5, (1, 1, STAND): 0.6, (1, 2, STAND + 2): 0.9}
    assert Rejection().accept(Told([0, 0, 1, 2], p, q, view, parents=[-1, -1, 0, 1])) == ([0, 2, 74], [1, 3])


# ---------------------------------------------------------------------------------------------- the law, and its power

V, DRAWS = 12, 20_000
LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"temperature": 0.9, "top_p": 0.85},
}


class Lenient(Rejection):
    """Lets 2 % of all guesses stand that should fall."""

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        return super().accept(Biased(view))  # type: ignore[arg-type]


class Biased:
    """A view whose noise of acceptance is too small by 0.02."""

    def __init__(self, view: Verify) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def uniform(self, row: int, token: int, salt: int) -> float:
        return self._view.uniform(row, token, salt) - (0.02 if salt == STAND else 0.0)


class Unprocessed(Rejection):
    """Draws what is left from the models' own laws (p, q), before temperature and truncation."""

    def __init__(self, raw: tuple[Floats, Floats]) -> None:
        super().__init__()
        object.__setattr__(self, "raw", raw)

    def _weigh(self, view: Verify, row: int, found: Sequence[int]) -> int:
        token = super()._weigh(view, row, found)
        if token == view.guesses[found[0]]:
            return token
        p, q = self.raw  # type: ignore[attr-defined]
        reached = (p - q).clip(min=0.0).cumsum() > view.uniform(row, 0, REST) * (p - q).clip(min=0.0).sum()
        return int(reached.argmax())


def logits(seed: int) -> torch.Tensor:
    return 1.3 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def law_of(x: torch.Tensor, sampling: SamplingSpec) -> Floats:
    return dense_law(x, sampler.Row(sampling, 0, 0, EMPTY, 0)).double().numpy()


def draws(part: Rejection, sampling: SamplingSpec, count: int) -> Iterator[int]:
    """The first token that stands, of so many seeds: a guess from the draft, weighed against the target."""
    target, draft = torch.stack([logits(1), logits(1)]), logits(2)
    law = dense_law(draft, sampler.Row(sampling, 0, 0, EMPTY, 0))[None]
    known = {0: sampler.law(target[0], sampler.Row(sampling, 0, 0, EMPTY, 0))}
    for seed in range(count):
        guess = sampler.draw(draft[None], [sampler.Row(sampling, noise.side_seed(seed, DRAFT), 0, EMPTY, 0)])
        rows = [sampler.Row(sampling, seed, i, EMPTY, 0) for i in range(2)]
        view = Verified(guess, [-1], law, rows, target, [0, 0], dict(known))
        yield part.accept(view)[0][0]


def output(p: Floats, q: Floats, more: float = 0.0, rest: Floats | None = None) -> dict[int, float]:
    """The law of the first token in closed form.  more: added to the chance of acceptance; rest: what falls is drawn from it."""
    stands = (np.divide(p, q, out=np.ones_like(p), where=q > 0) + more).clip(max=1.0)
    left = (p - q).clip(min=0.0) if rest is None else rest
    found = q * stands + (1.0 - (q * stands).sum()) * left / left.sum()
    return {i: float(x) for i, x in enumerate(found) if x > 0}


@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_the_target_s(name: str) -> None:
    sampling = SamplingSpec(**LAWS[name])
    p, q = law_of(logits(1), sampling), law_of(logits(2), sampling)
    law = {i: float(x) for i, x in enumerate(p) if x > 0}
    assert output(p, q) == pytest.approx(law, abs=1e-7)
    part = Rejection()
    drawn = list(draws(part, sampling, DRAWS))
    assert fit(drawn, law).ok
    assert part.acts["rejected"] > DRAWS // 10
    assert part.acts["accepted"] / DRAWS == pytest.approx(np.minimum(p, q).sum(), abs=0.015)
    assert not fit(list(draws_of(q, DRAWS)), law).ok, "the draft's own law is another"


def draws_of(q: Floats, count: int) -> Iterator[int]:
    rng = np.random.default_rng(0)
    yield from rng.choice(V, count, p=q / q.sum()).tolist()


@pytest.mark.parametrize("name", ["temperature"])
def test_the_test_sees_an_acceptance_that_is_2_percent_off(name: str) -> None:
    """The power by the closed form of the fault, and the fault itself."""
    sampling = SamplingSpec(**LAWS[name])
    p, q = law_of(logits(1), sampling), law_of(logits(2), sampling)
    assert power(output(p, q), output(p, q, more=0.02), DRAWS) > 0.95
    assert not fit(list(draws(Lenient(), sampling, DRAWS)), output(p, q)).ok


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p"])
def test_the_test_sees_a_residual_of_unprocessed_logits(name: str) -> None:
    sampling = SamplingSpec(**LAWS[name])
    raw = law_of(logits(1), SamplingSpec()), law_of(logits(2), SamplingSpec())
    p, q = law_of(logits(1), sampling), law_of(logits(2), sampling)
    wrong = output(p, q, rest=(raw[0] - raw[1]).clip(min=0.0))
    assert set(wrong) > set(output(p, q)) or power(output(p, q), wrong, DRAWS // 3) > 0.999
    assert not fit(list(draws(Unprocessed(raw), sampling, DRAWS // 3)), output(p, q)).ok


# ---------------------------------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(tmp_path_factory.mktemp("near"))


@pytest.fixture(scope="module")
def parts(folder: Path) -> list[str]:
    return [f"draft=speculative_sampling(model={str(folder)!r}, guesses=3)", "accept=rejection"]


@pytest.fixture(scope="module")
def runtime(parts: list[str]) -> Runtime:
    given = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 64, "device": "cpu", "threads": 1}
    return build(prepare(EngineConfig(model=resolve(None), techniques=parts, **given)))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def exact_law(
    model: Any, prompt: Sequence[int], temperature: float, top_k: int, depth: int
) -> dict[tuple[int, ...], float]:
    """The joint law of the first `depth` tokens, by transformers' logits along every text that it can give."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        with torch.no_grad():
            logits_NV = model(torch.tensor([[*prompt, *text] for text in texts])).logits[:, -1]
        best, ids = logits_NV.double().topk(top_k)
        p = torch.softmax(best / temperature, -1)
        texts = {
            (*text, int(i)): before * float(x)
            for (text, before), mine, chances in zip(texts.items(), ids, p, strict=True)
            for i, x in zip(mine, chances, strict=True)
        }
    return texts


@pytest.mark.parametrize("own", [None, "draft=ngram(shortest=1)"], ids=["model", "ngram"])
def test_live_the_joint_law_of_three_tokens(tmp_path: Path, own: str | None) -> None:
    """The first token has no guess; the two after it are guessed, weighed and drawn anew."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    model = pair(target, draft)
    techniques = [own or f"draft=speculative_sampling(model={str(draft)!r}, guesses=2)", "accept=rejection"]
    given = {"dtype": "float32", "max_num_seqs": 64, "device": "cpu", "threads": 1}
    runtime = build(prepare(EngineConfig(model=target, techniques=techniques, **given)))
    prompt, law, count = [3, 7, 11, 7, 3, 9, 7], {"temperature": 0.9, "top_k": 5}, 2500
    bench = Bench(runtime, techniques=techniques)
    found = bench.run([spec(i, prompt, seed=i, max_tokens=4, **law) for i in range(count)])
    acts = bench.engine.stack["accept"].acts
    assert acts["accepted"] > 200
    assert acts["rejected"] > 200
    wanted = exact_law(model, prompt, 0.9, 5, 3)
    assert len(wanted) == 125
    assert fit([tuple(found[i, 0][:3]) for i in range(count)], wanted).ok


def requests(ids: Sequence[int]) -> list[RequestSpec]:
    laws: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "logprobs": 1}, {"temperature": 0.7, "repetition_penalty": 1.2},
        {"temperature": 1.0, "stop_ids": (4, 13, 15), "min_tokens": 5}, {"temperature": 0.0, "presence_penalty": 0.7},
    ]  # fmt: skip
    return [spec(i, ids[i : i + 20], seed=i, n=1 + i % 2, max_tokens=16, **laws[i % 5]) for i in range(20)]


def test_live_a_run_repeats_and_greedy_is_exact(runtime: Runtime, parts: list[str], ids: list[int]) -> None:
    specs = requests(ids)
    runs = [Bench(runtime, techniques=parts).run(specs) for _ in range(2)]
    assert runs[0] == runs[1]
    exact = Bench(runtime).run(specs)
    assert runs[0] != exact, "noise of the guesses' own"
    greedy = {s.id for s in specs if s.sampling.temperature == 0.0}
    assert {k: t for k, t in runs[0].items() if k[0] in greedy} == {k: t for k, t in exact.items() if k[0] in greedy}


def test_live_what_is_set_beforehand_stands(runtime: Runtime, parts: list[str], ids: list[int]) -> None:
    forced = tuple(ids[100:112])
    specs = [
        RequestSpec(**{f: getattr(s, f) for f in s.__struct_fields__} | {"forced": forced, "n": 1})
        for s in requests(ids)
    ]
    found = Bench(runtime, techniques=parts).run(specs)
    assert all(tokens[:12] == list(forced)[: len(tokens)] for tokens in found.values())


def test_live_a_request_may_have_it_alone(runtime: Runtime, parts: list[str], ids: list[int]) -> None:
    """Over a server that races, one request's guesses are drawn apart and weighed; its neighbours keep their tokens."""
    specs = requests(ids)
    mixed = [
        RequestSpec(
            **{f: getattr(s, f) for f in s.__struct_fields__} | {"techniques": ("accept=rejection",) * (s.id % 2)}
        )
        for s in specs
    ]
    bench = Bench(runtime, techniques=parts[:1])
    found, exact = bench.run(mixed), Bench(runtime).run(specs)
    assert {k: t for k, t in found.items() if k[0] % 2 == 0} == {k: t for k, t in exact.items() if k[0] % 2 == 0}
    assert bench.engine.stacks.acts()["accept=rejection.accepted"] > 0
