"""The harness of benchmarks: turns, phases, figures and ratios against counts made by hand, and the program around them."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import contender, harness, oracle
from bench.contender import Case, Contender, Model, Run, rss_bytes
from bench.harness import Options, bundled, compare, encode, grown, main
from bench.texts import OPENINGS, PARAGRAPHS
from tools import grow
from tools.grow import Shape
from tools.measured import NOT_RESULTS
from weft.bench.limit import bytes_per_step
from weft.errors import CapacityError, ConfigError, EngineError
from weft.models import load_spec
from weft.models.layout import weights_bytes

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(
    p
    for p in (ROOT / "bench").glob("*/*.py")
    if re.search(r"^from bench\.harness import .*\bmain$", p.read_text("utf8"), re.M)
)
"""Of a technique each; tables of several, and what a simulator is held to, have programs of their own."""
RESULTS = sorted(p for p in (ROOT / "bench" / "results").glob("*.json") if p.name not in NOT_RESULTS)
BLOCK = 16


@pytest.fixture(scope="module")
def model() -> Model:
    return bundled()


@pytest.fixture(scope="module")
def null(model: Model) -> Case:
    """Three short prompts, two of them at once."""
    return Case(name="none", prompts=[p[:24] for p in encode(model, PARAGRAPHS[:3])], max_new=12, batch=2)


@pytest.fixture(scope="module")
def found(model: Model, null: Case) -> dict[str, Any]:
    ngram = replace(null, name="ngram", techniques=("draft=ngram(shortest=1)",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "read_gb_s", lambda threads, device: 12.5)
        return compare(model, null, [ngram], title="short", rounds=2, memory=False)


# ---------------------------------------------------------------------------------------------- what a comparison tells


def test_what_was_measured_is_told(found: dict[str, Any], model: Model, null: Case) -> None:
    assert (found["model"], found["title"], found["rounds"], found["threads"]) == ("weft-tiny", "short", 2, 1)
    assert found["load"] == {
        "prompts": 3, "prompt_tok": 24, "new_tok": 12, "batch": 2, "sampling": {"temperature": 0.0}, "apart": True,
    }  # fmt: skip
    assert found["shape"] == {
        "layers": 8, "width": 256, "heads": 4, "kv_heads": 2, "intermediate": 768, "vocab": 4096, "parameters": 7344384,
    }  # fmt: skip
    one, other = found["cases"]
    assert (one["name"], other["name"]) == ("none", "ngram")
    assert set(other["stack"]) - set(one["stack"]) == {"draft=ngram(shortest=1)"}


@pytest.mark.parametrize(
    ("part", "share"),
    [
        ("none", 0),
        ("ngram", 0),
        ("early_exit", 0),
        ("speculative_sampling", 2_672_384),
        ("pearl", 2_672_384),
        ("clover", 131_168),
        ("prompt_tokens", 4 * 256),
    ],
)
def test_what_a_draft_has_of_its_own_by_hand(null: Case, model: Model, part: str, share: int) -> None:
    """Tensors of the checkpoints that ship, counted beforehand."""
    setup = Contender(model, replace(null, techniques=(f"draft={part}",)), 1).runtime.setup
    assert round(harness._draft_share(setup) * 7_344_384) == share


def test_figures_by_hand(found: dict[str, Any], model: Model, null: Case) -> None:
    one, other = found["cases"]
    assert one["median"]["tok_per_step"] == 1
    assert other["median"]["tok_per_step"] > 1
    # 24 prompt tokens and 11 of the 12 new ones have KV, of two sequences at once.
    spec = load_spec(model.folder)
    entry = 2 * len(spec.layers) * spec.kv_heads * spec.head_dim * 4
    assert one["median"]["kv_peak_bytes"] == 2 * math.ceil(35 / BLOCK) * BLOCK * entry
    assert other["acts"]["draft=ngram.accepted"] > 0
    assert other["same_tokens"] == one["same_tokens"] == 1
    assert one["median"]["rss_peak_bytes"] is None
    for case in found["cases"]:
        for key, (low, high) in case["spread"].items():
            assert low <= case["median"][key] <= high
        assert all(low <= case["ratio"][key] <= high for key, (low, high) in case["ratio_spread"].items())
    assert "preemptions" not in other["ratio"], "the null has none to compare with"


def test_the_limit_is_that_of_the_null(found: dict[str, Any], model: Model) -> None:
    runtime = Contender(model, Case(name="x", prompts=[[1] * 24] * 2, max_new=12, batch=2), 1).runtime.setup
    assert found["limit"]["bytes_per_step"] == bytes_per_step(runtime.spec, runtime.groups, "float32", 2, 24 + 6)
    seconds = found["limit"]["bytes_per_step"] / (found["limit"]["read_gb_s"] * 1e9)
    assert found["limit"]["decode_tok_s"] == pytest.approx(2 / seconds)
    for case in found["cases"]:
        assert case["of_limit"] == pytest.approx(case["median"]["decode_tok_s"] * seconds / 2)


def test_the_keys_are_those_of_the_document(found: dict[str, Any]) -> None:
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf8")
    section = text.split("## Benchmarks of techniques")[1].split("\n## ")[0]
    of_case, of_figure = (set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", t, re.MULTILINE))))
                          for t in re.split(r"^\| figure", section, flags=re.MULTILINE))  # fmt: skip
    assert of_case == found["cases"][0].keys()
    assert of_figure - {"ttft_s", "step_p95_s"} == found["cases"][0]["median"].keys()
    holds = section.split("The file holds")[1].split("`limit` is")[0]
    told = {"technique", "command", "code", "date", "machine", "notes", *found}
    assert set(re.findall(r"`(\w+)`", holds)) == told


def test_ratios_are_taken_within_a_round_and_the_nulls_from_round_to_round() -> None:
    assert harness._ratios([2.0, 9.0], [1.0, 3.0], False) == [2.0, 3.0]
    assert harness._ratios([1.0, 3.0, 6.0], [1.0, 3.0, 6.0], True) == [3.0, 2.0]
    assert harness._ratios([4.0], [4.0], True) == [1.0]
    assert harness._ratios([4.0], [0.0], False) == []


def test_tokens_are_the_same_up_to_the_first_that_differs() -> None:
    wanted = {0: [1, 2, 3, 4], 1: [5, 6, 7, 8]}
    assert harness._same(wanted, wanted) == 1
    assert harness._same({0: [1, 2, 9, 4], 1: [5, 6, 7, 8]}, wanted) == 6 / 8
    assert harness._same({0: [1, 2], 1: []}, wanted) == 2 / 8


# ---------------------------------------------------------------------------------------------- how it is run


def test_cases_take_turns_wave_by_wave(model: Model, null: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int, int]] = []

    def wave(self: Contender, which: range, turn: int, run: Run) -> Iterator[None]:
        order.append((self.case.name, turn, which.start))
        run.prefill_s = run.decode_s = run.decode_cpu_s = run.prefill_tok = run.decode_tok = 1
        run.steps, run.tokens = [(1.0, 1, 1)], {0: [1]}
        yield from ()

    monkeypatch.setattr(Contender, "_wave", wave)
    monkeypatch.setattr(harness, "read_gb_s", lambda threads, device: 10.0)
    compare(model, null, [replace(null, name="b"), replace(null, name="c", batch=3)], rounds=2, memory=False)
    warm = [("none", 0, 0), ("none", 0, 2), ("b", 0, 0), ("b", 0, 2), ("c", 0, 0)]
    turns = [[("none", t, 0), ("b", t, 0), ("c", t, 0), ("none", t, 2), ("b", t, 2)] for t in (1, 2)]
    assert order == [*warm, *turns[0], *turns[1]]


def test_pieces_of_a_wave_take_turns_and_the_clock_stands_between(model: Model, null: Case) -> None:
    """Two waves of 11 steps, in pieces of 4: prompts, 4, 4 and the rest.  What others do between is nobody's time."""
    one, whole = Contender(model, replace(null, piece=4), 1), Contender(model, null, 1).run(0)
    run, turns = Run(), 0
    for _ in one.waves(0, run):
        time.sleep(0.2)
        turns += 1
    assert turns == 2 * (1 + 2 + 1)
    assert run.tokens == whole.tokens
    assert [x[1:] for x in run.steps] == [x[1:] for x in whole.steps]
    assert sum(s for s, _, _ in run.steps) < run.decode_s < sum(s for s, _, _ in run.steps) + 0.2


def test_phases_are_apart(model: Model, null: Case) -> None:
    run = Contender(model, null, 1).run(0)
    assert run.prefill_tok == 3 * 24
    assert run.decode_tok == 3 * 11, "the first token of each belongs to its prompt"
    assert [(tok, count) for _, tok, count in run.steps] == [(2, 2)] * 11 + [(1, 1)] * 11
    assert sum(seconds for seconds, _, _ in run.steps) < run.decode_s
    assert {i: len(t) for i, t in run.tokens.items()} == {0: 12, 1: 12, 2: 12}
    guessing = Contender(model, replace(null, techniques=("draft=ngram(shortest=1)",)), 1).run(0)
    assert guessing.tokens == run.tokens
    assert guessing.decode_tok == sum(tok for _, tok, _ in guessing.steps) == 3 * 11
    assert len(guessing.steps) < len(run.steps)
    together = Contender(model, replace(null, apart=False), 1).run(0)
    assert together.tokens == run.tokens
    assert together.decode_tok == 3 * 12
    assert "prefill_tok_s" not in together.figures(1)
    assert len(together.first_s) == 3
    assert 0 < together.first_s[0] < sum(seconds for seconds, _, _ in together.steps)


def test_first_tokens_and_slow_steps_by_hand() -> None:
    steps = [(seconds / 100, 2, 2) for seconds in range(1, 21)]
    run = Run(decode_s=2.0, decode_cpu_s=1.0, decode_tok=40, steps=steps, first_s=[0.5, 1.5])
    told = run.figures(1)
    assert (told["ttft_s"], told["step_p95_s"], told["step_s"]) == pytest.approx((1.0, 0.19, 0.105))
    apart = replace(run, prefill_s=2.0, prefill_tok=30).figures(1)
    assert apart["prefill_tok_s"] == 15
    assert apart.keys().isdisjoint({"ttft_s", "step_p95_s"})


def test_a_large_model_is_measured_in_fewer_rounds(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(harness, "compare", lambda *_, rounds, **__: asked.append(rounds))
    null = Case(name="none", prompts=[[1]])
    for rounds in (5, 2):
        options = Options(quick=False, rounds=rounds, threads=1, model_dir=Path(), tick=lambda text: None)
        options.compare(model, null, [], "")
        options.compare(replace(model, large=True), null, [], "")
    assert asked == [5, 3, 2, 2]


def test_a_pool_that_is_too_small_for_the_batch(model: Model, null: Case) -> None:
    """Sequences lose their blocks and get them back, with the same tokens."""
    ample = replace(null, prompts=[p[:24] for p in encode(model, PARAGRAPHS)] * 2, max_new=36, batch=8)
    wanted = Contender(model, replace(ample, apart=False), 1).run(0)
    setup = Contender(model, ample, 1).runtime.setup
    fixed = setup.plan.total_bytes - setup.plan.kv_bytes
    tight = replace(ample, apart=False, engine={"memory_bytes": fixed + 10 * setup.block_bytes})
    small = Contender(model, tight, 1)
    blocks = small.runtime.setup.plan.kv_blocks
    assert 4 <= blocks <= 10, "for one sequence, and not for eight"
    found = small.run(0)
    assert found.preemptions > 0
    assert found.kv_blocks <= blocks
    assert found.tokens == wanted.tokens
    parked = Contender(model, replace(tight, apart=True), 1).run(0)
    assert parked.preemptions > 0
    assert parked.tokens == wanted.tokens


def test_an_engine_that_stands_still_is_an_error(model: Model, null: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender, "step", lambda engine, executor: ([], None))
    with pytest.raises(EngineError, match="nothing moves"):
        Contender(model, null, 1).run(0)


def test_prefixes_are_shared_where_the_case_says_so_and_never_between_turns(model: Model, null: Case) -> None:
    same = replace(null, prompts=[[*range(50, 90)]] * 3, batch=1, engine={"share": True})
    sharing = Contender(model, same, 1)
    for turn in (1, 2):
        sharing.run(turn)
        # The second and third sequence find two whole blocks of the first's 40 tokens.
        assert sharing.runtime.engine.stats.prefix_hit_tokens == turn * 2 * 32


def test_memory_is_that_of_a_process_of_its_own(model: Model, null: Case) -> None:
    peak = rss_bytes(model, null, 1)
    assert weights_bytes(load_spec(model.folder), "float32") + (50 << 20) < peak < 2 << 30
    with pytest.raises(Exception, match="no draft=nothing"):
        rss_bytes(model, replace(null, techniques=("draft=nothing",)), 1)


def test_what_makes_no_sense_is_refused(model: Model, null: Case) -> None:
    with pytest.raises(ConfigError, match="a name of its own"):
        compare(model, null, [null])
    with pytest.raises(ConfigError, match="at least one round"):
        compare(model, null, [], rounds=0)
    for changes, said in (({"prompts": []}, "at least one prompt"), ({"prompts": [[]]}, "no empty ones"),
                          ({"max_new": 1}, "at least 2"), ({"batch": 0}, "at least 1")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            replace(null, **changes)
    with pytest.raises(CapacityError):
        Contender(model, replace(null, engine={"memory_bytes": 1 << 20}), 1)


def test_models_are_grown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(layers=9, width=256, heads=4, kv_heads=2, intermediate=768)
    monkeypatch.setitem(grow.SHAPES, "small", shape)
    said: list[str] = []
    made = grown("small", tmp_path / "deep" / "cache", said.append)
    assert made.name == "small (grown)"
    assert not made.large
    assert len(load_spec(made.folder).layers) == 9
    assert said[-1] == "small: 100%"
    said.clear()
    assert grown("small", tmp_path / "deep" / "cache", said.append) == made
    assert said == []
    with pytest.raises(ConfigError, match="no shape 'smal' to grow into"):
        grown("smal", tmp_path)


# ---------------------------------------------------------------------------------------------- a benchmark as a program


def measure(options: Options) -> Iterator[dict[str, Any]]:
    (model,) = options.models()
    null = Case(name="none", prompts=encode(model, OPENINGS[:1]), max_new=3)
    yield options.compare(model, null, [replace(null, name="again")], "two tokens")


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "read_gb_s", lambda threads, device: 10.0)
    assert main("draft=again", "bench.draft.ngram", measure, ["A note."], ["--quick"]) == 0
    assert not (tmp_path / "results").exists(), "--quick writes nothing"
    assert "x 1.00" in capsys.readouterr().out
    out = tmp_path / "other.json"
    assert main("draft=again", "bench.draft.ngram", measure, ["A note."], ["--quick", "--json", "--out", str(out)]) == 0
    printed, kept = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed.keys() == kept.keys()
    assert kept["command"] == f"python -m bench.draft.ngram --quick --json --out {out.name}"
    assert kept["notes"] == ["A note."]
    assert kept["code"] == harness.code_digest("bench.draft.ngram")
    assert kept["machine"].keys() == {"cpu", "cores", "torch", "python", "busy"}
    assert kept["comparisons"][0]["cases"][1]["name"] == "again"
    monkeypatch.setattr(harness, "rss_bytes", lambda model, case, threads: 7)
    assert main("draft=again", "bench.draft.ngram", measure, argv=["--rounds", "1"]) == 0
    kept = json.loads((tmp_path / "results" / "draft-again.json").read_text())
    assert kept["comparisons"][0]["rounds"] == 1
    assert kept["comparisons"][0]["cases"][0]["median"]["rss_peak_bytes"] == 7


def test_an_error_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(options: Options) -> Iterator[dict[str, Any]]:
        raise ConfigError("say another word")
        yield {}

    assert main("draft=again", "bench.draft.ngram", wrong, argv=["--quick"]) == 2
    assert capsys.readouterr().err == "error: say another word\n"


@pytest.mark.long
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_every_benchmark_runs(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"bench.{path.parent.name}.{path.stem}", "--quick", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "x").read_text())
    slot, _, name = result["technique"].partition("=")
    assert (slot.replace(".", "_"), name) == (path.parent.name, path.stem)
    assert result["command"].startswith(f"python -m bench.{path.parent.name}.{path.stem} ")


def stale(results: Iterable[Path]) -> list[str]:
    """Kept results whose benchmark does something else by now; one without a digest is from before they were kept."""
    kept = [json.loads(path.read_text(encoding="utf8")) for path in results]
    return [r["command"] for r in kept if "code" in r and r["code"] != harness.code_digest(r["command"].split()[2])]


def test_no_kept_result_is_of_a_benchmark_that_has_changed_since() -> None:
    assert stale(RESULTS) == [], "run these again, or keep what they did"


def test_a_benchmark_that_changes_makes_its_result_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "shapes"))
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    digest = harness.code_digest("bench.kv_compress.h2o")
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"command": "python -m bench.kv_compress.h2o --rounds 3", "code": digest}))
    own, loads = tmp_path / "bench" / "kv_compress" / "h2o.py", tmp_path / "bench" / "loads.py"
    source = own.read_text()
    own.write_text(
        "# A comment.\n" + source.replace("NOTES = (", 'NOTES = (\n    "One more.",').replace("beside the", "and the")
    )
    assert own.read_text() != source
    assert stale([kept]) == [], "words are no change"
    own.write_text(source.replace("heavy=64", "heavy=96"))
    assert stale([kept]) == ["python -m bench.kv_compress.h2o --rounds 3"]
    own.write_text(source)
    loads.write_text(loads.read_text().replace("else (800, 40)", "else (700, 40)"))
    assert stale([kept]) == ["python -m bench.kv_compress.h2o --rounds 3"], "its load comes from another file"
    assert harness.code_digest("bench.kv_offload.host") != digest, "a folder's own file is read as well"


def test_a_perfect_draft_is_right_every_time(model: Model, null: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                             clean_registry: None) -> None:  # fmt: skip
    monkeypatch.setattr(harness, "read_gb_s", lambda threads, device: 10.0)
    plugin = tmp_path / "oracle.py"
    source, root = (ROOT / "bench" / "oracle.py").read_text(), "Path(__file__).resolve().parents[1]"
    plugin.write_text(source.replace(root, f"Path({str(tmp_path)!r})"))
    monkeypatch.setattr(oracle, "ANSWERS", tmp_path / ".cache" / "oracle")
    monkeypatch.setattr(oracle, "FILE", plugin)
    known = oracle.perfect(model, replace(null, sampling={"temperature": 0.8}), "test", 3)
    assert known.bound
    found = compare(model, replace(null, sampling={"temperature": 0.8}), [known], rounds=1, memory=False)["cases"][1]
    assert found["bound"]
    assert found["same_tokens"] == 1
    assert found["acts"]["draft=oracle.accepted"] == found["acts"]["draft=oracle.proposed"] > 0
    assert found["median"]["tok_per_step"] > 3
    with pytest.raises(ConfigError, match="is missing"):
        oracle.Oracle(answers="../no")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_results_say_how_they_are_made_again(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf8"))
    assert path.stem == result["technique"].replace("=", "-")
    program = result["command"].split()[2]
    assert callable(importlib.import_module(program).measure)
    assert "--quick" not in result["command"]
    for comparison in result["comparisons"]:
        assert comparison["rounds"] >= 3
        peaks = [case["median"]["rss_peak_bytes"] for case in comparison["cases"]]
        assert all(peaks) or peaks == [None] * len(peaks), "a benchmark takes all of them or none"


def test_a_benchmark_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the same code has kept is not measured again, and nothing is begun behind the time."""
    measured: list[str] = []

    def told(model: Model, null: Case, cases: Sequence[Case], *, title: str, **_: Any) -> dict[str, Any]:
        measured.append(title)
        case = {"median": dict.fromkeys(("decode_tok_s", "tok_per_step", "step_s", "kv_peak_bytes"), 1.0), "acts": {}}
        case |= {
            "name": null.name,
            "ratio": {"decode_tok_s": 1.0},
            "ratio_spread": {"decode_tok_s": [1, 1]},
            "same_tokens": 1,
        }
        record = {"title": title, "model": model.name, "load": harness._load(null), "dtype": "float32", "threads": 1}
        return record | {"rounds": 3, "limit": {"decode_tok_s": 1.0}, "cases": [case]}

    def measure(options: Options) -> Iterator[dict[str, Any]]:
        for title in ("one", "two", "three"):
            null = Case(name="none", prompts=[[1, 2]], sampling={"temperature": 0.123456789})
            found = options.known(bundled(), null, title)
            if found is None and (options.late or (title == "two" and not measured[1:])):
                return
            yield found or options.compare(bundled(), null, [], title)

    monkeypatch.setattr(harness, "compare", told)
    out = tmp_path / "draft-again.json"
    run = ["--out", str(out), "--resume", "--minutes", "5"]
    assert main("draft=again", "bench.draft.ngram", measure, argv=run) == 0
    assert measured == ["one"]
    measured += ["(again)"]
    assert main("draft=again", "bench.draft.ngram", measure, argv=run) == 0
    assert measured == ["one", "(again)", "two", "three"]
    kept = json.loads(out.read_text())
    assert [c["title"] for c in kept["comparisons"]] == ["one", "two", "three"]
    assert kept["command"] == "python -m bench.draft.ngram --out draft-again.json"
    out.write_text(json.dumps(kept | {"code": "of before"}))
    assert main("draft=again", "bench.draft.ngram", measure, argv=run) == 0
    assert measured[4:] == ["one", "two", "three"], "what other code has kept is measured again"
