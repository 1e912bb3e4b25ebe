"""Loading, special tokens, BOS, and everything that can be wrong with tokenizer files or with a text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from weft.errors import ConfigError, RequestError
from weft.front import tokenizer as module
from weft.front.tokenizer import Tokenizer

Load = Callable[..., Tokenizer]
Shared = Callable[[str], Path]
VOCAB = {"a": 0, "b": 1, "c": 2, "<s>": 3, "</s>": 4, "<x>": 5, "[M]": 6}


def backend(*, post: bool = False, vocab: dict[str, int] | None = None) -> Backend:
    """Characters as tokens, so that ids can be read off the text."""
    made = Backend(models.WordLevel(vocab or VOCAB, unk_token="c"))
    made.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    made.decoder = decoders.Fuse()
    if post:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return made


def folder(path: Path, made: Backend, **config: Any) -> Path:
    made.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


# ---------------------------------------------------------------------------------------------- BOS and EOS


@pytest.mark.parametrize(
    ("post", "config", "want"),
    [
        (False, {}, [0]),
        (True, {}, [3, 0]),
        (True, {"add_bos_token": False}, [0]),
        (False, {"add_bos_token": True}, [3, 0]),
        (False, {"add_bos_token": True, "add_eos_token": True}, [3, 0, 4]),
        (False, {"add_eos_token": True}, [0, 4]),
        (True, {"add_bos_token": True}, [3, 0]),
    ],
)
def test_bos_and_eos_follow_the_configuration(
    tmp_path: Path, post: bool, config: dict[str, Any], want: list[int]
) -> None:
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    tokenizer = Tokenizer.load(folder(tmp_path, backend(post=post), **named, **config))
    assert tokenizer.encode("a") == want
    assert tokenizer.encode("a", add_special=False) == [0]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (3, (4,))
    assert tokenizer.encode_batch(["a", "a"]) == [want, want]


def test_bos_never_comes_twice(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(
        folder(tmp_path, backend(post=True), bos_token="<s>", eos_token="</s>", add_eos_token=True)
    )
    tokenizer_bos = Tokenizer.load(folder(tmp_path, backend(), bos_token="<s>", add_bos_token=True))
    for one in (tokenizer_bos,):
        assert one.encode("<s>a") == [3, 0]
        assert one.encode("a") == [3, 0]
        assert one.encode("") == [3]
        assert one.encode("<s>") == [3]
    assert tokenizer.encode("a</s>") == [0, 4]


def test_llama3_text_with_bos(tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of("llama3")
    assert tokenizer.encode("hi")[0] == tokenizer.bos_id
    assert tokenizer.encode("<|begin_of_text|>hi") == tokenizer.encode("hi")
    assert tokenizer.token_to_id("<|eot_id|>") == 128009
    assert tokenizer.token_to_id("<|reserved_special_token_247|>") == 128255
    assert tokenizer.vocab_size == 128256


# ---------------------------------------------------------------------------------------------- special tokens


def test_special_tokens_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "ignored"}))
    listed = {"5": {"content": "<x>", "special": True}, "7": {"content": "<new>", "special": False}}
    path = folder(tmp_path, backend(), bos_token="<s>", added_tokens_decoder=listed, additional_special_tokens=["[M]"])
    tokenizer = Tokenizer.load(path)
    assert tokenizer.special_ids == {3, 4, 5, 6}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.encode("a<x><new>[M]") == [0, 5, 7, 6]
    assert tokenizer.decode([0, 5, 7, 6, 1]) == "a<new>b"
    assert tokenizer.decode([0, 5, 7, 6, 1], skip_special=False) == "a<x><new>[M]b"
    assert tokenizer.vocab_size == 8


def test_special_tokens_can_be_read_as_characters(tmp_path: Path) -> None:
    letters = {c: i for i, c in enumerate("c<>/sa")} | {"<s>": 6}
    tokenizer = Tokenizer.load(folder(tmp_path, backend(vocab=letters), bos_token="<s>"))
    assert tokenizer.encode("<s>a") == [6, 5]
    assert tokenizer.encode("<s>a", parse_special=False) == [1, 4, 2, 5]
    assert tokenizer.encode("<s>a") == [6, 5], "the switch must not stick"


def test_a_named_token_without_an_id_stays_without_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder(tmp_path, backend(), bos_token="<nowhere>", add_bos_token=True))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("a") == [0]
    assert tokenizer.vocab_size == len(VOCAB)


def test_token_bytes(tokenizer_of: Load) -> None:
    for name in ("bundled", "llama2", "llama3"):
        tokenizer = tokenizer_of(name)
        ids = tokenizer.encode("né 👍\n", add_special=False)
        joined = b"".join(tokenizer.token_bytes(i) for i in ids)
        assert joined.removeprefix(b" ") == "né 👍\n".encode()
        eos = tokenizer.eos_ids[0]
        assert tokenizer.token_bytes(eos).decode() == tokenizer.special_tokens["eos_token"]
        assert tokenizer.token_bytes(10**7) == b""
        assert tokenizer.token_bytes(-1) == b""
        assert tokenizer.id_to_token(-1) is None
    assert tokenizer_of("llama2").token_bytes(13) == b"\n"
    assert tokenizer_of("llama2").token_text(0x80 + 3) == "\ufffd"


def test_many_threads(tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of("bundled")
    texts = [f"<|user|>thread {i} says hello<|end|>" * (1 + i % 7) for i in range(200)]

    def both(text: str) -> tuple[list[int], list[int], str]:
        ids = tokenizer.encode(text)
        return ids, tokenizer.encode(text, parse_special=False), tokenizer.decode(ids, skip_special=False)

    alone = [both(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both, texts)) == alone
    assert [text for _, _, text in alone] == texts


# ---------------------------------------------------------------------------------------------- other files


def test_gpt2_and_qwen2_files(tmp_path: Path, shared: Shared) -> None:
    from transformers import Qwen2Tokenizer

    source = shared("data/tokenizers/gpt2")
    shutil.copy(source / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(source / "vocab.bpe", tmp_path / "merges.txt")
    gpt2 = Tokenizer.load(tmp_path)
    assert gpt2.encode("Hello world 12345") == [15496, 995, 17031, 2231]
    assert (gpt2.bos_id, gpt2.eos_ids, gpt2.special_ids) == (50256, (50256,), {50256})
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    qwen = Tokenizer.load(tmp_path)
    reference = Qwen2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for text in ("Hello world 12345", "  two\n\n\tlines' HE'LL e\u0301", "你好 (x)=>{y}\r\n"):
        assert qwen.encode(text, add_special=False) == reference.encode(text, add_special_tokens=False)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "StrangeTokenizer"}')
    with pytest.raises(ConfigError, match=r"StrangeTokenizer.*tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_llama3_names_of_the_checkpoint_win(tmp_path: Path, shared: Shared) -> None:
    (tmp_path / "tokenizer.model").symlink_to(shared("data/tokenizers/llama3/tokenizer.model"))
    listed = {"128004": {"content": "<|reserved_special_token_2|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<|reserved_special_token_2|>", add_special=False) == [128004]
    assert tokenizer.token_to_id("<|eot_id|>") == 128009


# ---------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_tokenizer_json(tmp_path: Path, bundled: Path, part: float) -> None:
    whole = (bundled / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*fetch it again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer.json", b"\x80\x04\x95 pickle", "tokenizer"),
        ("tokenizer.json", b"[]", "tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[1]", "must hold a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"special": true}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"content": "a"}}}', "do not belong together"),
        ("special_tokens_map.json", b"null", "must hold a JSON object"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    folder(tmp_path, backend())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        Tokenizer.load(tmp_path)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is needed"):
        Tokenizer.load(tmp_path)


def test_broken_sentencepiece_models(tmp_path: Path, shared: Shared) -> None:
    whole = shared("data/tokenizers/llama2/tokenizer.model").read_bytes()
    for end in (1, 10, 1000, len(whole) // 2, len(whole) - 3):
        (tmp_path / "tokenizer.model").write_bytes(whole[:end])
        with pytest.raises(ConfigError, match=r"tokenizer\.model"):
            Tokenizer.load(tmp_path)
    for content in (b"", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0a\x00" * 10, b"\x0a\x06\x0a\x02hi\x12\x00"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ConfigError, match=r"tokenizer\.model"):
            Tokenizer.load(tmp_path)


def test_broken_ranks(tmp_path: Path, shared: Shared) -> None:
    lines = shared("data/tokenizers/llama3/tokenizer.model").read_bytes().splitlines(keepends=True)
    for content, match in (
        (b"".join(lines[:200]), "256 bytes"),
        (b"".join(lines[:5000]), "Llama 3"),
        (b"".join(lines[:300]) + b"not base64! x\n", "line 301"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ConfigError, match=match):
            Tokenizer.load(tmp_path)


# ---------------------------------------------------------------------------------------------- bad texts


def test_limits_on_texts(tokenizer_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("bundled")
    assert module.MAX_TEXT_CHARS == 16 << 20
    with pytest.raises(RequestError, match="at most 16777216"):
        tokenizer.encode("a" * ((16 << 20) + 1))
    monkeypatch.setattr(module, "MAX_TEXT_CHARS", 10)
    assert tokenizer.encode("a" * 10)
    with pytest.raises(RequestError, match="at most 10"):
        tokenizer.encode_batch(["a", "a" * 11])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", 7, None, b"bytes", ["a"]])
def test_what_is_not_text(tokenizer_of: Load, text: Any) -> None:
    tokenizer = tokenizer_of("bundled")
    with pytest.raises(RequestError):
        tokenizer.encode(text)
    with pytest.raises(RequestError):
        tokenizer.encode_batch(["fine", text])


def test_odd_but_good_texts(tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of("bundled")
    for text in ("", "\x00", "\ufeff", "\uffff", "\U0010ffff", "a\x00b", " " * 100_000, "\u0301" * 1000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_settings_in_the_file_never_cut_or_pad(tmp_path: Path) -> None:
    made = backend()
    made.enable_truncation(2)
    made.enable_padding(length=8)
    assert Tokenizer.load(folder(tmp_path, made)).encode("abcabc") == [0, 1, 2, 0, 1, 2]


WORDS = """
import random, sys
from weft.exec.host import rss_bytes
from weft.front.tokenizer import Tokenizer

tokenizer, special, chance = Tokenizer.load(sys.argv[1]), sys.argv[2] == "1", random.Random(1)
letters = "abcdefghijklmnopqrstuvwxyz"

def read(texts):
    for _ in range(texts):
        tokenizer.encode(" ".join("".join(chance.choices(letters, k=240)) for _ in range(50)), parse_special=special)

read(1)
before = rss_bytes()
read(200)
print(rss_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("special", ["0", "1"])
def test_words_that_come_once_are_not_kept_for_ever(bundled: Path, special: str) -> None:
    """10,000 of 240 letters take 80 MB where the library's own bound holds."""
    command = [sys.executable, "-c", WORDS, str(bundled), special]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(module.__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 << 20
