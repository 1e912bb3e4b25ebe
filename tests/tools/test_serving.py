"""The benchmark of serving: its record keeps what is promised, and the pieces that it is made of are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.serving import LIMITS, Driver, judged, main, text
from weft.types import Add, Command, EngineFrame, Finished, Tokens

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "serving.json"


def test_the_record_keeps_what_is_promised() -> None:
    record = json.loads(RECORD.read_text())
    assert record["restart"]["worst_s"] <= 5
    assert (record["streams"]["streams"], record["streams"]["errors"]) == (200, 0)
    assert record["streams"]["whole"] == 200
    assert record["ttft"]["added_s"] <= 0.003
    if "share" in record:
        assert record["share"]["ratio"] >= 0.9


def test_soaks_lost_nothing_and_memory_stayed_flat() -> None:
    record = json.loads(RECORD.with_name("soak.json").read_text())
    assert (record["faults"]["requests"], sum(record["faults"]["faults"].values())) == (10_000, 999)
    assert record["requests"]["requests"] == 100_000
    for name, processes in (("faults", ("front",)), ("requests", ("front", "engine"))):
        found = record[name]
        assert (found["lost"], found["wrong_tokens"], found["leaked_blocks"]) == (0, 0, 0)
        for process in processes:
            assert found[f"{process}_rss_slope_bytes_per_1000"] <= 100_000


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("restart", {"worst_s": 5.0}, {"worst_s": 5.1}),
        ("streams", {"errors": 0, "whole": 200}, {"errors": 1, "whole": 200}),
        ("streams", {"errors": 0, "whole": 200}, {"errors": 0, "whole": 199}),
        ("ttft", {"added_s": 0.003}, {"added_s": 0.0031}),
        ("share", {"ratio": 0.9}, {"ratio": 0.89}),
    ],
)
def test_figures_are_held_to_their_limits(
    name: str, good: dict[str, float], bad: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = judged(name, good)
    assert kept["met"]
    assert kept["limits"].keys() == LIMITS[name].keys()
    assert "MISSED" not in capsys.readouterr().err
    assert not judged(name, bad)["met"]
    assert "MISSED" in capsys.readouterr().err


def test_prompts_share_no_beginning() -> None:
    assert len({text(i)[:4].split()[0] for i in range(1000)}) == 1000


def test_a_driver_times_the_first_token_and_the_last_end() -> None:
    class Port:
        def subscribe(self, sink: object) -> None:
            self.sink = sink

        def send(self, command: Command) -> None:
            assert isinstance(command, Add)
            self.sink(EngineFrame(events=(Tokens(command.spec.id, 0, (1,)),)))  # type: ignore[operator]
            self.sink(EngineFrame(events=(Finished(command.spec.id, 0, "length"),)))  # type: ignore[operator]

    first, all_s = Driver(Port()).run([[1], [2]], 1)  # type: ignore[arg-type]
    assert 0 <= first <= all_s


def test_unknown_figures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "latency"])
    assert "not latency" in capsys.readouterr().err
