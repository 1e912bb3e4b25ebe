"""The shared model, for policies that are run live."""

from tests.exec.conftest import runtime

__all__ = ["runtime"]
