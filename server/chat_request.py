"""OpenAI's chat completion request in the handler's own terms.

Fields that change nothing here are accepted, as every compatible server does; fields that would change the answer in a
way that this model cannot are refused, unless they hold the value that means "do not".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pulse_ecg.call import DEFAULT_MODEL_NAME
from pulse_ecg.errors import excerpt, nearest_hint
from pulse_ecg.params import MAX_STOP_STRINGS
from server.errors import ChatFieldError

MOST_TOKENS = 2048
# OpenAI's ranges of `temperature` and `top_p` begin at 0; what lies below this has the effect that this has.
LEAST = 0.01
# No model in particular: what Hugging Face's client sends to a server that has one ("tgi" before its version 1).
ANY_MODEL = frozenset({"", "dummy", "tgi"})

# Without effect: they name the caller or steer OpenAI's own machinery.
HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
HARMLESS |= {"prompt_cache_retention", "parallel_tool_calls"}

# Refused unless null or one of these values.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
READ = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed", "stream"}
    | {"stream_options", "top_k", "repetition_penalty", "turkish_commentary", "deepseek_timeout"}
)


@dataclass(frozen=True)
class ChatRequest:
    """The handler's ``data``, and how the completion is to be told."""

    data: dict[str, Any] = field(repr=False)
    stream: bool
    include_usage: bool
    commentary: bool


def chat_request(body: object, models: Collection[str]) -> ChatRequest:
    """A request for one of ``models`` (or for none in particular).

    Raises:
        ChatFieldError: a field is unknown, cannot be used, or asks for what this model cannot do; it names the field.
    """
    if not isinstance(body, Mapping):
        raise ChatFieldError(f"The body must be an object with 'messages', not {excerpt(body)}.")
    _refuse(body)
    given = {name: value for name, value in body.items() if value is not None}
    _check_model(given.get("model", ""), models)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ChatFieldError("'messages' must be a list of at least one message.", param="messages")
    parameters: dict[str, Any] = {"details": True}  # they hold the reason of the end and the usage
    if (tokens := _max_tokens(given)) is not None:
        parameters["max_new_tokens"] = tokens
    if "temperature" in given:
        temperature = _number(given, "temperature", 0.0, 2.0)
        parameters["temperature"] = temperature and max(temperature, LEAST)  # 0 is greedy
    if "top_p" in given:
        parameters["top_p"] = max(_number(given, "top_p", 0.0, 1.0), LEAST)
    if "repetition_penalty" in given:
        parameters["repetition_penalty"] = _number(given, "repetition_penalty", 1.0, 2.0)
    if "top_k" in given:
        parameters["top_k"] = max(0, _integer(given, "top_k", -1, 2**31))  # some clients say "off" as -1
    if "seed" in given:
        parameters["seed"] = _integer(given, "seed", -(2**63), 2**63 - 1) % 2**63
    if "stop" in given:
        parameters["stop"] = _stop(given["stop"])
    commentary = parameters["enable_turkish_commentary"] = _boolean(given, "turkish_commentary")
    if "deepseek_timeout" in given:
        parameters["deepseek_timeout"] = _integer(given, "deepseek_timeout", 10, 60)
    stream = _boolean(given, "stream")
    data = {"inputs": {"messages": messages}, "parameters": parameters}
    return ChatRequest(data, stream, _include_usage(given, stream=stream), commentary)


def _refuse(body: Mapping[object, object]) -> None:
    """Refuse what is unknown and what would be ignored at the caller's expense."""
    known = sorted(READ | HARMLESS | set(UNSUPPORTED))
    for name, value in body.items():
        if name in UNSUPPORTED:
            meaningless = UNSUPPORTED[str(name)]
            if value is not None and not any(_same(value, accepted) for accepted in meaningless):
                only = " or ".join(f"'{v}'" if isinstance(v, str) else json.dumps(v) for v in meaningless)
                accepted = f"; leave it out, or send {only}" if meaningless else "; leave it out"
                raise ChatFieldError(
                    f"'{name}' is not supported by this model{accepted}.", param=str(name), code="unsupported_parameter"
                )
        elif name not in READ and name not in HARMLESS:
            hint = nearest_hint(name, known)
            raise ChatFieldError(
                f"Unknown field {excerpt(name)}.{hint}",
                param=name if isinstance(name, str) and name.isidentifier() and len(name) <= 64 else None,
                code="unknown_parameter",
            )


def _same(value: object, accepted: object) -> bool:
    """Equality as JSON has it: true is not 1."""
    return value == accepted and isinstance(value, bool) == isinstance(accepted, bool)


def is_name(name: str, models: Collection[str]) -> bool:
    """Whether it is one of the model's names, or that of the model that this project serves."""
    return name.lower() in {model.lower() for model in (*models, DEFAULT_MODEL_NAME)}


def _check_model(name: object, models: Collection[str]) -> None:
    if not isinstance(name, str):
        raise ChatFieldError(f"'model' is {excerpt(name)}; accepted: a string.", param="model")
    if name.lower() not in ANY_MODEL and not is_name(name, models):
        raise ChatFieldError(
            f"The model {excerpt(name, 40)} does not exist; this server has '{next(iter(models))}'.",
            param="model",
            code="model_not_found",
            status=404,
        )


def _max_tokens(given: Mapping[object, object]) -> int | None:
    """The newer name before the older one.  OpenAI's models allow more than ours: more is cut, not refused."""
    asked = [_integer(given, name, 1, 2**63 - 1) for name in ("max_completion_tokens", "max_tokens") if name in given]
    return min(asked[0], MOST_TOKENS) if asked else None


def _include_usage(given: Mapping[object, object], *, stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, Mapping):
        raise ChatFieldError(f"'stream_options' is {excerpt(options)}; accepted: an object.", param="stream_options")
    if not stream:
        raise ChatFieldError("'stream_options' is accepted with 'stream' alone.", param="stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise ChatFieldError(
                f"'stream_options' has the unknown field {excerpt(name)}; accepted: include_usage.",
                param="stream_options",
            )
    return _boolean({name: value for name, value in options.items() if value is not None}, "include_usage")


def _integer(given: Mapping[object, object], name: str, low: int, high: int) -> int:
    value = given[name]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # JSON has one kind of number
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        bounds = f"from {low} to {high}" if high < 2**31 else f"of at least {low}"
        bounds = "of 64 bits" if low < -1 else bounds
        raise ChatFieldError(f"'{name}' is {excerpt(value)}; accepted: a whole number {bounds}.", param=name)
    return value


def _number(given: Mapping[object, object], name: str, low: float, high: float) -> float:
    value = given[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ChatFieldError(f"'{name}' is {excerpt(value)}; accepted: a number from {low} to {high}.", param=name)
    return float(value)


def _boolean(given: Mapping[object, object], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ChatFieldError(f"'{name}' is {excerpt(value)}; accepted: true or false.", param=name)
    return value


def _stop(value: object) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    wanted = f"a string or a list of at most {MAX_STOP_STRINGS} strings, none empty"
    if not isinstance(strings, list) or len(strings) > MAX_STOP_STRINGS:
        raise ChatFieldError(f"'stop' is {excerpt(value)}; accepted: {wanted}.", param="stop")
    if any(not isinstance(string, str) or not string for string in strings):
        raise ChatFieldError(f"'stop' holds something else than strings; accepted: {wanted}.", param="stop")
    return strings
