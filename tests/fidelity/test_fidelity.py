"""`weft fidelity`: formulas by hand, laws against transformers, and the command on stacks that change nothing or a little."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.running import weft
from weft.cli.fidelity import _windows
from weft.exec.build import EngineConfig, build, prepare
from weft.fidelity import measure as m
from weft.fidelity import recall as r
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve

KEYS = {
    "kl_mean", "kl_ci95", "top1", "ppl_ratio", "recall", "recall_reference", "output_len_ratio", "output_ended",
    "speed_ratio", "kv_bytes_ratio",
}  # fmt: skip


def told(*args: str) -> dict[str, Any]:
    done = weft("fidelity", "--json", "--threads", "1", *args, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.keys() >= KEYS
    return found


# ------------------------------------------------------------------------------------------ formulas


def scores(*kl: float, top: bool = True, nll: tuple[float, float] = (1.0, 1.0)) -> list[m.Scores]:
    return [m.Scores(x, top, *nll) for x in kl]


def test_a_token_by_hand() -> None:
    """Two laws over two tokens: (1/2, 1/2) and (1/4, 3/4)."""
    p, q = torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(3)])
    found = m._score(p, q, 1)
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert (found.reference_nll, found.nll) == pytest.approx((math.log(2), math.log(4 / 3)))
    assert not found.top
    assert m._score(q, q, 0).kl == 0
    assert m._score(torch.tensor([-math.inf, 0.0]), q, 1).kl == pytest.approx(math.log(4 / 3))


def test_a_summary_by_hand() -> None:
    found = m.summary([scores(0.1, 0.3, nll=(1.0, 1.5)), scores(0.2, top=False, nll=(2.0, 2.0))])
    assert found["kl_mean"] == pytest.approx(0.2)
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["ppl_ratio"] == pytest.approx(math.exp((1.5 + 1.5 + 2.0) / 3 - (1.0 + 1.0 + 2.0) / 3))
    low, high = found["kl_ci95"]
    assert pytest.approx(low) == 0.2, "every draw of windows of mean 0.2 has mean 0.2"
    assert pytest.approx(high) == 0.2


def test_an_interval_covers_what_windows_vary_by() -> None:
    """Twenty windows of one token, half 0 and half 1: the mean's deviation is sqrt(0.25 / 20) = 0.112."""
    low, high = m.interval([scores(float(i % 2)) for i in range(20)])
    assert low == pytest.approx(0.5 - 1.96 * 0.112, abs=0.06)
    assert high == pytest.approx(0.5 + 1.96 * 0.112, abs=0.06)


def test_windows_end_with_the_text_that_is_judged() -> None:
    (prompt, judged), (rest, end) = _windows([list(range(132))], 100)
    assert [*prompt, *judged] == list(range(100))
    assert len(judged) == 25
    assert [*rest, *end] == list(range(100, 132))
    assert len(end) == 8
    assert _windows([list(range(23))], 100) == []
    assert len(_windows([list(range(600))], 600)[0][1]) == 64


# ------------------------------------------------------------------------------------------ recall


def test_questions_hold_their_facts_and_are_as_long_as_asked() -> None:
    words: list[str] = []

    def encode(text: str) -> list[int]:
        words.append(text)
        return [1000 + len(words)] * 8

    asked = r.questions(encode, lambda text: encode(text)[:5], range(50), 200, 6)
    assert len(asked) == 6
    for question in asked:
        assert len(question.ids) == 200
        assert len({i for i in question.ids if i >= 1000}) == r.FACTS + 1
    facts = [w for w in words if w.startswith("\n\nThe number of")]
    assert len(facts) == 6 * r.FACTS
    assert all(any(f"is {q.answer}." in fact for fact in facts) for q in asked)
    assert r.questions(encode, lambda text: encode(text)[:5], range(50), 200, 6)[0].answer == asked[0].answer


@pytest.mark.parametrize(
    ("text", "right"),
    [("0471", True), ("The number is 0471.", True), ("471", False), ("4711 0471", False), ("", False)],
)
def test_an_answer_is_its_first_number(text: str, right: bool) -> None:
    assert r.Question((), "0471").right(text) is right


def test_a_recall_counts_where_the_reference_recalls_enough() -> None:
    assert m.counted(0.5, 0.8) == 0.5
    assert m.counted(0.5, 0.79) is None


def test_lengths_say_something_where_answers_end() -> None:
    assert m.ratio((30.0, 0.5), (20.0, 0.25)) == 1.5
    assert m.ratio((160.0, 0.0), (160.0, 0.0)) is None


# ------------------------------------------------------------------------------------------ laws


def test_the_laws_are_those_of_transformers() -> None:
    """Along a text whose tokens are set, each position's logits are the other implementation's."""
    folder = resolve(None)
    ids = Tokenizer.load(folder).encode(
        "The ship lay in the bay, and nobody on the shore had seen it come in.", add_special=True
    )
    path = m.Path(
        build(prepare(EngineConfig(model=folder, dtype="float32", device="cpu", threads=1, max_model_len=128)))
    )
    (found,) = path.laws([(ids[:8], ids[8:])])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert sorted(found) == list(range(len(ids) - 8))
    for i, logits in found.items():
        assert torch.allclose(logits, theirs[7 + i], atol=2e-4), i


# ------------------------------------------------------------------------------------------ the command


def test_an_exact_technique_changes_nothing() -> None:
    found = told("--with", "draft=ngram", "--length", "256", "--questions", "5", "--new", "8", "--rounds", "1")
    assert found["kl_mean"] == 0
    assert found["kl_ci95"] == [0, 0]
    assert found["top1"] == found["ppl_ratio"] == found["output_len_ratio"] == 1
    assert found["recall_reference"] >= r.LEAST, (
        "the bundled model recalls at a quarter of the length that it was trained on"
    )
    assert found["recall"] == found["recall_reference"]
    assert (found["fidelity"], found["redefines"]) == ("EXACT", [])
    assert found["output_ended"] >= 0.5, "answers that are all cut short have one length, whatever is done to them"
    assert found["acts"]["draft=ngram.proposed"] > 0


def test_what_drops_all_but_the_newest_forgets(tmp_path: Path) -> None:
    """A window of 64 tokens: less KV, another law, and no facts from before it."""
    texts = tmp_path / "texts.json"
    texts.write_text(
        json.dumps(["The old man told us of the island where he had lived as a boy with his father. " * 20])
    )
    found = told(
        "--with", "kv.compress=recent(window=64,every=16)", "--length", "256", "--questions", "8", "--new", "8",
        "--rounds", "1", "--prompts", str(texts),
    )  # fmt: skip
    assert found["kl_mean"] > 0
    assert found["kl_ci95"][0] <= found["kl_mean"] <= found["kl_ci95"][1]
    assert 0 < found["kv_bytes_ratio"] < 0.6
    assert found["recall"] < found["recall_reference"]
    assert found["acts"]["kv.compress=recent.entries_dropped"] > 0
    assert abs(found["output_len_ratio"] - 1) > 0.02, "what is wrecked answers at another length"
    assert found["fidelity"] == "APPROX"


def test_beyond_what_the_model_learned_only_speed_and_memory_are_measured() -> None:
    found = told("--with", "kv.store=int8", "--length", "1100", "--new", "4", "--rounds", "1")
    assert all(found[key] is None for key in KEYS - {"speed_ratio", "kv_bytes_ratio"})
    assert found["speed_ratio"] > 0
    assert found["kv_bytes_ratio"] == pytest.approx(68 / 256, abs=0.01)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--with", "draft=nothing"), "no draft=nothing"),
        (("--with", "draft=ngram", "--model", "bench/shapes/qwen3-0.6b.json"), "needs a checkpoint with a tokenizer"),
        (("--with", "draft=ngram", "--length", "8"), "32"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(args: tuple[str, ...], said: str) -> None:
    done = weft("fidelity", *args)
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_texts_that_are_too_short_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Too short.\n")
    done = weft("fidelity", "--with", "draft=ngram", "--prompts", str(tmp_path / "texts.txt"))
    assert done.returncode == 2
    assert "no text has 24 tokens" in done.stderr


def test_a_table_for_people() -> None:
    done = weft(
        "fidelity", "--with", "draft=ngram", "--length", "64", "--questions", "0", "--new", "4", "--rounds", "1"
    )
    assert done.returncode == 0, done.stderr
    for word in ("divergence", "recall", "speed", "KV bytes", "draft=ngram.proposed"):
        assert word in done.stdout
