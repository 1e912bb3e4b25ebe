"""Row 20: only the API's port listens, on the address that was asked for; readers that do not read stall nobody."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.security.conftest import KEY, STREAM, Attacked, listening, tree


def places(inodes: set[str]) -> set[tuple[str, int]]:
    """(address in hexadecimal as the kernel has it, port) of listening sockets."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[9] in inodes:
                address, _, port = cells[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def udp(pids: list[int]) -> set[str]:
    own = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                own.add(str(handle.readlink()))
            except OSError:
                continue
    found = set()
    for table in ("udp", "udp6", "raw", "packet"):
        path = Path(f"/proc/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            found |= {cell for cell in line.split() if f"socket:[{cell}]" in own}
    return found


def test_one_port_on_the_loopback(server: Attacked) -> None:
    pids = tree(server.process.process.pid)
    assert places(listening(pids)) == {("0100007F", urlsplit(server.url).port)}
    assert not udp(pids)


def held(server: Attacked, seconds: float) -> None:
    """Twenty streams that nobody reads, each with a receive buffer that is soon full."""
    place = urlsplit(server.url)
    body = json.dumps({**STREAM, "max_tokens": 600, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nx-api-key: {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((place.hostname, place.port))
            sock.sendall(head.encode() + body)
        time.sleep(seconds)


def test_readers_that_do_not_read(server: Attacked) -> None:
    """Beside the one that is watched."""
    with server.attacked():
        held(server, 4.0)
