"""Settings from the environment, read once at the start and frozen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pulse_ecg.errors import ConfigurationError, excerpt

T = TypeVar("T")

DTYPES = ("auto", "float16", "bfloat16", "float32")
ENGINES = ("transformers", "vllm")
QUANTIZATIONS = ("none", "int8", "int4")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class Settings:
    """What the operator may set.  :meth:`from_env` is the one place that knows the variables' names.

    The commentary key, and vLLM's arguments, which may hold a token, are left out of ``repr`` and so of logs.
    """

    model_id: str = "PULSE-ECG/PULSE-7B"
    model_revision: str = "main"
    device: str = "auto"
    dtype: str = "auto"
    engine: str = "transformers"
    quantization: str = "none"
    vllm_args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    max_concurrent_requests: int = 8
    max_queued_requests: int = 64
    allowed_image_hosts: frozenset[str] | None = None
    allow_private_image_urls: bool = False
    commentary_key: str | None = field(default=None, repr=False)
    commentary_base_url: str = "https://api.deepseek.com"
    commentary_model: str = "deepseek-flash"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the variables that README.md lists.

        Raises:
            ConfigurationError: a value cannot be used; the message names the variable.
        """
        env = os.environ if environ is None else environ

        def read(name: str, default: T, parse: Callable[[str, str], T]) -> T:
            text = env.get(name, "").strip()
            return parse(name, text) if text else default

        settings = cls(
            model_id=read("PULSE_MODEL_ID", cls.model_id, _text),
            model_revision=read("PULSE_MODEL_REVISION", cls.model_revision, _text),
            device=read("PULSE_DEVICE", cls.device, _device),
            dtype=read("PULSE_DTYPE", cls.dtype, _one_of(DTYPES)),
            engine=read("PULSE_ENGINE", cls.engine, _one_of(ENGINES)),
            quantization=read("PULSE_QUANTIZATION", cls.quantization, _one_of(QUANTIZATIONS)),
            vllm_args=read("PULSE_VLLM_ARGS", {}, _json_object),
            max_concurrent_requests=read("PULSE_MAX_CONCURRENT_REQUESTS", cls.max_concurrent_requests, _whole(1, 1024)),
            max_queued_requests=read("PULSE_MAX_QUEUED_REQUESTS", cls.max_queued_requests, _whole(0, 100_000)),
            allowed_image_hosts=read("PULSE_ALLOWED_IMAGE_HOSTS", None, _hosts),
            allow_private_image_urls=read("PULSE_ALLOW_PRIVATE_IMAGE_URLS", False, _flag),
            commentary_key=env.get("deep_key", "").strip() or env.get("DEEPSEEK_API_KEY", "").strip() or None,
            commentary_base_url=read("DEEPSEEK_BASE_URL", cls.commentary_base_url, _http_url),
            commentary_model=read("DEEPSEEK_MODEL", cls.commentary_model, _text),
        )
        if settings.engine == "vllm" and settings.quantization != "none":
            raise ConfigurationError(
                f"PULSE_QUANTIZATION is '{settings.quantization}', which is for the transformers engine; "
                'vLLM has its own: PULSE_VLLM_ARGS=\'{"quantization": "fp8"}\'.'
            )
        return settings

    @property
    def engine_name(self) -> str:
        """The engine as answers and logs name it: with quantised weights or keys, answers are not the official ones."""
        if self.engine != "vllm":
            return self.engine if self.quantization == "none" else f"{self.engine}-{self.quantization}"
        name, args = self.engine, self.vllm_args
        if args.get("quantization") or args.get("quantization_config"):
            name += f"-{args.get('quantization') or 'quantized'}"
        if args.get("kv_cache_dtype", "auto") != "auto":
            name += f"-kv-{args['kv_cache_dtype']}"
        return name


def _text(name: str, text: str) -> str:
    if not text.isprintable():
        raise ConfigurationError(f"{name} holds characters that cannot be printed.")
    return text


def _one_of(accepted: tuple[str, ...]) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        if text.lower() not in accepted:
            raise ConfigurationError(f"{name} is {excerpt(text)}; accepted: {', '.join(accepted)}.")
        return text.lower()

    return parse


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
            raise ConfigurationError(f"{name} is {excerpt(text)}; accepted: a whole number from {low} to {high}.")
        return int(text)

    return parse


def _flag(name: str, text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ConfigurationError(f"{name} is {excerpt(text)}; accepted: 0 or 1.")
    return text.lower() in _TRUE


def _json_object(name: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{name} must be a JSON object of vLLM's engine arguments, such as '{{\"tensor_parallel_size\": 2}}'."
        )
    return value


def _device(name: str, text: str) -> str:
    kind, colon, index = text.lower().partition(":")
    numbered = kind == "cuda" and index.isascii() and index.isdigit() and len(index) < 4
    if kind not in ("auto", "cpu", "cuda") or (colon and not numbered):
        raise ConfigurationError(f"{name} is {excerpt(text)}; accepted: auto, cpu, cuda or cuda:N.")
    return text.lower()


def _hosts(name: str, text: str) -> frozenset[str]:
    hosts = frozenset(host.strip().lower().rstrip(".") for host in text.split(",") if host.strip())
    if not hosts or any("/" in host or " " in host or "*" in host for host in hosts):
        raise ConfigurationError(f"{name} must be host names separated by commas, such as 'images.example.org'.")
    return hosts


def _http_url(name: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
        # A password would stand in logs of URLs; a query or fragment would end up in the middle of the path.
        usable = usable and not ("@" in parts.netloc or parts.query or parts.fragment)
    except ValueError:  # brackets that hold no IPv6 address, a port that is no number
        usable = False
    if not usable:
        raise ConfigurationError(
            f"{name} must be an http or https address without credentials or query, such as 'https://api.deepseek.com'."
        )
    return text.rstrip("/")
