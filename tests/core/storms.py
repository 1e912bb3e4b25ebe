"""Storms: events drawn by weight and thrown at the machine, quicker and wilder than hypothesis finds them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from tests.core.machine import Machine
from tests.core.world import VOCAB


def storm(machine: type[Machine], seed: int, events: int, **fixed: Any) -> Counter[str]:
    """Events drawn by weight, so that everything that may happen does happen; what was seen of it.  fixed: for `begin`."""
    rnd = random.Random(seed)
    m = machine()
    chosen: dict[str, Any] = {
        "seed": seed, "models": 1 + (seed % 3 == 1), "flights": 1 + seed % 2, "share": seed % 5 != 0, "cut": seed % 3 == 2,
        "blocks": rnd.randrange(20, 45), "rows": rnd.choice([4, 8, 16]), "samples": rnd.choice([3, 9]),
        "seqs": rnd.choice([3, 6]), "guesses": rnd.choice([None, 0.5, 0.9]), "spare": rnd.choice([None, 60]), "start": 5,
        "ahead": seed % 2 == 0,
        "below": (None, 6, 40)[seed % 7 % 3],
    }  # fmt: skip
    m.begin(**{**chosen, **fixed})
    calm = 0.8 if m.most_flights == 1 else 0.3

    def draw() -> int:
        return rnd.randrange(2**16)

    kinds: dict[str, tuple[int, Any]] = {
        "go_on": (8, lambda: m.go_on(rnd.randrange(2, 8))),
        "submit": (6, m.submit),
        "collect": (4, lambda: m.flights and m.collect()),
        "break_off": (1, lambda: m.flights and m.break_off(rnd.random() < 0.5)),
        "burst": (3, lambda: m.burst(draw(), rnd.randrange(1, 5))),
        "cancel": (2, lambda: m.cancel(draw(), rnd.random() < 0.7)),
        "fail": (1, lambda: m.fail(draw())),
        "append": (2, lambda: m.append(draw(), [rnd.randrange(VOCAB) for _ in range(rnd.randrange(1, 6))])),
        "truncate": (2, lambda: m.truncate(draw(), rnd.random())),
        "retry": (2, lambda: m.retry(draw(), rnd.random(), [rnd.randrange(VOCAB) for _ in range(rnd.randrange(1, 6))])),
        "fork": (2, lambda: m.fork(draw())),
        "park": (2, lambda: m.park(draw())),
        "resume": (2, lambda: m.resume(draw())),
        "preempt": (1, lambda: m.preempt(draw())),
        "link": (2, lambda: m.link([draw() for _ in range(rnd.choice([2, 3]))])),
        "weather": (1, lambda: m.weather(rnd.choice([0.0, 0.2]), rnd.random() < 0.2, rnd.choice([0.0, 0.2]))),
    }
    names, weights = list(kinds), [w for w, _ in kinds.values()]
    for name in rnd.choices(names, weights, k=events):
        if name in ("append", "truncate", "fork", "park", "resume") and rnd.random() < calm:
            m.land()
        if (m.engine.has_work or name not in ("go_on", "submit")) and (m.live or name in ("burst", "weather")):
            kinds[name][1]()
    m.teardown()
    return m.seen
