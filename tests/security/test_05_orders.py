"""Row 5: grammars in every order of good and bad, and a matcher that is asked for anything at any moment.

What crashed others was a malformed grammar after a good one, and a matcher that was advanced once more after its end.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.security.conftest import Attacked, is_refused
from weft.constrain.llguidance import BYTES, LLGuidance
from weft.exec.vocabulary import VocabularyShelf
from weft.types import Grammar

GOOD: list[dict[str, Any]] = [{"regex": "[ab]{3}"}, {"json": {"type": "boolean"}}, {"choice": ["yes", "no"]}]
BAD: list[dict[str, Any]] = [{"regex": "("}, {"json": {"type": "strin"}}, {"grammar": "start: missing"}]


def test_orders(server: Attacked) -> None:
    """Every good one between every two bad ones, streamed and not, while others go on."""
    with server.attacked():
        for good, (before, after) in itertools.product(GOOD, itertools.permutations(BAD, 2)):
            for form, status in ((before, 400), (good, 200), (after, 400), (good, 200)):
                body = {"prompt": "Say", "max_tokens": 8, "structured_outputs": form, "ignore_eos": True}
                answer = server.post("/v1/completions", body)
                assert answer.status_code == status, answer.text
                if status == 400:
                    is_refused(answer)


FORMS = [
    Grammar("regex", "(ab|abc)*d"),
    Grammar("json", '{"type": "array", "items": {"enum": [1, 23, null]}, "maxItems": 3}'),
    Grammar("grammar", 'start: "a" | "(" start ")"'),
]
LETTERS = b"abcd([1, 23nul])"
END = BYTES.ends[0]
ACTS = st.lists(
    st.tuples(st.just("advance"), st.lists(st.sampled_from([*LETTERS, END]), max_size=4))
    | st.tuples(st.just("rollback"), st.integers(0, 6))
    | st.tuples(st.sampled_from(["mask", "fork"]), st.none()),
    max_size=25,
)


@pytest.fixture(scope="module")
def constrain() -> LLGuidance:
    made = LLGuidance()
    made.attach(VocabularyShelf(lambda: BYTES))
    return made


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.kind)
@settings(max_examples=60, deadline=None)
@given(acts=ACTS)
def test_any_acts(constrain: LLGuidance, form: Grammar, acts: list[tuple[str, Any]]) -> None:
    """Whatever is asked after whatever, a path is where its tokens have led: its mask is that of a new one given the same."""
    path, tokens = constrain.begin(form), []
    for act, given_ in acts:
        if act == "advance":
            taken = path.advance(given_)
            assert 0 <= taken <= len(given_)
            tokens += given_[:taken]
        elif act == "rollback":
            count = min(given_, len(tokens))
            path.rollback(count)
            tokens = tokens[: len(tokens) - count]
        elif act == "fork":
            path = path.fork()
        else:
            path.mask()
    fresh = constrain.begin(form)
    assert fresh.advance(tokens) == len(tokens)
    assert path.mask() == fresh.mask()
