"""Headers that lie: each lie is told apart, and no change of any byte gives more than a ConfigError."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gguf.forge import ARRAY, BOOL, F32, I32, STRING, U32, U64, Forge, model, string
from weft.errors import ConfigError
from weft.front.text import ModelText
from weft.front.tokenizer import Tokenizer
from weft.models import load_spec
from weft.models.gguf import header
from weft.models.gguf.header import read
from weft.models.weights import allocate, load


def use(path: Path) -> None:
    """All that weft does with a file before it computes."""
    spec = load_spec(path)
    if spec.width > 4096 or spec.vocab > 1 << 16 or len(spec.layers) > 8:
        raise ConfigError("too large for this test")  # what memory is asked for is the plan's business
    _, tensors = allocate(spec, torch.float32, torch.device("cpu"))
    load(path, spec, tensors)
    ModelText.load(path)


def test_values_of_every_type(tmp_path: Path) -> None:
    given = [
        ("a.u8", 0, 255), ("a.i8", 1, -128), ("a.u16", 2, 65535), ("a.i16", 3, -32768), ("a.u32", U32, 2**32 - 1),
        ("a.i32", I32, -(2**31)), ("a.f32", F32, 0.5), ("a.bool", BOOL, True), ("a.string", STRING, "Grüße"),
        ("a.u64", U64, 2**64 - 1), ("a.i64", 11, -(2**63)), ("a.f64", 12, 0.1),
    ]  # fmt: skip
    arrays = [("b.strings", ARRAY, (STRING, ["", "x", "ĠGruß"])), ("b.floats", ARRAY, (F32, [0.5, -2.0]))]
    nested = [("c", ARRAY, (ARRAY, [(I32, [1, 2]), (I32, [])]))]
    found = read(Forge([*given, *arrays, *nested]).write(tmp_path / "x.gguf")).metadata
    assert found == {
        **{key: v for key, _, v in given}, "b.strings": ("", "x", "ĠGruß"), "b.floats": (0.5, -2.0), "c": ((1, 2), ()),
    }  # fmt: skip
    assert found["a.bool"] is True


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_places_of_tensors(tmp_path: Path, alignment: int) -> None:
    tensors = [("one", (3,), 0, struct.pack("<3f", 1, 2, 3)), ("two", (32, 2, 3), 8, None), ("three", (2,), 1, b"abcd")]
    forge = Forge([("general.alignment", U32, alignment)], tensors, alignment=alignment)
    data = forge.bytes()
    found = read(forge.write(tmp_path / "x.gguf")).tensors
    assert list(found) == ["one", "two", "three"]
    assert found["two"].shape == (3, 2, 32)
    assert found["two"].stop - found["two"].start == 6 * 34
    assert data[found["one"].start : found["one"].stop] == struct.pack("<3f", 1, 2, 3)
    assert data[found["three"].start : found["three"].stop] == b"abcd"
    assert all(entry.start % alignment == 0 for entry in found.values())


def patched(offset: int, data: bytes, forge: Forge | None = None) -> bytes:
    whole = bytearray((forge or Forge([("a.b", U32, 1)], [("t", (2,), 0, None)])).bytes())
    whole[offset : offset + len(data)] = data
    return bytes(whole)


def places(*offsets: int, alignment: int = 32, sizes: tuple[int, ...] = (8, 8)) -> bytes:
    """Two tensors at these offsets."""
    forge = Forge([("general.alignment", U32, alignment)], [], alignment=alignment)
    head = forge.magic + struct.pack("<IQQ", 3, len(offsets), 1)
    head += string("general.alignment") + struct.pack("<II", U32, alignment)
    for index, offset in enumerate(offsets):
        head += string(f"t{index}") + struct.pack("<IQIQ", 1, sizes[index], 0, offset)
    return head + bytes(-len(head) % 32) + bytes(256)


HUGE = struct.pack("<Q", 1 << 62)
TOP = struct.pack("<Q", (1 << 64) - 1)
LIES: dict[str, tuple[bytes | Forge, str]] = {
    "empty": (b"", "has 0 bytes"),
    "no magic": (Forge(magic=b"GGML").bytes() + bytes(32), "does not begin with"),
    "version 1": (Forge([("a", U32, 1)], version=1), "version 1"),
    "version 4": (Forge([("a", U32, 1)], version=4), "version 4"),
    "big-endian": (Forge([("a", U32, 1)], version=3 << 24), "big-endian"),
    "tensors": (patched(8, HUGE), "the number of tensors is"),
    "keys": (patched(16, HUGE), "the number of metadata keys is"),
    "many keys": (patched(16, struct.pack("<Q", 1 << 14)), "ends inside|unknown type|not ASCII|length of"),
    "key length": (patched(24, TOP), "the length of a metadata key is"),
    "key twice": (Forge([("a.b", U32, 1), ("a.b", U32, 2)]), "stands there twice"),
    "key not ascii": (Forge([("ä", U32, 1)]), "not ASCII"),
    "key empty": (Forge([("", U32, 1)]), "not ASCII"),
    "key not utf-8": (Forge([(b"\xff", U32, 1)]), "not UTF-8"),
    "value type": (patched(35, struct.pack("<I", 13)), "unknown type 13"),
    "bool": (Forge([("a", BOOL, True)], [("t", (2,), 0, None)]).bytes().replace(b"a\x07\0\0\0\x01", b"a\x07\0\0\0\x02"), "neither 0 nor 1"),  # noqa: E501
    "string too long": (
        Forge([("a", STRING, "")]).bytes().replace(struct.pack("<IQ", 8, 0), struct.pack("<I", 8) + HUGE),
        "the length of a is",
    ),
    "string past the end": (
        Forge([("a", STRING, "")]).bytes().replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 8, 1000)),
        "ends inside a",
    ),
    "array count": (Forge([("a", ARRAY, (U32, [1]))]).bytes().replace(struct.pack("<IQ", 4, 1), struct.pack("<I", 4) + HUGE), "more than"),  # noqa: E501
    "array past the end": (
        Forge([("a", ARRAY, (U64, [1]))]).bytes().replace(struct.pack("<IQ", 10, 1), struct.pack("<IQ", 10, 1 << 21)),
        "ends inside a",
    ),
    "array type": (
        Forge([("a", ARRAY, (U64, [1]))]).bytes().replace(struct.pack("<IQ", 10, 1), struct.pack("<IQ", 77, 1)),
        "array of the unknown type 77",
    ),
    "array of strings": (
        Forge([("a", ARRAY, (STRING, ["xyz", "uvw"]))]).bytes().replace(string("uvw"), HUGE + b"uvw"),
        "the length of string 1 of a is",
    ),
    "array not utf-8": (Forge([("a", ARRAY, (STRING, ["ok", b"\xff\xff"]))]), "string 1 of a is not UTF-8"),
    "nesting": (Forge([("a", ARRAY, (ARRAY, [(ARRAY, [(ARRAY, [(U32, [])])])]))]), "nested more than 3 deep"),
    "alignment 0": (Forge([("general.alignment", U32, 0)]), "power of two"),
    "alignment 24": (Forge([("general.alignment", U32, 24)]), "power of two"),
    "alignment 2^31": (Forge([("general.alignment", U32, 1 << 31)]), "power of two"),
    "alignment text": (Forge([("general.alignment", STRING, "32")]), "power of two"),
    "name length": (Forge([("a", U32, 1)], [("n" * 65, (2,), 0, None)]), "length of a tensor's name"),
    "name twice": (Forge([("a", U32, 1)], [("n", (2,), 0, None), ("n", (2,), 0, None)]), "two tensors are called"),
    "no dims": (Forge([("a", U32, 1)], [("n", (), 0, None)]), "0 dimensions"),
    "five dims": (Forge([("a", U32, 1)], [("n", (1,) * 5, 0, None)]), "5 dimensions"),
    "dim 0": (Forge([("a", U32, 1)], [("n", (0, 4), 0, None)]), "dimension of 0"),
    "part of a block": (Forge([("a", U32, 1)], [("n", (33,), 8, None)]), "stores 32 at a time"),
    "tensor type": (Forge([("a", U32, 1)], [("n", (2,), 0, None)]).bytes().replace(struct.pack("<QIQ", 2, 0, 0), struct.pack("<QIQ", 2, 99, 0)), "unknown type 99"),  # noqa: E501
    # 2^32 x 2^32 values of 4 bytes wrap to 0 in 64 bits, and (2^30 + 1) x 4 to 4 in 32.
    "size wraps in 64 bits": (Forge([("a", U32, 1)], [("n", (1 << 32, 1 << 32), 0, b"")]), "ends at byte"),
    "size wraps in 32 bits": (Forge([("a", U32, 1)], [("n", ((1 << 30) + 1,), 0, bytes(64))]), "ends at byte"),
    "offset wraps": (places(0, (1 << 64) - 32), "ends at byte"),
    "past the end": (places(0, 256), "ends at byte"),
    "unaligned": (places(0, 40), "no multiple of 32"),
    "overlap": (places(0, 32, sizes=(16, 8)), "overlap"),
    "same place": (places(32, 32), "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_are_told_apart(tmp_path: Path, name: str) -> None:
    given, match = LIES[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(given if isinstance(given, bytes) else given.bytes())
    with pytest.raises(ConfigError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_touching_tensors_and_gaps_are_fine(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(places(64, 0))
    assert [entry.stop - entry.start for entry in read(tmp_path / "x.gguf").tensors.values()] == [32, 32]


def test_what_lies_cost(tmp_path: Path) -> None:
    """Counts that a file cannot hold cost neither time nor memory."""
    for name in (
        "tensors",
        "keys",
        "many keys",
        "key length",
        "array count",
        "array past the end",
        "size wraps in 64 bits",
    ):
        given, _ = LIES[name]
        path = tmp_path / "x.gguf"
        path.write_bytes(given if isinstance(given, bytes) else given.bytes())
        tracemalloc.start()
        began = time.monotonic()
        with pytest.raises(ConfigError):
            read(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20, name
        assert time.monotonic() - began < 1.0, name


def test_long_headers_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 100)
    path = Forge([("a", STRING, "x" * 200)]).write(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="goes on for more than 100 bytes"):
        read(path)
    monkeypatch.setattr(header, "MAX_STRING_BYTES", 10)
    path = Forge([("a", ARRAY, (STRING, ["x" * 10, "y" * 11]))]).write(tmp_path / "z.gguf")
    with pytest.raises(ConfigError, match="the length of string 1 of a is 11; at most 10"):
        read(path)
    monkeypatch.setattr(header, "MAX_ITEMS", 3)
    path = Forge([("a", ARRAY, (U32, [1, 2])), ("b", ARRAY, (U32, [1, 2]))]).write(tmp_path / "y.gguf")
    with pytest.raises(ConfigError, match="b brings the metadata to more than 3 values"):
        read(path)


def survives(path: Path, data: bytes, act: Callable[[Path], None] = use) -> bool:
    """Whether changed bytes still make a model; anything but that and a ConfigError fails."""
    path.write_bytes(data)
    try:
        act(path)
    except ConfigError as error:
        told = str(error)
    else:
        return True
    assert len(told) < 2000
    return False


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_truncations(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "x.gguf"
    whole = model(architecture).bytes() if architecture == "llama" else qwen3().bytes()
    assert survives(path, whole)
    header_end = read(path).tensors["token_embd.weight"].start
    ends = [*range(header_end + 64), *range(header_end + 64, len(whole), 512), len(whole) - 32 - 1]
    for end in ends:
        assert not survives(path, whole[:end], lambda p: (read(p), use(p))[1]), end


def qwen3() -> Forge:
    forge = model("qwen3")
    forge.tensors += [(f"blk.0.attn_{x}_norm.weight", (8,), 0, None) for x in "qk"]
    return forge


def qwen2() -> Forge:
    forge = model("qwen2", vocab=13)
    forge.tensors += [(f"blk.0.attn_{x}.bias", (size,), 0, None) for x, size in (("q", 32), ("k", 16), ("v", 16))]
    return forge


INTERESTING = [0, 1, 7, 8, 9, 12, 13, 0x7F, 0x80, 0xFF]


@pytest.mark.parametrize("seed", range(3))
def test_changed_bytes(tmp_path: Path, seed: int) -> None:
    """Single bytes, runs, and whole numbers of the header, changed at random: a model or a ConfigError, in little time."""
    rng = random.Random(seed)
    path = tmp_path / "x.gguf"
    whole = (model(), qwen3(), qwen2())[seed].bytes()
    path.write_bytes(whole)
    header_end = read(path).tensors["token_embd.weight"].start
    worst, good = 0.0, 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(header_end)
            match rng.randrange(4):
                case 0:
                    data[at] = rng.choice(INTERESTING)
                case 1:
                    data[at] ^= 1 << rng.randrange(8)
                case 2:
                    size = rng.choice((4, 8))
                    data[at : at + size] = rng.choice((0, 1, (1 << 31) - 1, (1 << 32) - 1)).to_bytes(size, "little")
                case 3:
                    del data[at : at + rng.choice((1, 4, 8))]
        began = time.monotonic()
        good += survives(path, bytes(data))
        worst = max(worst, time.monotonic() - began)
    assert 0 < good < 400, "changes of names and templates are harmless, others are not"
    assert worst < 10.0


def test_every_byte_of_the_vocabulary(tmp_path: Path) -> None:
    """The tokenizer's keys alone, with every byte set to 255 and to 0."""
    forge = model()
    forge.metadata = [m for m in forge.metadata if str(m[0]).startswith("tokenizer")]
    forge.tensors = []
    whole = forge.bytes()
    path = tmp_path / "x.gguf"
    for at in range(24, len(whole)):
        for byte in (0, 255):
            survives(path, whole[:at] + bytes([byte]) + whole[at + 1 :], lambda p: [Tokenizer.load(p), None][1])
