"""Grammars that are strangers' programs: what is slow, large or wrong is refused in a process that may be ended."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from weft.errors import RequestError
from weft.exec.grammars import GrammarDesk, Ready
from weft.front.grammars import Grammars, constrained, holder
from weft.types import Grammar, Rejected, RequestSpec, TokenItem

PART = "constrain=llguidance"


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(seconds=2.0, workers=2)
    yield made
    made.close()


def test_good_and_bad(grammars: Grammars) -> None:
    for good in (
        Grammar("regex", "a+"),
        Grammar("json", '{"type": "object"}'),
        Grammar("choice", '["a"]'),
        Grammar("grammar", 'start: "a"'),
    ):
        grammars.check(PART, good)
        grammars.check(PART, good)
    with pytest.raises(RequestError, match="uniqueItems") as caught:
        grammars.check(PART, Grammar("json", '{"uniqueItems": true}'))
    assert caught.value.code == "invalid_grammar"


NESTED = "x"
for _ in range(2000):
    NESTED = f"({NESTED}|y)*"
WIDE = {f"k{i}": {"type": "string", "pattern": f"^(a|b){{1,{i % 50 + 1}}}$"} for i in range(5000)}
HOSTILE = {
    "nested stars": Grammar("regex", "(" * 40 + "a" + "*)" * 40 + "b"),
    "deep regex": Grammar("regex", NESTED),
    "counted": Grammar("regex", "((((a{1,99}b){1,99}c){1,99}d){1,99}e){1,99}"),
    "wide alternation": Grammar("regex", "|".join(f"{i}.*{i}" for i in range(20_000))),
    "many states": Grammar("regex", "(.*a){30}.{2000}b"),
    "huge enum": Grammar("json", json.dumps({"enum": [f"value {i}" for i in range(40_000)]})),
    "deep schema": Grammar("json", '{"type": "array", "items": ' * 3000 + "{}" + "}" * 3000),
    "wide schema": Grammar("json", json.dumps({"properties": WIDE})),
    "recursive": Grammar("json", '{"allOf": [{"$ref": "#"}]}'),
    "doubling": Grammar("grammar", "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(200)) + 'a200: "x"\n'),
    "ambiguous": Grammar("grammar", 'start: s\ns: s s s | s s | "a" |\n'),
    "no text": Grammar("grammar", "start: start\n"),
    "binary": Grammar("grammar", "\x00\x01\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_in_time(grammars: Grammars, name: str) -> None:
    """Taken or refused with a plain reason, and never much later than the budget; the next one is served."""
    began = time.monotonic()
    refused: list[RequestError] = []
    try:
        grammars.check(PART, HOSTILE[name])
    except RequestError as error:
        refused.append(error)
    assert all(20 < len(str(error)) < 700 and error.param == "structured_outputs" for error in refused)
    assert time.monotonic() - began < 30
    grammars.check(PART, Grammar("regex", f"after {name}"))


def test_what_takes_too_long_is_given_up_and_others_go_on(tmp_path) -> None:
    """A checker that hangs on one grammar: that one is refused after its budget, others meanwhile are not kept waiting."""
    slow = Grammars(seconds=1.0, workers=2)
    try:
        for worker in slow._workers:
            worker._command[2] = str(tmp_path / "worker.py")
        (tmp_path / "worker.py").write_text(
            "import json, signal, sys\n"
            "while len(head := sys.stdin.buffer.read(4)) == 4:\n"
            "    body = json.loads(sys.stdin.buffer.read(int.from_bytes(head, 'big')))\n"
            "    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))\n"
            "    while body['source'] == 'slow': pass\n"
            "    signal.setitimer(signal.ITIMER_PROF, 0)\n"
            "    sys.stdout.buffer.write((2).to_bytes(4, 'big') + b'{}'); sys.stdout.buffer.flush()\n"
        )
        errors: list[RequestError] = []

        def check() -> None:
            try:
                slow.check(PART, Grammar("regex", "slow"))
            except RequestError as error:
                errors.append(error)

        thread = threading.Thread(target=check)
        thread.start()
        for i in range(20):
            slow.check(PART, Grammar("regex", f"quick {i}"))
        assert thread.is_alive() or errors, "they did not wait for the slow one"
        thread.join()
        assert "longer than 1 s" in str(errors[0])
        slow.check(PART, Grammar("regex", "quick again"))
        began = time.monotonic()
        with pytest.raises(RequestError, match="longer than"):
            slow.check(PART, Grammar("regex", "slow"))
        assert time.monotonic() - began < 0.5, "a verdict is remembered"
    finally:
        slow.close()


def test_a_checker_that_is_killed_from_outside_is_nobodys_fault(tmp_path) -> None:
    """The same grammar is asked again in another process; who ends that, too, is refused, and may be right another time."""
    mark, asked = tmp_path / "killed", tmp_path / "asked"
    shot = Grammars(seconds=1.0, workers=1)
    try:
        shot._workers[0]._command[2] = str(tmp_path / "worker.py")
        (tmp_path / "worker.py").write_text(
            "import json, os, pathlib, sys\n"
            f"mark, asked = pathlib.Path({str(mark)!r}), pathlib.Path({str(asked)!r})\n"
            "while len(head := sys.stdin.buffer.read(4)) == 4:\n"
            "    body = json.loads(sys.stdin.buffer.read(int.from_bytes(head, 'big')))\n"
            "    with asked.open('a') as f: f.write('x')\n"
            "    if body['source'] == 'deadly' or not mark.exists():\n"
            "        mark.touch(); os.kill(os.getpid(), 9)\n"
            "    sys.stdout.buffer.write((2).to_bytes(4, 'big') + b'{}'); sys.stdout.buffer.flush()\n"
        )
        shot.check(PART, Grammar("regex", "good"))
        assert asked.read_text() == "xx"
        for times in (2, 4):
            with pytest.raises(RequestError, match="ended on this one"):
                shot.check(PART, Grammar("regex", "deadly"))
            assert asked.read_text() == "xx" + times * "x", "that is no verdict to be remembered"
        shot.check(PART, Grammar("regex", "good"))
        assert asked.read_text() == 6 * "x", "this one is"
    finally:
        shot.close()


def test_memory_is_bounded() -> None:
    small = Grammars(seconds=10.0, memory_bytes=64 << 20, workers=1)
    try:
        small.check(PART, Grammar("regex", "a"))
        with pytest.raises(RequestError, match="more than 64 MiB"):
            small.check(PART, Grammar("json", json.dumps({"enum": [f"{i}" * 40 for i in range(20_000)]})))
        small.check(PART, Grammar("regex", "b"))
    finally:
        small.close()


def test_who_holds() -> None:
    assert holder((), ()) == PART
    assert constrained((), (), None) == ()
    assert constrained(("draft=ngram",), (), Grammar("regex", "a")) == ("draft=ngram", PART)
    own = "constrain=llguidance(items=9)"
    assert constrained((own,), (), Grammar("regex", "a")) == (own,)
    assert constrained((), (own,), Grammar("regex", "a")) == ()
    assert holder((), (own,)) == own


# ---------------------------------------------------------------------------------------------- the engine's desk


class Gate:
    """A technique whose grammars are made ready when the test says so."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def begin(self, grammar: Grammar) -> None:
        assert self.open.wait(20)
        if grammar.source == "wrong":
            raise RequestError("it is wrong")
        if grammar.source == "fault":
            raise ZeroDivisionError("a secret")


class OneStack:
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def of(self, techniques: tuple[str, ...]) -> dict[str, Gate]:
        return {"constrain": self.gate}


def asked(id: int, source: str, n: int = 1) -> RequestSpec:
    return RequestSpec(id=id, items=(TokenItem((1,)),), grammar=Grammar("regex", source), n=n)


def test_the_desk_does_not_wait() -> None:
    gate, done, came = Gate(), list[Ready](), threading.Semaphore(0)
    desk = GrammarDesk(OneStack(gate), lambda ready: (done.append(ready), came.release()))  # type: ignore[arg-type]
    try:
        for id, source in ((1, "good"), (2, "wrong"), (3, "fault"), (4, "good")):
            assert desk.take(asked(id, source)) == []
        assert not done, "the engine's thread has gone on"
        assert isinstance(desk.take(asked(1, "good"))[0], Rejected), "an id that is live already"
        desk.cancel(4, None)
        assert sorted(desk.told()) == [(1, 0), (2, 0), (3, 0)]
        gate.open.set()
        for _ in range(4):
            assert came.acquire(timeout=20)
        found = {ready.spec.id: desk.entered(ready) for ready in done}
        assert found[1] == []
        assert found[4] is None, "cancelled while it was made ready"
        assert [e.message for e in found[2] or ()] == ["it is wrong"]  # type: ignore[union-attr]
        assert "secret" not in str(found[3])
        assert "ZeroDivisionError" in str(found[3])
        assert desk.told() == []
    finally:
        desk.close()
