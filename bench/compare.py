"""The gateway beside nginx, a direct connection and LiteLLM, in one run, as one table.

python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python bench/compare.py

Debian's wrk, nginx-light, libnginx-mod-http-lua and openssl are installed where they are missing (as
root). --litellm makes a virtual environment in bench/.litellm and installs LiteLLM there. The
contestant has one core, load and upstream have another; contestants take turns, so that a noisy
machine is noisy for all. Every request body is hashed at the upstream, and every response body is
compared at the client, byte for byte: a row with a byte that is wrong or missing is an error. CPU is
user and system time of the contestant's processes, by the kernel's nanosecond account.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
GATEWAY = BENCH.parent / "gateway.py"
LITELLM = BENCH / ".litellm"
PACKAGES = {
    "wrk": "wrk",
    "nginx": "nginx-light",
    "openssl": "openssl",
    "/usr/lib/nginx/modules/ngx_http_lua_module.so": "libnginx-mod-http-lua",
}
CONTESTANT_CORE, LOAD_CORE = 0, 1
MASTER_KEY = "sk-bench-0123456789abcdef"
LIMITS = {
    "max_budget": 1_000_000,
    "budget_duration": "1mo",
    "rpm_limit": 10**9,
    "tpm_limit": 10**12,
    "max_parallel_requests": 10_000,
}
PATIENCE = 60  # seconds for a contestant to start
LITELLM_TIMES = 4  # as long a turn, once: it answers some thirty requests a second
FLAT_EVENTS = 1000
SLOW_EVENTS = 100
SLOW_INTERVAL = 0.2  # seconds between two events of a slow stream

PLAIN, FLAT, SLOW = 64, 65, 66  # max_tokens says what the upstream is to answer


# ─── What goes over the wire ──────────────────────────────────────────────────────────


def request_body(mode: int, size: int = 1000) -> str:
    """A request of about so many bytes."""
    start = f'{{"model": "claude-sonnet-5-5", "max_tokens": {mode}, "stream": '
    start += "true" if mode != PLAIN else "false"
    return start + ', "messages": [{"role": "user", "content": "' + "x" * (size - 130) + '"}]}'


MESSAGE = json.dumps(
    {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-5-5",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 11, "output_tokens": 4},
    }
)


def event(**fields: Any) -> str:
    return f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n"


FIRST_EVENT = event(
    type="message_start",
    message={
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-5-5",
        "content": [],
        "usage": {"input_tokens": 11, "output_tokens": 1},
    },
)
NEXT_EVENT = event(
    type="content_block_delta", index=0, delta={"type": "text_delta", "text": " some words"}
)
LAST_EVENT = event(
    type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 500}
)


def stream_body(events: int) -> str:
    return FIRST_EVENT + NEXT_EVENT * (events - 2) + LAST_EVENT


UPSTREAM_CONF = """
load_module /usr/lib/nginx/modules/ndk_http_module.so;
load_module /usr/lib/nginx/modules/ngx_http_lua_module.so;
daemon off; pid up.pid; error_log up.err; worker_processes 1;
events { worker_connections 9000; }
http {
  access_log off; keepalive_requests 100000000; lua_shared_dict counts 1m;
  client_body_buffer_size 1m; client_body_temp_path t; proxy_temp_path t;
  fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;
  init_by_lua_block {
    known = $KNOWN
    message, first, next_one, last = [==[$MESSAGE]==], $FIRST, $NEXT, $LAST
    function stream(events, wait)
      ngx.header["Content-Type"] = "text/event-stream"
      ngx.print(first); ngx.flush(true)
      for i = 3, events do
        if wait > 0 then ngx.sleep(wait) end
        ngx.print(next_one); ngx.flush(true)
      end
      ngx.print(last)
    end
  }
  server {
    listen 127.0.0.1:$PLAIN_PORT backlog=4096;
    listen 127.0.0.1:$TLS_PORT ssl backlog=4096;
    ssl_certificate cert.pem; ssl_certificate_key key.pem;
    location /counts {
      content_by_lua_block {
        local c = ngx.shared.counts
        ngx.say(c:get("requests") or 0, " ", c:get("changed") or 0); c:flush_all()
      }
    }
    location / {
      content_by_lua_block {
        ngx.req.read_body()
        local body, c = ngx.req.get_body_data() or "", ngx.shared.counts
        c:incr("requests", 1, 0)
        if not known[ngx.md5(body)] then c:incr("changed", 1, 0) end
        local mode = string.match(string.sub(body, 1, 120), '"max_tokens": ?(%d+)')
        if mode == "$FLAT_MODE" then return stream($FLAT_EVENTS, 0) end
        if mode == "$SLOW_MODE" then return stream($SLOW_EVENTS, $SLOW_INTERVAL) end
        ngx.header["Content-Type"] = "application/json"
        ngx.header["Content-Length"] = #message
        ngx.print(message)
      }
    }
  }
}
"""

PROXY_CONF = """
daemon off; pid px.pid; error_log px.err; worker_processes 1;
events { worker_connections 9000; }
http {
  access_log off; keepalive_requests 100000000; client_max_body_size 32m;
  client_body_buffer_size 1m; client_body_temp_path t; proxy_temp_path t;
  fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;
  upstream plain { server 127.0.0.1:$PLAIN_PORT; keepalive 512; keepalive_requests 100000000; }
  upstream tls { server 127.0.0.1:$TLS_PORT; keepalive 512; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:$PORT backlog=4096;
    location / {
      proxy_pass $SCHEME; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }
  }
}
"""

# Sends one request over and over, and compares every response with what it must be.
WRK_SCRIPT = """
wrk.method = "POST"
for line in io.lines("$FIELDS") do
  local name, value = string.match(line, "([^:]+): (.*)")
  wrk.headers[name] = value
end
local function read(path) local f = io.open(path, "rb"); local s = f:read("*a"); f:close(); return s end
wrk.body = read("$BODY")
local expected = read("$EXPECTED")
local threads = {}
bad = 0
function setup(thread) table.insert(threads, thread) end
function response(status, headers, body)
  if status ~= 200 or body ~= expected then bad = bad + 1 end
end
function done(summary, latency, requests)
  local wrong = 0
  for _, thread in ipairs(threads) do wrong = wrong + thread:get("bad") end
  local e = summary.errors
  io.write(string.format("\\nRESULT %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), wrong + e.connect + e.read + e.write + e.timeout))
end
"""


# ─── Contestants ──────────────────────────────────────────────────────────────────────


@dataclass
class Contestant:
    """Something that answers at ``port``; ``pids`` are what its CPU and memory are counted of."""

    name: str
    port: int
    path: str = "/v1/messages"
    key: str = MASTER_KEY
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def pids(self) -> list[int]:
        """The process and all below it."""
        found = [self.process.pid] if self.process is not None else []
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        return found

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        total = 0
        for pid in self.pids():
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def memory(self) -> float:
        """Resident memory, MB."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("VmRSS:") else 0
        return total / 1024


@dataclass
class Measured:
    """One turn: requests (or events) a second, milliseconds, CPU seconds per thousand."""

    rate: float
    p50: float
    p99: float
    cpu: float
    extra: dict[str, float] = field(default_factory=dict)


def pinned(core: int, *command: str | Path) -> list[str]:
    return ["taskset", "-c", str(core), *map(str, command)]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def ask(url: str, key: str = "", body: Any = None) -> bytes:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


class Bench:
    """The machines of one run: an upstream, and contestants that come and go."""

    def __init__(self, folder: Path, seconds: int, rounds: int) -> None:
        self.folder = folder
        self.seconds = seconds
        self.rounds = rounds
        self.processes: list[subprocess.Popen[bytes]] = []
        self.plain_port, self.tls_port = free_port(), free_port()
        self.bodies = {(mode, 1000): request_body(mode) for mode in (PLAIN, FLAT, SLOW)}
        self.bodies[PLAIN, 100_000] = request_body(PLAIN, 100_000)
        (folder / "t").mkdir()
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
            + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
            + ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
            check=True,
            capture_output=True,
        )

    def spawn(self, command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"log-{len(self.processes)}").open("wb")
        process = subprocess.Popen(
            command, cwd=self.folder, env=os.environ | variables, stdout=log, stderr=log
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)

    def nginx(self, core: int, name: str, template: str, **values: Any) -> subprocess.Popen[bytes]:
        values |= {"PLAIN_PORT": self.plain_port, "TLS_PORT": self.tls_port}
        path = self.folder / f"{name}.conf"
        path.write_text(string.Template(template).substitute(values))
        return self.spawn(pinned(core, "nginx", "-p", self.folder, "-c", path))

    def start_upstream(self) -> None:
        hashes = [hashlib.md5(body.encode()).hexdigest() for body in self.bodies.values()]
        self.nginx(
            LOAD_CORE,
            "upstream",
            UPSTREAM_CONF,
            KNOWN="{" + ", ".join(f'["{known}"] = true' for known in hashes) + "}",
            MESSAGE=MESSAGE,
            FIRST=lua_string(FIRST_EVENT),
            NEXT=lua_string(NEXT_EVENT),
            LAST=lua_string(LAST_EVENT),
            FLAT_MODE=FLAT,
            SLOW_MODE=SLOW,
            FLAT_EVENTS=FLAT_EVENTS,
            SLOW_EVENTS=SLOW_EVENTS,
            SLOW_INTERVAL=SLOW_INTERVAL,
        )
        wait_until(lambda: ask(f"http://127.0.0.1:{self.plain_port}/counts"))

    def counts(self) -> tuple[int, int]:
        """The requests that arrived upstream since the last call, and how many were changed."""
        answer = ask(f"http://127.0.0.1:{self.plain_port}/counts").split()
        return int(answer[0]), int(answer[1])

    def start(self, name: str, *, tls: bool = False) -> Contestant:
        """Start a contestant and wait for its first answer. Its kind stands before the comma."""
        kind = name.partition(",")[0]
        if kind == "direct":
            return Contestant(name, self.plain_port)
        port, began = free_port(), time.perf_counter()
        start = {"nginx": self.start_nginx, "litellm": self.start_litellm}.get(
            kind, self.start_gateway
        )
        contestant = start(name, port, tls)
        path = "/counts" if kind == "nginx" else "/health/liveliness"
        wait_until(lambda: ask(f"http://127.0.0.1:{port}{path}"))
        contestant.started = time.perf_counter() - began
        if kind == "gateway":
            prepare_gateway(contestant, limits="no limits" not in name)
        return contestant

    def start_nginx(self, name: str, port: int, tls: bool) -> Contestant:
        scheme = "https://tls" if tls else "http://plain"
        process = self.nginx(CONTESTANT_CORE, f"proxy-{port}", PROXY_CONF, PORT=port, SCHEME=scheme)
        return Contestant(name, port, process=process)

    def start_gateway(self, name: str, port: int, tls: bool) -> Contestant:
        scheme, upstream = ("https", self.tls_port) if tls else ("http", self.plain_port)
        command = pinned(CONTESTANT_CORE, sys.executable, GATEWAY, f"--port={port}")
        command += [f"--upstream={scheme}://localhost:{upstream}", f"--keys=keys-{port}.json"]
        process = self.spawn(
            [*command, "--logging=warning"],
            ANTHROPIC_API_KEY="sk-ant-bench-0123456789",
            GATEWAY_MASTER_KEY=MASTER_KEY,
            SSL_CERT_FILE=str(self.folder / "cert.pem"),
        )
        return Contestant(name, port, "/anthropic/v1/messages", process=process)

    def start_litellm(self, name: str, port: int, tls: bool) -> Contestant:
        (self.folder / "litellm.yaml").write_text(
            f"general_settings:\n  master_key: {MASTER_KEY}\n"
        )
        command = pinned(CONTESTANT_CORE, LITELLM / "bin/litellm", "--config=litellm.yaml")
        process = self.spawn(
            [*command, f"--port={port}", "--host=127.0.0.1", "--num_workers=1"],
            ANTHROPIC_API_KEY="sk-ant-bench-0123456789",
            ANTHROPIC_API_BASE=f"http://127.0.0.1:{self.plain_port}",
            LITELLM_LOG="ERROR",
        )
        return Contestant(name, port, "/anthropic/v1/messages", process=process)

    def end(self, contestant: Contestant) -> None:
        """Stop a contestant."""
        if contestant.process is not None:
            contestant.process.terminate()
            contestant.process.wait(30)
            self.processes.remove(contestant.process)

    # Load

    def wrk(self, contestant: Contestant, mode: int, size: int, connections: int) -> Measured:
        """One turn of wrk; ``cpu`` is seconds per thousand requests, or events."""
        body, folder = self.bodies[mode, size], self.folder
        events = FLAT_EVENTS if mode == FLAT else 1
        seconds = self.seconds * (LITELLM_TIMES if contestant.name == "litellm" else 1)
        (folder / "body").write_text(body)
        (folder / "expected").write_text(MESSAGE if mode == PLAIN else stream_body(events))
        (folder / "fields").write_text("\n".join(request_fields(contestant.key)) + "\n")
        values = {"BODY": "body", "EXPECTED": "expected", "FIELDS": "fields"}
        script = folder / "load.lua"
        script.write_text(string.Template(WRK_SCRIPT).substitute(values))
        self.counts()
        cpu = contestant.cpu()
        done = subprocess.run(
            pinned(LOAD_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s")
            + ["--timeout=60s", "-s", str(script)]
            + [f"http://127.0.0.1:{contestant.port}{contestant.path}"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        cpu = contestant.cpu() - cpu
        result = done.stdout.split("RESULT ")[1].split()
        requests, micros, p50, p99, bad = map(int, result)
        arrived, changed = self.counts()
        self.verify(contestant, requests, bad, arrived, changed)
        units = max(1, requests * events)
        return Measured(units / micros * 1e6, p50 / 1000, p99 / 1000, cpu / units * 1000)

    def verify(
        self, contestant: Contestant, answered: int, bad: int, arrived: int, changed: int
    ) -> None:
        """What was counted must add up. LiteLLM is let off the bodies, which it writes anew."""
        if contestant.name == "litellm":
            changed = 0
        cut = arrived - answered  # by wrk, when its time was over
        if bad or changed > cut or cut < 0:
            raise SystemExit(
                f"{contestant.name}: {answered} answers of which {bad} wrong;"
                f" {arrived} requests arrived, {changed} of them changed"
            )

    def slow_streams(self, contestant: Contestant, streams: int) -> Measured:
        """So many slow streams at once, from a process of its own on the load's core."""
        body = request_body(SLOW)
        job = {
            "port": contestant.port,
            "path": contestant.path,
            "fields": request_fields(contestant.key),
            "body": body,
            "streams": streams,
            "sha256": hashlib.sha256(stream_body(SLOW_EVENTS).encode()).hexdigest(),
        }
        self.counts()
        cpu, memory, peak = contestant.cpu(), contestant.memory(), 0.0
        load = subprocess.Popen(
            pinned(LOAD_CORE, sys.executable, __file__, "--streams"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert load.stdin is not None and load.stdout is not None
        load.stdin.write(json.dumps(job).encode())
        load.stdin.close()
        while load.poll() is None:
            peak = max(peak, contestant.memory())
            time.sleep(0.2)
        result = json.loads(load.stdout.read())
        cpu = contestant.cpu() - cpu
        arrived, changed = self.counts()
        self.verify(contestant, streams, result["bad"], arrived, changed)
        events = streams * SLOW_EVENTS
        extra = {"gap99": result["gap99"], "stream_kb": (peak - memory) * 1024 / streams}
        return Measured(
            events / result["seconds"], result["p50"], result["p99"], cpu / events * 1000, extra
        )


def lua_string(text: str) -> str:
    return json.dumps(text).replace("\\/", "/")


def request_fields(key: str) -> list[str]:
    """What an SDK sends."""
    return [
        "Host: 127.0.0.1",
        "content-type: application/json",
        f"x-api-key: {key}",
        "anthropic-version: 2023-06-01",
        "accept: application/json",
        "accept-encoding: gzip, deflate",
        "user-agent: Anthropic/Python 2.12.0",
        "x-stainless-lang: python",
        "x-stainless-package-version: 2.12.0",
        "x-stainless-os: Linux",
        "x-stainless-arch: x64",
        "x-stainless-runtime: CPython",
        "x-stainless-runtime-version: 3.11.7",
        "x-stainless-retry-count: 0",
    ]


def prepare_gateway(contestant: Contestant, *, limits: bool) -> None:
    """Make a key, and wait until the prices are there."""
    url = f"http://127.0.0.1:{contestant.port}"
    made = ask(f"{url}/key/generate", MASTER_KEY, LIMITS if limits else {})
    contestant.key = json.loads(made)["key"]
    wait_until(lambda: b'"loaded"' in ask(f"{url}/health/readiness"))


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise SystemExit("a contestant did not start")
        time.sleep(0.002)


# ─── Slow streams, in a process of their own ──────────────────────────────────────────


class StreamClient(asyncio.Protocol):
    """One stream: when it was asked for, when each part came, and what it said."""

    def __init__(self, request: bytes, done: Callable[[], None]) -> None:
        self.request = request
        self.done = done
        self.data: list[bytes] = []
        self.times: list[float] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.asked = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.data.append(data)
        if data.endswith(b"0\r\n\r\n"):
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.done()

    def body(self) -> bytes:
        """The body, freed of chunks."""
        rest = b"".join(self.data).partition(b"\r\n\r\n")[2]
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return body


async def run_streams(job: dict[str, Any]) -> dict[str, Any]:
    """All streams, begun one after the other within one interval of their events."""
    loop = asyncio.get_running_loop()
    lines = [f"POST {job['path']} HTTP/1.1", *job["fields"]]
    lines += [f"content-length: {len(job['body'])}", "\r\n"]
    request = "\r\n".join(lines).encode() + job["body"].encode()
    ended = asyncio.Semaphore(0)
    clients = []
    began = time.perf_counter()
    spread = 2.0 if job["streams"] <= 500 else 8.0  # seconds, so that no burst is measured
    for number in range(job["streams"]):
        await asyncio.sleep(began + spread * number / job["streams"] - time.perf_counter())
        _, client = await loop.create_connection(
            lambda: StreamClient(request, ended.release), "127.0.0.1", job["port"]
        )
        clients.append(client)
    for _ in clients:
        await ended.acquire()
    seconds = time.perf_counter() - began
    bad = sum(hashlib.sha256(c.body()).hexdigest() != job["sha256"] for c in clients)
    first = sorted(c.times[0] - c.asked for c in clients if c.times)
    gaps = sorted(
        abs(b - a - SLOW_INTERVAL)
        for c in clients
        for a, b in zip(c.times[:-2], c.times[1:-1], strict=True)
    )
    return {
        "seconds": seconds,
        "bad": bad,
        "p50": quantile(first, 0.5) * 1000,
        "p99": quantile(first, 0.99) * 1000,
        "gap99": quantile(gaps, 0.99) * 1000,
    }


def quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


# ─── The table ────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """One line of the table."""

    name: str
    turn: Callable[[Bench, Contestant], Measured]
    unit: str = "request"
    tls: bool = False
    litellm: bool = True


def wrk_row(name: str, mode: int, size: int, connections: int, **more: Any) -> Row:
    def turn(bench: Bench, contestant: Contestant) -> Measured:
        return bench.wrk(contestant, mode, size, connections)

    return Row(name, turn, **more)


def stream_row(streams: int) -> Row:
    def turn(bench: Bench, contestant: Contestant) -> Measured:
        return bench.slow_streams(contestant, streams)

    few = streams <= 500  # LiteLLM needs minutes for more
    return Row(f"{streams:,} slow streams", turn, unit="event", litellm=few)


ROWS = {
    "1": wrk_row("1 KB POST, 1 connection", PLAIN, 1000, 1),
    "32": wrk_row("1 KB POST, 32 connections", PLAIN, 1000, 32),
    "256": wrk_row("1 KB POST, 256 connections", PLAIN, 1000, 256),
    "100k": wrk_row("100 KB POST, 32 connections", PLAIN, 100_000, 32),
    "tls": wrk_row("1 KB POST, 32, TLS upstream", PLAIN, 1000, 32, tls=True),
    "flat": wrk_row("SSE flat out, 32 connections", FLAT, 1000, 32, unit="event"),
    "slow500": stream_row(500),
    "slow2000": stream_row(2000),
}


BESIDE_TLS = ", plain upstream"  # beside those with TLS, to tell what TLS costs


def run_rows(bench: Bench, rows: list[Row], names: list[str], *, tls: bool) -> None:
    """Let the contestants take turns at each row, after a turn to warm up, and print it."""
    contestants = [bench.start(name, tls=tls and not name.endswith(BESIDE_TLS)) for name in names]
    for contestant in contestants:
        bench.wrk(contestant, PLAIN, 1000, 8)
    for row in rows:
        turns: dict[str, list[Measured]] = {c.name: [] for c in contestants}
        for number in range(bench.rounds):
            for contestant in contestants:
                if contestant.name != "litellm" or (number == 0 and row.litellm):
                    turns[contestant.name].append(row.turn(bench, contestant))
        medians = {name: median_of(taken) for name, taken in turns.items() if taken}
        for name, measured in medians.items():
            print(table_line(row, name, measured, medians), flush=True)
    for contestant in contestants:
        bench.end(contestant)


def median_of(turns: list[Measured]) -> Measured:
    def median(read: Callable[[Measured], float]) -> float:
        return statistics.median(map(read, turns))

    extra = {n: median(lambda t, n=n: t.extra[n]) for n in turns[0].extra}  # type: ignore[misc]
    return Measured(
        *(median(lambda t, n=n: getattr(t, n)) for n in ("rate", "p50", "p99", "cpu")),  # type: ignore[misc]
        extra=extra,
    )


HEADINGS = ["row", "through", "a second", "p50 ms", "p99 ms", "CPU", "× nginx", "besides"]


def table_line(row: Row, name: str, m: Measured, medians: dict[str, Measured]) -> str:
    """A line of Markdown; CPU is seconds per 1,000 requests or per million events."""
    per_event = row.unit == "event"
    cpu = "" if name == "direct" else f"{m.cpu * (1000 if per_event else 1):.3g} s"
    ratio = "" if name == "direct" else f"{m.cpu / medians['nginx'].cpu:.2f}"
    besides = ""
    if m.extra:
        besides = f"first byte; gap p99 ±{m.extra['gap99']:.1f} ms"
        if name != "direct":
            besides += f"; {m.extra['stream_kb']:.0f} KB a stream"
    unit = "events" if per_event else "requests"
    cells = [row.name, name, f"{m.rate:,.0f} {unit}", f"{m.p50:.2f}", f"{m.p99:.2f}"]
    return "| " + " | ".join([*cells, cpu, ratio, besides]) + " |"


def measure_starts(bench: Bench, names: list[str]) -> None:
    """Start to first 200, and memory at rest."""
    for name in names:
        if name == "direct":
            continue
        seconds = []
        for _ in range(bench.rounds):
            contestant = bench.start(name)
            seconds.append(contestant.started)
            memory = contestant.memory()
            bench.end(contestant)
        print(
            f"| start, and memory at rest | {name} | first 200 after"
            f" {statistics.median(seconds):.2f} s | | | | | {memory:.0f} MB |"
        )


def install(litellm: bool) -> None:
    """Get what is missing: Debian packages, and LiteLLM into an environment of its own."""
    missing = [
        package
        for name, package in PACKAGES.items()
        if not shutil.which(name) and not Path(name).exists()
    ]
    if missing:
        print("installing", *missing, file=sys.stderr)
        subprocess.run(["apt-get", "install", "-y", "-qq", *missing], check=True)
    if litellm and not (LITELLM / "bin/litellm").exists():
        print("installing litellm", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", LITELLM], check=True)
        subprocess.run([LITELLM / "bin/pip", "install", "-q", "litellm[proxy]"], check=True)


def versions(litellm: bool) -> Iterator[str]:
    """What was compared, and on what."""
    import tornado

    yield f"{datetime.now(UTC):%-d %B %Y}, {os.cpu_count()} cores ({processor()})"
    yield f"Python {platform.python_version()}, Tornado {tornado.version}"
    with contextlib.suppress(ImportError):
        import uvloop

        yield f"uvloop {uvloop.__version__}"
    shown = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True)
    yield shown.stderr.strip().rpartition(": ")[2]
    if litellm:
        command = [
            LITELLM / "bin/python",
            "-c",
            "import importlib.metadata as m; print('LiteLLM', m.version('litellm'))",
        ]
        yield subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--litellm", action="store_true", help="measure LiteLLM too")
    parser.add_argument("--seconds", type=int, default=4, help="of one turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--rows", default="", help=f"some of {','.join(ROWS)},start")
    arguments = parser.parse_args()
    install(arguments.litellm)
    names = ["direct", "nginx", "gateway", "gateway, no limits"]
    names += ["litellm"] if arguments.litellm else []
    chosen = arguments.rows.split(",") if arguments.rows else [*ROWS, "start"]
    print("; ".join(versions(arguments.litellm)), end="\n\n")
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seconds, arguments.rounds)
        try:
            bench.start_upstream()
            rows = [ROWS[name] for name in chosen if name != "start"]
            plain = [row for row in rows if not row.tls]
            if plain:
                run_rows(bench, plain, names, tls=False)
            if len(plain) < len(rows):
                secure = [n for n in names if n not in ("direct", "litellm")]
                secure += ["nginx" + BESIDE_TLS, "gateway" + BESIDE_TLS]
                run_rows(bench, [row for row in rows if row.tls], secure, tls=True)
            if "start" in chosen:
                measure_starts(bench, names)
        finally:
            bench.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--streams"]:
        with contextlib.suppress(ImportError):
            import uvloop

            uvloop.install()
        print(json.dumps(asyncio.run(run_streams(json.load(sys.stdin)))))
    else:
        main()
