"""Slot `kv.compress`: how many entries a sequence keeps, and which."""
