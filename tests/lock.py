"""requirements.lock against what is installed here.

python -m tests.lock    # the names of packages that are installed and not locked, for `make setup` to remove
"""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).parents[1] / "requirements.lock"
# The package itself, and what creating an environment puts into it.
NOT_LOCKED = {"kv-memory", "pip"}


def requirements(text: str) -> list[Requirement]:
    """Every line of a lock, whichever Python and system it is for."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def locked() -> dict[str, str]:
    """Name and version of each package that the lock has for this Python and system."""
    here = [r for r in requirements(LOCK.read_text(encoding="utf-8")) if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in here}


def installed() -> dict[str, str]:
    """Name and version of each package in this environment, without a local part such as `+cpu`."""
    found = {canonicalize_name(d.name): d.version.partition("+")[0] for d in distributions()}
    return {name: version for name, version in found.items() if name not in NOT_LOCKED}


if __name__ == "__main__":
    print(*sorted(installed().keys() - locked().keys()))
