"""A conversation with any server that speaks OpenAI's chat protocol: `weft chat --url`.  Standard library only."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from weft.errors import ConfigError, EngineError, RequestError

TIMEOUT_S = 600.0
"""Between two pieces of an answer; the first may wait for a long queue and a long prompt."""
MAX_LINE_BYTES = 16 << 20
USER_AGENT = "weft-chat"


class RemoteChat:
    """url: of the server, with or without /v1.  model: its name there; None takes the first that the server lists.

    Raises ConfigError for a bad address, EngineError when the server cannot be reached or fails.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a server; write it as http://127.0.0.1:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self._base = f"{parts.scheme}://{parts.netloc}{path}/v1"
        self._key = api_key
        self.name = model or self._first_model()

    def answer(self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> Generator[str, None, None]:
        """The answer's text as it comes.  Leaving the iteration closes the connection, which cancels the request."""
        body = {"model": self.name, "messages": list(messages), "stream": True, **sampling}
        with self._open("/chat/completions", body) as response:
            for data in events(response):
                if data.get("error"):
                    raise EngineError(str(data["error"].get("message", data["error"])))
                for choice in data.get("choices") or ():
                    yield choice.get("delta", {}).get("content") or ""

    def _first_model(self) -> str:
        with self._open("/models") as response:
            found = _json(response.read(MAX_LINE_BYTES))
        models = [str(entry["id"]) for entry in found.get("data") or () if "id" in entry]
        if not models:
            raise EngineError(f"the server at {self._base} lists no model; name one as MODEL")
        return models[0]

    def _open(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + route, data, headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read(MAX_LINE_BYTES)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise EngineError(f"the server at {self._base} cannot be reached ({reason}); is it running?") from None


def events(lines: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events (WHATWG HTML, 9.2), up to `[DONE]`."""
    parts: list[bytes] = []
    while line := lines.readline(MAX_LINE_BYTES):
        line = line.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            parts.append(line[5:].removeprefix(b" "))
        elif not line and parts:
            data = b"\n".join(parts)
            parts.clear()
            if data.strip() == b"[DONE]":
                return
            yield _json(data)


def _refusal(status: int, body: bytes) -> EngineError:
    """What a server that answers with an error says, in its own words where it has some."""
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = " ".join(body.decode("utf-8", "replace").split())[:300] or "no reason given", None
    if status == 401:
        message += " (give it with --api-key or in WEFT_API_KEY)"
    text = f"the server answered {status}: {message}"
    return RequestError(text, code=code) if 400 <= status < 500 else EngineError(text)


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EngineError("the server's answer is not in OpenAI's form; is the address right?")
    return found
