"""What an actor does in a turn, without any Ray."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import StoreConnectionError
from kv_memory.jobs import Job, JobSettings, Ledger
from kv_memory.jobs.discovery import Discovery
from kv_memory.jobs.engines.actor import Actor, call_of
from kv_memory.jobs.engines.local import threads_of
from kv_memory.jobs.leases import LiveWorkers, TaskQueue
from kv_memory.jobs.worker import make_pipeline
from kv_memory.store import Store
from tests.jobs.test_jobs_local import assert_all_there

Make = Callable[..., Job]
DRIVER = "ray-0"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class Actors:
    """Actors of a driver, on a job all of whose documents are found."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ledger = Ledger(store)
        self.made: list[Actor] = []
        self.called = ExitStack()
        self.called.enter_context(store.catalog.hold(call_of(DRIVER)))

    def ready(self, job: Job) -> Job:
        discovery = Discovery(self.store, self.ledger, job)
        discovery.run()
        assert discovery.error is None
        return self.ledger.job(job.name)

    def make(self, job: Job) -> Actor:
        place = {"path": str(self.store.path), "collection": job.collection, "job": job.name, "driver": DRIVER}
        self.made.append(Actor(**place, n_threads=threads_of(1), device="cpu"))
        return self.made[-1]


def turn(actor: Actor) -> tuple[int, str, dict[str, str]]:
    row = actor({"turn": [7]})
    assert row["turn"] == [7]
    (n_done,), (lost,), (fatal,) = row["n_done"], row["lost"], row["fatal"]
    return n_done, lost, json.loads(fatal or "{}")


@pytest.fixture
def actors(store: Store) -> Iterator[Actors]:
    """With a driver who wants work done, which is seen where the job is driven."""
    made = Actors(store)
    with made.called:
        yield made
    for actor in made.made:
        actor.close()


def test_turn_processes_all_documents_of_the_job(
    store: Store, new_job: Make, notes: Path, actors: Actors, temporary: Path
) -> None:
    (notes / "broken.txt").write_bytes(b"\0")
    job = actors.ready(new_job(notes))
    with actors.ledger.hold_driver_lock(job):
        first, second = actors.make(job), actors.make(job)
        assert turn(first) == (13, "", {})
        assert turn(first) == (0, "", {})
        assert turn(second) == (0, "", {})
    assert second._pipeline is None  # no model is loaded for nothing
    ((_, failed),) = actors.ledger.failed(job)
    assert failed.error["error"] == "BinaryDocumentError"
    assert_all_there(store, 12)
    assert actors.ledger.job(job.name).fingerprint == store.caches()[0].fingerprint
    assert list(temporary.iterdir()) == []


def test_turn_waits_for_documents_claimed_by_a_dead_actor(
    store: Store, new_job: Make, notes: Path, actors: Actors
) -> None:
    job = actors.ready(new_job(notes))
    other = TaskQueue(store, job.id, f"{DRIVER}-dead")
    assert other.claim() is not None
    freed = threading.Timer(1, lambda: LiveWorkers(store).free_dead(job))  # as the driver does
    freed.start()
    with actors.ledger.hold_driver_lock(job):
        assert turn(actors.make(job)) == (12, "", {})
    freed.join()
    assert_all_there(store, 12)


def test_actor_stops_when_the_driver_releases_its_lock(
    store: Store, new_job: Make, notes: Path, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_memory.jobs.engines.actor._LOOK_S", 0)
    job = actors.ready(new_job(notes))
    actor = actors.make(job)
    with actors.ledger.hold_driver_lock(job):
        wanted = Actor._is_wanted

        def once(self: Actor) -> bool:
            actors.called.close()
            return wanted(self)

        monkeypatch.setattr(Actor, "_is_wanted", once)
        assert turn(actor) == (0, "", {})
        assert actor._pipeline is not None  # it was called off behind that
        monkeypatch.undo()
        assert actor._is_over()  # although it has looked a moment ago
        assert turn(actors.make(job)) == (0, "", {})
    assert actors.made[-1]._pipeline is None
    assert actors.ledger.counts(job).pending == 12


def test_job_without_a_driver_is_not_processed(new_job: Make, notes: Path, actors: Actors) -> None:
    job = actors.ready(new_job(notes))
    assert turn(actors.make(job)) == (0, "", {})


def test_missing_model_ends_the_turn_with_an_error(
    new_job: Make, notes: Path, settings: JobSettings, actors: Actors
) -> None:
    job = actors.ready(new_job(notes, memory={**settings.memory, "model": str(notes / "no-such-model")}))
    with actors.ledger.hold_driver_lock(job):
        n_done, lost, fatal = turn(actors.make(job))
    assert (n_done, lost, fatal["error"]) == (0, "", "ModelNotFoundError")
    assert "no-such-model" in fatal["where"] and f"(on {socket.gethostname()})" in fatal["what"]


def test_actor_recovers_after_a_lost_connection(
    store: Store, new_job: Make, notes: Path, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_memory.jobs.engines.actor._LOST_S", 0)
    job = actors.ready(new_job(notes))
    actor = actors.make(job)
    down = [True]

    def opened(*args: Any, **options: Any) -> Any:
        if down.pop():
            down.append(False)
            raise StoreConnectionError("no answer", where="db.local", next_step="Wait.")
        return make_pipeline(*args, **options)

    monkeypatch.setattr("kv_memory.jobs.worker.make_pipeline", opened)
    with actors.ledger.hold_driver_lock(job):
        assert turn(actor) == (0, f"no answer (on {socket.gethostname()})", {})
        assert turn(actor) == (12, "", {})
    assert_all_there(store, 12)


def test_actor_reports_an_error_after_ten_fatal_model_loads(
    new_job: Make, notes: Path, actors: Actors, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = actors.ready(new_job(notes, name="j"))
    (temporary / f"kv-memory-{DRIVER}").write_bytes(b"." * 10)
    with actors.ledger.hold_driver_lock(job):
        _, _, fatal = turn(actors.make(job))
        assert fatal["error"] == "WorkerDiedError" and "10 actors in a row died" in fatal["what"]
        assert "kv-memory job resume j --engine ray" in fatal["next_step"]
        assert list(temporary.iterdir()) == []
        (temporary / f"kv-memory-{DRIVER}").write_bytes(b"." * 9)
        assert turn(actors.make(job)) == (12, "", {})
