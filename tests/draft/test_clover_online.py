"""Heads that learn while they serve: the step by hand, what is kept of a verification, tenants; live: more guesses stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.draft.test_clover import WIDTH, Script, config, file, some_weights
from tests.draft.test_speculative_sampling import LAWS, Watching
from tests.exec.conftest import STORY, Bench, spec
from weft.draft import _common as common
from weft.draft._common import KEPT, LESSONS, Lesson, Pupil, pull, slopes
from weft.draft.clover import BUNDLED, KIND, LEARNING, TENANTS, Clover, recited
from weft.exec.build import Runtime, build, prepare
from weft.exec.reading import Read
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.slots import Ask
from weft.types import SamplingSpec

__all__ = ["file"]  # a fixture


class Dense:
    """A target whose head is a matrix behind a norm with a gain, as `weft.slots.Target` says it; embeds t as t's unit vector."""

    def __init__(self, vocab: int = 16, width: int = WIDTH) -> None:
        noise = torch.Generator().manual_seed(4)
        self.width, self.vocab = width, vocab
        self.head, self.gain = torch.randn(vocab, width, generator=noise), torch.rand(width, generator=noise) + 0.5

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.eye(self.vocab, self.width)[list(ids)]

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        return (states / states.square().mean(-1, keepdim=True).sqrt() * self.gain) @ self.head.T

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        return self.head[list(ids)] * self.gain


# ---------------------------------------------------------------------------------------------- by hand


def test_the_slope_by_hand() -> None:
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/2, 1/4): signs (1, -1, 0), their mean under q 1/4; so 1/2 q (sign - 1/4)."""
    q, p = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert slopes(q, p)[0].tolist() == pytest.approx([0.5 * 0.5 * 0.75, 0.5 * 0.25 * -1.25, 0.5 * 0.25 * -0.25])


def test_what_is_pulled_is_the_gradient_of_the_distance() -> None:
    """Beside autograd through softmax and head; a vocabulary of 16."""
    target, noise = Dense(), torch.Generator().manual_seed(5)
    out = torch.randn(7, WIDTH, generator=noise, requires_grad=True)
    p = torch.randn(7, 16, generator=noise).softmax(-1)
    law = ((out * target.gain) @ target.head.T).softmax(-1)
    wanted = torch.autograd.grad(0.5 * (law - p).abs().sum(), out)[0]
    assert torch.allclose(pull(law.detach(), p, target), wanted, atol=1e-5)


def test_lessons_of_a_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest two, and two spread over the rest: of 6 older ones the second and the fifth."""
    monkeypatch.setattr(common, "LESSONS", 4)
    pupil = Pupil({}, {})
    chosen = []
    for n in range(8):
        pupil.add(Lesson(torch.zeros(1), (n,), torch.zeros(1, 1), torch.zeros(1, 1)))
        chosen.append([one.tokens[0] for one in pupil.chosen()])
    assert chosen[0] == [0]
    assert chosen[2] == [0, 1, 2]
    assert chosen[3] == [0, 1, 2, 3]
    assert chosen[7] == [1, 4, 6, 7]


def test_steps_are_adam_s() -> None:
    """Beside torch's, on the gradient of the distance; the weights that were given stay as they were."""
    target, given = Dense(), some_weights()
    before = {name: w.clone() for name, w in given.items()}
    pupil, noise = Pupil.like(given, LEARNING), torch.Generator().manual_seed(6)
    for n in range(3):
        pupil.add(Lesson.of(torch.randn(8, generator=noise), range(1, 2 + n), torch.randn(1 + n, 16, generator=noise)))
    mine = {name: w.clone().requires_grad_() for name, w in given.items()}
    adam = torch.optim.Adam([mine[name] for name in LEARNING], lr=common.RATE, betas=common.DECAYS, eps=common.EPS)
    for _ in range(3):
        with torch.inference_mode():  # as an executor calls it
            pupil.learn(target, recited)
        total = torch.zeros(())
        for one in pupil.kept:
            embedded = target.embed(one.tokens)[None]
            out = recited(mine, one.start[None], embedded)[0]
            law = ((out * target.gain) @ target.head.T).softmax(-1)
            total = total + 0.5 * (law - torch.zeros(len(out), 16).scatter_(1, one.ids, one.p)).abs().sum() / 6
        adam.zero_grad()
        total.backward()
        adam.step()
    for name in given:
        assert torch.equal(given[name], before[name])
        assert torch.allclose(pupil.weights[name], mine[name], atol=1e-5), name
        assert torch.equal(pupil.weights[name], before[name]) != (name in LEARNING)


def test_what_is_learnt_serves_while_it_is_better() -> None:
    """One lesson again and again: the distance to it falls, and what fell is the gain.  Then the given weights are the best there
    are: of a law that is theirs every step leads away, and after a while they serve again."""
    target, given, noise = Dense(), some_weights(), torch.Generator().manual_seed(7)
    pupil, start = Pupil.like(given, LEARNING), torch.randn(8, generator=noise)
    assert pupil.serving is given
    far = Lesson.of(start, (1,), torch.randn(1, 16, generator=noise) * 3)
    law = torch.zeros(1, 16).scatter_(1, far.ids, far.p)

    def distance(weights: Any) -> float:
        with torch.no_grad():
            out = recited(weights, start[None], target.embed([1])[None])[0]
        return float(0.5 * (((out * target.gain) @ target.head.T).softmax(-1) - law).abs().sum())

    wanted = 0.0
    for _ in range(5):
        pupil.add(far)
        wanted = 0.9 * wanted + 0.1 * (distance(given) - distance(pupil.weights))
        pupil.learn(target, recited)
    assert pupil.gain == pytest.approx(wanted, abs=1e-5)
    assert pupil.gain > 0
    assert pupil.serving is pupil.weights
    own = (recited(given, start[None], target.embed([1])[None])[0] * target.gain) @ target.head.T
    for _ in range(30):
        pupil.kept.clear()
        pupil.add(Lesson.of(start, (1,), own))
        pupil.learn(target, recited)
    assert pupil.gain < 0
    assert pupil.serving is given


# ---------------------------------------------------------------------------------------------- what is kept


def told(state: dict[str, Any], context: Sequence[int], rows: int, salt: bytes = b"", most: int = 3) -> Ask:
    hidden = torch.arange(float(rows * WIDTH)).view(rows, WIDTH) + 1
    logits = torch.arange(16.0).roll(len(context)).expand(rows, 16) if rows else None
    return Ask(
        np.array(context), 2, 1, most, SamplingSpec(), 5, salt=salt, state=state, hidden=hidden, logits=logits
    )  # fmt: skip


class Saying(Script, Dense):  # type: ignore[misc]
    """Draws from a script, and has a head."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        Dense.__init__(self)
        Script.__init__(self, words)
        self.vocab = 16

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """So flat that no token has all of a law: slopes of such are no numbers to learn from."""
        return Script.predict(self, states) / 64


def test_a_verified_proposal_is_a_lesson(file: str) -> None:
    """Of three guesses one stood: the newest token and that guess, with the two laws behind them."""
    part, run, state = Clover(guesses=3, weights=file, online=99), Saying([[1, 2, 3]]), dict[str, Any]()
    part.propose([told(state, [7, 8, 9], 1)], run)
    start = state["clover start"][1].clone()
    part.propose([told(state, [7, 8, 9, 1, 5], 2)], run)
    (lesson,) = part._pupils[b""].kept
    assert lesson.tokens == (9, 1)
    assert torch.equal(lesson.start, start)
    assert torch.allclose(lesson.p.sum(-1), torch.ones(2))
    assert lesson.ids[:, 0].tolist() == [int(torch.arange(16.0).roll(5).argmax())] * 2
    part.propose([told(state, [7, 8, 9, 1, 5, 1, 2, 3, 4], 4)], run)
    assert part._pupils[b""].kept[1].tokens == (5, 1, 2), "the law behind the last guess is nobody's lesson"
    part.propose([told(state, [7, 8, 9, 1, 5, 1, 2, 3, 4, 6, 6], 1)], run)
    assert len(part._pupils[b""].kept) == 2, "a step was missed"


def test_a_step_is_due_after_so_many_and_memory_is_bounded(file: str) -> None:
    part, run = Clover(guesses=3, weights=file, online=4), Saying([[1, 2, 3]])
    state: dict[str, Any] = {}
    context = [7, 8, 9]
    for _ in range(KEPT + 30):
        part.propose([told(state, context, 1)], run)
        context = [*context[-3:], 1]
        state["clover start"] = 3, state["clover start"][1]
    assert part.acts["lessons"] == (KEPT + 29) // 4
    assert len(part._pupils[b""].kept) == KEPT
    assert len(part._pupils[b""].chosen()) == LESSONS
    for n in range(TENANTS + 3):
        own: dict[str, Any] = {}
        part.propose([told(own, [7, 8, 9], 1, salt=bytes([n]))], run)
        part.propose([told(own, [7, 8, 9, 1], 1, salt=bytes([n]))], run)
    assert list(part._pupils) == [bytes([n]) for n in range(3, TENANTS + 3)], "who was served longest ago is forgotten"


def test_tenants_learn_apart(file: str) -> None:
    """What one said changes nothing of what another's heads give."""
    part, run = Clover(guesses=3, weights=file, online=1), Saying([[1, 2, 3], [1, 2, 3]])

    def outputs(salt: bytes) -> list[torch.Tensor]:
        run.states.clear()
        part.propose([told({}, [7, 8, 9], 1, salt=salt)], run)
        return [states.clone() for states in run.states]

    before = outputs(b"b")
    state: dict[str, Any] = {}
    for n in range(20):
        part.propose([told(state, [7, 8, 9, *[1] * n], 1, salt=b"a")], run)
    assert part.acts["lessons"] == 19
    part._pupils[b"a"].gain = 1.0
    assert all(torch.equal(x, y) for x, y in zip(outputs(b"b"), before, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(outputs(b"a"), before, strict=True))
    both = [told({}, [7, 8, 9], 1, salt=b"a"), told({}, [7, 8, 9], 1, salt=b"b")]
    assert [list(g.tokens) for g in part.propose(both, run)] == [[1, 2, 3]] * 2


# ---------------------------------------------------------------------------------------------- live


@pytest.fixture(scope="module", params=["ref", "cpu"])
def machine(request: pytest.FixtureRequest) -> Runtime:
    return build(prepare(config(ops=request.param)))


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled heads with noise in what they give."""
    tensors = load_file(BUNDLED)
    noise = torch.randn(tensors["out"].shape, generator=torch.Generator().manual_seed(1))
    tensors["out"] = tensors["out"] + (noise * tensors["out"].float().std() * 0.6).bfloat16()
    path = tmp_path_factory.mktemp("worse") / "heads.safetensors"
    save_file(tensors, path, {"kind": KIND.name, "vocab": "4096"})
    return path


@pytest.mark.parametrize("machine", [pytest.param("ref", marks=pytest.mark.long), "cpu"], indirect=True)
def test_more_guesses_stand_and_tokens_stay(machine: Runtime, worse: Path) -> None:
    """The same requests again, with heads that were spoilt: a fifth more guesses stand in the end; a second run is the same."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    specs = [spec(i, ids[3 * i : 3 * i + 24], seed=i, salt=b"ab"[i % 2 :][:1], max_tokens=60) for i in range(16)]
    wanted = Bench(machine).run(specs)
    found = []
    for online in (0, 2, 2):
        bench = Bench(machine, techniques=[f"draft=clover(weights={str(worse)!r}, online={online})"])
        seen, acts, rates = Watching(bench), bench.engine.stack["draft"].acts, []
        for _ in range(3):
            before = dict(acts)
            assert bench.run(specs) == wanted
            bench.events.clear()
            rates.append((acts["accepted"] - before["accepted"]) / (acts["proposed"] - before["proposed"]))
        found.append((rates, seen.guessed))
    assert found[0][0][2] == pytest.approx(found[0][0][0], rel=0.1)
    assert found[1][0][2] > 1.2 * found[0][0][2]
    assert found[1] == found[2]


def test_the_law_is_kept_where_laws_are_weighed(machine: Runtime) -> None:
    """Every law, preemption too: under rejection sampling with heads that change meanwhile nothing ends in an error."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    specs = [spec(i, ids[i : i + 30], seed=i, n=1 + i % 2, max_tokens=20, **LAWS[i % 8]) for i in range(16)]
    bench = Bench(machine, techniques=["draft=clover(online=2)", "accept=rejection"], max_num_seqs=7)
    assert len(bench.run(specs)) == 24
    assert bench.engine.stack["draft"].acts["lessons"] > 10


def test_what_is_read_of_the_target_fits_together(machine: Runtime) -> None:
    """rows and predict are one head: the logits of normed states, multiplied out; embeddings are the checkpoint's."""
    target, states = Read(machine.decoder), torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    length = states.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(target.predict(states) * length, states @ target.rows(range(4096)).T, atol=2e-3)
    table = load_file(resolve(None) / "model.safetensors")["model.embed_tokens.weight"].float()
    assert torch.equal(target.embed(range(100)), table[:100])


def test_the_memory_plan_has_what_is_learnt() -> None:
    plain, online = (prepare(config(f"draft=clover(guesses=3, online={n})")).plan.draft_bytes for n in (0, 5))
    weights, inner = 131_168, 64
    lessons = KEPT * (inner + 3 * 3 * 64)
    assert online - plain == 4 * (TENANTS * (3 * weights + lessons) + 64 * 3 * 4096 + 6 * LESSONS * 3 * 4096)


def test_states_and_logits_are_of_the_rows_that_stand(machine: Runtime) -> None:
    """Greedy: the likeliest of each row is the token that stands there, and each row's logits are its state times the head."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    table = load_file(resolve(None) / "model.safetensors")["model.embed_tokens.weight"].float()
    seen: list[tuple[int, int]] = []

    class Nosy(Clover):
        def propose(self, asks: Sequence[Ask], run: Any) -> Any:
            for ask in asks:
                rows, length = len(ask.logits), len(ask.context)
                assert length - ask.state.get("length", length - rows) == rows, "one for each token of the step"
                ask.state["length"] = length
                assert ask.logits.argmax(-1).tolist() == ask.context[-rows:].tolist()
                assert torch.allclose(ask.hidden[-rows:] @ table.T, ask.logits, atol=2e-3)
                seen.append((rows, len(ask.hidden)))
            return super().propose(asks, run)

    bench = Bench(machine, draft=Nosy(guesses=4, online=99))
    bench.run([spec(i, ids[i : i + 3 + 9 * i], max_tokens=24, temperature=0.0) for i in range(6)])
    assert {rows for rows, _ in seen} >= {1, 2, 3, 4}
    assert max(states for rows, states in seen if rows == 1) == 16, "of a prompt's rows the last ones"
