"""What the stock container of Hugging Face Inference Endpoints needs done for it: let several requests in, and end.

It lets one call of the handler run at a time, by a semaphore that it looks up at each call
(``huggingface_inference_toolkit.async_utils.MAX_THREADS_GUARD``, toolkit 0.5).  Its health check is answered with "ok"
whatever has become of the handler, so a device that is lost would leave the endpoint up and every answer an error.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

logger = logging.getLogger(__name__)

_MODULE = "huggingface_inference_toolkit.async_utils"
_GUARD = "MAX_THREADS_GUARD"
_LAST_ANSWERS_S = 2.0


def admit_requests(limit: int) -> bool:
    """Let the container, if this is one, run up to ``limit`` calls at once.

    Returns:
        Whether it was done.  Anywhere else, and in a container that works otherwise, nothing is changed.
    """
    module = sys.modules.get(_MODULE)
    guard = getattr(module, _GUARD, None)
    if guard is None:
        return False
    from anyio import Semaphore  # noqa: PLC0415 - the container has it, others need not

    if not isinstance(guard, Semaphore):
        return False
    setattr(module, _GUARD, Semaphore(limit))
    logger.info("The container lets up to %d requests in at once.", limit)
    return True


def end_process() -> None:
    """Let the platform start another container in this one's place, once the last answers are sent."""
    logger.critical("The device has failed: the process ends, for another one to be started.")
    timer = threading.Timer(_LAST_ANSWERS_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
