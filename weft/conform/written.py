"""What is read and not run: the head of a technique's file, its imports, and its arguments."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass

from weft.conform.lab import Lab
from weft.errors import ConfigError
from weft.features import feature
from weft.registry import Part, lookup

TENSORS = frozenset({"torch", "numpy", "transformers", "safetensors"})
WORLD = frozenset(
    "time datetime threading asyncio socket selectors random secrets uuid multiprocessing subprocess concurrent signal os".split()
)


def head(lab: Lab, part: Part) -> str:
    """The docstring of its file has every field."""
    found = feature(part.slot, part.name)
    assert found.summary, "the docstring begins with a line that says what the technique does"
    return found.summary


def source(lab: Lab, part: Part) -> str:
    """The deciding half is pure: no tensors at the head of the file, no clock, thread, process or randomness anywhere."""
    cls = lookup(part.slot, part.name)
    module = inspect.getmodule(cls)
    assert module is not None
    tree = ast.parse(inspect.getsource(module))
    complaints = [*_imports(tree, TENSORS, at_load=True), *_imports(tree, WORLD, at_load=False)]
    assert not complaints, "; ".join(complaints)
    return "imports are pure"


def _imports(tree: ast.Module, banned: frozenset[str], *, at_load: bool) -> Iterator[str]:
    inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)] if at_load else []
    typed = [
        n
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if not node.level
            else []
        )
        for name in names:
            if name.split(".")[0] in banned and node not in inside and node not in typed:
                where = "only inside its methods" if at_load else "not at all"
                yield f"line {node.lineno}: {name.split('.')[0]} may be imported {where}"


def arguments(lab: Lab, part: Part) -> str:
    """The class is its configuration: its trial's arguments build it, and one that it does not have is refused by name."""
    cls = lookup(part.slot, part.name)
    assert is_dataclass(cls), "the class is a dataclass whose fields are the technique's arguments"
    built = part.build()
    assert isinstance(getattr(built, "acts", {}), dict), "acts is a dict of counters"
    said = ""
    try:
        Part(part.slot, part.name, (("no_such_argument", 1),)).build()
    except ConfigError as error:
        said = str(error)
    assert "no_such_argument" in said, "an unknown argument is taken, or refused without being named"
    return str(part)
