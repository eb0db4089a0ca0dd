"""The callers of the scale-out rehearsal: every way to ask our own server, again and again, and what came of each."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests

from demo.ecg_image import read_recording, render

QUESTION = "What is the rhythm of this ECG?"
TOKENS = 24
CALLERS, PAUSE_S = 6, 0.1
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Attempt:
    """One request, in readings of ``time.monotonic()``; ``fault`` is empty where the whole right answer came."""

    kind: str
    began: float
    ended: float
    fault: str


Ask = Callable[[requests.Session, str], str]


def ways_to_ask() -> dict[str, Ask]:
    """The ways to ask, by name; each returns the text of a complete answer, or raises."""
    picture = io.BytesIO()
    render(read_recording()).save(picture, "PNG")
    image = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    native = {
        "parameters": {"max_new_tokens": TOKENS, "do_sample": False, "enable_turkish_commentary": False},
        "inputs": QUESTION,
    }
    about_image = native | {"inputs": {"query": QUESTION, "image": image}}
    chat = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS, "temperature": 0}
    return {
        "whole": lambda session, url: _posted(session, url, native)[0]["generated_text"],
        "streamed": lambda session, url: _native_stream(session, url, native),
        "whole, image": lambda session, url: _posted(session, url, about_image)[0]["generated_text"],
        "streamed, image": lambda session, url: _native_stream(session, url, about_image),
        "chat": lambda s, url: _posted(s, f"{url}/v1/chat/completions", chat)["choices"][0]["message"]["content"],
        "chat, streamed": lambda session, url: _chat_stream(session, f"{url}/v1/chat/completions", chat),
    }


def _posted(session: requests.Session, url: str, body: object) -> Any:
    response = session.post(url, json=body, timeout=PATIENCE_S)
    response.raise_for_status()
    return response.json()


def _events(session: requests.Session, url: str, body: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and data of each event of a stream."""
    name, told = "", []
    with session.post(url, json=body | {"stream": True}, timeout=PATIENCE_S, stream=True) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            field, _, value = line.decode().partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                told.append((name, value))
    return told


def _native_stream(session: requests.Session, url: str, body: dict[str, Any]) -> str:
    told = _events(session, url, body)
    if not told or told[-1][0] != "record":
        raise ValueError(f"the stream ended with {told[-1:]}")
    return "".join(json.loads(data)["text"] for name, data in told if name == "text")


def _chat_stream(session: requests.Session, url: str, body: dict[str, Any]) -> str:
    told = [data for _, data in _events(session, url, body)]
    if not told or told.pop() != "[DONE]":
        raise ValueError(f"the stream ended with {told[-1:]}")
    return "".join(json.loads(data)["choices"][0]["delta"].get("content", "") for data in told)


class Traffic:
    """Callers that ask one question after the other, each on a connection of its own, until it is left."""

    def __init__(self, url: str, ways: dict[str, Ask], expected: dict[str, str]) -> None:
        self.attempts: list[Attempt] = []
        self._url, self._ways, self._expected = url, ways, expected
        self._over = threading.Event()
        self._callers = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]

    def __enter__(self) -> Traffic:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for caller in self._callers:
            caller.join()

    def _call(self, number: int) -> None:
        names = list(self._ways)
        while not self._over.is_set():
            with requests.Session() as session:
                fault = ""
                while not fault and not self._over.wait(PAUSE_S):
                    number += 1
                    fault = self._attempt(session, names[number % len(names)])

    def _attempt(self, session: requests.Session, kind: str) -> str:
        began, fault = time.monotonic(), ""
        try:
            if self._ways[kind](session, self._url) != self._expected[kind]:
                fault = "another answer"
        except (requests.RequestException, ValueError, LookupError) as error:
            fault = f"{type(error).__name__}: {error}"[:200]
        self.attempts.append(Attempt(kind, began, time.monotonic(), fault))
        return fault
