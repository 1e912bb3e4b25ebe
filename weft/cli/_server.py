"""The flags of `weft serve` that are neither of an engine nor of who may come in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._config_file import read_config
from weft.cli._engines import roles, router
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.front.admission import Bounds

SERVER = "Server"
Checks = tuple[float, float | None] | None
"""Share of requests that are shadow-checked, and the alarm; None for no checks."""


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=SERVER, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """What a user may say about the server."""

    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="A TOML file of these flags by their names; what the command line says goes before it.",
            metavar="FILE.toml",
            callback=read_config,
            is_eager=True,
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = None
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", rich_help_panel=SERVER)] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("--port", help="Port; 0 takes a free one.", min=0, max=65535, rich_help_panel=SERVER)
    ] = 8000
    served_model_name: Annotated[
        list[str] | None,
        _option(
            "--served-model-name",
            help="Name of the model in requests, instead of its own; more by repeating it.",
            metavar="NAME",
        ),
    ] = None
    lora_root: Annotated[
        Path | None,
        _option(
            "--lora-root",
            help="Folder below which clients may load adapters; without it they may not.",
            metavar="FOLDER",
        ),
    ] = None
    pooling: Annotated[
        str, typer.Option("--pooling", help="Embeddings: last or mean.", metavar="HOW", rich_help_panel=SERVER)
    ] = "last"
    shadow: Annotated[
        float | None,
        _option(
            "--shadow",
            help="Share of the requests that is computed once more on the reference path; the drift is a metric.",
            metavar="SHARE",
        ),
    ] = None
    shadow_alarm: Annotated[
        float | None,
        _option(
            "--shadow-alarm",
            help="Divergence in nats per token from which on the drift is told as an alarm.",
            metavar="NATS",
        ),
    ] = None
    tool_parser: Annotated[
        str | None,
        _option(
            "--tool-parser",
            help="How the model writes tool calls, e.g. hermes; else what its chat template shows. (auto)",
            metavar="NAME",
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        _option(
            "--reasoning-parser",
            help="How the model marks its thoughts, e.g. think, or none to leave them in the text. (auto)",
            metavar="NAME",
        ),
    ] = None
    trust_request_chat_template: Annotated[
        bool,
        _option("--trust-request-chat-template", help="Let requests bring a chat template of their own."),
    ] = False
    unknown_fields: Annotated[
        str,
        typer.Option(
            "--unknown-fields",
            help="Refuse, or ignore, fields of requests that are not known.",
            metavar="HOW",
            rich_help_panel=SERVER,
        ),
    ] = "refuse"
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue",
            help="Requests that may wait for their first token.",
            metavar="N",
            min=1,
            rich_help_panel=SERVER,
        ),
    ] = 1024
    max_queued_tokens: Annotated[
        str,
        typer.Option(
            "--max-queued-tokens", help="Tokens of their prompts, in all.", metavar="N", rich_help_panel=SERVER
        ),
    ] = "4M"
    max_body: Annotated[
        str,
        typer.Option("--max-body", help="Longest body of a request.", metavar="SIZE", rich_help_panel=SERVER),
    ] = "32MB"
    rate_limit_requests: Annotated[
        int | None, _option("--rate-limit-requests", help="Requests of one key in a minute.", metavar="N")
    ] = None
    rate_limit_tokens: Annotated[
        str | None,
        _option("--rate-limit-tokens", help="Tokens of one key in a minute, prompts and answers.", metavar="N"),
    ] = None
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            help="Seconds that open requests have after SIGTERM; a second signal ends them at once.",
            metavar="S",
            min=0,
            rich_help_panel=SERVER,
        ),
    ] = 30.0
    stall_timeout: Annotated[
        float,
        typer.Option(
            "--stall-timeout",
            help="Seconds without a step after which an engine that has work is started again.",
            metavar="S",
            min=0.1,
            rich_help_panel=SERVER,
        ),
    ] = 120.0
    replicas: Annotated[
        int,
        typer.Option(
            "--replicas",
            help="Engines of the model, each with its share of the memory and of the cores.",
            metavar="N",
            min=1,
            max=64,
            rich_help_panel=SERVER,
        ),
    ] = 1
    roles: Annotated[
        str | None,
        _option(
            "--roles",
            help="Compute prompts in one engine and answers in others, as in prefill=1,decode=1.",
            metavar="ROLES",
        ),
    ] = None
    route: Annotated[
        str,
        typer.Option(
            "--route", help="Which of several engines serves a request.", metavar="NAME(ARGS)", rich_help_panel=SERVER
        ),
    ] = "prefix_aware"
    request_stall_timeout: Annotated[
        float,
        typer.Option(
            "--request-stall-timeout",
            help="Seconds after which a request that does not advance, while others do, is computed again.",
            metavar="S",
            min=0.1,
            rich_help_panel=SERVER,
        ),
    ] = 120.0
    record: Annotated[
        Path | None,
        _option(
            "--record",
            help="Write what comes to the engine and what it decides, prompts included, for weft sim --replay.",
            metavar="FILE",
        ),
    ] = None
    log_level: Annotated[
        str | None,
        _option("--log-level", help="debug, info, warning or error; else WEFT_LOG, else warning.", metavar="LEVEL"),
    ] = None

    @property
    def checks(self) -> Checks:
        """Share and alarm of the shadow checks."""
        return None if self.shadow is None else (self.shadow, self.shadow_alarm)

    @property
    def speech(self) -> dict[str, Any]:
        """What of it concerns how requests are read and what models say, as keywords of `create_app`."""
        return {
            "tool_parser": self.tool_parser or "auto",
            "reasoning_parser": self.reasoning_parser or "auto",
            "trust_templates": self.trust_request_chat_template,
            "lenient": self.unknown_fields == "ignore",
        }

    @property
    def bounds(self) -> Bounds:
        """What is let in at once, and from one key.  Raises ConfigError."""
        from weft.config import parse_size
        from weft.front.admission import Bounds

        rate = self.rate_limit_tokens
        return Bounds(
            max_queue=self.max_queue,
            max_queued_tokens=parse_size(self.max_queued_tokens, "--max-queued-tokens"),
            requests_per_minute=self.rate_limit_requests,
            tokens_per_minute=None if rate is None else parse_size(rate, "--rate-limit-tokens"),
        )

    def check(self) -> None:
        """Look at what can be wrong without a model.  Raises ConfigError."""
        from weft.config import parse_size

        parse_size(self.max_body, "--max-body")
        if self.rate_limit_requests is not None and self.rate_limit_requests < 1:
            raise ConfigError(f"--rate-limit-requests must be at least 1, got {self.rate_limit_requests}")
        _ = self.bounds
        names = self.served_model_name or ()
        if not all(name.strip() for name in names):
            raise ConfigError("--served-model-name is empty; give a name, or leave the flag out")
        if self.pooling not in ("last", "mean"):
            raise ConfigError(f"--pooling is last or mean, got {self.pooling!r}")
        if self.unknown_fields not in ("refuse", "ignore"):
            raise ConfigError(f"--unknown-fields is refuse or ignore, got {self.unknown_fields!r}")
        from weft.front import reasoning, tools

        tools.chosen(self.tool_parser or "auto", ())
        reasoning.chosen(self.reasoning_parser or "auto", ())
        if self.shadow_alarm is not None and self.shadow is None:
            raise ConfigError("--shadow-alarm needs --shadow, the share of requests to check")
        router(self.route)
        if self.roles is not None:
            roles(self.roles)
            if self.replicas > 1:
                raise ConfigError("--roles says how many engines there are; leave --replicas out")
        if self.record is not None and (self.replicas > 1 or self.roles is not None):
            raise ConfigError("--record takes down what one engine decides; leave --replicas and --roles out")
        if self.lora_root is not None and not self.lora_root.is_dir():
            raise ConfigError(f"--lora-root {self.lora_root} is no folder")
