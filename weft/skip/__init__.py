"""Techniques of the slot `skip`: which layers a row takes."""
