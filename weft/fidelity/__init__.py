"""A stack's answers against the reference path's, as numbers: divergence, perplexity, recall, lengths, time and memory."""
