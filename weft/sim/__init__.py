"""The simulator: the engine's own deciding half under a virtual clock, on machines and loads that are data."""
