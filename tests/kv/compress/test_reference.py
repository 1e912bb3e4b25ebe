"""StreamingLLM and H2O beside transformers: its model, its attention probabilities, and a cache edited by hand at every cut.

Legend.  E: entries in the cache.  T: rows of a piece between two cuts.  H: query heads.  KV: kv heads.  D: head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.exec.conftest import Bench, spec
from tests.models.checkpoints import Checkpoint, make
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.models.decoder import Seam

LENGTH = 150
FAMILIES = ("llama", "llama_yarn", "qwen3", "gemma2")
"""Gemma 2 has sliding windows in half of its layers, which compression leaves alone."""
Edit = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Runtime]:
    checkpoint = make(request.param, tmp_path_factory.mktemp(request.param))
    config = EngineConfig(model=checkpoint.folder, dtype="float32", max_model_len=256, device="cpu", threads=1)
    return checkpoint, build(prepare(config))


def prompt() -> list[int]:
    return torch.randint(0, 211, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()


def ours(runtime: Runtime, tokens: list[int], technique: str) -> Tensor:
    """Logits of every position, as a prompt passes through the engine."""
    found = torch.zeros(len(tokens), 211)

    def see(batch: object, tensors: tuple[Tensor, ...]) -> None:
        found[batch.positions_T[batch.logit_rows_N]] = tensors[0]  # type: ignore[attr-defined]

    remove = runtime.decoder.hook(Seam.LOGITS, len(runtime.setup.spec.layers) - 1, see)
    try:
        bench = Bench(runtime, techniques=[technique], share=False)
        bench.run([spec(1, tokens, temperature=0.0, max_tokens=1, prompt_logprobs=0)])
    finally:
        remove()
    return found


class Reference:
    """transformers' model over pieces between cuts.  After a piece `edit` gets (layer, keys, values [KV, E, D], mass [KV, E])."""

    def __init__(self, checkpoint: Checkpoint, first: int) -> None:
        self.model, self.config, self.first = checkpoint.model, checkpoint.model.config, first
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * self.config.num_hidden_layers
        self.full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.mixed = len(self.full) < len(kinds)
        self.mass: dict[int, Tensor] = {}

    @torch.no_grad()
    def logits(self, tokens: list[int], cuts: list[int], edit: Edit) -> Tensor:
        cache, out, start = DynamicCache(), [], 0
        for stop in [*cuts, len(tokens)]:
            count = stop - start
            held = cache.layers[self.full[0]].keys.shape[2] if start else 0
            full = torch.cat((torch.zeros(count, held), torch.ones(count, count).triu(1) * -torch.inf), 1)
            full = full.nan_to_num(0.0, neginf=torch.finfo(torch.float32).min)[None, None]
            gap = torch.arange(start, stop)[:, None] - torch.arange(stop)[None, :]
            window = self.config.sliding_window if self.mixed else 1
            slid = torch.where((gap >= 0) & (gap < window), 0.0, torch.finfo(torch.float32).min)[None, None]
            found = self.model(
                torch.tensor([tokens[start:stop]]),
                past_key_values=cache,
                position_ids=torch.arange(start, stop)[None],
                attention_mask={"full_attention": full, "sliding_attention": slid} if self.mixed else full,
                output_attentions=True,
                use_cache=True,
            )
            out.append(found.logits[0].float())
            for layer in self.full:
                self._weigh(layer, found.attentions[layer][0], start)
                if stop < len(tokens):
                    held_layer = cache.layers[layer]
                    k, v, self.mass[layer] = edit(layer, held_layer.keys[0], held_layer.values[0], self.mass[layer])
                    held_layer.keys, held_layer.values = k[None], v[None]
            start = stop
        return torch.cat(out)

    def _weigh(self, layer: int, shares: Tensor, start: int) -> None:
        """Add probabilities [H, T, E] of rows from position `first` on to the masses of the layer."""
        entries = shares.shape[-1]
        counted = shares[:, max(0, self.first - start) :].double()
        sums = counted.view(self.config.num_key_value_heads, -1, counted.shape[1], entries).sum((1, 2))
        old = self.mass.get(layer, torch.zeros(sums.shape[0], 0, dtype=torch.float64))
        sums[:, : old.shape[1]] += old
        self.mass[layer] = sums


def grid(stay: int, every: int) -> Iterator[int]:
    """Cuts within the prompt."""
    yield from (c for c in range(every, LENGTH, every) if c > stay)


def test_streaming_llm(both: tuple[Checkpoint, Runtime]) -> None:
    """The first 3 and the newest 30 entries stay, and sinks turn by what went between them: k -> k cos + rot(k) sin."""
    checkpoint, runtime = both
    tokens, rotary = prompt(), checkpoint.model.model.rotary_emb

    def edit(layer: int, k: Tensor, v: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gone = k.shape[1] - 33
        angle = torch.cat([gone * rotary.inv_freq.float()] * 2)
        sinks = k[:, :3]
        half = sinks.shape[-1] // 2
        turned = sinks * angle.cos() + torch.cat((-sinks[..., half:], sinks[..., :half]), -1) * angle.sin()
        return torch.cat((turned, k[:, -30:]), 1), torch.cat((v[:, :3], v[:, -30:]), 1), mass[:, :33]

    wanted = Reference(checkpoint, 0).logits(tokens, list(grid(33, 16)), edit)
    found = ours(runtime, tokens, "kv.compress=streaming_llm(sinks=3,window=30,every=16)")
    assert (found - wanted).abs().max() < 2e-4
    assert (checkpoint.logits(tokens) - wanted).abs().max() > 0.1, "dropping entries is felt"


@pytest.mark.parametrize("observe", [None, 20])
def test_h2o(both: tuple[Checkpoint, Runtime], observe: int | None) -> None:
    """In each head the newest 16 stay, and the 14 others that transformers' probabilities, added up, put first."""
    checkpoint, runtime = both
    tokens = prompt()
    sets: set[tuple[int, ...]] = set()

    def edit(layer: int, k: Tensor, v: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        older = k.shape[1] - 16
        rows = []
        for head in range(k.shape[0]):
            best = sorted(range(older), key=lambda e: (-float(mass[head, e]), e))[:14]
            sets.add(tuple(sorted(best)))
            rows.append([*sorted(best), *range(older, k.shape[1])])
        at = torch.tensor(rows)
        wide = at[:, :, None].expand(-1, -1, k.shape[2])
        return k.gather(1, wide), v.gather(1, wide), mass.gather(1, at)

    cuts = list(grid(30, 12))
    first = 0 if observe is None else cuts[0] - observe
    wanted = Reference(checkpoint, first).logits(tokens, cuts, edit)
    found = ours(runtime, tokens, f"kv.compress=h2o(heavy=14,recent=16,every=12,observe={observe})")
    assert (found - wanted).abs().max() < 2e-4
    assert len(sets) > 3, "heads keep entries of their own"
    assert (checkpoint.logits(tokens) - wanted).abs().max() > 0.1
