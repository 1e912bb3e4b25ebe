"""JSON schemas of what the routes answer, for `/openapi.json`: the fields that clients read, and their types.

Requests are described by the structs that read them; answers are written by hand, as they are built for speed and not by structs.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def const(*words: str) -> Schema:
    return {"type": "string", "enum": list(words)}


def array(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def maybe(of: Schema) -> Schema:
    """Or null."""
    return {"anyOf": [of, {"type": "null"}]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def fields(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def listed(of: Schema, *, ends: bool) -> Schema:
    """A page of objects.  ends: whether the ids of the first and the last always stand in it."""
    both = {"first_id": STRING, "last_id": STRING}
    base = {"object": const("list"), "data": array(of), "has_more": BOOLEAN}
    return fields({**base, **both}) if ends else fields(base, both)


USAGE = fields(
    {"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER},
    {"prompt_tokens_details": fields({"cached_tokens": INTEGER})},
)
RESPONSE_USAGE = fields(
    {
        "input_tokens": INTEGER,
        "input_tokens_details": fields({"cached_tokens": INTEGER, "cache_write_tokens": INTEGER}),
        "output_tokens": INTEGER,
        "output_tokens_details": fields({"reasoning_tokens": INTEGER}),
        "total_tokens": INTEGER,
    }
)
CHOICE = {"index": INTEGER, "finish_reason": maybe(const("stop", "length", "tool_calls")), "logprobs": maybe(OBJECT)}
STOP = {"stop_reason": {"anyOf": [STRING, INTEGER, {"type": "null"}]}}
MESSAGE = fields(
    {"role": const("assistant"), "content": maybe(STRING)}, {"refusal": maybe(STRING), "tool_calls": array(OBJECT)}
)
ANSWER = {"id": STRING, "created": INTEGER, "model": STRING, "usage": USAGE}
LABEL = {"system_fingerprint": STRING, "weft": OBJECT}
ERROR = fields({"error": fields({"message": STRING, "type": STRING, "param": maybe(STRING), "code": maybe(STRING)})})
ANTHROPIC_ERROR = fields(
    {"type": const("error"), "error": fields({"type": STRING, "message": STRING}), "request_id": STRING}
)

ANSWERS: dict[str, Schema] = {
    "Model": fields({"id": STRING, "object": const("model"), "created": INTEGER, "owned_by": STRING},
                    {"root": STRING, "parent": maybe(STRING), "max_model_len": INTEGER}),
    "ModelList": fields({"object": const("list"), "data": array(ref("Model"))}),
    "Completion": fields({**ANSWER, "object": const("text_completion"),
                          "choices": array(fields({**CHOICE, "text": STRING}, STOP))}, LABEL),
    "ChatCompletion": fields({**ANSWER, "object": const("chat.completion"),
                              "choices": array(fields({**CHOICE, "message": MESSAGE}, STOP))}, LABEL),
    "Response": fields(
        {"id": STRING, "object": const("response"), "created_at": INTEGER, "model": STRING, "output": array(OBJECT),
         "status": const("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
         "error": maybe(fields({"code": STRING, "message": STRING})), "store": BOOLEAN, "background": BOOLEAN,
         "incomplete_details": maybe(fields({"reason": STRING})), "instructions": maybe(STRING),
         "metadata": {"type": "object", "additionalProperties": STRING}, "parallel_tool_calls": BOOLEAN,
         "previous_response_id": maybe(STRING), "temperature": NUMBER, "top_p": NUMBER, "tools": array(OBJECT)},
        {"usage": RESPONSE_USAGE, "completed_at": maybe(INTEGER), "max_output_tokens": maybe(INTEGER), "text": OBJECT,
         "weft": OBJECT}),
    "ResponseDeleted": fields({"id": STRING, "object": const("response"), "deleted": BOOLEAN}),
    "ResponseItems": listed(fields({"id": STRING, "type": STRING}), ends=True),
    "File": fields({"id": STRING, "object": const("file"), "bytes": INTEGER, "created_at": INTEGER, "filename": STRING,
                    "purpose": STRING, "status": const("processed")}, {"expires_at": INTEGER}),
    "FileList": listed(ref("File"), ends=True),
    "FileDeleted": fields({"id": STRING, "object": const("file"), "deleted": BOOLEAN}),
    "BatchList": listed(ref("Batch"), ends=False),
    "Embeddings": fields({
        "object": const("list"), "model": STRING, "usage": fields({"prompt_tokens": INTEGER, "total_tokens": INTEGER}),
        "data": array(fields({"object": const("embedding"), "index": INTEGER,
                              "embedding": {"anyOf": [array(NUMBER), STRING]}}))}),
    "AnthropicMessage": fields({
        "id": STRING, "type": const("message"), "role": const("assistant"), "model": STRING,
        "content": array(fields({"type": STRING})), "stop_reason": maybe(STRING), "stop_sequence": maybe(STRING),
        "usage": fields(dict.fromkeys(("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
                                       "output_tokens"), INTEGER))}, {"weft": OBJECT}),
    "TokenCount": fields({"input_tokens": INTEGER}),
    "Tokens": fields({"count": INTEGER, "max_model_len": INTEGER, "tokens": array(INTEGER),
                      "token_strs": maybe(array(STRING))}),
    "Text": fields({"prompt": STRING}),
    "Health": fields({"status": const("ok", "loading", "stalled", "draining"), "reason": maybe(STRING),
                      "engine_pid": maybe(INTEGER), "engine_restarts": INTEGER, "last_step_s": maybe(NUMBER)},
                     {"engines": array(OBJECT)}),
    "Version": fields({"version": STRING}),
    "Error": ERROR,
    "AnthropicError": ANTHROPIC_ERROR,
}  # fmt: skip
"""By name, the answers of the routes; those of batches are described by their own struct."""
