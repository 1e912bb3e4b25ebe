"""Row 6: a megabyte of output that is meant to hurt costs a parser of tool calls, or of thoughts, linear time.

By itself, and in a server that has a model for each family: models whose vocabulary has such texts as tokens, of which a client
asks for one again and again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from tests.cli.running import Serving
from tests.front.calls import parser
from tests.gguf.forge import ARRAY, I32, STRING, U32, model
from tests.security.conftest import Attacked, warmed
from weft.front.tools import PARSERS, chosen

SIZE, MEGABYTE = 1 << 17, 1 << 20
UNITS = {
    "pythonic": "[f(a=",
    "nested pythonic": "[f(a=[b(c=",
    "brackets": "[[",
    "braces": '{"a":',
    "open strings": '{"name": "',
    "escapes": '{"name": "\\\\\\"',
    "openings": "<tool_call>",
    "half openings": "<tool_cal",
    "openings with a call": '<tool_call>{"name": "f", "arguments": {',
    "functions": "<function=f><parameter=a>",
    "closings": "</tool_call></function></parameter>",
    "lists": "[TOOL_CALLS][",
    "tags": "<|python_tag|>{",
    "fences": "```json\n{",
    "spaces": '{"name"          ',
    "numbers": '{"name": "f", "arguments": {"a": 1' + "1" * 40,
    "thoughts": "<think>",
    "half thoughts": "</thin",
}
TEMPLATES = {
    "hermes": "<tool_call> arguments",
    "llama3_json": '<|start_header_id|> {"name": "parameters": ',
    "mistral": "[TOOL_CALLS] [ARGS]",
    "mistral_list": "[TOOL_CALLS]",
    "qwen3_coder": "<tool_call> <function= <parameter=",
    "seed_oss": "<seed:tool_call> <function= <parameter=",
    "json": "tools",
}
"""What of a chat template tells each family."""
PIECE = 1 << 10
"""Characters of a token."""


def took(name: str, text: str, piece: int) -> float:
    """CPU seconds of this thread, so that others on the machine count for nothing."""
    machine = parser(name)
    began = time.thread_time()
    for at in range(0, len(text), piece):
        machine.feed(text[at : at + piece])
    machine.finish()
    return time.thread_time() - began


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_what_is_meant_to_hurt(name: str) -> None:
    """Against plain words of the same length: never more than a small multiple.  Backtracking would take hours."""
    plain = took(name, ("one word " * (SIZE // 9 + 1))[:SIZE], 64)
    for what, unit in UNITS.items():
        spent = took(name, (unit * (SIZE // len(unit) + 1))[:SIZE], 64)
        assert spent < 10 * plain + 1.0, (what, spent, plain)


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_a_megabyte(name: str) -> None:
    unit = UNITS["openings with a call"]
    assert took(name, (unit * (MEGABYTE // len(unit) + 1))[:MEGABYTE], 64) < 15.0


def speaker(template: str) -> bytes:
    """A GGUF file of a model with a token for each byte, and for each unit one that is a thousand characters of it."""
    level = ByteLevel(add_prefix_space=False, use_regex=False)
    units = ["".join(p for p, _ in level.pre_tokenize_str((u * PIECE)[:PIECE])) for u in UNITS.values()]
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<s>", "</s>", *units]
    forge = model(vocab=len(tokens))
    forge.set("llama.context_length", U32, 2048)
    forge.set("tokenizer.ggml.tokens", ARRAY, (STRING, tokens))
    forge.set("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 257 + [3, 3] + [1] * len(units)))
    forge.set("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"]))
    forge.set("tokenizer.ggml.bos_token_id", U32, 257)
    forge.set("tokenizer.ggml.eos_token_id", U32, 258)
    forge.set("tokenizer.chat_template", STRING, f"{{# {template} <think> </think> #}}{{{{ messages[0].content }}}}")
    return forge.bytes()


FIRST = 259
"""The id of the first unit's token."""


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """A server with the bundled model, which streams beside the attack, and one for each family."""
    folder = tmp_path_factory.mktemp("speaking")
    for name, template in TEMPLATES.items():
        (folder / f"{name}.gguf").write_bytes(speaker(template))
    models = ["bundled", *(str(folder / f"{name}.gguf") for name in TEMPLATES)]
    with Serving(
        folder, *models, "--port", "0", "--threads", "1", "--memory", "4G", "--data-dir", str(folder / "data")
    ) as process:
        made = warmed(Attacked(process, process.url(), folder, "weft-tiny"), prompts=1)
        yield made
        made.http.close()
        assert process.end(signal.SIGTERM) == 0


def test_every_family_has_a_model() -> None:
    assert TEMPLATES.keys() == PARSERS.keys()
    for name, template in TEMPLATES.items():
        assert (chosen("auto", [template]) or PARSERS["json"]) is PARSERS[name]


@pytest.mark.serial
@pytest.mark.parametrize("name", sorted(PARSERS))
def test_a_running_server(speaking: Attacked, name: str) -> None:
    """A megabyte of one unit and some of each other, streamed and whole, with tools that may be called and thoughts."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body: dict[str, Any] = {
        "model": name, "messages": [{"role": "user", "content": "ab"}], "tools": [tool], "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    with speaking.attacked():
        for number, unit in enumerate(UNITS):
            pieces = MEGABYTE // PIECE if unit == "openings with a call" else 32
            asked = {**body, "max_tokens": pieces, "logit_bias": {str(FIRST + number): 100}}
            for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
                answer = speaking.post("/v1/chat/completions", {**asked, **more})
                assert answer.status_code == 200, answer.text[:300]
                assert f'"completion_tokens":{pieces},' in answer.text
