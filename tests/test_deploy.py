"""deploy.py against a stand-in of the service: what it sends, what it says, and what it never says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image

import deploy
from scripts.endpoint_settings import GPU_GB
from tests.endpoints_service import TOKEN, USER, EndpointsService, endpoints_service

ROOT = Path(__file__).parents[1]
SECRET = "sk-not-to-be-shown"
NEWER, OLDER = "a" * 40, "b" * 40
CASE = {"name": "question", "body": {"inputs": "?"}, "expect": [{}]}
IMAGE = ["--container", "custom", "--image", "registry.example/pulse:1.0"]
needs_env = pytest.mark.skipif(not deploy.SENDS_ENV, reason="this huggingface_hub cannot send variables")

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[EndpointsService]:
    with endpoints_service() as service:
        monkeypatch.setattr(constants, "ENDPOINT", service.url)
        monkeypatch.setattr(constants, "INFERENCE_ENDPOINTS_ENDPOINT", service.url + "/v2")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(deploy, "POLL_S", 0.0)
        monkeypatch.setattr(deploy, "load_cases", lambda: [CASE])
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("deep_key", SECRET)
        yield service


@pytest.fixture
def run(service: EndpointsService, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run deploy.py; its exit status and all that it printed, in which no secret may stand."""
    picture = tmp_path / "ecg.jpg"
    Image.new("RGB", (8, 8)).save(picture)

    def run(*flags: str) -> tuple[int, str]:
        base = ["--name", "pulse", "--repository", "someone/pulse", "--test-image", str(picture)]
        try:
            status = deploy.main([*base, *flags])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert SECRET not in said
        assert TOKEN not in said
        return status, said

    return run


def test_a_new_endpoint_is_created_pinned_awaited_and_tested(service: EndpointsService, run: Run) -> None:
    service.states = [("pending", ""), ("initializing", "downloading"), ("running", "")]
    status, said = run("--secret", "deep_key", "--max-replica", "2")
    assert status == 0, said
    [(method, path, body)] = service.writes
    assert (method, path) == ("POST", f"/v2/endpoint/{USER}")
    assert body["model"] == {
        "framework": "custom",
        "image": {"huggingface": {}},
        "repository": "someone/pulse",
        "revision": NEWER,
        "secrets": {"deep_key": SECRET},
        "task": "custom",
    }
    assert body["compute"] == {
        "accelerator": "gpu",
        "instanceSize": "x1",
        "instanceType": "nvidia-l4",
        "scaling": {"maxReplica": 2, "minReplica": 0, "scaleToZeroTimeout": 15},
    }
    assert body["provider"] == {"region": "us-east-1", "vendor": "aws"}
    assert body["type"] == "private"
    lines = said.splitlines()
    assert [line.split()[2] for line in lines if " s  " in line and line.lstrip()[0].isdigit()] == [
        "pending",
        "initializing",
        "running",
    ]
    assert any(line.startswith("pass  question") for line in lines)
    assert service.authorizations == [f"Bearer {TOKEN}"]


def test_the_custom_container_gets_port_health_route_and_image(service: EndpointsService, run: Run) -> None:
    service.files = ["config.json", "model-00001-of-00003.safetensors"]  # the model alone: the code is in the image
    assert run(*IMAGE, "--no-wait")[0] == 0
    [(_, _, body)] = service.writes
    assert body["model"]["image"] == {
        "custom": {"url": "registry.example/pulse:1.0", "port": 8080, "healthRoute": "/health"}
    }


@needs_env
def test_variables_are_sent_and_another_port_reaches_the_server(service: EndpointsService, run: Run) -> None:
    assert run(*IMAGE, "--port", "9000", "--env", "PULSE_UI=1", "--no-wait")[0] == 0
    [(_, _, body)] = service.writes
    assert body["model"]["image"]["custom"]["port"] == 9000
    assert body["model"]["env"] == {"PULSE_UI": "1", "PULSE_PORT": "9000"}
    assert run("--env", "PULSE_LOG_LEVEL=debug", "--no-wait")[0] == 0
    kept = {"PULSE_UI": "1", "PULSE_PORT": "9000", "PULSE_LOG_LEVEL": "debug"}
    assert service.writes[-1][2] == {"model": {"env": kept}}  # nothing is lost, wherever the service replaces them all


@needs_env
@pytest.mark.parametrize(
    ("flags", "port", "variable"),
    [
        (("--container", "custom", "--image", "registry.example/pulse:1.1"), 9000, "9000"),  # what it has
        (("--port", "9001"), 9001, "9001"),
        ((*IMAGE, "--port", "8080"), 8080, "8080"),
        ((*IMAGE, "--port", "9001", "--env", "PULSE_PORT=1"), 9001, "1"),
    ],
)
def test_the_service_and_the_server_keep_to_one_port(
    flags: tuple[str, ...], port: int, variable: str, service: EndpointsService, run: Run
) -> None:
    run(*IMAGE, "--port", "9000", "--no-wait")
    status, said = run(*flags, "--no-wait")
    assert status == 0, said
    sent = service.writes[-1][2]["model"]
    assert sent["image"]["custom"]["port"] == port
    assert sent.get("env", {"PULSE_PORT": "9000"}) == {"PULSE_PORT": variable}


def test_the_stock_container_has_no_port(service: EndpointsService, run: Run) -> None:
    status, said = run("--port", "9000")
    assert (status, service.writes) == (1, [])
    assert "--container custom" in said


def test_an_image_with_credentials_is_not_changed(service: EndpointsService, run: Run) -> None:
    run(*IMAGE, "--no-wait")
    service.endpoints["pulse"]["model"]["image"]["custom"]["credentials"] = {
        "username": "someone",
        "password": "redacted",
    }
    assert run("--max-replica", "2", "--no-wait")[0] == 0
    assert run(*IMAGE, "--no-wait")[0] == 0
    count = len(service.writes)
    status, said = run("--container", "custom", "--image", "registry.example/pulse:1.1", "--no-wait")
    assert (status, len(service.writes)) == (1, count)
    assert "credentials would be lost" in said
    assert run("--container", "stock", "--dry-run")[0] == (0 if deploy.SENDS_ENV else 1)


@pytest.mark.skipif(deploy.SENDS_ENV, reason="this huggingface_hub can send variables")
def test_an_old_client_says_what_it_cannot_send(service: EndpointsService, run: Run) -> None:
    status, said = run("--env", "PULSE_UI=1")
    assert (status, service.writes) == (1, [])
    assert "pip install --upgrade huggingface_hub" in said


def test_a_second_run_changes_nothing(service: EndpointsService, run: Run) -> None:
    run("--max-replica", "2", "--no-wait")
    status, said = run("--max-replica", "2")
    assert status == 0, said
    assert "nothing to change" in said
    assert len(service.writes) == 1


def test_an_update_sends_what_changes_and_no_more(service: EndpointsService, run: Run) -> None:
    run("--no-wait")
    status, said = run("--max-replica", "3", "--instance-type", "nvidia-l40s")
    assert status == 0, said
    method, path, body = service.writes[-1]
    assert (method, path) == ("PUT", f"/v2/endpoint/{USER}/pulse")
    assert body == {"compute": {"instanceType": "nvidia-l40s", "scaling": {"maxReplica": 3}}}
    assert "1 -> 3" in said
    assert "nvidia-l4 -> nvidia-l40s" in said


def test_a_rollback_is_the_older_revision(service: EndpointsService, run: Run) -> None:
    run("--no-wait")
    status, said = run("--revision", OLDER)
    assert status == 0, said
    assert service.writes[-1][2] == {"model": {"revision": OLDER}}
    assert f"{NEWER} -> {OLDER}" in said


def test_right_after_an_update_one_look_is_not_enough(service: EndpointsService, run: Run) -> None:
    for before in ("running", "failed"):
        run("--no-wait")
        service.states = [(before, ""), (before, ""), ("updating", ""), ("running", "")]
        status, said = run("--revision", OLDER, "--skip-test")
        assert status == 0, said
        assert " updating" in said


def test_a_dry_run_changes_nothing(service: EndpointsService, run: Run) -> None:
    status, said = run("--dry-run", "--secret", "deep_key")
    assert status == 0
    assert "to be created" in said
    assert "deep_key (values not shown)" in said
    run("--no-wait")
    status, said = run("--dry-run", "--max-replica", "4")
    assert status == 0
    assert "1 -> 4" in said
    assert len(service.writes) == 1


def test_a_failed_deployment_says_why_and_how_to_go_back(service: EndpointsService, run: Run) -> None:
    run("--no-wait", "--revision", OLDER)
    service.states = [("running", ""), ("updating", ""), ("updateFailed", f"exit 1, key {SECRET}")]
    status, said = run("--secret", "deep_key")
    assert status == 1
    assert "exit 1, key ***" in said
    assert f"https://endpoints.huggingface.co/{USER}/endpoints/pulse" in said
    assert f"--revision {OLDER}" in said


def test_waiting_ends(service: EndpointsService, run: Run) -> None:
    service.states = [("initializing", "")]
    status, said = run("--timeout", "0")
    assert status == 1
    assert "Not running after 0 s" in said


def test_a_fault_of_the_service_does_not_end_the_waiting(service: EndpointsService, run: Run) -> None:
    run("--no-wait")
    service.states = [("running", ""), (502, "bad gateway"), ("running", "")]
    status, said = run("--revision", OLDER, "--skip-test")
    assert status == 0, said
    assert "not known (HTTP 502)" in said


def test_a_sleeping_endpoint_is_not_waited_for_and_a_paused_one_is_woken(service: EndpointsService, run: Run) -> None:
    run("--no-wait")
    service.states = [("scaledToZero", "")]
    assert run("--revision", OLDER)[0] == 0
    service.states = [("paused", ""), ("initializing", ""), ("running", "")]
    status, said = run("--skip-test", "--revision", OLDER)
    assert status == 0, said
    assert "will be resumed" in said
    assert service.writes[-1][1] == f"/v2/endpoint/{USER}/pulse/resume"


def test_failing_test_requests_fail_the_deployment(service: EndpointsService, run: Run) -> None:
    service.answer = (200, [{"error": "no", "generated_text": ""}])
    status, said = run()
    assert status == 1
    assert "Test requests failed: question." in said


@pytest.mark.parametrize(
    ("flags", "said_so", "expected"),
    [
        (["--secret", f"deep_key={SECRET}"], "takes no value", 2),
        (["--secret", "UNSET_KEY"], "UNSET_KEY is not set", 2),
        (["--env", f"deep_key={SECRET}"], "use --secret deep_key", 2),
        (["--env", f"HF_TOKEN={SECRET}"], "use --secret HF_TOKEN", 2),
        (["--env", "PULSE_UI"], "NAME=VALUE", 2),
        (["--container", "custom"], "--image go together", 2),
        (["--image", "x:1"], "--image go together", 2),
        (["--min-replica", "3"], "3 to 1 replicas", 1),
        (["--min-replica", "1", "--scale-to-zero-minutes", "15"], "needs --min-replica 0", 1),
        (["--revision", "c" * 40], "has no revision", 1),
        (["--repository", "someone/else"], "cannot be read", 1),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    service: EndpointsService, run: Run, flags: list[str], said_so: str, expected: int
) -> None:
    status, said = run(*flags)
    assert status == expected
    assert said_so in said
    assert service.writes == []


def test_without_replicas_at_rest_nothing_is_scaled_to_zero(service: EndpointsService, run: Run) -> None:
    run("--min-replica", "1", "--no-wait")
    assert service.writes[0][2]["compute"]["scaling"] == {"maxReplica": 1, "minReplica": 1, "scaleToZeroTimeout": None}


def test_what_an_update_cannot_change_is_refused(service: EndpointsService, run: Run) -> None:
    run("--no-wait")
    for flags in (["--region", "eu-west-1"], ["--vendor", "gcp"], ["--access", "public"]):
        status, said = run(*flags)
        assert status == 1
        assert "cannot be changed" in said
    assert len(service.writes) == 1


def test_the_stock_container_needs_this_code(service: EndpointsService, run: Run) -> None:
    service.files.remove("handler.py")
    status, said = run()
    assert (status, service.writes) == (1, [])
    assert "has no handler.py" in said


@pytest.mark.parametrize("kind", sorted(GPU_GB))
def test_small_gpus_are_warned_of(run: Run, kind: str) -> None:
    _, said = run("--dry-run", "--instance-type", f"nvidia-{kind}")
    assert ("Warning: nvidia-" in said) is (GPU_GB[kind] < 24)


@needs_env
def test_quantized_weights_fit_a_small_gpu(run: Run) -> None:
    for kind, warned in (("none", True), ("int8", False)):
        said = run("--dry-run", "--instance-type", "nvidia-t4", "--env", f"PULSE_QUANTIZATION={kind}")[1]
        assert ("Warning: nvidia-t4" in said) is warned


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--instance-type", "intel-spr"], "no GPU"),
        (["--instance-size", "x4"], "a replica uses one GPU"),
        (["--container", "custom", "--image", "registry:5000/pulse"], "the image has no version"),
        (["--container", "custom", "--image", "x/pulse:latest"], "the image has no version"),
    ],
)
def test_what_is_seldom_meant_is_warned_of(run: Run, flags: list[str], warning: str) -> None:
    assert f"Warning: {warning}" in run("--dry-run", *flags)[1]
    assert "Warning" not in run("--dry-run")[1]


@needs_env
def test_several_gpus_are_not_warned_of_where_vllm_uses_them(run: Run) -> None:
    arguments = 'PULSE_VLLM_ARGS={"tensor_parallel_size": 4}'
    said = run("--dry-run", "--instance-size", "x4", "--env", arguments)[1]
    assert "4" in said and "Warning" not in said


def test_weights_from_the_hub_should_be_pinned(service: EndpointsService, run: Run) -> None:
    service.files.pop()
    assert "PULSE_MODEL_REVISION" in run("--dry-run")[1]


def test_secrets_that_are_not_given_again_are_warned_of(
    service: EndpointsService, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER", "value-of-other")
    run("--secret", "deep_key", "--secret", "OTHER", "--no-wait")
    assert "may be lost: OTHER" in run("--secret", "deep_key", "--dry-run")[1]


@pytest.mark.parametrize(("code", "next_step"), [(400, "correct the flag"), (403, "manage Inference Endpoints")])
def test_refusals_say_what_to_do_next(service: EndpointsService, run: Run, code: int, next_step: str) -> None:
    service.refusal = (code, f"wrong value near {SECRET}")
    status, said = run("--secret", "deep_key")
    assert status == 1
    assert f"HTTP {code}: wrong value near ***" in said
    assert next_step in said


def test_a_lost_connection_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "INFERENCE_ENDPOINTS_ENDPOINT", "http://127.0.0.1:1/v2")
    status, said = run()
    assert status == 1
    assert "no connection" in said


GUIDE = (ROOT / "deployment_guide.md").read_text("utf-8").split("\n# ")[1]


@pytest.mark.parametrize("flags", re.findall(r"^\.venv/bin/python deploy\.py (.*)", GUIDE, re.MULTILINE))
def test_the_guides_commands_are_understood(service: EndpointsService, flags: str) -> None:
    args = deploy.parse(shlex.split(flags))
    assert args.name.startswith("pulse")
    assert args.repository.count("/") == 1


def test_the_script_runs_by_itself_and_asks_for_a_token(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, str(ROOT / "deploy.py"), "--name", "pulse", "--repository", "someone/pulse"]
    environ["HF_HOME"] = str(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "Error: There is no token: set HF_TOKEN, or run `hf auth login`.\n"


def of_a_third_kind(service: EndpointsService, run: Run) -> None:
    """Make an endpoint, and let it run a container that this script does not know."""
    run("--no-wait")
    service.endpoints["pulse"]["model"]["image"] = {"vLLM": {"url": "vllm/vllm-openai"}}


def test_a_container_of_a_third_kind_is_not_kept_silently(service: EndpointsService, run: Run) -> None:
    of_a_third_kind(service, run)
    status, said = run("--no-wait")
    assert (status, "vLLM" in said, "--container" in said) == (1, True, True)


@needs_env
def test_a_container_of_a_third_kind_is_not_taken_for_the_stock_one(service: EndpointsService, run: Run) -> None:
    of_a_third_kind(service, run)
    assert run("--container", "stock", "--no-wait")[0] == 0
    assert service.writes[-1][2]["model"]["image"] == {"huggingface": {}}
