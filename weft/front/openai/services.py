"""`Services`: the models of one server, and which of them a request is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from weft.errors import ConfigError
from weft.front.openai.service import Service, unknown
from weft.front.port import EnginePort


class Services:
    """The models of a server, an engine each.  The first one answers who names none.

    What is kept on disk, and what works without a client, is one for all of them: see `kept.attach`.
    """

    def __init__(self, services: Sequence[Service]) -> None:
        """Raises ConfigError where two would answer to one name."""
        self._all = tuple(services)
        seen: set[str] = set()
        for service in self._all:
            for name in dict.fromkeys(service.model_ids):
                if name in seen:
                    raise ConfigError(
                        f"two of the models have the name {name!r}; give each its own with --served-model-name"
                    )
                seen.add(name)
        for service in self._all if self.several else ():
            service.client.name = service.model_ids[0]

    def __iter__(self) -> Iterator[Service]:
        return iter(self._all)

    @property
    def first(self) -> Service:
        return self._all[0]

    @property
    def several(self) -> bool:
        return len(self._all) > 1

    @property
    def ports(self) -> Mapping[str, EnginePort]:
        """Their engines, by the first name of each."""
        return {service.model_ids[0]: service.port for service in self._all}

    def of(self, model: object) -> Service:
        """Whose this name is.  What is no name is left to the service, which says so.  Raises RequestError (404)."""
        if len(self._all) == 1 or not isinstance(model, str):
            return self.first
        for service in self._all:
            if model in service.model_ids or model in service.client.adapters:
                return service
        raise unknown(model, [name for service in self._all for name in service.names])

    def asked(self, body: bytes) -> Service:
        """Whose the model is that a JSON body names.  A body that is none, its reader refuses.  Raises RequestError (404)."""
        if len(self._all) == 1:
            return self.first
        try:
            model = msgspec.json.decode(body, type=_Named).model
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            model = None
        return self.of(model)

    def close(self) -> None:
        for service in self._all:
            service.close()


class _Named(msgspec.Struct):
    """As much of a body as has to be read to know whose it is; everything else is passed over."""

    model: str | None = None
