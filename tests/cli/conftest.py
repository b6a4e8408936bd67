from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kv_memory.cli import app
from tests.cli.ran import Ran
from tests.conftest import make_model, make_tokenizer

FERRY = "The ferry to Skarholm leaves at 7.40 from pier 4.\n"
LIGHT = "The lighthouse of Orvik burned whale oil until 1921.\n"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose window holds the worked examples of the `passage` prompt, a byte a token."""
    folder = tmp_path_factory.mktemp("model") / "tiny-wide"
    make_model("llama", max_position_embeddings=4096).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def kv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `kv-memory` in this process, in a folder of its own, on a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KV_MEMORY_STORE", raising=False)
    monkeypatch.delenv("KV_MEMORY_DEBUG", raising=False)

    def run(*args: object, stdin: str | bytes | None = None) -> Ran:
        done = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, prog_name="kv-memory")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Ran(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., subprocess.Popen[str]]:
    """Start `kv-memory` as a process of its own."""

    def start(*args: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("KV_MEMORY_") or k == "KV_MEMORY_CACHE"}
        return subprocess.Popen(
            [sys.executable, "-c", "from kv_memory.cli import main; main()", *map(str, args)],
            cwd=cwd,
            env={**inherited, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def quick(tiny: Path) -> list[str]:
    """Options of `add` that make it take milliseconds."""
    return ["--model", str(tiny), "--selector", "attention", "--passage-tokens", "64", "--prompt", "passage"]


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory, quick: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("template")
    first = ["add", "-", "--id", "ferry", "--store", str(folder / "s"), "--keep-text", *quick]
    done = CliRunner().invoke(app, first, input=FERRY)
    assert done.exit_code == 0, done.stderr
    done = CliRunner().invoke(app, ["add", "-", "--id", "light", "--store", str(folder / "s")], input=LIGHT)
    assert done.exit_code == 0, done.stderr
    return folder / "s"


@pytest.fixture
def store(tmp_path: Path, _template: Path) -> Path:
    """A store with two documents, `ferry` and `light`, and their texts, where the commands look for it."""
    return shutil.copytree(_template, tmp_path / "kv-memory-store")
