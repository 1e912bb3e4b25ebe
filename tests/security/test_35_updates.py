"""Row 35: weft updates nothing by itself: no command, no route, no file of its own that it would fetch or write."""

from __future__ import annotations

import ast

from tests.security.conftest import Attacked
from tests.test_imports import imports, modules
from weft.cli.app import app

CLIENTS = frozenset({"urllib", "http", "requests", "httpx", "ftplib", "aiohttp", "xmlrpc"})
ASK_SERVERS = frozenset(
    {"weft.cli._remote", "weft.bench.client", "weft.soak.client", "weft.soak.faults", "weft.soak.run"}
)
"""Those that ask a server which their user names."""


def test_no_command_updates() -> None:
    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert "serve" in names
    assert not names & {"update", "upgrade", "self-update", "install", "pull", "push"}


def test_nothing_but_the_hub_fetches() -> None:
    """Who imports a client for HTTP asks a server that a user named.  Models come through huggingface_hub, by weft.hub."""
    for module in modules():
        named = {
            i.name.split(".")[0] for i in imports(module) if not i.name.startswith(("urllib.parse", "http.HTTPStatus"))
        }
        if named & CLIENTS:
            assert module.name in ASK_SERVERS, module.name
        if "huggingface_hub" in named:
            assert module.name == "weft.hub"


def test_nothing_runs_an_installer() -> None:
    for module in modules():
        words = {
            node.value
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & {"pip", "pipx", "uv", "apt", "curl", "wget", "git"}, module.name


def test_no_route_updates(server: Attacked) -> None:
    with server.attacked():
        for path in (
            "/update",
            "/api/update",
            "/v1/update",
            "/upgrade",
            "/update_weights",
            "/update_weights_from_disk",
            "/restart",
        ):
            assert server.post(path, {"url": "http://127.0.0.1/"}).status_code == 404
