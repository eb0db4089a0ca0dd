"""A process that loads once and then does what it is told, line by line.  Standard library only: both sides import it.

The parent writes one JSON object a line, ``{"command": name, …arguments}``, and reads one back.  So several sides can
stay loaded while only one of them computes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def environment(**settings: str) -> dict[str, str]:
    """What a side runs under: ``settings``, and the shell's variables but for its own settings of the endpoint."""
    foreign = ("PULSE_", "DEEPSEEK_", "PYTHONPATH", "deep_key")
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | settings


class Worker:
    """The parent's end.  ``ready`` is what the process said once it had loaded."""

    def __init__(self, interpreter: Path, module: str, *arguments: object, environment: Mapping[str, str]) -> None:
        """Start ``python -m module arguments…`` and wait until it is ready."""
        command = [str(part) for part in (interpreter, "-m", module, *arguments)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._name = module
        self.ready: dict[str, Any] = self._read()

    def ask(self, command: str, **arguments: object) -> Any:
        """Have one command done and return its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process: it leaves when nobody can tell it anything any more."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with status {self._process.wait()}; its messages are above.")
        return json.loads(line)


def serve(load: Callable[[], tuple[dict[str, Any], Mapping[str, Callable[..., Any]]]]) -> None:
    """The child's end: load, say so, then do one command after another until the parent closes the line.

    What libraries print goes to standard error.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(result: Any) -> None:
        channel.write(json.dumps(result) + "\n")
        channel.flush()

    ready, commands = load()
    say(ready)
    for line in sys.stdin:
        request = json.loads(line)
        say(commands[request.pop("command")](**request))


class TokenClock:
    """A streamer for transformers' ``generate`` that notes when each token came, and does nothing else."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(self._now())

    def end(self) -> None:
        pass
