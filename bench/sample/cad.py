"""sample=cad beside plain decoding: what the second row of each token costs, and what it does to answers about a text.

python -m bench.sample.cad [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.contender import Contender
from bench.harness import Case, Model, Options, encode, main
from bench.texts import PARAGRAPHS
from weft.fidelity.recall import Question, questions
from weft.front.text import ModelText

BATCH = 8
LENGTH = 512
"""Tokens of the context; its companion is the question alone."""
ASKED = {False: 64, True: 16}
NOTES = (
    "Bound of the cost: twice the rows of a decode step, and the KV of the companion; below that no contrast can go.",
    "Overhead: prose of 512 tokens is continued, eight sequences at once, and the companion is its last sentence. Tokens a "
    "second are of decoding alone.",
    "Faithful answers: four made-up numbers stand in prose, one is asked for, and the companion is the question without the "
    "prose. Right is an answer that says the number, at temperature 1; the cases differ in nothing else. What contrast is for, a "
    "context that contradicts what a model has learned by heart, a model this small does not have: all that it can lose is "
    "attention to what stands far back.",
)
PROSE = {False: (200, 600), True: (200,)}
"""Tokens of a question with its prose; as ASKED by whether the model was grown, whose answers are the same and cost more."""


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        yield options.compare(model, *overhead(model, options.quick), title="overhead")
        for tokens in PROSE[model.grown][: 1 if options.quick else None]:
            yield faithful(options, model, tokens)


def overhead(model: Model, quick: bool) -> tuple[Case, list[Case]]:
    length, new = (64, 6) if quick else (LENGTH, 16)
    ids = [
        tuple(x * 20)[i : i + length]
        for i, x in zip(range(0, 64, 64 // BATCH), encode(model, PARAGRAPHS) * 2, strict=True)
    ]
    null = Case(name="plain", prompts=ids, max_new=new, batch=BATCH)
    return null, [replace(null, name="cad", techniques=("sample=cad",), companions=[x[-24:] for x in ids])]


def faithful(options: Options, model: Model, tokens: int) -> dict[str, Any]:
    """The recall task over so many tokens of prose, with the share of right answers beside the usual figures."""
    text = ModelText.load(model.folder)
    prose = [i for x in encode(model, PARAGRAPHS) for i in x]

    def ask(question: str) -> list[int]:
        return text.chat_ids([{"role": "user", "content": question}])

    def ids(said: str) -> list[int]:
        return text.tokenizer.encode(said, add_special=False)

    asked = questions(ids, ask, prose, tokens, 8 if options.quick else ASKED[model.grown])
    alone = [q.ids[q.ids.index(ids("<|user|>")[0]) :] for q in asked]
    null = Case(name="plain", prompts=[q.ids for q in asked], max_new=6, batch=BATCH, sampling={"temperature": 1.0})
    cases = [replace(null, name="cad", techniques=("sample=cad",), companions=alone)]
    found = options.compare(model, null, cases, f"faithful answers from {tokens} tokens")
    for case, told in zip([null, *cases], found["cases"], strict=True):
        told["median"]["right"] = right(model, case, asked, text)
    return found


def right(model: Model, case: Case, asked: Sequence[Question], text: ModelText) -> float:
    tokens = Contender(model, case, 1).run(0).tokens
    return sum(q.right(text.tokenizer.decode(tokens[i])) for i, q in enumerate(asked)) / len(asked)


if __name__ == "__main__":
    sys.exit(main("sample=cad", "bench.sample.cad", measure, NOTES))
