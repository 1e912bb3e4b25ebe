"""Attacks by a file: on a server that is to begin with it, and on one that runs and meets it when an engine is started again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.cli.running import weft
from tests.security.conftest import Attacked, parents


def refused(folder: Path, *models: str) -> str:
    """`weft serve MODELS` ends with status 2, one line, and nothing that was ready.  The line."""
    done = weft("serve", *models, "--port", "0", "--data-dir", str(folder / "data"), WEFT_HOME=str(folder))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def fails_alone(server: Attacked, name: str, words: str) -> None:
    """The engine of a model dies, and its file has become what it can't be read from: the other model goes on.

    The engine and the process that makes it are gone for good; the log says why, in `words`.
    """

    def state() -> dict[str, object]:
        found: dict[str, object] = server.http.get("/health", params={"model": name}).json()
        return found

    engine = state()["engine_pid"]
    assert isinstance(engine, int)
    nursery, before = parents()[engine], len(server.process.err.read_text())
    with server.attacked(engine, nursery):
        os.kill(engine, signal.SIGKILL)
        until = time.monotonic() + 60
        while (answer := _ask(server, name))["error"]["code"] != "engine_stopped":
            assert time.monotonic() < until, answer
            time.sleep(0.05)
        assert state()["status"] == "stalled"
    log = server.process.err.read_text()[before:]
    assert "cannot be started again" in log
    assert words in log


def _ask(server: Attacked, name: str) -> dict[str, dict[str, str]]:
    """What a request to the model is told; it may be one that waits for an engine."""
    found: dict[str, dict[str, str]] = server.post("/v1/completions", {"model": name, "prompt": "ab"}).json()
    return found
