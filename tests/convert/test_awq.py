"""AWQ: the paper's rule worked by hand, folding that changes nothing, and less divergence than rounding alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.convert.test_convert import read_back
from tests.models.checkpoints import Checkpoint
from weft.conform.workload import PROSE
from weft.convert import awq, write
from weft.convert.awq import Changes, Inputs, calibrate, clipped, gather, scaled, search
from weft.convert.judge import Judged, law
from weft.convert.passes import Along, windows
from weft.convert.write import convert
from weft.front.text import ModelText
from weft.models import load_spec
from weft.models.formats import WeightFormat
from weft.models.layout import Part
from weft.models.quantized import extremes, multiples, quantize

INT4 = WeightFormat(4, 32)
NESTED = WeightFormat.parse("int4")
STORY = """There was once a miller who had three sons, and when he died he left them nothing but the mill, a donkey and a cat. The
eldest took the mill, the second the donkey, and the youngest had to be content with the cat. He sat down by the road and said to
himself that his brothers could earn their bread together, but that he, when he had eaten his cat and made a muff of its skin,
would have to die of hunger. The cat heard every word and looked up at him with a grave face. Do not be troubled, my master, she
said; give me a bag and have a pair of boots made for me, so that I can go through the thorns, and you will see that your share is
not so poor as you think. """


def noise(vocab: int) -> list[list[int]]:
    """Three windows of random tokens."""
    return [torch.randint(0, vocab, (32,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]


def test_scales_are_the_papers() -> None:
    """s = mean|x|^alpha / sqrt(max s * min s), alpha with the least |Q(W s)(x / s) - W x|^2: every alpha tried by hand."""
    torch.manual_seed(1)
    weight = torch.randn(24, 64)
    x = torch.randn(200, 64) * torch.logspace(-1, 1.3, 64)[torch.randperm(64)]
    inputs = Inputs(x.abs().sum(0), 200, [x[:50], x[50:]])
    s, alpha = search(weight, inputs, inputs.mean, INT4)
    errors = {}
    for i in range(20):
        mine = x.abs().mean(0) ** (i / 20)
        mine = mine / (mine.max() * mine.min()) ** 0.5
        out = (x / mine) @ quantize(weight * mine, INT4).dequantized().t()
        errors[i / 20] = (float((out - x @ weight.t()).pow(2).sum()), mine)
    best = min(errors, key=lambda key: errors[key][0])
    assert best > 0
    assert alpha == best
    torch.testing.assert_close(s, errors[best][1])
    assert errors[best][0] < 0.8 * errors[0.0][0]


def test_limits_are_the_best_of_their_grid() -> None:
    """Each group's own: the share of its largest magnitude that moves its part of the output least, tried one by one."""
    torch.manual_seed(2)
    weight, x = torch.randn(6, 64), torch.randn(100, 64)
    weight[2, 5] = 9.0
    grams = torch.stack([x[:, at : at + 32].t() @ x[:, at : at + 32] for at in (0, 32)])
    found = clipped(weight, grams, INT4)
    for n in range(6):
        for g in range(2):
            w, mine = weight[n, 32 * g : 32 * g + 32], x[:, 32 * g : 32 * g + 32]
            errors = {}
            for i in range(10):
                limit = w.abs().max() * (1 - i / 20)
                q = quantize(w.clamp(-limit, limit).unsqueeze(0), INT4).dequantized()[0]
                errors[float(limit)] = float((mine @ (q - w)).pow(2).sum())
            assert float(found[n, g]) == pytest.approx(min(errors, key=lambda key: errors[key]))
    assert bool((found < weight.view(6, 2, 32).abs().amax(-1)).any())


def test_nested_scales_are_the_best_of_their_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's scale and its groups' multiples together: all of them tried one by one; rounding gives those that were meant."""
    monkeypatch.setattr(awq, "SHRINKS", (1.0, 0.9, 0.8))
    torch.manual_seed(3)
    sizes = torch.tensor([1.0, 0.4, 0.1]).repeat_interleave(32)
    weight, x = torch.randn(12, 96) * sizes, torch.randn(100, 96) / sizes
    weight[1] *= 3
    weight[0, 32:64] *= 2.6
    weight[2, 70] = 4.0
    weight[3, :64] = 0
    weight[11] = 0
    grams = torch.stack([part.t() @ part for part in x.split(32, 1)])

    def error(w: torch.Tensor, largest: torch.Tensor | None) -> float:
        moved = (quantize(w, NESTED, largest).dequantized() - w).view(3, 32)
        return float(torch.einsum("gk,gkl,gl->", moved, grams, moved))

    found = scaled(weight, grams, NESTED)
    told = multiples(quantize(weight, NESTED, found).scales)
    assert told is not None
    assert not bool(found[11].any())
    meant = 15 * found[:11] / found[:11].abs().amax(1, keepdim=True)
    torch.testing.assert_close(told[0][:11], -meant, rtol=0, atol=1e-3)
    gain = [1.0] * 11
    for n in range(11):
        w = weight[n : n + 1]
        own = extremes(w.view(1, 3, 32))
        at, top = int(own.abs().argmax()), float(own.abs().max())
        errors = {}
        for i in range(3):
            base = top * (1 - i / 10) / 15
            least = [math.ceil(abs(value) / base) for value in own[0].tolist()]
            near = [[15] if g == at else {min(15, max(1, least[g] + d)) for d in range(-4, 4)} for g in range(3)]
            for times in itertools.product(*near):
                errors[i, times] = error(w, own.sign() * torch.tensor(times) * base)
        step, times = min(errors, key=lambda key: errors[key])
        assert float(found[n].abs().max()) == pytest.approx(top * (1 - step / 10)), n
        assert error(w, found[n : n + 1]) == pytest.approx(errors[step, times], rel=1e-4)
        gain[n] = errors[step, times] / error(w, None)
    assert sum(gain) < 0.87 * len(gain)


def test_inputs_are_those_of_the_products(bundled: Path, text: ModelText) -> None:
    """W x of what was gathered is what the decoder computes next, and means are over all rows."""
    along = Along(bundled, load_spec(bundled), 128)
    found = windows(text.tokenizer.encode(STORY, add_special=False), 64, 2)
    seen: dict[int, torch.Tensor] = {}
    last = len(along.decoder.spec.layers) - 1
    remove = along.decoder.hook("output", last, lambda batch, views: seen.update({0: views[0].clone()}))  # type: ignore[arg-type]
    before: dict[int, torch.Tensor] = {}
    undo = along.decoder.hook("output", last - 1, lambda batch, views: before.update({0: views[0].clone()}))  # type: ignore[arg-type]
    gathered = gather(along, found[-1:])
    remove()
    undo()
    tensors = along.decoder.tensors
    out = torch.cat(gathered[f"{last}.out"].rows) @ tensors[f"{last}.out"].t()
    down = torch.cat(gathered[f"{last}.down"].rows) @ tensors[f"{last}.down"].t()
    torch.testing.assert_close(before[0] + out + down, seen[0], rtol=1e-4, atol=1e-4)
    both = torch.cat(gathered[f"{last}.gate_up"].rows) @ tensors[f"{last}.gate_up"].t()
    gate, up = both.chunk(2, 1)
    torch.testing.assert_close(
        torch.nn.functional.silu(gate) * up, torch.cat(gathered[f"{last}.down"].rows), rtol=1e-4, atol=1e-4
    )
    for inputs in gathered.values():
        assert inputs.count == len(found[-1])
        torch.testing.assert_close(inputs.mean, torch.cat(inputs.rows).abs().mean(0))


def test_rows_are_kept_evenly(bundled: Path, text: ModelText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "ROWS", 30)
    along = Along(bundled, load_spec(bundled), 64, wanted=False)
    found = windows(text.tokenizer.encode(STORY, add_special=False), 47, 3)
    few = torch.cat(gather(along, found)["3.qkv"].rows)
    monkeypatch.setattr(awq, "ROWS", 1000)
    every = gather(along, found)["3.qkv"]
    assert every.count == 141
    torch.testing.assert_close(few, torch.cat(every.rows)[::4])


@pytest.mark.parametrize("name", ["llama_bias_tied", "gemma2", "qwen3_moe", "qwen2"])
def test_folding_alone_changes_nothing(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    """Scales are given up by norms (with an offset, too), rows of v and up, and biases: the logits stay."""
    folder = checkpoint(name).folder
    spec = load_spec(folder)
    plain, changed = Along(folder, spec, 32), Along(folder, spec, 32)
    judged = Judged(folder, changed)
    found = noise(spec.vocab)
    changes = calibrate(plain, found, WeightFormat(4, 16), judged.norm_dtypes)
    assert any(alpha > 0 for alpha in changes.chosen.values())
    assert {key.rpartition(".")[2] for key in changes.norms} <= {"norm_attention", "norm_mlp"}
    judged.put(None, Changes(changes.inputs, changes.outputs, changes.norms))
    moved = [name for name, before in judged._before.items() if not torch.equal(before, changed.decoder.tensors[name])]
    assert len(moved) >= 4
    for window in found:
        torch.testing.assert_close(law(changed, window), law(plain, window), rtol=1e-4, atol=1e-4)


def test_shared_heads_are_scaled_by_their_mean(checkpoint: Callable[[str], Checkpoint]) -> None:
    """`v` gives up one scale for all query heads that read it."""
    folder = checkpoint("llama_bias_tied").folder
    spec = load_spec(folder)
    share, dim = spec.heads // spec.kv_heads, spec.head_dim
    assert share > 1
    along = Along(folder, spec, 32, wanted=False)
    judged = Judged(folder, along)
    changes = calibrate(along, noise(spec.vocab), WeightFormat(4, 16), judged.norm_dtypes)
    gathered = gather(along, noise(spec.vocab))
    (key,) = [key for key, alpha in changes.chosen.items() if key.endswith(".out") and alpha > 0][:1]
    mean = gathered[key].mean.view(spec.heads, dim)
    wide = torch.cat([mean[h // share * share : (h // share + 1) * share].mean(0) for h in range(spec.heads)])
    s = wide ** changes.chosen[key]
    torch.testing.assert_close(changes.inputs[key], s / (s.max() * s.min()).sqrt())


def test_norms_of_16_bits_are_rounded_first(bundled: Path, text: ModelText, monkeypatch: pytest.MonkeyPatch) -> None:
    """What W takes is what a bfloat16 norm really gives up: the logits stay, though its weights are rounded."""
    monkeypatch.setattr(awq, "ALPHAS", (0.5,))
    monkeypatch.setattr(awq, "SHRINKS", (1.0,))
    spec = load_spec(bundled)
    plain, changed = Along(bundled, spec, 64), Along(bundled, spec, 64)
    judged = Judged(bundled, changed)
    found = windows(text.tokenizer.encode(STORY, add_special=False), 64, 1)
    changes = calibrate(plain, found, INT4, judged.norm_dtypes)
    assert changes.norms["0.norm_mlp"].dtype is torch.bfloat16
    judged.put(None, Changes(changes.inputs, changes.outputs, changes.norms))
    torch.testing.assert_close(law(changed, found[0]), law(plain, found[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [INT4, NESTED], ids=str)
def test_divergence_is_less_than_of_rounding(bundled: Path, text: ModelText, form: WeightFormat) -> None:
    """Calibrated on one text, judged on another.  (On held-out novels: bench/quantization.py.)"""
    spec = load_spec(bundled)
    plain, changed = Along(bundled, spec, 256), Along(bundled, spec, 256)
    judged = Judged(bundled, changed)
    prose = [text.tokenizer.encode(each, add_special=False)[:256] for each in (" ".join(PROSE), *PROSE[:2])]
    laws = [law(plain, window) for window in prose]
    judged.put(None)
    assert judged.compare(laws, prose)["kl"] < 1e-9
    judged.put(form)
    nearest = judged.compare(laws, prose)
    calibration = windows(text.tokenizer.encode(STORY, add_special=False), 128, 4)
    judged.put(form, calibrate(plain, calibration, form, judged.norm_dtypes))
    chosen = judged.compare(laws, prose)
    assert chosen["kl"] < 0.7 * nearest["kl"]
    judged.put(WeightFormat(8, 0))
    eight = judged.compare(laws, prose)
    assert eight["kl"] < 0.001
    assert eight["top1"] > 0.97


@pytest.mark.parametrize("text", ["int4:16:float", "int4:16"])
def test_a_calibrated_checkpoint_is_what_was_judged(
    text: str, checkpoint: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written and read back, a few rows at once: the rounded weights, the new norms, and biases."""
    folder, form = checkpoint("llama_bias_tied").folder, WeightFormat.parse(text)
    spec = load_spec(folder)
    along = Along(folder, spec, 32, wanted=False)
    judged = Judged(folder, along)
    monkeypatch.setattr(awq, "STEP", 20 * spec.width)
    monkeypatch.setattr(write, "CHUNK", 20 * spec.width)
    changes = calibrate(along, noise(spec.vocab), form, judged.norm_dtypes)
    meeting = (spec.heads + spec.kv_heads) * spec.head_dim
    if form.nested:
        assert not changes.limits
        qkv = Part("0.qkv", "0.qkv", tuple(along.decoder.tensors["0.qkv"].shape))
        rows = changes.applied(qkv, along.decoder.tensors["0.qkv"])
        own = extremes(rows.view(rows.shape[0], -1, 16)) == changes.largest["0.qkv"]
        assert bool(own[:meeting].all()), "queries and keys are clamped"
        assert not bool(own[meeting:].all())
    else:
        assert bool(torch.isinf(changes.limits["0.qkv"][:meeting]).all()), "queries and keys are clamped"
        assert bool(torch.isfinite(changes.limits["0.qkv"][meeting:]).all())
    convert(folder, tmp_path, form, changes)
    judged.put(form, changes)
    found = read_back(tmp_path)
    loaded = Along(tmp_path, load_spec(tmp_path), 32)
    for name, tensor in loaded.decoder.tensors.items():
        torch.testing.assert_close(tensor, along.decoder.tensors[name], rtol=0, atol=0, msg=name)
    for part in judged.parts:
        value = found[part.name]
        if not isinstance(value, torch.Tensor):
            value = value.dequantized()
        mine = along.decoder.tensors[part.target][part.first : part.first + part.shape[0]]
        torch.testing.assert_close(value.float(), mine, rtol=0, atol=0, msg=part.name)


def test_windows_spread_over_the_text() -> None:
    ids = list(range(1000))
    assert windows(ids, 2000, 5) == [ids]
    found = windows(ids, 100, 4)
    assert [window[0] for window in found] == [0, 300, 600, 900]
    assert all(len(window) == 100 for window in found)
    assert len(windows(ids, 100, 50)) == 10
