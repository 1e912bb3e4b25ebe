"""Benchmarks of slot `schedule`."""
