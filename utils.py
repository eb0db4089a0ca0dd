"""What the handler needs beside the model: the Turkish commentary and the monitor.  Imports no torch.

The stock container makes ``utils`` a global module name; the substance lives in ``commentary`` and ``monitoring``.
"""

from __future__ import annotations

from commentary.client import DeepSeekClient
from commentary.record import Commentary
from monitoring.performance import PerformanceMonitor
from monitoring.report import RequestReport, new_request_id, outcome_of

__all__ = ["Commentary", "DeepSeekClient", "PerformanceMonitor", "RequestReport", "new_request_id", "outcome_of"]
