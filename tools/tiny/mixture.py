"""What the bundled model sees: windows of token ids drawn from a mixture of prose, chat and a made-up recall task.

    0.52 novels    0.05 encyclopedia    0.07 stories    0.08 stories in the chat format
    0.08 maths in the chat format       0.11 recall, dense          0.09 recall among prose

The recall task hides facts ("The number of Emma's lamp is 4031.") in a novel and asks for some of them in the chat format.
Dense windows hold little prose and many questions, and are what teaches it; the others teach it over distance.

Legend.  N: tokens of a window.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tools.tiny.corpus import END_OF_TEXT, Corpus
from weft.fidelity.recall import OWNERS, THINGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int32]

ANSWER_TOKENS = 16
"""Room that one question with its answer is taken to need."""


class Mixture:
    """Draws windows; two mixtures with equal seeds draw equal windows."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.end_of_text = int(tokenizer.convert_tokens_to_ids(END_OF_TEXT))
        self.novels = [self.encode(text) for text in corpus.novels()]
        self.encyclopedia = [self.encode(corpus.encyclopedia())]
        self.stories = [self.encode(text) for text in corpus.stories()]
        self.maths = [self.encode(f"<|user|>{q}<|end|><|assistant|>{a}<|end|>") for q, a in corpus.maths()]
        lengths = np.array([len(novel) for novel in self.novels], dtype=float)
        self.novel_weights = lengths / lengths.sum()
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        self.choice = random.Random(seed)
        self.place = np.random.default_rng(seed)

    def encode(self, text: str) -> Ids:
        return np.array(self.tokenizer(text)["input_ids"], dtype=np.int32)

    def sizes(self) -> dict[str, int]:
        """Tokens of each source."""
        sources = {
            "novels": self.novels,
            "encyclopedia": self.encyclopedia,
            "stories": self.stories,
            "maths": self.maths,
        }
        return {name: sum(map(len, documents)) for name, documents in sources.items()}

    def draw(self, n: int) -> Ids:
        """A window of n tokens, [N]."""
        u = self.place.random()
        if u < 0.52:
            window = self.window(self.novels, n, self.novel_weights)
        elif u < 0.57:
            window = self.window(self.encyclopedia, n)
        elif u < 0.64:
            window = self.pack(self.stories, n)
        elif u < 0.72:
            window = self.pack(self.stories, n, self.as_chat)
        elif u < 0.80:
            window = self.pack(self.maths, n)
        else:
            window = self.recall(n, dense=u < 0.91)
        return self.fill(window, n)

    def window(self, documents: Sequence[Ids], n: int, weights: NDArray[np.float64] | None = None) -> Ids:
        """A run of at most n tokens at a random place of a random document."""
        document = documents[int(self.place.choice(len(documents), p=weights))]
        start = int(self.place.integers(0, max(1, len(document) - n)))
        return document[start : start + n]

    def pack(self, documents: Sequence[Ids], n: int, wrap: Callable[[Ids], Ids] | None = None) -> Ids:
        """Whole documents after one another, an end of text after each, cut at n."""
        parts: list[Ids] = []
        while sum(map(len, parts)) < n:
            document = documents[self.choice.randrange(len(documents))]
            parts.append(np.append(wrap(document) if wrap else document, self.end_of_text).astype(np.int32))
        return np.concatenate(parts)[:n]

    def as_chat(self, story: Ids) -> Ids:
        head = self.tokenizer.decode(story[:12])
        ask = self.encode(f"<|user|>Write a story that begins: {head}<|end|><|assistant|>")
        return np.concatenate([ask, story, self.encode("<|end|>")])

    def recall(self, n: int, *, dense: bool = False) -> Ids:
        """Facts scattered in prose, then questions about some of them, [N]."""
        count = self.choice.choice((2, 3, 4, 6) if dense else (1, 2, 4, 8))
        numbers: dict[tuple[str, str], str] = {}
        while len(numbers) < count:
            key = (self.choice.choice(OWNERS), self.choice.choice(THINGS))
            numbers[key] = "".join(self.choice.choice("0123456789") for _ in range(4))
        facts = [self.encode(f"\n\nThe number of {a}'s {b} is {number}.\n\n") for (a, b), number in numbers.items()]
        used = sum(map(len, facts)) + 1
        asked = min(count, 4)
        prose = self.choice.randrange(64) if dense else n - used - 20 * asked
        questions: list[int] = []
        while used + prose + len(questions) < n - ANSWER_TOKENS and (dense or len(questions) < ANSWER_TOKENS * asked):
            questions += self.question(numbers)
        filler = self.window(self.novels, max(prose, 1), self.novel_weights)
        cuts = sorted(self.choice.choices(range(len(filler) + 1), k=count))
        parts: list[Ids] = []
        done = 0
        for cut, fact in zip(cuts, facts, strict=True):
            parts += [filler[done:cut], fact]
            done = cut
        parts += [filler[done:], np.array(questions, dtype=np.int32), np.array([self.end_of_text], dtype=np.int32)]
        return self.fill(np.concatenate(parts).astype(np.int32), n)

    def question(self, numbers: dict[tuple[str, str], str]) -> list[int]:
        (owner, thing), number = self.choice.choice(list(numbers.items()))
        text = f"<|user|>What is the number of {owner}'s {thing}?<|end|><|assistant|>{number}<|end|>"
        return [int(i) for i in self.encode(text)]

    def fill(self, window: Ids, n: int) -> Ids:
        """Exactly n tokens: cut, or filled up with ends of text."""
        missing = max(0, n - len(window))
        return np.concatenate([window, np.full(missing, self.end_of_text, dtype=np.int32)])[:n]
