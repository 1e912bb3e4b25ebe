"""Three stores: what each offers, which is taken, and what is learnt, by hand; the text's table beside a plain count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.draft.hierarchy import MEMORY, Hierarchy, Tried, table
from weft.errors import ConfigError
from weft.exec.vocabulary import VocabularyShelf
from weft.registry import parse
from weft.slots import Ask, Vocabulary
from weft.types import SamplingSpec


class Talk:
    """A sequence that a draft is asked about again and again."""

    def __init__(self, part: Hierarchy, prompt: Sequence[int], salt: bytes = b"") -> None:
        self.part, self.said, self.prompt, self.salt = part, list(prompt), len(prompt), salt
        self.state: dict[str, Any] = {}

    def guess(self, *tokens: int, most: int = 16) -> list[int]:
        self.said += tokens
        context, output = np.array(self.said, np.int64), len(self.said) - self.prompt
        ask = Ask(context, self.prompt, output, most, SamplingSpec(), 1, salt=self.salt, state=self.state)
        (found,) = self.part.propose([ask], None)
        return list(found.tokens)

    @property
    def store(self) -> str:
        return str(self.state["hierarchy"][0])


def letters(part: Hierarchy) -> Hierarchy:
    """Attached to a vocabulary in which a character is a token."""
    words = Vocabulary(tuple(bytes([i]) for i in range(128)), frozenset(), (0,), lambda text: [ord(c) for c in text])
    part.attach(VocabularyShelf(lambda: words))
    return part


def test_the_table_is_a_count_of_what_follows() -> None:
    rng = np.random.default_rng(2)
    text = rng.integers(0, 4, 400).tolist()
    found = table(text)
    runs = {tuple(text[i : i + n]) for n in (1, 2, 3) for i in range(len(text) - n)}
    for run in runs:
        after = [text[i + len(run)] for i in range(len(text) - len(run)) if tuple(text[i : i + len(run)]) == run]
        if len(after) < 2:
            assert run not in found
            continue
        best = min(range(4), key=lambda t: (-after.count(t), t))
        assert found[run] == (best, after.count(best) / len(after))
    assert set(found) <= runs


def test_each_store_by_hand(tmp_path: Path) -> None:
    """The context is the most local one; then what another request was answered; then the text."""
    (tmp_path / "text").write_text("abcd abcd abcx")
    part = letters(Hierarchy(guesses=3, text=str(tmp_path / "text"), share=0.6))
    talk = Talk(part, [5, 6, 7, 8, 9, 5, 6])
    assert talk.guess() == [7, 8, 9]
    assert talk.store == "context"
    Talk(part, [1]).guess(2, 3, 4, 5, 6)
    other = Talk(part, [1])
    assert other.guess(2) == [3, 4, 5], "the run may begin in the prompt"
    assert other.store == "answers"
    assert Talk(part, [1], b"b").guess(2) == [], "another tenant's"
    last = Talk(part, [0, ord("a"), ord("b")])
    assert [chr(t) for t in last.guess()] == ["c", "d", " "]
    assert last.store == "text"
    assert part.acts == {"proposed": 0, "accepted": 0, "context": 3, "answers": 3, "text": 3}
    sure = letters(Hierarchy(guesses=3, text=str(tmp_path / "text"), share=0.7))
    assert [chr(t) for t in Talk(sure, [0, ord("a"), ord("b")]).guess()] == ["c"], (
        "d is what follows twice of three times"
    )


def test_the_store_that_can_be_expected_to_achieve_most_is_taken() -> None:
    """Prior 1/2 for each: of equal offers the more local; a longer one of a better store in its place."""
    part = Hierarchy(guesses=3)
    Talk(part, [1]).guess(2, 3, 40, 41, 42)
    talk = Talk(part, [2, 3, 50, 51, 52, 2, 3])
    assert talk.guess() == [50, 51, 52]
    talk.guess(50, 99, 98, 2, 3)  # of three guesses one stood, so two were tried
    assert part._tried["context"] == Tried(1.0, 2.0)
    assert part._tried["context"].acceptance == 0.5
    talk = Talk(part, [2, 3, 50, 51, 52, 2, 3])
    talk.guess()
    talk.guess(99, 98)
    assert part._tried["context"] == Tried(1.0, 3.0)
    talk = Talk(part, [2, 3, 50, 51, 52, 2, 3])
    assert talk.guess() == [99, 98], "2/5 + 4/25 + 8/125 is less than 1/2 + 1/4"
    assert talk.store == "answers"
    talk.guess(99, 98)
    assert part._tried["answers"] == Tried(2.0, 2.0)
    assert part._expected("answers", 2) == pytest.approx(0.75 + 0.75**2)
    assert part._expected("context", 0) == 0.0


def test_what_a_store_achieved_fades() -> None:
    tried = Tried()
    for _ in range(MEMORY + 1):
        tried.add(1, 1)
    assert tried.tried < MEMORY
    assert tried.acceptance > 0.98


def test_answers_are_bounded_and_the_newest_stand() -> None:
    part = Hierarchy(guesses=2, entries=30)
    rng = np.random.default_rng(0)
    for _ in range(10):
        Talk(part, [1], b"large").guess(*rng.integers(10, 5000, 40).tolist())
        Talk(part, [1], b"small").guess(2, 3, 4, 5)
    assert sum(map(len, part._answers.values())) <= 30
    assert Talk(part, [1], b"small").guess(2) == [3, 4], "the largest tenant's oldest go first"
    Talk(part, [1], b"small").guess(2, 7, 8)
    assert Talk(part, [1], b"small").guess(2) == [7, 8], "what was said last stands"
    for i in range(40):
        Talk(part, [1], b"%d" % i).guess(2, 3, 4)
    assert all(part._answers.values()), "a tenant of whom nothing is left is forgotten"
    Talk(part, [1], b"new").guess()
    assert b"new" not in part._answers


def test_what_is_said_again_is_the_newest() -> None:
    part = Hierarchy(guesses=2, entries=4)
    for prompt, said in ((1, (2, 3, 4)), (9, (5, 6)), (1, (2, 3, 4)), (8, (7, 6, 5))):
        Talk(part, [prompt]).guess(*said)
    assert Talk(part, [1]).guess(2) == [3, 4], "said before 9, 5, 6 and after it"
    assert Talk(part, [9]).guess(5) == []


def test_an_answer_that_comes_in_pieces_is_learnt_as_a_whole() -> None:
    whole, pieces = Hierarchy(guesses=3), Hierarchy(guesses=3)
    Talk(whole, [1, 2, 3]).guess(*range(10, 30))
    talk = Talk(pieces, [1, 2, 3])
    for i in range(10, 30, 2):
        talk.guess(i, i + 1)
    assert pieces._answers == whole._answers


@pytest.mark.parametrize("text", ["longest=1", "guesses=0", "guesses=17", "entries=0", "share=2", "size=1"])
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"draft=hierarchy({text})").build()


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_text("a" * 100)
    monkeypatch.setattr("weft.draft.hierarchy.TEXT_BYTES", 99)
    for name in ("nowhere", "bytes", "large"):
        with pytest.raises(ConfigError, match=name):
            letters(Hierarchy(text=str(tmp_path / name)))
