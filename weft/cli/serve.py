"""`weft serve`: the HTTP server.  stdout gets one line, `weft ready http://HOST:PORT`; everything else goes to stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from weft.cli._engines import engines
from weft.cli._flags import EngineFlags, Models, spread
from weft.cli._guard import GuardFlags
from weft.cli._models import Chosen, check, names_of
from weft.cli._server import ServerFlags
from weft.cli._store import StoreFlags
from weft.cli._terminal import level, log, say
from weft.cli._watch import WatchFlags
from weft.errors import ConfigError, EngineError
from weft.front.signals import signals

if TYPE_CHECKING:
    from weft.front.access import Access
    from weft.front.app import Served
    from weft.front.guard import Guard
    from weft.front.store import Store


@functools.partial(
    spread, server=ServerFlags, security=GuardFlags, store=StoreFlags, watch=WatchFlags, flags=EngineFlags
)
def serve(
    model: Models = None,
    *,
    server: ServerFlags,
    security: GuardFlags,
    store: StoreFlags,
    watch: WatchFlags,
    flags: EngineFlags,
) -> None:
    """Serve a model, or several, over HTTP, in OpenAI's form."""
    from weft.front.app import Served
    from weft.front.server import bind
    from weft.front.text import ModelText
    from weft.hub import model_id, resolve

    with _ended_by_signals():
        watch.check()
        log(level(server.log_level, watch.usual_level), watch.log_format)
        server.check()
        store.check()
        flags.check()
        asked: list[str | None] = [*(model or ())] or [None]
        if len(asked) > 1:
            check(server, flags)
        names = names_of(asked, server.served_model_name or ())
        guard = security.guard(server.host)
        if guard.keys.from_files:
            signal.signal(signal.SIGHUP, lambda *_: guard.keys.reread())
        # The port is held from here on, so that a taken one is found before anything large is fetched or loaded.
        with contextlib.closing(bind(server.host, server.port)) as held:
            if server.roles is not None and flags.prefix_cache is False:
                raise ConfigError("--roles hand prompts over by the prefix cache; leave --no-prefix-cache out")
            chosen = [
                Chosen(resolve(one, progress=sys.stderr.isatty()), model_id(one), own)
                for one, own in zip(asked, names, strict=True)
            ]
            kept = store.open()
            with engines(chosen, flags, server, watch) as ports, watch.access() as access:
                served = [
                    Served(port, ModelText.load(one.folder, name=one.id), one.names)
                    for port, one in zip(ports, chosen, strict=True)
                ]
                _run(served, held, server, (security, guard), kept, access)


def _run(
    served: list[Served],
    held: socket.socket,
    flags: ServerFlags,
    secured: tuple[GuardFlags, Guard],
    store: Store | None,
    access: Access,
) -> None:
    from weft.config import parse_size
    from weft.exec.host import settle
    from weft.front.app import STALL_S, create_app
    from weft.front.gate import Gate
    from weft.front.page import serve_page
    from weft.front.server import Server
    from weft.front.several import Several

    security, guard = secured
    first, others = served[0], served[1:]
    port: Any = Several({one.model_ids[0]: one.port for one in served}) if others else first.port  # type: ignore[misc]

    def ready(url: str) -> None:
        settle()
        print(f"weft ready {url}", flush=True)
        key = guard.keys.asks_clients
        say(f"try:  {curl(url, first.model_ids[0], chat=first.text.has_chat_template, key=key)}")

    gate = Gate(
        port.started,
        lambda: create_app(
            first.port,
            first.text,
            model_ids=first.model_ids,
            others=others,
            guard=guard,
            max_body=parse_size(flags.max_body),
            bounds=flags.bounds,
            store=store,
            pooling=flags.pooling,
            **flags.speech,
        ),
        lambda: port.state(STALL_S),
        lambda: port.error() is not None,
    )
    gate.access, gate.page = access, guard.visitors(serve_page)
    Server(
        gate,
        flags.host,
        ready=ready,
        sock=held,
        drain_s=flags.drain_timeout,
        patience=security.patience,
        tls=security.tls,
        root_path=guard.root_path,
    ).run()
    if port.error() is not None:
        raise EngineError(f"the engine had stopped: {port.error()}")


def curl(url: str, name: str, *, chat: bool, key: bool = False) -> str:
    """A request to try, as one line for a shell."""
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "Tell me about the sea."}]} if chat else {"prompt": "The sea was"}
    )
    body = json.dumps({"model": name, "max_tokens": 60, **prompt})
    header = ' -H "Authorization: Bearer $WEFT_API_KEY"' if key else ""
    route = "chat/completions" if chat else "completions"
    return f"curl {url}/v1/{route} -H 'Content-Type: application/json'{header} -d {shlex.quote(body)}"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the command with status 0 at any moment, also while the model is being loaded.

    Once the server runs, it takes the signals itself, to let open requests finish.
    """

    def end(number: int, frame: object) -> None:
        raise SystemExit(0)

    with signals(end):
        yield
