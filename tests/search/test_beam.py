"""Beam search live: the beams of transformers' `generate`, shared KV, and every way in which steps are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft import LLM, BeamSearchParams
from weft.draft.ngram import NGram
from weft.errors import ConfigError, RequestError
from weft.exec.build import Runtime
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.types import Finished, Tokens

transformers = pytest.importorskip("transformers", reason="the reference is transformers (extra [hf])")


@pytest.fixture(scope="module")
def reference() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(None), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def beams(
    reference: Any, prompt: list[int], width: int, tokens: int, ends: tuple[int, ...], **options: Any
) -> list[list[int]]:
    """transformers' beams, cut behind the end id (what follows is padding)."""
    with torch.inference_mode():
        found = reference.generate(
            torch.tensor([prompt]), num_beams=width, num_return_sequences=width, do_sample=False, max_new_tokens=tokens,
            eos_token_id=list(ends) or None, pad_token_id=9, temperature=None, top_p=None, **options,
        )  # fmt: skip
    out = []
    for row in found[:, len(prompt) :].tolist():
        cut = next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
        out.append(row[:cut])
    return out


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (0.0, False), (2.0, False), (-1.0, True), (1.0, True)])
def test_equal_to_transformers(
    reference: Any, runtime: Runtime, ids: list[int], width: int, penalty: float, early: bool
) -> None:
    """Ends are frequent words beside the model's own, so that hypotheses end at every length."""
    words = Tokenizer.load(resolve(None))
    ends = (4, 0, *words.encode(".", add_special=False)[:1], *words.encode(",", add_special=False)[:1])
    text = f"search=beam(width={width}, length_penalty={penalty}, early_stopping={early})"
    bench = Bench(runtime, techniques=[text])
    cases = [
        (i, ids[a:b], ends if i % 2 else (4, 0)) for i, (a, b) in enumerate([(0, 9), (20, 51), (3, 90), (70, 100)], 1)
    ]
    out = bench.run([spec(i, p, n=width, max_tokens=14, stop_ids=e) for i, p, e in cases])
    ended = 0
    for i, prompt, e in cases:
        wanted = beams(reference, prompt, width, 14, e, length_penalty=penalty, early_stopping=early)
        assert [out[i, k] for k in range(width)] == wanted, i
        ended += sum(w[-1] in e for w in wanted)
    assert ended > 0 or penalty > 1, "no hypothesis ends before the last token: the test says little"


def test_penalties_and_minimum_length_are_transformers(reference: Any, runtime: Runtime, ids: list[int]) -> None:
    prompt = ids[:40]
    end = Bench(runtime).run([spec(1, prompt, max_tokens=4, temperature=0.0)])[1, 0][3]
    bench = Bench(runtime, techniques=["search=beam(width=3)"])
    out = bench.run(
        [
            spec(1, prompt, n=3, max_tokens=12, stop_ids=(end,), min_tokens=7),
            spec(2, prompt, n=3, max_tokens=12, repetition_penalty=1.4),
        ]
    )
    least = beams(reference, prompt, 3, 12, (end,), min_new_tokens=7)
    assert [out[1, k] for k in range(3)] == least
    assert [out[2, k] for k in range(3)] == beams(reference, prompt, 3, 12, (), repetition_penalty=1.4)
    plain = Bench(runtime, techniques=["search=beam(width=3)"]).run(
        [spec(1, prompt, n=3, max_tokens=12, stop_ids=(end,)), spec(2, prompt, n=3, max_tokens=12)]
    )
    assert any(len(plain[1, k]) < 7 for k in range(3)), "without the minimum some would be shorter"
    assert plain[2, 0] != out[2, 0]


def test_scores_that_are_told_are_the_models_own(reference: Any, runtime: Runtime, ids: list[int]) -> None:
    bench = Bench(runtime, techniques=["search=beam(width=3)"])
    out = bench.run([spec(1, ids[:30], n=2, max_tokens=8, logprobs=2)])
    for k in range(2):
        (event,) = [e for e in bench.events if isinstance(e, Tokens) and e.index == k]
        with torch.inference_mode():
            logits = reference(torch.tensor([ids[:30] + out[1, k]])).logits[0, 29:-1].float()
        law = torch.log_softmax(logits, -1)
        for at, entry in enumerate(event.logprobs):
            assert entry.token == out[1, k][at]
            assert entry.logprob == pytest.approx(float(law[at, entry.token]), abs=1e-4)
            assert [t for t, _ in entry.top] == law[at].topk(2).indices.tolist()
            assert entry.rank == 1 + int((law[at] > law[at, entry.token]).sum())


@pytest.mark.parametrize(
    "changes",
    [
        {"max_rows": 7},
        {"max_rows": 3, "max_samples": 2},
        {"max_num_seqs": 3},
        {"blocks": 16},
        {"share": False},
        {"techniques": ["draft=ngram(shortest=1)"]},
        {"techniques": ["schedule=prefill_first"]},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_the_same_beams_however_steps_are_cut(runtime: Runtime, ids: list[int], changes: dict[str, Any]) -> None:
    specs = [spec(i, ids[9 * i : 30 + 20 * i], n=2, max_tokens=9, stop_ids=(4,)) for i in (1, 2, 3)]
    wanted = Bench(runtime, techniques=["search=beam(width=4)"]).run(specs)
    parts = ["search=beam(width=4)", *changes.get("techniques", [])]
    bench = Bench(runtime, **{**changes, "techniques": parts})
    assert bench.run(specs) == wanted
    if "blocks" in changes:
        assert bench.engine.stats.preemptions > 0
    acts = bench.engine.stats.acts
    assert all(acts[f"search=beam.{act}"] > 0 for act in ("candidates", "forks", "tokens_discarded"))
    assert acts.get("draft=ngram.proposed", 0) == 0, "what is needed token by token takes no guesses"


class Unasked(NGram):
    """Guesses that nobody may ask for."""

    def propose(self, asks: Any, run: Any) -> Any:
        raise AssertionError("guesses are made for a search that cannot use them")


def test_nobody_guesses_for_a_beam(runtime: Runtime, ids: list[int]) -> None:
    bench = Bench(runtime, techniques=["search=beam(width=2)"], draft=Unasked())
    assert len(bench.run([spec(1, (ids[:20] * 3)[:50], max_tokens=6)])[1, 0]) == 6


def test_beams_share_blocks(runtime: Runtime, ids: list[int]) -> None:
    """Eight beams over a prompt of 8 blocks hold its blocks once, and their own last ones."""
    peak = 0

    def look(bench: Bench) -> None:
        nonlocal peak
        peak = max(peak, bench.engine.pool.referenced)

    bench = Bench(runtime, techniques=["search=beam(width=8)"])
    size = runtime.setup.plan.block_tokens
    bench.run([spec(1, (ids * 2)[: 8 * size], max_tokens=size)], each=look)
    groups = len(runtime.setup.groups)
    assert peak <= groups * (8 + 8 + 1), "each beam has at most one block of its own in each group"
    assert peak < groups * 8 * 9 / 4


def test_one_request_searches_beside_others_that_do_not(runtime: Runtime, ids: list[int]) -> None:
    plain = spec(1, ids[:40], seed=3, max_tokens=9, temperature=0.8)
    searched = spec(2, ids[:40], n=2, max_tokens=9)
    alone = Bench(runtime).run([plain])
    own = Bench(runtime, techniques=["search=beam(width=3)"]).run([searched])
    both = Bench(runtime).run([plain, with_parts(searched, "search=beam(width=3)")])
    assert both == {**alone, **own}


def with_parts(one: Any, *parts: str) -> Any:
    return type(one)(id=one.id, items=one.items, sampling=one.sampling, seed=one.seed, n=one.n, techniques=parts)


def test_leaving_in_the_middle_leaves_no_blocks(runtime: Runtime, ids: list[int]) -> None:
    bench = Bench(runtime, techniques=["search=beam(width=4)"])

    def leave(b: Bench) -> None:
        if b.steps == 6:
            assert len(b.engine.requests()) == 4
            b.engine.cancel(1)

    assert bench.run([spec(1, ids[:60], max_tokens=40)], each=leave) == {}
    assert not [e for e in bench.events if isinstance(e, Finished)]


def test_from_python(reference: Any) -> None:
    with LLM("bundled", max_model_len=256, memory="700MiB", progress=False) as llm:
        prompt = llm.text.prompt_ids("The sea was")
        text, by_ids = llm.beam_search(
            ["The sea was", {"prompt_token_ids": prompt}], BeamSearchParams(beam_width=3, max_tokens=8), use_tqdm=False
        )
        wanted = beams(reference, prompt, 3, 8, llm.text.eos_ids)
        assert [o.token_ids for o in text.outputs] == [o.token_ids for o in by_ids.outputs] == wanted
        assert text.outputs[0].text == llm.text.tokenizer.decode(wanted[0])
        scores = [o.cumulative_logprob / len(o.token_ids) for o in text.outputs]  # type: ignore[operator]
        assert scores == sorted(scores, reverse=True)
        with pytest.raises(RequestError, match="beam_width"):
            BeamSearchParams(beam_width=0)
        with pytest.raises(RequestError, match="no key 'contarst'"):
            llm.generate({"prompt": "a", "contarst": "b"})


def test_wrong_arguments_are_refused() -> None:
    for text in (
        "search=beam(width=0)",
        "search=beam(width=65)",
        "search=beam(length_penalty=1e999)",
        "search=beam(n=2)",
    ):
        with pytest.raises(ConfigError):
            parse(text).build()
