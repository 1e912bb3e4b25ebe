"""Benchmarks of slot `search`."""
