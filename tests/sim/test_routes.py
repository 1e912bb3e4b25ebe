"""Routers on a few requests, worked by hand, and what tells policies and costs of all kinds apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from weft.errors import ConfigError
from weft.registry import lookup, names, parse
from weft.sim.kinds import cluster_of
from weft.sim.run import Wanted, load, setting
from weft.sim.workload import Pace
from weft.slots.route import Route

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
SYNTHETIC = "gamma(rate=2, cv=2, prompt=700, output=60, tenants=4, shared=600, urgent=0.1)"
TRACES = ((SYNTHETIC, 80), ("azure2023/AzureLLMInferenceTrace_conv.csv", 40), ("servegen/language/m-small", 40))
"""And how many requests of each.  No public trace says who is urgent."""


@dataclass
class View:
    """A replica as a router sees it."""

    running: int = 0
    waiting: int = 0
    pending: int = 0
    used: float = 0.0


def chosen(route: str, prompts: list[tuple[int, ...]], *replicas: View) -> list[int]:
    """Who gets each of these, one after the other; every one of them runs where it went."""
    rule: Route = parse(f"route={route}").build()
    found = []
    for prompt in prompts:
        i = rule.choose(prompt, b"", replicas, 0.0)
        replicas[i].running += 1
        found.append(i)
    return found


def test_round_robin_takes_turns_whoever_is_busy() -> None:
    assert chosen("round_robin", [(1,)] * 5, View(running=9), View(), View()) == [0, 1, 2, 0, 1]


def test_least_loaded_counts_rows_and_sequences() -> None:
    # 500 rows; 3 sequences of 128; 300 rows and one sequence: 500, 384 and 428, then 500, 512 and 428, then 500, 512 and 556.
    views = View(pending=500), View(running=2, waiting=1), View(pending=300, running=1)
    assert chosen("least_loaded", [(1,)] * 3, *views) == [1, 2, 0]
    # Of rows alone, sequences count for nothing.
    views = View(pending=500), View(running=2, waiting=1), View(pending=300, running=1)
    assert chosen("least_loaded(each=0)", [(1,)] * 3, *views) == [1, 1, 1]


def test_power_of_two_asks_two_that_are_drawn_and_no_third() -> None:
    def drawn(number: int, n: int) -> tuple[int, int]:
        """Two of n by chance, by the digest of seed and number of the request."""
        digest = hashlib.blake2b(b"0 %d" % number, digest_size=16).digest()
        one = int.from_bytes(digest[:8], "little") % n
        return one, (one + 1 + int.from_bytes(digest[8:], "little") % (n - 1)) % n

    busy = [View(running=r) for r in (5, 0, 3, 4, 1)]
    pairs = [drawn(number, 5) for number in range(1, 9)]
    loads, wanted = [5, 0, 3, 4, 1], []
    for one, other in pairs:
        at = one if loads[one] <= loads[other] else other
        wanted.append(at)
        loads[at] += 1
    assert all(one != other for one, other in pairs)
    assert chosen("power_of_two", [(1,)] * 8, *busy) == wanted
    assert len(set(wanted)) > 2
    assert wanted != chosen("least_loaded", [(1,)] * 8, *[View(running=r) for r in (5, 0, 3, 4, 1)])


def test_prefix_aware_goes_where_the_beginning_was_unless_that_one_is_too_busy() -> None:
    a, b = (7,) * 300, (8,) * 300
    prompts = [a, b, (*a[:256], 1, 2), b]
    assert chosen("prefix_aware(slack=2)", prompts, View(), View(), View()) == [0, 1, 0, 1]
    assert chosen("least_loaded", prompts, View(), View(), View()) == [0, 1, 2, 0]
    # The third of the same beginning finds two more sequences there than elsewhere, the fourth three: it goes elsewhere.
    assert chosen("prefix_aware(slack=2)", [a] * 4, View(), View()) == [0, 0, 0, 1]
    # A short beginning is worth nothing: 128 of 600 tokens are less than a quarter.
    assert chosen("prefix_aware", [a, (*a[:128], *range(472))], View(), View()) == [0, 1]


@pytest.mark.parametrize("text", ["fcfs+round_robin+power_of_two", "semipd+distserve", "fcfs+fair"])
def test_a_slot_takes_one_policy(text: str) -> None:
    with pytest.raises(ConfigError, match="takes one technique"):
        cluster_of(setting(Wanted(trace="poisson(rate=1)", policy=text, replicas=4)))


def logs(policy: str, trace: str, requests: int = 160, **changes: Any) -> str:
    """A digest of the decision logs of all engines over the beginning of a trace at many times its pace, on little memory."""
    given = {"replicas": 4, "blocks": 2500, "max_num_seqs": 8, "max_model_len": 65536, **changes}
    wanted = Wanted(trace=trace, policy=policy, pace=Pace(time=20.0, requests=requests), **given)
    cluster = cluster_of(setting(wanted), log=True)
    cluster.run(load(wanted))
    return hashlib.blake2b(json.dumps(cluster.logs, default=str).encode()).hexdigest()


def arguments(slot: str, name: str) -> str:
    given = getattr(lookup(slot, name), "trial", {})
    inside = ", ".join(f"{k}={v!r}" for k, v in given.items()) if isinstance(given, dict) else ""
    beside = "".join(f"+{text}" for text in getattr(lookup(slot, name), "beside", ()))
    return f"{name}({inside}){beside}" if inside else name + beside


def test_no_two_routers_decide_alike() -> None:
    found = {n: logs(n, "gamma(rate=40, cv=2, prompt=900, output=60, tenants=6, shared=600)") for n in names("route")}
    assert len(set(found.values())) == len(found), found


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/traces")
def test_no_two_policies_decide_alike_on_all_traces() -> None:
    """Schedules on one engine, routers and placements on four: two that never differ would be one."""
    alike = [[(slot, name) for slot in ("schedule", "route", "place") for name in names(slot)]]
    for trace, requests in TRACES:  # each for those whom those before did not tell apart
        path = trace if trace == SYNTHETIC else str(SHARED / trace)
        told: dict[tuple[int, str], list[tuple[str, str]]] = {}
        for i, group in enumerate(alike):
            for slot, name in group:
                engines = 1 if slot == "schedule" else 4
                decided = logs(arguments(slot, name), path, requests, replicas=engines)
                told.setdefault((i, decided), []).append((slot, name))
        alike = [group for group in told.values() if len(group) > 1]
    assert alike == [], "these decided the same on all traces"


def test_no_two_costs_price_alike() -> None:
    """Of one load on four devices, each at arguments under which it has something to tell."""
    wanted = Wanted(trace="poisson(rate=10, requests=60, prompt=2500, output=40)", devices=4, hardware="l40s")
    given = {"megatron": "stages=2", "energonai": "stages=2"}
    found: dict[str, str] = {}
    for name in names("cost"):
        if name not in ("calibrated", "table"):
            cluster = cluster_of(setting(replace(wanted, cost=f"{name}({given.get(name, '')})")))
            cluster.run(load(wanted))
            found[name] = json.dumps(cluster.result())
    assert len(set(found.values())) == len(found), {n: hash(v) for n, v in found.items()}
