"""OpenAI's JavaScript package against our own server."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from handler import EndpointHandler
from tests.our_server import ROOT, our_server

SOURCE = ROOT / "tests" / "js"
INSTALLED = ROOT / "build" / "openai-js"

# The environment's own Node.js before the system's.
ENVIRONMENT = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


@pytest.fixture(scope="module")
def script() -> Path:
    """The script beside the package that it imports, which is installed once for each of its versions."""
    manifest = (SOURCE / "package.json").read_text("utf-8")
    marker = INSTALLED / "complete"
    if not marker.exists() or marker.read_text("utf-8") != manifest:
        INSTALLED.mkdir(parents=True, exist_ok=True)
        (INSTALLED / "package.json").write_text(manifest, "utf-8")
        command = [
            "npm",
            "install",
            "--prefix",
            str(INSTALLED),
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--silent",
        ]
        subprocess.run(command, check=True, timeout=240, env=ENVIRONMENT)
        marker.write_text(manifest, "utf-8")
    return Path(shutil.copy(SOURCE / "talk.mjs", INSTALLED))


def test_openais_javascript_package(script: Path, handler: EndpointHandler, sample_png: bytes) -> None:
    image = f"data:image/png;base64,{base64.b64encode(sample_png).decode()}"
    with our_server(handler) as server:
        command = ["node", str(script), f"{server.url}/v1", image]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT)
        assert (run.returncode, run.stderr) == (0, "")
        server.quiet()  # the one that hung up too
    told = json.loads(run.stdout)
    parameters = {"temperature": 0, "max_new_tokens": 12, "enable_turkish_commentary": False, "details": True}
    [record] = handler({"inputs": {"query": "What is the rate?", "image": image}, "parameters": parameters})
    assert told["whole"] == told["text"] == record["generated_text"]
    assert told["usage"] == told["whole_usage"]
    assert told["usage"]["prompt_tokens"] == record["details"]["prompt_tokens"]
    ending = {"eos": "stop", "stop": "stop", "length": "length"}[record["details"]["finish_reason"]]
    assert (told["commentary"], told["finish"]) == ("api_key_missing", ending)
    assert told["error"] == {
        "status": 400,
        "param": "temperature",
        "type": "invalid_request_error",
        "name": "BadRequestError",
    }
    assert told["models"] == [handler.model_name]
