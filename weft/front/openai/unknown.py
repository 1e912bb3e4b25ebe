"""Fields of a request that no route reads: those that change nothing are left alone, every other one is refused by its name.

Who ignores a field without a word answers another question than the one asked: think of a misspelt `max_token`, or of another
server's name for a grammar.  So what is not known is refused, as OpenAI does it, unless the server was started with
--unknown-fields ignore.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection

from weft.errors import RequestError

log = logging.getLogger("weft.front")

SHOWN_CHARS = 40
OPENAI = frozenset({
    # OpenAI: whose request it is, what it costs, where it is kept, and how it may be computed sooner
    "user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention",
    # vLLM
    "request_id", "lora_int_id",
    # llama.cpp and ollama: which slot keeps the prompt, for how long, and what else an answer tells
    "cache_prompt", "id_slot", "timings_per_token", "return_progress", "keep_alive",
})  # fmt: skip
"""Fields without which an answer is the same, of all routes but Anthropic's."""
ANTHROPIC = frozenset({
    "metadata", "service_tier", "cache_control", "inference_geo", "speed", "diagnostics", "user_profile_id", "workspace_id",
})  # fmt: skip
"""The same of Anthropic's."""


def check(given: Collection[str], known: Collection[str], harmless: Collection[str], lenient: bool) -> None:
    """Raise RequestError for a field that is not known.  lenient: write it to the log instead.

    known: what the route reads.
    """
    unknown = [name for name in given if name not in known and name not in harmless]
    if not unknown:
        return
    if lenient:
        log.info("fields that are not known were ignored: %s", ", ".join(repr(n[:SHOWN_CHARS]) for n in unknown[:8]))
        return
    name = unknown[0]
    near = difflib.get_close_matches(name[:SHOWN_CHARS], known, 1, 0.75)
    hint = f"did you mean {near[0]}?" if near else "leave it out"
    raise RequestError(
        f"the field {name[:SHOWN_CHARS]!r} is not known here: {hint}",
        param=name[:SHOWN_CHARS],
        code="unknown_parameter",
    )
