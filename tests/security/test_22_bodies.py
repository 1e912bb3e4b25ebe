"""Row 22: bodies without an end, too long, too deep, or packed; JSON and forms."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

from tests.security.conftest import MAX_FILE, Attacked, is_refused

ROUTES = ("/v1/responses", "/v1/embeddings", "/v1/batches", "/v1/messages", "/v1/messages/count_tokens")
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}
HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def pieces(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b" " * (1 << 20)


def test_a_body_that_is_too_long(server: Attacked) -> None:
    with server.attacked():
        for path in ROUTES:
            answer = server.http.post(path, content=pieces(40), headers=JSON)  # of unknown length
            assert answer.status_code == 413


DEEP = (b"[" * 200_000, b'{"a":' * 200_000, b'{"input":' + b"[" * 200_000, b'{"messages":' + b'[{"a":' * 90_000)


def test_a_body_that_is_too_deep(server: Attacked) -> None:
    with server.attacked():
        for path in ROUTES:
            for text in DEEP:
                is_refused(server.http.post(path, content=text, headers=JSON))


MANY = (
    b'{"metadata":{'
    + b",".join(b'"k%d":"\\\\"' % i for i in range(400_000))
    + b"}}",  # each string ends with a backslash
    b'{"input":[' + b",".join([b"1"] * 2_100_000) + b"]}",
    b'{"messages":[' + b",".join([b"{}"] * 2_100_000) + b"]}",
)


def test_a_body_of_too_many_values(server: Attacked) -> None:
    with server.attacked():
        for path in ROUTES:
            for text in MANY:
                assert server.http.post(path, content=text, headers=JSON).status_code == 413


def test_a_packed_body_is_not_unpacked(server: Attacked) -> None:
    """64 MB of blanks in 64 kB: what arrives is what is read, and that is no JSON."""
    packed = gzip.compress(b" " * (64 << 20))
    with server.attacked():
        for path in ROUTES:
            is_refused(server.http.post(path, content=packed, headers={**JSON, "content-encoding": "gzip"}))
        answer = server.http.post(
            "/v1/files", files={"file": ("a.jsonl.gz", packed)}, data={"purpose": "batch"}
        ).json()  # fmt: skip
        assert answer["bytes"] == len(packed)
        body = {"input_file_id": answer["id"], "endpoint": "/v1/embeddings"}
        path = f"/v1/batches/{server.post('/v1/batches', body).json()['id']}"
        while (batch := server.http.get(path).json())["status"] not in ("failed", "completed"):
            pass
        assert batch["status"] == "failed"


def test_a_file_that_is_too_long(server: Attacked) -> None:
    def form() -> Iterator[bytes]:
        yield HEAD
        yield from pieces((MAX_FILE >> 20) + 4)

    with server.attacked():
        assert server.http.post("/v1/files", content=form(), headers=FORM).status_code == 413
        assert server.http.get("/v1/files", params={"purpose": "user_data"}).json()["data"] == []


FORMS = [
    b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i for i in range(5000)) + b"--b--\r\n",
    b"--b\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\nx\r\n--b--\r\n",
    b"--b\r\nContent-Disposition: form-data; name=" + b"x" * (1 << 20) + b"\r\n\r\nx\r\n--b--\r\n",
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"x" * (4 << 20) + b"\r\n--b--\r\n",
    b"\r\n" * 500_000,
    b"no form at all",
    HEAD + b"cut",
    b"",
]


def test_forms_that_are_none(server: Attacked) -> None:
    with server.attacked():
        for form in FORMS:
            is_refused(server.http.post("/v1/files", content=form, headers=FORM))


def test_a_line_that_is_too_deep_fails_its_batch_alone(server: Attacked) -> None:
    deep = b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": ' + b"[" * 100_000 + b"\n"
    with server.attacked():
        file = server.http.post("/v1/files", files={"file": ("a", deep)}, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/embeddings"}
        path = f"/v1/batches/{server.post('/v1/batches', body).json()['id']}"
        while (batch := server.http.get(path).json())["status"] not in ("failed", "completed"):
            pass
        assert batch["errors"]["data"][0]["code"] == "invalid_json_line"
        assert json.dumps(batch).count("[") < 10
