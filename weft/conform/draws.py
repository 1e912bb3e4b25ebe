"""Many draws at one place, and the exact law that they are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from weft.conform.lab import Lab, Outcome
from weft.conform.workload import PROSE
from weft.exec import sampler
from weft.registry import Part
from weft.types import RequestSpec, SamplingSpec, TokenItem

QUOTED, AGAIN = 80, 20
"""Tokens of the text that is quoted, and those of the quotation that stand already."""
AHEAD = 24
"""Further tokens of it, among which a place is chosen."""
TOGETHER = 128
"""Sequences that draw at once."""


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
    asked, text = _quoted(lab, parts)
    found, _ = lab.laws(reference, [asked], {1: text[AGAIN : AGAIN + AHEAD]})
    likely = {i: _law(asked, found[5, i]).get(text[AGAIN + i], 0.0) for i in range(2, AHEAD)}
    at = min((i for i in likely if likely[i] > 0.03), key=lambda i: abs(likely[i] - 0.05))
    return _cut(asked, text, at)


def leaning(
    lab: Lab, parts: Sequence[Part], reference: Sequence[Part]
) -> tuple[RequestSpec, dict[int, float], dict[int, float]]:
    """A request in the middle of a quotation, where the stack's rule of acceptance leans most away from the target's law; the law
    that the rule gives the token after the set ones, and the target's."""
    asked, text = _quoted(lab, parts)
    _, judged = lab.judged(parts, [asked], {1: text[AGAIN : AGAIN + AHEAD]})
    wanted, _ = lab.laws(reference, [asked], {1: text[AGAIN : AGAIN + AHEAD]})
    laws = {
        i: ({t: float(e[t].exp()) for t in e.isfinite().nonzero()[:, 0].tolist()}, _law(asked, wanted[5, i]))
        for (_, i), e in judged.found.items()
        if i >= 2
    }
    assert laws, "nothing was guessed along a quotation"
    at = max(laws, key=lambda i: sum(e * math.log(e / laws[i][1][t]) for t, e in laws[i][0].items()))
    return _cut(asked, text, at)[0], *laws[at]


def _quoted(lab: Lab, parts: Sequence[Part]) -> tuple[RequestSpec, tuple[int, ...]]:
    """A request that has begun to quote, and the whole quotation."""
    text = tuple(lab.encode(PROSE[1]))[:QUOTED]
    companions = tuple((TokenItem(ids),) for ids in lab.companions(parts))
    asked = RequestSpec(
        id=1, items=(TokenItem((*text, *text[:AGAIN])),), sampling=SamplingSpec(temperature=0.7, top_k=4, max_tokens=1),
        seed=5, companions=companions, grammar=next(iter(lab.grammars(parts)), None),
    )  # fmt: skip
    return asked, text


def _cut(asked: RequestSpec, text: tuple[int, ...], at: int) -> tuple[RequestSpec, int]:
    """The same `at` tokens further on, the last of which is set beforehand, so that the next is guessed; and that."""
    prompt = TokenItem((*text, *text[: AGAIN + at - 1]))
    sampling = msgspec.structs.replace(asked.sampling, max_tokens=4)
    spec = msgspec.structs.replace(asked, items=(prompt,), forced=(text[AGAIN + at - 1],), sampling=sampling)
    return spec, text[AGAIN + at]


def joint(lab: Lab, parts: Sequence[Part], spec: RequestSpec) -> dict[tuple[int, ...], float]:
    """The exact law of the two tokens after the set ones, from the logits of every branch."""
    at = len(spec.forced)

    def branch(first: int) -> list[dict[int, float]]:
        found, _ = lab.laws(parts, [spec], {spec.id: [*spec.forced, first, 0]})
        return [_law(spec, found[spec.seed, at + i]) for i in range(2) if i == 0 or (spec.seed, at + i) in found]

    cells: dict[tuple[int, ...], float] = {}
    for a, p in branch(0)[0].items():
        second = branch(a)[1:]  # none where the output ends with the first
        cells |= {(a, b): p * q for b, q in second[0].items()} if second else {(a,): p}
    return cells


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
