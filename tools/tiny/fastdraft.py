"""FastDraft's recipe: a draft for a model that has none, in steps, in minutes.

    python -m tools.train_tiny fastdraft DATA OUT --teacher MODEL
    python -m tools.train_tiny fastdraft DATA OUT --teacher MODEL --control     and one without the last step beside it

Paper    Zafrir et al., FastDraft: How to Train Your Draft, arXiv:2411.11055 (002-61)
Rule     a few layers over the model's own vocabulary; then, each with plain cross-entropy,
         1 text      the next token of prose
         2 domain    goes on, on what the draft is wanted for: here the chat format
         3 answers   goes on, on what the model itself answers to requests, at a range of temperatures: sequence-level
                     distillation, in which only the model's own tokens are learnt
Units    text, domain, answers: positions that are read while training
Differs  the embedding begins as the model's own (`distil.build`); the model's requests are made of the texts that it was trained
         on, where FastDraft takes sets of instructions; positions are a millionth of the paper's

The model's answers are written by weft, whose tokens are a function of the seed, and a step's material is one of the seed and of
the step: a run repeats.  Held-out novels are in nothing that is read.  A phase that is done stays in OUT (`1-text`, `2-domain`),
and another run with the same settings goes on behind it, so that a draft and its control share the first two.  `--minutes` bounds
a run: what is not reached by then is left out, and `recipe.json`, which has each phase, says so.

Legend.  B: windows of a step.  N: tokens of one.  V: vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tools.tiny.accept import REQUESTS, Prompts, Spoken, judge, spoken
from tools.tiny.corpus import Corpus
from tools.tiny.distil import Shape, build, optimizers_of
from tools.tiny.mixture import Mixture
from tools.tiny.teaching import Say, answers, descend, logged, set_rates

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TOKENS, WINDOWS = 256, 4
"""N and B."""
STEP = TOKENS * WINDOWS
LONGEST_ASK, LONGEST_ANSWER = 64, 128
TEMPERATURES = (0.0, 0.6, 0.8, 1.0)
"""Of the answers, in turn."""
WARM_UP_STEPS = 20
LOG_STEPS = 25
JUDGED = 16
"""Prompts of each kind that a phase is judged by."""
KINDS = ("novels", "chat")
NOTHING = -100
"""In place of a token that is not to be learnt."""

Window = tuple[Tensor, Tensor]
"""(tokens, the same with `NOTHING` where nothing is learnt), [B, N]."""
Draw = Callable[[Mixture], np.ndarray[Any, Any]]
"""A window of at most N tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """text, domain, answers: positions of each phase.  asked: requests that the model answers.  minutes: the most for all."""

    text: int = 480 * STEP
    domain: int = 160 * STEP
    answers: int = 120 * STEP
    asked: int = 1200
    seed: int = 0
    minutes: float = 30.0
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Phase:
    """high, low: factor on the learning rates at its beginning and its end; it stays high for `flat` of the phase."""

    name: str
    positions: int
    high: float
    low: float
    flat: float = 0.4

    def learning(self, step: int) -> float:
        steps = max(1, self.positions // STEP)
        left = min(1.0, (1 - step / steps) / (1 - self.flat))
        return min(1.0, (step + 1) / WARM_UP_STEPS) * (self.low + (self.high - self.low) * left)


def phases(recipe: Recipe, *, control: bool) -> tuple[Phase, Phase, Phase]:
    last = "control" if control else "answers"
    return (
        Phase("text", recipe.text, 1.0, 0.4),
        Phase("domain", recipe.domain, 0.4, 0.4),
        Phase(last, recipe.answers, 0.4, 0.01, flat=0.0),
    )


# ---------------------------------------------------------------------------------------------- what is read


def prose(mixture: Mixture) -> np.ndarray[Any, Any]:
    u = mixture.place.random()
    if u < 0.84:
        return mixture.window(mixture.novels, TOKENS, mixture.novel_weights)
    return mixture.window(mixture.encyclopedia, TOKENS) if u < 0.9 else mixture.pack(mixture.stories, TOKENS)


def chat(mixture: Mixture) -> np.ndarray[Any, Any]:
    u = mixture.place.random()
    if u < 0.4:
        return mixture.pack(mixture.stories, TOKENS, mixture.as_chat)
    return mixture.pack(mixture.maths, TOKENS) if u < 0.8 else mixture.recall(TOKENS, dense=u < 0.9)


def both(mixture: Mixture, recipe: Recipe) -> np.ndarray[Any, Any]:
    """As the first two phases together."""
    return (prose if mixture.place.random() * (recipe.text + recipe.domain) < recipe.text else chat)(mixture)


def windows(mixture: Mixture, draw: Draw, seed: int) -> Iterator[Window]:
    """All of each is learnt."""
    mixture.reseed(seed)
    while True:
        rows = torch.from_numpy(np.stack([mixture.fill(draw(mixture), TOKENS) for _ in range(WINDOWS)])).long()
        yield rows, rows


def packed(answers: Sequence[dict[str, Any]], seed: int) -> Iterator[Window]:
    """Requests with their answers, one behind the other, each once before any comes again; answers alone are learnt."""
    place, ids, learnt = np.random.default_rng(seed), list[int](), list[int]()
    while True:
        for n in place.permutation(len(answers)):
            ask, answer = answers[int(n)]["ask"], answers[int(n)]["answer"]
            ids += [*ask, *answer]
            learnt += [*[NOTHING] * len(ask), *answer]
            while len(ids) >= STEP:
                yield tuple(torch.tensor(x[:STEP]).view(WINDOWS, TOKENS) for x in (ids, learnt))  # type: ignore[misc]
                ids, learnt = ids[STEP:], learnt[STEP:]


def requests(mixture: Mixture, count: int, seed: int) -> list[list[int]]:
    """What the model is asked: questions, stories to write, words about an excerpt, and prose to go on with, in turn."""
    mixture.reseed(seed)
    found = []
    encode, place = mixture.encode, mixture.place
    tail = encode("<|end|><|assistant|>")
    for i in range(count):
        if i % 4 == 0:
            question = mixture.maths[int(place.integers(len(mixture.maths)))]
            stop = int(np.flatnonzero(question == tail[-1])[0]) + 1
            ids = question[:stop] if stop <= LONGEST_ASK else np.append(question[: LONGEST_ASK - 2], tail)
        elif i % 4 == 1:
            story = mixture.stories[int(place.integers(len(mixture.stories)))]
            ids = mixture.as_chat(story[:12])
            ids = ids[: int(np.flatnonzero(ids == tail[-1])[0]) + 1]
        elif i % 4 == 2:
            head = encode(f"<|user|>{REQUESTS[int(place.integers(len(REQUESTS)))]}")
            excerpt = mixture.window(mixture.novels, int(place.integers(12, 40)), mixture.novel_weights)
            ids = np.concatenate([head, excerpt, tail])
        else:
            ids = mixture.window(mixture.novels, int(place.integers(8, LONGEST_ASK)), mixture.novel_weights)
        found.append([int(t) for t in ids])
    return found


def answered(teacher: Path, asks: Sequence[Sequence[int]], recipe: Recipe, say: Say) -> list[dict[str, Any]]:
    """What the model says to each, its end included, under a seed of its own."""
    from weft import SamplingParams

    laws = [
        SamplingParams(
            temperature=TEMPERATURES[i // 4 % len(TEMPERATURES)],
            seed=(recipe.seed << 32) + i,
            max_tokens=LONGEST_ANSWER,
        )
        for i in range(len(asks))
    ]
    said = answers(teacher, asks, laws, LONGEST_ASK + LONGEST_ANSWER, recipe.threads, say)
    return [
        {"ask": list(ask), "temperature": law.temperature, "answer": answer}
        for ask, law, answer in zip(asks, laws, said, strict=True)
    ]


# ---------------------------------------------------------------------------------------------- teaching


def learn(draft: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], window: Window) -> float:
    """One step; the loss before it, in nats per token that is learnt."""
    tokens, wanted = window
    logits = draft(tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=NOTHING)
    descend(draft, optimizers, loss)
    return loss.item()


def teach(draft: LlamaForCausalLM, phase: Phase, material: Iterator[Window], until: float, say: Say) -> dict[str, Any]:
    """A phase, or what of it fits before `until` on the clock; its record."""
    pairs, losses = optimizers_of(draft), list[float]()
    steps, learnt, started = phase.positions // STEP, 0, time.monotonic()
    draft.train()
    for step in range(steps):
        if time.monotonic() > until:
            break
        set_rates(pairs, phase.learning(step))
        window = next(material)
        learnt += int((window[1][:, 1:] != NOTHING).sum())
        losses.append(learn(draft, [optimizer for optimizer, _ in pairs], window))
        if len(losses) % LOG_STEPS == 0 or len(losses) == steps:
            spent = time.monotonic() - started
            mean = sum(losses[-LOG_STEPS:]) / len(losses[-LOG_STEPS:])
            speed = len(losses) * STEP / spent
            say(f"{phase.name} {len(losses)} of {steps} steps, loss {mean:.3f}, {speed:.0f} positions a second")
    draft.eval()
    ends = [sum(x) / len(x) if x else None for x in (losses[:LOG_STEPS], losses[-LOG_STEPS:])]
    return {
        "phase": phase.name, "positions": len(losses) * STEP, "learnt": learnt, "whole": len(losses) == steps,
        "loss": ends, "seconds": time.monotonic() - started,
    }  # fmt: skip


def figures(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, known: dict[str, Spoken]) -> dict[str, Any]:
    """Of what the model says to held-out prompts, how much the draft would guess: greedily, and at temperature 1."""
    found = {kind: judge(draft, teacher, texts) for kind, texts in known.items()}
    return {kind: {"greedy": f["greedy"]["accepted"], "sampled": f["sampled"]["overlap"]} for kind, f in found.items()}


class Run:
    """A folder in which a draft is made.  init: a draft to begin with; the phases before the last are left out then."""

    def __init__(
        self, corpus: Corpus, out: Path, teacher: Path, shape: Shape, recipe: Recipe, say: Say,
        init: Path | None = None,
    ) -> None:  # fmt: skip
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.out, self.folder, self.shape, self.recipe, self.say, self.init = out, teacher, shape, recipe, say, init
        self.read = partial(LlamaForCausalLM.from_pretrained, dtype=torch.float32)
        self.teacher = self.read(teacher).eval().requires_grad_(False)
        self.mixture = Mixture(corpus, AutoTokenizer.from_pretrained(teacher))
        prompts = Prompts(corpus, self.mixture.tokenizer)
        self.known = {kind: spoken(self.teacher, prompts.rows(kind, JUDGED)) for kind in KINDS}
        self.until = time.monotonic() + 60 * recipe.minutes

    def make(self, *, control: bool = False) -> dict[str, Any]:
        """The draft, in OUT (its control in OUT/control), with its record."""
        *before, last = phases(self.recipe, control=control)
        draft, records = self.begin(), list[dict[str, Any]]()
        for number, phase in enumerate(before, 1):
            if self.init is None:
                draft, record = self.kept(draft, number, phase)
                records.append(record)
        records.append(self.teach(draft, 3, last))
        out = self.out / "control" if control else self.out
        draft.to(torch.bfloat16).save_pretrained(out)
        told = {
            "shape": asdict(self.shape), "parameters": sum(p.numel() for p in draft.parameters()), "recipe": asdict(self.recipe),
            "phases": records,
        }  # fmt: skip
        (out / "recipe.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf8")
        return told

    def begin(self) -> LlamaForCausalLM:
        torch.manual_seed(self.recipe.seed)
        return self.read(self.init) if self.init else build(self.teacher, self.shape)

    def kept(self, draft: LlamaForCausalLM, number: int, phase: Phase) -> tuple[LlamaForCausalLM, dict[str, Any]]:
        """A phase as it was done before under the same settings, or as it is done now; one that was cut short is not kept."""
        folder = self.out / f"{number}-{phase.name}"
        settings = [asdict(self.shape), str(self.folder), asdict(replace(self.recipe, answers=0, asked=0, minutes=0))]
        path = folder / "phase.json"
        if path.is_file() and (told := json.loads(path.read_text()))["settings"] == settings:
            self.say(f"{phase.name} is there already")
            return self.read(folder), told["record"]
        record = self.teach(draft, number, phase)
        if record["whole"]:
            draft.save_pretrained(folder)
            path.write_text(json.dumps({"settings": settings, "record": record}), encoding="utf8")
        return draft, record

    def teach(self, draft: LlamaForCausalLM, number: int, phase: Phase) -> dict[str, Any]:
        seed = 10 * self.recipe.seed + number
        record = teach(draft, phase, self.material(phase, seed), self.until, self.say)
        record["accepted"] = figures(draft, self.teacher, self.known)
        self.say(f"{phase.name}: {json.dumps(record['accepted'])}")
        return record

    def material(self, phase: Phase, seed: int) -> Iterator[Window]:
        if phase.name == "answers":
            return packed(self.answers(), seed)
        draws: dict[str, Draw] = {"text": prose, "domain": chat, "control": partial(both, recipe=self.recipe)}
        return windows(self.mixture, draws[phase.name], seed)

    def answers(self) -> list[dict[str, Any]]:
        """Written once, and kept."""
        path = self.out / "answers.jsonl"
        settings = {"teacher": str(self.folder), "asked": self.recipe.asked, "seed": self.recipe.seed}
        if path.is_file():
            first, *lines = path.read_text(encoding="utf8").splitlines()
            if json.loads(first) == settings:
                return [json.loads(line) for line in lines]
        found = answered(
            self.folder, requests(self.mixture, self.recipe.asked, self.recipe.seed), self.recipe, self.say
        )
        path.write_text("\n".join(map(json.dumps, [settings, *found])) + "\n", encoding="utf8")
        return found


def main(argv: Sequence[str]) -> int:
    shape, recipe = Shape(), Recipe()
    parser = argparse.ArgumentParser(
        prog="train_tiny fastdraft", description="Make a draft of a model by FastDraft's recipe."
    )
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("out", type=Path, help="folder of the draft")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the model that the draft will serve")
    parser.add_argument("--control", action="store_true", help="and one, in OUT/control, that ends with text again")
    parser.add_argument("--init", type=Path, help="folder of a draft; the last phase alone is done, on it")
    for name, kind in (("text", "prose"), ("domain", "chat"), ("answers", "the model's answers")):
        parser.add_argument(
            f"--{name}", type=int, default=getattr(recipe, name), help=f"positions of {kind} to train on"
        )
    parser.add_argument("--asked", type=int, default=recipe.asked, help="requests that the model answers")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--minutes", type=float, default=recipe.minutes, help="the most that a run takes")
    parser.add_argument("--threads", type=int, default=recipe.threads)
    for name in Shape.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    given = vars(parser.parse_args(argv))
    out: Path = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{name: given[name] for name in Recipe.__dataclass_fields__})
    torch.set_num_threads(recipe.threads)
    with logged(out / "train.log") as say:
        shape = Shape(**{name: given[name] for name in Shape.__dataclass_fields__})
        run = Run(Corpus(given["data"]), out, given["teacher"], shape, recipe, say, given["init"])
        run.make()
        if given["control"]:
            run.make(control=True)
    return 0
