"""Row 43: somebody else's page can't drive the server from a browser on its machine: Origin, Host, no CORS, JSON bodies."""

from __future__ import annotations

import httpx
import pytest

from tests.security.conftest import KEY, Attacked, is_refused

PATHS = [
    "/v1/models",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/metrics",
    "/health",
    "/",
    "/v1/messages",
    "/nothing",
]
ORIGINS = [
    "http://evil.example", "https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1:1", "http://127.0.0.1",
    "file://", "http://127.0.0.1@evil.example", "chrome-extension://x", "", "http://[::1]:1", "about:blank",
]  # fmt: skip
HOSTS = [
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil.localhost.example", "127.1",
    "2130706433", "0x7f.0.0.1", "localhost@evil.example", "a b", "\xe9vil",
]  # fmt: skip


def keyed(**headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}", **headers}


def test_pages_from_elsewhere(server: Attacked) -> None:
    with server.attacked():
        for origin in ORIGINS:
            for path in PATHS:
                for method in ("GET", "POST", "OPTIONS", "DELETE"):
                    headers = keyed(origin=origin, **{"access-control-request-method": "POST"})
                    answer = server.http.request(method, path, headers=headers, json={})
                    is_refused(answer)
                    assert answer.status_code == 403
                    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_names_that_are_not_the_servers(server: Attacked) -> None:
    """DNS rebinding: the address is the loopback's, the name is the page's."""
    with server.attacked():
        for host in HOSTS:
            for path in PATHS:
                answer = server.http.get(
                    path, headers=[("host", host.encode("latin-1")), ("authorization", f"Bearer {KEY}")]
                )
                assert answer.status_code in (400, 403), (host, answer.status_code)


def test_the_servers_own_page_and_programs(server: Attacked) -> None:
    own = server.url
    with server.attacked():
        for headers in (
            keyed(),
            keyed(origin=own),
            keyed(host="localhost"),
            keyed(host="[::1]:99"),
            keyed(host="app.localhost"),
        ):
            answer = server.http.get("/v1/models", headers=headers)
            assert answer.status_code == 200, answer.text
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_forms_of_pages_are_no_json(server: Attacked, kind: str) -> None:
    """What a page may send without being asked first."""
    with server.attacked():
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/batches"):
            answer = server.http.post(
                path, content=b'{"prompt": "a", "x": "="}', headers=keyed(**{"content-type": kind})
            )
            is_refused(answer)
            assert answer.status_code == 415


def test_a_page_has_no_key(server: Attacked) -> None:
    """Keys come in headers only: none in an address, none in a cookie that a browser would send by itself."""
    with server.attacked():
        for where in (f"/v1/models?api_key={KEY}", f"/v1/models?key={KEY}"):
            assert httpx.get(server.url + where).status_code == 401
        for cookie in ("api_key", "authorization", "x-api-key"):
            assert httpx.get(f"{server.url}/v1/models", headers={"cookie": f"{cookie}={KEY}"}).status_code == 401
