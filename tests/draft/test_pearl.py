"""PEARL: the rule by hand, and live: equal tokens, guesses that are the draft model's own, the same in a thread as in turns."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.draft.law import Trials, reader
from bench.draft.stands import Guessing, judged, made, written
from tests.accept.test_rejection import exact_law
from tests.adapt.adapters import make
from tests.draft.test_law import OPENINGS
from tests.draft.test_live import answers
from tests.draft.test_speculative_sampling import LAWS, Scripted, Watching, ask, check_guesses, config, told, with_parts
from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import pair, shallow, stranger
from weft import LLM, SamplingParams
from weft.conform.law import fit
from weft.draft.pearl import Pearl
from weft.errors import ConfigError
from weft.exec.beside import Beside
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.thread import step
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve, resolve_draft
from weft.registry import parse
from weft.slots import Guesses
from weft.types import Plan, RequestSpec, SamplingSpec, StepResult


def pearl(folder: Path, **arguments: Any) -> str:
    inside = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"draft=pearl(model={str(folder)!r}{inside})"


# ---------------------------------------------------------------------------------------------- by hand


def test_one_more_is_written_than_is_verified_and_what_was_kept_is_handed_on() -> None:
    words = [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 99, 1, 1, 1]]
    asks = [ask(10, 17), ask(11, 2), ask(12, 17, independent=True)]
    part = Pearl(guesses=3, model="x")
    found = part.early(asks, Scripted(words))
    assert [list(g.tokens) for g in found] == [[1, 2, 3, 4], [5, 6], [9, 99]]
    assert [g.laws is None for g in found] == [True, True, False]
    kept = Guesses((2, 3, 4))
    asks = [ask(1, 3, kept=kept), ask(8, 3), ask(9, 3, kept=Guesses(()))]
    assert [list(g.tokens) for g in part.propose(asks, None)] == [[2, 3, 4], [], []]
    part.observe(3, 2)
    assert part.acts == {"proposed": 3, "accepted": 2, "draft_rows": 8, "kept": 1}


@pytest.mark.parametrize("text", ["guesses=0", "guesses=33", "model=''", "guesses='four'", "size=1"])
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"draft=pearl({text})").build()


def test_the_target_keeps_its_threads_and_the_draft_has_one() -> None:
    for part, own in (("draft=pearl", 1), ("draft=speculative_sampling", 2)):
        runtime = build(prepare(config(part, threads=2, ops="cpu")))
        decoders = [runtime.decoder, runtime.draft]
        assert [d.native.program.threads for d in decoders if d is not None and d.native is not None] == [2, own]
        plan, draft = runtime.setup.plan, runtime.draft
        assert draft is not None
        laws = 64 * (9 if own == 1 else 4) * 4096 * 4  # those that are verified, and meanwhile one more than those
        assert draft.weights_bytes + draft.workspace_bytes + laws == plan.draft_bytes


# ---------------------------------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(tmp_path_factory.mktemp("near"))


@pytest.fixture(scope="module", params=[pytest.param("ref", marks=pytest.mark.long), "cpu"])
def drafting(request: pytest.FixtureRequest, near: Path) -> Runtime:
    return build(prepare(config(pearl(near), ops=request.param)))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    """40 requests under every law, of 3 to 130 tokens, some with several sequences."""
    rng = random.Random(11)
    out = []
    for i in range(40):
        length = rng.choice((3, 9, 17, 48, 70, 129))
        start = 0 if i % 3 == 0 else rng.randrange(len(ids) - length)
        n = 3 if i % 12 == 5 else 1
        law = LAWS[i % 8]
        out.append(spec(i, ids[start : start + length], seed=i, n=n, max_tokens=rng.choice((2, 9, 24)), **law))
    return out


@pytest.fixture(scope="module")
def plain(drafting: Runtime, specs: list[RequestSpec]) -> Bench:
    bench = Bench(drafting)
    bench.run(specs)
    return bench


def acts_of(bench: Bench) -> dict[str, int]:
    acts: dict[str, int] = bench.engine.stack["draft"].acts
    return acts


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [({}, {}), ({"guesses": 9}, {"max_guesses": 2, "max_num_seqs": 7, "max_rows": 40, "max_samples": 14})],
    ids=["plain", "small steps"],
)
def test_equal_tokens_and_logprobs(
    near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench, arguments: Any, limits: dict[str, int]
) -> None:
    """Small steps cut prompts and guesses.  Twice, the second time with prefix hits."""
    bench = Bench(drafting, techniques=[pearl(near, **arguments)], **limits)
    seen = Watching(bench)
    for _ in range(2):
        assert bench.run(specs) == plain.run([])
        assert told(bench) == told(plain)
        bench.events.clear()
    acts = acts_of(bench)
    assert acts["proposed"] > acts["accepted"] > 50
    assert acts["kept"] > 50
    assert bench.engine.stats.prefix_hit_tokens > 0
    assert limits or bench.steps < 2 * plain.steps
    assert max(len(guesses) for _, _, guesses in seen.guessed) <= bench.engine.limits.max_guesses


def test_in_a_thread_as_in_turns(near: Path, drafting: Runtime, specs: list[RequestSpec]) -> None:
    """Plans and facts of a run are the same, to the last guess, whether the two models compute at once or one after the other."""

    def run(threaded: bool) -> tuple[list[Plan], list[Any], set[str]]:
        bench, plans, facts, where = Bench(drafting, techniques=[pearl(near)]), list[Plan](), list[Any](), set[str]()
        beside, inner = beside_of(bench), bench.executor.execute
        assert beside.threaded
        beside.threaded = threaded
        part = bench.engine.stack["draft"]
        bench.engine.stack.instances["draft"] = Told(part, lambda: where.add(threading.current_thread().name))

        def execute(plan: Plan) -> StepResult:
            plans.append(plan)
            found = inner(plan)
            assert (found.beside_s > 0) <= threaded
            facts.append(found.works)
            return found

        bench.executor.execute = execute  # type: ignore[method-assign]
        bench.run(specs)
        bench.executor.close()
        return plans, facts, where

    (plans, facts, where), (turns, told_in_turn, one) = run(True), run(False)
    assert plans == turns
    assert facts == told_in_turn
    assert one == {threading.current_thread().name}
    assert len(where) == 1
    assert next(iter(where)).startswith("weft-draft")


class Told:
    """A technique that says when it is asked early."""

    def __init__(self, inner: Pearl, say: Callable[[], Any]) -> None:
        self.inner, self.say = inner, say

    def early(self, asks: Any, run: Any) -> Any:
        self.say()
        return self.inner.early(asks, run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def beside_of(bench: Bench) -> Beside:
    beside = bench.executor._beside
    assert beside is not None
    return beside


def disturb(rng: random.Random) -> Callable[[Bench], None]:
    def each(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        if bench.steps < 60 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)

    return each


def test_preempted_at_every_step(near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    bench = Bench(drafting, techniques=[pearl(near)])
    assert bench.run(specs, disturb(random.Random(1))) == plain.run([])
    assert bench.engine.stats.preemptions > 10
    assert acts_of(bench)["accepted"] > 20


def test_alone_as_among_others(near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    for one in specs[::9]:
        found = Bench(drafting, techniques=[pearl(near)], share=False).run([one])
        assert found == {key: plain.run([])[key] for key in found}


def test_where_memory_is_short(near: Path, drafting: Runtime, ids: list[int]) -> None:
    specs = [spec(i, ids[i : i + 6], seed=i, max_tokens=70, **LAWS[i % 7]) for i in range(10)]
    bench = Bench(drafting, techniques=[pearl(near)], blocks=24)
    assert bench.run(specs) == Bench(drafting).run(specs)
    assert bench.engine.stats.preemptions > 2
    assert acts_of(bench)["accepted"] > 20


def test_who_leaves_in_the_middle_leaves_nothing(near: Path, drafting: Runtime, ids: list[int]) -> None:
    """Every third request is cancelled at some step; the others' tokens are what they are, and every block comes back."""
    rng = random.Random(5)
    specs = [spec(i, ids[i : i + 30], seed=i, max_tokens=40, **LAWS[i % 7]) for i in range(18)]

    def cancel(bench: Bench) -> None:
        if bench.steps % 3 == 0:
            bench.engine.cancel(rng.choice(range(0, 18, 3)))

    bench = Bench(drafting, techniques=[pearl(near)])
    found, wanted = bench.run(specs, cancel), Bench(drafting).run(specs)
    stay = [key for key in wanted if key[0] % 3]
    assert {key: found[key] for key in stay} == {key: wanted[key] for key in stay}
    assert sum(map(len, found.values())) < sum(map(len, wanted.values()))


def test_a_draft_of_another_shape(tmp_path: Path, ids: list[int]) -> None:
    """Sliding windows, rows of other widths, a short context beyond which nothing is guessed; hardly a guess stands."""
    part = pearl(stranger(tmp_path))
    runtime = build(prepare(config(part)))
    specs = [spec(i, (ids * 2)[: 180 + 4 * i], seed=i, max_tokens=16, **LAWS[i % 8]) for i in range(8)]
    bench = Bench(runtime, techniques=[part])
    assert bench.run(specs) == Bench(runtime).run(specs)
    assert acts_of(bench)["draft_rows"] > 20


@pytest.fixture(scope="module")
def alone(near: Path) -> Runtime:
    return build(prepare(EngineConfig(model=near, dtype="float32", max_model_len=1024, device="cpu", threads=1)))


def test_guesses_are_the_draft_model_s_own(near: Path, drafting: Runtime, ids: list[int], alone: Runtime) -> None:
    """What was written ahead and thrown away leaves nothing behind: guesses are those of a model that only read the text."""
    bench = Bench(drafting, techniques=[pearl(near)], max_rows=40)
    seen = Watching(bench)
    bench.run([spec(i, ids[9 * i : 12 * i + 5], max_tokens=24, temperature=0.0) for i in range(9)])
    check_guesses(seen, alone)


@pytest.mark.parametrize("part", ["kv.compress=streaming_llm(sinks=4, window=24, every=8)", "kv.store=int8"])
def test_beside_techniques_of_the_target(near: Path, drafting: Runtime, ids: list[int], part: str) -> None:
    stored = part.startswith("kv.store")
    runtime = build(prepare(config(part, pearl(near)))) if stored else drafting
    prompts = [ids[i : 62 + i] for i in range(9)]
    specs = [spec(i, p, seed=i, max_tokens=24, temperature=0.8 * (i % 3 > 1)) for i, p in enumerate(prompts)]
    bench = Bench(runtime, techniques=[part, pearl(near)])
    assert bench.run(specs) == Bench(runtime, techniques=[part], share=False).run(specs)
    assert acts_of(bench)["accepted"] > 10
    assert beside_of(bench).threaded is not stored


@pytest.mark.parametrize("accept", ["race", "rejection", "spectr"])
def test_a_draft_that_is_the_target_is_never_thrown_away(ids: list[int], accept: str) -> None:
    """All guesses stand, and the one in the target's place: 1 token of the prompt's step, then 5 a step."""
    techniques = [pearl(resolve(None), guesses=4), f"accept={accept}"]
    runtime = build(prepare(config(*techniques, max_num_seqs=16)))
    bench = Bench(runtime, techniques=techniques)
    seen, laws = Watching(bench), [law for law in LAWS if "stop_ids" not in law]
    found = bench.run([spec(i, ids[i : i + 30], seed=i, max_tokens=21, **laws[i % 7]) for i in range(14)])
    assert {len(tokens) for tokens in found.values()} == {21}
    assert acts_of(bench)["accepted"] == acts_of(bench)["proposed"] == 14 * 4 * 4
    assert bench.steps == 1 + 20 // 5 + 1, "and an empty one, in which they leave"
    assert seen.followed == 14 * (30 + 4), (
        "after the prompt the draft model computes the newest token again, and no other"
    )


def test_a_request_declines_or_chooses(near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    """The second model follows some sequences beside the target and others behind it, in one step."""
    own = ["draft=none", "draft=ngram(shortest=1)", "draft=speculative_sampling(guesses=2)", "draft=pearl(guesses=2)"]
    bench = Bench(drafting, techniques=[pearl(near)])
    assert bench.run([with_parts(one, *[own[i % 4]] * (i % 5 < 4)) for i, one in enumerate(specs)]) == plain.run([])
    acts = bench.engine.stacks.acts()
    assert acts["draft=speculative_sampling.accepted"] > 20
    assert acts["draft=pearl.accepted"] > 20


def test_adapters(near: Path, tmp_path: Path, ids: list[int]) -> None:
    """The target's alone, as with any draft."""
    from transformers import AutoModelForCausalLM

    make(
        tmp_path / "own",
        AutoModelForCausalLM.from_pretrained(resolve(None)),
        seed=2,
        rank=3,
        targets=["q_proj"],
        gain=0.5,
    )
    runs = []
    for parts in ([], [pearl(near)]):
        with LLM(
            device="cpu",
            threads=1,
            max_model_len=256,
            techniques=parts,
            draft_control="off",
            lora=[f"own={tmp_path / 'own'}"],
        ) as llm:
            given = SamplingParams(temperature=0.8, seed=3, max_tokens=40)
            said = llm.generate([STORY[:90], STORY[:200]], given, adapter="own")
            runs.append([out.outputs[0].token_ids for out in said])
    assert runs[0] == runs[1]


def test_stop_strings_and_grammars(near: Path) -> None:
    texts = []
    for parts in ([], [pearl(near)]):
        with LLM(device="cpu", threads=1, max_model_len=512, techniques=parts, draft_control="off") as llm:
            texts.append(list(answers(llm)))
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------- laws


class Firsts:
    """Notes the token in the place of the target's own, and whether it stood: a trial behind those of the guesses before it."""

    def __init__(self, runtime: Runtime, trials: Trials) -> None:
        self.inner, self.trials = runtime.executor.execute, trials
        self.beside = runtime.executor._beside
        self.count = 0
        runtime.executor.execute = self.execute  # type: ignore[method-assign]

    def execute(self, plan: Plan) -> StepResult:
        result = self.inner(plan)
        assert self.beside is not None
        for work, fact in zip(plan.works, result.works, strict=True):
            found = self.beside._found.get(work.request)
            if work.model == "target" and found is not None and len(fact.tokens) == work.guesses + 1:
                first = found.tokens[0]
                mine = self.trials.by_sequence.setdefault(work.request, [])
                mine.append((work.output + work.guesses, first, fact.tokens[-1] == first))
                self.count += 1
        return result


@pytest.mark.parametrize(
    ("accept", "temperature"),
    [
        pytest.param("race", 0.8, marks=pytest.mark.long),
        pytest.param("rejection", 1.0, marks=pytest.mark.long),
        ("race", 0.0),
    ],
)
def test_each_trial_is_what_its_noise_makes_of_the_two_laws(accept: str, temperature: float) -> None:
    """Guesses that were kept, and then each token that was written in the place of the target's: what was guessed there and
    whether it stands follow from both laws, which `transformers` reads, and the noise of the place."""
    model, weighs = resolve(None), accept == "rejection"
    prompts = [Tokenizer.load(model).encode(text, add_special=False) for text in OPENINGS]
    count, sampling = 12 if temperature else 4, SamplingSpec(max_tokens=200, temperature=temperature)
    for firsts in (False, True):
        runtime = made(Guessing("", "draft=pearl(guesses=3)", lambda _: None, accept))
        trials = Only() if firsts else Trials()
        seen = Firsts(runtime, trials) if firsts else None
        texts = written(runtime, [prompts[i % 4] for i in range(count)], range(count), sampling, trials)
        found = judged(texts, reader(model), reader(resolve_draft("bundled")), temperature, weighs=weighs)
        assert found.slips == 0
        assert found.trials > (1000 if temperature else 150)
        assert seen is None or found.trials == seen.count
        assert found.rate == pytest.approx(found.predicted, abs=0.02 if temperature else 1e-9)
        runtime.close()


class Only(Trials):
    """Takes nothing from plans by itself."""

    def take(self, plan: Plan, result: StepResult) -> None:
        pass


def test_the_joint_law_of_three_tokens(tmp_path: Path) -> None:
    """The first is weighed in the place of the target's own, the next as guesses that were kept, or drawn anew."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    model = pair(target, draft)
    techniques = [pearl(draft, guesses=2), "accept=rejection"]
    given: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 64, "device": "cpu", "threads": 1}
    runtime = build(prepare(EngineConfig(model=target, techniques=techniques, **given)))
    prompt, count = [3, 7, 11, 7, 3, 9, 7], 2500
    bench = Bench(runtime, techniques=techniques)
    found = bench.run([spec(i, prompt, seed=i, max_tokens=4, temperature=0.9, top_k=5) for i in range(count)])
    assert acts_of(bench)["kept"] > 200
    assert acts_of(bench)["accepted"] > 200
    assert bench.engine.stack["accept"].acts["rejected"] > 200
    assert fit([tuple(found[i, 0][:3]) for i in range(count)], exact_law(model, prompt, 0.9, 5, 3)).ok


# ---------------------------------------------------------------------------------------------- faults


def test_what_goes_wrong_in_the_thread_is_heard_and_the_engine_goes_on(
    near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench
) -> None:
    bench = Bench(drafting, techniques=[pearl(near)])
    falls = iter([False, False, True])

    def say() -> None:
        if next(falls, False):
            raise ZeroDivisionError("in the thread")

    bench.engine.stack.instances["draft"] = Told(bench.engine.stack["draft"], say)
    for one in specs[:6]:
        bench.events += bench.engine.add(one, 0.0)
    for _ in range(2):
        bench.events += step(bench.engine, bench.executor)[0]
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        step(bench.engine, bench.executor)
    assert bench.run([]) == {key: tokens for key, tokens in plain.run([]).items() if key[0] < 6}


def test_a_pass_that_dies_waits_for_the_thread(
    near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes its blocks next must find nobody writing there."""
    bench = Bench(drafting, techniques=[pearl(near)])
    goes, ended = threading.Event(), list[bool]()

    def say() -> None:
        if not goes.is_set():
            goes.wait(0.2)
            ended.append(True)

    bench.engine.stack.instances["draft"] = Told(bench.engine.stack["draft"], say)
    for one in specs[:6]:
        bench.events += bench.engine.add(one, 0.0)
    with monkeypatch.context() as patch:

        def dies(*args: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(bench.executor, "_forward", dies)
        with pytest.raises(KeyboardInterrupt):
            step(bench.engine, bench.executor)
    assert ended == [True]
    goes.set()
    assert bench.run([]) == {key: tokens for key, tokens in plain.run([]).items() if key[0] < 6}


def test_the_thread_ends_with_the_executor(near: Path, drafting: Runtime, specs: list[RequestSpec]) -> None:
    bench = Bench(drafting, techniques=[pearl(near)])
    bench.run(specs[:2])
    mine = [beside_of(bench)._thread]
    assert mine[0] is not None
    threads = list(mine[0]._threads)
    assert [t.is_alive() for t in threads] == [True]
    bench.executor.close()
    bench.executor.close()
    assert [t.is_alive() for t in threads] == [False]
