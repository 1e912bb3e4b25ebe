"""Placement search: which proportion of replicas computes prompts gives the most goodput, by simulating each (000-52)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.errors import ConfigError
from weft.sim.pools import cluster_of
from weft.sim.run import Wanted, setting
from weft.sim.workload import Arrival


@dataclass(frozen=True, slots=True)
class Split:
    """One proportion and what came of it."""

    policy: str
    result: dict[str, Any]


def splits(wanted: Wanted, place: str, load: Sequence[Arrival]) -> list[Split]:
    """Every number of prefill replicas from one on, for a placement by name; the best goodput first, of equals fewer of them.

    Raises ConfigError where there are too few replicas for both phases.
    """
    if wanted.replicas < 2:
        raise ConfigError(f"two phases need at least 2 replicas, got {wanted.replicas}")
    found = []
    for prefill in range(1, wanted.replicas):
        policy = f"{wanted.policy}+{place}(prefill={prefill})"
        try:
            cluster = cluster_of(setting(replace(wanted, policy=policy)))
        except ConfigError:
            break  # no replica would be left for answers
        cluster.run(load)
        found.append(Split(policy, cluster.result()))
    if not found:
        raise ConfigError(f"{place} needs more than {wanted.replicas} replicas")
    return sorted(found, key=lambda s: -s.result["goodput"])
