"""The generated tests themselves: for each fidelity a copy that is broken a little fails the test that the real one passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from weft.accept.rejection import Rejection
from weft.config import Stack
from weft.conform import checks, pairs
from weft.conform.checks import approx, equal_tokens, exact, same_law
from weft.conform.lab import Lab
from weft.exec import sampler
from weft.registry import Part
from weft.slots import Verify
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

    def wrong(logits: Any, rows: Any) -> list[int]:
        nonlocal drawn
        winners = draw(logits, rows)
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
