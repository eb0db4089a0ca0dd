"""Where the server's log lines go.  None holds what a caller sent: no query string, no path that is not a route's."""

from __future__ import annotations

import logging

logger = logging.getLogger("pulse.server")

OURS = ("pulse", "pulse_ecg", "commentary", "monitoring")
_TALKATIVE = ("httpx", "httpx2")  # the hub's and the commentary's clients: they log whole URLs, signatures included


def configure(level: str) -> None:
    """Log to stderr.  ``debug`` is for this project's own loggers: Pillow's, for one, writes images' metadata there."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    chosen = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(chosen, logging.INFO))
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(chosen, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(chosen)
