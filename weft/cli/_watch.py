"""Flags of what a server tells of its requests: lines in the log, and traces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.front.access import Access

PANEL = "Logs and traces"
FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchFlags:
    """How logs are written, and where traces go."""

    log_format: Annotated[
        str, typer.Option("--log-format", help="Lines of text, or of json.", metavar="FORM", rich_help_panel=PANEL)
    ] = "text"
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            "--otlp-traces-endpoint",
            help="Where an OpenTelemetry collector takes traces over HTTP; needs weft[otel].",
            metavar="URL",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None

    def check(self) -> None:
        """Raises ConfigError."""
        if self.log_format not in FORMATS:
            raise ConfigError(f"--log-format is one of {', '.join(FORMATS)}, got {self.log_format!r}")
        if self.otlp_traces_endpoint is not None:
            from weft.front.tracing import otlp

            otlp(self.otlp_traces_endpoint).shutdown()

    @property
    def usual_level(self) -> str:
        """From which level on is logged where nobody says: who asks for JSON wants a line for each request."""
        return "info" if self.log_format == "json" else "warning"

    @contextlib.contextmanager
    def access(self) -> Iterator[Access]:
        """What tells of requests; at the end, traces that are still held are sent."""
        from weft.front.access import Access

        if self.otlp_traces_endpoint is None:
            yield Access()
            return
        from weft.front.tracing import OpenTelemetry, otlp

        traces = OpenTelemetry(otlp(self.otlp_traces_endpoint))
        try:
            yield Access(traces)
        finally:
            traces.close()
