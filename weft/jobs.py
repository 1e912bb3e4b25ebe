"""One prompt on its way through an engine in this process, and the progress bar over many of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import EngineError, RequestError
from weft.front.text import ModelText
from weft.outputs import CompletionOutput, Logprob, RequestOutput, logprob_dict
from weft.sampling import SamplingParams
from weft.types import Finished, RequestSpec, TokenLogprob, Tokens

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; a mapping may hold more, see `read_asides`."""


def read_prompt(prompt: Prompt, text: ModelText) -> tuple[str | None, list[int]]:
    """(the prompt's text where it was given as one, its ids), checked.  Raises RequestError.

    A mapping with "chat" true holds a rendered conversation, to which no special tokens are added.
    """
    if isinstance(prompt, str):
        return prompt, text.prompt_ids(prompt)
    if not isinstance(prompt, Mapping):
        return None, text.prompt_ids(list(prompt))
    given, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if (given is None) == (ids is None):
        raise RequestError("a prompt has either 'prompt' or 'prompt_token_ids'", param="prompt")
    return given, text.prompt_ids(given if given is not None else list(ids or ()), add_special=not prompt.get("chat"))


def read_asides(prompt: Any, text: ModelText) -> tuple[tuple[str, ...], list[int]]:
    """What a mapping says beside its prompt: the techniques laid over the server's stack, and the ids to contrast with.

    {"techniques": ["slot=name(args)", ...], "contrast": text, ids or messages}.  Raises RequestError.
    """
    if not isinstance(prompt, Mapping):
        return (), []
    for key in prompt:
        if key not in ("prompt", "prompt_token_ids", "chat", "techniques", "contrast"):
            raise RequestError(f"a prompt has no key {key!r}", param="prompt")
    parts, other = prompt.get("techniques") or (), prompt.get("contrast")
    if isinstance(parts, str) or not all(isinstance(p, str) for p in parts):
        raise RequestError("techniques is a list such as ['search=beam(width=4)']", param="prompt")
    return tuple(parts), [] if other is None else text.contrast_ids(other, add_special=not prompt.get("chat"))


def blank(id: str, prompt: str | None, ids: list[int], params: SamplingParams) -> RequestOutput:
    """The result of a prompt of which nothing is computed yet."""
    wants = params.logprobs is not None
    outputs = [
        CompletionOutput(i, logprobs=[] if wants else None, cumulative_logprob=0.0 if wants else None)
        for i in range(params.n)
    ]
    result = RequestOutput(id, prompt, ids, outputs)
    if params.prompt_logprobs is not None:
        result.prompt_logprobs = [None]
    return result


class Job:
    """One prompt on its way: events in, a RequestOutput that is always right out."""

    def __init__(
        self, spec: RequestSpec, params: SamplingParams, prompt: str | None, ids: list[int], text: ModelText
    ) -> None:
        self.spec, self.params, self._text = spec, params, text
        self.changes = 0
        self.output = blank(str(spec.id), prompt, ids, params)
        self._sequences = [text.sequence(params) for _ in range(spec.n)]

    def take(self, event: Tokens | Finished) -> bool:
        """True where a stop string has ended a sequence that the engine still runs.  Counts `changes`."""
        self.changes += 1
        out, sequence = self.output.outputs[event.index], self._sequences[event.index]
        if out.finish_reason is not None:
            return False
        if isinstance(event, Finished):
            if event.error is not None:
                raise EngineError(event.error)
            delta, _ = sequence.push([], finished=True)
            out.text += delta
            out.finish_reason = event.reason
            if event.stop_id is not None and event.stop_id in (self.params.stop_token_ids or ()):
                out.stop_reason = event.stop_id
            self.output.num_cached_tokens = max(self.output.num_cached_tokens, event.cached_tokens)
            self._settle()
            return False
        if self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs.extend(self._dict(e) for e in event.prompt_logprobs)
        before = sequence.tokens
        delta, stopped = sequence.push(event.tokens)
        taken = event.tokens[: sequence.tokens - before]
        out.text += delta
        out.token_ids.extend(taken)
        if out.logprobs is not None and out.cumulative_logprob is not None:
            for entry in event.logprobs[: len(taken)]:
                out.logprobs.append(self._dict(entry))
                out.cumulative_logprob += entry.logprob
        if stopped is not None:
            out.finish_reason, out.stop_reason = "stop", stopped
            self._settle()
            return True
        return False

    def _settle(self) -> None:
        self.output.finished = all(o.finish_reason is not None for o in self.output.outputs)

    def _dict(self, entry: TokenLogprob) -> dict[int, Logprob]:
        return with_texts(entry, self._text)


def with_texts(entry: TokenLogprob, text: ModelText) -> dict[int, Logprob]:
    """One position's log-probabilities with the text of every token."""
    ids = {entry.token, *(t for t, _ in entry.top)}
    return logprob_dict(entry, {i: text.tokenizer.decode([i], skip_special=False) for i in ids})


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many?  A list of whole numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    if any(isinstance(i, int) for i in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


class Progress:
    """A rich progress bar over jobs and tokens, shown only for long work on a terminal."""

    def __init__(self, wanted: bool, jobs: Sequence[Job]) -> None:
        self._jobs, self._bar, self._tokens = jobs, None, 0
        if wanted and sys.stderr.isatty() and sum(j.spec.sampling.max_tokens * j.spec.n for j in jobs) >= 256:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=len(self._jobs), rate="")
        return self

    def __call__(self, job: Job) -> None:
        self._tokens += sum(len(o.token_ids) for o in job.output.outputs)
        if self._bar is not None:
            spent = self._bar.tasks[0].elapsed or 1.0
            self._bar.update(self._task, advance=1, rate=f"{self._tokens / spent:,.0f} tokens/s")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
