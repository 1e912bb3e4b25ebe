"""What drafts read of the target, and by which history they draw: against transformers and formulas, however steps are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.exec.conftest import STORY, Bench, spec
from weft.core import noise
from weft.exec.ahead import DRAFT, Draws
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.slots import Ask, Guesses
from weft.types import SamplingSpec

PENALTY = 30.0


@dataclass
class Reader:
    """A draft that notes what it is told, and guesses what the sequence will say: the first `right` of three guesses."""

    truth: dict[int, list[int]]
    states: int
    right: int = 2
    told: list[Ask] = field(default_factory=list)
    model: str | None = None
    guesses: int = 3
    logits: bool = True
    acts: dict[str, int] = field(default_factory=dict)

    def propose(self, asks: Sequence[Ask], run: Any) -> list[Guesses]:
        found = []
        for n, ask in enumerate(asks):
            self.told.append(ask)
            coming = self.truth[ask.seed][ask.output :][: min(3, ask.most)]
            right = (self.right + n) % 4
            found.append(Guesses([t if j < right else (t + 1) % 4096 for j, t in enumerate(coming)]))
        return found

    def observe(self, proposed: int, accepted: int) -> None:
        pass


@pytest.fixture(scope="module")
def small() -> Runtime:
    """Steps of few rows, so that prompts come in pieces beside decodes and their guesses."""
    given = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "max_rows": 48, "device": "cpu", "threads": 2}
    return build(prepare(EngineConfig(model=resolve(None), **given)))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve(None), dtype=torch.float32).eval()


@pytest.mark.parametrize("states", [1, 2])
@torch.no_grad()
def test_states_and_logits_are_those_of_the_rows_that_stand(small: Runtime, theirs: Any, states: int) -> None:
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    specs = [
        spec(
            i,
            ids[7 * i : 7 * i + 12 + 9 * i],
            seed=i,
            max_tokens=14,
            temperature=0.7,
            prompt_logprobs=1 if i % 2 else -1,
        )
        for i in range(6)
    ]
    plain = Bench(small).run(specs)
    reader = Reader({s.seed: plain[s.id, 0] for s in specs}, states)
    assert Bench(small, draft=reader).run(specs) == plain
    rows, several = 0, 0
    for ask in reader.told:
        if ask.context is None:
            continue
        text = torch.from_numpy(np.array(ask.context))[None, :-1]
        model = theirs.model(text).last_hidden_state[0]
        assert torch.allclose(ask.hidden, model[-len(ask.hidden) :], atol=2e-3, rtol=2e-3)
        assert torch.allclose(ask.logits, theirs.lm_head(model[-len(ask.logits) :]), atol=2e-3, rtol=2e-3)
        rows, several = rows + len(ask.hidden), several + (len(ask.logits) > 2)
    assert several >= 5, "steps in which several guesses stood"
    assert rows > 40


@torch.no_grad()
def test_the_head_of_any_states(small: Runtime) -> None:
    """RMS norm and the embeddings, by hand; more states than a pass may sample are predicted in parts, and all are right."""
    decoder = small.decoders["target"]
    count = 2 * decoder.max_samples + 3
    states = torch.randn(count, decoder.spec.width, generator=torch.Generator().manual_seed(4))
    weights = load_file(resolve(None) / "model.safetensors")
    scale = states * (states.square().mean(-1, keepdim=True) + decoder.spec.norm_eps).rsqrt()
    head = weights["model.embed_tokens.weight"] if decoder.spec.tied else weights["lm_head.weight"]
    wanted = (scale * weights["model.norm.weight"].float()) @ head.float().T
    for n in (1, decoder.max_samples, count):
        assert torch.allclose(decoder.predict(states[:n]), wanted[:n], atol=2e-3, rtol=2e-3), n


# ---------------------------------------------------------------------------------------------- the history of a guess


def race(logits: np.ndarray[Any, Any], seed: int, output: int) -> int:
    """The winner at temperature 1, token by token."""
    return int(np.argmax([x + noise.gumbel(seed, output, i) for i, x in enumerate(logits.tolist())]))


@pytest.mark.parametrize("independent", [False, True])
def test_a_guess_is_drawn_behind_the_guesses_before_it(independent: bool) -> None:
    """A penalty that forbids what was said forbids what was guessed before, in the prompt's turn and in the output's."""
    logits = np.zeros(6, np.float32)
    seed = noise.side_seed(77, DRAFT) if independent else 77
    for law, before in (
        (SamplingSpec(presence_penalty=PENALTY), {4}), (SamplingSpec(frequency_penalty=PENALTY), {4}), (SamplingSpec(), set()),
    ):  # fmt: skip
        ask = Ask(np.array([1, 2, 4]), 2, 1, 5, law, 77, independent)
        guesses: list[int] = []
        for n in range(3):
            gone = before | set(guesses) if before else set()
            said = np.where(np.isin(np.arange(6), list(gone)), -PENALTY, logits)
            ((token, dense),) = Draws(None, [(0, ask)]).draw([(0, guesses)], torch.from_numpy(logits)[None])
            assert token == race(said, seed, 1 + n), (law, n)
            assert (dense is not None) is independent
            if dense is not None:
                wanted = np.exp(said) / np.exp(said).sum()
                assert dense.numpy() == pytest.approx(wanted, abs=1e-6)
            guesses.append(token)


def test_a_repetition_penalty_counts_the_prompt_and_the_guesses() -> None:
    """Keskar et al.: logits above 0 are divided, others multiplied."""
    logits = np.array([2.0, 2.0, -1.0, 1.0], np.float32)
    ask = Ask(np.array([0, 3]), 2, 0, 5, SamplingSpec(repetition_penalty=2.0), 5, True)
    ((_, dense),) = Draws(None, [(0, ask)]).draw([(0, [2])], torch.from_numpy(logits)[None])
    weights = np.exp([1.0, 2.0, -2.0, 0.5])
    assert dense.numpy() == pytest.approx(weights / weights.sum(), abs=1e-6)  # type: ignore[union-attr]
