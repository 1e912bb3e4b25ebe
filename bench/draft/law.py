"""How often guesses should stand: what the two models' distributions say, at the very positions where guesses were verified.

    p the target's law after the text before a guess, q the draft's

    race, guess drawn by the noise of the token itself    1 / p and q share their Gumbel noise, and agree on x with probability
                                                          1 / sum over y of max(p(y) / p(x), q(y) / q(x)); summed over x
    race, guess that no law was drawn from                p(guess)
    an accept that weighs laws                            sum over y of min(p(y), q(y)); for a guess without a law p(guess)
    greedy                                                1 where both like the same token best, else 0

The first: of independent exponential clocks with rates p and q over the same noise, x is the first to ring in both (Maddison et
al., A* Sampling, arXiv:1411.0030, on Gumbel noise; Daliri et al., Coupling without Communication, arXiv:2408.07978, its law).

The texts are read by `transformers`, not by weft.  Legend.  N: positions.  V: vocabulary.  A trial is a guess all before which
stood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tools.tiny import prompts
from tools.tiny.heads import lesson, outputs
from weft.accept.rejection import STANDS
from weft.core import noise
from weft.exec.ahead import DRAFT
from weft.exec.sampler import gumbel
from weft.slots import Translation
from weft.types import Plan, StepResult

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROWS = 64
"""Positions whose pairs of laws are in memory at once."""
TIE = 1e-3
"""Scores that differ by less may come out either way: two programs add in different orders."""


@dataclass(slots=True)
class Trials:
    """Verified guesses, by sequence of the executor: (index in the output, the guess, whether it stood).  steps, tokens: works
    that verified some, and what they brought."""

    by_sequence: dict[int, list[tuple[int, int, bool]]] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    draft_s: float = 0.0
    step_s: float = 0.0

    def take(self, plan: Plan, result: StepResult) -> None:
        """Note what a step verified; of chains only."""
        self.draft_s += result.draft_s
        self.step_s += result.forward_s + result.sample_s
        for work, fact in zip(plan.works, result.works, strict=True):
            if not work.guesses or work.parents or not fact.tokens:
                continue
            guesses, stood = work.tokens[-work.guesses :], len(fact.tokens) - 1
            self.steps, self.tokens = self.steps + 1, self.tokens + len(fact.tokens)
            mine = self.by_sequence.setdefault(work.request, [])
            for i, guess in enumerate(guesses[: stood + 1]):
                mine.append((work.output + i, guess, i < stood))

    @property
    def tried(self) -> int:
        return sum(len(x) for x in self.by_sequence.values())

    @property
    def stood(self) -> int:
        return sum(ok for x in self.by_sequence.values() for _, _, ok in x)


def race(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """The chance that two draws that share their Gumbel noise are equal, float64 [N].

    For each x the sum over y is taken in the order of p(y) / q(y): up to a point q's share is the larger one, behind it p's.
    """
    out = torch.zeros(len(p_NV), dtype=torch.float64)
    for n, (p, q) in enumerate(zip(p_NV.double(), q_NV.double(), strict=True)):
        both = (p > 0) & (q > 0)
        ratio = torch.where(q > 0, p / q.clamp_min(1e-300), torch.full_like(p, float("inf")))
        order = ratio.argsort()
        p, q, both = p[order], q[order], both[order]
        q_before = q.cumsum(0)
        p_behind = p.sum() - p.cumsum(0)
        # Ties stand on either side alike: there both shares are equal.
        out[n] = (1 / (q_before / q + p_behind / p))[both].sum()
    return out


def overlap(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """sum of min(p, q), float64 [N]."""
    return torch.minimum(p_NV.double(), q_NV.double()).sum(-1)


Text = tuple[Sequence[int], Sequence[int], Sequence[tuple[int, int, bool]]]
"""(prompt, output, trials) of one sequence."""


def predicted(
    target: LlamaForCausalLM,
    draft: Any,
    texts: Sequence[Text],
    temperature: float,
    *,
    weighs: bool,
) -> float:
    """The mean chance of the trials, NaN of none.  weighs: whether the accept weighs laws."""
    found = [c for text in texts for c in chances(target, draft, text, temperature, weighs=weighs)]
    return sum(found) / len(found) if found else float("nan")


def chances(target: LlamaForCausalLM, draft: Any, text: Text, temperature: float, *, weighs: bool) -> list[float]:
    """The chance of each trial of a sequence.  draft: a model as `transformers` reads it, one of the classes below, or None
    where guesses have no law."""
    found: list[float] = []
    trials = text[2]
    for low, p_NV, q_NV in pairs(target, draft, text, temperature):
        if q_NV is None:
            guesses = torch.tensor([guess for _, guess, _ in trials[low : low + len(p_NV)]])
            found += p_NV.gather(1, guesses[:, None])[:, 0].tolist()
        else:
            found += (overlap if weighs or temperature == 0 else race)(p_NV, q_NV).tolist()
    return found


def chance(found: Sequence[float]) -> float:
    """What chance moves the share of trials that stand by (one standard deviation), under the law.

    Each trial stands or falls by noise that no text before it was drawn by, so that what the trials have beyond their chances
    is uncorrelated, though the texts hang on each other.
    """
    return math.sqrt(sum(c * (1 - c) for c in found)) / len(found)


def pairs(
    target: LlamaForCausalLM, draft: Any, text: Text, temperature: float
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(the first trial, the target's laws, the draft's) of at most `ROWS` trials at a time, [N, V]."""
    prompt, output, trials = text
    at = torch.tensor([len(prompt) - 1 + index for index, _, _ in trials])
    p_NV = laws(target, [*prompt, *output], temperature, at)
    if isinstance(draft, Heads | Soft):
        q_NV: Tensor | None = draft.laws(target, prompt, output, trials, temperature)
    else:
        q_NV = None if draft is None else laws(draft, [*prompt, *output], temperature, at)
    for low in range(0, len(at), ROWS):
        here = slice(low, low + ROWS)
        yield low, p_NV[here], None if q_NV is None else q_NV[here]


def slips(target: LlamaForCausalLM, draft: Any, text: Text, seed: int, temperature: float, *, weighs: bool) -> int:
    """Trials that are not what their noise makes of the two laws: another guess than the draft's law draws, or one that stood and
    should have fallen, or fell and should have stood.  Ties within `TIE` count for either.  draft: None where
    guesses have no law.

    Sharper than any count of those that stood: a trial whose guess was computed behind another text shows by itself.
    """
    found = 0
    _, output, trials = text
    for low, p_NV, q_NV in pairs(target, draft, text, temperature):
        for n, (index, guess, stood) in enumerate(trials[low : low + len(p_NV)]):
            p = p_NV[n].double().numpy()
            q = None if q_NV is None else q_NV[n].double().numpy()
            own = noise.side_seed(seed, DRAFT) if weighs else seed
            wrong = q is not None and not _wins(q, own, index, guess)
            if weighs:
                bar = noise.uniform(noise.side_seed(seed, STANDS), index, guess) * (1.0 if q is None else q[guess])
                wrong |= stood != (bar < p[guess]) and abs(bar - p[guess]) > TIE * p[guess]
            else:
                wrong |= stood != (guess == output[index]) or not _wins(p, seed, index, output[index])
            found += int(wrong)
    return found


def _wins(law_V: Any, seed: int, index: int, token: int) -> bool:
    """Whether a token wins the race of a law, to within `TIE`."""
    with np.errstate(divide="ignore"):
        scores = np.log(law_V) + gumbel(seed, index, np.arange(len(law_V)))
    return bool(scores[token] >= scores.max() - TIE)


@torch.no_grad()
def laws(model: Any, ids: Sequence[int], temperature: float, at: Tensor) -> Tensor:
    """The law after each position `at`, float32 [N, V]; certain at temperature 0."""
    hidden = model.model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0, at]
    return _law(model.lm_head(hidden), temperature)


def _law(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.softmax(logits / temperature, -1)


class Heads:
    """Clover's heads in a file, run along a text on the states that `transformers` gives of the target."""

    def __init__(self, file: Path) -> None:
        self.weights = {name: tensor.float() for name, tensor in load_file(file).items()}
        self.window = self.weights["augment.near"].shape[1]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for name, tensor in self.weights.items() if name != "mark")

    @torch.no_grad()
    def laws(
        self,
        target: LlamaForCausalLM,
        prompt: Sequence[int],
        output: Sequence[int],
        trials: Sequence[tuple[int, int, bool]],
        temperature: float,
    ) -> Tensor:
        """The law that each trial's guess was drawn from, float32 [N, V]: it depends on where its step began."""
        at, depths = begins(len(prompt), trials)
        most = int(depths.max()) + 1
        text = torch.tensor([[*prompt, *output, *[0] * most]])
        hidden = target.model(text, use_cache=False).last_hidden_state
        found = []
        for here, deep in zip(at.split(ROWS), depths.split(ROWS), strict=True):
            given = lesson(text, hidden, torch.zeros_like(here), here, self.window, most)
            states = outputs(self.weights, target, given).view(len(here), most, -1)[torch.arange(len(here)), deep]
            found.append(_law(target.lm_head(states), temperature))
        return torch.cat(found)


class Soft:
    """Prompt tokens in a file, put behind the rows of a text that `transformers` reads."""

    def __init__(self, file: Path) -> None:
        self.soft = load_file(file)["soft"].float()

    @property
    def parameters(self) -> int:
        return self.soft.numel()

    @torch.no_grad()
    def laws(
        self,
        target: LlamaForCausalLM,
        prompt: Sequence[int],
        output: Sequence[int],
        trials: Sequence[tuple[int, int, bool]],
        temperature: float,
    ) -> Tensor:
        """The law that each trial's guess was drawn from, float32 [N, V]."""
        at, depths = begins(len(prompt), trials)
        text, found = torch.tensor([[*prompt, *output]]), []
        for here, deep in zip(at.split(ROWS), depths.split(ROWS), strict=True):
            states = prompts.outputs(self.soft, target, text, here[None])[0, torch.arange(len(here)), deep]
            found.append(_law(target.lm_head(states), temperature))
        return torch.cat(found)


def learned(file: Path) -> Heads | Soft:
    """What is in a file of weights that were taught for a model."""
    with safe_open(file, framework="pt") as tensors:
        return Soft(file) if "soft" in tensors.keys() else Heads(file)  # noqa: SIM118 - it is no mapping


def begins(prompt: int, trials: Sequence[tuple[int, int, bool]]) -> tuple[Tensor, Tensor]:
    """Of each trial the position of the row from which its step's newest token was drawn, and how many guesses came before it."""
    depths: list[int] = []
    for n, (index, _, _) in enumerate(trials):
        goes_on = n > 0 and trials[n - 1][2] and trials[n - 1][0] == index - 1
        depths.append(depths[-1] + 1 if goes_on else 0)
    at = [prompt + index - depth - 2 for (index, _, _), depth in zip(trials, depths, strict=True)]
    return torch.tensor(at), torch.tensor(depths)


class Translated:
    """A draft of another vocabulary as `transformers` reads it, in the target's ids: what is not shared has no chance."""

    def __init__(self, draft: Any, translation: Translation, vocab: int) -> None:
        self._draft, self._reads, self._vocab = draft, torch.tensor(translation.reads), vocab
        self._own, self._means = torch.tensor(translation.own), torch.tensor(translation.means)

    def model(self, ids: Tensor, **options: Any) -> Any:
        return self._draft.model(self._reads[ids], **options)

    def lm_head(self, hidden: Tensor) -> Tensor:
        own = self._draft.lm_head(hidden)
        wide = own.new_full((*own.shape[:-1], self._vocab), float("-inf"))
        wide[..., self._means] = own[..., self._own]
        return wide


class Trimmed:
    """A draft whose head has the rows of some tokens only, as `transformers` reads it: all others have no chance."""

    def __init__(self, draft: Any, kept: Sequence[int]) -> None:
        self.model, self._head, self._kept = draft.model, draft.lm_head, torch.tensor(kept)

    def lm_head(self, hidden: Tensor) -> Tensor:
        whole = self._head(hidden)
        few = torch.full_like(whole, float("-inf"))
        few[..., self._kept] = whole[..., self._kept]
        return few


def reader(folder: Path, threads: int = 1) -> Any:
    """A checkpoint as `transformers` reads it."""
    from transformers import LlamaForCausalLM

    torch.set_num_threads(threads)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def repeated(output: Sequence[int], n: int = 8) -> float:
    """The share of the n-grams of a text that stood in it before."""
    grams = [tuple(output[i : i + n]) for i in range(len(output) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def texts_of(
    trials: Any, owners: Mapping[int, int], prompts: Sequence[Sequence[int]], outputs: Mapping[int, Sequence[int]]
) -> list[Any]:
    """For `predicted`, with what is noted of each sequence in `trials.by_sequence`.

    owners: the prompt of each sequence of the executor.
    """
    return [(prompts[owners[rid]], outputs[owners[rid]], mine) for rid, mine in trials.by_sequence.items()]
