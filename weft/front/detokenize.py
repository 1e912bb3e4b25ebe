"""Text of a growing sequence: incremental detokenizing, stop strings across token borders, offsets of tokens.

The rules: what was given out is never taken back; the deltas concatenate to exactly `Tokenizer.decode` of all ids; the
cost is linear in the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.front.tokenizer import Tokenizer


class Detokenizer:
    """Ids in, text out, for one sequence.

    Characters that are not complete yet are held back, and so are runs of byte tokens (see `decoding.ByteFallback`).
    The deltas of `push` and the rest that `finish` gives concatenate to `tokenizer.decode(ids, skip_special=...)`.
    """

    __slots__ = ("_pieces", "_skip", "_stages", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: Collection[int] = ()) -> None:
        """shown: special tokens that give text all the same."""
        self._tokenizer = tokenizer
        self._pieces = tokenizer.pieces
        skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._skip: Collection[int] = skip - frozenset(shown) if shown else skip
        self._stages = tokenizer.plan.open()

    def push(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete; may be empty.  Ids without a token give no text, as in decoding."""
        pieces: list[str] = []
        for i in ids:
            if i in self._skip:
                continue
            piece = self._pieces.get(i)
            if piece is None:
                piece = self._tokenizer.piece(i)
                if piece is None:
                    continue
            pieces.append(piece)
        if not pieces:
            return ""
        for stage in self._stages:
            pieces = stage.feed(pieces)
        return "".join(pieces)

    def finish(self) -> str:
        """What was still held back, with U+FFFD for characters that never became complete."""
        pieces: list[str] = []
        for stage in self._stages:
            pieces = stage.feed(pieces) + stage.end()
        return "".join(pieces)


class _Automaton:
    """Aho-Corasick over the stop strings (Aho & Corasick 1975): node 0 is the root.

    depth: characters of a stop string that the node has matched, which is how much of the text must be held back.
    hit: longest stop string that ends at the node, or None.
    """

    __slots__ = ("depth", "edges", "fail", "hit")

    def __init__(self, stops: Sequence[str]) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]
        self.hit: list[str | None] = [None]
        for stop in stops:
            node = 0
            for char in stop:
                node = self.edges[node].get(char) or self._grow(node, char)
            self.hit[node] = stop
        queue = deque(self.edges[0].values())
        while queue:
            node = queue.popleft()
            if self.hit[node] is None:
                self.hit[node] = self.hit[self.fail[node]]
            for char, child in self.edges[node].items():
                self.fail[child] = self.step(self.fail[node], char)
                queue.append(child)

    def _grow(self, node: int, char: str) -> int:
        child = len(self.edges)
        self.edges[node][char] = child
        self.edges.append({})
        self.fail.append(0)
        self.depth.append(self.depth[node] + 1)
        self.hit.append(None)
        return child

    def step(self, node: int, char: str) -> int:
        while node and char not in self.edges[node]:
            node = self.fail[node]
        return self.edges[node].get(char, 0)


@lru_cache(maxsize=256)
def automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)


class StopStrings:
    """Searches a stream of text for several strings at once.

    The occurrence that ends first wins, and of those the longest, however the text was cut into deltas.  Only what
    could be the beginning of a stop string is held back; with `include` nothing is, because nothing has to be left out.
    Linear in the text (amortised), whatever the strings.
    """

    __slots__ = ("_automaton", "_held", "_include", "_node", "stopped")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._automaton = automaton(tuple(stops))
        self._include = include
        self._node = 0
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was met or None).  After a stop nothing more is shown."""
        if self.stopped is not None:
            return "", self.stopped
        machine, node = self._automaton, self._node
        edges, hits = machine.edges, machine.hit
        for i, char in enumerate(text):
            following = edges[node].get(char)
            node = machine.step(node, char) if following is None else following
            stop = hits[node]
            if stop is not None:
                self.stopped = stop
                shown = self._held + text[: i + 1]
                self._held = ""
                return (shown if self._include else shown[: len(shown) - len(stop)]), stop
        self._node = node
        whole = self._held + text
        cut = len(whole) if self._include else len(whole) - machine.depth[node]
        self._held = whole[cut:]
        return whole[:cut], None

    def finish(self) -> str:
        """What was held back: the text ended before it became a stop string."""
        held, self._held, self._node = self._held, "", 0
        return held


class SequenceText:
    """The text of one output sequence as a client sees it.

    stops           strings that end the text; not searched for in text of the first `min_tokens` tokens
    include_stop    the stop string (and the text of a stop id) stays in the text
    stop_ids        ids that end the sequence: as the last token such an id adds no text
    shown           special tokens that give text even where others are skipped: marks that a parser looks for
    offsets         for each token, the length of the text when it came: OpenAI's `text_offset`
    text            everything given out so far
    tokens          tokens taken; when a stop string is met, those behind it are not counted
    stopped         the stop string that was met
    """

    __slots__ = (
        "_detokenizer",
        "_include",
        "_length",
        "_min_tokens",
        "_parts",
        "_pending",
        "_stop_ids",
        "_stops",
        "offsets",
        "stopped",
        "tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special: bool = True,
        shown: Collection[int] = (),
        stop_ids: Collection[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special, shown=shown)
        self._stops = StopStrings(stops, include=include_stop) if stops else None
        self._include = include_stop
        self._min_tokens = min_tokens
        self._stop_ids = frozenset(stop_ids)
        self._pending: int | None = None
        self._parts: list[str] = []
        self._length = 0
        self.offsets: list[int] = []
        self.tokens = 0
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Iterable[int], finished: bool = False) -> tuple[str, str | None]:
        """Take new ids: (new text, stop string met or None).

        finished: no more will come, so give out what was held back.
        """
        out: list[str] = []
        for token in token_ids if self.stopped is None else ():
            if self._pending is not None:  # it was not the last one, so it is ordinary text
                held, self._pending = self._pending, None
                if self._add(self._detokenizer.push((held,)), out):
                    break
            self.offsets.append(self._length)
            self.tokens += 1
            if token in self._stop_ids and not self._include:
                self._pending = token
            elif self._add(self._detokenizer.push((token,)), out):
                break
        if finished and self.stopped is None:
            self._pending = None
            if not self._add(self._detokenizer.finish(), out) and self._stops is not None:
                out.append(self._stops.finish())
        delta = "".join(out)
        if delta:
            self._parts.append(delta)
        return delta, self.stopped

    def _add(self, text: str, out: list[str]) -> bool:
        """Text completed by the newest token; whether a stop string ends here."""
        self._length += len(text)
        if self._stops is None or not text or self.tokens <= self._min_tokens:
            out.append(text)
            return False
        shown, self.stopped = self._stops.push(text)
        out.append(shown)
        return self.stopped is not None
