"""`weft serve`: the HTTP server.  stdout gets one line, `weft ready http://HOST:PORT`; everything else goes to stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._flags import EngineFlags, Model, spread
from weft.cli._terminal import loading, say, stderr
from weft.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from weft.exec.thread import EngineThread
    from weft.front.text import ModelText

SERVER = "Server"
Checks = tuple[float, float | None] | None
"""Share of requests that are shadow-checked, and the alarm; None for no checks."""
LEVELS = ("debug", "info", "warning", "error")


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=SERVER, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """What a user may say about the server."""

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
    api_key: Annotated[
        str | None,
        _option(
            "--api-key",
            help="Key that clients must send; better given in the environment variable WEFT_API_KEY.",
            metavar="KEY",
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

    def check(self) -> None:
        """Look at what can be wrong without a model.  Raises ConfigError."""
        names = self.served_model_name or ()
        if not all(name.strip() for name in names):
            raise ConfigError("--served-model-name is empty; give a name, or leave the flag out")
        if self.shadow_alarm is not None and self.shadow is None:
            raise ConfigError("--shadow-alarm needs --shadow, the share of requests to check")
        if self.lora_root is not None and not self.lora_root.is_dir():
            raise ConfigError(f"--lora-root {self.lora_root} is no folder")


@functools.partial(spread, server=ServerFlags, flags=EngineFlags)
def serve(model: Model = None, *, server: ServerFlags, flags: EngineFlags) -> None:
    """Serve a model over HTTP, in OpenAI's form."""
    from weft.front.server import bind
    from weft.hub import model_id, resolve

    with _ended_by_signals():
        _log(server.log_level)
        server.check()
        flags.check()
        names = list(server.served_model_name or ()) or [model_id(model)]
        key = server.api_key or os.environ.get("WEFT_API_KEY") or None
        # The port is held from here on, so that a taken one is found before anything large is fetched or loaded.
        # Clients that come while the model loads wait in the socket's queue and are answered then.
        with contextlib.closing(bind(server.host, server.port)) as held:
            folder = resolve(model, progress=sys.stderr.isatty())
            engine, text = start(folder, model_id(model), flags, server.checks, server.lora_root, server.record)
            _run(engine, text, held, server.host, names, key)


def _run(
    engine: EngineThread, text: ModelText, held: socket.socket, host: str, names: list[str], key: str | None
) -> None:
    from weft.front.app import create_app
    from weft.front.server import Server

    def ready(url: str) -> None:
        print(f"weft ready {url}", flush=True)
        say(f"try:  {curl(url, names[0], chat=text.has_chat_template, key=key is not None)}")

    try:
        Server(create_app(engine, text, model_ids=names, api_key=key), host, ready=ready, sock=held).run()
        if engine.error() is not None:
            raise EngineError(f"the engine had stopped: {engine.error()}")
    finally:
        engine.close()


def start(
    folder: Path,
    name: str,
    flags: EngineFlags,
    checks: Checks = None,
    lora_root: Path | None = None,
    record: Path | None = None,
) -> tuple[EngineThread, ModelText]:
    """Plan, show the plan, and only then load: the engine in its thread, and the text side of its model."""
    from weft.cli.plan import table
    from weft.exec.build import build, prepare
    from weft.exec.host import format_size
    from weft.exec.record import tap
    from weft.exec.shadow import Shadow, check_options, planned
    from weft.exec.thread import EngineThread
    from weft.front.text import ModelText
    from weft.llm import engine_info

    setup = prepare(flags.config(folder))
    if checks is not None:
        check_options(*checks)
        setup = planned(setup)
    stderr().print(table(setup, name))
    setup.require_fit()
    if setup.plan.reason:
        say(f"note: {setup.plan.reason}")
    fallback = setup.ops["target"].reason
    if fallback and setup.device == "cpu" and flags.ops != "ref":
        say(f"note: this model runs on plain PyTorch, which is slower: {fallback}")
    text = ModelText.load(folder, max_model_len=setup.limits.max_model_len, name=name)
    with loading(f"{format_size(setup.plan.weights_bytes)} of weights") as progress:
        runtime = build(setup, progress)
    if record is not None:
        tap(runtime.engine, record)
    shadow = None if checks is None else Shadow(runtime, *checks)
    info = engine_info(setup, name, runtime.adapters, loads_adapters=lora_root is not None)
    root = None if lora_root is None else str(lora_root.resolve())
    engine = EngineThread(
        runtime.engine, runtime.executor, info, adapters=runtime.adapters, adapter_root=root, shadow=shadow
    )
    return engine, text


def curl(url: str, name: str, *, chat: bool, key: bool = False) -> str:
    """A request to try, as one line for a shell."""
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "Tell me about the sea."}]} if chat else {"prompt": "The sea was"}
    )
    body = json.dumps({"model": name, "max_tokens": 60, **prompt})
    header = ' -H "Authorization: Bearer $WEFT_API_KEY"' if key else ""
    route = "chat/completions" if chat else "completions"
    return f"curl {url}/v1/{route} -H 'Content-Type: application/json'{header} -d {shlex.quote(body)}"


def _log(level: str | None) -> None:
    wanted = (level or os.environ.get("WEFT_LOG") or "warning").lower()
    if wanted not in LEVELS:
        raise ConfigError(f"the log level is one of {', '.join(LEVELS)}, got {wanted!r}")
    logging.basicConfig(
        level=wanted.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the command with status 0 at any moment, also while the model is being loaded.

    Once the server runs, it takes the signals itself, to let open requests finish.
    """

    def end(number: int, frame: object) -> None:
        raise SystemExit(0)

    kept = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
