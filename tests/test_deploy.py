"""What is handed out to run a server, dashboard, image and unit: each against the code, and the tools that read it."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import complaint
from weft.front.guard import OPEN_PATHS
from weft.front.metrics import Metrics
from weft.types import EngineStats

ROOT = Path(__file__).resolve().parents[1]
UNIT = ROOT / "deploy" / "weft.service"


def metrics() -> dict[str, str]:
    """Every metric of /metrics and its kind."""
    lines = Metrics().render(EngineStats()).decode().splitlines()
    return {words[2]: words[3] for line in lines if (words := line.split())[1:2] == ["TYPE"]}


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_on_it() -> None:
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    there = metrics()
    exposed = {name for name, kind in there.items() if kind != "histogram"}
    exposed |= {
        f"{n}_{part}" for n, kind in there.items() if kind == "histogram" for part in ("bucket", "sum", "count")
    }
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for expression in expressions for name in re.findall(r"weft:\w+", expression)}
    assert used <= exposed, used - exposed
    assert {re.sub("_bucket$", "", name) for name in used} == there.keys(), "a metric that no panel shows"
    for expression in expressions:
        for name in re.findall(r"(?:rate|increase)\((weft:\w+)", expression):
            kind = there[re.sub("_bucket$", "", name)]
            assert kind in ("counter", "histogram"), f"{name} is a {kind}, which has no rate"
        assert expression.count("(") == expression.count(")")
        assert expression.count("weft:") == expression.count('{instance=~"$instance",model_name=~"$model"}')
    # What matches all has to match a server of one model too, whose samples have no such label.
    assert [v["allValue"] for v in board["templating"]["list"] if v["name"] == "model"] == [".*"]
    for variable in board["templating"]["list"]:
        for name in re.findall(r"weft:\w+", str(variable["query"])):
            assert name in exposed


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells
        assert all(x < 24 for x, _ in own)
        cells |= own


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest) of the Dockerfile, lines put together."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def test_the_image_runs_without_rights_and_looks_after_its_health() -> None:
    uid = last("USER").partition(":")[0]
    assert uid.isdigit()
    assert int(uid) > 0
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")
    health = last("HEALTHCHECK")
    script = json.loads(health[health.index("[") :])[2]
    ast.parse(script)
    port, path = re.search(r"http://127.0.0.1:(\d+)(/\w+)", script).groups()  # type: ignore[union-attr]
    assert path in OPEN_PATHS
    assert port == last("EXPOSE")
    assert not re.search(r"(?i)api_key\s*=|password|token=", (ROOT / "Dockerfile").read_text())


def test_the_image_starts_a_command_that_weft_understands() -> None:
    words = [*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))]
    assert words[0] == "weft"
    assert complaint(words[1:]) is None


def test_who_runs_the_image_is_told_to_give_it_a_key() -> None:
    """Without one it does not start, as it listens where others reach it."""
    runs = [
        line
        for path in (ROOT / "Dockerfile", *(ROOT / "docs").rglob("*.md"), ROOT / "README.md")
        for line in path.read_text().splitlines()
        if "docker run" in line
    ]
    assert runs
    assert [line for line in runs if "-e WEFT_API_KEY" not in line] == []


def test_what_the_image_takes_is_there_and_pinned() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    base = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")["BASE"]
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for path in rest.split()[:-1]:
                assert (ROOT / path).exists(), path
                assert f"!{path}" in ignored, f"{path} is kept from the build"
        if name == "FROM":
            rest = rest.replace("${BASE}", base)
            assert re.match(r"[\w./-]+:\d+\.\d+[\w.-]*", rest), f"{rest} names no version"
    (install,) = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert "-c constraints.txt" in install
    assert 'python -P -c "import weft.native._native"' in install, (
        "an image without kernels is slow and does not say why"
    )
    (extra,) = re.findall(r'"\.\[(\w+)\]"', install)
    assert f"{extra} = [" in (ROOT / "pyproject.toml").read_text()
    python = re.search(r"python:(\d+)\.(\d+)", base)
    assert python is not None
    assert (int(python[1]), int(python[2])) >= (3, 11)


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        key, mark, value = line.partition("=")
        if mark and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_the_unit_starts_a_command_that_weft_understands() -> None:
    words = shlex.split(unit()["ExecStart"][0])
    assert words[0].endswith("/weft")
    assert complaint(words[1:]) is None
    drain = 30.0  # the default of --drain-timeout, which test_docs holds to the code
    assert float(unit()["TimeoutStopSec"][0]) > drain
    assert not any("KEY=" in value for value in unit()["Environment"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "weft"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / "weft.service"
    text = UNIT.read_text().replace("/opt/weft/bin/weft", str(program))
    copy.write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    done: Any = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "weft.service" in line]
    assert (done.returncode, said) == (0, []), done.stderr


def test_complaints_are_made() -> None:
    assert complaint(["serve", "--no-such-flag"]) is not None
