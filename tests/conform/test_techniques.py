"""Generated: every technique of the registry keeps what it declares."""

from __future__ import annotations

import pytest

from weft.conform.checks import conform
from weft.conform.lab import Lab
from weft.registry import names
from weft.slots import SLOTS

ALL = [f"{slot}={name}" for slot in SLOTS for name in names(slot)]


def test_the_workload_is_crowded_and_shares(lab: Lab) -> None:
    """What the generated tests rest on: requests are preempted, prompts come from the prefix index, and one is forked."""
    outcome = lab.run([])
    assert outcome.preemptions > 0
    assert outcome.hit_tokens > 0
    assert any(index == 1 for _, index in outcome.tokens)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("text", ALL)
def test_it_conforms(lab: Lab, text: str) -> None:
    slot, _, name = text.partition("=")
    results = list(conform(lab, slot, name))
    assert len(results) >= (6 if SLOTS[slot].inside else 5)
    assert [f"{r.test}: {r.text}" for r in results if not r.ok] == []
