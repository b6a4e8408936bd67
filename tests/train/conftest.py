from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a plot, which takes longer than their steps; a fixture of a module is made before, with one."""
    monkeypatch.setattr("kv_memory.train.trainer.plot_log", lambda records, path: None)
