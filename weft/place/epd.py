"""EPD: images are encoded on some devices, prompts computed on others, and answers on the rest.

Paper    Singh et al., Efficiently Serving Large Multimodal Models Using EPD Disaggregation, arXiv:2501.05460   (002-159)
Rule     a request's tiles go to the encoder that is free first, one by one; its embeddings to the prefill instance with the
         least to do; its KV to such a decode instance.  An encoder without work becomes a prefill instance where the rows
         before each of those exceed `rows`; one becomes an encoder again where more rows of images than that wait and none of
         prompts
Units    encode, prefill: replicas at first; rows: of prompts or images; pause_s: seconds between two changes
Cost     embeddings and KV go over a link once each
Pays     where encoding takes long beside answers that must come evenly; text alone leaves encoders idle
Differs  counts are arguments, not found by search; encoders hold no more memory for caches than others; embeddings of equal
         images are not kept; the language model's batch sizes are the schedule's
Raises   ValueError for encode, prefill or rows below 1 or pause_s < 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.errors import ConfigError
from weft.place._common import idlest
from weft.registry import register
from weft.slots import Claim
from weft.slots.place import Handed, Role
from weft.slots.route import ReplicaView
from weft.traits import Traits


@register("place", "epd")
@dataclass(slots=True, kw_only=True)
class EPD:
    """Three stages, each with devices of its own."""

    encode: int = 1
    prefill: int = 1
    rows: int = 6000
    pause_s: float = 2.0
    _changed: float = field(default=-1e9, init=False, compare=False)
    acts: dict[str, int] = field(default_factory=lambda: {"handed_over": 0, "flipped": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    exposed: ClassVar[float] = 1.0
    flips: ClassVar[bool] = True
    claim: ClassVar[Claim] = Claim(
        "up to 71 % less time to the first token than with encoding inline", "ttft_s.mean", 0.29, "less",
        against="distserve", case="images",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.encode, self.prefill, self.rows) < 1 or self.pause_s < 0:
            raise ValueError("encode, prefill and rows are at least 1, and pause_s not below 0")

    def roles(self, replicas: int) -> Sequence[Role]:
        rest = replicas - self.encode - self.prefill
        if rest < 1:
            raise ConfigError(
                f"{self.encode} + {self.prefill} replicas leave none of {replicas} for answers; add --replicas"
            )
        coders: list[Role] = ["encode"] * self.encode
        prompts: list[Role] = ["prefill"] * self.prefill
        answers: list[Role] = ["decode"] * rest
        return coders + prompts + answers

    def enter(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        return idlest(replicas, roles, ("prefill",))

    def handoff(self, request: Handed, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        self.acts["handed_over"] += 1
        return idlest(replicas, roles, ("decode",))

    def review(self, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> Sequence[Role]:
        if now < self._changed + self.pause_s:
            return roles
        coders = [i for i, role in enumerate(roles) if role == "encode"]
        prompts = [i for i, role in enumerate(roles) if role == "prefill"]
        images = sum(replicas[i].pending for i in coders) / len(coders)
        waiting = sum(replicas[i].pending for i in prompts) / len(prompts)
        found = list(roles)
        if waiting > self.rows and len(coders) > 1 and any(not replicas[i].pending for i in coders):
            found[next(i for i in coders if not replicas[i].pending)] = "prefill"
        elif images > self.rows and len(prompts) > 1 and any(not replicas[i].pending for i in prompts):
            found[next(i for i in prompts if not replicas[i].pending)] = "encode"
        else:
            return roles
        self.acts["flipped"] += 1
        self._changed = now
        return found
