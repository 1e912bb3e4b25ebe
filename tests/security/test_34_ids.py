"""Row 34: ids and names that lead out of a folder lead nowhere; ids of others cannot be guessed."""

from __future__ import annotations

from tests.security.conftest import Attacked, is_refused

OUTSIDE = [
    "..", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2flock", "....//", "/etc/passwd", "%00", "a%00b",
    "file-" + "0" * 48, "x" * 5000, "' OR 1=1 --", "%27%20OR%201=1", "*", "%", "sha256:../../x",
]  # fmt: skip
NAMES = [
    "../../../tmp/weft-was-here",
    "..\\..\\weft-was-here",
    "/tmp/weft-was-here",
    "a\0b",
    "",
    ".",
    "..",
    "x" * 100_000,
    "a\r\nb",
]


def test_ids(server: Attacked) -> None:
    with server.attacked():
        for id in OUTSIDE:
            refuse_everywhere(server, id)


def refuse_everywhere(server: Attacked, id: str) -> None:
    for kind in ("files", "responses", "batches"):
        for method, rest in (
            ("GET", ""),
            ("GET", "/content"),
            ("DELETE", ""),
            ("POST", "/cancel"),
            ("GET", "/input_items"),
        ):
            is_refused(server.http.request(method, f"/v1/{kind}/{id}{rest}"))
    is_refused(server.post("/v1/batches", {"input_file_id": id, "endpoint": "/v1/embeddings"}))
    is_refused(server.post("/v1/responses", {"input": "a", "previous_response_id": id}))


def test_names_are_shown_and_make_no_path(server: Attacked) -> None:
    before = sorted(path.name for path in server.folder.rglob("*"))
    with server.attacked():
        for name in NAMES:
            raw = name.encode().replace(b"\r\n", b"%0D%0A")
            form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            form += (
                b'--b\r\nContent-Disposition: form-data; name="file"; filename="' + raw + b'"\r\n\r\nhello\r\n--b--\r\n'
            )
            answer = server.http.post(
                "/v1/files", content=form, headers={"content-type": "multipart/form-data; boundary=b"}
            )
            if answer.status_code != 200:
                is_refused(answer)
                continue
            made = answer.json()
            assert not set(made["filename"]) & set("/\\\0\r\n")
            assert made["filename"] not in ("", ".", "..")
            assert len(made["filename"]) <= 255
            content = server.http.get(f"/v1/files/{made['id']}/content")
            assert content.text == "hello"
            assert "\n" not in content.headers["content-disposition"]
    assert sorted(path.name for path in server.folder.rglob("*")) == before


def test_ids_are_not_guessed(server: Attacked) -> None:
    """192 bits, and no two have a beginning in common."""
    form = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
    ids = [server.http.post("/v1/files", **form).json()["id"].removeprefix("file-") for _ in range(8)]  # type: ignore[arg-type]
    assert {len(id) for id in ids} == {48}
    assert len({id[:8] for id in ids}) == 8
