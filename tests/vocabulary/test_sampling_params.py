"""`SamplingParams`: every field's bounds, and what becomes of it in the engine's form."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import msgspec
import pytest

from weft import SamplingParams
from weft.errors import RequestError
from weft.sampling import MAX_BIAS, MAX_GRAMMAR_CHARS, MAX_STOP_CHARS, MAX_STOP_IDS, MAX_STOP_STRINGS
from weft.types import SamplingSpec

NAN, INF = math.nan, math.inf
JUNK: list[Any] = [NAN, INF, -INF, True, False, "1", "", [1], {}, b"1", 1j, None]
WHOLE_JUNK: list[Any] = [*JUNK, 1.0, 1.5]
NUMBER = {
    "temperature": ([0, 0.0, 1e-9, 1, 100, 100.0], [-1e-9, -1, 100.001, 1e300]),
    "top_p": ([1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.0000001, 2]),
    "min_p": ([0, 0.0, 0.5, 1], [-1e-9, 1.0000001]),
    "repetition_penalty": ([1e-9, 1, 100], [0, 0.0, -1, 100.001]),
    "presence_penalty": ([-2, 0, 2.0], [-2.0001, 2.0001]),
    "frequency_penalty": ([-2, 0, 2.0], [-2.0001, 2.0001]),
}
WHOLE = {
    "n": ([1, 128], [0, -1, 129, 1 << 40]),
    "top_k": ([-1, 0, 1, 1 << 31], [-2, (1 << 31) + 1]),
    "seed": ([-(1 << 63), 0, (1 << 64) - 1, None], [-(1 << 63) - 1, 1 << 64]),
    "max_tokens": ([1, 1 << 31, None], [0, -1, (1 << 31) + 1]),
    "min_tokens": ([0, 1, 16], [-1, 17, (1 << 31) + 1]),  # 16 is max_tokens here
    "logprobs": ([0, 20, None], [-1, 21]),
    "prompt_logprobs": ([0, 20, None], [-1, 21]),
}
OTHER: dict[str, tuple[list[Any], list[Any]]] = {
    "logit_bias": (
        [None, {}, {0: -100}, {5: 100.0}, dict.fromkeys(range(MAX_BIAS), 0.5)],
        [{-1: 0}, {0: 100.001}, {0: -100.001}, {0: NAN}, {0: INF}, {0: True}, {0: "1"}, {0: None}, {"0": 1}, {True: 1},
         {1.0: 1}, {(1 << 31) + 1: 1}, dict.fromkeys(range(MAX_BIAS + 1), 0.5)],
    ),
    "stop": (
        [None, [], "x", ["x", "y"], "x" * MAX_STOP_CHARS, ["x"] * MAX_STOP_STRINGS],
        ["", [""], ["x", ""], [None], [1], [b"x"], "x" * (MAX_STOP_CHARS + 1), ["x"] * (MAX_STOP_STRINGS + 1)],
    ),
    "stop_token_ids": (
        [None, [], [0], [1 << 31], [3] * MAX_STOP_IDS],
        [[-1], [(1 << 31) + 1], [True], [1.0], ["1"], [None], [NAN], [3] * (MAX_STOP_IDS + 1)],
    ),
    "structured_outputs": (
        [None, {"json": {"type": "null"}}, {"json": True}, {"json": "{}"}, {"json_object": True}, {"regex": "a"},
         {"choice": ["", "a"]}, {"grammar": "start: \"a\""}, {"regex": "a", "choice": None}],
        [{}, "a", ["a"], 1, {"jsn": {}}, {"regex": "a", "choice": ["a"]}, {"regex": ""}, {"regex": 1}, {"choice": []},
         {"choice": "a"}, {"choice": [1]}, {"json_object": 1}, {"json": {1, 2}}, {"json": {"const": NAN}},
         {"grammar": "a" * (MAX_GRAMMAR_CHARS + 1)}, {1: "a"}],
    ),
}  # fmt: skip
SWITCHES = {"include_stop_str_in_output", "ignore_eos", "skip_special_tokens"}
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}
TABLE: dict[str, tuple[list[Any], list[Any]]] = {
    **{name: (good, [*bad, *JUNK]) for name, (good, bad) in NUMBER.items()},
    **{name: (good, [*bad, *(j for j in WHOLE_JUNK if not (j is None and name in OPTIONAL))])
       for name, (good, bad) in WHOLE.items()},
    **OTHER,
}  # fmt: skip


def spec(params: SamplingParams, *, eos: tuple[int, ...] = (2, 3), vocab: int = 100, room: int = 50) -> SamplingSpec:
    return params.spec(eos=eos, vocab=vocab, room=room)


def short(value: Any) -> str:
    return repr(value)[:40]


def test_the_table_has_every_field() -> None:
    assert set(TABLE) | SWITCHES == {f.name for f in fields(SamplingParams) if f.init}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (good, _) in TABLE.items() for v in good], ids=short)
def test_within_bounds(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (_, bad) in TABLE.items() for v in bad], ids=short)
def test_outside_bounds(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)


HOSTILE: list[tuple[str, Any]] = [
    ("temperature", 10**400),
    ("top_p", -(10**400)),
    ("logit_bias", {0: 10**400}),
    ("n", 10**5000),
    ("seed", 10**5000),
    ("stop", 5),
    ("stop_token_ids", 5),
    ("logit_bias", [1]),
    ("logit_bias", "ab"),
]
"""Integers that no float holds or no text shows, and values that are no collection."""


@pytest.mark.parametrize(
    ("name", "value"), HOSTILE, ids=[f"{name}-{type(value).__name__}{i}" for i, (name, value) in enumerate(HOSTILE)]
)
def test_hostile_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["n", "temperature", "top_k"])
def test_the_refusal_says_what_would_do(text: str) -> None:
    said = {"n": "1 to 128", "temperature": "at least 0 and at most 100", "top_k": "-1 to"}
    with pytest.raises(RequestError, match=said[text]):
        SamplingParams(**{text: -7})


def test_min_tokens_may_reach_max_tokens_and_no_further() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500
    with pytest.raises(RequestError, match=r"min_tokens \(6\) must not exceed max_tokens \(5\)"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_params_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().n = 1 << 20  # type: ignore[misc]


def test_stops_are_a_tuple_of_what_was_given() -> None:
    assert SamplingParams().stops == ()
    assert SamplingParams(stop="ab").stops == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stops == ("a", "b")


def test_defaults_become_the_engine_s_defaults() -> None:
    assert spec(SamplingParams(), eos=()) == SamplingSpec()


def test_every_field_of_the_law_arrives() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, repetition_penalty=1.5, presence_penalty=-0.5,
        frequency_penalty=0.75, logit_bias={3: 2.0}, logprobs=0, prompt_logprobs=4, max_tokens=9, min_tokens=4,
        stop_token_ids=[8], stop="never the engine's business",
    )  # fmt: skip
    wanted = SamplingSpec(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, repetition_penalty=1.5, presence_penalty=-0.5,
        frequency_penalty=0.75, logit_bias={3: 2.0}, logprobs=0, prompt_logprobs=4, max_tokens=9, min_tokens=4,
        stop_ids=(8, 2, 3),
    )  # fmt: skip
    assert spec(params) == wanted
    plain = SamplingSpec()
    untouched = [f for f in wanted.__struct_fields__ if getattr(wanted, f) == getattr(plain, f)]
    assert untouched == [
        "pooling",
        "steered",
    ]  # embeddings' own, and a search's; else a field could be dropped without this test seeing it


def test_whole_numbers_become_floats_where_floats_stand() -> None:
    law = spec(SamplingParams(temperature=1, top_p=1, min_p=0, repetition_penalty=2, presence_penalty=1))
    for field in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert isinstance(getattr(law, field), float), field
    msgspec.msgpack.decode(msgspec.msgpack.encode(law), type=SamplingSpec)


@pytest.mark.parametrize(("top_k", "wanted"), [(-1, 0), (0, 0), (1, 1), (1000, 1000)])
def test_top_k_of_minus_one_means_all(top_k: int, wanted: int) -> None:
    assert spec(SamplingParams(top_k=top_k)).top_k == wanted


def test_eos_ends_and_ignore_eos_leaves_only_the_client_s_own() -> None:
    assert spec(SamplingParams()).stop_ids == (2, 3)
    assert spec(SamplingParams(stop_token_ids=[9, 2, 9])).stop_ids == (9, 2, 3)  # each once
    assert spec(SamplingParams(ignore_eos=True)).stop_ids == ()
    assert spec(SamplingParams(ignore_eos=True, stop_token_ids=[3, 9])).stop_ids == (3, 9)


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_ids_must_be_in_the_vocabulary(field: str) -> None:
    def given(i: int) -> SamplingParams:
        return SamplingParams(**{field: {i: 1.0} if field == "logit_bias" else [i]})  # type: ignore[arg-type]

    spec(given(99))
    spec(given(0))
    with pytest.raises(RequestError, match=r"id 100 is outside the vocabulary \(0 to 99\)") as caught:
        spec(given(100))
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("asked", "room", "wanted"), [(None, 50, 50), (7, 50, 7), (50, 50, 50), (51, 50, 50), (9, 1, 1)]
)
def test_max_tokens_is_bounded_by_the_room(asked: int | None, room: int, wanted: int) -> None:
    assert spec(SamplingParams(max_tokens=asked), room=room).max_tokens == wanted


def test_the_engine_s_bias_is_a_copy() -> None:
    bias = {3: 1.0}
    law = spec(SamplingParams(logit_bias=bias))
    bias[4] = 2.0
    assert law.logit_bias == {3: 1.0}
