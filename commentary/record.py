"""What a commentary is, and the record fields that callers see."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

CommentaryStatus = Literal["success", "failed", "unavailable", "api_key_missing", "no_text"]
Severity = Literal["critical", "warning"]


@dataclass(frozen=True)
class Finding:
    """One departure of the Turkish text from the English one.

    ``rule`` is the check's name, safe for logs and metrics; ``detail`` names terms, leads and numbers of the
    answer and is for the caller alone.
    """

    rule: str
    severity: Severity
    detail: str


@dataclass(frozen=True)
class Commentary:
    """The outcome of asking for a commentary; a failure is a value, never an exception.

    ``tokens`` is the service's own count for the answer that was judged (0 where it gave none);
    ``tokens_spent`` adds up every answer of the call, for the operator's metrics.
    """

    status: CommentaryStatus
    text: str = ""
    model: str = ""
    tokens: int = 0
    error: str = ""
    warnings: tuple[Finding, ...] = ()
    tokens_spent: int = 0

    @classmethod
    def unavailable(cls, model: str = "") -> Commentary:
        """For a host that could not load the client."""
        return cls(status="unavailable", model=model)

    def record_fields(self) -> dict[str, Any]:
        """The fields that this commentary adds to a response record."""
        fields: dict[str, Any] = {
            "comment_text": self.text,
            "commentary_model": self.model,
            "commentary_tokens": self.tokens,
            "commentary_status": self.status,
        }
        if self.status == "failed":
            fields["commentary_error"] = self.error
        if self.warnings:
            fields["commentary_warnings"] = [asdict(finding) for finding in self.warnings]
        return fields
