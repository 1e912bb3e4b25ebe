"""Row 19: nothing anywhere reads a pickle, and the sockets between the processes are this user's alone and speak msgpack.

Who reaches the socket all the same and sends a pickle, or garbage, is hung up on, and the server lives.
"""

from __future__ import annotations

import ast
import os
import pickle
import socket
import stat
from pathlib import Path

import pytest

from tests.security.conftest import Attacked
from tests.test_imports import PICKLES, Module, imports, modules, nothing_executes_data, parse

ROOT = Path(__file__).resolve().parents[2]


class Trap:
    """Would leave a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (self.mark, os.O_CREAT)


def test_the_tree_has_none() -> None:
    found = list(modules())
    for folder in ("tools", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.append(parse(f"{folder}.{path.stem}", path.read_text()))
    assert len(found) > 150
    assert [c for module in found for c in nothing_executes_data(module)] == []
    assert [i.name for module in found for i in imports(module) if i.name.split(".")[0] in PICKLES] == []


@pytest.mark.parametrize(
    "source", ["import cloudpickle", "from torch import load", "yaml.load(x)", "np.load(x, allow_pickle=True)"]
)
def test_the_gate_bites(source: str) -> None:
    assert nothing_executes_data(Module("weft.front.x", ast.parse(source)))


def sockets(pids: list[int]) -> list[Path]:
    """Paths of the unix sockets on which one of the processes listens."""
    own: set[str] = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(handle)
            except OSError:
                continue
            if target.startswith("socket:["):
                own.add(target[8:-1])
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [Path(cells[7]) for cells in lines if len(cells) > 7 and cells[6] in own and cells[3] == "00010000"]


def test_a_stranger_on_the_socket(server: Attacked, tmp_path: Path) -> None:
    (path,) = sockets(server.pids)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    mark = tmp_path / "mark"
    trap = pickle.dumps(Trap(mark))
    frames = [
        trap,
        len(trap).to_bytes(4, "big") + trap,
        len(trap).to_bytes(4, "little") + trap,
        b"\xff" * 64,
        b"",
        b"\x00" * 3,
    ]
    with server.attacked():
        for frame in frames:
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(5)
                stranger.connect(str(path))
                stranger.sendall(frame)
                stranger.shutdown(socket.SHUT_WR)
                try:
                    assert stranger.recv(64) == b""
                except ConnectionResetError:
                    pass
        assert not mark.exists()
        assert server.http.get("/health").json()["engine_restarts"] == 0
