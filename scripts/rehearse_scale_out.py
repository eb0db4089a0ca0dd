"""Two replicas behind HAProxy, restarted one after the other under traffic: nothing that was asked may be lost.

    .venv/bin/python -m scripts.rehearse_scale_out        (or: make rehearse-scale-out)

It starts two servers on a small random checkpoint and HAProxy with ``deploy/haproxy.cfg``, all on loopback and free
ports, and lets callers ask without a break: whole answers and streams, native and OpenAI's, some with an image that is
larger than HAProxy's buffers.  Every answer must be complete and the right one.  In turn there are

- a quiet time, for comparison;
- SIGTERM for one replica after the other, each started anew: none may be lost;
- SIGKILL for one: what it was answering is lost, and nothing that was asked after its death.

The last line is one JSON document; times are seconds, as callers measure them.  Exit status: 0 as it should be,
1 something was lost, or a replica did not start or end as it should, 2 HAProxy is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests

from demo.build_checkpoint import build_checkpoint
from scripts.rehearsal_traffic import Attempt, Traffic, ways_to_ask

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "deploy" / "haproxy.cfg"
DRAIN_DELAY_S = 4
# The proxy looks at a replica every second.
SETTLE_S = 2.5
PATIENCE_S = 60.0


class RehearsalError(Exception):
    """A part of the set-up did not do what it should."""


# --- the set-up


class Replica:
    """One ``serve.py`` on a port of its own, which it keeps when it is started anew."""

    def __init__(self, checkpoint: Path, log: Path, *, drain_delay_s: float) -> None:
        self.port, self._checkpoint, self._log, self._drain_delay_s = free_port(), checkpoint, log, drain_delay_s
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start the process; the model loads meanwhile."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PULSE_", "DEEPSEEK_"))}
        variables = {"PULSE_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "serve.py", "--model", str(self._checkpoint), "--port", str(self.port)]
        command += ["--drain-delay", str(self._drain_delay_s)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own script
                command, cwd=ROOT, env=plain | variables, stdout=log, stderr=log
            )

    def wait_until_healthy(self) -> None:
        """Ask ``/health`` until it says that the model answers."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.05)
        raise RehearsalError(f"A replica did not start; its log is {self._log}.")

    def stop(self, sig: signal.Signals) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.process.send_signal(sig)
        return self.process.wait(PATIENCE_S)


def haproxy() -> str | None:
    """Where HAProxy is installed; Debian's place is not on every user's path."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


@contextmanager
def proxy(folder: Path, replicas: Sequence[int]) -> Iterator[str]:
    """HAProxy as ``deploy/haproxy.cfg`` has it, before two ports of this machine; yields its address."""
    port = free_port()
    text = CONFIG.read_text("utf-8")
    for written, used in zip((8080, 8081, 8082), (port, *replicas), strict=True):
        text = text.replace(f"127.0.0.1:{written}\n", f"127.0.0.1:{used}\n")
    file, log = folder / "haproxy.cfg", folder / "haproxy.log"
    file.write_text(text, "utf-8")
    executable = haproxy()
    assert executable
    with log.open("wb") as output:
        process = subprocess.Popen([executable, "-db", "-f", str(file)], stdout=output, stderr=output)  # noqa: S603
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _accepts(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RehearsalError(f"HAProxy did not start; its log is {log}.")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- the rehearsal


def rehearse(folder: Path, *, quiet_s: float, drain_delay_s: float) -> dict[str, Any]:
    """All of it; what :func:`main` prints.

    Raises:
        RehearsalError: a replica or the proxy did not start, or a replica did not end in order.
    """
    checkpoint = build_checkpoint(folder / "checkpoint")
    ways = ways_to_ask()
    with ExitStack() as stack:
        replicas = []
        for number in (1, 2):
            replicas.append(Replica(checkpoint, folder / f"replica{number}.log", drain_delay_s=drain_delay_s))
            stack.callback(replicas[-1].stop, signal.SIGKILL)
        for replica in replicas:
            replica.wait_until_healthy()
        with requests.Session() as session:
            [expected, other] = [{kind: ask(session, each.url) for kind, ask in ways.items()} for each in replicas]
        if expected != other:
            raise RehearsalError("The replicas do not give the same answers.")
        url = stack.enter_context(proxy(folder, [replica.port for replica in replicas]))
        with Traffic(url, ways, expected) as traffic:
            time.sleep(quiet_s)
            restarting = time.monotonic()
            for replica in replicas:
                _restart(replica)
            killing = time.monotonic()
            replicas[0].stop(signal.SIGKILL)
            killed = time.monotonic()
            time.sleep(2 * SETTLE_S)
    return _report(traffic.attempts, restarting=restarting, killing=killing, killed=killed)


def _restart(replica: Replica) -> None:
    """SIGTERM, start anew, and wait until the proxy has seen it."""
    print(f"SIGTERM for {replica.url}", file=sys.stderr)
    if status := replica.stop(signal.SIGTERM):
        raise RehearsalError(f"A replica ended with status {status} after SIGTERM.")
    replica.start()
    replica.wait_until_healthy()
    time.sleep(SETTLE_S)


def _report(attempts: list[Attempt], *, restarting: float, killing: float, killed: float) -> dict[str, Any]:
    quiet = [a for a in attempts if a.began < restarting]
    restarts = [a for a in attempts if restarting <= a.began and a.ended < killing]
    # What was begun before the kill and not over by then may have been with the replica that died.
    in_flight = [a for a in attempts if a.began < killed and killing <= a.ended]
    after = [a for a in attempts if killed <= a.began]
    lost = [a for a in (*quiet, *restarts, *after) if a.fault]
    for attempt in lost:
        print(f"Lost: {attempt}", file=sys.stderr)
    return {
        "requests": len(attempts),
        "lost": len(lost),
        "quiet": _figures(quiet),
        "restarts": _figures(restarts),
        "kill": {"in_flight": len(in_flight), "lost_in_flight": sum(bool(a.fault) for a in in_flight)}
        | {"after": len(after), "lost_after": sum(bool(a.fault) for a in after)},
    }


def _figures(attempts: list[Attempt]) -> dict[str, float]:
    seconds = [attempt.ended - attempt.began for attempt in attempts]
    p99 = statistics.quantiles(seconds, n=100)[98]
    return {"requests": len(seconds), "p50_s": round(statistics.median(seconds), 3), "p99_s": round(p99, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Restart two replicas behind HAProxy under traffic.")
    parser.add_argument(
        "--quiet-seconds", type=float, default=10, help="traffic before the first restart (default: 10)"
    )
    parser.add_argument(
        "--drain-delay",
        type=float,
        default=DRAIN_DELAY_S,
        help=f"seconds between a replica's 503 and its end; 0 loses requests (default: {DRAIN_DELAY_S})",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "scale-out", help="for checkpoint and logs")
    args = parser.parse_args(argv)
    if haproxy() is None:
        print("HAProxy is not installed: `apt-get install haproxy` on Debian and Ubuntu.", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        report = rehearse(args.folder, quiet_s=args.quiet_seconds, drain_delay_s=args.drain_delay)
    except RehearsalError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 1 if report["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
