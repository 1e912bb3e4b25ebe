"""Slot `route`: which replica serves a request."""
