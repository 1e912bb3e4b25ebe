"""The errors that weft raises.

    EngineError
      ConfigError         a flag, recipe or checkpoint that cannot be used: change it and start again
        ComposeError      techniques that do not go together; carries the reasons
      RequestError        one request is wrong: the client changes it and asks again (HTTP 4xx)
      CapacityError       the request is fine but cannot be held, now or ever, on this machine
      TransferError       KV or weights could not be moved or failed their checksum
      InvariantError      weft's own bookkeeping is broken: a bug, please report it

Every text says what to change.  `assert` is for our own bugs only.
"""

from __future__ import annotations

from collections.abc import Sequence


class EngineError(Exception):
    """Root of everything that weft raises on purpose."""


class ConfigError(EngineError):
    """A flag, recipe, technique or checkpoint cannot be used."""


class ComposeError(ConfigError):
    """A stack of techniques is refused.

    reasons: one sentence each, naming the parts, the missing trait and what would give it.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))


class RequestError(EngineError):
    """One request is wrong; the engine and every other request go on.

    param: the request field to change, or None.  code: a short machine-readable word (OpenAI's where one exists).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CapacityError(EngineError):
    """The machine cannot hold what was asked for; the text names the numbers in bytes, blocks or tokens."""


class TransferError(EngineError):
    """A block or a tensor could not be moved, or arrived different."""


class InvariantError(EngineError):
    """weft's own accounting is inconsistent."""
