"""One sequence inside the engine: its context, its output, how far it is computed, and its block tables.

A client's request with n > 1 becomes n of these, told apart by `index`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from weft.errors import RequestError
from weft.types import RequestSpec, SamplingSpec, Span, TokenItem, VectorItem

CutRule = Callable[[int, int], int | None]
"""(prompt length, position) -> the smallest cut above position, or None."""


class State(enum.Enum):
    WAITING = "waiting"
    """Holds no blocks and waits to be admitted."""
    RUNNING = "running"
    PARKED = "parked"
    """Holds its KV and does not advance until resumed."""
    DONE = "done"


class Table:
    """A request's blocks in one group.

    blocks: block ids.  first: entries dropped at the head, whole blocks.  count: entries standing in `blocks`; its physical
    length.  published: blocks, counted from the request's start, that were offered to the prefix index.
    """

    __slots__ = ("blocks", "count", "dirty", "first", "published")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.first = 0
        self.count = 0
        self.published = 0
        self.dirty: int | None = None
        """Index from which an executor's copy of `blocks` is out of date, None where it is right."""


class Request:
    """State of one sequence.  The scheduler and the engine write it; policies only read.

    context: what KV is computed from (-1 at positions of vectors and media).  output: what the client has.
    computed[m]: positions of model m whose KV stands.  planned[m]: the same, counting plans in flight.
    """

    __slots__ = (
        "arrival", "cached_tokens", "computed", "context", "cut", "draft", "family", "generation", "id", "in_flight", "index",
        "key", "link", "names", "output", "parent", "partial", "planned", "preemptions", "priority", "prompt", "publishes",
        "reported", "rid", "sampling", "seed", "spans", "spec", "started", "state", "tables", "vectors",
    )  # fmt: skip

    def __init__(self, rid: int, spec: RequestSpec, *, index: int, seed: int, arrival: float, models: int, groups: int) -> None:
        self.rid = rid
        self.id = spec.id
        self.index = index
        self.spec = spec
        self.sampling: SamplingSpec = spec.sampling
        self.seed = seed
        self.arrival = arrival
        self.priority = spec.priority
        self.context, self.spans, self.vectors = lay_out(spec)
        self.prompt = len(self.context)
        self.output: list[int] = list(spec.resumed)
        self.context.extend(spec.resumed)
        self.computed = [0] * models
        self.planned = [0] * models
        self.tables = [Table() for _ in range(groups)]
        self.state = State.WAITING
        self.draft: tuple[int, ...] = ()
        self.names: dict[int, list[bytes]] = {}
        self.publishes = True
        self.in_flight = 0
        self.partial: tuple[int, int, int] | None = None
        """(start, stop, next layer) of rows that have passed only some layers."""
        self.cut: CutRule | None = None
        self.link: int | None = None
        self.cached_tokens = 0
        self.preemptions = 0
        self.generation = 0
        """Counts admissions, so that results of an earlier life are recognised."""
        self.started = False
        """Whether the executor knows this request."""
        self.parent: int | None = None
        self.family: list[int] = []
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
        return self.planned[0] >= self.prompt and self.remaining <= 1

    @property
    def begun(self) -> bool:
        return self.planned[0] > 0 or self.partial is not None

    @property
    def rank(self) -> int:
        """Sarathi's order: 0 decodes, 1 is half done, 2 is new."""
        return 0 if self.decoding else 1 if self.begun else 2

    @property
    def limit(self) -> int:
        """Context length that the request reaches at most."""
        return self.prompt + self.sampling.max_tokens

    @property
    def tenant(self) -> bytes:
        return self.spec.salt

    # ------------------------------------------------------------------ what the engine does

    def forget(self) -> list[int]:
        """Drop all progress and hand back the blocks; context, output, seed and generation count stay."""
        blocks = [b for t in self.tables for b in t.blocks]
        self.tables = [Table() for _ in self.tables]
        self.computed = [0] * len(self.computed)
        self.planned = [0] * len(self.planned)
        self.partial = None
        self.draft = ()
        self.generation += 1
        self.started = False
        return blocks


def lay_out(spec: RequestSpec) -> tuple[list[int], tuple[Span, ...], dict[int, VectorItem]]:
    """Items to (ids with -1 where no token stands, spans, vector items by start).  Raises RequestError for an empty prompt."""
    ids: list[int] = []
    spans: list[Span] = []
    vectors: dict[int, VectorItem] = {}
    for item in spec.items:
        if isinstance(item, TokenItem):
            ids.extend(item.ids)
            continue
        if item.rows < 1:
            raise RequestError("an input item must have at least one row", param="prompt")
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
