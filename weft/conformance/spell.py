"""Whether a grammar allows a JSON value, in one of the ways to write it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.slots import GrammarPath

MOST_TRIES = 4000
"""Members that are tried as the next one of an object, over a whole value."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A value that is still to be written.  inside: the `place` of the object that it stands in."""

    value: Any
    inside: Hashable


@dataclass(frozen=True, slots=True)
class _Members:
    """Members of an object that are still to be written; of which object, and inside of what."""

    left: Mapping[str, Any]
    first: bool
    object: int
    inside: Hashable

    @property
    def place(self) -> Hashable:
        """What the rest of the text can depend on: the members left here and in every object around it, not their order."""
        return self.object, frozenset(self.left), self.inside


Chain = tuple[bytes | _Value | _Members, "Chain"] | None
"""What is still to be written: the next thing, and the rest."""


def spells(path: GrammarPath, value: Any, orders: Sequence[Sequence[str]] = ()) -> bool:
    """Whether the path, at the beginning of a text of bytes, allows `value` as a whole text.

    orders: names of members in orders that the grammar may want.  The order is found by trying, that of the list which names most
    of an object's members first, and back to the last choice where it leads nowhere.  Where members left led nowhere once, they
    are not tried again behind the same ones in another order.
    """
    written = tries = 0
    todo: Chain = (_Value(value, None), None)
    choices: list[tuple[int, Chain, list[str], _Members]] = []
    """Bytes written, the rest after the object, other members that may come next, and the object's."""
    met: set[Hashable] = set()
    while True:
        stuck = False
        while todo is not None and not stuck:
            head, rest = todo
            if isinstance(head, bytes):
                done = path.advance(head)
                written += done
                stuck, todo = done < len(head), rest
            elif isinstance(head, _Value):
                todo = _parts(head, rest)
            elif not head.left:
                todo = (b"}", rest)
            else:
                stuck = True
                if head.place not in met:
                    met.add(head.place)
                    choices.append((written, rest, _tried(head.left, orders), head))
        if not stuck and _ends(path):
            return True
        # Go on with the next member of the newest choice that has one.
        while choices and not choices[-1][2]:
            choices.pop()
        tries += 1
        if not choices or tries > MOST_TRIES:
            return False
        before, rest, names, members = choices[-1]
        path.rollback(written - before)
        written = before
        name = names.pop(0)
        left = {k: v for k, v in members.left.items() if k != name}
        others = _Members(left, False, members.object, members.inside)
        comma = b"" if members.first else b","
        todo = (comma + _text(name) + b":", (_Value(members.left[name], others.place), (others, rest)))


def _tried(left: Mapping[str, Any], orders: Sequence[Sequence[str]]) -> list[str]:
    best = max(orders, key=lambda names: len(left.keys() & set(names)), default=())
    named = [name for name in best if name in left]
    return [*named, *(name for name in left if name not in named)]


def _parts(head: _Value, rest: Chain) -> Chain:
    """What a value is written as, before the rest."""
    value = head.value
    if isinstance(value, dict):
        return (b"{", (_Members(value, True, id(value), head.inside), rest))
    if isinstance(value, list):
        chain: Chain = (b"]", rest)
        for i in range(len(value) - 1, -1, -1):
            chain = (_Value(value[i], head.inside), chain)
            if i:
                chain = (b",", chain)
        return (b"[", chain)
    return (_text(value), rest)


def _text(value: Any) -> bytes:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _ends(path: GrammarPath) -> bool:
    if not path.advance([*path.ends][:1]):
        return False
    path.rollback(1)
    return True
