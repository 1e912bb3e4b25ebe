"""Slot `search`: programs over many generations."""
