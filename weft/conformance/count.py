"""What a suite found, as counts, with the first of the samples that went wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weft.errors import ConfigError

MOST_SHOWN = 20
"""Samples that went wrong and are named."""


@dataclass(slots=True)
class Count:
    """total: things asked of weft (schemas, calls, templates).  enforced: those that it takes, and keeps to.  refused: those
    that it says plainly not to do.  wrong_accept: samples let through that are wrong; wrong_reject: right ones turned down.

    wrong: the first of both, in words.
    """

    suite: str
    total: int = 0
    enforced: int = 0
    refused: int = 0
    wrong_accept: int = 0
    wrong_reject: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.total > 0 and not self.wrong_accept and not self.wrong_reject

    def accepted_wrongly(self, sample: str) -> None:
        self.wrong_accept += 1
        self._note(f"accepted, and is wrong: {sample}")

    def rejected_wrongly(self, sample: str) -> None:
        self.wrong_reject += 1
        self._note(f"rejected, and is right: {sample}")

    def _note(self, text: str) -> None:
        if len(self.wrong) < MOST_SHOWN:
            self.wrong.append(text)

    def as_dict(self) -> dict[str, object]:
        """The keys that `--json` prints."""
        return {
            "suite": self.suite,
            "total": self.total,
            "enforced": self.enforced,
            "refused": self.refused,
            "wrong_accept": self.wrong_accept,
            "wrong_reject": self.wrong_reject,
        }


def folder(data: Path, name: str) -> Path:
    """The folder `name` of the data.  Raises ConfigError where it is not there."""
    found = data / name
    if not found.is_dir():
        raise ConfigError(f"there is no folder {found}; say with --data where the suites' data lies")
    return found
