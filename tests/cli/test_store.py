"""What `weft serve` keeps: a batch and a background response go on where they were after the server was killed."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.cli.running import Serving, weft
from tests.front.scripted import wait_until

LINES = 30


def body(i: int) -> dict[str, Any]:
    return {"prompt": f"Story {i}:", "max_tokens": 40, "seed": i, "ignore_eos": True}


def test_a_killed_server_goes_on_where_it_was(tmp_path: Path) -> None:
    flags = ("--port", "0", "--threads", "1", "--max-num-seqs", "4", "--data-dir", str(tmp_path / "data"))
    lines = [{"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": body(i)} for i in range(LINES)]
    with Serving(tmp_path, *flags) as server, httpx.Client(base_url=server.url(), timeout=60) as http:
        data = "\n".join(map(json.dumps, lines))
        file = http.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"}).json()["id"]
        ask = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        id = http.post("/v1/batches", json=ask).json()["id"]
        late = {"input": "Hello", "max_output_tokens": 900, "background": True, "seed": 1, "ignore_eos": True}
        said = http.post("/v1/responses", json=late).json()["id"]
        assert wait_until(lambda: http.get(f"/v1/batches/{id}").json()["request_counts"]["completed"] >= 3, 30)
        server.process.kill()
        server.process.wait()
    with Serving(tmp_path, *flags) as server, httpx.Client(base_url=server.url(), timeout=60) as http:
        assert wait_until(lambda: http.get(f"/v1/batches/{id}").json()["status"] == "completed", 60)
        batch = http.get(f"/v1/batches/{id}").json()
        assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
        rows = [json.loads(text) for text in http.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()]
        assert Counter(row["custom_id"] for row in rows) == Counter(str(i) for i in range(LINES))
        texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
        for i in (0, LINES - 1):
            assert http.post("/v1/completions", json=body(i)).json()["choices"][0]["text"] == texts[str(i)]
        assert wait_until(lambda: http.get(f"/v1/responses/{said}").json()["status"] == "incomplete", 60)
        assert http.get(f"/v1/responses/{said}").json()["usage"]["output_tokens"] == 900
        taken = weft("serve", "--port", "0", "--data-dir", str(tmp_path / "data"))  # by the one that runs
        assert taken.returncode == 2
        assert "another server keeps its data" in taken.stderr
        assert server.end(signal.SIGTERM) == 0


def test_flags_of_the_store_are_checked(tmp_path: Path) -> None:
    for wrong in (("--store-max-bytes", "lots"), ("--max-file", "0"), ("--pooling", "cls")):
        done = weft("serve", "--port", "0", "--data-dir", str(tmp_path), *wrong)
        assert done.returncode == 2
        assert wrong[0] in done.stderr or "size" in done.stderr
