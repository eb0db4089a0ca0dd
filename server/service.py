"""The server's one state: the model while it loads and once it answers, the threads, the way out."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from pulse_ecg.call import DEFAULT_MODEL_NAME
from pulse_ecg.config import Settings
from pulse_ecg.errors import ModelLoadingError, PulseError, QueueFullError, place_of
from server.body import BodyBudget
from server.errors import DrainingError
from server.jobs import SPARE_THREADS, Workers
from server.log import logger
from server.settings import ServerSettings

if TYPE_CHECKING:
    from handler import EndpointHandler

_TRIAL = {"inputs": "Are you there?", "parameters": {"max_new_tokens": 1, "enable_turkish_commentary": False}}


class Service:
    """Belongs to the event loop, but for the thread that loads the model."""

    def __init__(self, settings: ServerSettings, limits: Settings) -> None:
        """``limits`` are the handler's own settings, of which the number of threads follows."""
        self.settings, self.limits = settings, limits
        self.workers = Workers(limits.max_concurrent_requests + limits.max_queued_requests + SPARE_THREADS)
        self.bodies = BodyBudget()
        self.failed = False
        self.loaded_at = 0.0
        self._handler: EndpointHandler | None = None
        self._loading: threading.Thread | None = None
        self._draining = self._refusing = False
        self._exchanges = 0
        self._idle = asyncio.Event()
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "pulse_http_responses", "HTTP responses by route and status.", ("route", "status"), registry=self._registry
        )
        ready = Gauge("pulse_ready", "1 while requests are accepted.", registry=self._registry)
        ready.set_function(lambda: float(self.phase == "ok" and not self.full))

    # --- the model

    def load(self, failed: Callable[[], object]) -> None:
        """Load the model in a thread of its own; ``failed`` is called in the loop if that does not work."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                handler = load_handler(self.settings.model)
            except BaseException as error:  # noqa: BLE001 - a thread's boundary; Rust's panics are no Exception
                known = isinstance(error, PulseError)
                logger.error("The model could not be loaded: %s", error if known else place_of(error))
                loop.call_soon_threadsafe(self._fail, failed)
            else:
                loop.call_soon_threadsafe(self._opened, handler)

        self._loading = threading.Thread(target=work, name="pulse-loading", daemon=True)
        self._loading.start()

    def _opened(self, handler: EndpointHandler) -> None:
        self._handler, self.loaded_at = handler, time.time()
        logger.info("%s answers.", handler.model_name)

    def _fail(self, failed: Callable[[], object]) -> None:
        self.failed = True
        failed()

    @property
    def closing(self) -> bool:
        """Whether connections are of no further use: the server has been told to shut down."""
        return self._draining

    @property
    def phase(self) -> str:
        """``loading``, ``ok``, ``draining``, or ``stopped`` once the engine has ended."""
        if self._draining:
            return "draining"
        if self._handler is None:
            return "loading"
        return "ok" if self._handler.alive else "stopped"

    @property
    def model_name(self) -> str:
        """The model's own name.

        Raises:
            ModelLoadingError: it is not known yet.
        """
        if self._handler is None:
            raise ModelLoadingError("The model is being loaded; try again in a few seconds.")
        return self._handler.model_name

    @property
    def name_in_errors(self) -> str:
        """What error records call the model: by its own name once that is known."""
        return DEFAULT_MODEL_NAME if self._handler is None else self._handler.model_name

    @property
    def hub_name(self) -> str:
        """The model's name on the hub: what was asked for by it, or what a folder's weights are said to be."""
        asked = self.settings.model
        return asked if asked and not Path(asked).is_dir() else self.limits.model_id

    @property
    def full(self) -> bool:
        """Whether one more request would be refused."""
        return self._handler is not None and self._handler.admission.full

    @property
    def handler(self) -> EndpointHandler:
        """The handler, for a new request.

        Raises:
            ModelLoadingError: there is none yet, or no more.
            QueueFullError: one more request would be refused; it need not even be read.
        """
        if self._refusing:
            raise DrainingError("The server is shutting down; try again in a few seconds.")
        if self._handler is None:
            raise ModelLoadingError("The model is being loaded; try again in a few seconds.")
        if self.full:
            raise QueueFullError("Too many requests are waiting; try again in a few seconds.")
        return self._handler

    def note_refusal(self, error: PulseError, request_id: str) -> None:
        """Count a request that comes to nothing before the handler is asked, where there is one."""
        if self._handler is not None:
            self._handler.note_refusal(error, request_id)

    def close(self) -> None:
        """End the engine; nothing is answered after that."""
        if self._handler is not None:
            self._handler.close()
            return
        for process in multiprocessing.active_children():  # of an engine half started
            process.kill()

    # --- what it shows

    def readiness(self) -> dict[str, object]:
        """Whether one more request would be accepted, and how many there are."""
        admission = self._handler.admission if self._handler else None
        return {
            "ready": self.phase == "ok" and not self.full,
            "running": admission.running if admission else 0,
            "waiting": admission.waiting if admission else 0,
            "max_concurrent_requests": self.limits.max_concurrent_requests,
            "max_queued_requests": self.limits.max_queued_requests,
        }

    def metrics(self) -> str:
        """The server's own and, once there is one, the handler's, in Prometheus' text format."""
        own = generate_latest(self._registry).decode()
        return own + (self._handler.monitor.prometheus_text() if self._handler else "")

    @property
    def busy(self) -> bool:
        """Whether a thread is still at work."""
        return bool(self.workers.busy) or (self._loading is not None and self._loading.is_alive())

    # --- every exchange

    def entered(self) -> None:
        """A request has begun to arrive."""
        self._exchanges += 1
        self._idle.clear()

    def left(self, route: str, status: int) -> None:
        """Its response is sent, or nobody waits for it any more."""
        self._responses.labels(route, str(status)).inc()
        self._exchanges -= 1
        if not self._exchanges:
            self._idle.set()

    # --- the way out

    async def drain(self) -> None:
        """Accept nothing more, and wait until what was accepted is answered, or until the time for that is over.

        With ``drain_delay`` requests are accepted for so long still, while ``/health`` tells proxies to send none.
        """
        self._draining = True
        if self._handler is not None and self.settings.drain_delay:
            logger.info("Told to shut down: accepting requests for %g s more.", self.settings.drain_delay)
            await asyncio.sleep(self.settings.drain_delay)
        self._refusing = True
        logger.info("Shutting down: %d requests are being answered.", self._exchanges)
        if not self._exchanges:
            return
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("Not answered in time: %d requests are given up.", self._exchanges)
            self.workers.cancel_all()


def load_handler(model: str) -> EndpointHandler:
    """The handler on a checkpoint's folder, or on a hub id; it has answered once.

    Raises:
        PulseError: the model cannot be loaded, or does not answer.
    """
    if model and not Path(model).is_dir():
        # This folder holds no weights; beside handler.py there may be some, of another model.
        os.environ["PULSE_MODEL_ID"], model = model, str(Path(__file__).parent)
    from handler import EndpointHandler  # noqa: PLC0415 - imports torch: seconds, in which the port is open already

    handler = EndpointHandler(model)
    [trial] = handler.respond(_TRIAL)
    if trial.error:
        raise trial.error
    return handler
