"""What a thread hands over to an event loop: in order, and others of the loop are not held up."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from weft.front import relay
from weft.front.relay import Relay


@pytest.mark.parametrize(("each_s", "most"), [(0.0, 200), (0.003, 1)])
def test_everything_comes_in_order_and_others_have_a_turn(each_s: float, most: int) -> None:
    """200 items that were all there at once; those that take longer than a turn come one in each."""
    found: list[int] = []
    alone: list[int] = []  # items between two turns of another task

    def take(item: int) -> None:
        found.append(item)
        time.sleep(each_s)

    async def run() -> None:
        put = Relay(asyncio.get_running_loop(), take).put
        thread = threading.Thread(target=lambda: [put(i) for i in range(200)])
        thread.start()
        thread.join()
        while len(found) < 200:
            before = len(found)
            await asyncio.sleep(0)
            alone.append(len(found) - before)

    asyncio.run(run())
    assert found == list(range(200))
    assert max(alone) <= most


def test_what_comes_alone_is_taken_in_the_turn_in_which_it_comes() -> None:
    async def run() -> list[list[int]]:
        found: list[int] = []
        gone: list[list[int]] = []
        given = Relay(asyncio.get_running_loop(), found.append)
        for item in range(3):
            given.put(item)
            await asyncio.sleep(0)
            gone.append(list(found))
        return gone

    assert asyncio.run(run()) == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("before", [0, 1])
def test_nothing_gathers_for_a_loop_that_is_closed(before: int) -> None:
    loop = asyncio.new_event_loop()
    given = Relay[int](loop, lambda item: None)
    for item in range(before):
        given.put(item)
    loop.close()
    for item in range(10):
        given.put(item)
    assert not given._items


def test_an_item_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "TURN_S", 0.0)
    found: list[int] = []
    said: list[object] = []

    def take(item: int) -> None:
        if item == 1:
            raise ValueError(item)
        found.append(item)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: said.append(context["exception"]))
        put = Relay(loop, take).put
        for item in range(4):
            put(item)
        for _ in range(9):
            await asyncio.sleep(0)

    asyncio.run(run())
    assert found == [0, 2, 3]
    assert [str(error) for error in said] == ["1"]
