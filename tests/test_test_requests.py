"""Every request of test_requests.json gets what it expects from the real handler, and the checker can say no."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pulse_ecg.params import _READERS
from scripts import send_test_requests as sender
from tests.endpoint_server import EndpointServer, demo_handler, endpoint_server
from tests.servers import Behaviour, Exchange, ImageHost, answer, raw, redirect

CASES = sender.load_cases()
TOKEN = "hf_test_only"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointServer]:
    with (
        demo_handler(tmp_path_factory.mktemp("checkpoint")) as handler,
        endpoint_server(handler, most_new_tokens=64) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sender.drawn_sample(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def answers(server: EndpointServer, image: Path) -> dict[str, tuple[int, Any]]:
    """What the endpoint answers to each case, and that every one of them passes."""
    server.files["/ecg.jpg"] = image.read_bytes()
    sample = sender.sample_of(image, f"{server.url}/ecg.jpg")
    return {case["name"]: sender.send(case, sample, url=server.url, token=TOKEN, timeout_s=60) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_handler_answers_as_the_file_says(case: dict[str, Any], answers: dict[str, tuple[int, Any]]) -> None:
    assert sender.faults(case, *answers[case["name"]], firsts(answers)) == []


def firsts(answers: dict[str, tuple[int, Any]]) -> dict[str, Any]:
    return {name: answer[0] for name, (_, answer) in answers.items() if isinstance(answer, list)}


def test_every_form_alias_and_parameter_of_the_contract_is_sent() -> None:
    bodies = [case.get("body", {}) for case in CASES]
    objects = [body["inputs"] for body in bodies if isinstance(body.get("inputs"), dict)]
    assert {"query", "text", "prompt", "image", "image_url", "image_base64", "messages"} <= {
        k for o in objects for k in o
    }
    assert any(isinstance(body.get("inputs"), str) for body in bodies)
    assert any(isinstance(body.get("inputs"), list) for body in bodies)
    assert any(case.get("raw_image") for case in CASES)
    given = [body["parameters"] for body in bodies if isinstance(body.get("parameters"), dict)]
    assert {name for parameters in given for name in parameters} >= set(_READERS)


WRONG: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"error_contains": "inputs"},
        {"commentary": True},
        {"details": True},
        {"starts_with": {"generated_text": "\u0001"}},
        {"equals": {"model": "PULSE-7B"}},
    ],
    "text-defaults": [{}, {"equals": {"commentary_status": "success"}}],
    "object-text": [
        {"details": True, "other_answer_than": "object-query"},
        {"details": True, "same_answer_as": "nothing"},
    ],
    "image-base64": [
        {"details": True, "equals": {"details.image_tokens": 0}},
        {"details": True, "at_most": {"details.image_tokens": 1}},
        {"details": True, "at_least": {"details.generated_tokens": 9}},
        {"details": True, "lacks": {"generated_text": ""}},
    ],
    "image-matters": [{"details": True, "same_answer_as": "image-report"}],
    "wrong-range": [{}, {"error_contains": "temperature"}],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, wrongs in WRONG.items() for wrong in wrongs])
def test_a_wrong_expectation_is_found(name: str, wrong: dict[str, Any], answers: dict[str, tuple[int, Any]]) -> None:
    case = next(case for case in CASES if case["name"] == name)
    assert sender.faults({**case, "expect": [wrong]}, *answers[name], firsts(answers))


def test_a_broken_answer_is_found(answers: dict[str, tuple[int, Any]]) -> None:
    case = next(case for case in CASES if case["name"] == "text-defaults")
    status, answer = answers["text-defaults"]
    assert sender.faults(case, status, answer, {}) == []
    for name, value in (("commentary_status", "fine"), ("comment_text", "x"), ("generated_text", None), ("extra", 1)):
        broken = copy.deepcopy(answer)
        broken[0][name] = value
        assert sender.faults(case, status, broken, {}), name
    for broken in ({"error": "x"}, [], answer * 2, [answer], "Ok", None):
        assert sender.faults(case, status, broken, {})
    assert sender.faults(case, 503, answer, {})


def test_misspelt_expectations_and_placeholders_are_no_silent_pass() -> None:
    with pytest.raises(ValueError, match="error_contain"):
        sender.record_faults({}, {"error_contain": "x"}, {})
    with pytest.raises(ValueError, match=r"\$image"):
        sender.filled({"image": {"$image": "sample"}}, sender.Sample(b"", "image/jpeg", None))


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("https://x1.eu-west-1.aws.endpoints.huggingface.cloud", "HF_TOKEN"),
        ("https://x1.eu-west-1.aws.Endpoints.HuggingFace.cloud:443/", "HF_TOKEN"),
        ("http://x1.eu-west-1.aws.endpoints.huggingface.cloud", "PULSE_API_TOKEN"),  # in clear
        ("https://endpoints.huggingface.cloud.example.org", "PULSE_API_TOKEN"),
        ("https://example.org/.endpoints.huggingface.cloud", "PULSE_API_TOKEN"),
        ("https://x.endpoints.huggingface.cloud@example.org", "PULSE_API_TOKEN"),
        ("http://127.0.0.1:8080", "PULSE_API_TOKEN"),
    ],
)
def test_the_token_for_hugging_face_goes_nowhere_else(url: str, variable: str) -> None:
    assert sender.token_variable(url) == variable


@pytest.mark.parametrize("token", ["abc\ndef", "anahtarım", "a b", "a\x00"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(
    token: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sender.main(["http://127.0.0.1:9", "--image", str(image), "--token", token])
    told = capsys.readouterr().err
    assert "the token holds characters" in told
    assert token not in told


def test_a_line_end_after_the_token_is_no_part_of_it(
    server: EndpointServer, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PULSE_API_TOKEN", f"{TOKEN}\r\n")
    assert sender.main([server.url, "--image", str(image), "--only", "text"]) == 0
    assert server.tokens[-1] == f"Bearer {TOKEN}"


def test_the_script_reports_and_exits(
    server: EndpointServer,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    arguments = [server.url, "--token", TOKEN, "--image", str(image), "--wait", "1"]
    assert sender.main([*arguments, "--only", "alias-image-url"]) == 0  # skipped, and the one it is compared with sent
    told = capsys.readouterr().out
    assert "pass  image-base64" in told
    assert "skip  alias-image-url: needs --image-url" in told
    assert server.tokens[-1] == f"Bearer {TOKEN}"
    assert TOKEN not in told

    changed = json.loads(sender.CASES_FILE.read_text("utf-8"))
    next(case for case in changed["requests"] if case["name"] == "text")["expect"] = [{"commentary": True}]
    file = tmp_path / "requests.json"
    file.write_text(json.dumps(changed), "utf-8")
    monkeypatch.setattr(sender.load_cases, "__defaults__", (file,))
    assert sender.main([*arguments, "--only", "text"]) == 1
    assert "FAIL  text" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        sender.main([*arguments, "--only", "nothing"])


def test_no_proxy_stands_between_the_script_and_this_machine(server: EndpointServer, image: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    command = [sys.executable, sender.__file__, server.url, "--image", str(image), "--only", "text", "--wait", "5"]
    environ = kept | {"http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "not up yet" in done.stdout) == (0, False), done.stdout


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "localhost.example.org"])
def test_elsewhere_the_proxy_is_asked(host: str) -> None:
    with closing(ImageHost({"*": answer(b"{}")})) as proxy:
        opener = urllib.request.build_opener(sender._Proxies({"http": proxy.url()}))
        opener.open(f"http://{host}/health", timeout=5).close()
        assert proxy.requests[0].startswith(f"GET http://{host}/health ")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3:8080", "[::1]:8080"])
def test_this_machine_is_known_by_its_names(host: str) -> None:
    assert sender._is_loopback(f"http://{host}/")


def test_no_answer_is_a_failure(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = sender.sample_of(image, None)
    outcome = sender.run(CASES[:1], sample, url="http://127.0.0.1:9", token=None, timeout_s=5)
    assert outcome[CASES[0]["name"]]
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        (answer(b"<h1>Bad gateway</h1>", line="502 Bad Gateway"), "HTTP 502 with something that is no list"),
        (answer(b"[{}", length=100), "no answer (IncompleteRead)"),
        (raw(b"nonsense\r\n\r\n"), "no answer (BadStatusLine)"),
    ],
)
def test_a_broken_answer_is_a_failure_that_says_how(
    behaviour: Behaviour, told: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(exchange: Exchange) -> None:
        exchange.sock.recv(65_536)  # the request's body: unread, it would reset the connection
        behaviour(exchange)

    with closing(ImageHost({"/": behave})) as host:
        sender.run(CASES[:1], sender.sample_of(image, None), url=host.url(), token=None, timeout_s=5)
    assert told in capsys.readouterr().out


def test_a_server_that_loads_is_waited_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours tells its root's GET to ask differently from the first moment on."""
    with closing(ImageHost({"/": answer(b"", line="405 No"), "/health": answer(b"", line="503 Loading")})) as host:

        def loaded(_: float) -> None:
            host.pages["/health"] = answer(b"{}")

        monkeypatch.setattr(sender.time, "sleep", loaded)
        sender.wait_until_up(host.url(), token=None, seconds=5)
        assert [head.split()[1] for head in host.requests] == ["/health", "/health"]
    assert capsys.readouterr().out == "not up yet\n"


@pytest.mark.parametrize("code", [302, 307, 308])
def test_a_redirect_does_not_take_the_token_elsewhere(
    code: int, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(ImageHost({"/": answer(b"{}")})) as elsewhere, closing(ImageHost({})) as host:
        host.pages["/"] = host.pages["/health"] = redirect(elsewhere.url(), code)
        sender.wait_until_up(host.url(), token="secret", seconds=5)
        outcome = sender.run(CASES[:1], sender.sample_of(image, None), url=host.url(), token="secret", timeout_s=5)
        assert host.requests and not elsewhere.requests
    assert outcome[CASES[0]["name"]]
    assert "FAIL" in capsys.readouterr().out
