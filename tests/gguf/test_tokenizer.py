"""Tokenizers inside GGUF files: ggml's own pairs of texts and ids, and everything around a tokenizer that the metadata say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gguf.forge import ARRAY, BOOL, F32, I32, STRING, U32, Forge, model
from weft.errors import ConfigError
from weft.front.gguf import PATTERNS, tokenizer
from weft.front.sentencepiece import parse_model
from weft.front.text import ModelText
from weft.front.tokenizer import Tokenizer

Shared = Callable[[str], Path]
PROSE = (
    "The sea was calm that morning, and nobody spoke.\n\n  Don't you think that 12 345 men's hats (or 6,789) are enough?",
    "Grüße aus Köln, 你好 👍🏽 e\u0301 \u00a0 \t\n x\r\n",
    "<|user|> hello<|end|> <s> a </s> <|endoftext|>",
)


def cases(shared: Shared, name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's own pairs: text, and one line of ids for it."""
    stem = shared(f"data/tokenizers/ggml-vocab/ggml-vocab-{name}.gguf.inp")
    texts = stem.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = stem.with_suffix(".out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines)]


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gpt-2", "mpt", "falcon"])
def test_ggml_vectors(shared: Shared, name: str) -> None:
    found = Tokenizer.load(shared(f"data/tokenizers/ggml-vocab/ggml-vocab-{name}.gguf"))
    pairs = cases(shared, name)
    assert len(pairs) >= 46
    for text, ids in pairs:
        assert found.encode(text, add_special=False) == ids, repr(text)
        if name in ("llama-spm", "gpt-2"):
            assert found.decode(ids) == text


def test_ggml_vectors_of_llama_3(shared: Shared, tmp_path: Path) -> None:
    """llama-bpe's vocabulary is not among ggml's small files: the same tokens and merges, from Meta's own file."""
    import json

    from weft.front.convert import convert

    backend, _ = convert(shared("data/tokenizers/llama3"), {})
    told = json.loads(backend.to_str())
    special = {token["id"] for token in told["added_tokens"]}
    tokens = [text for text, _ in sorted(told["model"]["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(pair) for pair in told["model"]["merges"]]
    forge = Forge(
        [
            ("tokenizer.ggml.model", STRING, "gpt2"),
            ("tokenizer.ggml.pre", STRING, "llama-bpe"),
            ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
            ("tokenizer.ggml.token_type", ARRAY, (I32, [3 if i in special else 1 for i in range(len(tokens))])),
            ("tokenizer.ggml.merges", ARRAY, (STRING, merges)),
            ("tokenizer.ggml.bos_token_id", U32, 128000),
        ]
    )
    found = Tokenizer.load(forge.write(tmp_path / "x.gguf"))
    for text, ids in cases(shared, "llama-bpe"):
        assert found.encode(text, add_special=False) == ids, repr(text)
    assert found.encode("a") == [128000, *found.encode("a", add_special=False)], (
        "BOS stands before text without being asked for"
    )


def spm(shared: Shared) -> Forge:
    """Llama 2's SentencePiece model as metadata."""
    parsed = parse_model(shared("data/tokenizers/llama2/tokenizer.model").read_bytes())
    texts, scores, kinds = zip(*parsed.pieces)
    return Forge(
        [
            ("tokenizer.ggml.model", STRING, "llama"),
            ("tokenizer.ggml.tokens", ARRAY, (STRING, texts)),
            ("tokenizer.ggml.scores", ARRAY, (F32, scores)),
            ("tokenizer.ggml.token_type", ARRAY, (I32, kinds)),
        ]
    )


def test_sentencepiece_equals_its_own_file(shared: Shared, tmp_path: Path) -> None:
    ours = Tokenizer.load(spm(shared).write(tmp_path / "x.gguf"))
    theirs = Tokenizer.load(shared("data/tokenizers/llama2"))
    for text in PROSE:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos_id, ours.eos_ids, ours.special_ids) == (theirs.bos_id, theirs.eos_ids, theirs.special_ids)
    bare = Tokenizer.load(spm(shared).set("tokenizer.ggml.add_space_prefix", BOOL, False).write(tmp_path / "y.gguf"))
    assert bare.encode(" the sea", add_special=False) == theirs.encode("the sea", add_special=False)


def test_the_bundled_model(bundled: Path, bundled_gguf: Callable[..., Path]) -> None:
    """Ids, ends, template and sampling are those of the folder that the file was made from."""
    ours, theirs = ModelText.load(bundled_gguf()), ModelText.load(bundled)
    for text in PROSE:
        assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.special_tokens == theirs.tokenizer.special_tokens
    assert ours.tokenizer.special_ids == theirs.tokenizer.special_ids
    assert (ours.eos_ids, ours.bos_id, ours.vocab_size) == (theirs.eos_ids, theirs.bos_id, theirs.vocab_size)
    assert ours.defaults == theirs.defaults == {"temperature": 0.7, "top_p": 0.95}
    assert ours.template.templates == theirs.template.templates
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    assert ours.chat_ids(messages) == theirs.chat_ids(messages)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "a 1234 it's  x", ["a", " 1234", " it", "'s", " ", " x"]),
        ("gpt-2", "IT'S!!\n\n ok", ["IT", "'", "S", "!!", "\n\n", " ok"]),
        ("llama-bpe", "a 1234 IT'S!!\n\nok", ["a", " ", "123", "4", " IT", "'S", "!!\n\n", "ok"]),
        ("qwen2", "a 1234 IT'S!!\n\nok", ["a", " ", "1", "2", "3", "4", " IT", "'S", "!!\n\n", "ok"]),
        ("smollm", "a 123 it's", ["a", " ", "1", "2", "3", " it", "'s"]),
        ("default", "a 1234!x it's", ["a", " ", "123", "4", "!", "x", " it", "'", "s"]),
        ("tekken", "a 12 HelloWorld it's", ["a", " ", "1", "2", " Hello", "World", " it", "'s"]),
        ("gpt-4o", "a 1234 HelloWorld it's", ["a", " ", "123", "4", " Hello", "World", " it's"]),
    ],
)
def test_words(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    """Worked by hand from the patterns that the names stand for."""
    backend, _ = tokenizer(model().set("tokenizer.ggml.pre", STRING, name).write(tmp_path / "x.gguf"))
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in pieces] == words


def test_merges_special_and_own_tokens(tmp_path: Path) -> None:
    """abcdeĠ = 0-5, ab = 6, abc = 7, Ġa = 8, <s> = 9, </s> = 10, <own> = 11."""
    path = model().write(tmp_path / "x.gguf")
    found = Tokenizer.load(path)
    assert found.encode("abcd aab") == [9, 7, 3, 8, 6]
    assert found.encode("<s>ab</s><own>e", add_special=False) == [9, 6, 10, 11, 4]
    assert found.special_ids == {9, 10}, "a token of the user's is no special one"
    assert found.decode([9, 7, 11, 10]) == "abc<own>"
    whole = model().set("tokenizer.ggml.pre", STRING, "llama3").set("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"]))
    assert Tokenizer.load(whole.write(path)).encode("abc", add_special=False) == [7], (
        "words that are tokens need no merges"
    )
    assert Tokenizer.load(whole.set("tokenizer.ggml.pre", STRING, "qwen2").write(path)).encode(
        "abc", add_special=False
    ) == [6, 2]


def test_text_is_composed_for_qwen(tmp_path: Path) -> None:
    """e and a combining accent are two characters or one; the one is Ã© in the alphabet of bytes."""
    forge = model("qwen2").set(
        "tokenizer.ggml.tokens", ARRAY, (STRING, ["e", "Ã", "©", "Ã©", "Ì", "ģ", *"abcd", "x", "y"])
    )
    forge.set("tokenizer.ggml.merges", ARRAY, (STRING, ["Ã ©"])).set("tokenizer.ggml.pre", STRING, "qwen2")
    path = forge.write(tmp_path / "x.gguf")
    assert Tokenizer.load(path).encode("e\u0301", add_special=False) == [3]
    path = forge.set("tokenizer.ggml.pre", STRING, "gpt-2").write(path)
    assert Tokenizer.load(path).encode("e\u0301", add_special=False) == [0, 4, 5]


def test_around_a_text(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert Tokenizer.load(model().set("tokenizer.ggml.add_bos_token", BOOL, False).write(path)).encode("a") == [0]
    both = model().set("tokenizer.ggml.add_eos_token", BOOL, True)
    assert Tokenizer.load(both.write(path)).encode("a") == [9, 0, 10]
    assert Tokenizer.load(model().drop("tokenizer.ggml.add_bos_token").write(path)).encode("a") == [0]
    none = model().set("tokenizer.ggml.bos_token_id", U32, 0xFFFFFFFF)
    assert Tokenizer.load(none.write(path)).bos_id is None


def test_ends_templates_and_sampling(tmp_path: Path) -> None:
    tokens = [*"abcdeĠ", "ab", "abc", "Ġa", "<|endoftext|>", "<|eot_id|>", "<|im_end|>"]
    forge = model().set("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)).set("tokenizer.ggml.eom_token_id", U32, 8)
    forge.set("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 9 + [3, 3, 1])).set("tokenizer.ggml.eot_token_id", U32, 7)
    forge.set("general.sampling.temp", F32, 0.6).set("general.sampling.top_k", I32, 20)
    forge.set("general.sampling.penalty_repeat", F32, 1.05)
    forge.set("tokenizer.chat_template.tool_use", STRING, "tools").set(
        "tokenizer.chat_templates", ARRAY, (STRING, ["tool_use"])
    )
    text = ModelText.load(forge.write(tmp_path / "x.gguf"))
    assert text.eos_ids == (10, 7, 8, 9), "eos, eot, eom, and control tokens of that name; an ordinary token is none"
    assert text.defaults == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    assert text.template.templates == {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    assert text.vocab_size == 12
    wider = ModelText.load(model(vocab=20).write(tmp_path / "x.gguf"))
    assert wider.vocab_size == 20, "rows of the embedding, not tokens"


T = "tokenizer.ggml."
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (lambda: model().set(T + "model", STRING, "bert"), r"'bert' \(tokenizer\.ggml\.model\) is not read"),
    "no model": (lambda: model().drop(T + "model"), "'None'"),
    "no tokens": (lambda: model().drop(T + "tokens"), "no tokenizer.ggml.tokens"),
    "numbers for tokens": (lambda: model().set(T + "tokens", ARRAY, (U32, [1])), "no array of str"),
    "no array": (lambda: model().set(T + "tokens", STRING, "abc"), "no array of str"),
    "twice": (lambda: model().set(T + "tokens", ARRAY, (STRING, ["a"] * 12)), "lists a token twice"),
    "types": (lambda: model().set(T + "token_type", ARRAY, (I32, [1])), "has 1 values for 12 tokens"),
    "unknown pre": (lambda: model().set(T + "pre", STRING, "joe"), r"'joe' \(tokenizer\.ggml\.pre\) splits text is not known"),
    "merge": (lambda: model().set(T + "merges", ARRAY, (STRING, ["ab"])), "has 'ab'; expected two tokens"),
    "merge of nothing": (lambda: model().set(T + "merges", ARRAY, (STRING, ["x y"])), "merges cannot be used"),
    "eos": (lambda: model().set(T + "eos_token_id", U32, 12), "eos_token_id is 12; there are 12 tokens"),
    "flag": (lambda: model().set(T + "add_bos_token", U32, 1), "add_bos_token must be true or false"),
    "template": (lambda: model().set("tokenizer.chat_template", U32, 1), "chat_template must be text"),
    "scores": (lambda: model().set(T + "model", STRING, "llama"), "no tokenizer.ggml.scores"),
    "long token": (
        lambda: model().set(T + "tokens", ARRAY, (STRING, [*"abcdefghijk", "x" * 1025])), "up to 1025 characters"
    ),
    "sampling": (lambda: model().set("general.sampling.temp", STRING, "hot"), "temperature must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_tokenizers_that_are_refused(name: str, tmp_path: Path) -> None:
    forge, match = WRONG[name]
    path = forge().write(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match=match) as caught:
        ModelText.load(path)
    assert "x.gguf" in str(caught.value)


def test_names_that_are_asked_for() -> None:
    assert {"llama-bpe", "qwen2", "gpt-2", "smollm", "default", "falcon", "starcoder", "tekken"} <= PATTERNS.keys()
