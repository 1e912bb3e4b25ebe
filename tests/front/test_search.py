"""Searches and contrasts over HTTP: the real server, model and client."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest

from tests.front.conftest import metric
from weft.front.text import ModelText

MODEL = "weft-tiny"
PROMPT = "Once upon a time, there was a little dog who"
LAW: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 11, "temperature": 1.0}


def test_best_of_returns_the_likeliest_of_those_that_n_draws(client: openai.OpenAI, text: ModelText) -> None:
    drawn = client.completions.create(**LAW, n=6, logprobs=0).choices
    scores = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in drawn}  # type: ignore[union-attr, arg-type]
    best = sorted(scores, key=lambda t: -scores[t])
    answer = client.completions.create(**LAW, n=2, best_of=6)
    assert [(c.index, c.text) for c in answer.choices] == [(0, best[0]), (1, best[1])]
    assert all(c.logprobs is None for c in answer.choices)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 24, "what was drawn and not returned is counted"
    assert answer.usage.completion_tokens <= 6 * 12
    with_them = client.completions.create(**LAW, best_of=6, logprobs=1).choices[0]
    assert with_them.text == best[0]
    assert len(with_them.logprobs.tokens) == 12  # type: ignore[union-attr, arg-type]


def test_best_of_in_a_stream_comes_when_it_is_decided(client: openai.OpenAI) -> None:
    whole = client.completions.create(**LAW, best_of=4)
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(**LAW, best_of=4, **options))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_best_of_chats_and_stop_strings(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Tell me about the sea."}]
    law: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 10, "seed": 5, "temperature": 1.0}
    whole = client.chat.completions.create(**law, extra_body={"best_of": 3}).choices[0].message.content
    assert whole
    stop = whole[len(whole) // 2 :][:3]
    cut = client.chat.completions.create(**law, stop=[stop], extra_body={"best_of": 3}).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_beam_for_one_request(client: openai.OpenAI) -> None:
    body = {"weft": {"with": ["search=beam(width=3)"], "label": True}}
    answer = client.completions.create(**{**LAW, "n": 3}, logprobs=0, extra_body=body)
    scores = [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in answer.choices]  # type: ignore[union-attr, arg-type]
    assert scores == sorted(scores, reverse=True)
    assert len({c.text for c in answer.choices}) == 3
    again = client.completions.create(**{**LAW, "n": 3, "seed": 99}, extra_body=body)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices], "nothing is drawn"
    with pytest.raises(openai.BadRequestError, match="one technique"):
        client.completions.create(**LAW, best_of=3, extra_body=body)
    with pytest.raises(openai.BadRequestError, match="width 3"):
        client.completions.create(**LAW, n=4, extra_body=body)


def test_a_contrast_for_one_request(client: openai.OpenAI) -> None:
    plain = client.completions.create(**LAW).choices[0].text
    body: dict[str, Any] = {"weft": {"with": ["sample=cad(alpha=1.0)"], "contrast": "there was a little dog who"}}
    assert client.completions.create(**LAW, extra_body=body).choices[0].text != plain
    body["weft"]["contrast"] = PROMPT
    assert client.completions.create(**LAW, extra_body=body).choices[0].text == plain, "with itself nothing changes"
    for wrong in ({"with": ["sample=cad"]}, {"contrast": "a"}):
        with pytest.raises(openai.BadRequestError, match="to be compared with its own context") as error:
            client.completions.create(**LAW, extra_body={"weft": wrong})
        assert error.value.param == "weft.contrast"


def test_a_client_that_leaves_ends_its_search(http: httpx.Client) -> None:
    body = {**LAW, "max_tokens": 900, "weft": {"with": ["search=beam(width=8)"]}, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=1.0)
    for _ in range(200):
        if not metric(http, "weft:requests_running"):
            break
        time.sleep(0.05)
    assert metric(http, "weft:requests_running") == 0
    assert metric(http, "weft:requests_waiting") == 0
