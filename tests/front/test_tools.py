"""Tools and thoughts over HTTP, with the real client: what models of several families would say is written down beforehand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.front import calls as forms
from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort
from weft.constrain.llguidance import LLGuidance
from weft.exec.vocabulary import VocabularyShelf
from weft.front.port import EngineInfo
from weft.front.renderer import Renderer
from weft.front.template import ChatTemplate
from weft.front.text import ModelText
from weft.front.tokenizer import Tokenizer as Own
from weft.front.tools.grammar import calls
from weft.front.tools.mistral import Mistral
from weft.types import Add, Grammar, TokenItem

PLACE = {"city": {"type": "string"}, "days": {"type": "integer"}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": PLACE, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
TOOLS: list[Any] = [WEATHER, TIME]
ASK: list[Any] = [{"role": "user", "content": "What is the weather?"}]
PARIS = ("weather", {"city": 'Paris "</tool_call>"', "days": 3})
TWO = [PARIS, ("time", {})]
SOURCES = {
    "hermes": "llama.cpp/Qwen-Qwen2.5-7B-Instruct",
    "llama3_json": "llama.cpp/meta-llama-Llama-3.1-8B-Instruct",
    "mistral": "mistral-common/chat_templates/v13",
    "mistral v7": "mistral-common/chat_templates/v7",
    "mistral_list": "llama.cpp/mistralai-Mistral-Nemo-Instruct-2407",
    "qwen3_coder": "llama.cpp/Qwen3-Coder",
    "seed_oss": "llama.cpp/ByteDance-Seed-OSS",
}


class Spoken:
    """A server whose model says `text`, and a client of it.  prompts(): what it was asked."""

    def __init__(self, client: openai.OpenAI, port: ScriptedPort, text: ModelText) -> None:
        self.client, self.port, self.text = client, port, text

    def ask(self, **options: Any) -> Any:
        return self.client.chat.completions.create(**{"model": MODEL, "messages": ASK, **options})

    def prompt(self) -> str:
        spec = [c.spec for c in self.port.commands if isinstance(c, Add)][-1]
        ids = [i for item in spec.items if isinstance(item, TokenItem) for i in item.ids]
        return self.text.tokenizer.decode(ids, skip_special=False)


@pytest.fixture
def speaking(info: EngineInfo, text: ModelText, shared: Callable[[str], Path]) -> Iterator[Callable[..., Spoken]]:
    """`speaking(text, family)`: a model with the template of that family that says the text."""
    with contextlib.ExitStack() as stack:

        def make(
            says: str,
            family: str | None = None,
            template: str | None = None,
            group: int = 1,
            renderer: Renderer | None = None,
            **options: Any,
        ) -> Spoken:
            name = SOURCES.get(family or "", template)
            own = text
            if name is not None:
                source = shared(f"data/templates/{name}.jinja").read_text()
                own = replace(text, template=ChatTemplate({"default": source}, {"bos_token": "", "eos_token": ""}))
            if renderer is not None:
                own = replace(
                    own, template=ChatTemplate(own.template.templates, own.template.variables, renderer=renderer)
                )
            ids = [*text.tokenizer.encode(says, add_special=False), text.eos_ids[0]]
            port = ScriptedPort(lambda spec, index: ids, replace(info, max_model_len=4096), group=group)
            stack.callback(port.close)
            url = stack.enter_context(serving(port, own, **options))
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
            return Spoken(stack.enter_context(client), port, own)

        yield make


def streamed(stream: Any) -> tuple[str, str, list[tuple[str, str, str]], str | None, Any]:
    """(thoughts, text, calls as (id, name, arguments), finish reason, usage) of a stream, checked for OpenAI's order."""
    thought, text, reason, usage = "", "", None, None
    found: list[list[str]] = []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reason is None
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.index == len(found):
                    assert call.type == "function"
                    assert call.function.arguments == ""
                    found.append([call.id, call.function.name, ""])
                else:
                    assert (call.index, call.id, call.function.name) == (len(found) - 1, None, None)
                    found[call.index][2] += call.function.arguments
            reason = choice.finish_reason
    return thought, text, [(i, n, a) for i, n, a in found], reason, usage


@pytest.mark.parametrize("family", [*SOURCES, "json"])
def test_calls_of_every_family(speaking: Callable[..., Spoken], family: str) -> None:
    says = forms.FORMS[family.partition(" ")[0]][0](TWO)
    model = speaking(says, family)
    answer = model.ask(tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls] == TWO
    assert len({c.id for c in choice.message.tool_calls}) == 2
    assert "weather" in model.prompt()
    assert "The weather of a place." in model.prompt()

    _, text, calls, reason, usage = streamed(
        model.ask(tools=TOOLS, stream=True, stream_options={"include_usage": True})
    )
    assert (text, reason) == ("", "tool_calls")
    assert [(n, json.loads(a)) for _, n, a in calls] == TWO
    assert usage.completion_tokens == answer.usage.completion_tokens

    then = [*ASK, choice.message.model_dump(exclude_none=True)]
    for call, result in zip(choice.message.tool_calls[:1], ["Rain."]):
        then.append({"role": "tool", "tool_call_id": call.id, "content": result})
    if family == "llama3_json":  # its template takes one call at once
        then[1]["tool_calls"] = then[1]["tool_calls"][:1]
    model.ask(messages=then, tools=TOOLS)
    assert "Paris" in model.prompt()
    assert "Rain." in model.prompt()
    assert "&#34;" not in model.prompt()


def test_text_around_calls_and_without(speaking: Callable[..., Spoken]) -> None:
    model = speaking(f"I look.\n{forms.hermes([PARIS])}\nDone.", "hermes", group=4)
    choice = model.ask(tools=TOOLS).choices[0]
    assert choice.message.content == "I look.\nDone."
    assert choice.finish_reason == "tool_calls"
    _, text, calls, _, _ = streamed(model.ask(tools=TOOLS, stream=True))
    assert (text, len(calls)) == ("I look.\nDone.", 1)
    plain = model.ask().choices[0]
    assert plain.message.content == f"I look.\n{forms.hermes([PARIS])}\nDone.", "without tools nothing is a call"
    none = model.ask(tools=TOOLS, tool_choice="none").choices[0]
    assert (none.message.content, none.message.tool_calls) == (plain.message.content, None)
    assert "weather of a place" not in model.prompt()


def test_one_call_only(speaking: Callable[..., Spoken]) -> None:
    model = speaking(forms.hermes(TWO), "hermes")
    choice = model.ask(tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert [c.function.name for c in choice.message.tool_calls] == ["weather"]
    _, _, calls, _, _ = streamed(model.ask(tools=TOOLS, parallel_tool_calls=False, stream=True))
    assert [name for _, name, _ in calls] == ["weather"]


def test_only_what_is_allowed_is_called(speaking: Callable[..., Spoken]) -> None:
    model = speaking(forms.hermes([PARIS]), "hermes")
    allowed = {"type": "function", "function": {"name": "time"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [allowed]}}
    message = model.ask(tools=TOOLS, tool_choice=choice).choices[0].message
    assert message.tool_calls is None
    assert message.content == forms.hermes([PARIS])
    assert "The weather of a place." in model.prompt()


def test_a_call_that_is_none_is_text(speaking: Callable[..., Spoken]) -> None:
    says = '<tool_call>\n{"name": "weather", "arguments": {"city": Paris}}\n</tool_call>'
    model = speaking(says, "hermes")
    choice = model.ask(tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (says, None, "stop")
    _, text, calls, reason, _ = streamed(model.ask(tools=TOOLS, stream=True))
    assert (text, reason) == (says, "stop")
    assert [name for _, name, _ in calls] == ["weather"], "a stream had told of it before it went wrong"


def test_a_call_cut_by_its_length_stays_as_far_as_it_came(speaking: Callable[..., Spoken], text: ModelText) -> None:
    says = forms.hermes([PARIS])
    model = speaking(says, "hermes")
    most = len(text.tokenizer.encode(says.partition("days")[0]))
    choice = model.ask(tools=TOOLS, max_tokens=most).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"city": "Paris')
    assert choice.message.content is None
    _, told, calls, reason, _ = streamed(model.ask(tools=TOOLS, max_tokens=most, stream=True))
    assert (told, reason, calls[0][2]) == ("", "length", choice.message.tool_calls[0].function.arguments)


def test_special_tokens_that_mark_calls_are_kept(speaking: Callable[..., Spoken], text: ModelText) -> None:
    """Marks are special tokens in many tokenizers, and special tokens are left out of texts."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(text.tokenizer._backend.to_str())
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("[TOOL_CALLS]", "<|python_tag|>")])
    own = Own(backend, text.tokenizer.config)
    mark = own.token_to_id("[TOOL_CALLS]")
    assert mark in own.special_ids
    model = replace(text, tokenizer=own, vocab_size=text.vocab_size + 2)
    assert model.marks == {mark, own.token_to_id("<|python_tag|>")}
    ids = own.encode("[TOOL_CALLS]time[ARGS]{}<|end|>", add_special=False)
    assert mark in ids
    for shown, want in ((model.marks, "[TOOL_CALLS]time[ARGS]{}"), ((), "time[ARGS]{}")):
        sequence = model.sequence(model.default_params(max_tokens=5), shown)
        assert "".join(sequence.push((i,))[0] for i in ids[:-1]) == want
    vocabulary = model.vocabulary()
    assert mark not in vocabulary.special, "a grammar may ask for it as for any text"
    assert set(model.eos_ids) <= vocabulary.special
    technique = LLGuidance()
    technique.attach(VocabularyShelf(lambda: vocabulary))
    path = technique.begin(Grammar("grammar", calls(Mistral.form, {"time": {"type": "object"}}, parallel=True)))
    assert path.mask()[mark // 8] >> mark % 8 & 1
    assert path.advance(ids) == len(ids)


def test_a_mark_that_is_a_special_token_is_read_in_answers(info: EngineInfo, text: ModelText) -> None:
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(text.tokenizer._backend.to_str())
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    model = replace(text, tokenizer=Own(backend, text.tokenizer.config))
    ids = model.tokenizer.encode("[TOOL_CALLS]time[ARGS]{}<|end|>", add_special=False)
    port = ScriptedPort(lambda spec, index: ids, replace(info, vocab_size=5000))
    try:
        with (
            serving(port, model, tool_parser="mistral") as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client,
        ):
            answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TIME])
    finally:
        port.close()
    assert answer.choices[0].message.tool_calls[0].function.name == "time"


# ---------------------------------------------------------------------------------------------- thoughts


@pytest.mark.parametrize(
    ("template", "says", "inside"),
    [
        ("llama.cpp/Qwen-Qwen3-0.6B", "<think>\nHm, {}\n</think>\n\n", False),
        ("llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "Hm, {}\n</think>\n\n", True),
        ("llama.cpp/ByteDance-Seed-OSS", "<seed:think>Hm, {}</seed:think>", False),
        ("mistral-common/chat_templates/v13_think", "[THINK]Hm, {}[/THINK]", False),
    ],
)
def test_thoughts(speaking: Callable[..., Spoken], text: ModelText, template: str, says: str, inside: bool) -> None:
    head = says.format("so <tool_call>.")
    model = speaking(head + "Rain.", template=template)
    answer = model.ask()
    assert answer.choices[0].message.content == "Rain."
    assert answer.choices[0].message.reasoning_content == "Hm, so <tool_call>."
    assert model.prompt().rstrip().endswith("<think>") == inside
    counted = answer.usage.completion_tokens_details.reasoning_tokens
    tokens = text.tokenizer.encode(head + "Rain.", add_special=False)
    assert text.tokenizer.decode(tokens[:counted]) in (head, head.rstrip("\n"))
    thought, said, _, reason, usage = streamed(model.ask(stream=True, stream_options={"include_usage": True}))
    assert (thought, said, reason) == ("Hm, so <tool_call>.", "Rain.", "stop")
    assert usage.completion_tokens_details.reasoning_tokens == counted


def test_a_thought_before_a_call(speaking: Callable[..., Spoken]) -> None:
    model = speaking(f"<think>\nWhere?\n</think>\n\n{forms.hermes(TWO)}", template="llama.cpp/Qwen-Qwen3-0.6B", group=3)
    message = model.ask(tools=TOOLS).choices[0].message
    assert (message.reasoning_content, message.content, len(message.tool_calls)) == ("Where?", None, 2)
    thought, text, calls, reason, _ = streamed(model.ask(tools=TOOLS, stream=True))
    assert (thought, text, len(calls), reason) == ("Where?", "", 2, "tool_calls")


def test_thoughts_stay_in_the_text_if_so_asked(speaking: Callable[..., Spoken]) -> None:
    says = "<think>\nHm\n</think>\n\nRain."
    answer = speaking(says, template="llama.cpp/Qwen-Qwen3-0.6B", reasoning_parser="none").ask()
    assert answer.choices[0].message.content == says
    assert answer.usage.completion_tokens_details is None


def test_logprobs_of_thoughts_and_calls_are_all_there(speaking: Callable[..., Spoken]) -> None:
    model = speaking(f"<think>\nHm\n</think>\n\n{forms.hermes([PARIS])}", template="llama.cpp/Qwen-Qwen3-0.6B", group=2)
    answer = model.ask(tools=TOOLS, logprobs=True)
    want = [entry.token for entry in answer.choices[0].logprobs.content]
    assert len(want) == answer.usage.completion_tokens
    got = [
        e.token
        for c in model.ask(tools=TOOLS, logprobs=True, stream=True)
        for x in c.choices
        if x.logprobs
        for e in x.logprobs.content
    ]
    assert got == want


def test_going_on_with_a_thought_and_with_an_answer(speaking: Callable[..., Spoken]) -> None:
    model = speaking("more.</think>Rain.", template="llama.cpp/Qwen-Qwen3-0.6B")
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    for start, want in (("<think>\nHm,", ("more.", "Rain.")), ("So:", (None, "more.</think>Rain."))):
        messages = [*ASK, {"role": "assistant", "content": start}]
        message = model.ask(messages=messages, extra_body=extra).choices[0].message
        assert (getattr(message, "reasoning_content", None), message.content) == want


# ---------------------------------------------------------------------------------------------- models that know no tools


def test_a_template_without_tools_gets_them_in_words(speaking: Callable[..., Spoken]) -> None:
    model = speaking('{"name": "time", "arguments": {}}')
    model.ask(tools=TOOLS)
    want = "<|user|>You may call functions. There are, one JSON object in a line each:\n\n" + "\n".join(
        json.dumps(t["function"]) for t in TOOLS
    )
    assert model.prompt().startswith(want)
    assert '\n\n{"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}\n\n' in model.prompt()
    assert model.prompt().endswith("What is the weather?<|end|><|assistant|>")
    model.ask(messages=[{"role": "system", "content": "Be brief."}, *ASK], tools=TOOLS)
    assert model.prompt().startswith("<|system|>Be brief.\n\nYou may call functions.")
    call = {"id": "c", "type": "function", "function": {"name": "time", "arguments": '{"zone": "é"}'}}
    past = [
        *ASK,
        {"role": "assistant", "content": "I see.", "tool_calls": [call, {**call, "id": "d"}]},
        {"role": "tool", "tool_call_id": "c", "content": "Noon."},
        {"role": "tool", "tool_call_id": "d", "content": [{"type": "text", "text": "One."}]},
    ]
    model.ask(messages=past)
    assert model.prompt() == (
        "<|user|>What is the weather?<|end|><|assistant|>I see.\n"
        '{"name": "time", "arguments": {"zone": "é"}}\n{"name": "time", "arguments": {"zone": "é"}}<|end|>'
        "<|user|>Result of time:\nNoon.\n\nResult of time:\nOne.<|end|><|assistant|>"
    )


def test_an_unknown_form_is_not_asked_for(speaking: Callable[..., Spoken]) -> None:
    """GLM's template tells of tools, in a form that there is no parser for."""
    model = speaking('{"name": "time", "arguments": {}}', template="llama.cpp/GLM-4.6")
    assert model.ask(tools=TOOLS).choices[0].message.tool_calls[0].function.name == "time"
    assert "<arg_key>" not in model.prompt()
    assert "You may call functions." in model.prompt()


def test_a_parser_of_the_users_choice(speaking: Callable[..., Spoken]) -> None:
    model = speaking(forms.hermes([("time", {})]), tool_parser="hermes")
    assert model.ask(tools=TOOLS).choices[0].message.tool_calls[0].function.name == "time"
    assert '<tool_call>\n{"name": "NAME"' in model.prompt()


def test_ids_and_names_that_a_template_asks_for(speaking: Callable[..., Spoken]) -> None:
    """Mistral's templates refuse ids that are not nine letters and digits; those of other servers are longer."""
    model = speaking("Rain.", "mistral_list")
    call = {"id": "call_0123456789abcdef", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    past = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "Noon."},
    ]
    model.ask(messages=past, tools=TOOLS)
    made = model.prompt().partition('"id": "')[2][:9]
    assert made.isalnum()
    assert f'"call_id": "{made}"' in model.prompt()
    spoken = speaking(forms.mistral_list([("time", {})]).replace(', "id": "abcde0000"', ""), "mistral_list")
    id = spoken.ask(tools=TOOLS).choices[0].message.tool_calls[0].id
    assert len(id) == 9
    assert id.isalnum()


# ---------------------------------------------------------------------------------------------- templates of requests


def test_a_template_of_the_request_only_where_it_is_trusted(speaking: Callable[..., Spoken]) -> None:
    own: Any = {"chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"}
    with pytest.raises(openai.BadRequestError, match="--trust-request-chat-template") as error:
        speaking("Rain.").ask(extra_body=own)
    assert (error.value.param, error.value.code) == ("chat_template", "unsupported_parameter")
    model = speaking("Rain.", trust_templates=True)
    model.ask(extra_body=own)
    assert model.prompt() == "<What is the weather?>"
    model.ask()
    assert model.prompt() == "<|user|>What is the weather?<|end|><|assistant|>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{% include '/etc/passwd' %}",
        "{{",
        "x" * (1 << 20) + "x",
    ],
    ids=lambda source: source[:20],
)
def test_a_trusted_template_can_do_no_harm(speaking: Callable[..., Spoken], source: str) -> None:
    """Also where it is asked whether it tells of tools, which renders it."""
    quick = Renderer(seconds=0.5, memory_bytes=1 << 28)
    try:
        model = speaking("Rain.", trust_templates=True, renderer=quick)
        with pytest.raises(openai.BadRequestError) as error:
            model.ask(tools=TOOLS, extra_body={"chat_template": source})
        assert error.value.param in ("messages", "chat_template")
        assert "weather" not in str(error.value)
        assert model.ask().choices[0].message.content == "Rain."
    finally:
        quick.close()
