#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6", "uvloop>=0.21; sys_platform != 'win32'", "genai-prices>=0.2.3",
#   "prometheus-client", "msgspec", "redis", "hiredis"]
# ///
"""A gateway that lets a team share one Anthropic API key without handing it out.

    python gateway.py --port=4000

It relays Anthropic's API byte for byte under /anthropic/ and /v1/, swaps a virtual key for the real
one, and keeps the virtual keys in a JSON file, or, for many processes, in Redis or Valkey. Only
Tornado is required. The way of a request:

    `ServerConnection.data_received`    reads its head strictly, by `parse_request_head`
    `GatewayApplication.start_request`  gives it to a handler, run by a `HandlerDelegate`
    `RelayHandler.prepare`              each of RULES looks at the head (`Rule.head`)
    `RelayHandler.data_received`        a small JSON body is kept, all else goes on as it comes
    `RelayHandler.post`                 each rule looks at the body (`Rule.body`)
    `Ledger.hold`                       holds what it may cost
    `RelayHandler.fetch`                by `UpstreamClient.fetch`, over an `UpstreamConnection`
    `RelayHandler.on_head`              the answer's head came; rules choose a `ResponseFilter`
    `RelayHandler.on_chunk`             each filter sees it; `ServerConnection.write`
    `RelayHandler.settle`               each rule ends it (`Rule.end`): `Prices.charge` says what
                                        it cost, `Ledger.book` books it; its `Record` is logged

Whatever must wait returns an awaitable, and what need not returns None, as in Tornado. What a
connection and a request may do next stands in `FOLLOWS`. Each room of this file, from Settings to
Main, uses only what stands above it.
"""

from __future__ import annotations

import importlib.util
import signal
import sys

if __name__ == "__main__":  # until the files can be read again, SIGHUP must not end it
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if importlib.util.find_spec("tornado") is None:
        sys.stderr.write("gateway: Tornado is not installed: python3 -m pip install tornado\n")
        sys.exit(2)

import array
import asyncio
import base64
import bisect
import calendar
import collections.abc
import contextlib
import dataclasses
import difflib
import enum
import errno
import fcntl
import fnmatch
import functools
import gc
import gzip
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import resource
import secrets
import select
import socket
import ssl
import struct
import subprocess
import tempfile
import time
import tomllib
import types
import urllib.parse
import weakref
import zlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypedDict, TypeVar, cast

import tornado
from tornado import httputil, netutil, web
from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.log import define_logging_options
from tornado.options import OptionParser
from tornado.simple_httpclient import SimpleAsyncHTTPClient

__version__ = "1.0.0"
log = logging.getLogger("gateway")
KIB, MIB = 1024, 1024 * 1024


# ─── Settings ─────────────────────────────────────────────────────────────────────────────────────

ANTHROPIC_API = "https://api.anthropic.com"
MOCK_UPSTREAM = "mock"
DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_BODY_SIZE = 512 * MIB  # Anthropic's limit on files is 500 MB (api/overview)
MIN_MASTER_KEY_LENGTH = 16  # below this a key can be guessed
GOOD_MASTER_KEY = "set GATEWAY_MASTER_KEY to 16 characters or more that nobody can guess"
SENDABLE = re.compile(r"[\x21-\x7e]*")  # what a header or a URL can carry
REAL_KEY = re.compile(r"(?:([\w.-]{1,64})=)?(sk-[\x21-\x7e]+)", re.ASCII)  # with a name for it
DURATION = re.compile(r"\A([0-9]{1,9})(mo|s|m|h|d|w)\Z")
STORE_HOST = r"rediss?://(?:[^\s/?#@]*@)?(?:\[[\w:.]+\]|[\w.-]+)(?::\d{1,5})?(?:/\d*)?"
STORE_URL = re.compile(rf"|(?:{STORE_HOST}|unix://(?:[^\s/?#@]*@)?/[^\s?#@]+)(?:\?db=\d+)?")
NEED_STORE = ("processes", "without_store", "new_store", "import_", "export")
SHIPPED_KEYS = b'{"version": 1, "keys": {}}\n'  # a checkout's keys file, as no gateway writes it
LOCAL_KEYS = Path("keys.local.json")  # stands in for that one, which is only read
LOG_LEVELS = ("debug", "info", "warning", "error", "none")
OPTION_KINDS = {str: "string", Path: "string", int: "whole number", float: "number"}
OPTION_KINDS[bool] = "boolean (true or false)"
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
FROM_TEXT: dict[Any, Callable[[str], Any]] = {bool: BOOLEANS.__getitem__, int: int, float: float}


class SettingsError(Exception):
    """A wrong option, variable or keys file; the message is one line for who starts it."""

    as_json = False  # whether --log-json was read by then


@contextlib.contextmanager
def blaming(what: str, advice: str = "") -> Iterator[None]:
    """What fails or is wrong within is a SettingsError that begins and ends with these."""
    try:
        yield
    except (OSError, ValueError, ArithmeticError, RecursionError) as error:
        reason = getattr(error, "strerror", "") or error
        raise SettingsError(f"{what}: {reason}{advice}") from None


def option_name(field_name: str) -> str:
    """How a field is named on the command line."""
    return field_name.rstrip("_").replace("_", "-")


def option(
    default: Any, help: str, *variables: str, least: float | None = None, kind: Any = None
) -> Any:
    """A field that is an option, ``least`` its lower bound; empty or not given, it is the first
    of these variables that is set, or the default."""
    kind = kind or (Path if isinstance(default, Path) else type(default))
    known = {"help": help, "least": least, "variables": variables, "kind": kind}
    return field(default=default, metadata=known)


def secret(help: str, *variables: str) -> Any:
    """A field that is no option and never shown; its variables' twins ``…_FILE`` name files."""
    known = {"help": help, "least": None, "variables": variables, "kind": None}
    return field(default="", repr=False, metadata=known)


class Place(NamedTuple):
    """Which of several processes this is, and what its `Parent` gave it."""

    number: int = 0
    of: int = 1
    folder: str = ""  # of Unix sockets, over which each tells its metrics; none if it is alone
    control: int = -1  # the descriptor of what is the parent's end of, too, for as long as it lives
    sockets: Sequence[int] = ()  # to listen to; the first process binds its own


PLACE_VARIABLE = "GATEWAY_PLACE"
PLACE = Place(*json.loads(os.environ.get(PLACE_VARIABLE, "[]")))


@dataclass(frozen=True)
class Settings:
    """What the gateway runs with, each described once. Times are seconds, sizes bytes."""

    port: int = option(4000, "port to listen on; 0 takes a free one", least=0)
    address: str = option("", "address to listen on; by default all, or loopback in open mode")
    upstream: str = option(ANTHROPIC_API, "URL to relay to, or 'mock'", "ANTHROPIC_API_BASE")
    api_keys_file: str = option("", "file of more real keys; see README", "ANTHROPIC_API_KEYS_FILE")
    keys: Path = option(Path("keys.json"), "file that holds the virtual keys")
    connect_timeout: float = option(10.0, "seconds to wait for a connection upstream", least=0.001)
    idle_timeout: float = option(600.0, "seconds of silence that end a connection", least=0.001)
    client_timeout: float = option(60.0, "seconds for a head, or a pause in a body", least=0.001)
    drain_timeout: float = option(30.0, "seconds that requests get when stopping", least=0)
    max_body_size: int = option(MAX_BODY_SIZE, "largest request body, in bytes", least=1)
    max_connections_per_address: int = option(4096, "connections one address may have", least=1)
    max_held_bytes: int = option(0, "bytes of bodies held (a key: 1/4); 0: 1/4 of memory", least=0)
    prices: Path | None = option(None, "JSON of prices, before genai-prices; see README", kind=Path)
    max_budget: float | None = option(None, "USD for all keys together", least=0, kind=float)
    budget_duration: str = option("", "what --max-budget is for: 1h, 1d, 7d, 30d or 1mo")
    contact: str = option("", "whom messages tell to ask, as 'Ann, ann@example.org'")
    usage_days: int = option(90, "days for which usage is kept", least=1)
    recent_requests: int = option(10_000, "requests that /spend/logs remembers", least=1)
    request_log: str = option("", "file of relayed requests, by default beside --keys, or 'none'")
    budget_warnings: str = option("0.75,0.95", "parts of a budget whose passing is told")
    alert_webhook: str = option("", "URL to POST alerts to, as JSON", "GATEWAY_ALERT_WEBHOOK")
    unix_socket: str = option("", "Unix socket, for a proxy on this machine, instead of a port")
    reuse_port: bool = option(False, "let another gateway listen on the port too, as in a restart")
    processes: int = option(1, "processes that serve, over one --store; 0: one a core", least=0)
    store: str = option("", "Redis or Valkey for the keys, as redis://host/0", "GATEWAY_STORE")
    without_store: str = option("refuse", "requests while --store is away: 'refuse' or 'allow'")
    new_store: bool = option(False, "let --store be one that holds no gateway's keys yet")
    import_: str = option("", "keys file to write into --store, and end")
    export: str = option("", "keys file to make of what is in --store, and end")
    certfile: str = option("", "PEM file of certificates to serve TLS with; read again on SIGHUP")
    keyfile: str = option("", "its private key, where --certfile does not hold it")
    xheaders: bool = option(False, "believe a proxy's X-Real-Ip, X-Forwarded-For and -Proto")
    open_metrics: bool = option(False, "let everybody read /metrics")
    log_json: bool = option(False, "write the log as JSON, a line each")
    check: bool = option(False, "say whether all is well to start, and end: 0 if so, 1 if not")
    version: bool = option(False, "print the version, and end")
    config: str = option("", "TOML file of options, by their names; the command line wins over it")
    api_key: str = secret("the real key", "ANTHROPIC_API_KEY")
    api_keys: str = secret("more of them, as name=sk-…", "ANTHROPIC_API_KEYS")
    auth_token: str = secret("a real credential, sent as Bearer", "ANTHROPIC_AUTH_TOKEN")
    master_key: str = secret("the master key", "GATEWAY_MASTER_KEY", "LITELLM_MASTER_KEY")
    master_key_next: str = secret("a second one, to change it", "GATEWAY_MASTER_KEY_NEXT")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, known = getattr(self, each.name), each.metadata
            least = known["least"] if value is not None else None
            if least is not None and not least <= value < math.inf:
                name = option_name(each.name)
                raise SettingsError(f"--{name}: {value} is not a number from {least} up")
            if not known["kind"] and each.name != "api_keys" and not SENDABLE.fullmatch(value):
                names = " or ".join(known["variables"])
                raise SettingsError(f"{names} holds characters that a header cannot carry")
        alone, duration = not self.master_key, self.budget_duration
        length = DURATION.match(duration)
        is_odd = duration and not (length and int(length[1]))
        needs = [name for name in NEED_STORE if getattr(self, name) != getattr(Settings, name)]
        is_url, without = False, self.without_store
        with contextlib.suppress(ValueError):  # of a port beyond 65535
            port = urllib.parse.urlsplit(self.store).port
            is_url = port != 0 and bool(STORE_URL.fullmatch(self.store))
        filed = self.request_log not in ("", "none")
        wrong = {
            f"--port: {self.port} is not a port number (0 to 65535)": self.port > 65535,
            "--keyfile: needs --certfile": self.keyfile and not self.certfile,
            "--unix-socket: takes no --certfile": self.unix_socket and self.certfile,
            "GATEWAY_MASTER_KEY_NEXT: needs GATEWAY_MASTER_KEY": alone and self.master_key_next,
            f"--budget-duration: {duration} is no length of time, as 1d": is_odd,
            "--budget-duration: needs --max-budget": duration and self.max_budget is None,
            "--store: is no URL as redis://:password@host:6379/0": not is_url,
            f"--{option_name(''.join(needs[:1]))}: needs --store": needs and not self.store,
            "--import: takes no --export": self.import_ and self.export,
            "--without-store: is not refuse or allow": without not in ("refuse", "allow"),
            "--request-log: takes no --store, which has the log": self.store and filed,
            "--reuse-port: takes no --unix-socket": self.reuse_port and self.unix_socket,
        }
        for text in filter(wrong.get, wrong):
            raise SettingsError(text)
        if self.upstream != MOCK_UPSTREAM:
            parse_upstream(self.upstream)
        if self.alert_webhook:
            parse_upstream(self.alert_webhook.partition("?")[0], "--alert-webhook")
        _ = self.warned_parts

    @property
    def shown_store(self) -> str:
        """Where the store is, as it may be shown."""
        return without_password(self.store)

    @functools.cached_property
    def warned_parts(self) -> list[Decimal]:
        """Parts of a budget, in their order, and all of it. Raises SettingsError."""
        with contextlib.suppress(ArithmeticError):
            parts = sorted(Decimal(part) for part in filter(None, self.budget_warnings.split(",")))
            if all(0 < part < 1 for part in parts):
                return [*parts, Decimal(1)]
        raise SettingsError("--budget-warnings: are not parts between 0 and 1, as 0.75,0.95")


def real_keys(settings: Settings) -> dict[str, tuple[str, str]]:
    """The header (name, value) that carries each real key, by its shown name. SettingsError."""
    headers, entries = dict[str, tuple[str, str]](), settings.api_keys
    if settings.api_key:
        headers["default"] = "x-api-key", settings.api_key
    elif settings.auth_token:
        headers["default"] = "Authorization", f"Bearer {settings.auth_token}"
    if file := settings.api_keys_file:
        with blaming(f"--api-keys-file: {file}"):
            if os.stat(file).st_mode & 0o077:  # as ssh refuses the file of a key
                raise ValueError("others can read it; chmod 600 it")
            if not (text := Path(file).read_text("ascii").replace(",", " ").strip()):
                raise ValueError("holds no key")
        entries += f" {text}"
    for number, entry in enumerate(entries.replace(",", " ").split(), start=1):
        wrong = f"ANTHROPIC_API_KEYS, --api-keys-file: entry {number}"
        if not (found := REAL_KEY.fullmatch(entry)):
            raise SettingsError(f"{wrong} is no 'sk-…' or 'name=sk-…'")
        name, header = found[1] or f"key{number}", ("x-api-key", found[2])
        if name in headers or header in headers.values():
            raise SettingsError(f"{wrong} has the name or the key of one before")
        headers[name] = header
    return headers


def memory_size() -> int:
    """Bytes of memory that this process may use: the machine's, or the cgroup's if it is less."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):  # "max", or no cgroup
            size = min(size, int(Path("/sys/fs/cgroup", name).read_text()))
    return size


class Origin(NamedTuple):
    """Where connections go; ``host`` has no brackets, ``authority`` is what the Host field says."""

    scheme: str
    host: str
    port: int
    authority: str


def parse_upstream(url: str, option: str = "--upstream (or 'mock')") -> tuple[Origin, str]:
    """A URL's origin and base path (no trailing slash). Raises SettingsError."""
    with contextlib.suppress(ValueError, KeyError):
        parts = urllib.parse.urlsplit(url)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        more = parts.username is not None or parts.query or parts.fragment
        if parts.hostname and SENDABLE.fullmatch(url) and not more:
            return Origin(parts.scheme, parts.hostname, port, parts.netloc), parts.path.rstrip("/")
    raise SettingsError(f"{option}: is no http or https URL of a host and a path")


def without_password(store: str) -> str:
    """The URL of a store and of its database, without who it is asked for and his password."""
    return re.sub(r"//.*@", "//", store)


def read_secrets(environment: Mapping[str, str]) -> dict[str, Any]:
    """The secrets, by their fields: of variables, or of files that these name. SettingsError."""
    found = dict[str, Any]()
    for each in dataclasses.fields(Settings):
        is_secret = not each.metadata["kind"] or each.name == "store"
        for name in each.metadata["variables"] if is_secret else ():
            value, file = environment.get(name, "").strip(), environment.get(f"{name}_FILE", "")
            if file and each.name != "api_keys":  # whose file is an option
                with blaming(f"{name}_FILE: {file}"):
                    if value:
                        raise ValueError(f"{name} is set too; leave one of them out")
                    if not (value := Path(file).read_text("utf-8").strip()):
                        raise ValueError("is empty")
            if value:
                found.setdefault(each.name, value)
    return found


class Options(OptionParser):
    """Tornado's, with the environment's variables in what ``--help`` prints."""

    def print_help(self, file: Any = None) -> None:
        super().print_help(sys.stdout)
        print("Variables; the secrets among them also as …_FILE, the name of their file:\n")
        for each in dataclasses.fields(Settings):
            for name in each.metadata["variables"]:
                print(f"  {name:<32} {each.metadata['help']}")
        print(f"  {'SSL_CERT_FILE':<32} further certificates to trust upstream")


def read_options(parser: OptionParser, kinds: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Take options in, those of ``--config`` before those of the command line, which win over them.
    The SettingsError that it raises says no value: that may be a secret."""
    told = list[tuple[str, str, Any]]()  # what is shown of each, its name and its value
    for argument in arguments:
        shown, equals, text = argument.partition("=")
        name = shown.lstrip("-").replace("_", "-") if shown.startswith("-") else ""
        value: Any = text if equals else True
        with contextlib.suppress(ValueError, KeyError):  # else its type is wrong
            value = FROM_TEXT[kinds[name]](text.lower())
        told.append((shown, name, value))
        if name == "config" and text:
            with blaming(argument):
                table = tomllib.loads(Path(text).read_text("utf-8"))
            rows = ((key.replace("_", "-"), table[key]) for key in table)
            told[:0] = ((f"{argument}: {key}", key, value) for key, value in rows)
    for shown, name, value in sorted(told, key=lambda each: each[1] != "log-json"):
        kind = kinds.get(name)
        if kind is None or (name == "config" and "=" in shown):
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists them"
            raise SettingsError(f"{shown}: not an option ({hint})")
        if type(value) not in {float: (int, float), Path: (str,)}.get(kind, (kind,)):
            raise SettingsError(f"{shown}: is not a {OPTION_KINDS[kind]}")
        with blaming(shown):
            setattr(parser, name, kind(value))


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Read the command line (without the program's name), ``--config`` and the environment; but not
    ANTHROPIC_BASE_URL, which names this very gateway on a user's machine. Raises SettingsError."""
    parser, values = Options(), dict[str, Any]()
    define_logging_options(parser)
    kinds = {name.replace("_", "-"): type(value or "") for name, value in parser.items()}
    kinds |= {"help": bool, "log-to-stderr": bool}
    for each in dataclasses.fields(Settings):
        found = (environment.get(name, "").strip() for name in each.metadata["variables"])
        if kind := each.metadata["kind"]:
            value = values[each.name] = next(filter(None, found), each.default)
            told = "; else $".join((each.metadata["help"], *each.metadata["variables"]))
            shown = "" if each.name == "store" else value  # by --help: it may hold a password
            parser.define(option_name(each.name), shown, kind, told, group="Gateway")
            kinds[option_name(each.name)] = kind
    try:
        read_options(parser, kinds, arguments)
        if parser.version:
            print("gateway", __version__)
            sys.exit(0)
        if parser.logging.lower() not in LOG_LEVELS:
            raise SettingsError(f"--logging={parser.logging}: is not {', '.join(LOG_LEVELS)}")
        with contextlib.suppress(OSError):
            if parser.keys is Settings.keys and parser.keys.read_bytes() == SHIPPED_KEYS:
                parser.keys = LOCAL_KEYS  # as no other was named
        with blaming("--log-file-prefix, --log-rotate-…"):
            if PLACE.folder and parser.log_file_prefix:  # a file has one writer, which rotates it
                parser.log_file_prefix += f".{PLACE.number}"
            parser.run_parse_callbacks()  # which open the log
        chosen = {name: getattr(parser, option_name(name)) for name in values}
        values |= {name: value for name, value in chosen.items() if value not in ("", Path())}
        secrets = read_secrets(environment)
        values["store"] = values["store"] or secrets.get("store", "")
        return Settings(**secrets | values)
    except SettingsError as error:
        error.as_json = parser.log_json or bool({"--log-json", "--log-json=true"} & {*arguments})
        raise


# ─── Errors ───────────────────────────────────────────────────────────────────────────────────────

# Anthropic's error types by status (api/errors has no 405, 408 and 431: mistakes of the caller).
ERROR_TYPES = dict.fromkeys((400, 405, 408, 431), "invalid_request_error")
ERROR_TYPES |= dict.fromkeys((500, 501, 502), "api_error") | {504: "timeout_error"}
ERROR_TYPES |= {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
ERROR_TYPES |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
# Else the SDKs (anthropic/_base_client.py, _should_retry) and Claude Code try again for minutes.
DO_NOT_RETRY = ("x-should-retry", "false")
WHOM_TO_ASK = re.compile("whoever runs the gateway", re.IGNORECASE)  # where --contact says no more


class APIError(Exception):
    """The only way to say no: Anthropic's error envelope, sent with this status and these headers.
    ``kind`` is ``error.type``. The message never holds a key, a hash or a path of the machine."""

    def __init__(
        self, status: int, message: str, *, kind: str = "", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind or ERROR_TYPES[status]
        self.headers = (*headers, DO_NOT_RETRY) if status == 401 else tuple(headers)

    def body(self, request_id: str, contact: str = "") -> bytes:
        """The envelope as JSON (platform.claude.com, api/errors, "Error shapes")."""
        message = WHOM_TO_ASK.sub(lambda text: contact or text[0], self.message)
        error = {"type": self.kind, "message": message}
        return json.dumps({"type": "error", "error": error, "request_id": request_id}).encode()


# ─── Time and money ───────────────────────────────────────────────────────────────────────────────

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
EPOCH, FIRST_MONDAY = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 5, tzinfo=UTC)
ZERO, ALMOST, WHOLE = Decimal(0), Decimal("0.99"), Decimal(1)
MAX_MODELS_A_DAY = 50  # names come from requests; beyond these they are counted together
CLOCK = types.SimpleNamespace(ahead=0.0)  # seconds by which the store's, which all follow, is so
OTHER_MODELS, NO_MODEL = "other", "-"  # what stands in logs and sums for them, and for none


def now() -> datetime:
    """The present moment, UTC, to the second."""
    return moment_of(int(time.time() + CLOCK.ahead))


# A busy gateway asks for the same few moments many times a second, so what comes of them is kept.
@functools.lru_cache(maxsize=64)
def moment_of(second: int) -> datetime:
    """A second of Unix time as a moment."""
    return datetime.fromtimestamp(second, UTC)


@functools.lru_cache(maxsize=64)
def iso(moment: datetime) -> str:
    """A moment as ``2026-11-22T07:00:00Z``."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.lru_cache(maxsize=64)
def day_of(moment: datetime) -> str:
    """The UTC day of a moment, as an ISO date."""
    return moment.date().isoformat()


def from_iso(text: str) -> datetime:
    """Any ISO 8601 moment, one without a zone as UTC. Raises ValueError or TypeError."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


def later(start: datetime, duration: str) -> datetime:
    """``start`` plus ``30s 30m 1h 30d 2w 1mo`` as in LiteLLM. Raises ValueError, OverflowError."""
    [(amount, unit)] = DURATION.findall(duration)
    if unit != "mo":
        return start + timedelta(seconds=int(amount) * UNIT_SECONDS[unit])
    year, month = divmod(start.year * 12 + start.month - 1 + int(amount), 12)
    day = min(start.day, calendar.monthrange(year, month + 1)[1])
    return start.replace(year=year, month=month + 1, day=day)


@functools.cache
def encoder() -> Callable[[Any], bytes]:
    """msgspec's writer of JSON, which takes a fifth of the time, where it is installed."""
    try:
        import msgspec
    except ImportError:
        return lambda value: json.dumps(value).encode()
    return msgspec.json.encode


def as_json(value: Any) -> bytes:
    """JSON, also of lone surrogates, which msgspec does not take."""
    try:
        return encoder()(value)
    except UnicodeError:
        return json.dumps(value).encode()


@functools.lru_cache(maxsize=256)
def window(duration: str, moment: datetime) -> tuple[datetime, datetime]:
    """Start and end of the window that ``moment`` falls in, in UTC, as LiteLLM snaps them: ``7d``
    is a week from Monday, ``30d`` a calendar month, others go on from the epoch; what leads out of
    the calendar never ends. Raises ValueError for what is no length, ZeroDivisionError for 0."""
    length = {"7d": "1w", "30d": "1mo"}.get(duration, duration)
    [(amount, unit)] = DURATION.findall(length)
    try:
        if unit == "mo":
            months = moment.year * 12 + moment.month - 1
            year, month = divmod(months - months % int(amount), 12)
            start = datetime(year, month + 1, 1, tzinfo=UTC)
        else:
            origin = FIRST_MONDAY if unit == "w" else EPOCH
            step = timedelta(seconds=int(amount) * UNIT_SECONDS[unit])
            start = moment - (moment - origin) % step
        return start, later(start, length)
    except (ValueError, OverflowError):
        return EPOCH, datetime(9999, 12, 31, tzinfo=UTC)


@functools.lru_cache(maxsize=256)
def window_start(duration: str | None, moment: datetime) -> str:
    """The name of a budget's present window; empty for a budget that never resets."""
    return "" if duration is None else iso(window(duration, moment)[0])


def read_decimal(value: object) -> Decimal:
    """A finite amount that is not negative, from a JSON string or number. Raises ValueError."""
    with contextlib.suppress(ArithmeticError):
        amount = Decimal(str(value))
        if amount.is_finite() and amount >= 0:
            return amount
    raise ValueError(f"{value!r} is not an amount from zero up")


def dollars(amount: Decimal) -> str:
    """An amount for a message: at least cents, at most six digits behind the point."""
    text = f"{amount:.6f}".rstrip("0")
    return f"{amount:.2f}" if len(text.partition(".")[2]) < 2 else text


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
        """Count another tally in; written out, since each answer is counted several times."""
        self.requests += other.requests
        self.errors += other.errors
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cache_read_tokens += other.cache_read_tokens
        self.cache_write_5m_tokens += other.cache_write_5m_tokens
        self.cache_write_1h_tokens += other.cache_write_1h_tokens
        self.web_searches += other.web_searches
        self.spend += other.spend

    def subtract(self, other: Tally) -> None:
        """Take another tally out."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) - getattr(other, name))

    @property
    def written(self) -> int:
        """Tokens written to the cache."""
        return self.cache_write_5m_tokens + self.cache_write_1h_tokens

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were read from the cache or written to it."""
        return self.cache_read_tokens + self.written

    def to_json(self) -> dict[str, Any]:
        """What is not zero, and the amount as a string, since JSON's numbers are no decimals."""
        counts = {name: n for name in self.__slots__ if (n := getattr(self, name))}
        return counts | {"spend": str(self.spend)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Tally:
        """Read it back. Raises ValueError or TypeError."""
        if any(type(n) is not int or n < 0 for name, n in record.items() if name != "spend"):
            raise ValueError("has a wrong count in 'usage'")
        return cls(**{**record, "spend": read_decimal(record["spend"])})


class Usage:
    """What a key used, by UTC day (ISO date) and model; days past as the text that the file has."""

    def __init__(self, days: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._counted: dict[str, dict[str, Tally]] = {}  # the days that are not past
        self._texts = {day: json.dumps(models) for day, models in (days or {}).items()}
        for day, models in (days or {}).items():  # so that what is wrong is said now
            datetime.fromisoformat(day)
            for tally in models.values():
                Tally.from_json(tally)

    def of(self, day: str, model: str) -> Tally:
        """The tally of a model on a day, to be counted up."""
        models = self._counted.get(day) or self._counted.setdefault(day, self._read(day))
        if model not in models and len(models) >= MAX_MODELS_A_DAY:
            model = OTHER_MODELS
        return models.get(model) or models.setdefault(model, Tally())

    def days(self, first: str = "", last: str = "9999") -> Iterator[tuple[str, str, Tally]]:
        """(day, model, tally) of every day from first to last, in order."""
        for day in sorted(self._texts.keys() | self._counted.keys()):
            if first <= day <= last:
                for model, tally in (self._counted.get(day) or self._read(day)).items():
                    yield day, model, tally

    def to_json(self, today: str, keep_from: str) -> str:
        """The JSON text; days before ``keep_from`` are forgotten."""
        for day, models in self._counted.items():
            self._texts[day] = json.dumps(models, default=Tally.to_json)
        self._texts = {day: text for day, text in self._texts.items() if day >= keep_from}
        self._counted = {day: models for day, models in self._counted.items() if day >= today}
        return "{" + ", ".join(f'"{day}": {text}' for day, text in self._texts.items()) + "}"

    def _read(self, day: str) -> dict[str, Tally]:
        models = json.loads(self._texts[day]) if day in self._texts else {}
        return {
            name: Tally(**row | {"spend": Decimal(row["spend"])}) for name, row in models.items()
        }


@dataclass(slots=True)
class Bucket:
    """A token bucket that refills continuously (api/rate-limits), by ``limit`` a minute, its most;
    more may be drawn, and then it blocks. Times are seconds of a clock that does not jump."""

    limit: int
    seen: float
    drawn: float = 0.0

    def level(self, moment: float) -> float:
        """How much it holds."""
        if moment != self.seen:
            gained = (moment - self.seen) * self.limit / 60
            self.drawn, self.seen = max(0.0, self.drawn - gained), moment
        return self.limit - self.drawn

    def draw(self, amount: float, moment: float) -> None:
        """Take out."""
        self.drawn = self.limit - self.level(moment) + amount

    def seconds_until(self, wanted: float, moment: float) -> float:
        """How long until it holds that much; a minute where it never will."""
        missing = wanted - self.level(moment)
        if missing <= 0:
            return 0.0
        return missing * 60 / self.limit if 0 < wanted <= self.limit else 60.0


@dataclass(slots=True)
class Window:
    """USD spent in one window of a budget, and held for requests under way (not in the file); what
    a store that is shared said last is ``known``."""

    start: str = ""
    spend: Decimal = ZERO
    held: Decimal = ZERO
    known: Decimal = ZERO

    def spent(self, start: str) -> Decimal:
        """What was spent in the window that starts there: nothing, if it is a new one."""
        if start > self.start:  # else the clock may have been set back, and what was spent counts
            self.spend = self.known = ZERO
        self.start = start
        return self.spend


# ─── Keys ─────────────────────────────────────────────────────────────────────────────────────────

KEY_PREFIX = "sk-"
OWN_CREDENTIAL_PREFIX = "sk-ant-"  # every credential that Anthropic issues begins so
KEY_BYTES = 16  # LiteLLM: "sk-" and secrets.token_urlsafe(16), 22 characters
MIN_KEY_LENGTH, MAX_KEY_LENGTH = 16, 256  # of keys that a caller chooses; LiteLLM's minimum
# A key that a caller chooses: not as Anthropic's are, and known in a string in a log line.
CHOSEN_KEY = re.compile(r"sk-(?!ant-)[!#-\[\]-~]{13,253}")
KEY_LIKE = re.compile(r"sk-[^\s\"\\]{13,}")  # with its prefix 16 characters or more
SHOWN_LENGTH = 200  # characters of a text that a log line shows
MAX_LIMIT = 10**12  # of requests and tokens a minute, and of USD
ALL_MODELS = ""  # in the place of a pattern: the budget that is for all of them
BUDGET_NAMES = {"max_budget": "budget_limit", "budget_duration": "time_period"}  # LiteLLM's too


def hash_key(key: str) -> str:
    """The SHA-256 (hex) under which a key is kept; the plain key is kept nowhere."""
    return hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()


def key_name(key: str) -> str:
    """What may be shown of a key, as LiteLLM abbreviates it: ``sk-...`` and the last four."""
    return f"{KEY_PREFIX}...{key[-4:]}"


def mask_keys(text: str) -> str:
    """A text in which whatever looks like a key is abbreviated as `key_name` does it."""
    return KEY_LIKE.sub(lambda match: key_name(match[0]), text) if KEY_PREFIX in text else text


def printable(text: str) -> str:
    """Text for a log line: nothing in it can end the line or steer a terminal."""
    text = text[:SHOWN_LENGTH]
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def word(text: str) -> str:
    """A value for a log line of words: in quotes where it could be taken for several."""
    return json.dumps(text) if re.search(r'[\s"]', text) else text


@dataclass(slots=True)
class Batch:
    """A batch that a key made: its UTC day, ``lines`` booked, USD held for the rest, by budget; of
    its key's team, user and gateway ``beside``, by what these are kept under."""

    day: str
    lines: int = 0
    held: dict[str, Decimal] = field(default_factory=dict)
    booked: bool = False
    beside: dict[str, dict[str, Decimal]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.day)
        exactly(int, self.lines)
        exactly(bool, self.booked)
        for amounts in (self.held, *self.beside.values()):
            amounts |= {name: read_decimal(amount) for name, amount in amounts.items()}


@dataclass(slots=True, weakref_slot=True)
class Account:
    """What a key has used and has under way, one for all versions of its record. ``windows`` are by
    a budget's name, ``buckets`` its limits a minute of "requests" and "tokens"; ``hashed`` is what
    the record is kept under now. Of its large bodies one at a time is judged: it has the turn. In a
    store that is shared it has a ``place``, and the records of its team and user ``beside`` it."""

    windows: dict[str, Window] = field(default_factory=lambda: collections.defaultdict(Window))
    usage: Usage = field(default_factory=Usage)
    batches: dict[str, Batch] = field(default_factory=dict)
    last_active: datetime | None = None
    hashed: str = ""
    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock, compare=False)
    place: str = ""
    beside: Sequence[Limited] = ()


class Budget(NamedTuple):
    """A budget as it is counted: the name of its `Window`, what models it is for (ALL_MODELS, or a
    pattern), USD (None: any) and the window (None: for ever)."""

    name: str
    pattern: str
    limit: Decimal | None
    duration: str | None

    def is_for(self, model: str) -> bool:
        """Whether what a model costs counts; of one that is not known all does."""
        return not (model and self.pattern) or fnmatch.fnmatchcase(model, self.pattern)

    def end(self, moment: datetime) -> datetime | None:
        """When its present window ends."""
        return window(self.duration, moment)[1] if self.duration else None


def shown(value: Any, amount: Callable[[Decimal], float | str] = float) -> Any:
    """For `json.dumps`: what answers have for a value that JSON has no type for."""
    if isinstance(value, Decimal):
        return amount(value)
    return iso(value) if isinstance(value, datetime) else dataclasses.asdict(value)


class Kind(NamedTuple):
    """A type of field: ``read`` makes its value of JSON, or raises where it is not as ``words``."""

    words: str
    read: Callable[[Any], Any]
    empty: Callable[[], Any] = lambda: None

    def parse(self, name: str, value: Any) -> Any:
        """A field's value, of JSON. Raises APIError 400 that names it."""
        try:
            return self.empty() if value is None else self.read(value)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
            raise APIError(400, f"{name!r} must be {self.words}.") from None


def exactly(kind: type, value: Any) -> Any:
    """A value of this type, and not of one beneath it as true is of int. Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def read_texts(value: Any, begin: str = "") -> list[str]:
    """A list of strings that begin so."""
    texts: list[str] = exactly(list, value)
    if not all(text.startswith(begin) for text in texts):
        raise ValueError
    return texts


def read_amount(value: Any) -> Decimal:
    """A number from 0 up; a float as its shortest digits say."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_LIMIT:
        raise ValueError
    return Decimal(str(value))


def read_window(value: Any) -> str | None:
    """A budget's window; empty is none, as null is."""
    if value not in (None, ""):
        window(value, EPOCH)
    return value or None


def read_budgets(value: Any, amount: Callable[[Any], Decimal] = read_amount) -> dict[str, Any]:
    """LiteLLM's ``{pattern: {"budget_limit": USD, "time_period": "1d"}}``; null is for ever."""
    budgets = {}
    for pattern, row in value.items():
        fields = {BUDGET_NAMES.get(name, name): entry for name, entry in row.items()}
        is_taken = not pattern or pattern.startswith(EVERY)  # what other budgets are counted under
        is_odd = len(fields) < len(row) or not {*BUDGET_NAMES.values()} >= fields.keys()
        if is_odd or (is_taken and amount is read_amount):
            raise ValueError
        limit, period = amount(fields["budget_limit"]), read_window(fields.get("time_period"))
        budgets[pattern] = {"budget_limit": limit, "time_period": period}
    return budgets


SOME_DAYS = EPOCH, EPOCH + timedelta(days=1000)  # on which windows that differ end at other times


def read_windows(value: Any, amount: Callable[[Any], Decimal] = read_amount) -> list[Any]:
    """LiteLLM's ``[{"budget_duration": "1d", "max_budget": USD}]``, each window once."""
    budgets = [row | {"max_budget": amount(row["max_budget"])} for row in exactly(list, value)]
    lengths = [row["budget_duration"] for row in budgets]
    ends = {tuple(window(length, when)[1] for when in SOME_DAYS) for length in lengths}
    if len(ends) < len(budgets) or any(len(row) > 2 for row in budgets):
        raise ValueError
    return budgets


load_budgets = functools.partial(read_budgets, amount=read_decimal)  # as the file has them
load_windows = functools.partial(read_windows, amount=read_decimal)
NAME = Kind("a string", functools.partial(exactly, str), str)
TEXT = Kind("a string", lambda value: exactly(str, value) or None)
FLAG = Kind("true or false", functools.partial(exactly, bool), bool)
OBJECT = Kind("an object", functools.partial(exactly, dict), dict)
TEXTS = Kind("a list of strings", read_texts, list)
REACHES = ("own", "team", "all")  # whose things a key reaches
REACH = Kind("'own', 'team' or 'all'", lambda word: REACHES[REACHES.index(word)], lambda: "own")
ROUTES = Kind("paths from '/', with '*' for any text", lambda value: read_texts(value, "/"), list)
LIMIT = Kind("a whole number from 0 up", lambda value: int(read_amount(exactly(int, value))))
AMOUNT = Kind("a number of USD from 0 up", read_amount)
BUDGETS = Kind("{model: {'budget_limit': USD, 'time_period': '30d'}}", read_budgets, dict)
WINDOWS = Kind("[{'budget_duration': '1d', 'max_budget': USD}]", read_windows, list)
WINDOW = Kind("a length of time above zero, like '30d'", read_window)
MOMENT = Kind("a time", from_iso)
LIFETIME = Kind("a length of time like '30d', ending by 9999", lambda value: later(now(), value))
RETIRED = Kind("times", lambda row: {old: from_iso(end) for old, end in row.items()}, dict)


def kept(kind: Kind, help: str = "", load: Any = None, *, shown: bool = True) -> Any:
    """A field of a record: what reads it of the file; callers set what has a ``help`` for them, and
    answers show it."""
    filed = kind._replace(read=load or kind.read)
    marks = {"kept": filed, "settable": help and kind, "shown": shown and kind, "help": help}
    return field(default_factory=kind.empty, metadata=marks)


EVERY = "every "  # begins the names of the windows of ``budget_limits``


@dataclass(slots=True, kw_only=True)
class Limited:
    """What limits a key, and a team, a user or the whole gateway over all keys of theirs; the names
    of fields are LiteLLM's. Budgets are USD, None is no limit."""

    of: ClassVar[str] = "gateway"
    named_by: ClassVar[tuple[str, ...]] = ()  # the last is always there

    models: list[str] = kept(TEXTS, "models it may use, '*' for any text; none: all")
    rpm_limit: int | None = kept(LIMIT, "requests a minute")
    tpm_limit: int | None = kept(LIMIT, "tokens a minute")
    max_parallel_requests: int | None = kept(LIMIT, "requests at a time")
    max_budget: Decimal | None = kept(AMOUNT, "USD it may spend", read_decimal)
    budget_duration: str | None = kept(WINDOW, "window of max_budget, as 1d, 7d, 1mo; none: ever")
    budget_limits: list[Any] = kept(WINDOWS, "more budgets, a window each", load_windows)
    soft_budget: Decimal | None = kept(AMOUNT, "USD at which the operator is told", read_decimal)
    model_max_budget: dict[str, Any] = kept(BUDGETS, "budgets of models", load_budgets)
    metadata: dict[str, Any] = kept(OBJECT, "whatever you like to note")
    blocked: bool = kept(FLAG, "refuse it")
    created_at: datetime | None = kept(MOMENT)
    updated_at: datetime | None = kept(MOMENT)
    created_by: str | None = kept(TEXT)
    updated_by: str | None = kept(TEXT)
    account: Account = field(default_factory=Account)
    budgets: tuple[Budget, ...] = field(init=False, compare=False)  # that of the spend first
    has_budget: bool = field(init=False, compare=False)
    revision: str = field(default="", compare=False)  # in a store that is shared

    def __post_init__(self) -> None:
        budgets = [Budget(ALL_MODELS, ALL_MODELS, self.max_budget, self.budget_duration)]
        for each in self.budget_limits:
            length = each["budget_duration"]
            budgets.append(Budget(EVERY + length, ALL_MODELS, each["max_budget"], length))
        for pattern, row in self.model_max_budget.items():
            budgets.append(Budget(pattern, pattern, row["budget_limit"], row["time_period"]))
        self.budgets = tuple(budgets)
        self.has_budget = any(budget.limit is not None for budget in budgets)

    @property
    def is_limited(self) -> bool:
        """Whether anything of it must be held for a request."""
        limits = (self.rpm_limit, self.tpm_limit, self.max_parallel_requests)
        return self.has_budget or limits != (None, None, None)

    @property
    def shown_name(self) -> str:
        """What it is called in a log line."""
        names = (getattr(self, name) for name in self.named_by)
        return printable(next(filter(None, names), self.of))

    def status(self, moment: datetime) -> str:
        """LiteLLM's word: ``revoked`` (blocked) or ``active``."""
        return "revoked" if self.blocked else "active"

    def spent(self, moment: datetime, budget: Budget | None = None) -> Decimal:
        """USD spent in the present window of a budget, by default that of ``max_budget``."""
        name, _, _, duration = budget or self.budgets[0]
        return self.account.windows[name].spent(window_start(duration, moment))

    def to_json(self) -> dict[str, Any]:
        """The line's object, as `written` writes it, without usage and what says nothing."""
        used, record = self.account, {n: getattr(self, n) for n in MARKED[self.of, "kept"]}
        spent = {p: [w.start, w.spend] for p, w in used.windows.items() if w.spend}
        record["spend_window"], record["spend"] = spent.pop(ALL_MODELS, (None, None))
        record |= {"model_spend": spent, "last_active": used.last_active, "batches": used.batches}
        said = {n: value for n, value in record.items() if value or type(value) in (int, Decimal)}
        return {name: record[name] for name in self.named_by[-1:]} | said

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """Read it back, which uses the object up. Raises APIError, or whatever Python does."""
        if not isinstance(record, dict) or not record.keys() >= {*cls.named_by[-1:]}:
            raise ValueError(f"is not an object with a {cls.named_by[-1:]}")
        take = record.pop
        take("mean_output", None)  # version 1.0 wrote it
        used = Account(usage=Usage(take("usage", {})))
        used.last_active = MOMENT.parse("last_active", take("last_active", None))
        spent = {ALL_MODELS: [take("spend_window", ""), take("spend", 0)]}
        for name, (start, spend) in (spent | take("model_spend", {})).items():
            used.windows[name] = Window(exactly(str, start), read_decimal(spend))
        for name, row in take("batches", {}).items():  # version 1.0 wrote ``[day, lines]``
            batch = used.batches[name] = Batch(*row) if isinstance(row, list) else Batch(**row)
            for budget, amount in batch.held.items():
                used.windows[budget].held += amount
        return cls(**read_fields(record, MARKED[cls.of, "kept"]), account=used)


@dataclass(slots=True)
class VirtualKey(Limited):
    """One line of keys.json: what a key is and may do. ``unmetered_routes`` lets it spend where the
    gateway cannot count, ``retired`` has its former hashes and until when they work, ``resources``
    whose things it reaches (REACHES), ``owner_id`` what its own are kept under, ``home`` the real
    key under which they are made."""

    of = "key"
    named_by = ("key_alias", "key_name")

    key_name: str = kept(NAME)
    key_alias: str | None = kept(TEXT, "a name, which no other key has")
    user_id: str | None = kept(TEXT, "whose it is")
    team_id: str | None = kept(TEXT, "of which team")
    resources: str = kept(REACH, "whose files, batches … it reaches: own, team or all")
    home: str | None = kept(TEXT, "the real key for what it makes; given by itself")
    owner_id: str = kept(NAME, shown=False)
    allowed_routes: list[str] = kept(ROUTES, "paths it may call, '*' for any text", read_texts)
    unmetered_routes: bool = kept(FLAG, "call what cannot be counted, though it has a budget")
    tags: list[str] = kept(TEXTS, "what its requests are counted under, too")
    expires: datetime | None = kept(MOMENT)
    deleted_at: datetime | None = kept(MOMENT, shown=False)
    retired: dict[str, datetime] = kept(RETIRED, shown=False)

    @property
    def owner(self) -> str:
        """The name under which its things are kept; it stays when the key is regenerated."""
        return self.owner_id or self.account.hashed

    def status(self, moment: datetime) -> str:
        """LiteLLM's word: ``deleted``, ``revoked`` (blocked), ``expired`` or ``active``."""
        if self.deleted_at or self.blocked:
            return "deleted" if self.deleted_at else "revoked"
        return "expired" if self.expires and moment >= self.expires else "active"


@dataclass(slots=True)
class Team(Limited):
    """A team, whose limits hold over all keys that name it."""

    of = "team"
    named_by = ("team_alias", "team_id")

    team_id: str = kept(NAME)
    team_alias: str | None = kept(TEXT, "a name")


@dataclass(slots=True)
class User(Limited):
    """A user, whose limits hold over all keys that name him."""

    of = "user"
    named_by = ("user_alias", "user_email", "user_id")

    user_id: str = kept(NAME)
    user_email: str | None = kept(TEXT, "his address")
    user_alias: str | None = kept(TEXT, "a name")


GROUPS: dict[str, type[Team | User]] = {"team": Team, "user": User}
# The fields of a record, by what it is of, that are "kept", "settable", "shown" or have a "help".
MARKED: dict[tuple[str, str], dict[str, Any]] = {
    (kind.of, mark): {
        f.name: f.metadata[mark] for f in dataclasses.fields(kind) if f.metadata.get(mark)
    }
    for kind in (VirtualKey, Team, User, Limited)
    for mark in ("kept", "settable", "shown", "help")
}
MARKED["key", "settable"]["duration"] = LIFETIME
MARKED["key", "help"]["duration"] = "how long it works"
AnyLimited = TypeVar("AnyLimited", bound=Limited)
ALL_TEAM_MODELS = "all-team-models"  # LiteLLM's: what the team may use


def nearest(name: str, names: Iterable[str]) -> str:
    """A question whether another name is meant, where one is like it."""
    found = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def read_fields(record: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """A JSON object as fields of a record. Raises APIError 400 that names what is wrong."""
    fields = {}
    for name, value in record.items():
        if name in kinds:
            fields[name] = kinds[name].parse(name, value)
        elif value is not None:
            text = f"{printable(name)!r} is not supported: it would not be enforced."
            raise APIError(400, text + nearest(name, kinds))
    return fields


# ─── Anthropic ────────────────────────────────────────────────────────────────────────────────────

Breathe = Callable[[], Awaitable[None]]  # lets the loop do something else
ANTHROPIC_VERSION = "2023-06-01"  # platform.claude.com, api/versioning
JSON_BODY_LIMIT = 32 * MIB  # Anthropic's limit on messages; larger ones are streamed
BATCH_ENDED = "ended"  # types/messages/message_batch.py, processing_status
EVENT_STREAM, SSE_ERROR = "text/event-stream", b"\nevent: error\ndata: %b\n\n"
# What Claude Code tells of a request (CCD llm-gateway, "Request headers"), by its name in the log.
CLAUDE_CODE = ("session_id", "agent_id", "request_class", "prompt_id", "agent_type")
CLAUDE_FIELDS = {f"x-claude-code-{name.replace('_', '-')}": name for name in CLAUDE_CODE}
SESSION_FIELD = "x-claude-code-session-id"
TAGS_FIELD, METRICS_PATH = "x-litellm-tags", "/metrics"  # LiteLLM's
WORKSPACE_FIELD = "anthropic-workspace-id"  # chooses a workspace of the real key's owner
ORGANIZATION_FIELD, UNIFIED = "anthropic-organization-id", "anthropic-ratelimit-unified-"
# Its user then reads the message of a 429 as it is (Claude Code 2.1.331).
SPENT_REASON = (f"{UNIFIED}overage-disabled-reason", "org_spend_cap_reached")

BILLED = ("/v1/messages", "/v1/messages/batches", "/v1/messages/cache_touch", "/v1/complete")
FREE = re.compile(r"/v1/(?:messages/count_tokens|models(?:/[^/]*)?)/?")
UPLOAD = re.compile(r"(?s)/v1/(?:files|skills)(?:/.*)?")
BATCHES = re.compile(r"/v1/messages/batches(?:/[\w-]+(?:/results|/cancel)?)?/?")
# What every virtual key reaches; all else may cost what cannot be counted, or give out secrets.
OPENED = (*BILLED, "/v1/messages/count_tokens", "/v1/models", "/v1/files", "/v1/skills")
OPEN = re.compile(rf"(?s)({'|'.join(OPENED)})/?|{BATCHES.pattern}|/v1/(models|files|skills)/.*")
# The collections of a workspace (SDK: resources/), and how the ids of their things begin, which is
# a hint and no proof (api/overview: "format and length of IDs may change").
KINDS = {"batches": "msgbatch_", "files": "file_", "skills": "skill_", "agents": "agent_"}
KINDS |= {"environments": "env_", "sessions": "sesn_", "deployments": "depl_", "dreams": "drm_"}
KINDS |= {"deployment_runs": "drun_", "memory_stores": "memstore_", "vaults": "vlt_"}
KINDS |= {"tunnels": "tnl_", "user_profiles": "uprof_", "containers": "container_"}
COLLECTION = re.compile(r"(?s)/v1/(messages/batches|claude_code/[^/]+|[^/]+)(?:/([^/]+)(/.+?)?)?/?")
# Things whose answers may name what came of them, beside those that say what was used.
BEARERS = {"batches", "sessions", "dreams", "deployment_runs"}
# What is called below these belongs to nobody, or to an organisation.
NO_COLLECTIONS = {"messages", "models", "complete", "organizations", "compliance", "oauth"}
# What a pattern of ``allowed_routes`` must begin with to open another path.
GROUP = re.compile(r"/v1/messages(?:/[^/]*)?|/v1(?:/[^/]*)?|/?[^/]*")


class Route:
    """What a method, in capitals, and a decoded path mean to the rules."""

    def __init__(self, method: str, path: str) -> None:
        self.fetches, self.deletes = method in ("GET", "HEAD", "OPTIONS"), method == "DELETE"
        # The collection (one of KINDS, or none), the thing in it, and what of that, from "/" on.
        found = COLLECTION.fullmatch(path)
        parts = found.groups("") if found and found[1] not in NO_COLLECTIONS else ("", "", "")
        kind, self.name, self.below = parts
        self.kind, name = kind.rpartition("/")[2], self.name
        batches, billed = BATCHES.fullmatch(path) is not None, path.removesuffix("/") in BILLED
        # What orders something that its path does not tell is closed; a batch's own id does not.
        known = self.fetches or self.deletes or not (batches and name) or self.below == "/cancel"
        self.open = known and OPEN.fullmatch(path) is not None  # to any key, as its routes allow
        self.billed = billed and not self.fetches  # it orders what costs money, as estimated
        # No budget stands against it: counting, models, fetching paid batches.
        self.free = (self.fetches and batches) or FREE.fullmatch(path) is not None
        # The gateway looks into its answer; no rule looks at its body.
        self.is_read = billed or self.kind in BEARERS or bool(kind and not (name and self.fetches))
        self.unread = self.fetches or UPLOAD.fullmatch(path) is not None
        # It fetches the results of this batch; it is answered with batch objects; it makes one.
        self.results_of = name if batches and method == "GET" and self.below == "/results" else ""
        self.batch = batches and method in ("GET", "POST") and not self.results_of
        self.makes_batch = batches and not (self.fetches or name)


KEPT_PATH = 200  # characters; routes of longer paths are not kept
read_route = functools.lru_cache(maxsize=1024)(Route)
OTHER_ROUTE = read_route("GET", "")


def unmetered(pattern: str) -> bool:
    """Whether a pattern of ``allowed_routes`` opens what may cost what cannot be counted."""
    literal = re.split(r"[*?\[]", pattern.removeprefix("/anthropic"))[0]
    known = literal.startswith(METRICS_PATH) or OPEN.fullmatch(literal)
    return not known and not any(name.startswith(literal) for name in OPENED)


MAX_COUNT = 10**9  # tokens; whoever counts more is not believed
MAX_OUTPUT = 128_000  # tokens that an answer may have where the request does not say
MAX_MODEL_NAME = 100
MAX_MODELS = 20  # of one request that are priced apart; beyond them the model is any
MAX_ATTEMPTS = 10_000  # tools and fallbacks of one message, and things in one list
MAX_USES = 10  # of a tool that the server runs, where the request does not say
MAX_ITERATIONS = 1000  # that are read of one answer, so that a lying upstream holds nobody up
UNSEEN_THINKING = 4  # the part of max_tokens that thinking unseen is taken for


def tokens_in(size: int) -> int:
    """How many tokens so many bytes are taken for: 3 each, as in Chinese; English has some 4."""
    return -(-size // 3)


def model_of(value: object) -> str:
    """A model's name, printable and short enough for a log; empty for what is none."""
    return printable(value[:MAX_MODEL_NAME]) if isinstance(value, str) else ""


@functools.lru_cache(maxsize=1024)
def model_class(model: str) -> str:
    """What a model shares its rate limits with (api/rate-limits): its family, as "opus"."""
    return "".join(re.findall("[a-z]+", model.removeprefix("claude"))[:1])


def count_of(members: object, name: str, default: int = 0) -> int:
    """A count out of an object; the default where there is none that can be believed."""
    count = dict_of(members).get(name)
    return count if type(count) is int and 0 <= count <= MAX_COUNT else default


def list_of(value: object) -> list[Any]:
    """A value, if it is a list."""
    return value if isinstance(value, list) else []


def dict_of(value: object) -> dict[str, Any]:
    """A value, if it is an object."""
    return value if isinstance(value, dict) else {}


def is_event_stream(head: Head) -> bool:
    """Whether a message's body is server-sent events."""
    return head.get("content-type").lower().startswith(EVENT_STREAM)


def is_json(content_type: str) -> bool:
    """Whether a media type is JSON (RFC 6839: or ends in ``+json``)."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


@functools.cache
def decoder_of(members: type) -> Callable[[bytes], Any] | None:
    """msgspec's reader of the members that a TypedDict names; None where it is not installed."""
    try:
        import msgspec
    except ImportError:
        return None
    return cast("Callable[[bytes], Any]", msgspec.json.Decoder(members).decode)


def read_json(body: bytes, members: Any = None) -> object:
    """What a body says, or what a TypedDict names of it (`json` makes all); None: unreadable."""
    if members and (decode := decoder_of(members)):
        with contextlib.suppress(Exception):  # what msgspec cannot read, json may
            return decode(body)
    try:
        return json.loads(str(body, "utf-8"))
    except (ValueError, RecursionError):
        return None


def looked_at(names: str, **more: Any) -> Any:
    """A TypedDict of what is looked at of an object: some members, and those of a certain kind."""
    return cast(Any, TypedDict)("Looked", dict.fromkeys(names.split(), Any) | more, total=False)


# What a price depends on: of a message, a fallback or a server's tool in it, a batch and its rows …
BodyMembers = looked_at(
    "model max_tokens max_tokens_to_sample speed stream thinking inference_geo compaction"
    " context_management type max_uses",
    params="BodyMembers",
    **dict.fromkeys(("fallbacks", "tools", "requests"), "list[BodyMembers] | str | None"),
)
# … and of a whole answer, or of a row of a batch's results and the result in it.
Nothing = looked_at("")
Answer = looked_at(
    "model stop_reason usage completion", content="list[Nothing]", message="Answer", result="Answer"
)
read_answer = functools.partial(read_json, members=Answer)
# What is kept of an object's members, wherever it stands; those where a model may stand.
PLACES = {"budget_tokens", "edits", "id", *BodyMembers.__annotations__}
MODEL_PLACES = {"model", "fallbacks", "tools", "requests", "params"}


def made_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its members. Raises ValueError where a name stands twice: readers differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


read_clearly = json.JSONDecoder(object_pairs_hook=made_of).decode
UNCLEAR = "What this key sends is looked through, and"
# What msgspec reads at once, in some 10 ms at worst: whatever is in it, or with so few containers.
LIGHT_BODY, LIGHT_CONTAINED, LIGHT_CONTAINERS = 256 * KIB, 8 * MIB, 200_000
AT_ONCE = 32 * KIB  # of a body are read at once, by `json`
BREATH = 3000  # marks or parts, some milliseconds, after which the loop may do something else
MAX_MARKS = 400_000  # 4 MB full of code have some 100,000
ROW_MARKS, MAX_ROWS = 60, 100_000  # more for each row of a batch (its limit: PLD batch-processing)
MAX_DEPTH = 1000  # where Python 3.11's own parser gives up too
LONG_TEXT = "…"  # stands for a string that is longer than AT_ONCE, which names no model
# Spaces and digits that are too many for a turn of the loop are no JSON.
JSON_WORD = rb"true|false|null|-?(?:0|[1-9]\d{0,4299})(?:\.\d{1,999})?(?:[eE][+-]?\d{1,99})?"
JSON_MARK = re.compile(rb'[ \t\n\r]{0,99999}([\[\]{},:"]|(?:%b)(?![\w.+-]))' % JSON_WORD)
ESCAPED = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
# How what may come next begins; ITEM and MEMBER: or the end of the list or the object.
VALUE, QUOTE = b'[{"-0123456789tfn', b'"'
ITEM, MEMBER = VALUE + b"]", QUOTE + b"}"
FOLLOWING = {b"": b"", b"]": b",]", b"}": b",}"}


async def scan(body: bytes, names: set[str] | None, breathe: Breathe) -> object:
    """What a JSON text says, however hostile: of objects only the members of these names (None:
    all). Raises ValueError for what is no clear JSON, APIError 400 for more than a model reads."""
    at = marks = 0
    document = list[Any]()
    # Where values go, None where they are not kept, and what ends it; then what that stands in.
    holder: list[Any] | dict[str, Any] | None = document
    holders: list[tuple[list[Any] | dict[str, Any] | None, bytes]] = []
    end, name, wanted = b"", "", VALUE
    while found := JSON_MARK.match(body, at):
        at, mark, marks = found.end(), found[1], marks + 1
        if marks % BREATH == 0:
            rows = list_of(dict_of(document[0]).get("requests"))
            if marks > MAX_MARKS + ROW_MARKS * min(MAX_ROWS, len(rows)):
                raise APIError(400, "The body has more members than a model can read; send less.")
            await breathe()
        if mark[0] not in wanted:
            raise ValueError(f"what ends at byte {at} may not stand there")
        if mark in (b",", b":"):
            wanted = QUOTE if mark + end == b",}" else VALUE
        elif mark == end:
            holder, end = holders.pop()
            wanted = FOLLOWING[end]
        elif wanted in (QUOTE, MEMBER):
            name, at = await read_string(body, at, True, breathe)
            wanted = b":"
        else:
            kept = holder is not None and (end != b"}" or names is None or name.casefold() in names)
            into, value, wanted = holder, cast(Any, None), FOLLOWING[end]
            if mark in (b"[", b"{"):
                if len(holders) >= MAX_DEPTH:
                    raise ValueError(f"it has more than {MAX_DEPTH:,} levels")
                holders.append((holder, end))
                end, wanted = (b"]", ITEM) if mark == b"[" else (b"}", MEMBER)
                holder = value = ([] if mark == b"[" else {}) if kept else None
            elif mark == b'"':
                value, at = await read_string(body, at, kept, breathe)
            elif kept:
                value = json.loads(mark)
            if kept and isinstance(into, dict):
                if name in into:
                    raise ValueError(f"{name!r} stands twice in one object")
                into[name] = value
            elif kept and isinstance(into, list):
                into.append(value)
    if wanted or body[at:].strip(b" \t\n\r"):
        raise ValueError("it does not end")
    return document[0]


async def read_string(body: bytes, start: int, kept: bool, breathe: Breathe) -> tuple[str, int]:
    """A string that begins there, if it is ``kept``, and where it has ended. Raises ValueError."""
    at, end = start, body.find(b'"', start)
    while at <= end and body.find(b"\\", at, end) >= 0:
        at = cast("re.Match[bytes]", ESCAPED.match(body, at, at + AT_ONCE)).end()
        end = end if at <= end else body.find(b'"', at)
        if at - start >= AT_ONCE:
            await breathe()
    if end < at:
        raise ValueError("a string does not end")
    if end - start >= AT_ONCE or not kept:
        return LONG_TEXT, end + 1
    return json.loads(body[start - 1 : end + 1]), end + 1


def is_light(body: bytes) -> bool:
    """Whether what a price depends on is read out of it at once."""
    if len(body) <= LIGHT_BODY or len(body) > LIGHT_CONTAINED or not decoder_of(BodyMembers):
        return len(body) <= LIGHT_BODY
    return body.count(b"[") + body.count(b"{") <= LIGHT_CONTAINERS


async def read_body(body: bytes, breathe: Breathe, *, strictly: bool, wholly: bool = False) -> Any:
    """What rules look at of a body: what its price depends on, or ``wholly`` all of it; None where
    it cannot be read, or ``strictly`` APIError 400 for what is unclear or too much."""
    if not strictly and is_light(body) and (decode := decoder_of(BodyMembers)):
        with contextlib.suppress(Exception):  # what msgspec cannot read, json may
            return decode(body)
    try:
        if len(body) <= AT_ONCE and body.count(b"[") + body.count(b"{") < MAX_DEPTH:
            return read_clearly(body.decode())
        return await scan(body, None if wholly else PLACES, breathe)
    except (ValueError, RecursionError) as error:
        if not strictly:
            return None
        raise APIError(400, f"{UNCLEAR} the body is not clearly readable JSON: {error}.") from None


def members_of(value: object) -> dict[str, Any]:
    """The members of a value, if it is an object. Raises APIError 400 where others may be read."""
    members = dict_of(value)
    for name in members:  # to some readers capitals are alike, and what Unicode folds to k and s
        if name.casefold() in MODEL_PLACES and name not in MODEL_PLACES:
            raise APIError(400, f"{UNCLEAR} {printable(name)!r} is not written in lower case.")
    return members


def attempts_in(params: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The fallbacks and the tools of a message. Raises APIError 400 for more than any has."""
    fallbacks = [] if params.get("fallbacks") is None else params["fallbacks"]
    tools = [tool for tool in list_of(params.get("tools")) if isinstance(tool, dict)]
    if not isinstance(fallbacks, list):  # upstream chooses them: one, which names no model
        fallbacks = [f"fallbacks: {model_of(fallbacks) or type(fallbacks).__name__}"]
    if len(fallbacks) + len(tools) > MAX_ATTEMPTS:
        raise APIError(400, f"The body has more than {MAX_ATTEMPTS:,} tools or fallbacks.")
    return fallbacks, tools


def models_in(document: object, route: Route) -> Iterator[object]:
    """The value of each place where a request may name a model (SDK: message_create_params); where
    a route is not known, whatever is called ``model`` at any depth (agent_create_params)."""
    if not route.open:
        holders = [document]
        for holder in holders:  # which grows meanwhile
            members = members_of(holder)
            holders += holder if isinstance(holder, list) else members.values()
            yield members.get("model")
        return
    rows = members_of(document).get("requests") if route.makes_batch else [{"params": document}]
    for row in list_of(rows):
        params = members_of(members_of(row).get("params"))
        fallbacks, tools = attempts_in(params)
        yield params.get("model")
        for attempt in (*fallbacks, *tools):
            yield members_of(attempt).get("model") if isinstance(attempt, dict) else attempt


MAX_NAMED = 20  # patterns that a refusal tells


async def check_models(
    models: list[str], route: Route, document: Any, breathe: Breathe, of: str = "key"
) -> None:
    """Raise APIError 403 unless every model that a body may reach is one of these patterns'."""
    checked: set[str] = set()
    for number, value in enumerate(models_in(document, route), start=1):
        if number % BREATH == 0:
            await breathe()
        if isinstance(value, dict):  # of agents: {"id": "…"}
            value = members_of(value).get("id")
        model = value if isinstance(value, str) else f"a {type(value).__name__}"
        if value is not None and model not in checked:
            checked.add(model)
            if not any(fnmatch.fnmatchcase(model, pattern) for pattern in models):
                text = f"This {of} may not use the model {model_of(model)!r}; it may use"
                allowed = printable(", ".join(models[:MAX_NAMED]))
                raise APIError(403, f"{text} {allowed}{', …' if models[MAX_NAMED:] else ''}.")


# Members that name things, and the kinds of those, wherever they stand; and words of every day, by
# what they stand in (SDK: {message,session,agent}_create_params, types/container.py of answers).
REFERENCES = {f"{kind[:-1]}_id{s}": kind for kind in KINDS if kind != "batches" for s in ("", "s")}
REFERENCES["scope_id"] = "sessions"
WORDS = {(place, "container"): "containers" for place in ("", "params", "message", "delta")}
WORDS |= {("", "agent"): "agents", ("multiagent", "agents"): "agents"}
WORDS |= {(place, "predefined_agents"): "agents" for place in ("subagents", "workflows")}
# What is the user's own in a body, and beside it the ``input`` of a tool's use.
OWN_DATA = {"text", "metadata", "input_schema", "input_examples", "schema"}
PROFILE_FIELD = "anthropic-user-profile-id"
IDENTITY_FIELDS = frozenset({ORGANIZATION_FIELD, WORKSPACE_FIELD})  # whose key it is
# What tells that such a member may be there: how names end, words, and letters that are escaped.
NAME_END = re.compile(rb'(_ids?)"(?:\s{0,900}+:|\s{900})')  # with the spaces before its colon
ESCAPED_LETTER = re.compile(rb"0(?<=\\u0)0(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])")
Named = tuple[str, list[tuple[str, str]]]  # its object's type, and the (kind, id) of each thing
NAMES = set(REFERENCES)
LONGEST_NAME, MAX_NAMES = 1000, 1000
EVERYDAY = {b'"%b"' % name.encode(): name for _, name in WORDS}
EVERYDAY_IN_MESSAGES = {b'"container"': "container"}
other_charset = functools.lru_cache(re.compile(r'(?i)charset *= *"?(?!utf-?8\b|us-ascii\b)').search)
NOT_FOUND = {"files": "File `{}` not found.", "environments": "Environment {} not found."}
NOT_FOUND |= {"skills": "Skill not found: {}", "sessions": "Session not found: {}"}
NOT_FOUND |= {"memory_stores": "memory store not found: {}"}
NOT_FOUND |= {"containers": "Container not found: {}", "batches": "Message batch {} not found"}


def not_found(kind: str, name: str) -> APIError:
    """Anthropic's 404 for a thing that does not exist, or is another's."""
    text = NOT_FOUND.get(kind) or f"{kind.removesuffix('s').replace('_', ' ')} {{}} not found"
    return APIError(404, text.replace("{}", printable(name)))


def names_in(body: bytes, start: int, words: Iterable[bytes]) -> int:
    """How many members that name things may begin in a megabyte from there on, by a look; -1
    where that does not tell: letters are escaped, zeros stand in it as in UTF-16, or many ends."""
    stop, count = start + MIB, 0
    if body.find(b"\0", start, stop) >= 0 or ESCAPED_LETTER.search(body, start, stop + 5):
        return -1
    for word in words:
        count += body.count(word, start, stop + len(word) - 1)
    for number, found in enumerate(NAME_END.finditer(body, start, stop + LONGEST_NAME)):
        if number > MAX_NAMES:
            return -1
        quote = body.rfind(b'"', max(0, found.start() - LONGEST_NAME), found.start())
        count += start <= quote < stop and body[quote + 1 : found.end(1)].decode("latin-1") in NAMES
    return count


def named_in(document: object, names: set[str], owns: bool = True) -> Iterator[Named | None]:
    """What each member of these names in a JSON value names, which is nothing in the user's own
    data (that is passed over unless it ``owns``); None where the loop may do something else."""
    holders: list[tuple[str, Any, bool]] = [("", document, False)]
    looks = 0
    for place, holder, is_own in holders:  # which grows meanwhile
        members = dict_of(holder)
        kind_of = str(members.get("type"))
        unnamed = ((None, each) for each in list_of(holder))  # it stands where its list does
        pairs: Iterable[tuple[str | None, Any]] = members.items() or unnamed
        for name, value in pairs:
            looks += 1
            if looks > BREATH:
                looks = 0
                yield None
            own = is_own or name in OWN_DATA or (name == "input" and kind_of.endswith("tool_use"))
            if value and isinstance(value, dict | list) and (owns or not own):
                holders.append((place if name is None else name, value, own))
            if name in names:
                kind = "" if own else REFERENCES.get(name) or WORDS.get((place, name), "")
                listed = value if isinstance(value, list) else [value]
                if len(listed) > MAX_ATTEMPTS:
                    raise APIError(400, f"{name!r} names more than {MAX_ATTEMPTS:,} things.")
                each = [dict_of(one).get("id", one) for one in listed if kind]
                # Of built-in skills the id is a word.
                prefix = KINDS["skills"] if (name, kind_of) == ("skill_id", "anthropic") else ""
                ids = [one for one in each if isinstance(one, str) and one.startswith(prefix)]
                yield kind_of, [(kind, one) for one in ids]


def parent_of(thing: Mapping[str, Any]) -> object:
    """The id of what made a session, a run of a deployment, or a file; None where nothing says."""
    return thing.get("deployment_id") or dict_of(thing.get("scope")).get("id")


def products_of(thing: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, id) of what a dream or a run of a deployment has made (SDK: beta_dream)."""
    if thing.get("type") in ("dream", "deployment_run"):
        outputs = map(dict_of, list_of(thing.get("outputs")))
        made = [("sessions", thing.get("session_id"))]
        made += [("memory_stores", each.get("memory_store_id")) for each in outputs]
        yield from ((kind, name) for kind, name in made if isinstance(name, str))


def is_published(thing: Mapping[str, Any]) -> bool:
    """Whether it is a skill of Anthropic's own, which is everybody's (SDK: types/skill.py)."""
    source = thing.get("source")
    return dict_of(source).get("type", source) in ("anthropic", "anthropic_example")


def moment_in(thing: Mapping[str, Any]) -> float:
    """When a thing was made: Unix seconds, the present ones where it does not say."""
    with contextlib.suppress(KeyError, ValueError, TypeError, OverflowError):
        return from_iso(thing["created_at"]).timestamp()
    return time.time()


@dataclass(slots=True)
class Order:
    """What a request asks for, as far as its price goes: all of it estimated before, at worst."""

    model: str = ""  # the first it names
    prompt: int = 0  # tokens
    max_tokens: int = MAX_OUTPUT
    thinking: int = 0  # tokens that may be thought unseen
    streams: bool = False
    fast: bool = False  # which has rate limits of its own (fast-mode)
    # By (model, fast, US): tokens of prompt and of output, web searches. Empty: `model` has it all.
    parts: dict[tuple[str, bool, bool], list[int]] = field(default_factory=dict)
    prompts: int = 1  # messages that share the prompt
    batched: bool = False
    cache: str = "input"  # the rate of what of the prompt may be written to the cache

    def add_message(self, params: Mapping[str, Any]) -> int:
        """Count in each attempt of a message (SDK: beta_*_param); how many tools and fallbacks."""
        edits = list_of(dict_of(params.get("context_management")).get("edits"))
        summed_up = params.get("compaction") is not None
        summed_up |= any(str(dict_of(edit).get("type")).startswith("compact") for edit in edits)
        name = "max_tokens" if "max_tokens" in params else "max_tokens_to_sample"  # of old clients
        most = count_of(params, name, MAX_OUTPUT)
        speed, us, searches = params.get("speed"), params.get("inference_geo") == "us", 0
        fallbacks, tools = attempts_in(params)
        # How often each attempt is made: one that sums the conversation up goes before the message.
        attempts: list[tuple[Mapping[str, Any], int]] = [(params, 1 + summed_up)]
        attempts += [(dict_of(each), 1) for each in fallbacks]
        for tool in tools:
            kind, uses = str(tool.get("type")), count_of(tool, "max_uses", MAX_USES)
            if kind.startswith("advisor"):
                attempts.append(({**tool, "speed": speed}, uses))
            elif kind.startswith("web_search"):
                searches += uses
        for attempt, times in attempts:
            model, fast = model_of(attempt.get("model")), attempt.get("speed", speed) == "fast"
            part = (model, fast, us)
            if part not in self.parts and len(self.parts) >= MAX_MODELS:
                part = ("", fast, us)
            counts = self.parts.setdefault(part, [0, 0, 0])
            counts[0] += self.prompt // self.prompts * times
            counts[1] += count_of(attempt, "max_tokens", most) * times
            if attempt is params:
                self.model, self.max_tokens = self.model or model, most
                counts[2] += searches
        self.streams, self.fast = params.get("stream") is True, speed == "fast"
        self.thinking = thinking_of(params.get("thinking"), most)
        return len(fallbacks) + len(tools)


def thinking_of(thinking: object, max_tokens: int) -> int:
    """Tokens that may be thought unseen: as many as are asked for, or a part of the answer's."""
    if not isinstance(thinking, dict) or thinking.get("type") == "disabled":
        return 0
    budget = count_of(thinking, "budget_tokens", max_tokens + 1)
    return budget if budget <= max_tokens else max_tokens // UNSEEN_THINKING


async def read_order(document: Any, body: bytes, *, batched: bool, breathe: Breathe) -> Order:
    """What a body that was read asks for. Raises APIError 400 for a batch that could not be."""
    order = Order(prompt=tokens_in(len(body)), batched=batched)
    if b'"cache_control"' in body:
        order.cache = "cache_write_1h" if b'"1h"' in body else "cache_write_5m"
    if batched and not isinstance(document, dict):
        raise APIError(400, "This key has a budget, and its batch cannot be read.")
    rows, looks = list_of(document.get("requests")) if batched else [{"params": document}], 0
    order.prompts = max(1, len(rows))
    for row in rows:
        params = row.get("params") if isinstance(row, dict) else None
        looks += 1 + (order.add_message(params) if isinstance(params, dict) else 0)
        if looks > BREATH:
            looks = 0
            await breathe()
    return order


EDGE = 4 * KIB
GLANCED_VALUE = rb'"[^"\\]*"(?=[,}\s])|\d{1,9}\b|true|\{[^{}]*\}'
GLANCED = re.compile(rb'"(model|max_tokens|stream|thinking|speed)"\s*:\s*(%b)' % GLANCED_VALUE)


def glance(body: bytes) -> Order:
    """What a look at a body's ends tells, where clients write what is short: a tenth of reading."""
    edges = body if len(body) <= 2 * EDGE else body[:EDGE] + b" " + body[-EDGE:]
    members, order = dict(GLANCED.findall(edges)), Order(prompt=tokens_in(len(body)))
    if (most := members.get(b"max_tokens", b"")).isdigit():
        order.max_tokens = int(most)
    if thinking := members.get(b"thinking"):
        order.thinking = thinking_of(read_json(thinking), order.max_tokens)
    order.model = model_of(str(members.get(b"model", b"")[1:-1], "utf-8", "replace"))
    order.streams = members.get(b"stream") == b"true"
    order.fast = members.get(b"speed") == b'"fast"'
    return order


@dataclass
class Measured:
    """What one response used, as Anthropic reports it (types/usage.py of its SDK)."""

    model: str = ""
    usage: dict[str, Any] = field(default_factory=dict)  # as it came, its counts cumulative
    stop_reason: object = ""
    empty: bool = True  # it has no content
    seen: int = 0  # bytes of text, thinking and tool input that passed
    thought: int = 0  # those of thinking
    thinks: bool = False  # a block of thinking began
    final: bool = False  # the usage is the last word on it
    blind: bool = False  # it could not be read
    beyond: Tally | None = None  # what is estimated to be charged besides the usage

    def complete_with(self, order: Order) -> None:
        """Estimate what one cut short used besides: the prompt, what was seen, unseen thinking."""
        thinking = order.thinking or self.thinks * (order.max_tokens // UNSEEN_THINKING)
        told = [tally for _, tally in charged_entries(self)]
        prompt = 0 if any(t.input_tokens or t.cached for t in told) else order.prompt
        output = tokens_in(self.seen) + (0 if self.thought else thinking)
        output -= sum(tally.output_tokens for tally in told)
        self.beyond = Tally(input_tokens=prompt, output_tokens=max(0, output))
        self.model = self.model or order.model


def measured_message(said: object, size: int) -> Measured:
    """What a whole message of so many bytes says."""
    message = dict_of(said)
    measured = Measured(model_of(message.get("model")), dict_of(message.get("usage")))
    measured.stop_reason, measured.empty = message.get("stop_reason"), not message.get("content")
    measured.final, text = bool(measured.usage), message.get("completion")
    if not measured.final:
        measured.seen = len(text.encode("utf-8", "replace")) if isinstance(text, str) else size
    return measured


def tally_of(usage: Mapping[str, Any]) -> Tally:
    """The counts of a usage object, or of an entry of its ``iterations``."""
    written = usage.get("cache_creation")
    hour = count_of(written, "ephemeral_1h_input_tokens")
    five = count_of(written, "ephemeral_5m_input_tokens")
    # Those whose length of life is not told are 5-minute ones, Anthropic's default.
    five = max(five, count_of(usage, "cache_creation_input_tokens") - hour)
    new, output = count_of(usage, "input_tokens"), count_of(usage, "output_tokens")
    return Tally(0, 0, new, output, count_of(usage, "cache_read_input_tokens"), five, hour)


def charged_entries(measured: Measured) -> list[tuple[str, Tally]]:
    """What is billed of a response, as (model, counts) of each attempt (all but the message's stand
    in ``iterations`` alone) and of what was estimated. Free are those declined before any output
    that a fallback followed, and refusals without content (PLD refusals-and-fallback)."""
    free = measured.stop_reason == "refusal" and measured.empty
    usage, model, beyond = {} if free else measured.usage, measured.model, measured.beyond
    told = list_of(usage.get("iterations"))[:MAX_ITERATIONS]
    attempts = [attempt for attempt in told if isinstance(attempt, dict)]
    entries = [(model, tally_of(usage))] if usage and not attempts else []
    for attempt, following in itertools.pairwise([*attempts, {}]):
        may_decline = attempt.get("type") in ("message", "fallback_message")
        declined = may_decline and not count_of(attempt, "output_tokens")
        if not (declined and following.get("type") == "fallback_message"):
            entries.append((model_of(attempt.get("model")) or model, tally_of(attempt)))
    if beyond is not None and len(entries) == 1 and not attempts:
        entries[0][1].add(beyond)  # one prompt, which has one length
    elif beyond is not None:
        entries.append((model, beyond))
    return entries


def rewrite_results_url(data: bytes, base_path: str) -> bytes:
    """Make ``results_url`` in batch objects a path, which SDKs join to their base URL."""
    name, origin = rb'(?<!\\)("results_url"\s*:\s*")', rb'(?:https?:(?:\\?/){2}[^/"\\]+(?=[/"\\]))?'
    base = rb'(?:%b(?=[/"]))?' % re.escape(base_path.encode()) if base_path else b""
    return re.sub(name + origin + base, rb"\1", data)


# ─── Prices ───────────────────────────────────────────────────────────────────────────────────────

# about-claude/pricing, "Data residency" and "Batch processing"; web searches are full price.
US_INFERENCE, BATCH_DISCOUNT = Decimal("1.1"), Decimal("0.5")
WEB_SEARCH_PRICE, MILLION = Decimal("0.01"), Decimal(1_000_000)
# What Anthropic's rates for the cache are of the input rate, where a price file does not say.
CACHE_PARTS = {"cache_read": "0.1", "cache_write_5m": "1.25", "cache_write_1h": "2"}


class Rates(NamedTuple):
    """USD for one token of each kind, and for one web search."""

    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    web_search: Decimal = WEB_SEARCH_PRICE


NO_RATES, TOKEN_RATES = Rates(*[ZERO] * 6), Rates._fields[:-1]
MAX_UNKNOWN = 50  # models without a price that the log names


class Prices:
    """What tokens cost, as a price file says, else the package genai-prices; a model that nobody
    knows, or that may be any, what the dearest does. `load` takes 0.3 s: call it in a thread."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.loaded = path, False
        self._own, self._unknown = dict[str, Rates](), set[str]()
        self._models, self._tiers = list[Any](), [0]  # tokens of a prompt above which rates differ
        self._found = functools.lru_cache(maxsize=1000)(self._find)
        self.reload()
        self.available = bool(self._own) or importlib.util.find_spec("genai_prices") is not None

    def reload(self) -> None:
        """Read the price file again. Raises SettingsError that says where it is wrong."""
        if self.path is not None:
            self._own = read_prices(self.path)
        self._found.cache_clear()
        self._unknown.clear()

    def load(self) -> None:
        """Import the package, if it is installed."""
        try:
            from genai_prices.data_snapshot import get_snapshot

            providers, when = get_snapshot().providers, datetime.now(UTC)
            models = next(each.models for each in providers if each.id == "anthropic")
            rates = [rate for each in models for rate in vars(each.get_prices(when)).values()]
            tiers = [tier.start for rate in rates for tier in getattr(rate, "tiers", ())]
            self._tiers, self._models = sorted({0, *tiers}), models
        except Exception as error:
            if not isinstance(error, ImportError):
                log.exception("genai-prices cannot be used")
            self.available = bool(self._own)
        self.loaded = self.available

    @property
    def names(self) -> list[str]:
        """The models that are known here."""
        if self.available and not self.loaded:
            self.load()
        return [*self._own, *(each.id for each in self._models)]

    def knows(self, pattern: str) -> bool:
        """Whether a pattern may match a model that is known here."""
        if any(fnmatch.fnmatchcase(name, pattern) for name in self.names):
            return True
        return any(each.is_match(pattern.partition("*")[0]) for each in self._models)

    def charge(self, measured: Measured, when: datetime) -> list[tuple[str, Tally]]:
        """What is billed of a response, as (model, counts and USD); see `charged_entries`."""
        entries, usage = charged_entries(measured), measured.usage
        if entries and (searches := count_of(usage.get("server_tool_use"), "web_search_requests")):
            entries.append((measured.model, Tally(web_searches=searches)))
        factor = US_INFERENCE if usage.get("inference_geo") == "us" else Decimal(1)
        factor *= BATCH_DISCOUNT if usage.get("service_tier") == "batch" else 1
        for model, tally in entries:
            read, five = tally.cache_read_tokens, tally.cache_write_5m_tokens
            hour, fast = tally.cache_write_1h_tokens, usage.get("speed") == "fast"
            rates = self.rates(model, when, tally.input_tokens + read + five + hour, fast)
            cost = rates.input * tally.input_tokens + rates.output * tally.output_tokens
            if read or five or hour:
                cost += rates.cache_read * read
                cost += rates.cache_write_5m * five + rates.cache_write_1h * hour
            tally.spend = (cost * factor + rates.web_search * tally.web_searches).normalize()
        return entries

    def worst(self, order: Order, when: datetime, bare: bool = False) -> list[tuple[str, Tally]]:
        """What a request, or its ``bare`` prompt, may cost at worst, as (model, counts and USD)."""
        parts = order.parts or {(order.model, False, False): [order.prompt, order.max_tokens, 0]}
        entries = []
        for (model, fast, us), (prompt, output, searches) in parts.items():
            if bare:
                output = searches = 0
            tally = Tally(input_tokens=prompt, output_tokens=output, web_searches=searches)
            rates = self.rates(model, when, prompt // order.prompts, fast)
            cost = max(rates.input, getattr(rates, order.cache)) * prompt + rates.output * output
            cost *= (US_INFERENCE if us else 1) * (BATCH_DISCOUNT if order.batched else 1)
            tally.spend = cost + rates.web_search * searches
            entries.append((model, tally))
        return entries

    def rates(self, model: str, when: datetime, prompt: int, fast: bool = False) -> Rates:
        """Of a model ("": any) at a moment, for a prompt of so many tokens."""
        if self.available and not self.loaded:
            self.load()
        if not self.available:
            return NO_RATES
        tier = self._tiers[max(0, bisect.bisect_left(self._tiers, prompt) - 1)]
        return self._found(model, window("1h", when)[0], fast, tier)

    def _find(self, model: str, when: datetime, fast: bool, tier: int) -> Rates:
        """What is known; of any model the dearest known one, which takes some 20 ms."""
        if not model:
            found = [self._known(each.id, when, fast, tier) for each in self._models]
            known = [*self._own.values(), *filter(None, found)]
            return max(known, key=lambda rates: rates.input + rates.output)
        if rates := self._known(model, when, fast, tier):
            return rates
        if model not in self._unknown and len(self._unknown) < MAX_UNKNOWN:
            self._unknown.add(model)
            what = "no price is known for model %r: priced as the dearest (%d of %d to be named)"
            log.warning(what, model, len(self._unknown), MAX_UNKNOWN)
        return self._found("", when, fast, tier)

    def _known(self, model: str, when: datetime, fast: bool, tier: int) -> Rates | None:
        """What the price file says, or else the package of a prompt just longer than ``tier``."""
        patterns = (p for p in self._own if fnmatch.fnmatchcase(model, p))
        if own := self._own.get(model) or self._own.get(next(patterns, "")):
            return own
        if not self._models:
            return None
        import genai_prices

        prompt, rates = tier + 1, {}
        told: Any = {"provider_id": "anthropic", "genai_request_timestamp": when}
        told["price_context"] = {"speed": "fast"} if fast else None
        for name in TOKEN_RATES:
            # ``input_tokens`` is the package's word for all of the prompt, cached or not.
            counts = {"input_tokens": prompt, f"{name}_tokens": prompt}
            counts |= {"cache_write_tokens": prompt} if "write" in name else {}
            try:
                price = genai_prices.calc_price(genai_prices.Usage(**counts), model, **told)
            except (LookupError, ValueError):
                return None
            rates[name] = (price.output_price if name == "output" else price.input_price) / prompt
        return Rates(**rates)


def read_prices(path: Path) -> dict[str, Rates]:
    """Read a price file: ``{"model or pattern": {"input": <USD a million>, …}}``; SettingsError."""
    where, prices = f"--prices: {path}", {}
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or not document:
            raise ValueError("is not an object of models")
        for model, row in document.items():
            where = f"--prices: {path}: {model}"
            if not isinstance(row, dict):
                raise TypeError("is not an object of rates")
            if unknown := row.keys() - Rates._fields:
                raise ValueError(f"{min(unknown)!r} is not one of {', '.join(Rates._fields)}")
            own = {n: AMOUNT.parse(n, value) for n, value in row.items() if value is not None}
            own = {name: own["input"] * Decimal(part) for name, part in CACHE_PARTS.items()} | own
            rates = {name: own[name] / MILLION for name in TOKEN_RATES}
            prices[model] = Rates(**rates, web_search=own.get("web_search", WEB_SEARCH_PRICE))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, APIError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else error
        raise SettingsError(f"{where}: {getattr(error, 'strerror', '') or reason}") from None
    return prices


# ─── Ledger ───────────────────────────────────────────────────────────────────────────────────────

STORE_VERSION, STORE_MODE = 1, 0o600
HASH = re.compile(r"[0-9a-f]{64}")
TOMBSTONE = timedelta(days=90)  # how long a deleted key is told apart from one that never was
WRITE_SLICE = 1000  # lines joined at a time, so that the writing thread lets the loop breathe
FLUSH_INTERVAL = 1.0  # seconds between two writes of what relaying changes
ROWS_A_TURN = 100  # of a log, that are looked at before the loop may do something else
KEYS_A_TURN = 4  # whose usage is read before the loop may do something else: 90 days are 5 ms
BUDGET_WAIT = 2  # seconds after which a request that a budget has no room for may ask again
FileMark = tuple[int, ...] | None
Contents = TypeVar("Contents")
KEYS_FRAME = (b'{"version": %d, "keys": {' % STORE_VERSION, b",\n", b"\n}}\n")
THINGS_FRAME = (b'{"version": %d}' % STORE_VERSION, b"\n", b"\n")
GATEWAY = "gateway:"  # what the whole gateway's account is kept under
EVERY_TAG = ""  # among its tags: whatever had any
MAX_AUDITED = 10_000  # changes that are remembered
UNTIDY_LINES = 1000  # of changes, beyond twice the fewest, until a file of them is written anew
Charges = Sequence[tuple[str, Tally]]  # what was used, by model
Page = tuple[int, list[str]]  # how many there are, and the names of some
written = functools.partial(shown, amount="{:f}".format)  # in the file amounts lose no digit


@dataclass(slots=True)
class Hold:
    """What a request under way holds until it is booked: of each of its ``accounts``, of which the
    key's is the first, a slot, and USD of budgets by their names. It ``pays`` unless its caller
    does; the master key's, and whoever comes in open mode, hold the whole gateway's alone."""

    accounts: Sequence[Limited]
    started: datetime
    pays: bool = True
    amounts: Sequence[dict[str, Decimal]] = ()  # of each account
    id: str = ""  # in a store that is shared
    costs: Sequence[Sequence[str]] = ()  # there: (place, window, nano-dollars)
    is_alone: bool = False  # such a store was away
    is_late: bool = False  # nor is a request of its rates drawn there yet
    call_id: str = ""


class Fullness(NamedTuple):
    """How full a budget of a record is: the ``part`` of it, and USD, spent in its window."""

    part: Decimal
    spent: Decimal
    limit: Decimal
    budget: Budget
    record: Limited


def fullness(accounts: Sequence[Limited], moment: datetime, model: str = "") -> list[Fullness]:
    """How full their budgets are, the fullest first: all, or those that are for a model."""
    found = list[Fullness]()
    for of in accounts:
        for budget in of.budgets:
            if (limit := budget.limit) is not None and budget.is_for(model):
                spent = of.spent(moment, budget)
                found.append(Fullness(spent / limit if limit else WHOLE, spent, limit, budget, of))
    return sorted(found, key=operator.attrgetter("part"), reverse=True)


class Thing(NamedTuple):
    """What stands in a workspace: its kind, whose it is (empty: nobody's), his key, if all may read
    it and refer to it, the real key it was made under, if that is known, and when (Unix)."""

    kind: str
    owner: str = ""
    key: VirtualKey | None = None
    is_shared: bool = False
    made_at: str = ""
    made: float = 0.0

    @property
    def home(self) -> str:
        """The real key that made it (empty: its owner's home)."""
        return self.made_at or (self.key and self.key.home) or ""

    def belongs_to(self, key: VirtualKey) -> bool:
        """Whether a key reaches it and all that is its own."""
        team = self.key and self.key.team_id
        mate = key.resources == "team" and team and key.team_id == team
        return key.resources == "all" or self.owner == key.owner or bool(mate)

    def is_for(self, key: VirtualKey) -> bool:
        """Whether a key may read it and refer to it."""
        return self.is_shared or self.belongs_to(key)


def counted(charges: Charges, model: str, failed: bool) -> Charges:
    """What one request used, with the request itself."""
    if not charges or charges[0][0] != model:
        charges = [(model, Tally()), *charges]
    charges[0][1].requests, charges[0][1].errors = 1, int(failed)
    return charges


def group_names(key: VirtualKey) -> list[str]:
    """What its team and its user are kept under."""
    named = {"team": key.team_id, "user": key.user_id}
    return [f"{kind}:{name}" for kind, name in named.items() if name]


def store_line(name: str, record: Limited, today: str = "", keep_from: str = "") -> bytes:
    """One line of keys.json; usage of days before ``keep_from`` is left out."""
    line = json.dumps(record.to_json(), default=written)
    usage = record.account.usage.to_json(today, keep_from)
    if usage != "{}":
        line = f'{line[:-1]}{", " if len(line) > 2 else ""}"usage": {usage}}}'
    return f"{json.dumps(name)}: {line}".encode()


def parse_store(text: bytes, name: str) -> dict[str, Limited]:
    """Read a keys file: keys by their hashes, teams and users as "team:<id>" and "user:<id>", the
    gateway as GATEWAY. Raises SettingsError that says what is damaged."""
    records = dict[str, Limited]()
    wrong = "not JSON: "
    try:
        document = json.loads(text)
        wrong = f'not {{"version": {STORE_VERSION}, "keys": {{…}}}}: '
        if (version := exactly(dict, document)["version"]) != STORE_VERSION:
            raise ValueError(f"version {version!r} is not for this gateway")
        for number, (at, record) in enumerate(document["keys"].items(), start=1):
            wrong = f"key number {number} "
            kind: type[Limited] = VirtualKey
            if not HASH.fullmatch(at):
                kind = Limited if at == GATEWAY else GROUPS.get(at.partition(":")[0], VirtualKey)
                if kind is VirtualKey:
                    raise ValueError("does not stand under a SHA-256")
            records[at] = kind.from_json(record)
            records[at].account.hashed = at
            if kind.of in GROUPS and at != f"{kind.of}:{getattr(records[at], f'{kind.of}_id')}":
                raise ValueError("stands under the name of another")
    except Exception as error:  # noqa: BLE001 - whatever Python says of what it cannot read
        raise SettingsError(f"{name}: damaged, {wrong}{error}; mend it or restore a copy") from None
    return records


def mark_of(file: Path | int) -> FileMark:
    """Device, inode, size and time of change (ns) tell an edited file; None where there is none."""
    with contextlib.suppress(OSError):
        seen = os.stat(file)
        return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns
    return None


@dataclass(eq=False)
class StoreFile:
    """A file of lines, at no link, whole at all times, and nobody else's while this object lives.
    ``frame`` is what stands before, between and behind them."""

    path: Path
    frame: tuple[bytes, bytes, bytes]
    what: str  # it is, as errors say
    then: str  # if it cannot be written
    error: str = ""  # the last, until it is written again
    _mark: FileMark = None
    _lock: int = -1

    def read(self, parse: Callable[[bytes, str], Contents], lines: list[bytes]) -> Contents:
        """What is in the file (``parse`` gets its bytes and name), which is ours from then on; else
        it is made of these lines. Raises SettingsError, and OSError where none can be made."""
        while True:
            try:
                while self._lock < 0 or not os.path.samefile(self.path, self._lock):
                    self.close()
                    self._lock = os.open(self.path, os.O_RDONLY)
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mark = mark_of(self._lock)  # an edit while it is read is another
                contents, self._mark = parse(self.path.read_bytes(), str(self.path)), mark
                return contents
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another gateway was faster
                    self.write(lines)
            except OSError as error:
                self.close()
                used = "another gateway uses this file; give this one its own with --keys"
                wrong = used if isinstance(error, BlockingIOError) else error.strerror
                raise SettingsError(f"{self.path}: {wrong}") from None
            finally:
                if self._mark is None:
                    self.close()

    def write(self, lines: list[bytes]) -> None:
        """Write, fsync, lock, rename, fsync its folder. Raises OSError; FileExistsError: edited."""
        temporary = self.path.parent / f".{self.path.name}.{os.getpid()}.tmp"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, STORE_MODE)
        before, between, behind = self.frame
        try:
            os.fchmod(descriptor, STORE_MODE)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(before)
                for start in range(0, len(lines), WRITE_SLICE):
                    file.write(b"\n" if start == 0 else between)
                    file.write(between.join(lines[start : start + WRITE_SLICE]))
                file.write(behind)
            os.fsync(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mark = mark_of(descriptor)  # an edit once it has its name is another
            self._refuse_edit()
            os.replace(temporary, self.path)
        except BaseException:
            os.close(descriptor)
            os.unlink(temporary)
            raise
        self.close()
        self._lock, self._mark = descriptor, mark
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._recover()

    def append(self, lines: list[bytes]) -> None:
        """Add lines and fsync, or leave the file as it was. Raises OSError as `write` does."""
        self._refuse_edit()
        with open(self.path, "ab", buffering=0) as file:
            try:
                append_whole(file, b"".join(line + b"\n" for line in lines))
            finally:
                self._mark = mark_of(file.fileno())
        self._recover()

    def edit(self) -> FileMark:
        """The file's mark, where it is not the one that was last read or written."""
        mark = mark_of(self.path)
        return None if mark == self._mark else mark

    def _refuse_edit(self) -> None:
        if self.edit() is not None:
            raise FileExistsError(errno.EEXIST, "it was edited; mend it, or send this again")

    def _recover(self) -> None:
        if self.error:
            log.warning("%s written again", self.what)
        self.error = ""

    def close(self) -> None:
        """Give up the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def append_whole(file: io.FileIO, data: bytes) -> None:
    """Write behind what a file has, and fsync, or leave it as it was."""
    size = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(size)
        raise


class Things:
    """Whose the things of a workspace are, as a file of changes tells it, one a line; the last word
    counts:

        {"key": "<owner_id>", "kind": "files", "home": "<real key>", "made": {"file_…": 1764194000}}
        {"gone": ["file_…"]}
        {"shared": ["file_…"]}   until it is made or gone again
    """

    def __init__(self) -> None:
        self.places: dict[str, tuple[str, str, str]] = {}  # by id: (owner, kind, home)
        # By (owner, kind): ids, and when they were made (Unix).
        self.made = collections.defaultdict[tuple[str, str], dict[str, float]](dict)
        self.shared: set[str] = set()
        self.is_untidy = False  # its file is to be written anew before anything is added to it

    def change(self, change: Mapping[str, Any]) -> None:
        """Take one in. Raises whatever Python does for what is none."""
        if (made := change.get("made")) is not None:
            math.fsum(made.values())  # raises for what is no number
            self._drop(made.keys() & self.places.keys())
            owner, kind = exactly(str, change["key"]), exactly(str, change["kind"])
            self.made[owner, kind].update(made)
            place = owner, kind, exactly(str, change.get("home", ""))
            self.places.update(dict.fromkeys(made, place))
        elif "gone" in change:
            self._drop(change["gone"])
        else:
            self.shared.update(self.places.keys() & change["shared"])

    def _drop(self, names: Iterable[str]) -> None:
        self.shared.difference_update(names)
        for name in names:
            if place := self.places.pop(name, None):
                del self.made[place[:2]][name]

    def lines(self) -> list[bytes]:
        """The fewest changes that say all of it."""
        alike = collections.defaultdict[tuple[str, str, str], dict[str, float]](dict)
        for name, place in self.places.items():
            alike[place][name] = self.made[place[:2]][name]
        changes: list[dict[str, Any]] = [
            {"key": owner, "kind": kind, "home": home, "made": made}
            for (owner, kind, home), made in alike.items()
        ]
        changes += [{"shared": sorted(self.shared)}] if self.shared else []
        return [json.dumps(change).encode() for change in changes]


def parse_things(text: bytes, name: str, running: bool = False) -> Things:
    """Read a file of things; a crash may have cut the last line off, before anybody was told of it,
    but not of a ``running`` gateway. Raises SettingsError that says what is damaged."""
    things, where = Things(), "its first line: "
    try:
        first, *lines, cut = text.split(b"\n")
        if json.loads(first) != {"version": STORE_VERSION}:
            raise ValueError("is not of a version for this gateway")
        for number, line in enumerate(lines, start=2):
            where = f"line {number}: "
            things.change(exactly(dict, read_json(line, Any)))
        where = "the last line: "
        if cut and (running or read_json(cut)):
            things.change(exactly(dict, read_json(cut, Any)))
    except Exception as error:  # noqa: BLE001 - whatever Python says of what it cannot read
        raise SettingsError(f"{name}: damaged, {where}{error}; mend it or restore a copy") from None
    things.is_untidy = bool(cut) or len(lines) > 2 * len(things.made) + UNTIDY_LINES
    return things


ALERTED = ("key_alias", "key_name", "team_alias", "user_email", "user_id", "team_id")
ALERT_GROUPS = {"gateway": "proxy"}  # LiteLLM's word
WHOSE_BUDGET = {"key": "Budget", "team": "Team's budget", "user": "User's budget"}
WHOSE_BUDGET["gateway"] = "The gateway's budget"
Tell = Callable[..., None]  # of the operator, at once: (LiteLLM's event, text, matter=, details)


def tell_nobody(*_: Any, **__: Any) -> None:
    """As `Tell`, where there is no operator."""


class Ledger:
    """What `FileLedger` and others share: the keys, ``groups`` (teams, users and, as GATEWAY, the
    whole gateway with ``limits`` of its own), and what they used, in memory. Nothing else changes
    an account. What is awaited may wait for a store; where nothing must, no task and no future is
    made. It will ``tell`` which ``parts`` of a budget are passed."""

    count = 0  # of the keys that were made, also those that are deleted
    leases = False  # what is held goes by itself where its process dies
    lost = False  # the store is empty, or another one
    away = doubt = ""  # why the store does not answer, and what is less than sure of it
    each: Callable[..., AsyncIterator[Any]]

    def __init__(
        self,
        usage_days: int = 90,
        clock: Callable[[], float] = time.monotonic,
        limits: Limited | None = None,
    ) -> None:
        self._usage_days, self._clock = usage_days, clock
        self.parts, self.tell = [WHOLE], tell_nobody
        self.keys: dict[str, VirtualKey] = {}
        self.groups: dict[str, Limited] = {GATEWAY: limits or Limited()}
        self.groups[GATEWAY].account.hashed = GATEWAY
        self.batches: dict[str, Account] = {}  # whose they are
        self._retired: dict[str, str] = {}  # and what is no more, which the record tells
        self._touched: set[str] = set()  # what was used since it was written
        self._kept: dict[str, tuple[str, float]] = {}
        self._logs: dict[str, collections.deque[bytes]] = {}

    def _judged(self, record: VirtualKey, hashed: str) -> tuple[VirtualKey, str] | None:
        """What `find_hash` says of a record that was found by a hash."""
        moment, until = now(), record.retired.get(hashed)
        if hashed != record.account.hashed and (until is None or moment >= until):
            return (record, "expired") if until else None
        status = record.status(moment)
        if status == "active":
            blocked = (of for of in self.limited(record) if of.blocked)
            status = next((f"its {of.of}" for of in blocked), status)
        return record, status

    def record(self, name: str) -> Limited | None:
        """What is kept under a name."""
        return self.keys.get(name) or self.groups.get(name)

    def limited(self, key: VirtualKey | None) -> Sequence[Limited]:
        """Whose limits its requests are held against: its own, its team's, its user's, and the
        gateway's, where these have records and the gateway limits. Without a key, the last."""
        whole, groups = self.groups[GATEWAY], list[Limited]()
        if key and len(self.groups) > 1:
            groups = [self.groups[name] for name in group_names(key) if name in self.groups]
        found = [key, *groups] if key else groups
        return [*found, whole] if whole.has_budget else found

    async def live(self, **named: str) -> list[VirtualKey]:
        """The keys of `each` that are not deleted."""
        return [key async for key in self.each(**named) if not key.deleted_at]

    async def keep(self, name: str, value: str, seconds: float, most: int = 0) -> bool:
        """Remember a word for some seconds, for all who share the store, where it is not there: is
        it new? Of those with one value there may be so many; the oldest goes."""
        self._kept = {n: row for n, row in self._kept.items() if row[1] > self._clock()}
        if name in self._kept:
            return False
        alike = [other for other, row in self._kept.items() if row[0] == value]
        for old in alike[: 1 - most] if most else ():
            del self._kept[old]
        self._kept[name] = value, self._clock() + seconds
        return True

    async def recall(self, name: str) -> str:
        """What is remembered under a name; else empty."""
        value, end = self._kept.get(name, ("", 0.0))
        return value if end > self._clock() else ""

    async def drop(self, name: str) -> None:
        """Remember it no more."""
        self._kept.pop(name, None)

    def log(self, name: str, most: int, rows: Iterable[bytes]) -> None:
        """Add rows to a log, which keeps the last ``most``, for all who share the store."""
        self._logs.setdefault(name, collections.deque(maxlen=most)).extend(rows)

    async def logged(self, name: str) -> AsyncIterator[bytes]:
        """Its rows, the newest first."""
        for number, row in enumerate([*self._logs.get(name, ())][::-1]):
            if number % ROWS_A_TURN == 0:
                await asyncio.sleep(0)
            yield row

    async def admit(self, hold: Hold, *, pays: bool, shares: bool, later: bool = False) -> None:
        """Take a slot and one request of the key's rates; where it ``pays``, its budget must have
        room, beside what others hold where it ``shares`` it. Else raise APIError 429. A store may
        leave what it does itself to `hold`, which follows ``later``."""
        clock, moment = self._clock(), now()  # not when it began: an earlier window is over
        for of in hold.accounts:
            account, most, refused, wait = of.account, of.max_parallel_requests, "", 1.0
            if most is not None and account.running >= most:
                refused = f"{most} requests at a time"
            for kind, bucket in account.buckets.items():
                if not refused and (wait := bucket.seconds_until(1, clock)) > 0:
                    refused = f"{bucket.limit:,} {kind} a minute"
            if refused:
                self._refuse_rate(hold.accounts, of, refused, wait)
            for budget in self._budgets(of) if pays else ():
                if not budget.pattern:
                    check_budget(of, budget, ZERO, moment, shares=shares, fit=True)
        for of in hold.accounts:
            of.account.running += 1
            if "requests" in of.account.buckets:
                of.account.buckets["requests"].draw(1, clock)

    def _budgets(self, of: Limited) -> Iterable[Budget]:
        """Those that hold now; a store that is away leaves each process a part."""
        return of.budgets

    def _refuse_rate(self, whose: Sequence[Limited], of: Limited, what: str, wait: float) -> None:
        """Raise APIError 429: one of the accounts has had as many as it may for some seconds."""
        seconds = min(60, max(1, math.ceil(wait)))  # for longer Claude Code would end the turn
        text = f"This {of.of} is limited to {what}. Try again in {seconds} seconds."
        headers = [("retry-after", str(seconds)), *self.rates(whose, {})]  # RFC 9110, 10.2.3
        raise APIError(429, text, headers=headers)

    async def hold(self, hold: Hold, worst: Charges, prompt: Charges = (), *, fit: bool) -> None:
        """Hold what a request may cost of all budgets that it falls under; all of it must ``fit``,
        or else only a part. Else raise APIError 429 and hold nothing. With `leases` what its
        ``prompt`` alone costs is booked if this process dies."""
        held, moment = list[dict[str, Decimal]](), now()
        for of in hold.accounts:
            held.append(amounts := {})
            for budget in self._budgets(of):
                costs = [tally.spend for name, tally in worst if budget.is_for(name)]
                if costs:
                    amounts[budget.name] = cost = sum(costs, ZERO)
                    fits = fit or not cost
                    check_budget(of, budget, cost, moment, shares=True, fit=fits)
        for of, amounts in zip(hold.accounts, held, strict=True):
            for name, cost in amounts.items():
                of.account.windows[name].held += cost
        hold.amounts = held

    def book(
        self, hold: Hold, charges: Charges, *, model: str, failed: bool, tags: Sequence[str] = ()
    ) -> None:
        """Give back what a request held; count it and what it used, once, and under its tags."""
        self._release(hold)
        if hold.pays and hold.accounts:
            for of in hold.accounts:
                of.account.last_active = now()
            self.charge(hold.accounts, counted(charges, model, failed), hold.started, tags)

    def _release(self, hold: Hold) -> None:
        for of in hold.accounts:
            of.account.running -= 1
        for of, amounts in zip(hold.accounts, hold.amounts, strict=False):
            for name, amount in amounts.items():
                of.account.windows[name].held -= amount

    def charge(
        self, accounts: Sequence[Limited], charges: Charges, moment: datetime, tags: Sequence[str]
    ) -> None:
        """Count what was used to these accounts, by the newest records of those that are not gone;
        a key's by day and model, and under its ``tags``."""
        present, day = now(), day_of(moment)
        for each in accounts:
            account = each.account
            if (of := self.record(account.hashed)) is None:
                continue
            bucket, is_key = account.buckets.get("tokens"), of.of == "key"
            for model, tally in charges:
                if is_key:
                    account.usage.of(day, model or NO_MODEL).add(tally)
                for budget in of.budgets if tally.spend else ():
                    if budget.is_for(model):
                        before = of.spent(present, budget)  # a window that is over ends
                        account.windows[budget.name].spend = after = before + tally.spend
                        self._warn(of, budget, before, after)
                if bucket is not None:
                    spent = tally.input_tokens + tally.written + tally.output_tokens
                    bucket.draw(spent, self._clock())
                if is_key and (named := {*tags} - {EVERY_TAG}):
                    for tag in (EVERY_TAG, *named):  # it is never one too many
                        self.groups[GATEWAY].account.usage.of(day, tag).add(tally)
                    self._touched.add(GATEWAY)
            self._touched.add(account.hashed)

    def _warn(self, of: Limited, budget: Budget, before: Decimal, after: Decimal) -> None:
        """Tell which marks of a budget are passed: once, whoever counts."""
        limit, soft = budget.limit, None if budget.name else of.soft_budget
        if (limit is None or after < limit * self.parts[0]) and (soft is None or after < soft):
            return
        marks = [(limit * part, part) for part in self.parts] if limit is not None else []
        marks += [(soft, ZERO)] if soft is not None else []
        told = {name: getattr(of, name, None) for name in ALERTED} | {"spend": after}
        told |= {"event_group": ALERT_GROUPS.get(of.of, of.of), "soft_budget": of.soft_budget}
        told |= {"alert_type": "budget_alerts", "max_budget": limit}
        for mark, part in marks:
            if mark > after or (before and mark <= before):
                continue
            event = "threshold_crossed" if part < 1 else "budget_crossed"
            what = f"{part:.0%} of its budget{f' for {budget.pattern}' if budget.pattern else ''}"
            if part == ZERO:
                event, what = "soft_budget_crossed", "its soft budget"
            text = f"{of.of} {of.shown_name} has spent ${dollars(after)}, {what} is"
            log.warning(text := f"{text} ${dollars(mark)}")
            matter = f"{of.account.hashed} {budget.name} {part} {mark}"
            self.tell(event, text, matter=matter, **told)

    def rates(
        self, accounts: Sequence[Limited], theirs: Mapping[str, Sequence[str]]
    ) -> list[tuple[str, str]]:
        """anthropic-ratelimit-* of the tightest of these limits, where it is so than ``theirs``."""
        fields, clock, tightest = [], self._clock(), dict[str, Bucket]()
        for kind, bucket in itertools.chain(*(of.account.buckets.items() for of in accounts)):
            if kind not in tightest or bucket.level(clock) < tightest[kind].level(clock):
                tightest[kind] = bucket
        for kind, bucket in tightest.items():
            name, left = f"anthropic-ratelimit-{kind}-", max(0, math.floor(bucket.level(clock)))
            told = theirs.get(f"{name}remaining", ("",))[0]
            if not (told.isascii() and told.isdigit() and float(told) <= left):
                wait = math.ceil(bucket.seconds_until(bucket.limit, clock))
                fields += [(f"{name}limit", str(bucket.limit)), (f"{name}remaining", str(left))]
                fields.append((f"{name}reset", iso(now() + timedelta(seconds=wait))))
        return fields

    def _fit_buckets(self, of: Limited) -> None:
        """Let the buckets of an account be those of its record; what was drawn stays drawn."""
        buckets = of.account.buckets
        for kind, limit in (("requests", of.rpm_limit), ("tokens", of.tpm_limit)):
            bucket = buckets.pop(kind, None) or Bucket(0, self._clock())
            if limit is not None:
                bucket.limit, buckets[kind] = limit, bucket


class FileLedger(Ledger):
    """Keeps all in a `StoreFile`, and whose things are in another, in ".resources" beside it. Keys
    that were used before there were homes get this ``home``. Raises SettingsError where a file
    cannot be used, and leaves it as it is."""

    def __init__(self, path: Path, home: str = "", **shared: Any) -> None:
        super().__init__(**shared)
        path, then = Path(os.path.realpath(path)), "what was made is there, and written later"
        beside = Path(os.path.realpath(f"{path}.resources"))
        self._file = StoreFile(path, KEYS_FRAME, "keys file", "nothing was changed")
        self._things_file = StoreFile(beside, THINGS_FRAME, "file of resources", then)
        self._home, self.things = home, Things()
        self._lines: dict[str, bytes] = {}
        self._undo: dict[str, Limited | None] = {}  # what changed since, as it was before
        self._changes: list[Mapping[str, Any]] = []  # of things
        self._owners: dict[str, str] = {}  # the hashes of keys by what their things are kept under
        self._writing: asyncio.Task[APIError | None] | None = None  # is under way …
        self._next: asyncio.Task[APIError | None] | None = None  # … and what waits for its end
        self._adding = asyncio.Lock()  # changes of things
        self._noticed: tuple[FileMark, ...] = ()  # the last edits that were read, or could not be
        try:
            self._load(is_first=True)
        except SettingsError:
            self._file.close()
            raise

    async def open(self) -> None:
        """Called before requests are taken; the files are read already."""

    def trouble(self) -> str:
        """Why the last write failed, or the next one would; empty where all is well."""
        unwritable = "" if os.access(self._file.path.parent, os.W_OK) else "It cannot be written."
        return self._file.error or self._things_file.error or unwritable

    # Who it is, and what there is

    async def find_hash(self, hashed: str) -> tuple[VirtualKey, str] | None:
        """A key and its `VirtualKey.status`; by an old hash ``expired`` once its grace is over."""
        record = self.keys.get(hashed) or self.keys.get(self._retired.get(hashed, ""))
        return self._judged(record, hashed) if record else None

    async def knows(self, hashes: Iterable[str]) -> bool:
        """Whether one of these is a key here."""
        return any([await self.find_hash(each) for each in hashes])

    async def find(self, by: str, name: str, *, former: bool = False) -> Any:
        """The record, or None, that is not deleted and that a field names: ``key`` (plain or hash,
        also a ``former`` one until its grace is over), ``key_alias``, ``team_id``, ``user_id``."""
        if by == "key_alias":
            alike = (key for key in self.keys.values() if key.key_alias == name)
            return next((key for key in alike if not key.deleted_at), None)
        if by != "key":
            return self.groups.get(f"{by.removesuffix('_id')}:{name}")
        hashed = name if HASH.fullmatch(name) else hash_key(name)
        key = self.keys.get(hashed)
        if key is None and former and (found := self.keys.get(self._retired.get(hashed, ""))):
            key = found if found.retired.get(hashed, EPOCH) > now() else None
        return None if key is None or key.deleted_at else key

    async def each(
        self, kind: str = "key", *, days: tuple[str, str] | None = None, **named: str
    ) -> AsyncIterator[Any]:
        """Every record of a kind, oldest first, keys that are deleted too; or those of a team_id or
        user_id. What was used may be there for these ``days`` only, the first and the last; where
        there are some, the loop does something else in between."""
        records: Iterable[Any] = self.keys.values() if kind == "key" else self.groups.values()
        for number, record in enumerate([*records]):
            if days and number % KEYS_A_TURN == 0:
                await asyncio.sleep(0)
            if record.of == kind and all(getattr(record, at) == name for at, name in named.items()):
                yield record

    async def whole(self, days: tuple[str, str]) -> Limited:
        """The gateway, with what was used on these days, in the place of a model by tag."""
        return self.groups[GATEWAY]

    # Batches and things

    async def unbooked(self, name: str) -> Batch | None:
        """The batch of that name, where results of it are still to be booked to a key."""
        batch = self.batches[name].batches[name] if name in self.batches else None
        return None if batch is None or batch.booked else batch

    async def watched(self) -> list[str]:
        """The batches whose results are to be booked."""
        return [name for name, of in self.batches.items() if not of.batches[name].booked]

    async def take(self, name: str) -> bool:
        """Whether it is this process that looks at a batch now, until it does `leave`."""
        return True

    async def leave(self, name: str) -> None:
        """As `take` says."""

    def own_batch(self, account: Account, name: str, hold: Hold) -> None:
        """A key made a batch: what is held for it stays until it is booked."""
        self.finish_batch(name)  # an upstream that gives an id twice frees what was held for it
        held, *rest = hold.amounts or [{}]
        names = [of.account.hashed for of in hold.accounts[1:]]
        beside = dict(zip(names, rest, strict=False))
        account.batches[name] = Batch(day_of(now()), held=held, beside=beside)
        self.batches[name], hold.amounts = account, ()
        self._touched.add(account.hashed)

    def book_line(self, name: str, line: int, charges: Charges) -> VirtualKey | None:
        """Book a line of a batch's results to the key that made it, once: that is returned then."""
        account = self.batches.get(name)
        if account is None or line <= account.batches[name].lines:
            return None
        account.batches[name].lines = line
        if key := self.keys.get(account.hashed):
            self.charge(self.limited(key), charges, now(), key.tags)
        return key

    def finish_batch(self, name: str, *, lost: bool = False) -> None:
        """All results of a batch are booked; where they are ``lost``, what is held for it is."""
        account, moment = self.batches.get(name), now()
        if account is None or (batch := account.batches[name]).booked:
            return
        held, batch.held, batch.booked = {account.hashed: batch.held, **batch.beside}, {}, True
        batch.beside, total = {}, max([*held[account.hashed].values(), ZERO])
        for at, amounts in held.items():
            if (of := self.record(at)) is None:
                continue
            windows = of.account.windows
            for budget, amount in amounts.items():  # a team may have been made anew
                windows[budget].held = max(ZERO, windows[budget].held - amount)
            for each in of.budgets if lost else ():
                windows[each.name].spend = of.spent(moment, each) + amounts.get(each.name, ZERO)
            self._touched.add(at)
        if lost and total and (key := self.keys.get(account.hashed)):
            told = key.shown_name, printable(name)
            log.warning("key %s: batch %s is gone, so its worst case is booked", *told)
            account.usage.of(day_of(moment), NO_MODEL).add(Tally(spend=total))

    async def find_things(self, names: Iterable[object]) -> dict[str, Thing]:
        """Of these ids those that are known here."""
        found, places, shared = dict[str, Thing](), self.things.places, self.things.shared
        for name in names:
            if isinstance(name, str) and (place := places.get(name)):
                owner, kind, home = place
                key, made = self.keys.get(self._owners.get(owner, "")), self.things.made[place[:2]]
                found[name] = Thing(kind, owner, key, name in shared, home, made[name])
        return found

    async def reached(self, key: VirtualKey, kind: str) -> dict[str, float]:
        """The ids of a kind that a key reaches, shared ones too; and when each was made (Unix)."""
        made, things, team = dict[str, float](), self.things, key.team_id
        places = [(key.owner, kind)]
        if team and key.resources == "team":
            places = [(mate.owner, kind) for mate in self.keys.values() if mate.team_id == team]
        for place in places:
            made |= things.made.get(place, {})
        shared = [name for name in things.shared if things.places[name][1] == kind]
        return made | {name: things.made[things.places[name][:2]][name] for name in shared}

    async def own(self, born: Mapping[tuple[str, str], Mapping[str, float]], home: str) -> None:
        """Remember durably whose things are: by (owner, kind) their ids, and when they were made;
        what has an owner keeps him. Raises APIError 503, and tries it again each second."""
        for (owner, kind), made in born.items():
            if fresh := {name: made[name] for name in made if name not in self.things.places}:
                self._change({"key": owner, "kind": kind, "home": home, "made": fresh})
        await asyncio.shield(self._add())

    async def assign(self, kinds: Mapping[str, str], owner: str | None) -> None:
        """Give things (id: kind) to an owner ("": nobody) or all (None), or raise APIError 503."""
        places, moment, changes = self.things.places, now().timestamp(), list[dict[str, Any]]()
        for name in reversed(list(kinds)):  # lists begin with the newest
            before, of, home = places.get(name, ("", "", ""))
            since = self.things.made[before, of][name] if name in places else moment
            if owner is not None or name not in places:
                place = {"key": owner or "", "kind": kinds[name], "home": home}
                changes.append(place | {"made": {name: since}})
        changes += [{"shared": list(kinds)}] if owner is None else []
        await asyncio.shield(self._add(changes))

    async def list_things(self, owner: str | None, kind: str, first: int, most: int) -> Page:
        """How many are an owner's (None: anybody's) and of a kind (empty: any), and at most so many
        of them, from the ``first`` (0) on."""
        every = self.things.made.items()
        chosen = [made for (of, at), made in every if owner in (None, of) and kind in ("", at)]
        names = itertools.islice(itertools.chain(*chosen), first, first + most)
        return sum(map(len, chosen)), [*names]

    def forget(self, name: str, owner: str | None) -> None:
        """A thing is no more, if it is this owner's (None: anybody's)."""
        if (place := self.things.places.get(name)) and owner in (None, place[0]):
            self._change({"gone": [name]})

    def _change(self, change: Mapping[str, Any]) -> None:
        self.things.change(change)
        self._changes.append(change)

    async def _add(self, changes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write what is not written of things, and changes that hold then. Raises APIError 503."""
        async with self._adding:
            file = self._things_file
            try:
                waiting = list(self._changes)
                if waiting or changes:
                    self._load_things(self.keys.values())  # where it was edited
                if self.things.is_untidy or not file.path.exists():
                    await asyncio.to_thread(file.write, self.things.lines())
                    self.things.is_untidy = False
                if lines := [json.dumps(change).encode() for change in (*waiting, *changes)]:
                    await asyncio.to_thread(file.append, lines)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                raise self._fail(error, file, DO_NOT_RETRY) from None
            del self._changes[: len(waiting)]
            for change in changes:
                self.things.change(change)

    # Changing

    # Within it nobody else changes anything between what is looked at and what is changed: nothing
    # is awaited there, so that changes at one time are one write.
    changing = contextlib.nullcontext

    async def settle(self, key: VirtualKey, home: str) -> None:
        """Remember the home of a key that has none, as what relaying changes is: that of others of
        its team, where it reaches their things, or else this."""
        team, newest = key.team_id, self.keys.get(key.account.hashed, key)
        if team and key.resources == "team":
            mates = (of for of in self.keys.values() if of.team_id == team and not of.deleted_at)
            home = next((of.home for of in mates if of.home), home)
        key.home = newest.home = newest.home or home
        self._touched.add(key.account.hashed)

    async def change(self, changes: Mapping[str, Limited | None]) -> None:
        """Put these records (None removes one), as `save` does; what fails is taken back."""
        for name in changes:
            self._undo.setdefault(name, self.record(name))
        self._apply(changes)  # in memory at once
        await self.save()

    async def reset_spend(self, record: Limited, amount: Decimal) -> None:
        """Set what it has spent in its present window, as `change` does."""
        window = record.account.windows[ALL_MODELS]
        less = record.spent(now()) - amount
        start, window.spend = window.start, amount
        self._touched.add(record.account.hashed)
        try:
            await self.save()
        except APIError:
            window.spend += less if window.start == start else 0
            raise

    def _apply(self, changes: Mapping[str, Limited | None]) -> None:
        for name, record in changes.items():
            if record is None:
                for index in (self.keys, self.groups, self._lines):
                    index.pop(name, None)
                continue
            account = record.account
            self._lines[name], account.hashed = self._line(name, record), name
            if isinstance(record, VirtualKey):
                self.keys[name], self._owners[record.owner] = record, name
                self._retired.update(dict.fromkeys(record.retired, name))
            else:
                self.groups[name] = record
            self._fit_buckets(record)
            self.batches.update(dict.fromkeys(account.batches, account))
        self.count = len(self.keys)

    def _line(self, hashed: str, record: Limited) -> bytes:
        moment, batches = now(), record.account.batches
        oldest = day_of(moment - timedelta(days=self._usage_days))
        for name in [n for n, b in batches.items() if b.booked and b.day < oldest]:
            del batches[name]
            self.batches.pop(name, None)
        return store_line(hashed, record, day_of(moment), oldest)

    # Reading and writing

    async def reload(self) -> None:
        """Read anew what keys may do. Where it raises SettingsError or APIError, all stays."""
        # A change that is being written would be read over; and where the last write failed, the
        # file may have one that was refused, since it was not known to be on disk.
        async with self._adding:
            while self._writing or self._next or (self._file.error and self._file.edit() is None):
                await self.save()
            self._load()

    def notice_edit(self) -> None:
        """Take in an edit; one that does not parse is said once, and never written over."""
        edits = self._file.edit(), self._things_file.edit()
        is_writing = self._writing or self._next or self._adding.locked()  # and looks by itself
        if is_writing or not any(edits) or edits == self._noticed:
            return
        self._noticed = edits
        try:
            self._load()
            log.info("keys file was edited: read again, %d keys", len(self.keys))
        except Exception as error:  # noqa: BLE001 - whatever it is, what keys use is still written
            log.error("keys file was edited, and cannot be read: %s", error)

    def _load(self, is_first: bool = False) -> None:
        """What keys may do is the file's; what they used is memory's, where it is known."""
        try:
            records = self._file.read(parse_store, list(self._lines.values()))
        except OSError as error:
            self._fail(error, self._file)
            return
        keys = {n: record for n, record in records.items() if isinstance(record, VirtualKey)}
        self._load_things(keys.values())
        whole = self.groups[GATEWAY]
        known: dict[str, Limited] = {} if is_first else {**self.keys, **self.groups}
        for index in (self.keys, self._lines, self._retired, self.batches, self._owners):
            index.clear()
        heritage = {owner for (owner, _), made in self.things.made.items() if made}
        forgotten = now() - TOMBSTONE
        for hashed, key in keys.items():
            key.home = key.home or getattr(known.get(hashed), "home", None)
            if is_first and key.account.last_active and not key.home:
                key.home = self._home
                self._touched.add(hashed)
            gone = key.deleted_at is not None and key.deleted_at < forgotten
            if gone and not (key.team_id and key.owner in heritage):
                del records[hashed]
        for name in known.keys() & records.keys():
            records[name].account = known[name].account
        told = records.pop(GATEWAY, None)
        whole.account = told.account if told else whole.account
        self.groups = {GATEWAY: whole}
        self._apply(records | ({GATEWAY: whole} if told else {}))
        every = known | records
        for name in known.keys() ^ records.keys():  # their batches are held of all, or no more
            sign = 1 if name in records else -1
            for batch in every[name].account.batches.values():
                for at in batch.beside.keys() & self.groups.keys():
                    for budget, amount in batch.beside[at].items():
                        self.groups[at].account.windows[budget].held += sign * amount
        self._touched |= known.keys() & records.keys()

    def _load_things(self, keys: Iterable[VirtualKey]) -> None:
        file = self._things_file
        if not (self.things.places or file.path.exists()):
            # Version 1.0 kept batches' owners with the keys.
            for key in keys:
                made = {n: from_iso(b.day).timestamp() for n, b in key.account.batches.items()}
                self.things.change({"key": key.owner, "kind": "batches", "made": made})
        elif file.edit() is None:
            return
        try:
            parse = functools.partial(parse_things, running=bool(self._owners))
            self.things = things = file.read(parse, self.things.lines())
            for change in self._changes:
                things.change(change)
            if things.is_untidy:
                file.write(things.lines())
                things.is_untidy = False
        except OSError as error:
            self._fail(error, file)

    async def save(self) -> None:
        """Make all that was changed before this call durable. Raises APIError 503."""
        if self._next is None:
            self._next = asyncio.create_task(self._write(self._writing))
        if failure := await asyncio.shield(self._next):
            raise failure

    async def run(self) -> None:
        """Save once a second what keys used, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_INTERVAL)
            await self._flush()

    async def close(self) -> None:
        """Save what keys used, and give up the store."""
        await self._flush()
        while under_way := self._next or self._writing:
            await asyncio.wait([under_way])
        async with self._adding:
            if self._changes:
                log.error("not written in the file of resources: %s", json.dumps(self._changes))
            self._file.close()
            self._things_file.close()

    async def _flush(self) -> None:
        self.notice_edit()
        with contextlib.suppress(APIError):  # which was logged; the next call tries it again
            await self._add()
        if self._touched or self._file.error:
            with contextlib.suppress(APIError):
                await self.save()

    async def _write(self, before: asyncio.Task[APIError | None] | None) -> APIError | None:
        """Write all, once the write ``before`` is over; where that fails, this one does: what was
        changed meanwhile stands on what is refused, and falls with it."""
        if before is not None and (failure := await before):
            return failure
        self._writing, self._next = self._next, None
        undo, self._undo = self._undo, {}
        touched, self._touched = self._touched, set()
        try:
            for name in touched:
                if record := self.record(name):
                    self._lines[name] = self._line(name, record)
            await asyncio.to_thread(self._file.write, list(self._lines.values()))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is taken back
            undo, self._undo, self._next = self._undo | undo, {}, None
            self._touched |= touched
            self._apply(undo)
            return self._fail(error, self._file)
        finally:
            self._writing = None
        return None

    def _fail(self, error: Exception, file: StoreFile, *headers: tuple[str, str]) -> APIError:
        """Say what is new of it. A client is told no path of the machine."""
        reason = getattr(error, "strerror", None) or "unexpected failure"
        message = f"The {file.what} cannot be written ({reason}); {file.then}."
        # An edit that was not read yet is no failure; it is in a moment.
        is_unread = isinstance(error, FileExistsError) and file.edit() not in self._noticed
        if message != file.error and not is_unread:
            file.error = message
            log.error(message, exc_info=not isinstance(error, OSError | SettingsError))
            self.tell("db_exceptions", message, matter=message)
        return APIError(503, message, headers=headers)


def check_budget(
    of: Limited, budget: Budget, cost: Decimal, moment: datetime, *, shares: bool, fit: bool
) -> None:
    """Raise APIError 429 where a budget has no room for a request of that cost: a
    ``billing_error``, which nobody need try again, where it is spent or the cost will never fit; a
    ``rate_limit_error``, which goes by, where others' requests are only in the way."""
    if (limit := budget.limit) is None:
        return
    spent = of.spent(moment, budget)
    held = of.account.windows[budget.name].held if shares else ZERO
    if spent < limit and (spent + held + cost <= limit if fit else spent + held < limit):
        return
    models, told = budget.pattern and f" for {budget.pattern}", f"${dollars(spent)} is spent"
    name = f"{WHOSE_BUDGET[of.of]}{models} of ${dollars(limit)}"
    if spent < limit and not (fit and spent + cost > limit):
        text = f"{name}: {told}, and ${dollars(held)} is held for requests and batches under way."
        headers = [("retry-after", str(BUDGET_WAIT))]
        raise APIError(429, f"{text} Try again in {BUDGET_WAIT} seconds.", headers=headers)
    resets, headers = "it does not reset by itself", [DO_NOT_RETRY, SPENT_REASON]
    if end := budget.end(moment):
        resets = f"{budget.duration}; resets {end:%Y-%m-%d %H:%M} UTC"
        headers.append(("retry-after", f"{(end - moment).total_seconds():.0f}"))
    text = f"{name} reached ({resets}): {told}."
    if spent < limit:
        text = f"{name} ({resets}): {told}, and this batch may cost ${dollars(cost)}."
        text += " Send a smaller one, or lower its 'max_tokens'."
    raise APIError(429, text, kind="billing_error", headers=headers)


AnyLedger = FileLedger


# ─── Redis ────────────────────────────────────────────────────────────────────────────────────────

# The same promises over any number of processes: what keys are, use and hold is in Redis or Valkey,
# and what a process remembers of it is a copy. An account is held and booked by scripts, which run
# one after the other, by the server's clock; all keys of one begin as its ``place`` does, and have
# its team's hash tag. Amounts are nano-dollars: Lua's numbers are exact up to 2^53, $9 million.

STORE_DEADLINE = 0.5  # seconds for an answer
STORE_GRACE = 0.05  # more of them, in which what has come is read
STORE_RETRY = 0.1  # seconds until the next try to reach it
CHECK_INTERVAL = 0.2  # seconds; less than the second within which a change holds everywhere
GONE = "NOSCRIPT|READONLY|LOADING|MASTERDOWN"  # what another connection may mend
# Errors before anything is written; behind others a part may be, which must not count twice.
UNWRITTEN = re.compile(rf"\b({GONE}|OOM|MISCONF|NOREPLICAS|BUSY|LOST)\b")
MOST_CONNECTIONS = 64  # of a process, beside its `Link`, for what is not asked at each request
LEASE, RENEWAL = 60.0, 20.0  # seconds that a hold stands by itself; until it is renewed
LOCK_LEASE = 5.0  # seconds that a change may take
KEPT_RECORDS = 10_000  # keys in use, which a process remembers
NAMES_A_TRIP, LOOKED_AT = 500, 100  # hashes, and records with their usage, in one script or call
CHANGES_KEPT = 10_000  # in the stream that tells of them
TRIES = 3  # of a request whose key is changed under it
PREFIX, STORE, CHANGES, REVISION = "gw:", "gw:store", "gw:changes", "gw:revision"
IMPORTING = "gw:import"  # is there while one is not over
TOLD_OF = 10_000  # records
Sums = collections.Counter[str]  # of what was copied
AGAIN, RETRY = [("retry-after", "1")], " Try again in a second."
NO_STORE = "The store is empty, or another one: nothing is changed in it. Whoever runs the gateway"
NO_STORE += " must bring its data back, or start it with --new-store or --import."

# What every script begins with. KEYS[1] is the store's name, ARGV[1] what it was when we came.
PRELUDE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return redis.error_reply('LOST the store') end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function draw(place, kind, limit, amount)  -- of a `Bucket`; what is drawn then, in millionths
  local found = redis.call('HMGET', place, 'drawn:' .. kind, 'seen:' .. kind)
  local past = math.max(0, now - (found[2] or now))  -- the clock may be another server's by now
  local gained = math.floor(past * limit / 60)
  local drawn = math.max(0, (found[1] or 0) - gained) + amount * 1000000
  if amount > 0 then redis.call('HSET', place, 'drawn:' .. kind, drawn, 'seen:' .. kind, now) end
  return drawn
end

local function add(place, used, sign)  -- what windows had spent: before, after, of each
  local told = {}
  for _, each in ipairs(used.w) do  -- window, start, amount
    local start = redis.call('HGET', place, 'start:' .. each[1]) or ''
    if each[2] > start then
      redis.call('HSET', place, 'start:' .. each[1], each[2], 'spent:' .. each[1], 0)
    end
    local is_past = sign < 0 and each[2] < start  -- of a window that is over nothing comes back
    local amount = is_past and 0 or sign * each[3]
    local spent = redis.call('HINCRBY', place, 'spent:' .. each[1], amount)
    told[#told + 1], told[#told + 2] = spent - amount, spent
  end
  for _, each in ipairs(used.u) do  -- day, model, counts, seconds it is kept
    local day, model = place .. ':' .. each[1], each[2]
    local known = redis.call('HEXISTS', day, model .. '\\0requests')
    if known == 0 and redis.call('HLEN', day) >= MOST then model = 'OTHER' end
    for name, count in pairs(each[3]) do
      redis.call('HINCRBY', day, model .. '\\0' .. name, sign * count)
    end
    redis.call('EXPIRE', day, each[4])
    redis.call('HSET', place, 'day:' .. each[1], 1)
  end
  return told
end

local function change_held(costs, sign)  -- place, window, amount; of what is still there
  for _, each in ipairs(costs) do
    if redis.call('HEXISTS', each[1], 'rev') == 1 then
      redis.call('HINCRBY', each[1], 'held:' .. each[2], sign * each[3])
    end
  end
end

local function free(place, id)  -- gives back what a request holds, where it still does
  if redis.call('ZREM', place .. ':leases', id) == 0 then return end
  local text = redis.call('HGET', place .. ':holds', id)
  redis.call('HDEL', place .. ':holds', id)
  change_held(cjson.decode(text).c, -1)
  return text
end

local function lapse(place)  -- what nobody renewed costs what its prompt did, until it is known
  local leases = place .. ':leases'
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 100)) do
    local text = free(place, id)
    local held = cjson.decode(text)
    add(place, held, 1)
    local row = held.r and cjson.encode(held.r)
    row = row and redis.call('XADD', 'gw:requests', '*', 'row', row) or ''
    redis.call('SET', place .. ':lapsed:' .. id, row .. ' ' .. text, 'EX', 604800)
  end
end

local function revive(place, id)  -- takes back what a lapse did, and tells what was held
  local row, text = (redis.call('GETDEL', place .. ':lapsed:' .. id) or ''):match('^(%S*) (.*)')
  if not text then return end
  add(place, cjson.decode(text), -1)
  if row ~= '' then redis.call('XDEL', 'gw:requests', row) end
  return text
end

local function settle(place, id)
  if not free(place, id) then revive(place, id) end
end
"""
PRELUDE = PRELUDE.replace("MOST", str(9 * MAX_MODELS_A_DAY)).replace("OTHER", OTHER_MODELS)
# Before a request: all that it needs is checked of all its accounts, and held, or nothing.
RESERVE = """
local accounts, told = cjson.decode(ARGV[4]), {}
for i, account in ipairs(accounts) do
  local place, refused, wait = KEYS[i + 1], nil, 1000000
  lapse(place)
  if (redis.call('HGET', place, 'rev') or '') ~= account.r then return {'stale', 0, 0, 0} end
  local state = {redis.call('ZCARD', place .. ':leases'), 0, 0}
  if account.slots and state[1] >= account.slots then refused = 'slots' end
  for j, kind in ipairs({'requests', 'tokens'}) do
    local limit = account[kind]
    state[j + 1] = limit and draw(place, kind, limit, 0) or 0
    local missing = limit and state[j + 1] + 1000000 * (1 - limit)
    if limit and not refused and missing > 0 then
      refused, wait = kind, limit > 0 and math.ceil(missing * 60 / limit) or 60000000
    end
  end
  for j, each in ipairs(account.b) do
    local name, start, limit, cost, fit = unpack(each)  -- fit: whether all of it must
    local found = redis.call('HMGET', place, 'start:' .. name, 'spent:' .. name, 'held:' .. name)
    local spent = start > (found[1] or '') and 0 or tonumber(found[2] or 0)
    local held = tonumber(found[3] or 0)
    state[#state + 1], state[#state + 2] = spent, held
    if limit and cost and not refused then
      local room = limit - spent - (account.s and held or 0)
      if spent >= limit or (fit and cost > room) or (not fit and room <= 0) then refused = j - 1 end
    end
  end
  told[i] = state
  if refused then return {'refused', i - 1, refused, wait, unpack(told)} end
end
for i, account in ipairs(accounts) do
  local place = KEYS[i + 1]
  redis.call('ZADD', place .. ':leases', now + ARGV[3], ARGV[2])
  redis.call('HSET', place .. ':holds', ARGV[2], ARGV[i + 4])
  for _, each in ipairs(account.b) do
    if each[4] then redis.call('HINCRBY', place, 'held:' .. each[1], each[4]) end
  end
  told[i][1] = told[i][1] + 1
  if account.requests then told[i][2] = draw(place, 'requests', account.requests, 1) end
end
return {'held', 0, 0, 0, unpack(told)}
"""
# What is written later, in its order, and perhaps twice: only once it counts. KEYS[2] remembers how
# far it is, ARGV[2] is its number.
ONCE = """
if tonumber(redis.call('GET', KEYS[2]) or 0) >= tonumber(ARGV[2]) then return {} end
redis.call('SET', KEYS[2], ARGV[2], 'EX', 86400)
"""
# After a request, or a line of a batch (KEYS[3], ARGV[5]): what it held is given back, and what it
# used is counted to those of its accounts that are still there.
BOOK = """
if ARGV[5] ~= '0' then
  if tonumber(redis.call('HGET', KEYS[3], 'lines') or 1e15) >= tonumber(ARGV[5]) then return {} end
  redis.call('HSET', KEYS[3], 'lines', ARGV[5])
end
local told = {}
for i, used in ipairs(cjson.decode(ARGV[4])) do
  local place = KEYS[i + 3]
  told[i] = {}
  if redis.call('HEXISTS', place, 'rev') == 1 then
    if ARGV[3] ~= '' then settle(place, ARGV[3]) end
    told[i] = add(place, used, 1)
    if used.t and used.t[2] > 0 then draw(place, 'tokens', used.t[2], used.t[1]) end
    if used.r then draw(place, 'requests', used.r, 1) end
    if used.a then redis.call('HSET', place, 'active', time[1]) end
  end
end
return told
"""
# A hold becomes a batch's (KEYS[3]), and lasts until it is booked.
KEEP = """
for i = 5, #KEYS do settle(KEYS[i], ARGV[3]) end
change_held(cjson.decode(ARGV[5]), 1)
redis.call('HSET', KEYS[3], 'held', ARGV[5], unpack(cjson.decode(ARGV[6])))
redis.call('SADD', KEYS[4], ARGV[4])
return {}
"""
FINISH = """
local found = redis.call('HMGET', KEYS[3], 'held', 'booked')
if not found[1] or found[2] == '1' then return {} end
change_held(cjson.decode(found[1]), -1)
for i, used in ipairs(cjson.decode(ARGV[4])) do add(KEYS[i + 4], used, 1) end
redis.call('HSET', KEYS[3], 'booked', 1, 'held', '[]')
redis.call('EXPIRE', KEYS[3], ARGV[5])
redis.call('SREM', KEYS[4], ARGV[3])
return {}
"""
RENEW = """
for i = 2, #KEYS do
  local leases, id = KEYS[i] .. ':leases', ARGV[i + 1]
  local text = revive(KEYS[i], id)
  if text then  -- nobody could renew it: Redis was away, or its process stood still
    redis.call('HSET', KEYS[i] .. ':holds', id, text)
    redis.call('ZADD', leases, 0, id)
    change_held(cjson.decode(text).c, 1)
  end
  redis.call('ZADD', leases, 'XX', now + ARGV[2], id)
end
"""
# What accounts are now, with what was used from a day to another: [what the account has, its slots,
# [day, counts …]].
LOOK = """
local told = {}
for i = 2, #KEYS do
  lapse(KEYS[i])
  local row, days = redis.call('HGETALL', KEYS[i]), {}
  for j = 1, #row, 2 do
    local day = row[j]:match('^day:(.*)')
    if day and day >= ARGV[2] and day <= ARGV[3] then
      local counts = redis.call('HGETALL', KEYS[i] .. ':' .. day)
      if #counts > 0 then days[#days + 1], days[#days + 2] = day, counts
      else redis.call('HDEL', KEYS[i], row[j]) end
    end
  end
  told[i - 1] = {row, redis.call('ZCARD', KEYS[i] .. ':leases'), days}
end
return told
"""
# Things, each [id, kind, home, made]: "made" and "shared" leave an owner, "given" does not, "gone"
# is his own. Sets are of an owner, of all ("*") and of what is shared ("+"), of a kind or of any.
THINGS = """
local deed, owner, rows = unpack(cjson.decode(ARGV[3]))
for _, row in ipairs(rows) do
  local name, text = row[1], redis.call('HGET', KEYS[3], row[1])
  local old = text and cjson.decode(text)
  local of = old or {owner, row[2], row[3], row[4]}
  if not old or deed ~= 'made' and (deed ~= 'gone' or owner == '*' or owner == of[1]) then
    for pass = 1, 2 do
      local places = {':*', ':' .. of[1], of[2] .. ':*', of[2] .. ':' .. of[1], of[2] .. ':+'}
      for i, place in ipairs(places) do
        if pass == 1 then redis.call('ZREM', 'gw:made:' .. place, name)
        elseif i < 5 or of[5] then redis.call('ZADD', 'gw:made:' .. place, of[4], name) end
      end
      if deed == 'gone' then break end
      of[1], of[5] = deed == 'given' and owner or of[1], deed == 'shared'
    end
    if deed == 'gone' then redis.call('HDEL', KEYS[3], name)
    else redis.call('HSET', KEYS[3], name, cjson.encode(of)) end
  end
end
return {}
"""
LOG = """
for i = 4, #ARGV do redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'row', ARGV[i]) end
return {}
"""
SCRIPTS = {text: PRELUDE + text for text in (RESERVE, RENEW, LOOK)}
SCRIPTS |= {text: PRELUDE + ONCE + text for text in (BOOK, KEEP, FINISH, THINGS, LOG)}
DIGESTS = {text: hashlib.sha1(script.encode()).hexdigest() for text, script in SCRIPTS.items()}


class StoreAway(Exception):
    """Redis did not answer, or not as it should; its text says how."""


class StoreRefused(StoreAway):
    """Redis answered with an error; where this is UNWRITTEN it has done nothing."""


def nano(amount: Decimal) -> int:
    """Whole nano-dollars."""
    return round(amount.scaleb(9))


def usd(amount: Any) -> Decimal:
    """USD of nano-dollars."""
    return Decimal(amount).scaleb(-9).normalize()


def nanos(charges: Charges) -> list[tuple[str, int]]:
    """What these cost, by model."""
    return [(model, nano(tally.spend)) for model, tally in charges]


def sum_for(budget: Budget, amounts: Iterable[tuple[str, int]]) -> int:
    """What of these counts for a budget."""
    return sum([n for model, n in amounts if not budget.pattern or budget.is_for(model)])


class Link(asyncio.Protocol):
    """One connection for all scripts of a process, in RESP2, by hiredis: what is called in a turn
    of the loop goes out in one write, and is answered in its order. Where an answer takes longer
    than STORE_DEADLINE it breaks off; all that wait then get StoreAway, and ``closed`` is set."""

    def __init__(self) -> None:
        import hiredis

        self._loop, self.closed = asyncio.get_running_loop(), asyncio.Event()
        self._error, self._pack = hiredis.ReplyError, cast(Any, hiredis.pack_command)
        self._reader = hiredis.Reader(encoding="utf-8", errors="surrogateescape")
        self._out = list[bytes]()
        self._waiting = collections.deque[tuple[asyncio.Future[Any], float]]()
        self._timer: asyncio.TimerHandle | None = None
        self.why = "the connection was closed"

    @classmethod
    async def open(cls, pool: Any) -> Link:
        """Connect as a pool of redis-py's does, and load the scripts. Raises OSError, StoreAway."""
        told, loop = pool.connection_kwargs, asyncio.get_running_loop()
        async with asyncio.timeout(STORE_DEADLINE):
            if "path" in told:
                _, link = await loop.create_unix_connection(cls, told["path"])
            else:
                tls = getattr(pool.make_connection(), "ssl_context", None)
                place = told.get("host", "localhost"), told.get("port", 6379)
                _, link = await loop.create_connection(cls, *place, ssl=tls and tls.get())
        try:
            if word := told.get("password"):
                await link.call("AUTH", *filter(None, (told.get("username"), word)))
            await link.call("SELECT", told.get("db") or 0)
            await asyncio.gather(*(link.call("SCRIPT", "LOAD", text) for text in SCRIPTS.values()))
            await link.call("SETRANGE", f"{PREFIX}nothing", 0, "")  # whether it may be written in
        except BaseException:
            link.abort("it cannot be used")
            raise
        return link

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def call(self, *command: str | int | bytes) -> asyncio.Future[Any]:
        """Send a command; its answer is awaited, or StoreAway."""
        answer = self._loop.create_future()
        if self.closed.is_set():
            answer.set_exception(StoreAway(self.why))
            return answer
        if self._timer is None:
            self._timer = self._loop.call_later(STORE_DEADLINE, self._look)
        if not self._out:
            self._loop.call_soon(self.flush)
        self._out.append(self._pack(command))
        self._waiting.append((answer, self._loop.time()))
        return answer

    def flush(self) -> None:
        """Send what was called, before what others write after this."""
        if self._out and not self.closed.is_set():
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while self._waiting and (reply := self._reader.gets()) is not False:
            answer, _ = self._waiting.popleft()
            if answer.done():
                continue
            if isinstance(reply, self._error):
                answer.set_exception(StoreRefused(text := str(reply)))
                if re.match(GONE, text):
                    self.abort(text)
            else:
                answer.set_result(reply)

    def _look(self, is_sure: bool = False) -> None:
        self._timer = None
        if not self._waiting:
            return
        left = self._waiting[0][1] + STORE_DEADLINE - self._loop.time()
        if left <= 0 and is_sure:
            return self.abort(f"no answer in {STORE_DEADLINE:g} seconds")
        # This process may have been late itself, and the answer is here.
        wait = left if left > 0 else STORE_GRACE
        self._timer = self._loop.call_later(wait, self._look, left <= 0)

    def abort(self, why: str) -> None:
        """Break off."""
        self.why = why
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()
        for answer, _ in self._waiting:
            if not answer.done():
                answer.set_exception(StoreAway(self.why))
                answer.exception()  # whoever asked may be gone
        self._waiting.clear()


class Write(NamedTuple):
    """What is to be written once, and waits until Redis takes it; these accounts are ``told`` what
    is spent."""

    script: str
    keys: Sequence[str]
    arguments: Sequence[str | int | bytes]
    told: Sequence[Limited]
    done: asyncio.Future[None]


class RedisLedger(Ledger):
    """The same over any number of processes, which share a ``store`` (a URL). What a process knows
    of the keys in use is a copy that a stream of changes keeps fresh, and each script tells of what
    is old. Where Redis does not answer, keys without limits go on, rates are held here, and budgets
    are refused (503), or, where ``allow``, what was left is shared out. What is written later has a
    number, goes in its order, and counts once. ``remember`` is a file of the stores used here."""

    leases = True

    def __init__(
        self,
        store: str,
        *,
        new_store: bool = False,
        allow: bool = False,
        remember: Path | None = None,
        deadline: float | None = STORE_DEADLINE,
        **told: Any,
    ) -> None:
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        super().__init__(**told)
        told = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), deadline)
        told |= {"decode_responses": True, "retry": Retry(NoBackoff(), 0), "protocol": 2}
        told |= {"max_connections": MOST_CONNECTIONS, "timeout": STORE_DEADLINE}
        told["encoding_errors"] = "surrogatepass"  # JSON may have them
        pool = redis.asyncio.BlockingConnectionPool.from_url(store, **told)
        self._redis: Any = redis.asyncio.Redis(connection_pool=pool)
        # Where a connection was just reset, uvloop raises RuntimeError for what is written to it,
        # asyncio of Python 3.13 AttributeError.
        reset = (OSError, RuntimeError, AttributeError)
        self._errors = (redis.RedisError, TimeoutError, StoreAway, *reset)
        self._new, self._allow, self._remember = new_store, allow, remember
        self._shown = without_password(store)
        self.keys: collections.OrderedDict[str, VirtualKey] = collections.OrderedDict()
        self._unknown: set[str] = set()  # hashes of no key, until any changes
        self._asked: dict[str, asyncio.Task[VirtualKey | None]] = {}
        self._forgotten = 0  # how often any has changed: what is read meanwhile may be old
        self._accounts = weakref.WeakValueDictionary[str, Account]()  # by their places
        self._link, self._linked = cast(Link | None, None), asyncio.Event()
        self.away, self.lost = "it was not asked yet", False
        self._id, self._process, self._number = "", secrets.token_hex(4), 0
        self._writes: dict[int, Write] = {}
        self._is_behind = False  # of these some were not sent on this link, and go first
        self._refused: list[Write] = []  # which are sent again, each with another number
        self._summed: dict[str, tuple[Sequence[Limited], Any]] = {}  # rows that BOOK is to count
        self._is_refusing = False
        self._holds: dict[str, Sequence[str]] = {}  # places, by the ids of holds
        self._turn, self._lock = asyncio.Lock(), None
        self._waits = False  # for WAITAOF
        self._tasks: list[asyncio.Task[None]] = []
        self._last, self.count, self._processes = "0-0", 0, 1
        self.groups[GATEWAY].account.place = f"{PREFIX}{{gateway}}:{GATEWAY}"
        # Batches: whose they are, what is held, and the last line that was booked here.
        self._booking: dict[str, tuple[VirtualKey, Any, int]] = {}

    @property
    def _waiting(self) -> int:
        return sum(map(len, (self._writes, self._refused, self._summed, self._logs)))

    @property
    def _oldest(self) -> str:
        return day_of(now() - timedelta(days=self._usage_days))

    # Coming and going

    async def open(self) -> None:
        """Find the store, or make one where there was none. Raises SettingsError."""
        await self.look()
        with self._starting():
            await self.find_store()
            await self._redis.hset(self.groups[GATEWAY].account.place, "rev", "")
            newest = await self._redis.xrevrange(CHANGES, count=1)
            self._last = newest[0][0] if newest else self._last
            await self._check()
            self._tasks = [*map(asyncio.create_task, (self._keep_linked(), self._follow()))]
            await asyncio.wait_for(self._linked.wait(), 2 * STORE_DEADLINE)

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """What fails within is a SettingsError."""
        try:
            yield
        except (APIError, *self._errors) as error:
            why = str(error) or (self.away if self._tasks else "no answer")
            raise SettingsError(f"--store: {self._shown}: {why}") from None

    async def look(self) -> str:
        """What is there, and in `doubt` what is less than sure of it. Raises SettingsError."""
        with self._starting():
            told = await self._redis.info("server")
            version = told["redis_version"]
            self.count = await self._redis.zcard(f"{PREFIX}key")
        if tuple(map(int, version.split(".")[:2])) < (6, 2):
            raise SettingsError(f"--store: Redis {version} is before 6.2")
        config, doubts = dict[str, str](), list[str]()
        with contextlib.suppress(*self._errors):
            for name in ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy"):
                config |= await self._redis.config_get(name)
        with contextlib.suppress(*self._errors):
            self._waits = bool((await self._redis.waitaof(1, 0, int(STORE_DEADLINE * 800)))[0])
        if not self._waits and [*config.values()][:2] != ["yes", "always"]:
            needs = "appendonly yes, and appendfsync always or Redis 7.2"
            doubts.append(f"a change may be lost with it: it needs {needs}")
        is_full = config.get("maxmemory", "0") != "0"  # one day
        if is_full and config.get("maxmemory-policy") != "noeviction":
            doubts.append("it may drop keys: it needs maxmemory-policy noeviction")
        self.doubt = "; ".join(doubts)
        for doubt in doubts:
            log.warning("! Redis: %s", doubt)
        name = "Valkey" if "valkey_version" in told else "Redis"
        return f"{name} {told.get('valkey_version', version)}, {self.count} keys"

    async def find_store(self, *, make: bool = True) -> None:
        """The store's id; one that was used from here does not come back empty unnoticed, nor half
        an import. SettingsError."""
        used, redis = dict[str, str](), self._redis
        with contextlib.suppress(OSError, ValueError, TypeError):
            used = json.loads(self._remember.read_text()) if self._remember else used
        with self._starting():
            size, self._id = await redis.dbsize(), await redis.get(STORE) or ""
            is_half = await redis.exists(IMPORTING)
        if not self._id:
            if is_half:
                text = "an import into it was broken off: do it again, with --import"
                raise SettingsError(f"--store: {self._shown}: {text}")
            if not self._new and (self._shown in used or size):
                text = "it holds no keys of a gateway: bring its data back, or start once with"
                raise SettingsError(f"--store: {self._shown}: {text} --new-store or --import")
            if not make:
                return
            await redis.set(STORE, secrets.token_hex(8), nx=True)
            self._id = await redis.get(STORE)
        if make and self._remember and used.get(self._shown) != self._id:
            with contextlib.suppress(OSError):
                self._remember.write_text(json.dumps(used | {self._shown: self._id}))

    async def _keep_linked(self) -> None:
        while self._tasks:  # redis-py, and what closes, may keep a cancellation to themselves
            try:
                self._link = link = await Link.open(self._redis.connection_pool)
                self._forget()  # what changed meanwhile
                self._is_behind = True
                await self._write_summed()  # before anybody may `save` it
                if self._linked.is_set():
                    log.warning("Redis is back: %d writes waited for it", self._waiting)
                self._linked.set()
                self.away = ""
                await self._renew()
                while self._is_behind and not (self.lost or link.closed.is_set()):
                    first = itertools.islice(self._writes.items(), NAMES_A_TRIP)
                    if sent := [self._send(*each) for each in first]:  # others have their turn
                        await asyncio.wait(sent)
                    self._is_behind = bool(sent)
                self._write_refused()
                await link.closed.wait()
                why = link.why
            except Exception as error:  # whatever it is, it is tried again
                why = str(error) or "no answer"
                if not isinstance(error, self._errors):
                    log.exception("Redis cannot be reached")
                if self._link is not None:
                    self._link.abort(why)
            self._link = None
            if not self.away:
                log.error("Redis is away: %s", why)
            if why != self.away:
                self.tell("db_exceptions", f"Redis is away: {why}", matter="Redis")
            self.away = why
            await asyncio.sleep(STORE_RETRY)

    async def _follow(self) -> None:
        """Hear of changes, at once and after any pause."""
        failed, wait = 0, int(CHECK_INTERVAL * 1000)
        while self._tasks:
            try:
                told = await self._redis.xread({CHANGES: self._last}, block=wait, count=1000)
                if changes := [*itertools.chain(*(entries for _, entries in told))]:
                    self._forget(*(change["name"] for _, change in changes))
                    self._last = changes[-1][0]
                await self._check()
                failed = 0
            except Exception as error:  # whatever it is, it is tried again
                failed = 0 if self._link is None else failed + 1
                if not isinstance(error, self._errors):
                    log.exception("changes in Redis cannot be followed")
                if self._link is not None and failed > 2:  # else this process may be late itself
                    self._link.abort(str(error) or "no answer")
                await asyncio.sleep(STORE_RETRY)

    async def _check(self) -> None:
        """Whether it is still the same store; what time it is there, and who else is."""
        asked = time.time()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.get(STORE).time().zcard(f"{PREFIX}key")
            pipe.zcount(f"{PREFIX}processes", asked + CLOCK.ahead - 5, "inf")
            store, (seconds, more), count, self._processes = await pipe.execute()
        told = seconds + more / 1e6  # some time between the question and its answer
        CLOCK.ahead = min(max(CLOCK.ahead, told - time.time()), told - asked)
        self._lose(store != self._id)
        if len(self._unknown) > KEPT_RECORDS:
            self._unknown.clear()
        if not self.lost:
            self.count, here = count, f"{PREFIX}processes"
            await self._redis.zadd(here, {self._process: told})
            await self._redis.zremrangebyscore(here, 0, told - 3600)

    def _lose(self, lost: bool) -> None:
        if self.lost != lost:
            log.critical(NO_STORE) if lost else log.warning("the store is back")
            self.lost = lost
            if not lost and self._link is not None:
                self._link.abort("its data is back, so it is asked anew")

    async def run(self) -> None:
        """Renew what requests hold, and try again what Redis refused, until cancelled."""
        for beat in itertools.count():
            await asyncio.sleep(FLUSH_INTERVAL)
            self._write_refused()
            if beat % RENEWAL == 0:
                await self._renew()

    async def _renew(self) -> None:
        holds = [(place, id) for id, places in self._holds.items() for place in places]
        if holds:
            places, ids = zip(*holds, strict=True)
            with contextlib.suppress(StoreAway):
                await self._run(RENEW, places, int(LEASE * 1e6), *ids)

    async def save(self) -> None:
        """Make all that was written before this call durable. Raises APIError 503."""
        async with self._asking():
            async with asyncio.timeout(STORE_DEADLINE):
                if writes := [*self._writes.values(), *self._refused]:
                    await asyncio.wait([write.done for write in writes])
            await self._sync()

    async def _sync(self) -> None:
        if self._waits:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.incr(f"{PREFIX}synced")  # what this connection wrote is what it waits for
                pipe.waitaof(1, 0, int(STORE_DEADLINE * 800))
                if not (await pipe.execute())[1][0]:
                    raise StoreAway("it is not known to be on disk")

    async def close(self) -> None:
        """Write what is not written, and leave."""
        try:
            await self.save()
        except APIError as error:
            if self._waiting:
                log.error("%d writes are lost: %s", self._waiting, error)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if self._link is not None:
            self._link.abort("closed")
        if tasks:
            await asyncio.wait(tasks, timeout=STORE_DEADLINE)
        await self._redis.aclose()

    def trouble(self) -> str:
        """What is wrong with the store."""
        if self.lost:
            return NO_STORE
        waiting = f"; {self._waiting} writes wait" if self._waiting else ""
        if self._is_refusing and not self.away:
            return f"Redis refuses to write{waiting}"
        return f"Redis is away: {self.away}{waiting}" if self.away else ""

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Raise APIError 503 where the store does not answer, or not as itself."""
        if asyncio.current_task() is None:  # as `at_once` runs it, which redis-py's timeouts need
            await asyncio.sleep(0)
        if self.lost:
            raise APIError(503, NO_STORE, headers=AGAIN)
        try:
            if self.away:
                raise StoreAway(self.away)
            yield
        except self._errors as error:
            text = f"Redis, which holds the keys, does not answer ({str(error) or 'too late'})."
            raise APIError(503, text + RETRY, headers=AGAIN) from None

    def _run(self, script: str, keys: Sequence[str], *more: Any) -> asyncio.Future[Any]:
        """What one of SCRIPTS answers. Raises StoreAway."""
        if self._link is None:
            raise StoreAway(self.away)
        asked = [DIGESTS[script], len(keys) + 1, STORE, *keys, self._id, *more]
        return self._link.call("EVALSHA", *asked)

    def _later(
        self, script: str, keys: Sequence[str], *arguments: Any, told: Sequence[Limited] = ()
    ) -> None:
        """Have a script run ONCE; the last of ``keys`` is one that it writes."""
        done = asyncio.get_running_loop().create_future()
        self._write(Write(script, keys, arguments, told, done))

    def _write(self, *writes: Write) -> None:
        for write in writes:
            self._number += 1
            self._writes[self._number] = write
            if not (self._link is None or self._is_behind or self.lost):
                self._send(self._number, write)

    def _write_refused(self) -> None:
        refused, self._refused = self._refused[:NAMES_A_TRIP], self._refused[NAMES_A_TRIP:]
        self._write(*refused)

    def _send(self, number: int, write: Write) -> asyncio.Future[Any]:
        keys = [f"{write.keys[-1]}:seen:{self._process}", *write.keys]
        answer = self._run(write.script, keys, number, *write.arguments)
        answer.add_done_callback(functools.partial(self._sent, number, write))
        return answer

    def _sent(self, number: int, write: Write, answer: asyncio.Future[Any]) -> None:
        error = answer.exception()
        if isinstance(error, StoreRefused) and not UNWRITTEN.search(str(error)):
            log.critical("A write is given up; is what Redis has damaged? %s", error)
            del self._writes[number]  # whoever waits for it is told that it is not kept
        elif isinstance(error, StoreRefused):  # so it was not written; others behind it may be
            self._refused.append(self._writes.pop(number))
            if not self._is_refusing:
                log.error("Redis refuses to write: %s", error)
            self._is_refusing = True
        elif error is None:
            self._is_refusing = False
            del self._writes[number]
            write.done.set_result(None)
            self._booked(write.told, answer.result())

    # Who it is

    async def find_hash(self, hashed: str) -> tuple[VirtualKey, str] | None:
        if self.lost:
            raise APIError(503, NO_STORE, headers=AGAIN)
        name = self._retired.get(hashed, hashed)
        if (key := self.keys.get(name)) is not None:
            self.keys.move_to_end(name)
        elif hashed not in self._unknown:
            if hashed not in self._asked:  # many may ask at once for one that is not known here
                self._asked[hashed] = asyncio.create_task(self._learn(hashed))
            key = await asyncio.shield(self._asked[hashed])
        return self._judged(key, hashed) if key else None

    async def _learn(self, hashed: str) -> VirtualKey | None:
        """Read a key, and remember it, or that there is none."""
        began, key = self._forgotten, cast(VirtualKey | None, None)
        try:
            async with self._asking():
                if key := await self._read(hashed, former=True):
                    await self._look([key], None, is_hot=True)
                else:
                    await self._be_sure()
        finally:
            if self._asked.get(hashed) is asyncio.current_task():
                del self._asked[hashed]
        if began == self._forgotten and key is not None:
            self.keys[name := key.account.hashed] = key
            self._retired |= {hashed: name} if hashed != name else {}
        elif began == self._forgotten:
            self._unknown.add(hashed)
        if len(self.keys) > KEPT_RECORDS:
            self.keys.popitem(last=False)
        if len(self._retired) > KEPT_RECORDS:
            self._retired.clear()
        return key

    async def _be_sure(self) -> None:
        """What is not there may be missing with the whole store."""
        if await self._redis.get(STORE) != self._id:
            raise StoreAway("it is empty, or another one")

    async def knows(self, hashes: Iterable[str]) -> bool:
        began, asked = self._forgotten, [each for each in hashes if each not in self._unknown]
        if not asked:
            return False
        async with self._asking():
            for start in range(0, len(asked), NAMES_A_TRIP):
                part = asked[start : start + NAMES_A_TRIP]
                known = await self._redis.exists(*(f"{PREFIX}record:{each}" for each in part))
                if known or any(await self._redis.hmget(f"{PREFIX}retired", part)):
                    return True
            await self._be_sure()
        self._unknown.update(asked if began == self._forgotten else ())
        return False

    def limited(self, key: VirtualKey | None) -> Sequence[Limited]:
        whole = self.groups[GATEWAY]
        found = [key, *key.account.beside] if key else []
        return [*found, whole] if whole.has_budget else found

    def _forget(self, *names: str) -> None:
        """These records have changed, or (without names) any may have."""
        self._unknown.clear()
        self._asked.clear()  # what is read may be old
        self._forgotten += 1
        for index in (self.keys, self._retired):
            for name in names or [*index]:
                index.pop(name, None)
        if groups := {name for name in names if not HASH.fullmatch(name)}:
            found = [n for n, key in self.keys.items() if not groups.isdisjoint(group_names(key))]
            for name in found:
                del self.keys[name]

    async def _read(self, name: str, *, former: bool) -> Any:
        """A record by its name, or a key by a hash that it had."""
        found: Any = (await self._records([name])).get(name)
        newer = await self._redis.hget(f"{PREFIX}retired", name) if former and not found else ""
        if newer:
            found = (await self._records([newer])).get(newer)
            found = found if found and name in found.retired else None
        return found

    async def _records(self, names: Sequence[str]) -> dict[str, Limited]:
        """The records that are kept under these names, those that are there."""
        found, homeless = dict[str, Limited](), list[VirtualKey]()
        texts = await self._redis.mget([f"{PREFIX}record:{n}" for n in names]) if names else []
        for name, text in zip(names, texts, strict=True):
            if text is not None:
                row, kind = json.loads(text), GROUPS.get(name.partition(":")[0], VirtualKey)
                record = found[name] = kind.from_json(row["record"])
                record.revision, record.account.place = row["rev"], row["place"]
                record.account.hashed = name
                homeless += [record] if isinstance(record, VirtualKey) and not record.home else []
        if homeless:
            homes = await self._redis.hmget(f"{PREFIX}homes", [of.owner for of in homeless])
            for each, home in zip(homeless, homes, strict=True):
                each.home = home
        return found

    async def _join(self, keys: Sequence[VirtualKey]) -> list[Limited]:
        """Put the records of their teams and users beside keys."""
        groups = await self._records([*{*itertools.chain(*map(group_names, keys))}])
        for key in keys:
            key.account.beside = [groups[name] for name in group_names(key) if name in groups]
        return [*groups.values()]

    async def settle(self, key: VirtualKey, home: str) -> None:
        team, homes, key.home = f"team:{key.team_id}", f"{PREFIX}homes", home
        with contextlib.suppress(APIError):  # until the store can be asked
            async with self._asking():
                if key.team_id:
                    await self._redis.hsetnx(homes, team, home)
                if key.team_id and key.resources == "team":
                    home = await self._redis.hget(homes, team)
                await self._redis.hsetnx(homes, key.owner, home)
                key.home = await self._redis.hget(homes, key.owner)

    # What requests use

    async def admit(self, hold: Hold, *, pays: bool, shares: bool, later: bool = False) -> None:
        can_ask = self._link is not None
        hold.is_late = later and not (can_ask and any(map(self._seems_full, hold.accounts)))
        if not hold.is_late:
            await self._reserve(hold, (), (), pays=pays, shares=shares, fit=True)

    def _seems_full(self, of: Limited) -> bool:
        """So that a trip is worth it: what is refused so is not read to its end before."""
        clock = self._clock()
        for bucket in of.account.buckets.values():
            if bucket.level(clock) < 1:
                return True
        for budget in of.budgets:
            limit = None if budget.pattern else budget.limit
            if limit is not None and of.account.windows[budget.name].spend >= limit:
                return True
        return False

    async def hold(self, hold: Hold, worst: Charges, prompt: Charges = (), *, fit: bool) -> None:
        if hold.id or hold.is_alone:  # it only seemed to be full
            self._release(hold)
            self._give_back(hold)
            hold.is_alone, hold.amounts = False, ()
        hold.is_late = False
        await self._reserve(hold, worst, prompt, pays=True, shares=True, fit=fit)

    async def _reserve(self, hold: Hold, worst: Charges, prompt: Charges, **how: bool) -> None:
        """Hold it, as it ``pays``, ``shares`` and must ``fit``. Else raise APIError."""
        for _ in range(TRIES):
            accounts = hold.accounts
            if not any(of.is_limited for of in accounts):
                return
            costs = nanos(worst), nanos(prompt)
            rows, held = zip(*(self._wanted(of, *costs, **how) for of in accounts), strict=True)
            if isinstance(key := accounts[0], VirtualKey):
                held[0]["u"] = self._usage(prompt, day_of(now()))
                held[0]["r"] = self._lost_row(hold, key, prompt)
            self._number += 1
            hold.id = f"{self._process}:{self._number}"
            places = self._holds[hold.id] = [of.account.place for of in accounts]
            arguments = hold.id, int(LEASE * 1e6), as_json(rows), *map(as_json, held)
            sent = self._link is not None
            try:
                said, index, why, wait, *states = await self._run(RESERVE, places, *arguments)
            except BaseException as error:
                is_known = isinstance(error, StoreRefused) and UNWRITTEN.search(str(error))
                if sent and not is_known:  # it may be held, and nobody knows
                    self._give_back(hold)
                self._holds.pop(hold.id, None)
                hold.id = ""
                if not isinstance(error, StoreAway):
                    raise
                self._lose(self.lost or str(error).startswith("LOST"))
                if await self._hold_alone(hold, worst, **how):
                    return
                async with self._asking():
                    raise
            for of, row, state in zip(accounts, rows, states, strict=False):
                self._mirror(of, row, state)
            if said == "held":
                hold.costs = [cost for each in held for cost in each["c"]]
                return
            del self._holds[hold.id]
            hold.id = ""
            if said == "refused":
                of, row = accounts[index], rows[index]
                if why in row:
                    most = f"{row[why]} requests at a time"
                    most = most if why == "slots" else f"{row[why]:,} {why} a minute"
                    self._refuse_rate(hold.accounts, of, most, wait / 1e6)
                budget, (*_, cost, fit) = of.budgets[why], row["b"][why]
                check_budget(of, budget, usd(cost), now(), shares=how["shares"], fit=fit)
            await self._read_anew(hold)
        raise APIError(503, "The key is being changed. Try again.", headers=AGAIN)

    def _lost_row(self, hold: Hold, key: VirtualKey, prompt: Charges) -> Any:
        """A row of /spend/logs for a request whose process dies."""
        row: dict[str, Any] = {"request_id": hold.call_id, "litellm_call_id": hold.call_id}
        row |= {"api_key": key.account.hashed, "key_alias": key.key_alias, "user": key.user_id}
        row |= {"team_id": key.team_id, "startTime": iso(hold.started), "status": "failure"}
        model = prompt[0][0] if prompt else ""
        tokens = sum(tally.input_tokens + tally.cached for _, tally in prompt)
        row |= {"outcome": "process_gone", "estimated": True, "model": model}
        row |= {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        return row | {"spend": sum(cost for _, cost in nanos(prompt)) / 1e9}

    def _give_back(self, hold: Hold) -> None:
        if places := self._holds.pop(hold.id, ()):
            nothing = as_json([{"w": (), "u": ()}] * len(places))
            self._later(BOOK, [places[0], *places], hold.id, nothing, "0")
            if self._link is not None:
                self._link.flush()
        hold.id = ""

    def _wanted(
        self, of: Limited, worst: Any, prompt: Any, *, pays: bool, shares: bool, fit: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a request needs of one account, as RESERVE reads it (there None would be true), and
        what is remembered of it: costs, and what its prompt alone uses."""
        moment, budgets, costs, used = now(), list[Any](), list[Any](), list[Any]()
        for budget in of.budgets:
            name, start = budget.name, window_start(budget.duration, moment)
            limit = budget.limit is not None and math.ceil(budget.limit.scaleb(9))
            cost: int | bool = sum_for(budget, worst)
            if cost:
                costs.append((of.account.place, name, str(cost)))
                used.append((name, start, str(sum_for(budget, prompt))))
            elif budget.pattern or not pays:
                cost = False
            budgets.append((name, start, limit, cost, fit or not cost))
        most = {"slots": of.max_parallel_requests, "requests": of.rpm_limit, "tokens": of.tpm_limit}
        row: dict[str, Any] = {n: limit for n, limit in most.items() if limit is not None}
        row |= {"r": of.revision, "b": budgets, "s": shares}
        return row, {"c": costs, "w": used, "u": ()}

    def _usage(self, charges: Charges, day: str) -> list[Any]:
        kept, rows = (self._usage_days + 1) * 86400, list[Any]()
        for model, tally in charges:
            counts = {n: count for n in tally.__slots__ if (count := getattr(tally, n))}
            counts |= {"spend": nano(tally.spend)} if tally.spend else {}
            rows.append((day, model, counts, kept))
        return rows

    def _mirror(self, of: Limited, row: Mapping[str, Any], state: Sequence[int]) -> None:
        """Remember what a script said of an account."""
        account, account.running = of.account, state[0]
        for kind, drawn in zip(("requests", "tokens"), state[1:3], strict=True):
            if bucket := account.buckets.get(kind):
                bucket.drawn, bucket.seen = drawn / 1e6, self._clock()
        for (name, start, *_), spent, held in zip(row["b"], state[3::2], state[4::2], strict=True):
            window = account.windows[name]
            window.start, window.spend, window.held = start, usd(spent), usd(held)
            window.known = window.spend

    async def _read_anew(self, hold: Hold) -> None:
        """Its records have changed. Raises APIError 401 where its key is no good any more."""
        key = hold.accounts[0]
        async with self._asking():
            self._forget(key.account.hashed)
            found, status = await self.find_hash(key.account.hashed) or (None, "gone")
        if found is None or status != "active":
            raise APIError(401, f"This virtual key is {status}.", headers=[DO_NOT_RETRY])
        hold.accounts = self.limited(found)

    async def _hold_alone(
        self, hold: Hold, worst: Charges, *, pays: bool, shares: bool, fit: bool
    ) -> bool:
        """Hold it here, while the store is away: is it within this process's part?"""
        if self.lost or (pays and not self._allow and any(of.has_budget for of in hold.accounts)):
            return False

        async def take() -> None:
            await super(RedisLedger, self).admit(hold, pays=pays, shares=shares)
            try:
                if worst:
                    await super(RedisLedger, self).hold(hold, worst, fit=fit)
            except APIError:
                self._release(hold)
                raise

        others = self._processes
        try:
            await take()
        except APIError:
            self._processes = 1
            await take()  # or it is refused for all
            self._release(hold)
            return False
        finally:
            self._processes = others
        hold.is_alone = True
        return True

    def _budgets(self, of: Limited) -> Iterator[Budget]:
        for budget in of.budgets:
            if (limit := budget.limit) is not None:
                known = of.account.windows[budget.name].known
                left = max(ZERO, limit - known) / max(1, self._processes)
                budget = budget._replace(limit=known + left)
            yield budget

    def book(
        self, hold: Hold, charges: Charges, *, model: str, failed: bool, tags: Sequence[str] = ()
    ) -> None:
        if hold.id or hold.is_alone:
            self._release(hold)
        if hold.pays and hold.accounts:
            self._holds.pop(hold.id, None)
            self._charge(hold, counted(charges, model, failed), tags)
        else:
            self._give_back(hold)

    def _charge(
        self, hold: Hold, charges: Charges, tags: Iterable[str], batch: str = "", line: int = 0
    ) -> None:
        present, day, whole, rows = now(), day_of(hold.started), self.groups[GATEWAY], list[Any]()
        named = {*tags} - {EVERY_TAG}
        tagged = [(t, tally) for t in (EVERY_TAG, *named) for _, tally in charges] if named else []
        accounts = [*hold.accounts, *([whole] if tagged and whole not in hold.accounts else ())]
        used = {"gateway": tagged, "key": [(model or NO_MODEL, t) for model, t in charges]}
        tokens = sum(t.input_tokens + t.written + t.output_tokens for _, t in charges)
        amounts, is_tight = nanos(charges), False
        for of in accounts:
            spent = list[Any]()
            for budget in of.budgets if of is not whole or of.has_budget else ():
                start, amount = window_start(budget.duration, present), sum_for(budget, amounts)
                spent.append((budget.name, start, amount))
                window, limit = of.account.windows[budget.name], budget.limit
                window.spend = window.spent(start) + usd(amount)
                is_tight |= limit is not None and window.spend + window.held >= limit
            usage = self._usage(used.get(of.of, ()), day)
            rows.append({"w": spent, "u": usage, "a": True, "t": [tokens, of.tpm_limit or 0]})
            slots = of.max_parallel_requests
            is_tight |= slots is not None and of.account.running + 1 >= slots
            drawn = {"tokens": tokens, "requests": int(hold.is_late)}
            for kind, bucket in of.account.buckets.items():  # until the store says what is drawn
                if amount := drawn[kind]:
                    bucket.draw(amount, self._clock())
            if hold.is_late and of.rpm_limit:
                rows[-1]["r"] = of.rpm_limit
        if self._link is None and not (hold.id or batch):
            return self._sum(accounts, rows)
        self._count(accounts, rows, hold.id, batch, line)
        if is_tight and self._link is not None:  # room for the next, who comes behind this answer
            self._link.flush()

    def _count(
        self, accounts: Sequence[Limited], rows: Any, id: str = "", batch: str = "", line: int = 0
    ) -> None:
        places = [of.account.place for of in accounts]
        keys = [f"{PREFIX}batch:{batch}" if batch else places[0], *places]
        self._later(BOOK, keys, id, as_json(rows), str(line), told=accounts)

    def _sum(self, accounts: Sequence[Limited], rows: Sequence[dict[str, Any]]) -> None:
        """While Redis is away: add what is used, which so takes no more room the longer it is."""
        clock = self._clock()
        alike = [[*(each[:2] for each in row["w"]), row["t"][1:]] for row in rows]
        name = repr(([of.account.place for of in accounts], alike))
        for row in rows if name not in self._summed else ():
            row["t"] = Bucket(row["t"][1], clock, row["t"][0])  # what is drawn here comes back here
        _, sums = self._summed.setdefault(name, (accounts, rows))
        for total, row in zip(sums, rows, strict=True) if sums is not rows else ():
            pairs = zip(total["w"], row["w"], strict=True)
            total["w"] = [(*window, amount + more) for (*window, amount), (*_, more) in pairs]
            total["t"].draw(row["t"][0], clock)
            known = {(day, model): counts for day, model, counts, _ in total["u"]}
            for day, model, counts, kept in row["u"]:
                is_new = (day, model) not in known
                if is_new and sum(each == day for each, _ in known) >= MAX_MODELS_A_DAY:
                    model = OTHER_MODELS
                if (day, model) not in known:
                    total["u"].append((day, model, known.setdefault((day, model), {}), kept))
                for what, count in counts.items():
                    known[day, model][what] = known[day, model].get(what, 0) + count

    async def _write_summed(self) -> None:
        while self._summed:
            _, (accounts, rows) = self._summed.popitem()
            for of, row in zip(accounts, rows, strict=True):
                starts = {b.name: window_start(b.duration, now()) for b in of.budgets}
                bucket = row["t"]
                row["t"] = int(bucket.limit - bucket.level(self._clock())), bucket.limit
                # To a window that is over it is too late, and the next one has no part in it.
                row["w"] = [(w, at, n if at == starts.get(w) else 0) for w, at, n in row["w"]]
            self._count(accounts, rows)
            if len(self._summed) % NAMES_A_TRIP == 0:  # others have their turn
                await asyncio.sleep(0)
        logs, self._logs = self._logs, {}
        for name, rows in logs.items():
            for start in range(0, len(rows), NAMES_A_TRIP):
                part = itertools.islice(rows, start, start + NAMES_A_TRIP)
                self.log(name, cast(int, rows.maxlen), part)

    def _booked(self, accounts: Sequence[Limited], told: Sequence[Sequence[int]]) -> None:
        """Tell which marks were passed: the script says it to one process alone."""
        for of, amounts in zip(accounts, told, strict=False):
            for budget, before, after in zip(of.budgets, amounts[::2], amounts[1::2], strict=False):
                window = of.account.windows[budget.name]
                window.spend = window.known = usd(after)
                if after > before:
                    self._warn(of, budget, usd(before), usd(after))

    # Batches

    async def unbooked(self, name: str) -> Batch | None:
        async with self._asking():
            row = await self._redis.hgetall(f"{PREFIX}batch:{name}")
            if not row or row["booked"] == "1":
                self._booking.pop(name, None)
                return None
            hashed = await self._redis.hget(f"{PREFIX}owners", row["owner"]) or ""
            if key := await self._read(hashed, former=True):
                await self._join([key])
                self._booking[name] = key, json.loads(row["held"]), int(row["lines"])
        return Batch(row["day"], int(row["lines"]))

    async def watched(self) -> list[str]:
        async with self._asking():
            return sorted(await self._redis.smembers(f"{PREFIX}unbooked"))

    async def take(self, name: str) -> bool:
        async with self._asking():
            look = f"{PREFIX}look:{name}"
            is_mine = await self._redis.set(look, self._process, nx=True, px=int(LEASE * 1000))
            return bool(is_mine) or await self._redis.get(look) == self._process

    async def leave(self, name: str) -> None:
        with contextlib.suppress(*self._errors):
            await self._redis.delete(f"{PREFIX}look:{name}")

    def own_batch(self, account: Account, name: str, hold: Hold) -> None:
        self.finish_batch(name)
        if hold.is_alone:  # what was held here is held there
            hold.costs = [
                (of.account.place, budget, str(nano(amount)))
                for of, amounts in zip(hold.accounts, hold.amounts, strict=False)
                for budget, amount in amounts.items()
            ]
            self._release(hold)
            hold.is_alone, hold.amounts = False, ()
        owner = next(of.owner for of in hold.accounts if isinstance(of, VirtualKey))
        row = ["owner", owner, "day", day_of(now()), "lines", 0, "booked", 0]
        keys = [f"{PREFIX}batch:{name}", f"{PREFIX}unbooked", *self._holds.pop(hold.id, ())]
        self._later(KEEP, keys, hold.id, name, as_json(hold.costs), as_json(row))
        hold.id, hold.costs = "", []

    def book_line(self, name: str, line: int, charges: Charges) -> VirtualKey | None:
        key, held, lines = self._booking.get(name, (None, (), 0))
        if key is None or line <= lines:
            return None
        self._booking[name] = key, held, line
        self._charge(Hold(self.limited(key), now()), charges, key.tags, name, line)
        return key

    def finish_batch(self, name: str, *, lost: bool = False) -> None:
        key, held, _ = self._booking.pop(name, (None, (), 0))
        accounts, rows, moment = self.limited(key) if key and lost else (), list[Any](), now()
        for of in accounts:
            costs = {w: int(cost) for place, w, cost in held if place == of.account.place}
            starts = {b.name: window_start(b.duration, moment) for b in of.budgets}
            total = [(NO_MODEL, Tally(spend=usd(max(costs.values(), default=0))))]
            usage = self._usage(total if of is key else (), day_of(moment))
            spent = [(w, start, costs.get(w, 0)) for w, start in starts.items()]
            rows.append({"w": spent, "u": usage})
        places = [of.account.place for of in accounts]
        keys = [f"{PREFIX}batch:{name}", f"{PREFIX}unbooked", *places]
        self._later(FINISH, keys, name, as_json(rows), self._usage_days * 86400)
        if key and lost:
            text = "key %s: batch %s is gone, so its worst case is booked"
            log.warning(text, key.shown_name, name)

    # Things

    async def find_things(self, names: Iterable[object]) -> dict[str, Thing]:
        asked = [n for n in names if isinstance(n, str) and n.isprintable()]  # no id is else
        async with self._asking():
            texts = await self._redis.hmget(f"{PREFIX}things", asked) if asked else []
            rows = {name: json.loads(text) for name, text in zip(asked, texts) if text}
            owners = sorted({owner for owner, *_ in rows.values()})
            hashes = await self._redis.hmget(f"{PREFIX}owners", owners) if owners else []
            records: Any = await self._records([*filter(None, hashes)])
        keys, found = {key.owner: key for key in records.values()}, dict[str, Thing]()
        for name, (owner, kind, home, made, is_shared) in rows.items():
            found[name] = Thing(kind, owner, keys.get(owner), is_shared, home, made)
        return found

    async def reached(self, key: VirtualKey, kind: str) -> dict[str, float]:
        owners = {key.owner, "+"}
        async with self._asking():
            if key.team_id and key.resources == "team":
                sets = [f"{PREFIX}{of}:team:{key.team_id}" for of in ("members", "deleted")]
                mates: Any = await self._records([*await self._redis.sunion(sets)])
                owners |= {mate.owner for mate in mates.values()}
            async with self._redis.pipeline(transaction=False) as pipe:
                for owner in owners:
                    pipe.zrange(f"{PREFIX}made:{kind}:{owner}", 0, -1, withscores=True)
                return dict(itertools.chain(*await pipe.execute()))

    async def own(self, born: Mapping[tuple[str, str], Mapping[str, float]], home: str) -> None:
        known, names = dict[str, Thing](), {name for made in born.values() for name in made}
        with contextlib.suppress(APIError):
            known = await self.find_things(names)
        for (owner, kind), made in born.items():
            fresh = made.keys() - known.keys()
            self._change("made", owner, [[name, kind, home, made[name]] for name in fresh])
        try:
            if names - known.keys():
                await asyncio.shield(self.save())
        except APIError as error:
            why = error.message.removesuffix(RETRY)
            text = f"{why} What was made is there, and is remembered later."
            raise APIError(503, text, headers=[DO_NOT_RETRY]) from None

    async def assign(self, kinds: Mapping[str, str], owner: str | None) -> None:
        async with self._asking():  # else nothing is changed
            rows = [[name, kind, "", now().timestamp()] for name, kind in kinds.items()]
        self._change("shared" if owner is None else "given", owner or "", rows)
        await asyncio.shield(self.save())

    def forget(self, name: str, owner: str | None) -> None:
        self._change("gone", "*" if owner is None else owner, [[name, "", "", 0]])

    def _change(self, deed: str, owner: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows := [row for row in rows if row[0].isprintable()]:
            self._later(THINGS, [f"{PREFIX}things"], json.dumps([deed, owner, rows]))

    async def list_things(self, owner: str | None, kind: str, first: int, most: int) -> Page:
        made = f"{PREFIX}made:{kind}:{'*' if owner is None else owner}"
        async with self._asking():
            names = await self._redis.zrange(made, first, first + most - 1)
            return await self._redis.zcard(made), names

    # What is remembered for all

    async def keep(self, name: str, value: str, seconds: float, most: int = 0) -> bool:
        at, alike = f"{PREFIX}kept:{name}", f"{PREFIX}alike:{value}"
        async with self._asking():
            if not await self._redis.set(at, value, nx=True, px=int(seconds * 1000)):
                return False
            if most and await self._redis.rpush(alike, at) > most:
                await self._redis.delete(await self._redis.lpop(alike))
            await self._redis.expire(alike, math.ceil(seconds))
        return True

    async def recall(self, name: str) -> str:
        async with self._asking():
            return await self._redis.get(f"{PREFIX}kept:{name}") or ""

    async def drop(self, name: str) -> None:
        async with self._asking():
            if value := await self._redis.getdel(at := f"{PREFIX}kept:{name}"):
                await self._redis.lrem(f"{PREFIX}alike:{value}", 0, at)

    def log(self, name: str, most: int, rows: Iterable[bytes]) -> None:
        if self._link is None:
            return super().log(name, most, rows)
        self._later(LOG, [f"{PREFIX}{name}"], most, *rows)

    async def logged(self, name: str) -> AsyncIterator[bytes]:
        await self.save()
        at = "+"
        while at:
            async with self._asking():
                rows = await self._redis.xrevrange(f"{PREFIX}{name}", at, count=NAMES_A_TRIP)
            for _, row in rows:
                yield row["row"].encode()
            at = f"({rows[-1][0]}" if rows else ""

    # Copying

    async def take_in(self, source: FileLedger, tell: Callable[[str], None]) -> Sums:
        """Fill a store that has no keys with all that a file has, over what a broken try left.
        STORE comes last, when all was read back; till then there is none. Raises SettingsError."""
        redis, sums, groups, things = self._redis, Sums(), source.groups, source.things
        groups[GATEWAY].account.place = self.groups[GATEWAY].account.place
        records = [*groups.values(), *source.keys.values()]
        await self.look()
        with self._starting():
            if await redis.exists(STORE) and self.count:
                raise SettingsError(f"--import: {self._shown} holds keys already")
            await redis.delete(STORE)
            left = [name async for name in redis.scan_iter(f"{PREFIX}*", NAMES_A_TRIP)]
            for start in range(0, len(left), NAMES_A_TRIP):
                await redis.unlink(*left[start : start + NAMES_A_TRIP])
            pipe = redis.pipeline(transaction=False).set(REVISION, len(records)).set(IMPORTING, 1)
            for number, of in enumerate(records):
                if number % LOOKED_AT == 0:
                    await pipe.execute()
                if number % TOLD_OF == 0:
                    tell(f"{number:,} of {len(records):,} records")
                if of.of != "gateway":
                    self._put(pipe, of.account.hashed, of, str(number))
                self._put_used(pipe, of, source)
                self._count_in(sums, of)
            for name, (owner, kind, home) in things.places.items():
                made, is_shared = things.made[owner, kind][name], name in things.shared
                pipe.hset(f"{PREFIX}things", name, as_json((owner, kind, home, made, is_shared)))
                sets = ":*", f":{owner}", f"{kind}:*", f"{kind}:{owner}", f"{kind}:+"
                for at in sets if is_shared else sets[:-1]:
                    pipe.zadd(f"{PREFIX}made:{at}", {name: made})
                if len(pipe) > NAMES_A_TRIP:
                    await pipe.execute()
            await pipe.execute()
            self._link, self.away = await Link.open(redis.connection_pool), ""
            sums["things"] = len(things.places)
            found = Sums(things=await redis.hlen(f"{PREFIX}things"))
            async for of in self._everything():
                self._count_in(found, of)
            if found != sums:
                wrong = f"{dict(found - sums)} too many, {dict(sums - found)} too few"
                raise SettingsError(f"--import: what was written is not what was read: {wrong}")
            await redis.pipeline().set(STORE, self._process, nx=True).delete(IMPORTING).execute()
            while self._waits:  # as long as the disk takes for all
                with contextlib.suppress(StoreAway):
                    await self._sync()
                    break
        return sums

    def _put_used(self, pipe: Any, of: Limited, source: FileLedger) -> None:
        """Queue what a record has used, and its batches."""
        account, place, kept = of.account, of.account.place, (self._usage_days + 1) * 86400
        for day, model, tally in account.usage.days(self._oldest):
            at, counts = f"{place}:{day}", tally.to_json() | {"spend": nano(tally.spend)}
            pipe.hset(at, mapping={f"{model}\0{name}": count for name, count in counts.items()})
            pipe.expire(at, kept).hset(place, f"day:{day}", 1)
        for name, w in account.windows.items():
            pipe.hset(place, mapping={f"start:{name}": w.start, f"spent:{name}": nano(w.spend)})
        if account.last_active:
            pipe.hset(place, "active", int(account.last_active.timestamp()))
        for name, batch in account.batches.items():
            at, held = f"{PREFIX}batch:{name}", list[tuple[str, str, str]]()
            for whose, amounts in ({account.hashed: batch.held} | batch.beside).items():
                if other := source.record(whose):
                    held += [(other.account.place, w, str(nano(n))) for w, n in amounts.items()]
            for whose, budget, amount in held:
                pipe.hincrby(whose, f"held:{budget}", amount)
            row = {"owner": cast(VirtualKey, of).owner, "day": batch.day, "lines": batch.lines}
            pipe.hset(at, mapping=row | {"booked": int(batch.booked), "held": as_json(held)})
            pipe.expire(at, kept) if batch.booked else pipe.sadd(f"{PREFIX}unbooked", name)

    async def give_out(self, path: Path, tell: Callable[[str], None]) -> Sums:
        """Write all into a keys file, and one of resources, that are not there yet. While gateways
        run, what they use and make meanwhile is there in part: batches are read first, then some
        records at a time, then things. Raises SettingsError."""
        sums, lines, things, today = Sums(), list[bytes](), Things(), day_of(now())
        files = {Path(f"{path}.resources"): THINGS_FRAME, path: KEYS_FRAME}
        if there := [*filter(os.path.lexists, files)]:
            raise SettingsError(f"--export: {there[0]} is there already; name another file")
        with self._starting():
            async for of in self._everything():
                if len(lines) % TOLD_OF == 0:
                    tell(f"{len(lines):,} records")
                self._count_in(sums, of)
                lines.append(store_line(of.account.hashed, of, today, self._oldest))
            async for name, text in self._redis.hscan_iter(f"{PREFIX}things", count=NAMES_A_TRIP):
                owner, kind, home, made, is_shared = json.loads(text)
                things.change({"key": owner, "kind": kind, "home": home, "made": {name: made}})
                things.shared |= {name} if is_shared else set()
        for (file, frame), each in zip(files.items(), (things.lines(), lines), strict=True):
            with blaming(f"--export: {file}"):
                StoreFile(file, frame, "", "").write(each)
        sums["things"] = len(things.places)
        return sums

    async def _everything(self) -> AsyncIterator[Limited]:
        """Every record, with all that it used and its batches."""
        days, batches = (self._oldest, "9999"), collections.defaultdict[str, Any](dict)
        async for at in self._redis.scan_iter(f"{PREFIX}batch:*", NAMES_A_TRIP):
            if row := await self._redis.hgetall(at):
                batches[row["owner"]][at.removeprefix(f"{PREFIX}batch:")] = row
        yield (whole := await self.whole(days))
        names = {whole.account.place: GATEWAY}
        for kind in (*GROUPS, "key"):
            async for of in self.each(kind, days=days):
                account, names[of.account.place] = of.account, of.account.hashed
                own = batches.pop(of.owner, {}) if isinstance(of, VirtualKey) else {}
                for name, row in own.items():
                    held = dict[str, dict[str, Decimal]]()
                    for place, window, amount in json.loads(row["held"]):
                        held.setdefault(names.get(place, ""), {})[window] = usd(amount)
                    told = row["day"], int(row["lines"]), held.pop(account.hashed, {})
                    account.batches[name] = Batch(*told, row["booked"] == "1", held)
                yield of

    def _count_in(self, sums: Sums, of: Limited) -> None:
        """Count a record in, and what it used: amounts are nano-dollars."""
        tallies = [tally for *_, tally in of.account.usage.days(self._oldest)]
        tagged = "tagged " * (of.of == "gateway")
        counts = {} if tagged else {f"{of.of}s": 1, "batches": len(of.account.batches)}
        counts["spent of budgets"] = sum(nano(w.spend) for w in of.account.windows.values())
        counts[f"{tagged}requests"] = sum(tally.requests for tally in tallies)
        sums.update(counts | {f"{tagged}spent": sum(nano(tally.spend) for tally in tallies)})

    # Changing

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        async with self._turn:
            async with self._asking():
                waits: Any = {"sleep": 0.02, "blocking_timeout": LOCK_LEASE, "thread_local": False}
                self._lock = lock = self._redis.lock(f"{PREFIX}lock", LOCK_LEASE, **waits)
                if not await lock.acquire():
                    raise StoreAway("another change is under way")
            try:
                yield
            finally:
                self._lock = None
                with contextlib.suppress(*self._errors):
                    await lock.release()

    async def change(self, changes: Mapping[str, Limited | None]) -> None:
        if self._lock is None:
            async with self.changing():
                return await self.change(changes)
        async with self._asking():
            before = await self._records([*changes])
            async with self._redis.pipeline(transaction=True) as pipe:
                watched = STORE, f"{PREFIX}lock", REVISION
                await pipe.watch(*watched)
                *there, revision = await pipe.mget(watched)
                if there != [self._id, self._lock.local.token.decode()]:
                    raise StoreAway("the change took too long")
                pipe.multi()
                pipe.incrby(REVISION, len(changes))
                # Each has a number of its own, the order of reports.
                for number, (name, record) in enumerate(changes.items(), int(revision or 0) + 1):
                    if old := before.get(name):
                        self._take(pipe, name, old, is_gone=record is None)
                    if record is not None:
                        self._put(pipe, name, record, str(number))
                    pipe.xadd(CHANGES, {"name": name}, maxlen=CHANGES_KEPT)
                await pipe.execute()
            await self._sync()
        self._forget(*changes)

    def _put(self, pipe: Any, name: str, record: Limited, revision: str) -> None:
        """Queue what keeps a record and finds it."""
        account, bare = record.account, dataclasses.replace(record, account=Account())
        account.hashed = name
        if isinstance(record, VirtualKey):
            id = record.owner_id = record.owner_id or name
            team = record.team_id
            pipe.hset(f"{PREFIX}owners", id, name)
            for old in record.retired:
                pipe.hset(f"{PREFIX}retired", old, name)
            if record.key_alias and not record.deleted_at:
                pipe.hset(f"{PREFIX}alias", record.key_alias, name)
            for group in group_names(record):  # what it made others of its team still reach
                pipe.sadd(f"{PREFIX}{'deleted' if record.deleted_at else 'members'}:{group}", name)
        else:
            # One that is made anew begins without what requests and batches of the old one held.
            id, team = f"{name}:{revision}", getattr(record, "team_id", None)
        quote = functools.partial(urllib.parse.quote, errors="surrogatepass")
        tag, rest = quote(team or id, safe=""), quote(id, safe=":")
        account.place = account.place or f"{PREFIX}{{{tag}}}:{rest}"
        row = {"rev": revision, "place": account.place, "record": bare.to_json()}
        pipe.set(f"{PREFIX}record:{name}", json.dumps(row, default=written))
        pipe.hset(account.place, "rev", revision)
        pipe.zadd(f"{PREFIX}{record.of}", {name: revision}, nx=True)

    def _take(self, pipe: Any, name: str, record: Limited, *, is_gone: bool) -> None:
        """Queue what takes an earlier version of a record out, or a record that ``is_gone``."""
        if isinstance(record, VirtualKey):
            for group in group_names(record):
                pipe.srem(f"{PREFIX}members:{group}", name)
            if record.key_alias:
                pipe.hdel(f"{PREFIX}alias", record.key_alias)
            if record.retired:
                pipe.hdel(f"{PREFIX}retired", *record.retired)
        elif is_gone:
            place = record.account.place
            pipe.delete(place, f"{place}:leases", f"{place}:holds")
        if is_gone:
            pipe.delete(f"{PREFIX}record:{name}")
            pipe.zrem(f"{PREFIX}{record.of}", name)

    async def reset_spend(self, record: Limited, amount: Decimal) -> None:
        budget, place = record.budgets[0], record.account.place
        window = record.account.windows[budget.name]
        window.start, window.spend = window_start(budget.duration, now()), amount
        said = {f"start:{budget.name}": window.start, f"spent:{budget.name}": nano(amount)}
        async with self._asking():
            await self._redis.hset(place, mapping=said)
            await self._sync()

    async def reload(self) -> None:
        self._forget()

    def notice_edit(self) -> None:
        """What is in Redis is changed by the gateway alone."""

    # Reports

    async def find(self, by: str, name: str, *, former: bool = False) -> Limited | None:
        async with self._asking():
            at = f"{by.removesuffix('_id')}:{name}"
            if by == "key":
                at = name if HASH.fullmatch(name) else hash_key(name)
            elif by == "key_alias":
                at = await self._redis.hget(f"{PREFIX}alias", name) or ""
            found = await self._read(at, former=former)
            if found is None or getattr(found, "deleted_at", None):
                return None
            if found.account.hashed != at and found.retired[at] <= now():
                return None
            whole = self.groups[GATEWAY]
            await self._look([found, *([whole] if whole.has_budget else ())], ("", "9999"))
            return cast(Limited, found)

    async def each(
        self, kind: str = "key", *, days: tuple[str, str] | None = None, **named: str
    ) -> AsyncIterator[Limited]:
        every, names, last = f"{PREFIX}{kind}", list[str](), 0.0
        async with self._asking():
            for by, of in named.items():
                members = f"{PREFIX}members:{by.removesuffix('_id')}:{of}"
                names = await self._redis.zinter({every: 1, members: 0})
        while True:
            async with self._asking():
                part, names = names[:LOOKED_AT], names[LOOKED_AT:]
                if not named:
                    span = f"({last:.0f}", "inf", 0, LOOKED_AT
                    told = await self._redis.zrangebyscore(every, *span, withscores=True)
                    part, last = [name for name, _ in told], told[-1][1] if told else last
                records = [*(await self._records(part)).values()]
                await self._look(records, days)
            for record in records:
                yield record
            if len(part) < LOOKED_AT:
                return

    async def whole(self, days: tuple[str, str]) -> Limited:
        whole = Limited(account=Account(hashed=GATEWAY, place=self.groups[GATEWAY].account.place))
        async with self._asking():
            await self._look([whole], days)
        return whole

    async def _look(
        self, records: Sequence[Limited], days: tuple[str, str] | None, *, is_hot: bool = False
    ) -> None:
        """Read what these have used, and their teams and users, with usage of these days; where
        ``is_hot``, in accounts that all versions of a record share."""
        keys = [of for of in records if isinstance(of, VirtualKey)]
        every = {of.account.place: of for of in (*await self._join(keys), *records)}
        for place, of in every.items() if is_hot else ():
            account, of.account = of.account, self._accounts.setdefault(place, of.account)
            of.account.beside, of.account.hashed = account.beside, account.hashed
        found = await self._run(LOOK, [*every], *days or ("none", ""))
        for of, (row, running, used) in zip(every.values(), found, strict=True):
            self._fill(of, dict(zip(row[::2], row[1::2])), dict(zip(used[::2], used[1::2])))
            of.account.running = running

    def _fill(self, of: Limited, row: Mapping[str, str], used: Mapping[str, list[str]]) -> None:
        """Make an account of what Redis has of it."""
        account, moment, clock = of.account, time.time() + CLOCK.ahead, self._clock()
        self._fit_buckets(of)
        for name, value in row.items():
            what, _, window = name.partition(":")
            if what == "start":
                account.windows[window].start = value
            elif what == "spent":
                account.windows[window].spend = account.windows[window].known = usd(value)
            elif what == "held":
                account.windows[window].held = usd(value)
            elif what == "drawn" and (bucket := account.buckets.get(window)):
                bucket.drawn = int(value) / 1e6
                bucket.seen = clock - (moment - int(row[f"seen:{window}"]) / 1e6)
            elif what == "active":
                account.last_active = moment_of(int(value))
        days = dict[str, dict[str, dict[str, Any]]]()
        for day, counts in used.items():
            for name, count in zip(counts[::2], counts[1::2], strict=True):
                model, _, what = name.rpartition("\0")
                tally = days.setdefault(day, {}).setdefault(model, {"spend": "0"})
                tally[what] = f"{usd(count):f}" if what == "spend" else int(count)
        account.usage = Usage(days)


# ─── Wire ─────────────────────────────────────────────────────────────────────────────────────────
#
# HTTP/1.1, once and apart from I/O: requests and responses are read by the same strict grammar, so
# that nobody makes the two sides disagree where a message ends (RFC 9112 section 11.2, smuggling).

MAX_HEAD_SIZE = 64 * KIB  # Tornado's default max_header_size
MAX_FIELDS = 200  # of a head; Apache's limit is 100, Node's 2,000
MAX_EMPTY_LINES = 4  # before a request; RFC 9112 section 2.2 speaks of one
CHUNKS_A_TURN = 1000  # of a body that are read before the loop may do something else …
READ_A_TURN = 256_000  # … and bytes of an answer: uvloop would read so many, 32 times over
MAX_CHUNK_LINE = 1 * KIB  # a chunk's size and extensions, or one trailer field
MAX_TRAILERS = 8 * KIB
CHUNKED = -1  # lengths of bodies that are not known beforehand
UNTIL_CLOSE = -2
LAST_CHUNK = b"0\r\n\r\n"
CHUNKED_LINE = "Transfer-Encoding: chunked"

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
METHOD = TOKEN[:-1] + "{1,32}"  # the longest that is registered has 16 characters (RFC 4437)
FIELD_VALUE = r"[\t\x20-\x7e\x80-\xff]*"  # RFC 9110 section 5.5: no CR, LF, NUL or other control
ABSOLUTE_TARGET = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE)
REQUEST_LINE = re.compile(rf"({METHOD}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.(?P<version>[01])")
STATUS_LINE = re.compile(rf"HTTP/1\.(?P<version>[01]) ([1-9][0-9]{{2}})(?: ({FIELD_VALUE}))?")
FIELD_LINE = re.compile(rf"{TOKEN}:{FIELD_VALUE}")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
CHUNK_START = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
BARE_LF = re.compile(rb"(?<!\r)\n")
# RFC 9110 section 7.6.1, and Proxy-Connection, which old clients send.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"}
HOP_BY_HOP |= {"proxy-connection", "trailer", "transfer-encoding", "upgrade"}
# These stay here too; some servers take the last three for the method, which rules have looked at.
DROPPED_REQUEST_FIELDS = HOP_BY_HOP | {"host", "content-length", "expect", "cookie", "forwarded"}
DROPPED_REQUEST_FIELDS |= {"authorization", "x-api-key"}
DROPPED_REQUEST_FIELDS |= {"x-http-method", "x-http-method-override", "x-method-override"}
DROPPED_REQUEST_PREFIXES = ("x-litellm-", "x-forwarded-")


class ProtocolError(APIError):
    """Bytes that are not HTTP/1.1, or not so that both sides must read them alike."""


class Field(NamedTuple):
    """A header field, and whether it goes on, up and down, unless ``Connection`` names it."""

    lower: str  # its name in lower case; below it as it came
    values: tuple[str, ...]  # its one value
    name: str
    line: str
    goes_up: bool
    goes_down: bool


NAME_AND_VALUES = operator.itemgetter(0, 1)
NO_OPTIONS: frozenset[str] = frozenset()
HeadParts = tuple[int, list[Field], dict[str, tuple[str, ...]], frozenset[str], bool, int | None]


@dataclass(slots=True)
class Head:
    """A message's head; ``version`` is HTTP/1's minor one, ``values`` are by lower-case name, the
    ``options`` of ``Connection`` in lower case; the ``length`` is in bytes, CHUNKED or not said."""

    version: int
    fields: list[Field]
    values: dict[str, tuple[str, ...]]
    options: frozenset[str]
    keeps_alive: bool  # whether the sender will reuse the connection (RFC 9112 section 9.3)
    length: int | None

    def get(self, name: str) -> str:
        """The first value of a field, by its lower-case name; empty where there is none."""
        values = self.values.get(name)
        return values[0] if values else ""

    @property
    def coding(self) -> str:
        """How the body is compressed (RFC 9110 section 8.4), in lower case; empty: it is not."""
        values = ",".join(self.values.get("content-encoding", ()))
        codings = map(str.strip, values.lower().split(","))
        return ", ".join(coding for coding in codings if coding not in ("", "identity"))


@dataclass(slots=True)
class RequestHead(Head):
    """``target`` is the raw request target, from its path on; ``host`` is whom it is for: the
    target's own authority, or the Host field's, empty where HTTP/1.0 has none."""

    method: str
    target: str
    host: str


@dataclass(slots=True)
class ResponseHead(Head):
    """A response's head, ``reason`` as it came."""

    status: int
    reason: str


def parse_head(data: bytes, start: re.Pattern[str]) -> tuple[re.Match[str], HeadParts]:
    """The start line of a message, and the members of its `Head`. Raises ProtocolError, also where
    RFC 9112 section 6 is lenient: two lengths, say, could be understood differently by readers."""
    line, _, block = data.decode("latin-1").partition("\r\n")
    match = start.fullmatch(line)
    if not match:
        raise ProtocolError(400, "the start line is malformed")
    version = int(match["version"])
    lines = block.split("\r\n") if block else []
    if len(lines) > MAX_FIELDS:
        raise ProtocolError(431, f"the head has more than {MAX_FIELDS:,} fields")
    fields = list(map(read_field if len(block) <= KEPT_HEAD else parse_field, lines))
    values = dict(map(NAME_AND_VALUES, fields))
    if len(values) < len(fields):
        values = {}
        for each in fields:
            values[each.lower] = values.get(each.lower, ()) + each.values
    options, keeps_alive, length = NO_OPTIONS, version == 1, None
    if "connection" in values:
        options = frozenset(map(str.strip, ",".join(values["connection"]).lower().split(",")))
        keeps_alive = "close" not in options and (version == 1 or "keep-alive" in options)
    if "transfer-encoding" in values:
        codings, length = values["transfer-encoding"], CHUNKED
        if "content-length" in values or version == 0 or len(codings) != 1:
            raise ProtocolError(400, "Transfer-Encoding is beside another length, or in HTTP/1.0")
        if codings[0].lower() != "chunked":
            raise ProtocolError(501, "the only transfer coding understood is chunked")
    elif "content-length" in values:
        lengths = values["content-length"]
        if len(lengths) != 1 or not LENGTH.fullmatch(lengths[0]):
            raise ProtocolError(400, "Content-Length is malformed or stands twice")
        length = int(lengths[0])
    return match, (version, fields, values, options, keeps_alive, length)


def parse_field(line: str) -> Field:
    """Read a field line, by RFC 9112 section 5 but without folding. Raises ProtocolError."""
    if not FIELD_LINE.fullmatch(line):
        raise ProtocolError(400, "a header field is malformed")
    name, _, value = line.partition(":")
    value, lower = value.strip(" \t"), name.lower()
    dropped = lower in DROPPED_REQUEST_FIELDS or lower.startswith(DROPPED_REQUEST_PREFIXES)
    return Field(lower, (value,), name, f"{name}: {value}", not dropped, lower not in HOP_BY_HOP)


KEPT_HEAD = 4 * KIB  # the lines of heads up to this size are read once, for they come again
read_field = functools.lru_cache(maxsize=512)(parse_field)


def parse_request_head(data: bytes) -> RequestHead:
    """Read what stands before the empty line of a request. Raises ProtocolError."""
    match, parts = parse_head(data, REQUEST_LINE)
    method, target, hosts = match[1], match[2], parts[2].get("host", ())
    if len(hosts) > 1 or (not hosts and parts[0] == 1):
        raise ProtocolError(400, "a request has exactly one Host field")  # RFC 9112 section 3.2
    host = hosts[0] if hosts else ""
    if not target.startswith("/") and (absolute := ABSOLUTE_TARGET.fullmatch(target)):
        host, path = absolute[1].rpartition("@")[2], absolute[2]  # RFC 9112 section 3.2.2
        target = path if path.startswith("/") else f"/{path}"
    return RequestHead(*parts, method, target, host)


def end_of_head(data: bytes, seen: int) -> int:
    """Where a head of which ``seen`` bytes are known ends; -1: not yet. Raises ProtocolError."""
    start = max(0, seen - 3)
    end = data.find(b"\r\n\r\n", start)
    if 0 <= end <= MAX_HEAD_SIZE:
        return end
    if len(data) > MAX_HEAD_SIZE:
        raise ProtocolError(431, f"the head is larger than {MAX_HEAD_SIZE:,} bytes")
    if BARE_LF.search(data, start):
        raise ProtocolError(400, "lines end with CR LF")
    return -1


ChunkLine = enum.Enum("ChunkLine", "SIZE END TRAILER")  # END stands behind a chunk's data


class Body:
    """Takes a body of ``length`` (bytes, CHUNKED, UNTIL_CLOSE) out of a connection's bytes, by RFC
    9112 sections 6 and 7.1; chunk extensions and trailers are dropped, as section 7.1.1 asks."""

    __slots__ = ("_left", "_next", "_partial", "_trailers", "complete", "length")

    def __init__(self, length: int) -> None:
        self.length, self.complete = length, length == 0
        self._left = max(length, 0)  # of the body, or of a chunk
        self._next, self._partial, self._trailers = ChunkLine.SIZE, b"", 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What of these bytes is body, and what stands behind it: after the body where that is
        `complete`, else chunks that are for another turn of the loop. Raises ProtocolError."""
        if self.length == UNTIL_CLOSE:
            return data, b""
        if self.complete:
            return b"", data
        if self.length != CHUNKED:
            payload, rest = data[: self._left], data[self._left :]
            self._left -= len(payload)
            self.complete = self._left == 0
            return payload, rest
        if self._partial:
            data, self._partial = self._partial + data, b""
        elif self._next is ChunkLine.SIZE and (match := CHUNK_START.match(data)):
            # Mostly a read brings just one chunk, as an event was sent.
            start, size = match.end(), int(match[1], 16)
            if size and len(data) == start + size + 2 and data.endswith(b"\r\n"):
                return data[start:-2], b""
        pieces, at, available = list[bytes](), 0, len(data)
        while at < available and len(pieces) < CHUNKS_A_TURN:
            if self._next is ChunkLine.SIZE and (match := CHUNK_START.match(data, at)):
                start, end = match.end(), match.end() + int(match[1], 16)
                if start < end and data.startswith(b"\r\n", end):  # or many whole ones
                    pieces.append(data[start:end])
                    at = end + 2
                    continue
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                pieces.append(piece)
                if self._left:
                    break
            end = data.find(b"\r\n", at)
            if end < 0 or end - at > MAX_CHUNK_LINE:
                if len(data) - at > MAX_CHUNK_LINE or BARE_LF.search(data, at):
                    raise ProtocolError(400, "a chunk's size line is malformed")
                self._partial, at = data[at:], len(data)
                break
            line, at = data[at:end], end + 2
            if self._next is ChunkLine.SIZE:
                if not (match := CHUNK_SIZE.fullmatch(line)):
                    raise ProtocolError(400, "a chunk's size line is malformed")
                self._left = int(match[1], 16)
                self._next = ChunkLine.END if self._left else ChunkLine.TRAILER
            elif self._next is ChunkLine.END:
                if line:
                    raise ProtocolError(400, "a chunk is longer than its size")
                self._next = ChunkLine.SIZE
            elif line:
                self._trailers += len(line)
                if self._trailers > MAX_TRAILERS:
                    raise ProtocolError(400, "the trailer section is too large")
                parse_field(line.decode("latin-1"))
            else:
                self.complete = True
                break
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), data[at:]


def head_bytes(start_line: str, lines: Iterable[str]) -> bytes:
    """A message head as it goes over the wire, of its start line and field lines."""
    return "\r\n".join([start_line, *lines, "\r\n"]).encode("latin-1")


def framed(data: bytes) -> bytes:
    """Data as one chunk of the chunked coding; empty for empty data, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


ClientPhase = enum.StrEnum("ClientPhase", "WAITING READING ANSWERING DROPPING LINGERING GONE")
UpstreamPhase = enum.StrEnum("UpstreamPhase", "IDLE ASKED ANSWERED SHUT")
RequestPhase = enum.StrEnum("RequestPhase", "JUDGED FETCHED BEGUN DESERTED SETTLED")
GatewayPhase = enum.StrEnum("GatewayPhase", "SERVING LEAVING DRAINING STOPPED")
C, U, R = ClientPhase, UpstreamPhase, RequestPhase  # of either side's connections, of relayed ones
G = GatewayPhase
STEPS: dict[str, tuple[enum.StrEnum, ...]] = {
    C.WAITING: (C.READING, C.LINGERING, C.GONE),  # for a request's head
    C.READING: (C.ANSWERING, C.DROPPING, C.LINGERING, C.GONE),  # whose answer is not over
    C.ANSWERING: (C.WAITING, C.LINGERING, C.GONE),  # a request that is read whole
    C.DROPPING: (C.WAITING, C.LINGERING, C.GONE),  # the rest of one that was answered
    C.LINGERING: (C.GONE,),  # so that the last answer arrives
    C.GONE: (),
    U.IDLE: (U.ASKED, U.SHUT),
    U.ASKED: (U.ANSWERED, U.SHUT),  # the request goes up, and no head came back
    U.ANSWERED: (U.IDLE, U.SHUT),  # it came
    U.SHUT: (),
    R.JUDGED: (R.FETCHED, R.SETTLED),  # by its head, then by its body
    R.FETCHED: (R.BEGUN, R.DESERTED, R.SETTLED),  # the upstream is asked
    R.BEGUN: (R.DESERTED, R.SETTLED),  # its answer's head is sent
    R.DESERTED: (R.SETTLED,),  # the client left, and the answer is awaited all the same
    R.SETTLED: (),  # booked and logged
    G.SERVING: (G.LEAVING, G.DRAINING),
    G.LEAVING: (G.DRAINING,),  # a shared port to others; who is here already gets an answer
    G.DRAINING: (G.STOPPED,),  # requests under way have some time to end
    G.STOPPED: (),  # what has not ended is broken off
}
# ``phase = FOLLOWS[phase][next]`` is how one goes on; a KeyError is a mistake in this file.
FOLLOWS: dict[str, dict[Any, Any]] = {each: dict(zip(then, then)) for each, then in STEPS.items()}


# ─── Client ───────────────────────────────────────────────────────────────────────────────────────

WRITE_HIGH_WATER = 64 * KIB  # in a socket's write buffer: its source is held then
JOINED_BODY = 16 * KIB  # a larger one is not copied behind its head
MAX_INFORMATIONAL = 10  # 1xx responses before the real one; Tornado's limit
POOL_IDLE_TIMEOUT = 55.0  # seconds; load balancers commonly drop idle connections after 60
ADDRESS_TTL = 30.0  # seconds for which an address that was reached is not resolved anew
REACH_AGAIN_TIMEOUT = 3.0  # seconds for it to answer, before it is
SWEEP_INTERVAL = 1.0  # seconds between looks for silent requests and idle connections
NO_ANSWER = 599  # Tornado's status where there is none


class UpstreamError(APIError):
    """The upstream did not answer as it should: ``status`` is 502, or 504 where it kept silent."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(status, message)


# The ways in which a connection fails, special ones first, and what is said of each.
FAILURES: Sequence[tuple[type[BaseException], str]] = (
    (TimeoutError, "The upstream could not be reached within {timeout:g} seconds."),
    (socket.gaierror, "The upstream's host name could not be resolved."),
    (ssl.CertificateError, "The upstream's certificate is not trusted: {error.verify_message}."),
    (ssl.SSLError, "The TLS handshake with the upstream failed."),
    (ConnectionRefusedError, "The upstream refused the connection."),
    (ConnectionError, "The upstream closed the connection while it was being opened."),
    (OSError, "The upstream cannot be reached: {error.strerror}."),
    (HTTPClientError, "The upstream gave no whole answer: {error}."),  # Tornado's own
)


def connect_failure(error: BaseException, timeout: float) -> UpstreamError:
    """The way in which a connection failed, in words for whoever runs the gateway."""
    if isinstance(error, StreamClosedError):
        error = error.real_error or ConnectionResetError()
    for kind, text in FAILURES:
        if isinstance(error, kind):
            status = 504 if kind is TimeoutError else 502
            return UpstreamError(text.format(error=error, timeout=timeout), status)
    log.error("connecting upstream failed", exc_info=error)
    return UpstreamError("The upstream cannot be reached.")


class UpstreamRequest(HTTPRequest):
    """What `UpstreamClient.fetch` takes: ``head`` goes up as it is, then ``data``, or the body that
    ``body_producer``, called with `write`, sends until the future that it returns is done.
    ``header_callback`` gets each `ResponseHead`, 1xx ones too; then ``length`` is the body's
    (bytes, CHUNKED or UNTIL_CLOSE). ``streaming_callback`` gets what one read brought of the body,
    empty right after the head, with ``complete`` true at the last; no more is read before what it
    returns is done. ``error_callback`` gets what went wrong, at once."""

    body_producer: Callable[..., asyncio.Future[Any]] | None
    client: UpstreamClient
    connection: UpstreamConnection | None = None
    connecting: asyncio.Task[None] | None = None  # where none was kept
    fetched: asyncio.Future[Any] | None = None  # while it is under way
    room: asyncio.Future[None] | None = None  # done when the upstream takes more of the body
    begun = 0.0  # when its head went up
    touched = 0.0  # when something last moved
    held_back = False  # its answer is not read
    length = 0
    complete = False

    def __init__(
        self,
        method: str,
        head: bytes,
        data: bytes,
        header_callback: Callable[[ResponseHead], None],
        streaming_callback: Callable[[bytes], asyncio.Future[Any] | None],
        error_callback: Callable[[Exception], None],
        body_producer: Callable[..., asyncio.Future[Any]] | None = None,
    ) -> None:
        # Not Tornado's, which makes 27 attributes that say nothing here.
        self.method, self.head, self.data, self.body_producer = method, head, data, body_producer
        self.on_head, self.on_chunk = header_callback, streaming_callback
        self.on_error = error_callback
        self.sent = body_producer is None  # all of the body is here
        self.repeatable = method in ("GET", "HEAD") and self.sent and not data

    def write(self, data: bytes) -> asyncio.Future[None]:
        """Send a part of the body; the future is done when the upstream takes more."""
        self.touched = self.client.time()
        if self.connection is not None:
            self.connection.transport.write(data)
        elif self.fetched is not None:
            self.data += data
        return self.room or self.client.done

    def make_room(self) -> None:
        """The upstream takes more."""
        self.touched = self.client.time()
        room, self.room = self.room, None
        if room is not None and not room.done():
            room.set_result(None)

    def body_ended(self, _: object) -> None:
        """What `body_producer` returned is done."""
        self.sent = True

    def end(self, error: Exception | None) -> None:
        """It is over, or given up: let go of all, and of a connection whose answer is not whole."""
        fetched, self.fetched = self.fetched, None
        if fetched is None:
            return
        self.client.requests.remove(self)
        connection, self.connection = self.connection, None
        if connection is not None and connection.request is self:
            connection.abandon()
        if self.connecting is not None:
            self.connecting.cancel()
        if self.room is not None:
            self.make_room()
        fetched.set_result(None)
        tell = self.on_error
        # No cycle of the caller's and this is left for the garbage collector.
        del self.on_head, self.on_chunk, self.on_error
        if error is not None:
            tell(error)


class UpstreamConnection(asyncio.Protocol):
    """A connection to the upstream, kept alive; it carries one `UpstreamRequest` at a time."""

    phase = UpstreamPhase.IDLE
    request: UpstreamRequest | None = None
    _body: Body | None = None
    _informational = 0
    _keep = False
    _buffer = b""  # of a head that is not whole, or what came while the answer was held back

    def __init__(self, client: UpstreamClient) -> None:
        self.client = client

    def ask(self, request: UpstreamRequest) -> None:
        """Send a request, as far as it is here."""
        self.phase = FOLLOWS[self.phase][UpstreamPhase.ASKED]
        self.request, request.connection = request, self
        self._body, self._informational = None, 0
        request.begun = request.touched = self.client.time()
        data, request.data = request.data, b""  # which is not kept for as long as the answer lasts
        if len(data) <= JOINED_BODY:
            self.transport.write(request.head + data)
        else:
            # Not writelines: Python 3.12 and 3.13 do not say then that the buffer is full.
            self.transport.write(request.head)
            self.transport.write(data)
        if request.room is not None and self.transport.get_write_buffer_size() <= WRITE_HIGH_WATER:
            request.make_room()

    def abandon(self) -> None:
        """Close at once, and say nothing to anyone."""
        self.request = None
        if self.phase is not UpstreamPhase.SHUT:
            self.phase = FOLLOWS[self.phase][UpstreamPhase.SHUT]
        self.client.idle.pop(self, None)
        self.transport.abort()

    # asyncio.Protocol: called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self.readable = select.poll()
        self.readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        request = self.request
        if request is None:  # bytes that belong to no request: nobody may see them
            self.abandon()
            return
        request.touched = self.client.time()
        if request.held_back:
            self._buffer += data
        else:
            self._receive(request, data)

    def eof_received(self) -> None:
        """The transport closes, and `connection_lost` follows."""
        request, body = self.request, self._body
        if request is not None and body is not None and body.length == UNTIL_CLOSE:
            body.complete = True
            if not request.held_back:
                self._receive(request, b"")

    def connection_lost(self, error: Exception | None) -> None:
        """It broke, or what it brought is not valid. A kept-alive one may have been closed as the
        request went up: a GET or HEAD is sent again then (RFC 9110 section 9.2.2), a POST never."""
        request = self.request
        if request is not None and request.held_back and request.sent:
            # Over TLS the end is told with the last bytes: the caller takes first what is here.
            self.phase = FOLLOWS[self.phase][UpstreamPhase.SHUT]
            return
        answered = self._body is not None or self._buffer or self._informational
        self.abandon()
        if request is None:
            return
        if request.repeatable and request.connecting is None and not answered:
            request.connection = None
            request.connecting = self.client.loop.create_task(self.client.connect(request))
        elif isinstance(error, ProtocolError):
            request.end(UpstreamError(f"The upstream's response is not valid HTTP: {error}."))
        else:
            when = "before its response was complete" if answered else "without answering"
            request.end(UpstreamError(f"The upstream closed the connection {when}."))

    def pause_writing(self) -> None:
        if self.request is not None and self.request.room is None:
            self.request.room = self.client.loop.create_future()

    def resume_writing(self) -> None:
        if self.request is not None:
            self.request.make_room()

    def _receive(self, request: UpstreamRequest, data: bytes) -> None:
        """Hand on what came, and hold back what follows until the caller has taken it."""
        try:
            if self._body is None:
                data = self._read_head(request, data)
            if (body := self._body) is None:
                return
            payload, rest = body.feed(data)
            if request is not self.request:  # its caller has given it up
                return
            request.complete = complete = body.complete
            if complete:
                # Back to the pool: another request may go as the caller takes the last of this one.
                self.request = None
                left = rest or not request.sent or request.room is not None
                if self._keep and not left and not self.transport.is_closing():
                    self.phase = FOLLOWS[self.phase][UpstreamPhase.IDLE]
                    self.client.idle[self] = request.touched
                else:
                    self.abandon()
            taken = request.on_chunk(payload)
        except ProtocolError as error:
            self.connection_lost(error)
            return
        except Exception as error:  # noqa: BLE001 - the caller's own code
            request.end(error)
            return
        waits = taken is not None and not taken.done()
        if complete and not waits:
            request.end(None)
        elif waits or rest or len(data) >= READ_A_TURN:  # a turn of the loop may take no more
            request.held_back = True
            (taken or self.client.done).add_done_callback(functools.partial(self._go_on, request))
            if request is self.request:
                self._buffer = rest
                self.transport.pause_reading()

    def _go_on(self, request: UpstreamRequest, taken: asyncio.Future[Any]) -> None:
        """What held the answer back is done: read on, first in what is here already."""
        error = None if taken.cancelled() else taken.exception()
        if error is not None or request.complete:
            request.end(cast("Exception | None", error))
        if request is not self.request:
            return
        request.held_back, request.touched = False, self.client.time()
        if self._buffer or (self._body is not None and self._body.complete):
            data, self._buffer = self._buffer, b""
            self._receive(request, data)
        if not request.held_back and self.phase is UpstreamPhase.SHUT:  # meanwhile
            self.connection_lost(None)
        elif not request.held_back or self.phase is UpstreamPhase.IDLE:  # for the next request
            self.transport.resume_reading()

    def _read_head(self, request: UpstreamRequest, data: bytes) -> bytes:
        """Read 1xx heads and the real one, with which the body begins; return what is behind it."""
        while True:
            data, seen = self._buffer + data, len(self._buffer)
            end = end_of_head(data, seen)
            self._buffer = data if end < 0 else b""
            if end < 0:
                return b""
            found, parts = parse_head(data[:end], STATUS_LINE)
            head, data = ResponseHead(*parts, int(found[2]), found[3] or ""), data[end + 4 :]
            if head.status >= 200:
                break
            self._informational += 1
            many = self._informational > MAX_INFORMATIONAL
            if many or head.status == 101 or head.length is not None:
                raise ProtocolError(400, "a 1xx response was not asked for, or has a body")
            request.on_head(head)
        self.phase = FOLLOWS[self.phase][UpstreamPhase.ANSWERED]
        length = UNTIL_CLOSE if head.length is None else head.length
        if request.method == "HEAD" or head.status in (204, 304):  # RFC 9112 section 6.3
            length = 0
        request.length, self._body = length, Body(length)
        self._keep = head.keeps_alive and length != UNTIL_CLOSE
        request.on_head(head)
        return data


class UpstreamClient(SimpleAsyncHTTPClient):
    """Tornado's `AsyncHTTPClient`, whose `fetch` also takes `UpstreamRequest`, any number at once:
    they go over kept-alive connections, or fail with an `UpstreamError`. ``opened`` connections and
    ``reused`` ones are counted; ``idle`` are those kept, with the moment (seconds) since when."""

    def initialize(self, settings: Settings) -> None:  # type: ignore[override]
        """Called by Tornado's constructor, with its keyword arguments."""
        # Tornado's own limits would hold up requests, and results of batches.
        super().initialize(max_clients=sys.maxsize, max_body_size=sys.maxsize)
        self.settings = settings
        self.origin, _ = parse_upstream(settings.upstream)
        self.time = time.monotonic
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Any] = self.loop.create_future()
        self.done.set_result(None)
        self.requests: set[UpstreamRequest] = set()
        self.opened = self.reused = 0
        self.idle: dict[UpstreamConnection, float] = {}
        self._reached: tuple[Any, float] = None, 0.0
        self._sweep()

    @functools.cached_property
    def ssl_context(self) -> ssl.SSLContext | None:
        """None over plain HTTP; slow to make. OpenSSL reads SSL_CERT_FILE and SSL_CERT_DIR."""
        if self.origin.scheme == "http":
            return None
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    def fetch(self, request: Any, *more: Any, **options: Any) -> asyncio.Future[HTTPResponse]:
        """Send a request; an `UpstreamRequest` has callbacks, and its future only says "over"."""
        if not isinstance(request, UpstreamRequest):
            return super().fetch(request, *more, **options)
        request.client = self
        request.fetched = fetched = self.loop.create_future()
        self.requests.add(request)
        while self.idle:
            connection, _ = self.idle.popitem()
            # The kernel knows of what the loop has not come to yet, be it the connection's end.
            if not connection.transport.is_closing() and not connection.readable.poll(0):
                self.reused += 1
                connection.ask(request)
                break
            connection.abandon()
        else:
            request.room = self.loop.create_future()
            request.connecting = self.loop.create_task(self.connect(request))
        if request.body_producer is not None:
            request.body_producer(request.write).add_done_callback(request.body_ended)
        return fetched

    async def get(self, path: str, limit: float, key: RealKey | None, **more: Any) -> HTTPResponse:
        """GET by Tornado's own client, within ``limit`` seconds; else raise UpstreamError."""
        settings, patience = self.settings, self.settings.connect_timeout
        headers = {"anthropic-version": ANTHROPIC_VERSION, "Accept-Encoding": "identity"}
        headers |= more.get("headers", {})
        if key is not None and key.name:
            headers |= [key.header]
        more |= {"headers": headers, "connect_timeout": patience, "request_timeout": limit}
        more |= {"follow_redirects": False, "decompress_response": False}
        try:
            url, more["ssl_options"] = settings.upstream.rstrip("/") + path, self.ssl_context
            return await self.fetch(url, raise_error=False, **more)
        except Exception as error:  # noqa: BLE001 - Tornado's own, the system's, or OpenSSL's
            raise connect_failure(error, patience) from None

    def close(self) -> None:
        """Close every connection; requests under way hear of no error."""
        self._sweeper.cancel()
        for request in list(self.requests):
            request.end(None)
        for connection in list(self.idle):
            connection.abandon()
        super().close()

    async def connect(self, request: UpstreamRequest) -> None:
        """Send a request over a new connection, which is tried twice, but not after a timeout."""
        timeout = self.settings.connect_timeout
        try:
            for is_last in (False, True):  # nothing was sent yet
                try:
                    async with asyncio.timeout(timeout):
                        connection = await self.reach()
                    if connection.transport.is_closing():
                        raise ConnectionResetError
                    break
                except OSError as error:
                    if is_last or isinstance(error, TimeoutError):
                        raise
            self.opened += 1
            connection.ask(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear
            request.end(connect_failure(error, timeout))

    async def reach(self) -> UpstreamConnection:
        """Open a connection to the address that was reached lately, or to what Tornado's TCPClient
        reaches first of both families; not over its IOStream: asyncio's transport costs less."""
        address, until = self._reached
        if self.time() < until:
            try:
                async with asyncio.timeout(REACH_AGAIN_TIMEOUT):
                    return await self._open(host=address[0], port=address[1])
            except BaseException as error:  # the connect timeout may be shorter, and cancel
                self._reached = None, 0.0
                if not isinstance(error, OSError):  # TimeoutError and ssl.SSLError are such
                    raise
        stream = await self.tcp_client.connect(self.origin.host, self.origin.port)
        if stream.closed():
            raise ConnectionResetError
        with contextlib.closing(stream):
            connected = stream.socket.dup()
        try:
            self._reached = connected.getpeername(), self.time() + ADDRESS_TTL
            return await self._open(sock=connected)
        except BaseException as error:
            connected.close()
            if self.ssl_context is not None and isinstance(error, ConnectionError):
                raise ssl.SSLError("the peer closed during the handshake") from None
            raise

    async def _open(self, **where: Any) -> UpstreamConnection:
        if self.ssl_context is not None:
            where |= {"ssl": self.ssl_context, "server_hostname": self.origin.host}
            # uvloop holds an attempt that was given up for as long, by default for a minute.
            where["ssl_handshake_timeout"] = self.settings.connect_timeout
        connect = functools.partial(UpstreamConnection, self)
        return (await self.loop.create_connection(connect, **where))[1]

    def _sweep(self) -> None:
        """Close what was long idle; give up what stands still, but not callers slow to send."""
        moment, limit = self.time(), self.settings.idle_timeout
        for request in list(self.requests):
            silent = request.connection is not None and moment - request.touched >= limit
            if silent and request.held_back:
                request.end(UpstreamError("The client stopped reading the response.", 504))
            elif silent and (request.sent or request.room is not None):
                request.end(UpstreamError(f"The upstream was silent for {limit:g} seconds.", 504))
        for connection, since in list(self.idle.items()):
            if moment - since > POOL_IDLE_TIMEOUT:
                connection.abandon()
        self._sweeper = self.loop.call_later(min(SWEEP_INTERVAL, limit / 4), self._sweep)


@dataclass(eq=False)
class RealKey:
    """A real key: the ``header`` (name, value) that carries it, and whose it is, as answers say."""

    name: str
    header: tuple[str, str]
    organization: str = ""
    workspace: str = ""
    requests: int = 0
    errors: int = 0  # answers from 400 up, and none

    def __post_init__(self) -> None:
        self.secret = self.header[1].removeprefix("Bearer ")
        self.secret_bytes = self.secret.encode("latin-1")

    def scopes(self, group: str) -> tuple[Scope, ...]:
        """What may rest so that it does, for a group of requests."""
        owner, itself = self.organization or self.name, ("key", self.name, ALL)
        workspace = ("workspace", self.workspace, ALL) if self.workspace else itself
        return itself, ("organization", owner, ALL), ("organization", owner, group), workspace


Scope = tuple[str, str, str]  # a key, an organization or a workspace, and a group of requests of it
ALL = "*"  # groups of requests
SHORT_REST = 5.0  # seconds for which a conversation rather waits than leaves its prompt cache
REST, LONGEST_REST = 30.0, 900.0  # seconds, where a 429 does not say, and at most
REFUSED_REST, SPENT_REST, LONGEST_SPENT = 600.0, 3600.0, 32 * 86400.0  # "until the 1st"
REFUSED, LIMITED, SPENT = "refused", "rate limit", "spending limit"  # why a key rests
SET_ANOTHER = "upstream does not accept it: set another, and send SIGHUP or restart"
MAX_REFUSAL = 64 * KIB  # of an answer that may be of the real key, as those of these statuses
OF_A_KEY = frozenset({400, 401, 402, 429})
MAX_RESTS = 100  # names of models come from requests
SPENDING_LIMIT = b"enforced_spend_limit_reached"
# To the letter: other messages of a 400 repeat what a request says, and a tenant may say this.
USAGE_LIMIT = re.compile(
    r"You have reached your specified (workspace )?(?:API )?usage limits\.?"
    r"(?: You will regain access on \d{4}-\d\d-\d\d(?: at \d\d:\d\d UTC)?\.?)?"
)
# What an Origin, no beta, or a long prompt brings about, and no key.
OF_THE_REQUEST = re.compile("CORS|OAuth authentication|Extra usage is required for long context")


class Rest(NamedTuple):
    """Since when and until when (seconds of a clock without jumps) nothing is asked, and why."""

    since: float
    until: float
    why: str

    @property
    def is_long(self) -> bool:
        """Whether conversations leave what rests, and their prompt caches."""
        return self.until - self.since > SHORT_REST


class RealKeys:
    """The real keys in their order, and what rests of them. The first is the master key's, and
    stands in for those that are no more; one without a name, where there is none."""

    def __init__(self, settings: Settings, tell: Tell = tell_nobody) -> None:
        self._tell, self.time = tell, time.monotonic
        self.keys: dict[str, RealKey] = {}
        self.rests: dict[Scope, Rest] = {}
        self.reload(settings)

    def reload(self, settings: Settings) -> None:
        """Read them again; one whose name stays goes on as it is. Raises SettingsError."""
        headers, rests = real_keys(settings), self.rests
        keys = {name: RealKey(name, header) for name, header in headers.items()}
        names = {header: name for name, header in headers.items()}
        for name, old in self.keys.items():
            if (other := names.get(old.header, name)) != name:
                text = f"real key {name} is now {other}, and what was made with it would be lost"
                raise SettingsError(f"{text}: let each have its name, as name=sk-…")
            if (key := keys.get(name)) and key.header == old.header:
                keys[name] = old
                continue
            rests = {scope: rest for scope, rest in rests.items() if scope[1] != name}
            if key:
                key.requests, key.errors = old.requests, old.errors
        self.keys, self.rests = keys, rests
        self.names, self.several = tuple(headers), len(headers) > 1
        self.ranked = functools.lru_cache(maxsize=4096)(self._rank)
        self.first = next(iter(self.keys.values()), RealKey("", ("", "")))

    def at(self, name: str | None) -> RealKey:
        """The key of a name, or what stands in for it."""
        return self.keys.get(name or "", self.first)

    def _rank(self, caller: str, session: str = "") -> tuple[RealKey, ...]:
        """All keys as a caller and his session take them (rendezvous: Thaler and Ravishankar)."""
        told = f"{caller}\0{session}\0".encode("utf-8", "replace")
        order = sorted(self.names, key=lambda name: hashlib.sha256(told + name.encode()).digest())
        return tuple(map(self.keys.__getitem__, order))

    def beside(self, key: RealKey) -> list[RealKey]:
        """A key, and those that reach the same things."""
        place = key.organization, key.workspace
        others = (each for each in self.keys.values() if all(place) and each is not key)
        return [key, *(each for each in others if (each.organization, each.workspace) == place)]

    def rests_until(self, key: RealKey, group: str) -> float:
        """When a key rests no more for a group of requests; 0 where it does not."""
        found, moment = map(self.rests.get, key.scopes(group)), self.time()
        resting = (rest for rest in found if rest and rest.is_long and rest.until > moment)
        return max((rest.until for rest in resting), default=0.0)

    def choose(self, keys: Sequence[RealKey], group: str) -> RealKey:
        """The first that does not rest, else the one whose rest ends first."""
        return min(keys, key=lambda key: self.rests_until(key, group))

    def heard(self, key: RealKey, head: ResponseHead) -> None:
        """Learn of an answer whose the key is."""
        key.organization = head.values.get(ORGANIZATION_FIELD, (key.organization,))[0]
        key.workspace = head.values.get(WORKSPACE_FIELD, (key.workspace,))[0]
        key.errors += head.status >= 400

    def succeeded(self, key: RealKey, group: str, asked: float, *, pays: bool) -> None:
        """A success ends rests that began before it was asked for; unpaid, only of refusals."""
        for scope in key.scopes(group):
            rest = self.rests.get(scope)
            if rest and rest.since < asked and (pays or rest.why == REFUSED):
                del self.rests[scope]

    def weigh(self, key: RealKey, head: ResponseHead, body: bytes, group: str) -> bool:
        """Whether a refusal, with its plain body, is of the key and not of the request, so that
        another may do better; then that rests of which it is."""
        message = dict_of(dict_of(read_json(body)).get("error")).get("message")
        said, status = message if isinstance(message, str) else "", head.status
        limit = USAGE_LIMIT.fullmatch(said) if status == 400 else None
        the_key, organization, its_group, workspace = key.scopes(group)
        if OF_THE_REQUEST.search(said):
            return False
        if status == 429 and SPENDING_LIMIT not in body:
            told = re.match("[0-9]{1,9}", head.get("retry-after"))
            scope, why = its_group, LIMITED
            seconds = min(float(told[0]), LONGEST_REST) if told else REST
        elif status in (402, 429) or limit:
            scope = workspace if limit and limit[1] else organization
            why, seconds = SPENT, SPENT_REST
            with contextlib.suppress(ValueError, IndexError):
                left = (from_iso(re.findall(r"\d{4}-\d\d-\d\d", said)[0]) - now()).total_seconds()
                seconds = min(left, LONGEST_SPENT) if left > 0 else SPENT_REST
        elif status == 401 and said:
            scope, why, seconds = the_key, REFUSED, REFUSED_REST
        else:  # which may be of the request
            return False
        moment, until = self.time(), iso(moment_of(int(time.time() + seconds)))
        self.rests = {s: rest for s, rest in self.rests.items() if rest.until > moment}
        if len(self.rests) >= MAX_RESTS and scope not in self.rests:
            scope = (*scope[:2], "other")
        rest, before = Rest(moment, moment + seconds, why), self.rests.get(scope)
        if rest.is_long and not (before and before.is_long and before.why == why):
            text = f"real key {key.name}: {why}; it rests until {until}"
            text += f" ({SET_ANOTHER})" if why == REFUSED else ""
            log.log(logging.WARNING if why == LIMITED else logging.ERROR, "%s", text)
            more = {"upstream_key": key.name, "until": until}
            self._tell("cooldown_deployment", text, matter=f"{key.name} {why}", **more)
        if before is None or before.until < rest.until:
            self.rests[scope] = rest
        return rest.is_long

    def states(self) -> list[dict[str, Any]]:
        """What is known of each key, but the key."""
        moment, ahead, rows = self.time(), time.time() - self.time(), list[dict[str, Any]]()
        present = sorted(self.rests.items(), key=lambda each: -each[1].until)
        for key in self.keys.values():
            places, rests = {scope[:2] for scope in key.scopes(ALL)}, list[dict[str, Any]]()
            for (scope, of, group), (_, until, why) in present:
                if (scope, of) in places and until > moment:
                    rest = {"scope": scope, "model_class": None if group == ALL else group}
                    rests.append(rest | {"until": moment_of(int(ahead + until)), "why": why})
            row = {name: rests[0][name] if rests else None for name in ("until", "why")}
            refused = any(rest["why"] == REFUSED for rest in rests)
            row |= {"state": REFUSED if refused else "resting" if rests else "ok"}
            row |= {"name": key.name, "rests": rests, "requests": key.requests}
            row |= {"errors": key.errors, "organization_id": printable(key.organization) or None}
            rows.append(row | {"workspace_id": printable(key.workspace) or None})
        return rows


ALERT_TIMEOUT = 10.0  # seconds
ALERT_BACKOFF = (1.0, 5.0, 30.0, 120.0, 600.0)  # seconds until what failed is tried again
ALERT_AGAIN = 600.0  # seconds until the same matter is told again
MAX_ALERTS = 1000  # that wait, and matters that are remembered


class Alerts:
    """Tells the operator of what is logged for him: POSTs it to a URL, as JSON that Slack and what
    reads LiteLLM's alerts take. What cannot be sent waits, and holds up nobody."""

    def __init__(self, client: UpstreamClient, url: str) -> None:
        self._client, self._url = client, url
        self.keep: Callable[..., Awaitable[bool]] | None = None  # `Ledger.keep`: who is the first?
        self._waiting = collections.deque[tuple[str, bytes]](maxlen=MAX_ALERTS)
        self._told: dict[str, float] = {}  # when each matter was
        self._sending: asyncio.Future[None] = client.done

    def tell(self, event: str, text: str, *, matter: str, **details: Any) -> None:
        """As `Tell`; of each matter once in ALERT_AGAIN seconds."""
        moment = self._client.time()
        if not self._url or moment - self._told.get(matter, -math.inf) < ALERT_AGAIN:
            return
        self._told.pop(matter, None)  # so that the oldest stands first
        self._told[matter] = moment
        if len(self._told) > MAX_ALERTS:
            del self._told[next(iter(self._told))]
        told = {"text": text, "event": event, "event_message": text, "alert_type": event}
        told |= {"event_group": "proxy"} | details
        self._waiting.append((matter, json.dumps(told, default=shown).encode()))
        if self._sending.done():
            self._sending = self._client.loop.create_task(self._send())

    async def _send(self) -> None:
        options: Any = {"request_timeout": ALERT_TIMEOUT, "follow_redirects": False}
        options |= {"method": "POST", "headers": {"Content-Type": "application/json"}}
        options["streaming_callback"] = lambda _: None  # of an answer nothing is kept
        while self._waiting:
            (matter, body), error = self._waiting.popleft(), None
            with contextlib.suppress(APIError):  # a store that is away: then each process tells it
                if self.keep and not await self.keep(f"told:{matter}", "", ALERT_AGAIN / 2):
                    continue
            for pause in (0.0, *ALERT_BACKOFF):
                await asyncio.sleep(pause)
                try:
                    await self._client.fetch(self._url, body=body, **options)
                    break
                except Exception as failure:  # noqa: BLE001 - whatever it is, it is tried again
                    error = failure
            else:
                log.error("an alert could not be sent: %s", type(error).__name__)

    def close(self) -> None:
        """Send nothing more."""
        self._sending.cancel()


# ─── Server ───────────────────────────────────────────────────────────────────────────────────────

LINGER_TIMEOUT = 5.0  # seconds for a client to read its answer before the socket closes
DISCARD_LIMIT = 32 * MIB  # of a refused request's body are read, so that its answer arrives
MIN_BODY_RATE = 500  # bytes a second, once --client-timeout has passed (Apache's mod_reqtimeout)
PIPELINE_LIMIT = 64 * KIB  # bytes of further requests that wait for the present one's end
NO_HEADERS = httputil.HTTPHeaders()  # a delegate has the connection's ``head``
NO_REQUEST = RequestHead(1, [], {}, NO_OPTIONS, False, None, "-", "-", "")
READ_BODIES = (ClientPhase.READING, ClientPhase.DROPPING)
Room = asyncio.Future[None]  # done when the client has taken what was written


def new_call_id() -> str:
    """A random UUID of version 4 (RFC 9562), as LiteLLM's call ids are."""
    digits = f"{random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


class ServerConnection(asyncio.Protocol, httputil.HTTPConnection):
    """A client's connection: hands one request after the other to a delegate, reads on when what
    that returns is done, frames the answer. ``head``, ``length`` (bytes or CHUNKED) and ``call_id``
    are the present request's, ``unread`` came behind it; ``site`` is who is at the other end."""

    head = NO_REQUEST
    length = 0
    call_id = ""  # until the first request came
    phase = ClientPhase.WAITING
    unread = b""
    _seen = 0  # bytes of that which belong to a head that is not whole
    _empty_lines = 0  # before it
    _delegate: HandlerDelegate | None = None  # until it has answered
    _waits_for: asyncio.Future[None] | None = None  # before more is read
    _drained: Room | None = None
    _reading_paused = False
    _close_after = False
    _chunked = False  # the answer
    _taken = 0  # bytes since `_since`

    def __init__(self, server: Server, address: str) -> None:
        self.server, self.site = server, site_of(address)
        self.remote_ip = self._own_address = address or "0.0.0.0"  # as Tornado, for a Unix socket
        self.protocol = self._own_protocol = "http" if server.context is None else "https"
        self._since = server.time()

    # asyncio.Protocol: called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self.descriptor: int = transport.get_extra_info("socket").fileno()
        self.server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Read on unless the delegate waits; a next request once earlier answers are taken."""
        self._taken += len(data)
        waiting = self.phase is ClientPhase.WAITING
        if self.phase is ClientPhase.LINGERING or (waiting and self._close_after):
            return
        self.unread += data
        try:
            if waiting and self._waits_for is None and self._drained is None:
                self._read_head()
            if self.phase in READ_BODIES and self._waits_for is None:
                self._read_body()
        except ProtocolError as error:
            self.refuse(APIError(error.status, f"Malformed request: {error}."))
        if self.unread or self._reading_paused:
            self._update_reading()

    def eof_received(self) -> None:
        """A client that has closed its half is taken to have left, as in nginx."""
        if self.phase in (ClientPhase.READING, ClientPhase.ANSWERING):
            self.transport.abort()  # a mere close would first wait for what is still to be written

    def connection_lost(self, error: Exception | None) -> None:
        self.phase = FOLLOWS[self.phase][ClientPhase.GONE]
        self.server.leave(self)
        if self._reading_paused:
            self.server.forget(self)
        delegate, self._delegate = self._delegate, None
        if delegate is not None:
            delegate.on_connection_close()
        if self._drained is not None:
            self.resume_writing()

    def pause_writing(self) -> None:
        self._drained = self.server.loop.create_future()

    def resume_writing(self) -> None:
        """A client that has taken its answers may have the next one."""
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)
        if self.unread:
            self._wait_for(self.server.done)

    # tornado.httputil.HTTPConnection: called by handlers

    def write_headers(self, start_line: Any, headers: Any, chunk: bytes | None = None) -> Room:
        """Begin an answer of Tornado's handlers, who send whole bodies with a Content-Length."""
        start = f"HTTP/1.1 {start_line.code} {start_line.reason}"
        lines = [f"{name}: {value}" for name, value in headers.get_all()]
        lines.append(f"x-litellm-call-id: {self.call_id}")
        return self.write_head(start, lines, 0, chunk or b"")

    def write_head(self, start: str, lines: list[str], length: int, data: bytes) -> Room:
        """Begin an answer, of a body of this length (bytes, CHUNKED, UNTIL_CLOSE) what is here."""
        if length < 0 and self.head.version == 1:
            self._chunked = True
            lines.append(CHUNKED_LINE)
        # RFC 9112 section 9.3; an answer whose end does not show ends with the connection.
        endless = length < 0 and not self._chunked
        self._close_after |= endless or not self.head.keeps_alive
        self._close_after |= self.server.gateway.phase is not GatewayPhase.SERVING
        if self._close_after:
            lines.append("Connection: close")
        elif self.head.version == 0:
            lines.append("Connection: keep-alive")
        return self.write(data, "\r\n".join((start, *lines, "\r\n")).encode("latin-1"))

    def write(self, chunk: bytes, head: bytes = b"") -> Room:
        """Send a part of the answer, and its head before it."""
        if self._chunked and chunk:  # as by `framed`
            chunk = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        if self.phase is not ClientPhase.GONE:
            self.transport.write(head + chunk)
        return self._drained or self.server.done

    def finish(self) -> None:
        """The answer is written. The next request follows once this one's body has been read."""
        if self._chunked:
            self._chunked = False
            self.write(LAST_CHUNK)
        self._delegate = None
        self._since, self._taken = self.server.time(), 0
        if self.phase is ClientPhase.READING:
            self.phase = FOLLOWS[self.phase][ClientPhase.DROPPING]
        elif self.phase in (ClientPhase.ANSWERING, ClientPhase.DROPPING):
            self.phase = FOLLOWS[self.phase][ClientPhase.WAITING]
            if self._close_after:
                self.unread = b""  # which is no request any more (RFC 9112 section 9.6)
                self.transport.close()
        if self.unread or self.phase is ClientPhase.DROPPING:
            self._wait_for(self.server.done)

    def break_off(self, last: bytes = b"") -> None:
        """Send this last, and end the connection so that nobody takes the answer for whole."""
        if self.phase in (ClientPhase.LINGERING, ClientPhase.GONE):
            return
        self.write(last)
        if self.head.version == 0:
            # Without a length, only a reset tells a broken answer from one that has ended.
            client = self.transport.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.phase = FOLLOWS[self.phase][ClientPhase.LINGERING]
        self._since = self.server.time()
        self.transport.close()

    set_close_callback = staticmethod(callable)  # does nothing: the delegate hears of the end

    # What the server says

    def refuse(self, error: APIError) -> None:
        """Answer what is no request, or comes to no end, and close: what follows is unclear."""
        self._close_after = True
        if self.phase is ClientPhase.WAITING:
            self.head, self.call_id = NO_REQUEST, new_call_id()
            self._delegate = self.server.application.start_request(self.server, self)
        if self._delegate is not None:
            self._delegate.handler.fail(error)
        self._linger()

    def check_patience(self, moment: float, client_timeout: float, idle_timeout: float) -> None:
        """End what takes too long, by the rules that the 408 tells (seconds, all of them)."""
        waited, limit, comes = moment - self._since, client_timeout, self._seen > 0
        if self.phase in READ_BODIES:
            waited, comes = waited - self._taken / MIN_BODY_RATE, True
            if waited < 0 or self._reading_paused:  # who was fast may pause for no longer
                self._since += waited
                return
        elif self.phase is ClientPhase.ANSWERING:
            return
        elif self.phase is ClientPhase.LINGERING:
            limit = LINGER_TIMEOUT
        elif self.call_id and not comes:
            limit = idle_timeout
        if waited > limit and comes:  # RFC 9110 section 15.5.9
            text = f"The request came too slowly: its head must be here in {client_timeout:g} s,"
            text += f" its body without such a pause, at {MIN_BODY_RATE} bytes a second or more."
            self.refuse(APIError(408, f"{text} Send it again."))
        elif waited > limit:
            self.transport.abort()  # a close would wait for a client that does not read

    # Inside

    def _read_head(self) -> None:
        """Begin the request whose head is here, if it is whole; its body follows."""
        data, seen = self.unread, self._seen
        while data.startswith(b"\r\n") and self._empty_lines < MAX_EMPTY_LINES:
            data, seen, self._empty_lines = data[2:], 0, self._empty_lines + 1
        end = end_of_head(data, seen)
        if end < 0:
            if data and not seen:  # it has just begun
                self._since = self.server.time()
            self.unread, self._seen = data, len(data)
            return
        self.head = head = parse_request_head(data[:end])
        rest, self.length, self.call_id = data[end + 4 :], head.length or 0, new_call_id()
        self._seen = self._empty_lines = 0
        self.unread, self._taken, self._since = b"", len(rest), self.server.time()
        if self.server.xheaders:  # what a proxy in front tells, as Tornado's HTTPServer takes it
            forwarded = head.get("x-forwarded-for").rpartition(",")[2].strip()
            address = head.get("x-real-ip") or forwarded
            self.remote_ip = address if netutil.is_valid_ip(address) else self._own_address
            told = head.get("x-scheme") or head.get("x-forwarded-proto")
            scheme = told.rpartition(",")[2].strip().lower()
            self.protocol = scheme if scheme in DEFAULT_PORTS else self._own_protocol
        self.phase = FOLLOWS[self.phase][ClientPhase.READING]
        self._delegate = delegate = self.server.application.start_request(self.server, self)
        waits = delegate.headers_received(None, NO_HEADERS)
        if waits is not None:
            self._wait_for(waits)
        elif len(rest) == self.length and self.phase is ClientPhase.READING:  # as it mostly is
            self.phase = FOLLOWS[self.phase][ClientPhase.ANSWERING]
            if rest:
                delegate.data_received(rest)
            if self._delegate is delegate:  # it was not refused
                delegate.finish()
            return
        self._body, self.unread = Body(self.length), rest

    def _read_body(self) -> None:
        """Hand on what is here of the present request's body, or drop it; go on if it is whole."""
        body, delegate = self._body, self._delegate
        # Who is let in is told to send his body (RFC 9110 section 10.1.1); who is refused may not.
        awaits = not self._taken and delegate is not None and self.head.version == 1
        if awaits and self.head.get("expect").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        payload, self.unread = body.feed(self.unread)
        if payload and delegate is not None:
            waits = delegate.data_received(payload)
            if waits is not None and not waits.done():
                self._wait_for(waits)
                return
        if not body.complete:
            if delegate is None and (self._taken > DISCARD_LIMIT or self.head.get("expect")):
                self._linger()
            elif self.unread:  # there is more than one turn of the loop may take
                self._wait_for(self.server.done)
        elif self.phase is ClientPhase.DROPPING:
            self.finish()
        elif self.phase is ClientPhase.READING and delegate is not None:
            self.phase = FOLLOWS[self.phase][ClientPhase.ANSWERING]
            delegate.finish()

    def _wait_for(self, waits: asyncio.Future[None]) -> None:
        """Read nothing more until this is done, then in one turn of the loop, not in many."""
        if self._waits_for is None:
            self._waits_for = waits
            waits.add_done_callback(self._go_on)
            self._update_reading()

    def _go_on(self, _: object) -> None:
        self._waits_for = None
        self.data_received(b"")

    def _update_reading(self) -> None:
        """Read unless the delegate waits or enough is here; but notice if the client leaves."""
        waits = self._waits_for is not None and not self._waits_for.done()
        pause = waits or len(self.unread) > PIPELINE_LIMIT
        if pause == self._reading_paused or self.transport.is_closing():
            return
        self._reading_paused = pause
        if pause:
            self.transport.pause_reading()
            self.server.watch(self)
        else:
            self.server.forget(self)
            self.transport.resume_reading()

    def _linger(self) -> None:
        """Close so that the answer still arrives: data that meets a closed socket is answered with
        a reset, which throws away what the client has not read yet (RFC 9112 section 9.6)."""
        if self.phase in (ClientPhase.LINGERING, ClientPhase.GONE) or self.transport.is_closing():
            return
        self.phase = FOLLOWS[self.phase][ClientPhase.LINGERING]
        self._since = self.server.time()
        self.unread, self._seen, self._waits_for = b"", 0, None
        self._update_reading()
        if self.transport.can_write_eof():  # TLS knows no half-closed connection
            self.transport.write_eof()


REFUSALS = 100  # connections beyond a limit that are told so; further ones are closed at once
MANY_FILES = 2**20  # what "no limit" is taken for
RESERVED_FILES = 64  # for the keys file, the log and whatever else is no connection
BACKLOG = 4096  # connections that the kernel holds until they are accepted, up to its somaxconn
HANDSHAKE = 0.25  # seconds for one that has begun to end, and then for the request behind it
SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>; Python does not name it
NO_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 2), (6, 0, 0, 0), (6, 0, 0, 0xFFFF))
ACCEPT_AGAIN = 1.0  # seconds after which connections are taken again where no file could be opened


class Server:
    """Takes connections, as many as there may be, and looks after those that are slow or left."""

    def __init__(self, gateway: Gateway, application: GatewayApplication) -> None:
        self.gateway, self.application = gateway, application
        self.loop = asyncio.get_running_loop()
        self.time, self.done = gateway.client.time, gateway.client.done
        self.xheaders = gateway.settings.xheaders
        self.connections: set[ServerConnection] = set()
        self._watched: dict[int, ServerConnection] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            self.loop.add_reader(self._epoll.fileno(), self._hung_up, self._epoll)
        # A relayed request needs two: the client's and the upstream's.
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = MANY_FILES if files == resource.RLIM_INFINITY else files
        self.max_connections = max(1, (files - RESERVED_FILES) // 2)
        self._sites: collections.Counter[str] = collections.Counter()
        self._accepting: dict[socket.socket, asyncio.Task[None]] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._sweep()

    def listen(self, sockets: Iterable[socket.socket], context: ssl.SSLContext | None) -> None:
        """Take connections from these sockets, over TLS where a context is given."""
        self.context = context
        for listening in sockets:
            listening.listen(BACKLOG)
            self._accepting[listening] = self.loop.create_task(self._accept(listening))

    async def _accept(self, listening: socket.socket) -> None:
        with listening:
            while True:
                try:
                    self._take(*await self.loop.sock_accept(listening))
                except ConnectionError:  # the client has left, which holds up nobody
                    continue
                except OSError as error:
                    log.warning("%s: connections wait; raise the limit", error.strerror)
                    await asyncio.sleep(ACCEPT_AGAIN)

    def _take(self, client: socket.socket, peer: Any) -> None:
        client.setblocking(False)
        task = self.loop.create_task(self._open(client, peer[0] if type(peer) is tuple else ""))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, client: socket.socket, address: str) -> None:
        """Count a connection in, which without a word costs some 100 KB over TLS, and open it."""
        context, settings = self.context, self.gateway.settings
        connection = ServerConnection(self, address)
        self._sites[connection.site] += 1
        over = len(self.connections) + len(self._opening) - self.max_connections
        text = "The gateway has as many connections as it can hold. Try again."
        limit, timeout = settings.max_connections_per_address, settings.client_timeout
        more = self._sites[connection.site] - limit
        if connection.site and not self.xheaders and more > over:
            over, text = more, f"Your address has more than {limit:,} connections open."
        tls = {"ssl_handshake_timeout": timeout, "ssl_shutdown_timeout": timeout} if context else {}
        try:
            if over > REFUSALS:
                client.close()
                raise ConnectionAbortedError
            await self.loop.connect_accepted_socket(lambda: connection, client, ssl=context, **tls)
            if over > 0:
                connection.refuse(APIError(429, text, headers=[("retry-after", "5")]))
        except Exception as error:  # noqa: BLE001 - whatever it is, others are served
            log.debug("connection from %s: %s", address, error)  # the loop closes the socket
        finally:
            if not hasattr(connection, "transport"):  # it was never made
                self.leave(connection)

    def watch(self, connection: ServerConnection) -> None:
        """Abort a connection that is not read once the peer has closed or reset it, of which the
        kernel tells (EPOLLRDHUP, as in nginx) an epoll that the loop reads; where there is one."""
        self._watched[connection.descriptor] = connection
        if self._epoll is not None:
            self._epoll.register(connection.descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, connection: ServerConnection) -> None:
        if self._watched.get(connection.descriptor) is not connection:
            return  # over TLS another may have it by now
        del self._watched[connection.descriptor]
        if self._epoll is not None:
            with contextlib.suppress(OSError):  # closing a socket takes it out of an epoll
                self._epoll.unregister(connection.descriptor)

    def _hung_up(self, epoll: select.epoll) -> None:
        for descriptor, _ in epoll.poll(0):
            if connection := self._watched.get(descriptor):
                connection.transport.abort()

    def leave(self, connection: ServerConnection) -> None:
        """A connection is closed."""
        self.connections.discard(connection)
        self._sites[connection.site] -= 1
        if not self._sites[connection.site]:
            del self._sites[connection.site]

    async def leave_port(self) -> None:
        """Leave a port to others that share it, so that no client notices: what waits is taken, and
        in the end nothing is on its way. A SYN that is dropped comes again a second later, and so
        meets another; without this, handshakes under way are reset (net.ipv4.tcp_migrate_req)."""
        # BPF: load TCP's flags, of these SYN and ACK; where it is SYN alone drop it, else take it.
        steps = array.array("B", b"".join(struct.pack("HBBI", *step) for step in NO_SYN))
        program = struct.pack("HP", len(NO_SYN), steps.buffer_info()[0])
        for listening in self._accepting:
            with contextlib.suppress(OSError):  # none but Linux knows it
                listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        await asyncio.sleep(HANDSHAKE)
        for listening, task in self._accepting.items():
            with contextlib.suppress(OSError):  # until none waits
                while True:
                    self._take(*listening.accept())
            task.cancel()
        await asyncio.sleep(HANDSHAKE)

    def stop(self) -> None:
        """Close the connections that are not just sending a request; others still come in, and are
        told that the gateway stops."""
        for connection in list(self.connections):
            if connection.phase is ClientPhase.WAITING and not connection.unread:
                connection.transport.close()

    def close(self) -> None:
        """Take no further connections, break what is left, and free all."""
        for task in self._accepting.values():
            task.cancel()
        for connection in list(self.connections):
            connection.transport.abort()
        self._sweeper.cancel()

    def _sweep(self) -> None:
        moment, settings = self.time(), self.gateway.settings
        for connection in list(self.connections):
            connection.check_patience(moment, settings.client_timeout, settings.idle_timeout)
        interval = min(SWEEP_INTERVAL, settings.client_timeout / 4)
        self._sweeper = self.loop.call_later(interval, self._sweep)


def site_of(address: str) -> str:
    """Who has an address: of IPv6 ones a site has 2**64, which all begin alike (RFC 6177)."""
    if ":" not in address:
        return address
    whole = ipaddress.IPv6Address(address)
    return str(whole.ipv4_mapped or whole.packed[:8].hex())


# ─── Filters ──────────────────────────────────────────────────────────────────────────────────────

MAX_LINE = 4 * MIB  # of what is read at once, some 40 ms for `json`; of more the size counts
UNASKED_LINE = 64 * KIB  # of it are held without being counted
INFLATE_SLICE = 64 * KIB  # decompressed at a time, so that a small bomb stays small
# The text of deltas; "completion" is that of POST /v1/complete.
DELTA_TEXT = re.compile(rb'"(text|thinking|partial_json|completion)": ?"([^"\\]*(?:\\.[^"\\]*)*)"')
THINKING_START = re.compile(rb'"content_block": ?\{"type": ?"(?:redacted_)?thinking"')
GZIP_CODINGS = ("gzip", "x-gzip")


@dataclass(eq=False)
class Inflater:
    """Decompresses gzip, zlib and raw deflate bit by bit; at their end ``decoder`` is None."""

    coding: str
    decoder: Any = None

    def slices(self, data: bytes) -> Iterator[bytes]:
        """What these bytes hold, INFLATE_SLICE at a time, all to be taken. Raises zlib.error."""
        full = False
        while data or full:  # then more may be waiting inside
            if self.decoder is None:
                bits = zlib.MAX_WBITS | 16
                if self.coding == "deflate":  # with zlib's header or without (RFC 9110, 8.4.1.2)
                    zlibs = data[0] & 0x0F == zlib.DEFLATED  # a raw block pads with zeros
                    bits = zlib.MAX_WBITS if zlibs else -zlib.MAX_WBITS  # RFC 1950, 2.2
                elif self.coding not in GZIP_CODINGS:
                    raise zlib.error(f"unknown coding {self.coding}")
                elif not (data := data.lstrip(b"\0")):  # members may be padded (gzip's own manual)
                    return
                self.decoder = zlib.decompressobj(bits)
            plain = self.decoder.decompress(data, INFLATE_SLICE)
            data, full = self.decoder.unconsumed_tail, len(plain) == INFLATE_SLICE
            if plain:
                yield plain
            if self.decoder.eof:
                data, full, self.decoder = self.decoder.unused_data, False, None


@dataclass(eq=False, kw_only=True)
class ResponseFilter:
    """Sees an answer's plain body as it passes, and may change it; of a compressed stream its own
    bytes go on, so there a filter only looks. One with a `rewrite`, which may raise APIError, makes
    another of the whole body, at most REWRITE_LIMIT bytes of JSON, and the head waits for it."""

    rewrite: Callable[[bytes], Awaitable[bytes]] | None = None

    def feed(self, data: bytes) -> bytes:
        """What goes on of these and of held-back bytes. Raises UpstreamError if nothing may."""
        return data

    def finish(self, complete: bool) -> bytes:
        """What goes on at the end; ``complete`` says that it is not cut short."""
        return b""


REWRITE_LIMIT = 16 * MIB  # a list of a thousand batches takes one, of a hundred agents ten


def through(filters: Iterable[ResponseFilter], data: bytes, complete: bool) -> bytes:
    """Data after all of these, one after the other."""
    for each in filters:
        if data:
            data = each.feed(data)
        if complete:
            data += each.finish(True)
    return data


class Meter(ResponseFilter):
    """Reads usage out of a response as it passes, however split: SSE, a JSON message, or results of
    a batch (JSONL). ``measured`` is final after `finish`. Of a line or a message MAX_LINE bytes are
    held at most, for which beyond UNASKED_LINE ``room`` is asked, and told (below 0) of those let
    go. ``on_result`` gets each result, from 1 on, ``learn`` what may name something new."""

    def __init__(
        self,
        content_type: str,
        on_result: Callable[[int, Measured], None] | None = None,
        room: Callable[[int], bool] = lambda size: True,
        learn: Callable[[object], None] | None = None,
    ) -> None:
        self.measured, self._learn = Measured(), learn
        self._on_result, self._room, self._numbers = on_result, room, itertools.count(1)
        self._whole = on_result is None and not content_type.lower().startswith(EVENT_STREAM)
        self._held = bytearray()  # of a line that has not ended, or of the message
        self._passed_over = 0  # bytes of one that is too long, of which nothing is held

    def feed(self, data: bytes) -> bytes:
        measured, lines = self.measured, data
        if measured.blind:
            return data
        holds = self._whole or self._held or self._passed_over
        if holds or len(data) > MAX_LINE or not data.endswith(b"\n"):
            lines = self._complete(data)
        if self._learn is not None and (b'"container"' in lines or b'"file_id"' in lines):
            self._learn_of(lines.splitlines(), self._learn)
        if self._on_result is not None:
            for line in filter(bytes.strip, lines.splitlines()):
                result = dict_of(read_answer(line)).get("result")
                if result is None:  # these are no results, or not in plain text
                    measured.blind = True
                    break
                message = dict_of(result).get("message")
                self._on_result(next(self._numbers), measured_message(message, 0))
            return data
        # Most of a stream's lines are deltas, and only their text counts.
        for name, text in DELTA_TEXT.findall(lines):
            said = read_json(b'"%b"' % text) if b"\\" in text else None
            size = len(said.encode("utf-8", "replace")) if isinstance(said, str) else len(text)
            measured.seen += size
            if name == b"thinking":
                measured.thought += size
        if b"content_block_start" in lines:
            measured.empty = False
            measured.thinks = measured.thinks or THINKING_START.search(lines) is not None
        if b'"usage"' not in lines:
            return data
        for line in lines.splitlines():
            if b'"usage"' not in line or not line.startswith(b"data:"):
                continue
            event = dict_of(read_json(line[5:]))
            message, delta = dict_of(event.get("message")), dict_of(event.get("delta"))
            measured.model = model_of(message.get("model")) or measured.model
            # Counts are cumulative; later ones may lack fields.
            for usage in dict_of(message.get("usage")), dict_of(event.get("usage")):
                measured.usage |= {n: value for n, value in usage.items() if value is not None}
            if isinstance(stop := delta.get("stop_reason"), str):
                measured.stop_reason, measured.final = stop, bool(measured.usage)
        return data

    def finish(self, complete: bool) -> bytes:
        size = self._passed_over + len(self._held)
        if not size:
            return b""
        if not self._whole and (complete or self._on_result is None):
            self.feed(b"\n")  # which ends the last line
        held, self._passed_over = self._take(), 0
        if self._whole and not self.measured.blind:
            self.measured = measured_message(read_answer(held) if complete else None, size)
            if self._learn is not None and complete:
                self._learn_of([held], self._learn)
        return b""

    def _learn_of(self, texts: Iterable[bytes], learn: Callable[[object], None]) -> None:
        for text in texts:
            if b'"container"' in text or b'"file_id"' in text:
                learn(read_json(text.removeprefix(b"data:"), Any))

    def _complete(self, data: bytes) -> bytes:
        """The lines that end in these bytes; the rest is held, or only counted if too long."""
        end = 0 if self._whole else max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        lines, rest = data[:end], data[end:]
        if end and self._passed_over:
            first = lines.splitlines(keepends=True)[0]
            self._count_long(self._passed_over + len(first))
            self._passed_over, lines = 0, lines[len(first) :]
        elif end:
            lines = self._take() + lines
        if len(lines) > MAX_LINE:
            for line in lines.splitlines(keepends=True):
                self._count_long(len(line)) if len(line) > MAX_LINE else self.feed(line)
            lines = b""
        size = len(self._held) + len(rest)
        more = size - max(UNASKED_LINE, len(self._held))
        if self._passed_over or size > MAX_LINE or (more > 0 and not self._room(more)):
            self._passed_over += len(self._take()) + len(rest)
        else:
            self._held += rest
        return lines

    def _take(self) -> bytes:
        """What is held, and is no longer."""
        held, self._held = bytes(self._held), bytearray()
        if len(held) > UNASKED_LINE:
            self._room(UNASKED_LINE - len(held))
        return held

    def _count_long(self, size: int) -> None:
        if self._on_result is None:
            self.measured.seen += size
        elif not self.measured.blind:
            self._on_result(next(self._numbers), Measured(seen=size))


MIN_SECRET_LENGTH = 16  # a shorter "key", of a test server, is a word that responses may hold


@dataclass(eq=False)
class Mask(ResponseFilter):
    """Masks a secret (text and bytes) with as many asterisks: an upstream that echoes what it was
    sent must not carry the real key to a client. Bytes wait where they may begin the secret."""

    text: str
    secret: bytes
    held: bytes = b""

    def feed(self, data: bytes) -> bytes:
        if self.held:
            data, self.held = self.held + data, b""
        if self.secret in data:
            data = data.replace(self.secret, b"*" * len(self.secret))
        if data and data[-1] in self.secret and (held := self.begun_in(data)):
            data, self.held = data[:-held], data[-held:]
        return data

    def finish(self, complete: bool) -> bytes:
        held, self.held = self.held, b""
        return held

    def look(self, data: bytes) -> bytes:
        """The end of these bytes, where the secret may begin. Raises UpstreamError."""
        if self.secret in data:  # in a compressed body nothing can be masked
            raise UpstreamError("The upstream sent the gateway's own credential back.")
        return data[1 - len(self.secret) :]

    def mask_text(self, text: str) -> str:
        """Text of a head with the secret masked."""
        return text.replace(self.text, "*" * len(self.text))

    def begun_in(self, data: bytes) -> int:
        """How many of the last bytes are a beginning of the secret."""
        longest = min(len(data), len(self.secret) - 1)
        fits = (n for n in range(longest, 0, -1) if self.secret.startswith(data[-n:]))
        return next(fits, 0)


MAX_WITHHELD = 1 * MIB  # of one whose reads all end as if the real key began there


class Inside:
    """Lets filters look at what a compressed answer holds, as its own bytes go on."""

    def __init__(self, coding: str, filters: Sequence[ResponseFilter]) -> None:
        self._inflater: Inflater | None = Inflater(coding)
        self._mask = next((each for each in filters if isinstance(each, Mask)), None)
        self._filters = [each for each in filters if each is not self._mask]
        self._withheld = self._looked_at = b""  # the ends of what came, and of what it holds

    async def feed(self, data: bytes, complete: bool) -> bytes:
        """What may go on of these bytes. Raises UpstreamError."""
        mask, fresh, data, self._withheld = self._mask, data, self._withheld + data, b""
        try:
            for number, plain in enumerate(self._inflater.slices(fresh) if self._inflater else ()):
                if number:  # a read may hold a thousand times its size
                    await asyncio.sleep(0)
                if mask is not None:
                    self._looked_at = mask.look(self._looked_at + plain)
                through(self._filters, plain, False)
        except zlib.error:  # nothing that can be read; its bytes are masked as they are
            self._inflater = None
            for each in self._filters:
                if isinstance(each, Meter):
                    each.measured.blind = True
        if complete:
            through(self._filters, b"", True)
        if mask is None:
            return data
        if self._inflater is None:
            return through([mask], data, complete)
        mask.look(data)  # names and comments of gzip are not compressed
        # They wait for the next ones while they may hold a beginning of the real key.
        if complete or not (mask.begun_in(self._looked_at) or mask.begun_in(data)):
            return data
        if len(data) > MAX_WITHHELD:
            raise UpstreamError("The upstream's answer looks like the gateway's own credential.")
        self._withheld = data
        return b""


def decompress(coding: str, data: bytes, limit: int) -> bytes:
    """Decode a whole body. Raises ValueError or zlib.error, also for more than ``limit`` bytes."""
    if coding in ("", "identity"):
        return data
    plain, inflater = bytearray(), Inflater(coding)
    for part in inflater.slices(data):
        plain += part
        if len(plain) > limit:
            raise ValueError("too large")
    if inflater.decoder is not None:
        raise ValueError("cut short")
    return bytes(plain)


def compress(coding: str, data: bytes) -> bytes:
    """The reverse of `decompress`."""
    if coding in GZIP_CODINGS:
        return gzip.compress(data, mtime=0)
    return zlib.compress(data) if coding == "deflate" else data


# ─── Record ───────────────────────────────────────────────────────────────────────────────────────

NO_KEY = "-"  # what stands in logs and sums for none
MASTER_NAME = "master"
MAX_LABELS = 1000  # keys, and keys with their models, that /metrics tells apart
# Seconds; LiteLLM's buckets of its latency metrics.
LATENCY_BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.0125, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0]
LATENCY_BUCKETS += [2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]
LOG_SIZE, LOG_FLAGS = 64 * MIB, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
FILTERED = {"litellm_call_id", "request_id", "api_key", "user", "status", "startTime"}
TIMINGS = ("total", "first_byte", "upstream", "overhead")
LOG_LINE = log.makeRecord(log.name, logging.INFO, "relay", 0, "", (), None)
shown_word = functools.lru_cache(maxsize=1024)(word)  # most lines have the same
shown_name = functools.lru_cache(maxsize=1024)(printable)
shown_dollars = functools.lru_cache(maxsize=1024)(dollars)


@dataclass(slots=True)
class Record:
    """What is remembered, counted and logged of a relayed request, filled in on its way. Moments
    are seconds of a clock that does not jump, 0 where there was none; sizes are of bodies."""

    call_id: str
    method: str
    remote_ip: str
    arrived: float
    started: datetime
    whole: float = 0.0  # its body was here
    asked: float = 0.0  # its head went up
    answered: float = 0.0  # a head came back
    first: float = 0.0  # the first byte went to the client
    over: float = 0.0
    hashed: str = ""
    key: VirtualKey | None = None
    shown_key: str = NO_KEY  # its alias or abbreviated name, or MASTER_NAME
    path: str = ""
    status: int = 0
    outcome: str = ""
    model: str = ""
    tally: Tally = field(default_factory=Tally)
    estimated: bool = False
    tags: Sequence[str] = ()
    sent: dict[str, str] | None = None  # of CLAUDE_FIELDS, where any came
    request_id: str = ""  # Anthropic's
    upstream_keys: tuple[str, ...] = ()  # names of real keys, as they were asked
    via: str = ""  # the same, where there are several
    bytes_in: int = 0
    bytes_out: int = 0
    error: str = ""  # what was said of it here

    def belongs_to(self, key: VirtualKey) -> None:
        """Name whose it is, also where that key is refused."""
        self.key, self.hashed, self.tags = key, key.account.hashed, key.tags
        self.shown_key = shown_name(key.key_alias or key.key_name)

    def __str__(self) -> str:
        """The line for a terminal. No key, hash, body or query stands in it."""
        key, tally = self.key, self.tally
        line = f"{self.shown_key} {self.method} {shown_word(self.path)} {self.status}"
        line += f" {self.outcome} {(self.over - self.arrived) * 1000:.0f}ms"
        line += f" ttfb={(self.first - self.arrived) * 1000:.0f}ms" if self.first else ""
        line += f" in={self.bytes_in} out={self.bytes_out}"
        line += f" {shown_word(self.model)}" if self.model else ""
        if tally.input_tokens or tally.output_tokens:
            line += f" {tally.input_tokens}+{tally.cached}->{tally.output_tokens} tokens"
            line += f" ${shown_dollars(tally.spend)}"
        line += f"{' estimated' if self.estimated else ''} {self.call_id}"
        line += f" {shown_word(self.request_id)}" if self.request_id else ""
        line += f" key={key.key_name}" if key and key.key_alias else ""
        line += f" user={printable(key.user_id)}" if key and key.user_id else ""
        line += f" via={self.via}" if self.via else ""
        line += f" tags={shown_word(printable(','.join(self.tags)))}" if self.tags else ""
        for name in CLAUDE_CODE[:2] if self.sent else ():
            if text := (self.sent or {}).get(name):
                line += f" {name.removesuffix('_id')}={shown_word(text)}"
        return line

    def to_json(self) -> dict[str, Any]:
        """As the JSON log has it; the README's "Log" describes it."""
        key, tally, started = self.key, self.tally, self.arrived
        alias = key.key_alias if key else self.shown_key if self.shown_key != NO_KEY else None
        first = round(self.first - started, 4) if self.first else None
        row: dict[str, Any] = {"call_id": self.call_id, "request_id": self.request_id or None}
        row |= {"key_alias": alias, "key_name": key and key.key_name, "user": key and key.user_id}
        row |= {"tags": self.tags} | dict.fromkeys(CLAUDE_CODE) | (self.sent or {})
        row |= {"upstream_keys": self.upstream_keys, "remote_ip": self.remote_ip}
        row |= {"method": self.method, "path": self.path, "status": self.status}
        row |= {"outcome": self.outcome, "error": self.error or None, "model": self.model or None}
        row |= {"input_tokens": tally.input_tokens, "output_tokens": tally.output_tokens}
        row |= {"cache_read_tokens": tally.cache_read_tokens, "cache_write_tokens": tally.written}
        row |= {"cost": float(tally.spend), "estimated": self.estimated}
        row |= {"time_to_first_byte": first, "duration": round(self.over - started, 4)}
        return row | {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out}

    def to_spend_log(self) -> dict[str, Any]:
        """As a row of LiteLLM's SpendLogs; fields of those that mean nothing here are left out."""
        key, tally, took = self.key, self.tally, timedelta(seconds=self.over - self.arrived)
        prompt, output = tally.input_tokens + tally.cached, tally.output_tokens
        status = "success" if self.outcome == "ok" else "failure"
        row: dict[str, Any] = {"request_id": self.request_id or self.call_id}
        row |= {"litellm_call_id": self.call_id, "call_type": "pass_through_endpoint"}
        row |= {"custom_llm_provider": "anthropic", "api_base": self.path, "api_key": self.hashed}
        row |= {"key_alias": key and key.key_alias, "user": key and key.user_id}
        row |= {"team_id": key and key.team_id, "model": self.model}
        row |= {"spend": float(tally.spend), "prompt_tokens": prompt, "completion_tokens": output}
        row |= {"total_tokens": prompt + output, "cache_read_input_tokens": tally.cache_read_tokens}
        row |= {"cache_creation_input_tokens": tally.written, "startTime": iso(self.started)}
        row |= {"endTime": iso(self.started + took), "status": status, "status_code": self.status}
        row |= {"outcome": self.outcome, "estimated": self.estimated} | (self.sent or {})
        row |= {"upstream_keys": self.upstream_keys} | ({"error": self.error} if self.error else {})
        first = round(self.first - self.arrived, 4) if self.first else None
        row |= {"time_to_first_byte": first, "duration": round(self.over - self.arrived, 4)}
        return row | {"request_tags": self.tags, "requester_ip_address": self.remote_ip}


def log_record(record: Record) -> None:
    """What log.info(record) does, in half the time: over one line, straight to the handlers."""
    LOG_LINE.msg, LOG_LINE.created = record, time.time()
    for handler in logging.root.handlers:
        handler.handle(LOG_LINE)


class RequestLog:
    """The last ``most`` requests, of all who share a ledger, and a file (empty: none) of those that
    were here, as rows of /spend/logs: read at the start, written each second. At LOG_SIZE it
    becomes ".1", and what was ".1" is gone."""

    def __init__(self, path: str, most: int, ledger: AnyLedger) -> None:
        self._path, self._most, self._ledger = path, most, ledger
        self._error, self._saving = "", asyncio.Lock()
        self._waiting = collections.deque[Record](maxlen=most)
        self._unwritten = collections.deque[bytes](maxlen=most)
        for name in filter(os.path.isfile, (f"{path}.1", path)):  # a pipe would never end
            with contextlib.suppress(OSError), open(name, "rb") as file:
                ledger.log("requests", most, file)

    def append(self, record: Record) -> None:
        """Remember a request that is over."""
        self._waiting.append(record)

    async def rows(self) -> AsyncIterator[dict[str, Any]]:
        """The newest first; a line that is damaged is passed over."""
        await asyncio.shield(self._tell())  # whoever asks may leave
        async for each in self._ledger.logged("requests"):
            row = dict_of(read_json(each, Any))
            if row.keys() >= FILTERED and isinstance(row["startTime"], str):
                yield row

    async def _tell(self) -> None:
        if self._waiting and not (self._ledger.away or self._ledger.lost):
            told, self._waiting = self._waiting, collections.deque(maxlen=self._most)
            # In a thread: thousands would keep streams waiting.
            rows = await asyncio.to_thread(lambda: [as_json(each.to_spend_log()) for each in told])
            self._ledger.log("requests", self._most, rows)
            self._unwritten.extend(rows if self._path else ())

    async def run(self) -> None:
        """Save once a second, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_INTERVAL)
            await self.save()

    async def save(self) -> None:
        """Write what is not written; what cannot be is tried again, as far as it is remembered."""
        async with self._saving:
            await self._tell()
            rows, self._unwritten = self._unwritten, collections.deque(maxlen=self._most)
            try:
                await asyncio.to_thread(self._write, rows) if rows else None
                self._error = ""
            except Exception as error:  # noqa: BLE001 - whatever it is, requests go on
                rows.extend(self._unwritten)
                if str(error) != self._error:
                    log.error("the request log cannot be written: %s", error)
                self._unwritten, self._error = rows, str(error)

    def _write(self, rows: collections.deque[bytes]) -> None:
        data = b"".join(row + b"\n" for row in rows)
        descriptor = os.open(self._path, LOG_FLAGS, STORE_MODE)
        with open(descriptor, "ab+", buffering=0) as file:
            if size := file.tell():
                file.seek(size - 1)
                data = data if file.read(1) == b"\n" else b"\n" + data  # it was cut
            append_whole(file, data)
        rows.clear()  # they are there, even where the file cannot be moved away
        if size + len(data) > LOG_SIZE:
            os.replace(self._path, f"{self._path}.1")


@dataclass(slots=True)
class Histogram:
    """How long something took: seconds, counted in LATENCY_BUCKETS."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS) + 1))
    total: float = 0.0


class Traffic:
    """Requests by (key, model, status, outcome), what was ``used`` by (key, model), a Histogram for
    each of TIMINGS by model; beyond MAX_LABELS pairs, or MAX_MODELS_A_DAY, all are one."""

    def __init__(self) -> None:
        self.requests: collections.Counter[tuple[str, str, int, str]] = collections.Counter()
        self.used = collections.defaultdict[tuple[str, str], Tally](Tally)
        self.timings = collections.defaultdict[str, list[Histogram]](
            lambda: [Histogram() for _ in TIMINGS]
        )
        self.upstream = dict[str, Any].fromkeys(("last_success", "last_failure", "last_error"))
        self._pairs: set[tuple[str, str]] = set()

    def count(self, record: Record) -> None:
        """Count a request that is over."""
        pair = key, model = record.shown_key, record.model or NO_MODEL
        if len(self._pairs) < MAX_LABELS:
            self._pairs.add(pair)
        elif pair not in self._pairs:
            key = model = OTHER_MODELS
        self.requests[key, model, record.status, record.outcome] += 1
        if model not in self.timings and len(self.timings) >= MAX_MODELS_A_DAY:
            model = OTHER_MODELS
        started = record.arrived
        timings: list[float | None] = [record.over - started, None, None, None]
        if record.first:
            timings[1] = record.first - started
        if record.asked and record.answered:  # what the gateway itself added stands last
            before, after = record.asked - (record.whole or started), record.first - record.answered
            timings[2:] = record.over - record.asked, max(0.0, before) + max(0.0, after)
        for histogram, seconds in zip(self.timings[model], timings, strict=True):
            if seconds is not None:
                histogram.counts[bisect.bisect_left(LATENCY_BUCKETS, seconds)] += 1
                histogram.total += seconds

    def book(self, key: str, charges: Charges) -> None:
        """Count what a request or a batch used, by its models."""
        for model, tally in charges:
            label = (key, model or NO_MODEL)
            if label not in self.used and len(self.used) >= MAX_LABELS:
                label = (OTHER_MODELS, OTHER_MODELS)
            self.used[label].add(tally)

    def failed(self, error: str) -> None:
        """The upstream did not answer, or not well."""
        self.upstream |= {"last_failure": now(), "last_error": error}


# ─── Rules ────────────────────────────────────────────────────────────────────────────────────────

BEARER = re.compile(r"bearer[ \t]+(.*)", re.IGNORECASE)
# Where a caller may show a credential, in the order in which they are looked at (LiteLLM's).
CREDENTIAL_HEADERS = ("x-litellm-api-key", "authorization", "x-api-key")
OWN_CREDENTIALS = {"authorization": ("Authorization", "Bearer "), "x-api-key": ("x-api-key", "")}
MAX_KEY_STARTS = 50  # of what may be a key, in one text; no client's fields have so many
OFFERED_CODINGS = ("gzip", "identity")  # of answers that are metered


@dataclass(slots=True)
class Caller:
    """Who sends a request: ``key`` is None for the master key and in open mode; ``own`` is a
    credential of his own, as the header (name, value) it came in, and then his account pays.
    ``presented`` is every key of this gateway that he showed; none may go upstream anywhere."""

    presented: tuple[str, ...] = ()
    key: VirtualKey | None = None
    is_master: bool = False
    own: tuple[str, str] | None = None


def candidates(headers: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """The credentials shown, as (lower-case header name, value without its scheme), but for empty
    ones. ``Authorization`` counts with the Bearer scheme only, others without it too (LiteLLM)."""
    shown = []
    for header in CREDENTIAL_HEADERS:
        for value in headers.get(header, ()):
            bearer = BEARER.fullmatch(value)
            credential = bearer[1].strip() if bearer else "" if header == "authorization" else value
            if credential and credential.lower() != "bearer":
                shown.append((header, credential))
    return shown


class Doors:
    """Says who may come in. Open mode holds where no master key is set and no key was made; but one
    that was started closed, and may listen to the world, stays so when its last key goes."""

    def __init__(self, settings: Settings, ledger: AnyLedger) -> None:
        self._ledger = ledger
        self._address = settings.address.lower()
        self.take_secrets(settings)
        self.started_open = not (settings.master_key or ledger.count)

    def take_secrets(self, settings: Settings) -> None:
        """Let these master keys in from now on, and no others."""
        named = {"master": settings.master_key, "master_next": settings.master_key_next}
        self._master_keys = {name: key for name, key in named.items() if key}
        self._masters = {name: hash_key(key) for name, key in self._master_keys.items()}

    @property
    def is_open(self) -> bool:
        """Whether any or no credential is let in."""
        return self.started_open and not self._ledger.count

    def is_master(self, hashed: str) -> str:
        """Whose this hash is: "master", "master_next", or empty; takes the same time for all."""
        found = [name * hmac.compare_digest(hashed, own) for name, own in self._masters.items()]
        return next(filter(None, found), "")

    def refuse_foreign(self, head: RequestHead) -> None:
        """In open mode nothing but where a request comes from tells a program on this machine from
        a web page in its browser, or from one whose name leads here (DNS rebinding). Raises 403."""
        if not self.is_open:
            return
        places = [origin.partition("://")[2] for origin in head.values.get("origin", ())]
        places += [head.host] if head.host else []  # HTTP/1.0 has none, and no browser speaks it
        sites = {site.lower() for site in head.values.get("sec-fetch-site", ())}
        if "cross-site" in sites or not all(map(self._is_here, places)):
            text = "This gateway is open, so it takes requests to and from this machine's own"
            advice = "Set GATEWAY_MASTER_KEY where it is started, and use a virtual key."
            raise APIError(403, f"{text} addresses only. {advice}")

    def _is_here(self, authority: str) -> bool:
        """Whether a host (with or without port) is loopback, or where --address says to listen."""
        host = re.sub(r":[0-9]*$", "", authority).strip("[]").lower()
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return bool(host) and host == self._address
        # An address that is typed as such cannot have been led here by a name.
        return address.is_loopback or bool(self._address)

    async def authenticate(
        self, headers: Mapping[str, Sequence[str]], record: Record | None = None
    ) -> Caller:
        """Find the caller in request headers (lower-case name → values). Raises APIError 401; whose
        key is refused then stands in the ``record``."""
        caller, refused, shown = Caller(), "", candidates(headers)
        for header, credential in shown:
            hashed = hashlib.sha256(credential.encode("latin-1", "replace")).hexdigest()
            if self.is_master(hashed):
                caller.is_master = caller.is_master or caller.key is None
            elif found := await self._ledger.find_hash(hashed):
                key, status = found
                if status != "active":
                    if record is not None and not refused:
                        record.belongs_to(key)
                    its = f"'s {status[4:]} is blocked" if status.startswith("its ") else ""
                    status = "blocked" if status == "revoked" else status
                    refused = refused or its or f" is {status}"
                elif caller.key is None and not caller.is_master:
                    caller.key = key
            else:
                name, scheme = OWN_CREDENTIALS.get(header, ("", ""))  # it goes up as it came in
                if name and caller.own is None and credential.startswith(OWN_CREDENTIAL_PREFIX):
                    caller.own = name, scheme + credential
                continue
            caller.presented += (credential,)
        if caller.key is not None or caller.is_master or self.is_open:
            return caller
        text = "No API key was sent. Send a virtual key as 'x-api-key' or 'Authorization: Bearer'."
        if refused:
            text = f"This virtual key{refused}. Ask whoever runs the gateway for another."
        elif shown:
            text = "Unknown API key. Use a virtual key that this gateway gave out."
        raise APIError(401, text)

    async def admit(self, hashed: str) -> Caller:
        """The caller whose session a key with this hash opened. Raises APIError 401."""
        found = await self._ledger.find_hash(hashed)
        if self.is_master(hashed) or (found and found[1] == "active"):
            return Caller(key=found[0] if found else None, is_master=not found)
        raise APIError(401, "The key of this session is not good any more. Log in with another.")

    async def holds_key(self, text: str, shown: Sequence[str]) -> bool:
        """Whether a key of this gateway stands in a text: one that was ``shown``, or any other."""
        for key in filter(None, (*shown, *self._master_keys.values())):
            if key in text:
                return True
        if KEY_PREFIX not in text:
            return False
        starts = [match.start() for match in re.finditer(KEY_PREFIX, text)]
        if len(starts) > MAX_KEY_STARTS:
            return True
        return await self._ledger.knows(self._hashes_in(text, starts))

    def _hashes_in(self, text: str, starts: Iterable[int]) -> Iterator[str]:
        # A key may have any printable characters, so whatever length it may have is tried.
        for start in starts:
            most = text[start : start + MAX_KEY_LENGTH].encode("latin-1", "replace")
            digest = hashlib.sha256(most[: MIN_KEY_LENGTH - 1])
            for end in range(MIN_KEY_LENGTH, len(most) + 1):
                digest.update(most[end - 1 : end])
                yield digest.hexdigest()


NOBODY = Caller()
OPERATOR = VirtualKey(resources="all")  # the master key, and whoever comes in open mode
SESSION_COOKIE, SESSION_HOURS = "gateway_session", 12
MAX_SESSIONS = 20  # of a key; the oldest goes
WRONG_TRIES = 10  # a minute, of an address (of IPv6: a site), to log in
MAX_ADDRESSES = 10_000  # whose wrong tries are counted


class Sessions:
    """Who is logged in at the page: a random id stands for the hash of the key that opened it, and
    is good for as long as that is. A page elsewhere can change nothing with it."""

    def __init__(self, ledger: AnyLedger) -> None:
        self._ledger = ledger
        self._wrong = collections.OrderedDict[str, Bucket]()

    async def open(self, hashed: str) -> str:
        """Begin one; its id."""
        name = secrets.token_urlsafe(32)
        at, length = f"session:{hash_key(name)}", SESSION_HOURS * 3600
        await self._ledger.keep(at, hashed, length, MAX_SESSIONS)
        return name

    async def close(self, request: Request) -> None:
        """End a request's session."""
        await self._ledger.drop(self._shown(request))

    async def find(self, request: Request) -> str:
        """The hash of the key that opened a request's session; none: empty. Raises APIError 403."""
        shown = self._shown(request)
        hashed = await self._ledger.recall(shown) if shown else ""
        if hashed and request.head.method not in ("GET", "HEAD"):
            self.refuse_foreign(request.head, must_say=True)
        return hashed

    def refuse_foreign(self, head: RequestHead, *, must_say: bool) -> None:
        """Raise APIError 403 where a browser says that not the page itself sends a request; or,
        where it ``must_say`` so, is silent."""
        same = [each == "same-origin" for each in head.values.get("sec-fetch-site", ())]
        same += [o.partition("://")[2] == head.host for o in head.values.get("origin", ())]
        if not all(same) or (must_say and not same):
            raise APIError(403, "Only the page itself may change anything with its session.")

    def _shown(self, request: Request) -> str:
        cookie = request.cookies.get(SESSION_COOKIE)
        return f"session:{hash_key(cookie.value)}" if cookie else ""

    def slow_down(self, address: str, *, wrong: bool = False) -> None:
        """Count a ``wrong`` try. Raises APIError 429 where an address has had too many."""
        bucket = self._wrong.pop(address, None) or Bucket(WRONG_TRIES, time.monotonic())
        if wrong:
            bucket.draw(1, time.monotonic())
        self._wrong[address] = bucket
        if len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)
        if wait := math.ceil(bucket.seconds_until(1, time.monotonic())):
            headers = [("retry-after", str(wait))]
            raise APIError(429, f"Too many wrong tries. Wait {wait} seconds.", headers=headers)


UNREAD = Order()  # until the body is here
Born = dict[tuple[str, str], dict[str, float]]  # by owner and kind: ids, and when they were made


@dataclass(slots=True)
class Visit:
    """A relayed request on its way through the rules, and what they found out about it. ``target``
    is the raw one behind the upstream's base path, ``path`` what rules look at, ``length`` the
    body's: bytes or CHUNKED. ``lines`` are the field lines that go up, with ``credential`` as
    (name, value). ``meter`` reads what it used, ``results`` what a batch did. ``payer`` is the key
    that pays, and has walls; OPERATOR where the caller does, or nobody counts. ``owner`` gets what
    is ``born`` of it, as ``learn`` finds; ``listing`` makes a list his, ``hidden`` fields stay. A
    ``real`` key carries it, unless its caller does: one of ``keys``, which `find_keys` found by the
    ``homes`` of things that it names (by id); each is asked once at most."""

    gateway: Gateway
    head: RequestHead
    target: str
    length: int
    record: Record
    path: str
    route: Route
    caller: Caller
    payer: VirtualKey
    order: Order
    lines: list[str]
    owner: str = ""
    reads_body: bool = False
    refers: Mapping[bytes, str] | None = None  # its body is looked through, for these words too
    is_pooled: bool = False  # a real key carries it
    homes: dict[str, str] | None = None
    keys: Sequence[RealKey] = ()
    real: RealKey | None = None
    hidden: frozenset[str] = NO_OPTIONS
    listing: Callable[[Visit, bytes], Awaitable[bytes]] | None = None
    learn: Callable[[object], None] | None = None
    born: Born = field(default_factory=dict)
    credential: tuple[str, str] | None = None
    accounts: Sequence[Limited] = ()  # whose limits it is held against
    has_budget: bool = False  # one of them, and he does not pay himself
    hold: Hold | None = None
    meter: Meter | None = None
    results: Meter | None = None
    mask: Mask | None = None
    answer: ResponseHead | None = None
    began: bool = False  # all of it went up
    phase: RequestPhase = RequestPhase.JUDGED

    async def keep(self) -> None:
        """Remember what is ``born``, before the client hears of it. Raises APIError."""
        born = {p: made for p, made in self.born.items() if p[0] or self.payer is OPERATOR}
        self.born.clear()
        if born:
            await self.gateway.ledger.own(born, (self.real or self.home).name)

    @property
    def home(self) -> RealKey:
        """The real key for what stands in a workspace."""
        return self.gateway.real_keys.at(self.payer.home)

    @property
    def group(self) -> str:
        """What it shares rate limits with."""
        return self.group_of(self.order.model)

    def group_of(self, model: str) -> str:
        """The same, where it is for this model."""
        group = self.route.kind or model_class(model) or "other"
        return f"{group} fast" if self.order.fast else group

    def find_keys(self, body: bytes | None) -> None:
        """Find the real keys that may carry it, the best one first, and take what does not rest; a
        body that is not kept is None. Raises APIError 400 for things of two workspaces."""
        pool, route = self.gateway.real_keys, self.route
        if not pool.several:
            self.keys = (pool.first,)
        elif self.homes or route.kind or body is None:
            born = {place: name for name, place in (self.homes or {}).items() if place}
            self.keys = pool.beside(pool.at(next(iter(born))) if born else self.home)
            if away := [name for place, name in born.items() if pool.at(place) not in self.keys]:
                several = f"{printable(next(iter(born.values())))} and {printable(away[0])}"
                text = f"{several} were made in different workspaces, and one request has one."
                raise APIError(400, f"{text} Make one of them again, beside the other.")
        else:
            told = self.head.values.get(SESSION_FIELD)
            self.keys = pool.ranked(self.payer.owner, told[0][:SHOWN_LENGTH] if told else "")
            if pool.rests and is_bound(body):
                self.keys = self.keys[:1]
        self.take(pool.choose(self.keys, self.group) if pool.rests else self.keys[0])

    def take(self, key: RealKey) -> None:
        """Let a real key carry it; that never comes back."""
        key.requests += 1
        self.real, self.credential = key, key.header
        self.record.upstream_keys += (key.name,)
        if len(key.secret) >= MIN_SECRET_LENGTH:
            self.mask = Mask(key.secret, key.secret_bytes)


def is_bound(body: bytes) -> bool:
    """Whether only the real key that gave out what stands in it can take that."""
    return b'"fallback_credit_token"' in body or b'"previous_message_id"' in body


@dataclass(slots=True)
class Kept:
    """A request's body that was kept, and what was read of it: once, however many rules look."""

    data: bytes
    breathe: Breathe
    document: object = None
    how: tuple[bool, ...] = ()  # it was read: strictly, and wholly

    def read_at_once(self) -> object:
        """What it says, but where names stand twice in an object; None where that takes long."""
        data, decode = self.data, decoder_of(Any)
        is_light = len(data) <= LIGHT_CONTAINED and sum(map(data.count, b"[{,")) <= LIGHT_CONTAINERS
        with contextlib.suppress(Exception):
            return decode(data) if decode and is_light else None
        return None

    async def read(self, *, strictly: bool, wholly: bool = False) -> object:
        """What it says: to the letter (APIError 400 where that is not clear), or what of it a price
        depends on (None where it cannot be read). An empty one says nothing."""
        if self.data and self.how < (strictly, wholly):
            self.how = strictly, wholly
            read = read_body(self.data, self.breathe, strictly=strictly, wholly=wholly)
            self.document = await read
        return self.document


class Rule:
    """One thing that a request may not do, or that is done to it on its way. Each step may stay as
    it is; `head` and `body` may raise APIError, which is the answer then."""

    async def head(self, visit: Visit) -> None:
        """Judge by the head. With ``visit.reads_body`` the body is kept whole, or refused (413)."""

    async def body(self, visit: Visit, body: Kept) -> None:
        """Judge the whole request, if its body was kept: of JSON, and of what is billed."""

    def filters(self, visit: Visit, head: ResponseHead) -> Iterable[ResponseFilter]:
        """What is to see the answer's body."""
        return ()

    def fields(self, visit: Visit, head: ResponseHead) -> Iterable[tuple[str, str]]:
        """Fields of the answer, in the place of the upstream's of these names."""
        return ()

    def end(self, visit: Visit) -> None:
        """The request is over: book it, and free what is held for it."""


class Rules:
    """The rules that requests pass, in their order; each step has those that do something."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        def having(step: str) -> tuple[Callable[..., Any], ...]:
            plain = getattr(Rule, step)
            return tuple(getattr(r, step) for r in rules if getattr(type(r), step) != plain)

        self.head, self.body, self.fields, self.end = map(having, ("head", "body", "fields", "end"))
        self.filters = having("filters")[::-1]  # the way back


class Credentials(Rule):
    """Who it is, and whether a real key goes up in place of his."""

    async def head(self, visit: Visit) -> None:
        gateway, head, record = visit.gateway, visit.head, visit.record
        if gateway.doors.started_open:
            gateway.doors.refuse_foreign(head)
        elif head.method == "OPTIONS" and not visit.length and is_preflight(head):
            return
        visit.caller = caller = await gateway.doors.authenticate(head.values, record)
        if (key := caller.key) is not None:
            record.belongs_to(key)
            if caller.own is None:
                visit.payer = key
        elif caller.is_master or record.key is not None:  # another's, beside what is let in
            record.key, record.hashed, record.tags = None, "", ()
            record.shown_key = MASTER_NAME if caller.is_master else NO_KEY
        visit.credential, visit.is_pooled = caller.own, caller.own is None
        if visit.is_pooled or caller.key is not None:
            visit.accounts = gateway.ledger.limited(caller.key)
            visit.has_budget = visit.is_pooled and any(of.has_budget for of in visit.accounts)
        if visit.is_pooled and not gateway.real_keys.keys:
            text = "The gateway has no Anthropic credential to use. Whoever runs the gateway"
            raise APIError(401, f"{text} must set ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN.")
        if (key := visit.payer) is not OPERATOR and not key.home:
            pool = gateway.real_keys
            await gateway.ledger.settle(key, pool.choose(pool.ranked(key.owner), ALL).name)

    def filters(self, visit: Visit, head: ResponseHead) -> Iterable[ResponseFilter]:
        return () if visit.mask is None else (visit.mask,)


def is_preflight(head: RequestHead) -> bool:
    """Whether a browser asks, with no credential, if a page may call (Fetch, "CORS-preflight")."""
    asks = "origin" in head.values and "access-control-request-method" in head.values
    return asks and not candidates(head.values)


class Routes(Rule):
    """Which paths a key may call (``allowed_routes``), and how large a body may be."""

    async def head(self, visit: Visit) -> None:
        if visit.length > (limit := visit.gateway.settings.max_body_size):
            raise too_large(limit)
        key, route = visit.caller.key, visit.route
        if key is not None and (key.allowed_routes or not route.open):
            check_route(key, route, visit.path, counts=visit.has_budget)


def check_route(key: VirtualKey, route: Route, path: str, *, counts: bool) -> None:
    """Raise APIError 403 for a path that the key may not call, as where its cost ``counts``."""
    patterns = [pattern.removeprefix("/anthropic") for pattern in key.allowed_routes or ["*"]]
    group = "" if route.open else cast("re.Match[str]", GROUP.match(path))[0]
    matching = [p for p in patterns if p.startswith(group) and fnmatch.fnmatchcase(path, p)]
    shown = printable(path)
    if not matching:
        beyond = "must name it; without, keys reach messages, batches, models, files and skills"
        why = "leave it out" if route.open else beyond
        raise APIError(403, f"This key may not call {shown}; its 'allowed_routes' {why}.")
    if not route.open and counts and not key.unmetered_routes:
        text = f"This key has a budget, and what {shown} costs cannot be counted. Whoever runs the"
        raise APIError(403, f"{text} gateway may give the key 'unmetered_routes': true.")


def too_large(limit: int) -> APIError:
    """The 413 of a body of more than ``limit`` bytes."""
    return APIError(413, f"The request body is larger than {limit:,} bytes.")


class Models(Rule):
    """Which models a key, its team and its user may use; the list of models has no others."""

    async def head(self, visit: Visit) -> None:
        if not any(models_of(visit)):
            return
        visit.reads_body = visit.reads_body or not visit.route.unread
        if visit.is_pooled and visit.route.fetches and visit.path.rstrip("/") == "/v1/models":
            path, _, query = visit.target.partition("?")
            asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            if most := rows_asked(asked):  # else the upstream says what is wrong
                told = urllib.parse.urlencode(asked | {"limit": MAX_ROWS_LISTED})
                visit.target, backwards = f"{path}?{told}", bool(asked.get("before_id"))
                visit.listing = functools.partial(self.list_usable, most=most, backwards=backwards)
                is_empty = visit.head.method == "HEAD"
                visit.hidden |= LIST_FIELDS | ({"content-length"} if is_empty else set())

    async def body(self, visit: Visit, body: Kept) -> None:
        route = visit.route
        for of, models in () if route.unread else models_of(visit):
            document = await body.read(strictly=True, wholly=not route.open)
            if not document and not (route.open or route.deletes):
                text = "is limited to some models, and this request names none."
                raise APIError(403, f"This {of} {text}")
            await check_models(models, route, document, body.breathe, of)

    def filters(self, visit: Visit, head: ResponseHead) -> Iterable[ResponseFilter]:
        if visit.listing is None or visit.route.kind or head.status != 200:
            return ()
        return (ResponseFilter(rewrite=functools.partial(visit.listing, visit)),)

    async def list_usable(self, visit: Visit, body: bytes, *, most: int, backwards: bool) -> bytes:
        """A page of those that may be used, of all."""
        document = dict_of(read_json(body, Any))
        rows = list_of(document.get("data"))
        for _, models in models_of(visit):
            rows = [r for r in rows if any(fnmatch.fnmatchcase(id_of(r), m) for m in models)]
        shown = rows[-most:] if backwards else rows[:most]
        return as_list(body, document, shown, len(rows) > most or document.get("has_more"))


def models_of(visit: Visit) -> Iterator[tuple[str, list[str]]]:
    """What limits its caller to some models, and to which."""
    limited = (of for of in visit.accounts if of.models and ALL_TEAM_MODELS not in of.models)
    return ((of.of, of.models) for of in limited)


@functools.lru_cache(maxsize=256)
def readable_codings(accepted: tuple[str, ...]) -> str:
    """An Accept-Encoding cut down to the codings that the gateway reads itself."""
    offers = [offer.strip() for offer in ", ".join(accepted).split(",")]
    kept = [o for o in offers if o.partition(";")[0].strip().lower() in OFFERED_CODINGS]
    return ", ".join(kept) or "identity"


class Fields(Rule):
    """Which of the request's fields go on, in their order: all but those that DROPPED_* and
    ``Connection`` name, and those that hold a key of this gateway, which goes on nowhere."""

    async def head(self, visit: Visit) -> None:
        head, caller, lines = visit.head, visit.caller, visit.lines
        unwanted = head.options
        if caller.own is None:
            unwanted |= {WORKSPACE_FIELD}
            is_list = visit.listing or visit.route.kind and not visit.route.name
            if visit.route.results_of or is_list:
                unwanted |= {"range", "if-range"}  # of a part nobody can tell what it is
        is_read = visit.route.is_read or visit.listing
        offered = head.values.get("accept-encoding") if is_read else None
        for lower, _, name, line, goes_up, _ in head.fields:
            if not goes_up or lower in unwanted:
                continue
            if offered and lower == "accept-encoding":  # the first stands for all of them
                line, unwanted = f"{name}: {readable_codings(offered)}", unwanted | {lower}
            lines.append(line)
        for key in caller.presented:
            if key in "\n".join(lines):
                lines[:] = [line for line in lines if key not in line]
        target = urllib.parse.unquote(visit.target, "latin-1")
        text = "\n".join((head.method, visit.target, target, *lines))
        if await visit.gateway.doors.holds_key(text, caller.presented):
            text = "A key of this gateway stands in the path, the query or a header field where it"
            advice = "Send it as 'x-api-key' or 'Authorization: Bearer' alone."
            raise APIError(400, f"{text} would go on to Anthropic. {advice}")


class Limits(Rule):
    """How much a key, its team, its user and all may use: requests and tokens a minute, requests at
    a time, USD. The worst case of what is under way is held, and a request is let in while what is
    spent and held is below the budget: one answer at most passes it, and near its edge a key works
    one request at a time."""

    async def head(self, visit: Visit) -> None:
        key, payer, route = visit.caller.key, visit.payer, visit.route
        pays, call_id = key is None or payer is key, visit.record.call_id
        hold = Hold(visit.accounts, visit.record.started, pays, call_id=call_id)
        if visit.accounts:
            pays = visit.has_budget and not route.free
            if pays and not visit.gateway.prices.available:
                text = "This key has a budget, and it is not known here what tokens cost."
                advice = "Whoever runs the gateway must install genai-prices, or set --prices."
                raise APIError(503, f"{text} {advice}")
            follows, shares = pays and route.billed, route.billed
            await visit.gateway.ledger.admit(hold, pays=pays, shares=shares, later=follows)
            visit.reads_body |= follows
        visit.hold = hold

    async def body(self, visit: Visit, body: Kept) -> None:
        route, hold = visit.route, visit.hold
        if not route.billed:
            return
        if not visit.reads_body:
            visit.order = glance(body.data)
            return
        document = await body.read(strictly=False)
        batched = route.makes_batch
        visit.order = await read_order(document, body.data, batched=batched, breathe=body.breathe)
        if hold is not None and visit.has_budget:
            ledger = visit.gateway.ledger
            worst = functools.partial(visit.gateway.prices.worst, visit.order, hold.started)
            prompt = worst(bare=True) if ledger.leases else ()
            try:
                await ledger.hold(hold, worst(), prompt, fit=batched)
            except BaseException:
                hold.pays = False  # as nothing is held, nothing is counted
                raise

    def filters(self, visit: Visit, head: ResponseHead) -> Iterable[ResponseFilter]:
        route = visit.route
        if head.status != 200 or not route.billed or route.batch:
            return ()
        room = functools.partial(visit.gateway.held.find_room, visit.record.hashed)
        visit.meter = Meter(head.get("content-type"), room=room, learn=visit.learn)
        return (visit.meter,)

    def fields(self, visit: Visit, head: ResponseHead) -> Iterable[tuple[str, str]]:
        """Anthropic's fields of the key's own limits, LiteLLM's of cost and spend, in USD."""
        key, payer, gateway = visit.caller.key, visit.payer, visit.gateway
        if key is None:
            return ()
        is_limited = any(of.account.buckets for of in visit.accounts)
        fields = gateway.ledger.rates(visit.accounts, head.values) if is_limited else []
        if payer is OPERATOR or not gateway.prices.available:
            return fields
        if visit.phase is RequestPhase.SETTLED and visit.meter is not None:
            fields.append(("x-litellm-response-cost", f"{visit.record.tally.spend:f}"))
        moment = now()
        if head.status == 200 and visit.path == BILLED[0] and visit.has_budget:
            visit.hidden |= {name for name in head.values if name.startswith(UNIFIED)}
            for fullest in fullness(visit.accounts, moment, visit.order.model)[:1]:
                passed = [p for p in gateway.settings.warned_parts[:-1] if p < fullest.part]
                part, mark = f"{min(fullest.part, ALMOST):.2f}", str(passed[-1]) if passed else ""
                fields += unified(part, mark, fullest.budget.end(moment))
        spent = payer.spent(moment)
        fields.append(("x-litellm-key-spend", f"{spent:f}"))
        if payer.max_budget is not None:
            left = max(ZERO, payer.max_budget - spent)
            fields.append(("x-litellm-key-max-budget", f"{payer.max_budget:f}"))
            fields.append(("x-litellm-key-remaining-budget", f"{left:f}"))
        return fields

    def end(self, visit: Visit) -> None:
        gateway, record, hold, order = visit.gateway, visit.record, visit.hold, visit.order
        record.model = order.model
        if hold is None:
            return
        measured = visit.meter.measured if visit.meter is not None else self.measured(visit)
        charges: list[tuple[str, Tally]] = []
        if measured is not None and hold.pays:
            if not measured.final:
                measured.complete_with(order)
            record.model = measured.model or order.model
            record.estimated = measured.beyond is not None
            if measured.blind:
                log.warning("call %s: what is not known costs its worst case", record.call_id)
                charges = gateway.prices.worst(order, hold.started)
            else:
                charges = gateway.prices.charge(measured, hold.started)
            if len(charges) == 1:
                record.tally = charges[0][1]
            for _, tally in charges if len(charges) > 1 else ():
                record.tally.add(tally)
            gateway.traffic.book(record.shown_key, charges)
        failed, tags = record.status >= 400, record.tags
        gateway.ledger.book(hold, charges, model=record.model, failed=failed, tags=tags)

    def measured(self, visit: Visit) -> Measured | None:
        """What a response without a meter used; None where it is nothing that this request pays."""
        route, outcome, hold, answer = visit.route, visit.record.outcome, visit.hold, visit.answer
        if not visit.began or not route.billed:
            return None
        if route.makes_batch:
            # One that may have been made, though nobody knows its name, costs what is held for it.
            made = answer is None or answer.status < 300
            is_held = hold is not None and bool(hold.amounts or hold.costs)
            return Measured(blind=True) if made and is_held else None
        # Whoever leaves before the head pays what was under way; without it no stream has begun.
        if answer is not None or outcome not in ("client_gone", "stopped", "timeout"):
            return None
        if visit.order.streams:
            visit.order.thinking = 0
        return Measured()


@functools.lru_cache(maxsize=1024)
def unified(part: str, passed: str, resets: datetime | None) -> list[tuple[str, str]]:
    """What tells Claude Code 2.1.331 of the fullest budget, as Anthropic's own gateway does."""
    status = "allowed_warning" if passed else "allowed"
    told = {"status": status, "representative-claim": "overage", "overage-status": status}
    told["overage-utilization"] = part
    if passed:
        told["overage-surpassed-threshold"] = passed
    if resets is not None:
        told["reset"] = told["overage-reset"] = str(int(resets.timestamp()))
    return [(UNIFIED + name, value) for name, value in told.items()]


class Batches(Rule):
    """A batch is its maker's: held until it is booked, booked once, before it is deleted."""

    async def head(self, visit: Visit) -> None:
        route, gateway = visit.route, visit.gateway
        if route.deletes and not visit.caller.own:
            await gateway.batches.book(route.name)
        elif route.results_of and not visit.caller.own:
            await gateway.ledger.unbooked(route.results_of)  # so that a line is booked at once

    def filters(self, visit: Visit, head: ResponseHead) -> Iterable[ResponseFilter]:
        batch, gateway = visit.route.results_of, visit.gateway
        if head.status == 200 and visit.route.batch and is_json(head.get("content-type")):
            return (ResponseFilter(rewrite=functools.partial(self.look, visit)),)
        if head.status != 200 or not batch or visit.caller.own is not None:
            return ()
        room = functools.partial(gateway.held.find_room, visit.record.hashed)
        book = functools.partial(gateway.batches.book_result, batch)
        visit.results = Meter("", book, room, visit.learn)
        return (visit.results,)

    async def look(self, visit: Visit, plain: bytes) -> bytes:
        """Look at a batch object: what it may cost is held on, if it was just made, before its
        maker is told; if it has ended, it is time to book it. Its results are then found here."""
        gateway, payer, batch = visit.gateway, visit.payer, dict_of(read_json(plain))
        name, makes = id_of(batch), visit.route.makes_batch
        if name and makes and payer is not OPERATOR and visit.hold is not None:
            gateway.ledger.own_batch(payer.account, name, visit.hold)
            gateway.batches.watch(name)
            with contextlib.suppress(APIError):  # which is said, and tried again each second
                await gateway.ledger.save()
        elif batch.get("processing_status") == BATCH_ENDED:
            gateway.batches.hurry(name)
        return rewrite_results_url(plain, gateway.base_path)

    def end(self, visit: Visit) -> None:
        results = visit.results
        if results is not None and visit.record.outcome == "ok" and not results.measured.blind:
            visit.gateway.ledger.finish_batch(visit.route.results_of)


LIST_FIELDS = {"etag", "last-modified", "link", "x-total-count"}  # tell of all rows
LIST_TIMEOUT = 60.0  # seconds for a further part of a list
DEFAULT_LIMIT, MAX_ROWS_LISTED, IDS_A_CALL = 20, 1000, 100  # SDK: types/file_list_params.py
MAX_PARAMETERS = 1000  # of a query, far more than any call has
CURSOR_TRIES = 3  # rows behind which a list is asked for, where it does not go on
MAX_PAGES = 10  # of a list that one request looks through
FILE_LIST = {"limit", "page", "after_id", "before_id", "beta"}  # what can be asked of ids as well
CURSORS = ("after_id", "before_id")
CURSOR = re.compile(r"page_own_([0-9]+[.][0-9]+)_([\w-]+)")  # the gateway's own: behind which file
# A session and a run are of a deployment, a file is of the session that wrote it.
PARENTS = {"sessions": "deployments", "deployment_runs": "deployments", "files": "sessions"}
DREAMT = ("memory_stores", "sessions")
SAFE_ID = re.compile(r"[\w-]{1,200}")
no_id = functools.partial(secrets.token_hex, 12)  # behind its prefix; that no thing has
TELLING = (int, float, list)  # of a list's members: what rows that it does not show may change


class Walls(Rule):
    """A key reaches what it made, or its team, and what is shared with all. Of all else it is told
    what it would be told of what does not exist, and the upstream is not asked."""

    async def head(self, visit: Visit) -> None:
        key, route, head = visit.payer, visit.route, visit.head
        # Without walls, what a request names still tells where it has to go.
        looks = visit.is_pooled and visit.gateway.real_keys.several
        if key is not OPERATOR:
            visit.hidden, visit.owner = visit.hidden | IDENTITY_FIELDS, key.owner
        elif not looks:
            return
        has_walls = key.resources != "all"
        if route.name:
            # What workers of an environment do is not for all who may use it.
            reads = route.fetches and not route.below.startswith("/work")
            visit.owner = (await self.reach(visit, route.kind, route.name, changes=not reads)).owner
        visit.learn = functools.partial(self.learn, visit.born, visit.owner)
        if (looks or has_walls) and not route.unread:
            is_packed = "content-encoding" in head.values and head.coding != ""
            if not (is_packed or other_charset(head.get("content-type"))):
                visit.refers = EVERYDAY_IN_MESSAGES if route.kind in ("", "batches") else EVERYDAY
            elif has_walls:
                text = "What this key sends is looked through: send it as UTF-8, uncompressed."
                raise APIError(400, text)
        if not has_walls:
            return
        for profile in head.values.get(PROFILE_FIELD, ()):
            await self.reach(visit, "user_profiles", profile)
        if "?" in visit.target:
            await self.judge_query(visit)
        if route.kind and not route.name and route.fetches:
            visit.listing = self.list_own
            visit.hidden |= LIST_FIELDS | ({"content-length"} if head.method == "HEAD" else set())
            if route.kind == "files":
                await self.ask_by_ids(visit)

    async def body(self, visit: Visit, body: Kept) -> None:
        named, words = 0, visit.refers or {}
        for start in range(0, len(body.data) if words else 0, MIB):
            if start:
                await body.breathe()
            count = names_in(body.data, start, words)
            named = -1 if count < 0 else named + count
            if named < 0:
                break
        if not named:
            return
        document, names = body.read_at_once() if named > 0 else None, NAMES.union(words.values())
        for is_last in (False, True):
            things, found = dict[tuple[str, str], None](), 0
            for each in named_in(document, names):
                if each is None:
                    await body.breathe()
                    continue
                found += 1
                things |= dict.fromkeys(each[1])
            if found == named or is_last:
                break
            # Some are hidden by others, or are none.
            passed_by = [APIError] if visit.payer.resources == "all" else []
            with contextlib.suppress(*passed_by):
                document = await body.read(strictly=True, wholly=True)
        for number, (kind, name) in enumerate(things, start=1):
            await self.reach(visit, kind, name)
            if number % BREATH == 0:
                await body.breathe()

    async def reach(self, visit: Visit, kind: str, name: str, *, changes: bool = False) -> Thing:
        """A thing that the caller may refer to, or change. Raises APIError 404 or 403."""
        key, found = visit.payer, await visit.gateway.ledger.find_things([name])
        thing = found.get(name) or (Thing(kind) if key.resources == "all" else None)
        thing = thing or await self.trace(visit, kind, name)
        if thing is None or not thing.is_for(key):
            raise not_found(kind, name)
        visit.homes = visit.homes or {}
        visit.homes[name] = thing.home
        if changes and not thing.belongs_to(key):
            text = f"{printable(name)} is shared: this key may use it, and its owner change it."
            raise APIError(403, text)
        return thing

    async def trace(self, visit: Visit, kind: str, name: str) -> Thing | None:
        """What is not known here, if the upstream says that Anthropic made it for all, or that it
        came of something that the caller reaches. It is asked only where that may be."""
        key, ledger = visit.payer, visit.gateway.ledger
        is_built_in = kind == "skills" and not name.startswith(KINDS["skills"])
        may_be = await ledger.reached(key, PARENTS[kind]) if kind in PARENTS else is_built_in
        if kind == "memory_stores":
            await self.ask_dreams(visit)
        elif may_be and SAFE_ID.fullmatch(name):
            with contextlib.suppress(UpstreamError):
                row = await self.ask(visit, f"/v1/{kind}/{name}")
                if await self.visible(visit, [row], kind) and is_built_in:
                    return Thing(kind, is_shared=True)
        return (await ledger.find_things([name])).get(name)

    async def ask_dreams(self, visit: Visit) -> None:
        """Dreams make memory stores and sessions, and tell so themselves alone."""
        if await visit.gateway.ledger.reached(visit.payer, "dreams"):
            with contextlib.suppress(UpstreamError):
                page = await self.ask(visit, "/v1/dreams?limit=100")
                await self.visible(visit, list_of(page.get("data")), "dreams")

    async def ask(self, visit: Visit, target: str) -> dict[str, Any]:
        """An object of the upstream's. Raises UpstreamError."""
        told = ("anthropic-version", "anthropic-beta")
        fields = {name: visit.head.get(name) for name in told if name in visit.head.values}
        key = visit.real or visit.home
        answer = await visit.gateway.client.get(target, LIST_TIMEOUT, key, headers=fields)
        document = read_json(answer.body, Any) if answer.code == 200 else None
        if not isinstance(document, dict):
            raise UpstreamError(f"The upstream answered {answer.code} where a part was asked for.")
        return document

    # Lists

    async def judge_query(self, visit: Visit) -> None:
        """Look at the ids of a query; others' in a list of ids become what upstream leaves out."""
        path, _, query = visit.target.partition("?")
        listed, parts = "" if visit.route.name else visit.route.kind, list[str]()
        if query.count("&") > MAX_PARAMETERS:
            raise APIError(400, f"The query has more than {MAX_PARAMETERS:,} parameters.")
        for part in query.split("&"):
            name, value = (urllib.parse.unquote_plus(text) for text in part.partition("=")[::2])
            name = name.partition("[")[0]
            if listed and name == "ids":
                thing = (await visit.gateway.ledger.find_things([value])).get(value)
                if thing is not None and not thing.is_for(visit.payer):
                    part = f"ids[]={KINDS.get(listed, '')}{no_id()}"
            named = listed if name in CURSORS else REFERENCES.get(name)
            try:
                if named and value:
                    await self.reach(visit, named, value)
            except APIError as error:
                raise APIError(400, f"{name}: {error.message}") if name in CURSORS else error
            parts.append(part)
        visit.target = f"{path}?{'&'.join(parts)}"

    async def ask_by_ids(self, visit: Visit) -> None:
        """Have a page of files asked for by the ids that the caller reaches, the newest first."""
        path, _, query = visit.target.partition("?")
        asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        size, page = rows_asked(asked), CURSOR.fullmatch(asked.get("page", ""))
        key, ledger, is_odd = visit.payer, visit.gateway.ledger, asked.keys() - FILE_LIST
        if (
            is_odd
            or not size
            or not page
            and (asked.get("page") or await ledger.reached(key, "sessions"))
        ):
            return  # upstream says what is wrong, or knows another way, or files not seen here yet
        made, size = await ledger.reached(key, "files"), min(size, IDS_A_CALL)
        if (pool := visit.gateway.real_keys).several:  # what is elsewhere is in no list here
            things, here = await ledger.find_things(made), pool.beside(visit.home)
            made = {n: m for n, m in made.items() if pool.at(things[n].home or key.home) in here}
        order = sorted(made, key=made.__getitem__)[::-1]
        after, before = page[2] if page else asked.get("after_id"), asked.get("before_id")
        if after in made:
            order = order[order.index(after) + 1 :]
        elif page:  # it was deleted meanwhile
            order = [name for name in order if made[name] <= float(page[1])]
        if before in made:
            order = order[: order.index(before)]
        ids = (order[-size:] if before else order[:size]) or [f"file_{no_id()}"]
        cursor = f"page_own_{made[ids[-1]]:.6f}_{ids[-1]}" if len(order) > size else ""
        more = functools.partial(self.list_own, target=visit.target, ids=ids, cursor=cursor)
        visit.listing = more
        told = [f"ids[]={urllib.parse.quote(name, safe='')}" for name in ids]
        visit.target = f"{path}?{'beta=true&' if 'beta' in asked else ''}{'&'.join(told)}"

    async def list_own(
        self, visit: Visit, body: bytes, target: str = "", ids: Sequence[str] = (), cursor: str = ""
    ) -> bytes:
        """A list with the caller's rows alone, as it would be if there were no others'. Files may
        have been asked for by ``ids`` instead of ``target``, and the next page be at ``cursor``."""
        document, kind, ledger = read_json(body, Any), visit.route.kind, visit.gateway.ledger
        if not isinstance(document, dict):
            raise APIError(502, "The upstream's list cannot be read.")
        rows = list_of(document.get("data"))
        if ids and set(map(id_of, rows)) <= set(ids):
            return as_list(body, document, rows, cursor)
        if ids:  # it does not know ``ids[]``, and has listed what it has
            visit.target = target
            return await self.list_own(visit, json.dumps(await self.ask(visit, target)).encode())
        if kind in DREAMT and len(await ledger.find_things(map(id_of, rows))) < len(rows):
            await self.ask_dreams(visit)
        more = document.get("next_page")
        if "next_page" in document or "has_more" not in document:
            shown = await self.visible(visit, rows, kind)
        else:
            shown, more = await self.fill(visit, document)
        base_path = visit.gateway.base_path
        return rewrite_results_url(as_list(body, document, shown, more), base_path)

    async def fill(self, visit: Visit, page: dict[str, Any]) -> tuple[list[Any], bool]:
        """A full page of the caller's rows, of as many as it takes, and whether there are more."""
        path, _, query = visit.target.partition("?")
        asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        limit, backwards = rows_asked(asked) or DEFAULT_LIMIT, bool(asked.get("before_id"))
        cursor, kind = "before_id" if backwards else "after_id", visit.route.kind
        shown, seen = list[Any](), set[str]()
        left = set(await visit.gateway.ledger.reached(visit.payer, kind))
        for _ in range(MAX_PAGES):
            rows = [row for row in list_of(page.get("data")) if id_of(row) not in seen]
            found = await self.visible(visit, rows, kind)
            shown = found + shown if backwards else shown + found
            seen.update(map(id_of, rows))
            if len(shown) > limit or not (page.get("has_more") and left - seen and rows):
                break
            for row in (rows if backwards else rows[::-1])[:CURSOR_TRIES]:  # some may be gone
                asked |= {"limit": str(MAX_ROWS_LISTED), cursor: id_of(row)}
                with contextlib.suppress(UpstreamError):
                    page = await self.ask(visit, f"{path}?{urllib.parse.urlencode(asked)}")
                    break
            else:
                raise UpstreamError("The upstream does not go on with this list.")
        return shown[-limit:] if backwards else shown[:limit], len(shown) > limit

    async def visible(self, visit: Visit, rows: Sequence[Any], of: str) -> list[Any]:
        """The rows of a kind that the caller reaches; what came of his own is his."""
        key, shown = visit.payer, list[Any]()
        objects = [row for row in rows if isinstance(row, dict)]
        names = [*map(id_of, objects), *map(parent_of, objects)]
        known = await visit.gateway.ledger.find_things(names)
        for row in objects:
            name, above = id_of(row), known.get(str(parent_of(row)))
            thing = known.get(name)
            if thing is None and above is not None and above.belongs_to(key) and name:
                visit.born.setdefault((above.owner, of), {})[name] = moment_in(row)
                thing = above
            if thing is not None and thing.is_for(key):
                for kind, product in products_of(row):
                    visit.born.setdefault((thing.owner, kind), {})[product] = moment_in(row)
                shown.append(row)
            elif thing is None and of == "skills" and is_published(row):
                shown.append(row)
        await visit.keep()
        return shown

    # What is made

    def filters(self, visit: Visit, head: ResponseHead) -> Iterable[ResponseFilter]:
        route, succeeds = visit.route, 200 <= head.status < 300
        if visit.payer is OPERATOR or not (succeeds and route.kind) or route.results_of:
            return ()
        if visit.listing is not None:
            return (ResponseFilter(rewrite=functools.partial(visit.listing, visit)),)
        if is_event_stream(head):
            return (Meter(EVENT_STREAM, learn=visit.learn),)
        bears = route.kind in BEARERS and route.name and not route.below
        if (bears or not route.fetches) and is_json(head.get("content-type")):
            return (ResponseFilter(rewrite=functools.partial(self.remember, visit)),)
        return ()

    async def remember(self, visit: Visit, body: bytes) -> bytes:
        """What was made is its maker's before he is told of it; so is what his things made."""
        made, route = read_json(body, Any), visit.route
        if not isinstance(made, dict) or route.deletes:
            return body
        if "data" in made and not route.name and visit.payer.resources != "all":
            return await self.list_own(visit, body)
        born, name, below = [*products_of(made)], id_of(made), route.below.strip("/").split("/")
        if name and name not in (route.name, *below) and not route.fetches:
            kind = "deployment_runs" if below[-1] == "run" else below[-1] or route.kind
            born.append((kind, name))
        for kind, name in born:
            visit.born.setdefault((visit.owner, kind), {})[name] = moment_in(made)
        await visit.keep()
        return body

    def learn(self, born: Born, owner: str, document: object) -> None:
        """Containers and files that code wrote are his for whom it ran (code_execution_output)."""
        for holder, things in filter(None, named_in(document, {"container", "file_id"}, False)):
            for kind, name in things:
                if kind == "containers" or holder.endswith("code_execution_output"):
                    born.setdefault((owner, kind), {})[name] = time.time()

    def end(self, visit: Visit) -> None:
        route, answer = visit.route, visit.answer
        deleted = route.name and route.deletes and visit.caller.own is None
        if deleted and answer is not None and answer.status == 200:
            name = (route.name + route.below).strip("/").split("/")[-1]
            visit.gateway.ledger.forget(name, None if visit.payer is OPERATOR else visit.owner)


def id_of(row: object) -> str:
    """The id of an object; empty where it has none."""
    name = row.get("id") if isinstance(row, dict) else None
    return name if isinstance(name, str) else ""


def rows_asked(asked: Mapping[str, str]) -> int:
    """How many rows a query asks for at most; 0 where that is no number that a list takes."""
    limit = asked.get("limit", str(DEFAULT_LIMIT))
    return int(limit) if re.fullmatch("[1-9][0-9]{0,2}|1000", limit) else 0


def as_list(body: bytes, document: dict[str, Any], rows: Sequence[Any], more: object) -> bytes:
    """A list with these rows, and whether there are more or the cursor that leads to them; without
    members of kinds that may tell of others. Where that changes nothing it is as it came."""
    told: dict[str, Any] = {"data": rows, "has_more": bool(more), "next_page": more or None}
    told["first_id"], told["last_id"] = (id_of(rows[0]), id_of(rows[-1])) if rows else (None, None)
    kept = {n: told.get(n, v) for n, v in document.items() if n in told or type(v) not in TELLING}
    if kept == document:
        return body
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()


RULES = (Credentials(), Routes(), Models(), Fields(), Limits(), Walls(), Batches())


# ─── Relay ────────────────────────────────────────────────────────────────────────────────────────

RELAY_PREFIX, RELAYED = "/anthropic", "/anthropic/"
BARE_PREFIX = "/v1/"
# What Claude Code asks of its base URL to warm the connection up; answered here, cheaply.
HELLO_PATHS = ("/", RELAY_PREFIX, RELAYED, f"{RELAYED}api/hello", "/api/hello")
USAGE_PATHS = (f"{RELAYED}api/oauth/usage", "/api/oauth/usage")  # of Claude Code's /usage
HELLOS = frozenset(itertools.product(("GET", "HEAD"), HELLO_PATHS))
UNUSUAL_PATH = re.compile(r"[%\\#]|//|/\.")
OWN_BODY_LIMIT = 1 * MIB  # of a request to the gateway itself
MANY_PARTS = 1000  # of a body that is kept
MAX_TAGS = 20  # of one request that are remembered
HELD_SHARE = 4  # requests hold a quarter of the machine's memory at most, and one key's of that
TRY_SOON = (("retry-after", "1"),)


def rule_path(target: str) -> str:
    """The path that rules look at: without query, decoded, repeated slashes as one. Raises APIError
    400 for dot segments, raw or encoded once or twice, with the separators and parameters under
    which some server would resolve them."""
    path = target.partition("?")[0]
    if not UNUSUAL_PATH.search(path):
        return path
    decoded = urllib.parse.unquote(path, "latin-1")
    for form in (path, decoded, urllib.parse.unquote(decoded, "latin-1")):
        segments = form.replace("\\", "/").split("/")
        if "#" in path or any(segment.partition(";")[0] in (".", "..") for segment in segments):
            raise APIError(400, "The path has a dot segment or a fragment; send it resolved.")
    return re.sub("/{2,}", "/", decoded)


class Held:
    """How many bytes requests hold: at most ``limit``, and one key's at most a share of that."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.share = limit // HELD_SHARE
        self.total = 0
        self._shares: dict[str, int] = {}

    def take(self, key: str, size: int) -> None:
        """Hold so many bytes more for a key (its hash; empty for the operator's requests, which
        have no share), or so many less, below 0. Raises APIError 413, 429 or 503."""
        most, mine = self.share if key else self.limit, self._shares.get(key, 0) + size
        if size > most:
            text = f"The gateway holds at most {most:,} bytes of a request. Send a smaller one, or"
            advice = "ask whoever runs the gateway for more --max-held-bytes."
            raise APIError(413, f"{text} {advice}")
        if size > 0 and self.total + size > self.limit:
            text = "The gateway holds as much as it can for requests under way. Try again."
            raise APIError(503, text, headers=TRY_SOON)
        if size > 0 and mine > most:
            text = f"The gateway holds at most {most:,} bytes for one key's requests under way."
            raise APIError(429, f"{text} Try again.", headers=TRY_SOON)
        self.total += size
        self._shares[key] = mine
        if not mine:
            del self._shares[key]

    def find_room(self, key: str, size: int) -> bool:
        """Whether so many bytes more are held now; see `take`."""
        try:
            self.take(key, size)
        except APIError:
            return False
        return True


class Request(httputil.HTTPServerRequest):
    """Tornado's request over a head that is parsed already; what no handler asks for is not made.
    ``target`` is the raw one behind the upstream's base path, None where the gateway answers."""

    def __init__(self, connection: ServerConnection) -> None:
        # Not Tornado's, which also refuses what the upstream may take.
        self.connection: ServerConnection = connection
        self.head = head = connection.head
        self.method, self.uri, self.host = head.method, head.target, head.host
        self.path, _, self.query = head.target.partition("?")
        self.target: str | None = None
        # Whoever pays himself asks of his own account.
        ours = self.path in USAGE_PATHS and OWN_CREDENTIAL_PREFIX not in str(head.values)
        if head.target.startswith(BARE_PREFIX):
            self.target = head.target
        elif head.target.startswith(RELAYED) and not (ours or (head.method, self.path) in HELLOS):
            self.target = head.target[len(RELAY_PREFIX) :]
        self.remote_ip, self.protocol = connection.remote_ip, connection.protocol
        self.body: bytearray = bytearray()  # type: ignore[assignment]

    @functools.cached_property
    def headers(self) -> httputil.HTTPHeaders:  # type: ignore[override]
        headers = httputil.HTTPHeaders()
        for each in self.head.fields:
            headers.add(each.name, each.values[0])
        return headers


class BaseHandler(web.RequestHandler):
    """Answers in JSON, errors in Anthropic's envelope, and logs no query (keys stand there). A
    `HandlerDelegate` calls `prepare`, `data_received` and `respond`; each may return what is to be
    awaited, which then is `step`, and may raise APIError."""

    request: Request
    gateway: Gateway
    call_id: str
    step: asyncio.Task[None] | None = None  # that waits
    received = 0

    def clear(self) -> None:
        """Tornado's, without the fields that it adds to every answer."""
        self.gateway = self.application.settings["gateway"]
        self.call_id = self.request.connection.call_id
        self.ui = None  # type: ignore[assignment] # it leads back here: work for the collector
        self._headers = httputil.HTTPHeaders()
        self._write_buffer = []
        self._transforms = []
        self._status_code, self._reason = 200, "OK"

    def prepare(self) -> Any:
        """Decide by the head, before the body is read."""
        self.gateway.doors.refuse_foreign(self.request.head)
        if self.request.connection.length > OWN_BODY_LIMIT:
            raise too_large(OWN_BODY_LIMIT)

    def data_received(self, chunk: bytes) -> Any:
        """Take a part of the body, which is nothing to most handlers."""
        self.received += len(chunk)
        if self.received > OWN_BODY_LIMIT:
            raise too_large(OWN_BODY_LIMIT)

    def respond(self, *path: str) -> Any:
        """The request is whole: answer it, by the method of its name."""
        if (method := self.request.head.method) not in self.SUPPORTED_METHODS:
            raise web.HTTPError(405)
        return getattr(self, method.lower())(*path)

    @functools.cached_property
    def _asked(self) -> dict[str, str]:
        parts = urllib.parse.parse_qs(self.request.query, keep_blank_values=True)
        return {name: texts[-1].strip() for name, texts in parts.items()}

    @functools.cached_property
    def _known(self) -> set[str]:
        return set()

    def query(self, name: str, kind: Kind = TEXT, default: Any = "") -> Any:
        """A parameter of the query; an empty one is the default. Raises APIError 400."""
        self._known.add(name)
        text = self._asked.get(name, "")
        return kind.parse(name, text) if text else default

    def refuse_unknown(self) -> None:
        """Raise APIError 400 for a parameter that was not asked for, so that none is ignored."""
        for name in self._asked.keys() - self._known:
            known = ", ".join(sorted(self._known))
            text = f"{printable(name)!r} is not known here: it may be {known}."
            raise APIError(400, text + nearest(name, self._known))

    async def shown_hashes(self) -> list[str]:
        """The hashes of the credentials that are shown; or of that which opened the session."""
        shown = [hash_key(credential) for _, credential in candidates(self.request.head.values)]
        return shown or list(filter(None, [await self.gateway.sessions.find(self.request)]))

    async def find_caller(self) -> Caller:
        """Who asks, by what he shows or his session. Raises APIError 401."""
        hashed = await self.gateway.sessions.find(self.request)
        if candidates(self.request.head.values) or not hashed:
            return await self.gateway.doors.authenticate(self.request.head.values)
        return await self.gateway.doors.admit(hashed)

    @property
    def is_here_and_open(self) -> bool:
        """Whether it comes from this machine, in open mode."""
        ip = ipaddress.ip_address(self.request.remote_ip or "0.0.0.0")
        return self.gateway.doors.is_open and ip.is_loopback

    def send_json(self, value: object) -> None:
        """Answer with a JSON value."""
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value, default=shown))

    def fail(self, error: Exception) -> None:
        """Answer with an error; one that is no refusal is logged."""
        refusal = self.refusal_of(error)
        if self._finished:
            return
        self.clear()
        self.set_status(refusal.status)
        for name, value in (*refusal.headers, ("request-id", self.call_id)):
            self.set_header(name, value)
        self.set_header("Content-Type", "application/json")
        self.finish(refusal.body(self.call_id, self.gateway.settings.contact))

    def refusal_of(self, error: Exception) -> APIError:
        """What a client is told of what went wrong."""
        if isinstance(error, APIError):
            return error
        if isinstance(error, web.HTTPError) and error.status_code == 405:  # Tornado's own
            path, method = self.request.path, self.request.head.method
            return APIError(405, f"{printable(path)} does not take {printable(method)}.")
        log.error("call %s failed", self.call_id, exc_info=error)
        return APIError(500, "The gateway failed on this request; its log says why.")


def at_once(coroutine: collections.abc.Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine until it must wait: None if it never had to, else the task that goes on with
    it. What it raises before is raised here, and in no task (asyncio.timeout needs one)."""
    try:
        first = coroutine.send(None)
    except StopIteration:
        return None

    @types.coroutine
    def rest() -> Iterator[Any]:
        awaited = first
        with contextlib.suppress(StopIteration):
            while True:
                try:
                    yield awaited
                except BaseException as error:  # noqa: BLE001 - what it awaited failed: it is told
                    awaited = coroutine.throw(error)
                else:
                    awaited = coroutine.send(None)

    async def go_on() -> None:  # of generators, Python 3.12 and later make no task
        await rest()

    return asyncio.get_running_loop().create_task(go_on())


@dataclass(eq=False)
class HandlerDelegate(httputil.HTTPMessageDelegate):
    """Runs a handler's steps as a request comes. Where nothing waits it makes no task, as Tornado's
    own does, and no future; where something does, the connection waits for what is returned."""

    handler: BaseHandler
    path: Sequence[str] = ()

    def headers_received(self, start_line: Any, headers: httputil.HTTPHeaders) -> Any:
        return self._run(self.handler.prepare)

    def data_received(self, chunk: bytes) -> Any:
        return self._run(self.handler.data_received, chunk)

    def finish(self) -> None:
        self._run(self.handler.respond, *self.path)

    def on_connection_close(self) -> None:
        self.handler.on_connection_close()

    def _run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            waits = step(*arguments)
            if not isinstance(waits, types.CoroutineType):
                return waits
            task = self.handler.step = at_once(waits)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is answered
            self.handler.fail(error)
            return None
        if task is not None:
            task.add_done_callback(self._ended)
        return task

    def _ended(self, step: asyncio.Task[None]) -> None:
        self.handler.step = None
        error = None if step.cancelled() else step.exception()
        if isinstance(error, Exception):
            self.handler.fail(error)


class GatewayApplication(web.Application):
    """The routes; relayed requests go straight to theirs. ``settings["gateway"]`` is `Gateway`."""

    def start_request(self, server_conn: object, request_conn: Any) -> HandlerDelegate:
        """Called by `ServerConnection`, as by Tornado's own server."""
        request = Request(request_conn)
        if request.target is not None:
            return HandlerDelegate(RelayHandler(self, request))
        return cast(HandlerDelegate, self.find_handler(request))

    def get_handler_delegate(  # type: ignore[override]
        self, request: Request, target_class: type[BaseHandler], *_: Any, **found: Any
    ) -> HandlerDelegate:
        """Called by Tornado's router."""
        path = [part.decode("latin-1") for part in found.get("path_args", ())]
        return HandlerDelegate(target_class(self, request), path)


STORE_PACKAGES = ("redis", "hiredis")
BATCH_LOOK = 60.0  # seconds from the making of a batch to the first look at it
BATCH_SLACK = 1.5  # each look comes so many times later than the one before,
BATCH_LOOK_LATEST = 1800.0  # but not later than this
BATCH_STATE_TIMEOUT = 30.0
BATCH_RESULTS_TIMEOUT = 3600.0  # in which many GB come, and a silent upstream is given up
LOOKS_AT_ONCE = 4
BATCH_KEPT = timedelta(days=30)  # results are kept for 29 days (PLD batch-processing)


class BatchKeeper:
    """Looks at batches now and then, and books what has ended, even if nobody fetches results."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._ledger = gateway, gateway.ledger
        self._hurried: dict[str, asyncio.Event] = {}
        self._watched = asyncio.Queue[str]()
        self._turn = asyncio.Semaphore(LOOKS_AT_ONCE)

    def watch(self, name: str) -> None:
        """Have a batch looked at from time to time until it is booked."""
        if name not in self._hurried:
            self._hurried[name] = asyncio.Event()
            self._watched.put_nowait(name)

    def hurry(self, name: str) -> None:
        """A batch is known to have ended."""
        if name in self._hurried:
            self._hurried[name].set()

    async def run(self) -> None:
        """Watch all that are not booked, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                with contextlib.suppress(APIError):  # which was logged
                    for name in await self._ledger.watched():  # what other processes left, too
                        self.watch(name)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BATCH_LOOK):
                        while True:
                            group.create_task(self._keep(await self._watched.get()))

    async def _keep(self, name: str) -> None:
        wait, booked = BATCH_LOOK, False
        while not booked:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurried[name].wait(), wait)
            async with self._turn:
                self._hurried[name].clear()
                try:
                    if await self._ledger.take(name):
                        booked = await self.book(name)
                        await self._ledger.leave(name)
                except APIError as error:  # of a store that is away
                    log.info("a batch could not be looked at: %s", error)
                except Exception:
                    log.exception("a batch could not be booked; it is looked at again")
            wait = min(BATCH_LOOK_LATEST, wait * BATCH_SLACK)
        del self._hurried[name]

    async def book(self, name: str) -> bool:
        """Book what a batch cost, if it has ended; whether nothing of it is left to be booked."""
        kept, code, booked = await self._ledger.unbooked(name), NO_ANSWER, False
        if kept is None:
            return True
        path = f"/v1/messages/batches/{urllib.parse.quote(name, safe='')}"
        thing = (await self._ledger.find_things([name])).get(name, Thing(""))
        pool, home = self._gateway.real_keys, thing.home
        try:
            state = await self._gateway.client.get(path, BATCH_STATE_TIMEOUT, pool.at(home))
            batch, code = dict_of(read_json(state.body)), state.code
            if code == 200 and batch.get("processing_status") == BATCH_ENDED:
                code = await self._book_results(name, f"{path}/results", pool.at(home))
                booked = code == 200
        except UpstreamError as error:
            log.info("a batch could not be looked at: %s", error)
        gone = code in (404, 410) and (not home or home in pool.keys)  # else elsewhere, perhaps
        lost = not booked and (gone or now() - from_iso(kept.day) > BATCH_KEPT)
        if booked or lost:
            self._ledger.finish_batch(name, lost=lost)
        return booked or lost

    async def _book_results(self, name: str, path: str, real: RealKey) -> int:
        """Book every line of a batch's results; their status, NO_ANSWER for what is none."""
        meter, head = Meter("", functools.partial(self.book_result, name)), list[str]()

        async def look(data: bytes) -> None:
            if head[0].split(" ")[1] == "200":
                meter.feed(data)
            await asyncio.sleep(0)  # Tornado reads on at once for as long as there is something

        told: Any = {"header_callback": head.append, "streaming_callback": look}
        results = await self._gateway.client.get(path, BATCH_RESULTS_TIMEOUT, real, **told)
        meter.finish(True)
        return NO_ANSWER if meter.measured.blind else results.code

    def book_result(self, name: str, line: int, measured: Measured) -> None:
        """Book a line of a batch's results to the key that made it, once."""
        if measured.seen:  # it was too long to be read
            measured.complete_with(Order())
        charges: Charges = ()
        if measured.usage or measured.beyond is not None:
            measured.usage["service_tier"] = "batch"
            charges = self._gateway.prices.charge(measured, now())
        if key := self._ledger.book_line(name, line, charges):
            self._gateway.traffic.book(key.shown_name, charges)


def make_ledger(settings: Settings, home: str, **told: Any) -> Any:
    """Where keys are kept: a file, whose keys of old have this home, or a store. SettingsError."""
    if not settings.store:
        return FileLedger(settings.keys, home, **told)
    if lacking := [name for name in STORE_PACKAGES if importlib.util.find_spec(name) is None]:
        raise SettingsError(f"--store: needs more: pip install {' '.join(lacking)}")
    told["remember"] = Path(f"{os.path.realpath(settings.keys)}.stores")
    allow = settings.without_store == "allow"
    return RedisLedger(settings.store, new_store=settings.new_store, allow=allow, **told)


class Gateway:
    """What all requests share; ``turn`` is whose large body is judged."""

    phase = GatewayPhase.SERVING

    def __init__(self, settings: Settings, rules: Sequence[Rule] = RULES) -> None:
        self.settings = settings
        self.rules = Rules(rules)
        self.prices = Prices(settings.prices)
        self.client = UpstreamClient(force_instance=True, settings=settings)
        self.alerts = Alerts(self.client, settings.alert_webhook)
        self.real_keys = RealKeys(settings, self.alerts.tell)
        most, length = settings.max_budget, settings.budget_duration or None
        whole = None if most is None else Decimal(str(most))
        limits = Limited(max_budget=whole, budget_duration=length)
        told: Any = {"limits": limits, "usage_days": settings.usage_days}
        self.ledger: AnyLedger = make_ledger(settings, self.real_keys.first.name, **told)
        self.ledger.parts, self.ledger.tell = settings.warned_parts, self.alerts.tell
        self.doors = Doors(settings, self.ledger)
        self.time = self.client.time
        self.batches = BatchKeeper(self)
        self.held = Held(settings.max_held_bytes or memory_size() // HELD_SHARE // PLACE.of)
        self.turn = asyncio.Lock()
        self.origin, self.base_path = parse_upstream(settings.upstream)
        self.host_line = f"Host: {self.origin.authority}"
        self.traffic = Traffic()
        path = settings.request_log or f"{os.path.realpath(settings.keys)}.requests"
        path = "" if settings.store or path == "none" else path
        self.recent = RequestLog(path, settings.recent_requests, self.ledger)
        self.active: set[RelayHandler] = set()
        self.started = now()
        self.sessions, self.alerts.keep = Sessions(self.ledger), self.ledger.keep
        self.drained = asyncio.Event()

    async def close(self) -> None:
        """Write what is not written, and free all."""
        self.alerts.close()
        self.client.close()
        await self.recent.save()
        await self.ledger.close()


@web.stream_request_body
class RelayHandler(BaseHandler):
    """Anthropic's API, any method, any path: judged by its head, then by its body, sent on with the
    real key, and streamed back. The way of a request: `prepare` → `data_received`… → `post` →
    `fetch` → `on_head` → `on_chunk`…. Every way out passes `settle` once."""

    _visit: Visit
    _kept: list[bytes] | None = None  # of its body
    _held = 0  # bytes
    _seen = b""  # the end of what was looked through
    _upstream: UpstreamRequest | None = None
    _uploaded: asyncio.Future[None]  # done when all of a body that streams was handed on
    _filters: Sequence[ResponseFilter] = ()
    _inside: Inside | None = None  # where the filters look into a compressed answer
    _sending: asyncio.Task[None] | None = None  # of a part that waits
    _gathered: bytearray | None = None  # an answer whose length a filter changes
    _again: bytes | None = None  # the body, for as long as another real key may be asked
    _refusal: bytearray | None = None  # of one that may be of the real key

    def initialize(self) -> None:
        """Called by Tornado's constructor."""
        gateway, request, head = self.gateway, self.request, self.request.head
        record = Record(self.call_id, head.method, request.remote_ip or "", gateway.time(), now())
        target, length = request.target or "", request.connection.length
        found = "", OTHER_ROUTE, NOBODY, OPERATOR, UNREAD, list[str]()  # until it is looked at
        self._visit = Visit(gateway, head, target, length, record, *found)
        gateway.active.add(self)

    # The request

    async def prepare(self) -> None:
        """Decide by the head alone; then keep a small JSON body, or let the rest stream."""
        visit, gateway, head = self._visit, self.gateway, self._visit.head
        if gateway.phase in (GatewayPhase.DRAINING, GatewayPhase.STOPPED):
            raise APIError(503, "The gateway stops. Try again.", headers=[("retry-after", "5")])
        visit.path = path = rule_path(visit.target)
        route = Route if len(path) > KEPT_PATH else read_route
        visit.route = route(head.method.upper(), path)
        for judge in gateway.rules.head:
            await judge(visit)
        visit.lines.insert(0, gateway.host_line)
        keeps = visit.reads_body or visit.refers is not None or visit.route.billed
        keeps = keeps or is_json(head.get("content-type"))
        if visit.length > JSON_BODY_LIMIT:
            self._go_unread(visit.length)
        elif keeps or visit.length == 0:
            self._hold(max(0, visit.length))
            self._kept = []
            return
        self._stream(visit.length)

    def data_received(self, chunk: bytes) -> asyncio.Future[None] | None:
        """Keep a part of the body, or send it on as soon as the upstream takes it."""
        record, kept, limit = self._visit.record, self._kept, self.gateway.settings.max_body_size
        record.bytes_in += len(chunk)
        if record.bytes_in > limit:
            raise too_large(limit)
        if kept is None:
            self._look(chunk)
            upstream, chunked = self._upstream, self._visit.length == CHUNKED
            return upstream.write(framed(chunk) if chunked else chunk) if upstream else None
        if record.bytes_in > self._held:
            self._hold(record.bytes_in - self._held)
        kept.append(chunk)
        if len(kept) > MANY_PARTS:  # each takes more than it holds where they are small
            self._kept = [b"".join(kept)]
        if record.bytes_in <= JSON_BODY_LIMIT:
            return None
        self._go_unread(record.bytes_in)
        self._look(b"".join(kept))
        self._stream(CHUNKED, framed(b"".join(kept)))
        return self._upstream.room if self._upstream is not None else None

    async def post(self, *_: str) -> None:
        """The request is whole: judge its body, and send it. Every method is this one."""
        visit, kept = self._visit, self._kept
        if kept is None:
            if visit.length == CHUNKED and self._upstream is not None:
                self._upstream.write(LAST_CHUNK)
            self._uploaded.set_result(None)
            return
        visit.record.whole = self.gateway.time()
        data, self._kept = b"".join(kept), None
        body = Kept(data, self._breathe)
        key = visit.caller.key
        if key is not None and len(data) > AT_ONCE:  # one of a key's is judged after the other
            async with key.account.turn:
                for judge in self.gateway.rules.body:
                    await judge(visit, body)
        else:
            for judge in self.gateway.rules.body:
                await judge(visit, body)
        if data or visit.head.length is not None:
            visit.lines.append(f"Content-Length: {len(data)}")
        self.fetch(data)

    respond = post

    def fetch(self, data: bytes = b"", **body: Any) -> None:
        """Ask the upstream; `on_head`, `on_chunk` or `on_error` follow."""
        visit = self._visit
        if visit.is_pooled:
            visit.find_keys(None if body else data)
            self._again = data if len(visit.keys) > 1 and not body else None
        visit.phase = FOLLOWS[visit.phase][RequestPhase.FETCHED]
        self._ask(data, **body)

    def _ask(self, data: bytes, **body: Any) -> None:
        visit, gateway, method = self._visit, self.gateway, self._visit.head.method
        lines = [*visit.lines, ": ".join(visit.credential)] if visit.credential else visit.lines
        head = head_bytes(f"{method} {gateway.base_path}{visit.target} HTTP/1.1", lines)
        callbacks = self.on_head, self.on_chunk, self.on_error
        self._upstream = upstream = UpstreamRequest(method, head, data, *callbacks, **body)
        gateway.client.fetch(upstream)
        if upstream.room is not None and self._again is None:
            upstream.room.add_done_callback(self._free)
        elif self._again is None:
            self._free()

    # The answer

    def on_head(self, head: ResponseHead) -> None:
        """The upstream's head. A 1xx one goes at once, not to HTTP/1.0 (RFC 9110 section 15.2)."""
        visit, gateway = self._visit, self.gateway
        if head.status < 200:
            if visit.head.version == 1 and visit.phase is RequestPhase.FETCHED:
                early = head_bytes(*self._answer_head(head, ()))
                self.request.connection.transport.write(early)
            return
        visit.answer, visit.record.status = head, head.status
        visit.record.answered = gateway.time()
        if head.status < 500:
            gateway.traffic.upstream["last_success"] = now()
        else:
            gateway.traffic.failed(f"The upstream answered {head.status}.")
        if visit.real is not None:
            pool, pays = gateway.real_keys, visit.route.billed
            pool.heard(visit.real, head)
            if pool.rests and head.status < 300 and self._upstream is not None:
                pool.succeeded(visit.real, visit.group, self._upstream.begun, pays=pays)
            # Of a route that is not for every key it may be the request that is not let in.
            may_be_keys = head.status in OF_A_KEY and (visit.route.open or head.status != 401)
            self._refusal = bytearray() if may_be_keys else None
            if self._again is not None and (not may_be_keys or is_bound(self._again)):
                self._again = None
                self._free()
        filters: list[ResponseFilter] = []
        for make in gateway.rules.filters:
            filters += make(visit, head)
        self._filters, upstream = filters, self._upstream
        changing = [each for each in filters if each.rewrite is not None]
        if changing and upstream is not None and upstream.length != 0:
            self._gathered = bytearray()
        elif filters and "content-encoding" in head.values and (coding := head.coding):
            self._inside = Inside(coding, filters)

    def on_chunk(self, data: bytes) -> asyncio.Future[None] | None:
        """Send on what one read brought, as the filters let it; the future waits for room."""
        assert self._upstream is not None
        complete = self._upstream.complete
        if self._refusal is not None:
            data, is_held = self._weigh(self._upstream, data)
            if is_held:
                return None
        if self._gathered is not None:
            self._hold(len(data))
            self._gathered += data
            if complete or len(self._gathered) > REWRITE_LIMIT:
                self._sending = at_once(self._send_rewritten(complete))
            return self._sending
        if self._inside is None and (data or complete):
            data = through(self._filters, data, complete)
        if self._inside is not None or self._visit.born:
            self._sending = at_once(self._send_later(data, complete))
            return self._sending
        if complete or self._visit.phase is not RequestPhase.BEGUN:
            return self._send(data, complete)
        self._visit.record.bytes_out += len(data)
        return self.request.connection.write(data)

    def _weigh(self, upstream: UpstreamRequest, data: bytes) -> tuple[bytes, bool]:
        """Gather a refusal, and ask with another real key where that may do better; what is to be
        sent on, and whether nothing is, yet. Where no other key may be asked it passes by."""
        visit, refusal, head = self._visit, self._refusal, self._visit.answer
        assert refusal is not None and head is not None and visit.real is not None
        refusal += data
        may_change = self._again is not None and visit.phase is RequestPhase.FETCHED
        drips = self.gateway.time() - visit.record.answered > SHORT_REST
        if not (upstream.complete or drips or len(refusal) > MAX_REFUSAL):
            return data, may_change
        self._refusal, pool, plain = None, self.gateway.real_keys, b""
        with contextlib.suppress(ValueError, zlib.error):
            plain = decompress(head.coding, bytes(refusal), MAX_REFUSAL)
        group, body = visit.group, self._again or b""
        if head.status == 429 and not visit.order.parts:
            # It was glanced at, which may have found any model; one that is not known is "other".
            document = read_json(body, BodyMembers) if is_light(body) else None
            group = visit.group_of(model_of(dict_of(document).get("model")))
        if pool.weigh(visit.real, head, plain, group) and may_change and upstream.complete:
            untried = [key for key in visit.keys if key.name not in visit.record.upstream_keys]
            fresh = [key for key in untried if pool.keys.get(key.name) is key]  # and not taken out
            fresh = [key for key in fresh if not pool.rests_until(key, group)]
            if fresh:
                if upstream.connection is not None:
                    upstream.connection.abandon()  # it may be closed behind a refusal
                self._inside = self._gathered = visit.answer = None
                visit.record.status = 0
                visit.take(fresh[0])
                self._ask(body)
                return b"", True
        self._again = None
        self._free()
        return bytes(refusal) if may_change else data, False

    def on_error(self, error: Exception) -> None:
        """The upstream did not answer to the end, or what is here failed with its answer."""
        client_waits = self._upstream is None or not self._upstream.held_back
        if isinstance(error, UpstreamError) and client_waits:
            if self._visit.real is not None:
                self._visit.real.errors += 1
            self.gateway.traffic.failed(str(error))
        self.fail(error)

    def on_connection_close(self) -> None:
        """The client has left: so does the upstream's connection, at once; but where something is
        being made its answer is awaited, since he pays for a batch, and owns the rest."""
        visit, upstream, route = self._visit, self._upstream, self._visit.route
        asked = upstream is not None and upstream.begun and upstream.sent
        makes = route.makes_batch or (route.kind and not route.fetches and visit.owner)
        if makes and asked and visit.phase is not RequestPhase.SETTLED:
            visit.phase = FOLLOWS[visit.phase][RequestPhase.DESERTED]
        else:
            self.settle("client_gone")

    def fail(self, error: Exception) -> None:
        """Answer with an error, or break off what has begun, with an SSE event that says so."""
        visit, record = self._visit, self._visit.record
        if visit.phase is RequestPhase.SETTLED:
            return
        refusal = self.refusal_of(error)
        outcome = "upstream_lost" if isinstance(error, UpstreamError) else f"refused:{refusal.kind}"
        record.error = mask_keys(refusal.message)
        if refusal.status in (408, 504):
            outcome = "timeout"
        if visit.phase is RequestPhase.DESERTED:
            self.settle("client_gone")
        elif visit.phase is RequestPhase.BEGUN:
            head, event = visit.answer, b""
            if head and is_event_stream(head) and not (head.coding or head.get("content-length")):
                event = SSE_ERROR % refusal.body(self.call_id, self.gateway.settings.contact)
            record.bytes_out += len(event)
            self.request.connection.break_off(event)
            self.settle(outcome)
        else:
            record.status = refusal.status
            record.bytes_out = len(refusal.body(self.call_id, self.gateway.settings.contact))
            record.first = self.gateway.time()
            self.settle(outcome)
            super().fail(refusal)

    def settle(self, outcome: str) -> None:
        """Every way out passes here, once: book what was used, free what is held, log it."""
        visit, gateway, upstream, step = self._visit, self.gateway, self._upstream, self.step
        if visit.phase is RequestPhase.SETTLED:
            return
        visit.phase = FOLLOWS[visit.phase][RequestPhase.SETTLED]
        record, head, answer = visit.record, visit.head, visit.answer
        is_whole, record.over = outcome == "ok", gateway.time()
        if is_whole and record.status >= 400:
            outcome = "upstream_error"
        elif outcome == "client_gone" and gateway.phase is GatewayPhase.STOPPED:
            outcome = "stopped"
        record.outcome = outcome
        if upstream is not None:
            record.asked, visit.began = upstream.begun, upstream.begun > 0 and upstream.sent
            if not is_whole:
                upstream.end(None)
                for each in self._filters:
                    each.finish(False)
        for task in (step, self._sending):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        if self._held:
            self._free()
        if TAGS_FIELD in head.values:
            sent = head.values[TAGS_FIELD][0].split(",", MAX_TAGS)[:MAX_TAGS]
            tags = (shown_text(visit, tag.strip()) for tag in sent)
            record.tags = [*record.tags, *filter(None, tags)]
        for end in gateway.rules.end:
            end(visit)
        record.path = shown_text(visit, visit.target.partition("?")[0])
        if answer is not None and "request-id" in answer.values:
            record.request_id = shown_text(visit, answer.values["request-id"][0])
        if told := CLAUDE_FIELDS.keys() & head.values.keys():
            record.sent = {CLAUDE_FIELDS[n]: shown_text(visit, head.values[n][0]) for n in told}
        if gateway.real_keys.several:
            record.via = ",".join(record.upstream_keys)
        # No cycle is left for the garbage collector.
        self._upstream = self._inside = self._again = None
        gateway.active.discard(self)
        if gateway.phase is GatewayPhase.DRAINING and not gateway.active:
            gateway.drained.set()
        if record.shown_key != NO_KEY or gateway.doors.is_open:
            gateway.recent.append(record)
        gateway.traffic.count(record)
        if log.isEnabledFor(logging.INFO):
            log_record(record)

    # Inside

    def _hold(self, size: int) -> None:
        """Count so many bytes more as held for this request. Raises APIError."""
        self.gateway.held.take(self._visit.record.hashed, size)
        self._held += size

    def _free(self, _: object = None) -> None:
        """Nothing is held of the request any more."""
        held, self._held = self._held, 0
        if held:
            self.gateway.held.take(self._visit.record.hashed, -held)

    async def _breathe(self) -> None:
        """One body has each turn of the loop, so that nobody waits for all that others sent."""
        async with self.gateway.turn:
            await asyncio.sleep(0)

    def _go_unread(self, size: int) -> None:
        """A body of ``size`` bytes or more is not kept. Raises APIError 413 if it must be read."""
        if self._visit.reads_body:
            text = "This key is limited to some models or to a budget: its requests are read, and"
            raise APIError(413, f"{text} may be {JSON_BODY_LIMIT:,} bytes long.")
        self._visit.order = Order(prompt=tokens_in(size))
        self._kept = None

    def _look(self, data: bytes) -> None:
        """Look through a part of a body that is not kept. Raises APIError where it names things."""
        if (words := self._visit.refers) and self._visit.payer.resources != "all":
            data = self._seen + data
            self._seen = data[-LONGEST_NAME:]
            if any(names_in(data, start, words) for start in range(0, len(data), MIB)):
                text = "This body names files or other things, so it is read, and may be"
                raise APIError(413, f"{text} {JSON_BODY_LIMIT:,} bytes long. Send it in parts.")

    def _stream(self, length: int, kept: bytes = b"") -> None:
        """Open the upstream: what is kept, then what `data_received` writes, until `post`."""
        self._visit.lines.append(CHUNKED_LINE if length == CHUNKED else f"Content-Length: {length}")
        self._uploaded = asyncio.get_running_loop().create_future()
        self.fetch(kept, body_producer=lambda write: self._uploaded)

    async def _send_later(self, data: bytes, complete: bool) -> None:
        """Send bytes on, once the filters have seen them and what they tell of is kept."""
        if self._inside is not None:
            data = await self._inside.feed(data, complete)
        with contextlib.suppress(APIError):  # which is said, and tried again each second
            await self._visit.keep()
        room = self._send(data, complete)
        if room is not None:
            await room

    async def _send_rewritten(self, complete: bool) -> None:
        """Send a gathered answer as the filters make it."""
        head, gathered = self._visit.answer, self._gathered
        assert head is not None and gathered is not None and self._upstream is not None
        try:
            if not complete:
                raise ValueError("too large")
            body = decompress(head.coding, bytes(gathered), REWRITE_LIMIT)
        except (ValueError, zlib.error) as error:
            raise APIError(502, f"The upstream's answer cannot be read: {error}.") from None
        plain = body
        for each in self._filters:
            body = await each.rewrite(body) if each.rewrite else through([each], body, True)
        body = bytes(gathered) if body == plain else compress(head.coding, body)
        head.fields = [each for each in head.fields if each.lower != "content-length"]
        head.fields.append(parse_field(f"Content-Length: {len(body)}"))
        self._upstream.length = len(body)
        self._send(body, True)

    def _send(self, data: bytes, complete: bool) -> asyncio.Future[None] | None:
        visit, connection, upstream = self._visit, self.request.connection, self._upstream
        if visit.phase is RequestPhase.DESERTED or upstream is None:
            if complete:
                self.settle("client_gone")
            return None
        record, begins = visit.record, visit.phase is RequestPhase.FETCHED
        record.bytes_out += len(data)
        if begins:
            visit.phase = FOLLOWS[visit.phase][RequestPhase.BEGUN]
            record.first = self.gateway.time()
        if complete:  # before the last bytes: the next request sees what this one cost
            self.settle("ok")
        room = None
        if begins and visit.answer is not None:
            own = [("x-litellm-call-id", self.call_id)]
            for tell in self.gateway.rules.fields:
                own += tell(visit, visit.answer)
            start, lines = self._answer_head(visit.answer, own)
            room = connection.write_head(start, lines, upstream.length, data)
        elif data:
            room = connection.write(data)
        if complete:
            connection.finish()
        return None if complete else room

    def _answer_head(
        self, head: ResponseHead, own: Sequence[tuple[str, str]]
    ) -> tuple[str, list[str]]:
        """An answer's start line and field lines as the client gets them: without hop-by-hop
        fields, with the gateway's own in the place of those of their names, the real key masked."""
        mask, phrase, lines = self._visit.mask, head.reason, list[str]()
        unwanted = head.options.union(self._visit.hidden, map(operator.itemgetter(0), own))
        for lower, _, _, line, _, goes_down in head.fields:
            if goes_down and lower not in unwanted:
                lines.append(line)
        if mask is not None and mask.text in "\n".join((phrase, *lines)):
            phrase, lines = mask.mask_text(phrase), [mask.mask_text(line) for line in lines]
        return f"HTTP/1.1 {head.status} {phrase}", [*lines, *map(": ".join, own)]


def shown_text(visit: Visit, text: str) -> str:
    """A text of the wire for the log, cut short, without what is or looks like a key."""
    if "%" in text and KEY_PREFIX in urllib.parse.unquote(text, "latin-1"):
        text = urllib.parse.unquote(text, "latin-1")
    if visit.mask is not None and visit.mask.text in text:
        text = visit.mask.mask_text(text)
    for key in visit.caller.presented:
        if key in text:
            text = text.replace(key, key_name(key))
    if KEY_PREFIX in text:
        text = mask_keys(text)
    return text if len(text) <= SHOWN_LENGTH and text.isprintable() else printable(text)


# ─── Management ───────────────────────────────────────────────────────────────────────────────────

MAX_PAGE_SIZE = 100  # LiteLLM's limit on /key/list
MAX_OWN_DEPTH = 50  # of JSON in requests to the gateway itself
# {"aud":"claude-gateway"}, in the second of three parts: Claude Code 2.1.331 takes such a token for
# a gateway's, checks nothing else of it, and shows what it is told of the budget.
GATEWAY_CLAIM = "eyJhdWQiOiJjbGF1ZGUtZ2F0ZXdheSJ9"


class ManagementHandler(BaseHandler):
    """What only a master key may do, or a session that one opened; ``master`` says whose it is.
    Raises 401 without a key, 403 with any other. In open mode this machine may look."""

    master = ""

    def on_connection_close(self) -> None:
        """Whoever only asked wants no answer any more; a change is done to its end."""
        if self.step is not None and self.request.method == "GET":
            self.step.cancel()

    async def prepare(self) -> None:
        super().prepare()
        doors, ledger, shown = self.gateway.doors, self.gateway.ledger, await self.shown_hashes()
        self.master = next(filter(None, map(doors.is_master, shown)), "")
        if not (self.master or (self.request.method == "GET" and self.is_here_and_open)):
            if not self.gateway.settings.master_key:
                text = "No master key is set: start with GATEWAY_MASTER_KEY to have one."
                raise APIError(403, text)
            if await ledger.knows(shown):
                raise APIError(403, "Only the master key may do this; a virtual key was sent.")
            text = "This is not the master key." if shown else "No key was sent."
            advice = "Send the master key as 'Authorization: Bearer' or 'x-api-key'."
            raise APIError(401, f"{text} {advice}")
        ledger.notice_edit()

    async def named(self, kind: str, body: dict[str, Any], *, former: bool = False) -> Any:
        """The record that a field of NAMED_BY, which is taken out of a body, names, as
        `FileLedger.find` finds it. Raises APIError 400, 404."""
        by, *_ = [field for field in NAMED_BY[kind] if body.get(field) is not None] or [kind]
        name = body.pop(by, None)
        if not isinstance(name, str) or not name:
            what = "a key: the plain key or its hash" if kind == "key" else f"a {kind}"
            raise APIError(400, f"{next(iter(NAMED_BY[kind]))!r} must name {what}.")
        if not (found := await self.gateway.ledger.find(by, name, former=former)):
            raise APIError(404, f"{kind.capitalize()} not found.")
        return found

    async def owner_of(self, named: Any) -> str:
        """What a key's things are kept under, by its alias, plain value or hash; as `named`."""
        is_alias = isinstance(named, str) and await self.gateway.ledger.find("key_alias", named)
        record: VirtualKey = await self.named("key", {"key_alias" if is_alias else "key": named})
        return record.owner


# By which fields a record is named, and by which lists of them several are.
NAMED_BY = {"key": {"key": "keys", "key_alias": "key_aliases"}}
NAMED_BY |= {kind: {f"{kind}_id": f"{kind}_ids"} for kind in GROUPS}
# What LiteLLM says of a key and means nothing here.
LITELLM_FIELDS = {"key_type": "default", "budget_id": None, "litellm_budget_table": None}


def row_of(of: Limited) -> dict[str, Any]:
    """A record as LiteLLM's answers describe it."""
    moment = now()

    def told(budget: Budget) -> dict[str, Any]:
        return {"spend": of.spent(moment, budget), "budget_reset_at": budget.end(moment)}

    row = {name: getattr(of, name) for name in MARKED[of.of, "shown"]}
    if of.of == "key":
        row |= LITELLM_FIELDS | {"token": of.account.hashed, "token_id": of.account.hashed}
    row |= {"status": of.status(moment), "last_active": of.account.last_active}
    row["model_max_budget_usage"] = {b.pattern: told(b) for b in of.budgets if b.pattern}
    windows = {b.duration: told(b) for b in of.budgets if b.name.startswith(EVERY)}
    return row | told(of.budgets[0]) | {"budget_limits_usage": windows}


def full_row(of: Limited, ledger: AnyLedger, *, usage: bool = True) -> dict[str, Any]:
    """The same with all that limits it, for bars, and what a key used by day and model."""
    moment, row = now(), row_of(of)
    key = of if isinstance(of, VirtualKey) else None
    row["budgets"] = [
        {"of": each.record.of, "for": each.budget.pattern or None, "max_budget": each.limit}
        | {"spend": each.spent, "budget_duration": each.budget.duration}
        | {"budget_reset_at": each.budget.end(moment)}
        for each in fullness(ledger.limited(key) if key else [of], moment)
    ]
    if key is not None:
        days = row["usage"] = dict[str, Any]()
        for day, model, tally in key.account.usage.days() if usage else ():
            days.setdefault(day, {})[model] = tally
    return row


def is_nested(value: object, levels: int) -> bool:
    """Whether a JSON value has more levels than that."""
    within = (*dict_of(value).values(), *list_of(value))
    return levels < 0 or any(is_nested(entry, levels - 1) for entry in within)


class BodyHandler(BaseHandler):
    """Takes JSON."""

    def data_received(self, chunk: bytes) -> None:
        super().data_received(chunk)
        self.request.body += chunk

    def read_body(self) -> dict[str, Any]:
        """The body's object; none is an empty one. Raises APIError 400."""
        try:
            body = json.loads(self.request.body or b"{}")
            json.dumps(body, allow_nan=False)  # nor what is too large for a float
        except (ValueError, RecursionError) as error:
            raise APIError(400, f"The body is not JSON: {error}.") from None
        if not isinstance(body, dict) or is_nested(body, MAX_OWN_DEPTH):
            raise APIError(400, f"The body is not a JSON object of up to {MAX_OWN_DEPTH} levels.")
        return body


# Where one of these is set, it is looked whether a key's routes and budgets go together.
ROUTE_FIELDS = {"allowed_routes", "unmetered_routes", "max_budget", "model_max_budget"}
ROUTE_FIELDS |= {"budget_limits", "team_id", "user_id"}


class RecordHandler(BodyHandler, ManagementHandler):
    """POST of what changes keys, teams and users, as `deeds` lists it: /{kind}/{deed}, and
    /{kind}/{name}/{deed}. Null clears a field."""

    async def post(self, kind: str, *path: str) -> None:
        (*name, deed), body = path, self.read_body()
        body |= zip(NAMED_BY.get(kind, ()), name)
        async with self.gateway.ledger.changing():
            told = await self.deeds[deed](self, kind, body)
        self.send_json(told)

    async def chosen(self, value: Any = None, for_claude_code: Any = None) -> str:
        """A key that the caller chose, or a fresh one. Raises APIError 400."""
        is_for_claude_code = FLAG.parse("claude_code", for_claude_code)
        if value is None:
            more = (GATEWAY_CLAIM, secrets.token_urlsafe(KEY_BYTES)) if is_for_claude_code else ()
            return ".".join((KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES), *more))
        if is_for_claude_code:
            raise APIError(400, "'claude_code' makes the key: leave yours out.")
        if not isinstance(value, str) or not CHOSEN_KEY.fullmatch(value):
            rule = f"{MIN_KEY_LENGTH} to {MAX_KEY_LENGTH} ASCII characters, no quote or backslash"
            raise APIError(400, f"'key' must begin 'sk-', not as Anthropic's 'sk-ant-': {rule}.")
        if await self.gateway.ledger.knows([hash_key(value)]):
            raise APIError(400, "'key' exists already; choose another, or leave it out.")
        return value

    async def changed(self, record: AnyLimited, body: Mapping[str, Any], **more: Any) -> AnyLimited:
        """A record with these fields. Raises APIError 400."""
        changes = read_fields(body, MARKED[record.of, "settable"])
        if "duration" in changes:
            changes["expires"] = changes.pop("duration")
        for name in ("max_budget", "soft_budget", "model_max_budget", "budget_limits"):
            if changes.get(name) not in (None, {}, []) and not self.gateway.prices.available:
                need = "install genai-prices where the gateway runs, or start it with --prices."
                raise APIError(400, f"{name!r} cannot be enforced, as no prices are known: {need}")
        if (home := changes.get("home")) and home not in (names := self.gateway.real_keys.names):
            raise APIError(400, f"'home' must be a real key's name: {', '.join(names)}.")
        more |= {"updated_at": now(), "updated_by": self.master}
        more |= {} if record.created_at else {"created_at": now(), "created_by": self.master}
        changed: Any = dataclasses.replace(record, **changes, **more)
        if isinstance(changed, VirtualKey):
            await self.check_key(changed, body)
        return cast(AnyLimited, changed)

    async def check_key(self, key: VirtualKey, body: Mapping[str, Any]) -> None:
        """Raise APIError 400 where its alias is another's, or its routes cost what no budget of its
        own, its team … counts."""
        ledger, alias = self.gateway.ledger, key.key_alias
        taken = await ledger.find("key_alias", alias) if alias else None
        if taken is not None and taken.account.hashed != key.account.hashed:
            raise APIError(400, "'key_alias' is taken by another key.")
        named = [pattern for pattern in key.allowed_routes if unmetered(pattern)]
        limited = any(of.has_budget for of in ledger.limited(key))
        if named and limited and not key.unmetered_routes and ROUTE_FIELDS & body.keys():
            what = f"'allowed_routes' names {named[0]}, whose cost a budget cannot count"
            raise APIError(400, f"{what}: leave it out, or add 'unmetered_routes': true.")

    async def keep(
        self, changes: Mapping[str, Limited | None], action: str, body: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """Keep these records, `note` what was done, to the last one with the fields of ``body``;
        answer with its row, and with warnings."""
        await self.gateway.ledger.change(changes)
        *others, record = filter(None, changes.values())
        for other in others:
            self.note(other, action)
        self.note(record, action, body)
        warnings = list(self.doubts(record))
        return row_of(record) | ({"warnings": warnings} if warnings else {})

    def note(self, record: Limited, action: str, body: Mapping[str, Any] = {}) -> None:
        """Log and remember for the audit what was done to a record (LiteLLM's ``action``)."""
        by = mask_keys(printable(self.request.headers.get("litellm-changed-by", self.master)))
        row = {"id": mock_id("audit"), "updated_at": now(), "changed_by": by}
        row |= {"changed_by_api_key": self.master, "action": action, "table_name": record.of}
        row |= {"object_id": record.account.hashed.removeprefix(f"{record.of}:")}
        row |= {"name": record.shown_name, "updated_values": dict(body)}
        text = json.dumps(row | {"remote_ip": self.request.remote_ip}, default=shown)
        self.gateway.ledger.log("audit", MAX_AUDITED, [text.encode()])
        fields = f": {printable(', '.join(body))}" if body and action == "updated" else ""
        log.info("%s %s %s%s by %s", record.of, record.shown_name, action, fields, word(by))

    def doubts(self, record: Limited) -> Iterator[str]:
        """What is allowed of a record, but hardly meant."""
        prices = self.gateway.prices
        for pattern in {**dict.fromkeys(record.models), **record.model_max_budget}:
            if prices.available and pattern != ALL_TEAM_MODELS and not prices.knows(pattern):
                text = f"{printable(pattern)!r} matches no model that is known here."
                yield text + nearest(pattern, prices.names)
        most, soft = record.max_budget, record.soft_budget
        if most is not None and soft is not None and soft > most:
            yield "'soft_budget' is above 'max_budget', so it is never reached."

    async def new_key(self, key: str, body: Mapping[str, Any], **more: Any) -> dict[str, Limited]:
        """The record of a key that is made now, by its hash."""
        made = VirtualKey(key_name(key), owner_id=secrets.token_hex(8))
        return {hash_key(key): await self.changed(made, body, **more)}

    async def generate(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """LiteLLM's request and response; no other answer has the plain key."""
        key = await self.chosen(body.pop("key", None), body.pop("claude_code", None))
        made = await self.new_key(key, body)
        return await self.keep(made, "created", body) | {"key": key}

    async def new(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """A team or a user, who gets a key of his own, unless ``auto_create_key`` is false."""
        name = NAME.parse(f"{kind}_id", body.pop(f"{kind}_id", None)) or secrets.token_hex(8)
        if await self.gateway.ledger.find(f"{kind}_id", name):
            raise APIError(400, f"'{kind}_id' is taken by another {kind}.")
        is_user, key = kind == "user", await self.chosen()
        has_key = is_user and FLAG.parse("auto_create_key", body.pop("auto_create_key", True))
        keys = await self.new_key(key, {}, user_id=name) if has_key else {}
        made = {**keys, f"{kind}:{name}": await self.changed(GROUPS[kind](name), body)}
        return await self.keep(made, "created", body) | ({"key": key} if has_key else {})

    async def update(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Change the fields that the body has."""
        record = await self.named(kind, body)
        hashed = record.account.hashed
        row = await self.keep({hashed: await self.changed(record, body)}, "updated", body)
        return row | ({"key": hashed} if kind == "key" else {"data": row})

    async def regenerate(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `update`, and a new value, ``new_key`` or fresh; for a ``grace_period`` both work."""
        record = await self.named(kind, body)
        moment, grace = now(), LIFETIME.parse("grace_period", body.pop("grace_period", None))
        value = await self.chosen(body.pop("new_key", None), body.pop("claude_code", None))
        retired = {old: until for old, until in record.retired.items() if until > moment}
        retired[record.account.hashed] = grace or moment
        more = {"key_name": key_name(value), "retired": retired, "owner_id": record.owner}
        changed = await self.changed(record, body, **more)
        changes = {record.account.hashed: None, hash_key(value): changed}
        return await self.keep(changes, "rotated", body) | {"key": value}

    async def block(self, kind: str, body: dict[str, Any], blocked: bool = True) -> dict[str, Any]:
        """Refuse a key, a team or a user, or take it again."""
        record = await self.changed(await self.named(kind, body), {"blocked": blocked})
        action = "blocked" if blocked else "unblocked"
        return await self.keep({record.account.hashed: record}, action)

    async def reset_spend(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Set what was spent in the present window to ``reset_to`` USD (0)."""
        record = await self.named(kind, body)
        amount = read_fields(body, {"reset_to": AMOUNT}).get("reset_to") or ZERO
        await self.gateway.ledger.reset_spend(record, amount)
        self.note(record, "reset_spend", {"spend": amount})
        return row_of(record)

    async def remove(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Delete all that lists of NAMED_BY name, or nothing; with a team or a user their keys,
        which would be without limits. The record of a key stays, and tells what it used."""
        found = {
            name: await self.named(kind, {field: name})
            for field, several in NAMED_BY[kind].items()
            for name in TEXTS.parse(several, body.get(several))
        }
        if not found:
            lists = " or ".join(map(repr, NAMED_BY[kind].values()))
            raise APIError(400, f"Name what to delete in {lists}.")
        gone = {of.account.hashed: of for of in found.values()}
        for name in found if kind in GROUPS else ():
            keys = await self.gateway.ledger.live(**{f"{kind}_id": name})
            gone |= {key.account.hashed: key for key in keys}
        marks: dict[str, Any] = {"deleted_at": now(), "retired": {}}
        await self.gateway.ledger.change(
            {
                name: dataclasses.replace(of, **marks) if of.of == "key" else None
                for name, of in gone.items()
            }
        )
        for of in gone.values():
            self.note(of, "deleted")
        return {f"deleted_{kind}s": [*found]}

    async def assign(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        """Give the things of ``ids`` to a ``key``, to nobody (null), or to all to use ("*")."""
        ids, kind = TEXTS.parse("ids", body.get("ids")), TEXT.parse("kind", body.get("kind"))
        if not ids or "key" not in body or not all(map(str.isprintable, ids)):
            raise APIError(400, "'ids' must list things, and 'key' name a key, '*' or null.")
        ledger, key = self.gateway.ledger, body["key"]
        owner = {"*": None, None: ""}[key] if key in ("*", None) else await self.owner_of(key)
        known, names = await ledger.find_things(ids), dict[str, str]()
        for name in ids:
            guessed = next((k for k, prefix in KINDS.items() if name.startswith(prefix)), None)
            names[name] = known[name].kind if name in known else kind or guessed or ""
            if not names[name]:
                raise APIError(400, f"{printable(name)}: say its 'kind', as {', '.join(KINDS)}.")
        await ledger.assign(names, owner)
        log.info("%d things assigned", len(ids))
        return {"ids": ids, "key": key}

    deeds: ClassVar[dict[str, Any]] = {"generate": generate, "new": new, "update": update}
    deeds |= {"block": block, "unblock": functools.partial(block, blocked=False)}
    deeds |= {"regenerate": regenerate, "reset_spend": reset_spend}
    deeds |= {"delete": remove, "assign": assign}


REPORT_GROUPS = ("api_key", "model", "team", "user", "day", "tag")


def one_of(*words: str) -> Kind:
    """A parameter that is one of these words."""
    return Kind(f"one of {', '.join(words)}", lambda text: words[words.index(text)])


STATUS, ORDER = one_of("active", "revoked", "expired"), one_of("asc", "desc")
GROUP_NAME = one_of(*REPORT_GROUPS)
GROUPING = Kind(
    f"one or two, with a comma, {GROUP_NAME.words[4:]}",
    lambda text: [GROUP_NAME.read(name) for name in text.split(",", 1)],
)
ORDINAL = Kind("a whole number from 1", lambda text: int(read_amount(int(text) - 1)) + 1)
PAGE_SIZE = ORDINAL._replace(read=lambda text: min(ORDINAL.read(text), MAX_PAGE_SIZE))
DAY = Kind("a date like 2026-11-22", lambda text: day_of(datetime.strptime(text, "%Y-%m-%d")))
WORD = Kind("true or false", lambda text: ("false", "true").index(text.lower()) > 0)
UNDER_WAY, OTHERS, MAX_LISTED = "under_way", "(others)", 10_000
MAX_OWN_ROWS = 1000  # that a virtual key is told of its requests
KEY_FILTERS = {n: operator.attrgetter(n) for n in ("user_id", "team_id", "key_alias")}
KEY_FILTERS["key_hash"] = operator.attrgetter("account.hashed")
SEARCHED = operator.attrgetter("key_alias", "key_name", "user_id", "team_id")
OWN_REPORTS = ("/key/info", "/spend/logs")  # which a virtual key may ask for, of itself


def order_of(row: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """What a row is sorted by; nothing stands first."""
    value = row[name]
    return value is not None, value if isinstance(value, int | Decimal) else str(value)


class ReportHandler(ManagementHandler):
    """GET of the paths in `reports`: what there is, and what was used, of ``mine`` where a virtual
    key asks. What it did not read of the query is refused."""

    mine: VirtualKey | None = None

    async def prepare(self) -> None:
        if self.request.path in OWN_REPORTS:
            BaseHandler.prepare(self)
            self.mine = (await self.find_caller()).key
        if self.mine is None:
            await super().prepare()

    async def get(self) -> None:
        told = await self.reports[self.request.path](self)
        self.refuse_unknown()
        self.send_json(told)

    def page_of(
        self, what: str, rows: Iterable[Any], total: int, size: str, most: int = MAX_PAGE_SIZE
    ) -> dict[str, Any]:
        """The page of rows that is asked for, under ``what``; LiteLLM tells of pages in one way
        where their ``size`` is so called, and else in another."""
        page, length = self.query("page", ORDINAL, 1), self.query(size, PAGE_SIZE, most)
        row: dict[str, Any] = {"total_count": total, "current_page": page}
        if size == "page_size":
            row = {"total": total, "page": page, "page_size": length}
        found = list(itertools.islice(rows, (page - 1) * length, page * length))
        return {what: found, "total_pages": -(-total // length)} | row

    async def list_keys(self) -> dict[str, Any]:
        """Pages of hashes, or of whole rows with ``return_full_object=true``."""
        moment, ledger, wanted = now(), self.gateway.ledger, self.query("search").lower()
        asked = [(read, value) for name, read in KEY_FILTERS.items() if (value := self.query(name))]
        status = self.query("status", STATUS)
        keys = [
            key
            for key in await ledger.live()
            if all(read(key) == value for read, value in asked)
            and status in ("", key.status(moment))
            and any(wanted in (text or "").lower() for text in SEARCHED(key))
        ]
        full = self.query("return_full_object", WORD, False)
        usage = self.query("usage", WORD, True)
        if by := self.query("sort_by"):
            sortable = row_of(OPERATOR)
            if by not in sortable:
                raise APIError(400, f"'sort_by' must be a field of a key.{nearest(by, sortable)}")
            keys.sort(key=lambda key: order_of(row_of(key), by))
        if self.query("sort_order", ORDER) == "desc":
            keys.reverse()
        told = self.page_of("keys", keys, len(keys), "size", 10)
        hashes = [key.account.hashed for key in told["keys"]]
        if not full:
            return told | {"keys": hashes}
        whole = [await ledger.find("key", hashed) for hashed in hashes] if usage else told["keys"]
        return told | {"keys": [full_row(key, ledger, usage=usage) for key in filter(None, whole)]}

    async def describe_key(self) -> dict[str, Any]:
        """LiteLLM's ``{"key", "info"}``; also of a former key, until its grace is over."""
        asked, alias, ledger = self.query("key"), self.query("key_alias"), self.gateway.ledger
        told: dict[str, Any] = {"key": asked or None, "key_alias": alias}
        if (mine := self.mine and self.mine.account.hashed) and (asked or alias):
            by, name = ("key", asked) if asked else ("key_alias", alias)
            found = await ledger.find(by, name, former=True)
            if found is None or found.account.hashed != mine:
                raise APIError(403, "A virtual key may ask about itself only.")
        record = await self.named("key", {"key": mine} if mine else told, former=True)
        info = full_row(record, ledger)
        shown = (asked, hash_key(asked)) if asked or alias else await self.shown_hashes()
        for former in record.retired.keys() & {*shown}:
            info["retired_until"] = record.retired[former]
        del info["token"], info["token_id"]
        return {"key": asked or record.account.hashed, "info": info}

    async def list_requests(self) -> list[dict[str, Any]]:
        """The last --recent-requests, newest first, in LiteLLM's fields and with its filters; or
        those with ``status=under_way``. No more than ``limit``, nor MAX_OWN_ROWS of a key's own."""
        first = self.query("start_date", DAY, "0001-01-01")
        last = self.query("end_date", DAY, "9999-12-31")
        wanted, user, shown = self.query("request_id"), self.query("user_id"), self.query("api_key")
        limit, status = self.query("limit", ORDINAL, MAX_LISTED), self.query("status")
        hashed = shown if not shown or HASH.fullmatch(shown) else hash_key(shown)
        gateway, mine = self.gateway, self.mine
        owned = {mine.account.hashed, *mine.retired} if mine else set()
        found, most = list[dict[str, Any]](), min(limit, MAX_OWN_ROWS if mine else limit)

        def is_asked(row: dict[str, Any]) -> bool:
            return (
                (wanted in ("", row["litellm_call_id"], row["request_id"]))
                and (hashed in ("", row["api_key"]) and user in ("", row["user"]))
                and (status in ("", UNDER_WAY, row["status"]))
                and (first <= row["startTime"][:10] <= last)
                and (mine is None or row["api_key"] in owned)
            )

        if status == UNDER_WAY:
            rows = [handler._visit.record.to_spend_log() for handler in gateway.active]
            return [*filter(is_asked, rows)][:most]
        async for row in gateway.recent.rows():
            if len(found) == most:
                break
            if is_asked(row):
                found.append(row)
        return found

    async def list_spend(self) -> list[dict[str, Any]]:
        """Every key's row, those that spent most first."""
        rows = [row_of(key) async for key in self.gateway.ledger.each()]
        return sorted(rows, key=lambda row: -row["spend"])

    async def sum_spend(self) -> list[dict[str, Any]]:
        """``start_date``, ``end_date``: UTC days, both included, by default the last 30. One row a
        group, of one or two of REPORT_GROUPS (``group_by``): its names under theirs, and every
        count. Of the last, all but the ``top`` that spent most are one. With a tag there is what
        had several under each, and under none what had none."""
        first = self.query("start_date", DAY, day_of(now() - timedelta(days=29)))
        last = self.query("end_date", DAY, day_of(now()))
        groups, top = self.query("group_by", GROUPING, ["api_key"]), self.query("top", ORDINAL, 0)
        if "tag" in groups and not {"tag", "day"} >= {*groups}:
            raise APIError(400, "'tag' goes with 'day' alone.")
        ledger = self.gateway.ledger
        sums, merged = (collections.defaultdict[Any, Tally](Tally) for _ in range(2))
        keys = dict[str, VirtualKey]()
        async for key in ledger.each(days=(first, last)):
            keys[hashed := key.account.hashed] = key
            for day, model, tally in key.account.usage.days(first, last):
                names = {"api_key": hashed, "model": model, "day": day, "tag": EVERY_TAG}
                names |= {"team": key.team_id or "", "user": key.user_id or ""}
                sums[tuple(names[group] for group in groups)].add(tally)
        tagged = (await ledger.whole((first, last))).account.usage
        for day, tag, tally in tagged.days(first, last) if "tag" in groups else ():
            count = Tally.subtract if tag == EVERY_TAG else Tally.add  # what had any is not without
            count(sums[tuple({"tag": tag, "day": day}[group] for group in groups)], tally)
        totals: Any = collections.Counter()
        for names, tally in sums.items():
            totals[names[-1]] += tally.spend
        shown = dict(totals.most_common(top or None))
        for names, tally in sums.items():
            merged[(*names[:-1], names[-1] if names[-1] in shown else OTHERS)].add(tally)
        rows = list[dict[str, Any]]()
        for names, tally in merged.items():
            if tally != Tally():
                rows.append(dict(zip(groups, names)) | dataclasses.asdict(tally))
                if spender := keys.get(rows[-1].get("api_key", "")):
                    rows[-1] |= {n: getattr(spender, n) for n in ("key_alias", "key_name")}
        return sorted(rows, key=lambda row: -row["spend"])

    async def group_rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of all teams, or all users, with how many keys each has."""
        ledger, field = self.gateway.ledger, f"{kind}_id"
        counts = collections.Counter(getattr(key, field) for key in await ledger.live())
        rows = [full_row(of, ledger) async for of in ledger.each(kind)]
        return [row | {"keys_count": counts[row[field]]} for row in rows]

    async def list_users(self) -> dict[str, Any]:
        """Pages of users' rows."""
        rows = await self.group_rows("user")
        return self.page_of("users", rows, len(rows), "page_size")

    async def describe_group(self) -> dict[str, Any]:
        """A team or a user, and the keys of it."""
        kind, ledger = self.request.path.split("/")[1], self.gateway.ledger
        field, more = f"{kind}_id", {"team": "team_memberships", "user": "teams"}[kind]
        name = self.query(field)
        row = full_row(await self.named(kind, {field: name}), ledger)
        keys = [row_of(key) for key in await ledger.live(**{field: name})]
        row["keys_count"] = len(keys)
        return {field: name, f"{kind}_info": row, "keys": keys, more: []}

    async def list_changes(self) -> dict[str, Any]:
        """Pages of what was changed, newest first; of one ``object_id``."""
        wanted, logged = self.query("object_id"), self.gateway.ledger.logged("audit")
        rows = [dict_of(read_json(text, Any)) async for text in logged]
        found = [row for row in rows if wanted in ("", row["object_id"], row["name"])]
        return self.page_of("audit_logs", found, len(found), "page_size", 50)

    async def list_resources(self) -> dict[str, Any]:
        """Pages of what is whose, of a ``key`` or of a ``kind``."""
        asked, kind, page = self.query("key"), self.query("kind"), self.query("page", ORDINAL, 1)
        size = self.query("size", PAGE_SIZE, MAX_PAGE_SIZE)
        owner = await self.owner_of(asked) if asked else None
        ledger, first, rows = self.gateway.ledger, (page - 1) * size, list[dict[str, Any]]()
        total, names = await ledger.list_things(owner, kind, first, size)
        for name, thing in (await ledger.find_things(names)).items():
            hashed = thing.key.account.hashed if thing.key and not thing.key.deleted_at else None
            row = {"id": name, "kind": thing.kind, "key": hashed, "home": thing.made_at or None}
            rows.append(row | {"created_at": moment_of(int(thing.made)), "shared": thing.is_shared})
        return self.page_of("resources", (), total, "size") | {"resources": rows}

    async def list_upstreams(self) -> dict[str, Any]:
        """The real keys: how each is, and what it has answered; never the key."""
        return {"upstreams": self.gateway.real_keys.states()}

    reports: ClassVar[dict[str, Any]] = {"/key/list": list_keys, "/audit": list_changes}
    reports |= dict(zip(OWN_REPORTS, (describe_key, list_requests), strict=True))
    reports |= {"/user/list": list_users, "/team/list": functools.partial(group_rows, kind="team")}
    reports |= {"/team/info": describe_group, "/user/info": describe_group}
    reports |= {"/resources/list": list_resources, "/upstreams": list_upstreams}
    reports |= {"/spend/keys": list_spend, "/global/spend/report": sum_spend}


# ─── Operations ───────────────────────────────────────────────────────────────────────────────────

CONNECT = """\
connect with
  export ANTHROPIC_BASE_URL={base}/anthropic
  export ANTHROPIC_AUTH_TOKEN={key}
  anthropic.Anthropic(base_url="{base}/anthropic", api_key="{key}")
  new Anthropic({{ baseURL: "{base}/anthropic", apiKey: "{key}" }})"""


class HelloHandler(BaseHandler):
    """HELLO_PATHS, of which a browser sees /, and 404 for every path that nothing else serves."""

    def prepare(self) -> None:
        if (path := self.request.path) not in HELLO_PATHS:
            text = f"Nothing is served at {printable(path)}. Anthropic's API is at /anthropic/v1/"
            raise APIError(404, text)
        super().prepare()

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        base = f"{self.request.protocol}://{self.request.host}"
        told = CONNECT.format(base=base, key="<a virtual key>")
        whom = self.gateway.settings.contact or "whoever runs it"
        own = f"What a key has left: {base}/ui, or GET {base}/key/info with it."
        self.finish(f"A gateway to Anthropic's API. Ask {whom} for a key, and {told}\n\n{own}\n")

    head = get


class SessionHandler(BodyHandler):
    """The page's session: GET /ui/session, POST /ui/login ``{"key"}`` and /ui/logout."""

    async def post(self, deed: str) -> None:
        sessions, body = self.gateway.sessions, self.read_body()
        sessions.refuse_foreign(self.request.head, must_say=False)
        if deed == "logout":
            await sessions.close(self.request)
            self.clear_cookie(SESSION_COOKIE, path="/")
            return self.send_json({})
        if deed != "login":
            raise web.HTTPError(405)
        hashed, address = hash_key(str(body.get("key"))), site_of(self.request.remote_ip or "")
        sessions.slow_down(address)
        try:
            caller = await self.gateway.doors.admit(hashed)
        except APIError:
            sessions.slow_down(address, wrong=True)
            text = "This is neither the master key nor a virtual key that may be used."
            raise APIError(401, text) from None
        how: dict[str, Any] = {"httponly": True, "samesite": "Strict", "path": "/"}
        how |= {"secure": self.request.protocol == "https", "max_age": SESSION_HOURS * 3600}
        self.set_cookie(SESSION_COOKIE, await sessions.open(hashed), **how)
        self.send_json({"role": "operator" if caller.is_master else "holder"})

    async def get(self, deed: str) -> None:
        if deed != "session":
            raise web.HTTPError(405)
        gateway, settings, is_open = self.gateway, self.gateway.settings, self.is_here_and_open
        hashed = await gateway.sessions.find(self.request)
        if not (hashed or is_open):
            raise APIError(401, "Log in with the master key or a virtual key.")
        key = None if is_open else (await gateway.doors.admit(hashed)).key
        row: dict[str, Any] = {"role": "holder" if key else "operator", "open": is_open}
        row |= {"can_change": not is_open and not key, "version": __version__}
        row |= {"name": key.shown_name if key else MASTER_NAME, "contact": settings.contact}
        row |= {"base": f"{self.request.protocol}://{self.request.host}"}
        row |= {"prices": gateway.prices.available, "models": gateway.prices.names}
        row["fields"] = {
            kind: {
                name: {"help": MARKED[kind, "help"][name], "must_be": settable.words}
                for name, settable in MARKED[kind, "settable"].items()
            }
            for kind in ("key", *GROUPS)
        }
        self.send_json(row)


class PageHandler(BaseHandler):
    """GET /ui: the page. It may run and show what stands in it, and ask this gateway, alone."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Security-Policy", PAGE_POLICY)
        for name, value in PAGE_HEADERS.items():
            self.set_header(name, value)
        self.finish(PAGE)

    head = get


SPEND_GROUPS = {"daily": "1d", "weekly": "7d", "monthly": "1mo"}


class UsageHandler(BaseHandler):
    """GET of USAGE_PATHS: what a key's budgets have left, as Claude Code's /usage shows it and
    Anthropic's own gateway answers; spend is in cents."""

    async def get(self) -> None:
        key = (await self.gateway.doors.authenticate(self.request.head.values)).key
        ledger, moment = self.gateway.ledger, now()
        key = key and await ledger.find("key", key.account.hashed)
        budgets = fullness(ledger.limited(key), moment) if key else []
        limits = list[dict[str, Any]]()
        for each in budgets:
            duration = each.budget.duration
            start, end = window(duration, moment) if duration else (EPOCH, None)
            days = (end - start).days if end else math.inf
            passed = bisect.bisect_left(self.gateway.settings.warned_parts, each.part)
            is_spent = each.part >= WHOLE
            severity = ("normal", "warning", "critical")[2 if is_spent else min(2, passed)]
            percent = 100 if is_spent else min(99, round(each.part * 100))
            row = dict[str, Any](kind="spend", percent=percent, severity=severity, resets_at=end)
            row["group"] = [*SPEND_GROUPS][(days > 1) + (days > 7)]
            limits.append(row | {"is_active": not limits})
        usage = dict[str, Any](is_enabled=True, currency="USD", utilization=None)
        if budgets:
            usage["monthly_limit"] = int(budgets[0].limit * 100)
            usage["used_credits"] = int(budgets[0].spent * 100)
            usage["utilization"] = limits[0]["percent"]
        else:
            for group, duration in SPEND_GROUPS.items():
                first = day_of(window(duration, moment)[0])
                used = sum(t.spend for *_, t in (key.account.usage.days(first) if key else ()))
                usage[group] = {"limit": None, "used_credits": int(used * 100), "utilization": None}
            usage |= {"monthly_limit": None, "used_credits": usage.pop("monthly")["used_credits"]}
        self.send_json({"extra_usage": usage, "limits": limits})


class HealthHandler(BaseHandler):
    """GET /health/liveliness and liveness, as LiteLLM answers; and readiness: 200 where requests
    are taken and keys can be kept, else 503. ``upstream`` is what relayed requests have met."""

    def get(self, asked: str) -> None:
        if asked != "readiness":
            return self.send_json("I'm alive!")
        gateway, error = self.gateway, self.gateway.ledger.trouble()
        upstreams = {each["name"]: each["state"] for each in gateway.real_keys.states()}
        refused = [name for name, state in upstreams.items() if state == REFUSED]
        is_well = not error and not (refused and len(refused) == len(upstreams))
        is_here = gateway.phase is GatewayPhase.SERVING
        status = ("healthy" if is_well else "unhealthy") if is_here else "shutting_down"
        prices = "loaded" if gateway.prices.loaded else "loading"
        told = dict[str, Any](status=status, version=__version__)
        told["store"] = error or gateway.ledger.doubt or "writable"
        told["prices"] = prices if gateway.prices.available else "none"
        told["uptime"] = round((now() - gateway.started).total_seconds())
        told["upstreams"] = upstreams
        if refused:
            told["error"] = f"real key {', '.join(refused)}: {SET_ANOTHER}"
        self.set_status(200 if status == "healthy" else 503)
        self.send_json(told | {"upstream": gateway.traffic.upstream})


# Names are LiteLLM's where it has one (its docs, "Prometheus metrics"), else they begin "gateway_".
REQUEST_METRICS = {"litellm_proxy_total_requests_metric": "Relayed requests"}
FAILURE_METRICS = {"litellm_proxy_failed_requests_metric": "Those refused, failed or broken"}
LATENCY_METRICS = {"litellm_request_total_latency_metric": "The whole of a request"}  # as TIMINGS
LATENCY_METRICS["litellm_llm_api_time_to_first_token_metric"] = "Until the first byte of an answer"
LATENCY_METRICS["litellm_llm_api_latency_metric"] = "From the sending upstream to the answer's end"
LATENCY_METRICS["litellm_overhead_latency_metric"] = "Added by the gateway before the first byte"
USAGE_METRICS = {"litellm_spend_metric": "USD", "litellm_total_tokens_metric": "Tokens"}
USAGE_METRICS |= {"litellm_input_tokens_metric": "Read", "litellm_output_tokens_metric": "Made"}
USAGE_METRICS["litellm_input_cached_tokens_metric"] = "From cache"
USAGE_METRICS["litellm_input_cache_creation_tokens_metric"] = "To cache"
BUDGET_METRICS = {"gateway_api_key_spend": "USD spent in the budget's present window"}
BUDGET_METRICS["litellm_api_key_max_budget_metric"] = "USD of the key's budget"
BUDGET_METRICS["litellm_remaining_api_key_budget_metric"] = "USD left of the key's budget"
BUDGET_METRICS["litellm_api_key_budget_remaining_hours_metric"] = "Hours until the budget resets"
PRESENT_METRICS = {"litellm_in_flight_requests": "Requests", "gateway_streams_open": "Streams"}
PRESENT_METRICS["gateway_upstream_connections_idle"] = "Kept for the next request"
EVENT_METRICS = {"gateway_upstream_connections_opened": "Connections opened to the upstream"}
EVENT_METRICS["gateway_upstream_connections_reused"] = "Requests that went over a kept connection"
EVENT_METRICS["gateway_client_disconnects"] = "Clients that left too early"
KEY_METRICS = {"gateway_upstream_key_requests": "Requests that a real key carried"}
KEY_METRICS["gateway_upstream_key_errors"] = "Errors and no answers that it got"
REST_METRICS = {"gateway_upstream_key_resting": "Whether nothing is asked with it for a while"}
KEYED = "api_key_alias model"  # labels
PROCESS_TIMEOUT = 1.0  # seconds for another process to tell its metrics


class MetricsHandler(ManagementHandler):
    """GET /metrics: what the gateway has done since it started, for Prometheus; for the master key,
    for keys whose ``allowed_routes`` name it, and with --open-metrics and in open mode for all."""

    async def prepare(self) -> None:
        BaseHandler.prepare(self)
        if self.gateway.settings.open_metrics or self.gateway.doors.is_open:
            return
        for _, credential in candidates(self.request.head.values):
            found = None
            with contextlib.suppress(APIError):  # the store is away; the master key is known here
                found = await self.gateway.ledger.find_hash(hash_key(credential))
            for route in found[0].allowed_routes if found and found[1] == "active" else ():
                if route.startswith(METRICS_PATH) and fnmatch.fnmatchcase(METRICS_PATH, route):
                    return  # a mere "*" does not name it
        await super().prepare()

    async def get(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise APIError(501, "Metrics need it: pip install prometheus-client") from None
        keys = list[VirtualKey]()
        with contextlib.suppress(APIError):  # while the store is away this process tells of itself
            async for key in self.gateway.ledger.each():
                keys += [] if key.deleted_at else [key]
                if len(keys) == MAX_LABELS:
                    break
        told, families = {str(PLACE.number): own_metrics(self.gateway, keys)}, dict[str, Any]()
        if PLACE.folder:
            others = sorted({*os.listdir(PLACE.folder)} - {*told})
            told |= zip(others, await asyncio.gather(*map(ask_process, others)))
        for process, each in told.items():
            whose = {"process": process} if PLACE.folder else {}
            for name, text, kind, samples in each:
                family = families.setdefault(name, prometheus.Metric(name, text, kind))
                for sample, labels, value in samples:
                    more = {} if name in BUDGET_METRICS else whose  # which the store has
                    family.add_sample(sample, labels | more, value)
        registry: Any = types.SimpleNamespace(collect=families.values)
        accepted = self.request.headers.get("Accept", "")
        encode, media_type = prometheus.exposition.choose_encoder(accepted)
        self.set_header("Content-Type", media_type)
        self.finish(encode(registry))


async def ask_process(name: str) -> Any:
    """What one of the `Parent`'s other processes tells of itself; nothing if it is not there."""
    with contextlib.suppress(OSError, ValueError):
        async with asyncio.timeout(PROCESS_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(Path(PLACE.folder, name))
            with contextlib.closing(writer):
                return json.loads(await reader.read())
    return []


def own_metrics(gateway: Gateway, keys: Sequence[VirtualKey] = ()) -> list[Any]:
    """Those of this process, and what these keys have left: names, texts, types and samples."""
    families = collect_metrics(gateway, keys)
    return [(f.name, f.documentation, f.type, [s[:3] for s in f.samples]) for f in families]


def tell_metrics(gateway: Gateway, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer `ask_process`."""
    with contextlib.closing(writer):
        writer.write(json.dumps(own_metrics(gateway)).encode())


def collect_metrics(gateway: Gateway, keys: Sequence[VirtualKey]) -> Iterator[Any]:
    """Every metric, made of the gateway's counts."""
    from prometheus_client import ProcessCollector, core

    traffic, client = gateway.traffic, gateway.client
    requests, failed, gone = dict[Any, list[int]](), dict[Any, list[int]](), 0
    for (key, model, status, outcome), count in traffic.requests.items():
        requests.setdefault((key, model, str(status)), [0])[0] += count
        if outcome != "ok":
            failed[key, model, str(status), outcome] = [count]
        gone += count if outcome == "client_gone" else 0
    times, ends = dict[Any, Any](), (*map(str, LATENCY_BUCKETS), "+Inf")
    for model, each in traffic.timings.items():
        times[model,] = [([*zip(ends, itertools.accumulate(h.counts))], h.total) for h in each]
    usage, budgets, moment = dict[Any, Any](), dict[Any, Any](), now()
    for label, used in traffic.used.items():
        prompt, output = used.input_tokens + used.cached, used.output_tokens
        cache = (used.cache_read_tokens, used.written)
        usage[label] = (used.spend, prompt + output, prompt, output, *cache)
    for record in keys:
        spent, limit, length = record.spent(moment), record.max_budget, record.budget_duration
        end = window(length, moment)[1] if length and limit is not None else None
        left = None if limit is None else limit - spent
        hours = end and (end - moment) / timedelta(hours=1)
        budgets[record.shown_name,] = (spent, limit, left, hours)
    states = gateway.real_keys.states()
    real = {(each["name"],): (each["requests"], each["errors"]) for each in states}
    resting = {(each["name"],): (each["state"] != "ok",) for each in states}
    answers = [handler._visit.answer for handler in gateway.active]
    streams = sum(head is not None and is_event_stream(head) for head in answers)
    for kind, labels, names, rows in (
        ("Counter", f"{KEYED} status_code", REQUEST_METRICS, requests),
        ("Counter", f"{KEYED} exception_status exception_class", FAILURE_METRICS, failed),
        ("Histogram", "model", LATENCY_METRICS, times),
        ("Counter", KEYED, USAGE_METRICS, usage),
        ("Gauge", "api_key_alias", BUDGET_METRICS, budgets),
        ("Gauge", "", PRESENT_METRICS, {(): (len(gateway.active), streams, len(client.idle))}),
        ("Counter", "", EVENT_METRICS, {(): (client.opened, client.reused, gone)}),
        ("Counter", "upstream_key", KEY_METRICS, real),
        ("Gauge", "upstream_key", REST_METRICS, resting),
    ):
        for index, (name, text) in enumerate(names.items()):
            family = getattr(core, f"{kind}MetricFamily")(name, text, labels=labels.split())
            for values, row in rows.items():
                if row[index] is not None:  # there is such a thing
                    shown: Any = row[index] if kind == "Histogram" else [float(row[index])]
                    family.add_metric(values, *shown)
            yield family
    yield from ProcessCollector(registry=None).collect()


class LineFormatter(logging.Formatter):
    """A log line, as another formatter makes it, or (without one) as a JSON object. Whoever wrote
    it, secrets are masked in it, and all that looks like a key is abbreviated."""

    def __init__(self, inner: logging.Formatter | None, *secrets: str) -> None:
        super().__init__()
        self._inner = inner
        self._secrets = list[str]()
        self.mask(secrets)
        self._second, self._before, self._after = 0, "", ""

    def mask(self, secrets: Iterable[str]) -> None:
        """Mask these too from now on."""
        new = (each for each in secrets if len(each) >= MIN_SECRET_LENGTH)
        self._secrets += [each for each in new if each not in self._secrets]

    def format(self, line: logging.LogRecord) -> str:
        record = line.msg
        if PLACE.folder:
            line.module = f"process {PLACE.number}"
        if self._inner is None:
            moment = datetime.fromtimestamp(line.created, UTC).isoformat(timespec="milliseconds")
            shown: dict[str, Any] = {"time": moment.replace("+00:00", "Z")}
            shown["level"] = line.levelname.lower()
            shown |= {"process": PLACE.number} if PLACE.folder else {}
            shown |= record.to_json() if type(record) is Record else {"message": line.getMessage()}
            if line.exc_info:
                shown["exception"] = self.formatException(line.exc_info)
            text = json.dumps(shown)
        elif type(record) is not Record:
            text = self._inner.format(line)
        else:
            if int(line.created) != self._second:  # which is all that changes around a record
                line.msg, self._second = "\0", int(line.created)
                self._before, _, self._after = self._inner.format(line).partition("\0")
                line.msg = record
            text = self._before + str(record) + self._after
        for secret in self._secrets:
            text = text.replace(secret, "*" * 8)
        return mask_keys(text) if KEY_LIKE.search(text) else text


def mask_secrets(settings: Settings) -> None:
    """Have the log mask these secrets, beside those that it masks already."""
    real = [value.removeprefix("Bearer ") for _, value in real_keys(settings).values()]
    quoted = urllib.parse.urlsplit(settings.store).password or ""
    password = quoted, urllib.parse.unquote(quoted)
    for handler in logging.root.handlers:
        if isinstance(line := handler.formatter, LineFormatter):
            line.mask([settings.master_key, settings.master_key_next, *real, *password])


def log_request(handler: web.RequestHandler) -> None:
    """Tornado's access log for what is not relayed: without the query, where keys may stand."""
    if isinstance(handler, RelayHandler):  # which has a line of its own
        return
    method, status = printable(handler.request.method or ""), handler.get_status()
    path = word(printable(urllib.parse.unquote(handler.request.path, "latin-1")))
    log.log(logging.DEBUG if status < 400 else logging.INFO, "- %s %s %d", method, path, status)


# ─── Page ─────────────────────────────────────────────────────────────────────────────────────────

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Gateway</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --paper: light-dark(#f5f6f8, #121419); --card: light-dark(#fff,
  #1b1e25); --ink: light-dark(#1a1f29, #e6e9ee); --soft: light-dark(#5b6473, #9ca5b4); --line:
  light-dark(#dfe3e9, #31363f); --accent: light-dark(#2356c5, #8fb2ff); --good: light-dark(#2a8052,
  #4cc38a); --warn: light-dark(#9a6400, #e5b53f); --bad: light-dark(#c0271e, #ff7f76); background:
  var(--paper); color: var(--ink); font: 14px/1.45 system-ui, sans-serif } .c0 { --x: #4e79a7 } .c1
  { --x: #f28e2b } .c2 { --x: #59a14f } .c3 { --x: #e15759 } .c4 { --x: #76b7b2 } .c5 { --x: #d4af2a
  } .c6 { --x: #b07aa1 } .c7 { --x: #ff9da7 } .c8 { --x: #9c755f } .c9 { --x: #99a1ac } * {
  box-sizing: border-box } body { margin: 0 } [hidden] { display: none !important } h1 { font-size:
  16px; margin: 0 } h2 { font-size: 14px; margin: 0 } a { color: var(--accent) } header, .bar {
  display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center } header { padding: 8px 20px;
  background: var(--card); border-bottom: 1px solid var(--line) } nav { display: flex; flex: 1;
  overflow-x: auto } .bar { margin-bottom: 8px } nav a { padding: 5px 10px; border-radius: 6px;
  color: var(--soft); text-decoration: none } nav a[aria-current] { background: var(--paper); color:
  var(--ink); font-weight: 600 } .bar h2 { margin-right: auto } #views { max-width: 1440px; margin:
  auto; padding: 14px 20px } #who { margin-left: auto } footer { padding: 0 20px 20px } footer,
  small, dt, #who, #spans small { color: var(--soft) } small { font-size: 12px } .grid, .column,
  section { display: grid; gap: 14px; min-width: 0 } .column, section { grid-template-columns:
  minmax(0, 1fr); align-content: start } .grid { grid-template-columns: minmax(0, 7fr) minmax(0,
  3fr) } .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  min-width: 0; padding: 12px 14px } .list { list-style: none; margin: 0; padding: 0 } button,
  input, select, textarea { font: inherit; color: inherit; background: var(--card); border: 1px
  solid var(--line); border-radius: 6px; padding: 4px 9px; max-width: 100% } button { cursor:
  pointer } button:hover { border-color: var(--soft) } .main { background: light-dark(#2356c5,
  #3b6fdc); border-color: #0000; color: #fff } .link { border: 0; padding: 0; color: var(--accent);
  background: none } .bad, .error, #message.error { color: var(--bad) } .good { color: var(--good) }
  .warn { color: var(--warn) } :focus-visible { outline: 2px solid var(--accent); outline-offset:
  1px } #spans { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 10px } #spans
  button { text-align: left; border-radius: 10px; padding: 8px 14px } #spans [aria-pressed=true] {
  border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent) } #spans b { display: block;
  font-size: 22px; line-height: 1.3 } #chart { height: 220px } #chart svg { display: block; width:
  100%; height: 100% } #chart text { fill: var(--soft); font-size: 11px } #chart line { stroke:
  var(--line) } #chart rect, .dot { fill: var(--x); background: var(--x) } #chart rect:hover {
  opacity: .75 } .dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 6px } #legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12px }
  .scroll { overflow: auto; max-height: 70vh } .column .scroll { max-height: 372px } table {
  border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } td, th button {
  padding: 4px 5px; white-space: nowrap } .number { text-align: right } td { border-bottom: 1px
  solid var(--line); max-width: 300px; overflow: hidden; text-overflow: ellipsis } .wide {
  white-space: normal; min-width: 240px; overflow-wrap: anywhere } th { position: sticky; top: 0;
  background: var(--card); padding: 0; text-align: left; z-index: 1 } th button { border: 0;
  font-weight: 600; color: var(--soft); background: none } [aria-sort=ascending] button::after {
  content: " ↑" } [aria-sort=descending] button::after { content: " ↓" } tfoot td { font-weight:
  600; position: sticky; bottom: 0; background: var(--card) } .budget { padding: 4px 0; min-width:
  240px; white-space: normal; text-align: left } .budget > span { display: flex; justify-content:
  space-between; gap: 10px; overflow-wrap: anywhere } [role=meter] { height: 6px; border-radius:
  3px; background: var(--line); margin: 3px 0 } [role=meter] i { display: block; height: 100%;
  border-radius: 3px; background: currentColor } dialog { border: 1px solid var(--line);
  border-radius: 12px; background: var(--card); width: 680px; color: inherit; max-width: calc(100vw
  - 20px) } dialog::backdrop { background: #0007 } label { display: block; margin: 8px 0 } label
  small { display: block } label > :not([type=checkbox], small, select) { display: block; width:
  100% } .fields { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap:
  0 16px } pre, #made-key { background: var(--paper); padding: 8px 10px; border-radius: 6px; margin:
  4px 0; white-space: pre-wrap; overflow-wrap: anywhere } dl { margin: 0 } dd { margin: 0 0 6px;
  overflow-wrap: anywhere } #login { max-width: 380px; margin: 12vh auto } #login input, #login
  button { width: 100%; padding: 8px 10px; margin: 4px 0 } #message { inset: auto auto 14px 50%;
  transform: translateX(-50%); margin: 0; color: var(--ink); background: var(--card); border: 1px
  solid; border-radius: 8px; padding: 8px 14px } @media (max-width: 900px) { header h1 { display:
  none } .grid { grid-template-columns: minmax(0, 1fr) } nav { order: 9; flex-basis: 100% } #spans {
  grid-template-columns: 1fr 1fr } #views, header { padding: 8px } }
</style>
<form id="login" class="card" method="post" action="/ui/login" hidden>
  <h1>Gateway</h1>
  <p>Sign in with a virtual key to see what it has left, or with the master key to see all.</p>
  <label for="key">Master key or virtual key</label>
  <input id="key" type="password" autocomplete="current-password" required>
  <button class="main">Sign in</button>
  <p id="login-error" class="error" role="alert"></p>
</form>
<div id="app" hidden>
  <header><h1>Gateway</h1><nav id="tabs" aria-label="Views"></nav><a id="health"
    href="#gateway"></a><span id="who"></span><button id="logout">Sign out</button></header>
  <main id="views"></main>
  <footer><small id="utc"></small></footer>
</div>
<dialog id="dialog" aria-labelledby="heading"></dialog>
<dialog id="ask" aria-labelledby="ask-text"><p id="ask-text"></p><button data-do="no" value="no"
  >No</button> <button data-do="yes" value="yes" class="main">Yes</button></dialog>
<p id="message" role="status" popover="manual"></p>
<script>
"use strict";
const $ = (id) => document.getElementById(id), DAY = 86400000;
const NEAR = 80, IDLE_DAYS = 7, ROWS = 100, LOGS = 2000;  // percent, days, rows
const SVG = new Set(["svg", "rect", "line", "text", "title"]);
const nothing = () => ({keys: [], teams: [], users: [], logs: [], under: [], draws: [], lives: []});
const data = nothing();  // what the API has told, and what draws it
let session = null;

// An element. Its children are texts or elements, never HTML, whatever somebody called his key.
function h(tag, props, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" && tag !== "option") node.value = value;
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child != null && child !== false));
  return node;
}
const button = (deed, text, onclick, more) =>
  h("button", {type: "button", "data-do": deed, onclick, ...more}, text);

// Give an element these children; what looks as before stays, with its focus and selection.
function put(parent, nodes) {
  const old = new Map([...parent.children].map((node) => [node.dataset.id, node]));
  const now = nodes.map((node) => {
    const was = old.get(node.dataset.id);
    old.delete(node.dataset.id);
    if (!was || was.isEqualNode(node)) return was ?? node;
    const place = [...was.querySelectorAll("button")].indexOf(document.activeElement);
    was.replaceWith(node); node.querySelectorAll("button")[place]?.focus();
    return node;
  });
  old.forEach((node) => node.remove());
  const move = (node, i) => parent.insertBefore(node, parent.children[i] ?? null);
  now.forEach((node, i) => parent.children[i] === node || move(node, i));
}

async function api(path, body) {
  const headers = {"content-type": "application/json"};
  const posted = body && {method: "POST", headers, body: JSON.stringify(body)};
  const answer = await fetch(path, posted).catch(() => null);
  const told = await answer?.json().catch(() => null);
  if (told && (answer.ok || !told.error)) return told;
  const text = told?.error?.message ?? (answer ? `HTTP ${answer.status}` : "No answer.");
  if (answer?.status === 401 && session) leave(text);
  throw new Error(text);
}

async function everyPage(path, name, size = "size") {
  const page = (n) => api(`${path}${size}=100&page=${n}`), first = await page(1);
  const others = Array.from({length: Math.max(0, first.total_pages - 1)}, (_, i) => page(i + 2));
  return [first, ...await Promise.all(others)].flatMap((each) => each[name]);
}

function say(text, isError = false) {
  if (isError && $("form-error")) $("form-error").textContent = text;
  else {
    const message = $("message");
    message.hidePopover();  // and shown again, above a dialog
    message.textContent = text; message.classList.toggle("error", isError); message.showPopover();
    clearTimeout(say.timer); say.timer = setTimeout(() => message.hidePopover(), 8000);
  }
}
const orSay = (promise, otherwise) => promise.catch((e) => (say(e.message, true), otherwise));

// Texts of amounts and moments
const exact = new Intl.NumberFormat("en"), ages = new Intl.RelativeTimeFormat("en");
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1});
const order = new Intl.Collator("en", {numeric: true}).compare;
const usd = (n) => `$${n > 0 && n < 0.01 ? n.toFixed(6).replace(/[.]?0+$/, "")
  : n.toLocaleString("en", {minimumFractionDigits: 2, maximumFractionDigits: 2})}`;
const dayOf = (moment) => new Date(moment).toISOString().slice(0, 10);
const ago = (days) => dayOf(Date.now() - days * DAY);
const words = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");
const dot = (n) => h("span", {class: `dot c${Math.min(n, 9)}`});
function age(text) {
  if (!text) return "never";
  const s = (new Date(text) - Date.now()) / 1000, units = [[86400, "day"], [3600, "hour"]];
  const [n, unit] = units.find((each) => Math.abs(s) >= 1.5 * each[0]) ?? [60, "minute"];
  return h("time", {title: `${text} (UTC)`}, ages.format(Math.round(s / n), unit));
}

// Kinds of columns; those with a unit are summed in whole units, so that no cent is lost.
const TEXT = {show: (text) => String(text ?? "")}, AGE = {show: age}, WIDE = {...TEXT, is: "wide"};
const CLOCK = {show: (text) => h("time", {title: `${text} (UTC)`}, text.slice(11, 19))};
const USD = {is: "number", unit: 1e9, show: usd}, NUMBER = {is: "number", show: TEXT.show};
const COUNT = {is: "number", unit: 1, show: (n) =>
  h("span", {title: exact.format(n)}, compact.format(n))};
const SECONDS = {is: "number", show: (n) => n == null ? "" : `${n.toFixed(2)} s`};
const PERCENT = {is: "number", show: (n) => `${n.toFixed(1)}%`};
const WORD = {show: (text) => h("span", {class: GOOD.test(text) ? "good" : "bad"}, text ?? "")};
const GOOD = /^(ok|active|under way)$/;
const summed = (rows, unit, of) =>
  rows.reduce((sum, row) => sum + Math.round(of(row) * unit), 0) / unit;

// A table that sorts, filters, turns pages, downloads. Columns: [name, label, kind, value of row].
function table(name, title, columns, id, sorted = [], more = null) {
  let rows = [], [by, way] = sorted, page = 0;
  const valueOf = ([field, , , of], row) => of ? of(row) : row[field];
  const compare = (a, b) =>
    Number.isFinite(a) && Number.isFinite(b) ? a - b : order(a ?? "", b ?? "");
  const chosen = () => {
    const wanted = find.value.toLowerCase(), column = columns.find((each) => each[0] === by);
    const found = rows.filter((row) => !wanted || columns.some((each) =>
      String(valueOf(each, row) ?? "").toLowerCase().includes(wanted)));
    const value = (row) => valueOf(column, row);
    return column ? found.sort((a, b) => way * compare(value(a), value(b))) : found;
  };
  const cell = ([field, , kind], value, row) => h("td", {class: kind.is, "data-column": field,
    "data-value": value, title: kind === TEXT && value}, kind.show(value, row));
  const draw = () => {
    const found = chosen(), pages = Math.ceil(found.length / ROWS) || 1;
    page = Math.min(page, pages - 1);
    heads.forEach((head, i) => head.setAttribute("aria-sort", columns[i][0] !== by ? "none"
      : way < 0 ? "descending" : "ascending"));
    put(body, found.slice(page * ROWS, (page + 1) * ROWS).map((row) => h("tr", {"data-id": id(row)},
      columns.map((each) => cell(each, valueOf(each, row), row)))));
    const sums = columns.map((each, i) => each[2].unit ? cell(each, summed(found, each[2].unit,
      (row) => valueOf(each, row))) : h("td", null, i ? "" : "Sum"));
    foot.replaceChildren(columns.some((each) => each[2].unit) ? h("tr", null, sums) : "");
    count.textContent = `${exact.format(found.length)} row${found.length === 1 ? "" : "s"}`
      + (pages > 1 ? ` · page ${page + 1} of ${pages}` : "");
    count.dataset.rows = found.length; turns.forEach((button) => { button.hidden = pages < 2; });
  };
  const save = (ending, text) => button(ending, ending.toUpperCase(), () => {
    const href = URL.createObjectURL(new Blob([text(chosen())]));
    h("a", {href, download: `${name}-${ago(0)}.${ending}`}).click();
    setTimeout(URL.revokeObjectURL, 60000, href);
  });
  const quoted = (value) => {  // no spreadsheet may take a text for a formula
    const apostrophe = typeof value === "string" && /^[-=+@\t\r]/.test(value) ? "'" : "";
    return `"${apostrophe}${String(value ?? "").replaceAll('"', '""')}"`;
  };
  const csv = (found) => [named.map((each) => quoted(each[0])), ...found.map((row) =>
    named.map((each) => quoted(valueOf(each, row))))].map((line) => `${line}\r\n`).join("");
  const named = columns.filter((each) => each[1]);
  const turns = [["previous", "‹", -1], ["next", "›", 1]].map(([deed, text, step]) => button(
    deed, text, () => { page = Math.max(0, page + step); draw(); }, {"aria-label": words(deed)}));
  const find = h("input", {type: "search", placeholder: "Filter", "aria-label": `Filter ${title}`,
    size: 10, oninput: () => { page = 0; draw(); }});
  const heads = columns.map(([field, label, kind]) => h("th", {scope: "col", class: kind.is},
    label && h("button", {type: "button", onclick: () => {
      [by, way] = [field, by === field ? -way : kind.is === "number" ? -1 : 1]; draw();
    }}, label)));
  const body = h("tbody"), foot = h("tfoot"), count = h("small", {role: "status", "data-rows": 0});
  const node = h("div", {class: "card", "data-table": name},
    h("div", {class: "bar"}, h("h2", null, title), more, count, turns, find,
      save("csv", csv), save("json", (found) => JSON.stringify(found, null, 1))),
    h("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": title},
      h("table", {"aria-label": title}, h("thead", null, h("tr", null, heads)), body, foot)));
  return {node, update: (now) => { rows = [...now]; draw(); }};
}

// Bars by day, stacked, of {days, series: [{name, values by day, sum}], show: text of an amount}.
function chart(box, legend) {
  let told = null, drawn = "";
  const draw = () => {
    const width = box.clientWidth, left = 52, low = 200, bars = [];
    if (!told || !width || drawn === (drawn = width + JSON.stringify(told))) return;
    const {days, series, show} = told, step = (width - left) / days.length;
    const totals = days.map((_, i) => series.reduce((sum, each) => sum + each.values[i], 0));
    const most = Math.max(...totals);
    const power = 10 ** Math.floor(Math.log10(most || 1)), height = (n) => n / top * (low - 8);
    const top = [1, 2, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= most);
    for (const y of [0, 0.5, 1].map((part) => low - height(part * top))) bars.push(
      h("line", {x1: left, x2: width, y1: y, y2: y}), h("text", {x: left - 6, y: y + 4,
        "text-anchor": "end"}, show((low - y) / (low - 8) * top)));
    days.forEach((day, i) => {
      let y = low;
      const x = left + i * step;
      if (i % Math.ceil(days.length * 60 / width) === 0) {
        bars.push(h("text", {x, y: 216}, day.slice(5)));
      }
      series.forEach(({name, values}, n) => values[i] && bars.push(h("rect", {x: x + step * 0.1,
        y: y -= height(values[i]), width: Math.min(step * 0.8, 60), height: height(values[i]),
        class: `c${Math.min(n, 9)}`, "data-day": day, "data-name": name, "data-value": values[i]},
      h("title", null, `${day} · ${name}: ${show(values[i])}`))));
    });
    const label = `By day from ${days[0]} to ${days.at(-1)}; the tables have the numbers`;
    box.replaceChildren(h("svg", {role: "img", "aria-label": label}, bars));
    legend.replaceChildren(...series.map(({name, sum}, n) => h("li", {"data-name": name,
      "data-value": sum}, dot(n), `${name} ${show(sum)}`)));
  };
  new ResizeObserver(draw).observe(box);
  return (next) => { told = next; draw(); };
}

// Money and tokens of a span: tiles, bars by day, tables, of ``source(first, last, groups, top)``.
const SUMS = [["spend", "Spend", USD], ...["Tokens", "Requests", "Errors", "Input tokens",
  "Output tokens", "Cache read tokens", "Cache written tokens"].map(
  (label) => [label.toLowerCase().replaceAll(" ", "_"), label.replace(" tokens", ""), COUNT])];
const PARTS = {cache_written_tokens: ["cache_write_5m_tokens", "cache_write_1h_tokens"],
  tokens: ["input_tokens", "output_tokens", "cache_read_tokens", "cache_written_tokens"]};
const counted = (row, name) => row[name]
  ?? PARTS[name]?.reduce((sum, part) => sum + counted(row, part), 0) ?? 0;
const SPANS = {today: "Today", 7: "7 days", 30: "30 days", month: "This month", free: "Free span"};

function merged(rows, field) {  // one row for each value of the field, with its sums
  const groups = Map.groupBy(rows, (row) => row[field]);
  return [...groups.values()].map((group) => ({...group[0], ...Object.fromEntries(SUMS.map(
    ([name, , {unit}]) => [name, summed(group, unit, (row) => counted(row, name))]))}));
}

function nameOf(field, row) {
  const thing = THINGS[field], known = thing && data[thing.list].find((each) =>
    each[thing.id] === row[field]);
  return row.key_alias || row.key_name || (known ? thing.named(known) : row[field]) || "(none)";
}

function usage(source, groups, title) {
  let span = "30", asked = 0;
  const select = (id, label, options) => h("select", {id, "aria-label": label, onchange: () =>
    show()}, options.map(([value, text]) => h("option", {value}, text)));
  const legend = h("ul", {id: "legend", class: "list"}), group = select("group", "By", groups);
  const measure = select("measure", "Measure", SUMS.slice(0, 3)), box = h("div", {id: "chart"});
  const [from, to] = ["from", "to"].map((id) => h("input", {type: "date", id, "aria-label":
    words(id), onchange: () => { span = "free"; show(); }})), draw = chart(box, legend);
  const tiles = ["today", "7", "30", "month", "free"].map((name) => h("button", {"data-span": name,
    onclick: () => { span = name; show(); }}, SPANS[name], h("b", {"data-sum": "spend"}), h("small",
    null, h("span", {"data-sum": "tokens"}), " tokens · ", h("span", {"data-sum": "requests"}),
    " requests")));
  const spent = table("spent", title, [["name", "Name", TEXT], SUMS[0], ["share", "Share",
    PERCENT], ...SUMS.slice(1)], (row) => row.id, ["spend", -1]);
  const daily = table("days", "By day", [["day", "Day (UTC)", TEXT], ...SUMS], (row) => row.day,
    ["day", -1]);
  async function load() {
    const today = ago(0), month = `${today.slice(0, 8)}01`, by = group.value, turn = ++asked;
    const since = {today, 7: ago(6), 30: ago(29), month, free: from.value || today};
    const first = since[span], last = span === "free" && to.value || today;
    if (![from, to].includes(document.activeElement)) [from.value, to.value] = [first, last];
    tiles.forEach((tile) => tile.setAttribute("aria-pressed", tile.dataset.span === span));
    const told = [];  // one after the other, as far as they are still wanted
    for (const what of [[first < ago(30) ? first : ago(30), last > today ? last : today, "day"],
      [first, last, `day,${by}`, 9], [first, last, by]]) {
      told.push(await source(...what));
      if (turn !== asked) return;
    }
    const [all, stacked, sums] = told;
    const past = merged(all, "day"), kind = SUMS.find((each) => each[0] === measure.value)[2];
    const days = past.filter(({day}) => day >= first && day <= last);
    for (const tile of tiles) for (const [field, , {unit, show: text}] of SUMS.slice(0, 3)) {
      const rows = tile.dataset.span === "free" ? days
        : past.filter(({day}) => day >= since[tile.dataset.span] && day <= today);
      const place = tile.querySelector(`[data-sum=${field}]`);
      place.replaceChildren(text(place.dataset.value = summed(rows, unit, (row) => row[field])));
    }
    const whole = summed(days, 1e9, (row) => row.spend) || 1;
    spent.update(merged(sums, by).map((row) => ({name: nameOf(by, row), id: row[by], ...row,
      share: row.spend / whole * 100})));
    daily.update(days);
    const dates = [], rank = (each) => each.name === "(others)" ? -1 : each.sum;
    for (let day = Date.parse(first); day <= Date.parse(last); day += DAY) dates.push(dayOf(day));
    const series = [...Map.groupBy(stacked, (row) => row[by]).values()].map((rows) => {
      const values = new Map(merged(rows, "day").map((row) => [row.day, row[measure.value]]));
      return {name: nameOf(by, rows[0]), values: dates.map((day) => values.get(day) ?? 0),
        sum: summed([...values.values()], kind.unit, (n) => n)};
    });
    draw({days: dates, series: series.sort((a, b) => rank(b) - rank(a)),
      show: kind === USD ? usd : (n) => compact.format(n)});
  }
  const show = () => orSay(load());
  return {tiles: h("div", {id: "spans"}, tiles), show, nodes: [h("div", {class: "card"}, h("div",
    {class: "bar"}, h("h2", null, "By day"), measure, "by", group, from, "–", to), box, legend),
  spent.node, daily.node]};
}

// Budgets
const fullness = ({max_budget: most, spend}) => most ? spend / most : 1;
const fullest = (budgets) => [...budgets].sort((a, b) => fullness(b) - fullness(a));
const own = (kind, row) => fullest((row.budgets ?? []).filter((each) => each.of === kind));
function meter(budget, name, id) {
  const {max_budget: most, spend, budget_duration: length, budget_reset_at: ends} = budget;
  const part = fullness(budget) * 100, fill = h("i"), title = [name, budget.for].filter(Boolean);
  const left = `${usd(Math.max(0, most - spend))} of ${usd(most)} left`;
  fill.style.width = `${Math.min(100, part)}%`;
  return h("li", {class: "budget", "data-id": [id, budget.for, length], "data-budget": id},
    h("span", null, h("b", null, title.join(" · ")), left),
    h("div", {role: "meter", class: part >= 100 ? "bad" : part >= NEAR ? "warn" : "good",
      "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.min(100, Math.floor(part)),
      "aria-label": `Percent spent of a budget of ${title.join(", ")}`}, fill),
    h("small", null, `${Math.floor(part)}% spent`, length && ` · ${length}`,
      ends ? [" · resets ", age(ends), ", ", ends.slice(5, 16).replace("T", " ")] : " · for ever"));
}

// Requests
const callOf = (row) => row.litellm_call_id;
const keyOf = (row) => row.key_alias || row.api_key?.slice(0, 8);
const REQUEST = [["startTime", "Time", CLOCK], ["key", "Key", TEXT, keyOf],
  ["model", "Model", TEXT], ["outcome", "Outcome", WORD, (row) => row.outcome || "under way"],
  ["status_code", "Status", NUMBER],
  ["prompt_tokens", "In", COUNT], ["completion_tokens", "Out", COUNT], ["spend", "Cost", USD],
  ["time_to_first_byte", "First byte", SECONDS], ["duration", "Took", SECONDS],
  ["error", "Why", WIDE]];
function requests() {
  const under = table("underway", "Under way", REQUEST.filter((each) => !each[2].unit), callOf);
  const recent = table("recent", "Most recent", REQUEST, callOf), refused = table("refused",
    "Refused, and why", [["times", "Times", NUMBER], ["key", "Key", TEXT], ["why", "Why", WIDE],
      ["last", "Last", AGE]], (row) => row.id, ["times", -1]);
  data.lives.push(() => {
    under.update(data.under); recent.update(data.logs);
    const rows = data.logs.filter((row) => row.outcome?.startsWith("refused"));
    const alike = Map.groupBy(rows, (row) => `${keyOf(row)} ${row.error || row.outcome}`);
    refused.update([...alike].map(([id, [row, ...more]]) => ({id, times: more.length + 1,
      key: keyOf(row), why: row.error || row.outcome, last: row.startTime})));
  });
  return {under, recent, refused};
}
async function poll() {
  const path = "/spend/logs?limit=", asked = session;
  if (session && !document.hidden) await orSay((async () => {
    let rows = await api(`${path}100`);
    const known = new Set(data.logs.map(callOf)), isNew = (row) => !known.has(callOf(row));
    if (rows.length && rows.every(isNew)) rows = await api(path + LOGS);
    const under = await api("/spend/logs?status=under_way");
    if (asked !== session) return;
    data.under = under; data.logs = [...rows.filter(isNew), ...data.logs].slice(0, LOGS);
    data.lives.forEach((draw) => draw());
  })());
  setTimeout(poll, 2000);
}

// Keys, teams and users: what differs between them
const THINGS = {
  key: {id: "token", list: "keys", make: "generate", named: (row) => row.key_alias || row.key_name},
  team: {id: "team_id", list: "teams", make: "new", named: (row) => row.team_alias || row.team_id},
  user: {id: "user_id", list: "users", make: "new", named: (row) =>
    row.user_alias || row.user_email || row.user_id}};
THINGS.api_key = THINGS.key;  // in reports
const USUAL = ["key_alias", "team_id", "team_alias", "user_id", "user_email", "models",
  "max_budget", "budget_duration", "rpm_limit", "max_parallel_requests", "duration"];
const address = (kind, row) => ({[kind === "key" ? "key" : `${kind}_id`]: row[THINGS[kind].id]});

function ask(text) {
  const dialog = $("ask");
  $("ask-text").textContent = text; dialog.returnValue = ""; dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () =>
    done(dialog.returnValue === "yes"), {once: true}));
}

async function act(kind, row, deed, more) {
  const {id, named} = THINGS[kind], name = named(row), what = `${kind} “${name}”`;
  const sure = {delete: `Delete ${what}${kind === "team" ? " and its keys" : ""} for good?`,
    reset_spend: `Set what ${what} spent in its present windows to $0?`, regenerate:
    `Make a new value for ${what}? The old one works ${more?.grace_period
      ? `for ${more.grace_period} more` : "no longer"}.`}[deed];
  if (sure && !await ask(sure)) return;
  let path = `/${kind}/${deed}`, body = {...address(kind, row), ...more};
  if (deed === "delete") body = {[kind === "key" ? "keys" : `${kind}_ids`]: [row[id]]};
  if (deed === "reset_spend") path = `/${kind}/${encodeURIComponent(row[id])}/${deed}`;
  if (kind === "user" && deed.endsWith("block")) {
    [path, body] = ["/user/update", {...body, blocked: deed === "block"}];
  }
  await orSay(api(path, body).then(async (answer) => {
    if (deed === "regenerate") made(name, [answer]); else $("dialog").close();
    say(`${words(deed)}: ${name}`); await refresh();
  }));
}

function copyable(text, tag = "pre", props = {}) {
  const node = h(tag, props, text);
  return [node, button("copy", "Copy", () => {
    getSelection().selectAllChildren(node);  // which works without TLS too
    say(document.execCommand("copy") ? "Copied." : "Select it, and copy it by hand.");
  })];
}
const connect = (key, at = `${session.base}/anthropic`) => h("div", {id: "connect"},
  h("h2", null, "Claude Code"), copyable(
    `export ANTHROPIC_BASE_URL=${at}\nexport ANTHROPIC_AUTH_TOKEN=${key}`), h("h2", null, "Python"),
  copyable(`anthropic.Anthropic(base_url="${at}", api_key="${key}")`), h("h2", null, "JavaScript"),
  copyable(`new Anthropic({ baseURL: "${at}", apiKey: "${key}" })`));

function open(title, ...nodes) {
  const close = button("close", "✕", () => $("dialog").close(), {"aria-label": "Close"});
  $("dialog").replaceChildren(h("div", {class: "bar"}, h("h2", {id: "heading"}, title), close),
    h("div", null, nodes));
  if (!$("dialog").open) $("dialog").showModal();
}

function made(name, rows) {  // the only time that keys are shown: of one, or of many as a table
  const warned = rows.flatMap((row) => row.warnings ?? []).map((text) =>
    h("p", {class: "warn"}, text));
  const once = h("p", null, "Shown this once; it is kept nowhere."), [{key}] = rows;
  const shown = key && copyable(key, "code", {id: "made-key"});
  if (name) return open(`Key of ${name}`, once, warned, shown, connect(key));
  const list = table("made", "Names and keys", [["key_alias", "Name", TEXT], ["key", "Key", WIDE],
    ["error", "Error", WIDE]], (row) => row.key_alias);
  list.update(rows);
  return open(`${rows.filter((row) => row.key).length} keys made`, once, warned, list.node);
}

// A field's control, after what the API says that its value must be.
function control(name, must, value) {
  if (must === "true or false") return h("input", {type: "checkbox", name, checked: value});
  const choices = must.startsWith("'") && [...must.matchAll(/'(\w+)'/g)].map((match) => match[1]);
  if (choices) {
    return h("select", {name}, choices.map((one) => h("option", {selected: one === value}, one)));
  }
  const isList = Array.isArray(value) && value.every((each) => typeof each === "string");
  const placeholder = must.replaceAll("'", '"');
  const text = isList ? value.join("\n") : value === null || `${value}` === "" ? ""
    : typeof value !== "object" ? value : Object.keys(value).length ? JSON.stringify(value) : "";
  return /list|paths|object|[{[]/.test(must) ? h("textarea", {name, rows: 2, placeholder, value:
    text}) : h("input", {name, placeholder, value: text, autocomplete: "off",
    list: {team_id: "teams", user_id: "users"}[name]});
}
const linesOf = (text, by) => text.split(by).map((each) => each.trim()).filter(Boolean);
const textOf = (node) => node.type === "checkbox" ? node.checked : node.value.trim();
function valueOf(must, text) {
  if (text === "") return null;
  if (must === "a string" || text === !!text) return text;
  if (/^a list of strings|^paths/.test(must)) return linesOf(text, /[\n,]/);
  try { return JSON.parse(text); } catch { return text; }  // and the API says what is wrong with it
}

function edit(kind, row, many) {
  const {id, make, named} = THINGS[kind], usual = [], rare = [], controls = [];
  const itsId = {[id]: {help: "left out, one is made", must_be: "a string"}};
  const fields = {...!row && kind !== "key" && itsId, ...session.fields[kind]};
  for (const name of new Set([...USUAL, ...Object.keys(fields)])) if (fields[name]) {
    const {help, must_be: must} = fields[name];
    if ((row && !(name in row || name === "duration")) || (many && name === "key_alias")) continue;
    const node = control(name, must, row?.[name] ?? null);
    controls.push({name, node, must, was: textOf(node)});
    const label = h("label", null, words(name), " ", node, h("small", null, help));
    (USUAL.includes(name) ? usual : rare).push(label);
  }
  const names = many && h("textarea", {name: "names", rows: 6, required: true});
  const deed = (name, more) => button(name, words(name), () => act(kind, row, name, more?.()));
  const grace = h("input", {name: "grace_period", size: 16, placeholder: "grace, like 1d",
    "aria-label": "Grace period, for which the old key works too"});
  const submit = async (event) => {
    event.preventDefault(); $("form-error").textContent = "";
    const body = row ? address(kind, row) : {}, post = (more) =>
      api(`/${kind}/${row ? "update" : make}`, {...body, ...more}), answers = [];
    for (const {name, node, must, was} of controls) {
      if (textOf(node) !== was) body[name] = valueOf(must, textOf(node));
    }
    const aliases = new Set(many ? linesOf(names.value, "\n") : []);
    for (const key_alias of aliases) answers.push(await post({key_alias}).catch((error) =>
      ({key_alias, error: error.message})));
    if (!many) answers.push(await post());
    if (many || (!row && answers[0].key)) made(!many && named(answers[0]), answers);
    else $("dialog").close();
    if (!many) say([`Saved ${named(answers[0])}.`, ...answers[0].warnings ?? []].join(" "));
    await refresh();
  };
  const lists = ["team", "user"].map((each) => h("datalist", {id: THINGS[each].list},
    data[THINGS[each].list].map((one) => h("option", {value: one[THINGS[each].id]}))));
  const told = row && Object.entries({"": row.status, made: row.created_at, by: row.created_by,
    changed: row.updated_at, "by ": row.updated_by, until: row.expires}).filter((each) => each[1]);
  open(row ? `${words(kind)} ${named(row)}` : many ? "Many keys" : `New ${kind}`,
    row && [h("small", null, told.flat().join(" ")), h("ul", {class: "list"}, own(kind, row).map(
      (each) => meter(each, "", kind)))],
    h("form", {id: "form", onsubmit: (event) => orSay(submit(event))}, lists,
      many && h("label", null, "Names, one a line", names), h("div", {class: "fields"}, usual),
      h("details", {id: "more"}, h("summary", null, "More"), h("div", {class: "fields"}, rare)),
      h("p", {id: "form-error", class: "error", role: "alert"}), h("div", {class: "bar"},
        h("button", {class: "main", "data-do": "save"}, row ? "Save" : "Make"),
        row && [deed(row.blocked ? "unblock" : "block"), deed("reset_spend"), deed("delete")],
        row && kind === "key" && [deed("regenerate", () =>
          grace.value.trim() && {grace_period: grace.value.trim()}), grace])));
}

function things(kind) {
  const {id, list, named} = THINGS[kind];
  const deed = (row, name, text, does) => !session.can_change ? text : button(name, text, () =>
    does(data[list].find((each) => each[id] === row[id])), {class: name === "change" && "link"});
  const make = (id, text, ...how) => button("make", text, () => edit(kind, ...how), {id});
  return table(list, words(list), [
    ["name", "Name", {show: (name, row) => deed(row, "change", name, (now) => edit(kind, now))},
      named],
    ["status", "Status", WORD], ...kind === "key" ? [["team_id", "Team", TEXT], ["user_id", "User",
      TEXT]] : [[id, "Id", TEXT], ["keys_count", "Keys", NUMBER]],
    ["budget", "Budget", {is: "number", show: (_, row) => h("ul", {class: "list"},
      own(kind, row).map((each) => meter(each, "", `${kind}:${row[id]}`)))}, 
    (row) => own(kind, row).map(fullness)[0]],
    ["spend", "Spent", {...USD, unit: 0}],
    ...kind === "key" ? [["last_active", "Last used", AGE]] : [],
    ["deeds", "", {show: (name, row) => session.can_change && deed(row, name, words(name), (now) =>
      act(kind, now, name))}, (row) => row.blocked ? "unblock" : "block"]], (row) => row[id], [],
  session.can_change && [make(`new-${kind}`, `New ${kind}`), kind === "key" && make("many-keys",
    "Many keys", null, true)]);
}

async function refresh() {
  const asked = session, isOperator = session.role === "operator", parts = isOperator ? {
    keys: everyPage("/key/list?return_full_object=true&usage=false&", "keys"),
    users: everyPage("/user/list?", "users", "page_size"), teams: api("/team/list"),
    upstreams: api("/upstreams"), health: api("/health/readiness"),
    audit: api("/audit?page_size=100")} : {info: api("/key/info")};
  if (isOperator) data.reload();
  for (const [name, part] of Object.entries(parts)) {
    const told = await orSay(part);
    if (asked !== session) return;  // it is another's by now
    data[name] = told ?? data[name];
  }
  data.draws.forEach((draw) => draw());
  if (!isOperator) data.reload();
}

const column = (...nodes) => h("div", {class: "column"}, nodes);
const card = (title, ...nodes) => h("div", {class: "card"}, h("h2", null, title), nodes);
const meters = (of) => h("ul", {class: "list scroll", "data-list": of, tabindex: 0,
  "aria-label": of});
const tell = (place, facts) => place.replaceChildren(...Object.entries(facts).flatMap(
  ([name, value]) => [h("dt", null, words(name)), h("dd", {"data-field": name}, value ===
    Object(value) ? JSON.stringify(value) : String(value ?? "–"))]));

function operatorViews() {
  const spend = usage((first, last, groups, top) => api(`/global/spend/report?start_date=${first}`
    + `&end_date=${last}&group_by=${groups}${top ? `&top=${top}` : ""}`), [["api_key", "Key"],
    ["model", "Model"], ["team", "Team"], ["user", "User"], ["tag", "Tag"]], "Who spent what");
  const [chosen, spent, daily] = spend.nodes, live = requests(), edge = meters("edge");
  const state = h("dl", {id: "state"});
  const lists = ["key", "team", "user"].map(things), idle = table("idle", `Idle ${IDLE_DAYS} days`,
    [["name", "Key", TEXT, THINGS.key.named], ["last_active", "Last used", AGE]],
    (row) => row.token);
  const texts = (columns) => columns.map((name) => [name, words(name), TEXT]);
  const upstreams = table("upstreams", "Real keys", [["name", "Name", TEXT],
    ["state", "State", WORD], ["until", "Until", {show: (text) => text && age(text)}],
    ...texts(["why", "requests", "errors", "organization_id", "workspace_id"])], (row) => row.name);
  const audit = table("audit", "Changes", [["updated_at", "When", AGE], ...texts(["action",
    "table_name", "name", "changed_by", "changed_by_api_key", "remote_ip"]), ["updated_values",
    "Values", WIDE, (row) => JSON.stringify(row.updated_values)]], (row) => row.id);
  data.reload = spend.show;
  data.draws.push(() => {
    const all = new Map(), {status = "unknown", upstream, ...more} = data.health ?? {};
    for (const kind of ["key", "team", "user"]) for (const row of data[THINGS[kind].list]) {
      for (const each of row.budgets ?? []) if (each.of === kind || each.of === "gateway") {
        const [id, name] = each.of === kind ? [row[THINGS[kind].id], THINGS[kind].named(row)]
          : ["", "The gateway"];
        const key = `${each.of}:${id}`;
        all.set([key, each.for, each.budget_duration].join(), [each, name, key]);
      }
    }
    const part = ([budget]) => fullness(budget) * 100, sorted = [...all.values()].sort((a, b) =>
      part(b) - part(a)), near = sorted.filter((each) => part(each) >= NEAR);
    const shown = near.length ? near.slice(0, ROWS) : sorted.slice(0, 5);
    put(edge, shown.map((each) => meter(...each)));
    idle.update(data.keys.filter((row) => row.status === "active"
      && (row.last_active ?? "") < new Date(Date.now() - IDLE_DAYS * DAY).toISOString()));
    lists.forEach((list, i) => list.update(data[["keys", "teams", "users"][i]]));
    upstreams.update(data.upstreams?.upstreams ?? []); audit.update(data.audit?.audit_logs ?? []);
    const bad = (data.upstreams?.upstreams ?? []).filter((each) => each.state !== "ok");
    const others = bad.map((each) => `· ${each.name} ${each.state}`);
    $("health").textContent = ["●", status, ...others].join(" ");
    $("health").className = status !== "healthy" ? "bad" : bad.length ? "warn" : "good";
    $("health").dataset.status = status; tell(state, {status, ...more, ...upstream});
  });
  return {overview: [spend.tiles, h("div", {class: "grid"}, column(chosen, spent,
    live.refused.node, daily), column(card("Near the edge", edge), idle.node))],
  requests: [live.under.node, live.recent.node], keys: lists[0].node, teams: lists[1].node,
  users: lists[2].node, gateway: [upstreams.node, card("Store and upstream", state), audit.node]};
}

function holderView() {
  const days = () => Object.entries(data.info?.info.usage ?? {}).flatMap(([day, models]) =>
    Object.entries(models).map(([model, row]) => ({...row, day, model})));
  const spend = usage(async (first, last) => days().filter(({day}) => day >= first && day <= last),
    [["model", "Model"]], "By model");
  const live = requests(), left = meters("left"), limits = h("dl", {id: "limits"});
  const whose = {key: "This key", team: "Its team", user: "Its user", gateway: "The gateway"};
  const unsaid = ["null", "false", '""', "[]", "{}", undefined];
  data.reload = spend.show;
  data.draws.push(() => {
    const info = data.info?.info ?? {}, budgets = info.budgets ?? [];
    put(left, budgets.map((each) => meter(each, whose[each.of], `${each.of}:`)));
    if (!budgets.length) left.append(h("li", null, "No budget limits this key."));
    const names = ["status", "expires", ...Object.keys(session.fields.key)].filter((name) =>
      !name.includes("budget") && !unsaid.includes(JSON.stringify(info[name])));
    tell(limits, {models: "all", ...Object.fromEntries(names.map((name) => [name, info[name]]))});
  });
  const asks = session.contact && h("p", null, `Ask ${session.contact} for more.`);
  return {mine: [card("Left", left, asks), spend.tiles, h("div", {class: "grid"},
    column(spend.nodes), column(card("Limits", limits), card("Connect", connect("<your key>")))),
  live.under.node, live.recent.node]};
}

function route() {
  const views = [...$("views").children], chosen = views.find((view) =>
    `#${view.dataset.view}` === location.hash) ?? views[0];
  views.forEach((view) => { view.hidden = view !== chosen; });
  [...$("tabs").children].forEach((link, i) => views[i] === chosen
    ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current"));
}

function leave(text) {
  session = null;
  for (const name in data) delete data[name];
  Object.assign(data, nothing());
  [$("dialog"), $("ask")].forEach((dialog) => dialog.close());
  [$("views"), $("tabs"), $("health")].forEach((node) => node.replaceChildren());
  $("app").hidden = !($("login").hidden = false); $("login-error").textContent = text;
  $("key").focus();
}

async function enter() {
  session = await api("/ui/session").catch(() => null);
  if (!session) return leave("");
  $("login").hidden = !($("app").hidden = false); $("logout").hidden = session.open;
  $("health").hidden = session.role !== "operator"; $("who").textContent = session.name;
  $("utc").textContent = `Days and times are UTC. Gateway ${session.version}.`
    + (session.prices ? "" : " No prices are known here, so that all is $0.");
  const views = Object.entries(session.role === "operator" ? operatorViews() : holderView());
  $("tabs").replaceChildren(...views.map(([name]) => h("a", {href: `#${name}`}, words(name))));
  $("tabs").hidden = views.length < 2;
  $("views").replaceChildren(...views.map(([name, ...nodes]) => h("section", {"data-view": name,
    "aria-label": words(name)}, nodes)));
  route(); await refresh();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  api("/ui/login", {key}).then(() => { $("key").value = ""; return enter(); }).catch((error) => {
    $("login-error").textContent = error.message;
  });
});
$("logout").addEventListener("click", () => orSay(api("/ui/logout", {}).then(() => leave(""))));
$("ask").addEventListener("click", ({target}) => target.value && $("ask").close(target.value));
$("dialog").addEventListener("close", () => $("dialog").replaceChildren());  // and keys with it
addEventListener("hashchange", route);
setInterval(() => session && !document.hidden && refresh(), 60000);
enter().then(poll);
</script>
"""
PAGE_POLICY = "default-src 'none'; connect-src 'self'; img-src data:; form-action 'self'; "
PAGE_POLICY += "frame-ancestors 'none'; base-uri 'none'"
for tag in ("script", "style"):
    digest = hashlib.sha256(PAGE.split(f"<{tag}>")[1].split(f"</{tag}>")[0].encode()).digest()
    PAGE_POLICY += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
PAGE_HEADERS |= {"Cache-Control": "no-cache", "X-Frame-Options": "DENY"}


# ─── Stand-in ─────────────────────────────────────────────────────────────────────────────────────

MOCK_MODELS = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5")
# Names as Anthropic's; what in a user's message is Claude Code's own, or nothing.
MOCK_KNOWN = re.compile(r"claude-(opus|sonnet|haiku|fable|mythos|3|instant)-.")
MOCK_FRAME = re.compile(r"\s*(<(system-reminder|command-|local-command-)|$)")
MOCK_TOKEN_INTERVAL = 0.02  # seconds between two deltas, about what a model does
MOCK_MAX_TOKENS = 200  # what an echo is cut down to
MOCK_KINDS = {402: "billing_error", 409: "conflict_error", 529: "overloaded_error"} | ERROR_TYPES
MOCK_COUNTS = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
JSONObject = dict[str, Any]
MOCK_MODEL: JSONObject = {"type": "model", "created_at": "2026-01-01T00:00:00Z"}
MOCK_SKILL = MOCK_MODEL | {"type": "skill", "source": "anthropic", "latest_version_id": "1"}
MOCK_SKILL["updated_at"] = MOCK_SKILL["created_at"]


class MockAnthropic(web.RequestHandler):
    """A stand-in for Anthropic's API, for trying the gateway without a key or a network: an echo.
    The model ``mock-error-429`` (or of any other status) is answered with that error."""

    # What there is, by its kind and id, oldest first; by id the bytes of what has such.
    things: ClassVar[dict[str, dict[str, JSONObject]]] = {"batches": {}, "files": {}}
    things |= {"models": {n: MOCK_MODEL | {"id": n, "display_name": n} for n in MOCK_MODELS[::-1]}}
    things |= {"skills": {"xlsx": MOCK_SKILL | {"id": "xlsx", "display_name": "Excel"}}}
    contents: ClassVar[dict[str, bytes]] = {}
    cached: ClassVar[collections.deque[str]] = collections.deque(maxlen=1000)  # prompts' beginnings

    async def prepare(self) -> None:
        request_id = mock_id("req")
        self.set_header("request-id", request_id)
        self.set_header("Content-Type", "application/json")
        try:
            answer = self.answer()
        except (APIError, KeyError) as raised:
            error = raised if isinstance(raised, APIError) else APIError(404, f"{raised} not found")
            self.set_status(error.status)
            if error.status == 429:
                self.set_header("retry-after", "1")
            answer = error.body(request_id)
        if isinstance(answer, Iterator):
            self.set_header("Content-Type", "text/event-stream; charset=utf-8")
            with contextlib.suppress(StreamClosedError):
                for event in answer:
                    if event["type"] == "content_block_delta":
                        await asyncio.sleep(MOCK_TOKEN_INTERVAL)
                    self.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n")
                    await self.flush()
            answer = b""
        self.finish(answer)

    def answer(self) -> JSONObject | bytes | Iterator[JSONObject]:
        """What the API says, or the events of a stream. Raises APIError, and KeyError for 404."""
        if self.request.headers.get_list("x-api-key") != [self.settings["credential"]]:
            raise APIError(401, "invalid x-api-key")
        sent: Any = read_json(self.request.body)
        path = urllib.parse.unquote(self.request.path).replace("/messages/batches", "/batches")
        match self.request.method, *path.split("/")[1:]:
            case "POST", "v1", "batches", name, "cancel":
                batch = self.things["batches"][name]
                batch["cancel_initiated_at"] = iso(now())
                return batch | {"processing_status": "canceling"}
            case "POST", "v1", "files" | "skills" as kind:
                files = self.request.files.get({"files": "file", "skills": "files[]"}[kind])
                if not files:
                    raise APIError(400, f"{kind}: Field required")
                name, moment, file = mock_id(kind[:-1]), iso(now()), files[0]
                about = JSONObject(type="file", filename=file.filename, downloadable=True)
                about |= {"mime_type": file.content_type, "size_bytes": len(file.body)}
                if kind == "skills":
                    title = self.get_argument("display_name", file.filename)
                    about = MOCK_SKILL | {"source": "custom", "display_name": title}
                self.things[kind][name] = about | {"id": name, "created_at": moment}
                self.contents[name] = file.body
                return self.things[kind][name]
            case ("POST", "v1", "messages" | "batches", *_) if not isinstance(sent, dict):
                raise APIError(400, "The body is not a JSON object")
            case "POST", "v1", "messages":
                message = self._reply(sent)
                return mock_events(message) if sent.get("stream") is True else message
            case "POST", "v1", "messages", "count_tokens":
                mock_check(str(sent.get("model")))
                return {"input_tokens": mock_tokens(sent.get("messages"))}
            case "POST", "v1", "batches":
                return self._make_batch(sent)
            case "GET", "v1", "models" | "batches" | "files" | "skills" as kind:
                names, wanted = [*self.things[kind]][::-1], self.get_arguments("ids[]")
                names = [name for name in names if name in wanted] if wanted else names
                after = self.get_argument("page", "") or self.get_argument("after_id", "")
                if after := after.removeprefix("page_"):
                    if after not in names:
                        raise APIError(400, f"{after} is no cursor of this list")
                    names = names[names.index(after) + 1 :]
                page = names[: int(self.get_argument("limit", "100" if wanted else "20"))]
                first, last = (page[0], page[-1]) if page else (None, None)
                told = {"has_more": page != names, "first_id": first, "last_id": last}
                if kind in ("files", "skills"):
                    told["next_page"] = f"page_{last}" if page != names else None
                return told | {"data": [self.things[kind][name] for name in page]}
            case "GET", "v1", "models" | "batches" | "files" | "skills" as kind, name:
                return self.things[kind][name]
            case "GET", "v1", "batches" | "files" as kind, name, "results" | "content":
                form = self.things[kind][name].get("mime_type", "application/x-jsonl")
                self.set_header("Content-Type", form)
                return self.contents[name]
            case "DELETE", "v1", "batches" | "files" | "skills" as kind, name:
                del self.contents[name]  # which a built-in skill has none of
                return {"id": name, "type": f"{self.things[kind].pop(name)['type']}_deleted"}
            case _, "v1", "messages" | "models" | "batches" | "files" | "skills", *_:
                raise APIError(405, "Method not allowed")
        raise APIError(404, "Not found")

    def _reply(self, params: JSONObject) -> JSONObject:
        for name, kind in (("model", str), ("max_tokens", int), ("messages", list)):
            if not isinstance(params.get(name), kind) or not params[name] > kind():
                raise APIError(400, f"{name}: Field required")
        model, messages, limit = params["model"], params["messages"], params["max_tokens"]
        text = json.dumps(params)
        for name in re.findall('"file_id": "([^"]*)"', text):
            _ = self.things["files"][name]
        mock_check(model)
        said = next(filter(None, map(mock_said, messages[::-1])), "")
        words = f"You said: {said}".split(" ")[: min(limit, MOCK_MAX_TOKENS)]
        usage = JSONObject(input_tokens=mock_tokens(messages), output_tokens=len(words))
        cache = {"creation": 0, "read": 0}
        if "cache_control" in text:  # it is written the first time, then read
            prefix = json.dumps([params.get("system"), params.get("tools")])
            cache["read" if prefix in self.cached else "creation"] = mock_tokens(prefix)
            self.cached.append(prefix)
        usage |= {f"cache_{done}_input_tokens": size for done, size in cache.items()}
        lives = {"ephemeral_5m_input_tokens": cache["creation"], "ephemeral_1h_input_tokens": 0}
        usage |= {"cache_creation": lives, "service_tier": "standard"}
        message = {"id": mock_id("msg"), "type": "message", "role": "assistant", "model": model}
        message["stop_reason"] = "max_tokens" if len(words) == limit else "end_turn"
        content = [{"type": "text", "text": " ".join(words)}]
        return message | {"content": content, "stop_sequence": None, "usage": usage}

    def _make_batch(self, sent: JSONObject) -> JSONObject:
        """It is worked off at once, and has ended when it is next looked at."""
        requests, lines, counts = sent.get("requests"), "", MOCK_COUNTS.copy()
        if not isinstance(requests, list) or not requests:
            raise APIError(400, "requests: Field required")
        for each in requests:
            try:
                result = JSONObject(type="succeeded", message=self._reply(each["params"]))
            except APIError as error:
                result = {"type": "errored", "error": json.loads(error.body(""))}
            counts[result["type"]] += 1
            lines += json.dumps({"custom_id": each["custom_id"], "result": result}) + "\n"
        name, moment = mock_id("msgbatch"), now()
        self.contents[name], running = lines.encode(), MOCK_COUNTS | {"processing": len(requests)}
        batch: JSONObject = {"id": name, "type": "message_batch", "created_at": iso(moment)}
        batch |= dict.fromkeys(("ended_at", "results_url", "cancel_initiated_at", "archived_at"))
        batch |= {"expires_at": iso(moment + timedelta(days=1)), "request_counts": running}
        url = f"{ANTHROPIC_API}/v1/messages/batches/{name}/results"  # absolute, as Anthropic's
        done = {"processing_status": BATCH_ENDED, "request_counts": counts}
        self.things["batches"][name] = batch | done | {"ended_at": iso(moment), "results_url": url}
        return batch | {"processing_status": "in_progress"}


def mock_id(prefix: str) -> str:
    """An id that looks like Anthropic's."""
    return f"{prefix}_01{secrets.token_hex(11)}"


def mock_check(model: str) -> None:
    """Raise the APIError that a model's name asks for, or 404."""
    if error := re.fullmatch("mock-error-([45][0-9]{2})", model):
        told = MOCK_KINDS.get(int(error[1]), "api_error")
        raise APIError(int(error[1]), "An error, as you asked.", kind=told)
    if not MOCK_KNOWN.match(model):
        raise APIError(404, f"model: {model}")


def mock_said(message: object) -> str:
    """What a user says in a message."""
    content = dict_of(message).get("content")
    blocks = content if isinstance(content, list) else [{"text": content}]
    texts = [str(dict_of(block).get("text") or "") for block in blocks]
    is_his = dict_of(message).get("role") == "user"
    return " ".join(text for text in texts if is_his and not MOCK_FRAME.match(text))


def mock_tokens(value: object) -> int:
    """How many tokens the stand-in counts: one for four characters of JSON."""
    return max(1, len(json.dumps(value)) // 4)


def mock_events(message: JSONObject) -> Iterator[JSONObject]:
    """A message as the events of a stream."""
    used, at, text = message["usage"], {"index": 0}, message["content"][0]["text"]
    begun = {"content": [], "stop_reason": None, "usage": used | {"output_tokens": 1}}
    yield {"type": "message_start", "message": message | begun}
    yield {"type": "content_block_start", "content_block": {"type": "text", "text": ""}} | at
    yield {"type": "ping"}
    for piece in re.findall(r"^[^ ]*| [^ ]*", text):
        yield {"type": "content_block_delta", "delta": {"type": "text_delta", "text": piece}} | at
    yield {"type": "content_block_stop"} | at
    ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": ended, "usage": used}
    yield {"type": "message_stop"}


# ─── Main ─────────────────────────────────────────────────────────────────────────────────────────

DRAIN_PROGRESS = 5.0  # seconds between two lines about what a stop waits for
LOOPBACK = ("127.0.0.1", "::1")
MOCK_CREDENTIAL = "sk-ant-mock-"
CHECK_TIMEOUT = 30.0  # seconds
STEADY = 60.0  # seconds after which a process that ends is started again at once,
LONGEST_WAIT = 30  # else in 0, 1, 2, 4 … and at most so many
OPTIONAL_PACKAGES = {"uvloop": "the gateway is slower", "prometheus-client": "there is no /metrics"}
OPTIONAL_PACKAGES |= dict.fromkeys(STORE_PACKAGES, "keys cannot be in a --store")
OPTIONAL_PACKAGES["genai-prices"] = "money is not counted, budgets cannot be set"


def make_app(settings: Settings, rules: Sequence[Rule] = RULES) -> GatewayApplication:
    """The application with its "gateway", for a loop that runs already. Raises SettingsError."""
    routes: list[Any] = [
        *((re.escape(path), HelloHandler) for path in HELLO_PATHS),
        *((re.escape(path), UsageHandler) for path in USAGE_PATHS),
        (rf"{RELAYED}.*|{BARE_PREFIX}.*", RelayHandler),
        (r"/health/(liveliness|liveness|readiness)", HealthHandler),
        (METRICS_PATH, MetricsHandler),
        (r"/(key)/(generate|update|delete|block|unblock|regenerate)", RecordHandler),
        (r"/(key)/([^/]+)/(regenerate|reset_spend)", RecordHandler),
        (r"/(team|user)/(new|update|delete|block|unblock)", RecordHandler),
        (r"/(team|user)/([^/]+)/(reset_spend)", RecordHandler),
        (r"/(resources)/(assign)", RecordHandler),
        (r"/ui", PageHandler),
        (r"/ui/(session|login|logout)", SessionHandler),
        *((re.escape(path), ReportHandler) for path in ReportHandler.reports),
    ]
    told: dict[str, Any] = {"gateway": Gateway(settings, rules), "log_function": log_request}
    return GatewayApplication(routes, default_handler_class=HelloHandler, **told)


def bind(settings: Settings, *, loopback: bool) -> list[socket.socket]:
    """Listening sockets, on ``loopback`` where no option says otherwise. Raises SettingsError."""
    where = settings.unix_socket or f"{settings.address or 'port'} {settings.port}"
    bind_port = functools.partial(netutil.bind_sockets, reuse_port=settings.reuse_port)
    with blaming(
        f"cannot listen on {where}", "; stop what listens there, or choose another --port"
    ):
        if settings.unix_socket:  # for the owner's group too, such as the proxy's
            return [netutil.bind_unix_socket(settings.unix_socket, 0o660)]
        if settings.address or not loopback:
            return bind_port(settings.port, settings.address or None)
        sockets = bind_port(settings.port, LOOPBACK[0])
        with contextlib.suppress(OSError):  # a machine without IPv6
            sockets += bind_port(sockets[0].getsockname()[1], LOOPBACK[1])
        return sockets


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """What serves TLS, where ``--certfile`` is given. Raises SettingsError."""
    if not settings.certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    with blaming("--certfile, --keyfile", "; give PEM files that the gateway's user can read"):
        context.load_cert_chain(settings.certfile, settings.keyfile or None, "")
    return context


def base_url(settings: Settings, port: int) -> str:
    """Where a client on this machine finds the gateway."""
    if settings.unix_socket:
        return "https://<the proxy in front>"
    scheme = "https" if settings.certfile else "http"
    host = LOOPBACK[0] if settings.address in ("", "0.0.0.0", "::") else settings.address
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def lacks(settings: Settings) -> Iterator[str]:
    """What the gateway can run without, but not well."""
    if not (settings.api_key or settings.auth_token or settings.api_keys or settings.api_keys_file):
        yield "no ANTHROPIC_API_KEY is set: only callers with an sk-ant-… of their own get through"
    if not settings.master_key:
        yield f"no GATEWAY_MASTER_KEY is set: /key/* is closed; {GOOD_MASTER_KEY}"
    for name in ("master_key", "master_key_next"):
        if 0 < len(getattr(settings, name)) < MIN_MASTER_KEY_LENGTH:
            yield f"the {name.replace('_', ' ')} is weak; {GOOD_MASTER_KEY}"


def say(text: str, *, as_json: bool, level: int = logging.INFO, to: Any = None) -> None:
    """Print lines, by default to stdout; as JSON as the log's are, if so told."""
    for line in text.splitlines():
        record = log.makeRecord(log.name, level, "", 0, line, (), None)
        print(LineFormatter(None).format(record) if as_json else line, file=to, flush=True)


def announce(gateway: Gateway, port: int) -> None:
    """Print where it listens and relays to, what it lets in, and what a user pastes to connect."""
    settings, is_open = gateway.settings, gateway.doors.is_open
    url, keys = base_url(settings, port), gateway.ledger.count
    everywhere = "" if settings.address or is_open else " and every other address"
    is_mock = settings.api_key.startswith(MOCK_CREDENTIAL)
    where = settings.shown_store or settings.keys
    made = "" if keys else "; POST /key/generate makes one"
    required = f"virtual keys are required ({keys} in {where}{made})"
    lines = [f"gateway {__version__} listening on {settings.unix_socket or url + everywhere}"]
    lines.append(f"relaying to {'the built-in stand-in' if is_mock else settings.upstream}")
    if PLACE.of > 1:
        lines.append(f"in {PLACE.of} processes")
    if gateway.real_keys.several:
        lines.append(f"with the real keys {', '.join(gateway.real_keys.names)}")
    lines.append(f"! open to all who reach it (keys: {where})" if is_open else required)
    lines += [f"! {lack}" for lack in lacks(settings)]
    if not gateway.prices.available:
        lines.append("! genai-prices is not installed: tokens are counted, money is not")
    key = "anything" if is_open else "<a virtual key>"
    say("\n".join([*lines, CONNECT.format(base=url, key=key)]), as_json=settings.log_json)


def start_mock(settings: Settings) -> Settings:
    """Settings that lead to the stand-in, started on a free loopback port, if they ask for it."""
    if settings.upstream != MOCK_UPSTREAM:
        return settings
    key, sockets = MOCK_CREDENTIAL + mock_id("key"), netutil.bind_sockets(0, LOOPBACK[0])
    app = web.Application([(".*", MockAnthropic)], credential=key, log_function=lambda _: None)
    HTTPServer(app, max_body_size=MAX_BODY_SIZE, max_buffer_size=MAX_BODY_SIZE).add_sockets(sockets)
    url = f"http://{LOOPBACK[0]}:{sockets[0].getsockname()[1]}"
    return dataclasses.replace(settings, upstream=url, api_key=key, api_keys="", api_keys_file="")


def report_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what the event loop reports."""
    error = context.get("exception")
    if isinstance(error, RuntimeError) and "the handler is closed" in str(error):
        # A read over TLS that broke its connection off goes on (uvloop/handles/handle.pyx).
        log.debug("after the end of a connection", exc_info=error)
    else:
        loop.default_exception_handler(context)


def take_secrets(gateway: Gateway) -> None:
    """Read the secrets again, where they come from files. Raises SettingsError, changes nothing."""
    secrets, settings = read_secrets(os.environ), gateway.settings
    secrets.pop("store", None)  # which stays the one it is
    if settings.api_key.startswith(MOCK_CREDENTIAL):  # which the stand-in alone knows
        secrets = {name: secret for name, secret in secrets.items() if name.startswith("master")}
    settings = dataclasses.replace(settings, **secrets)
    gateway.real_keys.reload(settings)
    gateway.doors.take_secrets(settings)
    gateway.settings = settings
    mask_secrets(settings)


async def meet_parent(take: Callable[[int], Any], sockets: Iterable[socket.socket]) -> None:
    """Give the `Parent` what it does not have, and take signals from it; if it goes, stop too."""
    control, loop = socket.socket(fileno=PLACE.control), asyncio.get_running_loop()
    control.setblocking(False)
    for each in () if PLACE.sockets else sockets:  # the first process had the port alone
        with contextlib.suppress(OSError):  # a Unix socket has none
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with contextlib.suppress(OSError):  # it may end before it reads this
        if not PLACE.sockets:
            socket.send_fds(control, [b"!"], [each.fileno() for each in sockets])
            os.kill(os.getppid(), signal.SIGUSR1)
        while told := await loop.sock_recv(control, 1):
            take(told[0])
    take(signal.SIGTERM)


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT; then refuse requests, let those under way end until all are
    `drained`, and break the rest. Raises SettingsError where it cannot start."""
    for name, file in (("keys", settings.keys), ("request-log", Path(settings.request_log))):
        if not file.absolute().parent.is_dir():
            raise SettingsError(f"--{name}={file}: its folder does not exist")
    if name := settings.request_log:
        keys, logged = os.path.realpath(settings.keys), os.path.realpath(name)
        if logged in (keys, f"{keys}.resources"):
            raise SettingsError(f"--request-log={name}: holds the keys; name another file")
    application = make_app(start_mock(settings))
    gateway: Gateway = application.settings["gateway"]
    await gateway.ledger.open()
    gateway.doors = Doors(gateway.settings, gateway.ledger)  # which may be open now
    settings, server, drained = gateway.settings, Server(gateway, application), gateway.drained
    sockets = [socket.socket(fileno=each) for each in PLACE.sockets]
    sockets = sockets or bind(settings, loopback=gateway.doors.is_open)
    port = 0 if settings.unix_socket else sockets[0].getsockname()[1]
    server.listen(sockets, server_context(settings))
    signals, loop = asyncio.Queue[int](), asyncio.get_running_loop()
    loop.set_exception_handler(report_loop_error)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, signals.put_nowait, number)
    booking = asyncio.create_task(gateway.batches.run())
    saving = [asyncio.create_task(each.run()) for each in (gateway.ledger, gateway.recent)]
    if PLACE.folder:
        path = Path(PLACE.folder, str(PLACE.number))
        telling = await asyncio.start_unix_server(functools.partial(tell_metrics, gateway), path)
        saving.append(asyncio.create_task(meet_parent(signals.put_nowait, sockets)))
    if not PLACE.sockets:
        announce(gateway, port)
    await loop.run_in_executor(None, gateway.prices.load)
    favour_the_loop()
    while await signals.get() == signal.SIGHUP:  # read all again; what is wrong changes nothing
        try:
            context = server_context(settings)
            await gateway.ledger.reload()
            gateway.prices.reload()
            take_secrets(gateway)
            server.context = context  # of connections from now on
            favour_the_loop()
            told = gateway.ledger.count, ", ".join(gateway.real_keys.names)
            log.info("keys read again: %d; real keys: %s", *told)
        except Exception as error:  # noqa: BLE001 - whatever it is, it does not stop the gateway
            log.error("not read again: %s", error)

    async def hurry() -> None:  # at a second one
        while await signals.get() == signal.SIGHUP:
            pass
        drained.set()

    booking.cancel()
    hurrying = asyncio.create_task(hurry())
    if settings.reuse_port or PLACE.folder:
        gateway.phase = FOLLOWS[gateway.phase][GatewayPhase.LEAVING]
        await server.leave_port()
    gateway.phase = FOLLOWS[gateway.phase][GatewayPhase.DRAINING]
    server.stop()
    deadline = gateway.time() + settings.drain_timeout
    while gateway.active and not drained.is_set() and (left := deadline - gateway.time()) > 0:
        log.info("stopping: %d requests under way, %.0f s left", len(gateway.active), left)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drained.wait(), min(left, DRAIN_PROGRESS))
    gateway.phase = FOLLOWS[gateway.phase][GatewayPhase.STOPPED]
    server.close()
    await asyncio.sleep(0)  # the connections' ends reach their handlers
    for handler in list(gateway.active):  # which wait for the names of batches
        handler.settle("client_gone")
    await gateway.close()
    log.info("stopped")
    for task in (*saving, hurrying):
        task.cancel()
    if PLACE.folder:
        telling.close()  # which uvloop closes itself once nobody has it
    elif settings.unix_socket:
        Path(settings.unix_socket).unlink(missing_ok=True)


async def copy_store(settings: Settings) -> None:
    """Do what ``--import`` or ``--export`` asks, and print of what. Raises SettingsError."""
    path, told = settings.import_, {"usage_days": settings.usage_days}
    tell = functools.partial(say, as_json=settings.log_json)
    store = make_ledger(settings, "", deadline=None, **told)  # a fifth faster, and nobody waits
    try:
        if not path:
            await store.look()
            if not store.count:  # to open it would make one
                raise SettingsError(f"--export: {settings.shown_store} holds no keys")
            await store.open()
            sums = await store.give_out(Path(settings.export), tell)
        elif os.path.isfile(path):
            source = FileLedger(Path(path), RealKeys(settings).first.name, **told)
            sums = await store.take_in(source, tell)
        else:
            raise SettingsError(f"--import={path}: there is no such file")
    finally:
        await store.close()
    amounts = {n: f"${dollars(usd(c))}" if "spent" in n else f"{c:,}" for n, c in sums.items()}
    tell(", ".join(f"{amount} {name}" for name, amount in amounts.items()))


def look_at_file(path: Path) -> int:
    """How many records a keys file has that could be used now. Raises SettingsError."""
    rights = "; let the gateway's user read it, and write in its folder, or set --keys"
    with blaming(str(path), rights), tempfile.TemporaryFile(dir=path.parent):  # as changes make
        if not path.exists():
            return 0
        with path.open("rb") as file:
            count = len(parse_store(file.read(), str(path)))
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                advice = "stop that one, or give this one its own with --keys"
                raise SettingsError(f"{path}: another gateway uses it; {advice}") from None
    return count


async def check(settings: Settings) -> bool:
    """Print, a line each, what is well and what is not, and what to do about it (``--check``)."""
    settings, count = start_mock(settings), 0
    keys, upstream, where = RealKeys(settings).keys, settings.upstream, settings.unix_socket
    findings = [(True, f"Python {sys.version.split()[0]}, Tornado {tornado.version}")]

    @contextlib.contextmanager
    def looking(what: str = "", advice: str = "") -> Iterator[None]:
        try:
            yield
        except (SettingsError, UpstreamError, OSError) as error:
            findings.append((False, f"{what}{error}{advice}"))

    for package, loss in OPTIONAL_PACKAGES.items():
        is_there = importlib.util.find_spec(package.replace("-", "_"))
        missing = f"is not installed: {loss} (pip install {package})"
        findings.append((True, f"{package} {'is installed' if is_there else missing}"))
    findings += [(False, lack) for lack in lacks(settings)] or [(True, "both secrets are set")]
    with looking():
        if settings.store:
            store = make_ledger(settings, "")
            told, count = await store.look(), store.count
            await store.find_store(make=False)
            findings.append((not store.doubt, f"{settings.shown_store}: {store.doubt or told}"))
        else:
            count = look_at_file(settings.keys)
            findings.append((True, f"{settings.keys}: {count or 'as yet no'} keys"))
    with looking():
        is_open = not (count or settings.master_key)
        if where and not os.access(Path(where).absolute().parent, os.W_OK):
            raise SettingsError(f"{where}: its folder cannot be written")
        if not where:  # to bind a Unix socket would take it from a gateway that runs
            for each in () if settings.reuse_port else bind(settings, loopback=is_open):
                each.close()
            where = f"port {settings.port} of {settings.address or ('loopback' * is_open or 'all')}"
        findings.append((True, f"{where} is free to listen on"))
    with looking():
        unserved = "not served: right behind a proxy, or on loopback"
        served = f"served with {settings.certfile}" if server_context(settings) else unserved
        findings.append((True, f"TLS is {served}"))
    client = UpstreamClient(force_instance=True, settings=settings)
    with looking(f"{upstream}: ", " See --upstream and the network."), contextlib.closing(client):
        for key in keys.values() or (None,):
            code = (await client.get("/v1/models?limit=1", CHECK_TIMEOUT, key)).code
            name, said = f"real key {key.name}" if key else "real key", "is --upstream right?"
            if code in (401, 403):
                said = f"{name} not accepted, set another"
            said = f" {code} to GET /v1/models: {said}"
            if well := code < 400 or (not key and code == 401):
                said = f" and accepts the {name}" if key else ""
            findings.append((well, f"{upstream} answers{said}"))
    lines = [f"{'ok  ' if well else 'FAIL'} {text}" for well, text in findings]
    lines.append(CONNECT.format(base=base_url(settings, settings.port), key="<a virtual key>"))
    say("\n".join(lines), as_json=settings.log_json)
    return all(well for well, _ in findings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the gateway with these arguments, by default the command line's. Ends the process."""
    settings = Settings()
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
        for handler in logging.root.handlers:
            handler.setFormatter(LineFormatter(None if settings.log_json else handler.formatter))
        mask_secrets(settings)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # as many as the system allows
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        copies = settings.import_ or settings.export
        if settings.processes != 1 and not (PLACE.folder or settings.check or copies):
            sys.exit(Parent(settings).run())
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
        with contextlib.suppress(ImportError):
            import uvloop

            loop_factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            if settings.check:
                sys.exit(0 if runner.run(check(settings)) else 1)
            runner.run(copy_store(settings) if copies else serve(settings))
    except SettingsError as error:
        text, as_json = " ".join(f"gateway: {error}".split()), error.as_json or settings.log_json
        say(text, as_json=as_json, level=logging.CRITICAL, to=sys.stderr)
        sys.exit(2)
    except Exception:  # a mistake in this file: its lines are the log's too
        log.critical("ended", exc_info=True)
        sys.exit(1)


@dataclass
class Child:
    """One of several processes, as their `Parent` sees it."""

    number: int
    sockets: Sequence[int] = ()  # descriptors of copies
    due: float = math.inf  # when it is to be started, as `time.monotonic` tells,
    wait: int = 0  # and so many seconds behind its end
    process: subprocess.Popen[bytes] | None = None
    control: socket.socket = field(default_factory=socket.socket)


class Parent:
    """Starts processes of this file that serve together, and again what ends. Signals are blocked,
    here and by inheritance there, where they come through sockets: terminals and service managers
    send them to all. Listening sockets are kept: whoever connects to a process that died waits for
    its successor. The first process starts alone, so that what is wrong is said once."""

    TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    SIGNALS = (*TOLD, signal.SIGCHLD, signal.SIGUSR1)

    def __init__(self, settings: Settings) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        self.path, self.code, self.stopping = settings.unix_socket, 0, False
        count = settings.processes or len(os.sched_getaffinity(0))
        self.children = [Child(number) for number in range(count)]
        self.children[0].due = 0

    def run(self) -> int:
        """Go on until all have ended behind a signal; their worst exit code."""
        with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
            while not self.stopping or any(child.process for child in self.children):
                for child in self.children:
                    if not (child.process or self.stopping) and child.due <= time.monotonic():
                        self._start(child, folder)
                came = signal.sigtimedwait(self.SIGNALS, 1)  # till something may be due
                if came and came.si_signo in self.TOLD:
                    self._tell(came.si_signo)
                first = self.children[0]
                if first.process and not (first.sockets or self.stopping):
                    self._take_sockets(first)
                for child in self.children:
                    if child.process and (code := child.process.poll()) is not None:
                        self._bury(child, code)
        if self.path:
            Path(self.path).unlink(missing_ok=True)
        return self.code

    def _start(self, child: Child, folder: str) -> None:
        child.control, theirs = socket.socketpair()
        with theirs:
            files = (theirs.fileno(), *child.sockets)
            place = Place(child.number, len(self.children), folder, files[0], files[1:])
            told = os.environ | {PLACE_VARIABLE: json.dumps(place)}
            command = [sys.executable, *sys.orig_argv[1:]]
            try:
                child.process = subprocess.Popen(command, env=told, pass_fds=files)
            except OSError as error:  # of memory or processes; the others go on
                log.error("process %d cannot be started: %s", child.number, error.strerror)
                child.control.close()
                child.due = time.monotonic() + LONGEST_WAIT

    def _take_sockets(self, first: Child) -> None:
        """Keep what the first listens to, if it does by now, and have the others listen there."""
        with contextlib.suppress(BlockingIOError):
            _, first.sockets, *_ = socket.recv_fds(first.control, 1, 64, socket.MSG_DONTWAIT)
            for each in self.children[1:] if first.sockets else ():  # a Unix socket is everybody's
                each.sockets = first.sockets if self.path else [*map(twin_of, first.sockets)]
                each.due = 0

    def _tell(self, number: int) -> None:
        if number != signal.SIGHUP:
            self.stopping = True
            for each in {each for child in self.children for each in child.sockets}:
                os.close(each)  # else it would listen for as long as the parent lives
            for child in self.children:
                child.sockets = ()
        for child in self.children:
            with contextlib.suppress(ConnectionError):
                if child.process:
                    child.control.send(bytes([number]))

    def _bury(self, child: Child, code: int) -> None:
        """One has ended, to be started again; unless not even a first one could start."""
        child.process = None
        child.control.close()
        if code == 2 and not (self.children[0].sockets or self.stopping):  # a SettingsError
            self._tell(signal.SIGTERM)
        if self.stopping:
            self.code = max(self.code, code if code >= 0 else 128 - code)
            return
        wait = 0 if time.monotonic() - child.due >= STEADY else child.wait
        child.due, child.wait = time.monotonic() + wait, min(LONGEST_WAIT, 2 * wait or 1)
        log.error("process %d ended with %d; another starts in %d s", child.number, code, wait)


def twin_of(listening: int) -> int:
    """Another socket that listens to the same port."""
    with socket.socket(fileno=os.dup(listening)) as one:
        return socket.create_server(one.getsockname(), family=one.family, reuse_port=True).detach()


def favour_the_loop() -> None:
    """Keep what else goes on in this process from stopping streams."""
    gc.unfreeze()  # requests that were under way at the last time are garbage by now
    gc.collect()
    gc.freeze()  # some hundred thousand objects, which stay: not to be looked through each time
    gc.set_threshold(10_000)  # objects made and not freed, as by a hundred requests; else 700
    sys.setswitchinterval(0.0005)  # not 5 ms: the keys file's writer hands Python's lock back


if __name__ == "__main__":
    main()
