"""Benchmarks of slot `accept`."""
