"""When to ask again, and after how long."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

# The endpoint did not begin to answer: it is busy (429), has no replica yet, or sleeps (502, 503).
RETRIED_STATUSES = frozenset({429, 502, 503})
# A host that is not there so many times in a row is a wrong URL or a broken network, not a sleeping endpoint.
MOST_CONNECTION_ATTEMPTS = 4

_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 15.0


def delay_s(attempt: int, retry_after: float | None) -> float:
    """Seconds to wait after the ``attempt``-th failure (from 1): what the server asked for, or twice as long each time.

    Both are spread at random, so that many clients do not come back at the same instant.
    """
    if retry_after:
        return retry_after * random.uniform(1.0, 1.25)  # noqa: S311 - no secret
    longest = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(attempt - 1, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The header ``Retry-After`` (RFC 9110, 10.2.3) in seconds from now; None where there is none that can be read."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None
