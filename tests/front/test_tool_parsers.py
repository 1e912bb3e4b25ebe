"""Parsers of tool calls: right calls of every family whole and cut everywhere, wrong ones as text, linear work."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.front.calls import EVERY_FORM, FORMS, Call, called, parsed, parser
from weft.conformance.tools import samples
from weft.errors import ConfigError
from weft.front.tools import PARSERS, chosen, told
from weft.front.tools.events import Arguments, Begun, Broken, Text
from weft.front.tools.value import MAX_DEPTH, is_json

STEP = 15
"""Every so many samples; `weft conformance tools` takes all of them."""
AWKWARD: dict[str, Any] = {
    "text": 'a </tool_call> "b" \\ <tool_call>{"name": "g", "arguments": {}}</tool_call>\n\n[TOOL_CALLS]g[ARGS]{}',
    "tags": "</parameter> <parameter x </function>\n</parameter></parameter>",
    "lines": "\n one\n\ttwo \n",
    "empty": "",
    "words": ["null", None, True, -1.5e-7, {"": []}],
    "letters": "é😀\u2028\u0000",
    "number": 12345678901234567890,
}
TOOLS = {
    "f": {"properties": {k: {"type": "string"} for k in ("text", "tags", "lines", "empty", "letters")}},
    "g": {},
}


def schemas(tools: list[dict[str, Any]]) -> dict[str, Any]:
    return {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}


@pytest.mark.parametrize(("name", "form"), EVERY_FORM)
def test_samples_whole_and_by_characters(shared: Callable[[str], Path], name: str, form: Callable[..., str]) -> None:
    found = [s for s in samples(shared("data/tools").parent) if s.calls][::STEP]
    assert len(found) > 90
    for sample in found:
        text = form(sample.calls)
        whole = parsed(name, [text], schemas(sample.tools))
        assert called(whole) == ("", as_read(name, sample.calls, schemas(sample.tools))), sample.id
        assert parsed(name, text, schemas(sample.tools)) == whole, sample.id


def as_read(name: str, calls: list[Call], tools: dict[str, Any]) -> list[Call]:
    """What can be known of calls in bare text: a string that its schema does not call one may read like JSON."""
    if name not in ("qwen3_coder", "seed_oss"):
        return calls
    out = []
    for function, arguments in calls:
        properties = tools[function].get("properties", {})
        read = dict(arguments)
        for key, value in arguments.items():
            if isinstance(value, str) and properties.get(key, {}).get("type") != "string" and is_json(value):
                read[key] = json.loads(value)
        out.append((function, read))
    return out


@pytest.mark.parametrize(("name", "form"), EVERY_FORM)
def test_every_cut_in_two_and_awkward_texts(name: str, form: Callable[..., str]) -> None:
    """Closing tags, quotes and other calls inside an argument stay there; calls follow text."""
    calls: list[Call] = [("f", AWKWARD), ("g", {})]
    first = "" if form.__name__ in ("llama3_json", "plain") else "I look.\n\n"
    text = first + form(calls) + "\n"
    whole = parsed(name, [text], TOOLS)
    assert called(whole) == (first.strip(), calls)
    for cut in range(len(text)):
        assert parsed(name, [text[:cut], text[cut:]], TOOLS) == whole, cut


@pytest.mark.parametrize(("name", "form"), EVERY_FORM)
def test_what_breaks_off_is_not_lost(name: str, form: Callable[..., str]) -> None:
    """Cut anywhere: the text that was told last holds all that came of the call that is not whole."""
    text = "Now: " * (form.__name__ not in ("llama3_json", "plain")) + form([("f", {"a": [1, {"b": "c d"}]})])
    for cut in range(len(text) + 1):
        events = parsed(name, [text[:cut]], {"f": {}})
        if isinstance(events[-1] if events else None, Broken):
            assert events[-1].cut
            said = "".join(e.text for e in events if isinstance(e, Text | Broken))
            assert said == text[:cut]
        elif not any(isinstance(e, Begun) for e in events):
            assert "".join(e.text for e in events if isinstance(e, Text)) == text[:cut]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_call> none </tool_call>"),
        ("hermes", '<tool_call>{"name": "h", "arguments": {}}</tool_call>'),  # nobody offered h
        ("hermes", '<tool_call>{"name": "f f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": []}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "more": 1}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f",}</tool_call>'),
        ("hermes", '<tool_call>{"name" "f"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": "{\\"a\\": ", "name": "f"}</tool_call>'),
        ("hermes", "<tool_call>{}</tool_call>"),
        ("hermes", "< tool_call> <tool_cal"),
        ("llama3_json", '{"answer": 4}'),
        ("llama3_json", 'So: {"name": "f", "parameters": {}}'),
        ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
        ("mistral", '[TOOL_CALLS] {"name": 5}'),
        ("mistral", "[TOOL_CALLS] f f"),
        ("mistral", "[TOOL_CALLS]f[ARGS]"),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abcdefghij[ARGS]{}"),
        ("mistral", "[TOOL_CALLS]" + "f" * 200),
        ("json", "[1, 2]"),
        ("json", "```json\n{}\n```"),
        ("qwen3_coder", "<tool_call>\n<function=h>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function f>"),
        ("qwen3_coder", "<function=f\n>"),
        ("qwen3_coder", "<function=f>x</function>"),
    ],
)
def test_no_calls_are_text(name: str, text: str) -> None:
    for told_of in (text, f"{text} \n and so on", f"\n{text}"):
        assert parsed(name, [told_of], TOOLS) == [Text(told_of)]


def test_a_call_that_goes_wrong_is_told_and_comes_out_as_text() -> None:
    events = parsed("hermes", ['Well. <tool_call>{"name": "f", "arguments": {"a": nix}}</tool_call> Done.'], TOOLS)
    head = ' <tool_call>{"name": "f", "arguments": {"a": n'
    assert events == [
        Text("Well."),
        Begun(0, "id0", "f"),
        Arguments(0, '{"a": n'),
        Broken(0, head, cut=False),
        Text("ix}}</tool_call> Done."),
    ]


def test_a_right_call_after_a_wrong_one() -> None:
    right = '<tool_call>{"name": "g"}</tool_call>'
    assert called(parsed("hermes", ["<tool_call><tool_call>" + right], TOOLS)) == (
        "<tool_call><tool_call>",
        [("g", {})],
    )
    events = parsed("mistral", ['[TOOL_CALLS][{"name": "g", "arguments": {}}, {"name": 1}]'], TOOLS)
    assert called(events) == (', {"name": 1}]', [("g", {})])
    assert called(parsed("llama3_json", ['{"name": "g"} ; and {"name": "g"}'], TOOLS)) == (
        ' ; and {"name": "g"}',
        [("g", {})],
    )


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}', {"a": 1}),  # the name behind, no closing tag
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', {"a": 1}),  # in a string
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', {}),
        ("hermes", '<tool_call>{"type": "function", "id": "x", "name": "f", "parameters": {}}', {}),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', {"a": 1}),
        ("mistral", '[TOOL_CALLS]f [ARGS] {"a": 1}', {"a": 1}),
        ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {"a": 1}}', {"a": 1}),
        ("json", '```json {"name": "f", "arguments": {"a": 1}}', {"a": 1}),
        ("qwen3_coder", "<function=f>\n<parameter=n>True</parameter></function>", {"n": True}),  # no outer tag
        ("qwen3_coder", '<tool_call>{"name": "f", "arguments": {"n": 1}}</tool_call>', {"n": 1}),
        ("qwen3_coder", "<function=f><parameter=n>x y</parameter></function>", {"n": "x y"}),
    ],
)
def test_forms_that_models_fall_into(name: str, text: str, want: dict[str, Any]) -> None:
    assert called(parsed(name, [text], TOOLS)) == ("", [("f", want)])


@pytest.mark.parametrize(
    ("schema", "bare", "want"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": "boolean"}, "False", False),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "number"}, "five", "five"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({}, "1", 1),
        ({}, "NaN", "NaN"),
    ],
)
def test_bare_values_mean_what_their_schema_says(schema: dict[str, Any], bare: str, want: Any) -> None:
    text = f"<tool_call>\n<function=f>\n<parameter=p>\n{bare}\n</parameter>\n</function>\n</tool_call>"
    assert called(parsed("qwen3_coder", text, {"f": {"properties": {"p": schema}}})) == ("", [("f", {"p": want})])


def test_arguments_go_out_as_they_come() -> None:
    for name, forms in FORMS.items():
        machine = parser(name, {"f": {"properties": {"a": {"type": "string"}}}})
        seen = [type(e) for char in forms[0]([("f", {"a": "b" * 50})]) for e in machine.feed(char)]
        assert seen.count(Arguments) > 50, name


# ---------------------------------------------------------------------------------------------- any text, any cuts

PIECES = [
    "<tool_call>", "</tool_call>", "<function=f>", "<function=", "<parameter=a>", "</parameter>", "</function>", "[TOOL_CALLS]",
    "[ARGS]", "[CALL_ID]", "<|python_tag|>", "```json", "```", "<seed:tool_call>", '{"name": "f", "arguments": {', '"parameters"',
    '{"name": "f", "parameters": {"a": 1}}', "{", "}", "[", "]", '"', "\\", ":", ",", ";", "f", "1", "true", " ", "\n", "<", "x",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40)


@settings(max_examples=80, deadline=None)
@given(pieces=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=8), name=st.sampled_from(sorted(PARSERS)))
def test_any_text_any_cuts(pieces: list[str], cuts: list[int], name: str) -> None:
    """Events are equal however the text is cut, calls are whole or told to be broken, and the work is linear."""
    text = "".join(pieces)
    machine = parser(name, TOOLS)
    whole = parsed(name, [text], TOOLS)
    edges = [0, *sorted(cuts), len(text)]
    assert parsed(name, [text[a:b] for a, b in itertools.pairwise(edges)], TOOLS) == whole
    machine.feed(text)
    machine.finish()
    assert machine.steps <= 3 * len(text) + 3
    open_, arguments = None, ""
    for event in whole:
        if isinstance(event, Begun):
            assert open_ is None
            open_, arguments = event.index, ""
        elif isinstance(event, Arguments):
            arguments += event.text
        elif not isinstance(event, Text):
            assert event.index == open_
            open_ = None
            assert isinstance(event, Broken) or (arguments.startswith("{") and is_json(arguments))
    assert open_ is None


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet='{}[]",:\\u0a1eE+-.trufalsn \n\x01é', max_size=12))
def test_json_is_what_json_is(text: str) -> None:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
        right = True
    except ValueError:
        right = False
    assert is_json(text) == right


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3))


@settings(max_examples=50, deadline=None)
@given(value=VALUES)
def test_every_json_is_json(value: Any) -> None:
    text = json.dumps(value, indent=1)
    assert is_json(text)
    assert is_json(f" {json.dumps(value, ensure_ascii=False)}\n")
    assert not is_json(text + "x")


def test_depth_is_bounded() -> None:
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("name", sorted(PARSERS))
@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", "<tool_call>\n", '<tool_call>{"', "[TOOL_CALLS]", "[TOOL_CALLS] [", "</parameter>", "</parameter>\n ",
     "<function=f><parameter=a></parameter>", " ", "{", '{"name":', "```json", "<", "[TOOL_CALLS]f[", '{"name": "g"};'],
)  # fmt: skip
def test_work_is_linear_on_what_is_meant_to_hurt(name: str, unit: str) -> None:
    for prefix in ("", "<function=f><parameter=a>", '<tool_call>{"name": "f", "arguments": {"a": "'):
        machine = parser(name, TOOLS)
        text = prefix + unit * (2000 // len(unit))
        machine.feed(text)
        machine.finish()
        assert machine.steps <= 3 * len(text) + 3


# ---------------------------------------------------------------------------------------------- templates

PAST: list[Call] = [
    ("weather", {"city": 'Oslo "</tool_call>"', "days": 3, "near": ["a", {"b": None}], "wet": True}),
    ("time", {}),
]
FLAT: list[Call] = [("weather", {"city": "Oslo", "days": 3, "wet": True}), ("time", {})]
"""For a template that writes lists as Python does, which models do not."""
SEEN = {"weather": {"properties": {"city": {"type": "string"}}}, "time": {}}


def test_calls_that_templates_write_are_read_back(shared: Callable[[str], Path]) -> None:
    """A template writes an answer of the assistant's in a conversation; what it wrote is an output of its model."""
    from weft.errors import RequestError
    from weft.front.template import ChatTemplate

    families: dict[str, int] = {}
    for path in sorted(shared("data/templates").rglob("*.jinja")):
        family = told(path.read_text())
        if family is None or path.stem.partition("_")[2].startswith(("audio", "image", "spm")):
            continue
        template = ChatTemplate({"default": path.read_text()}, {"bos_token": "", "eos_token": "<END>"})
        past = FLAT if family.name == "seed_oss" else PAST
        for calls in (past, past[:1]):
            made = [
                {"id": f"abcde{i:04d}", "type": "function", "function": {"name": name, "arguments": given}}
                for i, (name, given) in enumerate(calls)
            ]
            asked = [{"role": "user", "content": "Hi"}]
            said = {"role": "assistant", "content": "", "tool_calls": made}
            try:
                head = template.render(asked, tools=[], add_generation_prompt=True)
                whole = template.render([*asked, said], tools=[], add_generation_prompt=False)
            except RequestError:
                continue
            for tail in ("<END>", "<|im_end|>", "<|eot_id|>", "<seed:eos>", "<sep>"):
                whole = whole.rstrip().removesuffix(tail)
            head = head.partition("<think>")[0].rstrip()
            assert whole.startswith(head), path.name
            output = whole[len(head) :].lstrip().removeprefix("<think>").lstrip().removeprefix("</think>").lstrip()
            if "&#34;" in output:  # the template's own mistake, see `Dialect.wants_text`
                continue
            text, found = called(parsed(family.name, output, SEEN))
            assert (text.strip(), found) == ("", calls), path.name
            families[family.name] = families.get(family.name, 0) + 1
    assert set(families) == set(PARSERS) - {"json"}
    assert sum(families.values()) > 30


# ---------------------------------------------------------------------------------------------- which parser


def test_a_template_tells_its_parser(shared: Callable[[str], Path]) -> None:
    folder = shared("data/templates")
    want = {
        "llama.cpp/Qwen-Qwen2.5-7B-Instruct": "hermes",
        "llama.cpp/Qwen-Qwen3-0.6B": "hermes",
        "llama.cpp/NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
        "llama.cpp/meta-llama-Llama-3.1-8B-Instruct": "llama3_json",
        "llama.cpp/meta-llama-Llama-3.2-3B-Instruct": "llama3_json",
        "llama.cpp/mistralai-Mistral-Nemo-Instruct-2407": "mistral_list",
        "mistral-common/chat_templates/v13": "mistral",
        "llama.cpp/Qwen3-Coder": "qwen3_coder",
        "llama.cpp/ByteDance-Seed-OSS": "seed_oss",
        "llama.cpp/GLM-4.6": None,
        "llama.cpp/google-gemma-2-2b-it": None,
        "llama.cpp/meetkai-functionary-medium-v3.1": None,
    }
    for name, parser_name in want.items():
        found = told((folder / f"{name}.jinja").read_text())
        assert (found and found.name) == parser_name, name


def test_a_parser_can_be_named() -> None:
    assert chosen("auto", ["", "[TOOL_CALLS]"]) is PARSERS["mistral_list"]
    assert chosen("auto", []) is None
    assert chosen("hermes", ["[TOOL_CALLS]"]) is PARSERS["hermes"]
    with pytest.raises(ConfigError, match=r"no tool parser 'x'; there are auto, hermes"):
        chosen("x", [])
