"""One commentary against any OpenAI-compatible service: does it answer, and would its answer be let through?

    python scripts/check_commentary_service.py --base-url http://127.0.0.1:8000/v1 --model my-model

The key comes from ``deep_key`` or ``DEEPSEEK_API_KEY``; a self-hosted service that wants none gets "none".
The last line is one JSON document.  Exit status: 0 commentary accepted, 1 answered but not accepted, 2 no answer, or a
variable with a value that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pulse_ecg.config import Settings
from pulse_ecg.errors import ConfigurationError
from utils import DeepSeekClient

EXAMPLE = "Sinus bradycardia at 48 bpm with first-degree AV block (PR 220 ms). No ST elevation."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default=os.environ.get("DEEPSEEK_BASE_URL"))
    parser.add_argument("--model", default=os.environ.get("DEEPSEEK_MODEL"))
    parser.add_argument("--text", default=EXAMPLE, help="the English answer to comment on")
    parser.add_argument("--timeout", type=float, default=30.0, help="total seconds, retries included")
    asked = parser.parse_args()

    try:
        settings = Settings.from_env()
    except ConfigurationError as error:
        parser.error(str(error))
    settings = replace(
        settings,
        commentary_key=settings.commentary_key or "none",
        commentary_base_url=asked.base_url or settings.commentary_base_url,
        commentary_model=asked.model or settings.commentary_model,
    )
    client = DeepSeekClient(settings)
    started = time.monotonic()
    commentary = client.comment(asked.text, timeout_s=asked.timeout)
    seconds = round(time.monotonic() - started, 2)
    client.close()
    report = {**commentary.record_fields(), "tokens_spent": commentary.tokens_spent, "seconds": seconds}
    sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    if commentary.status == "success":
        return 0
    return 1 if commentary.tokens_spent or commentary.warnings else 2


if __name__ == "__main__":
    sys.exit(main())
