"""Slot `kv.evict`: which cached block goes first."""
