"""Chat templates: the same text as transformers gives, byte for byte, and what the checkpoint's files say of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.errors import ConfigError, RequestError
from weft.front.template import ChatTemplate, plain_messages
from weft.front.tokenizer import Tokenizer

Load = Callable[..., Tokenizer]
Shared = Callable[[str], Path]
Message = dict[str, Any]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def conversations(shared: Shared) -> list[tuple[list[Message], list[Message] | None]]:
    """(messages, tools), among them what many templates refuse."""
    example = json.loads(shared("data/templates/minja-contexts/tool_use.json").read_text())
    tools, calls = example["tools"], example["messages"]
    return [
        ([user("Hello <b>&amp; é你😀</b>")], None),
        ([system("Be brief."), user("a"), assistant("b"), user("c")], None),
        ([user("x"), assistant("<think>\nr\n</think>\n\ny"), user("z")], None),
        ([user("q"), assistant("a", reasoning_content="because"), user("r")], None),
        ([user("q"), assistant("a", reasoning="old name"), user("r"), assistant("b", thinking="other name")], None),
        ([user("hi")], tools),
        (calls, tools),
        (plain_messages(calls), tools),
        ([user([{"type": "text", "text": "part"}])], None),
        ([assistant("first"), assistant("second")], None),
        ([user("  spaces\n"), assistant(None), user("")], None),
        ([], None),
    ]


@pytest.mark.parametrize(("folder", "step"), [("llama.cpp", 1), ("mistral-common/chat_templates", 4)])
def test_equals_transformers(shared: Shared, folder: str, step: int) -> None:
    """Every template (of Mistral's, which are much alike, every fourth) over every conversation: equal text, or refused
    by both."""
    from transformers.utils.chat_template_utils import render_jinja_template

    paths = sorted(shared(f"data/templates/{folder}").glob("*.jinja"))[::step]
    talks, equal, refused = conversations(shared), 0, 0
    for path in paths:
        source = path.read_text()
        template = ChatTemplate({"default": source}, SPECIAL)
        for i, (messages, tools) in enumerate([talks[0], *talks]):
            arguments: dict[str, Any] = {"tools": tools, "add_generation_prompt": i % 2 == 0}
            try:
                want = render_jinja_template([messages], chat_template=source, **arguments, **SPECIAL)[0][0]
            except Exception:
                with pytest.raises(RequestError, match=r"chat template (refuses|fails)"):
                    template.render(messages, **arguments)
                refused += 1
                continue
            assert template.render(messages, **arguments) == want, path.name
            equal += 1
    assert len(paths) >= 7
    assert equal > 2 * refused


def test_ollama_renderings(shared: Shared) -> None:
    """Golden texts made for other templates of the same families: 48 of the 105 pairs are written alike."""
    data = shared("data/templates/ollama-template-testdata")
    lines = (data / "templates.jsonl").read_text().splitlines()
    talk = [
        user("Hello, how are you?"),
        assistant("I'm doing great. How can I help you today?"),
        user("I'd like to show off how chat templating works!"),
    ]
    told = {"user": talk[:1], "user-assistant-user": talk}
    told["system-user-assistant-user"] = [system("You are a helpful assistant."), *talk]
    equal: Counter[str] = Counter()
    for line in filter(None, lines):
        for family, source in json.loads(line).items():
            template = ChatTemplate({"default": source}, {"bos_token": "", "eos_token": ""})
            for name, messages in told.items():
                try:
                    text = template.render(messages)
                except RequestError:
                    continue
                equal[family] += text == (data / f"{family}.gotmpl" / name).read_text()
    whole = {"openchat": 3, "llama3-instruct": 3, "granite-instruct": 3, "alfred": 3}
    assert +equal == Counter(whole | {"chatml": 25, "chatqa": 1, "gemma-instruct": 2, "phi-3": 7, "solar-instruct": 1})


@pytest.mark.parametrize(
    ("version", "samples"),
    [(1, ["no_tools"]), (2, ["no_tools", "several_calls"]), (3, ["no_tools", "several_calls", "parallel_calls"])],
)
def test_mistral_conversations_end_to_end(tokenizer_of: Load, shared: Shared, version: int, samples: list[str]) -> None:
    """Messages and tools to exactly the ids that Mistral's own library gives."""
    tokenizer = tokenizer_of(f"mistral{version}", legacy=False)
    source = shared(f"data/templates/mistral-common/chat_templates/v{version}_spm.jinja").read_text()
    template = ChatTemplate({"default": source}, tokenizer.special_tokens)
    for name in samples:
        place = shared(f"data/templates/mistral-common/samples/{name}")
        sample = json.loads((place / "sample.json").read_text())
        text = template.render(sample["messages"], tools=sample["tools"] or None, add_generation_prompt=False)
        want = json.loads((place / f"tokens_v{version}.json").read_text())["tokens"]
        assert tokenizer.encode(text, add_special=False) == want, name


def test_minja_contexts(shared: Shared) -> None:
    for name in ("simple", "system", "tool_use"):
        context = json.loads(shared(f"data/templates/minja-contexts/{name}.json").read_text())
        source = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{{ tools | length if tools }}"
        template = ChatTemplate({"default": source}, {"bos_token": context["bos_token"]})
        text = template.render(context["messages"], tools=context.get("tools"))
        assert text.startswith(context["bos_token"] + context["messages"][0]["role"] + ":")


# ---------------------------------------------------------------------------------------------- the language


def render(source: str, **arguments: Any) -> str:
    return ChatTemplate({"default": source}, SPECIAL).render([user("hi")], **arguments)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        (
            "{% for i in [0, 1, 2] %}{% if i == 2 %}{% break %}{% elif i == 0 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "1",
        ),
        ("{{ {'a': '<é>', 'b': none} | tojson }}", '{"a": "<é>", "b": null}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": [\n    2\n  ],\n  "b": 1\n}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}|{{ nothing }}", "<s></s>|"),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = 2 %}{% endfor %}{{ ns.x }}", "2"),
        ("{{ dict(a=1).a }}{{ dict.fromkeys(['k']) }}", "1{'k': None}"),
        ("{{ '%s-%s' | format(1, 'é') }}{{ 'a' ~ 1 }}", "1-éa1"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }}", "[a]"),
        ("plain text\n", "plain text"),
    ],
)
def test_language(source: str, want: str) -> None:
    assert render(source) == want


def test_documents_tools_and_arguments() -> None:
    source = "{{ documents[0].title }}{{ tools[0].function.name }}{{ enable_thinking }}{{ style }}{{ add_generation_prompt }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    kwargs = {"enable_thinking": False, "style": {"deep": ["x"]}}
    got = render(source, tools=tools, documents=[{"title": "T"}], kwargs=kwargs, add_generation_prompt=False)
    assert got == "TfFalse{'deep': ['x']}False"


def test_arguments_are_allow_listed() -> None:
    assert render("x", kwargs={"enable_thinking": True}) == "x", "a well-known argument never hurts"
    with pytest.raises(RequestError, match=r"does not read tokenize.*own.*enable_thinking") as caught:
        render("{{ own }}", kwargs={"tokenize": True})
    assert caught.value.param == "chat_template_kwargs"
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "__class__", "_x", "a b", ""):
        with pytest.raises(RequestError, match="cannot be set"):
            render("{{ _x }}", kwargs={name: 1})
    with pytest.raises(RequestError, match="not plain JSON"):
        render("{{ x }}", kwargs={"x": object()})


def test_going_on_with_the_last_message() -> None:
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    trimmed = plain.replace("m.content", "m.content | trim")
    talk = [user("q"), assistant("It is ")]
    for source, want in ((plain, "<user>q<end><assistant>It is "), (trimmed, "<user>q<end><assistant>It is")):
        template = ChatTemplate({"default": source})
        assert template.render(talk, add_generation_prompt=False, continue_final_message=True) == want
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate({"default": "{{ messages[0].content }}"}).render(talk, continue_final_message=True)
    with pytest.raises(RequestError, match="a last message with text"):
        ChatTemplate({"default": plain}).render([assistant(None)], continue_final_message=True)
    assert talk[-1]["content"] == "It is ", "the caller's messages stay as they were"


def test_refusals_and_mistakes_say_what_happened() -> None:
    with pytest.raises(RequestError, match="refuses the conversation: roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.param, caught.value.code) == ("messages", "chat_template_error")
    with pytest.raises(RequestError, match="line 2: TemplateSyntaxError"):
        render("fine\n{% if")
    with pytest.raises(RequestError, match="UndefinedError"):
        render("{{ messages[0].a.b }}")
    with pytest.raises(RequestError, match="TypeError") as caught:
        render("{{ 1 + messages }}")
    with pytest.raises(RequestError, match=r"refuses.*object at 0x\.\.\.") as caught:
        render("{{ raise_exception(joiner() ~ '') }}")
    with pytest.raises(RequestError) as caught:
        render("{{ raise_exception('x' * 9999) }}")
    assert len(str(caught.value)) < 600


# ---------------------------------------------------------------------------------------------- a checkpoint's files


def loaded(path: Path, config: dict[str, Any], bundled: Path) -> ChatTemplate:
    tokenizer = Tokenizer.load(bundled)
    tokenizer.config.clear()
    tokenizer.config.update(config)
    return ChatTemplate.load(path, tokenizer, name="toy")


def test_which_template_wins(tmp_path: Path, bundled: Path) -> None:
    talk, tools = [user("hi")], [{"type": "function", "function": {"name": "f"}}]
    assert loaded(tmp_path, {"chat_template": "config"}, bundled).render(talk) == "config"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = loaded(tmp_path, {"chat_template": named}, bundled)
    assert (template.render(talk), template.render(talk, tools=tools)) == ("plain", "tools")
    assert template.render(talk, tools=[]) == "plain"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert loaded(tmp_path, {"chat_template": "config"}, bundled).render(talk) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert loaded(tmp_path, {"chat_template": "config"}, bundled).render(talk) == "jinja"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert loaded(tmp_path, {"chat_template": "config"}, bundled).render(talk, tools=tools) == "more"


def test_no_template(tmp_path: Path, bundled: Path) -> None:
    template = loaded(tmp_path, {}, bundled)
    assert not template
    with pytest.raises(RequestError, match="toy has no chat template; use /v1/completions"):
        template.render([user("hi")])
    odd = ChatTemplate({"a": "1", "b": "2"})
    with pytest.raises(RequestError, match="none is the default"):
        odd.render([user("hi")])


@pytest.mark.parametrize(
    "value", [7, [7], [{"name": "x"}], [{"name": 1, "template": "x"}], [{"name": "d", "template": 1}]]
)
def test_malformed_template_settings(tmp_path: Path, bundled: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match="chat_template must be text or a list"):
        loaded(tmp_path, {"chat_template": value}, bundled)
    with pytest.raises(ConfigError, match="too long"):
        loaded(tmp_path, {"chat_template": "x" * (1 << 21)}, bundled)


def test_the_bundled_template(bundled: Path) -> None:
    template = ChatTemplate.load(bundled, Tokenizer.load(bundled))
    talk = [system("s"), user("u"), assistant("a"), user("v")]
    assert (
        template.render(talk) == "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>v<|end|><|assistant|>"
    )


# ---------------------------------------------------------------------------------------------- messages of clients


def test_client_messages_become_plain_ones() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    bad = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{not json"}}
    given = [
        user(parts),
        assistant(None, tool_calls=[call, bad]),
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]
    plain = plain_messages(given)
    assert plain[0] == {"role": "user", "content": "one\ntwo"}
    assert plain[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1]}
    assert plain[1]["tool_calls"][1]["function"]["arguments"] == "{not json"
    assert plain[1]["content"] is None
    assert plain[2] == given[2]
    assert call["function"]["arguments"] == '{"x": [1]}', "the caller's messages stay as they were"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [None],
        ["hi"],
        [{}],
        [{"role": 1, "content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": "user"}],
        [user(7)],
        [user(None)],
        [user({"type": "text", "text": "x"})],
        [user([{"type": "image_url", "image_url": {"url": "http://x"}}])],
        [user([{"type": "text"}])],
        [user([{"type": "text", "text": 5}])],
        [user(["text"])],
        [assistant("x", tool_calls="f")],
        [user("x")] * 20_000,
    ],
)
def test_bad_messages(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages") as caught:
        plain_messages(messages)
    assert caught.value.param == "messages"
