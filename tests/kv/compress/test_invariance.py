"""A compressed sequence's tokens depend on context and seed: not on chunks, company, preemption, drafts or prefix hits."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import pytest

from tests.exec.conftest import Bench, spec
from weft.exec.build import Runtime
from weft.schedule.fcfs import FCFS
from weft.slots import Quota, RequestView, StepView
from weft.traits import Traits
from weft.types import RequestSpec

MEMBERS = {
    "streaming_llm": "kv.compress=streaming_llm(sinks=4,window=20,every=8)",
    "h2o": "kv.compress=h2o(heavy=12,recent=12,every=8,observe=16)",
    "h2o_all": "kv.compress=h2o(heavy=12,recent=12,every=8,observe=None)",
    "recent": "kv.compress=recent(window=24,every=8)",
    "random": "kv.compress=random(chosen=12,recent=12,every=8,seed=3)",
}
MAIN = ("streaming_llm", "h2o")
"""The others differ from these in what they keep, and are put through the chunks alone."""
COUNT = 8
Answers = dict[tuple[int, int], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallChunks(FCFS):
    """FCFS whose prompts advance by at most `rows` rows in a step."""

    rows: int = 1
    traits: ClassVar[Traits] = Traits()

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(min(step.rows_left, self.rows))


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    """Prompts below, at and far beyond the first cut; half of them with a common beginning; greedy and sampled in turn."""
    rng = random.Random(5)
    out = []
    for i in range(COUNT):
        length = (5, 24, 32, 33, 57, 64, 90, 150)[i]
        start = 0 if i % 2 else rng.randrange(len(ids) - length)
        law = {"temperature": 0.0} if i % 3 == 0 else {"temperature": 0.8, "top_p": 0.95}
        out.append(spec(i, ids[start : start + length], seed=1000 + i, max_tokens=24, **law))
    return out


@pytest.fixture(scope="module")
def alone(runtime: Runtime, specs: Sequence[RequestSpec]) -> Callable[[str], Answers]:
    """Every request alone in its engine, under a technique: what all the tests compare with."""
    made: dict[str, Answers] = {}

    def answers(member: str) -> Answers:
        if member not in made:
            made[member] = {}
            for one in specs:
                made[member].update(Bench(runtime, techniques=[MEMBERS[member]], share=False).run([one]))
        return made[member]

    return answers


def bench(runtime: Runtime, member: str, *more: str, **kw: object) -> Bench:
    return Bench(runtime, techniques=[MEMBERS[member], *more], **kw)  # type: ignore[arg-type]


def dropped(b: Bench) -> int:
    return sum(n for act, n in b.engine.stats.acts.items() if act.endswith("entries_dropped"))


@pytest.mark.parametrize("member", MEMBERS)
def test_compression_is_felt(
    runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str
) -> None:
    assert Bench(runtime, share=False).run(specs) != alone(member)


@pytest.mark.parametrize(
    ("member", "rows"),
    [*((m, rows) for m in MAIN for rows in (1, 16, 512)), ("h2o_all", 5), ("recent", 5), ("random", 5)],
)
def test_in_chunks_and_in_company(
    runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str, rows: int
) -> None:
    b = bench(runtime, member, share=False, policy=SmallChunks(rows=rows))
    assert b.run(specs) == alone(member)
    assert dropped(b) >= 300


@pytest.mark.parametrize("member", MAIN)
def test_with_drafts(runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str) -> None:
    """Guesses that fall and guesses that stand right up to a cut leave no trace."""
    b = bench(runtime, member, "draft=ngram(shortest=1)", share=False)
    assert b.run(specs) == alone(member)
    acts = b.engine.stats.acts
    assert acts["draft=ngram.proposed"] > acts["draft=ngram.accepted"] > 20


@pytest.mark.parametrize("member", [*MAIN, "h2o_all"])
def test_from_a_cached_prefix(
    runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str
) -> None:
    b = bench(runtime, member)
    assert b.run(specs) == alone(member)
    before = b.engine.stats.prefix_hit_tokens
    again = [msgspec.structs.replace(s, id=s.id + COUNT) for s in specs]
    second = b.run(again)
    hits = b.engine.stats.prefix_hit_tokens - before
    assert hits == 0 if member == "h2o_all" else hits >= 32
    assert {k: second[k[0] + COUNT, k[1]] for k in alone(member)} == alone(member)


@pytest.mark.parametrize("drafts", [(), ("draft=ngram(shortest=1)",)], ids=["plain", "drafts"])
@pytest.mark.parametrize("member", MAIN)
def test_after_preemption(
    runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str, drafts: tuple[str, ...]
) -> None:
    """Victims at every step, before, at and after cuts, with and without what the prefix index has of them."""
    rng = random.Random(1)

    def disturb(b: Bench) -> None:
        scheduler = b.engine.scheduler
        if b.steps < 60 and b.steps % 2 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)

    b = bench(runtime, member, *drafts)
    assert b.run(specs, disturb) == alone(member)
    assert b.engine.stats.preemptions > 15


@pytest.mark.parametrize("member", MAIN)
def test_in_a_small_pool(
    runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str
) -> None:
    """Two blocks beyond what one request needs: copies find no room, and nobody is stuck."""
    b = bench(runtime, member, blocks=5)
    assert b.run(specs) == alone(member)


@pytest.mark.parametrize(
    "technique",
    [
        "kv.compress=streaming_llm(sinks=4,window=60,every=16)",
        "kv.compress=h2o(heavy=32,recent=32,every=16,observe=16)",
    ],
)
def test_growth_preempts(runtime: Runtime, ids: list[int], technique: str) -> None:
    """Short prompts enter together and grow to five blocks each, the first cut being at 80: before it and after it there is
    not room for all of them."""
    grow = [
        spec(i, ids[5 * i : 6 * i + 7], seed=i, max_tokens=80, temperature=0.8 * (i % 2), top_p=0.95) for i in range(4)
    ]
    alone: Answers = {}
    for one in grow:
        alone.update(Bench(runtime, techniques=[technique], share=False).run([one]))
    b = Bench(runtime, techniques=[technique], blocks=7)
    assert b.run(grow) == alone
    assert b.engine.stats.preemptions >= 2
    assert dropped(b) >= 16 * len(grow)


@pytest.mark.parametrize("policy", ["prefill_first", "layered(groups=3,least=8)"])
@pytest.mark.parametrize("member", MAIN)
def test_under_other_policies(
    layered_runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str, policy: str
) -> None:
    b = bench(layered_runtime, member, f"schedule={policy}")
    assert b.run(specs) == alone(member)


@pytest.mark.parametrize("member", MAIN)
@pytest.mark.parametrize("length", [20, 32, 33])
def test_sequences_of_one_request(runtime: Runtime, ids: list[int], member: str, length: int) -> None:
    """n = 3 gives what three requests with the children's seeds give, whether the prompt ends before, at or after a cut."""
    from weft.core.noise import child_seed

    law = {"temperature": 1.0, "max_tokens": 30}
    together = bench(runtime, member).run([spec(1, ids[:length], seed=77, n=3, **law)])
    single = bench(runtime, member, share=False).run(
        [spec(i, ids[:length], seed=child_seed(77, i), **law) for i in range(3)]
    )
    assert [together[1, i] for i in range(3)] == [single[i, 0] for i in range(3)]
    assert len({tuple(v) for v in together.values()}) > 1


@pytest.mark.parametrize("member", MAIN)
@pytest.mark.parametrize("at", [3, 9, 14])
def test_a_fork_of_a_compressed_sequence(runtime: Runtime, ids: list[int], member: str, at: int) -> None:
    """The fork goes on from the parent's compressed entries and masses; both answer as if computed from nothing."""
    b = bench(runtime, member)
    law = {"temperature": 0.0, "max_tokens": 40}
    b.engine.add(spec(1, ids[:50], **law), 0.0)
    while len(b.engine.find(1).output) < at:
        plan, _ = b.engine.schedule(0.0)
        b.engine.commit(0.0, plan, b.executor.execute(plan))
    known = list(b.engine.find(1).output)
    b.engine.fork(1, 1)
    assert b.engine.find(1, 1).computed == b.engine.find(1).computed, "the fork shares what the parent has"
    out = b.run([])
    wanted = bench(runtime, member, share=False).run([spec(1, ids[:50], **law)])[1, 0]
    assert known + out[1, 0] == wanted
    assert known + out[1, 1] == wanted


@pytest.mark.parametrize("member", MAIN)
def test_each_request_has_a_stack_of_its_own(
    runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str
) -> None:
    """Compressed and full sequences in one batch, told apart by `techniques` of the requests alone."""
    full = Bench(runtime, share=False).run(specs)
    mixed = [msgspec.structs.replace(s, techniques=(MEMBERS[member],)) if i % 2 else s for i, s in enumerate(specs)]
    out = Bench(runtime).run(mixed)
    assert out == {(i, 0): (alone(member) if i % 2 else full)[i, 0] for i in range(COUNT)}


@pytest.mark.parametrize("member", MAIN)
def test_forced_tokens_are_computed_as_drawn_ones(
    runtime: Runtime, specs: list[RequestSpec], alone: Callable[[str], Answers], member: str
) -> None:
    one = specs[7]
    told = msgspec.structs.replace(one, forced=tuple(alone(member)[7, 0][:20]))
    assert bench(runtime, member).run([told])[7, 0] == alone(member)[7, 0]
