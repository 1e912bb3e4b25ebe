"""Beside other engines: the protocol with real processes that behave and misbehave, figures by hand, page, chart and flags.

No other engine is run here.  A stub driver stands for one: a small program, in a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.rivals import plan, venvs
from bench.rivals.process import Driver, RivalError, run
from bench.rivals.protocol import prompts_of

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 300
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": VOCAB, "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}  # fmt: skip
STUB = """
import sys, time
from bench.rivals.protocol import Kept, Loaded, Measured, main

class Stub:
    def prepare(self, model, format, cache):
        print("words that are no answer", flush=True)
        {prepare}

    def load(self, model, format, cache, threads, batch, length):
        return Loaded("9.9", "stub8", 64.0, Kept(1000, 2000), Kept(500, 500), info={{"threads": threads}})

    def measure(self, prompts, new):
        {measure}
        return Measured(0.5, [0.25] * (new - 1), [[sum(p) % 300] * new for p in prompts])

main(Stub)
"""

Starting = Callable[..., Driver]


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Starting]:
    """Makes stub drivers, which do at `prepare` and `measure` what they are given to do."""
    made: list[Driver] = []

    def start(prepare: str = "pass", measure: str = "pass") -> Driver:
        path = tmp_path / f"stub{len(made)}.py"
        path.write_text(STUB.format(prepare=prepare, measure=measure), encoding="utf8")
        return command([sys.executable, str(path)])

    def command(argv: list[str]) -> Driver:
        made.append(Driver("stub", argv, tmp_path / f"{len(made)}.log", {"PYTHONPATH": str(ROOT)}))
        return made[-1]

    start.command = command  # type: ignore[attr-defined]
    yield start
    for driver in made:
        driver.close()


WHERE = {"model": "m", "format": "int8", "cache": "c"}
LOAD = {"do": "load", **WHERE, "threads": 2, "batch": 4, "length": 9}
MEASURE = {"do": "measure", "batch": 2, "prompt": 3, "new": 4, "seed": 7, "vocab": VOCAB}


def is_gone(pid: int) -> bool:
    """Whether no process has this id, or only a dead one that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf8").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


# ---------------------------------------------------------------------------------------------- the protocol


def test_a_driver_answers_and_ends(stub: Starting) -> None:
    with stub() as driver:
        assert driver.ask({"do": "prepare", **WHERE}, 30) == {"ok": True}
        loaded = driver.ask(LOAD, 30)
        assert (loaded["version"], loaded["body"], loaded["info"]) == (
            "9.9", {"weights": 1000, "bytes": 2000}, {"threads": 2},
        )  # fmt: skip
        found = driver.ask(MEASURE, 30)
        assert found["tokens"] == [[sum(p) % VOCAB] * 4 for p in prompts_of(7, 2, 3, VOCAB)]
        assert found["steps_s"] == [0.25] * 3
    assert driver.process.returncode == 0
    assert "words that are no answer" in driver.log.read_text(encoding="utf8")


def test_an_engine_that_says_no_can_be_asked_again(stub: Starting) -> None:
    with stub(prepare="raise ValueError('no such weights')") as driver:
        with pytest.raises(RivalError, match="ValueError: no such weights"):
            driver.ask({"do": "prepare", **WHERE}, 30)
        assert driver.ask(LOAD, 30)["kind"] == "stub8"
        with pytest.raises(RivalError, match="not 'dance'"):
            driver.ask({"do": "dance", **WHERE}, 30)


def test_a_driver_that_dies_is_told_with_its_last_words(stub: Starting) -> None:
    with stub(measure="print('out of luck', file=sys.stderr); sys.stderr.flush(); import os; os._exit(3)") as driver:
        driver.ask(LOAD, 30)
        with pytest.raises(RivalError, match=r"ended at measure \(exit status 3\).*out of luck"):
            driver.ask(MEASURE, 30)
        with pytest.raises(RivalError, match="had ended"):
            driver.ask(MEASURE, 30)


def test_a_driver_that_is_killed_is_told(stub: Starting) -> None:
    with stub(measure="import os; os.kill(os.getpid(), 9)") as driver:
        driver.ask(LOAD, 30)
        with pytest.raises(RivalError, match="signal SIGKILL"):
            driver.ask(MEASURE, 30)


def test_a_driver_that_hangs_is_ended_with_its_children(stub: Starting) -> None:
    child = (
        "import subprocess; p = subprocess.Popen(['sleep', '600']); "
        "print(p.pid, file=sys.stderr, flush=True); time.sleep(600)"
    )
    with stub(measure=child) as driver:
        driver.ask(LOAD, 30)
        began = time.monotonic()
        with pytest.raises(RivalError, match=r"no answer to measure within 1\.5 s"):
            driver.ask(MEASURE, 1.5)
        assert time.monotonic() - began < 5
    pid = int(driver.log.read_text(encoding="utf8").split()[-1])
    until = time.monotonic() + 5
    while not is_gone(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone(pid)
    assert driver.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"no": 1}', '"ok"'])
def test_an_answer_that_is_not_of_the_protocol_ends_it(stub: Starting, line: str) -> None:
    argv = [sys.executable, "-c", f"import sys; sys.stdin.readline(); print({line!r}, flush=True); sys.stdin.read()"]
    with stub.command(argv) as driver:  # type: ignore[attr-defined]
        with pytest.raises(RivalError, match="not of the protocol"):
            driver.ask(MEASURE, 30)
        assert driver.process.poll() is not None


def test_memory_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "greedy.py"
    path.write_text(STUB.format(prepare="bytearray(1 << 30)", measure="pass"), encoding="utf8")
    argv = [sys.executable, str(path), "--memory", str(256 << 20)]
    with Driver("greedy", argv, tmp_path / "log", {"PYTHONPATH": str(ROOT)}) as driver:
        with pytest.raises(RivalError, match="MemoryError"):
            driver.ask({"do": "prepare", **WHERE}, 30)


def test_commands_end_in_time_or_are_ended(tmp_path: Path) -> None:
    log, ticks, seen = tmp_path / "log", list[float](), tmp_path / "seen"

    def tick(gone_s: float) -> None:
        ticks.append(gone_s)
        seen.touch()

    waiting = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\nprint('fine')"
    run([sys.executable, "-c", waiting, str(seen)], log, 30, tick=tick)
    assert log.read_text(encoding="utf8") == "fine\n"
    assert ticks
    with pytest.raises(RivalError, match=r"exit status 4: .*no wheel"):
        run([sys.executable, "-c", "import sys; print('no wheel'); sys.exit(4)"], log, 30)
    with pytest.raises(RivalError, match=r"took more than 0\.5 s"):
        run([sys.executable, "-c", "import time; time.sleep(600)"], log, 0.5)


def test_an_interrupted_run_leaves_no_driver_behind(tmp_path: Path) -> None:
    """Ctrl-C goes to the process that measures; its drivers, in sessions of their own, end with it."""
    path = tmp_path / "slow.py"
    path.write_text(STUB.format(prepare="time.sleep(600)", measure="pass"), encoding="utf8")
    script = (
        "import sys; from pathlib import Path\n"
        "from weft.cli._terminal import unwinding\n"
        "from bench.rivals.process import Driver\n"
        f"with unwinding(), Driver('slow', [sys.executable, {str(path)!r}], Path({str(tmp_path / 'slow.log')!r})) as d:\n"
        "    print(d.process.pid, flush=True)\n"
        f"    d.ask({{'do': 'prepare', **{WHERE!r}}}, 600)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    outer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True
    )
    try:
        assert outer.stdout is not None
        pid = int(outer.stdout.readline())
        time.sleep(0.5)
        outer.send_signal(signal.SIGTERM)
        _, errors = outer.communicate(timeout=30)
    finally:
        outer.kill()
    assert "Ended" in errors
    assert is_gone(pid)


# ---------------------------------------------------------------------------------------------- environments


RECIPE = {"install": [], "check": "print('starts')", "timeout_s": 60}


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[str]] = []

    def pretend(argv: Any, log: Path, timeout_s: float, env: Any = None, tick: Any = None) -> None:
        steps.append(list(argv))
        if argv[1:3] == ["-m", "venv"]:
            (Path(argv[3]) / "bin").mkdir(parents=True)
            (Path(argv[3]) / "bin" / "python").touch()

    monkeypatch.setattr(venvs, "run", pretend)
    recipe = {**RECIPE, "install": [["one==1"], ["two==2", "three==3"]]}
    python = venvs.environment("stub", recipe, tmp_path)
    assert python == tmp_path / "stub" / "venv" / "bin" / "python"
    assert [step[-1] for step in steps[1:]] == ["one==1", "three==3", "print('starts')"]
    again = len(steps)
    assert venvs.environment("stub", recipe, tmp_path) == python
    assert len(steps) == again
    venvs.environment("stub", {**recipe, "install": [["one==2"]]}, tmp_path)
    assert len(steps) > again


def test_flags_for_a_compilers_fault_are_used_where_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a cache that came from a machine where they are used is not taken where they are not."""
    built: list[str] = []

    def pretend(argv: Any, log: Path, timeout_s: float, env: Any = None, tick: Any = None) -> None:
        if argv[1:3] == ["-m", "venv"]:
            (Path(argv[3]) / "bin").mkdir(parents=True)
            (Path(argv[3]) / "bin" / "python").touch()
        elif argv[-1].startswith("llama-cpp-python"):
            built.append(env["CMAKE_ARGS"])

    recipe = plan.rivals()["llama.cpp"]
    monkeypatch.setattr(venvs, "run", pretend)
    for entries in ({"flags": "avx512f amx_int8"}, {"flags": "avx512f"}, {"flags": "fpu"}, {}):
        monkeypatch.setattr(venvs, "cpuinfo", lambda entries=entries: entries)
        venvs.environment("llama.cpp", recipe, tmp_path)
    assert len(built) == 2  # the last three are alike
    assert all(args.startswith("-DGGML_NATIVE=ON ") for args in built)
    assert [args.endswith(" '-DCMAKE_CXX_FLAGS=-fno-dse -fno-tree-dse'") for args in built] == [True, False]
    assert ["fno" in args for args in built] == [True, False]


def test_a_rival_that_does_not_install_is_told_why(tmp_path: Path) -> None:
    recipe = {**RECIPE, "install": [["--no-index", "no-such-engine==1.0"]]}
    with pytest.raises(RivalError, match=r"not installed: .*no-such-engine"):
        venvs.environment("stub", recipe, tmp_path)
    assert not (tmp_path / "stub" / venvs.MADE).exists()


def test_recipes_are_whole() -> None:
    for name, recipe in plan.rivals().items():
        assert set(recipe["formats"]) <= set(plan.FORMATS), name
        assert (ROOT / (recipe["module"].replace(".", "/") + ".py")).is_file()
        names = [a for arguments in recipe["install"] for a in arguments if not a.startswith("-")]
        assert names
        assert all("==" in a for a in names), f"{name}: every version is pinned"
        for value in recipe.get("env", {}).values():
            value.format(cores="0", threads=1, cache="c")
