"""Benchmarks of slot `sample`."""
