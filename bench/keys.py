"""What the number of keys costs: start, lookup and one /key/generate, 10 keys beside 100,000; and
for how long the event loop is held while requests pass, with writes of the keys file and without.
And what the number of things that stand behind walls costs: none beside 1,000,000 of 1,000 keys.

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
THINGS, OWNERS, ASKED = 1_000_000, 1000, 500
UPLOAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\na\r\n--x--\r\n'
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
        assert await store.find_hash(hashed)
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


def fill_things(path: Path, number: int) -> None:
    """Remember so many files of all keys, a line each, as creates do."""
    owners = [gateway.hash_key(f"sk-bench-{count}") for count in range(OWNERS)]
    moment = int(time.time())
    with open(f"{path}.resources", "w") as file:
        file.write('{"version": 1}\n')
        for count in range(number):
            made = {f"file_01{count:022x}": moment}
            line = {"key": owners[count % OWNERS], "kind": "files", "made": made}
            file.write(json.dumps(line) + "\n")


def asking(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n"
    if body:
        head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


async def ask_often(port: int, request: bytes, at_once: int = 1) -> tuple[list[float], bytes]:
    """Send a request ASKED times, so many at once: how many ms each took, and one's answer."""
    times = list[float]()

    async def client() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(ASKED // at_once):
            began = time.perf_counter()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.split(b"content-length: ")[1].split(b"\r\n")[0]
            body = await reader.readexactly(int(length))
            times.append(1000 * (time.perf_counter() - began))
        writer.close()
        return head[9:13] + body

    answers = await asyncio.gather(*(client() for _ in range(at_once)))
    return times, answers[0]


def process_figure(pid: int, file: str, name: str) -> int:
    """One of /proc: bytes, or KB."""
    return int(Path(f"/proc/{pid}/{file}").read_text().split(f"{name}:")[1].split()[0])


def measure_things(number: int) -> dict[str, float]:
    """The figures of so many things."""
    figures, key, other = dict[str, float](), "sk-bench-0", "sk-bench-1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.json"
        fill(path, OWNERS)
        fill_things(path, number)
        for when in ("as creates left it", "compacted"):
            figures[f"file, {when}, MB"] = os.stat(f"{path}.resources").st_size / 1e6
            process, port, figures[f"start, {when}, s"] = start(path)
            if when != "compacted":
                process.terminate()
                process.wait()
        try:
            url = f"http://127.0.0.1:{port}/health/readiness"
            while b'"loaded"' not in urllib.request.urlopen(url).read():  # prices, with a burst
                time.sleep(0.1)
            figures["memory, MB"] = process_figure(process.pid, "status", "VmRSS") / 1e3
            for told, at_once in (("create, {}, ms", 1), ("create, 50 at once, {}, ms", 50)):
                request = asking("POST", "/v1/files", key, UPLOAD)
                written = process_figure(process.pid, "io", "write_bytes")
                times, made = asyncio.run(ask_often(port, request, at_once))
                written = process_figure(process.pid, "io", "write_bytes") - written
                figures |= percentiles(told, times)
                figures[told.format("on disk").replace("ms", "bytes")] = written / len(times)
            name = json.loads(made[4:])["id"]
            for told, asker, status in (("own", key, b"200 "), ("foreign", other, b"404 ")):
                request = asking("GET", f"/v1/files/{name}", asker)
                times, answer = asyncio.run(ask_often(port, request))
                assert answer.startswith(status), answer
                figures |= percentiles(f"GET of {told}, {{}}, ms", times)
        finally:
            process.terminate()
            process.wait()
    return figures


def percentiles(told: str, times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    return {told.format("p50"): cuts[49], told.format("p99"): cuts[98]}


def compare_things() -> None:
    """Print a row for each figure: of none, of all, and how many times as much that is."""
    none, all_of_them = measure_things(0), measure_things(THINGS)
    print(f"\n{'':<32} {0:>10} {THINGS:>10,} {'×':>8}")
    for name, figure in none.items():
        ratio = f"{all_of_them[name] / figure:>8.2f}" if figure > 0.01 else ""
        print(f"{name:<32} {figure:>10.2f} {all_of_them[name]:>10.2f} {ratio}")


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
    compare_things()


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
