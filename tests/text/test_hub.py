"""Finding a model: folders, the bundled one, and a real hub client against a small hub of our own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from weft.errors import ConfigError
from weft.hub import model_id, resolve

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"\x00" * 64,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sp",
    "chat_template.jinja": b"x",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "tokenizer.py": b"import os",
    "tokenizer.pkl": b"pickle",
    "model.pt": b"pickle",
    "consolidated.safetensors": b"twice",
    "original/params.json": b"{}",
    "README.md": b"words",
}
WANTED = {
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
}


TREE = [
    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    for name, data in FILES.items()
]


class Hub(BaseHTTPRequestHandler):
    """Two models, one of them gated, in the few routes that the hub's client asks for."""

    asked: set[str] = set()
    broken = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.broken:
            self.answer(200, b'{"surprise": []}', Content_Type="application/json")
        elif path in ("/api/models/org/toy", "/api/models/org/toy/revision/main"):
            files = [{"rfilename": name} for name in FILES]
            body = {
                "id": "org/toy",
                "modelId": "org/toy",
                "sha": COMMIT,
                "siblings": files,
                "private": False,
                "tags": [],
            }
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/models/org/toy/tree/{COMMIT}"):
            self.answer(200, json.dumps(TREE).encode(), Content_Type="application/json")
        elif path.startswith("/org/toy/resolve/") and (name := path.split("/", 5)[5]) in FILES:
            self.asked.add(name)
            etag = hashlib.sha1(FILES[name]).hexdigest()
            self.answer(200, FILES[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        elif "/org/gated" in path:
            self.answer(403, b'{"error": "gated"}', X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif "/revision/nope" in path:
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        else:
            self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Hub.broken = False
    server.shutdown()
    server.server_close()


def ask(model: str, home: Path, endpoint: str, *flags: str, **environment: str) -> tuple[str, str]:
    """(folder or sentence of the error, stderr) of `resolve` in a process with its own hub cache."""
    program = (
        "import sys\nfrom weft.hub import resolve\nfrom weft.errors import ConfigError\n"
        "try: print(resolve(sys.argv[1], progress=False, weights=len(sys.argv) < 3))\n"
        "except ConfigError as e: print('ConfigError', e)\n"
    )
    dropped = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, model, *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip(), done.stderr


def test_a_hub_model_is_fetched_once_and_then_read_offline(tmp_path: Path, hub: str) -> None:
    found, errors = ask("org/toy", tmp_path, hub)
    folder = Path(found)
    assert folder.is_dir(), found + errors
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == WANTED
    assert Hub.asked == WANTED, "pickles, code and second copies were never asked for"
    assert (folder / "config.json").read_bytes() == FILES["config.json"]
    assert ask("org/toy", tmp_path, "http://127.0.0.1:9")[0] == found, "no network: from the cache"
    assert ask("org/toy", tmp_path, hub, HF_HUB_OFFLINE="1")[0] == found
    Hub.broken = True
    assert ask("org/toy", tmp_path, hub)[0] == found, "a hub that talks nonsense is no hub"
    assert ask("org/other", tmp_path, hub)[0].startswith("ConfigError there is no folder org/other")


def test_a_plan_fetches_the_shape_and_no_weights(tmp_path: Path, hub: str) -> None:
    found, errors = ask("org/toy", tmp_path, hub, "shape")
    assert (Path(found) / "config.json").is_file(), errors
    assert "config.json" in Hub.asked
    assert not any(name.endswith((".safetensors", "tokenizer.json")) for name in Hub.asked)


def test_what_the_hub_refuses(tmp_path: Path, hub: str) -> None:
    for model, match in (
        ("org/gated", "accept its terms"),
        ("org/none", "no model org/none"),
        ("org/toy@nope", "no revision 'nope'"),
    ):
        text, errors = ask(model, tmp_path, hub)
        assert text.startswith("ConfigError "), text + errors
        assert match in text


def test_no_network_and_no_cache(tmp_path: Path) -> None:
    text, _ = ask("org/toy", tmp_path, "http://127.0.0.1:9")
    assert text.startswith("ConfigError there is no folder org/toy, and it cannot be fetched")
    assert "check the network, or give a folder" in text


def test_the_bundled_model(bundled: Path) -> None:
    assert resolve(None) == resolve("bundled") == bundled
    assert model_id(None) == model_id("bundled") == "weft-tiny"
    assert (resolve(None) / "model.safetensors").is_file()


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve(folder)
    (folder / "config.json").write_text("{}")
    assert resolve(folder) == folder
    assert model_id(folder) == "My-Model"
    with pytest.raises(ConfigError, match=r"did you mean .*My-Model"):
        resolve(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        resolve(folder / "config.json")
    monkeypatch.chdir(folder)
    assert model_id(".") == "My-Model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/My-Model") == folder


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./x", "../x", "~/x", "a b", "", "a/b/c", "x.gguf", "a\x00b", "-x", "http://h/m"]
)
def test_names_that_are_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(ConfigError, match=r"give (a folder|one) with|empty|not"):
        resolve(name)


def test_names_of_hub_models() -> None:
    assert model_id("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert model_id("Qwen/Qwen3-0.6B@main") == "Qwen/Qwen3-0.6B"
