"""A trimmed head: which tokens are kept, that their logits are the draft's own, that no other is guessed; live: equal tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.draft.law import Trimmed, reader
from bench.draft.stands import Guessing, judged, made, written
from tests.draft.test_speculative_sampling import LAWS, Watching, told
from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import shallow
from weft.draft.vocabtrim import VocabTrim
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.vocabulary import VocabularyShelf
from weft.front.text import ModelText
from weft.hub import resolve, resolve_draft
from weft.models.layout import workspace_bytes
from weft.models.weights import dense
from weft.registry import Part, parse
from weft.slots import Vocabulary
from weft.types import SamplingSpec

KEEP = 90


def letters(part: VocabTrim) -> VocabTrim:
    """Attached to a vocabulary in which a character is a token, and 0 an end."""
    words = Vocabulary(tuple(bytes([i]) for i in range(128)), frozenset(), (0,), lambda text: [ord(c) for c in text])
    part.attach(VocabularyShelf(lambda: words))
    return part


def test_the_commonest_tokens_of_a_text_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("banana cab")  # a: 4, n and b: 2, c and space: 1
    kept = [letters(VocabTrim(text=str(path), keep=n)).head for n in (1, 2, 3, 4, 5, 50)]
    assert ["".join(map(chr, ids)) for ids in kept] == ["\0", "\0a", "\0ab", "\0abn", "\0 abn", "\0 abcn"]


def test_texts_and_arguments_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_text("a" * 100)
    monkeypatch.setattr("weft.draft.vocabtrim.TEXT_BYTES", 99)
    for name in ("nowhere", "bytes", "large"):
        with pytest.raises(ConfigError, match=name):
            letters(VocabTrim(text=str(tmp_path / name)))
    for text in ("text=''", "text='x', keep=0", "text='x', guesses=33", "text='x', model=''", "text='x', size=1", ""):
        with pytest.raises(ConfigError):
            parse(f"draft=vocabtrim({text})").build()


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(tmp_path_factory.mktemp("near"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(STORY)
    return path


def part_of(near: Path, text: Path) -> Part:
    return Part("draft", "vocabtrim", (("text", str(text)), ("keep", KEEP), ("model", str(near)), ("guesses", 3)))


@pytest.fixture(scope="module", params=[("ref", "float32"), ("cpu", "float32"), ("cpu", "bfloat16")], ids=" ".join)
def drafting(request: pytest.FixtureRequest, near: Path, text: Path) -> Runtime:
    ops, dtype = request.param
    config = EngineConfig(
        model=resolve(None), dtype=dtype, max_model_len=1024, max_num_seqs=32, device="cpu", threads=1, ops=ops,
        techniques=(part_of(near, text),),
    )  # fmt: skip
    return build(prepare(config), vocabulary=ModelText.load(resolve(None)).vocabulary)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return ModelText.load(resolve(None)).tokenizer.encode(STORY, add_special=False)


def test_the_head_has_the_rows_of_what_is_kept_and_the_plan_their_bytes(drafting: Runtime, ids: list[int]) -> None:
    assert drafting.draft is not None
    spec_, tensors = drafting.draft.spec, drafting.draft.tensors
    counts = Counter(ids)
    ends = ModelText.load(resolve(None)).eos_ids
    common = sorted(counts, key=lambda t: (-counts[t], t))[: KEEP - len(ends)]
    assert spec_.kept == tuple(sorted({*common, *ends}))
    rows = dense(tensors["embed"])[list(spec_.kept)]
    assert torch.equal(dense(tensors["head"]), rows)
    setup = drafting.setup
    assert setup.draft is not None
    panels = setup.ops["draft"].panels
    whole = workspace_bytes(setup.draft, "float32", setup.limits.max_rows, 32, panels)
    assert drafting.draft.workspace_bytes < whole
    laws = 32 * 3 * spec_.vocab * 4
    assert setup.plan.draft_bytes == drafting.draft.weights_bytes + tensors["head"].nbytes + whole + laws


def test_equal_tokens_and_no_guess_outside(drafting: Runtime, near: Path, text: Path, ids: list[int]) -> None:
    specs = [
        spec(i, ids[3 * i : 3 * i + 30], seed=i, n=1 + (i % 9 == 5), max_tokens=20, **LAWS[i % 8]) for i in range(24)
    ]
    plain = Bench(drafting)
    wanted = plain.run(specs)
    for accept in ("race", "rejection"):
        bench = Bench(drafting, techniques=[str(part_of(near, text)), f"accept={accept}"])
        seen = Watching(bench)
        found = bench.run(specs)
        assert drafting.draft is not None
        kept = set(drafting.draft.spec.kept)
        assert len(seen.guessed) > 50
        assert all(set(said) <= kept for _, _, said in seen.guessed)
        acts = bench.engine.stack["draft"].acts
        assert acts["proposed"] > acts["accepted"] > 50
        if accept == "race":
            assert found == wanted
            assert told(bench) == told(plain)
            assert bench.steps < plain.steps


def test_guesses_are_the_draft_s_likeliest_of_what_is_kept(
    drafting: Runtime, near: Path, text: Path, ids: list[int]
) -> None:
    """Beside transformers: after the same text, the greedy choice among the kept tokens."""
    if drafting.setup.dtype != "float32":
        pytest.skip("near ties differ in 16 bits")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(near).float().eval()
    bench = Bench(drafting, techniques=[str(part_of(near, text))])
    seen = Watching(bench)
    bench.run([spec(i, ids[9 * i : 12 * i + 5], max_tokens=12, temperature=0.0) for i in range(5)])
    assert len(seen.guessed) > 10
    assert drafting.draft is not None
    kept = np.array(drafting.draft.spec.kept)
    for context, _, said in seen.guessed[::3]:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *said]])).logits[0, len(context) - 1 : -1].numpy()
        assert tuple(int(kept[row[kept].argmax()]) for row in logits) == said


def test_guesses_stand_as_often_as_the_laws_predict(text: Path, ids: list[int]) -> None:
    """Some 3,000 trials, of which chance alone moves the rate by 0.007, each of them what its noise makes of the laws that
    `transformers` reads, the draft's cut by hand."""
    runtime = made(Guessing("", f"draft=vocabtrim(text={str(text)!r}, keep={KEEP}, guesses=3)", lambda _: None))
    prompts = [ids[10 * i : 10 * i + 12] for i in range(8)]
    texts = written(runtime, prompts, range(8), SamplingSpec(max_tokens=380, temperature=0.8))
    draft = Trimmed(reader(resolve_draft("bundled")), runtime.engine.stack["draft"].head)
    found = judged(texts, reader(resolve(None)), draft, 0.8, weighs=False)
    assert found.trials > 2500
    assert found.slips == 0
    assert found.rate == pytest.approx(found.predicted, abs=0.02)
