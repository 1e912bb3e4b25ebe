"""The names of prefixes and the search for the longest cached one, worked out by hand."""

from __future__ import annotations

import hashlib
import struct

import pytest

from weft.core.prefix import DIGEST_BYTES, extend, first_block, longest_hit, root
from weft.types import GroupKind, GroupSpec, Span

ROOT = root(b"")


def names(tokens: list[int], spans: tuple[Span, ...] = (), size: int = 4, base: bytes = ROOT) -> list[bytes]:
    out: list[bytes] = []
    extend(out, base, tokens, spans, size, len(tokens))
    return out


def by_hand(parent: bytes, tokens: list[int], *items: tuple[bytes, int, int]) -> bytes:
    """items: (digest, rows of the item, where the block begins in it)."""
    data = struct.pack(f"<{len(tokens)}q", *tokens)
    for digest, rows, offset in items:
        data += struct.pack("<QQq", len(digest), rows, offset) + digest
    return hashlib.blake2b(parent + data, digest_size=32).digest()


# ---------------------------------------------------------------------------------------------- names


def test_roots_tell_salts_and_settings_apart() -> None:
    roots = [root(b""), root(b"a"), root(b"b"), root(b"", b"a"), root(b"ab", b"c"), root(b"a", b"bc")]
    assert len(set(roots)) == len(roots)
    assert {len(r) for r in roots} == {DIGEST_BYTES}
    assert root(b"a") == roots[1]


def test_names_are_a_hash_chain_over_full_blocks() -> None:
    tokens = list(range(10, 20))
    chain = names(tokens)
    first = by_hand(ROOT, tokens[:4])
    assert chain == [first, by_hand(first, tokens[4:8])]  # the last two tokens fill no block


def test_a_chain_is_the_same_in_one_go_and_in_several() -> None:
    tokens = list(range(16))
    spans = (Span(3, 9, b"film"),)
    out: list[bytes] = []
    counts = []
    for upto in (0, 3, 4, 9, 15, 16, 16):
        extend(out, ROOT, tokens, spans, 4, upto)
        counts.append(len(out))
    assert counts == [0, 0, 1, 2, 3, 4, 4]
    assert out == names(tokens, spans)


@pytest.mark.parametrize(("at", "same"), [(0, 0), (3, 0), (4, 1), (11, 2), (12, 3)])
def test_a_token_changes_its_block_and_all_that_follow(at: int, same: int) -> None:
    tokens = list(range(13))
    other = list(tokens)
    other[at] = 99
    a, b = names(tokens), names(other)
    assert [x == y for x, y in zip(a, b, strict=True)] == [i < same for i in range(3)]


def test_salt_and_block_size_change_every_name() -> None:
    tokens = list(range(8))
    chains = [names(tokens), names(tokens, base=root(b"tenant")), names(tokens, size=2), names(tokens, size=8)]
    everything = [n for chain in chains for n in chain]
    assert len(set(everything)) == len(everything) == 2 + 2 + 4 + 1


def test_an_item_enters_every_block_that_it_overlaps_and_no_other() -> None:
    tokens = [1, 2, -1, -1, -1, -1, 7, 8, 9, 10, 11, 12]
    chain = names(tokens, (Span(2, 6, b"image"),))
    first = by_hand(ROOT, tokens[:4], (b"image", 4, -2))
    second = by_hand(first, tokens[4:8], (b"image", 4, 2))
    assert chain == [first, second, by_hand(second, tokens[8:])]
    ends = [1, 2, -1, -1, 5, 6, 7, 8]
    first = by_hand(ROOT, ends[:4], (b"image", 2, -2))
    assert names(ends, (Span(2, 4, b"image"),)) == [first, by_hand(first, ends[4:])]
    begins = [1, 2, 3, 4, -1, -1, 7, 8]
    assert names(begins, (Span(4, 6, b"image"),))[0] == names(begins)[0]


def test_several_items_in_one_block_all_count() -> None:
    tokens = [-1] * 4
    spans = (Span(0, 1, b"a"), Span(1, 3, b"b"), Span(3, 4, b"c"))
    assert names(tokens, spans) == [by_hand(ROOT, tokens, (b"a", 1, 0), (b"b", 2, -1), (b"c", 1, -3))]
    later = names([5] * 8 + tokens, tuple(Span(s.start + 8, s.stop + 8, s.digest) for s in spans))
    assert later[2] == by_hand(later[1], tokens, (b"a", 1, 0), (b"b", 2, -1), (b"c", 1, -3))


def test_contents_rows_and_borders_of_items_tell_prefixes_apart() -> None:
    ways = [
        (Span(0, 4, b"a"),),
        (Span(0, 4, b"b"),),
        (Span(0, 2, b"a"), Span(2, 4, b"a")),
        (Span(0, 1, b"a"), Span(1, 4, b"a")),
        (Span(0, 2, b"a"), Span(2, 4, b"b")),
        (Span(0, 2, b"b"), Span(2, 4, b"a")),
        (Span(0, 8, b"a"),),
    ]
    found = {names([-1] * 4, spans)[0] for spans in ways}
    assert len(found) == len(ways)


# ---------------------------------------------------------------------------------------------- hits


def group(size: int, window: int | None = None) -> GroupSpec:
    kind = GroupKind.FULL if window is None else GroupKind.WINDOW
    return GroupSpec(name="g", kind=kind, layers=(0,), entry_bytes=1, block_tokens=size, window=window)


def hit(cap: int, tokens: int, *parts: tuple[GroupSpec, set[int]]) -> tuple[int, dict[int, list[int]]]:
    """parts: a group and which of its blocks are cached.  Block b of group g has id 100 g + b."""
    sizes = {spec.block_tokens for spec, _ in parts}
    chains = {size: [b"%d/%d" % (size, b) for b in range(tokens // size)] for size in sizes}
    cached = {(g, chains[spec.block_tokens][b]): 100 * g + b for g, (spec, blocks) in enumerate(parts) for b in blocks}
    specs = [(g, spec) for g, (spec, _) in enumerate(parts)]
    return longest_hit(specs, chains, lambda g, name: cached.get((g, name)), cap)


@pytest.mark.parametrize(
    ("cap", "cached", "want"),
    [
        (12, {0, 1, 2}, (12, {0: [0, 1, 2]})),
        (11, {0, 1, 2}, (8, {0: [0, 1]})),  # whole blocks only
        (12, {0, 1}, (8, {0: [0, 1]})),
        (12, {0, 2}, (4, {0: [0]})),  # a full group needs everything before
        (12, {1, 2}, (0, {})),
        (3, {0, 1, 2}, (0, {})),
        (0, {0, 1, 2}, (0, {})),
        (99, {0, 1, 2}, (12, {0: [0, 1, 2]})),
    ],
)
def test_a_full_group_hits_from_the_start(cap: int, cached: set[int], want: tuple[int, dict[int, list[int]]]) -> None:
    assert hit(cap, 13, (group(4), cached)) == want


def test_the_first_block_that_a_window_sees() -> None:
    # The query at position `length` sees length - window + 1 to length.
    assert [first_block(group(2, window=4), n) for n in (0, 3, 4, 5, 6, 8, 10)] == [0, 0, 0, 1, 1, 2, 3]
    assert first_block(group(2, window=1), 10) == 5
    assert first_block(group(2), 1000) == 0


@pytest.mark.parametrize(
    ("cap", "cached", "want"),
    [
        (10, {0, 1, 2, 3, 4}, (10, {0: [3, 4]})),  # position 10 sees 7, 8, 9: blocks 3 and 4
        (10, {3, 4}, (10, {0: [3, 4]})),
        (10, {4}, (0, {})),
        (10, {2, 3}, (8, {0: [2, 3]})),  # position 8 sees 5, 6, 7
        (9, {2, 3, 4}, (8, {0: [2, 3]})),
        (10, {1, 2, 4}, (6, {0: [1, 2]})),
        (10, {0, 1, 3}, (4, {0: [0, 1]})),
        (10, {0, 2, 4}, (2, {0: [0]})),
        (10, {1, 4}, (0, {})),
        (10, set(), (0, {})),
    ],
)
def test_a_window_group_hits_where_its_window_is_whole(
    cap: int, cached: set[int], want: tuple[int, dict[int, list[int]]]
) -> None:
    assert hit(cap, 10, (group(2, window=4), cached)) == want


def test_a_hit_is_what_every_group_can_serve() -> None:
    full, window = group(4), group(2, window=4)
    assert hit(11, 11, (full, {0, 1}), (window, {2, 3, 4})) == (8, {0: [0, 1], 1: [102, 103]})
    # The window's blocks at 8 are gone, at 4 they are there.
    assert hit(11, 11, (full, {0, 1}), (window, {0, 1, 3, 4})) == (4, {0: [0], 1: [100, 101]})
    assert hit(11, 11, (full, {0, 1}), (window, {3, 4})) == (0, {})
    assert hit(11, 11, (full, set()), (window, {0, 1, 2, 3, 4})) == (0, {})


def test_unlike_block_sizes_cut_each_other_down_until_both_agree() -> None:
    # 3s reach 9, the 2s then 8, the 3s then 6, which the 2s have as well.
    assert hit(10, 10, (group(3), {0, 1, 2}), (group(2), {0, 1, 2, 3, 4})) == (6, {0: [0, 1], 1: [100, 101, 102]})


def test_no_group_no_hit() -> None:
    assert longest_hit([], {}, lambda g, name: 1, 100) == (0, {})
