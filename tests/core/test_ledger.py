"""The memory plan by hand: what blocks a sequence needs, how memory is divided, and what the refusals say."""

from __future__ import annotations

from typing import Any

import pytest

from weft.core.ledger import RESERVE_BYTES, MemoryPlan, blocks_for, bytes_per_token, longest, plan_memory
from weft.errors import ConfigError
from weft.types import GroupKind, GroupSpec

MIB, GIB = 1 << 20, 1 << 30


def group(kind: GroupKind, entry_bytes: int, size: int, window: int | None = None) -> GroupSpec:
    return GroupSpec(name=kind.value, kind=kind, layers=(0,), entry_bytes=entry_bytes, block_tokens=size, window=window)


FULL = group(GroupKind.FULL, 64, 16)
WINDOW = group(GroupKind.WINDOW, 32, 8, window=32)
PARKED = group(GroupKind.PARKED, 128, 4)
FIXED = 16 * MIB
PER_BLOCK = 16 * 64 + 4 * 16
"""A block's entries, and the position of each."""


def plan(**changes: Any) -> MemoryPlan:
    """10 MiB of weights, 2 of workspace, 4 of reserve; sequences of 64 tokens are 4 blocks of 1088 bytes."""
    given: dict[str, Any] = {
        "weights_bytes": 10 * MIB, "workspace_bytes": 2 * MIB, "reserve_bytes": 4 * MIB, "groups": [FULL], "block_bytes": 1024,
        "rows": 32, "max_num_seqs": 10, "model_max_len": 64, "available_bytes": 10 * GIB,
    }  # fmt: skip
    return plan_memory(**(given | changes))


# ---------------------------------------------------------------------------------------------- blocks of a sequence


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (100, 7)])
def test_a_full_group_holds_every_position(tokens: int, blocks: int) -> None:
    assert blocks_for([FULL], tokens, 32) == blocks


def test_a_window_group_holds_window_rows_and_the_unfinished_head_block() -> None:
    # 31 positions before the query, 16 rows of the step, 8 of the block that is dropped only as a whole: 55 entries.
    assert blocks_for([WINDOW], 10_000, 16) == 7
    assert blocks_for([WINDOW], 55, 16) == 7
    assert blocks_for([WINDOW], 48, 16) == 6
    assert blocks_for([WINDOW], 10_000, 1) == 5


def test_parked_rows_take_room_only_in_layered_steps() -> None:
    assert blocks_for([PARKED], 100, 10) == 0
    assert blocks_for([PARKED], 100, 10, layered=True) == 3
    assert blocks_for([PARKED], 5, 10, layered=True) == 2


def test_groups_add_up() -> None:
    groups = [FULL, WINDOW, PARKED]
    assert blocks_for(groups, 100, 16) == 7 + 7
    assert blocks_for(groups, 100, 16, layered=True) == 7 + 7 + 4
    assert bytes_per_token(groups) == 64 + 32  # parked hidden states are no KV of a position


def test_the_longest_sequence_that_blocks_hold() -> None:
    assert longest([FULL], 7, 32, 10_000) == 112
    assert longest([FULL], 7, 32, 100) == 100
    assert longest([FULL], 0, 32, 100) == 0
    assert longest([WINDOW], 7, 16, 10_000) == 10_000  # a window never grows beyond
    assert longest([WINDOW], 6, 16, 10_000) == 48
    assert longest([FULL, WINDOW], 11, 16, 10_000) == 64  # 4 + 7 blocks
    assert longest([FULL, PARKED], 7, 8, 10_000, layered=True) == 80  # 5 + 2 blocks


# ---------------------------------------------------------------------------------------------- dividing


def test_memory_is_divided_to_the_byte() -> None:
    p = plan(memory_bytes=FIXED + 20 * PER_BLOCK + PER_BLOCK - 1)
    assert (p.kv_blocks, p.kv_bytes, p.total_bytes) == (20, 20 * 1088, FIXED + 20 * 1088)
    assert (p.weights_bytes, p.workspace_bytes, p.reserve_bytes) == (10 * MIB, 2 * MIB, 4 * MIB)
    assert (p.kv_bytes_per_token, p.block_tokens, p.block_bytes) == (64, 16, 1024)
    assert (p.max_model_len, p.fits, p.reason) == (64, True, "")
    assert p.as_dict()["kv_blocks"] == 20
    assert plan(memory_bytes=FIXED + 21 * PER_BLOCK).kv_blocks == 21


def test_no_more_blocks_than_all_sequences_together_can_use() -> None:
    p = plan(memory_bytes=GIB, max_num_seqs=3)
    assert (p.kv_blocks, p.total_bytes) == (12, FIXED + 12 * PER_BLOCK)


def test_positions_are_counted_for_the_group_with_most_entries() -> None:
    p = plan(groups=[FULL, WINDOW, group(GroupKind.FULL, 16, 64)], memory_bytes=GIB, max_num_seqs=1)
    # 4 + min(64, 31 + 32 + 8) / 8 + 1 blocks, each with 64 positions of 4 bytes.
    assert (p.kv_blocks, p.kv_bytes) == (13, 13 * (1024 + 256))


def test_without_memory_the_pool_has_a_gibibyte_or_two_full_sequences() -> None:
    p = plan(max_num_seqs=1_000_000)
    assert p.kv_blocks == GIB // PER_BLOCK
    p = plan(max_num_seqs=1_000_000, model_max_len=16 * 600_000, available_bytes=100 * GIB)
    assert p.kv_blocks == 1_200_000


def test_without_memory_weft_takes_at_most_85_percent() -> None:
    p = plan(max_num_seqs=1_000_000, available_bytes=100 * MIB)
    assert p.kv_blocks == (85 * MIB - FIXED) // PER_BLOCK
    assert p.fits
    assert p.total_bytes <= 85 * MIB < p.total_bytes + PER_BLOCK


def test_the_reserve_is_the_measured_one_by_default() -> None:
    given = {
        "weights_bytes": 0,
        "workspace_bytes": 0,
        "groups": [FULL],
        "block_bytes": 1024,
        "rows": 8,
        "max_num_seqs": 1,
    }
    p = plan_memory(**given, model_max_len=16, available_bytes=GIB)  # type: ignore[arg-type]
    assert p.total_bytes == RESERVE_BYTES + PER_BLOCK


def test_more_memory_than_there_is_is_said_and_not_planned() -> None:
    p = plan(memory_bytes=3 * GIB, available_bytes=FIXED + 40 * PER_BLOCK)
    assert p.kv_blocks == 40
    assert p.fits
    assert p.reason == "--memory asks for 3,072 MiB, 16 MiB are available; planned with those"


def test_parked_rows_are_planned_for_layered_schedules() -> None:
    assert plan(groups=[FULL, PARKED], memory_bytes=GIB, max_num_seqs=1).kv_blocks == 4
    assert plan(groups=[FULL, PARKED], memory_bytes=GIB, max_num_seqs=1, layered=True).kv_blocks == 4 + 8


# ---------------------------------------------------------------------------------------------- lengths that do not fit


def test_a_model_longer_than_memory_is_served_shorter_and_says_so() -> None:
    p = plan(model_max_len=1024, memory_bytes=FIXED + 20 * PER_BLOCK)
    assert (p.max_model_len, p.kv_blocks, p.fits, p.model_max_len) == (320, 20, True, 1024)
    assert p.reason == "the model allows 1024 tokens, memory holds the KV of 320; give more --memory for longer ones"


def test_a_length_that_was_asked_for_is_never_shortened() -> None:
    p = plan(model_max_len=1024, max_model_len=640, memory_bytes=FIXED + 20 * PER_BLOCK)
    assert (p.max_model_len, p.fits, p.kv_blocks) == (640, False, 40)
    p = plan(model_max_len=1024, max_model_len=320, memory_bytes=FIXED + 20 * PER_BLOCK)
    assert (p.max_model_len, p.fits, p.reason) == (320, True, "")


@pytest.mark.parametrize(("blocks", "fits", "length"), [(16, True, 256), (15, False, 1024)])
def test_less_than_256_tokens_is_no_fit(blocks: int, fits: bool, length: int) -> None:
    p = plan(model_max_len=1024, memory_bytes=FIXED + blocks * PER_BLOCK)
    assert (p.fits, p.max_model_len) == (fits, length)


def test_a_refusal_names_every_number() -> None:
    p = plan(
        groups=[FULL], model_max_len=16 * 10_000, max_model_len=16 * 10_000, memory_bytes=20 * MIB, available_bytes=GIB
    )
    assert not p.fits
    assert p.kv_blocks == 10_000  # what it would take
    assert p.total_bytes == FIXED + 10_000 * PER_BLOCK
    assert p.reason == (
        "the model does not fit: weights 10 MiB + workspace 2 MiB + reserve 4 MiB + KV of one sequence of 160000 tokens 10 MiB = "
        "26 MiB, but --memory allows 20 MiB; try a smaller --max-model-len, a smaller model or dtype, or more memory"
    )


def test_a_refusal_names_the_bound_that_was_met() -> None:
    assert "but 15 MiB are available;" in plan(memory_bytes=15 * MIB, available_bytes=15 * MIB).reason
    assert "but 12 MiB are available;" in plan(memory_bytes=GIB, available_bytes=12 * MIB).reason
    assert (
        "but weft takes 8 MiB of the 10 MiB that are available unless --memory" in plan(available_bytes=10 * MIB).reason
    )
    p = plan(memory_bytes=1)
    assert "--memory allows 0 MiB" in p.reason
    assert (p.fits, p.kv_blocks) == (False, 4)


def test_lengths_that_no_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        plan(max_model_len=0)
    with pytest.raises(ConfigError, match="65 exceeds the 64 positions"):
        plan(max_model_len=65)
    assert plan(max_model_len=64).max_model_len == 64
