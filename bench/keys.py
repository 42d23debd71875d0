"""What the number of keys costs: start, lookup and one /key/generate, 10 keys beside 100,000; and
for how long the event loop is held while requests pass, with writes of the keys file and without.

.venv/bin/python bench/keys.py
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import uvloop

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

import gateway

MASTER_KEY = "sk-bench-0123456789abcdef"
LOOKUPS = 100_000
GENERATES = 9
HELD_SECONDS = 10.0
PROBE_INTERVAL = 0.002  # seconds
CONNECTIONS = 8
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def fill(path: Path, number: int) -> str:
    """Write a keys file with so many keys; one of them."""
    moment = gateway.now()
    lines = []
    for count in range(number):
        record = gateway.VirtualKey(
            "sk-...abcd", f"key {count}", user_id=f"user {count % 100}", created_at=moment
        )
        lines.append(gateway.store_line(gateway.hash_key(f"sk-bench-{count}"), record))
    body = b",\n".join(lines)
    path.write_bytes(b'{"version": 1, "keys": {\n' + body + b"\n}}\n")
    return f"sk-bench-{number // 2}"


def start(path: Path) -> tuple[subprocess.Popen[str], int, float]:
    """A gateway on that file: its process, its port, the seconds until it listened."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, FOLDER / "gateway.py", "--port=0", "--upstream=mock", f"--keys={path}"],
        env={**os.environ, "GATEWAY_MASTER_KEY": MASTER_KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    port = int(re.search(r":(\d+)", process.stdout.readline())[1])
    return process, port, time.perf_counter() - began


def generate(port: int) -> float:
    """The seconds that one /key/generate takes."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/key/generate",
        data=b"{}",
        headers={"Authorization": f"Bearer {MASTER_KEY}"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["key"]
    return time.perf_counter() - began


async def lookup(path: Path, key: str) -> float:
    """The seconds that one lookup takes, in this process."""
    store, hashed = gateway.FileLedger(path), gateway.hash_key(key)
    began = time.perf_counter()
    for _ in range(LOOKUPS):
        assert store.lookup(hashed)
    took = (time.perf_counter() - began) / LOOKUPS
    await store.close()
    return took


async def held(path: Path, key: str, flush_interval: float) -> list[float]:
    """A gateway in this process, with load from another: the seconds for which its loop was held,
    each as it was seen by a task that asks to be woken every PROBE_INTERVAL."""
    gateway.FLUSH_INTERVAL = flush_interval
    load = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--load", key), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert load.stdin is not None and load.stdout is not None
    upstream = int(await load.stdout.readline())
    settings = gateway.Settings(
        upstream=f"http://127.0.0.1:{upstream}",
        keys=path,
        master_key=MASTER_KEY,
        api_key="sk-ant-bench-0123456789",
    )
    application = gateway.make_app(settings)
    relay: gateway.Gateway = application.settings["gateway"]
    server = gateway.Server(relay, application)
    sockets = gateway.bind(dataclasses.replace(settings, port=0), loopback=True)
    server.listen(sockets, None)
    saving = asyncio.create_task(relay.ledger.run())
    gateway.favour_the_loop()
    load.stdin.write(b"%d\n" % sockets[0].getsockname()[1])
    await asyncio.sleep(1)
    times, deadline = [], time.perf_counter() + HELD_SECONDS
    while (began := time.perf_counter()) < deadline:
        await asyncio.sleep(PROBE_INTERVAL)
        times.append(time.perf_counter() - began - PROBE_INTERVAL)
    assert relay.traffic.requests.total() > CONNECTIONS, "no requests passed"
    load.kill()
    await load.wait()
    server.stop()
    server.close()
    await asyncio.sleep(0.1)
    saving.cancel()
    await relay.close()
    return times


async def make_load(key: str) -> None:
    """An upstream, and clients of the gateway whose port comes on standard input; until killed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ANSWER)

    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(upstream.sockets[0].getsockname()[1], flush=True)
    port = int(await asyncio.to_thread(sys.stdin.readline))
    request = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n\r\n"

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            writer.write(request.encode())
            await reader.readuntil(b"{}")
            await asyncio.sleep(0.005)

    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))


def main() -> None:
    """Print one row for each number of keys."""
    print(
        f"{'keys':>8} {'file MB':>8} {'start s':>8} {'lookup µs':>10} {'generate ms':>12}"
        "   longest holds of the loop, ms: no writes / a write each second"
    )
    for number in (10, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "keys.json"
            key = fill(path, number)
            size = path.stat().st_size / 1e6
            process, port, started = start(path)
            try:
                generated = statistics.median(generate(port) for _ in range(GENERATES))
            finally:
                process.terminate()
                process.wait()
            looked_up = asyncio.run(lookup(path, key))
            quiet = hold_figures(path, key, math.inf)
            writing = hold_figures(path, key, 1.0)
        print(
            f"{number:>8} {size:>8.1f} {started:>8.2f} {looked_up * 1e6:>10.2f}"
            f" {generated * 1e3:>12.1f}   {quiet:>20}   {writing:>20}",
            flush=True,
        )


def hold_figures(path: Path, key: str, flush_interval: float) -> str:
    """The three longest holds of the loop, in milliseconds."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        times = runner.run(held(path, key, flush_interval))
    return " ".join(f"{seconds * 1e3:.1f}" for seconds in sorted(times)[:-4:-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        asyncio.run(make_load(sys.argv[2]))
    else:
        main()
