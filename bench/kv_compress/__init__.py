"""Benchmarks of techniques in the slot kv.compress."""
