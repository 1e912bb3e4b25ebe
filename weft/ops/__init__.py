"""The operations that a decoder is made of, and the choice of who computes them.

The choice is made once, when a model is built: the decoder keeps the functions, not a name to look up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError

IMPLEMENTATIONS = ("ref",)


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation: functions with the signatures and meaning of `weft.ops.ref`."""

    name: str
    embed: Callable[..., Any]
    rms_norm: Callable[..., Any]
    linear: Callable[..., Any]
    rope_tables: Callable[..., Any]
    apply_rope: Callable[..., Any]
    attention: Callable[..., Any]
    attention_mass: Callable[..., Any]
    block_sparse_attention: Callable[..., Any]
    shared_attention: Callable[..., Any]
    gated: Callable[..., Any]
    route: Callable[..., Any]
    experts: Callable[..., Any]
    softcap_: Callable[..., Any]


def choose(name: str = "ref") -> Ops:
    """The implementation called `name`.  Raises ConfigError if there is none."""
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"ops {name!r} is unknown; there is {', '.join(IMPLEMENTATIONS)}")
    from weft.ops.ref import attention, attention_mass, basic, block_sparse, moe, rope, shared_prefix

    return Ops(
        name=name,
        embed=basic.embed,
        rms_norm=basic.rms_norm,
        linear=basic.linear,
        rope_tables=rope.tables,
        apply_rope=rope.apply_rope,
        attention=attention.attention,
        attention_mass=attention_mass.attention_mass,
        block_sparse_attention=block_sparse.block_sparse_attention,
        shared_attention=shared_prefix.shared_attention,
        gated=basic.gated,
        route=moe.route,
        experts=moe.experts,
        softcap_=basic.softcap_,
    )
