"""What the service answered, or why it did not; apart from the network so that both are known without ``openai``."""

from __future__ import annotations

from dataclasses import dataclass


class ServiceError(Exception):
    """The service gave no answer; ``str(error)`` is safe to show.  ``retry_after_s`` is what it asked to wait."""

    def __init__(self, reason: str, *, retryable: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retryable = retryable
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Reply:
    """The service's answer; ``tokens`` and ``model`` are its own statements."""

    text: str
    model: str
    tokens: int
    cut_off: bool
