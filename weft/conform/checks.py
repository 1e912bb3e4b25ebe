"""The generated tests of one technique: what is written, simulated, live, its acts, and its fidelity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import msgspec

from weft.compose import traits_of
from weft.conform import law, outside
from weft.conform.draws import firsts, joint, leaning, quoting, sample, shifted
from weft.conform.lab import Failed, Lab, Outcome, kl
from weft.conform.workload import asked_again
from weft.conform.written import arguments, head, source
from weft.errors import EngineError
from weft.registry import Part, lookup, parse
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity, Trait
from weft.types import RequestSpec, SamplingSpec

DRAWS = 5120
OTHER_SEED = 1_000_003
"""Where the seeds of a second sample begin."""
BIAS = 0.02
"""The bias of acceptance that a test of a law must see."""
SLACK = 1.25
"""Divergences of two approximations together are held to so many times the sum of their bounds: they need not add up."""
REDEFINED_SLACK = 2.0
"""The same beside a part that gives another answer on purpose: bounds are stated along plain answers."""
NEARER = 0.5
"""Where a technique keeps what a control of the same budget drops, it is at most so many times as far from the reference."""


@dataclass(frozen=True, slots=True)
class Result:
    """One test: what it was, whether it holds, what was seen, and the seconds that it took."""

    test: str
    ok: bool
    text: str
    seconds: float


Answers = Mapping[tuple[int, int], Sequence[int]]
Check = Callable[[Lab, Part], str]
"""Says what was seen; raises AssertionError or EngineError where the technique does not keep its word."""


def conform(lab: Lab, slot: str, name: str) -> Iterator[Result]:
    """Every test that applies to a technique, in order; those that need a built one end at the first that cannot build it."""
    part = lab.part(slot, name)
    for test, check in _applicable(part):
        began = time.monotonic()
        try:
            text, ok = check(lab, part), True
        except (AssertionError, EngineError) as error:
            text, ok = str(error), False
        except Exception as error:  # the technique's own fault: it is named, and the other tests go on
            text, ok = f"{type(error).__name__}: {error}", False
        yield Result(test, ok, text, time.monotonic() - began)


def _applicable(part: Part) -> list[tuple[str, Check]]:
    traits = traits_of(part)
    written: list[tuple[str, Check]] = [("head", head), ("source", source), ("arguments", arguments)]
    if not SLOTS[part.slot].inside:
        counts: list[tuple[str, Check]] = [] if part.slot == "cost" else [("acts", outside.acts)]
        return [*written, ("simulated", outside.simulated), *counts, ("live", outside.live)]
    found: list[tuple[str, Check]] = [
        *written,
        ("simulated", simulated),
        ("live", live),
        ("alone as in company", alone),
    ]
    if part.name != SLOTS[part.slot].null:
        found.append(("acts", acts))
    if Effect.DROPS_TOKENS in traits.effects:
        found.append(("what it keeps", keeps))
    if hasattr(lookup(part.slot, part.name), "beats"):
        found.append(("a fact asked for again", recalls))
    if Effect.REDEFINES in traits.effects:
        return [*found, (f"fidelity {traits.fidelity.value} to its own definition", redefines)]
    fidelity = {Fidelity.EXACT: exact, Fidelity.SAME_LAW: same_law, Fidelity.APPROX: approx}
    return [*found, (f"fidelity {traits.fidelity.value}", fidelity[traits.fidelity])]


def beside(part: Part) -> list[Part]:
    """The technique, and the parts without which it would have nothing to do (its class names them as `beside`)."""
    others = [parse(text) for text in getattr(lookup(part.slot, part.name), "beside", ())]
    return [part, *(other for other in others if other.slot != part.slot)]


# ---------------------------------------------------------------------------------------------- what is done


def simulated(lab: Lab, part: Part) -> str:
    """Decided without a model, over the same requests, with every invariant of the core at each step.

    KV is a chain of hashes there, so that one wrong entry gives wrong tokens: those of a sequence computed without an engine.
    """
    parts = beside(part)
    outcome = lab.simulate(parts)
    assert outcome.tokens, "nobody got a token"
    traits = [traits_of(p) for p in parts]
    if any(Effect.REDEFINES in t.effects or t.fidelity is Fidelity.APPROX for t in traits):
        return f"{outcome.steps} steps"
    wanted = lab.reference(parts)
    for key in sorted(wanted):
        assert outcome.tokens.get(key) == wanted[key], f"request {key[0]}.{key[1]}: not the tokens of its own KV"
    return f"{outcome.steps} steps, {sum(map(len, wanted.values()))} tokens as without an engine"


def live(lab: Lab, part: Part) -> str:
    """Every request of the workload ends, and no block is left behind."""
    outcome = lab.run(beside(part))
    specs = lab.workload(beside(part)).specs
    missing = [s.id for s in specs if any((s.id, index) not in outcome.tokens for index in range(s.n))]
    assert not missing, f"requests {missing} got no token"
    return f"{sum(map(len, outcome.tokens.values()))} tokens in {outcome.steps} steps, at most {outcome.peak_blocks} KV blocks"


def alone(lab: Lab, part: Part) -> str:
    """A request gets the same tokens with the engine for itself as among others, in other chunks, without a cache."""
    return as_alone(lab, beside(part))


def as_alone(lab: Lab, parts: Sequence[Part]) -> str:
    """Of requests that share a beginning, quote, ask for two answers, and come a second time."""
    if any(hangs_on_guesses(p) for p in parts):
        return "not asked of what weighs guesses: how many are verified in a step may change the draw"
    together = lab.run(parts).tokens
    first, second = lab.workload(parts).rounds
    chosen = [first[1], first[3], first[6], second[2]]
    for spec in chosen:
        for key, tokens in lab.alone(parts, spec).tokens.items():
            assert tokens == together[key], f"request {key[0]}: {differ(tokens, together[key])}"
    return f"{len(chosen)} requests"


def acts(lab: Lab, part: Part) -> str:
    """Every counter of the technique moved: it had something to do, and did it."""
    counted = own_acts(lab.run(beside(part)), part)
    assert counted, "the technique counts nothing; give it `acts`, a dict of counters of what it does"
    idle = [act for act, count in counted.items() if count == 0]
    assert not idle, f"{', '.join(idle)} stayed 0; give the class a `trial` with smaller budgets"
    return ", ".join(f"{act} {count}" for act, count in counted.items())


def own_acts(outcome: Outcome, part: Part) -> dict[str, int]:
    prefix = f"{part.slot}={part.name}."
    return {key.removeprefix(prefix): count for key, count in outcome.acts.items() if key.startswith(prefix)}


# ---------------------------------------------------------------------------------------------- fidelity


def exact(lab: Lab, part: Part) -> str:
    """Equal tokens, greedy and seeded, with the technique and without it."""
    return equal_tokens(lab, beside(part), beside(part)[1:])


def redefines(lab: Lab, part: Part) -> str:
    """Another answer on purpose: none at the arguments that its class names as `neutral`, and some at its trial's.

    `neutral_law` names fields of the sampling law that the plain answer has then, where the technique sets them itself.
    """
    cls, others = lookup(part.slot, part.name), beside(part)[1:]
    assert hasattr(cls, "neutral"), (
        "a technique that REDEFINES names arguments under which it changes nothing: `neutral`, or None where there are none"
    )
    changed = _answers(lab, [part, *others]) != _answers(lab, others)
    assert changed, "it declares REDEFINES, and gives the answers that there are without it"
    if cls.neutral is None:
        return "other answers; there are no arguments under which it changes nothing, so its own tests hold it to its definition"
    mine = _answers(lab, [lab.part(part.slot, part.name, "neutral"), *others])
    theirs = _answers(lab, others, **getattr(cls, "neutral_law", {}))
    return f"other answers, and with neutral arguments {_equal(mine, theirs)}"


def _answers(lab: Lab, parts: Sequence[Part], **law: object) -> Answers:
    """One answer to each request of the workload.  law: fields of its sampling that are set to something else."""
    rounds = [
        [msgspec.structs.replace(spec, n=1, sampling=msgspec.structs.replace(spec.sampling, **law)) for spec in one]
        for one in lab.workload(parts).rounds
    ]
    return lab.send(lab.runtime(parts), rounds).tokens


def equal_tokens(lab: Lab, parts: Sequence[Part], without: Sequence[Part]) -> str:
    return _equal(lab.run(parts).tokens, lab.run(without).tokens)


def _equal(mine: Answers, theirs: Answers) -> str:
    assert mine.keys() == theirs.keys()
    for key in sorted(mine):
        assert mine[key] == theirs[key], f"request {key[0]}.{key[1]}: {differ(mine[key], theirs[key])}"
    return f"{sum(map(len, mine.values()))} tokens are equal"


def differ(a: Sequence[int], b: Sequence[int]) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return f"token {at} is {list(a[at : at + 3])}, and without it {list(b[at : at + 3])}"


def hangs_on_guesses(part: Part) -> bool:
    """Whether the tokens of a seed may depend on what was guessed."""
    traits = traits_of(part)
    return Effect.GUESSES in traits.effects and traits.fidelity is not Fidelity.EXACT


def approx(lab: Lab, part: Part) -> str:
    """The stated bound on the mean KL divergence, along the reference's own tokens."""
    bound = traits_of(part).bound
    assert bound is not None, "an APPROX technique states its bound: Traits(fidelity=Fidelity.APPROX, bound=...)"
    said = within(lab, beside(part), beside(part)[1:], bound)
    return f"{said}; {drawn_so(lab, beside(part))}" if hangs_on_guesses(part) else said


def within(lab: Lab, parts: Sequence[Part], reference: Sequence[Part], bound: float) -> str:
    """Mean KL of one stack's laws from another's, along the other's tokens, is at most `bound` nats.

    Of a stack whose rule of acceptance is an approximation, its laws are those of the tokens that stand (`weft.fidelity.rule`).
    """
    specs = lab.workload(parts, tokens=32).rounds[0]
    forced = {key[0]: tokens for key, tokens in lab.run(reference).tokens.items() if key[1] == 0}
    lenient = [p for p in parts if hangs_on_guesses(p) and traits_of(p).fidelity is Fidelity.APPROX]
    if lenient:
        return _let(lab, parts, reference, specs, forced, bound)
    theirs, _ = lab.laws(reference, specs, forced)
    mine, outcome = lab.laws(parts, specs, forced)
    for part in parts:
        if traits_of(part).fidelity is Fidelity.APPROX and part not in reference:
            assert any(own_acts(outcome, part).values()), f"{part} did nothing, so the bound says nothing of it"
    values = kl(theirs, mine)
    mean = fmean(values)
    assert mean <= bound, f"mean KL {mean:.4g} over {len(values)} tokens exceeds {bound:.4g}"
    return f"mean KL {mean:.3g}, largest {max(values):.3g}, bound {bound:.3g}"


def _let(
    lab: Lab,
    parts: Sequence[Part],
    reference: Sequence[Part],
    specs: Sequence[RequestSpec],
    forced: Mapping[int, Sequence[int]],
    bound: float,
) -> str:
    """At temperature 1 the divergence of the tokens that stand from the reference's law (a rule may leave tokens of that no
    chance), and greedily by how much less likely they are than the reference's.  Beside another draft than
    the one that it names a rule may be farther off (`other_drafts`)."""
    said = []
    cls = next(lookup(p.slot, p.name) for p in parts if p.slot == "accept")
    named = {parse(text).name for text in getattr(cls, "beside", ())}
    if any(p.slot == "draft" and p.name not in named for p in parts):
        bound += float(getattr(cls, "other_drafts", 0.0))
    for temperature in (1.0, 0.0):
        sent = [msgspec.structs.replace(s, sampling=SamplingSpec(temperature=temperature)) for s in specs]
        theirs, _ = lab.laws(reference, sent, forced)
        mine, judged = lab.judged(parts, sent, forced)
        if temperature:
            assert judged.let > 0, "no guess stood that the race does not select, so the bound says nothing of the rule"
            values = kl(mine, theirs)
            said.append(f"mean KL {fmean(values):.3g} of what stands, largest {max(values):.3g}")
        else:
            values = judged.lost
            said.append(f"greedy tokens {fmean(values):.3g} nats less likely")
        assert fmean(values) <= bound, f"{said[-1]}, over {len(values)} tokens, exceeds {bound:.4g}"
    return f"{'; '.join(said)}; bound {bound:.3g}"


def drawn_so(lab: Lab, parts: Sequence[Part]) -> str:
    """Tokens that the engine gives are drawn by the law that the rule was said to give them."""
    spec, wanted, plain = leaning(lab, parts, parts[1:])
    drawn, _ = sample(lab, parts, spec, DRAWS)
    found = law.fit([cell[0] for cell in drawn], wanted)
    said = f"{DRAWS} draws, chi-square {found.chi2:.1f} over {found.freedom}, p {found.p:.2g}"
    assert found.ok, f"what stands is not drawn by the law that the rule was found to give: {said}"
    strength = law.power(wanted, plain, DRAWS)
    return f"{said}; the target's own law would be told from it with chance {strength:.2f}"


def keeps(lab: Lab, part: Part) -> str:
    """What stays at the cuts: the newest entry; keys are turned as declared; attention decides where it is asked for."""
    traits, cuts = traits_of(part), lab.cuts(beside(part))
    assert cuts, f"{part} never came to a cut"
    assert all(cut.newest for cut in cuts), "the newest entry was dropped, which the next token needs"
    turned = [cut for cut in cuts if cut.turned]
    said = f"{len(cuts)} cuts"
    if Effect.REINDEXES_POSITIONS not in traits.effects:
        assert not turned, "keys are turned to other positions: declare REINDEXES_POSITIONS"
    else:
        assert len(turned) == len(cuts), "REINDEXES_POSITIONS is declared, and no key was turned at some cut"
        assert all(cut.closed for cut in cuts), "after a cut the positions of what stays leave a gap"
        said += ", after each of which positions run on without a gap"
    if Trait.ATTENTION_MASS in traits.needs:
        share = sum(cut.mass_kept for cut in cuts) / sum(cut.kept for cut in cuts)
        assert share > 1, (
            f"what stays got {share:.2f} times the attention of an entry in the middle: it should be more than 1"
        )
        said += f"; what stays got {share:.2f} times the attention of an entry in the middle"
    return said


def recalls(lab: Lab, part: Part) -> str:
    """Asked again for a fact in the beginning, it is nearer the reference than a control of as many entries (`beats`)."""
    control, others = parse(lookup(part.slot, part.name).beats), beside(part)[1:]  # type: ignore[attr-defined]
    specs, forced = asked_again(lab.encode)
    theirs, _ = lab.laws(others, specs, forced)
    mine, rival = (fmean(kl(theirs, lab.laws([p, *others], specs, forced)[0])) for p in (part, control))
    said = f"mean KL {mine:.3g} over the answers, and {rival:.3g} with {control}"
    assert mine <= NEARER * rival, f"{said}: it should be at most {NEARER:g} times that"
    return said


def same_law(lab: Lab, part: Part) -> str:
    """Draws of tokens after verified guesses fit the exact law that the stack without the technique has."""
    return fits(lab, beside(part), beside(part)[1:], DRAWS)


def fits(lab: Lab, parts: Sequence[Part], reference: Sequence[Part], draws: int) -> str:
    spec, guess = quoting(lab, parts, reference)
    wanted = joint(lab, reference, spec)
    drawn, outcome = sample(lab, parts, spec, draws)
    for part in parts:
        if traits_of(part).fidelity is Fidelity.SAME_LAW:
            weighed = sum(own_acts(outcome, part).values())
            assert weighed >= draws // 2, f"{part} acted {weighed} times in {draws} draws, so they say nothing of it"
    first = firsts(wanted)
    said = ""
    for found, what in (
        (law.fit(drawn, wanted), "pairs of tokens"),
        (law.fit([cell[0] for cell in drawn], first), "first tokens"),
    ):
        said = f"chi-square {found.chi2:.1f} over {found.freedom}, p {found.p:.2g}"
        assert found.ok, f"{draws} draws of {what} do not fit the law: {said}"
    strength = law.power(first, firsts(shifted(wanted, guess, BIAS)), draws)
    return f"{said}, {draws} draws; a bias of {BIAS:.0%} in acceptance would be seen with chance {strength:.2f}"


def alike(lab: Lab, parts: Sequence[Part], reference: Sequence[Part], draws: int) -> str:
    """What two stacks return to as many requests is of one law: for searches, which choose among what they draw."""
    spec, _ = quoting(lab, parts, reference)
    mine, _ = sample(lab, parts, spec, draws, each=1)
    theirs, _ = sample(lab, reference, msgspec.structs.replace(spec, seed=OTHER_SEED), draws, each=1)
    found = law.alike(mine, theirs)
    said = f"chi-square {found.chi2:.1f} over {found.freedom}, p {found.p:.2g}, {draws} answers of each"
    assert found.ok, f"answers with and without it are not of one law: {said}"
    return said


__all__ = ["Failed", "Result", "alike", "as_alone", "beside", "conform", "equal_tokens", "fits", "own_acts", "within"]
