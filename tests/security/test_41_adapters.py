"""Row 41: adapters are loaded while a server runs only from the folder that it was given, by whoever has the admin key."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.security.conftest import ADMIN, KEY, Attacked, is_refused
from weft.cli._server import ServerFlags
from weft.front.port import EngineInfo

LOAD, DROP = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS = [
    "/etc", "/", "..", "../", "../keys", "a/../../keys", "/proc/self/cwd", "/tmp", "~", "a\0b", "", "x" * 5000, "link",
    "http://127.0.0.1/adapter", "file:///etc", "\\\\host\\share", "%2e%2e",
]  # fmt: skip


def ask(server: Attacked, path: str, body: dict[str, str], key: str = ADMIN) -> httpx.Response:
    return server.http.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def test_off_by_default() -> None:
    assert ServerFlags().lora_root is None
    assert not EngineInfo(
        model_id="m", vocab_size=9, max_model_len=9, kv_blocks=1, block_tokens=1, max_num_seqs=1
    ).loads_adapters


def test_a_clients_key_does_not_do(server: Attacked) -> None:
    with server.attacked():
        for path, body in ((LOAD, {"lora_name": "a", "lora_path": "a"}), (DROP, {"lora_name": "a"})):
            answer = ask(server, path, body, KEY)
            is_refused(answer)
            assert answer.status_code == 403
            assert httpx.post(server.url + path, json=body).status_code == 401
            for spelling in (
                path + "%0A",
                path + "/",
                path.upper(),
                "/v1/%6Coad_lora_adapter%00",
                "/" + path,
                path + "%20",
            ):
                assert ask(server, spelling, body, KEY).status_code in (403, 404), spelling


def test_paths_that_lead_out(server: Attacked) -> None:
    root: Path = server.folder.parent / "adapters"
    (root / "link").symlink_to("/etc")
    (root / "a").mkdir(exist_ok=True)
    try:
        with server.attacked():
            for path in PATHS:
                is_refused(ask(server, LOAD, {"lora_name": "a", "lora_path": path}))
            names = [m["id"] for m in server.http.get("/v1/models").json()["data"]]
            assert names == ["weft-tiny"]
    finally:
        (root / "link").unlink()
