"""`weft doctor`: what it says of this machine, held to the system's own files; and of what a model runs on, and why."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.running import weft
from tests.native.test_decoder import CONFIG
from weft import native
from weft.cli.app import app
from weft.exec.host import processor

KEYS = {
    "model", "ops", "isa", "reason", "isas", "processor", "cores", "cores_source", "threads", "memory_bytes", "memory_source",
    "read_threads", "read_gb_s", "device", "dtype", "torch", "python",
}  # fmt: skip


def told(*args: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["doctor", *args, "--json"], prog_name="weft")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.bench.limit.read_gb_s", lambda threads, **_: 42.5)


def test_it_says_what_the_system_says() -> None:
    done = weft("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == KEYS
    assert 0 < found["cores"] <= len(os.sched_getaffinity(0))
    total = int(re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    assert 64 << 20 < found["memory_bytes"] < total
    assert 1 < found["read_gb_s"] < 2000
    info = Path("/proc/cpuinfo").read_text()
    if name := re.search(r"^model name\s*: (.*)$", info, re.MULTILINE):
        assert found["processor"] == name[1].strip()
    flags = re.search(r"^flags\s*: (.*)$", info, re.MULTILINE)
    for isa, flag in (
        ("amx", "amx_int8"),
        ("avx512_bf16", "avx512_bf16"),
        ("avx512_vnni", "avx512_vnni"),
        ("avx2", "avx2"),
    ):
        if flags is not None:
            assert (isa in found["isas"]) == (flag in flags[1].split()), isa
    assert (found["ops"], found["isa"]) == ("cpu", found["isas"][0])
    assert found["isas"][-1] == "portable"


@pytest.mark.usefixtures("quick")
def test_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = told()
    assert re.search(rf"kernels are built .* {found['isa']} is the best", found["reason"])
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({**CONFIG, "intermediate_size": 97}))
    found = told(str(odd))
    assert (found["model"], found["ops"], found["isa"]) == ("odd", "ref", "")
    assert "odd widths" in found["reason"]
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_reason", "weft's kernels were not built (no compiler)")
    found = told()
    assert (found["ops"], found["isa"], found["isas"]) == ("ref", "", [])
    assert found["reason"] == "weft's kernels were not built (no compiler)"


@pytest.mark.usefixtures("quick")
def test_for_people_it_is_a_table() -> None:
    done = CliRunner().invoke(app, ["doctor"], prog_name="weft", env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.stderr
    found = told()
    for said in (found["processor"], f"42.5 GB/s with {found['read_threads']} threads", found["reason"], found["isa"]):
        assert said in done.stdout


@pytest.mark.usefixtures("quick")
def test_what_is_no_model_is_said() -> None:
    done = CliRunner().invoke(app, ["doctor", "./no-such-model"], prog_name="weft")
    assert done.exit_code == 2
    assert "no-such-model" in done.stderr


def test_a_processor_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast One @ 9 GHz\nmodel name\t: other\n")
    assert processor(tmp_path) == "A Fast One @ 9 GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert processor(tmp_path)
