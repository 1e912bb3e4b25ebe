"""GGUF checkpoints: one file (or a numbered row of them) that holds shape, tokenizer and weights.

    header      metadata and where each tensor lies, from bytes that nobody vouches for; no torch
    checkpoint  what the metadata say, as a `config.json` would say it, and the tensors by the names of Llama's checkpoints
    blocks      quantized tensors: their exact values, and the same as unsigned integers with scales

Source: the specification in ggml's documentation (docs/gguf.md, version 3), and the block layouts of ggml's public headers.
"""
