"""Prompt tokens: rows and rules by hand, files that are refused; live: equal tokens, the target's own guesses, the law."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.contender import Model
from bench.draft.heads import fitted
from bench.draft.law import Soft, reader
from bench.draft.stands import judged, written
from tests.accept.test_rejection import exact_law
from tests.draft.test_speculative_sampling import LAWS, Watching
from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import pair
from tools.grow import Shape, grow
from weft.conform.law import fit
from weft.core.lengths import promising
from weft.core.prices import Costs
from weft.draft._weights import MARKS, marked
from weft.draft.prompt_tokens import BUNDLED, KIND, MOST, PromptTokens
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.gather import softened
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.sim.load import load_of
from weft.slots import Ask
from weft.slots.cost import Figures, Kind
from weft.types import Plan, SamplingSpec, StepResult, Work

# ---------------------------------------------------------------------------------------------- by hand

WIDTH, VOCAB = 6, 16


def test_rows_behind_the_context_and_behind_each_guess() -> None:
    """Two guesses, two learned tokens: after the newest (rows 2, 3), after guess 0 (4, 5), after guess 1 (6, 7)."""
    work = Work(
        request=1, rows=((7, 10),), tokens=(5, 6, 8), guesses=2, samples=True, ahead=6, soft=2
    )  # the newest at 7
    assert work.passing == 9
    full = softened(work)
    assert full.parents == (-1, 0, -1, 2, 0, 4, 1, 6)
    assert full.tokens == (5, 6, 8, -1, -1, -1, -1, -1, -1)
    tree = softened(msgspec.structs.replace(work, parents=(-1, -1)))
    assert tree.parents == (-1, -1, -1, 2, 0, 4, 1, 6)
    plain = msgspec.structs.replace(work, soft=0, ahead=0)
    assert softened(plain) is plain
    assert plain.passing == 3


def test_what_rows_cost_in_a_simulation() -> None:
    """Positions 7 to 9 see 8, 9 and 10; tokens behind them at 8 and 9, 9 and 10, 10 and 11: 9 + 10, 10 + 11, 11 + 12."""
    kinds = (Kind(window=None, pair_flops=1.0, entry_bytes=1),)
    model = Figures(name="m", layers=1, width=1, dense_params=1, head_params=1, kinds=kinds, block_bytes=1)
    work = Work(request=1, rows=((7, 10),), tokens=(5, 6, 8), guesses=2, samples=True, ahead=6, soft=2)
    found = load_of(Plan(step=1, works=(work,), rows=9, samples=3), model, 1)
    assert (found.rows, found.prompt_pairs, found.decode_rows) == (9, [27 + 63], 0)


def test_lengths_weigh_the_square_of_rows() -> None:
    """10 ms and 1 ms a row, a = 0.5: plain 1 in 11 ms; 1.5 in 14, 1.75 in 19: one is best; of a chain two, 1.75 in 13 ms."""
    costs = Costs()
    for rows in range(1, 17):
        costs.add(rows, 0.010 + 0.001 * rows)
    assert promising([0.5], [4], 1, costs, 0.0, 1 / 0.011, [True])[0] == [1]
    assert promising([0.5], [4], 1, costs, 0.0, 1 / 0.011, [False])[0] == [2]
    assert promising([0.2], [4], 1, costs, 0.0, 1 / 0.011, [True])[0] == [0]  # 1.2 in 14
    assert promising([0.2], [4], 1, costs, 0.0, 1 / 0.011)[0] == [1]  # 1.2 in 12


class Script:
    """A target whose head is the identity, and which draws from a script; remembers what it was asked."""

    width, vocab = WIDTH, VOCAB

    def __init__(self, words: Sequence[Sequence[int]] = ()) -> None:
        self.words, self.target = words, self
        self.asked: list[list[tuple[int, list[int]]]] = []
        self.logits: list[torch.Tensor] = []

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.eye(VOCAB, WIDTH)[list(ids)]

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.eye(VOCAB, WIDTH)[list(ids)]

    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: torch.Tensor) -> list[tuple[int, Any]]:
        self.asked.append([(i, list(said)) for i, said in rows])
        self.logits.append(logits)
        return [(self.words[i][len(said)], torch.full((VOCAB,), float(len(said)))) for i, said in rows]


def ask(most: int, soft: Any, **more: Any) -> Ask:
    return Ask(np.array([7, 8, 9]), 2, 1, most, SamplingSpec(stop_ids=(15,)), 5, soft=soft, **more)


def test_each_guess_is_a_draw_at_its_own_token() -> None:
    """Ends: the tokens that there are, what can be verified, an end id, logits that are no numbers, no token behind the row."""
    states = torch.arange(6.0 * 3).view(6, 3, 1).expand(6, 3, WIDTH)
    words = [[1, 2, 3], [5, 6, 7], [9, 15, 1], [3, -1, 0], [0], [0]]
    asks = [
        ask(8, states[0]), ask(2, states[1]), ask(8, states[2]), ask(8, states[3, :2], independent=True), ask(0, states[4]),
        ask(8, None),
    ]  # fmt: skip
    run, part = Script(words), PromptTokens(guesses=3)
    found = part.propose(asks, run)
    assert [list(g.tokens) for g in found] == [[1, 2, 3], [5, 6], [9, 15], [3], [], []]
    assert [x[:, 0].tolist() for x in run.logits] == [[0.0, 3.0, 6.0, 9.0], [1.0, 4.0, 7.0, 10.0], [2.0]]
    assert run.asked[1] == [(0, [1]), (1, [5]), (2, [9]), (3, [3])]
    assert [g.laws is None for g in found] == [True, True, True, False, True, True]
    assert found[3].laws.tolist() == [[0.0] * VOCAB]
    part.observe(3, 2)
    assert part.acts == {"proposed": 3, "accepted": 2, "soft_rows": 10}
    assert part.propose([], run) == []


# ---------------------------------------------------------------------------------------------- files


def put(path: Path, soft: torch.Tensor, mark: torch.Tensor, **more: Any) -> str:
    save_file({"soft": soft, "mark": mark, **more.pop("tensors", {})}, path, {"kind": KIND.name, "vocab": "16", **more})
    return str(path)


def test_wrong_arguments_are_refused() -> None:
    for text in ("guesses=0", f"guesses={MOST + 1}", "weights=''", "guesses='two'", "size=1"):
        with pytest.raises(ConfigError):
            parse(f"draft=prompt_tokens({text})").build()


def test_files_that_are_no_prompt_tokens_are_refused(tmp_path: Path) -> None:
    """Missing; another kind; a tensor too many; a vector alone; another width than the mark's; too few; of another model."""
    mark, soft = torch.eye(VOCAB, WIDTH)[[2 * i for i in range(MARKS)]], torch.zeros(3, WIDTH)
    put(tmp_path / "kind", soft, mark, kind="weft clover heads 1")
    put(tmp_path / "many", soft, mark, tensors={"more": torch.zeros(1)})
    put(tmp_path / "flat", soft[0], mark)
    put(tmp_path / "wide", torch.zeros(3, WIDTH + 1), mark)
    for name in ("nowhere", "kind", "many", "flat", "wide"):
        with pytest.raises(ConfigError, match=f"{name}.*tools.train_tiny prompts"):
            PromptTokens(weights=str(tmp_path / name)).memory(1, VOCAB)
    whole = put(tmp_path / "whole", soft + torch.arange(3.0)[:, None], mark)
    with pytest.raises(ConfigError, match="has 3 prompt tokens; guesses must be at most that, got 4"):
        PromptTokens(weights=whole, guesses=4).attach(Script())
    part = PromptTokens(weights=whole, guesses=2)
    part.attach(Script())
    assert part.vectors(Script()).tolist() == [[0.0] * WIDTH, [1.0] * WIDTH]
    assert part.soft == 2
    put(tmp_path / "other", soft, mark.flip(0))
    with pytest.raises(ConfigError, match="trained for another model"):
        PromptTokens(weights=str(tmp_path / "other")).attach(Script())


def test_the_bundled_tokens_are_a_few_thousand_numbers() -> None:
    data = BUNDLED.read_bytes()
    assert len(data) < 12_000
    size = int.from_bytes(data[:8], "little")
    entries = {k: v for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__"}
    assert max(entry["data_offsets"][1] for entry in entries.values()) == len(data) - 8 - size
    assert (BUNDLED.parent / "README.md").is_file()


# ---------------------------------------------------------------------------------------------- live


def config(*techniques: str, **more: Any) -> EngineConfig:
    given: dict[str, Any] = {
        "model": resolve(None), "dtype": "float32", "max_model_len": 512, "max_num_seqs": 64, "device": "cpu", "threads": 1,
        "draft_control": "off",
    }  # fmt: skip
    return EngineConfig(techniques=techniques, **{**given, **more})


def test_the_memory_plan_has_the_tokens() -> None:
    alone, both = prepare(config()).plan, prepare(config("draft=prompt_tokens(guesses=3)")).plan
    count = load_file(BUNDLED)["soft"].numel()
    assert both.draft_bytes - alone.draft_bytes == 4 * (count + 64 * 3 * (4 * 256 + 4096))


@pytest.fixture(scope="module", params=["cpu", "ref"])
def machine(request: pytest.FixtureRequest) -> Runtime:
    return build(prepare(config("draft=prompt_tokens(guesses=3)", ops=request.param)))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.mark.parametrize("machine", ["cpu", pytest.param("ref", marks=pytest.mark.long)], indirect=True)
@pytest.mark.parametrize(
    "limits",
    [{}, {"blocks": 14, "max_rows": 24, "max_num_seqs": 6}, {"max_guesses": 2, "max_samples": 9, "max_num_seqs": 7}],
    ids=["", "a short pool", "few samples"],
)
def test_equal_tokens(machine: Runtime, ids: list[int], limits: dict[str, int]) -> None:
    """Under every law, with forks, in chunks, preempted, and where there is no room for learned tokens now and then."""
    some = 16 if machine.setup.ops["target"].panels else 6
    specs = [spec(i, ids[3 * i : 3 * i + 30], seed=i, n=1 + i % 2, max_tokens=36, **LAWS[i % 8]) for i in range(some)]
    bench = Bench(machine, techniques=["draft=prompt_tokens(guesses=3)"], **limits)  # type: ignore[arg-type]
    assert bench.run(specs) == Bench(machine).run(specs)
    acts = bench.engine.stack["draft"].acts
    assert acts["soft_rows"] >= acts["proposed"] > acts["accepted"] > 10
    assert "blocks" not in limits or some < 16 or bench.engine.stats.preemptions


def test_equal_tokens_in_stretches_of_layers(ids: list[int]) -> None:
    parts = ["schedule=layered", "draft=prompt_tokens"]
    runtime = build(prepare(config(*parts)))
    specs = [spec(i, ids[5 * i : 5 * i + 40], seed=i, max_tokens=30, **LAWS[i % 8]) for i in range(8)]
    bench = Bench(runtime, techniques=parts)
    assert bench.run(specs) == Bench(runtime).run(specs)
    assert bench.engine.stack["draft"].acts["accepted"] > 5


def test_guesses_are_what_the_target_says_at_the_learned_tokens(machine: Runtime, ids: list[int]) -> None:
    """The paper's pass beside transformers: the text but for its newest token, then the learned tokens, read as any text is."""
    bench = Bench(machine, techniques=["draft=prompt_tokens(guesses=3)"])
    seen = Watching(bench)
    bench.run([spec(i, ids[9 * i : 12 * i + 5], max_tokens=24, temperature=0.0) for i in range(7)])
    assert len({len(counts) for counts in seen.accepted}) > 1
    assert max(max(counts, default=0) for counts in seen.accepted) > 0
    target, soft = reader(resolve(None)), load_file(BUNDLED)["soft"][:3]
    assert len(seen.guessed) > 30
    for context, _, said in seen.guessed[::4]:
        text = target.model.embed_tokens(torch.tensor(context[:-1]))
        with torch.no_grad():
            logits = target(inputs_embeds=torch.cat([text, soft])[None]).logits[0, -3:]
        assert tuple(logits.argmax(-1).tolist())[: len(said)] == said


def test_no_row_beyond_what_can_still_be_guessed(machine: Runtime, ids: list[int]) -> None:
    """Rows of plans stay within their budget, none has soft tokens behind a prompt, and the last two steps need none."""
    bench = Bench(machine, techniques=["draft=prompt_tokens(guesses=3)"], max_rows=20, max_num_seqs=4)
    plans: list[Plan] = []
    inner = bench.executor.execute

    def execute(plan: Plan) -> StepResult:
        plans.append(plan)
        return inner(plan)

    bench.executor.execute = execute  # type: ignore[method-assign]
    bench.run([spec(i, ids[i : i + 24], max_tokens=9, seed=i) for i in range(6)])
    works = [work for plan in plans for work in plan.works]
    assert {work.soft for work in works} == {0, 1, 2, 3}
    for plan in plans:
        assert plan.rows == sum(work.passing for work in plan.works) <= 20
    for work in works:
        assert work.ahead == (1 + work.guesses) * work.soft
        assert not work.soft or (work.output > 0 and work.soft <= 9 - work.output - 2)


def some_tokens(folder: Path, count: int) -> str:
    """Learned tokens that nobody taught, for the model in a folder."""
    from transformers import AutoModelForCausalLM

    table = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach().float()
    soft = table[:count] + 0.5 * torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(1))
    mark, path = table[marked(len(table))].contiguous(), folder / "tokens.safetensors"
    save_file({"soft": soft, "mark": mark}, path, {"kind": KIND.name, "vocab": str(len(table))})
    return str(path)


@pytest.mark.parametrize("ops", ["cpu", "ref"])
def test_equal_tokens_beside_windows(tmp_path: Path, ops: str) -> None:
    """On a random model, whose answers go round and round now and then; its windows are shorter than the answers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 192, "use_sliding_window": True,
        "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape)).save_pretrained(tmp_path)
    part = f"draft=prompt_tokens(guesses=3, weights={some_tokens(tmp_path, 3)!r})"
    runtime = build(prepare(config(part, model=tmp_path, max_model_len=128, ops=ops)))
    specs = [spec(i, [5 + 3 * i, 7, 11 + i], seed=i, max_tokens=50, temperature=0.3 * (i % 3)) for i in range(6)]
    bench = Bench(runtime, techniques=[part])
    assert bench.run(specs) == Bench(runtime).run(specs)
    assert bench.engine.stack["draft"].acts["proposed"] > 300


@pytest.mark.parametrize("rule", ["rejection", "race"])
def test_the_joint_law(tmp_path: Path, rule: str) -> None:
    """Of four tokens, of which the last two have guesses, by transformers' own logits."""
    model = pair(tmp_path / "target", tmp_path / "draft")
    part = f"draft=prompt_tokens(weights={some_tokens(tmp_path / 'target', 2)!r})"
    techniques = [part, f"accept={rule}"]
    runtime = build(prepare(config(*techniques, model=tmp_path / "target", max_model_len=64)))
    prompt, law, count = [3, 7, 11, 7, 3, 9, 7], {"temperature": 0.9, "top_k": 3}, 1500
    bench = Bench(runtime, techniques=techniques)
    found = bench.run([spec(i, prompt, seed=i, max_tokens=5, **law) for i in range(count)])  # type: ignore[arg-type]
    assert bench.engine.stack["draft"].acts["accepted"] > 200
    wanted = exact_law(model, prompt, 0.9, 3, 4)
    assert len(wanted) == 81
    assert fit([tuple(found[i, 0][:4]) for i in range(count)], wanted).ok


OPENINGS = (
    "It had rained for three days when the stranger came down the road from the hills, and",
    "The captain put the letter into his pocket without a word. Then he looked at the sea and",
    "When I was a child we lived in a house with a green door, near the market, where my father",
    "Once upon a time there was a small dog who wanted to see the world. One morning he",
)


@pytest.mark.parametrize(
    ("accept", "temperature"),
    [
        pytest.param("race", 0.8, marks=pytest.mark.long),
        pytest.param("rejection", 1.0, marks=pytest.mark.long),
        ("race", 0.0),
    ],
)
def test_guesses_stand_as_often_as_the_laws_predict(accept: str, temperature: float) -> None:
    """Some 3,000 trials, of which chance alone moves the rate by 0.008; `transformers` reads the same texts."""
    tokenizer = Tokenizer.load(resolve(None))
    prompts = [tokenizer.encode(text, add_special=False) for text in OPENINGS]
    runtime = build(prepare(config("draft=prompt_tokens(guesses=3)", f"accept={accept}")))
    count, most = (12, 400) if temperature else (4, 150)
    sampling = SamplingSpec(max_tokens=most, temperature=temperature)
    texts = written(runtime, [prompts[id % 4] for id in range(count)], range(count), sampling)
    found = judged(texts, reader(resolve(None)), Soft(BUNDLED), temperature, weighs=accept == "rejection")
    assert found.trials > (2000 if temperature else 300)
    assert found.slips == 0
    assert found.rate == pytest.approx(found.predicted, abs=0.02 if temperature else 0.01)


def test_tokens_go_with_a_model_that_was_grown(tmp_path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened as the model was, they guess the same: tokens, guesses and acceptance are those of the small one."""
    monkeypatch.setattr("bench.draft.heads.FOLDER", tmp_path)
    shape = Shape(layers=8, width=384, heads=6, kv_heads=2, intermediate=800)
    grow(resolve(None), tmp_path / "large", shape, dtype="float32")
    file = fitted(BUNDLED, Model("large", tmp_path / "large"))
    found = []
    for folder, weights in ((resolve(None), BUNDLED), (tmp_path / "large", file)):
        part = f"draft=prompt_tokens(weights={str(weights)!r})"
        runtime = build(
            prepare(EngineConfig(model=folder, dtype="float32", device="cpu", threads=1, max_model_len=256))
        )
        bench = Bench(runtime, techniques=[part])
        law = {"max_tokens": 24, "seed": 3}
        tokens = bench.run([spec(i, ids[i : i + 20], temperature=0.9 * (i % 4 > 0), **law) for i in range(8)])
        found.append((tokens, bench.engine.stack["draft"].acts))
    assert found[0] == found[1]
    assert found[0][1]["accepted"] > 10
