"""Drive a decoder without the runner: sequences with block tables, batches from lists of rows.

Blocks are handed out in shuffled order from an arena filled with NaN, so that reading an entry that nobody wrote shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.exec.batch import Batch, GroupBatch
from weft.exec.kvpool import KVPool
from weft.models.decoder import Decoder, build
from weft.models.spec import DecoderSpec, kv_groups
from weft.ops.choice import choose
from weft.types import GroupKind

OPS = "auto"
"""Who computes the decoders of these tests, where they do not say; `tests/models/conftest.py` sets it."""


@dataclass
class Chain:
    """One sequence's tables: per group, its blocks and the entries dropped at the head."""

    tables: list[list[int]]
    first: list[int]


@dataclass
class Rows:
    """Rows of one sequence in a batch: `tokens` at positions start, start + 1, ...; a tree gives parents (and positions)."""

    name: str
    tokens: Sequence[int]
    start: int
    parents: tuple[int, ...] = ()
    positions: Sequence[int] = ()


@dataclass
class Bench:
    """A decoder with its pool, and the sequences that live in it."""

    decoder: Decoder
    blocks: int = 256
    slide: bool = True
    seed: int = 0
    store: Any = None
    chains: dict[str, Chain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups, self.block_bytes = self.decoder.groups, 0
        largest = [group.block_tokens * group.entry_bytes for group in self.groups]
        own = kv_groups(self.decoder.spec, str(self.decoder.dtype), _smallest(self), self.store)
        self.block_bytes = max(own[1], *largest)
        self.pool = KVPool(
            self.groups,
            self.decoder.spec,
            blocks=self.blocks,
            block_bytes=self.block_bytes,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            store=self.store,
        )
        self.pool.arena.fill_(255)
        self.free = list(range(self.blocks))
        random.Random(self.seed).shuffle(self.free)

    def chain(self, name: str) -> Chain:
        return self.chains.setdefault(name, Chain([[] for _ in self.groups], [0] * len(self.groups)))

    def share(self, source: str, target: str, tokens: int) -> None:
        """Let `target` begin with the blocks of `source` that hold its first `tokens` entries (whole blocks)."""
        origin, chain = self.chain(source), self.chain(target)
        for index, group in enumerate(self.groups):
            assert tokens % group.block_tokens == 0 or group.kind is GroupKind.PARKED
            last = tokens // group.block_tokens - origin.first[index] // group.block_tokens
            chain.tables[index] = list(origin.tables[index][:last])
            chain.first[index] = origin.first[index]

    def batch(self, works: Sequence[Rows], logits: str = "all") -> Batch:
        tokens = [token for work in works for token in work.tokens]
        positions = [p for work in works for p in self._positions(work)]
        bounds = [0]
        for work in works:
            bounds.append(bounds[-1] + len(work.tokens))
        groups = [self._group(index, works) for index in range(len(self.groups))]
        wanted = range(len(tokens)) if logits == "all" else [bound - 1 for bound in bounds[1:]]
        device = self.decoder.device
        return Batch(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            bounds,
            groups,
            torch.tensor(list(wanted), dtype=torch.int64, device=device),
            {i: work.parents for i, work in enumerate(works) if work.parents},
        )

    def run(self, works: Sequence[Rows], logits: str = "all") -> list[Tensor]:
        """Logits of every row (or the last) of each work."""
        batch = self.batch(works, logits)
        out = self.decoder.forward(batch, self.pool).clone()
        sizes = [len(work.tokens) if logits == "all" else 1 for work in works]
        return list(out.split(sizes))

    def chunked(self, name: str, tokens: Sequence[int], chunk: int, start: int = 0) -> Tensor:
        """Logits of every row of one sequence, computed alone in chunks."""
        parts = range(start, len(tokens), chunk)
        return torch.cat([self.run([Rows(name, tokens[at : at + chunk], at)])[0] for at in parts])

    def greedy(self, name: str, prompt: Sequence[int], count: int) -> list[int]:
        """Prompt in one piece, then `count` greedy tokens one by one."""
        tokens = list(prompt)
        logits = self.run([Rows(name, tokens, 0)], "last")[0]
        for _ in range(count):
            tokens.append(int(logits[-1].argmax()))
            logits = self.run([Rows(name, tokens[-1:], len(tokens) - 1)], "last")[0]
        return tokens[len(prompt) :]

    def _positions(self, work: Rows) -> Sequence[int]:
        return work.positions or range(work.start, work.start + len(work.tokens))

    def _group(self, index: int, works: Sequence[Rows]) -> GroupBatch:
        group = self.groups[index]
        tokens = group.block_tokens
        slots: list[int] = []
        lengths, first = [], []
        for work in works:
            chain = self.chain(work.name)
            table = chain.tables[index]
            if self.slide and group.window is not None:
                useless = max(0, work.start - group.window + 1) // tokens * tokens
                if useless > chain.first[index]:
                    del table[: (useless - chain.first[index]) // tokens]
                    chain.first[index] = useless
            total = work.start + len(work.tokens) - chain.first[index]
            while len(table) * tokens < total:
                table.append(self.free.pop())
            for entry in range(total - len(work.tokens), total):
                slots.append(table[entry // tokens] * tokens + entry % tokens)
            lengths.append(total)
            first.append(chain.first[index])
        longest = max(len(self.chain(work.name).tables[index]) for work in works)
        tables = [self.chain(work.name).tables[index] for work in works]
        device = self.decoder.device
        return GroupBatch(
            torch.tensor([table + [0] * (longest - len(table)) for table in tables], device=device).view(
                len(works), -1
            ),
            torch.tensor(first, dtype=torch.int64, device=device),
            torch.tensor(lengths, dtype=torch.int64, device=device),
            torch.tensor(slots, dtype=torch.int64, device=device),
        )


def _smallest(bench: Bench) -> int:
    return min(group.block_tokens for group in bench.groups if group.kind is not GroupKind.PARKED)


def bench_for(
    spec: DecoderSpec,
    source: object,
    *,
    dtype: str = "float32",
    block_tokens: int = 16,
    max_rows: int = 512,
    **kw: object,
) -> Bench:
    """A bench over a model folder or "random" weights.  Keyword arguments go to `build`; blocks and slide to `Bench`."""
    own = {key: kw.pop(key) for key in ("blocks", "slide", "store") if key in kw}
    kw.setdefault("ops", choose(OPS, "auto", spec, dtype, "cpu").ops)
    groups, _ = kv_groups(spec, dtype, block_tokens, own.get("store"))  # type: ignore[arg-type]
    decoder = build(
        spec,
        source,
        dtype=dtype,
        max_rows=max_rows,
        max_samples=max_rows,
        groups=groups,
        **kw,  # type: ignore[arg-type]
    )
    return Bench(decoder, **own)  # type: ignore[arg-type]
