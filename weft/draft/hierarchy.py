"""Hierarchical drafting: guesses from the context, from what other requests were answered, or from a text that was read before.

Paper    Cho et al., Lossless Acceleration of Large Language Models with Hierarchical Drafting based on Temporal Locality in
         Speculative Decoding, arXiv:2502.05609 (002-144)
Rule     the newest tokens are looked up in three stores: context, what followed them last in this context; answers, what followed
         them last in an answer to the same tenant; text, what mostly followed them in a file.  A store with acceptance a gives
         k guesses of which a + a^2 + ... + a^k can be expected to stand: the store with most is taken, of equals the more local.
         a is measured: (1 + guesses that stood) / (2 + guesses that were tried), older ones fading
Shapes   context [T] int64, guesses at most `guesses`
Units    longest, shortest: tokens looked up in the context (answers: `shortest`; text: 3, 2 or 1).  guesses: tokens.  entries: of
         all tenants' answers together, each a key and what followed it.  share: of what followed in the text, at least
Cost     O(T) comparisons for each proposal, and `guesses` entries for each token of an answer; the text is read once, some 2
         seconds and 100 MB for a megabyte of it
Pays     where questions come again: at one sequence 2.2 times as fast on the bundled model and 2.8 times on the 135M shape, 1.6
         times at two.  Where answers quote, 1.2 times, and with a text that the target wrote itself 1.6 times.  On prose it makes
         no difference that could be told at one sequence, and goes at 0.85 of the speed in batches of four on the bundled model,
         with a text or without one
Differs  one chain is verified, where the paper packs candidates of all stores, the more local first; stores are ordered by what
         can be expected of them.  The text is a table of what follows up to three tokens, along which guesses are found one by
         one, where the paper keeps continuations
Raises   ValueError unless 1 <= shortest <= longest, 1 <= guesses <= 16, entries >= 1 and 0 <= share <= 1; ConfigError for a text
         that cannot be read or is larger than 4 MiB
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Ask, Forward, Guesses, Vocabulary, Words
from weft.traits import Effect, Trait, Traits

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MOST = 16
ORDER = 3
"""Tokens that the text is looked up by, at most."""
TEXT_BYTES = 4 << 20
MEMORY = 256
"""Guesses tried after which what a store achieved counts half."""
STORES = ("context", "answers", "text")
Table = Mapping[tuple[int, ...], tuple[int, float]]
"""By up to three tokens: what mostly followed them, and which share of all that followed it has."""


def table(tokens: Sequence[int]) -> Table:
    """What mostly follows each run of 1 to 3 tokens; of equals the smaller id.  A run that came once says nothing."""
    found: dict[tuple[int, ...], tuple[int, float]] = {}
    for order in range(1, ORDER + 1):
        follow: dict[tuple[int, ...], Counter[int]] = {}
        for at in range(order, len(tokens)):
            follow.setdefault(tuple(tokens[at - order : at]), Counter())[tokens[at]] += 1
        for run, counts in follow.items():
            total = counts.total()
            if total > 1:
                token = min(counts, key=lambda t: (-counts[t], t))
                found[run] = token, counts[token] / total
    return found


@dataclass(slots=True)
class Tried:
    """Guesses of one store that were verified up to the first wrong one, and how many of them stood."""

    right: float = 0.0
    tried: float = 0.0

    @property
    def acceptance(self) -> float:
        return (1 + self.right) / (2 + self.tried)

    def add(self, right: int, tried: int) -> None:
        self.right, self.tried = self.right + right, self.tried + tried
        if self.tried > MEMORY:
            self.right, self.tried = self.right / 2, self.tried / 2


@register("draft", "hierarchy")
@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """text: a file of text such as the answers will be; without one there are two stores."""

    longest: int = 4
    shortest: int = 2
    guesses: int = 6
    entries: int = 50_000
    text: str = ""
    share: float = 0.5
    acts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("proposed", "accepted", *STORES), 0), init=False, compare=False
    )
    """context, answers, text: guesses from each store."""
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(needs=frozenset({Trait.ROLLBACK}), effects=frozenset({Effect.GUESSES}))
    _tried: dict[str, Tried] = field(
        default_factory=lambda: {store: Tried() for store in STORES}, init=False, repr=False, compare=False
    )
    _answers: dict[bytes, OrderedDict[tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """By tenant and by the last `shortest` tokens what followed them; the newest entry stands last."""
    _table: dict[str, Table] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = 1 <= self.shortest <= self.longest and 1 <= self.guesses <= MOST
        if not sizes or self.entries < 1 or not 0 <= self.share <= 1:
            raise ValueError(
                f"1 <= shortest <= longest, 1 <= guesses <= {MOST}, entries >= 1 and 0 <= share <= 1 are needed, got "
                f"{self.shortest}, {self.longest}, {self.guesses}, {self.entries}, {self.share}"
            )

    @classmethod
    def trial(cls, folder: Path) -> dict[str, Any]:
        """A short text, in `folder`."""
        path = folder / "text.txt"
        path.write_text("He said that he had been in the house. He said that it was in the sea and in the house. " * 4)
        return {"text": str(path), "share": 0.0, "guesses": 4}

    def attach(self, words: Words) -> None:
        """Read the text.  Raises ConfigError."""
        if self.text:
            self._table["text"] = words.once(f"hierarchy {self.text}", self._read)

    def _read(self, vocabulary: Vocabulary) -> Table:
        path = Path(self.text)
        try:
            if path.stat().st_size > TEXT_BYTES:
                raise ConfigError(f"the text {path} is larger than {TEXT_BYTES >> 20} MiB; give a part of it")
            text = path.read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the text {path} cannot be read: {error}") from None
        return table(vocabulary.encode(text))

    # ------------------------------------------------------------------ guesses

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        for ask in asks:
            self._judge(ask)
            self._learn(ask)
        while sum(map(len, self._answers.values())) > self.entries:
            max(self._answers.values(), key=len).popitem(last=False)
        for salt in [
            salt for salt, entries in self._answers.items() if not entries
        ]:  # a salt may come with every request
            del self._answers[salt]
        return [Guesses(self._chosen(ask)) for ask in asks]

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted

    def _chosen(self, ask: Ask) -> Sequence[int]:
        if not ask.most:
            ask.state.pop("hierarchy", None)
            return ()
        most = min(self.guesses, ask.most)
        newest = ask.context[-max(self.shortest, ORDER) :].tolist()
        key, answers = tuple(newest[-self.shortest :]), self._answers.get(ask.salt)
        offers = {
            "context": self._context(ask.context),
            "answers": () if answers is None else answers.get(key, ()),
            "text": self._walk(newest, most),
        }
        expected = {store: self._expected(store, len(offer[:most])) for store, offer in offers.items()}
        store = max(STORES, key=lambda s: expected[s])
        found = offers[store][:most]
        ask.state["hierarchy"] = store, len(ask.context), found
        self.acts[store] += len(found)
        return found

    def _expected(self, store: str, guesses: int) -> float:
        a = self._tried[store].acceptance
        return float(sum(a**i for i in range(1, guesses + 1)))

    def _context(self, context: npt.NDArray[np.int64]) -> Sequence[int]:
        """What followed the newest tokens when they stood in the context last."""
        for n in range(min(self.longest, len(context) - 1), self.shortest - 1, -1):
            same = context[n - 1 : -1] == context[-1]
            for back in range(1, n):
                same = same & (context[n - 1 - back : -1 - back] == context[-1 - back])
            found = same.nonzero()[0]
            if len(found):
                after = int(found[-1]) + n
                guesses: list[int] = context[after : after + self.guesses].tolist()
                return guesses[: guesses.index(-1)] if -1 in guesses else guesses
        return ()

    def _walk(self, newest: Sequence[int], most: int) -> Sequence[int]:
        """What mostly followed in the text, token by token: after three tokens where they are known, else after fewer."""
        table = self._table.get("text")
        run, found = tuple(newest[-ORDER:]), list[int]()
        while table is not None and len(found) < most:
            known = next((table[run[i:]] for i in range(len(run)) if run[i:] in table), None)
            if known is None or known[1] < self.share:
                break
            found.append(known[0])
            run = (*run, known[0])[-ORDER:]
        return found

    # ------------------------------------------------------------------ what is learnt

    def _judge(self, ask: Ask) -> None:
        """How many of the last guesses stood, by what stands in their places now."""
        store, at, guessed = ask.state.get("hierarchy", ("", 0, ()))
        said = ask.context[at:].tolist()
        right = next((i for i, (a, b) in enumerate(zip(guessed, said)) if a != b), min(len(guessed), len(said)))
        if guessed:
            self._tried[store].add(right, right + (right < min(len(guessed), len(said))))

    def _learn(self, ask: Ask) -> None:
        """What follows each run of an answer, as far as it is said; the prompt's last tokens are the first one's run."""
        answers, n = self._answers.setdefault(ask.salt, OrderedDict()), self.shortest
        known: int = ask.state.get("known", ask.prompt)
        start = max(0, max(ask.prompt, known - self.guesses) - n)
        said = ask.context[start:].tolist()
        for at in range(len(said) - n):
            run, after = tuple(said[at : at + n]), tuple(said[at + n : at + n + self.guesses])
            if -1 in run or -1 in after:
                continue
            answers.pop(run, None)
            answers[run] = after
        ask.state["known"] = len(ask.context)
