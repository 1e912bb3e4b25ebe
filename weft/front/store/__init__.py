"""What a server keeps on disk: responses, files, batches.  SQLite, off the event loop, one folder for one server."""

from __future__ import annotations

from weft.front.store.database import StoreFull
from weft.front.store.store import Store, default_folder, open_store

__all__ = ["Store", "StoreFull", "default_folder", "open_store"]
