"""Checkpoints whose weights are stored in few bits: AWQ, GPTQ and compressed-tensors, read as `Quantized`.

    scheme.scheme(config) -> Scheme | None          what config.json's `quantization_config` says; None: all is dense; no torch
    readers.readers(folder, parts, stored, scheme)  for each part of a fused weight, by its name, a `Reader`
    readers.fused(readers) -> {target: WeightFormat}    the formats that hold the fused weights exactly
    Reader.names, .format, .read(get)               stored tensors that it reads; None for dense; Tensor | Quantized
    files.Files(stored)                             get(name): a tensor over mapped bytes; give_back(name)

A loader asks for the readers once and reads part by part:

    with Files(stored) as files:
        for part in parts:
            found = readers[part.name].read(files.get)      # Quantized where .format is not None, else a dense tensor
            ...
            for name in readers[part.name].names:
                files.give_back(name)

One layer's tensors may lie in different files; `Files` maps each file once.
"""
