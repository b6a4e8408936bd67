"""Full disks, missing permission, Ctrl-C and failures in the middle: what was there stays, the rest is done later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory import KVMemory, errors
from kv_memory.ingest.pipeline import AddProgress
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, LONG, answerable, assert_says, open_memory
from tests.reference import recorded_inputs

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, limits and users")


@posix
def test_a_full_disk_leaves_the_store_intact(memory: KVMemory) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before, settings = memory.documents(), memory.settings
    with pytest.raises(errors.KVMemoryError) as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # less than a cache takes
        try:
            memory.settings = replace(settings, keep_ratio=1.0, passage_tokens=None)
            memory.add([("long", LONG)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_says(
        caught.value, errors.StoreFullError, what="space|full", where=str(memory.path), step="kv-memory gc|room"
    )
    assert memory.documents() == before
    memory.settings = settings
    assert memory.check().ok
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
    assert memory.add([("long", LONG)]).added == ["long"]


BOOT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.memories import *; exec(sys.stdin.read())"


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Two processes that import what they need while the tests above run, and then wait for their script."""
    made = {
        name: subprocess.Popen(
            [sys.executable, "-W", "error", "-c", BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name in ("permission", "interrupt")
    }
    yield made
    for process in made.values():
        process.kill()
        process.communicate()


def start(process: subprocess.Popen[str], code: str, path: Path) -> None:
    assert process.stdin is not None
    process.stdin.write(f"path = Path({str(path)!r})\n{code}")
    process.stdin.close()
    process.stdin = None  # so that `communicate` leaves it alone


WITHOUT_PERMISSION = """
import os
from kv_memory.errors import StoreError
backbone = wide_backbone()
backbone.prefix
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    with open_memory(path, backbone) as memory:
        memory.add(("new", "Something new."))
    print("no error")
except StoreError as error:
    print("refused", error.where, "|", error.next_step)
"""


@posix
def test_a_store_without_permission_is_an_error(wide: Any, processes: dict[str, subprocess.Popen[str]]) -> None:
    with tempfile.TemporaryDirectory() as name:  # every user can enter it, which pytest's own folders do not allow
        os.chmod(name, 0o755)
        path = Path(name, "store")
        with open_memory(path, wide) as memory:
            memory.add([("ferry", FERRY), ("lamp", LAMP)])
        for folder, _, files in os.walk(path):
            os.chmod(folder, 0o555)
            for file in files:
                os.chmod(Path(folder, file), 0o444)
        start(processes["permission"], WITHOUT_PERMISSION, path)
        out, err = processes["permission"].communicate(timeout=100)
        assert out.startswith(f"refused {path}"), err
        assert "permission" in out.partition("|")[2]
        for folder, _, files in os.walk(path):
            os.chmod(folder, 0o755)
            for file in files:
                os.chmod(Path(folder, file), 0o644)
        with open_memory(path, wide) as memory:
            assert [document.id for document in memory.documents()] == ["ferry", "lamp"]
            assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]


# -- broken off --------------------------------------------------------------------------------------------------------


def assert_the_rest_is_done(memory: KVMemory, n_done: int) -> None:
    """After a broken `add` of LONG: what was there is, the new document is not, and the next run does what is left."""
    assert [document.id for document in memory.documents()] == ["ferry", "lamp"]
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
    report = memory.check()
    assert report.ok and len(report.unreferenced) == n_done
    with recorded_inputs(memory.backbone) as inputs:
        added = memory.add([("ferry", FERRY), ("long", LONG)])
    n_passages = len(memory.document("long").passages)
    assert (added.added, added.unchanged) == (["long"], ["ferry"])
    assert len(inputs) == added.n_passages == n_passages - n_done > 0
    assert memory.check().unreferenced == ()
    assert answerable(memory, "Where is the comet?", FERRY_QUESTION) == ["long", "ferry"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_callback_leaves_the_store_intact(memory: KVMemory, error: type[BaseException]) -> None:
    n_told = 0

    def tell(_: AddProgress) -> None:
        nonlocal n_told
        n_told += 1
        if n_told == 3:
            raise error

    with pytest.raises(error):
        memory.add(("long", LONG), on_progress=tell)
    assert_the_rest_is_done(memory, 3)


INTERRUPTED = """
import time
backbone = wide_backbone()
with open_memory(path, backbone) as memory:
    memory.add([("ferry", FERRY), ("lamp", LAMP)])
    backbone.decoder.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    memory.add(("long", LONG), on_progress=lambda progress: print("passage", flush=True))
print("not interrupted", flush=True)
"""


@posix
def test_control_c_during_an_add_leaves_the_store_intact(
    tmp_path: Path, wide: Any, processes: dict[str, subprocess.Popen[str]]
) -> None:
    process = processes["interrupt"]
    start(process, INTERRUPTED, tmp_path / "store")
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "passage\n", process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGINT, err
    assert "KeyboardInterrupt" in err and "not interrupted" not in out
    with open_memory(tmp_path / "store", wide) as memory:
        n_done = len(memory.store.caches()) - 2
        assert 2 <= n_done <= 4
        assert_the_rest_is_done(memory, n_done)


def test_a_failing_model_leaves_store_and_locks_intact(memory: KVMemory) -> None:
    """Out of memory, say: whatever is raised in a forward pass leaves backbone, store and locks in order."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no memory left")

    handle = memory.backbone.layers[2].register_forward_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            memory.add(("long", LONG))
    finally:
        handle.remove()
    assert_the_rest_is_done(memory, 2)
