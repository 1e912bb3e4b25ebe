"""Thoughts told apart from answers: every family's marks, opened by the prompt or by the model, cut everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.front.reasoning import MARKS, Reasoning, chosen, told


def split(marks: str, pieces: Iterable[str], *, inside: bool = False) -> tuple[str, str, int]:
    """(thought, answer, length up to the end of the thought)."""
    reasoning = Reasoning(MARKS[marks], inside=inside)
    told = [reasoning.push(piece) for piece in pieces]
    told.append(reasoning.finish())
    return "".join(t for t, _ in told), "".join(a for _, a in told), reasoning.end


@pytest.mark.parametrize("name", sorted(MARKS))
def test_every_cut(name: str) -> None:
    begin, end = MARKS[name].begin, MARKS[name].end
    body = f"\n One. {begin} {end[:-1]} two\n\n"
    for text, inside in (
        (f" \n{begin}{body}{end}\n\nSo: {begin}x{end}\n", False),
        (f"{body}{end}\n\nSo: {begin}x{end}\n", True),
    ):
        want = (f"One. {begin} {end[:-1]} two", f"So: {begin}x{end}\n", text.index(end) + len(end))
        assert split(name, [text], inside=inside) == want
        for cut in range(len(text)):
            assert split(name, [text[:cut], text[cut:]], inside=inside) == want
        assert split(name, text, inside=inside) == want


@pytest.mark.parametrize(
    ("text", "inside", "want"),
    [
        ("an answer <think>x</think>", False, ("", "an answer <think>x</think>", 0)),  # not at the beginning
        ("  an answer ", False, ("", "  an answer ", 0)),
        ("<thin", False, ("", "<thin", 0)),
        ("<thinking>", False, ("", "<thinking>", 0)),
        ("", False, ("", "", 0)),
        (" \n", False, ("", " \n", 0)),
        ("<think></think>a", False, ("", "a", 15)),
        ("<think>still </thin", False, ("still </thin", "", 19)),  # it never ends
        ("still ", True, ("still", "", 6)),
        ("a</think>", True, ("a", "", 9)),
    ],
)
def test_borders(text: str, inside: bool, want: tuple[str, str, int]) -> None:
    assert split("think", [text], inside=inside) == want
    assert split("think", text, inside=inside) == want


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "think>", "</", " ", "\n"]) | st.text(max_size=2), max_size=20
    ),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    inside=st.booleans(),
)
def test_any_text_any_cuts(parts: list[str], cuts: list[int], inside: bool) -> None:
    text = "".join(parts)
    edges = [0, *sorted(cuts), len(text)]
    whole = split("think", [text], inside=inside)
    assert split("think", [text[a:b] for a, b in itertools.pairwise(edges)], inside=inside) == whole
    thought, answer, end = whole
    assert text.endswith(answer)
    assert thought in text[:end]
    rest = text[:end].removesuffix("</think>").strip(" \t\n\r")
    assert rest in (thought, "<think>" + thought) or rest.removeprefix("<think>").strip(" \t\n\r") == thought


def test_templates_tell_their_marks_and_what_they_open(shared: Callable[[str], Path]) -> None:
    folder = shared("data/templates/llama.cpp")
    want = {
        "Qwen-Qwen3-0.6B": "think",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "think",
        "mistralai-Ministral-3-14B-Reasoning-2512": "mistral",
        "ByteDance-Seed-OSS": "seed_oss",
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "cohere",
        "google-gemma-4-31B-it": "gemma",
        "Qwen-Qwen2.5-7B-Instruct": None,
        "meta-llama-Llama-3.1-8B-Instruct": None,
    }
    for name, marks in want.items():
        found = told((folder / f"{name}.jinja").read_text())
        assert (found and found.name) == marks, name
    assert MARKS["think"].opened("<|im_start|>assistant\n<think>\n")
    assert not MARKS["think"].opened("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not MARKS["think"].opened("<|im_start|>assistant\n")


def test_marks_can_be_named() -> None:
    assert chosen("none", ["<think></think>"]) is None
    assert chosen("auto", ["", "<think></think>"]) is MARKS["think"]
    assert chosen("auto", ["x"]) is None
    assert chosen("mistral", []) is MARKS["mistral"]
    with pytest.raises(ConfigError, match="no reasoning parser 'x'; there are auto, none, cohere"):
        chosen("x", [])
