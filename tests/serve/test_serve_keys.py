"""Keys: their scopes, how they are kept, and where a server without any may listen."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_memory import ConfigError, KVMemory
from kv_memory.serve.keys import Keys
from kv_memory.serve.server import is_loopback, listen
from tests.serve.running import MODEL, Running, error_of

Serve = Callable[..., Running]
NEW = {"documents": [{"id": "eel", "text": "The eel swims."}], "wait": True}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_scopes_are_held(serve: Serve) -> None:
    server = serve()
    server.memory.in_collection("team").add([("walrus", "The walrus sleeps.")])
    keys = Keys(server.memory.store)
    _, reader = keys.create("reader", collections=["team"])
    _, writer = keys.create("writer", collections=["team"], write=True)
    _, everything = keys.create("everything", write=True)

    def status(method: str, path: str, key: str, body: Any = None) -> int:
        return httpx.request(method, server.url + path, json=body, headers=bearer(key), timeout=30).status_code

    new = {**NEW, "collection": "team"}
    assert status("GET", "/v1/documents?collection=team", reader) == 200
    assert status("GET", "/v1/documents", reader) == status("GET", "/v1/documents?collection=other", reader) == 403
    assert status("POST", "/v1/documents", reader, new) == 403
    assert status("DELETE", "/v1/documents/walrus?collection=team", reader) == 403
    assert status("POST", "/v1/documents", writer, new) == 200
    assert status("POST", "/v1/documents", writer, NEW) == 403
    assert status("POST", "/v1/documents", everything, NEW) == 200
    ask = {"model": f"{MODEL}/team", "messages": [{"role": "user", "content": "The walrus?"}], "max_tokens": 2}
    assert status("POST", "/v1/chat/completions", reader, ask) == 200
    assert status("POST", "/v1/chat/completions", reader, {**ask, "model": f"{MODEL}/default"}) == 403
    assert status("POST", "/v1/chat/completions", reader, {**ask, "model": MODEL, "kv_memory": {}}) == 403
    models = httpx.get(f"{server.url}/v1/models", headers=bearer(reader)).json()["data"]
    assert [each["id"] for each in models] == [MODEL, f"{MODEL}/team"]
    assert status("GET", "/metrics", reader) == 403 and status("GET", "/metrics", everything) == 200


def test_jobs_are_seen_by_keys_for_their_collection_only(serve: Serve) -> None:
    server = serve()
    keys = Keys(server.memory.store)
    _, team = keys.create("team", collections=["team"], write=True)
    _, default = keys.create("default", collections=["default"], write=True)
    job = server.post("/v1/documents", {**NEW, "wait": False, "collection": "team"}, headers=bearer(team)).json()
    assert server.get(f"/v1/jobs/{job['id']}", headers=bearer(team)).status_code == 200
    assert server.get(f"/v1/jobs/{job['id']}", headers=bearer(default)).status_code == 403
    assert server.get("/v1/jobs", headers=bearer(default)).json()["data"] == []


def test_a_missing_unknown_or_revoked_key_is_401_in_the_shape_of_openai(serve: Serve) -> None:
    server = serve()
    assert server.chat(headers=bearer("anything")).status_code == 200  # no key exists
    made, key = Keys(server.memory.store).create("k")
    assert server.chat(headers=bearer(key)).status_code == 200
    for headers in ({}, bearer(key[:-1]), bearer(f"kvm_{made.id}_"), bearer("kvm__"), bearer("sk-1"), bearer("é")):
        raw = {name: value.encode() for name, value in headers.items()}
        refused = httpx.get(f"{server.url}/v1/models", headers=raw)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert error_of(refused)["type"] == "authentication_error"
    Keys(server.memory.store).revoke(made.id)
    assert server.chat(headers=bearer(key)).status_code == 401
    assert server.chat().status_code == 401  # revoking the last key does not open the server
    assert server.get("/healthz").status_code == server.get("/readyz").status_code == 200


def test_keys_are_random_and_kept_as_hashes(memory: KVMemory) -> None:
    keys = Keys(memory.store)
    made = [keys.create(f"k{n}", write=True)[1] for n in range(20)]
    assert len(set(made)) == 20 and all(len(key.split("_", 2)[2]) >= 43 for key in made)
    memory.close()
    content = b"".join(path.read_bytes() for path in Path(memory.path).rglob("*") if path.is_file())
    assert not any(key.encode() in content or key.split("_", 2)[2].encode() in content for key in made)
    with sqlite3.connect(memory.path / "catalog.sqlite") as database:
        assert database.execute("SELECT count(*) FROM option WHERE key LIKE 'api_key:%'").fetchone() == (20,)
    database.close()
    assert (memory.path / "catalog.sqlite").stat().st_mode & 0o077 == 0


def test_wrong_names_of_keys_are_refused(memory: KVMemory) -> None:
    keys = Keys(memory.store)
    for call in (
        lambda: keys.create(" "),
        lambda: keys.create("a", collections=["\0"]),
        lambda: keys.revoke("nothing"),
    ):
        with pytest.raises(ConfigError):
            call()
    assert keys.list() == [] and not keys.any()


def test_a_server_that_others_can_reach_needs_a_valid_key(memory: KVMemory) -> None:
    keys = Keys(memory.store)
    with pytest.raises(ConfigError, match="keys create"):
        listen("0.0.0.0", 0, keys)
    made, _ = keys.create("k")
    listen("0.0.0.0", 0, keys).close()
    keys.revoke(made.id)
    with pytest.raises(ConfigError, match="keys create"):
        listen("0.0.0.0", 0, keys)
    with listen("127.0.0.1", 0, keys) as taken, pytest.raises(ConfigError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1], keys)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.com")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_a_server_that_others_can_reach_is_never_open(serve: Serve) -> None:
    server = serve(loopback=False)
    assert server.chat().status_code == server.get("/v1/models").status_code == 401
    assert server.get("/metrics").status_code == 401
