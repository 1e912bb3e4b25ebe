"""Load on a server that speaks OpenAI's protocol, and what its clients saw: TTFT, TPOT, ends, tokens a second, errors.

Closed loop: so many clients, each of which asks again when it has its answer.  Open loop: requests come at times drawn
beforehand (a Poisson process), however the server fares, and latencies count from those times, so that waiting is not hidden.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.bench.client import Failed, Target
from weft.bench.dataset import Ask
from weft.errors import ConfigError, EngineError

ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """concurrency: clients of a closed loop; of an open one, most requests at once, None for no bound.

    rate: requests a second of an open loop, None for a closed one.  extra: fields of every request.
    """

    concurrency: int | None = 8
    rate: float | None = None
    max_tokens: int = 64
    route: str = "chat"
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate <= 1e6:
            raise ConfigError(f"--rate must be above 0 and at most 1e6 requests a second, got {self.rate}")
        if self.concurrency is not None and not 1 <= self.concurrency <= 100_000:
            raise ConfigError(f"--concurrency must be from 1 to 100000, got {self.concurrency}")
        if self.route not in ROUTES:
            raise ConfigError(f"--route must be {' or '.join(ROUTES)}, got {self.route!r}")


@dataclass(slots=True)
class Sample:
    """What one client saw, in seconds from when it meant to ask.  error: its kind, None where it was answered."""

    ttft_s: float = 0.0
    e2e_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    message: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


async def first_model(target: Target) -> str:
    """The first model that the server lists.  Raises EngineError."""
    try:
        told = await target.get("/v1/models")
    except Failed as error:
        raise EngineError(f"{target.url} does not list its models ({error}); is --url the server's address?") from None
    models = told.get("data") if isinstance(told, dict) else None
    if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
        raise EngineError("the server lists no model; name one with --model")
    return str(models[0]["id"])


async def run(
    target: Target, model: str, asks: Sequence[Ask], load: Load, tick: Callable[[int], None] | None = None
) -> tuple[list[Sample], float]:
    """(what each client saw, seconds from the first request to the last end).  tick: told how many are done."""
    samples: list[Sample] = []

    async def one(ask: Ask, due: float) -> None:
        samples.append(await _ask(target, model, ask, load, due))
        if tick is not None:
            tick(len(samples))

    began = time.perf_counter()
    if load.rate is None:
        waiting = iter(asks)

        async def client() -> None:
            for ask in waiting:
                await one(ask, time.perf_counter())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(load.concurrency or 1, len(asks))):
                group.create_task(client())
    else:
        await _arrive(one, asks, load)
    return samples, time.perf_counter() - began


async def _arrive(one: Callable[[Ask, float], Any], asks: Sequence[Ask], load: Load) -> None:
    assert load.rate is not None
    draw, due = random.Random(load.seed), time.perf_counter()
    room = asyncio.Semaphore(load.concurrency) if load.concurrency else contextlib.nullcontext()

    async def bounded(ask: Ask, due: float) -> None:
        async with room:
            await one(ask, due)

    async with asyncio.TaskGroup() as group:
        for ask in asks:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(bounded(ask, due))
            due += draw.expovariate(load.rate)


async def _ask(target: Target, model: str, ask: Ask, load: Load, due: float) -> Sample:
    chat = load.route == "chat"
    body: dict[str, Any] = {
        "model": model, "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": ask.max_tokens or load.max_tokens, **load.extra,
    }  # fmt: skip
    body |= {"messages": list(ask.messages)} if chat else {"prompt": ask.prompt}
    sample = Sample()
    pieces = 0
    try:
        async with contextlib.aclosing(target.events(ROUTES[load.route], body)) as events:
            async for data in events:
                now = time.perf_counter()
                if data == "[DONE]":
                    continue
                event = json.loads(data)
                if event.get("error"):
                    raise Failed("stream", str(event["error"].get("message", event["error"]))[:300])
                if _says(event, chat=chat):
                    sample.ttft_s = sample.ttft_s or now - due
                    pieces += 1
                sample.e2e_s = now - due
                usage = event.get("usage") or {}
                sample.input_tokens = usage.get("prompt_tokens") or sample.input_tokens
                sample.output_tokens = usage.get("completion_tokens") or sample.output_tokens
        sample.output_tokens = sample.output_tokens or pieces
        sample.ttft_s = sample.ttft_s or sample.e2e_s  # an answer without text
    except Failed as error:
        sample.error, sample.message = error.kind, str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sample.error, sample.message = "answer", f"not in OpenAI's form: {error}"
    return sample


def _says(event: dict[str, Any], *, chat: bool) -> bool:
    for choice in event.get("choices") or ():
        said = (choice.get("delta") or {}) if chat else choice
        if said.get("content") or said.get("text") or said.get("reasoning_content") or said.get("tool_calls"):
            return True
    return False


def summary(samples: Sequence[Sample], seconds: float, load: Load, *, url: str, model: str) -> dict[str, Any]:
    """What `--json` prints."""
    good = [s for s in samples if s.error is None]
    out = sum(s.output_tokens for s in good)
    kinds = Counter(s.error for s in samples if s.error is not None)
    return {
        "url": url,
        "model": model,
        "concurrency": load.concurrency,
        "rate": load.rate,
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "error_kinds": dict(kinds),
        "duration_s": seconds,
        "input_tokens": sum(s.input_tokens for s in good),
        "output_tokens": out,
        "output_tok_s": out / seconds if seconds else 0.0,
        "requests_s": len(good) / seconds if seconds else 0.0,
        "ttft_s": spread([s.ttft_s for s in good]),
        "tpot_s": spread([s.tpot_s for s in good if s.tpot_s is not None]),
        "e2e_s": spread([s.e2e_s for s in good]),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles (nearest rank) and largest; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[min(len(ordered) - 1, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks, "max": ordered[-1]}
