"""Benchmarks of slot `skip`."""
