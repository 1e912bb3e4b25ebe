"""A plan: upper bounds of one step, complete in itself."""

from __future__ import annotations

import enum

from msgspec import Struct

from weft.types.inputs import Grammar, SamplingSpec, Span, VectorItem
from weft.types.kv import Grant, KVOp


class Mask(enum.StrEnum):
    CAUSAL = "causal"
    WINDOW = "window"
    TREE = "tree"


class Keep(enum.StrEnum):
    APPEND = "append"
    """Entries stand."""
    SCRATCH = "scratch"
    """Entries are forgotten after the step."""
    ACCEPT = "accept"
    """The slot `accept` says how many of the guessed rows stand."""


class Work(Struct, frozen=True, kw_only=True):
    """How far one request advances in a step on one model.

    rows: sorted, disjoint ranges of logical positions.  tokens: the ids at those positions, in order (-1 where a vector or
    media item stands).  guesses: how many of the last rows are drafts, not context.  parents: for a tree, the guess
    that each guess follows (-1: the last row that is context); positions are those of the path, entries those of the rows.  Where
    a model computes a tree in several steps, its last guesses alone are rows, and parents tells of those before them, too.
    layers: (first, stop) or None for all.  samples: whether the last context row and each guess yield a token.
    output: index in the output of the first token that would be sampled.  link: works with one link are sampled together.
    prompt_rows: rows (counted from the first) whose prompt logprobs are wanted, 0 for none.
    ahead: rows beyond these that the executor may compute in this step, once it knows what was accepted: a draft model's own
    proposals, or what the target's first layers guess.  Their entries have room; how many rows stand is in the result.
    want: guesses for the next plan that the executor may ask the slot `draft` for, -1 for as many as that likes.
    soft: if not 0, the rows ahead are learned tokens of the slot `draft`, so many behind the last context row and behind each
    guess.  They are computed in the same pass; each sees what that row sees, and those before it; none stands.
    """

    request: int
    rows: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    model: str = "target"
    layers: tuple[int, int] | None = None
    mask: Mask = Mask.CAUSAL
    keep: Keep = Keep.APPEND
    link: int | None = None
    guesses: int = 0
    parents: tuple[int, ...] = ()
    samples: bool = False
    output: int = 0
    prompt_rows: int = 0
    ahead: int = 0
    want: int = -1
    soft: int = 0

    @property
    def start(self) -> int:
        return self.rows[0][0]

    @property
    def stop(self) -> int:
        return self.rows[-1][1]

    @property
    def count(self) -> int:
        return sum(b - a for a, b in self.rows)

    @property
    def passing(self) -> int:
        """Rows that the target's pass has for it: its own, and its soft tokens."""
        return len(self.tokens) + (self.ahead if self.soft else 0)


class Enter(Struct, frozen=True, kw_only=True):
    """A sequence that an executor meets for the first time, or again after it left (preemption).

    tokens: the whole context (-1 at non-token positions); the first `prompt` of them are prompt.
    entries[g]: entries already standing in group g's table (a prefix hit or a fork).  spans, vectors: the non-token items.
    techniques: parts laid over the server's stack.  source: the sequence that this one was forked from, whose state it inherits
    in this very plan; -1 for none.  forced: tokens of the output that are set beforehand.  grammar: what the output has to look
    like.  given: ranges of the context after the prompt that are a program's own words, and no output.  salt: the tenant's, whose
    requests alone may have anything of this one's text.
    """

    request: int
    tokens: tuple[int, ...]
    prompt: int
    sampling: SamplingSpec
    seed: int
    entries: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    vectors: dict[int, VectorItem] = {}
    """Vector items by the position at which they start."""
    techniques: tuple[str, ...] = ()
    source: int = -1
    forced: tuple[int, ...] = ()
    grammar: Grammar | None = None
    given: tuple[tuple[int, int], ...] = ()
    salt: bytes = b""


class Plan(Struct, frozen=True, kw_only=True):
    """Upper bounds of one step.  Executors carry out, in order: leave, enter (a fork
    inherits from a sequence that leaves in the same plan, too), grants, kv, works, after."""

    step: int
    works: tuple[Work, ...] = ()
    enter: tuple[Enter, ...] = ()
    leave: tuple[int, ...] = ()
    grants: tuple[Grant, ...] = ()
    kv: tuple[KVOp, ...] = ()
    rows: int = 0
    """Rows over all works of the target; other models have rows and workspace of their own."""
    samples: int = 0
    """Rows whose logits are needed."""
    blocks: int = 0
    """Blocks that the plan took from the pool."""
    work_bytes: int = 0
    """Workspace that the plan needs."""
    fetch: tuple[int, ...] = ()
    """Tickets that a later plan will probably load: an executor may bring them nearer."""
    after: tuple[KVOp, ...] = ()
    """What is saved of that which the works have computed."""

    @property
    def empty(self) -> bool:
        return not (self.works or self.kv)
