"""What `LLM` gives back, in the names and shapes that people know from vLLM's offline API."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.types import FinishReason, TokenLogprob


@dataclass(slots=True)
class Logprob:
    """Natural log-probability of one token, its rank in the vocabulary (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sequence.  token_ids include the id that ended it, text does not.

    logprobs: for each token {id: Logprob} of the token and the alternatives asked for; None where none were asked for.
    finish_reason: "stop", "length" or "abort"; None while it grows.  stop_reason: the stop string or stop id, where one it was.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its n outputs.  prompt_logprobs[0] is None: nothing predicts the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


def logprob_dict(entry: TokenLogprob, texts: dict[int, str]) -> dict[int, Logprob]:
    """One position: the alternatives best first, then the token itself where it is not among them.  texts: id to text."""
    found = {t: Logprob(p, rank, texts.get(t)) for rank, (t, p) in enumerate(entry.top, 1)}
    found.setdefault(entry.token, Logprob(entry.logprob, entry.rank, texts.get(entry.token)))
    return found
