"""What goes into the engine: items of a context, the law of a sequence, a request."""

from __future__ import annotations

import hashlib
from typing import Literal

from msgspec import Struct


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
    pooling: str = ""
    """What is told of the prompt's hidden states at its end: "" nothing, "last" the last row's, "mean" the mean over all rows."""
    steered: bool = False
    """A search ranks what may come next: no stop id ends the sequence, and log-probabilities are what it ranks by: the model's,
    then bias, penalties and the ban of end ids before min_tokens."""


class Grammar(Struct, frozen=True):
    """What an output has to look like, as data; a request's place in it is a function of this and of its output tokens alone.

    kind: json (a JSON schema), regex, choice (a JSON list of strings) or grammar (Lark, or GBNF with ::=).  source: its text.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    source: str


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
    techniques: tuple[str, ...] = ()
    """Parts, as slot=name(args), laid over the server's stack for this request alone."""
    companions: tuple[tuple[Item, ...], ...] = ()
    """Contexts whose rows are sampled together with the request's (contrast): each sees the same output, none is told of.
    As many as the stack's technique in the slot `sample` compares."""
    forced: tuple[int, ...] = ()
    """Output tokens that are set beforehand: the engine computes as if it had drawn them (a stack measured along given text)."""
    grammar: Grammar | None = None
    """What the output has to look like; the stack's technique in the slot `constrain` holds it to that."""
    resumed: tuple[int, ...] = ()
    """Output tokens that the client already has (resubmission after a crash): restored as output, never as prompt."""
    timeline: bool = False
    """Whether its steps are told (`Noted`)."""
    ttft_s: float | None = None
    """Within how many seconds its first token is wanted, for a schedule that goes by that: 0.0 for as long as the schedule says,
    None for whenever it comes, and such a request is never refused for being late."""
    hand_over: bool = False
    """Another engine goes on with it: the prompt's full blocks are stored where that one finds them, and their tickets told."""
    stored: tuple[tuple[int, ...], ...] = ()
    """By KV group, the tickets of the prompt's blocks that another engine has stored, from the first on; 0 for none."""
