"""Search programs in the core: who hears what, what may be done to sequences, and that nobody is left behind.

The engine runs over hash-chain KV that audits every entry, so a fork or a replaced token that reads the wrong block shows.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.core.world import LAYERS, MAX_LEN, VOCAB, Executor, cut_rule, groups
from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.core.noise import child_seed
from weft.errors import EngineError, RequestError
from weft.exec.null import EMPTY, draw, logprob, step
from weft.slots import SearchView
from weft.types import (
    Action,
    Append,
    Event,
    Finished,
    Fork,
    Park,
    Preempted,
    Put,
    Rejected,
    RequestSpec,
    Resume,
    SamplingSpec,
    Stop,
    Tell,
    TokenItem,
    Tokens,
    Truncate,
)

Step = Callable[[Sequence[Tokens | Finished]], Sequence[Action]]


@dataclass
class Scripted:
    """A search whose program is a function."""

    body: Step
    sequences: int = 1
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    refuses: str = ""

    def begin(self, request: SearchView) -> Scripted:
        if self.refuses:
            raise RequestError(self.refuses, param="n")
        self.view = request
        return self

    def step(self, events: Sequence[Tokens | Finished]) -> Sequence[Action]:
        return self.body(events)


@dataclass
class World:
    """An engine, its executor, everything that was told."""

    techniques: Sequence[str] = ()
    search: Any = None
    blocks: int = 64
    flights: int = 1
    share: bool = True
    cut: Any = None
    seed: int = 0
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stack = build_stack(self.techniques)
        if self.search is not None:
            stack = replace(stack, instances={**stack.instances, "search": self.search})
        kinds = groups()
        bounds = Limits(**{"max_model_len": MAX_LEN, "max_num_seqs": 6, "max_rows": 8, "max_samples": 6, **self.limits})
        cuts = () if self.cut is None else (self.cut,)
        self.engine = Engine(
            kinds, self.blocks, bounds, stack, layers=LAYERS, vocab=VOCAB, in_flight=self.flights, share=self.share, cuts=cuts
        )  # fmt: skip
        self.executor = Executor(kinds, random.Random(self.seed), cut=self.cut)
        self.told: list[Event] = []
        self.peak = 0
        self.now = 0.0

    def add(self, spec: RequestSpec) -> None:
        self.told += self.engine.add(spec, self.now)

    def step(self) -> None:
        """Submit as many plans as may be in flight, then commit them in order."""
        flying = deque()
        for _ in range(self.flights):
            self.now += 1.0
            for r in self.engine.requests():
                self.executor.salts[r.rid] = r.spec.salt
            plan, events = self.engine.schedule(self.now)
            self.told += events
            flying.append(plan)
        for plan in flying:
            self.told += self.engine.commit(self.now, plan, self.executor.execute(plan))
            self.engine.check()
            self.peak = max(self.peak, self.engine.pool.referenced)

    def run(self, *specs: RequestSpec, most: int = 3000) -> dict[tuple[int, int], list[int]]:
        for spec in specs:
            self.add(spec)
        for _ in range(most):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, f"not done: {self.engine.stats}"
        assert (self.engine.pool.referenced, self.engine.pool.limbo) == (0, 0)
        assert not self.engine.told()
        out: dict[tuple[int, int], list[int]] = {}
        for event in self.told:
            assert not isinstance(event, Rejected), event
            if isinstance(event, Tokens):
                out.setdefault((event.id, event.index), []).extend(event.tokens)
        return out

    def ends(self) -> dict[tuple[int, int], Finished]:
        return {(e.id, e.index): e for e in self.told if isinstance(e, Finished)}


def spec(id: int, prompt: int, *, n: int = 1, companions: Sequence[int] = (), **law: Any) -> RequestSpec:
    ids = tuple((id + 5 * i + i * i) % VOCAB for i in range(prompt))
    others = tuple((TokenItem(tuple((3 * id + 7 * i) % VOCAB for i in range(size))),) for size in companions)
    return RequestSpec(id=id, items=(TokenItem(ids),), sampling=SamplingSpec(**law), seed=id, n=n, companions=others)


def chain(ids: Sequence[int]) -> int:
    state = EMPTY
    for i in ids:
        state = step(state, i)
    return state


# ---------------------------------------------------------------------------------------------- the driver


def test_the_client_hears_what_the_program_tells_and_nothing_else() -> None:
    heard: list[Tokens | Finished] = []

    def body(events: Sequence[Tokens | Finished]) -> list[Action]:
        heard.extend(events)
        drawn = [t for e in heard if isinstance(e, Tokens) and e.index == 1 for t in e.tokens]
        if len(drawn) < 4:
            return []
        return [Tell(0, (drawn[0],)), Tell(0, tuple(drawn[1:3]), reason="stop", stop_id=drawn[2])]

    world = World(search=Scripted(body, sequences=3, sampling=SamplingSpec(max_tokens=9)))
    out = world.run(spec(1, 6, max_tokens=5))
    plain = World().run(spec(1, 6, n=3, max_tokens=9))
    assert out == {(1, 0): plain[1, 1][:3]}
    (end,) = world.ends().values()
    assert (end.index, end.reason, end.stop_id) == (0, "stop", plain[1, 1][2])
    drawn = sum(len(e.tokens) for e in heard if isinstance(e, Tokens))
    assert end.discarded == drawn - 3 > 3
    assert world.search.view == SearchView(1, 6, 5, SamplingSpec(max_tokens=5))


def test_prompt_logprobs_and_cached_tokens_reach_the_client_through_a_search() -> None:
    world = World(techniques=["search=best_of_n(n=2)"])
    world.run(spec(1, 20, max_tokens=3))
    world.run(spec(1, 20, max_tokens=3, prompt_logprobs=0))
    assert [p.logprob for e in world.told if isinstance(e, Tokens) for p in e.prompt_logprobs] == list(range(1, 20))
    assert world.ends()[1, 0].cached_tokens == 0, "prompt logprobs have to be computed"
    world.told.clear()
    world.run(spec(1, 20, max_tokens=3))
    assert world.ends()[1, 0].cached_tokens >= 12


def test_a_search_that_refuses_answers_wrongly_or_fails_ends_its_request_alone() -> None:
    def broken(events: Sequence[Tokens | Finished]) -> list[Action]:
        raise EngineError("no idea")

    def silent(events: Sequence[Tokens | Finished]) -> list[Action]:
        return []

    def wrong(events: Sequence[Tokens | Finished]) -> list[Action]:
        return [Put(0, (VOCAB + 3,), 1)]

    for body, text in ((broken, "no idea"), (silent, "no sequence left"), (wrong, "outside the vocabulary")):
        world = World(search=Scripted(body, sampling=SamplingSpec(max_tokens=3)))
        world.run(spec(1, 5, n=2), spec(2, 5))
        ends = world.ends()
        assert sorted(ends) == [(1, 0), (1, 1), (2, 0)]
        assert all(e.reason == "error" and text in str(e.error) for e in ends.values())
    world = World(search=Scripted(silent, refuses="not this one"))
    world.add(spec(1, 5))
    assert [(e.message, e.param) for e in world.told if isinstance(e, Rejected)] == [("not this one", "n")]
    world = World(techniques=["search=beam"])
    world.add(replace_resumed(spec(1, 5)))
    assert "not resumed" in world.told[0].message
    assert not world.engine.has_work
    assert not world.engine.told()


def replace_resumed(one: RequestSpec) -> RequestSpec:
    return RequestSpec(id=one.id, items=one.items, sampling=one.sampling, resumed=(1, 2))


def test_the_failure_of_one_sequence_is_the_requests_own() -> None:
    world = World(techniques=["search=best_of_n(n=3)"])
    world.add(spec(1, 5, max_tokens=9))
    world.step()
    world.step()
    world.executor.failing.add(world.engine.find(1, 2).rid)
    world.run()
    end = world.ends()[1, 0]
    assert (end.reason, end.error) == ("error", "told to fail")


@pytest.mark.parametrize("index", [None, 0])
def test_a_client_that_leaves_ends_the_search(index: int | None) -> None:
    world = World(techniques=["search=beam(width=3)"])
    world.add(spec(1, 9, max_tokens=20))
    for _ in range(6):
        world.step()
    assert len(world.engine.requests()) == 3
    assert world.engine.told() == [(1, 0)]
    assert world.engine.cancel(1, index)
    assert not world.engine.cancel(1)
    assert not world.engine.requests()
    world.run()
    assert not world.told


def test_of_several_outputs_one_can_be_cancelled() -> None:
    world = World(techniques=["search=best_of_n(n=4)"])
    world.add(spec(1, 9, n=2, max_tokens=5))
    world.step()
    assert world.engine.cancel(1, 1)
    assert not world.engine.cancel(1, 1)
    out = world.run()
    assert list(out) == [(1, 0)]


def test_every_action_does_what_it_says() -> None:
    """Own words, a step back, a pause, a fork and a replaced token, each checked by the tokens that follow."""
    seen: list[tuple[int, int]] = []
    done: list[str] = []

    def body(events: Sequence[Tokens | Finished]) -> list[Action]:
        seen.extend((e.index, t) for e in events if isinstance(e, Tokens) for t in e.tokens)
        script: list[tuple[str, list[Action]]] = [
            ("append", [Append(0, (7, 7))]),
            ("fork", [Fork(0, 1), Put(1, (2, 3), 1), Park(0)]),
            ("truncate", [Truncate(1, 7), Resume(0)]),
            ("stop", [Stop(1)]),
            ("tell", [Tell(0, (1,), reason="length")]),
        ]
        word, actions = script[len(done)]
        done.append(word)
        return actions

    world = World(search=Scripted(body, sampling=SamplingSpec(max_tokens=30, temperature=0.0)))
    world.run(spec(1, 6))
    assert done == ["append", "fork", "truncate", "stop", "tell"]
    prompt = [(1 + 5 * i + i * i) % VOCAB for i in range(6)]
    law = SamplingSpec(temperature=0.0)

    def after(ids: Sequence[int]) -> int:
        return draw(chain(ids), law, 0, 0, VOCAB)

    a = after(prompt)
    b = after([*prompt, a, 7, 7])
    fork = [*prompt, a, 7, 7, 2, 3]
    assert seen[:3] == [(0, a), (0, b), (1, after(fork))]
    assert sorted(seen[3:5]) == [(0, after([*prompt, a, 7, 7, b])), (1, after([*prompt, a]))]


@pytest.mark.parametrize("flights", [1, 2])
def test_tokens_that_were_computed_already_are_replaced(flights: int) -> None:
    """The last three of five, by one, two or none: their KV is given up, and every draw is the one that the new text has."""
    law = SamplingSpec(temperature=0.0, max_tokens=30)
    prompt = [(1 + 5 * i + i * i) % VOCAB for i in range(6)]
    for instead in ((7,), (2, 3), ()):
        seen: list[int] = []

        def body(
            events: Sequence[Tokens | Finished], seen: list[int] = seen, instead: tuple[int, ...] = instead
        ) -> list[Action]:
            seen.extend(t for e in events if isinstance(e, Tokens) for t in e.tokens)
            if len(seen) == 5:
                return [Put(0, instead, 3)]
            return [Tell(0, (1,), reason="length")] if len(seen) == 8 else []

        World(search=Scripted(body, sampling=law), flights=flights).run(spec(1, 6))
        text = [*prompt, *seen[:2], *instead]
        for token in seen[5:]:
            assert token == draw(chain(text), law, 0, 0, VOCAB)
            text.append(token)


def test_what_put_refuses() -> None:
    world = World()
    world.add(spec(1, 6, max_tokens=5))
    world.step()
    world.step()
    for tokens, drop, text in (
        ((1,), 3, "not all output"),
        ((1,), -1, "not all output"),
        ((1,) * 5, 1, "no room"),
        ((99,), 1, "outside"),
    ):
        with pytest.raises(RequestError, match=text):
            world.engine.put(1, tokens, drop=drop)
    world.engine.append(1, [4])
    with pytest.raises(RequestError, match="not all output"):
        world.engine.put(1, [1], drop=1)


# ---------------------------------------------------------------------------------------------- beam against brute force


def brute_beam(
    prompt: list[int], width: int, room: int, stops: tuple[int, ...], penalty: float, early: bool
) -> list[list[int]]:
    """Beam search in a few lines over the executor's own log-probabilities, without KV, forks or steps."""
    keep = max(2, 1 + len(stops)) * width
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, room + 1):
        found = []
        for total, tokens in live:
            top = logprob(chain([*prompt, *tokens]), 0, keep, VOCAB).top
            found += [(total + p, [*tokens, t]) for t, p in top]
        found = sorted(found, key=lambda f: -f[0])[:keep]
        ends = [f for f in found[:width] if f[1][-1] in stops or length == room]
        done = sorted(done + [(total / length**penalty, t) for total, t in ends], key=lambda f: -f[0])[:width]
        live = [f for f in found if f[1][-1] not in stops][:width]
        if len(done) == width and (early or live[0][0] / length**penalty <= done[-1][0]):
            break
    return [t for _, t in done]


@pytest.mark.parametrize("flights", [1, 2])
@pytest.mark.parametrize(
    "pressure",
    [
        {"blocks": 200},
        {"blocks": 200, "limits": {"max_rows": 3, "max_samples": 2}},  # beams draw in different steps
        {"blocks": 200, "limits": {"max_num_seqs": 2}},  # more beams than sequences may run
        {"blocks": 26, "limits": {"max_rows": 4}},  # room for hardly more than one of them
        {"blocks": 60, "share": False},
    ],
    ids=["roomy", "small steps", "few sequences", "tight", "no cache"],
)
def test_beams_are_those_of_brute_force(pressure: dict[str, Any], flights: int) -> None:
    preemptions = 0
    for k, (width, stops, penalty, early) in enumerate(
        [
            (3, (), 1.0, False),
            (4, (3,), 1.0, False),
            (3, (3, 5), 0.0, True),
            (2, (1, 2, 8), 2.0, False),
            (1, (6,), 1.0, False),
        ]
    ):
        text = f"search=beam(width={width}, length_penalty={penalty}, early_stopping={early})"
        world = World(techniques=[text], flights=flights, **pressure)
        specs = [spec(i + 1, 5 + 11 * i, n=width, max_tokens=10, stop_ids=stops) for i in range(3)]
        out = world.run(*specs)
        for one in specs:
            prompt = list(one.items[0].ids)  # type: ignore[union-attr]
            wanted = brute_beam(prompt, width, 10, stops, penalty, early)
            assert [out[one.id, i] for i in range(width)] == wanted, (k, one.id)
            reasons = [world.ends()[one.id, i].reason for i in range(width)]
            assert reasons == ["stop" if w[-1] in stops else "length" for w in wanted]
        assert not any(isinstance(e, Preempted) for e in world.told)
        preemptions += world.engine.stats.preemptions
    assert preemptions > 0 or pressure["blocks"] != 26


def test_a_beam_that_is_preempted_in_the_middle_gives_the_same_beams() -> None:
    one = spec(1, 20, n=3, max_tokens=12)
    wanted = World(techniques=["search=beam(width=3)"]).run(one)
    world = World(techniques=["search=beam(width=3)"])
    world.add(one)
    for i in range(60):
        if not world.engine.has_work:
            break
        world.step()
        live = world.engine.family(1)
        if i % 3 == 1 and live:
            world.engine.scheduler.restart(live[i % len(live)], world.now)
    assert world.run() == wanted


def test_beams_share_the_kv_of_what_they_have_in_common() -> None:
    one = spec(1, 40, n=1, max_tokens=8, temperature=0.0)
    alone = World()
    alone.run(one)
    world = World(techniques=["search=beam(width=4)"], blocks=200)
    wanted = world.run(one)
    assert world.peak < 2 * alone.peak, (world.peak, alone.peak)
    for limits in (
        {"max_samples": 2},
        {"max_num_seqs": 4},
    ):  # beams wait for others; losers leave their seats to winners
        narrow = World(techniques=["search=beam(width=4)"], blocks=200, limits=limits)
        assert narrow.run(one) == wanted
        assert narrow.engine.stats.prefix_query_tokens == 40, "the prompt enters, and nobody else"


# ---------------------------------------------------------------------------------------------- best of n


def pick(world: World, by: str, keep: int, n: int) -> list[list[int]]:
    """Draw n and choose: the definition."""
    drawn: dict[int, list[tuple[int, float]]] = {}
    for e in world.told:
        if isinstance(e, Tokens):
            drawn.setdefault(e.index, []).extend((p.token, p.logprob) for p in e.logprobs)
    score = {i: sum(p for _, p in x) / (len(x) if by == "mean" else 1) for i, x in drawn.items()}
    assert len(score) == n
    return [[t for t, _ in drawn[i]] for i in sorted(score, key=lambda i: -score[i])[:keep]]


@pytest.mark.parametrize("by", ["mean", "sum"])
@pytest.mark.parametrize(
    "pressure", [{"blocks": 64}, {"blocks": 34, "limits": {"max_rows": 5}}], ids=["roomy", "tight"]
)
def test_best_of_n_is_drawing_n_and_choosing(by: str, pressure: dict[str, Any]) -> None:
    saved = 0
    for id in range(1, 7):
        law: dict[str, Any] = {"max_tokens": 12, "stop_ids": (3, 8)}
        plain = World()
        plain.run(spec(id, 9, n=5, logprobs=0, **law))
        for keep in (1, 2):
            world = World(techniques=[f"search=best_of_n(n=5, by='{by}')"], **pressure)
            out = world.run(spec(id, 9, n=keep, **law))
            assert [out[id, i] for i in range(keep)] == pick(plain, by, keep, 5)
            assert not any(e.logprobs for e in world.told if isinstance(e, Tokens)), "nobody asked for them"
            drawn = sum(len(e.tokens) for e in plain.told if isinstance(e, Tokens))
            told = sum(map(len, out.values()))
            spent = told + max(e.discarded for e in world.ends().values())
            assert spent == world.engine.stats.generation_tokens <= drawn
            saved += drawn - spent
    assert saved > 0, "a candidate that cannot win any more is stopped"


def test_best_of_n_tells_the_logprobs_that_were_asked_for() -> None:
    world = World(techniques=["search=best_of_n(n=3, keep=2)"])
    world.run(spec(1, 9, n=2, max_tokens=4, logprobs=2))
    tokens = [e for e in world.told if isinstance(e, Tokens)]
    assert [e.index for e in tokens] == [0, 1]
    assert all(len(e.logprobs) == len(e.tokens) and all(len(p.top) == 2 for p in e.logprobs) for e in tokens)


@pytest.mark.parametrize(
    ("text", "n", "said"),
    [
        ("search=best_of_n(n=3)", 4, "at most 3"),
        ("search=best_of_n(n=3, keep=1)", 2, "returns 1"),
        ("search=beam(width=2)", 3, "width 2"),
    ],
)
def test_searches_refuse_what_they_cannot_return(text: str, n: int, said: str) -> None:
    world = World(techniques=[text])
    world.add(spec(1, 5, n=n))
    (event,) = world.told
    assert isinstance(event, Rejected)
    assert said in event.message
    assert event.param == "n"
    assert world.engine.pool.referenced == 0


# ---------------------------------------------------------------------------------------------- companions


def contrasted(world: World, *specs: RequestSpec) -> dict[tuple[int, int], list[int]]:
    return world.run(*specs)


@pytest.mark.parametrize("flights", [1, 2])
@pytest.mark.parametrize(
    "pressure",
    [
        {},
        {"limits": {"max_rows": 2, "max_samples": 2}},
        {"blocks": 40},
        {"limits": {"max_num_seqs": 3}},
        {"cut": cut_rule},
    ],
    ids=["roomy", "small steps", "tight", "few sequences", "compressed"],
)
def test_companions_follow_in_silence(pressure: dict[str, Any], flights: int) -> None:
    """The executor draws from the leader's own state, so outputs are those without a companion; the audit sees both contexts."""
    specs = [spec(i + 1, 6 + 5 * i, n=1 + i, companions=[3 + 9 * i], max_tokens=9, stop_ids=(4,)) for i in range(3)]
    world = World(techniques=["sample=cad"], flights=flights, **pressure)
    out = contrasted(world, *specs)
    if "cut" not in pressure:
        plain = World().run(*(spec(i + 1, 6 + 5 * i, n=1 + i, max_tokens=9, stop_ids=(4,)) for i in range(3)))
        assert out == plain
    assert sorted(world.ends()) == sorted(out)
    assert sorted(out) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


def test_results_that_fall_short_keep_a_family_together() -> None:
    specs = [spec(i + 1, 9, n=2, companions=[5], max_tokens=8) for i in range(3)]
    wanted = World().run(*(spec(i + 1, 9, n=2, max_tokens=8) for i in range(3)))
    for seed in range(8):
        world = World(techniques=["sample=cad"], seed=seed)
        world.executor.short = 0.4
        assert contrasted(world, *specs) == wanted


def test_a_companion_sees_the_output_after_a_prompt_of_its_own() -> None:
    world = World(techniques=["sample=cad"])
    world.add(spec(1, 9, companions=[5], max_tokens=6))
    for _ in range(5):
        world.step()
    leader, companion = world.engine.requests()
    assert companion.leader is leader
    assert companion.context == [*[(3 + 7 * i) % VOCAB for i in range(5)], *leader.output]
    assert leader.output
    assert world.engine.told() == [(1, 0)]
    world.executor.failing.add(companion.rid)
    world.run()
    end = world.ends()[1, 0]
    assert (end.reason, end.error) == ("error", "told to fail")


def test_a_companion_that_is_longer_ends_the_answer_at_its_own_limit() -> None:
    world = World(techniques=["sample=cad"])
    out = contrasted(world, spec(1, 5, companions=[MAX_LEN - 4], max_tokens=30))
    assert len(out[1, 0]) == 4
    assert world.ends()[1, 0].reason == "length"


def test_contrast_needs_its_companion_and_takes_no_other() -> None:
    for techniques, companions, text in (
        (["sample=cad"], [], "brings nothing to be compared"),
        ([], [4], "compares nothing: leave that out"),
        (["sample=cad"], [4, 5], "brings 2 to be compared"),
        (["sample=cad"], [MAX_LEN], "context holds"),
        (["sample=cad"], [0], "empty"),
    ):
        world = World(techniques=techniques)
        world.add(spec(1, 5, companions=companions))
        (event,) = world.told
        assert isinstance(event, Rejected)
        assert text in event.message
        assert event.param in ("weft.contrast", "prompt")
        assert not world.engine.requests()
        world.engine.check()
    world = World(techniques=["sample=cad"], blocks=30)
    world.add(spec(1, 5, companions=[6], max_tokens=MAX_LEN))
    (event,) = world.told
    assert isinstance(event, Rejected)
    assert "2 linked sequences" in event.message
    assert not world.engine.requests()


def test_programs_steer_a_family_as_one() -> None:
    """A beam over a contrast: forks have companions of their own, and every token that is put is put for both."""
    one = spec(1, 9, n=3, companions=[5], max_tokens=9, stop_ids=(3,))
    wanted = World(techniques=["search=beam(width=3)"]).run(spec(1, 9, n=3, max_tokens=9, stop_ids=(3,)))
    for pressure in ({}, {"limits": {"max_num_seqs": 3}}, {"blocks": 40}):
        world = World(techniques=["search=beam(width=3)", "sample=cad"], **pressure)
        assert world.run(one) == wanted
    world = World(techniques=["sample=cad"])
    world.add(spec(1, 9, companions=[5], max_tokens=9))
    world.add(spec(2, 9, companions=[5], max_tokens=9))
    for _ in range(4):
        world.step()
    with pytest.raises(RequestError, match="linked to them and to nothing else"):
        world.engine.link([(1, 0), (2, 0)])
    with pytest.raises(RequestError, match="cut behind it"):
        world.engine.truncate(1, 4)
    world.engine.truncate(1, 10)
    world.engine.append(1, [2, 2])
    world.engine.fork(1, 7, source=0, seed=child_seed(5, 1))
    pairs = [(r, r.companions[0]) for r in world.engine.requests() if r.companions]
    assert len(pairs) == 3
    assert all(r.context[9:] == c.context[5:] and r.output == c.output and r.given for r, c in pairs[::2])
    world.run()
