"""What the page about two engines says follows from its figures, and is said only where they are clear."""

from __future__ import annotations

import pytest

from bench.roles import BASE, FIGURES, LOADS, SERVERS, cases, page, verdict


@pytest.mark.parametrize(
    ("ratios", "more", "said"),
    [
        ((1.2, 1.1, 1.3), True, "better"), ((1.2, 1.1, 1.3), False, "worse"), ((0.8, 0.7, 0.9), False, "better"),
        ((1.2, 0.9, 1.3), True, "no clear difference"), ((1.03, 1.01, 1.04), True, "no clear difference"),
    ],
)  # fmt: skip
def test_a_difference_is_told_where_all_rounds_show_it(
    ratios: tuple[float, float, float], more: bool, said: str
) -> None:
    middle, least, most = ratios
    assert verdict({"median": middle, "least": least, "most": most}, more_is_better=more) == said


def test_the_page_has_every_server_and_ratios_within_rounds() -> None:
    def record(scale: float) -> dict[str, float]:
        return dict.fromkeys(FIGURES, scale)

    # The machine is three times as slow in the second round: ratios within rounds do not see that.
    found = {
        load: {s: [record(2.0 if s != BASE else 1.0), record(6.0 if s != BASE else 3.0)] for s in SERVERS}
        for load in LOADS
    }
    told = cases(found)
    assert len(told) == len(LOADS) * len(SERVERS)
    for case in told:
        ratio = case["against_one"]["ttft_p50"]
        assert (ratio["least"], ratio["most"]) == ((1, 1) if case["server"] == BASE else (2, 2))
    text = page({"machine": {"cpu": "x", "cores": 2}, "rounds": 2, "others": 0.1, "cases": told})
    for name, flags in SERVERS.items():
        assert f"| {name} (`{' '.join(flags)}`)" in text
    assert "two replicas: tokens/s better, TTFT p50 worse" in text
