"""The container, as far as it can be tested without building it: what it copies is replayed, then run in its place."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
LINES = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
INSTRUCTIONS = [tuple(line.split(maxsplit=1)) for line in LINES if line.strip()]
START_S = 120


def of(name: str) -> list[str]:
    """The arguments of an instruction, each time it stands there."""
    return [argument for instruction, argument in INSTRUCTIONS if instruction == name]


ENVIRONMENT = dict(pair.split("=", 1) for line in of("ENV") for pair in shlex.split(line))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's working directory."""
    app = tmp_path_factory.mktemp("image") / "app"
    app.mkdir()
    for line in of("COPY"):
        *sources, target = shlex.split(line)
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, app / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, app / target)
    return app


def imported(file: Path) -> set[str]:
    """The modules that a file names in imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def project_files(start: str) -> set[Path]:
    """The project's files that a script imports, at first or second hand, relative to the root."""
    found, left = set(), [Path(start)]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        for module in imported(ROOT / file):
            path = Path(*module.split("."))
            parents = [parent / "__init__.py" for parent in (path, *path.parents)]
            left += [name for name in (path.with_suffix(".py"), *parents) if name.parts and (ROOT / name).is_file()]
    return found


def test_every_file_that_the_server_imports_is_copied(app: Path) -> None:
    needed = project_files("serve.py")
    assert {Path("handler.py"), Path("server/run.py"), Path("pulse_ecg/analyzer.py")} <= needed
    assert {str(file) for file in needed if not (app / file).exists()} == set()


def test_nothing_else_is_copied(app: Path) -> None:
    folders = {"commentary", "monitoring", "pulse_ecg", "server", "ui"}
    assert {path.name for path in app.iterdir() if path.is_dir()} == folders
    suffixes = {path.suffix for path in app.rglob("*") if path.is_file()}
    assert suffixes <= {"", ".py", ".json", ".txt", ".md", ".js", ".css", ".html", ".svg"}
    assert sum(path.stat().st_size for path in app.rglob("*")) < 2_000_000


def test_what_is_copied_is_all_that_the_builder_is_sent() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    copied = {source.rstrip("/") for line in of("COPY") for source in shlex.split(line)[:-1]}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert "**/__pycache__" in rules


def test_the_base_is_pinned_and_has_cuda() -> None:
    [base] = of("FROM")
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-cuda\d+\.\d+-\S*runtime", base)


def test_the_libraries_are_those_of_the_requirements_at_pinned_versions() -> None:
    [command] = [line for line in of("RUN") if "pip install" in line]
    assert "--no-cache-dir" in command
    assert "-r requirements-serve.txt -c /tmp/constraints.txt" in command
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    required = set()
    for file in ("requirements.txt", "requirements-serve.txt"):
        required |= set(re.findall(r"^([\w-]+)", (ROOT / file).read_text("utf-8"), re.MULTILINE)) - {"-r"}
        assert file in TEXT.split("RUN sed")[0]  # copied before it is installed
    normal = {name.lower().replace("_", "-") for name in pinned}
    assert {name.lower().replace("_", "-") for name in required if name[0] != "-"} <= normal
    [torch] = re.findall(r"^torch.*", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    assert torch == "torch>=2.5"  # which the base's own torch meets


def test_the_server_runs_without_privileges_and_owns_none_of_its_code() -> None:
    [user] = of("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)  # a number: a cluster can check that it is not root
    assert INSTRUCTIONS.index(("USER", user)) > max(
        number for number, (name, _) in enumerate(INSTRUCTIONS) if name in ("RUN", "COPY")
    )
    assert "--chown" not in TEXT
    assert "chown" not in " ".join(of("RUN"))


def test_the_model_is_the_mounted_one_and_the_port_can_be_set() -> None:
    assert ENVIRONMENT["PULSE_MODEL_PATH"] == "/repository"
    assert ENVIRONMENT["PULSE_HOST"] == "0.0.0.0"
    assert of("EXPOSE") == [ENVIRONMENT["PULSE_PORT"]]
    assert not any(re.search("key|token|secret", name, re.IGNORECASE) for name in ENVIRONMENT)


def health_check() -> list[str]:
    [line] = of("HEALTHCHECK")
    return json.loads(line.split("CMD", 1)[1])


def test_the_layers_of_the_code_come_last() -> None:
    order = [name for name, _ in INSTRUCTIONS]
    assert order.index("RUN") < len(order) - order[::-1].index("COPY")
    assert len(of("RUN")) + len(of("COPY")) <= 10


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.vllm"])
def test_the_linter_is_content(name: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")  # of this environment
    done = subprocess.run([linter, ROOT / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_with_vllm_differs_in_its_base_and_its_engine_alone() -> None:
    other = (ROOT / "Dockerfile.vllm").read_text("utf-8")
    [base] = re.findall(r"^FROM (.*)$", other, re.MULTILINE)
    [needed] = re.findall(r"^vllm>=(\S+),<", (ROOT / "requirements-vllm.txt").read_text("utf-8"), re.MULTILINE)
    assert re.fullmatch(rf"vllm/vllm-openai:v{re.escape(needed)}\.\d+", base)
    code = r"^COPY (?:LICENSE .*|\w+/ \w+/)$"
    assert len(found := re.findall(code, TEXT, re.MULTILINE)) > 5
    assert re.findall(code, other, re.MULTILINE) == found
    for line in re.findall(r"^(?:USER|EXPOSE|STOPSIGNAL|HEALTHCHECK|WORKDIR) .*", TEXT, re.MULTILINE):
        assert line in other
    for name, value in ENVIRONMENT.items():
        assert f"{name}={value}" in other
    assert "PULSE_ENGINE=vllm" in other


def test_the_image_serves_says_when_it_is_healthy_and_stops_when_told(app: Path, demo_checkpoint: Path) -> None:
    """The image's files, variables, entry point, health check and stop signal, with this machine's libraries."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | ENVIRONMENT
    environ |= {"PULSE_MODEL_PATH": str(demo_checkpoint), "PULSE_PORT": str(port), "PULSE_HOST": "127.0.0.1"}
    environ |= {"PULSE_DEVICE": "cpu", "PULSE_UI": "1", "HF_HOME": str(app.parent)}
    [stop], [entry] = of("STOPSIGNAL"), of("ENTRYPOINT")
    python, *arguments = json.loads(entry)
    assert python == health_check()[0] == "python"
    server = subprocess.Popen([sys.executable, *arguments], cwd=app, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_S
        proxied = environ | {"http_proxy": "http://127.0.0.1:9"}  # as behind a company's proxy, which cannot reach it
        while subprocess.run(
            [sys.executable, *health_check()[1:]], env=proxied, capture_output=True, check=False
        ).returncode:
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.send_signal(signal.Signals[stop])
        server.communicate(timeout=60)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate()
