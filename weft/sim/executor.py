"""An executor that computes nothing: every work does what was planned, and each sequence's tokens are nobody else's."""

from __future__ import annotations

from weft.types import Plan, StepResult, WorkResult

OUTPUT = 1 << 60
"""Sequence r says token OUTPUT + r, again and again: no other prompt or answer contains it."""


def facts(plan: Plan) -> StepResult:
    return StepResult(
        step=plan.step,
        works=tuple(
            WorkResult(rows=len(w.tokens) - w.guesses, tokens=(OUTPUT + w.request,) if w.samples else ())
            for w in plan.works
        ),
    )
