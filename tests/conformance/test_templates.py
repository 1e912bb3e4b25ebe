"""The suite `templates`: counts over some templates, and references that disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.conformance.templates import OWN, conversations, judge, templates, transformers

TALKS: list[Any] = [(messages, None) for messages in OWN[:2]]
SOURCE = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ m.content }}]{% endfor %}"


def test_the_samples_are_there(shared: Callable[[str], Path]) -> None:
    place = shared("data/templates")
    found = list(templates(place))
    assert len(found) == 118
    assert sum(tools is not None for _, tools in conversations(place)) == 3
    count = judge(found[::12], conversations(place), transformers())
    assert count.ok
    assert count.enforced > 2 * count.refused > 0


@pytest.mark.long
def test_all_templates(shared: Callable[[str], Path]) -> None:
    place = shared("data/templates")
    count = judge(templates(place), conversations(place), transformers())
    assert count.wrong == []
    assert count.total == count.enforced + count.refused == 1888


def test_what_disagrees_is_counted() -> None:
    def agrees(source: str, messages: list[Any], tools: Any, prompt: bool) -> str:
        if any(m["role"] == "system" for m in messages):
            raise ValueError("no")
        return "".join(f"[{m['content']}]" for m in messages)

    def refuses(*_: Any) -> str:
        raise ValueError("no")

    counts = {f: judge([("t", SOURCE)], TALKS, f).as_dict() for f in (agrees, refuses, lambda *_: "other")}
    told = [[c[key] for key in ("enforced", "refused", "wrong_accept", "wrong_reject")] for c in counts.values()]
    assert told == [[2, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 3]]
