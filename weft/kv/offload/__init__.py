"""Slot `kv.offload`: which tier holds a block that the pool gives up, when to fetch."""
