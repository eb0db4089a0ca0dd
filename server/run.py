"""The process: settings in, exit status out."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.routing import Route

from pulse_ecg.config import Settings
from pulse_ecg.errors import ConfigurationError
from server import log
from server.app import build_app
from server.log import logger
from server.protocol import MAX_CONNECTIONS, BoundedProtocol
from server.service import Service
from server.settings import ServerSettings
from server.ui import ui_routes

# Longer than the 60 s for which load balancers keep idle connections: the side that uses them should close them.
_KEEP_ALIVE_S = 75
# What responses that are being sent may take after the last answer is there.
_SENDING_S = 5
# The thread with the event loop waits for the interpreter no longer than this beside threads that compute.
_SWITCH_INTERVAL_S = 0.001

_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop.

    Returns:
        0 after an orderly end, 1 if the model could not be loaded, 2 for a setting that cannot be used.
    """
    try:
        settings = ServerSettings.read(sys.argv[1:] if arguments is None else arguments)
        log.configure(settings.log_level)
        service = Service(settings, Settings.from_env())
    except ConfigurationError as error:
        logging.basicConfig(format="%(levelname)s: %(message)s")
        logger.error("%s", error)
        return _USAGE_ERROR
    _allow_connections()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    server = Server(service, ui_routes() if settings.ui else ())
    server.run()
    status = 1 if service.failed else 0
    if service.busy:  # a fetch that nobody waits for, or a model half loaded, must not keep the process alive
        service.close()  # processes of the engine would outlive this one
        logging.shutdown()
        os._exit(status)
    return status


class Server(uvicorn.Server):
    """uvicorn, but the first signal lets accepted requests end and the exit status tells how it went."""

    def __init__(self, service: Service, ui: Sequence[Route] = ()) -> None:
        """Listens where the settings say."""
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                build_app(service, ui=ui, failed=self._stop),
                host=service.settings.host,
                port=service.settings.port,
                http=BoundedProtocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_SENDING_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port; the model loads meanwhile.

        Raises:
            SystemExit: the address cannot be listened on; uvicorn has logged the system's reason.
        """
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except SystemExit:
            logger.error("The server cannot listen on host %s, port %d.", self.config.host, self.config.port)
            raise

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """SIGTERM or SIGINT: drain; a second one: stop now."""
        if self._loop is None or self._service.phase == "draining":
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        async def drain() -> None:
            await self._service.drain()
            self._stop()

        if self._drain is None:
            self._drain = asyncio.create_task(drain())

    def _stop(self) -> None:
        self.should_exit = True


def _allow_connections() -> None:
    """Lift the soft limit on open files to what the connections may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 2 * MAX_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
