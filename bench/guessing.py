"""What the benchmarks of guesses share: drafts, and rules that accept, beside a null and beside a draft that knows the answer.

On the bundled model one sequence, where a draft costs much beside a step; on that model grown to 0.5 billion parameters one and
four, where it costs little.  Openings of stories are continued, greedily and sampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.contender import Contender
from bench.harness import Case, Model, Options, encode
from bench.oracle import ANSWERS, FILE
from bench.texts import OPENINGS

SHAPE = "qwen2.5-0.5b"
LAWS: Mapping[str, Mapping[str, Any]] = {"greedy": {}, "temperature 0.8": {"temperature": 0.8}}
SAMPLED: Mapping[str, Mapping[str, Any]] = {
    "temperature 0.8": {"temperature": 0.8},
    "temperature 1": {"temperature": 1.0},
}
DRAFT = (
    "The draft is the one that ships with weft, of three layers: 0.74 % of the grown model's parameters, and 36 % of the bundled "
    "one's."
)
NO_DRAFT = Case(name="no draft", prompts=[[0]])
Cases = Mapping[str, Sequence[str]]
"""By name the parts of each stack."""


def bound(guesses: int) -> str:
    """A note on the perfect draft."""
    return f"Perfect draft: it knows the answer and costs nothing, and all of its {guesses} guesses stand."


def compared(
    options: Options,
    key: str,
    cases: Cases | Callable[[Model], Cases],
    *,
    laws: Mapping[str, Mapping[str, Any]] = LAWS,
    null: Case = NO_DRAFT,
    guesses: int = 4,
) -> Iterator[dict[str, Any]]:
    """The comparisons, in an order that stays.  key: names the answers that are kept.  null: its name and techniques count.
    guesses: of the perfect draft.  With --resume those that the file has are taken from there; with --minutes it ends early."""
    for model in options.models(SHAPE):
        parts = cases(model) if callable(cases) else cases
        under = options if model.grown else replace(options, threads=1)
        root: Contender | None = None
        for batch in (1, 4) if model.grown else (1,):
            prompts = encode(model, OPENINGS)[: max(batch, 2)]
            for title, law in laws.items():
                new = 12 if options.quick else 32
                plain = replace(null, prompts=prompts, sampling=law, max_new=new, batch=batch)
                found = options.known(model, plain, title)
                if found is None and options.late:
                    return
                if found is None:
                    root = root or Contender(model, plain, under.threads)
                    some = [replace(plain, name=name, techniques=tuple(stack)) for name, stack in parts.items()]
                    name = f"{key}-{model.folder.name}-{title}-{batch}"
                    some.append(perfect(model, plain, name, guesses, root))
                    found = under.compare(model, plain, some, title, memory=False, like=root)
                yield found


def perfect(model: Model, null: Case, name: str, guesses: int, root: Contender) -> Case:
    """`bench.oracle.perfect` by an engine that reads the weights of another one."""
    tokens = Contender(model, replace(null, techniques=()), root.runtime.setup.threads, root).run(0).tokens
    ANSWERS.mkdir(parents=True, exist_ok=True)
    known = [[*prompt, *tokens[i]] for i, prompt in enumerate(null.prompts)]
    (ANSWERS / f"{name}.json").write_text(json.dumps(known), encoding="utf8")
    draft = f"draft=oracle(answers={name!r}, guesses={guesses})"
    return replace(null, name="perfect draft", techniques=(draft,), plugins=(str(FILE),), bound=True)
