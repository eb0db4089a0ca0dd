"""Whether vLLM is here; asked before anything is downloaded or loaded."""

from __future__ import annotations

import os
import re
from importlib import import_module

from pulse_ecg.errors import ConfigurationError, excerpt

OLDEST = (0, 32)
"""The version that the tests run; older ones take embeddings in another form."""

REQUIREMENTS = "requirements-vllm.txt"

# Read when vLLM is imported.  It would report the model and the machine to its makers; forked processes would inherit
# the threads' locks without the threads.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def require_vllm() -> None:
    """Import vLLM.

    Raises:
        ConfigurationError: it cannot be imported, or is too old; the message says how to install it.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        version = str(import_module("vllm").__version__)
    except ImportError as error:
        missing = f"there is no module {excerpt(error.name)}" if error.name else "one of its libraries is missing"
        raise ConfigurationError(
            f"PULSE_ENGINE is 'vllm', but vLLM cannot be imported ({missing}): install {REQUIREMENTS}."
        ) from error
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigurationError(
            f"PULSE_ENGINE is 'vllm', but vLLM {version} is older than {oldest}: install {REQUIREMENTS}."
        )
