"""What a search program may do to the sequences of its request, and what it tells the client."""

from __future__ import annotations

from msgspec import Struct

from weft.types.events import FinishReason
from weft.types.result import TokenLogprob


class Fork(Struct, frozen=True, tag="fork"):
    """A new sequence `index` (never one that there was) that goes on from where `source` stands and shares its KV."""

    source: int
    index: int


class Put(Struct, frozen=True, tag="put"):
    """Output tokens of a sequence in place of its last `drop` ones."""

    index: int
    tokens: tuple[int, ...]
    drop: int = 0


class Append(Struct, frozen=True, tag="append"):
    """Tokens into the context of a sequence that are not output: a program's own words."""

    index: int
    tokens: tuple[int, ...]


class Truncate(Struct, frozen=True, tag="truncate"):
    """Cut the context of a sequence to its first `length` positions, and the output with it."""

    index: int
    length: int


class Park(Struct, frozen=True, tag="park"):
    """Let a sequence stand still; it keeps its KV while nobody needs the room."""

    index: int


class Resume(Struct, frozen=True, tag="resume"):
    """Let a parked sequence go on."""

    index: int


class Stop(Struct, frozen=True, tag="stop"):
    """A sequence is not needed any more."""

    index: int


class Tell(Struct, frozen=True, tag="tell"):
    """To the client: more tokens of its output `output`, and, with a reason, that it ends there.

    When every output has ended, the program has, and so have all sequences that are left.
    """

    output: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: FinishReason | None = None
    stop_id: int | None = None
    error: str | None = None


Action = Fork | Put | Append | Truncate | Park | Resume | Stop | Tell
