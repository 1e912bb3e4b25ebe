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


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    law = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 20}
    return [spec(i, ids[7 * i : 7 * i + n], seed=i, **law) for i, n in enumerate((24, 57, 90))]


@pytest.mark.parametrize(
    "other", ["kv.store=int8", "attention=hydragen", "attention=flexprefill(block=12,minimum=12,representatives=4)"]
)
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
    assert Bench(runtime, techniques=[MEMBERS[member], "attention=hydragen"]).run(specs) == wanted
