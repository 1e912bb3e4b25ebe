"""Adapters' files and the book of those that are loaded: what is refused, and what is bounded."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapt.adapters import Made
from weft.errors import CapacityError, ConfigError, EngineError, RequestError
from weft.exec.adapters import CONFIG, TENSORS, AdapterBook
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.thread import step
from weft.hub import resolve
from weft.types import RequestSpec, SamplingSpec, TokenItem


@pytest.fixture
def copy(made: dict[str, Made], tmp_path: Path) -> Path:
    """A folder of one's own with the adapter "few"."""
    folder = tmp_path / "root" / "mine"
    folder.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        (folder / name).write_bytes((made["few"].folder / name).read_bytes())
    return folder


@pytest.fixture
def book(adapted: Runtime) -> AdapterBook:
    return AdapterBook(adapted.decoder, most=2, most_bytes=4 << 20)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora = True .* DoRA"),
        ({"bias": "all"}, "bias = 'all' .* biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* merge them"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "'embed_tokens', which is not adapted"),
        ({"target_modules": "all-linear"}, "must be a list"),
        ({"target_modules": []}, "must be a list"),
        ({"target_modules": ["q_proj"]}, "belongs to no module"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "lora_A of .*k_proj is missing"),
        ({"layers_to_transform": [99]}, "names no layer"),
        ({"layers_to_transform": "all"}, "layer numbers"),
        ({"r": 4}, "has the shape .*; this model and r = 4"),
        ({"r": 0}, "r must be"),
        ({"r": 10**9}, "r must be"),
        ({"r": "3"}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha must be"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"something_new": {"a": 1}}, "something_new = {'a': 1}"),
    ],
)
def test_configs_that_ask_for_more(copy: Path, book: AdapterBook, change: dict[str, Any], says: str) -> None:
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=says):
        book.read("x", str(copy))


def _retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


def _header(text: bytes, size: int | None = None) -> Callable[[Path], None]:
    return lambda folder: (folder / TENSORS).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "not a whole safetensors"),
        (_header(b"{}", 1 << 62), "not a whole safetensors"),
        (_header(b"{" * 100_000), "not a whole safetensors"),
        (
            _header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
            "not a whole safetensors",
        ),
        (_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'), "not a whole safetensors"),
        (lambda f: (f / TENSORS).write_bytes(b""), "not a whole safetensors"),
        (_retensor(lambda t: t.update({FIRST: torch.zeros(3, 255)})), r"shape \[3, 255\]"),
        (_retensor(lambda t: t.update({FIRST: torch.zeros(3, 0)})), r"shape \[3, 0\]"),
        (_retensor(lambda t: t.update({FIRST: torch.zeros(3, 256, dtype=torch.int32)})), "I32"),
        (_retensor(lambda t: t.update({FIRST: torch.full((3, 256), torch.nan)})), "no finite numbers"),
        (_retensor(lambda t: t.pop(FIRST)), "lora_A of model.layers.0.self_attn.q_proj is missing"),
        (_retensor(lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(2)})), "belongs to no module"),
        (_retensor(lambda t: t.update({FIRST.replace(".0.", ".8."): torch.zeros(3, 256)})), "belongs to no module"),
        (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "pickle"),
        (lambda f: (f / TENSORS).unlink(), f"no {TENSORS}"),
        (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}"),
        (lambda f: (f / CONFIG).write_text("[" * 100_000), "JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "expected a JSON object"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff{}"), "JSON"),
        (lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)), "no regular file"),
        (lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), "no regular file"),
    ],
)
def test_files_that_are_no_adapter(copy: Path, book: AdapterBook, damage: Callable[[Path], Any], says: str) -> None:
    damage(copy)
    with pytest.raises(ConfigError, match=says):
        book.read("x", str(copy))


def test_files_that_are_too_large(copy: Path, book: AdapterBook, adapted: Runtime) -> None:
    with open(copy / TENSORS, "r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no disk, and would take all memory
    with pytest.raises(CapacityError, match="lora-memory"):
        book.read("x", str(copy))
    (copy / CONFIG).write_text(" " * (1 << 21))
    with pytest.raises(CapacityError):
        book.read("x", str(copy))


def test_nothing_outside_a_root_is_opened(copy: Path, book: AdapterBook, made: dict[str, Made], tmp_path: Path) -> None:
    root = copy.parent
    assert book.read("x", "mine", root=str(root)).digest == book.read("x", str(copy), root=str(root)).digest
    outside = made["few"].folder
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    (root / "half" / CONFIG).symlink_to(outside / CONFIG)
    (root / "loop").symlink_to(root / "loop")
    for path in (
        str(outside),
        "../mine/../..",
        "/etc",
        "link",
        "half",
        "/nowhere/at/all",
        os.path.relpath(outside, root),
    ):
        with pytest.raises(RequestError, match="leads out of the folder") as refused:
            book.read("x", path, root=str(root))
        assert refused.value.code == "forbidden"
    for path in ("nobody", "mine/adapter_config.json", "loop", "mine\0", "x" * 5000):
        with pytest.raises(ConfigError):
            book.read("x", path, root=str(root))
    (root / "inside").symlink_to(copy)  # as caches of hubs have them
    assert book.read("x", "inside", root=str(root)).digest == book.read("x", "mine", root=str(root)).digest


def test_a_folder_that_changes_between_the_look_and_the_opening(
    copy: Path, book: AdapterBook, made: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was resolved is opened step by step, so that a link put there meanwhile is not followed."""
    root, real = copy.parent, os.path.realpath

    def swap(path: Any) -> str:
        found = real(path)
        if str(path).endswith(swapped) and not (copy.parent / "moved").exists():
            victim = copy if swapped == CONFIG else copy / TENSORS
            victim.rename(root / "moved")
            victim.symlink_to(made["few"].folder if swapped == CONFIG else made["few"].folder / TENSORS)
        return found

    monkeypatch.setattr(os.path, "realpath", swap)
    for swapped in (CONFIG, TENSORS):  # the folder, then a file in it
        with pytest.raises(ConfigError):
            book.read("x", "mine", root=str(root))
        link = copy if swapped == CONFIG else copy / TENSORS
        link.unlink()
        (root / "moved").rename(link)
    monkeypatch.undo()
    assert book.read("x", "mine", root=str(root)).bytes


def test_number_and_bytes_are_bounded(book: AdapterBook, made: dict[str, Made]) -> None:
    few, late, wide = (book.read(name, str(made[name].folder)) for name in ("few", "late", "wide"))
    with pytest.raises(CapacityError, match="lora-memory"):
        AdapterBook(book._decoder, most=2, most_bytes=wide.bytes - 1).enter(wide)
    book.enter(few)
    book.enter(late)
    assert book.bytes == few.bytes + late.bytes
    with pytest.raises(CapacityError, match="max-loras"):
        book.enter(wide)
    book.enter(book.read("few", str(made["late"].folder)))  # one of that name is there: it is replaced
    assert book.find("few").digest == late.digest
    assert book.enter(few).digest == few.digest
    book.drop("few")
    with pytest.raises(RequestError, match="there is 'late'"):
        book.drop("few")
    with pytest.raises(ConfigError, match="no adapter 'few' is loaded; there is 'late'"):
        book.find("few")


def test_the_plan_sets_memory_aside() -> None:
    plain = prepare(EngineConfig(model=resolve(None), device="cpu", memory_bytes=1 << 30)).plan
    plan = prepare(EngineConfig(model=resolve(None), device="cpu", memory_bytes=1 << 30, lora_memory=64 << 20)).plan
    assert plan.adapters_bytes == 64 << 20
    assert plan.total_bytes <= 1 << 30
    assert plan.kv_bytes < plain.kv_bytes
    full = prepare(EngineConfig(model=resolve(None), device="cpu", memory_bytes=600 << 20, lora_memory=1 << 30)).plan
    assert not full.fits
    assert "adapters 1,024 MiB" in full.reason


def test_an_adapter_in_use_stays(made: dict[str, Made]) -> None:
    few, wide = str(made["few"].folder), str(made["wide"].folder)
    runtime = build(
        prepare(
            EngineConfig(
                model=resolve(None), dtype="float32", device="cpu", threads=1, max_num_seqs=2, lora=[f"x={few}"]
            )
        )
    )
    engine, book = runtime.engine, runtime.adapters
    assert book is not None
    law = SamplingSpec(temperature=0.0, max_tokens=4)
    one = RequestSpec(id=1, items=(TokenItem((5, 6, 7)),), sampling=law, techniques=("adapt=lora(name='x')",))
    assert not engine.add(one, 0.0)
    book.enter(book.read("y", few))  # equal contents under another name are another matter
    for _ in range(2):  # while it waits, and while it runs
        with pytest.raises(RequestError, match="used by 1 live request ") as refused:
            book.drop("x")
        assert refused.value.code == "adapter_in_use"
        with pytest.raises(RequestError, match="loaded anew"):
            book.enter(book.read("x", wide))
        book.enter(book.read("x", few))  # the same contents: nothing to do
        step(engine, runtime.executor)
    book.drop("y")
    while engine.has_work:
        step(engine, runtime.executor)
    book.drop("x")
    (rejected,) = engine.add(one, 0.0)
    assert "no adapter 'x'" in rejected.message  # type: ignore[union-attr]
    by_path = msgspec.structs.replace(one, techniques=(f"adapt=lora(name='x', path={wide!r})",))
    (rejected,) = engine.add(by_path, 0.0)
    assert "only the server's own stack" in rejected.message  # type: ignore[union-attr]


def test_the_servers_own_adapter_stays(made: dict[str, Made]) -> None:
    part = f"adapt=lora(name='own', path={str(made['few'].folder)!r})"
    config = EngineConfig(
        model=resolve(None), dtype="float32", device="cpu", threads=1, max_num_seqs=2, techniques=[part]
    )
    book = build(prepare(config)).adapters
    assert book is not None
    assert [a.name for a in book.adapters()] == ["own"]
    with pytest.raises(RequestError, match="is used by"):
        book.drop("own")


def test_flags_that_are_wrong(made: dict[str, Made]) -> None:
    for lora in (["x"], ["=/tmp"], ["x="], ["x=/nowhere"], [f"a b={made['few'].folder}"]):
        config = EngineConfig(model=resolve(None), dtype="float32", device="cpu", threads=1, max_num_seqs=2, lora=lora)
        with pytest.raises(EngineError):
            build(prepare(config))
    with pytest.raises(ConfigError, match="max_loras"):
        prepare(EngineConfig(model=resolve(None), max_loras=0))
