"""A draft that goes on learning, on its teacher's own answers to requests, by the teacher's whole law.

    python -m tools.grow weft/bundled/draft START --layers 3 --dtype float32
    python -m tools.train_tiny asked DATA OUT --teacher MODEL --init START --minutes 20

A draft that was taught on windows of novels has never seen what its teacher says where a question, a summary or a translation
is asked for, and a third of its guesses stand there.  So the teacher is asked (`requests.py`: texts with free licences, none of
Spec-Bench's, no held-out novel), answers at several temperatures, and the draft learns the law behind each token of these
answers and nothing else of a row: KL(teacher, draft) and, towards the end, half of it the distance of total variation at the
temperature that answers are sampled with, which is the chance that a guess falls (Zhou et al., "DistillSpec", arXiv:2310.08461).

A third of the requests are openings of novels without a question, so that what the draft knew stays.  The teacher's answers are
written by weft, whose tokens are a function of the seed, and a step's material is one of the seed and the step: a run of so many
steps repeats, one of so many minutes does but for its length.  Answers and states are kept in OUT/asked, for another run.

Legend.  B, N: rows of a step and their tokens.  R: positions learnt in it.  V: vocabulary.  D: the teacher's width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tiny.accept import Prompts, lines, report
from tools.tiny.corpus import Corpus
from tools.tiny.distil import optimizers_of
from tools.tiny.mixture import Mixture
from tools.tiny.requests import LONGEST, Requests
from tools.tiny.teaching import Say, answers, descend, logged, set_rates

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ANSWER = 112
"""Tokens of an answer, at most."""
TEMPERATURES = (0.8, 1.0, 0.8, 0.0)
"""Of the answers, in turn."""
SAMPLED_AT = 0.8
"""Where total variation is taken."""
STEP_TOKENS, STEP_ROWS = 4096, 10
"""Of a step, at most."""
WARM_UP_STEPS, LOG_STEPS = 20, 20
CHECKPOINT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """asked: requests.  high, low: factor on the learning rates at the beginning and at the end.  variation: weight of total
    variation from `variation_from` of the time on.  steps: the most, if not 0."""

    asked: int = 2000
    minutes: float = 20.0
    steps: int = 0
    high: float = 0.5
    low: float = 0.01
    flat: float = 0.3
    variation: float = 0.5
    variation_from: float = 0.5
    seed: int = 0
    threads: int = 1

    def learning(self, done: float, step: int) -> float:
        left = min(1.0, (1 - done) / (1 - self.flat))
        return min(1.0, (step + 1) / WARM_UP_STEPS) * (self.low + (self.high - self.low) * left)


@dataclass(frozen=True, slots=True)
class Answer:
    """A row of a lesson.  start: of its prompt, how many tokens.  hidden: the teacher's final states that the tokens of the
    answer were drawn from, bfloat16 [answer, D]."""

    ids: list[int]
    start: int
    hidden: Tensor


def written(teacher: Path, asks: Sequence[Sequence[int]], course: Course, say: Say) -> list[list[int]]:
    """What the teacher says to each, under a seed of its own."""
    from weft import SamplingParams

    laws = [
        SamplingParams(temperature=TEMPERATURES[i % len(TEMPERATURES)], seed=(course.seed << 32) + i, max_tokens=ANSWER)
        for i in range(len(asks))
    ]
    return answers(teacher, asks, laws, LONGEST + ANSWER, course.threads, say)


@torch.no_grad()
def states(
    teacher: LlamaForCausalLM, asks: Sequence[Sequence[int]], said: Sequence[Sequence[int]], say: Say
) -> list[Tensor]:
    """The teacher's final states that each answer was drawn from."""
    found = []
    for n, (ask, answer) in enumerate(zip(asks, said, strict=True), 1):
        state = teacher.model(torch.tensor([[*ask, *answer[:-1]]]), use_cache=False).last_hidden_state[
            0, len(ask) - 1 :
        ]
        found.append(state.bfloat16())
        if n % 250 == 0:
            say(f"states of {n} answers")
    return found


def material(
    folder: Path, teacher: LlamaForCausalLM, source: Path, requests: Requests, course: Course, say: Say
) -> list[Answer]:
    """The teacher's answers, as they are kept in the folder or as they are made now."""
    path, note = folder / "asked.safetensors", folder / "asked.json"
    settings = {"asked": course.asked, "seed": course.seed, "teacher": str(source)}
    if not note.is_file() or json.loads(note.read_text(encoding="utf8")) != settings:
        asks = requests.draw(course.asked, course.seed)
        said = written(source, asks, course, say)
        hidden = states(teacher, asks, said, say)
        folder.mkdir(parents=True, exist_ok=True)
        flat = [t for ask, answer in zip(asks, said, strict=True) for t in (*ask, *answer)]
        sizes = [[len(ask), len(answer)] for ask, answer in zip(asks, said, strict=True)]
        save_file(
            {"ids": torch.tensor(flat, dtype=torch.int32), "sizes": torch.tensor(sizes), "hidden": torch.cat(hidden)},
            path,
        )
        note.write_text(json.dumps(settings), encoding="utf8")
    kept = load_file(path)
    rows, ids, at, low = list[Answer](), kept["ids"].tolist(), 0, 0
    for start, more in kept["sizes"].tolist():
        rows.append(Answer(ids[at : at + start + more], start, kept["hidden"][low : low + more]))
        at, low = at + start + more, low + more
    return rows


def batches(rows: Sequence[Answer], seed: int) -> Iterator[list[Answer]]:
    """Steps' rows, of about one length each; all rows once, in another order each time."""
    place = np.random.default_rng(seed)
    while True:
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].ids) + place.integers(8))
        packs: list[list[Answer]] = [[]]
        for n in order:
            if packs[-1] and (len(packs[-1]) == STEP_ROWS or (1 + len(packs[-1])) * len(rows[n].ids) > STEP_TOKENS):
                packs.append([])
            packs[-1].append(rows[n])
        for n in place.permutation(len(packs)):
            yield packs[int(n)]


def lesson(pack: Sequence[Answer]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [B, N], which of their positions are learnt [B, N], the teacher's states there [R, D])."""
    n = max(len(row.ids) for row in pack)
    tokens, learnt = torch.zeros(len(pack), n, dtype=torch.int64), torch.zeros(len(pack), n, dtype=torch.bool)
    for i, row in enumerate(pack):  # what fills a row up stands behind all that is learnt
        tokens[i, : len(row.ids)] = torch.tensor(row.ids)
        learnt[i, row.start - 1 : len(row.ids) - 1] = True
    return tokens, learnt, torch.cat([row.hidden for row in pack]).float()


def loss_of(teacher_RV: Tensor, draft_RV: Tensor, weight: float) -> Tensor:
    """Cross-entropy at temperature 1, and total variation at `SAMPLED_AT` with a weight; means over positions."""
    cross = torch.nn.functional.cross_entropy(draft_RV, teacher_RV.softmax(-1))
    if not weight:
        return cross
    p, q = (teacher_RV / SAMPLED_AT).softmax(-1), (draft_RV / SAMPLED_AT).softmax(-1)
    return (1 - weight) * cross + weight * 0.5 * (p - q).abs().sum(-1).mean()


def teach(
    draft: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    rows: Sequence[Answer],
    course: Course,
    say: Say,
    keep: Callable[[], None],
) -> dict[str, Any]:
    """Teach for course.minutes, or course.steps where they are over first; what was done."""
    pairs, source = optimizers_of(draft), batches(rows, course.seed)
    draft.train()
    started, kept, step, positions, held = time.monotonic(), 0.0, 0, 0, list[float]()
    while (elapsed := time.monotonic() - started) < course.minutes * 60 and not 0 < course.steps <= step:
        done = step / course.steps if course.steps else elapsed / (course.minutes * 60)
        set_rates(pairs, course.learning(done, step))
        tokens, learnt, hidden = lesson(next(source))
        with torch.no_grad():
            wanted = teacher.lm_head(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = draft.lm_head(draft.model(tokens, use_cache=False).last_hidden_state[learnt])
        loss = loss_of(wanted, logits.float(), course.variation if done >= course.variation_from else 0.0)
        with torch.no_grad():
            held.append(float((wanted.argmax(-1) == logits.argmax(-1)).float().mean()))
        descend(draft, [optimizer for optimizer, _ in pairs], loss)
        step, positions = step + 1, positions + len(wanted)
        if step % LOG_STEPS == 0:
            mean, speed = sum(held[-LOG_STEPS:]) / LOG_STEPS, positions / (time.monotonic() - started)
            say(
                f"step {step} loss {loss.item():.3f} same likeliest {mean:.3f} positions {positions} a second {speed:.0f} "
                f"minute {elapsed / 60:.1f}"
            )
        if elapsed - kept > CHECKPOINT_S:
            kept = elapsed
            keep()
    draft.eval()
    return {"steps": step, "positions": positions, "seconds": time.monotonic() - started}


def main(argv: Sequence[str]) -> int:
    from transformers import AutoTokenizer, LlamaForCausalLM

    course = Course()
    parser = argparse.ArgumentParser(prog="train_tiny asked", description="Teach a draft on its teacher's answers.")
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("out", type=Path, help="folder of the draft")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the model that the draft will serve")
    parser.add_argument("--init", type=Path, required=True, help="checkpoint of the draft to go on from")
    parser.add_argument("--answers", type=Path, help="folder that keeps the teacher's answers; OUT/asked if not given")
    names = ("asked", "steps", "seed", "threads", "minutes", "high", "variation")
    for name in names:
        parser.add_argument(f"--{name}", type=type(getattr(course, name)), default=getattr(course, name))
    given = vars(parser.parse_args(argv))
    course = Course(**{name: given[name] for name in names})
    out: Path = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(course.threads)
    torch.manual_seed(course.seed)
    teacher = LlamaForCausalLM.from_pretrained(given["teacher"], dtype=torch.float32).eval().requires_grad_(False)
    draft = LlamaForCausalLM.from_pretrained(given["init"], dtype=torch.float32)
    corpus = Corpus(given["data"])
    mixture = Mixture(corpus, AutoTokenizer.from_pretrained(given["teacher"]))
    with logged(out / "train.log") as say:
        requests = Requests(given["data"], mixture)
        rows = material(given["answers"] or out / "asked", teacher, given["teacher"], requests, course, say)
        say(f"{course} parameters {sum(p.numel() for p in draft.parameters())}, {len(rows)} answers")
        done = teach(draft, teacher, rows, course, say, lambda: draft.save_pretrained(out / "checkpoint"))
        draft.to(torch.bfloat16).save_pretrained(out)
        told = {"course": asdict(course), "parameters": sum(p.numel() for p in draft.parameters()), **done}
        (out / "recipe.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf8")
        for line in lines(report(draft.float(), teacher, Prompts(corpus, mixture.tokenizer))):
            say(line)
    return 0
