"""The command line, one file per command.  Importing this package imports nothing else of weft, so that `--help` is quick."""

from __future__ import annotations


def main() -> None:
    """Entry point of the command `weft`; ends the process with its exit status.

    0 success; 1 the answer is no (it does not fit, the check failed, the engine gave up); 2 the command cannot run as written.
    """
    from weft.cli.app import app

    app(prog_name="weft")
