"""Row 16: a client's own template is refused unless the server says otherwise; one that never ends is ended, and others go on."""

from __future__ import annotations

import time

import pytest

from tests.security.conftest import Attacked, is_refused
from weft.errors import RequestError
from weft.front.renderer import Renderer
from weft.front.template import ChatTemplate

SAY = [{"role": "user", "content": "a"}]
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


def test_clients_bring_none(server: Attacked) -> None:
    with server.attacked():
        for template in (ENDLESS, "{{ messages[0].content }}", "", "{% include '/etc/passwd' %}", "x" * (2 << 20)):
            for path, body in (
                ("/v1/chat/completions", {"messages": SAY, "max_tokens": 1}),
                ("/tokenize", {"messages": SAY}),
            ):
                is_refused(server.post(path, {**body, "chat_template": template}))


def test_a_template_that_never_ends_is_ended() -> None:
    renderer = Renderer(seconds=0.5, memory_bytes=512 << 20)
    try:
        began = time.monotonic()
        with pytest.raises(RequestError, match="took longer"):
            ChatTemplate({"default": ENDLESS}, {}, renderer=renderer).render(SAY)
        assert time.monotonic() - began < 8
        assert ChatTemplate({"default": "{{ messages[0].content }}"}, {}, renderer=renderer).render(SAY) == "a"
    finally:
        renderer.close()
