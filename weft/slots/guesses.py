"""Slots `draft` and `accept`: guesses at the tokens that come next, chains and trees of them, and which of them stand.

A tree of guesses is a list of tokens and, for each, the one that it follows: -1 for the newest token of the context.  A guess
stands after the one that it follows, so any beginning of a tree is a tree.  A chain is told by its tokens alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from weft.types import SamplingSpec


@dataclass(frozen=True, slots=True)
class Ask:
    """A sequence that could use guesses.

    context: [T] int64 ids, the newest token last, -1 where no token stands.  prompt: how many of them are prompt.  output: index
    of the first token to guess.  most: guesses that can be verified.  sampling, seed: the law and the noise of its tokens.
    independent: the sequence's `accept` weighs laws (see `Accept.laws`).  salt: the tenant, from whose requests alone a guess may
    be made: the pace of an answer would tell others what was said.  state: the technique's own for this sequence while it stays
    (forks, and who comes back after preemption, begin with none).  stale: what the target drew in the last step behind a guess
    that did not stand, for the positions from the next one on.  hidden: for a draft with `states`, float32 [n, width], the
    target's final states (normed, as its head reads them) of this step's rows that stand, oldest first: the last is the row from
    which the newest token was drawn, and stands one position before it.  logits: for a draft with `logits`, float32 [m, vocab],
    those from which the step's tokens were drawn, the newest one's last.  soft: for a draft with soft tokens, float32 [n, width],
    what the last layer gave at those behind the row from which the newest token was drawn, as `Target.predict` takes it: the
    first stands where the newest token does.  kept: for a draft with `early`, the guesses that it made while the target verified,
    if the target said all that these were made behind, else None.
    """

    context: Any
    prompt: int
    output: int
    most: int
    sampling: SamplingSpec
    seed: int
    independent: bool = False
    salt: bytes = b""
    state: dict[str, Any] = field(default_factory=dict)
    stale: Sequence[int] = ()
    hidden: Any = None
    logits: Any = None
    soft: Any = None
    kept: Any = None


@dataclass(frozen=True, slots=True)
class Guesses:
    """tokens: a chain of guesses, or with `parents` a tree: the guess that each follows, -1 for the newest token.

    A plan verifies as many of the first ones as fit its budgets, so the best, or the nearest, come first.  laws: where each was
    drawn, given those before it, float32 [guesses, vocab], for an `accept` that asks for it.  Whether a guess is made may depend
    on those before it, never on what it is itself.
    """

    tokens: Sequence[int]
    laws: Any = None
    parents: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Ranked:
    """The likeliest winners of one row's race.

    tokens: the first in the race, the second, and so on: draws without replacement from the row's law.  chances: how likely
    each is, float64.  law: float32 [vocab], of a sequence that is independent, else None.
    """

    tokens: Sequence[int]
    chances: Sequence[float]
    law: Any = None


@dataclass(frozen=True, slots=True)
class Translation:
    """How a second model with another vocabulary reads the target's ids, and what it may guess.

    reads: for each id of the target, the id that the second model's row has in its place.  own, means: ids of the second model,
    and the target's ids that they stand for, no id twice; its other tokens cannot be guessed.
    """

    reads: Sequence[int]
    own: Sequence[int]
    means: Sequence[int]


class Forward(Protocol):
    """The second model, for the asks of one call of `propose`.

    ()      for each (index of the ask, ids that follow what it has computed) the logits after the last of them, float32
            [N, vocab], good until the next call.  Ids stand in its KV until the step's result says what stands; an ask has room
            for most - 1 of them after its newest token
    grow    for each (index of the ask, guesses, parents) a tree's next guesses: the logits after each of them, one ask after the
            other.  The newest token was computed before, by (); parents count the ask's guesses in the order in which they were
            computed, -1 for the newest token
    draw    for each (index of the ask, its guesses so far) a token of its row of logits under the ask's own law, -1 where they
            are not finite, and None: by the noise of the very token that is guessed, so that draft and target mostly agree.
            Where the ask is independent, by noise that nothing else uses, and the law, float32 [vocab]
    rank    as `draw`, the first `most` of each row's race, fewer where the law has no more, none where logits are not finite.
            Where the ask is independent the chances are the law's, and rows with the same guesses before them need salts of their
            own to be drawn independently; else they tell how far apart the contenders stand
    """

    def __call__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> Any: ...
    def grow(self, nodes: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> Any: ...
    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: Any) -> list[tuple[int, Any]]: ...
    def rank(
        self, rows: Sequence[tuple[int, Sequence[int]]], logits: Any, most: int, salts: Sequence[int] = ()
    ) -> list[Ranked]: ...


class Target(Protocol):
    """What a draft with weights of its own may ask of the model that it guesses for.

    embed     embeddings of tokens, float32 [n, width], as the first layer is given them
    predict   float32 [n, vocab], the logits that the model's final norm and head give for any states [n, width]
    rows      float32 [n, width], what a normed state is multiplied by, channel for channel, to give the logits of these tokens
    """

    @property
    def width(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    def embed(self, ids: Sequence[int]) -> Any: ...
    def predict(self, states: Any) -> Any: ...
    def rows(self, ids: Sequence[int]) -> Any: ...


class Features(Protocol):
    """The target, for a draft that reads its states; draw, rank: as `Forward` has them."""

    @property
    def target(self) -> Target: ...
    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: Any) -> list[tuple[int, Any]]: ...
    def rank(
        self, rows: Sequence[tuple[int, Sequence[int]]], logits: Any, most: int, salts: Sequence[int] = ()
    ) -> list[Ranked]: ...


class FirstLayers(Forward, Protocol):
    """The target's own first layers, for a draft that has `exits`; of calls, `grow` is not to be had.

    layers: of the target.  exit: after how many of them the passes leave that are asked for next, one of `exits`.  look: set for
    shadows in the next step, whose pass is cut at the exits then.
    shadows   by exit, for each row that the target sampled in this step for an ask: whether a guess by that exit, drawn by the
              noise of the token itself, would have been the token that stood; nothing where nobody had asked to look
    """

    exit: int
    look: bool

    @property
    def layers(self) -> int: ...
    def shadows(self, ask: int) -> Mapping[int, Sequence[bool]]: ...


class Draft(Protocol):
    """Slot `draft`: guesses for the tokens that come next, for all sequences of a step at once (each as many as it likes).

    propose   for each ask its guesses, none where there is nothing to say.  run: the second model, where `model` names one (the
              newest token is the first that it has not computed); `Features`, where the class has `states`
    observe   of a step's guesses for one sequence, how many were verified and how many of them stood

    model: the second model's checkpoint ("bundled" for the one that ships with weft, a folder, or a hub id), or None.
    guesses: the most for one sequence in a step; 0 asks for nothing.  A class may have `attach`, which is given the model's
    `Words` once; `keep`, rows of the second model's head that are computed, and `head`, their ids once it is attached;
    `translates`, whether the second model may have another vocabulary, and `translation`, between the two once it is attached
    (all ids of asks, guesses and logits are the target's);
    `exits(layers)`, after how many of the target's `layers` it guesses, ascending (run is `FirstLayers` then);
    `learns`, whether it is asked for nothing, too (most 0: an answer ends, or guesses do not pay), so that it sees what was said;
    `states`, of how many of a step's newest rows of the context it is given the hidden states (of guesses that stand, of all);
    `logits`, whether it is given those of rows that stand, too; `soft`, learned tokens that the target may compute behind
    each row that samples (run is `Features` then), which `vectors(target)` gives, float32 [soft, width];
    `early(asks, run)`, guesses that the second model makes beside the target's pass, in a thread of its own: each ask is as it
    would be if all guesses in hand stood, the first guess is in the place of the target's own token behind them, and the others
    are handed to `propose`, which has no `run` then, where the target says that token (`Ask.kept`);
    `memory(sequences, vocab)`, bytes that it holds beside the models for so many sequences.  What `attach` is given has `target`,
    the model that is guessed for (`Target`).
    """

    @property
    def model(self) -> str | None: ...
    @property
    def guesses(self) -> int: ...
    def propose(self, asks: Sequence[Ask], run: Any) -> Sequence[Guesses]: ...
    def observe(self, proposed: int, accepted: int) -> None: ...


def heard(draft: Draft, most: int) -> bool:
    """Whether a draft is given the context of a sequence for which it may make `most` guesses; -1: as many as it likes."""
    return most != 0 or bool(getattr(draft, "learns", False))


class Verify(Protocol):
    """What `accept` may ask about a sequence whose guesses were computed.

    guesses, parents: a tree of guesses; parents[j] is the guess that j follows, -1 the context.  laws: of each guess, float32
    [guesses, vocab], or None (then a guess was certain).  Row 0 follows the context, row 1 + j guess j.
    winner(row): the token that the race selects there.  law(row): (ids int64, probabilities float64) of the target's law.
    warm(row): the same, but at temperature 1 where the request is greedy.
    uniform(row, token, salt): noise in (0, 1), a function of seed, output index, token and salt.
    """

    guesses: Sequence[int]
    parents: Sequence[int]
    laws: Any

    def winner(self, row: int) -> int: ...
    def law(self, row: int) -> tuple[Any, Any]: ...
    def warm(self, row: int) -> tuple[Any, Any]: ...
    def uniform(self, row: int, token: int, salt: int) -> float: ...


class Accept(Protocol):
    """Slot `accept`: which guesses stand.

    accept  (tokens that stand, accepted guesses in order); there is one token more than guesses
    laws    whether guesses are weighed by the laws that they were drawn from: then they are drawn by noise of their own
    """

    @property
    def laws(self) -> bool: ...
    def accept(self, view: Verify) -> tuple[list[int], list[int]]: ...


def candidates(parents: Sequence[int], after: Collection[int]) -> list[int]:
    """The guesses that follow any of `after`, in their order; `after` are guesses with the same text, or -1."""
    return [j for j, parent in enumerate(parents) if int(parent) in after]


def line(parents: Sequence[int], guess: int) -> list[int]:
    """A guess and those before it, the first one first; nothing for -1."""
    found: list[int] = []
    while guess >= 0:
        found.append(guess)
        guess = int(parents[guess])
    return found[::-1]
