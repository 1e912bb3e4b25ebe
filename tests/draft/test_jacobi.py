"""Jacobi decoding beside the paper's iteration, worked out by itself over functions of the whole text before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.exec.conftest import Bench, spec
from weft.draft.jacobi import Jacobi
from weft.errors import ConfigError
from weft.exec.build import Runtime
from weft.registry import parse
from weft.slots import Ask, Guesses
from weft.types import SamplingSpec

Next = Callable[[Sequence[int], int], int]
"""(the text before, index of the token) to the token: a law with its noise fixed."""
PROMPT = [3, 1, 4]


def hashed(most: int, memory: int = 99) -> Next:
    """A function of the last `memory` tokens and of the place."""

    def f(before: Sequence[int], index: int) -> int:
        data = bytes(before[-memory:]) + (bytes([index]) if memory > 9 else b"")
        return hashlib.blake2b(data, digest_size=2).digest()[0] % most

    return f


def sequential(f: Next, count: int) -> list[int]:
    said = list(PROMPT)
    for i in range(count):
        said.append(f(said, i))
    return said[len(PROMPT) :]


class Engine:
    """What an engine does with one sequence's guesses, and nothing else."""

    def __init__(self, part: Jacobi, f: Next, most: int = 16) -> None:
        self.part, self.f, self.most = part, f, most
        self.said, self.stale, self.state = [*PROMPT, f(PROMPT, 0)], list[int](), dict[str, Any]()
        self.windows: list[list[int]] = []

    def step(self) -> None:
        done = len(self.said) - len(PROMPT)
        context = np.array(self.said, np.int64)
        ask = Ask(context, len(PROMPT), done, self.most, SamplingSpec(), 1, state=self.state, stale=self.stale)
        (found,) = self.part.propose([ask], None)
        guesses = list(found.tokens)
        self.windows.append(guesses)
        winners = [self.f([*self.said, *guesses[:i]], done + i) for i in range(len(guesses) + 1)]
        stood = next((i for i, (g, w) in enumerate(zip(guesses, winners)) if g != w), len(guesses))
        self.said += winners[: stood + 1]
        self.stale = winners[stood + 1 :]

    @property
    def answer(self) -> list[int]:
        return self.said[len(PROMPT) :]


@pytest.mark.parametrize("window", [1, 4, 8])
def test_windows_are_the_papers_iterates(window: int) -> None:
    """x'_i = f(x_<i, u_i) over the whole text at once; the longest unchanged beginning is final, and the window slides."""
    f = hashed(3)
    engine = Engine(Jacobi(window=window, pool=0), f)
    final, x = 1, [f(PROMPT, 0)] * 99  # the first guess may be anything; here it is the first token, again and again
    for _ in range(25):
        engine.step()
        assert engine.windows[-1] == x[final : final + window]
        known = final + window + 1  # a place has a new value where every one before it has a guess
        new = [f([*PROMPT, *x[:i]], i) for i in range(known)]
        final = 1 + next((i for i in range(final, known - 1) if new[i] != x[i]), known - 1)
        x = new + [new[-1]] * 99
        assert engine.answer == new[:final]
    assert engine.answer == sequential(f, len(engine.answer))


def test_no_more_passes_than_tokens_and_the_sequential_answer() -> None:
    for most in (2, 3, 50):
        for pool in (0, 64):
            f = hashed(most)
            engine = Engine(Jacobi(window=5, pool=pool), f)
            while len(engine.answer) < 60:
                engine.step()
            assert engine.answer == sequential(f, len(engine.answer))
            assert len(engine.windows) <= 59
            if most == 2:
                assert len(engine.windows) < 45


def test_what_is_left_of_a_window_by_hand() -> None:
    part, state = Jacobi(window=4, pool=0), dict[str, Any]()

    def ask(said: list[int], stale: Sequence[int]) -> list[int]:
        context = np.array(said, np.int64)
        (found,) = part.propose([Ask(context, 1, len(said) - 1, 16, SamplingSpec(), 1, state=state, stale=stale)], None)
        return list(found.tokens)

    assert ask([7, 1], ()) == [1, 1, 1, 1]
    assert ask([7, 1, 2], (5, 6, 8)) == [5, 6, 8, 8]
    assert ask([7, 1, 2, 5, 6], (9,)) == [9, 9, 9, 9]
    assert part.acts["stale"] == 4


def test_the_pool_guesses_the_run_that_was_drawn_last() -> None:
    part, state = Jacobi(window=3, pool=3), dict[str, Any]()

    def ask(said: list[int], stale: Sequence[int] = ()) -> list[int]:
        context = np.array(said, np.int64)
        (found,) = part.propose([Ask(context, 0, len(said), 16, SamplingSpec(), 1, state=state, stale=stale)], None)
        return list(found.tokens)

    assert ask([1, 2, 3]) == [3, 3, 3]
    assert ask([1, 2, 3, 4], (2, 8)) == [2, 8, 8], "3 and 4 began no run before; what was drawn behind 4 is kept"
    assert ask([1, 2, 3, 4, 2]) == [8, 8, 8], "drawn behind a wrong guess"
    assert len(state["jacobi"]) == 3
    assert part.acts["pooled"] == 1


@pytest.mark.parametrize("text", ["window=0", "window=17", "pool=-1", "size=1"])
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"draft=jacobi({text})").build()


class Wrong:
    """A draft that knows the answer, and guesses its next token, a wrong one, and one more."""

    model, guesses = None, 3

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer, self.acts = answer, dict[str, int]()
        self.seen: list[tuple[list[int], tuple[int, ...]]] = []

    def propose(self, asks: Sequence[Ask], run: object) -> list[Guesses]:
        (ask,) = asks
        self.seen.append((ask.context.tolist(), tuple(ask.stale)))
        right = self.answer[ask.output : ask.output + 1]
        return [Guesses((*right, 5, 6)[: ask.most])]

    def observe(self, proposed: int, accepted: int) -> None: ...


def test_an_engine_tells_what_the_target_drew_behind_a_wrong_guess(runtime: Runtime) -> None:
    """Beside the same model, greedy, over the text with the wrong guesses in it."""
    prompt = list(range(300, 320))
    answer = Bench(runtime).run([spec(1, prompt, max_tokens=12, temperature=0.0)])[1, 0]
    assert not {5, 6} & set(answer)
    draft = Wrong(answer)
    bench = Bench(runtime, draft=draft)
    assert bench.run([spec(1, prompt, max_tokens=12, temperature=0.0)])[1, 0] == answer
    assert draft.seen[0][1] == ()
    whole = [(context, stale) for context, stale in draft.seen[1:] if len(stale) == 2]
    assert len(whole) > 2
    for context, stale in whole:
        # The last token stands in the place of the wrong guess.
        texts = [[*context[:-1], 5], [*context[:-1], 5, 6]]
        found = Bench(runtime).run([spec(i, text, max_tokens=1, temperature=0.0) for i, text in enumerate(texts)])
        assert list(stale) == [found[0, 0][0], found[1, 0][0]]
