"""`kv-memory job`: what it prints, its exit codes, its events, and Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kv_memory.cli.output import Output
from kv_memory.cli.progress import JobTracker, sources_text
from kv_memory.jobs.events import Progress
from tests.cli.ran import Ran

KV = Callable[..., Ran]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"Pier {number} has a ferry.")
    return folder


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_the_driver_loads_no_torch(kv: KV, notes: Path, quick: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from kv_memory.cli import main\n"
        f"sys.argv = ['kv-memory', 'job', 'run', 'notes', *{quick!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('LOADED', *({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rpartition("LOADED")[2].split() == []


@pytest.mark.slow
def test_run_list_show_and_ask(kv: KV, notes: Path, quick: list[str]) -> None:
    (notes / "5.txt").write_bytes(b"\0")
    done = kv("job", "run", "notes", "--name", "nightly", *quick)
    assert done.code == 1  # a document failed
    assert "5 added, 0 replaced, 0 unchanged, 1 failed" in done.out
    assert "Failed: " in done.err and "5.txt: a NUL byte" in done.err
    assert "`kv-memory job resume nightly --retry-failed`" in done.err
    # Whether the worker of the bar or the discovery comes first is up to the machine.
    assert ("Looking for documents" in done.err or "6 documents to do" in done.err) and "0/0" not in done.err
    listed = kv("job", "list").out.splitlines()
    assert listed[1].split()[:5] == ["nightly", "done", "5", "0", "1"]
    (job,) = kv("job", "list", "--json").json["jobs"]
    assert (job["job"], job["state"], job["done"], job["failed"]) == ("nightly", "done", 5, 1)
    shown = kv("job", "show", "nightly")
    assert "5 done, 0 in progress, 0 to do, 1 failed, 0 cancelled" in shown.out
    assert "a NUL byte" in shown.out and "\n  Leave the file out." in shown.out  # what to do about it
    found = kv("job", "show", "nightly", "--json").json
    assert found["failed_documents"][0]["error"]["error"] == "UnreadableDocumentError"
    assert kv("ask", "Which ferry?", "--json").json["sources"]
    # Resumed, the failed one is left alone; retried and mended, it is done.
    assert kv("job", "resume", "nightly").code == 1
    (notes / "5.txt").write_text("Mended.")
    again = kv("job", "resume", "--retry-failed")
    assert again.code == 0 and "6 added" in again.out
    assert kv("job", "resume").code == 1  # no job is left to resume
    cancelled = kv("job", "cancel", "nightly")
    assert cancelled.code == 1 and "this job is already done" in cancelled.err and "Next step: " in cancelled.err
    idle = kv("job", "resume", "nightly")
    assert idle.code == 0 and "nothing is left to do" in idle.err


@pytest.mark.slow
def test_remarks_on_documents_are_events_and_kept_in_the_ledger(kv: KV, notes: Path, quick: list[str]) -> None:
    (notes / "5.txt").write_bytes("naïve café ".encode() + b"\xe9!")
    done = kv("job", "run", "notes", "--name", "j", "--json", *quick)
    told = events(done.out)
    (noted,) = [event for event in told if event["event"] == "noted"]
    assert (noted["document_id"], told[-1]["noted"], done.code) == (str(notes / "5.txt"), 1, 0)
    (note,) = noted["notes"]
    assert note == "1 invalid byte(s) of utf-8 replaced by U+FFFD"
    (kept,) = kv("job", "show", "j", "--json").json["noted_documents"]
    assert (kept["document_id"], kept["notes"]) == (noted["document_id"], [note])
    assert f"Note: {note} [{noted['document_id']}]" in kv("job", "show", "j").out
    # Compressed again, it is told of again, to people; unchanged, it is not.
    again = kv("job", "run", "notes", "--name", "k", "--keep-ratio", "0.5")
    assert (
        f"Note: {note} [{noted['document_id']}]" in again.err and "`kv-memory job show k` lists the notes." in again.err
    )
    assert "1 document lost something" in again.out
    assert "Note: " not in kv("job", "run", "notes", "--name", "l").err


@pytest.mark.slow
def test_events_are_one_json_object_per_line(kv: KV, notes: Path, quick: list[str]) -> None:
    done = kv("job", "run", "notes", "--json", *quick)
    assert done.code == 0, done.err
    told = events(done.out)
    assert told[0]["event"] == "started"
    assert {event["event"] for event in told} == {"started", "progress", "ended"}
    last = told[-1]
    assert (last["event"], last["added"], last["failed"], last["state"]) == ("ended", 5, 0, "done")
    assert {"documents_per_s", "tokens_per_s", "left_s", "failed", "total"} <= told[1].keys()


@pytest.mark.slow
def test_sync(kv: KV, notes: Path, quick: list[str]) -> None:
    first = kv("job", "run", "--sync", "notes", *quick)
    assert first.code == 0 and "5 added" in first.out
    (notes / "0.txt").unlink()
    (notes / "1.txt").write_text("Pier 1 is closed.")
    second = kv("job", "run", "--sync", "notes", "--json")
    last = events(second.out)[-1]
    assert (last["replaced"], last["deleted"], last["unchanged"]) == (1, 1, 3)
    third = kv("job", "run", "--sync", "notes", "--json")
    told = events(third.out)
    assert (told[-1]["replaced"], told[-1]["deleted"], told[-1]["unchanged"]) == (0, 0, 4)
    assert all(event["n_workers"] == 0 for event in told if event["event"] == "progress")  # no model was loaded
    assert len(kv("list", "--json").json["documents"]) == 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"discovered": False}, "Looking for documents"),
        ({}, "Nothing to compress"),
        ({"total": 1}, "1 document to do; the model is being loaded"),
        ({"total": 5000, "discovered": False}, "5,000+ documents to do; the model is being loaded"),
        ({"total": 9, "done": 3}, "6 documents to do; the model is being loaded"),  # resumed
        ({"total": 9, "in_hand": 1}, "0/9 documents"),
        (
            {"total": 1000, "done": 118, "failed": 2, "documents_per_s": 3.14, "tokens_per_s": 1240.2, "left_s": 284.4},
            "120/1,000 documents, 3.1/s, 1,240 tokens/s, 4 min 44 s left, 2 failed",
        ),
        ({"total": 9, "done": 9, "documents_per_s": 2.0, "left_s": 0.0}, "9/9 documents, 2.0/s"),
    ],
)
def test_progress_lines(capsys: pytest.CaptureFixture[str], fields: dict[str, Any], said: str) -> None:
    none = {"total": 0, "done": 0, "failed": 0, "in_hand": 0, "documents_per_s": 0.0, "tokens_per_s": 0.0}
    other = {"job": "j", "discovered": True, "n_tokens": 0, "n_workers": 1, "elapsed_s": 1.0, "left_s": None}
    with JobTracker(Output(as_json=False)) as tracker:
        for _ in range(2):
            tracker(Progress(**{**other, **none, **fields}))
            tracker._told_s = -math.inf  # as if some seconds had passed: still, nothing is said twice
    assert capsys.readouterr().err == f"{said}\n"


def test_long_lists_of_sources_are_shortened() -> None:
    assert sources_text(["a", "b"]) == "a, b"
    assert sources_text([str(n) for n in range(1200)]) == "0, 1, 2, 3, 4 and 1,195 more"


def test_finding_no_document_is_reported(kv: KV, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    done = kv("job", "run", "none", "--store", "other one", "--name", "j")
    assert done.code == 0 and "No document was found." in done.err


@pytest.mark.slow
def test_suggested_commands_can_be_run_unchanged(kv: KV, tmp_path: Path, quick: list[str]) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\0")
    elsewhere = ["--store", "other one", "--collection", "c"]
    done = kv("job", "run", "bad.txt", "--name", "j", *elsewhere, *quick)
    assert done.code == 1
    advised = [line.split("`")[1] for line in done.err.splitlines() if line.startswith("`kv-memory job")]
    assert len(advised) == 2 and "--retry-failed" in advised[1]
    shown = kv(*shlex.split(advised[0])[1:])
    assert shown.code == 0 and "a NUL byte" in shown.out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["run"], 2, "either sources or a folder to sync must be given"),
        (["run", "nothing.txt"], 1, "no such file or folder"),
        (["run", "notes", "--keep-ratio", "3"], 2, "keep_ratio must lie in"),
        (["run", "notes", "--engine", "steam"], 2, "engine must be local or ray"),
        (["run", "notes", "--encoding", "nonsense"], 2, "unknown text encoding"),
        (["run", "sql:sqlite:///x.db"], 2, "needs a query"),
        (["list"], 1, "there is no store"),
        (["show", "x"], 1, "there is no store"),
        (["run", "notes", "--workers", "0"], 2, "workers must be at least 1"),
        (["run", "notes", "--gpus-per-worker", "1"], 2, "with --engine ray"),
    ],
)
def test_wrong_usage(kv: KV, notes: Path, tmp_path: Path, args: list[str], code: int, said: str) -> None:
    done = kv("job", *args)
    assert done.code == code and said in done.err
    assert not (tmp_path / "kv-memory-store").exists()


def test_an_unknown_job_is_an_error(kv: KV, store: Path) -> None:
    done = kv("job", "show", "x")
    assert done.code == 1 and "no job 'x'" in done.err
    assert "No jobs." in kv("job", "list").out


ODD_MAIN = """
from kv_memory.cli import main
from kv_memory.jobs.engines.local import LocalEngine
from tests.jobs.odd_driver import ODD_WORKER

LocalEngine.__init__.__kwdefaults__["command"] = ODD_WORKER
main()
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_job_and_prints_the_command(
    kv: KV, notes: Path, tmp_path: Path, quick: list[str]
) -> None:
    # Two documents are done; the third is begun and waits for a gate that nobody opens.
    odd = {"ODD_LOG": str(tmp_path / "log"), "ODD_GATE": str(tmp_path / "gate"), "ODD_PASS": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", ODD_MAIN, "job", "run", "notes", "--name", "j", "--json", *quick],
        cwd=tmp_path,
        env={**os.environ, **odd, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as ran:
        assert ran.stdout
        for line in ran.stdout:
            event = json.loads(line)
            if event["event"] == "progress" and event["done"] == 2:
                break
        ran.send_signal(signal.SIGINT)
        out, err = ran.communicate(timeout=60)
    assert ran.returncode == 130, err
    last = json.loads(out.splitlines()[-1])
    assert last["error"]["next_step"] == (
        "2 documents done and stored, 3 to do; `kv-memory job resume j` resumes the job."
    )
    (job,) = kv("job", "list", "--json").json["jobs"]
    assert (job["state"], job["done"], job["running"], job["pending"]) == ("interrupted", 2, 0, 3)
    done = kv("job", "resume")
    assert done.code == 0 and "5 added" in done.out
