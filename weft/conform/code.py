"""What a file says to Python, without what it says to readers: by that a kept result knows whether its code has changed."""

from __future__ import annotations

import ast
from functools import cache


@cache
def code(source: str, without: tuple[str, ...] = ()) -> bytes:
    """A file without comments, and without the docstrings of the file, its classes and functions.

    without: names whose assignments at the file's head are left out too.  Kept, since many pairs of techniques ask for it.
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.Assign) and _names(node) & set(without))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()


def _names(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}
