"""The pages of techniques are what their generator writes, and what it writes is what files and figures say."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools.charts import svg
from tools.measured import (
    RESULTS,
    beside,
    cell,
    divergences,
    head,
    judged,
    plain,
    read_fidelity,
    read_results,
    row,
    verdict,
    verdicts,
)
from tools.pages import (
    PAGES,
    TRAITS,
    differing,
    index,
    page,
    traits,
    written,
)
from weft.cli.policies import known
from weft.errors import ConfigError
from weft.features import FIELDS, REQUIRED, Feature, feature, features
from weft.registry import lookup
from weft.slots import SLOTS
from weft.traits import Effect, Fidelity, Trait, Traits

ROOT = Path(__file__).resolve().parents[1]


def test_the_pages_are_those_that_would_be_written() -> None:
    """In a process of its own: other tests of this one may have registered techniques."""
    done = subprocess.run([sys.executable, "-m", "tools.pages", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == "", "write them anew with: python -m tools.pages"
    assert done.returncode == 0


def test_an_edit_by_hand_a_page_too_many_and_a_missing_one_are_found(tmp_path: Path) -> None:
    shutil.copytree(PAGES, tmp_path / "pages")
    files = [*PAGES.glob("*.md"), *PAGES.glob("charts/*.svg")]
    there = {path.relative_to(PAGES).as_posix(): path.read_text(encoding="utf8") for path in files}
    assert differing(there, tmp_path / "pages") == []
    (tmp_path / "pages" / "draft-ngram.md").write_text(there["draft-ngram.md"] + "It is the best.\n")
    (tmp_path / "pages" / "schedule-fcfs.md").unlink()
    (tmp_path / "pages" / "draft-made_up.md").write_text("# draft=made_up\n")
    (tmp_path / "pages" / "charts" / "schedule-fair.svg").write_text("<svg/>")
    assert differing(there, tmp_path / "pages") == [
        "charts/schedule-fair.svg",
        "draft-made_up.md",
        "draft-ngram.md",
        "schedule-fcfs.md",
    ]


def test_every_policy_has_a_chart_that_is_small_and_needs_nothing_else() -> None:
    policies = {policy["name"].replace("=", "-") for policy in known()}
    charts = sorted((PAGES / "charts").glob("*.svg"))
    assert {path.stem for path in charts} == policies
    for path in charts:
        text = path.read_text(encoding="utf8")
        assert len(text) < 30_000, path
        assert not re.search(r"\bnan\b", text)
        assert not re.search(r"<script|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
        root = ElementTree.fromstring(text)
        lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
        assert len(lines) >= 4 * (2 if path.stem in ("schedule-fcfs", "schedule-clairvoyant") else 3) - 2, path
        page = (PAGES / f"{path.stem}.md").read_text(encoding="utf8")
        assert f"](charts/{path.name})" in page


def test_a_chart_shows_the_figures_that_are_kept() -> None:
    """Three points of two policies: a line through them for each, markers with the figures, and the limit."""
    points = [{"at": 1.0, "goodput": 1.0, "ttft_s.p99": 0.25, "gap_s.p99": 0.02, "e2e_s.mean": 2.0},
              {"at": 2.0, "goodput": 1.5, "ttft_s.p99": 1.25, "gap_s.p99": 0.03, "e2e_s.mean": 4.0}]  # fmt: skip
    kept = {"load": "a <load>", "metric": "goodput", "across": "requests a second", "limits": {"ttft_s": 1.0},
            "series": {"fcfs": points, "fair": points[:1]}}  # fmt: skip
    root = ElementTree.fromstring(svg("schedule=fair", kept))
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles.count("fcfs: 1.25 at 2") == 1
    assert titles.count("fair: 4 at 2") == 0
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a <load>", "fcfs", "fair", "Time to first token, p99"} <= set(texts)
    assert len([e for e in root.iter() if e.get("class") == "limit"]) == 1


def test_every_technique_has_a_page_and_a_line_in_the_index() -> None:
    heads = (re.search(r'^@register\("([\w.]+)", "(\w+)"\)', p.read_text(encoding="utf8"), re.MULTILINE)
             for p in (ROOT / "weft").rglob("*.py"))  # fmt: skip
    pages = {path.name for path in PAGES.glob("*-*.md")}
    assert pages == {f"{head[1]}-{head[2]}.md" for head in heads if head}
    listed = set(re.findall(r"\]\(([\w.-]+\.md)\)", (PAGES / "index.md").read_text(encoding="utf8")))
    assert listed == pages


def test_links_lead_somewhere() -> None:
    for path in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


# ---------------------------------------------------------------------------------------------- a page


def test_a_page_says_what_the_file_says() -> None:
    f = feature("draft", "ngram")
    text = page(f, None)
    for field in ("Rule", "Cost", "Differs", "Units"):
        assert plain(f.fields[field]) in text
    assert f"| paper | {f.paper} |" in text
    assert "EXACT: the same tokens" in text
    assert "| `guesses` | `5` | int |" in text
    assert "acts" not in text.split("## Arguments")[1].split("##")[0], "what is no argument is not told as one"
    assert "It pays where answers repeat their prompts" in text
    assert "Nothing was measured yet." in text
    assert "`weft serve --with 'draft=ngram'`" in text
    assert "yes, laid over the server's stack" in text
    assert "what a stack has that names none" in page(feature("schedule", "fcfs"), None)


def test_every_technique_but_a_null_says_plainly_where_it_pays() -> None:
    silent = [
        f"{f.slot}={f.name}"
        for f in features()
        if "Pays" not in f.fields
        and SLOTS[f.slot].null != f.name
        and lookup(f.slot, f.name).__module__.startswith("weft.")
    ]
    assert silent == [], "give the heads of their files a field Pays, which says where it pays or that it does not"


def test_a_bound_is_on_the_page_and_not_in_the_index() -> None:
    result = measured()
    for comparison in result["comparisons"]:
        comparison["cases"].append({**comparison["cases"][1], "name": "all of it", "bound": True,
                                    "ratio": {"decode_tok_s": 9.0}, "ratio_spread": {"decode_tok_s": [9.0, 9.0]}})  # fmt: skip
    assert list(verdicts(result)) == list(verdicts(measured()))
    assert "| small, prose, batch 4 | all of it (bound) | 9.00 faster |" in "\n".join(judged(result))
    ngram = feature("draft", "ngram")
    assert index([ngram], {"draft=ngram": result}) == index([ngram], {"draft=ngram": measured()})
    assert "| all of it (bound) | 100.0 |" in row(result["comparisons"][0]["cases"][-1] | {"ratio": {}}, apart=False)


def test_another_answer_on_purpose_is_never_called_the_same_tokens() -> None:
    redefining = [f for f in features() if Effect.REDEFINES in f.traits.effects]
    assert len(redefining) >= 4
    for f in redefining:
        text = page(f, None)
        assert "| answers | EXACT, redefined: another answer on purpose, and true to its own definition of it |" in text
        assert "the same tokens as without it" not in text
        assert "| EXACT, redefined |" in index([f], {})


def test_pays_is_a_field_that_may_be_left_out() -> None:
    assert "Pays" in FIELDS
    assert "Pays" not in REQUIRED
    f = feature("draft", "ngram")
    f = replace(f, fields={key: text for key, text in f.fields.items() if key != "Pays"})
    assert "Not known: nothing was measured yet." in page(f, None)
    assert "It is the null of its slot" in page(feature("kv.evict", "lru"), None)


def test_traits_in_words() -> None:
    f = feature("draft", "ngram")

    def said(**declared: Any) -> list[str]:
        shown = Feature(
            slot=f.slot, name=f.name, summary="", catalogue=(), paper="", traits=Traits(**declared), fields=f.fields
        )
        return traits(shown).splitlines()

    assert said() == ["Nothing that another part would have to know."]
    assert said(needs=frozenset({Trait.READS_HISTORY}), history=32, gives=frozenset({Trait.STARVATION_FREE})) == [
        "- It needs to see the last 32 tokens of a prompt computed (`READS_HISTORY`).",
        "- It gives that every request is served in the end (`STARVATION_FREE`).",
    ]
    assert said(effects=frozenset({Effect.EXTRA_PASS})) == ["- It takes an extra pass over the prompt (`EXTRA_PASS`)."]
    assert TRAITS.keys() <= {*Trait, *Effect}


def test_a_bound_is_told() -> None:
    f = feature("draft", "ngram")
    loose = Feature(
        slot=f.slot, name=f.name, summary=f.summary, catalogue=("001-2",), paper=f.paper, fields=f.fields,
        traits=Traits(fidelity=Fidelity.APPROX, bound=0.02),
    )  # fmt: skip
    text = page(loose, None)
    assert (
        "APPROX: near those without it, by a mean KL divergence below 0.02 nats a token with its defaults over the prose"
        in text
    )
    assert "(catalogue 001-2)" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a * b", r"a \* b"),
        ("j < sinks or j >= n", "j < sinks or j >= n"),
        ("a <script> here", r"a \<script> here"),
        ("`a * b` and [T](x)", r"`a * b` and [T\](x)"),
    ],
)
def test_text_is_shown_as_it_is(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert cell("a | b") == r"a \| b"


# ---------------------------------------------------------------------------------------------- figures


def measured() -> dict[str, Any]:
    """A result of two loads: faster with less KV on one, slower on the other."""

    def case(name: str, decode: tuple[float, float, float], kv: float) -> dict[str, Any]:
        middle, low, high = decode
        return {
            "name": name, "stack": [f"draft={name}"], "same_tokens": 0.5, "of_limit": 0.1,
            "acts": {f"draft={name}.proposed": 3.0},
            "median": {"decode_tok_s": 50 * middle, "step_s": 0.02, "tok_per_step": 1.5, "kv_peak_bytes": kv * (1 << 20),
                       "preemptions": 0.0, "rss_peak_bytes": 1 << 30},
            "ratio": {"decode_tok_s": middle, "kv_peak_bytes": kv, "decode_tok_cpu_s": middle},
            "ratio_spread": {"decode_tok_s": [low, high], "kv_peak_bytes": [kv, kv], "decode_tok_cpu_s": [low, high]},
        }  # fmt: skip

    def load(title: str, mine: dict[str, Any]) -> dict[str, Any]:
        return {
            "title": title, "model": "small", "dtype": "float32", "device": "cpu", "threads": 1, "rounds": 5,
            "shape": {"parameters": 7_000_000},
            "load": {"prompts": 2, "prompt_tok": 9, "new_tok": 8, "batch": 4, "sampling": {"temperature": 0.0}, "apart": True},
            "limit": {"bytes_per_step": 1, "read_gb_s": 20.0, "decode_tok_s": 900.0},
            "cases": [case("none", (1.0, 0.9, 1.1), 1.0), mine],
        }  # fmt: skip

    return {
        "technique": "draft=ngram", "command": "python -m bench.draft.ngram", "date": "2026-01-02",
        "machine": {"cpu": "A processor", "cores": 2.0}, "notes": ["A note."],
        "comparisons": [load("quoting", case("ngram", (2.0, 1.5, 2.5), 0.5)),
                        load("prose", case("ngram", (0.9, 0.8, 0.95), 1.0))],
    }  # fmt: skip


def test_sentences_follow_from_the_figures() -> None:
    result = measured()
    assert list(verdicts(result)) == [
        "Against none, decoding was, of 2 comparisons, faster in 1 (2.00 times); and slower in 1 (0.90 times).",
        "KV held was, of 2 comparisons, less in 1 (0.50 times); and not clearly different in 1.",
    ]
    assert list(judged(result))[2:] == [
        "| small, quoting, batch 4 | ngram | 2.00 faster | 0.50 less |",
        "| small, prose, batch 4 | ngram | 0.90 slower | 1.00 |",
    ]
    wavering = copy.deepcopy(result)
    for comparison in wavering["comparisons"]:
        comparison["cases"][1]["ratio_spread"]["decode_tok_s"] = [0.7, 3.0]
    assert next(verdicts(wavering)) == "Against none, decoding was, of 2 comparisons, not clearly different in 2."
    assert list(judged(wavering))[2:] == [
        "| small, quoting, batch 4 | ngram | 2.00 (2.00 in processor time: faster) | 0.50 less |",
        "| small, prose, batch 4 | ngram | 0.90 (0.90 in processor time: slower) | 1.00 |",
    ]
    controlled = copy.deepcopy(result)
    for comparison in controlled["comparisons"]:
        comparison["cases"].append({**comparison["cases"][1], "name": "a control", "stack": ["draft=other"]})
    assert list(verdicts(controlled)) == list(verdicts(result)), "a control's figures are not the technique's"
    assert len(list(judged(controlled))) == len(list(judged(result))) + 2
    assert index([feature("draft", "ngram")], {"draft=ngram": controlled}) == index(
        [feature("draft", "ngram")], {"draft=ngram": result}
    )
    text = page(feature("draft", "ngram"), result)
    assert "    python -m bench.draft.ngram\n" in text
    assert "2026-01-02, A processor, 2 cores." in text
    assert "### small, prose, batch 4" in text
    assert "- A note." in text
    assert "0.90 to 2.00 times" in index([feature("draft", "ngram")], {"draft=ngram": result})


def test_a_control_has_its_figures_from_what_it_stands_beside() -> None:
    own = measured()
    assert beside({"draft=ngram": own}, "draft=ngram") is own
    for comparison in own["comparisons"]:
        comparison["cases"].append({**comparison["cases"][1], "name": "a control", "stack": ["draft=control(n=1)"]})
        for case in comparison["cases"]:
            case["stack"] = [*case["stack"], "schedule=fcfs"]
    found = beside({"draft=ngram": own}, "draft=control")
    assert found is not None
    assert found["kept"] == "draft-ngram"
    assert "of 2 comparisons, faster in 1" in next(verdicts(found))
    assert beside({"draft=ngram": own}, "schedule=fcfs") is None, "what the null has too is not compared"
    assert beside({"draft=ngram": own}, "draft=contro") is None


@pytest.mark.parametrize(
    ("ratio", "low", "high", "rounds", "wanted"),
    [
        (1.5, 1.1, 2.0, 5, "more"),
        (1.5, 0.9, 2.0, 5, "same"),
        (1.01, 1.005, 1.02, 5, "same"),
        (0.5, 0.4, 0.9, 3, "less"),
        (0.5, 0.4, 1.1, 3, "same"),
        (0.5, 0.4, 0.9, 2, "same"),
    ],
)
def test_a_difference_is_one_that_several_rounds_show(
    ratio: float, low: float, high: float, rounds: int, wanted: str
) -> None:
    assert verdict({"ratio": {"step_s": ratio}, "ratio_spread": {"step_s": [low, high]}}, "step_s", rounds) == wanted


def test_a_row_of_figures() -> None:
    cells = [c.strip() for c in row(measured()["comparisons"][0]["cases"][1]).strip("|").split("|")]
    assert cells == [
        "ngram", "100.0", "2.00 (1.50 to 2.50)", "2.00 (1.50 to 2.50)", "", "1.50", "20.0 ms", "512.0 KiB", "1.00 GiB", "50%",
        "proposed 3",
    ]  # fmt: skip


def test_results_are_named_after_their_techniques(tmp_path: Path) -> None:
    result = measured()
    (tmp_path / "draft-ngram.json").write_text(json.dumps(result))
    (tmp_path / "test-long.json").write_text("{}")
    assert read_results(tmp_path) == {"draft=ngram": result}
    (tmp_path / "draft-other.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="holds the result of draft=ngram"):
        read_results(tmp_path)
    (tmp_path / "draft-other.json").write_text(json.dumps({**result, "technique": "draft=other"}))
    with pytest.raises(ConfigError, match="results of draft=other, which do not exist"):
        written(tmp_path)


def test_what_was_measured_is_on_the_pages() -> None:
    for technique, result in read_results(RESULTS).items():
        text = (PAGES / f"{technique.replace('=', '-')}.md").read_text(encoding="utf8")
        assert result["command"] in text
        for comparison in result["comparisons"]:
            for case in comparison["cases"]:
                assert row(case, comparison["load"]["apart"]) in text


def test_first_tokens_and_slow_steps_are_told_where_prompts_and_decoding_mix() -> None:
    mixed = copy.deepcopy(measured()["comparisons"][0]["cases"][1])
    mixed["ratio"] |= {"ttft_s": 0.5, "step_p95_s": 1.2}
    mixed["ratio_spread"] |= {"ttft_s": [0.4, 0.6], "step_p95_s": [1.1, 1.3]}
    titles, cells = (line.strip("| ").split(" | ") for line in (head(False)[0], row(mixed, apart=False)))
    told = dict(zip(titles, cells[1:], strict=True))
    assert told["first token"] == "0.50 (0.40 to 0.60)"
    assert told["slow steps"] == "1.20 (1.10 to 1.30)"
    result = measured()
    result["comparisons"] = [{**result["comparisons"][0], "cases": [mixed, mixed]}]
    assert (
        list(judged(result))[2]
        == "| small, quoting, batch 4 | ngram | 2.00 faster | 0.50 sooner | 1.20 longer | 0.50 less |"
    )


# ---------------------------------------------------------------------------------------------- fidelity


def test_what_it_does_to_answers_is_told(tmp_path: Path) -> None:
    record = {
        "with": "draft=ngram(guesses=2)", "model": "small", "length": 512, "kl_mean": 0.0123, "kl_ci95": [0.01, 0.015],
        "top1": 0.934, "ppl_ratio": 1.02, "recall": None, "recall_reference": 0.4, "output_len_ratio": 1.1, "output_ended": 0.75,
        "speed_ratio": 0.9, "kv_bytes_ratio": 0.25,
    }  # fmt: skip
    assert read_fidelity(tmp_path) == {}
    (tmp_path / "fidelity.json").write_text(json.dumps({"records": [record]}))
    near = read_fidelity(tmp_path)
    assert near == {"draft=ngram": [record]}
    assert read_results(tmp_path) == {}
    line = (
        "| small, 512 | `draft=ngram(guesses=2)` | 0.012 (0.01 to 0.015) | 93.4% | 1.020 | does not count (0.40) "
        "| 1.10 (75% end) | 0.90 | 0.25 |"
    )
    assert line in "\n".join(divergences(near["draft=ngram"]))
    assert line in page(feature("draft", "ngram"), None, near["draft=ngram"])
    assert "What it does to answers" not in page(feature("draft", "ngram"), None)
    for silent in ({**record, "output_ended": None}, {**record, "output_len_ratio": None, "output_ended": 0.0}):
        assert "| not known | 0.90 |" in "\n".join(divergences([silent])), "answers that were all cut short say nothing"
    assert "| 0.75 (0.90) |" in "\n".join(divergences([{**record, "recall": 0.75, "recall_reference": 0.9}]))
