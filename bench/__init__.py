"""Benchmarks of techniques, each beside the null of its slot in the same run; none of it is installed with the package."""
