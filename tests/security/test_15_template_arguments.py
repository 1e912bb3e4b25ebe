"""Row 15: chat_template_kwargs reach the template and nothing else: names of the renderer's own arguments are refused."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

SAY = [{"role": "user", "content": "a"}]
INNER: list[dict[str, Any]] = [
    {"tokenize": True},
    {"tokenize": False},
    {"chat_template": "{{ 1 }}"},
    {"conversation": []},
    {"messages": []},
    {"return_dict": True},
    {"return_tensors": "pt"},
    {"padding": True},
    {"truncation": True},
    {"max_length": 1},
    {"continue_final_message": True},
    {"add_generation_prompt": False},
    {"tokenizer_kwargs": {"x": 1}},
    {"raise_exception": "x"},
    {"strftime_now": "x"},
    {"bos_token": "x"},
    {"__class__": "x"},
    {"self": "x"},
    {"context": "x"},
    {"range": 1},
]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for kwargs in INNER:
            for path, body in (
                ("/v1/chat/completions", {"messages": SAY, "max_tokens": 1}),
                ("/tokenize", {"messages": SAY}),
                ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
                ("/v1/messages", {"messages": SAY, "max_tokens": 1}),
                ("/v1/messages/count_tokens", {"messages": SAY}),
            ):
                is_refused(server.post(path, {**body, "chat_template_kwargs": kwargs}))


def test_long_conversations_hold_nobody_up(server: Attacked) -> None:
    """Templates are rendered in a process of their own, and what they made is read in a thread."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 40} for i in range(12_001)]
    with server.attacked():
        for _ in range(2):
            is_refused(server.post("/v1/chat/completions", {"messages": turns, "max_tokens": 1}))
