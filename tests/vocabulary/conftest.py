"""Techniques made up for one test, which leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from weft.registry import Part, register
from weft.traits import Traits


@pytest.fixture
def technique(clean_registry: None) -> Callable[..., Part]:
    """`technique("draft", "guess", needs=..., gives=...)` registers a technique with those traits and is its Part."""

    def make(slot: str, name: str, **traits: Any) -> Part:
        cls = type(name, (), {"traits": Traits(**traits), "__module__": f"{__name__}.{slot}.{name}"})
        register(slot, name)(cls)
        return Part(slot, name)

    return make
