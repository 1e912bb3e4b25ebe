"""Streams over scripted engines: characters in pieces, long texts beside them, slow readers."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.front.conftest import serving
from tests.front.scripted import ScriptedPort, wait_until
from weft.front.port import EngineInfo
from weft.front.text import ModelText

Make = Callable[..., ScriptedPort]
PIECES = "naïve 🙂🙃 café 你好"


def events(answer: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


@pytest.mark.parametrize("group", [1, 3])
def test_characters_in_pieces_never_show_and_their_logprobs_do(scripted: Make, text: ModelText, group: int) -> None:
    ids = text.tokenizer.encode(PIECES, add_special=False)
    parts = [i for i in ids if b"\xf0" in text.tokenizer.token_bytes(i) or len(text.tokenizer.token_bytes(i)) == 1]
    assert any(not _whole(text.tokenizer.token_bytes(i)) for i in parts), "some tokens must be parts of characters"
    port = scripted(lambda spec, index: ids, group=group)
    with serving(port, text) as url, httpx.Client(base_url=url) as http:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": len(ids),
            "stream": True,
            "logprobs": True,
        }
        choices = events(http.post("/v1/chat/completions", json=body))
        deltas = [choice["delta"].get("content", "") for choice in choices]
        assert "".join(deltas) == PIECES
        assert not any("\ufffd" in delta for delta in deltas)
        told = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert [bytes(entry["bytes"]) for entry in told] == [text.tokenizer.token_bytes(i) for i in ids]
        assert {entry["logprob"] for entry in told} == {-1.0, -9999.0}, "minus infinity is written as -9999"
        bodies = {"prompt": "x", "max_tokens": len(ids), "logprobs": 1}
        whole = http.post("/v1/completions", json=bodies).json()["choices"][0]
        assert whole["text"] == PIECES
        assert any(token.startswith("bytes:\\x") for token in whole["logprobs"]["tokens"])
        assert len(whole["logprobs"]["tokens"]) == len(ids)


def _whole(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_streams_do_not_wait_for_long_texts(text: ModelText, info: EngineInfo) -> None:
    """While another client's long prompt is tokenized, a running stream goes on.

    A server that waits shows a gap of nearly the long request's own length each time; one that does not may show one on a machine
    that is busy with other things, but not three times.
    """
    ids = text.tokenizer.encode("Once upon a time there was a dog. ", add_special=False) * 5000
    port = ScriptedPort(lambda spec, index: ids, replace(info, max_model_len=1 << 20), interval_s=0.01)
    with serving(port, text) as url:
        shares = [_longest_gap(url)]
        while shares[-1] > 0.5 and len(shares) < 3:
            shares.append(_longest_gap(url))
    port.close()
    assert min(shares) <= 0.5, shares


def _longest_gap(url: str) -> float:
    """The longest time without a line of a stream while a long text is tokenized, as a share of that request's time."""
    ends: list[float] = []

    def long() -> None:
        answer = httpx.post(f"{url}/tokenize", json={"prompt": "naïve café words, many of them; " * 60_000}, timeout=60)
        ends.append(time.monotonic())
        assert answer.json()["count"] > 100_000

    other = threading.Thread(target=long)
    body = {"prompt": "Hi", "max_tokens": 40_000, "stream": True}
    times: list[float] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        for number, _ in enumerate(stream.iter_lines()):
            if number >= 20:
                times.append(time.monotonic())
            if number == 20:
                other.start()
            if ends and times[-1] > ends[0]:
                break
    other.join()
    assert ends
    gaps = [min(after, ends[0]) - before for before, after in itertools.pairwise(times)]
    return max(gaps) / (ends[0] - times[0])


def test_a_reader_that_stops_reading_costs_a_bounded_amount(scripted: Make, text: ModelText) -> None:
    """The server stops writing to it, keeps one merged delta, and goes on serving others."""
    ids = text.tokenizer.encode("word " * 3000, add_special=False)[:3000]
    port = scripted(lambda spec, index: ids, interval_s=0.0)
    with serving(port, text) as url:
        parts = urlsplit(url)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((parts.hostname, parts.port))
            body = json.dumps({"prompt": "Hi", "max_tokens": 3000, "n": 8, "stream": True, "logprobs": 5}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            sock.sendall(head % len(body) + body)
            assert wait_until(lambda: bool(port.commands))  # they may have run before anybody looks
            assert wait_until(lambda: port.stats.running == 0, 60)
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).status_code == 200
            sock.settimeout(20)
            got = b""
            while b"[DONE]" not in got[-200:]:
                chunk = sock.recv(1 << 16)
                assert chunk
                got += chunk
    assert got.count(b'"finish_reason":"length"') == 8
    assert got.count(b'"finish_reason":null') < 0.9 * 8 * 3000, "what was not read was merged"
