"""Benchmarks of slot `draft`."""
