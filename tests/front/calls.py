"""What tests of tool calls share: forms of the families written down by hand, and events without regard to how they came."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from weft.front.tools import PARSERS
from weft.front.tools.events import Arguments, Begun, Broken, Ended, Event, Text, Tools
from weft.front.tools.machine import Machine

Call = tuple[str, dict[str, Any]]


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring pieces of text, and of one call's arguments, in one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            out[-1] = Arguments(last.index, last.text + event.text)
        else:
            out.append(event)
    return out


def parser(name: str, tools: Tools | None = None) -> Machine:
    numbers = itertools.count()
    return PARSERS[name](tools, lambda: f"id{next(numbers)}")


def parsed(name: str, pieces: Iterable[str], tools: Tools | None = None) -> list[Event]:
    machine = parser(name, tools)
    events = [event for piece in pieces for event in machine.feed(piece)]
    return merged(events + machine.finish())


def called(events: Sequence[Event]) -> tuple[str, list[Call]]:
    """(text, calls) of the events of right output: calls do not overlap, and each is whole."""
    text, calls = "", []
    for event in events:
        match event:
            case Text(more):
                text += more
            case Begun(index, _, name):
                assert index == len(calls)
                calls.append((name, None))
            case Arguments(index, written):
                assert (index, calls[-1][1]) == (len(calls) - 1, None)
                calls[-1] = (calls[-1][0], json.loads(written))
            case Ended(index):
                assert index == len(calls) - 1
            case Broken():
                raise AssertionError(event)
    return text, calls


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{n}", "arguments": {json.dumps(a, ensure_ascii=False)}}}\n</tool_call>'
        for n, a in calls
    )


def llama3_json(calls: Sequence[Call]) -> str:
    return "; ".join(f'{{"name": "{n}", "parameters": {json.dumps(a)}}}' for n, a in calls)


def python_tag(calls: Sequence[Call]) -> str:
    return "<|python_tag|>" + llama3_json(calls)


def mistral_list(calls: Sequence[Call]) -> str:
    told = [{"name": n, "arguments": a, "id": f"abcde{i:04d}"} for i, (n, a) in enumerate(calls)]
    return "[TOOL_CALLS] " + json.dumps(told)


def mistral_named(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)


def mistral_ids(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[CALL_ID]abcde{i:04d}[ARGS]{json.dumps(a)}" for i, (n, a) in enumerate(calls))


def qwen3_coder(calls: Sequence[Call], tag: str = "tool_call") -> str:
    out = []
    for name, given in calls:
        parameters = "".join(f"<parameter={key}>\n{_bare(value)}\n</parameter>\n" for key, value in given.items())
        out.append(f"<{tag}>\n<function={name}>\n{parameters}</function>\n</{tag}>")
    return "\n".join(out)


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def seed_oss(calls: Sequence[Call]) -> str:
    return qwen3_coder(calls, "seed:tool_call")


def plain(calls: Sequence[Call]) -> str:
    return json.dumps([{"name": n, "arguments": a} for n, a in calls])


def fenced(calls: Sequence[Call]) -> str:
    return f"```json\n{plain(calls)}\n```"


FORMS = {
    "hermes": (hermes,),
    "llama3_json": (llama3_json, python_tag),
    "mistral": (mistral_list, mistral_named, mistral_ids),
    "mistral_list": (mistral_list,),
    "qwen3_coder": (qwen3_coder,),
    "seed_oss": (seed_oss,),
    "json": (plain, fenced),
}
"""How each family writes calls, by the name of its parser."""
EVERY_FORM = [(name, form) for name, forms in FORMS.items() for form in forms]
