"""/v1/files and /v1/batches: OpenAI's client on the real server; every line once, over the end of a server too."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort, wait_until
from weft.front.openai import batch_runner
from weft.front.openai.calls import fresh_id
from weft.front.store import Store, open_store
from weft.front.store.batches import Batch, Cached, Counts, Used
from weft.front.store.database import StoreFull
from weft.front.text import ModelText

ENDED = ("completed", "failed", "cancelled", "expired")
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


def line(i: int, body: dict[str, Any] | None = None, url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": f"line-{i}", "method": "POST", "url": url, "body": body or CHAT}


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def upload(url: str, data: bytes, headers: dict[str, str] | None = None) -> Any:
    form: Any = {"files": {"file": ("in.jsonl", data)}, "data": {"purpose": "batch"}}
    return httpx.post(f"{url}/v1/files", headers=headers, **form).json()


def start(url: str, data: bytes, endpoint: str = "/v1/chat/completions") -> str:
    body = {"input_file_id": upload(url, data)["id"], "endpoint": endpoint, "completion_window": "24h"}
    id: str = httpx.post(f"{url}/v1/batches", json=body).json()["id"]
    return id


def ended(url: str, id: str, seconds: float = 20) -> Any:
    assert wait_until(lambda: httpx.get(f"{url}/v1/batches/{id}").json()["status"] in ENDED, seconds)
    return httpx.get(f"{url}/v1/batches/{id}").json()


def rows(url: str, file: str | None) -> list[Any]:
    if file is None:
        return []
    return [json.loads(text) for text in httpx.get(f"{url}/v1/files/{file}/content").text.splitlines()]


def test_files(client: openai.OpenAI) -> None:
    data = bytes(range(256)) * 9000  # more than two pieces
    made = client.files.create(file=("d\u00e9 j\u00e0.bin", data), purpose="user_data")
    assert (made.bytes, made.filename, made.purpose) == (len(data), "d\u00e9 j\u00e0.bin", "user_data")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data
    other = client.files.create(
        file=("b.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert other.expires_at == other.created_at + 3600
    newest = [file.id for file in client.files.list(limit=1)]  # by pages of one
    assert newest[:2] == [other.id, made.id]
    assert [file.id for file in client.files.list(purpose="user_data", order="asc")] == [made.id]
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_an_upload_is_bounded_and_whole(tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]) -> None:
    store = open_store(tmp_path, max_file_bytes=3 << 20)
    with serving(scripted(lambda *_: []), text, store=store) as url:

        def send(**form: Any) -> httpx.Response:
            return httpx.post(f"{url}/v1/files", **form)

        whole = {"files": {"file": ("a", b"x" * (3 << 20))}, "data": {"purpose": "batch"}}
        assert send(**whole).status_code == 200
        for form, status in (
            ({**whole, "files": {"file": ("a", b"x" * ((3 << 20) + 1))}}, 413),
            ({**whole, "data": {"purpose": "mischief"}}, 400),
            ({"data": {"purpose": "batch"}, "files": {"other": ("a", b"x")}}, 400),
            ({**whole, "files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, 400),
            ({**whole, "data": {f"f{i}": "x" for i in range(20)}}, 400),
            ({**whole, "data": {"purpose": "x" * 5000}}, 400),
            ({"json": {}}, 415),
        ):
            assert send(**form).status_code == status, form.keys()  # type: ignore[arg-type]
        cut = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
        head = {"content-type": "multipart/form-data; boundary=b"}
        assert send(content=cut, headers=head).status_code == 400
        assert len(httpx.get(f"{url}/v1/files").json()["data"]) == 1
        left = store.files.database.run_now(lambda db: db.execute("SELECT COUNT(*) FROM files").fetchone()[0])
        assert left == 1  # nothing of what was refused


@pytest.mark.parametrize(
    ("endpoint", "body", "read"),
    [
        ("/v1/chat/completions", CHAT, lambda b: b["choices"][0]["message"]["content"]),
        (
            "/v1/completions",
            {"model": MODEL, "prompt": "Once", "max_tokens": 3, "seed": 4},
            lambda b: b["choices"][0]["text"],
        ),
        (
            "/v1/responses",
            {"model": MODEL, "input": "Hi", "max_output_tokens": 3, "seed": 4},
            lambda b: b["output"][0]["content"][0]["text"],
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_lines_are_answered_as_requests_are(
    client: openai.OpenAI, http: httpx.Client, endpoint: str, body: dict[str, Any], read: Callable[[Any], str]
) -> None:
    url = str(http.base_url).rstrip("/")
    bad = {**body, "temperature": -1}
    id = start(url, jsonl([line(0, {**body, "seed": 7}, endpoint), line(1, bad, endpoint)]), endpoint)
    batch = ended(url, id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (good,) = rows(url, batch["output_file_id"])
    (wrong,) = rows(url, batch["error_file_id"])
    alone = http.post(endpoint, json={**body, "seed": 7}).json()
    assert read(good["response"]["body"]) == read(alone)
    assert (good["custom_id"], good["response"]["status_code"]) == ("line-0", 200)
    assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("line-1", 400)
    assert wrong["response"]["body"]["error"]["param"] == "temperature"
    usage = alone["usage"]
    told = batch["usage"]
    assert told["output_tokens"] == 3
    assert told["input_tokens"] == usage.get("prompt_tokens", usage.get("input_tokens"))
    assert client.batches.retrieve(id).status == "completed"
    assert id in [b.id for b in client.batches.list(limit=2)]
    if endpoint == "/v1/responses":  # of a batch they are in its file, and not in the store
        assert http.get(f"/v1/responses/{good['response']['body']['id']}").status_code == 404


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"not json\n", "invalid_json_line"),
        (jsonl([line(1), line(1)]), "duplicate"),
        (jsonl([line(1, url="/v1/completions")]), "invalid_request"),
        (jsonl([{**line(1), "method": "GET"}]), "invalid_request"),
        (jsonl([line(1, {**CHAT, "stream": True})]), "invalid_request"),
        (b'{"custom_id": ' + b"[" * 5000 + b"\n", "invalid_json_line"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_input_fails_the_batch(http: httpx.Client, data: bytes, code: str) -> None:
    url = str(http.base_url).rstrip("/")
    batch = ended(url, start(url, data))
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["code"] == code
    assert "output_file_id" not in batch


def test_lines_for_embeddings_are_answered(http: httpx.Client) -> None:
    """No field is added to them that the route does not know."""
    url, endpoint = str(http.base_url).rstrip("/"), "/v1/embeddings"
    bodies: list[dict[str, Any]] = [
        {"input": "Hi"},
        {"input": "Hi", "stream": False},
        {"input": "Hi", "dimensions": -1},
    ]
    batch = ended(url, start(url, jsonl(line(i, body, endpoint) for i, body in enumerate(bodies)), endpoint))
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    alone = http.post(endpoint, json=bodies[0]).json()
    for row in rows(url, batch["output_file_id"]):
        assert row["response"]["body"]["data"] == alone["data"]
    (wrong,) = rows(url, batch["error_file_id"])
    assert wrong["response"]["body"]["error"]["param"] == "dimensions"


def test_a_file_that_is_not_there_is_named_by_its_field(http: httpx.Client) -> None:
    answer = http.post("/v1/batches", json={"input_file_id": "file-none", "endpoint": "/v1/embeddings"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input_file_id")


def test_lines_wait_behind_clients(text: ModelText, tmp_path: Path, scripted: Callable[..., ScriptedPort]) -> None:
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    with serving(port, text, store=open_store(tmp_path)) as url:
        lines = [line(i, {**CHAT, "priority": -5}) for i in range(3)]
        ended(url, start(url, jsonl(lines)))
    assert [command.spec.priority for command in port.commands if hasattr(command, "spec")] == [1 << 20] * 3


def test_a_batch_goes_on_where_it_was(tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]) -> None:
    """The first server answers three lines and hangs on the others; the second asks those, and those alone."""
    data = jsonl(line(i, {**CHAT, "max_tokens": 10 + i}) for i in range(6))
    port = scripted(lambda spec, index: [65] * (spec.sampling.max_tokens if spec.sampling.max_tokens < 13 else 1))
    with serving(port, text, store=open_store(tmp_path)) as url:
        id = start(url, data)
        path = f"{url}/v1/batches/{id}"
        assert wait_until(lambda: httpx.get(path).json()["request_counts"]["completed"] == 3)
    later = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    with serving(later, text, store=open_store(tmp_path)) as url:
        batch = ended(url, id)
        found = rows(url, batch["output_file_id"])
    assert batch["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
    assert [row["custom_id"] for row in found] == [f"line-{i}" for i in range(6)]
    asked = [command.spec.sampling.max_tokens for command in later.commands if hasattr(command, "spec")]
    assert sorted(asked) == [13, 14, 15]


def test_a_cancelled_batch_keeps_what_it_has(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    port = scripted(lambda spec, index: [65] * (spec.sampling.max_tokens if spec.sampling.max_tokens < 13 else 1))
    with serving(port, text, store=open_store(tmp_path)) as url:
        id = start(url, jsonl(line(i, {**CHAT, "max_tokens": 10 + i}) for i in range(6)))
        path = f"{url}/v1/batches/{id}"
        assert wait_until(lambda: httpx.get(path).json()["request_counts"]["completed"] == 3)
        assert httpx.post(f"{path}/cancel").json()["status"] == "cancelling"
        batch = ended(url, id)
        assert batch["status"] == "cancelled"
        assert len(rows(url, batch["output_file_id"])) == 3
        assert wait_until(lambda: len(port.cancelled()) == 3)
        assert httpx.post(f"{path}/cancel").status_code == 409


def test_an_expired_batch_says_which_lines_it_left(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    port = scripted(lambda spec, index: [65] * (spec.sampling.max_tokens if spec.sampling.max_tokens < 12 else 1))
    store = open_store(tmp_path)
    with serving(port, text, store=store) as url:
        id = start(url, jsonl(line(i, {**CHAT, "max_tokens": 10 + i}) for i in range(4)))
        assert wait_until(lambda: httpx.get(f"{url}/v1/batches/{id}").json()["request_counts"]["completed"] == 2)
    _age(tmp_path, id)
    with serving(port, text, store=open_store(tmp_path)) as url:
        batch = ended(url, id)
        assert batch["status"] == "expired"
        assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
        late = rows(url, batch["error_file_id"])
        assert [(row["custom_id"], row["error"]["code"]) for row in late] == [
            ("line-2", "batch_expired"),
            ("line-3", "batch_expired"),
        ]


def _age(folder: Path, id: str) -> None:
    """Let a batch's day be over."""
    store = open_store(folder)
    change = "UPDATE batches SET state = json_set(CAST(state AS TEXT), '$.expires_at', 1) WHERE id = ?"
    store.files.database.run_now(lambda db: db.execute(change, (id,)))
    store.close()


def test_a_full_disk_is_an_error_of_the_batch(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite itself says that it is full: the file may not grow beyond what it is after the input."""
    monkeypatch.setattr(batch_runner, "ROOM_S", 0.0)
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    store = open_store(tmp_path)
    with serving(port, text, store=store) as url:
        file = upload(url, jsonl(line(i) for i in range(40)))["id"]
        _stop_growth(store)
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        id = httpx.post(f"{url}/v1/batches", json=body).json()["id"]
        batch = ended(url, id)
        assert batch["status"] == "failed"
        assert batch["errors"]["data"][0]["code"] == "storage_full"
        refused = httpx.post(f"{url}/v1/files", files={"file": ("a", b"x" * (2 << 20))}, data={"purpose": "batch"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        chat = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert chat.status_code == 200  # the server goes on


def test_a_disk_that_is_full_for_a_while_costs_a_batch_nothing(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    """Nothing can be written while results come; then there is room again.  The counts are those of lines, each once."""
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    store = open_store(tmp_path)
    with serving(port, text, store=store) as url:
        file = upload(url, jsonl(line(i) for i in range(40)))["id"]
        _stop_growth(store)
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        id = httpx.post(f"{url}/v1/batches", json=body).json()["id"]
        refused = httpx.post(f"{url}/v1/files", files={"file": ("a", b"x" * (2 << 20))}, data={"purpose": "batch"})
        assert (refused.status_code, "room" in refused.json()["error"]["message"]) == (507, True)
        assert not wait_until(lambda: httpx.get(f"{url}/v1/batches/{id}").json()["status"] in ENDED, 1.5)
        store.files.database.run_now(lambda db: db.execute("PRAGMA max_page_count=100000").fetchone())
        batch = ended(url, id)
        assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 40, "completed": 40, "failed": 0})
        assert batch["usage"]["output_tokens"] == 40 * CHAT["max_tokens"], "what was not written is not counted"
        assert sorted(row["custom_id"] for row in rows(url, batch["output_file_id"])) == sorted(
            f"line-{i}" for i in range(40)
        )
        upload(url, b"{}\n")
        left = store.files.database.run_now(
            lambda db: db.execute("SELECT COUNT(*) FROM files WHERE whole = 0").fetchone()
        )
        assert left == (0,), "the refused upload is swept by the next one"


def _stop_growth(store: Store) -> None:
    pages = store.files.database.run_now(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    store.files.database.run_now(lambda db: db.execute(f"PRAGMA max_page_count={pages + 2}").fetchone())


def test_others_files_and_batches_are_not_there(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    with serving(port, text, api_key=["one", "two"], store=open_store(tmp_path)) as url:
        file = upload(url, jsonl([line(1)]), mine)["id"]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        assert httpx.post(f"{url}/v1/batches", json=body, headers=theirs).status_code == 404
        batch = httpx.post(f"{url}/v1/batches", json=body, headers=mine).json()["id"]
        for path in (f"files/{file}", f"files/{file}/content", f"batches/{batch}"):
            assert httpx.get(f"{url}/v1/{path}", headers=mine).status_code == 200
            assert httpx.get(f"{url}/v1/{path}", headers=theirs).status_code == 404
        assert httpx.post(f"{url}/v1/batches/{batch}/cancel", headers=theirs).status_code == 404
        assert httpx.delete(f"{url}/v1/files/{file}", headers=theirs).status_code == 404
        for path in ("files", "batches"):
            assert httpx.get(f"{url}/v1/{path}", headers=theirs).json()["data"] == []
            assert httpx.get(f"{url}/v1/{path}?after={file}", headers=theirs).status_code == 404


def test_no_line_is_asked_twice_when_many_run(http: httpx.Client) -> None:
    url = str(http.base_url).rstrip("/")
    batch = ended(url, start(url, jsonl(line(i, {**CHAT, "max_tokens": 1 + i % 5}) for i in range(60))), 60)
    names = Counter(row["custom_id"] for row in rows(url, batch["output_file_id"]))
    assert len(names) == 60
    assert set(names.values()) == {1}


def test_a_result_that_does_not_fit_counts_nothing(tmp_path: Path) -> None:
    """SQLite says that it is full at the first statement, or at the second, when counts are changed already: both times nothing
    of it stays, in the database or in memory, and the same result is counted once when there is room."""
    store = open_store(tmp_path)

    async def run() -> None:
        batch = Batch(
            id="batch_1", object="batch", endpoint="/v1/completions", input_file_id="file-1", completion_window="24h",
            status="in_progress", created_at=1, request_counts=Counts(total=2), usage=Used(),
        )  # fmt: skip
        row = await store.batches.add("", batch)
        used = Used(input_tokens=7, input_tokens_details=Cached(cached_tokens=4), output_tokens=5, total_tokens=12)
        before = msgspec.json.encode(batch)
        _stop_growth(store)
        with pytest.raises(StoreFull):  # the result itself has no room
            await store.batches.result(row, 1, b"x" * 50_000, failed=False, used=used)
        assert msgspec.json.encode(batch) == before
        batch.metadata = {"key": "x" * 50_000}  # a state so long that there is room for the result, and none for it
        before = msgspec.json.encode(batch)
        for failed in (False, True):
            with pytest.raises(StoreFull):
                await store.batches.result(row, 1, b"{}", failed=failed, used=used)
            assert msgspec.json.encode(batch) == before
        assert await store.batches.done(row) == set()
        store.files.database.run_now(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchone())
        await store.batches.result(row, 1, b"{}", failed=False, used=used)
        kept = (await store.batches.get("", "batch_1")).batch
        assert kept == batch
        assert (kept.request_counts.completed, kept.request_counts.failed, kept.usage) == (1, 0, used)
        assert await store.batches.done(row) == {1}

    try:
        asyncio.run(run())
    finally:
        store.close()


@pytest.mark.parametrize("longest", [10, 40_000, 1 << 20])
def test_lines_of_a_file_are_those_that_were_written(tmp_path: Path, longest: int) -> None:
    """However they lie across the pieces in which it is stored; what is too long is cut, and so told."""
    chance = random.Random(longest)
    lines = [bytes(chance.choices(b"abc{}", k=k)) for k in (0, 1, 11, 32_767, 32_768, 32_769, 0, 70_000, 3, 200_000, 5)]
    store = open_store(tmp_path)

    async def through(data: bytes) -> list[bytes]:
        upload = await store.files.begin("t", fresh_id("file-"), "a", "batch", None)
        await upload.write(data)
        file = await upload.finish()
        return [line async for line in store.files.lines(file, longest)]

    try:
        for tail in (b"", b"\n"):
            want = [line[: longest + 1] for line in lines]
            assert asyncio.run(through(b"\n".join(lines) + tail)) == want
    finally:
        store.close()
