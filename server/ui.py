"""The page in ``ui/`` as Starlette routes: fixed files, read once, that may talk to their own server alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

UI_FOLDER = Path(__file__).resolve().parents[1] / "ui"

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class _Asset:
    content: bytes
    content_type: str
    etag: str

    @classmethod
    def read(cls, file: Path) -> _Asset:
        content = file.read_bytes()
        return cls(content, _CONTENT_TYPES[file.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    async def respond(self, request: Request) -> Response:
        """The file, or 304 where the browser's copy is still the same; it asks each time (``no-cache``)."""
        headers = {**SECURITY_HEADERS, "ETag": self.etag, "Cache-Control": "no-cache"}
        known = request.headers.get("If-None-Match", "")
        if self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.content_type, headers=headers)


def ui_routes(folder: Path = UI_FOLDER) -> list[Route]:
    """``GET /ui`` is the page, which ``GET /`` leads to, ``GET /ui/…`` its files; other names have no route.

    The page's addresses are relative, so it also works behind a proxy that adds a path in front.

    Raises:
        FileNotFoundError: ``folder`` holds no page.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in _CONTENT_TYPES)
    page = _Asset.read(folder / "index.html")
    others = {file.name: _Asset.read(file) for file in files if file.name != "index.html"}
    return [
        Route("/ui", page.respond),
        Route("/ui/", _to_the_page),
        Route("/", _from_the_root),
        *(Route(f"/ui/{name}", asset.respond) for name, asset in others.items()),
    ]


async def _from_the_root(_: Request) -> Response:
    """A browser that is given the server's address alone."""
    return RedirectResponse("ui", headers=SECURITY_HEADERS)


async def _to_the_page(_: Request) -> Response:
    """The page's relative addresses count on its own having no slash at the end."""
    return RedirectResponse("../ui", headers=SECURITY_HEADERS)
