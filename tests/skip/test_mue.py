"""MuE: the rule by hand, equality with a loop over transformers' own modules, and the same tokens however the work is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.exec.conftest import STORY, Bench, spec
from tests.models.checkpoints import Checkpoint
from tests.models.harness import Rows, bench_for
from weft.errors import ConfigError
from weft.exec import leaving
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.leaving import View, picked
from weft.exec.runner import TorchExecutor
from weft.features import feature
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.models import load_spec
from weft.models.decoder import Seam
from weft.models.weights import dense
from weft.registry import parse
from weft.skip.mue import MuE
from weft.types import Enter, Grant, Keep, Mask, Plan, RequestSpec, SamplingSpec, Work

THRESHOLD = 0.97
PART = f"skip=mue(after=(6, 7), threshold={THRESHOLD})"


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    config = EngineConfig(
        model=resolve(None), dtype="float32", max_model_len=1024, max_num_seqs=64, device="cpu", threads=1
    )
    return build(prepare(config))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.fixture(scope="module")
def workload(ids: list[int]) -> list[RequestSpec]:
    law = {"temperature": 0.8, "top_p": 0.95}
    return [spec(i, ids[3 * i : 24 + 4 * i], seed=i, max_tokens=40, **law) for i in range(8)]


Tokens = dict[tuple[int, int], list[int]]
Laws = dict[tuple[int, int], torch.Tensor]


def answers(bench: Bench, specs: Sequence[RequestSpec]) -> tuple[Tokens, Laws]:
    """Tokens by (id, index), and the logits that they were drawn from, by (seed, index in the output)."""
    laws: Laws = {}
    bench.executor.watch(lambda s, output, x: laws.__setitem__((s.seed, output), x.clone()))
    return bench.run(specs), laws


def alone(runtime: Runtime, specs: Sequence[RequestSpec], part: str = PART) -> tuple[Tokens, Laws]:
    """Every request with the engine for itself, and nothing cached."""
    tokens, laws = Tokens(), Laws()
    for one in specs:
        mine = answers(Bench(runtime, techniques=[part], share=False), [one])
        tokens, laws = tokens | mine[0], laws | mine[1]
    return tokens, laws


def same(mine: tuple[Tokens, Laws], wanted: tuple[Tokens, Laws]) -> None:
    """To the last bit, since a wrong entry in the last layers seldom changes a token."""
    assert mine[0] == wanted[0]
    assert mine[1].keys() == wanted[1].keys()
    assert all(torch.equal(x, wanted[1][key]) for key, x in mine[1].items())


@pytest.fixture(scope="module")
def wanted(runtime: Runtime, workload: list[RequestSpec]) -> tuple[Tokens, Laws]:
    return alone(runtime, workload)


def own_acts(bench: Bench) -> dict[str, int]:
    found: dict[str, int] = bench.engine.stack["skip"].acts
    return found


# ---------------------------------------------------------------------------------------------- the rule


def test_the_rule_by_hand() -> None:
    """cos of (3, 4) with (3, 4), (4, 3), (-3, -4), (0, 0): 1, 24/25, -1, and none, which leaves no row behind."""
    before = torch.tensor([[3.0, 4], [3, 4], [3, 4]])
    after = torch.tensor([[3.0, 4], [4, 3], [-3, -4]])
    view = View(before, after, None)  # type: ignore[arg-type]
    for threshold, leaves in ((0.95, [True, True, False]), (0.97, [True, False, False]), (1.0, [True, False, False])):
        assert MuE(threshold=threshold).rows(view).tolist() == leaves
    part = MuE(threshold=0.95)
    part.rows(view)
    assert part.acts == {"rows_asked": 3, "rows_exited": 2}


def test_where_rows_may_leave() -> None:
    assert list(MuE().exits(8)) == [6]
    assert list(MuE().exits(2)) == []
    assert list(MuE(after=(2, 5, 8)).exits(8)) == [2, 5]
    for text in ("after=(1,)", "after=(4, 4)", "after=(5, 3)", "threshold=0.0", "threshold=1.5", "exit=3"):
        with pytest.raises(ConfigError):
            parse(f"skip=mue({text})").build()


# ---------------------------------------------------------------------------------------------- equality


@dataclass
class Loop:
    """Early exits, position by position, out of transformers' own modules.  keys, values: by layer, [heads, D] each."""

    model: PreTrainedModel
    after: tuple[int, ...] = (6, 7)
    keys: list[list[torch.Tensor]] = field(default_factory=list)
    values: list[list[torch.Tensor]] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    """Position: layers that it passed."""
    closest: float = 1.0
    """How near a decision came to the threshold."""

    def __post_init__(self) -> None:
        self.layers = self.model.model.layers
        self.keys = [[] for _ in self.layers]
        self.values = [[] for _ in self.layers]

    @torch.no_grad()
    def step(self, token: int, position: int, decoding: bool) -> torch.Tensor:
        """Logits after one token."""
        inner = self.model.model
        hidden = inner.embed_tokens(torch.tensor([[token]]))
        rope = inner.rotary_emb(hidden, torch.tensor([[position]]))
        gone = False
        for index, layer in enumerate(self.layers):
            normed = layer.input_layernorm(hidden)
            query, key, value = (
                f(normed).view(1, 1, -1, 64).transpose(1, 2)
                for f in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, *rope)
            self.keys[index].append(key[0, :, 0])
            self.values[index].append(value[0, :, 0])
            if gone:
                continue
            k, v = (torch.stack(x[index], 1).repeat_interleave(2, 0) for x in (self.keys, self.values))
            weight = torch.softmax(query[0] @ k.transpose(1, 2) / 8.0, -1)
            mixed = (weight @ v).transpose(0, 1).reshape(1, 1, -1)
            middle = hidden + layer.self_attn.o_proj(mixed)
            out = middle + layer.mlp(layer.post_attention_layernorm(middle))
            if decoding and index + 1 in self.after:
                cosine = float(torch.cosine_similarity(hidden[0, 0], out[0, 0], dim=0))
                self.closest = min(self.closest, abs(cosine - THRESHOLD))
                if cosine >= THRESHOLD:
                    gone = True
                    self.left[position] = index + 1
            hidden = out
        logits: torch.Tensor = self.model.lm_head(inner.norm(hidden))[0, 0]
        return logits


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(resolve(None), dtype=torch.float32).eval()


def test_laws_and_filled_keys_are_those_of_a_plain_loop(
    runtime: Runtime, reference: PreTrainedModel, ids: list[int]
) -> None:
    """Along a text that is set beforehand, since greedy answers of a small model soon repeat themselves."""
    loop, prompt, tokens = Loop(reference), ids[:30], ids[30:70]
    laws = [loop.step(token, at, False) for at, token in enumerate(prompt)][-1:]
    laws += [loop.step(token, len(prompt) + i, True) for i, token in enumerate(tokens[:-1])]
    count = len(tokens)
    assert {6, 7} <= set(loop.left.values()), "rows leave at both exits"
    assert len(loop.left) < count - 1, "and some at none"
    assert loop.closest > 1e-5, "no decision hangs on rounding"

    bench = Bench(runtime, techniques=[PART])
    seen: list[torch.Tensor] = []
    bench.executor.watch(lambda sequence, output, logits: seen.append(logits.clone()))
    tables: list[int] = []

    def look(bench: Bench) -> None:
        for request in bench.engine.requests():
            tables[:] = request.tables[0].blocks

    asked = msgspec.structs.replace(spec(1, prompt, max_tokens=count), forced=tuple(tokens))
    assert bench.run([asked], look)[1, 0] == tokens
    assert (torch.stack(seen) - torch.stack(laws)).abs().max() < 1e-4
    assert own_acts(bench)["rows_exited"] == len(loop.left)
    known = len(prompt) + count - 1
    where = torch.tensor(tables)[torch.arange(known) // 16], torch.arange(known) % 16
    for layer in range(8):
        for part, mine in ((loop.keys, runtime.pool.keys(0, layer)), (loop.values, runtime.pool.values(0, layer))):
            assert (torch.stack(part[layer]) - mine[where]).abs().max() < 1e-4, layer


@pytest.mark.parametrize("family", ["llama_bias_tied", "qwen3", "gemma2", "mistral", "qwen2_window", "qwen3_moe"])
def test_filling_stores_what_each_layer_would(
    family: str,
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    """Biases, norms of heads, windows, soft caps: keys and values of layer l are those that it makes of the hidden state."""
    there = checkpoint(family)
    bench = bench_for(load_spec(there.folder), there.folder)
    decoder, pool = bench.decoder, bench.pool
    tokens = [(31 * i + 7) % 211 for i in range(40)]
    bench.run([Rows("a", tokens[:33], 0)])
    batch = bench.batch([Rows("a", tokens[33:], 33)])
    hidden = decoder.forward(batch, pool, (0, 1)).clone()
    wanted = {}
    for layer in range(1, 3):
        decoder.forward(batch, pool, (layer, layer + 1), hidden)
        wanted[layer] = stored(bench, batch, layer)
    pool.arena.view(-1)[:] = 255
    decoder.fill(batch, pool, hidden, 1)
    for layer, found in wanted.items():
        for one, other in zip(stored(bench, batch, layer), found, strict=True):
            assert torch.isfinite(one).all()
            assert (one - other).abs().max() < 1e-5
    together = [stored(bench, batch, layer) for layer in (1, 2)]
    decoder.fill(picked(batch, np.array([2, 5]), loose=True), pool, hidden[[2, 5]], 1)
    for layer, found in zip((1, 2), together, strict=True):
        for one, other in zip(stored(bench, batch, layer), found, strict=True):
            assert torch.equal(one, other), "a row's bits depend on who leaves beside it"


def stored(bench: Any, batch: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    group = next(g for g, s in enumerate(bench.groups) if layer in s.layers and s.kind != "parked")
    where = bench.pool.split(group, batch.groups[group].slots_T)
    return bench.pool.keys(group, layer)[where].clone(), bench.pool.values(group, layer)[where].clone()


def test_who_left_takes_no_part_in_later_layers(runtime: Runtime, workload: list[RequestSpec]) -> None:
    """Fewer rows pass attention and MLP, by exactly those that left."""
    passed = dict.fromkeys((5, 6, 7), 0)

    def count(layer: int) -> Any:
        def hook(batch: Any, tensors: tuple[torch.Tensor, ...]) -> None:
            passed[layer] += len(tensors[0])

        return hook

    removes = [runtime.decoder.hook(seam, layer, count(layer)) for layer in passed for seam in (Seam.ATTENTION,)]
    try:
        bench = Bench(runtime, techniques=["skip=mue(after=(6,), threshold=0.97)"])
        bench.run(workload)
    finally:
        for remove in removes:
            remove()
    acts = own_acts(bench)
    assert passed[5] == passed[6] + acts["rows_exited"]
    assert passed[6] == passed[7]
    assert acts["rows_exited"] > acts["rows_asked"] // 4


@pytest.mark.parametrize("novel", ["Stevenson_Treasure_1883", "Doyle_Hound_1902"])
def test_distance_from_all_layers_on_prose(runtime: Runtime, shared: Callable[[str], Path], novel: str) -> None:
    """Of the two novels held out of the model's training: the bound that the file states for them holds at the trial's arguments,
    rows do leave, and those that leave lose less by it than rows do on the average."""
    tokenizer = Tokenizer.load(resolve(None))
    text = shared(f"data/text/novels/{novel}.txt").read_text(encoding="utf8")
    sent = []
    for i in range(6):
        known = tokenizer.encode(text[30_000 * (i + 1) :][:2000], add_special=False)
        one = spec(i, known[:80], seed=i, temperature=0.0, max_tokens=48)
        sent.append(msgspec.structs.replace(one, forced=tuple(known[80:128])))

    def laws(*techniques: str) -> tuple[torch.Tensor, Bench]:
        bench, found = Bench(runtime, techniques=techniques), dict[tuple[int, int], torch.Tensor]()
        bench.executor.watch(lambda s, output, x: found.__setitem__((s.seed, output), x.double().log_softmax(-1)))
        bench.run(sent)
        return torch.stack([found[key] for key in sorted(found)]), bench

    def mean(q: torch.Tensor) -> float:
        return float((whole.exp() * (whole - q)).sum(-1).mean())

    whole, _ = laws()
    arguments = ", ".join(f"{key}={value}" for key, value in MuE.trial.items())
    early, bench = laws(f"skip=mue({arguments})")
    acts, bound = own_acts(bench), 0.33
    assert f"at most {bound} nat" in feature("skip", "mue").fields["Bound"]
    assert mean(early) < bound
    share = acts["rows_exited"] / acts["rows_asked"]
    assert 0.25 < share < 0.9
    everybody, _ = laws("skip=mue(after=(7,), threshold=0.01)")
    assert 0.03 < mean(early) < share * mean(everybody)


# ---------------------------------------------------------------------------------------------- however the work is cut


@pytest.mark.parametrize(
    ("also", "limits"),
    [
        ([], {}),
        ([], {"max_rows": 11, "max_samples": 9}),
        ([], {"blocks": 14}),
        (["draft=ngram(shortest=1)"], {}),
        (["draft=ngram(shortest=1)"], {"blocks": 14}),
        (["schedule=prefill_first"], {"max_rows": 64}),
    ],
)
def test_tokens_depend_on_the_request_alone(
    runtime: Runtime, workload: list[RequestSpec], wanted: tuple[Tokens, Laws], also: list[str], limits: dict[str, int]
) -> None:
    bench = Bench(runtime, techniques=[PART, *also], **limits)
    same(answers(bench, workload), wanted)
    assert own_acts(bench)["rows_exited"] > 100
    if "blocks" in limits:
        assert bench.engine.stats.preemptions > 0


def test_tokens_are_the_same_where_a_common_beginning_is_read_once(runtime: Runtime, ids: list[int]) -> None:
    """Prompts that begin alike: two key tiles that hydragen reads for all of them together, and one for each of them alone."""
    law = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 30}
    common = (ids * 2)[:130]
    specs = [spec(i, [*common, *ids[5 * i : 5 * i + 60 + i]], seed=i, **law) for i in range(5)]
    bench = Bench(runtime, techniques=[PART, "attention=hydragen"])
    bench.run([spec(9, common, max_tokens=1)])  # what the others find in the index
    bench.events.clear()
    same(answers(bench, specs), alone(runtime, specs))
    assert own_acts(bench)["rows_exited"] > 100
    assert bench.engine.stats.acts["attention=hydragen.entries_shared"] > 0


def test_some_requests_leave_and_others_do_not(
    runtime: Runtime, workload: list[RequestSpec], wanted: tuple[Tokens, Laws]
) -> None:
    plain = answers(Bench(runtime), workload)
    assert plain[0] != wanted[0], "nothing was given up, so nothing is shown"
    other = "skip=mue(after=(3,), threshold=0.99)"
    third = alone(runtime, workload, other)
    mixed = [msgspec.structs.replace(one, techniques=((), (PART,), (other,))[i % 3]) for i, one in enumerate(workload)]
    tokens, laws = answers(Bench(runtime), mixed)
    assert tokens == {key: (plain, wanted, third)[key[0] % 3][0][key] for key in tokens}
    assert all(torch.equal(x, (plain, wanted, third)[key[0] % 3][1][key]) for key, x in laws.items())


def test_forks_go_on_with_what_was_filled(runtime: Runtime, ids: list[int]) -> None:
    three = msgspec.structs.replace(spec(1, ids[:37], temperature=1.0, max_tokens=40), n=3, seed=5)
    out = Bench(runtime, techniques=[PART], share=False).run([three])
    assert len({tuple(t) for t in out.values()}) == 3
    squeezed = Bench(runtime, techniques=[PART], blocks=10)
    found = squeezed.run([three, spec(2, ids[60:100], max_tokens=70)])
    assert squeezed.engine.stats.preemptions > 0
    assert {key: t for key, t in found.items() if key[0] == 1} == out


def test_layers_that_are_passed_in_several_steps(
    runtime: Runtime, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After preemption, output is computed again in stretches of layers; who left in one stays away from the next."""
    config = EngineConfig(
        model=resolve(None), dtype="float32", device="cpu", threads=1, max_model_len=1024, max_num_seqs=16,
        techniques=["schedule=layered(groups=8)"],
    )  # fmt: skip
    layered = build(prepare(config))
    specs = [spec(i, ids[5 * i : 40 + 5 * i], seed=i, max_tokens=50, temperature=0.9) for i in range(6)]
    wanted = alone(runtime, specs)
    remembered = []
    remember = leaving._remember
    monkeypatch.setattr(
        leaving, "_remember", lambda batch, gone: (remembered.append(gone.any()), remember(batch, gone))
    )
    bench = Bench(layered, techniques=[PART, "schedule=layered(groups=8)"], blocks=30)
    same(answers(bench, specs), wanted)
    assert bench.engine.stats.preemptions > 0
    assert any(remembered), "nobody left in the middle"


def test_output_is_no_prompt_for_others(runtime: Runtime, ids: list[int]) -> None:
    """A conversation that goes on: what was generated is computed again as prompt, with all layers, and the other way round."""
    one = spec(1, ids[:40], temperature=0.0, max_tokens=40)
    answer = Bench(runtime, techniques=[PART]).run([one])[1, 0]
    longer = spec(2, ids[:40] + answer + ids[50:60], temperature=0.0, max_tokens=12)
    fresh = Bench(runtime, techniques=[PART], share=False).run([longer])
    bench = Bench(runtime, techniques=[PART])
    bench.run([one])
    before = bench.engine.stats.prefix_hit_tokens
    bench.events.clear()
    assert bench.run([longer]) == fresh
    assert bench.engine.stats.prefix_hit_tokens - before == 32, "the whole blocks of the prompt, and no more"
    # The longer prompt's blocks stand where the first request's output would: they are not its own.
    bench.events.clear()
    resumed = msgspec.structs.replace(one, id=3, resumed=tuple(answer[:30]))
    assert bench.run([resumed]) == {(3, 0): answer[30:]}


def test_a_tree_of_guesses_leaves_in_part(runtime: Runtime, ids: list[int]) -> None:
    """Guesses of a tree that others do not follow out are computed to no effect; the accepted branch is as without a draft."""
    prompt = ids[:21]
    part = "skip=mue(after=(3, 5), threshold=0.98)"
    stacks = Bench(runtime, techniques=[part]).engine.stacks
    told, laws = alone(runtime, [spec(1, prompt, temperature=0.0, max_tokens=14)], part)
    truth, mine = told[1, 0], Laws()
    wrong = [(t + 1) % 4096 for t in truth]
    executor = TorchExecutor({"target": runtime.decoder}, runtime.pool, stacks)
    executor.watch(lambda s, output, x: mine.__setitem__((s.seed, output), x.clone()))
    enter = Enter(
        request=5, tokens=tuple(prompt), prompt=21, sampling=SamplingSpec(temperature=0.0), seed=0, entries=(0,)
    )
    grants = (Grant(5, 0, 0, (3, 5, 4, 9)),)
    parted = []
    ballast = leaving._ballast
    leaving._ballast = lambda batch, gone: (parted.append((found := ballast(batch, gone)).any()), found)[1]  # type: ignore[assignment]
    try:
        done, step, at, known = [], 1, 0, list(prompt)
        while len(done) < 9:
            rest = truth[len(done) :]
            bad = wrong[len(done) :]
            guesses = (bad[0], rest[0], bad[1], rest[1], bad[2], rest[2])
            tree = Work(
                request=5, rows=((at, len(known) + 6),), tokens=(*known[at:], *guesses), mask=Mask.TREE, keep=Keep.ACCEPT,
                guesses=6, parents=(-1, -1, 1, 1, 3, 3), samples=True, output=len(done),
            )  # fmt: skip
            plan = Plan(
                step=step, works=(tree,), enter=(enter,) if step == 1 else (), grants=grants if step == 1 else ()
            )
            tokens = list(executor.execute(plan).works[0].tokens)
            assert tokens == truth[len(done) : len(done) + 4]
            known, done, step = known + tokens, done + tokens, step + 1
            at = len(known) - 1
    finally:
        leaving._ballast = ballast
    assert any(parted)
    assert len(mine) >= 9
    # Guesses of a tree stand at other entries of a key tile than a chain, so sums are rounded otherwise.
    assert all((x - laws[key]).abs().max() < 1e-4 for key, x in mine.items())


def test_parts_of_a_batch(runtime: Runtime) -> None:
    """Rows with gaps become sequences of their own that end where their rows end."""
    bench = bench_for(runtime.decoder.spec, "random", max_rows=64)
    bench.run([Rows("a", [1] * 10, 0), Rows("b", [2] * 3, 0)])
    batch = bench.batch([Rows("a", [3, 4, 5, 6], 10), Rows("b", [7, 8], 3)])
    part = picked(batch, np.array([0, 2, 3, 5]))
    assert part.bounds == [0, 1, 3, 4]
    assert part.tokens_T.tolist() == [3, 5, 6, 8]
    assert part.positions_T.tolist() == [10, 12, 13, 4]
    assert part.groups[0].lengths_S.tolist() == [11, 14, 5]
    assert part.groups[0].tables_SB.tolist() == [batch.groups[0].tables_SB[i].tolist() for i in (0, 0, 1)]
    assert part.groups[0].slots_T.tolist() == batch.groups[0].slots_T[[0, 2, 3, 5]].tolist()


OTHERS = (
    "kv.store=int8",
    "adapt=lora(name='x')",
    "kv.compress=h2o(heavy=12, recent=12, every=8)",
    "kv.compress=streaming_llm(window=24, every=8)",
)


@pytest.mark.parametrize("also", OTHERS)
def test_other_ways_to_store_to_keep_and_to_adapt(ids: list[int], also: str, tmp_path: Any) -> None:
    """int8 rows are filled in encoded; an adapter of some requests changes the keys and values that are filled in for these."""
    from weft.adapt.lora import LoRA

    LoRA.trial(tmp_path)
    config = EngineConfig(
        model=resolve(None), dtype="float32", device="cpu", threads=1, max_model_len=512, max_num_seqs=8,
        techniques=[PART] if also.startswith("adapt") else [PART, also], lora=[f"x={tmp_path}"],
    )  # fmt: skip
    runtime = build(prepare(config))
    specs = [spec(i, ids[3 * i : 30 + 3 * i], seed=i, max_tokens=30, temperature=0.8) for i in range(4)]
    if also.startswith("adapt"):
        specs[1::2] = [msgspec.structs.replace(one, techniques=(also,)) for one in specs[1::2]]
    outs = []
    for sets in ([specs], [[one] for one in specs]):
        tokens, laws = Tokens(), Laws()
        for some in sets:
            bench = Bench(runtime, techniques=[])
            bench.engine, bench.executor = runtime.engine, runtime.executor
            found = answers(bench, some)
            tokens, laws = tokens | found[0], laws | found[1]
        outs.append((tokens, laws))
    same(*outs)
    acts = runtime.engine.stats.acts
    assert acts["skip=mue.rows_exited"] > 20
    if also.startswith("adapt"):
        hidden = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
        check_adapted_filling(runtime, hidden)


def check_adapted_filling(runtime: Runtime, hidden: torch.Tensor) -> None:
    """k and v parts of (W + delta) on the normed state, by hand for layer 7."""
    from weft.exec.deltas import Deltas

    tensors = {name: dense(weight) for name, weight in runtime.decoder.tensors.items()}
    a, b = runtime.adapters.find("x").tensors[7, "qkv"]  # type: ignore[union-attr]
    normed = hidden * torch.rsqrt((hidden**2).mean(-1, keepdim=True) + 1e-5) * tensors["7.norm_attention"]
    wanted = normed @ (tensors["7.qkv"] + b @ a).T[:, 256:]

    class Sequence:
        stack, state, prompt = runtime.engine.stacks.of(("adapt=lora(name='x')",)), {}, 0

    sequences = [Sequence()]
    batch_ids = torch.tensor([1, 2])
    from weft.exec.batch import Batch, GroupBatch

    where = GroupBatch(torch.tensor([[0]]), torch.tensor([0]), torch.tensor([2]), torch.tensor([0, 1]))
    batch = Batch(
        batch_ids, torch.tensor([0, 0]), [0, 2], [where], torch.empty(0, dtype=torch.int64), sequences=sequences
    )
    batch.deltas = Deltas.of(sequences, [0, 2], hidden.device)
    runtime.decoder.fill(batch, runtime.pool, hidden, 7)
    found = torch.cat([runtime.pool.keys(0, 7)[0, :2].flatten(1), runtime.pool.values(0, 7)[0, :2].flatten(1)], -1)
    assert (found - wanted).abs().max() < 1e-4  # at position 0 rope turns nothing
    plain = normed @ tensors["7.qkv"].T[:, 256:]
    assert (found - plain).abs().max() > 0.01, "the adapter changes nothing, so nothing is shown"
