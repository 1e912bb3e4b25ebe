"""What the runner carries out beyond plain decoding: vectors, prompt logprobs, links, trees, short lives, broken logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft.exec.batch import Batch
from weft.exec.build import Runtime
from weft.exec.runner import TorchExecutor
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.models.decoder import Seam
from weft.models.weights import dense
from weft.types import (
    Enter,
    Finished,
    Grant,
    Keep,
    Mask,
    Plan,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
    VectorItem,
    Work,
)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def test_vectors_stand_where_embeddings_would(runtime: Runtime, ids: list[int]) -> None:
    """A prompt whose middle is given as its own embeddings answers as the prompt of tokens does."""
    embed = dense(runtime.decoder.tensors["embed"])
    middle = VectorItem(9, embed.shape[1], embed[torch.tensor(ids[5:14])].float().numpy().tobytes())
    law = SamplingSpec(temperature=0.0, max_tokens=12)
    mixed = RequestSpec(id=1, items=(TokenItem(tuple(ids[:5])), middle, TokenItem(tuple(ids[14:40]))), sampling=law)
    plain = spec(2, ids[:40], temperature=0.0, max_tokens=12)
    for rows in (512, 7):
        out = Bench(runtime, share=False, max_rows=rows).run([mixed, plain])
        assert out[1, 0] == out[2, 0]


def test_equal_vectors_share_a_prefix_and_others_do_not(runtime: Runtime, ids: list[int]) -> None:
    embed = dense(runtime.decoder.tensors["embed"])

    def request(id: int, of: Sequence[int]) -> RequestSpec:
        item = VectorItem(len(of), embed.shape[1], embed[torch.tensor(of)].float().numpy().tobytes())
        return RequestSpec(id=id, items=(item, TokenItem(tuple(ids[:20]))), sampling=SamplingSpec(max_tokens=2))

    bench = Bench(runtime)
    bench.run([request(1, ids[:32])])
    bench.run([request(2, ids[1:33])])
    assert bench.engine.stats.prefix_hit_tokens == 0
    bench.run([request(3, ids[:32])])
    assert bench.engine.stats.prefix_hit_tokens == 48


@pytest.mark.parametrize("rows", [512, 13])
def test_prompt_logprobs_tell_of_every_prompt_token_once(runtime: Runtime, ids: list[int], rows: int) -> None:
    bench = Bench(runtime, max_rows=rows)
    bench.run([spec(9, ids[:60], max_tokens=1)])  # what is cached must not swallow them
    bench.events.clear()
    bench.run([spec(1, ids[:60], max_tokens=3, prompt_logprobs=2)])
    told = [e for event in bench.events if isinstance(event, Tokens) for e in event.prompt_logprobs]
    assert [e.token for e in told] == ids[1:60]
    assert all(len(e.top) == 2 and e.logprob <= e.top[0][1] <= 0 for e in told)
    # The chain rule, the other way round: generate the prompt greedily biased, token by token, and compare.
    forced = Bench(runtime)
    step_at = 30
    bias = {ids[step_at]: 100.0}
    forced.run([spec(2, ids[:step_at], max_tokens=1, temperature=0.0, logprobs=0, logit_bias=bias)])
    entry = next(e for event in forced.events if isinstance(event, Tokens) for e in event.logprobs)
    assert entry.token == ids[step_at]
    assert entry.logprob == pytest.approx(told[step_at - 1].logprob, abs=1e-6)


def test_linked_sequences_get_one_token(runtime: Runtime, ids: list[int]) -> None:
    bench = Bench(runtime)
    for one in (spec(1, ids[:30], seed=1, max_tokens=9), spec(2, ids[40:90], seed=2, max_tokens=9)):
        bench.events += bench.engine.add(one, 0.0)
    bench.engine.link([(1, 0), (2, 0)])
    out = bench.run([])
    assert out[1, 0] == out[2, 0]
    assert len(out[1, 0]) == 9


def test_broken_logits_fail_one_request_and_no_other(runtime: Runtime, ids: list[int]) -> None:
    last = len(runtime.setup.spec.layers) - 1

    def poison(batch: Batch, tensors: tuple[torch.Tensor, ...]) -> None:
        rows = batch.positions_T[batch.logit_rows_N]
        tensors[0][rows == 20] = math.nan

    wanted = Bench(runtime).run([spec(2, ids[30:70], seed=3, max_tokens=5)])
    remove = runtime.decoder.hook(Seam.LOGITS, last, poison)
    try:
        bench = Bench(runtime)
        bench.events += bench.engine.add(spec(1, ids[:18], max_tokens=9), 0.0)
        bench.events += bench.engine.add(spec(2, ids[30:70], seed=3, max_tokens=5), 0.0)
        while bench.engine.has_work:
            plan, _ = bench.engine.schedule(0.0)
            bench.events += bench.engine.commit(0.0, plan, bench.executor.execute(plan))
    finally:
        remove()
    ends = {e.id: e for e in bench.events if isinstance(e, Finished)}
    assert ends[1].reason == "error"
    assert "finite" in str(ends[1].error)
    assert ends[2].reason == "length"
    assert [t for e in bench.events if isinstance(e, Tokens) and e.id == 2 for t in e.tokens] == wanted[2, 0]
    assert bench.engine.pool.referenced == 0


def test_a_tree_of_guesses_is_verified_in_one_pass(runtime: Runtime, ids: list[int]) -> None:
    """The right branch hides among wrong ones; its entries are brought together and decoding goes on as without it."""
    prompt = ids[:21]
    truth = Bench(runtime).run([spec(1, prompt, temperature=0.0, max_tokens=8)])[1, 0]
    wrong = [(t + 1) % 4096 for t in truth]
    #                 0         1         2         3         4         5
    guesses = (wrong[0], truth[0], wrong[1], truth[1], wrong[2], truth[2])
    parents = (-1, -1, 1, 1, 3, 3)
    executor = TorchExecutor({"target": runtime.decoder}, runtime.pool)
    enter = Enter(
        request=5, tokens=tuple(prompt), prompt=21, sampling=SamplingSpec(temperature=0.0), seed=0, entries=(0,)
    )
    tree = Work(
        request=5, rows=((0, 27),), tokens=(*prompt, *guesses), mask=Mask.TREE, keep=Keep.ACCEPT, guesses=6,
        parents=parents, samples=True,
    )  # fmt: skip
    grants = (Grant(5, 0, 0, (3, 5, 4, 9)),)
    first = executor.execute(Plan(step=1, works=(tree,), enter=(enter,), grants=grants)).works[0]
    assert list(first.tokens) == truth[:4]
    # Three guesses stand at 21, 22, 23; the next work starts at the token after them.
    follow = Work(request=5, rows=((24, 25),), tokens=(truth[3],), samples=True, output=4)
    second = executor.execute(Plan(step=2, works=(follow,))).works[0]
    assert list(second.tokens) == [truth[4]]


def test_a_forked_sequence_writes_into_a_copy(runtime: Runtime, ids: list[int]) -> None:
    """Two continuations of one half-full block, told apart by what is appended, answer as if each were alone."""
    bench = Bench(runtime)
    bench.engine.add(spec(1, ids[:21], temperature=0.0, max_tokens=30), 0.0)
    while len(bench.engine.find(1).output) < 3:
        plan, _ = bench.engine.schedule(0.0)
        bench.engine.commit(0.0, plan, bench.executor.execute(plan))
    bench.engine.fork(1, 1)
    known = list(bench.engine.find(1).context)
    bench.engine.append(1, ids[60:64], index=1)
    copies = 0
    out: dict[int, list[int]] = {0: [], 1: []}
    while bench.engine.has_work:
        plan, _ = bench.engine.schedule(0.0)
        copies += len(plan.kv)
        for event in bench.engine.commit(0.0, plan, bench.executor.execute(plan)):
            if isinstance(event, Tokens):
                out[event.index] += event.tokens
        bench.engine.check()
    assert copies >= 1
    for index, prompt in ((0, known), (1, known + ids[60:64])):
        wanted = Bench(runtime, share=False).run([spec(1, prompt, temperature=0.0, max_tokens=27)])[1, 0]
        assert out[index] == wanted[: len(out[index])]
        assert len(out[index]) >= 23


def test_history_is_an_array_of_the_context(runtime: Runtime, ids: list[int]) -> None:
    """Penalties see prompt and output as they grow, through preemption."""
    law = {"temperature": 0.0, "max_tokens": 20, "repetition_penalty": 1.8, "frequency_penalty": 0.5}
    calm = Bench(runtime).run([spec(1, ids[:30], **law)])

    def disturb(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        for victim in list(scheduler.running.values()):
            if bench.steps % 4 == 0:
                scheduler.preempt(victim)
                scheduler.enqueue(victim, 0.0)

    assert Bench(runtime).run([spec(1, ids[:30], **law)], disturb) == calm
    assert calm != Bench(runtime).run([spec(1, ids[:30], temperature=0.0, max_tokens=20)])
    assert isinstance(np.array(calm[1, 0]), np.ndarray)
