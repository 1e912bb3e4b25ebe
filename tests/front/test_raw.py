"""Bytes that no client library would send, while a good stream goes on beside them."""

from __future__ import annotations

import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.front.conftest import metric, serving
from tests.front.scripted import ScriptedPort, wait_until
from weft.front.server import MAX_HEADER_BYTES
from weft.front.text import ModelText

TEXT = {"model": "weft-tiny", "prompt": "Hi", "max_tokens": 2}
Make = Callable[..., ScriptedPort]


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def head(length: int | str | None, *, path: str = "/v1/completions", extra: str = "") -> bytes:
    said = "" if length is None else f"Content-Length: {length}\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{said}{extra}\r\n".encode()


def talk(url: str, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes, return everything that comes back until the server closes or says no more for a second."""
    with connect(url) as sock:
        sock.settimeout(2)
        got = b""
        try:
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
            while chunk := sock.recv(65536):
                got += chunk
                if got.endswith((b"}", b"[DONE]\n\n")):
                    break
        except (TimeoutError, ConnectionError):
            pass
        return got


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.fixture
def good_stream(url: str) -> Iterator[list[float]]:
    """Streams, one after another, during the test; times of all their events.  Each must be whole, and without a long gap."""
    times: list[float] = []
    failed: list[BaseException] = []
    stop = threading.Event()
    body = {**TEXT, "max_tokens": 200, "stream": True, "temperature": 0, "ignore_eos": True}

    def run() -> None:
        try:
            while not stop.is_set():
                before = len(times)
                with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                    lines = []
                    for line in answer.iter_lines():
                        times.append(time.monotonic())
                        lines.append(line)
                assert lines[-2:] == ["data: [DONE]", ""]
                gaps = [b - a for a, b in itertools.pairwise(times[before:])]
                assert max(gaps) < 2.0
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_until(lambda: len(times) > 3)
    yield times
    stop.set()
    thread.join(60)
    assert not failed


def garbage(rng: random.Random) -> bytes:
    body = json.dumps(TEXT).encode()
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 400))) + b"\r\n\r\n"
    if kind == 1:  # a request with flipped bytes
        whole = bytearray(head(len(body)) + body)
        for _ in range(rng.randrange(1, 6)):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
        return bytes(whole)
    if kind == 2:  # half of one
        whole = bytearray(head(len(body)) + body)
        return bytes(whole[: rng.randrange(1, len(whole))])
    if kind == 3:
        return head(rng.choice(["-5", "abc", "1e3", "99999999999999999999", ""])) + body
    if kind == 4:
        return b"GET / HTTP/9.9\r\n\r\n"
    if kind == 5:
        return head(None, extra="Transfer-Encoding: chunked\r\n") + b"zz\r\n" + body
    if kind == 6:
        return head(2) + b"\x00\xff"
    return b"POST /v1/completions HTTP/1.1\r\n" + b"A: b\r\n" * 50


def test_garbage_beside_a_good_stream(url: str, http: httpx.Client, good_stream: list[float]) -> None:
    rng = random.Random(5)
    before = len(good_stream)
    for _ in range(150):
        with connect(url) as sock:
            sock.settimeout(0.02)
            try:
                sock.sendall(garbage(rng))
                if rng.random() < 0.5:
                    sock.recv(4096)
            except (TimeoutError, ConnectionError):
                pass
    assert http.get("/health").status_code == 200
    assert http.post("/v1/completions", json=TEXT).status_code == 200
    assert len(good_stream) > before


def test_half_a_body_then_silence_holds_nobody_up(url: str, http: httpx.Client) -> None:
    socks = [connect(url) for _ in range(100)]
    try:
        for sock in socks:
            sock.sendall(head(1000) + b'{"prompt": ')
        began = time.monotonic()
        assert http.post("/v1/completions", json=TEXT).status_code == 200
        assert time.monotonic() - began < 5
    finally:
        for sock in socks:
            sock.close()
    assert http.get("/health").status_code == 200


def test_a_body_must_come_in_time(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [5] * 100)
    with serving(port, text, body_timeout_s=0.3) as address:
        answer = talk(address, head(1000) + b'{"prompt": ')
        assert status(answer) == 408
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
    assert port.commands == []


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n", 400),  # TLS to a plain port
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (head("-1") + b"{}", 400),
        (head("2\r\nContent-Length: 3") + b"{}x", 400),
        (head(None, extra="Transfer-Encoding: chunked\r\n") + b"xyz\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * (2 * MAX_HEADER_BYTES) + b"\r\n\r\n", 400),
        (b"GET /" + b"a" * (2 * MAX_HEADER_BYTES) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * MAX_HEADER_BYTES + b"\r\n", 400),
        (head(None) + b"", 400),  # no body at all
    ],
    ids=lambda v: str(v)[:40],
)
def test_broken_requests(url: str, http: httpx.Client, data: bytes, want: int) -> None:
    answer = talk(url, data)
    assert status(answer) == want if answer else want == 400  # a reset before the answer was read is a refusal too
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("target", "host", "want"),
    [
        ("http://localhost/v1/models", "localhost", 200),
        (
            "HTTP://LocalHost:8000/v1/models?a=b",
            "evil.example",
            200,
        ),  # the target's authority counts, and the header does not
        ("https://127.0.0.1/v1/mod%65ls", "localhost", 200),
        ("http://localhost", "localhost", 200),
        ("http://localhost?", "localhost", 200),
        ("http://evil.example/v1/models", "localhost", 403),
        ("http://localhost@evil.example/v1/models", "localhost", 403),
        ("http:///v1/models", "localhost", 403),
        ("http://evil.example/", "localhost", 403),
        ("http://localhost/nothing", "localhost", 404),
        ("ftp://localhost/v1/models", "localhost", 404),
    ],
)
def test_targets_in_absolute_form(url: str, target: str, host: str, want: int) -> None:
    """RFC 9112, 3.2.2: a server must take them, and go by the host in the target instead of the header."""
    assert status(talk(url, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())) == want


def test_an_absolute_target_goes_by_origin_too(url: str) -> None:
    """A page that is the server's own under the header's host is none under the target's."""
    for target, origin, want in (("localhost", "localhost", 200), ("127.0.0.1", "localhost", 403)):
        data = f"GET http://{target}/v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://{origin}\r\n\r\n"
        assert status(talk(url, data.encode())) == want


def chunked(data: bytes = json.dumps(TEXT).encode(), line: bytes = b"") -> bytes:
    """A body of one chunk; line: what follows the size in its line."""
    return b"%x%s\r\n%s\r\n0\r\n\r\n" % (len(data), line, data)


CHUNKS = "Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "data",
    [
        head(3, extra=CHUNKS) + chunked(),
        head(None, extra=f"{CHUNKS}Content-Length: 3\r\n") + chunked(),
        head(3, path="/v1/messages", extra=CHUNKS) + chunked(),
        head(5, path="/", extra=CHUNKS).replace(b"POST", b"GET") + b"0\r\n\r\n",
        head(5, path="/health", extra=CHUNKS).replace(b"POST", b"GET") + b"0\r\n\r\n",
        head("2\r\nContent-Length: 3") + b"{}",
        head("2, 3") + b"{}",
        head("+2") + b"{}",
        head(None, extra="Transfer-Encoding: gzip, chunked\r\n") + chunked(),
        head(None, extra="Transfer-Encoding: chunked, chunked\r\n") + chunked(),
        head(None, extra=CHUNKS * 2) + chunked(),
        head(2, extra="Transfer-Encoding: identity\r\n") + b"{}",
        head(None, extra="Transfer-Encoding: \x0bchunked\r\n") + chunked(),
        head(None, extra="Content-Length : 2\r\n") + b"{}",
        head(None, extra="Content Length: 2\r\n") + b"{}",
        head(2, extra="X: a\rTransfer-Encoding: chunked\r\n") + b"{}",
        head(2).replace(b"\r\n", b"\r\n X: y\r\n", 1) + b"{}",
        head(None, extra=CHUNKS) + chunked().replace(b"\r\n", b"\n"),
        head(None, extra=CHUNKS) + chunked(line=b";x=\n"),
        head(None, extra=CHUNKS) + chunked().replace(b"}\r\n", b"}xx"),
        head(None, extra=CHUNKS) + b"0x" + chunked(),
    ],
)
def test_a_body_of_two_ends_is_no_request_and_what_follows_none_either(url: str, data: bytes) -> None:
    """Whoever stands before the server may see another end, and send somebody else's request behind it (smuggling)."""
    with connect(url) as sock:
        sock.sendall(data + b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        try:
            while chunk := sock.recv(65536):  # until the server has closed
                got += chunk
        except ConnectionResetError:
            pass
    assert status(got) == 400
    assert b"connection: close" in got.lower()
    assert b'"version"' not in got


@pytest.mark.parametrize(
    "data",
    [
        head(None, extra=CHUNKS) + chunked(),
        head(None, extra=CHUNKS) + chunked(line=b";a=b"),
        head(None, extra="Transfer-Encoding:\r\n Chunked\r\n") + chunked(),  # folded (RFC 9112, 5.2): read as one line
        head(None, extra=CHUNKS) + chunked()[:-2] + b"Content-Length: 3\r\n\r\n",  # a trailer is no head
        head("{0}\r\nContent-Length: {0}".format(len(json.dumps(TEXT)))) + json.dumps(TEXT).encode(),
    ],
)
def test_a_body_of_one_end_has_one(url: str, data: bytes) -> None:
    with connect(url) as sock:
        sock.sendall(data + b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while b'{"version":' not in got:
            got += sock.recv(65536)
    assert status(got) == 200
    assert got.count(b"HTTP/1.1 200 OK") == 2


def test_bodies_are_limited_before_they_are_held(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [5] * 100)
    with serving(port, text, max_body=10_000) as address:
        fits = {"prompt": "a" * 200, "max_tokens": 2, "user": "x" * 9000}
        assert httpx.post(f"{address}/v1/completions", json=fits).status_code == 200
        for size in (10_001, 35_000):
            answer = httpx.post(
                f"{address}/v1/completions", content=b" " * size, headers={"content-type": "application/json"}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        # Said to be large, and the client waits for leave to send it: refused at once.
        answer = talk(address, head(10**12, extra="Expect: 100-continue\r\n"))
        assert status(answer) == 413
        # Chunked, so nothing is said beforehand.
        chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
        answer = talk(address, head(None, extra="Transfer-Encoding: chunked\r\n") + chunk * 5 + b"0\r\n\r\n")
        assert status(answer) == 413
        # Endless: answered once four times the limit has come, though the body has not ended.
        answer = talk(address, head(None, extra="Transfer-Encoding: chunked\r\n") + chunk * 10)
        assert status(answer) == 413
    assert len(port.commands) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_cancels(scripted: Make, text: ModelText, path: str, stream: bool) -> None:
    port = scripted(lambda spec, index: [5] * 10, interval_s=0.005)  # ten tokens, then nothing for ever
    with serving(port, text) as address:
        sent: dict[str, Any] = {"max_tokens": 400, "stream": stream}
        sent |= (
            {"prompt": "Hi"} if path.endswith("v1/completions") else {"messages": [{"role": "user", "content": "Hi"}]}
        )
        body = json.dumps(sent).encode()
        with connect(address) as sock:
            sock.sendall(head(len(body), path=path) + body)
            if stream:
                assert status(sock.recv(4096)) == 200
            assert wait_until(lambda: port.stats.running == 1)
        assert wait_until(lambda: port.stats.running == 0)
        assert port.cancelled() == [1]


def test_two_requests_on_one_connection(url: str) -> None:
    body = json.dumps(TEXT).encode()
    with connect(url) as sock:
        for _ in range(2):
            sock.sendall(head(len(body)) + body)
            got = b""
            while not got.endswith(b"}"):
                got += sock.recv(65536)
            assert status(got) == 200
        sock.sendall((head(len(body)) + body) * 2)  # pipelined
        got = b""
        while got.count(b'"finish_reason"') < 2:
            got += sock.recv(65536)


def test_after_all_that_nothing_is_held(http: httpx.Client) -> None:
    assert wait_until(lambda: metric(http, "weft:requests_running") == 0, 30)
    assert wait_until(lambda: metric(http, "weft:kv_blocks_referenced") == 0)
