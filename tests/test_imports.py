"""Laws that can be read off the source: who may import whom, what pure code may touch, what is never called.

Each rule is a function from a parsed module to complaints.  Every rule runs over all of weft/, and every rule is shown to
bite on a snippet that breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

VOCABULARY = frozenset({"types", "traits", "slots", "registry", "compose", "config", "errors", "sampling", "recipe"})
TECHNIQUES = frozenset(
    "schedule kv attention draft accept weights adapt skip resident sample constrain search context route place cost "
    "bundle".split()
)
# What each part of weft may import from weft, besides itself.  exec.batch and exec.kvpool (what a decoder reads) and models.spec,
# layout, formats and quantized (what it is, and how its weights lie in memory) are data; who computes on them may name them.
# models.gguf reads headers, which hold tokenizers too.  core.noise says under which seed a sequence goes on elsewhere.  hub says
# where a second model's files are.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "core": VOCABULARY,
    "sim": VOCABULARY | {"core", "models"},
    "exec": VOCABULARY | {"core", "models", "ops", "hub"},
    "models": VOCABULARY | {"ops", "native", "exec.batch", "exec.kvpool"},
    "ops": VOCABULARY
    | {"native", "exec.batch", "exec.kvpool"}
    | {f"models.{name}" for name in ("spec", "layout", "formats", "quantized")},
    "front": VOCABULARY | {"core.events", "core.noise", "models.gguf"},
    "native": frozenset(),
}
TENSORS = frozenset({"torch", "numpy", "transformers", "safetensors"})
WORLD = frozenset(
    "time datetime threading _thread asyncio socket selectors select random secrets uuid multiprocessing subprocess "
    "concurrent signal queue http urllib requests httpx".split()
)
"""Clocks, threads, sockets, other processes and global random state: a pure decision reads none of them."""
PICKLES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})
ENVIRONMENT = frozenset({"WEFT_HOME", "WEFT_LOG", "WEFT_API_KEY"})


@dataclass(frozen=True)
class Import:
    """One imported module (full name), where, and whether it happens when the module is loaded."""

    name: str
    line: int
    at_load: bool
    types_only: bool


@dataclass(frozen=True)
class Module:
    """A parsed source file; `name` is its full name, such as weft.core.engine."""

    name: str
    tree: ast.Module
    package: bool = False

    @property
    def part(self) -> str:
        """First name below weft: core, exec, schedule, types ...; empty for weft itself."""
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def pure(self) -> bool:
        return self.part in VOCABULARY or self.part == "core"


def parse(name: str, source: str, *, package: bool = False) -> Module:
    return Module(name, ast.parse(source), package)


def modules() -> Iterator[Module]:
    for path in sorted((ROOT / "weft").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        yield parse(".".join(parts[:-1] if package else parts), path.read_text(encoding="utf8"), package=package)


@lru_cache(1)
def imports(module: Module) -> tuple[Import, ...]:
    """Every import statement, relative ones resolved; `from a import b` gives a.b, which may be a module or a name."""

    def visit(node: ast.AST, at_load: bool, types_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, at_load, types_only)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = module.name.split(".")
                    above = above[: len(above) - child.level + module.package]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, at_load, types_only)
            else:
                inner = at_load and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typed = types_only or (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"))
                yield from visit(child, inner, typed)

    return tuple(visit(module.tree, True, False))


def outside(module: Module, names: frozenset[str], *, at_load_only: bool = False) -> list[str]:
    """Complaints about imports of the named top-level packages (imports for types alone are free)."""
    return [
        f"{module.name}:{i.line}: imports {i.name.split('.')[0]}"
        for i in imports(module)
        if i.name.split(".")[0] in names and not i.types_only and (i.at_load or not at_load_only)
    ]


# ---------------------------------------------------------------------------------------------- the rules


def pure_reads_nothing(module: Module) -> list[str]:
    """Vocabulary and core/: no tensors, no clock, thread, socket, process or global random state, no operating system."""
    if not module.pure:
        return []
    banned = TENSORS | WORLD | (frozenset() if module.part == "config" else frozenset({"os"}))
    return outside(module, banned)


def techniques_decide_purely(module: Module) -> list[str]:
    """Techniques: torch and numpy only inside functions, and nothing of the world anywhere."""
    if module.part not in TECHNIQUES:
        return []
    return outside(module, TENSORS, at_load_only=True) + outside(module, WORLD | {"os"})


def front_has_no_tensors(module: Module) -> list[str]:
    return outside(module, TENSORS) if module.part == "front" else []


def one_way(module: Module) -> list[str]:
    """Imports inside weft run one way; techniques see the vocabulary, and of their folder what is no technique, only."""
    part = module.part
    if part in ("", "cli", "__main__"):
        return []
    complaints = []
    for i in imports(module):
        if i.name.split(".")[0] != "weft":
            continue
        target = i.name.removeprefix("weft").lstrip(".")
        top = target.split(".")[0]
        if part in VOCABULARY:
            allowed = top in VOCABULARY
        elif part in TECHNIQUES:
            allowed = top in VOCABULARY or (top == part and any(name.startswith("_") for name in target.split(".")))
        elif part in MAY_IMPORT:
            named = {".".join(target.split(".")[:depth]) for depth in (1, 2)}
            allowed = top == part or bool(named & MAY_IMPORT[part])
        else:  # the modules that put the parts together, such as weft.llm
            allowed = top != "cli"
        if not allowed and target != "__version__":
            complaints.append(f"{module.name}:{i.line}: {part} must not import {i.name}")
    return complaints


def nothing_executes_data(module: Module) -> list[str]:
    """No pickle in any form, no eval or exec, no torch.load, no yaml.load, no code from a checkpoint."""
    complaints = outside(module, PICKLES)
    for i in imports(module):
        if i.name in ("torch.load", "yaml.load"):
            complaints.append(f"{module.name}:{i.line}: imports {i.name}")
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "builtins.eval",
            "builtins.exec",
            "torch.load",
            "yaml.load",
        ):
            complaints.append(f"{module.name}:{node.lineno}: calls {called}")
        for keyword in node.keywords:
            trusts = keyword.arg in ("allow_pickle", "trust_remote_code")
            if trusts and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                complaints.append(f"{module.name}:{node.lineno}: passes {keyword.arg}")
    return complaints


def environment_is_three_names(module: Module) -> list[str]:
    """os.environ and os.getenv with one of the three names, written out; nothing else touches the environment."""
    complaints = [
        f"{module.name}:{i.line}: imports {i.name}; write os.environ"
        for i in imports(module)
        if i.name in ("os.environ", "os.getenv")
    ]
    known: set[int] = set()
    for node in ast.walk(module.tree):
        name: ast.expr | None = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.getenv", "os.environ.get"):
            name = node.args[0] if node.args else None
            known.add(id(node.func))
            if isinstance(node.func, ast.Attribute):
                known.add(id(node.func.value))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            name = node.slice
            known.add(id(node.value))
        elif isinstance(node, ast.Compare) and any(ast.unparse(c) == "os.environ" for c in node.comparators):
            name = node.left
            known.update(id(c) for c in node.comparators)
        elif (
            isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("os.environ", "os.getenv")
            and id(node) not in known
        ):
            complaints.append(f"{module.name}:{node.lineno}: uses {ast.unparse(node)} as a whole")
            continue
        else:
            continue
        if not (isinstance(name, ast.Constant) and name.value in ENVIRONMENT):
            what = ast.unparse(name) if name is not None else "nothing"
            complaints.append(f"{module.name}:{node.lineno}: reads the environment variable {what}")
    return complaints


RULES = (
    pure_reads_nothing,
    techniques_decide_purely,
    front_has_no_tensors,
    one_way,
    nothing_executes_data,
    environment_is_three_names,
)


@cache
def everywhere() -> dict[str, list[str]]:
    """Complaints of each rule over all of weft/, each file of which is parsed once."""
    complaints: dict[str, list[str]] = {rule.__name__: [] for rule in RULES}
    count = 0
    for module in modules():
        count += 1
        for rule in RULES:
            complaints[rule.__name__] += rule(module)
    assert count > 5, "weft/ was not found"
    return complaints


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_everywhere(rule) -> None:
    complaints = everywhere()[rule.__name__]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (pure_reads_nothing, "weft.core.engine", "import torch"),
        (pure_reads_nothing, "weft.core.engine", "def f():\n    import time"),
        (pure_reads_nothing, "weft.core.kv", "from random import random"),
        (pure_reads_nothing, "weft.types", "import os.path"),
        (pure_reads_nothing, "weft.registry", "import numpy as np"),
        (techniques_decide_purely, "weft.schedule.fcfs", "import torch"),
        (techniques_decide_purely, "weft.kv.evict.lru", "def rank(self):\n    import time"),
        (techniques_decide_purely, "weft.kv.compress.h2o", "class H2O:\n    import numpy"),
        (front_has_no_tensors, "weft.front.http", "def f():\n    from torch import Tensor"),
        (one_way, "weft.types", "from weft.core.engine import Engine"),
        (one_way, "weft.core.engine", "from weft.exec.runner import Runner"),
        (one_way, "weft.core.scheduler", "from weft.schedule.fcfs import FCFS"),
        (one_way, "weft.core.scheduler", "from ..schedule import fcfs"),
        (one_way, "weft.schedule.fcfs", "from weft.schedule.prefill_first import PrefillFirst"),
        (one_way, "weft.schedule.fcfs", "from .prefill_first import PrefillFirst"),
        (one_way, "weft.schedule.fcfs", "from weft.core.request import Request"),
        (one_way, "weft.front.http", "from weft.core.engine import Engine"),
        (one_way, "weft.front.http", "from weft import llm"),
        (one_way, "weft.ops.ref", "from weft.models import decoder"),
        (one_way, "weft.sim.driver", "import weft.exec.runner"),
        (one_way, "weft.llm", "from weft.cli import main"),
        (nothing_executes_data, "weft.exec.loader", "import pickle"),
        (nothing_executes_data, "weft.exec.loader", "import torch\ntorch.load('x')"),
        (nothing_executes_data, "weft.exec.loader", "from torch import load"),
        (nothing_executes_data, "weft.exec.loader", "eval('1')"),
        (nothing_executes_data, "weft.exec.loader", "exec('1')"),
        (nothing_executes_data, "weft.exec.loader", "import yaml\nyaml.load(f)"),
        (nothing_executes_data, "weft.exec.loader", "load(path, trust_remote_code=flag)"),
        (environment_is_three_names, "weft.cli.serve", "import os\nos.environ['HOME']"),
        (environment_is_three_names, "weft.cli.serve", "import os\nos.getenv('WEFT_DEBUG')"),
        (environment_is_three_names, "weft.cli.serve", "import os\nos.environ.get(name)"),
        (environment_is_three_names, "weft.cli.serve", "import os\n'HOME' in os.environ"),
        (environment_is_three_names, "weft.cli.serve", "import os\nfor k in os.environ: pass"),
        (environment_is_three_names, "weft.cli.serve", "from os import environ"),
    ],
)
def test_rule_bites(rule, name: str, source: str) -> None:
    assert rule(parse(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "weft.core.engine",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import random\nfrom weft.types import Plan",
        ),
        ("weft.kv.compress.h2o", "from weft.traits import Traits\ndef keep(self):\n    import torch"),
        ("weft.kv.compress.h2o", "from weft.kv.compress._common import top_k"),
        ("weft.draft.clover", "from weft.draft._weights import read_shapes"),
        (
            "weft.exec.runner",
            "import torch\nfrom weft.core import kv\nfrom weft.models.decoder import Decoder\nfrom .batch import Batch",
        ),
        ("weft.models.decoder", "from weft.exec.batch import Batch\nimport torch\nmodel.eval()"),
        ("weft.front.http", "from weft.types import Event\nfrom weft.core.events import Stream"),
        ("weft.cli.serve", "import os\nos.environ['WEFT_HOME']\nos.environ.get('WEFT_LOG')\nos.getenv('WEFT_API_KEY')"),
        ("weft.models.hf", "load(path, trust_remote_code=False)"),
        ("weft.llm", "from weft.exec import runner\nfrom weft.front import text\nimport time"),
    ],
)
def test_rules_leave_good_code_alone(name: str, source: str) -> None:
    module = parse(name, source)
    assert not [c for rule in RULES for c in rule(module)]


@pytest.mark.parametrize(
    ("chosen", "banned"),
    [
        (lambda m: m.pure, ("torch", "numpy", "transformers", "asyncio", "socket")),
        (lambda m: m.part == "front", ("torch", "transformers")),
        (lambda m: m.part in TECHNIQUES, ("torch", "numpy")),
    ],
    ids=["vocabulary and core", "front", "techniques"],
)
def test_loaded_modules_stay_clean(chosen, banned: tuple[str, ...]) -> None:
    """What the source says is also what happens: nothing drags a banned package in through a third one."""
    names = [m.name for m in modules() if chosen(m)]
    allowed_by_libraries = "{'asyncio', 'socket'}"  # the standard library may load these for others
    code = (
        "import importlib, sys\n"
        "import msgspec\n"
        f"before = {{b for b in {banned!r} if b in sys.modules and b in {allowed_by_libraries}}}\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*[b for b in {banned!r} if b in sys.modules and b not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
