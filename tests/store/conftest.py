from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # store_samples, which zygote.py needs by name too

from kv_memory.store import Store  # noqa: E402

_ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}
_ZYGOTE = [sys.executable, "-W", "error", str(HERE / "zygote.py")]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store with its databases made, to be copied: making them costs a quarter of a second."""
    folder = tmp_path_factory.mktemp("template") / "store"
    with Store.open(folder) as made:
        made.check()
    return folder


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Iterator[Store]:
    with Store.open(shutil.copytree(empty_store, tmp_path / "store"), create=False) as opened:
        yield opened


@pytest.fixture(scope="session")
def zygote() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        _ZYGOTE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def run_script(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a process of its own, with the names of store_samples; its arguments are in sys.argv.

    `wrapper` is a command to run Python under.
    """

    def run(code: str, *args: object, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        output = [tmp_path_factory.mktemp("output") / name for name in ("stdout", "stderr")]
        job = json.dumps({"code": code, "args": [str(arg) for arg in args], "output": [str(path) for path in output]})
        if wrapper:
            status = subprocess.run([*wrapper, *_ZYGOTE, job], env=_ENVIRONMENT, timeout=100, check=False).returncode
        else:
            process: subprocess.Popen[str] = request.getfixturevalue("zygote")
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(job + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], 100)[0]:
                process.kill()
                pytest.fail("the script did not end within 100 s")
            status = int(process.stdout.readline())
        stdout, stderr = (path.read_text() if path.exists() else "" for path in output)
        return subprocess.CompletedProcess(args, status, stdout, stderr)

    return run
