"""Chat over the real server and model, by the real `openai` client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from weft.front.text import ModelText

MODEL = "weft-tiny"
HELLO: list[Any] = [{"role": "user", "content": "Tell me a story about a dog."}]


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 24, **options})


def joined(stream: Any) -> tuple[str, list[Any]]:
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_answer_has_the_shape_and_counts_of_openai(client: openai.OpenAI, text: ModelText) -> None:
    answer = ask(client, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == len(text.chat_ids(HELLO))
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_gives_the_same_text(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=0)
    got, chunks = joined(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert got == whole.choices[0].message.content
    first, *_, finish, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert finish.choices[0].finish_reason == whole.choices[0].finish_reason
    assert finish.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 5, "tokens come one by one, not all at the end"


def test_events_end_with_done_and_no_usage_unless_asked(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in answer.text


def test_n_answers_and_seeds(client: openai.OpenAI) -> None:
    def run(**options: Any) -> list[str]:
        return [c.message.content for c in ask(client, temperature=1.0, **options).choices]

    first = run(n=4, seed=11)
    assert len(set(first)) > 1, "n sequences draw their own noise"
    assert run(n=4, seed=11) == first
    assert run(n=1, seed=11) == first[:1], "the first of n is the one alone"
    assert run(n=4, seed=12) != first
    assert run(n=1) != run(n=1), "without a seed each call draws one"


def test_streams_of_n(client: openai.OpenAI) -> None:
    want = [c.message.content for c in ask(client, n=3, seed=5).choices]
    texts, ends = {0: "", 1: "", 2: ""}, {}
    for chunk in ask(client, n=3, seed=5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    assert [texts[i] for i in range(3)] == want
    assert set(ends) == {0, 1, 2}


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, temperature=0, logprobs=True, top_logprobs=5)
    content = answer.choices[0].logprobs.content
    shown = content if answer.choices[0].finish_reason == "length" else content[:-1]
    assert b"".join(bytes(token.bytes) for token in shown).decode() == answer.choices[0].message.content
    for token in content:
        ranked = [top.logprob for top in token.top_logprobs]
        assert len(ranked) == 5
        assert ranked == sorted(ranked, reverse=True)
        assert token.logprob == pytest.approx(ranked[0], abs=1e-4), "greedy takes the likeliest"
        assert token.token == token.top_logprobs[0].token
        assert all(top.logprob <= 0 for top in token.top_logprobs)
    streamed = []
    for chunk in ask(client, temperature=0, logprobs=True, top_logprobs=5, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [(t.token, t.bytes) for t in streamed] == [(t.token, t.bytes) for t in content]
    bare = ask(client, temperature=0, logprobs=True)
    assert all(token.top_logprobs == [] for token in bare.choices[0].logprobs.content)
    assert ask(client, temperature=0).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens(client: openai.OpenAI, text: ModelText, stream: bool) -> None:
    whole = ask(client, temperature=0, max_tokens=40).choices[0].message.content
    ids = text.tokenizer.encode(whole, add_special=False)
    border = len(text.tokenizer.decode(ids[:8]))
    stop = whole[border - 2 : border + 2]  # the last two characters of a token and the first two of the next
    assert not any(stop in text.tokenizer.token_text(i) for i in ids)
    want = whole[: whole.index(stop)]
    answer = ask(client, temperature=0, max_tokens=40, stop=["never that", stop], stream=stream)
    if stream:
        got, chunks = joined(answer)
        reason = chunks[-1].choices[0].finish_reason
    else:
        got, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert answer.choices[0].stop_reason == stop
        assert answer.usage.completion_tokens < 40
    assert got == want
    assert reason == "stop"
    kept = ask(client, temperature=0, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == want + stop


def test_sampling_fields_act(client: openai.OpenAI) -> None:
    greedy = ask(client, temperature=0).choices[0].message.content
    for options in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-6}, {"extra_body": {"min_p": 1.0}}):
        assert ask(client, temperature=1.5, **options).choices[0].message.content == greedy, options
    content = ask(client, temperature=0, logprobs=True).choices[0].logprobs.content
    biased = ask(client, temperature=0, max_tokens=3, logprobs=True, logit_bias={"300": 100})
    assert len({token.token for token in biased.choices[0].logprobs.content}) == 1
    assert biased.choices[0].logprobs.content[0].token != content[0].token
    long = ask(client, temperature=0, max_tokens=70).choices[0].message.content
    for options in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"extra_body": {"repetition_penalty": 1.8}}):
        assert ask(client, temperature=0, max_tokens=70, **options).choices[0].message.content != long, options


def test_lengths(client: openai.OpenAI) -> None:
    forced = ask(client, temperature=0, max_tokens=60, extra_body={"ignore_eos": True})
    assert (forced.usage.completion_tokens, forced.choices[0].finish_reason) == (60, "length")
    newer = ask(client, temperature=0, max_tokens=60, max_completion_tokens=4)
    assert newer.usage.completion_tokens == 4
    at_least = ask(client, temperature=0, max_tokens=90, logit_bias={"4": 50}, extra_body={"min_tokens": 7})
    assert (at_least.usage.completion_tokens, at_least.choices[0].finish_reason) == (8, "stop")


def test_chat_goes_on_to_the_end_of_the_context(client: openai.OpenAI, http: httpx.Client) -> None:
    context = http.get("/v1/models").json()["data"][0]["max_model_len"]
    long: list[Any] = [{"role": "user", "content": "word " * 900}]
    answer = client.chat.completions.create(model=MODEL, messages=long, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == context
    assert answer.choices[0].finish_reason == "length"


def test_messages_in_every_form(client: openai.OpenAI) -> None:
    def run(*messages: dict[str, Any]) -> str:
        return ask(client, temperature=0, messages=list(messages)).choices[0].message.content

    system = {"role": "system", "content": "Be brief."}
    plain = run(system, {"role": "user", "content": "One\nTwo"})
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    assert run(system, {"role": "user", "content": parts}) == plain
    assert run({**system, "role": "developer"}, {"role": "user", "content": "One\nTwo"}) == plain
    assert run({"role": "user", "content": "One\nTwo"}) != plain


def test_the_last_message_can_be_continued(client: openai.OpenAI, http: httpx.Client, text: ModelText) -> None:
    start = {"role": "assistant", "content": "Once upon a time, there was"}
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    answer = ask(client, temperature=0, messages=[*HELLO, start], extra_body=going_on)
    whole = text.chat_text([*HELLO, start], add_generation_prompt=False)
    cut = whole[: whole.index("there was") + len("there was")]
    ids = text.tokenizer.encode(cut, add_special=False)
    told = http.post("/tokenize", json={"messages": [*HELLO, start], **going_on}).json()
    assert told["tokens"] == ids
    assert answer.usage.prompt_tokens == len(ids)
    raw = client.completions.create(
        model=MODEL,
        prompt=ids,
        temperature=0,
        max_tokens=24,  # type: ignore[arg-type]
    )
    assert raw.choices[0].text == answer.choices[0].message.content


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "A prompt that comes twice, and is longer than a block or two. " * 4}]
    ask(client, messages=messages)
    again = ask(client, messages=messages).usage
    assert 16 <= again.prompt_tokens_details.cached_tokens < again.prompt_tokens
    salted = ask(client, messages=messages, extra_body={"cache_salt": "another tenant"}).usage
    assert salted.prompt_tokens_details.cached_tokens == 0
