"""What front and engine say to each other over their socket: length-prefixed msgpack, one message in a frame.

A frame is four bytes, the length of what follows (big-endian), and one message.  Both ends know every message beforehand: what is
longer than `MAX_FRAME_BYTES`, is no msgpack, or has another shape is refused, and nothing that arrives is ever more than data.

    nursery -> front   Hello, Spawned, Exited        a process that has loaded what is slow to load, and forks engines
    front -> nursery   Spawn
    engine -> front    Hello, Ready or Failed, then an EngineFrame for each step, and Failed where it gives up
    front -> engine    Start, then commands
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Struct

from weft.errors import CapacityError, ConfigError, EngineError
from weft.front.port import EngineInfo
from weft.types import Add, Cancel, Drop, EngineFrame, Load, SharedKV, Watch

HEAD_BYTES = 4
MAX_FRAME_BYTES = 256 << 20
T = TypeVar("T")


class FrameError(EngineError):
    """What came over a socket is no frame, or no message that its reader knows."""


class Hello(Struct, frozen=True, tag="hello"):
    """First from whoever connects.  engine: else it is the nursery."""

    pid: int
    engine: bool


class Spawn(Struct, frozen=True, tag="spawn"):
    """Front to nursery: fork an engine."""


class Spawned(Struct, frozen=True, tag="spawned"):
    """Nursery to front: the engine has this pid."""

    pid: int


class Exited(Struct, frozen=True, tag="exited"):
    """Nursery to front: an engine has ended.  status: its exit status, or the negative number of the signal that ended it."""

    pid: int
    status: int


class Start(Struct, frozen=True, tag="start", kw_only=True):
    """Front to engine: what to build.

    folder: of the model.  name: what it is called.  options: keywords of `weft.LLM`, as text and numbers.  shadow: share and
    alarm of the shadow checks.  lora_root: the folder below which adapters may be loaded.  quiet: an engine that takes another's
    place prints neither plan nor progress.  record: the file to which it writes its decisions; one that takes another's place
    takes the next free FILE.2, FILE.3, ...  cpus: on which alone it runs; any, where there are none.  shared: memory in which
    prompts are handed over; its fd is inherited.
    """

    folder: str
    name: str
    options: dict[str, Any] = {}
    shadow: tuple[float, float | None] | None = None
    lora_root: str | None = None
    log_level: str = "warning"
    log_format: str = "text"
    quiet: bool = False
    record: str | None = None
    cpus: tuple[int, ...] = ()
    shared: SharedKV | None = None


class Done(Struct, frozen=True, tag="done"):
    """Front to engine: the server ends in good order.  A front that was killed does not say so."""


class Ready(Struct, frozen=True, tag="ready"):
    """Engine to front: it is built and takes commands."""

    info: EngineInfo


class Failed(Struct, frozen=True, tag="failed"):
    """Engine to front: it cannot be built, or cannot go on; it ends after this.  kind: which error the front raises."""

    message: str
    kind: Literal["config", "capacity", "engine"] = "engine"

    @property
    def error(self) -> EngineError:
        return {"config": ConfigError, "capacity": CapacityError, "engine": EngineError}[self.kind](self.message)


class Step(Struct, frozen=True, tag="step"):
    """Engine to front: one step."""

    frame: EngineFrame


FromNursery = Hello | Spawned | Exited
ToNursery = Spawn
FromEngine = Hello | Ready | Failed | Step
ToEngine = Start | Done | Add | Cancel | Load | Drop | Watch

_encoder = msgspec.msgpack.Encoder()


def frame_of(message: Struct) -> bytes:
    """A message as it travels.  Raises FrameError for one that is too long."""
    out = bytearray(HEAD_BYTES)
    _encoder.encode_into(message, out, HEAD_BYTES)
    length = len(out) - HEAD_BYTES
    if length > MAX_FRAME_BYTES:
        raise FrameError(
            f"a message of {length} bytes is longer than a frame's {MAX_FRAME_BYTES}; ask for less at once"
        )
    out[:HEAD_BYTES] = length.to_bytes(HEAD_BYTES, "big")
    return bytes(out)


class Frames(Generic[T]):
    """Bytes in, as they come, messages out.  kind: the union of what this end takes."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._held = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a frame has begun that has not ended."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[T]:
        """The messages that end within `data`.  Raises FrameError, after which the socket is of no more use."""
        self._held += data
        found: list[T] = []
        at = 0
        while len(self._held) - at >= HEAD_BYTES:
            length = int.from_bytes(self._held[at : at + HEAD_BYTES], "big")
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame says that it has {length} bytes; at most {MAX_FRAME_BYTES} are taken")
            stop = at + HEAD_BYTES + length
            if len(self._held) < stop:
                break
            found.append(self._message(memoryview(self._held)[at + HEAD_BYTES : stop]))
            at = stop
        if at:
            del self._held[:at]
        return found

    def _message(self, data: memoryview) -> T:
        with data:
            try:
                message: T = self._decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise FrameError(f"a frame of {len(data)} bytes holds no message that is known here: {error}") from None
        return message
