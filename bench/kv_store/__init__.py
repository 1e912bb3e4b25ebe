"""Benchmarks of the slot `kv.store`."""
