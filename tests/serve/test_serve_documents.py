"""Documents over HTTP: added at once or in a job, as texts or files; listed, shown and removed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kv_memory import errors
from tests.memories import LONG
from tests.serve.running import Running, error_of

Serve = Callable[..., Running]


def ended(server: Running, job: Any, *, within_s: float = 30) -> Any:
    """The job once it has ended."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        found = server.get(f"/v1/jobs/{job['id']}").json()
        if found["status"] in {"done", "cancelled"} or found["error"]:
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def test_a_short_document_is_added_at_once_shown_and_removed(serve: Serve) -> None:
    server = serve()
    body = {"documents": [{"id": "notes/é.md", "text": "The walrus sleeps.", "metadata": {"tags": ["a", {"b": 1}]}}]}
    done = server.post("/v1/documents", {**body, "wait": True})
    assert done.status_code == 200 and done.json()["added"] == ["notes/é.md"]
    assert server.post("/v1/documents", {**body, "wait": True}).json()["unchanged"] == ["notes/é.md"]
    shown = server.get("/v1/documents/notes/%C3%A9.md").json()
    assert shown["metadata"] == {"tags": ["a", {"b": 1}]} and shown["passages"][0]["text"] == "The walrus sleeps."
    assert server.chat("Where is the walrus?", kv_memory={"top_k": 1}).json()["kv_memory"]["sources"][0][
        "document_id"
    ] == ("notes/é.md")
    removed = httpx.delete(f"{server.url}/v1/documents/notes/é.md")
    assert removed.json() == {"id": "notes/é.md", "object": "document", "deleted": True}
    assert server.get("/v1/documents/notes/é.md").status_code == 404


def test_a_job_adds_documents_with_progress(serve: Serve) -> None:
    server = serve()
    documents = [{"id": f"d{n}", "text": f"{LONG} Number {n}.", "metadata": {"n": n}} for n in range(3)]
    made = server.post("/v1/documents", {"collection": "new", "documents": documents})
    assert made.status_code == 202 and made.headers["location"] == f"/v1/jobs/{made.json()['id']}"
    assert made.json()["collection"] == "new" and made.json()["status"] in {"queued", "running"}
    done = ended(server, made.json())
    assert (done["status"], done["done"], done["failed"], done["total"]) == ("done", 3, 0, 3) and done["n_tokens"]
    listed = server.get("/v1/documents", params={"collection": "new"}).json()
    assert [(each["id"], each["metadata"]) for each in listed["data"]] == [(f"d{n}", {"n": n}) for n in range(3)]
    assert [each["id"] for each in server.get("/v1/jobs").json()["data"]] == [done["id"]]
    # The texts waited in a file that is gone, and no document claims to come from it.
    assert list((server.memory.path / "uploads").iterdir()) == []
    assert server.memory.in_collection("new").document("d0").source_uri is None


def test_files_are_parsed_from_the_request_and_named_only(serve: Serve, tmp_path: Any) -> None:
    server = serve()
    (tmp_path / "secret.txt").write_text("The vault opens at nine.")
    page = b"<title>Quay</title><p>The crane lifts eels.</p>"
    files = [("files", ("page.html", page)), ("files", (str(tmp_path / "secret.txt"), b"Nothing about vaults."))]
    done = httpx.post(f"{server.url}/v1/documents/files", files=files, data={"wait": "true"}, timeout=30)
    assert done.status_code == 200, done.text
    ids = done.json()["added"]
    assert ids == ["page.html", str(tmp_path / "secret.txt")]
    assert server.get("/v1/documents/page.html").json()["metadata"]["title"] == "Quay"
    # Its path would name a file that an operator's `add --stale` reads.
    assert server.memory.document(ids[1]).source_uri is None
    assert server.get(f"/v1/documents/{ids[1]}").json()["passages"][0]["text"] == "Nothing about vaults."


def test_bad_documents_are_refused_before_any_work(serve: Serve) -> None:
    server = serve()

    def refused(*documents: dict[str, Any], status: int = 400) -> str:
        done = server.post("/v1/documents", {"documents": list(documents)})
        assert done.status_code == status
        return str(error_of(done)["message"])

    assert "white space" in refused({"id": "a", "text": " \n"})
    assert "NUL" in refused({"id": "a", "text": "a\0b"})
    assert "twice" in refused({"id": "a", "text": "one"}, {"id": "a", "text": "two"})
    assert "1,048,576" in refused({"id": "a", "text": "x" * (2**20 + 1)})
    assert "control characters" in refused({"id": "a\nb", "text": "text"})
    assert "source_uri" in refused({"id": "a", "text": "t", "source_uri": "file:///etc/passwd"})
    scan = {"files": ("broken.pdf", b"%PDF-1.4 broken")}
    assert "PDF" in error_of(httpx.post(f"{server.url}/v1/documents/files", files=scan))["message"]
    long = {"documents": [{"id": "a", "text": "word\n" * 20_000}], "wait": True}
    assert "Leave 'wait' out" in error_of(server.post("/v1/documents", long))["message"]
    assert [each["id"] for each in server.get("/v1/documents").json()["data"]] == ["ferry", "lamp"]
    assert server.get("/v1/jobs").json()["data"] == []


def test_pages_of_documents(serve: Serve) -> None:
    server = serve()
    server.memory.add([(f"d{n:02}", f"Text number {n}.") for n in range(7)])
    ids, after = [], None
    while True:
        page = server.get("/v1/documents", params={"limit": 4} | ({"after": after} if after else {})).json()
        assert len(page["data"]) <= 4
        ids += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert ids == sorted([*(f"d{n:02}" for n in range(7)), "ferry", "lamp"])


def test_a_waiting_job_can_be_cancelled_and_the_queue_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(max_jobs=2)
    go = threading.Event()
    whole = server.memory.compressor.compress

    def slow(*args: Any, **options: Any) -> Any:
        assert go.wait(30)
        return whole(*args, **options)

    monkeypatch.setattr(server.memory.compressor, "compress", slow)
    first, second = (
        server.post("/v1/documents", {"documents": [{"id": name, "text": f"A {name}."}]}).json()
        for name in ("eel", "crab")
    )
    full = server.post("/v1/documents", {"documents": [{"id": "c", "text": "Text."}]})
    assert full.status_code == 429 and error_of(full)["code"] == "rate_limit_exceeded"
    assert full.headers["retry-after"]
    assert httpx.post(f"{server.url}/v1/jobs/{second['id']}/cancel").json()["status"] == "cancelled"
    assert httpx.post(f"{server.url}/v1/jobs/{second['id']}/cancel").status_code == 409
    go.set()
    assert ended(server, first)["done"] == 1
    assert ended(server, second)["status"] == "cancelled"
    assert [each["id"] for each in server.get("/v1/documents").json()["data"]] == ["eel", "ferry", "lamp"]
    assert server.get("/v1/jobs/nothing").status_code == 404


def test_a_full_disk_is_507_and_what_was_stored_is_answered(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()

    def full(*_: Any, **__: Any) -> None:
        raise errors.StoreFullError("no space left to write", where="/secret/path", next_step="Free some space.")

    monkeypatch.setattr(type(server.memory.store), "put", full)
    body = {"documents": [{"id": "eel", "text": "The eel swims."}]}
    done = server.post("/v1/documents", {**body, "wait": True})
    assert done.status_code == 507 and error_of(done)["code"] == "store_full"
    assert "/secret" not in done.text  # places of the server are for its log
    job = ended(server, server.post("/v1/documents", body).json())
    assert job["status"] == "interrupted" and job["error"]["code"] == "store_full"
    assert server.chat(kv_memory={"document_ids": ["ferry"]}).status_code == 200


def test_a_stopped_server_leaves_its_jobs_to_the_next(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    first = serve()
    halt = threading.Event()
    whole = first.memory.compressor.compress

    def slow(*args: Any, **options: Any) -> Any:
        halt.wait(0.3)
        return whole(*args, **options)

    monkeypatch.setattr(first.memory.compressor, "compress", slow)
    documents = [{"id": f"d{n}", "text": f"{LONG} {n}."} for n in range(5)]
    job = first.post("/v1/documents", {"documents": documents}).json()
    while not first.get(f"/v1/jobs/{job['id']}").json()["done"]:
        time.sleep(0.05)
    first.stop()
    monkeypatch.undo()
    second = serve()
    done = ended(second, job)
    assert (done["status"], done["done"], done["failed"]) == ("done", 5, 0)
    assert second.memory.check().ok
    assert list((second.memory.path / "uploads").iterdir()) == []
