"""Policies against what their authors say of them: each on the load of its claim, beside the policy that it is compared with.

    python -m bench.sim.policies ../shared/data/traces

writes `weft/sim/data/policies.json`, which `weft policies` tells; with --pages FOLDER a page of charts instead, for each policy
beside FCFS and the clairvoyant bound.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.sim.tried import TRIED, WHY
from weft.registry import lookup, names
from weft.sim.kinds import cluster_of
from weft.sim.metrics import SLO, Meter, slo, summary
from weft.sim.placement import proportions
from weft.sim.report import page
from weft.sim.run import Wanted, compare, setting
from weft.sim.traces import trace
from weft.sim.workload import UNIQUE, Arrival, Pace, Synthetic, paced
from weft.slots import Claim
from weft.slots.cost import Load

OUT = Path(__file__).resolve().parents[2] / "weft" / "sim" / "data" / "policies.json"
BASE = Wanted(trace="", slo=slo("ttft=1s,tpot=50ms"))
MET = 0.9
"""The share of requests within their limits at which the rate is the capacity."""
SAID = {
    "goodput": "requests a second of which nine in ten keep their limits",
    "capacity": "requests a second up to which 99 in 100 gaps between tokens and the median first token keep their limits",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A load, and what is read of it beside the common result."""

    title: str
    wanted: Wanted
    load: Callable[[], Iterable[Arrival]]
    more: Callable[[Meter], dict[str, Any]] = lambda meter: {}


def tenants() -> list[Arrival]:
    """One tenant asks for three times what the device gives, another for a tenth of it."""
    chance, found = random.Random("tenants"), []
    for who, rate, n in (("heavy", 40.0, 1200), ("light", 1.5, 60)):
        now = 0.0
        for i in range(n):
            now += chance.expovariate(rate)
            segments = ((UNIQUE * (1 + (who == "light")) + i, chance.randrange(300, 1500)),)
            found.append(Arrival(now, segments, chance.randrange(60, 300), who))
    return sorted(found, key=lambda a: a.time_s)


def urgent() -> list[Arrival]:
    """The same crowd for everybody, a twentieth of which is urgent."""
    chance = random.Random("urgent")
    return [replace(a, tenant="", priority=-1 if chance.random() < 0.05 else 0) for a in tenants()]


def beginnings() -> list[Arrival]:
    """A thousand requests at once, each with one of fifty beginnings, in no order."""
    chance = random.Random("beginnings")
    return [
        Arrival(
            0.0, ((1 + chance.randrange(50), 1500), (UNIQUE + i, chance.randrange(20, 200))), chance.randrange(20, 200)
        )
        for i in range(1000)
    ]


def shifting() -> list[Arrival]:
    """Quarters of a minute of long prompts with short answers, then of short prompts with long answers, and again."""
    chance, now = random.Random("shifting"), 0.0
    found: list[Arrival] = []
    while now < 90.0:
        heavy = int(now / 15) % 2 == 0
        now += chance.expovariate(22.0 if heavy else 40.0)
        segments = ((UNIQUE + len(found), chance.randrange(2500, 4500) if heavy else chance.randrange(60, 400)),)
        found.append(Arrival(now, segments, chance.randrange(5, 30) if heavy else chance.randrange(200, 500)))
    return found[:1500]


def of(
    load: Callable[[], list[Arrival]], name: str, chosen: Callable[[Arrival], bool]
) -> Callable[[Meter], dict[str, Any]]:
    """The time to the first token of some of the requests."""

    def read(meter: Meter) -> dict[str, Any]:
        times = [
            meter.first[i] - a.time_s for i, a in enumerate(load()) if chosen(a) and meter.first[i] == meter.first[i]
        ]
        return {f"{name}_ttft_s": summary(times)}

    return read


def unequal() -> list[Arrival]:
    """Short and long answers, more of them than the blocks hold, in bursts."""
    chance, now, found = random.Random("unequal"), 0.0, list[Arrival]()
    for i in range(600):
        now += chance.expovariate(12.0)
        output = chance.randrange(1500, 3000) if chance.random() < 0.2 else chance.randrange(30, 150)
        found.append(Arrival(now, ((UNIQUE + i, chance.randrange(500, 2500)),), output))
    return found


def cases(folder: Path) -> dict[str, Case]:
    azure, mooncake = (
        folder / "azure2023" / "AzureLLMInferenceTrace_conv.csv",
        folder / "mooncake" / "synthetic_trace.jsonl",
    )

    def conversation(pace: float, requests: int) -> Callable[[], Iterable[Arrival]]:
        return lambda: paced(trace(str(azure)), Pace(time=pace, requests=requests))

    return {
        "overload": Case("Azure conversations at 3.6 times their pace, one h100", BASE, conversation(3.6, 1500)),
        "gaps": Case("Azure conversations, tokens due every 50 ms and first ones within 2 s, one h100",
                     replace(BASE, slo=slo("ttft=2s,gap=50ms")), conversation(2.0, 1500)),
        "jam": Case("Azure conversations at 7 times their pace, one h100: more than it can serve", BASE, conversation(7, 1500)),
        "tenants": Case("a heavy and a light tenant, one h100", BASE, tenants,
                        of(tenants, "light", lambda a: a.tenant == "light")),
        "urgent": Case("a twentieth is urgent, one h100", BASE, urgent, of(urgent, "urgent", lambda a: a.priority < 0)),
        "replicas": Case("Azure conversations at 14 times their pace, four h100", replace(BASE, replicas=4),
                         conversation(14, 3000)),
        "disaggregated": Case("long prompts at 22 requests a second, tokens due every 15 ms, four h100",
                              replace(BASE, replicas=4, slo=slo("ttft=1s,tpot=15ms")),
                              lambda: Synthetic(rate=22.0, requests=1500, prompt=3000, output=150).arrivals()),
        "shifting": Case("quarter minutes of long prompts and of long answers, four h100", replace(BASE, replicas=4), shifting),
        "images": Case("four tiles a request, encoded by InternViT-6B, 9 requests a second, four h100", replace(BASE, replicas=4),
                       lambda: Synthetic(rate=9.0, requests=300, prompt=1200, output=150, images=4).arrivals()),
        "beside": Case("long prompts at 5.5 requests a second, tokens due every 15 ms, one h100",
                       replace(BASE, slo=slo("ttft=1s,tpot=15ms")),
                       lambda: Synthetic(rate=5.5, requests=300, prompt=3000, output=150).arrivals()),
        "stages": Case("chats at 30 requests a second on two l40s: more than these can serve", replace(BASE, hardware="l40s"),
                       lambda: Synthetic(rate=30.0, requests=600, prompt=600, output=150).arrivals()),
        "slow_links": Case("prompts of 4,000 tokens, one at a time, qwen3-32b on four rtx4090",
                           replace(BASE, hardware="rtx4090", model="qwen3-32b", devices=4, max_rows=4096),
                           lambda: Synthetic(rate=0.02, requests=40, prompt=4000, output=2, spread=0.1).arrivals()),
        "sums": Case("prompts of 2,000 tokens with answers of 50, more than llama-3.1-70b on eight h100 can serve",
                     replace(BASE, model="llama-3.1-70b", devices=8, max_rows=8192),
                     lambda: Synthetic(rate=60.0, requests=600, prompt=2000, output=50).arrivals()),
        "long": Case("prompts of 100,000 tokens, one at a time, on one h100 or one for each of eight hosts",
                     replace(BASE, max_rows=131072),
                     lambda: Synthetic(rate=0.002, requests=20, prompt=100_000, output=2, spread=0.1).arrivals()),
        "contexts": Case("answers of 2,000 tokens to prompts of 1,000, as many as fit", replace(BASE, max_num_seqs=2048),
                         lambda: Synthetic(rate=50.0, requests=1500, prompt=1000, output=2000).arrivals()),
        "cache": Case("1,000 prompts with 50 beginnings of 1,500 tokens, shuffled, a cache for a few",
                      replace(BASE, blocks=1500), beginnings),
        "switches": Case("a fifth of the answers is twenty times as long, blocks for some 60,000 tokens, one h100",
                         replace(BASE, blocks=4000), unequal),
        "prefixes": Case("Mooncake's synthetic trace, half its pace, eight h100", replace(BASE, replicas=8),
                         lambda: paced(trace(str(mooncake)), Pace(time=0.5, requests=1000))),
    }  # fmt: skip


def measured(case: Case, policy: str, claim: Claim) -> dict[str, Any]:
    """What comes of a policy, at the best of what its authors would set for the load: arguments, a proportion, limits to keep."""
    tried = [found(case, one, claim) for one in variants(case, policy)]
    return (min if claim.better == "less" else max)(tried, key=lambda r: value(r, claim.metric))


def variants(case: Case, policy: str) -> list[Wanted]:
    """A policy with each of the arguments that are tried."""
    name, given = policy.partition("(")[0], case.wanted
    if name in names("cost"):
        return [replace(given, cost=f"{name}({inside})") for inside in TRIED.get(name, ("",))]
    rule = lookup("place", name) if name in names("place") else None
    if hasattr(rule, "prefill"):
        return [replace(given, policy=text) for text in proportions(given, name)]
    if name == "sarathi_serve":
        limit = given.slo.gap_s or given.slo.tpot_s or 0.05
        return [replace(given, policy=f"{name}({budget(given, share * limit)})") for share in (1.0, 0.8, 0.6)]
    if hasattr(rule, "tpot_s"):
        return [replace(given, policy=f"{name}(ttft_s={given.slo.ttft_s}, tpot_s={given.slo.tpot_s})")]
    texts = [f"{name}({inside})" for inside in TRIED.get(name, ())] or [
        stacked(policy) if name in names("schedule") else policy
    ]
    return [replace(given, policy=text) for text in texts]


def budget(wanted: Wanted, tbt_s: float) -> str:
    """What profiling tells Sarathi-Serve of this machine: a step of decodes, and each row of a prompt beyond those.

    tbt_s: what it aims at; where more sequences decode than were profiled, less than the limit keeps it.
    """
    s = setting(wanted)
    price = s.cost.on(s.hardware, s.model.figures)
    kinds = len(s.model.figures.kinds)

    def step(rows: int) -> float:
        entries = [64 * 1200.0] * kinds
        return sum(price(Load(rows=64 + rows, samples=64, works=65, prompt_pairs=[rows * 600.0] * kinds,
                              prompt_entries=[1200.0] * kinds, decode_entries=entries, decode_rows=64)))  # fmt: skip

    least = step(0)
    row_s = max((step(n) - least) / n for n in (512, 1024, 2048))
    return f"tbt_s={tbt_s:g}, step_s={least:.6f}, row_s={row_s:.9f}"


def found(case: Case, wanted: Wanted, claim: Claim) -> dict[str, Any]:
    """Goodput is what authors mean by it: the most requests a second of which nine in ten keep their limits.

    Capacity is Sarathi-Serve's: the most a second at which 99 in 100 gaps and half of the first tokens do.
    """
    if claim.metric not in SAID:
        return simulated(case, wanted, 1.0)
    low = high = 0.0
    rate, best = 1.0, dict[str, Any]()
    while not low or not high or high / low > 1.04:
        result = simulated(case, wanted, rate)
        if kept(result, wanted.slo) if claim.metric == "capacity" else result["slo_met"] >= MET:
            low, best = rate, {**result, "capacity": result["offered"]}
        else:
            high = rate
            best = best or {**result, "goodput": 0.0, "capacity": 0.0}
        if max(rate, 1 / rate) > 60:
            break
        rate = (low * high) ** 0.5 if low and high else 1.4 * low if low else high / 1.4
    return best


def kept(result: dict[str, Any], limits: SLO) -> bool:
    """Whether 99 in 100 gaps and the median of first tokens are within limits."""
    assert limits.gap_s is not None
    assert limits.ttft_s is not None
    return bool(result["gap_s"]["p99"] <= limits.gap_s and result["ttft_s"]["p50"] <= limits.ttft_s)


def simulated(case: Case, wanted: Wanted, rate: float) -> dict[str, Any]:
    """The load at so many times its pace."""
    cluster = cluster_of(setting(wanted))
    meter = cluster.run(paced(case.load(), Pace(time=rate)))
    last = meter.arrived[-1]
    return {**cluster.result(), **case.more(meter), "offered": len(meter.arrived) / last if last else 0.0,
            "rate": rate, "arguments": wanted.policy if wanted.cost == "roofline" else wanted.cost}  # fmt: skip


def stacked(name: str) -> str:
    """A schedule with what it wants beside it, as large as a host's memory is."""
    beside = getattr(lookup("schedule", name), "beside", ())
    return "+".join((name, *(text.replace("host(", "host(memory='64GiB', ") for text in beside)))


def value(result: dict[str, Any], metric: str) -> float:
    for key in metric.split("."):
        result = result[key]
    return float(result)  # type: ignore[arg-type]


def judged(claim: Claim, own: dict[str, Any], other: dict[str, Any], title: str, why: str = "") -> dict[str, Any]:
    """The verdict on a claim, with the numbers that it rests on."""
    a, b = value(own, claim.metric) / claim.devices, value(other, claim.metric) if claim.against else 1.0
    ratio = a / b if b else float("inf") if a else 1.0
    holds = ratio <= claim.factor if claim.better == "less" else ratio >= claim.factor
    wanted = f"at {'most' if claim.better == 'less' else 'least'} {claim.factor:.3g}"
    each = f" for each of {claim.devices} devices" if claim.devices > 1 else ""
    seen = f"{SAID.get(claim.metric, claim.metric)} {a:.4g}{each}"
    if claim.against:
        told = other["arguments"].removeprefix("fcfs+") if claim.metric in SAID else claim.against
        told = "the same order by itself" if told.startswith("schedule=") else told
        seen += (
            f" with {own['arguments'].removeprefix('fcfs+')}" if TRIED.get(own["arguments"].partition("(")[0]) else ""
        )
        seen += f" against {b:.4g} of {told}, {ratio:.3g} times"
    reason = f"{title}: {seen}; the claim asks for {wanted}"
    verdict = "holds" if holds else "does not hold"
    if not holds and why:
        reason = f"{reason}. {why}"
    keys = (
        "goodput",
        "output_tok_s",
        "fairness",
        "cached_tokens",
        "slo_met",
        "finished",
        "refused",
        "rate",
        "arguments",
    )
    told = {k: own[k] for k in keys} | {k: own[k] for k in ("ttft_s", "tpot_s", "e2e_s")}
    return {"verdict": verdict, "reason": reason, "ratio": min(ratio, 1e9), "case": claim.case, **told}


def charts(folder: Path, out: Path, only: Sequence[str]) -> None:
    """A page for each schedule, router, placement and claimed cost, beside FCFS and the clairvoyant bound."""
    out.mkdir(parents=True, exist_ok=True)
    source = str(folder / "azure2023" / "AzureLLMInferenceTrace_conv.csv")
    one = replace(BASE, trace=source, pace=Pace(requests=800))
    four = replace(one, replicas=4)
    for slot in ("schedule", "route", "place", "cost"):
        for name in names(slot):
            if name in ("fcfs", "clairvoyant") or (only and name not in only) or (slot == "cost" and not claimed(name)):
                continue
            wanted, rates = (four, (8.0, 16.0, 24.0)) if slot in ("route", "place") else (one, (2.0, 4.0, 6.0))
            if slot == "schedule":
                chosen = ("fcfs", stacked(name), "clairvoyant")
            elif slot == "cost":
                given = "(stages=2)" if name == "energonai" else ""
                chosen = ("fcfs", f"fcfs+cost={name}{given}", "clairvoyant")
            else:
                chosen = ("fcfs+least_loaded", name, "clairvoyant+least_loaded")
            (out / f"{slot}-{name}.html").write_text(page(compare(wanted, chosen, rates), wanted), encoding="utf8")
            print(f"{slot}-{name}.html", flush=True)


def claimed(cost: str) -> bool:
    return getattr(lookup("cost", cost), "claim", None) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="policies, with commas between them; the others stay as they are")
    parser.add_argument(
        "--pages", type=Path, help="folder for charts of every policy over the conversations at three rates"
    )
    given = parser.parse_args()
    if given.pages is not None:
        charts(given.folder, given.pages, given.only.split(",") if given.only else ())
        return
    known, done = cases(given.folder), dict[tuple[str, str, str], dict[str, Any]]()
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for slot in ("schedule", "route", "place", "cost"):
        for name in names(slot):
            claim = getattr(lookup(slot, name), "claim", None)
            if claim is None or (given.only and name not in given.only.split(",")):
                continue
            for policy in (name, claim.against or name):
                if (claim.case, policy, claim.metric) not in done:
                    done[claim.case, policy, claim.metric] = measured(known[claim.case], policy, claim)
            own, other = (done[claim.case, policy, claim.metric] for policy in (name, claim.against or name))
            found[f"{slot}={name}"] = judged(claim, own, other, known[claim.case].title, WHY.get(name, ""))
            print(name, found[f"{slot}={name}"]["verdict"], found[f"{slot}={name}"]["reason"], flush=True)
            OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
