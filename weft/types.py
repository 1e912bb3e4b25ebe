"""The vocabulary of a step: what goes into the engine, what a plan says, what a result states.

Everything here is a plain msgspec struct: no torch, no clock, no behaviour beyond small derived properties, so the same
objects are planned by the scheduler, carried out by an executor, written to a record and replayed by a simulator.

    plan   = engine.schedule(now)          # Plan: upper bounds
    result = executor.execute(plan)        # StepResult: facts
    events = engine.commit(now, plan, result)

Legend.  position: index of an item in a request's context, from 0.  entry: one position's KV in one group.
block: `GroupSpec.block_tokens` entries of one group.  Half-open ranges everywhere.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Literal

import msgspec

Struct = msgspec.Struct

# ---------------------------------------------------------------------------------------------- inputs


class TokenItem(Struct, frozen=True, tag="token"):
    """A run of token ids."""

    ids: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.ids)


class VectorItem(Struct, frozen=True, tag="vector"):
    """A run of input vectors that stand where token embeddings would: `data` is little-endian float32, rows x width."""

    rows: int
    width: int
    data: bytes

    @property
    def digest(self) -> bytes:
        """Content hash, 32 bytes."""
        return hashlib.blake2b(self.data, digest_size=32, person=b"weft.vector").digest()


class MediaItem(Struct, frozen=True, tag="media"):
    """An image, sound or film that an encoder turns into `rows` vectors; `digest` is the content hash of the source."""

    kind: str
    rows: int
    digest: bytes


Item = TokenItem | VectorItem | MediaItem


class Span(Struct, frozen=True):
    """Where a non-token item stands in a context: positions [start, stop), with the content hash of the item."""

    start: int
    stop: int
    digest: bytes


class SamplingSpec(Struct, frozen=True, kw_only=True):
    """The law that one sequence's tokens are drawn from, and when it ends.  Already validated; see `SamplingParams`.

    temperature 0 is greedy.  top_k 0 means all.  Stop strings are the front's business and not here.
    logprobs: how many alternatives to report for each token; -1 reports nothing at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int = -1
    prompt_logprobs: int = -1
    max_tokens: int = 16
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    """Ids that end the sequence with reason "stop" (every eos id of the model unless ignore_eos, and the client's own)."""


class RequestSpec(Struct, frozen=True, kw_only=True):
    """One request as the engine gets it.

    id: unique among live requests, chosen by the sender.  seed: always given (the front draws one when the client does not).
    n: sequences that share the prompt; sequence i draws its noise from `noise.child_seed(seed, i)`.
    salt: tenant, adapter and every setting that changes KV values; requests share KV only under equal salts.
    """

    id: int
    items: tuple[Item, ...]
    sampling: SamplingSpec = SamplingSpec()
    seed: int = 0
    n: int = 1
    priority: int = 0
    """Lower runs first; equal priorities by arrival."""
    salt: bytes = b""
    resumed: tuple[int, ...] = ()
    """Output tokens that the client already has (resubmission after a crash): restored as output, never as prompt."""


# ---------------------------------------------------------------------------------------------- KV


class GroupKind(enum.StrEnum):
    FULL = "full"
    WINDOW = "window"
    LATENT = "latent"
    STATE = "state"
    PARKED = "parked"
    SHARED = "shared"


class GroupSpec(Struct, frozen=True, kw_only=True):
    """A KV group: layers (and heads) of one model whose entries live and die together.

    entry_bytes: bytes of one entry over all of `layers`.  block_tokens: entries in one block of the shared pool;
    block_tokens * entry_bytes <= the pool's block_bytes.  window: positions that a query sees, itself included
    (WINDOW only).  heads: KV heads that the group holds; () means all.
    """

    name: str
    kind: GroupKind
    layers: tuple[int, ...]
    entry_bytes: int
    block_tokens: int
    model: str = "target"
    heads: tuple[int, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.entry_bytes < 1:
            raise ValueError(f"group {self.name}: block_tokens and entry_bytes must be at least 1")
        if (self.kind is GroupKind.WINDOW) != (self.window is not None):
            raise ValueError(f"group {self.name}: a window belongs to kind 'window' and to no other")
        if self.window is not None and self.window < 1:
            raise ValueError(f"group {self.name}: window must be at least 1")


class KVOpKind(enum.StrEnum):
    COPY = "copy"
    MOVE = "move"
    COMPACT = "compact"
    ROTATE = "rotate"
    REWRITE = "rewrite"
    ZERO = "zero"
    LOAD = "load"
    SAVE = "save"


class KVOp(Struct, frozen=True):
    """One instruction of the closed KV set, over block ids of one group; carried out before the plan's works."""

    kind: KVOpKind
    group: int
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    argument: tuple[int, ...] = ()


class Grant(Struct, frozen=True):
    """Changes of one request's block table in one group: `blocks` stand from index `at` on; what stood there is replaced.

    first: entries that the table no longer holds at its head (a window slides, whole blocks only); index 0 of the table is
    entry `first`.  `at` counts in the table after the head was dropped.
    """

    request: int
    group: int
    at: int
    blocks: tuple[int, ...]
    first: int = 0


# ---------------------------------------------------------------------------------------------- plan


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
    media item stands).  guesses: how many of the last rows are drafts, not context.  parents: for a tree, the row
    index within this work that each guessed row follows (-1: the last row that is context).
    layers: (first, stop) or None for all.  samples: whether the last context row and each guess yield a token.
    output: index in the output of the first token that would be sampled.  link: works with one link are sampled together.
    prompt_rows: rows (counted from the first) whose prompt logprobs are wanted, 0 for none.
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

    @property
    def start(self) -> int:
        return self.rows[0][0]

    @property
    def stop(self) -> int:
        return self.rows[-1][1]

    @property
    def count(self) -> int:
        return sum(b - a for a, b in self.rows)


class Enter(Struct, frozen=True, kw_only=True):
    """A sequence that an executor meets for the first time, or again after it left (preemption).

    tokens: the whole context (-1 at non-token positions); the first `prompt` of them are prompt.
    entries[g]: entries already standing in group g's table (a prefix hit or a fork).  spans, vectors: the non-token items.
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


class Plan(Struct, frozen=True, kw_only=True):
    """Upper bounds of one step.  Executors carry out, in order: leave, enter, grants, kv, works."""

    step: int
    works: tuple[Work, ...] = ()
    enter: tuple[Enter, ...] = ()
    leave: tuple[int, ...] = ()
    grants: tuple[Grant, ...] = ()
    kv: tuple[KVOp, ...] = ()
    rows: int = 0
    """Rows over all works."""
    samples: int = 0
    """Rows whose logits are needed."""
    blocks: int = 0
    """Blocks that the plan took from the pool."""
    work_bytes: int = 0
    """Workspace that the plan needs."""

    @property
    def empty(self) -> bool:
        return not (self.works or self.kv)


# ---------------------------------------------------------------------------------------------- result


class TokenLogprob(Struct, frozen=True):
    """Log-probability of the chosen token, and the best alternatives as (token, logprob), best first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class WorkResult(Struct, frozen=True, kw_only=True):
    """What became of one work.

    rows: rows computed, at most planned (a short result).  tokens: tokens that stand, in order: accepted guesses and the
    one sampled after them.  kept: entries kept per group where that is not simply the accepted context rows.
    draft: guesses for the next plan.  signals: named scalars per row.  failed: why this request alone cannot go on.
    """

    rows: int
    tokens: tuple[int, ...] = ()
    kept: dict[int, int] = {}
    draft: tuple[int, ...] = ()
    signals: dict[str, tuple[float, ...]] = {}
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    failed: str | None = None


class StepResult(Struct, frozen=True, kw_only=True):
    """Facts of one step, one `WorkResult` for each work of the plan, in its order.  Times in seconds."""

    step: int
    works: tuple[WorkResult, ...] = ()
    forward_s: float = 0.0
    sample_s: float = 0.0


# ---------------------------------------------------------------------------------------------- commands and events

FinishReason = Literal["stop", "length", "abort", "error"]


class Add(Struct, frozen=True, tag="add"):
    """Front to engine: run this request."""

    spec: RequestSpec


class Cancel(Struct, frozen=True, tag="cancel"):
    """Front to engine: forget this request, or its sequence `index` alone (the client left, or a stop string was met)."""

    id: int
    index: int | None = None


Command = Add | Cancel


class Tokens(Struct, frozen=True, tag="tokens"):
    """New output tokens of sequence `index` of request `id`."""

    id: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Finished(Struct, frozen=True, tag="finished"):
    """Sequence `index` of request `id` has ended.  stop_id: the id that ended it, where one did (it is the last output token)."""

    id: int
    index: int
    reason: FinishReason
    stop_id: int | None = None
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix index."""
    error: str | None = None


class Preempted(Struct, frozen=True, tag="preempted"):
    """The sequence lost its blocks and waits to be recomputed."""

    id: int
    index: int


class Rejected(Struct, frozen=True, tag="rejected"):
    """The request never ran: it can't fit, or it is malformed.  kind: "request" (4xx) or "capacity".

    code of a capacity: "overloaded" may be asked again later, "never_fits" is too large for this engine's pool.
    """

    id: int
    message: str
    kind: Literal["request", "capacity"] = "request"
    param: str | None = None
    code: str | None = None


Event = Tokens | Finished | Preempted | Rejected


class EngineStats(Struct, frozen=True, kw_only=True):
    """A snapshot for metrics; counters grow for ever, gauges are of now."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_referenced: int = 0
    kv_blocks_cached: int = 0
    prompt_tokens: int = 0
    """Prompt rows computed (counter)."""
    generation_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    finished: int = 0
    rows: int = 0
    """Rows of the last plan."""
    last_step_s: float = 0.0
    """When the last step ended, on the engine's clock."""
    host_s: float = 0.0
    """Time of the last step that was neither model forward nor sampling."""


class EngineFrame(Struct, frozen=True, kw_only=True):
    """What the engine sends after each step: one frame, all events."""

    events: tuple[Event, ...] = ()
    stats: EngineStats = EngineStats()
