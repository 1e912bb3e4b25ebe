"""Benchmarks of slot `adapt`."""
