"""Slot `kv.store`: number format of stored KV."""
