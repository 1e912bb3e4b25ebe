"""How a server is, for people and machines that watch it: what /health and /ready answer."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from weft.front.port import EnginePort, EngineState


def state_of(port: EnginePort, stall_s: float) -> EngineState:
    """stall_s: seconds without a step, work waiting, from which on an engine counts as stalled."""
    own = getattr(port, "state", None)
    if own is not None:  # an engine that is looked after says more
        state: EngineState = own(stall_s)
        return state
    reason, stalled_s = port.error(), port.stalled_s()
    if reason is not None:
        return EngineState(status="stalled", reason=f"the engine has stopped: {reason}")
    if stalled_s > stall_s:
        return EngineState(status="stalled", reason=f"no token for {stalled_s:.0f} s while requests wait")
    return EngineState()


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
            {"status": one.status, "reason": one.reason, "pid": one.pid, "restarts": one.restarts}
            for one in state.engines
        ]
    return Response(msgspec.json.encode(told), 200 if status == "ok" else 503, media_type="application/json")
