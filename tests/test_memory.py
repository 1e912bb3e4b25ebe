"""The memory plan holds: under full load the process stays below what the plan printed, plus 200 MB."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ALLOWANCE = 200 << 20

LOAD = """
import json, sys
from weft.exec.build import EngineConfig, build, prepare
from weft.exec.host import peak_rss_bytes
from weft.exec.thread import step
from weft.hub import resolve
from weft.models import load_config
from weft.types import RequestSpec, SamplingSpec, TokenItem

options = json.loads(sys.argv[1])
shape = options.pop("shape")
model = resolve(None) if shape is None else load_config(shape)
seqs, prompt, new = options.pop("seqs"), options.pop("prompt"), options.pop("new")
blocks = options.pop("blocks")
plan = prepare(EngineConfig(model=model, max_num_seqs=seqs, **options)).plan
per_block = plan.kv_bytes // plan.kv_blocks
memory = plan.weights_bytes + plan.workspace_bytes + plan.reserve_bytes + blocks * per_block
config = EngineConfig(model=model, max_num_seqs=seqs, memory_bytes=memory, max_model_len=16 * blocks // 2, **options)
setup = prepare(config)
runtime = build(setup)
loaded = peak_rss_bytes()
vocab = setup.spec.vocab
for i in range(2 * seqs):
    ids = tuple((i * 7919 + j * 104729) % vocab for j in range(prompt))
    law = SamplingSpec(max_tokens=new, temperature=1.0, top_p=0.95, logprobs=5, repetition_penalty=1.1)
    runtime.engine.add(RequestSpec(id=i, items=(TokenItem(ids),), sampling=law, seed=i), 0.0)
most = 0
while runtime.engine.has_work:
    step(runtime.engine, runtime.executor)
    most = max(most, runtime.engine.stats.kv_blocks_referenced)
stats = runtime.engine.stats
print(json.dumps({"plan": setup.plan.as_dict(), "loaded": loaded, "peak": peak_rss_bytes(), "most": most,
                  "finished": stats.finished, "preemptions": stats.preemptions}))
"""


def run(timeout: float = 280, **options: object) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(options)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def holds(found: dict[str, object], seqs: int) -> None:
    plan = found["plan"]
    assert isinstance(plan, dict)
    assert found["finished"] == 2 * seqs
    assert found["most"] >= 0.95 * plan["kv_blocks"], "the load must fill the pool for the peak to mean anything"
    assert found["peak"] < plan["total_bytes"] + ALLOWANCE, (found["peak"], plan)
    assert found["loaded"] < plan["total_bytes"] + ALLOWANCE


@pytest.mark.serial
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_stays_within_its_plan(dtype: str) -> None:
    """A pool smaller than the load wants, so that it is full to the last block."""
    found = run(shape=None, dtype=dtype, seqs=24, prompt=180, new=60, blocks=330, threads=1)
    holds(found, 24)


@pytest.mark.long
@pytest.mark.serial
def test_half_a_billion_parameters_stay_within_their_plan() -> None:
    """As above: a sequence takes 14 blocks, and six of the eight fill the pool."""
    shape = "bench/shapes/qwen2.5-0.5b.json"
    found = run(1800, shape=shape, dtype="bfloat16", load="random", seqs=8, prompt=200, new=24, blocks=84)
    holds(found, 8)
