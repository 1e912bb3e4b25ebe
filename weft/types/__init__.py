"""The vocabulary of a step: what goes into the engine, what a plan says, what a result states.

Everything here is a plain msgspec struct: no torch, no clock, no behaviour beyond small derived properties, so the same
objects are planned by the scheduler, carried out by an executor, written to a record and replayed by a simulator.

    plan   = engine.schedule(now)          # Plan: upper bounds
    result = executor.execute(plan)        # StepResult: facts
    events = engine.commit(now, plan, result)

Legend.  position: index of an item in a request's context, from 0.  entry: one position's KV in one group.
block: `GroupSpec.block_tokens` entries of one group.  Half-open ranges everywhere.
"""

from __future__ import annotations

from weft.types.actions import Action, Append, Fork, Park, Put, Resume, Stop, Tell, Truncate
from weft.types.events import (
    Adapted,
    Add,
    Cancel,
    Command,
    Drop,
    EngineFrame,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    Load,
    Noted,
    Preempted,
    Rejected,
    Seen,
    Tokens,
    Watch,
)
from weft.types.inputs import Grammar, Item, MediaItem, RequestSpec, SamplingSpec, Span, TokenItem, VectorItem
from weft.types.kv import Grant, GroupKind, GroupSpec, KVOp, KVOpKind, SharedKV
from weft.types.plan import Enter, Keep, Mask, Plan, Work
from weft.types.record import Abandoned, Added, Cancelled, Committed, Ended, Entry, Made, Planned
from weft.types.result import StepResult, TokenLogprob, WorkResult

__all__ = [
    "Abandoned",
    "Action",
    "Adapted",
    "Add",
    "Added",
    "Append",
    "Cancel",
    "Cancelled",
    "Command",
    "Committed",
    "Drop",
    "Ended",
    "EngineFrame",
    "EngineStats",
    "Enter",
    "Entry",
    "Event",
    "FinishReason",
    "Finished",
    "Fork",
    "Grammar",
    "Grant",
    "GroupKind",
    "GroupSpec",
    "Item",
    "KVOp",
    "KVOpKind",
    "Keep",
    "Load",
    "Made",
    "Mask",
    "MediaItem",
    "Noted",
    "Park",
    "Plan",
    "Planned",
    "Preempted",
    "Put",
    "Rejected",
    "RequestSpec",
    "Resume",
    "SamplingSpec",
    "Seen",
    "SharedKV",
    "Span",
    "StepResult",
    "Stop",
    "Tell",
    "TokenItem",
    "TokenLogprob",
    "Tokens",
    "Truncate",
    "VectorItem",
    "Watch",
    "Work",
    "WorkResult",
]
