"""multipart/form-data (RFC 7578), read as it comes: nothing is held but the piece in hand.

Heads of parts are bounded by the parser (8 headers of 4 KiB), their number here, their contents by who reads them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from weft.errors import RequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS = 16
MAX_NAME_CHARS = 255


class Begin(NamedTuple):
    """A part begins.  filename: as `shown_name`, None where it is a field."""

    name: str
    filename: str | None


Part = Begin | bytes
"""What comes: the beginning of a part, then its data."""


async def parts(stream: AsyncIterator[bytes], content_type: str) -> AsyncIterator[Part]:
    """The parts of a form.  Raises RequestError for what is no form, has too many parts, or ends early."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
        raise RequestError(
            "the body must be a form: send the header Content-Type: multipart/form-data; boundary=...",
            code="unsupported_media_type",
        )
    reader = _Reader()
    parser = MultipartParser(boundary, reader.callbacks())
    try:
        async for chunk in stream:
            if chunk:
                parser.write(chunk)
                for part in reader.taken():
                    yield part
        parser.finalize()
    except MultipartParseError as error:
        raise RequestError(f"the form cannot be read: {error}", code="invalid_form") from None
    if not reader.ended:
        raise RequestError("the form ends before its closing boundary; send all of it", code="invalid_form")


def shown_name(raw: str) -> str:
    """What a client called a file, without folders and without what cannot be shown.  It is a text and never a path here."""
    last = raw.replace("\\", "/").rpartition("/")[2]
    clean = "".join(c for c in last if c.isprintable())[:MAX_NAME_CHARS]
    return clean if clean.strip(". ") else "upload"


class _Reader:
    """Callbacks of the parser, which put what they get into a list."""

    def __init__(self) -> None:
        self._out: list[Part] = []
        self._field, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._parts = 0
        self.ended = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self.part_begin,
            "on_header_field": self.header_field,
            "on_header_value": self.header_value,
            "on_header_end": self.header_end,
            "on_headers_finished": self.headers_finished,
            "on_part_data": self.part_data,
            "on_end": self.end,
        }

    def taken(self) -> list[Part]:
        out, self._out = self._out, []
        return out

    def part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RequestError(f"the form has more than {MAX_PARTS} parts", code="invalid_form")
        self._disposition = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        filename = options.get(b"filename")
        name = options.get(b"name", b"").decode("utf8", "replace")
        self._out.append(Begin(name, None if filename is None else shown_name(filename.decode("utf8", "replace"))))

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._out.append(data[start:end])

    def end(self) -> None:
        self.ended = True
