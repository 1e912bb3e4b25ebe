"""JSON schemas as grammars read them: formats as exact regular expressions, and ECMA's classes of characters.

Formats that are asserted (JSON Schema 2020-12, 7.2): date, time, date-time (RFC 3339), email (RFC 5321), ipv6 (RFC 4291, in the
text form of RFC 3986).  What no regular expression can say is refused by `unheld`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

DATA = frozenset({"enum", "const", "default", "examples", "example", "required", "x-guidance"})
"""Keywords whose values are no schemas, whatever stands in them."""
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
"""Keywords that hold schemas by name."""
SPACE = r"\t\n\x0b\x0c\r \u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}\u{feff}"
"""White space and ends of lines, as ECMA-262 has them (22.2.2.9)."""
UNHELD = {
    "hostname": "whether a name in Punycode is a host's is decided by the characters that it stands for; say a pattern instead"
}
"""Formats that no regular expression describes."""


def unheld(schema: Any) -> tuple[str, str] | None:
    """A format in a schema to which no output can be held, and why; None where there is none."""
    for one in subschemas(schema):
        format = one.get("format")
        if isinstance(format, str) and format in UNHELD:
            return format, UNHELD[format]
    return None


def exact(schema: Any) -> Any:
    """The schema with patterns in place of the formats above, and ECMA's \\s and \\S written out in its patterns."""
    if isinstance(schema, list):
        return [exact(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in DATA:
            out[key] = value
        elif key in NAMED and isinstance(value, dict):
            spelled = spaced if key == "patternProperties" else str
            out[key] = {spelled(name): exact(one) for name, one in value.items()}
        elif key == "pattern" and isinstance(value, str):
            out[key] = spaced(value)
        else:
            out[key] = exact(value)
    format = out.get("format")
    if isinstance(format, str) and format in FORMATS:
        del out["format"]
        pattern = FORMATS[format]()
        if "pattern" in out:
            out["allOf"] = [*(out.get("allOf") or []), {"pattern": pattern}]
        else:
            out["pattern"] = pattern
    return out


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and those in it, wherever one may stand."""
    if isinstance(schema, list):
        for one in schema:
            yield from subschemas(one)
    elif isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key in NAMED and isinstance(value, dict):
                for one in value.values():
                    yield from subschemas(one)
            elif key not in DATA:
                yield from subschemas(value)


def spaced(pattern: str) -> str:
    """A pattern with \\s and \\S written out."""
    out: list[str] = []
    inside, at = False, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\" and at + 1 < len(pattern):
            pair = pattern[at : at + 2]
            if pair == r"\s":
                pair = SPACE if inside else f"[{SPACE}]"
            elif pair == r"\S":
                pair = f"[^{SPACE}]"
            out.append(pair)
            at += 2
            continue
        inside = (inside or char == "[") and not (inside and char == "]")
        out.append(char)
        at += 1
    return "".join(out)


# ---------------------------------------------------------------------------------------------- formats

HOUR, SIXTY = "([01][0-9]|2[0-3])", "[0-5][0-9]"
FRACTION = r"(\.[0-9]+)?"
OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"{OCTET}(\.{OCTET}){{3}}"


@cache
def date() -> str:
    """RFC 3339's full-date: days as long as their months, and the 29th of February in leap years."""
    fours = "(0[48]|[2468][048]|[13579][26])"  # of two digits, those that four divides, but 00
    leap = f"([0-9]{{2}}{fours}|({fours}|00)00)"
    long = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    short = "(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    return f"([0-9]{{4}}-({long}|{short}|02-(0[1-9]|1[0-9]|2[0-8]))|{leap}-02-29)"


@cache
def time() -> str:
    """RFC 3339's full-time: a leap second is the last one of a day in UTC, whatever the offset."""
    usual = rf"{HOUR}:{SIXTY}:{SIXTY}{FRACTION}([Zz]|[+-]{HOUR}:{SIXTY})"
    hours = []
    for hour in range(24):
        minutes = []
        for minute in range(60):
            ahead = (60 * hour + minute + 1) % 1440  # of UTC, where it is 23:59
            behind = -ahead % 1440
            zulu = "" if ahead else "|[Zz]"
            minutes.append(rf"{minute:02}:60{FRACTION}(\+{_clock(ahead)}|-{_clock(behind)}{zulu})")
        hours.append(f"{hour:02}:({'|'.join(minutes)})")
    return f"({usual}|{'|'.join(hours)})"


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


@cache
def ipv6() -> str:
    """RFC 3986's IPv6address."""
    part = "[0-9a-fA-F]{1,4}"
    last = f"({part}:{part}|{IPV4})"
    forms = [f"({part}:){{6}}{last}"]
    for left in range(6):  # parts before ::, at most, of which the last has no colon of its own
        before = "" if left == 0 else f"(({part}:){{0,{left - 1}}}{part})?"
        forms.append(f"{before}::({part}:){{{5 - left}}}{last}")
    forms += [f"(({part}:){{0,5}}{part})?::{part}", f"(({part}:){{0,6}}{part})?::"]
    return f"({'|'.join(forms)})"


@cache
def email() -> str:
    """RFC 5321's Mailbox."""
    atom = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
    quoted = r'"([ !#-\[\]-~]|\\[ -~])*"'
    label = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    literal = rf"\[({IPV4}|IPv6:{ipv6()})\]"
    return rf"({atom}(\.{atom})*|{quoted})@({label}(\.{label})*|{literal})"


def _whole(body: Callable[[], str]) -> Callable[[], str]:
    return lambda: f"^{body()}$"


FORMATS: dict[str, Callable[[], str]] = {
    "date": _whole(date),
    "time": _whole(time),
    "date-time": _whole(lambda: f"{date()}[Tt]{time()}"),
    "ipv6": _whole(ipv6),
    "email": _whole(email),
}
