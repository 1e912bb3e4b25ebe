"""The slots: where a technique can be put, and what it must answer there.

A slot's techniques are the modules of its folder; file name = registered name.  `null` is the technique that a stack has
where it names none; slots without one are empty by default.  Protocols have at most five methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from weft.slots.constrain import Constrain as Constrain
from weft.slots.constrain import GrammarPath as GrammarPath
from weft.slots.constrain import Vocabulary as Vocabulary
from weft.slots.constrain import Words as Words
from weft.slots.cost import Cost as Cost
from weft.slots.guesses import Accept as Accept
from weft.slots.guesses import Ask as Ask
from weft.slots.guesses import Draft as Draft
from weft.slots.guesses import Features as Features
from weft.slots.guesses import FirstLayers as FirstLayers
from weft.slots.guesses import Forward as Forward
from weft.slots.guesses import Guesses as Guesses
from weft.slots.guesses import Ranked as Ranked
from weft.slots.guesses import Target as Target
from weft.slots.guesses import Translation as Translation
from weft.slots.guesses import Verify as Verify
from weft.slots.guesses import candidates as candidates
from weft.slots.guesses import heard as heard
from weft.slots.guesses import line as line
from weft.slots.kv import Compress as Compress
from weft.slots.kv import Evict as Evict
from weft.slots.kv import Kept as Kept
from weft.slots.kv import Offload as Offload
from weft.slots.kv import Store as Store
from weft.slots.kv import Tier as Tier
from weft.slots.route import ReplicaView as ReplicaView
from weft.slots.route import Route as Route
from weft.types import Action, Finished, SamplingSpec, Tokens


@dataclass(frozen=True, slots=True)
class Slot:
    """name as in 'kv.evict=lru'; question: what its techniques decide; null: the default technique's name, if any.

    asked: the technique of a request that asks for what only this slot gives, where its stack leaves the slot open.
    inside: whether its techniques are part of an engine; those of the others decide about engines, or price their steps.
    """

    name: str
    question: str
    null: str | None = None
    asked: str | None = None
    inside: bool = True

    @property
    def package(self) -> str:
        return "weft." + self.name


SLOTS: dict[str, Slot] = {
    s.name: s
    for s in (
        Slot("schedule", "who enters, who advances, how far, who yields", "fcfs"),
        Slot("kv.evict", "which cached block goes; pins and leases", "lru"),
        Slot("kv.compress", "how many entries stay; which, or merged into what"),
        Slot("kv.store", "number format of stored KV"),
        Slot("kv.reuse", "KV that can stand in for computing"),
        Slot("kv.offload", "which tier holds a block, when to fetch"),
        Slot("attention", "how attention is computed"),
        Slot("draft", "guesses ahead", "none"),
        Slot("accept", "which guesses stand", "race"),
        Slot("weights", "how weights are stored: quantized, pruned, tied"),
        Slot("adapt", "per-request deltas on weights"),
        Slot("skip", "which layers, halves of layers or neurons a row takes"),
        Slot("resident", "which weights are in memory, which are fetched"),
        Slot("sample", "logits (of linked rows) to law"),
        Slot("constrain", "which tokens a grammar allows, per path of a tree", asked="llguidance"),
        Slot("search", "programs over many generations"),
        Slot("context", "what text or KV enters the prompt"),
        Slot("route", "which model or replica serves", inside=False),
        Slot("place", "roles, devices, hand-offs", inside=False),
        Slot("cost", "how long a plan takes on given hardware", inside=False),
    )
}


class RequestView(Protocol):
    """What a scheduling policy may read of a request.  rid: names it for as long as it lives."""

    @property
    def rid(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def decoding(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def output(self) -> Sequence[int]: ...
    @property
    def sampling(self) -> SamplingSpec: ...
    @property
    def tenant(self) -> bytes: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def ttft_s(self) -> float | None: ...
    @property
    def partial(self) -> tuple[int, int, int] | None: ...
    def heads(self, block: int) -> Sequence[bytes]:
        """Names of the prompt's beginnings of `block`, 2 * `block`, ... tokens: equal ones are equal tokens of one tenant."""


@dataclass(slots=True)
class StepView:
    """The step as planned so far.  rows_left: budget.  prompt_rows, decode_rows: planned.  layers: of the target model."""

    now: float
    rows_left: int
    layers: int
    running: int
    waiting: int
    prompt_rows: int = 0
    decode_rows: int = 0
    free_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """What a policy's authors say of it, and what of a simulation's result would show it.

    metric: a key of the result, with dots.  factor: it holds where the ratio to the policy `against` is at most ("less"), or at
    least ("more"), this; `against` is empty where the metric is a share itself.  case: the load on which it is judged
    (`bench/sim/policies.py`).  devices: for each of which the metric is counted, where `against` has one.
    """

    text: str
    metric: str
    factor: float
    better: Literal["less", "more"]
    against: str = "fcfs"
    case: str = "overload"
    devices: int = 1


@dataclass(frozen=True, slots=True)
class Quota:
    """rows: how many rows may advance at most.  layers: how many layers they pass in this step, None for all."""

    rows: int
    layers: int | None = None


class Schedule(Protocol):
    """Slot `schedule`.  Pure: reads requests and the step, changes nothing of the engine's.

    order   the key by which requests are considered, smaller first, running and waiting ones alike
    admit   whether a waiting request may enter now; False ends admission for this step
    quota   how far one request may advance now
    victim  who yields its blocks to `needy`: one of `candidates`, or `needy` itself, or None (then `needy` waits)

    static: the order of a waiting request never changes while it waits (the queue is then a heap and costs nothing to keep).
    Where it does change, each step asks for the order of all who wait, but for a schedule with `queues = True`, a `Queueing`.
    layered: quota may ask for part of the layers.

    A class variable `steady = True` promises a simulator that it may leave out asking: where only decodes run, each gets its
    row and their order stays, and whom `admit` refuses it refuses until a sequence ends or another request comes.
    One with an attribute `refuses` that is true is a `Refusing`.
    Another, `switches = True`: where a waiting request finds no place, `victim` is asked for it, too (`needy` itself: it waits),
    and what yields is stored below the pool at once.
    """

    @property
    def static(self) -> bool: ...
    @property
    def layered(self) -> bool: ...
    def order(self, request: RequestView, now: float) -> tuple[float, ...]: ...
    def admit(self, request: RequestView, step: StepView) -> bool: ...
    def quota(self, request: RequestView, step: StepView) -> Quota: ...
    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None: ...


class Queueing(Protocol):
    """A schedule that keeps those who wait itself, since their order changes, so that a step need not ask about all of them.

    put    a request waits from now on; also one that waited before and ran
    drop   it does not wait any more: it runs, or has left
    first  who is next: of all who wait the one of the least (`order`, `rid`) now
    heads  the first `most` as they would come one after the other, if nothing else happened: what lies below the pool is brought
           nearer for them
    """

    def put(self, request: RequestView, now: float) -> None: ...
    def drop(self, request: RequestView) -> None: ...
    def first(self, now: float) -> RequestView | None: ...
    def heads(self, most: int, now: float) -> Sequence[RequestView]: ...


class Refusing(Protocol):
    """A schedule that says of a request that it can't be in time any more; it is refused at once then, and never computed.

    due     when its first token is wanted, which stays.  Who waits is refused as soon as that can't be kept any more even if it
            is next (`core.lateness` says what it takes then)

    It is asked of requests that have a deadline (`ttft_s` is not None: seconds from `arrival`, 0.0 for the schedule's own), and
    those are refused that have had no turn yet: who has begun never is.

    refuses: whether it does; an engine looks once.
    """

    @property
    def refuses(self) -> bool: ...
    def due(self, request: RequestView) -> float: ...


class Attention(Protocol):
    """Slot `attention`: how attention is computed for the sequences of a batch whose stack has this technique.

    tile    rows of a prompt that are computed together, at absolute multiples of it (1: any).  Such a tile is never split between
            steps, a prefix hit ends at a multiple, and other prompts are given whole tiles only, so what is computed depends on
            the prompt alone.  A prompt's last row is a tile of its own, which may stand in a step with the tile that it ends
    plan    once a step for each KV group: what all its layers share
    run     one layer: attention of the call's rows, written into the output

    call is a `weft.ops.attention_call.AttentionCall`: what there is to compute, and the operations that compute it.
    """

    @property
    def tile(self) -> int: ...
    def plan(self, call: Any) -> Any: ...
    def run(self, call: Any, plan: Any) -> None: ...


class Sample(Protocol):
    """Slot `sample`: one law out of the logits of linked rows.

    warp    [1 + companions, vocab] float32, the request's own row first, to [vocab] float32.  What follows (bias, penalties,
            temperature, truncation, the race) works on the result, and log-probabilities are reported of it

    companions: contexts beside its own that a request needs; with none, `warp` has one row.
    """

    @property
    def companions(self) -> int: ...
    def warp(self, logits: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Site:
    """Where a checkpoint's weight, of `inputs` values to `outputs`, lies in a decoder: output columns [first, first + outputs) of
    the product with the fused weights `product` of `layer` (a weight id)."""

    layer: int
    product: str
    first: int
    inputs: int
    outputs: int


PRODUCTS = ("qkv", "out", "gate_up", "down")
"""The products that a delta may change: queries, keys and values; attention's output; gate and up; the MLP's output."""


class Adapter(Protocol):
    """A delta on weights that is loaded under a name.

    digest: hash of its contents.  tensors: by (layer, product), what the technique's `read` made, on the decoder's device.
    multiply: [T, K] times [N, K] transposed, [T, N], each row by itself where the engine computes so.
    """

    @property
    def digest(self) -> bytes: ...
    @property
    def tensors(self) -> Mapping[tuple[int, str], tuple[Any, ...]]: ...
    def multiply(self, x: Any, weight: Any) -> Any: ...


class Adapt(Protocol):
    """Slot `adapt`: per-request deltas on weights.

    read    (of the class) the tensors of each product, by (layer, product), from an adapter's config and tensors (float32), given
            where the checkpoint's weights lie; ConfigError says what is wrong with the files
    attach  take hold of the adapter that the arguments name, by `adapters.find(name)`, which raises ConfigError with the names
            there are; called once, before any request has the instance
    apply   what is added to the output of the product with the weights called `product` of `layer`: x [T, K] is its input, of
            sequences with this adapter alone; returns [T, N], or None where nothing changes

    adapter: what it took hold of, sequences with one adapter being computed together.  Its `digest` is the instance's, too.
    """

    @property
    def adapter(self) -> Adapter | None: ...
    @classmethod
    def read(cls, config: Mapping[str, Any], tensors: Mapping[str, Any], sites: Mapping[str, Site]) -> Any: ...
    def attach(self, adapters: Any) -> None: ...
    def apply(self, layer: int, product: str, x: Any) -> Any: ...


class Leaving(Protocol):
    """Rows that may leave after a layer.  before, after: [T, width], the hidden states that went into and came out of it.

    logits(): float32 [T, vocab] that the model's head gives for `after`; costs a product with the head.
    """

    @property
    def before(self) -> Any: ...
    @property
    def after(self) -> Any: ...
    def logits(self) -> Any: ...


class Skip(Protocol):
    """Slot `skip`: which layers a row takes.

    exits   after how many layers rows may leave, ascending, each at least 2 and below `layers` (pure)
    rows    which rows leave there, bool [T].  A row's answer may depend on that row alone.  Keys and values of the layers that
            a row does not take are made from the hidden state with which it left, and so are its logits
    """

    def exits(self, layers: int) -> Sequence[int]: ...
    def rows(self, view: Leaving) -> Any: ...


@dataclass(frozen=True, slots=True)
class SearchView:
    """A request as a search sees it.  n: outputs that the client gets.  prompt: its tokens.  room: output tokens that one
    sequence can have.  sampling: the client's law."""

    n: int
    prompt: int
    room: int
    sampling: SamplingSpec


class Program(Protocol):
    """One request's search.  Its state is a function of the events alone, so a journal of them, or of the request, restores it.

    step    what became of its sequences in one step of the engine (their own indices), to what is to be done now, in this order

    sequences: how many start from the prompt, each under a seed of its own.  sampling: their law.
    """

    @property
    def sequences(self) -> int: ...
    @property
    def sampling(self) -> SamplingSpec: ...
    def step(self, events: Sequence[Tokens | Finished]) -> Sequence[Action]: ...


class Search(Protocol):
    """Slot `search`: a program over many generations of one prompt.  Its sequences are not told to the client; what the program
    tells is.

    begin   the program of a request.  Raises RequestError for a request that it can't serve
    """

    def begin(self, request: SearchView) -> Program: ...
