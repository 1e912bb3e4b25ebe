"""Mistral: `[TOOL_CALLS]`, then either a list `[{"name": ..., "arguments": {...}, "id": ...}]` (tokenizers v2 to v7), or
`NAME[ARGS]{...}` with `[CALL_ID]ID` perhaps before `[ARGS]`, the marker repeated for each call (v11 and later).

Source: mistral-common's templates.  Ids are nine letters and digits, since the templates refuse others.
"""

from __future__ import annotations

import hashlib
import string

from weft.front.ids import random_bytes
from weft.front.tools.form import Form
from weft.front.tools.machine import MAX_NAME, NAME_CHARS, Machine, Malformed, Reading
from weft.front.tools.value import SPACE

ID_CHARS = string.ascii_letters + string.digits
ID_LENGTH = 9


def call_id() -> str:
    return "".join(ID_CHARS[byte % len(ID_CHARS)] for byte in random_bytes(ID_LENGTH))


class Mistral(Machine):
    name = "mistral"
    form = Form(call="[TOOL_CALLS]NAME[ARGS]ARGUMENTS", between="")
    markers = ("[TOOL_CALLS]",)
    special = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

    @staticmethod
    def own_id() -> str:
        return call_id()

    @staticmethod
    def fit_id(id: str) -> str:
        if len(id) == ID_LENGTH and id.isascii() and id.isalnum():
            return id
        return hashlib.blake2b(id.encode("utf-8", "replace")).hexdigest()[:ID_LENGTH]

    def calls(self, marker: str) -> Reading[None]:
        char = yield from self.solid()
        if char == "[":
            yield from self.listed()
        elif char == "{":
            yield from self.object()
        else:
            yield from self.named(char)

    def named(self, char: str) -> Reading[None]:
        """NAME, an id perhaps, and the arguments."""
        name, char = yield from self.word(char, MAX_NAME)
        id = None
        if not self.known(name):
            self.fail(char)
        if char and char in SPACE:
            char = yield from self.solid()
        if char == "[":
            char = yield
            if char == "C":
                yield from self.literal("ALL_ID]")
                char = yield
                id, char = yield from self.word(char, ID_LENGTH)
                if char != "[":
                    self.fail(char)
                char = yield
            if char != "A":
                self.fail(char)
            yield from self.literal("RGS]")
            char = yield from self.solid()
        if char != "{":
            self.fail(char)
        self.begin(name, id)
        yield from self.value(char, self.argue)
        self.end()

    def word(self, char: str, longest: int) -> Reading[tuple[str, str]]:
        """A run of characters of names from `char` on, and the character behind it."""
        read: list[str] = []
        while char and char in NAME_CHARS:
            read.append(char)
            if len(read) > longest:
                raise Malformed
            char = yield
        return "".join(read), char


class MistralList(Mistral):
    """The same, where the template writes lists."""

    name = "mistral_list"
    form = Form(open="[TOOL_CALLS][", call='{"name": "NAME", "arguments": ARGUMENTS}', between=", ", close="]")
