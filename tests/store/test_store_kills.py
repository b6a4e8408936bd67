"""Processes killed at random moments, on the embedded and on the shared kind of store. `make stress` kills 240."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL")
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]

KILLS = """
import json
from tests.stress.crash import kill_rounds
folder, given, scratch = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
print(json.dumps(kill_rounds(folder, given, kills=int(sys.argv[4]), seed=int(sys.argv[5]), scratch=scratch)))
"""
SHARED = [pytest.mark.postgres, pytest.mark.s3]


@pytest.mark.parametrize(("pair", "kills"), [("sqlite-disk", 24), pytest.param("postgres-s3", 14, marks=SHARED)])
def test_a_store_killed_at_any_moment_loses_nothing(
    run_script: RunScript, tmp_path: Path, place: Callable[[str], dict[str, Any]], pair: str, kills: int
) -> None:
    done = run_script(KILLS, tmp_path / "store", json.dumps(place(pair)), tmp_path, kills, len(pair))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["kills"] == kills
    assert found["wrong"] == []
    assert (found["corrupt_reads"], found["dangling_rows"], found["lost_documents"], found["left"]) == (0, 0, 0, 0)
    assert found["removed"] >= found["orphans"] + found["strays"]
    assert found["slowest_open_s"] < 5
    assert len(found["under_way"]) >= 3, "the kills missed the moments they are meant for"
