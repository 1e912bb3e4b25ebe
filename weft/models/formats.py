"""Formats of weights of few bits.  No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from weft.errors import ConfigError

GROUPS = (16, 32, 64, 128)
"""Inputs that may share a scale; 0 stands for all of a row."""
DEFAULT_GROUP = {8: 0, 4: 32}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """bits: 8 or 4.  group: inputs that share a scale, 0 for all of an output's.  symmetric: whether there are no offsets."""

    bits: int
    group: int
    symmetric: bool = True

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """From `int8`, `int4`, `int4:128` or `int4:128:zero` (with offsets).  Raises ConfigError."""
        match = re.fullmatch(r"int(8|4)(?::(\d{1,6}))?(:zero)?", text)
        if match is None:
            raise ConfigError(
                f"--weights is int8 or int4, with a group such as int4:32 or int4:128:zero, got {text[:100]!r}"
            )
        bits = int(match[1])
        group = DEFAULT_GROUP[bits] if match[2] is None else int(match[2])
        if group and group not in GROUPS:
            raise ConfigError(
                f"--weights {text}: a group has {', '.join(map(str, GROUPS))} inputs, or 0 for all of a row"
            )
        return cls(bits, group, match[3] is None)

    def __str__(self) -> str:
        group = "" if self.group == DEFAULT_GROUP[self.bits] and self.symmetric else f":{self.group}"
        return f"int{self.bits}{group}{'' if self.symmetric else ':zero'}"

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def groups(self, width: int) -> int:
        """Of a row of `width` inputs.  Raises ConfigError where they do not divide it."""
        group = self.group or width
        if width % group:
            raise ConfigError(f"rows of {width} inputs cannot be parted in groups of {group}; choose a smaller group")
        return width // group

    def widest(self, other: WeightFormat) -> WeightFormat:
        """The smallest format that holds weights of both exactly (their scales, where groups are parted, are repeated)."""
        if 0 in (self.group, other.group):
            group = max(self.group, other.group)
        else:
            group = math.gcd(self.group, other.group)
        return WeightFormat(
            max(self.bits, other.bits), group, self.symmetric and other.symmetric and self.bits == other.bits
        )
