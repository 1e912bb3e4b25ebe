"""Every draft and every rule beside it under what a request may ask for: stop strings, grammars, log-probabilities, prompts in
chunks, beginnings that are cached.  What is exact says what plain decoding says; what is not keeps the target's own figures."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.draft.law import laws, reader
from tests.draft.test_control import at_known_prices
from tests.exec.conftest import STORY
from weft import LLM, SamplingParams
from weft.conform.lab import Lab
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import names
from weft.types import Event, Plan

DRAFTS = [name for name in names("draft") if name != "none"]
RULES = [name for name in names("accept") if name != "race"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ferry", "lantern"]}, "years": {"type": "integer"}},
    "required": ["name", "years"],
    "additionalProperties": False,
}
WORDS = "([a-z]{1,6} ){3,9}"
STOPS = ["ferry man", "before. She", " veil", "Ruth", "mushroom", " Tom", " friends", " mouth", " short time"]
"""One of these each answer of plain decoding comes to, and not before 13 tokens, so that guesses stand in front of it."""
LAWS: dict[str, dict[str, Any]] = {
    "stop": {"stop": STOPS, "max_tokens": 48},
    "drawn, stop": {"stop": STOPS, "max_tokens": 48, "temperature": 0.9},
    "json": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60},
    "regex": {"structured_outputs": {"regex": WORDS}, "max_tokens": 40, "temperature": 0.9},
    "logprobs": {"logprobs": 3, "max_tokens": 24, "temperature": 0.8},
}
PROMPTS = [STORY[:400], STORY[:400] + STORY[:200], "Once upon a time"]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab()


def with_parts(*parts: str, control: str = "off") -> LLM:
    """Steps of 24 rows, so that the prompts come in several."""
    return LLM(
        device="cpu", threads=1, dtype="float32", max_model_len=512, max_num_seqs=4, max_num_batched_tokens=24,
        techniques=list(parts), draft_control=control,
    )  # fmt: skip


def said(llm: LLM) -> Iterator[tuple[str, Any]]:
    """(law, outputs), each twice: the second time prompts are cached, and a draft may have learnt the answers."""
    for name, law in list(LAWS.items()) * 2:
        outs = llm.generate(PROMPTS, SamplingParams(**{"temperature": 0.0, "seed": 3, **law}), use_tqdm=False)
        yield name, [out.outputs[0] for out in outs]


def told(one: Any) -> Any:
    return one.text, list(one.token_ids), one.finish_reason, one.stop_reason


def figures(one: Any) -> list[float]:
    """Log-probabilities, the chosen token's and the alternatives', place by place."""
    return [x for place in one.logprobs or () for x in sorted(y.logprob for y in place.values())]


@pytest.fixture(scope="module")
def plainly() -> list[Any]:
    """Without a draft.  Answers end where they are asked to, and late enough for guesses."""
    with with_parts() as llm:
        found = list(said(llm))
    for law, outs in found:
        assert law == "logprobs" or {one.finish_reason for one in outs} == {"stop"}, law
        assert "stop" not in law or all(one.stop_reason in STOPS and len(one.token_ids) > 12 for one in outs)
    return found


def accepted(llm: LLM, draft: str) -> int:
    """Guesses that stood so far."""
    assert llm._runtime is not None
    return llm._runtime.engine.stats.acts[f"draft={draft}.accepted"]


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_says_what_plain_decoding_says(lab: Lab, plainly: list[Any], name: str) -> None:
    stood = dict.fromkeys(LAWS, 0)
    with with_parts(str(lab.part("draft", name))) as llm:
        for (law, outs), (_, wanted) in zip(said(llm), plainly, strict=True):
            stood[law] += accepted(llm, name) - sum(stood.values())
            assert [told(one) for one in outs] == [told(one) for one in wanted], law
            for one, plain in zip(outs, wanted, strict=True):
                # A row of a tree adds its entries in another order than the same row of plain decoding.
                assert figures(one) == pytest.approx(figures(plain), abs=1e-4)
        # The bundled model was not taught to leave early, nor to foresee much behind a token that is not drawn yet.
        assert stood["stop"] + stood["drawn, stop"] >= (30 if name not in ("early_exit", "prompt_tokens") else 8)
        assert llm._runtime is not None
        assert llm._runtime.engine.stats.prefix_hit_tokens > 0


@pytest.mark.parametrize("name", ["speculative_sampling", "trie"])
def test_the_controller_says_what_plain_decoding_says(lab: Lab, plainly: list[Any], name: str) -> None:
    """At prices at which guesses now and then pay it switches them on and off, and in a third of the steps somebody loses his
    blocks."""
    rng, guessed = random.Random(2), 0
    with with_parts(str(lab.part("draft", name)), control="on") as llm:
        assert llm._runtime is not None
        engine = llm._runtime.engine
        schedule, scheduler = engine.schedule, engine.scheduler

        def disturbed(now: float) -> tuple[Plan, list[Event]]:
            nonlocal guessed
            if scheduler.running and rng.random() < 1 / 3:
                victim = rng.choice(list(scheduler.running.values()))
                scheduler.preempt(victim)
                scheduler.enqueue(victim, now)
            plan, events = schedule(now)
            guessed += sum(work.guesses for work in plan.works)
            return plan, events

        engine.schedule = disturbed  # type: ignore[method-assign]
        executor, execute = llm._runtime.executor, llm._runtime.executor.execute
        executor.execute = lambda plan: at_known_prices(plan, execute(plan))  # type: ignore[method-assign]
        for (law, outs), (_, wanted) in zip(said(llm), plainly, strict=True):
            assert [told(one) for one in outs] == [told(one) for one in wanted], law
            for one, plain in zip(outs, wanted, strict=True):
                assert figures(one) == pytest.approx(figures(plain), abs=1e-4)
        assert 100 < accepted(llm, name) < guessed
        assert engine.stats.draft_off > 5, "it went on and off"
        assert engine.stats.preemptions > 30
        assert engine.stats.prefix_hit_tokens > 0


@pytest.mark.parametrize("draft", ["speculative_sampling(guesses=3)", "dyspec(guesses=6, depth=3)"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_what_was_asked_for(lab: Lab, rule: str, draft: str) -> None:
    target, tokenizer, count, ended = reader(resolve(None)), Tokenizer.load(resolve(None)), 0, dict.fromkeys(LAWS, 0)
    with with_parts(f"draft={draft}", str(lab.part("accept", rule))) as llm:
        for law, outs in said(llm):
            for prompt, one in zip(PROMPTS, outs, strict=True):
                ended[law] += one.finish_reason == "stop"
                if "stop" in law:
                    assert not any(stop in one.text for stop in STOPS)
                    assert (one.finish_reason == "stop") == (one.stop_reason in STOPS)
                elif law == "json":
                    assert json.loads(one.text).keys() == {"name", "years"}
                elif law == "regex":
                    assert re.fullmatch(WORDS, one.text)
                elif law == "logprobs":
                    ids = tokenizer.encode(prompt, add_special=False)
                    at = torch.arange(len(ids) - 1, len(ids) + len(one.token_ids) - 1)
                    own = laws(target, [*ids, *one.token_ids], 1.0, at).log()
                    for i, (token, place) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
                        assert place[token].logprob == pytest.approx(float(own[i, token]), abs=2e-3)
                        best = own[i].topk(3)
                        assert {int(t) for t in best.indices} <= set(place)
                count += len(one.token_ids)
        assert accepted(llm, draft.partition("(")[0]) > 20
    assert count > 600
    assert ended["json"] == ended["regex"] == 2 * len(PROMPTS)
    assert ended["stop"] + ended["drawn, stop"] >= 8
