#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6", "uvloop>=0.21; sys_platform != 'win32'", "genai-prices>=0.2.3", "prometheus-client", "msgspec"]
# ///
"""A gateway that lets a team share one Anthropic API key without handing it out.

    python gateway.py --port=4000

It relays Anthropic's API byte for byte under /anthropic/ and /v1/, swaps a virtual key
for the real one, and keeps the virtual keys in a JSON file. Only Tornado is required.

The rooms of this file, top to bottom; each uses only what stands above it: Settings, Errors,
Time and money, Keys, Anthropic, Prices, Ledger, Wire, Client, Rules, Filters, Record, Relay,
Management, Operations, Stand-in, Main.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the files can be read again, SIGHUP must not end it
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

import asyncio
import bisect
import calendar
import codecs
import collections
import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import select
import socket
import ssl
import struct
import sys
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypedDict, TypeVar, cast

import tornado
from tornado import httputil, netutil, web
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.log import define_logging_options
from tornado.netutil import bind_sockets
from tornado.options import Error as OptionError
from tornado.options import OptionParser
from tornado.tcpclient import TCPClient

__version__ = "1.0.0"

log = logging.getLogger("gateway")

KIB = 1024
MIB = 1024 * KIB


# ─── Settings ─────────────────────────────────────────────────────────────────────────────────────

ANTHROPIC_API = "https://api.anthropic.com"
MOCK_UPSTREAM = "mock"
# Anthropic's limit on a file is 500 MB (api/overview, "Request size limits")
MAX_BODY_SIZE = 512 * MIB
WEAK_MASTER_KEYS = frozenset({"sk-1234"})  # LiteLLM's documented example, known to everybody
MIN_MASTER_KEY_LENGTH = 16  # below this a key can be guessed
WEAK_MASTER_KEY = "the master key is weak: take 16 characters or more that nobody can guess"
options = OptionParser()
define = functools.partial(options.define, group="Gateway")
define("port", default=4000, type=int, help="port to listen on; 0 takes a free one")
define(
    "address",
    default="",
    help="address to listen on; the default is every address, and loopback only in open mode"
    " (no master key set and no key in the keys file)",
)
define(
    "upstream",
    default="",
    help=f"where to relay to: an http or https URL, or 'mock' for the built-in stand-in"
    f" (default $ANTHROPIC_API_BASE or {ANTHROPIC_API})",
)
define("keys", default="keys.json", help="file that holds the virtual keys")
define(
    "connect-timeout", default=10.0, type=float, help="seconds to wait for a connection upstream"
)
define(
    "idle-timeout",
    default=600.0,
    type=float,
    help="seconds of silence after which an exchange, or a connection without one, ends",
)
define(
    "client-timeout",
    default=60.0,
    type=float,
    help="seconds that a request's head may take, and its body may stand still",
)
define(
    "max-connections-per-address",
    default=4096,
    type=int,
    help="connections that one address may have open (not counted with --xheaders)",
)
define(
    "drain-timeout",
    default=30.0,
    type=float,
    help="seconds that running requests get when stopping",
)
define("max-body-size", default=MAX_BODY_SIZE, type=int, help="largest request body, in bytes")
define(
    "max-held-bytes",
    default=0,
    type=int,
    help="bytes of request bodies held at once, a quarter of it for one key; the default is a"
    " quarter of the machine's or the cgroup's memory",
)
define(
    "prices",
    default="",
    help="JSON file of model (or pattern with *) to USD per million tokens; wins over genai-prices",
)
define("usage-days", default=90, type=int, help="days for which usage is kept")
define("recent-requests", default=10_000, type=int, help="requests that /spend/logs remembers")
define(
    "unix-socket",
    default="",
    help="listen on this Unix socket, for a proxy on the same machine, instead of a port",
)
define(
    "certfile",
    default="",
    help="PEM file with the certificate chain to serve TLS with; read again on SIGHUP",
)
define("keyfile", default="", help="its private key, where --certfile does not hold it")
define(
    "xheaders",
    default=False,
    type=bool,
    help="believe X-Real-Ip, X-Forwarded-For and X-Forwarded-Proto of a proxy in front",
)
define("open-metrics", default=False, type=bool, help="let everybody read /metrics")
define("log-json", default=False, type=bool, help="write the log as JSON, a line each")
define(
    "check",
    default=False,
    type=bool,
    help="say whether all is well to start, and end: 0 if so, 1 if not",
)
define("config", default="", help="Python file with options, one name = value a line")
define_logging_options(options)


class SettingsError(Exception):
    """A wrong option, variable or keys file; the message is one line for whoever starts the gateway."""


TIMEOUTS = ("connect_timeout", "idle_timeout", "client_timeout", "drain_timeout")


@dataclass(frozen=True)
class Settings:
    """What the gateway runs with. Times are seconds, sizes bytes; secrets never show in its repr."""

    port: int = 4000
    address: str = ""
    upstream: str = ANTHROPIC_API
    keys: Path = Path("keys.json")
    connect_timeout: float = 10.0
    idle_timeout: float = 600.0
    client_timeout: float = 60.0
    drain_timeout: float = 30.0
    max_body_size: int = MAX_BODY_SIZE
    max_connections_per_address: int = 4096
    max_held_bytes: int = 0
    prices: Path | None = None
    usage_days: int = 90
    recent_requests: int = 10_000
    unix_socket: str = ""
    certfile: str = ""
    keyfile: str = ""
    xheaders: bool = False
    open_metrics: bool = False
    api_key: str = field(default="", repr=False)
    auth_token: str = field(default="", repr=False)
    master_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"--port: {self.port} is not a port number (0 to 65535)")
        for name in TIMEOUTS:
            value = getattr(self, name)
            least = 0 if name == "drain_timeout" else 0.001
            if not least <= value < float("inf"):
                raise SettingsError(f"--{name.replace('_', '-')}: {value} is not a time in seconds")
        for name in ("usage_days", "recent_requests", "max_connections_per_address"):
            if getattr(self, name) < 1:
                raise SettingsError(f"--{name.replace('_', '-')}: must be at least 1")
        if self.max_body_size < 1:
            raise SettingsError(f"--max-body-size: {self.max_body_size} is not a size in bytes")
        if self.max_held_bytes < 0:
            raise SettingsError("--max-held-bytes: must be at least 1, or 0 for default")
        if self.keyfile and not self.certfile:
            raise SettingsError("--keyfile: needs --certfile")
        if self.unix_socket and self.certfile:
            raise SettingsError("--unix-socket: takes no --certfile; the proxy has it")
        if self.upstream != MOCK_UPSTREAM:
            parse_upstream(self.upstream)

    @property
    def has_weak_master_key(self) -> bool:
        """Whether the master key can be guessed."""
        short = len(self.master_key) < MIN_MASTER_KEY_LENGTH
        return short or self.master_key in WEAK_MASTER_KEYS

    @property
    def real_credential(self) -> tuple[str, str] | None:
        """The header that carries the real key upstream, as (name, value); None where no key is set."""
        if self.api_key:
            return "x-api-key", self.api_key
        if self.auth_token:
            return "Authorization", f"Bearer {self.auth_token}"
        return None


# Where Linux says how much memory a container may use: cgroup v2 and v1.
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory_size() -> int:
    """Bytes of memory that this process may use: the machine's, or the cgroup's where it is less."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max", or no cgroup
            size = min(size, int(path.read_text()))
    return size


DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Origin:
    """Where connections go: scheme ``http`` or ``https``, host (no brackets) and port."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The value of the Host header (RFC 9112 section 3.2): no port where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_upstream(url: str) -> tuple[Origin, str]:
    """Split an upstream URL into its origin and base path (no trailing slash). Raises SettingsError."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"--upstream: {url!r} is not a URL ({error})") from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise SettingsError(f"--upstream: {url!r} is not an http or https URL, nor 'mock'")
    if parts.username is not None or parts.query or parts.fragment:
        raise SettingsError("--upstream: takes a scheme, a host and a base path, nothing else")
    if not re.fullmatch(r"[\x21-\x7e]*", url):
        raise SettingsError(f"--upstream: {url!r} has characters that a URL cannot have")
    origin = Origin(parts.scheme, parts.hostname, port or DEFAULT_PORTS[parts.scheme])
    return origin, parts.path.rstrip("/")


def secret_from(environment: Mapping[str, str], *names: str) -> str:
    """The first of these variables that is not empty, without white space around it."""
    for name in names:
        value = environment.get(name, "").strip()
        if value and not re.fullmatch(r"[\x21-\x7e]+", value):
            raise SettingsError(f"{name} holds characters that a header cannot carry; set it again")
        if value:
            return value
    return ""


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Read the command line (without the program's name), ``--config`` and the environment.

    The command line wins over the file. Raises SettingsError. ANTHROPIC_BASE_URL is not read: on a
    user's machine it names this very gateway.
    """
    parse_arguments(arguments)
    if options.config:
        try:
            options.parse_config_file(options.config, final=False)
        except Exception as error:  # noqa: BLE001 - the file is Python, it can fail in any way
            raise SettingsError(f"--config: {options.config}: {error}") from None
        parse_arguments(arguments)
    options.run_parse_callbacks()
    return Settings(
        port=options.port,
        address=options.address,
        upstream=options.upstream
        or environment.get("ANTHROPIC_API_BASE", "").strip()
        or ANTHROPIC_API,
        keys=Path(options.keys),
        connect_timeout=options.connect_timeout,
        idle_timeout=options.idle_timeout,
        client_timeout=options.client_timeout,
        drain_timeout=options.drain_timeout,
        max_body_size=options.max_body_size,
        max_connections_per_address=options.max_connections_per_address,
        max_held_bytes=options.max_held_bytes,
        prices=Path(options.prices) if options.prices else None,
        usage_days=options.usage_days,
        recent_requests=options.recent_requests,
        unix_socket=options.unix_socket,
        certfile=options.certfile,
        keyfile=options.keyfile,
        xheaders=options.xheaders,
        open_metrics=options.open_metrics,
        api_key=secret_from(environment, "ANTHROPIC_API_KEY"),
        auth_token=secret_from(environment, "ANTHROPIC_AUTH_TOKEN"),
        master_key=secret_from(environment, "GATEWAY_MASTER_KEY", "LITELLM_MASTER_KEY"),
    )


def parse_arguments(arguments: Sequence[str]) -> None:
    """Hand the arguments to tornado.options one by one, so that an error can name its own."""
    names = {name.replace("_", "-") for name in (*options, "help")}
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0].replace("_", "-")
        if not argument.startswith("-") or name not in names:
            raise SettingsError(f"{argument}: not an option (--help lists them)")
        try:
            options.parse_command_line(["gateway.py", argument], final=False)
        except OptionError as error:
            raise SettingsError(f"{argument}: {error} (--help lists the options)") from None
        except ValueError:
            raise SettingsError(f"{argument}: the value is not a number") from None


# ─── Errors ───────────────────────────────────────────────────────────────────────────────────────

# Anthropic's error types by status (platform.claude.com, api/errors). 405, 408 and 431 are not
# in its table; they are the caller's mistakes.
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "api_error",
    501: "api_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
FAILED_HERE = "The gateway failed on this request; its log says why."
# The SDKs look at it before the status (anthropic/_base_client.py, _should_retry).
DO_NOT_RETRY = ("x-should-retry", "false")


class APIError(Exception):
    """The only way to say no: becomes Anthropic's error envelope with this status.

    ``kind`` is ``error.type``, by default the one that goes with the status. ``headers`` are sent
    beside it. The message is for the client: it never holds a key, a hash or a path of the machine.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or ERROR_TYPES[status]
        self.headers = tuple(headers)
        if status == 401:  # the SDKs and Claude Code would try again for minutes
            self.headers += (DO_NOT_RETRY,)

    def body(self, request_id: str) -> bytes:
        """The envelope as JSON (platform.claude.com, api/errors, "Error shapes")."""
        error = {"type": self.kind, "message": self.message}
        return json.dumps({"type": "error", "error": error, "request_id": request_id}).encode()


# ─── Time and money ───────────────────────────────────────────────────────────────────────────────

DURATION = re.compile(r"([0-9]{1,9})(mo|s|m|h|d|w)", re.ASCII)
DURATION_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST_MONDAY = datetime(1970, 1, 5, tzinfo=UTC)
END_OF_TIME = datetime(9999, 12, 31, tzinfo=UTC)
SNAPPED_DURATIONS = {"7d": "1w", "30d": "1mo"}
ZERO = Decimal(0)
MINUTE = 60.0


def now() -> datetime:
    """The present moment, UTC, to the second."""
    return moment_of(int(time.time()))


@functools.lru_cache(maxsize=64)
def moment_of(second: int) -> datetime:
    """A second of Unix time as a moment; kept, since a busy gateway asks many times a second."""
    return datetime.fromtimestamp(second, UTC)


def later(start: datetime, duration: str) -> datetime:
    """``start`` plus a duration like ``30s 30m 30h 30d 2w 1mo`` (LiteLLM's units; a month is a
    calendar month). Raises ValueError for anything else or a date past the year 9999."""
    match = DURATION.fullmatch(duration)
    if not match:
        raise ValueError(f"{duration!r} is not a duration: a number and one of s, m, h, d, w, mo")
    amount, unit = int(match[1]), match[2]
    try:
        if unit != "mo":
            return start + timedelta(**{DURATION_UNITS[unit]: amount})
        years, month = divmod(start.month - 1 + amount, 12)
        year, month = start.year + years, month + 1
        return start.replace(
            year=year, month=month, day=min(start.day, calendar.monthrange(year, month)[1])
        )
    except (OverflowError, ValueError, calendar.IllegalMonthError):
        raise ValueError(f"{duration!r} is too long") from None


@functools.lru_cache(maxsize=64)
def iso(moment: datetime | None) -> str | None:
    """A moment as ``2026-11-22T07:00:00Z``."""
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def from_iso(text: object) -> datetime | None:
    """The reverse of `iso`; any ISO 8601 moment is read, one without a zone as UTC.
    Raises ValueError or TypeError."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not a time")
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


@functools.lru_cache(maxsize=64)
def day_of(moment: datetime) -> str:
    """The UTC day of a moment, as an ISO date."""
    return moment.date().isoformat()


@functools.lru_cache(maxsize=64)
def hour_of(moment: datetime) -> int:
    """The hour of a moment, counted from 1970."""
    return int(moment.timestamp()) // 3600


@functools.lru_cache(maxsize=256)
def window(duration: str, moment: datetime) -> tuple[datetime, datetime]:
    """The budget window that ``moment`` falls in: its start and its end, on the UTC calendar.

    As LiteLLM snaps them: ``1d`` from midnight, ``7d`` and ``1w`` from Monday, ``30d`` and ``1mo`` from
    the 1st, ``1h`` from the hour; other lengths count on from the epoch. One that leads out of the
    calendar never ends. Raises ValueError for what is no length of time.
    """
    match = DURATION.fullmatch(SNAPPED_DURATIONS.get(duration, duration))
    if not match or int(match[1]) == 0:
        raise ValueError(f"{duration!r} is not a length of time above zero, like '30d'")
    amount, unit = int(match[1]), match[2]
    try:
        if unit == "mo":
            month = (moment.year * 12 + moment.month - 1) // amount * amount
            start = datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC)
        else:
            step = timedelta(**{DURATION_UNITS[unit]: amount})
            origin = FIRST_MONDAY if unit == "w" else EPOCH
            start = origin + (moment - origin) // step * step
        return start, later(start, f"{amount}{unit}")
    except (ValueError, OverflowError):
        return EPOCH, END_OF_TIME


@functools.lru_cache(maxsize=256)
def window_start(duration: str | None, moment: datetime) -> str:
    """The name of a budget's present window; empty for a budget that never resets."""
    return "" if duration is None else cast(str, iso(window(duration, moment)[0]))


@dataclass(slots=True)
class Tally:
    """What was used: requests, of them errors, each kind of token, web searches, and USD spent."""

    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    web_searches: int = 0
    spend: Decimal = ZERO

    def add(self, other: Tally) -> None:
        """Count another tally in."""
        self.requests += other.requests
        self.errors += other.errors
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        if other.cached:
            self.cache_read_tokens += other.cache_read_tokens
            self.cache_write_5m_tokens += other.cache_write_5m_tokens
            self.cache_write_1h_tokens += other.cache_write_1h_tokens
        self.web_searches += other.web_searches
        self.spend += other.spend

    @property
    def written(self) -> int:
        """Tokens written to the cache."""
        return self.cache_write_5m_tokens + self.cache_write_1h_tokens

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were read from the cache or written to it."""
        return self.cache_read_tokens + self.written

    def to_json(self) -> dict[str, Any]:
        """As an object; the amount as a string, since JSON's numbers are no decimals."""
        counts = {name: getattr(self, name) for name in TALLY_FIELDS}
        return {name: value for name, value in counts.items() if value} | {"spend": str(self.spend)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Tally:
        """Read it back. Raises ValueError or TypeError."""
        if any(type(n) is not int or n < 0 for name, n in record.items() if name != "spend"):
            raise ValueError("has a wrong count in 'usage'")
        return cls(**{**record, "spend": read_decimal(record["spend"])})


TALLY_FIELDS = tuple(f.name for f in dataclasses.fields(Tally))


def read_decimal(value: object) -> Decimal:
    """A finite amount that is not negative, from a JSON string or number. Raises ValueError
    or TypeError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is not an amount")
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is not an amount") from None
    if not amount.is_finite() or amount < 0:
        raise ValueError(f"{value!r} is not an amount from zero up")
    return amount


def dollars(amount: Decimal) -> str:
    """An amount for a message: at least cents, at most six digits behind the point."""
    text = f"{amount:.6f}".rstrip("0")
    return f"{amount:.2f}" if len(text.partition(".")[2]) < 2 else text


def usd(amount: Decimal | None) -> float | None:
    """An amount as a JSON number, for answers only: what is kept and added stays decimal."""
    return None if amount is None else float(amount)


MAX_MODELS_A_DAY = 50  # names come from requests; beyond these they are counted together
OTHER_MODELS = "other"


class Usage:
    """What a key used, by UTC day (ISO date) and model. Days past are kept as the JSON text that
    they have in the file, so that their number costs nothing."""

    def __init__(self, days: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._open: dict[str, dict[str, Tally]] = {}
        self._closed: dict[str, str] = {}
        for day, models in (days or {}).items():
            datetime.fromisoformat(day)
            tallies = {model: Tally.from_json(tally) for model, tally in models.items()}
            self._closed[day] = day_json(tallies)

    def add(self, day: str, model: str, tally: Tally) -> None:
        """Count a tally in."""
        self._tally(day, model).add(tally)

    def count(self, day: str, model: str, *, failed: bool) -> None:
        """Count a request."""
        tally = self._tally(day, model)
        tally.requests += 1
        tally.errors += failed

    def days(self, first: str = "", last: str = "9999") -> Iterator[tuple[str, str, Tally]]:
        """(day, model, tally) of every day from first to last, in order."""
        for day in sorted({*self._open, *self._closed}):
            if first <= day <= last:
                models = self._open.get(day) or self._read(day)
                for model, tally in models.items():
                    yield day, model, tally

    def to_json(self, today: str, keep_from: str) -> str:
        """The JSON text; days before ``keep_from`` are forgotten."""
        for day in [day for day in self._open if day < today]:
            self._closed[day] = day_json(self._open.pop(day))
        for day in [day for day in self._closed if day < keep_from]:
            del self._closed[day]
        days = self._closed | {day: day_json(models) for day, models in self._open.items()}
        return "{" + ", ".join(f'"{day}": {text}' for day, text in days.items()) + "}"

    def _tally(self, day: str, model: str) -> Tally:
        """The tally of a day and model, to be counted in."""
        models = self._open.get(day)
        if models is None:
            models = self._open[day] = self._read(day)
            self._closed.pop(day, None)
        tally = models.get(model)
        if tally is None:
            if len(models) >= MAX_MODELS_A_DAY:
                model = OTHER_MODELS
            tally = models.setdefault(model, Tally())
        return tally

    def _read(self, day: str) -> dict[str, Tally]:
        models = json.loads(self._closed.get(day, "{}"))
        return {model: Tally.from_json(tally) for model, tally in models.items()}


def day_json(models: Mapping[str, Tally]) -> str:
    """One day's usage as JSON text."""
    return json.dumps({model: tally.to_json() for model, tally in models.items()})


class Bucket:
    """A token bucket that refills continuously, as Anthropic's own limits do (api/rate-limits).

    It holds ``limit`` and gains ``limit`` a minute. It may be drawn below zero, and then blocks.
    Times are seconds of a clock that does not jump.
    """

    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, moment: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = moment

    def level(self, moment: float) -> float:
        """How much it holds."""
        if moment != self._at:
            gained = (moment - self._at) * self.limit / MINUTE
            self._level, self._at = min(float(self.limit), self._level + gained), moment
        return self._level

    def draw(self, amount: float, moment: float) -> None:
        """Take out."""
        self._level = self.level(moment) - amount

    def seconds_until(self, wanted: float, moment: float) -> float:
        """How long until it holds that much; a minute where it never will."""
        missing = wanted - self.level(moment)
        if missing <= 0:
            return 0.0
        return missing * MINUTE / self.limit if self.limit >= wanted else MINUTE

    def resize(self, limit: int, moment: float) -> None:
        """Take another limit from now on; what was drawn stays drawn."""
        self._level = self.level(moment) + limit - self.limit
        self.limit = limit


@dataclass(slots=True)
class WindowSpend:
    """USD spent in one window of a budget, and held for requests under way (not in the file)."""

    start: str = ""
    spend: Decimal = ZERO
    held: Decimal = ZERO

    def spent(self, start: str) -> Decimal:
        """What was spent in the window that starts there; an earlier window's spend is over.

        A window before the one counted means that the clock was set back: what was spent counts on.
        """
        if self.start != start:
            if start > self.start:
                self.spend = ZERO
            self.start = start
        return self.spend


# ─── Keys ─────────────────────────────────────────────────────────────────────────────────────────

KEY_PREFIX = "sk-"
OWN_CREDENTIAL_PREFIX = "sk-ant-"  # every credential that Anthropic issues begins so
KEY_BYTES = 16  # LiteLLM: "sk-" and secrets.token_urlsafe(16), 22 characters
MIN_KEY_LENGTH = 16  # LiteLLM's limit on keys that a caller chooses
MAX_KEY_LENGTH = 256
TOMBSTONE_DAYS = 90  # how long a deleted key is told apart from one that never was


def new_key() -> str:
    """A fresh virtual key: ``sk-`` and 22 URL-safe characters."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    """The SHA-256 (hex) under which a key is kept; the plain key is kept nowhere."""
    return hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()


def key_name(key: str) -> str:
    """What may be shown of a key, as LiteLLM abbreviates it: ``sk-...`` and the last four."""
    return f"{KEY_PREFIX}...{key[-4:]}"


def printable(text: str) -> str:
    """Text for a log line: nothing in it can end the line or steer a terminal."""
    text = text[:200]
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


KEY_LIKE = re.compile(r"sk-[^\s\"\\]{13,}")  # with its prefix 16 characters or more


def mask_keys(text: str) -> str:
    """A text in which whatever looks like a key is abbreviated as `key_name` does it."""
    if KEY_PREFIX not in text:
        return text
    return KEY_LIKE.sub(lambda match: key_name(match[0]), text)


WORD_ENDS = re.compile(r'[\s"]')


def word(text: str) -> str:
    """A value for a log line of words: in quotes where it could be taken for several."""
    return json.dumps(text) if WORD_ENDS.search(text) else text


@dataclass(slots=True)
class Batch:
    """A batch that a key made: the UTC day, how many lines of its results are booked, the USD held
    for the rest of them, by budget, and whether all are ``booked``."""

    day: str
    lines: int = 0
    held: dict[str, Decimal] = field(default_factory=dict)
    booked: bool = False

    def to_json(self) -> dict[str, Any]:
        """As an object; without what says nothing."""
        record: dict[str, Any] = {"day": self.day, "lines": self.lines}
        if self.held:
            record["held"] = {p: f"{amount:f}" for p, amount in self.held.items()}
        return record | ({"booked": True} if self.booked else {})

    @classmethod
    def from_json(cls, record: Any) -> Batch:
        """Read it back; version 1.0 wrote ``[day, lines]``. Raises ValueError or TypeError."""
        if isinstance(record, list):
            day, lines = record
            record = {"day": day, "lines": lines}
        batch = cls(**record)
        datetime.fromisoformat(batch.day)
        if type(batch.lines) is not int or type(batch.booked) is not bool:
            raise TypeError("has a wrong batch")
        batch.held = {p: read_decimal(amount) for p, amount in batch.held.items()}
        return batch


ALL_MODELS = ""  # in the place of a pattern: the budget that is for all of them


@dataclass(slots=True)
class Account:
    """What a key has used, and what it has under way; shared by all versions of its record.

    ``windows`` has what was spent of each budget, by its pattern; ``hashed`` is what the key is
    kept under now. Of the large bodies that are judged, one at a time has the ``turn``.
    """

    windows: dict[str, WindowSpend] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    batches: dict[str, Batch] = field(default_factory=dict)
    last_active: datetime | None = None
    hashed: str = ""
    running: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None
    warned_window: str | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock, compare=False)

    def window(self, pattern: str = ALL_MODELS) -> WindowSpend:
        """What was spent of a budget."""
        windowed = self.windows.get(pattern)
        if windowed is None:
            windowed = self.windows[pattern] = WindowSpend()
        return windowed

    def to_json(self) -> dict[str, Any]:
        """What the file keeps, but for the usage; without what says nothing."""
        total = self.window()
        record: dict[str, Any] = {}
        models = {p: w for p, w in self.windows.items() if p and w.spend}
        if total.spend:
            record = {"spend": f"{total.spend:f}", "spend_window": total.start}
        if models:
            record["model_spend"] = {p: [w.start, f"{w.spend:f}"] for p, w in models.items()}
        if self.last_active:
            record["last_active"] = iso(self.last_active)
        if self.batches:
            record["batches"] = {n: b.to_json() for n, b in self.batches.items()}
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Account:
        """Read it back out of a line's object. Raises ValueError or TypeError."""
        spent = {ALL_MODELS: [record.get("spend_window", ""), record.get("spend", 0)]}
        spent |= record.get("model_spend", {})
        account = cls(
            windows={p: WindowSpend(s, read_decimal(n)) for p, (s, n) in spent.items()},
            usage=Usage(record.get("usage")),
            batches={n: Batch.from_json(b) for n, b in record.get("batches", {}).items()},
            last_active=from_iso(record.get("last_active")),
        )
        for batch in account.batches.values():
            for pattern, amount in batch.held.items():
                account.window(pattern).held += amount
        return account


@dataclass(frozen=True, slots=True)
class ModelBudget:
    """A budget for the models that a pattern matches: USD, and the window or None for ever."""

    limit: Decimal
    duration: str | None = None


NONE = type(None)
MOMENT_FIELDS = ("expires", "created_at", "updated_at", "deleted_at")
AMOUNT_FIELDS = ("max_budget", "soft_budget")
ACCOUNT_FIELDS = (
    "spend",
    "spend_window",
    "model_spend",
    "last_active",
    "mean_output",
    "batches",
    "usage",
)
ALWAYS_WRITTEN = ("key_name", "key_alias", "created_at", "expires")
KEY_FIELDS: dict[str, tuple[type, ...]] = {  # every field of a line, with what JSON may hold there
    "key_name": (str,),
    "key_alias": (str, NONE),
    "user_id": (str, NONE),
    "team_id": (str, NONE),
    "models": (list,),
    "allowed_routes": (list,),
    "unmetered_routes": (bool,),
    "rpm_limit": (int, NONE),
    "tpm_limit": (int, NONE),
    "max_parallel_requests": (int, NONE),
    "max_budget": (str, int, float, NONE),
    "soft_budget": (str, int, float, NONE),
    "budget_duration": (str, NONE),
    "model_max_budget": (dict,),
    "metadata": (dict,),
    "tags": (list,),
    "blocked": (bool,),
    "expires": (str, NONE),
    "created_at": (str, NONE),
    "updated_at": (str, NONE),
    "deleted_at": (str, NONE),
    "retired": (dict,),
    "spend": (str, int, float),
    "spend_window": (str,),
    "model_spend": (dict,),
    "last_active": (str, NONE),
    "mean_output": (int, float),  # written by version 1.0, and no longer used
    "batches": (dict,),
    "usage": (dict,),
}


@dataclass(slots=True)
class VirtualKey:
    """One line of keys.json: what a key is and may do. Field names are LiteLLM's.

    ``retired`` maps the hashes this key had before it was regenerated to the moment at which each
    stops working. A deleted key keeps its line for a while, so that its holder is told what happened.
    Budgets are USD, ``rpm_limit`` and ``tpm_limit`` a minute. None is no limit. ``unmetered_routes``
    lets a key with a budget spend where the gateway cannot count it.
    """

    key_name: str
    key_alias: str | None = None
    user_id: str | None = None
    team_id: str | None = None
    models: list[str] = field(default_factory=list)
    allowed_routes: list[str] = field(default_factory=list)
    unmetered_routes: bool = False
    rpm_limit: int | None = None
    tpm_limit: int | None = None
    max_parallel_requests: int | None = None
    max_budget: Decimal | None = None
    soft_budget: Decimal | None = None
    budget_duration: str | None = None
    model_max_budget: dict[str, ModelBudget] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    blocked: bool = False
    expires: datetime | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None
    retired: dict[str, datetime] = field(default_factory=dict)
    account: Account = field(default_factory=Account)

    @property
    def has_budget(self) -> bool:
        """Whether money limits it."""
        return self.max_budget is not None or bool(self.model_max_budget)

    @property
    def shown_name(self) -> str:
        """What the key is called in a log line."""
        return printable(self.key_alias or self.key_name)

    def status(self, moment: datetime) -> str:
        """LiteLLM's word for the state: ``deleted``, ``revoked`` (blocked), ``expired`` or ``active``."""
        if self.deleted_at:
            return "deleted"
        if self.blocked:
            return "revoked"
        if self.expires and moment >= self.expires:
            return "expired"
        return "active"

    def budgets(self, model: str | None = None) -> Iterator[tuple[str, ModelBudget]]:
        """The budgets that hold for a model, by pattern: ALL_MODELS is the key's own. All of them for
        a model that is not known (empty); the key's own alone where none is asked for."""
        if self.max_budget is not None:
            yield ALL_MODELS, ModelBudget(self.max_budget, self.budget_duration)
        if model is None or not self.model_max_budget:
            return
        for pattern, budget in self.model_max_budget.items():
            if not model or fnmatch.fnmatchcase(model, pattern):
                yield pattern, budget

    def spent(self, moment: datetime, pattern: str = ALL_MODELS) -> Decimal:
        """USD spent in the present window of the key's budget, or of a model's."""
        duration = self.budget_duration
        if pattern:
            duration = self.model_max_budget[pattern].duration
        return self.account.window(pattern).spent(window_start(duration, moment))

    def to_json(self) -> dict[str, Any]:
        """The line's object but for the usage; fields that say nothing are left out."""
        record = {name: getattr(self, name) for name in KEY_FIELDS if name not in ACCOUNT_FIELDS}
        for name in MOMENT_FIELDS:
            record[name] = iso(record[name])
        for name in AMOUNT_FIELDS:
            record[name] = None if record[name] is None else f"{record[name]:f}"
        record["retired"] = {old: iso(until) for old, until in self.retired.items()}
        record["model_max_budget"] = {
            pattern: {"budget_limit": f"{budget.limit:f}", "time_period": budget.duration}
            for pattern, budget in self.model_max_budget.items()
        }
        # A limit of 0 says something, though it equals False.
        return {
            name: value
            for name, value in record.items()
            if name in ALWAYS_WRITTEN or not (value is None or value is False or value in ([], {}))
        } | self.account.to_json()

    @classmethod
    def from_json(cls, record: object) -> VirtualKey:
        """Read a line's object back. Raises ValueError or TypeError that names what is wrong."""
        if not isinstance(record, dict):
            raise TypeError("is not an object")
        unknown = sorted(set(record) - set(KEY_FIELDS))
        if unknown:
            raise ValueError(f"has a field {unknown[0]!r} that this gateway does not know")
        for name, value in record.items():
            kinds = KEY_FIELDS[name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"has a wrong {name!r}")
        if "key_name" not in record:
            raise ValueError("has no 'key_name'")
        fields = {name: value for name, value in record.items() if name not in ACCOUNT_FIELDS}
        fields |= {name: from_iso(record.get(name)) for name in MOMENT_FIELDS}
        fields |= {n: read_decimal(record[n]) for n in AMOUNT_FIELDS if record.get(n) is not None}
        fields["retired"] = {
            old: from_iso(until) for old, until in record.get("retired", {}).items()
        }
        fields["model_max_budget"] = {
            pattern: ModelBudget(read_decimal(budget["budget_limit"]), budget.get("time_period"))
            for pattern, budget in record.get("model_max_budget", {}).items()
        }
        for duration in (fields.get("budget_duration"), *durations(fields["model_max_budget"])):
            if duration is not None:
                window(duration, EPOCH)
        return cls(**fields, account=Account.from_json(record))


def durations(budgets: Mapping[str, ModelBudget]) -> list[str | None]:
    """The windows of these budgets."""
    return [budget.duration for budget in budgets.values()]


# ─── Anthropic ────────────────────────────────────────────────────────────────────────────────────

ANTHROPIC_VERSION = "2023-06-01"  # platform.claude.com, api/versioning
JSON_BODY_LIMIT = 32 * MIB  # Anthropic's limit on messages; larger ones are streamed
EVENT_STREAM = "text/event-stream"
# Claude Code names its session and the agent within it (CCD llm-gateway, "Request headers").
SESSION_FIELD, AGENT_FIELD = "x-claude-code-session-id", "x-claude-code-agent-id"
TAGS_FIELD = "x-litellm-tags"
WORKSPACE_FIELD = "anthropic-workspace-id"  # chooses a workspace of the real key's owner


@dataclass(frozen=True, slots=True)
class Route:
    """What a method and a path mean to the rules.

    ``open``: every key may call it, as far as its ``allowed_routes`` go. ``group``: what a pattern of
    them must begin with to open it otherwise. ``billed``: it orders something that costs money and
    that can be estimated. ``free``: no budget stands against it (counting, models, fetching paid
    batches). ``metered``: its answer may say what was used. ``batch``: it is answered with batch
    objects; ``batch_id`` is the batch that it names, ``deletes`` says that it deletes it.
    ``results_of``: the batch it fetches the results of. ``unread``: no rule looks at its body.
    """

    open: bool
    group: str
    billed: bool
    free: bool
    metered: bool
    batch: bool
    makes_batch: bool
    batch_id: str
    deletes: bool
    results_of: str
    unread: bool


# What every virtual key reaches. All else (sessions, agents, deployments, administration, logins, and
# what will be added tomorrow) may cost what the gateway cannot count, or give out what it guards.
OPEN = re.compile(
    r"(?sa)/v1/(?:messages(?:/count_tokens|/cache_touch|/batches(?:/[\w-]+(?:/(?:results|cancel))?)?)?"
    r"|complete"
    r"|(?:models|files|skills)(?:/.*)?)/?"
)
OPEN_NAMES = (
    *("/v1/messages/batches/", "/v1/messages/count_tokens", "/v1/messages/cache_touch"),
    *("/v1/complete", "/v1/models/", "/v1/files/", "/v1/skills/"),
)
GROUP = re.compile(r"/v1/messages(?:/[^/]*)?|/v1(?:/[^/]*)?|/?[^/]*")
UPLOAD = re.compile(r"(?s)/v1/(?:files|skills)(?:/.*)?")
BILLED = re.compile(r"/v1/(?:messages|complete|messages/batches|messages/cache_touch)/?")
FREE = re.compile(r"/v1/(?:messages/count_tokens|models(?:/[^/]*)?)/?")
METERED = re.compile(
    r"(?s)/v1/(?:messages|complete|messages/cache_touch|messages/batches(?:/.*)?)/?"
)
BATCHES = re.compile(r"(?s)/v1/messages/batches(?:/.*)?")
BATCHES_MADE = re.compile(r"/v1/messages/batches/?")
BATCH_NAMED = re.compile(r"/v1/messages/batches/([^/]+)")
BATCH_OBJECT = re.compile(r"/v1/messages/batches(?:/[^/]+(?:/cancel)?)?/?")
CANCEL = re.compile(r"(?a)/v1/messages/batches/[\w-]+/cancel/?")
RESULTS = re.compile(r"/v1/messages/batches/([^/]+)/results/?")
WILDCARD = re.compile(r"[*?\[]")
METRICS_PATH = "/metrics"


def read_route(method: str, path: str) -> Route:
    """Classify a request by its method in capitals and its decoded path."""
    fetches = method in ("GET", "HEAD", "OPTIONS")
    # What orders something that its path does not tell is closed; a batch's own id is none of that.
    known = fetches or method == "DELETE" or BATCH_NAMED.match(path) is None
    results = RESULTS.fullmatch(path) if method == "GET" else None
    named = BATCH_NAMED.match(path)
    return Route(
        open=OPEN.fullmatch(path) is not None and (known or CANCEL.fullmatch(path) is not None),
        group=cast("re.Match[str]", GROUP.match(path))[0],
        billed=not fetches and BILLED.fullmatch(path) is not None,
        free=(fetches and BATCHES.fullmatch(path) is not None) or FREE.fullmatch(path) is not None,
        metered=METERED.fullmatch(path) is not None,
        batch=method in ("GET", "POST") and BATCH_OBJECT.fullmatch(path) is not None,
        makes_batch=not fetches and BATCHES_MADE.fullmatch(path) is not None,
        batch_id=named[1] if named else "",
        deletes=method == "DELETE",
        results_of=results[1] if results else "",
        unread=fetches or UPLOAD.fullmatch(path) is not None,
    )


read_kept_route = functools.lru_cache(maxsize=1024)(read_route)
KEPT_PATH = 200  # characters


def route_of(method: str, path: str) -> Route:
    """`read_route`, which is done once for paths of common length."""
    return (read_kept_route if len(path) <= KEPT_PATH else read_route)(method, path)


def unmetered(pattern: str) -> bool:
    """Whether a pattern of ``allowed_routes`` opens a route that may cost what cannot be counted."""
    literal = WILDCARD.split(pattern.removeprefix("/anthropic"))[0]
    if literal.startswith(METRICS_PATH) or OPEN.fullmatch(literal):
        return False
    return not any(name.startswith(literal) for name in OPEN_NAMES)


MAX_COUNT = 10**9  # tokens; whoever counts more is not believed
MAX_OUTPUT = 128_000  # tokens that an answer may have where the request does not say
MAX_MODEL_NAME = 100
# What is known of a text before its tokens are: 3 bytes each, a little more than Anthropic's rule of
# thumb for English (4 characters), and right for Chinese, Japanese and Korean (3 bytes a character).
BYTES_A_TOKEN = 3
UNSEEN_THINKING = 4  # the part of max_tokens that thinking unseen is taken for
Result = TypeVar("Result")
# What is done in steps, between which the loop may do something else.
Steps = Generator[None, None, Result]


def at_once(steps: Steps[Result]) -> Result:
    """What comes of steps that are few."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return cast(Result, stop.value)


def tokens_in(size: int) -> int:
    """How many tokens so many bytes of text are taken for."""
    return -(-size // BYTES_A_TOKEN)


def model_of(value: object) -> str:
    """A model's name, printable and short enough for a log."""
    return printable(value[:MAX_MODEL_NAME]) if isinstance(value, str) else ""


def count_of(usage: object, *path: str) -> int:
    """A count out of a usage object; 0 where there is none that can be believed."""
    for name in path:
        usage = usage.get(name) if isinstance(usage, dict) else None
    return usage if type(usage) is int and 0 < usage <= MAX_COUNT else 0


def is_event_stream(head: Head) -> bool:
    """Whether a message's body is server-sent events."""
    return head.get("content-type").lower().startswith(EVENT_STREAM)


def is_json(content_type: str) -> bool:
    """Whether a media type is JSON (RFC 6839: or ends in ``+json``)."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def read_json(body: bytes) -> object:
    """What a body says; None where it cannot be read."""
    try:
        return cast(object, json.loads(str(body, "utf-8")))
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Keep the garbage collector away while a document is made, all of which is in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def decoder_of(members: type) -> Callable[[bytes], Any] | None:
    """msgspec's reader of the members that a TypedDict names; None where it is not installed."""
    try:
        import msgspec
    except ImportError:
        return None
    return cast("Callable[[bytes], Any]", msgspec.json.Decoder(members).decode)


def read_members(body: bytes, members: type) -> object:
    """What a body says of some members, and maybe of others: msgspec skips what it is not asked for,
    `json`, which takes five times as long, makes it all. None where it cannot be read."""
    decode = decoder_of(members)
    with no_collector():
        if decode is not None:
            with contextlib.suppress(Exception):  # what msgspec cannot read, json may
                return cast(object, decode(body))
        return read_json(body)


# What prices a part of an order: its model, whether in fast mode, and whether in the US.
Part = tuple[str, bool, bool]
MAX_MODELS = 20  # of one request that are priced apart


@dataclass(slots=True)
class Order:
    """What a request asks for, as far as its price goes: all of it estimated before, at worst.

    ``model`` is the first it names, ``prompt`` its length in tokens, ``thinking`` those that may be
    thought unseen. ``parts`` has, for each Part, tokens of prompt, tokens of output and web searches;
    where it is empty, ``model`` has the prompt and ``max_tokens``. ``prompts`` is how many messages
    share the prompt. ``cache`` is ``5m`` or ``1h`` where it may be written to the cache.
    """

    model: str = ""
    prompt: int = 0
    max_tokens: int = MAX_OUTPUT
    thinking: int = 0
    streams: bool = False
    parts: dict[Part, list[int]] = field(default_factory=dict)
    prompts: int = 1
    batched: bool = False
    cache: str = ""

    def add(self, part: Part, prompt: int, output: int, searches: int = 0) -> None:
        """Count in what an attempt may use; beyond MAX_MODELS the model is any."""
        if part not in self.parts and len(self.parts) >= MAX_MODELS:
            part = ("", *part[1:])
        counts = self.parts.setdefault(part, [0, 0, 0])
        counts[0] += prompt
        counts[1] += output
        counts[2] += searches


# What no client sends, and what would take the loop away from others: with its hook `json` makes 2
# objects or members a microsecond, and 30 numbers. A batch may have more, by its rows and its size.
MAX_CONTAINERS = 60_000
MAX_MEMBERS = 100_000
MAX_ITEMS = 500_000
MAX_ROWS = 100_000  # Anthropic's limit on a batch (PLD batch-processing)
CONTAINERS_A_ROW, MEMBERS_A_ROW = 20, 40
BYTES_A_CONTAINER = 40  # of a batch's rows, at least; half of it for a member
MAX_ATTEMPTS = 10_000  # tools or fallbacks of one message
MAX_DEPTH = 1000  # where Python 3.11's own parser gives up too, and later ones do not
UNCOUNTED_BODY = 192 * KIB  # smaller ones cannot hold so much
BREATH = 2000  # rows or members that are looked at at once
AT_ONCE = 32 * KIB  # bytes that are read without a step before
SLICE = 32 * KIB  # of a larger body, all of which json reads in some 10 ms
LIGHT_BODY = 4 * MIB  # and one with no more in it than LIGHT is read in as long
LIGHT = (8000, 16_000, 100_000)  # containers, members, items
LONG_TEXT = "…"  # stands for a string that is longer, which names no model
MISSING = object()
JSON_BLANKS = re.compile(r"[ \t\n\r]*")
STRING_INSIDE = re.compile(r'[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*')


def weigh(body: bytes, route: Route) -> Steps[bool]:
    """Whether a body can be read at once. Raises APIError 400 for one whose reading would take too
    long in whatever slices."""
    if len(body) <= UNCOUNTED_BODY:
        return True
    counted, counts = 0, (0, 0, 0)
    for start in range(0, len(body), MIB):
        part = body[start : start + MIB]
        counted += part.count(b'"custom_id"')
        counts = added(counts, marks_of(part))
        yield
    rows = min(counted, MAX_ROWS) if route.makes_batch else 0
    limits = (
        MAX_CONTAINERS + min(CONTAINERS_A_ROW * rows, len(body) // BYTES_A_CONTAINER),
        MAX_MEMBERS + min(MEMBERS_A_ROW * rows, 2 * len(body) // BYTES_A_CONTAINER),
        MAX_ITEMS + min(MEMBERS_A_ROW * rows, 2 * len(body) // BYTES_A_CONTAINER),
    )
    if not exceeds(counts, limits):
        return len(body) <= LIGHT_BODY and not exceeds(counts, LIGHT)
    counts = (0, 0, 0)
    for text in outside_strings(body):  # where code and tables have none
        counts = added(counts, marks_of(text))
        yield
    if exceeds(counts, limits):
        raise APIError(
            400,
            "The body has more lists, objects or members than any model can read. This key's"
            " requests are read; send less at a time.",
        )
    return False


Marks = tuple[int, int, int]  # containers, members, items


def marks_of(body: bytes) -> Marks:
    """How many containers, members and items a JSON text has at most."""
    return body.count(b"[") + body.count(b"{"), body.count(b":"), body.count(b",")


def added(counts: Marks, more: Marks) -> Marks:
    """The sums of these."""
    return counts[0] + more[0], counts[1] + more[1], counts[2] + more[2]


def exceeds(counts: Marks, limits: Marks) -> bool:
    """Whether one of these counts is above its limit."""
    return any(count > limit for count, limit in zip(counts, limits, strict=True))


def outside_strings(body: bytes) -> Iterator[bytes]:
    """A JSON text without its strings, a slice at a time."""
    at, inside = 0, False
    while at < len(body):
        # No slice ends within an escape.
        end = backslashes_end(body, at + SLICE) if at + SLICE < len(body) else len(body)
        slice_ = body[at:end].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = slice_.split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0
        at = end


BACKSLASHES = re.compile(rb"\\*")


def backslashes_end(body: bytes, at: int) -> int:
    """The first place from there on that has no backslash before it."""
    while body[at - 1 : at] == b"\\":
        run = BACKSLASHES.match(body, at)
        at = (run.end() if run else at) + 1
    return at


NESTING = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
NO_BRACKETS = bytes(set(range(256)) - NESTING.keys())


def is_deeper(body: bytes, limit: int) -> Steps[bool]:
    """Whether a JSON text is nested more than ``limit`` levels deep."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    depth = 0
    for text in outside_strings(body):
        steps = (NESTING[mark] for mark in text.translate(None, NO_BRACKETS))
        depths = list(itertools.accumulate(steps, initial=depth))
        if max(depths) > limit:
            return True
        depth = depths[-1]
        yield
    return False


def read_strictly(body: bytes, route: Route) -> Steps[object]:
    """Read a body in which a rule looks for models. Raises APIError 400 for what two readers of one
    JSON may understand differently: what is checked is what is sent."""
    light = yield from weigh(body, route)
    if (yield from is_deeper(body, MAX_DEPTH)):
        raise unclear(f"it is more than {MAX_DEPTH} levels deep")
    try:
        return (yield from read_slowly(body, PLACES if route.open else None, light))
    except (ValueError, RecursionError):
        raise unclear("the body is not readable as JSON") from None


def unclear(reason: str) -> APIError:
    """The answer to a body of which it is not clear what it says."""
    return APIError(400, f"This key is limited to some models, and {reason}.")


def read_leniently(body: bytes, route: Route) -> Steps[object]:
    """Read of a body what its price depends on; None where it cannot be read."""
    light = yield from weigh(body, route)
    decode = decoder_of(BodyMembers)
    if decode is not None:
        with no_collector(), contextlib.suppress(Exception):
            return decode(body)
    try:
        return (yield from read_slowly(body, PLACES, light))
    except (ValueError, RecursionError):
        return None


def read_slowly(body: bytes, names: frozenset[str] | None, light: bool) -> Steps[object]:
    """What a body says; of one that is not light no more than the members of these names (None: all).
    Raises ValueError, RecursionError."""
    if len(body) > AT_ONCE:
        yield
    reader = JSONReader(body, None, len(body)) if light else JSONReader(body, names)
    return (yield from reader.read())


@dataclass
class Holder:
    """A list or an object that is being read, ``end`` its last character."""

    end: str
    names: list[Any] = field(default_factory=list)
    values: list[object] = field(default_factory=list)


ENDS = {"[": "]", "{": "}"}


class JSONReader:
    """Reads a JSON text as `json.loads` does, a slice at a time, so that the loop may do something
    else in between: what is longer than a slice is read by its parts.

    Of objects only the members that are in ``names`` are kept (None: all), so that what was read takes
    little memory; an object with a place of a model that could be read in two ways is an `Ambiguous`.
    A string longer than a slice stands as LONG_TEXT.
    """

    def __init__(self, body: bytes, names: frozenset[str] | None, slice_size: int = SLICE) -> None:
        self._body = body
        self._size = slice_size
        self._made = functools.partial(object_of, names) if names else object_of_all
        decoder = json.JSONDecoder(object_pairs_hook=self._made)
        self._scan = cast(Any, decoder).scan_once
        self._begin = self._end = 0  # of the window, in the body
        self._window = ""
        self._at = 0  # in the window
        self._move()

    def read(self) -> Steps[object]:
        """The document. Raises ValueError, RecursionError."""
        holders: list[Holder] = []
        while True:
            if holders and holders[-1].end == "}":
                holders[-1].names.append((yield from self._name()))
            value = self._take()
            if value is MISSING:
                value = yield from self._longer()
            if value is MISSING:
                holders.append(Holder(ENDS[self._step()]))
                if (yield from self._next()) != holders[-1].end:
                    continue
                self._step()
                value = self._made_of(holders.pop())
            while holders:
                holders[-1].values.append(value)
                mark = yield from self._next()
                self._step()
                if mark == ",":
                    break
                if mark != holders[-1].end:
                    raise ValueError("neither the end nor another part")
                value = self._made_of(holders.pop())
            else:
                if (yield from self._next()):
                    raise ValueError("something follows the document")
                return value

    def _move(self) -> None:
        """Let the window begin where reading has come to."""
        self._begin += len(self._window[: self._at].encode())
        piece = self._body[self._begin : self._begin + self._size]
        is_last = self._begin + len(piece) == len(self._body)
        self._window, size = codecs.utf_8_decode(piece, "strict", is_last)
        self._end, self._at = self._begin + size, 0

    @property
    def _is_last(self) -> bool:
        return self._end == len(self._body)

    def _next(self) -> Steps[str]:
        """The next character that is no whitespace; "" at the end."""
        while True:
            self._skip()
            if self._at < len(self._window) or self._is_last:
                return self._window[self._at : self._at + 1]
            yield
            self._move()

    def _skip(self) -> None:
        blank = JSON_BLANKS.match(self._window, self._at)
        self._at = blank.end() if blank else self._at

    def _take(self) -> object:
        """The next value, where it is whole in the window; else MISSING."""
        self._skip()
        try:
            value, end = self._scan(self._window, self._at)
        except (ValueError, StopIteration):
            return MISSING
        if end + len("e+0") > len(self._window) and not self._is_last:
            return MISSING  # since a number may go on
        self._at = end
        return cast(object, value)

    def _longer(self) -> Steps[object]:
        """A value that is not whole in the window; MISSING before a container longer than a slice."""
        yield
        mark = yield from self._next()
        if self._at:
            self._move()
        if (value := self._take()) is not MISSING:
            return value
        if self._is_last or mark not in '["{':
            raise ValueError("no value")
        return (yield from self._long_text()) if mark == '"' else MISSING

    def _name(self) -> Steps[object]:
        """The name of a member, up to its value."""
        if (yield from self._next()) != '"':
            raise ValueError("no name")
        name = self._take()
        if name is MISSING:
            name = yield from self._longer()
        if (yield from self._next()) != ":":
            raise ValueError("no value of the member")
        self._step()
        return name

    def _step(self) -> str:
        """Go on by a character, which it is."""
        self._at += 1
        return self._window[self._at - 1 : self._at]

    def _made_of(self, holder: Holder) -> object:
        if holder.end == "]":
            return holder.values
        return self._made(list(zip(holder.names, holder.values, strict=True)))

    def _long_text(self) -> Steps[str]:
        """Go to the end of a string that is longer than the window."""
        self._at += 1
        while True:
            inside = STRING_INSIDE.match(self._window, self._at)
            self._at = inside.end() if inside else self._at
            if self._window[self._at : self._at + 1] == '"':
                self._at += 1
                return LONG_TEXT
            if self._is_last or len(self._window) - self._at > 1:
                raise ValueError("the string does not end")
            yield
            self._move()


class AttemptMembers(TypedDict, total=False):
    """What an attempt of a message costs depends on."""

    model: Any
    max_tokens: Any
    speed: Any


class ToolMembers(AttemptMembers, total=False):
    """The same of a tool that the server runs."""

    type: Any
    max_uses: Any


class MessageMembers(AttemptMembers, total=False):
    """The same of a message."""

    max_tokens_to_sample: Any
    stream: Any
    thinking: Any
    inference_geo: Any
    compaction: Any
    context_management: Any
    fallbacks: list[AttemptMembers] | str | None
    tools: list[ToolMembers] | None


class RowMembers(TypedDict, total=False):
    """The same of a row of a batch."""

    params: MessageMembers


class BodyMembers(MessageMembers, total=False):
    """The same of a message or a batch."""

    requests: list[RowMembers]


def read_order(document: object, body: bytes, *, batched: bool) -> Steps[Order]:
    """What a body asks for. ``document`` is the body as it was read; one that could not be is one
    message of any model. Raises APIError 400 for a batch that cannot be read."""
    order = Order(prompt=tokens_in(len(body)), batched=batched)
    if b'"cache_control"' in body:
        order.cache = "1h" if b'"1h"' in body else "5m"
    if not isinstance(document, dict):
        if batched:
            raise APIError(400, "This key has a budget, and its batch cannot be read.")
        return order
    if not batched:
        add_message(order, document, order.prompt)
        order.model = model_of(document.get("model"))
        order.max_tokens = max_tokens_of(document)
        order.thinking = thinking_of(document, order.max_tokens)
        order.streams = document.get("stream") is True
        return order
    requests = document.get("requests")
    rows = requests if isinstance(requests, list) else []
    order.prompts = max(1, len(rows))
    for number, row in enumerate(rows):
        params = row.get("params") if isinstance(row, dict) else None
        if isinstance(params, dict):
            order.model = order.model or model_of(params.get("model"))
            add_message(order, params, order.prompt // order.prompts)
        if number % BREATH == BREATH - 1:
            yield
    return order


MAX_USES = 10  # of a tool that the server runs, where the request does not say


def add_message(order: Order, params: Mapping[str, Any], prompt: int) -> None:
    """Count in every attempt that a message may make, each at its own model (SDK:
    beta_fallback_param, beta_advisor_tool_param, web_search_tool_param, beta_compaction_config_param).
    """
    fast, us = params.get("speed") == "fast", params.get("inference_geo") == "us"
    output, model = max_tokens_of(params), model_of(params.get("model"))
    attempts = 2 if compacts(params) else 1
    order.add((model, fast, us), prompt * attempts, output * attempts)
    fallbacks, tools = params.get("fallbacks"), params.get("tools")
    refuse_many(fallbacks, tools)
    for fallback in fallbacks if isinstance(fallbacks, list) else [fallbacks]:
        if isinstance(fallback, dict):
            speed = fallback.get("speed", "fast" if fast else None)
            part = (model_of(fallback.get("model")), speed == "fast", us)
            order.add(part, prompt, max_tokens_of(fallback, output))
        elif fallback is not None:
            order.add(("", fast, us), prompt, output)
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, dict):
            continue
        kind, uses = str(tool.get("type")), tool.get("max_uses")
        uses = uses if type(uses) is int and 0 <= uses <= MAX_COUNT else MAX_USES
        if kind.startswith("advisor"):
            part = (model_of(tool.get("model")), fast, us)
            advice = max_tokens_of(tool, output)
            order.add(part, prompt * uses, advice * uses)
        elif kind.startswith("web_search"):
            order.add((model, fast, us), 0, 0, uses)


def refuse_many(*attempts: object) -> None:
    """Raise APIError 400 for more tools or fallbacks than any request has."""
    if any(isinstance(every, list) and len(every) > MAX_ATTEMPTS for every in attempts):
        raise APIError(400, f"The body has more than {MAX_ATTEMPTS:,} tools or fallbacks.")


def compacts(params: Mapping[str, Any]) -> bool:
    """Whether a message may summarize its conversation first, which is an attempt of its own."""
    management = params.get("context_management")
    edits = management.get("edits") if isinstance(management, dict) else None
    return params.get("compaction") is not None or any(
        isinstance(edit, dict) and str(edit.get("type")).startswith("compact")
        for edit in (edits if isinstance(edits, list) else ())
    )


def max_tokens_of(params: Mapping[str, Any], default: int = MAX_OUTPUT) -> int:
    """How long an answer may be; old clients say ``max_tokens_to_sample`` (POST /v1/complete)."""
    asked = params.get("max_tokens", params.get("max_tokens_to_sample"))
    return asked if type(asked) is int and 0 <= asked <= MAX_COUNT else default


def thinking_of(params: Mapping[str, Any], max_tokens: int) -> int:
    """Tokens that may be thought unseen: as many as are asked for, or a part of the answer's."""
    thinking = params.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("type") == "disabled":
        return 0
    budget = thinking.get("budget_tokens")
    if type(budget) is int and 0 <= budget <= max_tokens:
        return budget
    return max_tokens // UNSEEN_THINKING


GLANCED_EDGE = 4 * KIB
GLANCED = re.compile(
    rb'"(model|max_tokens|stream|thinking)"\s*:\s*'
    rb'("[^"\\]*"(?=[,}\s])|[0-9]{1,9}\b|true\b|\{[^{}]*\})'
)


def glance(body: bytes) -> Order:
    """What a body asks for, as far as a look for its members' names tells, which costs a tenth of
    reading it: for estimates where the answer is cut short. Clients write the members that are looked
    for first or last, before or after all that is long."""
    edges = body
    if len(body) > 2 * GLANCED_EDGE:
        edges = body[:GLANCED_EDGE] + b" " + body[-GLANCED_EDGE:]
    members = dict(GLANCED.findall(edges))
    order = Order(str(members.get(b"model", b"")[1:-1], "utf-8", "replace"))
    order.model = model_of(order.model)
    order.prompt = tokens_in(len(body))
    order.max_tokens = int(members.get(b"max_tokens", MAX_OUTPUT))
    order.streams = members.get(b"stream") == b"true"
    if b"thinking" in members:
        thinking = {"thinking": read_json(members[b"thinking"])}
        order.thinking = thinking_of(thinking, order.max_tokens)
    return order


MODEL_PLACES = frozenset({"model", "fallbacks", "tools", "requests", "params"})
# The same words in other letters, which a reader that takes those for alike would take: capitals, and
# what Unicode folds to k and s.
ALIKE = {"k": "\u212a", "s": "\u017f"}
ODD_PLACES = frozenset(
    "".join(letters)
    for place in MODEL_PLACES
    for letters in itertools.product(*(c + c.upper() + ALIKE.get(c, "") for c in place))
) - {*MODEL_PLACES}
# What is kept of an object's members, wherever it stands.
PLACES = ODD_PLACES.union(
    {"budget_tokens", "edits", "id"},
    BodyMembers.__annotations__,
    RowMembers.__annotations__,
    ToolMembers.__annotations__,
)


class Ambiguous(dict[str, Any]):
    """An object that two readers could understand differently, and why."""

    def __init__(self, members: dict[str, Any], reason: str) -> None:
        super().__init__(members)
        self.reason = reason


def object_of(names: frozenset[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON document with those of its members that are named."""
    return object_of_all([pair for pair in pairs if pair[0] in names])


def object_of_all(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON document."""
    members = dict(pairs)
    if len(members) == len(pairs) and ODD_PLACES.isdisjoint(members):
        return members
    for name, times in collections.Counter(name for name, _ in pairs).items():
        if name in ODD_PLACES:
            reason = f"{printable(name)!r} is not written in lower case"
            return Ambiguous(members, reason)
        if times > 1 and name in PLACES:
            return Ambiguous(members, f"{name!r} stands twice in one object")
    return members


def members_of(value: object) -> dict[str, Any] | None:
    """A value as an object; None where it is none. Raises APIError 400 where it is ambiguous."""
    if isinstance(value, Ambiguous):
        raise unclear(value.reason)
    return value if isinstance(value, dict) else None


def models_in(document: object, route: Route) -> Iterator[str | None]:
    """Every model that a request may reach (SDK: message_create_params, beta_fallback_param,
    beta_advisor_tool_param, batch_create_params). None: upstream's choice. On routes that are not
    known, whatever is called ``model`` at any depth (agent_create_params)."""
    if not route.open:
        yield from models_anywhere(document)
    elif not route.makes_batch:
        yield from models_of_message(document)
    elif members := members_of(document):
        requests = members.get("requests")
        for request in requests if isinstance(requests, list) else ():
            if row := members_of(request):
                yield from models_of_message(row.get("params"))


def models_of_message(message: object) -> Iterator[str | None]:
    """Every model that a message may reach."""
    if not (params := members_of(message)):
        return
    yield from model_names(params.get("model"))
    fallbacks, tools = params.get("fallbacks"), params.get("tools")
    refuse_many(fallbacks, tools)
    if isinstance(fallbacks, list):
        for fallback in fallbacks:
            attempt = members_of(fallback)
            yield from model_names(fallback if attempt is None else attempt.get("model"))
    elif fallbacks is not None:
        yield None
    for tool in tools if isinstance(tools, list) else ():
        if runs := members_of(tool):
            yield from model_names(runs.get("model"))


def models_anywhere(document: object) -> Iterator[str | None]:
    """What is called ``model`` at any depth."""
    holders = [document]
    while holders:
        holder = holders.pop()
        if members := members_of(holder):
            yield from model_names(members.get("model"))
            holders += members.values()
        elif isinstance(holder, list):
            holders += holder


def model_names(value: object) -> Iterator[str]:
    """The name in a ``model`` field: a string, or an object with an ``id`` (agents)."""
    if (members := members_of(value)) is not None:
        value = members.get("id")
    if value is not None:
        yield value if isinstance(value, str) else f"a {type(value).__name__}"


@dataclass
class Measured:
    """What one response used, as Anthropic reports it (types/usage.py of its SDK).

    ``usage`` is the raw object, its counts cumulative. ``empty`` says that it has no content.
    ``seen`` counts the bytes of text, thinking and tool input that passed, ``thought`` those of
    thinking; ``thinks`` says that a block of thinking began. ``final`` says that the usage is the last
    word on it, ``blind`` that the response could not be read. ``beyond`` is what must be charged
    besides the usage, and then the whole is ``estimated``.
    """

    model: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    stop_reason: str = ""
    empty: bool = True
    seen: int = 0
    thought: int = 0
    thinks: bool = False
    final: bool = False
    blind: bool = False
    beyond: Tally | None = None
    estimated: bool = False

    def merge(self, usage: object) -> None:
        """Take newer counts over older ones: they are cumulative, and later ones may lack fields."""
        if not isinstance(usage, dict):
            return
        for name, value in usage.items():
            if value is not None:
                self.usage[name] = value

    def complete_with(self, order: Order) -> None:
        """Estimate what a response that did not come to its last word used besides: at least the
        prompt, what was seen of it, and the thinking that was not."""
        if self.final:
            return
        thinking = 0 if self.thought else order.thinking
        if self.thinks and not self.thought and not thinking:
            thinking = order.max_tokens // UNSEEN_THINKING
        told = [tally for _, tally in reported(self)]
        prompt = any(tally.input_tokens or tally.cached for tally in told)
        output = tokens_in(self.seen) + thinking - sum(t.output_tokens for t in told)
        self.beyond = Tally(
            input_tokens=0 if prompt else order.prompt, output_tokens=max(0, output)
        )
        self.model = self.model or order.model
        self.estimated = True


class NoMembers(TypedDict):
    """An object of which nothing is looked at."""


class AnswerMembers(TypedDict, total=False):
    """What is looked at of a whole message."""

    model: Any
    stop_reason: Any
    usage: Any
    completion: Any
    content: list[NoMembers]


class ResultMembers(TypedDict, total=False):
    """What is looked at of a row's result."""

    message: AnswerMembers


class ResultRowMembers(TypedDict, total=False):
    """What is looked at of a row of a batch's results."""

    result: ResultMembers


def measured_message(message: object, size: int) -> Measured:
    """What a whole message of so many bytes says."""
    if not isinstance(message, dict):
        return Measured(seen=size)
    usage, stop_reason = message.get("usage"), message.get("stop_reason")
    completion = message.get("completion")
    measured = Measured(
        model=model_of(message.get("model")),
        usage=usage if isinstance(usage, dict) else {},
        stop_reason=stop_reason if isinstance(stop_reason, str) else "",
        empty=not message.get("content"),
        final=isinstance(usage, dict) and bool(usage),
    )
    if not measured.final:
        told = isinstance(completion, str)
        measured.seen = len(str(completion).encode("utf-8", "replace")) if told else size
    return measured


def tally_of(usage: Mapping[str, Any]) -> Tally:
    """The counts of one usage object, or of one entry of its ``iterations``.

    ``input_tokens`` leaves cached ones out. Of cache writes whose length of life is not told, all
    are 5-minute ones, Anthropic's default.
    """
    tally = Tally(
        input_tokens=count_of(usage, "input_tokens"), output_tokens=count_of(usage, "output_tokens")
    )
    if usage.get("cache_read_input_tokens"):
        tally.cache_read_tokens = count_of(usage, "cache_read_input_tokens")
    if usage.get("cache_creation_input_tokens") or usage.get("cache_creation"):
        written = count_of(usage, "cache_creation_input_tokens")
        hour = count_of(usage, "cache_creation", "ephemeral_1h_input_tokens")
        five = count_of(usage, "cache_creation", "ephemeral_5m_input_tokens")
        tally.cache_write_5m_tokens = max(five, written - hour)
        tally.cache_write_1h_tokens = hour
    return tally


ATTEMPTS = ("message", "fallback_message")  # the types of iterations that may decline
MAX_ITERATIONS = 1000  # that are read of one answer, so that a lying upstream holds nobody up


def reported(measured: Measured) -> list[tuple[str, Tally]]:
    """What is billed of a response by its own word, as (model, counts) of each attempt.

    Advisor, compaction and fallback attempts stand in ``iterations`` alone, each at a model of its
    own. Free are attempts declined before any output that a fallback followed, and a refusal
    without content (PLD refusals-and-fallback, "How server-side fallback is billed").
    """
    usage = measured.usage
    if not usage or (measured.stop_reason == "refusal" and measured.empty):
        return []
    iterations = usage.get("iterations")
    entries = (
        [e for e in iterations[:MAX_ITERATIONS] if isinstance(e, dict)]
        if isinstance(iterations, list)
        else []
    )
    if not entries:
        return [(measured.model, tally_of(usage))]
    charged = []
    for entry, following in zip(entries, [*entries[1:], {}], strict=True):
        declined = entry.get("type") in ATTEMPTS and not count_of(entry, "output_tokens")
        if not (declined and following.get("type") == "fallback_message"):
            charged.append((model_of(entry.get("model")) or measured.model, tally_of(entry)))
    return charged


def charged_entries(measured: Measured) -> list[tuple[str, Tally]]:
    """What is billed of a response, with what was estimated besides."""
    entries, beyond = reported(measured), measured.beyond
    if beyond is None:
        return entries
    if len(entries) == 1 and not measured.usage.get("iterations"):
        entries[0][1].add(beyond)  # one prompt, which has one length
        return entries
    return [*entries, (measured.model, beyond)]


# An absolute URL up to its path, as a JSON string may hold it.
RESULTS_URL = re.compile(rb'(?<!\\)("results_url"\s*:\s*")https?:(?:\\?/){2}[^/"\\]+(?=[/"\\])')


def rewrite_results_url(data: bytes, base_path: str) -> bytes:
    """Make ``results_url`` in batch objects the same path on the gateway, relative.

    The SDKs follow it with the caller's credential, and join a relative one to their base URL
    (anthropic/_base_client.py, _prepare_url), so it works under either of the gateway's prefixes.
    """
    base = base_path.encode()

    def relative(match: re.Match[bytes]) -> bytes:
        return match[1]

    data = RESULTS_URL.sub(relative, data)
    if not base:
        return data
    return re.sub(rb'("results_url"\s*:\s*")' + re.escape(base) + rb'(?=[/"])', relative, data)


SSE_ERROR = b"\nevent: error\ndata: %b\n\n"


# ─── Prices ───────────────────────────────────────────────────────────────────────────────────────

MILLION = Decimal(1_000_000)
US_INFERENCE = Decimal("1.1")  # about-claude/pricing, "Data residency"
BATCH_DISCOUNT = Decimal(
    "0.5"
)  # about-claude/pricing, "Batch processing"; web searches are full price
# What Anthropic's rates for the cache are of the input rate, where a price file does not say.
CACHE_READ_FACTOR = Decimal("0.1")
CACHE_WRITE_5M_FACTOR = Decimal("1.25")
CACHE_WRITE_1H_FACTOR = Decimal(2)
WEB_SEARCH_PRICE = Decimal("0.01")


@dataclass(frozen=True, slots=True)
class Rates:
    """USD for one token of each kind, and for one web search."""

    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    web_search: Decimal = WEB_SEARCH_PRICE

    def price(self, tally: Tally) -> Decimal:
        """USD for these tokens; web searches are priced apart."""
        total = self.input * tally.input_tokens + self.output * tally.output_tokens
        if tally.cached:
            total += self.cache_read * tally.cache_read_tokens
            total += self.cache_write_5m * tally.cache_write_5m_tokens
            total += self.cache_write_1h * tally.cache_write_1h_tokens
        return total


MAX_CACHED_RATES = 1000
MAX_UNKNOWN = 50  # models without a price that the log names
CACHE_RATES = {"": "input", "5m": "cache_write_5m", "1h": "cache_write_1h"}


class Prices:
    """What tokens cost: a price file where one is given, else the package genai-prices.

    The package answers for a usage in about 0.1 ms; its rates are asked for once for each model,
    hour, speed and tier, which makes `price` forty times as fast. `load` imports it, which takes
    0.3 seconds: call it in a thread. Until then, and without package and file, `loaded` is false.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.loaded = False
        self._own: dict[str, Rates] = {}
        self._package: Any = None
        self._tiers: list[int] = [0]
        self._rates: dict[tuple[str, int, bool, int], Rates] = {}
        self._dearest: dict[tuple[int, bool, int], Rates] = {}
        self._unknown: set[str] = set()
        self.reload()
        self.available = bool(self._own) or importlib.util.find_spec("genai_prices") is not None

    def reload(self) -> None:
        """Read the price file again. Raises SettingsError that says where it is wrong."""
        if self.path is not None:
            self._own = read_prices(self.path)
        self._rates.clear()
        self._dearest.clear()
        self._unknown.clear()

    def load(self) -> None:
        """Import the package, if it is installed."""
        try:
            import genai_prices.data_snapshot as package

            self._tiers = sorted({0, *package_tiers(package)})
            self._package = package
        except ImportError:
            self.available = bool(self._own)
        except Exception:
            log.exception("genai-prices cannot be used")
            self.available = bool(self._own)
        self.loaded = self.available

    def price(self, usage: Measured, model: str, when: datetime) -> Decimal:
        """USD for a response of this model."""
        usage = dataclasses.replace(usage, model=model)
        return sum((tally.spend for _, tally in self.charge(usage, when)), ZERO)

    def charge(self, measured: Measured, when: datetime) -> list[tuple[str, Tally]]:
        """What is billed of a response, as (model, counts and USD); see `charged_entries`.

        A model that nobody knows is priced as the dearest known one, and said so in the log.
        Without package and file the tokens are counted, at no price.
        """
        entries = charged_entries(measured)
        raw = measured.usage
        if entries and raw.get("server_tool_use"):
            searches = count_of(raw, "server_tool_use", "web_search_requests")
            if searches:
                entries.append((measured.model, Tally(web_searches=searches)))
        if not self.available:
            return entries
        factor = BATCH_DISCOUNT if raw.get("service_tier") == "batch" else Decimal(1)
        if raw.get("inference_geo") == "us":
            factor *= US_INFERENCE
        for model, tally in entries:
            prompt = tally.input_tokens + tally.cached
            rates = self.rates(model, when, prompt, raw.get("speed") == "fast")
            cost = rates.price(tally) * factor
            if tally.web_searches:
                cost += rates.web_search * tally.web_searches
            tally.spend = cost.normalize()
        return entries

    def worst(self, order: Order, when: datetime) -> list[tuple[str, Tally]]:
        """What a request may cost at worst, as (model, counts and USD). A model that may be any is
        the dearest known one."""
        parts = order.parts or {(order.model, False, False): [order.prompt, order.max_tokens, 0]}
        entries = []
        for (model, fast, us), (prompt, output, searches) in parts.items():
            tally = Tally(input_tokens=prompt, output_tokens=output, web_searches=searches)
            if self.available:
                rates = self.rates(model, when, prompt // order.prompts, fast)
                paid = max(rates.input, getattr(rates, CACHE_RATES[order.cache]))
                cost = paid * prompt + rates.output * output
                cost *= US_INFERENCE if us else 1
                cost *= BATCH_DISCOUNT if order.batched else 1
                tally.spend = cost + rates.web_search * searches
            entries.append((model, tally))
        return entries

    def rates(self, model: str, when: datetime, prompt: int, fast: bool = False) -> Rates:
        """The rates of a model at a moment, for a prompt of so many tokens, cached ones included."""
        if self._own and model and (own := self._own_rates(model)):
            return own
        tier = self._tiers[max(0, bisect.bisect_left(self._tiers, prompt) - 1)]
        if not model:
            return self.dearest(when, fast, tier)
        key = (model, hour_of(when), fast, tier)
        known = self._rates.get(key)
        if known is None:
            if len(self._rates) > MAX_CACHED_RATES:
                self._rates.clear()
            known = self._rates[key] = self._find(model, when, fast, tier)
        return known

    def dearest(self, when: datetime, fast: bool = False, tier: int = 0) -> Rates:
        """The rates of the dearest known model; looking for it takes some 20 ms, once an hour."""
        key = (hour_of(when), fast, tier)
        if key not in self._dearest:
            if len(self._dearest) > MAX_CACHED_RATES:
                self._dearest.clear()
            known = list(self._own.values())
            for model in anthropic_models(self._package) if self._package else ():
                with contextlib.suppress(LookupError, ValueError):
                    own = self._own_rates(model)
                    known.append(own or package_rates(model, when, fast, tier))
            self._dearest[key] = max(known, key=lambda rates: rates.input + rates.output)
        return self._dearest[key]

    def _own_rates(self, model: str) -> Rates | None:
        """What the price file says of a model."""
        own = self._own.get(model)
        if own is not None:
            return own
        matching = (p for p in self._own if fnmatch.fnmatchcase(model, p))
        return self._own.get(next(matching, ""))

    def _find(self, model: str, when: datetime, fast: bool, tier: int) -> Rates:
        if self._package is not None:
            with contextlib.suppress(LookupError, ValueError):
                return package_rates(model, when, fast, tier)
        if model not in self._unknown and len(self._unknown) <= MAX_UNKNOWN:
            self._unknown.add(model)
            if len(self._unknown) > MAX_UNKNOWN:
                log.warning("further models without a known price are not named")
            else:
                log.warning("no price is known for model %r: priced as the dearest", model)
        return self.dearest(when, fast, tier)


def package_tiers(package: Any) -> Iterator[int]:
    """The lengths of a prompt, in tokens, above which genai-prices has other rates for some model."""
    for provider in package.get_snapshot().providers:
        for model in provider.models if provider.id == "anthropic" else ():
            for value in vars(model.get_prices(datetime.now(UTC))).values():
                yield from (tier.start for tier in getattr(value, "tiers", ()))


def anthropic_models(package: Any) -> list[str]:
    """The models of Anthropic's that genai-prices knows."""
    snapshot = package.get_snapshot()
    return [
        m.id
        for provider in snapshot.providers
        if provider.id == "anthropic"
        for m in provider.models
    ]


def package_rates(model: str, when: datetime, fast: bool, tier: int) -> Rates:
    """Ask genai-prices for the rates of a prompt just longer than ``tier``. Raises LookupError.

    ``input_tokens`` is the package's word for all of the prompt, cached or not.
    """
    import genai_prices

    prompt = tier + 1

    def ask(**counts: int) -> Any:
        return genai_prices.calc_price(
            genai_prices.Usage(**counts),
            model,
            provider_id="anthropic",
            genai_request_timestamp=when,
            price_context={"speed": "fast"} if fast else None,
        )

    def cached(kind: str) -> Decimal:
        counts = {kind: prompt}
        if kind != "cache_read_tokens":
            counts["cache_write_tokens"] = prompt
        return cast(Decimal, ask(input_tokens=prompt, **counts).input_price) / prompt

    plain = ask(input_tokens=prompt, output_tokens=prompt)
    return Rates(
        input=plain.input_price / prompt,
        output=plain.output_price / prompt,
        cache_read=cached("cache_read_tokens"),
        cache_write_5m=cached("cache_write_5m_tokens"),
        cache_write_1h=cached("cache_write_1h_tokens"),
    )


PRICE_FIELDS = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h")


def read_prices(path: Path) -> dict[str, Rates]:
    """Read a price file: ``{"model or pattern": {"input": 3, "output": 15, …}}``, USD per million tokens.

    ``cache_read``, ``cache_write_5m`` and ``cache_write_1h`` are Anthropic's usual multiples of the
    input rate where they are left out; ``web_search`` is USD for one. Raises SettingsError.
    """
    try:
        document = json.loads(path.read_bytes(), parse_float=Decimal)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"--prices: {path}: {reason}") from None
    if not isinstance(document, dict) or not document:
        raise SettingsError(f"--prices: {path}: is not an object of models")
    return {model: read_rates(f"--prices: {path}: {model}", row) for model, row in document.items()}


def read_rates(where: str, row: object) -> Rates:
    """One model's rates. Raises SettingsError that begins with ``where``."""
    if not isinstance(row, dict):
        raise SettingsError(f"{where}: is not an object of rates")
    unknown = sorted(set(row) - {*PRICE_FIELDS, "web_search"})
    if unknown:
        raise SettingsError(
            f"{where}: {unknown[0]!r} is not one of {', '.join(PRICE_FIELDS)}, web_search"
        )
    amounts = {}
    for name, value in row.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | Decimal)
            or not 0 <= value < MILLION
        ):
            raise SettingsError(f"{where}: {name!r} is not an amount from zero up")
        amounts[name] = Decimal(value)
    for name in ("input", "output"):
        if name not in amounts:
            raise SettingsError(f"{where}: has no {name!r}")
    base = amounts["input"]
    return Rates(
        input=base / MILLION,
        output=amounts["output"] / MILLION,
        cache_read=amounts.get("cache_read", base * CACHE_READ_FACTOR) / MILLION,
        cache_write_5m=amounts.get("cache_write_5m", base * CACHE_WRITE_5M_FACTOR) / MILLION,
        cache_write_1h=amounts.get("cache_write_1h", base * CACHE_WRITE_1H_FACTOR) / MILLION,
        web_search=amounts.get("web_search", WEB_SEARCH_PRICE),
    )


# ─── Ledger ───────────────────────────────────────────────────────────────────────────────────────

STORE_VERSION = 1
STORE_MODE = 0o600
FLUSH_INTERVAL = 1.0  # seconds between two writes of what relaying changes
WRITE_SLICE = 1000  # lines joined at a time, so that the writing thread lets the loop breathe
HASH = re.compile(r"[0-9a-f]{64}")
# Device, inode, size and time of change (ns): another one, and somebody has edited the file.
FileMark = tuple[int, int, int, int]


class StoreEdited(OSError):
    """The keys file is not the one that was last read or written: it must not be written over."""


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # FAT, some network disks
EDITED = "it was edited meanwhile; send the change again"
DAMAGED = "it was edited and is damaged; mend it first"


class KeyStore:
    """keys.json: lookups by hash, changes that are on disk before they are answered.

    The file is written whole to a temporary file beside it, fsynced and renamed over the old one; a
    link stays a link. One that was edited meanwhile is not written over but read. An exclusive lock
    on it keeps a second gateway away for as long as this object lives.
    Raises SettingsError where the file cannot be read, parsed or locked; it is then left as it is.
    """

    def __init__(self, path: Path, usage_days: int = 90) -> None:
        self.path = Path(os.path.realpath(path))
        self.usage_days = usage_days
        self.keys: dict[str, VirtualKey] = {}
        self.last_error = ""
        self._lines: dict[str, bytes] = {}
        self._retired: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._batches: dict[str, Account] = {}
        self._touched: set[str] = set()
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._lock = -1
        self._mark: FileMark | None = None
        self._bad_mark: FileMark | None = None
        self._undo: dict[str, VirtualKey | None] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._writer: asyncio.Task[None] | None = None
        self._load()

    # Reading

    def lookup(self, key: str) -> tuple[str, VirtualKey, str] | None:
        """Find a plain key: its present hash, its record and its `VirtualKey.status`; None if unknown.

        A key that was regenerated answers for its old value too, ``expired`` once the grace is over.
        """
        return self.lookup_hash(hash_key(key))

    def lookup_hash(self, hashed: str) -> tuple[str, VirtualKey, str] | None:
        """The same for a key's hash."""
        record = self.keys.get(hashed)
        if record is not None:
            return hashed, record, record.status(now())
        successor = self._retired.get(hashed)
        if successor is None:
            return None
        record = self.keys[successor]
        over = now() >= record.retired[hashed]
        return successor, record, "expired" if over else record.status(now())

    def find(self, key_or_hash: str) -> tuple[str, VirtualKey] | None:
        """The key that a manager addresses by plain key or by hash; deleted ones are not found."""
        hashed = key_or_hash if HASH.fullmatch(key_or_hash) else hash_key(key_or_hash)
        record = self.keys.get(hashed)
        return None if record is None or record.deleted_at else (hashed, record)

    def find_alias(self, alias: str) -> tuple[str, VirtualKey] | None:
        """The key of that alias; deleted ones are not found."""
        hashed = self._aliases.get(alias)
        return None if hashed is None else (hashed, self.keys[hashed])

    def live(self) -> Iterator[tuple[str, VirtualKey]]:
        """Every key that is not deleted, oldest first."""
        return ((hashed, key) for hashed, key in self.keys.items() if not key.deleted_at)

    # Changing

    async def change(self, changes: Mapping[str, VirtualKey | None]) -> None:
        """Put these records (None removes one) and return once they are on disk.

        They hold in memory at once. Where the disk fails all that is not on it is taken back, and
        APIError 503 is raised. Calls that arrive together share one write.
        """
        for hashed in changes:
            self._undo.setdefault(hashed, self.keys.get(hashed))
        self._apply(changes)
        try:
            await self.save()
        except OSError as error:
            raise APIError(503, store_message(error)) from None

    async def save(self) -> None:
        """Return once all that was changed before this call is on disk. Raises OSError."""
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        self._waiting.append(written)
        if self._writer is None:
            self._writer = loop.create_task(self._write_all())
        await written

    async def reload(self) -> None:
        """Read the file again (SIGHUP): what keys may do from the file, what they used from memory.

        Raises SettingsError and keeps what was there.
        """
        while self._writer is not None or (self.last_error and not self._is_edited()):
            # A change that is being written would be read over; and where the last write failed,
            # the file may have one that was refused, since it was not known to be on disk.
            try:
                await self.save()
            except OSError as error:
                raise SettingsError(store_message(error)) from None
        self._load()
        self._bad_mark = None

    def notice_edit(self) -> None:
        """Take the file in, as `reload` does, where somebody has edited it. One that does not parse
        is said once; then nothing is written until it is mended."""
        if self._writer is not None:  # which looks for itself
            return
        mark = file_mark(self.path)
        if mark is None or mark in (self._mark, self._bad_mark):
            return
        try:
            self._load()
            log.info("keys file was edited: read again, %d keys", len(self.keys))
            self._bad_mark = None
        except SettingsError as error:
            log.error("keys file was edited, and cannot be read: %s", error)
            self._bad_mark = mark

    def touch(self, account: Account) -> None:
        """What a key used has changed: write it within FLUSH_INTERVAL seconds."""
        self._touched.add(account.hashed)
        self._flush_soon()

    def freshen(self, account: Account) -> None:
        """Let the next write have what a key used until now."""
        record = self.keys.get(account.hashed)
        if record is not None:
            self._lines[account.hashed] = self._line(account.hashed, record)

    async def flush(self) -> None:
        """Write what keys used. Where the disk fails, `_write_all` says so and tries again."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        if self._flushing is not None and self._flushing is not asyncio.current_task():
            await self._flushing
        self.notice_edit()
        touched, self._touched = self._touched, set()
        for hashed in touched:
            if hashed in self.keys:
                self.freshen(self.keys[hashed].account)
        if touched or self.last_error:
            with contextlib.suppress(OSError):
                await self.save()

    def is_writable(self) -> bool:
        """Whether the last write succeeded, and the folder still takes files."""
        return not self.last_error and os.access(self.path.parent, os.W_OK)

    def batch_owner(self, batch: str) -> Account | None:
        """The account of the key that made a batch."""
        return self._batches.get(batch)

    def own_batch(self, account: Account, name: str) -> Batch:
        """Remember that a key made a batch."""
        batch = account.batches[name] = Batch(day_of(now()))
        self._batches[name] = account
        self.touch(account)
        return batch

    def unbooked(self) -> list[str]:
        """The batches whose results are not all booked."""
        return [name for name, account in self._batches.items() if not account.batches[name].booked]

    def _flush_soon(self) -> None:
        if self._flush_timer is None:
            loop = asyncio.get_running_loop()
            self._flush_timer = loop.call_later(FLUSH_INTERVAL, self._start_flush)

    def _start_flush(self) -> None:
        self._flush_timer = None
        self._flushing = asyncio.get_running_loop().create_task(self.flush())

    def _line(self, hashed: str, record: VirtualKey) -> bytes:
        moment = now()
        oldest = day_of(moment - timedelta(days=self.usage_days))
        batches = record.account.batches
        for name in [n for n, b in batches.items() if b.booked and b.day < oldest]:
            del batches[name]
            self._batches.pop(name, None)
        return store_line(hashed, record, day_of(moment), oldest)

    def close(self) -> None:
        """Give up the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _apply(self, changes: Mapping[str, VirtualKey | None]) -> None:
        for hashed, record in changes.items():
            before = self.keys.get(hashed)
            if before is not None:
                self._forget(hashed, before)
            if record is None:
                self.keys.pop(hashed, None)
                self._lines.pop(hashed, None)
                continue
            self.keys[hashed] = record
            self._lines[hashed] = self._line(hashed, record)
            self._retired.update(dict.fromkeys(record.retired, hashed))
            if record.key_alias is not None and not record.deleted_at:
                self._aliases[record.key_alias] = hashed
            account = record.account
            account.hashed = hashed
            self._batches.update(dict.fromkeys(account.batches, account))

    def _forget(self, hashed: str, record: VirtualKey) -> None:
        for old in record.retired:
            if self._retired.get(old) == hashed:
                del self._retired[old]
        if record.key_alias is not None and self._aliases.get(record.key_alias) == hashed:
            del self._aliases[record.key_alias]

    async def _write_all(self) -> None:
        """Write for all that wait, until nobody does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            undo, self._undo = self._undo, {}
            lines = list(self._lines.values())
            failure: OSError | None = None
            try:
                await loop.run_in_executor(None, self._write, lines)
                if self.last_error:
                    log.warning("keys file written again")
                self.last_error = ""
            except Exception as error:
                unexpected = OSError(errno.EIO, "unexpected failure")
                failure = error if isinstance(error, OSError) else unexpected
                if failure is unexpected:
                    log.error("keys file not written", exc_info=error)
                # What was changed meanwhile stands on what is now refused, and falls with it.
                waiting += self._waiting
                self._apply({**self._undo, **undo})
                self._waiting, self._undo = [], {}
                self._say_failure(failure)
            for written in waiting:
                if written.done():  # who waited has left
                    continue
                if failure is None:
                    written.set_result(None)
                else:
                    written.set_exception(failure)
        self._writer = None

    def _say_failure(self, error: OSError) -> None:
        """Log it once, and try again."""
        if not isinstance(error, StoreEdited):
            if self.last_error != store_message(error):
                log.error("keys file not written: %s", error.strerror or error)
            self.last_error = store_message(error)
        elif self._bad_mark is not None:
            self.last_error = store_message(error)
        self._flush_soon()

    def _write(self, lines: list[bytes]) -> None:
        """Write, fsync, lock, rename, fsync the folder. The old file stays until the new one is whole."""
        self._refuse_edited()
        temporary, descriptor = self._write_beside(lines)
        try:
            self._refuse_edited()
            os.replace(temporary, self.path)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._take(descriptor)

    def _is_edited(self) -> bool:
        return file_mark(self.path) not in (self._mark, None)

    def _refuse_edited(self) -> None:
        """Raise StoreEdited where the file is not the one that was last read or written."""
        if self._is_edited():
            raise StoreEdited(errno.EBUSY, DAMAGED if self._bad_mark else EDITED)

    def _write_beside(self, lines: list[bytes]) -> tuple[Path, int]:
        """Write a locked file beside the present one; its path and descriptor."""
        temporary = self.path.parent / f".{self.path.name}.{os.getpid()}.tmp"
        descriptor = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, STORE_MODE
        )
        try:
            os.fchmod(descriptor, STORE_MODE)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(b'{"version": %d, "keys": {' % STORE_VERSION)
                for start in range(0, len(lines), WRITE_SLICE):
                    file.write(b"\n" if start == 0 else b",\n")
                    file.write(b",\n".join(lines[start : start + WRITE_SLICE]))
                file.write(b"\n}}\n")
            os.fsync(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return temporary, descriptor

    def _take(self, descriptor: int) -> None:
        """Hold this file from now on, and make sure that its folder names it."""
        if descriptor != self._lock:
            self.close()
        self._lock = descriptor
        self._mark = mark_of(os.fstat(descriptor))
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _load(self) -> None:
        """Read the file; what keys used stays, where it is known already."""
        descriptor = self._open_or_create()
        if descriptor < 0:
            return
        try:
            keys = parse_store(read_whole(descriptor), str(self.path))
        except BaseException:
            if descriptor != self._lock:
                os.close(descriptor)
            raise
        with contextlib.suppress(OSError):  # a folder that cannot be synced can be read
            self._take(descriptor)
        accounts = {hashed: key.account for hashed, key in self.keys.items()}
        self.keys, self._lines, self._retired, self._aliases = {}, {}, {}, {}
        self._batches = {}
        for hashed, record in keys.items():
            record.account = accounts.get(hashed, record.account)
        self._apply(keys)
        for hashed in accounts.keys() & keys.keys():
            self.touch(keys[hashed].account)

    def _open_or_create(self) -> int:
        """The locked file; -1 where there is none and none can be made."""
        while True:
            try:
                return self._open_locked()
            except FileNotFoundError:
                pass
            except OSError as error:
                raise SettingsError(f"{self.path}: {error.strerror}") from None
            try:
                self._create()
            except FileExistsError:  # another gateway was faster
                continue
            except OSError as error:
                self.last_error = store_message(error)
                log.warning(
                    "%s cannot be created (%s): no keys can be made", self.path, error.strerror
                )
                return -1

    def _open_locked(self) -> int:
        """Open and lock the file; once more if it was replaced between the two. Our own lock counts."""
        while True:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            seen = os.fstat(descriptor)
            if self._lock >= 0 and os.path.samestat(seen, os.fstat(self._lock)):
                os.close(descriptor)
                os.lseek(self._lock, 0, os.SEEK_SET)
                return self._lock
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(seen, os.stat(self.path)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise SettingsError(
                    f"{self.path}: another gateway uses this file; give this one its own with --keys"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _create(self) -> None:
        """Make the file, with the keys that are here. Raises FileExistsError where it is there."""
        temporary, descriptor = self._write_beside(list(self._lines.values()))
        try:
            os.link(temporary, self.path)  # unlike a rename, it replaces nothing
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.rename(temporary, self.path)
        finally:
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def mark_of(seen: os.stat_result) -> FileMark:
    """What tells an edited file from one that was not."""
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def file_mark(path: Path) -> FileMark | None:
    """The mark of a file; None where there is none."""
    try:
        return mark_of(os.stat(path))
    except OSError:
        return None


def read_whole(descriptor: int) -> bytes:
    """What an open file holds. Raises SettingsError."""
    try:
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise SettingsError(f"the keys file cannot be read: {error.strerror}") from None


def store_line(hashed: str, record: VirtualKey, today: str = "", keep_from: str = "") -> bytes:
    """One line of keys.json; usage of days before ``keep_from`` is left out."""
    line = json.dumps(record.to_json())
    usage = record.account.usage.to_json(today, keep_from)
    if usage != "{}":
        line = f'{line[:-1]}, "usage": {usage}}}'
    return f'"{hashed}": {line}'.encode()


def store_message(error: OSError) -> str:
    """What a client is told when the file cannot be written; paths of the machine stay out of it."""
    return f"The keys file cannot be written ({error.strerror or 'unknown error'}); nothing was changed."


def parse_store(text: bytes, name: str) -> dict[str, VirtualKey]:
    """Read a keys file. Raises SettingsError that says where it is damaged; forgets old tombstones."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"{name}: damaged, not JSON ({error}); mend it or restore a copy"
        ) from None
    if not isinstance(document, dict) or not isinstance(document.get("keys"), dict):
        raise SettingsError(f'{name}: damaged, not {{"version": {STORE_VERSION}, "keys": {{…}}}}')
    if document.get("version") != STORE_VERSION:
        raise SettingsError(f"{name}: version {document.get('version')!r} is not for this gateway")
    keys: dict[str, VirtualKey] = {}
    forget = now() - timedelta(days=TOMBSTONE_DAYS)
    for number, (hashed, record) in enumerate(document["keys"].items(), start=1):
        try:
            if not HASH.fullmatch(hashed):
                raise ValueError("does not stand under a SHA-256")
            key = VirtualKey.from_json(record)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise SettingsError(f"{name}: damaged, key number {number} {error}") from None
        if not key.deleted_at or key.deleted_at > forget:
            keys[hashed] = key
    return keys


# ─── Wire ─────────────────────────────────────────────────────────────────────────────────────────

MAX_HEAD_SIZE = 64 * KIB  # Tornado's default max_header_size
MAX_FIELDS = 200  # of a head; Apache's limit is 100, Node's 2,000
MAX_METHOD = 32  # characters; the longest that is registered has 16 (RFC 4437)
MAX_EMPTY_LINES = 4  # before a request; RFC 9112 section 2.2 speaks of one
CHUNKS_A_TURN = 1000  # of a body that are read before the loop may do something else
MAX_CHUNK_LINE = 1 * KIB  # a chunk's size and extensions, or one trailer field
MAX_TRAILERS = 8 * KIB
MAX_INFORMATIONAL = 10  # 1xx responses before the real one; Tornado's limit
CHUNKED = -1  # lengths of bodies that are not known beforehand
UNTIL_CLOSE = -2
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
FIELD_VALUE = r"[\t\x20-\x7e\x80-\xff]*"  # RFC 9110 section 5.5: no CR, LF, NUL or other control
ABSOLUTE_TARGET = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE)
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
STATUS_LINE = re.compile(rf"HTTP/1\.([01]) ([1-9][0-9]{{2}})(?: ({FIELD_VALUE}))?")
FIELD_LINE = re.compile(rf"{TOKEN}:{FIELD_VALUE}")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
CHUNK_START = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
BARE_LF = re.compile(rb"(?<!\r)\n")
REPEATABLE = ("GET", "HEAD")  # sent again where a kept-alive connection had closed
# RFC 9110 section 7.6.1, and Proxy-Connection, which old clients send.
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Request fields that stay here, beside the hop-by-hop ones.
DROPPED_REQUEST_FIELDS = HOP_BY_HOP | {
    "host",
    "content-length",
    "expect",
    "cookie",
    "forwarded",
    "authorization",
    "x-api-key",
    # Some servers take these for the method, which the rules have looked at already.
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
}
DROPPED_REQUEST_PREFIXES = ("x-litellm-", "x-forwarded-")


class ProtocolError(Exception):
    """Bytes that are not HTTP/1.1, or not so that both sides must read them alike."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Field:
    """A header field: ``name`` and ``value`` as they came, the name in lower case, the value as all
    that one field has of it, the line to send, and whether it goes on to the upstream or the client,
    where ``Connection`` does not name it."""

    name: str
    value: str
    lower: str
    values: tuple[str, ...]
    line: str
    goes_up: bool
    goes_down: bool


NO_OPTIONS: frozenset[str] = frozenset()


@dataclass(slots=True)
class Head:
    """A request's or response's header fields: ``fields`` as they came, in their order;
    ``values`` by lower-case name. ``version`` is the minor version of HTTP/1."""

    version: int
    fields: list[Field]
    values: dict[str, tuple[str, ...]]

    @property
    def coding(self) -> str:
        """How the body is compressed (RFC 9110 section 8.4), in lower case; empty where it is not."""
        values = self.values.get("content-encoding")
        if not values:
            return ""
        codings = (coding.strip() for coding in ",".join(values).lower().split(","))
        return ", ".join(coding for coding in codings if coding not in ("", "identity"))

    def get(self, name: str) -> str:
        """The first value of a field, by its lower-case name; empty where there is none."""
        values = self.values.get(name)
        return values[0] if values else ""

    def connection_options(self) -> frozenset[str]:
        """What ``Connection`` lists, in lower case (RFC 9110 section 7.6.1)."""
        values = self.values.get("connection")
        if not values:
            return NO_OPTIONS
        return frozenset(option.strip().lower() for value in values for option in value.split(","))

    def keeps_alive(self) -> bool:
        """Whether the sender will reuse the connection (RFC 9112 section 9.3)."""
        named = self.connection_options()
        if self.version == 1:
            return "close" not in named
        return "keep-alive" in named and "close" not in named


@dataclass(slots=True)
class RequestHead(Head):
    """A request's head; ``target`` is the raw request target, from its path on; ``host`` is whom it
    is for: the target's own authority, or the Host field's, empty where HTTP/1.0 has none."""

    method: str
    target: str
    host: str


@dataclass(slots=True)
class ResponseHead(Head):
    """A response's head."""

    status: int
    reason: str


# Clients and upstreams send the same lines with every message; those are read once.
KEPT_HEAD = 4 * KIB  # lines of longer heads are not kept


def parse_fields(block: str) -> tuple[list[Field], dict[str, tuple[str, ...]]]:
    """Read header field lines, with CRLF between them. Raises ProtocolError."""
    if not block:
        return [], {}
    lines = block.split("\r\n")
    if len(lines) > MAX_FIELDS:
        raise ProtocolError(f"the head has more than {MAX_FIELDS:,} fields", 431)
    fields = list(map(read_field if len(block) <= KEPT_HEAD else parse_field, lines))
    values = {field.lower: field.values for field in fields}
    if len(values) < len(fields):
        repeated: dict[str, list[str]] = {}
        for each in fields:
            repeated.setdefault(each.lower, []).append(each.value)
        values = {name: tuple(every) for name, every in repeated.items()}
    return fields, values


def parse_field(line: str) -> Field:
    """Read a field line. Raises ProtocolError.

    No obsolete line folding, no space before the colon, no lone CR or LF (RFC 9112 section 5).
    """
    if not FIELD_LINE.fullmatch(line):
        raise ProtocolError("a header field is malformed")
    name, _, value = line.partition(":")
    value, lower = value.strip(" \t"), name.lower()
    dropped = lower in DROPPED_REQUEST_FIELDS
    return Field(
        name,
        value,
        lower,
        values=(value,),
        line=f"{name}: {value}",
        goes_up=not dropped and not lower.startswith(DROPPED_REQUEST_PREFIXES),
        goes_down=lower not in HOP_BY_HOP,
    )


read_field = functools.lru_cache(maxsize=512)(parse_field)


def parse_request_head(data: bytes) -> RequestHead:
    """Read what stands before the empty line of a request. Raises ProtocolError."""
    line, _, block = data.decode("latin-1").partition("\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match or match.end(1) > MAX_METHOD:
        raise ProtocolError("the request line is malformed")
    fields, values = parse_fields(block)
    version = int(match[3])
    hosts = len(values.get("host", ()))
    if hosts > 1 or (hosts == 0 and version == 1):
        raise ProtocolError("a request has exactly one Host field")  # RFC 9112 section 3.2
    target, host = match[2], values["host"][0] if hosts else ""
    if absolute := ABSOLUTE_TARGET.fullmatch(target):  # RFC 9112 section 3.2.2
        host, path = absolute[1].rpartition("@")[2], absolute[2]
        target = path if path.startswith("/") else f"/{path}"
    return RequestHead(version, fields, values, match[1], target, host)


def parse_response_head(data: bytes) -> ResponseHead:
    """Read what stands before the empty line of a response. Raises ProtocolError."""
    line, _, block = data.decode("latin-1").partition("\r\n")
    match = STATUS_LINE.fullmatch(line)
    if not match:
        raise ProtocolError("the status line is malformed")
    fields, values = parse_fields(block)
    return ResponseHead(int(match[1]), fields, values, int(match[2]), match[3] or "")


class HeadReader:
    """Finds the end of a message's head in what a connection brings; looks at each byte once."""

    __slots__ = ("_data", "_seen")

    def __init__(self) -> None:
        self._data = bytearray()
        self._seen = 0

    def __len__(self) -> int:
        return len(self._data)

    def feed(self, data: bytes) -> tuple[bytes, bytes] | None:
        """The head without its empty line, and what stands behind it; None while it is not whole.
        Raises ProtocolError for one that is too large, or has lines that end otherwise."""
        if not self._data:  # mostly a read brings all of it
            end = data.find(b"\r\n\r\n")
            if 0 <= end <= MAX_HEAD_SIZE:
                return data[:end], data[end + 4 :]
        self._data += data
        start = max(0, self._seen - 3)
        end = self._data.find(b"\r\n\r\n", start)
        if 0 <= end <= MAX_HEAD_SIZE:
            head, rest = bytes(self._data[:end]), bytes(self._data[end + 4 :])
            self._data, self._seen = bytearray(), 0
            return head, rest
        if len(self._data) > MAX_HEAD_SIZE:
            raise ProtocolError(f"the head is larger than {MAX_HEAD_SIZE:,} bytes", 431)
        if BARE_LF.search(self._data, start):
            raise ProtocolError("lines end with CR LF")
        self._seen = len(self._data)
        return None

    def take_back(self) -> bytes:
        """What is held of a head that is not whole."""
        data, self._data, self._seen = bytes(self._data), bytearray(), 0
        return data


def declared_length(head: Head) -> int | None:
    """The length of a body by its head: bytes, CHUNKED, or None where the head does not say.

    RFC 9112 section 6, without its leniencies: both lengths, two lengths, or a coding other than
    chunked is an error, since two readers could understand it differently.
    """
    coding = head.values.get("transfer-encoding")
    length = head.values.get("content-length")
    if coding:
        if length or head.version == 0 or len(coding) != 1:
            raise ProtocolError("Transfer-Encoding stands beside another length, or in HTTP/1.0")
        if coding[0].lower() != "chunked":
            raise ProtocolError("the only transfer coding understood is chunked", 501)
        return CHUNKED
    if not length:
        return None
    if len(length) != 1 or not LENGTH.fullmatch(length[0]):
        raise ProtocolError("Content-Length is malformed or stands twice")
    return int(length[0])


def response_length(head: ResponseHead, method: str) -> int:
    """The length of a response's body (RFC 9112 section 6.3): bytes, CHUNKED or UNTIL_CLOSE."""
    declared = declared_length(head)
    if method == "HEAD" or head.status in (204, 304):
        return 0
    return UNTIL_CLOSE if declared is None else declared


class Body:
    """Takes a message body out of the bytes of a connection, without I/O (RFC 9112 sections 6, 7.1).

    ``length`` is a number of bytes, CHUNKED or UNTIL_CLOSE. Chunk extensions and trailers are read
    and dropped, as section 7.1.1 asks of a recipient that does not know them.
    """

    __slots__ = ("_left", "_partial", "_trailers", "_where", "complete", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.complete = length == 0
        self._left = max(length, 0)
        self._where = "size"
        self._partial = b""
        self._trailers = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """The part of these bytes that is body, and what stands behind it: after the body where that
        is `complete`, else chunks for which the loop must be asked for another turn. Raises
        ProtocolError."""
        if self.complete:
            return b"", data
        if self.length == CHUNKED:
            return self._feed_chunked(data)
        if self.length == UNTIL_CLOSE:
            return data, b""
        if len(data) < self._left:
            self._left -= len(data)
            return data, b""
        self.complete = True
        return data[: self._left], data[self._left :]

    def _feed_chunked(self, data: bytes) -> tuple[bytes, bytes]:
        if self._partial:
            data, self._partial = self._partial + data, b""
        elif self._where == "size" and (match := CHUNK_START.match(data)):
            # Mostly a read brings just one chunk, as an event was sent.
            start, size = match.end(), int(match[1], 16)
            if size and len(data) == start + size + 2 and data.endswith(b"\r\n"):
                return data[start:-2], b""
        pieces: list[bytes] = []
        at = 0
        while len(pieces) < CHUNKS_A_TURN:
            if self._where == "data":
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                pieces.append(piece)
                if self._left:
                    break
                self._where = "end"
            if self._where == "end":
                if data[at : at + 2] != b"\r\n":
                    if data[at : at + 2] not in (b"", b"\r"):
                        raise ProtocolError("a chunk is longer than its size")
                    self._partial = data[at:]
                    break
                at += 2
                self._where = "size"
            end = data.find(b"\r\n", at)
            if end < 0 or end - at > MAX_CHUNK_LINE:
                if len(data) - at > MAX_CHUNK_LINE or BARE_LF.search(data, at):
                    raise ProtocolError("a chunk's size line is malformed")
                self._partial = data[at:]
                break
            line, at = data[at:end], end + 2
            if self._where == "size":
                self._read_size(line)
            elif self._read_trailer(line):
                self.complete = True
                break
        rest = b"" if self._partial else data[at:]
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), rest

    def _read_size(self, line: bytes) -> None:
        match = CHUNK_SIZE.fullmatch(line)
        if not match:
            raise ProtocolError("a chunk's size line is malformed")
        self._left = int(match[1], 16)
        self._where = "data" if self._left else "trailers"

    def _read_trailer(self, line: bytes) -> bool:
        """Whether this line ends the trailer section."""
        if not line:
            return True
        self._trailers += len(line)
        if self._trailers > MAX_TRAILERS:
            raise ProtocolError("the trailer section is too large")
        parse_field(line.decode("latin-1"))
        return False


def head_bytes(start_line: str, lines: Iterable[str]) -> bytes:
    """A message head as it goes over the wire, of its start line and field lines."""
    return "\r\n".join([start_line, *lines, "\r\n"]).encode("latin-1")


def field_lines(fields: Iterable[tuple[str, str]]) -> list[str]:
    """Field lines of names and values."""
    return [f"{name}: {value}" for name, value in fields]


def framed(data: bytes) -> bytes:
    """Data as one chunk of the chunked coding; empty for empty data, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


LAST_CHUNK = b"0\r\n\r\n"
CHUNKED_LINE = "Transfer-Encoding: chunked"


# ─── Client ───────────────────────────────────────────────────────────────────────────────────────

# What may wait in a socket's write buffer before its source is paused.
WRITE_HIGH_WATER = 64 * KIB
JOINED_BODY = 16 * KIB  # a larger one is not copied behind its head
POOL_IDLE_TIMEOUT = 55.0  # seconds; load balancers commonly drop idle connections after 60
ADDRESS_TTL = 30.0  # seconds for which an address that was reached is not resolved anew
REACH_AGAIN_TIMEOUT = 3.0  # seconds for it to answer, before it is
SWEEP_INTERVAL = 1.0  # seconds between looks for silent exchanges and idle connections


class UpstreamError(Exception):
    """The upstream did not answer as it should. ``status`` is 502, or 504 where it kept silent."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class ResponseSink(Protocol):
    """Who a response is for. Calls come from the loop; none of them may block.

    After ``response_received(…, complete=True)`` or ``response_failed`` nothing more is called.
    """

    def informational_received(self, head: ResponseHead) -> None:
        """A 1xx response came before the real one."""

    def response_started(self, head: ResponseHead, length: int) -> None:
        """The head came; the body will have this length (bytes, CHUNKED or UNTIL_CLOSE)."""

    def response_received(self, data: bytes, complete: bool) -> None:
        """The part of the body that came with one read; also called, empty, right after the head."""

    def response_failed(self, error: UpstreamError) -> None:
        """The response will not come, or not to its end."""

    def pause_sending(self) -> None:
        """The upstream takes the request's body more slowly than it arrives."""

    def resume_sending(self) -> None:
        """The upstream takes more of the request's body."""

    def request_taken(self) -> None:
        """The upstream has taken what was handed over of the request; it may be called again."""


class Exchange:
    """One request on its way upstream and its response on the way back.

    ``body`` is what goes in one piece behind the head. A body that comes in parts is handed to
    `write` and ended by `finish`; then ``streamed`` is true, and the request is never repeated.
    """

    def __init__(
        self,
        client: UpstreamClient,
        origin: Origin,
        method: str,
        head: bytes,
        body: bytes,
        sink: ResponseSink,
        *,
        streamed: bool = False,
        connect_timeout: float = 0,
    ) -> None:
        self.client = client
        self.origin = origin
        self.method = method
        self.sink = sink
        self.connect_timeout = connect_timeout or client.connect_timeout
        self.sent = not streamed
        self.touched = client.time()
        self.begun = 0.0
        self._head = head
        self._body = body
        self._repeatable = method in REPEATABLE and not streamed and not body
        self._connection: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: list[bytes] = []
        self._waiting_size = 0
        self._sending_paused = False
        self.reading_paused = False
        self._over = False

    def start(self) -> None:
        """Send over a kept-alive connection, or over a new one once it stands."""
        self.client.exchanges.add(self)
        connection = self.client.take_idle(self.origin)
        if connection is None:
            self._connect()
        else:
            self._begin(connection)

    def write(self, data: bytes) -> None:
        """Send a part of the body; `ResponseSink.pause_sending` says when to hold."""
        self.touched = self.client.time()
        if self._over:
            return
        if self._connection is not None:
            self._connection.transport.write(data)
            return
        self._waiting.append(data)
        self._waiting_size += len(data)
        if self._waiting_size > WRITE_HIGH_WATER:
            self.pause_sending()

    def finish(self, last: bytes = b"") -> None:
        """The body has ended; ``last`` is what is still to be sent."""
        if last:
            self.write(last)
        self.sent = True

    def pause_reading(self) -> None:
        """Take nothing more from the upstream for now."""
        self.reading_paused = True
        if self._connection is not None:
            self._connection.transport.pause_reading()

    def resume_reading(self) -> None:
        """Take from the upstream again."""
        self.reading_paused = False
        self.touched = self.client.time()
        if self._connection is not None:
            self._connection.resume_reading()

    def abort(self) -> None:
        """End it now: the connection is closed, the sink hears nothing more."""
        if self._over:
            return
        connection = self._connection
        self._end()
        if self._connecting is not None:
            self._connecting.cancel()
        if connection is not None:
            connection.abandon()

    def check_silence(self, moment: float, idle_timeout: float) -> None:
        """Give up where nothing has moved for ``idle_timeout`` seconds.

        A caller who is slow to send is not the upstream's silence.
        """
        if self._connection is None or moment - self.touched < idle_timeout:
            return
        if self.reading_paused:
            self._fail(UpstreamError("The client stopped reading the response.", 504))
        elif self.sent or self._sending_paused:
            self._fail(UpstreamError(f"The upstream was silent for {idle_timeout:g} seconds.", 504))

    # What the connection says

    def pause_sending(self) -> None:
        """Called by the connection when its write buffer is full."""
        if not self._sending_paused:
            self._sending_paused = True
            self.sink.pause_sending()

    def resume_sending(self) -> None:
        """Called by the connection when its write buffer has room."""
        if self._sending_paused:
            self._sending_paused = False
            self.touched = self.client.time()
            self.sink.resume_sending()
            self.sink.request_taken()

    def completed(self) -> None:
        """Called by the connection before the last bytes of the response are handed on."""
        self._end()

    def connection_lost(self, error: Exception | None, *, answered: bool, reused: bool) -> None:
        """Called by the connection when it broke before the response was whole.

        A kept-alive connection may have been closed while the request was on its way. Then a GET or
        HEAD is sent again over a new connection (RFC 9110 section 9.2.2); a POST never twice.
        """
        self._connection = None
        if reused and not answered and self._repeatable:
            self._connect()
            return
        if isinstance(error, ProtocolError):
            text = f"The upstream's response is not valid HTTP: {error}."
        elif answered:
            text = "The upstream closed the connection before its response was complete."
        else:
            text = "The upstream closed the connection without answering."
        self._fail(UpstreamError(text))

    # Inside

    def _connect(self) -> None:
        self._connecting = asyncio.get_running_loop().create_task(self._connect_and_begin())

    async def _connect_and_begin(self) -> None:
        try:
            async with asyncio.timeout(self.connect_timeout):
                connection = await self.client.connect(self.origin, self.connect_timeout)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear
            self._connecting = None
            self._fail(connect_failure(error, self.connect_timeout))
            return
        self._connecting = None
        self._begin(connection)

    def _begin(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self.begun = self.touched = self.client.time()
        waiting, self._waiting = self._waiting, []
        connection.begin(self)
        if len(self._body) <= JOINED_BODY:
            connection.transport.write(b"".join([self._head, self._body, *waiting]))
        else:
            # Not writelines: Python 3.12 and 3.13 do not say then that the buffer is full.
            for data in (self._head, self._body, *waiting):
                connection.transport.write(data)
        if not self._repeatable:  # nor kept for as long as the response lasts
            self._head = self._body = b""
        if self.reading_paused:
            connection.transport.pause_reading()
        if not connection.writing_paused:
            self._waiting_size = 0
            self.resume_sending()
            self.sink.request_taken()

    def _fail(self, error: UpstreamError) -> None:
        if self._over:
            return
        connection = self._connection
        self._end()
        if connection is not None:
            connection.abandon()
        self.sink.response_failed(error)

    def _end(self) -> None:
        self._over = True
        self._connection = None
        self.client.exchanges.discard(self)


def connect_failure(error: BaseException, timeout: float) -> UpstreamError:
    """Say which way the connection failed, for the operator who reads the message."""
    if isinstance(error, StreamClosedError) and error.real_error is not None:
        error = error.real_error
    if isinstance(error, TimeoutError):
        return UpstreamError(f"The upstream could not be reached within {timeout:g} seconds.", 504)
    if isinstance(error, socket.gaierror):
        return UpstreamError("The upstream's host name could not be resolved.")
    if isinstance(error, ssl.SSLCertVerificationError):
        return UpstreamError(f"The upstream's certificate is not trusted: {error.verify_message}.")
    if isinstance(error, ssl.SSLError):
        return UpstreamError("The TLS handshake with the upstream failed.")
    if isinstance(error, ConnectionRefusedError):
        return UpstreamError("The upstream refused the connection.")
    if isinstance(error, ConnectionError):
        return UpstreamError("The upstream closed the connection while it was being opened.")
    if isinstance(error, OSError) and error.strerror:
        return UpstreamError(f"The upstream cannot be reached: {error.strerror}.")
    if not isinstance(error, StreamClosedError):
        log.error("connecting upstream failed", exc_info=error)
    return UpstreamError("The upstream cannot be reached.")


class UpstreamConnection(asyncio.Protocol):
    """A connection to the upstream, kept alive; it carries one `Exchange` at a time."""

    transport: asyncio.Transport

    def __init__(self, client: UpstreamClient, origin: Origin) -> None:
        self.client = client
        self.origin = origin
        self.exchange: Exchange | None = None
        self.idle_since = 0.0
        self.writing_paused = False
        self._reused = False
        self._keep = True
        self._closed = False
        self._reset_response()

    def begin(self, exchange: Exchange) -> None:
        """Take up an exchange; its request is written to `transport` next."""
        self._reused = self.idle_since > 0
        self.exchange = exchange
        self._reset_response()

    def abandon(self) -> None:
        """Close at once, and say nothing to anyone."""
        self.exchange = None
        self._closed = True
        self.transport.abort()

    def is_usable(self) -> bool:
        """Whether an idle connection still stands: nothing is to be read from it, not even its end.

        The kernel is asked, since the loop may not have come to a close that has already arrived.
        """
        if self._closed or self.transport.is_closing():
            return False
        return not self._readable.poll(0)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self._readable = select.poll()
        descriptor = transport.get_extra_info("socket").fileno()
        self._readable.register(descriptor, select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        exchange = self.exchange
        if (
            exchange is None
        ):  # bytes that belong to no request: whatever they are, nobody may see them
            self._close()
            return
        exchange.touched = self.client.time()
        if self._rest:
            self._rest += data
        else:
            self._receive(exchange, data)

    def _receive(self, exchange: Exchange, data: bytes) -> None:
        try:
            if self._body is None:
                behind = self._read_head(exchange, data)
                if behind is None:
                    return
                data = behind
            assert self._body is not None
            payload, rest = self._body.feed(data)
        except ProtocolError as error:
            self._break(error)
            return
        if exchange is not self.exchange:
            return
        complete = self._body.complete
        if complete:
            self._complete(exchange, stray=bool(rest))
        elif rest:
            self._rest, self._breathing = rest, True
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on, exchange)
        exchange.sink.response_received(payload, complete)

    def _go_on(self, exchange: Exchange) -> None:
        """Read on in what one read brought, unless nobody takes it now."""
        if exchange is not self.exchange or exchange.reading_paused or not self._rest:
            return
        rest, self._rest = self._rest, b""
        self._receive(exchange, rest)
        if exchange is self.exchange and not exchange.reading_paused and not self._rest:
            self._breathing = False
            self.transport.resume_reading()

    def resume_reading(self) -> None:
        """Take from the upstream again, first what is here already."""
        if self._rest and self.exchange is not None:
            asyncio.get_running_loop().call_soon(self._go_on, self.exchange)
        else:
            self._breathing = False
            self.transport.resume_reading()

    def eof_received(self) -> None:
        """Called by asyncio; the transport closes and `connection_lost` follows."""
        if (
            self._body is not None
            and self._body.length == UNTIL_CLOSE
            and self.exchange is not None
        ):
            exchange = self.exchange
            self._complete(exchange, stray=True)
            exchange.sink.response_received(b"", True)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio."""
        self._break(error)

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self.writing_paused = True
        if self.exchange is not None:
            self.exchange.pause_sending()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self.writing_paused = False
        if self.exchange is not None:
            self.exchange.resume_sending()

    # Inside

    def _reset_response(self) -> None:
        self._head = HeadReader()
        self._body: Body | None = None
        self._rest = b""  # chunks that wait for the loop's next turn
        self._breathing = False
        self._informational = 0

    def _read_head(self, exchange: Exchange, data: bytes) -> bytes | None:
        """Read the head, 1xx ones before it; what stands behind it, or None while it is not whole."""
        while True:
            found = self._head.feed(data)
            if found is None:
                return None
            head, data = parse_response_head(found[0]), found[1]
            if head.status >= 200:
                break
            self._check_informational(head)
            exchange.sink.informational_received(head)
        length = response_length(head, exchange.method)
        self._body = Body(length)
        self._keep = head.keeps_alive() and length != UNTIL_CLOSE
        exchange.sink.response_started(head, length)
        return data

    def _check_informational(self, head: ResponseHead) -> None:
        self._informational += 1
        if head.status == 101 or self._informational > MAX_INFORMATIONAL:
            raise ProtocolError("an informational response was not asked for")
        if declared_length(head) is not None:
            raise ProtocolError("an informational response has no body")

    def _complete(self, exchange: Exchange, *, stray: bool) -> None:
        """The response is whole: back to the pool, unless either side left something behind."""
        self.exchange = None
        exchange.completed()
        if self._keep and exchange.sent and not stray and not self.transport.is_closing():
            if exchange.reading_paused or self._breathing:
                self.transport.resume_reading()
            self.client.put_idle(self)
        else:
            self._close()

    def _break(self, error: Exception | None) -> None:
        exchange, self.exchange = self.exchange, None
        answered = self._body is not None or len(self._head) > 0 or self._informational > 0
        self._close()
        if exchange is not None:
            exchange.connection_lost(error, answered=answered, reused=self._reused)

    def _close(self) -> None:
        self._closed = True
        self.client.drop_idle(self)
        self.transport.abort()


class UpstreamClient(AsyncHTTPClient):
    """Tornado's `AsyncHTTPClient` on kept-alive connections, with as many at once as are asked for.

    `fetch` follows no redirect, adds no header but ``Host`` and the body's length, decompresses
    nothing, and awaits ``streaming_callback`` (which may be a coroutine) before it reads on;
    ``header_callback`` gets each line of the head. ``request_timeout`` holds for the whole of a
    fetch, 0 is none. A failed exchange raises `UpstreamError`. The relay uses `exchange`, which is
    the same without a future and a response object for every request.

    Times are seconds. ``opened`` and ``reused`` count connections: new ones, and exchanges that went
    over a kept one. ``ssl_context`` verifies certificates always; SSL_CERT_FILE and SSL_CERT_DIR
    name others to trust, as OpenSSL reads them.
    """

    def initialize(
        self,
        defaults: dict[str, Any] | None = None,
        connect_timeout: float = 10.0,
        idle_timeout: float = 600.0,
    ) -> None:
        """Called by Tornado's constructor, with its keyword arguments."""
        super().initialize(defaults)
        self.connect_timeout = connect_timeout
        self.idle_timeout = idle_timeout
        self.time = time.monotonic
        self.exchanges: set[Exchange] = set()
        self.opened = 0
        self.reused = 0
        self._idle: dict[Origin, list[UpstreamConnection]] = {}
        self._tcp = TCPClient()
        self._reached: dict[Origin, tuple[Any, float]] = {}
        self._loop = asyncio.get_event_loop()
        self._sweeper = self._loop.call_later(self._sweep_interval(), self._sweep)

    @functools.cached_property
    def ssl_context(self) -> ssl.SSLContext:
        """Made at the first TLS connection; loading the system's certificates takes a while."""
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    def exchange(
        self,
        origin: Origin,
        method: str,
        head: bytes,
        body: bytes,
        sink: ResponseSink,
        **kwargs: Any,
    ) -> Exchange:
        """An `Exchange` that is not started yet; the arguments are its constructor's."""
        return Exchange(self, origin, method, head, body, sink, **kwargs)

    def fetch_impl(self, request: HTTPRequest, callback: Callable[[HTTPResponse], None]) -> None:
        """Called by `fetch`."""
        Fetch(self, request, callback).start()

    def close(self) -> None:
        """Close every connection; exchanges under way hear nothing more."""
        self._sweeper.cancel()
        for exchange in list(self.exchanges):
            exchange.abort()
        for connections in self._idle.values():
            for connection in list(connections):
                connection.abandon()
        self._idle.clear()
        super().close()

    # The pool

    def take_idle(self, origin: Origin) -> UpstreamConnection | None:
        """The idle connection used last, if one still stands."""
        connections = self._idle.get(origin)
        while connections:
            connection = connections.pop()
            if connection.is_usable():
                self.reused += 1
                return connection
            connection.abandon()
        return None

    def put_idle(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next exchange."""
        connection.idle_since = self.time()
        self._idle.setdefault(connection.origin, []).append(connection)

    def drop_idle(self, connection: UpstreamConnection) -> None:
        """Forget a connection that closed."""
        connections = self._idle.get(connection.origin)
        if connections and connection in connections:
            connections.remove(connection)

    async def connect(self, origin: Origin, timeout: float | None = None) -> UpstreamConnection:
        """Open a connection; asyncio's transport costs less for each read and write than IOStream.

        ``timeout`` is the caller's, in seconds; the loop forgets a TLS handshake after as long."""
        connection = await self._reach_again(origin)
        if connection is None:
            connection = await self._reach(origin, timeout)
        self.opened += 1
        return connection

    async def _reach(self, origin: Origin, timeout: float | None) -> UpstreamConnection:
        """Connect by Tornado's TCPClient, which resolves and tries the addresses of both families."""
        stream = await self._tcp.connect(origin.host, origin.port)
        if stream.closed():
            raise ConnectionResetError
        try:
            connected = stream.socket.dup()
        finally:
            stream.close()
        connected.setblocking(False)
        try:
            self._reached[origin] = (connected.getpeername(), self.time() + ADDRESS_TTL)
            return await self._open(origin, timeout, sock=connected)
        except BaseException as error:
            connected.close()
            if origin.scheme == "https" and isinstance(error, ConnectionError):
                raise ssl.SSLError("the peer closed during the handshake") from None
            raise

    async def _reach_again(self, origin: Origin) -> UpstreamConnection | None:
        """Connect to the address that was reached lately, without asking the resolver again; None
        where there is none, or it does not answer as before."""
        address, until = self._reached.get(origin, (None, 0.0))
        if address is None or self.time() > until:
            return None
        try:
            async with asyncio.timeout(REACH_AGAIN_TIMEOUT):
                return await self._open(
                    origin, REACH_AGAIN_TIMEOUT, host=address[0], port=address[1]
                )
        except BaseException as error:  # the connect timeout may be shorter, and cancel
            self._reached.pop(origin, None)
            if isinstance(error, OSError):  # TimeoutError and ssl.SSLError are such
                return None
            raise

    async def _open(
        self, origin: Origin, timeout: float | None, **where: Any
    ) -> UpstreamConnection:
        secure = origin.scheme == "https"
        _, connection = await self._loop.create_connection(
            lambda: UpstreamConnection(self, origin),
            ssl=self.ssl_context if secure else None,
            server_hostname=origin.host if secure else None,
            # uvloop holds an attempt that was given up for as long, by default for a minute.
            ssl_handshake_timeout=timeout if secure else None,
            **where,
        )
        return connection

    @property
    def idle(self) -> int:
        """How many connections are kept for the next exchange."""
        return sum(map(len, self._idle.values()))

    def _sweep_interval(self) -> float:
        return min(SWEEP_INTERVAL, self.idle_timeout / 4)

    def _sweep(self) -> None:
        moment = self.time()
        for exchange in list(self.exchanges):
            exchange.check_silence(moment, self.idle_timeout)
        for connections in self._idle.values():
            while connections and moment - connections[0].idle_since > POOL_IDLE_TIMEOUT:
                connections.pop(0).abandon()
        self._sweeper = self._loop.call_later(self._sweep_interval(), self._sweep)


class Fetch:
    """One `AsyncHTTPClient.fetch`: a sink that gathers an HTTPResponse."""

    def __init__(
        self, client: UpstreamClient, request: HTTPRequest, callback: Callable[[HTTPResponse], None]
    ) -> None:
        self.client = client
        self.request = request
        self.callback = callback
        self.started = client.time()
        self.head: ResponseHead | None = None
        self.buffer = io.BytesIO()
        self.exchange: Exchange | None = None
        self.timeout: asyncio.TimerHandle | None = None
        self.producer: asyncio.Future[None] | None = None
        self.sending = asyncio.Event()
        self.sending.set()
        self.delivering: asyncio.Task[None] | None = None
        self.waiting: list[tuple[bytes, bool]] = []

    def start(self) -> None:
        """Send the request."""
        parts = urllib.parse.urlsplit(self.request.url)
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            self._answer(error=ValueError("only http and https URLs can be fetched"))
            return
        origin = Origin(parts.scheme, parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme])
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        method, body, producer = (
            self.request.method,
            self.request.body,
            self.request.body_producer,
        )
        fields = [("Host", origin.authority)] if "Host" not in self.request.headers else []
        fields += self.request.headers.get_all()
        if producer is not None and "Content-Length" not in self.request.headers:
            fields.append(("Transfer-Encoding", "chunked"))
        elif producer is None and (body is not None or method in ("POST", "PUT", "PATCH")):
            fields = [(n, v) for n, v in fields if n != "Content-Length"]
            fields.append(("Content-Length", str(len(body or b""))))
        self.exchange = self.client.exchange(
            origin,
            method,
            head_bytes(f"{method} {target} HTTP/1.1", field_lines(fields)),
            body or b"",
            self,
            streamed=producer is not None,
            connect_timeout=self.request.connect_timeout or 0,
        )
        self.exchange.start()
        if self.request.request_timeout:
            loop = asyncio.get_running_loop()
            self.timeout = loop.call_later(self.request.request_timeout, self._timed_out)
        if producer is not None:
            self.producer = asyncio.ensure_future(self._produce(producer, fields))

    async def _produce(self, producer: Callable[..., Any], fields: list[tuple[str, str]]) -> None:
        chunked = fields[-1] == ("Transfer-Encoding", "chunked")
        assert self.exchange is not None

        async def write(data: bytes) -> None:
            await self.sending.wait()
            cast(Exchange, self.exchange).write(framed(data) if chunked else data)

        try:
            await producer(write)
        except Exception as error:  # noqa: BLE001 - the caller's own code
            self.exchange.abort()
            self._answer(error=error)
            return
        self.exchange.finish(LAST_CHUNK if chunked else b"")

    # ResponseSink

    def informational_received(self, head: ResponseHead) -> None:
        """A caller of `fetch` sees the real response only."""

    def response_started(self, head: ResponseHead, length: int) -> None:
        """Hand each line of the head to ``header_callback``."""
        self.head = head
        if self.request.header_callback is not None:
            self.request.header_callback(f"HTTP/1.{head.version} {head.status} {head.reason}\r\n")
            for header in head.fields:
                self.request.header_callback(f"{header.line}\r\n")
            self.request.header_callback("\r\n")

    def response_received(self, data: bytes, complete: bool) -> None:
        """Keep the body, or hand it to ``streaming_callback`` and read on when that is done."""
        self.waiting.append((data, complete))
        if self.delivering is None:
            self.delivering = asyncio.get_running_loop().create_task(self._deliver())

    async def _deliver(self) -> None:
        assert self.exchange is not None
        streaming_callback = self.request.streaming_callback
        self.exchange.pause_reading()
        while self.waiting:
            data, complete = self.waiting.pop(0)
            if data and streaming_callback is not None:
                try:
                    awaitable = streaming_callback(data)
                    if awaitable is not None:
                        await awaitable
                except Exception as error:  # noqa: BLE001 - the caller's own code
                    self.exchange.abort()
                    self._answer(error=error)
                    return
            else:
                self.buffer.write(data)
            if complete:
                self._answer()
                return
        self.delivering = None
        self.exchange.resume_reading()

    def response_failed(self, error: UpstreamError) -> None:
        """Answer with the error."""
        if self.delivering is not None:
            self.delivering.cancel()
        self._answer(error=error)

    def pause_sending(self) -> None:
        """Hold the body producer."""
        self.sending.clear()

    def resume_sending(self) -> None:
        """Let the body producer go on."""
        self.sending.set()

    def request_taken(self) -> None:
        """Nothing is held of a request but by who asks."""

    def _timed_out(self) -> None:
        if self.exchange is not None:
            self.exchange.abort()
        self.response_failed(UpstreamError("The request took longer than request_timeout.", 504))

    def _answer(self, error: Exception | None = None) -> None:
        if self.timeout is not None:
            self.timeout.cancel()
        if self.producer is not None and error is not None:
            self.producer.cancel()
        headers = httputil.HTTPHeaders()
        for header in self.head.fields if self.head else ():
            headers.add(header.name, header.value)
        self.buffer.seek(0)
        # Tornado's status for "no response" is 599.
        status = self.head.status if self.head and error is None else 599
        self.callback(
            HTTPResponse(
                self.request,
                status,
                headers=headers,
                buffer=self.buffer,
                effective_url=self.request.url,
                error=error,
                request_time=self.client.time() - self.started,
                reason=self.head.reason if self.head else None,
            )
        )


# ─── Rules ────────────────────────────────────────────────────────────────────────────────────────

BEARER = re.compile(r"bearer[ \t]+(.*)", re.IGNORECASE)
# Where a caller may show a credential, in the order in which they are looked at (LiteLLM's).
CREDENTIAL_HEADERS = ("x-litellm-api-key", "authorization", "x-api-key")
OWN_CREDENTIAL_NAMES = {"authorization": "Authorization", "x-api-key": "x-api-key"}
REFUSED_KEYS = {"revoked": "blocked", "expired": "expired", "deleted": "deleted"}


@dataclass(slots=True)
class Caller:
    """Who sends a request: the keys he showed and what goes upstream in their place.

    ``hashed`` and ``key`` are None for the master key and in open mode. ``own`` is a credential of
    the caller's, as the header (name, value) it came in: then his account pays. ``presented`` is
    every key of this gateway that he showed; none of them may go upstream in any field.
    """

    presented: tuple[str, ...] = ()
    hashed: str | None = None
    key: VirtualKey | None = None
    is_master: bool = False
    own: tuple[str, str] | None = None


def candidates(headers: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """The credentials shown, as (lower-case header name, value without its scheme), empty ones left out.

    ``Authorization`` counts with the Bearer scheme only; the others with or without it, as in LiteLLM.
    """
    for header in CREDENTIAL_HEADERS:
        for value in headers.get(header, ()):
            bearer = BEARER.fullmatch(value)
            credential = bearer[1].strip() if bearer else "" if header == "authorization" else value
            if credential and credential.lower() != "bearer":
                yield header, credential


def own_credential(header: str, credential: str) -> tuple[str, str] | None:
    """The header in which a caller's own credential goes upstream: the one it came in."""
    name = OWN_CREDENTIAL_NAMES.get(header)
    if name is None:
        return None
    return name, f"Bearer {credential}" if header == "authorization" else credential


UNREAD = Order()  # until the body is here


@dataclass(slots=True)
class Grant:
    """What an admitted request holds until it is settled: a slot, and USD against budgets, by their
    patterns. ``order`` is what it asks for."""

    caller: Caller
    route: Route
    started: datetime
    order: Order = field(default_factory=lambda: UNREAD)
    slot: bool = False
    holds: dict[str, Decimal] = field(default_factory=dict)
    open: bool = True

    @property
    def key(self) -> VirtualKey | None:
        """The key whose limits hold; None where none do."""
        return self.caller.key

    @property
    def booked_key(self) -> VirtualKey | None:
        """The key that pays; None where the caller pays himself."""
        return None if self.caller.own else self.caller.key


@dataclass(slots=True)
class Settled:
    """How a request ended, for the log and /spend/logs. ``cost`` is USD."""

    model: str = ""
    tally: Tally = field(default_factory=Tally)
    estimated: bool = False

    @property
    def cost(self) -> Decimal:
        """USD."""
        return self.tally.spend


KEY_SHARE = 4  # of what is held at once one key gets a quarter
MEMORY_SHARE = 4  # and all get a quarter of the machine's memory
TRY_SOON = (("retry-after", "1"),)


class Held:
    """How many bytes requests hold at once: never more than ``limit``, nor for one key than a part
    of it, so that slow bodies cannot keep others out."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.share = limit // KEY_SHARE
        self.total = 0
        self._shares: dict[str, int] = {}

    def take(self, key: str, size: int) -> None:
        """Hold so many bytes more for a key (its hash; empty for the operator's requests, which have
        no share). Raises APIError 413, 429 or 503."""
        limit = self.share if key else self.limit
        if size > limit:
            raise APIError(
                413,
                f"The gateway holds at most {limit:,} bytes of a request. Send a smaller one, or ask"
                " whoever runs it for more --max-held-bytes.",
            )
        if self.total + size > self.limit:
            raise APIError(
                503,
                "The gateway holds as much as it can for requests under way. Try again.",
                headers=TRY_SOON,
            )
        mine = self._shares.get(key, 0) + size
        if key and mine > self.share:
            raise APIError(
                429,
                f"The gateway holds at most {self.share:,} bytes for one key's requests under way."
                " Try again.",
                headers=TRY_SOON,
            )
        self.total += size
        self._shares[key] = mine

    def find_room(self, key: str, size: int) -> bool:
        """Whether so many bytes more are held now; or so many less, below 0."""
        if size < 0:
            self.give_back(key, -size)
            return True
        try:
            self.take(key, size)
        except APIError:
            return False
        return True

    def give_back(self, key: str, size: int) -> None:
        """Hold so many bytes less."""
        self.total -= size
        left = self._shares[key] - size
        if left:
            self._shares[key] = left
        else:
            del self._shares[key]


NO_MODEL = NO_KEY = "-"  # what stands in logs and sums for none
MASTER_NAME = "master"
MAX_LABELS = 1000  # keys, and keys with their models, that /metrics tells apart
MAX_KEY_STARTS = 50  # of what may be a key, in one text; no client's fields have so many
# Without what ends or escapes a string, so that it is known in a log line that has one.
PRINTABLE_KEY = re.compile(r'sk-(?:(?!["\\])[\x21-\x7e]){1,253}')
BUDGET_WAIT = 2  # seconds after which a request that a budget has no room for may ask again


class Admission:
    """Says who a caller is and whether he may, and books what he used.

    `authenticate`, `admit` and `admit_body` come before anything goes upstream; each grant is given
    back with `settle`, exactly once.

    A budget is passed by one answer at most: while a request is under way its worst case is held,
    and it is let in only while what is spent and held is below the budget. So far from the edge
    nothing waits, and near it a key works one request at a time.

    Open mode (any credential or none is let in) holds where no master key is set and the keys file
    has no key. It is settled at the start: a gateway that was started closed, and so may listen to
    the world, never falls open when its last key goes. ``booked`` is what was used since the start,
    by key and model, those beyond MAX_LABELS as one.
    """

    def __init__(
        self,
        settings: Settings,
        store: KeyStore,
        prices: Prices,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.prices = prices
        self.clock = clock
        self.held = Held(settings.max_held_bytes or memory_size() // MEMORY_SHARE)
        self._started_open = not settings.master_key and not store.keys
        self._master_key = settings.master_key
        self._master = hash_key(settings.master_key) if settings.master_key else ""
        self._address = settings.address
        self.booked: dict[tuple[str, str], Tally] = {}
        self._unpriced: list[Callable[[], None]] = []

    @property
    def has_master(self) -> bool:
        """Whether a master key is set."""
        return bool(self._master)

    @property
    def is_open(self) -> bool:
        """Whether any or no credential is let in."""
        return self._started_open and not self.store.keys

    def is_master(self, credential: str) -> bool:
        """Whether this is the master key; takes the same time whatever the answer."""
        return self._is_master(hash_key(credential))

    def shows_master(self, headers: Mapping[str, Sequence[str]]) -> bool:
        """Whether the master key is among the credentials of request headers."""
        shown = [self.is_master(credential) for _, credential in candidates(headers)]
        return any(shown)

    def refuse_foreign(self, host: str, head: Mapping[str, Sequence[str]]) -> None:
        """In open mode nothing but where a request comes from tells a program on this machine from
        a web page in its browser, or from one whose name leads here (DNS rebinding). Raises 403."""
        if not self.is_open:
            return
        places = [origin.partition("://")[2] for origin in head.get("origin", ())]
        places += [host] if host else []  # HTTP/1.0 has none, and no browser speaks it
        crosses = any(site.lower() == "cross-site" for site in head.get("sec-fetch-site", ()))
        if crosses or not all(map(self._is_here, places)):
            raise APIError(
                403,
                "This gateway is open, so it takes requests to and from this machine's own addresses"
                " only. Set GATEWAY_MASTER_KEY where it is started, and use a virtual key.",
            )

    def _is_here(self, authority: str) -> bool:
        """Whether a host (with or without port) is loopback, or where --address says to listen."""
        host = re.sub(r":[0-9]*$", "", authority).strip("[]").lower()
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return bool(host) and host == self._address.lower()
        # An address that is typed as such cannot have been led here by a name.
        return address.is_loopback or bool(self._address)

    def authenticate(self, headers: Mapping[str, Sequence[str]]) -> Caller:
        """Find the caller in request headers (lower-case name → values). Raises APIError 401."""
        own: tuple[str, str] | None = None
        match: tuple[str, VirtualKey, str] | None = None
        is_master = False
        presented: tuple[str, ...] = ()
        refused = ""
        shown = False
        for header, credential in candidates(headers):
            shown = True
            hashed = hash_key(credential)
            if self._is_master(hashed):
                is_master = is_master or match is None
            elif found := self.store.lookup_hash(hashed):
                if found[2] != "active":
                    refused = refused or REFUSED_KEYS[found[2]]
                elif match is None and not is_master:
                    match = found
            else:
                if own is None and credential.startswith(OWN_CREDENTIAL_PREFIX):
                    own = own_credential(header, credential)
                continue
            if credential not in presented:
                presented += (credential,)
        if match is not None:
            return Caller(presented, match[0], match[1], own=own)
        if is_master or self.is_open:
            return Caller(presented, is_master=is_master, own=own)
        if refused:
            raise APIError(
                401, f"This virtual key is {refused}. Ask whoever runs the gateway for another."
            )
        if shown:
            raise APIError(401, "Unknown API key. Use a virtual key that this gateway gave out.")
        raise APIError(
            401,
            "No API key was sent. Send a virtual key as 'x-api-key' or 'Authorization: Bearer'.",
        )

    def holds_key(self, text: str) -> bool:
        """Whether a key of this gateway stands in a text."""
        if self._master_key and self._master_key in text:
            return True
        if KEY_PREFIX not in text:
            return False
        starts = [match.start() for match in re.finditer(KEY_PREFIX, text)]
        if len(starts) > MAX_KEY_STARTS:
            return True
        # A key may have any printable characters, so whatever length it may have is tried.
        for start in starts:
            most = text[start : start + MAX_KEY_LENGTH].encode("latin-1", "replace")
            digest = hashlib.sha256(most[: MIN_KEY_LENGTH - 1])
            for end in range(MIN_KEY_LENGTH, len(most) + 1):
                digest.update(most[end - 1 : end])
                if self.store.lookup_hash(digest.hexdigest()):
                    return True
        return False

    def admit(self, caller: Caller, method: str, path: str) -> Grant:
        """Let a request in by its head alone. Raises APIError 403 or 429; then nothing is held."""
        moment = now()
        route = route_of(method.upper(), path)
        grant = Grant(caller, route, moment)
        key = caller.key
        if key is None:
            return grant
        check_route(key, route, path, pays=caller.own is None)
        account, clock = key.account, self.clock()
        parallel = key.max_parallel_requests
        if parallel is not None and account.running >= parallel:
            raise rate_limited(key, clock, f"{parallel} requests at a time", 1)
        resize_buckets(key, clock)
        for bucket, what in ((account.requests, "requests"), (account.tokens, "tokens")):
            if bucket is not None and (wait := bucket.seconds_until(1, clock)) > 0:
                raise rate_limited(key, clock, f"{bucket.limit:,} {what} a minute", wait)
        if caller.own is None and not route.free:
            if key.has_budget and not self.prices.available:
                raise APIError(
                    503,
                    "This key has a budget, and the gateway does not know what tokens cost. Whoever"
                    " runs it must install genai-prices, or start it with --prices.",
                )
            for pattern, budget in key.budgets():
                held = key.account.window(pattern).held if route.billed else ZERO
                refuse_where_full(key, pattern, budget, held, ZERO, moment)
        if account.requests is not None:
            account.requests.draw(1, clock)
        account.running += 1
        grant.slot = True
        return grant

    def reads_body(self, grant: Grant) -> bool:
        """Whether a rule of the key looks at the request's body."""
        key = grant.key
        if key is None or grant.route.unread:
            return False
        return bool(key.models) or self._is_held(grant)

    def _is_held(self, grant: Grant) -> bool:
        """Whether what a request may cost is held against a budget."""
        key = grant.booked_key
        return key is not None and key.has_budget and grant.route.billed

    def admit_body(self, grant: Grant, body: bytes) -> Steps[None]:
        """Check the models in a body, and hold what it may cost at worst. Raises APIError 400, 403,
        429. Yields where the loop may do something else, of which a large body needs some."""
        key, route = grant.key, grant.route
        if key is None or not self.reads_body(grant):
            if route.billed:
                grant.order = glance(body)
            return
        document: object = None
        if key.models and body:
            document = yield from read_strictly(body, route)
            yield from check_models(key, route, document)
        elif body:
            document = yield from read_leniently(body, route)
        if key.models and not document and not (route.open or route.deletes):
            raise APIError(403, "This key is limited to some models, and this request names none.")
        if not route.billed:
            return
        grant.order = yield from read_order(document, body, batched=route.makes_batch)
        if self._is_held(grant) and self.prices.available:
            self._hold(grant, key)

    def admit_unread(self, grant: Grant, size: int) -> None:
        """The same for a body of ``size`` bytes that is too large to be kept. Raises APIError 413."""
        if self.reads_body(grant):
            raise APIError(
                413,
                f"This key is limited to some models or to a budget, so its requests are read, and"
                f" may be {JSON_BODY_LIMIT:,} bytes long.",
            )
        grant.order = Order(prompt=tokens_in(size))

    def _hold(self, grant: Grant, key: VirtualKey) -> None:
        """Hold what the grant's order may cost at worst, against every budget, or nothing."""
        if not self.prices.loaded:
            self.prices.load()
        worst: dict[str, Decimal] = {}
        for model, tally in self.prices.worst(grant.order, grant.started):
            for pattern, _ in key.budgets(model):
                worst[pattern] = worst.get(pattern, ZERO) + tally.spend
        batched = grant.route.makes_batch
        for pattern, budget in key.budgets(""):
            if pattern in worst:
                held, cost = key.account.window(pattern).held, worst[pattern]
                refuse_where_full(key, pattern, budget, held, cost, grant.started, fit=batched)
        for pattern, cost in worst.items():
            key.account.window(pattern).held += cost
        grant.holds = worst

    def settle(self, grant: Grant, measured: Measured | None, *, failed: bool) -> Settled:
        """Give back what a grant holds and book what was used. ``failed``: no answer, or an error."""
        order = grant.order
        settled = Settled(model=(measured.model if measured else "") or order.model)
        if not grant.open:
            return settled
        grant.open = False
        if grant.caller.own is not None:
            measured = None
        if grant.slot:
            cast(VirtualKey, grant.key).account.running -= 1
        if measured is None:
            self._release(grant)
        else:
            measured.complete_with(order)
            settled.model = measured.model
            settled.estimated = measured.estimated
            if self.is_priced:
                self._book(grant, measured, settled)
            else:
                self._unpriced.append(lambda: self._book(grant, measured, settled))
        payer = grant.booked_key
        if payer is not None:
            payer.account.usage.count(
                day_of(grant.started), settled.model or NO_MODEL, failed=failed
            )
            payer.account.last_active = now()
            self.store.touch(payer.account)
        return settled

    # Batches

    def own_batch(self, grant: Grant, name: str) -> None:
        """A batch was made: what is held for it stays until it is booked."""
        payer = grant.booked_key
        if payer is not None:
            # An upstream that gives an id twice frees what was held for it.
            self.finish_batch(name)
            self.store.own_batch(payer.account, name).held = grant.holds
            grant.holds = {}

    def claim_batch(self, caller: Caller, name: str) -> None:
        """A batch that nobody here made belongs to the key that first fetches its results."""
        if caller.key is not None and self.store.batch_owner(name) is None:
            self.store.own_batch(caller.key.account, name)

    def book_result(self, name: str, line: int, measured: Measured) -> None:
        """Book a line of a batch's results to the key that made it, once, however often it is read."""
        account = self.store.batch_owner(name)
        if account is None or line <= account.batches[name].lines:
            return
        account.batches[name].lines = line
        if measured.seen:  # it was too long to be read
            measured.complete_with(Order())
        if not measured.usage and measured.beyond is None:
            return
        measured.usage["service_tier"] = "batch"
        moment = now()

        def book() -> None:
            self._book_to(account, self.prices.charge(measured, moment), moment)

        self.when_priced(book)

    def finish_batch(self, name: str, *, lost: bool = False) -> None:
        """All results of a batch are booked; where they are ``lost``, what is held for it is."""
        account = self.store.batch_owner(name)
        if account is None or account.batches[name].booked:
            return
        batch = account.batches[name]
        held, batch.held, batch.booked = batch.held, {}, True
        for pattern, amount in held.items():
            account.window(pattern).held -= amount
        key = self.store.keys.get(account.hashed)
        if lost and held and key is not None:
            log.warning(
                "key %s: batch %s is gone, so its worst case is booked",
                key.shown_name,
                printable(name),
            )
            moment = now()
            for pattern, _ in key.budgets(""):
                key.spent(moment, pattern)
                account.window(pattern).spend += held.get(pattern, ZERO)
            total = held.get(ALL_MODELS, max(held.values()))
            account.usage.add(day_of(moment), NO_MODEL, Tally(spend=total))
        self.store.touch(account)

    def when_priced(self, book: Callable[[], None]) -> None:
        """Call this once the prices are there, which they are but for a moment after the start.

        Until then calls wait in their order.
        """
        if self.is_priced:
            book()
        else:
            self._unpriced.append(book)

    @property
    def is_priced(self) -> bool:
        """Whether the prices are there, or will never be."""
        return self.prices.loaded or not self.prices.available

    def prices_loaded(self) -> None:
        """Book what was used before the prices were there."""
        waiting, self._unpriced = self._unpriced, []
        for book in waiting:
            book()

    # Inside

    def _is_master(self, hashed: str) -> bool:
        return bool(self._master) and hmac.compare_digest(hashed, self._master)

    def _release(self, grant: Grant) -> None:
        if grant.key is not None:
            for pattern, amount in grant.holds.items():
                grant.key.account.window(pattern).held -= amount
        grant.holds = {}

    def _book(self, grant: Grant, measured: Measured, settled: Settled) -> None:
        """Turn what is held into what was used."""
        self._release(grant)
        if measured.blind:
            charges = self.prices.worst(grant.order, grant.started)
        else:
            charges = self.prices.charge(measured, grant.started)
        for _, tally in charges:
            settled.tally.add(tally)
        caller = grant.caller
        if caller.key is not None:
            self._book_to(caller.key.account, charges, grant.started)
            return
        name = MASTER_NAME if caller.is_master else NO_KEY
        for model, tally in charges:
            self._count(name, model or NO_MODEL, tally)

    def _book_to(
        self, account: Account, charges: Iterable[tuple[str, Tally]], moment: datetime
    ) -> None:
        # The newest record, which an update or a regeneration may have put there.
        key = self.store.keys.get(account.hashed)
        if key is None:
            return
        day, present = day_of(moment), now()
        for model, tally in charges:
            account.usage.add(day, model or NO_MODEL, tally)
            self._count(key.shown_name, model or NO_MODEL, tally)
            key.spent(present)
            account.window().spend += tally.spend
            for pattern, _ in key.budgets(model):
                if pattern:
                    key.spent(present, pattern)
                    account.window(pattern).spend += tally.spend
            if account.tokens is not None:
                account.tokens.draw(rated_tokens(tally), self.clock())
        self._warn(key, present)
        self.store.touch(account)

    def _count(self, key: str, model: str, tally: Tally) -> None:
        label = (key, model)
        if label not in self.booked and len(self.booked) >= MAX_LABELS:
            label = (OTHER_MODELS, OTHER_MODELS)
        self.booked.setdefault(label, Tally()).add(tally)

    def _warn(self, key: VirtualKey, moment: datetime) -> None:
        """Log that a soft budget is passed, once a window."""
        if key.soft_budget is None or key.spent(moment) < key.soft_budget:
            return
        start = window_start(key.budget_duration, moment)
        if key.account.warned_window != start:
            key.account.warned_window = start
            log.warning(
                "key %s has spent $%s, its soft budget is $%s",
                key.shown_name,
                dollars(key.spent(moment)),
                dollars(key.soft_budget),
            )


def check_route(key: VirtualKey, route: Route, path: str, *, pays: bool) -> None:
    """Raise APIError 403 for a path that the key may not call. ``pays``: at the gateway's cost.

    ``allowed_routes`` are patterns with ``*``, written with or without ``/anthropic`` before them.
    """
    if route.open and not key.allowed_routes:
        return
    patterns = [pattern.removeprefix("/anthropic") for pattern in key.allowed_routes]
    matching = [pattern for pattern in patterns if fnmatch.fnmatchcase(path, pattern)]
    if not route.open:
        matching = [p for p in matching if p.startswith(route.group)]
    shown = printable(path)
    if not matching:
        raise APIError(
            403,
            f"This key may not call {shown}; its 'allowed_routes' leave it out."
            if route.open
            else f"This key may not call {shown}: keys reach messages, batches, models, files and"
            " skills, and more only where their 'allowed_routes' name it.",
        )
    if not route.open and pays and key.has_budget and not key.unmetered_routes:
        raise APIError(
            403,
            f"This key has a budget, and what {shown} costs cannot be counted. Whoever runs the"
            " gateway may give the key 'unmetered_routes': true.",
        )


def check_models(key: VirtualKey, route: Route, document: object) -> Steps[None]:
    """Raise APIError 403 unless every model that a body may reach is one of the key's."""
    checked: set[str] = set()
    for number, model in enumerate(models_in(document, route)):
        if number % BREATH == BREATH - 1:
            yield
        if model in checked:
            continue
        if model is None:
            raise APIError(
                403, "This key is limited to some models; name the 'fallbacks', not 'default'."
            )
        if not any(fnmatch.fnmatchcase(model, pattern) for pattern in key.models):
            raise APIError(403, f"This key may not use the model {model_of(model)!r}.")
        checked.add(model)


def resize_buckets(key: VirtualKey, clock: float) -> None:
    """Bring the key's buckets in line with its limits, which may have been updated."""
    account = key.account
    account.requests = resized(account.requests, key.rpm_limit, clock)
    account.tokens = resized(account.tokens, key.tpm_limit, clock)


def resized(bucket: Bucket | None, limit: int | None, clock: float) -> Bucket | None:
    """A bucket of that limit, with what was drawn from it still drawn."""
    if limit is None:
        return None
    if bucket is None:
        return Bucket(limit, clock)
    if bucket.limit != limit:
        bucket.resize(limit, clock)
    return bucket


def rate_limited(key: VirtualKey, clock: float, limit: str, wait: float) -> APIError:
    """The 429 of a limit; retry-after is whole seconds (RFC 9110 section 10.2.3), rounded up."""
    seconds = max(1, math.ceil(wait))
    headers = [("retry-after", str(seconds)), *rate_fields(key, {}, clock)]
    message = f"This key is limited to {limit}. Try again in {seconds} seconds."
    return APIError(429, message, headers=headers)


RATE_FIELDS = ("limit", "remaining", "reset")  # of anthropic-ratelimit-{kind}-…
REQUEST_LIMIT_FIELDS, TOKEN_LIMIT_FIELDS = (
    tuple(f"anthropic-ratelimit-{kind}-{what}" for what in RATE_FIELDS)
    for kind in ("requests", "tokens")
)


def rate_fields(
    key: VirtualKey, upstream: Mapping[str, Sequence[str]], clock: float
) -> list[tuple[str, str]]:
    """anthropic-ratelimit-* of the key's own limits, where they are tighter than upstream's.

    (platform.claude.com, api/rate-limits, "Response headers": limit, remaining, reset in RFC 3339.)
    """
    account = key.account
    fields: list[tuple[str, str]] = []
    for names, bucket in (
        (REQUEST_LIMIT_FIELDS, account.requests),
        (TOKEN_LIMIT_FIELDS, account.tokens),
    ):
        if bucket is None:
            continue
        remaining = max(0, math.floor(bucket.level(clock)))
        theirs = upstream.get(names[1])
        told = theirs[0] if theirs else ""
        if told.isascii() and told.isdigit() and float(told) <= remaining:
            continue
        wait = math.ceil(bucket.seconds_until(bucket.limit, clock))
        reset = cast(str, iso(moment_of(int(time.time()) + wait)))
        values = (str(bucket.limit), str(remaining), reset)
        fields += zip(names, values, strict=True)
    return fields


def rated_tokens(tally: Tally) -> int:
    """The tokens that count against ``tpm_limit``: all but those read from the cache (api/rate-limits)."""
    return tally.input_tokens + tally.written + tally.output_tokens


def refuse_where_full(
    key: VirtualKey,
    pattern: str,
    budget: ModelBudget,
    held: Decimal,
    cost: Decimal,
    moment: datetime,
    *,
    fit: bool = False,
) -> None:
    """Raise APIError 429 where a budget has no room for a request of that cost: where what is spent
    and held has reached it, or where the cost must ``fit`` and does not.

    A spent budget, and a cost that will never fit, are a ``billing_error``, which nobody need try
    again; where others' requests are only in the way, it is a ``rate_limit_error``, which goes by.
    """
    spent, limit = key.spent(moment, pattern), budget.limit
    taken = spent + held
    if spent < limit and (taken + cost <= limit if fit or not cost else taken < limit):
        return
    name = f"Budget for {pattern}" if pattern else "Budget"
    resets, headers = "it does not reset by itself", [DO_NOT_RETRY]
    if budget.duration is not None:
        end = window(budget.duration, moment)[1]
        resets = f"{budget.duration}; resets {end:%Y-%m-%d %H:%M} UTC"
        wait = max(1, math.ceil((end - moment).total_seconds()))
        headers.append(("retry-after", str(wait)))
    told = f"{name} of ${dollars(limit)}"
    if spent >= limit:
        raise APIError(
            429,
            f"{told} reached ({resets}): ${dollars(spent)} is spent.",
            kind="billing_error",
            headers=headers,
        )
    if fit and spent + cost > limit:
        raise APIError(
            429,
            f"{told} ({resets}): ${dollars(spent)} is spent, and this batch may cost"
            f" ${dollars(cost)}. Send a smaller one, or lower its 'max_tokens'.",
            kind="billing_error",
            headers=headers,
        )
    raise APIError(
        429,
        f"{told}: ${dollars(spent)} is spent, and ${dollars(held)} is held for requests and batches"
        f" under way. Try again in {BUDGET_WAIT} seconds.",
        headers=[("retry-after", str(BUDGET_WAIT))],
    )


# ─── Filters ──────────────────────────────────────────────────────────────────────────────────────

# A line of a stream or of batch results, or a whole message, is read up to this size; of longer ones
# the size counts. `json` takes some 40 ms for so much.
MAX_LINE = 4 * MIB
UNASKED_LINE = 64 * KIB  # of it are held without being counted
INFLATE_SLICE = 64 * KIB  # decompressed at a time, so that a small bomb stays small
# The text of deltas; "completion" is that of POST /v1/complete.
DELTA_TEXT = re.compile(rb'"(text|thinking|partial_json|completion)": ?"([^"\\]*(?:\\.[^"\\]*)*)"')
THINKING_START = re.compile(rb'"content_block": ?\{"type": ?"(?:redacted_)?thinking"')
READABLE_CODINGS = ("gzip", "x-gzip", "deflate")


class Inflater:
    """Decompresses gzip (of any number of members), zlib and raw deflate bit by bit.

    `slices` raises zlib.error for anything else, and from then on.
    """

    def __init__(self, coding: str) -> None:
        self._deflate = coding == "deflate"
        self._decoder: Any = None
        self._held = b""

    def slices(self, data: bytes) -> Iterator[bytes]:
        """What these bytes hold, INFLATE_SLICE at a time; what is not taken is lost."""
        data, self._held = self._held + data, b""
        while data:
            if self._decoder is None:
                data = data.lstrip(b"\0")  # members may be padded (gzip's own manual)
                if len(data) < 2:
                    self._held = data
                    return
                self._decoder = zlib.decompressobj(self._window_bits(data))
            plain = self._decoder.decompress(data, INFLATE_SLICE)
            data = self._decoder.unconsumed_tail
            while plain:
                yield plain
                full = len(plain) == INFLATE_SLICE  # then more may be waiting inside
                plain = self._decoder.decompress(data, INFLATE_SLICE) if full else b""
                data = self._decoder.unconsumed_tail
            if self._decoder.eof:
                data, self._decoder = self._decoder.unused_data, None

    @property
    def is_undecided(self) -> bool:
        """Whether bytes came of which is not known yet what they are."""
        return bool(self._held)

    @property
    def is_whole(self) -> bool:
        """Whether what came so far has ended."""
        return self._decoder is None and not self._held

    def _window_bits(self, data: bytes) -> int:
        """How zlib is to read what begins so: "deflate" comes with zlib's header or without
        (RFC 9110 section 8.4.1.2), which is a multiple of 31 (RFC 1950 section 2.2)."""
        if not self._deflate:
            return zlib.MAX_WBITS | 16
        has_header = data[0] & 0x0F == zlib.DEFLATED and (data[0] * 256 + data[1]) % 31 == 0
        return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


class Meter:
    """Reads usage out of a response as it passes: SSE, a JSON message, or batch results (JSONL).

    ``look`` takes the plain body with whatever boundaries; the result is the same for every split.
    Holds at most MAX_LINE bytes of a line or a message, and beyond UNASKED_LINE no more than ``room``
    lets it, which is asked for so many bytes and told (below 0) of those that are held no more.
    ``on_result`` is called with each line of batch results, counted from 1.
    """

    def __init__(
        self,
        content_type: str,
        on_result: Callable[[int, Measured], None] | None = None,
        room: Callable[[int], bool] = lambda size: True,
    ) -> None:
        self.measured = Measured()
        self._on_result = on_result
        self._room = room
        self._asked = 0
        self._lines = 0
        self._whole = on_result is None and not content_type.lower().startswith("text/event-stream")
        # Of a line that has not ended, or of the message; None where it is too long.
        self._held: list[bytes] | None = []
        self._size = 0

    def look(self, data: bytes) -> None:
        """Look at the next part of the body."""
        if self.measured.blind:
            return
        if self._whole:
            self._hold(data)
        elif self._size == 0 and data.endswith(b"\n") and len(data) <= MAX_LINE:
            self._read(data)
        else:
            self._split(data)

    def finish(self, complete: bool) -> Measured:
        """The body has ended, or was cut short."""
        size, held = self._ended()
        if self.measured.blind:
            pass
        elif self._whole and complete and held:
            message = read_members(held, AnswerMembers)
            self.measured = measured_message(message, size)
        elif self._whole:
            self.measured.seen = size
        elif complete:
            self._read_line(size, held)
        elif self._on_result is None and held is None:
            self.measured.seen += size
        elif self._on_result is None and held:
            self._read_text(held)
        return self.measured

    def _hold(self, data: bytes) -> None:
        """Keep a beginning until its end comes; of one that is too long only the size."""
        self._size += len(data)
        if self._held is None or not data:
            return
        more = self._size - UNASKED_LINE - self._asked
        if self._size > MAX_LINE or (more > 0 and not self._room(more)):
            self._held = None
            self._leave_room()
            return
        self._held.append(data)
        self._asked += max(0, more)

    def _leave_room(self) -> None:
        asked, self._asked = self._asked, 0
        if asked:
            self._room(-asked)

    def _split(self, data: bytes) -> None:
        """Read the lines that end here, those of more than MAX_LINE apart."""
        end = line_end(data)
        if not end:
            self._hold(data)
            return
        self._end_line(data[:end])
        last = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        whole = data[end:last]
        if len(whole) > MAX_LINE:
            for line in whole.splitlines(keepends=True):
                self._end_line(line)
        elif whole:
            self._read(whole)
        self._hold(data[last:])

    def _end_line(self, rest: bytes) -> None:
        """A line ends with these bytes."""
        self._hold(rest)
        self._read_line(*self._ended())

    def _ended(self) -> tuple[int, bytes | None]:
        """The size of what has come to its end, and what it is; None where it was too long."""
        size, held = self._size, self._held
        self._size, self._held = 0, []
        self._leave_room()
        return size, None if held is None else b"".join(held)

    def _read_line(self, size: int, line: bytes | None) -> None:
        """Look at a line."""
        if line is not None:
            self._read(line)
        elif self._on_result is not None:
            self._result(Measured(seen=size))
        else:
            self.measured.seen += size

    def _read(self, lines: bytes) -> None:
        """Look at whole lines."""
        if self._on_result is None:
            self._read_events(lines)
            return
        for line in lines.splitlines():
            if line.strip():
                row = read_members(line, ResultRowMembers)
                result = row.get("result") if isinstance(row, dict) else None
                if result is None:  # these are no results, or not in plain text
                    self.measured.blind = True
                    return
                message = result.get("message") if isinstance(result, dict) else None
                self._result(measured_message(message, 0))

    def _result(self, measured: Measured) -> None:
        self._lines += 1
        assert self._on_result is not None
        self._on_result(self._lines, measured)

    def _read_text(self, lines: bytes) -> None:
        """Count the text of deltas."""
        measured = self.measured
        for name, text in DELTA_TEXT.findall(lines):
            size = text_size(text)
            measured.seen += size
            if name == b"thinking":
                measured.thought += size

    def _read_events(self, lines: bytes) -> None:
        """Look at whole lines of a stream; most of them are deltas, and only their text counts."""
        self._read_text(lines)
        measured = self.measured
        if b"content_block_start" in lines:
            measured.empty = False
            if THINKING_START.search(lines):
                measured.thinks = True
        if b'"usage"' not in lines:
            return
        for line in lines.splitlines():
            if b'"usage"' in line and line.startswith(b"data:"):
                self._usage_event(line[5:])

    def _usage_event(self, data: bytes) -> None:
        event = read_json(data)
        if not isinstance(event, dict):
            return
        message = event.get("message")
        if isinstance(message, dict):
            self.measured.model = model_of(message.get("model")) or self.measured.model
            self.measured.merge(message.get("usage"))
        self.measured.merge(event.get("usage"))
        delta = event.get("delta")
        if isinstance(delta, dict) and isinstance(delta.get("stop_reason"), str):
            self.measured.stop_reason = delta["stop_reason"]
            self.measured.final = bool(self.measured.usage)


def line_end(data: bytes) -> int:
    """Where the first line of these bytes ends, its ending included; 0 where none does."""
    ends = [at for at in (data.find(b"\n"), data.find(b"\r")) if at >= 0]
    return min(ends) + 1 if ends else 0


def text_size(escaped: bytes) -> int:
    """The bytes in UTF-8 of a JSON string without its quotes."""
    if b"\\" not in escaped:
        return len(escaped)
    try:
        return len(json.loads(b'"%b"' % escaped).encode("utf-8", "replace"))
    except ValueError:
        return len(escaped)


# A shorter "key" (for a test server, say) is an ordinary word, which responses may well hold.
MIN_SECRET_LENGTH = 16


class Redactor:
    """Masks a secret in a passing stream with asterisks, so that lengths stay right.

    An upstream that echoes what it was sent must not carry the real key to a client. Bytes are held
    back only where a read ends inside what may become the secret. In a compressed body nothing can
    be masked: there `watch` raises UpstreamError when the secret appears.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._text = secret.decode("latin-1")
        self._held = b""

    def feed(self, data: bytes, complete: bool) -> bytes:
        """What may go on of these bytes and of those held back."""
        if self._held:
            data, self._held = self._held + data, b""
        data = self.mask(data)
        if not complete:
            held = self._open_prefix(data)
            if held:
                data, self._held = data[:-held], data[-held:]
        return data

    def watch(self, plain: bytes) -> None:
        """Look at a part of a compressed body, whose bytes go on as they are. Raises UpstreamError."""
        plain = self._held + plain
        self.watch_raw(plain)
        self._held = plain[1 - len(self._secret) :]

    def watch_raw(self, data: bytes) -> None:
        """Look at the compressed bytes themselves. Raises UpstreamError."""
        if self._secret in data:
            raise UpstreamError("The upstream sent the gateway's own credential back.")

    def may_follow(self, data: bytes) -> bool:
        """Whether the secret may have begun: at the end of what was watched, or of these bytes."""
        return self._open_prefix(self._held) > 0 or self._open_prefix(data) > 0

    def stop_watching(self) -> None:
        """What follows cannot be decompressed: its bytes are looked at as they are."""
        self._held = b""

    def mask(self, data: bytes) -> bytes:
        """Whole data with the secret masked."""
        return (
            data.replace(self._secret, b"*" * len(self._secret)) if self._secret in data else data
        )

    def mask_text(self, text: str) -> str:
        """Text of a head with the secret masked."""
        return text.replace(self._text, "*" * len(self._text))

    def mask_lines(self, lines: list[str]) -> list[str]:
        """The same for field lines."""
        if self._text not in "\n".join(lines):
            return lines
        return [self.mask_text(line) for line in lines]

    def _open_prefix(self, data: bytes) -> int:
        """How many of the last bytes are a beginning of the secret."""
        if not data or data[-1] not in self._secret:
            return 0
        start = max(0, len(data) - len(self._secret) + 1)
        while (start := data.find(self._secret[:1], start)) >= 0:
            if self._secret.startswith(data[start:]):
                return len(data) - start
            start += 1
        return 0


def decompress(coding: str, data: bytes, limit: int) -> bytes:
    """Decode a whole body. Raises ValueError for an unknown coding, bad data or more than ``limit``."""
    if coding in ("", "identity"):
        return data
    if coding not in READABLE_CODINGS:
        raise ValueError(f"unknown coding {coding}")
    plain, inflater = bytearray(), Inflater(coding)
    try:
        for part in inflater.slices(data):
            plain += part
            if len(plain) > limit:
                raise ValueError("too large")
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not inflater.is_whole:
        raise ValueError("cut short")
    return bytes(plain)


def compress(coding: str, data: bytes) -> bytes:
    """The reverse of `decompress`."""
    if coding in ("gzip", "x-gzip"):
        return gzip.compress(data, mtime=0)
    return zlib.compress(data) if coding == "deflate" else data


# ─── Record ───────────────────────────────────────────────────────────────────────────────────────

# Seconds; LiteLLM's buckets of its latency metrics.
LATENCY_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.0125, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
TIMINGS = ("total", "first_byte", "upstream", "overhead")


class Histogram:
    """How long something took: seconds, counted in LATENCY_BUCKETS."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.total += seconds


class Traffic:
    """What passed since the start, as /metrics shows it: plain counts, which cost a request little.

    ``requests`` counts by (key, model, status, outcome); ``timings`` has, for a model, a Histogram
    for each of TIMINGS. Beyond MAX_LABELS pairs of key and model, and MAX_MODELS_A_DAY models, all
    are counted as one, so that neither keys nor callers can make them grow without end.
    """

    def __init__(self) -> None:
        self.requests: collections.Counter[tuple[str, str, int, str]] = collections.Counter()
        self.timings: dict[str, tuple[Histogram, ...]] = {}
        self.last_success: datetime | None = None
        self.last_failure: datetime | None = None
        self.last_error = ""
        self._pairs: set[tuple[str, str]] = set()

    def count(self, finished: Finished) -> None:
        """Count a request that is over."""
        key, model = pair = finished.shown_key, finished.used.model or NO_MODEL
        if pair not in self._pairs:
            if len(self._pairs) < MAX_LABELS:
                self._pairs.add(pair)
            else:
                key, model = OTHER_MODELS, OTHER_MODELS
        self.requests[key, model, finished.status, finished.outcome] += 1
        histograms = self.timings.get(model)
        if histograms is None:
            if len(self.timings) >= MAX_MODELS_A_DAY:
                model = OTHER_MODELS
            new = tuple(Histogram() for _ in TIMINGS)
            histograms = self.timings.setdefault(model, new)
        for histogram, seconds in zip(histograms, finished.timings(), strict=True):
            if seconds is not None:
                histogram.observe(seconds)

    def answered(self, status: int) -> None:
        """The upstream answered: seen in passing, for /health/readiness."""
        if status < 500:
            self.last_success = now()
        else:
            self.failed(f"The upstream answered {status}.")

    def failed(self, error: str) -> None:
        """The upstream did not answer, or not well."""
        self.last_failure, self.last_error = now(), error


@dataclass(slots=True)
class Finished:
    """A relayed request that is over, for the log, /spend/logs and /metrics.

    ``request_id`` is Anthropic's; ``session`` and ``agent`` are Claude Code's. ``first_byte``,
    ``upstream``, ``overhead`` and ``duration`` are seconds: until the first byte of the answer,
    from the request's sending to the answer's end, what the gateway itself added before the
    first byte, and the whole; None where there was no such thing. Sizes are bytes of bodies.
    """

    call_id: str
    request_id: str
    hashed: str
    key: VirtualKey | None
    is_master: bool
    method: str
    path: str
    status: int
    outcome: str
    started: datetime
    ended: datetime
    used: Settled
    tags: list[str]
    session: str
    agent: str
    remote_ip: str
    duration: float
    first_byte: float | None
    upstream: float | None
    overhead: float | None
    bytes_in: int
    bytes_out: int

    @property
    def shown_key(self) -> str:
        """The key's alias, or its abbreviated name; ``master``, or ``-`` for none."""
        if self.key is not None:
            return self.key.shown_name
        return MASTER_NAME if self.is_master else NO_KEY

    def timings(self) -> tuple[float | None, ...]:
        """Seconds, in the order of TIMINGS."""
        return self.duration, self.first_byte, self.upstream, self.overhead

    def __str__(self) -> str:
        """The line for a terminal. No key, hash, body or query stands in it."""
        key, used, tally = self.key, self.used, self.used.tally
        words = [
            self.shown_key,
            self.method,
            word(self.path),
            str(self.status),
            self.outcome,
            f"{self.duration * 1000:.0f}ms",
        ]
        if self.first_byte is not None:
            words.append(f"ttfb={self.first_byte * 1000:.0f}ms")
        words.append(f"in={self.bytes_in} out={self.bytes_out}")
        if used.model:
            words.append(word(used.model))
        if tally.input_tokens or tally.output_tokens:
            words.append(
                f"{tally.input_tokens}+{tally.cached}->{tally.output_tokens} tokens"
                f" ${dollars(used.cost)}"
            )
        if used.estimated:
            words.append("estimated")
        words.append(self.call_id)
        if self.request_id:
            words.append(word(self.request_id))
        if key is not None and key.key_alias:
            words.append(f"key={key.key_name}")
        if key is not None and key.user_id:
            words.append(f"user={printable(key.user_id)}")
        if self.tags:
            words.append(f"tags={word(printable(','.join(self.tags)))}")
        if self.session:
            words.append(f"session={word(self.session)}")
        if self.agent:
            words.append(f"agent={word(self.agent)}")
        return " ".join(words)

    def fields(self) -> dict[str, Any]:
        """The line as JSON has it; the README's "Log" describes it."""
        key, tally = self.key, self.used.tally
        return {
            "call_id": self.call_id,
            "request_id": self.request_id or None,
            "key_alias": key.key_alias if key else MASTER_NAME if self.is_master else None,
            "key_name": key.key_name if key else None,
            "user": key.user_id if key else None,
            "tags": self.tags,
            "session_id": self.session or None,
            "agent_id": self.agent or None,
            "remote_ip": self.remote_ip,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "outcome": self.outcome,
            "model": self.used.model or None,
            "input_tokens": tally.input_tokens,
            "output_tokens": tally.output_tokens,
            "cache_read_tokens": tally.cache_read_tokens,
            "cache_write_tokens": tally.written,
            "cost": float(self.used.cost),
            "estimated": self.used.estimated,
            "time_to_first_byte": rounded(self.first_byte),
            "duration": rounded(self.duration),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }


def rounded(seconds: float | None) -> float | None:
    """Seconds to the tenth of a millisecond."""
    return None if seconds is None else round(seconds, 4)


def relayed_record(finished: Finished) -> logging.LogRecord:
    """What log.info("%s", finished) would make, without looking up the line it was called from."""
    return log.makeRecord(log.name, logging.INFO, "relay", 0, "%s", (finished,), None)


def new_call_id() -> str:
    """A random UUID of version 4 (RFC 9562), as LiteLLM's call ids are."""
    digits = f"{random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


# ─── Relay ────────────────────────────────────────────────────────────────────────────────────────

RELAY_PREFIX = "/anthropic"
BARE_PREFIX = "/v1/"
# What Claude Code asks of its base URL to warm the connection up; answered here, cheaply.
HELLO_PATHS = frozenset(
    {"/", RELAY_PREFIX, f"{RELAY_PREFIX}/", f"{RELAY_PREFIX}/api/hello", "/api/hello"}
)
# How much of a refused request's body is read, so that its answer arrives.
DISCARD_LIMIT = 32 * MIB
LINGER_SILENCE = 0.25  # seconds after which a client over TLS is taken to have sent all
LINGER_TIMEOUT = 5.0  # seconds for a client to read its answer before the socket closes
OWN_BODY_LIMIT = 1 * MIB  # a request to the gateway itself
# Bytes a second below which a body is too slow, once --client-timeout has passed
# (Apache's mod_reqtimeout has the same rule and figure).
MIN_BODY_RATE = 500
# Connections beyond a limit that are told so; further ones are closed without a word.
REFUSALS = 100
MANY_FILES = 2**20  # what "no limit" is taken for
RESERVED_FILES = 64  # for the keys file, the log and whatever else is no connection
BACKLOG = (
    4096  # connections that the kernel holds until they are accepted; it caps this at somaxconn
)
# Bytes of further requests that may wait for the present one's end.
PIPELINE_LIMIT = 64 * KIB
REWRITE_LIMIT = 4 * MIB  # a list of a thousand batches, the longest, has about one
SLICES_A_TURN = 4  # of a compressed answer, before the loop does something else
MANY_PARTS = 1000  # of a body that is kept
MAX_TAGS = 20  # of one request that are remembered
OFFERED_CODINGS = ("gzip", "identity")  # of answers that are metered


def upstream_target(method: str, target: str) -> str | None:
    """The raw target behind the upstream's base path; None where the gateway itself answers."""
    if target.startswith(f"{RELAY_PREFIX}/"):
        if method in ("GET", "HEAD") and target.partition("?")[0] in HELLO_PATHS:
            return None
        return target[len(RELAY_PREFIX) :]
    return target if target.startswith(BARE_PREFIX) else None


UNUSUAL_PATH = re.compile(r"[%\\#]|//|/\.")


def rule_path(target: str) -> str:
    """The path that rules look at: without query, decoded, repeated slashes as one.

    Raises APIError 400 for dot segments, raw or encoded once or twice, with the separators and
    parameters under which some server would resolve them.
    """
    path = target.partition("?")[0]
    if not UNUSUAL_PATH.search(path):
        return path
    decoded = urllib.parse.unquote(path, "latin-1")
    for form in (path, decoded, urllib.parse.unquote(decoded, "latin-1")):
        segments = form.replace("\\", "/").split("/")
        if "#" in path or any(segment.partition(";")[0] in (".", "..") for segment in segments):
            raise APIError(400, "The path has a dot segment or a fragment; send it resolved.")
    return re.sub("/{2,}", "/", decoded)


def readable_codings(accepted: tuple[str, ...]) -> str:
    """Cut an Accept-Encoding down to the codings that the gateway reads itself."""
    offers = [offer.strip() for offer in ", ".join(accepted).split(",")]
    kept = [o for o in offers if o.partition(";")[0].strip().lower() in OFFERED_CODINGS]
    return ", ".join(kept) or "identity"


def forwarded_lines(request: RequestHead, caller: Caller, route: Route) -> list[str]:
    """The request's field lines that go on, in their order: all but those that DROPPED_* name,
    those that ``Connection`` names, and any that holds a key that the caller showed."""
    unwanted = request.connection_options()
    if caller.own is None:
        unwanted |= {WORKSPACE_FIELD}
    if route.results_of and caller.own is None:
        unwanted |= {"range", "if-range"}  # a part of the results could not be booked
    lines = [
        field.line for field in request.fields if field.goes_up and field.lower not in unwanted
    ]
    offered = request.values.get("accept-encoding") if route.metered else None
    if offered and (codings := readable_codings(offered)) != offered[0]:
        lines = with_codings(lines, codings)
    if holds_any("\n".join(lines), caller.presented):
        lines = [line for line in lines if not holds_any(line, caller.presented)]
    return lines


def with_codings(lines: list[str], codings: str) -> list[str]:
    """Field lines with this Accept-Encoding in the place of the first."""
    changed = []
    for line in lines:
        name = line.partition(":")[0]
        if name.lower() != "accept-encoding":
            changed.append(line)
        elif codings:
            changed.append(f"{name}: {codings}")
            codings = ""
    return changed


def holds_any(text: str, keys: Iterable[str]) -> bool:
    """Whether one of these keys stands in a text."""
    return any(key in text for key in keys)


BATCH_ENDED = "ended"  # types/messages/message_batch.py, processing_status
BATCH_LOOK = 60.0  # seconds from the making of a batch to the first look at it
BATCH_SLACK = 1.5  # each look comes so many times later than the one before,
BATCH_LOOK_LATEST = 1800.0  # but not later than this
BATCH_STATE_TIMEOUT = 30.0
LOOKS_AT_ONCE = 4
BATCH_KEPT = timedelta(days=30)  # results are kept for 29 days (PLD batch-processing)
GONE = (404, 410)


class BatchKeeper:
    """Books batches once they have ended, whether or not anybody fetches their results: asks the
    upstream for their state, with the real key, now and then, and reads the results through a meter.
    """

    def __init__(self, settings: Settings, admission: Admission, client: UpstreamClient) -> None:
        self._settings = settings
        self._admission = admission
        self._client = client
        self._due: dict[str, float] = {}
        self._waits: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._looks: set[asyncio.Task[None]] = set()

    def watch(self, name: str) -> None:
        """Look at a batch from time to time until it is booked."""
        self._waits[name] = BATCH_LOOK
        self._due[name] = self._client.time() + BATCH_LOOK
        self._changed.set()

    def hurry(self, name: str) -> None:
        """A batch is known to have ended."""
        if self._due.get(name, math.inf) < math.inf:
            self._due[name] = self._client.time()
            self._changed.set()

    async def run(self) -> None:
        """Look at batches when it is time, until cancelled."""
        for name in self._admission.store.unbooked():
            self.watch(name)
        try:
            while True:
                self._changed.clear()
                name = min(self._due, key=self._due.__getitem__, default="")
                due = self._due[name] if name else math.inf
                if due <= self._client.time() and len(self._looks) < LOOKS_AT_ONCE:
                    self._due[name] = math.inf  # until this look is over
                    look = asyncio.get_running_loop().create_task(self._look(name))
                    self._looks.add(look)
                    look.add_done_callback(self._looked)
                    continue
                wait = None if due == math.inf else max(0.0, due - self._client.time())
                if len(self._looks) >= LOOKS_AT_ONCE:
                    wait = None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
        finally:
            for look in self._looks:
                look.cancel()

    def _looked(self, look: asyncio.Task[None]) -> None:
        self._looks.discard(look)
        self._changed.set()

    async def _look(self, name: str) -> None:
        try:
            booked = await self.book(name)
        except Exception:
            log.exception("a batch could not be booked; it is looked at again")
            booked = False
        if booked:
            del self._due[name], self._waits[name]
            return
        wait = self._waits[name] = min(BATCH_LOOK_LATEST, self._waits[name] * BATCH_SLACK)
        self._due[name] = self._client.time() + wait

    async def book(self, name: str) -> bool:
        """Book what a batch cost, if it has ended; whether nothing of it is left to be booked."""
        account = self._admission.store.batch_owner(name)
        if account is None or account.batches[name].booked:
            return True
        made = datetime.fromisoformat(account.batches[name].day).replace(tzinfo=UTC)
        path = f"/v1/messages/batches/{urllib.parse.quote(name, safe='')}"
        state = await self._fetch(path, request_timeout=BATCH_STATE_TIMEOUT)
        batch = read_json(state.body) if state.code == 200 else None
        ended = isinstance(batch, dict) and batch.get("processing_status") == BATCH_ENDED
        if ended and await self._read_results(name, f"{path}/results"):
            return True
        if state.code in GONE or now() - made > BATCH_KEPT:
            self._admission.finish_batch(name, lost=True)
            return True
        return False

    async def _read_results(self, name: str, path: str) -> bool:
        """Book every line of a batch's results; whether that were all."""
        meter = Meter("", functools.partial(self._admission.book_result, name))
        status = ""

        def head(line: str) -> None:
            nonlocal status
            status = status or line.split(" ")[1]

        def look(data: bytes) -> None:
            if status == "200":
                meter.look(data)

        results = await self._fetch(
            path, request_timeout=0, header_callback=head, streaming_callback=look
        )
        if results.code in GONE:
            self._admission.finish_batch(name, lost=True)
            return True
        if results.code != 200 or meter.finish(True).blind:
            return False
        self._admission.finish_batch(name)
        return True

    async def _fetch(self, path: str, **options: Any) -> HTTPResponse:
        """GET with the real key; 599 where there is no answer."""
        credential = self._settings.real_credential
        request = HTTPRequest(self._settings.upstream.rstrip("/") + path, **options)
        request.headers["anthropic-version"] = ANTHROPIC_VERSION
        request.headers["Accept-Encoding"] = "identity"
        if credential is not None:
            request.headers[credential[0]] = credential[1]
        try:
            return await self._client.fetch(request, raise_error=False)
        except UpstreamError as error:  # which Tornado raises all the same
            log.info("a batch could not be looked at: %s", error)
            return HTTPResponse(request, 599, error=error)


class Relay:
    """What all relayed requests share."""

    def __init__(
        self, settings: Settings, store: KeyStore, admission: Admission, client: UpstreamClient
    ) -> None:
        self.settings = settings
        self.store = store
        self.admission = admission
        self.client = client
        self.batches = BatchKeeper(settings, admission, client)
        self.origin, self.base_path = parse_upstream(settings.upstream)
        self.host_line = f"Host: {self.origin.authority}"
        self.active: set[RelayHandler] = set()
        self.recent: collections.deque[Finished] = collections.deque(
            maxlen=settings.recent_requests
        )
        self.traffic = Traffic()
        self.started = now()
        self.stopping = False
        self.turn = asyncio.Lock()
        self.idle = asyncio.Event()
        self.idle.set()

    def is_unbooked(self, batch: str) -> bool:
        """Whether results of a batch are still to be booked to a key."""
        account = self.store.batch_owner(batch)
        return account is not None and not account.batches[batch].booked

    def enter(self, handler: RelayHandler) -> None:
        """A relayed request has begun."""
        self.active.add(handler)
        self.idle.clear()

    def leave(self, handler: RelayHandler) -> None:
        """A relayed request is settled."""
        self.active.discard(handler)
        if not self.active:
            self.idle.set()


class RelayHandler:
    """One relayed request, from its head to `settle`. Also the `ResponseSink` of its exchange."""

    caller = Caller()
    grant: Grant | None = None
    used = Settled()
    status = 0
    outcome = ""
    # The request
    _exchange: Exchange | None = None
    _kept: list[bytes] | None = None
    _held = 0
    _received = 0
    _chunked_up = False
    _reads_body = False
    _redactor: Redactor | None = None
    _judging: asyncio.Task[None] | None = None
    # The response
    _head: ResponseHead | None = None
    _length = 0
    _meter: Meter | None = None
    _inflater: Inflater | None = None
    _slices: Iterator[bytes] | None = None
    _withheld = b""
    _chunked_down = False
    _head_pending = False
    _head_sent = False
    _rewritten: bytearray | None = None
    _sent = 0
    # The end
    _settled = False
    _deserted = False
    _ended = EPOCH
    _begun = 0.0
    _answered = 0.0
    _first_byte = 0.0
    _duration = 0.0

    def __init__(
        self, relay: Relay, connection: ClientConnection, request: RequestHead, target: str
    ) -> None:
        self.relay = relay
        self.connection = connection
        self.request = request
        self.target = target
        self.call_id = new_call_id()
        self.started = relay.client.time()
        self._whole = self.started
        self._arrived: collections.deque[tuple[bytes, bool]] = collections.deque()
        relay.enter(self)

    # The request

    def prepare(self, length: int) -> None:
        """Decide by the head alone, before any body is read. ``length`` is bytes or CHUNKED."""
        try:
            self._prepare(length)
        except APIError as error:
            self.refuse(error)

    def _prepare(self, length: int) -> None:
        relay, request, admission = self.relay, self.request, self.relay.admission
        if relay.stopping:
            raise APIError(
                503, "The gateway is stopping. Try again.", headers=[("retry-after", "5")]
            )
        admission.refuse_foreign(request.host, request.values)
        path = rule_path(self.target)
        credential: tuple[str, str] | None = None
        if admission.is_open or length or not is_preflight(request):
            self.caller = admission.authenticate(request.values)
            credential = self.caller.own or relay.settings.real_credential
            if credential is None:
                raise APIError(
                    401,
                    "The gateway has no Anthropic credential to use. Whoever runs it must set"
                    " ANTHROPIC_API_KEY (or ANTHROPIC_AUTH_TOKEN) and start it again.",
                )
        self._check_size(length)
        self.grant = admission.admit(self.caller, request.method, path)
        self._reads_body = admission.reads_body(self.grant)
        route = self.grant.route
        if route.batch:
            self._rewritten = bytearray()
        secret = real_secret(credential) if credential else b""
        if self.caller.own is None and len(secret) >= MIN_SECRET_LENGTH:
            self._redactor = Redactor(secret)
        lines = forwarded_lines(request, self.caller, route)
        target = urllib.parse.unquote(self.target, "latin-1")
        text = "\n".join((request.method, self.target, target, *lines))
        if holds_any(text, self.caller.presented) or admission.holds_key(text):
            raise APIError(
                400,
                "A key of this gateway stands in the path, the query or a header field where it would"
                " go on to Anthropic. Send it as 'x-api-key' or 'Authorization: Bearer' alone.",
            )
        self._upstream_start = f"{request.method} {relay.base_path}{self.target} HTTP/1.1"
        self._upstream_lines = [relay.host_line, *lines]
        if credential:
            self._upstream_lines.append(f"{credential[0]}: {credential[1]}")
        small = length <= JSON_BODY_LIMIT
        if not small:
            admission.admit_unread(self.grant, length)
        kept = self._reads_body or route.billed or is_json(request.get("content-type"))
        if length == 0 or (small and kept):
            self._hold(max(length, 0))
            self._kept = []
        else:
            self._stream(length)

    def data_received(self, chunk: bytes) -> None:
        """A part of the body came."""
        self._received += len(chunk)
        if self._kept is None:
            self._forward(chunk)
            return
        try:
            self._check_size(self._received)
            self._hold(self._received - self._held)
            if self._received > JSON_BODY_LIMIT and self.grant is not None:
                self.relay.admission.admit_unread(self.grant, self._received)
        except APIError as error:
            self.refuse(error)
            return
        self._kept.append(chunk)
        # Each part takes more than it holds where they are small.
        if len(self._kept) > MANY_PARTS:
            self._kept = [b"".join(self._kept)]
        if self._received > JSON_BODY_LIMIT:
            kept, self._kept = b"".join(self._kept), None
            self._stream(CHUNKED, kept)

    def finish(self) -> None:
        """The request is whole."""
        if self._settled:
            return
        if self._kept is None:
            assert self._exchange is not None
            self._exchange.finish(LAST_CHUNK if self._chunked_up else b"")
            return
        self._whole = self.relay.client.time()
        body, self._kept = b"".join(self._kept), None
        assert self.grant is not None
        steps = self.relay.admission.admit_body(self.grant, body)
        try:
            next(steps)
        except APIError as error:
            self.refuse(error)
            return
        except StopIteration:
            if not self._deletes_unbooked():
                self._send_whole(body)
                return
        judging = self._judge_slowly(steps, body)
        self._judging = asyncio.get_running_loop().create_task(judging)

    async def _judge_slowly(self, steps: Steps[None], body: bytes) -> None:
        """Judge a large body: at each turn of the loop a step of one key's, and of each key's one
        body after the other, so that nobody waits for all that another has sent."""
        key = self.grant.key if self.grant is not None else None
        mine = asyncio.Lock() if key is None else key.account.turn
        try:
            while True:
                async with mine, self.relay.turn:
                    await asyncio.sleep(0)
                    try:
                        next(steps)
                    except StopIteration:
                        break
            if self.grant is not None and self._deletes_unbooked():
                await self.relay.batches.book(self.grant.route.batch_id)
            self._send_whole(body)
        except APIError as error:
            self.refuse(error)
        except Exception:
            log.exception("a request could not be judged")
            self.refuse(APIError(500, FAILED_HERE))

    def _deletes_unbooked(self) -> bool:
        """Whether a batch goes whose results are still to be booked."""
        route = self.grant.route if self.grant is not None else None
        return route is not None and route.deletes and self.relay.is_unbooked(route.batch_id)

    def _send_whole(self, body: bytes) -> None:
        values = self.request.values
        if "content-length" in values or "transfer-encoding" in values:
            self._upstream_lines.append(f"Content-Length: {len(body)}")
        self._start(body)

    def _hold(self, size: int) -> None:
        """Count so many bytes more as held for this request. Raises APIError."""
        if size > 0:
            self.relay.admission.held.take(self.caller.hashed or "", size)
            self._held += size

    def request_taken(self) -> None:
        """Nothing is held of the request any more."""
        if self._held:
            held, self._held = self._held, 0
            self.relay.admission.held.give_back(self.caller.hashed or "", held)

    def _forward(self, chunk: bytes) -> None:
        try:
            self._check_size(self._received)
        except APIError as error:
            self._abort()
            self.refuse(error)
            return
        if self._exchange is not None and not self._settled:
            self._exchange.write(framed(chunk) if self._chunked_up else chunk)

    def _stream(self, length: int, kept: bytes = b"") -> None:
        """Open the upstream now; the body follows what is ``kept`` of it as it comes."""
        self._chunked_up = length == CHUNKED
        framing = CHUNKED_LINE if self._chunked_up else f"Content-Length: {length}"
        self._upstream_lines.append(framing)
        self._start(framed(kept), streamed=True)

    def _start(self, body: bytes, *, streamed: bool = False) -> None:
        head = head_bytes(self._upstream_start, self._upstream_lines)
        self._upstream_lines = []
        self._exchange = self.relay.client.exchange(
            self.relay.origin, self.request.method, head, body, self, streamed=streamed
        )
        self._exchange.start()

    def _check_size(self, size: int) -> None:
        limit = self.relay.settings.max_body_size
        if size > limit:
            raise APIError(413, f"The request body is larger than {limit:,} bytes.")

    # The response: ResponseSink

    def informational_received(self, head: ResponseHead) -> None:
        """Pass a 1xx response on; HTTP/1.0 has none (RFC 9110 section 15.2)."""
        if self.request.version == 1 and not self._deserted:
            self.connection.send(head_bytes(self._status_line(head), self._response_lines(head)))

    def response_started(self, head: ResponseHead, length: int) -> None:
        """Make the client's head of the upstream's; it goes out with the first bytes of the body."""
        self._head = head
        self._length = length
        self._head_pending = True
        self._answered = self.relay.client.time()
        self.relay.traffic.answered(head.status)
        self.status = head.status
        self._meter = self._make_meter(head)
        if self._rewritten is not None:
            if head.status == 200 and is_json(head.get("content-type")) and length != 0:
                return
            self._rewritten = None
        coding = head.coding
        if not coding:
            return
        if coding not in READABLE_CODINGS:
            self._go_blind()
        elif self._meter is not None or self._redactor is not None:
            self._inflater = Inflater(coding)

    def response_received(self, data: bytes, complete: bool) -> None:
        """Send on what one read brought."""
        if self._rewritten is not None:
            self._rewrite(data, complete)
        elif self._inflater is not None or self._arrived:
            self._arrived.append((data, complete))
            if len(self._arrived) == 1:
                self._inflate()
        else:
            if self._meter is not None and data:
                self._meter.look(data)
            if self._redactor is not None:
                data = self._redactor.feed(data, complete)
            self._send(data, complete)

    def _inflate(self) -> None:
        """Look at what compressed bytes hold before they go on. A read may hold a thousand times its
        size, so the loop does other things in between, while the upstream waits."""
        if self._settled:
            return
        data, complete = self._arrived[0]
        try:
            if not self._look_inside(data):
                if self._exchange is not None:
                    self._exchange.pause_reading()
                asyncio.get_running_loop().call_soon(self._inflate)
                return
        except zlib.error:
            self._go_blind()
        except UpstreamError as error:
            self._abort()
            self.response_failed(error)
            return
        self._slices = None
        self._arrived.popleft()
        self._send(self._released(data, complete), complete)
        if self._arrived:
            asyncio.get_running_loop().call_soon(self._inflate)
        elif not self.connection.writing_paused:
            self.resume_writing()

    def _released(self, data: bytes, complete: bool) -> bytes:
        """What may go on of compressed bytes whose inside was looked at. They wait for the next ones
        while they may hold a beginning of the real key."""
        if self._redactor is None:
            return data
        data, self._withheld = self._withheld + data, b""
        if self._inflater is None:
            return self._redactor.feed(data, complete)
        undecided = self._redactor.may_follow(data) or self._inflater.is_undecided
        if undecided and not complete:
            data, self._withheld = b"", data
        return data

    def _look_inside(self, data: bytes) -> bool:
        """Let meter and mask look at a few more slices of these bytes; whether that were all."""
        if self._inflater is None:
            return True
        if self._slices is None:
            self._slices = self._inflater.slices(data)
            if self._redactor is not None:  # names and comments of gzip are not compressed
                self._redactor.watch_raw(self._withheld + data)
        looked = 0
        for plain in itertools.islice(self._slices, SLICES_A_TURN):
            looked += 1
            if self._meter is not None:
                self._meter.look(plain)
            if self._redactor is not None:
                self._redactor.watch(plain)
        return looked < SLICES_A_TURN

    def _go_blind(self) -> None:
        """The answer is in a coding that cannot be read, or is not in the one it says."""
        self._inflater = self._slices = None
        if self._redactor is not None:
            self._redactor.stop_watching()
        if self._meter is not None:
            self._meter.measured.blind = True

    def response_failed(self, error: UpstreamError) -> None:
        """Before the head: an error of ours. After it: an SSE error event, and a broken connection."""
        outcome = "timeout" if error.status == 504 else "upstream_lost"
        if self._exchange is None or not self._exchange.reading_paused:
            self.relay.traffic.failed(str(error))
        if self._deserted:
            self.settle("client_gone")
            return
        if not self._head_sent:
            self.refuse(APIError(error.status, str(error)), outcome=outcome)
            return
        if self._is_plain_sse():
            event = SSE_ERROR % APIError(error.status, str(error)).body(self.call_id)
            self._sent += len(event)
            self.connection.send(framed(event) if self._chunked_down else event)
        self.connection.break_off()
        self.settle(outcome)

    def pause_sending(self) -> None:
        """The upstream takes the body slowly: read the client slowly."""
        self.connection.pause_reading()

    def resume_sending(self) -> None:
        """Read the client again."""
        self.connection.resume_reading()

    # What the connection says

    def pause_writing(self) -> None:
        """The client reads slowly: read the upstream slowly."""
        if self._exchange is not None:
            self._exchange.pause_reading()

    def resume_writing(self) -> None:
        """Read the upstream again, unless there is still something to look at."""
        exchange = self._exchange
        if exchange is not None and exchange.reading_paused and not self._arrived:
            exchange.resume_reading()

    def on_connection_close(self) -> None:
        """The client has left: so does the upstream connection, at once; but where a batch is being
        made its answer is awaited, since whoever makes one pays for it."""
        exchange, grant = self._exchange, self.grant
        made = grant is not None and grant.route.makes_batch and not self._settled
        if made and exchange is not None and exchange.begun and exchange.sent:
            self._deserted = True
            exchange.resume_reading()
            return
        self._abort()
        self.settle("client_gone")

    def on_timeout(self, message: str) -> None:
        """The client was too slow to send its request."""
        self._abort()
        if self._head_sent:
            self.connection.break_off()
            self.settle("timeout")
        else:
            self.refuse(APIError(408, message), outcome="timeout")

    # Inside

    @property
    def has_answered(self) -> bool:
        """Whether a response has begun."""
        return self._head_sent

    def refuse(self, error: APIError, *, outcome: str = "") -> None:
        """Answer with an error of our own."""
        if self._settled:
            return
        self.status = error.status
        self._head_sent = True
        self._first_byte = self.relay.client.time()
        self._kept = None
        if self._deserted:
            self.settle("client_gone")
            return
        self._sent = self.connection.send_error(error, self.call_id)
        self.settle(outcome or f"refused:{error.kind}")
        self.connection.response_done()

    def settle(self, outcome: str) -> None:
        """Every way out passes here, once: free what is held, write the log line."""
        if self._settled:
            return
        self._settled = True
        self.outcome = outcome
        self.request_taken()
        if self._judging is not None and self._judging is not asyncio.current_task():
            self._judging.cancel()
        measured = self._measured(outcome)
        if self.grant is not None:
            failed = self.status >= 400
            self.used = self.relay.admission.settle(self.grant, measured, failed=failed)
        self._ended = now()
        self._duration = self.relay.client.time() - self.started
        if self._exchange is not None:
            self._begun = self._exchange.begun
        # No cycle is left for the garbage collector.
        self._exchange = self._judging = self._slices = None
        self.relay.leave(self)
        if measured is None:
            self._record()
        else:
            self.relay.admission.when_priced(self._record)

    def _measured(self, outcome: str) -> Measured | None:
        """What the response used; None where it is nothing that this request pays."""
        grant, meter, exchange = self.grant, self._meter, self._exchange
        if grant is None:
            return None
        if meter is not None:
            measured = meter.finish(outcome == "ok")
            if not grant.route.results_of:
                if measured.blind:
                    log.warning("call %s: what cannot be read costs its worst case", self.call_id)
                return measured
            if outcome == "ok" and not measured.blind:
                self.relay.admission.finish_batch(grant.route.results_of)
            return None
        began = exchange is not None and exchange.begun and exchange.sent
        if grant.route.makes_batch:
            # One that may have been made, though nobody knows its name, costs what is held for it.
            lost = began and grant.holds and (self._head is None or self._head.status < 300)
            if not lost:
                return None
            log.warning("call %s: a batch that is not known costs its worst case", self.call_id)
            return Measured(blind=True)
        # Whoever leaves before the head pays what was under way; without a head no stream has begun.
        if self._head or not began or not grant.route.billed:
            return None
        if outcome not in ("client_gone", "timeout"):
            return None
        if grant.order.streams:
            grant.order.thinking = 0
        return Measured()

    def _record(self) -> None:
        finished = self.finished()
        if self.grant is not None:
            self.relay.recent.append(finished)
        self.relay.traffic.count(finished)
        if log.isEnabledFor(logging.INFO):
            log.handle(relayed_record(finished))

    def finished(self) -> Finished:
        """The request as it is remembered, counted and logged."""
        request, head = self.request, self._head
        first_byte, upstream, overhead = self._times()
        return Finished(
            call_id=self.call_id,
            request_id=self._shown(head.get("request-id")) if head is not None else "",
            hashed=self.caller.hashed or "",
            key=self.caller.key,
            is_master=self.caller.is_master,
            method=request.method,
            path=self._shown(self.target.partition("?")[0]),
            status=self.status,
            outcome=self.outcome,
            started=self.grant.started if self.grant is not None else self._ended,
            ended=self._ended,
            used=self.used,
            tags=self.tags(),
            session=self._shown(request.get(SESSION_FIELD)),
            agent=self._shown(request.get(AGENT_FIELD)),
            remote_ip=self.connection.context.remote_ip,
            duration=self._duration,
            first_byte=first_byte,
            upstream=upstream,
            overhead=overhead,
            bytes_in=self._received,
            bytes_out=self._sent,
        )

    def _times(self) -> tuple[float | None, float | None, float | None]:
        """Seconds to the first byte, upstream, and added by the gateway, as far as they came."""
        first_byte = self._first_byte - self.started if self._first_byte else None
        if not self._begun or not self._answered:
            return first_byte, None, None
        before = max(0.0, self._begun - self._whole)
        after = max(0.0, self._first_byte - self._answered)
        upstream = self.started + self._duration - self._begun
        return first_byte, upstream, before + after

    @property
    def is_streaming(self) -> bool:
        """Whether a response of server-sent events is under way."""
        head = self._head
        return head is not None and is_event_stream(head)

    def tags(self) -> list[str]:
        """The key's tags and those of the request's x-litellm-tags."""
        own = self.caller.key.tags if self.caller.key is not None else []
        sent = self.request.get(TAGS_FIELD)
        if not sent:
            return own
        tags = (self._shown(tag.strip()) for tag in sent.split(",", MAX_TAGS)[:MAX_TAGS])
        return [*own, *(tag for tag in tags if tag)]

    def _shown(self, text: str) -> str:
        """A text of the wire for the log, cut short, without what is or looks like a key."""
        if not text:
            return ""
        if "%" in text and KEY_PREFIX in urllib.parse.unquote(text, "latin-1"):
            text = urllib.parse.unquote(text, "latin-1")
        if self._redactor is not None:
            text = self._redactor.mask_text(text)
        for key in self.caller.presented:
            if key in text:
                text = text.replace(key, key_name(key))
        return printable(mask_keys(text))

    def _make_meter(self, head: ResponseHead) -> Meter | None:
        """What reads the usage of a successful response of a metered route."""
        assert self.grant is not None
        route, admission = self.grant.route, self.relay.admission
        if head.status != 200 or not route.metered:
            return None
        room = functools.partial(admission.held.find_room, self.caller.hashed or "")
        if batch := route.results_of:
            if self.caller.own is not None:
                return None
            admission.claim_batch(self.caller, batch)
            book = functools.partial(admission.book_result, batch)
            return Meter("", book, room)
        if not route.billed or self._rewritten is not None:
            return None
        return Meter(head.get("content-type"), room=room)

    def _abort(self) -> None:
        if self._exchange is not None:
            self._exchange.abort()

    def _status_line(self, head: ResponseHead) -> str:
        """The response's first line; the real key masked."""
        line = f"HTTP/1.1 {head.status} {head.reason}"
        return line if self._redactor is None else self._redactor.mask_text(line)

    def _response_lines(self, head: ResponseHead) -> list[str]:
        """The response's field lines that go on: all but hop-by-hop ones; the real key masked."""
        named = head.connection_options()
        own: Sequence[tuple[str, str]] = ()
        if self.caller.key is not None:
            clock = self.relay.admission.clock()
            own = rate_fields(self.caller.key, head.values, clock)
            named |= {name for name, _ in own}
        lines = [
            field.line for field in head.fields if field.goes_down and field.lower not in named
        ]
        if self._redactor is not None:
            lines = self._redactor.mask_lines(lines)
        return lines + field_lines(own)

    def _client_head(self, complete: bool) -> bytes:
        """The response's head as the client gets it. ``complete``: the cost is known already."""
        head, length = self._head, self._length
        assert head is not None
        lines = self._response_lines(head)
        lines.append(f"x-litellm-call-id: {self.call_id}")
        lines += self._spend_lines(complete)
        self._chunked_down = length < 0 and self.request.version == 1
        if self._chunked_down:
            lines.append(CHUNKED_LINE)
        lines += self.connection.connection_lines(delimited=length >= 0 or self._chunked_down)
        return head_bytes(self._status_line(head), lines)

    def _spend_lines(self, complete: bool) -> list[str]:
        """LiteLLM's x-litellm-* about cost and spend, in USD."""
        key = self.grant.booked_key if self.grant is not None else None
        if key is None or not self.relay.admission.prices.available:
            return []
        lines = []
        if complete and self._meter is not None:
            lines.append(f"x-litellm-response-cost: {self.used.cost:f}")
        spent = key.spent(now())
        lines.append(f"x-litellm-key-spend: {spent:f}")
        if key.max_budget is not None:
            lines.append(f"x-litellm-key-max-budget: {key.max_budget:f}")
            left = max(ZERO, key.max_budget - spent)
            lines.append(f"x-litellm-key-remaining-budget: {left:f}")
        return lines

    def _send(self, data: bytes, complete: bool) -> None:
        self._sent += len(data)
        if self._head_pending:
            self._first_byte = self.relay.client.time()
        if complete:
            self.settle("ok")
        head = b""
        if self._head_pending:
            head, self._head_pending = self._client_head(complete), False
            self._head_sent = True
        if self._chunked_down:
            data = framed(data) + LAST_CHUNK if complete else framed(data)
        if head or data:
            self.connection.send(head + data)
        if complete:
            self.connection.response_done()

    def _rewrite(self, data: bytes, complete: bool) -> None:
        """Gather a batch object, then send it with its ``results_url`` on the gateway."""
        assert self._rewritten is not None and self._head is not None
        self._rewritten += data
        if not complete and len(self._rewritten) <= REWRITE_LIMIT:
            return
        coding = self._head.coding
        try:
            if not complete:
                raise ValueError("too large")
            plain = decompress(coding, bytes(self._rewritten), REWRITE_LIMIT)
        except ValueError as error:
            self._abort()
            self.refuse(APIError(502, f"The upstream's batch object cannot be read: {error}."))
            return
        if self._redactor is not None:
            plain = self._redactor.mask(plain)
        body = compress(coding, rewrite_results_url(plain, self.relay.base_path))
        kept = (f for f in self._head.fields if f.lower != "content-length")
        self._head.fields = [*kept]
        self._head.fields.append(parse_field(f"Content-Length: {len(body)}"))
        self._length = len(body)
        if self._owns_batch(plain):
            # What the client is told of is on disk.
            self._judging = asyncio.get_running_loop().create_task(self._save_and_send(body))
        else:
            self._send(body, True)

    async def _save_and_send(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # which is said, and tried again each second
            await self.relay.store.save()
        self._judging = None
        if self._deserted:
            self.settle("client_gone")
        elif not self._settled:
            self._send(body, True)

    def _owns_batch(self, plain: bytes) -> bool:
        """Look at a batch object: remember whose it is, if it was just made; if it has ended, it is
        time to book it."""
        grant, batch = self.grant, read_json(plain)
        name = batch.get("id") if isinstance(batch, dict) else None
        if grant is None or not isinstance(name, str) or not isinstance(batch, dict):
            return False
        if grant.route.makes_batch and grant.booked_key is not None:
            self.relay.admission.own_batch(grant, name)
            self.relay.batches.watch(name)
            self.relay.store.freshen(grant.booked_key.account)
            return True
        if batch.get("processing_status") == BATCH_ENDED:
            self.relay.batches.hurry(name)
        return False

    def _is_plain_sse(self) -> bool:
        assert self._head is not None
        return (
            is_event_stream(self._head)
            and not self._head.coding
            and "content-length" not in self._head.values
        )


def is_preflight(request: RequestHead) -> bool:
    """Whether a browser asks whether a page may call the API (Fetch, "CORS-preflight request"). It
    shows no credential then, and so goes on without the real one."""
    shown = next(candidates(request.values), None)
    asks = "origin" in request.values and "access-control-request-method" in request.values
    return request.method == "OPTIONS" and asks and shown is None


def real_secret(credential: tuple[str, str]) -> bytes:
    """The part of an upstream credential that must never reach a client."""
    return credential[1].removeprefix("Bearer ").encode("latin-1")


NO_ADDRESS = "0.0.0.0"  # what Tornado says of a Unix socket


class ClientContext:
    """What Tornado asks about a connection: the client's address and the protocol.

    ``peer`` is the address at the other end; empty for a Unix socket.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        peer = transport.get_extra_info("peername")
        self.peer: str = peer[0] if isinstance(peer, tuple) else ""
        self.remote_ip = self.peer or NO_ADDRESS
        self._secure = bool(transport.get_extra_info("sslcontext"))
        self.protocol = "https" if self._secure else "http"

    def believe(self, head: RequestHead) -> None:
        """Take the address and protocol that a proxy in front tells (`--xheaders`), as Tornado's
        HTTPServer does: the last of X-Forwarded-For, or X-Real-Ip."""
        forwarded = head.get("x-forwarded-for").rpartition(",")[2].strip()
        address = head.get("x-real-ip") or forwarded
        self.remote_ip = address if netutil.is_valid_ip(address) else self.peer or NO_ADDRESS
        told = head.get("x-scheme") or head.get("x-forwarded-proto")
        scheme = told.rpartition(",")[2].strip().lower()
        own = "https" if self._secure else "http"
        self.protocol = scheme if scheme in DEFAULT_PORTS else own


class ClientConnection(asyncio.Protocol, httputil.HTTPConnection):
    """A client's connection: reads requests one after the other, hands each to its delegate.

    Relayed requests go to a `RelayHandler`, which writes bytes with `send`; all others to the
    Tornado application, which writes through the `tornado.httputil.HTTPConnection` interface.
    """

    transport: asyncio.Transport
    context: ClientContext
    descriptor: int

    def __init__(self, server: GatewayServer, handshake: Handshake | None = None) -> None:
        self.server = server
        self._handshake = handshake
        self.request: RequestHead | None = None
        self._delegate: RelayHandler | ApplicationDelegate | None = None
        self._body: Body | None = None
        self._head = HeadReader()
        self._buffer = b""  # what came while it could not be read
        self._empty_lines = 0
        self._response_done = False
        self.writing_paused = False
        self._discarded = 0
        self._close_after = False
        self._lost = False
        self._lingering = False
        self._held_back = False
        self._reading_paused = False
        self._served = False
        self._since = self._heard = server.time()
        self._taken = 0
        self._close_callback: Callable[[], None] | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self.context = ClientContext(self.transport)
        self.descriptor = transport.get_extra_info("socket").fileno()
        handshake, self._handshake = self._handshake, None
        if handshake is not None:
            self.server.end_handshake(handshake)
        self.server.enter(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._heard = self.server.time()
        if self._lingering:
            return
        if self._body is not None:
            self._taken += len(data)
        if self._buffer or (self._body is None and self.is_busy):
            self._buffer += data
            self._update_reading()
        elif self._body is not None:
            self._feed(data)
        else:
            self._read_head(data)

    def eof_received(self) -> None:
        """Called by asyncio. A client that has closed its half is taken to have left, as in nginx."""
        if self._delegate is not None and not self._response_done:
            self.transport.abort()  # a mere close would first wait for what is still to be written

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio."""
        self._lost = True
        self.server.leave(self)
        delegate, self._delegate = self._delegate, None
        callback, self._close_callback = self._close_callback, None
        if delegate is not None and not self._response_done:
            delegate.on_connection_close()
        if callback is not None:
            callback()

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self.writing_paused = True
        if isinstance(self._delegate, RelayHandler):
            self._delegate.pause_writing()

    def resume_writing(self) -> None:
        """Called by asyncio. A client that has taken its answers may have the next one."""
        self.writing_paused = False
        if isinstance(self._delegate, RelayHandler):
            self._delegate.resume_writing()
        elif self._delegate is None:
            self._read_on_soon()

    @property
    def is_busy(self) -> bool:
        """Whether the next request has to wait: for the present one's end, or until the client has
        taken the answers that are here for him."""
        return self._delegate is not None or self.writing_paused

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way, nor a part of one here."""
        return self.request is None and not self._buffer and not self._head

    # For delegates

    def send(self, data: bytes) -> None:
        """Write bytes of a response as they are."""
        if not self._lost:
            self.transport.write(data)

    def pause_reading(self) -> None:
        """Take nothing more from the client for now, but notice if it leaves."""
        self._held_back = True
        self._update_reading()

    def resume_reading(self) -> None:
        """Take from the client again."""
        if self._held_back:
            self._held_back = False
            self._update_reading()
            self._read_on_soon()

    def _update_reading(self) -> None:
        """Read from the socket unless the delegate asked not to, or enough is here already."""
        pause = self._held_back or len(self._buffer) > PIPELINE_LIMIT
        if self._lost or pause == self._reading_paused:
            return
        self._reading_paused = pause
        if pause:
            self.transport.pause_reading()
            self.server.hangups.watch(self)
        else:
            self._begin_waiting()
            self.server.hangups.forget(self)
            self.transport.resume_reading()

    def hung_up(self) -> None:
        """Called by `HangupWatch`."""
        self.transport.abort()

    def refuse(self, error: APIError) -> None:
        """Turn the connection away before it has asked for anything."""
        self._close_after = True
        self.send_error(error, new_call_id())
        self._linger()

    def check_patience(self, moment: float, client_timeout: float, idle_timeout: float) -> None:
        """Called now and then: end what has taken too long. Times are seconds.

        A head must be whole ``client_timeout`` after its first byte; a body may not stand still for
        so long, nor come at less than MIN_BODY_RATE. A body that is not read is not the client's fault.
        """
        if self._body is not None:
            allowed = client_timeout + self._taken / MIN_BODY_RATE
            slow = moment - self._since > allowed
            if not self._reading_paused and (slow or moment - self._heard > client_timeout):
                self._time_out(
                    f"The request's body stood still for {client_timeout:g} s, or came at less"
                    f" than {MIN_BODY_RATE} bytes a second. Send it again, faster."
                )
        elif self._delegate is not None:
            return
        elif (self._buffer or self._head) and not self.writing_paused:
            if moment - self._since > client_timeout:
                self._time_out(
                    f"The request's head took longer than {client_timeout:g} s. Send it again."
                )
        elif moment - self._since > (idle_timeout if self._served else client_timeout):
            self._end_idle()

    def connection_lines(self, *, delimited: bool) -> list[str]:
        """The Connection field of a response, if it needs one (RFC 9112 section 9.3).

        ``delimited`` says whether the response's end shows without closing the connection.
        """
        request = self.request
        if request is None or not delimited or self.server.stopping or not request.keeps_alive():
            self._close_after = True
        if self._close_after:
            return ["Connection: close"]
        return ["Connection: keep-alive"] if request and request.version == 0 else []

    def send_error(self, error: APIError, request_id: str) -> int:
        """Send an error of the gateway's own as a whole response; `response_done` is to follow.
        Returns the length of its body."""
        body = error.body(request_id)
        lines = [
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"request-id: {request_id}",
            f"x-litellm-call-id: {request_id}",
            *field_lines(error.headers),
            *self.connection_lines(delimited=True),
        ]
        if self.request is not None and self.request.method == "HEAD":
            body = b""
        self.send(head_bytes(f"HTTP/1.1 {error.status} {reason(error.status)}", lines) + body)
        return len(body)

    def response_done(self) -> None:
        """The response is written. The next request follows once this one's body has been read."""
        self._response_done = True
        self._close_callback = None
        self.resume_reading()
        request = self.request
        if self._body is not None and request is not None and request.get("expect"):
            self._linger()  # the body may never come (RFC 9110 section 10.1.1)
        else:
            self._turn()

    def break_off(self) -> None:
        """End the connection so that nobody takes the response for complete."""
        if self._lost:
            return
        if self.request is not None and self.request.version == 0:
            # Without a length, only a reset tells a broken response from one that has ended.
            client = self.transport.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._response_done = True
        self.transport.close()
        # A client that does not read keeps the rest of the response from being written.
        asyncio.get_running_loop().call_later(LINGER_TIMEOUT, self.transport.abort)

    # tornado.httputil.HTTPConnection

    def write_headers(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
        chunk: bytes | None = None,
    ) -> asyncio.Future[None]:
        """Called by Tornado's handlers, which send whole bodies with a Content-Length."""
        assert isinstance(start_line, httputil.ResponseStartLine)
        delimited = "Content-Length" in headers or start_line.code in (204, 304)
        lines = field_lines(headers.get_all())
        lines += self.connection_lines(delimited=delimited)
        self.send(
            head_bytes(f"HTTP/1.1 {start_line.code} {start_line.reason}", lines) + (chunk or b"")
        )
        return done()

    def write(self, chunk: bytes) -> asyncio.Future[None]:
        """Called by Tornado's handlers."""
        self.send(chunk)
        return done()

    def finish(self) -> None:
        """Called by Tornado's handlers."""
        self.response_done()

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """Called by Tornado's handlers."""
        self._close_callback = callback

    # Inside

    def _read_head(self, data: bytes) -> None:
        """Begin the request whose head ends with these bytes, if it does."""
        if len(self._head) == 1:  # it may be half an empty line
            data = self._head.take_back() + data
        if not self._head:
            self._since = self._heard
            data = self._skip_empty_lines(data)
        try:
            if self._empty_lines > MAX_EMPTY_LINES:
                raise ProtocolError("a request begins with a request line")
            found = self._head.feed(data) if data else None
            if found is None:
                return
            request = parse_request_head(found[0])
            length = declared_length(request) or 0
        except ProtocolError as error:
            self._refuse_malformed(error)
            return
        rest, self._empty_lines = found[1], 0
        if self.server.xheaders:
            self.context.believe(request)
        self.request = request
        self._served = True
        self._body = Body(length)
        self._taken = len(rest)
        self._since = self._heard
        self._response_done = False
        self._discarded = 0
        self._delegate = self.server.delegate(self, request)
        self._delegate.prepare(length)
        if not rest and length != 0 and not self._response_done and self._expects_continue(request):
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._feed(rest)

    def _skip_empty_lines(self, data: bytes) -> bytes:
        """What stands behind the empty lines before a request (RFC 9112 section 2.2)."""
        while data.startswith(b"\r\n") and self._empty_lines <= MAX_EMPTY_LINES:
            data = data[2:]
            self._empty_lines += 1
        return data

    def _expects_continue(self, request: RequestHead) -> bool:
        return request.version == 1 and request.get("expect").lower() == "100-continue"

    def _feed(self, data: bytes) -> None:
        """Hand on a part of the present request's body."""
        assert self._body is not None
        try:
            payload, rest = self._body.feed(data)
        except ProtocolError as error:
            self._refuse_malformed(error)
            return
        complete = self._body.complete
        if complete:
            self._body = None
        self._buffer = rest
        if self._response_done:
            self._discard(len(payload))
        elif self._delegate is not None:
            if payload:
                self._delegate.data_received(payload)
            if complete and not self._response_done:
                self._delegate.finish()
        if rest and not complete:
            self._read_on_soon()
        self._turn()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > DISCARD_LIMIT:
            self._linger()

    def _turn(self) -> None:
        """Make ready for the next request, once both the response and the request's body are over."""
        if not self._response_done or self._lost:
            return
        if self._body is not None:
            return
        self._delegate = None
        self.request = None
        self._begin_waiting()
        if self._close_after:
            self._close()
        else:
            self._read_on_soon()

    def _read_on_soon(self) -> None:
        """Read what is here already, in another turn of the loop."""
        if self._buffer:
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._lost or self._lingering or not self._buffer:
            return
        if self._held_back or (self._body is None and self.is_busy):
            return  # who resumes comes back to it
        data, self._buffer = self._buffer, b""
        if self._body is not None:
            self._feed(data)
        else:
            self._read_head(data)
        self._update_reading()

    def _refuse_malformed(self, error: ProtocolError) -> None:
        """Answer bytes that are not a request, and close: what follows cannot be understood."""
        delegate, self._delegate = self._delegate, None
        answered = self._response_done
        if delegate is not None and not answered:
            self._response_done = True
            delegate.on_connection_close()
        self._body = None
        self._close_after = True
        if not answered and not (isinstance(delegate, RelayHandler) and delegate.has_answered):
            self.send_error(APIError(error.status, f"Malformed request: {error}."), new_call_id())
        self._linger()

    def _linger(self) -> None:
        """Close so that the answer still arrives: data that meets a closed socket is answered with
        a reset, which throws away what the client has not read yet (RFC 9112 section 9.6)."""
        if self._lost or self._lingering or self.transport.is_closing():
            return
        self._lingering = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self._close_once_silent()
        asyncio.get_running_loop().call_later(LINGER_TIMEOUT, self.transport.abort)

    def _close_once_silent(self) -> None:
        """TLS knows no half-closed connection; and what comes while it is being closed is gathered by
        the loop, where what comes before is dropped."""
        silent = self.server.time() - self._heard
        if silent >= LINGER_SILENCE:
            self._close()
        elif not self._lost:
            wait = LINGER_SILENCE - silent
            asyncio.get_running_loop().call_later(wait, self._close_once_silent)

    def _begin_waiting(self) -> None:
        """From now on the client is expected to send."""
        self._since = self._heard = self.server.time()
        self._taken = 0

    def _time_out(self, message: str) -> None:
        """Answer 408 where no answer has begun (RFC 9110 section 15.5.9), and close."""
        delegate, answered = self._delegate, self._response_done
        self._close_after = True
        if isinstance(delegate, RelayHandler) and not answered:
            delegate.on_timeout(message)
        elif not answered:
            self._response_done = True
            self.send_error(APIError(408, message), new_call_id())
        self._linger()

    def _end_idle(self) -> None:
        """Close a connection that has nothing to do; at once if the client does not read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _close(self) -> None:
        if not self._lost:
            self.transport.close()


class Handshake(asyncio.Protocol):
    """A client's connection over TLS until the handshake is done, when a `ClientConnection` follows.

    asyncio can serve TLS by itself, but tells of a connection only then; and one that never says a
    word costs some 100 KB, and so must count.
    """

    context: ClientContext

    def __init__(self, server: GatewayServer, ssl_context: ssl.SSLContext) -> None:
        self.server = server
        self._ssl_context = ssl_context

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio, which is given the socket a second time, now to speak TLS."""
        plain = cast(asyncio.Transport, transport)
        self.context = ClientContext(plain)
        try:
            client = plain.get_extra_info("socket").dup()
        except OSError:  # no more files
            return
        finally:
            plain.abort()
        if not self.server.begin_handshake(self):
            client.close()
            return
        self._task = asyncio.get_running_loop().create_task(self._shake_hands(client))

    async def _shake_hands(self, client: socket.socket) -> None:
        client_timeout = self.server.relay.settings.client_timeout
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: ClientConnection(self.server, self),
                client,
                ssl=self._ssl_context,
                ssl_handshake_timeout=client_timeout,
                ssl_shutdown_timeout=client_timeout,
            )
        except OSError as error:  # ssl.SSLError too; the loop closes the socket
            log.debug("handshake with %s: %s", self.context.remote_ip, error)
        finally:
            self.server.end_handshake(self)


def done() -> asyncio.Future[None]:
    """A future that is done."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def reason(status: int) -> str:
    """The reason phrase of a status."""
    return http.client.responses.get(status, "Unknown")


class ApplicationDelegate:
    """Hands a request to the Tornado application: everything that is not relayed. Its body is kept
    for the master key alone, since no other may do what takes one."""

    def __init__(
        self, application: web.Application, connection: ClientConnection, head: RequestHead
    ) -> None:
        self.connection = connection
        self._head = head
        self._received = 0
        self._admission = cast(Relay, application.settings["relay"]).admission
        self._keeps_body = self._admission.shows_master(head.values)
        self._delegate = application.start_request(connection, connection)

    def prepare(self, length: int) -> None:
        """Hand over the head. ``length`` is bytes or CHUNKED."""
        start_line = httputil.RequestStartLine(
            self._head.method, self._head.target, f"HTTP/1.{self._head.version}"
        )
        try:
            self._admission.refuse_foreign(self._head.host, self._head.values)
        except APIError as error:
            self._refuse(error)
            return
        if self._too_large(length):
            return
        try:
            headers = httputil.HTTPHeaders()
            for header in self._head.fields:
                headers.add(header.name, header.value)
            self._delegate.headers_received(start_line, headers)
        except httputil.HTTPInputError as error:
            self._refuse(APIError(400, f"Malformed request: {error}."))

    def data_received(self, chunk: bytes) -> None:
        """Hand over a part of the body; only the operator's is kept, nobody else's is looked at."""
        self._received += len(chunk)
        if not self._too_large(self._received) and self._keeps_body:
            self._delegate.data_received(chunk)

    def finish(self) -> None:
        """The request is whole: the handler runs."""
        self._delegate.finish()

    def on_connection_close(self) -> None:
        """The client has left before the request was whole."""

    def _too_large(self, size: int) -> bool:
        if size <= OWN_BODY_LIMIT:
            return False
        self._refuse(APIError(413, f"The request body is larger than {OWN_BODY_LIMIT:,} bytes."))
        return True

    def _refuse(self, error: APIError) -> None:
        self.connection.send_error(error, new_call_id())
        self.connection.response_done()


class HangupWatch:
    """Notices that a client has left while nothing is read from it.

    asyncio sees the end of a connection only by reading. This asks the kernel for the
    event itself (EPOLLRDHUP; nginx does the same), through an epoll that the loop reads.
    Where there is no epoll, such a client is noticed when it is read from again.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._watched: dict[int, ClientConnection] = {}
        if self._epoll is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._epoll.fileno(), self._hung_up)

    def watch(self, connection: ClientConnection) -> None:
        """Call the connection's ``hung_up`` once the peer has closed or reset."""
        descriptor = connection.descriptor
        if self._epoll is not None and descriptor not in self._watched:
            self._watched[descriptor] = connection
            self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, connection: ClientConnection) -> None:
        """Watch no longer."""
        if self._watched.pop(connection.descriptor, None) is not None:
            assert self._epoll is not None
            with contextlib.suppress(OSError):  # closing a socket takes it out of an epoll
                self._epoll.unregister(connection.descriptor)

    def close(self) -> None:
        """Free the epoll."""
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _hung_up(self) -> None:
        assert self._epoll is not None
        for descriptor, _ in self._epoll.poll(0):
            connection = self._watched.get(descriptor)
            if connection is not None:
                connection.hung_up()


class GatewayServer:
    """Listens, and finds the delegate of each request: the relay or the Tornado application."""

    def __init__(self, relay: Relay, application: web.Application) -> None:
        self.relay = relay
        self.application = application
        self.connections: set[ClientConnection] = set()
        self._handshakes: set[Handshake] = set()
        self.hangups = HangupWatch()
        self.time = relay.client.time
        self.xheaders = relay.settings.xheaders
        # A relayed request needs two: the client's and the upstream's.
        self.max_connections = max(1, (file_limit() - RESERVED_FILES) // 2)
        self._addresses: collections.Counter[str] = collections.Counter()
        self._servers: list[asyncio.Server] = []
        self._sweep_interval = min(SWEEP_INTERVAL, relay.settings.client_timeout / 4)
        self._sweep()

    @property
    def stopping(self) -> bool:
        """Whether connections are to end after the response under way."""
        return self.relay.stopping

    def delegate(
        self, connection: ClientConnection, request: RequestHead
    ) -> RelayHandler | ApplicationDelegate:
        """The delegate that takes a request up."""
        target = upstream_target(request.method, request.target)
        if target is None:
            return ApplicationDelegate(self.application, connection, request)
        return RelayHandler(self.relay, connection, request, target)

    async def add_sockets(
        self, sockets: Iterable[socket.socket], ssl_context: ssl.SSLContext | None = None
    ) -> None:
        """Take connections from these listening sockets, over TLS where a context is given."""
        loop = asyncio.get_running_loop()

        def accept() -> ClientConnection | Handshake:
            if ssl_context is None:
                return ClientConnection(self)
            return Handshake(self, ssl_context)

        for listening in sockets:
            # No BACKLOG yet: asyncio's own loop takes so many at a time, and where no more files can
            # be opened it fails and retries so many times.
            server = await loop.create_server(accept, sock=listening, backlog=1)
            self._servers.append(server)
            listening.listen(BACKLOG)

    def enter(self, connection: ClientConnection) -> None:
        """A connection was made: keep it, unless there are too many."""
        self.connections.add(connection)
        over, message = self._count(connection.context.peer)
        if over > REFUSALS:
            connection.transport.abort()
        elif over > 0:
            headers = [("retry-after", "5")]
            connection.refuse(APIError(429, message, headers=headers))

    def leave(self, connection: ClientConnection) -> None:
        """A connection is closed."""
        self.hangups.forget(connection)
        self.connections.discard(connection)
        self._uncount(connection.context.peer)

    def begin_handshake(self, handshake: Handshake) -> bool:
        """Whether a connection over TLS may go on: the same for one that cannot be answered yet."""
        self._handshakes.add(handshake)
        over, _ = self._count(handshake.context.peer)
        if over > REFUSALS:
            self.end_handshake(handshake)
        return over <= REFUSALS

    def end_handshake(self, handshake: Handshake) -> None:
        """It is done, or has failed."""
        if handshake in self._handshakes:
            self._handshakes.remove(handshake)
            self._uncount(handshake.context.peer)

    def _count(self, address: str) -> tuple[int, str]:
        """Count a connection in: how many there are too many, and of what."""
        peer = site_of(address)
        self._addresses[peer] += 1
        over = len(self.connections) + len(self._handshakes) - self.max_connections
        message = "The gateway has as many connections as it can hold. Try again."
        if peer and not self.xheaders:
            limit = self.relay.settings.max_connections_per_address
            if self._addresses[peer] - limit > over:
                over = self._addresses[peer] - limit
                message = f"Your address has more than {limit:,} connections open."
        return over, message

    def _uncount(self, address: str) -> None:
        peer = site_of(address)
        self._addresses[peer] -= 1
        if not self._addresses[peer]:
            del self._addresses[peer]

    def stop(self) -> None:
        """Take no further connections; those that ask for nothing close. One that is just sending a
        request is answered 503."""
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            if connection.is_idle:
                connection.transport.close()

    def close_all_connections(self) -> None:
        """Break what is left."""
        for connection in list(self.connections):
            connection.transport.abort()

    def close(self) -> None:
        """Free what the server holds beside its connections."""
        self._sweeper.cancel()
        self.hangups.close()

    def _sweep(self) -> None:
        moment, settings = self.time(), self.relay.settings
        for connection in list(self.connections):
            connection.check_patience(moment, settings.client_timeout, settings.idle_timeout)
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self._sweep_interval, self._sweep)


def site_of(address: str) -> str:
    """Who has an address: of IPv6 ones a site has 2**64, which all begin alike (RFC 6177)."""
    if ":" not in address:
        return address
    try:
        whole = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = whole.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.IPv6Network((int(whole) >> 64 << 64, 64)))


def file_limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MANY_FILES if soft == resource.RLIM_INFINITY else soft


# ─── Management ───────────────────────────────────────────────────────────────────────────────────

MAX_PAGE_SIZE = 100  # LiteLLM's limit on /key/list
MAX_LIMIT = 10**12  # of requests and tokens a minute, and of USD
MAX_DIGITS = 40  # of a number with a point or an exponent
MAX_OWN_DEPTH = 50  # of JSON in requests to the gateway itself


class BaseHandler(web.RequestHandler):
    """Answers in JSON, errors in Anthropic's envelope, and logs no query (keys stand there)."""

    @property
    def relay(self) -> Relay:
        """What the relay works with."""
        return cast(Relay, self.application.settings["relay"])

    def set_default_headers(self) -> None:
        """Called by Tornado."""
        self.call_id = new_call_id()
        self.clear_header("Server")
        self.set_header("x-litellm-call-id", self.call_id)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Called by Tornado for every exception of a handler."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, web.HTTPError):
            error = http_error(error.status_code, self.request.method or "", self.request.path)
        if not isinstance(error, APIError):
            error = APIError(500, FAILED_HERE)
        self.set_status(error.status)
        for name, value in error.headers:
            self.set_header(name, value)
        self.set_header("Content-Type", "application/json")
        self.set_header("request-id", self.call_id)
        self.finish(error.body(self.call_id))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Called by Tornado. Refusals are no failures."""
        if not isinstance(value, APIError):
            super().log_exception(typ, value, tb)

    def send_json(self, value: object) -> None:
        """Answer 200 with a JSON value."""
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value))


def http_error(status: int, method: str, path: str) -> APIError:
    """Tornado's own errors in words of ours."""
    if status == 404:
        return APIError(
            404, f"Nothing is served at {printable(path)}. Anthropic's API is at /anthropic/v1/"
        )
    if status == 405:
        return APIError(405, f"{printable(path)} does not take {printable(method)}.")
    return APIError(status if status in ERROR_TYPES else 400, reason(status))


class NotFoundHandler(BaseHandler):
    """Every path that nothing else serves."""

    def prepare(self) -> None:
        """Called by Tornado."""
        raise web.HTTPError(404)


class ManagementHandler(BaseHandler):
    """What only the master key may do. Raises 401 without a key, 403 with any other."""

    def prepare(self) -> None:
        """Called by Tornado before the handler's method."""
        self.require_master()
        self.relay.store.notice_edit()

    def require_master(self) -> None:
        """Let the master key pass, as ``Authorization: Bearer``, ``x-api-key`` or ``x-litellm-api-key``."""
        admission = self.relay.admission
        if not admission.has_master:
            raise APIError(
                403,
                "No master key is set, so keys cannot be managed. Start the gateway with"
                " GATEWAY_MASTER_KEY in its environment.",
            )
        shown = [credential for _, credential in self.credentials()]
        if any(admission.is_master(credential) for credential in shown):
            return
        if any(self.relay.store.lookup(credential) for credential in shown):
            raise APIError(403, "Only the master key may do this; a virtual key was sent.")
        raise APIError(401, "Send the master key as 'Authorization: Bearer' or 'x-api-key'.")

    def credentials(self) -> list[tuple[str, str]]:
        """The credentials of this request, as `candidates` gives them."""
        headers = self.request.headers
        return list(candidates({name: headers.get_list(name) for name in CREDENTIAL_HEADERS}))

    def json_body(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is ``{}``. Raises APIError 400."""
        try:
            body = json.loads(
                self.request.body or b"{}", parse_constant=refuse_constant, parse_float=read_number
            )
        except (ValueError, RecursionError) as error:
            raise APIError(400, f"The body is not JSON: {error}.") from None
        if at_once(is_deeper(self.request.body, MAX_OWN_DEPTH)):
            raise APIError(400, f"The body is more than {MAX_OWN_DEPTH} levels deep.")
        if not isinstance(body, dict):
            raise APIError(400, "The body is not a JSON object.")
        return body

    def addressed(self, body: Mapping[str, Any]) -> tuple[str, VirtualKey]:
        """The key that ``key`` (plain or hash) or ``key_alias`` names. Raises APIError 400 or 404."""
        key, alias = body.get("key"), body.get("key_alias")
        if isinstance(key, str) and key:
            return self.existing(self.relay.store.find(key))
        if key is None and isinstance(alias, str) and alias:
            return self.existing(self.relay.store.find_alias(alias))
        raise APIError(400, "'key' must name a key: the plain key or its hash.")

    def existing(self, found: tuple[str, VirtualKey] | None) -> tuple[str, VirtualKey]:
        """What was found. Raises APIError 404 where it was nothing."""
        if found is None:
            raise APIError(404, "Key not found.")
        return found


def read_number(text: str) -> Decimal:
    """A number with a point or an exponent. Raises ValueError for one that no float can be."""
    number = Decimal(text) if len(text) <= MAX_DIGITS else None
    if number is None or not math.isfinite(float(text)) or number.adjusted() < -MAX_DIGITS:
        raise ValueError("a number is too large, too small or too long")
    return number


def refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON (RFC 8259 section 6)."""
    raise ValueError(f"{name} is not a JSON number")


def key_row(hashed: str, key: VirtualKey) -> dict[str, Any]:
    """A key as LiteLLM's answers describe it; fields of LiteLLM that mean nothing here are null.

    ``spend`` is USD in the present budget window, which ends at ``budget_reset_at``.
    """
    moment, duration = now(), key.budget_duration
    reset = window(duration, moment)[1] if duration is not None else None
    return {
        "token": hashed,
        "token_id": hashed,
        "key_name": key.key_name,
        "key_alias": key.key_alias,
        "user_id": key.user_id,
        "team_id": key.team_id,
        "models": key.models,
        "allowed_routes": key.allowed_routes,
        "unmetered_routes": key.unmetered_routes,
        "spend": float(key.spent(moment)),
        "max_budget": usd(key.max_budget),
        "soft_budget": usd(key.soft_budget),
        "budget_duration": duration,
        "budget_reset_at": iso(reset),
        "model_max_budget": {p: model_budget_row(b) for p, b in key.model_max_budget.items()},
        "model_max_budget_usage": {
            pattern: {
                "spend": float(key.spent(moment, pattern)),
                "budget_reset_at": iso(window(b.duration, moment)[1]) if b.duration else None,
            }
            for pattern, b in key.model_max_budget.items()
        },
        "rpm_limit": key.rpm_limit,
        "tpm_limit": key.tpm_limit,
        "max_parallel_requests": key.max_parallel_requests,
        "metadata": key.metadata,
        "tags": key.tags,
        "blocked": key.blocked,
        "status": key.status(moment),
        "expires": iso(key.expires),
        "last_active": iso(key.account.last_active),
        "created_at": iso(key.created_at),
        "updated_at": iso(key.updated_at),
        "created_by": "master",
        "updated_by": "master",
        "budget_id": None,
        "litellm_budget_table": None,
        "key_type": "default",
    }


def model_budget_row(budget: ModelBudget) -> dict[str, Any]:
    """A model's budget as LiteLLM writes it."""
    return {"budget_limit": usd(budget.limit), "time_period": budget.duration}


def usage_rows(key: VirtualKey) -> dict[str, Any]:
    """What a key used, by day and model."""
    days: dict[str, Any] = {}
    for day, model, tally in key.account.usage.days():
        days.setdefault(day, {})[model] = tally_row(tally)
    return days


def tally_row(tally: Tally) -> dict[str, Any]:
    """A tally with every field, the spend as a number of USD."""
    return {name: getattr(tally, name) for name in TALLY_FIELDS} | {"spend": float(tally.spend)}


def key_changes(body: Mapping[str, Any], moment: datetime, prices: Prices) -> dict[str, Any]:
    """The fields of a request as fields of a VirtualKey; null clears. Raises APIError 400 by name."""
    changes: dict[str, Any] = {}
    for name, value in body.items():
        if name == "duration":
            changes["expires"] = read_expiry(value, moment)
        elif name in KEY_READERS:
            changes[name] = KEY_READERS[name](name, value)
        elif value is not None:
            raise APIError(400, f"{printable(name)!r} is not supported: it would not be enforced.")
    for name in ("max_budget", "soft_budget", "model_max_budget"):
        if changes.get(name) not in (None, {}) and not prices.available:
            raise APIError(
                400,
                f"{name!r} cannot be enforced: no prices are known. Install genai-prices where the"
                " gateway runs, or start it with --prices.",
            )
    return changes


def read_amount(name: str, value: Any) -> Decimal | None:
    """USD, or null. Raises APIError 400."""
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | Decimal)
        or not 0 <= value <= MAX_LIMIT
    ):
        raise APIError(400, f"{name!r} must be a number of USD from 0 up.")
    return Decimal(value)


def read_limit(name: str, value: Any) -> int | None:
    """A whole number from 0 up, or null. Raises APIError 400."""
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_LIMIT:
        raise APIError(400, f"{name!r} must be a whole number from 0 up.")
    return value


def read_window(name: str, value: Any) -> str | None:
    """A budget's window, or null. Raises APIError 400."""
    text = read_text(name, value)
    try:
        if text is not None:
            window(text, now())
    except (ValueError, OverflowError):
        raise APIError(400, f"{name!r} must be a length of time above zero, like '30d'.") from None
    return text


def read_routes(name: str, value: Any) -> list[str]:
    """Patterns of paths. Raises APIError 400."""
    routes = read_texts(name, value)
    if not all(route.startswith("/") for route in routes):
        raise APIError(400, f"{name!r} must be paths that begin with '/', with '*' for any text.")
    return routes


def read_model_budgets(name: str, value: Any) -> dict[str, ModelBudget]:
    """LiteLLM's ``{pattern: {"budget_limit": USD, "time_period": "1d"}}``. Raises APIError 400."""
    budgets = {}
    for pattern, row in read_kind(name, value, dict, "an object of models", {}).items():
        if not isinstance(row, dict):
            raise APIError(400, f"{name!r}: each model takes an object with 'budget_limit'.")
        limits = [row[field] for field in ("budget_limit", "max_budget") if field in row]
        periods = [row[field] for field in ("time_period", "budget_duration") if field in row]
        unknown = set(row) - {"budget_limit", "max_budget", "time_period", "budget_duration"}
        if len(limits) != 1 or len(periods) > 1 or unknown:
            raise APIError(
                400, f"{name!r}: each model takes 'budget_limit' and 'time_period' only."
            )
        limit = read_amount(name, limits[0])
        if limit is None:
            raise APIError(400, f"{name!r}: 'budget_limit' must be a number of USD from 0 up.")
        budgets[pattern] = ModelBudget(limit, read_window(name, periods[0] if periods else None))
    return budgets


def read_object(name: str, value: Any) -> dict[str, Any]:
    """An object; null is an empty one. Raises APIError 400."""
    return cast("dict[str, Any]", plain_numbers(read_kind(name, value, dict, "an object", {})))


def plain_numbers(value: Any) -> Any:
    """A JSON value with its decimals as floats, which `json` can write."""
    if isinstance(value, dict):
        return {name: plain_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [plain_numbers(entry) for entry in value]
    return float(value) if isinstance(value, Decimal) else value


def read_flag(name: str, value: Any) -> bool:
    """true or false; null is false. Raises APIError 400."""
    return cast(bool, read_kind(name, value, bool, "true or false", False))


def read_kind(name: str, value: Any, kind: type, words: str, default: Any) -> Any:
    """A value of that type; null is the default. Raises APIError 400."""
    if value is None:
        return default
    if not isinstance(value, kind):
        raise APIError(400, f"{name!r} must be {words}.")
    return value


def read_text(name: str, value: Any) -> str | None:
    """A string or null; empty is null. Raises APIError 400."""
    text = read_kind(name, value, str, "a string", None)
    return text or None


def read_texts(name: str, value: Any) -> list[str]:
    """A list of strings; null is empty. Raises APIError 400."""
    texts = read_kind(name, value, list, "a list of strings", [])
    if not all(isinstance(text, str) for text in texts):
        raise APIError(400, f"{name!r} must be a list of strings.")
    return cast("list[str]", texts)


def read_expiry(value: Any, moment: datetime) -> datetime | None:
    """``duration`` as the moment it ends; null is never. Raises APIError 400."""
    text = read_kind("duration", value, str, "a string like '30d'", None)
    try:
        return None if text is None else later(moment, text)
    except ValueError as error:
        raise APIError(400, f"'duration': {error}.") from None


KEY_READERS: dict[str, Callable[[str, Any], Any]] = {
    "key_alias": read_text,
    "user_id": read_text,
    "team_id": read_text,
    "metadata": read_object,
    "tags": read_texts,
    "blocked": read_flag,
    "models": read_texts,
    "allowed_routes": read_routes,
    "unmetered_routes": read_flag,
    "rpm_limit": read_limit,
    "tpm_limit": read_limit,
    "max_parallel_requests": read_limit,
    "max_budget": read_amount,
    "soft_budget": read_amount,
    "budget_duration": read_window,
    "model_max_budget": read_model_budgets,
}


def read_own_key(value: Any, store: KeyStore) -> str:
    """A key that the caller chose, or a fresh one. Raises APIError 400."""
    if value is None:
        return new_key()
    if (
        not isinstance(value, str)
        or not PRINTABLE_KEY.fullmatch(value)
        or len(value) < MIN_KEY_LENGTH
    ):
        raise APIError(
            400,
            f"'key' must begin 'sk-' and have {MIN_KEY_LENGTH} to {MAX_KEY_LENGTH} ASCII characters,"
            " without quotes and backslashes.",
        )
    if value.startswith(OWN_CREDENTIAL_PREFIX):
        raise APIError(
            400, f"'key' must not begin {OWN_CREDENTIAL_PREFIX!r}: so do Anthropic's own."
        )
    if store.lookup(value) is not None:
        raise APIError(400, "'key' exists already; choose another, or leave it out.")
    return value


class GenerateHandler(ManagementHandler):
    """POST /key/generate: LiteLLM's request and response; the plain key stands in this answer only."""

    async def post(self) -> None:
        """Make a key."""
        body = self.json_body()
        store, moment = self.relay.store, now()
        key = read_own_key(body.pop("key", None), store)
        changes = key_changes(body, moment, self.relay.admission.prices)
        refuse_taken_alias(store, changes.get("key_alias"))
        record = VirtualKey(key_name(key), created_at=moment, updated_at=moment, **changes)
        refuse_unmetered(record)
        hashed = hash_key(key)
        await store.change({hashed: record})
        log.info("key %s made", record.shown_name)
        self.send_json({**key_row(hashed, record), "key": key})


def refuse_unmetered(key: VirtualKey) -> None:
    """Raises APIError 400 where a key with a budget may call what the gateway cannot count, and
    nobody has said that it may."""
    named = [pattern for pattern in key.allowed_routes if unmetered(pattern)]
    if named and key.has_budget and not key.unmetered_routes:
        raise APIError(
            400,
            f"'allowed_routes' names {named[0]}, and what that costs cannot be counted against the"
            " key's budget. Leave it out, or add 'unmetered_routes': true.",
        )


def refuse_taken_alias(store: KeyStore, alias: str | None, own: str = "") -> None:
    """Raises APIError 400 where another key has this alias."""
    taken = store.find_alias(alias) if alias is not None else None
    if taken is not None and taken[0] != own:
        raise APIError(400, "'key_alias' is taken by another key.")


class UpdateHandler(ManagementHandler):
    """POST /key/update: ``key`` (plain or hash) and the fields to change; null clears one."""

    async def post(self) -> None:
        """Change a key."""
        body = self.json_body()
        hashed, record = self.addressed(body)
        by_alias = body.pop("key", None) is None
        if by_alias:
            body.pop("key_alias")
        moment = now()
        changes = key_changes(body, moment, self.relay.admission.prices)
        refuse_taken_alias(self.relay.store, changes.get("key_alias"), hashed)
        changed = dataclasses.replace(record, **changes, updated_at=moment)
        refuse_unmetered(changed)
        await self.relay.store.change({hashed: changed})
        log.info("key %s updated: %s", changed.shown_name, ", ".join(changes) or "nothing")
        self.send_json({**key_row(hashed, changed), "key": hashed})


class DeleteHandler(ManagementHandler):
    """POST /key/delete: ``keys`` (plain or hashes) or ``key_aliases``; all of them or none."""

    async def post(self) -> None:
        """Delete keys."""
        body, store = self.json_body(), self.relay.store
        keys, aliases = (
            read_texts("keys", body.get("keys")),
            read_texts("key_aliases", body.get("key_aliases")),
        )
        if not keys and not aliases:
            raise APIError(400, "Name the keys to delete in 'keys' or 'key_aliases'.")
        found = [self.existing(store.find(key)) for key in keys]
        found += [self.existing(store.find_alias(alias)) for alias in aliases]
        moment = now()
        await store.change(
            {
                hashed: dataclasses.replace(record, deleted_at=moment, retired={})
                for hashed, record in found
            }
        )
        for _, record in found:
            log.info("key %s deleted", record.shown_name)
        self.send_json({"deleted_keys": [*keys, *aliases]})


class BlockHandler(ManagementHandler):
    """POST /key/block and /key/unblock: ``key`` (plain or hash)."""

    def initialize(self, blocked: bool) -> None:
        """Called by Tornado with what the route says."""
        self.blocked = blocked

    async def post(self) -> None:
        """Block or unblock a key."""
        hashed, record = self.addressed(self.json_body())
        changed = dataclasses.replace(record, blocked=self.blocked, updated_at=now())
        await self.relay.store.change({hashed: changed})
        log.info("key %s %s", record.shown_name, "blocked" if self.blocked else "unblocked")
        self.send_json(key_row(hashed, changed))


class RegenerateHandler(ManagementHandler):
    """POST /key/regenerate or /key/{key}/regenerate: a new value for a key, that keeps all else.

    ``new_key`` chooses it. During ``grace_period`` (a duration) the old value still works. Other
    fields are changed as by /key/update.
    """

    async def post(self, key: str | None = None) -> None:
        """Give a key a new value."""
        body, store = self.json_body(), self.relay.store
        if key is not None:
            body["key"] = urllib.parse.unquote(key)
        old_hash, record = self.addressed(body)
        if body.pop("key", None) is None:
            body.pop("key_alias")
        moment = now()
        grace = read_expiry(body.pop("grace_period", None), moment)
        value = read_own_key(body.pop("new_key", None), store)
        changes = key_changes(body, moment, self.relay.admission.prices)
        refuse_taken_alias(store, changes.get("key_alias"), old_hash)
        retired = {old: until for old, until in record.retired.items() if until > moment}
        retired[old_hash] = grace or moment
        new = {"key_name": key_name(value), "updated_at": moment, "retired": retired}
        changed = dataclasses.replace(record, **{**changes, **new})
        refuse_unmetered(changed)
        hashed = hash_key(value)
        await store.change({old_hash: None, hashed: changed})
        log.info("key %s regenerated", changed.shown_name)
        self.send_json({**key_row(hashed, changed), "key": value})


class InfoHandler(ManagementHandler):
    """GET /key/info?key=: LiteLLM's ``{"key", "info"}``. A virtual key may ask about itself."""

    def prepare(self) -> None:
        """Called by Tornado; `get` decides, since a key may ask about itself."""

    def get(self) -> None:
        """Describe a key."""
        asked = self.get_query_argument("key", "")
        hashed, record = self.own_key(asked) or self.managed_key(asked)
        info = key_row(hashed, record) | {"usage": usage_rows(record)}
        del info["token"], info["token_id"]
        self.send_json({"key": asked or hashed, "info": info})

    def own_key(self, asked: str) -> tuple[str, VirtualKey] | None:
        """The virtual key that was shown, where it asks about itself. Raises APIError 401, 403."""
        caller = self.relay.admission.authenticate(
            {name: self.request.headers.get_list(name) for name in CREDENTIAL_HEADERS}
        )
        if caller.hashed is None or caller.key is None:
            return None
        if asked and self.relay.store.find(asked) != (caller.hashed, caller.key):
            raise APIError(403, "A virtual key may ask about itself only.")
        return caller.hashed, caller.key

    def managed_key(self, asked: str) -> tuple[str, VirtualKey]:
        """The key that the master key asks about. Raises APIError."""
        self.require_master()
        if not asked:
            raise APIError(400, "Name the key: /key/info?key=…, the plain key or its hash.")
        return self.existing(self.relay.store.find(asked))


class ListHandler(ManagementHandler):
    """GET /key/list: pages of hashes, or of whole rows with ``return_full_object=true``.

    Filters: ``user_id``, ``team_id``, ``key_alias``, ``key_hash``. ``page`` counts from 1, ``size``
    is at most 100.
    """

    def get(self) -> None:
        """List keys."""
        page, size = self.number("page", 1), min(self.number("size", 10), MAX_PAGE_SIZE)
        filters = {
            name: self.get_query_argument(name)
            for name in ("user_id", "team_id", "key_alias")
            if self.get_query_argument(name, "")
        }
        wanted = self.get_query_argument("key_hash", "")
        rows = [
            (hashed, record)
            for hashed, record in self.relay.store.live()
            if all(getattr(record, name) == value for name, value in filters.items())
            and wanted in ("", hashed)
        ]
        shown = rows[(page - 1) * size : page * size]
        full = self.get_query_argument("return_full_object", "").lower() == "true"
        self.send_json(
            {
                "keys": [full_row(*row) if full else row[0] for row in shown],
                "total_count": len(rows),
                "current_page": page,
                "total_pages": -(-len(rows) // size),
            }
        )

    def number(self, name: str, default: int) -> int:
        """A query parameter that counts from 1. Raises APIError 400."""
        text = self.get_query_argument(name, "") or str(default)
        if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or int(text) < 1:
            raise APIError(400, f"{name!r} must be a whole number from 1.")
        return int(text)


def full_row(hashed: str, key: VirtualKey) -> dict[str, Any]:
    """A key with what it used."""
    return key_row(hashed, key) | {"usage": usage_rows(key)}


class ResetSpendHandler(ManagementHandler):
    """POST /key/{key}/reset_spend: ``reset_to`` USD (0), for the present window."""

    async def post(self, key: str) -> None:
        """Set what a key has spent."""
        found = self.relay.store.find(urllib.parse.unquote(key))
        hashed, record = self.existing(found)
        amount = read_amount("reset_to", self.json_body().get("reset_to", 0)) or ZERO
        change = amount - record.spent(now())
        record.account.window().spend += change
        try:
            await self.relay.store.change({hashed: record})
        except APIError:
            record.account.window().spend -= change
            raise
        log.info("key %s: spend set to $%s", record.shown_name, dollars(amount))
        self.send_json(key_row(hashed, record))


class SpendKeysHandler(ManagementHandler):
    """GET /spend/keys: every key's row, those that spent most first."""

    def get(self) -> None:
        """List keys by spend."""
        rows = [key_row(hashed, key) for hashed, key in self.relay.store.keys.items()]
        self.send_json(sorted(rows, key=lambda row: -cast(float, row["spend"])))


REPORT_GROUPS: dict[str, Callable[[str, VirtualKey, str, str], str]] = {
    "api_key": lambda hashed, key, day, model: hashed,
    "model": lambda hashed, key, day, model: model,
    "team": lambda hashed, key, day, model: key.team_id or "",
    "user": lambda hashed, key, day, model: key.user_id or "",
    "day": lambda hashed, key, day, model: day,
}


class SpendReportHandler(ManagementHandler):
    """GET /global/spend/report?start_date&end_date&group_by=api_key|model|team|user|day.

    Dates are UTC days, both included, by default the last 30. One row a group: its name under
    ``group_by``'s own name, and every count.
    """

    def get(self) -> None:
        """Report what was used."""
        today = now()
        first = self.day("start_date", day_of(today - timedelta(days=29)))
        last = self.day("end_date", day_of(today))
        group = self.get_query_argument("group_by", "") or "api_key"
        if group not in REPORT_GROUPS:
            raise APIError(400, f"'group_by' must be one of {', '.join(REPORT_GROUPS)}.")
        sums: dict[str, Tally] = {}
        for hashed, key in self.relay.store.keys.items():
            for day, model, tally in key.account.usage.days(first, last):
                sums.setdefault(REPORT_GROUPS[group](hashed, key, day, model), Tally()).add(tally)
        rows = [
            {group: name} | self.described(group, name) | tally_row(t) for name, t in sums.items()
        ]
        self.send_json(sorted(rows, key=lambda row: -row["spend"]))

    def described(self, group: str, name: str) -> dict[str, Any]:
        """A key's alias and name beside its hash."""
        if group != "api_key":
            return {}
        key = self.relay.store.keys[name]
        return {"key_alias": key.key_alias, "key_name": key.key_name}

    def day(self, name: str, default: str) -> str:
        """A query parameter that is an ISO date. Raises APIError 400."""
        text = self.get_query_argument(name, "") or default
        try:
            return day_of(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC))
        except ValueError:
            raise APIError(400, f"{name!r} must be a date like 2026-11-22.") from None


class SpendLogsHandler(SpendReportHandler):
    """GET /spend/logs: the most recent requests, newest first, in LiteLLM's row fields.

    Filters: ``request_id`` (the gateway's call id or Anthropic's), ``api_key`` (plain or hash),
    ``user_id``, ``start_date``, ``end_date``. At most --recent-requests are remembered.
    """

    def get(self) -> None:
        """List requests."""
        first, last = (self.day("start_date", "0001-01-01"), self.day("end_date", "9999-12-31"))
        wanted, user = (
            self.get_query_argument("request_id", ""),
            self.get_query_argument("user_id", ""),
        )
        shown = self.get_query_argument("api_key", "")
        hashed = shown if not shown or HASH.fullmatch(shown) else hash_key(shown)
        rows = [
            spend_log_row(finished)
            for finished in reversed(self.relay.recent)
            if wanted in ("", finished.call_id, finished.request_id)
            and hashed in ("", finished.hashed)
            and (not user or (finished.key is not None and finished.key.user_id == user))
            and first <= day_of(finished.started) <= last
        ]
        self.send_json(rows)


def spend_log_row(finished: Finished) -> dict[str, Any]:
    """A request in the fields of LiteLLM's SpendLogs; those that mean nothing here are left out."""
    tally, key = finished.used.tally, finished.key
    prompt = tally.input_tokens + tally.cached
    return {
        "request_id": finished.request_id or finished.call_id,
        "litellm_call_id": finished.call_id,
        "call_type": "pass_through_endpoint",
        "custom_llm_provider": "anthropic",
        "api_base": finished.path,
        "api_key": finished.hashed,
        "key_alias": key.key_alias if key else None,
        "user": key.user_id if key else None,
        "team_id": key.team_id if key else None,
        "model": finished.used.model,
        "spend": float(finished.used.cost),
        "prompt_tokens": prompt,
        "completion_tokens": tally.output_tokens,
        "total_tokens": prompt + tally.output_tokens,
        "cache_read_input_tokens": tally.cache_read_tokens,
        "cache_creation_input_tokens": tally.written,
        "startTime": iso(finished.started),
        "endTime": iso(finished.ended),
        "status": "success" if finished.status < 400 and finished.outcome == "ok" else "failure",
        "status_code": finished.status,
        "outcome": finished.outcome,
        "estimated": finished.used.estimated,
        "request_tags": finished.tags,
        "requester_ip_address": finished.remote_ip,
    }


# ─── Operations ───────────────────────────────────────────────────────────────────────────────────

WELCOME = """\
This is a gateway to Anthropic's API: {base}

    export ANTHROPIC_BASE_URL={base}/anthropic
    export ANTHROPIC_AUTH_TOKEN=<your virtual key>

Claude Code and the Anthropic SDKs read these two; curl sends the key as x-api-key.
Ask whoever runs the gateway for a key.
"""


class HelloHandler(BaseHandler):
    """What Claude Code asks to warm its connection up, and what a browser sees at /."""

    def get(self) -> None:
        """Say what this is and how to connect."""
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        if self.request.path in ("/", RELAY_PREFIX, f"{RELAY_PREFIX}/"):
            self.finish(WELCOME.format(base=f"{self.request.protocol}://{self.request.host}"))
        else:
            self.finish("hello\n")

    def head(self) -> None:
        """The same without a body."""
        self.get()


class LivenessHandler(BaseHandler):
    """GET /health/liveliness and /health/liveness, as LiteLLM answers them."""

    def get(self) -> None:
        """Say that the process runs."""
        self.send_json("I'm alive!")


class ReadinessHandler(BaseHandler):
    """GET /health/readiness: 200 where requests are taken and keys can be kept, 503 otherwise.

    ``upstream`` tells what passing requests have met; ``uptime`` is seconds.
    """

    def get(self) -> None:
        """Say whether requests are taken."""
        relay, traffic = self.relay, self.relay.traffic
        writable = relay.store.is_writable()
        if relay.stopping:
            status = "shutting_down"
        else:
            status = "healthy" if writable else "unhealthy"
        self.set_status(200 if status == "healthy" else 503)
        self.send_json(
            {
                "status": status,
                "version": __version__,
                "uptime": round((now() - relay.started).total_seconds()),
                "store": "writable"
                if writable
                else relay.store.last_error or "The keys file cannot be written.",
                "upstream": {
                    "last_success": iso(traffic.last_success),
                    "last_failure": iso(traffic.last_failure),
                    "last_error": traffic.last_error or None,
                },
                "prices": prices_state(relay.admission.prices),
            }
        )


def prices_state(prices: Prices) -> str:
    """Whether what tokens cost is known: ``none``, ``loading`` or ``loaded``."""
    if not prices.available:
        return "none"
    return "loaded" if prices.loaded else "loading"


class MetricsHandler(ManagementHandler):
    """GET /metrics: what the gateway has done since it started, for Prometheus.

    Open to the master key, to a key whose ``allowed_routes`` name it, and with --open-metrics and
    in open mode to all. 501 where the package prometheus-client is not installed.
    """

    def prepare(self) -> None:
        """Called by Tornado before the handler's method."""
        admission = self.relay.admission
        if self.relay.settings.open_metrics or admission.is_open:
            return
        for _, credential in self.credentials():
            found = self.relay.store.lookup(credential)
            if found and found[2] == "active" and names_route(found[1], METRICS_PATH):
                return
        self.require_master()

    def get(self) -> None:
        """Answer in Prometheus' text format."""
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise APIError(
                501,
                "Metrics need the package prometheus-client. Install it where the gateway runs:"
                " pip install prometheus-client",
            ) from None
        registry = prometheus.CollectorRegistry()
        registry.register(MetricsCollector(self.relay))
        prometheus.ProcessCollector(registry=registry)
        accepted = self.request.headers.get("Accept", "")
        encode, content_type = prometheus.exposition.choose_encoder(accepted)
        self.set_header("Content-Type", content_type)
        self.finish(encode(registry))


def names_route(key: VirtualKey, path: str) -> bool:
    """Whether ``allowed_routes`` name a path of the gateway's own; a mere ``*`` does not."""
    return any(
        pattern.startswith(path) and fnmatch.fnmatchcase(path, pattern)
        for pattern in key.allowed_routes
    )


LATENCY_METRICS = (  # in the order of TIMINGS
    ("litellm_request_total_latency_metric", "The whole of a request"),
    ("litellm_llm_api_time_to_first_token_metric", "Until the first byte of an answer"),
    ("litellm_llm_api_latency_metric", "From the sending upstream to the answer's end"),
    ("litellm_overhead_latency_metric", "Added by the gateway before the first byte"),
)
USAGE_METRICS: tuple[tuple[str, str, Callable[[Tally], int | Decimal]], ...] = (
    ("litellm_spend_metric", "USD", lambda t: t.spend),
    (
        "litellm_total_tokens_metric",
        "Tokens",
        lambda t: t.input_tokens + t.cached + t.output_tokens,
    ),
    ("litellm_input_tokens_metric", "Prompt", lambda t: t.input_tokens + t.cached),
    ("litellm_output_tokens_metric", "Output", lambda t: t.output_tokens),
    ("litellm_input_cached_tokens_metric", "From cache", lambda t: t.cache_read_tokens),
    ("litellm_input_cache_creation_tokens_metric", "To cache", lambda t: t.written),
)
BUDGET_METRICS = (
    ("gateway_api_key_spend", "USD spent in the budget's present window"),
    ("litellm_api_key_max_budget_metric", "USD of the key's budget"),
    ("litellm_remaining_api_key_budget_metric", "USD left of the key's budget"),
    ("litellm_api_key_budget_remaining_hours_metric", "Hours until the budget resets"),
)


class MetricsCollector:
    """Makes Prometheus' metrics of the gateway's counts, at each scrape; so they cost nothing between.

    Names are LiteLLM's where it has one (its docs, "Prometheus metrics"), else they begin
    ``gateway_``. Times are seconds, amounts USD. At most MAX_LABELS keys have labels of their own.
    """

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    def collect(self) -> Iterator[Any]:
        """Called by the registry."""
        yield from self._requests()
        yield from self._latencies()
        yield from self._used()
        yield from self._budgets()
        yield from self._connections()

    def _requests(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily as Counter

        every = Counter(
            "litellm_proxy_total_requests_metric",
            "Relayed requests",
            labels=["api_key_alias", "model", "status_code"],
        )
        failed = Counter(
            "litellm_proxy_failed_requests_metric",
            "Relayed requests that were refused, failed or broke, by what happened",
            labels=["api_key_alias", "model", "exception_status", "exception_class"],
        )
        gone = Counter("gateway_client_disconnects", "Clients that left too early")
        sums: collections.Counter[tuple[str, str, str]] = collections.Counter()
        left = 0
        for (key, model, status, outcome), count in self.relay.traffic.requests.items():
            sums[key, model, str(status)] += count
            if outcome != "ok" or status >= 400:
                kind = "upstream_error" if outcome == "ok" else outcome
                failed.add_metric([key, model, str(status), kind], count)
            left += count if outcome == "client_gone" else 0
        for labels, count in sums.items():
            every.add_metric(labels, count)
        gone.add_metric([], left)
        yield from (every, failed, gone)

    def _latencies(self) -> Iterator[Any]:
        from prometheus_client.core import HistogramMetricFamily

        for index, (name, text) in enumerate(LATENCY_METRICS):
            family = HistogramMetricFamily(name, text, labels=["model"])
            for model, histograms in self.relay.traffic.timings.items():
                histogram, seen, buckets = histograms[index], 0, []
                for bound, count in zip(
                    (*LATENCY_BUCKETS, math.inf), histogram.counts, strict=True
                ):
                    seen += count
                    shown = "+Inf" if bound == math.inf else str(bound)
                    buckets.append((shown, seen))
                family.add_metric([model], buckets, histogram.total)
            yield family

    def _used(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily as Counter

        for name, text, amount in USAGE_METRICS:
            family = Counter(name, text, labels=["api_key_alias", "model"])
            for labels, tally in self.relay.admission.booked.items():
                family.add_metric(labels, float(amount(tally)))
            yield family

    def _budgets(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        families = [Gauge(name, text, labels=["api_key_alias"]) for name, text in BUDGET_METRICS]
        spent, limit, remaining, hours = families
        moment = now()
        keys = itertools.islice(self.relay.store.live(), MAX_LABELS)
        for name, key in {key.shown_name: key for _, key in keys}.items():
            labels = [name]
            spent.add_metric(labels, float(key.spent(moment)))
            if key.max_budget is None:
                continue
            limit.add_metric(labels, float(key.max_budget))
            remaining.add_metric(labels, float(key.max_budget - key.spent(moment)))
            if key.budget_duration is not None:
                left = window(key.budget_duration, moment)[1] - moment
                hours.add_metric(labels, left.total_seconds() / 3600)
        yield from families

    def _connections(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge

        relay, client = self.relay, self.relay.client
        active = list(relay.active)
        streams = sum(handler.is_streaming for handler in active)
        yield Gauge("litellm_in_flight_requests", "Requests under way", value=len(active))
        yield Gauge("gateway_streams_open", "Streams under way", value=streams)
        yield Gauge(
            "gateway_upstream_connections_idle",
            "Connections kept for the next request",
            value=client.idle,
        )
        for name, text, value in (
            ("opened", "Connections opened to the upstream", client.opened),
            ("reused", "Requests that went over a kept connection", client.reused),
        ):
            yield Counter(f"gateway_upstream_connections_{name}", text, value=value)


class JSONFormatter(logging.Formatter):
    """A log line as a JSON object: ``time``, ``level``, and a relayed request's `Finished.fields`
    or a ``message`` (with ``exception``, where there was one)."""

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
        }
        subject = record.args[0] if isinstance(record.args, tuple) and record.args else 0
        if isinstance(subject, Finished):
            line |= subject.fields()
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class MaskingFormatter(logging.Formatter):
    """What another formatter makes of a line, with the secrets masked and everything in it
    abbreviated that looks like a key, whoever wrote the line."""

    def __init__(self, inner: logging.Formatter | None, *secrets: str) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()
        self._secrets = [s for s in secrets if len(s) >= MIN_SECRET_LENGTH]

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        line = self._inner.format(record)
        for secret in self._secrets:
            line = line.replace(secret, "*" * 8)
        return mask_keys(line)


def log_request(handler: web.RequestHandler) -> None:
    """Tornado's access log for what is not relayed: without the query, where keys may stand."""
    request = handler.request
    level = logging.DEBUG if handler.get_status() < 400 else logging.INFO
    log.log(
        level,
        "- %s %s %d",
        printable(request.method or ""),
        word(printable(urllib.parse.unquote(request.path, "latin-1"))),
        handler.get_status(),
    )


# ─── Stand-in ─────────────────────────────────────────────────────────────────────────────────────

MOCK_MODELS = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5")
MOCK_TOKEN_INTERVAL = 0.02  # seconds between two deltas, about what a model does
MOCK_MAX_TOKENS = 200  # what an echo is cut down to
MOCK_ERROR = re.compile(r"mock-error-(4[0-9]{2}|5[0-9]{2})")
MOCK_CACHE_SIZE = 1000  # prompts whose cached prefix is remembered


class MockError(Exception):
    """An error of the stand-in, in the status and type that Anthropic gives it."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


MOCK_ERROR_TYPES = {
    **ERROR_TYPES,
    402: "billing_error",
    409: "conflict_error",
    529: "overloaded_error",
}


class MockAnthropic(web.Application):
    """A stand-in for Anthropic's API, for trying the gateway without a key or a network.

    It echoes what it was asked, counts four characters as a token, and refuses any credential but
    ``credential``, the one that the gateway is to send as x-api-key. The model ``mock-error-429``
    (or any other status) is answered with that error.
    """

    def __init__(self, credential: str) -> None:
        self.credential = credential
        self.batches: dict[str, dict[str, Any]] = {}
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, tuple[dict[str, Any], bytes]] = {}
        self.cached: dict[str, None] = {}
        batch = r"/v1/messages/batches"
        super().__init__(
            [
                (r"/v1/messages", MockMessages),
                (r"/v1/messages/count_tokens", MockCountTokens),
                (batch, MockBatches),
                (rf"{batch}/([^/]+)", MockBatch),
                (rf"{batch}/([^/]+)/(cancel|results)", MockBatchAction),
                (r"/v1/models", MockModels),
                (r"/v1/models/([^/]+)", MockModels),
                (r"/v1/files", MockFiles),
                (r"/v1/files/([^/]+)(/content)?", MockFile),
            ],
            default_handler_class=MockHandler,
            log_function=lambda handler: None,
        )


def mock_id(prefix: str) -> str:
    """An id that looks like Anthropic's."""
    return f"{prefix}_01{secrets.token_hex(11)}"


def mock_tokens(value: object) -> int:
    """How many tokens the stand-in counts: one for four characters of JSON."""
    return max(1, len(json.dumps(value)) // 4)


def mock_message(app: MockAnthropic, params: Mapping[str, Any]) -> dict[str, Any]:
    """A whole message in answer to these parameters. Raises MockError."""
    model, messages, max_tokens = (
        params.get("model"),
        params.get("messages"),
        params.get("max_tokens"),
    )
    if not isinstance(model, str):
        raise MockError(400, "invalid_request_error", "model: Field required")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise MockError(400, "invalid_request_error", "max_tokens: Field required")
    if not isinstance(messages, list) or not messages:
        raise MockError(400, "invalid_request_error", "messages: at least one message is required")
    error = MOCK_ERROR.fullmatch(model)
    if error:
        status = int(error[1])
        raise MockError(
            status, MOCK_ERROR_TYPES.get(status, "api_error"), "An error, as you asked."
        )
    words = f"You said: {mock_text(messages[-1])}".split(" ")[: min(max_tokens, MOCK_MAX_TOKENS)]
    return {
        "id": mock_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": " ".join(words)}],
        "stop_reason": "max_tokens" if len(words) == max_tokens else "end_turn",
        "stop_sequence": None,
        "usage": mock_usage(app, params, len(words)),
    }


def mock_text(message: object) -> str:
    """The text of a message, whichever way its content is written."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return " ".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict))


def mock_usage(app: MockAnthropic, params: Mapping[str, Any], output: int) -> dict[str, Any]:
    """Usage as Anthropic reports it; a prompt with ``cache_control`` is written to the cache the
    first time and read from it after that."""
    total, prefix = (
        mock_tokens(params.get("messages")),
        json.dumps([params.get("system"), params.get("tools")]),
    )
    marked = "cache_control" in json.dumps(params)
    cached = mock_tokens(prefix) if marked else 0
    hit = marked and prefix in app.cached
    if marked:
        app.cached[prefix] = None
        while len(app.cached) > MOCK_CACHE_SIZE:
            del app.cached[next(iter(app.cached))]
    written = 0 if hit else cached
    return {
        "input_tokens": total,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached if hit else 0,
        "cache_creation": {"ephemeral_5m_input_tokens": written, "ephemeral_1h_input_tokens": 0},
        "output_tokens": output,
        "service_tier": "standard",
    }


class MockHandler(web.RequestHandler):
    """What every route of the stand-in shares: the credential's check, ids, errors."""

    @property
    def app(self) -> MockAnthropic:
        """The stand-in."""
        return cast(MockAnthropic, self.application)

    def set_default_headers(self) -> None:
        """Called by Tornado."""
        self.request_id = mock_id("req")
        self.set_header("request-id", self.request_id)
        self.set_header("Server", "mock")

    def prepare(self) -> None:
        """Called by Tornado before the handler's method."""
        if self.request.headers.get_list("x-api-key") != [self.app.credential]:
            raise MockError(401, "authentication_error", "invalid x-api-key")
        if type(self) is MockHandler:
            raise MockError(404, "not_found_error", "Not found")

    def params(self) -> dict[str, Any]:
        """The body as a JSON object. Raises MockError."""
        try:
            body = json.loads(self.request.body)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise MockError(400, "invalid_request_error", "The body is not a JSON object")
        return body

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Called by Tornado for every exception of a handler."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        if not isinstance(error, MockError):
            error = MockError(status_code, MOCK_ERROR_TYPES.get(status_code, "api_error"), "Error")
        self.set_status(error.status, MOCK_ERROR_TYPES.get(error.status, "Error"))
        if error.status == 429:
            self.set_header("retry-after", "1")
        self.finish(
            {
                "type": "error",
                "error": {"type": error.kind, "message": str(error)},
                "request_id": self.request_id,
            }
        )

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Called by Tornado. Errors of the stand-in are meant."""
        if not isinstance(value, MockError):
            super().log_exception(typ, value, tb)

    def page(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Answer with a page of rows, as Anthropic's lists are paged."""
        limit = int(self.get_query_argument("limit", "20"))
        after = self.get_query_argument("after_id", "")
        ids = [row["id"] for row in rows]
        start = ids.index(after) + 1 if after in ids else 0
        shown = rows[start : start + limit]
        self.finish(
            {
                "data": shown,
                "has_more": start + limit < len(rows),
                "first_id": shown[0]["id"] if shown else None,
                "last_id": shown[-1]["id"] if shown else None,
            }
        )


class MockMessages(MockHandler):
    """POST /v1/messages, whole or as a stream."""

    async def post(self) -> None:
        """Answer a message."""
        params = self.params()
        message = mock_message(self.app, params)
        if params.get("stream") is not True:
            self.finish(message)
            return
        self.set_header("Content-Type", "text/event-stream; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        text, usage, stop = (
            message["content"][0]["text"],
            message["usage"],
            message["stop_reason"],
        )
        started = {
            **message,
            "content": [],
            "stop_reason": None,
            "usage": {**usage, "output_tokens": 1},
        }
        await self.event("message_start", message=started)
        await self.event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        await self.event("ping")
        for number, word in enumerate(text.split(" ")):
            await asyncio.sleep(MOCK_TOKEN_INTERVAL)
            delta = {"type": "text_delta", "text": word if number == 0 else f" {word}"}
            await self.event("content_block_delta", index=0, delta=delta)
        await self.event("content_block_stop", index=0)
        ended = {"stop_reason": stop, "stop_sequence": None}
        await self.event(
            "message_delta", delta=ended, usage={"output_tokens": usage["output_tokens"]}
        )
        await self.event("message_stop")

    async def event(self, kind: str, **data: Any) -> None:
        """Send one event of the stream."""
        self.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n")
        with contextlib.suppress(StreamClosedError):
            await self.flush()


class MockCountTokens(MockHandler):
    """POST /v1/messages/count_tokens."""

    def post(self) -> None:
        """Count."""
        self.finish({"input_tokens": mock_tokens(self.params().get("messages"))})


class MockBatches(MockHandler):
    """POST and GET /v1/messages/batches."""

    def post(self) -> None:
        """Make a batch; it is worked off at once, and has ended when it is next looked at."""
        requests = self.params().get("requests")
        if not isinstance(requests, list) or not requests:
            raise MockError(
                400, "invalid_request_error", "requests: at least one request is required"
            )
        batch_id, moment = mock_id("msgbatch"), now()
        self.app.results[batch_id] = [mock_result(self.app, request) for request in requests]
        batch = {
            "id": batch_id,
            "type": "message_batch",
            "processing_status": "in_progress",
            "request_counts": mock_counts(processing=len(requests)),
            "created_at": iso(moment),
            "expires_at": iso(moment + timedelta(days=1)),
            "ended_at": None,
            "cancel_initiated_at": None,
            "archived_at": None,
            "results_url": None,
        }
        self.app.batches[batch_id] = batch
        self.finish(batch)

    def get(self) -> None:
        """List batches, newest first."""
        self.page([mock_ended(self.app, batch) for batch in reversed(self.app.batches.values())])


def mock_counts(**counts: int) -> dict[str, int]:
    """A batch's request_counts."""
    return {"processing": 0, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0, **counts}


def mock_result(app: MockAnthropic, request: Mapping[str, Any]) -> dict[str, Any]:
    """One line of a batch's results."""
    try:
        result: dict[str, Any] = {
            "type": "succeeded",
            "message": mock_message(app, request["params"]),
        }
    except MockError as error:
        shape = {"type": "error", "error": {"type": error.kind, "message": str(error)}}
        result = {"type": "errored", "error": shape}
    return {"custom_id": request["custom_id"], "result": result}


def mock_ended(app: MockAnthropic, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, ended, with its results at Anthropic's own absolute URL."""
    kinds = [line["result"]["type"] for line in app.results[batch["id"]]]
    counts = mock_counts(succeeded=kinds.count("succeeded"), errored=kinds.count("errored"))
    batch["processing_status"], batch["request_counts"] = "ended", counts
    batch["ended_at"] = batch["ended_at"] or iso(now())
    batch["results_url"] = f"{ANTHROPIC_API}/v1/messages/batches/{batch['id']}/results"
    return batch


class MockBatch(MockHandler):
    """GET and DELETE /v1/messages/batches/{id}."""

    def get(self, batch_id: str) -> None:
        """Retrieve a batch."""
        self.finish(mock_ended(self.app, self.batch(batch_id)))

    def delete(self, batch_id: str) -> None:
        """Delete a batch."""
        self.batch(batch_id)
        del self.app.batches[batch_id], self.app.results[batch_id]
        self.finish({"id": batch_id, "type": "message_batch_deleted"})

    def batch(self, batch_id: str) -> dict[str, Any]:
        """The batch of that id. Raises MockError."""
        if batch_id not in self.app.batches:
            raise MockError(404, "not_found_error", "batch not found")
        return self.app.batches[batch_id]


class MockBatchAction(MockBatch):
    """POST …/{id}/cancel and GET …/{id}/results."""

    def post(self, batch_id: str, action: str) -> None:
        """Cancel a batch."""
        batch = self.batch(batch_id)
        batch["cancel_initiated_at"] = iso(now())
        self.finish({**batch, "processing_status": "canceling"})

    def get(self, batch_id: str, action: str) -> None:  # type: ignore[override]
        """Stream the results as JSONL."""
        mock_ended(self.app, self.batch(batch_id))
        self.set_header("Content-Type", "application/x-jsonl")
        self.finish("".join(json.dumps(line) + "\n" for line in self.app.results[batch_id]))


class MockModels(MockHandler):
    """GET /v1/models and /v1/models/{id}."""

    def get(self, model_id: str = "") -> None:
        """List models, or describe one."""
        models = [
            {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": "2026-01-01T00:00:00Z",
            }
            for name in MOCK_MODELS
        ]
        if not model_id:
            self.page(models)
            return
        found = [model for model in models if model["id"] == model_id]
        if not found:
            raise MockError(404, "not_found_error", f"model: {model_id}")
        self.finish(found[0])


class MockFiles(MockHandler):
    """POST and GET /v1/files; files are kept in memory."""

    def post(self) -> None:
        """Take a file."""
        uploads = self.request.files.get("file")
        if not uploads:
            raise MockError(400, "invalid_request_error", "file: Field required")
        upload = uploads[0]
        described = {
            "id": mock_id("file"),
            "type": "file",
            "filename": upload["filename"],
            "mime_type": upload["content_type"],
            "size_bytes": len(upload["body"]),
            "created_at": iso(now()),
            "downloadable": True,
        }
        self.app.files[described["id"]] = described, upload["body"]
        self.finish(described)

    def get(self) -> None:
        """List files."""
        self.page([described for described, _ in self.app.files.values()])


class MockFile(MockHandler):
    """GET and DELETE /v1/files/{id}, GET /v1/files/{id}/content."""

    def get(self, file_id: str, content: str | None) -> None:
        """Describe a file, or send its bytes."""
        described, data = self.file(file_id)
        if not content:
            self.finish(described)
            return
        self.set_header("Content-Type", described["mime_type"])
        self.finish(data)

    def delete(self, file_id: str, content: str | None) -> None:
        """Delete a file."""
        self.file(file_id)
        del self.app.files[file_id]
        self.finish({"id": file_id, "type": "file_deleted"})

    def file(self, file_id: str) -> tuple[dict[str, Any], bytes]:
        """The file of that id. Raises MockError."""
        if file_id not in self.app.files:
            raise MockError(404, "not_found_error", "file not found")
        return self.app.files[file_id]


# ─── Main ─────────────────────────────────────────────────────────────────────────────────────────

USAGE_ERROR = 2  # exit status for a start that cannot be
DRAIN_PROGRESS = 5.0  # seconds between two lines about what a stop waits for
LOOPBACK = ("127.0.0.1", "::1")
COLLECTOR_THRESHOLD = 10_000  # objects made and not freed; Python's own is 700
SWITCH_INTERVAL = 0.0005  # seconds; Python's own is 0.005
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
UVLOOP_CLOSED = "the handler is closed"  # uvloop/handles/handle.pyx, _ensure_alive
UNIX_SOCKET_MODE = 0o660  # for the owner and his group, such as the proxy's


def make_app(settings: Settings) -> web.Application:
    """The Tornado application for what is not relayed; ``settings["relay"]`` is the `Relay`.

    Call it from a running loop. Raises SettingsError where the keys file cannot be used.
    """
    prices = Prices(settings.prices)
    store = KeyStore(settings.keys, settings.usage_days)
    client = UpstreamClient(
        force_instance=True,
        connect_timeout=settings.connect_timeout,
        idle_timeout=settings.idle_timeout,
    )
    relay = Relay(settings, store, Admission(settings, store, prices), client)
    hello = "|".join(re.escape(path) for path in HELLO_PATHS)
    return web.Application(
        [
            (rf"(?:{hello})", HelloHandler),
            (r"/health/(?:liveliness|liveness)", LivenessHandler),
            (r"/health/readiness", ReadinessHandler),
            (METRICS_PATH, MetricsHandler),
            (r"/key/generate", GenerateHandler),
            (r"/key/update", UpdateHandler),
            (r"/key/delete", DeleteHandler),
            (r"/key/block", BlockHandler, {"blocked": True}),
            (r"/key/unblock", BlockHandler, {"blocked": False}),
            (r"/key/regenerate", RegenerateHandler),
            (r"/key/([^/]+)/regenerate", RegenerateHandler),
            (r"/key/([^/]+)/reset_spend", ResetSpendHandler),
            (r"/key/info", InfoHandler),
            (r"/key/list", ListHandler),
            (r"/spend/keys", SpendKeysHandler),
            (r"/spend/logs", SpendLogsHandler),
            (r"/global/spend/report", SpendReportHandler),
        ],
        default_handler_class=NotFoundHandler,
        log_function=log_request,
        relay=relay,
    )


def bind(settings: Settings, *, loopback: bool) -> list[socket.socket]:
    """Listening sockets: the Unix socket, or the port, on loopback where ``--address`` does not say
    otherwise. Raises SettingsError."""
    try:
        if settings.unix_socket:
            return [netutil.bind_unix_socket(settings.unix_socket, UNIX_SOCKET_MODE)]
        if settings.address or not loopback:
            return bind_sockets(settings.port, settings.address or None)
        sockets = bind_sockets(settings.port, LOOPBACK[0])
        with contextlib.suppress(OSError):  # a machine without IPv6
            sockets += bind_sockets(sockets[0].getsockname()[1], LOOPBACK[1])
        return sockets
    except OSError as error:
        where = settings.unix_socket or f"{settings.address or 'port'} {settings.port}"
        raise SettingsError(f"cannot listen on {where}: {error.strerror or error}") from None
    except ValueError as error:  # what stands there is a file, but no socket
        raise SettingsError(f"--unix-socket: {error}") from None


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """What serves TLS, where ``--certfile`` is given. Raises SettingsError."""
    if not settings.certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, settings)
    return context


def load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Give a context the certificate that the files hold now. Raises SettingsError."""
    try:
        context.load_cert_chain(settings.certfile, settings.keyfile or None, "")
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or error.__class__.__name__
        raise SettingsError(f"--certfile, --keyfile: {reason}") from None


MOCK_CREDENTIAL = "sk-ant-mock-"


def announce(settings: Settings, relay: Relay, port: int) -> None:
    """Print where it listens and relays to, what it lets in, and what a user pastes to connect."""
    admission, keys = relay.admission, sum(1 for _ in relay.store.live())
    url, everywhere = base_url(settings, port, is_open=admission.is_open)
    where = settings.unix_socket or url + (" and every other address" if everywhere else "")
    lines = [f"gateway {__version__} listening on {where}"]
    upstream = (
        "the built-in stand-in"
        if settings.api_key.startswith(MOCK_CREDENTIAL)
        else settings.upstream
    )
    lines.append(f"relaying to {upstream}")
    if settings.real_credential is None:
        lines.append(
            "! no ANTHROPIC_API_KEY is set: only callers with an sk-ant-… of their own get through"
        )
    if admission.is_open:
        lines.append(
            "! no master key is set and there are no virtual keys: open to all who reach it"
        )
    else:
        made = f"{keys} in {settings.keys}" if keys else "POST /key/generate makes one"
        lines.append(f"virtual keys are required ({made})")
    if not admission.has_master:
        lines.append("! no GATEWAY_MASTER_KEY is set: /key/* is closed")
    elif settings.has_weak_master_key:
        lines.append(f"! {WEAK_MASTER_KEY}")
    if not admission.prices.available:
        lines.append("! genai-prices is not installed: tokens are counted, money is not")
    lines += connect_lines(url, is_open=admission.is_open)
    print("\n".join(lines), flush=True)


def base_url(settings: Settings, port: int, *, is_open: bool) -> tuple[str, bool]:
    """Where a client on this machine finds the gateway, and whether it listens on all addresses."""
    if settings.unix_socket:
        return "https://<the proxy in front>", False
    address = settings.address or (LOOPBACK[0] if is_open else "")
    host = f"[{address}]" if ":" in address else address
    if address in ("", "0.0.0.0", "::"):
        host = LOOPBACK[0]
    scheme = "https" if settings.certfile else "http"
    return f"{scheme}://{host}:{port}", not address


def connect_lines(url: str, *, is_open: bool) -> list[str]:
    """What a user pastes to connect."""
    return [
        "connect with",
        f"  export ANTHROPIC_BASE_URL={url}{RELAY_PREFIX}",
        f"  export ANTHROPIC_AUTH_TOKEN={'anything' if is_open else '<a virtual key>'}",
    ]


def start_mock(settings: Settings) -> Settings:
    """Start the stand-in on a free loopback port and return settings that relay to it."""
    credential = MOCK_CREDENTIAL + secrets.token_urlsafe(KEY_BYTES)
    sockets = bind_sockets(0, LOOPBACK[0])
    server = HTTPServer(
        MockAnthropic(credential), max_body_size=MAX_BODY_SIZE, max_buffer_size=MAX_BODY_SIZE
    )
    server.add_sockets(sockets)
    upstream = f"http://{LOOPBACK[0]}:{sockets[0].getsockname()[1]}"
    return dataclasses.replace(settings, upstream=upstream, api_key=credential, auth_token="")


def report_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what the event loop reports; a line is enough where no more files can be opened."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
        log.warning("%s: new connections wait a second; raise the limit", error.strerror)
    elif isinstance(error, RuntimeError) and UVLOOP_CLOSED in str(error):
        # uvloop goes on with a read over TLS whose connection was broken off within it.
        log.debug("after the end of a connection", exc_info=error)
    else:
        loop.default_exception_handler(context)


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises SettingsError where it cannot start."""
    if settings.upstream == MOCK_UPSTREAM:
        settings = start_mock(settings)
    application = make_app(settings)
    relay: Relay = application.settings["relay"]
    server = GatewayServer(relay, application)
    context = server_context(settings)
    sockets = bind(settings, loopback=relay.admission.is_open)
    port = 0 if settings.unix_socket else sockets[0].getsockname()[1]
    await server.add_sockets(sockets, context)
    stops: asyncio.Queue[None] = asyncio.Queue()
    hangups: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_loop_error)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stops.put_nowait, None)
    loop.add_signal_handler(signal.SIGHUP, hangups.put_nowait, None)
    tasks = [
        asyncio.create_task(reload_at_each(hangups, relay, context)),
        asyncio.create_task(relay.batches.run()),
        asyncio.create_task(notice_edits(relay.store)),
    ]
    announce(settings, relay, port)
    prices = relay.admission.prices
    await loop.run_in_executor(None, prices.load)
    relay.admission.prices_loaded()
    favour_the_loop()
    await stops.get()
    for task in tasks:
        task.cancel()
    await stop(relay, server, stops)
    if settings.unix_socket:
        with contextlib.suppress(OSError):
            os.unlink(settings.unix_socket)


async def notice_edits(store: KeyStore) -> None:
    """Look at the keys file now and then, until cancelled."""
    while True:
        await asyncio.sleep(FLUSH_INTERVAL)
        store.notice_edit()


async def reload_at_each(
    hangups: asyncio.Queue[None], relay: Relay, context: ssl.SSLContext | None
) -> None:
    """Reload at each SIGHUP, one at a time, until cancelled."""
    while True:
        await hangups.get()
        await reload(relay, context)


async def reload(relay: Relay, context: ssl.SSLContext | None) -> None:
    """Read the certificate, the price file and the keys file again (SIGHUP); a bad one changes
    nothing. A new certificate holds for connections from now on."""
    try:
        if context is not None:
            server_context(relay.settings)  # one that fails must not be half loaded
            load_certificate(context, relay.settings)
        relay.admission.prices.reload()
        await relay.store.reload()
        favour_the_loop()
        log.info("keys read again: %d", sum(1 for _ in relay.store.live()))
    except (SettingsError, OSError) as error:
        log.error("not read again: %s", error)


async def stop(relay: Relay, server: GatewayServer, stops: asyncio.Queue[None]) -> None:
    """Take no more requests, let those under way end, break what is left. A second signal hurries."""
    relay.stopping = True
    server.stop()
    hurry = asyncio.create_task(stops.get())
    deadline = relay.client.time() + relay.settings.drain_timeout
    while relay.active and not hurry.done() and (left := deadline - relay.client.time()) > 0:
        log.info("stopping: %d requests under way, %.0f s left", len(relay.active), left)
        drained = asyncio.create_task(relay.idle.wait())
        await asyncio.wait(
            {hurry, drained}, timeout=min(left, DRAIN_PROGRESS), return_when=asyncio.FIRST_COMPLETED
        )
        drained.cancel()
    hurry.cancel()
    server.close_all_connections()
    await asyncio.sleep(0)  # the connections' ends reach their handlers
    for handler in list(relay.active):  # which wait for the names of batches
        handler.settle("client_gone")
    await relay.store.flush()
    relay.client.close()
    relay.store.close()
    server.close()
    log.info("stopped")


async def check(settings: Settings) -> bool:
    """Print, a line each, what is well and what is not, and what to do about it (``--check``)."""
    if settings.upstream == MOCK_UPSTREAM:
        settings = start_mock(settings)
    findings = [
        *check_packages(),
        check_keys_file(settings.keys),
        check_master_key(settings),
        check_certificate(settings),
        await check_upstream(settings),
    ]
    for well, text in findings:
        print(f"{'ok  ' if well else 'FAIL'} {text}")
    is_open = not settings.master_key and not has_keys(settings.keys)
    url, _ = base_url(settings, settings.port, is_open=is_open)
    print("\n".join([*connect_lines(url, is_open=is_open), *sdk_lines(url)]))
    return all(well for well, _ in findings)


Finding = tuple[bool, str]
CHECK_TIMEOUT = 30.0  # seconds
OPTIONAL_PACKAGES = (
    ("uvloop", "uvloop", "the gateway is slower"),
    ("genai_prices", "genai-prices", "money is not counted, budgets cannot be set"),
    ("prometheus_client", "prometheus-client", "there is no /metrics"),
)


def check_packages() -> Iterator[Finding]:
    """The packages that are there; one that is not costs a feature, and is no failure."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield True, f"Python {python}, Tornado {tornado.version}"
    for module, package, loss in OPTIONAL_PACKAGES:
        if importlib.util.find_spec(module) is not None:
            yield True, f"{package} is installed"
        else:
            yield True, f"{package} is not installed: {loss} (pip install {package})"


def has_keys(path: Path) -> bool:
    """Whether a keys file holds keys."""
    try:
        return bool(parse_store(path.read_bytes(), str(path)))
    except (OSError, SettingsError):
        return False


def check_keys_file(path: Path) -> Finding:
    """Whether the keys file is sound, and its folder takes the new file that each change makes."""
    try:
        keys = parse_store(path.read_bytes(), str(path))
        text = f"{path}: {len(keys)} keys"
    except FileNotFoundError:
        text = f"{path}: will be made"
    except OSError as error:
        return False, f"{path}: {error.strerror}; let the gateway's user read it"
    except SettingsError as error:
        return False, str(error)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return True, text
    except OSError as error:
        reason = f"{path.parent} cannot be written ({error.strerror})"
        return False, f"{text}; {reason}: let the gateway's user write there, or --keys"


def check_master_key(settings: Settings) -> Finding:
    """Whether there is a master key that nobody guesses."""
    if not settings.master_key:
        return False, (
            "no master key, so no virtual keys can be made: set GATEWAY_MASTER_KEY, for example to"
            f" {KEY_PREFIX}{secrets.token_urlsafe(24)}"
        )
    if settings.has_weak_master_key:
        return False, WEAK_MASTER_KEY
    return True, "the master key is set"


def check_certificate(settings: Settings) -> Finding:
    """Whether TLS can be served, if it is to be."""
    try:
        if server_context(settings) is None:
            return True, "TLS is not served: right behind a proxy, or on loopback"
    except SettingsError as error:
        return False, f"{error}; give PEM files that the gateway's user can read"
    return True, f"TLS is served with {settings.certfile}"


async def check_upstream(settings: Settings) -> Finding:
    """Whether the upstream answers, and takes the real key: one GET /v1/models."""
    client = UpstreamClient(force_instance=True, connect_timeout=settings.connect_timeout)
    request = HTTPRequest(f"{settings.upstream.rstrip('/')}/v1/models?limit=1")
    request.request_timeout = CHECK_TIMEOUT
    request.headers["anthropic-version"] = ANTHROPIC_VERSION
    credential = settings.real_credential
    if credential is not None:
        request.headers[credential[0]] = credential[1]
    try:
        response = await client.fetch(request, raise_error=False)
        if isinstance(response.error, UpstreamError):
            raise response.error
    except UpstreamError as error:
        return False, f"{settings.upstream}: {error} See --upstream and the network."
    finally:
        client.close()
    where = f"{settings.upstream} answers"
    if credential is None:
        return False, f"{where}, but no real key is set: set ANTHROPIC_API_KEY"
    if response.code in (401, 403):
        return False, f"{where} {response.code}: real key not accepted, set another"
    if response.code >= 400:
        return False, f"{where} {response.code} to GET /v1/models: is --upstream right?"
    return True, f"{where} and accepts the real key"


def sdk_lines(url: str) -> list[str]:
    """What a program with an Anthropic SDK says to connect."""
    base = f"{url}{RELAY_PREFIX}"
    return [
        f'  anthropic.Anthropic(base_url="{base}", api_key="<a virtual key>")',
        f'  new Anthropic({{ baseURL: "{base}", apiKey: "<a virtual key>" }})',
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the gateway with these arguments, by default the command line's. Ends the process."""
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
        masked = (settings.master_key, settings.api_key, settings.auth_token)
        for handler in logging.getLogger().handlers:
            inner = JSONFormatter() if options.log_json else handler.formatter
            handler.setFormatter(MaskingFormatter(inner, *masked))
        # The log shows neither; looking them up costs each line (docs of logging, "Optimization").
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
        raise_file_limit()
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            if options.check:
                sys.exit(0 if runner.run(check(settings)) else 1)
            runner.run(serve(settings))
    except SettingsError as error:
        sys.stderr.write(f"gateway: {error}\n")
        sys.exit(USAGE_ERROR)


def favour_the_loop() -> None:
    """Keep what else goes on in this process from stopping streams.

    What is here now stays: prices, keys and code are hundreds of thousands of objects, through which
    the garbage collector need not look again and again; and a request makes about a hundred, for
    which it need not look every few requests. And the thread that writes the keys file
    hands Python's lock back after SWITCH_INTERVAL.
    """
    gc.unfreeze()  # requests that were under way at the last time are garbage by now
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTOR_THRESHOLD)
    sys.setswitchinterval(SWITCH_INTERVAL)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop where it is installed; asyncio's own otherwise."""
    try:
        import uvloop
    except ImportError:
        return None
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


def raise_file_limit() -> None:
    """Take as many open files as the system allows: each stream holds two sockets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
