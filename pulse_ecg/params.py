"""Generation parameters: what they mean, what is accepted, and where their defaults come from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pulse_ecg.errors import ConfigurationError, ParameterError, RequestError, excerpt, nearest_hint

DEFAULTS_FILE = "generation_config.json"
MAX_STOP_STRINGS = 8

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON lets half a surrogate pair through; no text can hold it
_NUMBER = re.compile(r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?", re.ASCII)


@dataclass(frozen=True)
class GenerationParams:
    """How one answer is to be generated; every value is within its range.

    The sampling defaults live in ``generation_config.json`` (:func:`load_defaults`); only what is no sampling
    parameter has its default here.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    do_sample: bool
    repetition_penalty: float
    stop: tuple[str, ...]
    return_full_text: bool = False
    enable_turkish_commentary: bool = True
    deepseek_timeout: int = 30
    seed: int | None = None
    details: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at each step."""
        return not self.do_sample or self.temperature == 0

    def updated(self, given: object) -> GenerationParams:
        """These parameters with those that a caller gave in their place.

        Args:
            given: the request's ``parameters``: an object, or None for none.

        Raises:
            RequestError: ``given`` is no object.
            ParameterError: an unknown name, a wrong type or a value out of range.
        """
        if given is None:
            return self
        if not isinstance(given, Mapping):
            raise RequestError(
                f"'parameters' must be an object such as {{\"max_new_tokens\": 256}}, not {excerpt(given)}."
            )
        for name in given:
            if name not in _READERS:
                raise ParameterError(_unknown(name))
        return replace(self, **{name: _READERS[name](name, value) for name, value in given.items()})


def load_defaults(folder: Path) -> GenerationParams:
    """The defaults, from ``generation_config.json`` in ``folder``.

    Raises:
        ConfigurationError: the file is missing, incomplete or holds a value that is not accepted.
    """
    sampling = [f.name for f in fields(GenerationParams)][:7]
    try:
        given = json.loads((folder / DEFAULTS_FILE).read_text("utf-8"))
        return GenerationParams(**{name: _READERS[name](name, given[name]) for name in sampling})
    except KeyError as error:
        raise ConfigurationError(f"{DEFAULTS_FILE} has no value for {error.args[0]!r}.") from None
    except ParameterError as error:
        raise ConfigurationError(f"{DEFAULTS_FILE}: {error}") from None
    except (OSError, ValueError, TypeError):
        raise ConfigurationError(f"{DEFAULTS_FILE} beside handler.py is missing or is no JSON object.") from None


def _unknown(name: object) -> str:
    known = ", ".join(_READERS)
    return f"Unknown parameter {excerpt(name)}.{nearest_hint(name, _READERS)} Known: {known}."


def _refused(name: str, value: object, accepted: str) -> ParameterError:
    return ParameterError(f"Parameter '{name}' is {excerpt(value)}; accepted: {accepted}.")


def _integer(low: int, high: int | None, accepted: str) -> Callable[[str, object], int]:
    def read(name: str, value: object) -> int:
        given = value
        if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
            value = int(value.strip())
        elif isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value.strip())
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # JSON has one kind of number: 256.0 is 256
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            raise _refused(name, given, accepted)
        return value

    return read


def _number(low: float, high: float, accepted: str, *, zero: bool = False) -> Callable[[str, object], float]:
    def read(name: str, value: object) -> float:
        given = value
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value.strip())
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64:
            value = float(value)
        if not isinstance(value, float) or not math.isfinite(value):
            raise _refused(name, given, accepted)
        if not (low <= value <= high or (zero and value == 0)):
            raise _refused(name, given, accepted)
        return value

    return read


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise _refused(name, value, "true or false")
    return value


def _stop(name: str, value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    accepted = f"a string or a list of at most {MAX_STOP_STRINGS} strings of valid Unicode, none empty"
    if not isinstance(strings, (list, tuple)):
        raise _refused(name, value, accepted)
    if len(strings) > MAX_STOP_STRINGS:
        raise _refused(name, value, f"{accepted}; {len(strings)} were given")
    for string in strings:
        if not isinstance(string, str) or not string or _HALF_PAIR.search(string):
            raise _refused(name, string, accepted)
    return tuple(strings)


def _seed(name: str, value: object) -> int | None:
    return None if value is None else _integer(0, 2**63 - 1, "a whole number from 0 to 2^63 - 1, or null")(name, value)


_READERS: Mapping[str, Callable[[str, object], Any]] = {
    "max_new_tokens": _integer(1, 2048, "a whole number from 1 to 2048"),
    "temperature": _number(0.01, 2.0, "a number from 0.01 to 2.0, or 0 for greedy", zero=True),
    "top_p": _number(0.01, 1.0, "a number from 0.01 to 1.0"),
    "top_k": _integer(0, None, "a whole number from 0 (off)"),
    "do_sample": _boolean,
    "repetition_penalty": _number(1.0, 2.0, "a number from 1.0 to 2.0"),
    "stop": _stop,
    "return_full_text": _boolean,
    "enable_turkish_commentary": _boolean,
    "deepseek_timeout": _integer(10, 60, "a whole number of seconds from 10 to 60"),
    "seed": _seed,
    "details": _boolean,
}
