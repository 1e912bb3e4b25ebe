"""Contrast live: the paper's formula worked by hand, two calls of the reference model combined, and linked rows in company."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft import LLM, SamplingParams
from weft.core import noise
from weft.core.request import State
from weft.errors import ConfigError, RequestError
from weft.exec.build import Runtime
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.types import RequestSpec, TokenItem, Tokens

transformers = pytest.importorskip("transformers", reason="the reference is transformers (extra [hf])")


@pytest.fixture(scope="module")
def reference() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(None), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def pair(
    id: int, own: list[int], other: list[int], *, n: int = 1, seed: int = 0, parts: tuple[str, ...] = (), **law: Any
) -> RequestSpec:
    one = spec(id, own, seed=seed, n=n, **law)
    return RequestSpec(
        id=id,
        items=one.items,
        sampling=one.sampling,
        seed=seed,
        n=n,
        companions=((TokenItem(tuple(other)),),),
        techniques=parts,
    )


def two_calls(
    reference: Any, own: list[int], other: list[int], output: list[int], alpha: float, beta: float = 0.0
) -> np.ndarray:
    """[len(output), vocab]: the combined logits before each output token, from two passes of the reference model, in float64."""
    rows = []
    with torch.inference_mode():
        for context in (own, other):
            logits = reference(torch.tensor([context + output])).logits[0, len(context) - 1 : -1]
            rows.append(logits.double().numpy())
    with_, without = rows
    out = (1 + alpha) * with_ - alpha * without
    if beta:
        p = np.exp(with_ - with_.max(-1, keepdims=True))
        out[p < beta] = -np.inf
    return out


CASES = [(0, 60, 40, 60), (10, 90, 85, 90), (30, 50, 0, 50), (5, 130, 3, 30)]
"""(start, stop) of a context and of its companion, which may be longer."""


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (1.5, 0.0), (0.5, 0.1), (0.0, 0.0)])
def test_greedy_equals_two_calls(reference: Any, runtime: Runtime, ids: list[int], alpha: float, beta: float) -> None:
    bench = Bench(runtime, techniques=[f"sample=cad(alpha={alpha}, beta={beta})"])
    specs = [pair(i, ids[a:b], ids[c:d], max_tokens=14, temperature=0.0) for i, (a, b, c, d) in enumerate(CASES)]
    out = bench.run(specs)
    assert sorted(out) == [(i, 0) for i in range(len(CASES))], "nobody hears of companions"
    for i, (a, b, c, d) in enumerate(CASES):
        combined = two_calls(reference, ids[a:b], ids[c:d], out[i, 0], alpha, beta)
        assert out[i, 0] == combined.argmax(-1).tolist()
    plain = Bench(runtime).run(
        [spec(i, ids[a:b], max_tokens=14, temperature=0.0) for i, (a, b, _, _) in enumerate(CASES)]
    )
    assert (plain == out) == (alpha == 0)
    assert bench.engine.stats.acts["sample=cad.rows_contrasted"] == (14 * len(CASES) if alpha else 0)


def test_seeded_is_the_race_on_the_combined_law(reference: Any, runtime: Runtime, ids: list[int]) -> None:
    bench = Bench(runtime, techniques=["sample=cad(alpha=0.7)"])
    out = bench.run([pair(1, ids[:50], ids[40:50], n=3, seed=99, max_tokens=12, temperature=0.8)])
    for i in range(3):
        combined = two_calls(reference, ids[:50], ids[40:50], out[1, i], 0.7) / 0.8
        seed = noise.child_seed(99, i)
        for at, token in enumerate(out[1, i]):
            race = combined[at] + [noise.gumbel(seed, at, t) for t in range(combined.shape[1])]
            assert int(race.argmax()) == token
    assert len({tuple(x) for x in out.values()}) == 3


def test_log_probabilities_are_of_the_law_that_was_drawn_from(reference: Any, runtime: Runtime, ids: list[int]) -> None:
    bench = Bench(runtime, techniques=["sample=cad"])
    out = bench.run([pair(1, ids[:50], ids[30:50], max_tokens=6, temperature=0.0, logprobs=2, prompt_logprobs=0)])
    law = torch.log_softmax(torch.from_numpy(two_calls(reference, ids[:50], ids[30:50], out[1, 0], 0.5)), -1)
    told = [e for event in bench.events if isinstance(event, Tokens) for e in event.logprobs]
    for at, entry in enumerate(told):
        assert entry.logprob == pytest.approx(float(law[at, entry.token]), abs=1e-4)
        assert [t for t, _ in entry.top] == law[at].topk(2).indices.tolist()
    prompt = [e for event in bench.events if isinstance(event, Tokens) for e in event.prompt_logprobs]
    assert [e.token for e in prompt] == ids[1:50], "the prompt's own, and only of the request's own context"


def test_penalties_work_on_the_combined_law(reference: Any, runtime: Runtime, ids: list[int]) -> None:
    """Bias and repetition penalty, the latter over the request's own context."""
    law = {"max_tokens": 8, "temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": {7: 3.0}}
    out = Bench(runtime, techniques=["sample=cad"]).run([pair(1, ids[:40], ids[30:40], **law)])[1, 0]
    combined = two_calls(reference, ids[:40], ids[30:40], out, 0.5)
    for at, token in enumerate(out):
        x = combined[at].copy()
        x[7] += 3.0
        for seen in {*ids[:40], *out[:at]}:
            x[seen] = x[seen] / 1.5 if x[seen] > 0 else x[seen] * 1.5
        assert int(x.argmax()) == token


@pytest.mark.parametrize(
    "changes",
    [
        {"max_rows": 7},
        {"max_rows": 2, "max_samples": 2},
        {"max_num_seqs": 2},
        {"blocks": 26},
        {"share": False},
        {"techniques": ["draft=ngram(shortest=1)"]},
        {"techniques": ["schedule=prefill_first"]},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_the_same_tokens_in_every_company(runtime: Runtime, ids: list[int], changes: dict[str, Any]) -> None:
    specs = [
        pair(i, ids[a:b], ids[c:d], seed=i, n=1 + i % 2, max_tokens=12, temperature=0.9 * (i % 2), stop_ids=(4,))
        for i, (a, b, c, d) in enumerate(CASES)
    ]
    wanted: dict[tuple[int, int], list[int]] = {}
    for one in specs:
        wanted |= Bench(runtime, techniques=["sample=cad"]).run([one])
    bench = Bench(runtime, **{**changes, "techniques": ["sample=cad", *changes.get("techniques", [])]})

    def preempt(b: Bench) -> None:
        live = b.engine.requests()
        if b.steps % 5 == 0 and live and "blocks" in changes:
            b.engine.scheduler.preempt(live[b.steps % len(live)])
            for r in live:
                if r.state is State.WAITING and r.rid not in b.engine.scheduler.waiting:
                    b.engine.scheduler.enqueue(r, 0.0)

    assert bench.run(specs, each=preempt) == wanted
    if "blocks" in changes:
        assert bench.engine.stats.preemptions > 4
    assert bench.engine.stats.acts.get("draft=ngram.proposed", 0) == 0


def test_layered_steps_and_prefix_hits(layered_runtime: Runtime, runtime: Runtime, ids: list[int]) -> None:
    specs = [pair(i, ids[a:b], ids[c:d], seed=i, max_tokens=9, temperature=0.7) for i, (a, b, c, d) in enumerate(CASES)]
    wanted = Bench(runtime, techniques=["sample=cad"]).run(specs)
    layered = Bench(layered_runtime, techniques=["sample=cad", "schedule=layered(groups=4, least=16)"])
    assert layered.run(specs) == wanted
    again = Bench(runtime, techniques=["sample=cad"])
    assert again.run(specs) == wanted
    hits = again.engine.stats.prefix_hit_tokens
    assert again.run(specs) == {key: tokens * 2 for key, tokens in wanted.items()}
    assert again.engine.stats.prefix_hit_tokens > hits + 100


def test_a_contrast_beside_requests_without_one(runtime: Runtime, ids: list[int]) -> None:
    plain = spec(1, ids[:40], seed=3, max_tokens=9, temperature=0.8)
    own = pair(2, ids[:40], ids[20:40], seed=4, max_tokens=9, temperature=0.8, parts=("sample=cad(alpha=1.0)",))
    alone = {**Bench(runtime).run([plain]), **Bench(runtime).run([own])}
    assert Bench(runtime).run([plain, own]) == alone


def test_a_beam_over_a_contrast(reference: Any, runtime: Runtime, ids: list[int]) -> None:
    """Width 2 over two positions, against every pair of tokens that could win."""
    out = Bench(runtime, techniques=["sample=cad", "search=beam(width=2)"]).run(
        [pair(1, ids[:40], ids[30:40], n=2, max_tokens=2)]
    )

    def law(output: list[int]) -> torch.Tensor:
        return torch.log_softmax(
            torch.from_numpy(two_calls(reference, ids[:40], ids[30:40], [*output, 0], 0.5)[-1]), -1
        )

    first = law([])
    pairs = []
    for a in first.topk(2).indices.tolist():
        second = law([a])
        pairs += [(float(first[a] + second[b]), [a, b]) for b in second.topk(2).indices.tolist()]
    best = sorted(pairs, reverse=True)[:2]
    assert [out[1, 0], out[1, 1]] == [tokens for _, tokens in best]


def test_the_formula_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.0], [1.0, 3.0, -1.0, -2.0]])
    plain = parse("sample=cad(alpha=0.5)").build().warp(logits)
    assert plain.tolist() == [2.5, 0.0, -1.0, 1.0]
    masked = parse("sample=cad(alpha=0.5, beta=0.2)").build().warp(logits)
    # p(with) relative to the largest: 1, e^-1 = 0.37, e^-3 = 0.05, e^-2 = 0.14.
    assert masked.tolist() == [2.5, 0.0, -math.inf, -math.inf]
    for text in ("alpha=-0.1", "alpha=1e999", "beta=1.1", "beta=-0.1", "gamma=1"):
        with pytest.raises(ConfigError):
            parse(f"sample=cad({text})").build()


def test_from_python(runtime: Runtime) -> None:
    """Text, ids or messages beside the prompt; a contrast without a technique, and the reverse, are refused by name."""
    question = "Where did the boy wait? He waited"
    text = STORY + " " + question
    law = SamplingParams(temperature=0.0, max_tokens=8)
    with LLM("bundled", max_model_len=512, memory="700MiB", progress=False) as llm:
        ids = {"own": llm.text.prompt_ids(text), "other": llm.text.prompt_ids(question)}
        wanted = Bench(runtime, techniques=["sample=cad"]).run(
            [pair(1, ids["own"], ids["other"], temperature=0.0, max_tokens=8, stop_ids=llm.text.eos_ids)]
        )[1, 0]
        part = {"techniques": ["sample=cad"]}
        for contrast in (question, ids["other"]):
            (out,) = llm.generate({"prompt": text, "contrast": contrast, **part}, law)
            assert out.outputs[0].token_ids == wanted
        with pytest.raises(RequestError, match="brings nothing to be compared") as error:
            llm.generate({"prompt": text, **part}, law)
        assert error.value.param == "weft.contrast"
        with pytest.raises(RequestError, match="compares nothing"):
            llm.generate({"prompt": text, "contrast": question}, law)
        with pytest.raises(RequestError, match="context is 512"):
            llm.generate({"prompt": "a", "contrast": STORY * 9, **part}, law)
        messages = [{"role": "user", "content": question}]
        chat = {"prompt": llm.text.chat_text(messages), "chat": True, "contrast": messages, **part}
        plain = llm.chat([messages], law)[0].outputs[0].token_ids
        assert llm.generate(chat, law)[0].outputs[0].token_ids == plain, "contrasted with itself nothing changes"
