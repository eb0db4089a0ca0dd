"""Two hundred connections that come, go, stall and drip: the healthy ones are served as before, and nothing grows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.our_server import ServerProcess, request, server_process, until

CONNECTIONS = 200
ROUNDS = 3
SAMPLES = 60
BODY: dict[str, Any] = {
    "inputs": "Rate?",
    "parameters": {"max_new_tokens": 4, "do_sample": False, "enable_turkish_commentary": False},
}
RAW = request("/", json.dumps(BODY).encode(), "Content-Type: application/json")
STREAMED = request("/", json.dumps({**BODY, "stream": True}).encode(), "Content-Type: application/json")

pytestmark = pytest.mark.load


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with server_process(folder, "--model", str(demo_checkpoint), "--body-timeout", "3") as process:
        process.wait_for_health()
        yield process


class Crowd:
    """Connections that misbehave, each in its own way again and again, until the crowd is sent home."""

    def __init__(self, port: int, size: int) -> None:
        self._port, self._size = port, size
        self.made = 0

    async def riot(self, until_done: asyncio.Event) -> None:
        tasks = [asyncio.create_task(self._member(number)) for number in range(self._size)]
        await until_done.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.1)  # in which the loop closes their sockets

    async def _member(self, number: int) -> None:
        choose = random.Random(number)
        ways = [self._idle, self._drip_head, self._drip_body, self._leave_in_body]
        way, pause = ways[number % len(ways)], 2.0
        if number % 20 < 2:  # these ask the model, which the healthy then wait for with good reason: a few each second
            way, pause = (self._leave_stream, self._never_read)[number % 2], 10.0
        while True:
            await asyncio.sleep(choose.uniform(0.1, pause))
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                self.made += 1
                try:
                    await way(reader, writer)
                finally:
                    writer.transport.abort() if choose.random() < 0.5 else writer.close()

    async def _idle(self, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.wait_for(reader.read(), 60)

    async def _drip(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.5)

    async def _drip_head(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._drip(writer, RAW)

    async def _drip_body(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = RAW.split(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        await self._drip(writer, body)

    async def _leave_in_body(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(RAW[:-10])
        await writer.drain()

    async def _leave_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAMED)
        await reader.readuntil(b"event: start")

    async def _never_read(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()
        writer.write(STREAMED)
        await asyncio.sleep(5)


@contextlib.contextmanager
def crowd(server: ServerProcess) -> Iterator[Crowd]:
    members = Crowd(server.port, CONNECTIONS)
    loop = asyncio.new_event_loop()
    done = asyncio.Event()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(loop.run_until_complete, members.riot(done))
        try:
            yield members
        finally:
            loop.call_soon_threadsafe(done.set)
            running.result(60)
            loop.close()


def latencies(server: ServerProcess) -> list[float]:
    """Seconds of each of a healthy caller's requests, one after the other on one connection; every one is answered."""
    seconds = []
    with requests.Session() as session:
        for _ in range(SAMPLES):
            started = time.perf_counter()
            assert session.post(server.url, json=BODY, timeout=60).status_code == 200
            seconds.append(time.perf_counter() - started)
    return seconds


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def connections(server: ServerProcess) -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(server.process.pid).net_connections("tcp"))


def test_the_healthy_are_served_while_two_hundred_misbehave(server: ServerProcess) -> None:
    process = psutil.Process(server.process.pid)
    latencies(server)  # warm
    memory, quiet, crowded = [], [], []
    for _ in range(ROUNDS):
        quiet.append(p99(latencies(server)))
        with crowd(server) as members:
            until(lambda members=members: members.made >= CONNECTIONS)
            crowded.append(p99(latencies(server)))
            health = server.get("/health")
            assert (health.status_code, health.elapsed.total_seconds() < 1) == (200, True)
        until(lambda: connections(server) == 0)
        until(lambda: server.get("/ready").json()["running"] == server.get("/ready").json()["waiting"] == 0)
        memory.append(process.memory_info().rss)
    assert min(crowded) <= 2 * max(quiet)  # of the rounds, those that measure the server and not the machine
    assert memory[-1] - memory[0] < 30_000_000
    assert process.num_threads() < 250
    assert process.num_fds() < 100
    with ThreadPoolExecutor(8) as threads:  # no worker was lost
        answers = threads.map(lambda _: requests.post(server.url, json=BODY, timeout=60).status_code, range(16))
    assert set(answers) == {200}


def test_probes_answer_at_once_under_full_load(server: ServerProcess) -> None:
    slow = {**BODY, "parameters": {**BODY["parameters"], "max_new_tokens": 60, "stop": []}}
    with ThreadPoolExecutor(100) as threads:
        answers = [threads.submit(requests.post, server.url, json=slow, timeout=120) for _ in range(100)]
        until(lambda: server.get("/ready").json()["ready"] is False)
        seconds = [server.get(path).elapsed.total_seconds() for path in ("/health", "/ready", "/metrics") * 5]
        statuses = [answer.result().status_code for answer in answers]
    assert statistics.median(seconds) < 0.5
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 72  # eight at work and sixty-four in the queue
