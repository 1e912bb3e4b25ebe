"""Measurements that `weft bench` prints: how fast the engine is, and how fast this machine would let it be."""
