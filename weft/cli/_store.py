"""Flags of what a server keeps on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._terminal import say
from weft.config import parse_size
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.front.store import Store

PANEL = "Store"


def _option(name: str, help: str, metavar: str) -> Any:
    return typer.Option(name, help=help, metavar=metavar, rich_help_panel=PANEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFlags:
    """Where responses, files and batches are kept, and how much of them."""

    data_dir: Annotated[
        Path | None,
        _option("--data-dir", "Folder for responses, files and batches; else store below WEFT_HOME or ~/.weft.", "FOLDER"),
    ] = None  # fmt: skip
    store_max_responses: Annotated[
        int, _option("--store-max-responses", "Responses that are kept; the oldest go.", "N")
    ] = 10_000
    store_max_bytes: Annotated[
        str, _option("--store-max-bytes", "Most bytes of responses, and as many of files and batches.", "SIZE")
    ] = "4GiB"
    max_file: Annotated[str, _option("--max-file", "Most bytes of one uploaded file.", "SIZE")] = "512MiB"

    def check(self) -> None:
        """Raises ConfigError."""
        if self.store_max_responses < 1:
            raise ConfigError(f"--store-max-responses must be at least 1, got {self.store_max_responses}")
        parse_size(self.store_max_bytes, "--store-max-bytes")
        parse_size(self.max_file, "--max-file")

    def open(self) -> Store | None:
        """The store; None, with a note, where the usual folder cannot be had.  Raises ConfigError where the user named it."""
        from weft.front.store import open_store

        try:
            return open_store(
                self.data_dir,
                max_responses=self.store_max_responses,
                max_bytes=parse_size(self.store_max_bytes),
                max_file_bytes=parse_size(self.max_file),
            )
        except ConfigError as error:
            if self.data_dir is not None:
                raise
            say(f"note: this server keeps no responses, files or batches: {error}")
            return None
