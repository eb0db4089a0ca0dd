"""Under `hf-endpoints-emulator`, which hosts a handler as the stock container does: real HTTP, real cURL."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from demo.ecg_image import read_recording, render

ROOT = Path(__file__).parents[1]
START_S = 120

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def repository(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed repository: our code beside the checkpoint's files, under names that the container downloads."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(demo_checkpoint, folder, dirs_exist_ok=True)
    for name in ("handler.py", "utils.py", "generation_config.json", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for package in ("pulse_ecg", "commentary", "monitoring"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def endpoint(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PULSE_", "PYTHON", "DEEPSEEK", "deep_key"))
    }
    log = (tmp_path_factory.mktemp("emulator") / "log").open("w+")
    # Started from another folder than the repository, as the container's server is.
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "hf_endpoints_emulator.cli",
            "--handler",
            str(repository / "handler.py"),
            "--port",
            str(port),
        ],
        env=environment | {"PULSE_DEVICE": "cpu"},
        cwd=repository.parent,
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_S * 5):
            if process.poll() is not None:
                break
            try:
                requests.get(f"{url}/health", timeout=1).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.2)
        if process.poll() is not None:
            log.seek(0)
            pytest.fail(f"the emulator ended: {log.read()[-2000:]}")
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ecg") / "ecg.jpg"
    render(read_recording()).save(file, quality=80)
    return file


def curl(url: str, *, body: bytes, content_type: str) -> tuple[int, Any]:
    command = ["curl", "--silent", "--show-error", "--max-time", "120", "--write-out", "\n%{http_code}", url]
    command += ["--header", f"Content-Type: {content_type}", "--data-binary", "@-"]
    output = subprocess.run(command, input=body, check=True, capture_output=True).stdout.decode()
    answer, status = output.rsplit("\n", 1)
    return int(status), json.loads(answer)


def post(url: str, body: Any) -> tuple[int, Any]:
    return curl(url, body=json.dumps(body).encode(), content_type="application/json")


def test_a_jpeg_in_base64_is_answered(endpoint: str, jpeg: Path) -> None:
    inputs = {"query": "What is the rhythm?", "image": base64.b64encode(jpeg.read_bytes()).decode()}
    parameters = {"max_new_tokens": 8, "do_sample": False, "details": True}
    status, records = post(endpoint, {"inputs": inputs, "parameters": parameters})
    assert status == 200
    (record,) = records
    assert record["generated_text"]
    assert record["commentary_status"] == "api_key_missing"
    assert record["details"]["image_tokens"] == 5 * 36
    without = post(endpoint, {"inputs": inputs["query"], "parameters": parameters})[1][0]
    assert without["generated_text"] != record["generated_text"]


def test_a_raw_jpeg_body_gets_the_default_question(endpoint: str, jpeg: Path) -> None:
    status, records = curl(endpoint, body=jpeg.read_bytes(), content_type="image/jpeg")
    assert status == 200
    assert records[0]["generated_text"]


def test_a_wrong_parameter_is_a_record_that_names_it(endpoint: str) -> None:
    status, records = post(endpoint, {"inputs": "Rate?", "parameters": {"max_new_token": 8}})
    assert status == 200
    assert "Did you mean 'max_new_tokens'" in records[0]["error"]
    assert records[0]["success"] is False


def test_a_batch_answers_what_it_can(endpoint: str) -> None:
    inputs = ["Rate?", {"query": "Rhythm?", "image": "http://127.0.0.1/ecg.png"}, "Axis?"]
    _, records = post(endpoint, {"inputs": inputs, "parameters": {"max_new_tokens": 2}})
    assert ["error" in record for record in records] == [False, True, False]


def test_the_container_can_load_the_repository_by_its_file_names(repository: Path) -> None:
    """Names of these beginnings or endings are not downloaded when a repository holds safetensors."""
    import fnmatch

    skipped = ("tf*", "rust*", "flax*", "pytorch*", "*onnx*", "*openvino*", "*ckpt", "*tar.gz", "*mlmodel", "*tflite")
    names = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
    assert [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in skipped)] == []
