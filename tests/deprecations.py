"""A pytest plugin: what was deprecated is listed at the end, a line a message and place, and who is to mend it.

Loaded by `make newest` (`-p tests.deprecations`), where these warnings are no errors.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORWARD = "torch/nn/modules/module.py"  # stands between our call of a model and its forward
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_seen: Counter[tuple[str, str]] = Counter()


def place(filename: str, lineno: int) -> str:
    """The line that a warning points to: from `site-packages` on, or from the root of the project."""
    path = Path(filename)
    if "site-packages" in path.parts:
        return f"{'/'.join(path.parts[path.parts.index('site-packages') + 1 :])}:{lineno}"
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{lineno}"


def is_ours(where: str) -> bool:
    """Whether a place lies in the project, or a call of a model seems to come from there."""
    file = where.rpartition(":")[0]
    return file == FORWARD or (ROOT / file).exists()


def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    """Count a warning. Under pytest-xdist the main process is told of those of all workers."""
    if issubclass(warning_message.category, DEPRECATIONS):
        where = place(warning_message.filename, warning_message.lineno)
        _seen[where, " ".join(f"{warning_message.category.__name__}: {warning_message.message}".split())] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the list, or that there is none."""
    for title, ours in (("Deprecated, and used by this project", True), ("Deprecated, and used by libraries", False)):
        found = sorted(key for key in _seen if is_ours(key[0]) is ours)
        terminalreporter.section(f"{title}: {len(found)}")
        for where, message in found:
            terminalreporter.write_line(f"{_seen[where, message]:>5} x {where}\n        {message[:300]}")
