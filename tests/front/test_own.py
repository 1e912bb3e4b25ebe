"""The field `weft` of a request, through HTTP: a stack for it alone, the label of an answer, and what is refused."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

PROMPT = "The sea was calm. The sea was calm. The sea was"


def ask(url: str, route: str = "completions", **body: Any) -> httpx.Response:
    given = {"prompt": PROMPT} if route == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    return httpx.post(f"{url}/v1/{route}", json={**given, "max_tokens": 8, "seed": 3, **body}, timeout=60)


def label(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["weft"]
    return found


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_label_says_what_made_the_answer(url: str, route: str) -> None:
    plain = ask(url, route).json()
    assert "weft" not in plain
    told = ask(url, route, weft={"label": True, "with": ["draft=ngram(guesses=2)"]})
    said = label(told)
    assert told.json()["choices"] == plain["choices"], "an exact technique changes no token"
    assert "draft=ngram(guesses=2)" in said["stack"]
    assert "schedule=fcfs" in said["stack"]
    assert said["fidelity"] == "EXACT"
    assert said["redefines"] == []
    beam = label(ask(url, route, weft={"label": True, "with": ["search=beam(width=2)"]}))
    assert (beam["fidelity"], beam["redefines"]) == ("EXACT", ["search=beam(width=2)"])
    other = label(ask(url, route, weft={"label": True}))
    assert not [part for part in other["stack"] if part.startswith("draft=ngram")]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("usage", [False, True])
def test_a_streams_last_chunk_carries_the_label(url: str, route: str, usage: bool) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        extra = {
            "weft": {"label": True, "with": ["draft=ngram"]},
            **({"stream_options": {"include_usage": True}} if usage else {}),
        }
        if route == "completions":
            stream = client.completions.create(
                model="weft-tiny", prompt=PROMPT, max_tokens=5, stream=True, extra_body=extra
            )
        else:
            stream = client.chat.completions.create(  # type: ignore[assignment]
                model="weft-tiny",
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=5,
                stream=True,
                extra_body=extra,
            )
        chunks = list(stream)
        (labelled,) = [c for c in chunks if getattr(c, "weft", None)]
        assert labelled is chunks[-1]
        assert (labelled.usage is not None) is usage
        assert labelled.choices == []
        assert labelled.weft["fidelity"] == "EXACT"  # type: ignore[attr-defined]


def test_the_server_counts_what_a_requests_technique_did(url: str) -> None:
    ask(url, weft={"with": ["draft=ngram(shortest=1, guesses=3)"]}, max_tokens=24, temperature=0)
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    name = 'weft:technique_acts_total{technique="draft=ngram",act="proposed"}'
    assert next(int(line.split()[-1]) for line in lines if line.startswith(name)) > 0


@pytest.mark.parametrize(
    ("weft", "param", "said"),
    [
        ({"with": ["schedule=fcfs"]}, "weft.with", "whole server"),
        ({"with": ["draft=ngrm"]}, "weft.with", "did you mean ngram"),
        ({"with": ["draft=ngram", "draft=ngram"]}, "weft.with", "one technique"),
        ({"with": ["draft=ngram(guesses=0)"]}, "weft.with", "guesses"),
        ({"with": ["draft"]}, "weft.with", "SLOT=NAME"),
        ({"with": ["draft=ngram"] * 17}, "weft.with", "at most 16"),
        ({"with": "draft=ngram"}, "weft", "array"),
        ({"wth": []}, "weft", "wth"),
        ({"label": "yes"}, "weft", "bool"),
        ({"contrast": 3}, "weft", "contrast"),
        ({"contrast": "no document"}, None, "slot sample"),
    ],
)
def test_what_is_wrong_is_a_400_that_says_so(url: str, weft: dict[str, Any], param: str | None, said: str) -> None:
    answer = ask(url, weft=weft)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    if param is not None:
        assert error["param"].startswith(param)
    assert ask(url).status_code == 200


def test_null_is_nothing(url: str) -> None:
    assert ask(url, weft=None).status_code == 200
    assert ask(url, weft={"with": None, "label": None, "contrast": None}).status_code == 200
