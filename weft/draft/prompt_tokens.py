"""Parallel prompt decoding: learned tokens behind each row that samples, at which the target itself says what comes later.

Paper    Chen et al., Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference,
         arXiv:2405.18628 (002-193)
Rule     s_1 .. s_n are learned inputs of the target's first layer.  After the row of token x_t they stand at positions t + 1 ..
         t + n, and s_j sees what x_t sees, x_t, and s_1 .. s_j.  The target's head on the state of s_j is a law of x_(t+j+1)
         that knows neither x_(t+1) nor what follows it.  One pass has the rows of the step, guesses among them, and s_1 .. s_n
         behind the last of the context and behind each guess; guess j of the next step is a draw of the law at s_j behind the
         last row that stands.  No entry of s_j stands
Shapes   s [guesses, width]; a step of g guesses has (1 + g) * (1 + guesses) rows for a sequence.  laws [vocab]
Units    guesses: tokens
Cost     the rows of a step, which grow with the square of guesses: 4, 9 and 16 of them for 1, 2 and 3; products with the target's
         head for as many of them as there are guesses; guesses * width numbers, 0.014 % of the bundled model's.  No second model
Pays     not on the bundled model: of guesses 0.04 to 0.16 stood, and one sequence goes at 0.62 (greedy) and 0.67 (at 0.8) of the
         speed alone with 1 guess, 0.59 and 0.61 with 2, as a step of 4 rows takes 1.7 times a step of one; four at 0.74 and 0.47.
         The controller turns it off there (0.94 to 1.08).  On the grown 0.5B shape, whose few rows cost next to nothing, 0.97 to
         1.05 (one sequence, controller off).  It needs a model whose guesses stand more often
Differs  a chain is guessed, with all learned tokens behind each guess, where the paper grows a tree of the likeliest, with
         fewer tokens behind those that hardly stand, and chooses its size by measured times (here the controller chooses how many
         guesses there are).  One token for each distance, where the paper averages several.  Learned tokens follow rows behind
         the prompt: the first token after it has no guesses
Raises   ValueError unless 1 <= guesses <= 7; ConfigError for a file that cannot be read, is of another model, or has fewer tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from weft.draft._common import proposals
from weft.draft._weights import Kind, Shapes, read_shapes, read_tensors
from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Ask, Features, Guesses, Target
from weft.traits import Effect, Trait, Traits

MOST = 7
"""With 7 guesses a step's tree has 63 rows; 64 are what the kernels tell apart."""
BUNDLED = Path(__file__).resolve().parents[1] / "bundled" / "prompt_tokens" / "tokens.safetensors"
KIND = Kind(
    "weft prompt tokens 1",
    "prompt tokens",
    "train some with python -m tools.train_tiny prompts, as docs/speculation.md says",
)


def width_of(shapes: Shapes) -> int:
    """Of a file's tensors, if they are those of prompt tokens; raises ValueError or KeyError."""
    count, width = shapes["soft"]
    if len(shapes) > 1 or min(count, width) < 1:
        raise ValueError
    return width


@register("draft", "prompt_tokens")
@dataclass(slots=True, kw_only=True)
class PromptTokens:
    """guesses: learned tokens behind each row.  weights: a file that `python -m tools.train_tiny prompts` wrote, or the bundled
    model's."""

    guesses: int = 2
    weights: str = "bundled"
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "soft_rows": 0}, init=False, compare=False
    )
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = False
    trial: ClassVar[dict[str, object]] = {"guesses": 3}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.TARGET_FEATURES, Trait.TREE_MASK}), effects=frozenset({Effect.GUESSES})
    )
    _vectors: Any = field(default=None, init=False, repr=False, compare=False)
    _header: tuple[Shapes, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST:
            raise ValueError(f"guesses must be from 1 to {MOST}, got {self.guesses}")
        if not self.weights:
            raise ValueError("the weights' name is empty; leave it out for the tokens that come with weft")

    # ------------------------------------------------------------------ weights

    @property
    def path(self) -> Path:
        return BUNDLED if self.weights == "bundled" else Path(self.weights).expanduser()

    @property
    def header(self) -> tuple[Shapes, int]:
        """Raises ConfigError."""
        if self._header is None:
            self._header = read_shapes(self.path, KIND, width_of)
            count = self._header[0]["soft"][0]
            if count < self.guesses:
                raise ConfigError(
                    f"{self.path} has {count} prompt tokens; guesses must be at most that, got {self.guesses}"
                )
        return self._header

    @property
    def soft(self) -> int:
        """Learned tokens behind a row."""
        return self.guesses

    def vectors(self, target: Target) -> Any:
        """Float32 [guesses, width].  Raises ConfigError where they cannot be read, or were trained for another model."""
        if self._vectors is None:
            shapes, vocab = self.header
            found = read_tensors(self.path, KIND, width_of(shapes), vocab, target)
            self._vectors = found["soft"][: self.guesses]
        return self._vectors

    def memory(self, sequences: int, vocab: int) -> int:
        """Bytes: the learned tokens, the states of all that are behind a step's rows, and the laws of guesses, in float32.
        Raises ConfigError."""
        count, width = self.header[0]["soft"]
        return 4 * (count * width + sequences * self.guesses * ((1 + self.guesses) * width + vocab))

    def attach(self, words: Any) -> None:
        """Read the weights.  Raises ConfigError as `vectors`."""
        self.vectors(words.target)

    # ------------------------------------------------------------------ guesses

    def propose(self, asks: Sequence[Ask], run: Features) -> list[Guesses]:
        import torch

        tokens: list[list[int]] = [[] for _ in asks]
        laws: list[list[Any]] = [[] for _ in asks]
        most = [0 if ask.soft is None else min(len(ask.soft), self.guesses, ask.most) for ask in asks]
        going = [i for i, m in enumerate(most) if m > 0]
        if going:
            logits = run.target.predict(torch.cat([asks[i].soft[: most[i]] for i in going]))
            self.acts["soft_rows"] += len(logits)
            first = dict(zip(going, [sum(most[:i]) for i in going], strict=True))
        while going:
            rows = logits[[first[i] + len(tokens[i]) for i in going]]
            keep = []
            for i, (token, law) in zip(going, run.draw([(i, tokens[i]) for i in going], rows), strict=True):
                if token < 0:
                    continue
                tokens[i].append(token)
                laws[i].append(law)
                if len(tokens[i]) < most[i] and token not in asks[i].sampling.stop_ids:
                    keep.append(i)
            going = keep
        return proposals(asks, tokens, laws)

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted
