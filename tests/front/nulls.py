"""A nursery whose engines have no model (`exec.null`): processes as real as those with one, and there at once.

    python -m tests.front.nulls FOLDER SOCKET        in a nursery's place
    python -m tests.front.nulls --fd N               one engine, on a socket that it has inherited

What `Start.name` asks for: "good"; "config" and "capacity" cannot be built; "once" only while there is no file `once` in its
folder, which it makes; of a request whose prompt begins with 13 "raise" breaks in a step, "kill" ends its process, "hang" stands
still; "stick" gives it no rows from its second token on until it is sent again, "stuck" never gives it any.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from msgspec import structs

from weft.cli import _engine
from weft.config import Limits
from weft.core.engine import Engine
from weft.errors import CapacityError, ConfigError
from weft.exec.null import NullExecutor
from weft.exec.thread import EngineThread
from weft.front.port import EngineInfo
from weft.front.wire import Start
from weft.types import GroupKind, GroupSpec, Plan, StepResult, Work, WorkResult

GROUPS = [GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=16)]
VOCAB = 32
BLOCKS = 1 << 15
DEADLY = 13


class Breaking(NullExecutor):
    how = ""
    first: int | None = None
    """The first sequence whose prompt is deadly."""

    def execute(self, plan: Plan) -> StepResult:
        result = super().execute(plan)
        if self.how in ("stick", "stuck"):
            works = tuple(
                WorkResult(rows=0) if self.stands_still(w) else done
                for w, done in zip(plan.works, result.works, strict=True)
            )
            return structs.replace(result, works=works)
        if any(self.mirror.sequences[w.request].tokens[0] == DEADLY for w in plan.works):
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(600)
            if self.how == "raise":
                raise RuntimeError("it broke")
        return result

    def stands_still(self, work: Work) -> bool:
        if self.mirror.sequences[work.request].tokens[0] != DEADLY:
            return False
        if self.first is None:
            self.first = work.request
        return self.how == "stuck" or (work.request == self.first and work.output >= 2)


def built(start: Start) -> EngineThread:
    if start.name == "config":
        raise ConfigError("write it differently")
    if start.name == "capacity":
        raise CapacityError("it does not fit")
    once = Path(start.folder) / "once"
    if start.name == "once":
        if once.exists():
            raise CapacityError(f"it fitted once into {start.folder}")
        once.touch()
    limits = Limits(max_model_len=1 << 18, max_num_seqs=16, max_rows=64, max_samples=32)
    executor = Breaking(GROUPS, vocab=VOCAB)
    executor.how = start.name
    info = EngineInfo(
        model_id=start.name, vocab_size=VOCAB, max_model_len=1 << 18, kv_blocks=BLOCKS, block_tokens=16, max_num_seqs=16
    )
    return EngineThread(Engine(GROUPS, BLOCKS, limits, vocab=VOCAB), executor, info, foretell=True, idle_check=False)


if __name__ == "__main__":
    _engine._load = lambda: None
    _engine._built = built
    if sys.argv[1] == "--fd":
        sys.exit(_engine.serve(socket.socket(fileno=int(sys.argv[2]))))
    _engine.main(*sys.argv[1:])
