"""`kv-memory serve` and `kv-memory keys`: as commands, and as a process that is stopped and killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_memory import KVMemory
from tests.cli.ran import Ran

Run = Callable[..., Ran]
Start = Callable[..., "subprocess.Popen[str]"]


def started(process: subprocess.Popen[str]) -> str:
    """The base URL of a server that runs with `--json`."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert '"url"' in line, (line, process.communicate())
    return str(json.loads(line)["url"])


def test_keys_are_created_listed_and_revoked(kv: Run, store: Path) -> None:
    assert "There are no keys" in kv("keys", "list").err
    made = kv("keys", "create", "importer", "--only", "team-a", "--only", "team-b", "--write", "--json").json
    shown = kv("keys", "create", "reader")
    assert shown.out.startswith("kvm_") and len(shown.out.splitlines()) == 1
    listed = kv("keys", "list", "--json")
    assert made["key"] not in listed.out and made["key"].split("_", 2)[2] not in listed.out
    assert [(key["name"], key["collections"], key["write"]) for key in listed.json["keys"]] == [
        ("importer", ["team-a", "team-b"], True),
        ("reader", [], False),
    ]
    assert kv("keys", "revoke", made["id"]).out == f"The key {made['id']} (importer) is revoked.\n"
    assert kv("keys", "list", "--json").json["keys"][0]["revoked_at"]
    assert kv("keys", "revoke", "nothing").code == 2


def test_wrong_ways_to_serve_are_refused(kv: Run, store: Path) -> None:
    for options, says in (
        (["--host", "0.0.0.0"], "keys create"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--host", "192.0.2.1"], "no key"),
    ):
        done = kv("serve", "--json", *options)
        assert done.code == 2
        error = done.json["error"]
        assert says in f"{error['what']} {error['next_step']}"


@pytest.mark.slow
def test_sigterm_ends_running_answers_and_the_process(process: Start, store: Path) -> None:
    server = process("serve", "--port", 0, "--json", "--stop-timeout-s", 20, cwd=store.parent)
    url = started(server)
    models = [each["id"] for each in httpx.get(f"{url}/models").json()["data"]]
    assert models == ["tiny-wide", "tiny-wide/default"]
    body = {"model": models[1], "messages": [{"role": "user", "content": "When does the ferry leave?"}]}
    with httpx.stream(
        "POST", f"{url}/chat/completions", json={**body, "stream": True, "max_tokens": 300}, timeout=30
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.wait(30) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/models")
    assert "Serving" in server.communicate()[1]


@pytest.mark.slow
def test_a_server_killed_while_it_adds_leaves_a_sound_store_and_its_job_to_the_next(
    process: Start, store: Path
) -> None:
    rng, url, job = random.Random(5), "", ""
    text = "The {0} leaves pier {1} at dawn, and the harbour master writes its name into the book. " * 3
    stored: set[str] = set()

    def add(n: int) -> str | None:
        document = {"id": f"quick-{n}", "text": text.format("barge", n)}
        with suppress(httpx.TransportError):  # killed
            body = {"documents": [document], "wait": True}
            done = httpx.post(f"{url}/documents", json=body, timeout=30)
            assert done.status_code in {200, 429}, done.text
            return f"quick-{n}" if done.status_code == 200 else None
        return None

    for attempt in range(2):  # a document over which three workers die counts as failed
        server = process("serve", "--port", 0, "--json", cwd=store.parent)
        url = started(server)
        if not job:
            documents = [{"id": f"slow-{n:02}", "text": text.format("ferry", n)} for n in range(40)]
            made = httpx.post(f"{url}/documents", json={"documents": documents}, timeout=30)
            assert made.status_code == 202
            job = made.json()["id"]
        with ThreadPoolExecutor(2) as pool:
            adding = [pool.submit(add, 100 * attempt + n) for n in range(30)]
            time.sleep(rng.uniform(0.3, 1.0))
            server.kill()
            server.wait(10)
            stored |= {id_ for each in adding if (id_ := each.result()) is not None}
        server.communicate()
        with KVMemory.open(store, create=False, load_model=False) as memory:
            assert memory.check().ok
            there = {document.id for document in memory.documents()}
            assert stored <= there  # nothing that was confirmed is lost
    server = process("serve", "--port", 0, "--json", cwd=store.parent)
    url, until_s = started(server), time.monotonic() + 60
    status: Any = {}
    while status.get("status") != "done":
        assert time.monotonic() < until_s, status
        time.sleep(0.1)
        status = httpx.get(f"{url}/jobs/{job}").json()
    assert (status["done"], status["failed"]) == (40, 0)
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    server.communicate()
    with KVMemory.open(store, create=False) as memory:
        assert memory.check().ok
        for document in memory.documents():
            for passage in memory.document(document.id).passages:
                assert memory.reader.has_key(passage.text_sha256), document.id
    assert list((store / "uploads").iterdir()) == []


@pytest.mark.slow
def test_under_load_every_answer_is_200_or_429_and_memory_stays_flat(tiny: Path, tmp_path: Path) -> None:
    """A short form of `benchmarks/serve.py`."""
    options = ["--model", tiny, "--clients", 4, "--load", 16, "--seconds", 6, "--tokens", 8]
    options += ["--options", "max-batch=4", "max-queue=4"]
    words = [sys.executable, "benchmarks/serve.py", *map(str, options)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    at_once, load = map(json.loads, done.stdout.splitlines())
    assert 8 <= at_once["tokens"] <= 32
    assert set(load["statuses"]) == {"200", "429"} and load["statuses"]["200"] > 20
    assert load["ratio"] < 1.3
