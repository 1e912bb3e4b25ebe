"""The generated tests of what decides about engines or prices their steps: a small load in the simulator.

Nothing of an engine can be asked of these: they change no token, and no server has them in its stack.
"""

from __future__ import annotations

from dataclasses import replace

from weft.conform.lab import Lab
from weft.registry import Part
from weft.sim.cluster import Cluster
from weft.sim.kinds import cluster_of
from weft.sim.metrics import slo
from weft.sim.run import Wanted, load, setting
from weft.sim.workload import Arrival

SMALL = Wanted(
    trace="poisson(rate=12, requests=48, prompt=900, output=30, tenants=3, shared=512, images=1)", replicas=4,
    slo=slo("ttft=1s,tpot=50ms"),
)  # fmt: skip


def simulated(lab: Lab, part: Part) -> str:
    """Everybody ends, every token is said once, no block is lost, and the same load comes to the same a second time."""
    arrivals = list(load(SMALL))
    cluster = _run(part, arrivals)
    result, meter = cluster.result(), cluster.meter
    assert result["finished"] == len(arrivals), f"{len(arrivals) - result['finished']} requests did not end"
    said = sum(r.engine.stats.generation_tokens for r in cluster.replicas)
    wanted = sum(a.output for a in arrivals)
    assert said == wanted, f"{said} tokens were said, {wanted} were asked for"
    assert all(a.time_s < first <= end for a, first, end in zip(arrivals, meter.first, meter.ended, strict=True)), (
        "somebody had a token before it had asked"
    )
    assert all(seconds >= 0 for seconds in meter.parts), f"a part of the steps took less than no time: {meter.parts}"
    for replica in cluster.replicas:
        replica.engine.check()
    assert _run(part, arrivals).result() == result, "the same load came to something else the second time"
    engines = len(cluster.replicas)
    return f"{len(arrivals)} requests and {said} tokens in {result['steps']} steps of {engines} engines, twice the same"


def _run(part: Part, arrivals: list[Arrival]) -> Cluster:
    wanted = replace(SMALL, cost=str(part)) if part.slot == "cost" else replace(SMALL, policy=str(part))
    cluster = cluster_of(setting(wanted))
    cluster.run(arrivals)
    return cluster


def acts(lab: Lab, part: Part) -> str:
    """It counts what it decides: at least one of its counters moved."""
    cluster = _run(part, list(load(SMALL)))
    decides = (
        cluster.route if part.slot == "route" else getattr(cluster, "rule", None) or getattr(cluster, "place", None)
    )
    counted: dict[str, int] = getattr(decides, "acts", {})
    assert any(counted.values()), f"nothing was counted: {counted or 'it has no acts'}"
    return ", ".join(f"{act} {count}" for act, count in counted.items())


def live(lab: Lab, part: Part) -> str:
    """Said in a line, so that nobody looks for the tests that are not there."""
    what = "prices steps" if part.slot == "cost" else "decides about engines"
    return f"not asked of it: it {what}, in weft sim, and is no part of an engine, whose tokens it cannot change"
