"""Every error that this project raises on purpose.

::

    PulseError                        500  a fault of ours
    ├── ConfigurationError            500  an environment variable stops the start
    ├── CheckpointError               500  the checkpoint stops the start
    ├── RequestError                  400  the request is malformed
    │   ├── ParameterError            422  a parameter is unknown, of a wrong type or out of range
    │   ├── PromptTooLongError        422  prompt and image leave no position for an answer
    │   ├── PayloadTooLargeError      413  more was sent than is accepted
    │   └── ImageError                422  the image cannot be used
    │       ├── ImageDecodeError      422  the bytes are no image of a listed format
    │       ├── ImageTooLargeError    413  too many bytes or pixels
    │       └── ImageFetchError       422  the URL gave no image
    │           ├── ImageUrlRefusedError    422  policy forbids the URL
    │           └── ImageFetchTimeoutError  422  the image's host was too slow
    ├── QueueFullError                429  more requests wait than are accepted
    ├── ModelLoadingError             503  the model is not ready yet
    ├── DeadlineExceededError         504  the request ran out of time
    ├── RequestCancelledError         499  the caller hung up; nobody reads this
    ├── OutOfMemoryError              503  the device has no room for the request now
    └── EngineStoppedError            503  the engine has ended and answers nothing more

A message is written for the caller: it says what to fix and never holds a key, a path, a resolved
address, an object's repr, a traceback, or more than a few characters of what the caller sent
(:func:`excerpt`).  ``status`` is the HTTP status that a server of ours answers with.
"""

from __future__ import annotations

import difflib
import math
import traceback
from collections.abc import Iterable
from pathlib import Path


class PulseError(Exception):
    """Base of the tree; ``str(error)`` is safe to show to the caller."""

    status = 500


class ConfigurationError(PulseError):
    """An environment variable has a value that cannot be used; the message names the variable."""


class CheckpointError(PulseError):
    """The checkpoint is incomplete, inconsistent or of another kind; the message names the tensor or file."""


class RequestError(PulseError):
    """The request is malformed."""

    status = 400


class ParameterError(RequestError):
    """A parameter is unknown, of a wrong type or out of range; the message names it and what is accepted."""

    status = 422


class PromptTooLongError(RequestError):
    """Prompt and image leave no position for an answer; the message says how many tokens there are."""

    status = 422


class PayloadTooLargeError(RequestError):
    """More was sent than is accepted."""

    status = 413


class ImageError(RequestError):
    """The image cannot be used."""

    status = 422


class ImageDecodeError(ImageError):
    """The bytes are not a complete image of a listed format."""


class ImageTooLargeError(ImageError):
    """The image has too many bytes or too many pixels."""

    status = 413


class ImageFetchError(ImageError):
    """The image URL gave no image."""


class ImageUrlRefusedError(ImageFetchError):
    """The image URL is one that the fetching policy forbids."""


class ImageFetchTimeoutError(ImageFetchError):
    """The image's host was too slow."""


class QueueFullError(PulseError):
    """More requests wait than are accepted."""

    status = 429


class ModelLoadingError(PulseError):
    """The model is not ready yet."""

    status = 503


class DeadlineExceededError(PulseError):
    """The request ran out of time."""

    status = 504


class RequestCancelledError(PulseError):
    """The caller hung up (the status is the one that nginx logs for it) or the server gave the request up."""

    status = 499


class OutOfMemoryError(PulseError):
    """The device has no room for the request now."""

    status = 503


class EngineStoppedError(PulseError):
    """The engine did not start, or has ended and answers nothing more: its process has to be replaced."""

    status = 503


def excerpt(value: object, limit: int = 24) -> str:
    """A few printable characters of something that the caller sent, quoted, for use in a message.

    Strings and numbers are shown, cut to ``limit`` characters; anything else is named by its JSON type
    alone, so that no repr of an object can reach a message.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        # Written without str(): Python refuses to print integers of more than 4,300 digits.
        return str(value) if value.bit_length() <= 64 else "a very large number"
    if isinstance(value, float):
        short = f"{value:g}"
        return repr(value) if math.isfinite(value) and float(short) != value else short
    if isinstance(value, str):
        shown = "".join(c if c.isprintable() else "?" for c in value[:limit])
        return f"'{shown}…'" if len(value) > limit else f"'{shown}'"
    names: dict[type, str] = {dict: "an object", list: "a list", tuple: "a list", bytes: "bytes"}
    return names.get(type(value), "a value of another type")


def place_of(error: BaseException) -> str:
    """Type and place of a foreign error, for logs: its message can hold what the caller sent, a path or a key."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__} at {places}"


def nearest_hint(name: object, known: Iterable[str]) -> str:
    """`` Did you mean '…'?`` for a misspelt name, or nothing; ``topK`` is as near to ``top_k`` as a name can be."""
    if not isinstance(name, str):
        return ""
    plain = {_letters(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_letters(name[:64]), plain, n=1, cutoff=0.5)
    return f" Did you mean '{plain[close[0]]}'?" if close else ""


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
