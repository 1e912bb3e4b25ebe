"""`LLM`: a model in this process, without a server.

    from weft import LLM, SamplingParams
    with LLM() as llm:                                  # the bundled model
        for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(out.outputs[0].text)

Engine, executor and text are plain objects here; the scheduler, the sampling and the texts are those of the server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from weft.errors import CapacityError, ConfigError, EngineError, RequestError
from weft.exec.build import EngineConfig, Runtime, Setup, build, engine_config, prepare
from weft.exec.thread import step
from weft.front.grammars import constrained, holder, shared_grammars
from weft.front.port import EngineInfo
from weft.front.text import ModelText, vocabulary_of
from weft.hub import model_id, resolve
from weft.jobs import Job, Progress, Prompt, listed, read_asides, read_prompt
from weft.ops.choice import slower
from weft.outputs import RequestOutput
from weft.sampling import BeamSearchParams, SamplingParams
from weft.types import Event, Finished, Rejected, Tokens

if TYPE_CHECKING:
    from weft.exec.adapters import AdapterBook

log = logging.getLogger("weft.llm")

Messages = Sequence[Mapping[str, Any]]


def configure(model: str | Path | None = None, **options: Any) -> tuple[EngineConfig, str]:
    """(engine configuration, served name) from the keywords of `LLM`.  Raises ConfigError for an unknown keyword."""
    known = {
        "dtype", "device", "max_model_len", "memory", "threads", "max_num_seqs", "max_num_batched_tokens", "block_tokens",
        "load", "seed", "invariant", "enable_prefix_caching", "techniques", "recipe", "plugins", "lora",
        "max_loras", "lora_memory", "ops", "isa", "weights", "activations", "kv", "draft_control",
        "progress",
    }  # fmt: skip
    for key in options:
        if key not in known:
            raise ConfigError(f"LLM has no option {key!r}; it has: {', '.join(sorted(known))}")
    folder = resolve(model, progress=bool(options.pop("progress", True)))
    return engine_config(folder, options), model_id(model)


def load(model: str | Path | None = None, **options: Any) -> tuple[Runtime, ModelText, str]:
    """(built engine, its model's text side, served name) from the keywords of `LLM`."""
    config, name = configure(model, **options)
    setup = prepare(config)
    if note := slower(setup.ops["target"], config.ops, setup.device):
        log.warning("note: %s", note)
    assert isinstance(config.model, Path)
    text = ModelText.load(config.model, max_model_len=setup.limits.max_model_len, name=name)
    return build(setup, vocabulary=text.vocabulary, vocabulary_of=vocabulary_of), text, name


def engine_info(
    setup: Setup, name: str, adapters: AdapterBook | None = None, *, loads_adapters: bool = False
) -> EngineInfo:
    """What the front is told of a built engine.  loads_adapters: whether it takes commands to load and drop."""
    return EngineInfo(
        model_id=name, vocab_size=setup.spec.vocab, max_model_len=setup.limits.max_model_len, kv_blocks=setup.plan.kv_blocks,
        block_tokens=setup.plan.block_tokens, max_num_seqs=setup.limits.max_num_seqs, dtype=setup.dtype, device=setup.device,
        plan=setup.plan.as_dict(), stack=tuple(str(p) for p in setup.stack.parts),
        adapters=tuple(a.told() for a in adapters.adapters()) if adapters is not None else (), loads_adapters=loads_adapters,
    )  # fmt: skip


class LLM:
    """Load a model and generate.  A context manager; `close` frees the weights and the KV pool.

    For one thread; several streams may be read in turns.  `AsyncLLM` serves many callers at once.

    model       a folder, a hub id, or None / "bundled" for the model that comes with weft
    dtype       auto, float32, bfloat16 (torch dtypes are taken too)
    memory      bytes, or text such as "4GiB": everything that weft may take
    max_model_len, max_num_seqs, max_num_batched_tokens, threads, device, seed, enable_prefix_caching, invariant, ops, isa
    load        "random" gives random weights of the config's shape
    techniques  a list such as ["schedule=prefill_first"]; recipe: a TOML file with a stack; plugins: Python files with techniques

    lora        adapters to load, as ["NAME=FOLDER"]; max_loras: how many may be loaded; lora_memory: bytes set aside for them

    Raises ConfigError for a bad flag or checkpoint, CapacityError when the model does not fit.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self._runtime: Runtime | None
        self._runtime, self._text, self.name = load(model, **options)
        self._ids = 0
        self._open: dict[int, Job] = {}

    # ------------------------------------------------------------------ use

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the prompts' order.

        adapter: name of a loaded adapter, one for all or one for each; None computes with the model as it is.

        sampling_params: one for all, or one for each; None takes the model's own defaults.  use_tqdm: show progress when the
        work is long and stderr is a terminal.
        """
        batch = listed(prompts)
        params = self._spread(sampling_params, len(batch))
        urgency = [priority] * len(batch) if isinstance(priority, int) else list(priority)
        if len(urgency) != len(batch):
            raise RequestError(f"{len(urgency)} priorities for {len(batch)} prompts", param="priority")
        adapters = [adapter] * len(batch) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(adapters) != len(batch):
            raise RequestError(f"{len(adapters)} adapters for {len(batch)} prompts", param="adapter")
        jobs = [self._job(p, s, u, a) for p, s, u, a in zip(batch, params, urgency, adapters, strict=True)]
        with Progress(use_tqdm, jobs) as bar:
            for job in self._run(jobs):
                bar(job)
        return [job.output for job in jobs]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        adapter: str | Sequence[str | None] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several.  template: options of the chat template (add_generation_prompt, ...)."""
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [{"prompt": self._text.chat_text(m, **template), "chat": True} for m in many]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, adapter=adapter)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """The likeliest continuations of every prompt by beam search, best first: `params.n` outputs for each prompt."""
        part = (
            f"search=beam(width={params.beam_width}, length_penalty={params.length_penalty!r}, "
            f"early_stopping={params.early_stopping})"
        )
        asked = []
        for prompt in listed(prompts):
            given = dict(prompt) if isinstance(prompt, Mapping) else {_kind(prompt): prompt}
            asked.append({**given, "techniques": [*given.get("techniques", ()), part]})
        sampling = SamplingParams(
            n=params.n or params.beam_width, temperature=0.0, max_tokens=params.max_tokens, ignore_eos=params.ignore_eos,
            logprobs=0,
        )  # fmt: skip
        return self.generate(asked, sampling, use_tqdm=use_tqdm)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[RequestOutput]:
        """One prompt or conversation as it grows: the same RequestOutput, updated, after each step; leaving it cancels."""
        if not isinstance(prompt, (str, Mapping)) and prompt and isinstance(prompt[0], Mapping):
            prompt = {"prompt": self._text.chat_text(prompt), "chat": True}
        job = self._job(prompt, self._spread(sampling_params, 1)[0], 0, adapter)  # type: ignore[arg-type]
        for changed in self._run([job], every=True):
            yield changed.output

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Take in the adapter in a folder (in the form of the package peft) under a name, for `adapter=` of later calls.

        A name that nobody uses may be loaded anew.  Raises ConfigError for files that are no adapter of this model, CapacityError
        where there is no room, RequestError while requests use the name.
        """
        self._book.enter(self._book.read(name, str(path)))

    def drop_adapter(self, name: str) -> None:
        """Let go of an adapter.  Raises RequestError where there is none, or while requests use it."""
        self._book.drop(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return [a.name for a in self._book.adapters()]

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
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    @property
    def _book(self) -> AdapterBook:
        book = self.runtime.adapters
        assert book is not None
        return book

    def _spread(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self._text.default_params(max_tokens=16)] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise RequestError(f"{len(given)} sampling params for {count} prompts; give one, or one for each")
        return list(given)

    def _job(self, prompt: Prompt, params: SamplingParams, priority: int, adapter: str | None) -> Job:
        text, given = read_prompt(prompt, self._text)
        techniques, contrast = read_asides(prompt, self._text)
        self._ids += 1
        if adapter is not None:
            techniques = (*techniques, self._book.find(adapter).part)
        server = [str(p) for p in self.runtime.setup.stack.parts]
        techniques = constrained(techniques, server, params.grammar)
        if params.grammar is not None:
            shared_grammars().check(holder(techniques, server), params.grammar)
        spec = self._text.request(self._ids, given, params, priority=priority, techniques=techniques, contrast=contrast)
        return Job(spec, params, text, given, self._text)

    def _run(self, jobs: Sequence[Job], *, every: bool = False) -> Iterator[Job]:
        """Advance the engine until all jobs have ended; yields each as it ends, or after each of its steps."""
        engine = self.runtime.engine
        mine = {job.spec.id: job for job in jobs}
        seen = dict.fromkeys(mine, 0)
        try:
            for job in jobs:
                _refuse(engine.add(job.spec, 0.0))
                self._open[job.spec.id] = job
            while mine:
                # Another iteration over this model may have advanced these jobs too; only what is news is given out.
                changed = [job for id, job in mine.items() if job.changes != seen[id]]
                if not changed:
                    self._step()
                for job in changed:
                    seen[job.spec.id] = job.changes
                    if job.output.finished:
                        del mine[job.spec.id]
                    if every or job.output.finished:
                        yield job
        finally:
            for id in mine:
                engine.cancel(id)
            for job in jobs:
                self._open.pop(job.spec.id, None)
            if engine.has_work and not engine.scheduler.running and not engine.scheduler.waiting:
                self._step()

    def _step(self) -> None:
        """One step of the engine; its events go to whichever open job they concern."""
        engine = self.runtime.engine
        events, _ = step(engine, self.runtime.executor)
        for event in events:
            job = self._open.get(event.id)
            if job is not None and isinstance(event, (Tokens, Finished)) and job.take(event):
                engine.cancel(event.id, event.index)


def _kind(prompt: Prompt) -> str:
    return "prompt" if isinstance(prompt, str) else "prompt_token_ids"


def _refuse(events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Rejected):
            if event.kind == "capacity":
                raise CapacityError(event.message)
            raise RequestError(event.message, param=event.param, code=event.code)
