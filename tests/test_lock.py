"""requirements.lock: complete, exact, for each supported Python and system, and what this environment was made from."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import lock
from tests.test_packaging import PROJECT, ROOT

TEXT = lock.LOCK.read_text(encoding="utf-8")
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": system,
    }
    for python, (platform, system) in product(
        ("3.11", "3.12", "3.13"), (("linux", "Linux"), ("darwin", "Darwin"), ("win32", "Windows"))
    )
]


def test_each_line_pins_one_exact_version_without_a_url() -> None:
    lines = lock.requirements(TEXT)
    assert len(lines) > 150
    for line in lines:
        (clause,) = line.specifier
        assert (clause.operator, line.url, "*" in clause.version) == ("==", None, False), line
        assert Version(clause.version)
    assert "://" not in TEXT


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: f"{e['sys_platform']}-{e['python_version']}")
def test_the_lock_satisfies_all_requirements(environment: dict[str, Any]) -> None:
    found = {canonicalize_name(r.name): r for r in lock.requirements(TEXT) if holds(r, environment)}
    names = [canonicalize_name(r.name) for r in lock.requirements(TEXT) if holds(r, environment)]
    assert len(names) == len(set(names))
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["dev"], *extras["embedded"]]:
        asked = Requirement(line)
        if holds(asked, environment):
            (clause,) = found[canonicalize_name(asked.name)].specifier
            assert asked.specifier.contains(clause.version, prereleases=True), f"{asked}: locked {clause}"


def holds(requirement: Requirement, environment: dict[str, Any]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_torch_is_pinned_to_the_available_release() -> None:
    assert lock.locked()["torch"] == "2.13.0"


# In the environment that `make setup` makes. The others, of `make oldest` and `make newest`, leave this test out.
def test_what_is_installed_is_what_is_locked() -> None:
    locked, installed = lock.locked(), lock.installed()
    assert {
        name: (version, locked.get(name)) for name, version in installed.items() if version != locked.get(name)
    } == {}


def test_installed_packages_are_compatible() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
