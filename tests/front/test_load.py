"""Many clients at once, many of whom leave: nothing is lost and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import openai

from tests.front.conftest import metric
from tests.front.scripted import wait_until

MODEL = "weft-tiny"


def test_two_hundred_clients_with_random_cancellations(url: str, http: httpx.Client) -> None:
    rng = random.Random(20)
    before = {name: metric(http, f'weft:requests_total{{finish_reason="{name}"}}') for name in ("abort", "error")}

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        leaves = rng.random() < 0.5
        tokens = rng.randrange(8, 48)
        patience = rng.randrange(0, 20)
        options: dict[str, Any] = {
            "model": MODEL,
            "seed": number,
            "max_tokens": tokens,
            "n": rng.choice((1, 1, 1, 2, 3)),
        }
        options["extra_body"] = {"ignore_eos": True, "priority": rng.randrange(3)}
        prompt = "The dog ran to the park. " * rng.randrange(1, 12) + str(number % 50)
        if rng.random() < 0.25:  # not streamed
            task = asyncio.ensure_future(client.completions.create(prompt=prompt, **options))
            if leaves:
                await asyncio.sleep(rng.random())
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return "left"
            answer = await task
            assert answer.usage is not None
            assert answer.usage.completion_tokens == tokens * options["n"]
            return "whole"
        stream = await client.completions.create(prompt=prompt, stream=True, **options)
        ended = 0
        async with stream:
            async for chunk in stream:
                ended += sum(choice.finish_reason is not None for choice in chunk.choices)
                patience -= 1
                if leaves and patience < 0:
                    return "left"
        assert ended == options["n"]
        return "whole"

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=240) as pool:
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, http_client=pool)
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    outcomes = asyncio.run(run())
    assert outcomes.count("left") > 50
    assert outcomes.count("whole") > 50
    assert wait_until(lambda: metric(http, "weft:requests_running") == 0, 30)
    assert wait_until(lambda: metric(http, "weft:requests_waiting") == 0)
    assert wait_until(lambda: metric(http, "weft:kv_blocks_referenced") == 0)
    assert metric(http, 'weft:requests_total{finish_reason="abort"}') > before["abort"]
    assert metric(http, 'weft:requests_total{finish_reason="error"}') == before["error"]
    assert http.get("/health").status_code == 200


def test_a_cancelled_stream_changes_nothing_for_its_neighbour(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "Once upon", "seed": 4, "max_tokens": 80}
    options["extra_body"] = {"ignore_eos": True}
    alone = client.completions.create(**options).choices[0].text
    neighbours = [client.completions.create(**{**options, "seed": seed}, stream=True) for seed in range(10, 16)]
    stream = client.completions.create(**options, stream=True)
    text = ""
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].text
        if number < len(neighbours):
            neighbours[number].close()
    assert text == alone
