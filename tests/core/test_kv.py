"""Block tables by hand: hits, growth, sliding, copies on write, forks, truncation, publication, compression."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from weft.config import build_stack
from weft.core.kv import KV
from weft.core.pool import BlockPool
from weft.core.request import Request, State
from weft.errors import InvariantError
from weft.kv.evict.lru import LRU
from weft.types import GroupKind, GroupSpec, KVOp, KVOpKind, RequestSpec, SamplingSpec, TokenItem


def group(kind: GroupKind, size: int, window: int | None = None) -> GroupSpec:
    return GroupSpec(name=kind.value, kind=kind, layers=(0,), entry_bytes=1, block_tokens=size, window=window)


FULL, WINDOW, PARKED = group(GroupKind.FULL, 4), group(GroupKind.WINDOW, 2, 4), group(GroupKind.PARKED, 2)


def make(groups: Sequence[GroupSpec] = (FULL,), blocks: int = 16, *, share: bool = True) -> KV:
    return KV(groups, BlockPool(blocks, LRU()), share=share)


def request(
    kv: KV, rid: int, tokens: Sequence[int], *, salt: bytes = b"", prompt_logprobs: int = -1, history: int = 0
) -> Request:
    sampling = SamplingSpec(prompt_logprobs=prompt_logprobs)
    spec = RequestSpec(id=rid, items=(TokenItem(tuple(tokens)),), sampling=sampling, salt=salt)
    r = Request(rid, spec, build_stack(), index=0, seed=0, arrival=float(rid), models=1, groups=len(kv.groups))
    r.history = history
    r.state = State.RUNNING
    return r


def plan(kv: KV, r: Request, rows: int) -> tuple[int, list[KVOp]]:
    """Room for `rows` more, as a step would take it."""
    ops: list[KVOp] = []
    taken = kv.grow(r, 0, rows, ops)
    r.planned[0] += rows
    kv.submitted()
    return taken, ops


def commit(kv: KV, r: Request, rows: int, kept: dict[int, int] | None = None) -> None:
    r.computed[0] += rows
    kv.advance(r, 0, rows, kept or {})
    kv.publish(r, 0)


def compute(kv: KV, r: Request, rows: int) -> tuple[int, list[KVOp]]:
    done = plan(kv, r, rows)
    commit(kv, r, rows)
    return done


def shape(r: Request, g: int = 0) -> tuple[list[int], int, int]:
    t = r.tables[g]
    return t.blocks, t.first, t.count


# ---------------------------------------------------------------------------------------------- growth


def test_growth_takes_a_block_where_the_last_one_is_full() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    assert [kv.need(r, 0, n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    assert compute(kv, r, 5) == (2, [])
    assert shape(r) == ([0, 1], 0, 5)
    assert [kv.need(r, 0, n) for n in (1, 3, 4, 8)] == [0, 0, 1, 2]
    assert [kv.ready(r, 0, n) for n in (1, 3, 4)] == [True, True, False]
    assert compute(kv, r, 3) == (0, [])
    assert compute(kv, r, 1) == (1, [])
    assert kv.pool.referenced == 3
    kv.check([r])


def test_rows_in_flight_count_as_if_they_stood() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    plan(kv, r, 6)
    assert shape(r) == ([0, 1], 0, 0)
    assert [kv.need(r, 0, n) for n in (2, 3)] == [0, 1]
    assert plan(kv, r, 3) == (1, [])
    commit(kv, r, 6)
    commit(kv, r, 3)
    assert shape(r) == ([0, 1, 2], 0, 9)
    kv.check([r])


def test_every_group_grows_and_parked_rows_only_on_demand() -> None:
    kv = make([FULL, WINDOW, PARKED])
    r = request(kv, 1, range(20))
    assert kv.need(r, 0, 6) == 2 + 3
    assert kv.need(r, 0, 6, park=True) == 2 + 3 + 3
    ops: list[KVOp] = []
    assert kv.grow(r, 0, 6, ops, park=True) == 8
    assert [len(t.blocks) for t in r.tables] == [2, 3, 3]
    r.partial = (0, 6, 1)
    kv.check([r])
    r.partial = None
    with pytest.raises(InvariantError, match="parked hidden states of no rows"):
        kv.check([r])
    kv.unpark(r, 0)
    assert [len(t.blocks) for t in r.tables] == [2, 3, 0]
    assert kv.pool.referenced == 5
    kv.check([r])


def test_release_gives_everything_back_and_the_reservation() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    compute(kv, r, 9)
    kv.pool.reserve(r.rid, 3)
    kv.release(r)
    assert (r.computed, r.planned, shape(r), r.generation) == ([0], [0], ([], 0, 0), 1)
    assert (kv.pool.referenced, kv.pool.available, kv.pool.cached) == (0, 16, 2)
    r.state = State.WAITING
    kv.check([r])


def test_a_released_prefix_is_eaten_from_its_end() -> None:
    kv = make(blocks=3)
    r = request(kv, 1, range(20))
    compute(kv, r, 12)
    kv.release(r)
    kv.pool.take(9, 1)
    assert kv.match(request(kv, 2, range(20)))[0] == [8]


# ---------------------------------------------------------------------------------------------- hits


def test_full_blocks_of_committed_entries_are_hit_and_no_others() -> None:
    kv = make()
    a = request(kv, 1, range(20))
    plan(kv, a, 10)
    assert kv.match(request(kv, 2, range(20)))[0] == [0]  # planned is not computed
    commit(kv, a, 10)
    assert kv.match(request(kv, 2, range(20))) == ([8], [{0: [0, 1]}], 0)
    assert kv.match(request(kv, 3, [*range(6), 99, 7, 8]))[0] == [4]
    assert kv.match(request(kv, 4, [99, *range(1, 20)]))[0] == [0]
    assert kv.match(request(kv, 5, range(20), salt=b"other"))[0] == [0]
    kv.release(a)
    assert kv.match(request(kv, 6, range(20)))[2] == 2  # idle ones have to be paid for


def test_the_last_row_is_computed_for_its_logits() -> None:
    kv = make()
    compute(kv, request(kv, 1, range(20)), 8)
    assert kv.match(request(kv, 2, range(9)))[0] == [8]
    assert kv.match(request(kv, 3, range(8)))[0] == [4]


def test_what_caps_a_hit() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    assert kv.hit_cap(r) == 19
    r.cut = lambda prompt, at: 13
    assert kv.hit_cap(r) == 12
    r.cut = lambda prompt, at: None
    assert kv.hit_cap(r) == 19
    r.publishes = False
    assert kv.hit_cap(r) == 0
    assert make(share=False).hit_cap(request(kv, 2, range(20))) == 0
    assert kv.hit_cap(request(kv, 3, range(20), history=5)) == 15
    assert kv.hit_cap(request(kv, 4, range(20), history=30)) == 0
    read = request(kv, 6, range(20), history=5)
    read.cut = lambda prompt, position: 13
    assert kv.hit_cap(read) == 8, "what is read before a cut within the prompt is computed"
    read.cut = lambda prompt, position: 25
    assert kv.hit_cap(read) == 15, "before a later one it is the prompt's end that counts"
    wants = request(kv, 5, range(20), prompt_logprobs=0)
    assert kv.hit_cap(wants) == 0
    wants.reported = 7
    assert kv.hit_cap(wants) == 7
    wants.reported = 19  # all that there are
    assert kv.hit_cap(wants) == 19


def test_nothing_is_shared_where_sharing_is_off() -> None:
    kv = make(share=False)
    a = request(kv, 1, range(20))
    compute(kv, a, 8)
    assert kv.match(request(kv, 2, range(20))) == ([0], [{}], 0)
    kv.release(a)
    assert kv.pool.cached == 0


def test_adopted_blocks_are_held_once_more() -> None:
    kv = make([FULL, WINDOW])
    a = request(kv, 1, range(20))
    compute(kv, a, 10)
    b = request(kv, 2, range(20))
    lengths, tables, idle = kv.match(b)
    assert (lengths, idle) == ([8], 0)
    kv.hold(tables)
    kv.adopt(b, lengths, tables, [])
    # At position 8 the window sees 5, 6, 7: blocks 2 and 3.
    assert shape(b, 0) == (a.tables[0].blocks[:2], 0, 8)
    assert shape(b, 1) == (a.tables[1].blocks[2:4], 4, 4)
    assert [t.published for t in b.tables] == [2, 4]
    assert [t.dirty for t in b.tables] == [0, 0]
    assert (b.computed, b.planned) == ([8], [8])
    kv.check([a, b])
    assert compute(kv, b, 1) == (2, [])  # new blocks: 8 ends one in both groups
    kv.check([a, b])
    kv.release(a)
    kv.check([b])
    assert kv.pool.referenced == 3 + 3


def test_twins_keep_their_own_blocks_and_the_index_the_first() -> None:
    kv = make()
    a, b = request(kv, 1, range(20)), request(kv, 2, range(20))
    compute(kv, a, 8)
    compute(kv, b, 8)
    assert kv.pool.referenced == 4
    assert kv.match(request(kv, 3, range(20)))[1] == [{0: a.tables[0].blocks}]
    kv.release(b)
    assert kv.pool.cached == 0
    kv.release(a)
    assert kv.pool.cached == 2


# ---------------------------------------------------------------------------------------------- windows


def test_a_window_slides_in_whole_blocks() -> None:
    kv = make([FULL, WINDOW])
    r = request(kv, 1, range(20))
    compute(kv, r, 10)
    window = list(r.tables[1].blocks)
    kv.slide(r, 0, 4)  # position 4 sees 1, 2, 3: block 0 is still in use
    assert shape(r, 1) == (window, 0, 10)
    kv.slide(r, 0, 10)  # sees 7, 8, 9
    assert shape(r, 1) == (window[3:], 6, 4)
    assert r.tables[1].dirty == 0
    assert shape(r, 0)[1:] == (0, 10)
    assert kv.pool.referenced == 3 + 2
    kv.check([r])
    kv.slide(r, 0, 10)
    assert shape(r, 1) == (window[3:], 6, 4)
    assert compute(kv, r, 3) == (1 + 2, [])
    assert shape(r, 1)[1:] == (6, 7)
    kv.check([r])


def test_slid_blocks_were_published_and_can_be_hit() -> None:
    kv = make([WINDOW])
    r = request(kv, 1, range(20))
    compute(kv, r, 6)
    kv.slide(r, 0, 6)
    assert kv.pool.cached == 1
    assert kv.match(request(kv, 2, range(3)))[0] == [2]
    assert compute(kv, r, 4) == (2, [])
    assert kv.match(request(kv, 2, range(11)))[1] == [{0: r.tables[0].blocks[-2:]}]


# ---------------------------------------------------------------------------------------------- copies on write


def fork(kv: KV, parent: Request, rid: int) -> Request:
    child = request(kv, rid, parent.context)
    assert kv.fork(parent, child)
    return child


def test_a_fork_shares_and_the_first_who_writes_copies() -> None:
    kv = make()
    a = request(kv, 1, range(7))
    compute(kv, a, 6)
    b = fork(kv, a, 2)
    assert shape(b) == ([0, 1], 0, 6)
    assert kv.pool.refs[:2] == [2, 2]
    assert not kv.ready(b, 0, 1)
    assert kv.need(b, 0, 1) == 1
    assert kv.need(b, 0, 3) == 2
    ops: list[KVOp] = []
    assert kv.grow(b, 0, 1, ops) == 1
    assert ops == [KVOp(KVOpKind.COPY, 0, (1,), (2,))]
    assert b.tables[0].blocks == [0, 2]
    assert kv.pool.refs[:3] == [2, 2, 1]  # the source is held until the plan is made
    assert kv.need(a, 0, 1) == 0  # and by nobody whose sharing would count
    kv.submitted()
    assert kv.pool.refs[:3] == [2, 1, 1]
    b.planned[0] += 1
    commit(kv, b, 1)
    assert compute(kv, a, 1) == (0, [])
    kv.check([a, b])


def test_both_sides_of_a_fork_in_one_plan_copy_once() -> None:
    kv = make()
    a = request(kv, 1, range(7))
    compute(kv, a, 6)
    b = fork(kv, a, 2)
    ops: list[KVOp] = []
    assert kv.grow(a, 0, 1, ops) + kv.grow(b, 0, 1, ops) == 1
    assert ops == [KVOp(KVOpKind.COPY, 0, (1,), (2,))]
    assert (a.tables[0].blocks, b.tables[0].blocks) == ([0, 2], [0, 1])


def test_a_full_last_block_is_shared_without_a_copy() -> None:
    kv = make()
    a = request(kv, 1, range(9))
    compute(kv, a, 8)
    b = fork(kv, a, 2)
    assert compute(kv, b, 1) == (1, [])
    assert b.tables[0].blocks == [0, 1, 2]
    kv.check([a, b])


def test_a_fork_gives_up_the_last_row_whose_logits_it_needs() -> None:
    kv = make()
    a = request(kv, 1, range(5))
    compute(kv, a, 5)
    b = fork(kv, a, 2)
    assert (b.computed, b.planned) == ([4], [4])
    assert shape(b) == ([0], 0, 4)
    assert b.tables[0].published == 1
    kv.check([a, b])


def test_forks_that_the_parents_tables_cannot_serve_change_nothing() -> None:
    kv = make([FULL, WINDOW])
    a = request(kv, 1, range(13))
    compute(kv, a, 12)
    a.partial = (12, 13, 1)
    assert not kv.fork(a, request(kv, 2, range(13)))
    a.partial = None
    kv.slide(a, 0, 12)  # from 8 on
    assert not kv.fork(a, request(kv, 2, range(11)))  # its next query, 10, sees position 7
    assert kv.pool.refs.count(1) == kv.pool.referenced == 3 + 2
    child = fork(kv, a, 3)
    assert shape(child, 1) == (a.tables[1].blocks, 8, 4)
    kv.check([a, child])


def test_a_named_block_is_replaced_while_there_is_room_so_that_its_prefix_stays() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    compute(kv, r, 8)
    assert kv.truncate(r, 0, 6)
    r.computed = [6]
    r.planned = [6]
    assert (shape(r), r.tables[0].published) == (([0, 1], 0, 6), 1)
    assert not kv.ready(r, 0, 1)
    assert kv.need(r, 0, 1) == 0
    assert plan(kv, r, 1) == (1, [KVOp(KVOpKind.COPY, 0, (1,), (2,))])
    assert r.tables[0].blocks == [0, 2]
    assert kv.match(request(kv, 2, range(20))) == ([8], [{0: [0, 1]}], 1)
    commit(kv, r, 1)
    kv.check([r])


def test_without_room_the_named_block_leaves_the_index() -> None:
    kv = make(blocks=2)
    r = request(kv, 1, range(20))
    compute(kv, r, 8)
    assert kv.truncate(r, 0, 6)
    r.computed = [6]
    r.planned = [6]
    assert plan(kv, r, 1) == (0, [])
    assert r.tables[0].blocks == [0, 1]
    assert kv.match(request(kv, 2, range(20)))[0] == [4]
    kv.check([r])


# ---------------------------------------------------------------------------------------------- truncation


def test_truncation_gives_blocks_back_and_publishes_again_later() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    compute(kv, r, 11)
    r.tables[0].dirty = None
    assert kv.truncate(r, 0, 4)
    assert (shape(r), r.tables[0].published) == (([0], 0, 4), 1)
    assert [t.dirty for t in r.tables] == [1]
    assert (kv.pool.referenced, kv.pool.cached) == (1, 1)
    r.computed = [4]
    r.planned = [4]
    r.context[4:] = [90, 91, 92, 93, 94]
    r.names[4] = r.names[4][:1]
    compute(kv, r, 4)
    assert kv.match(request(kv, 2, [0, 1, 2, 3, 90, 91, 92, 93, 94]))[0] == [8]
    assert kv.match(request(kv, 3, range(20)))[0] == [8]  # the old continuation is still cached
    kv.check([r])


def test_a_slid_table_is_cut_only_where_the_window_is_still_there() -> None:
    kv = make([FULL, WINDOW])
    r = request(kv, 1, range(20))
    compute(kv, r, 12)
    kv.slide(r, 0, 12)  # from 8 on
    before = [shape(r, g) for g in (0, 1)]
    assert not kv.truncate(r, 0, 10)  # position 10 would see 7
    assert [shape(r, g) for g in (0, 1)] == before
    assert kv.truncate(r, 0, 11)
    assert [shape(r, g)[1:] for g in (0, 1)] == [(0, 11), (8, 3)]


# ---------------------------------------------------------------------------------------------- compression


def test_entries_that_were_dropped_end_publication() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    compute(kv, r, 4)
    plan(kv, r, 8)
    commit(kv, r, 8, {0: 3})
    t = r.tables[0]
    assert (shape(r), t.compressed, r.publishes) == (([0], 0, 3), True, False)
    assert kv.match(request(kv, 2, range(20)))[0] == [4]  # what was published before it stays so
    assert kv.hit_cap(r) == 0
    kv.check([r])
    # Position 12 is entry 3.  Its block bears a name, so it is copied.
    assert compute(kv, r, 2) == (2, [KVOp(KVOpKind.COPY, 0, (0,), (t.blocks[0],))])
    assert (shape(r)[1:], r.computed) == ((0, 5), [14])
    assert not kv.truncate(r, 0, 13)
    kv.check([r])


def test_keeping_everything_is_no_compression() -> None:
    kv = make()
    r = request(kv, 1, range(20))
    plan(kv, r, 8)
    commit(kv, r, 8, {0: 8})
    assert (r.publishes, r.tables[0].compressed, r.tables[0].published) == (True, False, 2)


@pytest.mark.parametrize(("kept", "text"), [({0: 9}, "can't keep 9 of 8"), ({0: -1}, "-1 of 8"), ({1: 7}, "window")])
def test_no_group_keeps_what_it_cannot(kept: dict[int, int], text: str) -> None:
    kv = make([FULL, WINDOW])
    r = request(kv, 1, range(20))
    plan(kv, r, 8)
    with pytest.raises(InvariantError, match=text):
        kv.advance(r, 0, 8, kept)


def test_compression_needs_room_for_every_shared_block() -> None:
    kv = make()
    a = request(kv, 1, range(10))
    compute(kv, a, 9)
    b = fork(kv, a, 2)
    assert kv.need(b, 0, 1) == 1
    assert kv.need(b, 0, 1, rewrite=True) == 3
    ops: list[KVOp] = []
    assert kv.grow(b, 0, 1, ops, rewrite=True) == 3
    assert ops == [KVOp(KVOpKind.COPY, 0, (0, 1, 2), (3, 4, 5))]


def test_a_compressed_parent_is_forked_as_it_stands_or_not_at_all() -> None:
    kv = make()
    a = request(kv, 1, range(13))
    plan(kv, a, 12)
    commit(kv, a, 12, {0: 5})
    child = fork(kv, a, 2)
    assert (shape(child), child.computed) == ((a.tables[0].blocks, 0, 5), [12])
    assert child.tables[0].compressed
    assert not child.publishes
    kv.check([a, child])
    assert not kv.fork(a, request(kv, 3, range(12)))  # row 11 cannot be told from the others any more


# ---------------------------------------------------------------------------------------------- the proof

FAULTS: dict[str, tuple[Callable[[Request], object], str]] = {
    "waits with blocks": (lambda r: setattr(r, "state", State.WAITING), "is waiting but holds blocks"),
    "is done with blocks": (lambda r: setattr(r, "state", State.DONE), "is done but holds blocks"),
    "less planned than computed": (lambda r: r.planned.__setitem__(0, 5), "computed 6, planned 5"),
    "entries without blocks": (lambda r: setattr(r.tables[0], "count", 9), "9 entries in 2 blocks of 4"),
    "entries missing": (lambda r: setattr(r.tables[0], "count", 5), r"0\+5 entries, computed 6"),
    "entries too many": (lambda r: setattr(r.tables[0], "count", 7), r"0\+7 entries, computed 6"),
    "compressed and published": (lambda r: setattr(r.tables[0], "compressed", True), "compressed and still publishes"),
    "a block lost": (lambda r: r.tables[0].blocks.pop(), "1 references, but 0 tables"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault: str) -> None:
    kv = make()
    r = request(kv, 1, range(20))
    compute(kv, r, 6)
    kv.check([r])
    corrupt, text = FAULTS[fault]
    corrupt(r)
    with pytest.raises(InvariantError, match=text):
        kv.check([r])


def test_a_model_without_a_group_is_a_bug() -> None:
    with pytest.raises(InvariantError, match="model draft has no KV group"):
        KV([FULL], BlockPool(1, LRU()), ["target", "draft"])
