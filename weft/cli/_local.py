"""A model in this process for `weft generate` and `weft chat`."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from weft.cli._flags import EngineFlags
from weft.cli._terminal import stderr

if TYPE_CHECKING:
    from weft.llm import LLM


def load(model: str | None, flags: EngineFlags) -> LLM:
    """Load MODEL under the user's flags, with a note on a terminal.  Raises ConfigError and CapacityError."""
    note = (
        stderr().status(f"loading {model or 'the bundled model'}") if sys.stderr.isatty() else contextlib.nullcontext()
    )
    with note:
        from weft.llm import LLM

        # The hub's own progress bars and the note would write over each other.
        return LLM(model, progress=False, **flags.options())
