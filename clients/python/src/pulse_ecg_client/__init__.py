"""Client of a PULSE-7B endpoint, which reads ECG images, in Hugging Face's stock container or on its own server."""

from pulse_ecg_client._blocking import PULSEEndpoint
from pulse_ecg_client._client import AsyncPULSEEndpoint
from pulse_ecg_client._errors import (
    AuthenticationError,
    BusyError,
    DeadlineError,
    EndpointConnectionError,
    ImageError,
    PULSEError,
    ReplyError,
    RequestRefusedError,
    ServerError,
    StatusError,
    UnavailableError,
)
from pulse_ecg_client._images import MAX_IMAGE_BYTES, image_part
from pulse_ecg_client._types import (
    AnswerEvent,
    Chat,
    CommonParameters,
    Image,
    Input,
    Parameters,
    Question,
    Record,
    RecordEvent,
    StartEvent,
    StreamEvent,
    TextEvent,
)

__version__ = "0.1.0"

__all__ = [
    "MAX_IMAGE_BYTES",
    "AnswerEvent",
    "AsyncPULSEEndpoint",
    "AuthenticationError",
    "BusyError",
    "Chat",
    "CommonParameters",
    "DeadlineError",
    "EndpointConnectionError",
    "Image",
    "ImageError",
    "Input",
    "PULSEEndpoint",
    "PULSEError",
    "Parameters",
    "Question",
    "Record",
    "RecordEvent",
    "ReplyError",
    "RequestRefusedError",
    "ServerError",
    "StartEvent",
    "StatusError",
    "StreamEvent",
    "TextEvent",
    "UnavailableError",
    "image_part",
]
