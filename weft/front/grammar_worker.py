"""The process that checks grammars.  Run as a script by `grammars.Grammars`; knows techniques, and no vocabulary.

As in the worker for templates, what ends a grammar that takes too long or too much is outside of the program that reads it:
SIGPROF with its default action, RLIMIT_AS, no files, no core dumps.

Frames on stdin and stdout: 4 bytes big-endian length, then JSON.  Request: {part, kind, source}.  Answer: {} where the part
can hold an output to it, or {error, message} with error one of refused and memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this very weft, wherever it was started from

from weft.errors import EngineError
from weft.front.template_worker import serve, shown
from weft.registry import parse
from weft.slots import SLOTS
from weft.types import Grammar


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        parse(request["part"]).build().check(Grammar(request["kind"], request["source"]))
    except EngineError as error:
        return {"error": "refused", "message": shown(str(error))}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except BaseException as error:  # a library's panic is no Exception
        return {"error": "refused", "message": shown(f"the grammar can't be used ({type(error).__name__}: {error})")}
    return {}


if __name__ == "__main__":
    # What has to be imported for the first one is not taken off its time.
    answer({"part": f"constrain={SLOTS['constrain'].asked}", "kind": "regex", "source": "a"})
    serve(answer, memory_bytes=int(sys.argv[1]), seconds=float(sys.argv[2]))
