"""LoRA: the rule by hand, equality with merged weights, independence of neighbours, and caches that never mix adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from tests.adapt.adapters import Made, make
from tests.exec.conftest import STORY, spec
from tests.models.checkpoints import make as checkpoint
from weft.adapt.lora import LoRA
from weft.config import Stacks, build_stack
from weft.core.engine import Engine
from weft.errors import ConfigError, InvariantError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.deltas import Deltas
from weft.exec.mirror import Mirrored
from weft.exec.runner import TorchExecutor
from weft.exec.thread import step
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.slots import Site
from weft.types import Finished, Rejected, RequestSpec, Tokens

Laws = dict[tuple[int, int], torch.Tensor]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def part(name: str) -> str:
    return f"adapt=lora(name={name!r})"


def ask(id: int, ids: Sequence[int], adapter: str | None = None, also: Sequence[str] = (), **law: Any) -> RequestSpec:
    law = {"temperature": 0.0, "max_tokens": 12, **law}
    techniques = (*(() if adapter is None else (part(adapter),)), *also)
    return msgspec.structs.replace(spec(id, ids, **law), techniques=techniques)


def serve(
    runtime: Runtime, specs: Sequence[RequestSpec], *, techniques: Sequence[str] = (), blocks: int | None = None,
    share: bool = True, **limits: int,
) -> tuple[dict[tuple[int, int], list[int]], Laws, Engine]:  # fmt: skip
    """({(id, index): tokens}, logits by (seed, output index), the engine) of requests on an engine of their own."""
    setup = runtime.setup
    stacks = Stacks(build_stack(techniques), {"adapt": runtime.adapters})
    engine = Engine(
        setup.groups, blocks or setup.plan.kv_blocks, replace(setup.limits, **limits), stacks,
        layers=len(setup.spec.layers), vocab=setup.spec.vocab, share=share,
    )  # fmt: skip
    executor = TorchExecutor({"target": runtime.decoder}, runtime.pool, stacks)
    laws: Laws = {}

    def probe(sequence: Mirrored, output: int, logits: torch.Tensor) -> None:
        laws[sequence.seed, output] = logits.clone()

    executor.watch(probe)
    out: dict[tuple[int, int], list[int]] = {}
    events = [e for one in specs for e in engine.add(one, 0.0)]
    while engine.has_work:
        more, _ = step(engine, executor)
        events += more
    engine.check()
    for event in events:
        assert not isinstance(event, Rejected), event
        if isinstance(event, Finished):
            assert event.error is None, event.error
        if isinstance(event, Tokens):
            out.setdefault((event.id, event.index), []).extend(event.tokens)
    return out, laws, engine


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """(tokens, logits of each) of a transformers model, without its cache."""
    context, rows = list(prompt), []
    for _ in range(count):
        rows.append(model(torch.tensor([context]), use_cache=False).logits[0, -1].float())
        context.append(int(rows[-1].argmax()))
    return context[len(prompt) :], torch.stack(rows)


# ---------------------------------------------------------------------------------------------- the rule


def test_the_rule_by_hand() -> None:
    """r = 2, lora_alpha = 4: s = 2.  q takes columns 0 and 1 of a product of 5, v column 4; k is not adapted."""
    sites = {
        "model.layers.0.self_attn.q_proj.weight": Site(0, "qkv", 0, 3, 2),
        "model.layers.0.self_attn.k_proj.weight": Site(0, "qkv", 2, 3, 2),
        "model.layers.0.self_attn.v_proj.weight": Site(0, "qkv", 4, 3, 1),
    }
    base = "base_model.model.model.layers.0.self_attn"
    tensors = {
        f"{base}.q_proj.lora_A.weight": torch.tensor([[1.0, 0, 2], [0, 1, 0]]),
        f"{base}.q_proj.lora_B.weight": torch.tensor([[1.0, 0], [3, 1]]),
        f"{base}.v_proj.lora_A.weight": torch.tensor([[1.0, 1, 1], [0, 0, 5]]),
        f"{base}.v_proj.lora_B.weight": torch.tensor([[2.0, -1]]),
    }
    config = {"peft_type": "LORA", "bias": "none", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    ((a, b),) = LoRA.read(config, tensors, sites).values()
    x = torch.tensor([[1.0, 2, 3]])
    # A x: q (7, 2), v (6, 15).  B A x: q (7, 23), v (12 - 15 = -3).  Times 2, and nothing for k.
    assert (x @ a.T).tolist() == [[7, 2, 6, 15]]
    assert (x @ a.T @ b.T).tolist() == [[14, 46, 0, 0, -6]]
    ((_, stable),) = LoRA.read({**config, "use_rslora": True}, tensors, sites).values()
    assert torch.allclose(stable, b * 2**0.5)  # 4 / sqrt(2) instead of 4 / 2


def test_an_instance_without_weights_does_not_compute() -> None:
    with pytest.raises(InvariantError, match="never attached"):
        LoRA(name="x").apply(0, "qkv", torch.zeros(1, 3))
    for name in ("", "-x", "a b", "x" * 129, "../x", "x'"):
        with pytest.raises(ConfigError, match="name of an adapter"):
            build_stack([f"adapt=lora(name={name!r})"])


# ---------------------------------------------------------------------------------------------- equality


def test_a_mixed_batch_is_that_of_merged_weights(
    adapted: Runtime, made: dict[str, Made], reference: PreTrainedModel, ids: list[int]
) -> None:
    prompts = {None: ids[:40], "wide": ids[7:60], "few": ids[:40], "late": ids[30:44]}
    specs = [ask(i, prompt, name, seed=i) for i, (name, prompt) in enumerate(prompts.items())]
    out, laws, engine = serve(adapted, specs)
    for i, (name, prompt) in enumerate(prompts.items()):
        model = reference if name is None else made[name].merged(reference)
        tokens, logits = greedy(model, prompt, 12)
        assert out[i, 0] == tokens, name
        assert (torch.stack([laws[i, k] for k in range(12)]) - logits).abs().max() < 1e-4, name
    assert (laws[0, 0] - laws[2, 0]).abs().max() > 0.1, "one prompt, and the adapter changes nothing"
    assert engine.stats.acts["adapt=lora.rows_adapted"] > 1000


@pytest.mark.parametrize("family", ["llama_bias_tied", "qwen3", "gemma2"])
def test_biases_norms_of_heads_and_other_families(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Deltas come before biases matter, norms of queries and keys, rope and windows."""
    there = checkpoint(family, tmp_path_factory.mktemp(family))
    one = make(tmp_path_factory.mktemp("one") / "x", there.model, seed=9, rank=5)
    config = EngineConfig(
        model=there.folder, dtype="float32", device="cpu", threads=1, max_num_seqs=4, lora=[f"x={one.folder}"]
    )
    runtime = build(prepare(config))
    prompt = [(37 * i + 11) % 211 for i in range(60)]
    out, laws, _ = serve(runtime, [ask(1, prompt, "x", seed=1), ask(2, prompt, seed=2)])
    for i, model in ((1, one.merged(there.model)), (2, there.model)):
        tokens, logits = greedy(model, prompt, 12)
        assert out[i, 0] == tokens
        assert (torch.stack([laws[i, k] for k in range(12)]) - logits).abs().max() < 1e-4
    assert out[1, 0] != out[2, 0]


def test_the_whole_server_may_have_an_adapter(adapted: Runtime, ids: list[int]) -> None:
    own, _, _ = serve(adapted, [ask(1, ids[:30], "wide")])
    base, _, _ = serve(adapted, [ask(1, ids[:30]), ask(2, ids[:30], "few")], techniques=[part("wide")])
    few, _, _ = serve(adapted, [ask(2, ids[:30], "few")])
    assert base == {**own, **few}


# ---------------------------------------------------------------------------------------------- invariance


def workload(ids: list[int]) -> list[RequestSpec]:
    names = [None, "wide", "few", "late", "wide", None, "few", "wide"]
    law = {"temperature": 0.8, "top_p": 0.95}
    return [ask(i, ids[3 * i : 24 + 4 * i], name, seed=i, max_tokens=40, **law) for i, name in enumerate(names)]


def test_bits_do_not_depend_on_neighbours_chunks_or_preemption(adapted: Runtime, ids: list[int]) -> None:
    specs = workload(ids)
    together, laws, _ = serve(adapted, specs)
    alone: Laws = {}
    for one in specs:
        tokens, mine, _ = serve(adapted, [one], share=False)
        assert tokens[one.id, 0] == together[one.id, 0]
        alone |= mine
    assert laws.keys() == alone.keys()
    assert all(torch.equal(laws[key], alone[key]) for key in laws)
    chunked, parts, _ = serve(adapted, specs, max_rows=11, max_samples=9)
    assert chunked == together
    assert all(torch.equal(laws[key], parts[key]) for key in laws)
    squeezed, again, engine = serve(adapted, specs, blocks=14)
    assert engine.stats.preemptions > 0
    assert squeezed == together
    assert all(torch.equal(laws[key], again[key]) for key in laws)


@pytest.mark.parametrize(
    ("other", "act"), [("draft=ngram(shortest=1)", "accepted"), ("schedule=layered", "prompts_split")]
)
def test_other_techniques_find_the_same_tokens(adapted: Runtime, ids: list[int], other: str, act: str) -> None:
    specs = [ask(i, (ids[:50] + ids[20:40]) * 2, name, seed=i) for i, name in enumerate((None, "wide", "few"))]
    wanted, _, _ = serve(adapted, specs)
    runtime = adapted
    if other.startswith("schedule"):
        folders = [f"{a.name}={a.path}" for a in adapted.adapters.adapters()]
        config = EngineConfig(
            model=resolve(None), dtype="float32", device="cpu", threads=1, max_model_len=1024, max_num_seqs=8,
            techniques=[other], lora=folders,
        )  # fmt: skip
        runtime = build(prepare(config))
    out, _, engine = serve(runtime, specs, techniques=[other], max_rows=64)
    assert out == wanted
    assert engine.stats.acts[f"{other.partition('(')[0]}.{act}"] > 0


def test_forks_keep_their_adapter(adapted: Runtime, ids: list[int]) -> None:
    three = msgspec.structs.replace(ask(1, ids[:37], "wide", temperature=1.0, max_tokens=40), n=3, seed=5)
    out, _, _ = serve(adapted, [three])
    assert len({tuple(t) for t in out.values()}) == 3
    squeezed, _, engine = serve(adapted, [three, ask(2, ids[60:100], "few", max_tokens=70)], blocks=10)
    assert engine.stats.preemptions > 0
    assert {key: t for key, t in squeezed.items() if key[0] == 1} == out


# ---------------------------------------------------------------------------------------------- the prefix cache


def test_prefixes_are_shared_under_one_adapter_alone(adapted: Runtime, ids: list[int]) -> None:
    prompt = ids[:70]
    wanted = {name: serve(adapted, [ask(1, prompt, name)])[0][1, 0] for name in (None, "wide", "few")}
    setup, stacks = adapted.setup, Stacks(build_stack(), {"adapt": adapted.adapters})
    engine = Engine(setup.groups, 64, setup.limits, stacks, layers=8, vocab=setup.spec.vocab)
    executor = TorchExecutor({"target": adapted.decoder}, adapted.pool, stacks)
    hits = []
    for i, name in enumerate((None, "wide", "few", "wide", None)):
        before = engine.stats.prefix_hit_tokens
        events = list(engine.add(ask(i, prompt, name), 0.0))
        while engine.has_work:
            events += step(engine, executor)[0]
        assert [t for e in events if isinstance(e, Tokens) for t in e.tokens] == wanted[name]
        hits.append(engine.stats.prefix_hit_tokens - before)
    assert hits == [0, 0, 0, 64, 64]


def test_a_name_loaded_anew_shares_nothing_with_its_past(
    made: dict[str, Made], reference: PreTrainedModel, ids: list[int]
) -> None:
    config = EngineConfig(
        model=resolve(None), dtype="float32", device="cpu", threads=1, max_model_len=512, max_num_seqs=4
    )
    runtime = build(prepare(config))
    book = runtime.adapters
    for name in ("wide", "few", "wide"):
        book.enter(book.read("x", str(made[name].folder)))
        events = list(runtime.engine.add(ask(1, ids[:70], "x", max_tokens=8), 0.0))
        while runtime.engine.has_work:
            events += step(runtime.engine, runtime.executor)[0]
        tokens = [t for e in events if isinstance(e, Tokens) for t in e.tokens]
        assert tokens == greedy(made[name].merged(reference), ids[:70], 8)[0]
    # The third time the contents are those of the first, whose prefix is still there.
    assert runtime.engine.stats.prefix_hit_tokens == 64


# ---------------------------------------------------------------------------------------------- cost


def test_batches_without_adapters_ask_for_none(
    adapted: Runtime, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    add = Deltas.add
    monkeypatch.setattr(Deltas, "add", lambda self, *given, **named: (calls.append(given), add(self, *given, **named)))
    serve(adapted, [ask(1, ids[:20], max_tokens=3)])
    assert not calls
    serve(adapted, [ask(1, ids[:20], "late", max_tokens=3)])
    assert calls
