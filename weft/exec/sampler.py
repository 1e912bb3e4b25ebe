"""From logits to tokens: penalties, bias, temperature, truncation of the law, and the race that picks the winner.

The order is the field's: bias, penalties, and the ban of end ids before min_tokens; then temperature, top-k, top-p (over
what top-k left) and min-p.  A row is treated alone, so its token depends on its logits, its history and its noise, never on the
rows beside it.  Truncation is by threshold over the likeliest candidates, never by sorting the vocabulary.

Legend.  N: rows.  V: vocabulary.  K: candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.core import noise
from weft.types import SamplingSpec, TokenLogprob

FIRST_CANDIDATES = 256
CONTENDERS = 1024
ERROR = 0.4
"""How far a draft's logits are from the target's, in noises: a tree of 7 guesses, grown as if it were so, brings most tokens a
step (of prose 2.6, and greedily 3.5; with 1.0, which is nearer to what the draft that ships is, 2.1 and 2.0)."""
NEVER = float("-inf")
_U = np.uint64
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class Row:
    """One row of logits to draw from.

    history: ids before this row's token, prompt first; prompt: how many of them are prompt.  output: index of the token.
    forced: the token, where it is set beforehand.  held: a grammar has left some of the logits only.
    """

    sampling: SamplingSpec
    seed: int
    output: int
    history: Ints
    prompt: int
    forced: int | None = None
    held: bool = False


def gumbel(seed: int, output: int, ids: Ints) -> Floats:
    """Standard Gumbel noise of the given token ids, float64, equal to `core.noise.gumbel` id by id."""
    key = _U(noise.row_key(seed, output))
    with np.errstate(over="ignore"):
        x = key + (ids.astype(np.uint64) + _U(1)) * _U(noise.TOKEN_STEP)
        x = (x ^ (x >> _U(30))) * _U(noise.MULTIPLY_1)
        x = (x ^ (x >> _U(27))) * _U(noise.MULTIPLY_2)
        x ^= x >> _U(31)
    u = ((x >> _U(32)).astype(np.float64) + 0.5) * 2.0**-32
    g: Floats = -np.log(-np.log1p(-u))
    return g


def draw(logits_NV: Tensor, rows: Sequence[Row], program: Any = None) -> list[int]:
    """The winner of each row, -1 where its greatest logit is no finite number.

    `rows[i]` describes logits_NV[i], which is not changed; any device.  program: of weft's kernels, whose threads then draw.
    """
    if program is not None and logits_NV.dtype == torch.float32 and logits_NV.stride(1) == 1:
        winners = _by_kernels(logits_NV, rows, program)
    else:
        greatest, index = logits_NV.max(-1)
        winners = index.where(greatest.isfinite(), -1).tolist()
        for i, row in enumerate(rows):
            if winners[i] >= 0 and not plain(row.sampling, row.output):
                winners[i] = _draw_one(logits_NV[i].float().cpu(), row)
    return [w if w < 0 or row.forced is None else row.forced for w, row in zip(winners, rows, strict=True)]


def _by_kernels(logits_NV: Tensor, rows: Sequence[Row], program: Any) -> list[int]:
    first, stride = logits_NV.data_ptr(), logits_NV.stride(0) * logits_NV.element_size()
    changed = {i: adjust(logits_NV[i].clone(), r) for i, r in enumerate(rows) if adjusts(r.sampling, r.output)}
    where = [changed[i].data_ptr() if i in changed else first + i * stride for i in range(len(rows))]
    keys = [noise.row_key(row.seed, row.output) for row in rows]
    drawn: list[int] = program.draw(where, logits_NV.shape[1], *columns([row.sampling for row in rows]), keys)
    return drawn


def columns(laws: Sequence[SamplingSpec]) -> tuple[list[float], list[int], list[float], list[float]]:
    """Temperatures, top_k, top_p and min_p, as the kernels' `draw` takes them."""
    return [s.temperature for s in laws], [s.top_k for s in laws], [s.top_p for s in laws], [s.min_p for s in laws]


def plain(s: SamplingSpec, output: int) -> bool:
    """Greedy, with nothing that changes a logit."""
    return s.temperature == 0.0 and not adjusts(s, output)


def counts(s: SamplingSpec) -> bool:
    """Whether the law looks at which tokens came before."""
    return bool(s.repetition_penalty != 1.0 or s.presence_penalty or s.frequency_penalty)


def adjusts(s: SamplingSpec, output: int) -> bool:
    """Whether the law changes logits (`adjust`) of the token with this index in the output."""
    return bool(s.logit_bias or counts(s) or (s.stop_ids and output < s.min_tokens))


def _draw_one(logits_V: Tensor, row: Row) -> int:
    s = row.sampling
    if adjusts(s, row.output):
        logits_V = adjust(logits_V.clone(), row)
    if s.temperature == 0.0:
        return int(logits_V.argmax())
    ids, scores = candidates(logits_V, s)
    # Dividing by a tiny temperature must not overflow: the race needs differences only.
    scores = (scores - scores.max()) / s.temperature
    return int(ids[int(np.argmax(scores + gumbel(row.seed, row.output, ids)))])


def ranked(logits_V: Tensor, row: Row, most: int, *, fair: bool) -> tuple[list[int], list[float]]:
    """The first `most` of a row's race, the winner first, and how likely each is; nothing where logits are not finite.

    fair: the chances are those of the law.  Else of the race with its noise as it is, had the logits an error of `ERROR` times
    such a noise more; contenders are then looked for among the likeliest ids.
    """
    s = row.sampling
    if not bool(logits_V.max().isfinite()):
        return [], []
    if adjusts(s, row.output):
        logits_V = adjust(logits_V.clone(), row)
    if s.temperature == 0.0:
        values, index = torch.topk(logits_V, 1 if fair else min(most, logits_V.shape[0]))
        total = torch.logsumexp(logits_V.double() / ERROR, 0)
        return index.tolist(), [1.0] if fair else (values.double() / ERROR - total).exp().tolist()
    ids, scores = candidates(logits_V, s)
    if not fair and len(ids) > CONTENDERS:
        likely = np.argpartition(scores, -CONTENDERS)[-CONTENDERS:]
        ids, scores = ids[likely], scores[likely]
    scores = (scores - scores.max()) / s.temperature
    raced = scores + gumbel(row.seed, row.output, ids)
    first = np.argsort(-raced, kind="stable")[:most]
    chances = np.exp(scores if fair else (raced - raced.max()) / ERROR)
    first = first[scores[first] > NEVER]
    return ids[first].tolist(), (chances / chances.sum())[first].tolist()


def adjust(x: Tensor, row: Row) -> Tensor:
    """Apply bias, penalties and the ban of end ids to one row of logits, in place; ids of -1 in the history are skipped.

    Repetition: Keskar et al., arXiv:1909.05858, over prompt and output.  Presence and frequency: OpenAI's, over output.
    """
    s = row.sampling
    if s.logit_bias:
        x[torch.tensor(list(s.logit_bias))] += torch.tensor(list(s.logit_bias.values()), dtype=x.dtype)
    if s.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(row.history[row.history >= 0]))
        there = x[seen]
        x[seen] = torch.where(there > 0, there / s.repetition_penalty, there * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        out = row.history[row.prompt :]
        ids, counts = np.unique(out[out >= 0], return_counts=True)
        cost = s.frequency_penalty * counts + s.presence_penalty
        x[torch.from_numpy(ids)] -= torch.from_numpy(cost).to(x.dtype)
    if s.stop_ids and row.output < s.min_tokens:
        ends = torch.tensor(s.stop_ids)
        kept = x[ends]
        x[ends] = NEVER
        if row.held and not bool(x.isfinite().any()):
            x[ends] = kept  # a grammar that has come to its end allows nothing else
    return x


def candidates(logits_V: Tensor, s: SamplingSpec) -> tuple[Ints, Floats]:
    """(ids, logits) that the truncated law leaves, float64.  Ties with the last one kept are kept."""
    vocab = logits_V.shape[0]
    if s.top_k == 0 and s.top_p >= 1.0:
        x = logits_V.double().numpy()
        if s.min_p > 0.0:
            ids = np.flatnonzero(x >= x.max() + s.temperature * np.log(s.min_p))
            return ids, x[ids]
        return np.arange(vocab), x
    # Candidates in descending order, more of them until the last one that is kept stands clearly inside.
    total = float(torch.logsumexp(logits_V.double() / s.temperature, 0)) if s.top_p < 1.0 and s.top_k == 0 else 0.0
    k = min(vocab, max(FIRST_CANDIDATES, s.top_k + 1))
    while True:
        values, index = torch.topk(logits_V, k)
        x = values.double().numpy()
        threshold = _threshold(x, s, total)
        if k == vocab or x[-1] < threshold:
            kept = int(np.count_nonzero(x >= threshold))
            return index[:kept].numpy(), x[:kept]
        k = min(vocab, 8 * k)


def _threshold(x: Floats, s: SamplingSpec, total: float) -> float:
    """The smallest logit that top-k, top-p and min-p keep, given the likeliest logits in descending order.

    total: log-sum-exp of all logits over temperature, used where top-k does not cut.
    """
    limit = NEVER
    if 0 < s.top_k < len(x):
        limit = float(x[s.top_k - 1])
    if s.top_p < 1.0:
        inside = x[x >= limit] / s.temperature
        scale = total if s.top_k == 0 else float(np.logaddexp.reduce(inside))
        p = np.exp(inside - scale)
        before = np.cumsum(p) - p
        # The first is always kept: nothing stands before it.
        limit = max(limit, float(x[max(1, int(np.count_nonzero(before < s.top_p))) - 1]))
    if s.min_p > 0.0:
        limit = max(limit, float(x[0] + s.temperature * np.log(s.min_p)))
    return limit


def logprobs(logits_V: Tensor, token: int, top: int) -> TokenLogprob:
    """Of the model's own law (before bias, penalties and temperature): the token's log-probability, rank and `top` best."""
    return _ranked(torch.log_softmax(logits_V.float(), -1), token, top)


def told(logits_V: Tensor, row: Row, token: int) -> TokenLogprob:
    """As `logprobs`, for a row's own token; what a search ranks by has bias, penalties and bans on top, as in beam search."""
    s, x = row.sampling, torch.log_softmax(logits_V.float(), -1)
    return _ranked(adjust(x, row) if s.steered and adjusts(s, row.output) else x, token, s.logprobs)


def _ranked(x: Tensor, token: int, top: int) -> TokenLogprob:
    own = x[token]
    rank = int((x > own).sum()) + 1
    best: tuple[tuple[int, float], ...] = ()
    if top > 0:
        values, index = torch.topk(x, min(top, x.shape[0]))
        best = tuple((t, v) for t, v in zip(index.tolist(), values.tolist(), strict=True) if v > NEVER)
    return TokenLogprob(token, float(own), rank, best)


def law(logits_V: Tensor, row: Row) -> tuple[Ints, Floats]:
    """(ids, probabilities) of the law that the row's token is drawn from: what the race is a draw of.

    Certain where the row is greedy, or its token set beforehand.
    """
    s = row.sampling
    if row.forced is not None:
        return np.array([row.forced]), np.ones(1)
    if adjusts(s, row.output):
        logits_V = adjust(logits_V.clone(), row)
    if s.temperature == 0.0:
        return np.array([int(logits_V.argmax())]), np.ones(1)
    ids, scores = candidates(logits_V, s)
    weights = np.exp((scores - scores.max()) / s.temperature)
    return ids, weights / weights.sum()
