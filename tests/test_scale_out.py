"""Replicas behind HAProxy, where it is installed: the guide's configuration, and the rehearsal in short."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import requests

from handler import EndpointHandler
from scripts import rehearse_scale_out
from scripts.rehearsal_traffic import Attempt
from scripts.rehearse_scale_out import CONFIG, DRAIN_DELAY_S, SETTLE_S, haproxy, main, proxy
from server.settings import ServerSettings
from tests.our_server import PATIENCE, our_server, until

ROOT = Path(__file__).parents[1]
needs_haproxy = pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed")
LONG = {"max_new_tokens": 2048, "stop": [], "seed": 1, "enable_turkish_commentary": False}


def test_the_guide_shows_the_configuration_that_is_rehearsed() -> None:
    guide = (ROOT / "deployment_guide.md").read_text("utf-8")
    shown = re.findall(r"^```haproxy\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert shown == [CONFIG.read_text("utf-8")] * 2


def test_the_proxy_waits_longer_than_the_server_and_notices_sooner_than_it_refuses() -> None:
    text = CONFIG.read_text("utf-8")
    waits_s = list(map(int, re.findall(r"timeout (?:client|server) (\d+)s", text)))
    assert len(waits_s) == 2
    assert min(waits_s) > ServerSettings().request_timeout
    [(inter_s, fast_ms, fall)] = re.findall(r"inter (\d+)s fastinter (\d+)ms fall (\d)", text)
    noticed_s = int(inter_s) + (int(fall) - 1) * int(fast_ms) / 1000
    assert noticed_s < min(DRAIN_DELAY_S, SETTLE_S)
    delays = re.findall(r"--drain-delay (\d+)", (ROOT / "deployment_guide.md").read_text("utf-8"))
    assert delays
    assert all(int(delay) > noticed_s for delay in delays)


@needs_haproxy
def test_haproxy_is_content_with_the_configuration() -> None:
    executable = haproxy()
    assert executable
    done = subprocess.run([executable, "-c", "-f", CONFIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr


@needs_haproxy
def test_who_hangs_up_on_the_proxy_hangs_up_on_the_replica(handler: EndpointHandler, tmp_path: Path) -> None:
    with our_server(handler) as server, proxy(tmp_path, [server.port, server.port]) as url:
        for stream in (True, False):
            asked = {"inputs": "Rate?", "parameters": LONG, "stream": stream}
            try:
                with requests.post(url, json=asked, stream=True, timeout=(PATIENCE, 0.5 if not stream else PATIENCE)):
                    until(lambda: handler.admission.running == 1)
            except requests.ReadTimeout:
                assert not stream
            until(lambda: handler.admission.running == 0, patience=2)


@needs_haproxy
def test_a_full_replica_says_429_itself(
    handler: EndpointHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it taken for dead, the proxy would answer in its place, without a time to come back."""
    with our_server(handler) as server, proxy(tmp_path, [server.port, server.port]) as url:

        def probes() -> float:
            counts = re.findall(r'route="/(?:health|ready)",status="\d+"\} ([\d.]+)', server.get("/metrics").text)
            return sum(map(float, counts))

        monkeypatch.setattr(type(handler.admission), "full", property(lambda _self: True))
        enough = probes() + 10
        until(lambda: probes() >= enough)  # it has looked at either of the two several times
        refused = requests.post(url, json={"inputs": "Rate?"}, timeout=PATIENCE)
        assert (refused.status_code, "Retry-After" in refused.headers) == (429, True)


@needs_haproxy
def test_replicas_are_restarted_under_traffic_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quiet-seconds", "2", "--folder", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["lost"] == report["kill"]["lost_after"] == 0
    assert report["requests"] > report["restarts"]["requests"] > report["quiet"]["requests"] > 0
    assert report["kill"]["after"] > 0
    assert report["kill"]["lost_in_flight"] <= report["kill"]["in_flight"]


def test_what_was_lost_is_counted_where_it_was_lost() -> None:
    def attempts(*times: tuple[float, float, str]) -> list[Attempt]:
        return [Attempt("whole", began, ended, fault) for began, ended, fault in times]

    right = [(0, 1, ""), (0.5, 2, ""), (5, 6, ""), (5, 7, ""), (5, 12, "")]
    quiet, late, dying, after = (1, 2, "x"), (6, 7, "x"), (9, 11, "x"), (11, 12, "x")
    times = {"restarting": 4.0, "killing": 10.0, "killed": 10.5}
    assert rehearse_scale_out._report(attempts(*right, dying), **times)["lost"] == 0
    for fault in (quiet, late, after):
        assert rehearse_scale_out._report(attempts(*right, dying, fault), **times)["lost"] == 1


def test_without_haproxy_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rehearse_scale_out, "haproxy", lambda: None)
    assert main([]) == 2
    assert "apt-get install haproxy" in capsys.readouterr().err
