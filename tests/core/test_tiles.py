"""Rows of a prompt that belong together: never parted, whatever bounds a step, and given to others as whole tiles only."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.core.test_scheduler import FULL, VOCAB, Bench
from weft.config import build_stack
from weft.core.engine import Engine
from weft.slots import Quota, RequestView, StepView
from weft.types import Rejected, RequestSpec, SamplingSpec, TokenItem

TILE = 8


def tiled(policy: Any = None, *, share: bool = False, **limits: int) -> Bench:
    """A bench whose stack computes `TILE` rows of a prompt together."""
    b = Bench(share=share, **limits)
    stack = build_stack()
    instances = {**stack.instances, "attention": SimpleNamespace(tile=TILE)}
    if policy is not None:
        instances["schedule"] = policy
    stack = replace(stack, instances=instances)
    b.engine = Engine([FULL], 64, b.limits, stack, share=share, vocab=VOCAB)
    return b


def parted(steps: list[list[tuple[int, int, int]]], prompts: dict[int, int]) -> list[tuple[int, int, int]]:
    """Works that begin or end inside a tile; a prompt's last row is one of its own."""

    def edge(at: int, prompt: int) -> bool:
        return at % TILE == 0 or at >= prompt - 1

    return [w for one in steps for w in one if not all(edge(at, prompts[w[0]]) for at in w[1:])]


def test_tiles_are_never_parted() -> None:
    b, prompts = tiled(max_rows=19), {1: 29, 2: 8, 3: 17, 4: 3, 5: 24}
    for id, prompt in prompts.items():
        b.add(id, prompt)
    steps = b.finish()
    assert parted(steps, prompts) == []
    assert steps[0] == [(1, 0, 16), (4, 0, 3)]
    ends = {w[2] - 1 for one in steps for w in one if w[0] == 1}
    assert {15, 28} <= ends


def test_a_quota_below_a_tile_is_a_tile() -> None:
    fcfs = build_stack()["schedule"]

    class OneRow(type(fcfs)):  # type: ignore[misc]
        def quota(self, request: RequestView, step: StepView) -> Quota:
            return Quota(1)

    b = tiled(OneRow())
    b.add(1, 29)
    assert b.finish()[:4] == [[(1, 0, 8)], [(1, 8, 16)], [(1, 16, 24)], [(1, 24, 29)]]


def test_the_last_row_of_linked_prompts_waits_for_the_others() -> None:
    b = tiled(max_rows=16)
    b.add(1, 12, max_tokens=3)
    b.add(2, 21, max_tokens=3)
    b.engine.link([(1, 0), (2, 0)])
    steps = []
    while b.engine.has_work:
        steps.append(b.step())
        assert len(steps) < 50
    assert parted(steps, {1: 12, 2: 21}) == []
    assert [(1, 11, 12), (2, 20, 21)] in [sorted(one) for one in steps]
    assert b.output(1) == b.output(2)


def test_others_get_whole_tiles() -> None:
    """A hit ends at a tile's end, and the tile with a prompt's last row, or anything after it, is nobody else's."""
    b = tiled(share=True)
    prompt = tuple(range(24))

    def send(id: int, ids: tuple[int, ...], tokens: int) -> int:
        b.engine.add(RequestSpec(id=id, items=(TokenItem(ids),), sampling=SamplingSpec(max_tokens=tokens), seed=1), 0.0)
        first = b.step()[0]
        while b.engine.has_work:
            b.step()
        return first[1]

    assert send(1, prompt, 12) == 0
    assert send(2, prompt, 12) == 16  # rows 16 to 22, and 23, would be others in a longer prompt
    longer = (*prompt, *b.output(1))
    assert send(3, longer, 2) == 16  # the rows of its output were computed one by one
    assert send(4, longer, 2) == 32  # and now in tiles: 36 tokens


def test_forks_go_on_from_the_last_row() -> None:
    b = tiled()
    b.add(1, 29, n=3)
    steps = b.finish()
    assert steps[0] == [(1, 0, 29)]
    assert steps[1] == [(1, 29, 30), (1, 28, 29), (1, 28, 29)]


def test_after_preemption_tiles_come_again() -> None:
    b = tiled(share=True)
    b.add(1, 29, max_tokens=20)
    b.add(2, 27, max_tokens=20)
    steps = b.steps(6)
    for request in list(b.engine.requests()):
        b.engine.scheduler.preempt(request)
        b.engine.scheduler.enqueue(request, 0.0)
    again = b.finish()
    assert parted([*steps, *again], {1: 29, 2: 27}) == []
    assert again[0][0] == (1, 24, 29)


def test_rows_of_its_output_do_not_come_from_a_longer_prompt() -> None:
    """Somebody's prompt holds what this request said: computed in tiles there, one by one here."""
    b = tiled(share=True)
    b.add(1, 29, max_tokens=24)
    b.steps(16)
    (first,) = b.engine.requests()
    longer = TokenItem(tuple(first.context))
    b.engine.add(RequestSpec(id=2, items=(longer,), sampling=SamplingSpec(max_tokens=1), seed=5), 0.0)
    assert (2, 24, 45) in b.step()
    b.engine.scheduler.preempt(first)
    b.engine.scheduler.enqueue(first, 0.0)
    assert b.finish()[0] == [(1, 24, 29)]


@pytest.mark.parametrize(
    ("limits", "code", "text"),
    [
        ({"max_rows": 7}, "unsupported_stack", "8 rows of a prompt together, and a step has room for 7"),
        ({"max_samples": 7}, None, "prompt_logprobs of 8 rows"),
        ({"work_bytes": 79, "row_bytes": 10}, "unsupported_stack", "do not fit a step's workspace of 79 bytes"),
    ],
)
def test_tiles_for_which_no_step_has_room(limits: dict[str, int], code: str | None, text: str) -> None:
    b = tiled(**limits)
    law = SamplingSpec(max_tokens=2, prompt_logprobs=1 if "max_samples" in limits else -1)
    (event,) = b.engine.add(RequestSpec(id=1, items=(TokenItem(tuple(range(20))),), sampling=law), 0.0)
    assert isinstance(event, Rejected)
    assert event.code == code
    assert text in event.message


def test_prompt_logprobs_of_whole_tiles() -> None:
    b = tiled(max_samples=8)
    b.add(1, 20, prompt_logprobs=0)
    b.add(2, 9, prompt_logprobs=0)
    assert parted(b.finish(), {1: 20, 2: 9}) == []
