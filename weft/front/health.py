"""How a server is, for people and machines that watch it: what /health and /ready answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from starlette.responses import Response

from weft.front.port import STOPPED, EnginePort, EngineState


def state_of(port: EnginePort, stall_s: float) -> EngineState:
    """stall_s: seconds without a step, work waiting, from which on an engine counts as stalled."""
    own = getattr(port, "state", None)
    if own is not None:  # an engine that is looked after says more
        state: EngineState = own(stall_s)
        return state
    reason, stalled_s = port.error(), port.stalled_s()
    if reason is not None:
        return EngineState(status="stalled", reason=STOPPED)
    if stalled_s > stall_s:
        return EngineState(status="stalled", reason=f"no token for {stalled_s:.0f} s while requests wait")
    return EngineState()


def states_of(ports: Mapping[str, EnginePort], stall_s: float) -> EngineState:
    """Of the engines of a server by their models: of a single one as it is, of several well while all of them are."""
    states = {name: state_of(port, stall_s) for name, port in ports.items()}
    first = next(iter(states.values()))
    if len(states) == 1:
        return first
    wrong = "; ".join(f"{name}: {one.reason}" for name, one in states.items() if one.status != "ok")
    steps = [one.last_step_s for one in states.values() if one.last_step_s is not None]
    return EngineState(
        status=next((one.status for one in states.values() if one.status != "ok"), "ok"),
        reason=wrong or None,
        restarts=sum(one.restarts for one in states.values()),
        last_step_s=min(steps, default=None),
        engines=tuple(replace(one, model=name) for name, one in states.items()),
    )


def health(state: EngineState, *, draining: bool = False) -> Response:
    """200 means that tokens advance, or that nobody waits for any, and that requests are taken; else 503 with the reason."""
    status, reason = str(state.status), state.reason
    if draining:
        status, reason = "draining", "the server ends once the open requests have ended; it takes no new ones"
    told: dict[str, Any] = {
        "status": status,
        "reason": reason,
        "engine_pid": state.pid,
        "engine_restarts": state.restarts,
        "last_step_s": None if state.last_step_s is None else round(state.last_step_s, 3),
    }
    if state.engines:
        told["engines"] = [
            {
                **({} if one.model is None else {"model": one.model}),
                "status": one.status,
                "reason": one.reason,
                "pid": one.pid,
                "restarts": one.restarts,
            }
            for one in state.engines
        ]
    return Response(msgspec.json.encode(told), 200 if status == "ok" else 503, media_type="application/json")
