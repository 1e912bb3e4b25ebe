"""What a model is asked so that a draft of it can be taught on the answers: requests of the kinds that servers get.

    0.32 openings of novels, without a question                 0.10 maths to work out
    0.14 texts to summarize                                     0.08 sentences to translate
    0.12 questions about a text that stands before them         0.12 questions without one
    0.12 instructions, conversations, programs to go on with

DATA holds, beside what `corpus.py` names,
    eval/xquad/xquad.en.json, xquad.es.json       paragraphs and questions, in English and in Spanish
    eval/mmlu/val/*.csv                           questions with four choices
    eval/vicuna_bench/question.jsonl              instructions
    eval/humaneval/HumanEval.jsonl.gz             heads of functions
    tools/glaive/glaive_toolcall_en_demo.json     conversations
    text/african-storybook-en/*.md                stories

None of them is in Spec-Bench, and none is copied: a draft sees what its teacher answered.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tools.tiny.mixture import Mixture

LONGEST = 768
"""Tokens of a request, at most."""
OPENING = (16, 128)
"""Tokens of a novel's opening: at least, and less than."""
TEXTS = (64, 700)
"""Tokens of a text that is read before a question about it."""
SENTENCE = re.compile(r"(?<=[.!?])\s+")


def paragraphs(path: Path) -> list[tuple[str, list[str]]]:
    """(paragraph, questions about it)."""
    told = json.loads(path.read_text(encoding="utf8"))["data"]
    return [(p["context"], [q["question"] for q in p["qas"]]) for article in told for p in article["paragraphs"]]


class Requests:
    """Draws requests as token ids."""

    def __init__(self, data: Path, mixture: Mixture) -> None:
        self.mixture, self.place = mixture, np.random.default_rng(0)
        self.head, self.tail = (mixture.encode(text) for text in ("<|user|>", "<|end|><|assistant|>"))
        self.read = paragraphs(data / "eval" / "xquad" / "xquad.en.json")
        spanish = paragraphs(data / "eval" / "xquad" / "xquad.es.json")
        self.sentences = [s for text, _ in spanish for s in SENTENCE.split(text) if 30 < len(s) < 300]
        self.questions = [question for _, several in self.read for question in several]
        for path in sorted((data / "eval" / "mmlu" / "val").glob("*.csv")):
            with path.open(encoding="utf8", newline="") as file:
                self.questions += [row[0] for row in csv.reader(file)]
        self.instructions = [
            json.loads(line)["turns"][0]
            for line in (data / "eval" / "vicuna_bench" / "question.jsonl").read_text(encoding="utf8").splitlines()
        ]
        with gzip.open(data / "eval" / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf8") as lines:
            self.instructions += [json.loads(line)["prompt"] for line in lines]
        talks = json.loads((data / "tools" / "glaive" / "glaive_toolcall_en_demo.json").read_text(encoding="utf8"))
        self.instructions += [m["value"] for talk in talks for m in talk["conversations"] if m["from"] == "human"]
        self.tales = [
            p.read_text(encoding="utf8") for p in sorted((data / "text" / "african-storybook-en").glob("*.md"))
        ]

    def draw(self, count: int, seed: int) -> list[list[int]]:
        """So many requests, the same for a seed."""
        self.place = np.random.default_rng((seed, 17))
        self.mixture.reseed(4000 + seed)
        kinds: list[tuple[float, Callable[[], np.ndarray]]] = [  # type: ignore[type-arg]
            (0.32, self.opening), (0.10, self.maths), (0.14, self.summary), (0.08, self.translation),
            (0.12, self.about), (0.12, lambda: self.asked(self.pick(self.questions))),
            (0.12, lambda: self.asked(self.pick(self.instructions))),
        ]  # fmt: skip
        which = self.place.choice(len(kinds), size=count, p=[share for share, _ in kinds])
        return [[int(t) for t in kinds[int(n)][1]()] for n in which]

    def pick(self, several: Sequence[str]) -> str:
        return several[int(self.place.integers(len(several)))]

    def asked(self, text: str) -> np.ndarray:  # type: ignore[type-arg]
        return self.chat(self.mixture.encode(text))

    def chat(self, ids: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        """A request in the chat format, cut to `LONGEST`."""
        room = LONGEST - len(self.head) - len(self.tail)
        return np.concatenate([self.head, ids[:room], self.tail])

    def opening(self) -> np.ndarray:  # type: ignore[type-arg]
        most = int(self.place.integers(*OPENING))
        return self.mixture.window(self.mixture.novels, most, self.mixture.novel_weights)

    def maths(self) -> np.ndarray:  # type: ignore[type-arg]
        whole = self.mixture.maths[int(self.place.integers(len(self.mixture.maths)))]
        return whole[: int(np.flatnonzero(whole == self.tail[-1])[0]) + 1]

    def text(self) -> np.ndarray:  # type: ignore[type-arg]
        """Something to read: of an encyclopedia, a novel, stories, or paragraphs."""
        most, u = int(self.place.integers(*TEXTS)), self.place.random()
        if u < 0.35:
            return self.mixture.window(self.mixture.encyclopedia, most)
        if u < 0.5:
            return self.mixture.window(self.mixture.novels, most, self.mixture.novel_weights)
        if u < 0.65:
            return self.mixture.encode(self.pick(self.tales))[:most]
        at = int(self.place.integers(len(self.read)))
        return self.mixture.encode("\n\n".join(text for text, _ in self.read[at : at + 4]))[:most]

    def summary(self) -> np.ndarray:  # type: ignore[type-arg]
        ask = self.pick(("Summarize: ", "Summarize this text: ", "Sum up in a few sentences: "))
        return self.chat(np.concatenate([self.mixture.encode(ask), self.text()]))

    def translation(self) -> np.ndarray:  # type: ignore[type-arg]
        return self.asked(f"Translate Spanish to English: {self.pick(self.sentences)}")

    def about(self) -> np.ndarray:  # type: ignore[type-arg]
        """A question behind some paragraphs, of which one holds the answer."""
        at = int(self.place.integers(len(self.read)))
        text = "\n".join(text for text, _ in self.read[at : at + int(self.place.integers(1, 5))])
        room = LONGEST - 64
        ids = self.mixture.encode(text)[:room]
        return self.chat(np.concatenate([ids, self.mixture.encode(f"\n{self.pick(self.read[at][1])}")]))
