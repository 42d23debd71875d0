"""Tests of the gateway: through real sockets, against a process started as a user would.

The upstream is a raw stand-in in this file, which can be made to fail in any way, or the
gateway's own `MockAnthropic` where nothing has to fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
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
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import anthropic
import httpx2
import pytest
import tornado
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import gateway

GATEWAY = Path(gateway.__file__)
REAL_KEY = "sk-ant-real-0123456789-0123456789"
MASTER_KEY = "sk-master-0123456789abcdef"
MIB = 1024 * 1024
PATIENCE = 10  # seconds until a wait for something that must happen is given up

LOCAL = "localhost"  # the Host that an open gateway takes

gen_test = pytest.mark.gen_test(timeout=30)


# ─── Helpers: the gateway as a process ────────────────────────────────────────────────


@dataclass
class Process:
    """A running gateway."""

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

    def memory(self) -> int:
        """Resident memory, bytes."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def peak_memory(self) -> int:
        """The highest resident memory so far, bytes."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def manage(self, path: str, body: Any = None, key: str = MASTER_KEY) -> httpx2.Response:
        """Call /key/…: POST with a body, GET without."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if body is None:
            return httpx2.get(self.url + path, headers=headers)
        return httpx2.post(self.url + path, headers=headers, json=body)

    def new_key(self, **fields: Any) -> str:
        answer = self.manage("/key/generate", fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["key"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(PATIENCE)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would steer the gateway."""
    unset = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_BASE")
    unset += ("GATEWAY_MASTER_KEY", "LITELLM_MASTER_KEY", "ANTHROPIC_BASE_URL")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, **variables}


DEFAULT_VARIABLES = {"ANTHROPIC_API_KEY": REAL_KEY, "GATEWAY_MASTER_KEY": MASTER_KEY}


class Starter:
    """Starts gateways in a folder and ends them after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []

    def __call__(
        self,
        upstream: str = "mock",
        *options: str,
        variables: dict[str, str] | None = None,
        program: list[str] | None = None,
        folder: Path | None = None,
    ) -> Process:
        folder = folder or self.folder
        log_path = folder / f"log-{len(self.started)}.txt"
        with log_path.open("w") as log:
            popen = subprocess.Popen(
                [
                    *(program or [sys.executable, str(GATEWAY)]),
                    "--port=0",
                    f"--upstream={upstream}",
                    *options,
                ],
                cwd=folder,
                env=environment(**(DEFAULT_VARIABLES if variables is None else variables)),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
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
                process.popen.kill()
            process.popen.wait(PATIENCE)
            process.popen.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def mocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One gateway in front of the built-in stand-in, for all tests that break nothing."""
    starter = Starter(tmp_path_factory.mktemp("mocked"))
    yield starter("mock")
    starter.close()


@pytest.fixture(scope="module")
def virtual_key(mocked: Process) -> str:
    return mocked.new_key(key_alias="shared by the module")


def failed_start(folder: Path, *options: str, **variables: str) -> str:
    """Start a gateway that must not start; its one line."""
    done = subprocess.run(
        [sys.executable, str(GATEWAY), *options],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


# ─── Helpers: a raw upstream and a raw client ─────────────────────────────────────────


async def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


@dataclass
class Arrived:
    """A request as it arrived at the raw upstream."""

    head: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    body: bytes = b""
    closed_at: float = 0.0

    @property
    def start_line(self) -> str:
        return self.head.split(b"\r\n")[0].decode("latin-1")

    @property
    def target(self) -> str:
        return self.start_line.split(" ")[1]

    @property
    def fields(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:-2]
        return [tuple(line.split(": ", 1)) for line in lines]

    def field(self, name: str) -> list[str]:
        return [v for n, v in self.fields if n.lower() == name.lower()]

    async def read_body(self) -> bytes:
        if self.field("content-length"):
            self.body = await self.reader.readexactly(int(self.field("content-length")[0]))
        elif self.field("transfer-encoding"):
            self.body = await read_chunked(self.reader)
        return self.body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = b"{}", status: str = "200 OK", *fields: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "\r\n"]
        if self.start_line.startswith("HEAD "):
            body = b""
        await self.send("\r\n".join(lines).encode("latin-1") + body)

    async def gone(self) -> float:
        """Wait until the gateway closes this connection; when that was."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        return time.monotonic()


async def read_chunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readline() == b"\r\n"
    return body


Script = Callable[[Arrived], Awaitable[None]]


@dataclass
class Upstream:
    """A raw HTTP server whose script says what it does with each request."""

    script: Script
    port: int = 0
    arrived: list[Arrived] = field(default_factory=list)
    connections: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = Arrived(head, reader, writer)
                self.arrived.append(request)
                await self.script(request)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def upstream(script: Script, **kwargs: Any) -> AsyncIterator[Upstream]:
    serving = Upstream(script)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serving.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=4 * MIB, **kwargs)
    serving.port = server.sockets[0].getsockname()[1]
    serving.scheme = "https" if kwargs.get("ssl") else "http"
    try:
        yield serving
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(request: Arrived) -> None:
    """Answer with what arrived, as JSON."""
    body = await request.read_body()
    told = {
        "start_line": request.start_line,
        "fields": request.fields,
        "body": hashlib.sha256(body).hexdigest(),
        "size": len(body),
    }
    await request.answer(json.dumps(told).encode(), "200 OK", "Content-Type: application/json")


@dataclass
class Response:
    """A raw response as it reached a client."""

    head: bytes
    body: bytes
    clean: bool = True
    informational: list[bytes] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    @property
    def reason(self) -> str:
        return self.head.split(b"\r\n")[0].split(b" ", 2)[2].decode("latin-1")

    def field(self, name: str) -> list[str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:-2]
        pairs = [line.split(": ", 1) for line in lines]
        return [pair[1] for pair in pairs if pair[0].lower() == name.lower()]

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, str]:
        """The Anthropic error in the body; also checks the envelope."""
        document = self.json()
        assert document["type"] == "error" and document["request_id"]
        assert [document["request_id"]] == self.field("request-id")
        return document["error"]


class Client:
    """A raw HTTP/1.1 client on one connection."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self.port, limit=4 * MIB
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def request(
        self,
        start: str,
        *fields: str,
        body: bytes | None = None,
        key: str = "",
        host: str = "gateway",
    ) -> None:
        lines = [f"{start} HTTP/1.1", f"Host: {host}", *fields]
        if key:
            lines.append(f"x-api-key: {key}")
        if body is not None and "content-length" not in "".join(fields).lower():
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "\r\n"]).encode("latin-1") + (body or b""))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE)

    async def response(self, method: str = "GET") -> Response:
        informational = []
        while (head := await self.head()).split(b" ")[1].startswith(b"1"):
            informational.append(head)
        response = Response(head, b"", informational=informational)
        if method == "HEAD" or response.status in (204, 304):
            return response
        with contextlib.suppress(ConnectionError):
            try:
                async with asyncio.timeout(PATIENCE):
                    response.body = await self.read_body(response)
                return response
            except (asyncio.IncompleteReadError, ValueError):
                pass
        response.clean = False
        return response

    async def read_body(self, response: Response) -> bytes:
        if response.field("content-length"):
            return await self.reader.readexactly(int(response.field("content-length")[0]))
        if response.field("transfer-encoding"):
            return await read_chunked(self.reader)
        return await self.reader.read()

    def reset(self) -> None:
        """Close with a TCP reset."""
        linger = struct.pack("ii", 1, 0)
        client = self.writer.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


async def ask(port: int, start: str, *fields: str, **kwargs: Any) -> Response:
    """One request on a connection of its own."""
    async with Client(port) as client:
        client.request(start, *fields, **kwargs)
        return await client.response(start.split(" ")[0])


MESSAGE = {
    "model": "claude-sonnet-5-5",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Hello, world"}],
}


# ─── Grammar, apart from I/O ─────────────────────────────────────────────────────────


def feed_in_parts(length: int, parts: list[bytes]) -> tuple[bytes, bytes, bool]:
    body, payload, behind = gateway.Body(length), b"", b""
    for part in parts:
        if body.complete:
            behind += part
            continue
        taken, rest = body.feed(part)
        payload += taken
        behind += rest
    return payload, behind, body.complete


def split_at(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


CUTS = st.lists(st.integers(min_value=0), max_size=12)


@given(chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=8), cuts=CUTS)
def test_chunked_bodies_read_the_same_however_they_are_split(
    chunks: list[bytes], cuts: list[int]
) -> None:
    wire = b"".join(b"%X;ext=1\r\n%b\r\n" % (len(c), c) for c in chunks)
    wire += b"0\r\nTrailer: x\r\n\r\nbehind"
    payload, behind, complete = feed_in_parts(gateway.CHUNKED, split_at(wire, cuts))
    assert (payload, behind, complete) == (b"".join(chunks), b"behind", True)


@given(data=st.binary(max_size=60), cuts=CUTS)
def test_fixed_bodies_read_the_same_however_they_are_split(data: bytes, cuts: list[int]) -> None:
    payload, behind, complete = feed_in_parts(len(data), split_at(data + b"behind", cuts))
    assert (payload, behind, complete) == (data, b"behind", True)


@pytest.mark.parametrize(
    "wire",
    [
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"5_0\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"-1\r\n",
        b"5\nhello\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello\n0\r\n",
        b"\r\n",
        b"5;a=\x01\r\nhello",
        b"5;a=b\rc\r\nhello",
        b"fffffffffffffffff\r\n",
        b"5" * 2000,
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 5000,
    ],
)
def test_malformed_chunks_are_refused(wire: bytes) -> None:
    for parts in ([wire], [wire[i : i + 1] for i in range(len(wire))]):
        with pytest.raises(gateway.ProtocolError):
            feed_in_parts(gateway.CHUNKED, parts)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +5",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5 5",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: ²".encode("latin-1"),
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\x0bchunked",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked",
        b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\nb: c",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00",
        b"GET / HTTP/1.1\r\nHost: a\r\n: a",
        b"GET / HTTP/1.1\r\nHost: a\r\nno colon",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b",
        b"GET / HTTP/1.1",
        b"GET  / HTTP/1.1\r\nHost: a",
        b"GET / HTTP/2.0\r\nHost: a",
        b"GET / a HTTP/1.1\r\nHost: a",
        b"G(T / HTTP/1.1\r\nHost: a",
        b" GET / HTTP/1.1\r\nHost: a",
    ],
)
def test_malformed_heads_are_refused(head: bytes) -> None:
    with pytest.raises(gateway.ProtocolError):
        gateway.declared_length(gateway.parse_request_head(head))


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/v1/messages?beta=true", "/v1/messages"),
        ("//v1//messages", "/v1/messages"),
        ("/v1/%6Dessages", "/v1/messages"),
        ("/v1%2Fmessages", "/v1/messages"),
        ("/v1/a...b/..c/.d", "/v1/a...b/..c/.d"),
        ("/v1/messages?x=../..", "/v1/messages"),
    ],
)
def test_rules_see_the_decoded_path(target: str, path: str) -> None:
    assert gateway.rule_path(target) == path


DOT_SEGMENTS = [
    "/v1/../messages",
    "/v1/./messages",
    "/v1/..",
    "/v1/%2e%2e/x",
    "/v1/.%2E/x",
    "/v1/%2E/x",
    "/v1/..%2fx",
    "/v1%2f..%2fx",
    "/v1/..\\x",
    "/v1/..;a=b/x",
    "/v1/%252e%252e/x",
    "/v1/x#/../y",
]


@pytest.mark.parametrize("target", DOT_SEGMENTS)
def test_dot_segments_are_refused_by_rule(target: str) -> None:
    with pytest.raises(gateway.APIError) as refused:
        gateway.rule_path(target)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("offered", "kept"),
    [
        (["gzip, deflate, br, zstd"], "gzip"),
        (["br;q=1.0, gzip;q=0.5", "identity;q=0"], "gzip;q=0.5, identity;q=0"),
        (["br"], "identity"),
        (["*"], "identity"),
        (["GZIP"], "GZIP"),
    ],
)
def test_accepted_codings_are_cut_down(offered: list[str], kept: str) -> None:
    assert gateway.readable_codings(tuple(offered)) == kept


@given(cuts=CUTS, before=st.text("sk-ant", max_size=20), after=st.text("sk-ant", max_size=20))
def test_a_secret_is_masked_however_the_stream_is_split(
    cuts: list[int], before: str, after: str
) -> None:
    data = (before + REAL_KEY + after + REAL_KEY).encode()
    redactor, parts = gateway.Redactor(REAL_KEY.encode()), split_at(data, cuts)
    out = b"".join(redactor.feed(part, False) for part in parts) + redactor.feed(b"", True)
    masked = b"*" * len(REAL_KEY)
    assert out == before.encode() + masked + after.encode() + masked


def test_an_event_is_never_held_back_by_the_mask() -> None:
    redactor = gateway.Redactor(b"sk-ant-secret")
    assert redactor.feed(b"data: sk-ant\n\n", False) == b"data: sk-ant\n\n"
    assert redactor.feed(b"data: sk-an", False) == b"data: "


@pytest.mark.parametrize(
    ("base", "before", "after"),
    [
        (
            "",
            b'{"results_url":"https://api.anthropic.com/v1/files/x"}',
            b'{"results_url":"/v1/files/x"}',
        ),
        ("", b'{"results_url" : "http://h:1/v1/files/x"}', b'{"results_url" : "/v1/files/x"}'),
        ("", b'{"results_url":"https:\\/\\/a\\/v1"}', b'{"results_url":"\\/v1"}'),
        ("", b'{"results_url":null}', b'{"results_url":null}'),
        ("", b'{"a":"\\"results_url\\":\\"https://a/b\\""}', None),
        ("", b'{"url":"https://api.anthropic.com/v1/files/x"}', None),
        ("/base", b'{"results_url":"https://a/base/v1/files/x"}', b'{"results_url":"/v1/files/x"}'),
        ("/base", b'{"results_url":"/base/v1/files/x"}', b'{"results_url":"/v1/files/x"}'),
        ("/base", b'{"results_url":"https://a/v1/files/x"}', b'{"results_url":"/v1/files/x"}'),
    ],
)
def test_results_url_becomes_relative(base: str, before: bytes, after: bytes | None) -> None:
    assert gateway.rewrite_results_url(before, base) == (before if after is None else after)


def test_durations() -> None:
    start = datetime(2027, 1, 31, 12, tzinfo=UTC)
    assert gateway.later(start, "90s") == start + timedelta(seconds=90)
    assert gateway.later(start, "2w") == start + timedelta(days=14)
    assert gateway.later(start, "1mo") == datetime(2027, 2, 28, 12, tzinfo=UTC)
    assert gateway.later(start, "12mo") == datetime(2028, 1, 31, 12, tzinfo=UTC)
    for wrong in ("", "30", "d", "1y", "-1d", "1.5h", "1 d", "١d", "999999999mo", "999999999w"):
        with pytest.raises(ValueError, match="duration|long"):
            gateway.later(start, wrong)


# ─── Start and options ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--port=x", "--port"),
        ("--port=70000", "--port"),
        ("--idle-timeout=-1", "--idle-timeout"),
        ("--idle-timeout=nan", "--idle-timeout"),
        ("--connect-timeout=soon", "--connect-timeout"),
        ("--max-body-size=0", "--max-body-size"),
        ("--upstream=ftp://x", "--upstream"),
        ("--upstream=http://x:99999", "--upstream"),
        ("--upstream=https://user:pw@host", "--upstream"),
        ("--upstream=api.anthropic.com", "--upstream"),
        ("--nonsense=1", "--nonsense"),
        ("stray", "stray"),
        ("--config=/nonexistent.conf", "--config"),
        ("--address=999.1.1.1", "listen"),
        ("--keys=/nonexistent/folder", ""),
    ],
)
def test_a_wrong_value_ends_the_start(option: str, names: str, tmp_path: Path) -> None:
    if option.startswith("--keys"):
        (tmp_path / "folder").mkdir()
        option = f"--keys={tmp_path / 'folder'}"
    line = failed_start(tmp_path, "--port=0", "--upstream=mock", option)
    assert names in line


def test_a_port_in_use_ends_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in failed_start(tmp_path, f"--port={port}", "--upstream=mock")


def test_a_config_file_is_read_and_the_command_line_wins(tmp_path: Path, start: Starter) -> None:
    config = tmp_path / "gateway.conf"
    config.write_text('keys = "other.json"\nidle_timeout = "nonsense"\n')
    assert "config" in failed_start(tmp_path, f"--config={config}")
    config.write_text('keys = "other.json"\nmax_body_size = 5\n')
    process = start("mock", f"--config={config}", "--max-body-size=100")
    assert (tmp_path / "other.json").exists()
    key = process.new_key()
    send = {"headers": {"x-api-key": key}, "content": b"x" * 50}
    assert httpx2.post(process.url + "/v1/files/x", **send).status_code == 405
    send["content"] = b"x" * 101
    assert httpx2.post(process.url + "/v1/files/x", **send).status_code == 413


def test_help_lists_the_options(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(GATEWAY), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0
    for option in ("--port", "--upstream", "--keys", "--idle-timeout", "--max-body-size"):
        assert option in done.stderr


def test_the_first_lines_say_what_matters(start: Starter) -> None:
    closed = start("https://api.anthropic.com/base")
    assert "https://api.anthropic.com/base" in closed.banner
    assert "virtual keys are required" in closed.banner
    assert f"export ANTHROPIC_BASE_URL={closed.url}/anthropic" in closed.banner
    assert REAL_KEY not in closed.banner and MASTER_KEY not in closed.banner
    closed.stop()
    bare = start("http://localhost:1", "--keys=bare.json", variables={})
    assert "no ANTHROPIC_API_KEY is set" in bare.banner
    assert "open to all" in bare.banner
    assert "no GATEWAY_MASTER_KEY is set" in bare.banner
    bare.stop()
    for weak in ("sk-1234", "sk-short"):
        assert "weak" in start("mock", variables={"LITELLM_MASTER_KEY": weak}).banner
        start.started[-1].stop()


def listening_addresses(process: Process) -> set[str]:
    """The local addresses on which this process's port is listened on, from /proc."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, port = local.split(":")
            if state == "0A" and int(port, 16) == process.port:
                found.add(address)
    return found


def test_open_mode_listens_on_loopback_only(start: Starter) -> None:
    loopback = {"0100007F", "00000000000000000000000001000000"}
    anywhere = {"00000000", "00000000000000000000000000000000"}
    assert listening_addresses(start("mock", variables={})) <= loopback
    start.started[-1].stop()
    assert listening_addresses(start("mock")) & anywhere
    start.started[-1].stop()
    assert listening_addresses(start("mock", "--address=0.0.0.0", variables={})) == {"00000000"}


def test_the_upstream_is_not_read_from_anthropic_base_url(start: Starter) -> None:
    variables = {**DEFAULT_VARIABLES, "ANTHROPIC_BASE_URL": "http://localhost:4000"}
    process = start("", variables=variables)
    assert "relaying to https://api.anthropic.com\n" in process.banner
    process.stop()
    variables["ANTHROPIC_API_BASE"] = "http://localhost:9/x"
    assert "relaying to http://localhost:9/x\n" in start("", variables=variables).banner


def test_one_file_and_tornado_suffice(start: Starter, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(GATEWAY, folder)
    packages = tmp_path / "packages"  # all that Python finds beside its own library
    packages.mkdir()
    (packages / "tornado").symlink_to(Path(tornado.__file__).parent)
    process = start(
        "mock",
        program=[sys.executable, "-S", "gateway.py"],
        folder=folder,
        variables={**DEFAULT_VARIABLES, "PYTHONPATH": str(packages)},
    )
    assert "genai-prices is not installed" in process.banner
    budget = process.manage("/key/generate", {"max_budget": 5})
    assert "genai-prices" in error_of(budget, 400, "invalid_request_error")
    assert "prometheus-client" in error_of(process.manage("/metrics"), 501, "api_error")
    key = process.new_key()
    client = anthropic.Anthropic(base_url=process.url + "/anthropic", api_key=key)
    assert client.messages.create(**MESSAGE).content[0].text == "You said: Hello, world"


def test_inline_metadata_names_what_requirements_name() -> None:
    script = re.search(r"# /// script\n(.*?)# ///\n", GATEWAY.read_text(), re.DOTALL)[1]
    named = set(re.findall(r'"([a-z0-9-]+)[^"]*"', script.split("dependencies")[1]))
    listed = (GATEWAY.parent / "requirements.txt").read_text().split("# to test")[0]
    assert named == set(re.findall(r"^([a-z0-9-]+)", listed, re.MULTILINE))


# ─── The relay: requests ─────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def relayed(
    start: Starter, script: Script = echo, *options: str, base: str = "", **kwargs: Any
) -> AsyncIterator[tuple[Process, Upstream, str]]:
    """A gateway in front of a raw upstream, and a virtual key for it."""
    async with upstream(script, **kwargs.pop("server", {})) as up:
        process = start(up.url + base, *options, **kwargs)
        key = process.new_key() if "GATEWAY_MASTER_KEY" in process_variables(kwargs) else ""
        yield process, up, key


def process_variables(kwargs: dict[str, Any]) -> dict[str, str]:
    return kwargs.get("variables") or (DEFAULT_VARIABLES if "variables" not in kwargs else {})


@gen_test
async def test_every_method_is_relayed(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "PURGE"):
            answer = await ask(process.port, f"{method} /anthropic/v1/files/things", key=key)
            assert answer.status == 200
            assert up.arrived[-1].start_line == f"{method} /v1/files/things HTTP/1.1"
        assert up.connections == 1, "the upstream connection was not kept alive"


TARGETS = [
    "/v1/files/a%2Fb",
    "/v1/files//x",
    "/v1/files/a+b?x=1+2",
    "/v1/files/m?ids=a&ids=b&empty=&bare&&x=%e4%E4",
    "/v1/files/m?",
    "/v1/files/%7euser/%41",
    "/v1/files/m?u=http://evil.example/",
    "/v1/files/@evil.example/",
    "/v1/files/m;a=b?c=d;e",
    "/v1/files/\xfc",
]


@pytest.mark.parametrize("base", ["", "/deep/base"])
@gen_test
async def test_raw_targets_are_kept(start: Starter, base: str) -> None:
    async with relayed(start, base=base) as (process, up, key):
        for target in TARGETS:
            for prefix in ("/anthropic", ""):
                answer = await ask(process.port, f"GET {prefix}{target}", key=key)
                assert answer.status == 200, (target, answer)
                assert up.arrived[-1].target == base + target
        await ask(process.port, "GET /anthropic//v1/files/x", key=key)
        assert up.arrived[-1].target == base + "//v1/files/x"


@gen_test
async def test_dot_segments_and_foreign_targets_never_go_upstream(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        for target in DOT_SEGMENTS:
            answer = await ask(process.port, f"GET /anthropic{target}", key=key)
            assert answer.status == 400, target
            assert answer.error["type"] == "invalid_request_error"
        for target in (
            "http://evil.example/v2/x",
            "*",
            "evil.example:443",
            "/%61nthropic/v1/files/x",
        ):
            answer = await ask(process.port, f"GET {target}", key=key)
            assert answer.status in (400, 404), target
        assert not up.arrived
        # RFC 9112 section 3.2.2 obliges a server to take it; the host that it names is no matter.
        for form in ("http://evil.example", "HTTPS://me@evil.example:1"):
            answer = await ask(process.port, f"GET {form}/v1/files/x?a=b", key=key)
            assert answer.status == 200
            assert up.arrived[-1].target == "/v1/files/x?a=b"
            assert up.arrived[-1].field("host") == [f"localhost:{up.port}"]


BODIES: list[tuple[str, bytes]] = [
    ("application/json", b' {"b":1,  "a":1e400, "a":2, "c":"\\ud800", "d":"\xc3\xa9"}\n'),
    ("application/json", b"not JSON at all \x00\xff"),
    ("application/json; charset=utf-8", gzip.compress(b'{"a": 1}')),
    ("text/plain", b"plain"),
    ("multipart/form-data; boundary=x", b"--x\r\n\r\n\x00\x01\r\n--x--\r\n"),
    ("application/octet-stream", bytes(range(256)) * 1000),
    ("application/json", b"[" + b"1," * 500_000 + b"1]"),
]


@gen_test
async def test_request_bytes_are_upstream_bytes(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        for kind, body in BODIES:
            answer = await ask(
                process.port, "POST /v1/files/x", f"Content-Type: {kind}", body=body, key=key
            )
            assert answer.json()["body"] == hashlib.sha256(body).hexdigest()
            assert up.arrived[-1].field("content-length") == [str(len(body))]
            assert up.arrived[-1].field("content-type") == [kind]


@gen_test
async def test_chunked_requests_arrive_whole(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        for kind in ("application/json", "application/octet-stream"):
            async with Client(process.port) as client:
                client.request(
                    "POST /v1/files/x",
                    f"Content-Type: {kind}",
                    "Transfer-Encoding: chunked",
                    key=key,
                )
                for part in (b"5\r\nhello\r\n", b"7;x=y\r\n, world\r\n", b"0\r\nT: r\r\n\r\n"):
                    client.send(part)
                answer = await client.response()
                assert answer.json()["body"] == hashlib.sha256(b"hello, world").hexdigest()
        framing = [
            [n.lower() for n, _ in r.fields if n.lower() in ("content-length", "transfer-encoding")]
            for r in up.arrived
        ]
        assert framing == [["content-length"], ["transfer-encoding"]]


@gen_test
async def test_a_post_without_body_or_type_gains_nothing(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        await ask(process.port, "POST /v1/files/x", key=key)
        assert {n for n, _ in up.arrived[-1].fields} == {"Host", "x-api-key"}
        await ask(process.port, "POST /v1/files/x", "Content-Length: 0", key=key)
        assert up.arrived[-1].field("content-length") == ["0"]


@gen_test
async def test_expect_continue(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        async with Client(process.port) as client:
            client.request("POST /v1/files/x", "Content-Length: 5", "expect: 100-Continue", key=key)
            assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"hello")
            answer = await client.response()
            assert answer.json()["size"] == 5 and not answer.informational
            assert not up.arrived[-1].field("expect")
        async with Client(process.port) as client:
            client.request(
                "POST /v1/files/x", "Content-Length: 5", "Expect: 100-continue", key="sk-no"
            )
            refused = await client.response()
            assert refused.status == 401 and not refused.informational
            assert await client.reader.read() == b"", "the connection's state is unknown: close"


SPECIAL = ["X-Odd: a,b", "X-Odd: c", "aNtHrOpIc-BeTa: one,two", "X-Latin: \xe4\xff", "X-Empty: "]


@gen_test
async def test_request_fields_go_on_as_they_came(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        kept = [*SPECIAL, "User-Agent: me", "anthropic-version: 2099-01-01", "Accept-Encoding: br"]
        dropped = [
            "Connection: keep-alive, X-Hop",
            "X-Hop: 1",
            "Keep-Alive: timeout=5",
            "TE: trailers",
            "Upgrade: h2c",
            "Proxy-Authorization: Basic x",
            "Proxy-Connection: keep-alive",
            "Cookie: a=b",
            "X-Forwarded-For: 1.2.3.4",
            "X-Forwarded-Proto: https",
            "Forwarded: for=1.2.3.4",
            "X-LiteLLM-Tags: a",
            "anthropic-workspace-id: wrkspc_x",
            f"X-Debug: my key is {key}!",
        ]
        await ask(process.port, "GET /v1/files/things", *dropped[:7], *kept, *dropped[7:], key=key)
        wire = [f"{name}: {value}" for name, value in up.arrived[-1].fields]
        assert wire == [f"Host: localhost:{up.port}", *kept, f"x-api-key: {REAL_KEY}"]


@gen_test
async def test_codings_are_cut_down_where_the_gateway_reads(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        offered = "Accept-Encoding: gzip, deflate, br, zstd"
        for path, expected in [
            ("/v1/messages", "gzip"),
            ("/v1/messages?beta=true", "gzip"),
            ("/v1/messages/batches", "gzip"),
            ("/v1/messages/batches/b/results", "gzip"),
            ("/v1/messages/count_tokens", "gzip, deflate, br, zstd"),
            ("/v1/models", "gzip, deflate, br, zstd"),
        ]:
            await ask(process.port, f"GET {path}", offered, key=key)
            assert up.arrived[-1].field("accept-encoding") == [expected], path


# ─── The relay: credentials ──────────────────────────────────────────────────────────


def credentials(arrived: Arrived) -> list[tuple[str, str]]:
    names = ("x-api-key", "authorization", "x-litellm-api-key")
    return [(n.lower(), v) for n, v in arrived.fields if n.lower() in names]


@gen_test
async def test_the_virtual_key_is_read_anywhere_and_seen_nowhere(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        own = "sk-ant-oat01-mine"
        real, mine = [("x-api-key", REAL_KEY)], [("authorization", f"Bearer {own}")]
        cases = [
            ([f"x-api-key: {key}"], real),
            ([f"Authorization: Bearer {key}"], real),
            ([f"authorization: bearer {key}"], real),
            ([f"AUTHORIZATION: BEARER   {key}"], real),
            ([f"x-litellm-api-key: {key}"], real),
            ([f"x-litellm-api-key: Bearer {key}"], real),
            ([f"x-api-key: {key}", f"Authorization: Bearer {key}"], real),
            (["x-api-key: ", f"Authorization: Bearer {key}"], real),
            (["Authorization: Bearer ", f"x-api-key: {key}"], real),
            (["x-api-key: dummy", f"Authorization: Bearer {key}"], real),
            ([f"x-api-key: {MASTER_KEY}"], real),
            ([f"x-api-key: {key}", f"Authorization: Bearer {own}"], mine),
            ([f"x-litellm-api-key: {key}", f"Authorization: Bearer {own}"], mine),
            ([f"Authorization: Bearer {key}", f"x-api-key: {own}"], [("x-api-key", own)]),
            (
                [f"X-Also: <{key}>", f"x-api-key: {key}", f"Authorization: Bearer {MASTER_KEY}"],
                real,
            ),
        ]
        for fields, sent in cases:
            answer = await ask(process.port, "GET /v1/files/things", *fields)
            assert answer.status == 200, (fields, answer.body)
            assert credentials(up.arrived[-1]) == sent, fields
            assert key.encode() not in up.arrived[-1].head
            assert MASTER_KEY.encode() not in up.arrived[-1].head


@gen_test
async def test_who_pays_himself_chooses_his_workspace(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        workspace = "anthropic-workspace-id: wrkspc_1"
        own = "Authorization: Bearer sk-ant-api03-mine"
        await ask(process.port, "GET /v1/files/things", workspace, own, key=key)
        assert up.arrived[-1].field("anthropic-workspace-id") == ["wrkspc_1"]


@gen_test
async def test_wrong_keys_are_refused(start: Starter) -> None:
    async with relayed(start) as (process, up, _):
        wrong = "sk-wrong-key-0123456789"
        for fields in (
            [],
            [f"x-api-key: {wrong}"],
            [f"Authorization: Bearer {wrong}"],
            [f"Authorization: Basic {wrong}"],
            [f"x-api-key: {wrong}", "Authorization: Bearer sk-ant-api03-mine"],
            ["Authorization: Bearer sk-ant-api03-mine"],
            [f"x-api-key: {gateway.hash_key(MASTER_KEY)}"],
            [f"x-api-key: {REAL_KEY}"],
            ["x-api-key: \xff\xfe"],
        ):
            answer = await ask(process.port, "GET /v1/files/things", *fields)
            assert answer.status == 401 and answer.error["type"] == "authentication_error"
            assert wrong.encode() not in answer.body
        assert not up.arrived
        assert wrong not in process.log


@gen_test
async def test_open_mode_lets_anyone_in(start: Starter) -> None:
    variables = {"ANTHROPIC_API_KEY": REAL_KEY}
    async with relayed(start, variables=variables) as (process, up, _):
        real = [("x-api-key", REAL_KEY)]
        for fields, sent in [
            ([], real),
            (["Authorization: bearer sk-anything"], real),
            (["x-api-key: sk-ant-mine"], [("x-api-key", "sk-ant-mine")]),
        ]:
            answer = await ask(process.port, "GET /v1/files/things", *fields, host=LOCAL)
            assert answer.status == 200
            assert credentials(up.arrived[-1]) == sent
        refused = process.manage("/key/generate", {})
        assert refused.status_code == 403 and "GATEWAY_MASTER_KEY" in refused.text


@gen_test
async def test_a_forgotten_master_key_does_not_open_the_gateway(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        process.stop()
        again = start(up.url, variables={"ANTHROPIC_API_KEY": REAL_KEY})
        assert (await ask(again.port, "GET /v1/files/things")).status == 401
        assert (await ask(again.port, "GET /v1/files/things", key=key)).status == 200
        assert again.manage("/key/generate", {}).status_code == 403


@gen_test
async def test_an_auth_token_goes_upstream_as_bearer(start: Starter) -> None:
    variables = {"ANTHROPIC_AUTH_TOKEN": "token-1", "GATEWAY_MASTER_KEY": MASTER_KEY}
    async with relayed(start, variables=variables) as (process, up, key):
        await ask(process.port, "GET /v1/files/things", key=key)
        assert credentials(up.arrived[-1]) == [("authorization", "Bearer token-1")]


@gen_test
async def test_without_any_credential_the_answer_names_the_variable(start: Starter) -> None:
    variables = {"GATEWAY_MASTER_KEY": MASTER_KEY}
    async with relayed(start, variables=variables) as (process, up, key):
        answer = await ask(process.port, "GET /v1/files/things", key=key)
        assert answer.status == 401 and "ANTHROPIC_API_KEY" in answer.error["message"]
        assert not up.arrived
        own = "Authorization: Bearer sk-ant-mine"
        assert (await ask(process.port, "GET /v1/files/things", own, key=key)).status == 200


@gen_test
async def test_an_echoing_upstream_does_not_reveal_the_real_key(start: Starter) -> None:
    async def reveal(request: Arrived) -> None:
        whole = request.head + request.head
        await request.send(
            b"HTTP/1.1 200 OK\r\nX-Echo: key=" + REAL_KEY.encode() + b"\r\n"
            b"Request-Id: " + REAL_KEY.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(whole)
        )
        cut = whole.index(REAL_KEY.encode()) + 10
        await request.send(whole[:cut])
        await asyncio.sleep(0.02)
        await request.send(whole[cut:])

    async with relayed(start, reveal) as (process, _, key):
        answer = await ask(process.port, "GET /v1/files/things", key=key)
        assert answer.clean and answer.status == 200
        assert REAL_KEY.encode() not in answer.head + answer.body
        assert answer.body.count(b"*" * len(REAL_KEY)) == 2
        await until(lambda: "things" in process.log)
        assert REAL_KEY not in process.log


@gen_test
async def test_a_key_that_is_an_ordinary_word_masks_nothing(start: Starter) -> None:
    async def say(request: Arrived) -> None:
        await request.answer(b"this is a test")

    variables = {**DEFAULT_VARIABLES, "ANTHROPIC_API_KEY": "test"}
    async with relayed(start, say, variables=variables) as (process, _, key):
        assert (await ask(process.port, "GET /v1/files/x", key=key)).body == b"this is a test"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@gen_test
async def test_a_compressed_echo_does_not_reveal_the_real_key(start: Starter, coding: str) -> None:
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]

    async def reveal(request: Arrived) -> None:
        packed = pack(os.urandom(300_000) + request.head + os.urandom(1000))
        await request.answer(packed, "200 OK", f"Content-Encoding: {coding}")

    async with relayed(start, reveal) as (process, _, key):
        answer = await ask(process.port, "GET /v1/files/things", key=key)
        assert answer.status == 502 or not answer.clean
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        with contextlib.suppress(zlib.error):
            assert REAL_KEY.encode() not in inflate.decompress(answer.body)


# ─── The relay: responses ────────────────────────────────────────────────────────────


@gen_test
async def test_responses_come_back_as_sent(start: Starter) -> None:
    packed = gzip.compress(b"hello" * 100)
    wire = {
        "plain": b"HTTP/1.1 200 Fine By Me\r\nContent-Length: 5\r\nSet-Cookie: a=1\r\n"
        b"set-cookie: b=2\r\nrequest-ID: req_1\r\nX-Latin: \xe4\r\nX-Empty:\r\n\r\nhello",
        "no-reason": b"HTTP/1.1 299 \r\nContent-Length: 0\r\n\r\n",
        "204": b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
        "304": b'HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\nETag: "x"\r\n\r\n',
        "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        % len(packed)
        + packed,
        "redirect": b"HTTP/1.1 307 Go\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
        "529": b"HTTP/1.1 529 Overloaded\r\nretry-after: 7\r\nx-should-retry: true\r\n"
        b"request-id: req_2\r\nanthropic-ratelimit-tokens-remaining: 0\r\nContent-Length: 2\r\n\r\n{}",
    }

    async def replay(request: Arrived) -> None:
        await request.send(wire[request.target.rpartition("/")[2]])

    async with relayed(start, replay) as (process, _, key), Client(process.port) as client:
        for name, sent in wire.items():
            client.request(f"GET /v1/files/{name}", key=key)
            answer = await client.response()
            head, _, body = sent.partition(b"\r\n\r\n")
            lines = [
                line
                for line in answer.head[:-4].split(b"\r\n")
                if not line.startswith(b"x-litellm-")
            ]
            assert b"\r\n".join(lines) == head.replace(b"X-Empty:", b"X-Empty: "), name
            assert answer.body == body and answer.clean


@gen_test
async def test_hop_by_hop_response_fields_stay_here(start: Starter) -> None:
    async def hop(request: Arrived) -> None:
        await request.answer(
            b"x", "200 OK", "Connection: keep-alive, X-Hop", "X-Hop: 1", "Keep-Alive: 5", "X-End: 1"
        )

    async with relayed(start, hop) as (process, _, key):
        answer = await ask(process.port, "GET /v1/files/x", key=key)
        names = [line.split(b":")[0] for line in answer.head.split(b"\r\n")[1:-2]]
        added = [b"x-litellm-call-id", b"x-litellm-key-spend"]
        assert names == [b"Content-Length", b"X-End", *added]


@gen_test
async def test_head_keeps_its_length(start: Starter) -> None:
    async def head(request: Arrived) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")

    async with relayed(start, head) as (process, _, key), Client(process.port) as client:
        for _ in range(2):
            client.request("HEAD /v1/files/x", key=key)
            answer = await client.response("HEAD")
            assert answer.field("content-length") == ["1234"]


@gen_test
async def test_informational_responses_pass(start: Starter) -> None:
    async def hints(request: Arrived) -> None:
        await request.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        await request.send(b"HTTP/1.1 103 Early Hints\r\nLink: </b>\r\n\r\n")
        await request.answer(b"done")

    async with relayed(start, hints) as (process, _, key):
        answer = await ask(process.port, "GET /v1/files/x", key=key)
        assert [h.split(b"\r\n")[1] for h in answer.informational] == [b"Link: </a>", b"Link: </b>"]
        assert answer.body == b"done"


@gen_test
async def test_bodies_of_unknown_length(start: Starter) -> None:
    async def unknown(request: Arrived) -> None:
        if request.target.endswith("chunked"):
            await request.send(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"3\r\nabc\r\n3;x=1\r\ndef\r\n0\r\nTrailer: x\r\n\r\n"
            )
        else:
            await request.send(b"HTTP/1.1 200 OK\r\n\r\nabcdef")
            request.writer.close()

    async with relayed(start, unknown) as (process, _, key):
        for name in ("chunked", "close"):
            answer = await ask(process.port, f"GET /v1/files/{name}", key=key)
            assert answer.body == b"abcdef" and answer.clean
            assert answer.field("transfer-encoding") == ["chunked"]
            async with Client(process.port) as client:  # HTTP/1.0 knows no chunks
                client.send(f"GET /v1/files/{name} HTTP/1.0\r\nx-api-key: {key}\r\n\r\n".encode())
                old = await client.response()
                assert old.body == b"abcdef" and not old.field("transfer-encoding")
                assert old.field("connection") == ["close"]


@gen_test
async def test_each_event_arrives_when_it_is_sent(start: Starter) -> None:
    go_on = asyncio.Event()

    async def events(request: Arrived) -> None:
        await request.read_body()
        await request.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for number in range(5):
            await go_on.wait()
            go_on.clear()
            event = b"event: ping\ndata: %d\n\n" % number
            await request.send(b"%x\r\n%b\r\n" % (len(event), event))
        await go_on.wait()
        await request.send(b"0\r\n\r\n")

    async with relayed(start, events) as (process, _, key), Client(process.port) as client:
        client.request("POST /v1/messages", "Content-Type: application/json", body=b"{}", key=key)
        assert (await client.head()).startswith(b"HTTP/1.1 200 OK")  # before the first event
        for number in range(5):
            go_on.set()  # the next event is sent only when this one has arrived
            size = int(await client.reader.readline(), 16)
            event = await client.reader.readexactly(size + 2)
            assert event == b"event: ping\ndata: %d\n\n\r\n" % number
        go_on.set()
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"


@gen_test
async def test_pipelined_requests_are_answered_in_order(start: Starter) -> None:
    async with relayed(start) as (process, _, key), Client(process.port) as client:
        for number in range(20):
            client.request(f"POST /v1/files/{number}", body=b"x" * number, key=key)
        for number in range(20):
            answer = (await client.response()).json()
            assert answer["start_line"] == f"POST /v1/files/{number} HTTP/1.1"
            assert answer["size"] == number


# ─── The relay: big bodies, slow readers ─────────────────────────────────────────────


async def upload(client: Client, size: int, key: str, *fields: str) -> Response:
    client.request("POST /v1/files", f"Content-Length: {size}", *fields, key=key)
    block = bytes(MIB)
    for _ in range(size // MIB):
        client.send(block)
        await client.writer.drain()
    return await client.response()


async def count(request: Arrived) -> None:
    """Answer with how many bytes arrived, without keeping them."""
    left = size = int(request.field("content-length")[0])
    while left:
        left -= len(await request.reader.read(min(left, MIB)))
    await request.answer(str(size).encode())


@pytest.mark.gen_test(timeout=60)
@pytest.mark.parametrize("size", [128 * MIB, 500 * MIB])
async def test_large_uploads_stream_with_flat_memory(start: Starter, size: int) -> None:
    async with relayed(start, count) as (process, _, key), Client(process.port) as client:
        before = process.memory()
        answer = await upload(client, size, key, "Content-Type: multipart/form-data; boundary=x")
        assert answer.body == str(size).encode()
        assert process.peak_memory() - before < 64 * MIB


@gen_test
async def test_large_json_is_streamed(start: Starter) -> None:
    async with relayed(start, count) as (process, _, key), Client(process.port) as client:
        before = process.memory()
        answer = await upload(client, 100 * MIB, key, "Content-Type: application/json")
        assert answer.body == str(100 * MIB).encode()
        assert process.peak_memory() - before < 64 * MIB


@gen_test
async def test_json_that_grows_past_the_limit_is_streamed(start: Starter) -> None:
    async with relayed(start) as (process, _up, key), Client(process.port) as client:
        fields = ("Content-Type: application/json", "Transfer-Encoding: chunked")
        client.request("POST /v1/files/x", *fields, key=key)
        digest = hashlib.sha256()
        for number in range(40):
            block = bytes([number]) * MIB
            digest.update(block)
            client.send(b"%x\r\n%b\r\n" % (len(block), block))
            await client.writer.drain()
        client.send(b"0\r\n\r\n")
        answer = (await client.response()).json()
        assert (answer["size"], answer["body"]) == (40 * MIB, digest.hexdigest())


@gen_test
async def test_a_slow_reader_slows_the_upstream(start: Starter) -> None:
    sent = 0

    async def pour(request: Arrived) -> None:
        nonlocal sent
        size = 200 * MIB
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // MIB):
            await request.send(bytes(MIB))
            sent += MIB

    async with relayed(start, pour) as (process, _, key), Client(process.port) as client:
        before = process.memory()
        client.request("GET /v1/files/x/content", key=key)
        await client.head()
        last = -1
        while last != sent:  # until the upstream can send no more
            last = sent
            await asyncio.sleep(0.2)
        # The system's own buffers take some tens of megabytes, the gateway's do not.
        assert sent < 100 * MIB, "the upstream was read faster than the client reads"
        body = 0
        while body < 200 * MIB:
            body += len(await client.reader.read(MIB))
        assert process.peak_memory() - before < 64 * MIB


@pytest.mark.gen_test(timeout=60)
async def test_200_slow_readers_cost_no_more_than_their_buffers(start: Starter) -> None:
    async def pour(request: Arrived) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (200 * MIB))
        for _ in range(200):
            await request.send(bytes(MIB))

    async with metered(start, pour) as (process, up, key):
        before = process.memory()
        async with contextlib.AsyncExitStack() as stack:
            # All are held, since asyncio breaks a connection off whose reader nobody holds.
            clients = [Client(process.port) for _ in range(200)]
            for client in clients:
                client.reader, client.writer = await asyncio.open_connection(
                    "127.0.0.1", process.port, limit=4096
                )
                stack.callback(client.writer.transport.abort)
                client.request("GET /v1/files/x/content", key=key)
                await client.head()
            await until(lambda: len(up.arrived) == 200)
            last = -1
            while last != (last := process.memory()):
                await asyncio.sleep(0.5)
            assert "client_gone" not in process.log
            # per reader: what one read brings (256 KiB), the write buffer (64 KiB), and 192 KiB for both
            # connections, the request and what the allocator loses
            assert process.memory() - before < 200 * 512 * 1024
        await until(lambda: process.log.count("client_gone") == 200)


# ─── The relay: endings ──────────────────────────────────────────────────────────────

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


async def stall(request: Arrived) -> None:
    """Behave as the target says, then keep silent and note when the gateway leaves."""
    if request.target.endswith("/events"):
        await request.send(SSE_HEAD + b"d\r\ndata: hello\n\n\r\n")
    if request.target.endswith("/download"):
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + bytes(100_000))
    request.closed_at = await request.gone()


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("phase", ["head", "events", "download", "upload", "json-upload"])
@gen_test
async def test_a_client_that_leaves_takes_the_upstream_with_it(
    start: Starter, phase: str, leave: str
) -> None:
    async with relayed(start, stall) as (process, up, key), Client(process.port) as client:
        await priced(process)  # importing the prices keeps the interpreter busy for a moment
        if phase == "upload":
            client.request("POST /v1/files/upload", "Content-Length: 9000000", key=key)
            client.send(bytes(100_000))
        elif phase == "json-upload":
            fields = ("Content-Type: application/json", "Content-Length: 90000000")
            client.request("POST /v1/files/upload", *fields, key=key)
            client.send(bytes(100_000))
        else:
            client.request(f"POST /v1/files/{phase}", body=b"{}", key=key)
        await until(lambda: len(up.arrived) == 1)
        if phase in ("events", "download"):
            await client.head()
            await client.reader.readexactly(13)
        left_at = time.monotonic()
        client.reset() if leave == "reset" else client.writer.close()
        await until(lambda: up.arrived[0].closed_at)
        assert up.arrived[0].closed_at - left_at < 0.1
        await until(lambda: "client_gone" in process.log)


@gen_test
async def test_a_client_that_leaves_while_the_upstream_reads_nothing(start: Starter) -> None:
    reset = asyncio.Event()

    async def deaf(request: Arrived) -> None:
        request.writer.transport.pause_reading()
        await reset.wait()
        request.writer.transport.resume_reading()
        request.closed_at = await request.gone()

    async with relayed(start, deaf) as (process, up, key), Client(process.port) as client:
        client.request("POST /v1/files/upload", f"Content-Length: {400 * MIB}", key=key)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):  # until every buffer on the way is full
                while True:
                    client.send(bytes(MIB))
                    await client.writer.drain()
        client.reset()
        await until(lambda: "client_gone" in process.log, 1)
        reset.set()
        await until(lambda: up.arrived[0].closed_at)


async def break_as_told(request: Arrived) -> None:
    """Break the response in the way that the target names."""
    await request.read_body()
    how = request.target.rpartition("/")[2]
    packed = gzip.compress(os.urandom(1000))
    wire = {
        "before-head": b"",
        "in-head": b"HTTP/1.1 200 OK\r\nContent-Le",
        "short": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345",
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "in-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello",
        "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"100\r\n" + packed[:256] + b"\r\n",
        "sse": SSE_HEAD + b"d\r\ndata: hello\n\n\r\n",
        "sse-in-event": SSE_HEAD + b'b\r\ndata: {"hal\r\n',
        "sse-gzip": SSE_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
        + b"100\r\n"
        + packed[:256]
        + b"\r\n",
    }[how.removesuffix("-reset")]
    await request.send(wire)
    if how.endswith("-reset"):
        await asyncio.sleep(0.05)  # let it arrive: a reset throws away what is on the way
        linger = struct.pack("ii", 1, 0)
        connection = request.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.writer.transport.abort()
    request.writer.close()


@pytest.mark.parametrize("how", ["", "-reset"])
@gen_test
async def test_an_upstream_that_breaks_is_never_a_clean_end(start: Starter, how: str) -> None:
    async with relayed(start, break_as_told) as (process, _, key):
        for place in ("before-head", "in-head"):
            answer = await ask(process.port, f"POST /v1/files/{place}{how}", body=b"x", key=key)
            assert answer.status == 502 and answer.error["type"] == "api_error"
        for place in ("short", "chunked", "in-chunk", "gzip", "sse", "sse-in-event", "sse-gzip"):
            for version in ("1.1", "1.0"):
                async with Client(process.port) as client:
                    client.send(
                        f"GET /v1/files/{place}{how} HTTP/{version}\r\nHost: x\r\n"
                        f"x-api-key: {key}\r\n\r\n".encode()
                    )
                    answer = Response(await client.head(), b"")
                    assert answer.status == 200
                    raw, reset = b"", False
                    try:
                        while data := await client.reader.read(65536):
                            raw += data
                    except ConnectionResetError:
                        reset = True
                    delimited = answer.field("content-length") or version == "1.1"
                    assert delimited or reset, f"{place} looks complete to HTTP/{version}"
                    assert not raw.endswith(b"0\r\n\r\n")
                    plain_sse = place in ("sse", "sse-in-event") and version == "1.1"
                    assert (b"event: error\ndata: {" in raw) == plain_sse or reset


@gen_test
async def test_the_sdk_sees_a_broken_stream_as_an_error(start: Starter) -> None:
    for place in ("sse", "sse-in-event"):
        async with relayed(start, break_as_told) as (process, _, key):
            client = anthropic.AsyncAnthropic(
                base_url=process.url + "/anthropic", api_key=key, max_retries=0
            )
            stream = await client.post(
                f"/v1/files/{place}",
                body={},
                cast_to=object,
                stream=True,
                stream_cls=anthropic.AsyncStream[object],
            )
            with pytest.raises(anthropic.APIStatusError, match="closed the connection"):
                async for _ in stream:
                    pass
            process.stop()


@gen_test
async def test_a_close_delimited_response_that_is_reset_is_no_clean_end(start: Starter) -> None:
    async def reset(request: Arrived) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await asyncio.sleep(0.05)
        connection = request.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.writer.transport.abort()

    async with relayed(start, reset) as (process, _, key):
        answer = await ask(process.port, "GET /v1/files/x", key=key)
        assert answer.status == 200 and not answer.clean


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
         "-keyout", private, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, private


def tls_server(folder: Path, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*make_certificate(folder, name))
    return context


@gen_test
async def test_tls_upstream_is_verified_kept_alive_and_streams(
    start: Starter, tmp_path: Path
) -> None:
    context = tls_server(tmp_path)
    variables = {**DEFAULT_VARIABLES, "SSL_CERT_FILE": str(tmp_path / "localhost.pem")}
    async with relayed(start, server={"ssl": context}, variables=variables) as (process, up, key):
        for _ in range(5):
            body = os.urandom(300_000)
            answer = await ask(process.port, "POST /v1/files/x", body=body, key=key)
            assert answer.json()["body"] == hashlib.sha256(body).hexdigest()
        assert up.connections == 1
    async with upstream(echo, ssl=context) as again:
        untrusted = start(again.url, "--keys=other.json")
        answer = await ask(untrusted.port, "GET /v1/files/x", key=untrusted.new_key())
        assert answer.status == 502 and "certificate" in answer.error["message"]
        assert not again.arrived
    misnamed = tls_server(tmp_path, "elsewhere")
    variables["SSL_CERT_FILE"] = str(tmp_path / "elsewhere.pem")
    async with upstream(echo, ssl=misnamed) as wrong:
        process = start(wrong.url, "--keys=third.json", variables=variables)
        answer = await ask(process.port, "GET /v1/files/x", key=process.new_key())
        assert answer.status == 502 and "certificate" in answer.error["message"]


@gen_test
async def test_each_way_not_to_reach_the_upstream_is_told_apart(start: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        unused = server.getsockname()[1]
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = []
    for _ in range(3):  # a listener whose backlog is full answers no more
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(full.getsockname())
        waiting.append(connection)
    cases = [
        (f"http://127.0.0.1:{unused}", 502, "refused"),
        ("http://no-such-host.invalid", 502, "resolved"),
        (f"http://127.0.0.1:{full.getsockname()[1]}", 504, "reached within 0.3 seconds"),
    ]
    for number, (url, status, word) in enumerate(cases):
        process = start(url, f"--keys=k{number}.json", "--connect-timeout=0.3")
        key = process.new_key()
        answer = await ask(process.port, "POST /v1/files/x", body=b"{}", key=key)
        assert answer.status == status and word in answer.error["message"], answer.body
        kind = "api_error" if status == 502 else "timeout_error"
        assert answer.error["type"] == kind
    for connection in [*waiting, full]:
        connection.close()

    async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)  # as a plain HTTP server answers what it takes for a request
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    plain = await asyncio.start_server(no_tls, "127.0.0.1", 0)
    port = plain.sockets[0].getsockname()[1]
    process = start(f"https://localhost:{port}", "--keys=tls.json")
    answer = await ask(process.port, "GET /v1/files/x", key=process.new_key())
    assert answer.status == 502 and "TLS" in answer.error["message"]
    plain.close()


@gen_test
async def test_a_silent_upstream_times_out(start: Starter) -> None:
    async with relayed(start, stall, "--idle-timeout=0.3") as (process, up, key):
        answer = await ask(process.port, "POST /v1/files/silent", body=b"{}", key=key)
        assert answer.status == 504 and answer.error["type"] == "timeout_error"
        answer = await ask(process.port, "POST /v1/files/events", body=b"{}", key=key)
        assert answer.status == 200 and not answer.clean
        await until(lambda: all(request.closed_at for request in up.arrived))
        await until(lambda: process.log.count(" timeout ") == 2)


@gen_test
async def test_a_slow_uploader_is_not_the_upstreams_silence(start: Starter) -> None:
    async with (
        relayed(start, echo, "--idle-timeout=0.3") as (process, _, key),
        Client(process.port) as client,
    ):
        client.request("POST /v1/files/x", "Content-Length: 10", key=key)
        for _ in range(5):
            client.send(b"ab")
            await asyncio.sleep(0.2)
        assert (await client.response()).json()["size"] == 10


@gen_test
async def test_idle_connections_that_the_upstream_closes_are_dropped(start: Starter) -> None:
    async def answer_and_close(request: Arrived) -> None:
        await request.read_body()
        await request.answer(b"ok")
        request.writer.close()

    async with relayed(start, answer_and_close) as (process, up, key):
        before = process.descriptors()
        for _ in range(10):
            assert (await ask(process.port, "POST /v1/files/x", body=b"{}", key=key)).body == b"ok"
        assert up.connections == 10
        await until(lambda: process.descriptors() <= before)


@gen_test
async def test_what_met_a_dead_connection_is_repeated_only_if_harmless(start: Starter) -> None:
    async def die_on_the_second(request: Arrived) -> None:
        await request.read_body()
        if len(up.arrived) % 2 == 0:
            request.writer.transport.abort()
        else:
            await request.answer(b"ok")

    async with relayed(start, die_on_the_second) as (process, up, key):
        for method, repeated in (("GET", True), ("HEAD", True), ("POST", False), ("DELETE", False)):
            up.arrived.clear()
            await ask(process.port, f"{method} /v1/files/first", key=key)
            answer = await ask(process.port, f"{method} /v1/files/second", key=key)
            assert answer.status == (200 if repeated else 502), method
            seconds = [r for r in up.arrived if r.target == "/v1/files/second"]
            assert len(seconds) == (2 if repeated else 1), method


@gen_test
async def test_a_response_before_the_whole_request(start: Starter) -> None:
    async def early(request: Arrived) -> None:
        await request.reader.readexactly(1000)
        await request.answer(b'{"early": true}', "413 Too Large")
        await request.gone()

    async with relayed(start, early) as (process, _, key), Client(process.port) as client:
        client.request("POST /v1/files/x", "Content-Length: 20000000", key=key)
        client.send(bytes(10_000_000))
        answer = await client.response()
        assert answer.status == 413 and answer.body == b'{"early": true}'
        client.send(bytes(10_000_000))  # the rest is read and dropped, the connection lives
        client.request("GET /", key=key)
        assert (await client.response()).status == 200


@gen_test
async def test_a_refused_upload_gets_its_answer(start: Starter) -> None:
    async with relayed(start, echo, f"--max-body-size={8 * MIB}") as (process, up, key):
        cases = [("sk-wrong", 10 * MIB, 401), (key, 10 * MIB, 413), (key, 60 * MIB, 413)]
        for shown, size, status in cases:
            async with Client(process.port) as client:
                client.request("POST /v1/files/x", f"Content-Length: {size}", key=shown)
                with contextlib.suppress(ConnectionError):
                    for _ in range(size // MIB):
                        client.send(bytes(MIB))
                        await client.writer.drain()
                answer = await client.response()
                assert answer.status == status
                if size <= 32 * MIB:
                    client.request("GET /")
                    assert (await client.response()).status == 200
        async with Client(process.port) as client:
            client.request("POST /v1/files/x", "Transfer-Encoding: chunked", key=key)
            for _ in range(10):
                client.send(b"100000\r\n" + bytes(MIB) + b"\r\n")
                await client.writer.drain()
            client.send(b"0\r\n\r\n")
            answer = await client.response()
            assert answer.status == 413 and answer.error["type"] == "request_too_large"
        assert "Traceback" not in process.log
        assert all(request.target == "/v1/files/x" for request in up.arrived)


# ─── The relay: smuggling ────────────────────────────────────────────────────────────

SMUGGLED = b"GET /v1/files/smuggled HTTP/1.1\r\nHost: x\r\nx-api-key: KEY\r\n\r\n"


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: 0\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Content-Length: 0\r\nContent-Length: 60",
        "Content-Length: 0, 0",
        "Content-Length: +0",
        "Content-Length: 0x0",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding:\tchunked\r\nTransfer-encoding: x",
        "X: y\r\n Transfer-Encoding: chunked",
        "X: y\rTransfer-Encoding: chunked",
        "X: y\nTransfer-Encoding: chunked",
        "X : y",
        "\x00X: y",
    ],
)
@gen_test
async def test_ambiguous_requests_end_the_connection(start: Starter, fields: str) -> None:
    async with relayed(start) as (process, up, key), Client(process.port) as client:
        smuggled = SMUGGLED.replace(b"KEY", key.encode())
        head = f"POST /v1/files/x HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n{fields}\r\n\r\n"
        client.send(head.encode("latin-1") + smuggled)
        answer = await client.response()
        assert answer.status in (400, 501) and answer.error["type"]
        assert await client.reader.read() == b""
        assert not up.arrived


@gen_test
async def test_a_broken_chunk_in_an_upload_ends_both_connections(start: Starter) -> None:
    async with relayed(start, stall) as (process, up, key), Client(process.port) as client:
        client.request("POST /v1/files/x", "Transfer-Encoding: chunked", key=key)
        client.send(b"5\r\nhello\r\n")
        await until(lambda: up.arrived)
        client.send(b"5\r\nhelloX\r\n" + SMUGGLED)
        assert (await client.response()).status == 400
        await until(lambda: up.arrived[0].closed_at)
        assert len(up.arrived) == 1


@gen_test
async def test_bare_line_feeds_and_oversized_heads_are_answered(start: Starter) -> None:
    async with relayed(start) as (process, up, _):
        for data, status in [
            (b"GET / HTTP/1.1\nHost: x\n\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000, 431),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        ]:
            async with Client(process.port) as client:
                client.send(data)
                answer = await client.response()
                assert answer.status == status and answer.error["message"]
                assert await client.reader.read() == b""
        assert not up.arrived


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\n folded\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 103 Hints\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 103 Hints\r\n\r\n" * 20,
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    ],
)
@gen_test
async def test_malformed_responses_are_a_bad_gateway(start: Starter, wire: bytes) -> None:
    async def malformed(request: Arrived) -> None:
        await request.send(wire)
        await request.gone()

    async with relayed(start, malformed) as (process, _, key):
        answer = await ask(process.port, "GET /v1/files/x", key=key)
        assert answer.status == 502 and answer.error["type"] == "api_error"


@gen_test
async def test_stray_bytes_behind_a_response_reach_nobody(start: Starter) -> None:
    poison = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"

    async def stray(request: Arrived) -> None:
        target = request.target
        if target.endswith("later"):
            await request.answer(b"fine")
            await asyncio.sleep(0.05)
            await request.send(poison)
        else:
            await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine" + poison)

    async with relayed(start, stray) as (process, up, key), Client(process.port) as client:
        for name in ("at-once", "later", "at-once", "later"):
            client.request(f"GET /v1/files/{name}", key=key)
            assert (await client.response()).body == b"fine"
            await asyncio.sleep(0.1)
        assert up.connections == 4, "a connection with stray bytes was used again"


# ─── UpstreamClient, as Tornado's AsyncHTTPClient ────────────────────────────────────


@pytest.fixture
def client_of_upstream(io_loop: Any) -> Iterator[gateway.UpstreamClient]:
    async def make() -> gateway.UpstreamClient:
        return gateway.UpstreamClient(force_instance=True, idle_timeout=5)

    client = io_loop.run_sync(make)
    yield client
    client.close()


@gen_test
async def test_fetch_is_tornados(client_of_upstream: gateway.UpstreamClient) -> None:
    client = client_of_upstream

    async def redirect_or_echo(request: Arrived) -> None:
        if request.target == "/redirect":
            await request.answer(b"", "302 Found", "Location: /elsewhere", "X-A: 1", "X-A: 2")
        else:
            await echo(request)

    async with upstream(redirect_or_echo) as up:
        lines: list[str] = []
        told = (await client.fetch(up.url + "/a?b", header_callback=lines.append)).body
        assert json.loads(told)["fields"] == [["Host", f"localhost:{up.port}"]]
        assert lines[0] == "HTTP/1.1 200 OK\r\n" and lines[-1] == "\r\n"
        posted = await client.fetch(up.url, method="POST", body=b"hello")
        assert json.loads(posted.body)["size"] == 5
        answer = await client.fetch(up.url + "/redirect", raise_error=False)
        assert answer.code == 302 and answer.headers.get_list("X-A") == ["1", "2"]
        assert len(up.arrived) == 3 and up.connections == 1

        async def produce(write: Callable[[bytes], Awaitable[None]]) -> None:
            for _ in range(30):
                await write(bytes(MIB))

        streamed = await client.fetch(up.url, method="PUT", body_producer=produce)
        assert json.loads(streamed.body)["size"] == 30 * MIB
        together = await asyncio.gather(*(client.fetch(up.url) for _ in range(100)))
        assert all(response.code == 200 for response in together)
        with pytest.raises(ValueError, match="http"):
            await client.fetch("ftp://x/")


@gen_test
async def test_fetch_awaits_the_streaming_callback(
    client_of_upstream: gateway.UpstreamClient,
) -> None:
    sent = 0

    async def pour(request: Arrived) -> None:
        nonlocal sent
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (50 * MIB))
        for _ in range(50):
            await request.send(bytes(MIB))
            sent += 1

    received, release = 0, asyncio.Event()

    async def take(data: bytes) -> None:
        nonlocal received
        received += len(data)
        await release.wait()

    async with upstream(pour) as up:
        fetching = client_of_upstream.fetch(up.url, streaming_callback=take)
        await until(lambda: received)
        last = -1
        while last != sent:
            last = sent
            await asyncio.sleep(0.2)
        assert sent < 30, "read on before the callback was done"
        release.set()
        assert (await fetching).code == 200 and received == 50 * MIB


@gen_test
async def test_fetch_fails_clearly(client_of_upstream: gateway.UpstreamClient) -> None:
    async with upstream(break_as_told) as up:
        with pytest.raises(gateway.UpstreamError, match="without answering"):
            await client_of_upstream.fetch(up.url + "/before-head")
        with pytest.raises(gateway.UpstreamError, match="before its response was complete"):
            await client_of_upstream.fetch(up.url + "/short")
    async with upstream(stall) as up:
        with pytest.raises(gateway.UpstreamError, match="request_timeout"):
            await client_of_upstream.fetch(up.url + "/x", request_timeout=0.1)
        await until(lambda: up.arrived[0].closed_at)


# ─── Virtual keys ────────────────────────────────────────────────────────────────────


def error_of(response: httpx2.Response, status: int, kind: str) -> str:
    """Check an error's status and envelope; its message."""
    assert response.status_code == status, response.text
    document = response.json()
    assert document["type"] == "error" and document["error"]["type"] == kind
    assert document["request_id"] == response.headers["request-id"]
    return document["error"]["message"]


def relay_status(process: Process, key: str) -> int:
    return httpx2.get(process.url + "/v1/models", headers={"x-api-key": key}).status_code


def test_an_empty_request_makes_a_key(mocked: Process) -> None:
    headers = {"Authorization": f"Bearer {MASTER_KEY}"}
    bare = httpx2.post(mocked.url + "/key/generate", headers=headers)
    made = mocked.manage("/key/generate", {})
    assert bare.status_code == made.status_code == 200
    answer = made.json()
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{22}", answer["key"])
    assert answer["token"] == answer["token_id"] == gateway.hash_key(answer["key"])
    assert answer["key_name"] == f"sk-...{answer['key'][-4:]}"
    assert answer["expires"] is None and answer["models"] == [] and answer["metadata"] == {}
    assert relay_status(mocked, answer["key"]) == 200
    assert answer["key"] not in mocked.keys.read_text() and answer["key"] not in mocked.log


def test_fields_of_a_key_are_kept_and_shown(mocked: Process) -> None:
    fields = {
        "key_alias": "ci", "user_id": "u", "team_id": "t", "tags": ["a", "b"],
        "metadata": {"deep": [1, {"x": None}]}, "duration": "30d", "models": [],
    }  # fmt: skip
    key = mocked.new_key(**fields)
    by_key = mocked.manage(f"/key/info?key={key}").json()
    by_hash = mocked.manage(f"/key/info?key={gateway.hash_key(key)}").json()
    assert by_key["info"] == by_hash["info"] and by_key["key"] == key
    for name in ("key_alias", "user_id", "team_id", "tags", "metadata", "models"):
        assert by_key["info"][name] == fields[name]
    expires = datetime.fromisoformat(by_key["info"]["expires"])
    assert abs(expires - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)
    itself = mocked.manage("/key/info", key=key).json()
    assert itself["info"] == by_key["info"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_budget": -1}, "max_budget"),
        ({"max_budget": True}, "max_budget"),
        ({"max_budget": "5"}, "max_budget"),
        ({"max_budget": 1e300}, "max_budget"),
        ({"soft_budget": []}, "soft_budget"),
        ({"budget_duration": "soon"}, "budget_duration"),
        ({"budget_duration": "0d"}, "budget_duration"),
        ({"rpm_limit": -1}, "rpm_limit"),
        ({"rpm_limit": 1.5}, "rpm_limit"),
        ({"tpm_limit": True}, "tpm_limit"),
        ({"tpm_limit": 10**30}, "tpm_limit"),
        ({"max_parallel_requests": "1"}, "max_parallel_requests"),
        ({"models": "claude-x"}, "models"),
        ({"models": [1]}, "models"),
        ({"allowed_routes": ["llm_api_routes"]}, "allowed_routes"),
        ({"model_max_budget": {"claude-x": 5}}, "model_max_budget"),
        ({"model_max_budget": {"claude-x": {}}}, "model_max_budget"),
        ({"model_max_budget": {"x": {"budget_limit": -1}}}, "model_max_budget"),
        ({"model_max_budget": {"x": {"budget_limit": 1, "rpm_limit": 1}}}, "model_max_budget"),
        ({"tpd_limit": 5}, "tpd_limit"),
        ({"nonsense": True}, "nonsense"),
        ({"duration": "soon"}, "duration"),
        ({"duration": 30}, "duration"),
        ({"duration": "999999999w"}, "duration"),
        ({"key": "sk-short"}, "key"),
        ({"key": "no-prefix-0123456789"}, "key"),
        ({"key": "sk-with space 0123456789"}, "key"),
        ({"key": "sk-ant-0123456789012345"}, "key"),
        ({"key": 5}, "key"),
        ({"key_alias": 5}, "key_alias"),
        ({"tags": "a"}, "tags"),
        ({"tags": [1]}, "tags"),
        ({"metadata": []}, "metadata"),
        ({"blocked": "yes"}, "blocked"),
        ({"blocked": 1}, "blocked"),
    ],
)
def test_wrong_fields_are_refused_by_name(
    mocked: Process, virtual_key: str, fields: dict[str, Any], named: str
) -> None:
    before = mocked.manage("/key/list").json()["total_count"]
    message = error_of(mocked.manage("/key/generate", fields), 400, "invalid_request_error")
    assert f"'{named}'" in message
    if "key" not in fields:
        update = {"key": virtual_key, **fields}
        assert named in error_of(mocked.manage("/key/update", update), 400, "invalid_request_error")
    assert mocked.manage("/key/list").json()["total_count"] == before


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b'{"metadata": {"a": NaN}}', b"\xff", b"[" * 100_000]
)
def test_bodies_that_are_no_json_object_are_refused(mocked: Process, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {MASTER_KEY}"}
    answer = httpx2.post(mocked.url + "/key/generate", headers=headers, content=body)
    error_of(answer, 400, "invalid_request_error")
    assert "Traceback" not in mocked.log


def test_own_keys_and_aliases_are_unique(mocked: Process) -> None:
    own = "sk-own-key-0123456789"
    assert mocked.new_key(key=own, key_alias="only one") == own
    assert relay_status(mocked, own) == 200
    for fields in ({"key": own}, {"key_alias": "only one"}):
        error_of(mocked.manage("/key/generate", fields), 400, "invalid_request_error")
    other = mocked.new_key()
    taken = {"key": other, "key_alias": "only one"}
    error_of(mocked.manage("/key/update", taken), 400, "invalid_request_error")
    assert mocked.manage("/key/delete", {"key_aliases": ["only one"]}).status_code == 200
    assert mocked.manage("/key/update", taken).status_code == 200


def test_updates_change_and_null_clears(mocked: Process) -> None:
    key = mocked.new_key(user_id="u", duration="1h", tags=["a"])
    update = {"key": gateway.hash_key(key), "user_id": "v", "duration": None, "tags": None}
    answer = mocked.manage("/key/update", update).json()
    assert (answer["user_id"], answer["expires"], answer["tags"]) == ("v", None, [])
    info = mocked.manage(f"/key/info?key={key}").json()["info"]
    assert (info["user_id"], info["expires"], info["tags"]) == ("v", None, [])
    by_alias = mocked.new_key(key_alias="by alias")
    renamed = mocked.manage("/key/update", {"key_alias": "by alias", "team_id": "t"}).json()
    assert renamed["token"] == gateway.hash_key(by_alias) and renamed["team_id"] == "t"


def test_changes_hold_from_the_next_request_on(mocked: Process) -> None:
    def refusal(key: str) -> str:
        answer = httpx2.get(mocked.url + "/v1/models", headers={"x-api-key": key})
        message = error_of(answer, 401, "authentication_error")
        assert key not in message and gateway.hash_key(key) not in message
        return message

    key = mocked.new_key()
    assert relay_status(mocked, key) == 200
    assert mocked.manage("/key/block", {"key": key}).json()["blocked"] is True
    assert "blocked" in refusal(key)
    assert mocked.manage("/key/unblock", {"key": key}).json()["blocked"] is False
    assert relay_status(mocked, key) == 200
    assert mocked.manage("/key/update", {"key": key, "duration": "0s"}).status_code == 200
    assert "expired" in refusal(key)
    assert mocked.manage(f"/key/info?key={key}").json()["info"]["status"] == "expired"
    deleted = mocked.manage("/key/delete", {"keys": [key]})
    assert deleted.json() == {"deleted_keys": [key]}
    assert "deleted" in refusal(key)
    error_of(mocked.manage(f"/key/info?key={key}"), 404, "not_found_error")
    error_of(mocked.manage("/key/generate", {"key": key}), 400, "invalid_request_error")
    born_blocked = mocked.new_key(blocked=True)
    assert "blocked" in refusal(born_blocked)


def test_unknown_keys_are_404_and_nothing_is_deleted(mocked: Process) -> None:
    key, unknown = mocked.new_key(), "sk-unknown-0123456789"
    for path in ("/key/update", "/key/block", "/key/unblock", "/key/regenerate"):
        error_of(mocked.manage(path, {"key": unknown}), 404, "not_found_error")
        error_of(mocked.manage(path, {}), 400, "invalid_request_error")
    error_of(mocked.manage("/key/delete", {"keys": [key, unknown]}), 404, "not_found_error")
    error_of(mocked.manage("/key/delete", {}), 400, "invalid_request_error")
    error_of(mocked.manage(f"/key/info?key={unknown}"), 404, "not_found_error")
    assert relay_status(mocked, key) == 200


def test_regenerated_keys(mocked: Process) -> None:
    old = mocked.new_key(key_alias="rotating", user_id="u")
    answer = mocked.manage("/key/regenerate", {"key": old}).json()
    new = answer["key"]
    assert new != old and (answer["key_alias"], answer["user_id"]) == ("rotating", "u")
    assert (relay_status(mocked, new), relay_status(mocked, old)) == (200, 401)
    newer = mocked.manage(f"/key/{new}/regenerate", {"grace_period": "1h"}).json()["key"]
    assert (relay_status(mocked, newer), relay_status(mocked, new)) == (200, 200)
    assert mocked.manage("/key/block", {"key": newer}).status_code == 200
    assert (relay_status(mocked, newer), relay_status(mocked, new)) == (401, 401)
    mocked.manage("/key/unblock", {"key": newer})
    short = mocked.manage(
        "/key/regenerate",
        {
            "key": newer,
            "grace_period": "2s",  # moments are whole seconds, so it may be one
            "new_key": "sk-chosen-0123456789",
            "team_id": "t",
        },
    ).json()
    assert (short["key"], short["team_id"]) == ("sk-chosen-0123456789", "t")
    assert relay_status(mocked, newer) == 200
    deadline = time.monotonic() + PATIENCE
    while relay_status(mocked, newer) == 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (relay_status(mocked, newer), relay_status(mocked, short["key"])) == (401, 200)


def test_who_may_manage(mocked: Process, virtual_key: str) -> None:
    posts = ["generate", "update", "delete", "block", "unblock", "regenerate"]
    for path in [f"/key/{name}" for name in posts]:
        error_of(mocked.manage(path, {}, key=""), 401, "authentication_error")
        error_of(mocked.manage(path, {}, key="sk-wrong"), 401, "authentication_error")
        error_of(mocked.manage(path, {}, key=virtual_key), 403, "permission_error")
    error_of(mocked.manage("/key/list", key=virtual_key), 403, "permission_error")
    other = mocked.new_key()
    error_of(mocked.manage(f"/key/info?key={other}", key=virtual_key), 403, "permission_error")
    for header in ({"x-api-key": MASTER_KEY}, {"Authorization": f"bearer {MASTER_KEY}"}):
        listed = httpx2.get(mocked.url + "/key/list", headers=header)
        assert listed.status_code == 200
    error_of(mocked.manage("/key/nonsense", {}), 404, "not_found_error")
    error_of(mocked.manage("/key/generate"), 405, "invalid_request_error")


def test_lists_are_paged_and_filtered(start: Starter) -> None:
    process = start()
    keys = [process.new_key(user_id=f"u{n % 2}", key_alias=f"k{n:02}") for n in range(25)]
    gone = process.new_key()
    process.manage("/key/delete", {"keys": [gone]})
    page = process.manage("/key/list?page=3&size=10").json()
    assert page["keys"] == [gateway.hash_key(key) for key in keys[20:]]
    assert (page["total_count"], page["current_page"], page["total_pages"]) == (25, 3, 3)
    full = process.manage("/key/list?user_id=u1&size=100&return_full_object=true").json()
    assert [row["key_alias"] for row in full["keys"]] == [f"k{n:02}" for n in range(1, 25, 2)]
    assert process.manage("/key/list?key_alias=k07").json()["total_count"] == 1
    error_of(process.manage("/key/list?page=0"), 400, "invalid_request_error")


def test_keys_in_queries_never_reach_the_log(start: Starter) -> None:
    process = start("mock", "--logging=debug")
    key = process.new_key()
    process.manage(f"/key/info?key={key}")
    process.manage("/key/info?key=sk-unknown-0123456789")
    relay_status(process, key)
    process.stop()
    for secret in (key, gateway.hash_key(key), "sk-unknown", MASTER_KEY, REAL_KEY):
        assert secret not in process.log


# ─── keys.json ───────────────────────────────────────────────────────────────────────


def test_the_file_is_one_line_a_key_and_private(start: Starter) -> None:
    process = start()
    keys = [process.new_key(key_alias=f"k{n}") for n in range(3)]
    text = process.keys.read_text()
    lines = text.splitlines()
    assert lines[0] == '{"version": 1, "keys": {' and lines[-1] == "}}"
    assert len(lines) == 5 and set(json.loads(text)["keys"]) == set(map(gateway.hash_key, keys))
    assert stat.S_IMODE(process.keys.stat().st_mode) == 0o600
    assert [path.name for path in process.folder.iterdir() if "tmp" in path.name] == []


def test_keys_survive_a_restart(start: Starter) -> None:
    process = start()
    fields = {"key_alias": "a", "tags": ["t"], "metadata": {"m": 1}, "duration": "1d"}
    key, blocked, deleted = (process.new_key(**fields), process.new_key(), process.new_key())
    process.manage("/key/block", {"key": blocked})
    process.manage("/key/delete", {"keys": [deleted]})
    rotated = process.manage("/key/regenerate", {"key": key, "grace_period": "1h"}).json()["key"]
    info = process.manage(f"/key/info?key={rotated}").json()
    assert process.stop() == 0
    again = start()
    assert again.manage(f"/key/info?key={rotated}").json() == info
    statuses = [relay_status(again, k) for k in (rotated, key, blocked, deleted)]
    assert statuses == [200, 200, 401, 401]


async def generate_until_killed(process: Process, answered: list[str], enough: int) -> None:
    """50 callers make keys until ``enough`` were answered or the gateway is gone."""

    async def caller() -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async with Client(process.port) as client:
                while len(answered) < enough:
                    client.request("POST /key/generate", body=b"{}", key=MASTER_KEY)
                    answered.append((await client.response()).json()["key"])

    await asyncio.gather(*(caller() for _ in range(50)))


def has_length(things: list[Any], length: int) -> bool:
    return len(things) >= length


@pytest.mark.gen_test(timeout=120)
async def test_no_acknowledged_key_is_lost_to_sigkill(start: Starter) -> None:
    chance = random.Random(20261122)
    answered: list[str] = []
    for round_number in range(1, 21):
        process = start()
        goal = max(len(answered) + 1, 50 * round_number)
        callers = asyncio.create_task(generate_until_killed(process, answered, goal + 500))
        await until(functools.partial(has_length, answered, goal))
        await asyncio.sleep(chance.uniform(0, 0.05))
        process.popen.kill()
        process.popen.wait()
        await callers
        document = json.loads(process.keys.read_text())
        lost = [key for key in answered if gateway.hash_key(key) not in document["keys"]]
        assert not lost, f"round {round_number}"
    assert len(answered) >= 1000


def test_a_damaged_file_stops_the_start_and_is_left_alone(tmp_path: Path) -> None:
    hashed, path = gateway.hash_key("sk-x"), tmp_path / "keys.json"
    for text, word in [
        ('{"version": 1, "keys": {', "not JSON"),
        ("", "not JSON"),
        ("[]", "damaged"),
        ('{"version": 2, "keys": {}}', "version"),
        ('{"version": 1, "keys": {"short": {"key_name": "x"}}}', "number 1"),
        (f'{{"version": 1, "keys": {{"{hashed}": []}}}}', "object"),
        (f'{{"version": 1, "keys": {{"{hashed}": {{}}}}}}', "key_name"),
        (f'{{"version": 1, "keys": {{"{hashed}": {{"key_name": "x", "modles": []}}}}}}', "modles"),
        (f'{{"version": 1, "keys": {{"{hashed}": {{"key_name": "x", "blocked": 1}}}}}}', "blocked"),
        (f'{{"version": 1, "keys": {{"{hashed}": {{"key_name": "x", "expires": "y"}}}}}}', "y"),
        (
            f'{{"version": 1, "keys": {{"{hashed}": {{"key_name": "x", "spend": "-1"}}}}}}',
            "from zero up",
        ),
    ]:
        path.write_text(text)
        line = failed_start(tmp_path, "--port=0", "--upstream=mock")
        assert "keys.json" in line and word in line
        assert hashed not in line
        assert path.read_text() == text


def test_a_second_gateway_on_the_same_file_is_refused(start: Starter) -> None:
    process = start()
    assert "another gateway" in failed_start(process.folder, "--port=0", "--upstream=mock")
    process.new_key()  # the file is another one now, and still ours
    assert "another gateway" in failed_start(process.folder, "--port=0", "--upstream=mock")
    process.popen.kill()
    process.popen.wait()
    start()


def as_nobody() -> None:
    """Run in the child before the gateway starts: root is stopped by no file mode."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mount"), reason="needs to mount a disk")
def test_a_full_disk_refuses_the_change_and_keeps_the_file(start: Starter, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let the tests mount a disk")
    try:
        process = start("mock", f"--keys={disk / 'keys.json'}")
        key = process.new_key()
        before = (disk / "keys.json").read_bytes()
        (disk / "filler").write_bytes(b"")
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        metadata = {"metadata": {"much": "x" * 20_000}}
        error_of(process.manage("/key/generate", metadata), 503, "overloaded_error")
        error_of(process.manage("/key/update", {"key": key, **metadata}), 503, "overloaded_error")
        error_of(process.manage("/key/block", {"key": key}), 503, "overloaded_error")
        assert (disk / "keys.json").read_bytes() == before
        assert [path.name for path in disk.iterdir() if "tmp" in path.name] == []
        info = process.manage(f"/key/info?key={key}").json()["info"]
        assert info["metadata"] == {} and info["blocked"] is False
        assert relay_status(process, key) == 200
        assert httpx2.get(process.url + "/health/readiness").status_code == 503
        (disk / "filler").unlink()
        process.new_key(**metadata)
        assert httpx2.get(process.url + "/health/readiness").status_code == 200
        process.stop()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_folder_refuses_the_change(tmp_path: Path, start: Starter) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    process = start("mock", folder=folder)
    key = process.new_key()
    before = process.keys.read_bytes()
    with unwritable(folder):
        message = error_of(process.manage("/key/generate", {}), 503, "overloaded_error")
        assert str(folder) not in message
        assert relay_status(process, key) == 200
        assert process.keys.read_bytes() == before
    process.new_key()


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Make files in a folder impossible to create or rename, for root too."""
    if os.getuid() != 0:
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    immutable = subprocess.run(["chattr", "+i", folder], capture_output=True, check=False)
    if immutable.returncode:
        pytest.skip("this file system knows no immutable folders")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


@gen_test
async def test_a_change_during_a_reload_is_kept(tmp_path: Path) -> None:
    """Wherever in the reload it comes."""
    for early in range(6):
        for late in range(8):
            path = tmp_path / f"{early}-{late}.json"
            store = gateway.KeyStore(path)

            async def make(name: str, store: gateway.KeyStore = store) -> None:
                record = gateway.VirtualKey("sk-...test", name)
                await store.change({gateway.hash_key(name): record})

            async def ticks(number: int) -> None:
                for _ in range(number):
                    await asyncio.sleep(0)

            first = asyncio.create_task(make("first"))
            await ticks(early)
            reload = asyncio.create_task(store.reload())
            await ticks(late)
            await asyncio.gather(first, reload, make("second"))
            await store.save()
            kept = json.loads(path.read_bytes())["keys"]
            hashes = {gateway.hash_key("first"), gateway.hash_key("second")}
            assert hashes == set(kept) == set(store.keys), (early, late)
            await store.flush()
            store.close()


def test_sighup_reads_the_file_again(start: Starter) -> None:
    process = start()
    key, other = process.new_key(key_alias="one"), process.new_key(key_alias="two")
    document = json.loads(process.keys.read_text())
    document["keys"][gateway.hash_key(key)]["blocked"] = True
    process.keys.write_text(json.dumps(document))
    assert relay_status(process, key) == 200
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: relay_status(process, key) == 401)
    assert relay_status(process, other) == 200
    process.keys.write_text("damaged")
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: "not read again" in process.log)
    assert relay_status(process, other) == 200
    # an editor that replaces the file: the new one is ours as well
    fresh = process.folder / "fresh.json"
    fresh.write_text(json.dumps(document))
    fresh.replace(process.keys)
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: process.log.count("keys read again") == 2)
    assert "another gateway" in failed_start(process.folder, "--port=0", "--upstream=mock")
    process.manage("/key/unblock", {"key": key})
    assert relay_status(process, key) == 200


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_the_committed_file_is_an_empty_store() -> None:
    shown = subprocess.run(
        ["git", "show", "HEAD:keys.json"],
        cwd=GATEWAY.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    text = shown.stdout if shown.returncode == 0 else (GATEWAY.parent / "keys.json").read_text()
    assert json.loads(text) == {"version": 1, "keys": {}}


# ─── Metering and price, apart from I/O ──────────────────────────────────────────────

WHEN = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def prices() -> gateway.Prices:
    prices = gateway.Prices()
    prices.load()
    return prices


def usage(**fields: Any) -> dict[str, Any]:
    return {"input_tokens": 0, "output_tokens": 0, **fields}


def written(five: int, hour: int) -> dict[str, Any]:
    return {
        "cache_creation_input_tokens": five + hour,
        "cache_creation": {"ephemeral_5m_input_tokens": five, "ephemeral_1h_input_tokens": hour},
    }


def entry(kind: str, model: str, given: int, taken: int, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "model": model, "input_tokens": given, "output_tokens": taken, **fields}


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
PRICED: dict[str, tuple[str, dict[str, Any], str]] = {
    # 1,000 x $4 + 500 x $20, per million
    "opus plain": ("claude-opus-5-5", usage(input_tokens=1000, output_tokens=500), "0.014"),
    # 1,000 x $2 + 500 x $10
    "sonnet plain": ("claude-sonnet-5-5", usage(input_tokens=1000, output_tokens=500), "0.007"),
    # 1,000 x $1 + 500 x $5
    "haiku plain": ("claude-haiku-4-5", usage(input_tokens=1000, output_tokens=500), "0.0035"),
    "dated name": (
        "claude-haiku-4-5-20251001",
        usage(input_tokens=1000, output_tokens=500),
        "0.0035",
    ),
    "nothing used": ("claude-opus-5-5", usage(), "0"),
    "one token": ("claude-haiku-5-5", usage(input_tokens=1), "0.0000001"),
    # 50 x $4 + 10,000 x $0.20 + 100 x $20
    "cache read": (
        "claude-opus-5-5",
        usage(input_tokens=50, cache_read_input_tokens=10_000, output_tokens=100),
        "0.0042",
    ),
    # 10,000 x $0.25: Fable 5.1 reads its cache at a fortieth, not a tenth
    "cache read of fable": ("claude-fable-5-1", usage(cache_read_input_tokens=10_000), "0.0025"),
    # 10,000 x $5
    "5-minute write": ("claude-opus-5-5", usage(**written(10_000, 0)), "0.05"),
    # 10,000 x $8
    "1-hour write": ("claude-opus-5-5", usage(**written(0, 10_000)), "0.08"),
    # 10,000 x $5 + 20,000 x $8
    "both writes": ("claude-opus-5-5", usage(**written(10_000, 20_000)), "0.21"),
    # a sum without its parts is 5-minute writes: 10,000 x $5
    "write without split": ("claude-opus-5-5", usage(cache_creation_input_tokens=10_000), "0.05"),
    # 100 x $2 + 200 x $10 + 1,000 x $0.10 + 400 x $2.50 + 300 x $4
    "everything": (
        "claude-sonnet-5-5",
        usage(
            input_tokens=100, output_tokens=200, cache_read_input_tokens=1000, **written(400, 300)
        ),
        "0.0045",
    ),
    # half of (1,000 x $4 + 500 x $20)
    "batch": (
        "claude-opus-5-5",
        usage(input_tokens=1000, output_tokens=500, service_tier="batch"),
        "0.007",
    ),
    # half of (1,000 x $3 + 500 x $15): also for a model that genai-prices has no batch price for
    "batch of an old model": (
        "claude-3-5-sonnet-20241022",
        usage(input_tokens=1000, output_tokens=500, service_tier="batch"),
        "0.00525",
    ),
    # half of 10,000 x $0.20, and of 2,000 x $8
    "cached batch": (
        "claude-opus-5-5",
        usage(cache_read_input_tokens=10_000, **written(0, 2000), service_tier="batch"),
        "0.009",
    ),
    # 1,000 x $8 + 500 x $40
    "fast": ("claude-opus-5-5", usage(input_tokens=1000, output_tokens=500, speed="fast"), "0.028"),
    # 1.1 x (1,000 x $4 + 500 x $20)
    "us": (
        "claude-opus-5-5",
        usage(input_tokens=1000, output_tokens=500, inference_geo="us"),
        "0.0154",
    ),
    # 1.1 x half of (1,000 x $4 + 500 x $20)
    "us batch": (
        "claude-opus-5-5",
        usage(input_tokens=1000, output_tokens=500, inference_geo="us", service_tier="batch"),
        "0.0077",
    ),
    "global is no us": (
        "claude-opus-5-5",
        usage(input_tokens=1000, output_tokens=500, inference_geo="global"),
        "0.014",
    ),
    # 100,000 x $0.10 + 1,000 x $0.50
    "haiku 5.5 at its tier": (
        "claude-haiku-5-5",
        usage(input_tokens=100_000, output_tokens=1000),
        "0.0105",
    ),
    # one token more: 100,001 x $0.50 + 1,000 x $2.50
    "haiku 5.5 above it": (
        "claude-haiku-5-5",
        usage(input_tokens=100_001, output_tokens=1000),
        "0.0525005",
    ),
    # the prompt counts with its cached part: 1,000 x $0.50 + 150,000 x $0.05 + 1,000 x $2.50
    "haiku 5.5 above it by its cache": (
        "claude-haiku-5-5",
        usage(input_tokens=1000, cache_read_input_tokens=150_000, output_tokens=1000),
        "0.0105",
    ),
    # 200,000 x $3 + 100 x $15
    "sonnet 4.5 at its tier": (
        "claude-sonnet-4-5",
        usage(input_tokens=200_000, output_tokens=100),
        "0.6015",
    ),
    # 300,000 x $6 + 100 x $22.50
    "sonnet 4.5 above it": (
        "claude-sonnet-4-5",
        usage(input_tokens=300_000, output_tokens=100),
        "1.80225",
    ),
    # 1,000 x $2 + 3 x $0.01
    "web search": (
        "claude-sonnet-5-5",
        usage(input_tokens=1000, server_tool_use={"web_search_requests": 3}),
        "0.032",
    ),
    # half of 1,000 x $2, and 3 searches at full price
    "web search in a batch": (
        "claude-sonnet-5-5",
        usage(
            input_tokens=1000,
            server_tool_use={"web_search_requests": 3, "web_fetch_requests": 9},
            service_tier="batch",
        ),
        "0.031",
    ),
    # thinking is inside the output: 100 x $10
    "thinking": (
        "claude-sonnet-5-5",
        usage(output_tokens=100, output_tokens_details={"thinking_tokens": 90}),
        "0.001",
    ),
    # the executor 500 x $2 + 300 x $10; the advisor 2,000 x $4 + 100 x $20
    "advisor": (
        "claude-sonnet-5-5",
        usage(
            input_tokens=500,
            output_tokens=300,
            iterations=[
                entry("message", "claude-sonnet-5-5", 500, 300),
                entry("advisor_message", "claude-opus-5-5", 2000, 100),
            ],
        ),
        "0.014",
    ),
    # compaction 180,000 x $3 + 3,500 x $15, then 23,000 x $3 + 1,000 x $15
    "compaction": (
        "claude-sonnet-4-6",
        usage(
            input_tokens=23_000,
            output_tokens=1000,
            iterations=[
                {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500},
                {"type": "message", "input_tokens": 23_000, "output_tokens": 1000},
            ],
        ),
        "0.6765",
    ),
    # declined before any output: free; the fallback 1,000 x $2 + 200 x $10
    "fallback, declined": (
        "claude-sonnet-5-5",
        usage(
            input_tokens=1000,
            output_tokens=200,
            iterations=[
                entry("message", "claude-fable-5-2", 1000, 0),
                entry("fallback_message", "claude-sonnet-5-5", 1000, 200),
            ],
        ),
        "0.004",
    ),
    # declined midway: 1,000 x $8 + 50 x $40, and the fallback 1,050 x $2 + 200 x $10
    "fallback, midway": (
        "claude-sonnet-5-5",
        usage(
            iterations=[
                entry("message", "claude-fable-5-2", 1000, 50),
                entry("fallback_message", "claude-sonnet-5-5", 1050, 200),
            ]
        ),
        "0.0141",
    ),
    # `iterations` is often an empty list: the top level counts, 1,000 x $4
    "no iterations": ("claude-opus-5-5", usage(input_tokens=1000, iterations=[]), "0.004"),
    # nobody knows it: 1,000 x $15 + 100 x $75, as Opus 4.1
    "unknown model": ("claude-unheard-of", usage(input_tokens=1000, output_tokens=100), "0.0225"),
    "no model": ("", usage(input_tokens=1000, output_tokens=100), "0.0225"),
}


@pytest.mark.parametrize("name", PRICED)
def test_prices_are_those_worked_out_by_hand(prices: gateway.Prices, name: str) -> None:
    model, used, amount = PRICED[name]
    measured = gateway.Measured(usage=used, empty=False)
    assert prices.price(measured, model, WHEN) == Decimal(amount)


def test_a_refusal_without_content_is_free(prices: gateway.Prices) -> None:
    used = usage(input_tokens=1000, output_tokens=10)
    refused = gateway.Measured(usage=used, stop_reason="refusal", empty=True)
    assert prices.price(refused, "claude-opus-5-5", WHEN) == 0
    refused.empty = False  # 1,000 x $4 + 10 x $20
    assert prices.price(refused, "claude-opus-5-5", WHEN) == Decimal("0.0042")


def test_an_own_price_file_wins(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(
        '{"claude-x": {"input": 1.5, "output": 2}, "claude-*": {"input": 7, "output": 9}}'
    )
    prices = gateway.Prices(path)
    prices.load()
    used = gateway.Measured(usage=usage(input_tokens=10, output_tokens=10, **written(10, 0)))
    # 10 x $1.50 + 10 x $2 + 10 x 1.25 x $1.50
    assert prices.price(used, "claude-x", WHEN) == Decimal("0.00005375")
    assert prices.rates("claude-opus-5-5", WHEN, 0).input == Decimal("0.000007")
    path.write_text('{"claude-x": {"input": 3, "output": 4}}')
    prices.reload()
    assert prices.rates("claude-x", WHEN, 0).input == Decimal("0.000003")
    assert prices.rates("claude-opus-5-5", WHEN, 0).input == Decimal("0.000004")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "prices.json"),
        ("[]", "object"),
        ("{}", "object"),
        ('{"m": 5}', "m: is not an object"),
        ('{"m": {"input": 5}}', "'output'"),
        ('{"m": {"input": "5", "output": 1}}', "'input'"),
        ('{"m": {"input": -5, "output": 1}}', "'input'"),
        ('{"m": {"input": NaN, "output": 1}}', "'input'"),
        ('{"m": {"input": true, "output": 1}}', "'input'"),
        ('{"m": {"input": 5, "output": 1, "typo": 2}}', "'typo'"),
    ],
)
def test_a_bad_price_file_ends_the_start(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "prices.json").write_text(text)
    line = failed_start(tmp_path, "--port=0", "--upstream=mock", "--prices=prices.json")
    assert "--prices" in line and named in line


def sse(*events: dict[str, Any], end: str = "\n") -> bytes:
    lines = [f"event: {e['type']}{end}data: {json.dumps(e)}{end}{end}" for e in events]
    return "".join(lines).encode()


def delta(text: str) -> dict[str, Any]:
    return {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": text},
    }


FINAL_USAGE = usage(input_tokens=25, output_tokens=180, cache_read_input_tokens=7)
STREAM = [
    {
        "type": "message_start",
        "message": {
            "model": "claude-opus-5-5",
            "content": [],
            "usage": usage(input_tokens=25, output_tokens=1, **written(10, 20)),
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    delta('the "usage" of \\ back and "text": "x"'),
    delta("Grüße, 世界 \U0001f600 \n"),
    {"type": "something_new", "usage": None, "field": [1, {"a": 2}]},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 90}},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {"output_tokens": 180, "cache_read_input_tokens": 7, "cache_creation": None},
    },
    {"type": "message_stop"},
]
LONG_TEXT = 'a "usage": {"input_tokens": 9} \\" ]}{[ ' * 4000
MESSAGES = {
    "small": {"text": "hello"},
    "awkward": {"text": '{"usage": {"output_tokens": 1}} \\ " ]', "n": [1, [2, {"usage": 3}]]},
    "long": {"text": LONG_TEXT},
}


def message_body(name: str) -> bytes:
    block = {"type": "text", **MESSAGES[name]}
    return json.dumps(
        {
            "id": "msg",
            "content": [block],
            "nested": {"usage": {"input_tokens": 99}, "model": "no"},
            "model": "claude-opus-5-5",
            "stop_reason": "end_turn",
            "usage": {
                **FINAL_USAGE,
                "iterations": [],
                "server_tool_use": {"web_search_requests": 2},
            },
        }
    ).encode()


def measure(
    parts: list[bytes], kind: str, coding: str = "", complete: bool = True
) -> gateway.Measured:
    meter = gateway.Meter(kind)
    inflater = gateway.Inflater(coding)
    for part in parts:
        for plain in inflater.slices(part) if coding else [part]:
            meter.look(plain)
    return meter.finish(complete)


@settings(deadline=None)
@given(cuts=CUTS, end=st.sampled_from(["\n", "\r\n", "\r"]), coding=st.sampled_from(["", "gzip"]))
def test_a_stream_is_measured_the_same_however_it_is_split(
    cuts: list[int], end: str, coding: str
) -> None:
    body = sse(*STREAM, end=end)
    wire = gzip.compress(body, mtime=0) if coding else body
    measured = measure(split_at(wire, cuts), "text/event-stream; charset=utf-8", coding)
    assert measured.model == "claude-opus-5-5" and measured.stop_reason == "end_turn"
    tally = gateway.tally_of(measured.usage)
    assert (tally.input_tokens, tally.output_tokens, tally.cache_read_tokens) == (25, 180, 7)
    assert (tally.cache_write_5m_tokens, tally.cache_write_1h_tokens) == (10, 20)
    texts = [e["delta"]["text"] for e in STREAM if e["type"] == "content_block_delta"]
    assert measured.seen == sum(len(text.encode()) for text in texts)
    assert not measured.empty and measured.final


@settings(deadline=None, max_examples=60)
@given(cuts=CUTS, name=st.sampled_from(sorted(MESSAGES)), coding=st.sampled_from(["", "deflate"]))
def test_a_message_is_measured_the_same_however_it_is_split(
    cuts: list[int], name: str, coding: str
) -> None:
    body = message_body(name)
    wire = zlib.compress(body) if coding else body
    measured = measure(split_at(wire, cuts), "application/json", coding)
    assert measured.model == "claude-opus-5-5" and measured.stop_reason == "end_turn"
    assert measured.usage["server_tool_use"] == {"web_search_requests": 2}
    assert measured.usage["output_tokens"] == 180 and not measured.empty


@settings(deadline=None, max_examples=60)
@given(cuts=CUTS)
def test_batch_results_are_measured_the_same_however_they_are_split(cuts: list[int]) -> None:
    lines = []
    for name in MESSAGES:
        message = json.loads(message_body(name))
        lines.append({"custom_id": name, "result": {"type": "succeeded", "message": message}})
    lines.insert(1, {"custom_id": "x", "result": {"type": "errored", "error": {"usage": 1}}})
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    seen: list[tuple[int, int]] = []
    meter = gateway.Meter(
        "application/x-jsonl",
        lambda line, measured: seen.append((line, gateway.tally_of(measured.usage).output_tokens)),
    )
    for part in split_at(body, cuts):
        meter.look(part)
    meter.finish(True)
    assert seen == [(1, 180), (2, 0), (3, 180), (4, 180)]


@given(data=st.binary(max_size=300), cuts=CUTS)
def test_no_bytes_upset_a_meter(data: bytes, cuts: list[int]) -> None:
    for kind in ("text/event-stream", "application/json"):
        for coding in ("", "gzip", "deflate"):
            with contextlib.suppress(zlib.error):
                measure(split_at(data, cuts), kind, coding)


RAW_DEFLATE = functools.partial(zlib.compress, wbits=-zlib.MAX_WBITS)


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress),
        ("gzip", lambda data: gzip.compress(data[:70]) + gzip.compress(data[70:])),
        ("x-gzip", lambda data: gzip.compress(data) + bytes(9) + gzip.compress(b"")),
        ("deflate", zlib.compress),
        ("deflate", RAW_DEFLATE),
    ],
)
@settings(deadline=None, max_examples=30)
@given(cuts=CUTS)
def test_every_coding_that_may_come_is_read_however_it_is_split(
    coding: str, pack: Callable[[bytes], bytes], cuts: list[int]
) -> None:
    data = os.urandom(100) + b"x" * 300_000
    inflater = gateway.Inflater(coding)
    parts = split_at(pack(data), cuts)
    slices = [plain for part in parts for plain in inflater.slices(part)]
    assert b"".join(slices) == data and inflater.is_whole
    assert max(map(len, slices)) <= gateway.INFLATE_SLICE


def test_a_long_line_is_counted_the_same_however_it_is_split() -> None:
    """Up to the bound a usage line is read, beyond it its size counts: whole, or in whatever parts."""
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
    row = {"result": {"message": {"model": OPUS, "usage": usage_of(1, 2)}}}
    long = {**row, "padding": "x" * gateway.MAX_LINE}
    body = b"".join(json.dumps(r).encode() + b"\n" for r in (row, long, row))
    for size in (50_000, len(body)):
        seen: list[tuple[int, int]] = []
        meter = gateway.Meter("", lambda n, m, seen=seen: seen.append((n, m.seen)))
        for at in range(0, len(body), size):
            meter.look(body[at : at + size])
        meter.finish(True)
        assert seen == [(1, 0), (2, len(json.dumps(long)) + 1), (3, 0)]


def test_a_meter_keeps_no_response() -> None:
    for kind in ("application/json", "text/event-stream"):
        meter = gateway.Meter(kind)
        for _ in range(100):
            meter.look(b"data: " + b"x" * MIB)
            assert sum(map(len, meter._held or [])) <= gateway.MAX_LINE


ORDER = gateway.Order("claude-opus-5-5", prompt=7, max_tokens=4000, thinking=1024)


def cut(*events: dict[str, Any], order: gateway.Order = ORDER, **kwargs: Any) -> Any:
    measured = measure([sse(*events)], "text/event-stream", complete=False, **kwargs)
    measured.complete_with(order)
    return measured


def test_a_cut_stream_is_estimated(prices: gateway.Prices) -> None:
    body = sse(*STREAM[:3], delta("x" * 401), delta("y" * 10))
    measured = measure([body[:-20]], "text/event-stream", complete=False)
    plain = dataclasses.replace(ORDER, thinking=0)
    measured.complete_with(plain)
    assert measured.estimated
    # the second delta was cut: ceil(401 / 3) = 134 tokens of output, 25 of input, the writes
    (_, tally), *rest = gateway.charged_entries(measured)
    assert (tally.input_tokens, tally.output_tokens, rest) == (25, 134, [])
    # 25 x $4 + 134 x $20 + 10 x $5 + 20 x $8
    assert prices.price(measured, measured.model, WHEN) == Decimal("0.00299")
    few = gateway.charged_entries(cut(*STREAM[:3], order=plain))
    assert few[0][1].output_tokens == 1  # the count in message_start is larger


THINKING = [
    STREAM[0],
    {"type": "content_block_start", "content_block": {"type": "thinking", "thinking": ""}},
]


THOUGHT = {
    "type": "content_block_delta",
    "delta": {"type": "thinking_delta", "thinking": "x" * 300},
}


@pytest.mark.parametrize(
    ("events", "order", "given", "taken"),
    [
        ([], {}, 7, 1024),  # the prompt as estimated, and the thinking that was asked for
        ([], {"thinking": 0}, 7, 0),
        ([delta("世界" * 9)], {"thinking": 0}, 7, 18),  # three bytes a token
        (THINKING, {}, 25, 1024),
        (THINKING, {"thinking": 0}, 25, 1000),  # unasked: a quarter of max_tokens
        (
            [*THINKING, THOUGHT],
            {},
            25,
            100,  # it was seen
        ),
        ([STREAM[0], {"type": "error"}], {"thinking": 0}, 25, 1),
        (STREAM, {}, 25, 180),  # the last word had come
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_what_a_cut_answer_used_is_at_least_what_is_known(
    events: list[Any], order: dict[str, int], given: int, taken: int, complete: bool
) -> None:
    """A stream that ends cleanly without its last word is one that was cut."""
    measured = measure([sse(*events)], "text/event-stream", complete=complete)
    measured.complete_with(dataclasses.replace(ORDER, **order))
    entries = [tally for _, tally in gateway.charged_entries(measured)]
    assert sum(tally.input_tokens for tally in entries) == given
    assert sum(tally.output_tokens for tally in entries) == taken
    assert measured.estimated == (events is not STREAM) and measured.model == OPUS


def test_a_cut_with_iterations_loses_none_of_them() -> None:
    begun = json.loads(json.dumps(STREAM[0]))
    begun["message"]["usage"]["iterations"] = [
        entry("compaction", OPUS, 1000, 200),
        entry("message", OPUS, 25, 1),
    ]
    measured = cut(begun, delta("x" * 3000), order=dataclasses.replace(ORDER, thinking=0))
    entries = [tally for _, tally in gateway.charged_entries(measured)]
    assert sum(tally.input_tokens for tally in entries) == 1025
    assert sum(tally.output_tokens for tally in entries) == 1000


@pytest.mark.parametrize(
    ("types", "charged"),
    [
        (["message", "fallback_message"], ["b"]),
        (["message", "fallback_message", "fallback_message"], ["c"]),
        (["message", "compaction"], ["a", "b"]),
    ],
)
def test_attempts_that_declined_are_free(types: list[str], charged: list[str]) -> None:
    attempts = [
        {"type": kind, "model": name, "input_tokens": 5, "output_tokens": 0}
        for kind, name in zip(types, "abc", strict=False)
    ]
    measured = gateway.Measured("m", {"iterations": attempts}, empty=False, final=True)
    assert [model for model, _ in gateway.reported(measured)] == charged


def test_a_count_that_no_answer_has_is_no_count() -> None:
    hostile = {"input_tokens": 10**400, "output_tokens": -5, "x": True}
    assert gateway.tally_of(hostile) == gateway.Tally()


# ─── Windows, buckets, models, routes ────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("duration", "start", "end"),
    [
        ("1d", "2026-11-22T00:00:00Z", "2026-11-23T00:00:00Z"),
        ("24h", "2026-11-22T00:00:00Z", "2026-11-23T00:00:00Z"),
        ("7d", "2026-11-16T00:00:00Z", "2026-11-23T00:00:00Z"),  # a Sunday; weeks begin on Monday
        ("1w", "2026-11-16T00:00:00Z", "2026-11-23T00:00:00Z"),
        ("30d", "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
        ("1mo", "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
        ("1h", "2026-11-22T23:00:00Z", "2026-11-23T00:00:00Z"),
        ("15m", "2026-11-22T23:45:00Z", "2026-11-23T00:00:00Z"),
        ("30s", "2026-11-22T23:59:30Z", "2026-11-23T00:00:00Z"),
        ("12mo", "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"),
    ],
)
def test_windows_snap_to_the_calendar(duration: str, start: str, end: str) -> None:
    moment = datetime(2026, 11, 22, 23, 59, 59, tzinfo=UTC)
    assert tuple(map(gateway.iso, gateway.window(duration, moment))) == (start, end)


@pytest.mark.parametrize("duration", ["0s", "", "d", "-1d", "1y", "1e3d", "9999999999s"])
def test_windows_of_no_length_are_refused(duration: str) -> None:
    with pytest.raises((ValueError, OverflowError)):
        gateway.window(duration, WHEN)


@pytest.mark.parametrize("duration", ["24000mo", "999999999mo", "999999999w"])
def test_windows_that_leave_the_calendar_never_end(duration: str) -> None:
    for moment in (WHEN, gateway.EPOCH):
        start, end = gateway.window(duration, moment)
        assert start <= moment < end


def test_buckets_refill_continuously_and_may_go_below_zero() -> None:
    bucket = gateway.Bucket(60, 0.0)
    for _ in range(60):
        bucket.draw(1, 0.0)
    assert bucket.seconds_until(1, 0.0) == pytest.approx(1.0)
    assert bucket.seconds_until(1, 0.25) == pytest.approx(0.75)
    bucket.draw(120, 1.0)
    assert bucket.level(1.0) == pytest.approx(-119)
    assert bucket.seconds_until(1, 1.0) == pytest.approx(120)
    assert bucket.level(1000.0) == 60
    bucket.resize(100, 1000.0)
    assert bucket.level(1000.0) == 100
    assert gateway.Bucket(0, 0.0).seconds_until(1, 5.0) == 60


def restricted(*models: str, **fields: Any) -> gateway.VirtualKey:
    return gateway.VirtualKey("sk-...test", models=list(models), **fields)


@pytest.mark.parametrize(
    "body",
    [
        {"model": "claude-haiku-4-5"},
        {"model": "claude-haiku-4-5", "fallbacks": [{"model": "claude-haiku-5-5"}]},
        {"model": "claude-haiku-4-5", "tools": [{"name": "x"}, {"model": "claude-haiku-4-5"}]},
        {"requests": [{"params": {"model": "claude-haiku-4-5"}}] * 3},
        {"model": {"id": "claude-haiku-4-5", "speed": "fast"}},
        {
            "model": "claude-haiku-4-5",
            "tools": [{"input_schema": {"properties": {"model": 1, "Model": 2}}}],
        },
        {"model": "claude-haiku-4-5", "messages": [{"content": [{"input": {"model": "gpt"}}]}]},
        {"messages": []},
    ],
)
def test_allowed_models_pass(body: Any) -> None:
    judge(json.dumps(body).encode(), BATCHES if "requests" in body else MESSAGES_PATH)


MESSAGES_PATH, BATCHES = "/v1/messages", "/v1/messages/batches"


def judge(body: bytes, path: str, method: str = "POST") -> None:
    """What a key for claude-haiku-* may send there."""
    route = gateway.read_route(method, path)
    document = gateway.at_once(gateway.read_strictly(body, route))
    gateway.at_once(gateway.check_models(restricted("claude-haiku-*"), route, document))


OPUS = "claude-opus-5-5"
JSON_KIND = "Content-Type: application/json"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (json.dumps({"model": OPUS}), 403),
        (json.dumps({"model": [OPUS]}), 403),
        (json.dumps({"model": {"id": OPUS}}), 403),
        (json.dumps({"model": "claude-haiku-4-5", "fallbacks": [{"model": OPUS}]}), 403),
        (json.dumps({"model": "claude-haiku-4-5", "fallbacks": [OPUS]}), 403),
        (json.dumps({"model": "claude-haiku-4-5", "fallbacks": "default"}), 403),
        (json.dumps({"model": "claude-haiku-4-5", "tools": [{"model": OPUS}]}), 403),
        (json.dumps({"requests": [{"params": {"model": OPUS}}]}), 403),
        (json.dumps({"requests": [{"params": {"tools": [{"model": OPUS}]}}]}), 403),
        ('{"model": "claude-haiku-4-5", "model": "claude-opus-5-5"}', 400),
        ('{"model": "claude-haiku-4-5", "mod\\u0065l": "claude-opus-5-5"}', 400),
        ('{"model": "claude-haiku-4-5", "Model": "claude-opus-5-5"}', 400),
        ('{"requests": [], "requests": [{"params": {"model": "claude-opus-5-5"}}]}', 400),
        ('{"requests": [{"params": {}, "params": {"model": "claude-opus-5-5"}}]}', 400),
        ("not json", 400),
        ('{"model": "claude-haiku-4-5"} {"model": "claude-opus-5-5"}', 400),
        ("\ufeff" + '{"model": "claude-haiku-4-5"}', 400),
        ("[" * 100_000, 400),
        ('{"a":' * 1500 + "1" + "}" * 1500, 400),
        ('{"requests": [{"params":' * 700 + "1" + "}]}" * 700, 400),
        ('{"tool\u017f": [{"model": "claude-opus-5-5"}]}', 400),
    ],
)
def test_other_models_are_refused(body: str, status: int) -> None:
    with pytest.raises(gateway.APIError) as refused:
        judge(body.encode(), BATCHES if "requests" in body else MESSAGES_PATH)
    assert refused.value.status == status
    assert (
        status == 400
        or OPUS in refused.value.message
        or "default" in refused.value.message
        or "a list" in refused.value.message
    )


def test_a_body_in_another_encoding_is_refused() -> None:
    for body in ('{"model": "claude-haiku-4-5"}'.encode("utf-16"), b'{"model": "\xff"}'):
        with pytest.raises(gateway.APIError):
            judge(body, MESSAGES_PATH)


@pytest.mark.parametrize(
    "body",
    [
        {"agent": {"model": OPUS}},
        {"multiagent": {"advisor": {"model": {"id": OPUS}}}},
        {"a": [{"b": [{"model": OPUS}]}]},
    ],
)
def test_a_model_is_found_at_any_depth_of_what_is_not_known(body: Any) -> None:
    with pytest.raises(gateway.APIError, match=OPUS):
        judge(json.dumps(body).encode(), "/v1/agents")
    judge(json.dumps(body).replace(OPUS, "claude-haiku-4-5").encode(), "/v1/agents")


@pytest.mark.parametrize(
    ("routes", "path", "allowed"),
    [
        ([], "/v1/messages", True),
        ([], "/v1/files/x/content", True),
        ([], "/v1/messages/batches/b/cancel", True),
        ([], "/v1/messages/batches/", True),
        ([], "/v1/messages/batches/b", False),
        ([], "/v1/messages/batches/b/results", False),
        ([], "/v1/messages/batches/ ", False),
        ([], "/v1/messages/batches/;a", False),
        ([], "/v1/messages/batches/?", False),
        ([], "/v1/messages/batches/\x00", False),
        ([], "/v1/messages/cache_touch", True),
        ([], "/v1/skills/s/versions/1", True),
        ([], "/v1/complete", True),
        ([], "/v1/messages/something_new", False),
        ([], "/v1/messages ", False),
        ([], "/v1/messages;a", False),
        ([], "/V1/messages", False),
        ([], "/v1/sessions", False),
        ([], "/v1/organizations/workspaces", False),
        ([], "/v1/oauth/token", False),
        ([], "/api/oauth/claude_cli/create_api_key", False),
        (["/anthropic/*"], "/v1/models", True),
        (["/*"], "/v1/sessions", False),
        (["/v1/*"], "/v1/sessions", False),
        (["/v1/ses*"], "/v1/sessions", False),
        (["/v1/sessions*"], "/v1/sessions/x/events", True),
        (["/v1/messages*"], "/v1/messages/something_new", False),
        (["/v1/messages/something_new"], "/v1/messages/something_new", True),
        (["/api*"], "/api/event_logging/batch", True),
        (["/anthropic/*"], "/v1/organizations/x", False),
        (["/anthropic/v1/organizations*"], "/v1/organizations/x", True),
        (["/anthropic/v1/organizations*"], "/v1/messages", False),
        (["/anthropic/v1/messages*"], "/v1/messages/count_tokens", True),
        (["/v1/messages"], "/v1/messages", True),
        (["/v1/messages"], "/v1/messages/batches", False),
    ],
)
def test_routes(routes: list[str], path: str, allowed: bool) -> None:
    key = restricted(allowed_routes=routes)
    route = gateway.read_route("POST", path)
    if allowed:
        gateway.check_route(key, route, path, pays=True)
        return
    with pytest.raises(gateway.APIError) as refused:
        gateway.check_route(key, route, path, pays=True)
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("/v1/messages*", False),
        ("/anthropic/v1/files/*", False),
        ("/*", False),
        ("/v1/*", False),
        ("/v1/mess*", False),
        ("/metrics", False),
        ("/v1/sessions*", True),
        ("/anthropic/v1/agents", True),
        ("/v1/messages/new", True),
        ("/api/*", True),
    ],
)
def test_patterns_that_open_what_cannot_be_counted(pattern: str, named: bool) -> None:
    assert gateway.unmetered(pattern) == named


# ─── Limits, through the gateway ─────────────────────────────────────────────────────


def usage_of(given: int, taken: int) -> dict[str, Any]:
    return {"input_tokens": given, "output_tokens": taken}


def answer_with(used: dict[str, Any], **headers: str) -> Script:
    """An upstream whose every message used this much."""

    async def script(request: Arrived) -> None:
        body = await request.read_body()
        model = json.loads(body).get("model") if body.startswith(b"{") else None
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": "hi"}],
            "stop_reason": "end_turn",
            "usage": used,
        }
        lines = [f"{name}: {value}" for name, value in headers.items()]
        kind = "Content-Type: application/json"
        await request.answer(
            json.dumps(message).encode(), "200 OK", kind, "request-id: req_9", *lines
        )

    return script


@contextlib.asynccontextmanager
async def metered(start: Starter, script: Script) -> AsyncIterator[tuple[Process, Upstream, str]]:
    """As `relayed`, once the gateway knows what tokens cost."""
    async with relayed(start, script) as (process, up, key):
        await priced(process)
        yield process, up, key


async def priced(process: Process) -> None:
    """Wait until the gateway knows what tokens cost."""
    while True:
        ready = await ask(process.port, "GET /health/readiness")
        if ready.json()["prices"] == "loaded":
            return
        await asyncio.sleep(0.01)


async def acall(process: Process, key: str, path: str = "/v1/messages", **fields: Any) -> Response:
    message = {**MESSAGE, "model": OPUS, "max_tokens": 32_000, **fields}
    body = json.dumps(message).encode()
    return await ask(process.port, f"POST {path}", JSON_KIND, body=body, key=key)


@gen_test
async def test_a_budget_stops_the_key_that_overspends(start: Starter) -> None:
    # 1,000 x $4 + 500 x $20 = $0.014 a call
    async with metered(start, answer_with(usage_of(1000, 500))) as (process, _up, _):
        made = process.manage("/key/generate", {"max_budget": 0.05, "budget_duration": "1mo"})
        key, row = made.json()["key"], made.json()
        assert row["max_budget"] == 0.05 and row["budget_reset_at"].endswith("-01T00:00:00Z")
        first = await acall(process, key)
        assert first.status == 200
        assert first.field("x-litellm-response-cost") == ["0.014"]
        assert first.field("x-litellm-key-spend") == ["0.014"]
        assert first.field("x-litellm-key-max-budget") == ["0.05"]
        assert first.field("x-litellm-key-remaining-budget") == ["0.036"]
        answers = [await acall(process, key) for _ in range(5)]
        # one at a time as long as there is any room: only the last answer passes the budget
        assert [a.status for a in answers] == [200, 200, 200, 429, 429]
        refused = answers[-1]
        assert refused.error["type"] == "billing_error"
        assert refused.field("x-should-retry") == ["false"]
        assert int(refused.field("retry-after")[0]) > 0
        for words in ("$0.05 reached", "1mo", "resets", "$0.056"):
            assert words in refused.error["message"]
        counted = await acall(process, key, "/v1/messages/count_tokens")
        assert counted.status == 200
        assert (await ask(process.port, "GET /v1/models", key=key)).status == 200
        raised = process.manage("/key/update", {"key": key, "max_budget": 1})
        assert raised.status_code == 200
        assert (await acall(process, key)).status == 200
        info = process.manage("/key/info", key=key).json()["info"]
        assert info["spend"] == pytest.approx(0.07)
        today = next(iter(info["usage"].values()))[OPUS]
        counts = ("requests", "errors", "input_tokens", "output_tokens")
        assert [today[name] for name in counts] == [5, 0, 5000, 2500]
        reset = process.manage(f"/key/{key}/reset_spend", {"reset_to": 0}).json()
        assert reset["spend"] == 0


def test_a_budget_is_not_forgotten_with_its_prices(start: Starter, tmp_path: Path) -> None:
    process = start()
    key = process.new_key(max_budget=5)
    process.stop()
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "tornado").symlink_to(Path(tornado.__file__).parent)
    variables = {**DEFAULT_VARIABLES, "PYTHONPATH": str(packages)}
    unpriced = start("mock", program=[sys.executable, "-S", str(GATEWAY)], variables=variables)
    with pytest.raises(anthropic.InternalServerError, match="genai-prices"):
        sdk(unpriced, key).messages.create(**MESSAGE)
    assert sdk(unpriced, key).models.list().data


@gen_test
async def test_a_budget_of_zero_means_no_calls(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1, 1))) as (process, up, _):
        key = process.new_key(max_budget=0)
        assert (await acall(process, key)).error["type"] == "billing_error"
        assert (await ask(process.port, "POST /v1/files", body=b"{}", key=key)).status == 429
        assert not up.arrived


@gen_test
async def test_a_model_has_a_budget_of_its_own(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1000, 500))) as (process, _, _):
        budgets = {"claude-opus-*": {"budget_limit": 0.04, "time_period": "1d"}}
        key = process.new_key(model_max_budget=budgets)
        statuses = [(await acall(process, key)).status for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        refused = await acall(process, key)
        assert "claude-opus-*" in refused.error["message"]
        assert (await acall(process, key, model="claude-haiku-4-5")).status == 200
        row = process.manage(f"/key/info?key={key}").json()["info"]
        assert row["model_max_budget_usage"]["claude-opus-*"]["spend"] == pytest.approx(0.042)
        assert row["model_max_budget"] == budgets
        # Once it is gone, no other way leads to the model, nor a body that nobody here can read.
        advisor = {"type": "advisor_20260301", "model": OPUS, "max_uses": 1}
        for detour in ({"fallbacks": [{"model": OPUS}]}, {"tools": [advisor]}):
            answer = await acall(process, key, model="claude-haiku-4-5", **detour)
            assert answer.status == 429 and answer.error["type"] == "billing_error"
        kinds = ("Content-Encoding: gzip", "Content-Type: application/json")
        packed = gzip.compress(json.dumps({**MESSAGE, "model": OPUS}).encode())
        hidden = await ask(process.port, "POST /v1/messages", *kinds, body=packed, key=key)
        assert hidden.status == 429
        assert (await acall(process, key, model="claude-haiku-4-5")).status == 200


@gen_test
async def test_a_soft_budget_warns_once(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1000, 500))) as (process, _, _):
        key = process.new_key(soft_budget=0.02, key_alias="soft")
        for _ in range(4):
            assert (await acall(process, key)).status == 200
        assert process.log.count("key soft has spent $0.028, its soft budget is $0.02") == 1
        assert process.log.count("soft budget") == 1


@gen_test
async def test_who_pays_himself_is_booked_nothing(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1000, 500))) as (process, _, _):
        key = process.new_key(max_budget=0.000001)
        own = ("Authorization: Bearer sk-ant-mine", "Content-Type: application/json")
        body = json.dumps({**MESSAGE, "model": OPUS}).encode()
        for _ in range(2):
            answer = await ask(process.port, "POST /v1/messages", *own, body=body, key=key)
            assert answer.status == 200 and not answer.field("x-litellm-response-cost")
        info = process.manage(f"/key/info?key={key}").json()["info"]
        assert info["spend"] == 0 and info["usage"] == {}


@gen_test
async def test_requests_a_minute(start: Starter) -> None:
    upstream_limits = {
        "anthropic-ratelimit-requests-limit": "4000",
        "anthropic-ratelimit-requests-remaining": "3999",
        "anthropic-ratelimit-requests-reset": "2026-11-22T00:00:00Z",
        "anthropic-ratelimit-input-tokens-remaining": "7",
    }
    script = answer_with(usage_of(1, 1), **upstream_limits)
    async with metered(start, script) as (process, up, unlimited):
        key = process.new_key(rpm_limit=2)
        first = await acall(process, key)
        assert first.field("anthropic-ratelimit-requests-limit") == ["2"]
        assert first.field("anthropic-ratelimit-requests-remaining") == ["1"]
        assert first.field("anthropic-ratelimit-input-tokens-remaining") == ["7"]
        datetime.fromisoformat(first.field("anthropic-ratelimit-requests-reset")[0])
        assert (await acall(process, key)).status == 200
        refused = await acall(process, key)
        assert refused.status == 429 and refused.error["type"] == "rate_limit_error"
        assert refused.field("retry-after") in (["29"], ["30"])
        assert refused.field("anthropic-ratelimit-requests-remaining") == ["0"]
        assert len(up.arrived) == 2
        other = await acall(process, unlimited)
        assert other.field("anthropic-ratelimit-requests-limit") == ["4000"]
        process.manage("/key/update", {"key": key, "rpm_limit": 100})
        assert (await acall(process, key)).status == 200
        generous = process.new_key(rpm_limit=100_000)
        theirs = await acall(process, generous)
        assert theirs.field("anthropic-ratelimit-requests-remaining") == ["3999"]


@gen_test
async def test_tokens_a_minute(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(900, 300))) as (process, _, _):
        key = process.new_key(tpm_limit=1000)
        first = await acall(process, key)
        assert first.status == 200
        assert first.field("anthropic-ratelimit-tokens-remaining") == ["0"]
        refused = await acall(process, key)  # 200 below zero: 12 seconds and one token's 0.06
        assert refused.status == 429 and refused.error["type"] == "rate_limit_error"
        assert 11 <= int(refused.field("retry-after")[0]) <= 13


@gen_test
async def test_requests_at_a_time(start: Starter) -> None:
    release = asyncio.Event()

    async def slow(request: Arrived) -> None:
        await request.read_body()
        await release.wait()
        await request.answer(b"{}")

    async with metered(start, slow) as (process, up, _):
        key = process.new_key(max_parallel_requests=2)
        running = [asyncio.create_task(acall(process, key)) for _ in range(2)]
        await until(lambda: len(up.arrived) == 2)
        refused = await acall(process, key)
        assert refused.status == 429 and refused.field("retry-after") == ["1"]
        async with Client(process.port) as leaver:  # a third key's slot comes back when he leaves
            single = process.new_key(max_parallel_requests=1)
            leaver.request("POST /v1/files/x", body=b"{}", key=single)
            await until(lambda: len(up.arrived) == 3)
            assert (await acall(process, single)).status == 429
        await until(lambda: "client_gone" in process.log)
        release.set()
        assert (await acall(process, single)).status == 200
        assert [answer.status for answer in await asyncio.gather(*running)] == [200, 200]
        assert (await acall(process, key)).status == 200


@gen_test
async def test_models_and_routes_are_enforced_on_the_wire(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1, 1))) as (process, _up, _):
        key = process.new_key(models=["claude-haiku-*"], allowed_routes=["/v1/*", "/v1/agents*"])
        for path in ("/v1/messages", "/v1/messages/count_tokens", "/anthropic/v1/agents"):
            refused = await acall(process, key, path)
            assert refused.status == 403 and refused.error["type"] == "permission_error"
            assert OPUS in refused.error["message"]
            assert (await acall(process, key, path, model="claude-haiku-4-5")).status == 200
        packed = gzip.compress(json.dumps({"model": "claude-haiku-4-5"}).encode())
        fields = ("Content-Encoding: gzip", "Content-Type: application/json")
        answer = await ask(process.port, "POST /v1/messages", *fields, body=packed, key=key)
        assert answer.status == 400
        plain = await ask(
            process.port, "POST /v1/messages", "Content-Type: text/plain", body=b"hello", key=key
        )
        assert plain.status == 400
        upload_type = "Content-Type: multipart/form-data; boundary=x"
        upload_answer = await ask(process.port, "POST /v1/files", upload_type, body=b"--x", key=key)
        assert upload_answer.status == 200
        size = f"Content-Length: {33 * MIB}"
        huge = await ask(process.port, "POST /v1/messages/batches", size, key=key)
        assert huge.status == 413
        nothing = await ask(process.port, "POST /v1/agents/a/run", body=b"", key=key)
        assert nothing.status == 403 and "names none" in nothing.error["message"]
        assert (await ask(process.port, "DELETE /v1/agents/a", key=key)).status == 200
        budgeted, free = process.new_key(max_budget=1000), process.new_key()
        for held, fields in itertools.product(
            (budgeted, free), ((size,), ("Transfer-Encoding: chunked",))
        ):
            async with Client(process.port) as client:
                kind = "Content-Type: application/json"
                client.request("POST /v1/messages/batches", kind, *fields, key=held)
                for _ in range(33):
                    part = bytes(MIB)
                    client.send(part if fields == (size,) else b"100000\r\n" + part + b"\r\n")
                    await client.writer.drain()
                client.send(b"" if fields == (size,) else b"0\r\n\r\n")
                expected = 413 if held is budgeted else 200
                assert (await client.response()).status == expected
        routed = process.new_key(allowed_routes=["/anthropic/v1/messages*"])
        assert (await acall(process, routed)).status == 200
        for path in ("/v1/models", "/v1//models", "/anthropic/v1/%6dodels"):
            refused = await ask(process.port, f"GET {path}", key=routed)
            assert refused.status == 403 and refused.error["type"] == "permission_error"
        assert (await ask(process.port, "GET /v1/organizations/me", key=key)).status == 403


@gen_test
async def test_cut_streams_are_booked_as_seen(start: Starter) -> None:
    async def streaming(request: Arrived) -> None:
        await request.read_body()
        body = sse(*STREAM[:3], delta("x" * 400))
        await request.send(SSE_HEAD + b"%x\r\n%b\r\n" % (len(body), body))
        await request.gone()

    async with metered(start, streaming) as (process, _, _):
        key = process.new_key(key_alias="cut")
        async with Client(process.port) as client:
            client.request("POST /v1/messages", body=json.dumps(MESSAGE).encode(), key=key)
            await client.head()
            await client.reader.readuntil(b"x" * 400)
        await until(lambda: "client_gone" in process.log)
        line = process.log.splitlines()[-1]
        assert "estimated" in line and "25+30->134 tokens" in line
        info = process.manage(f"/key/info?key={key}").json()["info"]
        assert info["spend"] == pytest.approx((25 * 4 + 134 * 20 + 10 * 5 + 20 * 8) / 1e6)


@gen_test
async def test_a_batch_costs_its_owner_once(start: Starter) -> None:
    message = {"model": OPUS, "content": [{}], "usage": usage_of(1000, 500)}
    line = json.dumps({"custom_id": "a", "result": {"type": "succeeded", "message": message}})

    async def batches(request: Arrived) -> None:
        await request.read_body()
        if request.target.endswith("/results"):
            packed = gzip.compress((line + "\n").encode() * 10)
            await request.answer(packed, "200 OK", "Content-Encoding: gzip")
            return
        batch = b'{"id": "msgbatch_7", "results_url": null}'
        await request.answer(batch, "200 OK", "Content-Type: application/json")

    def spend(process: Process, key: str) -> float:
        return process.manage(f"/key/info?key={key}").json()["info"]["spend"]

    async with metered(start, batches) as (process, up, other):
        owner = process.new_key(max_budget=5)
        body = json.dumps({"requests": [{"custom_id": "a", "params": {**MESSAGE}}]}).encode()
        kind = "Content-Type: application/json"
        made = await ask(process.port, "POST /v1/messages/batches", kind, body=body, key=owner)
        assert made.status == 200 and spend(process, owner) == 0
        for key in (other, owner, other):
            path = "GET /v1/messages/batches/msgbatch_7/results"
            fetched = await ask(process.port, path, "Accept-Encoding: gzip", key=key)
            assert fetched.status == 200
        # ten lines of half of $0.014
        assert spend(process, owner) == pytest.approx(0.07) and spend(process, other) == 0
        process.stop()
        again = start(up.url)
        await priced(again)
        await ask(again.port, "GET /v1/messages/batches/msgbatch_7/results", key=other)
        assert spend(again, owner) == pytest.approx(0.07) and spend(again, other) == 0


@gen_test
async def test_what_was_used_survives(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1000, 500))) as (process, up, _):
        key = process.new_key(max_budget=5, budget_duration="1mo", key_alias="a")
        for _ in range(3):
            assert (await acall(process, key)).status == 200
        await until(lambda: '"spend": "0.042"' in process.keys.read_text())  # within a second
        process.popen.kill()
        process.popen.wait()
        again = start(up.url)
        await priced(again)
        info = again.manage(f"/key/info?key={key}").json()["info"]
        assert info["spend"] == pytest.approx(0.042) and info["last_active"]
        assert (await acall(again, key)).status == 200
        assert again.stop() == 0  # stopping writes what the last second brought
        third = start(up.url)
        assert third.manage(f"/key/info?key={key}").json()["info"]["spend"] == pytest.approx(0.056)
        third.popen.send_signal(signal.SIGHUP)
        await until(lambda: "keys read again" in third.log)
        assert third.manage(f"/key/info?key={key}").json()["info"]["spend"] == pytest.approx(0.056)


@gen_test
async def test_what_was_spent_is_reported(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1000, 500))) as (process, _, _):
        ann = process.new_key(key_alias="ann", user_id="ann", team_id="web", tags=["t1"])
        bob = process.new_key(key_alias="bob", user_id="bob", team_id="web")
        await acall(process, ann)
        await acall(process, ann, model="claude-haiku-4-5")
        await acall(process, bob)
        today = gateway.day_of(gateway.now())
        expected = {  # $0.014 for Opus, 1,000 x $1 + 500 x $5 for Haiku
            "user": {"ann": 0.0175, "bob": 0.014},
            "team": {"web": 0.0315},
            "model": {OPUS: 0.028, "claude-haiku-4-5": 0.0035},
            "day": {today: 0.0315},
            "api_key": {gateway.hash_key(ann): 0.0175, gateway.hash_key(bob): 0.014},
        }
        for group, sums in expected.items():
            query = f"start_date={today}&end_date={today}&group_by={group}"
            rows = process.manage(f"/global/spend/report?{query}").json()
            assert {row[group]: row["spend"] for row in rows} == pytest.approx(sums)
            assert sum(row["requests"] for row in rows) == 3
        past = process.manage("/global/spend/report?start_date=2026-01-01&end_date=2026-01-02")
        assert past.json() == []
        for query in ("group_by=nonsense", "start_date=yesterday"):
            answer = process.manage(f"/global/spend/report?{query}")
            error_of(answer, 400, "invalid_request_error")
        keys = process.manage("/spend/keys").json()
        assert [row["key_alias"] for row in keys[:2]] == ["ann", "bob"]
        tags, body = "x-litellm-tags: t2, t3", json.dumps(MESSAGE).encode()
        await ask(process.port, "POST /v1/messages", tags, body=body, key=ann)
        logs = process.manage("/spend/logs").json()
        assert len(logs) == 4 and logs[0]["request_tags"] == ["t1", "t2", "t3"]
        row = logs[-1]
        assert row["request_id"] == "req_9" and row["model"] == OPUS and row["user"] == "ann"
        assert (row["prompt_tokens"], row["completion_tokens"]) == (1000, 500)
        assert row["spend"] == pytest.approx(0.014) and row["status"] == "success"
        of_bob = process.manage(f"/spend/logs?api_key={bob}").json()
        assert [row["key_alias"] for row in of_bob] == ["bob"]
        by_id = process.manage(f"/spend/logs?request_id={row['litellm_call_id']}").json()
        assert by_id == [row]
        await until(lambda: "tags=t1,t2,t3" in process.log)
        for path in ("/spend/keys", "/spend/logs", "/global/spend/report"):
            error_of(process.manage(path, key=ann), 403, "permission_error")


@gen_test
async def test_the_sdk_understands_the_refusals(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1, 1))) as (process, up, _):

        async def refused(retries: int, **fields: Any) -> anthropic.APIStatusError:
            client = anthropic.AsyncAnthropic(
                base_url=process.url, api_key=process.new_key(**fields), max_retries=retries
            )
            with pytest.raises(anthropic.APIStatusError) as raised:
                await client.messages.create(**{**MESSAGE, "model": OPUS})
            return raised.value

        over = await refused(5, max_budget=0)  # x-should-retry: false, so it is asked once
        assert isinstance(over, anthropic.RateLimitError) and "Budget of $0.00" in over.message
        await until(lambda: "refused:billing_error" in process.log)
        assert process.log.count("refused:billing_error") == 1
        limited = await refused(0, rpm_limit=0)
        assert isinstance(limited, anthropic.RateLimitError) and "0 requests a minute" in str(
            limited
        )
        denied = await refused(5, models=["claude-haiku-*"])
        assert isinstance(denied, anthropic.PermissionDeniedError) and OPUS in denied.message
        assert not up.arrived


# ─── Limits under concurrency, inside one process ────────────────────────────────────


@contextlib.asynccontextmanager
async def inside(
    url: str, folder: Path, **options: Any
) -> AsyncIterator[tuple[gateway.Relay, int]]:
    """A gateway in this process, so that what it holds can be looked at; and its port."""
    chosen = gateway.Settings(
        port=0,
        upstream=url,
        keys=folder / "inside.json",
        idle_timeout=1,
        api_key=REAL_KEY,
        **options,
    )
    application = gateway.make_app(dataclasses.replace(chosen, master_key=MASTER_KEY))
    relay = application.settings["relay"]
    relay.admission.prices.load()
    server = gateway.GatewayServer(relay, application)
    sockets = gateway.bind(chosen, loopback=True)
    await server.add_sockets(sockets)
    try:
        yield relay, sockets[0].getsockname()[1]
    finally:
        server.stop()
        server.close_all_connections()
        await asyncio.sleep(0)
        await relay.store.flush()
        relay.client.close()
        relay.store.close()
        server.close()


async def put_key(relay: gateway.Relay, **fields: Any) -> tuple[str, gateway.VirtualKey]:
    key = gateway.new_key()
    record = gateway.VirtualKey(gateway.key_name(key), **fields)
    await relay.store.change({gateway.hash_key(key): record})
    return key, record


def assert_nothing_is_held(account: gateway.Account) -> None:
    assert account.running == 0
    assert all(windowed.held == 0 for windowed in account.windows.values())


@gen_test
async def test_100_callers_at_once_keep_within_the_budget(tmp_path: Path) -> None:
    # Each call costs $0.014; held for it is its worst case, 1,000 tokens of output: about $0.0202.
    all_are_in = asyncio.Event()

    async def slow(request: Arrived) -> None:
        await all_are_in.wait()
        await answer_with(usage_of(1000, 500))(request)

    async with upstream(slow) as up, inside(up.url, tmp_path) as (relay, port):
        key, record = await put_key(relay, max_budget=Decimal("0.2"))
        body = json.dumps({**MESSAGE, "max_tokens": 1000, "model": OPUS}).encode()

        async def call() -> Response:
            return await ask(port, "POST /v1/messages", JSON_KIND, body=body, key=key)

        asked = [asyncio.ensure_future(call()) for _ in range(100)]
        await until(lambda: len(up.arrived) + sum(a.done() for a in asked) == 100)
        all_are_in.set()
        answers = await asyncio.gather(*asked)
        served = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status == 429]
        # Nine fit, and while there is room for a part of another one that is let in too.
        assert len(served) == len(up.arrived) == 10 and len(refused) == 90
        # Nothing is spent yet, so whoever is refused may come again.
        for answer in refused:
            assert answer.error["type"] == "rate_limit_error"
            assert answer.field("retry-after") == [str(gateway.BUDGET_WAIT)]
            assert "reached" not in answer.error["message"]
        spent = record.spent(gateway.now())
        assert spent == 10 * Decimal("0.014") <= record.max_budget
        # Near the edge it goes on one at a time, until the last answer passes it.
        statuses = [(await call()).status for _ in range(6)]
        assert statuses == [200] * 5 + [429]
        assert_nothing_is_held(record.account)


@pytest.mark.gen_test(timeout=60)
async def test_no_hold_is_left_behind_by_a_storm(tmp_path: Path) -> None:
    chance = random.Random(7)

    async def capricious(request: Arrived) -> None:
        await request.read_body()
        kind = chance.randrange(7)
        if kind == 0:
            request.writer.transport.abort()
        elif kind == 1:
            await request.answer(b"{}", "529 Overloaded")
        elif kind == 2:
            await request.gone()  # silent until the gateway gives up, or its client does
        elif kind == 3:
            await request.send(SSE_HEAD + b"5\r\ndata:\r\n")
            request.writer.transport.abort()
        elif kind == 4:
            body = sse(*STREAM)
            await request.send(SSE_HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        else:
            await answer_with(usage_of(1000, 500))(request)

    async with upstream(capricious) as up, inside(up.url, tmp_path) as (relay, port):
        budgets = {"claude-*": gateway.ModelBudget(Decimal(2), "1d")}
        limits = {"max_budget": Decimal(3), "model_max_budget": budgets, "rpm_limit": 10_000}
        key, record = await put_key(
            relay, **limits, max_parallel_requests=60, models=["claude-*"], tpm_limit=10**6
        )

        async def visit(number: int) -> None:
            async with Client(port) as client:
                model = "gpt-x" if number % 11 == 0 else OPUS
                body = json.dumps({**MESSAGE, "model": model}).encode()
                with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                    kind = "Content-Type: application/json"
                    if number % 5 == 0:
                        client.request("POST /v1/messages", kind, "Content-Length: 9999", key=key)
                        client.send(body)
                        await asyncio.sleep(chance.uniform(0, 0.05))
                        client.reset()
                        return
                    client.request("POST /v1/messages", kind, body=body, key=key)
                    async with asyncio.timeout(chance.choice([0.01, 0.1, 3])):
                        await client.response()

        for _ in range(6):
            await asyncio.gather(*(visit(number) for number in range(100)))
        await until(lambda: not relay.active)
        assert len(up.arrived) > 100
        assert_nothing_is_held(record.account)
        assert not relay.client.exchanges
        answered = [f for f in relay.recent if f.used.cost]
        assert answered and record.spent(gateway.now()) == sum(f.used.cost for f in answered)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "batch", "settle", "cut", "fail", "update", "restart"]),
        st.integers(0, 9),
        st.integers(0, 3000),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(actions=ACTIONS)
def test_no_sequence_of_admissions_breaks_a_limit(
    actions: list[tuple[str, int, int]], prices: gateway.Prices, tmp_path_factory: Any
) -> None:
    """No sequence of requests, batches, cuts, changes and restarts passes the budget by more than
    one answer, or leaves anything held."""
    path = tmp_path_factory.mktemp("admission") / "keys.json"
    asyncio.run(Admissions(prices, path).run(actions))


class Admissions:
    """Requests and batches of one key, each of which costs no more than its worst case."""

    budget = Decimal("0.10")
    hashed = gateway.hash_key("sk-test")

    def __init__(self, prices: gateway.Prices, path: Path) -> None:
        self.prices = prices
        self.path = path
        self.clock = 0.0
        self.admitted = 0
        self.worst = Decimal(0)  # that any one request may cost
        self.running: list[gateway.Grant] = []
        self.batches: list[str] = []

    def start(self) -> None:
        self.store = gateway.KeyStore(self.path)
        chosen = gateway.Settings(master_key=MASTER_KEY)
        self.admission = gateway.Admission(chosen, self.store, self.prices, lambda: self.clock)

    @property
    def key(self) -> gateway.VirtualKey:
        return self.store.keys[self.hashed]

    async def run(self, actions: list[tuple[str, int, int]]) -> None:
        self.start()
        record = gateway.VirtualKey(
            *("sk-...test", "a0"), max_budget=self.budget, max_parallel_requests=4, rpm_limit=30
        )
        await self.store.change({self.hashed: record})
        for action, which, amount in actions:
            self.clock += 0.5
            if action in ("admit", "batch"):
                self.ask(amount, batch=action == "batch")
            elif action == "update":
                changed = dataclasses.replace(self.key, key_alias=f"a{which}")
                await self.store.change({self.hashed: changed})
            elif action == "restart" and not self.running:
                await self.stop()
                self.start()
            elif self.batches and which % 2:
                self.end_batch(self.batches.pop(which % len(self.batches)), amount)
            elif self.running:
                self.end(self.running.pop(which % len(self.running)), action, amount)
            self.check()
        for grant in self.running:
            self.admission.settle(grant, None, failed=True)
        for name in self.batches:
            self.admission.finish_batch(name)
        assert_nothing_is_held(self.key.account)
        await self.stop()

    async def stop(self) -> None:
        await self.store.flush()
        if self.store._flush_timer:
            self.store._flush_timer.cancel()
        self.store.close()

    def ask(self, amount: int, *, batch: bool) -> None:
        caller = gateway.Caller(hashed=self.hashed, key=self.key)
        params = {"model": OPUS, "max_tokens": amount}
        rows = {"requests": [{"custom_id": "a", "params": params}] * 2}
        body = json.dumps(rows if batch else params).encode()
        try:
            path = BATCHES if batch else MESSAGES_PATH
            grant = self.admission.admit(caller, "POST", path)
        except gateway.APIError as refused:
            assert refused.status == 429
            return
        self.admitted += 1
        try:
            gateway.at_once(self.admission.admit_body(grant, body))
        except gateway.APIError as refused:
            reached = self.key.account.window().spend >= self.budget
            assert ("reached" in refused.message) == reached
            self.admission.settle(grant, None, failed=True)
            return
        held = sum(grant.holds.values(), Decimal(0))
        self.worst = max(self.worst, held)
        if not batch:
            self.running.append(grant)
            return
        name = f"msgbatch_{self.admitted}"
        self.admission.own_batch(grant, name)
        self.admission.settle(grant, None, failed=False)
        self.batches.append(name)
        assert self.key.account.window().spend + held <= self.budget

    def end(self, grant: gateway.Grant, action: str, amount: int) -> None:
        most = grant.order
        used = usage_of(min(amount, most.prompt), min(amount, most.max_tokens))
        measured = gateway.Measured(OPUS, used, empty=False, final=action == "settle")
        if action == "cut":
            measured.seen = min(amount, most.max_tokens)
        self.admission.settle(grant, None if action == "fail" else measured, failed=False)
        spent = self.key.account.window().spend
        self.admission.settle(grant, measured, failed=False)  # a second time changes nothing
        assert self.key.account.window().spend == spent

    def end_batch(self, name: str, amount: int) -> None:
        if amount > 2900:
            self.admission.finish_batch(name, lost=True)
            return
        held = sum(self.key.account.batches[name].held.values(), Decimal(0))
        rate = self.prices.rates(OPUS, WHEN, 0).output
        each = min(amount, int(held / rate))  # of half price, two rows
        for line in (1, 2, 1):  # a line that is read again is booked once
            row = gateway.Measured(OPUS, usage_of(0, each), empty=False, final=True)
            self.admission.book_result(name, line, row)
        self.admission.finish_batch(name)

    def check(self) -> None:
        account = self.key.account
        held = sum((sum(g.holds.values()) for g in self.running), Decimal(0))
        held += sum(sum(b.held.values()) for b in account.batches.values())
        assert account.window().held == held >= 0
        assert 0 <= account.running == len(self.running) <= 4
        assert account.window().spend + held <= self.budget + self.worst
        assert self.admitted <= 60 + self.clock / 2


# ─── Under attack: nobody can stop it ────────────────────────────────────────────────


async def alive(process: Process) -> None:
    """The gateway answers others."""
    assert (await ask(process.port, "GET /health/liveliness")).status == 200


@gen_test
async def test_empty_lines_before_a_request_are_few(start: Starter) -> None:
    async with relayed(start) as (process, _, _):
        for parts in ([b"\r\n\r\n"], [b"\r", b"\n"], [b"\r\n", b"\r\n"]):
            async with Client(process.port) as client:
                for part in parts:
                    client.send(part)
                    await client.writer.drain()
                client.request("GET /health/liveliness")
                assert (await client.response()).status == 200, parts
        for flood in (b"\r\n" * MIB, b"\r\n" * 6 + b"GET / HTTP/1.0\r\n\r\n"):
            async with Client(process.port) as client:
                client.send(flood)
                assert (await client.response()).status == 400
        await alive(process)


@given(cuts=CUTS, rest=st.binary(max_size=9))
def test_a_head_is_found_however_it_is_split(cuts: list[int], rest: bytes) -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX: \r"
    reader, found, behind = gateway.HeadReader(), None, b""
    for part in split_at(head + b"\r\n\r\n" + rest, cuts):
        if found is None:
            found = reader.feed(part)
        else:
            behind += part
    assert found is not None
    assert (found[0], found[1] + behind, len(reader)) == (head, rest, 0)


def test_a_head_of_many_fields_is_refused() -> None:
    most = gateway.MAX_FIELDS
    fields = "\r\n".join(["a: b", *(f"x-{number}: 1" for number in range(most - 2))])
    gateway.parse_fields(fields)
    with pytest.raises(gateway.ProtocolError) as refused:
        gateway.parse_fields(f"{fields}\r\na: b\r\na: c")
    assert refused.value.status == 431


def without_reading(port: int) -> socket.socket:
    """A connection of a client that does not read what it is sent."""
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    return client


@gen_test
async def test_answers_that_nobody_reads_are_not_made(start: Starter) -> None:
    async with relayed(start) as (process, _, _):
        await priced(process)
        before = process.memory()
        asked = b"".join(
            b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path
            for path in (b"/", b"/nothing", b"/v1/models", b"/health/liveliness")
        )
        with without_reading(process.port) as client:
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 40 * MIB:  # they would be answered with some 400 MB
                    data = asked[sent % len(asked) :] + asked * 500
                    async with asyncio.timeout(1):
                        await asyncio.get_running_loop().sock_sendall(client, data)
                    sent += len(data)
            await alive(process)
            assert process.memory() - before < 4 * MIB
            client.settimeout(PATIENCE)
            answers = b""
            while answers.count(b"HTTP/1.1 ") < 4000:  # it goes on when he reads
                answers += client.recv(MIB)
            statuses = re.findall(rb"HTTP/1\.1 (\d+)", answers)[:4000]
            assert statuses == [b"200", b"404", b"401", b"200"] * 1000


@gen_test
async def test_a_strangers_body_is_not_kept(start: Starter) -> None:
    async with relayed(start) as (process, _, key):
        await priced(process)
        before = process.memory()
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for number in range(40):
                client = await stack.enter_async_context(Client(process.port))
                shown = key if number % 2 else ""
                size = f"Content-Length: {MIB}"
                client.request("POST /key/generate", size, key=shown)
                client.send(b"x" * (MIB - 1))
                await client.writer.drain()
                clients.append(client)
            await alive(process)
            assert process.memory() - before < 8 * MIB
            for number, client in enumerate(clients):
                client.send(b"x")
                answer = await client.response()
                assert answer.status == (403 if number % 2 else 401)


@gen_test
async def test_the_next_request_waits_for_a_client_that_does_not_read(start: Starter) -> None:
    async def pour(request: Arrived) -> None:
        size = 100 * MIB if request.target.endswith("large") else 20_000
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(max(1, size // MIB)):
            await request.send(bytes(min(size, MIB)))

    async with relayed(start, pour) as (process, up, key):
        await priced(process)
        before = process.memory()
        head = f"HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n\r\n"
        with without_reading(process.port) as client:
            paths = ["/v1/files/small"] * 3000 + ["/v1/files/large"]
            asked = "".join(f"GET {path} {head}" for path in paths).encode()
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(client, asked))
            last = -1
            while last != (last := len(up.arrived)):
                await asyncio.sleep(0.3)
            assert 0 < last < 3000 and process.memory() - before < 8 * MIB
            sending.cancel()


@pytest.mark.parametrize("direction", ["up", "down"])
@gen_test
async def test_bodies_in_tiny_chunks_arrive_whole(start: Starter, direction: str) -> None:
    body = os.urandom(30_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"

    async def answer(request: Arrived) -> None:
        got = await request.read_body()
        if direction == "up":
            await request.answer(got)
        else:
            await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await request.send(chunks)

    async with relayed(start, answer) as (process, _, key), Client(process.port) as client:
        for kind in ("application/json", "application/octet-stream"):
            sent = chunks if direction == "up" else b"0\r\n\r\n"
            fields = (f"Content-Type: {kind}", "Transfer-Encoding: chunked")
            client.request("POST /v1/files", *fields, key=key)
            client.send(sent)
            client.request("GET /health/liveliness")  # behind it, in the same bytes
            got = await client.response()
            assert got.body == body and got.clean
            assert (await client.response()).status == 200


COSTLY = {
    "rows that are none": b'{"requests": [], "x": [%b], "y": [%b1]}'
    % (b'"custom_id",' * 100_000 + b"1", b"{}," * 500_000),
    "tools": b'{"model": "m", "tools": [' + b'{"name":1},' * 50_000 + b"{}]}",
    "fallbacks": b'{"model": "m", "fallbacks": [' + b'"m",' * 50_000 + b'"m"]}',
    "behind escaped quotes": b'{"a": "\\\\\\"", "x": [' + b"[]," * 500_000 + b"1]}",
    "lists": b'{"model": "m", "x": [' + b"[]," * 500_000 + b"1]}",
    "objects": b'{"model": "m", "x": [' + b"{}," * 500_000 + b"1]}",
    "numbers": b'{"model": "m", "x": [' + b"1," * 3_000_000 + b"1]}",
    "members": b'{"model": "m", %b"a":1}' % b"".join(b'"%d":1,' % n for n in range(400_000)),
    "spaced members": b'{"model": "m", %b"a":1}'
    % b"".join(b'"%d" :1,' % n for n in range(400_000)),
}


@pytest.mark.parametrize("name", COSTLY)
def test_bodies_that_no_client_sends_are_refused(name: str) -> None:
    body = COSTLY[name]
    for path in (MESSAGES_PATH, BATCHES):
        route = gateway.read_route("POST", path)
        for read in (gateway.read_strictly, gateway.read_leniently):
            with pytest.raises(gateway.APIError) as refused:
                document = gateway.at_once(read(body, route))
                if route.makes_batch:  # in which they have no meaning
                    document = {"requests": [{"params": document}]}
                gateway.at_once(gateway.check_models(restricted("m"), route, document))
                gateway.at_once(gateway.read_order(document, body, batched=route.makes_batch))
            assert refused.value.status == 400


@given(
    parts=st.lists(
        st.text(alphabet='a"\\[{:,é', max_size=6) | st.lists(st.integers(0, 9), max_size=3),
        max_size=8,
    )
)
def test_what_stands_outside_of_strings(parts: list[Any]) -> None:
    body = json.dumps({"x": parts, "y": [[]]}, ensure_ascii=False).encode()
    outside = b"".join(gateway.outside_strings(body))
    bare = json.dumps({"": [p if isinstance(p, list) else "" for p in parts], " ": [[]]})
    assert outside == bare.replace('""', "").replace('" "', "").encode()


def test_bodies_that_clients_send_are_read() -> None:
    rows = [{"custom_id": f"r{n}", "params": MESSAGE} for n in range(100_000)]
    text = '{"a": [1, 2], "b": {}}, \\ "model": "x"\n' * 80_000  # JSON as a prompt's text
    message = {**MESSAGE, "messages": [{"role": "user", "content": text}]}
    for path, document in ((BATCHES, {"requests": rows}), (MESSAGES_PATH, message)):
        body, route = json.dumps(document).encode(), gateway.read_route("POST", path)
        for read in (gateway.read_strictly, gateway.read_leniently):
            order = gateway.at_once(
                gateway.read_order(
                    gateway.at_once(read(body, route)), body, batched=route.makes_batch
                )
            )
            assert order.model == MESSAGE["model"]
            (part,) = order.parts.values()
            assert part[1] == 64 * (100_000 if route.makes_batch else 1)


@given(
    document=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner),
    ),
    spaces=st.sampled_from([None, 1, 9]),
    plain=st.booleans(),
    end=st.sampled_from([b"", b"", b" \n", b" x", b"]", b"1", b'"', b"\xff"]),
    cut=st.just(0) | st.integers(0, 200),
)
def test_a_body_is_read_in_slices_as_json_reads_it(
    document: Any, spaces: int | None, plain: bool, end: bytes, cut: int
) -> None:
    text = json.dumps(document, indent=spaces, ensure_ascii=plain)
    body = text.encode("utf-8", "replace") + end
    body = body[: max(0, len(body) - cut)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "ODD_PLACES", frozenset())
        patch.setattr(gateway, "PLACES", frozenset())
        try:
            known = json.loads(body.decode())
        except ValueError:
            with pytest.raises(ValueError):
                gateway.at_once(gateway.JSONReader(body, None, 120).read())
        else:
            assert gateway.at_once(gateway.JSONReader(body, None, 120).read()) == known


@given(st.text(alphabet='a"\\é\n[', min_size=1, max_size=40), st.integers(12, 20))
def test_a_string_longer_than_a_slice_is_passed_over(text: str, size: int) -> None:
    text = text * 12
    body = json.dumps({"x": [text], "model": "m"}, ensure_ascii=False).encode()
    read = gateway.at_once(gateway.JSONReader(body, None, size).read())
    assert read["model"] == "m" and read["x"] in ([text], [gateway.LONG_TEXT])


@given(st.recursive(st.just(1), st.lists), st.integers(1, 9))
def test_how_deep_a_body_is(document: Any, limit: int) -> None:
    def depth(value: Any) -> int:
        return 0 if value == 1 else 1 + max(map(depth, value), default=0)

    body = json.dumps({"[{": document}).encode()
    assert gateway.at_once(gateway.is_deeper(body, limit)) == (depth(document) + 1 > limit)


def test_both_readers_read_the_same_of_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [json.dumps(body).encode() for body, _ in ORDERS]
    bodies += [b"[1]", b"nonsense", b'{"model": 1, "fallbacks": {"a": 1}, "tools": 5}']
    read: list[list[Any]] = []
    assert gateway.decoder_of(gateway.BodyMembers) is not None
    for installed in (True, False):
        if not installed:
            monkeypatch.setattr(gateway, "decoder_of", lambda members: None)
        route, orders = gateway.read_route("POST", MESSAGES_PATH), []
        for body in bodies:
            document = gateway.at_once(gateway.read_leniently(body, route))
            orders.append(gateway.at_once(gateway.read_order(document, body, batched=False)))
        read.append(orders)
    assert read[0] == read[1]
    for name in MESSAGES:
        whole = json.loads(message_body(name))
        result = json.dumps({"result": {"message": whole}}).encode()
        messages = [
            gateway.read_members(message_body(name), gateway.AnswerMembers),
            gateway.read_members(result, gateway.ResultRowMembers)["result"]["message"],
            whole,
        ]
        measured = [gateway.measured_message(message, 0) for message in messages]
        assert measured[0] == measured[1] == measured[2]


def test_invented_models_are_looked_up_and_named_a_few_times(
    prices: gateway.Prices, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"params": {**MESSAGE, "model": f"invented-{n}"}} for n in range(1000)]
    body = json.dumps({"requests": rows}).encode()
    document = json.loads(body)
    order = gateway.at_once(gateway.read_order(document, body, batched=True))
    assert len(order.parts) == gateway.MAX_MODELS + 1
    total = sum(tally.spend for _, tally in prices.worst(order, WHEN))
    dearest = prices.dearest(WHEN)
    assert total >= 64_000 * dearest.output / 2
    for number in range(200):
        prices.rates(f"unheard-of-{number}", WHEN, 0)
    assert caplog.text.count("no price is known") <= gateway.MAX_UNKNOWN


@gen_test
async def test_what_is_held_at_once_is_capped(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def slow(request: Arrived) -> None:
        await request.read_body()
        await release.wait()
        await request.answer(b"{}")

    part = MIB // 2  # the cap is 8 MB, of which each key has 2
    async with (
        upstream(slow) as up,
        inside(up.url, tmp_path, max_held_bytes=8 * MIB) as (relay, port),
        contextlib.AsyncExitStack() as stack,
    ):
        held = relay.admission.held
        keys = [(await put_key(relay))[0] for _ in range(5)]

        async def begin(key: str, *fields: str) -> Client:
            client = await stack.enter_async_context(Client(port))
            client.request("POST /v1/messages", JSON_KIND, *fields, key=key)
            return client

        declared = f"Content-Length: {part}"
        waiting = [await begin(key, declared) for key in keys[:4] for _ in range(4)]
        await until(lambda: held.total == 8 * MIB)
        for key, status in ((keys[0], 503), (keys[4], 503)):
            answer = await (await begin(key, declared)).response()
            assert answer.status == status and answer.field("retry-after") == ["1"]
            assert answer.error["type"] == "overloaded_error"
        await (await stack.enter_async_context(Client(port))).__aexit__()
        waiting.pop().writer.close()
        await until(lambda: held.total == 8 * MIB - part)
        answer = await (await begin(keys[0], declared)).response()
        assert answer.status == 429 and answer.error["type"] == "rate_limit_error"
        assert answer.field("retry-after") == ["1"]
        large = await (await begin(keys[4], f"Content-Length: {3 * MIB}")).response()
        assert large.status == 413 and "--max-held-bytes" in large.error["message"]
        chunked = await begin(keys[4], "Transfer-Encoding: chunked")
        for _ in range(3):
            chunked.send(b"%x\r\n%b\r\n" % (part // 2, b"x" * (part // 2)))
        assert (await chunked.response()).status == 503
        # What is on its way upstream is held no more, though the answer is still to come.
        for client in waiting:
            client.send(b"x" * part)
        await until(lambda: len(up.arrived) == 15 and held.total == 0)
        assert not held._shares
        release.set()
        for client in waiting:
            assert (await client.response()).status == 200


@gen_test
async def test_who_sends_many_large_bodies_keeps_no_other_waiting(tmp_path: Path) -> None:
    async def answer(request: Arrived) -> None:
        await request.read_body()
        await request.answer(b"{}")

    blocks = [{"type": "text", "text": "x"}] * 12_000  # far from being read at once
    message = {**MESSAGE, "messages": [{"role": "user", "content": blocks}]}
    body = json.dumps(message).encode()
    async with (
        upstream(answer) as up,
        inside(up.url, tmp_path) as (relay, port),
        contextlib.AsyncExitStack() as stack,
    ):
        greedy, other = [(await put_key(relay, models=["*"]))[0] for _ in range(2)]

        async def send(key: str, name: str) -> None:
            client = await stack.enter_async_context(Client(port))
            client.request("POST /v1/messages", JSON_KIND, f"x-who: {name}", body=body, key=key)

        for _ in range(20):
            await send(greedy, "greedy")
        await until(lambda: sum(bool(c._judging) for c in relay.active) == 20)
        await send(other, "other")
        await until(lambda: len(up.arrived) == 21)
        order = [request.field("x-who") for request in up.arrived]
        assert ["other"] in order[:3]


@gen_test
async def test_an_answer_that_is_kept_for_its_usage_counts_as_held(tmp_path: Path) -> None:
    release = asyncio.Event()
    answer = message_body("small").replace(b"hello", b"x" * (3 * MIB // 2))

    async def halfway(request: Arrived) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        await request.read_body()
        await request.send(head % len(answer) + answer[:-1000])
        await release.wait()
        await request.send(answer[-1000:])

    async with (
        upstream(halfway) as up,
        inside(up.url, tmp_path, max_held_bytes=8 * MIB) as (relay, port),
        Client(port) as first,
        Client(port) as second,
    ):
        held, (key, _) = relay.admission.held, await put_key(relay)
        first.request("POST /v1/messages", JSON_KIND, body=b"{}", key=key)
        kept = len(answer) - 1000 - gateway.UNASKED_LINE
        await until(lambda: held.total == kept)
        # A key has 2 MB, in which another has no place: its usage is estimated, the answer is whole.
        second.request("POST /v1/messages", JSON_KIND, body=b"{}", key=key)
        await second.head()
        assert len(await second.reader.readexactly(len(answer) - 1000)) > 0
        assert held.total == kept
        release.set()
        assert await second.reader.readexactly(1000) == answer[-1000:]
        assert (await first.response()).body == answer
        await until(lambda: len(relay.recent) == 2)
        assert held.total == 0 and not held._shares
        assert sorted(row.used.estimated for row in relay.recent) == [False, True]
        for client in (first, second):  # and one that is cut
            release.clear()
            client.request("POST /v1/messages", JSON_KIND, body=b"{}", key=key)
            await until(lambda: held.total == kept)
            client.writer.transport.abort()
            await until(lambda: held.total == 0)


def test_the_default_cap_is_a_quarter_of_the_memory_there_is(tmp_path: Path) -> None:
    store = gateway.KeyStore(tmp_path / "keys.json")
    prices = gateway.Prices()
    admission = gateway.Admission(gateway.Settings(), store, prices)
    assert admission.held.limit == gateway.memory_size() // 4
    assert admission.held.share == admission.held.limit // 4
    store.close()


@gen_test
async def test_of_many_tags_a_few_are_remembered(start: Starter) -> None:
    async with relayed(start) as (process, _, key):
        tags = "x-litellm-tags: " + ",".join(f"t{n}-{'x' * 300}" for n in range(150))
        await ask(process.port, "GET /v1/models", tags, key=key)
        (row,) = process.manage("/spend/logs").json()
        assert len(row["request_tags"]) == gateway.MAX_TAGS
        assert max(map(len, row["request_tags"])) <= 200


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
@gen_test
async def test_an_answer_that_unfolds_lets_others_go_on(start: Starter, kind: str) -> None:
    packed = gzip.compress(bytes(256 * MIB), 1)  # a thousand times its size

    async def unfold(request: Arrived) -> None:
        await request.read_body()
        fields = (f"Content-Type: {kind}", "Content-Encoding: gzip")
        await request.answer(packed, "200 OK", *fields)

    async with metered(start, unfold) as (process, _, key):
        before = process.memory()
        body = json.dumps(MESSAGE).encode()
        unfolding = asyncio.create_task(
            ask(process.port, "POST /v1/messages", JSON_KIND, body=body, key=key)
        )
        probes = 0
        while not unfolding.done():
            await alive(process)
            probes += 1
        answer = await unfolding
        assert answer.body == packed and answer.clean and probes > 20
        assert process.memory() - before < 24 * MIB


# ─── Under attack: a budget is a budget ──────────────────────────────────────────────


def ordered(params: Any, batched: bool = False) -> gateway.Order:
    body = json.dumps(params).encode()
    order = gateway.at_once(gateway.read_order(params, body, batched=batched))
    order.prompt = 1000
    return order


TOOL = {"type": "advisor_20260301", "model": "claude-haiku-4-5"}
SEARCH = {"type": "web_search_20260318"}
# A message of 30 bytes a token costs nothing beside these: Opus 5.5 $4 and $20, Haiku 4.5 $1 and $5,
# Opus 4, the dearest known, $15 and $75 for a million; a search $0.01.
ORDERS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 1000}, "0.02"),
    ({}, "2.56"),  # upstream's own limit, of 128,000
    ({"max_tokens": "1000"}, "2.56"),
    ({"max_tokens": 1000, "inference_geo": "us"}, "0.022"),
    ({"max_tokens": 1000, "model": "never-heard-of"}, "0.075"),
    ({"max_tokens": 1000, "fallbacks": "default"}, "0.095"),
    (
        {
            "max_tokens": 1000,
            "fallbacks": [{"model": "claude-haiku-4-5"}, {"model": OPUS, "max_tokens": 500}],
        },
        "0.035",
    ),
    ({"max_tokens": 1000, "tools": [{**TOOL, "max_uses": 3, "max_tokens": 100}]}, "0.0215"),
    ({"max_tokens": 1000, "tools": [{**TOOL}, {"name": "mine"}]}, "0.07"),
    ({"max_tokens": 1000, "tools": [{**SEARCH, "max_uses": 7}]}, "0.09"),
    ({"max_tokens": 1000, "tools": [SEARCH]}, "0.12"),
    ({"max_tokens": 1000, "context_management": {"edits": [{"type": "compact_1"}]}}, "0.04"),
    ({"max_tokens": 1000, "requests": []}, "0.02"),  # of no meaning in a message
]


@pytest.mark.parametrize(("params", "outputs"), ORDERS)
def test_the_worst_case_is_all_that_may_be_written(
    prices: gateway.Prices, params: dict[str, Any], outputs: str
) -> None:
    order = ordered({"model": OPUS, **params})
    for counts in order.parts.values():
        counts[0] = 0  # the prompt's share is looked at below
    total = sum(tally.spend for _, tally in prices.worst(order, WHEN))
    assert total == Decimal(outputs)


def test_the_worst_case_has_the_prompt_at_its_dearest(prices: gateway.Prices) -> None:
    def prompt(**params: Any) -> Decimal:
        message = {"model": OPUS, "max_tokens": 0, "system": "x" * 30_000, **params}
        order = ordered(message)
        assert 10_000 <= next(iter(order.parts.values()))[0] < 10_050
        return sum(tally.spend for _, tally in prices.worst(order, WHEN)) / 10_000

    def cached(**control: str) -> list[Any]:
        return [{"text": "x", "cache_control": {"type": "ephemeral", **control}}]

    million = Decimal(1_000_000)
    assert round(prompt() * million, 1) == 4
    assert round(prompt(messages=cached()) * million, 1) == 5
    assert round(prompt(messages=cached(ttl="1h")) * million, 1) == 8
    assert round(prompt(speed="fast") * million, 1) >= 4


def test_the_worst_case_of_a_batch_is_half_of_all_its_rows(prices: gateway.Prices) -> None:
    rows = [{"params": {"model": OPUS, "max_tokens": 1000}}] * 10
    rows.append({"params": {"model": "claude-haiku-4-5", "max_tokens": 2000, "tools": [SEARCH]}})
    order = ordered({"requests": rows}, batched=True)
    for counts in order.parts.values():
        counts[0] = 0
    worst = sum(tally.spend for _, tally in prices.worst(order, WHEN))
    assert worst == (10 * Decimal("0.02") + Decimal("0.01")) / 2 + Decimal("0.10")


FIELDS_OF_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "key_alias": st.text(max_size=9),
    "user_id": st.text(max_size=9),
    "team_id": st.none() | st.text(max_size=9),
    "models": st.lists(st.text(max_size=9), max_size=2),
    "allowed_routes": st.lists(st.sampled_from(["/v1/*", "/v1/sessions"]), max_size=2),
    "unmetered_routes": st.booleans(),
    "rpm_limit": st.none() | st.integers(0, 10**12),
    "tpm_limit": st.none() | st.integers(0, 10**12),
    "max_parallel_requests": st.none() | st.integers(0, 10**12),
    "max_budget": st.none() | st.integers(0, 10**12) | st.floats(0, 10**9),
    "soft_budget": st.none() | st.integers(0, 9) | st.floats(0, 1),
    "budget_duration": st.none() | st.from_regex(r"[1-9][0-9]{0,8}(mo|s|m|h|d|w)", fullmatch=True),
    "model_max_budget": st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.fixed_dictionaries(
            {"budget_limit": st.integers(0, 9) | st.floats(0, 10**6)},
            optional={"time_period": st.sampled_from(["1d", "24000mo", "999999999w"])},
        ),
        max_size=2,
    ),
    "metadata": st.dictionaries(st.text(max_size=5), st.floats() | st.text(max_size=5), max_size=3),
    "tags": st.lists(st.text(max_size=9), max_size=2),
    "blocked": st.booleans(),
    "duration": st.none() | st.from_regex(r"[0-9]{1,9}(mo|s|m|h|d|w)", fullmatch=True),
}


@settings(deadline=None, max_examples=300)
@given(fields=st.fixed_dictionaries({}, optional=FIELDS_OF_KEYS))
def test_what_is_taken_of_a_key_is_read_again(
    fields: dict[str, Any], prices: gateway.Prices
) -> None:
    """Every field and value that /key/generate takes goes through the file unchanged."""
    text = json.dumps(fields)
    try:
        body = json.loads(text, parse_float=gateway.read_number)
        changes = gateway.key_changes(body, WHEN, prices)
    except (gateway.APIError, ValueError):
        return
    record = gateway.VirtualKey("sk-...test", created_at=WHEN, updated_at=WHEN, **changes)
    line = gateway.store_line("a" * 64, record).decode()
    kept = gateway.parse_store(f'{{"version": 1, "keys": {{{line}}}}}'.encode(), "x")
    (again,) = kept.values()
    account, record.account.usage = again.account, again.account.usage
    account.windows, record.account.windows = {}, {}
    assert dataclasses.replace(again) == record
    # What can be shown of it does not depend on when it is looked at.
    gateway.key_row("a" * 64, again)


def test_a_limit_of_zero_is_one_after_a_restart_and_a_reload(start: Starter) -> None:
    process = start()
    limits = {"rpm_limit": 0, "tpm_limit": 0, "max_parallel_requests": 0}
    limits |= {"max_budget": 0, "soft_budget": 0}
    keys = [process.new_key(**{name: 0}) for name in limits]
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: "keys read again" in process.log)
    for running in (process, None):
        if running is None:
            process.stop()
            running = start()
        for key, name in zip(keys, limits, strict=True):
            row = running.manage(f"/key/info?key={key}").json()["info"]
            assert row[name] == 0
            expected = 200 if name == "soft_budget" else 429
            assert relay_message(running, key) == expected, name


def relay_message(process: Process, key: str, **fields: Any) -> int:
    answer = httpx2.post(
        f"{process.url}/v1/messages",
        headers={"x-api-key": key, "content-type": "application/json"},
        content=json.dumps({**MESSAGE, **fields}),
    )
    return answer.status_code


class Batches:
    """An upstream that makes batches of Opus, whose rows use 1,000 and 500 tokens ($0.007 each)."""

    def __init__(self) -> None:
        self.state = "in_progress"
        self.made = 0
        self.rows = 10
        self.gone = self.packs = False
        self.stuck = ""
        self.answering = asyncio.Event()
        self.answering.set()
        self.seen: list[Arrived] = []

    async def __call__(self, request: Arrived) -> None:
        self.seen.append(request)
        await request.read_body()
        if request.target.endswith("/results"):
            message = {"model": OPUS, "content": [{}], "usage": usage_of(1000, 500)}
            row = {"custom_id": "a", "result": {"type": "succeeded", "message": message}}
            rows = (json.dumps(row) + "\n").encode() * self.rows
            if self.stuck and self.stuck in request.target:
                await request.gone()
            if self.packs:
                await request.answer(gzip.compress(rows), "200 OK", "Content-Encoding: gzip")
                return
            await request.answer(rows, "200 OK" if not self.gone else "404 Not Found")
        elif request.start_line.startswith("POST"):
            await self.answering.wait()
            self.made += 1
            await self.describe(request, f"msgbatch_{self.made}")
        elif self.gone:
            await request.answer(b"{}", "404 Not Found")
        else:
            await self.describe(request, request.target.rpartition("/")[2])

    async def describe(self, request: Arrived, name: str) -> None:
        batch = {"id": name, "processing_status": self.state, "results_url": None}
        await request.answer(json.dumps(batch).encode(), "200 OK", JSON_KIND)


def batch_of(rows: int, max_tokens: int = 500) -> bytes:
    params = {**MESSAGE, "model": OPUS, "max_tokens": max_tokens}
    return json.dumps(
        {"requests": [{"custom_id": str(n), "params": params} for n in range(rows)]}
    ).encode()


@contextlib.asynccontextmanager
async def batching(
    folder: Path, monkeypatch: pytest.MonkeyPatch, look: float = 0.05
) -> AsyncIterator[tuple[Batches, gateway.Relay, Callable[..., Awaitable[Response]]]]:
    """A gateway that looks after its batches often, before an upstream that makes them."""
    monkeypatch.setattr(gateway, "BATCH_LOOK", look)
    monkeypatch.setattr(gateway, "BATCH_LOOK_LATEST", look)
    batches = Batches()
    async with upstream(batches) as up, inside(up.url, folder) as (relay, port):
        running = asyncio.create_task(relay.batches.run())

        async def call(start: str, *fields: str, **kwargs: Any) -> Response:
            return await ask(port, start, JSON_KIND, *fields, **kwargs)

        yield batches, relay, call
        running.cancel()


@gen_test
async def test_a_batch_is_let_in_only_where_its_worst_case_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Worst case of a row: 500 tokens at half of $20 a million, $0.005, and the prompt's $0.0001.
    async with batching(tmp_path, monkeypatch, 60) as (batches, relay, call):
        key, record = await put_key(relay, max_budget=Decimal("0.08"))
        window = record.account.window()

        async def make(rows: int, **kwargs: Any) -> Response:
            path = "POST /v1/messages/batches"
            return await call(path, body=batch_of(rows), key=key, **kwargs)

        too_large = await make(20)
        assert too_large.status == 429 and too_large.error["type"] == "billing_error"
        assert too_large.field("x-should-retry") == ["false"]
        assert "reached" not in too_large.error["message"]
        assert (await make(10)).status == 200 and not record.spent(gateway.now())
        assert Decimal("0.05") < window.held < Decimal("0.06")
        # It would fit if the first one were over.
        waits = await make(10)
        assert waits.status == 429 and waits.error["type"] == "rate_limit_error"
        assert waits.field("retry-after") == [str(gateway.BUDGET_WAIT)]
        unread = await call("POST /v1/messages/batches", body=gzip.compress(batch_of(1)), key=key)
        assert unread.status == 400 and batches.made == 1
        # What is held outlives the process.
        await relay.store.flush()
        again = gateway.parse_store(relay.store.path.read_bytes(), "again")
        (account,) = [kept.account for kept in again.values()]
        assert account.window().held == window.held
        assert list(account.batches) == ["msgbatch_1"]


@gen_test
async def test_a_batch_that_nobody_fetches_is_booked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with batching(tmp_path, monkeypatch) as (batches, relay, call):
        key, record = await put_key(relay, max_budget=Decimal(1))
        plain, unlimited = await put_key(relay)
        for who in (key, plain):
            path = "POST /v1/messages/batches"
            assert (await call(path, body=batch_of(10), key=who)).status == 200
        await until(lambda: len(batches.seen) > 6)  # it is looked at again and again
        assert record.spent(gateway.now()) == 0 and record.account.window().held
        for asked in batches.seen[2:]:
            assert credentials(asked) == [("x-api-key", REAL_KEY)]
            assert asked.field("anthropic-version") == ["2023-06-01"]
        batches.state = "ended"  # a canceled or expired one has ended too
        accounts = (record.account, unlimited.account)
        await until(lambda: all(b.booked for a in accounts for b in a.batches.values()))
        looked = len(batches.seen)
        results = "GET /v1/messages/batches/msgbatch_1/results"
        for fields in ((), ("Range: bytes=0-10",)):
            fetched = await call(results, *fields, key=key)
            assert fetched.status == 200 and not batches.seen[-1].field("range")
        for owner in (record, unlimited):
            assert owner.spent(gateway.now()) == Decimal("0.07")
            assert_nothing_is_held(owner.account)
        assert len(batches.seen) == looked + 2  # nobody looks at it any more


@gen_test
async def test_who_fetches_before_deletes_or_loses_a_batch_pays_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with batching(tmp_path, monkeypatch, 60) as (batches, relay, call):
        key, record = await put_key(relay, max_budget=Decimal(1))
        path = "/v1/messages/batches"

        async def make() -> str:
            made = await call(f"POST {path}", body=batch_of(10), key=key)
            return f"{path}/{made.json()['id']}"

        async def spent(change: str) -> None:
            nonlocal before
            await until(lambda: not record.account.window().held)
            now = record.spent(gateway.now())
            assert now - before == Decimal(change)
            before = now

        before = Decimal(0)
        first = await make()
        batches.state = "ended"
        await call(f"GET {first}/results", "Range: bytes=5-", key=key)
        await spent("0.07")
        await call(f"DELETE {await make()}", key=key)  # read before it goes
        await spent("0.07")
        assert batches.seen[-1].start_line.startswith("DELETE")
        await call(f"GET {await make()}", key=key)  # which shows that it has ended
        await spent("0.07")
        lost = await make()
        held, batches.gone = record.account.window().held, True
        await relay.batches.book(lost.rpartition("/")[2])
        await spent(str(held))
        assert Decimal("0.05") < held < Decimal("0.06")


@gen_test
async def test_who_leaves_while_his_batch_is_made_owns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with batching(tmp_path, monkeypatch) as (batches, relay, call):
        key, record = await put_key(relay, max_budget=Decimal(1))
        batches.answering.clear()
        path = "POST /v1/messages/batches"
        leaving = asyncio.create_task(call(path, body=batch_of(10), key=key))
        await until(lambda: batches.seen)
        leaving.cancel()
        await until(lambda: not [c for c in relay.active if not c._deserted])
        batches.state = "ended"
        batches.answering.set()
        # Its rows are booked one by one, then what was held for it is given back.
        await until(lambda: record.account.batches and not relay.store.unbooked())
        assert record.spent(gateway.now()) == Decimal("0.07")
        await until(lambda: not relay.active)
        assert_nothing_is_held(record.account)
        assert relay.recent[-1].outcome == "client_gone"


@pytest.mark.parametrize("how", ["cut", "no head", "br", "text", "huge", "503", "refused"])
@gen_test
async def test_a_batch_that_may_have_been_made_is_paid(tmp_path: Path, how: str) -> None:
    async def answer(request: Arrived) -> None:
        await request.read_body()
        batch = b'{"id": "msgbatch_1"}'
        if how == "cut":
            await request.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            request.writer.close()
        elif how == "no head":
            request.writer.close()
        elif how == "br":
            await request.answer(batch, "200 OK", JSON_KIND, "Content-Encoding: br")
        elif how == "text":
            await request.answer(batch, "200 OK", "Content-Type: text/plain")
        elif how == "huge":
            await request.answer(batch + b" " * (3 * gateway.REWRITE_LIMIT), "200 OK", JSON_KIND)
        else:
            status = "503 Service Unavailable" if how == "503" else "400 Bad Request"
            await request.answer(b"{}", status, JSON_KIND)

    async with upstream(answer) as up, inside(up.url, tmp_path) as (relay, port):
        key, record = await put_key(relay, max_budget=Decimal(1))
        made = await ask(port, "POST /v1/messages/batches", JSON_KIND, body=batch_of(10), key=key)
        await until(lambda: not relay.active)
        assert_nothing_is_held(record.account)
        spent = record.spent(gateway.now())
        if how in ("503", "refused"):
            assert spent == 0 and made.status == (503 if how == "503" else 400)
        else:
            assert Decimal("0.05") < spent < Decimal("0.06") and relay.recent[-1].used.estimated


@gen_test
async def test_results_that_cannot_be_read_book_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway asks for plain results; what else comes is looked at again."""
    async with batching(tmp_path, monkeypatch) as (batches, relay, call):
        key, record = await put_key(relay, max_budget=Decimal(1))
        path = "POST /v1/messages/batches"
        assert (await call(path, body=batch_of(10), key=key)).status == 200
        (batch,) = record.account.batches.values()
        batches.packs, batches.state = True, "ended"
        await until(lambda: sum("/results" in r.target for r in batches.seen) > 2)
        assert batches.seen[-1].field("accept-encoding") == ["identity"]
        assert not batch.booked and batch.held and not record.spent(gateway.now())
        batches.packs = False
        await until(lambda: batch.booked)
        assert record.spent(gateway.now()) == Decimal("0.07")


@gen_test
async def test_one_batch_keeps_no_other_from_being_booked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with batching(tmp_path, monkeypatch) as (batches, relay, call):
        key, record = await put_key(relay)
        for _ in range(3):
            await call("POST /v1/messages/batches", body=batch_of(1), key=key)
        batches.stuck, batches.state = "msgbatch_1", "ended"
        made = record.account.batches
        await until(lambda: made["msgbatch_2"].booked and made["msgbatch_3"].booked)
        assert not made["msgbatch_1"].booked


@gen_test
async def test_a_body_is_held_until_it_is_on_its_way(tmp_path: Path) -> None:
    """Whatever the method, and however the body comes."""
    reading = asyncio.Event()

    async def slow(request: Arrived) -> None:
        if "warm" in request.target:
            await request.answer(b"{}")
            return
        request.writer.transport.pause_reading()
        await reading.wait()
        request.writer.transport.resume_reading()
        await request.read_body()
        await request.answer(b"{}")

    size = gateway.JSON_BODY_LIMIT + MIB
    async with upstream(slow) as up, inside(up.url, tmp_path) as (relay, port):
        key, _ = await put_key(relay)
        held = relay.admission.held
        await ask(port, "GET /v1/models/warm", key=key)  # a connection that is kept alive
        async with Client(port) as chunked, Client(port) as getting:
            chunked.request("POST /v1/files", JSON_KIND, "Transfer-Encoding: chunked", key=key)
            for _ in range(size // MIB):
                chunked.send(b"%x\r\n%b\r\n" % (MIB, bytes(MIB)))
            chunked.send(b"0\r\n\r\n")
            await until(lambda: len(up.arrived) == 2)
            getting.request("GET /v1/models", JSON_KIND, body=bytes(20 * MIB), key=key)
            await until(lambda: len(up.arrived) == 3)
            assert held.total >= 50 * MIB
            reading.set()
            for client in (chunked, getting):
                assert (await client.response()).status == 200
            exchanges = [h._exchange for h in relay.active]
            assert held.total == 0 and not any(e._body for e in exchanges if e)


@gen_test
async def test_what_is_regenerated_or_read_again_loses_nothing(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def slow(request: Arrived) -> None:
        if "batches" in request.target:
            await request.read_body()
            await request.answer(b'{"id": "msgbatch_9"}', "200 OK", JSON_KIND)
            return
        await release.wait()
        await answer_with(usage_of(1000, 500))(request)

    async with upstream(slow) as up, inside(up.url, tmp_path) as (relay, port):
        key, _record = await put_key(relay, max_budget=Decimal(1), key_alias="a")
        body = json.dumps({**MESSAGE, "model": OPUS}).encode()
        running = asyncio.create_task(ask(port, "POST /v1/messages", JSON_KIND, body=body, key=key))
        await until(lambda: up.arrived)
        name = key
        for _ in range(3):
            body = json.dumps({"key_alias": "a"}).encode()
            made = await ask(port, "POST /key/regenerate", body=body, key=MASTER_KEY)
            name = made.json()["key"]
        release.set()
        assert (await running).status == 200
        present = relay.store.keys[gateway.hash_key(name)]
        assert present.spent(gateway.now()) == Decimal("0.014")
        assert next(iter(present.account.usage.days()))[2].spend == Decimal("0.014")
        made = await ask(port, "POST /v1/messages/batches", JSON_KIND, body=batch_of(1), key=name)
        assert made.status == 200
        await relay.store.reload()
        assert relay.store.batch_owner("msgbatch_9") is present.account
        assert relay.store.keys[gateway.hash_key(name)].account is present.account


@gen_test
async def test_what_cannot_be_counted_is_closed(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1, 1))) as (process, up, key):
        body = json.dumps({**MESSAGE}).encode()

        async def status(start: str, who: str) -> int:
            return (await ask(process.port, start, JSON_KIND, body=body, key=who)).status

        closed = ["/v1/sessions", "/v1/agents", "/v1/dreams", "/v1/new/x", "/v1/vaults"]
        closed += ["/v1/messages%20", "/v1/messages;a", "/v1/messages/new", "/v1/oauth/token"]
        closed += ["/anthropic/V1/messages", "/anthropic/api/oauth/claude_cli/create_api_key"]
        for path in closed:
            assert await status(f"POST {path}", key) == 403, path
        assert not up.arrived
        for path in closed:
            assert await status(f"POST {path}", MASTER_KEY) == 200, path
        for path in ("/v1/messages", "/v1/messages/cache_touch", "/v1/complete", "/v1/files"):
            assert await status(f"POST {path}", key) == 200, path
        # Whoever opens more to a key with a budget must say that he knows.
        routes = {"allowed_routes": ["/v1/*", "/v1/sessions*"]}
        refused = process.manage("/key/generate", {**routes, "max_budget": 5})
        assert "unmetered_routes" in error_of(refused, 400, "invalid_request_error")
        opened = process.new_key(**routes)
        assert await status("POST /v1/sessions", opened) == 200
        for change in ({"max_budget": 5}, {"model_max_budget": {"*": {"budget_limit": 1}}}):
            refused = process.manage("/key/update", {"key": opened, **change})
            error_of(refused, 400, "invalid_request_error")
        known = process.new_key(**routes, max_budget=5, unmetered_routes=True)
        assert await status("POST /v1/sessions", known) == 200
        changed = process.manage("/key/update", {"key": known, "unmetered_routes": False})
        error_of(changed, 400, "invalid_request_error")


@gen_test
async def test_an_odd_method_is_no_way_round_a_budget(start: Starter) -> None:
    async with metered(start, answer_with(usage_of(1000, 500))) as (process, up, _):
        body = json.dumps({**MESSAGE, "model": OPUS}).encode()
        override = "X-HTTP-Method-Override: POST"
        for method in ("post", "Post", "PUT", "PURGE"):
            key = process.new_key(max_budget=0.00001)
            asked = f"{method} /v1/messages/"
            first = await ask(process.port, asked, JSON_KIND, override, body=body, key=key)
            assert first.status == 200 and not up.arrived[-1].field(override.split(":")[0])
            second = await ask(process.port, asked, JSON_KIND, body=body, key=key)
            assert second.error["type"] == "billing_error", method


@gen_test
async def test_old_completions_are_booked_by_what_they_say(start: Starter) -> None:
    async def complete(request: Arrived) -> None:
        await request.read_body()
        said = {"type": "completion", "completion": "世" * 300, "model": OPUS}
        if b'"stream"' in request.body:
            data = sse(said, {**said, "stop_reason": "stop_sequence"})
            await request.send(SSE_HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
        else:
            await request.answer(json.dumps(said).encode(), "200 OK", JSON_KIND)

    async with metered(start, complete) as (process, _, key):
        for extra, taken in (({}, 300), ({"stream": True}, 600)):
            params = {"model": OPUS, "prompt": "x" * 300, "max_tokens_to_sample": 9, **extra}
            body = json.dumps(params).encode()
            await ask(process.port, "POST /v1/complete", JSON_KIND, body=body, key=key)
            await until(lambda taken=taken: f"->{taken} tokens" in process.log)
        (row, _) = process.manage("/spend/logs").json()
        assert row["estimated"] and row["model"] == OPUS and row["prompt_tokens"] > 100


@pytest.mark.parametrize("limits", [{}, {"max_budget": 100}])
@gen_test
async def test_who_leaves_before_the_head_pays_what_was_under_way(
    start: Starter, limits: dict[str, Any]
) -> None:
    async def silent(request: Arrived) -> None:
        await request.read_body()
        await request.gone()

    async with metered(start, silent) as (process, up, _):
        key = process.new_key(**limits)
        thinking = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
        for fields, taken in (({}, 0), (thinking, 2000), ({**thinking, "stream": True}, 0)):
            message = {**MESSAGE, "model": OPUS, "max_tokens": 8000, **fields}
            message["system"] = "x" * 3000
            up.arrived.clear()
            async with Client(process.port) as client:
                body = json.dumps(message).encode()
                client.request("POST /v1/messages", JSON_KIND, body=body, key=key)
                await until(lambda: up.arrived and up.arrived[0].body)
            await until(lambda: not process.manage("/metrics").text.count("flight_requests 1"))
            row = process.manage("/spend/logs").json()[0]
            assert row["outcome"] == "client_gone" and row["estimated"]
            assert row["prompt_tokens"] == gateway.tokens_in(len(body))
            assert (row["completion_tokens"], row["model"]) == (taken, OPUS)
            cost = row["prompt_tokens"] * 4 + taken * 20
            assert row["spend"] == pytest.approx(cost / 1e6)


@pytest.mark.parametrize("coding", ["br", "gzip", "deflate"])
@pytest.mark.parametrize("limits", [{}, {"max_budget": 100}])
@gen_test
async def test_what_cannot_be_read_costs_its_worst_case(
    start: Starter, limits: dict[str, Any], coding: str
) -> None:
    data = b"\x8b\x01\x80nothing that anybody can read\x03" * 50

    async def odd(request: Arrived) -> None:
        await request.read_body()
        await request.answer(data, "200 OK", JSON_KIND, f"Content-Encoding: {coding}")

    async with metered(start, odd) as (process, _, _):
        answer = await acall(process, process.new_key(**limits), max_tokens=1000)
        assert answer.body == data and answer.clean
        await until(lambda: "worst case" in process.log)
        row = process.manage("/spend/logs").json()[0]
        assert row["completion_tokens"] == 1000 and row["estimated"]
        assert row["spend"] == pytest.approx((row["prompt_tokens"] * 4 + 20_000) / 1e6)


# ─── Under attack: no key, no secret, no stranger ────────────────────────────────────


@gen_test
async def test_the_real_key_leaves_in_no_line_of_a_head(start: Starter) -> None:
    async def reveal(request: Arrived) -> None:
        await request.send(f"HTTP/1.1 103 {REAL_KEY}\r\nX-A: {REAL_KEY}\r\n\r\n".encode())
        await request.answer(b"hi", f"200 {REAL_KEY}", f"X-{REAL_KEY}: a")

    async with relayed(start, reveal) as (process, _, key):
        answer = await ask(process.port, "GET /v1/models", key=key)
        (early,) = answer.informational
        assert answer.body == b"hi" and answer.reason == "*" * len(REAL_KEY)
        assert REAL_KEY.encode() not in answer.head + early


def gzip_named(name: bytes, data: bytes) -> bytes:
    """A gzip member with a file's name in its head, which is not compressed (RFC 1952)."""
    packed = gzip.compress(data)
    return packed[:3] + b"\x08" + packed[4:10] + name + b"\0" + packed[10:]


def plain_of(coding: str, data: bytes) -> bytes:
    """As much of a broken-off body as can be read."""
    try:
        inflater = gateway.Inflater(coding)
        return data + b"".join(inflater.slices(data))
    except zlib.error:
        return data


@pytest.mark.parametrize("coding", ["gzip", "deflate", "lie"])
@pytest.mark.parametrize("cut", [1, 10, len(REAL_KEY) - 1])
@gen_test
async def test_no_part_of_the_real_key_leaves_at_the_end_of_a_read(
    start: Starter, coding: str, cut: int
) -> None:
    async def reveal(request: Arrived) -> None:
        packer = zlib.compressobj(wbits=31 if coding == "gzip" else -15)
        secret = REAL_KEY.encode()
        parts = [b"it is " + secret[:cut], secret[cut:] + b"."]
        if coding == "lie":
            parts = [secret[:cut], secret[cut:] + b"."]
        else:
            parts = [packer.compress(p) + packer.flush(zlib.Z_SYNC_FLUSH) for p in parts]
        length = sum(map(len, parts))
        named = "gzip" if coding == "lie" else coding
        await request.send(
            f"HTTP/1.1 200 OK\r\nContent-Encoding: {named}\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        for part in parts:
            await asyncio.sleep(0.05)  # so that they are two reads
            await request.send(part)

    async with relayed(start, reveal) as (process, _, key), Client(process.port) as client:
        client.request("GET /v1/models", key=key)
        got = b""
        with contextlib.suppress(ConnectionError):
            while data := await client.reader.read(65536):
                got += data
                if b"*" * len(REAL_KEY) in got:
                    break
        body = got.partition(b"\r\n\r\n")[2]
        shown = plain_of("gzip" if coding == "lie" else coding, body)
        assert REAL_KEY[: max(cut, 4)].encode() not in shown


@pytest.mark.parametrize(
    "pack",
    [
        lambda data: ("deflate", RAW_DEFLATE(data)),
        lambda data: ("gzip", gzip.compress(b"first") + gzip.compress(data)),
        lambda data: ("gzip", gzip.compress(data[:40]) + gzip.compress(data[40:])),
        lambda data: ("gzip", data),  # a lie
        lambda data: ("identity\r\nContent-Encoding: gzip", gzip.compress(data)),
        lambda data: ("gzip", gzip_named(REAL_KEY.encode(), b"it is its name")),
    ],
)
@gen_test
async def test_the_real_key_leaves_in_no_compressed_body(start: Starter, pack: Any) -> None:
    async def reveal(request: Arrived) -> None:
        coding, body = pack(b"it is " + REAL_KEY.encode() + b"." + os.urandom(5000))
        await request.answer(body, "200 OK", f"Content-Encoding: {coding}")

    async with relayed(start, reveal) as (process, _, key):
        answer = await ask(process.port, "GET /v1/models", key=key)
        if answer.status == 200 and answer.clean:
            assert REAL_KEY.encode() not in plain_of("gzip", answer.body)
            assert b"*" * len(REAL_KEY) in answer.body
        else:
            assert answer.status == 502 or not answer.clean


@gen_test
async def test_a_key_of_the_gateway_goes_nowhere_else(start: Starter) -> None:
    async with relayed(start) as (process, up, key):
        other = process.new_key()
        chosen = process.new_key(key="sk-~!own.key+with=odd/letters")
        quoted = other.replace("s", "%73", 1)
        for secret in (key, other, chosen, MASTER_KEY, quoted):
            for asked in (f"GET /v1/files/{secret}", f"GET /v1/models?a={secret}&b=c"):
                answer = await ask(process.port, asked, key=key)
                assert answer.status == 400, asked
                assert secret.encode() not in answer.body
        for secret in (other, chosen, MASTER_KEY):
            for field in (f"X-Debug: {secret}", f"X-Debug: a,{secret};b", f"User-Agent: {secret}"):
                answer = await ask(process.port, "GET /v1/models", field, key=key)
                assert answer.status == 400 and secret.encode() not in answer.body
        for method in (key, "sk-~!own.key"):  # a token like any other
            async with Client(process.port) as client:
                client.request(f"{method} /v1/models", key=key)
                assert (await client.response()).status in (400, 200), method
        assert all(key not in arrived.start_line for arrived in up.arrived)
        up.arrived.clear()
        many = "X-Debug: " + "sk-" * 2000
        assert (await ask(process.port, "GET /v1/models", many, key=key)).status == 400
        assert not up.arrived
        innocent = "X-Debug: sk-ant-something-else-altogether, task-1, sk-"
        assert (await ask(process.port, "GET /v1/models", innocent, key=key)).status == 200
        assert up.arrived[-1].field("x-debug") == [innocent[9:]]


@gen_test
async def test_no_key_stands_in_the_log_whoever_writes_it(start: Starter) -> None:
    for options in ([], ["--log-json"]):
        async with relayed(start, echo, *options, "--logging=debug") as (process, _, key):
            secret = process.new_key()
            odd = secret.replace("k", "%6b", 1)
            for path in (
                f"/key/{secret}/regenerate",
                f"/key/{odd}/reset_spend",
                f"/key/{secret}/nothing?key={secret}",
                f"/nothing/{secret}",
                f"/v1/files/{secret}",
                f"/v1/files/{odd}",
                f"/key/list?user_id={secret}%ff",  # of which Tornado itself warns
            ):
                await ask(process.port, f"GET {path}", key=MASTER_KEY)
                await ask(process.port, f"POST {path}", body=b"{}", key=MASTER_KEY)
            tags = (f"x-litellm-tags: a,{secret}", f"x-claude-code-session-id: {secret}")
            await ask(process.port, "GET /v1/models", *tags, key=key)
            await until(lambda: "tags" in process.log)
            plain = secret.removeprefix("sk-")
            assert plain not in process.log and plain not in str(
                process.manage("/spend/logs").json()
            )
            assert f"sk-...{secret[-4:]}" in process.log
            process.stop()


@gen_test
async def test_a_client_forges_no_field_of_a_log_line(start: Starter) -> None:
    async with relayed(start) as (process, _, key):
        forged = "x 200 ok user=root"
        fields = (f"x-claude-code-session-id: {forged}", f"x-claude-code-agent-id: {forged}")
        await ask(process.port, "GET /v1/models", *fields, f"x-litellm-tags: {forged}", key=key)
        await until(lambda: "session=" in process.log)
        line = process.log.splitlines()[-1]
        for name in ("session", "agent", "tags"):
            assert f'{name}="{forged}"' in line


@gen_test
async def test_an_open_gateway_takes_no_request_of_a_web_page(start: Starter) -> None:
    variables = {"ANTHROPIC_API_KEY": REAL_KEY}
    async with relayed(start, variables=variables) as (process, up, _):
        here = f"localhost:{process.port}"
        for asked in ("POST /v1/messages", "GET /", "GET /metrics", "OPTIONS /v1/messages"):
            for host, *fields in (
                ("evil.example",),
                ("evil.example:4000",),
                ("127.0.0.1.evil.example",),
                ("10.0.0.1",),
                (here, "Origin: http://evil.example"),
                (here, "Origin: null"),
                (here, "Origin: https://localhost.evil.example"),
                (here, "Sec-Fetch-Site: cross-site"),
            ):
                answer = await ask(process.port, asked, *fields, host=host)
                assert answer.status == 403, (asked, host, fields)
                assert "GATEWAY_MASTER_KEY" in answer.error["message"]
        target = "GET http://evil.example/v1/models"
        assert (await ask(process.port, target, host=here)).status == 403
        assert not up.arrived
        for host in (here, "localhost", "127.0.0.1", "[::1]:4000", "app.localhost:80"):
            own = f"Origin: http://{host}"
            answer = await ask(process.port, "GET /v1/models", own, host=host)
            assert answer.status == 200


@gen_test
async def test_a_preflight_goes_on_without_the_real_key(start: Starter) -> None:
    async def cors(request: Arrived) -> None:
        await request.read_body()
        allowed = "Access-Control-Allow-Origin: https://app.example"
        await request.answer(b"", "200 OK", allowed)

    async with relayed(start, cors) as (process, up, key):
        page = "Origin: https://app.example"
        asks = "Access-Control-Request-Method: POST"
        answer = await ask(process.port, "OPTIONS /v1/messages", page, asks)
        assert answer.status == 200 and answer.field("access-control-allow-origin")
        assert credentials(up.arrived[-1]) == []
        assert up.arrived[-1].field("origin") == ["https://app.example"]
        with_key = await ask(process.port, "POST /v1/messages", page, body=b"{}", key=key)
        assert with_key.status == 200 and with_key.field("access-control-allow-origin")
        assert credentials(up.arrived[-1]) == [("x-api-key", REAL_KEY)]
        seen = len(up.arrived)
        for start_line, *fields in (
            ("OPTIONS /v1/messages", page),
            ("OPTIONS /v1/messages", asks),
            ("OPTIONS /v1/messages", page, asks, "Content-Length: 5"),
            ("OPTIONS /v1/messages", page, asks, "x-api-key: sk-wrong"),
            ("POST /v1/messages", page, asks),
        ):
            answer = await ask(process.port, start_line, *fields)
            assert answer.status == 401, fields
        assert len(up.arrived) == seen


@gen_test
async def test_dead_and_unknown_keys_are_not_tried_again(start: Starter) -> None:
    async with relayed(start) as (process, _, _):
        blocked = process.new_key(blocked=True)
        expired = process.new_key(duration="0s")
        deleted = process.new_key()
        process.manage("/key/delete", {"keys": [deleted]})
        for key in (blocked, expired, deleted, "sk-unknown-0123456789"):
            for path in ("/v1/models", "/key/info"):
                answer = await ask(process.port, f"GET {path}", key=key)
                assert answer.status == 401
                assert answer.field("x-should-retry") == ["false"]


# ─── Under attack: the file tells the truth ──────────────────────────────────────────


@gen_test
async def test_a_change_that_was_refused_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = gateway.KeyStore(tmp_path / "keys.json")
    first = gateway.VirtualKey("sk-...test", rpm_limit=1)
    hashed, other = gateway.hash_key("sk-a"), gateway.hash_key("sk-b")
    await store.change({hashed: first})
    release, replace = asyncio.Event(), os.replace
    loop = asyncio.get_running_loop()

    def full(*_: Any) -> None:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(PATIENCE)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)

    async def change(limit: int) -> gateway.APIError:
        changed = dataclasses.replace(store.keys[hashed], rpm_limit=limit)
        with pytest.raises(gateway.APIError) as refused:
            await store.change({hashed: changed, gateway.hash_key(f"sk-{limit}"): first})
        return refused.value

    changes = [asyncio.create_task(change(limit)) for limit in range(2, 10)]
    await until(lambda: len(store.keys) == 9)
    release.set()
    assert {error.status for error in await asyncio.gather(*changes)} == {503}
    monkeypatch.setattr(os, "replace", replace)
    assert store.keys == {hashed: first}
    # Whatever is written next knows nothing of it.
    await store.change({other: gateway.VirtualKey("sk-...b")})
    kept = gateway.parse_store(store.path.read_bytes(), "x")
    assert [(h, k.rpm_limit) for h, k in kept.items()] == [(hashed, 1), (other, None)]
    store.close()


@gen_test
async def test_a_refused_change_does_not_come_back_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = gateway.KeyStore(tmp_path / "keys.json")
    hashed = gateway.hash_key("sk-a")
    await store.change({hashed: gateway.VirtualKey("sk-...test", rpm_limit=1)})
    fsync, failing = os.fsync, True

    def fail_for_folders(descriptor: int) -> None:
        if failing and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")  # after the new file has its name
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(gateway.APIError):
        await store.change({hashed: dataclasses.replace(store.keys[hashed], rpm_limit=2)})
    with pytest.raises(gateway.SettingsError):
        await store.reload()
    failing = False
    await store.reload()
    assert store.keys[hashed].rpm_limit == 1
    (kept,) = gateway.parse_store(store.path.read_bytes(), "x").values()
    assert kept.rpm_limit == 1
    await store.flush()
    store.close()


def edit(process: Process, change: Callable[[str], str], *, renames: bool) -> str:
    """Edit the keys file as an editor does: in place, or by a new file."""
    text = change(process.keys.read_text())
    target = process.keys.with_name("new") if renames else process.keys
    target.write_text(text)
    if renames:
        target.rename(process.keys)
    return text


@pytest.mark.parametrize("renames", [True, False])
def test_a_hand_edited_file_is_taken_in_and_not_written_over(start: Starter, renames: bool) -> None:
    process = start()
    key, other = process.new_key(rpm_limit=1000), process.new_key()
    assert relay_message(process, key) == 200  # so that there is something to write
    edit(process, lambda text: text.replace('"rpm_limit": 1000', '"rpm_limit": 7'), renames=renames)
    wait_for(lambda: "edited" in process.log)  # no signal was sent
    info = process.manage(f"/key/info?key={key}").json()["info"]
    assert info["rpm_limit"] == 7 and info["usage"]
    wait_for(lambda: '"usage"' in process.keys.read_text())
    assert '"rpm_limit": 7' in process.keys.read_text()
    # Whoever changes a key in the same moment does not write over it either.
    edit(process, lambda text: text.replace('"rpm_limit": 7', '"rpm_limit": 0'), renames=renames)
    assert process.manage("/key/update", {"key": other, "key_alias": "b"}).status_code == 200
    assert relay_message(process, key) == 429
    text = process.keys.read_text()
    assert '"rpm_limit": 0' in text and '"key_alias": "b"' in text


def test_a_damaged_edit_is_left_alone_until_it_is_mended(start: Starter) -> None:
    process = start()
    key = process.new_key()
    sound = process.keys.read_text()
    damaged = edit(process, lambda text: text[:-5], renames=False)
    assert relay_message(process, key) == 200
    for _ in range(2):
        answer = process.manage("/key/update", {"key": key, "rpm_limit": 5})
        assert "mend" in error_of(answer, 503, "overloaded_error")
    wait_for(lambda: process.log.count("cannot be read") == 1)
    assert readiness(process)[0] == 503 and process.keys.read_text() == damaged
    process.keys.write_text(sound)
    wait_for(lambda: readiness(process)[0] == 200)
    assert process.manage("/key/update", {"key": key, "rpm_limit": 5}).status_code == 200
    assert '"rpm_limit": 5' in process.keys.read_text()
    assert process.log.count("cannot be read") == 1 and process.stop() == 0


def test_a_linked_file_stays_a_link(start: Starter, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "keys.json").symlink_to(folder / "real.json")
    process = start()
    key = process.new_key()
    assert (tmp_path / "keys.json").is_symlink()
    assert gateway.hash_key(key) in (folder / "real.json").read_text()
    process.stop()
    again = start()
    assert again.manage(f"/key/info?key={key}").status_code == 200


def test_of_two_that_start_at_once_one_runs(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, str(GATEWAY), "--port=0", "--upstream=mock"]
        both = [
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment(**DEFAULT_VARIABLES),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        try:
            wait_for(lambda both=both: any(p.poll() is not None for p in both))
            (ended,) = [p for p in both if p.poll() is not None]
            (running,) = [p for p in both if p is not ended]
            assert ended.returncode == 2 and "another gateway" in ended.stderr.read()
            assert "listening" in running.stdout.readline()
        finally:
            for process in both:
                process.kill()
                process.communicate()


def test_sighup_during_the_start_does_not_end_it(start: Starter, tmp_path: Path) -> None:
    """From the first line of the file on, before Tornado and all else is imported."""
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
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: "keys read again" in process.log)
    assert process.manage("/key/list").status_code == 200


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    "body",
    [
        '{"metadata": {"a": 1e999}}',
        '{"max_budget": 1e999}',
        f'{{"max_budget": 0.{"0" * 3000}1}}',
        '{"max_budget": 1e-999999}',
        json.dumps({"metadata": nested(60)}),
        json.dumps({"metadata": nested(350)}),
        '{"metadata": ' + '{"a":' * 1500 + "1" + "}" * 1501,
        '{"budget_duration": "0mo"}',
        json.dumps({"key": "sk-" + "x" * 300}),
    ],
)
def test_what_the_file_could_not_hold_is_refused(mocked: Process, body: str) -> None:
    headers = {"Authorization": f"Bearer {MASTER_KEY}"}
    answer = httpx2.post(f"{mocked.url}/key/generate", headers=headers, content=body)
    error_of(answer, 400, "invalid_request_error")


# ─── Under attack: small things ──────────────────────────────────────────────────────


@gen_test
async def test_health_checks_of_http_1_0_need_no_host(start: Starter) -> None:
    for variables in (DEFAULT_VARIABLES, {"ANTHROPIC_API_KEY": REAL_KEY}):
        process = start(variables=variables)
        for path in ("/", "/health/liveliness", "/health/readiness"):
            async with Client(process.port) as client:
                client.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                answer = await client.response()
                assert answer.status == 200, path
        process.stop()


def test_addresses_of_one_site_count_together() -> None:
    first = gateway.site_of("2001:db8:1:2:3:4:5:6")
    assert first == gateway.site_of("2001:db8:1:2::9") != gateway.site_of("2001:db8:1:3::")
    assert gateway.site_of("::ffff:1.2.3.4") == gateway.site_of("1.2.3.4") == "1.2.3.4"
    assert gateway.site_of("fe80::1%eth0") == gateway.site_of("fe80::2%eth0")
    assert gateway.site_of("") == ""


# ─── Operations ──────────────────────────────────────────────────────────────────────


def test_probes_are_answered_here_and_need_no_key(start: Starter) -> None:
    process = start("http://localhost:1")
    for path in ("/", "/anthropic", "/anthropic/api/hello", "/api/hello"):
        for method in ("GET", "HEAD"):
            answer = httpx2.request(method, process.url + path)
            assert answer.status_code == 200, (method, path)
    assert "ANTHROPIC_BASE_URL" in httpx2.get(process.url + "/").text
    for path in ("/health/liveliness", "/health/liveness"):
        assert httpx2.get(process.url + path).json() == "I'm alive!"
    assert httpx2.get(process.url + "/health/readiness").json()["status"] == "healthy"
    for path in ("/nope", "/anthropicx/v1/files/x", "/v2/x", "/.env"):
        error_of(httpx2.get(process.url + path), 404, "not_found_error")


@gen_test
async def test_stopping_lets_running_requests_end(start: Starter) -> None:
    release = asyncio.Event()

    async def slow(request: Arrived) -> None:
        await request.read_body()
        await request.send(SSE_HEAD + b"3\r\na\n\n\r\n")
        await release.wait()
        await request.send(b"3\r\nb\n\n\r\n0\r\n\r\n")

    async with relayed(start, slow) as (process, _, key), Client(process.port) as client:
        client.request("POST /v1/messages", body=b"{}", key=key)
        await client.head()
        async with Client(process.port) as idle:
            idle.request("GET /")
            await idle.response()
            process.popen.send_signal(signal.SIGTERM)
            assert await idle.reader.read() == b"", "an idle connection is closed at once"
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", process.port)
        release.set()
        assert await read_chunked(client.reader) == b"a\n\nb\n\n"
        assert process.popen.wait(PATIENCE) == 0


@gen_test
async def test_stopping_breaks_what_does_not_end(start: Starter) -> None:
    async with (
        relayed(start, stall, "--drain-timeout=0.2") as (process, up, key),
        Client(process.port) as client,
    ):
        client.request("POST /v1/files/events", body=b"{}", key=key)
        await client.head()
        process.popen.send_signal(signal.SIGTERM)
        await until(lambda: up.arrived[0].closed_at)
        assert process.popen.wait(PATIENCE) == 0
        assert "1 requests under way" in process.log


@gen_test
async def test_a_second_signal_ends_it_at_once(start: Starter) -> None:
    async with relayed(start, stall) as (process, _, key), Client(process.port) as client:
        client.request("POST /v1/files/events", body=b"{}", key=key)
        await client.head()
        process.popen.send_signal(signal.SIGINT)
        await until(lambda: "under way" in process.log)
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(2) == 0
        json.loads(process.keys.read_text())


def test_log_lines_are_one_line_each(mocked: Process, virtual_key: str) -> None:
    before = len(mocked.log.splitlines())
    path = "/v1/files/%0a%1b%5b31m"
    httpx2.get(mocked.url + path + "?secret=1", headers={"x-api-key": virtual_key})
    wait_for(lambda: len(mocked.log.splitlines()) == before + 1)
    line = mocked.log.splitlines()[-1]
    assert "shared by the module GET" in line and " 404 ok " in line and "secret" not in line


def limit_files(process: Process, what: int, soft: int) -> None:
    """Set a running gateway's soft limit."""
    hard = resource.prlimit(process.popen.pid, what)[1]
    resource.prlimit(process.popen.pid, what, (soft, hard))


def readiness(process: Process) -> tuple[int, dict[str, Any]]:
    answer = httpx2.get(process.url + "/health/readiness")
    return answer.status_code, answer.json()


@gen_test
async def test_readiness_tells_what_requests_have_met(start: Starter) -> None:
    async def as_told(request: Arrived) -> None:
        if request.target.endswith("lost"):
            request.writer.close()
        else:
            await request.answer(status=request.target.rpartition("/")[2] + " X")

    async with relayed(start, as_told) as (process, up, key):
        status, ready = await asyncio.to_thread(readiness, process)
        assert status == 200 and ready["status"] == "healthy"
        assert ready["version"] == gateway.__version__ and ready["uptime"] >= 0
        assert ready["store"] == "writable"
        assert ready["upstream"] == dict.fromkeys(("last_success", "last_failure", "last_error"))
        assert not up.arrived, "a probe called the upstream"
        await ask(process.port, "GET /v1/files/404", key=key)
        seen = (await asyncio.to_thread(readiness, process))[1]["upstream"]
        assert seen["last_success"] and not seen["last_failure"]
        await ask(process.port, "GET /v1/files/529", key=key)
        seen = (await asyncio.to_thread(readiness, process))[1]["upstream"]
        assert seen["last_failure"] and "529" in seen["last_error"]
        await ask(process.port, "GET /v1/files/lost", key=key)
        status, ready = await asyncio.to_thread(readiness, process)
        assert status == 200 and "closed" in ready["upstream"]["last_error"]


def test_a_disk_that_filled_is_noticed_and_written_when_it_is_free_again(start: Starter) -> None:
    process = start("mock")
    key = process.new_key()
    limit_files(process, resource.RLIMIT_FSIZE, 10)
    error_of(process.manage("/key/generate", {}), 503, "overloaded_error")
    status, ready = readiness(process)
    assert status == 503 and ready["status"] == "unhealthy"
    assert "cannot be written" in ready["store"] and str(process.folder) not in str(ready)
    assert relay_status(process, key) == 200, "requests are relayed all the same"
    before = process.keys.read_bytes()
    limit_files(process, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    wait_for(lambda: readiness(process)[0] == 200)
    wait_for(lambda: process.keys.read_bytes() != before)
    record = json.loads(process.keys.read_bytes())["keys"][gateway.hash_key(key)]
    assert record["usage"], "what was used meanwhile was not written"


@gen_test
async def test_a_request_that_arrives_while_stopping_gets_503(start: Starter) -> None:
    async with (
        relayed(start, stall) as (process, _, key),
        Client(process.port) as running,
        Client(process.port) as probe,
        Client(process.port) as late,
    ):
        running.request("POST /v1/files/events", body=b"{}", key=key)
        await running.head()
        probe.send(b"GET /health/readiness HTTP/1.1\r\n")
        late.send(b"POST /v1/messages HTTP/1.1\r\n")
        await asyncio.to_thread(relay_status, process, "sk-none")  # both parts are there
        process.popen.send_signal(signal.SIGTERM)
        await until(lambda: "under way" in process.log)
        probe.send(b"Host: x\r\n\r\n")
        answer = await probe.response()
        assert answer.status == 503 and answer.json()["status"] == "shutting_down"
        late.send(b"Host: x\r\nContent-Length: 0\r\n\r\n")
        answer = await late.response()
        assert answer.status == 503 and answer.error["type"] == "overloaded_error"
        assert answer.field("retry-after") and await late.reader.read() == b""
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(PATIENCE) == 0


# Metrics


def metrics(process: Process, key: str = MASTER_KEY, **headers: str) -> Any:
    """What /metrics says, as {(name, label values…): value}."""
    answer = httpx2.get(process.url + "/metrics", headers={"x-api-key": key} | headers)
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_are_for_those_who_may(start: Starter) -> None:
    process = start("mock")
    error_of(httpx2.get(process.url + "/metrics"), 401, "authentication_error")
    for routes in ([], ["*"], ["/v1/*"]):
        key = process.new_key(**({"allowed_routes": routes} if "*" not in routes else {}))
        error_of(process.manage("/metrics", key=key), 403, "permission_error")
    scraper = process.new_key(allowed_routes=["/metrics"])
    assert ("litellm_in_flight_requests",) in metrics(process, scraper)
    assert relay_status(process, scraper) == 403, "it may do nothing else"
    process.manage("/key/block", {"key": scraper})
    error_of(process.manage("/metrics", key=scraper), 403, "permission_error")
    assert process.stop() == 0
    open_to_all = start("mock", "--open-metrics")
    assert httpx2.get(open_to_all.url + "/metrics").status_code == 200


@gen_test
async def test_metrics_count_what_passed(start: Starter) -> None:
    async def as_told(request: Arrived) -> None:
        await request.read_body()
        if b"break" in request.body:
            request.writer.close()
        elif b"stream" in request.body:
            await request.send(SSE_HEAD + b"3\r\na\n\n\r\n")
            await request.gone()
        else:
            used = {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 7}
            answer = {"model": OPUS, "content": [1], "usage": used}
            await request.answer(json.dumps(answer).encode(), "200 OK", JSON_KIND)

    async with metered(start, as_told) as (process, _, _):
        fields = json.dumps({"key_alias": 'a "quoted" \ud800', "max_budget": 10})
        master = {"Authorization": f"Bearer {MASTER_KEY}"}
        made = httpx2.post(f"{process.url}/key/generate", headers=master, content=fields)
        key = made.json()["key"]
        shown = 'a "quoted" ?'
        for _ in range(2):
            assert (await acall(process, key)).status == 200
        assert (await acall(process, key, stop="break")).status == 502
        assert (await acall(process, "sk-unknown-0123456789")).status == 401
        body = json.dumps({"stream": True, "model": OPUS}).encode()
        async with Client(process.port) as client:
            client.request("POST /v1/messages", JSON_KIND, body=body, key=key)
            await client.head()
            seen = await asyncio.to_thread(metrics, process)
            assert seen["gateway_streams_open",] == 1
            assert seen["litellm_in_flight_requests",] == 1
        await until(lambda: "client_gone" in process.log)
        seen = await asyncio.to_thread(metrics, process)
    total = "litellm_proxy_total_requests_metric_total"
    failed = "litellm_proxy_failed_requests_metric_total"
    assert seen[total, shown, OPUS, "200"] == 3
    assert seen[failed, shown, "upstream_lost", "502", OPUS] == 1
    assert seen[failed, "-", "refused:authentication_error", "401", "-"] == 1
    assert seen["gateway_client_disconnects_total",] == 1
    assert seen["gateway_streams_open",] == 0
    for name, value in (
        ("input", 34 + 15), ("output", 10), ("input_cached", 14), ("total", 44 + 15)
    ):  # fmt: skip
        assert seen[f"litellm_{name}_tokens_metric_total", shown, OPUS] == value
    spent = process.manage(f"/key/info?key={key}").json()["info"]["spend"]
    assert spent > 0
    assert seen["litellm_spend_metric_total", shown, OPUS] == pytest.approx(spent)
    left = seen["litellm_remaining_api_key_budget_metric", shown]
    assert left == pytest.approx(10 - spent)
    assert seen["litellm_api_key_max_budget_metric", shown] == 10
    assert seen["gateway_upstream_connections_opened_total",] >= 1
    assert seen["gateway_upstream_connections_reused_total",] >= 1
    assert seen["process_open_fds",] > 0
    for kind in (
        *("request_total_latency", "llm_api_latency", "overhead_latency"),
        "llm_api_time_to_first_token",
    ):
        assert seen[f"litellm_{kind}_metric_count", OPUS] >= 2
        assert 0 <= seen[f"litellm_{kind}_metric_sum", OPUS] < PATIENCE


def test_labels_are_bounded() -> None:
    traffic = gateway.Traffic()
    for number in range(2 * gateway.MAX_LABELS):
        record = gateway.VirtualKey("sk-...x", f"key {number}")
        used = gateway.Settled(f"model {number}")
        traffic.count(finished_request(key=record, used=used))
    assert len(traffic.timings) == gateway.MAX_MODELS_A_DAY + 1
    assert len({labels[0] for labels in traffic.requests}) == gateway.MAX_LABELS + 1
    assert sum(traffic.requests.values()) == 2 * gateway.MAX_LABELS


def finished_request(**fields: Any) -> gateway.Finished:
    some: dict[str, Any] = dict.fromkeys([f.name for f in dataclasses.fields(gateway.Finished)], "")
    numbers = {"status": 200, "duration": 0.1, "bytes_in": 0, "bytes_out": 0}
    times = {"first_byte": None, "upstream": None, "overhead": None}
    return gateway.Finished(**(some | numbers | times | {"tags": []} | fields))


# The log

LOG_FIELDS = {
    *("time", "level", "call_id", "request_id", "key_alias", "key_name", "user", "tags"),
    *("session_id", "agent_id", "remote_ip", "method", "path", "status", "outcome"),
    *("model", "input_tokens", "output_tokens", "cache_read_tokens"),
    *("cache_write_tokens", "cost", "estimated", "time_to_first_byte", "duration"),
    *("bytes_in", "bytes_out"),
}


def test_the_log_as_json_has_one_schema(start: Starter) -> None:
    process = start("mock", "--log-json")
    key = process.new_key(key_alias="ci", user_id="ann", tags=["nightly"], max_budget=5)
    wait_for(lambda: readiness(process)[1]["prices"] == "loaded")
    fields = {
        "x-api-key": key,
        "x-claude-code-session-id": "session-1",
        "x-claude-code-agent-id": "agent-1",
        "x-litellm-tags": f"one, {key}",
    }
    body = json.dumps(MESSAGE)
    headers = fields | {"content-type": "application/json"}
    url = f"{process.url}/anthropic/v1/messages?secret=1"
    answer = httpx2.post(url, headers=headers, content=body)
    httpx2.post(url, headers={"x-api-key": "sk-unknown-0123456789"}, content=body)
    wait_for(lambda: '"status": 401' in process.log)
    lines = [json.loads(line) for line in process.log.splitlines()]
    assert {"time", "level", "message"} == set(lines[0]), "lines of no request"
    served, refused = [line for line in lines if "call_id" in line]
    assert set(served) == set(refused) == LOG_FIELDS
    assert served["call_id"] == answer.headers["x-litellm-call-id"]
    assert served["request_id"] == answer.headers["request-id"]
    expected = {
        "key_alias": "ci", "key_name": gateway.key_name(key), "user": "ann",
        "session_id": "session-1", "agent_id": "agent-1", "remote_ip": "127.0.0.1",
        "method": "POST", "path": "/v1/messages", "status": 200, "outcome": "ok",
        "model": MESSAGE["model"], "bytes_in": len(body), "estimated": False,
        "bytes_out": len(answer.content), "level": "info",
        "tags": ["nightly", "one", gateway.key_name(key)],
    }  # fmt: skip
    assert {name: served[name] for name in expected} == expected
    used = answer.json()["usage"]
    assert served["output_tokens"] == used["output_tokens"] > 0
    info = process.manage(f"/key/info?key={key}").json()["info"]
    assert served["cost"] == info["spend"] > 0
    assert 0 < served["time_to_first_byte"] <= served["duration"]
    assert datetime.fromisoformat(served["time"]).tzinfo
    assert refused["outcome"] == "refused:authentication_error"
    assert refused["model"] is refused["key_name"] is None
    for secret in (key, gateway.hash_key(key), "secret", "Hello, world"):
        assert secret not in process.log


def test_the_log_goes_to_files_that_are_rotated(start: Starter) -> None:
    options = ("--log-file-prefix=g.log", "--log-file-max-size=600", "--log-json")
    process = start("mock", *options, "--log-file-num-backups=3", "--log-to-stderr=false")
    for _ in range(4):
        relay_status(process, "sk-unknown-0123456789")
    wait_for(lambda: (process.folder / "g.log.2").exists())
    for name in ("g.log.1", "g.log.2"):
        for line in (process.folder / name).read_text().splitlines():
            assert json.loads(line)["level"]
    assert process.log == ""


@gen_test
async def test_a_stream_does_not_hold_its_request(start: Starter) -> None:
    async def begin(request: Arrived) -> None:
        await request.read_body()
        await request.send(SSE_HEAD + b"3\r\na\n\n\r\n")
        await request.gone()

    async with relayed(start, begin) as (process, _, key), contextlib.AsyncExitStack() as all_:
        await priced(process)  # which takes memory of its own
        body = json.dumps({"messages": "x" * 3 * MIB}).encode()
        for number in range(13):
            client = await all_.enter_async_context(Client(process.port))
            client.request("POST /v1/messages", JSON_KIND, body=body, key=key)
            await client.head()
            if number == 0:
                before = process.memory()
        assert process.memory() < before + 12 * MIB


# Patience

IMPATIENT = ("--client-timeout=0.4",)


@gen_test
async def test_slow_heads_and_bodies_are_timed_out(start: Starter) -> None:
    async with relayed(start, echo, *IMPATIENT) as (process, up, key):
        head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n".encode()
        json_head = head + b"content-type: application/json\r\n"
        slow = {
            "half a head": head,
            "half a body": json_head + b"content-length: 9\r\n\r\n{",
            "a chunk less": json_head + b"transfer-encoding: chunked\r\n\r\n1\r\n{",
            "half an upload": head.replace(b"messages", b"files") + b"content-length: 9\r\n\r\nx",
            "half a body for the gateway": b"POST /key/info HTTP/1.1\r\nHost: x\r\n"
            b"content-length: 9\r\n\r\n{",
        }
        for name, data in slow.items():
            async with Client(process.port) as client:
                client.send(data)
                began = time.monotonic()
                answer = await client.response()
                assert answer.status == 408, name
                assert answer.error["type"] == "invalid_request_error"
                assert await client.reader.read() == b"", name
                assert 0.3 < time.monotonic() - began < 5, name
        # The upload had begun upstream; it is broken off there.
        assert [arrived.target for arrived in up.arrived] == ["/v1/files"]
        await up.arrived[0].gone()
        await until(lambda: process.log.count("408 timeout") == 3)


@gen_test
async def test_silent_connections_are_closed_without_a_word(start: Starter) -> None:
    async with (
        relayed(start, echo, *IMPATIENT, "--idle-timeout=1") as (process, _, key),
        Client(process.port) as silent,
        Client(process.port) as served,
    ):
        served.request("GET /v1/models", key=key)
        assert (await served.response()).status == 200
        began = time.monotonic()
        assert await silent.reader.read() == b""
        assert time.monotonic() - began < 0.9, "one that never asked is closed sooner"
        assert await served.reader.read() == b""
        assert 0.7 < time.monotonic() - began < 5


@gen_test
async def test_a_steady_body_and_a_slow_upstream_are_put_up_with(start: Starter) -> None:
    release = asyncio.Event()

    async def late(request: Arrived) -> None:
        if request.target.endswith("late"):
            request.writer.transport.pause_reading()
            await release.wait()
            request.writer.transport.resume_reading()
        body = await request.read_body()
        await request.answer(b"%d" % len(body))

    async with (
        relayed(start, late, *IMPATIENT) as (process, _, key),
        Client(process.port) as steady,
        Client(process.port) as waiting,
    ):
        size = 32 * MIB
        waiting.request("POST /v1/files/late", f"content-length: {size}", body=b"", key=key)
        waiting.send(b"x" * size)
        steady.request("POST /v1/files/steady", "content-length: 3000", body=b"", key=key)
        for _ in range(6):  # 500 bytes each 0.2 s: for three times the client timeout
            steady.send(b"x" * 500)
            await asyncio.sleep(0.2)
        assert (await steady.response()).body == b"3000"
        release.set()
        assert (await waiting.response()).body == b"%d" % size


@gen_test
async def test_connections_of_an_address_are_capped(start: Starter) -> None:
    async with relayed(start, stall, "--max-connections-per-address=3") as served:
        process, _, key = served
        clients = [Client(process.port) for _ in range(3)]
        for client in clients:
            await client.__aenter__()
            client.request("POST /v1/files/events", body=b"{}", key=key)
            await client.head()
        refused = await ask(process.port, "GET /v1/models", key=key)
        assert refused.status == 429 and refused.error["type"] == "rate_limit_error"
        assert "3 connections" in refused.error["message"]
        assert refused.field("retry-after") and refused.field("connection") == ["close"]
        clients.pop().writer.close()
        await until(lambda: "client_gone" in process.log)
        async with Client(process.port) as client:
            client.request("POST /v1/files/events", body=b"{}", key=key)
            assert b"200 OK" in await client.head()
        for client in clients:
            client.writer.close()


@gen_test
async def test_a_flood_of_wrong_keys_leaves_nothing(start: Starter) -> None:
    async with relayed(start) as (process, up, _), Client(process.port) as client:
        written = process.keys.stat().st_ino
        for number in range(500):
            client.request("POST /v1/messages", body=b"{}", key=f"sk-wrong-{number}")
            assert (await client.response()).status == 401
        assert not up.arrived and process.keys.stat().st_ino == written
        assert process.manage("/spend/logs").json() == []
        assert process.manage("/spend/keys").json()[0]["spend"] == 0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@gen_test
async def test_no_more_files_is_survived(start: Starter, loop: str, tmp_path: Path) -> None:
    variables = dict(DEFAULT_VARIABLES)
    if loop == "asyncio":
        variables["PYTHONPATH"] = str(tmp_path)
        (tmp_path / "uvloop.py").write_text("raise ImportError")
    async with (
        relayed(start, variables=variables) as (process, _, key),
        Client(process.port) as client,
    ):
        client.request("GET /v1/models", key=key)
        assert (await client.response()).status == 200
        await priced(process)
        limit_files(process, resource.RLIMIT_NOFILE, 5)
        await asyncio.gather(
            *(asyncio.open_connection("127.0.0.1", process.port) for _ in range(20))
        )
        client.request("POST /key/generate", f"x-api-key: {MASTER_KEY}", body=b"{}")
        assert (await client.response()).status == 503
        limit_files(process, resource.RLIMIT_NOFILE, 1000)
        answer = await ask(process.port, "GET /v1/models", key=key)
        assert answer.status == 200
        assert process.manage("/key/generate", {}).status_code == 200
        assert "Traceback" not in process.log and process.log.count("\n") < 20


def test_a_clock_that_is_set_back_forgives_nothing() -> None:
    spent = gateway.WindowSpend("2026-12-01T00:00:00Z", Decimal(5))
    assert spent.spent("2026-11-01T00:00:00Z") == 5
    assert spent.spent("2026-12-01T00:00:00Z") == 0, "a new window"
    assert spent.spent("2027-01-01T00:00:00Z") == 0


@gen_test
async def test_an_address_that_answers_no_more_is_resolved_again(
    client_of_upstream: gateway.UpstreamClient,
) -> None:
    async with upstream(echo) as up:
        origin = gateway.Origin("http", "localhost", up.port)
        (await client_of_upstream.connect(origin)).abandon()
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            gone = unused.getsockname()
        client_of_upstream._reached[origin] = (gone, float("inf"))
        connection = await client_of_upstream.connect(origin)
        peer = connection.transport.get_extra_info("peername")
        assert peer == ("127.0.0.1", up.port)
        assert client_of_upstream.opened == 2
        connection.abandon()


# Ways in


def secure_client(certificate: Path) -> httpx2.Client:
    return httpx2.Client(verify=ssl.create_default_context(cafile=certificate))


def test_tls_is_served_and_a_new_certificate_taken(start: Starter) -> None:
    certificate, private = make_certificate(start.folder, "localhost")
    options = (f"--certfile={certificate}", f"--keyfile={private}")
    process = start("mock", *options)
    assert f"https://127.0.0.1:{process.port}" in process.banner
    url = f"https://localhost:{process.port}"
    master = {"Authorization": f"Bearer {MASTER_KEY}"}
    with secure_client(certificate) as client:
        made = client.post(f"{url}/key/generate", headers=master, json={}).json()
        sdk_client = anthropic.Anthropic(
            base_url=f"{url}/anthropic", api_key=made["key"], http_client=client
        )
        with sdk_client.messages.stream(**MESSAGE) as stream:
            assert "".join(stream.text_stream) == "You said: Hello, world"
        assert f"{url}/anthropic" in client.get(url).text
    first = ssl.get_server_certificate(("127.0.0.1", process.port))
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: "keys read again" in process.log)
    certificate.write_text("no certificate")
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: "not read again: --certfile" in process.log)
    assert ssl.get_server_certificate(("127.0.0.1", process.port)) == first
    make_certificate(start.folder, "localhost")
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: process.log.count("keys read again") == 2)
    assert ssl.get_server_certificate(("127.0.0.1", process.port)) != first
    with secure_client(certificate) as client:
        assert client.get(f"{url}/health/liveness").status_code == 200


@gen_test
async def test_handshakes_under_way_count_as_connections(start: Starter) -> None:
    certificate, private = make_certificate(start.folder, "localhost")
    options = (f"--certfile={certificate}", f"--keyfile={private}")
    process = start("mock", "--max-connections-per-address=3", *options)
    silent = [
        await asyncio.open_connection("127.0.0.1", process.port)
        for _ in range(3 + gateway.REFUSALS)
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
    assert await reader.read() == b"", "one more is closed without a handshake"
    for _, silent_writer in silent:
        silent_writer.close()
    writer.close()

    def answers() -> bool:
        url = f"https://localhost:{process.port}/health/liveness"
        with secure_client(certificate) as client, contextlib.suppress(httpx2.TransportError):
            return client.get(url).status_code == 200
        return False

    await until(answers)


@gen_test
async def test_over_tls_a_client_that_leaves_is_noticed(start: Starter) -> None:
    certificate, private = make_certificate(start.folder, "localhost")
    options = (f"--certfile={certificate}", f"--keyfile={private}")
    async with upstream(stall) as up:
        process = start(up.url, *options)
        context = ssl.create_default_context(cafile=certificate)
        for leave in ("close", "reset"):
            reader, writer = await asyncio.open_connection("localhost", process.port, ssl=context)
            key = f"x-api-key: {REAL_KEY}"
            writer.write(f"POST /v1/files/events HTTP/1.1\r\nHost: x\r\n{key}\r\n\r\n".encode())
            assert b" 401 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(
                b"POST /v1/files/events HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
                b"x-api-key: " + MASTER_KEY.encode() + b"\r\n\r\n"
            )
            await reader.readuntil(b"event-stream")
            arrived = up.arrived[-1]
            if leave == "close":
                writer.close()
            else:
                writer.transport.abort()
            await until(lambda arrived=arrived: arrived.closed_at)


def test_a_unix_socket_takes_the_place_of_the_port(start: Starter) -> None:
    path = start.folder / "g.sock"
    process = start("mock", f"--unix-socket={path}")
    assert str(path) in process.banner
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    transport = httpx2.HTTPTransport(uds=str(path))
    with httpx2.Client(transport=transport, base_url="http://gateway") as client:
        master = {"Authorization": f"Bearer {MASTER_KEY}"}
        key = client.post("/key/generate", headers=master, json={}).json()["key"]
        asked = {"headers": {"x-api-key": key}, "json": MESSAGE}
        assert client.post("/anthropic/v1/messages", **asked).status_code == 200
    assert listening_addresses(process) <= {"127.0.0.1"}, "but for the stand-in"
    process.popen.kill()
    process.popen.wait()
    again = start("mock", f"--unix-socket={path}")
    assert again.stop() == 0 and not path.exists()
    path.write_text("a file")
    assert "--unix-socket" in failed_start(start.folder, "--upstream=mock", f"--unix-socket={path}")
    assert path.read_text() == "a file"


def test_xheaders_are_believed_only_where_told(start: Starter) -> None:
    fields = {"X-Forwarded-For": "9.9.9.9, 10.1.2.3", "X-Forwarded-Proto": "https"}
    for option, address, scheme in (
        ("--xheaders", "10.1.2.3", "https"),
        ("--xheaders=false", "127.0.0.1", "http"),
    ):
        process = start("mock", option)
        key = process.new_key()
        headers = fields | {"x-api-key": key}
        httpx2.post(f"{process.url}/v1/messages", headers=headers, json=MESSAGE)
        wait_for(lambda p=process: p.manage("/spend/logs").json())
        row = process.manage("/spend/logs").json()[0]
        assert row["requester_ip_address"] == address
        page = httpx2.get(process.url, headers=fields).text
        assert f"{scheme}://127.0.0.1" in page
        assert process.stop() == 0


# --check


def check(folder: Path, *options: str, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(GATEWAY), "--check", *options],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_check_tells_a_newcomer_what_is_well_and_what_is_not(tmp_path: Path) -> None:
    status, text = check(tmp_path, "--upstream=mock", "--port=4321", **DEFAULT_VARIABLES)
    assert status == 0 and "FAIL" not in text, text
    assert "accepts the real key" in text and "genai-prices is installed" in text
    assert "export ANTHROPIC_BASE_URL=http://127.0.0.1:4321/anthropic" in text
    assert 'anthropic.Anthropic(base_url="http://127.0.0.1:4321/anthropic"' in text
    assert os.listdir(tmp_path) == [], "it leaves nothing behind"

    (tmp_path / "keys.json").write_text("{broken")
    status, text = check(
        tmp_path,
        "--upstream=http://127.0.0.1:9",
        "--certfile=none.pem",
        GATEWAY_MASTER_KEY="sk-1234",
        ANTHROPIC_API_KEY=REAL_KEY,
    )
    assert status == 1
    failures = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 4, text
    for said in ("damaged, not JSON", "weak", "--certfile", "refused the connection"):
        assert said in text
    assert "set GATEWAY_MASTER_KEY" in check(tmp_path, "--upstream=mock")[1]
    assert REAL_KEY not in text


@gen_test
async def test_check_asks_the_upstream_once(tmp_path: Path) -> None:
    statuses = iter(["200 OK", "401 Unauthorized", "404 Not Found"])

    async def as_told(request: Arrived) -> None:
        await request.answer(status=next(statuses))

    async with upstream(as_told) as up:
        for said, code in (
            ("accepts the real key", 0),
            ("not accepted", 1),
            ("is --upstream right?", 1),
        ):
            status, text = await asyncio.to_thread(
                check, tmp_path, f"--upstream={up.url}", **DEFAULT_VARIABLES
            )
            assert status == code and said in text, text
        assert [a.start_line for a in up.arrived] == ["GET /v1/models?limit=1 HTTP/1.1"] * 3
        assert up.arrived[0].field("x-api-key") == [REAL_KEY]


# ─── The real SDK ────────────────────────────────────────────────────────────────────


def sdk(process: Process, key: str, base: str = "/anthropic", **kwargs: Any) -> anthropic.Anthropic:
    kwargs.setdefault("max_retries", 0)
    return anthropic.Anthropic(base_url=process.url + base, api_key=key, **kwargs)


BASES = pytest.mark.parametrize("base", ["/anthropic", ""])


@BASES
def test_sdk_messages(mocked: Process, virtual_key: str, base: str) -> None:
    client = sdk(mocked, virtual_key, base)
    message = client.messages.create(**MESSAGE)
    assert message.content[0].text == "You said: Hello, world" and message._request_id
    assert message.usage.input_tokens > 0 and message.usage.output_tokens == 4
    with client.messages.stream(**MESSAGE) as stream:
        assert "".join(stream.text_stream) == "You said: Hello, world"
        assert stream.get_final_message().usage.output_tokens == 4
    counted = client.messages.count_tokens(model=MESSAGE["model"], messages=MESSAGE["messages"])
    assert counted.input_tokens > 0


def test_sdk_auth_token_and_both(mocked: Process, virtual_key: str) -> None:
    bearer = anthropic.Anthropic(
        base_url=mocked.url + "/anthropic", auth_token=virtual_key, api_key=None
    )
    assert bearer.messages.create(**MESSAGE).content
    header = {"x-api-key": virtual_key}
    both = sdk(mocked, virtual_key, default_headers=header)
    assert both.messages.create(**MESSAGE).content


def test_the_mock_caches_like_anthropic(mocked: Process, virtual_key: str) -> None:
    system = [{"type": "text", "text": "x" * 4000, "cache_control": {"type": "ephemeral"}}]
    client = sdk(mocked, virtual_key)
    first = client.messages.create(**MESSAGE, system=system).usage
    second = client.messages.create(**MESSAGE, system=system).usage
    assert first.cache_creation_input_tokens == second.cache_read_input_tokens > 900
    assert first.cache_read_input_tokens == second.cache_creation_input_tokens == 0


@BASES
def test_sdk_batches(mocked: Process, virtual_key: str, base: str) -> None:
    client = sdk(mocked, virtual_key, base)
    batch = client.messages.batches.create(
        requests=[
            {"custom_id": "one", "params": MESSAGE},
            {"custom_id": "two", "params": {**MESSAGE, "model": "mock-error-400"}},
        ]
    )
    retrieved = client.messages.batches.retrieve(batch.id)
    assert retrieved.processing_status == "ended"
    assert retrieved.results_url == f"/v1/messages/batches/{batch.id}/results"
    results = list(client.messages.batches.results(batch.id))
    assert [(r.custom_id, r.result.type) for r in results] == [
        ("one", "succeeded"),
        ("two", "errored"),
    ]
    assert batch.id in [listed.id for listed in client.messages.batches.list(limit=1)]
    assert client.messages.batches.cancel(batch.id).processing_status == "canceling"
    assert client.messages.batches.delete(batch.id).id == batch.id
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.retrieve(batch.id)


@pytest.mark.parametrize("base", ["", "/deep/base"])
@pytest.mark.parametrize("coding", ["identity", "gzip", "deflate"])
@gen_test
async def test_results_urls_lead_back_to_the_gateway(
    start: Starter, coding: str, base: str
) -> None:
    pack = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[coding]

    async def batches(request: Arrived) -> None:
        await request.read_body()
        if request.target.endswith("/results"):
            line = {"custom_id": "a", "result": {"type": "expired"}}
            await request.answer(json.dumps(line).encode() + b"\n")
            return
        origin = "https://api.anthropic.com" if "far" in request.target else up.url
        batch = {
            "id": "msgbatch_1", "type": "message_batch", "processing_status": "ended",
            "created_at": "2026-11-22T00:00:00Z", "expires_at": "2026-11-23T00:00:00Z",
            "request_counts": {}, "note": f"see {origin}/v1/files/x",
            "results_url": f"{origin}{base}/v1/messages/batches/msgbatch_1/results",
        }  # fmt: skip
        document = {"data": [batch, batch]} if request.target.endswith("batches") else batch
        kinds = [f"Content-Encoding: {coding}"] if coding != "identity" else []
        packed = pack(json.dumps(document).encode())
        await request.answer(packed, "200 OK", "Content-Type: application/json", *kinds)

    async with relayed(start, batches, base=base) as (process, up, key):
        relative = "/v1/messages/batches/msgbatch_1/results"
        for start_line, many in [
            ("GET /v1/messages/batches/far", False),
            ("GET /anthropic/v1/messages/batches/near?beta=true", False),
            ("POST /v1/messages/batches/far/cancel", False),
            ("POST /v1/messages/batches", True),
            ("GET /v1/messages/batches", True),
        ]:
            answer = await ask(process.port, start_line, key=key)
            assert answer.field("content-length") == [str(len(answer.body))]
            assert answer.field("content-encoding") == ([coding] if coding != "identity" else [])
            plain = gateway.decompress(coding, answer.body, MIB)
            document = json.loads(plain)
            batch = document["data"][1] if many else document
            assert batch["results_url"] == relative and "://" in batch["note"]
        client = anthropic.AsyncAnthropic(base_url=process.url + "/anthropic", api_key=key)
        results = [r async for r in await client.messages.batches.results("far")]
        assert results[0].result.type == "expired"
        assert up.arrived[-1].target == base + relative


@gen_test
async def test_a_batch_object_that_cannot_be_read_is_not_passed_on(start: Starter) -> None:
    async def unreadable(request: Arrived) -> None:
        await request.answer(
            b"\x00", "200 OK", "Content-Type: application/json", "Content-Encoding: br"
        )

    async with relayed(start, unreadable) as (process, _, key):
        answer = await ask(process.port, "GET /v1/messages/batches/b", key=key)
        assert answer.status == 502 and "batch" in answer.error["message"]


def test_sdk_models(mocked: Process, virtual_key: str) -> None:
    client = sdk(mocked, virtual_key)
    names = [model.id for model in client.models.list(limit=2)]
    assert names == list(gateway.MOCK_MODELS)
    assert client.models.retrieve(names[0]).id == names[0]


def test_sdk_files(mocked: Process, virtual_key: str) -> None:
    client, data = sdk(mocked, virtual_key), os.urandom(3 * MIB)
    files = client.files if hasattr(client, "files") else client.beta.files
    uploaded = files.upload(file=("data.bin", data, "application/octet-stream"))
    assert uploaded.size_bytes == len(data)
    assert uploaded.id in [listed.id for listed in files.list()]
    assert files.download(uploaded.id).read() == data
    assert files.delete(uploaded.id).id == uploaded.id
    with pytest.raises(anthropic.NotFoundError):
        files.retrieve_metadata(uploaded.id)


@pytest.mark.parametrize(
    ("status", "exception"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError),
        (404, anthropic.NotFoundError),
        (409, anthropic.ConflictError),
        (413, anthropic.APIStatusError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (504, anthropic.InternalServerError),
        (529, anthropic.InternalServerError),
    ],
)
def test_sdk_errors(
    mocked: Process, virtual_key: str, status: int, exception: type[anthropic.APIStatusError]
) -> None:
    with pytest.raises(exception) as raised:
        sdk(mocked, virtual_key).messages.create(**{**MESSAGE, "model": f"mock-error-{status}"})
    assert raised.value.status_code == status
    assert raised.value.request_id.startswith("req_")


def test_sdk_errors_of_the_gateway_itself(mocked: Process, start: Starter) -> None:
    with pytest.raises(anthropic.AuthenticationError, match="Unknown API key") as raised:
        sdk(mocked, "sk-wrong-0123456789").messages.create(**MESSAGE)
    assert raised.value.request_id == raised.value.response.headers["x-litellm-call-id"]
    unreachable = start("http://localhost:1")
    with pytest.raises(anthropic.InternalServerError, match="refused the connection"):
        sdk(unreachable, unreachable.new_key()).messages.create(**MESSAGE)


@gen_test
async def test_sdk_honours_retry_after(start: Starter) -> None:
    times: list[float] = []

    async def limited_once(request: Arrived) -> None:
        await request.read_body()
        times.append(time.monotonic())
        if len(times) == 1:
            await request.answer(b"{}", "429 Too Many Requests", "retry-after: 1")
        else:
            await request.answer(b'{"input_tokens": 7}', "200 OK", "Content-Type: application/json")

    async with relayed(start, limited_once) as (process, _, key):
        client = anthropic.AsyncAnthropic(base_url=process.url, api_key=key)
        counted = await client.messages.count_tokens(model="m", messages=MESSAGE["messages"])
        assert counted.input_tokens == 7 and times[1] - times[0] >= 1


@gen_test
async def test_sdk_leaves_a_stream_in_the_middle(start: Starter) -> None:
    async def endless(request: Arrived) -> None:
        await request.read_body()
        event = b'event: ping\ndata: {"type": "ping"}\n\n'
        await request.send(SSE_HEAD + b"%x\r\n%b\r\n" % (len(event), event))
        request.closed_at = await request.gone()

    async with relayed(start, endless) as (process, up, key):
        client = anthropic.AsyncAnthropic(base_url=process.url, api_key=key)
        stream = await client.messages.create(**MESSAGE, stream=True)
        await stream.close()
        await client.close()
        await until(lambda: up.arrived[0].closed_at)


@gen_test
async def test_50_sdk_streams_at_once(mocked: Process, virtual_key: str) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=mocked.url + "/anthropic", api_key=virtual_key
    ) as client:

        async def one(number: int) -> str:
            text = f"number {number} " * 10
            messages = [{"role": "user", "content": text}]
            async with client.messages.stream(**{**MESSAGE, "messages": messages}) as stream:
                return "".join([part async for part in stream.text_stream])

        answers = await asyncio.gather(*(one(number) for number in range(50)))
        assert all(f"number {n} " in answer for n, answer in enumerate(answers))


# ─── The curls of LiteLLM's page ─────────────────────────────────────────────────────

CURLS = {
    "quick start": """curl --request POST \\
--url http://0.0.0.0:4000/anthropic/v1/messages \\
--header 'accept: application/json' \\
--header 'content-type: application/json' \\
--header "Authorization: bearer sk-anything" \\
--data '{
"model": "claude-3-5-sonnet-20241022",
"max_tokens": 1024,
"messages": [
{"role": "user", "content": "Hello, world"}
]
}'""",
    "test it": """curl http://0.0.0.0:4000/anthropic/v1/messages \\
--header "x-api-key: $LITELLM_API_KEY" \\
--header "anthropic-version: 2023-06-01" \\
--header "content-type: application/json" \\
--data \\
'{
"model": "claude-3-5-sonnet-20241022",
"max_tokens": 1024,
"messages": [
{"role": "user", "content": "Hello, world"}
]
}'""",
    "messages": """curl --request POST \\
--url http://0.0.0.0:4000/anthropic/v1/messages \\
--header "x-api-key: $LITELLM_API_KEY" \\
--header "anthropic-version: 2023-06-01" \\
--header "content-type: application/json" \\
--data '{
"model": "claude-3-5-sonnet-20241022",
"max_tokens": 1024,
"messages": [
{"role": "user", "content": "Hello, world"}
]
}'""",
    "count_tokens": """curl --request POST \\
--url http://0.0.0.0:4000/anthropic/v1/messages/count_tokens \\
--header "x-api-key: $LITELLM_API_KEY" \\
--header "anthropic-version: 2023-06-01" \\
--header "anthropic-beta: token-counting-2024-11-01" \\
--header "content-type: application/json" \\
--data \\
'{
"model": "claude-3-5-sonnet-20241022",
"messages": [
{"role": "user", "content": "Hello, world"}
]
}'""",
    "batches": """curl --request POST \\
--url http://0.0.0.0:4000/anthropic/v1/messages/batches \\
--header "x-api-key: $LITELLM_API_KEY" \\
--header "anthropic-version: 2023-06-01" \\
--header "anthropic-beta: message-batches-2024-09-24" \\
--header "content-type: application/json" \\
--data \\
'{
"requests": [
{
"custom_id": "my-first-request",
"params": {
"model": "claude-3-5-sonnet-20241022",
"max_tokens": 1024,
"messages": [
{"role": "user", "content": "Hello, world"}
]
}
},
{
"custom_id": "my-second-request",
"params": {
"model": "claude-3-5-sonnet-20241022",
"max_tokens": 1024,
"messages": [
{"role": "user", "content": "Hi again, friend"}
]
}
}
]
}'""",
    "virtual key": """curl --request POST \\
--url http://0.0.0.0:4000/anthropic/v1/messages \\
--header 'accept: application/json' \\
--header 'content-type: application/json' \\
--header "Authorization: bearer $LITELLM_API_KEY" \\
--data '{
"model": "claude-3-5-sonnet-20241022",
"max_tokens": 1024,
"messages": [
{"role": "user", "content": "Hello, world"}
]
}'""",
}


def curl(command: str, port: int, key: str) -> Any:
    command = command.replace("0.0.0.0:4000", f"127.0.0.1:{port}")
    done = subprocess.run(
        ["bash", "-c", command.replace("curl", "curl -s", 1)],
        env={**os.environ, "LITELLM_API_KEY": key},
        capture_output=True,
        check=True,
        timeout=PATIENCE,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CURLS)
def test_the_curls_of_litellms_page(
    mocked: Process, virtual_key: str, start: Starter, name: str
) -> None:
    if "sk-anything" in CURLS[name]:
        answer = curl(CURLS[name], start("mock", variables={}).port, "")
    else:
        answer = curl(CURLS[name], mocked.port, virtual_key)
    assert "error" not in answer
    assert answer.get("type") in ("message", "message_batch") or answer["input_tokens"] > 0


def test_the_curl_that_makes_a_key(mocked: Process) -> None:
    answer = curl(
        f"""curl -X POST 'http://0.0.0.0:4000/key/generate' \\
-H 'Authorization: Bearer {MASTER_KEY}' \\
-H 'Content-Type: application/json' \\
-d '{{}}'""",
        mocked.port,
        "",
    )
    assert relay_status(mocked, answer["key"]) == 200
