"""Techniques of the slot `adapt`: per-request deltas on weights."""
