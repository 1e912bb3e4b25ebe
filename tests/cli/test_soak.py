"""`weft soak`: a short one on every commit, a long one with the long tests, and that it sees what it looks for."""

from __future__ import annotations

import json
import math

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
    done = faults["engine"] + faults["socket"]
    assert found["engine_restarts"] >= done, "one that stands still without work is left alone"  # type: ignore[operator]


@pytest.mark.long
def test_a_thousand_faults() -> None:
    found = soak("--requests", "10000", "--faults", "1000", "--seed", "2", timeout=7200)
    assert found["front_rss_slope_bytes_per_1000"] <= FLAT_BYTES  # type: ignore[operator]


@pytest.mark.long
def test_a_hundred_thousand_requests() -> None:
    found = soak("--requests", "100000", "--faults", "6", "--seed", "3", timeout=14400)
    for process in ("front", "engine"):
        assert found[f"{process}_rss_slope_bytes_per_1000"] <= FLAT_BYTES, process  # type: ignore[operator]


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


def life(start: int, stop: int, height: int, rise: int, warms: int = 0) -> list[tuple[int, int]]:
    """Memory that grows by `rise` in 1,000 requests, after a warm-up by `warms` that is over by and by (exp(-x / 300))."""
    return [
        (x, height + rise * (x - start) // 1000 + round(warms * (1 - math.exp((start - x) / 300))))
        for x in range(start, stop, 100)
    ]


@pytest.mark.parametrize("rise", [0, 7000, 100_000, -50_000])
def test_the_slope_is_that_of_the_lives_in_it(rise: int) -> None:
    assert slope([life(0, 10_000, 5 << 20, rise)]) == rise
    two = [life(0, 5000, 5 << 20, rise), life(5000, 10_000, 9 << 20, rise)]
    assert slope(two) == pytest.approx(rise, abs=1), "another engine's height is no growth"


@pytest.mark.parametrize("rise", [0, 20_000, 150_000])
def test_every_life_warms_up_and_that_is_no_growth(rise: int) -> None:
    lives = [
        life(at, at + length, 200 << 20, rise, 4 << 20) for at, length in ((0, 9000), (9000, 5000), (14_000, 26_000))
    ]
    found = slope(lives)
    assert found is not None
    assert abs(found - rise) < 2000
    short = [life(at, at + 400, 200 << 20, rise, 4 << 20) for at in range(0, 40_000, 400)]
    assert slope([*lives, *short]) == found, "lives that never are warm say nothing"
    assert slope(short) is None
    assert slope([life(9500, 10_000, 0, 10**9)]) is None, "half a thousand requests say nothing"
    noisy = [[(x, y + 65_536 * (x // 100 % 3)) for x, y in one] for one in lives]
    assert slope(noisy) == pytest.approx(rise, abs=6000)


def test_a_long_life_counts_for_more_than_short_ones() -> None:
    found = slope([life(0, 50_000, 0, 1000), *(life(at, at + 2500, 0, 50_000) for at in (50_000, 52_500))])
    assert found == pytest.approx(1000, abs=20)


def test_requests_are_of_every_form() -> None:
    bodies = [body for _, body in kinds()]
    assert {route for route, _ in kinds()} == {"/v1/completions", "/v1/chat/completions"}
    for field in ("n", "logprobs", "stop", "frequency_penalty", "top_p"):
        assert any(field in body for body in bodies), field
    assert any(body["stream"] is False for body in bodies)
    assert any(body.get("temperature") == 0.0 for body in bodies)
    assert all("seed" in body for body in bodies)
