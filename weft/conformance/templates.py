"""Suite `templates`: chat templates over conversations with and without tools, as transformers renders them.

One sample is a template with a conversation.  It counts as enforced where weft gives the very text that
`transformers.utils.chat_template_utils.render_jinja_template`, what `apply_chat_template` calls, gives; as refused where both
refuse it, as many templates do with roles out of order; as accepted wrongly where weft alone renders it; as rejected wrongly
where weft refuses it, or gives another text.

    templates/**/*.jinja                                       one template each
    templates/ollama-template-testdata/templates.jsonl         {name: template} on each line
    templates/minja-contexts/*.json                            {messages, tools}: conversations, beside weft's own
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from weft.conformance.count import Count, folder
from weft.errors import ConfigError, RequestError
from weft.front.template import ChatTemplate, plain_messages

Message = dict[str, Any]
Talk = tuple[list[Message], list[Message] | None]
"""Messages, and tools."""
Reference = Callable[..., str]
"""(source, messages, tools, add_generation_prompt) to text; raises anything at all."""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def run(data: Path) -> Count:
    """Over the folder `templates` of `data`.  Raises ConfigError where it, or transformers, is not there."""
    place = folder(data, "templates")
    return judge(templates(place), conversations(place), transformers())


def transformers() -> Reference:
    """What transformers makes of a template.  Raises ConfigError where it is not installed."""
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        raise ConfigError(
            "this suite compares with transformers, which is not installed: pip install 'weft[hf]'"
        ) from None

    def render(source: str, messages: list[Message], tools: list[Message] | None, prompt: bool) -> str:
        given = {"tools": tools, "add_generation_prompt": prompt, **SPECIAL}
        text: str = render_jinja_template([messages], chat_template=source, **given)[0][0]
        return text

    return render


def judge(found: Iterable[tuple[str, str]], talks: list[Talk], reference: Reference) -> Count:
    """Count what becomes of (name, template) over conversations, with and without the head of an answer in turns."""
    count = Count("templates")
    for name, source in found:
        template = ChatTemplate({"default": source}, SPECIAL, name=name)
        for i, (messages, tools) in enumerate([talks[0], *talks]):
            count.total += 1
            where, prompt = f"{name}, conversation {i}", i % 2 == 0
            try:
                want = reference(source, messages, tools, prompt)
            except Exception:  # a template may raise anything at all
                want = None
            try:
                text = template.render(messages, tools=tools, add_generation_prompt=prompt)
            except RequestError:
                text = None
            if text is None and want is None:
                count.refused += 1
            elif text == want:
                count.enforced += 1
            elif want is None:
                count.accepted_wrongly(where)
            else:
                count.rejected_wrongly(where)
    return count


def templates(place: Path) -> Iterator[tuple[str, str]]:
    """(name, source) of every template of the folder."""
    for path in sorted(place.rglob("*.jinja")):
        yield path.relative_to(place).as_posix(), path.read_text(encoding="utf8")
    named = place / "ollama-template-testdata" / "templates.jsonl"
    for line in named.read_text(encoding="utf8").splitlines() if named.is_file() else ():
        for family, source in (json.loads(line) if line.strip() else {}).items():
            yield f"{family} of {named.name}", source


def conversations(place: Path) -> list[Talk]:
    """Conversations, among them what many templates refuse."""
    talks: list[Talk] = [(messages, None) for messages in OWN]
    for path in sorted((place / "minja-contexts").glob("*.json")):
        context = json.loads(path.read_text(encoding="utf8"))
        messages, tools = context["messages"], context.get("tools")
        talks.append((messages, tools))
        if tools:
            talks += [
                ([_said("user", "hi")], tools),
                (plain_messages(messages), tools),
                (plain_messages(messages), None),
            ]
    return talks


def _said(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


OWN: list[list[Message]] = [
    [_said("user", "Hello <b>&amp; é你😀</b>")],
    [_said("system", "Be brief."), _said("user", "a"), _said("assistant", "b"), _said("user", "c")],
    [_said("user", "x"), _said("assistant", "<think>\nr\n</think>\n\ny"), _said("user", "z")],
    [_said("user", "q"), _said("assistant", "a", reasoning_content="because"), _said("user", "r")],
    [
        _said("user", "q"),
        _said("assistant", "a", reasoning="old name"),
        _said("user", "r"),
        _said("assistant", "b", thinking="x"),
    ],
    [_said("user", [{"type": "text", "text": "part"}])],
    [_said("assistant", "first"), _said("assistant", "second")],
    [_said("user", "  spaces\n"), _said("assistant", None), _said("user", "")],
    [],
]
