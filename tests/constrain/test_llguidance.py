"""constrain=llguidance: which ids a grammar allows, against definitions that need no parser."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from weft.constrain import _common
from weft.constrain.llguidance import BYTES, LLGuidance, Path
from weft.errors import RequestError
from weft.exec.vocabulary import VocabularyShelf
from weft.front.text import ModelText
from weft.types import Grammar


@pytest.fixture(scope="module")
def constrain(words: VocabularyShelf) -> LLGuidance:
    made = LLGuidance()
    made.attach(words)
    return made


def spelled(**given: Any) -> LLGuidance:
    """Over a vocabulary of single bytes."""
    made = LLGuidance(**given)
    made.attach(VocabularyShelf(lambda: BYTES))
    return made


def allowed(path: Path, size: int) -> set[int]:
    bits = path.mask()
    return {i for i in range(size) if bits[i // 8] >> i % 8 & 1}


def beginnings(texts: list[str], done: bytes, text: ModelText) -> set[int]:
    """By definition: ids whose bytes, behind the output so far, begin one of the texts; and the ends, where it is one."""
    vocabulary = text.vocabulary()
    whole = [t.encode() for t in texts]
    found = {
        i for i, token in enumerate(vocabulary.tokens)
        if token and i not in vocabulary.special and any(t.startswith(done + token) for t in whole)
    }  # fmt: skip
    return found | (set(vocabulary.ends) if done in whole else set())


def test_the_mask_is_the_definition(constrain: LLGuidance, text: ModelText) -> None:
    """At every point of every text, for every id; the same set of texts written in four ways."""
    texts = ["the boat", "the bell", "there", 'a "quote"', "ünicode", "the"]
    alternatives = " | ".join(json.dumps(t) for t in texts)
    for grammar in (
        Grammar("choice", json.dumps(texts)),
        Grammar("regex", "|".join(map(re.escape, texts))),
        Grammar("grammar", f"start: {alternatives}"),
        Grammar("grammar", f"root ::= {alternatives}".replace("\\u00fc", "ü")),
    ):
        for whole in texts:
            path, so_far = constrain.begin(grammar), b""
            ids = text.tokenizer.encode(whole, add_special=False)
            for i in [*ids, None]:
                found, right = allowed(path, text.vocab_size), beginnings(texts, so_far, text)
                first = {t.encode()[len(so_far) :][:1] for t in texts if t.encode().startswith(so_far)}
                if len(first) > 1:
                    assert found == right, (grammar, so_far)
                else:  # one byte must follow: what the tokenizer would write is allowed, and perhaps nothing else
                    assert found <= right, (grammar, so_far)
                    assert found
                if i is not None:
                    assert path.advance([i]) == 1
                    so_far += text.tokenizer.token_bytes(i)
            assert path.advance([text.eos_ids[0]]) == 1
            assert allowed(path, text.vocab_size) == set(text.eos_ids), "behind an end stands nothing but ends"


def test_a_path_goes_back_and_parts(constrain: LLGuidance, text: ModelText) -> None:
    path = constrain.begin(Grammar("regex", "[ab]{2}c*"))
    a, b, c = (text.tokenizer.token_to_id(x) for x in "abc")
    assert None not in (a, b, c)
    end = text.eos_ids[0]
    assert path.advance([a, b, c, a, c]) == 3, "as many as the grammar allows"
    other = path.fork()
    assert path.advance([end]) == 1
    assert path.advance([c]) == 0
    path.rollback(1)
    assert path.advance([c, end, end]) == 3
    path.rollback(4)  # two ends and two of c
    assert path.advance([end]) == 1, "ab"
    path.rollback(2)
    assert path.advance([end]) == 0, "a alone is no text of it"
    assert other.advance([c]) == 1, "a fork goes on by itself"


def test_a_path_is_a_function_of_grammar_and_tokens(
    constrain: LLGuidance, text: ModelText, words: VocabularyShelf
) -> None:
    """However it got there, and whoever made it."""
    grammar = Grammar("json", '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}')
    ids = text.tokenizer.encode('{"a": "the boat", "b": 12', add_special=False)
    straight = constrain.begin(grammar)
    assert straight.advance(ids) == len(ids)
    crooked = constrain.begin(grammar)
    for i in ids:
        assert crooked.advance([i]) == 1
        crooked.mask()
        crooked.rollback(1)
        crooked = crooked.fork()
        assert crooked.advance([i]) == 1
    again = LLGuidance(items=900)
    again.attach(VocabularyShelf(lambda: words.vocabulary))
    fresh = again.begin(grammar)
    assert fresh.advance(ids) == len(ids)
    assert straight.mask() == crooked.mask() == fresh.mask()


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("json", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Grammar("json", '{"anyOf": [{"not": {"type": "string"}}, {"type": "integer"}]}'), "not"),
        (Grammar("json", '{"type": "string", "format": "hostname"}'), "hostname"),
        (Grammar("json", '{"type": "string", "format": "frob"}'), "frob"),
        (Grammar("json", '{"$ref": "http://example.org/other.json"}'), "example.org"),
        (Grammar("json", '{"a": '), "Expecting value"),
        (Grammar("json", "[" * 100_000), "recursion"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("grammar", "start: b"), "unknown name"),
        (Grammar("grammar", "root ::= b"), "'b' not found"),
        (Grammar("grammar", "start: s\ns: s s | \"a\" |\n"), None),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_held_is_refused_by_name(grammar: Grammar, says: str | None) -> None:
    if says is None:
        LLGuidance().check(grammar)  # ambiguous, and right: it may become too complex, see below
        return
    with pytest.raises(RequestError, match=re.escape(says)) as caught:
        LLGuidance().check(grammar)
    assert len(str(caught.value)) < 500


def test_a_grammar_that_explodes_ends_its_path() -> None:
    """Every token of this one doubles what the parser has to keep; rows are bounded."""
    path = spelled(items=100).begin(Grammar("grammar", 'start: s\ns: s s | "a" |\n'))
    with pytest.raises(RequestError, match="too complex"):
        path.advance(b"a" * 2000)


def test_arguments() -> None:
    for wrong in ({"items": 0}, {"items": 5000}, {"whitespace": -1}):
        with pytest.raises(ValueError, match="are needed"):
            LLGuidance(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("whitespace", [0, 1, 3])
def test_white_space_between_tokens_of_json_is_bounded(whitespace: int) -> None:
    made = LLGuidance(whitespace=whitespace)
    made.attach(VocabularyShelf(lambda: BYTES))
    path = made.begin(Grammar("json", '{"type": "array"}'))
    assert path.advance(b"[" + b" " * 10) == 1 + whitespace


# ---------------------------------------------------------------------------------------------- formats


def test_dates_are_those_of_the_calendar() -> None:
    import datetime

    pattern = re.compile(_common.date())
    for year in (1, 4, 100, 400, 1900, 1996, 2000, 2023, 2024, 2100, 9999):
        for month in range(14):
            for day in range(33):
                try:
                    real = bool(datetime.date(year, month, day))
                except ValueError:
                    real = False
                assert (pattern.fullmatch(f"{year:04}-{month:02}-{day:02}") is not None) == real


def test_a_leap_second_is_the_last_one_of_a_day_in_utc() -> None:
    pattern = re.compile(_common.time())
    for local in range(0, 1440, 7):
        for offset in [*range(0, 1440, 11), (local - 1439) % 1440, (1439 - local) % 1440]:
            for sign in (1, -1):
                shift = f"{'+' if sign > 0 else '-'}{offset // 60:02}:{offset % 60:02}"
                last = (local - sign * offset) % 1440 == 1439
                written = f"{local // 60:02}:{local % 60:02}:60{shift}"
                assert (pattern.fullmatch(written) is not None) == last, written
    assert pattern.fullmatch("23:59:60.25z")
    assert not pattern.fullmatch("22:59:60Z")
    assert pattern.fullmatch("00:00:59-23:59")


def test_addresses() -> None:
    import ipaddress

    pattern = re.compile(_common.ipv6())
    right = ":: ::1 1:: 1:2:3:4:5:6:7:8 1::8 1:2:3:4:5:6:7:: ::2:3:4:5:6:7:8 ::ffff:1.2.3.4 1:2::3.4.5.6 fe80::a"
    for one in right.split():
        assert ipaddress.IPv6Address(one), one
        assert pattern.fullmatch(one), one
    wrong = "1 :1 1: ::: 1:::2 1::2::3 1:2:3:4:5:6:7 1:2:3:4:5:6:7:8:9 12345:: ::1.2.3 ::256.1.1.1 ::01.2.3.4"
    for one in wrong.split():
        assert not pattern.fullmatch(one), one


def test_schemas_are_rewritten_where_schemas_stand_and_nowhere_else() -> None:
    schema: dict[str, Any] = {
        "properties": {"format": {"format": "date"}, "pattern": {"pattern": r"^\s[\S\d]$"}},
        "enum": [{"format": "date"}],
        "const": {"pattern": r"\s"},
        "anyOf": [{"format": "date", "pattern": "^2"}, {"format": "uuid"}],
    }
    found = _common.exact(schema)
    date = f"^{_common.date()}$"
    assert found["properties"]["format"] == {"pattern": date}
    assert found["properties"]["pattern"] == {"pattern": rf"^[{_common.SPACE}][[^{_common.SPACE}]\d]$"}
    assert found["enum"] == schema["enum"]
    assert found["const"] == schema["const"]
    assert found["anyOf"] == [{"pattern": "^2", "allOf": [{"pattern": date}]}, {"format": "uuid"}]
    assert _common.unheld({"const": {"format": "hostname"}}) is None
    assert _common.unheld({"items": [{"format": "hostname"}]}) is not None


def test_what_must_follow_is_written_as_the_tokenizer_writes_it(constrain: LLGuidance, text: ModelText) -> None:
    """Where there is one text, its tokens are those of the tokenizer: as few steps, and such as the model knows."""
    for whole in ("The lighthouse stood at the end", "ünïcode ≠ ascii", '{"name": "value"}', " two  spaces\n"):
        path = constrain.begin(Grammar("choice", json.dumps([whole])))
        ids: list[int] = []
        while len(found := allowed(path, text.vocab_size)) == 1:
            ids += found
            assert path.advance(ids[-1:]) == 1
        assert found == set(text.eos_ids)
        assert ids == text.tokenizer.encode(whole, add_special=False)
