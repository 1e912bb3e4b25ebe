"""What is let in: a queue of bounded length, and what one key may ask in a minute."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import httpx
import pytest

from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort
from weft.front.admission import MOST_KEYS, PACE_OF, Admission, Bounds
from weft.front.generation import Limited, Refused
from weft.front.text import ModelText

Make = Callable[..., ScriptedPort]


def test_the_queue_counts_requests_and_tokens() -> None:
    queue = Admission(Bounds(max_queue=3, max_queued_tokens=100))
    queue.enter("", [40, 40], 0.0)
    with pytest.raises(Refused, match="2 requests with 80 prompt tokens") as refused:
        queue.enter("", [21], 0.0)
    assert refused.value.code == "overloaded"
    queue.enter("", [20], 0.0)
    with pytest.raises(Refused):
        queue.enter("", [0], 0.0)
    queue.leave(40, 0.0)
    queue.leave(20, 0.0)
    assert (queue.requests, queue.tokens) == (1, 40)
    queue.enter("", [60], 0.0)


def retry_s(queue: Admission, lengths: list[int], now: float) -> float:
    with pytest.raises(Refused) as refused:
        queue.enter("", lengths, now)
    return refused.value.retry_s


def test_who_is_turned_away_is_told_when_there_will_be_room() -> None:
    """By hand: at the pace of those that had their turn, since the queue began."""
    queue = Admission(Bounds(max_queue=8, max_queued_tokens=1000))
    queue.enter("", [10] * 8, 100.0)
    assert retry_s(queue, [1], 100.0) == 1.0, "nobody has had a turn: nothing is known"
    for now in (104.0, 108.0):
        queue.leave(10, now)  # one in 4 s
    queue.enter("", [10, 10], 108.0)
    assert retry_s(queue, [1], 108.0) == 4.0
    assert retry_s(queue, [1] * 3, 108.0) == 12.0
    assert retry_s(queue, [1], 120.0) == 10.0, "two in 20 s: that nobody leaves counts, too"
    assert retry_s(queue, [1] * 8, 120.0) == 60.0, "80 s, and clients do not wait for longer than 60"
    assert retry_s(queue, [1], 108.0001) < 4.01
    for _ in range(8):
        queue.leave(10, 120.0)
    queue.enter("", [10] * 8, 5000.0)
    assert retry_s(queue, [1], 5001.0) == 1.0, "the hour in which nobody asked says nothing of the pace"


def test_room_for_tokens_comes_with_tokens() -> None:
    queue = Admission(Bounds(max_queue=100, max_queued_tokens=1000))
    queue.enter("", [100] * 10, 0.0)
    queue.leave(100, 2.0)  # 50 tokens/s
    assert retry_s(queue, [500], 2.0) == 8.0, "400 tokens too many"
    assert retry_s(queue, [5000], 2.0) == 18.0, "all 900 that wait; what waits beside nothing is let in"
    for i in range(PACE_OF):  # what was slow long ago is forgotten
        queue.leave(0, 2.0 + i / 1000)
        queue.requests += 1
    queue.leave(100, 2.1)
    assert retry_s(queue, [800], 2.1) == 1.0, "600 too many, and 100 left in 0.1 s"


def test_what_waits_beside_nothing_is_let_in() -> None:
    """Else a call with more prompts than the queue is long could never be made."""
    queue = Admission(Bounds(max_queue=3, max_queued_tokens=100))
    queue.enter("", [200] * 5, 0.0)
    with pytest.raises(Refused):
        queue.enter("", [1], 0.0)


def test_a_key_has_its_minute() -> None:
    rate = Admission(Bounds(requests_per_minute=2))
    rate.enter("a", [1], 0.0)
    rate.enter("a", [1], 0.0)
    with pytest.raises(Limited, match="2 requests in a minute") as limited:
        rate.enter("a", [1], 0.0)
    assert limited.value.retry_s == 30.0, "half a minute fills the bucket by one"
    rate.enter("b", [1], 0.0)
    with pytest.raises(Limited):
        rate.enter("a", [1], 29.0)
    rate.enter("a", [1], 30.1)
    with pytest.raises(Limited):
        rate.enter("a", [1], 31.0)
    rate.enter("a", [1], 500.0)
    rate.enter("a", [1], 500.0)
    with pytest.raises(Limited):
        rate.enter("a", [1], 500.0)


def test_answers_are_paid_for_when_they_are_known() -> None:
    rate = Admission(Bounds(tokens_per_minute=60))
    rate.enter("a", [50], 0.0)
    rate.use("a", 40, 10.0)  # 10 left, 10 more came, 40 used: 20 in debt
    with pytest.raises(Limited) as limited:
        rate.enter("a", [1], 10.0)
    assert limited.value.retry_s == pytest.approx(21.0)
    assert rate.requests == 1, "who is turned away does not wait"
    rate.enter("a", [1], 31.1)


def test_keys_that_ask_nothing_are_forgotten() -> None:
    rate = Admission(Bounds(requests_per_minute=1))
    for i in range(MOST_KEYS + 50):
        rate.enter(str(i), [1], 0.0)
        rate.leave(1, 0.0)
    assert len(rate._buckets) == MOST_KEYS


def ask(http: httpx.Client, key: str = "one", **more: object) -> httpx.Response:
    body = {"prompt": "Hi", "max_tokens": 3, **more}
    return http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})


def test_over_http_a_full_queue_is_a_503_until_there_is_room(scripted: Make, text: ModelText) -> None:
    """Room comes when somebody gets a token, ends, or leaves."""
    port = scripted(lambda spec, index: [] if spec.sampling.max_tokens == 7 else [300, 301, 302])
    body = b'{"prompt": ["Hi", "Ho"], "max_tokens": 7}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with serving(port, text, bounds=Bounds(max_queue=2)) as url, httpx.Client(base_url=url, timeout=30) as http:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as waiting:
            waiting.sendall(head.encode() + body)
            while len(port.commands) < 2:
                time.sleep(0.001)
            refused = ask(http)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
        end = time.monotonic() + 20
        while ask(http).status_code == 503:
            assert time.monotonic() < end, "who has left is still counted"
        assert [ask(http).status_code for _ in range(6)] == [200] * 6, "who has ended waits no more"


def test_over_http_a_rate_is_a_429_for_that_key_alone(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [300, 301, 302])
    bounds = Bounds(requests_per_minute=2, tokens_per_minute=1000)
    with (
        serving(port, text, bounds=bounds, api_key=["one", "two"]) as url,
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        assert [ask(http).status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(http)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert ask(http, key="two").status_code == 200
        assert http.get("/v1/models", headers={"x-api-key": "one"}).status_code == 200
    bounds = Bounds(tokens_per_minute=30)
    with (
        serving(port, text, bounds=bounds, api_key=["one", "two"]) as url,
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        assert ask(http, prompt=[300] * 28).status_code == 200
        assert ask(http).status_code == 429, "28 and 3 of 30"
        assert ask(http, key="two", model=MODEL).status_code == 200


def test_over_http_without_keys_a_rate_is_that_of_an_address(scripted: Make, text: ModelText) -> None:
    """A key that nobody asked for gives no bucket of its own, or whoever makes keys up has as many as he likes."""
    port = scripted(lambda spec, index: [300, 301, 302])
    with serving(port, text, bounds=Bounds(requests_per_minute=2)) as url, httpx.Client(base_url=url) as http:
        assert [ask(http, key=str(i)).status_code for i in range(3)] == [200, 200, 429]
