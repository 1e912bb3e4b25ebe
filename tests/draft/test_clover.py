"""Clover's heads: the formula by hand, the chain, files that are refused; live: equal tokens, and the heads' own guesses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.contender import Model
from bench.draft.heads import fitted
from bench.draft.law import Heads, reader
from bench.draft.stands import judged, written
from tests.draft.test_speculative_sampling import LAWS, Watching, told
from tests.exec.conftest import STORY, Bench, spec
from tools.grow import Shape, grow
from weft.draft._weights import MARKS
from weft.draft.clover import BUNDLED, HEADS, KIND, MOST, Clover, augmented, head, keys, read_header, shapes
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.slots import Ask
from weft.types import RequestSpec, SamplingSpec

# ---------------------------------------------------------------------------------------------- by hand

WIDTH, INNER, WINDOW = 6, 8, 3


def some_weights(
    seed: int = 0, width: int = WIDTH, inner: int = INNER, window: int = WINDOW
) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=noise) * 0.5 for name, shape in shapes(width, inner, window).items()}


def normed(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(float((x * x).mean()))


def block_by_hand(w: dict[str, np.ndarray], name: str, x: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """One place alone, head by head: attention over what stands before it, the nearest last, and a gated MLP."""
    size = len(x) // HEADS
    q, got = w[f"{name}.q"] @ normed(x), []
    for h in range(HEADS):
        mine = slice(h * size, (h + 1) * size)
        scores, values = [], []
        for distance, other in enumerate(reversed(others), 1):
            both = w[f"{name}.kv"] @ normed(other)
            k, v = both[: len(x)][mine], both[len(x) :][mine]
            scores.append(math.exp(float(q[mine] @ k) / math.sqrt(size) + float(w[f"{name}.near"][h, -distance])))
            values.append(v)
        got.append(sum(s * v for s, v in zip(scores, values)) / sum(scores))
    y = x + w[f"{name}.o"] @ np.concatenate(got)
    both = w[f"{name}.gate_up"] @ normed(y)
    gate, up = both[: len(both) // 2], both[len(both) // 2 :]
    return np.asarray(y + w[f"{name}.down"] @ (gate / (1 + np.exp(-gate)) * up))


def test_two_heads_by_hand() -> None:
    """Three states are known of one sequence, two of another; then two tokens are guessed."""
    tensors = some_weights()
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    rnd = np.random.default_rng(1)
    states, tokens = rnd.normal(size=(2, WINDOW, WIDTH)), rnd.normal(size=(2, 2, WIDTH))
    known = (3, 2)
    wanted = []
    for i in range(2):
        u = [w["in"] @ h for h in states[i]]
        s = block_by_hand(w, "augment", u[-1], u[WINDOW - known[i] :])
        e = [w["token"] @ x for x in tokens[i]]
        first = block_by_hand(w, "head", s, e[:1])
        second = block_by_hand(w, "head", first, e)
        wanted.append([w["out"] @ first, w["out"] @ second])
    double = {name: tensor.double() for name, tensor in tensors.items()}
    u = torch.tensor(states) @ double["in"].T
    seen = torch.tensor([[True, True, True], [False, True, True]])
    s = augmented(double, u[:, -1], keys(double, "augment", u), seen)
    kv = keys(double, "head", torch.tensor(tokens) @ double["token"].T)
    s, one = head(double, s, kv[:, :1])
    _, two = head(double, s, kv)
    assert torch.stack([one, two], 1).numpy() == pytest.approx(np.array(wanted), rel=1e-4, abs=1e-3)


# ---------------------------------------------------------------------------------------------- the chain


class Script:
    """A target of WIDTH channels that embeds token t as t's unit vector, and draws from a script; remembers what it was asked."""

    width, vocab = WIDTH, 16

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.words, self.target = words, self
        self.embedded: list[list[int]] = []
        self.states: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        self.embedded.append(list(ids))
        return torch.eye(16, WIDTH)[list(ids)]

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        self.states.append(states)
        return torch.arange(16.0).expand(len(states), 16).clone()

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.eye(16, WIDTH)[list(ids)]

    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: torch.Tensor) -> list[tuple[int, Any]]:
        assert len(rows) == len(logits)
        self.logits.append(logits)
        return [(self.words[i][len(said)], torch.full((16,), float(len(said)))) for i, said in rows]


def put(path: Path, weights: dict[str, torch.Tensor], mark: torch.Tensor, **more: str) -> str:
    save_file({**weights, "mark": mark}, path, {"kind": KIND.name, "vocab": "16", **more})
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return put(tmp_path / "heads.safetensors", some_weights(), torch.eye(16, WIDTH)[[2 * i for i in range(MARKS)]])


def ask(newest: int, most: int, rows: int = 1, **more: Any) -> Ask:
    hidden = torch.arange(float(rows * WIDTH)).view(rows, WIDTH) + newest
    return Ask(np.array([7, 8, 9, newest]), 2, 1, most, SamplingSpec(stop_ids=(15,)), 5, **{"hidden": hidden, **more})


def test_each_head_reads_the_guess_before_it(file: str) -> None:
    """Ends: the heads, what can be verified, an end id, logits that are no numbers, no state to begin with."""
    words = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 15, 1, 1], [3, -1, 0, 0], [0], [0]]
    asks = [ask(10, 8), ask(11, 2), ask(12, 8), ask(13, 8, independent=True), ask(14, 0), ask(1, 8, hidden=None)]
    run, part = Script(words), Clover(guesses=3, weights=file)
    found = part.propose(asks, run)
    assert [list(g.tokens) for g in found] == [[1, 2, 3], [5, 6], [9, 15], [3], [], []]
    assert run.embedded[1:] == [[10, 11, 12, 13], [1, 5, 9, 3], [2]]
    assert [g.laws is None for g in found] == [True, True, True, False, True, True]
    assert found[3].laws.tolist() == [[0.0] * 16]
    assert part.acts == {"proposed": 0, "accepted": 0, "head_rows": 9, "lessons": 0}
    part.observe(3, 2)
    assert part.acts == {"proposed": 3, "accepted": 2, "head_rows": 9, "lessons": 0}
    for logits, states in zip(run.logits, run.states, strict=True):
        length = states.square().mean(-1, keepdim=True).sqrt()  # the head's norm takes it away
        assert torch.allclose(logits, torch.arange(16.0) * length)
    assert part.propose([], run) == []
    # Alone, and with nobody who ended before it, a sequence's heads say the same.
    lone = Script([words[0]])
    Clover(guesses=3, weights=file).propose(asks[:1], lone)
    assert [float((a[0] - b[0]).abs().max()) for a, b in zip(run.states, lone.states, strict=True)] == pytest.approx(
        [0.0] * 3, abs=1e-5
    )


def test_the_window_goes_along_and_starts_anew_after_a_gap(file: str) -> None:
    part, run = Clover(weights=file), Script([[1] * 4])
    states = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2))
    state: dict[str, Any] = {}

    def tell(stop: int, count: int) -> Any:
        context = np.arange(stop + 1) % 10
        part.propose([Ask(context, 2, 1, 0, SamplingSpec(), 5, state=state, hidden=states[stop - count : stop])], run)
        return state["clover"]

    w = part._weights
    assert tell(2, 2).count == 2
    seen = tell(3, 1)
    assert (seen.count, seen.stop) == (3, 3)
    wanted = keys(w, "augment", states[:3] @ w["in"].T)
    assert torch.allclose(seen.kv, wanted)
    seen = tell(6, 3)
    assert torch.allclose(seen.kv, keys(w, "augment", states[3:6] @ w["in"].T))
    assert torch.allclose(seen.u, states[5] @ w["in"].T)
    seen = tell(8, 1)  # the state of position 6 was never told
    assert (seen.count, seen.stop) == (1, 8)
    assert torch.allclose(seen.kv[-1:], keys(w, "augment", states[7:8] @ w["in"].T))
    assert tell(9, 9).count == WINDOW


# ---------------------------------------------------------------------------------------------- files


def test_wrong_arguments_are_refused() -> None:
    for text in ("guesses=0", f"guesses={MOST + 1}", "weights=''", "guesses='four'", "size=1", "online=-1"):
        with pytest.raises(ConfigError):
            parse(f"draft=clover({text})").build()


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    """Missing; a pickle; cut short; another kind; a weight too few; a shape that does not fit."""
    mark, weights = torch.zeros(MARKS, WIDTH), some_weights()
    torch.save(weights, tmp_path / "pickle")
    put(tmp_path / "kind", weights, mark, kind="weft clover heads 0")
    put(tmp_path / "vocab", weights, mark, vocab="many")
    put(tmp_path / "few", {name: x for name, x in weights.items() if name != "head.o"}, mark)
    put(tmp_path / "shape", {**weights, "head.o": torch.zeros(INNER, INNER + 4)}, mark)
    put(tmp_path / "odd", some_weights(inner=6), mark)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    for name in ("nowhere", "pickle", "kind", "vocab", "few", "shape", "odd", "empty", "long"):
        with pytest.raises(ConfigError, match=f"{name}.*tools.train_tiny heads"):
            read_header(tmp_path / name)
    whole = Path(put(tmp_path / "whole", weights, mark))
    assert read_header(whole).window == WINDOW
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-40])
    put(tmp_path / "nan", {**weights, "out": weights["out"] * torch.nan}, mark)
    for name in ("cut", "nan"):
        with pytest.raises(ConfigError, match=name):
            Clover(weights=str(tmp_path / name)).attach(Script([]))


def test_heads_of_another_model_are_refused(tmp_path: Path, file: str) -> None:
    """By width, by vocabulary, and by what its embeddings are; embeddings that were rounded pass."""
    Clover(weights=file).attach(Script([]))
    for name, value in (("width", 7), ("vocab", 17)):
        other = Script([])
        setattr(other, name, value)
        with pytest.raises(ConfigError, match=f"were trained for a model of width {WIDTH} with 16 tokens"):
            Clover(weights=file).attach(other)
    mark = torch.eye(16, WIDTH)[[2 * i for i in range(MARKS)]]
    Clover(weights=put(tmp_path / "rounded", some_weights(), mark * 0.9)).attach(Script([]))
    with pytest.raises(ConfigError, match="trained for another model"):
        Clover(weights=put(tmp_path / "other", some_weights(), mark.flip(0))).attach(Script([]))
    config = EngineConfig(model=resolve(None), device="cpu", techniques=[f"draft=clover(weights={file!r})"])
    with pytest.raises(ConfigError, match="this one has width 256 and 4096 tokens"):
        build(prepare(config))


def test_the_bundled_heads_are_small_and_whole() -> None:
    data = BUNDLED.read_bytes()
    assert len(data) < 300_000
    size = int.from_bytes(data[:8], "little")
    entries = {k: v for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__"}
    assert {entry["dtype"] for entry in entries.values()} == {"BF16"}
    assert max(entry["data_offsets"][1] for entry in entries.values()) == len(data) - 8 - size
    assert (BUNDLED.parent / "README.md").is_file()


# ---------------------------------------------------------------------------------------------- live


def config(*techniques: str, **more: Any) -> EngineConfig:
    given = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 64, "device": "cpu", "threads": 1}
    return EngineConfig(model=resolve(None), techniques=techniques, **{**given, **more})


def test_the_memory_plan_has_the_heads() -> None:
    alone, both = prepare(config()).plan, prepare(config("draft=clover(guesses=3)")).plan
    h = read_header(BUNDLED)
    weights = sum(math.prod(x.shape) for name, x in load_file(BUNDLED).items() if name != "mark")
    states, laws = 64 * h.inner * (2 * h.window + 1), 64 * 3 * 4096
    assert both.draft_bytes == 4 * (weights + states + laws)
    assert alone.draft_bytes == 0
    assert both.weights_bytes == alone.weights_bytes


MACHINES = [("ref", "float32"), ("cpu", "float32"), ("cpu", "bfloat16")]


@pytest.fixture(scope="module", params=MACHINES, ids=" ".join)
def machine(request: pytest.FixtureRequest) -> Runtime:
    ops, dtype = request.param
    return build(prepare(config(ops=ops, dtype=dtype)))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    lengths = (3, 9, 17, 30, 48, 70, 129)
    return [
        spec(i, ids[i % 20 : i % 20 + lengths[i % 7]], seed=i, n=1 + 2 * (i % 12 == 5), max_tokens=20, **LAWS[i % 8])
        for i in range(40)
    ]


@pytest.mark.parametrize(
    "machine", [pytest.param(MACHINES[0], marks=pytest.mark.long), *MACHINES[1:]], ids=" ".join, indirect=True
)
@pytest.mark.parametrize(
    ("part", "limits"),
    [
        ("draft=clover(guesses=3)", {}),
        ("draft=clover(guesses=8)", {"max_guesses": 2, "max_num_seqs": 7, "max_rows": 40, "max_samples": 14}),
        ("schedule=layered", {}),
    ],
    ids=["", "small steps", "in stretches of layers"],
)
def test_equal_tokens_and_logprobs(
    machine: Runtime, specs: list[RequestSpec], part: str, limits: dict[str, int]
) -> None:
    techniques = [part] if part.startswith("draft") else [part, "draft=clover"]
    runtime = machine if part.startswith("draft") else build(prepare(config(part, ops="ref")))
    if runtime is not machine and machine.setup.dtype != "float32":
        pytest.skip("once is enough")
    plain = Bench(runtime)
    wanted = plain.run(specs)
    bench = Bench(runtime, techniques=techniques, **limits)
    assert bench.run(specs) == wanted
    assert told(bench) == told(plain)
    acts = bench.engine.stack["draft"].acts
    assert acts["head_rows"] >= acts["proposed"] > acts["accepted"] > 100


def test_guesses_are_the_heads_own(machine: Runtime, ids: list[int]) -> None:
    """Beside transformers: its states of the same text, run through the heads place by place; after any acceptance."""
    if machine.setup.dtype != "float32":
        pytest.skip("near ties differ in 16 bits")
    bench = Bench(machine, techniques=["draft=clover(guesses=4)"])
    seen = Watching(bench)
    bench.run([spec(i, ids[9 * i : 12 * i + 5], max_tokens=24, temperature=0.0) for i in range(7)])
    assert len({len(counts) for counts in seen.accepted}) > 1
    target, heads = reader(resolve(None)), Heads(BUNDLED)
    assert len(seen.guessed) > 30
    for context, _, said in seen.guessed[::5]:
        prompt, first = context[:1], len(context) - 1
        trials = [(first + i, token, True) for i, token in enumerate(said)]
        law = heads.laws(target, prompt, [*context[1:], *said], trials, 0.0)
        assert tuple(law.argmax(-1).tolist()) == said


def test_heads_go_with_a_model_that_was_grown(tmp_path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened as the model was, they guess the same: tokens, guesses and acceptance are those of the small one."""
    monkeypatch.setattr("bench.draft.heads.FOLDER", tmp_path)
    shape = Shape(layers=8, width=384, heads=6, kv_heads=2, intermediate=800)
    grow(resolve(None), tmp_path / "large", shape, dtype="float32")
    large = Model("large", tmp_path / "large")
    file = fitted(BUNDLED, large)
    assert fitted(BUNDLED, Model("own", resolve(None))) == BUNDLED
    found = []
    for folder, weights in ((resolve(None), BUNDLED), (large.folder, file)):
        part = f"draft=clover(weights={str(weights)!r})"
        runtime = build(
            prepare(EngineConfig(model=folder, dtype="float32", device="cpu", threads=1, max_model_len=256))
        )
        bench = Bench(runtime, techniques=[part])
        law = {"max_tokens": 24, "seed": 3}
        tokens = bench.run([spec(i, ids[i : i + 20], temperature=0.9 * (i % 4 > 0), **law) for i in range(8)])
        found.append((tokens, bench.engine.stack["draft"].acts))
    assert found[0] == found[1]
    assert found[0][1]["accepted"] > 20


OPENINGS = (
    "It had rained for three days when the stranger came down the road from the hills, and",
    "The captain put the letter into his pocket without a word. Then he looked at the sea and",
    "When I was a child we lived in a house with a green door, near the market, where my father",
    "Once upon a time there was a small dog who wanted to see the world. One morning he",
)


@pytest.mark.parametrize(
    ("accept", "temperature"),
    [
        pytest.param("race", 0.8, id="race", marks=pytest.mark.long),
        pytest.param("rejection", 1.0, id="rejection", marks=pytest.mark.long),
        pytest.param("race", 0.0, id="greedy"),
    ],
)
def test_guesses_stand_as_often_as_the_laws_predict(accept: str, temperature: float) -> None:
    """Some 3,000 trials, of which chance alone moves the rate by 0.008; `transformers` reads the same texts."""
    tokenizer = Tokenizer.load(resolve(None))
    prompts = [tokenizer.encode(text, add_special=False) for text in OPENINGS]
    runtime = build(
        prepare(config("draft=clover(guesses=3)", f"accept={accept}", max_model_len=512, draft_control="off"))
    )
    count, sampling = (12, {"max_tokens": 400}) if temperature else (4, {"max_tokens": 150})
    law = SamplingSpec(temperature=temperature, **sampling)
    texts = written(runtime, [prompts[id % 4] for id in range(count)], range(count), law)
    found = judged(texts, reader(resolve(None)), Heads(BUNDLED), temperature, weighs=accept == "rejection")
    assert found.trials > (2000 if temperature else 300)
    assert found.slips == 0
    assert found.rate == pytest.approx(found.predicted, abs=0.02 if temperature else 0.01)
