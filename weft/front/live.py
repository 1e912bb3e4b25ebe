"""What whoever watches the server sees: GET /v1/weft/live, server-sent events at most four times a second.

Nothing is computed while nobody watches.  A watcher that does not read loses frames, and takes no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import Receive, Scope, Send

from weft.errors import CapacityError
from weft.front.openai.answer import SSE_HEADERS
from weft.front.port import EngineState
from weft.types import Seen

if TYPE_CHECKING:
    from weft.front.client import Client
    from weft.front.generation import LiveRequest

EVERY_S = 0.25
PING_S = 15.0
MOST_WATCHERS = 8
MOST_REQUESTS = 100
MOST_ENDED = 20
MOST_STEPS = 64
STATS = (
    "running", "waiting", "kv_blocks_total", "kv_blocks_referenced", "kv_blocks_cached", "prompt_tokens", "generation_tokens",
    "prefix_hit_tokens", "prefix_query_tokens", "preemptions", "steps", "rows",
)  # fmt: skip
encode = msgspec.json.encode


Sums = tuple[int, int, int, int]
SUMS = ("steps", "prompt_rows", "decode_rows", "guess_rows")


@dataclass(frozen=True, slots=True)
class Told:
    """What one reader knows.  sums: of all steps up to its last frame, None before the first; blocks: as they were."""

    sums: Sums | None = None
    blocks: tuple[tuple[int, int, int], ...] | None = None


class Live:
    """Keeps what the last steps were made of, and who has ended, while somebody watches.  client: whose requests are shown."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.watchers = 0
        self.closed = False
        """Whether the server ends, and its watchers with it."""
        self.ended: deque[dict[str, Any]] = deque(maxlen=MOST_ENDED)
        self.steps: deque[tuple[float, Seen, Sums]] = deque(maxlen=MOST_STEPS)
        """With the sums of all steps up to each."""
        self._sums: Sums = (0, 0, 0, 0)
        self._blocks: tuple[tuple[int, int, int], ...] | None = None

    def see(self, seen: Seen, now: float) -> None:
        rows = seen.prompt_rows, seen.decode_rows, seen.guess_rows
        if any(rows):  # else nothing is computed, and only the blocks are told
            steps, prompt, decode, guess = self._sums
            self._sums = steps + 1, prompt + rows[0], decode + rows[1], guess + rows[2]
            self.steps.append((now, seen, self._sums))
        self._blocks = self._blocks if seen.blocks is None else seen.blocks

    def end(self, request: LiveRequest, now: float) -> None:
        """It has ended, or is forgotten."""
        if self.watchers:
            self.ended.append(self._shown(request, now, "finished"))

    def come(self) -> None:
        """One more watches."""
        if self.watchers >= MOST_WATCHERS:
            raise CapacityError(f"{MOST_WATCHERS} are watching already; close one of the other pages first")
        self.watchers += 1
        if self.watchers == 1:
            self._client.watch(True)

    def go(self) -> None:
        self.watchers -= 1
        if not self.watchers:
            self._client.watch(False)
            self.ended.clear()
            self.steps.clear()
            self._blocks = None

    def frame(self, state: EngineState, told: Told) -> tuple[dict[str, Any], Told]:
        """(what is to be seen now, what is told with it).  told: what its reader knows already."""
        client = self._client
        now, metrics = client.clock(), client.metrics
        live = list(client.requests)[: MOST_REQUESTS - len(self.ended)]
        news = [entry for entry in self.steps if told.sums is None or entry[2][0] > told.sums[0]]
        frame: dict[str, Any] = {
            "t_s": now,
            "state": {
                "status": state.status, "reason": state.reason, "engine_pid": state.pid, "engine_restarts": state.restarts,
                "last_step_s": state.last_step_s,
            },
            "stats": {name: getattr(client.port.stats, name) for name in STATS},
            "open_requests": client.open_requests,
            "steps": [
                {"step": s.step, "t_s": t, "prompt_rows": s.prompt_rows, "decode_rows": s.decode_rows,
                 "guess_rows": s.guess_rows, "requests": s.sequences}
                for t, s, _ in news
            ],
            "left_out": dict(zip(SUMS, _between(told, news), strict=True)),
            "requests": [*(self._shown(r, now, "waiting" if r.waiting else "running") for r in live), *self.ended],
            "histograms": {
                name: {"buckets": one.buckets, "counts": one.counts}
                for name, one in (("ttft", metrics.ttft), ("tpot", metrics.inter_token))
            },
            "finished": metrics.ends,
        }  # fmt: skip
        if self._blocks is not None and self._blocks != told.blocks:
            frame["blocks"] = self._blocks
        return frame, Told(self._sums, self._blocks)

    def _shown(self, request: LiveRequest, now: float, state: str) -> dict[str, Any]:
        return {
            "id": request.id, "state": state, "prompt_tokens": len(request.prompt.ids), "cached_tokens": request.cached,
            "output_tokens": sum(s.text.tokens for s in request.sequences), "age_s": now - request.arrived_s,
            "timeline": [] if request.timeline is None else request.timeline.moments,
        }  # fmt: skip


def _between(told: Told, news: Sequence[tuple[float, Seen, Sums]]) -> Sums:
    """What steps were made of that came behind those that were told and before the news: too many for one frame."""
    if told.sums is None or not news:  # whoever has just come misses nothing
        return 0, 0, 0, 0
    _, first, sums = news[0]
    own = 1, first.prompt_rows, first.decode_rows, first.guess_rows
    steps, prompt, decode, guess = (a - b - c for a, b, c in zip(sums, own, told.sums, strict=True))
    return steps, prompt, decode, guess


class LiveAnswer:
    """The feed, until its reader goes.  state: of the engine.  hello: what does not change."""

    def __init__(self, live: Live, state: Callable[[], EngineState], hello: dict[str, Any]) -> None:
        """Raises CapacityError where too many watch."""
        live.come()
        self._live, self._state, self._hello = live, state, hello

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            await _send(send, b"event: hello\ndata: " + encode(self._hello) + b"\n\n")
            told, before, quiet_s = Told(), b"", 0.0
            while not gone.done() and not self._live.closed:
                frame, told = self._live.frame(self._state(), told)
                same = encode({**frame, "t_s": 0, "requests": [], "state": {**frame["state"], "last_step_s": 0}})
                quiet = same == before and not frame["open_requests"]
                quiet_s = quiet_s + EVERY_S if quiet else 0.0
                before = same
                if not quiet or quiet_s == EVERY_S:
                    await _send(send, b"event: frame\ndata: " + encode(frame) + b"\n\n")
                elif quiet_s >= PING_S:
                    quiet_s = EVERY_S
                    await _send(send, b": ping\n\n")
                await asyncio.wait([gone], timeout=EVERY_S)
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._live.go()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def hello(client: Client, names: Sequence[str], version: str, engines: Sequence[str] = ()) -> dict[str, Any]:
    """What the first event of a feed says of the server.  engines: the models that have a feed, where there are several."""
    info = asdict(client.port.info)
    shown = ("plan", "block_tokens", "kv_blocks", "max_model_len", "max_num_seqs", "device", "dtype", "stack")
    beside = {"engines": list(engines)} if engines else {}
    return {"version": version, "models": list(names), **beside, **{name: info[name] for name in shown}}
