"""The block pool by hand: every state of a block, every way from one to the next, and every broken book that `check` finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weft.core.pool import BlockPool
from weft.errors import CapacityError, InvariantError
from weft.kv.evict.lru import LRU

OWNER = 7


def make(blocks: int = 4) -> BlockPool:
    return BlockPool(blocks, LRU())


def books(p: BlockPool) -> dict[str, int]:
    """Blocks in each state.  Nothing is reserved."""
    return {"free": p.available - p.cached, "held": p.referenced, "cached": p.cached, "limbo": p.limbo}


def cache(p: BlockPool, *names: bytes) -> list[int]:
    """A cached block for each name, let go in that order."""
    blocks = p.take(OWNER, len(names))
    for b, name in zip(blocks, names, strict=True):
        assert p.publish(b, (0, name))
        p.drop([b])
    return blocks


# ---------------------------------------------------------------------------------------------- free and held


def test_a_block_is_free_then_held_then_free() -> None:
    p = make()
    assert books(p) == {"free": 4, "held": 0, "cached": 0, "limbo": 0}
    a, b = p.take(OWNER, 2)
    assert a != b
    assert books(p) == {"free": 2, "held": 2, "cached": 0, "limbo": 0}
    p.hold(a)
    p.drop([a, b])
    assert books(p) == {"free": 3, "held": 1, "cached": 0, "limbo": 0}
    p.check([[a]])
    p.drop([a])
    assert books(p) == {"free": 4, "held": 0, "cached": 0, "limbo": 0}
    assert sorted(p.take(OWNER, 4)) == [0, 1, 2, 3]


def test_a_free_block_is_neither_held_nor_dropped() -> None:
    p = make()
    (a,) = p.take(OWNER, 1)
    p.drop([a])
    with pytest.raises(InvariantError, match=f"block {a} is dropped more often"):
        p.drop([a])
    with pytest.raises(InvariantError, match=f"block {a} is free"):
        p.hold(a)
    p.check([])


def test_taking_too_much_changes_nothing_and_names_the_numbers() -> None:
    p = make()
    p.take(OWNER, 3)
    with pytest.raises(CapacityError, match="2 KV blocks wanted, 1 available of 4"):
        p.take(OWNER, 2)
    assert books(p) == {"free": 1, "held": 3, "cached": 0, "limbo": 0}
    with pytest.raises(CapacityError, match="at least 1 block, got 0"):
        make(0)


# ---------------------------------------------------------------------------------------------- cached


def test_a_published_block_is_cached_when_let_go_and_a_hit_revives_it() -> None:
    p = make()
    (a,) = cache(p, b"a")
    assert books(p) == {"free": 3, "held": 0, "cached": 1, "limbo": 0}
    assert p.lookup(0, b"a") == a
    assert p.lookup(1, b"a") is None  # another group's name
    p.hold(a)
    assert books(p) == {"free": 3, "held": 1, "cached": 0, "limbo": 0}
    p.check([[a]])
    p.hold(a)
    p.drop([a])
    assert p.cached == 0  # somebody holds it still
    p.drop([a])
    assert p.cached == 1
    p.check([])


def test_free_blocks_go_before_cached_ones_and_those_least_recently_used_first() -> None:
    p = make(5)
    a, b, c = p.take(OWNER, 3)
    for block, name in ((a, b"a"), (b, b"b"), (c, b"c")):
        p.publish(block, (0, name))
    p.drop([b])
    p.drop([a])
    p.drop([c])
    p.hold(b)  # used once more, so it is now the newest
    p.drop([b])
    assert set(p.take(OWNER, 2)).isdisjoint({a, b, c})
    assert p.evictions == 0
    assert [p.take(OWNER, 1) for _ in range(3)] == [[a], [c], [b]]
    assert p.evictions == 3
    assert [p.lookup(0, n) for n in (b"a", b"b", b"c")] == [None, None, None]
    p.check([[0, 1, 2, 3, 4]])


def test_an_evicted_block_bears_no_name_and_can_be_published_anew() -> None:
    p = make(1)
    cache(p, b"old")
    (a,) = p.take(OWNER, 1)
    assert p.publish(a, (0, b"new"))
    assert (p.lookup(0, b"old"), p.lookup(0, b"new")) == (None, a)
    p.check([[a]])


def test_twins_the_first_keeps_the_name_and_the_second_stays_private() -> None:
    p = make()
    a, b = p.take(OWNER, 2)
    assert p.publish(a, (0, b"x"))
    assert p.publish(a, (0, b"x"))  # saying it again is no harm
    assert not p.publish(b, (0, b"x"))
    assert p.publish(b, (1, b"x"))  # in another group the name is free
    assert not p.publish(b, (0, b"y"))  # one block, one name
    assert (p.lookup(0, b"x"), p.lookup(1, b"x"), p.lookup(0, b"y")) == (a, b, None)
    (c,) = p.take(OWNER, 1)
    assert not p.publish(c, (0, b"x"))
    p.drop([a, b, c])
    assert books(p) == {"free": 2, "held": 0, "cached": 2, "limbo": 0}
    p.check([])


def test_unpublish_takes_a_held_block_out_of_the_index() -> None:
    p = make()
    (a,) = p.take(OWNER, 1)
    with pytest.raises(InvariantError, match="not held, or not in the index"):
        p.unpublish(a)
    p.publish(a, (0, b"a"))
    p.unpublish(a)
    assert p.lookup(0, b"a") is None
    p.check([[a]])
    p.drop([a])
    assert books(p)["free"] == 4
    (b,) = cache(p, b"b")
    with pytest.raises(InvariantError, match="not held"):
        p.unpublish(b)


def test_clear_cache_forgets_what_nobody_holds() -> None:
    p = make(5)
    cache(p, b"a", b"b")
    (c,) = p.take(OWNER, 1)
    p.publish(c, (0, b"c"))
    assert p.clear_cache() == 2
    assert books(p) == {"free": 4, "held": 1, "cached": 0, "limbo": 0}
    assert [p.lookup(0, n) for n in (b"a", b"b", b"c")] == [None, None, c]
    p.check([[c]])


# ---------------------------------------------------------------------------------------------- the policy


class Told:
    """An eviction policy that writes down what it is told; ranks are set from outside."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, float]] = []
        self.ranks: dict[int, float] = {}

    def observe(self, block: int, event: str, now: float) -> None:
        self.seen.append((block, event, now))

    def rank(self, block: int, now: float) -> float:
        return self.ranks.get(block, 0.0)


def test_the_policy_hears_of_every_event_with_the_time() -> None:
    told = Told()
    p = BlockPool(1, told)
    (a,) = cache(p, b"a")
    p.now = 1.0
    p.hold(a)
    p.drop([a])
    p.now = 2.0
    p.take(OWNER, 1)
    assert told.seen == [
        (a, "publish", 0.0), (a, "release", 0.0), (a, "hit", 1.0), (a, "release", 1.0), (a, "evict", 2.0),
    ]  # fmt: skip


def test_blocks_go_by_rank_also_when_a_rank_has_grown_meanwhile() -> None:
    told = Told()
    p = BlockPool(3, told)
    told.ranks = {0: 1.0, 1: 2.0, 2: 3.0}
    a, b, c = cache(p, b"a", b"b", b"c")
    assert [a, b, c] == [0, 1, 2]
    told.ranks[a] = 2.5
    assert [p.take(OWNER, 1)[0] for _ in range(3)] == [b, a, c]


# ---------------------------------------------------------------------------------------------- reservation


def test_a_reservation_binds_others_and_its_owner_spends_it() -> None:
    p = make(5)
    cache(p, b"a", b"b")
    assert p.available == 5  # cached blocks can be had
    assert p.reserve(1, 3)
    assert (p.available, p.reserved(1), p.reserved(2)) == (2, 3, 0)
    assert p.can_take(2, 2)
    assert not p.can_take(2, 3)
    assert p.can_take(1, 5)
    assert not p.can_take(1, 6)
    with pytest.raises(CapacityError):
        p.take(2, 3)
    mine = p.take(1, 2)
    assert (p.available, p.reserved(1)) == (2, 1)
    mine += p.take(1, 2)  # one reserved, one of the common ones
    assert (p.available, p.reserved(1)) == (1, 0)
    p.check([mine])


def test_reserving_replaces_and_refuses_without_a_trace() -> None:
    p = make(4)
    assert p.reserve(1, 2)
    assert p.reserve(1, 4)
    assert p.available == 0
    assert not p.reserve(2, 1)
    assert p.reserved(2) == 0
    assert p.reserve(1, 1)
    assert p.available == 3
    assert not p.reserve(1, 5)
    assert (p.reserved(1), p.available) == (1, 3)
    assert p.reserve(1, 0)
    assert p.available == 4
    p.check([])


# ---------------------------------------------------------------------------------------------- plans in flight


def test_a_block_let_go_under_a_plan_rests_until_that_plan_commits() -> None:
    p = make()
    a, b = p.take(OWNER, 2)
    p.publish(b, (0, b"b"))
    p.submitted(1)
    p.drop([a, b])
    assert books(p) == {"free": 2, "held": 0, "cached": 0, "limbo": 2}
    assert not p.can_take(OWNER, 3)
    p.check([])
    p.committed(1)
    assert books(p) == {"free": 3, "held": 0, "cached": 1, "limbo": 0}
    p.check([])


def test_the_newest_plan_in_flight_decides() -> None:
    p = make()
    a, b = p.take(OWNER, 2)
    p.submitted(1)
    p.drop([a])
    p.submitted(2)
    p.drop([b])
    p.committed(1)
    assert books(p) == {"free": 3, "held": 0, "cached": 0, "limbo": 1}
    assert b not in p.take(OWNER, 3)
    p.committed(2)
    assert p.take(OWNER, 1) == [b]


def test_a_resting_block_is_still_found_and_a_hit_takes_it_out_of_limbo() -> None:
    p = make()
    (a,) = p.take(OWNER, 1)
    p.publish(a, (0, b"a"))
    p.submitted(1)
    p.drop([a])
    assert p.lookup(0, b"a") == a
    p.hold(a)
    assert books(p) == {"free": 3, "held": 1, "cached": 0, "limbo": 0}
    p.committed(1)
    assert books(p) == {"free": 3, "held": 1, "cached": 0, "limbo": 0}
    p.check([[a]])


def test_a_block_revived_and_let_go_again_waits_for_the_later_plan() -> None:
    p = make()
    (a,) = p.take(OWNER, 1)
    p.publish(a, (0, b"a"))
    p.submitted(1)
    p.drop([a])
    p.submitted(2)
    p.hold(a)
    p.drop([a])
    p.committed(1)
    assert books(p) == {"free": 3, "held": 0, "cached": 0, "limbo": 1}
    p.committed(2)
    assert books(p) == {"free": 3, "held": 0, "cached": 1, "limbo": 0}
    p.check([])


def test_twice_into_one_limbo_comes_out_once() -> None:
    p = make(2)
    (a,) = p.take(OWNER, 1)
    p.submitted(1)
    p.drop([a])
    p.hold(a)
    p.drop([a])
    p.committed(1)
    p.check([])
    assert books(p)["free"] == 2


def test_plans_commit_in_order() -> None:
    p = make()
    p.submitted(1)
    p.submitted(2)
    with pytest.raises(InvariantError, match=r"step 2 commits out of order; in flight: \[1, 2\]"):
        p.committed(2)
    p.committed(1)
    p.committed(2)
    with pytest.raises(InvariantError):
        p.committed(2)


# ---------------------------------------------------------------------------------------------- the proof

HELD, CACHED, FREE = 0, 1, 2


def one_of_each() -> BlockPool:
    """Block 0 held, 1 cached, 2 free, 3 in limbo."""
    p = make()
    blocks = p.take(OWNER, 4)
    assert blocks == [0, 1, 2, 3]
    p.publish(CACHED, (0, b"c"))
    p.drop([CACHED])
    p.drop([FREE])
    p.submitted(1)
    p.drop([3])
    return p


BROKEN: dict[str, tuple[Callable[[BlockPool], object], str]] = {
    "one reference too many": (lambda p: p.refs.__setitem__(HELD, 2), "block 0 has 2 references, but 1 tables"),
    "a reference lost": (lambda p: p.refs.__setitem__(HELD, 0), "block 0 has 0 references, but 1 tables"),
    "twice free": (lambda p: p._free.append(FREE), "twice in the free list"),
    "cached uncounted": (lambda p: setattr(p, "_cached", 2), "1 blocks are cached, the count says 2"),
    "free and held": (lambda p: p._free.append(HELD), "block 0 is in 2 places"),
    "free and cached": (lambda p: p._free.append(CACHED), "block 1 is in 2 places"),
    "nowhere": (lambda p: p._free.remove(FREE), "block 2 is in 0 places"),
    "limbo and held": (lambda p: p._in_limbo.__setitem__(HELD, 1), "block 0 is in 2 places"),
    "free and named": (lambda p: p.keys.__setitem__(FREE, (0, b"f")), "block 2 is free but still named"),
    "a name astray": (lambda p: p.index.__setitem__((0, b"c"), HELD), "the index names block 0"),
    "reservations uncounted": (lambda p: setattr(p, "_reserved_total", 1), r"reservations \(1\)"),
    "reserved beyond the pool": (lambda p: (p._reserved.update({1: 9}), p.__dict__.update(_reserved_total=9)), r"\(9\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_check_finds(fault: str) -> None:
    p = one_of_each()
    assert books(p) == {"free": 1, "held": 1, "cached": 1, "limbo": 1}
    p.check([[HELD]])
    corrupt, text = BROKEN[fault]
    corrupt(p)
    with pytest.raises(InvariantError, match=text):
        p.check([[HELD]])


def test_check_finds_a_name_that_the_index_lost_and_a_limbo_that_nothing_ends() -> None:
    pool = BlockPool(2, LRU())
    (block,) = pool.take(1, 1)
    pool.publish(block, (0, b"a"))
    del pool.index[0, b"a"]
    with pytest.raises(InvariantError, match="name"):
        pool.check([[block]])
    pool = BlockPool(2, LRU())
    (block,) = pool.take(1, 1)
    pool.submitted(1)
    pool.drop([block])
    pool.check([])
    pool._limbo.clear()
    with pytest.raises(InvariantError, match="limbo"):
        pool.check([])
