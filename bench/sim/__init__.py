"""Benchmarks of the simulator: its speed, and its errors against what was measured."""
