"""What a server tells of its requests: ids, lines in the log, traces; never what was said, and no key."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.front.conftest import MODEL
from tests.front.scripted import ScriptedPort, wait_until
from weft.cli._terminal import JSONLines
from weft.cli._watch import WatchFlags
from weft.errors import ConfigError
from weft.front.access import Access
from weft.front.app import Served, create_app
from weft.front.gate import Gate
from weft.front.server import Server
from weft.front.text import ModelText
from weft.front.tracing import OpenTelemetry, otlp
from weft.types import EngineFrame, RequestSpec

Make = Callable[..., ScriptedPort]
SECRET = "sk-do-not-tell"
BODY = {"model": MODEL, "prompt": "Never log this", "max_tokens": 5}


def answer(spec: RequestSpec, index: int) -> list[int]:
    return [65] * spec.sampling.max_tokens


@contextmanager
def served(port: ScriptedPort, text: ModelText, access: Access, **options: Any) -> Iterator[str]:
    gate = Gate.over(create_app(port, text, model_ids=[MODEL], **options))
    gate.access = access
    ready = threading.Event()
    server = Server(gate, "127.0.0.1", 0, lambda _: ready.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        yield server.url
    finally:
        server.stop()
        thread.join(20)


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Everything that is logged at info, as `--log-format json` writes it."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JSONLines())
    handler.addFilter(lambda record: not record.name.startswith("http"))  # the test's own client
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in found if line["logger"] == "weft.access"]


def test_of_several_models_a_line_and_a_trace_name_the_one_that_answered(
    scripted: Make, text: ModelText, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    exporter = InMemorySpanExporter()
    traces = OpenTelemetry(exporter)
    with served(scripted(answer), text, Access(traces), others=[Served(scripted(answer), text, ["other", "o"])]) as url:
        for model in (MODEL, "o"):
            httpx.post(f"{url}/v1/completions", json={**BODY, "model": model})
        httpx.get(f"{url}/v1/models")
        assert wait_until(lambda: len(of(lines())) >= 3)
    assert [line.get("model") for line in of(lines())] == [MODEL, "other", None]
    traces.close()
    spans = [s for s in exporter.get_finished_spans() if s.name == "POST /v1/completions"]
    assert [(s.attributes or {}).get("gen_ai.request.model") for s in spans] == [MODEL, "other"]


def test_a_line_for_each_request(scripted: Make, text: ModelText, lines: Callable[[], list[dict[str, Any]]]) -> None:
    with served(scripted(answer), text, Access(), api_key=SECRET) as url:
        head = {"authorization": f"Bearer {SECRET}"}
        whole = httpx.post(f"{url}/v1/completions?key={SECRET}", json=BODY, headers=head)
        given = {**head, "x-request-id": "mine-1"}
        streamed = httpx.post(f"{url}/v1/completions", json={**BODY, "stream": True}, headers=given)
        forged = httpx.post(f"{url}/v1/completions", json=BODY, headers={**head, "x-request-id": 'a"\tb'})
        httpx.post(f"{url}/v1/completions", json=BODY)
        httpx.get(f"{url}/v1/files/file-abc", headers=head)
        httpx.get(f"{url}/health")
        assert wait_until(lambda: len(of(lines())) >= 5)
        found = of(lines())
    assert [(line["method"], line["route"], line["status"]) for line in found] == [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 401),
        ("GET", "/v1/files/{id}", 501),
    ]
    first, second, third, refused, _ = found
    assert not any("model" in line for line in found), "there is one"
    assert [line["id"] for line in found[:2]] == [whole.headers["x-request-id"], "mine-1"]
    assert streamed.headers["x-request-id"] == "mine-1"
    assert third["id"] == forged.headers["x-request-id"] != 'a"\tb'
    usage = whole.json()["usage"]
    for line in (first, second):
        assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 5)
        assert line["outcome"] == "complete"
        assert 0 < line["ttft_s"] <= line["e2e_s"] < 20
    assert "completion_tokens" not in refused
    whole_log = json.dumps(lines())
    assert SECRET not in whole_log
    assert BODY["prompt"] not in whole_log


def test_no_address_makes_a_line_of_its_own(
    scripted: Make, text: ModelText, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Nor a kind of trace; and an id that looks like a part of its route is the id."""
    exporter = InMemorySpanExporter()
    traces = OpenTelemetry(exporter)
    plain = io.StringIO()
    handler = logging.StreamHandler(plain)
    logging.getLogger("weft.access").addHandler(handler)
    try:
        with served(scripted(answer), text, Access(traces)) as url:
            for path in (
                "/v1/x%0Aweft.access: forged%0D%1b[2J%E2%80%A8end",
                "/v1/files/v1",
                "/v1/responses/res/cancel",
            ):
                (httpx.post if path.endswith("cancel") else httpx.get)(url + path)
            assert wait_until(lambda: len(of(lines())) >= 3)
    finally:
        logging.getLogger("weft.access").removeHandler(handler)
    forged, file, response = of(lines())
    assert forged["route"] == "/v1/x\ufffdweft.access: forged\ufffd\ufffd[2J\ufffdend"
    assert (file["route"], response["route"]) == ("/v1/files/{id}", "/v1/responses/{id}/cancel")
    assert len(plain.getvalue().splitlines()) == 3
    traces.close()
    spans = exporter.get_finished_spans()
    assert {s.name for s in spans} == {"GET", "GET /v1/files/{id}", "POST /v1/responses/{id}/cancel"}
    assert not any("forged" in s.to_json() for s in spans)


def test_who_leaves_is_told_so(scripted: Make, text: ModelText, lines: Callable[[], list[dict[str, Any]]]) -> None:
    port = scripted(lambda spec, index: [])
    with served(port, text, Access()) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=BODY, timeout=0.5)
        assert wait_until(lambda: bool(of(lines())))
        (line,) = of(lines())
    assert (line["status"], line["outcome"], line["completion_tokens"], line["ttft_s"]) == (499, "abort", 0, None)


class Turns:
    """A scripted engine whose requests have their turn before their first token, as an engine in its own process tells it."""

    def __init__(self, port: ScriptedPort) -> None:
        self._port = port

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)

    def subscribe(self, sink: Callable[[EngineFrame], None]) -> None:
        def told(frame: EngineFrame) -> None:
            sink(EngineFrame(plan=tuple({event.id for event in frame.events})))
            sink(frame)

        self._port.subscribe(told)


def test_spans_of_a_request(scripted: Make, text: ModelText) -> None:
    memory = InMemorySpanExporter()
    traces = OpenTelemetry(memory)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with served(Turns(scripted(answer)), text, Access(traces)) as url:  # type: ignore[arg-type]
        head = {"traceparent": f"00-{trace}-{parent}-01"}
        told = httpx.post(f"{url}/v1/completions", json=BODY, headers=head)
        httpx.get(f"{url}/health")
        httpx.post(f"{url}/v1/completions", json={"prompt": 7.5})
    traces.close()
    spans = {span.name: span for span in memory.get_finished_spans() if f"{span.context.trace_id:032x}" == trace}
    assert set(spans) == {"POST /v1/completions", "queue", "prefill", "decode"}
    root = spans["POST /v1/completions"]
    assert f"{root.parent.span_id:016x}" == parent
    assert root.attributes["weft.request.id"] == told.headers["x-request-id"]
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.usage.output_tokens"] == 5
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert all(span.parent.span_id == root.context.span_id for span in (queue, prefill, decode))
    times = [root.start_time, queue.start_time, queue.end_time, prefill.end_time, decode.end_time, root.end_time]
    assert times == sorted(times)
    assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
    others = [span for span in memory.get_finished_spans() if f"{span.context.trace_id:032x}" != trace]
    assert [(span.name, span.attributes["http.response.status_code"]) for span in others] == [
        ("POST /v1/completions", 400)
    ]
    assert BODY["prompt"] not in "".join(span.to_json() for span in memory.get_finished_spans())


def test_a_collector_gets_them(scripted: Make, text: ModelText) -> None:
    """Over HTTP, as OTLP says; read back with OpenTelemetry's own messages."""
    got: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            got.append((self.path, message))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        flags = WatchFlags(otlp_traces_endpoint=f"http://127.0.0.1:{collector.server_port}")
        flags.check()
        with flags.access() as access, served(scripted(answer), text, access) as url:
            httpx.post(f"{url}/v1/completions", json=BODY)
    finally:
        collector.shutdown()
        thread.join(10)
        collector.server_close()
    ((path, message),) = got
    assert path == "/v1/traces"
    (resource,) = message.resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "weft"
    assert {s.name for scope in resource.scope_spans for s in scope.spans} >= {"POST /v1/completions", "decode"}


def test_a_collector_that_is_not_there_harms_nobody(scripted: Make, text: ModelText) -> None:
    with WatchFlags(otlp_traces_endpoint="http://127.0.0.1:9").access() as access:
        with served(scripted(answer), text, access) as url:
            assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200


def test_without_the_sdk_it_is_refused_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'weft\[otel\]'"):
        WatchFlags(otlp_traces_endpoint="http://127.0.0.1:4318").check()
    with pytest.raises(ConfigError, match=r"pip install 'weft\[otel\]'"):
        OpenTelemetry(InMemorySpanExporter())


def test_flags_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="text, json"):
        WatchFlags(log_format="xml").check()
    for endpoint in ("localhost:4318", "grpc://x:1", "http://"):
        with pytest.raises(ConfigError, match="is an address such as"):
            otlp(endpoint)
