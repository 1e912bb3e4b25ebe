"""Generated: every technique of the registry keeps what it declares."""

from __future__ import annotations

import pytest

from weft.conform import checks
from weft.conform.checks import DRAWS, conform
from weft.conform.lab import Lab
from weft.conform.pairs import PAIR_DRAWS
from weft.registry import names
from weft.slots import SLOTS

ALL = [f"{slot}={name}" for slot in SLOTS for name in names(slot)]
SLOW = ("accept=bild", "accept=spectr", "accept=typical")
"""Rules whose law is drawn as a pair's is, and as often as `accept=rejection`'s with the long tests."""


def test_the_workload_is_crowded_and_shares(lab: Lab) -> None:
    """What the generated tests rest on: requests are preempted, prompts come from the prefix index, and one is forked."""
    outcome = lab.run([])
    assert outcome.preemptions > 0
    assert outcome.hit_tokens > 0
    assert any(index == 1 for _, index in outcome.tokens)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("text", "draws"),
    [
        *(pytest.param(text, PAIR_DRAWS if text in SLOW else DRAWS, id=text) for text in ALL),
        *(pytest.param(text, DRAWS, id=f"{text}, all draws", marks=pytest.mark.long) for text in SLOW),
    ],
)
def test_it_conforms(lab: Lab, monkeypatch: pytest.MonkeyPatch, text: str, draws: int) -> None:
    monkeypatch.setattr(checks, "DRAWS", draws)
    slot, _, name = text.partition("=")
    results = list(conform(lab, slot, name))
    assert len(results) >= (6 if SLOTS[slot].inside else 5)
    assert [f"{r.test}: {r.text}" for r in results if not r.ok] == []
