"""The whole test suite in environments of its own: on the lock, on the lowest and on the newest declared releases.

    .venv/bin/nox                        # what `make setup` installs, from requirements.lock
    make oldest                          # the lower bounds of pyproject.toml
    make newest                          # the newest releases below its upper bounds
    make oldest ARGS="tests/store -x"    # arguments for pytest

nox, not tox: three sessions that differ in one list, and Python says that best. An environment stays in .nox; nox -R
uses it again as it is.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

import nox
from uv import find_uv_bin

nox.options.sessions = ["locked"]
nox.options.default_venv_backend = "venv"

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = sorted(PROJECT["optional-dependencies"])
# Outside the lock, what libraries deprecate fails nothing and is listed at the end: an old one calls others by names
# that they have deprecated since, a new one deprecates what we or others call.
LISTED = [f"-Wdefault::{name}" for name in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")]
LISTED += ["--disable-warnings", "-p", "tests.deprecations"]
LISTED += ["--deselect=tests/test_lock.py::test_what_is_installed_is_what_is_locked"]


@nox.session
def locked(session: nox.Session) -> None:
    """What `make setup` installs."""
    install(session, "-c", "requirements.lock", extras=["dev", "embedded"])
    test(session)


@nox.session
def oldest(session: nox.Session) -> None:
    """The lower bounds of all dependencies and extras, test tools apart; what these need in turn is the newest."""
    bounds, versions = Path(session.create_tmp(), "bounds.txt"), Path(session.create_tmp(), "versions.txt")
    library = [f"--extra={extra}" for extra in EXTRAS if extra != "dev"]
    # Without dependencies: a bound that another one's needs would raise is not a bound, and fails in the second step.
    resolve(session, bounds, *library, "--no-deps", "--resolution=lowest-direct")
    resolve(session, versions, "--all-extras", f"--constraints={bounds}")
    install(session, "-c", str(versions), extras=EXTRAS)
    test(session, *LISTED)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest releases that pip finds."""
    install(session, "--upgrade", "--upgrade-strategy=eager", extras=EXTRAS)
    test(session, *LISTED)


def resolve(session: nox.Session, target: Path, *options: str) -> None:
    """Write the versions that uv chooses for this Python. `--no-config`: the lock's pin of torch is not meant here."""
    python = f"--python-version={sys.version_info.major}.{sys.version_info.minor}"
    command = [find_uv_bin(), "--no-config", "pip", "compile", "pyproject.toml", python, "--no-header", "--no-annotate"]
    session.run_install(*command, "--quiet", f"--output-file={target}", *options, external=True)


def install(session: nox.Session, *options: str, extras: list[str]) -> None:
    """Install the package and its extras; what has to be built is built with the setuptools of the environment."""
    session.install(*options, "setuptools")
    session.install(*options, "--no-build-isolation", "-e", f".[{','.join(extras)}]")


def test(session: nox.Session, *options: str) -> None:
    """Run the suite on two cores; arguments behind `--` go to pytest."""
    command = ["python", "-m", "pytest", "--numprocesses=2", "--dist=loadfile", *options, *session.posargs]
    kept = {name: value for name, value in os.environ.items() if name == "KV_MEMORY_DATA"}
    session.run(*command, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **kept})
