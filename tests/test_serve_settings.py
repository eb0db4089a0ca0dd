"""The server's flags and variables: what is accepted, which one wins, and that a bad one is named."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
import time
from dataclasses import fields
from typing import Any

import pytest

from pulse_ecg.config import Settings
from pulse_ecg.errors import ConfigurationError
from server.run import main
from server.service import Service
from server.settings import OPTIONS, Option, ServerSettings
from tests.conftest import ROOT

GOOD: dict[str, tuple[str, Any]] = {
    "model": ("some/model", "some/model"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "request_timeout": ("12.5", 12.5),
    "body_timeout": ("5", 5.0),
    "drain_delay": ("2.5", 2.5),
    "drain_timeout": ("7", 7.0),
    "api_token": ("sesame-7", "sesame-7"),
    "cors_origins": ("https://a.example, http://b.example:8080/", ("https://a.example", "http://b.example:8080")),
    "ui": ("1", True),
    "log_level": ("DEBUG", "debug"),
}
BAD = {
    "model": ["a\x07b", "/no/such/folder", "./model", "no/such/folder", "~/model", "model/", "../model"],
    "host": ["a\x07b"],
    "port": ["-1", "65536", "x", "8.5", "\u0661"],
    "request_timeout": ["0", "-5", "nan", "inf", "86401", "x"],
    "body_timeout": ["0", "x"],
    "drain_delay": ["-1", "x", "nan"],
    "drain_timeout": ["0", "x"],
    "api_token": ["with space", "ğ", "a\x00b"],
    "cors_origins": [
        "example.org",
        "https://a.example/path",
        "ftp://a",
        "*,https://a",
        "https://*.a",
        "http://[x",
        "null",
    ],
    "ui": ["maybe"],
    "log_level": ["loud", "trace"],
}


def test_every_setting_has_one_option() -> None:
    assert [option.name for option in OPTIONS] == [field.name for field in fields(ServerSettings)] == list(GOOD)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_variable_is_read_and_the_flag_wins(option: Option) -> None:
    text, value = GOOD[option.name]
    assert getattr(ServerSettings.read([], {option.variable: text}), option.name) == value
    assert ServerSettings.read([], {option.variable: "  "}) == ServerSettings()
    if option.flag:
        both = ServerSettings.read([option.flag, text], {option.variable: BAD[option.name][0]})
        assert getattr(both, option.name) == value


@pytest.mark.parametrize(
    ("option", "text"),
    [(option, text) for option in OPTIONS for text in BAD[option.name]],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_value_stops_the_start_and_is_named(
    option: Option, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigurationError, match=option.variable):
        ServerSettings.read([], {option.variable: text})
    if option.flag:
        monkeypatch.setattr("server.run.Server", None)
        assert main([f"{option.flag}={text}"]) == 2
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert option.flag in record.getMessage()


def test_the_token_is_in_no_message_and_no_flag() -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServerSettings.read([], {"PULSE_API_TOKEN": "open sesame"})
    assert "sesame" not in str(caught.value)
    assert "sesame" not in repr(ServerSettings.read([], {"PULSE_API_TOKEN": "sesame-7"}))
    with pytest.raises(SystemExit):
        ServerSettings.read(["--api-token", "sesame"], {})


def test_answers_may_take_as_long_while_draining_as_before() -> None:
    assert ServerSettings.read(["--request-timeout", "40"], {}).drain_timeout == 40
    assert ServerSettings.read(["--request-timeout", "40", "--drain-timeout", "7"], {}).drain_timeout == 7


def test_help_names_every_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ServerSettings.read(["--help"], {})
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in OPTIONS:
        assert option.variable in shown
        assert option.flag in shown


def test_libraries_that_log_whole_urls_are_quiet() -> None:
    """A signed URL of the hub's storage is a key to what it names."""
    script = "from server import log; log.configure('debug'); import logging\n"
    script += (
        "for name in ('httpx', 'httpx2'): logging.getLogger(name).info('GET https://cdn.example/x?Signature=SECRET')\n"
    )
    script += "logging.getLogger('pulse.server').info('heard')"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "heard" in run.stderr
    assert "SECRET" not in run.stderr


@pytest.mark.parametrize(("given", "name"), [("user/fork", "user/fork"), (None, "PULSE-ECG/PULSE-7B"), (".", None)])
def test_the_name_on_the_hub_is_that_of_the_weights_that_were_asked_for(given: str | None, name: str | None) -> None:
    settings = ServerSettings.read(["--model", given] if given else [], {})
    service = Service(settings, Settings(model_id="PULSE-ECG/PULSE-7B"))
    assert service.hub_name == (name or "PULSE-ECG/PULSE-7B")


def test_a_service_that_ends_while_it_loads_leaves_no_process_of_an_engine_behind() -> None:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    process.start()
    try:
        Service(ServerSettings(), Settings()).close()
        process.join(20)
        assert process.exitcode is not None
    finally:
        process.kill()
