"""PULSE-7B's own config, tokenizer and weight index, for tests that can use them where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(os.environ.get("PULSE_REFERENCE_DIR", Path(__file__).parents[2] / "shared" / "pulse-7b"))
"""A folder with the checkpoint's files, weights excepted; may be missing."""
