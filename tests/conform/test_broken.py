"""The generated tests themselves: for each fidelity a copy that is broken a little fails the test that the real one passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch

from weft.accept.bild import BiLD
from weft.accept.rejection import Rejection
from weft.accept.typical import Typical
from weft.adapt.lora import LoRA
from weft.attention.flexprefill import FlexPrefill
from weft.config import Stack
from weft.conform import checks, pairs
from weft.conform.checks import DRAWS, approx, equal_tokens, exact, keeps, recalls, redefines, same_law
from weft.conform.lab import Lab
from weft.exec import sampler
from weft.kv.compress.h2o import H2O
from weft.kv.compress.recent import Recent
from weft.kv.compress.streaming_llm import StreamingLLM
from weft.registry import Part
from weft.sample.cad import CAD
from weft.search.beam import Beam
from weft.search.best_of_n import BestOfN
from weft.skip.mue import MuE
from weft.slots import Kept, Verify
from weft.traits import Fidelity, Traits


def with_part(slot: str, change: Any) -> Any:
    """A change of a stack: the instance in a slot, replaced by a broken copy of it."""

    def alter(stack: Stack) -> Stack:
        if slot not in stack.instances:
            return stack
        return replace(stack, instances={**stack.instances, slot: change(stack.instances[slot])})

    return alter


# ------------------------------------------------------------------------------------------ EXACT


def test_one_wrong_token_in_two_hundred_is_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    part = lab.part("draft", "ngram")
    assert "equal" in exact(lab, part)
    broken = Lab()
    broken.run([])  # the reference, before anything is broken
    draw, drawn = sampler.draw, 0

    def wrong(logits: Any, rows: Any, *more: Any) -> list[int]:
        nonlocal drawn
        winners = draw(logits, rows, *more)
        for i in range(len(winners)):
            drawn += 1
            if drawn % 200 == 0:
                winners[i] = (winners[i] + 1) % 4096
        return winners

    monkeypatch.setattr(sampler, "draw", wrong)
    with pytest.raises(AssertionError, match=r"token \d+ is"):
        exact(broken, part)
    assert drawn >= 400


def test_a_token_too_few_is_seen(lab: Lab) -> None:
    """`equal_tokens` compares whole outputs, not their common beginning."""
    short = Lab()
    parts = [lab.part("draft", "ngram")]
    short._outcomes[tuple(sorted(str(p) for p in parts))] = outcome = replace(lab.run(parts))
    key = min(outcome.tokens)
    outcome.tokens = {**outcome.tokens, key: outcome.tokens[key][:-1]}
    short._outcomes[()] = lab.run([])
    with pytest.raises(AssertionError):
        equal_tokens(short, parts, [])


# ------------------------------------------------------------------------------------------ SAME_LAW


class Eager(Rejection):
    """Accepts a guess with 2 % more chance than it should."""

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        guess = view.guesses[0]
        ids, p = view.law(0)
        own = float(p[ids == guess].sum())
        if own <= view.uniform(0, guess, 1) < own + 0.02:
            self.acts["accepted"] += 1
            return [guess, view.winner(1)], [0]
        return Rejection.accept(self, view)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_percent_too_many_acceptances_are_seen(lab: Lab) -> None:
    part = lab.part("accept", "rejection")
    said = same_law(lab, part)
    assert float(said.rpartition(" ")[2]) > 0.95, "the test must have the power that it needs"
    biased = Lab(with_part("accept", lambda x: Eager() if isinstance(x, Rejection) else x))
    with pytest.raises(AssertionError, match="do not fit the law"):
        same_law(biased, part)


def test_a_sampler_that_always_accepts_is_seen(lab: Lab) -> None:
    class Always(Rejection):
        def accept(self, view: Verify) -> tuple[list[int], list[int]]:
            self.acts["accepted"] += len(view.guesses)
            return [*view.guesses, view.winner(len(view.guesses))], list(range(len(view.guesses)))

    part = lab.part("accept", "rejection")
    broken = Lab(with_part("accept", lambda x: Always() if isinstance(x, Rejection) else x))
    with pytest.raises(AssertionError, match="do not fit the law"):
        checks.fits(broken, checks.beside(part), checks.beside(part)[1:], 256)
    chosen = [*checks.beside(part), lab.part("search", "best_of_n")]
    assert "are not of one law" not in checks.alike(lab, chosen, chosen[1:], 512)
    with pytest.raises(AssertionError, match="not of one law"):
        checks.alike(broken, chosen, chosen[1:], 512)


# ------------------------------------------------------------------------------------------ APPROX


def test_a_store_that_rounds_too_much_is_seen(lab: Lab) -> None:
    part = lab.part("kv.store", "int8")
    assert "bound" in approx(lab, part)

    class Coarse:
        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def decode(self, rows: Any) -> Any:
            found = self._real.decode(rows)
            return (found * 2).round() / 2

    with pytest.raises(AssertionError, match="exceeds"):
        approx(Lab(with_part("kv.store", Coarse)), part)


def test_an_approximation_without_a_bound_does_not_pass(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    part = lab.part("kv.store", "int8")
    traits = Traits(fidelity=Fidelity.APPROX)
    monkeypatch.setattr(checks, "traits_of", lambda _: traits)
    with pytest.raises(AssertionError, match="states its bound"):
        approx(lab, part)


def test_an_approximation_that_does_nothing_does_not_pass(lab: Lab) -> None:
    """A bound is kept easily by a part that is idle."""
    part = lab.part("kv.compress", "recent")
    idle = Part("kv.compress", "recent", (("window", 500), ("every", 100)))
    assert "bound" in checks.within(lab, [part], [], 0.06)
    with pytest.raises(AssertionError, match="did nothing"):
        checks.within(lab, [idle], [], 0.06)


@cache
def real(lab: Lab, check: Callable[[Lab, Part], str], slot: str, name: str) -> str:
    """What a check says of the technique itself: once, before all of its broken copies."""
    return check(lab, lab.part(slot, name))


def copy_of(lab: Lab, slot: str, broken: type) -> Lab:
    """A laboratory in which a broken copy, with the same arguments, stands for the technique that it breaks.

    What stacks without it gave is that of the other laboratory.
    """

    def change(real: Any) -> Any:
        if not isinstance(real, broken.__mro__[1]):
            return real
        return broken(**{f.name: getattr(real, f.name) for f in fields(real) if f.init})

    made = Lab(with_part(slot, change))
    made._outcomes = {parts: found for parts, found in lab._outcomes.items() if not any(slot in part for part in parts)}
    return made


class Lets(Typical):
    """Lets a guess stand that is likelier than one in ten thousand."""

    def _stands(self, view: Verify, row: int, guess: int) -> bool:
        ids, p = view.law(row)
        return float(p[ids == guess].sum()) > 1e-4


class Sly(Typical):
    """Behaves while it is asked what it does, and lets every guess stand when it serves."""

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        if view.winner(0) < 0:
            return Typical.accept(self, view)
        self.acts["let"] += 1
        return [view.guesses[0], view.winner(1)], [0]


class Shy(BiLD):
    """Lets nothing stand but what the race selects."""

    def _stands(self, view: Verify, row: int, guess: int) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "broken", "match"),
    [("typical", Lets, "exceeds"), ("typical", Sly, "not drawn by the law"), ("bild", Shy, "says nothing of the rule")],
)
def test_a_rule_that_lets_too_much_stand_is_seen(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str, broken: type, match: str
) -> None:
    """So is one that serves by another rule than it shows, by a tenth of the draws, and one that does nothing."""
    monkeypatch.setattr(checks, "DRAWS", DRAWS // 10)
    with pytest.raises(AssertionError, match=match):
        approx(copy_of(lab, "accept", broken), lab.part("accept", name))


class Least(FlexPrefill):
    """Takes as many blocks as it should, and those that get least attention."""

    def _cover(self, shares: Any, least: int) -> Any:
        count = FlexPrefill._cover(self, shares, least).sum(-1, keepdim=True)
        return shares.argsort(dim=-1).argsort(dim=-1) < count


class Ends(FlexPrefill):
    """Sees the first block and its own, and nothing between."""

    def choose(self, query: Any, keys: Any, means: Any, first: int, softcap: float | None = None) -> Any:
        chosen = FlexPrefill.choose(self, query, keys, means, first, softcap)
        chosen[:, 1 : first // self.block] = False
        return chosen


class Lot(MuE):
    """As many rows leave, whatever the cosine says."""

    def rows(self, view: Any) -> Any:
        leave = (view.before.float().sum(-1) * 1e4).long() % 5 < 3
        self.acts["rows_asked"] += len(leave)
        self.acts["rows_exited"] += int(leave.sum())
        return leave


class Oldest(Recent):
    """A window at the wrong end, and the newest entry."""

    def keep(self, view: Any) -> Kept:
        indices = Recent.keep(self, view).indices
        return Kept(torch.cat((torch.arange(len(indices) - 1), indices[-1:])))


@pytest.mark.parametrize(
    ("slot", "name", "broken"),
    [
        ("attention", "flexprefill", Least),
        ("attention", "flexprefill", Ends),
        ("skip", "mue", Lot),
        ("kv.compress", "recent", Oldest),
    ],
)
def test_an_approximation_that_goes_wrong_exceeds_its_bound(lab: Lab, slot: str, name: str, broken: type) -> None:
    assert "bound" in real(lab, approx, slot, name)
    with pytest.raises(AssertionError, match="exceeds"):
        approx(copy_of(lab, slot, broken), lab.part(slot, name))


# ------------------------------------------------------------------------------------------ what a compression keeps


class Light(H2O):
    """Keeps the entries that got least attention."""

    def keep(self, view: Any) -> Kept:
        older = view.entries - self.recent
        chosen = view.mass[:, :, :older].sort(dim=2, stable=True).indices[:, :, : self.heavy].sort(dim=2).values
        newest = torch.arange(older, view.entries).expand(*chosen.shape[:2], self.recent)
        return Kept(torch.cat((chosen, newest), 2))


class Blind(H2O):
    """Keeps entries whatever attention they got."""

    def keep(self, view: Any) -> Kept:
        older = view.entries - self.recent
        lot = torch.Generator().manual_seed(view.length)
        chosen = torch.randperm(older, generator=lot)[: self.heavy].sort().values
        return Kept(torch.cat((chosen, torch.arange(older, view.entries))))


class Still(StreamingLLM):
    """Leaves the keys of its sinks where they were."""

    def keep(self, view: Any) -> Kept:
        return Kept(StreamingLLM.keep(self, view).indices)


class TooFar(StreamingLLM):
    """Turns the keys of its sinks one position too far."""

    def keep(self, view: Any) -> Kept:
        kept = StreamingLLM.keep(self, view)
        assert kept.rotate is not None
        return Kept(kept.indices, (kept.rotate[0] + 1, *kept.rotate[1:]))


class Later(StreamingLLM):
    """Takes for its sinks what stands ten entries after the beginning."""

    def keep(self, view: Any) -> Kept:
        kept = StreamingLLM.keep(self, view)
        gone = view.entries - self.sinks - self.window
        late = min(10, gone)
        indices = kept.indices + late * (torch.arange(len(kept.indices)) < self.sinks)
        return Kept(indices, (gone - late, 0, self.sinks))


class Forgets(Recent):
    """Drops the newest entry."""

    def keep(self, view: Any) -> Kept:
        return Kept(Recent.keep(self, view).indices - 1)


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("h2o", Light, r"0\.\d+ times the attention"),
        ("h2o", Blind, r"0\.\d+ times the attention"),
        ("streaming_llm", Still, "no key was turned"),
        ("streaming_llm", TooFar, "leave a gap"),
        ("recent", Forgets, "the newest entry was dropped"),
    ],
)
def test_a_compression_that_keeps_the_wrong_entries_is_seen(lab: Lab, name: str, broken: type, said: str) -> None:
    assert "cuts" in real(lab, keeps, "kv.compress", name)
    with pytest.raises(AssertionError, match=said):
        keeps(copy_of(lab, "kv.compress", broken), lab.part("kv.compress", name))


@pytest.mark.parametrize(("name", "broken"), [("h2o", Blind), ("streaming_llm", Later)])
def test_a_compression_that_forgets_what_it_should_keep_is_seen(lab: Lab, name: str, broken: type) -> None:
    assert "over the answers" in real(lab, recalls, "kv.compress", name)
    with pytest.raises(AssertionError, match=r"at most 0\.5 times"):
        recalls(copy_of(lab, "kv.compress", broken), lab.part("kv.compress", name))


# ------------------------------------------------------------------------------------------ another answer on purpose


class Always(CAD):
    """Contrasts, whatever alpha says."""

    def warp(self, logits: Any) -> Any:
        return 1.5 * logits[0] - 0.5 * logits[1]


class Never(CAD):
    """Does not contrast."""

    def warp(self, logits: Any) -> Any:
        return logits[0]


class Wider(Beam):
    """One beam too many."""

    def begin(self, request: Any) -> Any:
        return Beam(width=self.width + 1).begin(request)


class OneMore(BestOfN):
    """One candidate too many."""

    def begin(self, request: Any) -> Any:
        return BestOfN(n=self.n + 1).begin(request)


class Leaks(LoRA):
    """Adds a little of the input beside the adapter's product."""

    def apply(self, layer: int, product: str, x: Any) -> Any:
        delta = LoRA.apply(self, layer, product, x)
        return None if delta is None else delta + 0.01 * x.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("slot", "name", "broken", "said"),
    [
        ("sample", "cad", Always, r"request \d+\.\d+: token"),
        ("sample", "cad", Never, "gives the answers that there are without it"),
        ("search", "beam", Wider, r"request \d+\.\d+: token"),
        ("search", "best_of_n", OneMore, r"request \d+\.\d+: token"),
        ("adapt", "lora", Leaks, r"request \d+\.\d+: token"),
    ],
)
def test_another_answer_than_its_definition_s_is_seen(lab: Lab, slot: str, name: str, broken: type, said: str) -> None:
    assert "are equal" in real(lab, redefines, slot, name)
    with pytest.raises(AssertionError, match=said):
        redefines(copy_of(lab, slot, broken), lab.part(slot, name))


def test_another_answer_without_neutral_arguments_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    part = lab.part("sample", "cad")
    monkeypatch.setattr(CAD, "neutral", None)
    assert "its own tests" in redefines(lab, part)
    monkeypatch.delattr(CAD, "neutral")
    with pytest.raises(AssertionError, match="names arguments under which it changes nothing"):
        redefines(lab, part)


# ------------------------------------------------------------------------------------------ company and simulation


def test_an_answer_that_depends_on_the_company_is_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    part = lab.part("schedule", "prefill_first")
    assert "requests" in checks.alone(lab, part)
    send, changed = lab.send, 0

    def wrong(runtime: Any, rounds: Any) -> Any:
        nonlocal changed
        outcome = send(runtime, rounds)
        for key in outcome.tokens:
            if key[0] > 100:  # of requests that come a second time, when something is cached
                changed += 1
                outcome.tokens[key][-1] += 1
        return outcome

    broken = Lab()
    monkeypatch.setattr(
        broken, "alone", lambda parts, spec: wrong(broken.runtime(parts, roomy=True, share=False), [[spec]])
    )
    with pytest.raises(AssertionError, match=r"request \d+: token 23"):
        checks.alone(broken, part)
    assert changed


def test_a_simulation_with_a_wrong_entry_is_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    part = lab.part("kv.offload", "host")
    assert "as without an engine" in checks.simulated(lab, part)
    wanted = lab.reference([part])
    key = max(wanted)
    wanted[key][3] += 1
    monkeypatch.setattr(lab, "reference", lambda parts: wanted)
    with pytest.raises(AssertionError, match=rf"request {key[0]}\.{key[1]}: not the tokens"):
        checks.simulated(lab, part)


# ------------------------------------------------------------------------------------------ acts


def test_a_technique_that_does_nothing_does_not_pass(lab: Lab) -> None:
    """Guesses are never made: every token is right, and the counter stays 0."""
    part = lab.part("draft", "ngram")

    class Silent:
        model, guesses, acts, per_request = None, 3, {"proposed": 0, "accepted": 0}, True

        def propose(self, asks: Any, run: Any) -> list[Any]:
            from weft.slots import Guesses

            return [Guesses(()) for _ in asks]

        def observe(self, proposed: int, accepted: int) -> None: ...

    silent = Lab(with_part("draft", lambda x: Silent()))
    assert "equal" in exact(silent, part)
    with pytest.raises(AssertionError, match="stayed 0"):
        checks.acts(silent, part)
    pair = next(p for p in pairs.pairs() if {p.one, p.other} == {("draft", "ngram"), ("schedule", "prefill_first")})
    with pytest.raises(AssertionError, match="stayed 0"):
        pairs.check(silent, pair)
    chosen = checks.beside(lab.part("accept", "rejection"))
    with pytest.raises(AssertionError, match="acted 0 times in 128 draws"):
        checks.fits(silent, chosen, chosen[1:], 128)
