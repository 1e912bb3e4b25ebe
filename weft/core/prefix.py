"""The hash chain that names a prefix, and the search for the longest cached one.

A block's name is BLAKE2b-256 over (parent's name, the items in it); the root is the hash of the salt, so two tenants, two
adapters or two settings that change KV values never meet under one name.  Vector and media items enter by their content
hash in every block that they overlap.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence

from weft.types import GroupKind, GroupSpec, Span

DIGEST_BYTES = 32


def root(salt: bytes, settings: bytes = b"") -> bytes:
    """Name of the empty prefix.  settings: every technique setting that changes KV values, in canonical form."""
    h = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"weft.prefix")
    h.update(len(salt).to_bytes(8, "little") + salt + settings)
    return h.digest()


def extend(
    names: list[bytes], base: bytes, tokens: Sequence[int], spans: Sequence[Span], block_tokens: int, upto: int
) -> None:
    """Append to `names` the names of the full blocks of tokens[:upto] that it lacks.

    names[i] is the name of tokens[: (i + 1) * block_tokens].
    """
    if not spans:
        first, size = len(names) * block_tokens, 8 * block_tokens
        data = array("q", tokens[first : upto // block_tokens * block_tokens]).tobytes()
        name, hashed, append = names[-1] if names else base, hashlib.blake2b, names.append
        for at in range(0, len(data), size):
            name = hashed(name + data[at : at + size], digest_size=DIGEST_BYTES).digest()
            append(name)
        return
    starts = [s.start for s in spans]
    while (len(names) + 1) * block_tokens <= upto:
        a = len(names) * block_tokens
        h = hashlib.blake2b(names[-1] if names else base, digest_size=DIGEST_BYTES)
        h.update(array("q", tokens[a : a + block_tokens]).tobytes())
        for s in spans[max(0, bisect_right(starts, a) - 1) :]:
            if s.start >= a + block_tokens:
                break
            if s.stop > a:
                # Where the block cuts the item matters, not where the item stands in the prompt; and its rows, since one
                # source may be encoded into more or fewer of them.
                for n in (len(s.digest), s.stop - s.start, a - s.start):
                    h.update(n.to_bytes(8, "little", signed=True))
                h.update(s.digest)
        names.append(h.digest())


Lookup = Callable[[int, bytes], int | None]


def longest_hit(
    groups: Sequence[tuple[int, GroupSpec]], names: dict[int, list[bytes]], lookup: Lookup, cap: int
) -> tuple[int, dict[int, list[int]]]:
    """The longest prefix that every group can serve.

    groups: (index, spec) of one model's groups that take part.  names: chain per block_tokens.  lookup(group, name) gives a
    block id or None.  cap: tokens that may be hit at most.  Returns (tokens, {group: block ids of the table}); a window group's
    table begins at the first block that the window still needs.
    """
    if not groups or cap <= 0:
        return 0, {}
    length = cap
    while length > 0:
        before = length
        for index, spec in groups:
            chain = names[spec.block_tokens]
            if spec.kind is GroupKind.WINDOW:
                length = _window_hit(index, spec, chain, lookup, length)
            else:
                length = _full_hit(index, spec, chain, lookup, length)
            if length == 0:
                return 0, {}
        if length == before:
            break
    tables: dict[int, list[int]] = {}
    for index, spec in groups:
        first = first_block(spec, length)
        found = [lookup(index, names[spec.block_tokens][b]) for b in range(first, length // spec.block_tokens)]
        tables[index] = [b for b in found if b is not None]
    return length, tables


def first_block(spec: GroupSpec, length: int) -> int:
    """Index of the first block that a query at position `length` can still see in this group."""
    if spec.window is None:
        return 0
    return max(0, length - spec.window + 1) // spec.block_tokens


def _full_hit(index: int, spec: GroupSpec, chain: list[bytes], lookup: Lookup, cap: int) -> int:
    most = min(cap // spec.block_tokens, len(chain))
    n = 0
    while n < most and lookup(index, chain[n]) is not None:
        n += 1
    return n * spec.block_tokens


def _window_hit(index: int, spec: GroupSpec, chain: list[bytes], lookup: Lookup, cap: int) -> int:
    """Walk down from the cap: the hit may end where all blocks that its window reaches are there."""
    end = min(cap // spec.block_tokens, len(chain))
    run_stop = end
    b = end - 1
    while b >= 0:
        if run_stop > 0 and b < first_block(spec, run_stop * spec.block_tokens):
            break
        if lookup(index, chain[b]) is None:
            run_stop = b
        b -= 1
    return run_stop * spec.block_tokens
