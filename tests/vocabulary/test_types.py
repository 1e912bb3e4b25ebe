"""Every struct of the vocabulary survives the wire, with every kind of content in every field."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest

from weft import types
from weft.types import (
    Abandoned,
    Action,
    Adapted,
    Add,
    Added,
    Append,
    Cancel,
    Cancelled,
    Command,
    Committed,
    Drop,
    Ended,
    EngineFrame,
    EngineStats,
    Enter,
    Entry,
    Event,
    Finished,
    Fork,
    Grammar,
    Grant,
    GroupKind,
    GroupSpec,
    Keep,
    KVOp,
    KVOpKind,
    Load,
    Made,
    Mask,
    MediaItem,
    Noted,
    Park,
    Plan,
    Planned,
    Preempted,
    Put,
    Rejected,
    RequestSpec,
    Resume,
    SamplingSpec,
    Seen,
    SharedKV,
    Span,
    StepResult,
    Stop,
    Tell,
    TokenItem,
    TokenLogprob,
    Tokens,
    Truncate,
    VectorItem,
    Watch,
    Work,
    WorkResult,
)

DIGEST = bytes(range(32))
VECTOR = VectorItem(rows=2, width=3, data=bytes(range(24)))
ITEMS = (TokenItem((1, 2, 2**31 - 1)), VECTOR, MediaItem("image", 4, DIGEST), TokenItem(()))
SAMPLING = SamplingSpec(
    temperature=0.1 + 0.2, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, presence_penalty=-0.5,
    frequency_penalty=0.25, logit_bias={0: -100.0, 4095: 1e-300}, logprobs=5, prompt_logprobs=0, max_tokens=7,
    min_tokens=2, stop_ids=(0, 7), steered=True, pooling="mean",
)  # fmt: skip
SPEC = RequestSpec(
    id=2**63 - 1,
    items=ITEMS,
    sampling=SAMPLING,
    seed=2**64 - 1,
    n=3,
    priority=-4,
    salt=b"\x00tenant\xff",
    resumed=(9, 8),
    techniques=("draft=ngram(guesses=3)",),
    companions=((TokenItem((4,)),),),
    forced=(3, 1),
    grammar=Grammar("regex", "[\u03b2\U0001f600]+"),
    hand_over=True,
    timeline=True,
    ttft_s=0.5,
    stored=((5, 0), ()),
)
LOGPROB = TokenLogprob(token=5, logprob=-1.0 / 3.0, rank=2, top=((4, -0.25), (5, -1.0 / 3.0)))
LINKED = Work(
    request=1, rows=((3, 5), (9, 12)), tokens=(7, -1, 8, 9, 10), model="draft", layers=(2, 4), mask=Mask.TREE,
    keep=Keep.ACCEPT, link=6, guesses=2, parents=(-1, 0), samples=True, output=11, prompt_rows=3, ahead=2, want=4, soft=1,
)  # fmt: skip
ENTER = Enter(
    request=1, tokens=(7, -1, -1, 8), prompt=3, sampling=SAMPLING, seed=2**64 - 1, entries=(2, 0),
    spans=(Span(1, 3, DIGEST),), vectors={1: VECTOR}, techniques=("accept=race",), source=3, forced=(1,),
    grammar=SPEC.grammar, given=((3, 4),), salt=b"tenant",
)  # fmt: skip
GRANT = Grant(request=1, group=2, at=3, blocks=(4, 5), first=16)
PLAN = Plan(
    step=9, works=(LINKED, Work(request=2, rows=((0, 1),), tokens=(3,))), enter=(ENTER,), leave=(4, 5), grants=(GRANT,),
    kv=tuple(KVOp(kind, 1, (1, 2), (3, 4), (5,)) for kind in KVOpKind), rows=6, samples=3, blocks=2, work_bytes=1 << 40,
    fetch=(7, 8), after=(KVOp(KVOpKind.SAVE, 0, (6,), (), (9,)),),
)  # fmt: skip
RESULT = StepResult(
    step=9, forward_s=0.0125, sample_s=1e-6, lost=(11, 12), masked=3, mask_s=1e-7, draft_s=2e-3, beside_s=3e-3,
    works=(
        WorkResult(
            rows=5, tokens=(1, 2), kept={0: 4, 1: 2}, draft=(3, 4), parents=(-1, -1), signals={"entropy": (0.5, 1.0 / 3.0)},
            logprobs=(LOGPROB,), prompt_logprobs=(LOGPROB, LOGPROB), ended=True, vector=b"\0\0\x80?",
        ),
        WorkResult(rows=0, failed="not enough nerve: \u03b2 \U0001f600", code="invalid_grammar"),
    ),
)  # fmt: skip
STATS = EngineStats(
    steps=1, running=2, refused=15, waiting=3, kv_blocks_total=4, kv_blocks_referenced=5, kv_blocks_cached=6, prompt_tokens=7,
    generation_tokens=8, prefix_hit_tokens=9, prefix_query_tokens=10, preemptions=11, evictions=12, finished=13, rows=14,
    last_step_s=1.5, host_s=2.5e-4, acts={"draft=ngram.proposed": 4}, shadow_requests=1, shadow_tokens=2,
    shadow_skipped=3, shadow_kl=0.25, shadow_top1=0.5, shadow_alarm=1, masked_rows=1,
    masked_steps=2, mask_s=0.5, grammars=3, grammar_s=0.25, engine_restarts=2,
    draft_sequences=5, draft_guesses=6, draft_off=7, draft_probes=8,
)  # fmt: skip
EVENTS: tuple[Event, ...] = (
    Tokens(1, 2, (3, 4), (LOGPROB,), (LOGPROB, LOGPROB), cached_tokens=16),
    Finished(
        1,
        2,
        "stop",
        stop_id=7,
        cached_tokens=16,
        error="why",
        code="invalid_grammar",
        discarded=8,
        vector=b"\0\0\x80?",
        stored=((7, 0), ()),
    ),
    Adapted(4, "a", "adapt=lora(name='a')", "beef", error="why", kind="capacity", param="lora_name", code="overloaded"),
    Preempted(1, 2),
    Noted(1, 2, "chunk", {"start": 3}),
    Rejected(1, "too long", "capacity", param="prompt", code="context_length_exceeded"),
)
SEEN = Seen(9, 8, 7, 6, 5, ((4, 3, 2),))
FRAME = EngineFrame(events=EVENTS, stats=STATS, plan=(1, 2), behind=((1, 0, 16),), making=(4,), taken=3, seen=SEEN)
GROUPS = tuple(
    GroupSpec(
        name=kind.value, kind=kind, layers=(0, 3), entry_bytes=8, block_tokens=16, model="draft", heads=(1, 2),
        window=9 if kind is GroupKind.WINDOW else None,
    )
    for kind in GroupKind
)  # fmt: skip
COMMANDS: tuple[Command, ...] = (
    Add(SPEC), Cancel(3), Cancel(3, 1), Load(4, "a", "folder/a", technique="other"), Drop(5, "a"), Watch(on=True),
)  # fmt: skip
ACTIONS: tuple[Action, ...] = (
    Fork(1, 2), Put(1, (3, 4), drop=2), Append(2, (5,)), Truncate(1, 9), Park(1), Resume(1), Stop(2),
    Tell(1, (3, 4), (LOGPROB, LOGPROB), "stop", stop_id=4, error="why"),
)  # fmt: skip
ENTRIES: tuple[Entry, ...] = (
    Made(
        format=4, groups=GROUPS, blocks=9, limits={"max_rows": 8}, parts=("schedule=fcfs",), models=("target", "draft"), layers=2,
        vocab=7, share=False, settings=b"s", in_flight=2, reach={"draft": 4}, block_bytes=64,
        control=True,
    ),
    Added(1.5, SPEC, refused=True), Cancelled(3, 1, found=False), Planned(2.5, PLAN, ((1, 0),), (7, 8)), Committed(3.5, RESULT),
    Abandoned(4.5, 6), Ended(),
)  # fmt: skip
SHARED = SharedKV(3, 1 << 20, writes=True)
WHOLE: list[Any] = [*ENTRIES, PLAN, RESULT, FRAME, SPEC, SHARED, *GROUPS, *COMMANDS, *ACTIONS, *EVENTS, *ITEMS]


def structs() -> dict[str, type[msgspec.Struct]]:
    """Every struct of weft.types."""
    found = inspect.getmembers(types, lambda x: inspect.isclass(x) and issubclass(x, msgspec.Struct))
    return {name: cls for name, cls in found if cls.__module__.startswith(types.__name__)}


def parts(value: Any) -> list[msgspec.Struct]:
    """The structs inside a value, itself included."""
    if isinstance(value, msgspec.Struct):
        return [value, *(p for f in value.__struct_fields__ for p in parts(getattr(value, f)))]
    if isinstance(value, dict):
        return [p for v in value.values() for p in parts(v)]
    if isinstance(value, tuple):
        return [p for v in value for p in parts(v)]
    return []


EXAMPLES = [p for value in WHOLE for p in parts(value)]


def identical(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down: a list for a tuple or 1 for True would pass `==` or break a hash."""
    if type(a) is not type(b):
        return False
    if isinstance(a, msgspec.Struct):
        return all(identical(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(v, b[k]) for k, v in a.items())
    return bool(a == b)


@pytest.mark.parametrize("name", sorted(structs()))
def test_a_struct_survives_msgpack(name: str) -> None:
    cls = structs()[name]
    mine = [e for e in EXAMPLES if type(e) is cls]
    assert mine, f"{name}: add an example of it to this test"
    for example in mine:
        assert identical(msgspec.msgpack.decode(msgspec.msgpack.encode(example), type=cls), example)


@pytest.mark.parametrize("name", sorted(structs()))
def test_the_examples_leave_no_field_at_its_default(name: str) -> None:
    cls = structs()[name]
    for field in msgspec.structs.fields(cls):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        values = [getattr(e, field.name) for e in EXAMPLES if type(e) is cls]
        assert any(v != default for v in values), f"{name}.{field.name}: no example sets it"


def test_every_struct_is_frozen() -> None:
    assert {name for name, cls in structs().items() if not cls.__struct_config__.frozen} == set()


def test_examples_hold_every_word_of_the_enums() -> None:
    assert {op.kind for op in PLAN.kv} == set(KVOpKind)
    assert {g.kind for g in GROUPS} == set(GroupKind)


@pytest.mark.parametrize("mask", Mask)
@pytest.mark.parametrize("keep", Keep)
def test_every_mask_and_keep_travels(mask: Mask, keep: Keep) -> None:
    work = msgspec.structs.replace(LINKED, mask=mask, keep=keep)
    assert identical(msgspec.msgpack.decode(msgspec.msgpack.encode(work), type=Work), work)


@pytest.mark.parametrize(
    ("union", "values"),
    [(Command, COMMANDS), (Event, EVENTS), (types.Item, ITEMS), (Action, ACTIONS)],
    ids=["Command", "Event", "Item", "Action"],
)
def test_a_union_comes_back_as_the_member_that_was_sent(union: Any, values: tuple[Any, ...]) -> None:
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(values), type=tuple[union, ...])
    assert [type(v) for v in back] == [type(v) for v in values]
    assert identical(back, values)


def test_a_command_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="shutdown"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"type": "shutdown", "id": 1}), type=Command)


@pytest.mark.parametrize(
    "change", [{"step": "9"}, {"works": 3}, {"rows": 1.5}, {"leave": ["x"]}, {"kv": [{"kind": "format", "group": 0}]}]
)
def test_a_plan_with_a_wrong_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({**msgspec.to_builtins(PLAN), **change}), type=Plan)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block_tokens": 0}, "at least 1"),
        ({"entry_bytes": 0}, "at least 1"),
        ({"window": 4}, "window"),
        ({"kind": GroupKind.WINDOW}, "window"),
        ({"kind": GroupKind.WINDOW, "window": 0}, "at least 1"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(change: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"name": "g", "kind": GroupKind.FULL, "layers": (0,), "entry_bytes": 8, "block_tokens": 16}
    GroupSpec(**given)
    with pytest.raises(ValueError, match=text):
        GroupSpec(**{**given, **change})


def test_derived_figures() -> None:
    assert (LINKED.start, LINKED.stop, LINKED.count) == (3, 12, 5)
    assert not PLAN.empty
    assert Plan(step=1, leave=(1,), grants=(GRANT,)).empty
    assert not Plan(step=1, kv=(KVOp(KVOpKind.ZERO, 0),)).empty
    assert TokenItem((4, 5, 6)).rows == 3
    assert len(VECTOR.digest) == 32
    assert VECTOR.digest != msgspec.structs.replace(VECTOR, data=bytes(24)).digest
