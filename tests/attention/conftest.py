"""The bundled model of the execution tests, for techniques of the slot `attention`."""

from tests.exec.conftest import layered_runtime, runtime

__all__ = ["layered_runtime", "runtime"]
