"""A worker's memory over many documents, and that of its driver."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.jobs import Job
from kv_memory.jobs.local import LocalEngine
from kv_memory.jobs.progress import Event, Progress
from kv_memory.jobs.run import drive
from kv_memory.store import Store


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_a_thousand_documents(store: Store, new_job: Callable[..., Job], tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"Pier {n} has a ferry."}) + "\n" for n in range(1000)))
    engine = LocalEngine(store.path)
    sizes: list[tuple[int, int]] = []

    def look(event: Event) -> None:
        if isinstance(event, Progress) and event.done and engine.pids:
            sizes.append((event.done, resident(engine.pids[0])))

    ended = drive(store, new_job(path), engine, on_event=look)
    assert ended.added == 1000
    early = max(size for done, size in sizes if done <= 200)
    late = max(size for done, size in sizes if done >= 800)
    assert late - early < 20e6, f"grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB"
