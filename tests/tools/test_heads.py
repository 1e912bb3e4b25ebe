"""What teaches Clover's heads: lessons by hand, a loss that falls, a file that the technique takes; what is never read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tools.test_distil import SECRET, corpus
from tools.tiny import heads
from tools.tiny.corpus import Corpus
from tools.tiny.heads import Course, fresh, judge, lesson, loss_of, outputs, product, save
from tools.tiny.mixture import Mixture
from tools.tiny.sampled import Sampled
from weft.draft.clover import KIND, Clover
from weft.exec.build import EngineConfig, build, prepare

__all__ = ["corpus"]  # a fixture
COURSE = Course(inner=16, window=4, places=48, heads=3, variation=0.5)


@pytest.fixture(scope="module")
def texts(
    teacher: LlamaForCausalLM,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.tiny.sampled.ROWS", 8)
        patch.setattr("tools.tiny.sampled.TOKENS", 40)
        samples = Sampled(tmp_path_factory.mktemp("samples"))
        samples.extend(teacher, Mixture(corpus, tokenizer), 1)
    return samples.read(1)


def test_a_lesson_by_hand() -> None:
    """Of the second text, places 1 and 3: up to four states back, two tokens on, and the states behind those."""
    tokens = torch.arange(20).view(2, 10)
    hidden = tokens[..., None].bfloat16()
    given = lesson(tokens, hidden, torch.tensor([1, 1]), torch.tensor([1, 3]), window=4, heads=2)
    assert given.seen.tolist() == [[False, False, True, True], [True] * 4]
    assert given.states[0, 2:, 0].tolist() == [10.0, 11.0]
    assert given.states[1, :, 0].tolist() == [10.0, 11.0, 12.0, 13.0]
    assert given.tokens.tolist() == [[12, 13], [14, 15]]
    assert given.wanted[..., 0].tolist() == [[12.0, 13.0], [14.0, 15.0]]


def test_the_loss_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): cross-entropy 7/4 ln 2, variation 1/4."""
    p, logits = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]]).log() + 3
    cross = 1.75 * torch.tensor(2.0).log()
    assert torch.allclose(loss_of(p, logits, 0.0), cross)
    assert torch.allclose(loss_of(p, logits, 0.5), 0.5 * cross + 0.5 * 0.25)


def test_a_few_steps_bring_the_heads_nearer(
    teacher: LlamaForCausalLM, texts: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weights, said = fresh(256, COURSE), list[str]()
    monkeypatch.setattr(heads, "LOG_STEPS", 1)
    monkeypatch.setattr(
        heads, "time", SimpleNamespace(monotonic=iter(range(10_000)).__next__)
    )  # other threads ask the real one
    heads.train(weights, teacher, texts, Course(**{**vars_of(COURSE), "minutes": 1.0}), said.append)
    overlap = [[float(x) for x in line.split("overlap ")[1].split()] for line in said if "overlap" in line]
    assert len(overlap) == 59
    assert min(overlap[-1]) > 3 * max(overlap[0])


def vars_of(course: Course) -> dict[str, float]:
    return {name: getattr(course, name) for name in Course.__dataclass_fields__}


def test_what_is_judged_is_how_often_a_guess_stands(teacher: LlamaForCausalLM) -> None:
    """Heads that were not taught are right by chance; what stands at temperature 1 is the overlap of two laws, added up here."""
    torch.manual_seed(1)
    weights = fresh(256, COURSE)
    prompts = torch.arange(300, 312).view(2, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "NEW_TOKENS", 8)
        found = judge(weights, teacher, prompts, COURSE.window, COURSE.heads)
        tokens, hidden = heads.write(teacher, prompts, 14, torch.ones(2), torch.Generator().manual_seed(5))
    total = torch.zeros(3)
    with torch.no_grad():
        for row in range(2):
            for at in range(5, 11):
                given = lesson(tokens, hidden, torch.tensor([row]), torch.tensor([at]), COURSE.window, 3)
                q = teacher.lm_head(outputs(weights, teacher, given)).softmax(-1)
                p = teacher(tokens[row : row + 1]).logits[0, at + 1 : at + 4].softmax(-1)
                total += torch.minimum(p, q).sum(-1)
    assert found["sampled"] == pytest.approx((total / 12).tolist(), abs=1e-3)
    assert max(found["greedy"]) < 0.2
    rounded = product(teacher, hidden[0]).softmax(-1)
    assert float((rounded - teacher.lm_head(hidden[0]).softmax(-1)).abs().sum(-1).mean()) < 0.02


def test_the_command_writes_a_file_that_the_technique_takes(
    corpus: Corpus, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.tiny.sampled.ROWS", 4)
    monkeypatch.setattr("tools.tiny.sampled.TOKENS", 160)
    monkeypatch.setattr(heads, "KINDS", ())
    out = tmp_path / "heads.safetensors"
    flags = ["--minutes", "0.01", "--inner", "8", "--window", "3", "--rounds", "2"]
    assert heads.main([str(corpus.data), str(out), "--teacher", str(bundled), *flags]) == 0
    tokens, _ = Sampled(tmp_path / "heads.sampled").read(2)
    read = AutoTokenizer.from_pretrained(bundled)
    assert not any(SECRET in read.decode(row) for row in tokens.tolist()), "held-out novels are never read"
    part = f"draft=clover(weights={str(out)!r})"
    found: Clover = build(prepare(EngineConfig(model=bundled, device="cpu", techniques=[part]))).engine.stack["draft"]
    assert found.header.inner == 8
    assert found.header.window == 3


def test_a_file_holds_what_was_taught(teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    weights = fresh(256, COURSE)
    rounded = {name: w.bfloat16() for name, w in weights.items()}
    save(rounded, teacher, tmp_path / "deep" / "heads.safetensors", KIND)
    part = Clover(weights=str(tmp_path / "deep" / "heads.safetensors"))
    target = build(prepare(EngineConfig(model=Path(teacher.name_or_path), device="cpu", dtype="float32")))
    from weft.exec.reading import Read

    part.attach(type("Shelf", (), {"target": Read(target.decoder)}))
    assert all(torch.equal(part._weights[name], x.detach().bfloat16().float()) for name, x in weights.items())
