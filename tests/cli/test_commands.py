"""Every command but `serve`: arguments, errors, exit statuses, and the keys of what --json prints."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.cli.running import COMMAND, ROOT, weft
from weft import __version__
from weft.cli._flags import EngineFlags
from weft.cli.app import app
from weft.cli.bench import batches
from weft.cli.generate import split
from weft.errors import ConfigError
from weft.exec.build import EngineConfig
from weft.llm import configure
from weft.registry import parse

PLAN_KEYS = {
    "weights_bytes", "kv_bytes", "kv_blocks", "kv_bytes_per_token", "workspace_bytes", "total_bytes", "available_bytes",
    "max_model_len", "fits",
}  # fmt: skip


def call(*args: str, stdin: str = "") -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, list(args), input=stdin, prog_name="weft")


# ---------------------------------------------------------------------------------------------- start-up


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"weft {__version__}\n")


def test_help_names_every_command_and_serve_every_contracted_flag() -> None:
    top = weft("--help").stdout
    assert [c for c in ("serve", "chat", "generate", "plan", "bench", "check") if f" {c} " not in top] == []
    flags = weft("serve", "--help").stdout
    wanted = ["--host", "--port", "--dtype", "--max-model-len", "--memory", "--threads", "--max-num-seqs"]
    assert [f for f in (*wanted, "--served-model-name", "--with", "--load") if f not in flags] == []


def test_help_and_plan_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from weft.cli.app import app\n"
        "early = {'torch', 'transformers', 'numpy', 'starlette', 'rich.progress'} & set(sys.modules)\n"
        "assert not early, early\n"
        "try: app(['plan', '--json', '--device', 'cpu'], prog_name='weft')\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "late = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.serial
def test_help_costs_less_than_half_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert weft("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["plan", "--with", "schedule=fcsf"], "did you mean fcfs"),
        (["plan", "--with", "shedule=fcfs"], "did you mean schedule"),
        (["plan", "--with", "schedule=fcfs(x=1)"], "no argument 'x'"),
        (["plan", "--memory", "lots"], "512M or 4G"),
        (["plan", "--dtype", "int7"], "int7"),
        (["plan", "--dtype", "float16", "--device", "cpu"], "GPU"),
        (["plan", "--max-model-len", "0"], "--max-model-len"),
        (["plan", "--max-num-seqs", "0"], "at least 1"),
        (["plan", "--threads", "0"], "--threads"),
        (["plan", "--load", "magic"], "auto or random"),
        (["plan", "./no/such/folder"], "there is no folder ./no/such/folder"),
        (["serve", "./no/such/folder", "--port", "0"], "there is no folder ./no/such/folder"),
        (["serve", "--log-level", "loud"], "log level"),
        (["serve", "--served-model-name", " "], "--served-model-name"),
        (["generate", "-p", "x", "./no/such/folder"], "there is no folder"),
        (["generate", "--file", "no-such-file", "bundled"], "no-such-file"),
        (["generate", "one", "two", "-p", "three"], "one argument"),
        (["chat", "--url", "ftp://x"], "address"),
        (["chat", "--url", "http://127.0.0.1:9", "--dtype", "float32"], "engine is the server's"),
        (["check", "--prompts", "no-such-file"], "no-such-file"),
        (["check", "--load", "random"], "random"),
        (["bench", "decode"], "--model and --shape"),
        (["bench", "decode", "--model", "bundled", "--shape", "x"], "--model and --shape"),
        (["bench", "decode", "--model", "bundled", "--batch", "1,x"], "--batch"),
        (["bench", "decode", "--model", "bundled", "--batch", "0"], "--batch"),
        (["bench", "decode", "--model", "bundled", "--new", "1"], "--new"),
        (["bench", "decode", "--model", "bundled", "--max-num-seqs", "3"], "--max-num-seqs"),
        (["bench", "decode", "--model", "bundled", "--prompt", "5000"], "context"),
        (["bench", "decode", "--shape", "no-such-shape"], "no-such-shape"),
    ],
)
def test_what_cannot_run_as_written_ends_in_one_sentence_and_status_2(args: list[str], says: str) -> None:
    result = call(*args)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]


def test_an_unknown_flag_is_refused() -> None:
    result = call("plan", "--no-such-flag")
    assert result.exit_code == 2
    assert "--no-such-flag" in result.stderr


def test_an_error_is_no_traceback_in_the_real_process() -> None:
    done = weft("plan", "--with", "schedule=nonsense")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no schedule=nonsense")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- plan


def test_plan_prints_every_contracted_key() -> None:
    result = call("plan", "--json", "--max-model-len", "512", "--max-num-seqs", "4")
    plan = json.loads(result.stdout)
    assert result.exit_code == 0
    assert plan.keys() >= PLAN_KEYS
    assert plan["fits"] is True
    assert plan["max_model_len"] == 512
    assert plan["model"] == "weft-tiny"
    assert plan["total_bytes"] == sum(plan[f"{part}_bytes"] for part in ("weights", "kv", "workspace", "reserve"))


def test_plan_says_no_with_the_numbers_when_it_does_not_fit() -> None:
    result = call("plan", "--memory", "40M")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout
    assert "--memory allows 40 MiB" in result.stderr
    told = call("plan", "--memory", "40M", "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["fits"] is False
    assert told.stderr == ""


def test_plan_takes_a_bare_config(bundled: Path, tmp_path: Path) -> None:
    config = tmp_path / "shape.json"
    config.write_text((bundled / "config.json").read_text())
    alone, whole = (json.loads(call("plan", m, "--json").stdout) for m in (str(config), "bundled"))
    assert alone["model"] == "shape"
    assert alone["weights_bytes"] == whole["weights_bytes"]


def test_every_flag_becomes_what_the_engine_calls_it(bundled: Path) -> None:
    flags = EngineFlags(
        dtype="bfloat16", device="cpu", max_model_len=99, memory="1G", threads=3, max_num_seqs=5, max_num_batched_tokens=77,
        load="random", weights_seed=11, prefix_cache=False, invariant=False, techniques=["schedule=fcfs"],
    )  # fmt: skip
    config = flags.config(bundled)
    assert config == EngineConfig(
        model=bundled, dtype="bfloat16", device="cpu", max_model_len=99, memory_bytes=1 << 30, threads=3, max_num_seqs=5,
        max_rows=77, load="random", seed=11, share=False, invariant=False,
        techniques=(parse("schedule=fcfs"),),
    )  # fmt: skip
    assert configure("bundled", **flags.options())[0] == config, "weft.LLM understands the same keywords"
    assert EngineFlags().config(bundled) == EngineConfig(model=bundled)


def test_techniques_reach_the_plan() -> None:
    plan = json.loads(call("plan", "--json", "--with", "schedule=prefill_first").stdout)
    assert "schedule=prefill_first" in plan["stack"]


# ---------------------------------------------------------------------------------------------- generate


def test_arguments_of_generate_are_told_apart(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert split(["The sea was"]) == (None, ["The sea was"])
    assert split(["bundled", "The sea"]) == ("bundled", ["The sea"])
    assert split(["org/model", "a", "b"]) == ("org/model", ["a", "b"])
    assert split(["The sea was", "It rained"]) == (None, ["The sea was", "It rained"])
    assert split(["org/model"], ["a"]) == ("org/model", ["a"])
    assert split([], ["a"]) == (None, ["a"])
    assert split(["-"]) == (None, ["-"])
    assert split([]) == (None, [])
    with pytest.raises(ConfigError, match="is a model"):
        split([str(bundled)])
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert split([str(bundled)]) == (str(bundled), ["-"])
    assert split([]) == (None, ["-"])


def test_generate_streams_what_json_reports(tmp_path: Path) -> None:
    how = ["--max-tokens", "12", "--temperature", "0.8", "--seed", "5", "--threads", "1", "--memory", "600M"]
    file = tmp_path / "prompt.txt"
    file.write_text("The sea was")
    streamed = call("generate", "-", *how, stdin="The sea was\n")
    assert streamed.exit_code == 0, streamed.stderr
    several = call(
        "generate", "bundled", "-p", "It rained", "-f", str(file), "-n", "2", "--logprobs", "1", "--json", *how
    )
    assert several.exit_code == 0, several.stderr
    results = json.loads(several.stdout)
    assert [r["prompt"] for r in results] == ["It rained", "The sea was"]
    first, second = results[1]["outputs"]
    assert streamed.stdout == first["text"] + "\n"
    assert first["text"] != second["text"]
    assert first["finish_reason"] == "length"
    assert len(first["token_ids"]) == len(first["logprobs"]) == 12


def test_sampling_out_of_range_names_the_field() -> None:
    result = call("generate", "x", "--temperature", "-1", "--threads", "1", "--memory", "600M")
    assert result.exit_code == 2
    assert "temperature must be" in result.stderr


# ---------------------------------------------------------------------------------------------- chat


def test_chat_says_what_does_not_fit_and_goes_on() -> None:
    lines = "word " * 400 + "\nhello\n"
    done = call("chat", "--max-model-len", "64", "--max-tokens", "4", "--threads", "1", "--memory", "600M", stdin=lines)
    assert "/reset starts afresh" in done.stderr
    assert len(done.stdout.splitlines()) == 1, "the second line was answered"
    assert done.exit_code == 1


# ---------------------------------------------------------------------------------------------- small parts


def test_batches_of_bench() -> None:
    assert batches("1,4, 16") == (1, 4, 16)


def test_module_and_script_are_one_command() -> None:
    assert COMMAND[1:] == ["-m", "weft"]
    assert weft("--version").stdout == f"weft {__version__}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_something_is_imported_ends_with_the_status_that_was_given(number: int, tmp_path: Path) -> None:
    """Imports run text as code (dataclasses do), and CPython remembers a KeyboardInterrupt that leaves such text."""
    (tmp_path / "ended.py").write_text(
        "import signal, sys\n"
        "from weft.cli._terminal import unwinding\n"
        "try:\n"
        "    with unwinding():\n"
        f"        exec('signal.raise_signal({int(number)})')\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-m", "ended"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
