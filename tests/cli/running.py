"""The real command in a process of its own, for the tests of this folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "weft"]
READY = re.compile(r"weft ready (http://[\w.\[\]:]+:\d+)\n")


def weft(*args: str, stdin: str = "", timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `weft ARGS` to its end."""
    return subprocess.run(
        [*COMMAND, *args],
        cwd=ROOT,
        env=_environment(environment),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Serving:
    """`weft serve ARGS` in the background; stdout and stderr go to files in `folder`."""

    def __init__(self, folder: Path, *args: str, **environment: str) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        environment.setdefault("WEFT_HOME", str(folder))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", *args], cwd=ROOT, env=_environment(environment), stdout=out, stderr=err, text=True
            )

    def wait_for(self, what: str, path: Path, timeout: float = 90) -> None:
        """Until the regular expression `what` is found in the file."""
        until = time.monotonic() + timeout
        while not re.search(what, path.read_text()):
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.err.read_text()}"
            assert time.monotonic() < until, f"no {what!r} within {timeout} s: {self.err.read_text()}"
            time.sleep(0.05)

    def url(self) -> str:
        """The address, once it is ready."""
        self.wait_for(READY.pattern, self.out)
        found = READY.search(self.out.read_text())
        assert found is not None
        return found[1]

    def end(self, signal: int, timeout: float = 30) -> int:
        self.process.send_signal(signal)
        return self.process.wait(timeout)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def _environment(more: dict[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WEFT_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}
