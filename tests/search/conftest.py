"""The bundled model, as the tests of execution have it."""

from tests.exec.conftest import runtime

__all__ = ["runtime"]
