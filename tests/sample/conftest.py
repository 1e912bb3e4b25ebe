"""The bundled model, as the tests of execution have it."""

from tests.exec.conftest import layered_runtime, runtime

__all__ = ["layered_runtime", "runtime"]
