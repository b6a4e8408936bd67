"""A worker's memory over many documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.jobs import Job
from kv_memory.jobs.driver import drive
from kv_memory.jobs.engines.local import LocalEngine
from kv_memory.store import Store
from tests.jobs.odd_driver import ODD_WORKER
from tests.jobs.test_jobs_local import log, told

__all__ = ["log"]  # a fixture


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_constant_over_hundreds_of_documents(
    store: Store, new_job: Callable[..., Job], tmp_path: Path, log: Path
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"Pier {n} has a ferry."}) + "\n" for n in range(200)))
    ended = drive(store, new_job(path), LocalEngine(store.path, command=ODD_WORKER))
    assert ended.added == 200
    sizes = [int(size_bytes) for _, size_bytes in told(log, "resident")]  # the worker's own, document by document
    early, late = max(sizes[:100]), max(sizes[-50:])
    assert len(sizes) == 200
    assert late - early < 10e6, f"grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB"
