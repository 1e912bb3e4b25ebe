"""Memory for weights, keys and values: zeros, and pages as large as the system gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from weft.models.memory import host_memory

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_BYTES = 1 << 21


def huge_kb(address: int) -> int:
    """KB in huge pages of the mapping that holds this address."""
    found = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf8").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


def test_it_is_zeros_of_the_size_asked_for() -> None:
    for size in (0, 1, 4097):
        memory = host_memory(size, torch.device("cpu"))
        assert torch.equal(memory, torch.zeros(size, dtype=torch.uint8))


@pytest.mark.skipif(
    not MODES.is_file() or "[never]" in MODES.read_text(encoding="utf8"), reason="this system has no huge pages"
)
def test_what_is_written_is_in_huge_pages() -> None:
    memory = host_memory(8 * HUGE_BYTES, torch.device("cpu"))
    middle = memory.data_ptr() + 4 * HUGE_BYTES
    before = huge_kb(middle)  # the system may have joined the mapping to another
    memory.fill_(1)
    # The first and the last one may be cut, and there may be too few of them left.
    assert huge_kb(middle) - before >= 4 * HUGE_BYTES // 1024
