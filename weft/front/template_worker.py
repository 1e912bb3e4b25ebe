"""The process that renders chat templates.  Run as a script by `renderer.Renderer`; imports nothing of weft.

A template comes with a checkpoint, so it is a stranger's program.  jinja2's immutable sandbox keeps it away from
Python's objects; that it cannot run for ever or eat the machine's memory is seen to from outside the language, because
no list of dangerous operations is ever complete (`10**(10**10)`, `'x'.center(10**12)`, constant folding while
compiling, nested loops):

    time     SIGPROF with its default action: the kernel ends the process, also inside one long C call.  Of the processor, so that
             the same template is taken or given up on a busy machine as on a quiet one; its parent goes by the clock, later
    memory   RLIMIT_AS
    output   counted while it is generated
    files    RLIMIT_FSIZE 0, no core dumps

Frames on stdin and stdout: 4 bytes big-endian length, then JSON.  Request: {key, source?, context, kwargs, known}.
Answer: {text}, or {error, message} with error one of refused, template, kwargs, size, memory and unknown (the source
of the key must be sent).
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_TEMPLATES = 64
MAX_MESSAGE = 500
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")


class Refused(jinja2.TemplateError):
    """The template itself called raise_exception."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; in a prompt it is its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Any) -> str:
        return str(caller())


class Dict:
    """`dict(...)` of templates, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that takes no names beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        given = dict(*rest, **kwargs)
        for name in given:
            _public(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute may not begin with an underscore: {name}")


def raise_exception(message: Any) -> None:
    raise Refused(str(message))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What transformers gives to chat templates, in the immutable sandbox."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals.pop("lipsum", None)
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace)
    return env


class Templates:
    """Compiled templates by key, with the names that each reads."""

    def __init__(self) -> None:
        self.env = environment()
        self.compiled: dict[str, tuple[jinja2.Template, frozenset[str]]] = {}

    def get(self, key: str, source: str | None) -> tuple[jinja2.Template, frozenset[str]] | None:
        if key not in self.compiled:
            if source is None:
                return None
            if len(self.compiled) >= MAX_TEMPLATES:
                self.compiled.pop(next(iter(self.compiled)))
            names = jinja2.meta.find_undeclared_variables(self.env.parse(source))
            self.compiled[key] = (self.env.from_string(source), frozenset(names))
        return self.compiled[key]


def render(templates: Templates, request: dict[str, Any], max_chars: int) -> dict[str, Any]:
    found = templates.get(request["key"], request.get("source"))
    if found is None:
        return {"error": "unknown", "message": ""}
    template, names = found
    unread = sorted(set(request["kwargs"]) - names - set(request["known"]))
    if unread:
        own = sorted(names - set(request["context"]) - set(templates.env.globals))
        return {"error": "kwargs", "message": ", ".join(unread), "names": own}
    parts: list[str] = []
    size = 0
    for part in template.generate({**request["kwargs"], **request["context"]}):
        size += len(part)
        if size > max_chars:
            return {"error": "size", "message": ""}
        parts.append(part)
    return {"text": "".join(parts)}


def answer(templates: Templates, request: dict[str, Any], max_chars: int) -> dict[str, Any]:
    try:
        return render(templates, request, max_chars)
    except Refused as e:
        return {"error": "refused", "message": shown(str(e))}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except Exception as e:  # a template may raise anything at all
        line = getattr(e, "lineno", None)
        where = f"line {line}: " if isinstance(line, int) else ""
        return {"error": "template", "message": shown(f"{where}{type(e).__name__}: {e}")}


def shown(message: str) -> str:
    """An error's text as a client may see it: short, and without addresses of this process."""
    return _ADDRESS.sub("0x...", message[: 4 * MAX_MESSAGE])[:MAX_MESSAGE]


def limit(memory_bytes: int) -> None:
    """Limits that the process keeps for its whole life; where the platform has none, the parent's clock remains."""
    try:
        import resource
    except ImportError:
        return
    for kind, value in (("RLIMIT_AS", memory_bytes), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        if hasattr(resource, kind):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(getattr(resource, kind), (value, value))


def alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve(answered: Callable[[dict[str, Any]], dict[str, Any]], *, memory_bytes: int, seconds: float) -> None:
    """Answer the frames on stdin, each within `seconds`, until it closes; what the main program of a worker is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes our stdin
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limit(memory_bytes)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(4)) == 4:
        body = source.read(int.from_bytes(head, "big"))
        alarm(seconds)
        answer = answered(json.loads(body))
        try:
            data = json.dumps(answer, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a pair, which only an escape can say
            data = json.dumps(answer).encode()
        alarm(0)
        sink.write(len(data).to_bytes(4, "big") + data)
        sink.flush()


def main(memory_bytes: int, seconds: float, max_chars: int) -> None:
    datetime.now().strftime("%Z")
    templates = Templates()
    serve(lambda request: answer(templates, request, max_chars), memory_bytes=memory_bytes, seconds=seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
