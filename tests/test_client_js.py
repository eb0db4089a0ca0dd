"""The JavaScript client: its own tests in Node.js, its types, its README, and the real handler behind it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.send_test_requests import ANSWER_FIELDS, COMMENTARY_FIELDS, ERROR_FIELDS, drawn_sample
from tests.endpoint_server import EndpointServer, demo_handler, endpoint_server
from tests.our_server import server_process

PACKAGE = Path(__file__).parents[1] / "clients/js"
MANIFEST = json.loads((PACKAGE / "package.json").read_text("utf-8"))
README = (PACKAGE / "README.md").read_text("utf-8")
ENDPOINT, IMAGE_URL = "https://YOUR-ENDPOINT.endpoints.huggingface.cloud", "https://example.org/ecg.jpg"

# The environment's own Node.js before the system's.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def run(*command: str, folder: Path) -> str:
    """What a command prints; it must end well."""
    program = shutil.which(command[0], path=PATH)
    assert program, f"{command[0]} is not installed; pip install -r requirements-dev.txt brings it"
    environment = {**os.environ, "PATH": PATH}  # npm needs what it says of proxies and certificates
    done = subprocess.run(
        [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointServer]:
    with (
        demo_handler(tmp_path_factory.mktemp("checkpoint")) as handler,
        endpoint_server(handler, most_new_tokens=8) as server,
    ):
        server.files["/ecg.jpg"] = drawn_sample(tmp_path_factory.mktemp("image")).read_bytes()
        yield server


@pytest.fixture(scope="module")
def own(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with server_process(folder, "--model", str(demo_checkpoint), PULSE_ALLOW_PRIVATE_IMAGE_URLS="1") as server:
        yield server.url


@pytest.fixture
def folder(tmp_path: Path, server: EndpointServer) -> Path:
    """A project that has the package installed, and an image."""
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules/pulse-ecg-client").symlink_to(PACKAGE, target_is_directory=True)
    (tmp_path / "ecg.jpg").write_bytes(server.files["/ecg.jpg"])
    server.bodies.clear()
    return tmp_path


def node(script: str, folder: Path, server: EndpointServer) -> str:
    (folder / "example.mjs").write_text(
        script.replace(ENDPOINT, server.url).replace(IMAGE_URL, f"{server.url}/ecg.jpg")
    )
    return run("node", "example.mjs", folder=folder)


def test_its_own_tests_pass() -> None:
    files = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.glob("test/*.test.js"))
    assert files
    run("node", "--test", *files, folder=PACKAGE)


def test_its_types_accept_what_they_must_and_refuse_the_rest() -> None:
    version = MANIFEST["devDependencies"]["typescript"]
    installed = PACKAGE / "node_modules/typescript/package.json"
    if not installed.exists() or json.loads(installed.read_text("utf-8"))["version"] != version:
        run("npm", "install", "--no-package-lock", "--no-audit", "--no-fund", folder=PACKAGE)
    run("npm", "run", "types", folder=PACKAGE)


def test_its_types_name_what_it_exports(folder: Path, server: EndpointServer) -> None:
    exported = json.loads(
        node('import * as all from "pulse-ecg-client"; console.log(JSON.stringify(Object.keys(all)));', folder, server)
    )
    types = (PACKAGE / "pulse-ecg-client.d.ts").read_text("utf-8")
    assert sorted(exported) == sorted(re.findall(r"^export (?:const|class|function) (\w+)", types, re.MULTILINE))


def test_it_needs_nothing_that_browsers_lack(folder: Path, server: EndpointServer) -> None:
    """It imports nothing, and works where these globals and the language's own are all there is."""
    source = (PACKAGE / "pulse-ecg-client.js").read_text("utf-8")
    assert not re.search(r"^\s*import\b|\brequire\(|\bimport\(", source, re.MULTILINE)
    script = """
import { readFileSync } from "node:fs";
import { runInNewContext } from "node:vm";
const fetch = async (url, request) => new Response(JSON.stringify([{ url, ...JSON.parse(request.body) }]));
const web = { AbortController, Blob, btoa, clearTimeout, fetch, Response, setTimeout, TextDecoder, URL };
const location = new URL("https://example.org/page/");
const source = readFileSync("node_modules/pulse-ecg-client/pulse-ecg-client.js", "utf8");
const asked = 'new PULSEEndpoint("./pulse").analyzeImageBase64(new Blob(["GIF89a"]), "?")';
const context = { ...web, location };
context.globalThis = context;
console.log(JSON.stringify(await runInNewContext(source.replace(/^export /gm, "") + asked, context)));
"""
    sent = json.loads(node(script, folder, server))
    assert sent["url"] == "https://example.org/page/pulse"
    assert sent["inputs"] == {"query": "?", "image": "data:image/gif;base64,R0lGODlh"}


HOSTS = ["container", "server"]


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_of_the_real_handler_answer_it(
    host: str, folder: Path, server: EndpointServer, request: pytest.FixtureRequest
) -> None:
    script = f"""
import {{ readFile }} from "node:fs/promises";
import {{ imagePart, PULSEEndpoint }} from "pulse-ecg-client";
const endpoint = new PULSEEndpoint("{request.getfixturevalue("own") if host == "server" else ENDPOINT}", "hf_token");
const image = await readFile("ecg.jpg");
const query = "What is the rhythm?";
const greedy = {{ doSample: false, maxNewTokens: 8, enableTurkishCommentary: false }};
const message = {{ role: "user", content: [{{ type: "text", text: query }}, await imagePart(image)] }};
const same = [
  await endpoint.analyzeImageBase64(new Blob([image]), query, greedy),
  await endpoint.analyzeImageUrl("{IMAGE_URL}", query, greedy),
  await endpoint.chat([message], greedy),
  ...(await endpoint.analyzeBatch([{{ query, image }}], greedy)),
];
const events = [];
for await (const event of endpoint.stream(query, {{ doSample: false, maxNewTokens: 24 }})) events.push(event);
const refused = await endpoint.analyzeText("?", {{ maxNewTokens: 5000 }}).catch((error) => error.records[0]);
console.log(JSON.stringify({{ same, events, refused }}));
"""
    got: dict[str, Any] = json.loads(node(script, folder, server))
    first, *others = got["same"]
    assert (list(first), others) == (ANSWER_FIELDS, [first] * 3)
    assert first["generated_text"]
    start, *pieces, answer, last = got["events"]
    assert [event["type"] for event in (start, answer, last)] == ["start", "answer", "record"]
    assert {event["type"] for event in pieces} == {"text"}
    assert (len(pieces) > 1) is (host == "server")
    assert start["model"] == answer["record"]["model"]
    assert "".join(piece["text"] for piece in pieces) == last["record"]["generated_text"] != first["generated_text"]
    assert (list(answer["record"]), list(last["record"])) == (ANSWER_FIELDS, [*ANSWER_FIELDS, *COMMENTARY_FIELDS])
    assert sorted(got["refused"]) == ERROR_FIELDS
    assert "max_new_tokens" in got["refused"]["error"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_the_readmes_examples_run(number: int, folder: Path, server: EndpointServer) -> None:
    examples = blocks("javascript")
    assert len(examples) == 2
    printed = node(examples[number], folder, server)
    assert len(printed.splitlines()) >= 3
    assert "Not answered" not in printed


def test_the_readmes_page_shows_the_answer(folder: Path, server: EndpointServer) -> None:
    [page] = blocks("html")
    [script] = re.findall(r'<script type="module">(.*?)</script>', page, re.DOTALL)
    elements: dict[str, Any] = {name: {} for name in re.findall(r'id="(\w+)"', page)}
    browser = f"""
import {{ readFileSync }} from "node:fs";
const elements = {json.dumps(elements)};
elements.ask.addEventListener = (event, act) => (elements.ask[event] = act);
elements.file.files = [new Blob([readFileSync("ecg.jpg")])];
globalThis.document = {{ getElementById: (id) => elements[id] }};
globalThis.location = new URL("{ENDPOINT}");
{script.replace("./pulse-ecg-client.js", "pulse-ecg-client")}
await elements.ask.click();
console.log(elements.answer.textContent);
"""
    printed = node(browser, folder, server)
    assert len(printed) > 1
    assert "HTTP" not in printed
    assert ["stream" in body for body in server.bodies] == [True, False]
    assert server.bodies[-1]["inputs"]["image"].startswith("data:image/jpeg;base64,")


def test_the_readme_names_what_there_is() -> None:
    types = (PACKAGE / "pulse-ecg-client.d.ts").read_text("utf-8")

    def declared(what: str) -> str:
        return types.split(f"\nexport {what}", 1)[1].split("\n}", 1)[0]

    methods = re.findall(r"^  (\w+)\(", declared("class PULSEEndpoint"), re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)\(", README, re.MULTILINE)) == set(methods) - {"constructor"}
    for name in re.findall(r"^  (\w+)\?:", declared("interface Parameters"), re.MULTILINE):
        assert f"`{name}`" in README
    kinds = types.split("export type ErrorKind", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r'\| "(\w+)"', kinds) == re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)[1:]


def test_both_clients_say_one_version() -> None:
    project = (PACKAGE.parent / "python/pyproject.toml").read_text("utf-8")
    assert f'version = "{MANIFEST["version"]}"' in project
