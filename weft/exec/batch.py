"""One step's rows as tensors: what a decoder reads, built by the runner from a plan.

Legend.  T: rows of the batch, flattened over sequences without padding.  S: sequences.  N: rows whose logits are wanted.
B: longest block table in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from weft.exec.deltas import Deltas


@dataclass(slots=True)
class GroupBatch:
    """Where the batch's rows live in one KV group.

    tables_SB   int64, block ids of each sequence, 0 beyond its end
    first_S     int64, entries dropped at the table's head (whole blocks): table entry j is the sequence's entry first + j.
                For tables that hold every position (nothing compressed), entry = logical position
    lengths_S   int64, entries in the table once this step's rows are written (counted from the table's head)
    slots_T     int64, where each row's K and V are written: block * block_tokens + offset
    """

    tables_SB: Tensor
    first_S: Tensor
    lengths_S: Tensor
    slots_T: Tensor


@dataclass(slots=True)
class MassRows:
    """Rows whose attention is summed by the entries that it falls on.

    sums_T int64, which sum each row of the batch adds to, -1 for none.  count: how many sums there are.
    found: by layer, float64 [count, kv heads, entries of the longest table]; the forward pass puts them there, for layers that
    see everything.
    """

    sums_T: Tensor
    count: int
    found: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """Rows of several sequences that pass the same layers together.

    tokens_T     int64 ids (-1 where `vectors` supplies the input)
    positions_T  int64 logical positions; within a sequence they ascend, except for the guesses of a tree
    bounds       S + 1 row offsets: sequence s owns rows bounds[s]:bounds[s + 1]
    groups       by group index of the model, in the order of its GroupSpecs
    logit_rows_N int64, rows whose logits are wanted, ascending
    trees        by sequence: for each guess, the row within the sequence that it follows; such rows see the entries before
                 them that are context, their ancestors and themselves, and nothing else.  Rows of guesses that were computed
                 in an earlier pass, and stand in the table before this one's rows, are negative
    vectors      (rows int64, values float32 [rows, width]) that replace the embeddings of those rows, or None
    """

    tokens_T: Tensor
    positions_T: Tensor
    bounds: list[int]
    groups: list[GroupBatch]
    logit_rows_N: Tensor
    trees: dict[int, tuple[int, ...]] = field(default_factory=dict)
    vectors: tuple[Tensor, Tensor] | None = None
    sequences: list[Any] = field(default_factory=list)
    """What the executor knows of each sequence (`exec.mirror.Mirrored`): its stack and the state of its techniques.  On a model
    beside the target, where techniques have no say, all are one `exec.mirror.Plain`."""
    deltas: Deltas | None = None
    """What adapters add to products, where a sequence has one."""
    mass: MassRows | None = None
    """Where somebody asks which entries get the attention."""
    stands: bool = False
    """Whether this is the batch of the step before, with other numbers in the same tensors (`exec.standing`)."""
