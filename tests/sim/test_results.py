"""What a simulation says: latencies and goodput worked by hand, equal bytes for equal seeds, and the page of a comparison."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from weft.cli.app import app
from weft.config import build_stack
from weft.errors import ConfigError
from weft.sim.cluster import Cluster
from weft.sim.metrics import SLO, Curve, Meter, jain, quantile, seconds, slo
from weft.sim.run import Wanted, compare, policies, run, setting, split
from weft.sim.workload import Arrival
from weft.slots.cost import PARTS, Parts

SMALL = ("sim", "--trace", "poisson(rate=6, requests=40, prompt=200, output=20, tenants=2)", "--model", "qwen2.5-0.5b",
         "--hardware", "l40s", "--slo", "ttft=1s,tpot=50ms")  # fmt: skip


def weft(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def test_latencies_and_goodput_by_hand() -> None:
    meter = Meter()
    for at, output in ((0.0, 5), (1.0, 3), (2.0, 1)):
        meter.arrives(Arrival(at, ((1, 10),), output))
    for id, first, end in ((0, 0.5, 2.5), (1, 3.0, 3.1), (2, 4.0, 4.0)):
        meter.said(id, first)
        meter.said(id, first + 100)  # only the first counts
        meter.finished(id, end, 0)
    meter.step(0.0, 4.0, Parts(weights=3.0, host=1.0), 20, 3, 0.5)
    result = meter.result(SLO(ttft_s=1.0, tpot_s=0.6), 1)
    assert result["ttft_s"]["mean"] == pytest.approx((0.5 + 2.0 + 2.0) / 3)
    assert result["tpot_s"]["mean"] == pytest.approx((0.5 + 0.05) / 2)  # the answer of one token has none
    assert result["e2e_s"]["p50"] == pytest.approx(2.1)
    assert result["goodput"] == pytest.approx(1 / 4)
    assert result["output_tok_s"] == pytest.approx(9 / 4)
    assert result["bound_by"] == {"weights": 0.75, "attention": 0, "kv": 0, "communication": 0, "host": 0.25}
    assert tuple(result["bound_by"]) == PARTS
    assert meter.result(SLO(tpot_s=0.4), 1)["goodput"] == pytest.approx(2 / 4)
    assert meter.result(SLO(), 2)["utilization"] == 0.5


def test_gaps_between_tokens_by_hand() -> None:
    """Three answers: tokens at 1, 2, 5; at 2, 3 and two at 3.5; one at 4.  Means between tokens are 2, 0.5 and none."""
    meter = Meter()
    for output in (3, 4, 1):
        meter.arrives(Arrival(0.0, ((1, 10),), output))
    for id, said in enumerate((((1.0, 1), (2.0, 1), (5.0, 1)), ((2.0, 1), (3.0, 1), (3.5, 2)), ((4.0, 1),))):
        for at, tokens in said:
            meter.said(id, at, tokens)
        meter.finished(id, said[-1][0], 0)
    meter.step(0.0, 5.0, Parts(weights=5.0), 20, 3, 0.5)
    told = meter.result(SLO(), 1)["gap_s"]  # gaps of 1, 3, 1, 0.5 and 0
    assert told["mean"] == pytest.approx(5.5 / 5)
    assert told["p50"] == pytest.approx(1.0, rel=0.01)
    assert told["p99"] == pytest.approx(3.0, rel=0.01)
    for limit, good in ((0.9, 1), (1.0, 2), (2.9, 2), (3.0, 3)):
        assert meter.result(slo(f"gap={limit}s"), 1)["slo_met"] == pytest.approx(good / 3)
    assert meter.result(slo("ttft=3s,tpot=1s,gap=2s"), 1)["slo_met"] == pytest.approx(1 / 3)


def test_a_long_prompt_beside_an_answer_makes_one_long_gap() -> None:
    """By the mean between tokens it is hardly seen; Sarathi-Serve's chunks keep the gap within what they are made for."""
    arrivals = [Arrival(0.0, ((1, 100),), 400), Arrival(1.0, ((2, 16000),), 5)]

    def told(policy: str) -> dict[str, Any]:
        wanted = Wanted(trace="", policy=policy, max_rows=16384, slo=slo("tpot=20ms,gap=100ms"))
        cluster = Cluster(setting(wanted))
        return {**cluster.run(arrivals).result(wanted.slo, 1), "longest": cluster.meter.gaps.longest[0]}

    whole, cut = told("prefill_first"), told("sarathi_serve(tbt_s=0.1, step_s=0.01, row_s=0.0001)")
    assert whole["tpot_s"]["p50"] < 0.02
    assert whole["longest"] > 0.3  # 16,000 rows of 16 GFLOP at 0.6 of 989 TFLOP/s and more
    assert whole["slo_met"] == 0.5
    assert cut["longest"] < 0.1
    assert cut["slo_met"] == 1.0


def test_quantiles_and_fairness() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([], 0.5) == 0.0
    assert jain([1.0, 1.0, 1.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0]) == pytest.approx(1 / 3)


def test_a_curve_keeps_its_mean_when_bins_double() -> None:
    curve = Curve()
    for i in range(10_000):
        curve.add(float(i), i + 1.0, i % 2)
    points = curve.points(10_000.0)
    assert len(points) <= 240
    assert all(v == pytest.approx(0.5) for _, v in points)


@pytest.mark.parametrize(("text", "value"), [("50ms", 0.05), ("1s", 1.0), ("2m", 120.0), ("0.5", 0.5), ("1h", 3600.0)])
def test_times_are_read(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "x", "-1s", "0", "1d", "nan", "inf"])
def test_bad_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        seconds(text)
    with pytest.raises(ConfigError):
        slo(f"ttft={text}")


def test_the_same_seed_gives_the_same_bytes_and_another_others() -> None:
    one, two, other = weft(*SMALL, "--json"), weft(*SMALL, "--json"), weft(*SMALL, "--json", "--seed", "1")
    assert one.exit_code == 0, one.output
    assert one.stdout == two.stdout != other.stdout
    result = json.loads(one.stdout)
    assert {"requests", "finished", "goodput", "ttft_s", "tpot_s", "e2e_s", "output_tok_s", "bound_by"} <= set(result)
    assert all(set(result[key]) == {"mean", "p50", "p90", "p99"} for key in ("ttft_s", "tpot_s", "gap_s", "e2e_s"))
    assert result["requests"] == result["finished"] == 40
    assert sum(result["bound_by"].values()) == pytest.approx(1.0)


def test_a_decode_takes_what_the_roofline_says() -> None:
    """One request alone: each token costs reading the weights once, its KV, and the launch."""
    wanted = Wanted(trace="poisson(rate=1, requests=1, prompt=512, output=101, spread=0.0)")
    result, _ = run(wanted)
    weights_s = 2 * (8.03e9 - 128256 * 4096) / (3350e9 * 0.8)
    kv_s = 563 * 131072 / (3350e9 * 0.8)  # entries from 513 to 612, and one written
    assert result["tpot_s"]["mean"] == pytest.approx(weights_s + kv_s + 2e-3, rel=0.01)


def test_tokens_for_a_dollar_count_all_devices() -> None:
    """What an hour gives, by the rent of every device; not said where one of them has no price."""
    load = "poisson(rate=6, requests=40, prompt=200, output=20)"

    def told(**changes: Any) -> tuple[float | None, float]:
        result, _ = run(Wanted(trace=load, **changes))
        return result["tok_per_usd"], 3600 * result["output_tok_s"]

    value, hourly = told(hardware="h100", replicas=2, devices=2)
    assert value == pytest.approx(hourly / (4 * 3.20))
    value, hourly = told(hardware="h100", cost="lamina")
    assert value == pytest.approx(hourly / (3.20 + 4 * 1.60))  # an h100, and four a100 for attention
    assert told(hardware="h100", cost="lamina(price_h=0.0)")[0] is None
    assert told(hardware="l40s")[0] is None


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_comparison_is_a_page_by_itself(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    done = weft(
        *SMALL,
        "--compare",
        "fcfs,prefill_first+least_loaded",
        "--rates",
        "1,20",
        "--replicas",
        "2",
        "--report",
        str(page),
        "--json",
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(r["policy"], r["rate"]) for r in rows] == [("fcfs", 1), ("prefill_first+least_loaded", 1), ("fcfs", 20),
                                                        ("prefill_first+least_loaded", 20)]  # fmt: skip
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.links == []
    assert not re.search(r"<script|https?://(?!www\.w3\.org/2000/svg)|url\(", text)
    for title in ("Goodput", "Time to first token, p99", "Time per token, p99", "Fairness", "Utilization", "Memory"):
        assert title in text
    assert text.count("<svg") >= 16
    assert "nan" not in text.lower().replace("tenant", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_ended_leaves_no_empty_page(tmp_path: Path, number: signal.Signals) -> None:
    page = tmp_path / "r.html"
    load = "poisson(rate=4, requests=100000)"
    command = [sys.executable, "-m", "weft", "sim", "--trace", load, "--compare", "fcfs,fair", "--report", str(page)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not page.exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.2)  # within the simulation
        process.send_signal(number)
        assert process.wait(30) not in (0, -number)
    assert not page.exists()


def test_a_policy_of_a_comparison_may_bring_its_cost() -> None:
    wanted = Wanted(trace="poisson(rate=6, requests=30, prompt=600, output=20)", model="qwen2.5-0.5b")
    plain, priced = compare(wanted, ("fcfs", "fcfs+cost=nanoflow"), (1.0,))
    assert plain.result == run(wanted)[0]
    assert priced.result == run(replace(wanted, cost="nanoflow"))[0] != plain.result
    assert compare(wanted, ("cost=nanoflow",), (1.0,))[0].result == priced.result
    for text in ("fcfs+cost=nanoflow+cost=roofline", "fcfs+cost=nothing", "cost="):
        with pytest.raises(ConfigError):
            compare(wanted, (text,), (1.0,))


def test_what_would_be_left_unused_is_named() -> None:
    """Not taken and forgotten; several at a time."""
    done = weft(
        "sim",
        "--replay",
        "x",
        "--policy",
        "fair",
        "--no-prefix-cache",
        "--compare",
        "fcfs",
        "--proportions",
        "distserve",
    )
    assert done.exit_code == 2
    assert "would leave --policy, --no-prefix-cache, --compare, --proportions unused" in " ".join(done.output.split())


def test_paces_alone_are_a_comparison() -> None:
    told = json.loads(weft(*SMALL, "--rates", "0.5,2", "--json").stdout)
    assert [(t["policy"], t["rate"]) for t in told] == [("fcfs", 0.5), ("fcfs", 2)]
    assert told[0]["offered"] < told[1]["offered"]


def test_policies_are_found_by_name() -> None:
    inside, outside = policies("layered(groups=2)+power_of_two(seed=3)")
    assert [str(p) for p in inside] == ["schedule=layered(groups=2)"]
    assert str(outside["route"]) == "route=power_of_two(seed=3)"
    assert split("a(x=1, y='b,c'), b", ",") == ["a(x=1, y='b,c')", "b"]
    for text in ("nothing", "fcfs+", "cost=roofline", "fcfs(", "layered(groups=0)"):
        with pytest.raises(ConfigError):
            policies(text)


@pytest.mark.parametrize("part", ["cost=roofline", "route=round_robin", "place=distserve"])
def test_what_is_no_part_of_an_engine_is_not_taken_for_one(part: str) -> None:
    """Nothing is taken and then left unused."""
    with pytest.raises(ConfigError, match="no part of an engine"):
        build_stack([part])


@pytest.mark.parametrize(
    "args",
    [("sim",), ("sim", "--trace", "no.csv"), (*SMALL, "--slo", "ttft=x"), (*SMALL, "--policy", "x"), (*SMALL, "--hardware", "x"),
     (*SMALL, "--model", "x"), (*SMALL, "--replicas", "0"), (*SMALL, "--compare", "fcfs", "--rates", "0"),
     (*SMALL, "--duration", "1e-9"),
     (*SMALL, "--cost", "fcfs"), (*SMALL, "--kv-blocks", "0"), (*SMALL, "--max-model-len", "99999999"),
     (*SMALL, "--max-model-len", "0"),
     (*SMALL, "--requests", "0"), (*SMALL, "--time-scale", "1e-300"), (*SMALL, "--rate-scale", "1e9"),
     (*SMALL, "--devices", "1000000"), (*SMALL, "--kv-blocks", "99999999999"),
     (*SMALL, "--compare", "fcfs", "--report", "/no/folder/x.html"), (*SMALL, "--kv-kept", "bits=0.5"),
     ("sim", "--peak", "4096", "--replicas", "2"), ("sim", "--peak", "4096", "--report", "x.html"),
     ("sim", "--replay", "x", "--trace", "y"), ("sim", "--replay", "x", "--peak", "4096"),
     ("sim", "--replay", "x", "--no-prefix-cache"), ("sim", "--replay", "x", "--rates", "1,2")],
    ids=lambda a: a[-1][-14:],
)  # fmt: skip
def test_what_cannot_be_simulated_is_said_in_a_sentence(args: tuple[str, ...]) -> None:
    done = weft(*args)
    assert done.exit_code == 2, (done.output, done.exception)
    assert "error:" in done.output
