"""Operations on weft's own kernels: weights in panels, and a decoder's operations as one program over its buffers."""
