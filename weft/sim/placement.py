"""Placement search: which proportion of replicas computes prompts gives the most goodput, by simulating each (000-52)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.errors import ConfigError
from weft.registry import lookup, names
from weft.sim.kinds import cluster_of
from weft.sim.run import Wanted, policies, setting
from weft.sim.workload import Arrival


@dataclass(frozen=True, slots=True)
class Split:
    """One proportion and what came of it."""

    policy: str
    result: dict[str, Any]


def proportions(wanted: Wanted, place: str) -> list[str]:
    """Policies of every number of prefill replicas (and of encoders) from one on, for a placement by name.

    Raises ConfigError where there are too few replicas for both phases.
    """
    inside = lookup("place", place)
    if not hasattr(inside, "prefill"):
        known = ", ".join(n for n in names("place") if hasattr(lookup("place", n), "prefill"))
        raise ConfigError(f"under place={place} no number of replicas is set aside for prompts; it is under: {known}")
    outside = policies(wanted.policy)[1]
    if outside:
        raise ConfigError(f"{place} decides which replica serves; leave out {' and '.join(map(str, outside.values()))}")
    if wanted.replicas < 2:
        raise ConfigError(f"two phases need at least 2 replicas, got {wanted.replicas}")
    found = []
    coders = range(1, wanted.replicas) if hasattr(inside, "encode") else (0,)
    for encode, prefill in itertools.product(coders, range(1, wanted.replicas)):
        policy = f"{wanted.policy}+{place}(prefill={prefill}" + (f", encode={encode})" if encode else ")")
        try:
            cluster_of(setting(replace(wanted, policy=policy)))
        except ConfigError:
            continue  # no replica would be left for answers
        found.append(policy)
    if not found:
        raise ConfigError(f"{place} needs more than {wanted.replicas} replicas")
    return found


def splits(wanted: Wanted, place: str, load: Sequence[Arrival]) -> list[Split]:
    """What comes of each of these; the best goodput first, of equals fewer of them.  Raises ConfigError as `proportions`."""
    found = []
    for policy in proportions(wanted, place):
        cluster = cluster_of(setting(replace(wanted, policy=policy)))
        cluster.run(load)
        found.append(Split(policy, cluster.result()))
    return sorted(found, key=lambda s: -s.result["goodput"])
