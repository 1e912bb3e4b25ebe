"""`Client` over scripted engines: what the engine sends, in whatever pieces, and what comes out."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable

import pytest

from tests.front.scripted import ScriptedPort, wait_until
from weft.errors import RequestError
from weft.front.admission import Admission, Bounds
from weft.front.client import Client, Delta, EngineStopped, GenerationFailed, Prompt, Refused
from weft.front.generation import Generation, LiveRequest, LiveSequence
from weft.front.text import ModelText
from weft.sampling import SamplingParams
from weft.types import Add, Cancel, Finished, Rejected, Tokens

Make = Callable[..., ScriptedPort]
STORY = "Once upon a time there was a naïve café. 你好 🙂 The end."


async def collect(client: Client, prompts: Prompt | list[Prompt]) -> list[Delta]:
    """Each sequence's deltas put together, by index."""
    whole: dict[int, Delta] = {}
    async with await client.start(prompts) as generation:
        async for delta in generation:
            one = whole.setdefault(delta.index, Delta(index=delta.index))
            assert delta.first == len(one.token_ids)
            one.text += delta.text
            one.token_ids += delta.token_ids
            one.logprobs += delta.logprobs
            one.finish_reason, one.stop_reason = delta.finish_reason, delta.stop_reason
            one.cached_tokens = delta.cached_tokens
    return [whole[index] for index in sorted(whole)]


def ids_of(text: ModelText, words: str = STORY) -> list[int]:
    return text.tokenizer.encode(words, add_special=False)


@pytest.mark.parametrize("group", [1, 2, 7, 1000])
def test_text_is_whole_however_tokens_are_grouped(scripted: Make, text: ModelText, group: int) -> None:
    ids = ids_of(text)
    client = Client(scripted(lambda spec, index: ids, group=group), text)
    (out,) = asyncio.run(collect(client, Prompt(ids=[1, 2], params=SamplingParams(max_tokens=len(ids)))))
    assert out.text == STORY
    assert out.token_ids == ids
    assert out.finish_reason == "length"
    assert client.open_requests == 0


@pytest.mark.parametrize("n", [1, 3])
def test_what_has_gathered_is_read_in_parts_and_others_have_their_turn(
    scripted: Make, text: ModelText, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a slow reader's answer: the rest would be parsed in one go otherwise, and hold up everybody's stream."""
    monkeypatch.setattr("weft.front.generation.TURN_CHARS", 100)
    ids = ids_of(text) * 9
    port = scripted(lambda spec, index: ids, group=100)

    async def slow() -> tuple[dict[int, list[Delta]], int]:
        turns, over, taken = 0, False, 0

        async def other() -> None:
            nonlocal turns
            while not over:
                turns += 1
                await asyncio.sleep(0)

        async with await Client(port, text).start(
            Prompt(ids=[1], params=SamplingParams(max_tokens=len(ids), n=n))
        ) as made:
            while made.open:
                await asyncio.sleep(0.01)
            beside, parts = asyncio.create_task(other()), dict[int, list[Delta]]()
            while deltas := await made.take():
                taken += 1
                assert sum(len(delta.text) for delta in deltas) <= 100
                for delta in deltas:
                    parts.setdefault(delta.index, []).append(delta)
            over = True
            await beside
        assert turns >= taken - 1
        return parts, taken

    found, taken = asyncio.run(slow())
    assert taken >= n * len(STORY) * 9 // 100
    assert sorted(found) == list(range(n))
    for deltas in found.values():
        assert "".join(delta.text for delta in deltas) == STORY * 9
        assert [id for delta in deltas for id in delta.token_ids] == ids
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
        assert [delta.cached_tokens for delta in deltas] == [0] * (len(deltas) - 1) + [3]
        told = 0
        for delta in deltas:
            assert delta.first == told
            told += len(delta.token_ids)


@pytest.mark.parametrize("group", [1, 3, 1000])
@pytest.mark.parametrize(
    ("stop", "want"), [("there", "Once upon a time "), (["zzz", "e w"], "Once upon a time ther"), ("é. 你", None)]
)
def test_stop_string_ends_and_cancels(
    scripted: Make, text: ModelText, group: int, stop: str | list[str], want: str | None
) -> None:
    ids = ids_of(text)
    port = scripted(lambda spec, index: ids * 5, group=group)
    client = Client(port, text)
    params = SamplingParams(max_tokens=200, stop=stop)
    (out,) = asyncio.run(collect(client, Prompt(ids=[1], params=params)))
    found = stop if isinstance(stop, str) else stop[1]
    assert out.text == (want if want is not None else STORY[: STORY.index(found)])
    assert (out.finish_reason, out.stop_reason) == ("stop", found)
    # Tokens are counted up to the one that completed the stop string, whatever else came in the same frame.
    assert text.tokenizer.decode(out.token_ids[:-1]).find(found) < 0 <= text.tokenizer.decode(out.token_ids).find(found)
    assert port.cancelled() == [1]


def test_one_of_n_stops_alone(scripted: Make, text: ModelText) -> None:
    ids = ids_of(text)
    port = scripted(lambda spec, index: ids if index == 1 else ids_of(text, "and so on and so on") * 20)
    params = SamplingParams(n=3, max_tokens=40, stop="time")
    outs = asyncio.run(collect(Client(port, text), Prompt(ids=[1], params=params)))
    assert [out.finish_reason for out in outs] == ["length", "stop", "length"]
    assert [len(out.token_ids) for out in outs] == [40, len(outs[1].token_ids), 40]
    assert outs[1].text == "Once upon a "
    assert [c for c in port.commands if isinstance(c, Cancel)] == [Cancel(1, 1)]


def test_stop_ids_and_what_they_show(scripted: Make, text: ModelText) -> None:
    ids = ids_of(text)
    word = ids[3]
    eos = text.eos_ids[0]
    port = scripted(lambda spec, index: [*ids[:6], eos, *ids])
    client = Client(port, text)

    def run(**options: object) -> Delta:
        params = SamplingParams(max_tokens=9, **options)  # type: ignore[arg-type]
        return asyncio.run(collect(client, Prompt(ids=[1], params=params)))[0]

    by_eos = run()
    assert (by_eos.finish_reason, by_eos.stop_reason, by_eos.token_ids) == ("stop", None, [*ids[:6], eos])
    assert by_eos.text == text.tokenizer.decode(ids[:6])
    assert by_eos.cached_tokens == 3
    own = run(stop_token_ids=[word])
    assert (own.finish_reason, own.stop_reason) == ("stop", word)
    assert own.text == text.tokenizer.decode(ids[:3])
    shown = run(stop_token_ids=[word], include_stop_str_in_output=True)
    assert shown.text == text.tokenizer.decode(ids[:4])
    assert run(ignore_eos=True).token_ids == [*ids[:6], eos, *ids[:2]]


def test_several_prompts_number_their_sequences_in_order(scripted: Make, text: ModelText) -> None:
    ids = ids_of(text)
    port = scripted(lambda spec, index: ids[spec.items[0].ids[0] + index :])  # type: ignore[union-attr]
    prompts = [Prompt(ids=[start], params=SamplingParams(n=2, max_tokens=3)) for start in (1, 5, 9)]
    outs = asyncio.run(collect(Client(port, text), prompts))
    assert [out.token_ids for out in outs] == [ids[k : k + 3] for k in (1, 2, 5, 6, 9, 10)]


def test_what_reaches_the_engine(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: ids_of(text))
    client = Client(port, text)

    async def run(**options: object) -> None:
        params = SamplingParams(**options)  # type: ignore[arg-type]
        await collect(client, Prompt(ids=[7, 8, 9], params=params, priority=-3, salt=b"tenant"))

    for options in ({"seed": 5}, {"seed": -1}, {}, {"max_tokens": None, "stop": "a"}):
        asyncio.run(run(**options))
    specs = [command.spec for command in port.commands if isinstance(command, Add)]
    assert [spec.id for spec in specs] == [1, 2, 3, 4]
    assert [spec.seed for spec in specs[:2]] == [5, (1 << 64) - 1]
    assert specs[2].seed != specs[3].seed
    assert specs[0].items[0].ids == (7, 8, 9)  # type: ignore[union-attr]
    assert (specs[0].priority, specs[0].salt) == (-3, b"tenant")
    assert specs[0].sampling.stop_ids == text.eos_ids
    assert specs[3].sampling.max_tokens == port.info.max_model_len - 3


@pytest.mark.parametrize(
    ("ids", "code"), [([], "empty_prompt"), ([1] * 512, "context_length_exceeded"), ([4096], None), ([3, -1], None)]
)
def test_bad_prompts_do_not_reach_the_engine(scripted: Make, text: ModelText, ids: list[int], code: str | None) -> None:
    port = scripted(lambda spec, index: [])
    with pytest.raises(RequestError) as caught:
        asyncio.run(collect(Client(port, text), [Prompt(ids=[1]), Prompt(ids=ids)]))
    assert caught.value.code == code
    assert port.commands == []


def test_longest_prompt_has_room_for_one_token(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: ids_of(text))
    (out,) = asyncio.run(collect(Client(port, text), Prompt(ids=[1] * 511, params=SamplingParams(max_tokens=None))))
    assert (len(out.token_ids), out.finish_reason) == (1, "length")


@pytest.mark.parametrize("kind", ["request", "capacity"])
def test_rejection_becomes_an_error(scripted: Make, text: ModelText, kind: str) -> None:
    port = scripted(lambda spec, index: [])
    port.reject = Rejected(0, "too much", kind, "n", "why")  # type: ignore[arg-type]
    client = Client(port, text)
    with pytest.raises(RequestError if kind == "request" else Refused, match="too much") as caught:
        asyncio.run(collect(client, [Prompt(ids=[1]), Prompt(ids=[2])]))
    assert (caught.value.param, caught.value.code) == ("n", "why")
    assert client.open_requests == 0
    assert client.metrics.ends["rejected"] == 1
    assert port.cancelled() == [2]


def test_failure_of_one_request_leaves_the_others(scripted: Make, text: ModelText) -> None:
    ids = ids_of(text)
    port = scripted(lambda spec, index: ids)
    client = Client(port, text)

    async def run() -> None:
        good = await client.start(Prompt(ids=[1], params=SamplingParams(max_tokens=10)))
        assert wait_until(lambda: port.stats.running == 1)
        port.give_up = "a tensor was not finite"
        bad = await client.start(Prompt(ids=[1]))
        with pytest.raises(GenerationFailed, match="not finite"):
            await bad.take()
        port.give_up = None
        assert sum([len(delta.token_ids) async for delta in good]) == 10

    asyncio.run(run())
    assert client.metrics.ends == {"stop": 0, "length": 1, "abort": 0, "error": 1, "rejected": 0}


def test_a_dead_engine_fails_everybody_and_hangs_nobody(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: ids_of(text)[:3])  # three tokens, then silence

    async def run() -> None:
        client = Client(port, text)
        generations = [await client.start(Prompt(ids=[1])) for _ in range(3)]
        for generation in generations:
            got = 0
            while got < 3:
                got += sum(len(delta.token_ids) for delta in await generation.take())
        port.die("out of memory")
        for generation in generations:
            with pytest.raises(EngineStopped, match="out of memory"):
                await asyncio.wait_for(generation.take(), 5)
        with pytest.raises(EngineStopped, match="out of memory"):
            await client.start(Prompt(ids=[1]))

    asyncio.run(run())


def test_leaving_early_cancels(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: ids_of(text) * 100)

    async def run() -> None:
        client = Client(port, text)
        async with await client.start([Prompt(ids=[1]), Prompt(ids=[2])]) as generation:
            await generation.take()
        assert await generation.take() == []
        assert client.open_requests == 0
        assert client.metrics.ends["abort"] == 2

    asyncio.run(run())
    assert port.cancelled() == [1, 2]
    assert wait_until(lambda: port.stats.running == 0)


def test_slow_reader_gets_fewer_and_longer_deltas(scripted: Make, text: ModelText) -> None:
    ids = ids_of(text)
    port = scripted(lambda spec, index: ids)

    async def run() -> list[Delta]:
        generation = await Client(port, text).start(Prompt(ids=[1], params=SamplingParams(max_tokens=len(ids))))
        first = await generation.take()
        while generation.open:
            await asyncio.sleep(0.01)
        return first + await generation.take() + await generation.take()

    first, rest = asyncio.run(run())
    assert first.token_ids + rest.token_ids == ids
    assert first.text + rest.text == STORY
    assert rest.finish_reason == "length"


def test_one_request_with_broken_text_does_not_stop_the_frame(scripted: Make, text: ModelText) -> None:
    ids = ids_of(text)
    port = scripted(lambda spec, index: ids)
    client = Client(port, text)

    async def run() -> None:
        broken = await client.start(Prompt(ids=[1], params=SamplingParams(max_tokens=10)))
        good = await client.start(Prompt(ids=[1], params=SamplingParams(max_tokens=10)))
        broken.requests[0].sequences.clear()
        with pytest.raises(IndexError):
            await asyncio.wait_for(broken.take(), 5)
        assert sum([len(delta.token_ids) async for delta in good]) == 10

    asyncio.run(run())


def test_a_client_moves_to_another_event_loop(scripted: Make, text: ModelText) -> None:
    ids = ids_of(text)
    port = scripted(lambda spec, index: ids * 20)
    client = Client(port, text)

    async def leave_open() -> None:
        await client.start(Prompt(ids=[1]))

    asyncio.run(leave_open())
    (out,) = asyncio.run(collect(client, Prompt(ids=[1], params=SamplingParams(max_tokens=4))))
    assert out.token_ids == ids[:4]
    assert port.cancelled() == [1]


@pytest.mark.parametrize("how", ["whole", "stopped", "left"])
def test_what_is_over_is_freed_at_once(scripted: Make, text: ModelText, how: str) -> None:
    """Python looks for circles when there are many new objects; until then a server would hold what it has answered."""
    client = Client(scripted(lambda spec, index: [65] * 40), text)
    law = SamplingParams(max_tokens=40, n=2, stop="AAA" if how == "stopped" else None)

    async def run() -> None:
        async with await client.start([Prompt(ids=[1], params=law), Prompt(ids=[2], params=law)]) as generation:
            if how == "left":
                await generation.take()
                return
            async for _ in generation:
                pass

    gc.collect()
    gc.disable()
    try:
        asyncio.run(run())
        left = [type(o).__name__ for o in gc.get_objects() if type(o) in (Generation, LiveRequest, LiveSequence)]
        assert left == []
    finally:
        gc.enable()


def test_late_events_of_a_cancelled_request_are_ignored(scripted: Make, text: ModelText) -> None:
    port = scripted(lambda spec, index: [])
    client = Client(port, text)

    async def run() -> None:
        generation = await client.start(Prompt(ids=[1]))
        generation.cancel()
        from weft.types import EngineFrame

        client._on_frame(EngineFrame(events=(Tokens(1, 0, (5,)), Finished(1, 0, "stop"), Tokens(99, 0, (5,)))))
        assert await generation.take() == []

    asyncio.run(run())


def test_a_request_costs_the_same_beside_10_000_others(scripted: Make, text: ModelText) -> None:
    """Counted in calls, of generators' turns too, as time would go by what else the machine does."""
    client = Client(scripted(lambda spec, index: []), text, admission=Admission(Bounds(max_queue=20_000)))
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    async def one() -> tuple[Generation, int, int]:
        nonlocal calls
        calls = 0
        sys.setprofile(count)
        try:
            generation = await client.start(Prompt(ids=[1], timeline=True))
        finally:
            sys.setprofile(None)
        told = generation.requests[0].timeline
        assert told is not None
        (queued,) = [e for e in told.moments if e["event"] == "queued"]
        return generation, calls, queued["detail"]["behind"]

    async def all() -> None:
        first = await one()
        others = [await client.start(Prompt(ids=[1])) for _ in range(10_000)]
        last = await one()
        assert (first[2], last[2]) == (0, 10_001)
        assert last[1] <= first[1] + 20
        for generation in others[:9_000]:
            generation.cancel()
        assert (await one())[2] == 1_002

    asyncio.run(all())
