"""What passes between the handler and its host: how a request is to be answered, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pulse_ecg.cancellation import Cancellation
from pulse_ecg.errors import PulseError

Record = dict[str, Any]

DEFAULT_MODEL_NAME = "PULSE-7B"
HANDLER_NAME = "Ubden® Team Enhanced Handler"
PROCESSING_METHOD = "pipeline"


@dataclass(frozen=True)
class Started:
    """The request is accepted and its image decoded; ``model`` is about to answer."""

    model: str


@dataclass(frozen=True)
class TextPiece:
    """The next piece of the English answer, never empty."""

    text: str = field(repr=False)


@dataclass(frozen=True)
class Answered:
    """The English answer is complete: the record as far as it is known before the commentary."""

    record: Record = field(repr=False)


Progress = Started | TextPiece | Answered


def unheard(_progress: Progress) -> None:
    """For a host that waits for the record alone."""


@dataclass(frozen=True)
class Call:
    """How one request is to be answered.  The defaults are a caller who waits as long as it takes."""

    request_id: str | None = None
    """Its name in logs and error messages; one is made up where there is none."""
    cancel: Cancellation = field(default_factory=Cancellation)
    """Set it when nobody waits for the answer any more."""
    deadline: float | None = None
    """A reading of ``time.monotonic()`` after which no further token is computed."""
    listen: Callable[[Progress], object] = unheard
    """Is told each step of each answer, in the thread that computes it: it must be quick and must not raise."""


@dataclass(frozen=True)
class Outcome:
    """What came of one input: its record, the HTTP status that goes with it, and the error if there was one."""

    record: Record = field(repr=False)
    status: int = 200
    error: PulseError | None = None


def error_outcome(error: PulseError, model: str = DEFAULT_MODEL_NAME) -> Outcome:
    """The contract's error record, and the error's own status."""
    record: Record = {
        "generated_text": "",
        "error": str(error),
        "model": model,
        "handler": HANDLER_NAME,
        "success": False,
    }
    return Outcome(record, error.status, error)
