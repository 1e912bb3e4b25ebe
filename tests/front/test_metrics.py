"""The metrics page against a strict reading of the exposition format, and the sums in it."""

from __future__ import annotations

import re

import pytest

from weft.front.metrics import COUNTERS, GAUGES, Histogram, Metrics, page
from weft.types import EngineStats

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="[^"\\\n]*",?)*)\})? (\S+)')


def parse(page: str) -> dict[str, dict[str, float]]:
    """{sample name: {labels: value}}.  Raises AssertionError for anything that the format forbids."""
    assert page.endswith("\n")
    samples: dict[str, dict[str, float]] = {}
    family = kind = ""
    closed: set[str] = set()
    for line in page.splitlines():
        if line.startswith("# HELP "):
            closed.add(family)
            family, kind = line.split(" ", 3)[2], ""
            assert family not in closed, f"{family} comes twice"
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family
            assert kind in ("counter", "gauge", "histogram")
            assert kind != "counter" or name.endswith("_total")
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.group(1), match.group(2) or "", float(match.group(3))
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert name in {family + suffix for suffix in suffixes}, line
            assert labels not in samples.setdefault(name, {})
            samples[name][labels] = value
    return samples


def test_page_is_in_the_exposition_format() -> None:
    metrics = Metrics()
    stats = EngineStats(
        running=3, waiting=2, kv_blocks_total=100, kv_blocks_referenced=7, kv_blocks_cached=11,
        generation_tokens=1234, prompt_tokens=99, prefix_hit_tokens=55, preemptions=4, host_s=0.00025,
    )  # fmt: skip
    metrics.end("stop")
    samples = parse(metrics.render(stats).decode())
    want = {
        "weft:requests_running": 3, "weft:requests_waiting": 2, "weft:kv_blocks_total": 100,
        "weft:kv_blocks_referenced": 7, "weft:kv_blocks_cached": 11, "weft:generation_tokens_total": 1234,
        "weft:prompt_tokens_total": 99, "weft:prefix_hit_tokens_total": 55, "weft:preemptions_total": 4,
        "weft:step_host_seconds": 0.00025,
    }  # fmt: skip
    assert {name: samples[name][""] for name in want} == want
    assert samples["weft:requests_total"]['finish_reason="stop"'] == 1
    assert samples["weft:requests_total"]['finish_reason="length"'] == 0
    for name in ("time_to_first_token", "inter_token_latency", "time_per_output_token", "e2e_request_latency"):
        assert samples[f"weft:{name}_seconds_count"][""] == 0


def test_several_models_have_a_label_each() -> None:
    """A family comes once, with the samples of all, and a name may hold what would end it."""
    first, second = Metrics(), Metrics()
    first.end("stop")
    second.ttft.observe(0.003, times=4)
    told = page([("a", first, EngineStats(running=3, acts={"kv.x.y": 2})), ('b\\"\n', second, EngineStats(running=5))])
    lines = told.decode().splitlines()
    heads = [line for line in lines if line.startswith("# TYPE")]
    assert (
        len(heads)
        == len(set(heads))
        == sum(line.startswith("# TYPE") for line in Metrics().render(EngineStats()).decode().splitlines())
    )
    assert 'weft:requests_running{model_name="a"} 3' in lines
    assert 'weft:requests_running{model_name="b\\\\\\"\\n"} 5' in lines
    assert 'weft:requests_total{model_name="a",finish_reason="stop"} 1' in lines
    assert 'weft:technique_acts_total{model_name="a",technique="kv.x",act="y"} 2' in lines
    assert 'weft:time_to_first_token_seconds_count{model_name="a"} 0' in lines
    assert 'weft:time_to_first_token_seconds_bucket{model_name="b\\\\\\"\\n",le="0.005"} 4' in lines
    assert [parse(page([("a", first, EngineStats(running=3))]).decode())["weft:requests_running"]] == [
        {'model_name="a"': 3}
    ]


def test_every_field_exists() -> None:
    for _, field, _ in (*GAUGES, *COUNTERS):
        assert field in EngineStats.__struct_fields__


def test_histogram_counts_up_to_and_including_the_bound() -> None:
    histogram = Histogram("x_seconds", "X", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        histogram.observe(value)
    histogram.observe(0.5, times=10)
    samples = parse("\n".join(histogram.lines()) + "\n")
    assert samples["weft:x_seconds_bucket"] == {'le="0.1"': 2, 'le="1.0"': 14, 'le="+Inf"': 15}
    assert samples["weft:x_seconds_count"][""] == 15
    assert samples["weft:x_seconds_sum"][""] == pytest.approx(0.05 + 0.1 + 0.5 + 1 + 7 + 5)


@pytest.mark.parametrize(
    "page",
    [
        "weft:x 1",
        "# HELP weft:x X\n# TYPE weft:x gauge\nweft:y 1\n",
        "# HELP weft:x X\n# TYPE weft:x counter\nweft:x 1\n",
    ],
)
def test_the_parser_refuses(page: str) -> None:
    with pytest.raises(AssertionError):
        parse(page)
