"""Row 9: what is kept of grammars is bounded in bytes: many large ones, all different, are forgotten again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from tests.security.conftest import Attacked
from weft.constrain.llguidance import BYTES, LLGuidance
from weft.exec.vocabulary import MOST_BYTES, MOST_KEPT, VocabularyShelf
from weft.types import Grammar

MANY, WORDS = 120, 600


def schema(number: int) -> dict[str, object]:
    """Some 15 kB of names that no other schema has."""
    return {"enum": [f"w{number}x{word}" * 2 for word in range(WORDS)]}


def test_over_http(server: Attacked) -> None:
    """The engine's memory grows by what is kept of them, which is bounded, and the front's by a verdict each."""

    def ask(number: int) -> int:
        body = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"json": schema(number)}}
        return server.post("/v1/completions", body).status_code

    with server.attacked(), ThreadPoolExecutor(2) as pool:
        assert set(pool.map(ask, range(MANY))) == {200}


def test_the_shelf_is_bounded_in_bytes_and_in_number() -> None:
    shelf = VocabularyShelf(lambda: BYTES)
    for number in range(4 * MOST_KEPT):
        shelf.once(f"small {number}", lambda _: None, size=10)
    assert len(shelf._made) == MOST_KEPT
    for number in range(40):
        shelf.once(f"large {number}", lambda _: None, size=MOST_BYTES // 8)
    assert len(shelf._made) == 8
    shelf.once("huge", lambda _: None, size=2 * MOST_BYTES)
    assert len(shelf._made) <= 1, "what is larger than all that is kept is not"


def test_grammars_say_how_large_they_are() -> None:
    shelf = VocabularyShelf(lambda: BYTES)
    constrain = LLGuidance()
    constrain.attach(shelf)
    for number in range(60):
        constrain.begin(Grammar("json", json.dumps(schema(number))))
    kept = [key for key in shelf._made if key.startswith("llguidance ")]
    assert len(kept) * len(json.dumps(schema(0))) <= MOST_BYTES
