"""Which kind of cluster a setting asks for."""

from __future__ import annotations

from weft.registry import lookup
from weft.sim.beside import Couples
from weft.sim.cluster import Cluster, Setting
from weft.sim.pools import Pools


def cluster_of(setting: Setting, *, log: bool = False) -> Cluster:
    """A cluster; with roles, or with workers beside each other, where a placement says so."""
    if setting.place is None:
        return Cluster(setting, log=log)
    beside = getattr(lookup("place", setting.place.name), "couple", 0)
    return (Couples if beside else Pools)(setting, log=log)
