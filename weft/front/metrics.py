"""Prometheus text exposition (format 0.0.4) of the engine's statistics and of the latencies that clients see.

Source of the format: prometheus.io/docs/instrumenting/exposition_formats.  Names follow vLLM's, the prefix is `weft:`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import structs

from weft.types import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
LENGTH_BUCKETS = tuple(float(1 << k) for k in range(0, 21, 2))
REASONS = ("stop", "length", "abort", "error", "rejected")

GAUGES = (
    ("requests_running", "running", "Sequences that are being computed"),
    ("requests_waiting", "waiting", "Sequences that wait for their turn"),
    ("kv_blocks_total", "kv_blocks_total", "Blocks in the KV pool"),
    ("kv_blocks_referenced", "kv_blocks_referenced", "Blocks in use by live sequences"),
    ("kv_blocks_cached", "kv_blocks_cached", "Blocks kept only for prefixes that may come again"),
    ("shadow_kl_mean", "shadow_kl", "Divergence from the reference path over recent shadow checks, nats per token"),
    ("shadow_top1", "shadow_top1", "Share of tokens of recent shadow checks whose likeliest token is the reference's"),
    ("shadow_alarm", "shadow_alarm", "1 while the divergence is above --shadow-alarm"),
    ("step_rows", "rows", "Rows of the last step"),
    ("step_host_seconds", "host_s", "Time of the last step that was neither model forward nor sampling"),
)
COUNTERS = (
    ("engine_restarts_total", "engine_restarts", "Engine processes that ended and were started again"),
    ("engine_steps_total", "steps", "Steps that the engine has taken"),
    ("prompt_tokens_total", "prompt_tokens", "Prompt tokens computed"),
    ("generation_tokens_total", "generation_tokens", "Tokens generated"),
    ("prefix_hit_tokens_total", "prefix_hit_tokens", "Prompt tokens found in the prefix index"),
    ("prefix_query_tokens_total", "prefix_query_tokens", "Prompt tokens looked up in the prefix index"),
    ("preemptions_total", "preemptions", "Sequences that lost their blocks and were computed again"),
    ("draft_sequences_total", "draft_sequences", "Sequences for which draft lengths were chosen, each in every step"),
    ("draft_guesses_total", "draft_guesses", "Guesses that they were allowed"),
    ("draft_off_total", "draft_off", "Times that guesses were switched off for a sequence, as they did not pay"),
    ("draft_probes_total", "draft_probes", "Steps in which a sequence had a few to see what they would be worth"),
    ("grammar_rows_total", "masked_rows", "Rows of logits that a grammar masked"),
    ("grammar_steps_total", "masked_steps", "Steps in which there were some"),
    ("grammar_mask_seconds_total", "mask_s", "Time that masks took, of steps"),
    ("grammars_total", "grammars", "Requests whose grammar was made ready beside the steps"),
    ("grammar_ready_seconds_total", "grammar_s", "Time that this took"),
    ("shadow_requests_total", "shadow_requests", "Requests that were computed once more on the reference path"),
    ("shadow_tokens_total", "shadow_tokens", "Tokens that shadow checks compared"),
    ("shadow_skipped_total", "shadow_skipped", "Sampled requests that could not be checked"),
    ("evictions_total", "evictions", "Cached blocks that were given up"),
    ("requests_refused_total", "refused", "Requests that the schedule refused, as they could not be in time any more"),
)


ENGINES = (
    "steps", "prompt_tokens", "generation_tokens", "prefix_hit_tokens", "prefix_query_tokens", "preemptions", "evictions",
    "finished", "refused", "shadow_requests", "shadow_tokens", "shadow_skipped", "masked_rows", "masked_steps", "mask_s",
    "grammars", "grammar_s", "draft_sequences", "draft_guesses", "draft_off", "draft_probes",
)  # fmt: skip
"""Figures of `EngineStats` that one engine counts up, and that are counted over all of them."""


def total(before: EngineStats, now: EngineStats, restarts: int) -> EngineStats:
    """Figures of the engine that there is, with what counts up counted over all engines.  before: of those that ended."""
    if not restarts:
        return now
    counted: dict[str, Any] = {name: getattr(before, name) + getattr(now, name) for name in ENGINES}
    acts = {key: before.acts.get(key, 0) + now.acts.get(key, 0) for key in {**before.acts, **now.acts}}
    return structs.replace(now, engine_restarts=restarts, acts=acts, **counted)


class Histogram:
    """Counts of observations by upper bound (inclusive), with their sum."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self.name = name
        self.text = text
        self.buckets = tuple(buckets)
        self.counts = [0] * (len(self.buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add `value` as `times` equal observations."""
        self.counts[bisect_left(self.buckets, value)] += times
        self.sum += value * times

    def lines(self) -> Iterator[str]:
        yield from _head(f"weft:{self.name}", self.text, "histogram")
        yield from self.samples("")

    def samples(self, model: str) -> Iterator[str]:
        """The lines without their head; model: as in `_labels`."""
        name, total = f"weft:{self.name}", 0
        for bound, count in zip((*self.buckets, float("inf")), self.counts, strict=True):
            total += count
            yield f"{name}_bucket{_labels(model, le=_bound(bound))} {total}"
        yield f"{name}_sum{_labels(model)} {self.sum!r}"
        yield f"{name}_count{_labels(model)} {total}"


class Metrics:
    """What the front counts itself: ends of sequences and latencies, all in seconds on the front's clock."""

    def __init__(self) -> None:
        self.ttft = Histogram(
            "time_to_first_token_seconds",
            "From the arrival of a request to the first token of a sequence",
            TTFT_BUCKETS_S,
        )
        self.inter_token = Histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence, as they reach the front", TOKEN_BUCKETS_S
        )
        self.per_token = Histogram(
            "time_per_output_token_seconds", "Mean over a finished sequence, first token left out", TOKEN_BUCKETS_S
        )
        self.e2e = Histogram(
            "e2e_request_latency_seconds", "From the arrival of a request to the end of a sequence", E2E_BUCKETS_S
        )
        self.prompt_length = Histogram("request_prompt_tokens", "Tokens in a prompt", LENGTH_BUCKETS)
        self.output_length = Histogram("request_generation_tokens", "Tokens in a sequence's output", LENGTH_BUCKETS)
        self.ends = dict.fromkeys(REASONS, 0)

    @property
    def histograms(self) -> tuple[Histogram, ...]:
        return self.ttft, self.inter_token, self.per_token, self.e2e, self.prompt_length, self.output_length

    def end(self, reason: str) -> None:
        """Count one sequence (or one rejected request) that ended."""
        self.ends[reason] = self.ends.get(reason, 0) + 1

    def render(self, stats: EngineStats) -> bytes:
        """The page that Prometheus reads."""
        return page([("", self, stats)])


def page(engines: Sequence[tuple[str, Metrics, EngineStats]]) -> bytes:
    """The page that Prometheus reads, of (model, what the front counts, what the engine counts); an empty model is no label."""
    out: list[str] = []
    for kind, table in (("gauge", GAUGES), ("counter", COUNTERS)):
        for name, field, text in table:
            out.extend(_head(f"weft:{name}", text, kind))
            out.extend(f"weft:{name}{_labels(model)} {getattr(stats, field)!r}" for model, _, stats in engines)
    out.extend(_head("weft:requests_total", "Sequences that ended, by reason", "counter"))
    for model, metrics, _ in engines:
        for reason, count in metrics.ends.items():
            out.append(f"weft:requests_total{_labels(model, finish_reason=reason)} {count}")
    out.extend(_head("weft:technique_acts_total", "What techniques did, by technique and act", "counter"))
    for model, _, stats in engines:
        for key, count in sorted(stats.acts.items()):
            technique, _, act = key.rpartition(".")
            out.append(f"weft:technique_acts_total{_labels(model, technique=technique, act=act)} {count}")
    for same in zip(*(metrics.histograms for _, metrics, _ in engines), strict=True):
        out.extend(_head(f"weft:{same[0].name}", same[0].text, "histogram"))
        for (model, _, _), one in zip(engines, same, strict=True):
            out.extend(one.samples(model))
    out.append("")
    return "\n".join(out).encode()


def _labels(model: str, **more: str) -> str:
    """Labels of a sample; model: under vLLM's name for it, none where it is empty."""
    given = {"model_name": model, **more} if model else more
    escaped = {k: v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for k, v in given.items()}
    return "{" + ",".join(f'{k}="{v}"' for k, v in escaped.items()) + "}" if given else ""


def _head(name: str, text: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _bound(value: float) -> str:
    return "+Inf" if value == float("inf") else repr(float(value))
