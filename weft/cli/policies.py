"""`weft policies`: what schedules and routers there are, what is claimed of each, and whether a simulation shows it."""

from __future__ import annotations

import json
from typing import Any

from weft.cli._flags import Json, Plugins
from weft.cli._terminal import stdout


def policies(*, plugin: Plugins = None, json_: Json = False) -> None:
    """List schedules, routers and ways to spread a model with their claims, and what became of those in the simulator."""
    from rich.table import Table

    from weft.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    found = known()
    if json_:
        print(json.dumps(found, indent=2))
        return
    grid = Table("policy", "claim", "verdict", "reason", title_justify="left")
    for policy in found:
        grid.add_row(policy["name"], policy["claim"] or "", policy["verdict"], policy["reason"])
    stdout().print(grid)


def known() -> list[dict[str, Any]]:
    """The keys of `weft policies --json`."""
    from weft.features import feature
    from weft.registry import lookup, names
    from weft.sim.machines import DATA
    from weft.slots import Claim

    judged = json.loads((DATA / "policies.json").read_text(encoding="utf8"))
    out = []
    for slot in ("schedule", "route", "place", "cost"):
        for name in names(slot):
            claim: Claim | None = getattr(lookup(slot, name), "claim", None)
            if slot == "cost" and claim is None:
                continue  # a way of pricing, not of serving
            result = judged.get(f"{slot}={name}")
            verdict = (
                "nothing is claimed" if claim is None else "not simulated" if result is None else result["verdict"]
            )
            out.append(
                {
                    "name": f"{slot}={name}",
                    "catalogue": list(feature(slot, name).catalogue),
                    "claim": None if claim is None else claim.text,
                    "simulated": None
                    if result is None
                    else {k: v for k, v in result.items() if k not in ("verdict", "reason")},
                    "verdict": verdict,
                    "reason": "" if result is None else result["reason"],
                }
            )
    return out
