"""FlexPrefill: each block of a prompt's rows picks, head by head, the blocks of entries that it sees.

Paper    Lai et al., FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference,
         arXiv:2502.20766 [002-33]
Rule     exact = mean over representative rows of softmax(q k), summed by key block; pooled = softmax(mean(q) mean(k)).  Where
         sqrt(JS(exact, pooled)) < tau: the blocks of softmax(mean of the block's q, mean(k)), in falling order, until their sum
         reaches gamma.  Else verticals (exact) and slashes (the representatives' attention by distance, in blocks), each in
         falling order until gamma.  Never fewer than `minimum` tokens of them; the first block and the block's own always
Shapes   q [rows, H, D], keys [E, KV, D]; the choice is bool [KV, key blocks]
Units    block, minimum, representatives: tokens.  gamma: share of the attention.  tau: of sqrt(JS), natural logarithms
Cost     for each block of rows, `representatives` rows of dense scores, and reading the keys once; no state
Pays     for prompts of thousands of tokens, where fewer of their own blocks are looked at than they have: 1.13 to 1.24 times the
         speed at 3,600 tokens with gamma=0.9 and minimum=256.  The default minimum of 1,024 was not timed, and what answers it
         gives was looked at up to 960 tokens, where it changes next to nothing
Differs  prompts come in chunks, so each block of rows has representatives of its own, its last rows, where the paper takes the
         last block of the whole prompt for all; shares are taken for each block of rows, where the paper flattens them over
         all; query heads of one kv head see the union of what each chose, since their keys are read together; key blocks are
         counted in entries, which compression makes fewer than positions; the prompt's last row, rows after the prompt, layers
         with a sliding window and models beside the target are dense
Bound    on a novel that the bundled model has not read, 24 tokens after prompts of 700 to 999, block=32, minimum=32: a mean KL
         of at most 0.002 nat (0.0011 measured, half of the blocks skipped)
Raises   ValueError unless 0 < gamma <= 1, tau >= 0, block >= 1, minimum >= 0 and 1 <= representatives <= block
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from weft.registry import register
from weft.traits import Effect, Fidelity, Traits

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """One block of a prompt's rows: batch rows [low, high), which are entries [first, stop) of their sequence's table."""

    sequence: int
    low: int
    high: int
    first: int
    stop: int


@register("attention", "flexprefill")
@dataclass(frozen=True, slots=True, kw_only=True)
class FlexPrefill:
    """Pays on long prompts, whose attention grows with the square of their length."""

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    minimum: int = 1024
    representatives: int = 16
    acts: dict[str, int] = field(
        default_factory=lambda: {"blocks_skipped": 0, "blocks_computed": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    trial: ClassVar[Mapping[str, Any]] = {"block": 32, "minimum": 32, "representatives": 8}
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, effects=frozenset({Effect.REWRITES_KV}), bound=0.002)

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or not self.tau >= 0 or self.block < 1 or self.minimum < 0:
            raise ValueError(
                f"0 < gamma <= 1, tau >= 0, block >= 1 and minimum >= 0 are needed, got {self.gamma}, {self.tau}, {self.block}, "
                f"{self.minimum}"
            )
        if not 1 <= self.representatives <= self.block:
            raise ValueError(f"representatives are 1 to block ({self.block}) rows, got {self.representatives}")

    @property
    def tile(self) -> int:
        return self.block

    def plan(self, call: Any) -> tuple[Any, list[Rows]]:
        """(tiles, blocks of rows): unit 0 is dense, unit i + 1 is block i."""
        import numpy as np

        found: list[Rows] = []
        units = np.zeros(call.batch.bounds[-1], dtype=np.int64)
        if call.window is None and call.model == "target":
            positions = call.batch.positions_T.cpu().numpy()
            lengths = call.where.lengths_S.tolist()
            for s in call.sequences.tolist():
                low, high = call.batch.bounds[s], call.batch.bounds[s + 1]
                inside = int((positions[low:high] < call.batch.sequences[s].prompt - 1).sum())
                tile = positions[low : low + inside] // self.block
                edges = [0, *(np.flatnonzero(np.diff(tile)) + 1).tolist(), inside] if inside else []
                entry = lengths[s] - (high - low)
                for a, b in itertools.pairwise(edges):
                    found.append(Rows(s, low + a, low + b, entry + a, entry + b))
                    units[low + a : low + b] = len(found)
        return call.tiles(units if found else None), found

    def run(self, call: Any, plan: tuple[Any, list[Rows]]) -> None:
        tiles, found = plan
        if not found:
            call.dense(tiles)
            return
        import torch

        most = -(-max(int(call.where.lengths_S.max()), 1) // self.block)
        visible = torch.zeros(len(found) + 1, call.kv_heads, most, dtype=torch.bool, device=call.q_THD.device)
        visible[0] = True
        keys = {s: call.keys(s, max(r.stop for r in found if r.sequence == s)) for s in {r.sequence for r in found}}
        means = {s: block_means(k, self.block) for s, k in keys.items()}
        for unit, rows in enumerate(found, 1):
            query = call.q_THD[rows.low : rows.high].float() * call.scale
            chosen = self.choose(
                query, keys[rows.sequence][: rows.stop], means[rows.sequence], rows.first, call.softcap
            )
            visible[unit, :, : chosen.shape[1]] = chosen
            taken = int(chosen.sum())
            self.acts["blocks_computed"] += taken
            self.acts["blocks_skipped"] += chosen.numel() - taken
        call.sparse(tiles, visible, self.block)

    # ------------------------------------------------------------------------------------------ the choice

    def choose(self, query: Tensor, keys: Tensor, means: Tensor, first: int, softcap: float | None = None) -> Tensor:
        """Key blocks that a block of rows sees, bool [KV, key blocks].

        query: [rows, H, D], scaled.  keys: [E, KV, D], up to the last row's own.  means: of the keys of each block,
        [>= E // block, KV, D].  first: entry of the first row.  What comes out depends on these alone.
        """
        import torch

        entries, kv_heads, dim = keys.shape
        count = -(-entries // self.block)
        least = -(-self.minimum // self.block)
        if self.gamma >= 1 or count <= max(least, 1):
            return torch.ones(kv_heads, count, dtype=torch.bool, device=keys.device)
        rows = query.shape[0]
        few = min(self.representatives, rows)
        grouped = query.view(rows, kv_heads, -1, dim)
        pooled = means[: entries // self.block]
        if entries % self.block:
            pooled = torch.cat([pooled, keys[entries // self.block * self.block :].mean(0, keepdim=True)])
        shares = _attention(grouped[-few:], keys, softcap)
        exact = _by_block(shares.mean(2), self.block)
        guess = _pooled(grouped[-few:], pooled, softcap)
        aware = _pooled(grouped, pooled, softcap)
        slashes = _by_block(_by_distance(shares), self.block)
        lines = self._slash_blocks(first, entries, count).to(keys.device)
        fallen = (self._cover(slashes, least)[..., None] & lines).any(-2)
        trusted = divergence(exact, guess) < self.tau
        chosen = torch.where(trusted[..., None], self._cover(aware, least), self._cover(exact, least) | fallen).any(1)
        chosen[:, 0] = True
        chosen[:, first // self.block :] = True
        return chosen

    def _cover(self, shares: Tensor, least: int) -> Tensor:
        """The largest shares that together reach gamma, and at least so many, of equal ones the first: bool [..., N]."""
        import torch

        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        taken = before < self.gamma * ordered.sum(-1, keepdim=True)
        taken[..., :least] = True
        return torch.zeros_like(taken).scatter_(-1, order, taken)

    def _slash_blocks(self, first: int, stop: int, count: int) -> Tensor:
        """Key blocks that entries at distances [s * block, (s + 1) * block) before rows [first, stop) lie in, bool [s, count]."""
        import torch

        slash = torch.arange(count)[:, None]
        low = (first - (slash + 1) * self.block + 1).clamp_min(0) // self.block
        high = (stop - 1 - slash * self.block) // self.block
        key = torch.arange(count)
        return (low <= key) & (key <= high)


def block_means(keys: Tensor, block: int) -> Tensor:
    """Means over whole blocks of entries: [E, KV, D] to [E // block, KV, D]."""
    count = keys.shape[0] // block
    return keys[: count * block].view(count, block, *keys.shape[1:]).mean(1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions over the last dimension, in nats before the root."""
    import torch

    middle = (p + q) / 2

    def kl(x: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1)

    return ((kl(p) + kl(q)) / 2).clamp_min(0.0).sqrt()


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _attention(query: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    """Attention of the last rows of the keys' entries, causal: [R, KV, G, D] and [E, KV, D] to [KV, G, R, E]."""
    import torch

    rows, kv_heads, group, dim = query.shape
    entries = keys.shape[0]
    scores = torch.bmm(query.permute(1, 2, 0, 3).reshape(kv_heads, group * rows, dim), keys.permute(1, 2, 0))
    scores = _capped(scores, softcap).view(kv_heads, group, rows, entries)
    later = (
        torch.arange(entries, device=keys.device) > torch.arange(entries - rows, entries, device=keys.device)[:, None]
    )
    return scores.masked_fill_(later, -torch.inf).softmax(-1)


def _pooled(query: Tensor, means: Tensor, softcap: float | None) -> Tensor:
    """Attention of the rows' mean over the blocks' means: [R, KV, G, D] and [N, KV, D] to [KV, G, N]."""
    import torch

    return _capped(torch.bmm(query.mean(0), means.permute(1, 2, 0)), softcap).softmax(-1)


def _by_block(shares: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension, the last of which may be short."""
    import torch

    count = -(-shares.shape[-1] // block)
    return torch.nn.functional.pad(shares, (0, count * block - shares.shape[-1])).unflatten(-1, (count, block)).sum(-1)


def _by_distance(shares: Tensor) -> Tensor:
    """Attention by how far back it falls, mean over the rows: [KV, G, R, E], row r being entry E - R + r, to [KV, G, E]."""
    import torch

    rows, entries = shares.shape[-2:]
    # Turned round, row r finds distance d at R - 1 - r + d; read with a stride one shorter, all rows find it at one place.
    turned = torch.nn.functional.pad(shares.flip(-1), (0, rows))
    width = entries + rows
    skewed = turned.flatten(-2)[..., rows - 1 : rows - 1 + rows * (width - 1)]
    return skewed.unflatten(-1, (rows, width - 1))[..., :entries].mean(-2)
