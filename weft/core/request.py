"""One sequence inside the engine: its context, its output, how far it is computed, and its block tables.

A client's request with n > 1 becomes n of these, told apart by `index`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft.config import Limits, Stack
from weft.core import prefix
from weft.errors import RequestError
from weft.types import Item, RequestSpec, SamplingSpec, Span, TokenItem, VectorItem

CutRule = Callable[[int, int], int | None]
"""(prompt length, position) -> the smallest cut above position, or None."""
MAX_SEQUENCES = 1024
"""Sequences of one request."""


class State(enum.Enum):
    WAITING = "waiting"
    """Holds no blocks and waits to be admitted."""
    RUNNING = "running"
    PARKED = "parked"
    """Does not advance until resumed; keeps its KV while nobody needs the room."""
    DONE = "done"


@dataclass(slots=True)
class Pace:
    """How many guesses a sequence gets, and how those before stood.

    want: guesses that may be made for it in a step.  stood, tried: guesses, the older ones counting less.  probing: whether they
    are made only to see what they are worth now, lent: the seconds that this may cost; probed: the step in which it was last so.
    owed: seconds of catching up that were paid from the rest of the answer; caught: the tokens of that, the last time.
    """

    want: int
    stood: float = 0.0
    tried: float = 0.0
    probing: bool = False
    lent: float = 0.0
    probed: int = 0
    owed: float = 0.0
    caught: int = 0


class Table:
    """A request's blocks in one group.

    blocks: block ids.  first: entries dropped at the head, whole blocks.  count: entries standing in `blocks`; its physical
    length.  published: blocks, counted from the request's start, that were offered to the prefix index.  compressed: fewer
    entries stand than positions, so that entry and position no longer go together.
    """

    __slots__ = ("blocks", "compressed", "count", "dirty", "first", "published")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.first = 0
        self.count = 0
        self.published = 0
        self.compressed = False
        self.dirty: int | None = None
        """Index from which an executor's copy of `blocks` is out of date, None where it is right."""


class Request:
    """State of one sequence.  The scheduler and the engine write it; policies only read.

    context: what KV is computed from (-1 at positions of vectors and media).  output: what the client has.
    given: ranges of the context after the prompt that a program put in; the rest of it is output.
    parents: where its draft is a tree, the guess that each follows.
    computed[m]: positions of model m whose KV stands.  planned[m]: the same, counting plans in flight.
    """

    __slots__ = (
        "arrival", "cached_tokens", "chains", "companions", "computed", "context", "cut", "draft", "fanned", "followed",
        "generation", "given", "guessed", "history", "id", "in_flight", "index", "key", "leader", "link", "loading", "names",
        "output", "pace", "parents", "partial", "planned", "preemptions", "priority", "prompt", "publishes", "reported", "rid",
        "sampling", "seed", "settings", "single", "source", "spans", "spec", "stack", "started", "state", "tables",
        "tile", "vectors",
    )  # fmt: skip

    def __init__(
        self,
        rid: int,
        spec: RequestSpec,
        stack: Stack,
        *,
        index: int,
        seed: int,
        arrival: float,
        models: int,
        groups: int,
    ) -> None:
        self.rid = rid
        self.id = spec.id
        self.index = index
        self.spec = spec
        self.sampling: SamplingSpec = spec.sampling
        self.seed = seed
        self.arrival = arrival
        self.priority = spec.priority
        self.context, self.spans, self.vectors = lay_out(spec.items)
        self.prompt = len(self.context)
        self.output: list[int] = list(spec.resumed)
        self.context.extend(spec.resumed)
        self.given: list[tuple[int, int]] = []
        self.computed = [0] * models
        self.planned = [0] * models
        self.tables = [Table() for _ in range(groups)]
        self.state = State.WAITING
        self.draft: tuple[int, ...] = ()
        self.parents: tuple[int, ...] = ()
        self.names: dict[int, list[bytes]] = {}
        self.chains: dict[int, list[bytes]] = {}
        """Names that schedules asked for, by size of a block."""
        self.publishes = True
        """False from the first compression on, recomputation included: what follows is no function of the tokens alone."""
        self.in_flight = 0
        self.loading = False
        """Blocks of its tables are loaded by a plan that has not committed."""
        self.partial: tuple[int, int, int] | None = None
        """(start, stop, next layer) of rows that have passed only some layers."""
        self.stack = stack
        self.history = stack.history
        self.settings = stack.settings
        self.tile = stack.tile
        """Rows of the prompt that are computed together, from an absolute multiple of it on."""
        self.cut: CutRule | None = None
        self.followed = not self.spans
        """Whether models beside the target may compute it; decided for life, so that what it needs at most does not grow."""
        self.single, self.guessed = stack.single, bool(stack["draft"].guesses) and not stack.single
        """Whether it takes no guesses; whether its stack makes some for it."""
        self.pace: Pace | None = None
        """None where nobody decides how far ahead is guessed: as far as the draft likes."""
        self.link: int | None = None
        self.leader: Request | None = None
        """Whose companion this is: it sees the leader's output after a prompt of its own, and nobody is told of it."""
        self.companions: list[Request] = []
        self.fanned = index > 0 or spec.n == 1
        """Whether the other sequences of the request have come to life."""
        self.cached_tokens = 0
        self.preemptions = 0
        self.generation = 0
        """Counts lives, so that results of an earlier one are recognised."""
        self.started = False
        """Whether the executor knows this request."""
        self.source = -1
        """The sequence that this one was forked from, until the executor has been told."""
        self.key: tuple[float, ...] = ()
        self.reported = 0
        """Prompt positions whose logprobs the client has."""

    # ------------------------------------------------------------------ what policies read

    @property
    def remaining(self) -> int:
        """Context rows of the target model that no plan covers yet."""
        return len(self.context) - self.planned[0]

    @property
    def decoding(self) -> bool:
        """Everything but the newest token is computed, and that token is output."""
        planned = self.planned[0]
        return planned >= self.prompt and len(self.context) - planned <= 1

    @property
    def rank(self) -> int:
        """Sarathi's order: 0 decodes, 1 is half done, 2 is new."""
        planned = self.planned[0]
        if planned >= self.prompt and len(self.context) - planned <= 1:
            return 0
        return 1 if planned or self.partial is not None else 2

    @property
    def limit(self) -> int:
        """Context length that the request reaches at most."""
        return len(self.context) - len(self.output) + self.sampling.max_tokens

    @property
    def ttft_s(self) -> float | None:
        """Within how long after its arrival the first token is wanted; as `RequestSpec.ttft_s`."""
        return self.spec.ttft_s

    @property
    def tenant(self) -> bytes:
        """Who is counted: of a salt with an owner, the owner alone, or whoever changes salts would have many shares."""
        return self.spec.salt.partition(b"\0")[0]

    def heads(self, block: int) -> list[bytes]:
        """Names of the prompt's beginnings of whole blocks of this size, the tenant's own."""
        names = self.chains.get(block)
        if names is None:
            names = self.chains[block] = []
            prefix.extend(names, prefix.root(self.spec.salt), self.context, self.spans, block, self.prompt)
        return names

    # ------------------------------------------------------------------ what the engine does

    def whole(self, length: int) -> int:
        """The most positions, at most `length`, whose rows were computed together with all that belong to them."""
        return length if length >= self.prompt else length // self.tile * self.tile

    def ends(self, length: int) -> int:
        """As `whole`, of rows computed for this very prompt: its last row is a tile of its own."""
        return length if length >= self.prompt - 1 else self.whole(length)

    @property
    def common(self) -> int:
        """Positions whose rows would be the same in any longer prompt that begins alike.

        Whole tiles before the last row's; and no output, where rows after the prompt are computed otherwise than a prompt's.
        """
        if self.tile > 1:
            return (self.prompt - 1) // self.tile * self.tile
        return len(self.context) if self.stack.shares_output else self.prompt

    def beyond(self, start: int, guesses: int, limits: Limits) -> tuple[int, int]:
        """(entries of the target behind the context and `guesses` of a draft that is computed there, its soft tokens for a row).

        start: of the step's rows.  Soft tokens follow rows behind the prompt alone, and where what they say can still be a guess.
        """
        if not self.guessed or self.link is not None or (self.pace is not None and not self.pace.want):
            return 0, 0
        draft, end = self.stack["draft"], len(self.context)
        most = min(int(draft.guesses) if self.pace is None else self.pace.want, limits.max_guesses)
        left = limits.max_model_len - end - guesses
        if hasattr(draft, "exits"):
            return max(0, min(most, left)), 0
        soft = min(most, int(getattr(draft, "soft", 0)), left // (1 + guesses), self.limit - end - 2)
        return ((1 + guesses) * soft, soft) if soft > 0 and start >= self.prompt else (0, 0)

    def prompt_rows(self, start: int, stop: int) -> int:
        """Rows of [start, stop), from the first, that give a wanted prompt logprob; 0 if all are known.

        Position i tells of prompt token i + 1.
        """
        if self.sampling.prompt_logprobs < 0:
            return 0
        last = min(stop, self.prompt - 1)
        return max(0, last - start) if last > self.reported else 0

    def outputs_before(self, length: int) -> int:
        """Output tokens among the first `length` positions."""
        given = sum(max(0, min(stop, length) - start) for start, stop in self.given)
        return max(0, length - self.prompt - given)

    def forget(self) -> list[int]:
        """Drop all progress and hand back the blocks; context, output, seed and generation count stay.

        The blocks come last first, so that the eviction of cached ones eats a prefix from its end.
        """
        blocks = [b for t in self.tables for b in reversed(t.blocks)]
        self.tables = [Table() for _ in self.tables]
        self.computed = [0] * len(self.computed)
        self.planned = [0] * len(self.planned)
        self.partial = None
        self.draft = ()
        self.loading = False
        self.generation += 1
        self.started = False
        self.source = -1
        return blocks


def lay_out(items: Sequence[Item]) -> tuple[list[int], tuple[Span, ...], dict[int, VectorItem]]:
    """Items to (ids with -1 where no token stands, spans, vector items by start).  Raises RequestError for an empty prompt."""
    ids: list[int] = []
    spans: list[Span] = []
    vectors: dict[int, VectorItem] = {}
    for item in items:
        if isinstance(item, TokenItem):
            ids.extend(item.ids)
            continue
        if isinstance(item, VectorItem):
            if len(item.data) != 4 * item.rows * item.width:
                raise RequestError(
                    f"a vector item of {item.rows} x {item.width} float32 needs {4 * item.rows * item.width} bytes, "
                    f"got {len(item.data)}",
                    param="prompt",
                )
            vectors[len(ids)] = item
        spans.append(Span(len(ids), len(ids) + item.rows, item.digest))
        ids.extend([-1] * item.rows)
    if not ids:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    return ids, tuple(spans), vectors


def check_spec(
    spec: RequestSpec, limits: Limits, vocab: int | None, companions: int = 0, *, constrains: bool = True
) -> None:
    """Raise RequestError for a request that could never run, before anything is laid out for it.

    companions: how many of them its stack compares.  constrains: whether its stack holds outputs to a grammar.
    """
    if spec.grammar is not None and not constrains:
        raise RequestError(
            "the request says what its output has to look like, and its stack has no technique in the slot constrain; add one",
            param="structured_outputs",
        )
    check_ids(spec.resumed, vocab)
    check_items(spec.items, len(spec.resumed), limits, vocab, "prompt")
    for items in spec.companions:
        check_items(items, len(spec.resumed), limits, vocab, "weft.contrast")
    if len(spec.companions) != companions:
        raise RequestError(
            f"the request brings {len(spec.companions) or 'nothing'} to be compared with its own context, and its stack compares "
            f"{companions or 'nothing'}: {'give so many' if companions else 'leave that out'}, or take another technique in the "
            "slot sample",
            param="weft.contrast",
        )
    if not 1 <= spec.n <= MAX_SEQUENCES:
        raise RequestError(f"n must be from 1 to {MAX_SEQUENCES}, got {spec.n}", param="n")
    if spec.sampling.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {spec.sampling.max_tokens}", param="max_tokens")
    if len(spec.resumed) >= spec.sampling.max_tokens:
        raise RequestError(
            "the resumed output has max_tokens tokens already; there is nothing left to do", param="max_tokens"
        )
    if spec.sampling.pooling and (spec.n > 1 or spec.sampling.max_tokens > 1):
        raise RequestError(
            "hidden states are pooled for one sequence of one token; ask for nothing more", param="pooling"
        )
    if spec.resumed and spec.n > 1:
        raise RequestError("a request with n > 1 is resumed one sequence at a time", param="n")


def check_items(items: Sequence[Item], after: int, limits: Limits, vocab: int | None, param: str) -> None:
    """Raise RequestError for a context that is malformed, or leaves no room behind it and `after` tokens of output."""
    rows = after
    for item in items:
        if isinstance(item, TokenItem):
            check_ids(item.ids, vocab)
        elif item.rows < 1:
            raise RequestError(f"an input item must have at least one row, got {item.rows}", param=param)
        rows += item.rows
    if rows >= limits.max_model_len:
        raise RequestError(
            f"the prompt has {rows} tokens, and this engine's context holds {limits.max_model_len} with at least one "
            "for the answer; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


def check_ids(ids: Sequence[int], vocab: int | None) -> None:
    """Raise RequestError for a token id outside the vocabulary; without a vocabulary everything passes."""
    if not ids or vocab is None:
        return
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        raise RequestError(
            f"token id {low if low < 0 else high} is outside the vocabulary (0 to {vocab - 1})", param="prompt"
        )


def every(cuts: Sequence[CutRule]) -> CutRule | None:
    """One rule out of several: the nearest of their next cuts."""
    if not cuts:
        return None
    if len(cuts) == 1:
        return cuts[0]

    def nearest(prompt: int, position: int) -> int | None:
        found = [c for rule in cuts if (c := rule(prompt, position)) is not None]
        return min(found) if found else None

    return nearest
