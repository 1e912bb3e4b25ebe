"""`slot=name(argument=literal)`: what is read, what is refused, and how a technique of one's own comes in."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import weft
import weft.schedule
from weft import registry
from weft.config import build_stack
from weft.errors import ConfigError
from weft.registry import MAX_TEXT, Part, build, lookup, names, parse, parse_call, register
from weft.slots import SLOTS
from weft.traits import Traits

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from weft.registry import register
from weft.schedule.fcfs import FCFS
from weft.traits import Fidelity, Trait, Traits


@register("schedule", "{name}")
@dataclass(frozen=True, kw_only=True)
class Mine(FCFS):
    share: float
    words: tuple[str, ...] = ("a",)
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.SAME_LAW, gives=frozenset({{Trait.STARVATION_FREE}}))

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"share must be at most 1, got {{self.share}}")
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_registry: None) -> Callable[[str], Any]:
    """Import a user's file that registers `schedule=NAME`, from a folder that weft does not know."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(name: str, module: str = "someones_plugin") -> Any:
        (tmp_path / f"{module}.py").write_text(PLUGIN.format(name=name))
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module(module)

    return load


# ------------------------------------------------------------------------------------------ the notation


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("kv.evict=lru", Part("kv.evict", "lru")),
        ("schedule=fcfs()", Part("schedule", "fcfs")),
        (" schedule = layered( groups = 4 ) ", Part("schedule", "layered", (("groups", 4),))),
        ("schedule=layered(groups=4, least=7,)", Part("schedule", "layered", (("groups", 4), ("least", 7)))),
        ("draft=x(a='b=c', d=\"(\")", Part("draft", "x", (("a", "b=c"), ("d", "(")))),
        ("draft=x(a=-1, b=1e-3, c=+2)", Part("draft", "x", (("a", -1), ("b", 0.001), ("c", 2)))),
        ("draft=x(a=None, b=True)", Part("draft", "x", (("a", None), ("b", True)))),
        ("draft=x(a=[1, (2,), {'k': {3}}], b=b'z')", Part("draft", "x", (("a", [1, (2,), {"k": {3}}]), ("b", b"z")))),
    ],
)
def test_reads(text: str, part: Part) -> None:
    read = parse(text)
    assert read == part
    assert parse(str(read)) == part


HOSTILE = [
    "f(1)", "f(a=1, 2)", "f(*[1])", "f(**{'a': 1})", "f(a=1, **{})", "f(a=1, a=2)", "f(a=g())", "f(a=g(b=1))", "f(a=b)",
    "f(a=lambda: 1)", "lambda: 1", "f(a=__import__('os').system('false'))", "__import__('os').system('false')", "f(a=1)()",
    "f()(a=1)", "f.g(a=1)", "f[0](a=1)", "f(a=b.c)", "f(a=[x for x in (1,)])", "f(a=(yield))", "f(a=2**9)", "f(a=1*9)",
    "f(a='x'*99999999)", "f(a=f'{1}')", "f(a=1 if 1 else 2)", "f(a:=1)", "f((a:=1))", "f(a=not 1)", "f(a=1<2)", "f(a=...[0])",
    "f(a={**{}})", "f(a={[]: 1})", "f(a={[1]})", "f(a=-'x')", "f(a=[*()])", "f(a=await b)", "f(a=1)\nimport os", "f; g",
    "f(a=1", "f a=1)", "f)", "(", "''", "'f'", "1", "1(a=1)", "f(a='\\N{none}')", "f(a=08)", "f(a=1if 1else 2)", "f(a='\\d')",
    "f\0", "f(a='\ud800')", "\ud800", "f(a=nan)", "f(a=inf)", "class", "None", "True", "f(=1)", "f(a=)", "f(,)", "f(a 1)",
    "x" * (MAX_TEXT + 1), "f(a='" + "x" * MAX_TEXT + "')", "(" * 1500 + "f" + ")" * 1500, "f(a=" + "[" * 900 + "]" * 900 + ")",
    "f(a=" + "-" * 3800 + "1)", "f(a=" + "1+" * 1800 + "1j)", "f(a=" + "9" * 4080 + "+1)", "f" + ".a" * 1900,
    "f(a=" + "{1:" * 600 + "1" + "}" * 600 + ")",
]  # fmt: skip


@pytest.mark.parametrize("call", HOSTILE, ids=lambda c: ascii(c)[1:40])
def test_anything_but_literals_by_name_is_refused(call: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"schedule={call}")
    assert len(str(caught.value)) < 500  # a message repeats what it refuses, but not all of a huge text


DOUBTFUL = """
import warnings
from weft.errors import ConfigError
from weft.registry import parse
before = list(warnings.filters)
for text in ("f(a=1if 1else 2)", "f(a=1if)", r"f(a='\\d')"):
    try:
        print("read", parse("schedule=" + text))
    except ConfigError:
        print("refused")
assert warnings.filters == before
"""


def test_what_python_doubts_is_refused_under_the_filters_of_a_plain_process() -> None:
    done = subprocess.run([sys.executable, "-c", DOUBTFUL], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("refused\n" * 3, "")


def test_reading_a_part_changes_nothing_for_other_threads() -> None:
    """Two threads that each put the filters of warnings back leave those of one of them behind."""
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(parse, ["draft=ngram(guesses=2)"] * 4000))) == 1
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


@pytest.mark.parametrize("text", ["", "=", "schedule", "schedule=", "schedule= ", "=fcfs", "schedule:fcfs", "fcfs()"])
def test_a_text_without_slot_or_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"SLOT=NAME|no slot ''"):
        parse(text)


def test_the_longest_text_is_read_and_one_more_character_is_not() -> None:
    head, tail = "draft=x(a='", "')"
    fill = "x" * (MAX_TEXT - len(head) - len(tail))
    assert parse(head + fill + tail).arguments == (("a", fill),)
    with pytest.raises(ConfigError, match=f"at most {MAX_TEXT} characters"):
        parse(head + fill + "x" + tail)


@given(
    st.text(st.sampled_from("fcs=()[]{},:.*'\"\\ \n\t1e+-_#@\0é\u202e\ufb01λ日"), max_size=40) | st.text(max_size=40)
)
@example("fcfs(a=1_0)")
@example("ﬁle")
def test_any_text_at_all_is_read_or_refused(text: str) -> None:
    try:
        name, arguments = parse_call(text)
    except ConfigError:
        return
    assert name.isidentifier()
    assert all(key.isidentifier() for key, _ in arguments)


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "été", "_c"]), literals))
def test_what_is_written_is_read_back(arguments: dict[str, Any]) -> None:
    part = Part("draft", "some_name", tuple(arguments.items()))
    if len(str(part)) <= MAX_TEXT:
        assert parse(str(part)) == part


# ------------------------------------------------------------------------------------------ names and arguments


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("shedule=fcfs", "did you mean schedule"),
        ("evict=lru", "did you mean kv.evict"),
        ("zzzzz=lru", "there are: schedule, kv.evict"),
        ("schedule=fcsf", "did you mean fcfs"),
        ("schedule=layerd(groups=2)", "did you mean layered"),
        ("accept=qqq", "there are: bild, race, rejection"),
        ("kv.evict=lur", "did you mean lru"),
        ("schedule=__init__", "there are: batchllm, cache_aware"),
        ("schedule=registry", "there are: batchllm, cache_aware"),
        ("weights=anything", "that slot has no techniques yet"),
    ],
)
def test_an_unknown_word_lists_the_nearest(text: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(parse(text))
    assert near in str(caught.value)


def test_no_unlike_name_is_offered() -> None:
    with pytest.raises(ConfigError) as caught:
        lookup("schedule", "qqq")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule=fcfs(groups=2)", "no argument 'groups'; it has none"),
        ("schedule=layered(group=2)", "no argument 'group'; did you mean groups?; it has: groups, least"),
        ("schedule=layered(traits=2)", "no argument 'traits'"),
        ("schedule=layered(__class__=2)", "no argument '__class__'"),
        ("kv.evict=lru(_clock=2)", "no argument '_clock'"),
        ("schedule=layered(groups='4')", "Expected `int`"),
        ("schedule=layered(groups=True)", "Expected `int`"),
        ("schedule=layered(groups=1e999)", "Expected `int`"),
        ("schedule=layered(groups=None)", "Expected `int`"),
        ("schedule=layered(groups=0)", "groups and least must be at least 1"),
        ("draft=ngram(shortest=4, longest=2)", "shortest <= longest"),
    ],
)
def test_a_wrong_argument_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(parse(text))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "value", ["0x" + "f" * 4000, "-0x" + "f" * 4000, "[0x" + "f" * 4000 + "]"], ids=["+", "-", "[]"]
)
def test_an_integer_that_cannot_be_shown_is_refused(value: str) -> None:
    """Python shows no integer of more than 4,300 digits, and hexadecimal ones get that long in a short text."""
    with pytest.raises(ConfigError):
        str(build(parse(f"schedule=layered(groups={value})")))


def test_arguments_arrive() -> None:
    layered = build(parse("schedule=layered(groups=3)"))
    assert (layered.groups, layered.least) == (3, 32)
    assert build_stack(["schedule=layered(least=5)"])["schedule"].least == 5


# ------------------------------------------------------------------------------------------ plugins


def sources() -> dict[str, int]:
    root = Path(weft.__file__).parent
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*.py")}


def test_a_plugin_is_found_everywhere_and_edits_nothing_else(plugin: Callable[[str], Any]) -> None:
    files, slots, registered, before = sources(), dict(SLOTS), dict(registry._REGISTERED), names("schedule")
    with pytest.raises(ConfigError, match="there is no schedule=mine"):
        lookup("schedule", "mine")
    module = plugin("mine")
    assert lookup("schedule", "mine") is module.Mine
    assert names("schedule") == sorted([*before, "mine"])
    assert build(parse("schedule=mine(share=0.5)")) == module.Mine(share=0.5)
    stack = build_stack(["schedule=mine(share=1, words=['x', 'y'])"])
    assert stack["schedule"] == module.Mine(share=1.0, words=("x", "y"))
    assert isinstance(stack["schedule"].share, float)
    assert stack.verdict.fidelity.value == "SAME_LAW"
    assert str(stack.parts[0]) == "schedule=mine(share=1, words=['x', 'y'])"
    assert files == sources()
    assert slots == SLOTS
    own = {key: cls for key, cls in registry._REGISTERED.items() if key not in registered}
    assert {key for key, cls in own.items() if not cls.__module__.startswith("weft.")} == {("schedule", "mine")}
    assert all(registry._REGISTERED[key] is cls for key, cls in registered.items())
    assert type(build_stack()["schedule"]).__name__ == "FCFS"  # the null is still the null


def test_a_plugin_s_arguments_are_checked_like_any_other(plugin: Callable[[str], Any]) -> None:
    plugin("mine")
    for text, said in {
        "schedule=mine": "needs share",
        "schedule=mine(words=[])": "needs share",
        "schedule=mine(share='1')": "Expected `float`",
        "schedule=mine(share=2)": "share must be at most 1, got 2.0",
        "schedule=mine(share=1, words=[1])": "Expected `str`",
        "schedule=mine(shaer=1)": "did you mean share",
        "schedule=mien(share=1)": "did you mean mine",
    }.items():
        with pytest.raises(ConfigError) as caught:
            build(parse(text))
        assert said in str(caught.value), text


def test_a_file_in_a_slot_s_folder_is_loaded_when_it_is_named_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_registry: None
) -> None:
    for file, name in (("dropped", "dropped"), ("untold", "another_name"), ("_private", "_private")):
        (tmp_path / f"{file}.py").write_text(PLUGIN.format(name=name))
    (tmp_path / "broken.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.setattr(weft.schedule, "__path__", [*weft.schedule.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        assert {"dropped", "untold", "broken"} <= set(names("schedule"))
        assert "_private" not in names("schedule")
        assert "weft.schedule.dropped" not in sys.modules
        assert lookup("schedule", "dropped").__module__ == "weft.schedule.dropped"
        assert "weft.schedule.untold" not in sys.modules
        with pytest.raises(ConfigError, match="does not register that name"):
            lookup("schedule", "untold")
        with pytest.raises(ConfigError, match=r"cannot be loaded: .*a_module_that_is_nowhere"):
            lookup("schedule", "broken")
    finally:
        for module in ("dropped", "untold", "broken"):
            sys.modules.pop(f"weft.schedule.{module}", None)
            vars(weft.schedule).pop(module, None)


def test_a_name_is_registered_once(plugin: Callable[..., Any]) -> None:
    first = plugin("mine")
    with pytest.raises(ConfigError, match=r"schedule=mine is registered twice: someones_plugin and another_plugin"):
        plugin("mine", "another_plugin")
    assert lookup("schedule", "mine") is first.Mine


def test_a_plugin_cannot_take_a_built_in_name(plugin: Callable[[str], Any]) -> None:
    built_in = lookup("schedule", "fcfs")
    with pytest.raises(ConfigError, match="schedule=fcfs is registered twice"):
        plugin("fcfs")
    assert lookup("schedule", "fcfs") is built_in


def test_the_same_file_may_be_loaded_again(plugin: Callable[[str], Any]) -> None:
    first, again = plugin("mine"), plugin("mine")
    assert first.Mine is not again.Mine
    assert lookup("schedule", "mine") is again.Mine


def test_the_same_name_in_another_slot_is_another_technique(clean_registry: None) -> None:
    @register("draft", "fcfs")
    class Other:
        traits = Traits()

    assert lookup("draft", "fcfs") is Other
    assert lookup("schedule", "fcfs") is not Other


def test_registering_needs_a_slot_and_traits(clean_registry: None) -> None:
    with pytest.raises(ConfigError, match="there is no slot 'shedule'; did you mean schedule"):
        register("shedule", "x")
    with pytest.raises(ConfigError, match="declares its traits"):
        register("schedule", "x")(type("X", (), {}))
    assert "x" not in names("schedule")
