"""Slot `schedule`: who enters, who advances, how far, who yields."""
