"""The server under load: clients at once against one after the other, and many clients for a while.

    python benchmarks/serve.py                       # 20 clients, then 64 for a minute; one JSON object per line
    python benchmarks/serve.py --seconds 0           # the 20 clients only
    python benchmarks/serve.py --model tiny-folder --clients 4 --load 16 --seconds 5

A server of its own is started on a new store with a few documents, and asked over HTTP by threads. The first row is the
time for one question of each client, all at once, divided by that for the same questions one after the other (`ratio`).
The second counts statuses (only 200 and 429 are right), and compares the server's memory (resident set) at the end with
the largest of the first half (`ratio`): in a trial of 150 s it grew for 110 s, then stayed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

SUBJECTS = ["ferry", "lighthouse", "harbour", "museum", "library", "bakery", "observatory", "railway"]
TEXT = "The {0} opens at {1} o'clock and closes at dusk. Its keeper is called number {1}, and the {0} has {1} rooms. "


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model or a folder (default: smollm2)")
    parser.add_argument("--clients", type=int, default=20, help="clients at once (default: 20)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer (default: 32)")
    parser.add_argument("--load", type=int, default=64, help="clients of the second row (default: 64)")
    parser.add_argument("--seconds", type=float, default=60, help="length of the second row; 0 leaves it out")
    parser.add_argument("--options", nargs="*", default=[], help="further options of `kv-memory serve`, without the --")
    args = parser.parse_args()
    options = [f"--{option}" for option in args.options]
    with (
        tempfile.TemporaryDirectory(prefix="kv-memory-bench-") as folder,
        serving(Path(folder) / "store", args.model, options) as (server, pid),
    ):
        for row in rows(server, pid, args):
            print(json.dumps(row), flush=True)


def rows(server: httpx.Client, pid: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the benchmark on a running server."""
    ids = add_documents(server)
    bodies = [question(ids, n, args.tokens) for n in range(args.clients)]
    for body in bodies[:2]:  # whatever is loaded on first use
        ask(server, body)
    yield together(server, bodies)
    if args.seconds:
        yield load(server, pid, [question(ids, n, args.tokens) for n in range(args.load)], args.seconds)


@contextmanager
def serving(store: Path, model: str, options: list[str]) -> Iterator[tuple[httpx.Client, int]]:
    """A server on a store, as a process: a client of it, and its process id."""
    command = "from kv_memory.cli import main; main()"
    words = ["serve", "--port", "0", "--json", "--store", str(store), "--model", model, *options]
    process = subprocess.Popen([sys.executable, "-c", command, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=started["url"], timeout=600, limits=limits) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def add_documents(server: httpx.Client) -> list[str]:
    """Add a document about each subject; returns their ids."""
    for n, subject in enumerate(SUBJECTS, start=3):
        document = {"id": subject, "text": TEXT.format(subject, n) * 4}
        server.post("/documents", json={"documents": [document], "wait": True}).raise_for_status()
    return SUBJECTS


def question(ids: list[str], n: int, n_tokens: int) -> dict[str, Any]:
    """The body of the n-th question: each about another document, and none like the one before."""
    subject = ids[n % len(ids)]
    asked = f"Question {n}: when does the {subject} open?"
    return {"model": "", "messages": [{"role": "user", "content": asked}], "max_tokens": n_tokens, "kv_memory": {}}


def ask(server: httpx.Client, body: dict[str, Any]) -> tuple[int, int]:
    """Status of an answer, and its number of tokens."""
    done = server.post("/chat/completions", json={**body, "model": model_of(server)})
    return done.status_code, done.json()["usage"]["completion_tokens"] if done.status_code == 200 else 0


_models: dict[str, str] = {}


def model_of(server: httpx.Client) -> str:
    """The name of the server's model."""
    url = str(server.base_url)
    if url not in _models:
        _models[url] = server.get("/models").json()["data"][0]["id"]
    return _models[url]


def together(server: httpx.Client, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """All questions one after the other, then all at once."""
    begun_s = time.perf_counter()
    in_a_row = [ask(server, body) for body in bodies]
    row_s, begun_s = time.perf_counter() - begun_s, time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        at_once = list(pool.map(lambda body: ask(server, body), bodies))
    at_once_s = time.perf_counter() - begun_s
    assert {status for status, _ in (*in_a_row, *at_once)} == {200}
    return {
        "path": f"{len(bodies)} HTTP clients / {len(bodies)} in a row, total time",
        "ratio": round(at_once_s / row_s, 3),
        "goal": 0.4,
        "in_a_row_s": round(row_s, 2),
        "at_once_s": round(at_once_s, 2),
        "tokens": sum(n for _, n in at_once),
    }


def load(server: httpx.Client, pid: int, bodies: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Every client asks without a pause for some seconds."""
    statuses: Counter[int] = Counter()
    sizes: list[int] = []
    until_s = time.perf_counter() + seconds
    done = threading.Event()

    def client(number: int) -> Counter[int]:
        found: Counter[int] = Counter()
        for turn in itertools.count():
            if time.perf_counter() > until_s:
                return found
            status, _ = ask(server, bodies[(number + turn) % len(bodies)])
            found[status] += 1
            if status == 429:
                time.sleep(0.2)
        return found

    def watch() -> None:
        while not done.wait(min(1.0, seconds / 20)):
            sizes.append(resident_bytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(len(bodies)) as pool:
        for found in pool.map(client, range(len(bodies))):
            statuses += found
    done.set()
    watcher.join()
    before = max(sizes[: max(1, len(sizes) // 2)])
    return {
        "path": f"{len(bodies)} clients for {seconds:g} s: memory at the end / in the first half",
        "ratio": round(sizes[-1] / before, 3),
        "goal": 1.05,
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        "resident_bytes": sizes[-1],
    }


def resident_bytes(pid: int) -> int:
    """Resident memory of a process (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
