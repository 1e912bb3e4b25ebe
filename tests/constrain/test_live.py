"""Grammars at work on the bundled model: alone and in company, with guesses, forks, preemption, prefix hits and resumption."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from weft.exec.build import Runtime
from weft.exec.thread import step
from weft.front.text import ModelText
from weft.types import Event, Finished, Grammar, Preempted, Rejected, RequestSpec, SamplingSpec, TokenItem, Tokens

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["sea", "land", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
HELD = ("constrain=llguidance",)
JSON = Grammar("json", json.dumps(SCHEMA))
WORDS = Grammar("regex", r"([A-Z][a-z]{1,7} ){2}[0-9]{3}(-[0-9]{2}){0,4}")
PROMPT = "The keeper of the lighthouse wrote a letter to his sister. In it he said: " * 2


def spec(
    text: ModelText, id: int, grammar: Grammar = JSON, *, techniques: tuple[str, ...] = HELD, **more: Any
) -> RequestSpec:
    law = {"temperature": 0.9, "max_tokens": 96, "stop_ids": text.eos_ids, **more.pop("law", {})}
    ids = tuple(text.tokenizer.encode(PROMPT + str(id % 3)))
    return RequestSpec(
        id=id, items=(TokenItem(ids),), sampling=SamplingSpec(**law), techniques=techniques, grammar=grammar,
        **{"seed": 7 * id, **more},
    )  # fmt: skip


def run(runtime: Runtime, specs: list[RequestSpec]) -> tuple[dict[tuple[int, int], list[int]], list[Event]]:
    events: list[Event] = []
    for one in specs:
        events += runtime.engine.add(one, 0.0)
    while runtime.engine.has_work:
        more, _ = step(runtime.engine, runtime.executor)
        events += more
    runtime.engine.check()
    out: dict[tuple[int, int], list[int]] = {}
    for event in events:
        assert not isinstance(event, Rejected), event
        if isinstance(event, Tokens):
            out.setdefault((event.id, event.index), []).extend(event.tokens)
    return out, events


def judged(text: ModelText, ids: list[int], grammar: Grammar = JSON) -> str:
    """The text of an output that ended, which is one of its grammar."""
    assert ids[-1] in text.eos_ids, "it did not end"
    found = text.tokenizer.decode(ids)
    if grammar == JSON:
        jsonschema.validate(json.loads(found), SCHEMA)
    else:
        assert re.fullmatch(grammar.source, found), found
    return found


def test_in_company_as_alone_and_every_answer_fits(runtime: Runtime, text: ModelText) -> None:
    """Greedy and seeded, beside others with another grammar and with none; also when tokens were set by a draft's guesses."""
    mixed = [
        spec(
            text,
            i,
            (JSON, WORDS)[i % 2],
            n=1 + i % 3,
            law={"temperature": (0.0, 0.9, 1.5)[i % 3], "top_k": 0 if i % 2 else 40},
        )
        for i in range(1, 9)
    ]
    free = [spec(text, 20 + i, techniques=(), grammar=None, law={"max_tokens": 20}) for i in range(3)]  # type: ignore[arg-type]
    plain, _ = run(runtime, free)
    before = runtime.engine.stats
    out, events = run(runtime, [*mixed, *free])
    assert sum(one.n for one in mixed) + 3 == len(out)
    for (id, index), ids in out.items():
        if id < 20:
            judged(text, ids, (JSON, WORDS)[id % 2])
        else:
            assert ids == plain[id, index], "who has no grammar is not touched by those of others"
    assert all(e.reason == "stop" for e in events if isinstance(e, Finished) and e.id < 20)
    after = runtime.engine.stats
    rows = after.masked_rows - before.masked_rows
    assert rows == sum(len(ids) for (id, _), ids in out.items() if id < 20), "one for each token"
    assert 0 < after.masked_steps - before.masked_steps <= rows
    assert after.mask_s > before.mask_s
    for one in mixed[:4]:
        found, _ = run(runtime, [one])
        assert all(found[key] == out[key] for key in found)


def test_guesses_are_verified_under_the_mask(runtime: Runtime, text: ModelText) -> None:
    """Equal tokens with a draft, and some guesses stood; a guess that the grammar does not allow never does."""
    grammar = Grammar("regex", "((lighthouse|letter) ){12}(sister|keeper)")
    asked = [spec(text, i, grammar, law={"temperature": t}) for i, t in ((1, 0.0), (2, 0.8), (3, 1.2))]
    plain, _ = run(runtime, asked)
    guessed = [
        spec(text, i, grammar, techniques=(*HELD, "draft=ngram"), law={"temperature": t})
        for i, t in ((1, 0.0), (2, 0.8), (3, 1.2))
    ]
    before = runtime.engine.stats.acts
    found, _ = run(runtime, guessed)
    acts = runtime.engine.stats.acts
    assert found == plain
    proposed, accepted = (
        acts[f"draft=ngram.{a}"] - before.get(f"draft=ngram.{a}", 0) for a in ("proposed", "accepted")
    )
    assert proposed > accepted > 10
    for ids in found.values():
        judged(text, ids, grammar)


def test_a_resumed_request_goes_on_where_it_was(runtime: Runtime, text: ModelText) -> None:
    """The place in a grammar is made of the output so far: after any number of tokens, in another engine's life."""
    whole, _ = run(runtime, [spec(text, 1)])
    ids = whole[1, 0]
    judged(text, ids)
    for kept in (1, len(ids) // 2, len(ids) - 1):
        rest, _ = run(runtime, [spec(text, 1, resumed=tuple(ids[:kept]))])
        assert [*ids[:kept], *rest[1, 0]] == ids
    wrong, events = run(runtime, [spec(text, 1, resumed=(ids[0], ids[0], ids[0]))])
    assert not wrong
    (ended,) = [e for e in events if isinstance(e, Finished)]
    assert ended.reason == "error"
    assert ended.error is not None
    assert "grammar" in ended.error


def test_preempted_and_forked(bundled: Any, text: ModelText) -> None:
    """In a pool that holds two of them, sequences lose their KV and their places, and get the same tokens."""
    from dataclasses import replace

    from weft.exec.build import EngineConfig, build, prepare

    def engine(blocks: int) -> Runtime:
        config = EngineConfig(
            model=bundled, dtype="float32", max_model_len=256, max_num_seqs=8, device="cpu", threads=1, max_rows=64
        )
        setup = prepare(config)
        return build(replace(setup, plan=replace(setup.plan, kv_blocks=blocks)), vocabulary=text.vocabulary)

    asked = [spec(text, i, JSON, n=2 if i == 2 else 1, law={"min_tokens": 0}) for i in range(1, 6)]
    roomy, _ = run(engine(400), asked)
    tight, events = run(engine(12), asked)
    assert any(isinstance(e, Preempted) for e in events)
    assert tight == roomy
    for ids in tight.values():
        judged(text, ids)


def test_a_grammar_that_has_ended_ends_the_output(runtime: Runtime, text: ModelText) -> None:
    """Whatever min_tokens and the stop ids say; before that, min_tokens holds where the grammar leaves a choice."""
    short = Grammar("choice", '["yes", "no"]')
    for law in ({"min_tokens": 50}, {"stop_ids": ()}, {"stop_ids": (), "min_tokens": 50}):
        out, events = run(runtime, [spec(text, 1, short, law=law)])
        assert text.tokenizer.decode(out[1, 0]) in ("yes", "no")
        assert [e.reason for e in events if isinstance(e, Finished)] == ["stop"]
    out, _ = run(
        runtime,
        [
            spec(
                text,
                1,
                Grammar("regex", "a*"),
                law={"min_tokens": 20, "max_tokens": 40, "logit_bias": {text.eos_ids[0]: 100.0}},
            )
        ],
    )
    assert len(out[1, 0]) == 21, "twenty tokens, and the end that is likeliest"


def test_logprobs_are_of_the_masked_law(runtime: Runtime, text: ModelText) -> None:
    _, events = run(runtime, [spec(text, 1, Grammar("choice", '["yes", "no"]'), law={"logprobs": 5})])
    first = next(e for e in events if isinstance(e, Tokens)).logprobs[0]
    assert 1 <= len(first.top) <= 5, "tokens that can't be drawn are not among them"
    assert all(value > float("-inf") for _, value in first.top)
    allowed = {
        i
        for i, token in enumerate(text.vocabulary().tokens)
        if token and (b"yes".startswith(token) or b"no".startswith(token))
    }
    assert {i for i, _ in first.top} <= allowed


def test_a_grammar_needs_a_technique(runtime: Runtime, text: ModelText) -> None:
    (event,) = runtime.engine.add(spec(text, 1, techniques=()), 0.0)
    assert isinstance(event, Rejected)
    assert "slot constrain" in event.message


@pytest.mark.parametrize(
    "law",
    [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}, {"temperature": 0.0}],
    ids=str,
)
def test_kernels_and_reference_draw_alike_from_masked_rows(law: dict[str, Any], runtime: Runtime) -> None:
    """However few tokens a mask leaves."""
    import numpy as np
    import torch

    from weft.exec import sampler

    program = runtime.decoder.program
    if program is None:
        pytest.skip("the kernels are not built")
    generator = torch.Generator().manual_seed(3)
    for left in (1, 2, 5, 60, 2000):
        logits = 3 * torch.randn(8, 4096, generator=generator)
        for row in logits:
            gone = torch.randperm(4096, generator=generator)[left:]
            row[gone] = float("-inf")
        rows = [
            sampler.Row(SamplingSpec(**{"temperature": 0.8, **law}), 5 + i, i, np.empty(0, np.int64), 0)
            for i in range(8)
        ]
        drawn = sampler.draw(logits, rows, program)
        assert drawn == sampler.draw(logits, rows)
        assert all(bool(torch.isfinite(logits[i, token])) for i, token in enumerate(drawn))


def test_a_programs_own_words_are_no_output() -> None:
    """A grammar speaks of the output alone: what a search puts into the context between is passed over."""
    from weft.config import build_stack
    from weft.exec.mirror import Mirrored
    from weft.types import Enter

    law = SamplingSpec()
    s = Mirrored(
        Enter(request=1, tokens=(9, 9, 1, 2, 7, 7, 3), prompt=2, sampling=law, seed=0, given=((4, 6),)),
        1,
        build_stack(),
    )
    assert s.output(7).tolist() == [1, 2, 3]
    assert s.output(5).tolist() == [1, 2]
    assert Mirrored(Enter(request=1, tokens=(9, 1), prompt=1, sampling=law, seed=0), 1, build_stack()).output(
        2
    ).tolist() == [1]
