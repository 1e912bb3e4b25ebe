"""Benchmarks of the slot `kv.offload`: documents that are asked about in turns, in a pool that holds one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode
from bench.texts import OPENINGS, PARAGRAPHS

TURNS = 4
NOTES = (
    "Each document is asked about four times, and the others in between push it out of the pool: without a tier every prompt is "
    "computed four times, with one it is computed once, so 4 is the most that prefill can gain here.",
    "Saving, loading and checking are part of the prefill's time.",
)


def asked_in_turns(options: Options, cases: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """cases: (name, technique)."""
    for model in options.models("smollm2-135m"):
        texts = [" ".join(PARAGRAPHS[i:] + PARAGRAPHS[:i]) for i in range(len(PARAGRAPHS))]
        documents = [ids[:256] for ids in encode(model, texts)]
        asked = encode(model, OPENINGS)
        prompts = [(*d, *asked[turn][:12]) for turn in range(2 if options.quick else TURNS) for d in documents]
        null = Case(name="the pool alone", prompts=prompts, max_new=4, engine={"share": True})
        tiers = [replace(null, name=name, techniques=(technique,)) for name, technique in cases]
        yield options.compare(model, null, tiers, "four documents in turns, room for one")
