"""The way of one streamed POST /v1/messages with a budget through gateway.py, function by function.

.venv/bin/python bench/walk.py --list

Takes a request through a gateway in this process step by step, its answer of three events chunk by
chunk, with all caches warm. Counts each entry of a function of the file, and each time a coroutine
goes on. (Python 3.11 counts comprehensions too.) A room is what stands below a banner; it changes
between two calls in two rooms. Timers fall into a walk: the shortest of some is told.
"""

import argparse
import bisect
import hashlib
import itertools
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import CodeType, FrameType

KEY = "sk-walk-0123456789abcdef"
RECORD = f'"{hashlib.sha256(KEY.encode()).hexdigest()}": {{"key_name": "sk", "max_budget": "9"}}'
BODY = '{"model": "claude-sonnet-5-5", "max_tokens": 99, "stream": true, "messages": []}'
REQUEST = f"""POST /anthropic/v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nx-api-key: {KEY}\r\n\
content-type: application/json\r\nanthropic-version: 2023-06-01\r\naccept: application/json\r\n\
accept-encoding: gzip, br\r\nuser-agent: walk\r\ncontent-length: {len(BODY)}\r\n\r\n{BODY}"""
HEAD = """HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\
request-id: req_1\r\n\r\n"""
EVENTS = {
    "message_start": '"message": {"model": "claude-sonnet-5-5", "usage": {"input_tokens": 9}}',
    "content_block_delta": '"index": 0, "delta": {"type": "text_delta", "text": "Hello"}',
    "message_delta": '"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}',
}
PAUSE = 0.03  # seconds in which the gateway has done with a step
WARM_UP, WALKS = 10, 20

step = ""  # that is being taken
walks: list[list[tuple[str, int, CodeType]]] = []  # of calls: the step, how deep, and what


def note(path: str, frame: FrameType, event: str) -> None:
    if event == "call" and step and frame.f_code.co_filename == path:
        depth, caller = -2, frame.f_back  # the module and main stand below all
        while caller is not None:
            depth += caller.f_code.co_filename == path
            caller = caller.f_back
        walks[-1].append((step, depth, frame.f_code))


def take(following: str) -> None:
    global step
    time.sleep(PAUSE)
    step = following


def walk(gateway: tuple[str, int], listener: socket.socket) -> None:
    """All walks, in a thread beside the gateway's, which they end."""
    while socket.socket().connect_ex(gateway):
        time.sleep(PAUSE)
    upstream = None
    for _ in range(WARM_UP + WALKS):
        walks.append([])
        take("A accept")
        client = socket.create_connection(gateway)
        take("B request, up to the upstream")
        client.sendall(REQUEST.encode())
        upstream = upstream or listener.accept()[0]
        assert upstream.recv(65536).endswith(BODY.encode())
        take("C the answer's head")
        upstream.sendall(HEAD.encode())
        for name, fields in EVENTS.items():
            take(f"D {name}")
            data = f'event: {name}\ndata: {{"type": "{name}", {fields}}}\n\n'
            upstream.sendall(f"{len(data):x}\r\n{data}\r\n".encode())
        take("E last chunk, settled")
        upstream.sendall(b"0\r\n\r\n")
        while not client.recv(65536).endswith(b"0\r\n\r\n"):
            time.sleep(PAUSE)
        take("F client closes")
        client.close()
        take("")
    os.kill(os.getpid(), signal.SIGTERM)


def run_gateway(path: str) -> None:
    """As from the command line, with the walks beside it. Nothing is known of its insides."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]  # at another address it is the gateway's
    threading.Thread(target=walk, args=(("127.0.0.2", port), listener), daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "keys.json").write_text(f'{{"version": 1, "keys": {{{RECORD}}}}}')
        os.environ |= {"ANTHROPIC_API_KEY": f"sk-ant-{KEY}", "GATEWAY_MASTER_KEY": f"sk-{KEY}"}
        sys.argv[1:] = ["--address=127.0.0.2", f"--port={port}", f"--keys={folder}/keys.json"]
        sys.argv += [f"--upstream=http://127.0.0.1:{port}", f"--log-file-prefix={folder}/log"]
        sys.argv += ["--log-rotate-mode=time"]  # by size, each line would be formatted twice
        sys.setprofile(lambda frame, event, _: note(path, frame, event))
        runpy.run_path(path, run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the whole walk")
    parser.add_argument("--file", type=Path, help="another gateway.py (git show COMMIT:gateway.py)")
    arguments = parser.parse_args()
    path = (arguments.file or Path(__file__).parent.parent / "gateway.py").resolve()
    lines = path.read_text().split("\n")
    banners = [number for number, line in enumerate(lines) if line.startswith("# ───")]
    run_gateway(str(path))
    calls, count = min(walks[WARM_UP:], key=len), itertools.count(1)
    print(f"\n{'':<31}calls distinct  changes  upwards  deepest")
    steps = [(name, list(some)) for name, some in itertools.groupby(calls, key=lambda c: c[0])]
    for name, some in [*steps, ("all", calls)]:
        rooms = [bisect.bisect(banners, code.co_firstlineno) - 1 for *_, code in some]
        ups = [a > b for a, b in itertools.pairwise(rooms) if a != b]
        distinct, deepest = {c.co_qualname for *_, c in some}, max(d for _, d, _ in some) + 1
        print(f"{name:<30}{len(some):>6}{len(distinct):>9}{len(ups):>9}{sum(ups):>9}{deepest:>9}")
        for room, (_, depth, code) in zip(rooms, some if arguments.list and name != "all" else ()):
            where = f"{code.co_firstlineno:>6} {lines[banners[room]].strip('# ─'):<15}"
            print(f"{next(count):>4}{where}{'. ' * depth}{code.co_qualname}")


if __name__ == "__main__":
    main()
