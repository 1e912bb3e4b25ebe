"""Traces of requests in OpenTelemetry's form, by its own SDK, sent to a collector over OTLP: `pip install 'weft[otel]'`.

    POST /v1/chat/completions      from the request to its end; a child of whatever `traceparent` the client sent
      queue                        until the request has its first turn in a step of the engine
      prefill                      until its first token
      decode                       until its last one

Names of attributes: OpenTelemetry's semantic conventions for HTTP and for generative AI.  No text of prompts or answers is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from weft import __version__
from weft.errors import ConfigError
from weft.front.access import Track

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

TIMEOUT_S = 5
PATH = "/v1/traces"
NEED = "traces need OpenTelemetry's SDK, which is not installed: pip install 'weft[otel]', or leave --otlp-traces-endpoint out"


def otlp(endpoint: str) -> SpanExporter:
    """What sends spans to http://HOST:PORT, or to a whole address.  Raises ConfigError for another kind, or without the SDK."""
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ConfigError(
            f"--otlp-traces-endpoint is an address such as http://127.0.0.1:4318, where a collector takes OTLP over HTTP, "
            f"got {endpoint!r}"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(NEED) from None
    whole = endpoint if url.path not in ("", "/") else f"{url.scheme}://{url.netloc}{PATH}"
    return OTLPSpanExporter(endpoint=whole, timeout=TIMEOUT_S)


class OpenTelemetry:
    """Traces that go to `exporter` in batches, from a thread of the SDK's.  Raises ConfigError without the SDK."""

    def __init__(self, exporter: SpanExporter) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError(NEED) from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "weft", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("weft", __version__)

    def tell(self, track: Track) -> None:
        """Make the spans of a request that has ended."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        def at(moment_s: float) -> int:
            return track.wall_ns + round(1e9 * (moment_s - track.began_s))

        assert track.ended_s is not None
        record = track.record() | ({} if track.known else {"route": None})
        carrier = {
            n.decode("latin1"): v.decode("latin1") for n, v in track.headers if n in (b"traceparent", b"tracestate")
        }
        root = self._tracer.start_span(
            f"{track.method} {track.route}" if track.known else track.method,
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=track.wall_ns,
            attributes=_attributes(record),
        )
        if track.status >= 500:
            root.set_status(trace.StatusCode.ERROR)
        within = trace.set_span_in_context(root)
        for name, begin_s, end_s in _parts(track):
            self._tracer.start_span(name, context=within, start_time=at(begin_s)).end(at(end_s))
        root.end(at(track.ended_s))

    def close(self) -> None:
        """Send what is left, for at most some seconds."""
        self._provider.force_flush(1000 * TIMEOUT_S)
        self._provider.shutdown()


def _attributes(record: dict[str, Any]) -> dict[str, Any]:
    names = {
        "id": "weft.request.id",
        "method": "http.request.method",
        "route": "http.route",
        "status": "http.response.status_code",
        "model": "gen_ai.request.model",
        "prompt_tokens": "gen_ai.usage.input_tokens",
        "completion_tokens": "gen_ai.usage.output_tokens",
        "cached_tokens": "weft.usage.cached_tokens",
        "outcome": "weft.request.outcome",
        "ttft_s": "weft.time_to_first_token_s",
    }
    return {names[key]: value for key, value in record.items() if key in names and value is not None}


def _parts(track: Track) -> list[tuple[str, float, float]]:
    """(name, begin, end) of what the engine's part of a request was made of, for each of its prompts, as far as it came."""
    assert track.ended_s is not None
    found = []
    for request in track.requests:
        firsts = [s.first_s for s in request.sequences if s.first_s]
        begun = request.begun_s or (min(firsts) if firsts else track.ended_s)
        found.append(("queue", request.arrived_s, begun))
        if request.begun_s or firsts:
            found.append(("prefill", begun, min(firsts, default=track.ended_s)))
        if firsts:
            found.append(("decode", min(firsts), max(s.last_s for s in request.sequences)))
    return found
