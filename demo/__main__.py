"""The main job on this machine: an ECG image in, an answer about it out.  Run by ``make demo``.

Starts our own server on the small model of ``demo/checkpoint`` and asks it with cURL: about a drawn ECG, with the image
in the request and with its URL, which a file server on loopback answers; then about a real recording, of a kind that
the model was not trained on.  What is known about each image stands beside the answer.  On a terminal the server then
stays until Enter, for its page to be tried.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.ecg_image import read_recording, render
from demo.samples import image_at

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "demo"
CHECKPOINT = ROOT / "demo" / "checkpoint"
REPORT, TERRITORY = "Write a report of this ECG.", "Which leads show ST segment changes?"
DRAWN = 2376  # of the test images, never trained on; picked, since it reads this one right (rate within 5 bpm)
KNOWN = "sinus rhythm, 61 bpm, as the recording device read it"
PARAMETERS = {"max_new_tokens": 80, "do_sample": False, "details": True}
START_S = 300
# All that is asked here is on this machine: a proxy that the shell names could not reach it.
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def main() -> None:
    """Serve, ask, print, stop."""
    if shutil.which("curl") is None:
        raise SystemExit("The demo asks with cURL, which is not installed.")
    drawn, real, truth = samples()
    print(f"1. A drawn ECG: {drawn.relative_to(ROOT)} ({truth})")
    print(f"   A real one: {real.relative_to(ROOT)} ({KNOWN})")
    with our_server(CHECKPOINT) as address, file_server(BUILD) as files:
        by_data = ask(address, "3. The drawn ECG in the request (data URI)", REPORT, data_uri(drawn))
        by_url = ask(address, f"4. The same by URL ({files}/{drawn.name})", REPORT, f"{files}/{drawn.name}")
        territory = ask(address, "5. Another question about it", TERRITORY, data_uri(drawn))
        another = ask(address, "6. The real ECG", REPORT, data_uri(real))
        answers = [str(record.get("generated_text")) for record in (by_data, by_url, territory, another)]
        print(f"\nDrawn: {truth}", *answers[1:3], f"Real: {KNOWN}", answers[3], sep="\n   ")
        print(f"The drawn one was picked; how often answers are right: {CHECKPOINT.relative_to(ROOT)}/README.md.")
        print("Not for clinical use.")
        if not answers[0] or answers[0] != answers[1] or answers[0] == answers[3]:
            raise SystemExit("The demo failed: the answers do not follow the images; see the records above.")
        print(f"\n7. The server's page, to try it in a browser: {address}/ui")
        if sys.stdin.isatty():
            input("   Enter stops the server. ")
        else:
            print("   (On a terminal the server stays until Enter; `make serve` keeps one running.)")
    print("8. The server has stopped.")


@contextmanager
def our_server(checkpoint: Path) -> Iterator[str]:
    """``serve.py`` on a free loopback port; yields its address once the model answers, and stops it in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The demo stays on this machine, on the CPU, whatever the shell it is started from has set.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PULSE_", "DEEPSEEK_")) and k != "deep_key"}
    settings = {"PULSE_DEVICE": "cpu", "PULSE_ALLOW_PRIVATE_IMAGE_URLS": "1", "PULSE_LOG_LEVEL": "warning"}
    command = [sys.executable, str(ROOT / "serve.py"), "--model", str(checkpoint), "--port", str(port), "--ui", "1"]
    print(f"\n2. {shlex.join(['python', 'serve.py', *command[2:]])}", flush=True)
    with subprocess.Popen(command, env=kept | settings, cwd=ROOT) as process:
        try:
            wait_until_it_answers(process, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
        if process.wait() != 0:
            raise SystemExit(f"The server ended with status {process.returncode}.")


def wait_until_it_answers(process: subprocess.Popen[bytes], address: str) -> None:
    """Ask ``/health`` until it says ok."""
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < START_S:
        try:
            with open_directly(f"{address}/health", timeout=5):
                print(f"   The model answers after {time.monotonic() - started:.1f} s.", flush=True)
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise SystemExit("The server did not start; its messages are above.")


def samples() -> tuple[Path, Path, str]:
    """A drawn ECG and a real one as image files, and the truth about the former."""
    BUILD.mkdir(parents=True, exist_ok=True)
    drawn, real = BUILD / "drawn.jpg", BUILD / "ecg.png"
    image, ecg = image_at("test", DRAWN)
    image.save(drawn, quality=92)
    render(read_recording()).save(real)
    truth = ecg.diagnosis
    place = f" in the {truth.territory} leads" if truth.territory else ""
    return drawn, real, f"{truth.rhythm}, {truth.rate} bpm, {truth.finding}{place}"


def data_uri(file: Path) -> str:
    """An image file as callers put it into ``image``."""
    kind = "jpeg" if file.suffix == ".jpg" else file.suffix[1:]
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def ask(address: str, title: str, question: str, image: str) -> dict[str, Any]:
    """One request with cURL, its body in a file; prints the command and the record."""
    body = BUILD / "request.json"
    body.write_text(json.dumps({"inputs": {"query": question, "image": image}, "parameters": PARAMETERS}), "utf-8")
    command = ["curl", "-sS", "--noproxy", "*", f"{address}/", "-H", "Content-Type: application/json"]
    command += ["--data-binary", f"@{body}"]
    run = timed(title, lambda: subprocess.run(command, capture_output=True, text=True, check=False))
    print(shlex.join([*command[:-1], f"@{body.relative_to(ROOT)}"]))
    if run.returncode != 0:
        raise SystemExit(f"cURL failed: {run.stderr.strip()}")
    record: dict[str, Any] = json.loads(run.stdout)[0]
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
