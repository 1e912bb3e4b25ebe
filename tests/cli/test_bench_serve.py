"""`weft bench serve` on scripted servers, whose every answer is known."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort
from weft.bench.client import Target
from weft.bench.dataset import made_up, read_dataset
from weft.bench.serve import Load, Sample, _arrive, first_model, spread, summary
from weft.cli.app import app
from weft.errors import ConfigError, EngineError
from weft.front.port import EngineInfo
from weft.front.text import ModelText


@pytest.fixture(scope="module")
def text(bundled: Path) -> ModelText:
    return ModelText.load(bundled, name=MODEL)


@pytest.fixture(scope="module")
def port(text: ModelText) -> Iterator[ScriptedPort]:
    info = EngineInfo(
        model_id=MODEL, vocab_size=text.vocab_size, max_model_len=512, kv_blocks=64, block_tokens=16, max_num_seqs=8
    )
    made = ScriptedPort(lambda spec, index: [65] * spec.sampling.max_tokens, info, interval_s=0.002)
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(port: ScriptedPort, text: ModelText) -> Iterator[str]:
    with serving(port, text) as address:
        yield address


def bench(*args: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["bench", "serve", *args, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else done


def test_a_closed_loop(url: str, port: ScriptedPort) -> None:
    before = len(port.commands)
    code, record = bench("--url", url, "--requests", "12", "--concurrency", "3", "--max-tokens", "5", "--prompt", "7")
    assert code == 0
    assert (record["requests"], record["errors"], record["output_tokens"]) == (12, 0, 60)
    assert (record["model"], record["concurrency"], record["rate"]) == (MODEL, 3, None)
    assert record["input_tokens"] == sum(_length(c) for c in port.commands[before:] if hasattr(c, "spec"))
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert 0 < record[name]["p50"] <= record[name]["p99"] <= record[name]["max"]
    assert record["e2e_s"]["mean"] > record["ttft_s"]["mean"]
    assert record["output_tok_s"] == pytest.approx(60 / record["duration_s"])
    assert record["e2e_s"]["p50"] >= 5 * 0.002  # five frames, with a pause between them


def _length(command: Any) -> int:
    return sum(item.rows for item in command.spec.items)


def test_requests_arrive_at_their_times(url: str) -> None:
    """Never before the times that were drawn for them, at distances of the rate, however the answers fare."""
    asked: list[tuple[float, float]] = []

    async def one(ask: Any, due: float) -> None:
        asked.append((due, time.perf_counter()))
        await asyncio.sleep(0.05)

    asyncio.run(_arrive(one, made_up(20, 3, 0), Load(rate=200, concurrency=None, seed=3)))
    assert len(asked) == 20
    assert all(now >= due for due, now in asked)
    draw = random.Random(3)
    assert [b - a for (a, _), (b, _) in itertools.pairwise(asked)] == pytest.approx(
        [draw.expovariate(200) for _ in range(19)]
    )
    code, record = bench("--url", url, "--requests", "5", "--rate", "100", "--max-tokens", "1", "--seed", "3")
    assert code == 0
    assert (record["concurrency"], record["rate"], record["errors"]) == (None, 100, 0)


def test_errors_are_counted_by_their_kind(url: str) -> None:
    code, record = bench("--url", url, "--model", "nothing", "--requests", "3")
    assert code != 0
    assert record["error_kinds"] == {"404": 3}
    assert (record["errors"], record["ttft_s"]) == (3, None)
    code, record = bench("--url", "http://127.0.0.1:9", "--model", "x", "--requests", "2")
    assert code != 0
    assert record["error_kinds"] == {"connection": 2}


@pytest.mark.parametrize(
    "wrong", ["http://127.0.0.1:abc", "http://127.0.0.1:99999", "http://[::1", "ftp://127.0.0.1", "http://", ""]
)
def test_what_is_no_address(wrong: str) -> None:
    with pytest.raises(ConfigError, match="no address of a server"):
        Target(wrong)


def test_a_server_that_is_not_there_is_named() -> None:
    async def ask() -> None:
        await first_model(Target("http://127.0.0.1:9"))

    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9 .*is --url the server's address"):
        asyncio.run(ask())


@pytest.mark.parametrize("answer", ["[]", "{}", '{"data": 5}', '{"data": [1]}', '{"data": []}', "null"])
def test_a_server_that_lists_no_models(answer: str) -> None:
    class Odd(Target):
        async def get(self, path: str) -> Any:
            return json.loads(answer)

    with pytest.raises(EngineError, match="--model"):
        asyncio.run(first_model(Odd("http://127.0.0.1:9")))


def test_a_table_for_people(url: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", "--url", url, "--requests", "2", "--route", "completions"])
    assert done.exit_code == 0
    for word in ("TTFT", "TPOT", "end to end", "0 errors", "8 clients"):
        assert word in done.stdout


def test_datasets(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"prompt": "one"}\n\n{"messages": [{"role": "user", "content": "two"}], "max_tokens": 9}\n{"turns": ["three", "x"]}\n'
        '{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "four"}]}}\n{"nothing": 1}\n'
    )
    found = read_dataset(lines, 8, 0)
    assert {ask.prompt for ask in found} == {"one", "two", "three", "four"}
    assert {ask.max_tokens for ask in found if ask.prompt == "two"} == {9}
    assert found == read_dataset(lines, 8, 0) != read_dataset(lines, 8, 1)
    shared = tmp_path / "b.json"
    shared.write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "x"}]}])
    )
    assert [ask.prompt for ask in read_dataset(shared, 2, 0)] == ["hello", "hello"]
    plain = tmp_path / "c.txt"
    plain.write_text("a line\n\nanother\n")
    assert {ask.prompt for ask in read_dataset(plain, 2, 0)} == {"a line", "another"}
    for name, text in (("d.jsonl", "no json"), ("e.jsonl", '{"x": 1}'), ("f.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=name):
            read_dataset(tmp_path / name, 1, 0)
    prompts = [ask.prompt for ask in made_up(50, 20, 0)]
    assert len({prompt.split()[0] for prompt in prompts}) == 50
    assert {len(prompt.split()) for prompt in prompts} == {21}


@pytest.mark.parametrize("make", [
    lambda: Load(rate=0), lambda: Load(concurrency=0), lambda: Load(route="images"), lambda: Target("ftp://x"),
])  # fmt: skip
def test_what_is_wrong_is_said(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_figures() -> None:
    assert spread([]) is None
    values = spread([float(i) for i in range(1, 101)])
    assert values == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    samples = [
        Sample(ttft_s=1, e2e_s=5, output_tokens=5),
        Sample(ttft_s=1, e2e_s=1, output_tokens=1),
        Sample(error="503"),
    ]
    record = summary(samples, 2.0, Load(), url="u", model="m")
    assert record["tpot_s"]["mean"] == 1.0
    assert (record["output_tok_s"], record["errors"]) == (3.0, 1)
