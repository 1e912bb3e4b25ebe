"""`weft soak`: a short one on every commit, a long one with the long tests, and that it sees what it looks for."""

from __future__ import annotations

import json

import pytest

from tests.cli.running import weft
from weft.soak.client import Answer
from weft.soak.faults import ALL
from weft.soak.run import kinds, slope

FLAT_BYTES = 100_000
"""In 1,000 requests, of front and engine each."""


def soak(*flags: str, timeout: float) -> dict[str, object]:
    done = weft("soak", *flags, "--json", timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict[str, object] = json.loads(done.stdout)
    assert (found["lost"], found["wrong_tokens"], found["leaked_blocks"]) == (0, 0, 0)
    return found


def test_thirty_faults() -> None:
    found = soak("--requests", "150", "--faults", "30", "--seed", "1", timeout=200)
    assert found["requests"] == 150
    faults = found["faults"]
    assert isinstance(faults, dict)
    assert faults.keys() == set(ALL)
    assert all(faults[name] + (name in found["faults_refused"]) for name in ALL)  # type: ignore[operator]
    done = faults["engine"] + faults["socket"] + faults["stall"]
    assert found["engine_restarts"] >= done, "a busy machine may let an engine stand still by itself"  # type: ignore[operator]


@pytest.mark.long
def test_a_thousand_faults() -> None:
    soak("--requests", "10000", "--faults", "1000", "--seed", "2", timeout=7200)


@pytest.mark.long
def test_a_hundred_thousand_requests() -> None:
    found = soak("--requests", "100000", "--faults", "5", "--seed", "3", timeout=14400)
    assert found["rss_slope_bytes_per_1000"] <= FLAT_BYTES  # type: ignore[operator]


def test_wrong_tokens_are_counted() -> None:
    right = Answer({0: "a b c"}, {0: ["a", " b", " c"]}, {0: "length"}, {"completion_tokens": 3})

    def wrong(**changes: object) -> int:
        fields = {"text": right.text, "tokens": right.tokens, "ends": right.ends, "usage": right.usage, **changes}
        return Answer(**fields).wrong(right)  # type: ignore[arg-type]

    assert wrong() == 0
    assert wrong(tokens={0: ["a", " x", " c"]}) == 1
    assert wrong(tokens={0: ["a", " b", " b", " c"]}) == 2, "one doubled, and one shifted"
    assert wrong(tokens={0: ["a"]}) == 2
    assert wrong(text={0: "a b"}) == 1
    assert wrong(ends={0: "stop"}) == 1
    assert wrong(usage={"completion_tokens": 4}) == 1
    assert wrong(text={0: "a b c", 1: "d"}) == 1


def test_the_slope_is_that_of_the_lives_in_it() -> None:
    def line(start: int, stop: int, height: int, rise: int) -> list[tuple[int, int]]:
        return [(x, height + rise * x // 1000) for x in range(start, stop, 100)]

    assert slope([line(0, 10_000, 5 << 20, 0)], 10_000) == 0
    assert slope([line(0, 10_000, 5 << 20, 7000)], 10_000) == 7000
    two = [line(0, 5000, 5 << 20, 7000), line(5000, 10_000, 9 << 20, 7000)]
    assert slope(two, 10_000) == 7000, "another engine's height is no growth"
    warming = [(x, 1000 * x) for x in range(0, 2000, 100)]
    assert slope([[*warming, *((x, 2_000_000) for x in range(2000, 10_000, 100))]], 10_000) == 0
    assert slope([line(9500, 10_000, 0, 10**9)], 10_000) == 0, "half a thousand requests say nothing"


def test_requests_are_of_every_form() -> None:
    bodies = [body for _, body in kinds()]
    assert {route for route, _ in kinds()} == {"/v1/completions", "/v1/chat/completions"}
    for field in ("n", "logprobs", "stop", "frequency_penalty", "top_p"):
        assert any(field in body for body in bodies), field
    assert any(body["stream"] is False for body in bodies)
    assert any(body.get("temperature") == 0.0 for body in bodies)
    assert all("seed" in body for body in bodies)
