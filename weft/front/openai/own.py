"""The field `weft` of a request: a stack for it alone, the label of an answer, a prompt to contrast with, a deadline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from weft.compose import complete, compose
from weft.errors import ConfigError, RequestError
from weft.front.grammars import constrained
from weft.front.openai.structs import MAX_TECHNIQUES, Fields
from weft.registry import Part, lookup, parse
from weft.types import Grammar


def techniques(
    fields: Fields, server: Sequence[str], model: Sequence[str] = (), grammar: Grammar | None = None
) -> tuple[str, ...]:
    """The parts that a request lays over the server's stack, checked.  Raises RequestError saying what is wrong with them.

    model: parts that the name of its model stands for (an adapter's), in slots that the request itself leaves open.
    grammar: what its answers are held to, where that is not what its fields say.
    Only what composes is let through, so that a refusal comes with its reasons before the prompt is even read.
    """
    given = fields.parts
    if len(given) > MAX_TECHNIQUES:
        raise RequestError(f"weft.with names {len(given)} techniques; at most {MAX_TECHNIQUES}", param="weft.with")
    try:
        own = [parse(text) for text in given]
        own = [parse(text) for text in constrained([str(p) for p in own], server, grammar or fields.grammar)]
        named = {part.slot for part in own}
        own = [*(part for part in map(parse, model) if part.slot not in named), *own]
        for part in own:
            if not getattr(lookup(part.slot, part.name), "per_request", False):
                raise ConfigError(f"{part} belongs to the whole server: it is started with it, or without")
        verdict = compose(_laid_over(own, server))
    except ConfigError as error:
        raise RequestError(str(error), param="weft.with", code="unsupported_stack") from None
    if verdict.verdict == "refused":
        reasons = "; ".join(r.text for r in verdict.reasons)
        raise RequestError(
            f"these techniques do not go together: {reasons}", param="weft.with", code="unsupported_stack"
        )
    return tuple(str(part) for part in own)


def deadline(fields: Fields) -> float | None:
    """As `RequestSpec.ttft_s`, of what a request says.  Raises RequestError."""
    given = None if fields.weft is None else fields.weft.ttft_s
    if given is None:
        return 0.0
    if not 0.0 <= given < math.inf:
        raise RequestError(f"weft.ttft_s is a time in seconds, or 0 for no deadline; got {given}", param="weft.ttft_s")
    return given or None


def _laid_over(own: Sequence[Part], server: Sequence[str]) -> list[Part]:
    slots = {part.slot for part in own}
    return complete([*(part for part in map(parse, server) if part.slot not in slots), *own])


def label(
    fields: Fields, server: Sequence[str], model: Sequence[str] = (), grammar: Grammar | None = None
) -> dict[str, Any] | None:
    """What an answer says of itself, where the request asks for it: its stack, how faithful that is, and whether to itself.

    server, model, grammar: as for `techniques`.
    """
    if fields.weft is None or not (fields.weft.label or fields.weft.stack):
        return None
    parts = _laid_over([parse(text) for text in techniques(fields, server, model, grammar)], server)
    verdict = compose(parts)
    told = {"stack": [str(part) for part in parts], "fidelity": verdict.fidelity.value}
    return {**told, "redefines": list(verdict.redefines)}
