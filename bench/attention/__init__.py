"""Benchmarks of slot `attention`."""
