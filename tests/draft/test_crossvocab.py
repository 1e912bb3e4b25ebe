"""A draft with a tokenizer of its own: the map and the law by hand, guesses beside those of the same draft with the target's ids,
equal tokens, the joint law under a rule that weighs, and acceptance as the laws predict it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.draft.crossvocab import foreign
from bench.draft.law import Translated, reader
from bench.draft.stands import judged, written
from tests.accept.test_rejection import exact_law
from tests.draft.test_speculative_sampling import LAWS, Watching
from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import pair, stranger
from weft.conform.law import fit
from weft.draft.crossvocab import CrossVocab, translation
from weft.errors import ConfigError
from weft.exec.ahead import Reader
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.vocabulary import VocabularyShelf
from weft.front.text import ModelText, vocabulary_of
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.models.layout import workspace_bytes
from weft.registry import parse
from weft.slots import Translation, Vocabulary
from weft.types import SamplingSpec


def words(*tokens: str, ends: tuple[int, ...] = (), marks: tuple[int, ...] = ()) -> Vocabulary:
    return Vocabulary(tuple(t.encode() for t in tokens), frozenset({*ends, *marks}), ends, lambda text: [])


TARGET = words("</s>", "a", "b", "ab", "c", "abc", "<m>", "b", "", ends=(0,), marks=(6,))
SECOND = words("c", "ab", "<e>", "a", "<m>", "zz", ends=(2,), marks=(4,))


def test_the_map_by_hand() -> None:
    """Shared: c (0, 4), ab (1, 3), the ends (2, 0), a (3, 1).  abc is read as its c, b as nothing at all, <m> as itself."""
    found = translation(TARGET, SECOND, "x")
    assert found == Translation((2, 3, 2, 1, 0, 0, 4, 2, 2), own=(0, 1, 2, 3), means=(4, 3, 0, 1))
    part = CrossVocab(model="x")
    shelf = VocabularyShelf(lambda: TARGET)
    shelf.of = lambda model: SECOND  # type: ignore[method-assign]
    part.attach(shelf)
    assert part.translation == found
    two = words("</s>", "a", "<end>", ends=(0, 2))
    assert translation(two, words("a", "<end>", "</s>", ends=(2, 1)), "x").reads == (2, 0, 1), "each end as itself"
    assert translation(two, words("a", "<e>", ends=(1,)), "x").reads == (1, 0, 1), "and as the draft's where it has one"
    with pytest.raises(ConfigError, match="share no token's text"):
        translation(TARGET, words("x", "y", ends=(1,)), "x")


def test_the_law_by_hand() -> None:
    """q' = 0.1 c, 0.3 ab, 0.2 end, 0.15 a, 0.05 <m>, 0.2 zz; of 0.75 that is shared: 4/15, 1/5, 2/5, 2/15 of end, a, ab, c."""
    between = Reader(translation(TARGET, SECOND, "x"), 9, torch.device("cpu"))
    own = torch.tensor([[0.1, 0.3, 0.2, 0.15, 0.05, 0.2]]).log() + 3
    found = torch.softmax(between.logits(own), -1)[0].tolist()
    assert found == pytest.approx([4 / 15, 1 / 5, 0, 2 / 5, 2 / 15, 0, 0, 0, 0])


@pytest.mark.parametrize("text", ["guesses=0", "guesses=33", "model=''", "size=1"])
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"draft=crossvocab({text})").build()


def part_of(folder: Path, guesses: int = 3, name: str = "crossvocab") -> str:
    return f"draft={name}(model={str(folder)!r}, guesses={guesses})"


def made(*techniques: str, model: Path | None = None, ops: str = "auto", own: bool = True) -> Runtime:
    folder = model or resolve(None)
    config = EngineConfig(
        model=folder, dtype="float32", max_model_len=512, max_num_seqs=32, device="cpu", threads=1, ops=ops,
        techniques=techniques, draft_control="off",
    )  # fmt: skip
    of: Callable[[Path], Vocabulary] | None = vocabulary_of if own else None
    return build(prepare(config), vocabulary=ModelText.load(folder).vocabulary, vocabulary_of=of)


def bench_of(runtime: Runtime, *techniques: str) -> Bench:
    """Over a runtime's models, with the draft that has compared the vocabularies."""
    return Bench(runtime, draft=runtime.engine.stack["draft"], techniques=techniques)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("whole"), 3830)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("part"), 1000)


def test_the_same_draft_under_other_ids_guesses_the_same(whole: Path, ids: list[int]) -> None:
    """Its embedding permuted with its tokenizer: every guess is that of the draft whose ids are the target's."""
    specs = [spec(i, ids[3 * i : 3 * i + 30], seed=i, max_tokens=20, **LAWS[i % 8]) for i in range(16)]
    seen = []
    for runtime in (made(part_of(whole)), made("draft=speculative_sampling(guesses=3)")):
        bench = bench_of(runtime, *[str(p) for p in runtime.engine.stack.parts])
        watching = Watching(bench)
        seen.append((bench.run(specs), watching.guessed))
    assert len(seen[0][1]) > 50
    assert seen[0] == seen[1]


@pytest.mark.parametrize("ops", ["auto", "ref"])
def test_equal_tokens_and_guesses_of_shared_text_alone(part: Path, ids: list[int], ops: str) -> None:
    specs = [spec(i, ids[3 * i : 3 * i + 30], seed=i, n=1 + i % 2, max_tokens=16, **LAWS[i % 8]) for i in range(16)]
    runtime = made(part_of(part), ops=ops)
    mine, theirs = (json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (resolve(None), part))
    shared = {mine[text] for text in theirs}
    wanted = Bench(made(ops=ops)).run(specs)
    for accept in ("race", "rejection"):
        bench = bench_of(runtime, part_of(part), f"accept={accept}")
        seen = Watching(bench)
        found = bench.run(specs)
        assert len(seen.guessed) > 50
        assert all(set(said) <= shared for _, _, said in seen.guessed)
        assert accept == "rejection" or found == wanted
    acts = bench.engine.stack["draft"].acts
    assert acts["proposed"] > acts["accepted"] > 100


def test_a_tokenizer_of_its_own_and_weights_by_lot(tmp_path: Path, ids: list[int]) -> None:
    """BPE that the `tokenizers` library trains here; the draft is another architecture with a window.  Equal tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([STORY[::-1], STORY], trainer)
    stranger(tmp_path, vocab=backend.get_vocab_size())
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    runtime = made(part_of(tmp_path))
    draft = runtime.engine.stack["draft"]
    text = {i: t for t, i in backend.get_vocab().items()}
    vocabulary = json.loads((resolve(None) / "tokenizer.json").read_text())["model"]["vocab"]
    pairs = dict(zip(draft.translation.own, draft.translation.means, strict=True))
    end = backend.token_to_id("<eos>")
    assert {text[o]: m for o, m in pairs.items() if o != end} == {
        t: vocabulary[t] for t in text.values() if t in vocabulary
    }
    assert pairs[end] in ModelText.load(resolve(None)).eos_ids
    specs = [spec(i, ids[5 * i : 5 * i + 40], seed=i, max_tokens=12, **LAWS[i % 8]) for i in range(8)]
    bench = bench_of(runtime, part_of(tmp_path))
    assert bench.run(specs) == Bench(made()).run(specs)
    assert draft.acts["proposed"] > 50


def test_the_memory_plan_has_its_logits_and_other_drafts_need_the_same_ids(part: Path) -> None:
    setup = prepare(
        EngineConfig(model=resolve(None), dtype="float32", max_num_seqs=32, threads=1, techniques=[part_of(part)])
    )
    assert setup.draft is not None
    assert setup.draft.vocab == 1266
    runtime = made(part_of(part))
    assert runtime.draft is not None
    own = workspace_bytes(setup.draft, "float32", setup.limits.max_rows, 32, setup.ops["draft"].panels)
    assert setup.plan.draft_bytes == runtime.draft.weights_bytes + own + 32 * (3 + 1) * 4096 * 4
    with pytest.raises(ConfigError, match="or say draft=crossvocab"):
        made(part_of(part, name="speculative_sampling"))
    with pytest.raises(ConfigError, match="without what reads the tokenizer"):
        made(part_of(part), own=False)


def test_live_the_joint_law(tmp_path: Path) -> None:
    """24 tokens of the target, 20 of them the draft's under ids by lot; the prompt has some that the draft does not know."""
    model = pair(tmp_path / "target", tmp_path / "draft")
    kept = torch.randperm(24, generator=torch.Generator().manual_seed(4))[:20]
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][kept].contiguous()
    save_file(tensors, tmp_path / "draft" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "draft" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 20}))
    letters = [chr(97 + i) for i in range(24)]
    known: dict[str, Any] = {
        "vocabulary": lambda: replace(words(*letters), ends=(99,)),
        "vocabulary_of": lambda folder: words(*[letters[int(i)] for i in kept]),
    }
    techniques = [part_of(tmp_path / "draft", 2), "accept=rejection"]
    given: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 64, "device": "cpu", "threads": 1}
    runtime = build(prepare(EngineConfig(model=tmp_path / "target", techniques=techniques, **given)), **known)
    prompt, law, count = [3, 7, 11, 7, 3, 9, 7], {"temperature": 0.9, "top_k": 4}, 1500
    assert not set(prompt) <= set(kept.tolist())
    bench = bench_of(runtime, *techniques)
    found = bench.run([spec(i, prompt, seed=i, max_tokens=4, **law) for i in range(count)])
    assert bench.engine.stack["draft"].acts["accepted"] > 300
    wanted = exact_law(model, prompt, 0.9, 4, 3)
    assert fit([tuple(found[i, 0][:3]) for i in range(count)], wanted).ok


@pytest.mark.long
@pytest.mark.parametrize("accept", ["race", "rejection"])
def test_guesses_stand_as_often_as_the_laws_predict(part: Path, ids: list[int], accept: str) -> None:
    """Some 3,000 trials; `transformers` reads both models, and the map is made here out of the two files."""
    runtime = made(part_of(part), f"accept={accept}")
    mine, theirs = (json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (resolve(None), part))
    text = {i: t for t, i in mine.items()}
    reads = [
        next((theirs[text[i][at:]] for at in range(len(text[i])) if text[i][at:] in theirs), 0) for i in range(4096)
    ]
    special = {token["content"] for token in json.loads((part / "tokenizer.json").read_text())["added_tokens"]}
    known = [t for t in theirs if t not in special or t == "<|end|>"]
    shared = Translation(reads, [theirs[t] for t in known], [mine[t] for t in known])
    prompts = [ids[10 * i : 10 * i + 12] for i in range(10)]
    texts = written(runtime, prompts, range(10), SamplingSpec(max_tokens=300, temperature=0.8))
    draft = Translated(reader(part), shared, 4096)
    found = judged(texts, reader(resolve(None)), draft, 0.8, weighs=accept == "rejection")
    assert found.trials > 2000
    assert found.slips == 0
    assert found.rate == pytest.approx(found.predicted, abs=0.02)
