"""What the operator may set of the server: command-line flags, each with an environment variable."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pulse_ecg.errors import ConfigurationError, excerpt

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class ServerSettings:
    """Times are seconds.  The token is left out of ``repr`` so that no log of the settings can hold it."""

    model: str = ""
    host: str = "127.0.0.1"
    port: int = 8080
    request_timeout: float = 300.0
    body_timeout: float = 60.0
    drain_delay: float = 0.0
    drain_timeout: float = 300.0
    api_token: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    ui: bool = False
    log_level: str = "info"

    @classmethod
    def read(cls, arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> ServerSettings:
        """From the command line, and from the environment where a flag is not given.

        Raises:
            ConfigurationError: a value cannot be used; the message names the flag or the variable.
            SystemExit: ``--help``, or an unknown flag.
        """
        environ = os.environ if environ is None else environ
        parser = argparse.ArgumentParser(
            "serve.py", description="Serve PULSE-7B.", epilog="The token is set by PULSE_API_TOKEN alone."
        )
        for option in OPTIONS:
            if option.flag:
                parser.add_argument(option.flag, help=f"{option.help} ({option.variable})", metavar="VALUE")
        given = vars(parser.parse_args(arguments))
        values: dict[str, Any] = {}
        for option in OPTIONS:
            name, text = option.variable, environ.get(option.variable, "").strip()
            if option.flag and given[option.name] is not None:
                name, text = option.flag, given[option.name].strip()
            if text:
                values[option.name] = option.parse(name, text)
        values.setdefault("drain_timeout", values.get("request_timeout", cls.drain_timeout))
        return cls(**values)


def _text(name: str, text: str) -> str:
    if not text.isprintable():
        raise ConfigurationError(f"{name} holds characters that cannot be printed.")
    return text


def _model(name: str, text: str) -> str:
    """A path that leads nowhere would be asked of the hub otherwise, minutes later and under another name."""
    if not (Path(text).is_dir() or _HUB_ID.fullmatch(text)):
        raise ConfigurationError(
            f"{name} is {excerpt(text, 80)}, which is no folder, nor a hub id such as 'user/model'."
        )
    return text


def _port(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 2**16):
        raise ConfigurationError(
            f"{name} is {excerpt(text)}; accepted: a whole number from 0 (any free port) to 65535."
        )
    return int(text)


def _seconds(least: int) -> Callable[[str, str], float]:
    def parse(name: str, text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not least <= seconds <= 86_400:  # false for NaN too
            raise ConfigurationError(f"{name} is {excerpt(text)}; accepted: a number of seconds from {least} to 86400.")
        return seconds

    return parse


def _flag(name: str, text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ConfigurationError(f"{name} is {excerpt(text)}; accepted: 0 or 1.")
    return words[text.lower()]


def _level(name: str, text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ConfigurationError(f"{name} is {excerpt(text)}; accepted: {', '.join(LOG_LEVELS)}.")
    return text.lower()


def _token(name: str, text: str) -> str:
    """RFC 6750 section 2.1 spells bearer tokens of these characters; the message shows none of it."""
    if not text.isascii() or any(c.isspace() or not c.isprintable() for c in text):
        raise ConfigurationError(f"{name} must be printable ASCII without white space.")
    return text


def _origins(name: str, text: str) -> tuple[str, ...]:
    origins = tuple(origin.strip().rstrip("/") for origin in text.split(",") if origin.strip())
    if origins != ("*",) and not all(map(_is_origin, origins)):
        raise ConfigurationError(
            f"{name} must be origins separated by commas, such as 'https://ecg.example.org', or '*' for all."
        )
    return origins


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        plain = f"{parts.scheme}://{parts.netloc}" == text and parts.port != 0
    except ValueError:
        return False
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in text and "*" not in text


@dataclass(frozen=True)
class Option:
    """One setting: its field, its flag (none for a secret, which a command line would show to every user of the
    machine), its variable, how its text is read, and what it is for."""

    name: str
    flag: str
    variable: str
    parse: Callable[[str, str], Any]
    help: str


OPTIONS = (
    Option("model", "--model", "PULSE_MODEL_PATH", _model, "folder of the checkpoint, or a hub id"),
    Option("host", "--host", "PULSE_HOST", _text, "address to listen on"),
    Option("port", "--port", "PULSE_PORT", _port, "port to listen on"),
    Option("request_timeout", "--request-timeout", "PULSE_REQUEST_TIMEOUT", _seconds(1), "for one request in all"),
    Option("body_timeout", "--body-timeout", "PULSE_BODY_TIMEOUT", _seconds(1), "for a request's body to arrive"),
    Option("drain_delay", "--drain-delay", "PULSE_DRAIN_DELAY", _seconds(0), "still open after SIGTERM"),
    Option("drain_timeout", "--drain-timeout", "PULSE_DRAIN_TIMEOUT", _seconds(1), "for answers after SIGTERM"),
    Option("api_token", "", "PULSE_API_TOKEN", _token, "bearer token that callers must send"),
    Option("cors_origins", "--cors-origins", "PULSE_CORS_ORIGINS", _origins, "origins whose pages may call"),
    Option("ui", "--ui", "PULSE_UI", _flag, "1 serves the page under /ui"),
    Option("log_level", "--log-level", "PULSE_LOG_LEVEL", _level, "debug, info, warning or error"),
)
