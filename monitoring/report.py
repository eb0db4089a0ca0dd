"""What is kept of a request: where it came from, how large, how long, how it ended.  Never what it said."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMS = ("text", "object", "chat", "image", "unknown")
IMAGE_SOURCES = ("none", "url", "data_uri", "base64", "raw", "pil")
OUTCOMES = ("ok", "malformed", "invalid", "too_large", "busy", "unavailable", "timeout", "cancelled", "fault")
COMMENTARY_STATUSES = ("success", "failed", "unavailable", "api_key_missing", "no_text", "off")
FINISH_REASONS = ("stop", "eos", "length")
STAGES = ("queue", "fetch", "decode", "preprocess", "vision", "prefill", "token", "commentary", "total")
OTHER = "other"

_OUTCOME_BY_STATUS = {
    200: "ok",
    400: "malformed",
    408: "timeout",
    413: "too_large",
    422: "invalid",
    429: "busy",
    499: "cancelled",
    503: "unavailable",
    504: "timeout",
}
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SAFE_REVISION = re.compile(r"[A-Za-z0-9._/@-]{1,100}")


def new_request_id(given: str | None = None) -> str:
    """The caller's id where it is a short plain word, else a fresh one."""
    return given if given and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex[:16]


def outcome_of(status: int) -> str:
    """The outcome's name for the HTTP status that an error or answer carries."""
    return _OUTCOME_BY_STATUS.get(status, "malformed" if 400 <= status < 500 else "fault")


def known(value: str, accepted: tuple[str, ...]) -> str:
    """The value, or "other": a label never grows with what callers send, and a log never quotes it."""
    return value if value in accepted else OTHER


@dataclass
class RequestReport:
    """Filled while a request is worked on, handed to :meth:`PerformanceMonitor.finish` at its end.

    ``timings_s`` holds seconds by stage (``STAGES``; "token" is the mean per generated token), sizes are bytes,
    pixels and tokens.  There is no field for a question, an answer, a URL or a file name.
    """

    request_id: str = field(default_factory=new_request_id)
    form: str = "unknown"
    image_source: str = "none"
    outcome: str = "fault"
    commentary_status: str = "off"
    finish_reason: str = ""
    model_revision: str = ""
    engine: str = ""
    image_bytes: int = 0
    image_width: int = 0
    image_height: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    generated_tokens: int = 0
    commentary_tokens: int = 0
    batch_size: int = 1
    timings_s: dict[str, float] = field(default_factory=dict)

    def log_line(self) -> str:
        """One line of JSON; zero sizes and empty words are left out."""
        entry: dict[str, Any] = {
            "event": "request",
            "request_id": new_request_id(self.request_id),
            "form": known(self.form, FORMS),
            "image": known(self.image_source, IMAGE_SOURCES),
            "outcome": known(self.outcome, OUTCOMES),
            "commentary": known(self.commentary_status, COMMENTARY_STATUSES),
        }
        words: Mapping[str, str] = {
            "finish_reason": known(self.finish_reason, FINISH_REASONS) if self.finish_reason else "",
            "model_revision": _plain_word(self.model_revision),
            "engine": _plain_word(self.engine),
        }
        sizes = ("image_bytes", "image_width", "image_height", "prompt_tokens", "image_tokens", "generated_tokens")
        entry |= {name: word for name, word in words.items() if word}
        entry |= {name: size for name in (*sizes, "commentary_tokens") if (size := int(getattr(self, name)))}
        entry["batch_size"] = int(self.batch_size)
        entry["seconds"] = {known(stage, STAGES): round(float(s), 6) for stage, s in self.timings_s.items()}
        return json.dumps(entry, separators=(",", ":"))


def _plain_word(word: str) -> str:
    if not word:
        return ""
    return word if _SAFE_REVISION.fullmatch(word) else OTHER
