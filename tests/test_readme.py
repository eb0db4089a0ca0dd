"""The README is true: its examples run against the real handler, its tables are the code's, its links lead on."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from commentary.faithfulness import check
from monitoring.report import FORMS, IMAGE_SOURCES, OUTCOMES, STAGES
from pulse_ecg import image_file
from pulse_ecg.config import Settings
from pulse_ecg.errors import ParameterError
from pulse_ecg.params import _READERS, load_defaults
from pulse_ecg.request import MAX_BATCH
from scripts.send_test_requests import (
    ANSWER_FIELDS,
    COMMENTARY_FIELDS,
    COMMENTARY_STATUSES,
    DETAILS_FIELDS,
    drawn_sample,
)
from tests.commentary_service import answer, chat_server
from tests.endpoint_server import EndpointServer, demo_handler, endpoint_server
from utils import PerformanceMonitor, RequestReport

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
OUR_SERVER = README[README.index("## Our own server") : README.index("## Parity")]  # run in test_serve_readme.py
CONTAINER = README.replace(OUR_SERVER, "")
GUIDE = (ROOT / "deployment_guide.md").read_text("utf-8")
ENGLISH, TURKISH = GUIDE.split("\n# ")[1:]
ENDPOINT, TOKEN, IMAGE_URL = (
    "https://YOUR-ENDPOINT.endpoints.huggingface.cloud",
    "hf_YOUR_TOKEN",
    "https://example.org/ecg.jpg",
)
MOST_NEW_TOKENS = 8
SCRIPTS = ("scripts/send_test_requests.py", "scripts/check_commentary_service.py", "deploy.py")
OPTIONS = {script: set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text("utf-8"))) for script in SCRIPTS}
# Would install an environment, need an account, or not end; make's targets are checked.
NOT_RUN = (
    "make ",
    "git ",
    "docker ",
    ".venv/bin/python serve.py ",
    "python3.11 -m venv ",
    "export ",
    ".venv/bin/hf ",
    "PULSE_DEVICE=",
)


def blocks(language: str, text: str = CONTAINER) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of a section's first table."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointServer]:
    with (
        demo_handler(tmp_path_factory.mktemp("checkpoint")) as handler,
        endpoint_server(handler, most_new_tokens=MOST_NEW_TOKENS) as server,
    ):
        yield server


@pytest.fixture
def folder(server: EndpointServer, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """Where the examples run: it holds the sample as ecg.jpg, which the server serves too."""
    if "/ecg.jpg" not in server.files:
        server.files["/ecg.jpg"] = drawn_sample(tmp_path_factory.mktemp("image")).read_bytes()
    (tmp_path / "ecg.jpg").write_bytes(server.files["/ecg.jpg"])
    server.bodies.clear()
    server.tokens.clear()
    return tmp_path


def localised(block: str, server: EndpointServer) -> str:
    block = block.replace(ENDPOINT, server.url).replace(IMAGE_URL, f"{server.url}/ecg.jpg")
    return block.replace(".venv/bin/", f"{Path(sys.executable).parent}/").replace("scripts/", f"{ROOT}/scripts/")


def run(command: list[str], folder: Path, server: EndpointServer) -> str:
    """What a command prints; it must end well and say nothing on stderr."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "HOME": str(folder), "LANG": "C.UTF-8", "ENDPOINT_URL": server.url, "HF_TOKEN": TOKEN}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- the examples


CURLS = [block for block in blocks("bash") if "curl " in block]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", CURLS, ids=lambda block: str(CURLS.index(block)))
def test_curl_examples_get_answers(block: str, folder: Path, server: EndpointServer) -> None:
    answer = json.loads(
        run(["bash", "-ec", localised(block, server).replace("curl ", "curl -sS --fail ")], folder, server)
    )
    [body] = server.bodies
    items = body["inputs"] if isinstance(body["inputs"], list) else [body["inputs"]]
    commented = (body.get("parameters") or {}).get("enable_turkish_commentary", True)
    assert [set(record) for record in answer] == [{*ANSWER_FIELDS, *(COMMENTARY_FIELDS if commented else [])}] * len(
        items
    )
    assert all(record["generated_text"] for record in answer)
    assert server.tokens == [f"Bearer {TOKEN}"]


def test_curl_examples_show_every_form() -> None:
    everything = "\n".join(CURLS)
    for sign in (
        f'"image": "{IMAGE_URL}"',
        "base64 <",
        '"inputs": "',
        '"messages"',
        '"inputs": [',
        "Content-Type: image/jpeg",
    ):
        assert sign in everything
    assert everything.count('"enable_turkish_commentary": true') >= 2


def test_python_examples_run(
    folder: Path, server: EndpointServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(localised(block, server), "README.md", "exec"), namespace)
    assert len(capsys.readouterr().out.splitlines()) >= 3
    base64_body, url_body, text_body = server.bodies
    image_defaults = {"max_new_tokens": 512, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.05}
    image_defaults |= {"deepseek_timeout": 30, "enable_turkish_commentary": True}
    assert base64_body["parameters"] == image_defaults
    assert url_body["parameters"] == {**image_defaults, "enable_turkish_commentary": False}
    assert url_body["inputs"] == {"query": "What is the rhythm?", "image": f"{server.url}/ecg.jpg"}
    text_defaults = {"temperature": 0.7, "top_p": 0.95, "do_sample": True, "enable_turkish_commentary": True}
    assert text_body["parameters"] == {"max_new_tokens": 200, **text_defaults}
    client = namespace["PULSEEndpoint"](server.url, TOKEN)
    assert client.analyze_text("What is a delta wave?")["generated_text"]
    assert server.bodies[-1]["parameters"] == {"max_new_tokens": 256, **text_defaults}
    client.headers["Content-Type"] = "text/plain"
    with pytest.raises(RuntimeError, match=r"400.*not supported"):
        client.analyze_text("What is a delta wave?")


def node(script: str, folder: Path, server: EndpointServer) -> str:
    file = folder / "example.mjs"
    file.write_text(localised(script, server), "utf-8")
    return run(["node", str(file)], folder, server)


def test_javascript_examples_run(folder: Path, server: EndpointServer) -> None:
    more = """
import { readFileSync } from "node:fs";
const blob = new Blob([readFileSync("ecg.jpg")]);
const off = { temperature: 0, enableTurkishCommentary: false };
const same = await endpoint.analyzeImageBase64(blob, "What is the rhythm?", off);
const url = await endpoint.analyzeImageUrl("https://example.org/ecg.jpg", "What is the rhythm?", { temperature: 0 });
if (!same.generated_text || same.generated_text !== url.generated_text) throw new Error("the answers differ");
await endpoint.analyzeText("What is a delta wave?", {
  maxNewTokens: 4, temperature: 1, topP: 0.5, doSample: false, repetitionPenalty: 1.2, enableTurkishCommentary: false,
  deepseekTimeout: 20,
});
"""
    assert node("\n".join(blocks("javascript")) + more, folder, server)
    image, text, _, _, given = [body["parameters"] for body in server.bodies]
    shared = {"do_sample": True, "enable_turkish_commentary": True}
    image_defaults = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.05, "deepseek_timeout": 30}
    assert image == {"max_new_tokens": 256, **image_defaults, **shared}
    assert text == {
        "max_new_tokens": 256,
        "temperature": 0.7,
        "top_p": 0.95,
        **shared,
        "enable_turkish_commentary": False,
    }
    assert given == {
        "max_new_tokens": 4,
        "temperature": 1,
        "top_p": 0.5,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "enable_turkish_commentary": False,
        "deepseek_timeout": 20,
    }


def test_the_browser_page_sends_a_bare_string_and_shows_the_answer(folder: Path, server: EndpointServer) -> None:
    [page] = blocks("html")
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    elements = {name: {} for name in re.findall(r'id="(\w+)"', page)}
    browser = f"""
const elements = {json.dumps(elements)};
elements.question.value = "What is a delta wave?";
elements.ask.addEventListener = (event, act) => (elements.ask[event] = act);
globalThis.document = {{ getElementById: (id) => elements[id] }};
{script}
await elements.ask.click();
console.log(JSON.stringify([elements.answer.textContent, elements.commentary.textContent]));
"""
    answer, commentary = json.loads(node(browser, folder, server))
    assert server.bodies == [{"inputs": "What is a delta wave?"}]
    assert answer
    assert "HTTP" not in answer
    assert commentary == ""  # no key, no commentary
    assert server.tokens == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "guide"])
def test_shell_blocks_are_run_or_known(text: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for block in blocks("bash", text):
        for line in block.splitlines():
            assert not (target := re.match(r"make ([a-z-]+)", line)) or target[1] in targets
        known = "curl " in block or any(script in block for script in SCRIPTS) or block.startswith(NOT_RUN)
        for script in SCRIPTS:
            assert options(" ".join(re.findall(rf"{re.escape(script)} .*", block))) <= OPTIONS[script]
        assert known, block
    for name in re.findall(r"`make ([a-z-]+)`", text):
        assert name in targets


def test_the_script_is_called_as_the_readme_says(folder: Path, server: EndpointServer) -> None:
    [block] = [block for block in blocks("bash") if "send_test_requests.py" in block]
    script = localised(block, server)
    assert " 0 failed" in run(["bash", "-ec", script.rstrip() + " --image ecg.jpg --only image-base64"], folder, server)
    assert server.tokens == [""]  # the block's HF_TOKEN is for endpoints at Hugging Face


def test_the_commentary_service_is_checked_as_the_readme_says(folder: Path, server: EndpointServer) -> None:
    [block] = [block for block in blocks("bash") if "check_commentary_service.py" in block]
    turkish = "Kalbiniz doğal ritminde ama yavaş, dakikada 48 kez atıyor (sinüs bradikardisi). Uyarı gecikerek "
    turkish += "geçiyor (birinci derece AV blok, PR 220 ms). ST yükselmesi görülmüyor. Bu bir tanı değildir."
    with chat_server(answer(turkish)) as service:
        command = localised(block, server).replace("http://127.0.0.1:8000/v1", service.url)
        record = json.loads(run(["bash", "-ec", command], folder, server))
    assert (record["commentary_status"], record["comment_text"]) == ("success", turkish)
    assert service.requests[0][1]["model"] == "YOUR_MODEL"


def test_metrics_and_fields_are_those_of_the_monitor(server: EndpointServer) -> None:
    """Every metric and every label's value, and the log line's fields, under the names that the code gives them."""
    monitoring = README.split("\n## Monitoring\n", 1)[1].split("\n## ", 1)[0]
    exposed = set(re.findall(r"^# TYPE (pulse_\w+)", PerformanceMonitor().prometheus_text(), re.MULTILINE))
    named = {name.removesuffix("_total") for name in re.findall(r"`(pulse_\w+)`", monitoring)}
    assert named == {name.removesuffix("_total") for name in exposed if not name.endswith("_created")}
    for value in (*FORMS, *IMAGE_SOURCES, *set(OUTCOMES) - {"cancelled"}, "off"):
        assert f"`{value}`" in monitoring
    for line in re.findall(r'^{"event".*', monitoring, re.MULTILINE):
        shown = json.loads(line.replace("…", "0"))
        assert set(shown["seconds"]) <= set(STAGES)
        assert set(shown) <= {"event", "image", "commentary", "seconds", *vars(RequestReport())}


def test_faithfulness_rates_are_those_measured() -> None:
    rows = table("Turkish commentary")
    for row, name in zip(rows, ("commentary_pairs_held_out.json", "commentary_pairs.json"), strict=True):
        pairs = json.loads((ROOT / "tests/data" / name).read_text("utf-8"))
        for cell, planted in zip(row[1:], (True, False), strict=True):
            found = [bool(check(pair["en"], pair["tr"])) for pair in pairs if bool(pair["fault"]) is planted]
            assert cell.startswith(f"{sum(found)} of {len(found)}")
        assert row[0].startswith(str(len(pairs)))


def options(command: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", command))


# --- what it says


def test_json_examples_are_what_the_code_answers(folder: Path, server: EndpointServer) -> None:
    [[success], details, [error]] = map(json.loads, blocks("json"))
    assert list(success) == [*ANSWER_FIELDS, *COMMENTARY_FIELDS]
    assert sorted(details) == DETAILS_FIELDS
    [wrong] = server.endpoint({"inputs": "?", "parameters": {"max_new_tokens": 5000}})
    assert error == {**wrong, "model": "PULSE-7B"}
    image = (folder / "ecg.jpg").read_bytes()
    inputs = {"query": "?", "image": base64.b64encode(image).decode()}
    [record] = server.endpoint({"inputs": inputs, "parameters": {"details": True, "max_new_tokens": 1}})
    assert list(record["details"]["timings"]) == list(details["timings"])
    assert list(record["details"]) == list(details)


def test_parameters_are_those_of_the_code() -> None:
    rows = {name.strip("`"): (default, accepted) for name, _, default, accepted in table("Parameters")}
    assert list(rows) == list(_READERS)
    defaults = load_defaults(ROOT)
    for name, (default, accepted) in rows.items():
        value = getattr(defaults, name)
        said = None if default == "none" else json.loads(default.strip("`"))
        assert said == (list(value) if isinstance(value, tuple) else value), name
        if bounds := re.match(r"([\d.]+) to ([\d.]+)", accepted):
            low, high = map(json.loads, bounds.groups())
            assert (_READERS[name](name, low), _READERS[name](name, high)) == (low, high)
            for beyond in (low - 1 if isinstance(low, int) else low / 2, high + 1):
                with pytest.raises(ParameterError, match=name):
                    _READERS[name](name, beyond)


class Recorder(dict[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self, **values: str) -> None:
        super().__init__(values)
        self.asked: list[str] = []

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        self.asked.append(name)
        return super().get(name, default)


def test_environment_variables_are_those_of_the_code() -> None:
    environment = Recorder()
    plain = Settings.from_env(environment)
    rows = table("Environment variables")
    assert {name.strip("`") for name, *_ in rows} == set(environment.asked)
    for name, default, *_ in rows:
        if default != "none":
            assert Settings.from_env({name.strip("`"): default.strip("`")}) == plain, name
            assert default.strip("`") in {str(int(v) if isinstance(v, bool) else v) for v in values(plain)}, name


def values(settings: Settings) -> list[Any]:
    return [getattr(settings, field.name) for field in fields(settings)]


def test_limits_are_those_of_the_code() -> None:
    assert f"at most {MAX_BATCH};" in README
    assert f"{image_file.MAX_PIXELS // 10**6} megapixels and {image_file.MAX_SIDE:,} pixels" in README
    assert [status.strip("`") for status, _ in table("Responses")] == list(COMMENTARY_STATUSES)


@pytest.mark.parametrize(("text", "point"), [(README, "."), (ENGLISH, "."), (TURKISH, ",")])
def test_memory_sums_add_up(text: str, point: str) -> None:
    weights, cache = 14_125_813_760, 2 * 32 * 4096 * 2 * 4096
    for size in (weights, cache, weights + cache, 2 * (weights + cache)):
        assert f"{size / 2**30:.1f}".replace(".", point) + " GiB" in text


@pytest.mark.parametrize(("half", "point"), [(ENGLISH, "."), (TURKISH, ",")])
def test_costs_are_hours_times_price(half: str, point: str) -> None:
    rows = re.findall(r"^\| `\w+` `nvidia-\w+`.*", half, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        plain = [cell.replace("." if point == "," else ",", "").replace(point, ".") for cell in row.split("|")[2:5]]
        price, always, working = map(float, plain)
        assert (always, working) == (round(730 * price, 2), round(176 * price, 2))
    assert f"{0.8 * (6 + 4 + 15) / 60:.2f}".replace(".", point) in half


def test_the_guides_halves_say_the_same() -> None:
    """As far as a machine can tell: the same commands, the same rows, the same names."""
    for language in ("bash", "yaml"):
        assert blocks(language, ENGLISH) == blocks(language, TURKISH)
    for sign in (r"^## \d", r"^\|", r"^\d\. ", r"^- "):
        counts = [len(re.findall(sign, half, re.MULTILINE)) for half in (ENGLISH, TURKISH)]
        assert counts[0] == counts[1], sign
    names = [
        set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", half, flags=re.M | re.S)))
        for half in (ENGLISH, TURKISH)
    ]
    assert names[0] == names[1]


def test_prometheus_is_sent_to_the_ports_of_the_guides_replicas() -> None:
    [block] = blocks("yaml", ENGLISH)
    [job] = yaml.safe_load(block)["scrape_configs"]
    assert job.keys() == {"job_name", "authorization", "static_configs"}  # its path is /metrics where none is named
    ports = re.findall(r"serve\.py --model weights --port (\d+) --drain-delay", ENGLISH)
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}" for port in ports]}]


def test_front_matter_is_the_hubs() -> None:
    head = yaml.safe_load(README.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert head["language"] == ["tr", "en"]
    assert {"PULSE-ECG/ECGInstruct", "PULSE-ECG/ECGBench", "PULSE-ECG/ecg-log"} <= set(head["datasets"])
    assert head["tags"]


def anchor(heading: str) -> str:
    """GitHub's and the hub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "guide"])
def test_relative_links_lead_somewhere(text: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https"
        elif parts.path:
            assert (ROOT / parts.path).exists(), link
        else:
            assert parts.fragment in anchors, link


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|json|txt|md))`", README + GUIDE):
        assert (ROOT / name).exists() or name in ("tokenizer_config.json", "config.json"), name
