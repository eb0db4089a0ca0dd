"""The JSON Schemas (2020-12, as OpenAPI 3.1 has them) of what the routes take and give."""

from __future__ import annotations

from typing import Any, get_args

from commentary.record import CommentaryStatus
from pulse_ecg.call import DEFAULT_MODEL_NAME, HANDLER_NAME, PROCESSING_METHOD
from pulse_ecg.params import MAX_STOP_STRINGS
from pulse_ecg.request import DEFAULT_QUESTION, EMPTY_IN_MESSAGES, MAX_BATCH
from server.chat_request import LEAST, MOST_TOKENS

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """A schema of :data:`SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, *, required: tuple[str, ...] = (), more: bool = False, **keywords: Any) -> Schema:
    schema = {"type": "object", "properties": properties, "additionalProperties": more, **keywords}
    return schema | ({"required": list(required)} if required else {})


def _integer(low: int, high: int | None = None, **keywords: Any) -> Schema:
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high}) | keywords


def _number(low: float, high: float, **keywords: Any) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high, **keywords}


def _text(description: str = "", **keywords: Any) -> Schema:
    return {"type": "string", **({"description": description} if description else {}), **keywords}


def _boolean(description: str, *, default: bool = False) -> Schema:
    return {"type": "boolean", "default": default, "description": description}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _event(data: Schema, name: str = "") -> Schema:
    """A Server-Sent Event, as the object that readers make of it: ``data`` is text, and the text is JSON."""
    text = _text(contentMediaType="application/json", contentSchema=data)
    return _object(
        {"data": text, **({"event": {"const": name}} if name else {})},
        required=("data", "event") if name else ("data",),
    )


_TEMPERATURE: Schema = {
    "description": "0 means greedy.",
    "anyOf": [{"const": 0}, _number(0.01, 2.0)],
}
_STOP: Schema = {
    "description": "The answer is cut before the first that occurs.",
    "anyOf": [
        _text(minLength=1),
        {"type": "array", "items": _text(minLength=1), "maxItems": MAX_STOP_STRINGS},
    ],
}
_IMAGE = _text("An http(s) URL, a data:image/…;base64,… URI, or bare base64; at most 20 MB.", minLength=1)

# --- the endpoint's own contract

PARAMETERS: Schema = {
    "max_new_tokens": _integer(1, MOST_TOKENS),
    "temperature": _TEMPERATURE,
    "top_p": _number(0.01, 1.0),
    "top_k": _integer(0, description="0 is off."),
    "do_sample": {"type": "boolean", "description": "false is greedy."},
    "repetition_penalty": _number(1.0, 2.0),
    "stop": _STOP,
    "return_full_text": _boolean("The question, a line break, the answer."),
    "enable_turkish_commentary": _boolean("", default=True),
    "deepseek_timeout": _integer(10, 60, default=30, description="Seconds in all."),
    "seed": _or_null(_integer(0, 2**63 - 1)),
    "details": _boolean("Adds `details` to the record."),
}

_ERROR_RECORD: Schema = {
    "generated_text": {"const": ""},
    "error": _text("What to fix.", minLength=1),
    "model": _text(),
    "handler": {"const": HANDLER_NAME},
    "success": {"const": False},
}

_MESSAGE_FIELDS: Schema = {
    "role": {"enum": ["system", "developer", "user", "assistant"]},
    "name": _text(),
    "content": {
        "anyOf": [
            _text(),
            {
                "type": "array",
                "items": {"anyOf": [ref("TextPart"), ref("ImagePart")]},
            },
        ]
    },
}
_EMPTY: Schema = {
    "anyOf": [
        {"type": "null"},
        {"const": ""},
        {"type": "array", "maxItems": 0},
        {"type": "object", "maxProperties": 0},
    ]
}

SCHEMAS: Schema = {
    "Parameters": _object(
        PARAMETERS,
        description="Numbers and booleans may be given as strings too. Defaults: generation_config.json.",
    ),
    "Question": _text("A text-only question.", minLength=1),
    "QuestionWithImage": _object(
        {
            "query": _text("Aliases: `text`, `prompt`. " + f"Default with an image: {DEFAULT_QUESTION}", minLength=1),
            "text": _text(minLength=1),
            "prompt": _text(minLength=1),
            "image": _IMAGE,
            "image_url": _IMAGE,
            "image_base64": _IMAGE,
        },
        description="One question, one image, or both, each under one of its names.",
    ),
    "Chat": _object(
        {"messages": {"type": "array", "items": ref("Message"), "minItems": 1}},
        required=("messages",),
        description="Alternating turns, the last one the user's; at most one image.",
    ),
    "TextPart": _object({"type": {"const": "text"}, "text": _text()}, required=("type", "text"), more=True),
    "ImagePart": _object(
        {
            "type": {"const": "image_url"},
            "image_url": {"anyOf": [_IMAGE, _object({"url": _IMAGE, "detail": _text()}, required=("url",), more=True)]},
        },
        required=("type", "image_url"),
        more=True,
    ),
    "Message": _object(
        _MESSAGE_FIELDS | dict.fromkeys(sorted(EMPTY_IN_MESSAGES), _EMPTY),
        required=("role", "content"),
        description="A message; an answer may be sent back as it came.",
    ),
    "Input": {"anyOf": [ref("Question"), ref("QuestionWithImage"), ref("Chat")]},
    "NativeRequest": _object(
        {
            "inputs": {
                "anyOf": [ref("Input"), {"type": "array", "items": ref("Input"), "minItems": 1, "maxItems": MAX_BATCH}]
            },
            "parameters": _or_null(ref("Parameters")),
            "stream": _or_null(_boolean("Server-Sent Events instead of records; one input.")),
            "options": {"description": "Accepted, without effect."},
        },
        required=("inputs",),
    ),
    "Details": _object(
        {
            "finish_reason": {"enum": ["stop", "eos", "length"]},
            "prompt_tokens": _integer(1),
            "image_tokens": _integer(0),
            "generated_tokens": _integer(1),
            "seed": _or_null(_integer(0)),
            "timings": {
                "type": "object",
                "additionalProperties": {"type": "number", "minimum": 0},
                "description": "Seconds.",
            },
            "engine": _text(),
            "model_revision": _text(),
        },
        required=("finish_reason", "prompt_tokens", "image_tokens", "generated_tokens", "seed", "timings"),
    ),
    "CommentaryWarning": _object(
        {"rule": _text(), "severity": {"enum": ["critical", "warning"]}, "detail": _text()},
        required=("rule", "severity", "detail"),
    ),
    "AnswerRecord": _object(
        {
            "generated_text": _text("The model's own text."),
            "model": _text(f"{DEFAULT_MODEL_NAME}, or the name in the checkpoint's config.json."),
            "processing_method": {"const": PROCESSING_METHOD},
            "comment_text": _text("The Turkish commentary; empty where there is none."),
            "commentary_model": _text(),
            "commentary_tokens": _integer(0),
            "commentary_status": {"enum": list(get_args(CommentaryStatus))},
            "commentary_error": _text("With the status `failed`."),
            "commentary_warnings": {"type": "array", "items": ref("CommentaryWarning")},
            "details": ref("Details"),
        },
        required=("generated_text", "model", "processing_method"),
    ),
    "ErrorRecord": _object(_ERROR_RECORD, required=tuple(_ERROR_RECORD)),
    "Records": {
        "type": "array",
        "items": {"anyOf": [ref("AnswerRecord"), ref("ErrorRecord")]},
        "minItems": 1,
        "maxItems": MAX_BATCH,
    },
    "ErrorRecords": {"type": "array", "items": ref("ErrorRecord"), "minItems": 1, "maxItems": MAX_BATCH},
    "ErrorEvent": _object({**_ERROR_RECORD, "status": _integer(400, 599)}, required=(*_ERROR_RECORD, "status")),
    "NativeEvent": {
        "description": "One event.",
        "anyOf": [
            _event(_object({"id": _text(), "model": _text()}, required=("id", "model")), "start"),
            _event(_object({"text": _text(minLength=1)}, required=("text",)), "text"),
            _event(ref("AnswerRecord"), "answer"),
            _event(ref("AnswerRecord"), "record"),
            _event(ref("ErrorEvent"), "error"),
        ],
    },
    "Error": _object({"error": _text(minLength=1)}, required=("error",)),
    "Health": _object({"status": {"enum": ["loading", "ok", "draining", "stopped"]}}, required=("status",)),
    "Readiness": _object(
        {
            "ready": {"type": "boolean"},
            "running": _integer(0, description="Answers that are being generated."),
            "waiting": _integer(0, description="Requests that wait, or whose image is on its way."),
            "max_concurrent_requests": _integer(1),
            "max_queued_requests": _integer(0),
        },
        required=("ready", "running", "waiting", "max_concurrent_requests", "max_queued_requests"),
    ),
}

# --- OpenAI's

_CHOICE_END = {"enum": ["stop", "length"]}


def _completion(kind: str) -> Schema:
    return {
        "id": _text(pattern="^chatcmpl-"),
        "object": {"const": kind},
        "created": _integer(0),
        "model": _text(),
        "system_fingerprint": {"type": "null"},
    }


SCHEMAS |= {
    "ChatCompletionRequest": _object(
        {
            "model": _or_null(_text("A name of /v1/models; may be left out.")),
            "messages": {"type": "array", "items": ref("Message"), "minItems": 1},
            "max_tokens": _or_null(_integer(1, description=f"More than {MOST_TOKENS} counts as {MOST_TOKENS}.")),
            "max_completion_tokens": _or_null(_integer(1, description="The same; it is the one that counts.")),
            "temperature": _or_null(
                _number(0, 2.0, description=f"0 means greedy; less than {LEAST} counts as {LEAST}.")
            ),
            "top_p": _or_null(_number(0, 1.0, description=f"Less than {LEAST} counts as {LEAST}.")),
            "stop": _or_null(_STOP),
            "seed": _or_null(_integer(-(2**63), 2**63 - 1)),
            "stream": _or_null(_boolean("Chunks as Server-Sent Events, `[DONE]` at their end.")),
            "stream_options": _or_null(
                _object(
                    {
                        "include_usage": _or_null(_boolean("A last chunk with `usage`.")),
                        "include_obfuscation": {"description": "Accepted, without effect."},
                    },
                    description="With `stream` alone.",
                )
            ),
            "n": _or_null({"const": 1}),
            "top_k": _or_null(_integer(-1, 2**31, description="Ours; 0 and -1 are off.")),
            "repetition_penalty": _or_null(_number(1.0, 2.0, description="Ours.")),
            "turkish_commentary": _or_null(_boolean("Ours: adds `turkish_commentary` to the completion.")),
            "deepseek_timeout": _or_null(_integer(10, 60, description="Ours: seconds for the commentary.")),
        },
        required=("messages",),
        more=True,
        description=(
            "Further fields of OpenAI's are accepted where they have no effect here (user, metadata, store, …) or ask "
            "for nothing (tools: [], presence_penalty: 0, …), and refused where they would change the answer."
        ),
    ),
    "Usage": _object(
        {"prompt_tokens": _integer(1), "completion_tokens": _integer(1), "total_tokens": _integer(2)},
        required=("prompt_tokens", "completion_tokens", "total_tokens"),
    ),
    "TurkishCommentary": _object(
        {
            name: SCHEMAS["AnswerRecord"]["properties"][name]
            for name in SCHEMAS["AnswerRecord"]["properties"]
            if "comment" in name
        },
        required=("comment_text", "commentary_model", "commentary_tokens", "commentary_status"),
    ),
    "ChatCompletion": _object(
        {
            **_completion("chat.completion"),
            "choices": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": _object(
                    {
                        "index": {"const": 0},
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _text(), "refusal": {"type": "null"}},
                            required=("role", "content", "refusal"),
                        ),
                        "logprobs": {"type": "null"},
                        "finish_reason": _CHOICE_END,
                    },
                    required=("index", "message", "finish_reason"),
                ),
            },
            "usage": ref("Usage"),
            "turkish_commentary": ref("TurkishCommentary"),
        },
        required=("id", "object", "created", "model", "choices", "usage"),
    ),
    "ChatCompletionChunk": _object(
        {
            **_completion("chat.completion.chunk"),
            "choices": {
                "type": "array",
                "maxItems": 1,
                "items": _object(
                    {
                        "index": {"const": 0},
                        "delta": _object(
                            {"role": {"const": "assistant"}, "content": _text(), "refusal": {"type": "null"}}
                        ),
                        "logprobs": {"type": "null"},
                        "finish_reason": _or_null(_CHOICE_END),
                    },
                    required=("index", "delta", "finish_reason"),
                ),
            },
            "usage": _or_null(ref("Usage")),
            "turkish_commentary": ref("TurkishCommentary"),
        },
        required=("id", "object", "created", "model", "choices"),
    ),
    "ChatEvent": {
        "description": "One event.",
        "anyOf": [
            _object({"data": {"const": "[DONE]"}}, required=("data",)),
            _event({"anyOf": [ref("ChatCompletionChunk"), ref("OpenAIError")]}),
        ],
    },
    "Model": _object(
        {
            "id": _text(),
            "object": {"const": "model"},
            "created": _integer(0),
            "owned_by": _text(),
        },
        required=("id", "object", "created", "owned_by"),
    ),
    "ModelList": _object(
        {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}, required=("object", "data")
    ),
    "OpenAIError": _object(
        {
            "error": _object(
                {
                    "message": _text(minLength=1),
                    "type": _text(),
                    "param": _or_null(_text()),
                    "code": _or_null(_text()),
                },
                required=("message", "type", "param", "code"),
            )
        },
        required=("error",),
    ),
}
