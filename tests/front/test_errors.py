"""Everything that can be wrong with a request, and with the engine: status, code and field, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from tests.front.conftest import serving
from tests.front.scripted import ScriptedPort
from weft.front.port import STOPPED
from weft.front.template import ChatTemplate
from weft.front.text import ModelText
from weft.types import Rejected

MODEL = "weft-tiny"
HELLO = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}


def check(answer: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The message of an error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return str(error["message"])


SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 10**40}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"best_of": 21}, "best_of"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": 9}, "min_tokens"),
    ({"seed": 1 << 70}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": ["x" * 100_000]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [4096]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(4000))}, "stop_token_ids"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5000": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"priority": 1 << 40}, "priority"),
    ({"cache_salt": "x" * 1000}, "cache_salt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": 5, "stream": True}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "frob"}}}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"grammar": "root ::= x"}, "grammar"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize("base", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize(("change", "param"), SAMPLING, ids=lambda v: str(v)[:40])
def test_bad_fields(http: httpx.Client, base: dict[str, Any], change: dict[str, Any], param: str) -> None:
    path = "/v1/chat/completions" if base is CHAT else "/v1/completions"
    message = check(http.post(path, json={**base, **change}), 400, param)
    assert param in message
    check(http.post(path, json={**base, "stream": True, **change}), 400) if "stream" not in str(change) else None


FUNCTION: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
DEEP: dict[str, Any] = {}
for _ in range(80):
    DEEP = {"properties": {"a": DEEP}}
CHAT_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "at least one"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": "Hi"}, "messages", "array"),
    ({"messages": ["Hi"]}, "messages", "object"),
    ({"messages": [{}]}, "messages", "role"),
    ({"messages": [{"role": "user"}]}, "messages", "content is missing"),
    ({"messages": [{"role": "assistant"}]}, "messages", "content is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages", "content is missing"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages", "role"),
    ({"messages": [{"role": "x|><|end", "content": "Hi"}]}, "messages", "role"),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages", "role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        "text",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "text"),
    ({"tools": [{"type": "web_search"}]}, "tools", "type function"),
    ({"tools": [{"type": "function"}]}, "tools", "tools[0].function.name"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools", "names must differ"),
    ({"tools": [{**FUNCTION, "function": {"name": "a b"}}]}, "tools", "letters, digits"),
    ({"tools": [{**FUNCTION, "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools", "type object"),
    ({"tools": [{**FUNCTION, "function": {"name": "f", "parameters": {"properties": []}}}]}, "tools", "properties"),
    ({"tools": [{**FUNCTION, "function": {"name": "f", "parameters": DEEP}}]}, "tools", "deep"),
    ({"tools": [{**FUNCTION, "function": {"name": f"f{i}"}} for i in range(129)]}, "tools", "at most 128"),
    ({"tools": [FUNCTION], "tool_choice": "always"}, "tool_choice", "none, auto, required"),
    (
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "none of the tools",
    ),
    ({"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
    ({"tools": [FUNCTION], "structured_outputs": {"regex": "a"}}, "structured_outputs", "tools go together"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages", "tool_calls[0]"),
    ({"messages": [{"role": "tool", "tool_call_id": 5, "content": "x"}]}, "messages", "tool_call_id"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs", "20"),
    ({"logprobs": True, "top_logprobs": -1}, "logprobs", "0"),
    ({"logprobs": 3}, "logprobs", "bool"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "own template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
    (
        {"continue_final_message": True, "messages": [{"role": "user", "content": " "}]},
        "continue_final_message",
        "text",
    ),
]


@pytest.mark.parametrize(("change", "param", "says"), CHAT_ONLY, ids=lambda v: str(v)[:40])
def test_bad_chat(http: httpx.Client, change: dict[str, Any], param: str, says: str) -> None:
    message = check(http.post("/v1/chat/completions", json={**CHAT, **change}), 400, param or None)
    assert says in message


TEXT_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "missing or empty"),
    ({"prompt": ""}, "prompt", "missing or empty"),
    ({"prompt": []}, "prompt", "missing or empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["Hi", ""]}, "prompt", "prompt 1 of 2 is empty"),
    ({"prompt": ["Hi", 5]}, "prompt", "mixes"),
    ({"prompt": [[5], 5]}, "prompt", "mixes"),
    ({"prompt": 5}, "prompt", "got `int`"),
    ({"prompt": {"a": 1}}, "prompt", "got `object`"),
    ({"prompt": [[1.5]]}, "prompt", "int"),
    ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
    ({"prompt": [4096]}, "prompt", "outside the vocabulary"),
    ({"prompt": [1 << 62]}, "prompt", "outside the vocabulary"),
    ({"prompt": ["Hi"] * 3000}, "prompt", "one call"),
    ({"prompt": ["Hi"] * 100, "n": 100}, "prompt", "one call"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": True}, "logprobs", "int"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "echo"),
    ({"echo": 1}, "echo", "bool"),
]


@pytest.mark.parametrize(("change", "param", "says"), TEXT_ONLY, ids=lambda v: str(v)[:40])
def test_bad_completions(http: httpx.Client, change: dict[str, Any], param: str, says: str) -> None:
    assert says in check(http.post("/v1/completions", json={**TEXT, **change}), 400, param)


HARMLESS: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "x", "parallel_tool_calls": True, "tools": [], "tool_choice": "none", "suffix": "",
    "response_format": {"type": "text"}, "logit_bias": None, "stop": None, "seed": None, "n": None, "temperature": None,
    "modalities": ["text"], "best_of": 1, "length_penalty": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_fields_are_taken(http: httpx.Client, name: str) -> None:
    for path, base in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        answer = http.post(path, json={**base, name: HARMLESS[name]})
        assert answer.status_code == 200, answer.text


BODIES: list[tuple[bytes, str]] = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b'{"model": "weft-tiny", "prompt": "Hi"', "invalid_json"),
    (b"Hi", "invalid_json"),
    (b'{"model": "\xff"}', "invalid_json"),
    (b'{"prompt": "\\ud800 alone", "messages": [{"role": "user", "content": "\\ud800 alone"}]}', "invalid_json"),
    (b'{"prompt": "Hi", "temperature": NaN}', "invalid_json"),
    (b'{"prompt": "Hi", "temperature": Infinity}', "invalid_json"),
    (b'{"prompt": "Hi", "temperature": -Infinity}', "invalid_json"),
    (b'{"prompt": "Hi", "temperature": 1e400}', "invalid_value"),
    (b'{"prompt": "Hi", "seed": ' + b"9" * 10_000 + b"}", "invalid_value"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    (b'{"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "invalid_json"),
    (b'{"tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    (b"[]", "invalid_value"),
    (b"null", "invalid_value"),
    (b'"Hi"', "invalid_value"),
]


@pytest.mark.parametrize(("body", "code"), BODIES, ids=lambda v: str(v)[:30])
def test_bad_bodies(http: httpx.Client, body: bytes, code: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        check(http.post(path, content=body, headers={"content-type": "application/json"}), 400, code=code)


PARTS = [(None, "'null'"), ({"type": None}, "'null'"), ({"type": "x" * 9000}, "'" + "x" * 40 + "'"), ([], "'array'")]


@pytest.mark.parametrize(("part", "said"), PARTS, ids=lambda v: str(v)[:20])
def test_parts_of_messages_are_named_in_words_of_json(http: httpx.Client, part: Any, said: str) -> None:
    for path, where in (("chat/completions", "messages"), ("messages", "messages"), ("responses", "input")):
        body = {where: [{"role": "user", "content": [part]}], **({"max_tokens": 2} if where == "messages" else {})}
        answer = http.post(f"/v1/{path}", json=body)
        assert answer.status_code == 400
        told = answer.json()["error"]["message"]
        assert f"not {said}" in told or (
            path == "messages" and not isinstance(part, dict) and "content[0]: expected" in told
        )


def test_what_is_no_json_says_why(http: httpx.Client) -> None:
    for body, said in (
        (b" ", "is empty"),
        (b'{"prompt": "a \\ud83d"}', "half of its character"),
        (b'{"prompt": "a', "truncated"),
    ):
        answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert said in check(answer, 400, code="invalid_json")


def test_a_value_is_quoted_in_part(http: httpx.Client) -> None:
    for change in (
        {"response_format": {"type": "x" * 100_000}},
        {"response_format": {"type": "text", "y" * 100_000: 1}},
    ):
        said = check(http.post("/v1/chat/completions", json={**CHAT, **change}), 400)
        assert len(said) < 400
        assert "response_format" in said
    answer = http.post("/v1/responses", json={"input": "Hi", "text": {"format": {"type": "x" * 100_000}}})
    assert len(check(answer, 400, "text")) < 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/completions", content=b'{"prompt": "Hi"}', headers={"content-type": kind})
    assert "application/json" in check(answer, 415, code="unsupported_media_type")


def test_routes_and_methods(http: httpx.Client) -> None:
    check(http.post("/", json={}), 405, code="method_not_allowed")  # the page is there to be read
    for path in ("/v1", "/v1/images", "/v1/completions/", "/v1/chat", "/docs", "/v2/models"):
        check(http.get(path), 404, code="not_found")
        check(http.post(path, json={}), 404, code="not_found")
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        answer = http.get(path)
        assert "POST" in check(answer, 405, code="method_not_allowed")
        assert answer.headers["allow"] == "POST"
    for path in ("/v1/models", "/health", "/ready", "/metrics", "/version"):
        check(http.post(path, json={}), 405, code="method_not_allowed")
    check(http.delete(f"/v1/models/{MODEL}"), 405, code="method_not_allowed")


def test_unknown_model(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"
    check(http.post("/v1/completions", json={**TEXT, "model": "x" * 10_000}), 404, "model", "model_not_found")
    check(http.post("/v1/completions", json={**TEXT, "model": ""}), 404, "model", "model_not_found")
    check(http.get("/v1/models/gpt-9"), 404, "model", "model_not_found")
    check(http.get("/v1/models/a/b"), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    "prompt", ["word " * 2000, "x" * 1_000_000, [5] * 1024, [5] * 100_000], ids=lambda v: f"{type(v).__name__}{len(v)}"
)
def test_a_prompt_over_the_context_is_refused_and_never_cut(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"context.*1024.*shorten") as caught:
        client.completions.create(model=MODEL, prompt=prompt, stream=True)
    assert caught.value.code == "context_length_exceeded"
    if isinstance(prompt, str):
        messages: list[Any] = [{"role": "user", "content": prompt}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=messages)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_the_longest_prompt_is_taken(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[5] * 1023)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1023, 1)


def test_tokenize_and_detokenize(http: httpx.Client, text: ModelText) -> None:
    words = "Hello, naïve 🙂 world"
    told = http.post("/tokenize", json={"prompt": words, "return_token_strs": True}).json()
    assert told["tokens"] == text.prompt_ids(words)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 1024
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": words}
    chat = http.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["tokens"] == text.chat_ids(HELLO)
    check(http.post("/tokenize", json={}), 400, "prompt")
    check(http.post("/tokenize", json={"prompt": "a", "messages": HELLO}), 400, "prompt")
    check(http.post("/detokenize", json={"tokens": [4096]}), 400)
    check(http.post("/detokenize", json={"tokens": [1] * 2000}), 400, "tokens")
    check(http.post("/detokenize", json={"tokens": []}), 400, "tokens")


def test_health_version_and_the_health_of_a_good_server(http: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        told = http.get(path).json()
        assert told.keys() == {"status", "reason", "engine_pid", "engine_restarts", "last_step_s"}
        assert (told["status"], told["reason"]) == ("ok", None)
    assert set(http.get("/version").json()) == {"version"}
    assert http.head("/health").status_code == 200


# ---------------------------------------------------------------------------------------------- engines that fail

Make = Callable[..., ScriptedPort]


def story(text: ModelText) -> list[int]:
    return text.tokenizer.encode("Once upon a time there was a dog. " * 10, add_special=False)


def test_a_model_without_a_template_answers_prompts_only(scripted: Make, text: ModelText) -> None:
    bare = replace(text, template=ChatTemplate({}))
    port = scripted(lambda spec, index: story(text))
    with serving(port, bare) as url, httpx.Client(base_url=url) as http:
        assert "/v1/completions" in check(http.post("/v1/chat/completions", json=CHAT), 400, code="no_chat_template")
        assert http.post("/v1/completions", json=TEXT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(scripted: Make, text: ModelText, stream: bool) -> None:
    port = scripted(lambda spec, index: [])
    with serving(port, text) as url, httpx.Client(base_url=url) as http:
        for kind, code, status in (("request", "why", 400), ("capacity", None, 503), ("capacity", "never_fits", 400)):
            port.reject = Rejected(0, "the engine says no", kind, "n", code)  # type: ignore[arg-type]
            answer = http.post("/v1/completions", json={**TEXT, "stream": stream})
            assert check(answer, status, "n", code or "overloaded") == "the engine says no"
        port.reject = None
        port.give_up = "a tensor was not finite"
        assert check(http.post("/v1/completions", json={**TEXT, "stream": stream}), 500) == port.give_up


def test_death_in_the_middle_of_a_stream(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: story(text)[:5])
    with (
        serving(port, text) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        httpx.Client(base_url=url) as http,
    ):
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)  # type: ignore[call-overload]
        told = text.tokenizer.decode(story(text)[:5])
        got = ""

        def read() -> None:
            nonlocal got
            for chunk in stream:
                got += chunk.choices[0].delta.content
                # Tokens that come while the server is busy share a chunk, so that chunks are no measure.
                if got == told:
                    assert http.get("/health").status_code == 200
                    port.die("out of memory")

        with pytest.raises(openai.APIError, match="out of memory"):
            read()
        assert got == told
        health = http.get("/health")
        assert health.status_code == 503
        assert health.json() | {"status": "stalled", "reason": STOPPED} == health.json()
        assert "memory" not in health.text, "what an engine says may name folders, and this route asks for no key"
        for body in (TEXT, {**TEXT, "stream": True}):
            check(http.post("/v1/completions", json=body), 503, code="engine_stopped")
        assert http.get("/v1/models").status_code == 200


def test_health_tells_of_a_stall(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [])
    with serving(port, text, stall_s=5.0) as url, httpx.Client(base_url=url) as http:
        port.stall = 4.9
        assert http.get("/health").status_code == 200
        port.stall = 5.1
        assert http.get("/health").status_code == 503
        assert http.get("/health").json()["status"] == "stalled"


def test_an_unexpected_error_tells_nothing_of_the_inside(scripted: Make, text: ModelText) -> None:
    class Secret(RuntimeError):
        pass

    port = scripted(lambda spec, index: story(text))

    def send(_: object) -> None:
        raise Secret("/etc/secret")

    port.send = send  # type: ignore[method-assign]
    with serving(port, text) as url, httpx.Client(base_url=url) as http:
        answer = http.post("/v1/completions", json=TEXT)
        assert "secret" not in answer.text
        check(answer, 500)


def test_a_key_guards_all_but_the_open_routes(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: story(text))
    with serving(port, text, api_key="sesame") as url, httpx.Client(base_url=url) as http:
        for path in ("/health", "/ready"):
            assert http.get(path).status_code == 200
        for header in (
            None,
            "sesame",
            "Bearer",
            "Bearer sesam",
            "Bearer sesamee",
            "Basic sesame",
            "Bearer séb",
        ):
            headers = {} if header is None else {"authorization": header.encode()}
            for path in ("/v1/models", f"/v1/models/{MODEL}", "/metrics", "/version", "/no/such/route"):
                check(http.get(path, headers=headers), 401, code="invalid_api_key")
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                answer = http.post(path, json=TEXT, headers=headers)
                check(answer, 401, code="invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        assert port.commands == []
        for header in ("Bearer sesame", "bearer  sesame"):
            assert http.post("/v1/completions", json=TEXT, headers={"authorization": header}).status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
