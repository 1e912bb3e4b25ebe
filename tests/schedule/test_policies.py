"""Each schedule on a few requests, worked by hand: who has how many rows in each step.  One step takes one second."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weft.cli.app import app
from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.errors import ConfigError
from weft.registry import lookup, names, parse
from weft.sim.executor import facts
from weft.slots import SLOTS
from weft.types import Finished, GroupKind, GroupSpec, RequestSpec, SamplingSpec, TokenItem

GROUPS = [GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=4)]
Ask = tuple[float, int, int]
"""(when it comes, prompt, output)"""
Steps = list[dict[int, int]]


def steps(
    policy: str, asks: Sequence[Ask], *, rows: int = 8, seqs: int = 8, urgent: Sequence[int] = (), tenants: str = "",
    alike: int = 1000,
) -> Steps:  # fmt: skip
    """The rows of every request in each step.  alike: so many different beginnings there are."""
    limits = Limits(max_model_len=200, max_num_seqs=seqs, max_rows=rows, max_samples=seqs)
    engine = Engine(GROUPS, 400, limits, build_stack([f"schedule={policy}"]))
    found: Steps = []
    now, sent, left = 0.0, 0, len(asks)
    while left:
        while sent < len(asks) and asks[sent][0] <= now:
            (_, prompt, output), at = asks[sent], 100 * (sent % alike)
            spec = RequestSpec(
                id=sent, items=(TokenItem(tuple(range(at, at + prompt))),), priority=-(sent in urgent),
                sampling=SamplingSpec(max_tokens=output), salt=tenants[sent].encode() if tenants else b"",
            )  # fmt: skip
            assert engine.add(spec, now) == []
            sent += 1
        if engine.has_work:
            plan, _ = engine.schedule(now)
            found.append({w.request - 1: len(w.tokens) for w in plan.works})
            left -= sum(isinstance(e, Finished) for e in engine.commit(now + 1, plan, facts(plan)))
            assert len(found) < 300, found[-3:]
        now += 1.0
    return found


def test_static_waits_for_the_whole_batch() -> None:
    asks = [(0, 4, 3), (0, 4, 1), (0, 4, 2)]
    assert steps("static(size=2)", asks) == [{0: 4, 1: 4}, {0: 1}, {0: 1}, {2: 4}, {2: 1}]
    assert steps("fcfs", asks) == [{0: 4, 1: 4}, {0: 1, 2: 4}, {0: 1, 2: 1}]


def test_orca_takes_prompts_whole_and_lets_them_join_at_once() -> None:
    asks = [(0, 4, 3), (1, 5, 2), (1, 4, 1)]
    # 5 rows fit beside one decode; 4 do not fit beside both, and come whole a step later.
    assert steps("orca", asks) == [{0: 4}, {0: 1, 1: 5}, {0: 1, 1: 1, 2: 4}]
    assert steps("fcfs", asks) == [{0: 4}, {0: 1, 1: 5, 2: 2}, {0: 1, 1: 1, 2: 2}]
    assert steps("orca(size=1)", asks[:2])[1] == {0: 1}


def test_prefill_first_lets_decodes_wait_for_prompts() -> None:
    asks = [(0, 4, 3), (1, 5, 2)]
    assert steps("prefill_first", asks) == [{0: 4}, {1: 5}, {0: 1, 1: 1}, {0: 1}]
    assert steps("fcfs", asks) == [{0: 4}, {0: 1, 1: 5}, {0: 1, 1: 1}]


def test_sarathi_has_one_chunk_and_whole_tiles() -> None:
    asks = [(0, 4, 4), (0, 12, 1), (0, 5, 1)]
    # Beside one decode a chunk of 8 has 7 rows, so that the step is two tiles of 4.
    assert steps("sarathi(chunk=8, tile=4)", asks, rows=16) == [{0: 4}, {0: 1, 1: 7}, {0: 1, 1: 5}, {0: 1, 2: 5}]
    assert steps("fcfs", asks, rows=16) == [{0: 4, 1: 12}, {0: 1, 2: 5}, {0: 1}, {0: 1}]


def test_sarathi_serve_s_budget_follows_from_the_limit_between_tokens() -> None:
    policy = "sarathi_serve(tbt_s=0.05, step_s=0.01, row_s=0.004, tile=4)"  # 40 ms / 4 ms = 10 rows, two tiles of 4
    asks = [(0, 6, 3), (0, 10, 1)]
    assert steps(policy, asks, rows=16) == [{0: 6, 1: 2}, {0: 1, 1: 7}, {0: 1, 1: 1}]
    assert steps("fcfs", asks, rows=16) == [{0: 6, 1: 10}, {0: 1}, {0: 1}]
    with pytest.raises(ConfigError, match="leaves no tile"):
        parse("schedule=sarathi_serve(tbt_s=0.011, step_s=0.01, row_s=0.004)").build()


def test_splitfuse_fills_steps_and_leaves_no_crumbs() -> None:
    asks = [(0, 9, 2), (0, 5, 1)]
    # 9 rows in a budget of 8 would leave 1, which is less than 3: 6 and 3, and the second prompt fills both steps up.
    assert steps("splitfuse(budget=8, least=3)", asks, rows=16) == [{0: 6, 1: 2}, {0: 3, 1: 3}, {0: 1}]
    assert steps("fcfs", asks, rows=16) == [{0: 9, 1: 5}, {0: 1}]


def test_prepacking_fills_bins_with_the_longest_that_fit() -> None:
    asks = [(0, 3, 1), (0, 7, 1), (0, 5, 1), (0, 4, 1)]
    assert steps("prepacking(bin=10)", asks, rows=16) == [{1: 7, 0: 3}, {2: 5, 3: 4}]
    assert steps("fcfs", asks, rows=16) == [{0: 3, 1: 7, 2: 5, 3: 1}, {3: 3}]


def test_shortest_goes_by_the_predicted_length_and_by_age() -> None:
    asks = [(0, 4, 1), (0, 4, 40), (0, 4, 3)]
    exact = "shortest(accuracy=1.0, bucket=1, ageing=0.0)"
    assert [list(s) for s in steps(exact, asks, rows=4)][:3] == [[0], [2], [2, 1]]
    assert [list(s) for s in steps("fcfs", asks, rows=4)][:3] == [[0], [1], [1, 2]]
    # A second of waiting is worth more than all tokens: by arrival again, as far as prompts go.
    late = [(0, 4, 1), (0, 4, 40), (1, 4, 3)]
    assert next(i for s in steps("shortest(accuracy=1.0, ageing=1000.0)", late, rows=4)[1:] for i in s) == 1
    policy = parse("schedule=shortest(accuracy=0.0)").build()
    engine_like = steps("shortest(accuracy=0.0)", asks, rows=4)
    assert sum(s.get(1, 0) for s in engine_like) == 43
    assert policy.acts["misread"] == 0


def test_priority_goes_before_those_who_decode() -> None:
    asks = [(0, 4, 4), (1, 4, 2)]
    assert steps("priority", asks, rows=4, urgent=(1,)) == [{0: 4}, {1: 4}, {1: 1, 0: 1}, {0: 1}, {0: 1}]
    assert steps("fcfs", asks, rows=4, urgent=(1,)) == [{0: 4}, {0: 1, 1: 3}, {0: 1, 1: 1}, {0: 1, 1: 1}]


def test_deadline_serves_the_least_slack_and_those_too_late_last() -> None:
    asks = [(0, 4, 1), (0, 2, 1), (0, 6, 1)]
    # Due at 12 s, a second for each row: slack 8, 10 and 6.
    assert [list(s) for s in steps("deadline(ttft_s=12, row_s=1)", asks, rows=6)] == [[2], [0, 1]]
    # Due at 5 s: the last one, with 6 rows, cannot make it any more.
    assert [list(s) for s in steps("deadline(ttft_s=5, row_s=1)", asks, rows=6)] == [[0, 1], [2]]
    assert [list(s) for s in steps("fcfs", asks, rows=6)] == [[0, 1], [2]]
    assert steps("deadline(ttft_s=12, row_s=1)", asks, rows=6) != steps("fcfs", asks, rows=6)


def test_fair_serves_the_tenant_who_had_least() -> None:
    asks = [(0, 4, 1), (0, 4, 1), (0, 4, 1), (1, 4, 1)]
    # b comes when a has had 4 rows, and is lifted to those: a, who came first, is next, and then b, with 4 against 8.
    assert [list(s) for s in steps("fair", asks, rows=4, tenants="aaab")] == [[0], [1], [3], [2]]
    assert [list(s) for s in steps("fcfs", asks, rows=4, tenants="aaab")] == [[0], [1], [2], [3]]
    # b's rows count a fifth: it had 4 / 5 when a has 4, then 8 / 5, ...
    many = [(0, 4, 1), *[(0, 4, 1)] * 2, *[(0, 4, 1)] * 3]
    weighted = steps("fair(weights={'b': 5.0})", many, rows=4, tenants="aaabbb")
    assert [list(s) for s in weighted] == [[0], [3], [4], [5], [1], [2]]


def test_clairvoyant_goes_by_what_is_left() -> None:
    asks = [(0, 4, 9), (0, 4, 2), (1, 3, 1)]
    assert steps("clairvoyant", asks, rows=4)[:3] == [{1: 4}, {1: 1, 2: 3}, {0: 4}]
    assert steps("fcfs", asks, rows=4)[:2] == [{0: 4}, {0: 1, 1: 3}]


def shared(policy: str, heads: str, *, patience: float = 0.0) -> list[int]:
    """The order in which requests with these beginnings (a letter each, of 8 tokens) end, one at a time."""
    engine = Engine(
        GROUPS, 400, Limits(max_model_len=200, max_num_seqs=1, max_rows=16, max_samples=1), build_stack([policy])
    )
    for i, letter in enumerate(heads):
        tokens = (*[ord(letter)] * 8, *range(1000 * i, 1000 * i + 4))
        sampling = SamplingSpec(max_tokens=1 if letter != "c" else 3)
        assert engine.add(RequestSpec(id=i, items=(TokenItem(tokens),), sampling=sampling), 0.0) == []
    found, now = list[int](), patience
    while engine.has_work:
        plan, _ = engine.schedule(now)
        now += 1.0
        found += [e.id for e in engine.commit(now, plan, facts(plan)) if isinstance(e, Finished)]
    return found


def test_cache_aware_follows_what_was_computed_and_lets_nobody_starve() -> None:
    assert shared("schedule=cache_aware(block=4)", "abdabd") == [0, 3, 1, 4, 2, 5]
    assert shared("schedule=fcfs", "abdabd") == [0, 1, 2, 3, 4, 5]
    # From 2.5 s on everybody has waited too long, and by arrival it goes.
    assert shared("schedule=cache_aware(block=4, patience_s=2.5)", "abdaaab") == [0, 3, 4, 1, 2, 5, 6]


def test_batchllm_runs_group_by_group_the_longest_answers_first() -> None:
    # c has answers of 3 tokens, the others of 1, for prompts of equal length.
    assert shared("schedule=batchllm(prefix=8)", "abcabc") == [2, 5, 0, 3, 1, 4]
    assert shared("schedule=fcfs", "abcabc") == [0, 1, 2, 3, 4, 5]


Layers = tuple[int, int] | None


def passes(policy: str, asks: Sequence[Ask], *, rows: int) -> list[dict[int, tuple[int, Layers]]]:
    """(rows, layers) of every request in each step, of a model with four layers; None for all of them."""
    parked = GroupSpec(name="parked", kind=GroupKind.PARKED, layers=(0,), entry_bytes=8, block_tokens=4)
    limits = Limits(max_model_len=200, max_num_seqs=8, max_rows=rows, max_samples=8)
    engine = Engine([*GROUPS, parked], 400, limits, build_stack([f"schedule={policy}"]), layers=4)
    found, now = list[dict[int, tuple[int, Layers]]](), 0.0
    for i, (at, prompt, output) in enumerate(asks):
        items = (TokenItem(tuple(range(100 * i, 100 * i + prompt))),)
        while now < at:
            now = stepped(engine, now, found)
        assert engine.add(RequestSpec(id=i, items=items, sampling=SamplingSpec(max_tokens=output)), now) == []
    while engine.requests():
        now = stepped(engine, now, found)
    return found


def stepped(engine: Engine, now: float, found: list[dict[int, tuple[int, Layers]]]) -> float:
    plan, _ = engine.schedule(now)
    found.append({w.request - 1: (len(w.tokens), w.layers) for w in plan.works})
    engine.commit(now + 1, plan, facts(plan))
    return now + 1


def test_layered_takes_a_prompt_through_groups_of_layers_beside_decodes() -> None:
    """The paper's figure: a decode waits for half a prompt's work and not for all of it, and a prompt reads each layer once."""
    asks = [(0, 2, 6), (1, 12, 2)]
    one = {0: (1, None)}
    found = passes("layered(groups=2, least=4)", asks, rows=16)
    # The first prompt is shorter than `least`; the second has its twelve rows in layers 0 and 1, then in 2 and 3, then decodes.
    assert found == [{0: (2, None)}, one | {1: (12, (0, 2))}, one | {1: (12, (2, 4))}, one | {1: (1, None)}, one, one]
    assert passes("layered(groups=4, least=4)", asks, rows=16)[1:5] == [one | {1: (12, (i, i + 1))} for i in range(4)]
    assert passes("fcfs", asks, rows=16) == [{0: (2, None)}, one | {1: (12, None)}, one | {1: (1, None)}, one, one, one]
    # Chunks with as much work in a step as two groups have read each of the four layers twice.
    chunks = passes("fcfs", asks, rows=7)[1:3]
    assert chunks == [one | {1: (6, None)}, one | {1: (6, None)}]
    for policy, rows, times in (("layered(groups=2, least=4)", 16, 1), ("fcfs", 7, 2)):
        read = [step[1][1] or (0, 4) for step in passes(policy, asks, rows=rows)[1:3]]
        assert sum(stop - first for first, stop in read) == 4 * times


CROWD = [(float(i // 3), 3 + 7 * (i % 5), 1 + (5 * i) % 11) for i in range(30)]


def trial(name: str) -> str:
    given = getattr(lookup("schedule", name), "trial", {})
    inside = ", ".join(f"{k}={v!r}" for k, v in given.items()) if isinstance(given, dict) else ""
    return f"{name}({inside})" if inside else name


def test_no_two_schedules_decide_alike() -> None:
    """On one crowd, where each has something to decide."""
    logs = {
        name: json.dumps(steps(trial(name), CROWD, rows=48, urgent=range(0, 30, 7), tenants="abc" * 10, alike=9))
        for name in names("schedule")
        if not lookup("schedule", name).layered  # type: ignore[attr-defined]
    }
    assert len(set(logs.values())) == len(logs), {n: hash(v) for n, v in logs.items()}


WHOLE = [name for name in names("schedule") if not lookup("schedule", name).layered]  # type: ignore[attr-defined]
"""Those whose rows pass all layers in one step; the state machine of tests/core counts the others'."""


@pytest.mark.parametrize("name", WHOLE)
def test_everybody_gets_every_row_once(name: str) -> None:
    total: dict[int, int] = {}
    for step in steps(trial(name), CROWD, rows=48, urgent=range(0, 30, 7), tenants="abc" * 10):
        assert sum(step.values()) <= 48
        for i, n in step.items():
            total[i] = total.get(i, 0) + n
    whole = {i: prompt + output - 1 for i, (_, prompt, output) in enumerate(CROWD)}
    if getattr(lookup("schedule", name), "switches", False):
        # Who yields computes the rows of the block that was not full once more, and the last row: fewer than a block's each time.
        assert all(whole[i] <= n <= whole[i] + 4 * 11 for i, n in total.items())
        assert total != whole
    else:
        assert total == whole


POLICIES = [
    f"{slot}={name}"
    for slot in ("schedule", "route", "place", "cost")
    for name in names(slot)
    if slot != "cost" or hasattr(lookup(slot, name), "claim")
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_a_file_of_40_to_150_lines(policy: str) -> None:
    """Short enough to be read at one sitting beside another one, and long enough to say what it does and where it pays."""
    slot, _, name = policy.partition("=")
    lines = Path(inspect.getfile(lookup(slot, name))).read_text(encoding="utf8").count("\n")
    assert 40 <= lines <= 150


def test_every_policy_says_what_is_claimed_of_it_and_what_came_of_that() -> None:
    done = CliRunner().invoke(app, ["policies", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {tuple(p) for p in found} == {("name", "catalogue", "claim", "simulated", "verdict", "reason")}
    known = {f"{s}={n}" for s in ("schedule", "route", "place") for n in names(s)}
    known |= {f"cost={n}" for n in names("cost") if getattr(lookup("cost", n), "claim", None)}
    assert {p["name"] for p in found} == known
    for policy in found:
        slot, _, name = policy["name"].partition("=")
        null = SLOTS[slot].null == name or name == "round_robin"
        assert (policy["claim"] is None) == null, policy["name"]
        assert policy["verdict"] == "nothing is claimed" if null else policy["verdict"] in ("holds", "does not hold")
        assert null or policy["reason"]
        # Of a claim that does not hold, the numbers are not enough: something more of the simulator's says why.
        assert policy["verdict"] != "does not hold" or ". " in policy["reason"].partition("the claim asks for")[2]
        assert null or policy["simulated"]["goodput"] >= 0
    assert CliRunner().invoke(app, ["policies"]).exit_code == 0
