"""The bytes below the KV pool: records in memory or in a file, a buffer in front of the file, and a thread that fetches ahead.

    record   [ticket, 8 bytes little-endian][what KVPool's SAVE gave: checksum and body]

A record is found by its ticket's slot and believed only if it bears that very ticket; its body is checked by its BLAKE2 sum
before it reaches the pool.  A record that cannot be written, or is not what it should be, is *lost*: the plan's result says so,
and the engine computes what it held.  A file has no name (it is unlinked as it is made, mode 0600), so nobody else opens it, none
is ever found and trusted, and nothing is left behind, however the process ends.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from weft.core.tiers import TICKET_BYTES, record_bytes, records
from weft.errors import ConfigError, TransferError
from weft.exec.kvpool import KVPool
from weft.slots import Offload, Tier
from weft.types import KVOp, KVOpKind

log = logging.getLogger("weft.tiers")
HEAD_BYTES = 4096
"""In front of the records that engines share."""


class Place(Protocol):
    """A row of records.  Both methods raise OSError."""

    def write(self, slot: int, record: bytes) -> None: ...
    def read(self, slot: int) -> bytes: ...
    def close(self) -> None: ...


class Memory:
    """Records in anonymous mapped memory: pages cost nothing until something is saved in them."""

    def __init__(self, count: int, size: int) -> None:
        self._size = size
        self._region = mmap.mmap(-1, count * size)

    def write(self, slot: int, record: bytes) -> None:
        self._region[slot * self._size : (slot + 1) * self._size] = record

    def read(self, slot: int) -> bytes:
        return self._region[slot * self._size : (slot + 1) * self._size]

    def close(self) -> None:
        self._region.close()


class File:
    """Records in a file without a name.  It grows with what is saved; a full disk makes a save fail and nothing else.

    Raises ConfigError where no file can be made in the folder, which is created (mode 0700) if it is not there.
    """

    def __init__(self, count: int, size: int, folder: str | None) -> None:
        self._size = size
        place = Path(folder or tempfile.gettempdir()).expanduser()
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(prefix="weft-kv-", dir=place, buffering=0)  # noqa: SIM115
            free = shutil.disk_usage(place).free
        except OSError as error:
            raise ConfigError(
                f"kv.offload: no file can be made in {str(place)!r} ({error.strerror or error}); name a folder that this process "
                "may write in"
            ) from error
        if free < count * size:
            log.warning(
                "kv.offload may store %d bytes in %s, which has %d left: once it is full, blocks are dropped",
                count * size, place, free,
            )  # fmt: skip

    def write(self, slot: int, record: bytes) -> None:
        view, at = memoryview(record), slot * self._size
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done

    def read(self, slot: int) -> bytes:
        return os.pread(self._file.fileno(), self._size, slot * self._size)

    def close(self) -> None:
        self._file.close()


class Shared:
    """Records in memory that engines share, behind a page that counts the engines which have written there (`life`)."""

    def __init__(self, count: int, size: int, fd: int) -> None:
        self._size = size
        try:
            self._region = mmap.mmap(fd, HEAD_BYTES + count * size)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the memory shared with other engines cannot be mapped ({error})") from error

    def write(self, slot: int, record: bytes) -> None:
        at = HEAD_BYTES + slot * self._size
        self._region[at : at + TICKET_BYTES] = bytes(TICKET_BYTES)  # half a record is nobody's
        self._region[at + TICKET_BYTES : at + self._size] = record[TICKET_BYTES:]
        self._region[at : at + TICKET_BYTES] = record[:TICKET_BYTES]

    def read(self, slot: int) -> bytes:
        at = HEAD_BYTES + slot * self._size
        return self._region[at : at + self._size]

    def close(self) -> None:
        self._region.close()


def life(fd: int) -> int:
    """How many engines have written to this shared memory before; one more has from now on."""
    before = int.from_bytes(os.pread(fd, 8, 0), "little")
    os.pwrite(fd, (before + 1).to_bytes(8, "little"), 0)
    return before


class Buffer:
    """Records of a file in memory, by ticket: those saved last, and those that a thread reads ahead; the oldest go first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._fetched = 0
        self._records: OrderedDict[int, bytes] = OrderedDict()
        self._wanted: list[tuple[int, int]] = []
        self._reading = False
        self._turn = threading.Condition()
        self._closed = False

    def put(self, ticket: int, record: bytes) -> None:
        if not self.most:
            return
        with self._turn:
            self._records[ticket] = record
            self._records.move_to_end(ticket)
            if len(self._records) > self.most:
                self._records.popitem(last=False)

    def take(self, ticket: int) -> bytes | None:
        with self._turn:
            return self._records.pop(ticket, None)

    def want(self, wanted: Sequence[tuple[int, int]]) -> None:
        """(ticket, slot) of what is to be read ahead, instead of what was to be read before; the first comes first."""
        with self._turn:
            for ticket, _ in reversed(wanted):
                if ticket in self._records:
                    self._records.move_to_end(ticket)
            self._wanted = [(t, s) for t, s in reversed(wanted[: self.most]) if t not in self._records]
            self._turn.notify_all()

    def news(self) -> int:
        """Records read ahead since this was last asked."""
        with self._turn:
            fetched, self._fetched = self._fetched, 0
        return fetched

    def fill(self, file: File) -> None:
        """The thread: read what is wanted, until closed.  What cannot be read now is left to the load, which says so."""
        while True:
            with self._turn:
                while not self._wanted and not self._closed:
                    self._turn.wait()
                if self._closed:
                    return
                ticket, slot = self._wanted.pop()
                self._reading = True
            try:
                record = file.read(slot)
            except (OSError, ValueError):
                record = b""
            with self._turn:
                if record[:TICKET_BYTES] == _stamp(ticket):
                    self.put(ticket, record)
                    self._fetched += 1
                self._reading = False
                self._turn.notify_all()

    def idle(self, most_s: float) -> bool:
        """Wait until everything that was wanted is there, at most so many seconds; whether it is."""
        with self._turn:
            return self._turn.wait_for(lambda: not self._wanted and not self._reading, most_s)

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self._records.clear()
            self._turn.notify_all()


class TierStore:
    """Carries out SAVE and LOAD for a pool, as the slot `kv.offload` has its tiers.  Close it, or let it go."""

    def __init__(self, offload: Offload, pool: KVPool) -> None:
        self.offload, self.pool = offload, pool
        self.size = record_bytes(pool.groups, pool.block_bytes)
        self.capacity = records(offload.tiers, self.size)
        self.total = sum(self.capacity)
        self.places: list[Place] = []
        self._buffers: list[Buffer | None] = []
        threads: list[threading.Thread] = []
        for tier, count in zip(offload.tiers, self.capacity, strict=True):
            place, buffer, thread = _open(tier, count, self.size)
            self.places.append(place)
            self._buffers.append(buffer)
            threads.extend(thread)
        count = int(getattr(offload, "threads", 0))
        self._workers = ThreadPoolExecutor(count, thread_name_prefix="weft-tier") if count else None
        self._begun: list[tuple[KVOp, Future[list[tuple[int, int]]]]] = []
        self._close = weakref.finalize(self, _close, self.places, self._buffers, threads, self._workers)

    def carry_out(self, op: KVOp) -> list[tuple[int, int]]:
        """Carry out one SAVE or LOAD; gives (ticket, block) of what was lost."""
        return self._counted(op, self._moved(op))

    def begin(self, op: KVOp) -> None:
        """Carry out one SAVE or LOAD on a thread, until `end`."""
        assert self._workers is not None
        self._begun.append((op, self._workers.submit(self._moved, op)))

    def end(self) -> list[tuple[int, int]]:
        """Wait for all that was begun; gives (ticket, block) of what was lost."""
        begun, self._begun = self._begun, []
        return [lost for op, future in begun for lost in self._counted(op, future.result())]

    def _moved(self, op: KVOp) -> list[tuple[int, int]]:
        if op.kind is KVOpKind.LOAD:
            pairs = zip(op.argument, op.target, strict=True)
            return [(t, b) for t, b in pairs if not self._load(op.group, t, b)]
        payloads = self.pool.save_each(op.source)
        return [
            (t, b) for t, b, payload in zip(op.argument, op.source, payloads, strict=True) if not self._save(t, payload)
        ]

    def _counted(self, op: KVOp, lost: list[tuple[int, int]]) -> list[tuple[int, int]]:
        blocks = op.source if op.kind is KVOpKind.SAVE else op.target
        moved = len(blocks) - len(lost)
        self._count("blocks_saved" if op.kind is KVOpKind.SAVE else "blocks_loaded", moved)
        self._count("bytes_moved", moved * self.size)
        self._count("saves_failed" if op.kind is KVOpKind.SAVE else "loads_failed", len(lost))
        return lost

    def fetch(self, tickets: Sequence[int]) -> None:
        """Bring stored blocks nearer, while steps go on."""
        for tier, buffer in enumerate(self._buffers):
            if buffer is None:
                continue
            if tickets:
                mine = [(t, slot) for t in tickets for at, slot in [self._where(t)] if at == tier]
                buffer.want(mine)
            self._count("prefetched", buffer.news())

    @property
    def beside(self) -> bool:
        """Whether there are threads that move blocks while a step computes."""
        return self._workers is not None

    def close(self) -> None:
        """Forget everything that is stored; twice does no harm."""
        self._close()

    # ------------------------------------------------------------------ inside

    def _save(self, ticket: int, payload: bytes) -> bool:
        record = _stamp(ticket) + payload
        tier, slot = self._where(ticket)
        try:
            self.places[tier].write(slot, record)
        except OSError as error:
            log.warning("kv.offload: a block could not be saved (%s); it is dropped", error.strerror or error)
            return False
        buffer = self._buffers[tier]
        if buffer is not None:
            buffer.put(ticket, record)
        return True

    def _load(self, group: int, ticket: int, block: int) -> bool:
        tier, slot = self._where(ticket)
        buffer = self._buffers[tier]
        record = None if buffer is None else buffer.take(ticket)
        try:
            if record is None:
                record = self.places[tier].read(slot)
            if record[:TICKET_BYTES] != _stamp(ticket):
                raise TransferError("the record holds another block, or none")
            self.pool.carry_out(KVOp(KVOpKind.LOAD, group, (), (block,)), record[TICKET_BYTES:])
        except (OSError, TransferError) as error:
            log.warning("kv.offload: a stored block could not be loaded (%s); it is computed again", error)
            return False
        return True

    def _where(self, ticket: int) -> tuple[int, int]:
        """(tier, slot within it) of a ticket."""
        slot, tier = ticket % self.total, 0
        while slot >= self.capacity[tier]:
            slot -= self.capacity[tier]
            tier += 1
        return tier, slot

    def _count(self, act: str, number: int) -> None:
        if number:
            self.offload.count(act, number)


def _stamp(ticket: int) -> bytes:
    return ticket.to_bytes(TICKET_BYTES, "little")


def _open(tier: Tier, count: int, size: int) -> tuple[Place, Buffer | None, list[threading.Thread]]:
    """A tier's place, and for a file its buffer and the thread that fills it."""
    if tier.kind == "memory":
        return Memory(count, size), None, []
    if tier.kind == "shared":
        return Shared(count, size, tier.fd), None, []
    file, buffer = File(count, size, tier.folder), Buffer(tier.buffer_bytes // size)
    if not buffer.most:
        return file, buffer, []
    thread = threading.Thread(target=buffer.fill, args=(file,), name="weft-fetch", daemon=True)
    thread.start()
    return file, buffer, [thread]


def _close(
    places: Sequence[Place], buffers: Sequence[Buffer | None], threads: Sequence[threading.Thread],
    workers: ThreadPoolExecutor | None,
) -> None:  # fmt: skip
    if workers is not None:
        workers.shutdown()
    for buffer in buffers:
        if buffer is not None:
            buffer.close()
    for thread in threads:
        thread.join(timeout=10)
    for place in places:
        place.close()
