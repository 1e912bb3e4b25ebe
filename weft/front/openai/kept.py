"""Work that has no client: what a server goes on with when it starts, and leaves off in good order when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from weft.front.openai.batch_runner import BatchRunner
from weft.front.openai.response_run import Background
from weft.front.openai.responses import resume
from weft.front.openai.services import Services
from weft.front.store import Store


def attach(services: Services, store: Store | None) -> None:
    """Give the models of a server their store, and the desks of what runs without a client: one for all of them."""
    background, batches = Background(), BatchRunner(services, store)
    for service in services:
        service.store, service.background, service.batches = store, background, batches


@contextlib.asynccontextmanager
async def working(services: Services) -> AsyncIterator[None]:
    """Go on with background responses and batches; at the end leave them as they are stored, and close the store."""
    first = services.first
    try:
        await resume(services)
        await first.batches.resume()
        yield
    finally:
        await first.background.close()
        await first.batches.close()
        if first.store is not None:
            first.store.close()
