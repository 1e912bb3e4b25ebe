"""Who may come in: keys of clients and of administrators, given at the start or read from files that may change meanwhile.

A file has one key on a line, and behind it, if it has one, the name of whoever holds it; blank lines and lines that begin with
`#` mean nothing.  Two keys of one name are one tenant, so a key can be changed for another and what was stored under it stays.
Only digests are kept, all of one length, and every one is compared, so that time tells nothing about a key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.errors import ConfigError

log = logging.getLogger("weft.front")

LOOK_S = 1.0
"""How often a file is looked at for a change, at most."""
MOST_KEYS = 10_000
MAX_FILE_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_KEY = re.compile(r"[\x21-\x7e]{1,4096}")


@dataclass(frozen=True, slots=True)
class Known:
    """A key that is known.

    digest: of the key.  tenant: what its holder's things are stored under.  owner: under which name prefixes are shared and
    schedulers count: the name of a key that has one, else the tenant.  admin: whether it may change the server.
    """

    digest: bytes
    tenant: str
    owner: str
    admin: bool


def known(key: str, name: str = "", *, admin: bool = False) -> Known:
    """Raises ConfigError for what can't be a key, or a name; never with the key in its text."""
    if not _KEY.fullmatch(key):
        raise ConfigError("a key is 1 to 4096 printable ASCII characters without a space; choose another")
    if name and (not _NAME.fullmatch(name) or _DIGEST.fullmatch(name)):
        raise ConfigError(f"the name {name[:60]!r} of a key is not one: letters, digits, dots and dashes, at most 64")
    what, kind = (name, b"weft.named") if name else (key, b"weft.tenant")
    tenant = hashlib.blake2b(what.encode(), digest_size=16, person=kind).hexdigest()
    return Known(_digest(key.encode()), tenant, name or tenant, admin)


def read_keys(path: Path, *, admin: bool = False) -> list[Known]:
    """The keys of a file.  Raises ConfigError, which names lines by their number and quotes none."""
    try:
        with open(path, "rb") as file:
            mode, text = stat.S_IMODE(path.stat().st_mode), file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read ({error.strerror or error})") from None
    check_mode(path, mode)
    found: list[Known] = []
    for number, line in enumerate(text.decode("latin-1").splitlines(), 1):
        words = line.split()
        if not words or line.lstrip().startswith("#"):
            continue
        if len(words) > 2:
            raise ConfigError(f"{path}, line {number}: expected a key, and perhaps a name behind it")
        try:
            found.append(known(*words, admin=admin))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    if not found or len(found) > MOST_KEYS or len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {len(found)} keys; expected 1 to {MOST_KEYS}, one on a line")
    return found


def check_mode(path: Path, mode: int | None = None) -> None:
    """Raises ConfigError where others may read a file with secrets, or its group may write it."""
    mode = stat.S_IMODE(path.stat().st_mode) if mode is None else mode
    if mode & 0o027:
        raise ConfigError(
            f"{path} holds keys and has mode {mode:04o}: others may read it, or its group change it; chmod 600 {path}"
        )


class Keyring:
    """Keys of clients and administrators.  clients, admins: given ones; the files' come beside them.

    A file that has changed is read again, within a second, or at once after `reread`.  One that can't be read any more leaves the
    keys as they were, and the log says so.  Raises ConfigError for what is wrong at the beginning.
    """

    def __init__(
        self,
        clients: Iterable[str] = (),
        admins: Iterable[str] = (),
        *,
        client_file: Path | None = None,
        admin_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = [*map(known, clients), *(known(key, admin=True) for key in admins)]
        self._files = [(file, admin) for file, admin in ((client_file, False), (admin_file, True)) if file is not None]
        self._clock, self._looked = clock, clock()
        self._seen = self._stamp()
        self._stale = False
        self._all = self._read()

    @property
    def from_files(self) -> bool:
        return bool(self._files)

    @property
    def asks_clients(self) -> bool:
        """Whether the ordinary routes need a key."""
        return any(not one.admin for one in self._all)

    @property
    def asks_admins(self) -> bool:
        """Whether there is an administrator's key."""
        return any(one.admin for one in self._all)

    def __bool__(self) -> bool:
        return bool(self._all)

    def reread(self) -> None:
        """Look at the files at the next request, whether they seem to have changed or not.  For a signal's handler."""
        self._stale = True

    def find(self, key: bytes) -> Known | None:
        """Whose key this is.  Every key is compared, whichever is right."""
        self._refresh()
        given, found = _digest(key), None
        for one in self._all:
            if hmac.compare_digest(given, one.digest):
                found = one if found is None or one.admin else found
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if not self._files or (now - self._looked < LOOK_S and not self._stale):
            return
        self._looked = now
        stamp = self._stamp()
        if stamp == self._seen and not self._stale:
            return
        self._seen, self._stale = stamp, False
        try:
            self._all = self._read()
            log.warning("the keys were read again: there are %d", len(self._all))
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)

    def _read(self) -> list[Known]:
        return [*self._given, *(key for file, admin in self._files for key in read_keys(file, admin=admin))]

    def _stamp(self) -> list[tuple[int, ...]]:
        return [_stat(file) for file, _ in self._files]


def keyring(api_key: str | Sequence[str] | None) -> Keyring:
    """Of clients' keys alone."""
    return Keyring([api_key] if isinstance(api_key, str) else api_key or ())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _stat(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
