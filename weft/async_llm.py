"""`AsyncLLM`: a model in this process for asyncio programs, behind an engine thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal

from weft.errors import RequestError
from weft.exec.thread import EngineThread
from weft.front.client import Client
from weft.front.client import Prompt as FrontPrompt
from weft.jobs import Prompt, blank, read_asides, read_prompt, with_texts
from weft.llm import Messages, engine_info, load
from weft.outputs import RequestOutput
from weft.sampling import SamplingParams


class AsyncLLM:
    """The same model behind an engine thread, for asyncio programs: many `generate` calls at once share each step.

    async with AsyncLLM() as llm:
        async for out in llm.generate("Once upon a time", SamplingParams(max_tokens=32)): ...
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        runtime, self.text, self.name = load(model, **options)
        info = engine_info(runtime.setup, self.name, runtime.adapters, loads_adapters=True)
        # Who holds this object may read any folder that the process may.
        self.port = EngineThread(runtime.engine, runtime.executor, info, adapters=runtime.adapters, adapter_root="/")
        self._client = Client(self.port, self.text)
        self._calls = 0

    async def generate(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of one prompt or conversation as they grow; leaving the iteration cancels the request.

        adapter: name of a loaded adapter.
        """
        params = sampling_params or self.text.default_params(max_tokens=16)
        if not isinstance(prompt, (str, Mapping)) and prompt and isinstance(prompt[0], Mapping):
            prompt = {"prompt": self.text.chat_text(prompt), "chat": True}
        text, ids = read_prompt(prompt, self.text)  # type: ignore[arg-type]
        self._calls += 1
        result = blank(str(self._calls), text, ids, params)
        outputs = result.outputs
        techniques, contrast = read_asides(prompt, self.text)
        if adapter is not None:
            techniques = (*techniques, self._part(adapter))
        asked = FrontPrompt(ids=ids, params=params, priority=priority, techniques=techniques, contrast=contrast)
        async with await self._client.start(asked) as generation:
            async for delta in generation:
                out = outputs[delta.index]
                out.text += delta.text
                out.token_ids.extend(delta.token_ids)
                if out.logprobs is not None and out.cumulative_logprob is not None:
                    out.logprobs.extend(with_texts(e, self.text) for e in delta.logprobs)
                    out.cumulative_logprob += sum(e.logprob for e in delta.logprobs)
                if delta.finish_reason is not None:
                    out.finish_reason, out.stop_reason = delta.finish_reason, delta.stop_reason
                    result.num_cached_tokens = max(result.num_cached_tokens, delta.cached_tokens)
                if result.prompt_logprobs is not None:
                    told = generation.requests[0].prompt_logprobs[len(result.prompt_logprobs) - 1 :]
                    result.prompt_logprobs.extend(with_texts(e, self.text) for e in told)
                result.finished = all(o.finish_reason is not None for o in outputs)
                yield result

    async def load_adapter(self, name: str, path: str | Path) -> None:
        """As `LLM.load_adapter`; requests go on meanwhile.  Raises RequestError for files that are no adapter of this model."""
        await self._client.load_adapter(name, str(Path(path).absolute()))

    async def drop_adapter(self, name: str) -> None:
        """As `LLM.drop_adapter`."""
        await self._client.drop_adapter(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return list(self._client.adapters)

    def _part(self, adapter: str) -> str:
        found = self._client.adapters.get(adapter)
        if found is None or found.part is None:
            there = ", ".join(map(repr, self.adapters)) or "none"
            raise RequestError(f"no adapter {adapter!r} is loaded; there is {there}", param="adapter")
        return found.part

    def close(self) -> None:
        self._client.close()
        self.port.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> Literal[False]:
        self.close()
        return False
