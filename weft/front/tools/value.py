"""`Value`: one JSON value, recognized character by character (RFC 8259).  A stack of open brackets, no look back."""

from __future__ import annotations

MAX_DEPTH = 128
SPACE = " \t\n\r"

MORE, DONE, OVER, BAD = range(4)
"""What a character did: goes on; was the last; does not belong to the value, which is whole; cannot stand here."""

_NUMBER: dict[str, dict[str, str]] = {
    "sign": {"0": "zero", "9": "int"},
    "zero": {".": "point", "e": "e"},
    "int": {"0": "int", "9": "int", ".": "point", "e": "e"},
    "point": {"0": "frac", "9": "frac"},
    "frac": {"0": "frac", "9": "frac", "e": "e"},
    "e": {"+": "esign", "-": "esign", "0": "exp", "9": "exp"},
    "esign": {"0": "exp", "9": "exp"},
    "exp": {"0": "exp", "9": "exp"},
}
_KIND = {**dict.fromkeys("123456789", "9"), "E": "e"}
_WHOLE = frozenset(("zero", "int", "frac", "exp"))
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}


class Value:
    """Push characters until one is not MORE.  White space before the value belongs to it.

    Bound: containers nested deeper than MAX_DEPTH are BAD.
    """

    __slots__ = ("_left", "_stack", "_state")

    def __init__(self) -> None:
        self._state = "value"
        self._stack: list[str] = []
        self._left = ""

    def push(self, char: str) -> int:
        """Take one character, or "" for the end of the text."""
        state = self._state
        if state == "string":
            if char == '"':
                return self._whole_string()
            if char == "\\":
                self._state = "escape"
            return BAD if char < " " else MORE  # the end of the text is less than everything
        if state in _NUMBER:
            return self._number(state, char)
        if not char:
            return BAD
        if state in ("escape", "hex", "word"):
            return self._inside(state, char)
        if char in SPACE:
            return MORE
        return self._structure(state, char)

    def _whole_string(self) -> int:
        if self._left == "key":
            self._state, self._left = "colon", ""
            return MORE
        return self._ended()

    def _ended(self) -> int:
        self._state = "after"
        return MORE if self._stack else DONE

    def _number(self, state: str, char: str) -> int:
        following = _NUMBER[state].get(_KIND.get(char, char))
        if following is not None:
            self._state = following
            return MORE
        if state not in _WHOLE:
            return BAD
        if not self._stack:
            return OVER
        self._state = "after"
        return self.push(char)

    def _inside(self, state: str, char: str) -> int:
        if state == "escape":
            if char == "u":
                self._state, self._left = "hex", self._left + "...."
                return MORE
            self._state = "string"
            return MORE if char in '"\\/bfnrt' else BAD
        if state == "hex":
            self._left = self._left[:-1]
            if not self._left.endswith("."):
                self._state = "string"
            return MORE if char in "0123456789abcdefABCDEF" else BAD
        if char != self._left[0]:
            return BAD
        self._left = self._left[1:]
        return MORE if self._left else self._ended()

    def _structure(self, state: str, char: str) -> int:
        if state == "colon":
            self._state = "value"
            return MORE if char == ":" else BAD
        if state == "after":
            return self._after(char)
        if state in ("key", "first key"):
            if char == '"':
                self._state, self._left = "string", "key"
                return MORE
            return self._close(char) if state == "first key" else BAD
        if state == "first item" and char == "]":
            return self._close(char)
        return self._begin(char)

    def _begin(self, char: str) -> int:
        if char == '"':
            self._state = "string"
        elif char in "{[":
            if len(self._stack) >= MAX_DEPTH:
                return BAD
            self._stack.append("}" if char == "{" else "]")
            self._state = "first key" if char == "{" else "first item"
        elif char in _WORDS:
            self._state, self._left = "word", _WORDS[char]
        elif char == "-":
            self._state = "sign"
        elif char in "0123456789":
            self._state = "zero" if char == "0" else "int"
        else:
            return BAD
        return MORE

    def _after(self, char: str) -> int:
        if char == ",":
            self._state = "key" if self._stack[-1] == "}" else "value"
            return MORE
        return self._close(char)

    def _close(self, char: str) -> int:
        if char != self._stack[-1]:
            return BAD
        self._stack.pop()
        return self._ended()


def is_json(text: str) -> bool:
    """Whether the text is one JSON value, white space around it allowed."""
    value = Value()
    for i, char in enumerate(text):
        told = value.push(char)
        if told != MORE:
            return told in (DONE, OVER) and not text[i + (told == DONE) :].strip(SPACE)
    return value.push("") == OVER
