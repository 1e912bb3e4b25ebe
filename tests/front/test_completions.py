"""Completions over the real server and model, by the real `openai` client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from weft.front.text import ModelText

MODEL = "weft-tiny"
PROMPT = "Once upon a time, there was a little dog who"


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "temperature": 0, **options})


def test_sixteen_tokens_by_default(client: openai.OpenAI, text: ModelText) -> None:
    answer = complete(client, extra_body={"ignore_eos": True})
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    assert answer.usage.prompt_tokens == len(text.prompt_ids(PROMPT))
    assert answer.choices[0].logprobs is None
    assert answer.choices[0].text


def test_prompts_in_every_form(client: openai.OpenAI, text: ModelText) -> None:
    other = "The sea was"
    one, two = complete(client).choices[0].text, complete(client, other).choices[0].text
    ids, other_ids = text.prompt_ids(PROMPT), text.prompt_ids(other)
    assert [c.text for c in complete(client, [PROMPT, other]).choices] == [one, two]
    assert [c.text for c in complete(client, ids).choices] == [one]
    both = complete(client, [ids, other_ids])
    assert [(c.index, c.text) for c in both.choices] == [(0, one), (1, two)]
    assert both.usage.prompt_tokens == len(ids) + len(other_ids)
    n = complete(client, [PROMPT, other], n=2, best_of=2)
    assert [(c.index, c.text) for c in n.choices] == [(0, one), (1, one), (2, two), (3, two)]


def test_stream_equals_whole(client: openai.OpenAI) -> None:
    whole = complete(client, ["A", PROMPT], max_tokens=30, seed=3, temperature=0.9, n=2)
    texts, ends, usage = dict.fromkeys(range(4), ""), {}, None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in complete(client, ["A", PROMPT], max_tokens=30, seed=3, temperature=0.9, n=2, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == {c.index: c.text for c in whole.choices}
    assert ends == {c.index: c.finish_reason for c in whole.choices}
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_echo(client: openai.OpenAI, text: ModelText) -> None:
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    assert complete(client, text.prompt_ids(PROMPT), echo=True).choices[0].text == PROMPT + plain
    streamed = "".join(c.choices[0].text for c in complete(client, echo=True, stream=True))
    assert streamed == PROMPT + plain


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, text: ModelText, echo: bool, stream: bool) -> None:
    options = {"logprobs": 3, "echo": echo, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    choice = complete(client, **options).choices[0]
    told = {name: list(getattr(choice.logprobs, name)) for name in LISTS}
    if stream:
        got: dict[str, list[Any]] = {name: [] for name in LISTS}
        shown = ""
        for chunk in complete(client, stream=True, **options):
            shown += chunk.choices[0].text
            if chunk.choices[0].logprobs is not None:
                for name in LISTS:
                    got[name] += getattr(chunk.choices[0].logprobs, name)
        assert shown == choice.text
        assert got["tokens"] == told["tokens"]
        assert got["text_offset"] == told["text_offset"]
        return
    prompt = text.prompt_ids(PROMPT)
    assert len(told["tokens"]) == 12 + (len(prompt) if echo else 0)
    assert {len(values) for values in told.values()} == {len(told["tokens"])}
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert "".join(told["tokens"]) == choice.text
    start = len(prompt) if echo else 0
    for token, logprob, top in zip(
        told["tokens"][start:], told["token_logprobs"][start:], told["top_logprobs"][start:]
    ):
        assert logprob == pytest.approx(max(top.values()), abs=1e-4)
        assert token in top
        assert 3 <= len(top) <= 4
    if echo:
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert all(value <= 0 for value in told["token_logprobs"][1:])


LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_logprobs_of_the_prompt_are_those_of_generating_it(client: openai.OpenAI, text: ModelText) -> None:
    """What was generated, sent back as a prompt, has the logprobs that it had."""
    made = complete(client, max_tokens=8, logprobs=0, extra_body={"ignore_eos": True}).choices[0]
    whole = text.prompt_ids(PROMPT) + text.tokenizer.encode(made.text, add_special=False)
    scored = complete(client, whole, max_tokens=0, echo=True, logprobs=0)
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].finish_reason == "length"
    assert scored.choices[0].text == PROMPT + made.text
    assert scored.choices[0].logprobs.tokens[-8:] == made.logprobs.tokens
    assert scored.choices[0].logprobs.token_logprobs[-8:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-4)


def test_special_tokens_show_when_asked(client: openai.OpenAI) -> None:
    end = {"logit_bias": {"4": 100}, "max_tokens": 1}
    assert complete(client, **end).choices[0].text == ""
    body = {"skip_special_tokens": False, "ignore_eos": True}
    assert complete(client, **end, extra_body=body).choices[0].text == "<|end|>"
    own = complete(client, max_tokens=1, logit_bias={"300": 100}, extra_body={"stop_token_ids": [300]}).choices[0]
    assert (own.text, own.finish_reason, own.stop_reason) == ("", "stop", 300)


def test_another_name_of_the_model(client: openai.OpenAI) -> None:
    assert complete(client, model="alias").model == "alias"
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve("alias").owned_by == "weft"
