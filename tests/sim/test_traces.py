"""Traces of each form: what is read of them, what their prefixes share, and what is said of broken ones."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from weft.errors import ConfigError
from weft.sim.run import Wanted, load
from weft.sim.traces import trace
from weft.sim.workload import UNIQUE, Arrival, Pace, paced

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/traces")
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)


def words(text: str) -> list[int]:
    return [hash(w) % 1000 for w in text.split()]


def test_azure_and_vidur_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    (tmp_path / "v.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579,396,109\n")
    for name in ("a.csv", "v.csv"):
        one, two = trace(str(tmp_path / name))
        assert (one.time_s, one.prompt, one.output) == (0.0, 374, 44)
        assert two.time_s == pytest.approx(4.314579)
        assert (two.prompt, two.output) == (396, 109)
        assert one.tokens()[0] != two.tokens()[0]  # nobody shares anything
        assert len(set(one.tokens())) == 1


def test_mooncake_s_blocks_are_shared_prefixes(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 2500, "input_length": 1100, "output_length": 6, "hash_ids": [0, 1, 9]},
    ]
    file = tmp_path / "m.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = trace(str(file))
    assert (len(one.tokens()), len(two.tokens())) == (1500, 1100)
    common = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(one.tokens(), two.tokens(), strict=False)))
    assert common == 1024
    assert two.time_s == 2.5


def test_a_packed_file_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"TIMESTAMP,ContextTokens,GeneratedTokens\n"))
    with pytest.raises(ConfigError, match="unpack it first"):
        list(trace(str(tmp_path / "t.csv.gz")))


def test_text_is_encoded_and_agents_may_be_out_of_order(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    rows = [(5_000_000, "a b c", "d e"), (3_000_000, "a b", ""), (9_000_000, "", "x")]
    file.write_text(
        "".join(json.dumps({"timestamp": t, "input": i, "output": o, "session_id": "s"}) + "\n" for t, i, o in rows)
    )
    found = list(trace(str(file), encode=words))
    assert [(a.time_s, a.prompt, a.output) for a in found] == [(0.0, 2, 1), (2.0, 3, 2), (6.0, 1, 1)]
    assert found[1].tokens()[:2] == found[0].tokens()
    with pytest.raises(ConfigError, match="tokenizer"):
        list(trace(str(file)))


def test_files_of_a_folder_in_which_nobody_asked_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    (tmp_path / "b.jsonl").write_text("")
    assert [a.prompt for a in trace(str(tmp_path))] == [374, 396]
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ConfigError, match="holds no trace"):
        trace(str(tmp_path))


def test_a_client_of_servegen_asks_as_its_law_says(tmp_path: Path) -> None:
    (tmp_path / "chunk-3-trace.csv").write_text("0,10.0,2.0,Gamma,0.25,0.4\n600,0.0,,\n1200,5.0,1.0,Weibull,1.0,0.2\n")
    lengths = {"input_tokens": "{100: 0.5, 300: 0.5}", "output_tokens": "{7: 1.0}"}
    (tmp_path / "chunk-3-dataset.json").write_text(
        json.dumps({"0": lengths, "1200": {**lengths, "output_tokens": "{9: 1.0}"}})
    )
    found = list(trace(str(tmp_path)))
    first = [a for a in found if a.time_s < 700]
    assert len(first) == pytest.approx(6000, rel=0.1)
    assert {a.output for a in first} == {7}
    assert {a.output for a in found[-100:]} == {9}
    assert {a.tenant for a in found} == {"client3"}
    assert statistics.mean(a.prompt for a in found) == pytest.approx(200, rel=0.05)
    gaps = [b.time_s - a.time_s for a, b in itertools.pairwise(first)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(2.0, rel=0.15)
    assert found == list(trace(str(tmp_path)))
    assert found != list(trace(str(tmp_path), seed=1))


@pytest.mark.parametrize(
    ("text", "cv"), [("poisson(rate=8, requests=4000)", 1.0), ("gamma(rate=8, cv=3.0, requests=4000)", 3.0)]
)
def test_synthetic_loads_have_their_rate_and_bursts(text: str, cv: float) -> None:
    found = list(trace(text))
    gaps = [b.time_s - a.time_s for a, b in itertools.pairwise(found)]
    assert 1 / statistics.mean(gaps) == pytest.approx(8, rel=0.2)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.2)
    assert statistics.mean(a.prompt for a in found) == pytest.approx(512, rel=0.05)


def test_a_share_is_urgent_and_nothing_else_changes() -> None:
    plain, pressed = (list(trace(f"poisson(rate=8, requests=2000{more})")) for more in ("", ", urgent=0.1"))
    assert [(a.time_s, a.segments, a.output) for a in plain] == [(a.time_s, a.segments, a.output) for a in pressed]
    assert sum(a.priority < 0 for a in pressed) / 2000 == pytest.approx(0.1, abs=0.02)
    assert {a.priority for a in plain} == {0}


def test_pace_and_rate() -> None:
    base = list(trace("poisson(rate=10, requests=2000)"))
    fast = list(paced(base, Pace(time=2.0)))
    assert [a.time_s for a in fast] == [a.time_s / 2 for a in base]
    more = list(paced(base, Pace(rate=2.5)))
    assert len(more) == pytest.approx(5000, rel=0.05)
    assert [a.time_s for a in more] == sorted(a.time_s for a in more)
    assert len({a.segments[-1][0] for a in more}) == len(more)  # copies share nothing that was not shared
    assert len(list(paced(base, Pace(rate=0.25)))) == pytest.approx(500, rel=0.15)
    assert len(list(paced(base, Pace(requests=7)))) == 7
    assert list(paced(base, Pace(seconds=3.0)))[-1].time_s < 3.0
    for bad in ({"time": 0.0}, {"rate": -1.0}, {"requests": 0}, {"seconds": 0.0}):
        with pytest.raises(ConfigError):
            Pace(**bad)  # type: ignore[arg-type]


def test_reading_is_lazy(tmp_path: Path) -> None:
    """A trace that goes wrong at its end has begun: no file is read as a whole."""
    file = tmp_path / "a.csv"
    file.write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i},1,1\n" for i in range(5000)) + "x,1,1\n"
    )
    found = trace(str(file))
    assert next(found).time_s == 0.0
    with pytest.raises(ConfigError, match=r"a\.csv:5002"):
        list(found)


MOON = '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": '


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", AZURE + "2023-11-16 18:15:51,x,1\n", r"a\.csv:4"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,1\n", "3 cells"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,-5,1\n", "-5 tokens"),
        ("a.csv", AZURE + f"2023-11-16 18:15:51,{1 << 40},1\n", "tokens"),
        ("a.csv", AZURE + "2023-11-16 12:15:51,5,1\n2023-11-16 19:15:51,5,1\n" * 2, "goes back"),
        ("a.csv", "time,tokens\n1,2\n", "known head"),
        ("a.csv", "", "known head"),
        ("a.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\nnan,1,1\n", "not finite"),
        ("m.jsonl", MOON + "[1]}\n", "2 whole numbers"),
        ("m.jsonl", MOON + '[1, "x"]}\n', "whole numbers"),
        ("m.jsonl", MOON + "[1, true]}\n", "whole numbers"),
        ("m.jsonl", MOON + "[1, 2]}\n[1]\n", r"m\.jsonl:2: no JSON object"),
        ("m.jsonl", MOON + "[1, 2]}\n{\n", r"m\.jsonl:2: no JSON object"),
        ("m.jsonl", MOON + "[1, 2]}\n" + "{" * 5000 + "\n", r"m\.jsonl:2: no JSON object"),
        ("m.jsonl", '{"a": 1}\n', "hash_ids, input_length"),
        ("m.jsonl", '{"arrival_time": "x", "input_toks": 1, "output_toks": 1}\n', "must be a number"),
        ("chunk-1-trace.csv", "0,1,1,Gamma,0,0\n", "beside its trace"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        list(trace(str(tmp_path / name)))


@pytest.mark.parametrize("last", ["1e300", "1e15"])
def test_times_that_a_clock_cannot_tell_are_refused(tmp_path: Path, last: str) -> None:
    """At such times a step of milliseconds would be lost in rounding."""
    file = tmp_path / "a.csv"
    file.write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n-5,10,10\n{last},10,10\n")
    with pytest.raises(ConfigError, match="wrong time"):
        list(load(Wanted(trace=str(file))))
    file.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n-5,10,10\n-2,10,10\n")
    assert [a.time_s for a in load(Wanted(trace=str(file)))] == [0.0, 3.0]  # times before zero are as good as others


@pytest.mark.parametrize(
    ("row", "laws", "says"),
    [
        ("0,1,1,Gamma,0,1\n", '{"0": {"input_tokens": "{1: 1.0}", "output_tokens": "{1: 1.0}"}}', "out of range"),
        ("0,1,1,Gamma,x,1\n", '{"0": {"input_tokens": "{1: 1.0}", "output_tokens": "{1: 1.0}"}}', "are wanted"),
        (
            "0,1,1,Gamma,1,1\n0,1,1,Gamma,1,1\n",
            '{"0": {"input_tokens": "{1: 1.0}", "output_tokens": "{1: 1.0}"}}',
            "ascend",
        ),
        ("0,1,1,Gamma,1,1\n", '{"0": {"input_tokens": "{1: 0.0}", "output_tokens": "{1: 1.0}"}}', "add up to nothing"),
        ("0,1,1,Gamma,1,1\n", '{"0": {"input_tokens": "{__import__: 1}", "output_tokens": "{1: 1.0}"}}', "no tokens"),
        ("0,1,1,Gamma,1,1\n", '{"0": {"input_tokens": 5, "output_tokens": "{1: 1.0}"}}', "written as text"),
        ("0,1,1,Gamma,1,1\n", '{"0": 7}', "an object"),
        ("0,1,1,Gamma,1,1\n", "{}", "no window"),
    ],
)
def test_broken_clients_are_named(tmp_path: Path, row: str, laws: str, says: str) -> None:
    (tmp_path / "chunk-1-trace.csv").write_text(row)
    (tmp_path / "chunk-1-dataset.json").write_text(laws)
    with pytest.raises(ConfigError, match=says):
        list(trace(str(tmp_path)))


@pytest.mark.parametrize("text", ["poisson()", "poisson(rate=0)", "poisson(rate=1, cv=2)", "poisson(rate='x')",
                                  "gamma(rate=1, cv=0)", "poisson(rate=1, urgent=1.5)",
                                  "poisson(rate=1, requests=1.5)", "poisson(rate=1, requests=0)", "nowhere.csv"])  # fmt: skip
def test_broken_loads_are_named(text: str) -> None:
    with pytest.raises(ConfigError):
        trace(text)


@needs_traces
@pytest.mark.parametrize(
    ("name", "requests", "prompt", "output"),
    [
        ("azure2023/AzureLLMInferenceTrace_conv.csv", 19366, 22361870, 4088665),
        ("vidur/splitwise_conv.csv", 19366, 22361870, 4088665),
        ("mooncake/synthetic_trace.jsonl", 3993, 61194628, 595432),
        ("llmservingsim-measured-vllm/RTX4090/Llama-3.1-8B/requests.jsonl", 300, 257239, 195753),
        ("lmcache-agent-trace/miniswe", 402, None, None),
        ("lmcache-agent-trace/taubench", 471, None, None),
    ],
)
def test_real_traces_are_read_whole(name: str, requests: int, prompt: int | None, output: int | None) -> None:
    encode: Callable[[str], list[int]] = words
    n = p = o = 0
    last = 0.0
    for a in trace(str(SHARED / name), encode=encode):
        assert isinstance(a, Arrival)
        assert a.time_s >= last
        n, p, o, last = n + 1, p + a.prompt, o + a.output, a.time_s
    assert n == requests
    if prompt is not None:
        assert (p, o) == (prompt, output)


@needs_traces
@pytest.mark.parametrize("name", ["language/m-small", "reason/deepseek-r1", "multimodal/mm-image"])
def test_real_clients_are_merged(name: str) -> None:
    found = list(itertools.islice(trace(str(SHARED / "servegen" / name)), 3000))
    assert len({a.tenant for a in found}) > 1
    assert len({c for a in found for c, _ in a.segments if c >= UNIQUE}) == len(found)
