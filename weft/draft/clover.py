"""Clover: heads on the target's own hidden state, run one after the other, each of which reads the guess before it.

Paper    Xiao et al., Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge, arXiv:2405.00263
         (003-61); online: Liu et al., Online Speculative Decoding, arXiv:2310.07177 (004-101)
Rule     N(x) = x / rms(x).  B(x; k, v) = y + D (silu(G N(y)) * U N(y)) with y = x + O a, a = attention of Q N(x) over k, v, to
         whose scores a number for each distance is added.  u_j = I h_j of the target's last `window` hidden states h; augmenting
         block: s_0 = B(u_t; K N(u), V N(u)).  Head i, of the tokens x_1 (the newest), x_2, ... x_i, whose embeddings are e:
         s_i = B'(s_(i-1); K' N(T e), V' N(T e)); its law is the softmax of the target's own head on E s_i, and x_(i+1) its draw.
         online: of each verified proposal what the heads started from, the tokens that stood and the target's laws behind them
         are kept, the newest 256 of a tenant.  After `online` of them one step of Adam on 16 lowers the distance of total
         variation between those laws and the heads', of the weights behind s_0, which serve while they come nearer, at places
         that they have not learnt from, than those that were given
Shapes   h [window, width], s [inner], E s [width]; laws [vocab] by the target's head, one row for each sequence and head
Units    guesses: tokens; online: proposals
Cost     for each guess a product with the target's head and some 100,000 to 400,000 multiplications; nothing of a second model.
         2 * window * inner floats for each sequence.  online: three times the weights, and the lessons, for each of 8 tenants; a
         step takes 5 to 7 ms on the bundled model, one in a call at most
Pays     for single sequences of a model beside whose step a head costs little: on the 0.5B shape, one
         sequence, 1.73 times as fast as no draft with 4 guesses at temperature 0.8 and 1.83 greedily, with 0.07 % of the
         target's parameters; the draft model that ships, with 0.74 %, brings 1.78 and 2.29 there.  With four sequences 1.20 and
         1.29, and 2 guesses bring more (1.32 and 1.46).  Not on the bundled model itself, whose
         step takes no longer than a few heads.  online: where requests are unlike what the heads were taught with: of guesses
         of heads that had seen no chat, 0.09 stood on questions of mathematics, and 0.27 after 100 requests; on prose, which
         they knew, 0.48 before and after.  The draft takes 2.6 to 3.8 times as long then, which 48 requests on the 0.5B shape
         did not bring in again
Differs  all heads share their weights, where the paper's have their own: a fourth of the parameters, and any number of guesses.
         The augmenting block sees `window` states, the paper's all of them: there is no KV of its own to keep.  A chain is
         guessed, where the paper's heads grow a tree.  Heads learn the target's whole law, not its tokens alone.
         online: steps are taken between two steps of the engine, not where the machine has time to spare; tenants learn apart, as
         what one said would show in the pace of another's answers, and who was forgotten begins anew.  Weights never leave memory
Raises   ValueError unless 1 <= guesses <= 8 and online >= 0; ConfigError for weights that cannot be read, or are of another model
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weft.draft._common import KEPT, LESSONS, TOKENS, Lesson, Pupil, logits_of, proposals
from weft.draft._weights import Kind, Shapes, read_shapes, read_tensors
from weft.registry import register
from weft.slots import Ask, Features, Guesses
from weft.traits import Effect, Trait, Traits

if TYPE_CHECKING:
    from torch import Tensor

MOST = 8
HEADS = 4
"""Of attention."""
BUNDLED = Path(__file__).resolve().parents[1] / "bundled" / "clover" / "heads.safetensors"
KIND = Kind(
    "weft clover heads 1", "heads", "train some with python -m tools.train_tiny heads, as docs/speculation.md says"
)
TENANTS = 8
"""Whose own heads are kept at once; who comes back after so many others begins anew."""
LEARNING = ("token", "out", "head.q", "head.kv", "head.o", "head.near", "head.gate_up", "head.down")
"""Weights that change: those behind the state that the heads start from."""
Weights = Mapping[str, Any]


def shapes(width: int, inner: int, window: int) -> dict[str, tuple[int, ...]]:
    """Of every weight."""
    found: dict[str, tuple[int, ...]] = {
        "in": (inner, width),
        "token": (inner, width),
        "out": (width, inner),
    }
    for block, near in (("augment", window), ("head", MOST)):
        found |= {
            f"{block}.q": (inner, inner),
            f"{block}.kv": (2 * inner, inner),
            f"{block}.o": (inner, inner),
            f"{block}.near": (HEADS, near),
            f"{block}.gate_up": (4 * inner, inner),
            f"{block}.down": (inner, 2 * inner),
        }
    return found


def norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def block(w: Weights, name: str, x_PD: Tensor, kv_PN2D: Tensor, seen_PN: Tensor | None = None) -> Tensor:
    """Attention of x over keys and values, the nearest last, and an MLP; seen: which of them there are."""
    import torch

    p, n, _ = kv_PN2D.shape
    k, v = (t.view(p, n, HEADS, -1) for t in kv_PN2D.chunk(2, -1))
    q = (norm(x_PD) @ w[f"{name}.q"].T).view(p, HEADS, -1)
    scores = torch.einsum("phd,pnhd->phn", q, k) * q.shape[-1] ** -0.5 + w[f"{name}.near"][:, -n:]
    if seen_PN is not None:
        scores = scores.masked_fill(~seen_PN[:, None], -torch.inf)
    a = torch.einsum("phn,pnhd->phd", scores.softmax(-1), v)
    y = x_PD + a.reshape(p, -1) @ w[f"{name}.o"].T
    gate, up = (norm(y) @ w[f"{name}.gate_up"].T).chunk(2, -1)
    return y + (torch.nn.functional.silu(gate) * up) @ w[f"{name}.down"].T


def keys(w: Weights, name: str, x: Tensor) -> Tensor:
    """Keys and values of a block, [..., 2 * inner]."""
    found: Tensor = norm(x) @ w[f"{name}.kv"].T
    return found


def augmented(w: Weights, u_PD: Tensor, kv_PN2D: Tensor, seen_PN: Tensor) -> Tensor:
    """The state that the heads start from: of the newest hidden state u, with keys and values of those that are known."""
    return block(w, "augment", u_PD, kv_PN2D, seen_PN)


def head(w: Weights, s_PD: Tensor, kv_PI2D: Tensor) -> tuple[Tensor, Tensor]:
    """(next state, what the target's head makes logits of) from keys and values of the tokens so far, the newest last."""
    s = block(w, "head", s_PD, kv_PI2D)
    return s, s @ w["out"].T


def recited(w: Weights, s_PD: Tensor, embedded_PKW: Tensor) -> Tensor:
    """What all heads give of known tokens, [P, K, width]."""
    import torch

    kv, out = keys(w, "head", embedded_PKW @ w["token"].T), []
    for i in range(kv.shape[1]):
        s_PD, o = head(w, s_PD, kv[:, : i + 1])
        out.append(o)
    return torch.stack(out, 1)


@dataclass(slots=True)
class Seen:
    """Of one sequence: keys and values [window, 2 * inner] of its last states, the newest last; how many there are; the newest
    one's projection; and the position behind it."""

    kv: Tensor
    count: int
    u: Tensor
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file of weights says of itself."""

    width: int
    inner: int
    window: int
    vocab: int


@register("draft", "clover")
@dataclass(slots=True, kw_only=True)
class Clover:
    """guesses: heads that are run.  weights: a file that `python -m tools.train_tiny heads` wrote, or the bundled model's.

    online: the heads learn from the target while they serve, a step after every so many verified proposals; 0: never.
    """

    guesses: int = 4
    weights: str = "bundled"
    online: int = 0
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "head_rows": 0, "lessons": 0}, init=False, compare=False
    )
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = False
    states: ClassVar[int] = 16
    trial: ClassVar[dict[str, object]] = {"guesses": 3, "online": 4}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.TARGET_FEATURES}), effects=frozenset({Effect.GUESSES})
    )
    _weights: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _pupils: OrderedDict[bytes, Pupil] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    """By tenant; who was served last stands last."""
    _header: Header | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST:
            raise ValueError(f"guesses must be from 1 to {MOST}, got {self.guesses}")
        if self.online < 0:
            raise ValueError(f"online must not be negative, got {self.online}")
        if not self.weights:
            raise ValueError("the weights' name is empty; leave it out for the heads that come with weft")

    # ------------------------------------------------------------------ weights

    @property
    def path(self) -> Path:
        return BUNDLED if self.weights == "bundled" else Path(self.weights).expanduser()

    @property
    def header(self) -> Header:
        """Raises ConfigError."""
        if self._header is None:
            self._header = read_header(self.path)
        return self._header

    def memory(self, sequences: int, vocab: int) -> int:
        """Bytes: the weights, the states of sequences, and the laws of guesses, in float32.  Raises ConfigError."""
        h = self.header
        weights = sum(prod(shape) for shape in shapes(h.width, h.inner, h.window).values())
        states, laws = sequences * h.inner * (2 * h.window + 1), sequences * self.guesses * vocab
        lessons = KEPT * (h.inner + self.guesses * 3 * TOKENS)
        learning = TENANTS * (3 * weights + lessons) + (laws + 6 * LESSONS * self.guesses * vocab) if self.online else 0
        return 4 * (weights + states + laws + learning)

    def attach(self, words: Any) -> None:
        """Read the weights.  Raises ConfigError where they cannot be read, or were trained for another model."""
        if not self._weights:
            h = self.header
            self._weights.update(read_tensors(self.path, KIND, h.width, h.vocab, words.target))

    # ------------------------------------------------------------------ guesses

    def propose(self, asks: Sequence[Ask], run: Features) -> list[Guesses]:
        if not self._weights:
            self.attach(run)
        if self.online:
            self._study(asks, run)
        self._look(asks)
        most = [min(self.guesses, ask.most) if "clover" in ask.state else 0 for ask in asks]
        tokens: list[list[int]] = [[] for _ in asks]
        laws: list[list[Any]] = [[] for _ in asks]
        groups: dict[bytes, list[int]] = {}
        for i, m in enumerate(most):
            if m > 0:
                groups.setdefault(asks[i].salt if asks[i].salt in self._pupils else b"", []).append(i)
        for salt, group in groups.items():
            pupil = self._pupils.get(salt)
            self._guess(asks, group, most, tokens, laws, self._weights if pupil is None else pupil.serving, run)
        return proposals(asks, tokens, laws)

    def _guess(
        self,
        asks: Sequence[Ask],
        going: list[int],
        most: Sequence[int],
        tokens: list[list[int]],
        laws: list[list[Any]],
        w: Weights,
        run: Features,
    ) -> None:
        """Guesses of some of the asks, of one tenant, put into `tokens` and `laws`."""
        state = self._augmented([asks[i].state["clover"] for i in going])
        kv = state.new_empty(len(going), 0, 2 * state.shape[1])
        newest = [int(asks[i].context[-1]) for i in going]
        if self.online:
            for n, i in enumerate(going):
                asks[i].state["clover start"] = len(asks[i].context), state[n]
        while going:
            state, kv, logits = self._head(w, state, kv, newest, run)
            self.acts["head_rows"] += len(going)
            keep: list[int] = []
            for n, (token, law) in enumerate(run.draw([(i, tokens[i]) for i in going], logits)):
                i = going[n]
                if token < 0:
                    continue
                tokens[i].append(token)
                laws[i].append(law)
                if len(tokens[i]) < most[i] and token not in asks[i].sampling.stop_ids:
                    keep.append(n)
            if len(keep) < len(going):
                state, kv = state[keep], kv[keep]
            going = [going[n] for n in keep]
            newest = [tokens[i][-1] for i in going]

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted

    def _look(self, asks: Sequence[Ask]) -> None:
        """Take in the states of the step.  A sequence of which some are missing starts anew with those that are there."""
        import torch

        told = [ask for ask in asks if ask.hidden is not None and len(ask.hidden)]
        if not told:
            return
        w, window = self._weights, self.header.window
        u = torch.cat([ask.hidden for ask in told]) @ w["in"].T
        kv, at = keys(w, "augment", u), 0
        for ask in told:
            fresh, newest = kv[at : at + len(ask.hidden)][-window:], u[at + len(ask.hidden) - 1]
            stop = len(ask.context) - 1
            before: Seen | None = ask.state.get("clover")
            if before is None or before.stop != stop - len(ask.hidden):
                before = Seen(fresh.new_zeros(window, fresh.shape[1]), 0, newest, 0)
            held = torch.cat([before.kv[len(fresh) :], fresh])
            ask.state["clover"] = Seen(held, min(window, before.count + len(fresh)), newest, stop)
            at += len(ask.hidden)

    def _augmented(self, seen: Sequence[Seen]) -> Tensor:
        import torch

        kv = torch.stack([s.kv for s in seen])
        known = torch.tensor([s.count for s in seen], device=kv.device)
        there = torch.arange(kv.shape[1], device=kv.device) >= kv.shape[1] - known[:, None]
        return augmented(self._weights, torch.stack([s.u for s in seen]), kv, there)

    def _study(self, asks: Sequence[Ask], run: Features) -> None:
        """Take in what was verified; whose turn it is takes a step, one tenant a call."""
        for ask in asks:
            length, start = ask.state.pop("clover start", (0, None))
            if start is None or ask.logits is None or length + len(ask.logits) != len(ask.context):
                continue
            count = min(len(ask.logits), self.guesses)
            pupil = self._pupils.pop(ask.salt, None) or Pupil.like(self._weights, LEARNING)
            self._pupils[ask.salt] = pupil
            said = ask.context[length - 1 : length - 1 + count].tolist()
            if min(said) >= 0:
                pupil.add(Lesson.of(start, said, ask.logits[:count]))
        while len(self._pupils) > TENANTS:
            self._pupils.popitem(last=False)
        due = next((p for p in self._pupils.values() if p.fresh >= self.online), None)
        if due is not None:
            due.learn(run.target, recited)
            self.acts["lessons"] += 1

    @property
    def logits(self) -> bool:
        return self.online > 0

    def _head(
        self, w: Weights, state: Tensor, kv: Tensor, newest: Sequence[int], run: Features
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next head, of the tokens so far and the newest: (its state, keys and values, logits)."""
        import torch

        fresh = keys(w, "head", run.target.embed(newest) @ w["token"].T)
        kv = torch.cat([kv, fresh[:, None]], 1)
        state, out = head(w, state, kv)
        return state, kv, logits_of(out, run.target)


# ---------------------------------------------------------------------------------------------- files


def width_of(found: Shapes) -> int:
    """Of a file's tensors, if they are those of heads; raises ValueError or KeyError."""
    (inner, width), (_, window) = found["in"], found["augment.near"]
    if found != shapes(width, inner, window) or inner % HEADS or min(inner, width, window) < 1:
        raise ValueError
    return width


def read_header(path: Path) -> Header:
    """Raises ConfigError for a file that is missing, or is none of heads."""
    found, vocab = read_shapes(path, KIND, width_of)
    (inner, width), (_, window) = found["in"], found["augment.near"]
    return Header(width, inner, window, vocab)
