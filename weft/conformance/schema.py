"""Suite `schema`: JSON schemas with valid and invalid instances, each taken or turned down byte by byte by its grammar."""

from __future__ import annotations

from pathlib import Path

from weft.conformance.count import Count, folder


def run(data: Path) -> Count:
    """Over the folder `schema` of `data`.  Raises ConfigError where it is not there."""
    folder(data, "schema")
    return Count("schema")
