"""Send the requests of ``test_requests.json`` to an endpoint and hold its answers against what they should be.

    python scripts/send_test_requests.py https://YOUR-ENDPOINT.endpoints.huggingface.cloud

Needs nothing but Python 3.11; the sample image is drawn if pydicom, NumPy and Pillow are installed, else ``--image``
names one.  Exits with 1 if a request fails.  Neither the token nor an image is ever printed.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import ipaddress
import json
import mimetypes
import os
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES_FILE = ROOT / "test_requests.json"

Json = Any
Answers = dict[str, Json]

ANSWER_FIELDS = ["generated_text", "model", "processing_method"]
COMMENTARY_FIELDS = ["comment_text", "commentary_model", "commentary_tokens", "commentary_status"]
COMMENTARY_STATUSES = ("success", "failed", "unavailable", "api_key_missing", "no_text")
ERROR_FIELDS = ["error", "generated_text", "handler", "model", "success"]
DETAILS_FIELDS = [
    "engine",
    "finish_reason",
    "generated_tokens",
    "image_tokens",
    "model_revision",
    "prompt_tokens",
    "seed",
    "timings",
]
EXPECTATIONS = frozenset(
    [
        "commentary",
        "details",
        "error_contains",
        "equals",
        "at_least",
        "at_most",
        "starts_with",
        "lacks",
        "same_answer_as",
        "other_answer_than",
    ]
)


class SkippedError(Exception):
    """A case that cannot be sent as things are; the message says why."""


@dataclass(frozen=True)
class Sample:
    """What the placeholders of a case stand for."""

    image: bytes = field(repr=False)
    content_type: str
    image_url: str | None

    @property
    def base64(self) -> str:
        return base64.b64encode(self.image).decode()


def load_cases(file: Path = CASES_FILE) -> list[dict[str, Json]]:
    """The cases, in order; a name occurs once."""
    cases: list[dict[str, Json]] = json.loads(file.read_text("utf-8"))["requests"]
    names = [case["name"] for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"{file.name} holds a name twice.")
    return cases


def filled(value: Json, sample: Sample) -> Json:
    """``value`` with its placeholders, objects with one ``$`` key, replaced.

    Raises:
        SkippedError: an image URL is called for and none is given.
        ValueError: an unknown placeholder.
    """
    if isinstance(value, list):
        return [filled(item, sample) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: filled(item, sample) for key, item in value.items()}
    ((name, argument),) = value.items()
    return _placeholder(name, argument, sample)


def _placeholder(name: str, argument: Json, sample: Sample) -> str:
    if name == "$image_url":
        if sample.image_url is None:
            raise SkippedError("needs --image-url")
        return sample.image_url
    if name == "$repeat":
        return str(argument["text"]) * int(argument["times"])
    makers: dict[str, Callable[[], str]] = {
        "$image_base64": lambda: sample.base64,
        "$image_data_uri": lambda: f"data:{sample.content_type};base64,{sample.base64}",
        "$image_base64_in_lines": lambda: "\n".join(_lines(sample.base64.rstrip("="), 76)) + "\n",
    }
    if name not in makers:
        raise ValueError(f"Unknown placeholder {name}.")
    return makers[name]()


def _lines(text: str, width: int) -> list[str]:
    return [text[start : start + width] for start in range(0, len(text), width)]


# --- sending


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The default one would take the token to whatever host the answer names."""

    def redirect_request(self, *_: object) -> None:
        return None


class _Proxies(urllib.request.ProxyHandler):
    """The environment's proxies, but a server on this machine is asked without one: a proxy could not reach it."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        return None if _is_loopback(req.full_url) else super().proxy_open(req, proxy, type)


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_open = urllib.request.build_opener(_NoRedirects, _Proxies).open


def post(url: str, body: bytes, *, content_type: str, token: str | None, timeout_s: float) -> tuple[int, Json]:
    """Status and JSON of one POST; None where the answer is no JSON.

    Raises:
        OSError, HTTPException: no answer, or a broken one.
    """
    headers = {"Content-Type": content_type, "Accept": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with _open(request, timeout=timeout_s) as response:
            return response.status, _json(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _json(error.read())


def _json(body: bytes) -> Json:
    try:
        return json.loads(body)
    except ValueError:
        return None


def send(
    case: Mapping[str, Json], sample: Sample, *, url: str, token: str | None, timeout_s: float
) -> tuple[int, Json]:
    """Send one case; errors as :func:`post` and :func:`filled`."""
    if case.get("raw_image"):
        body, content_type = sample.image, sample.content_type
    else:
        body, content_type = json.dumps(filled(case["body"], sample)).encode(), "application/json"
    return post(url, body, content_type=content_type, token=token, timeout_s=timeout_s)


# --- checking


def faults(case: Mapping[str, Json], status: int, answer: Json, earlier: Answers) -> list[str]:
    """What is wrong with an answer; empty if nothing is.

    Args:
        case: its ``expect`` holds what is due for each record, in order.
        earlier: the first record of each case that was answered before this one, by name.
    """
    expected = case["expect"]
    if (
        case.get("host_may_refuse")
        and status == 400
        and isinstance(answer, dict)
        and isinstance(answer.get("error"), str)
    ):
        return []
    if not isinstance(answer, list) or not all(isinstance(record, dict) for record in answer):
        return [f"HTTP {status} with something that is no list of records"]
    if len(answer) != len(expected):
        return [f"{len(answer)} records instead of {len(expected)}"]
    found = [
        f"record {number}: {fault}"
        for number, (record, due) in enumerate(zip(answer, expected, strict=True))
        for fault in record_faults(record, due, earlier)
    ]
    if status != 200 and not all("error_contains" in due for due in expected):
        found.append(f"HTTP {status} instead of 200")
    return found


def record_faults(record: Mapping[str, Json], due: Mapping[str, Json], earlier: Answers) -> list[str]:
    """What is wrong with one record."""
    if unknown := set(due) - EXPECTATIONS:
        raise ValueError(f"Unknown expectation {', '.join(sorted(unknown))}.")
    if "error_contains" in due:
        return _error_faults(record, due["error_contains"])
    if "error" in record:
        return [f"unexpected error: {record['error']}"]
    return [*_field_faults(record, due), *_value_faults(record, due), *_comparison_faults(record, due, earlier)]


def _error_faults(record: Mapping[str, Json], text: str) -> list[str]:
    if sorted(record) != ERROR_FIELDS:
        return [f"an error record was due; the fields are {', '.join(sorted(record))}"]
    found = []
    if record["success"] is not False or record["generated_text"] != "":
        found.append("an error record has success false and an empty generated_text")
    if text not in str(record["error"]):
        found.append(f"the error does not say '{text}': {record['error']}")
    return found


def _field_faults(record: Mapping[str, Json], due: Mapping[str, Json]) -> list[str]:
    commentary = due.get("commentary", False)
    fields = [*ANSWER_FIELDS, *(COMMENTARY_FIELDS if commentary else []), *(["details"] if due.get("details") else [])]
    optional = {"commentary_error", "commentary_warnings"} if commentary else set()
    found = []
    if set(record) - optional != set(fields):
        found.append(f"the fields are {', '.join(sorted(record))}; due are {', '.join(sorted(fields))}")
    if not isinstance(record.get("generated_text"), str):
        found.append("generated_text is no string")
    if record.get("processing_method") != "pipeline":
        found.append("processing_method is not 'pipeline'")
    status = record.get("commentary_status")
    if commentary and status not in COMMENTARY_STATUSES:
        found.append(f"commentary_status is {status}")
    if commentary and (status == "failed") != ("commentary_error" in record):
        found.append("commentary_error goes with commentary_status 'failed', and with no other")
    if commentary and (status == "success") != bool(record.get("comment_text")):
        found.append("comment_text goes with commentary_status 'success', and with no other")
    if due.get("details") and sorted(record.get("details", ())) != DETAILS_FIELDS:
        found.append(f"details holds {', '.join(sorted(record.get('details', ())))}")
    return found


def _value_faults(record: Mapping[str, Json], due: Mapping[str, Json]) -> list[str]:
    """Paths such as ``details.seed`` name a value of the record."""
    checks: dict[str, Callable[[Json, Json], bool]] = {
        "equals": lambda value, other: bool(value == other and type(value) is type(other)),
        "at_least": lambda value, other: isinstance(value, (int, float)) and value >= other,
        "at_most": lambda value, other: isinstance(value, (int, float)) and value <= other,
        "starts_with": lambda value, other: isinstance(value, str) and value.startswith(other),
        "lacks": lambda value, other: isinstance(value, str) and other not in value,
    }
    return [
        f"{path} is {_shown(_at(record, path))}; due: {check.replace('_', ' ')} {_shown(other)}"
        for check, holds in checks.items()
        for path, other in due.get(check, {}).items()
        if not holds(_at(record, path), other)
    ]


def _comparison_faults(record: Mapping[str, Json], due: Mapping[str, Json], earlier: Answers) -> list[str]:
    found = []
    for key, equal in (("same_answer_as", True), ("other_answer_than", False)):
        name = due.get(key)
        if name is None:
            continue
        if name not in earlier:
            found.append(f"'{name}', to compare with, gave no answer")
        elif (record.get("generated_text") == earlier[name].get("generated_text")) is not equal:
            found.append(f"the answer {'differs from' if equal else 'is'} that of '{name}'")
    return found


def _at(record: Json, path: str) -> Json:
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# --- running


def selected(cases: Sequence[dict[str, Json]], only: str | None) -> list[dict[str, Json]]:
    """All cases, or the one named ``only`` after those that it is compared with.

    Raises:
        ValueError: no case has that name.
    """
    if only is None:
        return list(cases)
    by_name = {case["name"]: case for case in cases}
    if only not in by_name:
        raise ValueError(f"No request is named '{only}'. Known: {', '.join(by_name)}.")
    wanted = {only}
    for case in reversed(cases):
        if case["name"] in wanted:
            wanted |= {
                due[key] for due in case["expect"] for key in ("same_answer_as", "other_answer_than") if key in due
            }
    return [case for case in cases if case["name"] in wanted]


def run(
    cases: Sequence[dict[str, Json]], sample: Sample, *, url: str, token: str | None, timeout_s: float
) -> dict[str, list[str] | None]:
    """Send the cases in order and print a line for each; the faults by name, None for a case that was skipped."""
    outcome: dict[str, list[str] | None] = {}
    answers: Answers = {}
    for case in cases:
        name, started = case["name"], time.perf_counter()
        try:
            status, answer = send(case, sample, url=url, token=token, timeout_s=timeout_s)
            found = faults(case, status, answer, answers)
            if isinstance(answer, list) and answer and not found:
                answers[name] = answer[0]
        except SkippedError as reason:
            outcome[name] = None
            sys.stdout.write(f"skip  {name}: {reason}\n")
            continue
        except (OSError, http.client.HTTPException) as error:
            found = [f"no answer ({type(error).__name__})"]
        outcome[name] = found
        seconds = time.perf_counter() - started
        sys.stdout.write(f"{'FAIL' if found else 'pass'}  {name}  {seconds:.2f} s\n")
        sys.stdout.writelines(f"      {fault}\n" for fault in found)
        sys.stdout.flush()
    return outcome


def wait_until_up(url: str, *, token: str | None, seconds: float) -> None:
    """Wait while the endpoint answers 503 or not at all, as it does while it starts; at most ``seconds``."""
    # Our own server answers other paths while it loads; a host without this one answers 404, and is up.
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/health", headers=headers)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with _open(request, timeout=30):
                return
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503:
                    return
        except (OSError, http.client.HTTPException):
            pass
        sys.stdout.write("not up yet\n")
        sys.stdout.flush()
        time.sleep(min(10.0, max(0.0, end - time.monotonic())))


def drawn_sample(folder: Path) -> Path:
    """The demo's sample ECG as a JPEG file.

    Raises:
        ImportError: pydicom, NumPy or Pillow is missing.
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from demo.ecg_image import read_recording, render

    file = folder / "ecg.jpg"
    render(read_recording()).save(file, quality=90)
    return file


def token_variable(url: str) -> str:
    """The environment variable with the token for a host: the one for Hugging Face is nobody else's."""
    parts = urllib.parse.urlsplit(url)
    is_endpoint = parts.scheme == "https" and (parts.hostname or "").endswith(".endpoints.huggingface.cloud")
    return "HF_TOKEN" if is_endpoint else "PULSE_API_TOKEN"


def sample_of(image: Path | None, image_url: str | None) -> Sample:
    """The image that the placeholders stand for; drawn where no file is given."""
    with tempfile.TemporaryDirectory() as folder:
        file = image or drawn_sample(Path(folder))
        content_type = mimetypes.guess_type(file.name)[0] or "image/jpeg"
        return Sample(file.read_bytes(), content_type, image_url)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 if all requests passed, 1 if one failed."""
    parser = argparse.ArgumentParser(description="Send the requests of test_requests.json to an endpoint.")
    parser.add_argument("url", help="the endpoint's URL")
    parser.add_argument(
        "--token",
        help="default: the variable HF_TOKEN for an endpoint at Hugging Face, PULSE_API_TOKEN for any other host",
    )
    parser.add_argument("--image", type=Path, help="an image file; default: the demo's sample ECG")
    parser.add_argument("--image-url", help="a URL of the same image that the endpoint can reach")
    parser.add_argument("--only", metavar="NAME", help="send this request alone")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each request (default: 300)")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for an endpoint that is starting")
    args = parser.parse_args(argv)
    token = (args.token or os.environ.get(token_variable(args.url), "")).strip() or None
    if token and not all("!" <= character <= "~" for character in token):
        parser.error("the token holds characters that no token has")
    if not args.url.startswith(("http://", "https://")):
        parser.error("the URL must begin with http:// or https://")
    try:
        cases = selected(load_cases(), args.only)
        sample = sample_of(args.image, args.image_url)
    except ImportError as error:
        parser.error(f"--image is needed: {error.name} is not installed, so no sample can be drawn")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.wait:
        wait_until_up(args.url, token=token, seconds=args.wait)
    outcome = run(cases, sample, url=args.url, token=token, timeout_s=args.timeout)
    failed, skipped = sum(bool(found) for found in outcome.values()), sum(found is None for found in outcome.values())
    sys.stdout.write(f"{len(outcome) - failed - skipped} passed, {failed} failed, {skipped} skipped\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
