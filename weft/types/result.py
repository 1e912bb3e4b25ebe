"""A result: the facts of one step."""

from __future__ import annotations

from msgspec import Struct


class TokenLogprob(Struct, frozen=True):
    """Log-probability of the chosen token, and the best alternatives as (token, logprob), best first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class WorkResult(Struct, frozen=True, kw_only=True):
    """What became of one work.

    rows: rows computed, at most planned (a short result), or more where the work let the executor go ahead.  tokens: tokens
    that stand, in order: accepted guesses and the one sampled after them.  kept: entries kept per group where that is not simply
    the accepted context rows.  draft: guesses for the next plan.  parents: where those are a tree, the guess that each
    follows, -1 for the newest token.  signals: named scalars per row.  ended: the last token is the
    end of the output's grammar.  failed: why this request alone cannot go on; code: a word for it where the
    request is at fault.  vector: pooled hidden states, little-endian float32 [width], where the sequence asks for them.
    """

    rows: int
    tokens: tuple[int, ...] = ()
    kept: dict[int, int] = {}
    draft: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    signals: dict[str, tuple[float, ...]] = {}
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    ended: bool = False
    failed: str | None = None
    code: str | None = None
    vector: bytes = b""


class StepResult(Struct, frozen=True, kw_only=True):
    """Facts of one step, one `WorkResult` for each work of the plan, in its order.  Times in seconds.

    lost: tickets of the plan's SAVE and LOAD that could not be carried out.  A work that would have read a block that was not
    loaded was not computed: its result has no rows.  masked: rows whose logits a grammar masked, and mask_s what that took (of
    sample_s).  draft_s: what guessing took, the second model's passes and all (of forward_s and sample_s).  beside_s: what
    it took in a thread of its own while the target computed, of which only the target's wait for it is in draft_s.
    """

    step: int
    works: tuple[WorkResult, ...] = ()
    lost: tuple[int, ...] = ()
    forward_s: float = 0.0
    sample_s: float = 0.0
    masked: int = 0
    mask_s: float = 0.0
    draft_s: float = 0.0
    beside_s: float = 0.0
