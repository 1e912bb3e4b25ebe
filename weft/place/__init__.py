"""Slot `place`: which devices do what."""
