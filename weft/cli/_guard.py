"""Flags of who may use a server, and from where."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.front.connection import Patience
    from weft.front.guard import Guard

PANEL = "Security"


def _option(name: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=help, metavar=metavar, rich_help_panel=PANEL, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardFlags:
    """Keys, names, origins, TLS."""

    api_key: Annotated[
        str | None,
        _option(
            "--api-key",
            "Key that clients must send; better given in the environment variable WEFT_API_KEY, or in a file.",
            "KEY",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        _option("--api-key-file", "File of clients' keys, one a line, perhaps with a name; read again on a change.", "FILE"),
    ] = None  # fmt: skip
    admin_key: Annotated[
        str | None, _option("--admin-key", "Key for routes that change the server; better in a file.", "KEY")
    ] = None
    admin_key_file: Annotated[
        Path | None, _option("--admin-key-file", "File of such keys, as --api-key-file.", "FILE")
    ] = None
    no_auth: Annotated[
        bool, _option("--no-auth", "Serve an address that others can reach without asking for a key.")
    ] = False
    allowed_host: Annotated[
        list[str] | None,
        _option("--allowed-host", "Name under which the server is asked, beside localhost; more by repeating it.", "NAME"),
    ] = None  # fmt: skip
    cors_origin: Annotated[
        list[str] | None,
        _option("--cors-origin", "Origin of pages elsewhere that may use the server; more by repeating it.", "ORIGIN"),
    ] = None
    share_prefixes: Annotated[
        bool, _option("--share-prefixes", "Let requests with different keys share cached prefixes.")
    ] = False
    tls_cert: Annotated[Path | None, _option("--tls-cert", "Certificate (chain) in PEM form, for https.", "FILE")] = (
        None
    )
    tls_key: Annotated[Path | None, _option("--tls-key", "Its key.", "FILE")] = None
    root_path: Annotated[
        str | None, _option("--root-path", "Path below which a proxy shows the server, e.g. [b]/llm[/b].", "PATH")
    ] = None
    max_connections: Annotated[
        int,
        typer.Option(
            "--max-connections",
            help="Connections at once; beyond them the one that is idle longest goes.",
            metavar="N",
            min=1,
            rich_help_panel=PANEL,
        ),
    ] = 4096

    @property
    def clients(self) -> list[str]:
        """Keys that were given outside files."""
        key = self.api_key or os.environ.get("WEFT_API_KEY")
        return [key] if key else []

    @property
    def tls(self) -> tuple[Path, Path] | None:
        return None if self.tls_cert is None or self.tls_key is None else (self.tls_cert, self.tls_key)

    @property
    def patience(self) -> Patience:
        from weft.front.connection import Patience

        return Patience(most=self.max_connections)

    def guard(self, host: str) -> Guard:
        """What is asked of requests to a server that listens on `host`.  Raises ConfigError, before anything is loaded."""
        from weft.front.guard import Guard
        from weft.front.keys import Keyring
        from weft.front.server import check_tls

        for flag, key in (("--api-key", self.api_key), ("--admin-key", self.admin_key)):
            if key is not None and not key.strip():
                # Of a variable that is not set, say: who gives a key means to ask for it.
                raise ConfigError(f"{flag} is empty; give a key, or leave the flag out")
        keys = Keyring(
            self.clients,
            [self.admin_key] if self.admin_key else [],
            client_file=self.api_key_file,
            admin_file=self.admin_key_file,
        )
        if self.no_auth and keys.asks_clients:
            raise ConfigError("--no-auth says that no key is asked for, and there is one; leave one of them out")
        if not (keys.asks_clients or self.no_auth or is_loopback(host)):
            raise ConfigError(
                f"--host {host} can be reached by others, and no key is asked for: give one with --api-key-file or in "
                "WEFT_API_KEY, or say --no-auth where everybody who reaches it may use it"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together; give both files, or neither")
        if self.tls is not None:
            check_tls(*self.tls)
        own = [] if not host or _is_address(host) else [host]
        return Guard(
            keys=keys,
            hosts=[*own, *(self.allowed_host or ())],
            origins=self.cors_origin or (),
            share_prefixes=self.share_prefixes,
            root_path=(self.root_path or "").rstrip("/"),
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
