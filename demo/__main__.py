"""The main job on this machine: a real ECG image in, the model's answer out.  Run by ``make demo``.

Builds a small random checkpoint in PULSE-7B's layout, renders a real 12-lead recording, and asks one handler twice:
with the image in the request, and with a URL that a file server on loopback answers.  The weights are random, so the
answers make no sense; they are this image's all the same, as the third call, with another image, shows.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.build_checkpoint import build_checkpoint
from demo.ecg_image import LAYOUTS, read_recording, render

BUILD = Path(__file__).resolve().parents[1] / "build" / "demo"
QUESTION = "What is the rhythm of this ECG?"
PARAMETERS = {"max_new_tokens": 40, "do_sample": False, "details": True}


def main() -> None:
    """Build, ask, print."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # The demo stays on this machine, on the CPU, whatever the shell it is started from has set.
    for name in [n for n in os.environ if n.startswith(("PULSE_", "DEEPSEEK_"))] + ["deep_key"]:
        os.environ.pop(name, None)
    os.environ.update(PULSE_DEVICE="cpu", PULSE_ALLOW_PRIVATE_IMAGE_URLS="1")
    sample, other = samples()
    print(f"1. Sample ECG: {sample}  (and, to compare, {other.name})")
    checkpoint = timed("2. Demo checkpoint, random weights", lambda: build_checkpoint(BUILD / "checkpoint"))

    from handler import EndpointHandler  # imports torch and transformers: seconds, so not before the first line

    handler = timed("3. EndpointHandler", lambda: EndpointHandler(str(checkpoint)))
    by_data = ask(handler, "4. Image in the request (data URI)", data_uri(sample))
    with file_server(BUILD) as address:
        by_url = ask(handler, f"5. Image by URL ({address}/{sample.name})", f"{address}/{sample.name}")
    another = ask(handler, "6. Another image, same question", data_uri(other))
    same, differs = by_data["generated_text"] == by_url["generated_text"], by_data != another
    if "error" in by_data or not same or not differs:
        raise SystemExit("The demo failed: see the records above.")
    print("\nThe same image gave the same answer both ways, another image another one.")
    print("The weights are random: this shows the endpoint at work, not a reading of the ECG.")


def samples() -> tuple[Path, Path]:
    """The sample ECG and the same recording on another layout, as image files."""
    BUILD.mkdir(parents=True, exist_ok=True)
    recording = read_recording()
    sample, other = BUILD / "ecg.png", BUILD / "ecg-6x2.jpg"
    render(recording).save(sample)
    render(recording, layout=LAYOUTS["6x2"]).save(other)
    return sample, other


def data_uri(file: Path) -> str:
    """An image file as callers put it into ``image``."""
    kind = "jpeg" if file.suffix == ".jpg" else file.suffix[1:]
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def ask(handler: Any, title: str, image: str) -> dict[str, Any]:
    """One request; prints the record."""
    body = {"inputs": {"query": QUESTION, "image": image}, "parameters": PARAMETERS}
    record: dict[str, Any] = timed(title, lambda: handler(body))[0]
    print(json.dumps(record, indent=2, ensure_ascii=False))
    return record


def timed(title: str, work: Any) -> Any:
    """Run ``work`` and print how long it took."""
    started = time.perf_counter()
    result = work()
    print(f"\n{title}: {time.perf_counter() - started:.1f} s", flush=True)
    return result


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serve a folder on a free loopback port; yields the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


if __name__ == "__main__":
    main()
