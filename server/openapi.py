"""The OpenAPI 3.1 description of every route; the tests hold the server's answers against it."""

from __future__ import annotations

from typing import Any

from server.body import MAX_BODY_BYTES
from server.schemas import PARAMETERS, SCHEMAS, ref

Json = dict[str, Any]

_WHY = {
    400: "Malformed.",
    401: "The token is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "More was sent than is accepted.",
    422: "A value or an image cannot be used.",
    429: "As many requests wait as may.",
    500: "A fault of ours.",
    503: "The model is being loaded, the server is shutting down, or the device has no memory left now.",
    504: "The request ran out of time.",
}
_RETRY_AFTER: Json = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
_REQUEST_ID: Json = {
    "X-Request-Id": {
        "description": "The request's name in the server's log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    }
}
_REQUEST_ID_PARAMETER: Json = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "1 to 64 of A-Z, a-z, 0-9, dot, underscore and hyphen; anything else is ignored.",
    "schema": {"type": "string"},
}
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/bmp", "image/webp", "image/tiff")

_NATIVE_EVENTS = """\
With `stream`: Server-Sent Events, each with one line of JSON in `data`.

- `start`: `{"id", "model"}`, once the request is accepted and its image decoded
- `text`: `{"text"}`, pieces that joined are the answer
- `answer`: the record without its commentary
- `record`: the whole record; the last event
- `error`: the error record and `status`; the last event of an answer that failed

Comment lines (`: keep-alive`) come every 15 seconds while there is nothing to tell."""
_CHAT_EVENTS = """\
With `stream`: `chat.completion.chunk` objects as OpenAI's, `[DONE]` at the end. With `stream_options.include_usage` \
a chunk without choices holds `usage`; with `turkish_commentary` another holds the commentary. An error in mid-answer \
comes as `{"error": …}` in a chunk's place."""


def document(*, token: bool) -> Json:
    """The description; ``token`` says whether callers must send one."""
    paths: Json = {
        "/": {"post": _native("answer", token=token)},
        "/predict": {"post": _native("predict", token=token)},
        "/v1/chat/completions": {"post": _chat(token=token)},
        "/v1/models": {"get": _read("models", "The model's name", "ModelList", "OpenAIError", 503, token=token)},
        "/v1/models/{name}": {"get": _model(token=token)},
        "/health": {"get": _read("health", "Whether the model answers", "Health", "Health", 503, token=False)},
        "/ready": {
            "get": _read("ready", "Whether one more request is accepted", "Readiness", "Readiness", 503, token=token)
        },
        "/metrics": {"get": _metrics(token=token)},
        "/openapi.json": {"get": _read("openapi", "This description", "", "", token=token)},
    }
    components: Json = {"schemas": SCHEMAS}
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "PULSE-7B",
            "version": "1",
            "description": "Reads images of 12-lead ECGs. For research and education only; it is no medical device.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": components,
    }


def _native(name: str, *, token: bool) -> Json:
    query = [
        {"name": parameter, "in": "query", "required": False, "schema": schema}
        for parameter, schema in PARAMETERS.items()
        if parameter != "stop"
    ]
    bodies: Json = {"application/json": {"schema": ref("NativeRequest")}}
    bodies |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _IMAGE_TYPES}
    return {
        "operationId": name,
        "summary": "Answer a question about an ECG",
        "description": (
            "The body is JSON, or the file of an image, which gets the default question. Query parameters are "
            "`parameters` where the body has none."
        ),
        "parameters": [_REQUEST_ID_PARAMETER, *query],
        "requestBody": {"required": True, "description": f"At most {MAX_BODY_BYTES:,} bytes.", "content": bodies},
        "responses": _answered("Records", "NativeEvent", _NATIVE_EVENTS) | _errors("ErrorRecords", 422, token=token),
        **_security(token),
    }


def _chat(*, token: bool) -> Json:
    return {
        "operationId": "createChatCompletion",
        "summary": "OpenAI's chat completion",
        "parameters": [_REQUEST_ID_PARAMETER],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref("ChatCompletionRequest")}},
        },
        "responses": _answered("ChatCompletion", "ChatEvent", _CHAT_EVENTS) | _errors("OpenAIError", 404, token=token),
        **_security(token),
    }


def _model(*, token: bool) -> Json:
    read = _read("model", "The model by its name", "Model", "OpenAIError", 404, 503, token=token)
    path = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {**read, "parameters": [path]}


def _metrics(*, token: bool) -> Json:
    read = _read("metrics", "Prometheus' text format", "", "", token=token)
    read["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return read


def _read(name: str, summary: str, schema: str, error: str, *statuses: int, token: bool) -> Json:
    """A GET with one JSON answer, ``error`` for ``statuses``."""
    content = {"application/json": {"schema": ref(schema) if schema else {"type": "object"}}}
    responses: Json = {"200": {"description": summary + ".", "headers": _REQUEST_ID, "content": content}}
    responses |= {str(status): _failed(status, error) for status in statuses}
    if token:
        responses["401"] = _failed(401, "OpenAIError" if error == "OpenAIError" else "Error")
    return {"operationId": name, "summary": summary, "responses": responses, **_security(token)}


def _answered(schema: str, event: str, events: str) -> Json:
    content = {
        "application/json": {"schema": ref(schema)},
        "text/event-stream": {"schema": ref(event)},
    }
    return {"200": {"description": events, "headers": _REQUEST_ID, "content": content}}


def _errors(schema: str, *more: int, token: bool) -> Json:
    statuses = sorted({400, 408, 413, 429, 500, 503, 504, *more, *([401] if token else [])})
    return {str(status): _failed(status, schema) for status in statuses}


def _failed(status: int, schema: str) -> Json:
    headers = _REQUEST_ID | (_RETRY_AFTER if status in (429, 503) else {})
    content = {"application/json": {"schema": ref(schema)}}
    return {"description": _WHY[status], "headers": headers, "content": content}


def _security(token: bool) -> Json:
    return {"security": [{"token": []}]} if token else {}
