"""The trie of prompts and answers: counts and guesses by hand, beside a count of every run, its ageing, and its tenants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.exec.conftest import Bench, spec
from weft.draft.trie import COUNT, Lookahead, Node, Tally
from weft.errors import ConfigError
from weft.exec.build import Runtime
from weft.registry import parse
from weft.slots import Ask
from weft.types import SamplingSpec


class Talk:
    """A sequence that a draft is asked about again and again."""

    def __init__(self, part: Lookahead, prompt: Sequence[int], salt: bytes = b"") -> None:
        self.part, self.said, self.prompt, self.salt = part, list(prompt), len(prompt), salt
        self.state: dict[str, object] = {}

    def guess(self, *tokens: int, most: int = 16) -> list[int]:
        """What is guessed after these tokens of the answer."""
        self.said += tokens
        law = SamplingSpec(stop_ids=(99,))
        context, output = np.array(self.said, np.int64), len(self.said) - self.prompt
        ask = Ask(context, self.prompt, output, most, law, 1, salt=self.salt, state=self.state)
        (found,) = self.part.propose([ask], None)
        return list(found.tokens)


def test_branches_by_hand() -> None:
    """After (1, 2) answers said 3 twice and 4 once, after (1, 2, 3) 5 and then 6: the likeliest path, while it has its share."""
    part = Lookahead(longest=2, shortest=1, guesses=3, share=0.6)
    for said in ((1, 2, 3, 5, 30), (1, 2, 3, 6, 30), (1, 2, 4, 7, 30)):
        Talk(part, [20]).guess(*said)
    asked = Talk(part, [21])
    assert asked.guess(1, 2) == [3], "3 has two thirds; below it 5 and 6 have half each"
    assert Talk(Lookahead(share=0.6), [1, 2]).guess() == []
    part = Lookahead(longest=2, shortest=1, guesses=3, share=0.5)
    for said in ((1, 2, 3, 5, 30), (1, 2, 3, 6, 30), (1, 2, 4, 7, 30)):
        Talk(part, [20]).guess(*said)
    assert Talk(part, [21]).guess(1, 2) == [3, 5, 30], "of equals the smaller id"
    assert Talk(part, [21]).guess(1, 2, most=2) == [3, 5]
    assert Talk(part, [21]).guess(8, 4) == [7, 30], "one token is looked up where two are not there"


def test_a_question_that_comes_again_is_answered_from_its_first_token() -> None:
    part = Lookahead(longest=4, guesses=5)
    first = Talk(part, [5, 6, 7, 8])
    assert first.guess(10) == []
    assert first.guess(11, 12, 99) == []
    assert Talk(part, [5, 6, 7, 8]).guess(10) == [11, 12, 99], "guesses end at an end"
    assert Talk(part, [5, 6, 7, 9]).guess() == []


def test_a_prompt_counts_more_than_answers_and_goes_with_its_request() -> None:
    part = Lookahead(longest=2, shortest=2, guesses=2, prompt=2.0, share=0.0)
    for _ in range(3):
        Talk(part, [50]).guess(1, 2, 9, 9)
    assert Talk(part, [1, 2, 3, 4, 0]).guess(1, 2) == [9, 9], "3 answers to a prompt's 2"
    assert Talk(part, [1, 2, 3, 4, 0, 1, 2, 3, 4, 0]).guess(1, 2) == [3, 4], "4 of 7"
    assert Talk(part, [50]).guess(3, 4) == [], "what that prompt said is gone"
    assert Talk(part, [1, -1, 2, 3, 0]).guess(-1, 2) == [], "a position without an id belongs to no run"


def runs(node: Node, path: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
    found = {path: node[COUNT]} if path else {}
    for token, child in node.items():
        if token != COUNT:
            found |= runs(child, (*path, token))
    return found


def test_counts_are_those_of_every_run() -> None:
    rng = np.random.default_rng(5)
    for depth in (1, 2, 5):
        text = rng.integers(0, 3, 60).tolist()
        trie, ends, at = Tally(depth), list[Node](), 0
        while at < len(text):  # in pieces, as an answer comes
            step = int(rng.integers(1, 6))
            ends = trie.learn(ends, text[at : at + step])
            at += step
        wanted: dict[tuple[int, ...], int] = {}
        for start in range(len(text)):
            for stop in range(start + 1, min(start + depth, len(text)) + 1):
                run = tuple(text[start:stop])
                wanted[run] = wanted.get(run, 0) + 1
        assert runs(trie.root) == wanted
        assert trie.size == len(wanted)
        trie.age()
        left = {run: count // 2 for run, count in wanted.items() if count > 1}
        assert runs(trie.root) == left
        assert trie.size == len(left)


def test_memory_is_bounded_and_the_largest_tenant_gives_way() -> None:
    part, rng = Lookahead(longest=2, guesses=4, nodes=600), np.random.default_rng(1)
    for i in range(20):
        Talk(part, [1], b"small").guess(1, 2, 3, 4, 5, 6)
        Talk(part, [1], b"large").guess(*rng.integers(10, 99, 60).tolist())
        assert (
            sum(len(runs(t.root)) for t in part._answers.values()) <= sum(t.size for t in part._answers.values()) <= 300
        )
        assert Talk(part, [7], b"small").guess(2, 3) == [4, 5, 6], i


def test_prompts_share_their_half_while_they_live() -> None:
    """Of 60 nodes 30 are for prompts, and a token takes up to 5: six tokens, and once 17 nodes are taken two."""
    part = Lookahead(longest=2, guesses=3, nodes=60)
    first = Talk(part, [1, 2, 3, 9, 1, 2])
    assert first.guess() == [3, 9, 1]
    assert sum(t.size for t in part._prompts) == 17
    second = Talk(part, [11, 12, 13, 14, 11, 12])
    assert second.guess() == []
    assert Talk(part, [7, 1, 2, 3, 9, 8, 1, 2]).guess() == [], "what stands before the last tokens is not counted"
    del first, second
    assert Talk(part, [11, 12, 13, 14, 11, 12]).guess() == [13, 14, 11]


def test_tenants_never_make_guesses_for_each_other() -> None:
    part = Lookahead()
    Talk(part, [5, 6, 7], b"a").guess(10, 11, 12, 13)
    assert Talk(part, [5, 6, 7], b"b").guess(10, 11) == []
    assert Talk(part, [5, 6, 7], b"a").guess(10, 11) == [12, 13]


@pytest.mark.parametrize("text", ["longest=1", "guesses=0", "guesses=17", "nodes=0", "share=1.5", "prompt=0", "size=1"])
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"draft=trie({text})").build()


def test_live_a_tenant_s_answers_guess_for_that_tenant_alone(runtime: Runtime) -> None:
    """The same prompt again: nearly every token is guessed for the same tenant, and none for another one."""
    bench = Bench(runtime, techniques=["draft=trie"])
    acts = bench.engine.stack["draft"].acts
    plain = Bench(runtime).run([spec(1, range(300, 340), max_tokens=40, seed=7, temperature=0.9)])
    counts = []
    for i, salt in enumerate((b"a", b"b", b"a")):
        before, steps = acts["accepted"], bench.steps
        found = bench.run([spec(i, range(300, 340), max_tokens=40, seed=7, temperature=0.9, salt=salt)])
        assert found[i, 0] == plain[1, 0]
        counts.append((acts["accepted"] - before, bench.steps - steps))
    assert counts[0] == counts[1], "what tenant a said is nothing to tenant b"
    assert counts[2][0] > counts[0][0] + 20
    assert counts[2][1] < counts[0][1] / 2
