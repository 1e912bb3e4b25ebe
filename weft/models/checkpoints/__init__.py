"""Checkpoints whose weights are stored in few bits: AWQ, GPTQ and compressed-tensors, read as `Quantized`.

    scheme(config) -> Scheme | None                     what config.json's `quantization_config` says; None: all is dense
    readers(folder, parts, stored, scheme) -> dict      for each part of a fused weight, by its name, a `Reader`
    Reader.names, Reader.format, Reader.read(get)       stored tensors that it reads; None for dense; Tensor | Quantized
    Files(stored)                                       get(name): a tensor over mapped bytes; give_back(name)

A loader asks for the readers once, takes each fused weight's format from its parts' (`WeightFormat.widest`), and reads part
by part:

    with Files(stored) as files:
        for part in parts:
            found = readers[part.name].read(files.get)      # Quantized where .format is not None, else a dense tensor
            ...
            for name in readers[part.name].names:
                files.give_back(name)

One layer's tensors may lie in different files; `Files` maps each file once.
"""

from weft.models.checkpoints.files import Files
from weft.models.checkpoints.readers import Reader, readers
from weft.models.checkpoints.scheme import Scheme, scheme

__all__ = ["Files", "Reader", "Scheme", "readers", "scheme"]
