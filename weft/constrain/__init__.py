"""Slot `constrain`: which tokens a grammar allows."""
