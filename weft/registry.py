"""Techniques by slot and name, and the one notation for a configured technique:  slot=name(argument=literal, ...).

A technique registers itself:

    @register("schedule", "fcfs")
    @dataclass(frozen=True, slots=True, kw_only=True)
    class FCFS: ...

Looking one up imports only its own file.  The class is its configuration; arguments are literals and are never evaluated.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from weft.errors import ConfigError
from weft.slots import SLOTS

T = TypeVar("T", bound=type)
ENTRY_POINTS = "weft.techniques"
"""Group of entry points in which an installed package names its techniques: "SLOT:NAME" = "its.module"."""
_REGISTERED: dict[tuple[str, str], type] = {}
MAX_TEXT = 4096
SOURCE = "<technique>"
"""The name under which Python reads a part.  What it doubts there, such as "1if", is refused: by one filter for good, as a filter
that comes and goes with each part would be changed for every thread of the process."""
warnings.filterwarnings("error", module=re.escape(SOURCE))


@dataclass(frozen=True, slots=True)
class Part:
    """A configured technique: which slot, which name, with which arguments."""

    slot: str
    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.arguments)
        return f"{self.slot}={self.name}({inside})" if inside else f"{self.slot}={self.name}"

    def build(self) -> Any:
        """An instance of the technique.  Raises ConfigError naming the argument."""
        return build(self)


def register(slot: str, name: str) -> Callable[[T], T]:
    """Class decorator: enter a technique.  Raises ConfigError for an unknown slot or a name that is taken."""
    if slot not in SLOTS:
        raise ConfigError(f"there is no slot {slot!r}{_nearest(slot, SLOTS)}")

    def enter(cls: T) -> T:
        known = _REGISTERED.get((slot, name))
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"{slot}={name} is registered twice: {known.__module__} and {cls.__module__}")
        if not hasattr(cls, "traits"):
            raise ConfigError(f"{slot}={name}: a technique declares its traits (a class variable `traits`)")
        _REGISTERED[slot, name] = cls
        return cls

    return enter


def names(slot: str) -> list[str]:
    """Names of a slot's techniques: the modules of its folder and what plugins registered.  Imports nothing but the folder."""
    _known(slot)
    found = {n for s, n in _REGISTERED if s == slot} | {n for s, n in _installed() if s == slot}
    try:
        package = importlib.import_module(SLOTS[slot].package)
    except ModuleNotFoundError as error:
        if not SLOTS[slot].package.startswith(str(error.name)):
            raise
        return sorted(found)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_") and not module.ispkg:
            found.add(module.name)
    return sorted(found)


@lru_cache(maxsize=1)
def _installed() -> dict[tuple[str, str], str]:
    """{(slot, name): module} of the techniques that installed packages name."""
    import importlib.metadata  # brings half of the standard library along

    found = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        slot, _, name = point.name.partition(":")
        if slot in SLOTS and name.isidentifier():
            found[slot, name] = point.value
    return found


def load_plugin(path: str | Path) -> list[tuple[str, str]]:
    """Run a file of yours that registers techniques; returns the (slot, name) of each.

    The file is a program: it is named on the command line or in Python, never by a request, a recipe or a checkpoint.
    Raises ConfigError when it cannot be read, fails, registers nothing, or takes a name that is taken.
    """
    file = Path(path).expanduser().resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"--plugin {path}: there is no such Python file")
    module = f"weft_plugin_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}_{file.stem}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded  # dataclasses look their module up there
        before = dict(_REGISTERED)
        try:
            spec.loader.exec_module(loaded)
        except Exception as error:
            del sys.modules[module]
            _REGISTERED.clear()
            _REGISTERED.update(before)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"--plugin {path}: {type(error).__name__}: {error}") from error
    mine = [key for key, cls in _REGISTERED.items() if cls.__module__ == module]
    if not mine:
        del sys.modules[module]
        raise ConfigError(
            f'--plugin {path}: the file registers no technique; it needs a class under @register("SLOT", "NAME")'
        )
    return mine


def lookup(slot: str, name: str) -> type:
    """The class of a technique.  Raises ConfigError with the nearest names."""
    _known(slot)
    if (slot, name) not in _REGISTERED:
        known = names(slot)
        if name not in known:
            listing = f"; there are: {', '.join(known)}" if known else "; that slot has no techniques yet"
            raise ConfigError(f"there is no {slot}={name}{_nearest(name, known)}{listing}")
        try:
            importlib.import_module(_installed().get((slot, name), f"{SLOTS[slot].package}.{name}"))
        except ImportError as error:
            raise ConfigError(f"the file of {slot}={name} cannot be loaded: {error}") from error
    try:
        return _REGISTERED[slot, name]
    except KeyError:
        raise ConfigError(f"the file of {slot}={name} does not register that name") from None


def parse(text: str) -> Part:
    """'kv.evict=lru' or 'schedule=layered(groups=4)' to a Part.  Raises ConfigError."""
    if len(text) > MAX_TEXT:
        raise ConfigError(f"a technique is written in at most {MAX_TEXT} characters")
    slot, equals, call = text.partition("=")
    slot, call = slot.strip(), call.strip()
    if not equals or not call:
        raise ConfigError(f"write a technique as SLOT=NAME(ARGS), for example schedule=fcfs; got {_quoted(text)}")
    _known(slot)
    name, arguments = parse_call(call)
    return Part(slot, name, arguments)


def parse_call(call: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """'name' or 'name(a=1, b="x")' to (name, arguments).  Only literals; nothing is evaluated."""
    unreadable = ConfigError(f"cannot read {_quoted(call)}; write name or name(argument=value, ...)")
    try:
        node = ast.parse(call, SOURCE, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError, Warning):
        raise unreadable from None
    if isinstance(node, ast.Name):
        return node.id, ()
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise unreadable
    if node.args:
        raise ConfigError(f"{node.func.id}: arguments are given by name, as in {node.func.id}(argument=value)")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ConfigError(f"{node.func.id}: ** is not allowed")
        if keyword.arg in arguments:
            raise ConfigError(f"{node.func.id}: {keyword.arg} is given twice")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
            repr(arguments[keyword.arg])  # Python writes no number of more than 4,300 digits: nobody could read it back
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ConfigError(f"{node.func.id}: {keyword.arg} must be a literal (number, string, list, ...)") from None
    return node.func.id, tuple(arguments.items())


def build(part: Part) -> Any:
    """Instantiate a Part.  Raises ConfigError for an unknown or missing argument or a value that the technique refuses."""
    cls = lookup(part.slot, part.name)
    given = dict(part.arguments)
    if is_dataclass(cls):
        allowed = {f.name: f for f in fields(cls) if f.init}
        for key in given:
            if key not in allowed:
                have = f"; it has: {', '.join(allowed)}" if allowed else "; it has none"
                raise ConfigError(f"{part.slot}={part.name} has no argument {key!r}{_nearest(key, allowed)}{have}")
        missing = [
            f.name
            for f in allowed.values()
            if f.default is MISSING and f.default_factory is MISSING and f.name not in given
        ]
        if missing:
            raise ConfigError(f"{part.slot}={part.name} needs {', '.join(missing)}")
        given = {key: _typed(part, key, value, get_type_hints(cls).get(key, Any)) for key, value in given.items()}
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{part}: {error}") from error


def _typed(part: Part, key: str, value: Any, wanted: Any) -> Any:
    """The literal as the field's type: 2 for 2.0 where a float stands, a list for a tuple; never text for a number."""
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{part.slot}={part.name}: {key}={_quoted(value)}: {error}") from None
    except TypeError:
        return value  # a type that no literal is checked against; the class judges it


def _known(slot: str) -> None:
    if slot not in SLOTS:
        raise ConfigError(f"there is no slot {slot!r}{_nearest(slot, SLOTS)}; there are: {', '.join(SLOTS)}")


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _nearest(word: str, among: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(among), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
