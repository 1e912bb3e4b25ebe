"""Slot `place`: which devices do what, and how a request goes from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from weft.slots.route import ReplicaView

Role = Literal["encode", "prefill", "decode", "mixed"]
Phase = Literal["prefill", "decode"]


class Handed(NamedTuple):
    """A request whose prompt is computed.  prompt, answer: tokens.  room: entries that the blocks of a replica hold.

    Nobody knows how long an answer will be; it is there for who predicts it, and says how far the prediction is off.
    """

    id: int
    prompt: int
    answer: int
    room: int


class Place(Protocol):
    """Slot `place`, where replicas have roles.  Pure.

    roles    of so many replicas, one each
    enter    the index, among all, of the replica that computes a prompt; a mixed one keeps the request to its end
    handoff  the index of the replica that goes on with it
    review   the roles from now on, asked before each of these where `flips` says so; who has another role than before ends what
             it has in hand, and is given work of the new one.  A replica that encodes has the rows of its images in `pending`

    exposed: share of the time that a hand-over of KV takes which is not hidden behind computing the prompt.
    flips: whether roles change.

    One with a method `ended(id)` is told of answers that end, and of requests that the replica of their `handoff` refuses.
    """

    @property
    def exposed(self) -> float: ...
    @property
    def flips(self) -> bool: ...
    def roles(self, replicas: int) -> Sequence[Role]: ...
    def enter(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int: ...
    def handoff(self, request: Handed, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int: ...
    def review(self, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> Sequence[Role]: ...


class Couple(Protocol):
    """Two workers as a placement sees them: one computes prompts, the other one answers.

    busy     whether a worker has something to do now.  work: a worker by its phase
    predict  seconds that the last step of a phase would take with this share of the arithmetic, beside the other one or alone
    ttft_s, tpot_s: means of late, with the weight of each observation falling by a tenth with the next
    """

    @property
    def ttft_s(self) -> float: ...
    @property
    def tpot_s(self) -> float: ...
    def work(self, phase: Phase) -> ReplicaView: ...
    def busy(self, phase: Phase) -> bool: ...
    def predict(self, phase: Phase, compute: float, *, alone: bool = False) -> float: ...


class Share(NamedTuple):
    """What a step of one phase has.  compute: share of a device's arithmetic.  ways: devices that split the sequences evenly."""

    compute: float = 1.0
    ways: int = 1


class Beside(Protocol):
    """Slot `place`, where the phases are two workers beside each other, which pass KV on without moving it.  Pure.

    enter  the index of the couple that serves a request to its end
    share  what the next step of a phase has; asked when it begins

    couple: devices of one couple: 1 that both workers share, or 2 of which each has one.
    exposed: as of a `Place`; nothing is moved where a couple has one device.
    """

    @property
    def couple(self) -> int: ...
    @property
    def exposed(self) -> float: ...
    def enter(self, prompt: int, couples: Sequence[Couple], now: float) -> int: ...
    def share(self, phase: Phase, couple: Couple, index: int, now: float) -> Share: ...


class Twofold(Beside, Protocol):
    """One of whose couples each has two devices, which both have all KV while there is room.

    alone  of sequences that hold so many `blocks`, who came first before the others, those whose KV is on one device only, by
           index; `room`: blocks of one device
    """

    def alone(self, blocks: Sequence[int], room: int) -> Sequence[int]: ...
