"""When a request counts as standing still: by hand, over times and steps."""

from __future__ import annotations

from weft.front.still import MOST_AGAIN, Stillness

LIMIT_S = 10.0


def look(
    still: Stillness, progress: int, now: float, *, step: int | None = None, length: int = 0, turn: bool = True
) -> bool:
    """A step in each second, unless said otherwise."""
    return still.overdue(progress, length, now, 100 * int(now) if step is None else step, LIMIT_S, turn)


def test_what_waits_does_not_stand_still() -> None:
    still = Stillness()
    assert not any(look(still, 0, now, turn=False) for now in range(1000))
    assert not look(still, 0, 1000)
    assert not look(still, 0, 1010)
    assert look(still, 0, 1011, turn=False), "once begun, it need not be in the plan of this moment"
    still = Stillness()
    look(still, 3, 0)
    still.wait()
    assert not any(look(still, 3, now, turn=False) for now in range(1000))


def test_any_advance_begins_anew() -> None:
    still = Stillness()
    assert not any(look(still, now // 9, now) for now in range(1000))


def test_a_step_that_is_only_long_is_no_standing_still() -> None:
    still = Stillness()
    look(still, 3, 0, step=0)
    assert not look(still, 3, 500, step=15)
    assert look(still, 3, 501, step=16)


def test_a_long_context_is_given_time() -> None:
    still = Stillness()
    look(still, 0, 0, length=9 * 1024)
    assert not look(still, 0, 100, length=9 * 1024)
    assert look(still, 0, 101, length=9 * 1024)


def test_each_time_takes_twice_as_long_and_then_there_is_no_hope() -> None:
    still, now, waits = Stillness(), 0, []
    while not still.hopeless:
        look(still, 5, now)
        began = now
        while not look(still, 5, now):
            now += 1
        waits.append(now - began)
    assert waits == [11, 21, 41, 81, 161]
    assert len(waits) == MOST_AGAIN + 1
    still = Stillness()
    look(still, 5, 0)
    assert look(still, 5, 11)
    look(still, 5, 12)
    look(still, 6, 13)
    assert still.retries == 0, "it has advanced"
