"""The documents against the code: commands, flags, defaults, routes, fields, codes, metrics, keys, links, snippets.

Most checks are equalities of two sets of names, so a page fails both for what it makes up and for what it leaves out.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

import weft
from bench.harness import _rounded
from weft.bench.serve import Load, Sample, summary
from weft.cli import _compare, app, features, generate, plan
from weft.cli._flags import EngineFlags
from weft.cli._sampling import SamplingFlags
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, prepare
from weft.front.anthropic import structs as anthropic_structs
from weft.front.app import Routes
from weft.front.guard import OPEN_PATHS
from weft.front.metrics import Metrics
from weft.front.openai import response_structs, structs, unknown
from weft.front.openai.batches import BatchRequest
from weft.front.openai.embeddings import EmbeddingRequest
from weft.front.openai.errors import CAPACITY, STATUS_OF_CODE
from weft.llm import configure
from weft.outputs import CompletionOutput, Logprob, RequestOutput
from weft.sampling import SamplingParams
from weft.types import EngineStats

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "bench" / "README.md",
        *ROOT.glob("weft/bundled/*/*.md"),
    ]
)
TREE: Any = typer.main.get_command(app.app)
WORDS = frozenset({"ready", "needs", "COMMAND"})
"""What may follow `weft` and is no command: lines that it prints, and the stand-in for any command."""
EXAMPLES = frozenset(
    "weft/kv/evict/lfu.py bench/SLOT/NAME.py bench/results/SLOT-NAME.json bench/results/test-long.json "
    "bench/results/pairs.json bench/results/rivals.json bench/results/rivals.md bench/results/rivals.svg".split()
)
"""Files that a page tells the reader to write, or that a command makes."""
UNSEEN = {"--max-num-seqs": "64", "--max-num-batched-tokens": "512", "--weights-seed": "0"}
"""Defaults of flags that the command line leaves to the engine; held to `EngineConfig` below."""


# ---------------------------------------------------------------------------------------------- reading a page


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf8")


def sections(text: str) -> dict[str, str]:
    """Text below each heading of the second level, by the heading."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str) -> list[str]:
    """Indented code, blank lines inside it kept."""
    found = re.findall(r"(?:^\n|\A)((?:    .*\n|\n(?=\n*    ))+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in found if block.strip()]


def spans(text: str) -> list[str]:
    """Inline code, which may run over the end of a line."""
    prose = re.sub(r"^    .*\n", "", text, flags=re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the tables, heads and rules left out."""
    lines = text.splitlines()
    for at, line in enumerate(lines):
        head = at + 1 < len(lines) and lines[at + 1].startswith("|---")
        if line.startswith("|") and not line.startswith("|---") and not head:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def named(text: str) -> set[str]:
    """Inline code of the first column of every table."""
    return {name for row in rows(text) for name in spans(row[0])}


# ---------------------------------------------------------------------------------------------- commands and flags


def commands(text: str) -> Iterator[list[str]]:
    """Every command line of weft in a page, without the program's name; inline or in a block, other engines' left out."""
    lines = [line for block in blocks(text) for line in re.split(r"\n|   +(?=weft )", block)]
    for line in [*lines, *spans(text)]:
        for part in line.split(" | "):
            found = re.match(r"(?:\.venv/bin/)?weft (.+)", part.strip())
            if found:
                words = shlex.split(found[1], comments=True)
                if words and words[0] not in WORDS:
                    yield words


def complaint(words: list[str]) -> str | None:
    """Why weft would not understand a command line."""
    command, path = TREE, ["weft"]
    while getattr(command, "commands", None) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"{' '.join(path)} has no command {words[0]}"
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    if "--help" in words or words == ["--version"] or not words:  # a command that is only named
        return None
    try:
        command.make_context(" ".join(path), list(words))
    except Exception as error:
        return f"{' '.join([*path, *words])}: {error}"
    return None


def leaves(command: Any = TREE, path: str = "weft") -> Iterator[tuple[str, Any]]:
    if not getattr(command, "commands", None):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, f"{path} {name}")


def options(command: Any) -> dict[str, Any]:
    """Every spelling of every flag of a command: its parameter."""
    return {o: p for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}


def flags_of(group: type, command: Any) -> set[str]:
    names = {field.name for field in fields(group)}
    return {o for o, p in options(command).items() if p.name in names}


CLI = sections(page("docs/cli.md"))
COMMANDS = dict(leaves())


def section_of(path: str) -> str:
    (found,) = [text for heading, text in CLI.items() if re.sub(r" [\[A-Z].*", "", heading) == path]
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_line_is_understood(path: Path) -> None:
    complaints = [complaint(words) for words in commands(path.read_text())]
    assert [c for c in complaints if c] == []


def test_command_lines_are_found() -> None:
    found = list(commands(page("README.md"))) + list(commands(page("docs/cli.md")))
    assert ["serve", "Qwen/Qwen2.5-0.5B-Instruct"] in found
    assert {words[0] for words in found} >= {"serve", "chat", "generate", "plan", "check", "bench"}
    assert len(found) > 30


def test_every_command_has_its_section() -> None:
    assert {re.sub(r" [\[A-Z].*", "", heading) for heading in CLI if heading.startswith("weft ")} == COMMANDS.keys()


@pytest.mark.parametrize("path", COMMANDS)
def test_tables_of_flags_are_whole(path: str) -> None:
    """A section names the command's own flags, no more and no fewer, and says which shared ones it takes."""
    command, text = COMMANDS[path], section_of(path)
    shared = {"of an engine": flags_of(EngineFlags, command), "of sampling": flags_of(SamplingFlags, command)}
    own = options(command).keys() - set().union(*shared.values())
    assert named(text) == own
    for words, theirs in shared.items():
        assert bool(theirs) == (words in " ".join(text.split())), words


def test_tables_of_shared_flags_are_whole() -> None:
    command = COMMANDS["weft generate"]
    assert named(CLI["Flags of an engine"]) == flags_of(EngineFlags, command)
    assert named(CLI["Flags of sampling"]) == flags_of(SamplingFlags, command)


def test_defaults_of_flags_are_those_of_the_code() -> None:
    """Every default that the code holds as a number or a word stands in the flag's row."""
    wanted: dict[tuple[str, str], str] = {}
    for path, command in COMMANDS.items():
        for flag, parameter in options(command).items():
            value = UNSEEN.get(flag) if parameter.default is None else parameter.default
            if flag.startswith("--") and isinstance(value, str | int) and not isinstance(value, bool):
                home = "Flags of an engine" if flag in flags_of(EngineFlags, command) else path
                wanted[home, flag] = str(value)
    assert len(wanted) >= 13
    for (home, flag), value in wanted.items():
        text = CLI[home] if home in CLI else section_of(home)
        (row,) = [row for row in rows(text) if flag in spans(row[0])]
        assert row[1].strip("`") == value, flag
    seen = {field.name: field.default for field in fields(EngineConfig)}
    assert list(UNSEEN.values()) == [str(seen[name]) for name in ("max_num_seqs", "max_rows", "seed")]
    assert f"{generate.MAX_TOKENS} in `weft generate`" in CLI["Flags of sampling"]


def test_flags_that_pages_mention_exist() -> None:
    """In prose too; in the README's table of other engines only what stands under weft."""
    known = {o for command in COMMANDS.values() for o in options(command)} | {"--help", "--version"}
    for path in PAGES:
        text = path.read_text()
        if path.name == "README.md" and path.parent == ROOT:
            coming = sections(text)["Coming from another engine"]
            text = text.replace(coming, "\n".join(row[1] for row in rows(coming)))
        for span in spans(text):
            if not re.match(r"(uv|pip|python|make|\.venv/bin/(pytest|pip|hf)) ", span):
                flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span))
                assert flags <= known, f"{path.name}: {span}"


def test_make_targets_and_settings_exist() -> None:
    makefile = page("Makefile")
    for path in PAGES:
        text = path.read_text()
        lines = [line for block in blocks(text) for line in block.splitlines()] + spans(text)
        for line in lines:
            words = shlex.split(line, comments=True) if line.startswith("make ") else []
            for word in words[1:]:
                setting = re.match(r"([A-Z_]+)=", word)
                if word != "/":
                    name = rf"^{setting[1]} \?=" if setting else rf"^{re.escape(word)}:"
                    assert re.search(name, makefile, re.MULTILINE), f"{path.name}: {line}"


def test_files_that_pages_name_exist() -> None:
    for path in PAGES:
        for span in spans(path.read_text()):
            for name in re.findall(r"(?<![\w/.])(?:weft|tests|tools|bench|docs)/[\w/.-]+", span):
                assert name in EXAMPLES or (ROOT / name).exists(), f"{path.name}: {span}"


# ---------------------------------------------------------------------------------------------- JSON


def keys_after(text: str, words: str) -> set[str]:
    """Inline code from `words` to the end of the paragraph."""
    paragraph = text[text.index(words) :].split("\n\n")[0]
    return {span for span in spans(paragraph) if re.fullmatch(r"[a-z]\w*", span)}


def record_keys() -> tuple[set[str], set[str]]:
    """(keys of a record of `weft bench decode`, those of its limit), read off the source, since one costs a model."""
    tree = ast.parse(page("weft/bench/decode.py"))
    (function,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_record"]
    outer, inner = [
        {str(k.value) for k in n.keys if isinstance(k, ast.Constant)}
        for n in ast.walk(function)
        if isinstance(n, ast.Dict)
    ]
    return outer, inner


def test_json_of_plan_and_check(bundled: Path) -> None:
    setup = prepare(EngineConfig(model=bundled, device="cpu"))
    assert keys_after(section_of("weft plan"), "JSON keys") == plan.as_json(setup, "x").keys()
    found = {*_compare.Comparison(exact=True).as_json(), "model"}
    assert keys_after(section_of("weft check"), "JSON keys") == found


def test_json_of_bench() -> None:
    outer, inner = record_keys()
    assert keys_after(section_of("weft bench decode"), "JSON keys") == outer | inner
    assert named(sections(page("bench/README.md"))["What is told"]) == outer
    assert set(spans(sections(page("bench/README.md"))["The limit"])) >= inner


def test_json_of_bench_serve() -> None:
    record = summary([Sample(ttft_s=1.0, e2e_s=2.0, output_tokens=2)], 1.0, Load(), url="u", model="m")
    told = keys_after(section_of("weft bench serve"), "JSON keys") - {"connection", "timeout", "stream", "answer"}
    assert told == {*record, *(record["ttft_s"] or {})}


def test_json_of_generate() -> None:
    result = generate.as_json(RequestOutput("1", "a", [1], [CompletionOutput(0)]))
    assert keys_after(section_of("weft generate"), "Each result in the JSON") == {*result, *result["outputs"][0]}


def test_json_of_features_and_compose(capsys: pytest.CaptureFixture[str]) -> None:
    features.features(json_=True)
    assert keys_after(section_of("weft features"), "JSON keys") == json.loads(capsys.readouterr().out)[0].keys()
    with pytest.raises(typer.Exit):
        features.compose(["draft=ngram", "draft=ngram"], json_=True)
    answer = json.loads(capsys.readouterr().out)
    assert keys_after(section_of("weft compose"), "JSON keys") == {
        *answer,
        *answer["reasons"][0],
    }


# ---------------------------------------------------------------------------------------------- HTTP

HTTP = sections(page("docs/http-api.md"))


def test_routes() -> None:
    table = Routes(None, 1, 1, 1).table()  # type: ignore[arg-type]
    told = re.findall(r"^\| `([A-Z]+) (\S+)` \|", page("docs/http-api.md"), re.MULTILINE)
    there = {
        (method, re.sub(r"\{(\w+)[^}]*\}", lambda m: m[1].upper(), route.path))
        for route in table
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(told) == there
    assert len(told) == len(there)
    assert set(re.findall(r"`(/\w*)`", HTTP["Keys"])) == OPEN_PATHS


def struct_fields(kind: type) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)}


def test_request_fields() -> None:
    both = struct_fields(structs.Fields)
    assert named(HTTP["Fields of completions and chat"]) == both
    assert named(HTTP["Fields of completions alone"]) == struct_fields(structs.CompletionRequest) - both
    assert named(HTTP["Fields of chat alone"]) == struct_fields(structs.ChatRequest) - both
    tokens, ids = HTTP["Fields of tokenize and detokenize"].split("| field of `/detokenize`")
    assert named(tokens.split("|---", 1)[1]) == struct_fields(structs.TokenizeRequest)
    assert named(ids.split("|---", 1)[1]) == struct_fields(structs.DetokenizeRequest)


def test_fields_of_what_is_kept_and_of_vectors() -> None:
    responses = named(HTTP["Responses"])
    assert responses == struct_fields(response_structs.ResponseRequest)
    assert named(HTTP["Files and batches"]) - {"/v1/batches"} == struct_fields(BatchRequest)
    assert named(HTTP["Embeddings"]) - {"/v1/embeddings"} == struct_fields(EmbeddingRequest)
    messages = HTTP["Anthropic's messages"]
    assert named(messages) - {"/v1/messages"} == struct_fields(anthropic_structs.MessagesRequest)
    counted = keys_after(messages, "`/v1/messages/count_tokens` takes")
    assert counted == struct_fields(anthropic_structs.CountRequest)
    for text, neutral in ((HTTP["Responses"], response_structs.NEUTRAL), (messages, anthropic_structs.NEUTRAL)):
        assert keys_after(text, "Refused, unless") == neutral.keys()


def test_refused_fields() -> None:
    _, listed = HTTP["Fields that are refused"].strip().split("\n\n", 1)
    assert set(spans(listed)) == structs.NEUTRAL.keys()
    assert len(spans(listed)) == len(structs.NEUTRAL)


def test_fields_that_change_nothing() -> None:
    lists = [spans(part) for part in HTTP["Fields that are not known"].split("\n\n") if part.strip().startswith("`")]
    assert [set(names) for names in lists] == [unknown.OPENAI, unknown.ANTHROPIC]


def test_error_codes() -> None:
    """Every code that the front writes into an error, under its status."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "weft" / "front").rglob("*.py")))
    written = {*re.findall(r"\bcode\s*=\s*(?:code or )?\"(\w+)\"", sources), *STATUS_OF_CODE, *CAPACITY}
    told: dict[str, int] = {}
    for row in rows(HTTP["Errors"]):
        told |= dict.fromkeys(spans(row[1]), int(row[0]))
    assert told.keys() == written
    unavailable = {"overloaded": 503, "engine_stopped": 503, **CAPACITY}
    assert told == {code: {**STATUS_OF_CODE, **unavailable}.get(code, 400) for code in written}


def test_metrics() -> None:
    lines = Metrics().render(EngineStats()).decode().splitlines()
    assert named(HTTP["Metrics"]) == {line.split()[2] for line in lines if line.startswith("# TYPE")}


# ---------------------------------------------------------------------------------------------- Python

PYTHON = sections(page("docs/python-api.md"))


def defaults(text: str) -> dict[str, str]:
    """{name: default} of tables whose first two columns run in step."""
    found: dict[str, str] = {}
    for names, values, *_ in rows(text):
        given = [value.strip(' `"') for value in values.split(",")]
        assert len(spans(names)) in (len(given), len(spans(names)) * (given == ["none"])), names
        found |= dict(zip(spans(names), given * len(spans(names)), strict=False))
    return found


def shown(value: Any) -> str:
    return "none" if value in (None, ()) else str(value)


def test_sampling_params() -> None:
    there = {f.name: shown(f.default) for f in fields(SamplingParams) if f.init and f.default is not MISSING}
    assert defaults(PYTHON["SamplingParams"]) == there


def test_settings_of_llm() -> None:
    with pytest.raises(ConfigError) as refused:
        configure(None, nonsense=1)
    known = set(str(refused.value).partition("it has: ")[2].split(", "))
    table, _, calls = PYTHON["LLM"].partition("An unknown setting")
    told = defaults(table)
    assert told.keys() == known
    renamed = {"max_num_batched_tokens": "max_rows", "enable_prefix_caching": "share", "memory": "memory_bytes"}
    there = {f.name: shown(f.default) for f in fields(EngineConfig) if f.default is not MISSING}
    for name in ("progress", "recipe", "plugins"):  # not settings of the engine: they are worked in before
        del told[name]
    assert {renamed.get(name, name): value for name, value in told.items()} == there
    assert {call.partition("(")[0] for call in named(calls)} <= set(dir(weft.LLM))


def test_results() -> None:
    kinds = (RequestOutput, CompletionOutput, Logprob)
    told = {span for span in keys_after(PYTHON["LLM"], "A result has") if span != "stop"}
    assert told == {f.name for kind in kinds for f in fields(kind)}


def test_names_of_errors() -> None:
    told = {span.removeprefix("weft.") for span in spans(PYTHON["Errors"]) if not span.startswith(".")}
    assert told == {name for name in weft.__all__ if name.endswith("Error")}


def snippets() -> Iterator[tuple[str, str]]:
    for path in PAGES:
        for block in blocks(path.read_text()):
            if re.search(r"^(from|import|class|@|async|with)\b", block, re.MULTILINE) and "make " not in block:
                yield path.name, block


def test_python_snippets_compile_and_use_what_exists() -> None:
    found = list(snippets())
    assert len(found) >= 6
    takes = {"SamplingParams": {f.name for f in fields(SamplingParams)}, "LLM": defaults_of_llm()}
    takes["AsyncLLM"] = takes["LLM"]
    for name, block in found:
        tree = ast.parse(block, name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "weft":
                assert {alias.name for alias in node.names} <= set(weft.__all__), name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in takes:
                assert {k.arg for k in node.keywords} <= takes[node.func.id], f"{name}: {ast.unparse(node)}"


def defaults_of_llm() -> set[str]:
    return set(defaults(PYTHON["LLM"].partition("An unknown setting")[0]))


# ---------------------------------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    bare = [re.sub(r"[^\w\- ]", "", h.lower()) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {heading.replace(" ", "-") for heading in bare}


def broken(path: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            there = path.parent / name if name else path
            if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
                found.append(target)
    return found


def test_links_and_anchors() -> None:
    assert len(PAGES) > 10
    assert [f"{path.name}: {target}" for path in PAGES for target in broken(path)] == []


def test_results_name_no_path_of_the_machine_they_were_taken_on() -> None:
    kept = [*(ROOT / "bench" / "results").glob("*.*"), *(ROOT / "docs").rglob("*.md")]
    found = [
        (file.name, hit.group())
        for file in kept
        for hit in re.finditer(r"/(?:home|root|tmp|work|Users)/[\w.-]+/[\w./-]+", file.read_text("utf8"))
    ]
    assert len(kept) > 80
    assert not found
    assert _rounded("draft=trie(text='/home/me/.cache/said.txt')") == "draft=trie(text='said.txt')"
    assert _rounded("bench/results/x.json of https://x.org/a/b") == "bench/results/x.json of https://x.org/a/b"
