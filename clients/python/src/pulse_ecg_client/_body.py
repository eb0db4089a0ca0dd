"""The JSON body of a request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pulse_ecg_client._images import image_source
from pulse_ecg_client._types import CommonParameters, Input, Parameters


def text_parameters(
    max_new_tokens: int, temperature: float, enable_turkish_commentary: bool, more: CommonParameters
) -> Parameters:
    """What a question without an image is sent with, unless ``more`` says otherwise."""
    parameters: Parameters = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 0.95,
        "do_sample": True,
        "enable_turkish_commentary": enable_turkish_commentary,
    }
    return cast(Parameters, {**parameters, **more})


def image_parameters(
    max_new_tokens: int, temperature: float, enable_turkish_commentary: bool, more: CommonParameters
) -> Parameters:
    """What a question about an image is sent with, unless ``more`` says otherwise."""
    parameters: Parameters = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
        "enable_turkish_commentary": enable_turkish_commentary,
        "deepseek_timeout": 30,
    }
    return cast(Parameters, {**parameters, **more})


def checked(parameters: Mapping[str, object]) -> dict[str, object]:
    """The parameters that are given, without those that are None.

    Raises:
        TypeError: a name that is no parameter, as for any function.
    """
    for name in parameters:
        if name not in Parameters.__annotations__:
            raise TypeError(f"Unknown parameter {name!r}; known: {', '.join(sorted(Parameters.__annotations__))}.")
    return {name: value for name, value in parameters.items() if value is not None}


def encoded(inputs: Input | Sequence[Input], parameters: Mapping[str, object], *, stream: bool = False) -> bytes:
    """The body, images read and encoded; blocks while files are read.

    Raises:
        ImageError, OSError: as :func:`image_source`.
        TypeError, ValueError: something that JSON cannot hold.
    """
    is_batch = isinstance(inputs, Sequence) and not isinstance(inputs, str)
    plain = [_plain(item) for item in inputs] if is_batch else _plain(cast(Input, inputs))
    body: dict[str, object] = {"inputs": plain}
    if parameters:
        body["parameters"] = dict(parameters)
    if stream:
        body["stream"] = True
    return json.dumps(body, allow_nan=False).encode()


def _plain(item: Any) -> object:
    """One input with its image as a string."""
    if isinstance(item, Mapping) and "image" in item:
        return {**item, "image": image_source(item["image"])}
    return item
