"""Six processes at work on one store for some seconds. `make stress` does it for a minute."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork")
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]

RACE = """
import json
from tests.stress.races import race
folder, given, scratch = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
print(json.dumps(race(folder, given, seconds=5, seed=1, scratch=scratch)))
"""
SHARED = [pytest.mark.postgres, pytest.mark.s3]


@pytest.mark.parametrize("pair", ["sqlite-disk", pytest.param("postgres-s3", marks=SHARED)])
def test_readers_writers_eviction_and_gc_run_concurrently(
    run_script: RunScript, tmp_path: Path, place: Callable[[str], dict[str, Any]], pair: str
) -> None:
    done = run_script(RACE, tmp_path / "store", json.dumps(place(pair)), tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["wrong"] == []
    assert (found["corrupt_reads"], found["dangling_rows"], found["lost_documents"]) == (0, 0, 0)
    assert all(found["per_kind"][kind] for kind in ("read", "replace", "evict", "gc", "check"))
