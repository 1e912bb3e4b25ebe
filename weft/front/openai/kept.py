"""Work that has no client: what a service goes on with when it starts, and leaves off in good order when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from weft.front.openai.batch_runner import BatchRunner
from weft.front.openai.response_run import Background
from weft.front.openai.responses import resume
from weft.front.openai.service import Service
from weft.front.store import Store


def attach(service: Service, store: Store | None) -> None:
    """Give a service its store, and the desks of what runs without a client."""
    service.store = store
    service.background = Background()
    service.batches = BatchRunner(service)


@contextlib.asynccontextmanager
async def working(service: Service) -> AsyncIterator[None]:
    """Go on with background responses and batches; at the end leave them as they are stored, and close the store."""
    try:
        await resume(service)
        await service.batches.resume()
        yield
    finally:
        await service.background.close()
        await service.batches.close()
        if service.store is not None:
            service.store.close()
