"""Checkpoints from checkpoints: weights rounded to few bits, calibrated (`awq`) or not, and written as others read them."""
