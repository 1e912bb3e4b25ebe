"""Loads for compression: long prompts and the answers after them, with the whole cache kept."""

from __future__ import annotations

from collections.abc import Iterator

from bench.harness import Case, Model, encode
from bench.texts import OPENINGS, PARAGRAPHS


def loads(model: Model, *, quick: bool) -> Iterator[tuple[str, Case]]:
    """(title, null) for each number of sequences at once.  Each begins with an opening of its own, so nothing is shared."""
    length, new = (300, 8) if quick else (800, 40)
    story = " ".join(PARAGRAPHS)
    prompts = [ids[:length] for ids in encode(model, [f"{o} {' '.join([story] * 6)}" for o in OPENINGS])]
    for batch in (1,) if quick or model.large else (1, 4):
        count = 1 if model.large else max(batch, 2)
        null = Case(name="whole cache", prompts=prompts[:count], max_new=new, batch=batch)
        yield f"prompts of {length} tokens", null
