"""`weft convert`: what is written is what `quantize` gives, what compressed-tensors reads, and all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.cli.running import COMMAND, ROOT
from tests.models.checkpoints import Checkpoint
from tests.models.test_packed import config_of
from tools.to_gguf import write as write_gguf
from weft.cli.app import app
from weft.conform.workload import PROSE
from weft.convert import write
from weft.convert.folder import copy_rest, made
from weft.convert.write import Writer, convert
from weft.errors import CapacityError, ConfigError
from weft.exec.build import EngineConfig, build, prepare
from weft.models.checkpoints.files import Files
from weft.models.checkpoints.readers import fused, readers
from weft.models.checkpoints.scheme import NESTED, SCALES, scheme
from weft.models.checkpoints.stored import catalogue
from weft.models.families import families, read
from weft.models.formats import WeightFormat
from weft.models.layout import quantized
from weft.models.quantized import Quantized, quantize

DENSE = Path(__file__).parents[1] / "models" / "packed" / "dense"
FORMATS = ("int8", "int8:16:zero", "int4", "int4:32:float", "int4:0", "int4:16:zero", "int4:32:zero")


def read_back(folder: Path) -> dict[str, Any]:
    """Every part of a converted checkpoint."""
    config = config_of(folder)
    found = scheme(config)
    spec = read(config)
    assert ("lm_head" in config["quantization_config"]["ignore"]) == spec.tied
    stored = catalogue(folder)
    all_of = readers(folder, list(families()[spec.family].parts(spec)), stored, found)
    assert {name for reader in all_of.values() for name in reader.names} == set(stored)
    few = {reader.format for reader in all_of.values() if reader.format}
    assert fused(all_of) == quantized(spec, few.pop())
    with Files(stored) as files:
        return {name: reader.read(files.get) for name, reader in all_of.items()}


def check_against(original: dict[str, torch.Tensor], found: dict[str, Any], form: WeightFormat) -> int:
    """How many are rounded; each of them exactly as `quantize` rounds it."""
    rounded = 0
    for name, value in found.items():
        if isinstance(value, Quantized):
            mine = quantize(original[name], form)
            assert value.format == form
            assert torch.equal(value.values, mine.values), name
            assert torch.equal(value.steps(), mine.steps()), name
            assert torch.equal(value.dequantized(), mine.dequantized()), name
            rounded += 1
        else:
            assert torch.equal(value, original[name]), name
            assert value.dtype is original[name].dtype
    return rounded


@pytest.mark.parametrize("text", FORMATS)
def test_read_back_it_is_what_rounding_gives(text: str, tmp_path: Path) -> None:
    form = WeightFormat.parse(text)
    written = convert(DENSE, tmp_path, form)
    found = read_back(tmp_path)
    assert check_against(load_file(DENSE / "model.safetensors"), found, form) == written.rounded == 8
    assert isinstance(found["model.embed_tokens.weight"], Quantized)
    assert written.kept == 3


def test_rows_that_are_next_to_nothing_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are rounded some at a time, in units of their own, and read in those of the whole, where small ones lose digits."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    tensors = load_file(DENSE / "model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"].float()
    weight[64:] *= 0.02
    weight[70:80] *= torch.logspace(-4, -7, 10)[:, None]
    tensors["model.layers.0.mlp.up_proj.weight"] = weight.bfloat16()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({**json.loads((DENSE / "config.json").read_text()), SCALES: NESTED}))
    monkeypatch.setattr(write, "CHUNK", 64 * weight.shape[1])
    convert(source, out, WeightFormat.parse("int4"))
    runtime = build(prepare(EngineConfig(model=out, ops="cpu")))
    found = runtime.decoder.tensors["0.gate_up"].unpacked()[-len(weight) :]
    assert ((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 4).all()
    shutil.rmtree(out)
    out.mkdir()
    convert(source, out, WeightFormat.parse("int8"))
    assert SCALES not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama_bias_tied", "gemma2", "qwen3_moe", "qwen2"])
def test_every_family(name: str, checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """Biases, norms and routers stay; head and experts are rounded."""
    folder, form = checkpoint(name).folder, WeightFormat(4, 0, False)
    convert(folder, tmp_path, form)
    found = read_back(tmp_path)
    original = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    check_against(original, found, form)
    for key, value in found.items():
        assert isinstance(value, Quantized) == (original[key].dim() == 2 and not key.endswith("mlp.gate.weight")), key


def test_shards_keep_their_names(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    tensors = load_file(DENSE / "model.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({key: value for j, (key, value) in enumerate(sorted(tensors.items())) if j % 2 == i}, source / file)
    index = {key: files[j % 2] for j, key in enumerate(sorted(tensors))}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf8")
    (source / "config.json").write_bytes((DENSE / "config.json").read_bytes())
    form = WeightFormat(4, 32)
    written = convert(source, out, form)
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    assert check_against(tensors, read_back(out), form) == 8
    assert (
        json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == written.bytes_after
    )


@pytest.mark.parametrize("text", ["int8", "int4", "int4:32:float", "int4:16:zero"])
def test_compressed_tensors_reads_the_same(text: str, tmp_path: Path) -> None:
    """What transformers with compressed-tensors made of such a checkpoint (tests/models/packed/make.py): float16 products."""
    convert(DENSE, tmp_path, WeightFormat.parse(text))
    theirs = load_file(DENSE / f"{text.replace(':', '-')}.safetensors")
    with safe_open(DENSE / f"{text.replace(':', '-')}.safetensors", "pt") as file:
        assert file.metadata()["package"] == "compressed-tensors"
    found = read_back(tmp_path)
    assert set(theirs) == {name for name, value in found.items() if isinstance(value, Quantized)}
    for name, weight in theirs.items():
        mine = found[name]
        zeros = mine.zeros()
        zeros = torch.full(mine.scales.shape, mine.format.levels // 2) if zeros is None else zeros
        values = mine.values.view(*mine.scales.shape, -1).float() - zeros.float().unsqueeze(-1)
        exact = (values * mine.steps().unsqueeze(-1)).view_as(weight)
        assert torch.equal(exact.half(), weight), name


def test_a_file_is_whole_as_the_library_sees_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    odd = {
        "a": torch.arange(3, dtype=torch.float16),
        "b": torch.arange(5, dtype=torch.int32),
        "\N{SNOWMAN}": torch.zeros(0, 2),
    }
    with Writer(path, list(odd)) as writer:
        for name, tensor in odd.items():
            writer.add(name, tensor)
    found = load_file(path)
    assert set(found) == set(odd)
    for name, tensor in odd.items():
        assert torch.equal(found[name], tensor)


def test_small_scales_keep_their_digits(tmp_path: Path) -> None:
    """Weights whose scales are too small for float16: written in float32, and read back to the bit."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    tensors = {
        key: value * (1e-5 if value.dim() == 2 else 1) for key, value in load_file(DENSE / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((DENSE / "config.json").read_bytes())
    convert(source, out, WeightFormat(4, 32))
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight_scale"].dtype is torch.float32
    check_against(tensors, read_back(out), WeightFormat(4, 32))


# ---------------------------------------------------------------------------------------------- the command


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["convert", *words])


def test_the_command(tmp_path: Path) -> None:
    """Everything beside the weights comes along, but for code, pickles and other weights."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for path in DENSE.glob("*model.safetensors"), DENSE.glob("config.json"):
        for file in path:
            (source / file.name).write_bytes(file.read_bytes())
    keep = {"tokenizer.json": "{}", "chat_template.jinja": "x", "LICENSE": "free", "merges.txt": "a b"}
    drop = {"modeling_x.py": "print()", "pytorch_model.bin": "x", "old.PT": "x", "a.pkl": "x", "model.gguf": "x"}
    for name, text in (keep | drop).items():
        (source / name).write_text(text)
    (source / ".hidden").write_text("x")
    (source / "folder").mkdir()
    result = run(str(source), str(out), "--weights", "int4:32", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert {path.name for path in out.iterdir()} == {*keep, "config.json", "model.safetensors"}
    assert sorted(record["left_out"]) == sorted(drop)
    assert record["rounded"] == 8
    assert record["bytes_after"] < record["bytes_before"] / 3
    assert oct(out.stat().st_mode)[-3:] == "755"
    assert not [path for path in tmp_path.iterdir() if path.name not in ("source", "out")]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run(str(DENSE), str(tmp_path / "out"), "--weights", "int4")
    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "int3"], "--weights is int8 or int4"),
        (["--weights", "int4:48"], "a group has 16, 32, 64, 128 inputs"),
        (["--weights", "int4:128"], "rows of 64 inputs, which int4:128 cannot part"),
        (["--weights", "int4", "--awq", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_said(words: list[str], said: str, tmp_path: Path) -> None:
    result = run(str(DENSE), str(tmp_path / "out"), *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_short_text_is_refused(bundled: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time.")
    result = run(str(bundled), str(tmp_path / "out"), "--weights", "int4", "--awq", str(tmp_path / "text"))
    assert result.exit_code == 2
    assert "at least 512 tokens" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_nothing_is_calibrated_for_what_cannot_be_written(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of reading a text would end in the same words."""
    monkeypatch.setattr("weft.cli.convert.calibrated", lambda *_: pytest.fail("it calibrates first"))
    text = tmp_path / "text"
    text.write_text("Once upon a time. " * 500)
    write_gguf(bundled, tmp_path / "x.gguf")
    for model, words in (
        (DENSE, "cannot part; choose another group"),
        (DENSE.parent / "awq", "is quantized already"),
        (tmp_path / "x.gguf", "is a GGUF file"),
    ):
        result = run(str(model), str(tmp_path / "out"), "--weights", "int4:128", "--awq", str(text))
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_leaves_nothing(number: signal.Signals, bundled: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n".join(PROSE) * 20)
    command = [
        *COMMAND,
        "convert",
        str(bundled),
        str(tmp_path / "out"),
        "--weights",
        "int4",
        "--awq",
        str(tmp_path / "text"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob(".out-*")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, -number), "it unwinds"
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_signal_the_moment_its_folder_is_there_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def interrupted(*given: Any, **more: Any) -> None:
        make(*given, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), made(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(bundled: Path, tmp_path: Path) -> None:
    """Files of at most 2 MiB: the weights take four."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20)); "
    code = limit + "from weft.cli import main; sys.argv = ['weft', *sys.argv[1:]]; main()"
    words = ["convert", str(bundled), str(tmp_path / "out"), "--weights", "int4"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "could not be written: File too large; nothing of it is left" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantized"):
        convert(DENSE.parent / "awq", tmp_path, WeightFormat(4, 32))


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = load_file(DENSE / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = torch.nan
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((DENSE / "config.json").read_bytes())
    result = run(str(source), str(tmp_path / "out"), "--weights", "int8")
    assert result.exit_code == 2
    assert "model.embed_tokens.weight has values that are not finite" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("error", [ConfigError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_failure(error: BaseException, tmp_path: Path) -> None:
    expected = CapacityError if isinstance(error, OSError) else type(error)

    def half(draft: Path) -> None:
        (draft / "model.safetensors").write_bytes(b"x")
        raise error

    with pytest.raises(expected), made(tmp_path / "out") as draft:
        half(draft)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"), made(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_are_followed(tmp_path: Path) -> None:
    """A hub's cache has links in place of files."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (tmp_path / "blob").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    assert copy_rest(source, out) == []
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_text() == "{}"
