"""Lookahead: a trie of what prompts and answers said, over requests, tells what mostly follows the newest tokens.

Paper    Zhao et al., Lookahead: An Inference Acceleration Framework for Large Language Model with Lossless Generation Accuracy,
         arXiv:2312.12728 (003-96)
Rule     a trie counts every run of up to longest + guesses tokens: a request's prompt in one of its own, which goes with it, and
         the answers of a tenant in one that stays.  For n = longest down to shortest: below the last n tokens, the next guess is
         the token whose count is the largest, a prompt's counting `prompt` times, and so on below it; a guess that has less than
         `share` of all that followed there ends the guesses.  Ageing: where the tries of answers have more than half of `nodes`,
         the largest one's counts are halved, and what is left with none is gone, until they have three quarters of that.  The
         tries of prompts have the other half: of a prompt for which there is no room its last tokens are counted, or none
Shapes   context [T] int64, guesses at most `guesses`
Units    longest, shortest, guesses: tokens.  nodes: of all tries together; one takes some 200 bytes.  prompt: a factor
Cost     longest + guesses steps in a dictionary for each token of prompts and answers, and as many for each proposal; guessed
         rows are computed and may be thrown away
Pays     where questions come again: at one sequence 2.2 times as fast on the bundled model and 3.4 times on the 135M shape
         (prompt lookup, which sees one request, 1.4 and 2.0), 1.7 times at two; where answers quote, 1.3 times.  Not on prose:
         there it goes at 0.96 to 1.04 of the speed alone, and at 0.86 in batches of four on the bundled model
Differs  one chain of guesses is verified, where the paper packs branches into a tree; an answer's runs begin in the last tokens
         of its prompt, so that a question that comes again is answered from its first token on; `share` is not the paper's.  A
         sequence that comes back after preemption is counted anew
Raises   ValueError unless 1 <= shortest <= longest <= 16, 1 <= guesses <= 16, nodes >= 1, prompt > 0 and 0 <= share <= 1
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakSet

from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Effect, Trait, Traits

Node = dict[int, Any]
"""By token what follows it; under COUNT how often the node was passed."""
COUNT = -2
"""No token's id, nor the -1 of a position that has none."""
MOST = 16
HALF, ROOM = 0.5, 0.375
"""Parts of the nodes allowed at which ageing of answers begins and ends; prompts have a half, too."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Tally:
    """A trie.  size: its nodes, at most: paths that were dropped while they still grew count until the next ageing."""

    depth: int
    root: Node = field(default_factory=dict)
    size: int = 0

    def learn(self, ends: list[Node], tokens: Iterable[int]) -> list[Node]:
        """Count the tokens that follow the paths ending at `ends`, and begin a path at each; gives the new ends."""
        for token in tokens:
            if token < 0:  # a position without a token
                ends = []
                continue
            grown = []
            for node in (*ends, self.root):
                child = node.get(token)
                if child is None:
                    child = node[token] = {COUNT: 0}
                    self.size += 1
                child[COUNT] += 1
                grown.append(child)
            # The path that has come to the full depth is the first one: each is one longer than the next.
            ends = grown[1:] if len(grown) == self.depth else grown
        return ends

    def below(self, tokens: Iterable[int]) -> Node | None:
        """The node that these tokens lead to from the root."""
        node: Node | None = self.root
        for token in tokens:
            node = None if node is None else node.get(token)
        return node

    def age(self) -> None:
        """Halve all counts, and drop what is left with none."""
        self.size = _halved(self.root)


def _halved(node: Node) -> int:
    left = 0
    for token in [t for t in node if t != COUNT]:
        child = node[token]
        child[COUNT] //= 2
        if child[COUNT]:
            left += 1 + _halved(child)
        else:
            del node[token]
    return left


@dataclass(slots=True)
class Request:
    """What is kept of one sequence.  own: the trie of its prompt.  ends: where its answer's paths end.  at: tokens counted."""

    own: Tally
    ends: list[Node]
    at: int


@register("draft", "trie")
@dataclass(frozen=True, slots=True, kw_only=True)
class Lookahead:
    """longest, shortest: newest tokens that are looked up.  prompt: what a request's own prompt counts beside answers."""

    longest: int = 4
    shortest: int = 2
    guesses: int = 8
    share: float = 0.5
    prompt: float = 2.0
    nodes: int = 200_000
    acts: dict[str, int] = field(default_factory=lambda: {"proposed": 0, "accepted": 0}, init=False, compare=False)
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(needs=frozenset({Trait.ROLLBACK}), effects=frozenset({Effect.GUESSES}))
    _answers: dict[bytes, Tally] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By tenant."""
    _prompts: WeakSet[Tally] = field(default_factory=WeakSet, init=False, repr=False, compare=False)
    """Of the requests that are still there."""

    def __post_init__(self) -> None:
        sizes = 1 <= self.shortest <= self.longest <= MOST and 1 <= self.guesses <= MOST
        if not sizes or self.nodes < 1 or not self.prompt > 0 or not 0 <= self.share <= 1:
            raise ValueError(
                f"1 <= shortest <= longest <= {MOST}, 1 <= guesses <= {MOST}, nodes >= 1, prompt > 0 and 0 <= share <= 1 are "
                f"needed, got {self.shortest}, {self.longest}, {self.guesses}, {self.nodes}, {self.prompt}, {self.share}"
            )

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        for ask in asks:
            self._learn(ask)
        self._age()
        return [Guesses(self._after(ask) if ask.most else ()) for ask in asks]

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted

    def _learn(self, ask: Ask) -> None:
        """Take in the prompt of a sequence that is new, and what its answer has said since it was asked for last."""
        depth = self.longest + self.guesses
        mine: Request | None = ask.state.get("trie")
        if mine is None:
            own = Tally(depth)
            room = int(HALF * self.nodes - sum(t.size for t in self._prompts)) // depth
            own.learn([], ask.context[max(0, ask.prompt - max(0, room)) : ask.prompt].tolist())
            self._prompts.add(own)
            mine = ask.state["trie"] = Request(own, [], max(0, ask.prompt - self.longest))
        answers = self._answers.setdefault(ask.salt, Tally(depth))
        mine.ends = answers.learn(mine.ends, ask.context[mine.at :].tolist())
        mine.at = len(ask.context)

    def _after(self, ask: Ask) -> list[int]:
        tries = (self.prompt, ask.state["trie"].own), (1.0, self._answers.get(ask.salt))
        newest = ask.context[-self.longest :].tolist()
        for n in range(min(self.longest, len(newest)), self.shortest - 1, -1):
            places = [(weight, trie.below(newest[-n:])) for weight, trie in tries if trie is not None]
            found = self._chain([(weight, node) for weight, node in places if node is not None], ask)
            if found:
                return found
        return []

    def _chain(self, places: list[tuple[float, Node]], ask: Ask) -> list[int]:
        """The likeliest path below some nodes, whose counts are weighed."""
        found: list[int] = []
        while len(found) < min(self.guesses, ask.most):
            votes: dict[int, float] = {}
            for weight, node in places:
                for token, child in node.items():
                    if token != COUNT:
                        votes[token] = votes.get(token, 0.0) + weight * child[COUNT]
            if not votes:
                break
            token = max(votes, key=lambda t: (votes[t], -t))
            if votes[token] < self.share * sum(votes.values()):
                break
            found.append(token)
            if token in ask.sampling.stop_ids:
                break
            places = [(weight, node[token]) for weight, node in places if token in node]
        return found

    def _age(self) -> None:
        """Bring the answers' tries back below what is allowed; the largest tenant's first, so that none pushes out another."""
        if sum(t.size for t in self._answers.values()) <= HALF * self.nodes:
            return
        while sum(t.size for t in self._answers.values()) > ROOM * self.nodes:
            tenant = max(self._answers, key=lambda salt: self._answers[salt].size)
            self._answers[tenant].age()
            if not self._answers[tenant].size:
                del self._answers[tenant]
