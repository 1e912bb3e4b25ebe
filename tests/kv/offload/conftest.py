"""The shared model of the execution tests."""

from tests.exec.conftest import layered_runtime, runtime

__all__ = ["layered_runtime", "runtime"]
