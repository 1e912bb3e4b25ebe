"""Row 8: a stream of schemas that are all different writes nothing to the disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.security.conftest import Attacked, tree

MANY = 200


def written(server: Attacked) -> set[str]:
    """Files below the server's folder and the one for temporary things, and open ones that are not sockets or libraries."""
    places = [server.folder.parent, Path(tempfile.gettempdir())]
    found = {str(path) for place in places for path in place.glob("*")}
    found |= {str(path) for path in server.folder.rglob("*")}
    for pid in tree(server.process.process.pid):
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(handle)
            except OSError:
                continue
            if target.startswith("/") and not target.startswith(("/dev", "/proc", "/memfd")):
                found.add(target)
    return found


def test_unique_schemas(server: Attacked) -> None:
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "structured_outputs": {"regex": "[ab]"}})
    before = written(server)
    with server.attacked():
        for number in range(MANY):
            schema = {"type": "object", "properties": {f"p{number}": {"enum": [number, f"v{number}"]}}}
            body = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"json": schema}}
            assert server.post("/v1/completions", body).status_code == 200
    new = {path for path in written(server) - before if "weft" in path or "guidance" in path or "grammar" in path}
    assert not new
