from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # store_samples, which zygote.py needs by name too

from filled_store import fill  # noqa: E402

from kv_memory.store import Store, export_collection, maintenance  # noqa: E402

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


# Where catalog and blobs are. What the modules of CONTRACT say holds for all of them, but for tests marked `embedded`,
# which look into the files of the first.
PAIRS = ["sqlite-disk", "sqlite-s3", "postgres-folder", "postgres-s3"]
CONTRACT = {"test_store_caches", "test_store_documents", "test_store_upkeep", "test_store_budgets", "test_store_locks"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    embedded = metafunc.definition.get_closest_marker("embedded") is not None
    if "store" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in CONTRACT and not embedded:
        marks: dict[str, Any] = {"postgres": pytest.mark.postgres, "s3": pytest.mark.s3}
        pairs = [pytest.param(pair, marks=[marks[part] for part in pair.split("-") if part in marks]) for pair in PAIRS]
        metafunc.parametrize("store", pairs, indirect=True)


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs and files without a row count as leftovers at once, not only after ten minutes."""
    monkeypatch.setattr(maintenance, "GRACE_S", -1.0)


@pytest.fixture
def store(
    request: pytest.FixtureRequest, tmp_path: Path, empty_store: Path, place: Callable[[str], dict[str, Any]]
) -> Iterator[Store]:
    pair = getattr(request, "param", "sqlite-disk")
    folder = tmp_path / "store"
    if pair == "sqlite-disk":
        shutil.copytree(empty_store, folder)
    with Store.open(folder, create=pair != "sqlite-disk", **place(pair)) as opened:
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
        aws = {
            name: value for name, value in os.environ.items() if name.startswith("AWS_")
        }  # set since the zygote began
        job = json.dumps(
            {"code": code, "args": [str(arg) for arg in args], "output": [str(path) for path in output], "env": aws}
        )
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


@pytest.fixture(scope="session")
def _filled(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder with a store and its archive, to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    with Store.open(shutil.copytree(empty_store, folder / "store"), create=False) as store:
        fill(store)
        export_collection(store, folder / "all.tar")
    return folder


@pytest.fixture
def full(tmp_path: Path, _filled: Path) -> Iterator[Store]:
    with Store.open(shutil.copytree(_filled / "store", tmp_path / "store"), create=False) as opened:
        yield opened


@pytest.fixture
def archive(tmp_path: Path, _filled: Path) -> Path:
    return Path(shutil.copy(_filled / "all.tar", tmp_path / "all.tar"))


@pytest.fixture
def fresh(tmp_path: Path, empty_store: Path) -> Iterator[Store]:
    with Store.open(shutil.copytree(empty_store, tmp_path / "fresh"), create=False) as opened:
        yield opened
