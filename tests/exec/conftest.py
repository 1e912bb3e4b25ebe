"""One bundled model for all tests of execution; engines over it are cheap and made for each test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from weft.config import Stacks, build_stack
from weft.core.engine import Engine
from weft.exec.build import EngineConfig, Runtime, build, make_pool, prepare, reach
from weft.exec.runner import TorchExecutor
from weft.exec.thread import step
from weft.hub import resolve
from weft.types import Event, Finished, Rejected, RequestSpec, SamplingSpec, TokenItem, Tokens

STORY = (
    "It was late in the year when the ferry brought the clockmaker's daughter back to the island. She had been away for "
    "nine winters, and the harbour had grown smaller, or she had grown used to larger ones. Nobody waited on the quay but a "
    "boy with a lantern, who said that her father still wound the tower clock each morning, though he no longer knew for whom. "
    "They walked up the hill in silence. The wind smelled of salt and of burning peat, and behind the shutters people were "
    "telling each other, as they did every evening, that the weather would turn before the week was out."
)


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    setup = prepare(
        EngineConfig(model=resolve(None), dtype="float32", max_model_len=1024, max_num_seqs=64, device="cpu", threads=1)
    )
    return build(setup)


@pytest.fixture(scope="session")
def layered_runtime() -> Runtime:
    """The same model with room for parked hidden states."""
    config = EngineConfig(
        model=resolve(None),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=16,
        device="cpu",
        threads=1,
        techniques=["schedule=layered"],
    )
    return build(prepare(config))


class Bench:
    """An engine over a shared model: `run` sends requests and gives back {(id, index): tokens}.

    A stack that stores KV in another format has a pool of its own.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        blocks: int | None = None,
        techniques: Sequence[str] = (),
        share: bool = True,
        draft: Any = None,
        policy: Any = None,
        **limits: int,
    ) -> None:
        setup, stack = runtime.setup, build_stack(techniques)
        if policy is not None:
            stack = replace(stack, instances={**stack.instances, "schedule": policy})
        if draft is not None:
            stack = replace(stack, instances={**stack.instances, "draft": draft})
        pool = runtime.pool
        if stack.get("kv.store") is not None:
            setup = replace(prepare(replace(setup.config, techniques=tuple(techniques))), stack=stack)
            pool = make_pool(setup)
        stacks = Stacks(stack)
        self.engine = Engine(
            setup.groups,
            blocks or setup.plan.kv_blocks,
            replace(setup.limits, **limits),
            stacks,
            models=tuple(setup.specs),
            layers=len(setup.spec.layers),
            vocab=setup.spec.vocab,
            share=share,
            reach=reach(setup),
            block_bytes=setup.block_bytes,
        )
        self.executor = TorchExecutor(runtime.decoders, pool, stacks, max_guesses=self.engine.limits.max_guesses)
        self.events: list[Event] = []
        self.steps = 0

    def run(
        self, specs: Sequence[RequestSpec], each: Callable[[Bench], None] | None = None
    ) -> dict[tuple[int, int], list[int]]:
        for spec in specs:
            self.events += self.engine.add(spec, 0.0)
        while self.engine.has_work:
            events, _ = step(self.engine, self.executor)
            self.events += events
            self.steps += 1
            if each is not None:
                each(self)
        self.engine.check()
        assert self.engine.pool.referenced == 0
        out: dict[tuple[int, int], list[int]] = {}
        for event in self.events:
            assert not isinstance(event, Rejected), event
            if isinstance(event, Finished):
                assert event.error is None, event.error
            if isinstance(event, Tokens):
                out.setdefault((event.id, event.index), []).extend(event.tokens)
        return out


def spec(id: int, ids: Sequence[int], *, seed: int = 0, n: int = 1, salt: bytes = b"", **law: Any) -> RequestSpec:
    return RequestSpec(id=id, items=(TokenItem(tuple(ids)),), sampling=SamplingSpec(**law), seed=seed, n=n, salt=salt)
