"""The routes, and what stands around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, cast

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pulse_ecg.errors import PulseError
from server.chat import completions, model, models
from server.errors import error_response, retry_headers, route_error_response
from server.exchange import BearerAuth, Exchange
from server.native import predict
from server.openapi import document
from server.service import Service


def build_app(service: Service, *, ui: Sequence[Route] = (), failed: Callable[[], object]) -> Starlette:
    """The application.  It begins to load the model when it starts; ``failed`` is called if that does not work."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        service.load(failed)
        yield
        service.workers.close()

    routes = [
        Route("/", predict, methods=["POST"]),
        Route("/predict", predict, methods=["POST"]),
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
    ]
    routes += ui
    shown = [route.path.replace("{name:path}", "*") for route in routes]
    around = [Middleware(Exchange, routes=shown, service=service)]
    if settings.cors_origins:
        around.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    if settings.api_token:
        around.append(Middleware(BearerAuth, service=service, token=settings.api_token, is_open=_is_open))
    app = Starlette(
        routes=routes,
        middleware=around,
        lifespan=lifespan,
        exception_handlers={PulseError: cast(Any, refused), HTTPException: cast(Any, no_route)},
    )
    app.router.redirect_slashes = False  # the redirect's address would be made of the caller's Host header
    app.state.service = service
    return app


def _is_open(path: str) -> bool:
    """What a probe and a browser must reach without a token."""
    return path in ("/health", "/ui") or path.startswith("/ui/")


async def health(request: Request) -> Response:
    """200 once the model answers."""
    service: Service = request.app.state.service
    status = 200 if service.phase == "ok" else 503
    return JSONResponse({"status": service.phase}, status, retry_headers(status))


async def ready(request: Request) -> Response:
    """200 while one more request would be accepted."""
    service: Service = request.app.state.service
    state = service.readiness()
    status = 200 if state["ready"] else 503
    return JSONResponse(state, status, retry_headers(status))


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    """The description of all this."""
    service: Service = request.app.state.service
    return JSONResponse(document(token=bool(service.settings.api_token)))


async def refused(request: Request, error: PulseError) -> Response:
    """An error that stopped a request before its job told anything."""
    service: Service = request.app.state.service
    return error_response(request.scope["path"], error, service.name_in_errors)


async def no_route(request: Request, error: HTTPException) -> Response:
    """404 and 405, and whatever else the router says."""
    message = f"{HTTPStatus(error.status_code).phrase}."
    headers: Mapping[str, str] = error.headers or {}
    if "Allow" in headers:
        message = f"This route takes {headers['Allow']} alone."
    elif error.status_code == HTTPStatus.NOT_FOUND:
        message = "There is no such route; GET /openapi.json describes all."
    return route_error_response(request.scope["path"], error.status_code, message, headers)
