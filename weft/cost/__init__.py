"""Slot `cost`: how long a plan takes on given hardware."""
