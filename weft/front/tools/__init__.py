"""Tool calls in the text of models: a parser for each family of templates, and which one a template needs.

A family is one file: its form in the docstring, a `Machine` that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable

from weft.errors import ConfigError
from weft.front.tools.hermes import Hermes
from weft.front.tools.llama3 import Llama3
from weft.front.tools.machine import Machine
from weft.front.tools.mistral import Mistral, MistralList
from weft.front.tools.plain import Plain
from weft.front.tools.qwen3_coder import Qwen3Coder
from weft.front.tools.seed_oss import SeedOSS

PARSERS: dict[str, type[Machine]] = {
    p.name: p for p in (Hermes, Llama3, Mistral, MistralList, Qwen3Coder, SeedOSS, Plain)
}

# What of a template's text tells its family: all of the first and none of the second.  The first that fits counts.
_TOLD: tuple[tuple[type[Machine], tuple[str, ...], tuple[str, ...]], ...] = (
    (Mistral, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MistralList, ("[TOOL_CALLS]",), ()),
    (SeedOSS, ("seed:tool_call", "<function=", "<parameter="), ()),
    (Qwen3Coder, ("<tool_call>", "<function=", "<parameter="), ()),
    (Hermes, ("<tool_call>", "arguments"), ("<arg_key>", "<function=", "<tool_calls>")),
    (Llama3, ("<|start_header_id|>", '{"name": ', '"parameters": '), ("<function=", "functools")),
)


def told(source: str) -> type[Machine] | None:
    """The parser for the calls that a chat template writes; None where it writes them as no known family does."""
    for parser, present, absent in _TOLD:
        if all(text in source for text in present) and not any(text in source for text in absent):
            return parser
    return None


def chosen(name: str, sources: Iterable[str]) -> type[Machine] | None:
    """The parser of a name, or for "auto" the one that the first telling template needs.  Raises ConfigError."""
    if name == "auto":
        return next(filter(None, map(told, sources)), None)
    if name not in PARSERS:
        raise ConfigError(f"there is no tool parser {name!r}; there are auto, {', '.join(sorted(PARSERS))}")
    return PARSERS[name]
