"""POST /v1/embeddings: vectors from the hidden states of a decoder, pooled over the prompt.

Source of the shapes: OpenAI's API reference, "Embeddings"; `pooling` and `normalize` are weft's own.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.generation import GenerationFailed, Prompt
from weft.front.openai.calls import Call
from weft.front.openai.completions import prompt_list, tokenize
from weft.front.openai.service import Service
from weft.front.openai.structs import read
from weft.sampling import SamplingParams

POOLINGS = ("last", "mean")
MAX_INPUTS = 2048
"""OpenAI's bound."""
PLAIN = SamplingParams(temperature=0.0, max_tokens=1)
"""The engine ends a prompt with a token, which nobody is shown."""


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings.  None is "not given"."""

    model: str | None = None
    input: str | list[str | int | list[int]] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    # weft's own
    pooling: str | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None


async def embed(call: Call) -> dict[str, Any]:
    """The vectors of texts, or of lists of ids.  Raises RequestError."""
    service = call.service
    request = read(call.body, EmbeddingRequest, {}, lenient=service.lenient)
    model = service.resolve(request.model)
    encoding = request.encoding_format or "float"
    if encoding not in ("float", "base64"):
        raise RequestError(f"encoding_format must be float or base64, not {encoding[:40]!r}", param="encoding_format")
    pooling = request.pooling or service.pooling
    if pooling not in POOLINGS:
        raise RequestError(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
    if request.dimensions is not None and request.dimensions < 1:
        raise RequestError("dimensions must be at least 1", param="dimensions")
    priority = request.priority or 0
    if not -(1 << 31) <= priority < 1 << 31:
        raise RequestError("priority must fit 32 bits; lower runs first", param="priority")
    prompts = _prompts(request.input)
    ids = await tokenize(service, prompts, add_special=request.add_special_tokens is not False)
    parts = service.techniques(model)
    vectors, used = await _vectors(
        service, [Prompt(ids=one, params=PLAIN, priority=priority, techniques=parts, pooling=pooling) for one in ids]
    )
    length = len(vectors[0]) // 4
    if request.dimensions is not None and request.dimensions > length:
        raise RequestError(f"dimensions: this model's vectors have {length}", param="dimensions")
    size, scaled = request.dimensions or length, request.normalize is not False
    encoded = await service.in_thread(lambda: [_encode(v, size, scaled=scaled, encoding=encoding) for v in vectors])
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(encoded)]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": used, "total_tokens": used}}


def _prompts(given: str | list[str | int | list[int]] | None) -> list[str | list[int]]:
    try:
        prompts = prompt_list(given)
    except RequestError as error:  # the field has another name here
        raise RequestError(str(error).replace("prompt", "input"), param="input", code=error.code) from None
    if len(prompts) > MAX_INPUTS:
        raise RequestError(f"input: at most {MAX_INPUTS} texts at once, got {len(prompts)}", param="input")
    if not all(prompts):
        raise RequestError("input has an empty text; leave it out", param="input")
    return prompts


async def _vectors(service: Service, prompts: list[Prompt]) -> tuple[list[bytes], int]:
    """(float32 vectors, tokens of the prompts)."""
    async with await service.client.start(prompts) as generation:
        while await generation.take():
            pass
        vectors = [request.sequences[0].vector for request in generation.requests]
        if not all(vectors):
            raise GenerationFailed("the engine gave no hidden states of this prompt; ask again")
        return vectors, generation.prompt_tokens


def _encode(vector: bytes, size: int, *, scaled: bool, encoding: str) -> list[float] | str:
    """The first `size` numbers of a vector, of length 1 where `scaled`."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    values = values[:size]
    if scaled:
        norm = math.sqrt(math.fsum(x * x for x in values)) or 1.0
        values = array("f", [x / norm for x in values])
    if encoding == "float":
        return values.tolist()
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
