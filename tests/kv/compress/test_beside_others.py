"""Compression beside techniques that touch the same entries: KV in 8 bits, attention of other kinds, a second model."""

from __future__ import annotations

import pytest

from tests.exec.conftest import Bench, spec
from tests.kv.compress.test_invariance import SmallChunks
from weft.exec.build import Runtime
from weft.types import RequestSpec

MEMBERS = {
    "streaming_llm": "kv.compress=streaming_llm(sinks=4,window=20,every=8)",
    "h2o": "kv.compress=h2o(heavy=12,recent=12,every=8,observe=16)",
}


ROOMY = {
    "streaming_llm": "kv.compress=streaming_llm(sinks=4,window=146,every=16)",
    "h2o": "kv.compress=h2o(heavy=60,recent=90,every=16,observe=16)",
}
"""First cuts at 160: until then what prompts have in common stands in the same blocks."""
LAW = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 20}
HYDRAGEN = "attention=hydragen"
SHARED = f"{HYDRAGEN}.entries_shared"


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    return [spec(i, ids[7 * i : 7 * i + n], seed=i, **LAW) for i, n in enumerate((24, 57, 90))]


@pytest.fixture(scope="module")
def common(ids: list[int]) -> list[int]:
    """Two key tiles."""
    return ids[:130]


@pytest.fixture(scope="module")
def alike(ids: list[int], common: list[int]) -> list[RequestSpec]:
    """Prompts with a common beginning whose answers reach beyond the first cut of ROOMY, one of them a fork's too."""
    return [
        spec(i, [*common, *ids[7 * i : 7 * i + n]], seed=i, n=2 if i == 2 else 1, **LAW)
        for i, n in enumerate((14, 17, 20, 25))
    ]


def after(bench: Bench, common: list[int], specs: list[RequestSpec]) -> dict[tuple[int, int], list[int]]:
    """The answers where the index has the common beginning already."""
    bench.run([spec(99, [*common, 7, 8, 9], max_tokens=1)])
    bench.events.clear()
    return bench.run(specs)


@pytest.mark.parametrize("other", ["kv.store=int8", "attention=flexprefill(block=12,minimum=12,representatives=4)"])
@pytest.mark.parametrize("member", MEMBERS)
def test_steps_do_not_matter(runtime: Runtime, specs: list[RequestSpec], member: str, other: str) -> None:
    """Together, too, tokens are a function of context and seed: alone and in one go, or among others in small chunks."""
    techniques = [MEMBERS[member], other]
    alone: dict[tuple[int, int], list[int]] = {}
    for one in specs:
        bench = Bench(runtime, techniques=techniques, share=False)
        alone.update(bench.run([one]))
        assert bench.engine.stats.acts[f"kv.compress={member}.cuts"] > 0
    assert Bench(runtime, techniques=techniques, policy=SmallChunks(rows=16)).run(specs) == alone


@pytest.mark.parametrize("member", MEMBERS)
def test_exact_attention_changes_no_token(runtime: Runtime, specs: list[RequestSpec], member: str) -> None:
    wanted = Bench(runtime, techniques=[MEMBERS[member]]).run(specs)
    assert Bench(runtime, techniques=[MEMBERS[member], HYDRAGEN]).run(specs) == wanted


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_read_once_for_all_until_it_is_cut(
    runtime: Runtime, alike: list[RequestSpec], common: list[int], member: str, rows: int
) -> None:
    """Sequences that share their beginning, and one by one leave it for compressed copies of their own."""
    alone: dict[tuple[int, int], list[int]] = {}
    for one in alike:
        bench = Bench(runtime, techniques=[ROOMY[member]], share=False)
        alone.update(bench.run([one]))
        assert bench.engine.stats.acts[f"kv.compress={member}.cuts"] > 0
    bench = Bench(runtime, techniques=[ROOMY[member], HYDRAGEN], policy=SmallChunks(rows=rows))
    assert after(bench, common, alike) == alone
    assert bench.engine.stats.acts[f"kv.compress={member}.cuts"] >= len(alike)
    assert bench.engine.stats.acts[SHARED] > 0
