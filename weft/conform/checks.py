"""The generated tests of one technique: its head, its source, its arguments, simulated, live, its acts, and its fidelity."""

from __future__ import annotations

import ast
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from statistics import fmean

import msgspec
import numpy as np

from weft.compose import traits_of
from weft.conform import law
from weft.conform.lab import Failed, Lab, Outcome, kl
from weft.conform.workload import PROSE
from weft.errors import ConfigError, EngineError
from weft.exec import sampler
from weft.features import feature
from weft.registry import Part, lookup, parse
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity
from weft.types import RequestSpec, SamplingSpec, TokenItem

TENSORS = frozenset({"torch", "numpy", "transformers", "safetensors"})
WORLD = frozenset(
    "time datetime threading asyncio socket selectors random secrets uuid multiprocessing subprocess concurrent signal os".split()
)
DRAWS = 5120
QUOTED, AGAIN = 80, 20
"""Tokens of the text that is quoted, and those of the quotation that stand already."""
TOGETHER = 128
"""Sequences that draw at once."""
OTHER_SEED = 1_000_003
"""Where the seeds of a second sample begin."""
BIAS = 0.02
"""The bias of acceptance that a test of a law must see."""
SLACK = 2.0
"""Divergences of two approximations together are held to so many times the sum of their bounds: they need not add up."""


@dataclass(frozen=True, slots=True)
class Result:
    """One test: what it was, whether it holds, what was seen, and the seconds that it took."""

    test: str
    ok: bool
    text: str
    seconds: float


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
    found: list[tuple[str, Check]] = [
        ("head", head),
        ("source", source),
        ("arguments", arguments),
        ("simulated", simulated),
        ("live", live),
        ("alone as in company", alone),
    ]
    if part.name != SLOTS[part.slot].null:
        found.append(("acts", acts))
    if Effect.REDEFINES in traits.effects:
        return found
    fidelity = {Fidelity.EXACT: exact, Fidelity.SAME_LAW: same_law, Fidelity.APPROX: approx}
    return [*found, (f"fidelity {traits.fidelity.value}", fidelity[traits.fidelity])]


def beside(part: Part) -> list[Part]:
    """The technique, and the parts without which it would have nothing to do (its class names them as `beside`)."""
    others = [parse(text) for text in getattr(lookup(part.slot, part.name), "beside", ())]
    return [part, *(other for other in others if other.slot != part.slot)]


# ---------------------------------------------------------------------------------------------- what is written


def head(lab: Lab, part: Part) -> str:
    """The docstring of its file has every field."""
    found = feature(part.slot, part.name)
    assert found.summary, "the docstring begins with a line that says what the technique does"
    return found.summary


def source(lab: Lab, part: Part) -> str:
    """The deciding half is pure: no tensors at the head of the file, no clock, thread, process or randomness anywhere."""
    cls = lookup(part.slot, part.name)
    module = inspect.getmodule(cls)
    assert module is not None
    tree = ast.parse(inspect.getsource(module))
    complaints = [*_imports(tree, TENSORS, at_load=True), *_imports(tree, WORLD, at_load=False)]
    assert not complaints, "; ".join(complaints)
    return "imports are pure"


def _imports(tree: ast.Module, banned: frozenset[str], *, at_load: bool) -> Iterator[str]:
    inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)] if at_load else []
    typed = [
        n
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if not node.level
            else []
        )
        for name in names:
            if name.split(".")[0] in banned and node not in inside and node not in typed:
                where = "only inside its methods" if at_load else "not at all"
                yield f"line {node.lineno}: {name.split('.')[0]} may be imported {where}"


def arguments(lab: Lab, part: Part) -> str:
    """The class is its configuration: its trial's arguments build it, and one that it does not have is refused by name."""
    cls = lookup(part.slot, part.name)
    assert is_dataclass(cls), "the class is a dataclass whose fields are the technique's arguments"
    built = part.build()
    assert isinstance(getattr(built, "acts", {}), dict), "acts is a dict of counters"
    said = ""
    try:
        Part(part.slot, part.name, (("no_such_argument", 1),)).build()
    except ConfigError as error:
        said = str(error)
    assert "no_such_argument" in said, "an unknown argument is taken, or refused without being named"
    return str(part)


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
    if any(traits_of(p).fidelity is Fidelity.SAME_LAW for p in parts):
        return "not asked of SAME_LAW: how many guesses are verified in a step may change the draw, not its law"
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


def equal_tokens(lab: Lab, parts: Sequence[Part], without: Sequence[Part]) -> str:
    mine, theirs = lab.run(parts).tokens, lab.run(without).tokens
    assert mine.keys() == theirs.keys()
    for key in sorted(mine):
        assert mine[key] == theirs[key], f"request {key[0]}.{key[1]}: {differ(mine[key], theirs[key])}"
    return f"{sum(map(len, mine.values()))} tokens are equal"


def differ(a: Sequence[int], b: Sequence[int]) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return f"token {at} is {list(a[at : at + 3])}, and without it {list(b[at : at + 3])}"


def approx(lab: Lab, part: Part) -> str:
    """The stated bound on the mean KL divergence, along the reference's own tokens."""
    bound = traits_of(part).bound
    assert bound is not None, "an APPROX technique states its bound: Traits(fidelity=Fidelity.APPROX, bound=...)"
    return within(lab, beside(part), beside(part)[1:], bound)


def within(lab: Lab, parts: Sequence[Part], reference: Sequence[Part], bound: float) -> str:
    """Mean KL of one stack's laws from another's, along the other's tokens, is at most `bound` nats."""
    specs = lab.workload(parts, tokens=32).rounds[0]
    forced = {key[0]: tokens for key, tokens in lab.run(reference).tokens.items() if key[1] == 0}
    theirs, _ = lab.laws(reference, specs, forced)
    mine, outcome = lab.laws(parts, specs, forced)
    for part in parts:
        if traits_of(part).fidelity is Fidelity.APPROX and part not in reference:
            assert any(own_acts(outcome, part).values()), f"{part} did nothing, so the bound says nothing of it"
    values = kl(theirs, mine)
    mean = fmean(values)
    assert mean <= bound, f"mean KL {mean:.4g} over {len(values)} tokens exceeds {bound:.4g}"
    return f"mean KL {mean:.3g}, largest {max(values):.3g}, bound {bound:.3g}"


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


def firsts(wanted: dict[tuple[int, ...], float]) -> dict[int, float]:
    """The law of the first token."""
    found: dict[int, float] = {}
    for cell, p in wanted.items():
        found[cell[0]] = found.get(cell[0], 0.0) + p
    return found


def shifted(wanted: dict[tuple[int, ...], float], guess: int, bias: float) -> dict[tuple[int, ...], float]:
    """The law of a sampler that accepts a guess too often by `bias`, at the cost of every other first token."""
    own = sum(p for cell, p in wanted.items() if cell[0] == guess)
    more, less = (own + bias) / own, (1 - own - bias) / (1 - own)
    return {cell: p * (more if cell[0] == guess else less) for cell, p in wanted.items()}


def quoting(lab: Lab, parts: Sequence[Part], reference: Sequence[Part]) -> tuple[RequestSpec, int]:
    """A request in the middle of a quotation, and what will be guessed next.  Its tokens so far are set.

    It stands where the guess is unlikely, so that accepting it too often shows soonest.
    """
    text = tuple(lab.encode(PROSE[1]))[:QUOTED]
    companions = tuple((TokenItem(ids),) for ids in lab.companions(parts))
    asked = RequestSpec(
        id=1, items=(TokenItem((*text, *text[:AGAIN])),), sampling=SamplingSpec(temperature=0.7, top_k=4, max_tokens=1),
        seed=5, companions=companions,
    )  # fmt: skip
    found, _ = lab.laws(reference, [asked], {1: text[AGAIN : AGAIN + 24]})
    likely = {i: _law(asked, found[5, i]).get(text[AGAIN + i], 0.0) for i in range(2, 24)}
    at = min((i for i in likely if likely[i] > 0.03), key=lambda i: abs(likely[i] - 0.05))
    prompt = TokenItem((*text, *text[: AGAIN + at - 1]))
    sampling = msgspec.structs.replace(asked.sampling, max_tokens=4)
    spec = msgspec.structs.replace(asked, items=(prompt,), forced=(text[AGAIN + at - 1],), sampling=sampling)
    return spec, text[AGAIN + at]


def joint(lab: Lab, parts: Sequence[Part], spec: RequestSpec) -> dict[tuple[int, ...], float]:
    """The exact law of the two tokens after the set ones, from the logits of every branch."""
    at = len(spec.forced)

    def branch(first: int) -> list[dict[int, float]]:
        found, _ = lab.laws(parts, [spec], {spec.id: [*spec.forced, first, 0]})
        return [_law(spec, found[spec.seed, at + i]) for i in range(2)]

    return {(a, b): p * q for a, p in branch(0)[0].items() for b, q in branch(a)[1].items()}


def _law(spec: RequestSpec, logits_V: object) -> dict[int, float]:
    row = sampler.Row(spec.sampling, 0, 0, np.empty(0, np.int64), 0)
    ids, p = sampler.law(logits_V, row)  # type: ignore[arg-type]
    return dict(zip(ids.tolist(), p.tolist(), strict=True))


def sample(
    lab: Lab, parts: Sequence[Part], spec: RequestSpec, draws: int, each: int = TOGETHER
) -> tuple[list[tuple[int, ...]], Outcome]:
    """The two tokens after the set ones, drawn so many times under different seeds.  each: answers that a request asks for."""
    runtime = lab.runtime(parts, roomy=True, max_num_seqs=TOGETHER, max_rows=512)
    specs = [
        msgspec.structs.replace(spec, id=i + 1, seed=spec.seed + 7919 * i, n=min(each, draws - each * i))
        for i in range(-(-draws // each))
    ]
    lot = TOGETHER // each
    outcome = lab.send(runtime, [specs[i : i + lot] for i in range(0, len(specs), lot)])
    at = len(spec.forced)
    return [tuple(tokens[at : at + 2]) for tokens in outcome.tokens.values()], outcome


__all__ = ["Failed", "Result", "alike", "as_alone", "beside", "conform", "equal_tokens", "fits", "own_acts", "within"]
