"""What every test shares: where the shared data lies, one torch thread for each worker, and no silent skips."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers must not fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network for a model

import pytest

from weft import registry

if TYPE_CHECKING:
    from tests.models.checkpoints import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BUNDLED = ROOT / "weft" / "bundled" / "tiny"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/templates")` is that path in the shared data beside the checkout; the test skips where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"shared data is absent: {name}")
        return path

    return find


@pytest.fixture(scope="session")
def bundled() -> Path:
    """Folder of the bundled model."""
    return BUNDLED


def forbidden_skip(reason: str, shared_exists: bool) -> str | None:
    """Why a skip must not stand: it blames shared data that is there.  None where it may."""
    if shared_exists and "shared" in reason.lower():
        return f"skipped for want of shared data, but {SHARED} is there: {reason}"
    return None


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The text of a skip; empty for anything else, and for an expected failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return ""
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    complaint = forbidden_skip(skip_reason(report), SHARED.is_dir())
    if complaint:
        report.outcome = "failed"
        report.longrepr = complaint


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _judge(report)
    return report


class Teller:
    """Names a failure when it happens, since hours may lie before the summary.  Only where results are gathered."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = "" if crash is None else ": " + crash.message.partition("\n")[0][:200]
            self.terminal.write_line(f"\n{report.when} of {report.nodeid} failed{said}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Teller(terminal), "teller")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _judge(report)
    return report


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A function that makes (once) and returns the named variant of `tests/models/checkpoints.py`."""
    from tests.models.checkpoints import make  # imports torch and transformers

    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten after it; weft's own techniques, loaded once, are not."""
    for slot in registry.SLOTS:
        for name in registry.names(slot):
            registry.lookup(slot, name)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
