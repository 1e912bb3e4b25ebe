"""`weft.LLM` and `weft.AsyncLLM` as a user meets them, on the bundled model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from weft import LLM, AsyncLLM, SamplingParams
from weft.errors import CapacityError, ConfigError, EngineError, RequestError
from weft.types import Plan, StepResult

PROMPT = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", threads=1, memory="1GiB", max_num_seqs=16) as made:
        yield made


def test_results_have_the_shapes_that_people_know(llm: LLM) -> None:
    first, second = llm.generate([PROMPT, "The captain"], SamplingParams(max_tokens=8, temperature=0, logprobs=2))
    assert first.prompt == PROMPT
    assert first.finished
    assert first.request_id != second.request_id
    assert first.prompt_token_ids == llm.text.tokenizer.encode(PROMPT)
    out = first.outputs[0]
    assert (out.index, len(out.token_ids), out.finish_reason, out.finished()) == (0, 8, "length", True)
    assert out.text == llm.text.tokenizer.decode(out.token_ids)
    assert out.logprobs is not None
    assert len(out.logprobs) == 8
    for token, entry in zip(out.token_ids, out.logprobs, strict=True):
        assert 2 <= len(entry) <= 3
        assert entry[token].logprob <= 0
        assert entry[token].rank == 1
    assert out.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(out.token_ids, out.logprobs, strict=True))
    )


def test_ids_text_and_dicts_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.text.tokenizer.encode(PROMPT)
    law = SamplingParams(max_tokens=6, temperature=0)
    texts = {
        llm.generate(p, law)[0].outputs[0].text
        for p in (PROMPT, ids, [ids], {"prompt": PROMPT}, {"prompt_token_ids": ids})
    }
    assert len(texts) == 1


def test_a_seed_means_the_same_tokens(llm: LLM) -> None:
    law = SamplingParams(max_tokens=20, temperature=1.0, seed=11)
    alone = llm.generate(PROMPT, law)[0].outputs[0].token_ids
    company = llm.generate([PROMPT, "Rain", PROMPT, "It was late"], [law, SamplingParams(max_tokens=30), law, law])
    assert company[0].outputs[0].token_ids == company[2].outputs[0].token_ids == alone
    assert llm.generate(PROMPT, SamplingParams(max_tokens=20, temperature=1.0))[0].outputs[0].token_ids != alone


def test_n_gives_several_and_the_first_is_that_of_one(llm: LLM) -> None:
    one = llm.generate(PROMPT, SamplingParams(max_tokens=10, temperature=1.0, seed=3))[0].outputs
    four = llm.generate(PROMPT, SamplingParams(max_tokens=10, temperature=1.0, seed=3, n=4))[0].outputs
    assert [o.index for o in four] == [0, 1, 2, 3]
    assert four[0].token_ids == one[0].token_ids
    assert len({tuple(o.token_ids) for o in four}) == 4


def test_stop_strings_across_tokens(llm: LLM) -> None:
    whole = llm.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0))[0].outputs[0].text
    stop = whole[11:16]
    out = llm.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0, stop=[stop, "never seen"]))[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == (whole[: whole.index(stop)], "stop", stop)
    kept = llm.generate(
        PROMPT, SamplingParams(max_tokens=40, temperature=0, stop=stop, include_stop_str_in_output=True, n=2)
    )[0]
    assert kept.outputs[0].text == kept.outputs[1].text == whole[: whole.index(stop) + len(stop)]
    assert llm.runtime.engine.pool.referenced == 0


def test_stop_ids_and_min_tokens(llm: LLM) -> None:
    ids = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0))[0].outputs[0].token_ids
    stop = ids[4]
    first = ids.index(stop)
    out = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[stop]))[0].outputs[0]
    assert (out.token_ids, out.finish_reason, out.stop_reason) == (ids[: first + 1], "stop", stop)
    out = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[stop], min_tokens=8))[0]
    assert len(out.outputs[0].token_ids) >= 8


def test_ignore_eos_goes_on(llm: LLM) -> None:
    eos = llm.text.eos_ids[0]
    bias = {eos: 100.0}
    ended = llm.generate(PROMPT, SamplingParams(max_tokens=5, logit_bias=bias))[0].outputs[0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([eos], "", "stop", None)
    on = llm.generate(PROMPT, SamplingParams(max_tokens=5, logit_bias=bias, ignore_eos=True))[0].outputs[0]
    assert on.token_ids == [eos] * 5
    assert on.finish_reason == "length"


def test_streams_grow_and_can_be_left(llm: LLM) -> None:
    law = SamplingParams(max_tokens=12, temperature=0)
    whole = llm.generate(PROMPT, law)[0].outputs[0].text
    seen = [out.outputs[0].text for out in llm.stream(PROMPT, law)]
    assert seen[-1] == whole
    assert all(b.startswith(a) for a, b in itertools.pairwise(seen))
    assert len(seen) >= 12
    for _ in llm.stream(PROMPT, law):
        break
    assert llm.runtime.engine.pool.referenced == 0
    assert not llm.runtime.engine.has_work


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_in_a_step_leaves_the_model_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    law = SamplingParams(max_tokens=20, temperature=1.0, seed=5, n=2)
    wanted = [o.token_ids for o in llm.generate(PROMPT, law)[0].outputs]
    executor, calls = llm.runtime.executor, 0
    whole = executor.execute

    def interrupted(plan: Plan) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 6 and when == "before":
            raise KeyboardInterrupt
        result = whole(plan)
        if calls == 6:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(executor, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPT, law)
    assert not llm.runtime.engine.has_work
    assert llm.runtime.engine.pool.referenced == 0
    llm.runtime.engine.check()
    assert [o.token_ids for o in llm.generate(PROMPT, law)[0].outputs] == wanted


def test_two_streams_in_turns(llm: LLM) -> None:
    laws = [SamplingParams(max_tokens=n, temperature=1.0, seed=n) for n in (9, 14)]
    wanted = [llm.generate(PROMPT, law)[0].outputs[0].text for law in laws]
    streams = [llm.stream(PROMPT, law) for law in laws]
    got = ["", ""]
    while streams != [None, None]:
        for i, stream in enumerate(streams):
            out = next(stream, None) if stream is not None else None
            if out is None:
                streams[i] = None  # type: ignore[call-overload]
            else:
                got[i] = out.outputs[0].text
    assert got == wanted


def test_chat_renders_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "What is 2 + 2?"}]
    (out,) = llm.chat(talk, SamplingParams(max_tokens=5, temperature=0))
    assert out.prompt == "<|user|>What is 2 + 2?<|end|><|assistant|>"
    assert [o.prompt for o in llm.chat([talk, talk], SamplingParams(max_tokens=1))] == [out.prompt] * 2


def test_prompt_logprobs(llm: LLM) -> None:
    (out,) = llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
    for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert token in entry


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [4096], [-1], [1, "a"], {"prompt": "a", "prompt_token_ids": [1]}, {}, "word " * 5000]
)
def test_bad_prompts_are_request_errors(llm: LLM, prompt: object) -> None:
    if prompt == []:
        assert llm.generate([]) == []  # no prompts, no answers
        return
    with pytest.raises(RequestError):
        llm.generate(prompt)  # type: ignore[arg-type]
    assert len(llm.generate(PROMPT, SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2


def test_wrong_options_say_so(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="no option 'max_len'"):
        LLM(max_len=5)
    with pytest.raises(ConfigError, match=r"config\.json|folder"):
        LLM("/nowhere/at/all")
    with pytest.raises(ConfigError, match="fcfs"):
        LLM(techniques=["schedule=fcsf"])
    with pytest.raises(CapacityError, match="MiB"):
        LLM(memory="64MiB")
    with pytest.raises(RequestError, match="one for each"):
        llm.generate([PROMPT], [SamplingParams(), SamplingParams()])


def test_a_closed_llm_says_so() -> None:
    made = LLM(dtype="float32", threads=1, memory="1GiB")
    made.close()
    made.close()
    with pytest.raises(EngineError, match="closed"):
        made.generate(PROMPT)


def test_async_calls_share_steps_and_answer_as_alone(llm: LLM) -> None:
    laws = [SamplingParams(max_tokens=12, temperature=1.0, seed=i) for i in range(8)]
    alone = [llm.generate(PROMPT, law)[0].outputs[0].token_ids for law in laws]

    async def main() -> tuple[list[list[int]], int]:
        async with AsyncLLM(dtype="float32", threads=1, memory="1GiB") as model:

            async def one(law: SamplingParams) -> list[int]:
                async for out in model.generate(PROMPT, law):
                    last = out
                assert last.finished
                return last.outputs[0].token_ids

            got = await asyncio.gather(*(one(law) for law in laws))
            async for _ in model.generate(PROMPT, SamplingParams(max_tokens=1000)):
                break
            rich = SamplingParams(max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1)
            async for out in model.generate(PROMPT, rich):
                last = out
            (wanted,) = llm.generate(PROMPT, rich)
            assert (last.outputs, last.prompt_logprobs) == (wanted.outputs, wanted.prompt_logprobs)
            with pytest.raises(RequestError, match="either"):
                async for _ in model.generate({"prompt": "a", "prompt_token_ids": [1]}):
                    pass
            for _ in range(200):
                if not model.port.stats.kv_blocks_referenced:
                    break
                await asyncio.sleep(0.05)
            assert model.port.stats.kv_blocks_referenced == 0
            return list(got), model.port.stats.steps

    got, steps = asyncio.run(main())
    assert got == alone
    assert steps < 8 * 12
