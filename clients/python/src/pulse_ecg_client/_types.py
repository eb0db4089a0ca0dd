"""What goes in and what comes out: inputs, parameters, records and the events of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    # A path, the bytes of an image file, a URL or data URI, or (where Pillow is installed) its image object.
    Image: TypeAlias = "str | PathLike[str] | bytes | bytearray | memoryview | PILImage"
else:
    Image = Any


class CommonParameters(TypedDict, total=False):
    """Parameters that every method takes by keyword; what is not given is left to the endpoint's defaults."""

    top_p: float
    top_k: int
    do_sample: bool
    repetition_penalty: float
    stop: str | Sequence[str]
    return_full_text: bool
    deepseek_timeout: int
    seed: int
    details: bool


class Parameters(CommonParameters, total=False):
    """Every parameter of a request."""

    max_new_tokens: int
    temperature: float
    enable_turkish_commentary: bool


class Question(TypedDict, total=False):
    """A question, an image, or both."""

    query: str
    image: Image


class Chat(TypedDict):
    """A conversation in OpenAI's content-part form; :func:`pulse_ecg_client.image_part` makes the image's part."""

    messages: Sequence[Mapping[str, Any]]


Input: TypeAlias = str | Question | Chat


class Record(TypedDict, total=False):
    """One answer.  An error record has ``error`` and ``success``; the commentary's fields come where it is on."""

    generated_text: str
    model: str
    processing_method: str
    comment_text: str
    commentary_model: str
    commentary_tokens: int
    commentary_status: Literal["success", "failed", "unavailable", "api_key_missing", "no_text"]
    commentary_error: str
    commentary_warnings: list[dict[str, Any]]
    details: dict[str, Any]
    error: str
    handler: str
    success: bool


@dataclass(frozen=True)
class StartEvent:
    """The request is accepted and its image decoded; ``id`` is empty where the endpoint does not stream."""

    id: str
    model: str
    type: Literal["start"] = field(default="start", init=False)


@dataclass(frozen=True)
class TextEvent:
    """A piece of the answer, never empty."""

    text: str
    type: Literal["text"] = field(default="text", init=False)


@dataclass(frozen=True)
class AnswerEvent:
    """The answer is complete; the commentary, if one is due, is not there yet."""

    record: Record
    type: Literal["answer"] = field(default="answer", init=False)


@dataclass(frozen=True)
class RecordEvent:
    """The whole record, as :meth:`analyze_text` would have returned it; the last event."""

    record: Record
    type: Literal["record"] = field(default="record", init=False)


StreamEvent: TypeAlias = StartEvent | TextEvent | AnswerEvent | RecordEvent
