"""The machine bites: each of these faults, put into the core one at a time, is found by a few storms.

A mutation replaces one piece of one function's source.  When a refactoring moves that piece, the test says so, and the mutation
is to be written anew for the new code.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any, NamedTuple

import pytest

from tests.core.machine import Layered, Machine
from tests.core.storms import storm
from weft.core import prefix
from weft.core.engine import Engine
from weft.core.kv import KV
from weft.core.membership import Membership
from weft.core.planning import Planning
from weft.core.pool import BlockPool
from weft.core.request import Request
from weft.core.scheduler import Scheduler
from weft.core.sequences import Sequences
from weft.core.tiers import TierIndex

SEEDS = 40
TWO = {"flights": 2, "models": 1, "blocks": 24, "seqs": 6}
HITS = {"share": True, "cut": False, "models": 1, "blocks": 60}
AHEAD = {"models": 2, "ahead": True, "cut": False, "flights": 1, "guesses": 0.9, "blocks": 60}
TIERS = {"share": True, "cut": False, "models": 1, "blocks": 24, "below": 8}
FAR = {**TIERS, **TWO, "below": 40, "rows": 4, "guesses": None}
CUTS = {"share": True, "cut": True, "models": 1, "blocks": 60, "guesses": 0.9}


class Fault(NamedTuple):
    """What is wrong, where, and how the source is changed.  machine, fixed: the storms in which it shows soonest."""

    name: str
    owner: Any
    function: str
    old: str
    new: str
    machine: type[Machine] = Machine
    fixed: dict[str, Any] = {}


FAULTS = [
    Fault("no quarantine", BlockPool, "drop", "if self._in_flight:", "if False:", fixed=TWO),
    Fault("quarantine ends too early", BlockPool, "drop", "self._in_flight[-1]", "self._in_flight[0]", fixed=TWO),
    Fault("no copy on write", KV, "_others", "return self.pool.refs[block] - 1", "return 0 *", fixed=HITS),
    Fault("copy left out", KV, "grow", "if i * size < standing:", "if False:"),
    Fault("source of a copy let go at once", KV, "grow", "self._sources.append(old)", "self.pool.drop([old])", fixed=TWO),
    Fault("published before commit", KV, "publish", "done = request.computed[m]", "done = request.planned[m]", fixed=HITS),
    Fault("published over what is no longer pure", KV, "advance", "request.publishes = False", "pass", fixed=CUTS),
    Fault("compression writes shared blocks", KV, "_reach", "return 0 if rewrite and", "return at if rewrite and", fixed=CUTS),
    Fault("hash without salt", prefix, "root", "+ salt + settings", "+ settings", fixed=HITS),
    Fault("hash without parent", prefix, "extend", "hashed(name + data", "hashed(base + data", fixed=HITS),
    Fault("hash without items", prefix, "extend", "if s.stop > a:", "if False:", fixed=HITS),
    Fault("hit not capped", KV, "hit_cap", "len(request.context) - 1", "len(request.context)", fixed=HITS),
    Fault("hit over a cut", KV, "hit_cap", "first - 1", "first", fixed=CUTS),
    Fault("hit over wanted prompt logprobs", KV, "hit_cap", "min(cap, request.reported)", "cap", fixed=HITS),
    Fault("window drops one block too many", KV, "slide", "- table.first //", "+ 1 - table.first //"),
    Fault("window hit one block short", prefix, "longest_hit", "block(spec, length)", "block(spec, length + 2)", fixed=HITS),
    Fault("references leak", Scheduler, "remove", "self.kv.release(request)", "pass"),
    Fault("a fork holds nothing", KV, "fork", "self.pool.hold(b)", "pass"),
    Fault("a fork keeps the last row", KV, "fork", "len(child.context) - 1", "len(child.context)"),
    Fault("the oldest is preempted", Scheduler, "_victim", "safe = {x.rid for x in self.linked(oldest)}", "safe = set()"),
    Fault("a planned request is preempted", Scheduler, "_victim", "or x.rid in d.planned", ""),
    Fault("a request in flight is preempted", Scheduler, "_victim", "if x.in_flight or", "if", fixed=TWO),
    Fault("cut crossed", Scheduler, "_target", "if cut is not None and cut <= stop:", "if False:", fixed=CUTS),
    Fault("the next row crosses a cut", Scheduler, "_next", "or r.cut is not None", "",
          fixed=CUTS | {"guesses": None}),
    Fault("the next row gets no room", Scheduler, "_next", "if not self.kv.ready(r, 0, 1):", "if False:"),
    Fault("the next row is the one before", Planning, "next", "r.context[start]", "r.context[start - 1]"),
    Fault("the next row is not counted", Planning, "next", "self.add(r, work, 1)", "self.beside(r, work)"),
    Fault("guesses cross a cut", Scheduler, "_guesses", "if cut is not None:", "if False:", fixed=CUTS),
    Fault("guesses beyond the end", Scheduler, "_guesses", "r.limit - end - 1", "99"),
    Fault("a guess too many accepted", Engine, "_take", "len(fact.tokens) - 1 if", "len(fact.tokens) if"),
    Fault("short result advances", Engine, "_take", "rows = min(fact.rows, planned + work.ahead)", "rows = planned"),
    Fault("a result of an earlier life counts", Engine, "commit", "r.generation == generation, work", "True, work", fixed=TWO),
    Fault("in two plans although data decides", Scheduler, "_target", "if r.in_flight and (", "if False and (", fixed=TWO),
    Fault("linked rows planned twice", Scheduler, "_together", "or x.rid in d.advanced", "", Layered),
    Fault("linked requests yield one by one", Scheduler, "_strip", "self.linked(request)", "[request]"),
    Fault("hidden states kept", Engine, "_take", "self.kv.unpark(r, m)", "pass", Layered),
    Fault("hidden states get no room", KV, "_grown", "if park and g is not None", "if False", Layered),
    Fault("split rows sampled at every pass", Planning, "write", "samples=final and", "samples=", Layered),
    Fault("prompt rows sample for free", Planning, "chunk", "= prompt_rows + (stop == end)", "= int(stop == end)"),
    Fault("rows cost no bytes", Planning, "add", "self.bytes_left -= rows * limits.row_bytes +", "self.bytes_left -="),
    Fault("row budget ignored", Planning, "add", "self.view.rows_left -= rows", "pass"),
    Fault("too many sequences run", Scheduler, "entry", "> self.limits.max_num_seqs", "> 99"),
    Fault("old names after truncation", Sequences, "_cut_to", "del names[length // size :]", "pass", fixed=HITS),
    Fault("executor not told of a truncation", Sequences, "_recompute_from", "if r.started:", "if False:"),
    Fault("given tokens taken for output", Request, "outputs_before", "- given", ""),
    Fault("a stop id is overlooked", Engine, "_tokens", "in s.stop_ids", "in ()"),
    Fault("a draft gets no room to go ahead", Scheduler, "_follow_one", "grow(r, m, rows,", "grow(r, m, max(0, stop - start),",
          fixed=AHEAD),
    Fault("a draft goes ahead beyond the end", Scheduler, "_ahead", "max(0, min(most,", "max(most, 0 * min(most,", fixed=AHEAD),
    Fault("a draft goes ahead of what is not sampled", Scheduler, "_ahead", "r.rid not in d.sampled",
          "d.sampled.setdefault(r.rid, 0) < 0", fixed=AHEAD),
    Fault("a draft's own guesses stand", Engine, "_take", "min(fact.rows, planned + work.ahead)", "planned + work.ahead",
          fixed=AHEAD),
    Fault("a draft's rows in two plans", Scheduler, "_follow", "if not (r.in_flight or r.single) and", "if not r.single and",
          fixed=AHEAD | {"flights": 2}),
    Fault("a short result undoes the draft's", Engine, "commit", "if counts and",
          "if (r, r.generation) in lives and", fixed=AHEAD),
    Fault("a draft is not reckoned with", Membership, "_blocks", "2 * self.limits.max_guesses if", "0 if",
          fixed=AHEAD | {"blocks": 22, "rows": 4}),
    Fault("loaded before the block's old content is saved", TierIndex, "load", "ops.append(", "ops.insert(0, ", fixed=TIERS),
    Fault("a record is written over before it is loaded", TierIndex, "hold", "self._pinned[ticket] += 1", "pass", fixed=TIERS),
    Fault("an evicted record keeps its name", TierIndex, "_room", "del self._tickets[self._used[tier].pop(oldest)]",
          "self._used[tier].pop(oldest)", fixed=TIERS),
    Fault("an abandoned plan's blocks count as saved", Engine, "abandon", "if op.kind is KVOpKind.SAVE", "if False", fixed=TIERS),
    Fault("who waits for a lost block goes on", Engine, "_loaded", "if bad and any(", "if False and any(", fixed=TIERS),
    Fault("a lost block is not forgotten", Engine, "_loaded", "self.kv.lost(lost)", "pass", fixed=TIERS),
    Fault("in two plans while its blocks are loaded", Scheduler, "_target", "or r.loading", "", fixed=FAR),
    Fault("blocks to load into are not paid for", KV, "match", "b < 0 or", "b >= 0 and", fixed=TIERS),
    Fault("forks of other seeds share one", Sequences, "_new", "if seed is None else seed", ""),
]  # fmt: skip


@pytest.mark.parametrize("fixed", [{}, TWO, HITS, CUTS], ids=["any", "two", "hits", "cuts"])
def test_without_a_fault_the_same_storms_pass(fixed: dict[str, Any]) -> None:
    for seed in range(6):
        storm(Machine, seed, 80, **fixed)


def mutated(fault: Fault) -> Any:
    """The function with its source changed, in its module's namespace."""
    function = getattr(fault.owner, fault.function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(fault.old) >= 1, (
        f"{fault.name}: the source has no {fault.old!r} any more; write the mutation anew"
    )
    module = sys.modules[function.__module__]
    names: dict[str, Any] = {}
    exec(
        compile("from __future__ import annotations\n" + source.replace(fault.old, fault.new, 1), fault.name, "exec"),
        vars(module),
        names,
    )
    return names[fault.function]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault.owner, fault.function, mutated(fault))
    for seed in range(SEEDS):
        try:
            storm(fault.machine, seed, 80, **fault.fixed)
        except Exception:
            return
    pytest.fail(f"{SEEDS} storms did not notice: {fault.name}")
