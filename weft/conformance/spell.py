"""Whether a grammar allows a JSON value, in one of the ways to write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from weft.slots import GrammarPath

MOST_TRIES = 2000
"""Members that are tried as the next one of an object, over a whole value."""

Chain = tuple[Any, "Chain"] | None
"""What is still to be written: the next thing, and the rest."""


class _Members:
    """Members of an object that are still to be written."""

    __slots__ = ("first", "left")

    def __init__(self, left: dict[str, Any], first: bool) -> None:
        self.left, self.first = left, first


def spells(path: GrammarPath, value: Any, orders: Sequence[Sequence[str]] = ()) -> bool:
    """Whether the path, at the beginning of a text of bytes, allows `value` as a whole text.

    orders: names of members in orders that the grammar may want.  The order is found by trying, that of the list which names most
    of an object's members first, and back to the last choice where it leads nowhere.
    """
    written = 0
    todo: Chain = (value, None)
    choices: list[tuple[int, Chain, list[str], _Members]] = []
    """Bytes written, the rest after the object, other members that may come next, and the object's."""
    tries = 0
    while True:
        stuck = False
        while todo is not None and not stuck:
            head, rest = todo
            if isinstance(head, bytes):
                done = path.advance(head)
                written += done
                stuck, todo = done < len(head), rest
            elif isinstance(head, _Members):
                if not head.left:
                    todo = (b"}", rest)
                else:
                    choices.append((written, rest, _tried(head.left, orders), head))
                    stuck = True
            else:
                todo = _parts(head, rest)
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
        comma = b"" if members.first else b","
        todo = (comma + _text(name) + b":", (members.left[name], (_Members(left, False), rest)))


def _tried(left: Mapping[str, Any], orders: Sequence[Sequence[str]]) -> list[str]:
    best = max(orders, key=lambda names: len(left.keys() & set(names)), default=())
    named = [name for name in best if name in left]
    return [*named, *(name for name in left if name not in named)]


def _parts(value: Any, rest: Chain) -> Chain:
    """What a value is written as, before the rest."""
    if isinstance(value, dict):
        return (b"{", (_Members(value, True), rest))
    if isinstance(value, list):
        chain: Chain = (b"]", rest)
        for i in range(len(value) - 1, -1, -1):
            chain = (value[i], chain)
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
