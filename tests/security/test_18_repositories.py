"""Row 18: a repository full of traps is served, and none of its code runs: no loader imports a checkpoint's Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx

from tests.cli.running import Serving
from tests.test_imports import modules, nothing_executes_data

CODE = "open({mark!r}, 'a').write(__file__)\n"
PLACES = [
    "modeling_trap.py", "configuration_trap.py", "tokenization_trap.py", "processing_trap.py", "__init__.py", "conftest.py",
    "setup.py", "sitecustomize.py", "usercustomize.py", "weft.py", "torch.py", "json.py", "llguidance.py", "trap.pth",
]  # fmt: skip
AUTO = {
    "AutoConfig": "configuration_trap.Config", "AutoModel": "modeling_trap.Model", "AutoModelForCausalLM": "modeling_trap.Model",
    "AutoTokenizer": ["tokenization_trap.Tokenizer", "tokenization_trap.Tokenizer"], "AutoProcessor": "processing_trap.Processor",
}  # fmt: skip


def test_a_trapped_repository(tmp_path: Path, bundled: Path) -> None:
    """Served from inside it, too, where a careless import would find its files first."""
    repository, mark = tmp_path / "repository", tmp_path / "mark"
    shutil.copytree(bundled, repository)
    for name in PLACES:
        (repository / name).write_text(CODE.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((repository / name).read_text())
        settings |= {
            "auto_map": AUTO,
            "trust_remote_code": True,
            "custom_pipelines": {"x": {"impl": "modeling_trap.Pipe"}},
        }
        (repository / name).write_text(json.dumps(settings))
    with Serving(
        tmp_path, str(repository), "--port", "0", "--threads", "1", "--data-dir", str(tmp_path / "data")
    ) as server:
        url = server.url()
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
    assert not mark.exists()
    compiled = list(repository.rglob("*.pyc"))
    assert not compiled


def test_nothing_in_the_tree_imports_or_trusts_it() -> None:
    found = list(modules())
    assert len(found) > 100
    assert [c for module in found for c in nothing_executes_data(module)] == []
    assert not [
        m.name for m in found if "importlib.util.spec_from_file_location" in _calls(m.tree) and m.part == "models"
    ]


def _calls(tree: object) -> str:
    import ast

    return "\n".join(ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))  # type: ignore[arg-type]
