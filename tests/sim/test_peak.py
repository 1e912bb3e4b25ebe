"""The calculator of peak performance: its formulas by hand for 34 billion parameters on an a100, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tools.charts import DEVICE, MODEL, PEAKS, alone, peaks
from weft.cli.app import app
from weft.errors import ConfigError
from weft.sim.machines import hardware, model
from weft.sim.peak import contexts, peak, shares
from weft.slots.cost import Figures, Kind

# 60 layers, 56 heads and 8 kv heads of 128, in 2 bytes: an entry is 2 * 60 * 8 * 128 * 2 bytes, a pair 4 * 56 * 128 * 60 FLOPs.
YI = Figures(
    name="34b", layers=60, width=7168, dense_params=34_000_000_000, head_params=0,
    kinds=(Kind(window=None, pair_flops=1_720_320.0, entry_bytes=245_760),),
)  # fmt: skip


def test_four_limits_by_hand() -> None:
    # a100: 312 TFLOP/s, 80 GB, 2,039 GB/s, 32 GB/s to its host.  Weights of 68 GB leave 12 GB.
    short, long = (peak(hardware("a100"), YI, t) for t in (4000, 50_000))
    assert short.kv_bytes == 983_040_000
    assert short.users == 12  # 12 / 0.98304
    assert long.kv_bytes == 12_288_000_000
    assert long.users == 0  # not even one: 12.3 GB in 12
    assert short.prefill_s == pytest.approx((2 * 34e9 * 4000 + 1_720_320 * 4000 * 4001 / 2) / 312e12)
    assert short.prefill_s == pytest.approx(0.9159, rel=1e-3)
    assert long.prefill_s == pytest.approx(17.79, rel=1e-3)  # 10.90 s of products and 6.89 s of attention
    assert short.decode_s == pytest.approx(68.98304e9 / 2039e9)
    assert long.decode_s == pytest.approx(80.288e9 / 2039e9)
    assert long.switch_s == pytest.approx(2 * 12.288 / 32)
    # Five questions of 250 tokens, four of which come after others were served.
    assert long.session_s == pytest.approx(long.prefill_s + 1250 * long.decode_s + 4 * long.switch_s)
    assert (short.bound_by, long.bound_by) == ("decode", "memory")
    # On two of them: 160 - 68 GB hold 7 contexts, and arithmetic and reading take half as long.
    two = peak(hardware("a100", 2), YI, 50_000)
    assert two.users == 7
    assert two.prefill_s == pytest.approx(long.prefill_s / 2)
    assert two.bound_by == "decode"
    assert peak(hardware("a100", 2), YI, 400_000).bound_by == "memory"
    assert peak(hardware("a100", 2), YI, 300_000).bound_by == "prefill"


def test_shares_of_kv_multiply_and_windows_end_the_quadratic_term() -> None:
    whole, less = peak(hardware("a100"), YI, 50_000), peak(hardware("a100"), YI, 50_000, {"layers": 0.5, "bits": 0.25})
    assert less.kv_bytes == whole.kv_bytes / 8
    assert less.users == 7
    assert less.switch_s == whole.switch_s / 8
    assert less.prefill_s == whole.prefill_s
    near = replace(YI, kinds=(replace(YI.kinds[0], window=100),))
    assert peak(hardware("a100"), near, 1000).kv_bytes == 100 * 245_760
    # 1 + ... + 100 pairs, then 100 for each of 900 rows.
    assert peak(hardware("a100"), near, 1000).prefill_s == pytest.approx((68e12 + 1_720_320 * 95_050) / 312e12)


def test_the_chart_shows_the_limits_and_nothing_that_is_served_beats_them() -> None:
    drawn = peaks()
    assert PEAKS.read_text(encoding="utf8") == drawn, "python -m tools.charts writes it anew"
    root = ElementTree.fromstring(drawn)
    told = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    # llama-3.1-8b on an h100: 80 GB less 16.06 GB of weights hold 121 contexts of 4,000 tokens of 128 KiB, and 3 of 128,000.
    assert {"limit: 121 at 4,000", "limit: 3 at 128k", "limit with a quarter of KV: 15 at 128k"} <= set(told)
    for context in (4000, 128_000):
        limit, served = peak(hardware(DEVICE), model(MODEL).figures, context), alone(context)
        assert served["users"] <= limit.users
        # 0.65 of the arithmetic, 0.4 of attention's, 0.8 of the memory, and the host: more time, and not many times as much.
        assert limit.prefill_s / 0.65 < served["prefill_s"] < limit.prefill_s / 0.3
        assert limit.decode_s / 0.8 < served["decode_s"] < 2 * limit.decode_s


def test_a_known_model_s_figures() -> None:
    # llama-3.1-8b: 2 * 32 layers * 8 kv heads * 128 * 2 bytes are 128 KiB for a token.
    found = peak(hardware("h100"), model("llama-3.1-8b").figures, 131_072)
    assert found.kv_bytes == 16 * 2**30
    assert found.users == 3  # 80 GB - 16 GB of weights, in parts of 17.2 GB


@pytest.mark.parametrize("text", ["", "a", "0", "4096,", "-1", "1e3"])
def test_bad_contexts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--peak"):
        contexts(text)


@pytest.mark.parametrize(
    "text", ["layers", "layers=0", "layers=2", "rows=0.5", "bits=x", "bits=0.5,bits=0.5", "bits=nan"]
)
def test_bad_shares_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-kept"):
        shares(text)
    with pytest.raises(ConfigError):
        peak(hardware("a100"), YI, 0)
    with pytest.raises(ConfigError, match="says nothing"):
        peak(hardware("a100"), YI, 1, dtype="float4")


def test_the_command() -> None:
    args = ["sim", "--peak", "4096,131072", "--hardware", "h100", "--model", "llama-3.1-8b"]
    done = CliRunner().invoke(app, [*args, "--kv-kept", "bits=0.5", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [p["context"] for p in found] == [4096, 131_072]
    assert set(found[0]) == {
        "context",
        "kv_bytes",
        "users",
        "prefill_s",
        "decode_s",
        "switch_s",
        "session_s",
        "bound_by",
    }
    assert found[1]["kv_bytes"] == 8 * 2**30
    told = CliRunner().invoke(app, args)
    assert told.exit_code == 0
    assert "131,072" in told.stdout
    assert CliRunner().invoke(app, ["sim", "--peak", "x"]).exit_code == 2
