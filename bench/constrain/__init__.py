"""Benchmarks of slot `constrain`."""
