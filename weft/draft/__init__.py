"""Slot `draft`: guesses ahead."""
