"""The noise of a request: a counter-based function of (seed, output index, token id), and nothing else.

A token is the winner of a race: argmax over ids of  logit / temperature + gumbel(seed, index, id)  is a draw from the softmax
(Gumbel 1954; Maddison et al., arXiv:1411.0030).  Because the noise does not depend on the batch, the draft or the step, the same
seed gives the same token whenever the law is the same.

The hash is the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over a counter, in wrapping 64-bit arithmetic, so
that any language computes the same 32 bits; `exec.sampler` does the same over whole rows and a test compares the two.
"""

from __future__ import annotations

import math

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
TOKEN_STEP = 0xD1342543DE82EF95
MULTIPLY_1 = 0xBF58476D1CE4E5B9
MULTIPLY_2 = 0x94D049BB133111EB


def mix(x: int) -> int:
    """SplitMix64's finalizer: 64 bits to 64 bits, a bijection."""
    x &= MASK
    x = ((x ^ (x >> 30)) * MULTIPLY_1) & MASK
    x = ((x ^ (x >> 27)) * MULTIPLY_2) & MASK
    return x ^ (x >> 31)


def child_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a request; the first sequence keeps the request's own."""
    return seed & MASK if index == 0 else mix((seed & MASK) ^ mix(index * GOLDEN))


def side_seed(seed: int, salt: int) -> int:
    """A seed for other noise of the same sequence (a draft's, an acceptance's): none that a sequence of a request could have."""
    return child_seed(seed, (1 << 32) + salt)


def row_key(seed: int, index: int) -> int:
    """64-bit key of the noise of output `index` (0 is the first token) under `seed`."""
    return mix((seed & MASK) + mix((index + 1) * GOLDEN))


def uniform(seed: int, index: int, token: int) -> float:
    """Uniform in (0, 1), 32 bits, never 0 or 1."""
    bits = mix(row_key(seed, index) + (token + 1) * TOKEN_STEP) >> 32
    return (bits + 0.5) * 2.0**-32


def gumbel(seed: int, index: int, token: int) -> float:
    """Standard Gumbel noise of one token.  The winner has the smallest exponential, so small values keep full precision."""
    return -math.log(-math.log1p(-uniform(seed, index, token)))
