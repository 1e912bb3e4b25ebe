"""Who comes in: key files and their changes, administrators, names and origins, a path before all paths, https."""

from __future__ import annotations

import logging
import re
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort
from weft.errors import ConfigError
from weft.front.admission import Bounds
from weft.front.app import create_app
from weft.front.guard import Guard
from weft.front.keys import Keyring, known, read_keys
from weft.front.server import Server, check_tls
from weft.front.text import ModelText
from weft.types import Add

Make = Callable[..., ScriptedPort]
BODY = {"prompt": "Hi", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


# ---------------------------------------------------------------------------------------------- keys


def test_files(tmp_path: Path) -> None:
    found = read_keys(written(tmp_path / "keys", "# ours\n\none alice\n  two\t bob  \nthree\n"))
    assert [(one.owner if one.owner in ("alice", "bob") else "-") for one in found] == ["alice", "bob", "-"]
    assert len({one.tenant for one in found}) == 3
    assert known("other", "alice").tenant == known("one", "alice").tenant, "a name is one tenant under any key"
    assert known("alice").tenant != known("x", "alice").tenant, "and no key is a name"


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("", 0o600, "has 0 keys"),
        ("# nothing\n", 0o600, "has 0 keys"),
        ("sesame\n", 0o644, "chmod 600"),
        ("sesame\n", 0o660, "chmod 600"),
        ("sesame a b\n", 0o600, "line 1"),
        ("ok\nsésame\n", 0o600, "line 2"),
        ("ok a/b\n", 0o600, "line 1"),
        (f"ok {'0' * 32}\n", 0o600, "line 1"),
        ("x" * 5000, 0o600, "line 1"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, mode: int, says: str) -> None:
    """Said with the number of the line, and never with the key."""
    with pytest.raises(ConfigError, match=says) as caught:
        read_keys(written(tmp_path / "keys", text, mode))
    assert "same" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_group_may_read(tmp_path: Path) -> None:
    assert len(read_keys(written(tmp_path / "keys", "one\n", 0o640))) == 1


def test_changes_are_seen_within_a_second_or_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    path = written(tmp_path / "keys", "one\n")
    keys = Keyring(["given"], client_file=path, clock=lambda: now[0])
    assert keys.find(b"one")
    written(path, "second second\n")
    assert keys.find(b"one"), "it is not looked at for every request"
    now[0] = 1.5
    assert not keys.find(b"one")
    assert keys.find(b"second")
    assert keys.find(b"given")
    written(path, "third\n")
    assert not keys.find(b"third")
    keys.reread()
    assert keys.find(b"third")
    for wrong in (lambda: written(path, "a b c\n"), lambda: written(path, "x\n", 0o644), path.unlink):
        wrong()
        now[0] += 2.0
        assert keys.find(b"third"), "a file that is wrong leaves the keys as they were"
    assert "stay as they were" in caplog.text
    assert "third" not in caplog.text


def test_an_administrators_key_opens_all_and_a_clients_does_not(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [300, 301])
    load = {"lora_name": "a", "lora_path": "a"}
    for keys, wanted in (
        (Keyring(["client"], ["admin"]), {"client": (200, 403), "admin": (200, 403), "": (401, 401)}),
        (Keyring(["client"]), {"client": (200, 403), "": (401, 401)}),
        (Keyring([], ["admin"]), {"admin": (200, 403), "": (200, 401)}),
        (Keyring(), {"": (200, 403)}),
    ):
        with serving(port, text, guard=Guard(keys=keys)) as url, httpx.Client(base_url=url) as http:
            for key, (plain, control) in wanted.items():
                headers = bearer(key) if key else {}
                assert http.post("/v1/completions", json=BODY, headers=headers).status_code == plain
                answer = http.post("/v1/load_lora_adapter", json=load, headers=headers)
                assert answer.status_code == control
                told = answer.json()["error"]["message"]
                assert ("--lora-root" in told) == (key == "admin" or not keys), "only who may is told what is missing"


def test_a_rate_and_a_salt_go_by_the_key(scripted: Make, text: ModelText, tmp_path: Path) -> None:
    port = scripted(lambda spec, index: [300, 301])
    keys = Keyring(["plain"], client_file=written(tmp_path / "keys", "one alice\ntwo alice\n"))
    bounds = Bounds(requests_per_minute=2)
    with serving(port, text, guard=Guard(keys=keys), bounds=bounds) as url, httpx.Client(base_url=url) as http:
        asked = [
            http.post("/v1/completions", json=BODY, headers=bearer(key)).status_code for key in ("one", "two", "one")
        ]
        assert asked == [200, 200, 429], "two keys of one name are one"
        http.post("/v1/completions", json={**BODY, "cache_salt": "s"}, headers=bearer("plain"))
    salts = [command.spec.salt for command in port.commands if isinstance(command, Add)]
    assert salts[:2] == [b"alice\0", b"alice\0"]
    assert salts[2] == known("plain").tenant.encode() + b"\0s"


def test_prefixes_can_be_shared(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [300, 301])
    guard = Guard(keys=Keyring(["one", "two"]), share_prefixes=True)
    with serving(port, text, guard=guard) as url, httpx.Client(base_url=url) as http:
        for key in ("one", "two"):
            http.post("/v1/completions", json=BODY, headers=bearer(key))
    assert [command.spec.salt for command in port.commands if isinstance(command, Add)] == [b"", b""]


def test_no_key_is_ever_logged(scripted: Make, text: ModelText, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    port = scripted(lambda spec, index: [300, 301])
    with serving(port, text, api_key="verysecret") as url, httpx.Client(base_url=url) as http:
        for key in ("verysecret", "wrongsecret"):
            http.post("/v1/completions", json=BODY, headers=bearer(key))
            http.post("/v1/completions", content=b"{", headers={**bearer(key), "content-type": "application/json"})
    own = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpcore"))
    assert "/v1/completions" in own
    assert "secret" not in own


# ---------------------------------------------------------------------------------------------- from where


def test_names_that_are_allowed(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [])
    guard = Guard(hosts=["llm.example.com"])
    with serving(port, text, guard=guard) as url, httpx.Client(base_url=url) as http:
        for host, status in (
            ("llm.example.com", 200), ("LLM.Example.com:443", 200), ("llm.example.com.", 200), ("localhost", 200),
            ("10.1.2.3:8000", 200), ("[fe80::1]", 200), ("x.llm.example.com", 403), ("example.com", 403),
            ("llm.example.com.evil", 403), ("llm.example.com@evil", 403),
        ):  # fmt: skip
            assert http.get("/v1/models", headers={"host": host}).status_code == status, host
        refused = http.get("/v1/models", headers={"host": "evil.example"}).json()["error"]
        assert refused["code"] == "host_not_allowed"
        assert "--allowed-host" in refused["message"]
        kind = http.post("/v1/messages", json={}, headers={"host": "evil.example"}).json()
        assert kind["type"] == "error", "in the form of the route"
    with serving(port, text, guard=Guard(hosts=["*"])) as url:
        assert httpx.get(f"{url}/v1/models", headers={"host": "anything.example"}).status_code == 200


def test_origins_that_are_allowed(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [300, 301])
    page = "https://chat.example.com"
    guard = Guard(keys=Keyring(["sesame"]), origins=[page], hosts=["llm.example.com"])
    with serving(port, text, guard=guard) as url, httpx.Client(base_url=url) as http:
        asks = {
            "origin": page,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        answer = http.options("/v1/completions", headers=asks)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        answer = http.post("/v1/completions", json=BODY, headers={**bearer("sesame"), "origin": page})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
        answer = http.post("/v1/completions", json=BODY, headers={"origin": page})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, page), (
            "an error is read, too"
        )
        for other in ("http://chat.example.com", f"{page}:444", f"{page}.evil", "https://evil.example", "null"):
            for headers in ({**asks, "origin": other}, {**bearer("sesame"), "origin": other}):
                refused = http.options("/v1/completions", headers=headers)
                assert refused.json()["error"]["code"] == "origin_not_allowed"
                assert "access-control-allow-origin" not in refused.headers
        for origin, host, status in (
            ("https://llm.example.com", "llm.example.com", 200), ("https://llm.example.com", "llm.example.com:443", 200),
            ("http://llm.example.com", "llm.example.com:443", 403), ("http://localhost:8000", "localhost:8000", 200),
            ("http://localhost:8000", "localhost", 403), ("http://localhost:8000", "127.0.0.1:8000", 403),
        ):  # fmt: skip
            headers = {**bearer("sesame"), "origin": origin, "host": host}
            assert http.get("/v1/models", headers=headers).status_code == status, (origin, host)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"hosts": ["http://x"]}, "--allowed-host"),
        ({"hosts": ["x:80"]}, "--allowed-host"),
        ({"origins": ["*"]}, "--cors-origin"),
        ({"origins": ["https://x/"]}, "--cors-origin"),
        ({"origins": ["x.example"]}, "--cors-origin"),
        ({"origins": ["null"]}, "--cors-origin"),
        ({"root_path": "llm"}, "--root-path"),
        ({"root_path": "/a/../b c"}, "--root-path"),
    ],
)
def test_settings_that_are_wrong(given: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Guard(**given)


def test_everything_below_a_path(scripted: Make, text: ModelText) -> None:
    """Whether a proxy takes the path off or not, under the same keys."""
    port = scripted(lambda spec, index: [300, 301])
    guard = Guard(keys=Keyring(["sesame"]), root_path="/llm")
    app = create_app(port, text, model_ids=[MODEL], guard=guard)
    ready = threading.Event()
    server = Server(app, "127.0.0.1", 0, lambda _: ready.set(), root_path="/llm")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        with httpx.Client(base_url=server.url) as http:
            for before in ("", "/llm"):
                assert http.get(f"{before}/health").status_code == 200
                assert http.get(f"{before}/v1/models").status_code == 401
                assert http.get(f"{before}/v1/models", headers=bearer("sesame")).status_code == 200
            assert http.get("/llm/llm/v1/models", headers=bearer("sesame")).status_code == 404
            assert http.get("/llmx/v1/models", headers=bearer("sesame")).status_code == 404
            assert http.get("/openapi.json", headers=bearer("sesame")).json()["servers"] == [{"url": "/llm"}]
            moved = http.get("/llm?a=b%20c")
            assert (moved.status_code, moved.headers["location"]) == (307, "llm/?a=b%20c")
            page = http.get("/llm", follow_redirects=True)
            assert page.url.path == "/llm/"
            assert page.text == http.get("/").text
            script = re.search(r'src="(static/[a-z]+\.js)"', page.text)
            assert script is not None
            assert http.get(page.url.join(script[1])).status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/llm/v1", api_key="sesame", max_retries=0) as client:
            assert (
                client.completions.create(model=MODEL, prompt="Hi", max_tokens=2).choices[0].finish_reason == "length"
            )
    finally:
        server.stop()
        thread.join(20)


# ---------------------------------------------------------------------------------------------- https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True, timeout=60)
    return folder / "cert.pem", folder / "key.pem"


def test_https(scripted: Make, text: ModelText, certificate: tuple[Path, Path]) -> None:
    check_tls(*certificate)
    app = create_app(scripted(lambda spec, index: [300, 301]), text, model_ids=[MODEL])
    told: list[str] = []
    ready = threading.Event()
    server = Server(app, "127.0.0.1", 0, lambda url: (told.append(url), ready.set()), tls=certificate)  # type: ignore[func-returns-value]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        assert told[0].startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(base_url=server.url, verify=trusted) as http:
            assert http.post("/v1/completions", json=BODY).status_code == 200
            assert http.get("/v1/models", headers={"origin": server.url}).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")  # it is signed by nobody
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/health".replace("https", "http"))
    finally:
        server.stop()
        thread.join(20)


def test_certificates_that_are_none(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    noise = written(tmp_path / "noise", "noise")
    for files, says in (
        ((cert, tmp_path / "none"), "--tls-key .* cannot be read"),
        ((tmp_path / "none", key), "--tls-cert .* cannot be read"),
        ((noise, key), "no certificate and its key"),
        ((cert, noise), "no certificate and its key"),
        ((key, cert), "no certificate and its key"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_tls(*files)
