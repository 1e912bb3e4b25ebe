"""draft=oracle: a draft that knows the answer, for benchmarks only.  The most that guesses can bring.

Paper    none; the bound that drafts are shown beside
Rule     the answers to the prompts are known; of the one that begins as the context does, the next tokens are guessed
Shapes   context [T] int64, guesses at most `guesses`
Units    guesses: tokens
Cost     a comparison of the context with every known text
Differs  nothing to differ from
Raises   ValueError unless guesses >= 1; ConfigError where there are no answers of that name
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from bench.contender import Case, Contender, Model
from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Effect, Trait, Traits

ANSWERS = Path(__file__).resolve().parents[1] / ".cache" / "oracle"
FILE = Path(__file__).resolve()
"""This file is a plugin of the cases that use it, so that nothing else ever finds the technique in the registry."""


@dataclass(slots=True, kw_only=True)
class Oracle:
    """answers: name of a file in .cache/oracle: a list of token ids, of each prompt with its answer."""

    answers: str
    guesses: int = 4
    acts: dict[str, int] = field(default_factory=lambda: {"proposed": 0, "accepted": 0}, init=False, compare=False)
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(needs=frozenset({Trait.ROLLBACK}), effects=frozenset({Effect.GUESSES}))
    _known: list[list[int]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.guesses < 1:
            raise ValueError(f"guesses must be at least 1, got {self.guesses}")
        path = ANSWERS / f"{self.answers}.json"
        if not re.fullmatch(r"[\w. -]+", self.answers) or not path.is_file():
            raise ConfigError(f"{path} is missing; bench.oracle.perfect writes it")
        self._known = json.loads(path.read_text(encoding="utf8"))

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        return [Guesses(self._after(ask.context.tolist())[: ask.most]) for ask in asks]

    def _after(self, context: list[int]) -> list[int]:
        length = len(context)
        found = next((text for text in self._known if text[:length] == context), [])
        return found[length : length + self.guesses]

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted


def perfect(model: Model, null: Case, name: str, guesses: int, threads: int = 1) -> Case:
    """The null with a perfect draft, told as a bound.  Its answers are those that the null gives, taken now."""
    plain = replace(null, techniques=())
    tokens: Mapping[int, Sequence[int]] = Contender(model, plain, threads).run(0).tokens
    ANSWERS.mkdir(parents=True, exist_ok=True)
    known = [[*prompt, *tokens[i]] for i, prompt in enumerate(null.prompts)]
    (ANSWERS / f"{name}.json").write_text(json.dumps(known), encoding="utf8")
    draft = f"draft=oracle(answers={name!r}, guesses={guesses})"
    return replace(null, name="perfect draft", techniques=(draft,), plugins=(str(FILE),), bound=True)


if __name__.startswith("weft_plugin_"):
    register("draft", "oracle")(Oracle)
