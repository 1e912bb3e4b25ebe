"""Formats of weights of few bits.  No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from weft.errors import ConfigError

GROUPS = (16, 32, 64, 128)
"""Inputs that may share a scale; 0 stands for all of a row."""
DEFAULT_GROUP = {8: 0, 4: 32}
MULTIPLES = 15
"""The largest multiple of an output's scale that a group of a nested format has; the largest of an output's is this one."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """bits: 8 or 4.  group: inputs that share a scale, 0 for all of an output's.  symmetric: whether there are no offsets.

    nested: whether the scales of an output's groups are whole multiples, MULTIPLES at most, of one scale of the output; of 4 bits
    in groups, without offsets.  Four bits times such a multiple are eight, so that products of 8 bits compute them exactly
    (two-level scales: QServe, arXiv:2405.04532).
    """

    bits: int
    group: int
    symmetric: bool = True
    nested: bool = False

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """From `int8`, `int4`, `int4:128`, `int4:128:zero` (with offsets) or `int4:128:float` (not nested).

        Raises ConfigError.
        """
        match = re.fullmatch(r"int(8|4)(?::(\d{1,6}))?(:zero|:float)?", text)
        if match is None:
            raise ConfigError(
                f"--weights is int8 or int4, with a group such as int4:32, int4:128:zero or int4:32:float, got {text[:100]!r}"
            )
        bits = int(match[1])
        group = DEFAULT_GROUP[bits] if match[2] is None else int(match[2])
        if group and group not in GROUPS:
            raise ConfigError(
                f"--weights {text}: a group has {', '.join(map(str, GROUPS))} inputs, or 0 for all of a row"
            )
        return cls(bits, group, match[3] != ":zero", bits == 4 and group > 0 and match[3] is None)

    def __str__(self) -> str:
        more = ":zero" if not self.symmetric else ":float" if self.bits == 4 and self.group and not self.nested else ""
        return f"int{self.bits}{f':{self.group}' if more or self.group != DEFAULT_GROUP[self.bits] else ''}{more}"

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
        alike = self.bits == other.bits
        return WeightFormat(
            max(self.bits, other.bits),
            group,
            self.symmetric and other.symmetric and alike,
            self.nested and other.nested,
        )
