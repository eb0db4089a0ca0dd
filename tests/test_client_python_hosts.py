"""The Python client against hosts of the real handler: the stock container's rules, its emulator, our own server."""

from __future__ import annotations

import asyncio
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.send_test_requests import ANSWER_FIELDS, COMMENTARY_FIELDS, ERROR_FIELDS, drawn_sample
from tests.endpoint_server import EndpointServer, demo_handler, endpoint_server
from tests.our_server import server_process

# The emulator's fixtures, used by name.
from tests.test_emulator import endpoint as emulator  # noqa: F401
from tests.test_emulator import repository  # noqa: F401

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clients/python"
sys.path.insert(0, str(PACKAGE / "src"))

import pulse_ecg_client as client  # noqa: E402
from pulse_ecg_client import AsyncPULSEEndpoint, PULSEEndpoint  # noqa: E402

ENDPOINT, IMAGE_URL = "https://YOUR-ENDPOINT.endpoints.huggingface.cloud", "https://example.org/ecg.jpg"
GREEDY: Any = {"max_new_tokens": 8, "do_sample": False, "enable_turkish_commentary": False}


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointServer]:
    with demo_handler(tmp_path_factory.mktemp("checkpoint")) as handler, endpoint_server(handler) as server:
        yield server


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with server_process(folder, "--model", str(demo_checkpoint), PULSE_ALLOW_PRIVATE_IMAGE_URLS="1") as server:
        yield server.url


HOSTS = ["container", "emulator", "server"]


@pytest.fixture(params=HOSTS)
def url(request: pytest.FixtureRequest) -> str:
    host = request.getfixturevalue(request.param)
    return str(getattr(host, "url", host))


@pytest.fixture
def endpoint(url: str) -> Iterator[PULSEEndpoint]:
    with PULSEEndpoint(url, "hf_token", timeout=120) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn_sample(tmp_path_factory.mktemp("ecg"))


def refusal(call: Any, *args: Any, **parameters: Any) -> str:
    """Why a request was refused: the container answers with a record, our own server with a status as well."""
    try:
        return str(call(*args, **parameters)["error"])
    except client.RequestRefusedError as error:
        [record] = error.records
        assert sorted(record) == ERROR_FIELDS
        return record["error"]


def test_every_way_to_send_an_image_gets_the_same_answer(endpoint: PULSEEndpoint, jpeg: Path) -> None:
    question = "What is the rhythm?"
    answer = endpoint.analyze_image_base64(jpeg, question, **GREEDY)
    assert list(answer) == ANSWER_FIELDS
    assert answer["generated_text"]
    data = jpeg.read_bytes()
    part = client.image_part(data)
    message = {"role": "user", "content": [{"type": "text", "text": question}, part]}
    with Image.open(jpeg) as pillow:
        records = [
            endpoint.analyze_image_base64(pillow, question, **GREEDY),
            endpoint.analyze_image_base64(part["image_url"]["url"], question, **GREEDY),
        ]
    records += endpoint.analyze_batch([{"query": question, "image": image} for image in (data, str(jpeg))], **GREEDY)
    records.append(endpoint.chat([message], **GREEDY))
    *_, last = endpoint.stream({"query": question, "image": jpeg}, **GREEDY)
    assert last.type == "record"
    records.append(last.record)
    assert records == [answer] * 6
    assert endpoint.chat([{**message, "content": question}], **GREEDY) != answer


def test_an_image_is_fetched_from_its_url(container: EndpointServer, jpeg: Path) -> None:
    container.files["/ecg.jpg"] = jpeg.read_bytes()
    with PULSEEndpoint(container.url) as endpoint:
        by_url = endpoint.analyze_image_url(f"{container.url}/ecg.jpg", "?", **GREEDY)
        assert by_url == endpoint.analyze_image_base64(jpeg, "?", **GREEDY)
        assert by_url["generated_text"]


def test_the_commentary_comes_unless_it_is_switched_off(endpoint: PULSEEndpoint) -> None:
    record = endpoint.analyze_text("What is a delta wave?", max_new_tokens=4)
    assert list(record) == [*ANSWER_FIELDS, *COMMENTARY_FIELDS]
    assert record["commentary_status"] == "api_key_missing"


def test_the_same_seed_gives_the_same_answer_and_details_tell_it(endpoint: PULSEEndpoint) -> None:
    answers = [endpoint.analyze_text("Rate?", 16, 2.0, False, seed=seed, details=True) for seed in (5, 5, 6)]
    texts = [answer["generated_text"] for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    assert [answer["details"]["seed"] for answer in answers] == [5, 5, 6]


def test_a_bad_item_of_a_batch_has_its_error_record(endpoint: PULSEEndpoint) -> None:
    records = endpoint.analyze_batch(["Rate?", {"query": "?", "image": b"no image"}, "Axis?"], **GREEDY)
    assert ["error" in record for record in records] == [False, True, False]
    assert sorted(records[1]) == ERROR_FIELDS


def test_a_refusal_says_what_to_change(endpoint: PULSEEndpoint) -> None:
    assert "max_new_tokens" in refusal(endpoint.analyze_text, "?", max_new_tokens=5000)
    assert refusal(endpoint.analyze_image_base64, b"no image", "?")
    assert refusal(endpoint.chat, [])
    with pytest.raises(client.RequestRefusedError, match="max_new_tokens"):
        list(endpoint.stream("?", max_new_tokens=5000))


def test_a_stream_joins_to_its_record(endpoint: PULSEEndpoint) -> None:
    events = list(endpoint.stream("What is a delta wave?", max_new_tokens=24, do_sample=False))
    start, *pieces, answer, last = events
    assert [event.type for event in (start, answer, last)] == ["start", "answer", "record"]
    assert isinstance(answer, client.AnswerEvent)
    assert isinstance(last, client.RecordEvent)
    assert "".join(piece.text for piece in pieces if piece.type == "text") == last.record["generated_text"]
    assert {**last.record, **answer.record} == last.record
    assert (list(answer.record), list(last.record)) == (ANSWER_FIELDS, [*ANSWER_FIELDS, *COMMENTARY_FIELDS])


def test_calls_side_by_side_get_their_own_answers(url: str) -> None:
    async def scenario() -> tuple[list[str], list[str]]:
        async with AsyncPULSEEndpoint(url, timeout=120) as endpoint:
            questions = ["Rate?", "Rhythm?", "Axis?"]
            calls = [endpoint.chat([{"role": "user", "content": question}], **GREEDY) for question in questions]
            together = await asyncio.gather(*calls)
            batch = await endpoint.analyze_batch(questions, **GREEDY)
            return [r["generated_text"] for r in together], [r["generated_text"] for r in batch]

    together, batch = asyncio.run(scenario())
    assert together == batch
    assert all(together)


# --- the package


def test_the_readmes_examples_run(
    container: EndpointServer,
    jpeg: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ecg.jpg").write_bytes(jpeg.read_bytes())
    container.files["/ecg.jpg"] = jpeg.read_bytes()
    monkeypatch.setattr(container, "most_new_tokens", 8)
    monkeypatch.setattr("logging.basicConfig", lambda: None)
    text = (PACKAGE / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        local = block.replace(ENDPOINT, container.url).replace(IMAGE_URL, f"{container.url}/ecg.jpg")
        exec(compile(local, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= 7
    assert "Not answered" not in printed


def test_the_readme_names_what_there_is() -> None:
    text = (PACKAGE / "README.md").read_text("utf-8")
    errors = {name for name in client.__all__ if name.endswith("Error")}
    assert set(re.findall(r"`(\w+Error)`", text)) == errors | {"OSError", "TimeoutError", "TypeError", "ValueError"}
    methods = {n for n in dir(PULSEEndpoint) if not n.startswith("_")} - {"close"}
    assert set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)) == methods
    for name in client.Parameters.__annotations__:
        assert f"`{name}`" in text


def test_the_package_says_one_version_and_ships_its_types() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["version"] == client.__version__
    assert project["tool"]["setuptools"]["package-data"] == {"pulse_ecg_client": ["py.typed"]}
    assert (PACKAGE / "src/pulse_ecg_client/py.typed").exists()
    assert all(hasattr(client, name) for name in client.__all__)
