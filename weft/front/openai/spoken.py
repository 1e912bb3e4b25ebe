"""`Spoken`: what one answer says, delta by delta, for the APIs whose answers are lists of items or blocks."""

from __future__ import annotations

from bisect import bisect_left

from weft.front.generation import Delta, Generation
from weft.front.speech import Arguments, Begun, Broken, Ended, Manner, Said, Text, Thought

__all__ = ["Arguments", "Begun", "Broken", "Ended", "Said", "Spoken", "Text", "Thought"]


class Spoken:
    """Reads the deltas of one sequence.  called: calls that have become whole."""

    def __init__(self, manner: Manner | None) -> None:
        self._speech = None if manner is None else manner.open()
        self.called = 0

    def read(self, delta: Delta) -> list[Said]:
        """What a delta adds.  A call that the answer's length cut short is left as far as it came."""
        if self._speech is None:
            return [Text(delta.text)] if delta.text else []
        said = self._speech.push(delta.text)
        if delta.finish_reason is not None:
            said += self._speech.finish()
        self.called += sum(isinstance(one, Ended) for one in said)
        by_length = delta.finish_reason == "length"
        return [one for one in said if not (isinstance(one, Broken) and one.cut and by_length)]

    def thought_tokens(self, generation: Generation) -> int:
        """Tokens of the thought and its marks, of a generation's first sequence."""
        if self._speech is None:
            return 0
        return bisect_left(generation.requests[0].sequences[0].text.offsets, self._speech.thought_chars)
