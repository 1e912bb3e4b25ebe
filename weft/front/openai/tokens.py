"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from weft.errors import RequestError
from weft.front.openai.chat import chat_ids
from weft.front.openai.completions import tokenize as tokenize_prompts
from weft.front.openai.service import Service
from weft.front.openai.structs import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, read
from weft.front.openai.unknown import OPENAI

ASKED = OPENAI.union(ChatRequest.__struct_fields__, CompletionRequest.__struct_fields__)
"""What else stands in a request whose prompt is to be seen as ids: it changes none of them."""


async def tokenize(service: Service, body: bytes) -> dict[str, Any]:
    """Ids of a prompt, or of messages with the model's template around them.  Raises RequestError."""
    request = read(body, TokenizeRequest, lenient=service.lenient, harmless=ASKED)
    service.resolve(request.model)
    tokenizer = service.text.tokenizer
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give prompt or messages, one of the two", param="prompt")
    if request.prompt is not None:
        (ids,) = await tokenize_prompts(service, [request.prompt], add_special=request.add_special_tokens is not False)
    else:
        ids = await chat_ids(service, request)
    strings = [tokenizer.token_text(i) for i in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.port.info.max_model_len, "tokens": ids, "token_strs": strings}


async def detokenize(service: Service, body: bytes) -> dict[str, Any]:
    """Text of ids, special tokens included.  Raises RequestError."""
    request = read(body, DetokenizeRequest, lenient=service.lenient)
    service.resolve(request.model)
    ids = request.tokens
    if not ids:
        raise RequestError("tokens is missing or empty; give token ids", param="tokens")
    limit, vocab = service.port.info.max_model_len, service.port.info.vocab_size
    if len(ids) > limit:
        raise RequestError(f"tokens: at most {limit}, the model's context; got {len(ids)}", param="tokens")
    wrong = next((i for i in ids if not 0 <= i < vocab), None)
    if wrong is not None:
        raise RequestError(f"token id {wrong} is outside the vocabulary (0 to {vocab - 1})", param="tokens")
    return {"prompt": service.text.tokenizer.decode(ids, skip_special=False)}
