"""What the number of keys costs: start, lookup and one /key/generate, 10 keys beside 100,000.

.venv/bin/python bench/keys.py
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

import gateway

MASTER_KEY = "sk-bench-0123456789abcdef"
LOOKUPS = 100_000
GENERATES = 9


def fill(path: Path, number: int) -> str:
    """Write a keys file with so many keys; one of them."""
    moment = gateway.now()
    lines = []
    for count in range(number):
        record = gateway.VirtualKey(
            "sk-...abcd",
            f"key {count}",
            user_id=f"user {count % 100}",
            created_at=moment,
        )
        lines.append(gateway.store_line(gateway.hash_key(f"sk-bench-{count}"), record))
    body = b",\n".join(lines)
    path.write_bytes(b'{"version": 1, "keys": {\n' + body + b"\n}}\n")
    return f"sk-bench-{number // 2}"


def start(path: Path) -> tuple[subprocess.Popen[str], int, float]:
    """A gateway on that file: its process, its port, the seconds until it listened."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            sys.executable,
            FOLDER / "gateway.py",
            "--port=0",
            "--upstream=mock",
            f"--keys={path}",
        ],
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
    store = gateway.KeyStore(path)
    began = time.perf_counter()
    for _ in range(LOOKUPS):
        assert store.lookup(key)
    took = (time.perf_counter() - began) / LOOKUPS
    store.close()
    return took


def main() -> None:
    """Print one row for each number of keys."""
    print(
        f"{'keys':>8} {'file MB':>8} {'start s':>8} {'lookup µs':>10} {'generate ms':>12}"
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
        print(
            f"{number:>8} {size:>8.1f} {started:>8.2f} {looked_up * 1e6:>10.2f}"
            f" {generated * 1e3:>12.1f}"
        )


if __name__ == "__main__":
    main()
