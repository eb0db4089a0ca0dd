"""Every environment variable: its default, what it accepts, and a message that names it for what it does not."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from pulse_ecg.config import Settings
from pulse_ecg.errors import ConfigurationError

DEFAULTS = {
    "model_id": "PULSE-ECG/PULSE-7B",
    "model_revision": "main",
    "device": "auto",
    "dtype": "auto",
    "engine": "transformers",
    "quantization": "none",
    "vllm_args": {},
    "max_concurrent_requests": 8,
    "max_queued_requests": 64,
    "allowed_image_hosts": None,
    "allow_private_image_urls": False,
    "commentary_key": None,
    "commentary_base_url": "https://api.deepseek.com",
    "commentary_model": "deepseek-flash",
}

GOOD: list[tuple[str, str, str, Any]] = [
    ("PULSE_MODEL_ID", "model_id", "someone/another-model", "someone/another-model"),
    ("PULSE_MODEL_REVISION", "model_revision", "v1.2", "v1.2"),
    ("PULSE_DEVICE", "device", "auto", "auto"),
    ("PULSE_DEVICE", "device", "cpu", "cpu"),
    ("PULSE_DEVICE", "device", "CUDA", "cuda"),
    ("PULSE_DEVICE", "device", "cuda:1", "cuda:1"),
    ("PULSE_DTYPE", "dtype", "float16", "float16"),
    ("PULSE_DTYPE", "dtype", "BFloat16", "bfloat16"),
    ("PULSE_ENGINE", "engine", "transformers", "transformers"),
    ("PULSE_ENGINE", "engine", "vLLM", "vllm"),
    ("PULSE_VLLM_ARGS", "vllm_args", '{"tensor_parallel_size": 2}', {"tensor_parallel_size": 2}),
    ("PULSE_QUANTIZATION", "quantization", "int8", "int8"),
    ("PULSE_QUANTIZATION", "quantization", "INT4", "int4"),
    ("PULSE_QUANTIZATION", "quantization", "none", "none"),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "max_concurrent_requests", "1", 1),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "max_concurrent_requests", " 16 ", 16),
    ("PULSE_MAX_QUEUED_REQUESTS", "max_queued_requests", "0", 0),
    ("PULSE_MAX_QUEUED_REQUESTS", "max_queued_requests", "1000", 1000),
    ("PULSE_ALLOWED_IMAGE_HOSTS", "allowed_image_hosts", "a.example", frozenset({"a.example"})),
    (
        "PULSE_ALLOWED_IMAGE_HOSTS",
        "allowed_image_hosts",
        "A.example., b.example,",
        frozenset({"a.example", "b.example"}),
    ),
    ("PULSE_ALLOW_PRIVATE_IMAGE_URLS", "allow_private_image_urls", "1", True),
    ("PULSE_ALLOW_PRIVATE_IMAGE_URLS", "allow_private_image_urls", "True", True),
    ("PULSE_ALLOW_PRIVATE_IMAGE_URLS", "allow_private_image_urls", "0", False),
    ("PULSE_ALLOW_PRIVATE_IMAGE_URLS", "allow_private_image_urls", "false", False),
    ("deep_key", "commentary_key", "key-1\n", "key-1"),
    ("DEEPSEEK_API_KEY", "commentary_key", "key-2", "key-2"),
    ("DEEPSEEK_BASE_URL", "commentary_base_url", "http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
    ("DEEPSEEK_BASE_URL", "commentary_base_url", "https://[2001:db8::1]/v1", "https://[2001:db8::1]/v1"),
    ("DEEPSEEK_MODEL", "commentary_model", "another-model", "another-model"),
]

BAD: list[tuple[str, str]] = [
    ("PULSE_MODEL_ID", "a\x00b"),
    ("PULSE_MODEL_REVISION", "ma\x1bin"),
    ("PULSE_DEVICE", "gpu"),
    ("PULSE_DEVICE", "cuda:"),
    ("PULSE_DEVICE", "cuda:x"),
    ("PULSE_DEVICE", "cuda:-1"),
    ("PULSE_DEVICE", "cuda:٣"),
    ("PULSE_DEVICE", "auto:0"),
    ("PULSE_DTYPE", "float64"),
    ("PULSE_DTYPE", "int8"),
    ("PULSE_ENGINE", "llama.cpp"),
    ("PULSE_VLLM_ARGS", "--tensor-parallel-size 2"),
    ("PULSE_VLLM_ARGS", "[]"),
    ("PULSE_VLLM_ARGS", '{"tensor_parallel_size": 4'),
    ("PULSE_QUANTIZATION", "8"),
    ("PULSE_QUANTIZATION", "nf4"),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "0"),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "-1"),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "1.5"),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "many"),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "²"),
    ("PULSE_MAX_CONCURRENT_REQUESTS", "9" * 5000),
    ("PULSE_MAX_QUEUED_REQUESTS", "-1"),
    ("PULSE_MAX_QUEUED_REQUESTS", "1e3"),
    ("PULSE_ALLOWED_IMAGE_HOSTS", ","),
    ("PULSE_ALLOWED_IMAGE_HOSTS", "https://images.example"),
    ("PULSE_ALLOWED_IMAGE_HOSTS", "*.example"),
    ("PULSE_ALLOWED_IMAGE_HOSTS", "a.example b.example"),
    ("PULSE_ALLOW_PRIVATE_IMAGE_URLS", "maybe"),
    ("PULSE_ALLOW_PRIVATE_IMAGE_URLS", "2"),
    ("DEEPSEEK_BASE_URL", "api.deepseek.com"),
    ("DEEPSEEK_BASE_URL", "ftp://api.deepseek.com"),
    ("DEEPSEEK_BASE_URL", "https://"),
    ("DEEPSEEK_BASE_URL", "https://[::1"),
    ("DEEPSEEK_BASE_URL", "https://host:port"),
    ("DEEPSEEK_BASE_URL", "https://user:pass@host/v1"),
    ("DEEPSEEK_BASE_URL", "https://host/v1?key=x"),
    ("DEEPSEEK_BASE_URL", "https://host:99999"),
    ("DEEPSEEK_BASE_URL", "https://ho\x00st"),
    ("DEEPSEEK_MODEL", "a\nb"),
]


def test_defaults_are_the_contracts() -> None:
    settings = Settings.from_env({})
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert settings == Settings()


@pytest.mark.parametrize(("variable", "field", "given", "meant"), GOOD)
def test_good_value_sets_its_field_and_no_other(variable: str, field: str, given: str, meant: object) -> None:
    settings = Settings.from_env({variable: given, "PULSE_SOMETHING_ELSE": "x"})
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS | {field: meant}


@pytest.mark.parametrize(("variable", "given"), BAD, ids=lambda text: text[:40])
def test_bad_value_stops_the_start_with_a_short_message_that_names_the_variable(variable: str, given: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{variable} ") as caught:
        Settings.from_env({variable: given})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 200
    assert given[:40] not in message or len(given) <= 24


@pytest.mark.parametrize("variable", sorted({name for name, *_ in GOOD}))
def test_empty_or_blank_value_is_the_default(variable: str) -> None:
    assert Settings.from_env({variable: ""}) == Settings.from_env({variable: " \n"}) == Settings()


def test_the_environment_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULSE_MODEL_REVISION", "from-the-environment")
    assert Settings.from_env().model_revision == "from-the-environment"


def test_deep_key_comes_before_the_other_key() -> None:
    assert Settings.from_env({"deep_key": "first", "DEEPSEEK_API_KEY": "second"}).commentary_key == "first"
    assert Settings.from_env({"deep_key": " ", "DEEPSEEK_API_KEY": "second"}).commentary_key == "second"


def test_key_is_not_in_repr() -> None:
    settings = Settings.from_env({"deep_key": "sk-0123456789"})
    assert "sk-0123456789" not in f"{settings!r} {settings}"
    assert "max_queued_requests=64" in repr(settings)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().device = "cpu"  # type: ignore[misc]
