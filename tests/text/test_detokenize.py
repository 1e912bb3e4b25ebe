"""Streamed text: deltas that concatenate to the decoded whole, stop strings across every border, offsets."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from weft.front.decoding import plan_decoder
from weft.front.detokenize import Detokenizer, SequenceText, StopStrings
from weft.front.tokenizer import Tokenizer

Load = Callable[..., Tokenizer]
NAMES = ["bundled", "llama2", "llama3", "gpt2", "phi-2", "phi-3", "falcon", "t5"]


@st.composite
def ids_in_cuts(draw: st.DrawFn) -> tuple[list[float], list[int], str]:
    """Ids as fractions of a vocabulary (bytes and special tokens lie at its ends), sizes of the cuts, and a text."""
    near = st.one_of(st.floats(0, 1), st.floats(0, 0.01), st.floats(0.99, 1.01))
    fractions = draw(st.lists(near, max_size=30))
    return fractions, draw(st.lists(st.integers(0, 4), min_size=1, max_size=8)), draw(st.text(max_size=12))


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    parts, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)] if any(sizes) else 1
        parts.append(ids[at : at + size])
        at, turn = at + size, turn + 1
    return parts


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(case=ids_in_cuts(), skip=st.booleans())
def test_deltas_concatenate_to_the_decoded_text(
    tokenizer_of: Load, name: str, case: tuple[list[float], list[int], str], skip: bool
) -> None:
    tokenizer, (fractions, sizes, text) = tokenizer_of(name), case
    ids = [int(f * tokenizer.vocab_size) for f in fractions]
    middle = len(ids) // 2
    ids[middle:middle] = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, skip_special=skip)
    shown = [detokenizer.push(part) for part in cut(ids, sizes)]
    assert "".join(shown) + detokenizer.finish() == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("name", NAMES)
def test_all_bytes_in_all_pairs(tokenizer_of: Load, name: str) -> None:
    """Broken UTF-8 of every kind: each pair of byte tokens, and each byte after a lead byte of four."""
    tokenizer = tokenizer_of(name)
    byte_ids = [i for i in range(min(tokenizer.vocab_size, 1000)) if len(tokenizer.token_bytes(i)) == 1][:256]
    lead = next((i for i in byte_ids if tokenizer.token_bytes(i) == b"\xf0"), byte_ids[-1])
    for first in byte_ids[::3]:
        for second in byte_ids[::5]:
            ids = [lead, first, second]
            detokenizer = Detokenizer(tokenizer)
            text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()
            assert text == tokenizer.decode(ids)


DECODERS = {
    "none": None,
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "strip each": decoders.Sequence([decoders.Strip("a", 2, 0), decoders.Replace("b", "xy")]),
    "strip each tail": decoders.Strip("b", 0, 1),
    "strip head": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]),
    "strip tail": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 0, 1)]),
    "replace all": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "-")]),
    "replace char": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("b", "")]),
    "fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "bytes twice": decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
}


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(
        st.sampled_from(["a", "aa", "ba", "ab", "\u2581a", "##b", "b</w>", "<0xE4>", "<0xBD>", "\u2581", " "])
    )
)
def test_every_decoder_streams_or_waits(kind: str, tokens: list[str]) -> None:
    """A decoder step has an exact streaming form, or the text comes at the end; never something else."""
    decoder = DECODERS[kind]
    plan = plan_decoder(decoder)
    stages, shown = plan.open(), []
    for token in tokens:
        pieces = [plan.piece(token)]
        for stage in stages:
            pieces = stage.feed(pieces)
        shown += pieces
    rest: list[str] = []
    for stage in stages:
        rest = stage.feed(rest) + stage.end()
    want = " ".join(tokens) if decoder is None else decoder.decode(tokens) if tokens else ""
    assert "".join(shown + rest) == want


def test_text_comes_as_soon_as_it_can(tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of("bundled")
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push([i]) for i in tokenizer.encode("a👍b", parse_special=False)]
    assert "".join(shown) == "a👍b"
    assert shown[0] == "a"
    assert "👍" in shown, "the character came whole, with the token that completes it"
    unfinished = Detokenizer(tokenizer)
    ids = tokenizer.encode("👍")
    assert unfinished.push(ids[:-1]) == ""
    assert unfinished.finish() == "\ufffd"


def test_cost_is_linear(tokenizer_of: Load) -> None:
    """Decoding everything at each token would take hours here."""
    tokenizer = tokenizer_of("bundled")
    text, ids = SequenceText(tokenizer, stops=("never to be found",)), tokenizer.encode("over and over again ") * 15_000
    start = time.perf_counter()
    for i in ids:
        text.push((i,))
    assert text.tokens == len(ids)
    assert time.perf_counter() - start < 20


# ---------------------------------------------------------------------------------------------- stop strings


def naive_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: cut at the occurrence that ends first, the longest of those that end there."""
    found = [(at + len(s), at, s) for s in stops for at in range(len(text)) if text.startswith(s, at)]
    if not found:
        return text, None
    end, start, stop = min(found)
    return (text[:end] if include else text[:start]), stop


letters = st.text(alphabet="abc\u00e9", max_size=40)
few_stops = st.lists(st.text(alphabet="abc\u00e9", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(text=letters, stops=few_stops, sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), include=st.booleans())
def test_stop_strings_equal_a_naive_search(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    search, shown, hit = StopStrings(stops, include=include), "", None
    for part in cut([ord(c) for c in text], sizes):
        new, hit = search.push("".join(map(chr, part)))
        shown += new
        want, _ = naive_stop(text, stops, include)
        assert want.startswith(shown), "something was shown that had to stay hidden"
    if hit is None:
        shown += search.finish()
    assert (shown, hit) == naive_stop(text, stops, include)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    search = StopStrings(["</end>", "###"])
    assert search.push("hello </e") == ("hello ", None)
    assert search.push("x##") == ("</ex", None)
    assert search.push(" #") == ("## ", None)
    assert search.push("##!") == ("", "###")
    assert search.push("more") == ("", "###")
    assert StopStrings(["ab"], include=True).push("xa") == ("xa", None)


def test_hostile_stop_strings_cost_little() -> None:
    stops = ["a" * i + "b" for i in range(900, 964)]
    search, start = StopStrings(stops), time.perf_counter()
    for _ in range(3000):
        search.push("aaaa")
    assert search.push("b")[1] == "a" * 963 + "b"
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------- sequences


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab \u00e9👍", max_size=30),
    stops=st.lists(st.text(alphabet="ab \u00e9👍", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    include=st.booleans(),
    least=st.integers(0, 8),
)
def test_sequence_equals_its_definition(
    tokenizer_of: Load, text: str, stops: list[str], sizes: list[int], include: bool, least: int
) -> None:
    tokenizer = tokenizer_of("bundled")
    ids = tokenizer.encode(text)
    sequence = SequenceText(tokenizer, stops=stops, include_stop=include, min_tokens=least)
    shown, hit = "", None
    for part in [*cut(ids, sizes), None]:
        new, hit = sequence.push(part or [], finished=part is None)
        shown += new
    per_token, detokenizer = [], Detokenizer(tokenizer)
    for i in ids:
        per_token.append(detokenizer.push([i]))
    early = "".join(per_token[:least])
    late = "".join(per_token[least:]) + detokenizer.finish()
    want, want_hit = naive_stop(late, stops, include) if len(ids) > least else (late, None)
    assert (shown, hit) == (early + want, want_hit)
    assert sequence.text == shown
    starts = [len("".join(per_token[:i])) for i in range(len(ids))]
    assert sequence.offsets == starts[: sequence.tokens]
    if hit is None:
        assert sequence.tokens == len(ids)
    else:
        assert starts[sequence.tokens - 1] <= len(early) + len(naive_stop(late, stops, True)[0])


def test_tokens_behind_a_stop_string_are_not_taken(tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of("bundled")
    ids = tokenizer.encode("one. two three four")
    sequence = SequenceText(tokenizer, stops=("two",))
    assert sequence.push(ids) == ("one. ", "two")
    used = sequence.tokens
    assert 0 < used < len(ids)
    assert tokenizer.decode(ids[:used]).endswith("two")
    assert len(sequence.offsets) == used
    assert sequence.push(ids, finished=True) == ("", "two")
    assert sequence.tokens == used


def test_a_stop_id_adds_no_text_when_it_is_the_last(tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of("bundled")
    end = tokenizer.eos_ids[0]
    body = tokenizer.encode("hello")
    for include, want in ((False, "hello"), (True, "hello<|end|>")):
        sequence = SequenceText(tokenizer, skip_special=False, stop_ids=(end,), include_stop=include)
        sequence.push([*body, end])
        sequence.push([], finished=True)
        assert sequence.text == want
        assert sequence.tokens == len(body) + 1
    going_on = SequenceText(tokenizer, skip_special=False, stop_ids=(end,))
    going_on.push([*body, end])
    going_on.push(body, finished=True)
    assert going_on.text == "hello<|end|>hello", "an id that did not end the sequence is text like any other"


def test_ids_without_a_token_are_silent() -> None:
    tokenizer = Tokenizer(Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
    sequence = SequenceText(tokenizer)
    sequence.push([0, 7, 1, 1 << 40], finished=True)
    assert sequence.text == "a b"
    assert tokenizer.token_bytes(7) == b""
