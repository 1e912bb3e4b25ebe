"""Commands to the engine and events out of it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from weft.types.inputs import RequestSpec
from weft.types.result import TokenLogprob

FinishReason = Literal["stop", "length", "abort", "error"]


class Add(Struct, frozen=True, tag="add"):
    """Front to engine: run this request."""

    spec: RequestSpec


class Cancel(Struct, frozen=True, tag="cancel"):
    """Front to engine: forget this request, or its sequence `index` alone (the client left, or a stop string was met)."""

    id: int
    index: int | None = None


class Load(Struct, frozen=True, tag="load"):
    """Front to engine: take in the adapter in the folder `path` under this name.  id: of this command, told back.

    technique: which of the slot `adapt` reads it, None for the one that the files name.  The path stays below the folder that the
    engine was given for this.
    """

    id: int
    name: str
    path: str
    technique: str | None = None


class Drop(Struct, frozen=True, tag="drop"):
    """Front to engine: let go of the adapter of this name."""

    id: int
    name: str


class Watch(Struct, frozen=True, tag="watch"):
    """Front to engine: tell in every frame what the step was made of (`Seen`), or no more."""

    on: bool


Command = Add | Cancel | Load | Drop | Watch


class Tokens(Struct, frozen=True, tag="tokens", omit_defaults=True):
    """New output tokens of sequence `index` of request `id`."""

    id: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix index; told with the first token, so that it is known should the engine die."""


class Finished(Struct, frozen=True, tag="finished", omit_defaults=True):
    """Sequence `index` of request `id` has ended.  stop_id: the id that ended it, where one did (it is the last output token)."""

    id: int
    index: int
    reason: FinishReason
    stop_id: int | None = None
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix index."""
    error: str | None = None
    discarded: int = 0
    """Tokens that a search drew for the request and did not return; told with the last of its sequences that ends."""
    vector: bytes = b""
    """Pooled hidden states of the prompt, little-endian float32 [width], where `SamplingSpec.pooling` asks for them."""
    stored: tuple[tuple[int, ...], ...] = ()
    """As `RequestSpec.stored`, of a request that was to be handed over."""
    code: str | None = None
    """Of an error that is the request's own fault, as in `Rejected`."""


class Preempted(Struct, frozen=True, tag="preempted"):
    """The sequence lost its blocks and waits to be recomputed."""

    id: int
    index: int


class Noted(Struct, frozen=True, tag="noted", omit_defaults=True):
    """Something that a sequence's timeline tells of: started, resumed, chunk, speculation; engine_died comes from who saw it."""

    id: int
    index: int
    event: str
    detail: dict[str, int | float | str] = {}


class Rejected(Struct, frozen=True, tag="rejected"):
    """The request never ran: it can't fit, or it is malformed.  kind: "request" (4xx) or "capacity".

    code of a capacity: "overloaded" may be asked again later, "never_fits" is too large for this engine's pool, "too_late" could
    not have its first token in time any more.
    """

    id: int
    message: str
    kind: Literal["request", "capacity"] = "request"
    param: str | None = None
    code: str | None = None


class Adapted(Struct, frozen=True, tag="adapted"):
    """What became of a Load or a Drop.

    part: how a request asks for the adapter, as slot=name(args); None where it is gone.  digest: of its contents, hexadecimal.
    error: why nothing has changed, with its kind ("request" or "capacity") and code as in `Rejected`.
    """

    id: int
    name: str
    part: str | None = None
    digest: str = ""
    error: str | None = None
    kind: Literal["request", "capacity"] = "request"
    param: str | None = None
    code: str | None = None


Event = Tokens | Finished | Preempted | Noted | Rejected | Adapted


class EngineStats(Struct, frozen=True, kw_only=True, omit_defaults=True):
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
    refused: int = 0
    """Requests that the schedule refused because they could not be in time any more (counter)."""
    rows: int = 0
    """Rows of the last plan."""
    last_step_s: float = 0.0
    """When the last step ended, on the engine's clock."""
    acts: dict[str, int] = {}
    """What the techniques did, by "slot=name.act" (counters)."""
    draft_sequences: int = 0
    """Sequences, each in every step, for which it was chosen how far ahead to guess (counters); guesses that they were allowed;
    how often guesses were switched off for one, and probes of what they would be worth."""
    draft_guesses: int = 0
    draft_off: int = 0
    draft_probes: int = 0
    masked_rows: int = 0
    """Rows of logits that a grammar masked (counter), the steps in which there were some, and the seconds that it took."""
    masked_steps: int = 0
    mask_s: float = 0.0
    grammars: int = 0
    """Requests whose grammar was made ready off the step thread (counter), and the seconds that it took."""
    grammar_s: float = 0.0
    shadow_requests: int = 0
    """Requests that were computed once more on the reference path (counter); tokens of theirs, and requests left out."""
    shadow_tokens: int = 0
    shadow_skipped: int = 0
    shadow_kl: float = 0.0
    """Mean divergence from the reference path over recent checks, nats per token; share of equal likeliest tokens."""
    shadow_top1: float = 1.0
    shadow_alarm: int = 0
    """1 while the divergence is above the threshold."""
    host_s: float = 0.0
    """Time of the last step that was neither model forward nor sampling."""
    engine_restarts: int = 0
    """Engines that ended and were started again (counter); 0 for one in the front's own process."""


class Seen(Struct, frozen=True):
    """What a step was made of: rows of prompts, of answers and of guesses, and sequences; and the pool's blocks that hold
    something, as (block, references, request id), both 0 for one that is only cached; None where nobody looked at them."""

    step: int
    prompt_rows: int
    decode_rows: int
    guess_rows: int
    sequences: int
    blocks: tuple[tuple[int, int, int], ...] | None = None


class EngineFrame(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the engine sends for each step: one frame, all events.

    plan: ids of the requests in the plan that is carried out next, where that is told; None while they are those told last.
    behind: of those of them that have more to compute than the row of their newest token, (id, rows computed, rows once that plan
    is carried out).
    making: ids of the requests whose grammar is made ready beside the steps; None likewise.  taken: commands that the engine had
    taken in by then.  seen: while somebody watches.
    """

    events: tuple[Event, ...] = ()
    stats: EngineStats = EngineStats()
    plan: tuple[int, ...] | None = None
    behind: tuple[tuple[int, int, int], ...] = ()
    making: tuple[int, ...] | None = None
    taken: int = 0
    seen: Seen | None = None
