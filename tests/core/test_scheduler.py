"""The scheduler by hand: which rows each step computes, and why no others.  Tokens come from an executor with hash-chain KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.core.noise import child_seed
from weft.core.request import every
from weft.errors import CapacityError, InvariantError, RequestError
from weft.exec.null import NullExecutor, draw, reference, step
from weft.slots import Guesses
from weft.types import (
    Event,
    Finished,
    GroupKind,
    GroupSpec,
    Keep,
    Plan,
    Preempted,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
    Work,
)

VOCAB = 256
FULL = GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=1, block_tokens=4)
PARKED = GroupSpec(name="parked", kind=GroupKind.PARKED, layers=(0,), entry_bytes=1, block_tokens=4)

Rows = tuple[int, int, int]
"""(request id, start, stop)"""


class Guesser(NullExecutor):
    """Proposes `guesses` drafts after each token, all of them right; a wrong one at index `wrong`."""

    guesses = 0
    wrong: int | None = None

    def propose(self, work: Work, state: int, output: int) -> Guesses:
        s, out = self.mirror.sequences[work.request], []
        for i in range(self.guesses):
            token = draw(state, s.sampling, s.seed, output + i, VOCAB)
            out.append(token if i != self.wrong else (token + 1) % VOCAB)
            state = step(state, token)
        return Guesses(out)


class Bench:
    """An engine and its executor, stepped by hand; `rows` is what each plan said, `events` all that happened."""

    def __init__(
        self, *, blocks: int = 64, policy: str = "fcfs", layers: int = 1, share: bool = False, guesses: int = 0,
        cuts: Sequence[Callable[[int, int], int | None]] = (), **limits: int,
    ) -> None:  # fmt: skip
        groups = [FULL, PARKED] if policy.startswith("layered") else [FULL]
        self.limits = Limits(**({"max_model_len": 64} | limits))
        self.engine = Engine(
            groups, blocks, self.limits, build_stack([f"schedule={policy}"]), layers=layers, share=share, vocab=VOCAB, cuts=cuts
        )  # fmt: skip
        self.executor = Guesser(groups, vocab=VOCAB, layers=layers)
        self.executor.guesses = guesses
        self.specs: dict[int, RequestSpec] = {}
        self.events: list[Event] = []
        self.plan = Plan(step=0)
        self.now = 0.0

    def add(self, id: int, prompt: int, max_tokens: int = 8, **changes: Any) -> None:
        """`prompt` tokens of its own."""
        sampling = SamplingSpec(max_tokens=max_tokens, prompt_logprobs=changes.pop("prompt_logprobs", -1))
        items = (TokenItem(tuple((11 * id + 3 * i) % VOCAB for i in range(prompt))),)
        self.specs[id] = RequestSpec(id=id, items=items, sampling=sampling, seed=id, **changes)
        assert self.engine.add(self.specs[id], self.now) == []

    def step(self) -> list[Rows]:
        """One step; what it computed, in the plan's order."""
        self.now += 1.0
        names = {r.rid: r.id for r in self.engine.requests()}
        self.plan, events = self.engine.schedule(self.now)
        self.events += [*events, *self.engine.commit(self.now, self.plan, self.executor.execute(self.plan))]
        self.engine.check()
        assert self.plan.rows == sum(w.count for w in self.plan.works) <= self.limits.max_rows
        assert self.plan.samples <= self.limits.max_samples
        return [(names[w.request], w.start, w.stop) for w in self.plan.works]

    def steps(self, count: int) -> list[list[Rows]]:
        return [self.step() for _ in range(count)]

    def finish(self, most: int = 500) -> list[list[Rows]]:
        """Step until nobody is left; every output is then what the reference says."""
        out: list[list[Rows]] = []
        while self.engine.has_work:
            assert len(out) < most, "this never ends"
            out.append(self.step())
        for id, spec in self.specs.items():
            (item,) = spec.items
            assert isinstance(item, TokenItem)
            for i in range(spec.n):
                assert self.output(id, i) == reference(item.ids, spec.sampling, child_seed(spec.seed, i), VOCAB)
        assert self.engine.stats.kv_blocks_referenced == 0
        return out

    def output(self, id: int, index: int = 0) -> list[int]:
        return [t for e in self.events if isinstance(e, Tokens) and (e.id, e.index) == (id, index) for t in e.tokens]

    def of(self, kind: type) -> list[int]:
        return [e.id for e in self.events if isinstance(e, kind)]  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- order


def test_sarathi_order_step_by_step() -> None:
    """A prompt of 3, one of 12 and one of 4 under a budget of 8 rows."""
    b = Bench(max_rows=8)
    b.add(1, 3, max_tokens=3)
    b.add(2, 12, max_tokens=3)
    b.add(3, 4, max_tokens=3)
    assert b.finish() == [
        [(1, 0, 3), (2, 0, 5)],  # 2 gets what 1 leaves, 3 nothing
        [(1, 3, 4), (2, 5, 12)],  # the decode, then the half-done prompt
        [(1, 4, 5), (2, 12, 13), (3, 0, 4)],  # decodes, then the new prompt
        [(2, 13, 14), (3, 4, 5)],
        [(3, 5, 6)],
        [],  # the executor is told that everybody left
    ]
    assert b.of(Finished) == [1, 2, 3]


def test_only_the_row_after_which_a_token_comes_is_sampled() -> None:
    b = Bench(max_rows=8)
    b.add(1, 3)
    b.add(2, 12)
    b.step()
    assert [(w.samples, w.output) for w in b.plan.works] == [(True, 0), (False, 0)]
    assert b.plan.samples == 1
    b.step()
    assert [(w.samples, w.output) for w in b.plan.works] == [(True, 1), (True, 0)]
    assert (b.plan.rows, b.plan.samples, b.plan.blocks) == (8, 2, 1)  # 2's third block; 1 fills its first


def test_decodes_go_before_half_done_prompts_of_higher_priority_and_those_before_new_ones() -> None:
    b = Bench(max_rows=8)
    b.add(1, 20, priority=1)
    b.add(2, 2, priority=0)
    assert b.step() == [(2, 0, 2), (1, 0, 6)]
    b.add(3, 9, priority=-5)
    assert b.step() == [(2, 2, 3), (1, 6, 13)]
    assert b.step() == [(2, 3, 4), (1, 13, 20)]
    assert b.step() == [(2, 4, 5), (1, 20, 21), (3, 0, 6)]  # both decode: by priority
    assert b.step()[0] == (2, 5, 6)
    b.finish()


def test_prefill_first_computes_new_prompts_and_lets_decodes_wait() -> None:
    b = Bench(max_rows=8, policy="prefill_first")
    b.add(1, 3, max_tokens=3)
    b.add(2, 12, max_tokens=3)
    b.add(3, 4, max_tokens=3)
    assert b.finish() == [
        [(1, 0, 3), (2, 0, 5)],
        [(3, 0, 4), (2, 5, 9)],  # the new prompt, then the half-done one; no decode
        [(2, 9, 12)],  # five rows are left, and still no decode beside a prompt
        [(1, 3, 4), (2, 12, 13), (3, 4, 5)],
        [(1, 4, 5), (2, 13, 14), (3, 5, 6)],
        [],
    ]


def test_layered_takes_a_prompt_through_groups_of_layers_beside_all_decodes() -> None:
    b = Bench(max_rows=16, policy="layered(groups=2, least=4)", layers=4)
    b.add(1, 3, max_tokens=4)
    b.add(2, 8, max_tokens=2)

    def works() -> list[tuple[int, int, int, Any, bool]]:
        rows = b.step()
        return [(*r, w.layers, w.samples) for r, w in zip(rows, b.plan.works, strict=True)]

    assert works() == [(1, 0, 3, None, True), (2, 0, 8, (0, 2), False)]  # fewer than 4 rows go whole
    assert works() == [(2, 0, 8, (2, 4), True), (1, 3, 4, None, True)]
    assert works() == [(1, 4, 5, None, True), (2, 8, 9, None, True)]
    b.finish()


def test_layered_needs_all_steps_of_a_prompt_for_each_chunk() -> None:
    b = Bench(max_rows=6, policy="layered(groups=3, least=2)", layers=4)
    b.add(1, 10, max_tokens=1)
    rows = [(b.step(), [w.layers for w in b.plan.works]) for _ in range(4)]
    assert rows == [
        ([(1, 0, 6)], [(0, 2)]),
        ([(1, 0, 6)], [(2, 4)]),
        ([(1, 6, 10)], [(0, 2)]),
        ([(1, 6, 10)], [(2, 4)]),
    ]
    b.finish()


def split(b: Bench) -> int:
    return b.engine.stats.acts["schedule=layered.prompts_split"]


def test_layered_counts_each_prompt_that_passes_in_parts_once() -> None:
    """In however many chunks and steps without room, and though some of it go whole; not one that is short, and no decode."""
    b = Bench(max_rows=6, policy="layered(groups=2, least=3)", layers=4)
    b.add(1, 10, max_tokens=3)  # 6 rows in parts, 4 in parts
    b.add(2, 8, max_tokens=3)  # waits for rows; 6 rows in parts, 2 whole
    b.add(3, 2, max_tokens=3)
    b.finish()
    assert split(b) == 2
    tight = Bench(blocks=12, max_rows=6, policy="layered(groups=2, least=3)", layers=4)
    for id in range(1, 7):
        tight.add(id, 2 + id, max_tokens=20, priority=id % 2)
    tight.finish()
    assert tight.engine.stats.preemptions > 0
    assert split(tight) == 6, "what is computed again counted as a prompt"
    whole = Bench(max_rows=6, policy="layered(groups=1, least=3)", layers=4)
    whole.add(1, 10, max_tokens=3)
    whole.finish()
    assert split(whole) == 0


# ---------------------------------------------------------------------------------------------- budgets


def test_a_prompt_is_cut_into_chunks_of_the_row_budget() -> None:
    b = Bench(max_rows=4)
    b.add(1, 10, max_tokens=2)
    assert b.finish() == [[(1, 0, 4)], [(1, 4, 8)], [(1, 8, 10)], [(1, 10, 11)], []]


def test_more_decodes_than_rows_take_turns_by_arrival() -> None:
    b = Bench(max_rows=2)
    for id in (1, 2, 3):
        b.add(id, 1, max_tokens=3)
    assert b.finish() == [
        [(1, 0, 1), (2, 0, 1)], [(1, 1, 2), (2, 1, 2)], [(1, 2, 3), (2, 2, 3)], [(3, 0, 1)], [(3, 1, 2)], [(3, 2, 3)], [],
    ]  # fmt: skip


def test_rows_are_computed_up_to_the_one_that_there_are_no_logits_for() -> None:
    b = Bench(max_samples=2)
    for id in (1, 2, 3):
        b.add(id, 2, max_tokens=2)
    assert b.finish() == [[(1, 0, 2), (2, 0, 2), (3, 0, 1)], [(1, 2, 3), (2, 2, 3)], [(3, 1, 2)], [(3, 2, 3)], []]


def test_prompt_logprobs_need_logits_too() -> None:
    b = Bench(max_samples=3)
    b.add(1, 6, max_tokens=1, prompt_logprobs=0)
    assert b.step() == [(1, 0, 3)]
    assert (b.plan.works[0].prompt_rows, b.plan.samples) == (3, 3)
    assert b.step() == [(1, 3, 6)]  # rows 3 and 4 tell of tokens 4 and 5; row 5 is sampled
    assert (b.plan.works[0].prompt_rows, b.plan.works[0].samples, b.plan.samples) == (2, True, 3)


def test_the_workspace_bounds_a_step() -> None:
    b = Bench(row_bytes=10, sample_bytes=25, work_bytes=65)
    b.add(1, 10, max_tokens=2)
    b.add(2, 3, max_tokens=2)
    steps = [(b.step(), b.plan.work_bytes) for _ in range(4)]
    assert steps == [
        ([(1, 0, 6)], 60),
        ([(1, 6, 10)], 65),
        ([(1, 10, 11), (2, 0, 2)], 35 + 20),  # no room for 2's logits
        ([(2, 2, 3)], 35),
    ]
    b.finish()


def test_no_more_sequences_than_max_num_seqs_and_the_best_priority_enters_next() -> None:
    b = Bench(max_num_seqs=2)
    for id, most in ((1, 4), (2, 2)):
        b.add(id, 2, max_tokens=most)
    assert b.step() == [(1, 0, 2), (2, 0, 2)]
    b.add(3, 2, max_tokens=1, priority=5)
    b.add(4, 2, max_tokens=1, priority=0)
    assert b.steps(4) == [
        [(1, 2, 3), (2, 2, 3)],
        [(1, 3, 4), (4, 0, 2)],
        [(1, 4, 5), (3, 0, 2)],
        [],
    ]
    assert b.of(Finished) == [2, 4, 1, 3]


def test_fan_out_shares_the_prompt_and_each_sequence_draws_its_own() -> None:
    b = Bench()
    b.add(1, 6, max_tokens=3, n=3)
    assert b.step() == [(1, 0, 6)]
    assert b.engine.pool.referenced == 2
    # The first goes on; the others compute the prompt's last row again for its logits.
    assert sorted(b.step()) == [(1, 5, 6), (1, 5, 6), (1, 6, 7)]
    b.finish()
    assert len({tuple(b.output(1, i)) for i in range(3)}) == 3


# ---------------------------------------------------------------------------------------------- admission and room


def test_whoever_enters_has_room_for_its_prompt_and_a_block_for_each_who_runs() -> None:
    b = Bench(blocks=6)
    b.add(1, 8, max_tokens=4)
    b.add(2, 12, max_tokens=1)
    assert b.step() == [(1, 0, 8), (2, 0, 12)]  # 2 + 3 blocks, and one more for the first
    b.finish()


def test_a_request_that_must_wait_is_not_overtaken() -> None:
    b = Bench(blocks=6)
    b.add(1, 8, max_tokens=4)
    b.add(2, 13, max_tokens=1)  # a block too many
    b.add(3, 1, max_tokens=1)  # would fit
    assert [len(rows) for rows in b.steps(4)] == [1, 1, 1, 1]
    assert b.step() == [(2, 0, 13), (3, 0, 1)]
    b.finish()


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    b = Bench(blocks=3)
    b.add(1, 8, max_tokens=4)
    (refused,) = b.engine.add(RequestSpec(id=2, items=(TokenItem((1,) * 9),), sampling=SamplingSpec(max_tokens=4)), 0.0)
    assert isinstance(refused, Rejected)
    assert refused.kind == "capacity"
    assert "may reach 13 tokens = 4 KV blocks, but the pool has 3" in refused.message
    b.finish()


def test_prefix_hits_are_not_computed_again() -> None:
    b = Bench(share=True)
    b.add(1, 10, max_tokens=2)
    b.finish()
    b.specs[2] = RequestSpec(id=2, items=b.specs[1].items, sampling=SamplingSpec(max_tokens=2), seed=9)
    assert b.engine.add(b.specs[2], b.now) == []
    assert b.step() == [(2, 8, 10)]
    b.finish()
    assert [e.cached_tokens for e in b.events if isinstance(e, Finished)] == [0, 8]
    stats = b.engine.stats
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens, stats.prompt_tokens) == (8, 20, 12)


# ---------------------------------------------------------------------------------------------- who yields


def test_the_younger_waits_and_then_yields_to_the_oldest() -> None:
    """Both hold 2 blocks of 5 after position 4; the oldest takes the fifth at 8, and the younger's at 12."""
    b = Bench(blocks=5)
    b.add(1, 4, max_tokens=10)
    b.add(2, 4, max_tokens=10)
    assert b.steps(5)[-1] == [(1, 7, 8), (2, 7, 8)]
    assert b.steps(4) == [[(1, 8, 9)], [(1, 9, 10)], [(1, 10, 11)], [(1, 11, 12)]]
    assert b.of(Preempted) == []
    assert b.step() == [(1, 12, 13)]
    assert b.of(Preempted) == [2]
    assert b.engine.stats.preemptions == 1
    assert b.step() == [(2, 0, 9)]  # its output so far is computed again in one go, not sampled again
    assert b.plan.works[0].output == 5
    b.finish()


def test_the_oldest_never_yields_whatever_its_priority() -> None:
    b = Bench(blocks=5)
    b.add(1, 3, max_tokens=12, priority=9)
    b.add(2, 3, max_tokens=12, priority=0)
    b.add(3, 3, max_tokens=12, priority=5)
    b.finish()
    victims = b.of(Preempted)
    assert victims[0] == 3  # the lowest priority among those who may yield
    assert 1 not in victims


@pytest.mark.parametrize(("second", "third", "victim"), [(5, 0, 2), (0, 5, 3)])
def test_the_lowest_priority_yields_and_that_may_be_the_needy_one(second: int, third: int, victim: int) -> None:
    """In step 7 the first takes the last block of 10; the second, a decode, needs one, and the third is a half-done prompt."""
    b = Bench(blocks=10, max_rows=6)
    b.add(1, 3, max_tokens=12)
    b.add(2, 3, max_tokens=12, priority=second)
    assert b.step() == [(1, 0, 3), (2, 0, 3)]
    b.add(3, 24, max_tokens=2, priority=third)
    assert b.steps(5)[-1] == [(1, 7, 8), (2, 7, 8), (3, 16, 20)]
    assert (b.engine.pool.available, b.of(Preempted)) == (1, [])
    assert b.step() == [(1, 8, 9), (3, 20, 24) if victim == 2 else (2, 8, 9)]
    assert b.of(Preempted) == [victim]
    b.finish()


@pytest.mark.parametrize("policy", ["fcfs", "prefill_first", "layered(groups=2, least=3)"])
@pytest.mark.parametrize("blocks", [9, 12])
def test_preempted_requests_recompute_the_same(policy: str, blocks: int) -> None:
    b = Bench(blocks=blocks, policy=policy, layers=2, max_rows=6, share=True)
    for id in range(1, 7):
        b.add(id, 1 + id, max_tokens=20, priority=id % 2)
    b.finish()
    assert b.engine.stats.preemptions > 0


# ---------------------------------------------------------------------------------------------- drafts


def test_right_guesses_stand_and_wrong_ones_do_not() -> None:
    b = Bench(guesses=3)
    b.add(1, 4, max_tokens=12)
    assert b.steps(2) == [[(1, 0, 4)], [(1, 4, 8)]]
    work = b.plan.works[0]
    assert (work.guesses, work.keep, work.samples, b.plan.samples) == (3, Keep.ACCEPT, True, 4)
    assert len(b.output(1)) == 5
    assert b.step() == [(1, 8, 12)]
    b.finish()
    b = Bench(guesses=3)
    b.executor.wrong = 1
    b.add(1, 4, max_tokens=12)
    assert b.steps(3) == [[(1, 0, 4)], [(1, 4, 8)], [(1, 6, 10)]]  # one guess stands, and the token after it
    b.finish()


@pytest.mark.parametrize(
    ("limits", "max_tokens", "rows"),
    [
        ({}, 12, (4, 10)),
        ({"max_guesses": 2}, 12, (4, 7)),
        ({"max_guesses": 0}, 12, (4, 5)),
        ({"max_rows": 4}, 12, (4, 8)),
        ({"max_samples": 3}, 12, (4, 7)),
        ({}, 4, (4, 7)),  # one token is there; two guesses and the one after them end it
        ({"max_model_len": 7}, 12, (4, 6)),  # position 6 is the last
        ({"row_bytes": 10, "sample_bytes": 5, "work_bytes": 45}, 12, (4, 7)),
    ],
)
def test_drafts_are_clipped(limits: dict[str, Any], max_tokens: int, rows: tuple[int, int]) -> None:
    b = Bench(guesses=5, **limits)
    b.add(1, 4, max_tokens=max_tokens)
    b.step()
    while not b.output(1):
        b.step()
    assert b.step() == [(1, *rows)]


def test_guesses_never_take_a_row_or_a_sample_from_another_who_runs() -> None:
    b = Bench(guesses=5, max_rows=6)
    b.add(1, 2, max_tokens=20)
    b.add(2, 2, max_tokens=20)
    b.add(3, 2, max_tokens=20)
    b.step()
    assert b.step() == [(1, 2, 6), (2, 2, 3), (3, 2, 3)]  # 3 guesses: a row is kept for each of the others
    b = Bench(guesses=5, max_samples=4)
    b.add(1, 2, max_tokens=20)
    b.add(2, 2, max_tokens=20)
    b.step()
    assert b.step() == [(1, 2, 5), (2, 2, 3)]


def test_nobody_is_preempted_for_a_guess() -> None:
    b = Bench(blocks=3, guesses=3)
    b.add(1, 3, max_tokens=6)
    b.add(2, 3, max_tokens=5)
    b.step()
    # The first takes the last free block for its guesses, the second has none and goes on without.
    assert b.step() == [(1, 3, 7), (2, 3, 4)]
    assert b.plan.works[1].guesses == 0
    assert b.of(Preempted) == []
    b.finish()
    b = Bench(blocks=3, guesses=5)
    b.add(1, 3, max_tokens=7)
    b.add(2, 3, max_tokens=5)
    b.step()
    # Five guesses of the first would take two blocks, and one is free; the second could yield, but not for guesses.
    assert b.step() == [(1, 3, 4), (2, 3, 7)]
    assert b.of(Preempted) == []
    b.finish()


# ---------------------------------------------------------------------------------------------- cuts


def test_no_work_crosses_a_cut() -> None:
    b = Bench(cuts=[lambda prompt, at: 5 if at < 5 else 12 if at < 12 else None], guesses=4)
    b.add(1, 10, max_tokens=9)
    rows = b.finish()
    assert rows[:3] == [[(1, 0, 5)], [(1, 5, 10)], [(1, 10, 12)]]  # of the guesses, one fits before the cut
    assert rows[3] == [(1, 12, 17)]


def test_of_several_cut_rules_the_nearest_holds() -> None:
    rule = every([lambda prompt, at: 8 if at < 8 else None, lambda prompt, at: at + 3, lambda prompt, at: None])
    assert rule is not None
    assert [rule(20, at) for at in (0, 5, 6, 8)] == [3, 8, 8, 11]
    only = lambda prompt, at: None
    assert every([only]) is only
    assert every([]) is None


def test_a_cut_rule_that_stands_still_is_a_bug() -> None:
    b = Bench(cuts=[lambda prompt, at: 3])
    b.add(1, 10)
    b.step()
    with pytest.raises(InvariantError, match="gave 3 as the next cut after 3"):
        b.engine.schedule(9.0)


# ---------------------------------------------------------------------------------------------- links and parking


def test_linked_requests_sample_in_one_step_the_same_token() -> None:
    b = Bench(max_rows=4)
    b.add(1, 3, max_tokens=4)
    b.add(2, 6, max_tokens=4)
    assert b.engine.link([(1, 0), (2, 0)]) == 1
    last: dict[int, int] = {1: 3, 2: 6}
    together = []
    while b.engine.has_work:
        rows = b.step()
        final = {id for id, _, stop in rows if stop >= last[id]}
        assert final in (set(), {1, 2})
        assert all(w.samples == bool(final) and w.link == 1 for w in b.plan.works)
        together.append(rows)
    assert sorted(together[-2]) == [(1, 5, 6), (2, 8, 9)]
    assert len(b.output(1)) == 4
    assert b.output(1) == b.output(2)


def test_linked_requests_park_and_resume_as_one_and_keep_their_kv() -> None:
    b = Bench()
    for id in (1, 2, 3):
        b.add(id, 4, max_tokens=9)
    b.step()
    b.engine.link([(1, 0), (2, 0)])
    assert b.step() == [(1, 4, 5), (2, 4, 5), (3, 4, 5)]
    b.engine.park(2)
    assert b.step() == [(3, 5, 6)]
    assert b.engine.pool.referenced == 6
    b.engine.resume(1)
    assert b.step() == [(1, 5, 6), (2, 5, 6), (3, 6, 7)]


def test_what_cannot_be_linked_or_resumed() -> None:
    b = Bench(max_num_seqs=2)
    for id in (1, 2, 3):
        b.add(id, 4)
    with pytest.raises(RequestError, match="at least two different"):
        b.engine.link([(1, 0), (1, 0)])
    with pytest.raises(CapacityError, match="3 linked sequences exceed what one step samples"):
        b.engine.link([(1, 0), (2, 0), (3, 0)])
    with pytest.raises(RequestError, match="is not parked"):
        b.engine.resume(1)
    b.engine.park(1)
    with pytest.raises(RequestError, match="parked sequence cannot be linked"):
        b.engine.link([(1, 0), (2, 0)])


def test_a_parked_request_goes_on_where_it_stood() -> None:
    b = Bench()
    b.add(1, 4, max_tokens=4)
    b.steps(2)
    b.engine.park(1)
    assert b.steps(2) == [[], []]
    assert b.engine.pool.referenced == 2
    b.engine.resume(1)
    assert b.step() == [(1, 5, 6)]
    b.finish()


def test_a_parked_request_keeps_its_kv_only_while_nobody_needs_it() -> None:
    b = Bench(blocks=4)
    b.add(1, 4, max_tokens=4)
    b.steps(2)
    b.engine.park(1)
    b.add(2, 9, max_tokens=5)  # 3 blocks; one more at position 12
    assert b.engine.pool.available == 2
    assert b.step() == [(2, 0, 9)]
    while 2 not in b.of(Finished):
        b.step()
    assert b.engine.pool.referenced == 0
    b.engine.resume(1)
    assert b.step() == [(1, 0, 6)]
    assert b.of(Preempted) == []
    b.finish()


def test_room_for_a_newcomer_is_taken_from_the_parked_before_it_enters() -> None:
    b = Bench(blocks=8)
    b.add(1, 4, max_tokens=6)
    b.steps(2)
    b.engine.park(1)
    b.add(2, 5, max_tokens=7)
    assert b.step() == [(2, 0, 5)]
    b.add(3, 16, max_tokens=2)  # 4 blocks, and one more for the second: one too many
    assert b.engine.pool.available == 4
    assert b.step() == [(2, 5, 6)]
    assert b.engine.pool.available == 6
    assert b.step() == [(2, 6, 7), (3, 0, 16)]
    b.engine.resume(1)
    b.finish()
