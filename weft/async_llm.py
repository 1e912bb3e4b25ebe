"""`AsyncLLM`: a model in this process for asyncio programs, behind an engine thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal

from weft.exec.build import build, prepare
from weft.exec.thread import EngineThread
from weft.front.client import Client
from weft.front.client import Prompt as FrontPrompt
from weft.front.text import ModelText
from weft.jobs import Prompt
from weft.llm import Messages, configure, engine_info
from weft.outputs import CompletionOutput, RequestOutput, logprob_dict
from weft.sampling import SamplingParams


class AsyncLLM:
    """The same model behind an engine thread, for asyncio programs: many `generate` calls at once share each step.

    async with AsyncLLM() as llm:
        async for out in llm.generate("Once upon a time", SamplingParams(max_tokens=32)): ...
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
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
