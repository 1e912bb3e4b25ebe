"""Slot `attention`: how attention is computed."""
