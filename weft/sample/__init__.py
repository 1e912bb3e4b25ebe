"""Slot `sample`: logits of linked rows to one law."""
