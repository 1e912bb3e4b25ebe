"""The KV pool: views, reads and writes, and each instruction of the set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.errors import ConfigError, InvariantError, TransferError
from weft.exec.kvpool import KVPool, pool_bytes
from weft.models.families import read
from weft.models.spec import DecoderSpec, kv_groups
from weft.ops.ref.rope import apply_rope, frequencies, tables
from weft.types import GroupKind, KVOp, KVOpKind

BLOCKS = 9


def spec_of(layers: int = 5, **changes: object) -> DecoderSpec:
    types = ["sliding_attention" if index in (1, 4) else "full_attention" for index in range(layers)]
    return read(
        {
            "architectures": ["Gemma2ForCausalLM"],
            "vocab_size": 31,
            "hidden_size": 24,
            "intermediate_size": 8,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "sliding_window": 10,
            "layer_types": types,
            **changes,
        }
    )


def pool_of(spec: DecoderSpec | None = None, dtype: torch.dtype = torch.float32, block_tokens: int = 4) -> KVPool:
    spec = spec or spec_of()
    groups, block_bytes = kv_groups(spec, str(dtype), block_tokens)
    return KVPool(groups, spec, blocks=BLOCKS, block_bytes=block_bytes, dtype=dtype)


def fill(pool: KVPool, group: int, blocks: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Random entries in all of a table's blocks; a copy of everything, per entry of the table."""
    generator = torch.Generator().manual_seed(seed)
    tokens = pool.groups[group].block_tokens
    count = len(blocks) * tokens
    slots = torch.tensor([block * tokens + offset for block in blocks for offset in range(tokens)])
    found: dict[str, Tensor] = {"positions": torch.arange(count, dtype=torch.int32) + 3}
    pool.write_positions(group, slots, found["positions"])
    for layer in pool.groups[group].layers:
        k, v = (torch.randn(count, 2, 6, generator=generator).to(pool.dtype) for _ in range(2))
        pool.write(group, layer, slots, k, v)
        found[f"k{layer}"], found[f"v{layer}"] = k, v
    return found


def read_table(pool: KVPool, group: int, blocks: tuple[int, ...]) -> dict[str, Tensor]:
    index = torch.tensor(blocks)
    found = {"positions": pool.positions(group)[index].flatten()}
    for layer in pool.groups[group].layers:
        found[f"k{layer}"] = pool.keys(group, layer)[index].flatten(0, 1)
        found[f"v{layer}"] = pool.values(group, layer)[index].flatten(0, 1)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_groups_share_one_block_size() -> None:
    spec = spec_of()
    groups, block_bytes = kv_groups(spec, "bfloat16", 16)
    assert [(g.kind, g.layers, g.window) for g in groups] == [
        (GroupKind.FULL, (0, 2, 3), None),
        (GroupKind.WINDOW, (1, 4), 10),
        (GroupKind.PARKED, (0, 1, 2, 3, 4), None),
    ]
    assert groups[0].entry_bytes == 3 * 2 * 2 * 6 * 2
    assert block_bytes == 16 * groups[0].entry_bytes
    assert all(g.block_tokens * g.entry_bytes <= block_bytes for g in groups)
    deep = kv_groups(spec_of(9, layer_types=["sliding_attention"] + ["full_attention"] * 8), "float32", 16)[0]
    assert [g.block_tokens for g in deep[:2]] == [16, 128]
    for text in ("float8", "int8"):
        with pytest.raises(ConfigError, match="not supported"):
            kv_groups(spec, text)
    with pytest.raises(ConfigError, match="block_tokens"):
        kv_groups(spec, "float32", 0)


def test_hidden_state_wider_than_a_block_still_fits_one() -> None:
    spec = replace(spec_of(1, layer_types=["full_attention"]), width=4096)
    groups, block_bytes = kv_groups(spec, "bfloat16", 1)
    assert groups[1].block_tokens == 1
    assert block_bytes >= 4096 * 4
    pool = KVPool(groups, spec, blocks=3, block_bytes=block_bytes, dtype=torch.bfloat16)
    hidden = torch.randn(3, 4096)
    pool.park(1, torch.tensor([2, 0, 1]), hidden)
    assert torch.equal(pool.unpark(1, torch.tensor([2, 0, 1])), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_do_not_overlap(dtype: torch.dtype) -> None:
    pool = pool_of(dtype=dtype)
    assert pool.bytes == pool.arena.nbytes + pool._positions.nbytes == pool_bytes(pool.groups, BLOCKS, pool.block_bytes)
    full, window = fill(pool, 0, (5, 0), 1), fill(pool, 1, (7, 2), 2)
    hidden = torch.randn(pool.groups[2].block_tokens, 24)
    slots = 3 * pool.groups[2].block_tokens + torch.arange(len(hidden))
    pool.park(2, slots, hidden)
    assert same(read_table(pool, 0, (5, 0)), full)
    assert same(read_table(pool, 1, (7, 2)), window)
    assert torch.equal(pool.unpark(2, slots), hidden)
    assert not pool.arena[torch.tensor([1, 4, 6, 8])].any()


def test_layout_inside_a_block_is_as_written() -> None:
    """[layer of the group][key, value][entry][head][head_dim], by bytes."""
    pool = pool_of()
    found = fill(pool, 0, (3,))
    parts = [found[f"{kind}{layer}"].flatten() for layer in (0, 2, 3) for kind in "kv"]
    assert torch.equal(pool.arena[3].view(torch.float32)[: sum(map(len, parts))], torch.cat(parts))


def test_untouched_pages_cost_nothing() -> None:
    spec = spec_of()
    groups, block_bytes = kv_groups(spec, "float32", 16)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    pool = KVPool(groups, spec, blocks=(1 << 30) // block_bytes, block_bytes=block_bytes, dtype=torch.float32)
    fill(pool, 0, (7,))
    assert resident() - before < 64 << 20


def test_wrong_groups_are_refused() -> None:
    spec = spec_of()
    groups, block_bytes = kv_groups(spec, "float32", 4)
    with pytest.raises(InvariantError, match="do not fit"):
        KVPool(groups, spec, blocks=2, block_bytes=block_bytes - 48, dtype=torch.float32)
    with pytest.raises(InvariantError, match="entry_bytes"):
        KVPool(groups, spec, blocks=2, block_bytes=block_bytes, dtype=torch.bfloat16)


# ---------------------------------------------------------------------------------------------- instructions


def test_copy_and_move() -> None:
    pool = pool_of()
    found = fill(pool, 0, (1, 2, 3))
    pool.carry_out(KVOp(KVOpKind.COPY, 0, (1, 2, 3), (6, 5, 4)))
    assert same(read_table(pool, 0, (6, 5, 4)), found)
    assert same(read_table(pool, 0, (1, 2, 3)), found)
    pool.carry_out(KVOp(KVOpKind.MOVE, 0, (1, 2, 3), (2, 3, 1)))
    assert same(read_table(pool, 0, (2, 3, 1)), found)


def test_compact_in_place_and_elsewhere() -> None:
    keep = (0, 2, 3, 5, 6, 10)
    for target in ((1, 2, 3), (7, 8)):
        pool = pool_of()
        found = fill(pool, 0, (1, 2, 3))
        pool.carry_out(KVOp(KVOpKind.COMPACT, 0, (1, 2, 3), target, keep))
        after = read_table(pool, 0, target)
        for name, entries in found.items():
            assert torch.equal(after[name][: len(keep)], entries[list(keep)]), name


def test_compact_moves_parked_states_too() -> None:
    pool = pool_of()
    hidden = torch.randn(6, 24)
    base = 2 * pool.groups[2].block_tokens
    pool.park(2, base + torch.arange(6), hidden)
    pool.carry_out(KVOp(KVOpKind.COMPACT, 2, (2,), (2,), (1, 4)))
    assert torch.equal(pool.unpark(2, base + torch.arange(2)), hidden[[1, 4]])


def test_compact_of_each_head_by_itself() -> None:
    """Layers 0, 2, 3 with two heads each keep 3 of 10 entries, all different; they get the last positions before the next."""
    pool = pool_of()
    found = fill(pool, 0, (5, 1, 3))
    kept = torch.tensor([[[0, 1, 9], [2, 4, 6]], [[7, 8, 9], [0, 4, 8]], [[3, 5, 7], [1, 2, 9]]])
    pool.compact_heads(0, (5, 1, 3), kept, 40)
    after = read_table(pool, 0, (5, 1, 3))
    assert after["positions"][:3].tolist() == [37, 38, 39]
    assert torch.equal(after["positions"][4:], found["positions"][4:])
    for index, layer in enumerate((0, 2, 3)):
        for name in (f"k{layer}", f"v{layer}"):
            for head in range(2):
                assert torch.equal(after[name][:3, head], found[name][kept[index, head], head]), (name, head)
            assert torch.equal(after[name][4:], found[name][4:]), "other blocks stay"


@pytest.mark.parametrize("delta", [5, -3])
def test_rotate_is_rope_at_other_positions(delta: int) -> None:
    """Keys roped at p and rotated by delta are the keys roped at p + delta; values and other entries stay."""
    pool = pool_of()
    spec = pool.specs["target"]
    rope = spec.layers[0].rope
    assert rope is not None
    raw = torch.randn(8, 2, 6)
    positions = torch.arange(8) + 20

    def roped(at: Tensor) -> Tensor:
        turned = raw.clone()
        apply_rope(turned, *tables(at, frequencies(rope), 1.0))
        return turned

    slots = torch.cat([torch.arange(4) + 4, torch.arange(4) + 24])
    for layer in (0, 2, 3):
        pool.write(0, layer, slots, roped(positions), raw)
    pool.write_positions(0, slots, positions)
    pool.carry_out(KVOp(KVOpKind.ROTATE, 0, (1, 6), (), (delta, 2, 7)))
    moved = positions.clone()
    moved[2:7] += delta
    after = read_table(pool, 0, (1, 6))
    assert torch.equal(after["positions"], moved.int())
    for layer in (0, 2, 3):
        torch.testing.assert_close(after[f"k{layer}"], roped(moved), atol=1e-5, rtol=1e-5)
        assert torch.equal(after[f"v{layer}"], raw)


def test_rewrite_puts_what_pack_took() -> None:
    pool = pool_of()
    found = fill(pool, 0, (1, 2), 1)
    other = fill(pool, 0, (4, 5), 2)
    payload = pool.pack(0, (1, 2), (6, 0, 3))
    pool.carry_out(KVOp(KVOpKind.REWRITE, 0, (4, 5), (), (1, 2, 7)), payload)
    after = read_table(pool, 0, (4, 5))
    for name, entries in other.items():
        wanted = entries.clone()
        if name != "positions":
            wanted[[1, 2, 7]] = found[name][[6, 0, 3]]
        assert torch.equal(after[name], wanted), name
    with pytest.raises(TransferError, match="bytes of payload"):
        pool.carry_out(KVOp(KVOpKind.REWRITE, 0, (4, 5), (), (1, 2)), payload)


def test_zero() -> None:
    pool = pool_of()
    fill(pool, 0, (1, 2))
    kept = fill(pool, 0, (3,))
    pool.carry_out(KVOp(KVOpKind.ZERO, 0, (), (1, 2)))
    assert not any(tensor.any() for tensor in read_table(pool, 0, (1, 2)).values())
    assert same(read_table(pool, 0, (3,)), kept)


def test_save_and_load() -> None:
    pool, other = pool_of(), pool_of()
    found = fill(pool, 0, (8, 1))
    payload = pool.carry_out(KVOp(KVOpKind.SAVE, 0, (8, 1)))
    assert payload is not None
    other.carry_out(KVOp(KVOpKind.LOAD, 0, (), (0, 4)), payload)
    assert same(read_table(other, 0, (0, 4)), found)
    before = other.arena.clone()
    for at in (0, 40, len(payload) - 1):
        damaged = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        with pytest.raises(TransferError, match="checksum"):
            other.carry_out(KVOp(KVOpKind.LOAD, 0, (), (0, 4)), damaged)
    for wrong in (payload[:-1], b"", None):
        with pytest.raises(TransferError, match="blocks take"):
            other.carry_out(KVOp(KVOpKind.LOAD, 0, (), (0, 4)), wrong)
    assert torch.equal(other.arena, before)


@pytest.mark.parametrize("group", [0, 1])
def test_positions_are_written_where_their_slots_say(group: int) -> None:
    """By the formula, slot by slot: block slot // tokens, offset slot % tokens; others stay, in both groups."""
    pool = pool_of(block_tokens=4)
    tokens = pool.groups[group].block_tokens
    rng = np.random.default_rng(3)
    slots = rng.permutation(BLOCKS * tokens)[: 3 * tokens + 1]
    before = [pool.positions(g).clone() for g in range(len(pool.groups))]
    wanted = before[group].clone()
    for i, slot in enumerate(slots.tolist()):
        wanted[slot // tokens, slot % tokens] = 1000 + 3 * i
    pool.write_positions(group, torch.from_numpy(slots), 1000 + 3 * torch.arange(len(slots)))
    assert torch.equal(pool.positions(group), wanted)
    assert pool.positions(group).dtype == torch.int32
