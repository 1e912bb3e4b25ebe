"""Memory of the front that comes at once and does not go again: what its largest moment takes it keeps, and so that is small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

UPLOAD = """
import asyncio, re, sys
from pathlib import Path
from weft.front.store import open_store

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

async def upload(store, id, data):
    it = await store.files.begin("", id, "a", "batch", None)
    for at in range(0, len(data), 1 << 16):  # as a connection gives it
        await it.write(data[at : at + (1 << 16)])
    await it.finish()
    await it.drop()

async def main():
    store = open_store(Path(sys.argv[1]))
    data = bytes(1 << 20)
    await upload(store, "first", data[:1000])
    before = resident()
    for i in range(8):
        await upload(store, str(i), data)
    print(resident() - before)
    store.close()

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's memory")
def test_uploads_of_a_megabyte(tmp_path: Path) -> None:
    """They took 3 MB for good, whenever the first of them came: in pieces of their own size, and SQLite's pages besides.

    At most 0.37 MB are left, after 8 of them as after 64, and 0.07 where Python compiled weft just before and has room from it.
    """
    command = [sys.executable, "-c", UPLOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 19
