"""`LLM`: a model in this process, without a server.

    from weft import LLM, SamplingParams
    with LLM() as llm:                                  # the bundled model
        for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(out.outputs[0].text)

Engine, executor and text are plain objects here; the scheduler, the sampling and the texts are those of the server.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from weft.errors import CapacityError, ConfigError, EngineError, RequestError
from weft.exec.build import EngineConfig, Runtime, Setup, build, prepare
from weft.exec.host import parse_size
from weft.exec.thread import EngineThread, step
from weft.front.port import EngineInfo
from weft.front.text import ModelText
from weft.hub import model_id, resolve
from weft.outputs import CompletionOutput, Logprob, RequestOutput, logprob_dict
from weft.sampling import SamplingParams
from weft.types import Event, Finished, Rejected, RequestSpec, TokenItem, TokenLogprob, Tokens

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""
Messages = Sequence[Mapping[str, Any]]


def configure(model: str | Path | None = None, **options: Any) -> tuple[EngineConfig, str]:
    """(engine configuration, served name) from the keywords of `LLM`.  Raises ConfigError for an unknown keyword."""
    known = {
        "dtype", "device", "max_model_len", "memory", "threads", "max_num_seqs", "max_num_batched_tokens", "block_tokens",
        "load", "seed", "invariant", "enable_prefix_caching", "techniques", "progress",
    }  # fmt: skip
    for key in options:
        if key not in known:
            raise ConfigError(f"LLM has no option {key!r}; it has: {', '.join(sorted(known))}")
    folder = resolve(model, progress=bool(options.pop("progress", True)))
    renamed = {"max_num_batched_tokens": "max_rows", "enable_prefix_caching": "share"}
    memory = options.pop("memory", None)
    fields = {renamed.get(k, k): v for k, v in options.items() if v is not None}
    if memory is not None:
        fields["memory_bytes"] = parse_size(memory) if isinstance(memory, str) else int(memory)
    if "dtype" in fields:
        fields["dtype"] = str(fields["dtype"])
    return EngineConfig(model=folder, **fields), model_id(model)


def engine_info(setup: Setup, name: str) -> EngineInfo:
    """What the front is told of a built engine."""
    return EngineInfo(
        model_id=name, vocab_size=setup.spec.vocab, max_model_len=setup.limits.max_model_len, kv_blocks=setup.plan.kv_blocks,
        block_tokens=setup.plan.block_tokens, max_num_seqs=setup.limits.max_num_seqs, dtype=setup.dtype, device=setup.device,
        plan=setup.plan.as_dict(), stack=tuple(str(p) for p in setup.stack.parts),
    )  # fmt: skip


class LLM:
    """Load a model and generate.  A context manager; `close` frees the weights and the KV pool.

    model       a folder, a hub id, or None / "bundled" for the model that comes with weft
    dtype       auto, float32, bfloat16 (torch dtypes are taken too)
    memory      bytes, or text such as "4GiB": everything that weft may take
    max_model_len, max_num_seqs, max_num_batched_tokens, threads, device, seed, enable_prefix_caching, invariant
    load        "random" gives random weights of the config's shape
    techniques  a list such as ["schedule=prefill_first"]

    Raises ConfigError for a bad flag or checkpoint, CapacityError when the model does not fit.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        config, self.name = configure(model, **options)
        setup = prepare(config)
        assert isinstance(config.model, Path)
        self._text = ModelText.load(config.model, max_model_len=setup.limits.max_model_len, name=self.name)
        self._runtime: Runtime | None = build(setup)
        self._ids = 0

    # ------------------------------------------------------------------ use

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the prompts' order.

        sampling_params: one for all, or one for each; None takes the model's own defaults.  use_tqdm: show progress when the
        work is long and stderr is a terminal.
        """
        batch = _listed(prompts)
        params = self._spread(sampling_params, len(batch))
        urgency = [priority] * len(batch) if isinstance(priority, int) else list(priority)
        if len(urgency) != len(batch):
            raise RequestError(f"{len(urgency)} priorities for {len(batch)} prompts", param="priority")
        jobs = [self._job(p, s, u) for p, s, u in zip(batch, params, urgency, strict=True)]
        with _progress(use_tqdm, jobs) as bar:
            for job in self._run(jobs):
                bar(job)
        return [job.output for job in jobs]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several.  template: options of the chat template (add_generation_prompt, ...)."""
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [{"prompt": self._text.chat_text(m, **template), "chat": True} for m in many]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """One prompt or conversation as it grows: the same RequestOutput, updated, after each step; leaving it cancels."""
        if not isinstance(prompt, (str, Mapping)) and prompt and isinstance(prompt[0], Mapping):
            prompt = {"prompt": self._text.chat_text(prompt), "chat": True}
        job = self._job(prompt, self._spread(sampling_params, 1)[0], 0)  # type: ignore[arg-type]
        for changed in self._run([job], every=True):
            yield changed.output

    @property
    def text(self) -> ModelText:
        """Tokenizer, chat template and defaults of the model."""
        return self._text

    @property
    def runtime(self) -> Runtime:
        """Engine, executor and memory plan.  Raises EngineError once closed."""
        if self._runtime is None:
            raise EngineError("this LLM is closed")
        return self._runtime

    def close(self) -> None:
        """Free everything; calling it twice is fine."""
        self._runtime = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _spread(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self._text.default_params(max_tokens=16)] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise RequestError(f"{len(given)} sampling params for {count} prompts; give one, or one for each")
        return list(given)

    def _job(self, prompt: Prompt, params: SamplingParams, priority: int) -> _Job:
        text: str | None = None
        if isinstance(prompt, Mapping):
            chat = bool(prompt.get("chat"))
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if (text is None) == (ids is None):
                raise RequestError("a prompt has either 'prompt' or 'prompt_token_ids'", param="prompt")
        else:
            chat, text, ids = False, *((prompt, None) if isinstance(prompt, str) else (None, prompt))
        given = self._text.prompt_ids(text if text is not None else list(ids or ()), add_special=not chat)
        setup = self.runtime.setup
        room = setup.limits.max_model_len - len(given)
        self._ids += 1
        spec = RequestSpec(
            id=self._ids,
            items=(TokenItem(tuple(given)),),
            sampling=params.spec(eos=self._text.eos_ids, vocab=setup.spec.vocab, room=room),
            seed=secrets.randbits(64) if params.seed is None else params.seed & ((1 << 64) - 1),
            n=params.n,
            priority=priority,
        )
        return _Job(spec, params, text, given, self._text)

    def _run(self, jobs: Sequence[_Job], *, every: bool = False) -> Iterator[_Job]:
        """Advance the engine until all jobs have ended; yields each as it ends, or after each of its steps."""
        engine, executor = self.runtime.engine, self.runtime.executor
        open_jobs = {job.spec.id: job for job in jobs}
        try:
            for job in jobs:
                _refuse(engine.add(job.spec, 0.0))
            while open_jobs:
                events, _ = step(engine, executor)
                changed: dict[int, _Job] = {}
                for event in events:
                    job = open_jobs.get(event.id)
                    if job is not None and isinstance(event, (Tokens, Finished)):
                        if job.take(event):
                            engine.cancel(event.id, event.index)
                        changed[event.id] = job
                for id, job in changed.items():
                    if job.output.finished:
                        del open_jobs[id]
                    if every or job.output.finished:
                        yield job
        finally:
            for id in open_jobs:
                engine.cancel(id)
            if engine.has_work and not engine.scheduler.running and not engine.scheduler.waiting:
                step(engine, executor)


class _Job:
    """One prompt on its way: events in, a RequestOutput that is always right out."""

    def __init__(self, spec: RequestSpec, params: SamplingParams, prompt: str | None, ids: list[int], text: ModelText) -> None:
        self.spec, self.params, self._text = spec, params, text
        wants = params.logprobs is not None
        outputs = [
            CompletionOutput(i, logprobs=[] if wants else None, cumulative_logprob=0.0 if wants else None) for i in range(spec.n)
        ]
        self.output = RequestOutput(str(spec.id), prompt, ids, outputs)
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]
        self._sequences = [text.sequence(params) for _ in range(spec.n)]

    def take(self, event: Tokens | Finished) -> bool:
        """True where a stop string has ended a sequence that the engine still runs."""
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
        ids = {entry.token, *(t for t, _ in entry.top)}
        return logprob_dict(entry, {i: self._text.tokenizer.decode([i], skip_special=False) for i in ids})


class AsyncLLM:
    """The same model behind an engine thread, for asyncio programs: many `generate` calls at once share each step.

    async with AsyncLLM() as llm:
        async for out in llm.generate("Once upon a time", SamplingParams(max_tokens=32)): ...
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        from weft.front.client import Client

        config, self.name = configure(model, **options)
        setup = prepare(config)
        assert isinstance(config.model, Path)
        self.text = ModelText.load(config.model, max_model_len=setup.limits.max_model_len, name=self.name)
        runtime = build(setup)
        self.port = EngineThread(runtime.engine, runtime.executor, engine_info(setup, self.name))
        self._client = Client(self.port, self.text)

    async def generate(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of one prompt or conversation as they grow; leaving the iteration cancels the request."""
        from weft.front.client import Prompt as FrontPrompt

        params = sampling_params or self.text.default_params(max_tokens=16)
        text, ids = self._ids(prompt)
        outputs = [CompletionOutput(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        result = RequestOutput("", text, ids, outputs)
        async with await self._client.start(FrontPrompt(ids=ids, params=params, priority=priority)) as generation:
            async for delta in generation:
                out = outputs[delta.index]
                out.text += delta.text
                out.token_ids.extend(delta.token_ids)
                if out.logprobs is not None:
                    decode = self.text.tokenizer.decode
                    for e in delta.logprobs:
                        shown = {i: decode([i], skip_special=False) for i in {e.token, *(t for t, _ in e.top)}}
                        out.logprobs.append(logprob_dict(e, shown))
                if delta.finish_reason is not None:
                    out.finish_reason, out.stop_reason = delta.finish_reason, delta.stop_reason
                    result.num_cached_tokens = max(result.num_cached_tokens, delta.cached_tokens)
                result.finished = all(o.finish_reason is not None for o in outputs)
                yield result

    def _ids(self, prompt: Prompt | Messages) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.text.prompt_ids(prompt)
        if isinstance(prompt, Mapping):
            text = prompt.get("prompt")
            return text, self.text.prompt_ids(text if text is not None else list(prompt.get("prompt_token_ids") or ()))
        if prompt and isinstance(prompt[0], Mapping):
            return None, self.text.chat_ids(prompt)
        return None, self.text.prompt_ids(list(prompt))  # type: ignore[arg-type]

    def close(self) -> None:
        self._client.close()
        self.port.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> Literal[False]:
        self.close()
        return False


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many?  A list of whole numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(i, int) for i in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _refuse(events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Rejected):
            if event.kind == "capacity":
                raise CapacityError(event.message)
            raise RequestError(event.message, param=event.param, code=event.code)


class _progress:
    """A rich progress bar over jobs and tokens, shown only for long work on a terminal."""

    def __init__(self, wanted: bool, jobs: Sequence[_Job]) -> None:
        self._jobs, self._bar, self._tokens = jobs, None, 0
        import sys

        if wanted and sys.stderr.isatty() and sum(j.spec.sampling.max_tokens * j.spec.n for j in jobs) >= 256:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)

    def __enter__(self) -> _progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=len(self._jobs), rate="")
        return self

    def __call__(self, job: _Job) -> None:
        self._tokens += sum(len(o.token_ids) for o in job.output.outputs)
        if self._bar is not None:
            spent = self._bar.tasks[0].elapsed or 1.0
            self._bar.update(self._task, advance=1, rate=f"{self._tokens / spent:,.0f} tokens/s")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
