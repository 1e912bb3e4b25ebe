"""Techniques of the slot `accept`."""
